"""What sources have in common: reading a table, rows in parallel, and an 8-bit gray PNG each for image, mask and Sobel
map in the folders of the contract."""

import csv
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NotRequired, TypedDict, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from tiger.conditions import Gray, resize_gray, resize_mask, sobel_map
from tiger.errors import InputError
from tiger.files import atomic_path
from tiger.manifest import Row

Item = TypeVar("Item")


class Columns(TypedDict):
    """The manifest columns that name files."""

    file_name: str
    condition_bg: str
    condition_fg: NotRequired[str]
    organ_mask: NotRequired[str]


def write_png(path: Path, gray: Gray) -> None:
    """Write an HxW uint8 array as PNG, atomically."""
    with atomic_path(path) as temporary:
        Image.fromarray(gray).save(temporary, format="PNG")


def write_case(
    output_dir: Path, stem: str, image: Gray, mask: Gray | None, size: int | None, edges: Gray | None = None
) -> Columns:
    """Write the files of one case and return the manifest columns that name them.

    Args:
        image, mask: HxW uint8; the mask holds 0 and 255, or is None.
        size: side in pixels to resize to, without keeping the sides in proportion, as Stable Diffusion trains on
            squares; None keeps the size.
        edges: a published Sobel map; by default it is made from the image as it is written.
    Raises InputError when mask or map and image differ in size.
    """
    for name, other in (("mask", mask), ("Sobel map", edges)):
        if other is not None and other.shape != image.shape:
            raise InputError(f"{stem}: {name} is {other.shape[::-1]}, image {image.shape[::-1]}: make them agree")
    if size is not None:
        image = resize_gray(image, size)
        mask = None if mask is None else resize_mask(mask, size)
        edges = None if edges is None else resize_gray(edges, size)
    columns = Columns(file_name=f"images/{stem}.png", condition_bg=f"condition_bg/{stem}.png")
    write_png(output_dir / columns["file_name"], image)
    write_png(output_dir / columns["condition_bg"], sobel_map(image) if edges is None else edges)
    if mask is not None:
        columns["condition_fg"] = f"condition_fg/{stem}.png"
        write_png(output_dir / columns["condition_fg"], mask)
    return columns


def merge_masks(masks: list[Gray]) -> Gray:
    """The union of masks of one size."""
    if len({mask.shape for mask in masks}) > 1:
        raise InputError(f"the masks of one case differ in size: {[mask.shape[::-1] for mask in masks]}")
    return np.maximum.reduce(masks)


def read_csv(path: Path, columns: Sequence[str] = ()) -> list[dict[str, str]]:
    """The lines of a UTF-8 table, cells stripped, missing ones empty. Raises InputError where a column is not there."""
    if not path.is_file():
        raise InputError(f"{path}: no such file: give the data set's own folder")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            lines = [{name: (cell or "").strip() for name, cell in line.items() if name} for line in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot be read as UTF-8 CSV ({error}): save it as UTF-8, or download it again"
        ) from error
    if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
        raise InputError(f"{path}: has no column {', '.join(missing)}: give the published table")
    return lines


def collect_rows(make: Callable[[Item], Row], items: Sequence[Item], name: str, where: Path) -> list[Row]:
    """`make` of each item, in order and on all cores (decoding and encoding release the interpreter lock).

    Raises one InputError that lists what is wrong with every item.
    """

    def attempt(item: Item) -> Row | str:
        try:
            return make(item)
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        results = list(tqdm(pool.map(attempt, items), total=len(items), desc=name, unit="image"))
    if problems := [result for result in results if isinstance(result, str)]:
        raise InputError("\n  ".join([f"{where}: {len(problems)} problems:", *problems]))
    return [result for result in results if isinstance(result, Row)]
