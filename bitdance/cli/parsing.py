"""Command lines from dataclasses, by tyro; help with examples; fields of library errors shown as flags."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
import textwrap
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import tyro
from tyro import MISSING as MISSING  # re-exported for the commands
from tyro.conf import Positional as Positional  # likewise

from bitdance.runtime.errors import UserError, did_you_mean

T = TypeVar("T")

_METAVARS = {"INT": "an integer", "FLOAT": "a number", "PATH": "a path"}

_flags: dict[str, str] = {}
"""Options of the command that was parsed, by the field of a configuration that each one sets."""


def parse(
    cls: type[T],
    arguments: list[str],
    prog: str,
    examples: str = "",
    default: T | None = None,
    aliases: Mapping[str, str] | None = None,
    headings: Mapping[str, str] | None = None,
    flag_pairs: bool = True,
) -> T:
    """Parses arguments into a dataclass; of a repeated flag the last value counts, nested fields have no prefix.

    Exits with status 2 and a message when the arguments do not parse.

    Args:
        cls: the dataclass; nested dataclasses are groups of options, their docstrings the titles.
        arguments: without the name of the program.
        prog: name of the program.
        examples: printed at the end of `--help`, one command per line.
        default: replaces the defaults of the class; fields that are `MISSING` must be given.
        aliases: fields of library configurations that have another name in `cls`, with that name.
        headings: more titles in `--help`, by the first field of each.
        flag_pairs: whether a bool field `x` also has the flag `--no-x`.

    Raises:
        UserError: an argument is empty, or a dataclass refused a value.
    """
    name_flags(cls, aliases)
    config: tuple[Any, ...] = (
        tyro.conf.OmitArgPrefixes,
        tyro.conf.OmitSubcommandPrefixes,
        tyro.conf.DisallowNone,
        tyro.conf.PositionalMetavarFromFieldName,
    )
    if not flag_pairs:
        config += (tyro.conf.FlagCreatePairsOff,)
    # The shell expands "~" only at the start of an argument, not in --output=~/runs.
    arguments = [re.sub("^(--[a-z_-]+=|)(~/.*)", lambda m: m[1] + os.path.expanduser(m[2]), a) for a in arguments]
    _check_empty(arguments)
    defaults: dict[str, Any] = {} if default is None else {"default": default}
    output, usage = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(usage):
            return tyro.cli(cls, args=arguments, prog=prog, config=config, **defaults)
    except SystemExit as stop:
        # tyro turns an error of a dataclass into a usage message; only the sentence is wanted.
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        if output.getvalue():
            print(_format_help(output.getvalue(), headings or {}).rstrip())
            if examples:
                print("\nexamples:\n" + textwrap.indent(examples.strip(), "  "))
        if usage.getvalue():
            print(f"bitdance: {_format_usage_error(usage.getvalue(), prog)}", file=sys.stderr)
        raise


def name_flags(cls: type, aliases: Mapping[str, str] | None = None) -> None:
    """Has errors name the flags of a command, as `parse` does, which calls this; arguments as there."""
    _flags.clear()
    _flags.update(_find_flags(cls))
    _flags.update({name: _flags[field] for name, field in (aliases or {}).items() if field in _flags})


def given_values(arguments: list[str], names: Sequence[str]) -> dict[str, str | None]:
    """Returns the values of some options, without dashes before their names, that others' defaults depend on.

    None for those that are not given; errors are left to `parse`.
    """
    found: dict[str, str | None] = dict.fromkeys(names)
    for word, following in zip(arguments, [*arguments, "--"][1:], strict=True):
        option, has_value, value = word.partition("=")
        name = option.removeprefix("--").replace("_", "-")  # as tyro does
        if option.startswith("--") and name in found:
            found[name] = value if has_value else None if following.startswith("--") else following
    return found


def given_fields(arguments: list[str], fields: Iterable[str]) -> set[str]:
    """Returns those fields whose options are given, also as `--no-x`."""
    words = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    return {name for name in fields if not words.isdisjoint(f"--{no}{name.replace('_', '-')}" for no in ("", "no-"))}


def with_flags(message: str) -> str:
    """Replaces fields in a library error, `name=value` and `` `name` ``, by flags of the command that was parsed."""
    message = re.sub(r"`(\w+)`", lambda m: _flags.get(m[1], m[0]), message)
    return re.sub(r"(?<![\w.-])(\w+)=(?=\S)", lambda m: f"{_flags[m[1]]} " if m[1] in _flags else m[0], message)


def memory_advice() -> str:
    """Returns what can be done about a lack of memory, in flags of the command that was parsed."""
    lower = ("batch_size", "chunk_size", "feature_batch_size")
    advice = [f"a lower {_flags[name]}" for name in lower if name in _flags]
    if "accumulate" in _flags:
        advice.append(f"a higher {_flags['accumulate']}")
    return f"use {' or '.join(advice)}" if advice else "close other programs"


def _check_empty(arguments: list[str]) -> None:
    """Raises for an empty argument, as from a variable of the shell that is not set: as a path it is this folder."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if not argument or re.fullmatch("--[a-z_-]+=", argument):
            option = argument.rstrip("=") or (before if before.startswith("--") else "an argument")
            raise UserError(f"{option} is empty: give a value.")


def _find_flags(cls: type) -> dict[str, str]:
    """Returns the options of a dataclass and of those inside it, by field."""
    flags: dict[str, str] = {}
    hints, annotated = typing.get_type_hints(cls), typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            flags |= _find_flags(typing.cast(type, kind))
        else:
            is_positional = str(field.type).startswith("Positional[")
            extras = getattr(annotated[field.name], "__metadata__", ())  # such as tyro.conf.arg
            name = next((extra.name for extra in extras if getattr(extra, "name", None)), field.name)
            flags[field.name] = name.upper() if is_positional else f"--{name.replace('_', '-')}"
    return flags


def _format_usage_error(text: str, prog: str) -> str:
    """Makes one sentence of tyro's message, which has the description of each option, in a frame and with a title."""
    text = " ".join(re.sub(r"\A .*\n|^ +-+ *\n", "", text, flags=re.M).split())
    see = f"see {prog} --help."
    if found := re.match(r"Error parsing (\S+):.*? --?\S+ \[?(\S+)", text):
        values = re.findall(r"'([^']*)'", text.partition("]")[0])
        if "arguments: [" in text:  # all values of a list
            values = [value for value in values if not _is_number(value)] or values
        given = f", not {values[0]!r}" if values else ""
        return f"{found[1]} expects {_METAVARS.get(found[2], found[2])}{given}; {see}"
    if found := re.match(r"invalid choice '(.*?)' for argument '(.*?)'. Expected one of \((.*?),?\)", text):
        choices = found[3].replace("'", "").split(", ")
        if "None" in choices:  # an option without default, whose choices tyro gives in any order
            choices = sorted({*choices} - {"None"})
        return f"{found[2]} {found[1]} is invalid: choose one of {', '.join(choices)}."
    if found := re.match(r"Missing value for argument '(.*?)'", text):
        return f"{found[1]} needs a value; {see}"
    sentences = []
    if unknown := re.search(r"Unrecognized options: (.*?)(?: Perhaps you meant:| For full helptext|$)", text):
        option = unknown[1].replace(",", " ").split()[0]
        if option.startswith("-"):
            hint = did_you_mean(option.partition("=")[0], [flag for flag in _flags.values() if flag.startswith("-")])
            sentences.append(f"there is no option {option}" + (f" ({hint.strip()})" if hint else ""))
        else:
            sentences.append(f"the argument {option} is not expected")
    if missing := re.match(r"Missing from .*?: (.*?)(?: Unrecognized options:| For full helptext|$)", text):
        found_names = re.findall(r"(?<!\S)(--[a-z-]+(?= [A-Z{])|[A-Z]{3,}(?= ))", missing[1])
        names = [name for name in dict.fromkeys(found_names) if name in _flags.values()]
        sentences.append(f"{', '.join(names) or missing[1]} {'is' if len(names) < 2 else 'are'} missing")
    return "; ".join(sentences or [text]).rstrip(".") + f"; {see}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _format_help(text: str, headings: Mapping[str, str]) -> str:
    """Makes help of tyro shorter: one line of title per group of options, no defaults that say nothing."""

    def title(found: re.Match[str]) -> str:
        first_paragraph = (found[2] or found[1]).partition("\n\n")[0]
        return " ".join(first_paragraph.split()).rstrip(".") + ":\n"

    text = re.sub(r" +$", "", text, flags=re.M)
    text = re.sub(r"^ (\S.*)\n -+\n(?:((?:(?:  .*)?\n)+?)  -+\n)?", title, text, flags=re.M)
    text = re.sub(r"\s*\(default:\s*(?:None|False)?\)", "", text)  # says nothing; it may be wrapped
    text = re.sub(r"\n\n+(?=  )", "\n", text)  # left by a removed default
    debug = "show the traceback of any error\n"
    text = re.sub(r"^(  -h, --help +).*\n", lambda m: m[0] + "  --debug".ljust(len(m[1])) + debug, text, flags=re.M)
    for field, heading in headings.items():
        text = re.sub(rf"^(?=  {_flags[field]}\b)", f"\n{heading}:\n", text, flags=re.M)
    return with_flags(re.sub(r"^\S.*:\n\n(?=\S)", "", text, flags=re.M))  # a title without options
