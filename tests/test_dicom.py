"""DICOM in: codings, windows, regions and clips come out as a viewer shows them, and nothing names the patient."""

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, UltrasoundMultiFrameImageStorage, generate_uid

from data import burned_in, dicom
from data.burned_in import blacken, text_boxes
from data.prepare import main
from tiger.errors import InputError, run
from tiger.manifest import read

ROOT = Path(__file__).resolve().parents[1]
NAME = "Doejohn4711"
COLOUR_BARS = [  # one picture in many codings
    "SC_rgb_jpeg_gdcm.dcm", "SC_rgb_gdcm_KY.dcm", "SC_rgb_jls_lossy_line.dcm", "SC_rgb_jls_lossy_sample.dcm",
    "SC_rgb_dcmtk_+eb+cr.dcm", "SC_rgb_dcmtk_+eb+cy+n1.dcm", "SC_rgb_dcmtk_+eb+cy+np.dcm", "SC_rgb_dcmtk_+eb+cy+s4.dcm",
    "SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_jpeg_lossy_gdcm.dcm", "SC_ybr_full_422_uncompressed.dcm", "SC_rgb_rle_16bit.dcm",
    "SC_rgb_rle_2frame.dcm",
]  # fmt: skip
needs_reader = pytest.mark.skipif(
    importlib.util.find_spec("rapidocr_onnxruntime") is None, reason="rapidocr-onnxruntime is not here"
)


def bundled(name: str) -> Path:
    """One of pydicom's own test files."""
    return Path(str(get_testdata_file(name, download=False)))


def make(path: Path, pixels: np.ndarray, **attributes: Any) -> Path:
    """A DICOM file of frames HxW or FxHxW (uint8, uint16 or int16)."""
    frames = pixels[None] if pixels.ndim == 2 else pixels
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.Modality = (
        UltrasoundMultiFrameImageStorage,
        generate_uid(),
        "US",
    )
    dataset.Rows, dataset.Columns = frames.shape[1:3]
    dataset.NumberOfFrames, dataset.SamplesPerPixel = len(frames), 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.itemsize
    dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, int(pixels.dtype.kind == "i")
    for name, value in attributes.items():
        setattr(dataset, name, value)
    dataset.PixelData = frames.tobytes() + b"\0" * (frames.nbytes % 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def region(x0: int, y0: int, x1: int, y1: int, data_type: int = 1, spatial: int = 1) -> Dataset:
    item = Dataset()
    item.RegionSpatialFormat, item.RegionDataType = spatial, data_type
    item.RegionLocationMinX0, item.RegionLocationMinY0 = x0, y0
    item.RegionLocationMaxX1, item.RegionLocationMaxY1 = x1, y1  # inclusive
    return item


def speckle(seed: int, height: int = 160, width: int = 240) -> np.ndarray:
    """Ultrasound-like texture without letters: mid gray, blurred noise."""
    noise = np.random.default_rng(seed).rayleigh(45, (height // 2, width // 2))
    return np.array(Image.fromarray(np.clip(noise, 0, 150).astype(np.uint8)).resize((width, height), 3))


def write_text(gray: np.ndarray, text: str, x: int, y: int, size: int = 16, font: str = "DejaVuSans") -> np.ndarray:
    image = Image.fromarray(gray)
    letters = ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"), size)
    ImageDraw.Draw(image).text((x, y), text, fill=255, font=letters)
    return np.array(image)


# ------------------------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("name", COLOUR_BARS)
def test_every_coding_of_one_picture_gives_one_gray(name: str):
    rgb = dcmread(bundled("SC_rgb_rle.dcm")).pixel_array.astype(float)
    luma = rgb @ (0.299, 0.587, 0.114)
    gray = dicom.read_image(bundled(name))
    assert gray.dtype == np.uint8 and gray.shape == luma.shape
    assert np.abs(gray - luma).mean() < 1.5


def test_palette_is_looked_up():
    dataset = dcmread(bundled("examples_palette.dcm"))
    tables = [
        np.frombuffer(getattr(dataset, f"{c}PaletteColorLookupTableData"), "<u2") for c in ("Red", "Green", "Blue")
    ]
    luma = np.stack([table[dataset.pixel_array] / 256 for table in tables], -1) @ (0.299, 0.587, 0.114)
    assert np.abs(dicom.read_image(bundled("examples_palette.dcm")) - luma).max() <= 1.5


def test_monochrome1_with_a_window_is_turned_over():
    path = bundled("dicomdirtests/77654033/CR1/6154")
    dataset = dcmread(path)
    centre, width = float(dataset.WindowCenter), float(dataset.WindowWidth)
    values = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    share = np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)  # PS3.3 C.11.2.1.2
    assert np.abs(dicom.read_image(path) - 255 * (1 - share)).max() <= 1


def test_rescale_window_and_sign(tmp_path: Path):
    values = np.arange(-1024, 1024, 8, dtype=np.int16).reshape(16, 16)
    window = {"RescaleSlope": 2, "RescaleIntercept": 100, "WindowCenter": 0, "WindowWidth": 401}
    gray = dicom.read_image(make(tmp_path / "a", values, BitsStored=12, HighBit=11, **window))
    expected = np.clip((values * 2.0 + 100 + 0.5) / 400 + 0.5, 0, 1) * 255
    assert np.abs(gray - expected).max() <= 1


def test_8_bits_without_a_window_are_shown_as_they_are(tmp_path: Path):
    dim = speckle(0)
    assert dim.max() < 200
    assert np.array_equal(dicom.read_image(make(tmp_path / "a", dim)), dim)
    signed = dicom.read_image(make(tmp_path / "b", (dim.astype(int) - 128).astype(np.int8), RescaleIntercept=128))
    assert np.array_equal(signed, dim)


def test_a_window_gives_frames_of_one_clip_one_scale(tmp_path: Path):
    frames = np.stack([np.full((8, 8), level, np.uint8) for level in (60, 120)])
    frames[:, 0, 0] = 0
    dataset = dicom.read(make(tmp_path / "a", frames, WindowCenter=128, WindowWidth=256))
    low, high = dicom.gray_frames(dataset, [0, 1])
    assert (low[4, 4], high[4, 4]) == (60, 120)


def test_voi_lut_goes_before_the_window(tmp_path: Path):
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [4, 0, 16])
    item.add_new("LUTData", "US", [0, 65535, 32768, 0])
    pixels = np.array([[0, 1], [2, 3]], np.uint8)
    options = {"VOILUTSequence": Sequence([item]), "WindowCenter": 1, "WindowWidth": 2}
    assert dicom.read_image(make(tmp_path / "a", pixels, **options)).tolist() == [[0, 255], [128, 0]]


def test_overlay_bits_and_padding_do_not_show(tmp_path: Path):
    values = np.tile(np.linspace(100, 4000, 64).astype(np.uint16), (64, 1))
    plain = dicom.read_image(make(tmp_path / "a", values, BitsStored=12, HighBit=11))
    overlaid = values.copy()
    overlaid[20:30] |= 1 << 13
    assert np.array_equal(dicom.read_image(make(tmp_path / "b", overlaid, BitsStored=12, HighBit=11)), plain)
    padded = values.copy()
    padded[:10] = 4095
    for kind, expected in (("MONOCHROME1", 255 - plain), ("MONOCHROME2", plain)):
        options = {"BitsStored": 12, "HighBit": 11, "PhotometricInterpretation": kind, "PixelPaddingValue": 4095}
        gray = dicom.read_image(make(tmp_path / kind, padded, **options))
        assert not gray[:10].any() and np.array_equal(gray[10:], expected[10:])


def test_damaged_files_are_named(tmp_path: Path):
    (tmp_path / "no").write_text("hello")
    for path, told in (
        (tmp_path / "no", "no DICOM file"), (tmp_path / "none", "no such file"),
        (bundled("MR_truncated.dcm"), "damaged"), (bundled("JPEG-lossy.dcm"), "lossy JPEG of 12 bits"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=told):
            dicom.read_image(path)


def test_scan_regions_are_the_2d_ones():
    dataset = Dataset()
    dataset.Rows, dataset.Columns = 100, 200
    assert dicom.scan_regions(dataset) == []
    dataset.SequenceOfUltrasoundRegions = Sequence(
        [region(0, 0, 89, 99), region(10, 10, 50, 50, 2), region(100, 0, 250, 99), region(0, 0, 9, 9, 3, 3)]
    )
    assert dicom.scan_regions(dataset) == [(0, 0, 90, 100), (100, 0, 200, 100)]
    dataset.SequenceOfUltrasoundRegions = Sequence([region(300, 0, 400, 10)])
    with pytest.raises(dicom.Unusable, match="outside the image"):
        dicom.scan_regions(dataset)


def test_frames_are_spread_over_a_clip():
    assert dicom.pick_frames(30, 1) == [15]
    assert dicom.pick_frames(30, 3) == [5, 15, 25]
    assert dicom.pick_frames(2, 5) == dicom.pick_frames(2, 0) == [0, 1]


# --------------------------------------------------------------------------------------------------------------- text


@needs_reader
def test_rendered_text_is_found_and_masked():
    """The bar is one miss in twelve: letters of 10 px are at the limit. Clean speckle stays as it is."""
    found = 0
    texts = ("DOE JOHN 12/03/1961", "ID 4471-93")
    for seed, (size, font, text) in enumerate(
        (size, font, text) for size in (10, 16, 28) for font in ("DejaVuSans", "DejaVuSansMono") for text in texts
    ):
        clean = speckle(seed, 240, 360)
        marked = write_text(clean, text, 20 + 4 * seed, 10 + 8 * seed, size, font)
        left = blacken(marked, text_boxes(marked))
        letters = marked.astype(int) - clean > 40
        found += (left[letters] == 0).mean() > 0.95
        if seed < 3:
            assert not text_boxes(clean)
    assert found >= 11


def test_a_missing_reader_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    burned_in._reader.cache_clear()
    make(tmp_path / "in" / "a", speckle(1, 40, 60))
    assert deidentify(tmp_path) == 2
    (told,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert "needs the package rapidocr-onnxruntime (Python below 3.13)" in told and "--text keep" in told


def test_the_lock_asks_for_the_reader_only_where_it_runs():
    """Without its marker, not one package is installed on a Python that the reader does not support."""
    pins = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    (pin,) = (line for line in pins if line.startswith("rapidocr"))
    (wish,) = (line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("rapidocr"))
    assert pin.partition(";")[2] == wish.partition(";")[2] != ""


# ---------------------------------------------------------------------------------------------------------- the folder


def deidentify(folder: Path, *options: str) -> int:
    argv = ["--input", str(folder / "in"), "--output_dir", str(folder / "out"), "--workers", "1", *options]
    return run(main, ["dicom", *argv])


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "out" / "metadata.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))


def planted(path: Path, pixels: np.ndarray, **attributes: Any) -> Path:
    """A file with the name in every kind of text attribute, private and nested ones, overlay, icon and preamble."""
    make(path, pixels, **attributes)
    dataset = dcmread(path)
    texts = {
        "PN": "PatientName", "LO": "PatientID", "LT": "PatientComments", "SH": "AccessionNumber",
        "ST": "InstitutionAddress", "AE": "StationAETitle", "CS": "BodyPartExamined", "UC": "LongCodeValue",
        "UT": "TextValue", "UR": "RetrieveURL",
        "DA": "StudyDate", "TM": "StudyTime", "DT": "AcquisitionDateTime", "AS": "PatientAge", "IS": "SeriesNumber",
        "DS": "PatientWeight", "UI": "StudyInstanceUID",
    }  # fmt: skip
    for vr, keyword in texts.items():
        dataset.add_new(keyword, vr if vr not in ("IS", "DS") else "LO", NAME)
    dataset.ReferringPhysicianName = dataset.InstitutionName = dataset.OperatorsName = NAME
    inner = Dataset()
    inner.RequestedProcedureDescription = inner.PatientName = NAME
    inner.private_block(0x11, NAME, create=True).add_new(1, "LO", NAME)
    dataset.RequestAttributesSequence = Sequence([inner])
    dataset.private_block(0x19, NAME, create=True).add_new(1, "UN", NAME.encode())
    icon = Dataset()
    icon.PatientComments = NAME
    dataset.IconImageSequence = Sequence([icon])
    dataset.add_new(0x60000022, "LO", NAME)  # Overlay Description
    dataset.add_new(0x60003000, "OW", NAME.encode() + b"0")
    dataset.file_meta.SourceApplicationEntityTitle = NAME
    dataset.file_meta.ImplementationVersionName = NAME
    dataset.preamble = NAME.encode().ljust(128, b"\0")
    dataset.save_as(path)
    return path


@needs_reader
def test_nothing_identifying_in_any_output(tmp_path: Path):
    source = tmp_path / "in" / NAME
    whole = write_text(speckle(1), NAME, 20, 8)  # a banner above the scan area
    scan = {"SequenceOfUltrasoundRegions": Sequence([region(10, 40, 229, 149)])}
    planted(source / f"{NAME}.dcm", whole, **scan)
    planted(source / f"{NAME}_bare.dcm", write_text(speckle(2), NAME, 60, 100), BurnedInAnnotation="YES")
    planted(source / f"{NAME}_CT", speckle(3), Modality=NAME[:10])
    broken = planted(source / f"{NAME}_broken", speckle(4)).read_bytes()
    (source / f"{NAME}_broken").write_bytes(broken[: len(broken) // 2])
    planted(source / f"{NAME}_kind", speckle(6), PhotometricInterpretation=NAME)  # pydicom quotes it in an error
    odd = dcmread(planted(source / f"{NAME}_odd", speckle(5), **scan))
    odd.SpecificCharacterSet = NAME  # pydicom quotes it in a warning
    odd.save_as(source / f"{NAME}_odd")
    (source / f"{NAME}.txt").write_text(NAME)
    lines = [f"in/{NAME}/x,,", f'{NAME}/{NAME}.dcm,"benign, solid nodule of {NAME}",benign']
    (tmp_path / "table.csv").write_text("\n".join(["file,text,label", *lines]), encoding="utf-8")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "data.prepare", "dicom", "--input", "in", "--output_dir", "out", "--workers", "1"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(
        [*command, "--table", "table.csv"], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    rows = table(tmp_path)
    lines = [f"{row['file_name']},{row['patient_id']},{row['text'] or 'benign'!r}".replace("'", '"') for row in rows]
    (out / "labelled.csv").write_text("\n".join(["file_name,patient_id,text", *lines]))
    argv = ["build", "--source", "folder", "--input", str(out), "--output_dir", str(tmp_path / "set")]
    assert run(main, argv) == 2  # two rows have no text yet
    assert run(main, [*argv, "--table", "labelled.csv"]) == 0
    secrets = [NAME.lower().encode(), *(value.encode() for value in all_uids(source))]
    for path in [*out.rglob("*"), *(tmp_path / "set").rglob("*")]:
        written = (path.name.encode() + (path.read_bytes() if path.is_file() else b"")).lower()
        assert not any(secret in written for secret in secrets), path
        if path.suffix == ".png":
            assert set(png_chunks(path)) == {b"IHDR", b"IDAT", b"IEND"}
    assert not any(secret in (done.stdout + done.stderr).lower() for secret in secrets)
    told = report(tmp_path)
    assert len(rows) == 3
    for why in ("of another modality (--modalities)", "no DICOM file", "damaged: ValueError"):
        assert told["left_out"][why]
    assert {
        "PatientName",
        "private",
        "RequestAttributesSequence",
        "RequestedProcedureDescription",
        "OverlayData",
    } <= set(told["removed_attributes"])
    sizes = sorted(Image.open(out / row["file_name"]).size for row in rows)
    assert sizes == [(220, 110), (220, 110), (240, 160)]
    bare = next(np.array(image) for row in rows if (image := Image.open(out / row["file_name"])).size == (240, 160))
    assert bare[100:118, 62:150].max() == 0 and (bare[:80] == speckle(2)[:80]).all()
    assert sum(row["text"] != "" for row in rows) == 1


def all_uids(folder: Path) -> list[str]:
    return [str(dcmread(path, force=True).get("SOPInstanceUID") or NAME) for path in folder.glob("*[!t]")]


def png_chunks(path: Path) -> list[bytes]:
    data, place, names = path.read_bytes(), 8, []
    while place < len(data):
        names.append(data[place + 4 : place + 8])
        place += 12 + int.from_bytes(data[place : place + 4], "big")
    return names


def test_codes_follow_the_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    key = tmp_path / "site.key"
    key.write_text("0123456789abcdef")
    for i, patient in enumerate(("P1", "P1", "P2", "")):
        attributes = {"PatientID": patient, "StudyInstanceUID": f"1.2.{i}"}
        make(tmp_path / "in" / f"{i}", speckle(i, 40, 60), **attributes)
    (tmp_path / "in" / "copy").write_bytes((tmp_path / "in" / "0").read_bytes())
    options = ("--text", "keep", "--key_file", str(key))
    assert deidentify(tmp_path, *options) == 0
    first, told = table(tmp_path), report(tmp_path)
    patients = [row["patient_id"] for row in first]
    assert len(first) == 4 and len(set(patients)) == 3 and told["copies"] == told["files_without_patient_id"] == 1
    assert deidentify(tmp_path, *options) == 0 and table(tmp_path) == first
    key.write_text("another key of a site")
    assert deidentify(tmp_path, *options) == 0
    assert not {row["patient_id"] for row in table(tmp_path)} & set(patients)
    assert deidentify(tmp_path, "--text", "keep") == 0
    assert not {row["patient_id"] for row in table(tmp_path)} & set(patients)
    key.write_text("short")
    assert deidentify(tmp_path, *options) == 2 and "too few to be a secret" in capsys.readouterr().err
    inside = tmp_path / "out" / "site.key"
    inside.write_text("0123456789abcdef")
    assert deidentify(tmp_path, "--key_file", str(inside)) == 2 and "lies in the output" in capsys.readouterr().err


@needs_reader
def test_clips_regions_and_refusal(tmp_path: Path):
    clip = np.stack([np.full((60, 90), level, np.uint8) for level in range(10, 100, 10)])
    scan = Sequence([region(0, 0, 39, 59), region(50, 0, 89, 59)])
    make(tmp_path / "in" / "clip", clip, SequenceOfUltrasoundRegions=scan, WindowCenter=128, WindowWidth=256)
    make(tmp_path / "in" / "text", write_text(speckle(1), "DOE JOHN", 40, 60))
    make(tmp_path / "in" / "declared", speckle(2), BurnedInAnnotation="YES")
    assert deidentify(tmp_path, "--text", "refuse", "--frames", "3") == 0
    told = report(tmp_path)
    assert told["left_out"] == {"bears text": [3], "says that it bears text, but none was found": [2]}
    images = sorted((tmp_path / "out" / "images").iterdir())
    assert [path.stem[-6:] for path in images] == ["0001-0", "0001-1", "0004-0", "0004-1", "0007-0", "0007-1"]
    assert [int(np.array(Image.open(path)).max()) for path in images] == [20, 20, 50, 50, 80, 80]
    assert deidentify(tmp_path, "--text", "mask", "--dry_run") == 0
    assert report(tmp_path) == told


def test_table_is_joined_and_its_faults_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for i in range(2):
        make(tmp_path / "in" / f"{i}", speckle(i, 40, 60), AccessionNumber=f"A{i}", PatientID=f"P{i}")
    reports = tmp_path / "reports.csv"
    options = ("--text", "keep", "--table", str(reports))
    reports.write_text(f'AccessionNumber,text,split\nA1,"Medullary. Solid, {NAME}",test\n')
    assert deidentify(tmp_path, *options) == 0
    assert sorted((row["text"], row["split"]) for row in table(tmp_path)) == [
        ("", ""), ("malignant, medullary, solid, sonogram", "test")
    ]  # fmt: skip
    assert report(tmp_path)["table"] == {"lines": 1, "images_with_a_line": 1, "phrases_left_out": 1}
    reports.write_text(
        f"AccessionNumber,text,label,split\nA0,,{NAME},\nA0,regular shape and irregular shape,benign,{NAME}\n"
    )
    assert deidentify(tmp_path, *options) == 2
    told = capsys.readouterr().err
    for expected in ("line 2: label is none of", "line 3: its AccessionNumber is in an earlier line",
                     "contradicts itself", "line 3: split is none of"):  # fmt: skip
        assert expected in told
    assert NAME not in told
    reports.write_text("name,text\n")
    assert deidentify(tmp_path, *options) == 2 and "needs one of the columns" in capsys.readouterr().err


def test_an_export_without_images_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert deidentify(tmp_path) == 2 and "no such folder" in capsys.readouterr().err
    (tmp_path / "in").mkdir()
    assert deidentify(tmp_path) == 2 and "holds no files" in capsys.readouterr().err
    (tmp_path / "in" / "a").write_text("hello")
    assert deidentify(tmp_path) == 2 and "none of 1 files gave an image (1: no DICOM file)" in capsys.readouterr().err
    assert report(tmp_path)["left_out"] == {"no DICOM file": [1]}
    (tmp_path / "in" / "a").write_bytes(bundled("CT_small.dcm").read_bytes())
    assert deidentify(tmp_path) == 2 and "1: of another modality (--modalities)" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        deidentify(tmp_path, "--frames", "-1")
    assert stop.value.code == 2


def test_the_output_is_read_by_build(tmp_path: Path):
    make(tmp_path / "in" / "a", speckle(1, 40, 60), PatientID="P1")
    (tmp_path / "t.csv").write_text('PatientID,text\nP1,"benign, solid"\n')
    assert deidentify(tmp_path, "--text", "keep", "--table", str(tmp_path / "t.csv")) == 0
    argv = ["build", "--source", "folder", "--input", str(tmp_path / "out"), "--output_dir", str(tmp_path / "set")]
    assert run(main, argv) == 0
    (row,) = read(tmp_path / "set").rows
    assert (row.text_fg, row.patient_id) == ("benign, solid", table(tmp_path)[0]["patient_id"])
