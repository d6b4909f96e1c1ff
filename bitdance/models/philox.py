"""Counter-based random numbers: each number is a function of its key and counter, without a generator state.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a key and a counter to four
random 32-bit words. The key is (seed, id): the id of a sample in a sampling job, an index into the global batch for the
noise of training, or the index of an image in its data set for crops and order. The counter is (element // 4, draw,
step, stream). The noise of a sample therefore depends neither on the rest of its batch nor on the number of processes,
and the words are equal on every device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bitdance.runtime.errors import UserError, check_seed

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# Streams, the last word of the counter, separate the uses of random numbers.
SAMPLE = 0
SAMPLE_NULL = 1
SAMPLE_ORDER = 2
SAMPLE_LABEL = 3
TRAIN_TIME = 16
TRAIN_NOISE = 17
TRAIN_FLIP = 18
TRAIN_LABEL = 19
TRAIN_CROP = 20
TRAIN_ORDER = 21
ENCODE_CROP = 32


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32 with 10 rounds.

    Args:
        counter, key: int64 tensors of values in [0, 2**32), broadcastable.

    Returns:
        Four int64 tensors of values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit products wrap in int64, which leaves their bits right; the mask undoes the sign of the shift.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def words(seed: int, ids: Tensor, size: int, *, stream: int, step: int | Tensor, draws: int = 1) -> Tensor:
    """Generates random 32-bit words, `draws` draws of `size` elements per id: (draws, B, 4 * ceil(size / 4)) int64.

    Args:
        seed: 0 <= seed < 2**32.
        ids: (B,) int64, 0 <= id < 2**32; the result is on the same device.
        size: elements per draw.
        stream: one of the stream constants of this module.
        step: of sampling or training, or the epoch: a number, 0 <= step < 2**32, or an int64 scalar on the device of
            the ids, whose range is not checked. With a scalar, compiled code is not specialized to the step.
        draws: number of draws; the index of a draw is part of the counter.

    Raises:
        UserError: the seed or the step is out of range.
    """
    check_seed(seed)
    if not isinstance(step, Tensor) and not 0 <= step <= _MASK:
        raise UserError(f"step={step} is invalid: it must be between 0 and {_MASK}.")
    device = ids.device
    # Without the mask, which changes no value, Inductor makes the product with a multiplier part of an index, which
    # Triton computes with 32 bits and refuses.
    element = torch.arange((size + 3) // 4, device=device) & _MASK
    draw = torch.arange(draws, device=device)[:, None, None]
    # Created on the device: copying numbers to a GPU would synchronize with it.
    step_word, stream_word, seed_word = (
        value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.int64, device=device)
        for value in (step, stream, seed)
    )
    out = philox((element, draw, step_word, stream_word), (seed_word, ids[:, None]))
    return torch.stack(out, dim=-1).flatten(-2)


def uniform(seed: int, ids: Tensor, size: int, *, stream: int, step: int | Tensor, draws: int = 1) -> Tensor:
    """Generates uniform numbers on [0, 1), multiples of 2**-24; arguments as in `words`: (draws, B, size) float32."""
    w = words(seed, ids, size, stream=stream, step=step, draws=draws)[..., :size]
    return (w >> 8).to(torch.float32) * 2.0**-24


def normal(seed: int, ids: Tensor, size: int, *, stream: int, step: int | Tensor, draws: int = 1) -> Tensor:
    """Generates standard normal numbers (Box-Muller), arguments as in `words`: (draws, B, size) float32.

    Words are equal on every device; logarithm and cosine are not, so normal numbers agree to 1e-6. No absolute value is
    above 5.77, since the uniform numbers have 24 bits.
    """
    w = words(seed, ids, size, stream=stream, step=step, draws=draws).unflatten(-1, (-1, 2)) >> 8  # 24 bits
    radius = torch.sqrt(-2.0 * torch.log((w[..., 0] + 1).to(torch.float32) * 2.0**-24))
    # The angle is one of four quarter turns plus an offset in [-pi / 4, pi / 4), since float32 is most precise near 0.
    # This shifts all angles by -pi / 4, which leaves them uniform.
    quarter, offset = w[..., 1] >> 22, (w[..., 1] & 0x3FFFFF).to(torch.float32) * 2.0**-22 - 0.5
    x, y = radius * torch.cos(offset * (math.pi / 2)), radius * torch.sin(offset * (math.pi / 2))
    turned, back = quarter % 2 == 1, quarter >= 2
    x, y = torch.where(turned, -y, x), torch.where(turned, x, y)
    return torch.where(back[..., None], -1.0, 1.0).mul(torch.stack([x, y], dim=-1)).flatten(-2)[..., :size]
