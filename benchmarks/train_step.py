"""Seconds of a training step: ours, the published scheme and diffusers' examples, on the same models, data and device.

    python -m benchmarks.train_step --size mid                                    # two CPU cores, minutes
    python -m benchmarks.train_step --size sd21 --device cuda --dtype bf16        # Stable Diffusion 2.1 at 512 px
    python -m benchmarks.train_step --size sd21 --device cuda --dtype bf16 --compile --batch_size 32

All weights are random; the images are noise, read from files as in training. Variants take turns step by
step, so that whatever else the machine does falls on all alike; figures are medians. FLOPs are counted on meta tensors
(tiger/flops.py). Ours is the loop's own code, its guard against bad steps included; logs, averages and checkpoints are
not. "outside" is the share of it that is not forward pass, backward pass, clipping and AdamW: the same step is timed
again on tensors that lie ready, and what it is faster by is reading images, looking up latents and prompts, drawing
noise, the guard, and launching work for a GPU that has nothing to do.

What the others are:
    published    two passes of a ControlNet and the U-Net a step, one for each branch with its own prompt, loss and
                 AdamW; VAE and text encoder at every step (the published code's scheme)
    diffusers    examples/controlnet/train_controlnet.py with a MultiControlNetModel of two: one pass, one prompt, plain
                 MSE; VAE and text encoder at every step
    text2image   examples/text_to_image/train_text_to_image.py
"""

import argparse
import copy
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPTextConfig, CLIPTextModel

from tiger import diffusion, flops, fsdp, guard
from tiger.coarse import CoarseStage
from tiger.components import Components
from tiger.dataset import StepSampler, TigerDataset, cache_latents
from tiger.fine import HALF, FineStage
from tiger.knowledge import Knowledge
from tiger.manifest import FILE_NAME, Manifest, Row, read, write
from tiger.model import control_encoder
from tiger.stage import SampleNoise
from tiger.tokenizer import MAX_LENGTH, build_clip_tokenizer, token_ids
from tiger.trainer import accumulate

UPDATES = ("separate", "alternate", "joint")
LEARNING_RATE, MAX_GRAD_NORM = 1e-5, 1.0


@dataclass(frozen=True)
class Size:
    """Shapes of a base. In "mid" the VAE and the text encoder cost as much beside the U-Net as in SD-2.1."""

    side: int  # pixels
    batch_size: int
    widths: tuple[int, ...]  # of the U-Net's levels
    head_width: int
    groups: int  # of its normalisations
    vae_widths: tuple[int, ...]
    vae_groups: int
    text_width: int
    text_layers: int


SIZES = {
    "tiny": Size(64, 2, (32, 32, 64, 64), 16, 8, (8, 8, 8, 8), 4, 32, 2),
    "mid": Size(256, 4, (128, 256, 384, 384), 64, 32, (48, 96, 176, 176), 16, 256, 12),  # U-Net of 88 M parameters
    "sd21": Size(512, 16, (320, 640, 1280, 1280), 64, 32, (128, 256, 512, 512), 32, 1024, 23),
}


def random_base(size: Size) -> Components:
    """A frozen float32 base of Stable Diffusion's architecture with random weights."""
    torch.manual_seed(0)
    unet_levels: dict[str, Any] = {  # diffusers' types know tuples of one level alone
        "block_out_channels": size.widths,
        "attention_head_dim": tuple(width // size.head_width for width in size.widths),
    }
    vae_levels: dict[str, Any] = {
        "block_out_channels": size.vae_widths,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    unet = UNet2DConditionModel(
        sample_size=size.side // 8, cross_attention_dim=size.text_width, use_linear_projection=True,
        norm_num_groups=size.groups, **unet_levels,
    )  # fmt: skip
    vae = AutoencoderKL(norm_num_groups=size.vae_groups, layers_per_block=2, **vae_levels)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=size.text_width,
            intermediate_size=4 * size.text_width,
            hidden_act="gelu",
            num_hidden_layers=size.text_layers,
            num_attention_heads=max(size.text_width // 64, 1),
            projection_dim=size.text_width,
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=49407,
        )  # fmt: skip
    )
    for network in (vae, unet, text_encoder):
        network.requires_grad_(False).eval()
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    sampler = DDIMScheduler(**betas, prediction_type="v_prediction")
    schedule: Any = DDPMScheduler.from_config(sampler.config)
    return Components(vae, unet, text_encoder, build_clip_tokenizer(), sampler, schedule)


# --- the others -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draws:
    """What chance decides in a step."""

    posterior: torch.Tensor  # (B, C, h, w), of the VAE
    noise: torch.Tensor  # (B, C, h, w)
    timesteps: torch.Tensor  # (B,)


class Example:
    """A step as the others take it: everything is encoded at every step, in contiguous memory; AdamW as torch has it.

    Frozen networks are held in the lower precision of a mixed one, as diffusers' examples hold them.
    """

    clips = True

    def __init__(self, base: Components, accelerator: Accelerator):
        self.accelerator = accelerator
        self.schedule = copy.deepcopy(base.noise_schedule)
        self.tokenizer = base.tokenizer
        half = HALF.get(accelerator.mixed_precision, torch.float32)
        networks: Any = [
            torch.nn.Module.to(copy.deepcopy(network), accelerator.device, half) for network in base.networks
        ]
        self.vae, self.unet, self.text_encoder = networks
        self.trained: list[torch.nn.Module] = []

    def prepare(self) -> None:
        """Make the optimizers: one for each trained module."""
        for module in self.trained:
            module.to(self.accelerator.device).train().requires_grad_(True)
        self.optimizers = [
            torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, weight_decay=0.01) for module in self.trained
        ]

    def losses(self, batch: dict[str, torch.Tensor], draws: Draws) -> Iterator[torch.Tensor]:
        """Scalars to call backward on, one after the other."""
        raise NotImplementedError

    def noised(self, batch: dict[str, torch.Tensor], draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        """Images -> noised latents and what the U-Net should predict of them, (B, C, h, w) each."""
        with torch.no_grad():
            posterior: Any = self.vae.encode(batch["image"].to(self.vae.dtype)).latent_dist
        latents = (posterior.mean + posterior.std * draws.posterior).float() * self.vae.config["scaling_factor"]
        noisy = diffusion.add_noise(self.schedule, latents, draws.noise, draws.timesteps)
        return noisy, diffusion.target(self.schedule, latents, draws.noise, draws.timesteps)

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, L) token ids -> (B, L, D)."""
        with torch.no_grad():
            return self.text_encoder(ids)[0]

    def steered(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor, net: Any, condition: Any, *scales: Any
    ) -> torch.Tensor:
        """A pass of a ControlNet, or of several, and of the U-Net: the prediction, (B, C, h, w)."""
        dtype = self.unet.dtype
        with self.accelerator.autocast():
            down, middle = net(noisy, timesteps, states, condition, *scales, return_dict=False)
        return self.unet(
            noisy.to(dtype), timesteps, states,
            down_block_additional_residuals=[residual.to(dtype) for residual in down],
            mid_block_additional_residual=middle.to(dtype),
        ).sample  # fmt: skip

    def tensors(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """A collated batch on the device, prompts as token ids."""
        images = {name: batch[name] for name in ("image", "mask", "sobel") if name in batch}
        ids = {name: token_ids(batch[name], self.tokenizer) for name in ("text", "text_fg", "text_bg")}
        return {name: tensor.to(self.accelerator.device) for name, tensor in (images | ids).items()}

    def step(self, batch: dict[str, Any]) -> None:
        """From a batch to changed weights."""
        device, tensors = self.accelerator.device, self.tensors(batch)
        shape = (len(batch["image"]), self.unet.config["in_channels"], *(n // 8 for n in batch["image"].shape[2:]))
        timesteps = torch.randint(self.schedule.config["num_train_timesteps"], shape[:1], device=device)
        draws = Draws(torch.randn(shape, device=device), torch.randn(shape, device=device), timesteps)
        for loss in self.losses(tensors, draws):
            self.accelerator.backward(loss)
        if self.clips:
            parameters = [parameter for module in self.trained for parameter in module.parameters()]
            self.accelerator.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def flops(self, side: int) -> float:
        """FLOPs of one image."""
        kept, self.schedule = self.schedule, copy.deepcopy(self.schedule)  # it moves its tables to where data are
        with torch.device("meta"):
            ids, condition = torch.zeros(1, MAX_LENGTH).long(), torch.empty(1, 1, side, side)
            batch = {"image": torch.empty(1, 3, side, side), "mask": condition, "sobel": condition}
            batch |= {"text": ids, "text_fg": ids, "text_bg": ids}
            latents = torch.empty(1, self.unet.config["in_channels"], side // 8, side // 8)
            draws = Draws(latents, latents, torch.zeros(1).long())
        modules = dict.fromkeys([self.vae, self.text_encoder, self.unet, *self.trained])
        counted = flops.count(lambda: torch.stack(list(self.losses(batch, draws))).sum(), list(modules))
        self.schedule = kept
        return counted


class Published(Example):
    """Two passes a step, with the losses of equations 14 and 15; gradients are not clipped there."""

    clips = False

    def __init__(self, base: Components, accelerator: Accelerator):
        super().__init__(base, accelerator)
        self.trained = [control_encoder(base.unet), control_encoder(base.unet)]
        self.prepare()

    def losses(self, batch: dict[str, torch.Tensor], draws: Draws) -> Iterator[torch.Tensor]:
        noisy, target = self.noised(batch, draws)
        for index, (text, condition) in enumerate((("text_fg", "mask"), ("text_bg", "sobel"))):
            rgb = batch[condition].expand(-1, 3, -1, -1)
            states = self.states(batch[text])
            prediction = self.steered(noisy, draws.timesteps, states, self.trained[index], rgb)
            yield diffusion.masked_losses(prediction, target, batch["mask"])[index]


class DiffusersControl(Example):
    """One pass of a MultiControlNetModel: the nets share the prompt, their residuals are summed."""

    def __init__(self, base: Components, accelerator: Accelerator):
        super().__init__(base, accelerator)
        self.trained = [MultiControlNetModel([control_encoder(base.unet), control_encoder(base.unet)])]
        self.prepare()

    def losses(self, batch: dict[str, torch.Tensor], draws: Draws) -> Iterator[torch.Tensor]:
        noisy, target = self.noised(batch, draws)
        conditions = [batch[name].expand(-1, 3, -1, -1) for name in ("mask", "sobel")]
        states = self.states(batch["text"])
        prediction = self.steered(noisy, draws.timesteps, states, self.trained[0], conditions, [1.0, 1.0])
        yield F.mse_loss(prediction.float(), target.float())


class TextToImage(Example):
    """The U-Net learns to draw images from prompts."""

    def __init__(self, base: Components, accelerator: Accelerator):
        super().__init__(base, accelerator)
        self.unet = copy.deepcopy(base.unet)
        self.trained = [self.unet]
        self.prepare()

    def losses(self, batch: dict[str, torch.Tensor], draws: Draws) -> Iterator[torch.Tensor]:
        noisy, target = self.noised(batch, draws)
        with self.accelerator.autocast():
            prediction = self.unet(noisy, draws.timesteps, self.states(batch["text"])).sample
        yield F.mse_loss(prediction.float(), target.float())


# --- ours -------------------------------------------------------------------------------------------------------------


def fine_stage(base: Components, accelerator: Accelerator, **options: Any) -> FineStage:
    """The fine stage with the defaults of its command line."""
    defaults: dict[str, Any] = {
        "knowledge_name": "thyroid", "term_weighting": "mult", "fusion": "aff", "fusion_gain": 1.0,
        "update": "separate", "bg_region": "outside", "learning_rate": LEARNING_RATE, "weight_decay": 0.01,
        "snr_gamma": None, "noise_offset": 0.0, "timestep_sampling": "uniform", "text_dropout": 0.1, "fg_dropout": 0.1,
        "bg_dropout": 0.1, "text_cache_size": 20000, "validation_inference_steps": 2,
    }  # fmt: skip
    return FineStage(copy.deepcopy(base), [], Knowledge.load("thyroid"), accelerator, **defaults | options)


def coarse_stage(base: Components, accelerator: Accelerator, **options: Any) -> CoarseStage:
    """The coarse stage with the defaults of its command line."""
    defaults: dict[str, Any] = {
        "train_text_encoder": False, "lora_rank": None, "lesion_weight": 1.0, "learning_rate": LEARNING_RATE,
        "weight_decay": 0.01,
        "snr_gamma": None, "noise_offset": 0.0, "text_dropout": 0.1, "text_cache_size": 20000,
        "validation_inference_steps": 2,
    }  # fmt: skip
    return CoarseStage(copy.deepcopy(base), [], accelerator.device, **defaults | options)


class Ours:
    """The loop's work for a step of a stage, which may be done again on the tensors of its last step ("bare")."""

    def __init__(self, stage: Any, accelerator: Accelerator, dataset: TigerDataset):
        self.stage, self.accelerator, self.dataset = stage, accelerator, dataset
        self.parameters = [p for p in stage.trainable.parameters() if p.requires_grad]
        stage.trainable = fsdp.prepare(accelerator, stage.trainable, stage.optimizers)
        self.watch = guard.Guard(
            accelerator, guard.StopFlag(), max_loss=math.inf, skip_bad_steps=0, describe=lambda step: "noise"
        )

    def step(self, batch: dict[str, Any], number: int) -> None:
        """From a batch to changed weights, as step `number` of a training."""
        self.stage.begin_step([self.dataset.texts(index) for index in batch["index"].tolist()])
        cut = {"batch_size": len(batch["index"]), "accumulation": 1, "rank": 0, "world": 1}
        logged = accumulate(self.accelerator, self.stage, iter([batch]), 0, number, **cut)
        norm = self.accelerator.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        bad = self.watch.judge(number, logged["loss"], torch.as_tensor(norm))
        guard.apply(self.stage.optimizers, bad, self.accelerator.scaler)
        self.watch.settle(everything=False)

    def bare(self, batch: dict[str, Any]) -> Callable[[int], None]:
        """A function that takes a step on the same tensors each time: models, losses, backward, clipping and AdamW."""
        device = self.accelerator.device
        given = self.stage.inputs(batch, SampleNoise(0, 0, range(len(batch["index"])), device))
        good = torch.zeros((), device=device)

        def step(number: int) -> None:
            self.accelerator.backward(self.stage.losses(given, number)[0])
            self.accelerator.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
            guard.apply(self.stage.optimizers, good, self.accelerator.scaler)

        return step


# --- measuring --------------------------------------------------------------------------------------------------------


def endless(dataset: TigerDataset, batch_size: int) -> Iterator[dict[str, Any]]:
    """Collated batches in the order of training."""
    cut = {"batch_size": batch_size, "accumulation": 1, "rank": 0, "world": 1}
    sampler = StepSampler(len(dataset), None, seed=0, start=0, stop=10**9, **cut)
    return iter(DataLoader(dataset, batch_sampler=sampler))


def numbered(run: Callable[[int], None]) -> Callable[[], None]:
    """Give a step its number: "alternate" trains one encoder in even and the other in odd steps."""
    numbers = itertools.count()
    return lambda: run(next(numbers))


def timed(steps: dict[str, Callable[[], None]], repeats: int, warmup: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each step; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(warmup + repeats):
        for name, step in steps.items():
            synchronize(device)
            began = time.perf_counter()
            step()
            synchronize(device)
            if round_ >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronize(device: torch.device) -> None:
    """Wait for what was queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_fine(
    base: Components, data: "Data", accelerator: Accelerator, args: argparse.Namespace
) -> list["Measured"]:
    """A row for each scheme of the fine stage."""
    published, control = Published(base, accelerator), DiffusersControl(base, accelerator)
    stage = fine_stage(base, accelerator, compile=args.compile)
    counted = {"published": published.flops(data.side), "diffusers": control.flops(data.side)}
    for update in UPDATES:
        stage.update = update
        counted[f"ours, {update}"] = stage.flops(data.side)
    ours = Ours(stage, accelerator, data.cached)
    bare = ours.bare(next(data.ours))

    def with_update(update: str, run: Callable[[int], None]) -> Callable[[], None]:
        def step(number: int) -> None:
            stage.update = update
            run(number)

        return numbered(step)

    steps: dict[str, Callable[[], None]] = {
        "published": lambda: published.step(next(data.raw)),
        "diffusers": lambda: control.step(next(data.raw)),
    }
    for update in UPDATES:
        steps[f"ours, {update}"] = with_update(update, lambda number: ours.step(next(data.ours), number))
        steps[f"bare, {update}"] = with_update(update, bare)
    return rows(timed(steps, args.repeats, args.warmup, accelerator.device), counted)


def measure_coarse(
    base: Components, data: "Data", accelerator: Accelerator, args: argparse.Namespace
) -> list["Measured"]:
    """A row for diffusers' example and for ours."""
    example = TextToImage(base, accelerator)
    stage = coarse_stage(base, accelerator, compile=args.compile)
    counted = {"text2image": example.flops(data.side), "ours, coarse": stage.flops(data.side)}
    ours = Ours(stage, accelerator, data.cached)
    steps: dict[str, Callable[[], None]] = {
        "text2image": lambda: example.step(next(data.raw)),
        "ours, coarse": numbered(lambda number: ours.step(next(data.ours), number)),
        "bare, coarse": numbered(ours.bare(next(data.ours))),
    }
    return rows(timed(steps, args.repeats, args.warmup, accelerator.device), counted)


def write_data(folder: Path, side: int, count: int = 32) -> Manifest:
    """A data set of noise, with prompts of usual length: what images show does not change how long a step takes."""
    rng = np.random.default_rng(0)
    mask = np.zeros((side, side), np.uint8)
    mask[side // 4 : side // 2, side // 4 : side // 2] = 255
    for name in ("images", "masks", "maps"):
        (folder / name).mkdir(parents=True)
    found = []
    for index in range(count):
        files: dict[str, Any] = {"file_name": f"images/{index}.png", "condition_fg": f"masks/{index}.png"}
        files |= {"condition_bg": f"maps/{index}.png"}
        for column, file in files.items():
            noise = rng.integers(0, 255, (side, side), dtype=np.uint8)
            Image.fromarray(mask if column == "condition_fg" else noise).save(folder / file)
        found.append(
            Row(
                **files,
                label="FTC",
                text_fg=f"malignant, follicular, solid, uneven thick halo, hypoechoic, round, diameter {index} mm",
                text_bg="sonogram longitudinal plane, more detail",
            )  # fmt: skip
        )
    write(folder / FILE_NAME, found)
    return read(folder)


class Data:
    """The same images for all: as files, and with their latents cached."""

    def __init__(self, folder: Path, base: Components, size: Size, batch_size: int, device: torch.device):
        self.side = size.side
        rows = write_data(folder / "data", size.side)
        plain, self.cached = (TigerDataset(rows, size.side, with_conditions=True) for _ in range(2))
        vae: Any = torch.nn.Module.to(copy.deepcopy(base.vae), device)
        self.cached.latents = cache_latents(vae, self.cached, folder / "cache", batch_size=4)
        self.raw, self.ours = endless(plain, batch_size), endless(self.cached, batch_size)


@dataclass(frozen=True)
class Measured:
    """What was measured of one scheme."""

    name: str
    seconds: float  # a step
    flops: float  # an image
    outside: float | None  # share of the step that is not the model's work


def rows(seconds: dict[str, float], counted: dict[str, float]) -> list[Measured]:
    """Put times and counts together."""
    found = []
    for name, flops_per_image in counted.items():
        bare = seconds.get(name.replace("ours", "bare")) if name.startswith("ours") else None
        found.append(Measured(name, seconds[name], flops_per_image, None if bare is None else 1 - bare / seconds[name]))
    return found


def table(found: list[Measured], batch_size: int, peak: float | None) -> str:
    """Markdown. The columns "×" are speeds relative to the rows that are not ours."""
    others = [row for row in found if row.outside is None]
    head = [
        "",
        "s a step",
        "images/s",
        *(f"× {row.name}" for row in others),
        "GFLOP an image",
        "TFLOP/s",
        "MFU",
        "outside",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in found:
        rate = batch_size / row.seconds
        cells = [row.name, f"{row.seconds:.3f}", f"{rate:.3g}", *(f"{o.seconds / row.seconds:.2f}" for o in others)]
        cells += [f"{row.flops / 1e9:.1f}", f"{rate * row.flops / 1e12:.3g}"]
        cells += [f"{rate * row.flops / peak:.1%}" if peak else "", "" if row.outside is None else f"{row.outside:.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("no", "bf16"), default="no", help="mixed precision")
    parser.add_argument("--batch_size", type=int, help="default: 2, 4 or 16, by size")
    parser.add_argument("--repeats", type=int, default=6, help="timed steps of each variant (default: 6)")
    parser.add_argument("--warmup", type=int, help="steps before those (default: 1; 4 with --compile)")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of ours")
    args = parser.parse_args(argv)
    if args.warmup is None:
        args.warmup = 4 if args.compile else 1  # both of "alternate" steps are compiled, then run once more
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure both stages and print a table each."""
    args = parse(argv)
    size = SIZES[args.size]
    batch_size = args.batch_size or size.batch_size
    accelerator = Accelerator(mixed_precision=args.dtype, cpu=args.device == "cpu")
    base = random_base(size)
    peak = flops.peak(accelerator.device, args.dtype != "no")
    with tempfile.TemporaryDirectory() as folder:
        data = Data(Path(folder), base, size, batch_size, accelerator.device)
        for name, measure in (("Fine", measure_fine), ("Coarse", measure_coarse)):
            found = measure(base, data, accelerator, args)
            print(f"\n{name}: {args.size}, {size.side} px, batch {batch_size}, {args.dtype}, {args.repeats} repeats\n")
            print(table(found, batch_size, peak), flush=True)
            if accelerator.device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
