"""Likeness of two images, and the pairs of images to which it is applied: it says something else for each kind of pair.

A pairing is named in every report. "random" beside "random real" asks whether a synthetic image is as unlike a real one
as two real ones are; "nearest" beside "nearest real" whether it repeats a training image; "condition" how much of the
image came with its Sobel map.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eval import statistics
from eval.images import group_of, load_images, load_native, patients_of
from tiger.manifest import Manifest, Row

VARIANT = "scikit-image, 7x7 uniform window, grey, 0-255"
MOST = 500  # pairs of each kind and class
GSM_MASKING = 200.0  # K' of Liu et al.
GSM_LUMINANCE = 0.1  # p of Liu et al., the weight of luminance

Gray = NDArray[np.uint8]  # (H, W)
Measure = Callable[[Gray, Gray], float]
Pair = tuple[Gray, Gray, str]  # two images of one size, and the group of the first
Scored = tuple[list[float], list[str]]  # value and group of each pair


# ------------------------------------------------------------------------------------------------------------- measures


def ssim(x: Gray, y: Gray) -> float:
    """Structural similarity of two (H, W) uint8 images (Wang et al. 2004), in scikit-image's default variant."""
    from skimage.metrics import structural_similarity

    value: Any = structural_similarity(x, y, data_range=255)
    return float(value)


def _directions() -> list[NDArray[np.floating[Any]]]:
    """The four 5×5 gradient operators of Liu et al., fig. 2: horizontal, vertical and both diagonals."""
    upright = np.array([[0, 0, 0, 0, 0], [1, 3, 8, 3, 1], [0, 0, 0, 0, 0], [-1, -3, -8, -3, -1], [0, 0, 0, 0, 0]])
    slanted = np.array([[0, 0, 1, 0, 0], [0, 8, 3, 0, 0], [1, 3, 0, -3, -1], [0, 0, -3, -8, 0], [0, 0, -1, 0, 0]])
    return [kernel.astype(np.float32) / 16 for kernel in (upright, upright.T, slanted, slanted[:, ::-1])]


_DIRECTIONS = _directions()


def gradient_similarity(x: Gray, y: Gray) -> float:
    """GSM of two (H, W) uint8 images, at most 1 (Liu, Lin & Narwaria, IEEE TIP 21(4):1500, 2012; online 2011).

    Their g = (2(1 − R) + K) / (1 + (1 − R)² + K), with R = |gx − gy| / max(gx, gy) and K = 200 / max(gx, gy), is
    multiplied out here, which spares the division by a gradient of 0.
    """
    images = [np.asarray(image, np.float32) for image in (x, y)]
    gx, gy = (np.max([np.abs(cv2.filter2D(image, -1, k)) for k in _DIRECTIONS], axis=0) for image in images)
    masking = GSM_MASKING * np.maximum(gx, gy)
    squares = gx**2 + gy**2 + masking
    contrast = np.divide(2 * gx * gy + masking, squares, out=np.ones_like(squares), where=squares > 0)
    luminance = 1 - ((images[0] - images[1]) / 255) ** 2
    weight = GSM_LUMINANCE * contrast
    return float(((1 - weight) * contrast + weight * luminance).mean())


def phash(image: Gray) -> np.uint64:
    """ImageHash's 64-bit perceptual hash of an (H, W) uint8 image: the signs of the lowest 8×8 cosine frequencies."""
    return _phash(image.tobytes(), image.shape)


@functools.lru_cache(maxsize=4096)  # an image is in several kinds of pairs
def _phash(pixels: bytes, shape: tuple[int, ...]) -> np.uint64:
    import imagehash

    bits = imagehash.phash(Image.fromarray(np.frombuffer(pixels, np.uint8).reshape(shape))).hash
    return np.packbits(bits.ravel()).view(">u8")[0].astype(np.uint64)


def phash_distance(x: Gray, y: Gray) -> float:
    """Bits, of 64, in which the perceptual hashes of two images differ: 0 where they look alike, 32 by chance."""
    return float(np.bitwise_count(phash(x) ^ phash(y)))


MEASURES: dict[str, Measure] = {
    "ssim": ssim,
    "gradient_similarity": gradient_similarity,
    "phash_distance": phash_distance,
}


# ---------------------------------------------------------------------------------------------------------------- pairs


def pairs_of(
    label: str, real: Manifest, fake: Manifest, train: Manifest, nearest: Sequence[NDArray[np.int64]], seed: int
) -> dict[str, list[Pair]]:
    """Pairs of one class, by kind.

    condition: a synthetic image and the real one whose Sobel map it was drawn after.
    random, random real: a synthetic, or real, image and a real one of the class, of another patient.
    nearest, nearest real: a synthetic, or held-out real, image and the training image of the nearest features; where
        synthetic ones are far above real ones, images have been memorised.

    Args:
        nearest: for each row of `real`, and of `fake`, its nearest row of `train`; empty where there is none.
    """
    rng = np.random.default_rng(seed)
    size = load_native(fake, fake.rows[0]).shape[0]

    def images(manifest: Manifest, rows: Sequence[Row]) -> np.ndarray:
        return load_images(Manifest(manifest.path, tuple(rows)), size)

    real_at, fake_at = (
        rng.permutation([i for i, row in enumerate(m.rows) if str(row.label) == label])[:MOST] for m in (real, fake)
    )
    real_rows, fake_rows = [real.rows[i] for i in real_at], [fake.rows[i] for i in fake_at]
    theirs, ours = images(real, real_rows), images(fake, fake_rows)
    known = {row.file_name: row for row in (*train.rows, *real.rows)}
    patient_of = patients_of(known.values())
    patients, sources = ([group_of(row, patient_of) for row in rows] for rows in (real_rows, fake_rows))

    pairs: dict[str, list[Pair]] = {}
    partners = rng.integers(len(theirs), size=len(ours))
    pairs["random"] = [(ours[i], theirs[j], sources[i]) for i, j in enumerate(partners)]
    partners = rng.permutation(len(theirs))
    strangers = [(i, j) for i, j in enumerate(partners) if patients[i] != patients[j]]
    pairs["random real"] = [(theirs[i], theirs[j], patients[i]) for i, j in strangers]
    followed = [i for i, row in enumerate(fake_rows) if row.derived_from and row.derived_from[0] in known]
    originals = images(real, [known[fake_rows[i].derived_from[0]] for i in followed])
    pairs["condition"] = [(ours[i], original, sources[i]) for i, original in zip(followed, originals, strict=True)]
    if train.rows:
        closest = images(train, [train.rows[k] for k in nearest[1][fake_at]])
        pairs["nearest"] = list(zip(ours, closest, sources, strict=True))
        held_out = [i for i, row in enumerate(real_rows) if row.split in ("valid", "test")]
        closest = images(train, [train.rows[k] for k in nearest[0][real_at[held_out]]])
        pairs["nearest real"] = [(theirs[i], other, patients[i]) for i, other in zip(held_out, closest, strict=True)]
    return {kind: some for kind, some in pairs.items() if some}


def pair_report(
    real: Manifest,
    fake: Manifest,
    train: Manifest,
    nearest: Sequence[NDArray[np.int64]],
    labels: Sequence[str],
    measures: Mapping[str, Measure],
    seed: int,
    tick: Callable[[], object],
) -> dict[str, dict[str, dict[str, Any]]]:
    """label, and "overall", -> measure -> kind of pair -> {n, value, low, high}.

    Arguments are those of pairs_of; `tick` is called once a label.
    """
    scored: dict[str, dict[str, dict[str, Scored]]] = {}
    for label in labels:
        for kind, pairs in pairs_of(label, real, fake, train, nearest, seed).items():
            groups = [group for _, _, group in pairs]
            for name, measure in measures.items():
                values = [measure(x, y) for x, y, _ in pairs]
                for part in ("overall", label):
                    into = scored.setdefault(part, {}).setdefault(name, {}).setdefault(kind, ([], []))
                    into[0].extend(values)
                    into[1].extend(groups)
        tick()
    return {
        label: {
            name: {kind: statistics.mean_ci(values, groups) for kind, (values, groups) in kinds.items()}
            for name, kinds in of_label.items()
        }
        for label, of_label in scored.items()
    }
