"""Which synthetic images are good enough? Each is scored, and kept unless it does worse than real images do.

    python -m eval.gate --real runs/data --fake runs/generated --output runs/generated/kept.jsonl
    python -m eval.classify --real runs/data --fake runs/generated/kept.jsonl --output report.json

Scores, each higher for better images:

    attributes   share of the row's attributes that the attribute net sees in the image
    mask         IoU of the requested mask with the nodule that the segmenter finds
    realism      how far inside the real images' neighbourhoods it lies; 1 is at the edge of one
    novelty      distance to the nearest training image, over that image's own to its nearest of another patient
    usefulness   how much the risk on real images would rise without it (MoSo)

An image is rejected where a score lies below the bound that `--quantile` of the real validation images miss, or below
`--min_<score>`. Judges that saw the validation images are refused; test images have no part in it. The manifest of
--fake stays as it is: OUTPUT lists what is kept, OUTPUT's name with `_rejected` the rest with reasons, and with `.json`
the bounds; rows carry their scores as `gate`.

`attributes` and `mask` are by the nets of --judges. Those in assets/judges know synthetic thyroid ultrasound only: for
other images train some with `python -m eval.attributes train` and `python -m eval.segment train`, or leave both out:
--scores realism novelty usefulness.
"""

import argparse
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.features import features_of, load_extractor
from eval.images import add_knowledge, load_images, load_masks, patients_of, read_split, require_column, select_split
from eval.judges import (
    load_attribute_net,
    load_segmenter,
    mask_iou,
    predict_attributes,
    refuse_strangers,
    refuse_taught,
    segment,
    trained_by,
)
from eval.leakage import refuse_leakage
from eval.metrics import K, distances, nearest, radii
from eval.quality import add_extractor
from tiger.errors import InputError, run
from tiger.files import atomic_path, write_json
from tiger.knowledge import Knowledge
from tiger.manifest import Manifest, Row, manifest_path, to_record

SCORES = ("attributes", "mask", "realism", "novelty", "usefulness")
NETS = {"attributes": "attributes", "mask": "segmenter"}  # score -> its net's folder in --judges
STEPS, RATE = 50, 0.5  # of the classifier whose course `usefulness` follows
TINY = 1e-12  # in place of a distance of 0

Values = NDArray[np.float64]  # (N,), nan where an image has no such score


# -------------------------------------------------------------------------------------------------------------- scores


def attribute_scores(folder: Path, rows: Manifest, knowledge: Knowledge) -> Values:
    """Share of each row's stated attributes that the net sees; nan where it states none that the net knows."""
    net = load_attribute_net(folder)
    seen = predict_attributes(net, load_images(rows, net.resolution))
    stated = [dict(row.attributes) or knowledge.parse(row.text).attributes for row in rows.rows]
    agree = [[s[name] == w[name] for name in s if name in w] for s, w in zip(seen, stated, strict=True)]
    return np.array([np.mean(of_row) if of_row else math.nan for of_row in agree])


def mask_scores(folder: Path, rows: Manifest) -> Values:
    """IoU of each row's mask with what the segmenter finds."""
    net = load_segmenter(folder)
    return mask_iou(segment(net, load_images(rows, net.resolution)), load_masks(rows, net.resolution))


def realism_scores(x: np.ndarray, train: np.ndarray, k: int = K) -> Values:
    """Kynkäänniemi et al. 2019, https://arxiv.org/abs/1904.06991, section 5: max over training images r of
    (distance of r to its k-th nearest training image) / (distance of r to x), (N, D) features.

    As there, the half of the training images with the wider neighbourhoods is left out: those are outliers, next to
    which anything looks real.
    """
    if len(train) <= k:
        raise InputError(f"realism needs more than {k} training images, found {len(train)}")
    train = np.asarray(train, np.float64)
    reach = radii(train, k)
    dense = reach <= np.median(reach)
    blocks = (np.maximum(distances(x[part], train[dense]), TINY) for part in parts(len(x)))
    return np.concatenate([(reach[dense] / block).max(1) for block in blocks])


def novelty_scores(x: np.ndarray, train: np.ndarray, patients: np.ndarray) -> Values:
    """Distance of each x to its nearest training image, over that image's distance to its nearest of another patient.

    Near 0: a copy. Real images of new patients are about 1, wherever in feature space they lie.
    """
    if len(set(patients.tolist())) < 2:
        raise InputError("novelty needs training images of at least two patients")
    train = np.asarray(train, np.float64)
    index, distance = nearest(x, train)
    typical = np.concatenate(
        [
            np.where(patients[part, None] == patients, np.inf, distances(train[part], train)).min(1)
            for part in parts(len(train))
        ]
    )
    return distance / np.maximum(typical[index], TINY)


def parts(count: int, size: int = 1024) -> list[slice]:
    """Rows 0 … count in turn, so that no distance matrix is held whole."""
    return [slice(start, start + size) for start in range(0, count, size)]


def usefulness_scores(
    x: np.ndarray, y: np.ndarray, training: np.ndarray, training_y: np.ndarray, is_real: np.ndarray
) -> Values:
    """Rise of the risk on real images if an image were left out of training: MoSo, to first order.

    Moving-one-Sample-out (Tan et al. 2023, https://arxiv.org/abs/2310.14664) is the change of the empirical risk when
    sample z leaves a training of N. A step of gradient descent moves the weights by −η times the mean of all ∇l.
    Without z the mean is over N − 1, so the step differs by

        Δ_t = −(η / N) (∇L_t − ∇l_t(z)),   L the mean loss without z.

    To first order in η, and with later steps taken as they were, a risk R changes by

        Σ_t ∇R_t · Δ_t = (η / N) Σ_t ∇R_t · (∇l_t(z) − ∇L_t).

    The paper takes R = L and drops the second term, which is the same for every z up to 1/N. Here R is the risk on the
    real images, which synthetic ones are to serve, and classes weigh alike: then N and L are those of z's class c, and
    the second term, of which there is one a class, stays. η / N_c is left out, and the mean over t returned. Positive:
    the image pulls more the way real images do than its class on average.

    The classifier is softmax regression on standardised features, trained by full gradient descent from zero on real
    and synthetic images together, classes balanced; there ∇l = (p − y) ⊗ [φ, 1] in closed form.

    Args:
        x, y: (N, D) features and (N,) class indices of the images to score.
        training, training_y, is_real: the same of all training images, and which of them are real, (M,) bool.
    """
    mean, spread = training[is_real].mean(0), training[is_real].std(0) + 1e-6
    width = math.sqrt(training.shape[1])

    def prepared(features: np.ndarray) -> np.ndarray:  # (N, D) -> (N, D + 1), rows of length about 1
        return np.concatenate([(features - mean) / spread / width, np.ones((len(features), 1))], axis=1)

    scored, inputs = prepared(x.astype(np.float64)), prepared(training.astype(np.float64))
    classes = int(max(training_y.max(), y.max())) + 1
    balanced, of_real = _balance(training_y), np.zeros(len(inputs))
    of_real[is_real] = _balance(training_y[is_real])
    counts = np.maximum(np.bincount(training_y, minlength=classes), 1)
    weights, total = np.zeros((inputs.shape[1], classes)), np.zeros(len(x))
    for _ in range(STEPS):
        errors = _errors(inputs @ weights, training_y)
        risk = inputs.T @ (errors * of_real[:, None])  # ∇R, (D + 1, classes)
        pull = ((inputs @ risk) * errors).sum(1)  # ∇R · ∇l of each training image
        of_class = np.bincount(training_y, pull, classes) / counts
        total += ((scored @ risk) * _errors(scored @ weights, y)).sum(1) - of_class[y]  # ∇R · (∇l(z) − ∇L_c)
        weights -= RATE * inputs.T @ (errors * balanced[:, None])
    return total / STEPS


def _balance(labels: np.ndarray) -> Values:
    """(N,) weights that add up to 1, equally much for every class there is."""
    counts = np.bincount(labels)
    return 1 / counts[labels] / np.count_nonzero(counts)


def _errors(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """∂(cross-entropy)/∂logits: softmax minus one-hot, (N, classes)."""
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True) - np.eye(logits.shape[1])[labels]


# ------------------------------------------------------------------------------------------------------- keep or reject


def reasons_of(scores: dict[str, float], bounds: dict[str, float]) -> list[str]:
    """Why an image is rejected; empty for one that is kept. An image without a score is not judged by it."""
    return [f"{name} {scores[name]:.3g} is below {bound:.3g}" for name, bound in bounds.items() if scores[name] < bound]


def best(scores: dict[str, Values], rows: list[int], most: int) -> list[int]:
    """Those `most` of `rows` with the best mean rank over the scores; one that has no such score counts as worst.

    Novelty has no say: it tells copies, and what is unlike any real image has the most of it.
    """
    judged = [values[rows] for name, values in scores.items() if name != "novelty"]
    ranks = [np.nan_to_num(values, nan=-np.inf).argsort().argsort() for values in judged]
    order = np.argsort(-np.sum(ranks, axis=0), kind="stable") if ranks else range(len(rows))
    return sorted(rows[i] for i in order[:most])


def write_gated(path: Path, rows: list[Row], notes: list[dict[str, Any]]) -> None:
    """A manifest whose rows carry their scores and reasons in a column of their own, which readers leave out."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row, note in zip(rows, notes, strict=True):
            file.write(json.dumps({**to_record(row), "gate": note}, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------------------------------------------------------- CLI


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m eval.gate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--real", required=True, help="manifest of real images; train and valid rows are used")
    parser.add_argument("--fake", required=True, help="manifest of generated images")
    parser.add_argument("--output", required=True, help="manifest to write, a .jsonl in the folder of --fake")
    parser.add_argument(
        "--scores", nargs="+", choices=SCORES, default=SCORES, metavar="SCORE", help="which to use (default: all)"
    )
    parser.add_argument(
        "--quantile", type=float, default=0.05, help="share of real images that each bound rejects (default: 0.05)"
    )
    for name in SCORES:
        parser.add_argument(f"--min_{name}", type=float, help=f"bound of {name} in place of the real images'")
    parser.add_argument("--most", type=int, help="keep no more than so many of a class, the best by mean rank")
    parser.add_argument("--judges", default="assets/judges", help="folder of the two nets (default: %(default)s)")
    add_knowledge(parser)
    add_extractor(parser)
    parser.add_argument("--dry_run", action="store_true", help="check the input and score nothing")
    return parser


def check_arguments(args: argparse.Namespace) -> Path:
    """The path to write. Raises InputError where the arguments make no sense together."""
    output, source = Path(args.output), manifest_path(args.fake)
    if output.suffix != ".jsonl" or output.resolve().parent != source.resolve().parent:
        raise InputError(f"--output {output}: its paths are relative to it; name a .jsonl file in {source.parent}")
    if output.resolve() == source.resolve():
        raise InputError(
            f"--output {output}: that is the manifest of --fake, which is never changed; give another name"
        )
    if not 0 <= args.quantile < 1:
        raise InputError(f"--quantile {args.quantile}: must lie in 0..1, below 1")
    if unused := [name for name in SCORES if name not in args.scores and getattr(args, f"min_{name}") is not None]:
        raise InputError(f"--min_{unused[0]}: {unused[0]} is not among --scores {' '.join(args.scores)}")
    if args.most is not None and args.most < 1:
        raise InputError(f"--most {args.most}: must be at least 1")
    return output


def check_judges(args: argparse.Namespace, fake: Manifest, train: Manifest, real: Manifest) -> list[str]:
    """What the nets leave unsaid of their training.

    Raises InputError where the rows lack what their scores need, and where they were trained on other images, or on the
    real ones that bounds are taken from.
    """
    judges = Path(args.judges)
    # The segmenter knows no words: whether it was taught on such images, the attribute net beside it tells.
    if "attributes" in args.scores or ("mask" in args.scores and (judges / "attributes").is_dir()):
        net, knowledge = load_attribute_net(judges / "attributes"), Knowledge.load(args.knowledge)
        refuse_strangers(judges, net, (fake, real), knowledge, ", or --scores realism novelty usefulness")
    if "mask" in args.scores:
        for rows in (fake, real):
            require_column(rows, "condition_fg")
    compared = Manifest(real.path, (*train.rows, *real.rows))
    return refuse_taught(compared, judges, [folder for name, folder in NETS.items() if name in args.scores])


def score(
    args: argparse.Namespace, train: Manifest, fake: Manifest, real: Manifest
) -> dict[str, tuple[Values, Values]]:
    """score -> (values of the fake images, values of the real ones)."""
    judges, knowledge = Path(args.judges), Knowledge.load(args.knowledge)
    of: dict[str, list[Values]] = {}
    if "attributes" in args.scores:
        of["attributes"] = [attribute_scores(judges / "attributes", rows, knowledge) for rows in (fake, real)]
    if "mask" in args.scores:
        of["mask"] = [mask_scores(judges / "segmenter", rows) for rows in (fake, real)]
    if {"realism", "novelty", "usefulness"}.intersection(args.scores):
        extractor = load_extractor(args.extractor, args.extractor_weights)
        reference, *both = (features_of(rows, extractor, args.cache_dir) for rows in (train, fake, real))
    if "realism" in args.scores:
        of["realism"] = [realism_scores(x, reference) for x in both]
    if "novelty" in args.scores:
        patients = np.array(list(patients_of(train.rows).values()))
        of["novelty"] = [novelty_scores(x, reference, patients) for x in both]
    if "usefulness" in args.scores:
        labels = [np.array([str(row.label) for row in rows.rows]) for rows in (train, fake, real)]
        classes, indices = np.unique(np.concatenate(labels), return_inverse=True)
        if "None" in classes:
            raise InputError("usefulness needs a label in every row; leave it out: --scores " + " ".join(SCORES[:-1]))
        of_train, of_fake, of_real = np.split(indices, np.cumsum([len(y) for y in labels[:-1]]))
        training, training_y = np.concatenate([reference, both[0]]), np.concatenate([of_train, of_fake])
        is_real = np.arange(len(training)) < len(reference)
        of["usefulness"] = [
            usefulness_scores(x, y, training, training_y, is_real)
            for x, y in zip(both, (of_fake, of_real), strict=True)
        ]
    return {name: (ours, theirs) for name, (ours, theirs) in of.items()}


def judge(scores: dict[str, Values], bounds: dict[str, float], labels: list[str], most: int | None) -> list[list[str]]:
    """For each image the reasons to reject it; none for those to keep."""
    reasons = [
        reasons_of({name: float(values[i]) for name, values in scores.items()}, bounds) for i in range(len(labels))
    ]
    if most is None:
        return reasons
    for label in dict.fromkeys(labels):
        passed = [i for i, why in enumerate(reasons) if labels[i] == label and not why]
        for i in set(passed).difference(best(scores, passed, most)):
            reasons[i] = [f"{most} of {label} have a better mean rank"]
    return reasons


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = _parser().parse_args(argv)
    output = check_arguments(args)
    every = read_split(args.real, None, synthetic=False, knowledge=args.knowledge)
    fake = read_split(args.fake, None, synthetic=True, knowledge=args.knowledge)
    unchecked = refuse_leakage(every, [fake]).unchecked
    train, real = select_split(every, "train"), select_split(every, "valid")
    unchecked += check_judges(args, fake, train, real)
    if args.dry_run:
        print(f"{len(fake.rows)} generated images, bounds from {len(real.rows)} real ones: fine; nothing scored")
        return
    scores = score(args, train, fake, real)
    given = {name: getattr(args, f"min_{name}") for name in scores}
    bounds = {
        name: float(np.nanquantile(theirs, args.quantile)) if given[name] is None else given[name]
        for name, (_, theirs) in scores.items()
    }
    labels = [str(row.label) for row in fake.rows]
    reasons = judge({name: ours for name, (ours, _) in scores.items()}, bounds, labels, args.most)
    if all(reasons):
        raise InputError(f"{fake.path}: no image passes; lower --quantile, or the bound of the score that rejects most")
    notes = [
        {
            "scores": {
                name: None if math.isnan(ours[i]) else round(float(ours[i]), 4) for name, (ours, _) in scores.items()
            }
        }
        | ({"reasons": why} if why else {})
        for i, why in enumerate(reasons)
    ]
    for path, kept in ((output.with_stem(f"{output.stem}_rejected"), False), (output, True)):
        chosen = [i for i, why in enumerate(reasons) if (not why) == kept]
        write_gated(path, [fake.rows[i] for i in chosen], [notes[i] for i in chosen])
    report = {
        "command": f"python -m eval.gate {shlex.join(sys.argv[1:] if argv is None else argv)}",
        "bounds": f"given, or what {args.quantile:.0%} of {len(real.rows)} real validation images miss",
        "unchecked": unchecked,
        "judges": {name: trained_by(Path(args.judges) / name) for name in NETS.values()},
        "scores": {
            name: {
                "median": float(np.nanmedian(ours)),
                "real_median": float(np.nanmedian(theirs)),
                "bound": bounds[name],
                "below": int((ours < bounds[name]).sum()),
            }
            for name, (ours, theirs) in scores.items()
        },
        "kept": {
            label: {
                "of": labels.count(label),
                "kept": sum(a == label and not b for a, b in zip(labels, reasons, strict=True)),
            }
            for label in dict.fromkeys(labels)
        },
    }
    write_json(output.with_suffix(".json"), report)
    for name, of in report["scores"].items():
        print(
            f"{name}: median {of['median']:.3g}, of real {of['real_median']:.3g}; {of['below']} below {of['bound']:.3g}"
        )
    print(f"{len([why for why in reasons if not why])} of {len(reasons)} kept: {output}")


if __name__ == "__main__":
    sys.exit(run(main))
