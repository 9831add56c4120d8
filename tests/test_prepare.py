"""The data CLI: sources, check, split, conditions, phantom, and their exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.prepare import main
from data.sources import breast
from tiger.errors import run
from tiger.knowledge import Knowledge
from tiger.manifest import check, read

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT.parent / "shared" / "data" / "tiger_thyroid"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="the published samples are not here")


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)


def noise(seed: int, size: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (size, size + 8))


def square(x: int = 10) -> np.ndarray:
    mask = np.zeros((40, 48))
    mask[10:20, x : x + 10] = 255
    return mask


@needs_samples
def test_build_mends_the_published_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert (
        run(main, ["build", "--source", "tiger_thyroid", "--input", str(SAMPLES), "--output_dir", str(tmp_path)]) == 0
    )
    told = capsys.readouterr().out
    assert told.count("removed a white bar") == 3
    assert told.count("held a JPEG") == 2
    assert told.count("contradicted itself") == 1
    data = read(tmp_path)
    check(data, conditions=True, knowledge=Knowledge.load("thyroid"))
    assert sorted(str(row.label) for row in data.rows) == ["FTC", "FTC", "MTC", "PTC", "PTC", "PTC", "PTC"]
    for row in data.rows:
        assert Image.open(data.file(row, "file_name")).mode == "L"
        assert np.array(Image.open(data.file(row, "condition_fg")))[:3].max() == 0
    assert run(main, ["check", "--data_dir", str(tmp_path)]) == 0
    assert run(main, ["check", "--data_dir", str(SAMPLES / "init_image")]) == 2


def breast_folder(folder: Path) -> Path:
    """Ten cases in BrEaST's layout: two of them normal, one with a second lesion."""
    import openpyxl

    workbook = openpyxl.Workbook()
    sheet = workbook.active
    assert sheet is not None
    sheet.append(breast.COLUMNS)
    for i in range(10):
        name, normal = f"case{i:03d}", i >= 8
        save(folder / "images" / f"{name}.png", np.dstack([noise(i)] * 3))
        if not normal:
            save(folder / "images" / f"{name}_tumor.png", square())
        if i == 0:
            save(folder / "images" / f"{name}_other1.png", square(30))
        descriptors = ["not applicable"] * len(breast.ATTRIBUTES)
        if not normal:
            descriptors = ["oval", "not circumscribed - indistinct&angular", "complex cystic/solid", "yes", "in a mass",
                           "lactating&homogeneous: fat", "combined", "no"]  # fmt: skip
        label = "normal" if normal else "malignant" if i < 4 else "benign"
        masks = [None, None] if normal else [f"{name}_tumor.png", f"{name}_other1.png" if i == 0 else None]
        sheet.append([i, f"{name}.png", *masks, label, *descriptors])
    workbook.save(folder / "X-clinical-data.xlsx")
    return folder


def test_build_breast(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = breast_folder(tmp_path / "in")
    argv = [
        "build",
        "--source",
        "breast",
        "--input",
        str(source),
        "--output_dir",
        str(tmp_path / "out"),
        "--size",
        "32",
    ]
    assert run(main, argv) == 0
    assert "left out 2 of 10" in capsys.readouterr().out
    data = read(tmp_path / "out")
    check(data, conditions=True, knowledge=Knowledge.load("breast"))
    assert len(data.rows) == 8
    row = data.rows[0]
    assert row.text_fg == "malignant, oval, angular, complex cystic and solid, echogenic halo, calcification in mass"
    assert row.text_bg == "sonogram lactating tissue, combined posterior features, normal skin"
    assert (row.label, row.patient_id) == ("malignant", "0")
    mask = np.array(Image.open(data.file(row, "condition_fg")))
    assert mask.shape == (32, 32)
    assert mask[8:16, 22:26].min() == 255 and mask[8:16, 8:12].min() == 255  # both lesions
    first = (tmp_path / "out" / "metadata.jsonl").read_text()
    assert run(main, argv) == 0
    assert (tmp_path / "out" / "metadata.jsonl").read_text() == first


def test_build_breast_names_missing_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = breast_folder(tmp_path / "in")
    (source / "images" / "case003_tumor.png").unlink()
    assert run(main, ["build", "--source", "breast", "--input", str(source), "--output_dir", str(tmp_path / "o")]) == 2
    assert "case 3: case003_tumor.png is not below" in capsys.readouterr().err
    assert run(main, ["build", "--source", "breast", "--input", str(tmp_path / "o2"), "--output_dir", "x"]) == 2
    assert "no such folder" in capsys.readouterr().err
    inside = str(source / "out")
    assert run(main, ["build", "--source", "breast", "--input", str(source), "--output_dir", inside]) == 2
    assert "lies in the input" in capsys.readouterr().err


def own_folder(folder: Path, *lines: str) -> Path:
    for name in ("a", "b"):
        save(folder / "images" / f"{name}.png", noise(1))
    save(folder / "masks" / "a.png", square())
    save(folder / "organ_masks" / "a.png", np.full((40, 48), 255))
    table = ["file_name,text,label,patient_id,split", *lines]
    (folder / "metadata.csv").write_text("\n".join(table) + "\n", encoding="utf-8")
    return folder


def test_build_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = own_folder(
        tmp_path / "in", 'images/a.png,"Transverse view. Cyst, glowing",benign,P1,train', "images/b.png,,MTC,P2,val"
    )
    argv = ["build", "--source", "folder", "--input", str(source), "--output_dir", str(tmp_path / "out")]
    assert run(main, argv) == 0
    assert "images/a.png: not in the knowledge base: glowing" in capsys.readouterr().out
    a, b = read(tmp_path / "out").rows
    assert (a.text_fg, a.text_bg, a.plane) == ("benign, cystic", "sonogram transverse plane", "transverse")
    assert (a.condition_fg, a.organ_mask) == ("condition_fg/a.png", "organ_mask/a.png")
    assert (b.text_fg, b.split, b.condition_fg) == ("malignant, medullary", "valid", None)


def test_build_folder_lists_every_bad_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = own_folder(
        tmp_path / "in",
        "../a.png,solid,,,",
        "images/c.png,solid,,,",
        "images/b.png,blob,,,",
        ",solid,,,",
        "images/a.png,solid,,,holdout",
    )
    assert run(main, ["build", "--source", "folder", "--input", str(source), "--output_dir", str(tmp_path / "o")]) == 2
    told = capsys.readouterr().err
    for expected in ("line 2: file_name '../a.png' must be a path inside", "line 3: ", "c.png: no such file",
                     "line 4: images/b.png: has neither a label nor a text", "line 5: file_name '' must be a path",
                     "line 6: images/a.png: split: must be one of train, valid, test"):  # fmt: skip
        assert expected in told
    assert not (tmp_path / "o" / "metadata.jsonl").exists()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twelve images of six patients, with texts but no conditions."""
    folder = tmp_path / "data"
    lines = []
    for i in range(12):
        save(folder / "images" / f"{i}.png", noise(i))
        texts = {"text_fg": "benign", "text_bg": "sonogram", "label": "benign"}
        lines.append(json.dumps({"file_name": f"images/{i}.png", "patient_id": f"P{i // 2}", **texts}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_conditions_writes_missing_maps_only(images: Path, capsys: pytest.CaptureFixture[str]):
    assert run(main, ["conditions", "--data_dir", str(images), "--workers", "1"]) == 0
    assert "12 maps written, 0 were there" in capsys.readouterr().out
    kept, lost = (images / "condition_bg" / f"{i}.png" for i in (0, 1))
    before = kept.stat().st_mtime_ns
    lost.unlink()
    assert run(main, ["conditions", "--data_dir", str(images), "--workers", "1"]) == 0
    assert "1 maps written, 11 were there" in capsys.readouterr().out
    assert kept.stat().st_mtime_ns == before and lost.is_file()
    assert all(row.condition_bg for row in read(images).rows)
    assert run(main, ["check", "--data_dir", str(images)]) == 0
    assert run(main, ["check", "--data_dir", str(images), "--stage", "fine"]) == 2


def test_conditions_names_damaged_images(images: Path, capsys: pytest.CaptureFixture[str]):
    (images / "images" / "3.png").write_text("junk")
    assert run(main, ["conditions", "--data_dir", str(images), "--workers", "1"]) == 2
    assert "1 maps could not be made" in (told := capsys.readouterr().err) and "3.png" in told
    assert (images / "condition_bg" / "4.png").is_file()  # the others are kept for the next run


def test_split_in_place_and_as_a_copy(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    fractions = ["--fractions", "0.5", "0.17", "0.33"]
    assert run(main, ["split", "--data_dir", str(images), "--output_dir", str(tmp_path / "copy"), *fractions]) == 0
    assert read(images).rows[0].split is None
    copy = read(tmp_path / "copy")
    check(copy, conditions=False)
    assert sorted(str(row.split) for row in copy.rows) == ["test"] * 4 + ["train"] * 6 + ["valid"] * 2
    assert run(main, ["split", "--data_dir", str(images), *fractions]) == 0
    assert [row.split for row in read(images).rows] == [row.split for row in copy.rows]
    assert run(main, ["split", "--data_dir", str(images), "--fractions", "0.5", "0.5", "0.5"]) == 2
    assert "add up to 1" in capsys.readouterr().err


def test_folds_are_data_sets_beside_the_images(images: Path, capsys: pytest.CaptureFixture[str]):
    assert run(main, ["split", "--data_dir", str(images), "--folds", "3"]) == 0
    folds = [read(images / f"fold{number}.jsonl") for number in range(3)]
    assert not read(images).rows[0].split  # the manifest itself stays as it was
    for data in folds:
        check(data, conditions=False)
        assert sorted(str(row.split) for row in data.rows) == ["test"] * 4 + ["train"] * 4 + ["valid"] * 4
    tested = [row.file_name for data in folds for row in data.rows if row.split == "test"]
    assert sorted(tested) == sorted(row.file_name for row in read(images).rows)
    assert run(main, ["split", "--data_dir", str(images), "--folds", "7"]) == 2
    assert "to the number of patients, 6" in capsys.readouterr().err


def test_subsamples_are_data_sets_beside_the_images(images: Path, capsys: pytest.CaptureFixture[str]):
    before = (images / "metadata.jsonl").read_bytes()
    label = str(read(images).rows[0].label)
    arguments = ["subsample", "--data_dir", str(images), "--name", "few", "--most", f"{label}=2"]
    assert run(main, [*arguments, "--dry_run"]) == 0 and not (images / "few.jsonl").exists()
    assert run(main, arguments) == 0
    kept, rest = (read(images / f"{name}.jsonl") for name in ("few", "few_rest"))
    check(kept, conditions=False)
    assert sum(row.label == label for row in kept.rows) == 2
    assert {row.file_name for row in (*kept.rows, *rest.rows)} == {row.file_name for row in read(images).rows}
    assert (images / "metadata.jsonl").read_bytes() == before
    assert run(main, ["subsample", "--data_dir", str(images), "--most", f"{label}=1"]) == 2
    assert "no training row of benign would be left" in capsys.readouterr().err
    assert run(main, ["subsample", "--data_dir", str(images), "--most", f"{label}=4", "--name", "metadata"]) == 2
    assert "metadata.jsonl: is there and holds other rows" in capsys.readouterr().err
    assert (images / "metadata.jsonl").read_bytes() == before and run(main, arguments) == 0  # the same again is fine


def test_split_refuses_synthetic_rows_of_held_out_images(images: Path, capsys: pytest.CaptureFixture[str]):
    row = {"text_fg": "benign", "text_bg": "sonogram", "label": "benign", "synthetic": True}
    with open(images / "metadata.jsonl", "a", encoding="utf-8") as file:
        for i in range(12):
            record = row | {"file_name": f"s{i}.png", "derived_from": [f"images/{i}.png"]}
            file.write(json.dumps(record) + "\n")
    before = (images / "metadata.jsonl").read_bytes()
    assert run(main, ["split", "--data_dir", str(images)]) == 2
    assert "would show held-out images to training" in capsys.readouterr().err
    assert (images / "metadata.jsonl").read_bytes() == before


def test_conditions_with_the_masks_boundary(images: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["conditions", "--data_dir", str(images), "--edges", "boundary", "--workers", "1"]
    assert run(main, argv) == 2
    assert "12 maps could not be made" in (told := capsys.readouterr().err) and "has no condition_fg" in told
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    save(images / "mask.png", square())
    lines = [json.dumps(row | {"condition_fg": "mask.png"}) + "\n" for row in rows]
    (images / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    assert run(main, argv) == 0
    row = read(images).rows[0]
    assert row.condition_bg == "condition_bg_boundary/0.png"
    edges = np.array(Image.open(images / row.condition_bg))
    assert (edges[7, 10:20] == 255).all() and (edges[10:20, 7] == 255).all()  # around the square and its rim of 2 px
    assert run(main, argv) == 0
    assert "0 maps written, 12 were there" in capsys.readouterr().out


def test_split_warns_of_classes_that_a_split_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    labels = ["benign"] * 10 + ["FTC"] * 2 + ["MTC"]
    texts = {"text_fg": "benign", "text_bg": "sonogram"}
    rows = [{"file_name": f"{i}.png", "patient_id": i, "label": label, **texts} for i, label in enumerate(labels)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    before = (tmp_path / "metadata.jsonl").read_bytes()
    assert run(main, ["split", "--data_dir", str(tmp_path), "--dry_run"]) == 0
    told = capsys.readouterr()
    assert told.err.splitlines() == [
        "warning: FTC has too few patients (2 for 3 splits): none is in valid",
        "warning: MTC has too few patients (1 for 3 splits): none is in valid or test",
    ]
    assert told.out.startswith("would write ") and "test" in told.out
    assert (tmp_path / "metadata.jsonl").read_bytes() == before


def test_check_lists_the_unknown_words_of_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = []
    for i in range(3):
        save(tmp_path / f"{i}.png", noise(i))
        text = f"benign, solid, glowing{', odd thing' if i else ''}"
        lines.append(json.dumps({"file_name": f"{i}.png", "text": text}) + "\n")
    (tmp_path / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    assert run(main, ["check", "--data_dir", str(tmp_path)]) == 0
    assert "left out of the prompts: 'glowing' 3, 'odd thing' 2\n" in capsys.readouterr().out


def test_dry_runs_write_nothing(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = own_folder(tmp_path / "in", "images/a.png,solid,benign,P1,train")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    out = ["--output_dir", str(tmp_path / "out"), "--dry_run"]
    assert run(main, ["build", "--source", "folder", "--input", str(source), *out]) == 0
    assert f"would write {tmp_path / 'out' / 'metadata.jsonl'}: 1 rows" in capsys.readouterr().out
    assert run(main, ["split", "--data_dir", str(images), *out]) == 0
    assert "12 rows, 6 patients" in capsys.readouterr().out
    assert run(main, ["phantom", "--count", "64", "--workers", "1", *out]) == 0
    assert "benign 36" in capsys.readouterr().out
    assert run(main, ["conditions", "--data_dir", str(images), "--workers", "1", "--dry_run"]) == 0
    assert "12 maps would be written, 0 were there" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (images / "images" / "3.png").write_text("junk")
    assert run(main, ["conditions", "--data_dir", str(images), "--workers", "1", "--dry_run"]) == 2


def test_phantom_writes_a_valid_data_set(tmp_path: Path):
    options = ["--output_dir", str(tmp_path), "--count", "4", "--seed", "3", "--size", "64", "--workers", "1"]
    done = subprocess.run([sys.executable, "-m", "data.prepare", "phantom", *options], cwd=ROOT, check=False)
    assert done.returncode == 0
    data = read(tmp_path)
    check(data, conditions=True, knowledge=Knowledge.load("thyroid"))
    assert {row.label for row in data.select(split="train").rows} == {"benign", "PTC", "FTC", "MTC"}


def test_wrong_usage_exits_with_two(capsys: pytest.CaptureFixture[str]):
    for argv in (["build"], ["check", "--data", "x"], ["phantom", "--output_dir", "x", "--count", "0"], []):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
    assert run(main, ["check", "--data_dir", "nowhere"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: nowhere: no such file")
