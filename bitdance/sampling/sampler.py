"""The sampler: labels -> tokens, with a key/value cache, guidance and timestep embeddings computed once.

Tests compare it with a reference sampler that recomputes the whole sequence at every step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from bitdance.models import flow, philox
from bitdance.models.transformer import BitDance
from bitdance.runtime.errors import check_fields

NoiseFn = Callable[[int, bool], Tensor]
"""(autoregressive step, for the unconditional rows?) -> (draws, B, P, C) float32 standard normal noise."""

DenoiseFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t, time embedding, condition embedding) -> predicted x_1, as `HeadNetwork.denoise`."""

StepCallback = Callable[[int, int, Tensor], object]
"""Called after each autoregressive step with (steps done, steps in total, tokens so far (B, n, C))."""


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Settings that change the samples of a model, besides labels and noise.

    Attributes:
        num_steps: S, steps of the head's solver, without the last Euler step.
        cfg_scale: guidance scale; 1 or less disables guidance.
        cfg_schedule: `linear` grows from 1 with the autoregressive step; `constant`.
        share_first: whether conditional and unconditional rows share their first tokens; the published samples do not.
        solver: as for `flow.integrate`; `euler-maruyama` is the published one.
    """

    num_steps: int
    cfg_scale: float
    cfg_schedule: str = "linear"
    share_first: bool = False
    solver: str = "euler-maruyama"

    def __post_init__(self) -> None:
        check_fields(
            self, "num_steps", lambda value: isinstance(value, int) and value >= 1, "be at least 1, an integer"
        )
        check_fields(
            self,
            "cfg_scale",
            lambda value: isinstance(value, int | float) and 0 <= value < float("inf"),
            "be a finite number of at least 0",
        )
        flow.evaluation_timesteps(self.solver, 1)  # raises for an unknown solver
        flow.guidance_scale(self.cfg_scale, 0, 1, self.cfg_schedule)

    @property
    def num_draws(self) -> int:
        """Normal numbers per bit that the solver needs."""
        return self.num_steps + 1 if self.solver == "euler-maruyama" else 1


def sample_noise(model: BitDance, seed: int, sample_ids: Tensor, draws: int) -> NoiseFn:
    """Returns the noise of samples, a function of the seed and their ids alone.

    Args:
        model: gives P and C.
        seed: 0 <= seed < 2**32.
        sample_ids: (B,) int64, on the device that samples.
        draws: `SamplingConfig.num_draws`.
    """
    p, c = model.config.parallel_num, model.config.bits

    def noise_fn(step: int, unconditional: bool) -> Tensor:
        stream = philox.SAMPLE_NULL if unconditional else philox.SAMPLE
        noise = philox.normal(seed, sample_ids, p * c, stream=stream, step=step, draws=draws)
        return noise.unflatten(-1, (p, c))  # (draws, B, P, C)

    return noise_fn


@torch.no_grad()
def sample_tokens(
    model: BitDance,
    labels: Tensor,
    noise_fn: NoiseFn,
    config: SamplingConfig,
    callback: StepCallback | None = None,
    denoise: DenoiseFn | None = None,
) -> Tensor:
    """Samples tokens: (B,) int64 labels -> (B, N, C) +-1.

    With guidance the batch is doubled: the second half of the rows is unconditional. In a step whose guidance scale is
    exactly 1 (the first step of the linear schedule) both halves are sampled independently, unless `share_first`.

    Args:
        model: on the device of the labels.
        labels: (B,) int64.
        noise_fn: the noise of each step, from `sample_noise`.
        config: sampling settings.
        callback: called after each autoregressive step.
        denoise: a compiled version of `model.head.net.denoise`.
    """
    steps, b = model.config.ar_steps, len(labels)
    guided = config.cfg_scale > 1
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, model.null_class)])
    cache = model.new_cache(len(labels))
    sample_head = _head_sampler(model, config, denoise)
    groups: list[Tensor] = []
    for i in range(steps):
        cond = model.prefill(labels, cache) if i == 0 else model.step(groups[-1], cache)  # (R, P, D)
        scale = flow.guidance_scale(config.cfg_scale, i, steps, config.cfg_schedule) if guided else 1.0
        shared = scale > 1 or (guided and config.share_first)
        noise = noise_fn(i, False)  # (draws, B, P, C)
        if guided and not shared:
            noise = torch.cat([noise, noise_fn(i, True)], dim=1)  # (draws, 2 B, P, C)
        x = sample_head(cond, noise, scale if shared else None)
        new = torch.where(x > 0, 1.0, -1.0)
        groups.append(torch.cat([new, new]) if shared else new)  # (R, P, C)
        if callback is not None:
            callback(i + 1, steps, torch.cat(groups, dim=1)[:b])
    return torch.cat(groups, dim=1)[:b]


def _head_sampler(
    model: BitDance, config: SamplingConfig, denoise: DenoiseFn | None
) -> Callable[[Tensor, Tensor, float | None], Tensor]:
    """Returns a function that samples tokens from the head; the solver's timesteps are embedded only once.

    It integrates from noise to data and takes cond (R, P, D), noise (draws, R, P, C) and the guidance scale. With a
    scale the second half of the rows of cond is unconditional, and noise has R / 2 rows, shared by both halves.
    """
    net, shift = model.head.net, model.config.time_shift
    denoise_fn = denoise or net.denoise
    timesteps = flow.evaluation_timesteps(config.solver, config.num_steps, shift)
    time_embeddings = net.time_embed(timesteps.to(model.norm.weight.device))[:, None, None]  # (evaluations, 1, 1, d)

    def sample(cond: Tensor, noise: Tensor, scale: float | None) -> Tensor:
        embedded = net.cond_embed(cond.to(model.dtype))

        def velocity_fn(x: Tensor, t: Tensor, index: int) -> Tensor:
            rows = x if scale is None else torch.cat([x, x])
            x_pred = denoise_fn(rows.to(model.dtype), time_embeddings[index], embedded).float()
            v = flow.velocity(x_pred, rows, t)
            if scale is None:
                return v
            v_cond, v_null = v.chunk(2)
            return flow.apply_cfg(v_cond, v_null, scale)

        return flow.integrate(config.solver, velocity_fn, noise, config.num_steps, shift)

    return sample
