"""`bitdance info`: what is in a file of weights and where each part was found, or the status of a training run."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from bitdance.cli.parsing import Positional, parse
from bitdance.config import RELEASED_MODELS, AutoencoderConfig, BitDanceConfig
from bitdance.runtime.errors import UserError, printable

if TYPE_CHECKING:
    from bitdance.weights.layout import WeightsFile

SOURCES = {
    "shapes": "from shapes",
    "args": "from args",
    "file": "in the file",
    "default": "published default",  # the defaults of the configuration are those of the released models
}
MAX_ITEMS = 10

EXAMPLES = """
bitdance info runs/model
bitdance info models/BitDance-ImageNet/BitDance_B_16X.pt
bitdance info demo --json
"""


@dataclasses.dataclass(frozen=True)
class Info:
    """Show what is in a file of weights, or the status of a training run, with a report for the browser.

    Attributes:
        name: a file of weights, released (.pt, .safetensors) or ours; demo; a released model; or the folder of a run.
        json: print JSON.
    """

    name: Positional[str]
    json: bool = False


def main(arguments: list[str]) -> None:
    """Runs the command."""
    command = parse(Info, arguments, "bitdance info", EXAMPLES)
    from bitdance.runtime.run_folder import SETTINGS
    from bitdance.weights import weights_file
    from bitdance.weights.resolve import DEMO_MODELS, find_weights

    if command.name not in DEMO_MODELS and (pathlib.Path(command.name) / SETTINGS).exists():
        _show_run(command)
        return
    facts = describe_file(weights_file.read(find_weights(command.name, download=False)))
    print(json.dumps(facts, indent=2) if command.json else format_file(facts))


def _show_run(command: Info) -> None:
    from bitdance.training import status
    from bitdance.training.run_report import write_report

    folder = pathlib.Path(command.name)
    facts = status.describe_run(folder)
    report = None
    try:
        report = str(write_report(folder, facts))
    except UserError as error:  # the text is worth printing without the report
        print(f"bitdance: {error}", file=sys.stderr)
    if command.json:
        print(json.dumps(facts | {"report": report}, indent=2))
    else:
        print(status.format_run(facts) + (f"\n\nreport: {report}" if report else ""))


def describe_file(contents: WeightsFile) -> dict[str, Any]:
    """Returns everything a file says, for JSON, after comparing its tensors with those of the networks.

    Raises:
        UserError: a tensor is missing, unexpected or has another shape, or the file holds no network.
    """
    from bitdance.weights import network_config

    networks = {}
    there = [name for name in ("ema", "model") if contents.states.get(name)]
    if "autoencoder" not in contents.parts or "model" in contents.parts:  # without either, this says what is missing
        used = contents.choose_weights()
        facts = _describe_network(contents, used, network_config.describe_model(contents))
        networks["model"] = {"weights": used, "weights_in_file": there, **facts}
    if "autoencoder" in contents.parts:
        facts = _describe_network(contents, "autoencoder", network_config.describe_autoencoder(contents))
        in_training = {"weights": there[0], "weights_in_file": there} if there and "model" not in networks else {}
        networks["autoencoder"] = in_training | facts
    metadata = {key: value for key, value in sorted(contents.metadata.items()) if key not in ("config", "checksum")}
    return {
        "file": str(contents.path),
        "bytes": contents.path.stat().st_size,
        "layout": contents.layout,
        "metadata": metadata,
        **networks,
        "args": contents.args,
    }


def _describe_network(contents: WeightsFile, state_name: str, description: Any) -> dict[str, Any]:
    from bitdance.weights.network_config import check_tensors

    config, state = description.config, contents.states[state_name]
    check_tensors(contents.path, config, state)
    return {
        "parameters": sum(value.numel() for value in state.values()),
        "dtypes": sorted({str(value.dtype).removeprefix("torch.") for value in state.values()}),
        "released_as": _released_as(config),
        "config": {
            name: {"value": value, "source": description.sources[name]}
            for name, value in dataclasses.asdict(config).items()
        },
    }


def _released_as(config: BitDanceConfig | AutoencoderConfig) -> str | None:
    """Returns the released network with the same configuration, except for class names."""
    if isinstance(config, AutoencoderConfig):
        return "ae_d16c32" if config == AutoencoderConfig() else None
    nameless = dataclasses.replace(config, class_names=())
    return next((f"BitDance-{name}" for name, release in RELEASED_MODELS.items() if release.config == nameless), None)


def format_file(facts: dict[str, Any]) -> str:
    """Formats the result of `describe_file` as lines of (name, value, source), one block per network."""
    blocks: dict[str, list[tuple[str, str, str]]] = {"": [("layout", facts["layout"], "")]}
    blocks[""] += [(_text(name), _text(value), "") for name, value in facts["metadata"].items() if name != "format"]
    for part in ("model", "autoencoder"):
        if part in facts:
            blocks[part] = _rows(facts[part])
    if facts["args"]:
        blocks["training args"] = [(_text(name), _text(value), "") for name, value in facts["args"].items()]
    rows = [row for block in blocks.values() for row in block]
    first = max(len(name) for name, _, _ in rows) + 2
    second = max((len(value) for _, value, source in rows if source), default=0) + 2
    lines = [f"{facts['file']} ({facts['bytes'] / 1e6:.1f} MB)"]
    for title, block in blocks.items():
        if title:
            lines += ["", title]
        lines += [f"  {name:<{first}}{value:<{second}}{source}".rstrip() for name, value, source in block]
    return "\n".join(lines)


def _rows(network: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    if "weights" in network:
        others = [name for name in network["weights_in_file"] if name != network["weights"]]
        note = f"; {', '.join(others)} is there too" if others else ", the only ones"
        rows.append(("weights", f"{network['weights']}{note}", ""))
    rows.append(("parameters", f"{network['parameters'] / 1e6:.2f} million, {', '.join(network['dtypes'])}", ""))
    if network["released_as"]:
        rows.append(("released model", network["released_as"], ""))
    for name, field in network["config"].items():
        rows.append((name, _text(field["value"]), SOURCES[field["source"]]))
    return rows


def _text(value: Any) -> str:
    """Formats a value on one line; of long lists only the beginning."""
    if isinstance(value, list | tuple):
        items = ", ".join(map(_text, value[:MAX_ITEMS])) or "none"
        return f"{items}, ... ({len(value)})" if len(value) > MAX_ITEMS else items
    return printable(str(value))
