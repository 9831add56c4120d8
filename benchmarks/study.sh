#!/usr/bin/env bash
# The evidence on the phantom: does it help, against what, and how surely? Three generators, every arm, five classifier
# seeds; hours on 2 cores. Any command that was interrupted goes on where it was; run it again.
#
#   bash benchmarks/study.sh                         # → runs/study/classify/report.json and runs/study/tables
#   bash benchmarks/study.sh runs/another
#   SHARD=1/2 bash benchmarks/study.sh               # a second process takes its half of the classifiers (the other: 0/2)
#
# Start a second process once all images are drawn: what comes before the classifiers is for one process.
#
# 24 training images of each rare class, 2,400 test images. The share of synthetic images (half) and their number were
# chosen on the quickstart's data, which are others.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly R=${1:-runs/study}
readonly COUNT=benign=400,PTC=400,FTC=400,MTC=400
bash setup.sh
PATH="$PWD/.venv/bin:$PATH"

python -m data.prepare phantom --output_dir "$R/data" --preset study --count 1200 --seed 5
python -m data.prepare phantom --output_dir "$R/extra" --preset balanced --count 2000 --seed 6

train() { # train SCRIPT CONFIG BASE OUTPUT SEED FLAGS...
    bash "$1" --config "configs/$2-tiny.yaml" --data_dir "$R/data" --cache_dir "$R/cache" \
        --pretrained_model "$3" --output_dir "$4" --seed "$5" "${@:6}"
}
generate() { # generate MODEL OUTPUT SEED FLAGS...
    python generation.py --model "$R/$1" --data_dir "$R/data" --output_dir "$R/$2" --count $COUNT --steps 6 \
        --scheduler dpmsolver++ --guidance_scale 2 --batch_size 25 --seed "$3" "${@:4}"
}

sets=()
for seed in 0 1 2; do
    train pretrain.sh pretrain assets/tiny-base "$R/coarse$seed" "$seed" --max_train_steps 1000
    train finetune.sh finetune "$R/coarse$seed" "$R/fine$seed" "$seed" --max_train_steps 1000
    # Stable Diffusion with one ControlNet, of the mask: no second encoder, no fusion, no term weights.
    train finetune.sh finetune "$R/coarse$seed" "$R/controlnet$seed" "$seed" --max_train_steps 1000 \
        --term_weighting off --fusion sum --bg_dropout 0.999 --fg_dropout 0
    generate "fine$seed" "tiger_f$seed" "$seed"
    generate "fine$seed" "tiger_n$seed" "$seed" --prompts names
    generate "fine$seed" "coarse_images$seed" "$seed" --fg_scale 0 --bg_scale 0 # the coarse U-Net alone
    generate "controlnet$seed" "sd_controlnet$seed" "$seed" --branches fg
    for arm in tiger_f tiger_n sd_controlnet; do sets+=("${arm}_$seed=$R/$arm$seed"); done
    sets+=("coarse_$seed=$R/coarse_images$seed")
done
for seed in 0 1; do # what if the knowledge base's frequencies were wrong by up to 30 %?
    python -m benchmarks.perturb --by 0.3 --seed "$seed" "$R/thyroid-$seed.yaml"
    generate fine0 "perturbed$seed" "$seed" --knowledge "$R/thyroid-$seed.yaml" --prompts knowledge
    sets+=("perturbed_$seed=$R/perturbed$seed")
done

python -m eval.classify --real "$R/data" --fake "${sets[@]}" --extra_real "$R/extra" --output "$R/classify/report.json" \
    --arms none oversampling basic mixup cutmix erasing features "${sets[@]%%=*}" real_upper --seeds 0,1,2,3,4 \
    --share 0.5 --model resnet18 --image_size 64 --max_train_steps 400 --no_realism --shard "${SHARD:-0/1}"
if [[ -f $R/classify/report.json ]]; then
    python -m eval.tables --classify "$R/classify/report.json" --output_dir "$R/tables"
fi
