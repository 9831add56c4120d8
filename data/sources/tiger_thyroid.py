"""The seven thyroid samples that were published with the paper's code, mended: their metadata names files that do not
exist, masks have a white bar, one PNG is a JPEG, one prompt contradicts itself. Any data set in the same layout
(init_image/metadata.jsonl, condition_FG/, condition_BG/) can be read.

    python -m data.prepare build --source tiger_thyroid --input tiger_thyroid --output_dir runs/thyroid
"""

import json
from pathlib import Path

from tqdm import tqdm

from data.sources.writer import write_case
from tiger.conditions import binarize, border_bars, open_image, read_gray, remove_bars, to_gray
from tiger.errors import InputError
from tiger.knowledge import Knowledge
from tiger.manifest import ALIASES, Row

FOLDERS = ("init_image", "condition_FG", "condition_BG")
SUFFIXES = (".png", ".jpg", ".jpeg")


def build(input_dir: Path, output_dir: Path, size: int | None) -> list[Row]:
    """Write a mended copy, print each mending, and return the rows, all of them for training.

    Raises one InputError that lists what cannot be mended.
    """
    knowledge = Knowledge.load("thyroid")
    rows, problems = [], []
    for record in tqdm(read_records(input_dir), desc="tiger_thyroid", unit="image"):
        try:
            rows.append(mend(record, input_dir, output_dir, size, knowledge))
        except InputError as error:
            problems.append(f"{record['file_name']}: {error}")
    if problems:
        raise InputError("\n  ".join([f"{input_dir}: {len(problems)} rows cannot be mended:", *problems]))
    return rows


def read_records(input_dir: Path) -> list[dict[str, str]]:
    """The lines of init_image/metadata.jsonl, columns under their own names."""
    path = input_dir / "init_image" / "metadata.jsonl"
    if not path.is_file():
        raise InputError(f"{path}: no such file; --input is the folder that holds {', '.join(FOLDERS)}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = {ALIASES.get(name, name): str(value) for name, value in json.loads(line).items()}
        except (json.JSONDecodeError, AttributeError) as error:
            raise InputError(f"{path}: line {number}: not a JSON object ({error}): mend it") from error
        if missing := [name for name in ("file_name", "text_fg", "text_bg") if name not in record]:
            raise InputError(f"{path}: line {number}: has no {', '.join(missing)}: add it")
        records.append(record)
    return records


def mend(record: dict[str, str], input_dir: Path, output_dir: Path, size: int | None, knowledge: Knowledge) -> Row:
    """Write the files of one row and return it, telling on stdout what was changed."""
    name = record["file_name"]

    def tell(message: str) -> None:
        tqdm.write(f"{name}: {message}")

    image_path, mask_path, map_path = (find(input_dir / folder, name) for folder in FOLDERS)
    for column, path in (("condition_fg", mask_path), ("condition_bg", map_path)):
        if column in record:
            tell(f"{column}: {record[column]!r} does not exist, took {path.parent.name}/{path.name}")
    for path in (image_path, mask_path, map_path):
        image = open_image(path)
        if image.format == "JPEG" and path.suffix == ".png":
            tell(f"{path.parent.name}/{path.name}: held a JPEG, is written as PNG")
    raw = to_gray(open_image(mask_path))
    mask = binarize(raw)
    if (mask != raw).any():
        tell("mask: had grey levels, thresholded at 128")
    for side, width in border_bars(mask).items():
        tell(f"mask: removed a white bar of {width} px along the {side} edge")
    text = f"{record['text_fg']}, {record['text_bg']}"
    parsed = knowledge.parse(text)
    for contradiction in parsed.contradictions:
        tell(f"text: contradicted itself, {contradiction}: kept the first")
    for unknown in parsed.unknown:
        tell(f"text: {unknown!r} is no known term, left out")
    text_fg, text_bg = knowledge.split(text)
    for column, new in (("text_fg", text_fg), ("text_bg", text_bg)):
        if record[column] != new:
            tell(f"{column}: {record[column]!r} -> {new!r}")
    columns = write_case(
        output_dir, Path(name).stem, read_gray(image_path), remove_bars(mask), size, read_gray(map_path)
    )
    return Row(**columns, text_fg=text_fg, text_bg=text_bg, label=parsed.label, split="train", source="tiger_thyroid",
               plane=parsed.attributes.get("direction", "").removesuffix(" plane") or None,
               attributes=parsed.attributes)  # fmt: skip


def find(folder: Path, name: str) -> Path:
    """The file of that name in `folder`, whatever its suffix."""
    stem = Path(name).stem
    for suffix in (Path(name).suffix, *SUFFIXES):
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    raise InputError(f"no {stem} ({', '.join(SUFFIXES)}) in {folder}: put it there or drop the row")
