"""Signals that ask a run to end: noticed by all processes at the same step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from bitdance.runtime.process_group import NonBlockingMax, World

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""What torchrun sends to its processes when it is stopped, and what Slurm is usually told to send before the end."""


class PreemptionHandler:
    """Signals that have arrived, in whichever process.

    Torchrun hands a signal to each of its processes, but at moments of their own, and a scheduler may send it to one
    machine only. So each step the processes tell each other what has arrived, and all of them learn it one step later.
    """

    def __init__(self, world: World) -> None:
        self._arrived = 0
        self._agreement = NonBlockingMax(world)

    @contextlib.contextmanager
    def watched(self) -> Iterator[PreemptionHandler]:
        """Notes signals, instead of dying of them, for as long as the context lasts; in the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self._arrived = number

    def agreed(self) -> int:
        """The signal to end by, 0 for none, the same in all processes; each calls this once a step."""
        return self._agreement.highest(self._arrived)

    def close(self) -> None:
        """Waits for what the last step began; called by all processes, before they part."""
        self._agreement.close()
