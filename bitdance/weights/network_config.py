"""Configurations of networks from the names and shapes of their tensors, and the tensors that a configuration has."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bitdance.config import AutoencoderConfig, BitDanceConfig, Weights
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.transformer import BitDance
from bitdance.runtime.errors import UserError, printable
from bitdance.weights.layout import State, WeightsFile

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Types of the values that a file may hold for fields that shapes do not tell.
_IS_VALID: dict[str, Callable[[Any], bool]] = {
    "token_order": lambda value: isinstance(value, str),
    "time_shift": lambda value: isinstance(value, int | float),
    "class_names": lambda value: isinstance(value, tuple) and all(isinstance(name, str) for name in value),
    "bits": lambda value: type(value) is int,
    "split": lambda value: type(value) is int,
    "gray_code": lambda value: type(value) is bool,
    "bit_depths": lambda value: isinstance(value, tuple) and all(type(depth) is int for depth in value),
}


class NetworkDescription(NamedTuple):
    """A configuration, and where each of its fields was found: `shapes`, `args`, `file` or `default`."""

    config: Any
    sources: dict[str, str]


def describe_model(file: WeightsFile, weights: Weights | None = None) -> NetworkDescription:
    """Returns the `BitDanceConfig` of the model in a file.

    Raises:
        UserError: the file holds no model, or its tensors match no configuration.
    """
    return _describe(file, file.states[file.choose_weights(weights)], BitDanceConfig)


def describe_autoencoder(file: WeightsFile) -> NetworkDescription:
    """Returns the `AutoencoderConfig` of the autoencoder in a file.

    Raises:
        UserError: the file holds no autoencoder, or its tensors match no configuration.
    """
    if not file.states.get("autoencoder"):
        raise file.lacks("autoencoder")
    return _describe(file, file.states["autoencoder"], AutoencoderConfig)


def _describe(
    file: WeightsFile, state: State, cls: type[BitDanceConfig] | type[AutoencoderConfig]
) -> NetworkDescription:
    names = [field.name for field in dataclasses.fields(cls)]
    try:
        found = _model_sizes(state) if cls is BitDanceConfig else _autoencoder_sizes(state, file.config)
        if file.config is not None:
            part = "model" if cls is BitDanceConfig else "autoencoder"
            source, settings = "file", _settings_in_file(file.config.get(part), part, names, found)
        else:
            source, settings = "args", _settings_in_args(file.args, found) if cls is BitDanceConfig else {}
        for name in settings.keys() & _IS_VALID.keys():
            if not _IS_VALID[name](settings[name]):
                raise UserError(f"{name}={printable(repr(settings[name]))} has the wrong type: the file is damaged.")
        sources = dict.fromkeys(names, "default") | dict.fromkeys(found, "shapes") | dict.fromkeys(settings, source)
        return NetworkDescription(cls(**settings | found), sources)
    except UserError as error:
        # Without the notation that the command line shows as a flag: these are sizes in the file.
        raise UserError(f"{file.path}: {str(error).replace('=', ' ')}") from None


def _model_sizes(state: State) -> dict[str, Any]:
    """Returns the fields of `BitDanceConfig` that follow from names and shapes."""
    dim = _shape(state, "emb_norm.weight", 1)[0]
    classes, class_width = _shape(state, "cls_embedding.weight", 2)
    tokens = _shape(state, "pos_for_diff.weight", 2)[0]
    if class_width % dim:
        sizes = f"rows of {class_width} numbers, which is not a multiple of the width {dim}"
        raise UserError(f"tensor cls_embedding.weight has {sizes}: no BitDance model has that.")
    if math.isqrt(tokens) ** 2 != tokens:
        raise UserError(f"tensor pos_for_diff.weight has {tokens} rows, not a square: no BitDance model has that.")
    return {
        "dim": dim,
        "n_layer": _count(state, "layers."),
        "head_dim": _shape(state, "head.net.input_proj.weight", 2)[0],
        "head_layers": _count(state, "head.net.res_blocks."),
        "head_ada_ln": _count(state, "head.net.ada_ln_blocks."),
        "parallel_num": _shape(state, "query_token", 3)[1] + 1 if "query_token" in state else 1,
        "grid": math.isqrt(tokens),
        "bits": _shape(state, "proj_in.w1.weight", 2)[1],
        "cls_token_num": class_width // dim,
        "num_classes": classes - 1,
    }


def _autoencoder_sizes(state: State, stored: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the fields of `AutoencoderConfig` that follow from names and shapes, and from the stored `split`."""
    own = (stored or {}).get("autoencoder")
    split = own.get("split") if isinstance(own, dict) else 1
    levels = range(_count(state, "encoder.down."))
    inputs = _shape(state, "encoder.conv_in.weight", 4)[1]
    return {
        "widths": tuple(_shape(state, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in levels),
        "blocks": _count(state, "encoder.mid_block."),
        "bits": _shape(state, "decoder.conv_in.weight", 4)[1] // (split**2 if type(split) is int and split > 0 else 1),
        "space_to_depth": math.isqrt(inputs // 3),
        "linear": "encoder.linear.weight" in state,
    }


def _count(state: State, prefix: str) -> int:
    """Counts the blocks `prefix`0, `prefix`1, ..."""
    pattern = re.compile(re.escape(prefix) + r"([0-9]{1,6})\.")
    found = {int(match.group(1)) for name in state if (match := pattern.match(name))}
    missing = next(i for i in range(len(found) + 1) if i not in found)
    if missing < len(found) or not found:
        raise UserError(f"all tensors {prefix}{missing}.* are missing: the file is incomplete.")
    return len(found)


def _shape(state: State, name: str, dimensions: int) -> tuple[int, ...]:
    if name not in state:
        raise UserError(f"tensor {name} is missing: the file is incomplete or not a BitDance model.")
    shape = tuple(state[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise UserError(f"tensor {name} has the shape {shape}: no BitDance model has that.")
    return shape


def _settings_in_args(args: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of `BitDanceConfig` that training arguments give."""
    if args.get("patch_size") not in (None, 1):
        patch_size = printable(repr(args["patch_size"]))
        raise UserError(f"its args have patch_size={patch_size}: only models with patch_size=1 can be read.")
    keys = {"token_order": "parallel_mode", "time_shift": "time_shift"}
    settings = {name: args[key] for name, key in keys.items() if key in args}
    names = args.get("class_names")  # of files that this project wrote in the released layout
    if isinstance(names, list) and len(names) == found["num_classes"] and all(isinstance(name, str) for name in names):
        settings["class_names"] = tuple(names)
    return settings


def _settings_in_file(stored: Any, part: str, names: list[str], found: dict[str, Any]) -> dict[str, Any]:
    """Returns the configuration that a file of ours stores, after comparing it with the shapes."""
    if not isinstance(stored, dict):
        raise UserError(f"it holds no configuration of its {part}: write it again.")
    if unknown := sorted(stored.keys() - set(names)):
        fields = printable(", ".join(unknown))
        raise UserError(f"its configuration has {fields}, which this version does not know: update bitdance.")
    # JSON has lists where the configuration has tuples.
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
    for name in found.keys() & settings.keys():
        if settings[name] != found[name]:
            values = f"{name}={printable(repr(settings[name]))} and its tensors {found[name]}"
            raise UserError(f"its configuration has {values}: the file is damaged.")
    return settings


def check_tensors(
    path: pathlib.Path, config: BitDanceConfig | AutoencoderConfig, state: Mapping[str, Tensor]
) -> BitDance | Autoencoder:
    """Compares names, shapes and dtypes with those of a network, and returns the network without values.

    Raises:
        UserError: names at most three tensors that are missing, unexpected, or of another shape or dtype.
    """
    network = empty_network(config)
    expected = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    faults = [f"{name} is missing" for name in expected if name not in state]
    faults += [f"{printable(name)} is not part of the model" for name in state if name not in expected]
    for name in expected.keys() & state.keys():
        value = state[name]
        if tuple(value.shape) != expected[name]:
            faults.append(f"{name} has the shape {tuple(value.shape)} instead of {expected[name]}")
        elif value.dtype not in _FLOATS:
            faults.append(f"{name} holds {value.dtype} instead of floating-point numbers")
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(f"{path}: tensor {'; '.join(sorted(faults)[:3])}{more}: the file does not match its network.")
    return network


def count_parameters(network: nn.Module) -> int:
    """Returns the number of values of a network's parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


class _NoNormalNumbers(TorchFunctionMode):
    """Leaves out normal numbers. On the meta device they import PyTorch's compiler, which takes over a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **(kwargs or {}))


def empty_network(config: BitDanceConfig | AutoencoderConfig) -> BitDance | Autoencoder:
    """Builds a network on the meta device, which takes no memory."""
    with torch.device("meta"), _NoNormalNumbers():
        return BitDance(config) if isinstance(config, BitDanceConfig) else Autoencoder(config)
