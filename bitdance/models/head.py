"""The binary diffusion head (section 3.3 of arXiv 2602.14041): its two networks and its loss.

A row of a batch is a group of P tokens, R rows in all; the condition is the output of the transformer.
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
    """Sinusoidal embedding of 1000 t, cosines before sines, followed by an MLP."""

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Computes exp(-ln(10000) i / 128) for i < 128, in float32, on the device of the parameters.

        The exponents are float32 and the exponential is rounded once, from float64 on the CPU: vector libraries differ
        in the last bit of a float32 exp, which times 1000 t changes predictions by 1e-5.
        """
        exponents = -math.log(10000) * torch.arange(FREQUENCIES, dtype=torch.float32, device="cpu") / FREQUENCIES
        frequencies = exponents.double().exp().float().to(next(self.mlp.parameters()).device)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """(...) in [0, 1] -> (..., d)."""
        angles = (1000.0 * t.float())[..., None] * self.frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)  # (..., 256)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


class MLPBlock(nn.Module):
    """Block of the head for P = 1: adaptive LayerNorm, SwiGLU, gated residual."""

    modulations = 3

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = int(dim * 1.5)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.w1 = nn.Linear(dim, 2 * hidden)
        self.w2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor) -> Tensor:
        return torch.addcmul(x, swiglu(modulate(self.norm(x), scale, shift), self.w1, self.w2), gate)


class TransformerHeadBlock(nn.Module):
    """Block of the head for P > 1: full attention over the P tokens of a group, then SwiGLU, modulated and gated."""

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
        x = torch.addcmul(x, self.attn(modulate(self.norm1(x), scale1, shift1)), gate1)
        return torch.addcmul(x, swiglu(modulate(self.norm2(x), scale2, shift2), self.w1, self.w2), gate2)


class FinalLayer(nn.Module):
    """Modulated LayerNorm without affine parameters, then the projection to bits."""

    def __init__(self, dim: int, bits: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.ada_ln_modulation = nn.Linear(dim, 2 * dim)
        self.linear = nn.Linear(dim, bits)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scale, shift = self.ada_ln_modulation(y).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), scale, shift))


class HeadNetwork(nn.Module):
    """Predicts x_1 from x_t with MLP blocks (P = 1) or transformer blocks (P > 1)."""

    grad_checkpointing = False
    """In training, keep only the input of each block and recompute the rest in the backward pass."""

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
        """Predicts x_1: x_t (R, P, C), t (R,) in [0, 1], cond (R, P, D) -> (R, P, C)."""
        # t is (R, 1), as the condition is (R, P, D): with P = 1, the gradients of both biases are then the same node of
        # a compiled graph. Two nodes for equal sums in bfloat16 are what Inductor 2.13 cannot compile for a CPU.
        return self.denoise(x_t, self.time_embed(t[:, None]), self.cond_embed(cond))

    def denoise(self, x_t: Tensor, time: Tensor, cond: Tensor) -> Tensor:
        """Predicts x_1 from embedded inputs: x_t (R, P, C), time (R or 1, 1, d), cond (R, P, d) -> (R, P, C)."""
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
    """The head network and its loss."""

    def __init__(self, config: BitDanceConfig) -> None:
        super().__init__()
        self.net = HeadNetwork(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws Xavier-uniform weights; biases, modulations and the output projection start at zero."""
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
        """Computes the velocity: x_t (R, P, C), t (R,), cond (R, P, D) -> (R, P, C) float32."""
        dtype = self.net.input_proj.weight.dtype
        x_pred = self.net(x_t.to(dtype), t, cond.to(dtype)).float()
        return flow.velocity(x_pred, x_t, t[:, None, None])

    def loss(self, target: Tensor, cond: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
        """Computes the mean squared error of the velocity, a float32 scalar.

        Args:
            target: (R, P, C), +-1.
            cond: (R, P, D).
            t: (R,) timesteps in [0, 1], one per group.
            x_0: (R, P, C) standard normal noise, float32.
        """
        target = target.float()
        x_t = flow.interpolate(x_0, target, t[:, None, None])
        target_velocity = flow.velocity(target, x_t, t[:, None, None])
        return F.mse_loss(self.velocity(x_t, t, cond), target_velocity)
