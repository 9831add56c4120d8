"""Files for several GPUs and for Slurm: accelerate reads them, and a stopped job is queued again."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).resolve().parents[1]
EXPECTED = {
    "1gpu": ("NO", 1, 1),
    "8gpu": ("MULTI_GPU", 8, 1),
    "fsdp2": ("FSDP", 8, 1),
    "multinode": ("MULTI_GPU", 16, 2),
    "zero2": ("FSDP", 8, 1),
}


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_each_file(path):
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert (config.distributed_type.value, config.num_processes, config.num_machines) == EXPECTED[path.stem]
    assert config.mixed_precision == "bf16"


@pytest.mark.parametrize(("code", "queued"), [(0, False), (143, True), (1, False), (2, False)])
def test_a_job_stopped_by_a_signal_is_queued_again(code, queued, tmp_path):
    fakes = {
        "srun": 'shift; SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=8 "$@"',
        "scontrol": f"echo $* >>{tmp_path}/said",
    }
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "job.sh").write_text(
        f"echo $RANK $LOCAL_RANK $WORLD_SIZE $MASTER_PORT $@ >{tmp_path}/task; exit {code}\n"
    )
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ["bash", str(ROOT / "configs" / "slurm" / "train.sh"), str(tmp_path / "job.sh"), "--seed", "1"]
    assert subprocess.run(script, env=os.environ | slurm, check=False).returncode == code
    assert (tmp_path / "task").read_text() == "3 1 8 20007 --seed 1\n"
    assert ("requeue 7" in (tmp_path / "said").read_text()) == queued


@pytest.mark.parametrize("script", ["pretrain", "finetune", "distill"])
@pytest.mark.parametrize(("rank", "started"), [("", "accelerate launch"), ("3", "-m tiger")])
def test_a_process_that_slurm_started_starts_no_others(script, rank, started, tmp_path):
    """Eight tasks with a launcher of eight each would be 64 processes."""
    shutil.copy(ROOT / f"{script}.sh", tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name, said in (("python3", "$*"), ("accelerate", "accelerate $*")):
        fake = tmp_path / ".venv" / "bin" / name
        fake.write_text(f"#!/bin/bash\necho {said}\n")
        fake.chmod(0o755)
    env = os.environ | {"RANK": rank, "ACCELERATE_CONFIG_FILE": "8gpu.yaml"}
    done = subprocess.run(["bash", f"{script}.sh"], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(started) and f"-m tiger.{script} --config" in done.stdout
