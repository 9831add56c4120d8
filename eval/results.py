"""What a run folder holds, read and gathered for the report."""

import json
import os
import platform
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tiger import manifest as manifests
from tiger.errors import InputError
from tiger.files import read_json
from tiger.manifest import Manifest

ROOT = Path(__file__).resolve().parents[1]
PICTURE = {
    "output": "docs/img/phantom_beside_real.png",
    "title": "montage of clinical and phantom images",
    "command": "python -m benchmarks.montage phantom --real tiger_thyroid/init_image docs/img/phantom_beside_real.png",
}

Curve = tuple[list[float], list[float]]  # x, y


@dataclass(frozen=True)
class Results:
    """What a run folder holds; None or empty for what it lacks."""

    folder: Path
    real: Manifest | None
    fake: Manifest | None
    quality: dict[str, Any] | None
    control: dict[str, Any] | None
    classify: dict[str, Any] | None
    commands: list[dict[str, Any]]  # output, title, seconds (or None), command, commit of the code (empty: unknown)
    shipped: list[dict[str, str]]  # output, title, command of what the run used and did not make
    losses: dict[str, dict[str, Curve]]  # stage -> name -> steps, values


def read_results(folder: Path) -> Results:
    """Read every result that is there. Raises InputError where there is none."""
    if not folder.is_dir():
        raise InputError(f"--run {folder}: no such folder; quickstart.sh makes one")

    def result(name: str) -> Any:
        return read_json(folder / name) if (folder / name).is_file() else None

    def rows(name: str) -> Manifest | None:
        return manifests.read(folder / name) if (folder / name / "metadata.jsonl").is_file() else None

    real, control = rows("data"), result("control.json")
    quality, classify = result("quality.json"), result("classify/report.json")
    commands = result("commands.json") or []
    noted = {entry["output"] for entry in commands}
    commands += [
        {"output": output, "title": title, "seconds": None, "command": of["command"], "commit": ""}
        for output, title, of in (
            ("quality.json", "image quality", quality),
            ("control.json", "control", control),
            ("classify", "benefit", classify),
        )
        if of is not None and output not in noted and "command" in of
    ]
    found = Results(
        folder=folder,
        real=real,
        fake=rows("generated"),
        quality=quality,
        control=control,
        classify=classify,
        commands=commands,
        shipped=shipped(commands, control, real),
        losses={
            title: curves
            for name, title in (("pretrain", "coarse training"), ("finetune", "fine training"))
            if (curves := read_losses(folder / name / "metrics.jsonl"))
        },
    )
    if not (found.quality or found.control or found.classify or found.losses):
        raise InputError(
            f"--run {folder}: holds no result (metrics.jsonl, quality.json, control.json, classify/report.json)"
        )
    return found


def shipped(
    commands: Iterable[Mapping[str, Any]], control: Mapping[str, Any] | None, real: Manifest | None
) -> list[dict[str, str]]:
    """What made the base and the judges that the run used, and the picture of the phantom that it was made from."""
    entries = []
    base = Path("assets/tiny-base")
    if any(str(base) in entry["command"] for entry in commands):
        made_by = {path.stem: read_json(path).get("command") for path in sorted((ROOT / base).glob("*.json"))}
        made_by["unet"] = "bash assets/build.sh"
        entries += [
            {"output": str(base / part), "title": f"the base's {part.replace('_', ' ')}", "command": command}
            for part, command in made_by.items()
            if command
        ]
    if control is not None:
        entries += [
            {"output": judge["folder"], "title": f"the {name} judge", "command": judge["command"]}
            for name, judge in control["judges"].items()
            if judge["command"]
        ]
    if real is not None and {row.source for row in real.rows} == {"phantom"} and (ROOT / PICTURE["output"]).is_file():
        entries.append(PICTURE)
    return entries


def read_losses(path: Path) -> dict[str, Curve]:
    """name -> (steps, values) of every loss in a metrics.jsonl."""
    curves: dict[str, Curve] = {}
    if not path.is_file():
        return curves
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for name in records[-1] if records else ():
        if name.startswith("loss"):
            points = [(record["step"], record[name]) for record in records if name in record]
            curves[name.replace("_", " ")] = ([x for x, _ in points], [y for _, y in points])
    return curves


def figures_of(results: Results) -> dict[str, Any]:
    """Everything that the page states, as report.json holds it."""
    figures: dict[str, Any] = {
        "headline": headline(results.classify) if results.classify else {},
        "classify": results.classify,
        "control": results.control,
        "quality": results.quality,
        "training": {stage: ends_of(curves) for stage, curves in results.losses.items()},
        "stages": results.commands,
        "shipped": results.shipped,
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
        },
    }
    return {name: value for name, value in figures.items() if value}


def ends_of(curves: Mapping[str, Curve]) -> dict[str, dict[str, float]]:
    """The first value of each loss and the mean of its last tenth."""
    return {
        name: {"first": values[0], "last": float(np.mean(values[-max(1, len(values) // 10) :]))}
        for name, (_, values) in curves.items()
    }


def processor() -> str:
    """The processor's name, where the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def headline(classify: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """task -> arm -> AUC with its interval, of every class against the negative one."""
    tasks: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for arm, metrics in classify["arms"].items():
        for name, value in metrics.items():
            if name.startswith("auc ") and " vs " in name:
                tasks[name.removeprefix("auc ")][arm] = value
    return dict(tasks)
