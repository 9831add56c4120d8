"""TigerPipeline: what reaches the U-Net, what comes out, and what is on disk."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import awaken, make_scheduler, make_unet, make_vae
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

import tiger.pipeline
from tiger.diffusion import latent_mask
from tiger.errors import InputError
from tiger.model import DualControlNet, unet_with_residuals
from tiger.pipeline import TigerPipeline
from tiger.terms import TermFrequencies

TEXT_FG = ["malignant, follicular, solid, extracapsular", "benign, cystic"]
TEXT_BG = ["sonogram transverse plane, bright", "sonogram longitudinal plane"]


@pytest.fixture
def make_pipe(tokenizer, text_encoder):
    """Build a quiet pipeline in a layout, with an awakened control model."""

    def make(layout: str = "sd15", **options) -> TigerPipeline:
        unet = make_unet(layout)
        control = awaken(DualControlNet.from_unet(unet, **options)).eval()
        vae = make_vae(unet.config.in_channels)
        pipe = TigerPipeline(vae, text_encoder, tokenizer, unet, make_scheduler(layout), control)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def generators(count: int = 2) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(40 + i) for i in range(count)]


def conditions() -> dict[str, torch.Tensor]:
    """Masks with a square, maps, (2, 1, 64, 64)."""
    masks = torch.zeros(2, 1, 64, 64)
    masks[0, :, 16:40, 24:48] = 1
    masks[1, :, 32:56, 8:40] = 1
    return {"masks": masks, "maps": torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(8))}


def images() -> torch.Tensor:
    """(2, 3, 64, 64) in [-1, 1]"""
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(9)) * 2 - 1


def run(pipe: TigerPipeline, **options) -> torch.Tensor:
    """(2, 3, 64, 64) in [0, 1]"""
    call = {"num_inference_steps": 2, "output_type": "pt", "generator": generators()} | conditions() | options
    return pipe(TEXT_FG, TEXT_BG, **call).images


def run_latents(pipe: TigerPipeline, **options) -> torch.Tensor:
    """(2, C, 8, 8)"""
    return run(pipe, output_type="latent", **options)


def keep(seen: list[torch.Tensor]) -> dict[str, Callable]:
    """The option that puts the latents after each step into `seen`."""
    return {"callback_on_step_end": lambda _, i, t, values: seen.append(values["latents"])}


class Recorder:
    """Stands in for unet_with_residuals and keeps what it was given."""

    def __init__(self):
        self.calls = []

    def __call__(self, unet, sample, timestep, states, residuals):
        output = unet_with_residuals(unet, sample, timestep, states, residuals)
        self.calls.append({"sample": sample, "t": timestep, "states": states, "residuals": residuals, "output": output})
        return output


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    record = Recorder()
    monkeypatch.setattr(tiger.pipeline, "unet_with_residuals", record)
    return record


def test_round_trip(make_pipe, layout, tmp_path):
    pipe = make_pipe(layout, term_weighting="logbias", fusion="iaff")
    pipe.controlnet.term_frequencies.update(TermFrequencies({"solid": 5}))
    pipe.save_pretrained(tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    loaded = TigerPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.controlnet) is DualControlNet
    assert loaded.controlnet.term_frequencies.counts == {"solid": 5}
    torch.testing.assert_close(run(loaded), run(pipe))


@pytest.mark.parametrize("solver", [DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_every_branch_and_solver(make_pipe, layout, solver):
    pipe = make_pipe(layout)
    pipe.scheduler = solver.from_config(pipe.scheduler.config)
    for branches in tiger.pipeline.NEEDS if layout == "tiny" else ["fg_then_bg"]:
        for start in ({}, {"images": images(), "strength": 0.5}):
            result = run(pipe, branches=branches, **start)
            assert result.shape == (2, 3, 64, 64)
            assert torch.isfinite(result).all() and result.std() > 0


def test_without_control_it_is_stable_diffusion(make_pipe, layout, tmp_path):
    """The coarse stage's folder loads, and gives what diffusers' own pipeline gives."""
    pipe = make_pipe(layout)
    plain = StableDiffusionPipeline(
        pipe.vae,
        pipe.text_encoder,
        pipe.tokenizer,
        pipe.unet,
        pipe.scheduler,
        None,
        None,
        requires_safety_checker=False,
    )
    plain.save_pretrained(tmp_path)
    plain.set_progress_bar_config(disable=True)
    prompts = [f"{fg}, {bg}" for fg, bg in zip(TEXT_FG, TEXT_BG, strict=True)]
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "guidance_rescale": 0.5, "output_type": "pt"}
    expected = plain(prompts, height=64, width=64, generator=generators(), **options).images
    coarse = TigerPipeline.from_pretrained(tmp_path)
    coarse.set_progress_bar_config(disable=True)
    result = coarse(TEXT_FG, TEXT_BG, branches="none", generator=generators(), **options).images
    torch.testing.assert_close(result, expected)
    with pytest.raises(InputError, match="no controlnet"):
        run(coarse)


def test_one_encoder_alone_is_a_controlnet_pipeline(make_pipe):
    """Control in both branches, one prompt, no weights: what diffusers' ControlNet pipeline computes."""
    pipe = make_pipe(term_weighting="off")
    plain = StableDiffusionControlNetPipeline(
        pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, pipe.controlnet.fg, pipe.scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    plain.set_progress_bar_config(disable=True)
    masks = conditions()["masks"]
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "pt"}
    expected = plain(TEXT_FG, image=masks.expand(-1, 3, -1, -1), generator=generators(), **options).images
    result = pipe(
        TEXT_FG, ["", ""], masks=masks, branches="fg", control_uncond="text", generator=generators(), **options
    ).images
    torch.testing.assert_close(result, expected)


def test_an_image_can_be_made_again_alone(make_pipe):
    pipe = make_pipe("tiny")
    whole = run(pipe)
    given = {name: value[1:] for name, value in conditions().items()}
    alone = pipe(
        TEXT_FG[1:], TEXT_BG[1:], **given, num_inference_steps=2, output_type="pt", generator=generators()[1:]
    ).images
    torch.testing.assert_close(alone, whole[1:], rtol=1e-4, atol=1e-5)
    assert torch.equal(run(pipe), whole)


def test_equation_13(make_pipe, recorder):
    """Control enters the conditional branch only; one DDIM step worked out from what the U-Net returned."""
    pipe = make_pipe()
    seen = []
    run(pipe, num_inference_steps=2, guidance_scale=3.0, **keep(seen))
    first, second = recorder.calls
    for residual in first["residuals"]:
        assert not residual[:2].any()
        assert residual[2:].any()
    uncond, cond = first["output"].chunk(2)
    guided = uncond + 3.0 * (cond - uncond)
    latents = first["sample"][:2]
    assert torch.equal(latents, first["sample"][2:])
    alpha = pipe.scheduler.alphas_cumprod
    a, b = alpha[first["t"]], alpha[second["t"]]
    clean = (latents - (1 - a).sqrt() * guided) / a.sqrt()
    torch.testing.assert_close(seen[0], b.sqrt() * clean + (1 - b).sqrt() * guided)
    torch.testing.assert_close(second["sample"][:2], seen[0])


def test_control_in_both_branches(make_pipe, recorder):
    run(make_pipe(), num_inference_steps=1, control_uncond="text")
    residual = recorder.calls[0]["residuals"][-1]  # the first has not met the text yet
    assert residual.shape[0] == 4 and residual[:2].any()
    assert not torch.allclose(residual[:2], residual[2:])  # empty prompts against the given ones


def test_no_guidance_is_one_branch(make_pipe, recorder):
    run(make_pipe(), num_inference_steps=1, guidance_scale=1.0)
    call = recorder.calls[0]
    assert call["sample"].shape[0] == 2 and call["residuals"][0].any()


def test_resolution_weighting(make_pipe, recorder):
    pipe = make_pipe()
    for weighting in (False, True):
        run(pipe, num_inference_steps=1, resolution_weighting=weighting)
    plain, weighted = (call["residuals"] for call in recorder.calls)
    factors = {8: 1, 4: 2, 2: 4, 1: 8}  # 64 / h_i at 512 px
    for a, b in zip(plain, weighted, strict=True):
        torch.testing.assert_close(b, a * factors[a.shape[-1]])


@pytest.mark.parametrize(("branch", "other"), [("fg", "bg"), ("bg", "fg")])
def test_scale_of_an_encoder(make_pipe, recorder, branch, other):
    pipe = make_pipe("tiny")
    for scale in (1.0, 0.5):
        scales = {f"{branch}_scale": scale, f"{other}_scale": 3.0}
        run(pipe, num_inference_steps=1, branches=branch, guidance_scale=1.0, **scales)
    whole, half = (call["residuals"] for call in recorder.calls)
    for a, b in zip(whole, half, strict=True):
        torch.testing.assert_close(b, a * 0.5)


def test_rescaled_guidance_has_the_spread_of_the_conditional_prediction(make_pipe, recorder, monkeypatch):
    guided = []
    original = tiger.pipeline._guide
    monkeypatch.setattr(tiger.pipeline, "_guide", lambda *args: guided.append(original(*args)) or guided[-1])
    run(make_pipe("tiny"), num_inference_steps=1, guidance_scale=5.0, guidance_rescale=1.0)
    cond = recorder.calls[0]["output"].chunk(2)[1]
    torch.testing.assert_close(guided[0].std(dim=(1, 2, 3)), cond.std(dim=(1, 2, 3)))
    assert not torch.allclose(guided[0], cond)


def test_each_network_sees_its_own_prompt(make_pipe, recorder, monkeypatch):
    pipe = make_pipe()
    calls = []
    original = DualControlNet.forward

    def forward(self, sample, t, fg_states, bg_states, *args, **kwargs):
        calls.append((fg_states, bg_states, kwargs["term_weights"]))
        return original(self, sample, t, fg_states, bg_states, *args, **kwargs)

    monkeypatch.setattr(DualControlNet, "forward", forward)
    run(pipe, num_inference_steps=1)
    fg, bg, weights = calls[0]
    joint = [f"{a}, {b}" for a, b in zip(TEXT_FG, TEXT_BG, strict=True)]
    assert torch.equal(fg, pipe._states(TEXT_FG, False))
    assert torch.equal(bg, pipe._states(TEXT_BG, False))
    assert torch.equal(recorder.calls[0]["states"], pipe._states(joint, True))
    assert weights[0].max() == pytest.approx(3.1)  # extracapsular is particular to the follicular subtype


def test_inference_uses_the_frequencies_of_training(make_pipe):
    pipe = make_pipe()
    before = run(pipe, branches="fg")
    pipe.controlnet.term_frequencies.update(TermFrequencies({"solid": 1, "cystic": 1}))
    assert not torch.allclose(run(pipe, branches="fg"), before)


def test_texts_and_conditions_are_encoded_once(make_pipe):
    pipe = make_pipe()
    count = {"text": 0, "mask": 0, "map": 0, "image": 0}
    modules = {
        "text": pipe.text_encoder,
        "mask": pipe.controlnet.fg.controlnet_cond_embedding,
        "map": pipe.controlnet.bg.controlnet_cond_embedding,
        "image": pipe.vae.encoder,
    }
    hooks = [
        module.register_forward_hook(lambda *_, name=name: count.update({name: count[name] + 1}))
        for name, module in modules.items()
    ]
    run(pipe, num_inference_steps=4)
    for hook in hooks:  # the text encoder is shared with other tests
        hook.remove()
    assert count == {"text": 3, "mask": 1, "map": 1, "image": 0}  # joint, FG and BG texts; there is no image


@pytest.mark.parametrize("solver", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_fg_then_bg_on_images_inpaints_the_nodule_then_the_rest(make_pipe, solver):
    pipe = make_pipe()
    pipe.scheduler = solver.from_config(pipe.scheduler.config)
    seen = []
    run(pipe, branches="fg_then_bg", images=images(), num_inference_steps=3, **keep(seen))
    nodule = latent_mask(conditions()["masks"], (8, 8)).bool().expand(-1, 4, -1, -1)
    init = pipe._encode_images(images())
    reference = solver.from_config(pipe.scheduler.config)
    reference.set_timesteps(3)
    noise = randn_tensor((2, 4, 8, 8), generators())
    known = reference.add_noise(init, noise, reference.timesteps[1:2])  # after the first of three steps
    torch.testing.assert_close(seen[0][~nodule], known[~nodule])
    first, second = seen[2], seen[5]
    assert torch.equal(first[~nodule], init[~nodule])
    assert not torch.isclose(first[nodule], init[nodule]).any()
    assert torch.equal(second[nodule], first[nodule])
    assert not torch.isclose(second[~nodule], init[~nodule]).any()


def test_fg_then_bg_from_nothing_keeps_the_nodule(make_pipe, recorder):
    pipe = make_pipe()
    seen = []
    run(pipe, branches="fg_then_bg", **keep(seen))
    nodule = latent_mask(conditions()["masks"], (8, 8)).bool().expand(-1, 4, -1, -1)
    first, second = seen[1], seen[3]
    assert torch.equal(second[nodule], first[nodule])
    assert not torch.isclose(second[~nodule], first[~nodule]).any()
    run(pipe, branches="fg", **keep(seen))
    assert torch.equal(seen[5], first)


@pytest.mark.parametrize("solver", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_refinement_stays_near_the_image(make_pipe, solver):
    pipe = make_pipe()
    pipe.scheduler = solver.from_config(pipe.scheduler.config)
    init = pipe._encode_images(images())
    distance = {}
    for strength in (0.1, 0.5):
        seen: list[torch.Tensor] = []
        run(pipe, images=images(), strength=strength, num_inference_steps=20, guidance_scale=1.0, **keep(seen))
        assert len(seen) == 20 * strength
        distance[strength] = (seen[-1] - init).norm()
    assert distance[0.1] < distance[0.5]
    assert distance[0.1] < 0.5 * init.norm() + 10


def test_half_precision(make_pipe, layout):
    """bfloat16 throughout, with the same noise: near float32, and a picture."""
    pipe = make_pipe(layout)
    expected = run(pipe, branches="fg_then_bg", images=images(), strength=0.5)
    pipe.vae, pipe.unet, pipe.controlnet = (m.to(torch.bfloat16) for m in (pipe.vae, pipe.unet, pipe.controlnet))
    result = run(pipe, branches="fg_then_bg", images=images(), strength=0.5)
    assert (result.float() - expected).abs().mean() < 0.02


def test_callback_may_replace_latents(make_pipe):
    result = run(make_pipe(), callback_on_step_end=lambda _, i, t, values: {"latents": values["latents"] * 0})
    assert torch.equal(result[0], result[1])


def test_pil_in_and_out(make_pipe):
    pipe = make_pipe("tiny")
    given = conditions()
    given["maps"] = (given["maps"] * 255).round() / 255
    pil = {
        name: [Image.fromarray((x[0].numpy() * 255).round().astype(np.uint8)) for x in value]
        for name, value in given.items()
    }
    expected = run(pipe, **given)
    torch.testing.assert_close(run(pipe, **pil), expected)
    shown = run(pipe, **pil, output_type="pil")
    assert shown[0].size == (64, 64)
    array = run(pipe, **pil, output_type="np")
    np.testing.assert_allclose(array, expected.permute(0, 2, 3, 1), atol=1e-5)


def test_latents_out_are_what_the_vae_decodes(make_pipe):
    pipe = make_pipe("tiny")
    latents = run_latents(pipe)
    assert latents.shape == (2, 8, 8, 8) and latents.dtype == torch.float32
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), run(pipe))


def test_callback_sees_every_step_in_order(make_pipe):
    pipe, calls = make_pipe("tiny"), []
    run(pipe, num_inference_steps=3, callback_on_step_end=lambda *call: calls.append(call))
    assert [step for _, step, _, _ in calls] == [0, 1, 2]
    assert [int(t) for _, _, t, _ in calls] == pipe.scheduler.timesteps.tolist()
    assert all(caller is pipe and set(values) == {"latents"} for caller, _, _, values in calls)


@pytest.mark.parametrize("uncond", ["null", "text"])
def test_guidance_interval(make_pipe, recorder, uncond):
    """Guidance within the interval as always; outside, one branch, as with a scale of 1."""
    pipe = make_pipe("tiny")
    options = {"num_inference_steps": 4, "control_uncond": uncond, "guidance_scale": 3.0}
    run(pipe, guidance_interval=(0.3, 0.8), **options)  # trailing timesteps 999, 749, 499, 249 of 1000
    assert [len(call["sample"]) for call in recorder.calls] == [2, 4, 4, 2]
    assert all(len(call["states"]) == len(call["sample"]) for call in recorder.calls)
    whole = run_latents(pipe, **options)
    torch.testing.assert_close(run_latents(pipe, guidance_interval=(0.0, 1.0), **options), whole)
    nowhere = run_latents(pipe, guidance_interval=(0.3, 0.4), **options)
    torch.testing.assert_close(nowhere, run_latents(pipe, **(options | {"guidance_scale": 1.0})))
    assert not torch.allclose(nowhere, whole)


def test_reused_encoders_run_at_every_kth_step(make_pipe, layout):
    pipe = make_pipe(layout)
    count = {"unet": 0, "fg": 0, "decoder": 0}
    modules = {"unet": pipe.unet.mid_block, "fg": pipe.controlnet.fg, "decoder": pipe.unet.conv_out}
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: count.update({name: count[name] + 1}))
    seen, all_seen = [], []
    run(pipe, num_inference_steps=5, reuse_encoder=2, **keep(seen))
    assert count == {"unet": 3, "fg": 3, "decoder": 5}
    run(pipe, num_inference_steps=5, **keep(all_seen))
    torch.testing.assert_close(seen[0], all_seen[0])  # the first step is not yet another
    assert not torch.allclose(seen[1], all_seen[1])
    assert torch.isfinite(seen[-1]).all()


def test_reused_features_are_of_the_same_branches(make_pipe):
    """Where guidance begins or ends the encoders run again, as the batch is another."""
    pipe = make_pipe("tiny")
    options = {"num_inference_steps": 4, "guidance_interval": (0.3, 0.8)}
    assert run(pipe, reuse_encoder=4, **options).shape == (2, 3, 64, 64)


def test_networks_are_brought_in_before_their_parts_are_used(make_pipe):
    """enable_model_cpu_offload moves a network at its own forward; ours also use the parts of one."""
    pipe, order = make_pipe("tiny"), []

    class Hook(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            order.append(type(module).__name__)
            return args, kwargs

    embedder = pipe.controlnet.fg.controlnet_cond_embedding
    embedder.register_forward_hook(lambda *_: order.append("embedding"))
    pipe.unet.conv_in.register_forward_hook(lambda *_: order.append("conv_in"))
    for net in (pipe.controlnet, pipe.unet):
        add_hook_to_module(net, Hook())
    run(pipe, num_inference_steps=1, reuse_encoder=2)
    assert order.index("DualControlNet") < order.index("embedding")
    assert order.index("UNet2DConditionModel") < order.index("conv_in")
    assert set(pipe.model_cpu_offload_seq.split("->")) == {"text_encoder", "unet", "vae"}


@pytest.mark.slow  # a minute and more on a slow processor
def test_compiled_blocks_give_the_same(make_pipe):
    pipe = make_pipe("tiny")
    options = {"branches": "fg", "num_inference_steps": 1}
    expected = run(pipe, **options)
    calls = []
    pipe.compile_blocks(backend=lambda graph, _: calls.append(graph) or graph.forward)
    torch.testing.assert_close(run(pipe, **options), expected)
    assert len(calls) >= len(pipe.unet.down_blocks) + len(pipe.unet.up_blocks) + len(pipe.controlnet.fg.down_blocks)


def test_size(make_pipe):
    pipe = make_pipe("tiny")
    wide = pipe(TEXT_FG, TEXT_BG, branches="none", height=64, width=96, num_inference_steps=1, output_type="pt").images
    assert wide.shape == (2, 3, 64, 96)
    large = torch.zeros(2, 1, 96, 96)
    large[..., :20, :20] = 1
    assert run(pipe, masks=large, maps=large, num_inference_steps=1).shape == (2, 3, 96, 96)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branches": "both"}, "branches is one of fused"),
        ({"control_uncond": "off"}, "null or text"),
        ({"strength": 0.0}, "strength lies in"),
        ({"masks": None}, "needs masks"),
        ({"maps": None, "branches": "bg"}, "needs maps"),
        ({"masks": torch.ones(3, 1, 64, 64)}, "2 text_fg but 3 masks"),
        ({"generator": generators(3)}, "2 text_fg but 3 generator"),
        ({"guidance_interval": (0.6, 0.4)}, "low, high"),
        ({"reuse_encoder": 0}, "at least 1"),
        ({"output_type": "jpg"}, "output_type is one of"),
        ({"masks": torch.ones(2, 1, 60, 60)}, "multiples of 8"),
        ({"maps": torch.ones(2, 1, 32, 32)}, "maps are"),
    ],
)
def test_contradictions_are_named(make_pipe, options, message):
    with pytest.raises(InputError, match=message):
        run(make_pipe("tiny"), **options)


def test_texts_are_lists(make_pipe):
    with pytest.raises(InputError, match="lists"):
        make_pipe("tiny")("malignant", "sonogram", **conditions())


def test_the_readmes_example_draws_an_image(make_pipe, tmp_path, monkeypatch):
    """On a tiny model and a square mask in place of a quickstart's."""
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    make_pipe().save_pretrained("runs/quickstart/finetune")
    square = np.zeros((64, 64), np.uint8)
    square[20:40, 16:44] = 255
    for kind in ("condition_fg", "condition_bg"):
        folder = tmp_path / "runs" / "quickstart" / "data" / kind
        folder.mkdir(parents=True)
        Image.fromarray(square).save(folder / "000000.png")
    exec(compile(example, "README.md", "exec"), {})
    assert Image.open("nodule.png").size == (64, 64)
    assert sum(bool(line.strip()) for line in example.splitlines()) <= 12
