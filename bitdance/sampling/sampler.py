"""The fast sampler: labels -> tokens -> images, with a key/value cache and embeddings computed once.

It shares the modules with the reference sampler, nothing else, and is tested against it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from bitdance.models import flow, philox
from bitdance.models.autoencoder import Autoencoder, to_uint8
from bitdance.models.tokens import grid_from_tokens
from bitdance.models.transformer import BitDance, Noise
from bitdance.runtime.errors import UserError

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t, embedded time, embedded condition) -> predicted x_1, as `HeadNetwork.denoise`."""


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """Everything about sampling that changes an image, beside the model, the class and the noise.

    Attributes:
        num_steps: S, steps of the head's solver, without the last Euler step.
        cfg_scale: guidance; 1 or less switches it off.
        cfg_schedule: `linear` grows with the AR step from 1; `constant`.
        share_first: whether conditional and null rows share their first tokens too; the published figures did not.
        solver: one of `flow.SOLVERS`; the published one is `euler-maruyama`.
    """

    num_steps: int = 100
    cfg_scale: float = 1.0
    cfg_schedule: str = "linear"
    share_first: bool = False
    solver: str = "euler-maruyama"

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise UserError(f"--sample-steps {self.num_steps} does not fit: it must be at least 1.")
        if not 0 <= self.cfg_scale < float("inf"):
            raise UserError(f"--cfg-scale {self.cfg_scale} does not fit: it must be a number from 0 on.")
        if self.solver not in flow.SOLVERS:
            raise UserError(f"there is no solver {self.solver!r}: use one of {', '.join(flow.SOLVERS)}.")
        flow.guidance_scale(self.cfg_scale, 0, 1, self.cfg_schedule)

    @property
    def num_draws(self) -> int:
        """Draws of normal numbers that the solver takes for a token."""
        return self.num_steps + 1 if self.solver == "euler-maruyama" else 1


def image_noise(model: BitDance, seed: int, images: Tensor, draws: int) -> Noise:
    """The noise of images by their numbers: one call draws all that a step of sampling takes.

    Args:
        images: (B,) int64 numbers of the images in the job, on the device that samples.
        draws: of a token, `SampleSettings.num_draws`.
    """
    p, c = model.config.parallel_num, model.config.bits

    def draw(step: int, null: bool) -> Tensor:
        stream = philox.SAMPLE_NULL if null else philox.SAMPLE
        numbers = philox.normal(seed, images, p * c, stream=stream, step=step, draws=draws)
        return numbers.unflatten(-1, (p, c))  # (draws, B, P, C)

    return draw


@torch.no_grad()
def sample_tokens(
    model: BitDance,
    labels: Tensor,
    draw: Noise,
    settings: SampleSettings,
    progress: Callable[[], None] = lambda: None,
    denoise: Denoise | None = None,
) -> Tensor:
    """Samples tokens: (B,) int64 labels -> (B, N, C) +-1.

    Args:
        draw: the noise of each step, see `image_noise`.
        progress: called after each of the N / P steps.
        denoise: a compiled or captured form of `model.head.net.denoise`, if the caller has one.
    """
    config, b = model.config, len(labels)
    guided = settings.cfg_scale > 1
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, model.null_class)])
    cache = model.new_cache(len(labels))
    head = _Head(model, settings, denoise)
    made: list[Tensor] = []
    for i in range(config.ar_steps):
        cond = model.prefill(labels, cache) if i == 0 else model.step(made[-1], cache)
        scale = flow.guidance_scale(settings.cfg_scale, i, config.ar_steps, settings.cfg_schedule) if guided else 1.0
        together = scale > 1 or (guided and settings.share_first)
        numbers = draw(i, False)
        if guided and not together:
            numbers = torch.cat([numbers, draw(i, True)], dim=1)
        x = head.sample(cond, numbers, scale if together else None)
        new = torch.where(x > 0, 1.0, -1.0)
        made.append(torch.cat([new, new]) if together else new)
        progress()
    return torch.cat(made, dim=1)[:b]


class _Head:
    """The head with what is the same at every step: its times are embedded once for all tokens."""

    def __init__(self, model: BitDance, settings: SampleSettings, denoise: Denoise | None) -> None:
        self.settings, self.shift = settings, model.config.time_shift
        self.cond_embed = model.head.net.cond_embed
        self.denoise = denoise or model.head.net.denoise
        times = flow.evaluation_timesteps(settings.solver, settings.num_steps, self.shift)
        self.times = model.head.net.time_embed(times.to(model.norm.weight.device))[:, None, None]  # (S + 1, 1, 1, d)

    def sample(self, cond: Tensor, noise: Tensor, scale: float | None) -> Tensor:
        """x before the sign.

        Args:
            cond: (R, P, D); with guidance the second half is unconditional.
            noise: (draws, R, P, C); with guidance R / 2 rows, which both halves share.
            scale: of the guidance, or none.
        """
        embedded = self.cond_embed(cond)

        def field(x: Tensor, t: Tensor, number: int) -> Tensor:
            rows = x if scale is None else torch.cat([x, x])
            v = flow.velocity(self.denoise(rows.to(cond.dtype), self.times[number], embedded).float(), rows, t)
            if scale is None:
                return v
            v_cond, v_null = v.chunk(2)
            return flow.apply_cfg(v_cond, v_null, scale)

        return flow.integrate(self.settings.solver, field, noise, self.settings.num_steps, self.shift)


@torch.no_grad()
def decode_tokens(model: BitDance, autoencoder: Autoencoder, tokens: Tensor, chunk: int = 0) -> Tensor:
    """Decodes tokens (B, N, C) +-1 to bytes (B, H, W, 3) uint8, `chunk` images at a time (0: all)."""
    bits = grid_from_tokens(tokens, model.config.patch)
    parameter = next(autoencoder.parameters())
    parts = bits.to(parameter.dtype).split(chunk or len(bits))
    return torch.cat([to_uint8(autoencoder.decode(part)) for part in parts])


def check_fit(model: BitDance, autoencoder: Autoencoder) -> None:
    """Checks that an autoencoder reads the bits that a model makes.

    Raises:
        UserError: they have different numbers of bits a token.
    """
    if model.config.bits != autoencoder.config.bits:
        raise UserError(
            f"the model makes tokens of {model.config.bits} bits and the autoencoder reads {autoencoder.config.bits}: "
            "name the autoencoder that the model was trained with."
        )
