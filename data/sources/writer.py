"""What every source writes: an 8-bit gray PNG each for image, mask and Sobel map, in the folders of the contract."""

from pathlib import Path
from typing import NotRequired, TypedDict

from PIL import Image

from tiger.conditions import Gray, resize_gray, resize_mask, sobel_map
from tiger.errors import InputError
from tiger.files import atomic_path


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
