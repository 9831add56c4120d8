"""What each synthetic image is made from: its prompt, mask, Sobel map and seed, all of them from training rows.

train = read_training_rows("data/thyroid", knowledge)
recipe = Planner(train, knowledge, mode="diversify", prompts="auto", seed=0).recipe("FTC", 7)
mask, edges = draw_conditions(recipe, train, 512, refine=False)
"""

import functools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from tiger import conditions, manifest, shards
from tiger.errors import InputError
from tiger.knowledge import Knowledge, Placement
from tiger.manifest import Manifest, Row

T = TypeVar("T")
Item = tuple[str, int]  # class and number of an image

PLACEMENTS = 8  # draws of the mask's place, of which the one that best covers the map's own nodule is kept
MOST_NAMED = 8  # rows that an error names


@dataclass(frozen=True)
class Recipe:
    """Everything one image is made from, before any pixel is read.

    `mask_row` gives the nodule mask, `map_row` the Sobel map and the anatomy; both are real training rows. In
    refinement both are the row that is varied. `noise_seed` seeds the sampler's noise, `seed` the mask's variation and
    place. `placement` tells which attributes say where that is.
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
    placement: Placement

    @property
    def item(self) -> Item:
        return self.label, self.number


class Planner:
    """Which prompt, mask, map and seed each image gets."""

    def __init__(
        self, train: Manifest, knowledge: Knowledge, *, mode: str, prompts: str, seed: int, emphasis: float = 0.0
    ):
        self.train = train
        self.knowledge = knowledge
        self.mode = mode
        self.prompts = prompts
        self.seed = seed
        self.emphasis = emphasis
        self.fg = [name for name, category in knowledge.categories.items() if category.role == "fg"]
        self.bg = [name for name, category in knowledge.categories.items() if category.role == "bg"]
        self.usable = [with_attributes(row, knowledge) for row in train.rows if row.condition_fg and row.condition_bg]
        self.backgrounds = [row for row in self.usable if row.label is None or not self._rare(row.label)]
        self.by_class: dict[str | None, list[Row]] = {}  # in the manifest's order
        for row in self.usable:
            self.by_class.setdefault(row.label, []).append(row)
        # The same few wishes come up for thousands of images, and each would go through all rows.
        self._nearest = functools.lru_cache(maxsize=None)(self._find_nearest)
        self._fitting = functools.lru_cache(maxsize=None)(self._find_fitting)

    def _rare(self, label: str) -> bool:
        return label in self.knowledge.subtypes and self.knowledge.subtypes[label].rare

    def rows_of(self, label: str) -> list[Row]:
        """Training rows of a class that have both conditions."""
        return self.by_class.get(label, [])

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
        if not self.backgrounds:
            raise InputError(
                f"{self.train.path}: no training row of a common class has both condition_fg and condition_bg, from "
                "which masks and backgrounds are taken; make the masks with `python -m data.prepare segmenter "
                "predict`, then the maps with `python -m data.prepare conditions`"
            )
        if self.source(label) in ("train", "estimated") and not self.rows_of(label):
            raise InputError(
                f"--count {label}: {self.train.path} has no training row of this class with condition_fg and "
                "condition_bg, and its prompts should come from there; give "
                + ("--mode diversify" if self.mode == "refine" else "--prompts knowledge")
            )

    def recipe(self, label: str, number: int) -> Recipe:
        """The recipe of image `number` of class `label`."""
        seed = (self.seed, zlib.crc32(label.encode()), number)
        rng = np.random.default_rng(seed)
        noise_seed = int(rng.integers(2**31))
        placement = self.knowledge.placement
        if self.mode == "refine":
            row = self._in_turn(self.rows_of(label), label, number)
            texts = row.text_fg, row.text_bg
            return Recipe(label, number, *texts, row.attributes, row, row, seed, noise_seed, placement)
        attributes, text_fg = self._foreground(label, rng)
        map_row = self._background(attributes, rng)
        mask_row = self._mask(attributes, map_row, rng)
        if self.source(label) == "names":
            text_bg = self.knowledge.compose(label, {})[1]
        else:  # the prompt says of the surroundings what is true of the map that they are drawn after
            text_bg = map_row.text_bg
            attributes = {name: attributes[name] for name in self.fg if name in attributes} | {
                name: map_row.attributes[name] for name in self.bg if name in map_row.attributes
            }
        return Recipe(label, number, text_fg, text_bg, attributes, mask_row, map_row, seed, noise_seed, placement)

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
            mode = "names" if source == "names" else "full"
            attributes = self.knowledge.sample(label, rng, mode, self.emphasis)
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
        placement = self.knowledge.placement
        traits = tuple(name for name in (placement.plane, placement.location, placement.size) if name)
        return pick(self._fitting(tuple((trait, attributes.get(trait)) for trait in traits)), rng)

    def _find_fitting(self, wishes: tuple[tuple[str, str | None], ...]) -> list[Row]:
        """Backgrounds that meet each wish, a category and its term, in turn, unless none does."""
        rows = self.backgrounds
        for trait, wish in wishes:
            rows = [row for row in rows if row.attributes.get(trait) == wish] or rows
        return rows

    def _mask(self, attributes: Mapping[str, str], map_row: Row, rng: np.random.Generator) -> Row:
        """A mask of a nodule of any class that looks as the prompt states, or one of those closest to it. Where the
        map's own nodule has the stated size, the mask will get it too and may come from a nodule of any size."""
        scaled = takes_size(attributes, map_row, self.knowledge.placement)
        traits = [
            name for name in self.knowledge.placement.traits if not scaled or name != self.knowledge.placement.size
        ]
        return pick(self._nearest(tuple((trait, attributes.get(trait)) for trait in traits)), rng)

    def _find_nearest(self, wishes: tuple[tuple[str, str | None], ...]) -> list[Row]:
        """Rows that meet the most of the wishes, a category and its term each."""
        met = [
            sum(wish is not None and row.attributes.get(trait) == wish for trait, wish in wishes) for row in self.usable
        ]
        return [row for row, n in zip(self.usable, met, strict=True) if n == max(met)]


def takes_size(attributes: Mapping[str, str], map_row: Row, placement: Placement) -> bool:
    """Whether the map's own nodule is as large as the attributes say, so that the new mask can take its area."""
    wish = attributes.get(placement.size) if placement.size else None
    return wish is not None and map_row.attributes.get(str(placement.size)) == wish


def with_attributes(row: Row, knowledge: Knowledge) -> Row:
    """A row that states no attributes gets those that its prompts name, and the term of its plane."""
    attributes = dict(row.attributes or knowledge.parse(row.text).attributes)
    plane = knowledge.placement.plane
    if plane and plane not in attributes and row.plane:
        named = [term for term in knowledge.categories[plane].terms if row.plane in term]
        attributes[plane] = named[0] if named else row.plane
    return replace(row, attributes=attributes)


def pick(options: Sequence[T], rng: np.random.Generator) -> T:
    """One of `options`, equally likely."""
    return options[int(rng.integers(len(options)))]


def draw_conditions(recipe: Recipe, train: Manifest, size: int, refine: bool) -> tuple[np.ndarray, np.ndarray]:
    """(mask, Sobel map), each (size, size) uint8: the mask 0 or 255, the map zero in the nodule's region.

    The map's own nodule is taken out of it: its edges must not show through beside the new nodule. Where the map shows
    that nodule's boundary (`data.prepare conditions --edges boundary`), it gets the new one's instead.
    """
    row = recipe.map_row
    edges = conditions.read_gray(train.file(row, "condition_bg"))
    mask = conditions.read_mask(train.file(recipe.mask_row, "condition_fg"), size)
    if not refine:
        old = conditions.read_mask(train.file(row, "condition_fg"))
        side, bounded = max(old.shape), conditions.has_outline(edges, old)
        if bounded:
            edges = conditions.sobel_map(conditions.read_gray(train.file(row, "file_name")))
        old = conditions.resize_mask(old, size)
        organ = conditions.read_mask(train.file(row, "organ_mask"), size) if row.organ_mask else None
        mask = new_mask(mask, old, organ, recipe)
        edges = conditions.remove_nodule(conditions.resize_gray(edges, size), old, organ)
        if bounded:  # as training saw it: drawn at the map's size, then shrunk
            line = conditions.outline(conditions.resize_mask(mask, side))
            edges = np.maximum(edges, conditions.resize_gray(line, size))
    return mask, conditions.blank_nodule(conditions.resize_gray(edges, size), mask)


def new_mask(mask: np.ndarray, old: np.ndarray, organ: np.ndarray | None, recipe: Recipe) -> np.ndarray:
    """Vary `mask` and put it where the prompt says; without an organ mask, where the map's own nodule was."""
    rng = np.random.default_rng((*recipe.seed, 1))
    varied = conditions.vary_mask(mask, rng)
    if takes_size(recipe.attributes, recipe.map_row, recipe.placement):
        varied = conditions.scale_mask(varied, int(np.count_nonzero(conditions.largest_component(old))))
    if organ is None:
        return move(varied, old)
    try:
        places = [place(varied, organ, recipe, rng) for _ in range(PLACEMENTS)]
    except InputError as error:
        raise InputError(f"mask of {recipe.mask_row.file_name} on {recipe.map_row.file_name}: {error}") from error
    return min(places, key=lambda placed: np.count_nonzero((old > 0) & (placed == 0)))


def place(mask: np.ndarray, organ: np.ndarray, recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    """One draw of the mask's place in the organ; anywhere in it where the prompt names no part of it."""
    words, stated = recipe.placement, recipe.attributes
    location = stated.get(words.location) if words.location else None
    placed = conditions.place_mask(mask, organ, location, recipe.map_row.plane, rng, words.parts, words.axis)
    if words.extension in stated.values():
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


# -------------------------------------------------------------------------------------------------------- training rows


def read_training_rows(data_dir: str | Path, knowledge: Knowledge) -> Manifest:
    """Real training rows, checked. Masks, maps and prompts of other splits never reach a synthetic image.

    Raises InputError where there is no such row, and where one carries what belongs to a held-out row.
    """
    data = manifest.read(data_dir, knowledge)
    train = data.select(split="train", synthetic=False)
    if not train.rows:
        first = data.rows[0]
        what = f"split '{first.split}'" if first.split not in (None, "train") else "only synthetic ones"
        raise InputError(
            f"{data.path}: no real row with split 'train' (first is {first.file_name}: {what}), and no other split may "
            "be used"
        )
    held_out = replace(data, rows=tuple(row for row in data.rows if row.split in ("valid", "test")))
    if leaks := [*find_leaks(train, held_out), *manifest.straddling_patients(data.rows)]:
        more = f"; and {len(leaks) - MOST_NAMED} more" if len(leaks) > MOST_NAMED else ""
        raise InputError(
            f"{data.path}: held-out data would reach synthetic images: {'; '.join(leaks[:MOST_NAMED])}{more}. "
            "Drop these rows, or put them in the other's split"
        )
    manifest.check(train, conditions=False, knowledge=knowledge)
    return train


def find_leaks(train: Manifest, held_out: Manifest) -> list[str]:
    """What training rows have in common with valid or test rows, one line each: a file under the same path, an image
    or Sobel map of the same content, or a held-out row as their source."""
    owner = {getattr(row, column): row for row in held_out.rows for column in manifest.FILE_COLUMNS}
    owner.pop(None, None)
    names = {row.file_name: row for row in held_out.rows}
    copy_of = content_index(held_out, train)
    found = []
    for row in train.rows:
        for column in manifest.FILE_COLUMNS:
            if other := owner.get(getattr(row, column)):
                found.append(f"{row.file_name}: its {column} is a file of {other.split} row {other.file_name}")
            elif other := copy_of.get((row.file_name, column)):
                found.append(f"{row.file_name}: its {column} is a copy of one of {other.split} row {other.file_name}")
        for name in row.derived_from:
            if other := names.get(name):
                found.append(f"{row.file_name}: is derived from {other.split} row {name}")
    return found


def content_index(held_out: Manifest, train: Manifest) -> dict[tuple[str, str], Row]:
    """(file name, column) of a training row -> the held-out row whose image or map has the same bytes.

    Only files of equal size are read. Masks may well be equal by chance.
    """

    def files(rows: Manifest) -> Iterator[tuple[Row, str, Path]]:
        for row in rows.rows:
            for column in ("file_name", "condition_bg"):
                if getattr(row, column) and shards.exists(path := rows.file(row, column)):
                    yield row, column, path

    by_size: dict[int, list[tuple[Row, Path]]] = {}
    for row, _, path in files(held_out):
        by_size.setdefault(shards.file_size(path), []).append((row, path))
    digest = functools.cache(shards.content_hash)
    return {
        (row.file_name, column): other
        for row, column, path in files(train)
        for other, other_path in by_size.get(shards.file_size(path), [])
        if digest(path) == digest(other_path)
    }
