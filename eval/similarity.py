"""SSIM needs pairs, and says something else for each kind of pair; this makes the pairs and averages over them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval import statistics
from eval.images import group_of, load_images, load_native, patients_of
from tiger.manifest import Manifest, Row

VARIANT = "scikit-image, 7x7 uniform window, grey, 0-255"
MOST = 500  # pairs of each kind and class

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8], str]  # two images of one size, and the group of the first
Scored = tuple[list[float], list[str]]  # SSIM and group of each pair


def ssim(x: NDArray[np.uint8], y: NDArray[np.uint8]) -> float:
    """Structural similarity of two (H, W) uint8 images (Wang et al. 2004), in scikit-image's default variant."""
    from skimage.metrics import structural_similarity

    value: Any = structural_similarity(x, y, data_range=255)
    return float(value)


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


def ssim_report(
    real: Manifest,
    fake: Manifest,
    train: Manifest,
    nearest: Sequence[NDArray[np.int64]],
    labels: Sequence[str],
    seed: int,
    tick: Callable[[], object],
) -> dict[str, dict[str, Any]]:
    """label, and "overall", -> kind of pair -> {n, value, low, high}; arguments as in pairs_of, `tick` once a label."""
    scored: dict[str, dict[str, Scored]] = {"overall": {}}
    for label in labels:
        scored[label] = {}
        for kind, pairs in pairs_of(label, real, fake, train, nearest, seed).items():
            values, groups = [ssim(x, y) for x, y, _ in pairs], [group for _, _, group in pairs]
            scored[label][kind] = values, groups
            every = scored["overall"].setdefault(kind, ([], []))
            every[0].extend(values)
            every[1].extend(groups)
        tick()
    return {
        label: {kind: statistics.mean_ci(values, groups) for kind, (values, groups) in kinds.items()}
        for label, kinds in scored.items()
    }
