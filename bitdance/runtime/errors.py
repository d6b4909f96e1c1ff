"""Exceptions that are meant for a person to read, and parts of their messages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

_OUT_OF_MEMORY = re.compile(
    "out of memory|not enough memory|can't allocate|[Cc]annot allocate memory|could not create a (primitive|memory)"
    "|CU(BLAS|DNN)_STATUS_ALLOC_FAILED|ALLOCATION_FAILED|CUBLAS_STATUS_NOT_INITIALIZED"
    "|unable to find an engine to execute this computation"
)
"""Of PyTorch, oneDNN, cuBLAS and cuDNN; the last two are also what is said when there is no memory for cuBLAS's handle
or for the workspace of any convolution of cuDNN."""

MAX_MESSAGE = 1500
"""Characters of a message on the terminal."""


class UserError(ValueError):
    """An error that the user can fix: one sentence that says what is wrong, where, and what to do.

    Settings are named as fields, ``num_steps=0`` with a value or `` `cfg_scale` `` without; the command line shows
    them as flags, prints the sentence and exits with status 2. To callers of the library it is a ``ValueError``.
    """


class Interrupted(Exception):
    """A job that was ended by a signal after everything it had done was saved.

    The command line prints the sentence and exits with status 128 + `signal`, which tells a scheduler that the job is
    not finished.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error is a lack of memory, on a GPU or on a CPU, also one that a library of CUDA met."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or bool(_OUT_OF_MEMORY.search(str(error))))
    )


def check_fields(config: object, names: str, is_valid: Callable[[Any], bool], rule: str) -> None:
    """Checks fields of a configuration; a field that is None is valid.

    Args:
        config: a dataclass instance.
        names: field names, separated by spaces.
        is_valid: tells whether a value is allowed; a `TypeError` or `ValueError`, as of another type, means no.
        rule: what the value must do, such as "be at least 1".

    Raises:
        UserError: for the first field whose value is not allowed.
    """
    for name in names.split():
        value = getattr(config, name)
        try:
            allowed = value is None or is_valid(value)
        except (TypeError, ValueError):
            allowed = False
        if not allowed:
            raise UserError(f"{name}={value} is invalid: it must {rule}.")


def check_seed(seed: Any) -> None:
    """Raises a `UserError` unless this is a seed of `bitdance.models.philox`."""
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} is invalid: it must be an integer between 0 and {2**32 - 1}.")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns "did you mean X? " with the most similar known name, in any case, or ""."""
    from difflib import get_close_matches

    keys = {key.lower(): key for key in known}
    near = get_close_matches(name.lower().removeprefix("bitdance-")[:100], keys, n=1, cutoff=0.5)
    return f"did you mean {keys[near[0]]}? " if near else ""


def first_line(error: BaseException) -> str:
    """Returns at most 200 characters of the first line of an error's message, or else its type."""
    return (str(error).strip().splitlines() or [""])[0][:200].rstrip(". ") or type(error).__name__


def one_line(text: str) -> str:
    """Returns a message on one line, without the middle of a very long one, as from a name of thousands of letters.

    Characters that could control a terminal are escaped.
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE // 2]} ... {text[-MAX_MESSAGE // 2 :]}"


def printable(text: str) -> str:
    """Returns a name or value from a file as at most 100 visible characters, for a message."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 100 else f"{text[:97]}..."


def counted(number: int, noun: str) -> str:
    """Returns "1 image" or "2 images"; the plural of "class" is "classes"."""
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")
