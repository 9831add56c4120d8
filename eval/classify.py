"""Does training on synthetic images help a classifier on real ones? All arms under identical conditions.

    python -m eval.classify --real runs/data --fake runs/generated --output runs/classify/report.json --seeds 0,1,2
    python -m eval.classify --real D --fake tiger_f=G sd=G2 --extra_real E --output R/report.json --weights resnet50.pth
    python -m eval.classify --real D --fake G --output R/report.json \
        --model resnet18 --image_size 64 --max_train_steps 400       # minutes on a CPU
    python -m eval.classify --real D/fold{fold}.jsonl --fake runs/fold{fold}/generated --folds 5 --output R/report.json

Arms differ in nothing but the images that a batch is drawn from and what is done to them:
    none          the real training images, classes as frequent as they are
    oversampling  the real training images, every class equally often: the baseline, and the sampler of all that follow
    basic, mixup, cutmix, erasing, features
                  oversampling with this augmentation on top (eval/arms.py)
    NAME          the same with the synthetic images given as --fake NAME=DIR; a bare --fake DIR is tiger_f
    real_upper    the same with further real images (--extra_real), as many as there are synthetic ones, or all where
                  there are fewer: what the best generator could give. Every image of a class is as likely, so further
                  ones fill a larger share of a rare class, where that of synthetic ones is fixed

Policies for synthetic images: `share`, a fixed share within every class of each batch: were it larger in the rare ones,
looking synthetic would be a cue to the label; `rare`, the rare classes only; `pooled`, real and synthetic images in one
pool; `pretrain`, synthetic images for the first half of the steps, real ones for the rest.

States, shares (--share auto) and thresholds are chosen on the split `valid`; the split `test` is looked at once. Each
training leaves its scores in `scores/` beside the report. The same command again goes on, and trains nothing where all
is done. With --shard k/n it makes the k-th of n parts of the work; whoever finds all done writes the report.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eval import figures, runs
from eval.arms import AUGMENTATIONS, PLAIN, POLICIES, UPPER
from eval.classifier import MODELS, Recipe
from eval.runs import SHARES, Study
from eval.sources import (
    Test,
    c2st,
    c2st_settings,
    looks,
    mean_of_folds,
    rare_classes,
    read_sources,
    synthetic_sets,
)
from eval.study import ALL, Data, Sources, Trial, classes_of, counts, load, trials
from tiger.errors import InputError
from tiger.errors import run as run_main
from tiger.files import read_json, write_json
from tiger.knowledge import Knowledge


def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A type of argparse: "0,1,2" -> [0, 1, 2]."""

    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",") if part]

    parse.__name__ = f"list of {kind.__name__}"
    return parse


def share_of(text: str) -> tuple[float, ...]:
    """A share, or SHARES for "auto"."""
    return SHARES if text == "auto" else (float(text),)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m eval.classify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def add(*names: str, help: str, **options: Any) -> None:
        default = options.get("default")
        parser.add_argument(*names, help=help if default is None else f"{help} (default: {default})", **options)

    recipe = Recipe()
    add("--real", help="manifest of real images with splits train, valid, test", required=True)
    add("--fake", help="manifests of synthetic images, each NAME=DIR, or DIR for tiger_f", nargs="+", default=[])
    add("--extra_real", help="manifest of further real images, for the arm real_upper")
    add("--output", help="report, JSON; scores/ and scores.csv are written beside it", required=True)
    arms = f"{', '.join((*PLAIN, UPPER))}, or names of --fake"
    add(
        "--arms",
        help=f"arms to run: {arms}; without it all for which there is data, less {', '.join(AUGMENTATIONS)}",
        nargs="+",
    )
    add("--tasks", help=f"'{ALL}', one net for all classes, and classes that get a net of their own against --negative",
        nargs="+", default=[ALL])  # fmt: skip
    add("--seeds", help="one training an arm and seed", nargs="+", type=listed(int), default="0")
    add("--folds", help="folds by patient in place of the splits; {fold} in a path is the fold's number", type=int)
    add("--amounts", help="synthetic images a class; without it all there are", nargs="+", type=listed(int))
    add("--real_share", help="share of the real training patients of each class", nargs="+", type=listed(float),
        default="1")  # fmt: skip
    add("--policy", help="how synthetic images are mixed in", choices=POLICIES, default="share")
    add("--share", "--synthetic_share", dest="share", help="share of synthetic images within a class, 0 to 1; 'auto' "
        f"chooses from {SHARES} on valid", type=share_of, default="0.25")  # fmt: skip
    add(
        "--rare",
        help="the rare classes; without it those with fewer than a quarter of the largest one's images",
        nargs="+",
    )
    add("--model", help="torchvision model", choices=MODELS, default=recipe.model)
    add("--weights", help="local checkpoint of the model (.safetensors, .pth); without it from scratch")
    add("--image_size", help="px", type=int, default=128)
    add("--max_train_steps", help="optimizer steps, the same in every arm", type=int, default=recipe.max_train_steps)
    add("--train_batch_size", help="images", type=int, default=recipe.train_batch_size)
    add("--learning_rate", help="peak; warm-up, then cosine to 0", type=float, default=recipe.learning_rate)
    add(
        "--realism_steps",
        help="optimizer steps of the real-versus-synthetic classifier; default: half of the others",
        type=int,
    )
    add("--negative", help="the class that the others are set against", default="benign")
    add("--knowledge", help="knowledge base, for the order of the classes", default="thyroid")
    add("--resamples", help="bootstrap resamples", type=int, default=1000)
    add("--shard", help="k/n makes the k-th of n parts, k = 0 … n-1", default="0/1")
    parser.add_argument("--bf16", action="store_true", help="train in mixed precision, on a GPU")
    parser.add_argument("--save_models", action="store_true", help="keep each classifier in models/ beside the report")
    parser.add_argument("--no_realism", action="store_true", help="leave out the real-versus-synthetic classifier")
    parser.add_argument("--dry_run", action="store_true", help="check everything and train nothing")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags, lists flattened and checked against each other."""
    args = _parser().parse_args(argv)
    for name in ("seeds", "real_share", "amounts"):
        words = getattr(args, name) or []  # a list for each word, or the default's list
        values = [value for word in words for value in (word if isinstance(word, list) else [word])]
        setattr(args, name, list(dict.fromkeys(values)))
    sets = synthetic_sets(args.fake)
    args.arms = args.arms or ["none", "oversampling", *sets, *([UPPER] if args.extra_real else [])]
    if unknown := set(args.arms) - {*PLAIN, UPPER, *sets}:
        known = ", ".join((*PLAIN, *sets, UPPER))
        raise InputError(
            f"--arms {' '.join(sorted(unknown))}: no such arm; there are {known} (give sets as --fake NAME=DIR)"
        )
    if UPPER in args.arms and not args.extra_real:
        raise InputError("arm real_upper: needs further real images; give their manifest as --extra_real")
    if not all(0 <= share < 1 for share in args.share):
        raise InputError(f"--share {args.share[0]}: must be at least 0 and below 1")
    if not all(0 < share <= 1 for share in args.real_share):
        raise InputError(f"--real_share {args.real_share}: must be above 0 and at most 1")
    if min(args.amounts, default=1) < 1:
        raise InputError(f"--amounts {args.amounts}: must be 1 or more images a class; the arm oversampling has none")
    if args.folds is not None and args.folds < 1:
        raise InputError(f"--folds {args.folds}: must be 1 or more; leave it out to use the splits")
    if not (args.seeds and args.real_share):
        raise InputError("--seeds and --real_share: give at least one value each")
    return args


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse(argv)
    shard = runs.parse_shard(args.shard)
    recipe = Recipe(
        args.model, args.weights, args.max_train_steps, args.train_batch_size, args.learning_rate, bf16=args.bf16
    )
    folds: list[int | None] = [None] if args.folds is None else list(range(args.folds))
    sources = {fold: read_sources(args, fold) for fold in folds}  # every fold is checked before the first training
    classes = check_classes(args, sources)
    study = Study(
        folder=Path(args.output).parent,
        recipe=recipe,
        image_size=args.image_size,
        policy=args.policy,
        shares=args.share,
        rare=rare_classes(args, sources[folds[0]].real, classes),
        negative=args.negative,
        save_models=args.save_models,
    )
    work = list(trials(args.arms, args.tasks, args.seeds, folds, args.amounts or [None], args.real_share))
    first, tests = train(args, study, work, sources, classes, shard)
    if args.dry_run:
        print(f"{json.dumps(counts(first))}: fine; {len(work)} trainings of {', '.join(args.arms)}; nothing trained")
        return

    def told_apart(test: Test) -> dict[str, Any]:
        return c2st(args, study, sources[test[1]], classes, test, tests[test])

    for test in list(tests)[shard[0] :: shard[1]]:
        told_apart(test)
    if left := [trial.name for trial in work if not study.is_done(trial)]:
        print(f"{len(left)} of {len(work)} trainings are not there yet, such as {left[0]}; the report waits for them")
        return
    names = dict.fromkeys(name for name, _ in tests)
    real_vs = {name: mean_of_folds([told_apart(test) for test in tests if test[0] == name]) for name in names}
    command = f"python -m eval.classify {shlex.join(sys.argv[1:] if argv is None else argv)}"
    report = report_of(args, study, work, first, real_vs)
    write_json(args.output, {"command": command} | report)
    for arm, entry in report["arms"].items():
        shown = {name: entry[name] for name in entry if name.startswith(("auc ", "macro_auc"))}
        print(
            f"{arm}: " + ", ".join(f"{k} {v['value']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for k, v in shown.items())
        )


def train(
    args: argparse.Namespace,
    study: Study,
    work: Sequence[Trial],
    sources: dict[int | None, Sources],
    classes: list[str],
    shard: tuple[int, int],
) -> tuple[Data, dict[Test, dict[str, Any]]]:
    """Make what this shard lacks of the work, one fold after the other.

    Returns the images of the first fold, and the settings of every test of real against synthetic images.
    """
    first: Data | None = None
    tests: dict[Test, dict[str, Any]] = {}
    for fold, of_fold in sources.items():
        data = load(of_fold, classes, study.image_size)
        first = first or data
        mine = [trial for trial in work if trial.fold == fold]
        settings = runs.refuse_changes(study, mine, data)
        for trial in [] if args.dry_run else mine[shard[0] :: shard[1]]:
            if not study.is_done(trial):
                runs.run(study, trial, data, settings[trial])
        for name in of_fold.fakes:
            if name in args.arms and not args.no_realism:
                tests[name, fold] = c2st_settings(args, study, of_fold, data, name)
    assert first is not None
    return first, tests


def check_classes(args: argparse.Namespace, sources: dict[int | None, Sources]) -> list[str]:
    """The classes, which must be the same in every fold and hold those that flags name."""
    order = list(Knowledge.load(args.knowledge).subtypes)
    found = [classes_of(of.real, order) for of in sources.values()]
    if any(classes != found[0] for classes in found):
        raise InputError(f"{args.real}: the folds' training rows differ in their classes: {found}")
    if len(args.share) > 1 and not all(of.real.select(split="valid").rows for of in sources.values()):
        raise InputError(f"--share auto: {args.real} has no split 'valid' to choose on; give a share")
    for task in args.tasks:
        if task != ALL and (task not in found[0] or task == args.negative or args.negative not in found[0]):
            raise InputError(f"--tasks {task} against --negative {args.negative}: must be two of {', '.join(found[0])}")
    return found[0]


def report_of(
    args: argparse.Namespace, study: Study, work: Sequence[Trial], data: Data, real_vs: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The report, from saved scores, and scores.csv."""
    saved = [read_json(study.path(trial)) for trial in work]
    runs.write_table(study.folder / "scores.csv", saved)
    found = [figures.read_run(one) for one in saved]
    patients = {(run.fold, patient) for run in found for patient in run.test.patients}
    settings = study.recipe.settings() | {"image_size": study.image_size, "policy": study.policy, "share": study.shares}
    settings |= {"rare": study.rare, "negative": study.negative, "folds": args.folds, "seeds": args.seeds}
    drawn_from = "the patients of the test split and over training seeds"
    return {
        "settings": settings | {"resamples": args.resamples, "tasks": args.tasks},
        "interval": f"95 %, bootstrap over {drawn_from}, {args.resamples} resamples",
        "selection": "valid macro AUC" if data.valid is not None else "last step: there is no split 'valid'",
        "threshold": "Youden's index on valid" if data.valid is not None else "0.5: there is no split 'valid'",
        "n": counts(data),
        "patients_test": len(patients),
        "runs": [trial.name for trial in work],
        **figures.summarise(found, args.negative, args.resamples),
        "real_vs_synthetic": {name: one | {"text": looks(name, one, study, data)} for name, one in real_vs.items()},
    }


if __name__ == "__main__":
    sys.exit(run_main(main))
