"""Synthesize labelled images: prompts, masks and Sobel maps of training rows in; PNGs and a manifest out.

    python generation.py --model runs/finetune --data_dir data/thyroid --count FTC=30,MTC=30 --output_dir runs/new
    python generation.py --model runs/finetune --data_dir data/thyroid --mode refine --count FTC=9 --output_dir runs/r
    python generation.py --model runs/quickstart/finetune --data_dir runs/quickstart/data --count FTC=4 --steps 10 \
        --output_dir runs/four                                                                   # seconds on a CPU

Image i of a class is a function of (model, data, settings, seed, class, i) alone, so any image can be made again, the
same command after an interruption makes exactly the missing ones, and `--shard k/n` splits the work over machines.
"""

import functools
import hashlib
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from tiger import conditions, manifest
from tiger.config import GenerationConfig, parse
from tiger.errors import InputError, run
from tiger.files import atomic_path, changed_settings, read_json, write_json
from tiger.knowledge import Knowledge
from tiger.manifest import Manifest, Row

T = TypeVar("T")
Item = tuple[str, int]  # class and number of an image

MODEL_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "controlnet")
SETTINGS = "generation.json"
FOLDERS = {"file_name": "images", "condition_fg": "condition_fg", "condition_bg": "condition_bg"}
MASK_TRAITS = ("diameter", "aspect", "shape", "margin")  # attributes that the mask itself shows
DEFAULT_STRENGTH = 0.6
PLACEMENTS = 8  # draws of the mask's place, of which the one that best covers the map's own nodule is kept
# Settings that change which images are made, where and how fast, but not what an image looks like.
FREE = ("model", "data_dir", "output_dir", "count", "shard", "device", "dry_run")


@dataclass(frozen=True)
class Recipe:
    """Everything one image is made from, before any pixel is read.

    `mask_row` gives the nodule mask, `map_row` the Sobel map and the anatomy; both are real training rows. In
    refinement both are the row that is varied. `noise_seed` seeds the sampler's noise, `seed` the mask's variation and
    placement.
    """

    label: str
    number: int
    text_fg: str
    text_bg: str
    attributes: Mapping[str, str]
    mask_row: Row
    map_row: Row
    seed: tuple[int, ...]
    noise_seed: int

    @property
    def item(self) -> Item:
        return self.label, self.number


class Planner:
    """Which prompt, mask, map and seed each image gets."""

    def __init__(self, train: Manifest, knowledge: Knowledge, *, mode: str, prompts: str, seed: int):
        self.train = train
        self.knowledge = knowledge
        self.mode = mode
        self.prompts = prompts
        self.seed = seed
        self.fg = [name for name, category in knowledge.categories.items() if category.role == "fg"]
        self.bg = [name for name, category in knowledge.categories.items() if category.role == "bg"]
        self.usable = [with_attributes(row, knowledge) for row in train.rows if row.condition_fg and row.condition_bg]
        self.backgrounds = [row for row in self.usable if row.label is None or not self._rare(row.label)]
        self._nearest = functools.lru_cache(maxsize=None)(self._find_nearest)

    def _rare(self, label: str) -> bool:
        return label in self.knowledge.subtypes and self.knowledge.subtypes[label].rare

    def rows_of(self, label: str) -> list[Row]:
        """Training rows of a class that have both conditions."""
        return [row for row in self.usable if row.label == label]

    def source(self, label: str) -> str:
        """Where this class's prompts come from: "train", "knowledge", "names" or "estimated"."""
        if self.mode == "refine":
            return "train"
        if self.prompts == "auto":
            return "knowledge" if self._rare(label) else "train"
        return self.prompts

    def check(self, label: str) -> None:
        """Raise InputError unless images of this class can be planned."""
        known = self.knowledge.subtypes
        if label not in known:
            raise InputError(
                f"--count: unknown class '{label}'; known are {', '.join(known)} (--knowledge names the organ)"
            )
        if self.source(label) in ("train", "estimated") and not self.rows_of(label):
            raise InputError(
                f"--count {label}: {self.train.path} has no training row of this class with condition_fg and "
                "condition_bg, and its prompts should come from there; give --prompts knowledge"
            )
        if not self.backgrounds:
            raise InputError(
                f"{self.train.path}: no training row of a common class has condition_fg and condition_bg, from which "
                "masks and backgrounds are taken; make them with `python -m data.prepare conditions`"
            )

    def recipe(self, label: str, number: int) -> Recipe:
        """The recipe of image `number` of class `label`."""
        seed = (self.seed, zlib.crc32(label.encode()), number)
        rng = np.random.default_rng(seed)
        noise_seed = int(rng.integers(2**31))
        if self.mode == "refine":
            row = self._in_turn(self.rows_of(label), label, number)
            return Recipe(label, number, row.text_fg, row.text_bg, row.attributes, row, row, seed, noise_seed)
        attributes, text_fg = self._foreground(label, rng)
        map_row = self._background(attributes, rng)
        mask_row = self._mask(attributes, rng)
        if self.source(label) == "names":
            text_bg = self.knowledge.compose(label, {})[1]
        else:  # the prompt says of the surroundings what is true of the map that they are drawn after
            text_bg = map_row.text_bg
            attributes = {name: attributes[name] for name in self.fg if name in attributes} | {
                name: map_row.attributes[name] for name in self.bg if name in map_row.attributes
            }
        return Recipe(label, number, text_fg, text_bg, attributes, mask_row, map_row, seed, noise_seed)

    def _in_turn(self, rows: Sequence[Row], label: str, number: int) -> Row:
        """Every row equally often, in an order drawn from the seed."""
        order = np.random.default_rng((self.seed, zlib.crc32(label.encode()))).permutation(len(rows))
        return rows[order[number % len(rows)]]

    def _foreground(self, label: str, rng: np.random.Generator) -> tuple[dict[str, str], str]:
        """(attributes, text_fg)"""
        source = self.source(label)
        if source == "train":
            row = pick(self.rows_of(label), rng)
            return dict(row.attributes), row.text_fg
        if source == "estimated":
            attributes = self._estimate(self.rows_of(label), rng)
        else:
            attributes = self.knowledge.sample(label, rng, mode="names" if source == "names" else "full")
        return attributes, self.knowledge.compose(label, attributes)[0]

    def _estimate(self, rows: Sequence[Row], rng: np.random.Generator) -> dict[str, str]:
        """Each category's term as often as among `rows`, independently, but no two terms that exclude each other."""
        attributes: dict[str, str] = {}
        for category in self.knowledge.categories:
            terms = [row.attributes.get(category) for row in rows]
            term = pick([t for t in terms if t is None or not self.knowledge.excluded(t, attributes)] or [None], rng)
            if term is not None:
                attributes[category] = term
        return attributes

    def _background(self, attributes: Mapping[str, str], rng: np.random.Generator) -> Row:
        """A map of a common class, as far as there are such: in the same plane, whose own nodule lay where the new one
        will and was as large. A smaller organ would not hold the new nodule, which would have to shrink."""
        rows = [row for row in self.backgrounds if direction(row) == attributes.get("direction")] or self.backgrounds
        for trait in ("location", "diameter"):
            rows = [row for row in rows if row.attributes.get(trait) == attributes.get(trait)] or rows
        return pick(rows, rng)

    def _mask(self, attributes: Mapping[str, str], rng: np.random.Generator) -> Row:
        """A mask of a nodule of any class with the size and outline that the prompt states, or those closest to it."""
        return pick(self._nearest(tuple(attributes.get(trait) for trait in MASK_TRAITS)), rng)

    def _find_nearest(self, traits: tuple[str | None, ...]) -> list[Row]:
        """Rows that agree with the most of the stated traits."""
        agreement = [
            sum(
                trait is not None and row.attributes.get(name) == trait
                for name, trait in zip(MASK_TRAITS, traits, strict=True)
            )
            for row in self.usable
        ]
        return [row for row, n in zip(self.usable, agreement, strict=True) if n == max(agreement)]


def with_attributes(row: Row, knowledge: Knowledge) -> Row:
    """A row that states no attributes gets those that its prompts name."""
    return row if row.attributes else replace(row, attributes=knowledge.parse(row.text).attributes)


def pick(options: Sequence[T], rng: np.random.Generator) -> T:
    """One of `options`, equally likely."""
    return options[int(rng.integers(len(options)))]


def direction(row: Row) -> str | None:
    """The scan plane as the prompt term: "transverse plane", "longitudinal plane"."""
    return row.attributes.get("direction") or (f"{row.plane} plane" if row.plane else None)


def draw_conditions(recipe: Recipe, train: Manifest, size: int, refine: bool) -> tuple[np.ndarray, np.ndarray]:
    """(mask, Sobel map), each (size, size) uint8: the mask 0 or 255, the map zero inside it.

    The map's own nodule is taken out of it: its edges must not show through beside the new nodule.
    """
    edges = conditions.read_gray(train.file(recipe.map_row, "condition_bg"), size)
    mask = conditions.read_mask(train.file(recipe.mask_row, "condition_fg"), size)
    if not refine:
        row = recipe.map_row
        old = conditions.read_mask(train.file(row, "condition_fg"), size)
        organ = conditions.read_mask(train.file(row, "organ_mask"), size) if row.organ_mask else None
        mask = new_mask(mask, old, organ, recipe)
        edges = conditions.remove_nodule(edges, old, organ)
    return mask, conditions.blank_nodule(edges, mask)


def new_mask(mask: np.ndarray, old: np.ndarray, organ: np.ndarray | None, recipe: Recipe) -> np.ndarray:
    """Vary `mask` and put it where the prompt says; without an organ mask, where the map's own nodule was."""
    rng = np.random.default_rng((*recipe.seed, 1))
    varied = conditions.vary_mask(mask, rng)
    if organ is None:
        return move(varied, old)
    try:
        places = [place(varied, organ, recipe, rng) for _ in range(PLACEMENTS)]
    except InputError as error:
        raise InputError(f"mask of {recipe.mask_row.file_name} on {recipe.map_row.file_name}: {error}") from error
    return min(places, key=lambda placed: np.count_nonzero((old > 0) & (placed == 0)))


def place(mask: np.ndarray, organ: np.ndarray, recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    """One draw of the mask's place in the organ; anywhere in it where the prompt names no pole."""
    location = recipe.attributes.get("location") or pick(conditions.POLES, rng)
    placed = conditions.place_mask(mask, organ, location, recipe.map_row.plane, rng)
    if recipe.attributes.get("extension") == "extension":
        placed = conditions.extend_mask(placed, organ, rng, mask.shape[0])
    return placed


def move(mask: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Shift a mask so that its bounding box is centred on that of `target`, as far as the frame allows."""
    moved = np.zeros_like(mask)
    start, source = [], []
    for axis in (0, 1):
        inside, wanted = (np.flatnonzero(m.any(axis=1 - axis)) for m in (mask, target))
        length = inside[-1] - inside[0] + 1
        first = (wanted[0] + wanted[-1] + 1 - length) // 2
        first = int(np.clip(first, 0, mask.shape[axis] - length))
        start.append(slice(first, first + length))
        source.append(slice(inside[0], inside[0] + length))
    moved[tuple(start)] = mask[tuple(source)]
    return moved


class Output:
    """The folder that images go to: which are there, how one is written, the manifest of all."""

    def __init__(self, folder: Path, model: str):
        self.folder = folder
        self.model = model

    def path(self, column: str, item: Item) -> Path:
        label, number = item
        return self.folder / FOLDERS[column] / f"{label}_{number:06d}.png"

    def has(self, item: Item) -> bool:
        """Whether an image and its conditions are there and whole."""
        return all(is_png(self.path(column, item)) for column in FOLDERS)

    def write(self, item: Item, image: Image.Image, mask: np.ndarray, edges: np.ndarray) -> None:
        """Conditions first: where the image is, all is."""
        pictures = {"condition_fg": Image.fromarray(mask), "condition_bg": Image.fromarray(edges), "file_name": image}
        for column, picture in pictures.items():
            with atomic_path(self.path(column, item), durable=False) as temporary:  # `has` finds torn files
                picture.convert("L").save(temporary)

    def row(self, recipe: Recipe) -> Row:
        """The manifest row of an image, all of its provenance in it."""
        files = {column: self.path(column, recipe.item).relative_to(self.folder).as_posix() for column in FOLDERS}
        sources = dict.fromkeys([recipe.map_row.file_name, recipe.mask_row.file_name])
        return Row(
            **files,
            text_fg=recipe.text_fg,
            text_bg=recipe.text_bg,
            label=recipe.label,
            patient_id=f"synthetic-{recipe.label}-{recipe.number:06d}",
            split="train",
            attributes=dict(recipe.attributes),
            plane=recipe.map_row.plane,
            source="tiger",
            synthetic=True,
            seed=recipe.noise_seed,
            model=self.model,
            derived_from=tuple(sources),
        )

    def finish(self, planner: Planner) -> int:
        """Write the manifest of every image in the folder, by class and number; returns how many.

        Shards may end together: whoever writes looks again afterwards, so the last one to write has seen all.
        """
        while True:
            found = self._found(planner.knowledge)
            rows = [self.row(planner.recipe(label, number)) for label, number in found]
            manifest.write(self.folder / "metadata.jsonl", rows)
            if found == self._found(planner.knowledge):
                return len(rows)

    def _found(self, knowledge: Knowledge) -> list[Item]:
        """(label, number) of every image, by class in the knowledge base's order, then number."""
        order = {label: index for index, label in enumerate(knowledge.subtypes)}
        names = [path.stem.rpartition("_") for path in (self.folder / FOLDERS["file_name"]).glob("*.png")]
        items = [(label, int(number)) for label, _, number in names if label in order and number.isdecimal()]
        return sorted(items, key=lambda item: (order[item[0]], item[1]))


def is_png(path: Path) -> bool:
    """Whether a file is there and a whole PNG."""
    try:
        with Image.open(path) as image:
            image.verify()
        return True
    except (OSError, SyntaxError):  # PIL's error for a broken PNG chunk
        return False


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


def parse_shard(text: str) -> tuple[int, int]:
    """ "1/4" -> (1, 4)"""
    k, slash, n = text.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal() and int(k) < int(n)):
        raise InputError(f"--shard '{text}': write k/n with k from 0 to n-1, as in 0/4 for the first of four parts")
    return int(k), int(n)


def batches(counts: Mapping[str, int], batch_size: int, shard: tuple[int, int]) -> Iterator[list[Item]]:
    """This shard's batches of (label, number).

    A batch has the same members however the work is split or interrupted, since a sampler's last bits depend on them.
    """
    groups = [
        [(label, number) for number in range(start, min(start + batch_size, count))]
        for label, count in counts.items()
        for start in range(0, count, batch_size)
    ]
    yield from groups[shard[0] :: shard[1]]


def check_model(model: str) -> None:
    """Raise InputError unless `model` is a folder that finetune.sh wrote."""
    missing = [part for part in MODEL_PARTS if not (Path(model) / part).is_dir()]
    if missing:
        raise InputError(f"--model {model}: no {', '.join(missing)} in it; give the folder that finetune.sh wrote")


def model_resolution(model: str) -> int:
    """Image side in pixels that a diffusers folder was made for."""
    latents = read_json(Path(model) / "unet" / "config.json")["sample_size"]
    levels = len(read_json(Path(model) / "vae" / "config.json")["block_out_channels"])
    return latents * 2 ** (levels - 1)


def fingerprint(model: str) -> str:
    """Twelve hex digits that change with the model: a hash of each file's name, size, first and last MiB."""
    digest = hashlib.sha256()
    for part in MODEL_PARTS:
        for path in sorted(p for p in (Path(model) / part).rglob("*") if p.is_file()):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(model).as_posix()} {size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(2**20))
                file.seek(max(0, size - 2**20))
                digest.update(file.read(2**20))
    return digest.hexdigest()[:12]


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to mix images of other settings into a folder."""
    if changed := changed_settings(folder / SETTINGS, settings):
        raise InputError(
            f"{folder} holds images made with other settings: {'; '.join(changed)}. Give the old values to continue, "
            "or another --output_dir"
        )


def load_pipeline(config: GenerationConfig) -> Any:
    """The model in inference mode on its device, with the sampler that was asked for."""
    import torch

    from tiger.pipeline import TigerPipeline

    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    pipeline = TigerPipeline.from_pretrained(config.model).to(device)
    pipeline.scheduler = make_scheduler(config.scheduler, pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_scheduler(name: str, trained: dict[str, Any]) -> Any:
    """A sampler on the noise schedule that the model was trained with."""
    import diffusers

    if name == "ddim":
        return diffusers.DDIMScheduler.from_config(trained)
    if name == "dpmsolver++":
        return diffusers.DPMSolverMultistepScheduler.from_config(trained, algorithm_type="dpmsolver++")
    return diffusers.UniPCMultistepScheduler.from_config(trained)


def sample(
    pipeline: Any,
    recipes: Sequence[Recipe],
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
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
        control_uncond=config.control_uncond,
        resolution_weighting=config.resolution_weighting,
        fg_scale=config.fg_scale,
        bg_scale=config.bg_scale,
        generator=[torch.Generator().manual_seed(recipe.noise_seed) for recipe in recipes],
    ).images


def read_training_rows(data_dir: str, knowledge: Knowledge) -> Manifest:
    """Real training rows, checked. Masks, maps and prompts of other splits never reach a synthetic image."""
    data = manifest.read(data_dir, knowledge)
    train = data.select(split="train", synthetic=False)
    if not train.rows:
        found = ", ".join(sorted({str(row.split) for row in data.rows}))
        raise InputError(
            f"{data.path}: no real row with split 'train' (found: {found}), and no other split may be used"
        )
    manifest.check(train, conditions=False, knowledge=knowledge)
    return train


def make(
    config: GenerationConfig,
    planner: Planner,
    batches: Sequence[list[Item]],
    missing: set[Item],
    output: Output,
    bar: Callable[[int], Any],
) -> None:
    """Make every image of `missing`; batches without one are skipped."""
    size = config.resolution or model_resolution(config.model)
    refine = config.mode == "refine"
    pipeline = load_pipeline(config)
    for batch in batches:
        wanted = missing.intersection(batch)
        if not wanted:
            continue
        recipes = [planner.recipe(*item) for item in batch]
        pairs = [draw_conditions(recipe, planner.train, size, refine) for recipe in recipes]
        images = [read_image(planner.train, recipe.map_row, size) for recipe in recipes] if refine else None
        made = sample(pipeline, recipes, pairs, images, config)
        for item, image, pair in zip(batch, made, pairs, strict=True):
            if item in wanted:
                output.write(item, image, *pair)
        bar(len(wanted))


def read_image(train: Manifest, row: Row, size: int) -> Image.Image:
    """A real image as the pipeline takes it."""
    return Image.fromarray(conditions.read_gray(train.file(row, "file_name"), size)).convert("RGB")


def main(argv: list[str] | None = None) -> None:
    """Make the images that --count asks for and that are not there yet."""
    config = parse(GenerationConfig, argv)
    counts, shard = parse_count(config.count), parse_shard(config.shard)
    knowledge = Knowledge.load(config.knowledge)
    train = read_training_rows(config.data_dir, knowledge)
    planner = Planner(train, knowledge, mode=config.mode, prompts=config.prompts, seed=config.seed)
    for label in counts:
        planner.check(label)
    check_model(config.model)
    settings = {
        **{name: value for name, value in asdict(config).items() if name not in FREE},
        "model_hash": fingerprint(config.model),
        "data_hash": hashlib.sha256(train.path.read_bytes()).hexdigest()[:12],
    }
    output = Output(Path(config.output_dir), f"{config.model}@{settings['model_hash']}")
    check_settings(output.folder, settings)
    mine = list(batches(counts, config.batch_size, shard))
    items = [item for batch in mine for item in batch]
    missing = {item for item in items if not output.has(item)}
    if config.dry_run:
        print(f"all is well: {len(missing)} of {len(items)} images would be made in {output.folder}")
        for item in items[:1]:
            recipe = planner.recipe(*item)
            print(f"the first prompt is: {recipe.text_fg}, {recipe.text_bg}")
        return
    write_json(output.folder / SETTINGS, settings)
    started = time.monotonic()
    try:
        if missing:
            with progress(len(items), len(items) - len(missing)) as bar:
                make(config, planner, mine, missing, output, bar.update)
    finally:  # an interrupted run leaves a valid manifest of what it made
        written = output.finish(planner)
    seconds = time.monotonic() - started
    rate = f" in {seconds:.0f} s, {len(missing) / seconds:.2f} images/s" if missing else ""
    print(f"{len(missing)} images made{rate}; {written} are in {output.folder / 'metadata.jsonl'}")


def progress(total: int, done: int) -> "tqdm[Any]":
    """A bar that always shows images/s, however slow."""
    bar_format = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}, {rate_noinv_fmt}"
    return tqdm(total=total, initial=done, desc="generate", unit=" images", bar_format=bar_format)


if __name__ == "__main__":
    sys.exit(run(main))
