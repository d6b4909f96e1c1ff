#!/usr/bin/env bash
# Everything that wants an NVIDIA GPU, in one go: tests, benchmarks, a short sampling job. Results go to the folder given.
#     bash benchmarks/gpu.sh RESULTS
# Needs PyTorch with CUDA, pytest, safetensors, tqdm, Pillow and NumPy; nothing is installed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=${1:?name a folder for the results}
mkdir -p "$results"
export PYTHONPATH=$PWD

step() {  # step NAME SECONDS COMMAND...: a step that fails or hangs does not keep the others from running
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
    step "sampling-$model" 300 python benchmarks/sampling.py --model "$model" --batch-size 384 --steps 100 --rounds 2 \
        --precision bf16 --chunk 64 --compile --device cuda
done
step sampling-B-1X 400 python benchmarks/sampling.py --model B-1X --batch-size 384 --steps 100 --rounds 1 \
    --precision bf16 --chunk 64 --compile --device cuda
step sampling-fp32 200 python benchmarks/sampling.py --model B-16X --batch-size 64 --steps 100 --rounds 1 --reference --device cuda
step inception 120 python benchmarks/inception.py --batch 64 --device cuda
step stored-bits 200 python benchmarks/stored_bits.py --batch-size 32 --device cuda
