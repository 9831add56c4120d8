"""One's own images: a folder with a table.

input/
  metadata.csv      file_name, text (or text_fg and text_bg), label, patient_id, split, plane;
                        all but file_name are optional
  images/…          where file_name points, relative to the table
  masks/…           one per image, same stem (optional: without them only the coarse stage can be trained)
  organ_masks/…     masks of the organ, same stem (optional)

python -m data.prepare build --source folder --input mine --output_dir runs/mine
"""

import csv
from pathlib import Path

from tqdm import tqdm

from data.sources.writer import write_case, write_png
from tiger.conditions import read_gray, read_mask, resize_mask
from tiger.errors import InputError
from tiger.knowledge import Knowledge
from tiger.manifest import Row, column_problem

TABLE = "metadata.csv"
COLUMNS = {"file_name", "text", "text_fg", "text_bg", "label", "patient_id", "split", "plane"}


def build(input_dir: Path, output_dir: Path, size: int | None, knowledge: Knowledge) -> list[Row]:
    """Write gray PNGs, Sobel maps and prompts; return the rows.

    A free-text report in `text` is split into foreground and background; what it says that the knowledge base does not
    know is printed. Without any text the prompt is made of the label. Raises one InputError that lists every bad row.
    """
    masks, organs = (by_stem(input_dir / name) for name in ("masks", "organ_masks"))
    rows, problems = [], []
    stems: dict[str, str] = {}
    for number, record in tqdm(list(enumerate(read_table(input_dir), 2)), desc="folder", unit="image"):
        try:
            check_columns(record, input_dir)
            stem = Path(record["file_name"]).stem
            if stem in stems:
                raise InputError(f"{record['file_name']} has the stem of {stems[stem]}: rename one")
            stems[stem] = record["file_name"]
            rows.append(build_row(record, input_dir, output_dir, size, knowledge, masks.get(stem), organs.get(stem)))
        except InputError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        raise InputError("\n  ".join([f"{input_dir / TABLE}: {len(problems)} problems:", *problems]))
    return rows


def read_table(input_dir: Path) -> list[dict[str, str]]:
    """Lines of metadata.csv without their empty cells."""
    path = input_dir / TABLE
    if not path.is_file():
        raise InputError(f"{path}: no such file; its columns are {', '.join(sorted(COLUMNS))}")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            lines = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 CSV ({error})") from error
    found = set(reader.fieldnames or ())
    if "file_name" not in found or found - COLUMNS:
        raise InputError(f"{path}: columns are {sorted(found)}; use file_name and some of {sorted(COLUMNS)}")
    return [{key: value.strip() for key, value in line.items() if key and value and value.strip()} for line in lines]


def check_columns(record: dict[str, str], input_dir: Path) -> None:
    """Raise InputError where a cell is nothing that a manifest may hold."""
    name = Path(record.get("file_name", ""))
    if not name.name or name.is_absolute() or ".." in name.parts:
        raise InputError(f"file_name {record.get('file_name', '')!r} must be a path inside {input_dir}")
    for column in ("split", "plane"):
        if column in record and (problem := column_problem(column, record[column])):
            raise InputError(f"{name}: {column}: {problem}")


def by_stem(folder: Path) -> dict[str, Path]:
    """Stem → file of a folder that may be missing."""
    return {path.stem: path for path in sorted(folder.glob("*")) if path.is_file()}


def build_row(
    record: dict[str, str], input_dir: Path, output_dir: Path, size: int | None, knowledge: Knowledge,
    mask: Path | None, organ: Path | None,
) -> Row:  # fmt: skip
    """Write the files of one table line and return its row."""
    name = record["file_name"]
    texts, attributes, label = prompts(record, knowledge)
    columns = write_case(
        output_dir, Path(name).stem, read_gray(input_dir / name), None if mask is None else read_mask(mask), size
    )
    if organ is not None:
        columns["organ_mask"] = f"organ_mask/{Path(name).stem}.png"
        organ_mask = read_mask(organ)
        write_png(output_dir / columns["organ_mask"], organ_mask if size is None else resize_mask(organ_mask, size))
    plane = record.get("plane") or attributes.get("direction", "").removesuffix(" plane") or None
    return Row(
        **columns, text_fg=texts[0], text_bg=texts[1], label=label, patient_id=record.get("patient_id"),
        split=record.get("split"), attributes=attributes, plane=plane, source=input_dir.resolve().name,
    )  # fmt: skip


def prompts(record: dict[str, str], knowledge: Knowledge) -> tuple[tuple[str, str], dict[str, str], str | None]:
    """((text_fg, text_bg), attributes, label) of one line: from its texts, else from its label."""
    text = record.get("text") or ", ".join(record[name] for name in ("text_fg", "text_bg") if name in record)
    parsed = knowledge.parse(text)
    if parsed.contradictions:
        raise InputError(f"{record['file_name']}: the text contradicts itself, {'; '.join(parsed.contradictions)}")
    if parsed.unknown:
        tqdm.write(f"{record['file_name']}: not in the knowledge base: {'; '.join(parsed.unknown)}")
    label = record.get("label", parsed.label)
    if label is None and not parsed.attributes:
        raise InputError(f"{record['file_name']}: has neither a label nor a text with known terms: add one")
    if label is not None and parsed.label not in (None, label):
        raise InputError(f"{record['file_name']}: label {label}, but the text says {parsed.label}: mend one")
    texts = knowledge.split(text) if label is None else knowledge.compose(label, parsed.attributes)
    return texts, parsed.attributes, label
