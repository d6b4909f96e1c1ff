"""`bitdance convert`: any file of weights that can be read, as one small file of our format."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Literal

from bitdance.cli.parsing import Positional, parse
from bitdance.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Convert:
    """Write the weights of a file, released or our own, in our format (.safetensors) or in the released layout (.pt).

    Attributes:
        source: file of weights, such as a run's checkpoint-<step>.safetensors.
        target: file to write; its ending says which format.
        autoencoder: for a .pt of a model the file of the autoencoder to put inside, as in the released ones; by default
            the one inside the source, if any.
        part: the model or the autoencoder of the file; by default whichever it holds, the model first.
        weights: ema or model (raw); by default the EMA where there is one.
        dtype: to store in.
    """

    source: Positional[pathlib.Path]
    target: Positional[pathlib.Path]
    autoencoder: pathlib.Path | None = None
    part: Literal["model", "autoencoder"] | None = None
    weights: Literal["ema", "model"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


def main(arguments: list[str]) -> None:
    """Runs the command."""
    command = parse(Convert, arguments, "bitdance convert")
    if command.target.suffix not in (".pt", ".safetensors"):
        raise UserError(
            f"{command.target} has no known ending: use .safetensors for our format, .pt for the released one."
        )
    if command.autoencoder and command.target.suffix != ".pt":
        raise UserError(f"--autoencoder goes with a .pt, {command.target} holds one network: leave it out.")
    import torch

    from bitdance.models.autoencoder import Autoencoder
    from bitdance.models.transformer import BitDance
    from bitdance.weights import weights_file

    contents = weights_file.read(command.source)
    part = command.part or ("model" if "model" in contents.parts else "autoencoder")
    kept: dict[str, str] = {
        key: contents.metadata[key] for key in ("step", "autoencoder_digest") if key in contents.metadata
    }
    network: BitDance | Autoencoder
    if part == "model":
        network = weights_file.load_model(contents, command.weights)
    else:
        network = weights_file.load_autoencoder(contents)
    dtype = getattr(torch, command.dtype)
    if command.target.suffix == ".pt":
        source = weights_file.read(command.autoencoder) if command.autoencoder else contents
        inside = weights_file.load_autoencoder(source) if "autoencoder" in source.parts else None
        name = weights_file.choose_weights(contents, command.weights) if part == "model" else "ema"
        weights_file.save_released(command.target, network, inside, name, dtype)
        said = "released layout" + (", with its autoencoder" if inside and part == "model" else "")
    else:
        digest = weights_file.save(command.target, network, dtype=dtype, metadata=kept)
        said = f"digest {digest[:16]}"
    size = command.target.stat().st_size / 1e6
    print(f"{part} in {command.dtype}, {size:.2f} MB, {said}: {command.target}")
