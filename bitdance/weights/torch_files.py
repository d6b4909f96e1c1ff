"""The released `.pt` files, pickles that torch wrote: read without running code, and written.

A model file has the state dicts `ema` and/or `model`, with the autoencoder under `vae.`, and maybe the training
arguments `args`; an autoencoder file has `state_dict`. `bitdance.runtime.pickle_guard` checks the pickle before torch's
restricted unpickler reads it, which runs no code either.
"""

from __future__ import annotations

import argparse
import math
import os
import pathlib
import re
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitdance.config import Weights
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.transformer import BitDance
from bitdance.runtime.atomic_files import atomic_write
from bitdance.runtime.errors import UserError, printable
from bitdance.runtime.pickle_guard import UnsafePickleError, check_pickle
from bitdance.weights.layout import State, WeightsFile, damaged, select_autoencoder, split_bare_state, split_state

# All globals that a pickle of weights and training arguments imports, as "module name".
_ALLOWED = re.compile(
    r"torch\._utils _rebuild_(?:tensor|tensor_v2|tensor_v3|parameter)"
    r"|torch \w+Storage|torch\.storage UntypedStorage|torch (?:Size|device|bool|(?:bfloat|float|u?int|complex)\d+\w*)"
    r"|torch\.nn\.parameter Parameter|collections OrderedDict|argparse Namespace"
)
_MAX_PICKLE = 1 << 24  # bytes; the largest released model has about a million


def read_torch(path: pathlib.Path) -> WeightsFile:
    """Reads a file that `torch.save` wrote; in a zip file the tensors are memory maps.

    Raises:
        UserError: the file is damaged, holds something other than weights, or its pickle carries code.
    """
    with open(path, "rb") as file:
        start = file.read(4)
    is_zip = start == b"PK\x03\x04"
    if is_zip:
        _check_zip(path)
    else:
        _check_pickles(path)
        if not start.startswith(b"\x80\x02"):
            raise UserError(
                f"{path} is neither a torch file nor safetensors: expected a .pt or .safetensors file of weights."
            )
    try:
        # The restricted unpickler builds only tensors, containers and the allowed classes.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception:  # damage can cause almost any exception
        raise damaged(path) from None
    if not isinstance(data, Mapping):
        raise UserError(f"{path} holds a {type(data).__name__}: expected a dictionary of state dicts.")
    args = data.get("args")
    if args is not None and not isinstance(args, Mapping | argparse.Namespace):
        raise UserError(f"{path} holds args of type {type(args).__name__}: expected a Namespace or a dictionary.")
    states, layout = _split(path, data)
    return WeightsFile(path, layout, states, _to_json(args), None, {})


def _split(path: pathlib.Path, data: Mapping[Any, Any]) -> tuple[dict[str, State], str]:
    """Returns the state dicts by name, and a description of the layout."""
    states: dict[str, State] = {}
    for name in ("ema", "model"):
        if isinstance(data.get(name), Mapping):
            # The autoencoder is not trained, so it is the same in both.
            states = split_state(_check_state(path, f"`{name}`", data[name]), name) | states
    if isinstance(data.get("state_dict"), Mapping):
        states["autoencoder"] = select_autoencoder(_check_state(path, "`state_dict`", data["state_dict"]))
    if states:
        return states, "torch file with " + ", ".join(printable(str(key)) for key in data if isinstance(key, str))
    if data and all(isinstance(value, Tensor) for value in data.values()):
        return split_bare_state(_check_state(path, "the file", data)), "torch file, a bare state dict"
    raise UserError(f"{path} has none of `ema`, `model`, `state_dict`: it is not a file of BitDance weights.")


def _check_state(path: pathlib.Path, key: str, state: Mapping[Any, Any]) -> State:
    bad = [name for name, value in state.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if bad:
        reason = f"{key} holds {printable(repr(bad[0]))}, which is not a named tensor"
    elif sum(value.nbytes for value in state.values()) > path.stat().st_size:
        reason = f"the tensors of {key} have more bytes than the file"  # views can repeat a few numbers without limit
    else:
        return dict(state)
    raise UserError(f"{path}: {reason}: it is not a file of weights.")


def _to_json(args: Mapping[Any, Any] | argparse.Namespace | None) -> dict[str, Any]:
    """Converts training arguments to values that JSON has; of other values only the name of the type is kept."""

    def is_simple(value: Any) -> bool:
        return value is None or type(value) in (str, int, bool) or (type(value) is float and math.isfinite(value))

    result = {}
    for key, value in (vars(args) if isinstance(args, argparse.Namespace) else args or {}).items():
        if isinstance(value, list | tuple) and all(map(is_simple, value)):
            value = list(value)
        elif not is_simple(value):
            value = str(value) if type(value) is float else f"<{type(value).__name__}>"
        result[str(key) if is_simple(key) else f"<{type(key).__name__}>"] = value
    return result


def _check_zip(path: pathlib.Path) -> None:
    """Checks the checksums of a zip file, which torch does not, and its pickle; nothing is expanded."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            pickles = [entry for entry in entries if re.fullmatch(r"[^/]+/data\.pkl", entry.filename, re.IGNORECASE)]
            is_stored = all(
                entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
                for entry in entries
            )
            if len(pickles) != 1 or not is_stored or sum(e.file_size for e in entries) > path.stat().st_size:
                raise UserError(f"{path} is a zip archive but not a file of weights: expected a .pt that torch saved.")
            if any(entry.filename.endswith("/constants.pkl") for entry in entries):
                raise _carries_code(path, "a TorchScript program")
            if bad_entry := archive.testzip():
                raise damaged(path, f"checksum of {printable(bad_entry)}")
            with archive.open(pickles[0]) as file:
                _check_pickle(path, file.read(_MAX_PICKLE + 1))
    except UserError:
        raise
    except Exception:  # damage can cause almost any exception
        raise damaged(path) from None


def _check_pickles(path: pathlib.Path) -> None:
    """Checks the pickles of a torch file without a zip: magic number, version, system, weights, names."""
    with open(path, "rb") as file:
        data = file.read(5 * (_MAX_PICKLE + 1))
    try:
        for _ in range(5):
            data = data[_check_pickle(path, data) :]
    except UserError:
        raise
    except Exception:  # not a pickle, which the caller notices
        pass


def _check_pickle(path: pathlib.Path, data: bytes) -> int:
    """Returns the length of the pickle at the beginning of `data`; raises almost any error if there is none."""
    try:
        return check_pickle(data, _ALLOWED, _MAX_PICKLE)
    except UnsafePickleError as error:
        if error.code:
            raise _carries_code(path, printable(error.code)) from None
        raise UserError(f"{path} is not a file of weights ({error}): download it again.") from None


def _carries_code(path: pathlib.Path, code: str) -> UserError:
    return UserError(
        f"{path} carries code ({code}, which weights do not need) and was not loaded: get it from a source that you "
        "trust, or have it converted to safetensors there."
    )


def save_released(
    path: str | os.PathLike[str],
    network: BitDance | Autoencoder,
    autoencoder: Autoencoder | None = None,
    weights: Weights = "ema",
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a `.pt` file in the released layout, atomically; the original's scripts can read it.

    Args:
        path: the file.
        network: a model or an autoencoder.
        autoencoder: for a model, the autoencoder to store inside it, which the original requires.
        weights: key of the model's weights.
        dtype: to store in, by default that of each tensor.

    Raises:
        UserError: the file cannot be written, or the layout cannot describe the autoencoder.
    """
    decoder = network.config if isinstance(network, Autoencoder) else autoencoder.config if autoencoder else None
    if decoder is not None and (decoder.split, decoder.bit_depths, decoder.gray_code) != (1, (), False):
        lacks = "which has no place for the `split`, `bit_depths` and `gray_code` of this autoencoder"
        raise UserError(f"{path} would be in the released layout, {lacks}: use .safetensors.")
    state = dict(network.state_dict())
    if isinstance(network, BitDance) and autoencoder is not None:
        state |= {f"vae.{name}": value for name, value in autoencoder.state_dict().items()}
    state = {name: value.detach().to(dtype or value.dtype) for name, value in state.items()}
    data: dict[str, Any] = {"state_dict": state}
    if isinstance(network, BitDance):
        config = network.config
        args = {name: getattr(config, name) for name in ("parallel_num", "time_shift", "num_classes", "cls_token_num")}
        args |= {"parallel_mode": config.token_order, "latent_dim": config.bits, "patch_size": 1}
        data = {weights: state, "args": argparse.Namespace(**args, class_names=list(config.class_names))}
    with atomic_write(path) as temporary:
        torch.save(data, temporary)
