"""A short storm of kills on tiny models; benchmarks/faults.py runs the long one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from training_samples import SIDE, save_base, save_data

from benchmarks import faults
from tiger import checkpoint

ROOT = Path(__file__).resolve().parents[2]


def test_killed_runs_of_both_stages_end_byte_equal(tmp_path):
    base, data = save_base(tmp_path / "base"), save_data(tmp_path / "data", 10)
    argv = [f"--pretrained_model={base}", f"--data_dir={data}", f"--output_dir={tmp_path / 'out'}", "--kills=6"]
    command = [sys.executable, "-m", "benchmarks.faults", *argv, f"--resolution={SIDE}", "--seed=4"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "faults.json").read_text())
    assert all(sum(results[stage]["kills"].values()) == 3 for stage in ("coarse", "fine"))


def test_differences_are_seen(tmp_path):
    for run in ("a", "b"):
        (tmp_path / run / "unet").mkdir(parents=True)
        (tmp_path / run / "unet" / "weights").write_bytes(b"same")
        speed = {"a": 1.0, "b": 2.0}[run]
        line = {"step": 1, "loss": 0.5, "images_per_second": speed}
        (tmp_path / run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    a, b = tmp_path / "a", tmp_path / "b"
    assert faults.differences(a, b) == []
    (b / "metrics.jsonl").write_text('{"step": 1, "loss": 0.6, "images_per_second": 2.0}\n')
    (b / "unet" / "weights").write_bytes(b"samE")
    (a / "config.yaml").touch()
    (b / ".checkpoint-4.x").mkdir()
    assert faults.differences(a, b) == ["config.yaml", "metrics.jsonl", "unet/weights", ".checkpoint-4.x"]


def test_every_torn_file_is_a_damaged_checkpoint(tmp_path):
    def write(folder: Path) -> None:
        (folder / "weights").write_bytes(bytes(range(100)))
        (folder / "config.yaml").write_text("seed: 0\n")

    for seed in range(20):
        folder = checkpoint.save(tmp_path, seed, write)
        assert faults.tear(tmp_path, np.random.default_rng(seed)) == folder.name
        assert checkpoint.find_problem(folder)
