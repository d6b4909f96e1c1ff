"""The Fréchet distance between two sets of features: FID and sFID."""

from __future__ import annotations

import contextlib

import numpy as np

from bitdance.metrics.statistics import Statistics, validate_statistics
from bitdance.runtime.errors import UserError


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Computes the squared Fréchet distance of two Gaussians: |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)).

    Heusel et al. 2017 (arXiv 1706.08500). Two float32 means are subtracted and squared in float32, as in ADM. Rounding
    may make the result slightly negative.

    Raises:
        UserError: invalid statistics, or statistics of different dimensions.
    """
    a, b = validate_statistics(a, "the first statistics"), validate_statistics(b, "the second statistics")
    if len(a.mean) != len(b.mean):
        raise UserError(f"statistics of {len(a.mean)} and of {len(b.mean)} dimensions cannot be compared.")
    difference = a.mean - b.mean
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return float(difference @ difference + traces - 2 * trace_sqrt(a.covariance, b.covariance))


def trace_sqrt(a: np.ndarray, b: np.ndarray) -> float:
    """Computes tr((A B)^(1/2)) of two covariances, (D, D) float64, from eigenvalues only.

    For any factor A = R R^T, A B has the eigenvalues of the symmetric R^T B R, which are not negative. Rank-deficient
    covariances cost about 1e-5 of accuracy.
    """
    for first, second in ((a, b), (b, a)):
        with contextlib.suppress(np.linalg.LinAlgError):
            factor, other = np.linalg.cholesky(first), second
            break
    else:  # both are rank-deficient
        values, vectors = np.linalg.eigh(a)
        factor, other = vectors * np.sqrt(values.clip(0)), b
    values = np.linalg.eigvalsh(factor.T @ other @ factor)
    return float(np.sqrt(values.clip(0)).sum())
