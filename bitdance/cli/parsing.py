"""Command lines from dataclasses: tyro, set up once for all commands."""

from __future__ import annotations

from typing import Any, TypeVar

import tyro
from tyro.conf import Positional

__all__ = ["Positional", "parse"]

T = TypeVar("T")


def parse(cls: type[T], arguments: list[str], prog: str, default: Any = None) -> T:
    """Parses arguments into a dataclass; the last value of a repeated flag wins, nested fields lose their prefix.

    Exits with status 2 and a usage message when the arguments do not parse.
    """
    settings: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(
        cls,
        args=arguments,
        prog=prog,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        **settings,
    )
