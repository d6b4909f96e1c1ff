"""Command lines from dataclasses, by tyro; help with examples; fields of library errors shown as flags."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import tyro
from tyro import MISSING
from tyro.conf import Positional

from bitdance.runtime.errors import UserError

__all__ = ["MISSING", "Positional", "parse", "with_flags"]

T = TypeVar("T")

_flags: dict[str, str] = {}
"""Flags of the command that was parsed, by the field of a configuration that each one sets."""


def parse(
    cls: type[T],
    arguments: list[str],
    prog: str,
    examples: str = "",
    default: T | None = None,
    aliases: Mapping[str, str] | None = None,
) -> T:
    """Parses arguments into a dataclass; of a repeated flag the last value counts, nested fields have no prefix.

    Exits with status 2 and a usage message when the arguments do not parse.

    Args:
        cls: the dataclass; nested dataclasses are groups of options.
        arguments: without the name of the program.
        prog: name of the program.
        examples: printed at the end of `--help`, one command per line.
        default: replaces the defaults of the class; fields that are `MISSING` must be given.
        aliases: flags of fields of configurations that have another name on this command line.

    Raises:
        UserError: a dataclass refused a value.
    """
    _flags.clear()
    _flags.update({name: name for name in _field_names(cls)} | dict(aliases or {}))
    config = (
        tyro.conf.OmitArgPrefixes,
        tyro.conf.OmitSubcommandPrefixes,
        tyro.conf.DisallowNone,
        tyro.conf.PositionalMetavarFromFieldName,
    )
    defaults: dict[str, Any] = {} if default is None else {"default": default}
    output, usage = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(usage):
            return tyro.cli(cls, args=arguments, prog=prog, config=config, **defaults)
    except SystemExit as stop:
        # An error of a dataclass is wrapped by tyro into a box of several lines; only the sentence is wanted.
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        if output.getvalue():
            # Spaces of the same length, since the text is in a box.
            print(re.sub(r"\(default:( None)? *\)", lambda m: " " * len(m[0]), output.getvalue()), end="")
            if examples:
                print("examples:\n" + "\n".join(f"  {line}" for line in examples.strip().splitlines()))
        print(usage.getvalue(), end="", file=sys.stderr)
        raise


def with_flags(message: str) -> str:
    """Replaces fields in a library error, `name=value` and `` `name` ``, by flags of the command that was parsed."""

    def flag(name: str) -> str:
        return f"--{_flags[name].replace('_', '-')}"

    message = re.sub(r"`(\w+)`", lambda m: flag(m[1]) if m[1] in _flags else m[0], message)
    return re.sub(r"(?<![\w.-])(\w+)=(?=\S)", lambda m: f"{flag(m[1])} " if m[1] in _flags else m[0], message)


def _field_names(cls: type) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from _field_names(typing.cast(type, kind))
        else:
            yield field.name
