"""Safetensors files: ours, with a configuration and checksums in the metadata, and bare state dicts of others.

The metadata of our files are `format`, `format_version`, `kind`, `config` (JSON), `digest` (SHA-256 of the tensors),
`checksum` (SHA-256 of the other metadata), and strings that the caller adds. Equal contents make equal files.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitdance.runtime.atomic_files import atomic_write
from bitdance.runtime.errors import UserError, printable
from bitdance.weights.int8 import dequantize
from bitdance.weights.layout import State, WeightsFile, damaged, split_bare_state

FORMAT = "bitdance"
VERSION = 2
KINDS = ("model", "autoencoder", "training", "batch", "tokens", "index")
"""What a file of ours holds: one network, a checkpoint, a skipped batch, a shard of tokens, or the index of a tar."""


def read_safetensors(path: pathlib.Path, verify: bool) -> WeightsFile:
    """Reads a safetensors file; the tensors are memory maps.

    Args:
        path: the file.
        verify: compare the tensors of a file of ours with their digest, for which all of it is read.

    Raises:
        UserError: the file is damaged, or was written by another version.
    """
    from safetensors import safe_open

    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"cannot read {path}: its name is not UTF-8; rename it.") from None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except Exception:  # damage can cause almost any exception
        raise damaged(path) from None
    if metadata.get("format") != FORMAT:
        if "format_version" in metadata and "checksum" in metadata:
            raise damaged(path)  # one of ours
        return WeightsFile(path, "safetensors", split_bare_state(state), {}, None, metadata)
    version = metadata.get("format_version", "")
    if not re.fullmatch("[0-9]{1,9}", version):
        raise damaged(path)
    if int(version) != VERSION:
        age, advice = ("a newer", "update bitdance") if int(version) > VERSION else ("an older", "create it again")
        raise UserError(
            f"{path} was written by {age} version of bitdance (format {version} instead of {VERSION}): {advice}."
        )
    if _checksum(metadata) != metadata.get("checksum"):
        raise damaged(path, "its metadata do not match their checksum")
    try:
        if verify and digest(state) != metadata["digest"]:
            raise damaged(path, "its tensors do not match the digest")
        config, kind = json.loads(metadata["config"]), metadata["kind"]
    except UserError:
        raise
    except (KeyError, ValueError, RuntimeError):
        raise damaged(path) from None
    if kind not in KINDS:
        raise UserError(f"{path} has the unknown kind {printable(repr(kind))}: expected one of {', '.join(KINDS)}.")
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a configuration of type {type(config).__name__}: write the file again.")
    if kind in ("model", "autoencoder"):
        state = dequantize(path, state)
    states = _split_checkpoint(path, state, metadata) if kind == "training" else {kind: state}
    return WeightsFile(path, f"safetensors of bitdance, {kind}", states, {}, config, metadata)


def _split_checkpoint(path: pathlib.Path, state: State, metadata: Mapping[str, str]) -> dict[str, State]:
    """Divides the tensors `model/*`, `ema/*`, `optimizer/*` and `discriminator/*`."""
    states: dict[str, State] = {}
    for name, value in state.items():
        part, slash, rest = name.partition("/")
        if not slash:
            raise damaged(path)
        states.setdefault(part, {})[rest] = value
    if metadata.get("network") == "autoencoder":
        states["autoencoder"] = states.get("ema") or states.get("model", {})
    return states


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], kind: str, config: Mapping[str, Any], **metadata: str
) -> str:
    """Writes tensors in our format, atomically, and returns their digest.

    Args:
        path: the file.
        tensors: by name.
        kind: one of `KINDS`.
        config: stored as JSON.
        metadata: further strings.

    Raises:
        UserError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    header = {
        "format": FORMAT,
        "format_version": str(VERSION),
        "kind": kind,
        "config": json.dumps(config),
        "digest": digest(tensors),
        **metadata,
    }
    header["checksum"] = _checksum(header)
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, header)
        except SafetensorError as error:
            raise OSError(None, str(error)) from error
        _sort_header(temporary)
    return header["digest"]


def _sort_header(path: pathlib.Path) -> None:
    """Sorts the metadata, which safetensors writes in another order each time."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size, "the tensors behind the header cannot move"
        file.seek(8)
        file.write(text.ljust(size))


def digest(state: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of names, dtypes, shapes and values, independent of the order of the tensors."""
    h = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        h.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        if value.numel():
            h.update(value.view(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def _checksum(metadata: Mapping[str, str]) -> str:
    """Returns the SHA-256 of the metadata except the checksum itself; the tensors have their own digest."""
    others = {key: value for key, value in metadata.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()
