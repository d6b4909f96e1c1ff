"""Starting weights of a training that come from another network, of which only what must change is replaced."""

from __future__ import annotations

import dataclasses
import os

import torch.nn.functional as F
from torch import Tensor

from bitdance.config import ModelSizes
from bitdance.data.class_names import names_of
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.tokens import grid_from_tokens, tokens_from_grid
from bitdance.models.transformer import BitDance
from bitdance.runtime.errors import UserError
from bitdance.training.train_config import InitPart
from bitdance.weights import weights_file
from bitdance.weights.resolve import find_weights

FREE_SIZES = ("num_classes", "time_shift")
"""Sizes of a model in which it may differ from the one that it starts from."""


def initialize_model(network: BitDance, name: str | os.PathLike[str]) -> str:
    """Copies the weights of another model, by default its EMA, and says what was replaced.

    The embedding of a class is that of the class of this name or WordNet id there, see `names_of`, else that of the
    null class. Positions are interpolated for another grid.

    Args:
        network: the model to initialize.
        name: name or file of the other one, see `bitdance.weights.resolve.find_weights`.

    Raises:
        UserError: the sizes differ in something else.
    """
    contents = weights_file.read(find_weights(name))
    other = weights_file.load_model(contents)
    mine, theirs = network.config, other.config
    names = [field.name for field in dataclasses.fields(ModelSizes) if field.name not in FREE_SIZES] + ["bits"]
    if different := [size for size in names if getattr(mine, size) != getattr(theirs, size)]:
        sizes = ", ".join(f"{size} {getattr(theirs, size)}, not {getattr(mine, size)}" for size in different)
        raise UserError(f"{contents.path} has other sizes than this model ({sizes}): `init_from` needs the same.")
    state, replaced = other.state_dict(), []
    if mine.class_names != theirs.class_names or mine.num_classes != theirs.num_classes:
        known, null = names_of(theirs.class_names, theirs.num_classes), theirs.num_classes
        found = map(known.find_name, mine.class_names)
        rows = [null if row is None else row for row in found]
        state["cls_embedding.weight"] = state["cls_embedding.weight"][[*rows, null]]
        if new := rows.count(null):
            replaced.append(f"{new} of {mine.num_classes} classes are new and start from the embedding of no class")
    if mine.grid != theirs.grid:
        state["pos_for_diff.weight"] = _resize_positions(state["pos_for_diff.weight"], mine.grid, mine.patch)
        replaced.append(f"positions are interpolated from {theirs.grid} x {theirs.grid} to {mine.grid} x {mine.grid}")
    network.load_state_dict(state)
    return f"starts from {os.fspath(name)}" + "".join(f"; {part}" for part in replaced)


def _resize_positions(table: Tensor, grid: int, patch: int) -> Tensor:
    """Interpolates an embedding of positions (N, D) in token order to another grid."""
    raster = grid_from_tokens(table[None].float(), patch)  # (1, D, h, w)
    resized = F.interpolate(raster, (grid, grid), mode="bilinear", align_corners=False)
    return tokens_from_grid(resized, patch)[0].to(table.dtype)


def initialize_autoencoder(network: Autoencoder, name: str, part: InitPart, keeps_tokens: bool) -> None:
    """Copies the weights of another autoencoder, all or those of its decoder.

    Raises:
        UserError: a tensor has another shape, or exists in only one of the two; or an option would change tokens that
            are to be kept.
    """
    contents = weights_file.read(find_weights(name, "autoencoder"))
    other = weights_file.load_autoencoder(contents)
    if keeps_tokens:
        sizes_kept, sizes_set = (dataclasses.asdict(config) for config in (other.config, network.config))
        if changed := [f"{name} {kept}" for name, kept in sizes_kept.items() if sizes_set[name] != kept]:
            sizes = ", ".join(changed)
            raise UserError(f"`decoder_only` keeps the tokens of {contents.path}, so set its sizes here, too: {sizes}.")
    mine, theirs = (network, other) if part == "all" else (network.decoder, other.decoder)
    found = theirs.state_dict()
    for key, value in mine.state_dict().items():
        if key not in found or found[key].shape != value.shape:
            shape = tuple(found[key].shape) if key in found else "missing"
            problem = f"{contents.path} has other sizes ({key} is {shape} instead of {tuple(value.shape)})"
            raise UserError(f"{problem}: `init_from` needs the same sizes, see `bitdance info {contents.path}`.")
    if unknown := sorted(found.keys() - mine.state_dict().keys()):
        raise UserError(
            f"{contents.path} has other sizes ({unknown[0]} is not needed): `init_from` needs the same sizes."
        )
    mine.load_state_dict(found)
