"""Every command of the documents, of the examples in `--help` and of the examples' scripts parses as it stands."""

from __future__ import annotations

import importlib
import pathlib
import re
import shlex

import pytest
import small
import tyro

from bitdance.cli import main as command_line
from bitdance.cli import parsing, train
from bitdance.training.train_config import TrainConfig

DOCUMENTS = [small.ROOT / "README.md", *sorted((small.ROOT / "docs").glob("*.md"))]


class ParsedError(Exception):
    """Raised in place of running a command."""


def commands(text: str) -> list[str]:
    """The `bitdance` commands in the shell blocks of a document, also those under torchrun, one line each."""
    blocks = "\n".join(re.findall(r"^```(?:shell|bash)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    lines = blocks.replace("\\\n", " ").splitlines()
    found = [
        re.search(r"(?:^|&& |; )(?:[A-Z_]+=\S+ )*(?:torchrun .*?-m |srun .*?-m )?(bitdance .*)$", line)
        for line in lines
    ]
    return [line[1] for line in found if line]


def examples() -> list[tuple[str, str]]:
    found = [(path.name, command) for path in DOCUMENTS for command in commands(path.read_text())]
    for name in command_line.COMMANDS:
        module = importlib.import_module(f"bitdance.cli.{name.replace('-', '_')}")
        lines = [line[line.index("bitdance ") :] for line in module.EXAMPLES.splitlines() if "bitdance " in line]
        found += [(f"{name} --help", line) for line in lines]
    return found


@pytest.mark.parametrize(("place", "command"), examples())
def test_it_parses(place, command, monkeypatch, tmp_path, capsys):
    real = tyro.cli

    def parse_only(*arguments: object, **options: object) -> None:
        real(*arguments, **options)  # type: ignore[call-overload]
        raise ParsedError

    monkeypatch.chdir(tmp_path)  # where none of the files is
    monkeypatch.setattr(tyro, "cli", parse_only)
    defaults = train.Train("demo", TrainConfig(parsing.MISSING))  # others would be read from files and images
    monkeypatch.setattr(train, "_parse_without_recipe", lambda arguments: train._parse(arguments, defaults))
    words = shlex.split(command, comments=True)
    words = words[1 : next((i for i, word in enumerate(words) if word in (";", "&&", "|", ">", "&")), None)]
    try:
        command_line.main(words)
    except ParsedError:
        return
    except SystemExit:
        pytest.fail(f"{place}: {command}\n{capsys.readouterr().err}")
    assert set(words) & {"--help", "--version"}, "it did something else than to parse"


def test_commands_are_found():
    assert len(commands(pathlib.Path(small.ROOT / "README.md").read_text())) >= 7
    text = "```shell\nA=1 bitdance sample \\\n  --seed 1  # why\ntorchrun -m bitdance train x\n```\n`bitdance no`\n"
    assert commands(text) == ["bitdance sample    --seed 1  # why", "bitdance train x"]
