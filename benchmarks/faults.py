"""Kill trainings at random points, run the same command again, and compare the end with that of an undisturbed run.

    python -m benchmarks.faults --output_dir runs/faults --kills 100            # both stages: tens of minutes on a CPU
    python -m benchmarks.faults --output_dir runs/faults --kills 5 --stages coarse --seed 7

Every other kill comes right before a file operation that the seed draws, in the latent cache, a checkpoint, or the
finished model; the others come at a random time. After about every third kill, the newest checkpoint is torn too: cut
short, or one bit flipped. The run that then goes on must name it and use an older one. In the end every file must be
byte-equal to the undisturbed run's, but for logs/ and the speeds in metrics.jsonl. No half-written folder may be left.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

OPERATIONS = {
    "open",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.chmod",
}  # audit events before file operations
SPEEDS = ("images_per_second", "tflops", "mfu", "peak_memory_gib")
STEPS, CHECKPOINTING_STEPS = 6, 2
TEAR_EVERY = 3  # kills
FLAGS = {
    "max_train_steps": STEPS, "checkpointing_steps": CHECKPOINTING_STEPS, "validation_steps": 3, "validation_images": 2,
    "validation_inference_steps": 1, "train_batch_size": 2, "gradient_accumulation_steps": 2, "log_steps": 1,
    "lr_warmup_steps": 2, "lr_scheduler": "cosine", "learning_rate": 1e-3, "snr_gamma": 5, "use_ema": "true",
    "class_balance": 0.5,
}  # fmt: skip
CACHE_FILE_IMAGES = 4  # so that several are written

Main = Callable[[list[str] | None], None]


class Operations:
    """Counts file operations below a folder; ends the process with SIGKILL right before the `fatal`-th."""

    def __init__(self, folder: Path, report: int, fatal: int | None):
        """report: file descriptor to tell the number, or the path of the fatal one."""
        self.folder, self.report, self.fatal = str(folder), report, fatal
        self.count = 0

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in OPERATIONS or not isinstance(args[0], str) or not args[0].startswith(self.folder):
            return
        self.count += 1
        if self.count == self.fatal:
            os.write(self.report, args[0].encode())
            os.kill(os.getpid(), signal.SIGKILL)


def start(main: Main, argv: list[str], folder: Path, fatal: int | None) -> tuple[int, int]:
    """Fork a process that runs `main(argv)`; returns its id and a file descriptor with what Operations reports.

    Forking a parent that has everything imported makes a restart cheap. The parent never computes with torch.
    """
    from tiger.errors import run

    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    code = 1
    try:
        with open(folder.parent / "output.log", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        operations = Operations(folder, writing, fatal)
        sys.addaudithook(operations)
        code = run(main, argv)
        os.write(writing, str(operations.count).encode())
    except BaseException:
        traceback.print_exc()  # os._exit would not
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def attempt(main: Main, argv: list[str], folder: Path, fatal: int | None, seconds: float | None) -> tuple[bool, str]:
    """Run `main(argv)` until its end, a fatal operation or `seconds`; returns whether it was killed, and the report.

    Raises RuntimeError if it ended by itself without success.
    """
    child, report = start(main, argv, folder, fatal)
    deadline = None if seconds is None else time.monotonic() + seconds
    try:
        while (status := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if deadline and time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                status = os.waitpid(child, 0)
                break
            time.sleep(0.002)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    with os.fdopen(report) as pipe:
        told = pipe.read()
    code = os.waitstatus_to_exitcode(status[1])
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"ended with exit code {code}: see {folder.parent / 'output.log'}")
    return code != 0, told


def tear(output_dir: Path, rng: np.random.Generator) -> str | None:
    """Damage a file of the newest checkpoint; returns the checkpoint's name, None if there is none."""
    from tiger import checkpoint

    found = sorted(checkpoint.checkpoints(output_dir), key=checkpoint.step_of)
    if not found:
        return None
    files = sorted(path for path in found[-1].rglob("*") if path.is_file() and path.stat().st_size)
    path = files[rng.integers(len(files))]
    content = bytearray(path.read_bytes())
    place = int(rng.integers(len(content)))
    if rng.random() < 0.5 or path.name == checkpoint.MANIFEST:
        del content[place:]
    else:
        content[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    return found[-1].name


def differences(expected: Path, found: Path) -> list[str]:
    """Names of files that only one folder has or that differ; half-written folders that are left in `found`."""
    names = set(visible(expected)) | set(visible(found))
    unequal = [name for name in sorted(names) if not equal(expected / name, found / name)]
    return unequal + [path.name for pattern in (".checkpoint-*", ".model.*") for path in found.glob(pattern)]


def visible(folder: Path) -> Iterator[str]:
    """Files of a run, without logs/ and without the few bytes that an interrupted atomic write leaves."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and name.parts[0] != "logs" and not path.name.startswith("."):
            yield name.as_posix()


def equal(a: Path, b: Path) -> bool:
    """Whether two files have the same bytes; metrics.jsonl may differ in speeds."""
    if not a.exists() or not b.exists():
        return False
    if a.name != "metrics.jsonl":
        return a.read_bytes() == b.read_bytes()
    lines = [[json.loads(line) for line in path.read_text().splitlines()] for path in (a, b)]
    for line in (*lines[0], *lines[1]):
        for name in SPEEDS:
            line.pop(name, None)
    return lines[0] == lines[1]


def phase(path: str, folder: Path) -> str:
    """What a run was writing when it was killed before an operation on `path`."""
    first = Path(path).relative_to(folder).parts[:1]
    name = first[0] if first else ""
    if name == "cache":
        return "latent cache"
    if name.startswith((".checkpoint-", "checkpoint-")):
        return "checkpoint"
    if name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "controlnet") or name.startswith(".model"):
        return "finished model"
    return "other files"


def storm(main: Main, argv: list[str], work: Path, kills: int, rng: np.random.Generator) -> dict[str, Any]:
    """Kill and restart one stage until it was killed `kills` times; raises RuntimeError where an end is not equal."""
    run, expected, log = work / "run", work / "undisturbed", work / "output.log"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    argv = [*argv, f"--output_dir={run}"]
    began = time.monotonic()
    _, operations = attempt(main, argv, run, None, None)
    seconds = time.monotonic() - began
    run.rename(expected)
    phases: Counter[str] = Counter()
    rounds = torn = 0
    while phases.total() < kills:
        log.unlink()
        named: set[str] = set()
        killed = True
        while killed:
            fatal = int(rng.integers(1, int(operations) + 1)) if phases.total() % 2 == 0 else None
            limit = rng.uniform(0, seconds) if fatal is None else None
            if phases.total() >= kills:
                fatal = limit = None
            killed, where = attempt(main, argv, run, fatal, limit)
            if killed:
                phases[phase(where, run) if fatal else "a random time"] += 1
                if torn * TEAR_EVERY < phases.total() and (name := tear(run, rng)):
                    named.add(name)
                    torn += 1
        said = log.read_text()
        if silent := [name for name in named if f"{run / name} is damaged and is skipped" not in said]:
            raise RuntimeError(f"torn checkpoints were not named: {', '.join(silent)}; see {log}")
        if wrong := differences(expected, run):
            raise RuntimeError(f"after {phases.total()} kills {run} differs from {expected}: {', '.join(wrong)}")
        rounds += 1
        print(f"  {phases.total()} kills, {torn} torn checkpoints: equal", flush=True)
        shutil.rmtree(run)
    return {"kills": dict(phases), "torn checkpoints": torn, "runs": rounds, "undisturbed seconds": round(seconds, 2)}


def make_data(folder: Path) -> Path:
    """Phantom ultrasound, in a process of its own: this one must not compute before it forks."""
    child = os.fork()
    if not child:
        from data import prepare

        with contextlib.suppress(BaseException):
            prepare.main(["phantom", f"--output_dir={folder}", "--count=24", "--seed=3", "--workers=1"])
        os._exit(0)
    os.waitpid(child, 0)
    if not (folder / "metadata.jsonl").exists():
        raise RuntimeError(f"{folder} could not be made")
    return folder


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if every end was equal, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="faults.json, and the runs while they go on")
    parser.add_argument("--kills", type=int, default=100, help="in all, shared between the stages (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the points (default: 0)")
    parser.add_argument("--stages", nargs="+", choices=("coarse", "fine"), default=["coarse", "fine"])
    parser.add_argument("--pretrained_model", default="assets/tiny-base", help="(default: assets/tiny-base)")
    parser.add_argument("--data_dir", type=Path, help="default: phantoms, made in the output folder")
    parser.add_argument("--resolution", type=int, default=64, help="pixels (default: 64)")
    args = parser.parse_args(argv)
    os.environ.update(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")

    import torch

    import tiger.cache
    import tiger.coarse
    import tiger.config
    import tiger.dataset
    import tiger.fine
    import tiger.finetune
    import tiger.pretrain
    import tiger.trainer  # noqa: F401 (what each run needs, imported once)

    torch.set_num_threads(1)
    tiger.config.git_commit()  # the same in every run, whatever is checked out meanwhile
    tiger.cache.SHARD_ROWS = CACHE_FILE_IMAGES
    output_dir = args.output_dir.resolve()
    output_dir.mkdir(parents=True, exist_ok=True)
    data_dir = args.data_dir or make_data(output_dir / "data")
    inputs = {"pretrained_model": args.pretrained_model, "data_dir": data_dir, "resolution": args.resolution}
    flags = [f"--{name}={value}" for name, value in (FLAGS | inputs).items()]
    mains = {"coarse": tiger.pretrain.main, "fine": tiger.finetune.main}
    results = {}
    for number, stage in enumerate(args.stages):
        kills = (args.kills + number) // len(args.stages)
        print(f"{stage} stage, {kills} kills", flush=True)
        rng = np.random.default_rng((args.seed, number))
        try:
            results[stage] = storm(mains[stage], flags, output_dir / stage, kills, rng)
        except RuntimeError as error:
            print(f"error: {stage} stage: {error}", file=sys.stderr)
            return 1
    (output_dir / "faults.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
