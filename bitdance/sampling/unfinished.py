"""Images of which some tokens are missing: these parts are grey."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitdance.models.tokens import grid_from_tokens
from bitdance.sampling.pipeline import Pipeline

GREY = 128


def hide_tokens(pixels: np.ndarray, known: Tensor, patch: int) -> np.ndarray:
    """Returns images (B, H, W, 3) uint8 with grey in place of the tokens that are not `known`.

    Args:
        pixels: (B, H, W, 3) uint8.
        known: (N,) bool, in the model's order of tokens.
        patch: side of the model's patches in tokens.
    """
    cells = grid_from_tokens(known[None, :, None], patch)[0, 0].cpu().numpy()  # (h, w)
    side = pixels.shape[1] // len(cells)
    return np.where(cells.repeat(side, 0).repeat(side, 1)[:, :, None], pixels, GREY).astype(np.uint8)


def decode_unfinished(pipeline: Pipeline, tokens: Tensor) -> np.ndarray:
    """Decodes the tokens (B, n, C) that a step callback gets to images (B, H, W, 3) uint8; what is missing is grey."""
    config, count = pipeline.model.config, tokens.shape[1]
    filled = F.pad(tokens, (0, 0, 0, config.num_tokens - count))  # zeros, between -1 and +1
    pixels = pipeline.decode_tokens(filled, pipeline.defaults.chunk_size).cpu().numpy()
    return hide_tokens(pixels, torch.arange(config.num_tokens) < count, config.patch)
