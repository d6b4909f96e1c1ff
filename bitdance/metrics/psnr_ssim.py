"""PSNR and SSIM of reconstructions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Computes the peak signal-to-noise ratio of each pair of images, in dB.

    Args:
        a, b: (B, H, W, 3) uint8.

    Returns:
        (B,) float64; infinite for equal images.
    """
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255.0**2 / error)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Computes the structural similarity of each pair of images, the mean over the colour channels.

    Wang, Bovik, Sheikh and Simoncelli 2004: an 11 x 11 Gaussian window with sigma 1.5 that lies inside the image,
    population variances, and the constants (0.01 * 255)^2 and (0.03 * 255)^2.

    Args:
        a, b: (B, H, W, 3) uint8, H and W at least 11.

    Returns:
        (B,) float64.
    """
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=a.device) - WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SIGMA**2))
    weights /= weights.sum()

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(x, weights.view(1, 1, -1, 1))
        return F.conv2d(x, weights.view(1, 1, 1, -1))

    x, y = (image.double().permute(0, 3, 1, 2).flatten(0, 1)[:, None] for image in (a, b))  # (3 B, 1, H, W)
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (K1 * 255) ** 2, (K2 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).flatten(1).mean(1).view(-1, 3).mean(1)
