"""Images that cannot be read: each is named once and skipped, up to a limit."""

from __future__ import annotations

import sys
import threading

from bitdance.runtime.errors import UserError


class BadImages:
    """The broken images that a process has met, for any number of threads.

    Args:
        limit: how many may be skipped.
        before: how many were skipped earlier, or by others.
    """

    def __init__(self, limit: int, before: int = 0) -> None:
        self.limit, self.before = limit, before
        self._indices: set[int] = set()
        self._lock = threading.Lock()

    def __contains__(self, index: int) -> bool:
        return index in self._indices

    def __len__(self) -> int:
        return self.before + len(self._indices)

    def add(self, index: int, error: UserError) -> None:
        """Counts an image, once, and says on stderr why it is skipped.

        Raises:
            UserError: there are more than the limit; it names the last one.
        """
        with self._lock:
            if index in self._indices:
                return
            self._indices.add(index)
            count = len(self)
            if count <= self.limit:
                from tqdm import tqdm

                tqdm.write(f"bitdance: skipped, {count} so far: {error}", file=sys.stderr)
        if count > self.limit:
            raise UserError(f"more images are broken than --max-broken {self.limit} allows, the last one: {error}")
