"""The kernel distance between two sets of features (KID, Bińkowski et al. 2018, arXiv 1801.01401).

An unbiased estimate of the squared maximum mean discrepancy: it may be negative, and small sets give no worse figure
on average, only a less certain one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bitdance.metrics.statistics import checked_features
from bitdance.runtime.errors import UserError

BLOCK = 2048
"""Rows that are turned to float64 at a time."""


class KIDResult(NamedTuple):
    """Mean and standard deviation over subsets, as the literature reports them (often times 1000)."""

    mean: float
    std: float


def kid(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate over all pairs, with the kernel (x . y / D + 1)^3.

    Args:
        x: (M, D) float32.
        y: (N, D) float32.

    Raises:
        UserError: fewer than two rows, different sizes, or values that are not finite.
    """
    x, y = _checked(x, y)
    m, n = len(x), len(y)
    within = _kernel_sum(x) / (m * (m - 1)) + _kernel_sum(y) / (n * (n - 1))
    return within - 2 * _kernel_sum(x, y) / (m * n)


def subset_kid(x: np.ndarray, y: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = 0) -> KIDResult:
    """The estimate over random subsets of both sets, without replacement within a subset.

    Args:
        x: (M, D) float32.
        y: (N, D) float32.
        subsets: how many.
        size: rows of each set in a subset.
        seed: decides the subsets.

    Raises:
        UserError: sets smaller than a subset, different sizes, or values that are not finite.
    """
    x, y = _checked(x, y)
    if subsets < 1 or not 2 <= size <= min(len(x), len(y)):
        raise UserError(f"{subsets} subsets of {size} rows cannot be drawn from {len(x)} and {len(y)}: ask for less.")
    random = np.random.RandomState(seed)
    values = [kid(x[random.permutation(len(x))[:size]], y[random.permutation(len(y))[:size]]) for _ in range(subsets)]
    return KIDResult(float(np.mean(values)), float(np.std(values)))


def _checked(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = checked_features(x, "the first features", at_least=2), checked_features(y, "the second features", at_least=2)
    if x.shape[1] != y.shape[1]:
        raise UserError(f"features of {x.shape[1]} and of {y.shape[1]} numbers cannot be compared.")
    return x, y


def _kernel_sum(x: np.ndarray, y: np.ndarray | None = None) -> float:
    """The sum of the kernel over all pairs; within x alone without those of a row with itself."""
    total, columns = 0.0, x if y is None else y
    for i in range(0, len(x), BLOCK):
        rows = x[i : i + BLOCK].astype(np.float64)
        for j in range(i if y is None else 0, len(columns), BLOCK):
            kernel = (rows @ columns[j : j + BLOCK].astype(np.float64).T / x.shape[1] + 1) ** 3
            if y is not None:
                total += kernel.sum()
            elif i == j:
                total += kernel.sum() - np.trace(kernel)
            else:
                total += 2 * kernel.sum()
    return float(total)
