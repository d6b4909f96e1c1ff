"""Files of weights: read in any known layout, loaded as networks, written in our format.

The released files are read by `bitdance.weights.torch_files`, our own by `bitdance.weights.safetensors_files`. Either
way the file itself says which network it holds, see `bitdance.weights.network_config`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from bitdance.config import AutoencoderConfig, BitDanceConfig, Weights
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.transformer import BitDance, stored_dtype
from bitdance.runtime.errors import UserError, is_out_of_memory
from bitdance.weights.int8 import quantize
from bitdance.weights.layout import State, WeightsFile, damaged
from bitdance.weights.network_config import check_tensors, describe_autoencoder, describe_model
from bitdance.weights.resolve import find_weights
from bitdance.weights.safetensors_files import digest, read_safetensors, save_tensors
from bitdance.weights.torch_files import read_torch


def read(path: str | os.PathLike[str], verify: bool = True) -> WeightsFile:
    """Reads a file of weights in any known layout, whatever its suffix.

    Tensors are memory maps where the format allows it. To verify checksums, the whole file is read once.

    Args:
        path: the file.
        verify: compare the tensors of a file of ours with their digest.

    Raises:
        UserError: the file does not exist, is damaged, holds something other than weights, or its pickle carries code.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a .pt or .safetensors file of weights.")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file: name a .pt or .safetensors file of weights.")
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the path.") from error
    if not start:
        raise damaged(path, "it is empty")
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        raise UserError(f"{path} is a web page, not weights: the download failed, download it again.")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not weights: fetch the file itself with git lfs pull.")
    if start[8:9] == b"{":  # before torch files, since the length before it may look like a pickle
        return read_safetensors(path, verify)
    return read_torch(path)


def load_model(
    path: str | os.PathLike[str] | WeightsFile, weights: Weights | None = None, dtype: torch.dtype = torch.float32
) -> BitDance:
    """Loads a BitDance model, in evaluation mode on the CPU.

    Args:
        path: a name or file as `find_weights` takes it (`demo`, a released model, a run folder, a `.pt` or
            `.safetensors` file), or the result of `read`.
        weights: `ema` or `model` (raw); by default the EMA if there is one.
        dtype: of the matrix products, see `bitdance.models.transformer.stored_dtype`.

    Raises:
        UserError: the file is missing, damaged, not a model, or carries code; or a tensor is missing, unexpected, of
            another shape, or not finite.
    """
    file = path if isinstance(path, WeightsFile) else read(find_weights(path))
    config = describe_model(file, weights).config
    network = cast(BitDance, _load(config, file.path, file.states[file.choose_weights(weights)], dtype))
    network.reset_buffers()
    return network


def load_autoencoder(
    path: str | os.PathLike[str] | WeightsFile, dtype: torch.dtype = torch.float32, weights: Weights | None = None
) -> Autoencoder:
    """Loads an autoencoder, from its own file or from inside that of a model, in evaluation mode on the CPU.

    Args:
        path: a name or file as `find_weights` takes it, or the result of `read`.
        dtype: of the parameters.
        weights: of a checkpoint of an autoencoder, `ema` or `model` (raw); by default the EMA if there is one.

    Raises:
        UserError: as for `load_model`.
    """
    file = path if isinstance(path, WeightsFile) else read(find_weights(path, "autoencoder"))
    config = describe_autoencoder(file).config
    name = weights if weights is not None and file.trains_autoencoder else "autoencoder"
    if name not in file.states:
        raise file.lacks(f"{name} weights")
    return cast(Autoencoder, _load(config, file.path, file.states[name], dtype))


def tokenizer_digest(file: WeightsFile) -> str:
    """Returns a SHA-256 of what decides on the tokens of an autoencoder: its encoder, and the order of its bits.

    It is the same after training of the decoder alone, also if the file that it started from was in half precision.
    """
    config = describe_autoencoder(file).config
    state = file.states["autoencoder"]
    encoder = {name: value.float() for name, value in state.items() if name.startswith("encoder.")}
    text = f"{digest(encoder)} {config.split} {config.bit_depths} {config.gray_code}"
    return hashlib.sha256(text.encode()).hexdigest()


def _load(
    config: BitDanceConfig | AutoencoderConfig, path: pathlib.Path, state: State, dtype: torch.dtype
) -> BitDance | Autoencoder:
    """Builds a network from copies of these tensors, after all names, shapes and values were checked."""
    try:
        network = check_tensors(path, config, state)
        copies = {}
        for name, value in state.items():
            # The file may be memory-mapped, and its tensors views of one another.
            stored = stored_dtype(name, dtype) if isinstance(network, BitDance) else dtype
            copies[name] = value.detach().to(stored, copy=True, memory_format=torch.contiguous_format)
            if not copies[name].isfinite().all():
                raise UserError(f"{path}: tensor {name} has values that are not finite: the file is damaged.")
        network.load_state_dict(copies, assign=True)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{path} needs more memory than is free: close other programs or use a smaller one.") from error
    return network.eval().requires_grad_(False)


def save(
    path: str | os.PathLike[str],
    network: BitDance | Autoencoder,
    state: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Writes one network with its configuration as safetensors, atomically, and returns the digest of the tensors.

    Args:
        path: the file.
        network: gives the configuration, and the tensors if `state` is not given.
        state: other tensors of the same names, such as the EMA.
        dtype: to store in, by default that of each tensor; int8 for matrices, see `bitdance.weights.int8`.
        metadata: further strings for the metadata of the file.

    Raises:
        UserError: the file cannot be written, or a value is not finite in this dtype.
    """
    kind = "model" if isinstance(network, BitDance) else "autoencoder"
    tensors = {name: value.detach() for name, value in (state or network.state_dict()).items()}
    if dtype == torch.int8:
        tensors = quantize(tensors)
    elif dtype is not None:
        tensors = {name: value.to(dtype) for name, value in tensors.items()}
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise UserError(f"{path} was not written: {name} has values that are not finite in {value.dtype}.")
    return save_tensors(path, tensors, kind, {kind: dataclasses.asdict(network.config)}, **(metadata or {}))
