"""The paper's Tables 2 to 5 and Figure 5 from saved results, its own figures beside them where they apply.

    python -m eval.tables --classify runs/classify/report.json --output_dir runs/tables
    python -m eval.tables --classify R/report.json --quality tiger_f=Q.json sd_controlnet=Q2.json --output_dir T
    python -m eval.tables --classify kept/report_scores.csv.xz --output_dir T          # without report or images

Tables are written as Markdown, LaTeX, PNG, and CSV with one line a figure; plots as PNG, their figures as CSV.
    table2   image quality of each synthetic set, by class                               (--quality)
    table3   AUC of each arm on each binary task, on valid and test
    table4   accuracy and AUC of each arm on each binary task, on test
    table5   accuracy, AUC of each class, and Brier score of each arm, all classes at once
    figure5a AUC by the number of images added, synthetic or real                        (needs --amounts there)
    figure5b AUC by the number of real images, without and with images added             (needs --real_share there)
    roc, calibration of each image's mean score over seeds, all folds in one; the AUC in tables is a mean over these
What has not been measured is left out. Nothing is trained, and no image is read. All of --classify comes from the table
of scores, R/NAME_scores.csv of a report R/NAME.json, with its intervals and tests; a report only gives its settings,
and for scores of older code the number of real images. p are of paired tests between arms, as eval.figures has them.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from eval import charts, figures, typeset
from eval.arms import PLAIN, UPPER, generator_of, title
from eval.results import headline
from eval.runs import read_table, table_of
from eval.sources import synthetic_sets
from eval.study import NEGATIVE, RESAMPLES
from eval.typeset import Cell, Table
from tiger.errors import InputError, run
from tiger.files import atomic_path, read_json

Report = Mapping[str, Any]
Published = Mapping[str, Any]
QUALITY = {  # metric -> column
    "ssim": "SSIM",
    "cmmd": "CMMD",
    "geometry_score": "GS",
    "density": "density",
    "coverage": "coverage",
}
ON_VALID = "No p on valid: states and thresholds are chosen there."
NETS = "Own net: one of these two classes alone, as in the paper; else the net of all classes, its two probabilities."
BASELINE = "oversampling"
NOTE = "Paper: Dai et al. 2025, on its own clinical images; set beside, not to be compared in level."


def published() -> Published:
    """The paper's figures."""
    path = Path(__file__).with_name("published.yaml")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def row_name(arm: str, paper: Published) -> str:
    """An arm's name, or that of a method which only the paper has."""
    return paper["methods"].get(arm) or title(arm)


def ordered(ours: Sequence[str], theirs: Sequence[str]) -> list[str]:
    """The paper's order, our other arms before its generators, ours of its methods after these, further real images
    last."""
    own = [arm for arm in ours if arm not in theirs]
    first = [arm for arm in (*theirs, *own) if arm in PLAIN]
    rest = [arm for arm in (*theirs, *own) if arm not in first and arm != UPPER]
    place = {method: i for i, method in enumerate(theirs)}
    rest.sort(key=lambda arm: place.get(generator_of(arm)[0], -1))
    return sorted(first, key=PLAIN.index) + rest + [arm for arm in own if arm == UPPER]


def pair_of(task: str) -> str:
    """ "benign vs FTC, own net" -> "benign vs FTC" """
    return task.removesuffix(", own net")


# ----------------------------------------------------------------------------------------------------- from the scores


def read_study(path: str) -> tuple[list[figures.Run], Report]:
    """(runs, report) of a report with its table of scores, or of a table alone, whose report is empty.

    Raises InputError where a file is not there or of another kind, where the two are of different arms, and where the
    runs cannot be compared.
    """
    again = "run eval.classify again, which trains nothing anew"
    alone = ".csv" in Path(path).suffixes
    report, table = ({}, Path(path)) if alone else (_read(path, "settings", "arms"), table_of(path))
    if not alone and not table.is_file():
        raise InputError(f"{table}: no such file, and tables are made from the scores; {again}")
    runs = [figures.read_run(one) for one in read_table(table)]
    if not alone and {run.condition for run in runs} != set(report["arms"]):
        raise InputError(f"{table} has other arms than {path}; {again}")
    refuse_unequal(table, runs)
    return runs, report


def refuse_unequal(table: Path, runs: Sequence[figures.Run]) -> None:
    """Raise InputError unless every condition has the same trainings, and all trainings of a fold the same test images.

    A table that eval.classify has written does; one that was put together may not.
    """
    images: dict[tuple[str, int | None], Any] = {}
    trainings: dict[str, set[tuple[str, int, int | None]]] = {}
    for one in runs:
        tested = one.test.file_names, one.test.patients, one.test.y.tolist()
        if images.setdefault((one.task, one.fold), tested) != tested:
            raise InputError(f"{table}: {one.condition}, seed {one.seed}: its test images are others than before it")
        trainings.setdefault(one.condition, set()).add((one.task, one.seed, one.fold))
    first = runs[0].condition
    for condition, found in trainings.items():
        if found != trainings[first]:
            raise InputError(f"{table}: {condition} has other tasks, seeds or folds than {first}; leave one out")


def remade(runs: Sequence[figures.Run], given: Report, negative: str | None, resamples: int | None) -> Report:
    """Everything that tables and plots show, from scores: a report as eval.classify's, less what only training tells.

    Args:
        given: the report of these runs, for settings that are None here; empty: for defaults.
    Raises InputError where no net knows the negative class that is asked for.
    """
    classes = list(dict.fromkeys(label for run in runs for label in run.classes))
    if negative not in (None, *classes):
        raise InputError(f"--negative {negative}: no such class; there are {', '.join(classes)}")
    settings = given.get("settings", {})
    negative = negative or str(settings.get("negative", NEGATIVE))
    found = figures.summarise(runs, negative, resamples or settings.get("resamples", RESAMPLES))
    for condition, entry in found["arms"].items():
        mine = [run for run in runs if run.condition == condition]
        if all("real_images" in run.notes for run in mine):
            trained: dict[str, list[int]] = {}  # task -> of each net
            for run in mine:
                for task in figures.pairs(run, negative):
                    trained.setdefault(task, []).append(run.notes["real_images"])
            entry["real_images"] = {task: fmean(of) for task, of in trained.items()}
        elif given and (real := sum(given["arms"][condition].get("real", {}).values())):
            entry["real_images"] = dict.fromkeys(figures.tasks_of(mine, negative), real)
    net = {name: settings.get(name, runs[0].notes.get(name)) for name in ("model", "image_size")}
    folds, seeds = ({getattr(run, name) for run in runs} - {None} for name in ("fold", "seed"))
    tested = {
        (run.fold, file): (run.classes[y], patient)
        for run in runs
        for file, y, patient in zip(run.test.file_names, run.test.y, run.test.patients, strict=True)
    }
    counts = Counter(label for label, _ in tested.values())
    return found | {
        "settings": net | {"negative": negative, "folds": len(folds), "seeds": sorted(seeds)},
        "n": {"test": {label: counts[label] for label in classes}},
        "patients_test": len({(fold, patient) for (fold, _), (_, patient) in tested.items()}),
    }


def baseline(report: Report, asked: str | None) -> str:
    """The arm that p-values are against: oversampling, or the first where that is not there, unless asked for another.

    Raises InputError where that is none.
    """
    arms = list(full(report))
    if asked is not None and asked not in arms:
        raise InputError(f"--against {asked}: no such arm; there are {', '.join(arms)}")
    return asked or (BASELINE if BASELINE in arms else arms[0])


# -------------------------------------------------------------------------------------------------------------- cells


def full(report: Report) -> dict[str, Mapping[str, Any]]:
    """arm -> its figures with the most synthetic images and the most real ones that were tried."""
    found: dict[str, Mapping[str, Any]] = {}
    for entry in sorted(report["arms"].values(), key=lambda of: (of["real_share"], of["amount"] or 0)):
        found[entry["arm"]] = entry
    return {arm: found[arm] for arm in dict.fromkeys(of["arm"] for of in report["arms"].values())}


def cell(of: Mapping[str, Any] | None, name: str, paper: Any, p: float | None = None, extractor: str = "") -> Cell:
    """One figure of an arm with its floor, where it has one, and the paper's beside it."""
    entry = of.get(name) if of is not None else None
    if entry is None:
        return Cell(paper=paper)
    return Cell(entry["value"], entry["low"], entry["high"], p, paper, entry.get("floor"), extractor)


def adjusted_p(
    report: Report, figure: str, of: Mapping[str, Any] | None, against: Mapping[str, Any] | None
) -> float | None:
    """Holm's p of the difference of two conditions; None where they were not compared."""
    if of is None or against is None:
        return None
    pair = {of["condition"], against["condition"]}
    tests = (one for one in report["comparisons"] if one["figure"] == figure and {one["arm"], one["against"]} == pair)
    return next((one["p_holm"] for one in tests), None)


def arm_cell(report: Report, arm: str, name: str, paper: Any, against: str) -> Cell:
    """One figure of an arm, p of its difference to that of `against` where that was tested, and the paper's figure."""
    arms = full(report)
    return cell(arms.get(arm), name, paper, adjusted_p(report, name, arms.get(arm), arms.get(against)))


# ------------------------------------------------------------------------------------------------------------- tables


def table2(quality: Mapping[str, Report], paper: Published) -> Table:
    """Synthetic sets by classes and metrics."""
    classes = list(dict.fromkeys(label for report in quality.values() for label in report["per_class"]))
    theirs = [arm for arm, of in paper["table2"].items() if set(of) & set(classes)]
    rows = {}
    for arm in ordered(list(quality), theirs):
        cells = []
        for label in classes:
            of = quality[arm]["per_class"].get(label, {}) if arm in quality else {}
            known = paper["table2"].get(arm, {}).get(label, {})
            pairs = of.get("ssim", {})  # of several pairings, that with the same map
            if ssim := pairs.get("condition") or pairs.get("random"):
                of = of | {"ssim": ssim | {"floor": pairs.get("random real", {}).get("value")}}
            made_by = {"cmmd": quality[arm]["extractor"].partition(",")[0]} if of else {}
            found = [cell(of, name, known.get(name), extractor=made_by.get(name, "")) for name in QUALITY]
            cells += [Cell(of.get("n")), *found]
        rows[row_name(arm, paper)] = cells
    columns = [(label, text) for label in classes for text in ("n", *QUALITY.values())]
    extractors = ", ".join(dict.fromkeys(report["extractor"] for report in quality.values()))
    caption = (
        "Image quality by class. SSIM: with the real image whose Sobel map it was drawn after, else with a random one. "
        f"GS: geometry score. Features of {extractors}; the paper's CMMD is of CLIP's. Of the paper, the coarse "
        "stage's row is its SD-S, which its text calls the stable diffusion model, a footnote one with segmentation. "
        f"Floor: the same between real images; of SSIM, between random ones of the class. {NOTE}"
    )
    return Table("table2", caption, columns, rows)


def table3(report: Report, paper: Published, against: str) -> Table:
    """Arms by binary tasks, valid and test."""
    arms, tasks = full(report), list(headline(report))
    theirs = [arm for arm, of in paper["table3"].items() if set(of) & set(map(pair_of, tasks))]
    rows = {}
    for arm in ordered(list(arms), theirs):
        cells = []
        for task in tasks:
            known = paper["table3"].get(arm, {}).get(pair_of(task), {})
            shown = {"valid": f"valid auc {task}", "test": f"auc {task}"}
            cells += [arm_cell(report, arm, name, known.get(split), against) for split, name in shown.items()]
        rows[row_name(arm, paper)] = cells
    caption = f"AUROC (95 % CI) by augmentation. {NETS} {sizes(report)} {tested(against)} {ON_VALID} {NOTE}"
    return Table("table3", caption, [(task, split) for task in tasks for split in ("valid", "test")], rows)


def table4(report: Report, paper: Published, against: str) -> Table:
    """Arms by binary tasks, accuracy and AUC."""
    arms, tasks = full(report), list(headline(report))
    theirs = [arm for arm, of in paper["table4"].items() if set(of) & set(map(pair_of, tasks))]
    shown = {"accuracy": "accuracy", "auc": "AUC"}
    known = paper["table4"]
    rows = {
        row_name(arm, paper): [
            arm_cell(report, arm, f"{name} {task}", known.get(arm, {}).get(pair_of(task), {}).get(name), against)
            for task in tasks
            for name in shown
        ]
        for arm in ordered(list(arms), theirs)
    }
    columns = [(task, text) for task in tasks for text in shown.values()]
    caption = f"Test accuracy and AUROC (95 % CI). {NETS} {sizes(report)} {tested(against)} {NOTE}"
    return Table("table4", caption, columns, rows)


def table5(report: Report, paper: Published, against: str) -> Table:
    """Arms by figures of all classes at once."""
    arms = {arm: of for arm, of in full(report).items() if "macro_auc" in of}
    classes = list(report["n"]["test"])
    shown = {"accuracy": ("", "accuracy"), "macro_auc": ("AUC", "mean")}
    shown |= {f"auc {label}": ("AUC", label) for label in classes} | {"brier": ("", "Brier score, summed")}
    applies = all(name in paper["table5"]["none"] for name in shown)
    known = paper["table5"] if applies else {}
    rows = {
        row_name(arm, paper): [arm_cell(report, arm, name, known.get(arm, {}).get(name), against) for name in shown]
        for arm in ordered(list(arms), list(known))
    }
    caption = (
        f"{len(classes)} classes at once, each against all others. {sizes(report)} {tested(against)} Brier score: "
        "squared errors, summed over the classes, 0 to 2"
    )
    caption += f"; the paper does not say which of its forms it has. {NOTE}" if applies else "."
    return Table("table5", caption, list(shown.values()), rows)


def tested(against: str) -> str:
    """What the p-values are of."""
    return f"p: paired, against {title(against)}, adjusted after Holm over all pairs of arms in a column."


def sizes(report: Report) -> str:
    """How many images and patients the figures are of."""
    n = ", ".join(f"{label} {count}" for label, count in report["n"]["test"].items())
    settings = report["settings"]
    seeds, folds = len(settings["seeds"]), f", {settings['folds']} folds" if settings["folds"] else ""
    net = f"{settings['model']}, {settings['image_size']} px, " if settings["model"] else ""  # older tables lack it
    return f"{net}{seeds} seed{'s' * (seeds > 1)}{folds}; test images: {n}; {report['patients_test']} patients."


# ------------------------------------------------------------------------------------------------------------ figures


Curves = dict[str, dict[str, list[tuple[float, Mapping[str, float]]]]]  # task -> line -> (x, estimate)


def figure5a(report: Report) -> Curves:
    """AUC by images added a class, of the largest real share; oversampling adds none."""
    entries = list(report["arms"].values())
    most = max(of["real_share"] for of in entries)
    entries = [of for of in entries if of["real_share"] == most]
    added = [of for of in entries if of["amount"] is not None]
    start = next((of for of in entries if of["arm"] == "oversampling"), None)
    curves: Curves = {}
    for task in headline(report):
        for arm in dict.fromkeys(of["arm"] for of in added):
            points = [(of["amount"], of[f"auc {task}"]) for of in added if of["arm"] == arm]
            points += [(0, start[f"auc {task}"])] if start is not None else []
            curves.setdefault(task, {})[title(arm)] = sorted(points, key=lambda point: point[0])
    return curves if len({of["amount"] for of in added}) > 1 else {}


def figure5b(report: Report) -> Curves:
    """AUC by real training images, of the real images alone (the paper's task 1) and with images added (2, 3 and 4)."""
    shares = sorted({of["real_share"] for of in report["arms"].values()})
    curves: Curves = {}
    if len(shares) > 1 and not all(of.get("real_images") for of in report["arms"].values()):
        raise InputError(
            "--classify: the scores are of older code, and say not how many real images nets were trained on, which "
            "figure 5b needs; give its report, or run eval.classify again, which trains nothing anew"
        )
    for task in headline(report) if len(shares) > 1 else ():
        for condition, of in report["arms"].items():
            line = title(condition.partition(f", {of['real_share']:.4g} of")[0])
            count = of["real_images"][task]  # whole patients of each class: not just that share of all images
            curves.setdefault(task, {}).setdefault(line, []).append((count, of[f"auc {task}"]))
    return {
        task: {line: sorted(points, key=lambda point: point[0]) for line, points in of.items()}
        for task, of in curves.items()
    }


def write_curves(name: str, curves: Curves, x: str, folder: Path) -> None:
    """<name>.png, and <name>.csv with its figures."""
    lines = ["task,line,x,value,low,high"]
    for task, of in curves.items():
        for line, points in of.items():
            lines += [f'"{task}","{line}",{at:g},{e["value"]},{e["low"]},{e["high"]}' for at, e in points]
    with atomic_path(folder / f"{name}.csv") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    drawn = {
        task: {line: [(at, e["value"], e["low"], e["high"]) for at, e in points] for line, points in of.items()}
        for task, of in curves.items()
    }
    write_png(folder / f"{name}.png", charts.band_chart(drawn, x, "test AUC"))


def write_png(path: Path, png: bytes) -> None:
    """Write a picture, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(png)


def write_plots(report: Report, runs: Sequence[figures.Run], paper: Published, folder: Path) -> None:
    """Every plot for which there is something to draw."""
    real = "real training images, mean of seeds and folds"
    plots = (("figure5a", figure5a(report), "images added a class"), ("figure5b", figure5b(report), real))
    drawn = [name for name, curves, x in plots if curves]
    for name, curves, x in plots:
        if curves:
            write_curves(name, curves, x, folder)
    if drawn:
        lines = [*(f"![{name}]({name}.png)" for name in drawn), f"{sizes(report)} Paper:", *paper["figure5"]]
        with atomic_path(folder / "figure5.md") as temporary:
            temporary.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    negative = report["settings"]["negative"]
    for name, found, draw in (
        ("roc", figures.roc_curves(runs, negative), charts.roc_chart),
        ("calibration", figures.calibration_curves(runs, negative), charts.calibration_chart),
    ):
        if found:
            named = {task: {title(arm): curve for arm, curve in of.items()} for task, of in found.items()}
            write_png(folder / f"{name}.png", draw(named))


# ---------------------------------------------------------------------------------------------------------------- CLI


def _read(path: str, *holds: str) -> Report:
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    kind = "give a report of the right kind, made by this version"
    try:
        report = read_json(path)
    except ValueError as error:  # neither JSON nor text
        raise InputError(f"{path}: not JSON ({error}); {kind}") from error
    for name in holds:
        if not isinstance(report, dict) or name not in report:
            raise InputError(f"{path}: has no '{name}'; {kind}")
    return report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m eval.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--classify", help="report NAME.json of eval.classify with NAME_scores.csv beside it; or that alone, also .xz"
    )
    parser.add_argument(
        "--quality", nargs="+", default=[], help="reports of eval.quality, each ARM=FILE, or FILE for tiger_f"
    )
    parser.add_argument(
        "--against", help=f"arm that p-values are against (default: {BASELINE}, or the first where that is not there)"
    )
    parser.add_argument(
        "--negative", help=f"class that the others are set against (default: the report's, else {NEGATIVE})"
    )
    parser.add_argument(
        "--resamples", type=int, help=f"of the bootstrap (default: as many as the report's, else {RESAMPLES})"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the tables")
    parser.add_argument("--dry_run", action="store_true", help="read everything and write nothing")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = _parser().parse_args(argv)
    if not args.classify and not args.quality:
        raise InputError("give --classify, --quality or both")
    if args.resamples is not None and args.resamples < 2:
        raise InputError(f"--resamples {args.resamples}: must be 2 or more")
    paper = published()
    sets = synthetic_sets(args.quality, "--quality")
    quality = {arm: _read(file, "per_class", "extractor") for arm, file in sets.items()}
    tables = [table2(quality, paper)] if quality else []
    runs, report = [], None
    if args.classify:
        runs, given = read_study(args.classify)
        report = remade(runs, given, args.negative, args.resamples)
        against = baseline(report, args.against)
        if headline(report):
            tables += [table3(report, paper, against), table4(report, paper, against)]
        if any("macro_auc" in of for of in report["arms"].values()):
            tables.append(table5(report, paper, against))
        if not tables:
            raise InputError(f"{args.classify}: no net knows {report['settings']['negative']}; name another --negative")
    if args.dry_run:
        print(f"{', '.join(table.name for table in tables)}: can be made; nothing written")
        return
    for table in tables:
        typeset.write(table, args.output_dir)
    if report is not None:
        write_plots(report, runs, paper, args.output_dir)
    print(f"wrote {', '.join(sorted(path.name for path in args.output_dir.iterdir()))} to {args.output_dir}")


if __name__ == "__main__":
    sys.exit(run(main))
