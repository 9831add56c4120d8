"""Checkpoints that are whole or absent: staged in a temporary folder, hashed, fsynced, then renamed."""

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiger.files import read_json, write_json

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
FINISHED = "finished.json"  # {"step": optimizer steps in the finished model}


def save(output_dir: str | Path, step: int, write: Callable[[Path], None]) -> Path:
    """Make `output_dir/checkpoint-<step>` from what `write(folder)` puts in a folder, and return its path.

    Until the last rename the checkpoint does not exist under its name, so a crash or a full disk leaves the older ones
    as they were. The manifest lists every file with its SHA-256 and is written last.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    final = output_dir / f"checkpoint-{step}"
    staging = Path(tempfile.mkdtemp(dir=output_dir, prefix=f".checkpoint-{step}."))
    try:
        write(staging)
        files = sorted(path for path in staging.rglob("*") if path.is_file())
        hashes = {path.relative_to(staging).as_posix(): sha256(path) for path in files}
        (staging / MANIFEST).write_text(json.dumps({"step": step, "sha256": hashes}, indent=2) + "\n", encoding="utf-8")
        fsync_all(staging)
        readable_by_umask(staging)
        shutil.rmtree(
            final, ignore_errors=True
        )  # only a torn one can be here: resume would have started after a valid one
        os.replace(staging, final)
        fsync(output_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return final


def newest_valid(output_dir: str | Path) -> Path | None:
    """The checkpoint of the highest step whose files match their hashes. Torn ones are named on stderr and skipped."""
    for folder in sorted(checkpoints(output_dir), key=step_of, reverse=True):
        problem = find_problem(folder)
        if problem is None:
            return folder
        print(f"warning: {folder} is damaged and is skipped: {problem}", file=sys.stderr)
    return None


def rotate(output_dir: str | Path, keep: int, newest: int) -> None:
    """Delete all but the `keep` last checkpoints up to step `newest`, which must be a valid one.

    Later ones go too: they are torn, as training would have gone on from there otherwise. So does what interrupted
    saves left behind.
    """
    found = sorted(checkpoints(output_dir), key=step_of)
    kept = [folder for folder in found if step_of(folder) <= newest][-keep:]
    for folder in found:
        if folder not in kept:
            shutil.rmtree(folder)
    for folder in Path(output_dir).glob(".checkpoint-*"):
        shutil.rmtree(folder, ignore_errors=True)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Folders named checkpoint-<step>, in no order, valid or not."""
    return [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir() and re.search(r"-\d+$", path.name)]


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.rsplit("-", 1)[1])


def find_problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, None when every one is there and has its hash."""
    try:
        hashes: dict[str, str] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError):
        return f"no readable {MANIFEST}"
    for name, digest in hashes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256(path) != digest:
            return f"{name} was changed or cut short"
    return None


def publish(output_dir: str | Path, step: int, export: Callable[[Path], None]) -> None:
    """Put the complete diffusers folder that `export(folder)` writes into `output_dir`, part by part.

    model_index.json goes first and comes last: what a crash leaves behind is never taken for a model.
    """
    output_dir = Path(output_dir)
    for leftover in output_dir.glob(".model.*"):  # of an interrupted call
        shutil.rmtree(leftover)
    staging = Path(tempfile.mkdtemp(dir=output_dir, prefix=".model."))
    try:
        export(staging)
        fsync_all(staging)
        (output_dir / "model_index.json").unlink(missing_ok=True)
        for part in sorted(staging.iterdir(), key=lambda path: path.name == "model_index.json"):
            target = output_dir / part.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(part, target)
        write_json(output_dir / FINISHED, {"step": step})
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def finished_step(output_dir: str | Path) -> int:
    """Optimizer steps in the finished model of `output_dir`; 0 if there is none."""
    output_dir = Path(output_dir)
    if not (output_dir / FINISHED).exists() or not (output_dir / "model_index.json").exists():
        return 0
    return int(read_json(output_dir / FINISHED)["step"])


def optimizer_tensors(optimizer: "torch.optim.Optimizer") -> dict[str, "torch.Tensor"]:
    """An optimizer's state, by the place of the parameter and the name of the value: "12.exp_avg"."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def save_optimizer(
    optimizer: "torch.optim.Optimizer", path: str | Path, tensors: dict[str, "torch.Tensor"] | None = None
) -> None:
    """Write an optimizer's state to a safetensors file: tensors as tensors, hyperparameters as JSON in the header.

    tensors: those of `optimizer_tensors`, whole, where the optimizer has only a share of them.
    """
    from safetensors.torch import save_file

    tensors = optimizer_tensors(optimizer) if tensors is None else tensors
    groups = optimizer.state_dict()["param_groups"]
    plain = [{key: value for key, value in group.items() if is_plain(value)} for group in groups]
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    save_file(contiguous, str(path), metadata={"param_groups": json.dumps(plain)})


def load_optimizer(optimizer: "torch.optim.Optimizer", path: str | Path) -> None:
    """Read what `save_optimizer` wrote into an optimizer over the same parameters in the same order."""
    from safetensors import safe_open

    from tiger.fsdp import laid_out

    state: dict[int, dict[str, Any]] = {}
    with safe_open(str(path), framework="pt") as file:
        groups = json.loads(file.metadata()["param_groups"])
        for key in file.keys():  # noqa: SIM118 (not a dict)
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = file.get_tensor(key)
    current = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(
        {"state": state, "param_groups": [old | new for old, new in zip(current, groups, strict=True)]}
    )
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if getattr(value, "shape", None) == parameter.shape and value.dtype == parameter.dtype:
                values[name] = laid_out(value, like=parameter)  # or fused kernels mix it up


def is_plain(value: Any) -> bool:
    """Whether a hyperparameter survives JSON."""
    return isinstance(value, (bool, int, float, str, list, tuple, type(None)))


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_all(folder: Path) -> None:
    """Force a folder and all in it to disk."""
    for path in [*folder.rglob("*"), folder]:
        fsync(path)


def fsync(path: Path) -> None:
    """Force a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def readable_by_umask(folder: Path) -> None:
    """Give a folder made by mkdtemp (0700) the mode that a plain mkdir would have given."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
