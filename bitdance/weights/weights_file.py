"""Reading weights, the released files and our own, with nothing but the file; writing ours atomically.

Released files are pickles of torch: a model file holds `ema` and/or `model` (state dicts with the autoencoder under
`vae.`) and maybe `args`; an autoencoder file holds `state_dict`. What they ask for is checked before anything is built,
then torch's restricted unpickler reads them, which runs no code. Our files are safetensors with the configuration and a
digest of the tensors in the metadata.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bitdance.config import AutoencoderConfig, BitDanceConfig
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.transformer import BitDance
from bitdance.runtime.atomic_files import atomic_write
from bitdance.runtime.errors import UserError
from bitdance.runtime.pickle_guard import UnsafePickleError, check_pickle
from bitdance.weights.resolve import find_weights

FORMAT = "bitdance"
VERSION = "2"

State = dict[str, Tensor]
Weights = Literal["ema", "model"]
Network = TypeVar("Network", BitDance, Autoencoder)

KINDS = ("model", "autoencoder", "training", "batch", "tokens", "index")
"""What a file of ours holds: one network, the whole state of a run, a batch that was kept to be looked at, a shard of a
token cache, or the index of a tar."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# All that a pickle of weights and training arguments asks for, as "module name".
_HARMLESS = re.compile(
    r"torch\._utils _rebuild_(?:tensor|tensor_v2|tensor_v3|parameter)"
    r"|torch \w+Storage|torch\.storage UntypedStorage|torch (?:Size|device|bool|(?:bfloat|float|u?int|complex)\d+\w*)"
    r"|torch\.nn\.parameter Parameter|collections OrderedDict|argparse Namespace"
)
_MAX_PICKLE = 1 << 24  # bytes; the largest released model has about a million


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a file of weights holds, before a network is made of it.

    Attributes:
        path: where it was read.
        layout: the layout in words, for `bitdance info`.
        states: state dicts by name (`ema`, `model`, `autoencoder`; of a run also `optimizer`), those that are there.
            Their tensors may be memory maps of the file.
        args: the training arguments beside the weights, as far as the file has any; values are plain as in JSON.
        config: the configuration inside the file, for files of ours.
        metadata: everything else that the file says of itself.
    """

    path: pathlib.Path
    layout: str
    states: dict[str, State]
    args: dict[str, Any]
    config: dict[str, Any] | None
    metadata: dict[str, str]

    @property
    def parts(self) -> tuple[str, ...]:
        """Which networks can be loaded: `model`, `autoencoder` or both."""
        # Of the training of an autoencoder, `ema` and `model` are autoencoders.
        model = self.metadata.get("network") != "autoencoder" and (self.states.get("ema") or self.states.get("model"))
        found = {"model": model, "autoencoder": self.states.get("autoencoder")}
        return tuple(name for name, state in found.items() if state)


@dataclasses.dataclass(frozen=True)
class Description:
    """A configuration and, for each of its fields, where it was found: `shapes`, `args`, `file` or `default`."""

    config: BitDanceConfig | AutoencoderConfig
    sources: dict[str, str]


# ---------------------------------------------------------------- reading files


def read(path: str | os.PathLike[str], verify: bool = True) -> Contents:
    """Reads a file of weights of any known layout, whatever its name ends in.

    The file's bytes pass through memory once, for the checksums of a torch file or the digest of ours; safetensors of
    others have none. Tensors are memory maps where the format allows it, so this takes little memory.

    Args:
        verify: compare the tensors of a file of ours with their digest, for which all of it is read.

    Raises:
        UserError: no such file, not a file of weights, damaged, or a pickle that carries code.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a .pt or .safetensors file of weights.")
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the path.") from error
    if not start:
        raise UserError(f"{path} is empty: download or copy it again.")
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        raise UserError(f"{path} is a web page, not weights: the download went wrong, fetch it again.")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a pointer of Git LFS, not weights: fetch what it stands for (git lfs pull).")
    if start[:4] == b"PK\x03\x04":
        _check_zip(path)
        return _read_torch(path, mmap=True)
    if start[8:9] == b"{":  # before pickles, which the length that comes first may look like
        return _read_safetensors(path, verify)
    _check_pickles(path)
    if start[:2] == b"\x80\x02":
        return _read_torch(path, mmap=False)
    raise UserError(f"{path} is neither a torch file nor safetensors: expected a .pt or .safetensors file of weights.")


def printable(text: str) -> str:
    """A name or value out of a file, fit for a line on a terminal: nothing invisible, at most 100 characters."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _damaged(path: pathlib.Path) -> NoReturn:
    raise UserError(f"{path} is damaged or not a file of weights: fetch or copy it again.") from None


def _check_zip(path: pathlib.Path) -> None:
    """Checks that the zip of a torch file is whole, which torch itself does not, and that its pickle is harmless."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            broken = archive.testzip()
            pickles = [entry.filename for entry in entries if re.fullmatch(r"[^/]+/data\.pkl", entry.filename)]
            if broken is None and len(pickles) == 1:
                with archive.open(pickles[0]) as file:
                    _check_pickle(path, file.read(_MAX_PICKLE + 1))
    except UserError:
        raise
    except Exception:  # damage ends in almost any exception
        _damaged(path)
    if broken is not None:
        raise UserError(f"{path} is damaged (checksum of {printable(broken)} does not fit): fetch or copy it again.")
    if len(pickles) != 1 or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UserError(f"{path} is a zip archive but not a file of weights: expected a .pt that torch saved.")
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        _refuse_code(path, "a TorchScript program")


def _check_pickles(path: pathlib.Path) -> None:
    """Checks the pickles that a torch file without a zip begins with: magic number, version, system, weights, names."""
    with open(path, "rb") as file:
        data = file.read(5 * (_MAX_PICKLE + 1))
    for _ in range(5):
        try:
            data = data[_check_pickle(path, data) :]
        except UserError:
            raise
        except Exception:
            return  # not a pickle: for the reader to name


def _check_pickle(path: pathlib.Path, data: bytes) -> int:
    """Returns the length of the pickle at the beginning of `data`, which may import nothing that weights do not need.

    Raises:
        UserError: it imports code, or is too large or too nested.
        Exception: of almost any type, if it is not a pickle.
    """
    try:
        return check_pickle(data, _HARMLESS, _MAX_PICKLE)
    except UnsafePickleError as error:
        if error.code:
            _refuse_code(path, printable(error.code))
        raise UserError(f"{path} is not a file of weights ({error}): fetch it again.") from None


def _refuse_code(path: pathlib.Path, what: str) -> NoReturn:
    raise UserError(
        f"{path} carries code ({what}, which weights do not need) and was not opened: "
        "get it from a source that you trust, or have it converted to safetensors there."
    )


def _read_torch(path: pathlib.Path, mmap: bool) -> Contents:
    """A pickled torch file of the released layouts."""
    try:
        # The restricted unpickler builds tensors, containers and the named classes, and runs nothing else.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception:
        _damaged(path)
    if not isinstance(data, Mapping):
        raise UserError(f"{path} holds no weights but {type(data).__name__}: expected a dictionary of state dicts.")
    args = data.get("args")
    if args is not None and not isinstance(args, Mapping | argparse.Namespace):
        raise UserError(f"{path} holds args of type {type(args).__name__}: expected a Namespace or a dictionary.")
    states = {}
    for name, key in (("ema", "ema"), ("model", "model"), ("autoencoder", "state_dict")):
        if isinstance(data.get(key), Mapping):
            states[name] = _tensors(path, f"`{key}`", data[key])
    layout = "torch file with " + ", ".join(printable(str(key)) for key in data if isinstance(key, str))
    if not states and data and all(isinstance(value, Tensor) for value in data.values()):
        states, layout = _bare(_tensors(path, "the file", data)), "torch file, a bare state dict"
    if not states:
        raise UserError(f"{path} has none of `ema`, `model`, `state_dict`: it is not a file of BitDance weights.")
    if "state_dict" in data and "autoencoder" in states:
        # An autoencoder's training leaves losses and discriminators beside it.
        states["autoencoder"] = _autoencoder_part(states["autoencoder"])
    for name in ("ema", "model"):
        if name in states:
            # The autoencoder is frozen, so it is the same in both.
            states = _split(states.pop(name), name) | states
    return Contents(path, layout, states, _plain(args), None, {})


def _plain(args: Mapping[Any, Any] | argparse.Namespace | None) -> dict[str, Any]:
    """Training arguments as JSON could have them; of any other value only the name of its type is kept."""

    def simple(value: Any) -> bool:
        return value is None or type(value) in (str, int, bool) or (type(value) is float and math.isfinite(value))

    result = {}
    for key, value in (vars(args) if isinstance(args, argparse.Namespace) else args or {}).items():
        if isinstance(value, list | tuple) and all(map(simple, value)):
            value = list(value)
        elif not simple(value):
            value = str(value) if type(value) is float else f"<{type(value).__name__}>"
        result[str(key) if simple(key) else f"<{type(key).__name__}>"] = value
    return result


def _tensors(path: pathlib.Path, key: str, state: Mapping[Any, Any]) -> State:
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{path}: {key} holds {printable(repr(name))}, which is not a named tensor: it is no file of weights."
            )
    # Views can repeat a few numbers without end; a network has each of its numbers in the file.
    if sum(value.nbytes for value in state.values()) > path.stat().st_size:
        raise UserError(f"{path}: the tensors of {key} claim more bytes than the file has: it is no file of weights.")
    return dict(state)


def _autoencoder_part(state: State) -> State:
    return {name: value for name, value in state.items() if name.startswith(("encoder.", "decoder."))}


def _split(state: State, name: str) -> dict[str, State]:
    """The network and the autoencoder that is stored inside it under `vae.`."""
    inside = {key[4:]: value for key, value in state.items() if key.startswith("vae.")}
    parts = {name: {key: value for key, value in state.items() if not key.startswith("vae.")}}
    return parts | ({"autoencoder": _autoencoder_part(inside)} if inside else {})


def _bare(state: State) -> dict[str, State]:
    """A state dict without a wrapping: an autoencoder or a model, by its names."""
    if "emb_norm.weight" not in state and _autoencoder_part(state):
        return {"autoencoder": _autoencoder_part(state)}
    return _split(state, "model")


def _read_safetensors(path: pathlib.Path, verify: bool) -> Contents:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except Exception:  # damage ends in almost any exception
        _damaged(path)
    if metadata.get("format") != FORMAT:
        if "format_version" in metadata and "checksum" in metadata:
            _damaged(path)  # one of ours
        return Contents(path, "safetensors", _bare(state), {}, None, metadata)
    if metadata.get("format_version") != VERSION:
        raise UserError(
            f"{path} has the format version {printable(repr(metadata.get('format_version')))}, this release reads "
            f"{VERSION}: update bitdance; if that does not help, the file is damaged."
        )
    if _checksum(metadata) != metadata.get("checksum"):
        raise UserError(f"{path} is damaged (its metadata do not fit their checksum): fetch or copy it again.")
    try:
        if verify and digest(state) != metadata["digest"]:
            raise UserError(f"{path} is damaged (its tensors do not fit the digest inside): fetch or copy it again.")
        config, kind = json.loads(metadata["config"]), metadata["kind"]
    except UserError:
        raise
    except (KeyError, ValueError, RuntimeError):
        _damaged(path)
    if kind not in KINDS:
        raise UserError(f"{path} is of the unknown kind {printable(repr(kind))}: expected one of {', '.join(KINDS)}.")
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a configuration of type {type(config).__name__}: write the file again.")
    states: dict[str, State] = {kind: state} if kind != "training" else {}
    if kind == "training":
        for name, value in state.items():
            part, slash, rest = name.partition("/")
            if not slash:
                _damaged(path)
            states.setdefault(part, {})[rest] = value
        if metadata.get("network") == "autoencoder":
            states["autoencoder"] = states.get("ema") or states.get("model", {})
    return Contents(path, f"safetensors of bitdance, {kind}", states, {}, config, metadata)


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values, independent of the order of the tensors."""
    h = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        h.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        if value.numel():
            h.update(value.view(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def _checksum(metadata: Mapping[str, str]) -> str:
    """SHA-256 of the metadata of a file of ours, but for the checksum itself; the tensors have their own digest."""
    others = {key: value for key, value in metadata.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- configurations from names and shapes


def _count(contents: Contents, state: State, prefix: str) -> int:
    """How many blocks `prefix`0, `prefix`1, ... there are."""
    pattern = re.compile(re.escape(prefix) + r"([0-9]{1,6})\.")
    found = {int(match.group(1)) for name in state if (match := pattern.match(name))}
    missing = next(i for i in range(len(found) + 1) if i not in found)
    if missing < len(found) or not found:
        raise UserError(f"{contents.path}: all tensors {prefix}{missing}.* are missing: the file is incomplete.")
    return len(found)


def _shape(contents: Contents, state: State, name: str, dimensions: int) -> tuple[int, ...]:
    if name not in state:
        raise UserError(f"{contents.path}: tensor {name} is missing: the file is incomplete or no BitDance model.")
    shape = tuple(state[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise UserError(f"{contents.path}: tensor {name} has the shape {shape}, which no BitDance model has.")
    return shape


def describe_model(contents: Contents, weights: Weights | None = None) -> Description:
    """The configuration of the model in a file, and where each part of it was found.

    Raises:
        UserError: the file holds no model, or its tensors fit no configuration.
    """
    state = contents.states[choose_weights(contents, weights)]
    dim = _shape(contents, state, "emb_norm.weight", 1)[0]
    classes, class_width = _shape(contents, state, "cls_embedding.weight", 2)
    tokens = _shape(contents, state, "pos_for_diff.weight", 2)[0]
    if class_width % dim:
        raise UserError(
            f"{contents.path}: tensor cls_embedding.weight has rows of {class_width} numbers, "
            f"no multiple of the width {dim}: it fits no model."
        )
    if math.isqrt(tokens) ** 2 != tokens:
        raise UserError(f"{contents.path}: tensor pos_for_diff.weight has {tokens} rows, no square: it fits no model.")
    found: dict[str, Any] = {
        "dim": dim,
        "n_layer": _count(contents, state, "layers."),
        "head_dim": _shape(contents, state, "head.net.input_proj.weight", 2)[0],
        "head_layers": _count(contents, state, "head.net.res_blocks."),
        "head_ada_ln": _count(contents, state, "head.net.ada_ln_blocks."),
        "parallel_num": _shape(contents, state, "query_token", 3)[1] + 1 if "query_token" in state else 1,
        "grid": math.isqrt(tokens),
        "bits": _shape(contents, state, "proj_in.w1.weight", 2)[1],
        "cls_token_num": class_width // dim,
        "num_classes": classes - 1,
    }
    settings: dict[str, Any] = {}
    if contents.config is None:
        if contents.args.get("patch_size") not in (None, 1):
            raise UserError(
                f"{contents.path}: its args give patch_size {printable(repr(contents.args['patch_size']))}: "
                "only models of one latent position a token (1) can be read."
            )
        keys = {"token_order": "parallel_mode", "time_shift": "time_shift"}
        settings = {name: contents.args[key] for name, key in keys.items() if key in contents.args}
        names = contents.args.get("class_names")  # of files that we wrote in this layout
        if isinstance(names, list) and len(names) == classes - 1 and all(isinstance(name, str) for name in names):
            settings["class_names"] = tuple(names)
    return _describe(contents, BitDanceConfig, "model", found, settings)


def describe_autoencoder(contents: Contents) -> Description:
    """The configuration of the autoencoder in a file, and where each part of it was found.

    Raises:
        UserError: the file holds no autoencoder, or its tensors fit no configuration.
    """
    state = contents.states.get("autoencoder")
    if not state:
        raise UserError(f"{contents.path} holds no autoencoder, only {_there(contents)}: name another file.")
    levels = _count(contents, state, "encoder.down.")
    widths = (_shape(contents, state, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels))
    found: dict[str, Any] = {
        "widths": tuple(widths),
        "blocks": _count(contents, state, "encoder.mid_block."),
        "bits": _shape(contents, state, "encoder.conv_out.weight", 4)[0],
    }
    return _describe(contents, AutoencoderConfig, "autoencoder", found, {})


def _describe(
    contents: Contents,
    cls: type[BitDanceConfig] | type[AutoencoderConfig],
    kind: str,
    found: dict[str, Any],
    settings: dict[str, Any],
) -> Description:
    """A configuration from what the shapes tell and the args add, or from the file's own, which must fit the shapes."""
    names = [field.name for field in dataclasses.fields(cls)]
    sources = {name: "shapes" if name in found else "args" if name in settings else "default" for name in names}
    if contents.config is not None:
        inside = contents.config.get(kind)
        if not isinstance(inside, dict):
            raise UserError(f"{contents.path} holds no configuration of its {kind}: write it again.")
        if unknown := sorted(inside.keys() - set(names)):
            raise UserError(
                f"{contents.path}: its configuration has {printable(', '.join(unknown))}, which this release does not "
                "know: update bitdance."
            )
        # JSON has lists where the configuration has tuples.
        settings = {name: tuple(value) if isinstance(value, list) else value for name, value in inside.items()}
        for name in found.keys() & settings.keys():
            if settings[name] != found[name]:
                raise UserError(
                    f"{contents.path}: its configuration says {name} {printable(repr(settings[name]))}, "
                    f"its tensors have {found[name]}: it fits no {kind}."
                )
        sources |= dict.fromkeys(settings, "file")
    fits: dict[str, Callable[[Any], bool]] = {
        "token_order": lambda value: isinstance(value, str),
        "time_shift": lambda value: isinstance(value, int | float),
        "class_names": lambda value: isinstance(value, tuple) and all(isinstance(name, str) for name in value),
    }
    for name in settings.keys() & fits.keys():
        if not fits[name](settings[name]):
            what = printable(repr(settings[name]))
            raise UserError(f"{contents.path}: its {name} {what} is of the wrong type: it fits no {kind}.")
    try:
        return Description(cls(**settings | found), sources)
    except UserError as error:
        raise UserError(f"{contents.path} fits no {kind}: {error}") from None


def choose_weights(contents: Contents, weights: Weights | None = None) -> Weights:
    """Which weights of a model file to use: the EMA where there is one, unless told otherwise.

    Raises:
        UserError: what was asked for, or any model, is not in the file.
    """
    candidates: tuple[Weights, ...] = (weights,) if weights else ("ema", "model")
    for name in candidates if "model" in contents.parts else ():
        if contents.states.get(name):
            return name
    wanted = {"ema": "EMA weights", "model": "raw weights"}[weights] if weights else "model"
    raise UserError(f"{contents.path} holds no {wanted}, only {_there(contents)}: name another file.")


def _there(contents: Contents) -> str:
    if contents.metadata.get("network") == "autoencoder":
        return "the training of an autoencoder"
    return printable(", ".join(name for name, state in contents.states.items() if state)) or "nothing"


# ---------------------------------------------------------------- networks


def load_model(
    path: str | os.PathLike[str] | Contents, weights: Weights | None = None, dtype: torch.dtype = torch.float32
) -> BitDance:
    """Loads a BitDance model, released or our own, in evaluation mode on the CPU.

    Args:
        path: a name or file as `find_weights` takes it (`demo`, a released model, a run folder, a `.pt` or
            `.safetensors` file), or what `read` returned.
        weights: `ema` or `model` (raw); by default the EMA where there is one.
        dtype: of the parameters.

    Raises:
        UserError: the file is missing, damaged, no model, or carries code; a tensor is missing, extra or misshapen.
    """
    contents = path if isinstance(path, Contents) else read(find_weights(path))
    config = describe_model(contents, weights).config
    return _load(BitDance, config, contents.path, contents.states[choose_weights(contents, weights)], dtype)


def load_autoencoder(
    path: str | os.PathLike[str] | Contents, dtype: torch.dtype = torch.float32, weights: Weights | None = None
) -> Autoencoder:
    """Loads an autoencoder from its own file or from inside a model's, in evaluation mode on the CPU.

    Args:
        path: a name or file as `find_weights` takes it, or what `read` returned.
        dtype: of the parameters.
        weights: of a checkpoint of an autoencoder's training, `ema` or `model` (raw); by default the EMA if there is
            one.

    Raises:
        UserError: as for `load_model`.
    """
    contents = path if isinstance(path, Contents) else read(find_weights(path, "autoencoder"))
    config = describe_autoencoder(contents).config
    state = contents.states["autoencoder"]
    if weights is not None and contents.metadata.get("network") == "autoencoder":
        if weights not in contents.states:
            raise UserError(f"{contents.path} has no {weights} weights, only {_there(contents)}.")
        state = contents.states[weights]
    return _load(Autoencoder, config, contents.path, state, dtype)


def _load(cls: type[Network], config: Any, path: pathlib.Path, state: State, dtype: torch.dtype) -> Network:
    """A network with these tensors, copied and converted, after every name and shape was compared."""
    try:
        check_tensors(path, shapes(config), state)
        with torch.device("meta"), _NoInit():
            network = cls(config)
        own = {}
        for name, value in state.items():
            # A copy of its own: the file may be a memory map, and its tensors views of one another.
            own[name] = value.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
            if not own[name].isfinite().all():
                raise UserError(f"{path}: tensor {name} holds numbers that are not finite: the file is of no use.")
        network.load_state_dict(own, assign=True)
        if isinstance(network, BitDance):
            network.reset_buffers()
    except (RuntimeError, MemoryError) as error:
        if "alloca" not in str(error) and not isinstance(error, MemoryError):
            raise
        raise UserError(f"{path} needs more memory than is free: close other programs or use a smaller one.") from error
    return network.eval().requires_grad_(False)


class _NoInit(TorchFunctionMode):
    """Leaves fresh parameters as they are: filling tensors without memory is only slow."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("normal_", "uniform_", "zero_", "fill_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def shapes(config: BitDanceConfig | AutoencoderConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a network, which takes no memory."""
    with torch.device("meta"), _NoInit():
        network = BitDance(config) if isinstance(config, BitDanceConfig) else Autoencoder(config)
    return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}


def check_tensors(path: pathlib.Path, expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> None:
    """Compares names, shapes and types with what a network has.

    Raises:
        UserError: names the tensors that are missing, extra, misshapen or of another type (at most three).
    """
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
        raise UserError(f"{path}: tensor {'; '.join(sorted(faults)[:3])}{more}: the file does not fit its model.")


# ---------------------------------------------------------------- writing


def save(
    path: str | os.PathLike[str],
    network: BitDance | Autoencoder,
    state: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Writes one network as safetensors, with its configuration inside, atomically.

    Args:
        network: gives the configuration, and the tensors if `state` is not given.
        state: other tensors of the same names, such as an EMA.
        dtype: to store in, by default the tensors' own.
        metadata: further strings for the file's metadata.

    Returns:
        The digest of the tensors.

    Raises:
        UserError: the file cannot be written, or a number does not fit the dtype.
    """
    kind = "model" if isinstance(network, BitDance) else "autoencoder"
    tensors = {name: value.detach() for name, value in (state or network.state_dict()).items()}
    if dtype is not None:
        tensors = {name: value.to(dtype) for name, value in tensors.items()}
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise UserError(f"{path} was not written: {name} holds numbers that {value.dtype} cannot, or none at all.")
    return save_tensors(path, tensors, kind, {kind: dataclasses.asdict(network.config)}, **(metadata or {}))


def save_released(
    path: str | os.PathLike[str],
    network: BitDance | Autoencoder,
    autoencoder: Autoencoder | None = None,
    weights: Weights = "ema",
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a file in the layout of the released ones (torch's pickle), atomically; the original's scripts read it.

    Args:
        network: a model, or an autoencoder alone.
        autoencoder: for a model the copy inside, under `vae.`, which the original insists on.
        weights: the name to give a model's weights.
        dtype: to store in, by default the tensors' own.

    Raises:
        UserError: the file cannot be written.
    """

    def stored(part: BitDance | Autoencoder, prefix: str = "") -> State:
        return {prefix + name: value.detach().to(dtype or value.dtype) for name, value in part.state_dict().items()}

    if isinstance(network, Autoencoder):
        data: dict[str, Any] = {"state_dict": stored(network)}
    else:
        config = network.config
        state = stored(network) | (stored(autoencoder, "vae.") if autoencoder is not None else {})
        args = argparse.Namespace(
            parallel_num=config.parallel_num,
            parallel_mode=config.token_order,
            time_shift=config.time_shift,
            latent_dim=config.bits,
            num_classes=config.num_classes,
            cls_token_num=config.cls_token_num,
            patch_size=1,
            class_names=list(config.class_names),
        )
        data = {weights: state, "args": args}
    with atomic_write(path) as temporary:
        torch.save(data, temporary)


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], kind: str, config: Mapping[str, Any], **metadata: str
) -> str:
    """Writes tensors in our format, atomically; `save` for what is more than one network. Returns the digest."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    fingerprint = digest(tensors)
    header = {
        "format": FORMAT,
        "format_version": VERSION,
        "kind": kind,
        "config": json.dumps(config),
        "digest": fingerprint,
        **metadata,
    }
    header["checksum"] = _checksum(header)
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, header)
        except SafetensorError as error:
            raise OSError(None, str(error)) from error
        _sort_header(temporary)
    return fingerprint


def _sort_header(path: pathlib.Path) -> None:
    """Sorts the metadata, which safetensors writes in another order each time: equal contents make equal files."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size, "the tensors behind the header cannot move"
        file.seek(8)
        file.write(text.ljust(size))
