#!/usr/bin/env bash
# The whole pipeline on the embedded default, from nothing to a measured result: phantom ultrasound with a long tail,
# coarse and fine training, synthesis, evaluation, report. About 15 minutes on 2 cores once the packages are there.
#
#   bash quickstart.sh                           # → runs/quickstart/report.html and report.json
#   bash quickstart.sh runs/another              # into another folder
#
# Run it again to resume after an interruption; a finished stage is skipped unless its command, an earlier stage, a
# config or a file in assets/ changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

readonly R=${1:-runs/quickstart}
case $R in
-h | --help) sed -n '2,9s/^# \{0,1\}//p' quickstart.sh && exit ;;
-*) echo "error: unknown option $R; usage: bash quickstart.sh [FOLDER]" >&2 && exit 2 ;;
esac
total=$(grep -c '^    stage ' quickstart.sh)

# What each stage runs, and what it leaves in $R. Seconds are for 2 cores.
stages() {
    stage data "phantom ultrasound with known truth, a long tail of classes" \
        python -m data.prepare phantom --output_dir "$R/data" --preset longtail --count 1200 --seed 3 # 20 s
    stage extra "further real images, for the upper bound" \
        python -m data.prepare phantom --output_dir "$R/extra" --preset balanced --count 1000 --seed 4 # 11 s
    stage pretrain "coarse training: the U-Net learns the data's prompts" \
        bash pretrain.sh --config configs/pretrain-tiny.yaml --data_dir "$R/data" --pretrained_model assets/tiny-base \
        --output_dir "$R/pretrain" --cache_dir "$R/cache" --seed 0 # 180 s
    stage finetune "fine training: both control encoders and their fusion" \
        bash finetune.sh --config configs/finetune-tiny.yaml --data_dir "$R/data" --pretrained_model "$R/pretrain" \
        --output_dir "$R/finetune" --cache_dir "$R/cache" --seed 0 # 250 s
    stage generated "synthesis" \
        python generation.py --model "$R/finetune" --data_dir "$R/data" --output_dir "$R/generated" \
        --count benign=250,PTC=250,FTC=250,MTC=250 --emphasis 0.5 --steps 6 --scheduler dpmsolver++ \
        --guidance_scale 2 --batch_size 25 --seed 0 # 100 s
    stage quality.json "image quality" \
        python -m eval.quality --real "$R/data" --fake "$R/generated" --output "$R/quality.json" # 35 s
    stage control.json "control: masks, maps and prompts against what the images show" \
        python -m eval.control --real "$R/data" --fake "$R/generated" --output "$R/control.json" # 25 s
    stage classify "benefit: classifiers trained with and without synthetic images" \
        python -m eval.classify --real "$R/data" --fake "$R/generated" --extra_real "$R/extra" \
        --output "$R/classify/report.json" --share 0.9 --model resnet18 --image_size 64 --max_train_steps 400 # 230 s
    stage report.html "report" \
        python -m eval.report --run "$R"
}

# stage OUTPUT TITLE COMMAND...: run one command, unless it already ran on the same inputs. What OUTPUT holds after
# other commands or from other inputs is removed first; after an interruption the same command goes on.
number=0
# Stands for a stage's inputs: configs and nets that come with the code, and the commands so far, which made the rest.
chain=$(find configs/{pretrain,finetune}{,-tiny}.yaml configs/knowledge/thyroid.yaml assets/{tiny-base,judges} -type f |
    LC_ALL=C sort | xargs sha256sum)
stage() {
    local output=$1 title=$2 commit was="" spent=0 state="" status=0
    shift 2
    number=$((number + 1))
    chain=$(printf '%s\n%s\n' "$chain" "$*" | sha256sum | cut -c1-16)
    note="$R/.stages/$output" # holds the inputs, the seconds spent on them, and "done"
    if [ -e "$note" ]; then read -r was spent state <"$note" || true; fi
    if [ -e "$R/$output" ] && [ "$was $state" = "$chain done" ]; then
        echo "[$number/$total] $title: done before"
        return
    fi
    if [ -n "$was" ] && [ "$was" != "$chain" ]; then rm -rf "${R:?}/$output"; fi
    if [ "$was $state" != "$chain " ]; then spent=0; fi # not the rest of an interrupted stage
    mkdir -p "$R/.stages"
    echo "$chain $spent" >"$note"
    printf '\n[%s/%s] %s (%s since the start)\n      %s\n' "$number" "$total" "$title" "$(clock $SECONDS)" "$*"
    commit=$(git rev-parse HEAD 2>/dev/null) || commit=""
    started=$((SECONDS - spent))
    trap 'echo "$chain $((SECONDS - started))" >"$note"' EXIT
    "$@" || status=$?
    if [ "$status" -ne 0 ]; then
        echo "error: stage $number ($title) ended with exit code $status; to go on from there: bash quickstart.sh $R" >&2
        exit "$status"
    fi
    trap - EXIT
    spent=$((SECONDS - started))
    log_command "$output" "$title" "$spent" "$*" "$commit"
    echo "$chain $spent done" >"$note"
}

clock() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }

# log_command OUTPUT TITLE SECONDS COMMAND COMMIT: note what made OUTPUT in commands.json, which the report shows
log_command() {
    python - "$R/commands.json" "$@" <<'PYTHON'
import sys
from pathlib import Path

from tiger.files import read_json, write_json

path, output, title, seconds, command, commit = sys.argv[1:]
entries = {entry["output"]: entry for entry in (read_json(path) if Path(path).exists() else [])}
entries[output] = {"output": output, "title": title, "seconds": int(seconds), "command": command, "commit": commit}
write_json(path, list(entries.values()))  # a stage that ran again keeps its place
PYTHON
}

bash setup.sh
PATH="$PWD/.venv/bin:$PATH"
cores=$(nproc)
# More threads than 8 slow these small networks down. Nothing here needs the network.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores < 8 ? cores : 8))}"
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 YOLO_OFFLINE=true MPLBACKEND=Agg

stages
printf '\nDone in %s. Open %s/report.html; the same figures are in %s/report.json\n' "$(clock $SECONDS)" "$R" "$R"
