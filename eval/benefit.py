"""The report's section on downstream classifiers: what `eval.classify` found."""

from collections.abc import Mapping
from typing import Any

from eval import charts, figures
from eval.arms import title
from eval.html import (
    bounds,
    bracket,
    cell,
    difference,
    escape,
    image,
    made_by,
    not_checked,
    number,
    section,
    stacked,
    table,
)
from eval.results import Results, headline

OPERATING = {
    "accuracy": "accuracy",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "precision": "precision",
    "f1": "F1",
    "mcc": "MCC",
    "kappa": "kappa",
    "brier": "Brier, of the positive class ↓",
    "recall at FPR 0.01": "recall at FPR .01",
    "recall at FPR 0.05": "at .05",
    "recall at FPR 0.1": "at .1",
}
OVERALL = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_specificity": "specificity (macro)",
    "macro_precision": "precision (macro)",
    "macro_f1": "F1 (macro)",
    "mcc": "MCC",
    "kappa": "kappa",
    "brier": "Brier, summed over the classes ↓",
}
OF_ALL = {"macro_auc": "all classes (macro)", "balanced_accuracy": "balanced accuracy"}
FEW = 6  # conditions of which every pair is shown
POLICIES = {
    "share": "puts {share} synthetic images into every class of each batch",
    "rare": "puts {share} synthetic images into the rare classes ({rare}) of each batch",
    "pooled": "draws from one pool of real and synthetic images",
    "pretrain": "trains on synthetic images for the first half of the steps and on real ones for the rest",
}


def class_of(task: str) -> str:
    """ "benign vs FTC, own net" -> "FTC" """
    return task.split(" vs ")[1].removesuffix(", own net")


def benefit_section(results: Results) -> str:
    """AUC of every arm on every task, what sets arms apart, and how sure that is."""
    report = results.classify
    if report is None:
        return ""
    tasks = headline(report)
    titles = {task: task.replace(" vs ", " against ") for task in tasks}
    names = {arm: title(arm) for arm in report["arms"]}
    estimates = {
        titles[task]: {names[arm]: bounds(entry) for arm, entry in of_task.items()} for task, of_task in tasks.items()
    }
    parts = [
        f"<p>{escape(text_of(report))} {made_by(results, 'classify')}</p>",
        not_checked(report),
        image(
            charts.interval_chart(estimates, "test AUC"),
            "AUC with its 95 % interval, by arm.",
            f"Chart of test AUC with intervals, one panel each for {', '.join(titles.values())}",
        )
        if tasks
        else "",
        auc_table(report, titles, names),
        pairs_table(report),
        *(operating_table(report, task, text, names) for task, text in titles.items()),
        f"<p>Hosmer–Lemeshow: {escape(report['hosmer_lemeshow'])}.</p>" if titles else "",
        overall_table(report, names),
        curves(results, titles, names),
        "<h3>Number of images</h3>",
        "<p>For test in all folds, else the mean of the folds.</p>" if report["settings"]["folds"] else "",
        pools_table(report["n"]),
        realism_text(report),
    ]
    return section("benefit", "Does a classifier learn the rare classes better?", *parts)


def text_of(report: Mapping[str, Any]) -> str:
    """What was done, and what the intervals cover."""
    settings = report["settings"]
    seeds = len(settings["seeds"])
    share = " or ".join(f"{share:.0%}" for share in settings["share"])
    mixing = POLICIES[settings["policy"]].format(share=share, rare=", ".join(settings["rare"]))
    covered = "the choice of test patients" + (", not that of the training seed" if seeds == 1 else " and the seeds")
    folds = f", over {settings['folds']} folds by patient" if settings["folds"] else ""
    return (
        f"Test figures of {settings['model']} on images of {settings['image_size']} px, trained from "
        f"{'given weights' if settings['weights'] else 'scratch'} for {settings['max_train_steps']:,} steps in every "
        f"arm, {'one training seed' if seeds == 1 else f'mean of {seeds} training seeds'}{folds}. AUC is between the "
        f"two classes named. Below each value, its interval: {report['interval']}. It covers {covered}. An arm of "
        f"synthetic images {mixing}. {sampling_text(settings)} "
        f"State: {report['selection']}. Threshold: {report['threshold']}.{real_upper_text(report)}"
    )


def sampling_text(settings: Mapping[str, Any]) -> str:
    """In what arms differ besides their images."""
    pool, shares = " and the pool" if settings["policy"] == "pooled" else "", len(settings["share"])
    text = f"Each class is drawn equally often, but from {title('none')}{pool}: there as often as it has images."
    if shares > 1 and settings["policy"] in ("share", "rare"):
        text += f" Of an arm of synthetic images the best on valid of {shares} nets, one a share, is tested; all other "
        text += "arms have one net."
    return text


def real_upper_text(report: Mapping[str, Any]) -> str:
    """How many further real images there are, and how often they are drawn, which is not as often as synthetic ones."""
    if "real_upper" not in report["arms"]:
        return ""
    n = report["n"]
    sets = [name for name in n if name not in ("train", "valid", "test", "extra_real")]
    synthetic = n[sets[0]] if sets else n["extra_real"]
    extra = {label: min(count, synthetic[label]) for label, count in n["extra_real"].items()}
    shares = ", ".join(f"{count / (count + n['train'][label]):.0%} of {label}" for label, count in extra.items())
    fewer = ", ".join(
        f"{label} {count} of {synthetic[label]}" for label, count in extra.items() if count < synthetic[label]
    )
    count = f"fewer than synthetic ones ({fewer})" if fewer else "as many as synthetic ones"
    return (
        f" Further real images are {count}. Each is drawn as often as any other real one of its class, so they make up "
        f"{shares} in a batch, where the share of synthetic ones is fixed."
    )


def auc_table(report: Mapping[str, Any], titles: Mapping[str, str], names: Mapping[str, str]) -> str:
    """Arms by tasks: AUC, its DeLong interval, and AUC on valid."""
    shown = {name: text for name, text in OF_ALL.items() if any(name in of for of in report["arms"].values())}
    rows = []
    for arm, of in report["arms"].items():
        cells = [auc_cell(of, task) for task in titles]
        rows.append([escape(names[arm]), *cells, *(cell(of[name]) if name in of else "" for name in shown)])
    note = "<p>Below the interval, DeLong's, clustered by patient, and the AUC on valid.</p>"
    return table(["arm", *map(escape, titles.values()), *shown.values()], rows) + note


def auc_cell(of: Mapping[str, Any], task: str) -> str:
    """The AUC of one arm on one task."""
    entry = of.get(f"auc {task}")
    if entry is None:
        return ""
    notes = [f"DeLong [{number(entry['delong'][0])}, {number(entry['delong'][1])}]"]
    if (valid := of.get(f"valid auc {task}")) is not None:
        notes.append(f"valid {number(valid['value'])} {bracket(valid)}")
    return cell(entry, *notes)


def pairs_table(report: Mapping[str, Any]) -> str:
    """Differences between arms in AUC and balanced accuracy with their tests: of all arms, or where there are many, to
    the baseline. The report has those of the other figures.
    """
    shown = [*(f"auc {task}" for task in headline(report)), *OF_ALL]
    tested = [entry for entry in report["comparisons"] if entry["figure"] in shown]
    found: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for entry in tested:
        pair = entry["arm"], entry["against"]
        if len(report["arms"]) <= FEW or "oversampling" in pair:
            found.setdefault(pair, {})[entry["figure"]] = entry
    if not found:
        return ""
    shown = [name for name in shown if any(name in of for of in found.values())]
    rows = [
        [
            escape(f"{title(arm)} − {title(against)}"),
            *(
                difference(of[name], f"p {p_value(of[name]['p'])}, Holm {p_value(of[name]['p_holm'])}")
                if name in of
                else ""
                for name in shown
            ),
        ]
        for (arm, against), of in found.items()
    ]
    tests = " or ".join(dict.fromkeys(entry["test"] for entry in tested))
    text = f"Paired on the same patients and seeds. p, of AUC between two classes or of the other figures: {tests}. "
    text += "Holm: p adjusted over all pairs of arms in a column. The tests of further figures are in report.json."
    head = ["", *(escape(OF_ALL.get(name, name.removeprefix("auc ").replace(" vs ", " against "))) for name in shown)]
    return f"<h3>Differences between arms</h3><p>{escape(text)}</p>" + table(head, rows)


def p_value(p: float | None) -> str:
    """0.0312 -> "0.031", 0.00012 -> "< 0.001"; a dash for none."""
    return "–" if p is None or p != p else "< 0.001" if p < 0.001 else f"{p:.3f}"


def operating_table(report: Mapping[str, Any], task: str, text: str, names: Mapping[str, str]) -> str:
    """Arms by what they do at their threshold, and how well calibrated they are."""
    rows = []
    for arm, of in report["arms"].items():
        if f"accuracy {task}" in of:
            fit = of[f"hosmer_lemeshow {task}"]
            cells = [cell(of[f"{name} {task}"]) for name in OPERATING]
            rows.append([escape(names[arm]), *cells, stacked(number(fit["chi2"]), f"p {p_value(fit['p'])}")])
    medians = stacked("Hosmer–Lemeshow χ²", "one image a patient; medians, p doubled")
    head = ["arm", *map(escape, OPERATING.values()), medians]
    return f"<h3>{escape(text[0].upper() + text[1:])} at the threshold</h3>" + table(head, rows)


def overall_table(report: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Arms by figures of all classes together, and the AUC of each class against all others."""
    classes = list(report["n"]["train"])
    shown = {name: text for name, text in OVERALL.items() if name != "balanced_accuracy"}
    shown |= {f"auc {label}": f"AUC {label}" for label in classes}
    rows = [
        [escape(names[arm]), *(cell(of[name]) if name in of else "" for name in shown)]
        for arm, of in report["arms"].items()
        if "macro_auc" in of
    ]
    return (
        "<h3>All classes together, each against all others</h3>" + table(["arm", *map(escape, shown.values())], rows)
        if rows
        else ""
    )


def curves(results: Results, titles: Mapping[str, str], names: Mapping[str, str]) -> str:
    """ROC and calibration of every task and arm."""
    report = results.classify
    folder = results.folder / "classify"
    if report is None or not titles or not (folder / "scores").is_dir():
        return ""
    runs = figures.read_runs(folder, report["runs"])
    negative = report["settings"]["negative"]

    def named(found: Mapping[str, Mapping[str, charts.Curve]]) -> dict[str, dict[str, charts.Curve]]:
        return {titles[task]: {names[arm]: curve for arm, curve in of.items()} for task, of in found.items()}

    roc, calibration = named(figures.roc_curves(runs, negative)), named(figures.calibration_curves(runs, negative))
    tasks = ", ".join(roc)
    link = made_by(results, "classify")
    return image(
        charts.roc_chart(roc),
        f"ROC on the test split, mean score of the seeds. {link}",
        f"ROC curves of every arm for {tasks}",
    ) + image(
        charts.calibration_chart(calibration),
        "Calibration on the test split: ten groups of equal size by probability. On the diagonal, as many are positive "
        f"as the net says; above it, more. {link}",
        f"Calibration curves of every arm for {tasks}",
    )


def pools_table(pools: Mapping[str, Mapping[str, int]]) -> str:
    """Images of each class in each pool and split."""
    names = {"train": "real, train", "valid": "real, valid", "test": "real, test", "extra_real": "further real, train"}
    classes = list(pools["train"])
    rows = [
        [escape(names.get(pool, f"synthetic, {title(pool)}")), *(number(n[label]) for label in classes)]
        for pool, n in pools.items()
        if any(n.values())
    ]
    return table(["images", *map(escape, classes)], rows)


def realism_text(report: Mapping[str, Any]) -> str:
    """The classifier two-sample test of each synthetic set."""
    if not report["real_vs_synthetic"]:
        return ""
    lines = [
        f"<p>{escape(title(name))}: {entry['model']} on images of {entry['image_size']} px, trained for "
        f"{entry['max_train_steps']:,} steps on {entry['n_train']:,} images, half of them synthetic, tells them apart "
        f"with an AUC of <b>{number(entry['auc'])}</b> <small>{bracket(entry)}</small> on {entry['n_test']:,} others"
        f"{', a mean of folds' if 'folds' in entry else ''}; 0.5 would be perfect realism. {escape(entry['text'])}</p>"
        for name, entry in report["real_vs_synthetic"].items()
    ]
    return "<h3>Can synthetic images be told from real ones?</h3>" + "".join(lines)
