r"""The study over generators: arms of which several were trained, as one figure each.

    python -m benchmarks.generators --scores runs/study/classify/report_scores.csv --output runs/study/generators.json
    python -m benchmarks.generators --scores runs/study/classify/report_scores.csv --output runs/study/aims.json \
        --arms tiger_f --against none oversampling sd_controlnet \
        --margins 0.1 0.03 0.02                                          # few differences, as a family of their own
    python -m benchmarks.generators --scores benchmarks/scores/study.csv.xz --output R/study.json  # recorded

The arms NAME_0, NAME_1, … of the tables, NAME a method of eval/arms.py, are taken together as NAME, drawn by that many
generators. A figure is the mean over generators and classifier seeds. Its interval, and the test of a difference, are
Student's t with three parts of variance: over patients (bootstrap), over classifier seeds, and over generators, of
which three tell little. Differences are paired by patient, seed and generator: generators of a number share a coarse
stage, and a difference is over the numbers that both arms have. Where that is one number, how generators differ is not
known and is left out: interval and p do not cover it, are too small by that, and say so ("one generator"; `generators`
in the JSON is how many the figure is over, 0 where none of its arms has any). Holm's correction is over the differences
of a figure that are tested. `p_beyond` is that of a difference of no more than its margin, one-sided and not corrected.
Where further real images gain clearly over a plain arm, an arm's share of that is given too, with Fieller's interval.
"""

import argparse
import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from eval import charts, figures, scoring, statistics
from eval.arms import UPPER, generator_of, is_synthetic, title
from eval.figures import Run
from eval.html import bounds
from eval.images import refuse_below
from eval.runs import read_table
from eval.study import ALL, NEGATIVE
from eval.tables import write_png
from tiger.errors import InputError, run
from tiger.files import write_json

Array = NDArray[np.float64]
Arm = dict[int | None, Array]  # a generator's number, None where it has none, -> (seeds, 1 + resamples)
BASELINES = ("none", "oversampling")


def by_number(number: int | None) -> int:
    """The order of generators; None, which arms without generators have, is alone."""
    return -1 if number is None else number


def draw(runs: Sequence[Run], negative: str, resamples: int) -> dict[str, dict[str, Arm]]:
    """figure -> arm -> its generators' (seeds, 1 + resamples): on the sample, then on each resample of its patients.

    Raises InputError where an arm lacks a training or has one twice, and on folds and nets of their own.
    """
    trained: defaultdict[str, dict[tuple[int | None, int], Run]] = defaultdict(dict)
    for one in runs:
        method, number = generator_of(one.condition)
        place = int(number) if number else None, one.seed
        if place in trained[method]:
            raise InputError(f"arm {one.condition}, seed {one.seed}: more than one training; give each once")
        trained[method][place] = one
    seeds, patients = sorted({one.seed for one in runs}), runs[0].test.patients
    w = scoring.resample_weights(patients, resamples, np.random.default_rng(0))
    found: defaultdict[str, dict[str, Arm]] = defaultdict(dict)
    for arm, of_arm in trained.items():
        numbers = list(dict.fromkeys(number for number, _ in of_arm))
        if len(numbers) > 1 and None in numbers:
            raise InputError(f"arm {arm}: some of its trainings name a generator and some do not; leave one kind out")
        numbers.sort(key=by_number)
        if any(one.test.patients != patients for one in of_arm.values()):
            raise InputError(f"arm {arm}: its test images are others than those of arm {runs[0].condition}")
        if any(one.fold is not None or one.task != ALL for one in of_arm.values()):
            raise InputError(
                f"arm {arm}: has folds, or nets of two classes; this is for one test split and all classes"
            )
        if set(of_arm) != set(itertools.product(numbers, seeds)):
            raise InputError(f"arm {arm}: needs a training for each of generators {numbers} and seeds {seeds}")
        cells = {place: aucs(one, negative, w) for place, one in of_arm.items()}
        for figure in cells[numbers[0], seeds[0]]:
            found[figure][arm] = {k: np.array([cells[k, seed][figure] for seed in seeds]) for k in numbers}
    return found


def aucs(one: Run, negative: str, w: Array) -> dict[str, Array]:
    """The AUC of each class against the negative one, and the mean of each class's against all others."""
    found: dict[str, Array] = {}
    for task, (n, c) in figures.pairs(one, negative).items():
        y, p, rows = figures.pair_scores(one.test, n, c)
        found[task.replace(" vs ", "-")] = scoring.auc(y, p, w[:, rows])
    return found | {"macro": scoring.multiclass_figures(one.test.y, one.test.p, one.classes, w)["macro_auc"]}


def estimate(of: Callable[..., Array], *arms: Arm, margin: float = 0.0) -> dict[str, float]:
    """{value, low, high, p} of what `of` makes of arms; p_beyond, where there is a margin, of it being no more."""
    stacked = [np.stack([arm[k] for k in numbers]) for arm, numbers in zip(arms, paired(*arms), strict=True)]
    means = of(*(arm.mean((0, 1)) for arm in stacked))
    generators = max(len(arm) for arm in stacked)
    numbered = [arm if len(arm) > 1 else np.repeat(arm, generators, axis=0) for arm in stacked]
    by_generator = of(*(arm[:, :, 0].mean(1) for arm in numbered))
    by_seed = of(*(arm[:, :, 0].mean(0) for arm in stacked))
    parts = [
        (figures.bootstrap_variance(means), math.inf),
        figures.over_seeds(by_seed),
        figures.over_seeds(by_generator),
    ]
    low, high, p = statistics.t_interval(float(means[0]), parts)
    found = {"value": float(means[0]), "low": low, "high": high, "p": p}
    if margin:
        above = float(means[0]) - margin
        two_sided = statistics.t_interval(above, parts)[2]
        found |= {"margin": margin, "p_beyond": two_sided / 2 if above > 0 else 1 - two_sided / 2}
    return found


def share(arm: Arm, plain: Arm, upper: Arm) -> dict[str, float]:
    """{value, low, high} of an arm's share of what further real images gain over a plain arm.

    The interval holds the shares s for which arm - plain - s (upper - plain) does not differ from 0 (Fieller, J. R.
    Stat. Soc. B 16:175, 1954): a ratio's is not symmetric. An end that is beyond ± 10 is infinite.
    """

    def left(s: float, end: str) -> float:
        return estimate(lambda a, b, u: a - b - s * (u - b), arm, plain, upper)[end]

    value = estimate(lambda a, b, u: (a - b) / (u - b), arm, plain, upper)["value"]
    low: Any = brentq(left, -10, value, ("low",)) if left(-10, "low") > 0 else -math.inf
    high: Any = brentq(left, value, 10, ("high",)) if left(10, "high") < 0 else math.inf
    return {"value": value, "low": float(low), "high": float(high)}


def paired(*arms: Arm) -> list[list[int | None]]:
    """The generators of each arm that a figure of them is over: those that all have, of arms whose generators are
    numbered.

    Raises InputError where there is none.
    """
    numbered = [set(arm) for arm in arms if None not in arm]
    shared = sorted(set.intersection(*numbered), key=by_number) if numbered else []
    if numbered and not shared:
        numbers = " and ".join(str(sorted(of, key=by_number)) for of in numbered)
        raise InputError(f"generators {numbers} are of arms to compare, and have no number in common; leave one out")
    return [[None] if None in arm else shared for arm in arms]


def fewest(arms: Mapping[str, Arm], *names: str) -> int:
    """Generators of the arm of synthetic images that has fewest, 0 where none of these is one."""
    counts = map(len, paired(*(arms[name] for name in names)))
    return min((count for count, name in zip(counts, names, strict=True) if is_synthetic(name)), default=0)


def pairs_of(tested: Sequence[str], against: Sequence[str]) -> list[tuple[str, str]]:
    """(arm, other) of each arm to each of `against`, no pair twice. Raises InputError where there is none."""
    found: dict[frozenset[str], tuple[str, str]] = {}
    for other, arm in itertools.product(against, tested):
        if arm != other:
            found.setdefault(frozenset((arm, other)), (arm, other))
    if not found:
        raise InputError(f"--arms {' '.join(tested)} --against {' '.join(against)}: give two different arms")
    return list(found.values())


def summarise(
    drawn: Mapping[str, Mapping[str, Arm]],
    against: Mapping[str, float],
    tested: Sequence[str] | None = None,
) -> dict[str, Any]:
    """{arms: arm -> figures, differences: [of each arm to each of `against`], shares: plain arm -> arm -> figures}

    Args:
        against: arm -> the margin by which the others should be above it.
        tested: the arms whose differences are taken, which alone Holm's correction is then over; None: all.
    """
    names = list(next(iter(drawn.values())))
    tested = names if tested is None else tested
    report: dict[str, Any] = {"arms": {name: {} for name in names}, "differences": [], "shares": {}}
    for figure, arms in drawn.items():
        for name, arm in arms.items():
            counts = {"generators": fewest(arms, name), "seeds": len(next(iter(arm.values())))}
            report["arms"][name][figure] = estimate(lambda a: a, arm) | counts
        pairs = pairs_of(tested, list(against))
        family = [estimate(np.subtract, arms[a], arms[b], margin=against[b]) for a, b in pairs]
        for (a, b), one, p in zip(pairs, family, statistics.holm([one["p"] for one in family]), strict=True):
            of_pair = {"figure": figure, "arm": a, "against": b, "generators": fewest(arms, a, b)}
            report["differences"].append(of_pair | one | {"p_holm": float(p)})
        for plain in BASELINES:
            if not {plain, UPPER} <= set(names) or estimate(np.subtract, arms[UPPER], arms[plain])["low"] <= 0:
                continue
            for name in names:
                if name not in (*BASELINES, UPPER):
                    of_arm = share(arms[name], arms[plain], arms[UPPER]) | {"generators": fewest(arms, name)}
                    report["shares"].setdefault(plain, {}).setdefault(name, {})[figure] = of_arm
    return report


def table(report: Mapping[str, Any], against: Iterable[str]) -> str:
    """Markdown: figures of the arms, their differences to each of `against`, and their shares of the gain."""
    shown = list(next(iter(report["arms"].values())))

    def text(entry: Mapping[str, float] | None, sign: str = "") -> str:
        if entry is None:
            return ""
        p = f", p = {entry['p']:.2g} (Holm {entry['p_holm']:.2g})" if "p_holm" in entry else ""
        if "margin" in entry:
            p += f"; beyond {entry['margin']:{sign}g}: p = {entry['p_beyond']:.2g}"
        return f"{entry['value']:{sign}.3f} [{entry['low']:{sign}.3f}, {entry['high']:{sign}.3f}]{p}"

    def rows(head: str, of: Mapping[str, Mapping[str, Any]], sign: str = "") -> list[str]:
        lines = [f"| {head} | {' | '.join(shown)} |", "|---" * (1 + len(shown)) + "|"]
        for name, entries in of.items():
            cells = " | ".join(text(entries.get(figure), sign) for figure in shown)
            lines.append(f"| {named(name, report['arms'][name])} | {cells} |")
        return [*lines, ""]

    lines = rows("arm", report["arms"])
    for other in against:
        cells: defaultdict[str, dict[str, Any]] = defaultdict(dict)
        for entry in report["differences"]:
            if entry["against"] == other:
                cells[entry["arm"]][entry["figure"]] = entry
        lines += rows(f"minus {named(other, report['arms'][other])}", cells, "+")
    for plain, of in report["shares"].items():
        lines += rows(f"share of what further real images gain over {title(plain)}", of)
    if any(of[shown[0]]["generators"] == 1 for of in report["arms"].values()):
        lines.append("One generator: intervals and p do not cover how generators differ, and are too small by that.")
    if any(of[shown[0]]["seeds"] == 1 for of in report["arms"].values()):
        lines.append("One seed: intervals and p do not cover how trainings differ, and are too small by that.")
    return "\n".join(lines)


def named(arm: str, of: Mapping[str, Any]) -> str:
    """An arm's name, with how many generators it had."""
    if not is_synthetic(arm):
        return title(arm)
    generators = next(iter(of.values()))["generators"]
    return f"{title(arm)}, {'one generator' if generators == 1 else f'{generators} generators'}"


def chart(report: Mapping[str, Any]) -> bytes:
    """PNG: one panel a figure."""
    arms = {named(arm, of): of for arm, of in report["arms"].items()}
    shown = next(iter(arms.values()))
    panels = {figure: {arm: bounds(of[figure]) for arm, of in arms.items()} for figure in shown}
    return charts.interval_chart(panels, "test AUC")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.generators", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scores", nargs="+", required=True, help="tables NAME_scores.csv of eval.classify, also packed"
    )
    parser.add_argument("--negative", default=NEGATIVE, help=f"the class that others are set against ({NEGATIVE})")
    parser.add_argument("--output", required=True, help="JSON file; the tables are printed")
    parser.add_argument("--against", nargs="+", default=BASELINES, help="arms that all others are set against")
    parser.add_argument(
        "--arms",
        nargs="+",
        help="arms whose differences to --against are tested; Holm's correction is over these alone (default: all)",
    )
    parser.add_argument(
        "--margins", nargs="+", type=float, help="by how much arms should be above each of --against (default: 0)"
    )
    parser.add_argument("--resamples", type=int, default=2000, help="(default: 2000)")
    parser.add_argument("--chart", help="PNG file of the figures with their intervals")
    args = parser.parse_args(argv)
    refuse_below(args, resamples=2)
    runs = [figures.read_run(one) for path in args.scores for one in read_table(path)]
    if args.negative not in runs[0].classes:
        raise InputError(f"--negative {args.negative}: {args.scores[0]} has {', '.join(runs[0].classes)}")
    known = {generator_of(one.condition)[0] for one in runs}
    for flag, names in (("--against", args.against), ("--arms", args.arms or [])):
        if unknown := [arm for arm in names if arm not in known]:
            raise InputError(f"{flag} {' '.join(unknown)}: {' '.join(args.scores)} has {', '.join(sorted(known))}")
    margins = args.margins or [0.0] * len(args.against)
    if len(margins) != len(args.against):
        raise InputError(f"--margins: {len(margins)} numbers for {len(args.against)} arms of --against; give one each")
    against = dict(zip(args.against, margins, strict=True))
    found = summarise(draw(runs, args.negative, args.resamples), against, args.arms)
    family = {"arms_tested": args.arms, "against": against}  # what p_holm is over, in each figure; null: all arms
    write_json(args.output, {"resamples": args.resamples} | family | found)
    if args.chart:
        write_png(Path(args.chart), chart(found))
    print(table(found, against))


if __name__ == "__main__":
    sys.exit(run(main))
