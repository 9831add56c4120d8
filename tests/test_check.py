"""`data.prepare check`: each defect is found under its name, copies too, and `--fix` leaves nothing to find."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import cv2
import imagehash
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from data.check import examine
from data.duplicates import near_pairs, perceptual_hash, same_picture, thumbnail
from data.prepare import main
from tiger.conditions import read_gray
from tiger.errors import InputError, run
from tiger.knowledge import Knowledge
from tiger.manifest import check, read

TEXTS = {"text_fg": "benign, solid", "text_bg": "sonogram transverse plane", "label": "benign"}


def picture(seed: int, size: int = 96) -> np.ndarray:
    """A smooth random image, as unlike any other as two sonograms are."""
    noise = np.random.default_rng(seed).standard_normal((size, size)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 6)
    return np.clip(128 + 60 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def write(path: Path, array: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path, **options)


class Folder:
    """A data set that is good until a test spoils it."""

    def __init__(self, root: Path, count: int = 6):
        self.root = root
        self.rows: list[dict[str, Any]] = []
        mask = np.zeros((96, 96))
        mask[30:50, 40:70] = 255
        for i in range(count):
            split = ("train", "train", "test")[i % 3]
            files = {"file_name": f"images/{i}.png", "condition_fg": f"masks/{i}.png", "condition_bg": f"maps/{i}.png"}
            self.rows.append({**files, "patient_id": f"P{i}", "split": split, **TEXTS})
            write(root / f"images/{i}.png", picture(i))
            write(root / f"masks/{i}.png", mask)
            write(root / f"maps/{i}.png", np.full((96, 96), i))

    def save(self) -> str:
        lines = [json.dumps(row) + "\n" for row in self.rows]
        (self.root / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
        return str(self.root)

    def found(self) -> dict[str, str | None]:
        """Code → the row it was found in."""
        report = examine(self.save(), Knowledge.load("thyroid"), "auto", 1)
        return {finding.code: finding.file_name for finding in report.findings}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "data")


def test_a_good_folder_has_no_findings(folder: Folder, capsys: pytest.CaptureFixture[str]):
    assert run(main, ["check", "--data_dir", folder.save(), "--workers", "1"]) == 0
    told = capsys.readouterr().out
    assert "error" not in told and "warning" not in told
    assert told.endswith("ready for both stages\n")
    assert "  train         4   benign 4\n  test          2   benign 2\n" in told


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"file_name": "images/none.png"}, "missing_file"),
        ({"condition_bg": None}, "no_map"),
        ({"condition_fg": None}, "no_mask"),
        ({"label": "PTC"}, "label_and_text"),
        ({"label": "XTC"}, "unknown_label"),
        ({"attributes": {"composition": "gas"}}, "unknown_attribute"),
        ({"text_fg": "benign, regular shape, irregular"}, "contradiction"),
        ({"text_fg": "benign, cystic, microcalcification"}, "impossible"),
        ({"synthetic": True, "split": "test"}, "synthetic_held_out"),
        ({"synthetic": True, "derived_from": ["images/2.png"]}, "leaked_source"),
    ],
)
def test_a_bad_row_is_named(folder: Folder, change: dict[str, Any], code: str):
    folder.rows[1] |= change
    found = folder.found()
    found.pop("class_missing", None)  # of the other label
    assert found == {code: folder.rows[1]["file_name"]}


def test_findings_on_the_whole_set(folder: Folder):
    folder.rows[1]["patient_id"] = "P2"
    folder.rows[0] |= {"text_fg": "malignant, medullary, glowing", "label": "MTC"}
    folder.rows.append({"file_name": "../out.png", **TEXTS})
    assert folder.found() == dict.fromkeys(["patient_in_splits", "unknown_terms", "class_missing", "structure"])


def test_long_prompts_name_the_terms_that_fall_off(folder: Folder):
    long = "benign, solid, " + "very " * 66 + "hypoechoic, uneven thick halo"
    folder.rows[3]["text_fg"] = long
    report = examine(folder.save(), Knowledge.load("thyroid"), "auto", 1)
    told = [finding.message for finding in report.findings if finding.code == "long_prompt"]
    assert told == [
        "text_fg has 81 tokens, of 77 that fit: uneven thick halo falls off",
        "the joint prompt has 88 tokens, of 77 that fit: uneven thick halo, transverse plane falls off",
    ]


@pytest.mark.parametrize(
    ("words", "told"), [(71, []), (72, ["text_fg has 78 tokens, of 77 that fit: solid falls off"])]
)
def test_the_last_token_that_fits(folder: Folder, words: int, told: list[str]):
    folder.rows[0]["text_fg"] = "benign, " + "very " * words + "solid"  # "solid" is the last token before the end
    report = examine(folder.save(), Knowledge.load("thyroid"), "auto", 1)
    assert [f.message for f in report.findings if f.code == "long_prompt" and f.message.startswith("text_fg")] == told


def test_copies(folder: Folder):
    write(folder.root / "images/1.png", picture(0))  # both in train
    Image.fromarray(picture(2)).save(folder.root / "images/3.png", format="PNG")
    changed = ImageEnhance.Contrast(Image.fromarray(picture(2))).enhance(0.8).resize((96, 96))
    changed.save(folder.root / "images/3.png")  # 2 is in test, 3 in train
    write(folder.root / "images/5.png", picture(4))
    folder.rows[5] |= {"label": "PTC", "text_fg": "malignant, papillary"}
    found = folder.found()
    assert found.pop("class_missing", None) is None
    assert found == {"duplicate": "images/1.png", "near_duplicate_across_splits": "images/3.png",
                     "duplicate_label": "images/4.png", "duplicate_across_splits": "images/4.png"}  # fmt: skip


def test_frames_of_one_patients_clip_are_no_copies(folder: Folder):
    frame = picture(0)
    frame[:4, :4] ^= 1
    write(folder.root / "images/1.png", frame)
    assert folder.found() == {"near_duplicate": "images/1.png"}
    folder.rows[1]["patient_id"] = "P0"
    assert folder.found() == {}


def test_report_as_json_and_exit_codes(folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["check", "--data_dir", str(folder.root), "--output", str(tmp_path / "report.json"), "--workers", "1"]
    folder.rows[1]["text_fg"] = "benign, glowing"
    folder.save()
    assert run(main, argv) == 0  # a warning only
    folder.rows[0]["file_name"] = "images/0.jpg"
    folder.save()
    assert run(main, argv) == 2
    told = capsys.readouterr()
    assert "error missing_file: 1\n  images/0.jpg: file_name 'images/0.jpg' does not exist: write 'images/0" in told.out
    assert told.err.splitlines()[-1].startswith(f"error: {folder.root}/metadata.jsonl: 1 errors, listed above; --fix")
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert (report["rows"], report["errors"], report["warnings"]) == (6, 1, 1)
    assert report["unknown_terms"] == {"glowing": 1}
    assert report["class_counts"] == {"train": {"benign": 4}, "test": {"benign": 2}}
    assert {finding["code"] for finding in report["findings"]} == {"missing_file", "unknown_terms"}


def test_processes_find_what_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = Folder(tmp_path, count=3)
    folder.rows[1] |= {"file_name": "images/none.png", "text_fg": "benign, glowing"}
    knowledge = Knowledge.load("thyroid")
    alone = examine(folder.save(), knowledge, "auto", 1)
    monkeypatch.setattr("data.check.WORTH_A_POOL", 0)
    assert examine(folder.save(), knowledge, "auto", 2) == alone


def test_fix_mends_a_copy_and_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = Folder(tmp_path / "data", count=14)
    masks, rows = folder.root / "masks", folder.rows
    before_rows = len(rows)
    mask = np.array(Image.open(masks / "0.png"))
    rows[0]["condition_fg"] = "masks/0.jpg"  # another suffix
    write(masks / "1.png", mask // 255)  # 0 and 1
    barred = mask.copy()
    barred[:3] = 255
    write(masks / "2.png", barred)
    write(masks / "3.png", mask, format="JPEG")
    write(masks / "4.png", mask[::2, ::2])
    write(masks / "5.png", mask * 0)  # lost
    write(masks / "6.png", mask * 0 + 255)  # lost
    write(folder.root / "images/7.png", picture(7), format="JPEG")
    write(folder.root / "maps/7.png", np.zeros((8, 8)))
    rows[8]["text_fg"] = "benign, regular shape, irregular"
    write(folder.root / "images/9.png", picture(11))  # 9 is in train, 11 in test: 9 goes
    rows[10]["patient_id"] = "P12"  # 10 and 12 are in train
    rows[13] |= {"synthetic": True, "split": "test"}
    out = tmp_path / "mended"
    argv = ["check", "--data_dir", folder.save(), "--fix", str(out), "--workers", "1"]
    before = {path: path.read_bytes() for path in folder.root.rglob("*") if path.is_file()}
    assert run(main, argv) == 0
    assert {path: path.read_bytes() for path in folder.root.rglob("*") if path.is_file()} == before
    done = "\n".join(json.loads((out / "mended.json").read_text(encoding="utf-8"))["changes"])
    for told in ("0.png: masks/0.jpg was 0.png", "1.png: masks/1.png held 0 and 1", "2.png had a white bar",
                 "4.png: masks/4.png was 48x48, is as large", "5.png: left out: masks/5.png is empty",
                 "6.png: left out: masks/6.png is full", "7.png: images/7.png held JPEG, is PNG now",
                 "7.png: maps/7.png made anew: it was 8x8", "8.png: of contradictory terms the first is kept",
                 "9.png: left out: shows what images/11.png shows", "13.png: moved from test to train"):  # fmt: skip
        assert told in done
    kept = read(out)
    assert len(kept.rows) == before_rows - 3
    for row in kept.rows:
        if row.file_name != "images/3.png":  # a JPEG's edge is not the same to the pixel
            assert np.array_equal(read_gray(kept.file(row, "condition_fg")), mask), row.file_name
    assert run(main, argv) == 2  # never into a folder that holds something
    assert "is not empty" in capsys.readouterr().err


def test_images_of_12_bits_in_16_are_refused_and_mended_alike(folder: Folder, tmp_path: Path):
    for i in range(6):  # the first is a dim one
        deep = picture(i).astype(np.uint16) * (4 if i == 0 else 16)
        Image.fromarray(deep).save(folder.root / f"images/{i}.png")
    told = r"hold at most \d{4}, of 65535 that is white: .* --fix FOLDER writes them in 8 bits, where 4095 is white"
    with pytest.raises(InputError, match=told):
        check(read(folder.save()), conditions=False)
    assert "dark_images" in folder.found()
    assert run(main, ["check", "--data_dir", folder.save(), "--fix", str(tmp_path / "out"), "--workers", "1"]) == 0
    for i in range(6):
        expected = picture(i) * (16 * 255 / 4095) / (4 if i == 0 else 1)
        assert np.abs(read_gray(tmp_path / "out" / f"images/{i}.png") - expected).max() <= 0.5
    Image.fromarray(np.full((96, 96), 65535, np.uint16)).save(folder.root / "images/5.png")  # now all bits are in use
    assert "dark_images" not in folder.found()


def test_dark_images_are_not_taken_for_copies_of_each_other(folder: Folder, tmp_path: Path):
    for i in range(6):  # 0 everywhere once divided by 257
        Image.fromarray((picture(i) // 2).astype(np.uint16)).save(folder.root / f"images/{i}.png")
    found = folder.found()
    assert "dark_images" in found and not {"duplicate", "near_duplicate"} & set(found)
    assert run(main, ["check", "--data_dir", folder.save(), "--fix", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert len(read(tmp_path / "out").rows) == 6


def test_phash_is_imagehashs():
    gray = picture(3)
    assert perceptual_hash(gray) == int(str(imagehash.phash(Image.fromarray(gray))), 16)


@pytest.mark.parametrize("distance", [0, 3, 6])
def test_near_pairs_finds_all_that_comparing_all_pairs_finds(distance: int):
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 2**64, 400, dtype=np.uint64)
    for i in range(200):  # variants of the first ones, up to 9 bits off
        flips = sum(1 << int(bit) for bit in rng.choice(64, int(rng.integers(0, 10)), replace=False))
        hashes[200 + i] = hashes[i % 50] ^ np.uint64(flips)
    pairs = combinations(range(400), 2)
    expected = [(i, j) for i, j in pairs if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= distance]
    assert len(expected) > 20
    assert near_pairs(hashes, distance).tolist() == [list(pair) for pair in expected]


def test_same_picture_tells_alike_from_same():
    a = picture(0)
    thumbnails = np.stack([thumbnail(x) for x in (a, a // 2 + 40, (a // 2 + picture(1) // 2), np.zeros_like(a))])
    pairs = np.array(list(combinations(range(4), 2)))
    assert same_picture(pairs, thumbnails, 0.98).tolist() == [[0, 1]]
