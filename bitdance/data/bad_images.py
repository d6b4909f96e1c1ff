"""Skips images that cannot be read, up to a limit."""

from __future__ import annotations

import sys
import threading

from tqdm import tqdm

from bitdance.runtime.errors import UserError, one_line


class BadImages:
    """The unreadable images of a process, shared by its threads: at most `limit`, with those skipped `before`."""

    def __init__(self, limit: int) -> None:
        self.limit, self.before = limit, 0
        self._indices: set[int] = set()
        self._lock = threading.Lock()

    def __contains__(self, index: int) -> bool:
        return index in self._indices

    def __len__(self) -> int:
        return self.before + len(self._indices)

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
