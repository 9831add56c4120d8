"""eval/images.py: what every evaluation command reads."""

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from eval_samples import write_dataset
from PIL import Image

from eval.features import features_of
from eval.images import load_images, load_masks, read_split
from tiger import manifest
from tiger.errors import InputError, run
from tiger.manifest import Manifest

JUDGES = Path(__file__).parents[1] / "assets/judges"
COMMANDS = {
    "quality": ["--output", "report.json"],
    "privacy": ["--output", "report.json"],
    "gallery": ["--output", "page.html"],
    "gate": ["--output", "fake/kept.jsonl", "--scores", "novelty"],
}


def test_empty_masks_and_black_images_are_refused(tmp_path: Path) -> None:
    """As masks of 0 and 1 and images of 12 bits in files of 16 are read."""
    rows = write_dataset(tmp_path, {"train": {"benign": 3}})
    assert load_masks(rows, 32).any((1, 2)).all() and load_images(rows, 32).max() > 64
    mask = tmp_path / "condition_fg" / "P0001.png"
    with Image.open(mask) as image:
        of_one = np.asarray(image) // 255
    Image.fromarray(of_one).save(mask)
    with pytest.raises(InputError, match=r"empty masks of images/P0001.png, where no value is 128 or more"):
        load_masks(rows, 32)
    for path in (tmp_path / "images").iterdir():
        with Image.open(path) as image:
            deep = np.asarray(image).astype(np.uint16) * 16
        Image.fromarray(deep).save(path)
    for read in (lambda: load_images(rows, 32), lambda: features_of(rows, Sizes(), None)):
        with pytest.raises(InputError, match=r"no pixel of 3 images is above \d+ of 255; .*prepare check"):
            read()


def test_patients_in_two_splits_are_refused_wherever_images_are_read(tmp_path: Path) -> None:
    rows = write_dataset(tmp_path, {"train": {"benign": 2}, "test": {"benign": 2}})
    manifest.write(rows.path, [replace(row, patient_id="p1") for row in rows.rows])
    for name, given in (("segment", ["train", "--data_dir"]), ("attributes", ["train", "--data_dir"])):
        module = importlib.import_module(f"eval.{name}")
        with pytest.raises(InputError, match="p1"):
            module.main([*given, str(tmp_path), "--output_dir", str(tmp_path / "net"), "--dry_run"])


class Sizes:
    """An extractor whose features are the sizes of the images."""

    name, resize, head, has_positions = "sizes", "none", None, False

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([image.shape for image in images], np.float32)

    def positions(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        raise NotImplementedError


def with_reports(rows: Manifest, report: str) -> Manifest:
    """The same rows with one column `text` in the place of two."""
    records = [json.loads(line) for line in rows.path.read_text().splitlines()]
    for record in records:
        del record["text_fg"], record["text_bg"]
        record["text"] = report
    rows.path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return rows


@pytest.fixture
def real(tmp_path: Path) -> Manifest:
    counts = {split: {"benign": 6, "PTC": 6} for split in ("train", "valid", "test")}
    return with_reports(write_dataset(tmp_path / "real", counts), "melanoma, atypical pigment network")


@pytest.fixture
def fake(tmp_path: Path) -> Manifest:
    rows = write_dataset(tmp_path / "fake", {"train": {"benign": 8, "PTC": 8}}, seed=1, synthetic=True, prefix="S")
    return with_reports(rows, "melanoma, atypical pigment network")


def test_one_text_column_is_taken_apart_by_the_knowledge_base_that_is_named(real: Manifest) -> None:
    rows = read_split(real.path, "test", knowledge="skin").rows
    assert len(rows) == 12 and "atypical pigment network" in rows[0].text
    with pytest.raises(InputError, match="names no term on the lesion that the thyroid"):
        read_split(real.path, "test")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_reads_reports_on_other_organs(
    name: str, real: Manifest, fake: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    main: Callable[[list[str] | None], None] = importlib.import_module(f"eval.{name}").main
    monkeypatch.chdir(tmp_path)
    command = [*COMMANDS[name], "--real", str(real.path), "--fake", str(fake.path)]
    assert run(main, command) == 2
    assert "choose another one by --knowledge" in capsys.readouterr().err
    assert run(main, [*command, "--knowledge", "skin", *([] if name == "gallery" else ["--dry_run"])]) == 0


@pytest.mark.parametrize(
    "command",
    [
        "segment train --data_dir real --output_dir out --max_train_steps 1 --dry_run",
        "attributes train --data_dir real --output_dir out --max_train_steps 1 --dry_run",
        "clip_train train --data_dir real --output_dir out --max_train_steps 1 --dry_run",
        "control --real real --fake fake --output report.json --dry_run --judges JUDGES",
    ],
)
def test_trainers_and_judges_read_them_too(
    command: str, real: Manifest, fake: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Past the reading they may have other reasons to refuse these rows, which state a place in the thyroid."""
    name, *more = command.replace("JUDGES", str(JUDGES)).split()
    main: Callable[[list[str] | None], None] = importlib.import_module(f"eval.{name}").main
    monkeypatch.chdir(tmp_path)
    assert run(main, more) == 2
    assert "names no term on the lesion that the thyroid" in capsys.readouterr().err
    run(main, [*more, "--knowledge", "skin"])
    assert "names no term on the lesion" not in capsys.readouterr().err
