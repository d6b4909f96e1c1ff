"""Checks a pickle before it is loaded, without building any object.

The check complements a restricted unpickler (`weights_only=True`, or `find_class` with an allow-list): it names the
code that a pickle would import, and refuses small pickles that would take gigabytes or hours to load.
"""

from __future__ import annotations

import io
import pickletools
import re
from typing import Any

MAX_OPCODES = 1 << 20  # a few seconds; the largest released model has some hundred thousand
MAX_TUPLE = 1000  # items of a tuple, including those of the tuples inside it; sizes and strides of a tensor have 4


class UnsafePickleError(ValueError):
    """A pickle that must not be loaded.

    Attributes:
        code: what it would import, such as "posix.system"; "" if it is too large or too nested.
    """

    def __init__(self, reason: str, code: str = "") -> None:
        super().__init__(reason)
        self.code = code


def check_pickle(data: bytes, allowed: re.Pattern[str], max_bytes: int) -> int:
    """Checks the pickle at the beginning of `data`.

    Tuples can be dictionary keys, and hashing one visits every tuple inside it, as often as it occurs. `MAX_TUPLE`
    limits that work. Lists and dictionaries cannot be hashed, so they may be nested.

    Args:
        data: a pickle of any protocol, which other bytes may follow.
        allowed: matches the globals that the pickle may import, written "module name".
        max_bytes: longest pickle that is accepted.

    Returns:
        The number of bytes of the pickle.

    Raises:
        UnsafePickleError: it imports other globals, or it is too large or too nested.
        Exception: of almost any type, if `data` does not begin with a pickle or the pickle is damaged.
    """
    stream = io.BytesIO(data[: max_bytes + 1])  # reading a longer pickle ends beyond max_bytes
    stack: list[int | str] = []  # the text of a string, the size of a tuple, 1 for any other object
    marks: list[int] = []
    memo: dict[Any, int | str] = {}
    try:
        for number, (op, value, _) in enumerate(pickletools.genops(stream)):
            if number > MAX_OPCODES:
                raise UnsafePickleError(f"the pickle has more than {MAX_OPCODES} opcodes")
            if op.name == "STACK_GLOBAL":
                _check_global(f"{stack[-2]} {stack[-1]}", allowed)
            elif op.name in ("GLOBAL", "INST"):
                _check_global(str(value), allowed)
            elif op.name.startswith("EXT"):
                raise UnsafePickleError("the pickle carries code (an extension code)", "an extension code")
            if "PUT" in op.name or op.name == "MEMOIZE":
                index = len(memo) if value is None else value
                if index > number:  # the unpickler allocates as many entries as the largest index
                    raise ValueError(f"the memo index {index} is too large")
                memo[index] = stack[-1]
                continue
            if pickletools.markobject in op.stack_after:
                marks.append(len(stack))
                continue
            bottom = len(stack) - len(op.stack_before)
            if pickletools.markobject in op.stack_before:
                bottom = marks.pop() - op.stack_before.index(pickletools.markobject)
            taken = stack[bottom:]
            del stack[bottom:]
            if "GET" in op.name:
                stack.append(memo[value])
            elif op.name == "DUP":
                stack += taken * 2
            elif "TUPLE" in op.name:
                size = 1 + sum(item if isinstance(item, int) else 1 for item in taken)
                if size > MAX_TUPLE:
                    raise UnsafePickleError("the pickle has too large or too nested tuples")
                stack.append(size)
            else:
                stack += [value if isinstance(value, str) else 1] * len(op.stack_after)
    finally:
        if stream.tell() > max_bytes:
            raise UnsafePickleError(f"the pickle has more than {max_bytes} bytes")
    return stream.tell()


def _check_global(name: str, allowed: re.Pattern[str]) -> None:
    if not re.fullmatch(r"[\w.]+ [\w.]+", name):
        raise ValueError("a global without a module or a name")
    if not allowed.fullmatch(name):
        code = name.replace(" ", ".")
        raise UnsafePickleError(f"the pickle carries code ({code})", code)
