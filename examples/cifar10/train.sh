#!/usr/bin/env bash
# Trains everything of the CIFAR-10 example: autoencoder, token cache, and models for 1, 4 and 16 tokens a step.
#     bash examples/cifar10/train.sh cifar10_train.zip cifar10_test.zip [FOLDER]
# FOLDER is runs/cifar10 by default. Each part continues where it was interrupted, and finished ones are not repeated.
# TRIAL=1 takes 20 steps of each training, in FOLDER/trial, to see that all parts run.
# About 14 hours on one thread of a quiet CPU with bf16 instructions, over 20 beside other work; THREADS=4 uses more.
# PARALLEL_NUMS=16 trains one model.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: bash $0 cifar10_train.zip cifar10_test.zip [FOLDER]" >&2
    exit 2
fi
images=$1 held_out=$2 folder=${3:-runs/cifar10}
threads=${THREADS:-1}
export OMP_NUM_THREADS=$threads
few=()
[ -z "${TRIAL:-}" ] || few=(--max-steps 20) folder=$folder/trial
run() {
    echo "== $*"
    "$@"
}

# 8 x 8 tokens of 16 bits, of 4 x 4 cells with 64 bits each: the model sees finer steps than with 4 x 4 tokens.
autoencoder=(bitdance train-autoencoder --recipe small --bits 16 --split 2 --data-path "$images" --val-path "$held_out"
    --val-every 390 --precision bf16 --threads "$threads" ${few[@]+"${few[@]}"})
run "${autoencoder[@]}" --output "$folder/encoder"
run "${autoencoder[@]}" --output "$folder/autoencoder" --init-from "$folder/encoder" --decoder-only --epochs 9 --lr 3e-4 \
    --warmup-steps 50 --decay-start 50 --perceptual-weight 0.01 --adversarial-weight 0.002 --adversarial-ramp 500 \
    --discriminator-width 32 --discriminator-layers 2
run bitdance convert "$folder/autoencoder/autoencoder.safetensors" "$folder/autoencoder.safetensors" --dtype float16
run bitdance encode --data-path "$images" --autoencoder "$folder/autoencoder.safetensors" --image-size 32 \
    --output "$folder/tokens" --precision fp32 --threads "$threads"

for p in ${PARALLEL_NUMS:-4 1 16}; do
    # The mean of the few guidance scales is smaller with 16 tokens at once.
    scale=$((p < 16 ? 24 : 48))
    run bitdance train --data-path "$folder/tokens" --autoencoder "$folder/autoencoder.safetensors" --image-size 32 \
        --output "$folder/model-${p}x" --parallel-num "$p" --dim 128 --n-layer 6 --head-dim 128 --head-layers 6 \
        --head-ada-ln 1 --cls-token-num 4 --epochs 35 --batch-size 64 --optimizer muon --lr 4e-3 --min-lr 4e-5 \
        --warmup-steps 200 --decay-start 200 --ema 0.999 --perturb-rate 0.1 --diff-batch-mul 2 --precision bf16 \
        --threads "$threads" --num-workers 1 --save-minutes 5 --save-every 0 --preview-every 2000 ${few[@]+"${few[@]}"}
    # Larger scales hardly lower the Fréchet distance, see docs/demo-model.md.
    run bitdance convert "$folder/model-${p}x/model.safetensors" "$folder/model-${p}x.safetensors" --dtype int8 --cfg-scale "$scale"
done
