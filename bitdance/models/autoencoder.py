"""The autoencoder: a fully convolutional tokenizer that maps images to bits and back.

The architecture is that of WeTok (arXiv 2508.05599); the released model is d16c32. Parameter names are those of the
released files. Options that d16c32 does not use make small tokenizers better: space-to-depth, several bits per latent
channel, also as a Gray code, and a linear transform beside the networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitdance.config import AutoencoderConfig
from bitdance.models.quantizer import quantize

MIN_CHANNELS_LAST = 128
"""Channels from which the convolutions of a CPU are faster in the channels-last memory format; GroupNorm is slower."""


def group_norm(channels: int, affine: bool = True) -> nn.GroupNorm:
    """Returns GroupNorm with 32 groups, or the largest smaller power of two that divides `channels`, and eps 1e-6."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6, affine=affine)


class ResBlock(nn.Module):
    """Residual block of two (GroupNorm, SiLU, 3x3 convolution): (B, c_in, H, W) -> (B, c_out, H, W)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.norm2 = group_norm(c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


def res_blocks(c_in: int, c_out: int, count: int) -> nn.Sequential:
    """Returns `count` residual blocks; the first changes the width."""
    return nn.Sequential(*(ResBlock(c_in if i == 0 else c_out, c_out) for i in range(count)))


class DownLevel(nn.Module):
    """Residual blocks, then a stride-2 convolution except in the last level."""

    def __init__(self, c_in: int, c_out: int, count: int, downsample: bool) -> None:
        super().__init__()
        self.block = res_blocks(c_in, c_out, count)
        if downsample:
            self.downsample = nn.Conv2d(c_out, c_out, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return self.downsample(x) if hasattr(self, "downsample") else x


def successive_approximation(x: Tensor, bit_depths: tuple[int, ...]) -> Tensor:
    """Expands channels into numbers whose signs are their bits, most significant first.

    The first number of a channel is x, clamped to [-1, 1]; number k + 1 is number k minus 2^-(k + 1) times its sign.
    So sum_k 2^-(k + 1) sign_k is x, rounded to one of 2^depth levels. Gradients pass through the signs.

    Args:
        x: (B, c, h, w).
        bit_depths: numbers of each of the c channels.

    Returns:
        (B, sum of `bit_depths`, h, w), channel by channel.
    """
    steps = [x.clamp(-1, 1)]
    for k in range(1, max(bit_depths)):
        steps.append(steps[-1] - quantize(steps[-1]) * 0.5**k)
    return torch.stack([steps[k][:, i] for i, depth in enumerate(bit_depths) for k in range(depth)], dim=1)


def gray_from_binary(bits: Tensor, bit_depths: tuple[int, ...]) -> Tensor:
    """Converts the bits of channels with several levels to a Gray code: (B, C, h, w) +-1, the same shape.

    The first bit of a channel stays, each further one is multiplied by the one before. In binary, the two levels around
    zero, which are the most frequent ones, differ in all bits, so a model has to decide on all of them together. In the
    Gray code they differ in the sign alone.
    """
    parts = bits.split(bit_depths, dim=1)
    return torch.cat([torch.cat([part[:, :1], part[:, 1:] * part[:, :-1]], dim=1) for part in parts], dim=1)


def binary_from_gray(bits: Tensor, bit_depths: tuple[int, ...]) -> Tensor:
    """Inverts `gray_from_binary`."""
    return torch.cat([part.cumprod(dim=1) for part in bits.split(bit_depths, dim=1)], dim=1)


def tokens_from_cells(x: Tensor, split: int) -> Tensor:
    """Splits each cell into split x split tokens: (B, split^2 C, h, w) -> (B, C, split h, split w).

    The first C channels become the token at the top left, the next C the token on its right.
    """
    b, _, h, w = x.shape
    x = x.reshape(b, split, split, -1, h, w).permute(0, 3, 4, 1, 5, 2)  # (B, C, h, split, w, split)
    return x.reshape(b, -1, split * h, split * w)


def cells_from_tokens(x: Tensor, split: int) -> Tensor:
    """Inverts `tokens_from_cells`: (B, C, split h, split w) -> (B, split^2 C, h, w)."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // split, split, w // split, split).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(b, split**2 * c, h // split, w // split)


class Encoder(nn.Module):
    """Maps images (B, 3, H, W) in [-1, 1] to latents (B, C, h, w), whose signs are the bits."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        widths, channels = config.widths, len(config.bit_depths) or config.cell_bits
        self.conv_in = nn.Conv2d(3 * config.space_to_depth**2, widths[0], 3, padding=1, bias=False)
        self.down = nn.ModuleList(
            DownLevel(widths[max(i - 1, 0)], width, config.blocks, downsample=i < len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.mid_block = res_blocks(widths[-1], widths[-1], config.blocks)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], channels, 1)
        if config.linear:
            self.linear = nn.Conv2d(3 * config.cell_size**2, channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        config = self.config
        x = self.conv_in(F.pixel_unshuffle(images, config.space_to_depth))
        for level in self.down:
            x = level(x)
        x = self.conv_out(F.silu(self.norm_out(self.mid_block(x))))
        if config.linear:
            x = x + self.linear(F.pixel_unshuffle(images, config.cell_size))
        if config.bit_depths:
            x = successive_approximation(x, config.bit_depths)
        return tokens_from_cells(x, config.split)


class AdaptiveGroupNorm(nn.Module):
    """GroupNorm with scale and bias predicted from the standard deviation and mean of the bits over the grid.

    scale = gamma(sqrt(unbiased variance + 1e-6)), without adding 1; bias = beta(mean).
    """

    def __init__(self, bits: int, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, affine=False)
        self.gamma = nn.Linear(bits, channels)
        self.beta = nn.Linear(bits, channels)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """Normalizes x (B, c, H, W) with the style of the bits (B, C, h, w)."""
        style = style.flatten(2)  # (B, C, h * w)
        scale = self.gamma((style.var(dim=-1) + 1e-6).sqrt())
        bias = self.beta(style.mean(dim=-1))
        return self.norm(x) * scale[..., None, None] + bias[..., None, None]


class Upsample(nn.Module):
    """3x3 convolution from c to 4c channels, then depth-to-space; the channel axis splits as (2, 2, c)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return tokens_from_cells(self.conv1(x), 2)


class UpLevel(nn.Module):
    """Residual blocks, then an upsampler except in the finest level."""

    def __init__(self, c_in: int, c_out: int, count: int, upsample: bool) -> None:
        super().__init__()
        self.block = res_blocks(c_in, c_out, count)
        if upsample:
            self.upsample = Upsample(c_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class Decoder(nn.Module):
    """Maps bits (B, C, h, w) to images (B, 3, H, W), approximately in [-1, 1], not clamped."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        inputs = (*widths[1:], widths[-1])  # level i reads the output of level i + 1, the last level that of mid_block
        self.conv_in = nn.Conv2d(config.cell_bits, widths[-1], 3, padding=1)
        self.mid_block = res_blocks(widths[-1], widths[-1], config.blocks)
        self.up = nn.ModuleList(
            UpLevel(inputs[i], width, config.blocks, upsample=i > 0) for i, width in enumerate(widths)
        )
        self.adaptive = nn.ModuleList(AdaptiveGroupNorm(config.cell_bits, width) for width in inputs)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3 * config.space_to_depth**2, 3, padding=1)
        if config.linear:
            self.linear = nn.Conv2d(config.cell_bits, 3 * config.cell_size**2, 3, padding=1)

    def forward(self, bits: Tensor) -> Tensor:
        bits = cells_from_tokens(bits, self.config.split)
        x = self.mid_block(self.conv_in(bits))
        for level, adaptive in zip(reversed(self.up), reversed(self.adaptive), strict=True):
            x = level(adaptive(x, bits))
        images = F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.config.space_to_depth)
        return images + F.pixel_shuffle(self.linear(bits), self.config.cell_size) if self.config.linear else images


class Autoencoder(nn.Module):
    """Encodes RGB images (B, 3, H, W) in [-1, 1] to bits (B, C, H / f, W / f) in {-1, +1}, and decodes them.

    f is `config.down_size`; H and W must be multiples of `config.cell_size`, which is f unless cells are split.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, images: Tensor) -> Tensor:
        """Encodes images: (B, 3, H, W) -> (B, C, h, w) +-1; a bit is +1 where the encoder's output is > 0.

        Raises:
            ValueError: H or W is not a multiple of `cell_size`.
        """
        height, width = images.shape[-2:]
        if height % self.config.cell_size or width % self.config.cell_size:
            raise ValueError(
                f"an image of {width}x{height} pixels does not fit the autoencoder: "
                f"both sides must be multiples of {self.config.cell_size}."
            )
        return self._convert(quantize(self.encoder(images)), gray_from_binary)

    def decode(self, bits: Tensor) -> Tensor:
        """Decodes bits: (B, C, h, w) +-1 -> (B, 3, H, W), approximately in [-1, 1], not clamped."""
        return self.decoder(self._convert(bits, binary_from_gray))

    def prepare_for_cpu(self) -> None:
        """Brings the weights into the memory format that is fast on a CPU."""
        if min(self.config.widths) >= MIN_CHANNELS_LAST:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _convert(self, bits: Tensor, convert: Callable[[Tensor, tuple[int, ...]], Tensor]) -> Tensor:
        config = self.config
        if not config.gray_code:
            return bits
        return tokens_from_cells(convert(cells_from_tokens(bits, config.split), config.bit_depths), config.split)


def to_uint8(images: Tensor) -> Tensor:
    """Converts images to bytes: (B, 3, H, W) -> (B, H, W, 3) uint8, clamp(127.5 x + 128, 0, 255) truncated.

    Differs from the original, which rounds in bf16 and so brightens about 39% of the values by one level.
    """
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
