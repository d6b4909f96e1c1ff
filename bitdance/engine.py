"""The fast sampler: labels -> tokens -> images, with a key/value cache and embeddings computed once.

It shares the modules with the reference sampler of `bitdance.model`, nothing else, and is tested against it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from bitdance import flow, noise
from bitdance.autoencoder import Autoencoder, to_bytes
from bitdance.errors import UserError
from bitdance.model import BitDance, Noise
from bitdance.tokens import grid_from_tokens


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """Everything about sampling that changes an image, beside the model, the class and the noise.

    Attributes:
        num_steps: S, steps of the head's solver, without the last Euler step.
        cfg_scale: guidance; 1 or less switches it off.
        cfg_schedule: `linear` grows with the AR step from 1; `constant`.
        share_first: whether conditional and null rows share their first tokens too; the published figures did not.
    """

    num_steps: int = 100
    cfg_scale: float = 1.0
    cfg_schedule: str = "linear"
    share_first: bool = False

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise UserError(f"--sample-steps {self.num_steps} does not fit: it must be at least 1.")
        if not 0 <= self.cfg_scale < float("inf"):
            raise UserError(f"--cfg-scale {self.cfg_scale} does not fit: it must be a number from 0 on.")
        flow.guidance_scale(self.cfg_scale, 0, 1, self.cfg_schedule)


def image_noise(model: BitDance, seed: int, images: Tensor, num_steps: int) -> Noise:
    """The noise of images by their numbers: one call draws all that a step of sampling takes.

    Args:
        images: (B,) int64 numbers of the images in the job, on the device that samples.
    """
    p, c = model.config.parallel_num, model.config.bits

    def draw(step: int, null: bool) -> Tensor:
        stream = noise.SAMPLE_NULL if null else noise.SAMPLE
        numbers = noise.normal(seed, images, p * c, stream=stream, step=step, draws=num_steps + 1)
        return numbers.unflatten(-1, (p, c))  # (S + 1, B, P, C)

    return draw


@torch.no_grad()
def sample_tokens(
    model: BitDance,
    labels: Tensor,
    draw: Noise,
    settings: SampleSettings,
    progress: Callable[[], None] = lambda: None,
) -> Tensor:
    """Samples tokens: (B,) int64 labels -> (B, N, C) +-1.

    Args:
        draw: the noise of each step, see `image_noise`.
        progress: called after each of the N / P steps.
    """
    config, b = model.config, len(labels)
    guided = settings.cfg_scale > 1
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, model.null_class)])
    cache = model.new_cache(len(labels))
    made: list[Tensor] = []
    for i in range(config.ar_steps):
        cond = model.prefill(labels, cache) if i == 0 else model.step(made[-1], cache)
        scale = flow.guidance_scale(settings.cfg_scale, i, config.ar_steps, settings.cfg_schedule) if guided else 1.0
        together = scale > 1 or (guided and settings.share_first)
        numbers = draw(i, False)
        if guided and not together:
            numbers = torch.cat([numbers, draw(i, True)], dim=1)
        field = _velocity_field(model, cond, scale if together else None)
        x = flow.euler_maruyama(field, numbers, config.time_shift)
        new = torch.where(x > 0, 1.0, -1.0)
        made.append(torch.cat([new, new]) if together else new)
        progress()
    return torch.cat(made, dim=1)[:b]


def _velocity_field(model: BitDance, cond: Tensor, scale: float | None) -> Callable[[Tensor, Tensor], Tensor]:
    """The head as a function of (x, t), its condition embedded once.

    Args:
        cond: (R, P, D); with guidance the second half is unconditional.
        scale: of the guidance, or none; with guidance x has R / 2 rows, which both halves share.
    """
    net = model.head.net
    embedded = net.cond_embed(cond)

    def field(x: Tensor, t: Tensor) -> Tensor:
        rows = x if scale is None else torch.cat([x, x])
        x_pred = net.denoise(rows.to(cond.dtype), net.time_embed(t[None])[:, None], embedded).float()
        v = flow.velocity(x_pred, rows, t)
        if scale is None:
            return v
        v_cond, v_null = v.chunk(2)
        return flow.guide(v_cond, v_null, scale)

    return field


@torch.no_grad()
def decode_tokens(model: BitDance, autoencoder: Autoencoder, tokens: Tensor, chunk: int = 0) -> Tensor:
    """Decodes tokens (B, N, C) +-1 to bytes (B, H, W, 3) uint8, `chunk` images at a time (0: all)."""
    bits = grid_from_tokens(tokens, model.config.patch)
    parameter = next(autoencoder.parameters())
    parts = bits.to(parameter.dtype).split(chunk or len(bits))
    return torch.cat([to_bytes(autoencoder.decode(part)) for part in parts])


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
