"""Shards hold what the folder held, WebDataset reads them, and a training cannot tell the two apart."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
import webdataset
from eval_samples import write_dataset
from PIL import Image
from test_quality import Histogram
from training_samples import SIDE, differing, flags, save_base, save_data

from data import shards as writer
from data.prepare import main
from data.segmentation import add_masks
from eval import quality
from tiger import manifest, pretrain, shards
from tiger.conditions import open_image
from tiger.dataset import TigerDataset
from tiger.errors import InputError, run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve rows, the sixth synthetic and derived from the first; the seventh image is a JPEG without a mask."""
    folder = save_data(tmp_path / "folder")
    records = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    records[5] |= {"synthetic": True, "derived_from": ["file_name/0.png", "elsewhere.png"]}
    name = "file_name/6.JPG"
    open_image(folder / records[6]["file_name"]).save(folder / name, format="JPEG")
    records[6] |= {"file_name": name, "condition_fg": None, "organ_mask": records[7]["condition_fg"]}
    (folder / "metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def write(folder: Path, output: Path, rows: int = 5) -> int:
    argv = ["shards", "--data_dir", str(folder), "--output_dir", str(output), "--rows_per_shard", str(rows)]
    return run(main, argv)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_byte_is_there(folder: Path, tmp_path: Path):
    assert write(folder, tmp_path / "out") == 0
    old, new = manifest.read(folder), manifest.read(tmp_path / "out")
    assert len({row.file_name.split("/")[0] for row in new.rows}) == 3
    for before, after in zip(old.rows, new.rows, strict=True):
        for column in manifest.FILE_COLUMNS:
            assert (getattr(before, column) is None) == (getattr(after, column) is None)
            if getattr(before, column):
                assert shards.read_bytes(new.file(after, column)) == old.file(before, column).read_bytes()
        assert (after.text, after.label, after.patient_id) == (before.text, before.label, before.patient_id)
    assert new.rows[5].derived_from == (new.rows[0].file_name, "elsewhere.png")
    assert new.rows[6].file_name == "shard-000001.tar/000000006.jpg"
    assert run(main, ["check", "--data_dir", str(tmp_path / "out"), "--stage", "coarse"]) == 0


def test_the_plain_library_reads_them(folder: Path, tmp_path: Path):
    write(folder, tmp_path / "out")
    urls = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    rows = manifest.read(folder).rows
    assert [sample["__key__"] for sample in samples] == [f"{number:09d}" for number in range(12)]
    for sample, row in zip(samples, rows, strict=True):
        assert sample["json"] == json.loads(json.dumps(manifest.to_record(row)))
        assert ("mask.png" in sample, "organ.png" in sample) == (
            row.condition_fg is not None,
            row.organ_mask is not None,
        )
        assert sample["map.png"].size == (SIDE, SIDE)


def test_items_are_the_same(tmp_path: Path):
    folder = save_data(tmp_path / "folder")
    write(folder, tmp_path / "out")
    plain, sharded = (TigerDataset(manifest.read(path), SIDE, with_conditions=True)
                      for path in (folder, tmp_path / "out"))  # fmt: skip
    for index in (7, 0, 11):
        a, b = plain[index], sharded[index]
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key] for key in a)
        assert plain.content_key(index) == sharded.content_key(index)
    loader = torch.utils.data.DataLoader(sharded, batch_size=4, num_workers=2)  # forked: they share open files
    images = torch.cat([batch["image"] for batch in loader])
    assert torch.equal(images, torch.stack([plain[index]["image"] for index in range(12)]))


def test_a_training_on_shards_is_bit_equal_and_resumes(tmp_path: Path):
    base, folder, out = save_base(tmp_path / "base"), save_data(tmp_path / "folder"), tmp_path / "out"
    write(folder, out)

    def train(data: Path, name: str, steps: int) -> Path:
        options = {"pretrained_model": base, "data_dir": data, "output_dir": tmp_path / name}
        pretrain.main(flags(**options, max_train_steps=steps, checkpointing_steps=1, report_to="none"))
        return tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors"

    train(out, "stopped", 1)
    assert not differing(train(out, "stopped", 3), train(folder, "whole", 3))


def quality_of(real: Path, fake: Path, output: Path) -> dict:
    given = ["--real", str(real), "--fake", str(fake), "--cache_dir", str(output.parent / "cache")]
    quality.main([*given, "--output", str(output)])
    return json.loads(output.read_text())


def test_evaluation_of_shards_gives_the_same_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quality, "load_extractor", lambda name, weights: Histogram())
    monkeypatch.setattr(quality, "RESAMPLES", 4)
    monkeypatch.setattr(quality, "REPEATS", 2)
    write_dataset(tmp_path / "real", {"train": {"benign": 8, "FTC": 8}, "test": {"benign": 12, "FTC": 12}})
    write(tmp_path / "real", tmp_path / "shards")
    names = [row.file_name for row in manifest.read(tmp_path / "real").rows]
    packed = [row.file_name for row in manifest.read(tmp_path / "shards").rows]
    reports = []
    for name, sources, real in (("a", names, "real"), ("b", packed, "shards")):
        counts = {"train": {"benign": 6, "FTC": 6}}
        write_dataset(tmp_path / name, counts, seed=1, synthetic=True, prefix="S", sources=sources[:16])
        write(tmp_path / name, tmp_path / f"{name}-shards")
        fake = tmp_path / (name if name == "a" else "b-shards")
        reports.append(quality_of(tmp_path / real, fake, tmp_path / f"{name}.json"))
    for part in ("overall", "per_class", "left_out"):
        assert reports[0][part] == reports[1][part]


def test_every_command_of_prepare_takes_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """check, its --fix, conditions, split, folds and shards again: the same findings and bytes as from the folder."""
    folder, packed = save_data(tmp_path / "folder"), tmp_path / "packed"
    records = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    records[3]["condition_bg"] = None
    Image.new("L", (SIDE, SIDE)).save(folder / records[4]["condition_fg"])  # an empty mask: one error
    (folder / "metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert write(folder, packed) == 0
    results = []
    for data in (folder, packed):
        name = f"{data.name}-"
        common = ["--data_dir", str(data)]
        assert run(main, ["check", *common, "--workers", "1", "--output", str(tmp_path / f"{name}a.json")]) == 2
        findings = json.loads((tmp_path / f"{name}a.json").read_text())["findings"]
        assert run(main, ["conditions", *common, "--workers", "1"]) == 0
        assert "1 maps written, 11 were there" in capsys.readouterr().out
        assert run(main, ["check", *common, "--fix", str(tmp_path / f"{name}mended"), "--workers", "1"]) == 0
        assert run(main, ["split", *common, "--folds", "3", "--output_dir", str(tmp_path / f"{name}split")]) == 0
        assert run(main, ["shards", *common, "--output_dir", str(tmp_path / f"{name}again")]) == 0
        sets = [manifest.read(tmp_path / f"{name}{path}") for path in ("mended", "split/fold1.jsonl", "again")]
        contents = [
            shards.read_bytes(rows.file(row, column))
            for rows in sets for row in rows.rows for column in manifest.FILE_COLUMNS if getattr(row, column)
        ]  # fmt: skip
        results.append(([finding["code"] for finding in findings], contents, [len(rows.rows) for rows in sets]))
    assert results[0][0].count("empty_mask") == results[0][0].count("no_map") == 1
    assert results[0] == results[1] and results[0][2] == [11, 12, 12]


def test_masks_are_found_for_images_in_shards(tmp_path: Path):
    folder, packed = save_data(tmp_path / "folder"), tmp_path / "packed"
    records = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    lines = [json.dumps(record | {"condition_fg": None}) for record in records]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    write(folder, packed)
    found = []
    for path in (folder, packed):
        add_masks(manifest.read(path), lambda gray: (gray // 128 * 255, 0.9), {"column": "condition_fg"})
        data = manifest.read(path)
        found.append([shards.read_bytes(data.file(row, "condition_fg")) for row in data.rows])
    assert found[0] == found[1] and len(set(found[0])) == 12


def test_a_stopped_run_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(folder, tmp_path / "whole")
    write_shard, written = writer.write_shard, []

    def stopping(path: Path, *args: object) -> None:
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(path)
        write_shard(path, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(writer, "write_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        write(folder, tmp_path / "out")
    assert run(pretrain.main, flags(pretrained_model="x", data_dir=tmp_path / "out", output_dir="y")) == 2
    monkeypatch.setattr(writer, "write_shard", lambda path, *args: (written.append(path), write_shard(path, *args)))
    (tmp_path / "out" / "shard-000000.json").unlink()  # killed between the shard and its index
    assert write(folder, tmp_path / "out") == 0
    assert [path.name[:12] for path in written] == ["shard-000000", *(f"shard-{n:06d}" for n in range(3))]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert write(folder, tmp_path / "out") == 0 and len(written) == 4
    assert write(folder, tmp_path / "out", rows=4) == 2


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:3000]), "ends before"),
        (lambda path: path.with_suffix(".json").unlink(), "its index shard-000001.json is missing"),
        (lambda path: shutil.copyfile(path.with_name("shard-000000.json"), path.with_suffix(".json")), "has no member"),
        (lambda path: path.with_suffix(".json").write_text("{}"), "shard-000001.json: is damaged: copy it again"),
        (lambda path: path.with_suffix(".json").write_bytes(b"\xff"), "shard-000001.json: is damaged: copy it again"),
        (lambda path: path.unlink(), "does not exist"),
    ],
)
def test_damage_is_told_before_the_first_step(folder: Path, tmp_path: Path, harm, told: str):
    write(folder, tmp_path / "out")
    harm(tmp_path / "out" / "shard-000001.tar")
    with pytest.raises(InputError, match=told):
        manifest.check(manifest.read(tmp_path / "out"), conditions=False)


def test_check_knows_a_byte_that_changed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write(folder, tmp_path / "out")
    path = tmp_path / "out" / "shard-000002.tar"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # padding, which no image shows
    path.write_bytes(content)
    assert run(main, ["check", "--data_dir", str(tmp_path / "out"), "--stage", "coarse"]) == 2
    assert "shard-000002.tar: its SHA-256" in capsys.readouterr().out
    path.with_suffix(".json").write_text("[")
    assert run(main, ["check", "--data_dir", str(tmp_path / "out"), "--stage", "coarse"]) == 2
    assert "shard-000002.json: is damaged" in capsys.readouterr().out
    assert write(folder, tmp_path / "out") == 0  # made again
    assert run(main, ["check", "--data_dir", str(tmp_path / "out"), "--stage", "coarse"]) == 0


def test_nothing_is_written_where_a_file_is_missing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(main, ["shards", "--data_dir", str(folder), "--output_dir", str(tmp_path / "out"), "--dry_run"]) == 0
    (folder / "file_name" / "3.png").unlink()
    assert write(folder, tmp_path / "out") == 2 and "1 files do not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_shards_are_plain_tar_files(folder: Path, tmp_path: Path):
    write(folder, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        assert all(entry.mtime == 0 and not entry.uname for entry in tar)
        assert tar.getnames()[:4] == ["000000000.png", "000000000.mask.png", "000000000.map.png", "000000000.json"]
