"""Rectified flow on the hypercube: the path from noise to bits, its velocity and score, and how to integrate it.

x_1 in {-1, +1}^C is data, x_0 ~ N(0, I) noise, x_t = (1 - t) x_0 + t x_1, so t = 0 is noise. The network predicts x_1
(section 3.3 of arXiv 2602.14041). Everything here is a pure function and computes in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitdance.runtime.errors import UserError

LAST_STEP = 0.05
"""The plain Euler step that ends every integration, from t = 0.95."""


def time_shift(t: Tensor, shift: float) -> Tensor:
    """Shifts times towards noise for shift > 1: (1/s) / ((1/s) + (1/t - 1)); shift 1 is the identity up to rounding."""
    return (1 / shift) / ((1 / shift) + (1 / t - 1))


def logit_normal_timesteps(normal: Tensor, mean: float, std: float, shift: float = 1.0) -> Tensor:
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


Field = Callable[[Tensor, Tensor, int], Tensor]
"""(x, t, number of the evaluation, from 0) -> velocity; t a float32 scalar tensor. Guidance is the caller's."""


def euler_maruyama(field: Field, noise: Tensor, shift: float = 1.0) -> Tensor:
    """Integrates the reverse-time SDE from noise to data, then takes one plain Euler step of 0.05: S + 1 evaluations.

    Args:
        noise: (S + 1, ...) float32; noise[0] is x_0, noise[j + 1] belongs to step j of S.
        shift: the time shift of the grid. The last step starts from t = 0.95 even with a shift, as in the original.

    Returns:
        x of shape noise.shape[1:], float32; its sign is the token.
    """
    num_steps = len(noise) - 1
    x, t = noise[0], torch.zeros((), device=noise.device)
    for j, dt in enumerate(time_grid(num_steps, shift, noise.device).diff()):
        v = field(x, t, j)
        drift = v + (1 - t) * score(v, x, t)
        x = x + drift * dt + (2.0 * (1.0 - t) * dt) ** 0.5 * noise[j + 1]
        t = t + dt
    return _last_step(field, x, num_steps)


def euler(field: Field, x_0: Tensor, num_steps: int, shift: float = 1.0) -> Tensor:
    """Integrates the probability-flow ODE by Euler's rule on the grid of `euler_maruyama`: S + 1 evaluations."""
    x, t = x_0, torch.zeros((), device=x_0.device)
    for j, dt in enumerate(time_grid(num_steps, shift, x_0.device).diff()):
        x = x + field(x, t, j) * dt
        t = t + dt
    return _last_step(field, x, num_steps)


def heun(field: Field, x_0: Tensor, num_steps: int, shift: float = 1.0) -> Tensor:
    """Integrates the probability-flow ODE by Heun's rule, of second order, on the same grid: 2 S + 1 evaluations."""
    x, t = x_0, torch.zeros((), device=x_0.device)
    for j, dt in enumerate(time_grid(num_steps, shift, x_0.device).diff()):
        v = field(x, t, 2 * j)
        t = t + dt
        x = x + (v + field(x + v * dt, t, 2 * j + 1)) / 2 * dt
    return _last_step(field, x, 2 * num_steps)


def _last_step(field: Field, x: Tensor, number: int) -> Tensor:
    t = torch.full((), 1 - LAST_STEP, device=x.device)
    return x + field(x, t, number) * LAST_STEP


SOLVERS = ("euler-maruyama", "euler", "heun")
"""The published one, and two that draw no noise on the way."""


def integrate(solver: str, field: Field, noise: Tensor, num_steps: int, shift: float = 1.0) -> Tensor:
    """Runs the solver of that name.

    Args:
        noise: (S + 1, ...) for `euler-maruyama`, (1, ...) suffices for the others; noise[0] is x_0.

    Raises:
        UserError: unknown solver.
    """
    if solver == "euler-maruyama":
        return euler_maruyama(field, noise[: num_steps + 1], shift)
    if solver == "euler":
        return euler(field, noise[0], num_steps, shift)
    if solver == "heun":
        return heun(field, noise[0], num_steps, shift)
    raise UserError(f"unknown solver {solver!r}: use {', '.join(SOLVERS[:-1])} or {SOLVERS[-1]}.")


def evaluation_timesteps(solver: str, num_steps: int, shift: float = 1.0) -> Tensor:
    """The times at which a solver evaluates its field, in order: (evaluations,) float32."""
    asked: list[Tensor] = []

    def field(x: Tensor, t: Tensor, number: int) -> Tensor:
        asked.append(t)
        return torch.zeros_like(x)

    integrate(solver, field, torch.zeros(num_steps + 1, 1), num_steps, shift)
    return torch.stack(asked)


def apply_cfg(v_cond: Tensor, v_null: Tensor, scale: float) -> Tensor:
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
