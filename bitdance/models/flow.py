"""Rectified flow on the hypercube: probability path, velocity, timesteps, solvers and guidance.

x_1 in {-1, +1}^C is data, x_0 ~ N(0, I) is noise and x_t = (1 - t) x_0 + t x_1, so t = 0 is noise and t = 1 is data.
The network predicts x_1 (section 3.3 of arXiv 2602.14041). All functions are pure and compute in the dtype of their
tensors, float32 in sampling and training, except that the coefficients of solvers are float64 until they are used.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from bitdance.config import SolverName
from bitdance.runtime.errors import UserError

LAST_STEP = 0.05
"""Length of the deterministic Euler step, from t = 0.95 to 1, that ends every integration."""


def time_shift(t: Tensor, shift: float) -> Tensor:
    """Shifts timesteps towards noise for shift > 1: (1/s) / ((1/s) + (1/t - 1)); for shift = 1, t up to rounding."""
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


def time_grid(num_steps: int, shift: float = 1.0, end: float = 1 - LAST_STEP, power: float = 1.0) -> Tensor:
    """Returns the solver's timesteps from 0 to `end`, shifted: (num_steps + 1,) float32.

    They are end * (j / num_steps)^power before the shift: for a power above 1 denser near the noise.
    """
    grid = torch.linspace(0, end, num_steps + 1, dtype=torch.float32, device="cpu")
    return time_shift(grid if power == 1 else end * (grid / end) ** power, shift)


@dataclasses.dataclass(frozen=True)
class Solver:
    """A solver as a table: what it does after each evaluation of the network.

    Velocity and score are linear in x_t and the predicted x_1, and so is every solver. With D_j predicted from x_j at
    time t_j, the next x is

        x_{j+1} = a_j x_j + b_j D_j + c_j n_j + d_j y_{j-1}

    where y is x, or D for a solver that keeps predictions.

    Attributes:
        timesteps: (E,) float32, the times t_j of the E evaluations.
        coefficients: (E, 4): a, b, c and d; float64 as `make_solver` returns them, float32 after `to`.
        uses_previous: whether d is not zero, for each evaluation.
        num_draws: draws of noise that the solver needs: x_0, and n_j if c is not zero.
        keeps_predictions: whether y is D.
    """

    timesteps: Tensor
    coefficients: Tensor
    uses_previous: tuple[bool, ...]
    num_draws: int
    keeps_predictions: bool = False

    def to(self, device: torch.device) -> Solver:
        """Returns a copy to sample with on a device; `make_solver` returns one on the CPU."""
        return dataclasses.replace(
            self, timesteps=self.timesteps.to(device), coefficients=self.coefficients.to(device, torch.float32)
        )


def count_draws(name: str, num_steps: int) -> int:
    """Returns the draws of noise that a solver with S steps needs: x_0, and for those of the SDE one for each step."""
    return num_steps + 1 if name in ("euler-maruyama", "dpmpp-2m-sde") else 1


def make_solver(
    name: str, num_steps: int, shift: float = 1.0, end: float = 1 - LAST_STEP, power: float = 1.0
) -> Solver:
    """Returns a solver from noise to data with S steps from t = 0 to `end` and a last prediction there.

    The last prediction is made at `end` even if a time shift ends the grid earlier, as in the original, whose
    deterministic last Euler step from 0.95 to 1 divides and multiplies by 0.05, so that its result is the prediction.

    Args:
        name: `euler-maruyama` is the published one, for the reverse-time SDE: with the drift v + (1 - t) score(x, t),
            which is (1 + t) v - x, and the diffusion coefficient sqrt(2 (1 - t)). `dpmpp-2m-sde` solves the same SDE
            with its linear part integrated exactly and predictions extrapolated (see `_exponential_row`). `euler` and
            `heun` (of second order, with 2 S + 1 evaluations) integrate the probability-flow ODE dx = v dt.
        num_steps: S.
        shift: time shift of the grid.
        end: 0 < end <= 0.95.
        power: of the grid, see `time_grid`.

    Raises:
        UserError: unknown solver.
    """
    if name not in get_args(SolverName):
        raise UserError(f"solver={name!r} is unknown: use one of {', '.join(get_args(SolverName))}.")
    timesteps: list[Tensor] = []
    rows: list[tuple[float, float, float, float]] = []
    t = torch.zeros((), device="cpu")  # times are summed up in float32, as in the original
    previous = 0.0
    for dt in time_grid(num_steps, shift, end, power).diff():
        start, length = t.item(), dt.item()
        timesteps.append(t)
        t = t + dt
        if name == "dpmpp-2m-sde":
            rows.append(_exponential_row(previous, start, t.item()))
            previous = start
            continue
        rate = length / max(1 - start, LAST_STEP)  # v dt = rate (D - x)
        if name == "euler-maruyama":
            drift = (1 + start) * rate
            rows.append((1 - length - drift, drift, math.sqrt(2 * (1 - start) * length), 0.0))
        else:
            rows.append((1 - rate, rate, 0.0, 0.0))
        if name == "heun":
            # x_j is the end of the Euler step from x_{j-1}, so their difference is v dt at its start; the new x is
            # x_{j-1} + (v dt at the start + v dt at the end) / 2.
            timesteps.append(t)
            rate = length / max(1 - t.item(), LAST_STEP)
            rows.append(((1 - rate) / 2, rate / 2, 0.0, 0.5))
    timesteps.append(torch.full((), end, device="cpu"))
    rows.append((0.0, 1.0, 0.0, 0.0))
    coefficients = torch.tensor(rows, dtype=torch.float64, device="cpu")
    uses_previous = tuple(row[3] != 0 for row in rows)
    return Solver(
        torch.stack(timesteps), coefficients, uses_previous, count_draws(name, num_steps), name == "dpmpp-2m-sde"
    )


def _exponential_row(previous: float, t: float, s: float) -> tuple[float, float, float, float]:
    """Returns the coefficients of a step from t to s of DPM-Solver++(2M) for SDEs (arXiv 2211.01095) on this path.

    With the prediction D, the reverse-time SDE is dx = ((1 + t) D - 2 x) / (1 - t) dt + sqrt(2 (1 - t)) dw. For a
    constant D its solution is, with r = (1 - s) / (1 - t),

        x_s = r^2 x_t + (s - r^2 t) D + (1 - s) sqrt(1 - r^2) n

    since x = t D solves it without noise, deviations from it decay by r^2, and the noise gathered on the way has the
    variance (1 - s)^2 (1 - r^2). D is the prediction half-way, extrapolated linearly from the last two predictions;
    `previous` is the time of the one before, t itself or 0 at the first step.
    """
    r2 = ((1 - s) / (1 - t)) ** 2
    weight = s - r2 * t
    ahead = (s - t) / (2 * (t - previous)) if t > previous else 0.0
    return r2, weight * (1 + ahead), (1 - s) * math.sqrt(1 - r2), -weight * ahead


def solver_step(
    x: Tensor, prediction: Tensor, coefficients: Tensor, noise: Tensor | None = None, previous: Tensor | None = None
) -> Tensor:
    """Computes the next x, see `Solver`: `coefficients` (4,) on the device of x; absent terms are None."""
    a, b, c, d = coefficients.unbind()
    x = torch.addcmul(a * x, b, prediction)
    if noise is not None:
        x = torch.addcmul(x, c, noise)
    return x if previous is None else torch.addcmul(x, d, previous)


PredictFn = Callable[[Tensor, int], Tensor]
"""(x, index of the evaluation) -> predicted x_1. Guidance is up to the caller."""


def integrate(
    solver: Solver, predict_fn: PredictFn, noise: Tensor, step_fn: Callable[..., Tensor] = solver_step
) -> Tensor:
    """Integrates from noise to data.

    Args:
        solver: from `make_solver`, on the device of the noise.
        predict_fn: the guided prediction.
        noise: (draws, ...), at least `solver.num_draws` of them; noise[0] is x_0, noise[j + 1] is n_j.
        step_fn: `solver_step` or a compiled version of it.

    Returns:
        x of shape noise.shape[1:]; its sign is the token.
    """
    x, previous = noise[0], None
    coefficients = solver.coefficients.to(noise.dtype)
    for j in range(len(solver.timesteps)):
        draw = noise[j + 1] if j + 1 < solver.num_draws else None
        before = previous if solver.uses_previous[j] else None
        prediction = predict_fn(x, j)
        # Of a prediction a copy, since a CUDA graph overwrites it at the next call.
        kept = prediction.clone() if solver.keeps_predictions else x
        x, previous = step_fn(x, prediction, coefficients[j], draw, before), kept
    return x


def apply_cfg(cond: Tensor, null: Tensor, scale: float | Tensor) -> Tensor:
    """Applies classifier-free guidance: null + scale * (cond - null).

    The published samples guide velocities. To guide predictions is the same, since both have one x_t.
    """
    return torch.lerp(null, cond, scale)


def guidance_scale(cfg_scale: float, step: int, num_steps: int, schedule: str = "linear") -> float:
    """Returns the guidance scale of an autoregressive step.

    Args:
        cfg_scale: the scale that `linear` approaches, and that of `constant`.
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
