"""The report: every figure of the evaluations is on a page that needs nothing but itself."""

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_samples import write_dataset
from PIL import Image

from eval import charts, classify, control, quality, report, statistics
from eval.judges import AttributeNet, Segmenter, save_judge
from eval.page import number
from eval.results import roc_curves
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
    sources = [row.file_name for row in real.select(split="train").rows]
    fake = {"train": {"benign": 12, "FTC": 12}}
    write_dataset(folder / "generated", fake, seed=1, synthetic=True, prefix="S", sources=sources)
    save_judge(Segmenter(4, 32), folder / "judges" / "segmenter")
    places = {"location": ["upper pole", "middle pole", "inferior pole"]}
    save_judge(AttributeNet(places, 4, 32), folder / "judges" / "attributes")
    sets = ["--real", str(folder / "data"), "--fake", str(folder / "generated")]
    quality.main([*sets, "--output", str(folder / "quality.json"), "--cache_dir", str(folder / "cache")])
    control.main([*sets, "--output", str(folder / "control.json"), "--judges", str(folder / "judges")])
    small = ["--model", "resnet18", "--image_size", "32", "--max_train_steps", "2", "--resamples", "20"]
    classify.main([*sets, "--output", str(folder / "classify" / "report.json"), *small, "--seeds", "0", "1"])
    for stage, names in (("pretrain", ["loss"]), ("finetune", ["loss", "loss_fg", "loss_bg"])):
        lines = [{"step": 20 * i, **dict.fromkeys(names, 1 / (1 + i)), "learning_rate": 1e-4} for i in range(1, 9)]
        (folder / stage).mkdir()
        (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    outputs = ["data", "pretrain", "finetune", "generated", "quality.json", "control.json", "classify"]
    entries = [
        {"output": o, "title": f"make <{o}>", "seconds": 7, "command": f"run --o '{o}' && done"} for o in outputs
    ]
    write_json(folder / "commands.json", entries)
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
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links), page.links


def test_every_section_is_there(page: Page) -> None:
    sections = {"benefit", "control", "quality", "samples", "conditions", "training", "commands"}
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
    assert number(figures["classify"]["real_vs_synthetic"]["auc"]) in page.text
    assert figures["stages"] == read_json(folder / "commands.json")
    assert figures["training"]["fine training"]["loss fg"] == {"first": 0.5, "last": pytest.approx(1 / 9)}


def hidden(path: tuple[str, ...]) -> bool:
    """Figures that the page leaves to report.json: attributes by class, and intervals of ceilings and floors."""
    return (
        "per_class" in path and "categories" in path or ("ceiling" in path or "floor" in path) and path[-1] != "value"
    )


def test_every_command_is_shown_and_linked(folder: Path, page: Page) -> None:
    for entry in read_json(folder / "commands.json"):
        assert entry["command"] in page.text
        assert f"#made-{entry['output']}" in page.links


def test_roc_curves_have_the_reported_area(folder: Path) -> None:
    path = folder / "classify" / "scores.csv"
    curves = roc_curves(path, ["benign vs FTC"])["benign vs FTC"]
    with open(path, newline="") as file:
        records = [record for record in csv.DictReader(file) if record["arm"] == "none"]
    score = {name: [0.0, 0.0] for name in {record["file_name"] for record in records}}
    for record in records:  # two seeds
        pair = [float(record["p_FTC"]), float(record["p_benign"])]
        score[record["file_name"]][0] += pair[0] / sum(pair)
        score[record["file_name"]][1] = record["label"] == "FTC"
    area = statistics.auc([y for _, y in score.values()], [s for s, _ in score.values()])
    assert np.trapezoid(curves["none"][1], curves["none"][0]) == pytest.approx(area)


def test_parts_that_are_missing_are_left_out(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "quality.json").write_text((folder / "quality.json").read_text())
    report.main(["--run", str(tmp_path)])
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "quality" in page.ids
    assert not {"benefit", "control", "samples", "commands"} & page.ids


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
