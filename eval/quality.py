"""How good are synthetic images? FID, KID, density, coverage, precision, recall, SSIM, beside what real images give.

    python -m eval.quality --real runs/data --fake runs/generated --output quality.json
    python -m eval.quality --real D --fake G --output quality.json --extractor resnet50 --extractor_weights resnet50.pth

Sets that are compared have equally many images of each class, and the floor is the same figure between two such sets of
real images which share no patient: FID, coverage and others depend on the number of images more than on anything else.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from eval import statistics
from eval.features import DEFAULT, RESIZE, default_cache, features_of, load_extractor
from eval.images import group_of, patients_of, read_split, select_split
from eval.similarity import VARIANT as SSIM_VARIANT
from eval.similarity import ssim_report
from tiger.errors import InputError, run
from tiger.files import write_json
from tiger.manifest import Manifest

Features = NDArray[np.floating[Any]]  # (N, D)
FEWEST = 2  # images of a class in a set; a class with fewer is left out
K = 5  # neighbours, as in Naeem et al. 2020
BLOCK = 2048  # rows of a distance matrix that are held at once
REPEATS = 10  # random splits that a value is averaged over
RESAMPLES = 100
SHARES = ("coverage", "precision", "recall")  # within 0 and 1, which a centred interval need not respect


# ------------------------------------------------------------------------------------------------------------- metrics


def fid(a: Features, b: Features) -> float:
    """Fréchet distance of two Gaussians fitted to (N, D) features (Heusel et al. 2017), sample covariances.

    tr √(Σa Σb) is the nuclear norm of A Bᵀ for centred A, B with Σ = AᵀA, which needs no matrix root and is exact where
    N < D too; taller matrices are first reduced to their D×D triangular factors.
    """
    factors, means, traces = [], [], []
    for x in (np.asarray(a, np.float64), np.asarray(b, np.float64)):
        centred = (x - x.mean(0)) / np.sqrt(len(x) - 1)
        factors.append(np.linalg.qr(centred, mode="r") if len(x) > x.shape[1] else centred)
        means.append(x.mean(0))
        traces.append((centred**2).sum())
    cross = factors[0] @ factors[1].T
    gram = cross @ cross.T if cross.shape[0] <= cross.shape[1] else cross.T @ cross
    root = np.sqrt(np.linalg.eigvalsh(gram).clip(0)).sum()
    return float(((means[0] - means[1]) ** 2).sum() + traces[0] + traces[1] - 2 * root)


def kid(a: Features, b: Features, subset_size: int | None = None, subsets: int = 100, seed: int = 0) -> float:
    """Kernel distance: unbiased MMD² with the kernel (x·y / D + 1)³ (Bińkowski et al. 2018). It may be negative.

    Args:
        subset_size: with it, the mean over `subsets` random subsets of this size, as the original code computes it.
    """
    if subset_size is None:
        return _mmd2(np.asarray(a, np.float64), np.asarray(b, np.float64))
    if subset_size > min(len(a), len(b)):
        raise ValueError(f"subset_size {subset_size} exceeds the {min(len(a), len(b))} images there are")
    rng = np.random.default_rng(seed)
    pairs = [(rng.choice(len(a), subset_size, False), rng.choice(len(b), subset_size, False)) for _ in range(subsets)]
    return float(np.mean([kid(a[i], b[j]) for i, j in pairs]))


def _mmd2(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Unbiased: the diagonals are left out of the sums within a set."""

    def kernel_sum(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
        return sum(float(((x[i : i + BLOCK] @ y.T / x.shape[1] + 1) ** 3).sum()) for i in range(0, len(x), BLOCK))

    def within(x: NDArray[np.float64]) -> float:
        diagonal = float((((x * x).sum(1) / x.shape[1] + 1) ** 3).sum())
        return (kernel_sum(x, x) - diagonal) / (len(x) * (len(x) - 1))

    return within(a) + within(b) - 2 * kernel_sum(a, b) / (len(a) * len(b))


def _distances(a: Features, b: Features) -> NDArray[np.float64]:
    """(len(a), len(b)) Euclidean distances."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    squares = (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T
    return np.sqrt(squares.clip(0))


def nearest_rows(x: Features, among: Features) -> NDArray[np.int64]:
    """Index of the nearest row of `among` to each row of `x`; empty where `among` is."""
    if not len(among):
        return np.zeros(0, np.int64)
    return np.concatenate([_distances(x[i : i + BLOCK], among).argmin(1) for i in range(0, len(x), BLOCK)])


def _radii(x: Features, k: int) -> NDArray[np.float64]:
    """Distance of each row to its k-th nearest other row."""
    if len(x) <= k:
        raise ValueError(f"k = {k} needs more than {k} images, got {len(x)}")
    blocks = (_distances(x[i : i + BLOCK], x) for i in range(0, len(x), BLOCK))
    return np.concatenate([np.partition(block, k, axis=1)[:, k] for block in blocks])  # the nearest is itself


def density_coverage(real: Features, fake: Features, k: int = K) -> tuple[float, float]:
    """(density, coverage) of Naeem et al. 2020, eq. 3 and 4. Coverage needs equally many images to be comparable."""
    radii = _radii(real, k)
    inside, covered = 0, 0
    for i in range(0, len(real), BLOCK):
        within = _distances(real[i : i + BLOCK], fake) < radii[i : i + BLOCK, None]
        inside += int(within.sum())
        covered += int(within.any(1).sum())
    return inside / (k * len(fake)), covered / len(real)


def precision_recall(real: Features, fake: Features, k: int = K) -> tuple[float, float]:
    """Improved (precision, recall) of Kynkäänniemi et al. 2019, eq. 2."""
    real_radii, fake_radii = _radii(real, k), _radii(fake, k)
    precise, recalled = np.zeros(len(fake), bool), 0
    for i in range(0, len(real), BLOCK):
        distances = _distances(real[i : i + BLOCK], fake)
        precise |= (distances < real_radii[i : i + BLOCK, None]).any(0)
        recalled += int((distances < fake_radii[None]).any(1).sum())
    return float(precise.mean()), recalled / len(real)


def feature_metrics(real: Features, fake: Features) -> dict[str, float]:
    """All of them; those of the neighbourhoods only where there are more than K images."""
    values = {"fid": fid(real, fake), "kid": kid(real, fake)}
    if min(len(real), len(fake)) > K:
        values["density"], values["coverage"] = density_coverage(real, fake)
        values["precision"], values["recall"] = precision_recall(real, fake)
    return values


# ---------------------------------------------------------------------------------------------- comparing two manifests


@dataclass(frozen=True)
class ClassSets:
    """The images of one class, as row indices in groups that belong together (see group_of)."""

    real: list[NDArray[np.int64]]
    fake: list[NDArray[np.int64]]

    @property
    def n(self) -> int:
        """Images in each set that is compared: what two sets of whole patients surely hold, or all synthetic ones."""
        sizes = [len(rows) for rows in self.real]
        return min(sum(len(rows) for rows in self.fake), (sum(sizes) - max(sizes, default=0)) // 2)

    def __str__(self) -> str:
        real, fake = (sum(len(rows) for rows in groups) for groups in (self.real, self.fake))
        return f"{real} real images of {len(self.real)} patients, {fake} synthetic ones"


def class_sets(
    real: Manifest, fake: Manifest, patient_of: Mapping[str, str]
) -> tuple[dict[str, ClassSets], dict[str, ClassSets]]:
    """(label -> its groups, the same of the classes with too few images). Row indices are those of the manifests."""
    groups: dict[str, tuple[dict[str, list[int]], dict[str, list[int]]]] = {}
    for side, rows in enumerate((real.rows, fake.rows)):
        for index, row in enumerate(rows):
            of_class = groups.setdefault(str(row.label), ({}, {}))[side]
            of_class.setdefault(group_of(row, patient_of), []).append(index)
    sets = {
        label: ClassSets([np.array(rows) for rows in of_real.values()], [np.array(rows) for rows in of_fake.values()])
        for label, (of_real, of_fake) in groups.items()
    }
    large = {label: one for label, one in sets.items() if one.n >= FEWEST}
    small = {label: one for label, one in sets.items() if one.n < FEWEST}
    if not large:
        found = "; ".join(f"{label}: {one}" for label, one in small.items())
        raise InputError(f"{real.path} and {fake.path}: every class has too few images on one side ({found})")
    return large, small


Draw = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]  # rows of real, further real, fake


def split_draw(sets: list[ClassSets], rng: np.random.Generator) -> Draw:
    """n real images, n others of other patients, n synthetic ones, of each class."""
    parts: list[list[NDArray[np.int64]]] = [[], [], []]
    for one in sets:
        patients = [one.real[i] for i in rng.permutation(len(one.real))]
        sizes = np.cumsum([len(rows) for rows in patients])
        cut = int(np.argmin(np.abs(sizes - sizes[-1] / 2))) + 1  # where the halves are most equal
        for part, groups in zip(parts, (patients[:cut], patients[cut:], one.fake), strict=True):
            part.append(rng.permutation(np.concatenate(groups))[: one.n])
    return np.concatenate(parts[0]), np.concatenate(parts[1]), np.concatenate(parts[2])


def bootstrap_draw(sets: list[ClassSets], rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """n real and n synthetic images of each class, from groups drawn with replacement."""
    real, fake = [], []
    for one in sets:
        for part, groups in ((real, one.real), (fake, one.fake)):
            rows: list[int] = []
            while len(rows) < one.n:
                rows.extend(groups[rng.integers(len(groups))].tolist())
            part.append(np.array(rows[: one.n]))
    return np.concatenate(real), np.concatenate(fake)


def compare(
    real: Features, fake: Features, sets: list[ClassSets], seed: int, tick: Callable[[], object]
) -> dict[str, Any]:
    """metric -> value, interval and floor, at n images of each class."""
    values: list[dict[str, float]] = []
    floors: list[dict[str, float]] = []
    for i in range(REPEATS):
        a, b, f = split_draw(sets, np.random.default_rng([seed, 0, i]))
        values.append(feature_metrics(real[a], fake[f]))
        floors.append(feature_metrics(real[a], real[b]))
        tick()
    draws: list[dict[str, float]] = []
    for i in range(RESAMPLES):
        a, f = bootstrap_draw(sets, np.random.default_rng([seed, 1, i]))
        draws.append(feature_metrics(real[a], fake[f]))
        tick()
    report: dict[str, Any] = {"n": sum(one.n for one in sets)}
    for name in values[0]:
        value = float(np.mean([v[name] for v in values]))
        drawn = np.array([d[name] for d in draws])
        low, high = statistics.percentile_interval(drawn - drawn.mean() + value)
        if name in SHARES:
            low, high = max(low, 0.0), min(high, 1.0)
        floor = float(np.mean([v[name] for v in floors]))
        report[name] = {"value": value, "low": low, "high": high, "floor": floor}
    return report


# ---------------------------------------------------------------------------------------------------------------- CLI


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m eval.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--real", required=True, help="manifest of real images")
    parser.add_argument("--fake", required=True, help="manifest of synthetic images")
    parser.add_argument("--output", required=True, help="JSON file")
    parser.add_argument("--split", default="test", help="real rows to compare with, or 'all' (default: test)")
    parser.add_argument("--extractor", default=DEFAULT, help="this or a timm model (default: %(default)s)")
    parser.add_argument("--extractor_weights", help="local weights of that timm model, .safetensors or .pth")
    parser.add_argument("--cache_dir", default=default_cache(), help="cache of features (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of splits and resamples (default: 0)")
    parser.add_argument("--dry_run", action="store_true", help="check the input and measure nothing")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = _parser().parse_args(argv)
    every = read_split(args.real, None, synthetic=False)
    train = every.select(split="train")
    real = every if args.split == "all" else select_split(every, args.split)
    fake = read_split(args.fake, None, synthetic=True)
    sets, left_out = class_sets(real, fake, patients_of(every.rows))
    for label, one in left_out.items():
        print(f"warning: class {label} has too few images and is left out: {one}", file=sys.stderr)
    extractor = load_extractor(args.extractor, args.extractor_weights)
    if args.dry_run:
        print(f"{len(real.rows)} real and {len(fake.rows)} synthetic images, {len(sets)} classes: nothing measured")
        return
    of_real, of_fake = (features_of(rows, extractor, args.cache_dir) for rows in (real, fake))
    of_train = features_of(train, extractor, args.cache_dir) if train.rows else of_real[:0]
    nearest = tuple(nearest_rows(x, of_train) for x in (of_real, of_fake))
    groups = {"overall": list(sets.values())} | {label: [one] for label, one in sets.items()}
    results: dict[str, dict[str, Any]] = {}
    steps = len(sets) + len(groups) * (REPEATS + RESAMPLES)
    with tqdm(total=steps, desc="quality", unit="step", dynamic_ncols=True) as bar:
        similarity = ssim_report(real, fake, train, nearest, list(sets), args.seed, bar.update)
        for name, members in groups.items():
            results[name] = compare(of_real, of_fake, members, args.seed, bar.update) | {"ssim": similarity[name]}
    report = {
        "command": f"python -m eval.quality {shlex.join(sys.argv[1:] if argv is None else argv)}",
        "extractor": extractor.name,
        "resize": RESIZE,
        "split": args.split,
        "n": {"real": len(real.rows), "synthetic": len(fake.rows)},
        "classes": list(sets),
        "left_out": {label: str(one) for label, one in left_out.items()},
        "value": f"mean over {REPEATS} random sets of n images, equally many of a class on both sides",
        "floor": "the same between two sets of n real images without a common patient; of SSIM: 'random real'",
        "interval": f"95 %, {RESAMPLES} bootstrap resamples of patients, centred on the value; a synthetic image "
        "belongs to that of its map",
        "ssim": SSIM_VARIANT,
        "overall": results.pop("overall"),
        "per_class": results,
    }
    write_json(args.output, report)
    for name, result in {"overall": report["overall"], **results}.items():
        figures = {metric: entry for metric, entry in result.items() if metric not in ("n", "ssim")}
        text = ", ".join(f"{metric} {v['value']:.3g} (floor {v['floor']:.3g})" for metric, v in figures.items())
        print(f"{name} (n = {result['n']}): {text}")


if __name__ == "__main__":
    sys.exit(run(main))
