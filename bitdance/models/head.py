"""The binary diffusion head: the two networks that predict a token's bits from noise, and the loss that trains them.

Section 3.3 of arXiv 2602.14041. Rows R are tokens (P = 1) or groups of P tokens; the condition is what the transformer
puts out.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitdance.config import HEAD_DIM, BitDanceConfig
from bitdance.models import flow
from bitdance.models.layers import Attention, swiglu

FREQUENCIES = 128


class TimeEmbedding(nn.Module):
    """Sinusoids of 1000 t, cosines then sines, through a small MLP."""

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Computes exp(-ln(10000) i / 128) for i < 128, in float32, on the device of the parameters.

        The exponent is rounded to float32, then the exponential rounded once: vector libraries differ in the last bit
        of exp, and 1000 t makes 1e-5 of that in the prediction, so it is taken in float64 on the CPU.
        """
        exponents = -math.log(10000) * torch.arange(FREQUENCIES, dtype=torch.float32, device="cpu") / FREQUENCIES
        frequencies = exponents.double().exp().float().to(next(self.mlp.parameters()).device)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """(R,) in [0, 1] -> (R, d)."""
        angles = (1000.0 * t.float())[:, None] * self.frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)  # (R, 256)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * (1 + scale) + shift."""
    return x * (1 + scale) + shift


class MLPBlock(nn.Module):
    """A block for P = 1: adaptive LayerNorm, SwiGLU, gated residual."""

    modulations = 3

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = int(dim * 1.5)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.w1 = nn.Linear(dim, 2 * hidden)
        self.w2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor) -> Tensor:
        return x + swiglu(modulate(self.norm(x), scale, shift), self.w1, self.w2) * gate


class TransformerHeadBlock(nn.Module):
    """A block for P > 1: full attention among the P tokens of a group, then SwiGLU, both modulated and gated."""

    modulations = 6

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = int(dim * 1.5)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, dim // HEAD_DIM, bias=True)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.w1 = nn.Linear(dim, 2 * hidden)
        self.w2 = nn.Linear(hidden, dim)

    def forward(
        self, x: Tensor, scale1: Tensor, shift1: Tensor, gate1: Tensor, scale2: Tensor, shift2: Tensor, gate2: Tensor
    ) -> Tensor:
        x = x + self.attn(modulate(self.norm1(x), scale1, shift1)) * gate1
        return x + swiglu(modulate(self.norm2(x), scale2, shift2), self.w1, self.w2) * gate2


class FinalLayer(nn.Module):
    """Modulated LayerNorm without affine, then the projection to bits."""

    def __init__(self, dim: int, bits: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.ada_ln_modulation = nn.Linear(dim, 2 * dim)
        self.linear = nn.Linear(dim, bits)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scale, shift = self.ada_ln_modulation(y).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), scale, shift))


class HeadNetwork(nn.Module):
    """Predicts x_1 from x_t: blocks of one of two kinds between an input and an output projection."""

    grad_checkpointing = False
    """In training keep only each block's input, and compute the rest again when needed."""

    def __init__(self, config: BitDanceConfig) -> None:
        super().__init__()
        dim = config.head_dim
        block = MLPBlock if config.parallel_num == 1 else TransformerHeadBlock
        self.blocks_per_ada_ln = config.head_layers // config.head_ada_ln
        self.time_embed = TimeEmbedding(dim)
        self.cond_embed = nn.Linear(config.dim, dim)
        self.input_proj = nn.Linear(config.bits, dim)
        self.res_blocks = nn.ModuleList(block(dim) for _ in range(config.head_layers))
        self.ada_ln_blocks = nn.ModuleList(nn.Linear(dim, block.modulations * dim) for _ in range(config.head_ada_ln))
        self.final_layer = FinalLayer(dim, config.bits)
        self.modulations = block.modulations

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """x_t (R, P, C), t (R,) in [0, 1], cond (R, P, D) -> the predicted x_1 (R, P, C)."""
        return self.denoise(x_t, self.time_embed(t)[:, None], self.cond_embed(cond))

    def denoise(self, x_t: Tensor, time: Tensor, cond: Tensor) -> Tensor:
        """`forward` after the embeddings: time (R or 1, 1, d) and cond (R, P, d) can serve many calls."""
        x = self.input_proj(x_t)  # (R, P, d)
        y = F.silu(time + cond)
        for i, block in enumerate(self.res_blocks):
            if i % self.blocks_per_ada_ln == 0:
                modulation = self.ada_ln_blocks[i // self.blocks_per_ada_ln](y).chunk(self.modulations, dim=-1)
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, *modulation, use_reentrant=False)
            else:
                x = block(x, *modulation)
        return self.final_layer(x, y)


class DiffusionHead(nn.Module):
    """The head network with its loss."""

    def __init__(self, config: BitDanceConfig) -> None:
        super().__init__()
        self.net = HeadNetwork(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights and zero biases; all that modulates and the output start at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in self.net.time_embed.mlp:
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=0.02)
        final = self.net.final_layer
        for linear in (*self.net.ada_ln_blocks, final.ada_ln_modulation, final.linear):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def velocity(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """The velocity at x_t (R, P, C), one time t (R,) a row: (R, P, C) float32."""
        x_pred = self.net(x_t.to(cond.dtype), t, cond).float()
        return flow.velocity(x_pred, x_t, t[:, None, None])

    def loss(self, target: Tensor, cond: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
        """Mean squared error of the velocity, a scalar in float32.

        Args:
            target: (R, P, C) bits, +-1.
            cond: (R, P, D).
            t: (R,) times in [0, 1], one for all P tokens of a group.
            x_0: (R, P, C) standard normal noise, float32.
        """
        target = target.float()
        x_t = flow.interpolate(x_0, target, t[:, None, None])
        wanted = flow.velocity(target, x_t, t[:, None, None])
        return F.mse_loss(self.velocity(x_t, t, cond), wanted)
