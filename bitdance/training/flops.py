"""FLOPs of a training step, and the peak throughput of GPUs, for the model-FLOP utilization.

A multiplication and an addition are two FLOPs. As usual (appendix B of arXiv 2204.02311), only matrix products and
convolutions count, and recomputation by activation checkpointing does not. Attention counts in full, although the mask
hides almost half of it. The network of a perceptual loss is left out.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bitdance.models.autoencoder import Autoencoder
from bitdance.models.transformer import BitDance
from bitdance.training.losses import AutoencoderLoss, BitDanceLoss
from bitdance.training.train_config import LossConfig

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
    """Returns the FLOPs of a training step, forward and backward, counted in a step with fake tensors.

    Args:
        objective: the loss with its network.
        images: images per step.
        side: of the images, in pixels.
        encodes: whether the autoencoder encodes the images of a model in each step; otherwise tokens are cached.
    """
    shape: tuple[int, ...] = (side, side, 3)
    if isinstance(objective, AutoencoderLoss):
        return float(images * _image_flops(shape, objective.config, objective.network.config))
    config = objective.network.config
    shape = shape if encodes else (config.num_tokens, config.bits // 8)
    return float(images * _image_flops(shape, objective.config, config, objective.autoencoder.config))


@functools.lru_cache
def _image_flops(shape: tuple[int, ...], loss: Any, *networks: Any) -> int:
    """Counts the FLOPs of an input of this shape; the loss and its networks are given by their configurations."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        objective: nn.Module
        if isinstance(loss, LossConfig):
            model, autoencoder = networks
            objective = BitDanceLoss(BitDance(model), Autoencoder(autoencoder), loss, seed=0)
        else:
            autoencoder = Autoencoder(*networks)
            autoencoder.encoder.requires_grad_(not loss.decoder_only)
            objective = AutoencoderLoss(autoencoder, loss)
        index = torch.zeros(1, dtype=torch.int64)
        objective(torch.empty((1, *shape), dtype=torch.uint8), index, index, 0)[0].backward()
    return counter.get_total_flops()
