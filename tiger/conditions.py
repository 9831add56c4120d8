"""Foreground and background conditions: reading masks and images, Sobel maps, and placing masks in an organ.

Arrays are HxW uint8; masks hold 0 and 255. An image's x axis points right and its y axis down (to deeper tissue).
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from tiger import shards
from tiger.errors import InputError

Gray = NDArray[np.uint8]
WHITE = 65535  # in images of 16 bits
MOST = {"I": WHITE, "F": 1}  # the highest value, by PIL's mode, whose meaning is known

# Axis along which the organ's poles lie, for each plane. In a longitudinal view it is the horizontal one. A transverse
# view shows no pole; the paper divides the organ by vertical lines whatever the plane, and so do we.
POLE_AXIS = {"longitudinal": "horizontal", "transverse": "horizontal"}
# From the image's left (or top) edge. Scanners show the head on the left of a longitudinal view, so the inferior pole
# is at the right end.
POLES = ("upper pole", "middle pole", "inferior pole")
OUTLINE_PX = 6  # how far a nodule's outline reaches beyond its mask in a Sobel map: the recipe blurs by about as much
RIM = 0.05  # width of the rim about a nodule that belongs to it, as a share of the image's side
EXTENSION_PX, EXTENSION_AT = 10, 512  # a mask reaches at most 10 px beyond the organ in a 512 px image


# ------------------------------------------------------------------------------------------------------------- reading


def open_image(path: str | Path) -> Image.Image:
    """Decode an image file, in a folder or in a shard. Raises InputError when it is missing, damaged or no image."""
    try:
        return decode(shards.read_bytes(Path(path)), str(path))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): replace the file") from error


def decode(content: bytes, name: str) -> Image.Image:
    """Decode an image completely; the InputError, where it cannot be, calls it by `name`."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "no known image format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise InputError(f"{name}: cannot be read as an image ({reason}): replace the file") from error
    if image.mode in MOST and np.asarray(image).max(initial=0) > MOST[image.mode]:
        raise InputError(f"{name}: has values above {MOST[image.mode]}: convert it to 8 or 16 bits")
    return image


def to_gray(image: Image.Image, white: int = WHITE) -> Gray:
    """Any PIL image → HxW uint8.

    Colour is converted by its luma, transparency dropped, float images are taken as 0-1. Images of more than 8 bits are
    scaled by `white`, the value that becomes 255: the same for a whole data set (see `white_level`), as images that are
    scaled one by one can no longer be compared.
    """
    if image.mode.startswith("I"):  # I, I;16, I;16B
        return _to_uint8(np.asarray(image, dtype=np.float64) * (255.0 / white))
    if image.mode == "F":
        return _to_uint8(np.nan_to_num(np.asarray(image, dtype=np.float64)) * 255.0)
    if image.mode not in ("L", "1", "RGB"):
        image = image.convert("RGB")  # palettes, alpha, CMYK
    return np.array(image.convert("L"), dtype=np.uint8)


def brightest(image: Image.Image) -> int:
    """The highest value of an image of more than 8 bits; 0 for all others, whose white is known."""
    return int(np.asarray(image).max(initial=0)) if image.mode.startswith("I") else 0


def white_level(highest: Iterable[int]) -> int:
    """What `white` is in images of more than 8 bits: all of the bits that the brightest of their values needs.

    Scanners store 10, 12 or 14 bits in files of 16.

    Args:
        highest: `brightest` of each image of a data set.
    """
    top = max(highest, default=WHITE)
    return next(white for white in (1, 255, 1023, 4095, 16383, WHITE) if top <= white)


def to_gray_alone(image: Image.Image) -> Gray:
    """`to_gray` by the bits that this image alone needs: for masks, and for comparing pictures whatever their depth."""
    return to_gray(image, white_level([brightest(image)]))


def _to_uint8(values: NDArray[Any]) -> Gray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def read_gray(path: str | Path, size: int | None = None) -> Gray:
    """Read an image as HxW uint8; with `size`, resized to size x size (see `resize_gray`)."""
    gray = to_gray(open_image(path))
    return gray if size is None else resize_gray(gray, size)


def read_mask(path: str | Path, size: int | None = None) -> Gray:
    """Read a mask as HxW uint8 of 0 and 255, thresholded at 128; with `size`, resized to size x size."""
    mask = binarize(to_gray(open_image(path)))
    return mask if size is None else resize_mask(mask, size)


def resize_gray(gray: Gray, size: int) -> Gray:
    """HxW → size x size, sides not kept in proportion. PIL bicubic, which antialiases when it shrinks."""
    if gray.shape == (size, size):
        return gray
    return np.array(Image.fromarray(gray).resize((size, size), Image.Resampling.BICUBIC), dtype=np.uint8)


def resize_mask(mask: Gray, size: int) -> Gray:
    """HxW of 0/255 → size x size of 0/255, nearest pixel. A mask that those miss keeps the pixel at its centroid."""
    if mask.shape == (size, size):
        return mask
    resized = np.array(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST), dtype=np.uint8)
    if mask.any() and not resized.any():
        x, y = centroid(mask)
        resized[int(y * size / mask.shape[0]), int(x * size / mask.shape[1])] = 255
    return resized


def binarize(gray: NDArray[Any]) -> Gray:
    """0 below 128, 255 from there."""
    return np.where(gray >= 128, 255, 0).astype(np.uint8)


def border_bars(mask: Gray) -> dict[str, int]:
    """White bars along the border, side → width in pixels.

    A bar is at least 98 % white over the whole side, at most 8 % of the image deep, and ends abruptly: a lesion that
    reaches the border neither fills a side nor stops after a few rows.
    """
    white = mask >= 128
    bars = {}
    for side, lines in {"top": white, "bottom": white[::-1], "left": white.T, "right": white.T[::-1]}.items():
        filled = lines.mean(axis=1)
        width = int(np.argmin(filled >= 0.98)) if (filled < 0.98).any() else len(filled)
        beyond = filled[min(width + 2, len(filled) - 1)]  # JPEG leaves a soft row or two
        if 0 < width <= max(2, 0.08 * len(filled)) and beyond < 0.5:
            bars[side] = width
    return bars


def remove_bars(mask: Gray) -> Gray:
    """Paint the bars that `border_bars` finds black, with the soft row that JPEG leaves; the lesion stays."""
    clean = mask.copy()
    for side, width in border_bars(mask).items():
        lines = {"top": clean, "bottom": clean[::-1], "left": clean.T, "right": clean.T[::-1]}[side]  # views
        while width < len(lines) and (lines[width] >= 128).mean() > 0.5:
            width += 1
        lines[:width] = 0
    return clean


# ------------------------------------------------------------------------------------------------------------ Sobel map


def sobel_map(image: Gray) -> Gray:
    """Background condition: HxW uint8 → HxW uint8.

    Gaussian blur (9x9, σ = 1.7 from OpenCV's rule), |Sobel x| + |Sobel y| (3x3), box blur (7x7), times 1.5, clipped.
    Measured from the maps published with the paper's code: r ≥ 0.995 on all seven.
    """
    smooth = cv2.GaussianBlur(image.astype(np.float32), (9, 9), 0)
    edges = np.abs(cv2.Sobel(smooth, cv2.CV_32F, 1, 0, ksize=3)) + np.abs(cv2.Sobel(smooth, cv2.CV_32F, 0, 1, ksize=3))
    return _to_uint8(cv2.blur(edges, (7, 7)) * 1.5)


def boundary_map(image: Gray, mask: Gray) -> Gray:
    """The Sobel map with the `outline` of the mask drawn into it: HxW uint8 → HxW uint8.

    Raises InputError when the two differ in size.
    """
    if image.shape != mask.shape:
        raise InputError(f"the mask is {mask.shape[::-1]}, the image {image.shape[::-1]}: make them agree")
    return np.maximum(sobel_map(image), outline(mask))


def outline(mask: Gray) -> Gray:
    """A line around `nodule_region`, as thick as a 512 px image's line of 2 px: 0 or 255.

    It lies just outside the region so that `blank_nodule` leaves it.
    """
    region = nodule_region(mask)
    line = grow(region, max(1, round(2 * max(mask.shape) / 512)))
    return np.where(region > 0, 0, line).astype(np.uint8)


def has_outline(edges: Gray, mask: Gray) -> bool:
    """Whether a map is a `boundary_map` of this mask; no Sobel map is at its limit all around a nodule."""
    line = outline(mask) > 0
    return edges.shape == mask.shape and bool(line.any() and (edges[line] == 255).all())


def nodule_region(mask: Gray) -> Gray:
    """The mask and a rim about it, 5 % of the image's side wide, in which a halo or a blurred margin lies: 0 or 255."""
    return grow(np.where(mask > 0, 255, 0).astype(np.uint8), round(RIM * max(mask.shape)))


def blank_nodule(edges: Gray, mask: Gray) -> Gray:
    """The Sobel map with zeros in the nodule's region, so that the background says nothing of the nodule."""
    return np.where(nodule_region(mask) > 0, 0, edges).astype(np.uint8)


def remove_nodule(edges: Gray, mask: Gray, organ_mask: Gray | None = None) -> Gray:
    """The Sobel map as if the nodule were not there: it and its outline become as quiet as what surrounds them.

    A hole would not do: wherever training shows one, there is a nodule in it. With an organ mask, the organ's own
    outline stays, where it runs beside the nodule.
    """
    around = grow(mask, OUTLINE_PX)
    ring = (grow(around, OUTLINE_PX) > 0) & (around == 0)
    if organ_mask is not None:
        inside = cv2.erode(organ_mask, _disk(OUTLINE_PX))
        around = np.where(inside > 0, around, mask)
        ring &= inside > 0
    quiet = np.median(edges[ring]) if ring.any() else 0
    return np.where(around > 0, quiet, edges).astype(np.uint8)


def _disk(radius: int) -> Gray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1)).astype(np.uint8)


def grow(mask: Gray, radius: int) -> Gray:
    """The mask dilated by a disk of `radius` pixels: HxW uint8 → HxW uint8."""
    return np.asarray(cv2.dilate(mask, _disk(radius)), dtype=np.uint8)


# -------------------------------------------------------------------------------------------------------- placing masks


def centroid(mask: Gray) -> tuple[float, float]:
    """(x, y) of the mask's centre of mass in pixels. Raises InputError on an empty mask."""
    y, x = np.nonzero(mask)
    if not len(x):
        raise InputError("the mask is empty: draw it or leave it out")
    return float(x.mean()), float(y.mean())


def pole_bounds(
    organ_mask: Gray,
    location: str | None,
    plane: str | None,
    parts: Sequence[str] = POLES,
    part_axis: Mapping[str, str] = POLE_AXIS,
) -> tuple[int, float, float]:
    """(axis, low, high): a centroid is in the part `location` of the organ when low ≤ its coordinate on `axis` < high.

    The organ's extent is cut into as many equal parts as there are; None is all of it.

    Args:
        parts: names of the parts, from the image's left or top (an organ's knowledge base: `placement.parts`).
        part_axis: plane → the axis they lie along, horizontal or vertical (`placement.axis`).
    Returns axis 0 for x, 1 for y. Raises InputError on an unknown location or plane, or an empty organ.
    """
    if location is not None and location not in parts:
        raise InputError(f"location {location!r} is not one of {', '.join(parts)}")
    view = (plane or "longitudinal").split()[0]
    if location is not None and view not in part_axis:
        raise InputError(f"plane {plane!r} is not one of {', '.join(part_axis)}")
    axis = 1 if part_axis.get(view) == "vertical" else 0
    positions = np.flatnonzero(organ_mask.any(axis=axis))
    if not len(positions):
        raise InputError("the organ mask is empty: no pole to place the nodule in")
    start, length = float(positions[0]), float(positions[-1] - positions[0] + 1)
    if location is None:
        return axis, start, start + length
    part = parts.index(location)
    return axis, start + length * part / len(parts), start + length * (part + 1) / len(parts)


def place_mask(
    mask: Gray,
    organ_mask: Gray,
    location: str | None,
    plane: str | None,
    rng: np.random.Generator,
    parts: Sequence[str] = POLES,
    part_axis: Mapping[str, str] = POLE_AXIS,
) -> Gray:
    """Move a nodule mask so that its centroid falls in the asked part of the organ (see `pole_bounds`).

    The new place is drawn uniformly among those where the mask lies best within the organ; it never leaves the image.
    A mask that no place in that part holds to three quarters within the organ is shrunk in steps of 10 %.
    """
    axis, low, high = pole_bounds(organ_mask, location, plane, parts, part_axis)
    patch = _crop(mask)
    while True:
        height, width = patch.shape
        if height <= organ_mask.shape[0] and width <= organ_mask.shape[1]:
            center = np.array(centroid(patch))
            # inside[y, x] = share of the patch, with its corner at (x, y), that lies within the organ
            inside = cv2.matchTemplate(
                (organ_mask > 0).astype(np.float32), (patch > 0).astype(np.float32), cv2.TM_CCORR
            ) / np.count_nonzero(patch)
            position = np.arange(inside.shape[1 - axis]) + center[axis]
            allowed = (position >= low) & (position < high)
            inside = np.where(allowed[None, :] if axis == 0 else allowed[:, None], inside, -1.0)
            best = float(inside.max())
            if best >= 0.75 or (best > 0 and max(height, width) <= 8):
                y, x = np.nonzero(inside >= min(0.98, best - 0.02))
                chosen = rng.integers(len(x))
                return _paste(patch, organ_mask.shape, int(x[chosen]), int(y[chosen]))
        if max(height, width) <= 2:
            raise InputError("the organ mask leaves no room in that third: check it")
        patch = _shrink(patch, 0.9)


def extend_mask(mask: Gray, organ_mask: Gray, rng: np.random.Generator, image_size: int) -> Gray:
    """Move a nodule mask up or down until it crosses the organ's upper edge by d ~ U[0, 10] px (at 512 px).

    The crossing is the mask's highest rise above the organ's edge in any column, at least one pixel; the mask keeps its
    columns and stays in the image. Raises InputError when no column of the mask holds organ.

    Args:
        image_size: side of the image in pixels, to which the 10 px are scaled.
    """
    columns = np.flatnonzero((mask > 0).any(axis=0) & (organ_mask > 0).any(axis=0))
    if not len(columns):
        raise InputError("the mask and the organ share no column: place the mask first")
    nodule_top = np.argmax(mask[:, columns] > 0, axis=0)
    organ_top = np.argmax(organ_mask[:, columns] > 0, axis=0)
    crossing = max(1, round(rng.uniform(0, EXTENSION_PX) * image_size / EXTENSION_AT))
    down = int((organ_top - nodule_top).max()) - crossing  # from the present rise to the wanted one
    y, x = np.nonzero(mask)
    down = int(np.clip(down, -y.min(), mask.shape[0] - 1 - y.max()))
    return _paste(_crop(mask), mask.shape, int(x.min()), int(y.min()) + down)


def vary_mask(mask: Gray, rng: np.random.Generator) -> Gray:
    """A new outline like the old one: a small affine change (±10°, ±10 %) and a smooth elastic one, about its centroid.

    The result is one component whose area is within ±30 % of the old largest component's.
    """
    original = largest_component(mask)
    area = np.count_nonzero(original)
    for strength in (1.0, 0.5, 0.25):  # a milder try where the first cuts the mask up or lets it leave the image
        varied = largest_component(_warp(original, strength, rng))
        if 0.7 * area <= np.count_nonzero(varied) <= 1.3 * area:
            return varied
    return original


def scale_mask(mask: Gray, area: int) -> Gray:
    """The mask enlarged or shrunk, in proportion, to about `area` pixels, but no larger than the image; in its middle.

    Raises InputError on an empty mask.
    """
    patch = _crop(mask)
    factor = (area / np.count_nonzero(patch)) ** 0.5
    height, width = (
        min(most, max(1, round(side * factor))) for side, most in zip(patch.shape, mask.shape, strict=True)
    )
    patch = binarize(
        np.array(Image.fromarray(patch).resize((width, height), Image.Resampling.BILINEAR), dtype=np.uint8)
    )
    if not patch.any():  # a sliver that bilinear shrinking loses
        return mask
    return _paste(patch, mask.shape, (mask.shape[1] - width) // 2, (mask.shape[0] - height) // 2)


def largest_component(mask: Gray) -> Gray:
    """The largest 8-connected component, as 0/255. Raises InputError on an empty mask."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats((mask > 0).astype(np.uint8), connectivity=8)
    if count < 2:
        raise InputError("the mask is empty: draw it or leave it out")
    largest = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    return np.where(labels == largest, 255, 0).astype(np.uint8)


def _warp(mask: Gray, strength: float, rng: np.random.Generator) -> Gray:
    """Resample the mask through a random affine and elastic map."""
    height, width = mask.shape
    cx, cy = centroid(mask)
    radius = np.sqrt(np.count_nonzero(mask) / np.pi)
    angle = np.deg2rad(rng.uniform(-10, 10) * strength)
    scale = np.exp(rng.uniform(-0.1, 0.1, 2) * strength)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    dx, dy = x - np.float32(cx), y - np.float32(cy)
    cos, sin = np.cos(angle), np.sin(angle)
    shifts = []
    for _ in range(2):
        noise = rng.standard_normal((height, width), dtype=np.float32)
        noise = cv2.GaussianBlur(noise, (0, 0), max(0.5 * radius, 1.0))
        shifts.append(noise / (noise.std() + 1e-9) * np.float32(0.06 * radius * strength))
    map_x = (cx + (cos * dx - sin * dy) * scale[0] + shifts[0]).astype(np.float32)
    map_y = (cy + (sin * dx + cos * dy) * scale[1] + shifts[1]).astype(np.float32)
    return binarize(np.asarray(cv2.remap(mask, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)))


def _crop(mask: Gray) -> Gray:
    """The mask's bounding box. Raises InputError on an empty mask."""
    y, x = np.nonzero(mask)
    if not len(x):
        raise InputError("the mask is empty: draw it or leave it out")
    return binarize(mask[y.min() : y.max() + 1, x.min() : x.max() + 1])


def _paste(patch: Gray, shape: tuple[int, ...], x: int, y: int) -> Gray:
    """An empty mask of `shape` with `patch`'s corner at (x, y)."""
    mask = np.zeros(shape, np.uint8)
    mask[y : y + patch.shape[0], x : x + patch.shape[1]] = patch
    return mask


def _shrink(patch: Gray, factor: float) -> Gray:
    """A smaller copy of the patch, at least one pixel less on its longer side."""
    height, width = (max(1, min(side - 1, round(side * factor))) for side in patch.shape)
    smaller = np.array(Image.fromarray(patch).resize((width, height), Image.Resampling.BILINEAR), dtype=np.uint8)
    smaller = binarize(smaller)
    return _crop(smaller) if smaller.any() else np.full((height, width), 255, np.uint8)
