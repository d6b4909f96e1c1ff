"""The Kernel Inception Distance between two sets of features (KID, Bińkowski et al. 2018, arXiv 1801.01401).

It is an unbiased estimate of the squared maximum mean discrepancy, so it may be negative, and its mean does not depend
on the number of images.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from bitdance.metrics.statistics import validate_pair
from bitdance.runtime.errors import UserError

BLOCK = 2048
"""Rows that are converted to float64 at a time."""


class KIDResult(NamedTuple):
    """Mean and standard deviation over subsets, as in the literature (where they are often multiplied by 1000)."""

    mean: float
    std: float


def kid(x: np.ndarray, y: np.ndarray) -> float:
    """Computes the unbiased estimate over all pairs, with the kernel (x . y / D + 1)^3.

    Args:
        x, y: (M, D) and (N, D) float32.

    Raises:
        UserError: fewer than two rows, different dimensions, or values that are not finite.
    """
    x, y = validate_pair(x, y, at_least=2)
    within = sum((_kernel_sum(z, z) - _diagonal_sum(z)) / (len(z) * (len(z) - 1)) for z in (x, y))
    return within - 2 * _kernel_sum(x, y) / (len(x) * len(y))


def subset_kid(x: np.ndarray, y: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = 0) -> KIDResult:
    """Computes the estimate over random subsets of `size` rows of both sets, drawn without replacement.

    Args:
        x, y: (M, D) and (N, D) float32.

    Raises:
        UserError: sets smaller than a subset, different dimensions, or values that are not finite.
    """
    if subsets < 1 or not 2 <= size <= min(len(x), len(y)):
        raise UserError(f"subsets={subsets} of size={size} cannot be drawn from {len(x)} and {len(y)} rows.")
    random = np.random.RandomState(seed)
    values = [kid(x[random.permutation(len(x))[:size]], y[random.permutation(len(y))[:size]]) for _ in range(subsets)]
    return KIDResult(float(np.mean(values)), float(np.std(values)))


def _kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
    """Sums the kernel over all pairs of a row of x and a row of y."""
    return sum(float(((a @ b.T / x.shape[1] + 1) ** 3).sum()) for a in _blocks(x) for b in _blocks(y))


def _diagonal_sum(x: np.ndarray) -> float:
    """Sums the kernel over the pairs of a row with itself."""
    return sum(float(((np.square(a).mean(1) + 1) ** 3).sum()) for a in _blocks(x))


def _blocks(x: np.ndarray) -> Iterator[np.ndarray]:
    return (x[i : i + BLOCK].astype(np.float64) for i in range(0, len(x), BLOCK))
