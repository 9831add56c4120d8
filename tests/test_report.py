"""The report: every figure of the evaluations is on a page that needs nothing but itself."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_samples import write_dataset
from PIL import Image

from eval import charts, classify, control, figures, quality, report
from eval.benefit import benefit_section
from eval.html import bracket, difference, number
from eval.judges import AttributeNet, Segmenter, save_judge
from eval.page import control_section, quality_section
from eval.results import PICTURE, read_results
from tiger import manifest
from tiger.errors import run
from tiger.files import read_json, write_json

COUNTS = {
    "train": {"benign": 8, "FTC": 4},
    "valid": {"benign": 4, "FTC": 4},
    "test": {"benign": 16, "FTC": 16},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose evaluations are the real ones, on toy images and with nets that know nothing."""
    folder = tmp_path_factory.mktemp("run")
    real = write_dataset(folder / "data", COUNTS)
    manifest.write(real.path, [replace(row, source="phantom") for row in real.rows])
    write_dataset(folder / "extra", {"train": {"benign": 12, "FTC": 6}}, seed=2, prefix="E")
    sources = [row.file_name for row in real.select(split="train").rows]
    fake = {"train": {"benign": 12, "FTC": 12}}
    write_dataset(folder / "generated", fake, seed=1, synthetic=True, prefix="S", sources=sources)
    save_judge(Segmenter(4, 32), folder / "judges" / "segmenter")
    places = {"location": ["upper pole", "middle pole", "inferior pole"]}
    save_judge(AttributeNet(places, 4, 32), folder / "judges" / "attributes")
    for name in ("segmenter", "attributes"):
        write_json(folder / "judges" / name / "metrics.json", {"command": f"train the {name}"})
    sets = ["--real", str(folder / "data"), "--fake", str(folder / "generated")]
    quality.main([*sets, "--output", str(folder / "quality.json"), "--cache_dir", str(folder / "cache")])
    control.main([*sets, "--output", str(folder / "control.json"), "--judges", str(folder / "judges")])
    sets += ["--extra_real", str(folder / "extra")]
    small = ["--model", "resnet18", "--image_size", "32", "--max_train_steps", "2", "--resamples", "20"]
    classify.main([*sets, "--output", str(folder / "classify" / "report.json"), *small, "--seeds", "0", "1"])
    for stage, names in (("pretrain", ["loss"]), ("finetune", ["loss", "loss_fg", "loss_bg"])):
        lines = [{"step": 20 * i, **dict.fromkeys(names, 1 / (1 + i)), "learning_rate": 1e-4} for i in range(1, 9)]
        (folder / stage).mkdir()
        (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    outputs = ["data", "pretrain", "finetune", "generated", "quality.json", "control.json", "classify"]
    entries = [
        {"output": o, "title": f"make <{o}>", "seconds": 7, "command": f"run --o '{o}' --base assets/tiny-base && done"}
        for o in outputs
    ]
    commits = [40 * "a", *6 * [40 * "b"]]
    write_json(folder / "commands.json", [e | {"commit": c} for e, c in zip(entries, commits, strict=True)])
    report.main(["--run", str(folder)])
    return folder


class Page(HTMLParser):
    """What a page holds."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.images: list[str] = []
        self.alts: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        self.ids |= {values["id"]} if "id" in values else set()
        self.links += [values["href"]] if "href" in values else []
        self.images += [values["src"]] if "src" in values else []
        self.alts += [values["alt"]] if "alt" in values else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_page_stands_alone(folder: Path, page: Page) -> None:
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert page.open == []
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "http" not in source and "url(" not in source and "@import" not in source
    assert all(src.startswith("data:image/png;base64,") for src in page.images)
    for src in page.images:
        Image.open(io.BytesIO(base64.b64decode(src.partition(",")[2]))).verify()
    assert len(set(page.alts)) == len(page.images) and all(len(alt) > 20 for alt in page.alts)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links), page.links


def test_every_section_is_there(page: Page) -> None:
    sections = {"benefit", "control", "quality", "samples", "conditions", "data", "training", "commands"}
    assert sections <= page.ids


def values(part: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], float]]:
    """(path, value) of every estimate in a report."""
    found = []
    if isinstance(part, dict):
        if {"value", "low", "high"} <= part.keys():
            found += [((*path, name), part[name]) for name in ("value", "low", "high")]
        for name, inner in part.items():
            found += values(inner, (*path, name))
    return found


def test_every_figure_is_on_the_page_and_in_the_json(folder: Path, page: Page) -> None:
    figures = read_json(folder / "report.json")
    parts = {"quality": "quality.json", "control": "control.json", "classify": "classify/report.json"}
    for name, file in parts.items():
        evaluation = read_json(folder / file)
        assert figures[name] == evaluation
        shown = [(path, value) for path, value in values(evaluation) if not hidden(path)]
        assert len(shown) > 10
        missing = [(path, value) for path, value in shown if number(value) not in page.text]
        assert not missing
    assert (
        figures["headline"]["benign vs FTC"]["tiger_f"] == figures["classify"]["arms"]["tiger_f"]["auc benign vs FTC"]
    )
    assert number(figures["classify"]["real_vs_synthetic"]["tiger_f"]["auc"]) in page.text
    assert figures["classify"]["real_vs_synthetic"]["tiger_f"]["text"] in page.text
    assert figures["stages"] == read_json(folder / "commands.json")
    assert figures["training"]["fine training"]["loss fg"] == {"first": 0.5, "last": pytest.approx(1 / 9)}


def hidden(path: tuple[str, ...]) -> bool:
    """Figures that the page leaves to report.json: attributes by class."""
    return "per_class" in path and "categories" in path


def test_every_command_is_shown_and_linked(folder: Path, page: Page) -> None:
    for entry in read_json(folder / "commands.json"):
        assert entry["command"] in page.text
        assert f"#made-{entry['output']}" in page.links


def test_what_was_not_made_by_the_run_is_shown_and_linked(folder: Path, page: Page) -> None:
    shipped = {entry["output"]: entry["command"] for entry in read_json(folder / "report.json")["shipped"]}
    assert all(command in page.text for command in shipped.values())
    judges = [str(folder / "judges" / name) for name in ("segmenter", "attributes")]
    assert [shipped[judge] for judge in judges] == ["train the segmenter", "train the attributes"]
    assert {f"#made-{output}" for output in (*judges, PICTURE["output"])} <= set(page.links)
    assert shipped["assets/tiny-base/unet"] == "bash assets/build.sh"
    assert "tiger.base autoencoder" in shipped["assets/tiny-base/autoencoder"]


def test_cards_have_an_interval_a_comparison_and_a_link(folder: Path) -> None:
    source = (folder / "report.html").read_text(encoding="utf-8")
    cards = re.findall(r'<div class="card">(.*?)</div>', source)
    assert len(cards) == 4
    mask = read_json(folder / "control.json")["mask_iou"]
    assert bracket(mask["generated"]) in cards[1]
    assert f"{number(mask['floor']['value'])} with the requests of other images" in cards[1]
    links = ["#made-classify", *3 * ["#made-control.json"]]
    assert all(f'href="{link}"' in card for card, link in zip(cards, links, strict=True))


def test_text_says_how_far_figures_reach(page: Page) -> None:
    assert "resnet18 on images of 32 px, trained from scratch for 2 steps in every arm" in page.text
    assert "mean of 2 training seeds" in page.text
    assert "It covers the choice of test patients and the seeds" in page.text
    assert "puts 25% synthetic images into every class of each batch" in page.text
    assert "Differences between arms" in page.text and "Holm: p adjusted over all pairs" in page.text
    assert "resnet18 on images of 32 px, trained for 1 steps on " in page.text
    assert "Further real images are fewer than synthetic ones (FTC 6 of 12)" in page.text
    assert "60% of benign, 60% of FTC in a batch" in page.text  # 12 of 20 and 6 of 10
    assert "shows no image of this run" in page.text
    assert "Each class is drawn equally often, but from real images as they are: there as often as" in page.text
    assert page.text.count("24 rows do not say which model made them") == 3  # of quality, control and benefit
    assert page.text.count("Not checked for leaks: ") >= 3
    assert "Hosmer–Lemeshow χ²one image a patient; medians, p doubled" in page.text
    assert "10 degrees of freedom, as many as groups, as the net was fitted on other cases" in page.text
    assert "cases of equal risk share their outcomes" in page.text
    assert "Brier, of the positive class ↓" in page.text and "Brier, summed over the classes ↓" in page.text


def test_what_is_not_the_same_in_every_arm_is_said(folder: Path) -> None:
    results = read_results(folder)
    assert results.classify is not None and "nets, one a share" not in benefit_section(results)
    results.classify["settings"] |= {"share": [0.25, 0.5]}
    assert "the best on valid of 2 nets, one a share, is tested; all other arms have one net." in benefit_section(
        results
    )
    results.classify["settings"] |= {"policy": "pooled"}
    section = benefit_section(results)
    assert "but from real images as they are and the pool: there as" in section and "one a share" not in section


def test_numbers_of_images_over_folds_are_explained(folder: Path, page: Page) -> None:
    results, text = read_results(folder), "For test in all folds, else the mean of the folds."
    assert results.classify is not None and text not in page.text
    results.classify["settings"]["folds"] = 3
    assert text in benefit_section(results)


def test_judges_that_know_the_base_are_named(folder: Path) -> None:
    results = read_results(folder)
    assert results.control is not None
    assert "not independent" not in control_section(results)
    categories = results.control["attribute_agreement"]["categories"]
    categories |= dict.fromkeys(("definition", "detail"), categories["location"])
    assert "these two figures are not independent of it" in control_section(results)


def test_classes_that_were_left_out_are_named(folder: Path) -> None:
    results = read_results(folder)
    assert results.quality is not None
    assert "all classes" in quality_section(results)
    results.quality["left_out"] = {"MTC": "1 real images of 1 patients, 9 synthetic ones"}
    section = quality_section(results)
    assert "all classes" not in section and "benign, FTC together" in section
    assert "Left out, for too few images: MTC: 1 real images" in section


def test_a_difference_has_its_sign_and_none_where_it_is_nothing() -> None:
    assert difference({"value": -0.0004, "low": -0.0254, "high": 0.0246}).startswith("0.000<br><small>[-0.025, +0.025]")


def test_commits_are_those_of_the_stages(folder: Path, page: Page, tmp_path: Path) -> None:
    assert "stages ran at different commits" in page.text
    assert 12 * "a" in page.text and 12 * "b" in page.text
    (tmp_path / "quality.json").write_text((folder / "quality.json").read_text())
    write_json(tmp_path / "commands.json", read_json(folder / "commands.json")[1:])
    report.main(["--run", str(tmp_path)])
    assert f"code at {12 * 'b'}." in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_results_of_other_code_are_refused_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = read_json(folder / "quality.json")
    del old["left_out"]
    write_json(tmp_path / "quality.json", old)
    assert run(report.main, ["--run", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a result lacks 'left_out'" in line


def test_curves_have_the_reported_area(folder: Path) -> None:
    found = read_json(folder / "classify" / "report.json")
    runs = figures.read_runs(folder / "classify", [name for name in found["runs"] if name.endswith("seed0")])
    fpr, tpr = figures.roc_curves(runs, "benign")["benign vs FTC"]["none"]
    of_seed = found["arms"]["none"]["auc benign vs FTC"]["per_seed"][0]
    assert np.trapezoid(tpr, fpr) == pytest.approx(of_seed)
    predicted, observed = figures.calibration_curves(runs, "benign")["benign vs FTC"]["none"]
    assert len(predicted) == 10 and predicted == sorted(predicted)
    assert sum(observed) > 0 and max(observed) <= 1


def test_parts_that_are_missing_are_left_out(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "quality.json").write_text((folder / "quality.json").read_text())
    report.main(["--run", str(tmp_path)])
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "quality" in page.ids
    assert not {"benefit", "control", "samples"} & page.ids
    assert "made-quality.json" in page.ids  # a result says what made it, where no quickstart noted it


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert run(report.main, ["--run", str(tmp_path / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search("no such folder|holds no", line)


def test_dry_run_writes_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "quality.json").write_text((folder / "quality.json").read_text())
    report.main(["--run", str(tmp_path), "--dry_run"])
    assert [path.name for path in tmp_path.iterdir()] == ["quality.json"]


def test_numbers() -> None:
    given = [0.12345, 0.0012, 0.0, 12345, -0.5, None, float("nan"), 0.005, 123.456]
    assert [number(x) for x in given] == ["0.123", "1.20e-03", "0.000", "12,345", "-0.500", "–", "–", "0.005", "123.5"]


def test_montage_and_outline() -> None:
    grey, mask = np.full((20, 20), 100, np.uint8), np.zeros((20, 20), np.uint8)
    mask[5:15, 5:15] = 255
    marked = charts.outlined(grey, mask)
    assert tuple(marked[5, 5]) == charts.OUTLINE and tuple(marked[10, 10]) == (100,) * 3
    assert grey.max() == 100  # not drawn on
    with Image.open(io.BytesIO(charts.montage([[grey, marked], [mask]]))) as image:
        assert image.size == (2 * 20 + charts.GAP, 2 * 20 + charts.GAP)
