"""A data set's files, wherever they lie: in its folder, or in uncompressed tar shards, which are read where they are.

The path `data/shard-000000.tar/000000012.png` names a member of a shard. `python -m data.prepare shards` writes shards,
each with an index beside it, `shard-000000.json`, of the byte at which every member begins. So any row is read by
itself, in any order and by any process: nothing is unpacked, and nothing is shuffled through a buffer.
"""

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

from tiger.errors import InputError
from tiger.files import read_json

SUFFIX = ".tar"
KEPT_OPEN = 256  # shards: each takes a file descriptor, of which a process commonly has 1024


def is_member(path: Path) -> bool:
    """Whether a path leads into a shard that exists."""
    return path.parent.suffix == SUFFIX and path.parent.is_file()


def exists(path: Path) -> bool:
    """Whether there is a file, in its folder or in a shard; one that a shard lacks is told of when it is read."""
    return path.is_file() or is_member(path)


def read_bytes(path: Path) -> bytes:
    """The content of a file in a folder or in a shard. Raises InputError where a shard or its index is damaged."""
    return _shard(path.parent).read(path.name) if is_member(path) else path.read_bytes()


def content_hash(path: Path) -> str:
    """32 hex digits that stand for what a file holds, by which copies are known and caches are never stale."""
    return hashlib.sha256(read_bytes(path)).hexdigest()[:32]


def file_size(path: Path) -> int:
    """Bytes of a file in a folder or in a shard. Raises InputError where a shard or its index is damaged."""
    return _shard(path.parent).place(path.name)[1] if is_member(path) else path.stat().st_size


class _Shard:
    """An open tar file, which processes that are forked and threads can share: reading moves no common position."""

    def __init__(self, path: Path):
        self.path, self.members = path, read_index(path)["members"]
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def place(self, name: str) -> tuple[int, int]:
        if name not in self.members:
            raise InputError(f"{self.path}: has no member {name}: its index and the manifest belong to other shards")
        return self.members[name]

    def read(self, name: str) -> bytes:
        offset, size = self.place(name)
        content = os.pread(self.descriptor, size, offset)
        if len(content) != size:
            raise InputError(f"{self.path}: ends before {name} does: copy it again, or write the shards again")
        return content


_shard = functools.lru_cache(maxsize=KEPT_OPEN)(_Shard)


def index_path(shard: Path) -> Path:
    """Where the index of a shard lies."""
    return shard.with_suffix(".json")


def read_index(shard: Path) -> dict[str, Any]:
    """A shard's bytes, sha256 and members, name -> (first byte, length). Raises InputError where it is damaged."""
    index = index_path(shard)
    if not index.is_file():
        raise InputError(f"{shard}: its index {index.name} is missing: copy both, or write the shards again")
    try:
        found = read_json(index)
        return {name: found[name] for name in ("bytes", "sha256", "members")}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{index}: is damaged: copy it again, or write the shards again") from error
