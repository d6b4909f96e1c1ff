"""The order of tokens against indices written by hand, the mask, the rotary positions, and flipped bits."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from bitdance.models.layers import rotary_table
from bitdance.models.tokens import attention_blocks, flip_bits, grid_from_tokens, positions, tokens_from_grid
from bitdance.models.transformer import BitDance

RASTER = list(range(20))

# (image size, P, order): the raster indices (row * side + column) of the first 20 tokens, the place where the second
# row of patches starts (of tokens, in raster order), the 20 from there on, and the last 16.
ORDERS = {
    (256, 1, "patch"): (RASTER, 16, [*range(16, 36)], [*range(240, 256)]),
    (256, 4, "patch"): (
        [0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23, 8, 9, 24, 25],
        32,
        [32, 33, 48, 49, 34, 35, 50, 51, 36, 37, 52, 53, 38, 39, 54, 55, 40, 41, 56, 57],
        [232, 233, 248, 249, 234, 235, 250, 251, 236, 237, 252, 253, 238, 239, 254, 255],
    ),
    (256, 16, "patch"): (
        [0, 1, 2, 3, 16, 17, 18, 19, 32, 33, 34, 35, 48, 49, 50, 51, 4, 5, 6, 7],
        64,
        [64, 65, 66, 67, 80, 81, 82, 83, 96, 97, 98, 99, 112, 113, 114, 115, 68, 69, 70, 71],
        [204, 205, 206, 207, 220, 221, 222, 223, 236, 237, 238, 239, 252, 253, 254, 255],
    ),
    (256, 4, "standard"): (RASTER, 16, [*range(16, 36)], [*range(240, 256)]),
    (256, 16, "standard"): (RASTER, 16, [*range(16, 36)], [*range(240, 256)]),
    (512, 1, "patch"): (RASTER, 32, [*range(32, 52)], [*range(1008, 1024)]),
    (512, 4, "patch"): (
        [0, 1, 32, 33, 2, 3, 34, 35, 4, 5, 36, 37, 6, 7, 38, 39, 8, 9, 40, 41],
        64,
        [64, 65, 96, 97, 66, 67, 98, 99, 68, 69, 100, 101, 70, 71, 102, 103, 72, 73, 104, 105],
        [984, 985, 1016, 1017, 986, 987, 1018, 1019, 988, 989, 1020, 1021, 990, 991, 1022, 1023],
    ),
    (512, 16, "patch"): (
        [0, 1, 2, 3, 32, 33, 34, 35, 64, 65, 66, 67, 96, 97, 98, 99, 4, 5, 6, 7],
        128,
        [128, 129, 130, 131, 160, 161, 162, 163, 192, 193, 194, 195, 224, 225, 226, 227, 132, 133, 134, 135],
        [924, 925, 926, 927, 956, 957, 958, 959, 988, 989, 990, 991, 1020, 1021, 1022, 1023],
    ),
    (512, 4, "standard"): (RASTER, 32, [*range(32, 52)], [*range(1008, 1024)]),
    (512, 16, "standard"): (RASTER, 32, [*range(32, 52)], [*range(1008, 1024)]),
}


@pytest.mark.parametrize(("size", "p", "order"), ORDERS)
def test_order_of_tokens(size, p, order):
    first, place, later, last = ORDERS[size, p, order]
    config = tiny.config(p, grid=size // 16, token_order=order)
    grid = torch.arange(config.num_tokens).reshape(1, 1, config.grid, config.grid)
    sequence = tokens_from_grid(grid, config.patch)
    assert sequence.shape == (1, config.num_tokens, 1)
    assert sequence[0, :20, 0].tolist() == first
    assert sequence[0, place : place + 20, 0].tolist() == later
    assert sequence[0, -16:, 0].tolist() == last
    assert sorted(sequence.flatten().tolist()) == list(range(config.num_tokens))
    assert torch.equal(grid_from_tokens(sequence, config.patch), grid)
    indices = positions(config.grid, config.patch) @ torch.tensor([config.grid, 1])
    assert torch.equal(indices, sequence.flatten())


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_the_bits_of_a_token_and_the_images_of_a_batch_stay_together(patch):
    bits = torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = tokens_from_grid(bits, patch)
    for place, (row, column) in enumerate(positions(8, patch).tolist()):
        assert torch.equal(tokens[:, place], bits[:, :, row, column])
    assert torch.equal(grid_from_tokens(tokens, patch), bits)


def test_a_grid_need_not_be_square():
    wide = torch.arange(8).reshape(1, 1, 2, 4)
    assert tokens_from_grid(wide, 2).flatten().tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert tokens_from_grid(wide.mT, 2).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


# (image size, P, order): {place in the sequence of tokens: (x, y)}.
ROTARY = {
    (256, 1, "patch"): {0: (1.5, 1.5), 5: (6.5, 1.5), 16: (1.5, 2.5), 254: (15.5, 16.5)},
    (256, 4, "patch"): {0: (1.5, 1.5), 1: (2.5, 1.5), 2: (1.5, 2.5), 4: (3.5, 1.5), 32: (1.5, 3.5), 251: (14.5, 16.5)},
    (256, 16, "patch"): {3: (4.5, 1.5), 4: (1.5, 2.5), 16: (5.5, 1.5), 64: (1.5, 5.5), 239: (12.5, 16.5)},
    (256, 16, "standard"): {3: (4.5, 1.5), 4: (5.5, 1.5), 16: (1.5, 2.5), 64: (1.5, 5.5), 239: (16.5, 15.5)},
    (512, 1, "patch"): {0: (1.5, 1.5), 31: (32.5, 1.5), 32: (1.5, 2.5), 1022: (31.5, 32.5)},
    (512, 4, "patch"): {2: (1.5, 2.5), 5: (4.5, 1.5), 64: (1.5, 3.5), 1019: (30.5, 32.5)},
    (512, 16, "patch"): {4: (1.5, 2.5), 16: (5.5, 1.5), 128: (1.5, 5.5), 1007: (28.5, 32.5)},
    (512, 4, "standard"): {2: (3.5, 1.5), 5: (6.5, 1.5), 64: (1.5, 3.5), 1019: (28.5, 32.5)},
}


@pytest.mark.parametrize(("size", "p", "order"), ROTARY)
def test_rotary_positions(size, p, order):
    config = tiny.config(p, grid=size // 16, token_order=order, dim=64, n_layer=1, head_dim=64, cls_token_num=3)
    table = BitDance(config).rotary  # (K + N - 1, 32, 2): angles 0..15 turn with x, 16..31 with y
    prefix = 3 + p - 1
    assert table.shape == (3 + config.num_tokens - 1, 32, 2)
    assert torch.equal(table[:prefix], torch.tensor([1.0, 0.0]).expand(prefix, 32, 2))
    for place, (x, y) in ROTARY[size, p, order].items():
        angles = [position * 10000 ** (-2 * i / 32) for position in (x, y) for i in range(16)]
        expected = [[math.cos(angle), math.sin(angle)] for angle in angles]
        torch.testing.assert_close(table[prefix + place], torch.tensor(expected), rtol=0, atol=1e-5)


def test_rotary_table_of_a_small_head_by_hand():
    table = rotary_table(torch.tensor([[2.0, 3.0]]), 8)  # frequencies 1 and 1 / 100
    expected = [[math.cos(a), math.sin(a)] for a in (2.0, 0.02, 3.0, 0.03)]
    torch.testing.assert_close(table, torch.tensor([expected]), rtol=0, atol=1e-6)


def test_mask_is_causal_at_first_and_then_in_blocks():
    def mask(*sizes: int) -> torch.Tensor:
        blocks = attention_blocks(*sizes)
        return blocks[:, None] >= blocks

    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1],
    ]
    assert torch.equal(mask(2, 4, 2), torch.tensor(expected).bool())
    assert torch.equal(mask(0, 4, 4), torch.ones(4, 4).bool())
    assert torch.equal(mask(3, 5, 1), torch.ones(8, 8).tril().bool())


def test_flip_bits_follows_its_rule_exactly():
    bits = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0])
    r1 = torch.tensor([0.10, 0.24, 0.24, 0.30, 0.25])
    r2 = torch.tensor([0.10, 0.50, 0.50, 0.50, 0.50])  # thresholds at a rate of 1/2: 0.05, 0.25, 0.25, 0.25, 0.25
    assert flip_bits(bits, 0.5, r1, r2).tolist() == [1.0, -1.0, 1.0, -1.0, 1.0]
    assert torch.equal(flip_bits(bits, 0.0, torch.zeros(5), r2), bits)


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_flip_bits_flips_half_of_the_rate_on_average(rate):
    generator = torch.Generator().manual_seed(1)
    bits = torch.ones(400_000)
    flipped = flip_bits(bits, rate, torch.rand(400_000, generator=generator), torch.rand(400_000, generator=generator))
    assert torch.equal(flipped.abs(), bits)
    assert (flipped < 0).float().mean().item() == pytest.approx(rate / 2, abs=0.002)
