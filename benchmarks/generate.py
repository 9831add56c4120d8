r"""What a synthetic image costs and how good it is: this sampler's settings against diffusers' stock pipelines.

    python -m benchmarks.generate --model runs/quickstart/finetune --data_dir runs/quickstart/data --output runs/bench \
        --each 10 --steps 50 --guidance_scale 2 --student runs/quickstart/student

The stock routes are on the same networks: `StableDiffusionControlNetInpaintPipeline` twice, the nodule and then its
surroundings, as the paper's code does, and `StableDiffusionControlNetPipeline` with a MultiControlNet. Every setting
draws the same recipes from the same seeds. Batch after batch all settings take turns, so that whatever else slows the
machine slows all; one batch before, which is not counted, warms each up. Beside the time that passed stands what the
process took of its cores, which other work on them changes little. Quality is against the real test images.
"""

import argparse
import copy
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import diffusers
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from eval import charts
from eval.features import default_cache, features_of, load_extractor
from eval.gate import attribute_scores, mask_scores
from eval.images import read_split, select_split
from eval.quality import fid, kid
from tiger.components import is_distilled
from tiger.errors import InputError, run
from tiger.files import atomic_path, write_json
from tiger.generate import Pair, check_model, make_scheduler, model_resolution, parse_count, read_image
from tiger.knowledge import Knowledge
from tiger.manifest import Manifest
from tiger.output import Output
from tiger.pipeline import TigerPipeline
from tiger.recipes import Planner, Recipe, draw_conditions, read_training_rows

FEW = (4, 6, 8)  # steps of a multistep solver
STUDENT_STEPS = (2, 4)
PANELS = {
    "kid": "KID to real test images ↓",
    "mask_iou": "IoU with the mask asked for ↑",
    "attribute_agreement": "attributes seen as asked for ↑",
}


@dataclass(frozen=True)
class Batch:
    """What one call draws."""

    recipes: Sequence[Recipe]
    pairs: Sequence[Pair]  # mask and map, (H, W) uint8
    images: Sequence[Image.Image]  # the real ones that the maps are of, which inpainting starts from

    @property
    def generators(self) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(recipe.noise_seed) for recipe in self.recipes]

    def pictures(self, index: int) -> list[Image.Image]:
        """Masks (0) or maps (1), as RGB."""
        return [Image.fromarray(pair[index]).convert("RGB") for pair in self.pairs]

    def tensor(self, index: int) -> torch.Tensor:
        """(B, 1, H, W) in [0, 1]"""
        return torch.from_numpy(np.stack([pair[index] for pair in self.pairs]))[:, None].float() / 255


Draw = Callable[[Batch], list[Image.Image]]


def ours(pipeline: TigerPipeline, scheduler: str, steps: int, guidance_scale: float, **options: Any) -> Draw:
    """This repository's pipeline."""
    sampler = make_scheduler(scheduler, pipeline.scheduler.config)

    def draw(batch: Batch) -> list[Image.Image]:
        pipeline.scheduler = sampler
        texts = [[recipe.text_fg for recipe in batch.recipes], [recipe.text_bg for recipe in batch.recipes]]
        return pipeline(
            *texts,
            masks=batch.tensor(0),
            maps=batch.tensor(1),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=batch.generators,
            **options,
        ).images  # type: ignore[return-value]

    return draw


def stock(kind: Any, pipeline: TigerPipeline, controlnet: Any, scheduler: str) -> Any:
    """A stock pipeline on the same networks."""
    unet, none = pipeline.unet, cast(Any, None)  # diffusers' types want a safety checker
    if kind is diffusers.StableDiffusionControlNetInpaintPipeline:
        # By this number alone, SD's own, it knows a U-Net for which it has to put known latents back.
        unet = copy.deepcopy(unet)
        unet.register_to_config(in_channels=4)
    made = kind(
        pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, unet, controlnet,
        make_scheduler(scheduler, pipeline.scheduler.config), none, none, requires_safety_checker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made.to(pipeline.device)


def stock_twice(pipeline: TigerPipeline, scheduler: str, steps: int, guidance_scale: float) -> Draw:
    """The nodule into the real image by the FG-Encoder, then the rest by the BG-Encoder, each with its own prompt."""
    kind = diffusers.StableDiffusionControlNetInpaintPipeline
    first, second = (stock(kind, pipeline, net, scheduler) for net in (pipeline.controlnet.fg, pipeline.controlnet.bg))

    def draw(batch: Batch) -> list[Image.Image]:
        masks = batch.pictures(0)
        rest = [Image.fromarray(255 - np.asarray(mask)) for mask in masks]
        images = batch.images
        for pipe, texts, region, control in (
            (first, [recipe.text_fg for recipe in batch.recipes], masks, masks),
            (second, [recipe.text_bg for recipe in batch.recipes], rest, batch.pictures(1)),
        ):
            images = pipe(
                texts, image=list(images), mask_image=region, control_image=control, strength=1.0,
                num_inference_steps=steps, guidance_scale=guidance_scale, generator=batch.generators,
            ).images  # fmt: skip
        return list(images)

    return draw


def stock_multi(pipeline: TigerPipeline, scheduler: str, steps: int, guidance_scale: float) -> Draw:
    """Both encoders in one pass, their residuals summed, with one prompt for all."""
    nets = diffusers.MultiControlNetModel([pipeline.controlnet.fg, pipeline.controlnet.bg])
    pipe = stock(diffusers.StableDiffusionControlNetPipeline, pipeline, nets, scheduler)

    def draw(batch: Batch) -> list[Image.Image]:
        texts = [f"{recipe.text_fg}, {recipe.text_bg}" for recipe in batch.recipes]
        conditions = [list(pair) for pair in zip(batch.pictures(0), batch.pictures(1), strict=True)]  # one pair a text
        return pipe(
            texts, image=conditions, num_inference_steps=steps,
            guidance_scale=guidance_scale, generator=batch.generators,
        ).images  # fmt: skip

    return draw


def settings(pipeline: TigerPipeline, student: TigerPipeline | None, steps: int, scale: float) -> dict[str, Draw]:
    """Name -> how it draws. The stock routes and two of ours take `steps`; with our solver so does one stock route."""
    most = FEW[-1]
    few = {f"fused, dpmsolver++ {n}": ours(pipeline, "dpmsolver++", n, scale) for n in FEW}
    named = f"fused, dpmsolver++ {most}, "
    draws = {
        f"stock inpaint twice, ddim {steps}": stock_twice(pipeline, "ddim", steps, scale),
        f"stock inpaint twice, dpmsolver++ {most}": stock_twice(pipeline, "dpmsolver++", most, scale),
        f"stock MultiControlNet, ddim {steps}": stock_multi(pipeline, "ddim", steps, scale),
        f"FG then BG, ddim {steps}": ours(pipeline, "ddim", steps, scale, branches="fg_then_bg"),
        f"fused, ddim {steps}": ours(pipeline, "ddim", steps, scale),
        **few,
        f"fused, unipc {most}": ours(pipeline, "unipc", most, scale),
        f"{named}guidance in .2-.8": ours(pipeline, "dpmsolver++", most, scale, guidance_interval=(0.2, 0.8)),
        f"{named}encoders every 2nd": ours(pipeline, "dpmsolver++", most, scale, reuse_encoder=2),
        f"{named}encoders every 3rd": ours(pipeline, "dpmsolver++", most, scale, reuse_encoder=3),
    }
    if student is not None:  # guidance is built in
        draws |= {f"student, lcm {n}": ours(student, "lcm", n, 1.0) for n in STUDENT_STEPS}
    return draws


def load(folder: str | None, device: str) -> Any:
    """A pipeline that shows no bar of its own; None without a folder."""
    if folder is None:
        return None
    pipeline = TigerPipeline.from_pretrained(folder).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def batches(planner: Planner, labels: Sequence[str], each: int, batch_size: int, size: int) -> list[Batch]:
    """The same for every setting."""
    made = []
    for label in labels:
        for start in range(0, each, batch_size):
            recipes = [planner.recipe(label, number) for number in range(start, min(start + batch_size, each))]
            pairs = [draw_conditions(recipe, planner.train, size, refine=False) for recipe in recipes]
            images = [read_image(planner.train, recipe.map_row, size) for recipe in recipes]
            made.append(Batch(recipes, pairs, images))
    return made


def draw_all(
    draws: Mapping[str, Draw], work: Sequence[Batch], folder: Path, planner: Planner
) -> dict[str, tuple[float, float]]:
    """Draw everything with every setting into a folder each; returns what an image took: seconds, CPU seconds.

    The median batch's, as other work on the machine comes and goes.
    """
    spent: dict[str, list[np.ndarray]] = {name: [] for name in draws}
    outputs = {name: Output(folder / f"{index:02d}", name) for index, name in enumerate(draws)}

    def now() -> np.ndarray:
        return np.array([time.perf_counter(), time.process_time()])

    with tqdm(total=len(draws) * (len(work) + 1), desc="drawing", unit="batch") as bar:
        for draw in draws.values():
            draw(work[0])
            bar.update()
        for batch in work:
            for name, draw in draws.items():
                started = now()
                images = draw(batch)
                spent[name].append((now() - started) / len(batch.recipes))
                for recipe, image, pair in zip(batch.recipes, images, batch.pairs, strict=True):
                    outputs[name].write(recipe.item, image, *pair)
                bar.update()
    for output in outputs.values():
        output.finish(planner)
    medians = {name: np.median(batches, axis=0) for name, batches in spent.items()}
    return {name: (float(wall), float(cpu)) for name, (wall, cpu) in medians.items()}


def judge(folder: Path, test: Manifest, judges: Path, knowledge: Knowledge) -> dict[str, float]:
    """Quality of the images in a folder."""
    fake, extractor = read_split(folder, None, synthetic=True), load_extractor()
    x, y = (features_of(rows, extractor, default_cache()) for rows in (test, fake))
    return {
        "kid": kid(x, y),
        "fid": fid(x, y),
        "mask_iou": float(np.nanmean(mask_scores(judges / "segmenter", fake))),
        "attribute_agreement": float(np.nanmean(attribute_scores(judges / "attributes", fake, knowledge))),
    }


def plot(results: Mapping[str, Mapping[str, float]]) -> bytes:
    """Quality against seconds an image, one panel a figure."""
    from matplotlib.ticker import LogLocator

    figure, panels = charts.axes(len(PANELS), 4.8, 4.2)
    colours = (charts.COLOURS * len(results))[: len(results)]
    for ax, (metric, title) in zip(panels, PANELS.items(), strict=True):
        for index, ((name, result), colour) in enumerate(zip(results.items(), colours, strict=True)):
            marker = "s" if name.startswith("stock") else "o^"[index // len(charts.COLOURS) % 2]
            ax.plot(result["seconds_per_image"], result[metric], marker, color=colour, label=name)
        ax.set(xscale="log", xlabel="seconds an image", title=title)
        ax.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8
    )
    return charts.to_png(figure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder that finetune.sh wrote")
    parser.add_argument("--data_dir", required=True, help="its data set, with training and test rows")
    parser.add_argument("--output", required=True, type=Path, help="folder for images, results.json and results.png")
    parser.add_argument("--classes", nargs="+", default=["benign", "PTC", "FTC", "MTC"])
    parser.add_argument("--each", type=int, default=10, help="images a class and setting (default: 10)")
    parser.add_argument("--batch_size", type=int, default=10, help="images a call (default: 10)")
    parser.add_argument("--steps", type=int, default=50, help="of the stock routes (default: 50)")
    parser.add_argument("--guidance_scale", type=float, default=7.5)
    parser.add_argument("--student", help="folder that distill.sh wrote from --model; none by default")
    parser.add_argument("--judges", type=Path, default=Path("assets/judges"))
    parser.add_argument("--knowledge", default="thyroid")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = _parser().parse_args(argv)
    if (args.output / "00").exists():
        raise InputError(f"--output {args.output}: holds images of an earlier run; give another folder")
    parse_count(",".join(f"{label}={args.each}" for label in args.classes))
    check_model(args.model)
    if args.student is not None:
        check_model(args.student)
        if not is_distilled(Path(args.student)):
            raise InputError(f"--student {args.student}: is no student; give the folder that distill.sh wrote")
    knowledge = Knowledge.load(args.knowledge)
    test = select_split(read_split(args.data_dir, None, synthetic=False), "test")
    planner = Planner(read_training_rows(args.data_dir, knowledge), knowledge, mode="diversify", prompts="auto", seed=0)
    for label in args.classes:
        planner.check(label)
    pipeline, student = (load(folder, args.device) for folder in (args.model, args.student))
    work = batches(planner, args.classes, args.each, args.batch_size, model_resolution(args.model))
    draws = settings(pipeline, student, args.steps, args.guidance_scale)
    spent = draw_all(draws, work, args.output, planner)
    results = {
        name: {
            "seconds_per_image": spent[name][0],
            "cpu_seconds_per_image": spent[name][1],
            "images_per_second": 1 / spent[name][0],
        }
        | judge(args.output / f"{index:02d}", test, args.judges, knowledge)
        for index, name in enumerate(draws)
    }
    report = {
        "command": f"python -m benchmarks.generate {shlex.join(sys.argv[1:] if argv is None else argv)}",
        "device": torch.cuda.get_device_name()
        if args.device.startswith("cuda")
        else f"{torch.get_num_threads()} threads",
        "images": sum(len(batch.recipes) for batch in work),
        "settings": results,
    }
    write_json(args.output / "results.json", report)
    with atomic_path(args.output / "results.png") as temporary:
        temporary.write_bytes(plot(results))
    first = next(iter(spent.values()))
    print(f"{'setting':46}  {'s/image':>7} {'faster':>7} {'CPU s':>7} {'faster':>7} {'KID':>7} {'IoU':>6} {'terms':>7}")
    for name, of in results.items():
        took = " ".join(f"{mine:7.3f} {theirs / mine:6.2f}×" for mine, theirs in zip(spent[name], first, strict=True))
        print(f"{name:46}  {took} {of['kid']:7.3f} {of['mask_iou']:6.3f} {of['attribute_agreement']:7.3f}")


if __name__ == "__main__":
    sys.exit(run(main))
