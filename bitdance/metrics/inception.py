"""The Inception network of 2015-12-05, whose features the published figures are made of, without TensorFlow.

It is Inception v3 (Szegedy et al. 2016) as the frozen graph `classify_image_graph_def.pb` has it. Three things differ
from the usual PyTorch one: images are resized as TensorFlow 1 did it, average pools leave the padding out of the count,
and the pool of the last block takes maxima. Parameters are named as in the published copies of its weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitdance.metrics.features import FeatureExtractor, Features
from bitdance.runtime.atomic_files import file_digest
from bitdance.runtime.errors import UserError
from bitdance.weights import weights_file
from bitdance.weights.hub import EVALUATION_FOLDER, PLAIN_FILES

NAME = "inception-2015-12-05"
"""What reports call it."""
SIDE = 299
"""Height and width of what the network sees, in pixels."""
POOL_SIZE = 2048
SPATIAL_CHANNELS = 7
SPATIAL_SIZE = 17 * 17 * SPATIAL_CHANNELS
NUM_LOGITS = 1008

PUBLISHED_DIGEST = "6726825d"
"""How the SHA-256 of the published file begins. It goes by two names, that of pytorch-fid (`FILE_NAMES[0]`, which
`bitdance download inception` fetches) and that of torch-fidelity."""
FILE_NAMES = (PLAIN_FILES["inception"].rpartition("/")[2], "weights-inception-2015-12-05-6726825d.pth")


# ---------------------------------------------------------------- resizing


def resize(images: Tensor, side: int = SIDE) -> Tensor:
    """Resizes as TensorFlow 1's ResizeBilinear does by default, to the last bit on a CPU.

    The source of pixel i is i * (in / out), without half-pixel centres, antialiasing or rounding to bytes; all
    arithmetic is float32.

    Args:
        images: (N, H, W, C) of any type, H and W at least 1; taken as float32.
        side: height and width of the result.

    Returns:
        (N, side, side, C) float32, in the range of `images`.
    """
    height, width = images.shape[1:3]
    if (height, width) == (side, side):
        return images.to(torch.float32, copy=True)
    rows, next_rows, down = _sources(height, side, images.device)
    columns, next_columns, right = _sources(width, side, images.device)
    # Rows of pixels are interpolated first, each once; TensorFlow does it once a pixel, with the same result.
    images = images.to(torch.float32)
    lines = _between(images.index_select(2, columns), images.index_select(2, next_columns), right[:, None])
    return _between(lines.index_select(1, rows), lines.index_select(1, next_rows), down[:, None, None])


def _between(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """a + (b - a) * weight, with a rounding after each operation, in the memory of b."""
    return b.sub_(a).mul_(weight).add_(a)


@lru_cache(maxsize=16)
def _sources(length: int, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The two source pixels of each of `side` pixels, and the weight of the second."""
    scale = torch.tensor(length, dtype=torch.float32) / side
    place = torch.arange(side, dtype=torch.float32) * scale
    low = place.floor()
    weight = place - low
    # The scale is rounded, so the last place can reach beyond the last pixel.
    low = low.long().clamp_max(length - 1)
    return low.to(device), (low + 1).clamp_max(length - 1).to(device), weight.to(device)


# ---------------------------------------------------------------- the network


class Conv(nn.Module):
    """A convolution, batch normalisation with the stored statistics, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, pad: bool = True):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (kernel[0] // 2, kernel[1] // 2) if pad else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fold(self) -> None:
        """Puts the batch normalisation into the convolution, computed in float64, and its channels last in memory."""
        bn = self.bn
        assert isinstance(bn, nn.BatchNorm2d) and bn.running_mean is not None and bn.running_var is not None
        scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
        self.conv.bias = nn.Parameter((bn.bias.double() - bn.running_mean.double() * scale).float())
        weight = (self.conv.weight.double() * scale[:, None, None, None]).float()
        self.conv.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
        self.bn = nn.Identity()


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


class BlockA(nn.Module):
    """Mixed_5b to Mixed_5d, on 35 x 35."""

    def __init__(self, inputs: int, pool: int):
        super().__init__()
        self.branch1x1 = Conv(inputs, 64, 1)
        self.branch5x5_1 = Conv(inputs, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5)
        self.branch3x3dbl_1 = Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3)
        self.branch_pool = Conv(inputs, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat((self.branch1x1(x), branch5x5, branch3x3dbl, self.branch_pool(_average(x))), 1)


class BlockB(nn.Module):
    """Mixed_6a, from 35 x 35 to 17 x 17."""

    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3 = Conv(inputs, 384, 3, stride=2, pad=False)
        self.branch3x3dbl_1 = Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2, pad=False)

    def forward(self, x: Tensor) -> Tensor:
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat((self.branch3x3(x), branch3x3dbl, _halve(x)), 1)


class BlockC(nn.Module):
    """Mixed_6b to Mixed_6e, on 17 x 17."""

    def __init__(self, width: int):
        super().__init__()
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1 = Conv(768, width, 1)
        self.branch7x7_2 = Conv(width, width, (1, 7))
        self.branch7x7_3 = Conv(width, 192, (7, 1))
        self.branch7x7dbl_1 = Conv(768, width, 1)
        self.branch7x7dbl_2 = Conv(width, width, (7, 1))
        self.branch7x7dbl_3 = Conv(width, width, (1, 7))
        self.branch7x7dbl_4 = Conv(width, width, (7, 1))
        self.branch7x7dbl_5 = Conv(width, 192, (1, 7))
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch7x7dbl = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branch7x7dbl = self.branch7x7dbl_5(self.branch7x7dbl_4(branch7x7dbl))
        return torch.cat((self.branch1x1(x), branch7x7, branch7x7dbl, self.branch_pool(_average(x))), 1)


class BlockD(nn.Module):
    """Mixed_7a, from 17 x 17 to 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = Conv(768, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2, pad=False)
        self.branch7x7x3_1 = Conv(768, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2, pad=False)

    def forward(self, x: Tensor) -> Tensor:
        branch7x7x3 = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat((self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(branch7x7x3), _halve(x)), 1)


class BlockE(nn.Module):
    """Mixed_7b and Mixed_7c, on 8 x 8; the pool of the latter takes maxima."""

    def __init__(self, inputs: int, take_maxima: bool):
        super().__init__()
        self.take_maxima = take_maxima
        self.branch1x1 = Conv(inputs, 320, 1)
        self.branch3x3_1 = Conv(inputs, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3))
        self.branch3x3_2b = Conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = Conv(inputs, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1))
        self.branch_pool = Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.take_maxima else _average(x)
        branch3x3 = self.branch3x3_1(x)
        branch3x3dbl = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = (
            self.branch1x1(x),
            self.branch3x3_2a(branch3x3),
            self.branch3x3_2b(branch3x3),
            self.branch3x3dbl_3a(branch3x3dbl),
            self.branch3x3dbl_3b(branch3x3dbl),
            self.branch_pool(pooled),
        )
        return torch.cat(branches, 1)


class Inception(nn.Module):
    """The network, from bytes to features."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2, pad=False)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, pad=False)
        self.Mixed_5b = BlockA(192, pool=32)
        self.Mixed_5c = BlockA(256, pool=64)
        self.Mixed_5d = BlockA(288, pool=64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(128)
        self.Mixed_6c = BlockC(160)
        self.Mixed_6d = BlockC(160)
        self.Mixed_6e = BlockC(192)
        self.Mixed_7a = BlockD()
        self.Mixed_7b = BlockE(1280, take_maxima=False)
        self.Mixed_7c = BlockE(2048, take_maxima=True)
        self.fc = nn.Linear(POOL_SIZE, NUM_LOGITS)
        self.eval().requires_grad_(False)

    def fold(self) -> Inception:
        """Makes it fast, once the weights are in: batch normalisation inside the convolutions, channels last."""
        for module in self.modules():
            if isinstance(module, Conv):
                module.fold()
        return self.requires_grad_(False)

    def forward(self, images: Tensor) -> Features:
        """Features of images.

        Args:
            images: (N, H, W, 3) uint8 in [0, 255], or of another type with such values, as ADM takes them; of any
                size, on the device of the weights.

        Returns:
            `pool` (N, 2048); `spatial` (N, 2023): the first 7 channels of the first branch of TensorFlow's mixed_6
            (Mixed_6d here), (17, 17, 7) laid flat; `logits` (N, 1008): without the bias, as the Inception Score of ADM
            takes them. All float32.
        """
        # Bytes come with the channels last, and stay so: the permutation moves nothing.
        return self.features(resize(images).sub_(128).mul_(1 / 128).permute(0, 3, 1, 2))

    def features(self, x: Tensor) -> Features:
        """Like `forward`, of (N, 3, 299, 299) float32 images in [-1, 1), fastest when laid out channels-last."""
        with _float32(x.device):
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (N, 64, 147, 147)
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halve(x)))  # (N, 192, 71, 71)
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_halve(x))))  # (N, 288, 35, 35)
            x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (N, 768, 17, 17)
            spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (N, 2023); the first branch comes first
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # (N, 2048, 8, 8)
            pool = x.mean((2, 3))  # (N, 2048)
            return Features(pool, spatial, self.logits(pool))

    def logits(self, pool: Tensor) -> Tensor:
        """(N, 1008) logits without the bias, of (N, 2048) features."""
        return F.linear(pool, self.fc.weight)


@contextlib.contextmanager
def _float32(device: torch.device) -> Iterator[None]:
    """Full float32, whatever the caller has set: bfloat16 changes features by 5 to 12 %, TensorFloat-32 by too much."""
    before = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


# ---------------------------------------------------------------- its weights


@dataclasses.dataclass(frozen=True)
class LoadedInception:
    """The network with weights from a file.

    Attributes:
        network: folded, on its device.
        path: the file.
        digest: its SHA-256.
    """

    network: Inception
    path: pathlib.Path
    digest: str

    @property
    def is_published(self) -> bool:
        """Whether the file is the published one. Figures from another cannot stand beside published figures."""
        return self.digest.startswith(PUBLISHED_DIGEST)

    def feature_extractor(self) -> FeatureExtractor:
        """The network as the plug of evaluation; it moves images to its device."""
        device = self.network.fc.weight.device
        return FeatureExtractor(NAME, POOL_SIZE, lambda images: self.network(images.to(device)), digest=self.digest)


def find_weights(path: pathlib.Path | None = None, folder: pathlib.Path = EVALUATION_FOLDER) -> pathlib.Path:
    """The file of weights: `path` if there is one, else what `bitdance download inception` put into `folder`.

    Raises:
        UserError: neither is there.
    """
    if path is not None:
        if not path.exists():
            raise UserError(
                f"there is no file {path} of Inception weights: check --inception-weights, or in training "
                "--eval-inception."
            )
        return path
    found = next((folder / name for name in FILE_NAMES if (folder / name).exists()), None)
    if found is None:
        raise UserError(
            f"there are no Inception weights in {folder}: run `bitdance download inception`, or name the file "
            "(--inception-weights, or in training --eval-inception)."
        )
    return found


def load_inception(path: pathlib.Path, device: torch.device | str = "cpu") -> LoadedInception:
    """Reads the weights as `find_weights` finds them, without running what a pickle asks for.

    Raises:
        UserError: the file cannot be read, is damaged, or holds something other than this network.
    """
    state = weights_file.read(path).states.get("model", {})
    with torch.device("meta"):
        network = Inception()
    needed = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    missing = [name for name in needed if name not in state]
    if missing:
        raise UserError(
            f"{path} is not the Inception network of 2015-12-05: {len(missing)} of its {len(needed)} tensors are "
            f"missing, the first is {missing[0]}; fetch it again with `bitdance download inception`."
        )
    for name, expected in needed.items():
        value = state[name]
        if value.shape != expected.shape or value.dtype != expected.dtype:
            raise UserError(
                f"{path}: tensor {name} has shape {tuple(value.shape)} and type {_title(value.dtype)}, the Inception "
                f"network of 2015-12-05 has {tuple(expected.shape)} and {_title(expected.dtype)}."
            )
        if not value.isfinite().all() or (name.endswith("running_var") and (value < 0).any()):
            raise UserError(f"{path}: tensor {name} has impossible values, so the file is damaged: fetch it again.")
    # The tensors may be maps of the file, which somebody may change later.
    network.load_state_dict({name: state[name].clone() for name in needed}, strict=False, assign=True)
    return LoadedInception(network.fold().to(device), path, file_digest(path))


def _title(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
