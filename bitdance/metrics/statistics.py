"""Mean and covariance of features, accumulated in blocks and merged, and those that ADM's reference files hold."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

import numpy as np

from bitdance.runtime.errors import UserError

BLOCK = 2048
"""Rows that are turned to float64 at a time."""


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What the Fréchet distance needs of a set of features.

    Attributes:
        mean: (D,), float64, or float32 where it is ADM's.
        covariance: (D, D) float64, normalised by count - 1.
        count: number of rows; None where a file does not say.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None


class Accumulator:
    """Sums up features block by block; what several processes have summed up can be merged.

    Deviations are taken from the mean of their own block and blocks are joined as in Chan, Golub and LeVeque (1979), so
    that large means do not cost digits. Neither the blocks nor their order matter beyond the rounding of float64.

    Attributes:
        count: rows so far.
        mean: (D,) float64, their mean.
        scatter: (D, D) float64, the sum of outer products of deviations from the mean.
        sum32: (D,) float32, the plain running sum, which does depend on the order.
    """

    def __init__(self, dim: int):
        self.count = 0
        self.mean = np.zeros(dim)
        self.scatter = np.zeros((dim, dim))
        self.sum32 = np.zeros(dim, np.float32)

    def add(self, features: np.ndarray) -> None:
        """Takes in rows of features.

        Args:
            features: (n, D) float32, n may be 0.

        Raises:
            UserError: wrong shape, or values that are not finite; nothing is taken in then.
        """
        features = checked_features(features, "features", at_least=0)
        if features.shape[1] != len(self.mean):
            raise UserError(f"features of {features.shape[1]} numbers cannot join those of {len(self.mean)}.")
        for start in range(0, len(features), BLOCK):
            block = features[start : start + BLOCK]
            # NumPy adds along the first axis row by row, as it does for ADM.
            self.sum32 = np.concatenate([self.sum32[None], block]).sum(0)
            mean = block.mean(0, dtype=np.float64)
            deviation = block - mean
            self._join(len(block), mean, deviation.T @ deviation)

    def merge(self, other: Accumulator) -> None:
        """Takes in all rows that another accumulator has seen.

        Raises:
            UserError: features of another size.
        """
        if len(other.mean) != len(self.mean):
            raise UserError(f"statistics of {len(other.mean)} features cannot join those of {len(self.mean)}.")
        self.sum32 = self.sum32 + other.sum32
        self._join(other.count, other.mean, other.scatter)

    def _join(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if count == 0:
            return
        total = self.count + count
        difference = mean - self.mean
        self.scatter += scatter
        self.scatter += np.outer(difference, difference * (self.count * count / total))
        self.mean = self.mean + difference * (count / total)
        self.count = total

    def statistics(self, adm_mean: bool = False) -> Statistics:
        """The statistics of all rows so far.

        Args:
            adm_mean: give the mean of a float32 sum in the order of the rows, as ADM does. Its error grows with the
                mean and the number of rows; on Inception features it moves FID by about 1e-6.

        Raises:
            UserError: fewer than two rows.
        """
        if self.count < 2:
            raise UserError(
                f"{self.count} images have no covariance: give at least 2, and thousands for a sound figure."
            )
        covariance = self.scatter / (self.count - 1)
        mean = self.sum32 / np.float32(self.count) if adm_mean else self.mean
        return Statistics(mean, (covariance + covariance.T) / 2, self.count)

    def state(self) -> dict[str, np.ndarray]:
        """Arrays to store (`np.savez`) or send; `from_state` continues from them bit for bit."""
        arrays = {"count": np.array(self.count), "mean": self.mean, "scatter": self.scatter, "sum32": self.sum32}
        return {name: array.copy() for name, array in arrays.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> Accumulator:
        """The accumulator that gave `state`.

        Raises:
            UserError: arrays that no accumulator gives.
        """
        try:
            count, mean, scatter, sum32 = (np.asarray(state[key]) for key in ("count", "mean", "scatter", "sum32"))
        except KeyError as error:
            raise UserError(f"stored statistics lack the array {error}: take the features again.") from error
        dim = mean.size
        shapes = [array.shape for array in (count, mean, scatter, sum32)]
        types = [array.dtype for array in (count, mean, scatter, sum32)]
        if shapes != [(), (dim,), (dim, dim), (dim,)] or types != [np.int64, np.float64, np.float64, np.float32]:
            raise UserError(f"stored statistics have shapes {shapes} and types {types}: take the features again.")
        if count < 0 or not all(np.isfinite(array).all() for array in (mean, scatter, sum32)):
            raise UserError("stored statistics hold impossible values: take the features again.")
        accumulator = cls(dim)
        accumulator.count = int(count)
        accumulator.mean, accumulator.scatter, accumulator.sum32 = mean.copy(), scatter.copy(), sum32.copy()
        return accumulator


def feature_statistics(features: np.ndarray, adm_mean: bool = False) -> Statistics:
    """The statistics of one array of features, (N, D) float32; see `Accumulator`."""
    features = checked_features(features, "features")
    accumulator = Accumulator(features.shape[1])
    accumulator.add(features)
    return accumulator.statistics(adm_mean)


def read_adm_statistics(path: str | os.PathLike[str]) -> tuple[Statistics, Statistics] | None:
    """The statistics for FID and for sFID in a reference file of ADM: `mu`, `sigma` and `mu_s`, `sigma_s`.

    Returns:
        Both, or None where the file has none of the four.

    Raises:
        UserError: the file cannot be read, or holds only some of them, or values that no features have.
    """
    names = ("mu", "sigma", "mu_s", "sigma_s")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in names if name in file}
    except Exception as error:  # a broken archive can fail in every way that zip, zlib and NumPy know
        raise UserError(f"{path} cannot be read as an .npz file ({type(error).__name__}): fetch it again.") from error
    if not arrays:
        return None
    if missing := [name for name in names if name not in arrays]:
        raise UserError(f"{path} has {', '.join(arrays)} but not {', '.join(missing)}: fetch it again.")
    first, second = (
        checked_statistics(Statistics(arrays[f"mu{end}"], arrays[f"sigma{end}"]), f"{path}: mu{end}, sigma{end}")
        for end in ("", "_s")
    )
    return first, second


def checked_statistics(statistics: Statistics, what: str) -> Statistics:
    """The statistics, with at least one dimension and a float64 covariance, if features can have them.

    Raises:
        UserError: shapes that do not fit, values that are not finite, or no covariance matrix.
    """
    mean, covariance = np.atleast_1d(statistics.mean), np.atleast_2d(statistics.covariance)
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise UserError(f"{what} must hold floats, not {mean.dtype} and {covariance.dtype}.")
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or len(mean) == 0:
        raise UserError(f"{what} must have shapes (D,) and (D, D), not {mean.shape} and {covariance.shape}.")
    covariance = covariance.astype(np.float64, copy=False)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{what} must be finite: a feature was infinite or not a number.")
    slack = 1e-6 * np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > slack or np.diagonal(covariance).min() < -slack:
        raise UserError(f"{what} must hold a covariance: symmetric, with no negative variance.")
    return dataclasses.replace(statistics, mean=mean, covariance=covariance)


def checked_features(features: np.ndarray, what: str, at_least: int = 1) -> np.ndarray:
    """The features as a contiguous float32 array (N, D), without a copy where they are one.

    Raises:
        UserError: not two-dimensional, not floats, not finite, or fewer rows than `at_least`.
    """
    features = np.asarray(features)
    if features.ndim != 2 or features.shape[1] == 0 or features.dtype.kind != "f":
        raise UserError(f"{what} must be floats of shape (N, D), not {features.dtype} of shape {features.shape}.")
    if len(features) < at_least:
        raise UserError(f"{what}: {len(features)} rows are too few, at least {at_least} are needed; give more images.")
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused below
        features = np.ascontiguousarray(features, dtype=np.float32)
    if not np.isfinite(features).all():
        raise UserError(f"{what} must be finite: a feature is infinite or not a number.")
    return features
