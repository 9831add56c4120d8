"""Rows of a table, whatever it is stored in: CSV, Parquet or JSON lines, or a folder that Hugging Face's `datasets`
reads (`save_to_disk`; Parquet parts as `push_to_hub` writes them; an image folder with metadata beside each split).

Nothing is fetched, no code of the folder is run, and no file outside of it is opened.
"""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.sources.writer import read_csv
from tiger.errors import InputError

DEFAULTS = ("metadata.csv", "metadata.parquet", "metadata.jsonl")
SPLIT = "split of the data set"  # a column that `load` adds to a data set of several
PICTURES = ("file_name", "mask", "organ_mask")
COLUMNS = {*PICTURES, "text", "text_fg", "text_bg", "label", "patient_id", "split", "plane"}
Names = dict[str, str]
Record = dict[str, Any]  # column → its text; a picture's is a path, or the bytes of its file


def read_table(input_dir: Path, table: str | None, columns: Names | None, cache_dir: Path) -> Sequence[Record]:
    """Lines of a table under our names of the columns, without their empty cells.

    Args:
        table: file in `input_dir`; None: the first of DEFAULTS that is there, else the folder as a whole.
        columns: one of COLUMNS, or `image` for file_name → its name in the table, whose other columns are then ignored.
        cache_dir: where `datasets` may unpack what it then maps into memory.
    Raises InputError where there is nothing to read, or a column is missing or not known.
    """
    names = {"file_name" if name == "image" else name: column for name, column in (columns or {}).items()}
    if unknown := set(names) - COLUMNS:
        raise InputError(f"--columns {', '.join(sorted(unknown))}: map some of {', '.join(sorted(COLUMNS))}")
    input_dir = input_dir.resolve()
    path = input_dir / (table or next((name for name in DEFAULTS if (input_dir / name).is_file()), "."))
    data: Any = read_csv(path) if path.suffix == ".csv" else load(path, cache_dir)
    found = set(data[0] if len(data) else ())
    default = {name: name for name in COLUMNS & found}
    if "image" in found:
        default.setdefault("file_name", "image")
    source = {"file_name": default.get("file_name", "file_name")} | (names or default)
    if SPLIT in found:
        source.setdefault("split", SPLIT)
    if missing := sorted(set(source.values()) - found):
        lone = len(found) == 1 and any(mark in name for name in found for mark in ";\t")
        raise InputError(
            f"{path}: has no column {', '.join(missing)}; its columns are {', '.join(sorted(found))}; "
            + ("separate its cells by commas, and " if lone else "")
            + "say by --columns which is which, as in --columns image=Bild label=Diagnose"
        )
    if not columns and (extra := found - {SPLIT, *source.values()}):
        raise InputError(
            f"{path}: has columns {sorted(extra)}; use {sorted(COLUMNS)}, or say by --columns which are which"
        )
    return Lines(data, source, input_dir)


class Lines(Sequence[Record]):
    """The lines of a table, read as they are asked for: Parquet parts can hold more pictures than memory does."""

    def __init__(self, data: Sequence[dict[str, Any]], source: Names, root: Path):
        """data: line → its cells; source: our names → the table's; root: the folder that paths are relative to."""
        self.data, self.source, self.root = data, source, root
        self.labels = {name: f for name, f in getattr(data, "features", {}).items() if hasattr(f, "int2str")}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Any) -> Record:
        line = self.data[index]
        cells = {name: self.cell(column, line[column]) for name, column in self.source.items()}
        return {name: cell for name, cell in cells.items() if cell}

    def cell(self, column: str, value: Any) -> str | bytes:
        """A cell as text, a picture's path below the folder, or a picture's bytes; empty where there is nothing."""
        if isinstance(value, dict) and value.get("bytes"):
            return value["bytes"]
        if isinstance(value, dict):  # a picture that lies beside the table, by its whole path
            path = Path(value.get("path") or "")
            return str(path.relative_to(self.root) if path.is_relative_to(self.root) else path)
        if value is None or value != value or (column in self.labels and value < 0):  # NaN and -1: no value
            return ""
        if column in self.labels:
            return self.labels[column].int2str(value)
        whole = isinstance(value, float) and value.is_integer()  # a column of integers that lacks some
        return str(int(value) if whole else value).strip()


def load(path: Path, cache_dir: Path) -> Any:
    """A `datasets.Dataset` of all splits, with pictures left undecoded. Raises InputError where it cannot be read."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the package is imported
    import datasets

    if not path.exists():
        raise InputError(f"{path}: no such file: give the table by --table")
    datasets.disable_progress_bars()
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            refuse_paths(path)
            found: Any = datasets.load_from_disk(path)
        else:
            kind = kind_of(path)
            options: Any = {"data_dir": str(path)} if path.is_dir() else {"data_files": str(path)}
            options |= as_text(path) if kind == "imagefolder" else {}
            found = datasets.load_dataset(kind, **options, cache_dir=str(cache_dir))
        if isinstance(found, datasets.DatasetDict):
            parts = [part.add_column(SPLIT, [str(name)] * len(part)) for name, part in found.items()]
            found = datasets.concatenate_datasets(parts if len(parts) > 1 else list(found.values()))
        for name, feature in found.features.items():
            if isinstance(feature, datasets.Image):
                found = found.cast_column(name, datasets.Image(decode=False))
    except InputError:
        raise
    except Exception as error:  # whatever its readers raise on files that are damaged or no data set
        reason = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"{path}: `datasets` cannot read it ({reason}): give the table by --table") from error
    return found


def kind_of(path: Path) -> str:
    """The reader of `datasets` for a file, or for a folder that `save_to_disk` did not write."""
    if path.is_file():
        kinds = {".parquet": "parquet", ".jsonl": "json"}
        if path.suffix not in kinds:
            raise InputError(f"{path}: is no table that can be read: give .csv, {', '.join(kinds)} or a folder")
        return kinds[path.suffix]
    parts = {file.name for file in path.rglob("*.parquet")} - {"metadata.parquet"}
    return "parquet" if parts else "imagefolder"


def as_text(folder: Path) -> dict[str, Any]:
    """Options that keep the cells of an image folder's CSV files as they are: `007` is another patient than `7`."""
    import datasets

    tables = sorted(folder.rglob("metadata.csv"))
    if not tables:
        return {}
    with open(tables[0], encoding="utf-8-sig", newline="") as file:
        names = next(csv.reader(file), [])
    features: dict[str, Any] = {}
    for name in names:  # the reader makes pictures `image` and `mask` out of `file_name` and `mask_file_name`
        if name.endswith("file_name"):
            features[name.removesuffix("file_name").removesuffix("_") or "image"] = datasets.Image(decode=False)
        else:
            features[name] = datasets.Value("string")
    return {"features": datasets.Features(features)}


def refuse_paths(folder: Path) -> None:
    """Raise InputError where a `save_to_disk` folder names files outside of itself."""
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "state.json":
            names = [file["filename"] for file in content["_data_files"]]
        else:
            names = content["splits"] if path.name == "dataset_dict.json" else []
        if leaving := [name for name in names if Path(name).name != name or name in ("", "..")]:
            raise InputError(f"{path}: names {leaving[0]!r}, which is not a file beside it")
