"""Folds by patient: every class in each of them, or a word on why not."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from data.split import assign_folds, keep_at_most, missing_classes
from tiger.errors import InputError
from tiger.manifest import Row


def patients(counts: dict[str, int], images: int = 2) -> list[Row]:
    return [
        Row(f"{label}-{i}-{k}.png", "x", "y", label=label, patient_id=f"{label}{i}")
        for label, count in counts.items() for i in range(count) for k in range(images)
    ]  # fmt: skip


def test_every_class_is_in_every_split_of_every_fold():
    rows = patients({"benign": 50, "PTC": 23, "FTC": 5, "MTC": 7})
    folds = assign_folds(rows, 5, seed=0)
    for fold in folds:
        assert missing_classes(fold, ("train", "valid", "test")) == []
        splits = defaultdict(set)
        for row in fold:
            splits[row.patient_id].add(row.split)
        assert all(len(found) == 1 for found in splits.values())
        sizes = [sum(row.split == name for row in fold) for name in ("valid", "test")]
        assert all(abs(size - len(rows) / 5) <= 4 for size in sizes)
    tested = [row.file_name for fold in folds for row in fold if row.split == "test"]
    assert sorted(tested) == sorted(row.file_name for row in rows)


def test_a_patient_with_many_images_keeps_no_class_out_of_a_fold():
    rows = patients({"benign": 10, "FTC": 5}, images=1)
    rows += [Row(f"clip{k}.png", "x", "y", label="FTC", patient_id="FTC0") for k in range(60)]
    for fold in assign_folds(rows, 5, seed=0):
        assert missing_classes(fold, ("train", "valid", "test")) == []


def test_folds_depend_on_the_seed_and_not_on_the_order():
    rows = patients({"benign": 20, "FTC": 6})
    done = assign_folds(rows, 3, seed=1)
    assert [fold[::-1] for fold in assign_folds(rows[::-1], 3, seed=1)] == done
    assert assign_folds(rows, 3, seed=2) != done


def test_patients_with_several_classes_are_spread_too():
    rng = np.random.default_rng(0)
    for trial in range(50):
        rows = patients({"benign": 30, "FTC": int(rng.integers(4, 9))}, images=1)
        for i in range(4):  # these have an FTC and a benign nodule
            rows.append(Row(f"extra{i}.png", "x", "y", label="benign", patient_id=f"FTC{i}"))
        for fold in assign_folds(rows, 4, seed=trial):
            assert missing_classes(fold, ("train", "valid", "test")) == []


def test_what_cannot_be_is_told_and_synthetic_rows_are_always_train():
    rows = patients({"benign": 9, "ATC": 2})
    rows.append(Row("s.png", "x", "y", label="ATC", synthetic=True))
    folds = assign_folds(rows, 3, seed=0)
    assert all(fold[-1].split == "train" for fold in folds)
    told = [line for fold in folds for line in missing_classes(fold, ("train", "valid", "test"))]
    assert len(told) == 3 and all("ATC has too few patients (2 for 3 splits)" in line for line in told)
    with pytest.raises(InputError, match="must be from 3"):
        assign_folds(rows, 2, seed=0)
    with pytest.raises(InputError, match="number of patients, 11"):
        assign_folds(rows, 12, seed=0)


def trained(counts: dict[str, int], images: int = 2) -> list[Row]:
    return [replace(row, split="train") for row in patients(counts, images)]


def test_a_subsample_keeps_whole_patients_and_smaller_ones_lie_in_larger_ones():
    rows = trained({"benign": 9, "MTC": 8})
    rows += [
        replace(row, file_name=f"test-{row.file_name}", patient_id=f"t{row.patient_id}", split="test") for row in rows
    ]
    before: set[str] = set()
    for most, left in ((2, 2), (5, 4), (16, 16), (100, 16)):
        kept, rest = keep_at_most(rows, {"MTC": most}, seed=3)
        of_class = {row.file_name for row in kept if row.label == "MTC" and row.split == "train"}
        assert len(of_class) == left and before <= of_class
        assert {row.patient_id for row in kept}.isdisjoint(row.patient_id for row in rest)
        assert all(row.label == "MTC" and row.split == "train" for row in rest)
        assert sorted(row.file_name for row in (*kept, *rest)) == sorted(row.file_name for row in rows)
        assert keep_at_most(rows[::-1], {"MTC": most}, seed=3)[0] == kept[::-1]
        before = of_class
    fours = [keep_at_most(rows, {"MTC": 4}, seed=seed) for seed in range(5)]
    assert any(one != fours[0] for one in fours)
    kept, _ = keep_at_most(rows, {"MTC": 4, "benign": 6}, seed=0)
    assert [sum(row.label == label and row.split == "train" for row in kept) for label in ("MTC", "benign")] == [4, 6]


def test_a_patient_of_two_classes_goes_with_all_images():
    rows = trained({"benign": 3, "MTC": 6}, images=1)
    rows += [Row(f"other{i}.png", "x", "y", label="benign", patient_id=f"MTC{i}") for i in range(6)]  # no split: train
    kept, rest = keep_at_most(rows, {"MTC": 2}, seed=0)
    assert len(kept) == 3 + 2 + 2 and len(rest) == 8


def test_what_cannot_be_subsampled_is_told():
    rows = trained({"benign": 3, "MTC": 4})
    with pytest.raises(InputError, match="--most FTC=2: no training row of FTC would be left"):
        keep_at_most(rows, {"FTC": 2}, seed=0)
    with pytest.raises(InputError, match="no training row of MTC would be left; patients stay whole"):
        keep_at_most(rows, {"MTC": 1}, seed=0)
    both = [replace(row, label=label, file_name=label + row.file_name) for row in rows for label in ("MTC", "PTC")]
    both += trained({"FTC": 1})
    for seed in range(10):  # every patient has both classes: what stays for one stays for the other
        kept, _ = keep_at_most(both, {"PTC": 2, "MTC": 2}, seed)
        assert sorted(str(row.label) for row in kept) == ["FTC", "FTC", "MTC", "MTC", "PTC", "PTC"]
    with pytest.raises(InputError, match="1 rows are synthetic, such as s.png"):
        keep_at_most([*rows, Row("s.png", "x", "y", label="MTC", synthetic=True)], {"MTC": 2}, seed=0)
