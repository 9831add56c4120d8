"""The folder that synthetic images go to: which are there, how one is written, the manifest of all, and what is noted
of the model that made them."""

import contextlib
import errno
import hashlib
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tiger import manifest
from tiger.errors import InputError, WorkFailed
from tiger.files import atomic_path, changed_settings
from tiger.knowledge import Knowledge
from tiger.manifest import Row
from tiger.recipes import Item, Planner, Recipe

SETTINGS = "generation.json"
MODEL_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "controlnet")
FOLDERS = {"file_name": "images", "condition_fg": "condition_fg", "condition_bg": "condition_bg"}


class Output:
    """Images of classes by number, each with its mask and Sobel map, and a manifest that lists what is there."""

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

    def sweep(self, items: Iterable[Item]) -> None:
        """Remove the unfinished files that a killed process left for these images, which nobody else makes."""
        for column in FOLDERS:
            names = {self.path(column, item).name for item in items}
            for path in (self.folder / FOLDERS[column]).glob(".*.png.*.png"):
                if path.name[1:].partition(".png.")[0] + ".png" in names:
                    path.unlink(missing_ok=True)

    def bytes_of(self, items: Iterable[Item]) -> int:
        """What images and their conditions take on the disk."""
        stats = [self.path(column, item).stat() for item in items for column in FOLDERS]
        return sum(max(stat.st_size, stat.st_blocks * 512) for stat in stats)

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
            found = self.found(planner.knowledge)
            rows = [self.row(planner.recipe(label, number)) for label, number in found]
            manifest.write(self.folder / manifest.FILE_NAME, rows)
            if found == self.found(planner.knowledge):
                return len(rows)

    def found(self, knowledge: Knowledge) -> list[Item]:
        """(label, number) of every image with both conditions, by class in the knowledge base's order, then number."""
        order = {label: index for index, label in enumerate(knowledge.subtypes)}
        names = set.intersection(*({p.stem for p in (self.folder / f).glob("*.png")} for f in FOLDERS.values()))
        parts = [name.rpartition("_") for name in names]
        items = [(label, int(number)) for label, _, number in parts if label in order and number.isdecimal()]
        return sorted(items, key=lambda item: (order[item[0]], item[1]))


def model_fingerprint(model: str | Path) -> str:
    """Twelve hex digits that change with a folder's model: a hash of each file's name, size, first and last MiB."""
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


def is_png(path: Path) -> bool:
    """Whether a file is there and a whole PNG."""
    try:
        with Image.open(path) as image:
            image.verify()
        return True
    except (OSError, SyntaxError):  # PIL's error for a broken PNG chunk
        return False


def check_settings(folder: Path, settings: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse to mix images of other settings into a folder. What an older version did not note had its default."""
    if changed := changed_settings(folder / SETTINGS, settings, defaults):
        raise InputError(
            f"{folder} holds images made with other settings: {'; '.join(changed)}. Give the old values to continue, "
            "or another --output_dir"
        )


class Background:
    """Calls in one thread of its own, at most `behind` of them waiting. Where one fails, a later call raises it."""

    def __init__(self, pool: ThreadPoolExecutor, behind: int):
        self.pool = pool
        self.behind = behind
        self.waiting: deque[Future[Any]] = deque()

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.waiting.append(self.pool.submit(function, *arguments))
        self.wait(self.behind)

    def wait(self, left: int = 0) -> None:
        """Until no more than `left` calls are outstanding."""
        while len(self.waiting) > left:
            self.waiting.popleft().result()


@contextlib.contextmanager
def background(behind: int) -> Iterator[Background]:
    """A Background whose calls have all been made when the block ends; an exception in the block does not stop them."""
    with ThreadPoolExecutor(1) as pool:
        calls = Background(pool, behind)
        yield calls
        calls.wait()


@contextlib.contextmanager
def full_disk_in_one_line(folder: Path) -> Iterator[None]:
    """Turn the disk's being full, or a quota's, into a WorkFailed: every file that is there is whole."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise WorkFailed(
            f"{folder}: the disk is full ({error.strerror}); what is there is whole: make room and run the same "
            "command again"
        ) from error


def check_space(folder: Path, needed: float, images: int) -> None:
    """Raise InputError unless the disk of `folder` holds `needed` more bytes for as many images."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder}: {images} images more take about {in_units(needed)} and its disk has {in_units(free)} free; "
            "make room, or ask for fewer. What is there stays; the same command goes on"
        )


def in_units(size: float) -> str:
    """Bytes as "340 kB", "12 MB", "1.3 GB"."""
    unit, factor = next((pair for pair in (("GB", 1e9), ("MB", 1e6)) if size >= pair[1]), ("kB", 1e3))
    return f"{size / factor:.{1 if size < 10 * factor else 0}f} {unit}"
