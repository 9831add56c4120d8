"""metadata.jsonl: reading with every problem at once, checking files, splitting by patient, writing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tiger.errors import InputError
from tiger.knowledge import Knowledge
from tiger.manifest import Manifest, Row, assign_splits, check, read, synthetic_leaks, write

SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "data" / "tiger_thyroid"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="the published samples are not here")

TEXTS = {"text_fg": "benign, solid", "text_bg": "sonogram transverse plane"}


def write_lines(folder: Path, *lines: dict[str, Any] | str) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "metadata.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return folder


def problems_of(error: pytest.ExceptionInfo[InputError]) -> str:
    return str(error.value)


def save(path: Path, array: np.ndarray, **kwargs: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path, **kwargs)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """One good row: image, mask, map."""
    mask = np.zeros((32, 32))
    mask[10:20, 8:22] = 255
    save(tmp_path / "images" / "a.png", np.full((32, 32), 90))
    save(tmp_path / "condition_fg" / "a.png", mask)
    save(tmp_path / "condition_bg" / "a.png", np.full((32, 32), 3))
    row = {"file_name": "images/a.png", "condition_nd": "condition_fg/a.png", "condition_BG": "condition_bg/a.png"}
    return write_lines(
        tmp_path, row | {"text_nd": "benign, solid", "text_bd": "sonogram transverse plane", "patient_id": 7}
    )


def test_read_understands_aliases(data: Path):
    (row,) = read(data).rows
    assert (row.condition_fg, row.condition_bg) == ("condition_fg/a.png", "condition_bg/a.png")
    assert row.text == "benign, solid, sonogram transverse plane"
    assert row.patient_id == "7"
    assert read(data / "metadata.jsonl").root == data
    check(read(data), conditions=True, knowledge=Knowledge.load("thyroid"))


def test_read_splits_one_text_column(tmp_path: Path):
    write_lines(tmp_path, {"file_name": "a.png", "text": "transverse view, benign, cyst"})
    (row,) = read(tmp_path, Knowledge.load("thyroid")).rows
    assert (row.text_fg, row.text_bg) == ("benign, cystic", "sonogram transverse plane")
    with pytest.raises(InputError, match="knowledge base"):
        read(tmp_path)


def test_text_without_a_known_term_on_the_lesion_is_refused(tmp_path: Path):
    write_lines(tmp_path, {"file_name": "a.png", "text": "transverse view, weird blob"})
    with pytest.raises(InputError) as error:
        read(tmp_path, Knowledge.load("thyroid"))
    message = problems_of(error)
    assert "line 1: text: 'transverse view, weird blob' names no term on the lesion that the thyroid" in message
    assert "text_fg: must" not in message and "\n" not in message


def test_planes(tmp_path: Path):
    spellings = ("longitudinal", "Transverse plane", "left longitudinal plane", "transverse right", "longitudinal view")
    write_lines(tmp_path, *({"file_name": f"{i}.png", "plane": p, **TEXTS} for i, p in enumerate(spellings)))
    assert [str(row.plane)[0] for row in read(tmp_path).rows] == list("ltltl")
    assert {row.plane for row in read(tmp_path).rows} == {"longitudinal", "transverse"}
    write_lines(tmp_path, {"file_name": "a.png", "plane": "sagittal", **TEXTS})
    with pytest.raises(InputError, match="line 1: plane: must be longitudinal or transverse, found 'sagittal'"):
        read(tmp_path)


def test_read_collects_every_structural_problem(tmp_path: Path):
    write_lines(
        tmp_path,
        "{not json",
        {"file_name": "/etc/a.png", **TEXTS},
        {"file_name": "b.png", "condition_fg": "../mask/b.png", **TEXTS},
        {"file_name": "c.png", "text_fg": "benign"},
        {"file_name": "d.png", "pateint_id": "P1", **TEXTS},
        {"file_name": "e.png", "split": "holdout", "seed": "1", **TEXTS},
        {"file_name": "f.png", **TEXTS},
        {"file_name": "f.png", **TEXTS},
        '["a list"]',
        {"file_name": ".", **TEXTS},
    )
    with pytest.raises(InputError) as error:
        read(tmp_path)
    message = problems_of(error)
    for expected in (
        "10 problems", "line 1: not valid JSON", "line 2: file_name: '/etc/a.png' is not a relative path",
        "line 3: condition_fg: '../mask/b.png' leaves the manifest's folder", "line 4: has no text_bg",
        "line 5: unknown column 'pateint_id': did you mean 'patient_id'?", "line 6: split: must be one of",
        "line 6: seed: must be an integer", "line 8: f.png is already in line 7", "line 9: must be a JSON object",
        "line 10: file_name: '.' is the manifest's folder: name a file in it",
    ):  # fmt: skip
        assert expected in message


def test_read_names_what_is_missing(tmp_path: Path):
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path)
    write_lines(tmp_path)
    with pytest.raises(InputError, match="has no rows"):
        read(tmp_path)


def test_write_and_read_agree(tmp_path: Path):
    rows = (
        Row("a.png", "benign", "sonogram", seed=0, synthetic=True, model="m", derived_from=("x.png",), split="train"),
        Row("b.png", "benign", "sonogram", label="benign", attributes={"composition": "solid"}, organ_mask="o.png"),
    )
    write(tmp_path / "metadata.jsonl", rows)
    assert read(tmp_path).rows == rows
    assert json.loads((tmp_path / "metadata.jsonl").read_text().splitlines()[1]).keys() == {
        "file_name", "text_fg", "text_bg", "organ_mask", "label", "attributes",
    }  # fmt: skip


def spoil_missing(data: Path) -> None:
    (data / "condition_fg" / "a.png").rename(data / "condition_fg" / "a.PNG")


def spoil_corrupt(data: Path) -> None:
    path = data / "images" / "a.png"
    path.write_bytes(path.read_bytes()[:60])


def spoil_text_file(data: Path) -> None:
    (data / "images" / "a.png").write_text("not an image")


def spoil_size(data: Path) -> None:
    save(data / "condition_bg" / "a.png", np.zeros((16, 32)))


def spoil_gray(data: Path) -> None:
    save(data / "condition_fg" / "a.png", np.tile(np.arange(32) * 8, (32, 1)))


def spoil_empty(data: Path) -> None:
    save(data / "condition_fg" / "a.png", np.eye(32))


def spoil_full(data: Path) -> None:
    save(data / "condition_fg" / "a.png", np.full((32, 32), 255))


def spoil_bar(data: Path) -> None:
    mask = np.zeros((32, 32))
    mask[10:20, 8:22] = 255
    mask[:, -2:] = 255
    save(data / "condition_fg" / "a.png", mask)


def spoil_format(data: Path) -> None:
    save(data / "images" / "a.png", np.full((32, 32), 90), format="JPEG")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_missing, "does not exist: write 'condition_fg/a.PNG', which does"),
        (spoil_corrupt, "file_name a.png: cannot be read as an image"),
        (spoil_text_file, "no known image format"),
        (spoil_size, "condition_bg is 32x16, the image 32x32"),
        (spoil_gray, "grey levels instead of 0 and 255: threshold"),
        (spoil_empty, "the mask is empty .its values are 0 and 1: multiply by 255"),
        (spoil_full, "the mask is full: draw the lesion alone or drop the row"),
        (spoil_bar, "white bar of 2 px along its right edge"),
        (spoil_format, "holds JPEG under a .png name"),
    ],
)
def test_check_names_the_row_and_the_mending(data: Path, spoil: Any, message: str):
    spoil(data)
    with pytest.raises(InputError, match=message) as error:
        check(read(data), conditions=True)
    assert "images/a.png: " in problems_of(error)
    assert "\n" not in problems_of(error)


def test_check_wants_conditions_only_for_the_fine_stage(data: Path):
    write_lines(data, {"file_name": "images/a.png", **TEXTS})
    check(read(data), conditions=False)
    with pytest.raises(InputError) as error:
        check(read(data), conditions=True)
    for expected in ("has no condition_fg", "segmenter predict", "--lesion_weight 1", "data.prepare conditions"):
        assert expected in problems_of(error)


def test_only_the_first_problems_are_listed(tmp_path: Path):
    write_lines(tmp_path, *({"file_name": f"{n}.png"} for n in range(30)))  # without texts: two problems each
    with pytest.raises(InputError) as error:
        read(tmp_path)
    lines = str(error.value).splitlines()
    assert lines[0].endswith("60 problems:") and len(lines) == 22
    assert f"and 40 more: python -m data.prepare check --data_dir {tmp_path}" in lines[-1]


def test_check_compares_texts_with_the_knowledge_base(data: Path):
    row = {"file_name": "images/a.png", "text_fg": "benign, regular shape, irregular", "text_bg": "sonogram"}
    write_lines(data, row | {"label": "PTC", "attributes": {"composition": "gas"}})
    with pytest.raises(InputError) as error:
        check(read(data), conditions=False, knowledge=Knowledge.load("thyroid"))
    for expected in ("contradicts itself", "label 'PTC', but the text says benign", "attribute composition: 'gas'"):
        assert expected in problems_of(error)
    write_lines(data, row | {"text_fg": "solid", "label": "malignant", "attributes": {"composition": "gas"}})
    with pytest.raises(InputError) as error:
        check(read(data), conditions=False, knowledge=Knowledge.load("thyroid"))
    assert problems_of(error).count("mend it, or name another vocabulary by --knowledge") == 2


def test_check_refuses_patients_in_two_splits(tmp_path: Path):
    save(tmp_path / "a.png", np.zeros((8, 8)))
    save(tmp_path / "b.png", np.zeros((8, 8)))
    rows = [
        {"file_name": f"{n}.png", "patient_id": "P1", "split": s, **TEXTS} for n, s in (("a", "train"), ("b", "val"))
    ]
    with pytest.raises(InputError, match="patient P1: is in train and valid"):
        check(read(write_lines(tmp_path, *rows)), conditions=False)


@needs_samples
def test_check_names_every_defect_of_the_published_samples(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tiger.manifest.MOST_SHOWN", 1000)
    with pytest.raises(InputError) as error:
        check(read(SAMPLES / "init_image"), conditions=True, knowledge=Knowledge.load("thyroid"))
    message = problems_of(error)
    names = [json.loads(line)["file_name"] for line in (SAMPLES / "init_image" / "metadata.jsonl").open()]
    for name in names:
        assert f"{name}: condition_fg 'training data/" in message
        assert f"{name}: condition_bg 'training data/" in message
    assert message.count("white bar") == 3
    assert message.count("holds JPEG under a .png name") == 2
    assert message.count("contradicts itself") == 1
    assert ".pngg' does not exist, but '../condition_BG/634878812500937500.png'" in message
    assert "python -m data.prepare build --source tiger_thyroid" in message


def test_select_counts_rows_without_split_as_train():
    rows = (Row("a", "x", "y", split="test", label="benign"), Row("b", "x", "y", label="PTC", synthetic=True))
    manifest = Manifest(Path("m"), rows)
    assert [row.file_name for row in manifest.select(split="train").rows] == ["b"]
    assert [row.file_name for row in manifest.select(labels=["benign"]).rows] == ["a"]
    assert [row.file_name for row in manifest.select(synthetic=False).rows] == ["a"]


def test_assign_splits_keeps_patients_whole_and_labels_in_proportion():
    fractions = {"train": 0.7, "valid": 0.1, "test": 0.2}
    labels = ["benign"] * 60 + ["PTC"] * 30 + ["FTC"] * 10
    rows = [Row(f"{i}-{k}.png", "x", "y", label=labels[i], patient_id=str(i)) for i in range(100) for k in range(3)]
    rows.append(Row("s.png", "x", "y", label="FTC", synthetic=True))
    done = assign_splits(rows, fractions, seed=1)
    splits: dict[str, set[Any]] = {}
    for row in done[:-1]:
        splits.setdefault(str(row.patient_id), set()).add(row.split)
    assert all(len(found) == 1 for found in splits.values())
    for label, train, valid, test in (("benign", 42, 6, 12), ("PTC", 21, 3, 6), ("FTC", 7, 1, 2)):
        counts = [sum(r.label == label and r.split == s and not r.synthetic for r in done) // 3 for s in fractions]
        assert counts == [train, valid, test]
    assert done[-1].split == "train"
    shuffled = assign_splits(rows[::-1], fractions, seed=1)[::-1]
    assert shuffled == done
    assert assign_splits(rows, fractions, seed=2) != done


@pytest.mark.parametrize(
    ("patients", "counts"),
    [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1)), (4, (2, 1, 1)), (10, (7, 1, 2))],
)
def test_a_class_is_in_every_split_that_its_patients_allow(patients: int, counts: tuple[int, int, int]):
    fractions = {"train": 0.7, "valid": 0.1, "test": 0.2}
    rows = [Row(f"{i}.png", "x", "y", label="FTC", patient_id=str(i)) for i in range(patients)]
    splits = [row.split for row in assign_splits(rows, fractions, seed=0)]
    assert tuple(splits.count(name) for name in fractions) == counts


def test_synthetic_rows_must_stay_in_train_and_derive_from_it():
    rows = [Row("a.png", "x", "y", split="train"), Row("b.png", "x", "y", split="test")]
    made = {"synthetic": True, "split": "train"}
    rows += [Row("s.png", "x", "y", derived_from=("a.png",), **made)]
    assert not list(synthetic_leaks(rows))
    rows += [Row("t.png", "x", "y", derived_from=("a.png", "b.png"), **made)]
    rows += [Row("u.png", "x", "y", **(made | {"split": "valid"}))]
    assert [(row.file_name, problem.code) for row, problem in synthetic_leaks(rows)] == [
        ("t.png", "leaked_source"), ("u.png", "synthetic_held_out"),
    ]  # fmt: skip
