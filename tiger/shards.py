"""A data set's files, wherever they lie: in its folder, or in uncompressed tar shards, which are read where they are.

The path `data/shard-000000.tar/000000012.png` names a member of a shard. `python -m data.prepare shards` writes shards,
each with an index beside it, `shard-000000.json`, of the byte at which every member begins. So any row is read by
itself, in any order and by any process: nothing is unpacked, and nothing is shuffled through a buffer.
"""

import functools
import io
import os
from pathlib import Path

from PIL import Image

from tiger.errors import InputError
from tiger.files import read_json

SUFFIX = ".tar"
KEPT_OPEN = 256  # shards: each takes a file descriptor, of which a process commonly has 1024


def is_member(path: Path) -> bool:
    """Whether a path leads into a shard that exists."""
    return path.parent.suffix == SUFFIX and path.parent.is_file()


def read_bytes(path: Path) -> bytes:
    """The content of a file in a folder or in a shard. Raises InputError where a shard or its index is damaged."""
    return _shard(path.parent).read(path.name) if is_member(path) else path.read_bytes()


def open_image(path: Path) -> Image.Image:
    """Decode an image file in a folder or in a shard. Raises InputError when it is missing, damaged or no image."""
    from tiger import conditions  # OpenCV takes a while to load, and reading a manifest needs none

    return decode(read_bytes(path), str(path)) if is_member(path) else conditions.open_image(path)


def decode(content: bytes, name: str) -> Image.Image:
    """Decode an image from bytes; the InputError, where they are none, calls it by `name`."""
    from tiger import conditions

    return conditions.open_image(_Named(content, name))  # pyright: ignore[reportArgumentType]  # PIL reads files too


class _Named(io.BytesIO):
    """Bytes under a name, for messages."""

    def __init__(self, content: bytes, name: str):
        super().__init__(content)
        self.name = name

    def __str__(self) -> str:
        return self.name


class _Shard:
    """An open tar file, which processes that are forked and threads can share: reading moves no common position."""

    def __init__(self, path: Path):
        index = index_path(path)
        if not index.is_file():
            raise InputError(f"{path}: its index {index.name} is missing: copy both, or write the shards again")
        self.path, self.members = path, read_json(index)["members"]
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def read(self, name: str) -> bytes:
        if name not in self.members:
            raise InputError(f"{self.path}: has no member {name}: its index and the manifest belong to other shards")
        offset, size = self.members[name]
        content = os.pread(self.descriptor, size, offset)
        if len(content) != size:
            raise InputError(f"{self.path}: ends before {name} does: copy it again, or write the shards again")
        return content


_shard = functools.lru_cache(maxsize=KEPT_OPEN)(_Shard)


def index_path(shard: Path) -> Path:
    """Where the index of a shard lies."""
    return shard.with_suffix(".json")
