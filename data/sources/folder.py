"""One's own images: a folder with a table.

input/
  metadata.csv      file_name, text (or text_fg and text_bg), label, patient_id, split, plane, mask, organ_mask;
                        all but file_name are optional; or a table of another kind, see data/sources/tables.py
  images/…          where file_name points, relative to the table
  masks/…           one per image, same stem, where the table names no mask (optional: without masks only the coarse
                        stage can be trained)
  organ_masks/…     masks of the organ, likewise (optional)

python -m data.prepare build --source folder --input mine --output_dir runs/mine
python -m data.prepare build --source folder --input cxr --output_dir runs/cxr --knowledge chest_xray \\
    --table labels.csv --columns file_name=image label=diagnosis --labels "viral_pneumonia=viral pneumonia"
python -m data.prepare build --source folder --input saved --output_dir runs/mine --columns image=scan,text=report
"""

import io
import shlex
import tempfile
from collections import Counter
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data.sources.tables import PICTURES, Names, Record, read_table
from data.sources.writer import collect_rows, write_case, write_png
from tiger.conditions import (
    Gray,
    binarize,
    brightest,
    decode,
    open_image,
    resize_mask,
    to_gray,
    to_gray_alone,
    white_level,
)
from tiger.errors import InputError, name_rows
from tiger.knowledge import Knowledge
from tiger.manifest import Row, column_problem

MOST_NAMED = 8  # unknown labels that an error says how to map
Picture = Path | str | bytes  # a file below the input folder, or the content of one


def build(
    input_dir: Path, output_dir: Path, size: int | None, knowledge: Knowledge, *, table: str | None = None,
    columns: Names | None = None, labels: Names | None = None,
) -> list[Row]:  # fmt: skip
    """Write gray PNGs, Sobel maps and prompts; return the rows.

    A free-text report in `text` is split into foreground and background; what it says that the knowledge base does not
    know is printed. Without any text the prompt is made of the label. Pictures that lie in the table itself are called
    by its line. Images of more than 8 bits are scaled alike, by the bits that the brightest of them needs. Raises one
    InputError that names every unknown label, else one that lists every bad row.

    Args:
        table, columns: see `read_table`.
        labels: a value of the label column → a label of the knowledge base.
    """
    input_dir = input_dir.resolve()
    masks, organs = (files_by_stem(input_dir / name) for name in ("masks", "organ_masks"))
    first: dict[str, int] = {}  # stem → the line that has it

    def row(numbered: tuple[int, int]) -> Row:
        number, index = numbered
        try:
            record = records[index]
            check_columns(record, input_dir)
            embedded = isinstance(record["file_name"], bytes)
            stem = f"{number:06d}" if embedded else stem_of(Path(record["file_name"]))
            if (other := first.setdefault(stem, number)) != number:
                raise InputError(f"{record['file_name']} has the stem of line {other}: rename or drop one")
            label = record.get("label", "")
            record |= {"label": (labels or {}).get(label, label)} if label else {}
            mask, organ = record.get("mask", masks.get(stem)), record.get("organ_mask", organs.get(stem))
            return build_row(record, stem, input_dir, output_dir, size, knowledge, mask, organ, white)
        except InputError as error:
            raise InputError(f"line {number}: {error}") from error

    with tempfile.TemporaryDirectory(prefix="tables-") as scratch:
        records = read_table(input_dir, table, columns, Path(scratch))
        given: Counter[str] = Counter()
        highest: list[int] = []
        for number in tqdm(range(len(records)), desc="bits", unit="image"):
            record = records[number]
            given[record.get("label", "")] += 1
            highest.append(brightest_of(record, input_dir))
        refuse_unknown(given, labels or {}, knowledge, input_dir)
        white = white_level(highest)
        rows = collect_rows(row, list(enumerate(range(len(records)), 2)), "folder", input_dir)
    bare = [row.file_name for row in rows if row.condition_fg is None]
    if 0 < len(bare) < len(rows):
        tqdm.write(f"no mask was given for {len(bare)} of {len(rows)} images: {name_rows(bare)}")
    return rows


def refuse_unknown(given: Counter[str], labels: Names, knowledge: Knowledge, where: Path) -> None:
    """Raise InputError where a label in the table, of which `given` has the counts, is none of the knowledge base's."""
    strange = [
        (label, count) for label, count in given.most_common()
        if label and labels.get(label, label) not in knowledge.subtypes
    ]  # fmt: skip
    if strange:
        named = [f"{labels.get(label, label)!r} ({count} of {given.total()} rows)" for label, count in strange]
        raise InputError(
            f"{where}: label {name_rows(named)} is not one of {', '.join(knowledge.subtypes)} "
            f"({knowledge.organ} knowledge base): map it by --labels "
            f"{' '.join(shlex.quote(f'{label}=…') for label, _ in strange[:MOST_NAMED])}, "
            "or name another vocabulary by --knowledge"
        )


def stem_of(path: Path) -> str:
    """images/a/b.jpg → a_b: what the files of one image are called in the output."""
    parts = (*path.parts[:-1], path.stem)
    return "_".join(parts[1:] if parts[:1] == ("images",) else parts)


def check_columns(record: Record, input_dir: Path) -> None:
    """Raise InputError where a cell is nothing that a manifest may hold."""
    for column in PICTURES:
        if isinstance(record.get(column), bytes):
            continue
        path = Path(record.get(column, ""))
        if (column in record or column == "file_name") and (not path.name or path.is_absolute() or ".." in path.parts):
            raise InputError(f"{column} {record.get(column, '')!r} must be a path inside {input_dir}")
    for column in ("split", "plane"):
        if column in record and (problem := column_problem(column, record[column])):
            raise InputError(f"{name_of(record)}: {column}: {problem}")


def name_of(record: Record) -> str:
    """What messages call a line's picture."""
    name = record["file_name"]
    return name if isinstance(name, str) else "its picture"


def files_by_stem(folder: Path) -> dict[str, Path]:
    """Stem → file below a folder that may be missing."""
    return {stem_of(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def build_row(
    record: Record, stem: str, input_dir: Path, output_dir: Path, size: int | None, knowledge: Knowledge,
    mask: Picture | None, organ: Picture | None, white: int,
) -> Row:  # fmt: skip
    """Write the files of one table line and return its row; `white` is what is white in images of more than 8 bits."""
    texts, attributes, label = prompts(record, knowledge)
    image = to_gray(picture(record["file_name"], input_dir), white)
    columns = write_case(output_dir, stem, image, None if mask is None else mask_of(mask, input_dir), size)
    if organ is not None:
        columns["organ_mask"] = f"organ_mask/{stem}.png"
        organ_mask = mask_of(organ, input_dir)
        write_png(output_dir / columns["organ_mask"], organ_mask if size is None else resize_mask(organ_mask, size))
    plane = record.get("plane") or attributes.get("direction", "").removesuffix(" plane") or None
    return Row(
        **columns, text_fg=texts[0], text_bg=texts[1], label=label, patient_id=record.get("patient_id"),
        split=record.get("split"), attributes=attributes, plane=plane, source=input_dir.name,
    )  # fmt: skip


def picture(cell: Picture, input_dir: Path) -> Image.Image:
    """A file below `input_dir`, or one that lies in the table, decoded."""
    return decode(cell, "a picture in the table") if isinstance(cell, bytes) else open_image(input_dir / cell)


def mask_of(cell: Picture, input_dir: Path) -> Gray:
    """A mask in 0 and 255, whatever the bits of its file."""
    return binarize(to_gray_alone(picture(cell, input_dir)))


def brightest_of(record: Record, input_dir: Path) -> int:
    """`brightest` of a line's image, of which most need no decoding; 0 where it is bad, which is told of later."""
    try:
        check_columns(record, input_dir)
        cell = record["file_name"]
        with Image.open(io.BytesIO(cell) if isinstance(cell, bytes) else input_dir / cell) as image:
            deep = image.mode.startswith("I")
        return brightest(picture(cell, input_dir)) if deep else 0
    except (InputError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return 0


def prompts(record: Record, knowledge: Knowledge) -> tuple[tuple[str, str], Names, str | None]:
    """((text_fg, text_bg), attributes, label) of one line: from its texts, else from its label."""
    text = record.get("text") or ", ".join(record[name] for name in ("text_fg", "text_bg") if name in record)
    parsed = knowledge.parse(text)
    if parsed.contradictions:
        raise InputError(f"{name_of(record)}: the text contradicts itself, {'; '.join(parsed.contradictions)}")
    if parsed.unknown:
        tqdm.write(f"{name_of(record)}: not in the knowledge base: {'; '.join(parsed.unknown)}")
    label = record.get("label", parsed.label)
    if label is None and not parsed.attributes:
        raise InputError(f"{name_of(record)}: has neither a label nor a text with known terms: add one")
    if label is not None and parsed.label not in (None, label):
        raise InputError(f"{name_of(record)}: label {label}, but the text says {parsed.label}: mend one")
    texts = knowledge.split(text) if label is None else knowledge.compose(label, parsed.attributes)
    return texts, parsed.attributes, label
