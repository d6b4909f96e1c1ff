"""The reference sampler, the definition that `bitdance.sampling.sampler` is tested against.

It recomputes the whole sequence at every step and has a solver loop of its own, so that cache, guidance and solvers
have something independent to be compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitdance.models import flow
from bitdance.models.transformer import BitDance
from bitdance.sampling.sampler import NoiseFn


@torch.no_grad()
def sample_reference(
    model: BitDance,
    labels: Tensor,
    noise: NoiseFn,
    cfg_scale: float = 1.0,
    cfg_schedule: str = "linear",
    share_first: bool = False,
) -> Tensor:
    """Samples tokens as plainly as possible: (B,) int64 -> (B, N, C) +-1.

    With guidance (cfg_scale > 1) the second half of the rows is unconditional. Where the guidance of a step is exactly
    1 (the first, in the linear schedule) both halves are sampled independently unless `share_first`, so the
    unconditional rows continue from first tokens of their own: the published samples were drawn so.
    """
    config, p, b = model.config, model.config.parallel_num, len(labels)
    guided = cfg_scale > 1
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, model.null_class)])
    tokens = torch.zeros(len(labels), 0, config.bits, device=labels.device)
    for i in range(config.ar_steps):
        scale = flow.guidance_scale(cfg_scale, i, config.ar_steps, cfg_schedule) if guided else 1.0
        cond = model.forward_features(tokens, labels)[:, -p:] + model.pos_for_diff.weight[i * p : (i + 1) * p]
        if scale > 1 or (guided and share_first):
            new = integrate(model, cond, noise(i, False), scale).repeat(2, 1, 1)
        elif guided:
            new = integrate(model, cond, torch.cat([noise(i, False), noise(i, True)], dim=1))
        else:
            new = integrate(model, cond, noise(i, False))
        tokens = torch.cat([tokens, torch.where(new > 0, 1.0, -1.0)], dim=1)
    return tokens[:b]


@torch.no_grad()
def integrate(model: BitDance, cond: Tensor, noise: Tensor, scale: float | None = None) -> Tensor:
    """x before the sign: cond (R, P, D), noise (S + 1, R, P, C); with guidance R / 2 rows of noise and of x.

    Euler-Maruyama from t = 0 to 0.95, then one Euler step.
    """

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if scale is None:
            return model.head.velocity(x, t.expand(len(x)), cond)
        v_cond, v_null = model.head.velocity(torch.cat([x, x]), t.expand(2 * len(x)), cond).chunk(2)
        return v_null + scale * (v_cond - v_null)

    x, t = noise[0], torch.tensor(0.0, device=noise.device)
    s = model.config.time_shift
    grid = torch.linspace(0, 0.95, len(noise), device=noise.device)
    grid = (1 / s) / ((1 / s) + (1 / grid - 1))
    for dt, n in zip(grid[1:] - grid[:-1], noise[1:], strict=True):
        v = velocity(x, t)
        score = (t * v - x) / ((1 - t) ** 2 + t * (1 - t))
        x = x + (v + (1 - t) * score) * dt + (2.0 * (1.0 - t) * dt) ** 0.5 * n
        t = t + dt
    return x + velocity(x, torch.tensor(0.95, device=x.device)) * 0.05
