"""Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991): how much of one set lies within another.

The manifold of a set is the union of balls around its members; a ball reaches to the k-th nearest other member.
Precision is the share of samples within the manifold of the references, recall the converse.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitdance.metrics.statistics import checked_features
from bitdance.runtime.errors import UserError

TILE = 2048
"""Distances are taken for this many rows and columns at a time."""
ADM_TILE = 10_000
"""ADM's; it decides which distances ADM takes again in float32."""
ROUNDING = 16 * 2.0**-23
"""The distance of equal rows that float32 may give, relative to their squared norm."""


class PrecisionRecall(NamedTuple):
    """Both in [0, 1]."""

    precision: float
    recall: float


def precision_recall(
    reference: np.ndarray, sample: np.ndarray, k: int = 3, adm_fp16: bool = False, tile: int | None = None
) -> PrecisionRecall:
    """Precision and recall of samples against references.

    Args:
        reference: (R, D) float32.
        sample: (S, D) float32.
        k: the neighbour whose distance is the radius.
        adm_fp16: imitate ADM on a GPU, whose published figures carry the rounding of float16.
        tile: see `squared_radii`.

    Raises:
        UserError: k or fewer rows, different sizes, or values that are not finite.
    """
    reference = checked_features(reference, "reference features", at_least=k + 1)
    sample = checked_features(sample, "sample features", at_least=k + 1)
    if reference.shape[1] != sample.shape[1]:
        raise UserError(f"references of {reference.shape[1]} features and samples of {sample.shape[1]} do not compare.")
    reference_radii = torch.from_numpy(squared_radii(reference, k, adm_fp16, tile))
    sample_radii = torch.from_numpy(squared_radii(sample, k, adm_fp16, tile))
    covered = torch.zeros(len(sample), dtype=torch.bool)
    reached = torch.zeros(len(reference), dtype=torch.bool)
    for rows, columns, distances in _tiles(reference, sample, adm_fp16, tile):
        covered[columns] |= (distances <= reference_radii[rows, None]).any(0)
        reached[rows] |= (distances <= sample_radii[columns]).any(1)
    return PrecisionRecall(covered.double().mean().item(), reached.double().mean().item())


def squared_radii(features: np.ndarray, k: int = 3, adm_fp16: bool = False, tile: int | None = None) -> np.ndarray:
    """The squared distance of each row to its k-th nearest other row.

    Where k or more rows are equal to one, float32 gives noise around zero; the radius is then the size of that noise,
    so that equal rows lie within one another's balls (not with `adm_fp16`).

    Args:
        features: (N, D) float32.
        k: at least 1.
        adm_fp16: see `precision_recall`.
        tile: rows and columns at a time, 2048 or ADM's 10,000 by default. It matters only with `adm_fp16`: a tile with
            a value beyond float16 is taken in float32.

    Returns:
        (N,) float32.

    Raises:
        UserError: k or fewer rows, or values that are not finite.
    """
    if k < 1:
        raise UserError(f"k={k}: the neighbour must be the first or a later one.")
    x = checked_features(features, "features", at_least=k + 1)
    nearest = torch.full((len(x), k + 1), torch.inf)  # a row is its own nearest
    for rows, columns, distances in _tiles(x, None, adm_fp16, tile):
        nearest[rows] = _smallest(nearest[rows], distances)
        if not adm_fp16 and rows != columns:
            nearest[columns] = _smallest(nearest[columns], distances.T)
    radii = nearest[:, -1]
    if not adm_fp16:
        radii = torch.maximum(radii, ROUNDING * _squared_norms(x))
    return radii.numpy()


def _tiles(
    u: np.ndarray, other: np.ndarray | None, adm_fp16: bool, tile: int | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields (rows, columns, squared distances); within u alone, in float32, only on and above the diagonal."""
    tile = tile or (ADM_TILE if adm_fp16 else TILE)
    v = u if other is None else other
    u_squared, v_squared = _squared_norms(u), _squared_norms(v)
    for i in range(0, len(u), tile):
        rows = slice(i, i + tile)
        # In float16 the order of the additions makes the upper and the lower half differ.
        for j in range(i if other is None and not adm_fp16 else 0, len(v), tile):
            columns = slice(j, j + tile)
            distances = _adm_distances(u[rows], v[columns]) if adm_fp16 else None
            if distances is None or not distances.isfinite().all():
                # NumPy's matrix product outruns torch's on some processors and is never far behind.
                distances = torch.from_numpy(u[rows] @ v[columns].T)
                distances.mul_(-2).add_(u_squared[rows, None]).add_(v_squared[columns])
            yield rows, columns, distances


def _squared_norms(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.einsum("nd,nd->n", x, x, dtype=np.float64).astype(np.float32))


def _adm_distances(u: np.ndarray, v: np.ndarray) -> Tensor:
    """Squared distances of float16 operands, sums in float32, each result rounded to float16; may be inf or nan."""
    u_half, v_half = torch.from_numpy(u).half(), torch.from_numpy(v).half()
    u_squared, v_squared = (x.square().float().sum(1).half() for x in (u_half, v_half))
    distances = torch.from_numpy(u_half.float().numpy() @ v_half.float().numpy().T).half()
    return distances.mul_(-2).add_(u_squared[:, None]).add_(v_squared).clamp_min_(0)


def _smallest(known: Tensor, distances: Tensor) -> Tensor:
    """The k + 1 smallest of those known and the new ones, row by row in ascending order."""
    count = known.shape[1]
    new = distances.topk(min(count, distances.shape[1]), dim=1, largest=False).values
    return torch.cat([known, new], dim=1).topk(count, dim=1, largest=False).values
