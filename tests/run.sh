#!/usr/bin/env bash
# Set-up, lint, types, shell scripts, import rules and tests: all that CI runs. Every check runs; any failure fails the whole.
#
#   bash tests/run.sh                            # everything but the slow tests
#   bash tests/run.sh -m slow                    # arguments go to pytest
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

bash setup.sh || exit 1
readonly MAX_WORKERS=4 # each holds its own torch
workers=$(nproc)       # before OMP_NUM_THREADS is set, which it would print
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # pytest's workers share the cores
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 YOLO_OFFLINE=true MPLBACKEND=Agg

if [ "$workers" -gt "$MAX_WORKERS" ]; then workers=$MAX_WORKERS; fi

failed=()
check() {
    local name=$1
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}

shell_scripts() {
    find . -path ./.venv -prune -o -path ./runs -prune -o -name '*.sh' -print0 | xargs -0 shellcheck -x .ci/run
}

check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "pyright" pyright
check "shellcheck" shell_scripts
check "import rules" lint-imports
check "pytest" pytest -q -n "$workers" --dist loadfile "$@"

if [ ${#failed[@]} -gt 0 ]; then
    printf -v list ', %s' "${failed[@]}"
    echo "tests/run.sh: FAILED: ${list:2}"
    exit 1
fi
echo "tests/run.sh: all checks passed"
