"""Rectified flow on the hypercube: probability path, velocity, score, timesteps, solvers and guidance.

x_1 in {-1, +1}^C is data, x_0 ~ N(0, I) is noise and x_t = (1 - t) x_0 + t x_1, so t = 0 is noise and t = 1 is data.
The network predicts x_1 (section 3.3 of arXiv 2602.14041). All functions are pure and compute in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitdance.runtime.errors import UserError

LAST_STEP = 0.05
"""Length of the deterministic Euler step, from t = 0.95 to 1, that ends every integration."""


def time_shift(t: Tensor, shift: float) -> Tensor:
    """Shifts timesteps towards noise for shift > 1: (1/s) / ((1/s) + (1/t - 1)); the identity for shift = 1."""
    return (1 / shift) / ((1 / shift) + (1 / t - 1))


def logit_normal_timesteps(normal: Tensor, mean: float, std: float, shift: float = 1.0) -> Tensor:
    """Maps standard normal numbers to logit-normal timesteps, sigmoid(std * n + mean), shifted; same shape."""
    t = torch.sigmoid(normal * std + mean)
    return t if shift == 1.0 else time_shift(t, shift)


def interpolate(x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
    """Computes x_t = (1 - t) x_0 + t x_1."""
    return (1.0 - t) * x_0 + t * x_1


def velocity(x_pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Computes the velocity towards a predicted x_1: (x_pred - x_t) / max(1 - t, 0.05)."""
    return (x_pred - x_t) / (1 - t).clamp_min(LAST_STEP)


def score(v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Computes the score of the marginal at time t from the velocity: (t v - x) / ((1-t)^2 + t (1-t))."""
    return (t * v - x_t) / ((1 - t) ** 2 + t * (1 - t))


def time_grid(num_steps: int, shift: float = 1.0, device: torch.device | None = None) -> Tensor:
    """Returns the solver's timesteps from 0 to 0.95: (num_steps + 1,) float32."""
    grid = torch.linspace(0, 1 - LAST_STEP, num_steps + 1, device=device, dtype=torch.float32)
    return time_shift(grid, shift)


VelocityFn = Callable[[Tensor, Tensor, int], Tensor]
"""(x, t, index of the evaluation) -> velocity; t is a float32 scalar tensor. Guidance is up to the caller."""


def euler_maruyama(velocity_fn: VelocityFn, noise: Tensor, shift: float = 1.0) -> Tensor:
    """Integrates the reverse-time SDE with S Euler-Maruyama steps and one Euler step of 0.05: S + 1 evaluations.

    Args:
        velocity_fn: the guided velocity.
        noise: (S + 1, ...) float32; noise[0] is x_0 and noise[j + 1] is used in step j.
        shift: time shift of the grid. The last step starts from t = 0.95 even with a shift, as in the original.

    Returns:
        x of shape noise.shape[1:], float32; its sign is the token.
    """
    num_steps = len(noise) - 1
    x, t = noise[0], torch.zeros((), device=noise.device)
    for j, dt in enumerate(time_grid(num_steps, shift, noise.device).diff()):
        v = velocity_fn(x, t, j)
        drift = v + (1 - t) * score(v, x, t)
        x = x + drift * dt + (2.0 * (1.0 - t) * dt) ** 0.5 * noise[j + 1]
        t = t + dt
    return _last_step(velocity_fn, x, num_steps)


def euler(velocity_fn: VelocityFn, x_0: Tensor, num_steps: int, shift: float = 1.0) -> Tensor:
    """Integrates the probability-flow ODE by Euler's method on the grid of `euler_maruyama`: S + 1 evaluations."""
    x, t = x_0, torch.zeros((), device=x_0.device)
    for j, dt in enumerate(time_grid(num_steps, shift, x_0.device).diff()):
        x = x + velocity_fn(x, t, j) * dt
        t = t + dt
    return _last_step(velocity_fn, x, num_steps)


def heun(velocity_fn: VelocityFn, x_0: Tensor, num_steps: int, shift: float = 1.0) -> Tensor:
    """Integrates the probability-flow ODE by Heun's second-order method on the same grid: 2 S + 1 evaluations."""
    x, t = x_0, torch.zeros((), device=x_0.device)
    for j, dt in enumerate(time_grid(num_steps, shift, x_0.device).diff()):
        v = velocity_fn(x, t, 2 * j)
        t = t + dt
        x = x + (v + velocity_fn(x + v * dt, t, 2 * j + 1)) / 2 * dt
    return _last_step(velocity_fn, x, 2 * num_steps)


def _last_step(velocity_fn: VelocityFn, x: Tensor, index: int) -> Tensor:
    t = torch.full((), 1 - LAST_STEP, device=x.device)
    return x + velocity_fn(x, t, index) * LAST_STEP


def integrate(solver: str, velocity_fn: VelocityFn, noise: Tensor, num_steps: int, shift: float = 1.0) -> Tensor:
    """Runs a solver by its name.

    Args:
        solver: `euler-maruyama`, the published one, or `euler` or `heun`, which are deterministic.
        velocity_fn: the guided velocity.
        noise: (S + 1, ...) for `euler-maruyama`, (1, ...) is enough for the others; noise[0] is x_0.
        num_steps: S.
        shift: time shift of the grid.

    Raises:
        UserError: unknown solver.
    """
    if solver == "euler-maruyama":
        return euler_maruyama(velocity_fn, noise[: num_steps + 1], shift)
    if solver == "euler":
        return euler(velocity_fn, noise[0], num_steps, shift)
    if solver == "heun":
        return heun(velocity_fn, noise[0], num_steps, shift)
    raise UserError(f"solver={solver!r} is unknown: use euler-maruyama, euler or heun.")


def evaluation_timesteps(solver: str, num_steps: int, shift: float = 1.0) -> Tensor:
    """Returns the timesteps at which a solver evaluates the velocity, in order: (evaluations,) float32."""
    timesteps: list[Tensor] = []

    def record(x: Tensor, t: Tensor, index: int) -> Tensor:
        timesteps.append(t)
        return torch.zeros_like(x)

    integrate(solver, record, torch.zeros(num_steps + 1, 1), num_steps, shift)
    return torch.stack(timesteps)


def apply_cfg(v_cond: Tensor, v_null: Tensor, scale: float) -> Tensor:
    """Applies classifier-free guidance to velocities: v_null + scale * (v_cond - v_null)."""
    return v_null + scale * (v_cond - v_null)


def guidance_scale(cfg_scale: float, step: int, num_steps: int, schedule: str = "linear") -> float:
    """Returns the guidance scale of an autoregressive step.

    Args:
        cfg_scale: the final scale.
        step: 0 <= step < num_steps.
        num_steps: autoregressive steps, N / P.
        schedule: `linear` grows from exactly 1, `constant` is cfg_scale throughout.

    Raises:
        UserError: unknown schedule.
    """
    if schedule == "constant":
        return cfg_scale
    if schedule == "linear":
        return 1.0 + (cfg_scale - 1.0) * step / num_steps
    raise UserError(f"cfg_schedule={schedule!r} is unknown: use linear or constant.")
