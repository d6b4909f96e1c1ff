"""What a model is: frozen dataclasses that size the networks, and the zoo of released models, one row each."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from bitdance.errors import UserError

TokenOrder = Literal["patch", "standard"]
TOKEN_ORDERS: tuple[TokenOrder, ...] = ("patch", "standard")


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the autoencoder; the defaults are d16c32.

    Attributes:
        widths: channels of the levels, the finest first; each a multiple of 32 (GroupNorm has 32 groups).
        blocks: residual blocks of a level.
        bits: bits of a token, a multiple of 8.
    """

    widths: tuple[int, ...] = (256, 256, 512, 512, 1024)
    blocks: int = 4
    bits: int = 32

    def __post_init__(self) -> None:
        if not self.widths or any(width <= 0 or width % 32 for width in self.widths):
            raise UserError(f"autoencoder widths {self.widths} do not fit: each must be a positive multiple of 32.")
        if self.blocks < 1:
            raise UserError(f"an autoencoder with {self.blocks} blocks a level does not exist: use at least 1.")
        if self.bits < 8 or self.bits % 8:
            raise UserError(f"{self.bits} bits a token do not fit: use a positive multiple of 8.")

    @property
    def down_size(self) -> int:
        """Pixels of an image's side that one token's side covers."""
        return 2 ** (len(self.widths) - 1)


@dataclasses.dataclass(frozen=True)
class BitDanceConfig:
    """Sizes of a BitDance model; the defaults are B-1X at 256 px.

    Attributes:
        dim: D, width of the transformer, a multiple of 64 (heads have 64 channels).
        n_layer: transformer blocks.
        head_dim: width of the diffusion head, a multiple of 64.
        head_layers: blocks of the head.
        head_ada_ln: adaLN projections of the head; each serves head_layers / head_ada_ln blocks.
        parallel_num: P, tokens of a step.
        grid: side of the token grid.
        bits: C, bits of a token.
        cls_token_num: K, class tokens.
        num_classes: classes, without the null class, whose index this is.
        token_order: `patch`: a step makes a sqrt(P) x sqrt(P) patch of tokens; `standard`: P tokens in raster order.
        time_shift: shift of the head's times, in training and in sampling.
    """

    dim: int = 768
    n_layer: int = 24
    head_dim: int = 768
    head_layers: int = 6
    head_ada_ln: int = 2
    parallel_num: int = 1
    grid: int = 16
    bits: int = 32
    cls_token_num: int = 64
    num_classes: int = 1000
    token_order: TokenOrder = "patch"
    time_shift: float = 1.0

    def __post_init__(self) -> None:
        for name in ("dim", "n_layer", "head_dim", "head_layers", "head_ada_ln", "grid", "cls_token_num", "num_classes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} does not fit: it must be at least 1.")
        for name in ("dim", "head_dim"):
            if getattr(self, name) % 64:
                raise UserError(f"{name} {getattr(self, name)} does not fit: it must be a multiple of 64.")
        if self.head_layers % self.head_ada_ln:
            raise UserError(
                f"{self.head_layers} head blocks cannot share {self.head_ada_ln} adaLN projections evenly: "
                "make the first a multiple of the second."
            )
        if self.bits < 8 or self.bits % 8:
            raise UserError(f"{self.bits} bits a token do not fit: use a positive multiple of 8.")
        if self.token_order not in TOKEN_ORDERS:
            raise UserError(f"token order {self.token_order!r} does not exist: use patch or standard.")
        if not (math.isfinite(self.time_shift) and self.time_shift > 0):
            raise UserError(f"time shift {self.time_shift} does not fit: it must be a positive number.")
        self._check_parallel_num()

    def _check_parallel_num(self) -> None:
        p, grid = self.parallel_num, self.grid
        if p < 1:
            raise UserError(f"{p} tokens a step do not exist: --parallel-num must be at least 1.")
        side = math.isqrt(p)
        if self.token_order == "patch" and side * side != p:
            raise UserError(f"--parallel-num {p} is not a square: tokens are made in square patches (1, 4, 16, ...).")
        if self.token_order == "patch" and grid % side:
            raise UserError(
                f"--parallel-num {p} does not fit: patches of {side}x{side} tokens do not divide the {grid}x{grid} grid."
            )
        if grid * grid % p:
            raise UserError(f"--parallel-num {p} does not divide the {grid * grid} tokens of the {grid}x{grid} grid.")

    @property
    def n_head(self) -> int:
        """Attention heads of the transformer, 64 channels each."""
        return self.dim // 64

    @property
    def num_tokens(self) -> int:
        """N, tokens of an image."""
        return self.grid * self.grid

    @property
    def patch(self) -> int:
        """Side of the square of tokens that are neighbours in the sequence: sqrt(P), or 1 in raster order."""
        return math.isqrt(self.parallel_num) if self.token_order == "patch" else 1

    @property
    def ar_steps(self) -> int:
        """Autoregressive steps of an image, N / P."""
        return self.num_tokens // self.parallel_num


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """How the head's loss draws its times and noise (section 6 of the training recipe).

    Attributes:
        diff_batch_mul: copies of each group with fresh time and noise.
        time_mean, time_std: of the normal under the sigmoid (`logit_normal`).
        time_schedule: `logit_normal` or `uniform`.
        class_dropout: share of images trained without their class, for guidance.
        perturb_rate: highest rate of flipped input bits; half of it on average.
    """

    diff_batch_mul: int = 4
    time_mean: float = -0.8
    time_std: float = 0.8
    time_schedule: Literal["logit_normal", "uniform"] = "logit_normal"
    class_dropout: float = 0.1
    perturb_rate: float = 0.0
