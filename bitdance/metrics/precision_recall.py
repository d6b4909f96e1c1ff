"""Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991).

The manifold of a set of features is the union of balls around its members, each with the distance to the k-th nearest
other member as its radius. Precision is the fraction of samples inside the manifold of the references, recall the
fraction of references inside the manifold of the samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitdance.metrics.statistics import validate_features, validate_pair
from bitdance.runtime.errors import UserError

TILE = 2048
"""Rows and columns of a tile of distances."""
ADM_TILE = 10_000
"""The tile of ADM, which computes tiles with a value that overflows float16 in float32."""
ROUNDING = 16 * 2.0**-23
"""Largest squared distance of equal rows in float32, relative to their squared norm."""


class PrecisionRecall(NamedTuple):
    """Precision and recall, both in [0, 1]."""

    precision: float
    recall: float


def precision_recall(reference: np.ndarray, sample: np.ndarray, k: int = 3, adm_fp16: bool = False) -> PrecisionRecall:
    """Computes precision and recall of samples with respect to references.

    Args:
        reference, sample: (R, D) and (S, D) float32.
        k: the neighbour whose distance is the radius.
        adm_fp16: use the float16 rounding of ADM on a GPU, which published values contain.

    Raises:
        UserError: k or fewer rows, different dimensions, or values that are not finite.
    """
    reference, sample = validate_pair(reference, sample, at_least=k + 1)
    reference_radii = torch.from_numpy(squared_radii(reference, k, adm_fp16))
    sample_radii = torch.from_numpy(squared_radii(sample, k, adm_fp16))
    sample_inside = torch.zeros(len(sample), dtype=torch.bool)
    reference_inside = torch.zeros(len(reference), dtype=torch.bool)
    for rows, columns, distances in _tiles(reference, sample, adm_fp16):
        sample_inside[columns] |= (distances <= reference_radii[rows, None]).any(0)
        reference_inside[rows] |= (distances <= sample_radii[columns]).any(1)
    return PrecisionRecall(sample_inside.double().mean().item(), reference_inside.double().mean().item())


def squared_radii(features: np.ndarray, k: int = 3, adm_fp16: bool = False) -> np.ndarray:
    """Computes the squared distance of each row to its k-th nearest other row.

    If k or more rows equal a row, float32 gives noise around zero; the radius is then the size of that noise, so that
    equal rows lie inside each other's balls (not with `adm_fp16`).

    Args:
        features: (N, D) float32.
        k, adm_fp16: as in `precision_recall`.

    Returns:
        (N,) float32.

    Raises:
        UserError: k or fewer rows, k below 1, or values that are not finite.
    """
    if k < 1:
        raise UserError(f"k={k} is invalid: it must be at least 1.")
    x = validate_features(features, "features", at_least=k + 1)
    nearest = torch.full((len(x), k + 1), torch.inf)  # including the row itself
    for rows, columns, distances in _tiles(x, None, adm_fp16):
        nearest[rows] = _merge_smallest(nearest[rows], distances)
        if not adm_fp16 and rows != columns:
            nearest[columns] = _merge_smallest(nearest[columns], distances.T)
    radii = nearest[:, -1]
    if not adm_fp16:
        radii = torch.maximum(radii, ROUNDING * _squared_norms(x))
    return radii.numpy()


def _tiles(u: np.ndarray, other: np.ndarray | None, adm_fp16: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields (rows, columns, squared distances); of u with itself in float32 only on and above the diagonal."""
    tile, v = ADM_TILE if adm_fp16 else TILE, u if other is None else other
    u_squared, v_squared = _squared_norms(u), _squared_norms(v)
    for i in range(0, len(u), tile):
        rows = slice(i, i + tile)
        # In float16 the order of the additions makes the upper and the lower half differ.
        for j in range(i if other is None and not adm_fp16 else 0, len(v), tile):
            columns = slice(j, j + tile)
            distances = _adm_distances(u[rows], v[columns]) if adm_fp16 else None
            if distances is None or not distances.isfinite().all():
                # NumPy's matrix product is faster than torch's on some processors and never much slower.
                distances = torch.from_numpy(u[rows] @ v[columns].T)
                distances.mul_(-2).add_(u_squared[rows, None]).add_(v_squared[columns])
            yield rows, columns, distances


def _squared_norms(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.einsum("nd,nd->n", x, x, dtype=np.float64).astype(np.float32))


def _adm_distances(u: np.ndarray, v: np.ndarray) -> Tensor:
    """Squared distances with float16 operands, float32 sums and float16 results, which may overflow."""
    u_half, v_half = torch.from_numpy(u).half(), torch.from_numpy(v).half()
    u_squared, v_squared = (x.square().float().sum(1).half() for x in (u_half, v_half))
    distances = torch.from_numpy(u_half.float().numpy() @ v_half.float().numpy().T).half()
    return distances.mul_(-2).add_(u_squared[:, None]).add_(v_squared).clamp_min_(0)


def _merge_smallest(known: Tensor, distances: Tensor) -> Tensor:
    """The k + 1 smallest of (N, k + 1) known and (N, M) new distances in each row, ascending."""
    count = known.shape[1]
    new = distances.topk(min(count, distances.shape[1]), dim=1, largest=False).values
    return torch.cat([known, new], dim=1).topk(count, dim=1, largest=False).values
