"""The paper's tables and figures from saved results."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from eval_samples import write_dataset
from PIL import Image

from eval import classify, tables, typeset
from eval.typeset import Cell, Table
from tiger.errors import InputError, run
from tiger.files import read_json, write_json

CLASSES = ("benign", "FTC")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a small study with two amounts and two shares of the real images, and one of quality."""
    root = tmp_path_factory.mktemp("tables")
    held_out = {split: dict.fromkeys(CLASSES, 8) for split in ("valid", "test")}
    real = write_dataset(root / "real", {"train": {"benign": 12, "FTC": 8}, **held_out}, size=16)
    sources = [row.file_name for row in real.select(split="train").rows]
    write_dataset(
        root / "fake",
        {"train": dict.fromkeys(CLASSES, 4)},
        seed=1,
        size=16,
        synthetic=True,
        prefix="S",
        sources=sources,
    )
    write_dataset(root / "extra", {"train": dict.fromkeys(CLASSES, 6)}, seed=2, size=16, prefix="E")
    given = [
        "--real",
        root / "real",
        "--fake",
        root / "fake",
        "--extra_real",
        root / "extra",
        "--output",
        root / "report.json",
    ]
    small = ["--model", "resnet18", "--image_size", "16", "--train_batch_size", "8", "--max_train_steps", "1"]
    sweep = ["--amounts", "4,2", "--real_share", "1,0.55", "--resamples", "40", "--no_realism"]
    classify.main([*map(str, given), *small, *sweep])
    estimate = {"value": 0.5, "low": 0.4, "high": 0.6}
    metrics = dict.fromkeys(("cmmd", "density", "coverage", "geometry_score"), estimate | {"floor": 0.05})
    pairings = {"random": 0.1, "random real": 0.3, "condition": 0.7}
    of_class = metrics | {"n": 60, "ssim": {name: estimate | {"value": value} for name, value in pairings.items()}}
    write_json(root / "quality.json", {"extractor": "E 12ab, 224 px", "per_class": {"PTC": of_class, "FTC": of_class}})
    return root


@pytest.fixture(scope="module")
def made(study: Path) -> Path:
    """The folder of tables."""
    output = study / "tables"
    given = ["--classify", str(study / "report.json"), "--quality", f"sd_controlnet={study / 'quality.json'}"]
    tables.main([*given, "--output_dir", str(output)])
    return output


def lines(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_table_in_every_form_and_every_plot(made: Path) -> None:
    names = {f"table{i}.{suffix}" for i in range(2, 6) for suffix in ("md", "csv", "tex", "png")}
    names |= {f"figure5{part}.{suffix}" for part in "ab" for suffix in ("csv", "png")} | {
        "roc.png",
        "calibration.png",
        "figure5.md",
    }
    assert {path.name for path in made.iterdir()} == names
    for path in made.glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 100
    for path in made.glob("*.tex"):
        text = path.read_text()
        assert text.count(r"\begin{") == text.count(r"\end{") and text.count("{") == text.count("}")


def test_table3_has_our_figures_and_the_papers(study: Path, made: Path) -> None:
    report = read_json(study / "report.json")
    found = {(line["row"], line["column"]): line for line in lines(made / "table3.csv")}
    ours = report["arms"]["tiger_f, 4 a class"]["auc benign vs FTC"]  # the largest amount, all real images
    test = found["Tiger-F", "test"]
    assert [float(test[name]) for name in ("value", "low", "high")] == [ours[name] for name in ("value", "low", "high")]
    assert [test[name] for name in ("paper", "paper_low", "paper_high")] == ["0.8442", "0.75", "0.85"]
    assert (
        float(found["Tiger-F", "valid"]["value"])
        == report["arms"]["tiger_f, 4 a class"]["valid auc benign vs FTC"]["value"]
    )
    (pair,) = [
        one
        for one in report["comparisons"]
        if one["figure"] == "auc benign vs FTC"
        and (one["arm"], one["against"]) == ("tiger_f, 4 a class", "oversampling")
    ]
    assert float(test["p"]) == pair["p_holm"]
    assert found["PG-GAN", "test"]["paper"] == "0.6732" and not found["PG-GAN", "test"]["value"]
    assert found["real images as they are", "test"]["paper"] == "0.7364"
    assert not found["oversampling", "test"]["paper"]  # not an arm of the paper
    rows = list(dict.fromkeys(line["row"] for line in lines(made / "table3.csv")))
    assert rows[:2] == ["real images as they are", "oversampling"] and rows[-1] == "further real images"
    text = (made / "table3.md").read_text()
    assert "test images: benign 8, FTC 8; 8 patients" in text and "paper 0.844 (0.750–0.850)" in text


def test_generators_of_a_method_and_own_nets_stand_beside_the_papers(study: Path) -> None:
    text = (study / "report.json").read_text()
    text = text.replace('"tiger_f', '"tiger_n_1').replace("benign vs FTC", "benign vs FTC, own net")
    report = json.loads(text)
    for table, known in (
        (tables.table3(report, tables.published(), "oversampling"), [0.8132, 0.78, 0.83]),
        (tables.table4(report, tables.published(), "oversampling"), None),  # no such class in the paper's
    ):
        assert "Own net: one of these two classes alone" in table.caption
        assert table.rows["Tiger-N, generator 1"][1].value is not None
        assert known is None or table.rows["Tiger-N"][1] == Cell(paper=known)
    rows = list(tables.table3(report, tables.published(), "oversampling").rows)
    assert rows[-4:] == ["Tiger-N", "Tiger-N, generator 1", "Tiger-F", "further real images"]


def test_axes_say_what_was_counted(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, axes = dict(read_json(study / "report.json")), {}
    monkeypatch.setattr(tables, "write_curves", lambda name, curves, x, folder: axes.update({name: x}))
    tables.write_plots(report, [], tables.published(), tmp_path)
    assert axes == {"figure5a": "images added a class", "figure5b": "real training images, mean of seeds and folds"}
    older = {name: {k: v for k, v in of.items() if k != "real"} for name, of in report["arms"].items()}
    with pytest.raises(InputError, match="of older code; run eval.classify again"):
        tables.write_plots(report | {"arms": older}, [], tables.published(), tmp_path)


def test_a_path_may_hold_an_equals_sign(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a=b").mkdir()
    quality = shutil.copy(study / "quality.json", tmp_path / "a=b")
    for given in (str(quality), f"sd={quality}"):
        tables.main(["--quality", given, "--output_dir", str(tmp_path / "t"), "--dry_run"])
        assert "table2: can be made" in capsys.readouterr().out
    assert run(tables.main, ["--quality", f"sd={quality}", f"sd={quality}", "--output_dir", str(tmp_path)]) == 2
    assert "--quality sd=" in capsys.readouterr().err


def test_table2_has_floors_and_names_what_the_cmmd_is_of(study: Path, made: Path) -> None:
    found = {(line["group"], line["column"]): line for line in lines(made / "table2.csv") if line["value"]}
    assert {name: found["FTC", name]["floor"] for name in ("SSIM", "CMMD", "GS", "density", "coverage", "n")} == {
        "SSIM": "0.3", "CMMD": "0.05", "GS": "0.05", "density": "0.05", "coverage": "0.05", "n": ""
    }  # fmt: skip
    assert {column for _, column in found} == {"n", *tables.QUALITY.values()}  # no column without a figure of ours
    assert [name for (label, name), line in found.items() if label == "FTC" and line["extractor"]] == ["CMMD"]
    text = (made / "table2.md").read_text()
    assert (
        "0.500 [0.400, 0.600]<br>features of E 12ab<br>floor 0.050<br>paper 0.520" in text
    )  # the paper's is of CLIP's
    assert "Features of E 12ab, 224 px; the paper's CMMD is of CLIP's" in text


def test_tables_4_and_5_have_the_p_of_what_was_tested(study: Path, made: Path) -> None:
    report = read_json(study / "report.json")
    p = {
        one["figure"]: one["p_holm"]
        for one in report["comparisons"]
        if (one["arm"], one["against"]) == ("tiger_f, 4 a class", "oversampling")
    }
    for name, figure, column in (("table4", "auc benign vs FTC", "AUC"), ("table5", "macro_auc", "mean")):
        found = {line["column"]: line["p"] for line in lines(made / f"{name}.csv") if line["row"] == "Tiger-F"}
        assert float(found.pop(column)) == p[figure]
        assert set(found.values()) == {""}  # accuracy, single classes and Brier scores are not tested
        text = (made / f"{name}.md").read_text()
        assert "p: paired, against oversampling, adjusted after Holm; columns without p were not tested." in text


def test_table2_takes_the_pairing_with_the_same_map(made: Path) -> None:
    found = {(line["row"], line["group"], line["column"]): line for line in lines(made / "table2.csv")}
    ssim = found["Stable Diffusion + ControlNet", "FTC", "SSIM"]
    assert (ssim["value"], ssim["paper"]) == ("0.7", "0.68")
    assert found["Stable Diffusion + ControlNet", "FTC", "n"]["value"] == "60"
    assert found["Stable Diffusion + ControlNet", "PTC", "GS"]["paper"] == "0.000728"
    assert found["Tiger-F", "FTC", "CMMD"]["paper"] == "0.32"


def test_table5_has_all_classes_and_no_figures_of_other_diseases(study: Path, made: Path) -> None:
    found = lines(made / "table5.csv")
    assert {line["column"] for line in found} == {"accuracy", "mean", "benign", "FTC", "Brier score, summed"}
    assert not any(line["paper"] for line in found)
    assert "Brier score: squared errors, summed over the classes, 0 to 2." in (made / "table5.md").read_text()
    classes = ("Bronchitis", "Pneumonia", "Broncho-pneumonia", "Bronchiolitis")
    report = json.loads(json.dumps(read_json(study / "report.json")))
    report["n"] = {name: dict.fromkeys(classes, 5) for name in ("train", "test")}
    table = tables.table5(report, tables.published(), "oversampling")
    assert "summed over the classes, 0 to 2; the paper does not say which of its forms it has." in table.caption
    assert table.rows["Tiger-F"][0].paper == [0.8229, 0.81, 0.84]


def test_figure5_has_a_point_for_each_amount_and_share(made: Path) -> None:
    a, b = lines(made / "figure5a.csv"), lines(made / "figure5b.csv")
    assert [line["x"] for line in a if line["line"] == "Tiger-F"] == ["0", "2", "4"]  # 0: oversampling
    assert {line["line"] for line in b} >= {
        "oversampling",
        "Tiger-F, 2 a class",
        "Tiger-F, 4 a class",
        "further real images, 4 a class",
    }
    assert [line["x"] for line in b if line["line"] == "oversampling"] == [
        "10",
        "20",
    ]  # 3 and 2 patients, not 55 % of 20


def test_what_cannot_be_made_is_one_line(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output_dir", str(tmp_path / "t")]
    assert run(tables.main, output) == 2
    assert run(tables.main, ["--classify", str(study / "quality.json"), *output]) == 2
    shutil.copy(study / "report.json", tmp_path / "report.json")
    assert run(tables.main, ["--classify", str(tmp_path / "report.json"), *output]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert "give --classify" in errors[0] and "has no 'comparisons'" in errors[1] and "lacks none-seed0" in errors[2]
    tables.main(["--classify", str(study / "report.json"), "--dry_run", *output])
    assert not (tmp_path / "t").exists()


def test_special_signs_survive_latex() -> None:
    table = Table("t", "50 % of a_b & {c}", [("g", "↓ <x>")], {"row#1": [Cell(0.5, 0.4, 0.6, 0.0001), Cell(None)][:1]})
    text = typeset.latex(table)
    assert r"50 \% of a\_b \& \{c\}" in text and r"row\#1" in text and r"$\downarrow$ $<$x$>$" in text
    assert r"\makecell[t]{0.500 [0.400, 0.600] \\ p $<$ 0.001}" in text
    assert "| row#1 | 0.500 [0.400, 0.600]<br>p < 0.001 |" in typeset.markdown(table)
