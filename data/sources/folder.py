"""One's own images: a folder with a table.

input/
  metadata.csv      file_name, text (or text_fg and text_bg), label, patient_id, split, plane, mask, organ_mask;
                        all but file_name are optional
  images/…          where file_name points, relative to the table
  masks/…           one per image, same stem, where the table names no mask (optional: without masks only the coarse
                        stage can be trained)
  organ_masks/…     masks of the organ, likewise (optional)

python -m data.prepare build --source folder --input mine --output_dir runs/mine
python -m data.prepare build --source folder --input cxr --output_dir runs/cxr --knowledge chest_xray \\
    --table labels.csv --columns file_name=image label=diagnosis --labels "viral_pneumonia=viral pneumonia"
"""

from pathlib import Path

from tqdm import tqdm

from data.sources.writer import collect_rows, read_csv, write_case, write_png
from tiger.conditions import read_gray, read_mask, resize_mask
from tiger.errors import InputError
from tiger.knowledge import Knowledge
from tiger.manifest import Row, column_problem

TABLE = "metadata.csv"
COLUMNS = {"file_name", "text", "text_fg", "text_bg", "label", "patient_id", "split", "plane", "mask", "organ_mask"}
Names = dict[str, str]


def build(
    input_dir: Path, output_dir: Path, size: int | None, knowledge: Knowledge, *, table: str = TABLE,
    columns: Names | None = None, labels: Names | None = None,
) -> list[Row]:  # fmt: skip
    """Write gray PNGs, Sobel maps and prompts; return the rows.

    A free-text report in `text` is split into foreground and background; what it says that the knowledge base does not
    know is printed. Without any text the prompt is made of the label. Raises one InputError that lists every bad row.

    Args:
        table: CSV in `input_dir`.
        columns: one of COLUMNS → its name in the table; the table's other columns are then ignored.
        labels: a value of the label column → a label of the knowledge base.
    """
    masks, organs = (files_by_stem(input_dir / name) for name in ("masks", "organ_masks"))
    records = read_table(input_dir / table, columns)
    first: Names = {}  # stem → the file that has it

    def row(numbered: tuple[int, Names]) -> Row:
        number, record = numbered
        try:
            check_columns(record, input_dir)
            stem = stem_of(Path(record["file_name"]))
            if first[stem] != f"{number}":
                raise InputError(f"{record['file_name']} has the stem of line {first[stem]}: rename or drop one")
            label = record.get("label", "")
            record |= {"label": (labels or {}).get(label, label)} if label else {}
            mask, organ = (
                input_dir / record[name] if name in record else files.get(stem)
                for name, files in (("mask", masks), ("organ_mask", organs))
            )
            return build_row(record, stem, input_dir, output_dir, size, knowledge, mask, organ)
        except InputError as error:
            raise InputError(f"line {number}: {error}") from error

    numbered = list(enumerate(records, 2))
    for number, record in numbered:
        first.setdefault(stem_of(Path(record.get("file_name", ""))), f"{number}")
    return collect_rows(row, numbered, "folder", input_dir / table)


def read_table(path: Path, columns: Names | None) -> list[Names]:
    """Lines of the table under our names of the columns, without their empty cells."""
    names = columns or {}
    if unknown := set(names) - COLUMNS:
        raise InputError(f"--columns {', '.join(sorted(unknown))}: map some of {', '.join(sorted(COLUMNS))}")
    lines = read_csv(path, [names.get("file_name", "file_name"), *names.values()])
    if not names and lines and (extra := set(lines[0]) - COLUMNS):
        raise InputError(
            f"{path}: has columns {sorted(extra)}; use {sorted(COLUMNS)}, or say by --columns which are which"
        )
    source = names or {name: name for name in COLUMNS}
    return [{name: line[column] for name, column in source.items() if line.get(column)} for line in lines]


def stem_of(path: Path) -> str:
    """images/a/b.jpg → a_b: what the files of one image are called in the output."""
    parts = (*path.parts[:-1], path.stem)
    return "_".join(parts[1:] if parts[:1] == ("images",) else parts)


def check_columns(record: Names, input_dir: Path) -> None:
    """Raise InputError where a cell is nothing that a manifest may hold."""
    for column in ("file_name", "mask", "organ_mask"):
        path = Path(record.get(column, ""))
        if (column in record or column == "file_name") and (not path.name or path.is_absolute() or ".." in path.parts):
            raise InputError(f"{column} {record.get(column, '')!r} must be a path inside {input_dir}")
    for column in ("split", "plane"):
        if column in record and (problem := column_problem(column, record[column])):
            raise InputError(f"{record['file_name']}: {column}: {problem}")


def files_by_stem(folder: Path) -> dict[str, Path]:
    """Stem → file below a folder that may be missing."""
    return {stem_of(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def build_row(
    record: Names, stem: str, input_dir: Path, output_dir: Path, size: int | None, knowledge: Knowledge,
    mask: Path | None, organ: Path | None,
) -> Row:  # fmt: skip
    """Write the files of one table line and return its row."""
    texts, attributes, label = prompts(record, knowledge)
    image = read_gray(input_dir / record["file_name"])
    columns = write_case(output_dir, stem, image, None if mask is None else read_mask(mask), size)
    if organ is not None:
        columns["organ_mask"] = f"organ_mask/{stem}.png"
        organ_mask = read_mask(organ)
        write_png(output_dir / columns["organ_mask"], organ_mask if size is None else resize_mask(organ_mask, size))
    plane = record.get("plane") or attributes.get("direction", "").removesuffix(" plane") or None
    return Row(
        **columns, text_fg=texts[0], text_bg=texts[1], label=label, patient_id=record.get("patient_id"),
        split=record.get("split"), attributes=attributes, plane=plane, source=input_dir.resolve().name,
    )  # fmt: skip


def prompts(record: Names, knowledge: Knowledge) -> tuple[tuple[str, str], Names, str | None]:
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
