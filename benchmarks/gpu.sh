#!/usr/bin/env bash
# Runs the tests and benchmarks for an NVIDIA GPU, writes their output to a folder and prints one table.
#     bash benchmarks/gpu.sh FOLDER
# COMPARE=FILE measures another implementation beside ours, as --compare of speed.py. Most of the time goes into compilation.
# Needs an environment with bitdance's dependencies, pytest and hypothesis; nothing is installed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=${1:?give a folder for the results}
mkdir -p "$results"
export PYTHONPATH=$PWD
compare=(${COMPARE:+--compare "$COMPARE"})

step() {  # step NAME SECONDS COMMAND...: continues after a failure or time-out
    local name=$1 seconds=$2
    shift 2
    echo "== $name"
    timeout "$seconds" "$@" >"$results/$name.log" 2>&1
    echo "   exit status $?"
    tail -n 2 "$results/$name.log" | cut -c1-400
}

nvidia-smi >"$results/gpu.txt"
python -c "import torch; print(torch.__version__, torch.version.cuda)" >>"$results/gpu.txt"
step tests 300 python -m pytest -q -m gpu
for model in B-16X B-4X; do
    step "sampling-$model" 300 python benchmarks/speed.py --model "$model" --batch-size 384 --rounds 2 \
        --precision bf16 --chunk-size 64 --compile reduce-overhead --device cuda "${compare[@]}"
done
step sampling-B-1X 400 python benchmarks/speed.py --model B-1X --batch-size 384 --rounds 1 \
    --precision bf16 --chunk-size 64 --compile reduce-overhead --device cuda "${compare[@]}"
step sampling-fp32 200 python benchmarks/speed.py --model B-16X --precision fp32 --batch-size 64 --rounds 1 --reference \
    --parts tokens --device cuda
for pair in L-1X:352 H-1X:224; do  # the published batch sizes, one solver step in ten
    step "sampling-${pair%:*}" 400 python benchmarks/speed.py --model "${pair%:*}" --batch-size "${pair#*:}" --num-steps 10 \
        --rounds 1 --precision bf16 --chunk-size 64 --compile reduce-overhead --device cuda "${compare[@]}"
    step "memory-${pair%:*}" 60 python -m bitdance sample --model "BitDance-${pair%:*}" --batch-size "${pair#*:}" --dry-run
done
step training-B-4X-96 300 python benchmarks/speed.py --model B-4X --batch-size 96 --parts train-tokens --compile default --device cuda "${compare[@]}"
step training 300 python benchmarks/speed.py --model B-16X --batch-size 32 --parts train-tokens train-images --compile default --device cuda "${compare[@]}"
step inception 120 python benchmarks/inception.py --batch-size 64 --device cuda
step token-cache 200 python benchmarks/token_cache.py --batch-size 32 --device cuda
echo "== table for docs/performance.md: $results/table.md"
python benchmarks/table.py "$results"/sampling-*.log "$results"/training*.log | tee "$results/table.md"
