"""The paper's tables and figures from saved results."""

import csv
import json
import lzma
import re
import shutil
from pathlib import Path

import pytest
from eval_samples import write_dataset
from PIL import Image

from eval import classify, figures, tables, typeset
from eval.runs import read_table
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


@pytest.fixture(scope="module")
def remade(study: Path) -> tables.Report:
    """What the tables are made from."""
    return tables.remade(*tables.read_study(str(study / "report.json")), None, None)


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


def test_axes_say_what_was_counted(remade: tables.Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = {}
    monkeypatch.setattr(tables, "write_curves", lambda name, curves, x, folder: axes.update({name: x}))
    tables.write_plots(remade, [], tables.published(), tmp_path)
    assert axes == {"figure5a": "images added a class", "figure5b": "real training images, mean of seeds and folds"}


def test_tables_are_made_from_the_scores_alone(study: Path, made: Path, tmp_path: Path) -> None:
    table = (study / "report_scores.csv").read_bytes()
    (tmp_path / "kept.csv.xz").write_bytes(lzma.compress(table))
    given = ["--classify", str(tmp_path / "kept.csv.xz"), "--resamples", "40"]
    tables.main([*given, "--output_dir", str(tmp_path / "t")])
    names = {path.name for path in made.iterdir() if not path.name.startswith("table2")}
    assert {path.name for path in (tmp_path / "t").iterdir()} == names
    for name in names:
        assert (tmp_path / "t" / name).read_bytes() == (made / name).read_bytes(), name


def test_figures_of_a_report_cannot_contradict_its_scores(study: Path, made: Path, tmp_path: Path) -> None:
    report = read_json(study / "report.json")
    shutil.copy(study / "report_scores.csv", tmp_path)
    changed = {name: {k: {"value": 0.123} if "auc" in k else v for k, v in of.items()} for name, of in
               report["arms"].items()}  # fmt: skip
    write_json(tmp_path / "report.json", report | {"arms": changed, "comparisons": []})
    given = ["--classify", str(tmp_path / "report.json"), "--output_dir", str(tmp_path / "t")]
    tables.main(given)
    for name in ("table3.csv", "table4.csv", "table5.csv", "figure5a.csv", "figure5b.csv"):
        assert (tmp_path / "t" / name).read_bytes() == (made / name).read_bytes()
    del changed["none"]
    write_json(tmp_path / "report.json", report | {"arms": changed})
    with pytest.raises(InputError, match="report_scores.csv has other arms than .*report.json; run eval.classify"):
        tables.main(given)


def test_a_table_of_older_code_needs_its_report_for_figure5b(study: Path, tmp_path: Path) -> None:
    """It does not say how many real images there were, nor of which net it is."""
    with open(study / "report_scores.csv", encoding="utf-8", newline="") as file:
        rows = [{k: v for k, v in row.items() if k not in ("model", "image_size", "real_images")}
                for row in csv.DictReader(file)]  # fmt: skip
    with open(tmp_path / "report_scores.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    runs = [figures.read_run(one) for one in read_table(tmp_path / "report_scores.csv")]
    alone = tables.remade(runs, {}, None, 5)
    assert tables.sizes(alone).startswith("1 seed; test images: benign 8, FTC 8; 8 patients.")
    with pytest.raises(InputError, match="of older code, and say not how many real images .* give its report"):
        tables.figure5b(alone)
    report = read_json(study / "report.json")
    of_report = tables.remade(runs, report, None, 5)
    assert tables.sizes(of_report).startswith("resnet18, 16 px, 1 seed;")
    curve = tables.figure5b(of_report)["benign vs FTC"]["oversampling"]
    assert [count for count, _ in curve] == [10, 20]


def test_flags_say_what_the_scores_do_not(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--classify", str(study / "report_scores.csv"), "--resamples", "5", "--output_dir", str(tmp_path)]
    tables.main([*given, "--negative", "FTC"])
    assert {line["group"] for line in lines(tmp_path / "table4.csv")} == {"FTC vs benign"}
    assert run(tables.main, [*given, "--negative", "normal"]) == 2
    assert run(tables.main, [*given, "--against", "foo"]) == 2
    assert run(tables.main, [*given, "--resamples", "1"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "--negative normal: no such class; there are benign, FTC" in errors[0]
    assert "--against foo: no such arm; there are none, oversampling, tiger_f, real_upper" in errors[1]
    assert "--resamples 1: must be 2 or more" in errors[2] and len(errors) == 3
    own = (study / "report_scores.csv").read_text().replace(",all,", ",FTC,").replace("benign", "normal")
    (tmp_path / "own.csv").write_text(own)
    given = ["--classify", str(tmp_path / "own.csv"), "--resamples", "5", "--output_dir", str(tmp_path / "t")]
    assert run(tables.main, given) == 2
    assert "own.csv: no net knows benign; name another --negative" in capsys.readouterr().err
    without = [one for one in read_table(study / "report_scores.csv") if one["settings"]["arm"] in ("none", "tiger_f")]
    report = tables.remade([figures.read_run(one) for one in without], {}, None, 5)
    assert tables.baseline(report, None) == "none"  # the first arm, where there is no oversampling
    assert tables.baseline(report, "tiger_f") == "tiger_f"


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


def test_every_column_of_the_test_split_has_its_p(study: Path, made: Path) -> None:
    report = read_json(study / "report.json")
    p = {
        one["figure"]: one["p_holm"]
        for one in report["comparisons"]
        if (one["arm"], one["against"]) == ("tiger_f, 4 a class", "oversampling")
    }
    shown = {
        "table3": {"test": "auc benign vs FTC"},
        "table4": {"accuracy": "accuracy benign vs FTC", "AUC": "auc benign vs FTC"},
        "table5": {"accuracy": "accuracy", "mean": "macro_auc", "benign": "auc benign", "FTC": "auc FTC"}
        | {"Brier score, summed": "brier"},
    }
    for name, columns in shown.items():
        found = {line["column"]: line["p"] for line in lines(made / f"{name}.csv") if line["row"] == "Tiger-F"}
        assert {column: float(found[column]) for column in columns} == {c: p[figure] for c, figure in columns.items()}
        text = (made / f"{name}.md").read_text()
        assert "p: paired, against oversampling, adjusted after Holm over all pairs of arms in a column." in text
        assert ("No p on valid: states and thresholds are chosen there." in text) == (name == "table3")
        assert set(found) - set(columns) == ({"valid"} if name == "table3" else set())


def test_table2_takes_the_pairing_with_the_same_map(made: Path) -> None:
    found = {(line["row"], line["group"], line["column"]): line for line in lines(made / "table2.csv")}
    ssim = found["Stable Diffusion + ControlNet", "FTC", "SSIM"]
    assert (ssim["value"], ssim["paper"]) == ("0.7", "0.68")
    assert found["Stable Diffusion + ControlNet", "FTC", "n"]["value"] == "60"
    assert found["Stable Diffusion + ControlNet", "PTC", "GS"]["paper"] == "0.000728"
    assert found["Tiger-F", "FTC", "CMMD"]["paper"] == "0.32"


def test_table5_has_all_classes_and_no_figures_of_other_diseases(remade: tables.Report, made: Path) -> None:
    found = lines(made / "table5.csv")
    assert {line["column"] for line in found} == {"accuracy", "mean", "benign", "FTC", "Brier score, summed"}
    assert not any(line["paper"] for line in found)
    assert "Brier score: squared errors, summed over the classes, 0 to 2." in (made / "table5.md").read_text()
    classes = ("Bronchitis", "Pneumonia", "Broncho-pneumonia", "Bronchiolitis")
    table = tables.table5({**remade, "n": {"test": dict.fromkeys(classes, 5)}}, tables.published(), "oversampling")
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
    assert "give --classify" in errors[0] and "has no 'settings'" in errors[1]
    assert "report_scores.csv: no such file, and tables are made from the scores; run eval.classify again" in errors[2]
    tables.main(["--classify", str(study / "report.json"), "--dry_run", *output])
    assert not (tmp_path / "t").exists()


def test_tables_of_scores_that_cannot_be_compared_are_refused(study: Path, tmp_path: Path) -> None:
    rows = (study / "report_scores.csv").read_text().splitlines(keepends=True)
    part = tmp_path / "part.csv"
    part.write_text("".join(row for row in rows if not row.startswith('"tiger_f')))
    tables.read_study(str(part))  # fewer arms are fine
    part.write_text("".join(row.replace("none,all,0,", "none,all,1,") for row in rows))
    with pytest.raises(InputError, match="oversampling has other tasks, seeds or folds than none"):
        tables.read_study(str(part))
    first = next(row for row in rows if row.startswith("none,all,0,,test,"))
    part.write_text("".join(row for row in rows if row != first))
    with pytest.raises(InputError, match="oversampling, seed 0: its test images are others than before it"):
        tables.read_study(str(part))


@pytest.mark.parametrize(
    ("flag", "name", "content", "told"),
    [
        ("--classify", "report.json", b"no JSON", "report.json: not JSON .*; give a report of the right kind"),
        ("--classify", "README.md", b"a,b\n1\n1,2,3\n", "README.md: not JSON"),
        ("--classify", "binary.json", bytes(range(256)), "binary.json: not JSON"),
        ("--classify", "list.json", b"[1]", "list.json: has no 'settings'"),
        ("--classify", "other.csv", b"a,b\n1\n1,2,3\n", "other.csv: cannot be read as a table of scores"),
        ("--classify", "few.csv", b"a,b\n1,2\n", "few.csv: not a table of scores"),
        ("--classify", "packed.csv.xz", b"no archive", "packed.csv.xz: cannot be read as a table of scores"),
        ("--classify", "gone.csv", None, "gone.csv: no such file"),
        ("--quality", "report_scores.csv", b"arm,task\nnone,all\n", "report_scores.csv: not JSON"),
        ("--quality", "quality.json", b'{"per_class": {}}', "quality.json: has no 'extractor'"),
        ("--quality", "gone.json", None, "gone.json: no such file"),
    ],
)
def test_files_of_another_kind_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, name: str, content: bytes | None, told: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run(tables.main, [flag, str(tmp_path / name), "--output_dir", str(tmp_path / "t")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(told, line), line


def test_special_signs_survive_latex() -> None:
    table = Table("t", "50 % of a_b & {c}", [("g", "↓ <x>")], {"row#1": [Cell(0.5, 0.4, 0.6, 0.0001), Cell(None)][:1]})
    text = typeset.latex(table)
    assert r"50 \% of a\_b \& \{c\}" in text and r"row\#1" in text and r"$\downarrow$ $<$x$>$" in text
    assert r"\makecell[t]{0.500 [0.400, 0.600] \\ p $<$ 0.001}" in text
    assert "| row#1 | 0.500 [0.400, 0.600]<br>p < 0.001 |" in typeset.markdown(table)
