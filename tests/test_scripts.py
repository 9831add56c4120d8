"""The shell scripts: each way in which set-up can fail ends in one clear line, and a second run costs nothing."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("python3.13", "python3.12", "python3.11", "python3")


def fake(folder: Path, name: str, body: str) -> None:
    """An executable of that name in `folder`."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what setup.sh needs, with plenty of disk, and a user who is not root."""
    (tmp_path / "bin").mkdir()
    for name in ("setup.sh", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    fake(tmp_path / "bin", "df", "echo Filesystem; echo disk 1 1 99999999 1% /")
    fake(tmp_path / "bin", "id", "echo 1000")
    return tmp_path


def setup(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{checkout / 'bin'}:/usr/bin:/bin"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    return subprocess.run(
        ["bash", "setup.sh"],
        cwd=checkout,
        env=env | {"PATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def only_error(result: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr of a run that failed."""
    assert result.returncode == 1, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_old_python(checkout: Path) -> None:
    for name in NAMES:
        fake(checkout / "bin", name, 'case "$2" in *print*) echo 3.9.2 ;; *) exit 1 ;; esac')
    message = only_error(setup(checkout))
    assert "Python 3.11 or newer" in message
    assert "python3 is 3.9.2" in message


def test_missing_venv_module(checkout: Path) -> None:
    body = 'case "$2" in *print*2*) echo 3.12 ;; *print*) echo 3.12.1 ;; *ensurepip*) exit 1 ;; esac'
    for name in NAMES:
        fake(checkout / "bin", name, body)
    assert "run 'sudo apt-get install -y python3.12-venv'" in only_error(setup(checkout))


def test_full_disk(checkout: Path) -> None:
    fake(checkout / "bin", "df", "echo Filesystem; echo disk 1 1 3145728 99% /")
    assert "only 3 GB are free" in only_error(setup(checkout))


def test_no_network(checkout: Path) -> None:
    with socket.socket() as nobody:  # bound but not listening: connections are refused
        nobody.bind(("127.0.0.1", 0))
        registry = f"http://127.0.0.1:{nobody.getsockname()[1]}/simple"
        result = setup(
            checkout, PYTHON=sys.executable, PIP_INDEX_URL=registry, PIP_CONFIG_FILE=os.devnull, PIP_RETRIES="0"
        )
    message = only_error(result)
    assert "the package registry cannot be reached" in message
    assert ".venv/setup.log" in message


def test_missing_system_library(checkout: Path) -> None:
    packages = checkout / ".venv" / "bin"
    packages.mkdir(parents=True)
    library = "libGL.so.1: cannot open shared object file: No such file or directory"
    fake(packages, "python", f'case "$2" in *cv2*) echo "ImportError: {library}"; exit 1 ;; esac')
    message = only_error(setup(checkout))
    assert "libGL.so.1" in message
    assert "run 'sudo apt-get install -y libgl1 libglib2.0-0'" in message


def test_second_run_is_free(checkout: Path) -> None:
    (checkout / ".venv" / "bin").mkdir(parents=True)
    fake(checkout / ".venv" / "bin", "python", "exit 0")
    assert setup(checkout).returncode == 0
    fake(checkout / ".venv" / "bin", "python", "exit 1")  # must not be needed again
    started = time.monotonic()
    result = setup(checkout)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert time.monotonic() - started < 1
    (checkout / "requirements.lock").write_text("other==1\n")  # another lock is another environment
    assert setup(checkout, PYTHON="/nonexistent").returncode == 1


def test_lock_is_exact_and_local_to_nothing() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(line.count("==") == 1 and "@" not in line and "/" not in line for line in lines)
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    for file in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / file).read_text().splitlines():
            if not line.startswith("#"):
                name = line.partition(">")[0].partition("[")[0].lower().replace("_", "-")
                assert name in pinned, f"{file}: {name} is not in requirements.lock"
