"""The order of the tokens: grid of bits <-> sequence, who may see whom, and flipped bits.

Symbols as everywhere: B batch, C bits per token, (h, w) token grid, N = h*w tokens, P tokens per step, K class tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def tokens_from_grid(bits: Tensor, patch: int = 1) -> Tensor:
    """Lays a grid of tokens out as a sequence: patches in raster order, tokens in raster order inside a patch.

    Args:
        bits: (B, C, h, w); h and w are multiples of `patch`.
        patch: side of a patch in tokens, sqrt(P) in the released models with P > 1; 1 is plain raster order.

    Returns:
        (B, N, C), the values of `bits` unchanged.
    """
    b, c, h, w = bits.shape
    grid = bits.reshape(b, c, h // patch, patch, w // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(b, h * w, c)


def grid_from_tokens(tokens: Tensor, patch: int = 1) -> Tensor:
    """The inverse of `tokens_from_grid` for a square grid: (B, N, C) -> (B, C, h, w) with h = w = sqrt(N)."""
    b, n, c = tokens.shape
    side = round(n**0.5)
    assert side * side == n, f"{n} tokens are not a square grid"
    grid = tokens.reshape(b, side // patch, side // patch, patch, patch, c)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(b, c, side, side)


def positions(side: int, patch: int = 1) -> Tensor:
    """Row and column of every token of a side x side grid, in token order: (N, 2) int64."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return tokens_from_grid(torch.stack([rows, columns])[None], patch)[0]  # (2, h, w) -> (N, 2)


def block_causal_mask(num_causal: int, num_tokens: int, parallel_num: int) -> Tensor:
    """Which position may see which: (L, L) bool [query, key], L = num_causal + num_tokens.

    The first `num_causal` (K - 1) positions are causal; from there on blocks of P positions see each other
    and everything before them. With P = 1 this is the plain causal mask.
    """
    causal = torch.arange(num_causal)
    block = num_causal + torch.arange(num_tokens) // parallel_num
    order = torch.cat([causal, block])
    return order[:, None] >= order[None, :]


def flip_bits(bits: Tensor, rate: float, r1: Tensor, r2: Tensor) -> Tensor:
    """Flips each bit where r1 < rate * r2: a share rate/2 of them on average.

    This perturbs what the transformer reads in training, never the target (the paper's input perturbation).

    Args:
        bits: any shape, +-1.
        rate: 0 to 1.
        r1, r2: uniform on [0, 1), shaped like `bits`.
    """
    return torch.where(r1 < rate * r2, -bits, bits)
