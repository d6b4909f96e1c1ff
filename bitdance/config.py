"""Sizes of the networks, and the released models, one row each.

Other settings are defined where they are used: `SamplingConfig` in `bitdance.sampling.sampler`, `TrainConfig` in
`bitdance.training.train_config`.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any, Literal

from bitdance.runtime.errors import UserError, check_fields

HEAD_DIM = 64
"""Channels of an attention head, in every released model."""

MAX_BLOCKS, MAX_LEVELS, MAX_WIDTH, MAX_NAME = 256, 8, 16_384, 1000
"""Blocks, levels and channels of a network, and characters of a class name: files of weights name them freely."""
MAX_COUNT = 1 << 20
"""Largest number of classes and of class tokens, and of what an encoding counts."""

MAX_SOLVER_STEPS, MAX_SCALE = 10_000, 1000
"""Largest number of solver steps and guidance scale: far above what is of use, so that mistakes are noticed."""

MAX_IMAGE_SIZE = 8192
"""Side of the largest images in pixels; a crop of this size takes 200 MB."""

Split = Literal["train", "test"]
"""Of CIFAR-10."""

TokenOrder = Literal["patch", "standard"]
Weights = Literal["ema", "model"]
Precision = Literal["auto", "fp32", "bf16"]
SolverName = Literal["euler-maruyama", "dpmpp-2m-sde", "euler", "heun"]
CfgSchedule = Literal["linear", "constant"]
Preset = Literal["exact", "fast"]


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of an autoencoder. The defaults are those of d16c32, the released one.

    Attributes:
        widths: channels of each level, finest level first, at most 8; multiples of 8 (GroupNorm has 32 groups, or 16 or
            8).
        blocks: residual blocks per level.
        bits: C, bits per token, a multiple of 8.
        space_to_depth: side of the squares of pixels that are moved into channels before the finest level. With 1 the
            finest level has the resolution of the images, which takes most of the time.
        split: a cell, a position of the coarsest level, is split x split tokens.
        bit_depths: bits of each latent channel, which has then 2^bits levels (successive approximation); their sum is
            bits x split^2. If empty, each channel has one bit, its sign.
        gray_code: whether the bits of a channel are a Gray code, in which levels that are neighbours differ in one bit.
        linear: whether a linear transform of blocks of pixels is added to the encoder and the decoder. It can be
            initialized with principal components, so that training starts from transform coding.
    """

    widths: tuple[int, ...] = (256, 256, 512, 512, 1024)
    blocks: int = 4
    bits: int = 32
    space_to_depth: int = 1
    split: int = 1
    bit_depths: tuple[int, ...] = ()
    gray_code: bool = False
    linear: bool = False

    def __post_init__(self) -> None:
        rule = f"have 1 to {MAX_LEVELS} levels, each of a multiple of 8 and at most {MAX_WIDTH} channels"

        def are_widths(value: tuple[int, ...]) -> bool:
            are_valid = all(0 < width <= MAX_WIDTH and width % 8 == 0 for width in value)
            return are_valid and 1 <= len(value) <= MAX_LEVELS

        check_fields(self, "widths", are_widths, rule)
        check_fields(self, "blocks space_to_depth", lambda value: value >= 1, "be at least 1")
        check_fields(self, "blocks", lambda value: value <= MAX_BLOCKS, f"be at most {MAX_BLOCKS}")
        check_fields(self, "space_to_depth", lambda value: value <= 32, "be at most 32")
        check_fields(self, "bits", lambda value: value >= 8 and value % 8 == 0, "be a positive multiple of 8")
        if self.split < 1 or self.cell_size % self.split:
            raise UserError(
                f"split={self.split} is invalid: it must divide {self.cell_size}, the pixels of a position."
            )
        if any(not 1 <= depth <= 8 for depth in self.bit_depths):
            raise UserError(f"bit_depths={self.bit_depths} is invalid: each must be between 1 and 8.")
        if self.bit_depths and sum(self.bit_depths) != self.cell_bits:
            problem = f"bit_depths={self.bit_depths} is invalid: their sum is {sum(self.bit_depths)}"
            raise UserError(
                f"{problem} and must be {self.cell_bits}, which is bits x split^2 = {self.bits} x {self.split}^2: set "
                "`bits` and `split`, or `bit_depths`, so that they agree."
            )
        if self.gray_code and not self.bit_depths:
            raise UserError("`gray_code` is an order of the levels of `bit_depths`: set them, or leave it out.")
        if self.linear and (len(self.bit_depths) or self.cell_bits) > 3 * self.cell_size**2:
            values = f"the {3 * self.cell_size**2} values of a cell of {self.cell_size} x {self.cell_size} pixels"
            raise UserError(f"`linear` has more channels than {values}: choose fewer bits, or larger `bit_depths`.")

    @property
    def cell_size(self) -> int:
        """Side of a cell, a position of the coarsest level, in pixels."""
        return self.space_to_depth * 2 ** (len(self.widths) - 1)

    @property
    def cell_bits(self) -> int:
        """Bits of a cell."""
        return self.bits * self.split**2

    @property
    def down_size(self) -> int:
        """Downsampling factor: the side of a token in pixels."""
        return self.cell_size // self.split

    def grid(self, image_size: int) -> int:
        """Returns the side of the token grid of an image of this size.

        Raises:
            UserError: `image_size` is not a multiple of `cell_size`, or is only one cell, over which the bits have no
                variance for the decoder's normalization.
        """
        if image_size % self.cell_size:
            rule = f"it must be a multiple of {self.cell_size}, of the autoencoder"
            raise UserError(f"image_size={image_size} is invalid: {rule}.")
        if image_size > MAX_IMAGE_SIZE:
            raise UserError(f"image_size={image_size} is invalid: it must be at most {MAX_IMAGE_SIZE}.")
        if image_size <= self.cell_size:
            rule = f"it must be larger than {self.cell_size}, which is one cell of the autoencoder"
            raise UserError(f"image_size={image_size} is invalid: {rule}.")
        return image_size // self.down_size


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """Sizes of the model.

    Those that are chosen for a training; the others follow from the autoencoder and the images, see `BitDanceConfig`.

    Attributes:
        dim: D, width of the transformer, a multiple of 64 (attention heads have 64 channels).
        n_layer: transformer blocks.
        head_dim: width of the diffusion head, a multiple of 64.
        head_layers: blocks of the diffusion head.
        head_ada_ln: adaLN projections of the head; each is shared by `head_layers` / `head_ada_ln` blocks.
        parallel_num: P, tokens sampled per autoregressive step: 1, 4, 16, ...
        cls_token_num: K, class tokens.
        num_classes: by default the number of classes of the images; a larger number reserves classes.
        token_order: patch: the tokens of a step are a square patch; standard: they are consecutive in raster order.
        time_shift: shift of the head's timesteps, in training and in sampling.
    """

    dim: int = 768
    n_layer: int = 24
    head_dim: int = 768
    head_layers: int = 6
    head_ada_ln: int = 2
    parallel_num: int = 1
    cls_token_num: int = 64
    num_classes: int | None = None
    token_order: TokenOrder = "patch"
    time_shift: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "num_classes", lambda value: value >= 1, "be at least 1")
        check_fields(self, "num_classes cls_token_num", lambda value: value <= MAX_COUNT, f"be at most {MAX_COUNT}")

    @classmethod
    def of(cls, config: BitDanceConfig, **changes: Any) -> ModelSizes:
        """Returns the sizes of a model, with changes."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)} | changes)


@dataclasses.dataclass(frozen=True)
class BitDanceConfig(ModelSizes):
    """All sizes of a BitDance model. The defaults are those of B-1X at 256 px.

    Attributes:
        num_classes: number of classes, without the null class, whose index this is.
        grid: side of the token grid.
        bits: C, bits per token.
        class_names: one name per class, or empty.
    """

    num_classes: int = 1000
    grid: int = 16
    bits: int = 32
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = "dim n_layer head_dim head_layers head_ada_ln parallel_num grid cls_token_num"
        check_fields(self, counts, lambda value: value >= 1, "be at least 1")
        blocks = "n_layer head_layers head_ada_ln"
        check_fields(self, blocks, lambda value: value <= MAX_BLOCKS, f"be at most {MAX_BLOCKS}")
        check_fields(self, "dim head_dim", lambda value: value % HEAD_DIM == 0, f"be a multiple of {HEAD_DIM}")
        check_fields(self, "dim head_dim", lambda value: value <= MAX_WIDTH, f"be at most {MAX_WIDTH}")
        check_fields(self, "bits", lambda value: value >= 8 and value % 8 == 0, "be a positive multiple of 8")
        check_fields(self, "time_shift", lambda value: math.isfinite(value) and value > 0, "be a positive number")
        if self.head_layers % self.head_ada_ln:
            raise UserError(
                f"head_layers={self.head_layers} is invalid: it must be a multiple of head_ada_ln={self.head_ada_ln}."
            )
        if self.token_order not in typing.get_args(TokenOrder):
            raise UserError(f"token_order={self.token_order!r} is invalid: it must be patch or standard.")
        if self.class_names and len(self.class_names) != self.num_classes:
            given = len(self.class_names)
            raise UserError(f"{given} class names for num_classes={self.num_classes}: give one per class or none.")
        if (longest := max(map(len, self.class_names), default=0)) > MAX_NAME:
            raise UserError(f"a class name has {longest} characters: shorten it to at most {MAX_NAME}.")
        p, grid, side = self.parallel_num, self.grid, self.patch
        if self.token_order == "patch" and side * side != p:
            raise UserError(f"parallel_num={p} is not a square: tokens are sampled in square patches (1, 4, 16, ...).")
        if grid % side:
            raise UserError(
                f"parallel_num={p} is invalid: patches of {side}x{side} tokens do not divide the {grid}x{grid} grid."
            )
        if grid * grid % p:
            raise UserError(f"parallel_num={p} does not divide the {grid * grid} tokens of the {grid}x{grid} grid.")

    @property
    def n_head(self) -> int:
        """Attention heads of the transformer, with 64 channels each."""
        return self.dim // HEAD_DIM

    @property
    def num_tokens(self) -> int:
        """N, tokens per image."""
        return self.grid * self.grid

    @property
    def patch(self) -> int:
        """Side of a patch of tokens that are sampled together: sqrt(P), or 1 in raster order."""
        return math.isqrt(self.parallel_num) if self.token_order == "patch" else 1

    @property
    def ar_steps(self) -> int:
        """Autoregressive steps per image, N / P."""
        return self.num_tokens // self.parallel_num


@dataclasses.dataclass(frozen=True)
class SamplingDefaults:
    """Settings of sampling where none are given; these values are for models that are not among the released ones.

    Attributes:
        cfg_scale: guidance scale.
        num_steps: steps of the head's solver.
        chunk_size: images decoded at once; 0 for the whole batch.
        solver: of the head.
        share_first: see `bitdance.sampling.sampler.SamplingConfig`.
    """

    cfg_scale: float = 3.0
    num_steps: int = 20
    chunk_size: int = 0
    solver: SolverName = "dpmpp-2m-sde"
    share_first: bool = True


PRESETS: dict[Preset, dict[str, Any]] = {
    "exact": {"num_steps": 100, "solver": "euler-maruyama", "share_first": False},
    "fast": {"num_steps": 20, "solver": "dpmpp-2m-sde"},
}
"""Settings under one name: as published, and fewer steps of a second-order solver."""


@dataclasses.dataclass(frozen=True)
class ReleasedModel:
    """A released model: sizes, published sampling settings and published metrics (ImageNet 256 px, 50,000 images).

    Attributes:
        file: name of the file on the hub and in `models/BitDance-ImageNet`.
        family: the original's name of the size.
        config: sizes.
        sampling: guidance (linear schedule), solver steps and decoder chunk of the published command.
        batch_size: images per GPU of the published command.
        perturb_rate: perturbation rate of its training.
        parameters: in millions, without the autoencoder.
        fid, inception_score, precision, recall: as published.
    """

    file: str
    family: Literal["BitDance-B", "BitDance-L", "BitDance-H"]
    config: BitDanceConfig
    sampling: SamplingDefaults
    batch_size: int
    perturb_rate: float
    parameters: float
    fid: float
    inception_score: float
    precision: float
    recall: float


_B = BitDanceConfig()
_L = BitDanceConfig(dim=1024, n_layer=32, head_dim=1024, head_layers=8)
_H = BitDanceConfig(dim=1280, n_layer=40, head_dim=1280, head_layers=12, head_ada_ln=3)
_B4, _B16 = dataclasses.replace(_B, parallel_num=4), dataclasses.replace(_B, parallel_num=16)
_TINY = BitDanceConfig(dim=128, n_layer=3, head_dim=128, head_layers=4)

MODEL_SIZES: dict[str, BitDanceConfig] = {"BitDance-B": _B, "BitDance-L": _L, "BitDance-H": _H, "BitDance-Tiny": _TINY}
"""Sizes of the original's `--model`, and a tiny one to try a command with."""

_PUBLISHED: dict[str, Any] = {  # family, sizes, guidance, decoder chunk, and the other fields in their order
    "B-1X":  ("BitDance-B", _B,   3.2,  64, 384, 0.1,  242.37,  1.68, 297.1, 0.80, 0.62),
    "B-4X":  ("BitDance-B", _B4,  3.9,  64, 384, 0.1,  260.10,  1.69, 291.2, 0.79, 0.63),
    "B-16X": ("BitDance-B", _B16, 6.1,  64, 384, 0.1,  260.11,  1.91, 283.8, 0.78, 0.62),
    "L-1X":  ("BitDance-L", _L,   4.0,  48, 352, 0.05, 527.27,  1.31, 300.2, 0.80, 0.64),
    "H-1X":  ("BitDance-H", _H,   4.55, 32, 224, 0.05, 1007.96, 1.24, 304.4, 0.81, 0.64),
}  # fmt: skip
RELEASED_MODELS = {
    name: ReleasedModel(
        f"BitDance_{name.replace('-', '_')}.pt",
        family,
        config,
        SamplingDefaults(cfg_scale, 100, chunk, "euler-maruyama", share_first=False),
        *rest,
    )
    for name, (family, config, cfg_scale, chunk, *rest) in _PUBLISHED.items()
}
"""The released models by their names in the paper."""
