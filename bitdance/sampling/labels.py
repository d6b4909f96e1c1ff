"""Labels of a sampling job, functions of the seed."""

from __future__ import annotations

import numpy as np
import torch

from bitdance.models import philox
from bitdance.runtime.errors import UserError


def make_labels(kind: str, num_images: int, num_classes: int, seed: int) -> np.ndarray:
    """Returns the class of each image of a job: (N,) int64.

    Args:
        kind: `random` for independent uniform classes; `balanced` for equal counts in random order, where a remainder
            goes to distinct, evenly spaced classes. In class order each split of the Inception Score, which are
            consecutive images, would have few classes.
        num_images: N.
        num_classes: classes are in [0, num_classes).
        seed: 0 <= seed < 2**32.

    Raises:
        UserError: unknown kind.
    """
    ids = torch.arange(num_images)
    if kind == "random":
        words = philox.words(seed, ids, 1, stream=philox.SAMPLE_LABEL, step=0)[0, :, 0].numpy()
        return words * num_classes >> 32  # words are uniform on [0, 2^32)
    if kind != "balanced":
        raise UserError(f"labels={kind!r} is unknown: use balanced or random.")
    keys = philox.words(seed, ids, 4, stream=philox.SAMPLE_ORDER, step=0)[0].numpy()
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    whole, rest = divmod(num_images, num_classes)
    labels = np.repeat(np.arange(num_classes), whole)
    extra = np.arange(rest) * num_classes // max(rest, 1)
    return np.concatenate([labels, extra]).astype(np.int64)[order]
