"""Rectified flow on the hypercube: the path from noise to bits, its velocity and score, and how to integrate it.

x_1 in {-1, +1}^C is data, x_0 ~ N(0, I) noise, x_t = (1 - t) x_0 + t x_1, so t = 0 is noise. The network predicts x_1
(section 3.3 of arXiv 2602.14041). Everything here is a pure function and computes in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitdance.errors import UserError

LAST_STEP = 0.05
"""The plain Euler step that ends every integration, from t = 0.95."""


def time_shift(t: Tensor, shift: float) -> Tensor:
    """Shifts times towards noise for shift > 1: (1/s) / ((1/s) + (1/t - 1)); shift 1 is the identity up to rounding."""
    return (1 / shift) / ((1 / shift) + (1 / t - 1))


def training_time(normal: Tensor, mean: float, std: float, shift: float = 1.0) -> Tensor:
    """The logit-normal law of training times: sigmoid(std * n + mean), shifted; same shape as `normal`."""
    t = torch.sigmoid(normal * std + mean)
    return t if shift == 1.0 else time_shift(t, shift)


def interpolate(x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t x_1."""
    return (1.0 - t) * x_0 + t * x_1


def velocity(x_pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The velocity towards a predicted x_1: (x_pred - x_t) / max(1 - t, 0.05)."""
    return (x_pred - x_t) / (1 - t).clamp_min(LAST_STEP)


def score(v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The score of the marginal at time t, from the velocity: (t v - x) / ((1-t)^2 + t (1-t))."""
    return (t * v - x_t) / ((1 - t) ** 2 + t * (1 - t))


def time_grid(num_steps: int, shift: float = 1.0, device: torch.device | None = None) -> Tensor:
    """The num_steps + 1 times from 0 to 0.95 between which the solver steps: (num_steps + 1,) float32."""
    grid = torch.linspace(0, 1 - LAST_STEP, num_steps + 1, device=device, dtype=torch.float32)
    return time_shift(grid, shift)


def euler_maruyama(field: Callable[[Tensor, Tensor], Tensor], noise: Tensor, shift: float = 1.0) -> Tensor:
    """Integrates the reverse-time SDE from noise to data, then takes one plain Euler step of 0.05.

    Args:
        field: (x, t) -> velocity, t a float32 scalar tensor; guidance is the caller's.
        noise: (S + 1, ...) float32; noise[0] is x_0, noise[j + 1] belongs to step j of S.
        shift: the time shift of the grid. The last step starts from t = 0.95 even with a shift, as in the original.

    Returns:
        x of shape noise.shape[1:], float32; its sign is the token.
    """
    num_steps = len(noise) - 1
    grid = time_grid(num_steps, shift, noise.device)
    dt = grid[1:] - grid[:-1]
    x, t = noise[0], torch.zeros((), device=noise.device)
    for j in range(num_steps):
        v = field(x, t)
        drift = v + (1 - t) * score(v, x, t)
        x = x + drift * dt[j] + (2.0 * (1.0 - t) * dt[j]) ** 0.5 * noise[j + 1]
        t = t + dt[j]
    t_last = torch.full_like(t, 1 - LAST_STEP)
    return x + field(x, t_last) * LAST_STEP


def guide(v_cond: Tensor, v_null: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance of velocities: v_null + scale * (v_cond - v_null)."""
    return v_null + scale * (v_cond - v_null)


def guidance_scale(cfg_scale: float, step: int, num_steps: int, schedule: str = "linear") -> float:
    """The guidance of AR step `step` of `num_steps`: `linear` grows from exactly 1, `constant` is cfg_scale throughout.

    Raises:
        UserError: unknown schedule.
    """
    if schedule == "constant":
        return cfg_scale
    if schedule == "linear":
        return 1.0 + (cfg_scale - 1.0) * step / num_steps
    raise UserError(f"unknown guidance schedule {schedule!r}: use linear or constant.")
