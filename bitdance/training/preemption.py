"""Signals that ask a run to end, handled by all processes after the same step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from bitdance.runtime.process_group import StopSignal, World

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))
"""SIGTERM is what torchrun sends to its processes when it is stopped; Slurm is usually told to send SIGUSR1;
SIGINT is Ctrl-C, of which a second one ends the process at once."""


class PreemptionHandler:
    """Records signals, whichever process receives them.

    torchrun forwards a signal to its processes one after the other, and a scheduler may signal a single machine. So
    the processes exchange in each step which signal they have received, and read the result one step later.
    """

    def __init__(self, world: World) -> None:
        self._signal = 0
        self._is_main = world.is_main
        self._agreed = StopSignal(world)

    @contextlib.contextmanager
    def installed(self) -> Iterator[PreemptionHandler]:
        """Handles the signals for the duration of the context; does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = {number: signal.signal(number, self._record) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _record(self, number: int, frame: object) -> None:
        if number == signal.SIGINT:
            if self._signal:
                raise KeyboardInterrupt
            if self._is_main:  # not by print, which a signal may have interrupted
                os.write(2, b"\nbitdance: saving a checkpoint after this step; Ctrl-C again stops at once.\n")
        self._signal = number

    def received(self) -> int:
        """Returns the signal to end by, the same in all processes, or 0; called once per step.

        Raises:
            UserError: another process has ended.
        """
        return self._agreed.exchange(self._signal)
