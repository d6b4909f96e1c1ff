"""Perceptual loss: distance between images in the activations of a classifier (Zhang et al. 2018, LPIPS).

Two networks serve: VGG-16 with the learned channel weights of LPIPS, two files to be downloaded, and EfficientNet-Lite0
with equal weights, whose file a Python package holds.
"""

from __future__ import annotations

import pathlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitdance.metrics.efficientnet_lite import EfficientNetLite, load_network
from bitdance.runtime.atomic_files import file_digest
from bitdance.runtime.errors import UserError
from bitdance.training.train_config import PerceptualNetwork
from bitdance.weights import weights_file
from bitdance.weights.hub import PLAIN_FILES

VGG_CHANNELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Output channels of the convolutions of VGG-16 before each max pool."""
MIN_SIDE = 64
"""Smaller images are enlarged to this side: the strides of the classifiers are made for larger ones."""


class VGG16(nn.Module):
    """The convolutions of VGG-16 (Simonyan and Zisserman 2014), with the parameter names of torchvision's weights."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for i, group in enumerate(VGG_CHANNELS):
            if i:
                layers.append(nn.MaxPool2d(2))
            for width in group:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1), persistent=False)

    def stages(self, x: Tensor) -> list[Tensor]:
        """Returns the activations before each max pool and at the end, for images (N, 3, H, W) in [-1, 1]."""
        x = ((x + 1) / 2 - self.mean) / self.std
        outputs = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                outputs.append(x)
            x = layer(x)
        return [*outputs, x]


class PerceptualLoss:
    """Mean over images of the sum over stages of the squared distance of unit-length activations.

    Args:
        network: its method `stages` maps images (N, 3, H, W) in [-1, 1] to a list of activations (N, c, h, w).
        weights: of the channels of each stage, (c,); by default 1, so that a stage is at most 4.
    """

    def __init__(self, network: VGG16 | EfficientNetLite, weights: list[Tensor] | None = None) -> None:
        self.network, self.weights = network, weights

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the distance between images x and y, (N, 3, H, W) in [-1, 1], as a scalar."""
        # The layout in which depthwise convolutions are fast on CPUs, and all convolutions on GPUs.
        x, y = (image.contiguous(memory_format=torch.channels_last) for image in (x, y))
        side = min(x.shape[-2:])
        if side < MIN_SIDE:
            x, y = (F.interpolate(image, scale_factor=MIN_SIDE / side, mode="bilinear") for image in (x, y))
        with torch.no_grad():
            targets = [F.normalize(stage.float(), dim=1) for stage in self.network.stages(y)]
        total = x.new_zeros(())
        for i, (stage, target) in enumerate(zip(self.network.stages(x), targets, strict=True)):
            squared = (F.normalize(stage.float(), dim=1) - target).square()
            if self.weights is not None:
                squared = squared * self.weights[i][:, None, None]
            total = total + squared.sum(dim=1).mean()
        return total


def load_perceptual_loss(name: PerceptualNetwork, folder: pathlib.Path, device: torch.device) -> PerceptualLoss:
    """Returns the perceptual loss of a network; `folder` holds the two files that `bitdance download lpips` writes.

    Raises:
        UserError: a file or the package with the weights is missing, or a file is not the published one.
    """
    if name == "efficientnet-lite0":
        return PerceptualLoss(load_network().to(device, memory_format=torch.channels_last))  # type: ignore[call-overload]
    vgg, lpips = (_read_published(key, folder) for key in ("vgg16", "lpips-vgg"))
    network = VGG16().requires_grad_(False)
    network.load_state_dict({key: value for key, value in vgg.items() if key.startswith("features.")})
    weights = [lpips[f"lin{i}.model.1.weight"].flatten().to(device) for i in range(len(VGG_CHANNELS))]
    return PerceptualLoss(network.to(device, memory_format=torch.channels_last), weights)  # type: ignore[call-overload]


def _read_published(key: str, folder: pathlib.Path) -> dict[str, Tensor]:
    """Reads weights whose SHA-256 must be the published one, so that their contents need no check."""
    path = folder / PLAIN_FILES[key].file
    if not path.is_file():
        raise UserError(f"there is no {path}: run `bitdance download lpips`, or name its folder in `lpips_folder`.")
    if file_digest(path) != PLAIN_FILES[key].sha256:
        raise UserError(f"{path} is damaged or another file: remove it and run `bitdance download lpips`.")
    return weights_file.read(path).states["model"]
