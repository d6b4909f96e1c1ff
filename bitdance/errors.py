"""The one exception that is meant for a person to read."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can put right: one sentence that says what is wrong, where, and what to do.

    The command line prints the sentence and exits with status 2; library callers see an ordinary `ValueError`.
    """
