# BitDance for CPUs, or for NVIDIA GPUs with CUDA's build of PyTorch:
#     docker build -t bitdance .
#     docker build -t bitdance:cuda --build-arg INDEX=https://download.pytorch.org/whl/cu128 .
#     docker run --rm -v "$PWD:/work" bitdance sample          # with a GPU: docker run --gpus all ...
# Untested: this image has not been built yet.
FROM python:3.12-slim
ARG INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH=torch==2.13.0
# A C++ compiler for torch.compile.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir --index-url "$INDEX" "$TORCH"
COPY . /source
RUN pip install --no-cache-dir -c /source/constraints.txt "/source[data]" && rm -rf /source
# Files belong to whoever runs the container: docker run --user "$(id -u):$(id -g)" ...
ENV HOME=/tmp
WORKDIR /work
ENTRYPOINT ["bitdance"]
