"""Reading ahead: work that is submitted to threads some items before its results are needed."""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")

PREFETCH = 4
"""Items that are read ahead."""


def read_ahead(
    items: Iterable[T], submit: Callable[[T], list[concurrent.futures.Future[U]]], depth: int
) -> Iterator[tuple[T, list[U]]]:
    """Each item with the results of what was submitted for it, `depth` items ahead; what is left over is cancelled."""
    ahead: collections.deque[tuple[T, list[concurrent.futures.Future[U]]]] = collections.deque()

    def take() -> tuple[T, list[U]]:
        item, futures = ahead[0]
        results = [future.result() for future in futures]
        ahead.popleft()
        return item, results

    try:
        for item in items:
            ahead.append((item, submit(item)))
            if len(ahead) > depth:
                yield take()
        while ahead:
            yield take()
    finally:
        for future in (future for _, futures in ahead for future in futures):
            future.cancel()
