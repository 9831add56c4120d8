"""Does training on synthetic images help a classifier on real ones? All arms under identical conditions.

    python -m eval.classify --real runs/data --fake runs/generated --output runs/classify/report.json --seeds 0 1 2
    python -m eval.classify --real D --fake G --extra_real D2 --output R/report.json --weights resnet50.safetensors
    python -m eval.classify --real D --fake G --output R/report.json \
        --model resnet18 --image_size 64 --max_train_steps 400       # minutes on a CPU

Arms differ in nothing but the images that a batch is drawn from:
    none          the real training images, classes as frequent as they are
    oversampling  the real training images, every class equally often
    tiger_f       the same, with a fixed share of synthetic images within every class: were it larger in the rare ones,
                  looking synthetic would be a cue to the label
    real_upper    the same as oversampling, with as many further real images (--extra_real) as there are synthetic ones,
                  or all where there are fewer: what the best generator could give. Every image of a class is as likely,
                  so further ones fill a larger share of a rare class, where tiger_f's share is fixed
The state is selected on the split `valid`, the split `test` is looked at once. Finished (arm, seed) pairs are reused.
Scores of every test image are in `scores/` beside the report, so that every figure can be made again without training.
"""

import argparse
import csv
import hashlib
import json
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from eval import classifier, realism, statistics
from eval.classifier import MODELS, Recipe
from eval.images import load_images, name_rows
from eval.leakage import held_out, refuse_copies, refuse_leakage
from tiger import manifest as manifests
from tiger.errors import InputError, run
from tiger.files import atomic_path, read_json, write_json
from tiger.knowledge import Knowledge
from tiger.manifest import Manifest

ARMS = ("none", "oversampling", "tiger_f", "real_upper")
REAL, FAKE, EXTRA = 0, 1, 2  # where an image comes from


@dataclass(frozen=True)
class Data:
    """Everything that may be trained on, and the two real splits that are looked at."""

    classes: list[str]
    images: np.ndarray  # (N, S, S) uint8
    y: np.ndarray  # (N,) class index
    origin: np.ndarray  # (N,) REAL, FAKE or EXTRA
    valid: tuple[np.ndarray, np.ndarray] | None
    test: tuple[np.ndarray, np.ndarray]
    test_rows: Manifest


def load(args: argparse.Namespace, real: Manifest, fake: Manifest, extra: Manifest | None) -> Data:
    """Read and check all images. Classes are those of the real training rows."""
    splits = {split: real.select(split=split) for split in manifests.SPLITS}
    for split in ("train", "test"):
        if not splits[split].rows:
            raise InputError(f"{real.path}: no rows in split '{split}'; run `python -m data.prepare split`")
    unlabelled = [row.file_name for m in (real, fake, extra) if m is not None for row in m.rows if row.label is None]
    if unlabelled:
        raise InputError(f"rows without a label: {name_rows(unlabelled)}")
    present = {str(row.label) for row in splits["train"].rows}
    order = list(Knowledge.load(args.knowledge).subtypes)
    classes = sorted(present, key=lambda label: (order.index(label) if label in order else len(order), label))
    if len(classes) < 2:
        raise InputError(f"{real.path}: split 'train' has one class only ({classes[0]}); nothing to classify")
    tested, watched = ({str(row.label) for row in splits[split].rows} for split in ("test", "valid"))
    if tested != present or watched - present or len(watched) == 1:
        found = f"train has {sorted(present)}, valid {sorted(watched)}, test {sorted(tested)}"
        raise InputError(f"{real.path}: {found}; test needs the classes of train, valid two of them or no rows")
    fake = fake.select(labels=classes)
    pools = [splits["train"], fake]
    if extra is not None:
        pools.append(as_many(extra.select(labels=classes), fake))
    images = [load_images(pool, args.image_size) for pool in pools]
    checked = Manifest(real.path, tuple(held_out(real)))
    checked_images = load_images(checked, args.image_size)
    for pool, pool_images in zip(pools, images, strict=True):
        refuse_copies(pool, pool_images, checked, checked_images)

    def indices(m: Manifest) -> np.ndarray:
        return np.array([classes.index(str(row.label)) for row in m.rows], dtype=np.int64)

    in_test = np.array([row.split == "test" for row in checked.rows])
    y = indices(checked)
    return Data(
        classes=classes,
        images=np.concatenate(images),
        y=np.concatenate([indices(pool) for pool in pools]),
        origin=np.repeat(np.arange(len(pools)), [len(pool.rows) for pool in pools]),
        valid=(checked_images[~in_test], y[~in_test]) if not in_test.all() else None,
        test=(checked_images[in_test], y[in_test]),
        test_rows=splits["test"],
    )


def as_many(extra: Manifest, fake: Manifest) -> Manifest:
    """The rows of `extra`, of each class at most as many as `fake` has, drawn with a fixed seed."""
    wanted = Counter(row.label for row in fake.rows)
    order = np.random.default_rng(0).permutation(len(extra.rows))
    taken: Counter[str | None] = Counter()
    rows = []
    for row in (extra.rows[i] for i in order):
        if taken[row.label] < wanted[row.label]:
            taken[row.label] += 1
            rows.append(row)
    return Manifest(extra.path, tuple(rows))


def groups_of(arm: str, data: Data, share: float) -> list[tuple[float, np.ndarray]]:
    """The groups of rows an arm draws from, each with its share of a batch; the shares add up to 1."""
    real = data.origin == REAL
    if arm == "none":
        return [(1.0, np.flatnonzero(real))]
    groups = []
    for c, label in enumerate(data.classes):
        of_class = data.y == c
        if arm == "oversampling":
            parts = [(1.0, real)]
        elif arm == "tiger_f":
            parts = [(1 - share, real), (share, data.origin == FAKE)]
        else:
            parts = [(1.0, real | (data.origin == EXTRA))]
        for part, allowed in parts:
            rows = np.flatnonzero(of_class & allowed)
            if not len(rows):
                raise InputError(f"arm {arm}: no images of class {label} to draw from; generate some for every class")
            groups.append((part / len(data.classes), rows))
    return groups


def draw_batch(groups: Sequence[tuple[float, np.ndarray]], size: int, rng: np.random.Generator) -> np.ndarray:
    """Row indices of one batch: each group gets its share of the places to within one, its rows equally likely.

    Places are laid by systematic sampling, so that rounding favours no group over many batches.
    """
    edges = np.cumsum([share for share, _ in groups])
    places = (np.arange(size) + rng.random()) / size * edges[-1]
    rows = [groups[g][1] for g in np.minimum(np.searchsorted(edges, places, side="right"), len(groups) - 1)]
    return np.array([part[rng.integers(len(part))] for part in rows])


# ---------------------------------------------------------------------------------------------------- one (arm, seed)


def scores_of(arm: str, seed: int, data: Data, recipe: Recipe, args: argparse.Namespace) -> dict[str, Any]:
    """Train one arm with one seed and score the test images, or read the finished result of the same settings."""
    groups = groups_of(arm, data, args.synthetic_share)
    settings = recipe.settings() | {"arm": arm, "seed": seed, "data": digest(data, groups)}
    path = Path(args.output).parent / "scores" / f"{arm}-seed{seed}.json"
    if path.is_file():
        found = read_json(path)
        if found["settings"] == settings:
            return found
    net, notes = classifier.train(
        recipe,
        data.images,
        data.y,
        lambda rng: draw_batch(groups, recipe.train_batch_size, rng),
        data.valid,
        classes=len(data.classes),
        seed=seed,
        description=f"{arm}, seed {seed}",
    )
    probabilities = classifier.predict(net, data.test[0])
    result = {
        "settings": settings,
        **notes,
        "classes": data.classes,
        "file_name": [row.file_name for row in data.test_rows.rows],
        "probabilities": np.round(probabilities, 6).tolist(),
    }
    write_json(path, result)
    return result


def realism_of(real: Manifest, fake: Manifest, data: Data, recipe: Recipe, args: argparse.Namespace) -> dict[str, Any]:
    """Measure how well real and synthetic images are told apart, or read the finished result of the same settings."""
    recipe = replace(recipe, max_train_steps=args.realism_steps or max(1, recipe.max_train_steps // 2))
    classifier_of = {"model": recipe.model, "image_size": args.image_size, "max_train_steps": recipe.max_train_steps}
    settings = recipe.settings() | {"seed": args.seeds[0], "resamples": args.resamples}
    settings["data"] = digest(data, [(1.0, np.flatnonzero(data.origin == FAKE))])
    settings["sources"] = hashlib.sha256(repr([row.derived_from for row in fake.rows]).encode()).hexdigest()[:16]
    path = Path(args.output).parent / "scores" / "real_vs_synthetic.json"
    if path.is_file():
        found = read_json(path)
        if found["settings"] == settings:
            return classifier_of | found["result"]
    result = realism.measure(real, fake, held_out(real), recipe, args.image_size, args.seeds[0], args.resamples)
    write_json(path, {"settings": settings, "result": result})
    return classifier_of | result


def digest(data: Data, groups: Sequence[tuple[float, np.ndarray]]) -> str:
    """Changes with any image, label or mixing that this training or its test depends on."""
    hashed = hashlib.sha256(json.dumps([data.classes, data.images.shape[1:]]).encode())
    for share, rows in groups:
        hashed.update(f"{share:.9f}".encode() + data.images[rows].tobytes() + data.y[rows].tobytes())
    for images, y in filter(None, (data.valid, data.test)):
        hashed.update(images.tobytes() + y.tobytes())
    return hashed.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------ figures


Metric = Callable[[np.ndarray, np.ndarray], float]  # (N,) class indices, (N, classes) probabilities


def pair_auc(negative: int, positive: int) -> Metric:
    """AUC of one class against another, among the images of the two, by p_positive / (p_negative + p_positive)."""

    def metric(y: np.ndarray, p: np.ndarray) -> float:
        rows = (y == negative) | (y == positive)
        score = p[rows, positive] / np.maximum(p[rows, negative] + p[rows, positive], 1e-12)
        return statistics.auc(y[rows] == positive, score)

    return metric


def balanced_accuracy(y: np.ndarray, p: np.ndarray) -> float:
    """Mean recall of the classes, the most likely class being the answer."""
    right = p.argmax(1) == y
    return float(np.mean([right[y == c].mean() for c in np.unique(y)]))


def metrics_of(classes: list[str], negative: str) -> dict[str, Metric]:
    """Name -> metric: macro AUC, balanced accuracy, and the AUC of each class against `negative`."""
    metrics: dict[str, Metric] = {"macro_auc": classifier.macro_auc, "balanced_accuracy": balanced_accuracy}
    if negative in classes:
        n = classes.index(negative)
        metrics |= {f"auc {negative} vs {label}": pair_auc(n, c) for c, label in enumerate(classes) if c != n}
    return metrics


def over_seeds(metric: Metric) -> Metric:
    """The metric's mean over seeds; probabilities (N, seeds, classes)."""
    return lambda y, p: float(np.mean([metric(y, p[:, seed]) for seed in range(p.shape[1])]))


def summarise(
    results: dict[str, list[dict[str, Any]]], data: Data, args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """arm -> metric -> mean over seeds with its interval, each seed's value, and the difference to oversampling."""
    y, patients = data.test[1], [row.patient_id or row.file_name for row in data.test_rows.rows]
    stacked = {arm: np.stack([run["probabilities"] for run in runs], 1) for arm, runs in results.items()}
    report: dict[str, dict[str, Any]] = {}
    for arm, p in stacked.items():  # (N, seeds, classes)
        report[arm] = {"n_test": len(y), "seeds": args.seeds}
        report[arm]["selected_steps"] = [run["selected_step"] for run in results[arm]]
        report[arm]["images_per_second"] = [run["images_per_second"] for run in results[arm]]
        for name, metric in metrics_of(data.classes, args.negative).items():
            mean = over_seeds(metric)
            value, low, high = statistics.cluster_bootstrap_ci(mean, y, p, patients, args.resamples, 0)
            entry: dict[str, Any] = {"value": value, "low": low, "high": high}
            entry["per_seed"] = [metric(y, p[:, seed]) for seed in range(p.shape[1])]
            if "oversampling" in stacked and arm != "oversampling":
                entry["minus_oversampling"] = difference(mean, y, p, stacked["oversampling"], patients, args.resamples)
            report[arm][name] = entry
    return report


def difference(
    metric: Metric, y: np.ndarray, p: np.ndarray, baseline: np.ndarray, patients: Sequence[str], resamples: int
) -> dict[str, float]:
    """metric(p) - metric(baseline) on the same patients, with a paired bootstrap interval."""
    both = np.stack([p, baseline], axis=1)  # (N, 2, seeds, classes)
    value, low, high = statistics.cluster_bootstrap_ci(
        lambda y, s: metric(y, s[:, 0]) - metric(y, s[:, 1]), y, both, patients, resamples, 0
    )
    return {"value": value, "low": low, "high": high}


def write_scores(path: Path, results: dict[str, list[dict[str, Any]]], data: Data) -> None:
    """One CSV with the probabilities of every test image by every arm and seed."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "seed", "file_name", "patient_id", "label", *(f"p_{label}" for label in data.classes)])
        for arm, runs in results.items():
            for result in runs:
                for row, p in zip(data.test_rows.rows, result["probabilities"], strict=True):
                    writer.writerow([arm, result["settings"]["seed"], row.file_name, row.patient_id, row.label, *p])


def counts(data: Data) -> dict[str, dict[str, int]]:
    """Images of each class in each pool and split."""
    pools = {"train": data.y[data.origin == REAL], "synthetic": data.y[data.origin == FAKE]}
    pools |= {"extra_real": data.y[data.origin == EXTRA], "test": data.test[1]}
    if data.valid is not None:
        pools["valid"] = data.valid[1]
    return {name: {label: int((y == c).sum()) for c, label in enumerate(data.classes)} for name, y in pools.items()}


# ---------------------------------------------------------------------------------------------------------------- CLI


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m eval.classify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def add(name: str, help: str, **options: Any) -> None:
        default = options.get("default")
        parser.add_argument(name, help=help if default is None else f"{help} (default: {default})", **options)

    recipe = Recipe()
    add("--real", "manifest of real images with splits train, valid, test", required=True)
    add("--fake", "manifest of synthetic images", required=True)
    add("--extra_real", "manifest of further real images, for the arm real_upper")
    add("--output", "report, JSON; scores/ and scores.csv are written beside it", required=True)
    add("--arms", "arms to run; without it all for which there is data", nargs="+", choices=ARMS)
    add("--seeds", "one training an arm and seed", nargs="+", type=int, default=[0])
    add("--model", "torchvision model", choices=MODELS, default=recipe.model)
    add("--weights", "local ImageNet checkpoint of the model; without it from scratch")
    add("--image_size", "px", type=int, default=128)
    add("--max_train_steps", "optimizer steps, the same in every arm", type=int, default=recipe.max_train_steps)
    add("--train_batch_size", "images", type=int, default=recipe.train_batch_size)
    add("--learning_rate", "peak; warm-up, then cosine to 0", type=float, default=recipe.learning_rate)
    add("--synthetic_share", "share of synthetic images within every class, 0 to 1", type=float, default=0.25)
    add(
        "--realism_steps",
        "optimizer steps of the real-versus-synthetic classifier; default: half of the others",
        type=int,
    )
    add("--negative", "the class that the others are set against", default="benign")
    add("--knowledge", "knowledge base, for the order of the classes", default="thyroid")
    add("--resamples", "bootstrap resamples", type=int, default=1000)
    parser.add_argument("--no_realism", action="store_true", help="leave out the real-versus-synthetic classifier")
    parser.add_argument("--dry_run", action="store_true", help="check everything and train nothing")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = _parser().parse_args(argv)
    arms = args.arms or [arm for arm in ARMS if arm != "real_upper" or args.extra_real]
    if "real_upper" in arms and not args.extra_real:
        raise InputError("arm real_upper: needs further real images; give their manifest as --extra_real")
    if not 0 <= args.synthetic_share < 1:
        raise InputError(f"--synthetic_share {args.synthetic_share}: must be at least 0 and below 1")
    recipe = Recipe(args.model, args.weights, args.max_train_steps, args.train_batch_size, args.learning_rate)
    knowledge = Knowledge.load(args.knowledge)
    real, fake = manifests.read(args.real, knowledge), manifests.read(args.fake, knowledge)
    extra = manifests.read(args.extra_real, knowledge).select(split="train") if args.extra_real else None
    refuse_leakage(real, fake, extra)
    data = load(args, real, fake, extra)
    for arm in arms:
        groups_of(arm, data, args.synthetic_share)
    if args.dry_run:
        print(f"{json.dumps(counts(data))}: fine; arms {', '.join(arms)}; nothing trained")
        return
    results = {arm: [scores_of(arm, seed, data, recipe, args) for seed in args.seeds] for arm in arms}
    write_scores(Path(args.output).parent / "scores.csv", results, data)
    report: dict[str, Any] = {
        "command": f"python -m eval.classify {shlex.join(sys.argv[1:] if argv is None else argv)}",
        "settings": recipe.settings() | {"image_size": args.image_size, "synthetic_share": args.synthetic_share},
        "interval": f"95 %, bootstrap over the patients of the test split, {args.resamples} resamples",
        "selection": "valid macro AUC" if data.valid is not None else "last step: there is no split 'valid'",
        "n": counts(data),
        "patients_test": len({row.patient_id or row.file_name for row in data.test_rows.rows}),
        "arms": summarise(results, data, args),
    }
    if not args.no_realism:
        report["real_vs_synthetic"] = realism_of(real, fake.select(labels=data.classes), data, recipe, args)
    write_json(args.output, report)
    for arm, entry in report["arms"].items():
        figures = {name: value for name, value in entry.items() if isinstance(value, dict)}
        print(
            f"{arm}: "
            + ", ".join(f"{k} {v['value']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for k, v in figures.items())
        )


if __name__ == "__main__":
    sys.exit(run(main))
