"""Folds by patient: every class in each of them, or a word on why not."""

from collections import defaultdict

import numpy as np
import pytest

from data.split import assign_folds, missing_classes
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
