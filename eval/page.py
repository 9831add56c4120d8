"""The report's page: plain HTML with its pictures inside, readable without a network or a script."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from eval import charts
from eval.benefit import benefit_section, class_of
from eval.html import bracket, cell, escape, image, made_by, not_checked, number, section, table
from eval.results import PICTURE, ROOT, Results, headline
from tiger.conditions import read_gray, read_mask
from tiger.manifest import Manifest, Row

CONTROLS = {
    "mask_iou": "IoU of the requested mask with the nodule found in the image",
    "sobel_correlation": "correlation of the requested Sobel map with the image's own",
    "attribute_agreement": "share of the prompt's attributes that are seen in the image",
}
METRICS = {
    "fid": "FID ↓",
    "kid": "KID ↓",
    "cmmd": "CMMD (see above) ↓",
    "cmmd_unbiased": "CMMD, unbiased ↓",
    "density": "density ↑",
    "coverage": "coverage ↑",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "fid_infinity": "FID∞ ↓",
    "geometry_score": "geometry score ↓",
    "inception_score": "Inception score ↑",
}
LIKENESS = {
    "ssim": "SSIM",
    "gradient_similarity": "gradient similarity (Liu et al. 2012)",
    "phash_distance": "bits, of 64, in which perceptual hashes differ",
    "sifid": "SIFID",
}
PAIRINGS = {
    "random": "synthetic with a random real one of its class",
    "random real": "two real ones of a class",
    "condition": "synthetic with the real one whose Sobel map it was drawn after",
    "nearest": "synthetic with the nearest training image",
    "nearest real": "real held-out image with the nearest training image",
}
BOUNDS = ("ceiling", "floor")
SPECTRUM = (
    "<em>definition</em> and <em>detail</em> are judged by a local spectrum, and the embedded base's autoencoder was "
    "trained with a loss on local spectra, so these two figures are not independent of it."
)
TILE = 128  # px
COLUMNS = 8  # tiles a row


def page(results: Results, figures: Mapping[str, Any], title: str) -> str:
    """The whole page."""
    sections = {
        "Benefit": benefit_section(results),
        "Samples": samples_section(results),
        "Conditions": conditions_section(results),
        "Control": control_section(results),
        "Quality": quality_section(results),
        "Data": data_section(results),
        "Training": training_section(results),
        "Commands": commands_section(results),
    }
    shown = {name: body for name, body in sections.items() if body}
    links = "".join(f'<a href="#{name.lower()}">{name}</a>' for name in shown)
    machine = figures["machine"]
    made_on = f"{machine['processor']}, {machine['cores']} cores, Python {machine['python']}"
    timed = (entry for entry in results.commands if entry["seconds"] is not None)  # the others do not know their commit
    commits = {entry["commit"] for entry in timed}
    code = "; its stages ran at different commits of the code, see Commands" if len(commits) > 1 else ""
    if len(commits) == 1 and (commit := commits.pop()):
        code = f"; code at {commit[:12]}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{(Path(__file__).parent / "report.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
<header>
<h1>{escape(title)}</h1>
<p class="soft">{escape(results.folder)} on {escape(made_on)}{escape(code)}. Every figure is also in report.json.
For research; not for diagnosis.</p>
<nav>{links}</nav>
</header>
{cards(results)}
{"".join(shown.values())}
</main>
</body>
</html>
"""


# ------------------------------------------------------------------------------------------------------------- sections


def cards(results: Results) -> str:
    """The figures to see first: the benefit for the two rarest classes, and the three kinds of control."""
    shown: list[tuple[Mapping[str, float], str, str]] = []  # estimate, what it is, output that it comes from
    if results.classify:
        tasks, training = headline(results.classify), results.classify["n"]["train"]
        rarest = sorted({class_of(task): task for task in tasks}.values(), key=lambda task: training[class_of(task)])
        for task in rarest[:2]:
            arms = tasks[task]
            if {"tiger_f", "oversampling"} <= arms.keys():
                theirs = number(arms["oversampling"]["value"])
                shown.append((arms["tiger_f"], f"AUC {task} with Tiger-F; {theirs} with oversampling", "classify"))
    for name, title in CONTROLS.items() if results.control else ():
        part = (results.control or {})[name]
        ceiling, floor = (number(part[bound]["value"]) for bound in BOUNDS)
        text = f"{title}; {ceiling} in real images, {floor} with the requests of other images"
        shown.append((part["generated"], text, "control.json"))
    boxes = (
        f'<div class="card"><b>{number(estimate["value"])}</b><small>{bracket(estimate)}</small>'
        f"<span>{escape(text)}</span>{made_by(results, output)}</div>"
        for estimate, text, output in shown
    )
    return f'<div class="cards">{"".join(boxes)}</div>'


def control_section(results: Results) -> str:
    """Masks, maps and attributes: what was asked for against what judges see."""
    report = results.control
    if report is None:
        return ""
    head = ["", "generated", "ceiling", "of ceiling", "floor"]
    categories = report["attribute_agreement"]["categories"]
    of_class = [
        [escape(label), *(class_cell(report[name]["per_class"].get(label)) for name in CONTROLS)]
        for label in report["mask_iou"]["per_class"]
    ]
    text = (
        "Judged by nets that see the image alone; how they were trained is in their files. Ceiling: the same judges on "
        f"{number(report['n']['real'])} real images of split '{report.get('split', 'test')}'. Floor: the "
        f"{number(report['n']['generated'])} generated images against the requests of other images. In brackets, the "
        f"interval: {report['interval']}."
    )
    links = [made_by(results, name) for name in ("control.json", *(j["folder"] for j in report["judges"].values()))]
    return section(
        "control",
        "Do the images show what was asked for?",
        f"<p>{escape(text)} {' '.join(links)}</p>",
        not_checked(report),
        table(head, [control_row(title, report[name]) for name, title in CONTROLS.items()]),
        "<h3>By attribute</h3>",
        f"<p>{SPECTRUM}</p>" if {"definition", "detail"} <= categories.keys() else "",
        table(head, [control_row(name, part) for name, part in categories.items() if part]),
        "<h3>By class</h3>",
        table(["class", *(escape(name.replace("_", " ").replace("iou", "IoU")) for name in CONTROLS)], of_class),
    )


def control_row(title: str, part: Mapping[str, Any]) -> list[str]:
    """title, generated, ceiling, share of it, floor"""
    ratio = "–" if part["ratio_to_ceiling"] is None else f"{part['ratio_to_ceiling']:.0%}"
    return [escape(title), cell(part["generated"]), cell(part["ceiling"]), ratio, cell(part["floor"])]


def class_cell(part: Mapping[str, Any] | None) -> str:
    """One class's figure over its ceiling and its floor."""
    if part is None:
        return ""
    return cell(part["generated"], *(f"{name} {number(part[name]['value'])} {bracket(part[name])}" for name in BOUNDS))


def quality_section(results: Results) -> str:
    """Distances between real and synthetic images, and similarity of pairs."""
    report = results.quality
    if report is None:
        return ""
    left_out = "; ".join(f"{label}: {found}" for label, found in report["left_out"].items())
    every = f"{', '.join(report['classes'])} together" if left_out else "all classes"
    groups = {every: report["overall"], **report["per_class"]}
    metrics = {metric: title for metric, title in METRICS.items() if metric in report["overall"]}
    rows = [
        [
            escape(title),
            *(cell(p[metric], f"floor {number(p[metric]['floor'])}") if metric in p else "" for p in groups.values()),
        ]
        for metric, title in metrics.items()
    ]
    rows.insert(0, ["n", *(number(part["n"]) for part in groups.values())])
    likeness = [
        f"<h3>{escape(title)}</h3>{pair_table(groups, measure)}"
        for measure, title in LIKENESS.items()
        if measure in report["overall"]
    ]
    text = (
        f"Features of {report['extractor']}, images resized by {report['resize']}. CMMD: "
        f"{report['settings']['cmmd']['variant']}. Each value is the {report['value']}. Below it, its interval: "
        f"{report['interval']}. Floor: {report['floor']}. An arrow points to the better side."
        + (f" Left out, for too few images: {left_out}." if left_out else "")
    )
    return section(
        "quality",
        "How near are synthetic images to real ones?",
        f"<p>{escape(text)} {made_by(results, 'quality.json')}</p>",
        not_checked(report),
        table(["", *map(escape, groups)], rows),
        f"<p>Below, how alike pairs of images are; SSIM as {escape(report['ssim'])}.</p>",
        *likeness,
    )


def pair_table(groups: Mapping[str, Mapping[str, Any]], measure: str) -> str:
    """One measure of likeness: kinds of pairs by classes."""
    rows = [
        [escape(title), *(cell(part[measure][name]) if name in part[measure] else "" for part in groups.values())]
        for name, title in PAIRINGS.items()
        if any(name in part[measure] for part in groups.values())
    ]
    return table(["pair", *map(escape, groups)], rows)


def samples_section(results: Results) -> str:
    """Real beside synthetic images of each class."""
    if results.real is None or results.fake is None:
        return ""
    held_out = "test" if results.real.select(split="test").rows else "train"
    real, fake = by_class(results.real.select(split=held_out), COLUMNS), by_class(results.fake, COLUMNS)
    parts = []
    for label in (label for label in real if label in fake):
        rows = [tiles(results.real, real[label], "file_name"), tiles(results.fake, fake[label], "file_name")]
        caption = f"<b>{escape(label)}</b>: real images of the {held_out} split above, synthetic ones below."
        alt = f"Two rows of images of class {label}: real ones above, synthetic ones below"
        parts.append(image(charts.montage(rows), caption, alt, pixels=True))
    links = f"{made_by(results, 'data')} {made_by(results, 'generated')}"
    text = f"<p>Spread evenly over each set, not chosen. {links}</p>"
    return section("samples", "Real beside synthetic images", text, *parts) if parts else ""


def conditions_section(results: Results) -> str:
    """What each image was made from, beside what came out."""
    if results.fake is None:
        return ""
    per_class = by_class(results.fake, COLUMNS // max(1, len({row.label for row in results.fake.rows})) or 1)
    chosen = [row for rows in per_class.values() for row in rows if row.condition_fg and row.condition_bg][:COLUMNS]
    if not chosen:
        return ""
    images = tiles(results.fake, chosen, "file_name")
    masks = tiles(results.fake, chosen, "condition_fg")
    marked = [charts.outlined(*pair) for pair in zip(images, masks, strict=True)]
    prompts = "".join(f"<li><b>{escape(row.label)}</b>: {escape(row.text)}</li>" for row in chosen)
    return section(
        "conditions",
        "Masks and maps beside what they produced",
        image(
            charts.montage([masks, tiles(results.fake, chosen, "condition_bg"), images, marked]),
            "From above: nodule mask, Sobel map, generated image, the same with the mask's outline. "
            + made_by(results, "generated"),
            "Four rows: masks, Sobel maps, the images generated from them, and these with the masks' outlines",
            pixels=True,
        ),
        f"<p>Their prompts, from left to right:</p><ol>{prompts}</ol>",
    )


def data_section(results: Results) -> str:
    """The phantom beside real ultrasound: a picture that comes with the code."""
    if PICTURE not in results.shipped:
        return ""
    caption = (
        "Phantom images of seed 7 (below) beside published clinical images of thyroid nodules (above). The picture "
        f"comes with the code and shows no image of this run. {made_by(results, PICTURE['output'])}"
    )
    alt = "Two rows of ultrasound images: clinical ones above, phantom ones below"
    return section("data", "The data", image(charts.fit_png(ROOT / PICTURE["output"], 1000), caption, alt))


def training_section(results: Results) -> str:
    """Loss curves."""
    if not results.losses:
        return ""
    links = " ".join(made_by(results, name) for name in ("pretrain", "finetune"))
    caption = f"Losses by optimizer step; the strong line is a running mean. {links}"
    alt = f"Chart of losses by optimizer step, one panel each for {', '.join(results.losses)}"
    return section("training", "Training", image(charts.loss_chart(results.losses), caption, alt))


def commands_section(results: Results) -> str:
    """What made each figure, how long it took, and what made the nets that ship with the code."""
    if not results.commands and not results.shipped:
        return ""
    total = sum(entry["seconds"] or 0 for entry in results.commands)
    rows = [
        [
            escape(entry["title"]),
            number(entry["seconds"]),
            "–" if entry["seconds"] is None else f"{entry['seconds'] / max(1, total):.0%}",
            f"<code>{escape(entry['commit'][:12]) or '–'}</code>",
        ]
        for entry in results.commands
    ]
    times = table(["stage", "seconds", "share", "code"], [*rows, ["<b>all</b>", f"<b>{number(total)}</b>", "", ""]])
    before = "<p>Made before this run; what is in assets/ and docs/ was shipped with the code:</p>"
    return section(
        "commands",
        "Commands and time",
        times if total else "",
        *map(command_text, results.commands),
        before if results.shipped else "",
        *map(command_text, results.shipped),
    )


def command_text(entry: Mapping[str, Any]) -> str:
    """A command, where `made_by` links to."""
    return (
        f'<h3 id="made-{escape(entry["output"])}">{escape(entry["title"])} → {escape(entry["output"])}</h3>\n'
        f"<pre>{escape(entry['command'])}</pre>"
    )


# ---------------------------------------------------------------------------------------------------------------- parts


def by_class(rows: Manifest, count: int) -> dict[str, list[Row]]:
    """label -> at most `count` of its rows, evenly spread over the manifest."""
    found: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows.rows:
        found[row.label or "unlabelled"].append(row)
    return {
        label: [of[i * len(of) // count] for i in range(count)] if len(of) > count else of
        for label, of in found.items()
    }


def tiles(manifest: Manifest, rows: Iterable[Row], column: str) -> list[charts.Tile]:
    """The images of one column, each TILE px wide and high."""
    read = read_mask if column == "condition_fg" else read_gray
    return [read(manifest.file(row, column), TILE) for row in rows]
