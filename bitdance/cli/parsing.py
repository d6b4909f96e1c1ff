"""Command lines from dataclasses: tyro, set up once for all commands."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import TypeVar

import tyro
from tyro import MISSING
from tyro.conf import Positional

from bitdance.runtime.errors import UserError

__all__ = ["MISSING", "Positional", "parse"]

T = TypeVar("T")


def parse(cls: type[T], arguments: list[str], prog: str, default: T | None = None) -> T:
    """Parses arguments into a dataclass; the last value of a repeated flag wins, nested fields lose their prefix.

    The fields of `default`, where there is one, take the places of the class's own defaults, but for those that are
    `MISSING`, which must be given. Exits with status 2 and a usage message when the arguments do not parse.

    Raises:
        UserError: a dataclass refused a value.
    """
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    usage = io.StringIO()
    try:
        with contextlib.redirect_stderr(usage):
            if default is not None:
                return tyro.cli(cls, args=arguments, prog=prog, config=config, default=default)
            return tyro.cli(cls, args=arguments, prog=prog, config=config)
    except SystemExit as stop:
        # What a dataclass refuses, tyro puts into a box of several lines; the sentence alone is better.
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        print(usage.getvalue(), end="", file=sys.stderr)
        raise
