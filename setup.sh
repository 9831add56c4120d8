#!/usr/bin/env bash
# Set-up that quickstart.sh and tests/run.sh share: makes .venv with exactly the packages of requirements.lock.
#
#   bash setup.sh                                # a second run finds everything there and takes no time
#   PYTHON=/opt/python3.12/bin/python3 bash setup.sh        # with this interpreter
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

readonly NEEDED_GB=10 # of disk: 7 GB of packages, and their archives while they are being unpacked
readonly LOG=.venv/setup.log

fail() {
    echo "error: $*" >&2
    exit 1
}

# apt_install REASON PACKAGE...: install as root, else name the command that would
apt_install() {
    local reason=$1 command
    shift
    command="apt-get install -y $*"
    if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
        echo "set-up: $reason: $command"
        mkdir -p "${LOG%/*}"
        # shellcheck disable=SC2086
        if { apt-get update && DEBIAN_FRONTEND=noninteractive $command; } >>"$LOG" 2>&1; then return; fi
        fail "$reason, and '$command' failed (log: $LOG)"
    fi
    fail "$reason: run 'sudo $command', then this command again"
}

# find_python: print the first interpreter that is at least 3.11; those below 3.13 first, where every package runs
find_python() {
    local candidate version seen="" candidates=(python3.12 python3.11 python3.13 python3)
    if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        version=$("$candidate" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "$candidate"
            return
        fi
        seen="$candidate is $version"
    done
    fail "Tiger needs Python 3.11 or newer, but ${seen:-${candidates[*]} cannot be run}: install one, or name it with PYTHON=/path/to/python3 bash $0"
}

make_venv() {
    local python version
    python=$(find_python)
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import venv, ensurepip' 2>/dev/null || apt_install "Python's venv module is missing" "python$version-venv"
    echo "set-up: making .venv with Python $version"
    "$python" -m venv --clear .venv || fail "$python -m venv .venv did not work: see the lines above"
}

check_disk() {
    local free_kb
    if compgen -G ".venv/lib/python3*/site-packages/torch" >/dev/null; then return; fi # most of it is there already
    free_kb=$(df -Pk . | awk 'NR == 2 { print $4 }')
    [ "$free_kb" -ge $((NEEDED_GB * 1024 * 1024)) ] ||
        fail "only $((free_kb / 1024 / 1024)) GB are free in $PWD, and .venv needs $NEEDED_GB GB: make room, or move this folder"
}

install_packages() {
    echo "set-up: installing $(grep -c == requirements.lock) packages, 3 GB to fetch, 7 GB on disk (log: $LOG)"
    : >"$LOG"
    if .venv/bin/python -m pip install --disable-pip-version-check --log "$LOG" -r requirements.lock 2>/dev/null; then return; fi
    if grep -q "No space left on device" "$LOG"; then
        fail "the disk filled up while packages were installed: free $NEEDED_GB GB for $PWD and 3 GB for ${TMPDIR:-/tmp} (log: $LOG)"
    fi
    if grep -qE "NewConnectionError|ConnectTimeout|ReadTimeout|NameResolutionError|ProxyError|Network is unreachable|Connection (refused|reset)" "$LOG"; then
        fail "the package registry cannot be reached: check the network and any proxy, then run this command again (log: $LOG)"
    fi
    fail "pip could not install requirements.lock: $(grep -o 'ERROR: .*' "$LOG" | head -n 1) (log: $LOG)"
}

# opencv-python, which ultralytics requires, links to two libraries that a bare Debian lacks
check_opencv() {
    local problem
    if problem=$(.venv/bin/python -c 'import cv2' 2>&1); then return; fi
    case $problem in
    *"cannot open shared object"*) apt_install "OpenCV lacks a system library (${problem##*Error: })" libgl1 libglib2.0-0 ;;
    esac
    problem=$(.venv/bin/python -c 'import cv2' 2>&1) || fail "OpenCV does not load: ${problem##*$'\n'}"
}

lock_hash=$(sha256sum requirements.lock)
if [ -x .venv/bin/python ] && [ "$(cat .venv/lock.sha256 2>/dev/null)" = "$lock_hash" ]; then exit 0; fi
check_disk
.venv/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || make_venv
install_packages
check_opencv
echo "$lock_hash" >.venv/lock.sha256
echo "set-up: done"
