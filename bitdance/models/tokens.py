"""Token order, attention mask and input perturbation.

B is the batch size, C bits per token, (h, w) the token grid, N = h * w, P tokens per step, K class tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def tokens_from_grid(bits: Tensor, patch: int = 1) -> Tensor:
    """Flattens a grid of tokens: patches in raster order, and tokens in raster order inside each patch.

    Args:
        bits: (B, C, h, w); h and w are multiples of `patch`.
        patch: side of a patch in tokens, `BitDanceConfig.patch`; 1 is plain raster order.

    Returns:
        (B, N, C), the values of `bits` unchanged.
    """
    b, c, h, w = bits.shape
    grid = bits.reshape(b, c, h // patch, patch, w // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(b, h * w, c)


def grid_from_tokens(tokens: Tensor, patch: int = 1) -> Tensor:
    """Inverts `tokens_from_grid` for a square grid: (B, N, C) -> (B, C, h, w) with h = w = sqrt(N)."""
    b, n, c = tokens.shape
    side = round(n**0.5)
    assert side * side == n, f"{n} tokens are not a square grid"
    grid = tokens.reshape(b, side // patch, side // patch, patch, patch, c)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(b, c, side, side)


def positions(side: int, patch: int = 1) -> Tensor:
    """Returns row and column of each token of a side x side grid, in token order: (N, 2) int64."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return tokens_from_grid(torch.stack([rows, columns])[None], patch)[0]  # (2, h, w) -> (N, 2)


def attention_blocks(num_causal: int, num_tokens: int, parallel_num: int) -> Tensor:
    """Returns the block of each position, (num_causal + num_tokens,) int64; it attends to its own and earlier blocks.

    The first `num_causal` (K - 1) positions are blocks of their own, that is, causal. After them each P positions are
    a block. With P = 1 this is causal attention.
    """
    return torch.cat([torch.arange(num_causal), num_causal + torch.arange(num_tokens) // parallel_num])


def flip_bits(bits: Tensor, rate: float, r1: Tensor, r2: Tensor) -> Tensor:
    """Flips each bit where r1 < rate * r2, which is a fraction rate / 2 of the bits on average.

    In training this perturbs the input of the transformer, never the target.

    Args:
        bits: any shape, +-1.
        rate: in [0, 1].
        r1, r2: uniform on [0, 1), of the shape of `bits`.
    """
    return torch.where(r1 < rate * r2, -bits, bits)
