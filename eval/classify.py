r"""Does training on synthetic images help a classifier on real ones? All arms under identical conditions.

    python -m eval.classify --real runs/data --fake runs/generated --output runs/classify/report.json --seeds 0,1,2
    python -m eval.classify --real D --fake tiger_f=G sd=G2 --extra_real E --output R/report.json --weights resnet50.pth
    python -m eval.classify --real D --fake G --output R/report.json \
        --model resnet18 --image_size 64 --max_train_steps 400       # minutes on a CPU
    python -m eval.classify --real D/fold{fold}.jsonl --fake runs/fold{fold}/generated --folds 5 --output R/report.json

Arms differ in nothing but the images that a batch is drawn from and what is done to them; eval/arms.py has them, and
the policies by which synthetic images are mixed in. With --share auto an arm of synthetic images is trained once for
each share, any other once.

States, shares (--share auto) and thresholds are chosen on the split `valid`; the split `test` is looked at once. Each
training leaves its scores in `scores/` beside the report, and the table of a report R/NAME.json's is R/NAME_scores.csv,
from which `eval.tables` makes every table and plot. The same command again goes on, and trains nothing where all is
done. With --shard k/n it makes the k-th of n parts of the work; whoever finds all done writes the report.

--real_share changes what the classifier sees, while the generator saw what it saw. For fewer images there too, train
both on what `python -m data.prepare subsample` leaves.
"""

import argparse
import functools
import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from eval import arms, figures, runs
from eval.arms import AUGMENTATIONS, PLAIN, POLICIES, UPPER
from eval.classifier import MODELS, Recipe
from eval.images import refuse_below, refuse_learning_rate
from eval.leakage import said, unknown_weights
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
from eval.study import (
    ALL,
    NEGATIVE,
    RESAMPLES,
    Data,
    Sources,
    Trial,
    classes_of,
    counts,
    images_kept,
    load,
    trials,
)
from tiger.errors import InputError, name_rows
from tiger.errors import run as run_main
from tiger.files import read_json, write_json
from tiger.knowledge import Knowledge

Sizes = dict[str, int]  # class -> images


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
        description=f"{__doc__}\n{arms.__doc__}",
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
    add("--output", help="report, JSON; scores/ and NAME_scores.csv are written beside it", required=True)
    every = f"{', '.join((*PLAIN, UPPER))}, or names of --fake"
    add(
        "--arms",
        help=f"arms to run: {every}; without it all for which there is data, less {', '.join(AUGMENTATIONS)}",
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
    add("--share", help=f"share of synthetic images within a class, 0 to 1; 'auto' chooses from {SHARES} on valid",
        type=share_of, default="0.25")  # fmt: skip
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
    add("--negative", help="the class that the others are set against", default=NEGATIVE)
    add("--knowledge", help="knowledge base, for the order of the classes", default="thyroid")
    add("--resamples", help="bootstrap resamples", type=int, default=RESAMPLES)
    add("--shard", help="k/n makes the k-th of n parts, k = 0 … n-1", default="0/1")
    parser.add_argument("--bf16", action="store_true", help="train in mixed precision, on a GPU")
    parser.add_argument("--save_models", action="store_true", help="keep each classifier in models/ beside the report")
    parser.add_argument("--no_realism", action="store_true", help="leave out the real-versus-synthetic classifier")
    parser.add_argument("--dry_run", action="store_true", help="check everything and train nothing")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags, lists flattened and checked against each other."""
    args = _parser().parse_args(argv)
    for name in ("arms", "tasks", "rare", "seeds", "real_share", "amounts"):
        words = getattr(args, name) or []  # each a value or a list of them
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
    refuse_below(args, image_size=8, max_train_steps=1, train_batch_size=1, realism_steps=1, resamples=2)
    refuse_learning_rate(args.learning_rate)
    if min(args.seeds, default=0) < 0:
        raise InputError(f"--seeds {args.seeds}: must be 0 or more")
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
    refuse_tested_twice(sources)

    @functools.lru_cache(maxsize=1)  # the images of one fold at a time
    def data_of(fold: int | None) -> Data:
        return load(sources[fold], classes, args.image_size)

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
    checked = check(args, study, work, sources, data_of)
    if args.dry_run:
        print(f"{json.dumps(checked.n)}: fine; {len(work)} trainings of {', '.join(args.arms)}; nothing trained")
        return
    for trial in work[shard[0] :: shard[1]]:
        if not study.is_done(trial):
            runs.run(study, trial, data_of(trial.fold), checked.settings[trial])

    def told_apart(test: Test) -> dict[str, Any]:
        return c2st(args, study, sources[test[1]], classes, test, checked.tests[test])

    for test in list(checked.tests)[shard[0] :: shard[1]]:
        told_apart(test)
    if left := [trial.name for trial in work if not study.is_done(trial)]:
        print(f"{len(left)} of {len(work)} trainings are not there yet, such as {left[0]}; the report waits for them")
        return
    names = dict.fromkeys(name for name, _ in checked.tests)
    real_vs = {name: mean_of_folds([told_apart(test) for test in checked.tests if test[0] == name]) for name in names}
    command = f"python -m eval.classify {shlex.join(sys.argv[1:] if argv is None else argv)}"
    report = report_of(args, study, work, checked, data_of(folds[0]), real_vs)
    write_json(args.output, {"command": command} | report)
    for arm, entry in report["arms"].items():
        shown = {name: entry[name] for name in entry if name.startswith(("auc ", "macro_auc"))}
        print(
            f"{arm}: " + ", ".join(f"{k} {v['value']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for k, v in shown.items())
        )


@dataclass(frozen=True)
class Checked:
    """What a look at every fold has found, before anything is trained."""

    settings: dict[Trial, dict[str, Any]]
    tests: dict[Test, dict[str, Any]]  # settings of every test of real against synthetic images
    n: dict[str, Sizes]  # source or split -> its images: of `test` in all folds, of the others their mean
    kept: dict[Trial, dict[str, Sizes]]  # `images_kept` of each trial
    unchecked: list[str]  # what could not be checked for leaks, a sentence each


def check(
    args: argparse.Namespace,
    study: Study,
    work: Sequence[Trial],
    sources: dict[int | None, Sources],
    data_of: Callable[[int | None], Data],
) -> Checked:
    """Whether all of the work can be made, one fold after the other. Raises InputError where some cannot."""
    settings: dict[Trial, dict[str, Any]] = {}
    tests: dict[Test, dict[str, Any]] = {}
    sizes: list[dict[str, Sizes]] = []
    kept: dict[Trial, dict[str, Sizes]] = {}
    for fold, of_fold in sources.items():
        data = data_of(fold)
        mine = [trial for trial in work if trial.fold == fold]
        settings |= runs.refuse_changes(study, mine, data)
        for name in of_fold.fakes:
            if name in args.arms and not args.no_realism:
                tests[name, fold] = c2st_settings(args, study, of_fold, data, name)
        sizes.append(counts(data))
        kept |= {trial: images_kept(trial, data, args.negative) for trial in mine}
    tested = {label: sum(fold["test"][label] for fold in sizes) for label in sizes[0]["test"]}
    warn_of_unequal(work, {condition: of["added"] for condition, of in kept_by_condition(kept).items()})
    unchecked = dict.fromkeys(text for of_fold in sources.values() for text in of_fold.unchecked)
    told = [*unchecked, *unknown_weights(args.weights), *seen_by_generators(args)]
    return Checked(settings, tests, mean_sizes(sizes) | {"test": tested}, kept, told)


def kept_by_condition(kept: dict[Trial, dict[str, Sizes]]) -> dict[str, dict[str, Sizes]]:
    """condition -> `images_kept`, the mean of seeds, folds and tasks."""
    found: defaultdict[str, list[dict[str, Sizes]]] = defaultdict(list)
    for trial, sizes in kept.items():
        found[trial.condition].append(sizes)
    return {condition: mean_sizes(of) for condition, of in found.items()}


def seen_by_generators(args: argparse.Namespace) -> list[str]:
    """What a share of the real images leaves unsaid, on stderr too; nothing where no arm has synthetic ones."""
    shares = [share for share in args.real_share if share < 1]
    sets = [name for name in synthetic_sets(args.fake) if name in args.arms]
    if not shares or not sets:
        return []
    text = (
        f"--real_share {', '.join(f'{share:.4g}' for share in shares)} leaves out real training patients of the "
        f"classifier alone: the generators of {', '.join(sets)} may have seen them, so that these arms have more than "
        "that share; for fewer there too, train both on what python -m data.prepare subsample leaves"
    )
    return said([text])


def mean_sizes(found: Sequence[dict[str, Sizes]]) -> dict[str, Sizes]:
    """Images of each name and class, the mean of what was found in each fold, or each trial that has the class."""
    sizes: defaultdict[str, defaultdict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for one in found:
        for name, of_name in one.items():
            for label, count in of_name.items():
                sizes[name][label].append(count)
    return {name: {label: round(fmean(of)) for label, of in labels.items()} for name, labels in sizes.items()}


def warn_of_unequal(work: Sequence[Trial], added_by: dict[str, Sizes]) -> None:
    """Say on stderr where arms that are compared add different numbers of images because no amount was given."""
    adding = {trial.arm: added_by[trial.condition] for trial in work if trial.arm not in PLAIN and trial.amount is None}
    if any(sizes != next(iter(adding.values())) for sizes in adding.values()):
        each = "; ".join(f"{arm} {', '.join(f'{label} {n}' for label, n in of.items())}" for arm, of in adding.items())
        print(f"warning: arms add different numbers of images, see --amounts: {each}", file=sys.stderr)


def check_classes(args: argparse.Namespace, sources: dict[int | None, Sources]) -> list[str]:
    """The classes, which must be the same in every fold and hold those that flags name."""
    order = list(Knowledge.load(args.knowledge).subtypes)
    found = [classes_of(of.real, order) for of in sources.values()]
    if any(classes != found[0] for classes in found):
        raise InputError(f"{args.real}: the folds' training rows differ in their classes: {found}")
    if args.negative not in (*found[0], NEGATIVE):
        raise InputError(f"--negative {args.negative}: no such class in {args.real} ({', '.join(found[0])})")
    for task in args.tasks:
        if task != ALL and (task not in found[0] or task == args.negative or args.negative not in found[0]):
            raise InputError(f"--tasks {task} against --negative {args.negative}: must be two of {', '.join(found[0])}")
    return found[0]


def refuse_tested_twice(sources: dict[int | None, Sources]) -> None:
    """Raise InputError where folds have a test patient in common: intervals take their tests to be independent."""
    tested: dict[str, int | None] = {}
    for fold, of_fold in sources.items():
        test = of_fold.real.select(split="test")
        patients = {row.patient_id or str((test.root / row.file_name).resolve()) for row in test.rows}
        if twice := sorted(patient for patient in patients if patient in tested):
            path = of_fold.real.path
            raise InputError(
                f"{path}: patients in the test of fold {fold} and of fold {tested[twice[0]]} too: {name_rows(twice)}; "
                "test each in one fold"
            )
        tested |= dict.fromkeys(patients, fold)


def report_of(
    args: argparse.Namespace,
    study: Study,
    work: Sequence[Trial],
    checked: Checked,
    data: Data,
    real_vs: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """The report, from saved scores, and their table beside it."""
    real = {trial: sum(checked.kept[trial]["real"].values()) for trial in work}
    saved = [read_json(study.path(trial)) | {"real_images": real[trial]} for trial in work]
    runs.write_table(runs.table_of(args.output), saved)
    found = [figures.read_run(one) for one in saved]
    patients = {(run.fold, patient) for run in found for patient in run.test.patients}
    settings = study.recipe.settings() | {"image_size": study.image_size, "policy": study.policy, "share": study.shares}
    settings |= {"rare": study.rare, "negative": study.negative, "folds": args.folds, "seeds": args.seeds}
    summary = figures.summarise(found, args.negative, args.resamples)
    for condition, sizes in kept_by_condition(checked.kept).items():
        summary["arms"][condition] |= sizes
    interval = f"95 %, {args.resamples} bootstrap resamples of the patients of the test split"
    if len(args.seeds) > 1:
        interval += "; their variance and that over training seeds, by Student's t"
    youden = "Youden's index on valid (0.5 for a task of which valid lacks a class)"
    return {
        "settings": settings | {"resamples": args.resamples, "tasks": args.tasks},
        "interval": interval,
        "selection": "valid macro AUC" if data.valid is not None else "last step: there is no split 'valid'",
        "threshold": youden if data.valid is not None else "0.5: there is no split 'valid'",
        "hosmer_lemeshow": f"one image of each patient, {figures.GROUPS} groups by rank of the risk; cases of equal "
        f"risk share their outcomes; {figures.GROUPS} degrees of freedom, as many as groups, as the net was fitted on "
        f"other cases; chi2 is the median over {figures.CHOICES} choices of the image and over trainings (seeds and "
        "folds), p twice the median, which is valid however these depend on each other",
        "unchecked": checked.unchecked,
        "n": checked.n,
        "patients_test": len(patients),
        "runs": [trial.name for trial in work],
        **summary,
        "real_vs_synthetic": {
            name: one | {"text": looks(Trial(args.tasks[0], name, 0), one, study, data)}
            for name, one in real_vs.items()
        },
    }


if __name__ == "__main__":
    sys.exit(run_main(main))
