"""Tar shards out of a data set, for one that is too large for a disk of small files.

python -m data.prepare shards --data_dir runs/mine/data --output_dir /archive/mine --rows_per_shard 1000

The layout is WebDataset's (https://github.com/webdataset/webdataset): `000000012.png`, `.mask.png`, `.map.png`,
`.organ.png` and `.json` are the files of row 12. The metadata.jsonl beside the shards is a manifest like any other.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from tiger import manifest, shards
from tiger.errors import InputError
from tiger.files import atomic_path, changed_settings, write_json
from tiger.manifest import Manifest, Row

SETTINGS = "shards.json"
# Column → what stands before the suffix.
KINDS = {"file_name": "", "condition_fg": ".mask", "condition_bg": ".map", "organ_mask": ".organ"}


def write_shards(data: Manifest, output_dir: Path, rows_per_shard: int, dry_run: bool) -> Manifest:
    """Write the rows of a data set, in their order, as shards; returns the manifest beside them.

    Files are copied byte for byte. A stopped run goes on with the first shard that is not whole; the manifest is
    written last. Raises InputError where a file is missing, or the folder holds shards of something else.
    """
    settings = {
        "metadata.jsonl": hashlib.sha256(data.path.read_bytes()).hexdigest()[:16], "rows_per_shard": rows_per_shard
    }  # fmt: skip
    if changed := changed_settings(output_dir / SETTINGS, settings):
        raise InputError(f"{output_dir} holds other shards: {'; '.join(changed)}: give another --output_dir")
    refuse_missing(data)
    rows = renamed(data.rows, rows_per_shard)
    done = Manifest(output_dir / manifest.FILE_NAME, rows)
    if dry_run:
        return done
    write_json(output_dir / SETTINGS, settings)
    with tqdm(total=len(rows), desc="shards", unit="row") as bar:
        for start in range(0, len(rows), rows_per_shard):
            part = range(start, min(start + rows_per_shard, len(rows)))
            path = (output_dir / rows[start].file_name).parent
            if not is_whole(path):
                write_shard(path, data, part, rows)
            bar.update(len(part))
    manifest.write(done.path, rows)
    return done


def refuse_missing(data: Manifest) -> None:
    """Raise one InputError that lists the files that the manifest names and that do not exist."""
    paths = (data.file(row, column) for row in data.rows for column in KINDS if getattr(row, column))
    if missing := [str(path) for path in paths if not shards.exists(path)]:
        raise InputError("\n  ".join([f"{data.path}: {len(missing)} files do not exist:", *missing]))


def renamed(rows: Sequence[Row], rows_per_shard: int) -> tuple[Row, ...]:
    """The rows with the paths that their files have in the shards."""
    names = [
        {
            column: f"shard-{number // rows_per_shard:06d}.tar/{number:09d}{kind}{Path(path).suffix.lower()}"
            for column, kind in KINDS.items() if (path := getattr(row, column))
        }
        for number, row in enumerate(rows)
    ]  # fmt: skip
    new = {row.file_name: name["file_name"] for row, name in zip(rows, names, strict=True)}
    sources = (tuple(new.get(source, source) for source in row.derived_from) for row in rows)
    return tuple(
        replace(row, **name, derived_from=source) for row, name, source in zip(rows, names, sources, strict=True)
    )


def write_shard(path: Path, data: Manifest, part: Iterable[int], rows: Sequence[Row]) -> None:
    """Write one shard and then its index: {"sha256", "bytes", "rows", "members": {name: [first byte, bytes]}}."""
    part = list(part)
    with atomic_path(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in part:
                for name, content in members(data, data.rows[number], rows[number]):
                    entry = tarfile.TarInfo(name)  # without owner and time: the same rows are the same bytes
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
        with tarfile.open(temporary) as tar:
            places = {entry.name: (entry.offset_data, entry.size) for entry in tar}
        index = {"sha256": sha256(temporary), "bytes": temporary.stat().st_size, "rows": len(part), "members": places}
    write_json(shards.index_path(path), index)


def members(data: Manifest, old: Row, new: Row) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files of one row; its .json is the row as it was, under its old names."""
    for column in KINDS:
        if getattr(old, column):
            yield Path(getattr(new, column)).name, shards.read_bytes(data.file(old, column))
    record = json.dumps(manifest.to_record(old), ensure_ascii=False)
    yield f"{Path(new.file_name).name.partition('.')[0]}.json", record.encode()


def is_whole(path: Path) -> bool:
    """Whether a shard is there with its index, and as long as that says."""
    try:
        return path.is_file() and path.stat().st_size == shards.read_index(path)["bytes"]
    except InputError:
        return False


def damaged(data: Manifest) -> Iterator[str]:
    """What is wrong with the shards that a manifest's rows are in: those that are not what was written."""
    paths = {data.file(row, column) for row in data.rows for column in KINDS if getattr(row, column)}
    for path in sorted({path.parent for path in paths if shards.is_member(path)}):
        try:
            if sha256(path) != shards.read_index(path)["sha256"]:
                yield f"{path.name}: its SHA-256 is not that of its index: copy it again, or write the shards again"
        except InputError as error:
            yield str(error)


def sha256(path: Path) -> str:
    """Of a whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
