"""Atomic writes: a reader sees the old file or the whole new one, never a part."""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_path(path: str | Path, durable: bool = True) -> Iterator[Path]:
    """Give a temporary path in the same folder; it replaces `path` when the block ends without an exception.

    `durable=False` leaves out the fsync, which survives kill -9 but not a power cut: right for the thousands of small
    files that the same command makes again.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if durable:
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes 0600 files, which colleagues on a cluster could not read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; figures that are not finite become null, as strict JSON has none."""
    with atomic_path(path) as temporary:
        text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: str | Path) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def changed_settings(
    path: str | Path, settings: dict[str, Any], defaults: Mapping[str, Any] | None = None
) -> list[str]:
    """`name was old, is new` for each setting that differs from those in `path`; none where there is no such file.

    defaults: what settings were that the file does not name.
    """
    old = {**(defaults or {}), **read_json(path)} if Path(path).exists() else settings
    return [f"{name} was {old.get(name)}, is {value}" for name, value in settings.items() if old.get(name) != value]
