"""Skips images that cannot be read, up to a limit."""

from __future__ import annotations

import sys
import threading

from tqdm import tqdm

from bitdance.data.image_dataset import ImageDataset
from bitdance.runtime.errors import UserError, one_line

PUBLISHED_LIMIT = 100
"""Unreadable images that are tolerated by default in ImageNet."""
OWN_LIMIT, OWN_SHARE = 10, 10
"""The same in other pictures: this many, or one in ten."""


class BadImages:
    """The unreadable images of a process, shared by its threads: at most `limit`, with those skipped `before`.

    Args:
        limit: number of images; None for a default that depends on the images.
        images: the data set; None for a token cache or a single file.
    """

    def __init__(self, limit: int | None, images: ImageDataset | None = None) -> None:
        self.before = 0
        if limit is None:
            limit = PUBLISHED_LIMIT
            if images is not None and images.upright:
                limit = max(OWN_LIMIT, len(images) // OWN_SHARE)
        self.limit = limit
        self._indices: set[int] = set()
        self._lock = threading.Lock()

    def __contains__(self, index: int) -> bool:
        return index in self._indices

    def __len__(self) -> int:
        return self.before + len(self._indices)

    def indices(self) -> list[int]:
        """Returns the indices of the images that were skipped."""
        return sorted(self._indices)

    def add(self, index: int, error: UserError) -> None:
        """Counts an image, and prints to stderr why it is skipped the first time it is added.

        Raises:
            UserError: more images than the limit are unreadable.
        """
        with self._lock:
            if index in self._indices:
                return
            self._indices.add(index)
            count = len(self)
            if count <= self.limit:
                reason = one_line(str(error))
                tqdm.write(f"bitdance: skipped an unreadable image ({count} so far): {reason}", file=sys.stderr)
        if count > self.limit:
            raise UserError(f"more images are unreadable than max_bad_images={self.limit} allows, the last: {error}")
