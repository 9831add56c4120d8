"""BrEaST: 256 breast ultrasound cases with lesion masks and BI-RADS descriptors, from its spreadsheet and images.

Pawłowska et al., Sci Data 2024;11:148; TCIA, doi:10.7937/9WKK-Q141, CC BY 4.0.

    python -m data.prepare build --source breast --input BrEaST --output_dir runs/breast
"""

from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.sources.writer import merge_masks, write_case
from tiger.conditions import read_gray, read_mask
from tiger.errors import InputError
from tiger.knowledge import Knowledge
from tiger.manifest import Row, assign_splits

SHEET = "*clinical-data*.xlsx"
FRACTIONS = {"train": 0.7, "valid": 0.1, "test": 0.2}

# Spreadsheet column → attribute, and the spreadsheet's words → the knowledge base's terms. Words that are not here
# ("not available", "not applicable") leave the attribute out; a list in one cell gives its most suspicious item.
ATTRIBUTES: dict[str, tuple[str, dict[str, str]]] = {
    "Shape": ("shape", {"oval": "oval", "round": "round", "irregular": "irregular"}),
    "Margin": (
        "margin",
        {
            "spiculated": "spiculated",
            "angular": "angular",
            "microlobulated": "microlobulated",
            "indistinct": "indistinct",
            "circumscribed": "circumscribed",
        },
    ),
    "Echogenicity": (
        "echogenicity",
        {
            "anechoic": "anechoic",
            "hypoechoic": "hypoechoic",
            "isoechoic": "isoechoic",
            "hyperechoic": "hyperechoic",
            "heterogeneous": "heterogeneous",
            "complex cystic/solid": "complex cystic and solid",
        },
    ),
    "Halo": ("halo", {"no": "no halo", "yes": "echogenic halo"}),
    "Calcifications": (
        "calcification",
        {
            "no": "no calcification",
            "in a mass": "calcification in mass",
            "intraductal": "intraductal calcification",
            "indefinable": "indefinable calcification",
        },
    ),
    "Tissue_composition": (
        "tissue",
        {
            "lactating": "lactating tissue",
            "homogeneous: fat": "homogeneous fatty tissue",
            "homogeneous: fibroglandular": "homogeneous fibroglandular tissue",
            "heterogeneous: predominantly fat": "heterogeneous fatty tissue",
            "heterogeneous: predominantly fibroglandular": "heterogeneous fibroglandular tissue",
        },
    ),
    "Posterior_features": (
        "posterior",
        {
            "no": "no posterior features",
            "enhancement": "posterior enhancement",
            "shadowing": "posterior shadowing",
            "combined": "combined posterior features",
        },
    ),
    "Skin_thickening": ("skin", {"no": "normal skin", "yes": "skin thickening"}),
}
COLUMNS = ("CaseID", "Image_filename", "Mask_tumor_filename", "Mask_other_filename", "Classification", *ATTRIBUTES)


def build(input_dir: Path, output_dir: Path, size: int | None, seed: int) -> list[Row]:
    """Write images, masks (all lesions of a case in one) and Sobel maps; return the rows, split by patient.

    Normal cases have no lesion to train the foreground on: they are left out, and counted in a printed line.
    Raises InputError when the spreadsheet or a file that it names is missing or damaged.
    """
    knowledge = Knowledge.load("breast")
    cases = read_sheet(input_dir)
    files = {path.name: path for path in input_dir.rglob("*.png")}
    problems = [
        f"case {case['CaseID']}: {name} is not below {input_dir}"
        for case in cases for name in (case["Image_filename"], *mask_names(case)) if name not in files
    ]  # fmt: skip
    if problems:
        raise InputError(
            "\n  ".join([f"{input_dir}: {len(problems)} files of the spreadsheet are missing:", *problems])
        )
    lesions = [case for case in cases if mask_names(case)]
    rows = []
    for case in tqdm(lesions, desc="BrEaST", unit="case"):
        image = read_gray(files[case["Image_filename"]])
        mask = merge_masks([read_mask(files[name]) for name in mask_names(case)])
        columns = write_case(output_dir, Path(case["Image_filename"]).stem, image, mask, size)
        attributes = attributes_of(case)
        text_fg, text_bg = knowledge.compose(case["Classification"], attributes)
        rows.append(
            Row(**columns, text_fg=text_fg, text_bg=text_bg, label=case["Classification"], source="BrEaST",
                patient_id=str(case["CaseID"]), attributes=attributes)
        )  # fmt: skip
    print(f"left out {len(cases) - len(lesions)} of {len(cases)} cases: normal, with no lesion to mask")
    return list(assign_splits(rows, FRACTIONS, seed))


def read_sheet(input_dir: Path) -> list[dict[str, Any]]:
    """Rows of the first sheet, column → cell; empty cells are None."""
    import openpyxl

    sheets = sorted(input_dir.glob(SHEET))
    if len(sheets) != 1:
        raise InputError(f"{input_dir}: needs one spreadsheet {SHEET}, found {len(sheets)}: give BrEaST's own folder")
    try:
        workbook = openpyxl.load_workbook(sheets[0], read_only=True)
        header, *lines = workbook.worksheets[0].iter_rows(values_only=True)
    except Exception as error:  # openpyxl raises whatever its zip and XML readers do
        raise InputError(f"{sheets[0]}: cannot be read as a spreadsheet ({error}): download it again") from error
    if missing := [name for name in COLUMNS if name not in header]:
        raise InputError(f"{sheets[0]}: has no column {', '.join(missing)}: give the published spreadsheet")
    return [dict(zip(map(str, header), line, strict=True)) for line in lines if any(line)]


def mask_names(case: dict[str, Any]) -> list[str]:
    """File names of the lesion masks of one case: the tumour's and those of other lesions."""
    cells = (case["Mask_tumor_filename"], case["Mask_other_filename"])
    return [name for cell in cells if cell for name in str(cell).split("&")]


def attributes_of(case: dict[str, Any]) -> dict[str, str]:
    """The BI-RADS descriptors of one case in the knowledge base's terms."""
    attributes = {}
    for column, (category, terms) in ATTRIBUTES.items():
        items = str(case[column]).removeprefix("not circumscribed - ").split("&")
        term = next((terms[word] for word in terms if word in items), None)
        if term is not None:
            attributes[category] = term
    return attributes
