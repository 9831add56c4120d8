#!/usr/bin/env bash
# Real images: BrEaST's breast ultrasound with the malignant class made rare, 12 of about 49 training images. Four folds
# by patient, a generator for each, so that all 252 cases are tested once; three classifier seeds. Over an hour on 2 cores.
# Any command that was interrupted goes on where it was; run it again.
#
#   bash benchmarks/breast.sh BrEaST                 # the published folder (data/README.md) → runs/breast/classify
#   bash benchmarks/breast.sh BrEaST runs/another
set -euo pipefail
INPUT=$(realpath "${1:?the folder of BrEaST, see data/README.md}")
readonly INPUT
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly R=${2:-runs/breast}
bash setup.sh
PATH="$PWD/.venv/bin:$PATH"

python -m data.prepare build --source breast --input "$INPUT" --output_dir "$R/data" --size 128
python -m data.prepare split --data_dir "$R/data" --knowledge breast --folds 4

for fold in 0 1 2 3; do
    python -m data.prepare subsample --data_dir "$R/data/fold$fold.jsonl" --knowledge breast --most malignant=12 \
        --name "rare$fold"
    data=(--data_dir "$R/data/rare$fold.jsonl" --knowledge breast)
    bash pretrain.sh --config configs/pretrain-tiny.yaml "${data[@]}" --pretrained_model assets/tiny-base \
        --output_dir "$R/coarse$fold" --cache_dir "$R/cache" --max_train_steps 400 --seed 0
    bash finetune.sh --config configs/finetune-tiny.yaml "${data[@]}" --pretrained_model "$R/coarse$fold" \
        --output_dir "$R/fine$fold" --cache_dir "$R/cache" --max_train_steps 400 --seed 0
    python generation.py --model "$R/fine$fold" "${data[@]}" --count benign=200,malignant=200 --steps 8 \
        --scheduler dpmsolver++ --guidance_scale 2 --batch_size 25 --output_dir "$R/generated$fold" --seed 0
done

python -m eval.classify --real "$R/data/rare{fold}.jsonl" --fake "$R/generated{fold}" \
    --extra_real "$R/data/rare{fold}_rest.jsonl" --folds 4 --knowledge breast --seeds 0,1,2 --share 0.5 \
    --model resnet18 --image_size 64 --max_train_steps 200 --output "$R/classify/report.json"
