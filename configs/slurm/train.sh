#!/usr/bin/env bash
# Training under Slurm that survives pre-emption and time limits: two minutes before the end, and when the job is
# pre-empted, Slurm sends SIGTERM; Tiger saves a checkpoint within a step and exits with 143; the job is queued again, and
# the same command resumes. Copy this file, set the lines that your cluster needs, and submit it from Tiger's folder:
#
#   sbatch configs/slurm/train.sh finetune.sh --data_dir D --pretrained_model P --output_dir R ...
#
# One task a GPU, each a process of the training: no launcher stands between Slurm's signal and Tiger. --output_dir must be
# on storage that all nodes share.
#SBATCH --job-name=tiger
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=tiger-%j.log
set -uo pipefail

if [ $# -eq 0 ]; then
    echo "usage: sbatch configs/slurm/train.sh pretrain.sh|finetune.sh|distill.sh FLAGS..." >&2
    exit 2
fi
trap : TERM # not the end of this script: it has to queue the job again

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export ACCELERATE_MIXED_PRECISION=${ACCELERATE_MIXED_PRECISION:-bf16}

# shellcheck disable=SC2016  # the variables are each task's own
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec bash "$@"
' task "$@"
status=$?

if [ "$status" -eq 143 ]; then # stopped by the signal, a checkpoint was saved
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
