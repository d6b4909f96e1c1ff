"""The Inception network of 2015-12-05, which published FIDs are computed with, in PyTorch.

It is Inception v3 (Szegedy et al. 2016) as in the frozen graph `classify_image_graph_def.pb`. It differs from
torchvision's in three ways: images are resized as in TensorFlow 1, average pools do not count the padding, and the last
block has a max pool. Parameters have the names of the published PyTorch copies of the weights.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitdance.metrics.features import FeatureExtractor, Features
from bitdance.runtime.atomic_files import file_digest
from bitdance.runtime.devices import exact_float32
from bitdance.runtime.errors import UserError
from bitdance.weights import weights_file
from bitdance.weights.hub import EVALUATION_FOLDER, PLAIN_FILES

NAME = "inception-2015-12-05"
"""Its name in reports."""
SIDE = 299
"""Height and width of its input in pixels."""
POOL_SIZE = 2048
SPATIAL_CHANNELS = 7

PUBLISHED_DIGEST = "6726825d"
"""First digits of the SHA-256 of the published file, which has two names: that of pytorch-fid (`FILE_NAMES[0]`, which
`bitdance download inception` downloads) and that of torch-fidelity."""
FILE_NAMES = (PLAIN_FILES["inception"].file, "weights-inception-2015-12-05-6726825d.pth")


def resize(images: Tensor) -> Tensor:
    """Resizes bilinearly as TensorFlow 1's ResizeBilinear does by default; bit-identical on a CPU.

    The source of pixel i is i * (in / out), without half-pixel centres, antialiasing or rounding to bytes; all
    arithmetic is float32.

    Args:
        images: (N, H, W, C) of any type.

    Returns:
        (N, 299, 299, C) float32, in the range of `images`.
    """
    height, width = images.shape[1:3]
    if (height, width) == (SIDE, SIDE):
        return images.to(torch.float32, copy=True)
    top, bottom, down = _source_pixels(height, images.device)
    left, right, across = _source_pixels(width, images.device)
    # Each source row is interpolated once; TensorFlow does so once per pixel, with the same result.
    images = images.to(torch.float32)
    rows = _interpolate(images.index_select(2, left), images.index_select(2, right), across[:, None])
    return _interpolate(rows.index_select(1, top), rows.index_select(1, bottom), down[:, None, None])


def _interpolate(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Computes a + (b - a) * weight in place of b, rounding after each operation."""
    return b.sub_(a).mul_(weight).add_(a)


@lru_cache(maxsize=16)
def _source_pixels(length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The two source pixels of each of 299 pixels, and the weight of the second."""
    position = torch.arange(SIDE, dtype=torch.float32) * (torch.tensor(length, dtype=torch.float32) / SIDE)
    weight = position - position.floor()
    # The scale is rounded, so the last position can lie beyond the last pixel.
    low = position.long().clamp_max(length - 1)
    return low.to(device), (low + 1).clamp_max(length - 1).to(device), weight.to(device)


class Conv(nn.Module):
    """Convolution, batch normalization with the stored statistics, and ReLU; strides are without padding."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, pad: bool = True):
        super().__init__()
        padding = "same" if pad and stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fold(self) -> None:
        """Folds the batch normalization into the convolution, in float64, and stores the weight channels-last."""
        bn = self.bn
        assert isinstance(bn, nn.BatchNorm2d) and bn.running_mean is not None and bn.running_var is not None
        scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
        self.conv.bias = nn.Parameter((bn.bias.double() - bn.running_mean.double() * scale).float())
        weight = (self.conv.weight.double() * scale[:, None, None, None]).float()
        self.conv.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
        self.bn = nn.Identity()


_avg_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_max_pool = partial(F.max_pool2d, kernel_size=3, stride=2)
_wide_max_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)


class Block(nn.Module):
    """Concatenation of branches of the same input: chains of convolutions, the one called `branch_pool` after a pool.

    A branch lists (outputs, kernel) or (outputs, kernel, stride) of its convolutions; a list of two of these is a pair
    of convolutions whose outputs are concatenated.
    """

    def __init__(self, inputs: int, pool: Callable[[Tensor], Tensor], **branches: list[Any]):
        super().__init__()
        self.pool = pool
        self.branches: dict[str, list[list[Conv]]] = {}
        for name, chain in branches.items():
            self.branches[name], width = [], inputs
            for i, layer in enumerate(chain, 1):
                pair = layer if isinstance(layer, list) else [layer]
                convs = [Conv(width, *arguments) for arguments in pair]
                width = sum(outputs for outputs, *_ in pair)
                for letter, conv in zip("ab" if len(pair) > 1 else [""], convs, strict=True):
                    self.add_module(name + (f"_{i}" if len(chain) > 1 else "") + letter, conv)
                self.branches[name].append(convs)

    def forward(self, x: Tensor) -> Tensor:
        results = []
        for name, chain in self.branches.items():
            y = self.pool(x) if name == "branch_pool" else x
            for convs in chain:
                y = torch.cat([conv(y) for conv in convs], 1) if len(convs) > 1 else convs[0](y)
            results.append(y)
        return torch.cat(results, 1)


def block_a(inputs: int, pool: int) -> Block:
    """Mixed_5b to Mixed_5d, on 35 x 35."""
    return Block(
        inputs,
        _avg_pool,
        branch1x1=[(64, 1)],
        branch5x5=[(48, 1), (64, 5)],
        branch3x3dbl=[(64, 1), (96, 3), (96, 3)],
        branch_pool=[(pool, 1)],
    )


def block_b(inputs: int) -> Block:
    """Mixed_6a, from 35 x 35 to 17 x 17."""
    return Block(
        inputs, _max_pool, branch3x3=[(384, 3, 2)], branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2)], branch_pool=[]
    )


def block_c(width: int) -> Block:
    """Mixed_6b to Mixed_6e, on 17 x 17."""
    row, column = (width, (1, 7)), (width, (7, 1))
    return Block(
        768,
        _avg_pool,
        branch1x1=[(192, 1)],
        branch7x7=[(width, 1), row, (192, (7, 1))],
        branch7x7dbl=[(width, 1), column, row, column, (192, (1, 7))],
        branch_pool=[(192, 1)],
    )


def block_d() -> Block:
    """Mixed_7a, from 17 x 17 to 8 x 8."""
    branch7x7x3 = [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)]
    return Block(768, _max_pool, branch3x3=[(192, 1), (320, 3, 2)], branch7x7x3=branch7x7x3, branch_pool=[])


def block_e(inputs: int, pool: Callable[[Tensor], Tensor]) -> Block:
    """Mixed_7b and Mixed_7c, on 8 x 8."""
    pair = [(384, (1, 3)), (384, (3, 1))]
    return Block(
        inputs,
        pool,
        branch1x1=[(320, 1)],
        branch3x3=[(384, 1), pair],
        branch3x3dbl=[(448, 1), (384, 3), pair],
        branch_pool=[(192, 1)],
    )


class Inception(nn.Module):
    """The network, from images to features."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, pad=False)
        self.Mixed_5b = block_a(192, pool=32)
        self.Mixed_5c = block_a(256, pool=64)
        self.Mixed_5d = block_a(288, pool=64)
        self.Mixed_6a = block_b(288)
        self.Mixed_6b = block_c(128)
        self.Mixed_6c = block_c(160)
        self.Mixed_6d = block_c(160)
        self.Mixed_6e = block_c(192)
        self.Mixed_7a = block_d()
        self.Mixed_7b = block_e(1280, _avg_pool)
        self.Mixed_7c = block_e(2048, _wide_max_pool)
        self.fc = nn.Linear(POOL_SIZE, 1008)
        self.eval().requires_grad_(False)

    def fold(self) -> Inception:
        """Folds batch normalization into the convolutions and stores weights channels-last, once they are loaded."""
        for module in self.modules():
            if isinstance(module, Conv):
                module.fold()
        return self.requires_grad_(False)

    def forward(self, images: Tensor) -> Features:
        """Extracts features.

        Args:
            images: (N, H, W, 3) of any size, uint8 in [0, 255] or another type in that range, as in ADM.

        Returns:
            `pool` (N, 2048); `spatial` (N, 2023): the first 7 channels of TensorFlow's mixed_6/conv (the first branch
            of Mixed_6d), (17, 17, 7) flattened; `logits` (N, 1008) without the bias, as in ADM's Inception Score. All
            float32.
        """
        # (N, H, W, C) in memory is channels-last, so the permutation copies nothing.
        return self.features(resize(images).sub_(128).mul_(1 / 128).permute(0, 3, 1, 2))  # (N, 3, 299, 299)

    def features(self, x: Tensor) -> Features:
        """Extracts features of (N, 3, 299, 299) float32 images in [-1, 1), fastest in channels-last memory."""
        # bfloat16 would change features by 5 to 12 %.
        with exact_float32(), torch.autocast(x.device.type, enabled=False):
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (N, 64, 147, 147)
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_max_pool(x)))  # (N, 192, 71, 71)
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_max_pool(x))))  # (N, 288, 35, 35)
            x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (N, 768, 17, 17)
            spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (N, 2023); the first branch comes first
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # (N, 2048, 8, 8)
            pool = x.mean((2, 3))  # (N, 2048)
            return Features(pool, spatial, F.linear(pool, self.fc.weight))


def find_inception_weights(path: pathlib.Path | None) -> pathlib.Path:
    """Returns `path` if given, else the file that `bitdance download inception` downloaded.

    Raises:
        UserError: the file does not exist.
    """
    for file in [EVALUATION_FOLDER / name for name in FILE_NAMES] if path is None else [path]:
        if file.exists():
            return file
    raise UserError(
        f"there are no Inception weights in {path or EVALUATION_FOLDER}: run `bitdance download inception`, or set "
        "`inception_weights` to the file or `features` to efficientnet-lite0 (in training `eval_inception`, "
        "`eval_features`)."
    )


def load_inception(path: pathlib.Path, device: torch.device | str = "cpu") -> FeatureExtractor:
    """Loads the weights, without running code in the file, and returns the network as a feature extractor.

    Raises:
        UserError: the file cannot be read, is damaged, or holds something other than this network.
    """
    state = weights_file.read(path).states.get("model", {})
    with torch.device("meta"):
        network = Inception()
    expected = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    for name, meta in expected.items():
        value = state.get(name)
        if value is None or value.shape != meta.shape or value.dtype != meta.dtype:
            found = "missing" if value is None else f"{value.dtype} of shape {tuple(value.shape)}"
            raise UserError(
                f"{path} is not the Inception network of 2015-12-05: tensor {name} is {found} instead of {meta.dtype} "
                f"of shape {tuple(meta.shape)}; download it again with `bitdance download inception`."
            )
        if not value.isfinite().all() or (name.endswith("running_var") and (value < 0).any()):
            raise UserError(f"{path}: tensor {name} has invalid values, so the file is damaged: download it again.")
    # The tensors may be memory-mapped, and the file may change later.
    network.load_state_dict({name: state[name].clone() for name in expected}, strict=False, assign=True)
    network.fold().to(device)
    return FeatureExtractor(NAME, POOL_SIZE, lambda images: network(images.to(device)), digest=file_digest(path))
