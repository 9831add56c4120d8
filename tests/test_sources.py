"""Adapters of public data sets, each on a miniature of the published layout, and the generic one."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_dicom import make, speckle

from data.prepare import main
from data.sources import busi, chexpert
from tiger.errors import run
from tiger.knowledge import Knowledge
from tiger.manifest import Row, check, read

XRAYS = Path(__file__).resolve().parents[2] / "shared" / "data" / "pediatric_cxr"
# The classes of annotations_*.csv and the diseases of image_labels_*.csv, in the spelling of VinDr-PCXR 1.0.0.
VINDR_FINDINGS = (
    "Anterior mediastinal mass", "Aortic enlargement", "Atelectasis", "Boot-shaped heart", "Bronchectasis",
    "Bronchial thickening", "Calcification", "Cardiomegaly", "Chest wall mass", "Clavicle fracture", "Consolidation",
    "Dextro cardia", "Diffuse aveolar opacity", "Edema", "Egg on string sign", "Emphysema", "Enlarged PA",
    "Expanded edges of the anterior ribs", "Infiltration", "Interstitial lung disease - ILD",
    "Intrathoracic digestive structure", "Lung cavity", "Lung cyst", "Lung hyperinflation", "Mediastinal shift",
    "Other lesion", "Other nodule/mass", "Other opacity", "Paraveterbral mass",
    "Peribronchovascular interstitial opacity", "Pleural effusion", "Pleural thickening", "Pneumothorax",
    "Pulmonary fibrosis", "Reticulonodular opacity", "Stomach on the right side",
)  # fmt: skip
VINDR_DISEASES = (
    "No finding", "Bronchitis", "Brocho-pneumonia", "Other disease", "Bronchiolitis", "Situs inversus", "Pneumonia",
    "Pleuro-pneumonia", "Diagphramatic hernia", "Tuberculosis", "Congenital emphysema", "CPAM",
    "Hyaline membrane disease", "Mediastinal tumor", "Lung tumor",
)  # fmt: skip


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)


def mask(x: int) -> np.ndarray:
    array = np.zeros((40, 48))
    array[10:20, x : x + 8] = 255
    return array


def write_csv(path: Path, *lines: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(str, lines)) + "\n", encoding="utf-8")


def build(source: str, folder: Path, *options: str) -> int:
    argv = ["--source", source, "--input", str(folder / "in"), "--output_dir", str(folder / "out"), *options]
    return run(main, ["build", *argv])


def rows_of(folder: Path, knowledge: str) -> dict[str, Row]:
    """Stem → row of a data set that passes its checks under that vocabulary."""
    data = read(folder / "out")
    check(data, conditions=False, knowledge=Knowledge.load(knowledge))
    for row in data.rows:
        assert not Knowledge.load(knowledge).parse(row.text).unknown
    return {Path(row.file_name).stem: row for row in data.rows}


# --------------------------------------------------------------------------------------------------------------- BUSI


def busi_folder(folder: Path) -> None:
    for label in ("benign", "malignant", "normal"):
        for i in range(1, 8):
            twin = label == "benign" and i == 7  # the same lesion as benign (1), a little brighter
            image = speckle(len(label) * 10 + (1 if twin else i), 40, 48) + (2 if twin else 0)
            save(folder / label / f"{label} ({i}).png", np.dstack([image] * 3))
            save(folder / label / f"{label} ({i})_mask.png", mask(4) if label != "normal" else np.zeros((40, 48)))
    save(folder / "benign" / "benign (2)_mask_1.png", mask(30))


def test_busi(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    busi_folder(tmp_path / "in" / "Dataset_BUSI_with_GT")
    assert build("busi", tmp_path) == 0
    told = capsys.readouterr().out
    assert "left out 7 of 21 images: normal" in told and "14 images look like 13 patients" in told
    rows = rows_of(tmp_path, "breast")
    assert Counter(row.label for row in rows.values()) == {"benign": 7, "malignant": 7}
    assert rows["benign_1"].patient_id == rows["benign_7"].patient_id != rows["benign_2"].patient_id
    assert rows["benign_1"].split == rows["benign_7"].split
    both = np.array(Image.open(tmp_path / "out" / "condition_fg" / "benign_2.png"))
    assert both[12, 5] == both[12, 32] == 255 and np.count_nonzero(both) == 160
    assert rows["malignant_3"].text_fg == "malignant"


def test_busi_lists_images_without_a_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    busi_folder(tmp_path / "in")
    for i in (1, 3):
        (tmp_path / "in" / "malignant" / f"malignant ({i})_mask.png").unlink()
    assert build("busi", tmp_path) == 2
    told = capsys.readouterr().err
    assert "2 problems" in told and "malignant (1)_mask.png" in told and "malignant (3)_mask.png" in told
    (tmp_path / "empty" / "in").mkdir(parents=True)
    assert build("busi", tmp_path / "empty") == 2 and "give the folder Dataset_BUSI" in capsys.readouterr().err


def test_look_alikes():
    first, other = speckle(1, 80, 96), speckle(2, 80, 96)
    brighter, marked = np.clip(first * 1.1 + 5, 0, 255).astype(np.uint8), first.copy()
    marked[0, 0] = 255
    assert busi.look_alikes([first, other, brighter, marked]) == [0, 1, 0, 0]


# --------------------------------------------------------------------------------------------------------- VinDr-PCXR


def vindr_folder(folder: Path) -> None:
    images = {"train": {"Bronchitis": 20, "Brocho-pneumonia": 8, "Bronchiolitis": 6, "Pneumonia": 9, "No finding": 3},
              "test": {"Bronchitis": 2, "Pneumonia": 3, "Situs inversus": 1}}  # fmt: skip
    for split, counts in images.items():
        labels, boxes = [], []
        for disease, count in counts.items():
            for i in range(count):
                name = f"{split}{disease.replace(' ', '')}{i}"
                positive = {disease, "Pneumonia" if name == "trainBronchitis0" else disease}
                labels.append(",".join([name, "R1", *("1.0" if d in positive else "0.0" for d in VINDR_DISEASES)]))
                boxes += [
                    f"{name},R1,{finding},1,1,9,9" for finding in ("Consolidation", "Enlarged PA", "Consolidation")
                ]
                options = {
                    "PhotometricInterpretation": "MONOCHROME1",
                    "Modality": "CR",
                    "BitsStored": 12,
                    "HighBit": 11,
                }
                make(folder / split / f"{name}.dicom", speckle(i, 24, 20).astype(np.uint16), **options)
        boxes.append(f"{name},R1,No finding,,,,")
        write_csv(folder / f"image_labels_{split}.csv", ",".join(["image_id", "rad_ID", *VINDR_DISEASES]), *labels)
        write_csv(folder / f"annotations_{split}.csv", "image_id,rad_ID,class_name,x_min,y_min,x_max,y_max", *boxes)


def test_vindr_pcxr(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    vindr_folder(tmp_path / "in")
    assert build("vindr_pcxr", tmp_path) == 0
    told = capsys.readouterr().out
    assert "left out 5 of 52 images: of none or several" in told  # 3 normal, 1 of another disease, 1 of two
    assert "left out 7 training images of pneumonia" in told  # 10 % of 19 images of bronchitis, rounded up
    rows = rows_of(tmp_path, "chest_xray")
    train = Counter(row.label for row in rows.values() if row.split != "test")
    assert train == {"bronchitis": 19, "broncho-pneumonia": 8, "bronchiolitis": 6, "pneumonia": 2}
    assert Counter(row.label for row in rows.values() if row.split == "test") == {"bronchitis": 2, "pneumonia": 3}
    assert any(row.split == "valid" for row in rows.values())
    row = rows["trainBronchitis1"]
    assert (row.text_fg, row.patient_id) == ("abnormal, bronchitis, consolidation", "trainBronchitis1")
    assert "enlarged pulmonary artery" in row.text_bg and "posteroanterior view" in row.text_bg
    gray = np.array(Image.open(tmp_path / "out" / row.file_name)).astype(int)
    assert np.corrcoef(gray.ravel(), speckle(1, 24, 20).ravel())[0, 1] < -0.99  # MONOCHROME1
    assert build("vindr_pcxr", tmp_path, "--rare_share", "1", "--seed", "1") == 0
    assert Counter(row.label for row in read(tmp_path / "out").rows)["pneumonia"] == 12
    (tmp_path / "in" / "test" / "testPneumonia0.dicom").write_text("junk")
    (tmp_path / "in" / "test" / "testPneumonia1.dicom").unlink()
    assert build("vindr_pcxr", tmp_path) == 2
    told = capsys.readouterr().err
    assert "2 problems" in told and "no DICOM file" in told and "no such file" in told


def test_every_published_finding_is_known():
    knowledge = Knowledge.load("chest_xray")
    for finding in (*VINDR_FINDINGS, *chexpert.FINDINGS):
        parsed = knowledge.parse(finding)
        assert (parsed.attributes or parsed.label) and not parsed.unknown, finding


# ----------------------------------------------------------------------------------------------------------- CheXpert


def chexpert_folder(folder: Path) -> None:
    header = ",".join(["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", "No Finding", *chexpert.FINDINGS])

    def line(split: str, patient: int, view: str, projection: str, **values: str) -> str:
        path = f"CheXpert-v1.0-small/{split}/patient{patient:05d}/study1/view1_{view.lower()}.jpg"
        save(folder / Path(path).relative_to("CheXpert-v1.0-small"), speckle(patient, 20, 24))
        cells = (values.get(name.replace(" ", "_"), "") for name in ("No Finding", *chexpert.FINDINGS))
        return ",".join([path, "Female", "50", view, projection, *cells])

    write_csv(
        folder / "train.csv", header,
        line("train", 1, "Frontal", "AP", Edema="1.0", Support_Devices="1.0", Pneumonia="-1.0", Pneumothorax="0.0"),
        line("train", 1, "Lateral", "", Edema="1.0"),
        line("train", 2, "Frontal", "PA", No_Finding="1.0"),
        line("train", 3, "Frontal", "AP", Pneumonia="1.0", Consolidation="-1.0"),
        *(line("train", patient, "Frontal", "PA", Cardiomegaly="1.0") for patient in range(4, 24)),
    )  # fmt: skip
    write_csv(folder / "valid.csv", header, line("valid", 90, "Frontal", "PA", Pleural_Effusion="1.0"))


@pytest.mark.parametrize(
    ("policy", "first", "third", "count"),
    [
        ("zeros", ("other disease", "edema"), ("pneumonia", ""), 24),
        ("ones", ("pneumonia", "edema"), ("pneumonia", "consolidation"), 24),
        ("ignore", None, None, 22),
    ],
)
def test_chexpert(
    tmp_path: Path, policy: str, first: tuple[str, str] | None, third: tuple[str, str] | None, count: int,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    chexpert_folder(tmp_path / "in")
    assert build("chexpert", tmp_path, "--uncertain", policy) == 0
    assert "left out 1 lateral views" in capsys.readouterr().out
    rows = rows_of(tmp_path, "chest_xray")
    assert len(rows) == count
    for name, expected in (("patient00001_study1_view1_frontal", first), ("patient00003_study1_view1_frontal", third)):
        assert (name in rows) == (expected is not None)
        if expected:
            found = rows[name].attributes.values()
            assert (
                rows[name].label,
                ", ".join(sorted({*found} & {"edema", "consolidation", "pneumothorax"})),
            ) == expected
    normal, held_out = rows["patient00002_study1_view1_frontal"], rows["patient00090_study1_view1_frontal"]
    assert (normal.label, normal.text_fg, normal.patient_id) == ("normal", "normal", "patient00002")
    assert "posteroanterior view" in normal.text_bg
    assert held_out.split == "test" and "pleural effusion" in held_out.text_bg
    assert 1 <= Counter(row.split for row in rows.values())["valid"] <= 4


# --------------------------------------------------------------------------------------------------------------- ISIC


def isic_folder(folder: Path) -> None:
    classes = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
    images, names = folder / "ISIC2018_Task3_Training_Input", [f"ISIC_{i:07d}" for i in range(14)]
    truth = [f"{name},{','.join('1.0' if i % 7 == j else '0.0' for j in range(7))}" for i, name in enumerate(names)]
    write_csv(folder / "GT" / "ISIC2018_Task3_Training_GroundTruth.csv", f"image,{','.join(classes)}", *truth)
    groups = [f"{name},HAM_{0 if i in (0, 7) else i},histo" for i, name in enumerate(names)]
    write_csv(
        folder / "GT" / "ISIC2018_Task3_Training_LesionGroupings.csv", "image,lesion_id,diagnosis_confirm_type", *groups
    )
    for i, name in enumerate(names):
        save(images / f"{name}.jpg", np.dstack([speckle(i, 40, 48)] * 3))
    save(folder / "masks" / f"{names[2]}_segmentation.png", mask(5))
    late = [
        "ISIC_0000002,1,0,0,0,0,0,0,0,0",
        "ISIC_0073000_downsampled,0,0,0,0,0,0,0,1,0",
        "ISIC_0073001,0,0,0,0,0,0,0,0,1",
    ]
    write_csv(folder / "ISIC_2019_Training_GroundTruth.csv", "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK", *late)
    metadata = ["ISIC_0073000_downsampled,50,head/neck,,male"]
    write_csv(
        folder / "ISIC_2019_Training_Metadata.csv", "image,age_approx,anatom_site_general,lesion_id,sex", *metadata
    )
    save(folder / "ISIC_2019_Training_Input" / "ISIC_0073000_downsampled.jpg", np.dstack([speckle(99, 40, 48)] * 3))


def test_isic_2018_and_2019_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    isic_folder(tmp_path / "in")
    assert build("isic", tmp_path, "--size", "32") == 0
    told = capsys.readouterr().out
    assert "left out 1 of 16 images: of unknown class" in told and "1 images have no lesion_id" in told
    rows = rows_of(tmp_path, "skin")
    assert Counter(row.label for row in rows.values()) == {
        "MEL": 2, "NV": 2, "BCC": 2, "AK": 2, "BKL": 2, "DF": 2, "VASC": 2, "SCC": 1
    }  # fmt: skip
    assert rows["ISIC_0000002"].label == "BCC" and rows["ISIC_0000002"].condition_fg  # once, as 2018 has it
    assert rows["ISIC_0000000"].patient_id == rows["ISIC_0000007"].patient_id == "HAM_0"
    assert rows["ISIC_0000000"].split == rows["ISIC_0000007"].split
    assert (
        rows["ISIC_0000003"].text_fg == "premalignant, actinic keratosis" and rows["ISIC_0000003"].condition_fg is None
    )
    (tmp_path / "in" / "ISIC2018_Task3_Training_Input" / "ISIC_0000005.jpg").unlink()
    assert build("isic", tmp_path) == 2 and "no ISIC_0000005.jpg" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ generic


def test_folder_with_mapped_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for patient in ("p1", "p2"):
        save(tmp_path / "in" / patient / "view.png", speckle(1, 40, 48))
    save(tmp_path / "in" / "annotations" / "first.png", mask(5))
    write_csv(
        tmp_path / "in" / "list.csv", "Image,Dx,Case,Outline,Age", "p1/view.png,ca,1,annotations/first.png,44",
        "p2/view.png,benign,2,,50",
    )  # fmt: skip
    columns = ("--columns", "file_name=Image", "label=Dx", "patient_id=Case", "mask=Outline")
    assert build("folder", tmp_path, "--table", "list.csv", *columns, "--labels", "ca=PTC") == 0
    assert "no mask was given for 1 of 2 images: images/p2_view.png\n" in capsys.readouterr().out
    rows = rows_of(tmp_path, "thyroid")
    assert (rows["p1_view"].label, rows["p1_view"].patient_id) == ("PTC", "1")
    assert rows["p1_view"].condition_fg == "condition_fg/p1_view.png" and rows["p2_view"].condition_fg is None


def test_folder_scales_images_of_12_bits_alike(tmp_path: Path):
    shown = speckle(3, 40, 48).astype(np.uint16)
    lines = [f"{name},PTC" for name in ("dim.png", "bright.png")]
    write_csv(tmp_path / "in" / "metadata.csv", "file_name,label", *lines)
    (tmp_path / "in" / "masks").mkdir()
    for name, factor, white in (("dim", 5, 1), ("bright", 27, 255)):
        Image.fromarray(shown * factor).save(tmp_path / "in" / f"{name}.png")
        Image.fromarray((mask(9) // 255 * white).astype(np.uint16)).save(tmp_path / "in" / "masks" / f"{name}.png")
    assert build("folder", tmp_path) == 0
    for stem, factor in (("dim", 5), ("bright", 27)):
        written = np.array(Image.open(tmp_path / "out" / "images" / f"{stem}.png"))
        assert np.abs(written - shown * (factor * 255 / 4095)).max() <= 0.5
        assert (np.array(Image.open(tmp_path / "out" / "condition_fg" / f"{stem}.png")) == mask(9)).all()


def test_folder_says_what_is_wrong_with_a_mapping(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save(tmp_path / "in" / "a.png", speckle(1, 40, 48))
    save(tmp_path / "in" / "images" / "a.png", speckle(1, 40, 48))
    write_csv(
        tmp_path / "in" / "metadata.csv",
        "file_name,label,mask,age",
        "a.png,benign,../m.png,1",
        "images/a.png,benign,,2",
    )
    for options, told in (
        ((), "has columns ['age']"),
        (("--columns", "picture=file_name"), "--columns picture: map some of"),
        (("--columns", "label=Dx"), "has no column Dx"),
        (("--columns", "file_name=file_name", "label=label", "mask=mask"), "mask '../m.png' must be a path inside"),
        (("--columns", "file_name=file_name", "label=label"), "images/a.png has the stem of line 2"),
        (("--table", "none.csv"), "none.csv: no such file"),
    ):
        assert build("folder", tmp_path, *options) == 2
        assert told in capsys.readouterr().err


def test_folder_says_how_to_read_a_table_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "in" / "metadata.csv"
    columns = "say by --columns which is which, as in --columns image=Bild label=Diagnose"
    for mark, told in (
        (",", f"Bild, Diagnose; {columns}"),
        (";", f"Bild;Diagnose; separate its cells by commas, and {columns}"),
    ):
        write_csv(path, f"Bild{mark}Diagnose", f"a.png{mark}gutartig")
        assert build("folder", tmp_path) == 2
        assert told in capsys.readouterr().err
    path.write_bytes("file_name,label\na.png,bösartig\n".encode("latin-1"))
    assert build("folder", tmp_path) == 2
    assert "save it as UTF-8" in capsys.readouterr().err


def test_folder_names_each_unknown_label_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save(tmp_path / "in" / "a.png", speckle(1, 40, 48))
    diagnoses = ("gutartig", "gutartig", "bösartig", "benign", "")
    write_csv(tmp_path / "in" / "metadata.csv", "file_name,label", *(f"a.png,{name}" for name in diagnoses))
    assert build("folder", tmp_path) == 2
    (told,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert "label 'gutartig' (2 of 5 rows), 'bösartig' (1 of 5 rows) is not one of benign, PTC" in told
    assert told.endswith("map it by --labels 'gutartig=…' 'bösartig=…', or name another vocabulary by --knowledge")
    assert not (tmp_path / "out").exists()
    assert build("folder", tmp_path, "--labels", "gutartig=bening", "bösartig=PTC") == 2  # a slip in the mapping
    assert "label 'bening' (2 of 5 rows) is not" in capsys.readouterr().err


@pytest.mark.skipif(not XRAYS.is_dir(), reason="the paediatric chest x-rays are not here")
def test_folder_on_real_chest_xrays(tmp_path: Path):
    lines = (XRAYS / "labels.csv").read_text(encoding="utf-8").splitlines()
    chosen = [lines[0], *lines[1::60]]
    write_csv(tmp_path / "in" / "labels.csv", *chosen)
    (tmp_path / "in" / "images").symlink_to(XRAYS / "images")
    options = ("--knowledge", "chest_xray", "--table", "labels.csv", "--columns", "file_name=image", "label=label")
    labels = ("--labels", "bacterial_pneumonia=bacterial pneumonia", "viral_pneumonia=viral pneumonia")
    assert build("folder", tmp_path, *options, "patient_id=patient", "split=split", *labels) == 0
    rows = rows_of(tmp_path, "chest_xray")
    assert len(rows) == len(chosen) - 1
    assert {row.label for row in rows.values()} == {"normal", "bacterial pneumonia", "viral pneumonia"}


# ------------------------------------------------------------------------------------ tables that `datasets` reads


def hugging_face(folder: Path, layout: str) -> None:
    """Six images inside a table, two of each patient, the last two in a split of their own, as `datasets` writes it."""
    import datasets

    records = []
    for i in range(6):
        record = {"report": ("benign, solid", "PTC, solid")[i % 2], "dx": i % 2, "case": 7 + i // 2, "age": 50.0}
        for name, pixels in (("scan", speckle(i, 40, 48)), ("outline", mask(5 + i))):
            save(folder / "pictures" / f"{name}.png", pixels)
            record[name] = {"bytes": (folder / "pictures" / f"{name}.png").read_bytes(), "path": "picture.png"}
        records.append(record | ({"outline": None} if i == 3 else {}))
    features = datasets.Features({
        "scan": datasets.Image(), "outline": datasets.Image(), "report": datasets.Value("string"),
        "dx": datasets.ClassLabel(names=["benign", "ca"]), "case": datasets.Value("int64"),
        "age": datasets.Value("float64"),
    })  # fmt: skip
    data = datasets.Dataset.from_list(records, features=features)
    parts = datasets.DatasetDict({"train": data.select(range(4)), "validation": data.select(range(4, 6))})
    if layout == "parquet file":
        data.to_parquet(folder / "in" / "rows.parquet")
    elif layout == "save_to_disk":
        parts.save_to_disk(folder / "in")
    else:
        for name, part in parts.items():
            part.to_parquet(folder / "in" / "data" / f"{name}-00000-of-00001.parquet")


MAPPED = ("--columns", "image=scan,text=report,mask=outline", "label=dx", "patient_id=case", "--labels", "ca=PTC")


@pytest.mark.parametrize("layout", ["parquet file", "parquet parts", "save_to_disk"])
def test_pictures_inside_a_table(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch):
    hugging_face(tmp_path, layout)

    def refuse(*_: object) -> None:
        raise AssertionError("the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    table = ("--table", "rows.parquet") if layout == "parquet file" else ()
    assert build("folder", tmp_path, *table, *MAPPED) == 0
    rows = list(rows_of(tmp_path, "thyroid").values())
    assert [(row.label, row.patient_id) for row in rows] == [
        (label, patient) for patient in "789" for label in ("benign", "PTC")
    ]
    splits = [None] * 6 if layout == "parquet file" else ["train"] * 4 + ["valid"] * 2
    assert [row.split for row in rows] == splits
    for i, row in enumerate(rows):
        assert Image.open(tmp_path / "out" / row.file_name).format == "PNG"
        assert (np.array(Image.open(tmp_path / "out" / row.file_name)) == speckle(i, 40, 48).astype(np.uint8)).all()
        assert (row.condition_fg is None) == (i == 3)
        if row.condition_fg:
            assert (np.array(Image.open(tmp_path / "out" / row.condition_fg)) == mask(5 + i)).all()


def image_folder(folder: Path, picture: str = "a/{i}.png", kind: str = "jsonl") -> None:
    """Two pictures in each of two splits, with a metadata file beside them that names `picture`."""
    for part in ("train", "test"):
        for i in range(2):
            save(folder / part / "a" / f"{i}.png", speckle(i, 40, 48))
        lines = [
            {"file_name": picture.format(i=i), "patient_id": f"00{7 + i}{part == 'test':d}", "text": "benign; solid"}
            for i in range(2)
        ]
        table = [",".join(lines[0]), *(",".join(line.values()) for line in lines)]
        write_csv(folder / part / f"metadata.{kind}", *(table if kind == "csv" else map(json.dumps, lines)))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_an_image_folder_with_splits(tmp_path: Path, kind: str):
    """Patient 007 stays apart from patient 7."""
    image_folder(tmp_path / "in", kind=kind)
    assert build("folder", tmp_path) == 0
    rows = rows_of(tmp_path, "thyroid")
    assert {name: (row.split, row.patient_id) for name, row in rows.items()} == {
        "train_a_0": ("train", "0070"), "train_a_1": ("train", "0080"),
        "test_a_0": ("test", "0071"), "test_a_1": ("test", "0081"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_table_of_another_kind_beside_the_images(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    import pandas as pd

    save(tmp_path / "in" / "x" / "1.png", speckle(1, 40, 48))
    save(tmp_path / "in" / "masks" / "x" / "1.png", mask(5))
    lines = [{"file_name": "x/1.png", "label": "MTC", "patient_id": 3, "plane": None}]
    path = tmp_path / "in" / f"metadata.{kind}"
    pd.DataFrame(lines).to_parquet(path) if kind == "parquet" else write_csv(path, json.dumps(lines[0]))
    monkeypatch.chdir(tmp_path)
    assert build("folder", Path()) == 0
    (row,) = rows_of(tmp_path, "thyroid").values()
    assert (row.file_name, row.condition_fg) == ("images/x_1.png", "condition_fg/x_1.png")
    assert (row.label, row.patient_id, row.plane) == ("MTC", "3", None)


def test_tables_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Nothing outside the folder is opened, whichever way a table names it."""
    import datasets

    secret = tmp_path / "secret.png"
    save(secret, speckle(1, 40, 48))

    def said(name: str, *options: str) -> str:
        assert build("folder", tmp_path / name, *options) == 2
        return capsys.readouterr().err

    for i, path in enumerate(("../../secret.png", str(secret))):
        write_csv(tmp_path / f"jsonl{i}" / "in" / "metadata.jsonl", f'{{"file_name": "{path}", "label": "MTC"}}')
        assert "must be a path inside" in said(f"jsonl{i}")
        image_folder(tmp_path / f"folder{i}" / "in", path.replace("..", "../..", 1))
        assert "cannot read it" in said(f"folder{i}")
    line = {"image": {"bytes": None, "path": str(secret)}, "label": "MTC"}
    table = datasets.Dataset.from_list([line])
    table.to_parquet(tmp_path / "named" / "in" / "rows.parquet")
    assert "must be a path inside" in said("named", "--table", "rows.parquet")
    table.save_to_disk(tmp_path / "saved" / "in")
    state = tmp_path / "saved" / "in" / "state.json"
    state.write_text(state.read_text().replace("data-00000", "../data-00000"))
    assert "state.json: names '../data-00000" in said("saved")

    line["image"] = {"bytes": b"junk", "path": None}
    datasets.Dataset.from_list([line]).to_parquet(tmp_path / "junk" / "in" / "rows.parquet")
    assert "line 2: a picture in the table: cannot be read as an image" in said("junk")
    for name in ("torn.parquet", "torn.jsonl"):
        write_csv(tmp_path / name / "in" / name, '{"file')
        assert "cannot read it" in said(name, "--table", name)
    (tmp_path / "empty" / "in").mkdir(parents=True)
    assert "cannot read it" in said("empty")
    assert "no such file" in said("empty", "--table", "a.parquet")
    write_csv(tmp_path / "empty" / "in" / "a.txt", "x")
    assert "give .csv, .parquet, .jsonl or a folder" in said("empty", "--table", "a.txt")
