"""`bitdance convert`: any file of weights that can be read, as one small file of our format."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Literal

from bitdance.cli.parsing import Positional, parse


@dataclasses.dataclass(frozen=True)
class Convert:
    """Write the weights of a file, released or our own, as one small file of our format (safetensors).

    Attributes:
        source: file of weights, such as a run's checkpoint.safetensors.
        target: file to write.
        part: the model or the autoencoder of the file; by default whichever it holds, the model first.
        weights: ema or model (raw); by default the EMA where there is one.
        dtype: to store in.
    """

    source: Positional[pathlib.Path]
    target: Positional[pathlib.Path]
    part: Literal["model", "autoencoder"] | None = None
    weights: Literal["ema", "model"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


def main(arguments: list[str]) -> None:
    """Runs the command."""
    command = parse(Convert, arguments, "bitdance convert")
    import torch

    from bitdance import checkpoint
    from bitdance.autoencoder import Autoencoder
    from bitdance.model import BitDance

    contents = checkpoint.read(command.source)
    part = command.part or ("model" if "model" in contents.parts else "autoencoder")
    kept: dict[str, str] = {
        key: contents.metadata[key] for key in ("step", "autoencoder_digest") if key in contents.metadata
    }
    network: BitDance | Autoencoder
    if part == "model":
        network = checkpoint.load_model(contents, command.weights)
    else:
        network = checkpoint.load_autoencoder(contents)
    digest = checkpoint.save(command.target, network, dtype=getattr(torch, command.dtype), metadata=kept)
    size = command.target.stat().st_size / 1e6
    print(f"{part} in {command.dtype}, {size:.2f} MB, digest {digest[:16]}: {command.target}")
