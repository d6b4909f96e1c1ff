"""Classification accuracy on the labels that images were generated for."""

from __future__ import annotations

import numpy as np

from bitdance.metrics.statistics import validate_features
from bitdance.runtime.errors import UserError


def top_k_accuracy(logits: np.ndarray, labels: np.ndarray, k: int = 1) -> float:
    """Computes the fraction of rows whose label is among the k largest logits; ties go to the lower class.

    Args:
        logits: (N, classes) float.
        labels: (N,) integers in [0, classes).

    Raises:
        UserError: shapes that do not match, labels out of range, or logits that are not finite.
    """
    logits, labels = validate_features(logits, "logits"), np.asarray(labels)
    count, classes = logits.shape
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise UserError(f"labels must be {count} integers, not {labels.dtype} of shape {labels.shape}.")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"labels from {labels.min()} to {labels.max()} are out of range for {classes} classes.")
    own = logits[np.arange(count), labels][:, None]  # (N, 1)
    ahead = (logits > own) | ((logits == own) & (np.arange(classes) < labels[:, None]))
    return float((ahead.sum(1) < k).mean())
