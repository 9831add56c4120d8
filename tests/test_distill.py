"""Step distillation: what the student is taught, and that what it learned is what generation draws with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import LAYOUTS, awaken, make_scheduler, make_text_encoder, make_unet, make_vae
from diffusers import DDIMScheduler, LCMScheduler, UNet2DConditionModel
from training_samples import SIDE, differing, flags, save_data

from tiger import consistency, diffusion, distill, finetune, generate, manifest
from tiger.config import DistillConfig, parse
from tiger.consistency import ConsistencyStage
from tiger.dataset import TigerDataset, cache_latents
from tiger.errors import InputError, run
from tiger.fine import FineInputs
from tiger.knowledge import Knowledge
from tiger.model import DualControlNet, unet_with_residuals
from tiger.pipeline import TigerPipeline
from tiger.stage import SampleNoise
from tiger.tokenizer import build_clip_tokenizer

CPU = torch.device("cpu")
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"
ROWS = (0, 4, 5, 6)
LCM = ["--scheduler", "lcm", "--steps", "3", "--guidance_scale", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return save_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, Path]:
    """Random fine-tuned models of every layout, every part of which matters."""
    folders = {}
    for layout in LAYOUTS:
        folders[layout] = tmp_path_factory.mktemp(layout)
        unet = make_unet(layout)
        control = awaken(DualControlNet.from_unet(unet))
        control.term_frequencies.counts.update({"solid": 9, "cystic": 1})
        parts = make_vae(unet.config.in_channels), make_text_encoder(), build_clip_tokenizer(), unet
        TigerPipeline(*parts, make_scheduler(layout), control).save_pretrained(str(folders[layout]))
    return folders


def train(teacher: Path, data: Path, output_dir: Path, **values: object) -> None:
    values = {"pretrained_model": teacher, "data_dir": data, "output_dir": output_dir, "lora_rank": 2} | values
    distill.main(flags(**values))


@pytest.fixture(scope="module")
def student(teachers, data, tmp_path_factory) -> Path:
    """A finished student of the embedded base's kind."""
    folder = tmp_path_factory.mktemp("student")
    train(teachers["tiny"], data, folder)
    return folder


def make_stage(teacher: Path, data: Path, tmp_path: Path, **values: object) -> tuple[ConsistencyStage, dict[str, Any]]:
    """A stage, and a batch of four for it."""
    argv = flags(pretrained_model=teacher, data_dir=data, output_dir=tmp_path, **({"lora_rank": 2} | values))
    components = distill.load_teacher(str(teacher))
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    stage = distill.make_stage(parse(DistillConfig, argv), components, [], Knowledge.load("thyroid"), accelerator)
    dataset = TigerDataset(manifest.read(data), SIDE, with_conditions=True)
    dataset.latents = cache_latents(components.vae, dataset, tmp_path / "cache")
    return stage, torch.utils.data.default_collate([dataset[i] for i in ROWS])


def inputs(stage: ConsistencyStage, batch: dict[str, Any], step: int = 0) -> tuple[FineInputs, torch.Tensor]:
    return stage.inputs(batch, SampleNoise(0, step, range(len(ROWS)), CPU))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def awaken_adapters(unet: UNet2DConditionModel) -> None:
    """Adapters start at nothing: give them weights, as after training."""
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * randn(*parameter.shape, seed=len(name)))


# ----------------------------------------------------------------------------------------------------------- the maths


def test_clean_and_noise_are_what_was_mixed(layout):
    schedule = make_scheduler(layout)
    timesteps = torch.tensor([0, 19, 500, 980 if layout == "sd15" else 999])
    clean, noise = randn(4, 4, 8, 8), randn(4, 4, 8, 8, seed=1)
    mixed = diffusion.add_noise(schedule, clean, noise, timesteps)
    output = diffusion.target(schedule, clean, noise, timesteps)
    found = consistency.clean_and_noise(schedule, output, mixed, timesteps)
    torch.testing.assert_close(found, (clean, noise), rtol=0, atol=1e-4)


def test_step_is_that_of_diffusers_ddim(layout):
    schedule = make_scheduler(layout)
    schedule.set_timesteps(50)
    timesteps = torch.tensor([39, 499, 779, 999])
    output, latents = randn(4, 4, 8, 8), randn(4, 4, 8, 8, seed=1)
    steps = [schedule.step(output[i], int(t), latents[i]).prev_sample for i, t in enumerate(timesteps)]
    ours = consistency.ddim_step(schedule, output, latents, timesteps, timesteps - 20)
    torch.testing.assert_close(ours, torch.stack(steps))


def test_the_teacher_takes_the_step_that_the_pipeline_takes(layout, teachers, data, tmp_path):
    """Prompts, conditions, term weights, guidance and solver: all as generation has them."""
    stage, batch = make_stage(teachers[layout], data, tmp_path, guidance_scale=3, solver_steps=20)
    pipeline = TigerPipeline.from_pretrained(teachers[layout])
    pipeline.set_progress_bar_config(disable=True)
    found: list[torch.Tensor] = []

    def keep(_: Any, index: int, t: torch.Tensor, given: dict[str, torch.Tensor]) -> None:
        found.append(given["latents"])

    pipeline(
        batch["text_fg"], batch["text_bg"], masks=batch["mask"], maps=batch["sobel"], guidance_scale=3,
        num_inference_steps=20, generator=[torch.Generator().manual_seed(i) for i in range(4)], output_type="latent",
        callback_on_step_end=keep,
    )  # fmt: skip
    t, before = pipeline.scheduler.timesteps[0].repeat(4), pipeline.scheduler.timesteps[1].repeat(4)
    assert int(t[0] - before[0]) == stage.stride
    z = torch.stack([randn(*found[0].shape[1:], seed=i) for i in range(4)])
    given, empty = inputs(stage, batch)
    given = replace(given, z=replace(given.z, latents=z, timesteps=t))
    output = stage.teach(given, empty, stage.residuals(given, z, t))
    step = consistency.ddim_step(stage.schedule, output, z, t, before)
    torch.testing.assert_close(step, found[0], rtol=1e-3, atol=1e-4)


def test_timesteps_are_those_that_the_sampler_visits(teachers, data, tmp_path):
    stage, batch = make_stage(teachers["tiny"], data, tmp_path, solver_steps=10)
    drawn = {int(t) for step in range(30) for t in inputs(stage, batch, step)[0].z.timesteps}
    stage.sampler.set_timesteps(10)
    assert drawn == set(stage.sampler.timesteps.tolist()) == {99, 199, 299, 399, 499, 599, 699, 799, 899, 999}


def test_the_student_names_what_the_sampler_would(layout, teachers, data, tmp_path):
    """Its clean latents are those of LCMScheduler's last step; at t = 0 the noised latents themselves."""
    stage, batch = make_stage(teachers[layout], data, tmp_path)
    awaken_adapters(stage.model.unet)
    given, _ = inputs(stage, batch)
    z = given.z.latents
    for t in (0, 19, 999):
        timesteps = torch.full((4,), t)
        residuals = stage.residuals(given, z, timesteps)
        with torch.no_grad():
            ours = stage.consistent(given, z, timesteps, residuals)
            output = unet_with_residuals(stage.model.unet, z, timesteps, given.states, residuals)
        if t == 0:
            torch.testing.assert_close(ours, z)
            continue
        stage.sampler.set_timesteps(timesteps=[t])
        torch.testing.assert_close(ours, stage.sampler.step(output, torch.tensor(t), z).prev_sample)


def test_pseudo_huber():
    far, near = torch.tensor([3.0, -3.0]), torch.tensor([1e-5])
    assert consistency.pseudo_huber(far) == pytest.approx(3.0, abs=2e-3)
    assert consistency.pseudo_huber(near) == pytest.approx(1e-10 / (2 * consistency.HUBER), rel=0.01)


def test_only_adapters_learn_and_only_from_the_noisier_side(teachers, data, tmp_path):
    stage, batch = make_stage(teachers["tiny"], data, tmp_path)
    awaken_adapters(stage.model.unet)
    answers: list[torch.Tensor] = []
    stage.model.register_forward_hook(lambda _, given, output: answers.append(output))
    loss, logged = stage.loss(batch, SampleNoise(0, 0, range(4), CPU), 0)
    assert [answer.requires_grad for answer in answers] == [False, True]  # the target, then the prediction
    assert logged["loss"] == loss
    loss.backward()
    for name, parameter in stage.model.named_parameters():
        assert ("lora" in name) == (parameter.grad is not None and bool(parameter.grad.any())), name
    assert not any(p.grad is not None for net in stage.components.networks for p in net.parameters())


@pytest.mark.slow  # a minute and more on a slow processor
def test_the_student_comes_to_draw_in_one_step_what_the_teacher_draws_in_many(teachers, data, tmp_path):
    """The teacher's sampler is the pipeline's, with the guidance that the student has to learn."""
    stage, batch = make_stage(
        teachers["tiny"], data, tmp_path, solver_steps=5, guidance_scale=2, lora_rank=8, learning_rate=1e-2
    )
    pipeline = TigerPipeline.from_pretrained(teachers["tiny"])
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"masks": batch["mask"], "maps": batch["sobel"], "output_type": "latent"}

    def draw(unet: UNet2DConditionModel, scheduler: Any, steps: int, guidance_scale: float) -> torch.Tensor:
        pipeline.register_modules(unet=unet, scheduler=scheduler)
        generator = [torch.Generator().manual_seed(i) for i in range(4)]
        settings = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "generator": generator}
        return pipeline(batch["text_fg"], batch["text_bg"], **options, **settings).images

    many = draw(pipeline.unet, pipeline.scheduler, 5, 2.0)
    before = (draw(stage.model.unet, stage.sampler, 1, 1.0) - many).abs().mean()
    for step in range(40):
        loss, _ = stage.loss(batch, SampleNoise(0, step, range(4), CPU), step)
        loss.backward()
        stage.optimizers[0].step()
        stage.optimizers[0].zero_grad()
    after = (draw(stage.model.unet, stage.sampler, 1, 1.0) - many).abs().mean()
    assert after < 0.95 * before  # a random teacher's images are hard to guess


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("layout", ["sd15", "sd21"])  # the third is the student's
def test_every_layout_trains_and_loads(layout, teachers, data, tmp_path):
    train(teachers[layout], data, tmp_path, validation_steps=2, use_ema="true")
    assert (tmp_path / "validation" / "step-2.png").exists()
    pipeline = TigerPipeline.from_pretrained(tmp_path)
    assert isinstance(pipeline.scheduler, LCMScheduler) and pipeline.scheduler.config["original_inference_steps"] == 50
    assert "1 to 8 steps" in (tmp_path / "README.md").read_text()
    for part in ("fg", "bg", "fusion"):
        weights = Path("controlnet") / part / WEIGHTS.name
        assert not differing(tmp_path / weights, teachers[layout] / weights)


def test_adapters_are_merged_and_saved_beside(teachers, student):
    assert differing(student / WEIGHTS, teachers["tiny"] / WEIGHTS)
    adapted = TigerPipeline.from_pretrained(teachers["tiny"]).unet
    given = randn(1, 8, 8, 8), torch.tensor(499), randn(1, 77, 16)
    plain = adapted(*given).sample
    adapted.load_lora_adapter(str(student), weight_name="pytorch_lora_weights.safetensors", prefix="unet")
    merged = UNet2DConditionModel.from_pretrained(student / "unet")
    assert not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(merged(*given).sample, adapted(*given).sample)
    assert not torch.allclose(merged(*given).sample, plain)


def test_resume_is_bit_equal(teachers, data, tmp_path):
    options = {"use_ema": "true", "checkpointing_steps": 2}
    train(teachers["tiny"], data, tmp_path / "whole", max_train_steps=4, **options)
    train(teachers["tiny"], data, tmp_path / "cut", max_train_steps=2, **options)
    train(teachers["tiny"], data, tmp_path / "cut", max_train_steps=4, **options)
    files = [WEIGHTS, *(Path("checkpoint-4") / f"{name}.safetensors" for name in ("unet_lora", "optimizer-0", "ema"))]
    for file in files:
        assert not differing(tmp_path / "whole" / file, tmp_path / "cut" / file)
    lora = "unet_lora.safetensors"
    assert differing(tmp_path / "cut" / "checkpoint-2" / lora, tmp_path / "cut" / "checkpoint-4" / lora)


def test_another_teacher_under_the_same_name_is_refused(teachers, data, tmp_path):
    teacher = tmp_path / "teacher"
    teacher.symlink_to(teachers["tiny"])
    train(teacher, data, tmp_path / "out", max_train_steps=1)
    pipeline = TigerPipeline.from_pretrained(teachers["tiny"])
    pipeline.controlnet.bg.controlnet_mid_block.weight.data += 1
    teacher.unlink()
    pipeline.save_pretrained(str(teacher))
    with pytest.raises(InputError, match="other inputs: pretrained_model"):
        train(teacher, data, tmp_path / "out", max_train_steps=2)


def test_dry_run_counts_what_is_trained(teachers, data, tmp_path, capsys):
    train(teachers["tiny"], data, tmp_path / "out", dry_run="true")
    printed = capsys.readouterr().out
    assert "M parameters trained" in printed and "GFLOP an image" in printed and not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------- generation


def generation(model: Path, data: Path, output_dir: Path, *more: str) -> list[str]:
    argv = ["--model", str(model), "--data_dir", str(data), "--output_dir", str(output_dir), "--prompts", "train"]
    return [*argv, "--count", "PTC=4", "--batch_size", "2", "--device", "cpu", *more]


def test_shards_draw_the_same_bytes(student, data, tmp_path):
    """LCM draws noise at every step: of each image's own generator, or the shard would change it."""
    generate.main(generation(student, data, tmp_path / "whole", *LCM))
    for shard in ("1/2", "0/2"):
        generate.main(generation(student, data, tmp_path / "parts", *LCM, "--shard", shard))
    names = [f"images/PTC_{number:06d}.png" for number in range(4)]
    images = [(tmp_path / "whole" / name).read_bytes() for name in names]
    assert len(set(images)) == 4
    assert images == [(tmp_path / "parts" / name).read_bytes() for name in names]


def test_a_neighbour_does_not_change_an_image(student, data):
    pipeline = TigerPipeline.from_pretrained(student)
    pipeline.set_progress_bar_config(disable=True)
    item = TigerDataset(manifest.read(data), SIDE, with_conditions=True)[0]
    masks, maps = (item[name].expand(2, -1, -1, -1) for name in ("mask", "sobel"))

    def draw(*seeds: int) -> torch.Tensor:
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        settings: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 1, "output_type": "latent"}
        texts = [item["text_fg"]] * 2, [item["text_bg"]] * 2
        return pipeline(*texts, masks=masks, maps=maps, generator=generator, **settings).images

    first, second = draw(1, 2), draw(1, 3)
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])
    torch.testing.assert_close(draw(2, 1)[1], first[0])


def bad_input(main: Any, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert run(main, argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("teacher", LCM, "distill.sh makes a model of few"),
        ("student", [], "give --scheduler lcm --guidance_scale 1"),
        ("student", [*LCM, "--guidance_scale", "7.5"], "give --scheduler lcm --guidance_scale 1"),
        ("student", [*LCM, "--steps", "51"], "at most 50"),
    ],
)
def test_sampler_and_model_must_go_together(model, more, message, teachers, student, data, tmp_path, capsys):
    folder = student if model == "student" else teachers["tiny"]
    assert message in bad_input(generate.main, generation(folder, data, tmp_path / "out", *more), capsys)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_distilled(teachers, student, data, tmp_path, capsys):
    def refusal(model: Path, main: Any = distill.main, **values: object) -> str:
        return bad_input(
            main, flags(pretrained_model=model, data_dir=data, output_dir=tmp_path / "out", **values), capsys
        )

    assert "was distilled" in refusal(student)
    assert "was distilled" in refusal(student, finetune.main)
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "must divide the 1000 timesteps" in refusal(teachers["tiny"], solver_steps=7)
    plain = tmp_path / "plain"
    plain.mkdir()
    for part in teachers["tiny"].iterdir():
        if part.name != "controlnet":
            (plain / part.name).symlink_to(part)
    assert "give the folder that finetune.sh wrote" in refusal(plain)
    zero = tmp_path / "zero"
    zero.mkdir()
    for part in teachers["sd15"].iterdir():
        if part.name != "scheduler":
            (zero / part.name).symlink_to(part)
    config = make_scheduler("sd15").config
    DDIMScheduler.from_config(config, rescale_betas_zero_snr=True).save_pretrained(zero / "scheduler")
    assert "a signal of zero" in refusal(zero)
