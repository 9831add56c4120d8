#!/usr/bin/env bash
# Make assets/tiny-base and assets/judges from nothing: about four hours on two CPU cores. Safe to run again: it resumes.
#
#   bash assets/build.sh            # work in runs/base, results in assets/
#
# The base sees only common subtypes (benign, PTC) and none of the rare subtypes' particular terms; the judges, which
# only ever measure, see every term.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
work=${1:-runs/base}
bash setup.sh
python=.venv/bin/python

$python -m data.prepare phantom --output_dir "$work/data" --count 16000 --seed 11 --preset common
if [[ ! -f $work/plain/autoencoder.json ]]; then # structure first: with the loss on grain from the start it suffers
    $python -m tiger.base autoencoder --data_dir "$work/data" --output_dir "$work/plain" --max_train_steps 9000 \
        --spectrum_weight 0
fi
if [[ ! -f $work/init/autoencoder.json ]]; then # then grain, by the decoder alone
    $python -m tiger.base autoencoder --data_dir "$work/data" --output_dir "$work/init" --max_train_steps 1500 \
        --pretrained_vae "$work/plain/vae" --reconstruction_share 0 --adversarial_weight 0.2 --structure_weight 4
fi
if [[ ! -f $work/init/text_encoder.json ]]; then
    $python -m tiger.base text_encoder --data_dir "$work/data" --output_dir "$work/init" --max_train_steps 700
fi
if [[ ! -f $work/init/model_index.json ]]; then
    $python -m tiger.base assemble --output_dir "$work/init"
fi
bash pretrain.sh --config configs/pretrain-base.yaml --pretrained_model "$work/init" --data_dir "$work/data" \
    --output_dir "$work/pretrain"
$python -m tiger.base export --model "$work/pretrain" --figures "$work/init" --output_dir assets/tiny-base

$python -m data.prepare phantom --output_dir "$work/judges" --count 6000 --seed 12 --preset truth
$python -m eval.segment train --data_dir "$work/judges" --output_dir "$work/segmenter" --max_train_steps 2500
$python -m eval.attributes train --data_dir "$work/judges" --output_dir "$work/attributes" --max_train_steps 4000
for judge in segmenter attributes; do
    mkdir -p "assets/judges/$judge"
    cp "$work/$judge/"{config.json,metrics.json,model.safetensors} "assets/judges/$judge/"
done
