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
from numpy.typing import ArrayLike, NDArray

from data.duplicates import perceptual_hash
from eval import statistics
from eval.images import group_of, load_images, load_native, patients_of, source_patients
from tiger.manifest import Manifest, Row

VARIANT = "scikit-image, 7x7 uniform window, grey, 0-255"
MOST = 500  # pairs of each kind and class
RESAMPLES = 1000
GSM_MASKING = 200.0  # K' of Liu et al.
GSM_LUMINANCE = 0.1  # p of Liu et al., the weight of luminance

Gray = NDArray[Any]  # (H, W), integers or floats: see grey_levels
Measure = Callable[[Gray, Gray], float]
Pair = tuple[Gray, Gray, str, str]  # two images of one size, and the patient of each
Scored = list[tuple[float, str, str]]  # the value of each pair, and its patients


# ------------------------------------------------------------------------------------------------------------- measures


def grey_levels(*images: Gray) -> list[Gray]:
    """(H, W) images with white at 255. Integers and floats have it there already, but for floats all of which are
    within 0 and 1: those have it at 1.

    Raises ValueError where white is not known: beyond 0 … 255, integers beside floats, booleans.
    """
    found = [np.asarray(image) for image in images]
    kinds = {"integers" if image.dtype.kind in "iu" else image.dtype.kind for image in found}
    fine = all(image.ndim == 2 and ((image >= 0) & (image <= 255)).all() for image in found)
    if not fine or kinds not in ({"integers"}, {"f"}):
        raise ValueError("needed are (H, W) images that all hold integers of 0 to 255, or floats of 0 to 1 or to 255")
    unit = kinds == {"f"} and all((image <= 1).all() for image in found)
    return [255 * image for image in found] if unit else found


def ssim(x: Gray, y: Gray) -> float:
    """Structural similarity of two (H, W) images (Wang et al. 2004), in scikit-image's default variant.

    White is 255 in arrays of integers; in floats it is 1 where both images are within 0 and 1, else 255. ValueError
    says where neither can be.
    """
    from skimage.metrics import structural_similarity

    value: Any = structural_similarity(*grey_levels(x, y), data_range=255)
    return float(value)


def _directions() -> list[NDArray[np.floating[Any]]]:
    """The four 5×5 gradient operators of Liu et al., fig. 2: horizontal, vertical and both diagonals."""
    upright = np.array([[0, 0, 0, 0, 0], [1, 3, 8, 3, 1], [0, 0, 0, 0, 0], [-1, -3, -8, -3, -1], [0, 0, 0, 0, 0]])
    slanted = np.array([[0, 0, 1, 0, 0], [0, 8, 3, 0, 0], [1, 3, 0, -3, -1], [0, 0, -3, -8, 0], [0, 0, -1, 0, 0]])
    return [kernel.astype(np.float32) / 16 for kernel in (upright, upright.T, slanted, slanted[:, ::-1])]


_DIRECTIONS = _directions()


def gradient_similarity(x: Gray, y: Gray) -> float:
    """GSM of two (H, W) images, at most 1 (Liu, Lin & Narwaria, IEEE TIP 21(4):1500, 2012; online 2011).

    Their g = (2(1 − R) + K) / (1 + (1 − R)² + K), with R = |gx − gy| / max(gx, gy) and K = 200 / max(gx, gy), is
    multiplied out here, which spares the division by a gradient of 0. White as in ssim.
    """
    images = [np.asarray(image, np.float32) for image in grey_levels(x, y)]
    gx, gy = (np.max([np.abs(cv2.filter2D(image, -1, k)) for k in _DIRECTIONS], axis=0) for image in images)
    masking = GSM_MASKING * np.maximum(gx, gy)
    squares = gx**2 + gy**2 + masking
    contrast = np.divide(2 * gx * gy + masking, squares, out=np.ones_like(squares), where=squares > 0)
    luminance = 1 - ((images[0] - images[1]) / 255) ** 2
    weight = GSM_LUMINANCE * contrast
    return float(((1 - weight) * contrast + weight * luminance).mean())


def phash(image: Gray) -> np.uint64:
    """64-bit perceptual hash of an (H, W) image (data.duplicates). White as in ssim."""
    return _hash_of(*grey_levels(image))


def _hash_of(levels: Gray) -> np.uint64:
    return _phash(np.round(levels).astype(np.uint8).tobytes(), levels.shape)


@functools.lru_cache(maxsize=4096)  # an image is in several kinds of pairs
def _phash(pixels: bytes, shape: tuple[int, ...]) -> np.uint64:
    return np.uint64(perceptual_hash(np.frombuffer(pixels, np.uint8).reshape(shape)))


def phash_distance(x: Gray, y: Gray) -> float:
    """Bits, of 64, in which the perceptual hashes of two images differ: 0 where they look alike, 32 by chance."""
    one, other = map(_hash_of, grey_levels(x, y))
    return float(np.bitwise_count(one ^ other))


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
    random, random real: a synthetic, or real, image and a real one of the class, of another patient; equally many.
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

    def with_those(some: np.ndarray, people: Sequence[str], manifest: Manifest, rows: Sequence[Row]) -> list[Pair]:
        others = (patient_of[row.file_name] for row in rows)
        return list(zip(some, images(manifest, rows), people, others, strict=True))

    pairs: dict[str, list[Pair]] = {}
    partners = strangers([source_patients(row, patient_of) for row in fake_rows], patients, rng)
    pairs["random"] = [(ours[i], theirs[j], sources[i], patients[j]) for i, j in partners]
    first = np.resize(np.arange(len(theirs)), len(ours))
    partners = [(first[i], j) for i, j in strangers([[patients[k]] for k in first], patients, rng)]
    pairs["random real"] = [(theirs[i], theirs[j], patients[i], patients[j]) for i, j in partners]
    followed = [i for i, row in enumerate(fake_rows) if row.derived_from and row.derived_from[0] in known]
    originals = [known[fake_rows[i].derived_from[0]] for i in followed]
    pairs["condition"] = with_those(ours[followed], [sources[i] for i in followed], real, originals)
    if train.rows:
        pairs["nearest"] = with_those(ours, sources, train, [train.rows[k] for k in nearest[1][fake_at]])
        held_out = [i for i, row in enumerate(real_rows) if row.split in ("valid", "test")]
        closest = [train.rows[k] for k in nearest[0][real_at[held_out]]]
        pairs["nearest real"] = with_those(theirs[held_out], [patients[i] for i in held_out], train, closest)
    return {kind: some for kind, some in pairs.items() if some}


def strangers(
    people: Sequence[Sequence[str]], patients: Sequence[str], rng: np.random.Generator
) -> list[tuple[int, int]]:
    """(i, j) for each of `people`, sets of patients: patients[j] is none of people[i]. Left out where all are."""
    places = (np.flatnonzero(~np.isin(patients, some)) for some in people)
    return [(i, int(rng.choice(found))) for i, found in enumerate(places) if len(found)]


def pair_mean_ci(values: ArrayLike, first: ArrayLike, second: ArrayLike, *, n: int = RESAMPLES) -> dict[str, float]:
    """{n, value, low, high} of the mean over pairs, by bootstrap over the patients of both sides.

    Patients are drawn together, whichever side they are on, and a pair counts as often as its two are drawn, one times
    the other: an image that is in many pairs moves them all. This is the pigeonhole bootstrap (Owen 2007, Annals of
    Applied Statistics 1(2):386), which errs on the wide side, the more so the less depends on who is in a pair.

    Args:
        values: (N,); first, second: (N,) the patient of either image, who may be the same one.
    """
    values = np.asarray(values, float)
    names, places = np.unique(np.concatenate([first, second]), return_inverse=True)
    one, other = np.split(places, 2)
    drawn = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), size=n)
    weights = np.where(one == other, drawn[:, one], drawn[:, one] * drawn[:, other])  # (n, N)
    sums = weights.sum(1)
    means = np.divide(weights @ values, sums, out=np.full(n, np.nan), where=sums > 0)
    low, high = statistics.percentile_interval(means)
    return {"n": len(values), "value": float(values.mean()), "low": low, "high": high}


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
            for name, measure in measures.items():
                values = [(measure(x, y), one, other) for x, y, one, other in pairs]
                for part in ("overall", label):
                    scored.setdefault(part, {}).setdefault(name, {}).setdefault(kind, []).extend(values)
        tick()
    return {
        label: {
            name: {kind: pair_mean_ci(*zip(*found, strict=True)) for kind, found in kinds.items()}
            for name, kinds in of_label.items()
        }
        for label, of_label in scored.items()
    }
