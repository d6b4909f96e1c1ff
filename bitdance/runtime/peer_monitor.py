"""Ends this process when another process of the same job fails, dies or can no longer be reached.

torchrun only stops the processes of its own machine when one of them ends. Those of other machines would wait in the
next collective until its time-out, which is hours.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

HEARTBEAT_INTERVAL = 1.0
"""Seconds between two heartbeats of a process, and between its checks of the others."""

HEARTBEAT_TIMEOUT = 60.0
"""Seconds without a heartbeat, or without an answer of the store, after which a process counts as dead."""

GRACE = 1.0
"""Seconds in which the main thread may end by itself, with a more specific message."""

FAILURE = "failure"
LEFT = "left"


def state_key(rank: int) -> str:
    """Returns the key of a process in the store: a growing number, or `LEFT` once it no longer needs the store."""
    return f"peer/{rank}"


class PeerMonitor:
    """Watches the other processes of a job over a store that they share.

    Each process increments the number at its key. Rank 0 reads the keys of all others, which read only that of rank 0
    and the failure: why the job has to end, set once by the first process that knows it. So the store serves O(size)
    keys per interval.

    Args:
        store: a connection that nobody else uses, since a blocking call holds it.
        rank, size: of this process, and the number of processes.
        hosts_store: whether the store ends with this process.
    """

    def __init__(self, store: Store, rank: int, size: int, hosts_store: bool) -> None:
        self._store, self._rank, self._size, self._hosts_store = store, rank, size, hosts_store
        self._address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        self._left = threading.Event()
        self._connected = True
        self._intervals_without_answer = 0
        self._threads = [
            threading.Thread(target=target, name=target.__name__, daemon=True)
            for target in (self._watch_peers, self._watch_store)
        ]
        # Before any process reads them: reading a key that does not exist waits for it.
        store.compare_set(FAILURE, "", "")
        store.set(state_key(rank), "0")

    def start(self) -> None:
        """Starts to watch; called when the keys of all processes exist."""
        for thread in self._threads:
            thread.start()

    def leave(self, failure: str = "") -> None:
        """Ends the monitoring of this process, which has done its work or has failed.

        Args:
            failure: why it has failed, in a few words; the other processes then end too.
        """
        self._left.set()
        for thread in self._threads:
            thread.join(HEARTBEAT_TIMEOUT)
        if not self._connected or self._threads[0].is_alive():  # the latter if the store does not respond
            return
        with contextlib.suppress(RuntimeError):
            if failure:
                self._store.compare_set(FAILURE, "", f"process {self._rank} failed ({failure})")
            self._store.set(state_key(self._rank), LEFT)
            if self._hosts_store:
                self._keep_store(3 * HEARTBEAT_INTERVAL if failure else HEARTBEAT_TIMEOUT, extend=not failure)

    def _keep_store(self, seconds: float, extend: bool) -> None:
        """Waits until the others no longer need the store, up to a time, which their heartbeats extend."""
        keys = [state_key(rank) for rank in range(1, self._size)]
        deadline, last = time.monotonic() + seconds, [""]
        while time.monotonic() < deadline and set(states := self._read(*keys)) != {LEFT}:
            if extend and states != last:
                deadline, last = time.monotonic() + seconds, states
            time.sleep(0.05)

    def _watch_peers(self) -> None:
        others = range(1, self._size) if self._rank == 0 else range(1)
        last: dict[int, str] = {}
        # Intervals are counted, not seconds: a job that is suspended as a whole continues afterwards.
        unchanged = dict.fromkeys(others, 0)
        try:
            for beat in itertools.count(1):
                if self._left.wait(HEARTBEAT_INTERVAL):
                    return
                self._store.set(state_key(self._rank), str(beat))
                failure, *values = self._read(FAILURE, *map(state_key, others))
                self._intervals_without_answer = 0
                states = dict(zip(others, values, strict=True))
                for rank, state in states.items():
                    unchanged[rank] = unchanged[rank] + 1 if state == last.get(rank) != LEFT else 0
                    if not failure and unchanged[rank] * HEARTBEAT_INTERVAL > HEARTBEAT_TIMEOUT:
                        silent = f"process {rank} has not responded for {HEARTBEAT_TIMEOUT:.0f} s"
                        failure = self._store.compare_set(FAILURE, "", silent).decode()
                last = states
                if failure:
                    self._store.set(state_key(self._rank), LEFT)
                    self._end(failure)
                    return
        except RuntimeError:
            self._connected = False
            if last.get(0) == LEFT:  # it has waited for this process, or torchrun has ended its store
                return
            self._end(f"the connection to the store at {self._address} was lost (process 0 or its torchrun has ended)")

    def _watch_store(self) -> None:
        """Notices a machine that is gone without closing its connections, where a call would block for long."""
        while self._connected and not self._left.wait(HEARTBEAT_INTERVAL):
            self._intervals_without_answer += 1
            if self._intervals_without_answer * HEARTBEAT_INTERVAL > HEARTBEAT_TIMEOUT:
                self._end(f"the store at {self._address} has not responded for {HEARTBEAT_TIMEOUT:.0f} s")

    def _end(self, reason: str) -> None:
        """Ends the process unless the main thread does so itself."""
        # The others read the failure before the store ends.
        if self._left.wait(GRACE + (HEARTBEAT_INTERVAL if self._hosts_store else 0)):
            return
        print(
            f"bitdance: process {self._rank} ends because {reason}: see its messages, then run the same command again.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def _read(self, *keys: str) -> list[str]:
        return [value.decode() for value in self._store.multi_get(list(keys))]
