"""`bitdance convert`: any readable file of weights as one small file of our format, or in the released layout."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Literal

from bitdance.cli.parsing import Positional, parse
from bitdance.config import Weights
from bitdance.runtime.errors import UserError

EXAMPLES = """
bitdance convert runs/model model.safetensors --dtype float16
bitdance convert BitDance_B_16X.pt b16x.safetensors
bitdance convert runs/model small.safetensors --dtype int8
bitdance convert runs/model model.pt --autoencoder ae_d16c32.pt
"""


@dataclasses.dataclass(frozen=True)
class Convert:
    """Write weights in our format (.safetensors) or in the released layout (.pt).

    Attributes:
        source: demo, a released model, the folder of a run, or a file of weights, such as a checkpoint.
        target: file to write; its suffix selects the format. A .pt cannot hold an autoencoder with several bits per
            channel or with split cells, such as the demo's.
        autoencoder: for a .pt of a model, the autoencoder to store inside, as in the released files; by default the one
            inside the source, if any.
        part: the model or the autoencoder of the source; by default whichever it holds, the model first.
        weights: ema or model (raw); by default the EMA if there is one.
        cfg_scale: of a .safetensors of a model, store this guidance scale with it, as its default.
        dtype: to store in; int8, for .safetensors, stores matrices in 8 bits with a scale for each row.
    """

    source: Positional[str]
    target: Positional[pathlib.Path]
    autoencoder: str | None = None
    part: Literal["model", "autoencoder"] | None = None
    weights: Weights | None = None
    cfg_scale: float | None = None
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"


def main(arguments: list[str]) -> None:
    """Runs the command."""
    command = parse(Convert, arguments, "bitdance convert", EXAMPLES)
    if command.target.suffix not in (".pt", ".safetensors"):
        raise UserError(
            f"{command.target} has an unknown suffix: use .safetensors for our format, .pt for the released layout."
        )
    if command.autoencoder and command.target.suffix != ".pt":
        raise UserError(f"`autoencoder` is for .pt files, and {command.target} holds one network: leave it out.")
    if command.dtype == "int8" and command.target.suffix == ".pt":
        raise UserError(f"{command.target} would be in the released layout, which has no int8: use .safetensors.")
    import torch

    from bitdance.models.autoencoder import Autoencoder
    from bitdance.models.transformer import BitDance
    from bitdance.sampling.sampler import SamplingConfig
    from bitdance.weights import torch_files, weights_file
    from bitdance.weights.layout import CFG_SCALE, TOKENIZER_DIGEST
    from bitdance.weights.resolve import find_weights

    contents = weights_file.read(find_weights(command.source, command.part or "model"))
    part = command.part or ("model" if "model" in contents.parts else "autoencoder")
    kept = {key: contents.metadata[key] for key in ("step", TOKENIZER_DIGEST, CFG_SCALE) if key in contents.metadata}
    if command.cfg_scale is not None:
        if part == "autoencoder" or command.target.suffix == ".pt":
            raise UserError("`cfg_scale` is stored with a model, and in .safetensors only: leave it out.")
        kept[CFG_SCALE] = f"{SamplingConfig(1, command.cfg_scale).cfg_scale:g}"
    network: BitDance | Autoencoder
    if part == "model":
        network = weights_file.load_model(contents, command.weights)
    else:
        network = weights_file.load_autoencoder(contents, weights=command.weights)
    dtype = getattr(torch, command.dtype)
    if command.target.suffix == ".pt":
        source = contents
        if command.autoencoder:
            source = weights_file.read(find_weights(command.autoencoder, "autoencoder"))
        inside = weights_file.load_autoencoder(source) if "autoencoder" in source.parts else None
        name = contents.choose_weights(command.weights) if part == "model" else "ema"
        torch_files.save_released(command.target, network, inside, name, dtype)
        note = "released layout" + (", with its autoencoder" if inside and part == "model" else "")
    else:
        digest = weights_file.save(command.target, network, dtype=dtype, metadata=kept)
        note = f"digest {digest[:16]}"
    size = command.target.stat().st_size / 1e6
    print(f"{part} in {command.dtype}, {size:.2f} MB, {note}: {command.target}")
