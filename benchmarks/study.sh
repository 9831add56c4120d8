#!/usr/bin/env bash
# The evidence on the phantom: does it help, against what, and how surely? Every arm, three generators and five of two
# arms, five classifier seeds; then how much it depends on the numbers of synthetic and real images, and on what the
# generator was trained on. A day on 2 cores. Any command that was interrupted goes on where it was; run it again.
#
#   bash benchmarks/study.sh                         # → runs/study/classify/*.json and runs/study/tables
#   bash benchmarks/study.sh runs/another
#   SHARD=1/2 bash benchmarks/study.sh               # a second process takes its half of the classifiers (the other: 0/2)
#
# Start a second process once all images are drawn: what comes before the classifiers is for one process.
#
# 24 training images of each rare class, 2,400 test images. The share of synthetic images (nine in ten) and their number
# were chosen on the quickstart's data, which are others; how much emphasis, on these.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly R=${1:-runs/study}
bash setup.sh
PATH="$PWD/.venv/bin:$PATH"

python -m data.prepare phantom --output_dir "$R/data" --preset study --count 1200 --seed 5
python -m data.prepare phantom --output_dir "$R/extra" --preset balanced --count 2000 --seed 6

train() { # train STAGE DATA BASE OUTPUT SEED FLAGS...
    bash "$1.sh" --config "configs/$1-tiny.yaml" --data_dir "$R/$2" --pretrained_model "$3" --output_dir "$R/$4" \
        --cache_dir "$R/cache" --max_train_steps 1000 --seed "$5" "${@:6}"
}
generate() { # generate MODEL DATA IMAGES OUTPUT SEED FLAGS...: so many images of each class
    python generation.py --model "$R/$1" --data_dir "$R/$2" --count "benign=$3,PTC=$3,FTC=$3,MTC=$3" \
        --output_dir "$R/$4" --steps 6 --scheduler dpmsolver++ --guidance_scale 2 --batch_size 25 --seed "$5" "${@:6}"
}

sets=()
for seed in 0 1 2 3 4; do
    train pretrain data assets/tiny-base "coarse$seed" "$seed"
    train finetune data "$R/coarse$seed" "fine$seed" "$seed"
    # Stable Diffusion with one ControlNet, of the mask, which reads the words on the lesion: no second encoder, no fusion,
    # no term weights. Trained by the same losses as Tiger-F, so that the lesion weighs as much as the rest together.
    train finetune data "$R/coarse$seed" "controlnet$seed" "$seed" \
        --term_weighting off --fusion sum --bg_dropout 0.999 --fg_dropout 0
    # What if the rare classes' prompts name more often what sets them apart? The same prompts of the others.
    generate "fine$seed" data 400 "emphasised$seed" "$seed" --emphasis 0.5
    generate "controlnet$seed" data 400 "sd_controlnet$seed" "$seed" --branches fg
    sets+=("emphasised_$seed=$R/emphasised$seed" "sd_controlnet_$seed=$R/sd_controlnet$seed")
done
for seed in 0 1 2; do # the other arms
    generate "fine$seed" data 400 "tiger_f$seed" "$seed"
    generate "fine$seed" data 400 "tiger_n$seed" "$seed" --prompts names
    generate "fine$seed" data 400 "coarse_images$seed" "$seed" --fg_scale 0 --bg_scale 0 # the coarse U-Net alone
    # What would drawing exactly what Tiger-F was asked for give?
    python -m benchmarks.ceiling requests --fake "$R/tiger_f$seed" --output_dir "$R/perfect$seed" --seed "$seed"
    # What if the knowledge base's frequencies were wrong by up to 30 %?
    python -m benchmarks.perturb --by 0.3 --seed "$seed" "$R/thyroid-$seed.yaml"
    generate "fine$seed" data 400 "perturbed$seed" "$seed" --knowledge "$R/thyroid-$seed.yaml"
    generate "controlnet$seed" data 400 "sd_emphasised$seed" "$seed" --branches fg --emphasis 0.5
    generate "fine$seed" data 400 "coarse_emphasised$seed" "$seed" --fg_scale 0 --bg_scale 0 --emphasis 0.5
    python -m benchmarks.ceiling requests --fake "$R/emphasised$seed" --output_dir "$R/perfect_emphasised$seed" --seed "$seed"
    generate "fine$seed" data 400 "perturbed_emphasised$seed" "$seed" --knowledge "$R/thyroid-$seed.yaml" --emphasis 0.5
    for arm in tiger_f tiger_n perfect perturbed sd_emphasised coarse_emphasised perfect_emphasised perturbed_emphasised; do
        sets+=("${arm}_$seed=$R/$arm$seed")
    done
    sets+=("coarse_$seed=$R/coarse_images$seed")
done
# And what does the autoencoder cost?
python -m benchmarks.ceiling decoder --real "$R/extra" --model assets/tiny-base --count 400 --output_dir "$R/decoded"
sets+=("decoded=$R/decoded")

# Few shots: a generator that has seen 20 images of each class, and nothing else of this data set.
python -m data.prepare subsample --data_dir "$R/data" --most benign=20 PTC=20 FTC=20 MTC=20 --name few
train pretrain data/few.jsonl assets/tiny-base few_coarse 0
train finetune data/few.jsonl "$R/few_coarse" few_fine 0
generate few_fine data/few.jsonl 400 few_images 0
sets+=("few_shot=$R/few_images")

generate fine0 data 800 many 0 # for the sweep over amounts
generate fine0 data 1600 more_emphasised0 0 --emphasis 0.5
sets+=("more_emphasised_0=$R/more_emphasised0")

classify() { # classify OUTPUT FLAGS...
    python -m eval.classify --real "$R/data" --output "$R/$1" --share 0.9 --model resnet18 --image_size 64 \
        --max_train_steps 400 --shard "${SHARD:-0/1}" "${@:2}"
}
classify classify/report.json --fake "${sets[@]}" --extra_real "$R/extra" --seeds 0,1,2,3,4 \
    --arms none oversampling basic mixup cutmix erasing features "${sets[@]%%=*}" real_upper
# The base has seen these images of the common classes. What does oversampling give that has them too? Its arm is called
# real_upper where it is made, real_common beside the others.
python -m data.prepare phantom --output_dir "$R/common" --preset common --count 16000 --seed 11 # as assets/build.sh
classify real_common/report.json --seeds 0,1,2,3,4 --extra_real "$R/common" --arms real_upper --no_realism
classify classify/real_share.json --fake "tiger_f_0=$R/tiger_f0" --seeds 0,1,2 \
    --extra_real "$R/extra" --arms none oversampling tiger_f_0 real_upper --real_share 0.5,1 --no_realism
classify amounts/report.json --fake "tiger_f=$R/many" --seeds 0,1,2 \
    --arms oversampling tiger_f --amounts 100,400,800 --no_realism

if [[ -f $R/classify/report.json && -f $R/real_common/report.json ]]; then
    { cat "$R/classify/report_scores.csv"; sed -n 's/^real_upper,/real_common,/p' "$R/real_common/report_scores.csv"; } \
        > "$R/scores.csv"
    python -m benchmarks.generators --scores "$R/scores.csv" --output "$R/generators.json" \
        --against none oversampling sd_controlnet --chart "$R/study.png"
    # The differences that the aims are about, as a family of their own. The aims were set before the study; that they
    # make a family was decided after its first results, so give both p.
    for arm in tiger_f emphasised; do
        python -m benchmarks.generators --scores "$R/scores.csv" --output "$R/aims_$arm.json" \
            --arms "$arm" --against none oversampling sd_controlnet --margins 0.1 0.03 0.02
    done
fi
for report in classify/report real_common/report classify/real_share amounts/report; do
    if [[ -f $R/$report.json ]]; then
        python -m eval.tables --classify "$R/$report.json" --output_dir "$R/tables/${report//\//_}"
    fi
done
