"""Perceptual loss: distance between images in the activations of a classifier (Zhang et al. 2018, LPIPS).

Two networks serve: VGG-16 with the learned channel weights of LPIPS, if their files are given, and EfficientNet-Lite0
with equal weights, whose file a Python package holds.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitdance.metrics.efficientnet_lite import load_network
from bitdance.runtime.errors import UserError
from bitdance.weights import weights_file

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
            layers += [nn.MaxPool2d(2)] if i else []
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
        stages: maps images (N, 3, H, W) in [-1, 1] to a list of activations (N, c, h, w).
        weights: of the channels of each stage, (c,); by default 1, so that a stage is at most 4.
    """

    def __init__(self, stages: Callable[[Tensor], list[Tensor]], weights: list[Tensor] | None = None) -> None:
        self.stages, self.weights = stages, weights

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the distance between images x and y, (N, 3, H, W) in [-1, 1], as a scalar."""
        side = min(x.shape[-2:])
        if side < MIN_SIDE:
            x, y = (F.interpolate(image, scale_factor=MIN_SIDE / side, mode="bilinear") for image in (x, y))
        with torch.no_grad():
            targets = [F.normalize(stage.float(), dim=1) for stage in self.stages(y)]
        total = x.new_zeros(())
        for i, (stage, target) in enumerate(zip(self.stages(x), targets, strict=True)):
            squared = (F.normalize(stage.float(), dim=1) - target).square()
            if self.weights is not None:
                squared = squared * self.weights[i][:, None, None]
            total = total + squared.sum(dim=1).mean()
        return total


def load_perceptual_loss(vgg: pathlib.Path | None, lpips: pathlib.Path | None, device: torch.device) -> PerceptualLoss:
    """Returns LPIPS if both files are given, else the loss with EfficientNet-Lite0.

    Args:
        vgg: torchvision's weights of VGG-16, `vgg16-397923af.pth`.
        lpips: the channel weights of LPIPS for VGG, version 0.1, `vgg.pth`.
        device: of the network.

    Raises:
        UserError: a file is missing, damaged, or holds something else.
    """
    if (vgg is None) != (lpips is None):
        raise UserError("`vgg_weights` and `lpips_weights` belong together: give both, or none for EfficientNet-Lite0.")
    if vgg is None or lpips is None:
        return PerceptualLoss(load_network().to(device).stages)
    network = VGG16()
    state = weights_file.read(vgg).states.get("model", {})
    _load(network, {name: value for name, value in state.items() if name.startswith("features.")}, vgg)
    state = weights_file.read(lpips).states.get("model", {})
    names = [f"lin{i}.model.1.weight" for i in range(len(VGG_CHANNELS))]
    shapes = [(1, group[-1], 1, 1) for group in VGG_CHANNELS]
    if [tuple(state[name].shape) for name in names if name in state] != shapes:
        raise UserError(f"{lpips} does not hold the channel weights of LPIPS for VGG-16: download version 0.1 of them.")
    weights = [state[name].flatten().float().to(device) for name in names]
    return PerceptualLoss(network.to(device).requires_grad_(False).stages, weights)


def _load(network: nn.Module, state: dict[str, Tensor], path: pathlib.Path) -> None:
    expected = network.state_dict()
    for name, value in expected.items():
        found = state.get(name)
        if found is None or found.shape != value.shape or not found.isfinite().all():
            raise UserError(f"{path} does not hold the weights of VGG-16 (see tensor {name}): download them again.")
    network.load_state_dict({name: state[name].float() for name in expected})
