"""Mean and covariance of features, accumulated in blocks, and the validation of both."""

from __future__ import annotations

import dataclasses

import numpy as np

from bitdance.runtime.errors import UserError

BLOCK = 2048
"""Rows that are converted to float64 at a time."""


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean and covariance of a set of features.

    Attributes:
        mean: (D,) float64, or float32 in files of ADM.
        covariance: (D, D) float64, normalized by N - 1.
    """

    mean: np.ndarray
    covariance: np.ndarray


class StatisticsAccumulator:
    """Accumulates the mean and covariance of features of `dim` dimensions.

    Rows are processed in blocks of `BLOCK` however they arrive, so the batch size does not change the result. Blocks
    are centred on their own means and merged as in Chan, Golub and LeVeque (1979), so large means lose no precision.
    """

    def __init__(self, dim: int) -> None:
        self._count = 0
        self._mean = np.zeros(dim)
        self._scatter = np.zeros((dim, dim))
        self._pending: list[np.ndarray] = []

    def add(self, features: np.ndarray) -> None:
        """Adds (n, D) float32 features; n may be 0.

        Raises:
            UserError: wrong shape, or values that are not finite; nothing is added then.
        """
        features = validate_features(features, "features", at_least=0)
        if features.shape[1] != len(self._mean):
            raise UserError(f"features of {features.shape[1]} dimensions follow features of {len(self._mean)}.")
        self._pending.append(features)
        if sum(map(len, self._pending)) >= BLOCK:
            rows = np.concatenate(self._pending)
            end = len(rows) - len(rows) % BLOCK
            for start in range(0, end, BLOCK):
                self._merge(rows[start : start + BLOCK])
            self._pending = [rows[end:]]

    def _merge(self, block: np.ndarray) -> None:
        count, mean = len(block), block.mean(0, dtype=np.float64)
        centred, total = block - mean, self._count + count
        difference = mean - self._mean
        self._scatter += centred.T @ centred
        self._scatter += np.outer(difference, difference * (self._count * count / total))
        self._mean = self._mean + difference * (count / total)
        self._count = total

    def statistics(self) -> Statistics:
        """Returns the statistics of all rows; no more can be added.

        Raises:
            UserError: fewer than two rows.
        """
        if sum(map(len, self._pending)):
            self._merge(np.concatenate(self._pending))
        if self._count < 2:
            raise UserError(f"the covariance of {self._count} images is undefined: give at least 2.")
        covariance = self._scatter / (self._count - 1)
        return Statistics(self._mean, (covariance + covariance.T) / 2)


def compute_statistics(features: np.ndarray) -> Statistics:
    """Computes the statistics of (N, D) float32 features.

    Raises:
        UserError: wrong shape, fewer than two rows, or values that are not finite.
    """
    features = validate_features(features, "features")
    accumulator = StatisticsAccumulator(features.shape[1])
    accumulator.add(features)
    return accumulator.statistics()


def validate_statistics(statistics: Statistics, name: str) -> Statistics:
    """Returns the statistics with at least one dimension and a float64 covariance.

    Raises:
        UserError: wrong shapes, values that are not finite, or a matrix that is no covariance.
    """
    mean, covariance = np.atleast_1d(statistics.mean), np.atleast_2d(statistics.covariance)
    has_shapes = mean.ndim == 1 and len(mean) > 0 and covariance.shape == (len(mean), len(mean))
    if not has_shapes or mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        found = f"{mean.dtype} of shape {mean.shape} and {covariance.dtype} of shape {covariance.shape}"
        raise UserError(f"{name} must be floats of shapes (D,) and (D, D), not {found}.")
    covariance = covariance.astype(np.float64, copy=False)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{name} must be finite: a feature was infinite or NaN.")
    tolerance = 1e-6 * np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > tolerance or np.diagonal(covariance).min() < -tolerance:
        raise UserError(f"{name} must have a symmetric covariance without negative variances.")
    return Statistics(mean, covariance)


def validate_features(features: np.ndarray, name: str, at_least: int = 1) -> np.ndarray:
    """Returns the features as a contiguous float32 array (N, D), without a copy where they are one.

    Raises:
        UserError: not a two-dimensional array of finite floats, or fewer than `at_least` rows.
    """
    features = np.asarray(features)
    if features.ndim != 2 or features.shape[1] == 0 or features.dtype.kind != "f":
        raise UserError(f"{name} must be floats of shape (N, D), not {features.dtype} of shape {features.shape}.")
    if len(features) < at_least:
        raise UserError(f"{name} have {len(features)} rows: at least {at_least} are needed; give more images.")
    with np.errstate(over="ignore"):  # overflow gives infinities, which are refused below
        features = np.ascontiguousarray(features, dtype=np.float32)
    if not np.isfinite(features).all():
        raise UserError(f"{name} must be finite: a feature is infinite or NaN.")
    return features


def validate_pair(reference: np.ndarray, sample: np.ndarray, at_least: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns both sets of features as `validate_features` does; their dimensions must be equal too."""
    reference = validate_features(reference, "reference features", at_least)
    sample = validate_features(sample, "sample features", at_least)
    if reference.shape[1] != sample.shape[1]:
        raise UserError(f"features of {reference.shape[1]} and of {sample.shape[1]} dimensions cannot be compared.")
    return reference, sample
