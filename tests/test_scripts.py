"""The shell scripts: each way in which set-up can fail ends in one clear line, and a second run costs nothing."""

import json
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


# ----------------------------------------------------------------------------------------------------------- quickstart

STAGES = """stages() {
    stage one "first" bash -c 'echo first ARG >>"$0/log" && mkdir -p "$0/one" && echo x >>"$0/one/file"' "$R"
    stage two.json "second" bash -c 'echo second >>"$0/log" && touch "$0/two.json" && test ! -e "$0/fail"' "$R"
    stage three.json "third" bash -c 'echo third >>"$0/log" && touch "$0/three.json"' "$R"
}
"""


class Quickstart:
    """quickstart.sh with three small stages of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.run_folder = folder / "run"
        (folder / "setup.sh").write_text("")
        shutil.copytree(ROOT / "configs", folder / "configs")
        for name in ("tiny-base", "judges"):
            (folder / "assets" / name).mkdir(parents=True)
            (folder / "assets" / name / "model.safetensors").write_text("weights")
        self.write("a")

    def write(self, argument: str) -> None:
        source = (ROOT / "quickstart.sh").read_text()
        start, end = source.index("stages() {"), source.index("# stage OUTPUT TITLE")
        stages = STAGES.replace("ARG", argument)
        (self.folder / "quickstart.sh").write_text(source[:start] + stages + source[end:])

    def __call__(self) -> tuple[int, str, list[str]]:
        """(exit code, stderr, stages that ran)"""
        log = self.run_folder / "log"
        log.unlink(missing_ok=True)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
        command = ["bash", "quickstart.sh", str(self.run_folder)]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stderr, log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def quickstart(tmp_path: Path) -> Quickstart:
    quickstart = Quickstart(tmp_path)
    quickstart.run_folder.mkdir()
    return quickstart


def test_quickstart_runs_each_stage_once(quickstart: Quickstart) -> None:
    assert quickstart() == (0, "", ["first a", "second", "third"])
    assert quickstart() == (0, "", [])
    entries = json.loads((quickstart.run_folder / "commands.json").read_text())
    assert [entry["output"] for entry in entries] == ["one", "two.json", "three.json"]
    assert entries[0]["title"] == "first" and "echo first a" in entries[0]["command"] and entries[0]["seconds"] >= 0
    assert [entry["commit"] for entry in entries] == ["", "", ""]  # outside a git checkout


def test_quickstart_goes_on_after_a_failure(quickstart: Quickstart) -> None:
    (quickstart.run_folder / "fail").touch()
    code, error, ran = quickstart()
    assert (code, ran) == (1, ["first a", "second"])
    assert "stage 2 (second) ended with exit code 1" in error and "bash quickstart.sh" in error
    (quickstart.run_folder / "fail").unlink()
    assert quickstart()[2] == ["second", "third"]


def test_quickstart_makes_anew_what_follows_a_change(quickstart: Quickstart) -> None:
    quickstart()
    quickstart.write("b")
    assert quickstart()[2] == ["first b", "second", "third"]
    assert (quickstart.run_folder / "one" / "file").read_text() == "x\n"  # not on top of what the old command made
    (quickstart.run_folder / "two.json").unlink()
    assert quickstart()[2] == ["second"]
    entries = json.loads((quickstart.run_folder / "commands.json").read_text())
    assert [entry["output"] for entry in entries] == ["one", "two.json", "three.json"]  # it kept its place


@pytest.mark.parametrize("file", ["configs/finetune-tiny.yaml", "assets/judges/model.safetensors"])
def test_quickstart_makes_anew_what_comes_of_a_changed_file(quickstart: Quickstart, file: str) -> None:
    quickstart()
    with open(quickstart.folder / file, "a") as changed:
        changed.write("# changed\n")
    assert quickstart()[2] == ["first a", "second", "third"]


def test_quickstart_adds_up_the_seconds_of_interrupted_attempts(quickstart: Quickstart) -> None:
    (quickstart.run_folder / "fail").touch()
    quickstart()
    note = quickstart.run_folder / ".stages" / "two.json"
    inputs, seconds = note.read_text().split()
    assert int(seconds) < 60
    note.write_text(f"{inputs} 1000\n")
    quickstart()  # fails again
    (quickstart.run_folder / "fail").unlink()
    quickstart()
    entries = json.loads((quickstart.run_folder / "commands.json").read_text())
    assert 1000 <= entries[1]["seconds"] < 1060
    assert entries[0]["seconds"] < 60


def test_quickstart_notes_the_commit_of_each_stage(quickstart: Quickstart) -> None:
    def commit() -> str:
        git = ["git", "-C", str(quickstart.folder), "-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
        return subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()

    subprocess.run(["git", "init", "-q", str(quickstart.folder)], check=True)
    first = commit()
    quickstart()
    (quickstart.run_folder / "three.json").unlink()
    second = commit()
    quickstart()
    entries = json.loads((quickstart.run_folder / "commands.json").read_text())
    assert [entry["commit"] for entry in entries] == [first, first, second]
    assert first != second


@pytest.mark.parametrize(
    ("option", "code", "text"), [("--help", 0, "bash quickstart.sh runs/another"), ("--x", 2, "usage")]
)
def test_quickstart_options(option: str, code: int, text: str) -> None:
    command = ["bash", str(ROOT / "quickstart.sh"), option]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert text in (done.stderr if code else done.stdout)


def test_ci_runs_the_tests() -> None:
    assert "tests/run.sh" in (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
