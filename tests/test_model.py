"""DualControlNet: both encoders and the fusion, their gradients, and what is on disk."""

import json
from collections.abc import Callable

import pytest
import torch
from conftest import LAYOUTS, TEXT_WIDTH, awaken, make_scheduler, make_unet
from diffusers import ControlNetModel

from tiger import diffusion
from tiger.errors import InputError
from tiger.model import DualControlNet, control_encoder, separate_surrogate, unet_with_residuals
from tiger.terms import TermFrequencies


def inputs(channels: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Arguments of DualControlNet.forward, conditions with a square nodule."""
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    mask = torch.zeros(batch, 1, 64, 64, dtype=dtype)
    mask[..., 16:40, 8:32] = 1
    return {
        "sample": normal(batch, channels, 8, 8),
        "timestep": torch.tensor([5, 900, 300])[:batch],
        "fg_states": normal(batch, 77, TEXT_WIDTH),
        "bg_states": normal(batch, 77, TEXT_WIDTH),
        "fg_cond": mask,
        "bg_cond": torch.rand(batch, 1, 64, 64, generator=generator).to(dtype),
    }


def assert_lists_close(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


def test_starts_as_identity(layout):
    unet = make_unet(layout)
    model = DualControlNet.from_unet(unet)
    given = inputs(unet.config.in_channels)
    residuals = model(**given)
    assert len(residuals) == (10 if layout == "tiny" else 13)
    assert not any(r.any() for r in residuals)
    with_control = unet_with_residuals(unet, given["sample"], given["timestep"], given["fg_states"], residuals)
    without = unet_with_residuals(unet, given["sample"], given["timestep"], given["fg_states"], None)
    assert torch.equal(with_control, without)


def test_encoders_are_copies_of_the_unet(layout):
    unet = make_unet(layout)
    state, own = control_encoder(unet).state_dict(), unet.state_dict()
    new = {name.split(".")[0] for name in state if name not in own}
    assert new == {"controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block"}
    assert all(torch.equal(state[name], own[name]) for name in state if name in own)
    assert any(name.startswith("mid_block") for name in state)
    if layout == "tiny":
        assert control_encoder(unet).config.addition_embed_type_num_heads == 4


@pytest.mark.parametrize(("factor", "size"), [(4, 32), (8, 64), (16, 128), (32, 256)])
def test_condition_embedding_follows_the_vae(factor, size):
    net = control_encoder(make_unet("sd15"), vae_scale_factor=factor)
    assert net.controlnet_cond_embedding(torch.zeros(1, 3, size, size)).shape == (1, 16, 8, 8)


def test_stable_diffusion_keeps_controlnets_own_embedding_widths():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(block_out_channels=(320, 640), down_block_types=("DownBlock2D",) * 2,
                                    up_block_types=("UpBlock2D",) * 2, layers_per_block=1)  # fmt: skip
        net = control_encoder(unet)
    assert list(net.config.conditioning_embedding_out_channels) == [16, 32, 96, 256]


def test_condition_embedding_is_half_as_wide_in_a_narrow_base():
    net = control_encoder(make_unet("tiny"))
    widest = net.config.block_out_channels[0]
    assert list(net.config.conditioning_embedding_out_channels) == [8, 16, min(48, widest), min(128, widest)]


def test_the_condition_keeps_its_size_on_its_way_through_the_embedding():
    torch.manual_seed(0)
    embedding = control_encoder(make_unet("sd15")).controlnet_cond_embedding
    hidden = torch.nn.functional.avg_pool2d(torch.rand(4, 3, 64, 64), 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    spread = [hidden.std((2, 3)).mean()]  # over positions: what is said of where
    for layer in (embedding.conv_in, *embedding.blocks):
        hidden = torch.nn.functional.silu(layer(hidden))
        spread.append(hidden.std((2, 3)).mean())
    assert spread[-1] > 0.3 * spread[0]
    assert not embedding(torch.rand(1, 3, 64, 64)).any()  # the last layer starts at zero


def train(model: DualControlNet, unet: torch.nn.Module, steps: int) -> None:
    """A few AdamW steps of the joint loss."""
    unet.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    given = inputs(unet.config.in_channels)
    for _ in range(steps):
        prediction = unet_with_residuals(unet, given["sample"], given["timestep"], given["fg_states"], model(**given))
        l_fg, l_bg = diffusion.masked_losses(prediction, torch.ones_like(prediction), given["fg_cond"])
        optimizer.zero_grad()
        (l_fg + l_bg).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("layout", "fusion"), [("sd15", "aff"), ("sd21", "aff"), ("tiny", "aff"), ("tiny", "iaff"), ("tiny", "sum")]
)
def test_training_changes_every_part_and_saving_keeps_it(layout, fusion, tmp_path):
    unet = make_unet(layout)
    model = DualControlNet.from_unet(unet, fusion=fusion, fusion_gain=2.0, term_weighting="logbias", knowledge="organ")
    model.term_frequencies.update(TermFrequencies({"solid": 3, "cystic": 1}))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, unet, steps=3)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert changed >= {name for name in start if name.startswith(("fg.", "bg."))}
    for index, layer in enumerate(model.fusion.layers):  # some tensors start late, behind others that start at zero
        assert {f"fusion.layers.{index}.{name}" for name in layer.state_dict()} & changed

    model.save_pretrained(str(tmp_path))
    loaded = DualControlNet.from_pretrained(tmp_path)
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert loaded.term_frequencies.counts == {"solid": 3, "cystic": 1}
    assert (loaded.term_weighting, loaded.config.knowledge) == ("logbias", "organ")
    given = inputs(unet.config.in_channels) | {"term_weights": torch.rand(2, 77) + 0.5}
    for a, b in zip(model.eval()(**given), loaded(**given), strict=True):  # the term weights are at work again
        assert torch.equal(a, b)


def test_saved_folder(tmp_path):
    DualControlNet.from_unet(make_unet("tiny")).save_pretrained(tmp_path)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    weights = "diffusion_pytorch_model.safetensors"
    assert files == sorted(
        ["config.json", "term_frequencies.json"]
        + [f"{part}/{name}" for part in ("fg", "bg", "fusion") for name in ("config.json", weights)]
    )
    assert json.loads((tmp_path / "config.json").read_text())["term_weighting"] == "mult"


def test_each_encoder_is_a_plain_controlnet(layout, tmp_path):
    unet = make_unet(layout)
    model = awaken(DualControlNet.from_unet(unet))
    model.save_pretrained(tmp_path)
    given = inputs(unet.config.in_channels)
    for part, other in (("fg", "bg"), ("bg", "fg")):
        plain = ControlNetModel.from_pretrained(tmp_path / part, use_safetensors=True)
        cond = given[f"{part}_cond"].expand(-1, 3, -1, -1)
        output = plain(given["sample"], given["timestep"], given[f"{part}_states"], cond)
        alone = model(**(given | {f"{other}_cond": None}))
        assert_lists_close(alone, [*output.down_block_res_samples, output.mid_block_res_sample])


def test_missing_parts_are_named(tmp_path):
    DualControlNet.from_unet(make_unet("tiny")).save_pretrained(tmp_path)
    (tmp_path / "fusion" / "config.json").unlink()
    with pytest.raises(InputError, match="lacks fusion/config.json"):
        DualControlNet.from_pretrained(tmp_path)


def test_term_weights_act_on_the_fg_encoder_only():
    unet = make_unet("sd15")
    model = awaken(DualControlNet.from_unet(unet, fusion="sum"))
    given = inputs(4)
    heavy = {"term_weights": torch.rand(2, 77) * 3}
    for absent, acts in (("bg_cond", True), ("fg_cond", False)):
        alone = given | {absent: None}
        same = all(torch.equal(a, b) for a, b in zip(model(**alone), model(**(alone | heavy)), strict=True))
        assert same is not acts
    off = awaken(DualControlNet.from_unet(unet, term_weighting="off"))
    assert_lists_close(off(**given), off(**(given | heavy)))


def branch_losses(unet: torch.nn.Module, given: dict[str, torch.Tensor]) -> tuple[Callable, Callable]:
    """decode and losses, as the fine stage defines them."""
    goal = torch.randn(given["sample"].shape, generator=torch.Generator().manual_seed(2)).to(given["sample"])

    def decode(residuals: list[torch.Tensor]) -> torch.Tensor:
        return unet_with_residuals(unet, given["sample"], given["timestep"], given["bg_states"], residuals)

    def losses(prediction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        error = (prediction - goal).square().mean(1, keepdim=True)
        m = diffusion.latent_mask(given["fg_cond"], error.shape[-2:])
        return (error * m).sum() / m.sum(), (error * (1 - m)).sum() / (1 - m).sum()

    return decode, losses


def gradients(part: torch.nn.Module) -> list[torch.Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in part.parameters()]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fusion", ["aff", "iaff"])
@pytest.mark.parametrize("dropped", [False, True])
def test_separate_gives_each_encoder_the_gradient_of_its_own_loss(layout, fusion, dropped):
    """Against two independent full backward passes, in float64."""
    unet = make_unet(layout).double().requires_grad_(False)
    model = awaken(DualControlNet.from_unet(unet, fusion=fusion)).double()
    given = inputs(unet.config.in_channels, batch=3, dtype=torch.float64)
    given |= {"term_weights": torch.rand(3, 77).double() + 0.5}
    if dropped:
        given |= {"fg_keep": torch.tensor([True, False, True]), "bg_keep": torch.tensor([True, True, False])}
    decode, losses = branch_losses(unet, given)

    expected = []
    for which in (0, 1):
        model.zero_grad()
        losses(decode(model(**given)))[which].backward()
        expected.append({name: gradients(getattr(model, name)) for name in ("fg", "bg", "fusion")})
    full_fg, full_bg = expected
    assert any(g.abs().max() > 1e-6 for g in full_fg["bg"])  # L_FG would reach the BG-Encoder: there is a path to cut

    model.zero_grad()
    for_fg, for_bg = model(**given, paths="split")
    surrogate, l_fg, l_bg = separate_surrogate(for_fg, for_bg, decode, losses, loss_scale=64.0)
    surrogate.backward()

    torch.testing.assert_close((l_fg, l_bg), losses(decode(model(**given))))
    close = {"rtol": 1e-10, "atol": 1e-14}
    for got, want in zip(gradients(model.fg), full_fg["fg"], strict=True):
        torch.testing.assert_close(got, want, **close)
    for got, want in zip(gradients(model.bg), full_bg["bg"], strict=True):
        torch.testing.assert_close(got, want, **close)
    for got, a, b in zip(gradients(model.fusion), full_fg["fusion"], full_bg["fusion"], strict=True):
        torch.testing.assert_close(got, a + b, **close)


def test_split_lists_have_equal_values():
    model = awaken(DualControlNet.from_unet(make_unet("tiny")))
    given = inputs(8)
    for_fg, for_bg = model(**given, paths="split")
    assert_lists_close(for_fg, for_bg)
    assert_lists_close(for_fg, model(**given))


@pytest.mark.parametrize(("paths", "trained", "other"), [("fg", "fg", "bg"), ("bg", "bg", "fg")])
def test_one_path_trains_one_encoder(paths, trained, other):
    model = awaken(DualControlNet.from_unet(make_unet("tiny")))
    sum(r.sum() for r in model(**inputs(8), paths=paths)).backward()
    assert all(p.grad is None for p in getattr(model, other).parameters())
    for part in (trained, "fusion"):
        assert any(p.grad is not None and p.grad.any() for p in getattr(model, part).parameters())


def test_the_frozen_encoder_of_the_unet_leaves_no_graph():
    unet = make_unet("tiny").requires_grad_(False)
    model = awaken(DualControlNet.from_unet(unet))
    tracked = {}
    for name in ("down_blocks", "up_blocks"):
        block = getattr(unet, name)[0]
        block.register_forward_hook(
            lambda _, __, out, name=name: tracked.update({name: (out[0] if type(out) is tuple else out).requires_grad})
        )
    given = inputs(8)
    unet_with_residuals(unet, given["sample"], given["timestep"], given["fg_states"], model(**given))
    assert tracked == {"down_blocks": False, "up_blocks": True}


def test_a_dropped_branch_leaves_the_other_alone():
    model = awaken(DualControlNet.from_unet(make_unet("tiny")))
    given = inputs(8, batch=3)
    fg, bg = model(**(given | {"bg_cond": None})), model(**(given | {"fg_cond": None}))
    fused = model(**given)
    keep = {"fg_keep": torch.tensor([True, True, False]), "bg_keep": torch.tensor([True, False, True])}
    for x, f, b, both in zip(model(**given, **keep), fg, bg, fused, strict=True):
        torch.testing.assert_close(x, torch.stack([both[0], f[1], b[2]]))
    nothing = torch.zeros(3, dtype=torch.bool)
    assert not any(r.any() for r in model(**given, fg_keep=nothing, bg_keep=nothing))
    with pytest.raises(ValueError, match="both conditions"):
        model(**(given | {"fg_cond": None, "bg_cond": None}))


def test_scales_multiply_an_encoders_residuals():
    model = awaken(DualControlNet.from_unet(make_unet("tiny"), fusion="sum"))
    given = inputs(8)
    fg, bg = model(**(given | {"bg_cond": None})), model(**(given | {"fg_cond": None}))
    scaled = model(**given, fg_scale=0.5, bg_scale=2.0)
    assert_lists_close(scaled, [0.5 * f + 2 * b for f, b in zip(fg, bg, strict=True)])


def test_conditions_can_be_embedded_once():
    model = awaken(DualControlNet.from_unet(make_unet("tiny")))
    given = inputs(8)
    expected = model(**given)
    with model.embedded_conditions(given["fg_cond"], given["bg_cond"]) as (fg_cond, bg_cond):
        assert_lists_close(model(**(given | {"fg_cond": fg_cond, "bg_cond": bg_cond})), expected)
    assert_lists_close(model(**given), expected)  # and the embedding layers are back
    with pytest.raises(RuntimeError), model.embedded_conditions(given["fg_cond"], None):
        raise RuntimeError
    assert_lists_close(model(**given), expected)


def test_ddim_scheduler_of_each_layout_trains(layout):
    """Noise, target, two encoders and the split losses fit together for ε and v."""
    unet = make_unet(layout).requires_grad_(False)
    model = DualControlNet.from_unet(unet)
    scheduler = make_scheduler(layout)
    given = inputs(unet.config.in_channels)
    noise = torch.randn_like(given["sample"])
    goal = diffusion.target(scheduler, given["sample"], noise, given["timestep"])
    noised = diffusion.add_noise(scheduler, given["sample"], noise, given["timestep"])
    given |= {"sample": noised}
    for_fg, for_bg = model(**given, paths="split")
    surrogate, l_fg, l_bg = separate_surrogate(
        for_fg,
        for_bg,
        lambda r: unet_with_residuals(unet, noised, given["timestep"], given["fg_states"], r),
        lambda prediction: diffusion.masked_losses(prediction, goal, given["fg_cond"]),
    )
    surrogate.backward()
    assert torch.isfinite(torch.stack([l_fg, l_bg])).all()
    assert any(p.grad is not None and p.grad.any() for p in model.fg.controlnet_down_blocks.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.bg.controlnet_down_blocks.parameters())
