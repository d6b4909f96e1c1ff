"""Submits work to threads some items before its results are needed."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")

PREFETCH = 4
"""Items that are read ahead."""


def read_ahead(
    items: Iterable[T], submit: Callable[[T], list[concurrent.futures.Future[U]]]
) -> Iterator[tuple[T, list[U]]]:
    """Yields each item with the results of the futures that `submit` returned for it, submitted `PREFETCH` items ahead.

    If the iteration ends early, the remaining futures are cancelled.
    """
    submitted = ((item, submit(item)) for item in items)
    ahead: collections.deque[tuple[T, list[concurrent.futures.Future[U]]]] = collections.deque()
    try:
        ahead.extend(itertools.islice(submitted, PREFETCH + 1))
        while ahead:
            item, futures = ahead[0]
            results = [future.result() for future in futures]
            ahead.popleft()
            yield item, results
            ahead.extend(itertools.islice(submitted, 1))
    finally:
        for future in itertools.chain.from_iterable(futures for _, futures in ahead):
            future.cancel()
