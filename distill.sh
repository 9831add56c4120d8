#!/usr/bin/env bash
# Step distillation. Flags and examples: bash distill.sh --help, and the head of tiger/distill.py.
#
#   bash distill.sh --config configs/distill-tiny.yaml --data_dir D --pretrained_model P --output_dir R
#
# One process by default. For more, describe them once with `accelerate config`, or name such a file:
#   ACCELERATE_CONFIG_FILE=configs/accelerate/8gpu.yaml bash distill.sh ...
# One process in half precision: ACCELERATE_MIXED_PRECISION=bf16 bash distill.sh ...
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ -d $root/.venv/bin ]]; then export PATH="$root/.venv/bin:$PATH"; fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

accelerate_config=${ACCELERATE_CONFIG_FILE:-${HF_HOME:-$HOME/.cache/huggingface}/accelerate/default_config.yaml}
if [[ -z ${RANK:-} && (-n ${ACCELERATE_CONFIG_FILE:-} || -f $accelerate_config) ]]; then
    launch=(accelerate launch --quiet --config_file "$accelerate_config")
else # one process, or one of several that Slurm started: without a wrapper signals and exit codes pass through
    launch=(python3)
fi
exec "${launch[@]}" -m tiger.distill --config "$root/configs/distill.yaml" "$@"
