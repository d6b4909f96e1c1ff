"""Bits, indices, packing, and the extremes of the entropy loss."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdance.models.quantizer import entropy_loss, pack, quantize, straight_through, unpack


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_bit_is_plus_1_above_0_only(dtype):
    x = torch.tensor([-2.0, -1e-30, -0.0, 0.0, 1e-30, 3.0], dtype=dtype)
    bits = quantize(x)
    assert bits.dtype == dtype
    assert bits.tolist() == [-1, -1, -1, -1, 1, 1]


def test_straight_through_gives_exact_bits_and_passes_the_gradient():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    bits = straight_through(x)
    assert torch.equal(bits, quantize(x))
    weights = torch.arange(1000.0)
    (bits * weights).sum().backward()
    assert torch.equal(x.grad, weights)


def test_group_indices_by_hand():
    bits = -torch.ones(1, 16, 1, 2)
    bits[0, [0, 3], 0, 0] = 1  # group 0 of the first token: 1 + 8
    bits[0, 15, 0, 0] = 1  # group 1: 128
    bits[0, 8:, 0, 1] = 1  # the second token: 0, and all of group 1
    assert tiny.group_indices(bits).tolist() == [[9, 0], [128, 255]]


def test_group_indices_run_over_the_batch_and_then_in_raster_order():
    bits = -torch.ones(2, 8, 2, 2)
    for number, place in enumerate([(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0)]):
        bits[:, number][place] = 1
    assert tiny.group_indices(bits).tolist() == [[1, 2, 4, 8, 16, 32, 64, 0]]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_packing_goes_both_ways_and_agrees_with_the_indices(data):
    b, groups, side = (data.draw(st.integers(1, limit)) for limit in (3, 5, 3))
    size = b * side * side * groups
    values = data.draw(st.lists(st.integers(0, 255), min_size=size, max_size=size))
    packed = torch.tensor(values, dtype=torch.uint8).reshape(b, side * side, groups)
    tokens = unpack(packed)  # (B, N, C)
    assert tokens.shape == (b, side * side, 8 * groups)
    assert torch.equal(tokens.abs(), torch.ones_like(tokens))
    assert torch.equal(pack(tokens), packed)
    grid = tokens.mT.reshape(b, 8 * groups, side, side)
    assert torch.equal(tiny.group_indices(grid), packed.long().permute(2, 0, 1).reshape(groups, -1))


def test_unpacking_by_hand():
    bits = unpack(torch.tensor([5], dtype=torch.uint8))
    assert bits.dtype == torch.float32
    assert bits.tolist() == [1, -1, 1, -1, -1, -1, -1, -1]


def all_codes():
    """Every code of a group once, as a grid of 16 x 16 tokens."""
    return unpack(torch.arange(256, dtype=torch.uint8)[:, None]).mT.reshape(1, 8, 16, 16)


def test_entropy_loss_is_lowest_where_samples_are_sure_and_all_codes_used():
    loss = entropy_loss(all_codes())
    assert loss.per_sample.item() == pytest.approx(0, abs=1e-4)
    assert loss.codebook.item() == pytest.approx(math.log(256), abs=5e-3)  # eps in the logarithm
    assert loss.total.item() == pytest.approx(-math.log(256), abs=5e-3)


def test_entropy_loss_of_one_code_used_and_of_no_opinion():
    sure = entropy_loss(torch.ones(2, 16, 4, 4))
    assert [round(part.item(), 3) for part in sure] == [0, 0, 0]
    unsure = entropy_loss(torch.zeros(2, 16, 4, 4))
    assert unsure.per_sample.item() == pytest.approx(math.log(256), abs=1e-4)
    assert unsure.total.item() == pytest.approx(0, abs=5e-3)


def test_entropy_loss_of_two_codes_averages_over_samples_and_groups():
    x = torch.ones(1, 16, 1, 2)
    x[0, 8:] = -1  # group 1 uses another code, so the mean distribution has two
    loss = entropy_loss(x)
    assert loss.per_sample.item() == pytest.approx(0, abs=1e-4)
    assert loss.codebook.item() == pytest.approx(math.log(2), abs=1e-3)


def test_the_gradient_of_the_entropy_loss_makes_bits_surer():
    x = (0.01 * all_codes()).requires_grad_()
    entropy_loss(x).per_sample.backward()
    assert (x.grad * x < 0).all(), "going down the gradient moves away from 0"


def test_entropy_loss_keeps_float32_under_autocast():
    x = 0.02 * torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        inside = entropy_loss(x)
    assert torch.equal(inside.total, entropy_loss(x).total)
