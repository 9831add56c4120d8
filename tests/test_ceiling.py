"""benchmarks/ceiling.py: stand-ins for the images of better generators."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import ceiling
from data import phantom
from tiger import manifest
from tiger.errors import InputError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> manifest.Manifest:
    return phantom.write_dataset(tmp_path_factory.mktemp("data"), 16, 4, "balanced", workers=1)


def picture(data: manifest.Manifest, row: manifest.Row) -> np.ndarray:
    return np.asarray(Image.open(data.file(row, "file_name")), np.float32)


def test_requests_are_drawn_with_the_attributes_that_were_asked_for(data: manifest.Manifest, tmp_path: Path) -> None:
    rows = [json.loads(line) | {"synthetic": True} for line in data.path.read_text().splitlines()]
    for row in rows:  # one request many times, but for the brightness, which a mean tells
        row["attributes"] = rows[0]["attributes"] | {"brightness": ("low bright", "high bright")[rows.index(row) % 2]}
    asked = tmp_path / "asked" / manifest.FILE_NAME
    asked.parent.mkdir()
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, seed in {"a": "0", "again": "0", "b": "1"}.items():
        ceiling.main(["requests", "--fake", str(asked), "--output_dir", str(tmp_path / name), "--seed", seed])
    a, again, b = (manifest.read(tmp_path / name) for name in ("a", "again", "b"))
    levels = [picture(a, row).mean() for row in a.rows]
    assert max(levels[0::2]) < min(levels[1::2])
    assert all(row.synthetic and row.split == "train" and not row.derived_from for row in a.rows)
    assert {row.patient_id for row in a.rows}.isdisjoint(row.patient_id for row in data.rows)
    assert [row.label for row in a.rows] == [row["label"] for row in rows]
    assert all((picture(a, x) == picture(again, y)).all() for x, y in zip(a.rows, again.rows, strict=True))
    assert not any((picture(a, x) == picture(b, y)).all() for x, y in zip(a.rows, b.rows, strict=True))


def test_requests_that_leave_an_attribute_open_are_refused(data: manifest.Manifest, tmp_path: Path) -> None:
    rows = [json.loads(line) | {"synthetic": True} for line in data.path.read_text().splitlines()]
    del rows[3]["attributes"]["halo"]
    asked = tmp_path / manifest.FILE_NAME
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=rows[3]["file_name"]):
        ceiling.main(["requests", "--fake", str(asked), "--output_dir", str(tmp_path / "out")])


def test_decoded_images_are_those_images_but_for_what_the_autoencoder_loses(
    data: manifest.Manifest, tmp_path: Path
) -> None:
    command = ["decoder", "--real", str(data.path), "--model", str(ROOT / "assets/tiny-base"), "--count", "2"]
    ceiling.main([*command, "--output_dir", str(tmp_path)])
    made = manifest.read(tmp_path)
    assert sorted(str(row.label) for row in made.rows) == sorted(["benign", "PTC", "FTC", "MTC"] * 2)
    source = {row.file_name: row for row in data.rows}
    for row in made.rows:
        original, other = picture(data, source[row.file_name]), picture(data, data.rows[0])
        error = np.abs(picture(made, row) - original).mean()
        assert 0 < error < 12
        assert row.file_name == data.rows[0].file_name or error < np.abs(other - original).mean()
    with pytest.raises(InputError, match="fewer than --count 5 training images"):
        ceiling.main([*command[:-1], "5", "--output_dir", str(tmp_path / "more")])
