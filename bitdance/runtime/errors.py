"""The exceptions that are meant for a person to read."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can put right: one sentence that says what is wrong, where, and what to do.

    The command line prints the sentence and exits with status 2; library callers see an ordinary `ValueError`.
    """


class Interrupted(Exception):
    """A job that was asked to end by a signal, and ended in good order: what it had done is on disk.

    The command line prints the sentence and exits with status 128 + `signal`, which tells a scheduler that the job is
    not done.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
