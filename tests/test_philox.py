"""Philox against published vectors and a second implementation; independence of the batch; the laws of the numbers."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
import torch

from bitdance.models import philox

# From the reference implementation's file of known answers (Random123): counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
LARGEST = 2**32 - 1


def numbers(text):
    return [int(word, 16) for word in text.split()]


def philox_in_plain_python(counter, key):
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_known_answers(counter, key, result):
    out = philox.philox(tuple(map(torch.tensor, numbers(counter))), tuple(map(torch.tensor, numbers(key))))
    assert [int(word) for word in out] == numbers(result)
    assert philox_in_plain_python(numbers(counter), numbers(key)) == numbers(result)


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (7, 3), (LARGEST, LARGEST)])
def test_key_and_counter_of_every_word(seed, step):
    rows = torch.tensor([0, 5, LARGEST])
    out = philox.words(seed, rows, 9, stream=philox.TRAIN_FLIP, step=step, draws=2)
    assert out.shape == (2, 3, 12)
    for draw, (place, row), block in itertools.product(range(2), enumerate(rows.tolist()), range(3)):
        expected = philox_in_plain_python((block, draw, step, 18), (seed, row))
        assert out[draw, place, 4 * block : 4 * block + 4].tolist() == expected


@pytest.mark.parametrize("law", [philox.words, philox.uniform, philox.normal])
def test_an_images_numbers_do_not_depend_on_what_is_drawn_beside_them(law):
    def draw(rows, size=32, draws=5):
        return law(3, torch.tensor(rows), size, stream=philox.SAMPLE, step=2, draws=draws)

    together = draw([4, 9, 1000])
    assert torch.equal(draw([9])[:, 0], together[:, 1]), "the rest of the batch"
    assert torch.equal(draw([1000, 4, 9]), together[:, [2, 0, 1]]), "the place in the batch"
    assert torch.equal(draw([4, 9, 1000], draws=2), together[:2]), "the number of draws"
    assert torch.equal(draw([4, 9, 1000], size=8), together[..., :8]), "the number of elements"
    draw([77], size=1000)
    assert torch.equal(draw([4, 9, 1000]), together), "what was drawn before"


def test_every_part_of_key_and_counter_matters():
    streams = {value for name, value in vars(philox).items() if name.startswith(("SAMPLE", "TRAIN"))}
    names = [name for name in vars(philox) if name.startswith(("SAMPLE", "TRAIN"))]
    assert len(streams) == len(names), "two streams of one number"
    seen = set()
    for seed, step, stream in itertools.product((0, 1, LARGEST), (0, 1, LARGEST), sorted(streams)):
        out = philox.words(seed, torch.tensor([0, 1, LARGEST]), 12, stream=stream, step=step, draws=2)
        seen.update(map(tuple, out.reshape(-1, 4).tolist()))
    assert len(seen) == 3 * 3 * len(streams) * 3 * 3 * 2


@pytest.mark.parametrize("law", [philox.uniform, philox.normal])
def test_shape_and_type(law):
    for size in (1, 2, 3, 5, 32):
        out = law(0, torch.arange(3), size, stream=philox.SAMPLE, step=0, draws=2)
        assert out.shape == (2, 3, size) and out.dtype == torch.float32


@pytest.mark.parametrize("law", [philox.words, philox.uniform, philox.normal])
@pytest.mark.parametrize("wrong", [{"seed": -1}, {"seed": 2**32}, {"step": -1}, {"step": 2**32}])
def test_out_of_range(law, wrong):
    arguments = {"seed": 0, "step": 0, **wrong}
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"{name}={value} is invalid.*4294967295"):
        law(ids=torch.arange(2), size=4, stream=philox.SAMPLE, **arguments)


def test_uniform_numbers_are_the_upper_24_bits_and_below_1():
    arguments = {"stream": philox.TRAIN_CROP, "step": 1, "draws": 3}
    words = philox.words(5, torch.arange(100), 200, **arguments)
    u = philox.uniform(5, torch.arange(100), 200, **arguments)
    assert torch.equal(u.double(), (words // 2**8).double() / 2**24)
    assert u.min() >= 0 and u.max() < 1
    assert u.mean().item() == pytest.approx(1 / 2, abs=0.005)
    assert u.var().item() == pytest.approx(1 / 12, abs=0.002)


def test_the_largest_words_give_a_uniform_number_below_1_and_a_finite_normal(monkeypatch):
    for word in (0, LARGEST):
        monkeypatch.setattr(philox, "words", lambda *args, word=word, **kwargs: torch.full((1, 1, 4), word))
        assert 0 <= philox.uniform(0, torch.arange(1), 4, stream=0, step=0).max() < 1
        assert philox.normal(0, torch.arange(1), 4, stream=0, step=0).isfinite().all()


def normals(count):
    return philox.normal(11, torch.arange(100), count // 100, stream=philox.SAMPLE, step=4)[0]


def test_normals_against_box_and_muller_in_double_precision():
    words = philox.words(11, torch.arange(100), 2000, stream=philox.SAMPLE, step=4)[0].numpy()
    u = (words >> 8) / 2.0**24
    first, second = u[:, 0::2], u[:, 1::2]
    radius = np.sqrt(-2 * np.log(first + 2.0**-24))
    angle = 2 * np.pi * second - np.pi / 4
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    assert np.abs(normals(200_000).double().numpy() - expected.reshape(100, -1)).max() <= 1e-6


def test_normals_are_normal():
    x = normals(200_000).double()
    assert x.mean().item() == pytest.approx(0, abs=0.01)
    assert x.var().item() == pytest.approx(1, abs=0.015)
    assert (x**3).mean().item() == pytest.approx(0, abs=0.03)
    assert (x**4).mean().item() == pytest.approx(3, abs=0.08)
    values = x.flatten().sort().values
    below = 0.5 * (1 + torch.erf(values / math.sqrt(2)))
    expected = (torch.arange(len(values)) + 0.5) / len(values)
    assert (below - expected).abs().max().item() < 1.63 / math.sqrt(len(values)), "Kolmogorov and Smirnov, at 1 %"
    # Neighbours within a draw, and the same place in neighbouring rows, are uncorrelated.
    limit = 4 / math.sqrt(x.numel())
    assert abs((x[:, 0::2] * x[:, 1::2]).mean()) < 1.5 * limit
    assert abs((x[:, :-1] * x[:, 1:]).mean()) < limit
    assert abs((x[:-1] * x[1:]).mean()) < limit


def test_compiled_code_multiplies_no_index_by_a_large_constant(inductor_code):
    """Triton, the language of compiled code for GPUs, has indices of 32 bits and refuses such a product.

    The code of an index is the same for a CPU.
    """

    @torch.compile
    def draw(rows, step):
        return philox.words(7, rows, 48, stream=philox.TRAIN_NOISE, step=step, draws=2)

    draw(torch.arange(3), torch.tensor(5))
    code = "".join(inductor_code)
    assert str(0xD2511F53) in code
    assert not re.search(r"\d{10,}L? *\* *x\d|arange\(\w+, \d{10,}", code)


@pytest.mark.gpu
def test_the_device_draws_the_same():
    rows = torch.tensor([0, 17, LARGEST])
    arguments = {"size": 5000, "stream": philox.SAMPLE, "step": 3, "draws": 4}
    for law, tolerance in ((philox.words, 0), (philox.uniform, 0), (philox.normal, 1e-6)):
        here, there = law(9, rows, **arguments), law(9, rows.cuda(), **arguments)
        assert there.is_cuda
        torch.testing.assert_close(there.cpu(), here, rtol=0, atol=tolerance)
