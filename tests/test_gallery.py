"""The gallery in a real browser: what it shows, filters and sorts; and that a prompt cannot break out of it."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from eval_samples import write_dataset
from PIL import Image

from eval import gallery
from tiger import manifest
from tiger.errors import run
from tiger.manifest import Manifest, to_record

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "solid </script><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Manifest]:
    """(real, fake): five synthetic images, scored by the gate, one of them rejected."""
    root = tmp_path_factory.mktemp("gallery")
    real = write_dataset(root / "real", {"train": {"benign": 2, "FTC": 2}}, seed=1)
    sources = [row.file_name for row in real.rows]
    fake = write_dataset(
        root / "fake", {"train": {"benign": 3, "FTC": 2}}, seed=2, synthetic=True, prefix="S", sources=sources
    )
    rows = [replace(fake.rows[0], text_fg=EVIL, derived_from=()), *fake.rows[1:]]
    records = [{**to_record(row), "gate": {"scores": {"realism": 0.1 * i}}} for i, row in enumerate(rows)]
    records[2]["gate"]["reasons"] = ["realism 0.2 is below 0.5"]
    fake.path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return real, manifest.read(fake.root)


@pytest.fixture(scope="module")
def made(folders: tuple[Manifest, Manifest]) -> Path:
    real, fake = folders
    output = fake.root / "gallery.html"
    gallery.main(["--real", str(real.root), "--fake", str(fake.root), "--output", str(output), "--size", "32"])
    return output


def in_browser(path: Path, fragment: str = "") -> str:
    """The page after its script has run."""
    if CHROMIUM is None:
        pytest.skip("no chromium")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom"]
    url = f"{path.as_uri()}#{fragment}" if fragment else path.as_uri()
    return subprocess.run([*command, url], capture_output=True, text=True, timeout=120, check=True).stdout


def shown(dom: str) -> list[str]:
    """File names in the order of the page."""
    return re.findall(r"<h2>\w+ · ([^<]+)</h2>", dom)


def test_every_image_is_shown_beside_its_source(made: Path, folders: tuple[Manifest, Manifest]) -> None:
    dom = in_browser(made)
    names = [row.file_name for row in folders[1].rows]
    assert shown(dom) == names
    assert "5 of 5 images." in dom
    assert len(re.findall(r'alt="synthetic', dom)) == 5 and len(re.findall(r'alt="real', dom)) == 4
    for row in folders[1].rows[1:]:
        assert f": {row.derived_from[0]}</figcaption>" in dom
    assert "rejected: realism 0.2 is below 0.5" in dom
    assert "<title>owned" not in dom and "&lt;/script&gt;" in dom  # the prompt is text
    assert not re.search(r'(?:src|href)="(?!data:)', dom)  # nothing is fetched


@pytest.mark.parametrize(
    ("fragment", "expected"),
    [
        ("label=FTC", [3, 4]),
        ("verdict=rejected", [2]),
        ("verdict=kept&label=benign", [0, 1]),
        ("score+realism=0.25", [3, 4]),
        ("order=" + quote("-realism"), [4, 3, 2, 1, 0]),
    ],
)
def test_filters(made: Path, folders: tuple[Manifest, Manifest], fragment: str, expected: list[int]) -> None:
    names = [row.file_name for row in folders[1].rows]
    assert shown(in_browser(made, fragment)) == [names[i] for i in expected]


def test_attributes_filter(made: Path, folders: tuple[Manifest, Manifest]) -> None:
    rows = folders[1].rows
    place = rows[0].attributes["location"]
    dom = in_browser(made, f"attribute+location={quote(place)}")
    assert shown(dom) == [row.file_name for row in rows if row.attributes["location"] == place]


def test_contact_sheet(made: Path, folders: tuple[Manifest, Manifest]) -> None:
    with Image.open(made.with_suffix(".png")) as image:
        sheet = np.asarray(image.convert("RGB"))
    assert sheet.shape == (4 * 32 + 3 * 3, 3 * 32 + 2 * 3, 3)  # two rows a class, three tiles wide, gaps of 3
    assert (sheet[:32, :32] == (255, 196, 0)).all(-1).any()  # the outline
    assert (sheet[35:67, :32] == 255).all()  # the first has no source


def test_no_more_than_asked_for_and_evenly_spread(folders: tuple[Manifest, Manifest], tmp_path: Path) -> None:
    real, fake = folders
    argv = ["--real", str(real.root), "--fake", str(fake.root), "--output", str(tmp_path / "few.html"), "--most", "3"]
    gallery.main([*argv, "--size", "16"])
    data = re.search(r'id="data">(.*?)</script>', (tmp_path / "few.html").read_text(), re.DOTALL)
    assert data and [entry["name"] for entry in json.loads(data[1])[1:]] == [row.file_name for row in fake.rows[::2]]


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--output", "page.txt"], "give the name of an HTML file"), (["--size", "0"], "must be at least 1")],
)
def test_bad_input(
    folders: tuple[Manifest, Manifest],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    real, fake = folders
    argv = ["--real", str(real.root), "--fake", str(fake.root), "--output", str(tmp_path / "x.html"), *more]
    assert run(gallery.main, argv) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
