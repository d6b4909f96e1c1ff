"""FLOPs of a training step by formula, and the peak throughput of GPUs, for the model-FLOP utilization.

A multiplication and an addition are two FLOPs. As usual (appendix B of arXiv 2204.02311), only matrix products and
convolutions count, and recomputation by activation checkpointing does not. Attention counts in full, although the mask
hides almost half of it.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from bitdance.models.autoencoder import Autoencoder
from bitdance.models.transformer import BitDance
from bitdance.training.losses import AutoencoderLoss, BitDanceLoss

# FLOP/s without sparsity, from NVIDIA's data sheets. The first name that occurs in the device's name counts.
_PEAK_BF16 = {
    "B200": 2250e12,
    "GB200": 2500e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_bf16(device_name: str) -> float | None:
    """Returns the peak FLOP/s of a GPU in bf16 by its CUDA device name; None if it is not known."""
    return next((peak for name, peak in _PEAK_BF16.items() if re.search(rf"\b{name}\b", device_name)), None)


def step_flops(objective: AutoencoderLoss | BitDanceLoss, images: int, side: int, encodes: bool) -> float:
    """Returns the FLOPs of a training step, forward and backward.

    Args:
        objective: the loss with its network.
        images: images per step.
        side: of the images, in pixels.
        encodes: whether the autoencoder encodes the images of a model in each step; otherwise tokens are cached.
    """
    if isinstance(objective, AutoencoderLoss):
        network = objective.network
        first = 2 * side**2 * _weights(network.encoder.conv_in)
        return float(images * (3 * (encoder_flops(network, side) + decoder_flops(network, side)) - first))
    total = model_flops(objective.network, images, objective.config.diff_batch_mul)
    return total + (images * encoder_flops(objective.autoencoder, side) if encodes else 0.0)


def model_flops(network: BitDance, images: int, copies: int) -> float:
    """Returns the FLOPs of a training step of a model on tokens, with `copies` noisy copies of each token."""
    config = network.config
    tokens, p = config.num_tokens, config.parallel_num
    length = config.cls_token_num + tokens - 1
    # Of the forward pass; the backward pass needs twice as many, except for layers whose input needs no gradient.
    transformer = 2 * length * _weights(network.layers) + 2 * (tokens - p) * _weights(network.proj_in)
    transformer += config.n_layer * 4 * length**2 * config.dim
    net = network.head.net
    rows = copies * tokens
    head = 2 * rows * (_weights(net) - _weights(net.time_embed)) + 2 * (rows // p) * _weights(net.time_embed)
    if p > 1:
        head += config.head_layers * 4 * p * rows * config.head_dim
    first = 2 * (tokens - p) * _weights(network.proj_in.w1) + 2 * rows * _weights(net.input_proj)
    first += 2 * (rows // p) * _weights(net.time_embed.mlp[0])
    return float(images * (3 * (transformer + head) - first))


def encoder_flops(network: Autoencoder, side: int) -> int:
    """Returns the FLOPs of encoding one image of side x side pixels."""
    encoder = network.encoder
    total = side**2 * _weights(encoder.conv_in)
    for level in encoder.down:
        total += side**2 * _weights(level.block)
        if hasattr(level, "downsample"):
            side //= 2
            total += side**2 * _weights(level.downsample)
    return 2 * (total + side**2 * (_weights(encoder.mid_block) + _weights(encoder.conv_out)))


def decoder_flops(network: Autoencoder, side: int) -> int:
    """Returns the FLOPs of decoding one image of side x side pixels."""
    decoder = network.decoder
    side //= network.config.down_size
    total = side**2 * (_weights(decoder.conv_in) + _weights(decoder.mid_block)) + _weights(decoder.adaptive)
    for level in reversed(decoder.up):
        total += side**2 * _weights(level.block)
        if hasattr(level, "upsample"):
            total += side**2 * _weights(level.upsample)
            side *= 2
    return 2 * (total + side**2 * _weights(decoder.conv_out))


def _weights(module: nn.Module | torch.Tensor) -> int:
    """Returns the number of weights of linear layers and convolutions, without biases."""
    assert isinstance(module, nn.Module)
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d))
