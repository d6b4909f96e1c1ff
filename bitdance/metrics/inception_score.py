"""The Inception Score (Salimans et al. 2016, arXiv 1606.03498), as ADM computes it and independent of image order."""

from __future__ import annotations

import numpy as np
import torch

from bitdance.metrics.statistics import validate_features
from bitdance.runtime.errors import UserError

CHUNK = 5000
"""Images per chunk in ADM."""


def inception_score(logits: np.ndarray, chunk: int = CHUNK) -> float:
    """Computes the exponential of the mean KL divergence of p(y|x) from the chunk's p(y), averaged over chunks.

    Chunks are consecutive; a short last one has the same weight as the others. The score of a file that is sorted by
    class is therefore too low: see `shuffled_inception_score`.

    Args:
        logits: (N, classes) float32, without the bias of the classifier to agree with ADM.

    Raises:
        UserError: no rows, or values that are not finite.
    """
    logits = validate_features(logits, "logits")
    if chunk < 1:
        raise UserError(f"chunk={chunk} is invalid: it must be at least 1.")
    scores = []
    for start in range(0, len(logits), chunk):
        # In float32, as in ADM, a probability that underflows to 0 gives NaN; here 0 log 0 is 0.
        log_p = torch.from_numpy(logits[start : start + chunk]).double().log_softmax(1)
        p = log_p.exp()
        marginal = p.mean(0)  # (classes,)
        scores.append(((p * log_p).sum(1).mean() - torch.xlogy(marginal, marginal).sum()).exp().item())
    return float(np.mean(scores))


def shuffled_inception_score(logits: np.ndarray, chunk: int = CHUNK) -> float:
    """Computes `inception_score` after a shuffle that depends only on the number of images."""
    return inception_score(logits[np.random.RandomState(0).permutation(len(logits))], chunk)
