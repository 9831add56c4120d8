r"""Synthesize labelled images: prompts, masks and Sobel maps of training rows in; PNGs and a manifest out.

    python generation.py --model runs/finetune --data_dir data/thyroid --count FTC=30,MTC=30 --output_dir runs/new
    python generation.py --model runs/finetune --data_dir data/thyroid --mode refine --count FTC=9 --output_dir runs/r
    python generation.py --model runs/quickstart/finetune --data_dir runs/quickstart/data --count FTC=4 --batch_size 4 \
        --steps 10 --output_dir runs/four                                                        # seconds on a CPU
    accelerate launch --num_processes 8 generation.py …          # GPUs of one machine share the work; CPUs: torchrun
    python generation.py --shard $SLURM_ARRAY_TASK_ID/16 …       # parts of the work anywhere, such as --array=0-15

Image i of a class is a function of (model, data, settings, seed, class, i) alone, so any image can be made again, the
same command after an interruption makes exactly the missing ones, and any number of processes makes the same bytes.
"""

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from tiger import conditions
from tiger.components import is_distilled
from tiger.config import GenerationConfig, parse
from tiger.errors import InputError, run
from tiger.files import read_json, write_json
from tiger.knowledge import Knowledge
from tiger.manifest import FILE_NAME, Manifest, Row
from tiger.output import (
    MODEL_PARTS,
    SETTINGS,
    Output,
    background,
    check_settings,
    check_space,
    full_disk_in_one_line,
    in_units,
    model_fingerprint,
)
from tiger.recipes import Item, Planner, Recipe, draw_conditions, read_training_rows

S = TypeVar("S")
T = TypeVar("T")
Pair = tuple[np.ndarray, np.ndarray]  # mask and map

DEFAULT_STRENGTH = 0.6
BEHIND = 64  # images that may wait to be written
# Settings that change which images are made, where and how fast, but not what an image looks like.
FREE = ("model", "data_dir", "output_dir", "count", "shard", "device", "dry_run")


def parse_count(text: str) -> dict[str, int]:
    """ "FTC=30,MTC=30" -> {"FTC": 30, "MTC": 30}"""
    counts: dict[str, int] = {}
    for part in text.split(","):
        label, equals, number = (piece.strip() for piece in part.partition("="))
        if not (label and equals and number.isdecimal() and int(number)):
            raise InputError(f"--count '{text}': write CLASS=NUMBER with numbers of at least 1, as in FTC=30,MTC=30")
        if label in counts:
            raise InputError(f"--count '{text}': class {label} appears twice")
        counts[label] = int(number)
    return counts


def parse_shard(text: str, environment: Mapping[str, str]) -> tuple[int, int]:
    """ "1/4" -> (1, 4), which `accelerate launch` or torchrun splits once more, by their RANK and WORLD_SIZE."""
    k, slash, n = text.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal() and int(k) < int(n)):
        raise InputError(f"--shard '{text}': write k/n with k from 0 to n-1, as in 0/4 for the first of four parts")
    rank, world = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    return int(k) * world + rank, int(n) * world


def parse_interval(text: str) -> tuple[float, float]:
    """ "0.2,0.8" -> (0.2, 0.8)"""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low <= high <= 1:
        raise InputError(f"--guidance_interval '{text}': write LOW,HIGH within 0..1, as in 0.2,0.8")
    return low, high


def batches(counts: Mapping[str, int], batch_size: int, shard: tuple[int, int]) -> Iterator[list[Item]]:
    """This shard's batches of (label, number), which end at each class's count."""
    groups = [
        [(label, number) for number in range(start, min(start + batch_size, count))]
        for label, count in counts.items()
        for start in range(0, count, batch_size)
    ]
    yield from groups[shard[0] :: shard[1]]


def filled(batch: Sequence[Item], batch_size: int) -> list[Item]:
    """The batch with further numbers of its class, so that it is full.

    A network's last bits depend on the size of the batch and the place in it. In full batches an image's place is its
    number modulo their size, whatever is asked for, split or missing.
    """
    label, start = batch[0]
    return [(label, number) for number in range(start, start + batch_size)]


def check_model(model: str) -> None:
    """Raise InputError unless `model` is a folder that finetune.sh wrote."""
    missing = [part for part in MODEL_PARTS if not (Path(model) / part).is_dir()]
    if missing:
        raise InputError(f"--model {model}: no {', '.join(missing)} in it; give the folder that finetune.sh wrote")


def check_sampler(config: GenerationConfig) -> None:
    """Raise InputError where the sampler's settings do not go with the model."""
    distilled = is_distilled(Path(config.model))
    if config.scheduler == "lcm" and not distilled:
        raise InputError(f"--scheduler lcm: {config.model} needs many steps; distill.sh makes a model of few out of it")
    if not distilled:
        return
    if config.scheduler != "lcm" or config.guidance_scale != 1:
        raise InputError(
            f"--model {config.model} was distilled to draw in few steps, with guidance built in: give --scheduler lcm "
            "--guidance_scale 1 and --steps 1 to 8"
        )
    most = read_json(Path(config.model) / "scheduler" / "scheduler_config.json")["original_inference_steps"]
    if config.steps > most:
        raise InputError(f"--steps {config.steps}: this model draws in at most {most}, as it was distilled; 4 is usual")


def model_resolution(model: str) -> int:
    """Image side in pixels that a model was trained at."""
    latents = read_json(Path(model) / "unet" / "config.json")["sample_size"]
    levels = len(read_json(Path(model) / "vae" / "config.json")["block_out_channels"])
    return latents * 2 ** (levels - 1)


def load_pipeline(config: GenerationConfig) -> Any:
    """The model in inference mode on its device, with the sampler that was asked for."""
    import torch

    from tiger.pipeline import TigerPipeline

    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = (gpu if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    pipeline = TigerPipeline.from_pretrained(config.model, torch_dtype=getattr(torch, config.dtype)).to(device)
    pipeline.scheduler = make_scheduler(config.scheduler, pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    if config.channels_last:
        for net in (pipeline.unet, pipeline.controlnet, pipeline.vae):
            net.to(memory_format=torch.channels_last)
    if config.compile:
        pipeline.compile_blocks()
    return pipeline


def make_scheduler(name: str, trained: dict[str, Any]) -> Any:
    """A sampler on the noise schedule that the model was trained with."""
    import diffusers

    if name == "ddim":
        return diffusers.DDIMScheduler.from_config(trained)
    if name == "lcm":
        return diffusers.LCMScheduler.from_config(trained)
    if name == "dpmsolver++":
        return diffusers.DPMSolverMultistepScheduler.from_config(trained, algorithm_type="dpmsolver++")
    return diffusers.UniPCMultistepScheduler.from_config(trained)


def sample(
    pipeline: Any,
    recipes: Sequence[Recipe],
    pairs: Sequence[Pair],
    images: Any,
    config: GenerationConfig,
) -> list[Image.Image]:
    """One forward pass of the whole sampler over a batch; `pairs` holds (mask, map) of each."""
    import torch

    def tensor(index: int) -> torch.Tensor:  # uint8 (H, W) each -> float32 (B, 1, H, W) in [0, 1]
        return torch.from_numpy(np.stack([pair[index] for pair in pairs]))[:, None].float() / 255.0

    return pipeline(
        [recipe.text_fg for recipe in recipes],
        [recipe.text_bg for recipe in recipes],
        masks=tensor(0),
        maps=tensor(1),
        images=images,
        strength=(config.strength or DEFAULT_STRENGTH) if config.mode == "refine" else 1.0,
        branches=config.branches,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance_scale,
        guidance_rescale=config.guidance_rescale,
        guidance_interval=parse_interval(config.guidance_interval),
        reuse_encoder=config.reuse_encoder,
        control_uncond=config.control_uncond,
        resolution_weighting=config.resolution_weighting,
        fg_scale=config.fg_scale,
        bg_scale=config.bg_scale,
        generator=[torch.Generator().manual_seed(recipe.noise_seed) for recipe in recipes],
    ).images


def make(
    config: GenerationConfig,
    planner: Planner,
    todo: Sequence[list[Item]],
    missing: set[Item],
    output: Output,
    bar: "tqdm[Any]",
    after_first: Callable[[float, int], None],
) -> None:
    """Make every image of `missing`, all of which are in the batches `todo`.

    after_first: called once, with the seconds and bytes that the first batch took.
    """
    size = config.resolution or model_resolution(config.model)
    refine = config.mode == "refine"

    def ingredients(batch: list[Item]) -> tuple[list[Recipe], list[Pair], list[Image.Image] | None]:
        recipes = [planner.recipe(*item) for item in filled(batch, config.batch_size)]
        pairs = [draw_conditions(recipe, planner.train, size, refine) for recipe in recipes]
        return recipes, pairs, [read_image(planner.train, r.map_row, size) for r in recipes] if refine else None

    pipeline = load_pipeline(config)
    started = time.monotonic()
    with background(BEHIND) as later:
        for index, (recipes, pairs, images) in enumerate(ahead(ingredients, todo)):
            made = sample(pipeline, recipes, pairs, images, config)
            for recipe, image, pair in zip(recipes, made, pairs, strict=True):
                if recipe.item in missing:
                    later(output.write, recipe.item, image, *pair)
                    bar.update()
            if index == 0:
                later.wait()
                after_first(time.monotonic() - started, output.bytes_of(missing.intersection(todo[0])))


def ahead(function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """function(item) of each, the next one worked out in a thread while the caller uses this one."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            following = pool.submit(function, item)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


def read_image(train: Manifest, row: Row, size: int) -> Image.Image:
    """A real image as the pipeline takes it."""
    return Image.fromarray(conditions.read_gray(train.file(row, "file_name"), size)).convert("RGB")


def main(argv: list[str] | None = None) -> None:
    """Make the images that --count asks for and that are not there yet."""
    config = parse(GenerationConfig, argv)
    counts, shard = parse_count(config.count), parse_shard(config.shard, os.environ)
    parse_interval(config.guidance_interval)
    knowledge = Knowledge.load(config.knowledge)
    train = read_training_rows(config.data_dir, knowledge)
    planner = Planner(
        train, knowledge, mode=config.mode, prompts=config.prompts, seed=config.seed, emphasis=config.emphasis
    )
    for label in counts:
        planner.check(label)
    if config.emphasis and not any(knowledge.subtypes[label].rare for label in counts):
        raise InputError(
            f"--emphasis {config.emphasis}: --count {config.count} has no class that the knowledge base calls rare, "
            "and only those have their terms emphasised; leave it out"
        )
    check_model(config.model)
    check_sampler(config)
    if config.resolution and config.resolution != (side := model_resolution(config.model)):
        print(f"--resolution {config.resolution}: the model was trained at {side} px and draws best there")
    settings = {
        **{name: value for name, value in asdict(config).items() if name not in FREE},
        "model_hash": model_fingerprint(config.model),
        "data_hash": hashlib.sha256(train.path.read_bytes()).hexdigest()[:12],
    }
    output = Output(Path(config.output_dir), f"{config.model}@{settings['model_hash']}")
    check_settings(output.folder, settings, {field.name: field.default for field in fields(config)})
    mine = list(batches(counts, config.batch_size, shard))
    items = [item for batch in mine for item in batch]
    missing = {item for item in items if not output.has(item)}
    if config.dry_run:
        space = len(missing) * 3 * (config.resolution or model_resolution(config.model)) ** 2  # image, mask and map
        print(
            f"all is well: {len(missing)} of {len(items)} images would be made in {output.folder}, which take at most "
            f"{in_units(space)}"
        )
        for item in items[:1]:
            recipe = planner.recipe(*item)
            print(f"the first prompt is: {recipe.text_fg}, {recipe.text_bg}")
        return

    with full_disk_in_one_line(output.folder):
        write_json(output.folder / SETTINGS, settings)
        output.sweep(missing)
        started = time.monotonic()
        todo = [batch for batch in mine if missing.intersection(batch)]

        def estimate(seconds: float, space: int) -> None:
            """Print what is to come, measured on the first batch; refuse where the disk does not hold it."""
            first = len(missing.intersection(todo[0]))
            wanted = (item for batch in batches(counts, config.batch_size, (0, 1)) for item in batch)
            left = len(set(wanted).difference(output.found(knowledge)))  # of all processes, as they share the disk
            minutes, needed = seconds * (len(todo) - 1) / 60, space / first * left
            check_space(output.folder, needed, left)
            bar.write(
                f"{len(missing) - first} more here in about {minutes:.0f} min; {left} in all take {in_units(needed)}"
            )

        try:
            if missing:
                with progress(len(items), len(items) - len(missing)) as bar:
                    make(config, planner, todo, missing, output, bar, estimate)
        except BaseException:
            with suppress(OSError):  # an interrupted run leaves a valid manifest of what it made, if the disk takes it
                output.finish(planner)
            raise
        written = output.finish(planner)
    seconds = time.monotonic() - started
    rate = f" in {seconds:.0f} s, {len(missing) / seconds:.2f} images/s" if missing else ""
    print(f"{len(missing)} images made{rate}; {written} are in {output.folder / FILE_NAME}")


def progress(total: int, done: int) -> "tqdm[Any]":
    """A bar that always shows images/s, however slow; of several processes on a machine the first one's."""
    bar_format = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}, {rate_noinv_fmt}"
    hidden = os.environ.get("LOCAL_RANK", "0") != "0"
    return tqdm(total=total, initial=done, desc="generate", unit=" images", bar_format=bar_format, disable=hidden)


if __name__ == "__main__":
    sys.exit(run(main))
