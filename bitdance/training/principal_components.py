"""Initialization of an autoencoder's linear transform with principal components.

Training then starts from transform coding: components of blocks of pixels, each quantized uniformly to the bits that
`AutoencoderConfig.bit_depths` gives it, and learns from there what a linear transform cannot do. Components are sorted
by variance, so the first of the `bit_depths` should be the largest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bitdance.models.autoencoder import Autoencoder

RANGES = torch.linspace(1, 6, 51, dtype=torch.float64)
"""Ranges of a uniform quantizer that are tried, in standard deviations."""


@torch.no_grad()
def initialize_linear(network: Autoencoder, images: Tensor) -> None:
    """Sets the linear transforms to principal components of the images, and the outputs of the networks to 0.

    Args:
        network: an autoencoder whose configuration has `linear`.
        images: (N, 3, H, W) in [-1, 1], some thousands.
    """
    config = network.config
    depths = config.bit_depths or (1,) * config.cell_bits
    blocks = F.pixel_unshuffle(images, config.cell_size).movedim(1, -1).flatten(0, -2).double()  # (blocks, 3 cell^2)
    mean = blocks.mean(0)
    vectors = torch.linalg.eigh(torch.cov(blocks.T)).eigenvectors.flip(1)[:, : len(depths)]  # (3 cell^2, channels)
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()  # eigh leaves the sign open
    coefficients = (blocks - mean) @ vectors  # (blocks, channels)
    ranges = torch.stack([_best_range(coefficients[:, i], depth) for i, depth in enumerate(depths)])
    # Bit k of a channel is worth 2^-(k + 1) of its range.
    values = torch.cat([torch.eye(len(ranges), dtype=torch.float64)[i : i + 1] * ranges[i] * 0.5 ** (k + 1)
                        for i, depth in enumerate(depths) for k in range(depth)])  # (bits, channels)  # fmt: skip
    encoder, decoder = network.encoder, network.decoder
    for conv, weight, bias in (
        (encoder.linear, (vectors / ranges).T, -(mean @ vectors) / ranges),
        (decoder.linear, vectors @ values.T, mean),
    ):
        assert conv.bias is not None
        conv.weight.zero_()[:, :, 1, 1] = weight
        conv.bias.copy_(bias)
    for parameter in (*encoder.conv_out.parameters(), *decoder.conv_out.parameters()):
        parameter.zero_()


def _best_range(x: Tensor, depth: int) -> Tensor:
    """Returns the r for which uniform quantization of x (N,) to 2^depth levels in [-r, r] has the least error."""
    ranges = RANGES * x.std().clamp_min(1e-6)
    half = 2 ** (depth - 1)

    def error(r: Tensor) -> Tensor:
        level = (x / r * half).floor().clamp(-half, half - 1)
        return (x - (level + 0.5) * r / half).square().mean()

    return ranges[torch.stack([error(r) for r in ranges]).argmin()]
