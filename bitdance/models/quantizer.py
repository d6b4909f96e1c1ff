"""Binary quantizer: signs, packed bits and the entropy loss.

Lookup-free quantization in groups of 8 bits (WeTok, arXiv 2508.05599): a token is the sign of the encoder's output.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 8
"""Bits per group; the 256 sign vectors of a group are the codebook of the entropy loss."""

TEMPERATURE, EPS = 0.01, 1e-5
"""Of the softmax of the entropy loss, and what is added inside its logarithms."""


def quantize(x: Tensor) -> Tensor:
    """Returns +1 where x > 0, else -1, with the dtype and shape of x."""
    return torch.where(x > 0, 1.0, -1.0).to(x.dtype)


def straight_through(x: Tensor) -> Tensor:
    """Quantizes in the forward pass and passes gradients through unchanged."""
    return x + (quantize(x) - x).detach()


def pack(bits: Tensor) -> Tensor:
    """Packs bits: (..., C) +-1 -> (..., C / 8) uint8; bit j of byte g is bit 8 g + j of the token."""
    groups = bits.unflatten(-1, (-1, GROUP)) > 0
    weights = 2 ** torch.arange(GROUP, device=bits.device)
    return (groups * weights).sum(dim=-1).to(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """Inverts `pack`: (..., C / 8) uint8 -> (..., C) +-1 float32."""
    shifts = torch.arange(GROUP, device=packed.device, dtype=torch.uint8)
    ones = (packed[..., None] >> shifts) & 1
    return (ones.float() * 2 - 1).flatten(-2)


class EntropyLoss(NamedTuple):
    """Terms of the entropy loss, scalars; `total` is minimized."""

    total: Tensor
    per_sample: Tensor
    codebook: Tensor


def entropy_loss(x: Tensor) -> EntropyLoss:
    """Computes the mean entropy per sample minus the entropy of the mean code distribution.

    The code distribution of a group is softmax(2 x . codebook / 0.01) over its 256 sign vectors. The mean is
    taken over all samples and groups.

    Args:
        x: (B, C, h, w) encoder output before the sign; C is a multiple of 8.
    """
    b, c, h, w = x.shape
    groups = x.float().reshape(b, c // GROUP, GROUP, h * w).permute(0, 3, 1, 2).reshape(-1, GROUP)
    codebook = unpack(torch.arange(2**GROUP, dtype=torch.uint8, device=x.device)[:, None])  # (256, 8)
    with torch.autocast(x.device.type, enabled=False):  # at this temperature bf16 products would be noise
        logits = 2 * groups @ codebook.T / TEMPERATURE  # (samples * groups, 256)
    p = logits.softmax(dim=-1)
    per_sample = -(p * (logits + EPS).log_softmax(dim=-1)).sum(dim=-1).mean()
    mean = p.mean(dim=0)
    codebook_entropy = -(mean * (mean + EPS).log()).sum()
    return EntropyLoss(per_sample - codebook_entropy, per_sample, codebook_entropy)
