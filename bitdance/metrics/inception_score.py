"""The Inception Score (Salimans et al. 2016, arXiv 1606.03498), as ADM takes it and free of the order of the images."""

from __future__ import annotations

import numpy as np
import torch

from bitdance.metrics.statistics import checked_features
from bitdance.runtime.errors import UserError

CHUNK = 5000
"""ADM's."""


def inception_score(logits: np.ndarray, chunk: int = CHUNK) -> float:
    """exp of the mean divergence of each image's classes from those of its chunk, averaged over chunks.

    Chunks are consecutive; a short last one counts as much as the others. A file in the order of its classes is
    therefore scored too low: see `shuffled_inception_score`.

    Args:
        logits: (N, classes) float32, without the bias of the classifier where ADM is to be met.
        chunk: images in a chunk.

    Returns:
        Between 1 and the number of classes.

    Raises:
        UserError: no rows, or values that are not finite.
    """
    logits = checked_features(logits, "logits")
    if chunk < 1:
        raise UserError(f"chunk={chunk}: a chunk must hold at least one image.")
    scores = [_score(logits[start : start + chunk]) for start in range(0, len(logits), chunk)]
    return float(np.mean(scores))


def shuffled_inception_score(logits: np.ndarray, chunk: int = CHUNK, seed: int = 0) -> float:
    """`inception_score` after a shuffle that depends on the seed and the number of images alone."""
    return inception_score(logits[np.random.RandomState(seed).permutation(len(logits))], chunk)


def _score(logits: np.ndarray) -> float:
    # In float32, as ADM has it, a probability that underflows to 0 gives NaN; here 0 log 0 is 0.
    log_p = torch.from_numpy(logits).double().log_softmax(1)
    p = log_p.exp()
    marginal = p.mean(0)
    return ((p * log_p).sum(1).mean() - torch.xlogy(marginal, marginal).sum()).exp().item()
