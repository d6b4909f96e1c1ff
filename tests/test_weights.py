"""Files of weights: each layout is read exactly, ours are written atomically, damaged and hostile files are refused."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import pathlib
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
from torch import Tensor

import bitdance
from bitdance.cli.main import main
from bitdance.config import RELEASED_MODELS, AutoencoderConfig, BitDanceConfig
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.transformer import BitDance
from bitdance.runtime.errors import UserError
from bitdance.weights import int8, network_config, safetensors_files, weights_file
from bitdance.weights.safetensors_files import digest

MODEL = BitDanceConfig(dim=64, n_layer=1, head_dim=64, head_layers=1, head_ada_ln=1, parallel_num=4, grid=2, bits=8,
                       cls_token_num=2, num_classes=2)  # fmt: skip
AUTOENCODER = AutoencoderConfig(widths=(32, 32), blocks=1, bits=8)
State = dict[str, Tensor]


def random_state(config: BitDanceConfig | AutoencoderConfig, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    parameters = network_config.empty_network(config).named_parameters()
    return {name: torch.randn(value.shape, generator=generator) for name, value in parameters}


EMA, RAW, VAE = random_state(MODEL, 1), random_state(MODEL, 2), random_state(AUTOENCODER, 3)
INSIDE = {f"vae.{name}": value for name, value in VAE.items()}
ARGS = argparse.Namespace(parallel_mode="patch", time_shift=2.0, lr=6e-4, betas=(0.9, 0.95), trained_vae=None)


def model_file(path: pathlib.Path, **changes: Any) -> pathlib.Path:
    """A file of the released layout; a change of None leaves an entry out."""
    data = {"model": RAW | INSIDE, "ema": EMA | INSIDE, "epochs": 3, "args": ARGS, **changes}
    torch.save({key: value for key, value in data.items() if value is not None}, path)
    return path


def autoencoder_file(path: pathlib.Path, **extra: Tensor) -> pathlib.Path:
    torch.save({"state_dict": VAE | extra}, path)
    return path


def our_model(path: pathlib.Path, state: State = EMA, **changes: Any) -> pathlib.Path:
    config = dataclasses.asdict(dataclasses.replace(MODEL, **changes))
    safetensors_files.save_tensors(path, state, "model", {"model": config})
    return path


def our_checkpoint(path: pathlib.Path, network: str) -> pathlib.Path:
    config, state = (MODEL, EMA) if network == "model" else (AUTOENCODER, VAE)
    tensors = {f"ema/{name}": value for name, value in state.items()}
    tensors |= {f"model/{name}": value + 1 for name, value in state.items()}
    tensors["optimizer/step/" + next(iter(state))] = torch.tensor(5.0)
    content = {network: dataclasses.asdict(config)}
    safetensors_files.save_tensors(path, tensors, "training", content, step="5", network=network)
    return path


def same(network: BitDance | Autoencoder, state: State) -> bool:
    own = dict(network.named_parameters())
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name].float()) for name in state)


def refusal(path: pathlib.Path, load: Callable[..., Any] = weights_file.load_model) -> str:
    with pytest.raises(UserError) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message and message.endswith(".") and "\n" not in message
    return message


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_are_chosen(tmp_path, legacy):
    path = tmp_path / "model.pt"
    torch.save({"model": RAW | INSIDE, "ema": EMA | INSIDE}, path, _use_new_zipfile_serialization=not legacy)
    assert same(bitdance.load_model(path), EMA) and same(bitdance.load_model(path, "ema"), EMA)
    assert same(bitdance.load_model(path, "model"), RAW) and same(bitdance.load_autoencoder(path), VAE)
    raw, ema = model_file(tmp_path / "raw.pt", ema=None), model_file(tmp_path / "ema.pt", model=None, args=None)
    assert same(weights_file.load_model(raw), RAW) and same(weights_file.load_model(ema), EMA)
    assert same(weights_file.load_model(model_file(tmp_path / "empty.pt", ema={})), RAW)
    assert "no EMA weights" in refusal(raw, lambda path: weights_file.load_model(path, "ema"))
    assert "no raw weights" in refusal(ema, lambda path: weights_file.load_model(path, "model"))


def test_the_golden_models_are_loaded(tmp_path):
    path = tmp_path / "tiny.pt"
    tiny.save_checkpoint(path, 4)
    model = bitdance.load_model(path)
    assert same(model, tiny.model_state(4)) and model.config == tiny.config(4)
    assert torch.equal(model.rotary, tiny.model(4).rotary) and torch.equal(model.blocks, tiny.model(4).blocks)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    autoencoder = bitdance.load_autoencoder(path)
    assert autoencoder.config == tiny.AUTOENCODER and same(autoencoder, tiny.autoencoder_state(4))


def test_losses_beside_an_autoencoder_are_ignored(tmp_path):
    extra = {"loss.discriminator.main.0.weight": torch.ones(3), "quantize.codebook": torch.ones(2, dtype=torch.int64)}
    autoencoder = weights_file.load_autoencoder(autoencoder_file(tmp_path / "ae.pt", **extra))
    assert same(autoencoder, VAE) and autoencoder.config == AUTOENCODER


def test_the_state_dict_of_a_module(tmp_path):
    """An OrderedDict with versions beside the tensors, and the state of an optimizer beside that."""
    model = BitDance(MODEL)
    optimizer = torch.optim.AdamW(model.parameters())
    torch.stack([parameter.sum() for parameter in model.parameters()]).sum().backward()
    optimizer.step()
    path = model_file(tmp_path / "model.pt", ema=None, model=model.state_dict(), optimizer=optimizer.state_dict())
    assert same(weights_file.load_model(path), model.state_dict())


def test_bare_state_dicts(tmp_path):
    torch.save(EMA | INSIDE, tmp_path / "model.pt")
    torch.save(VAE | {"loss.w": torch.ones(1)}, tmp_path / "ae.pt")
    safetensors.torch.save_file(VAE, tmp_path / "ae.safetensors")
    safetensors.torch.save_file(EMA, tmp_path / "model.safetensors", {"format": "pt"})
    assert same(weights_file.load_model(tmp_path / "model.pt"), EMA)
    assert same(weights_file.load_autoencoder(tmp_path / "model.pt"), VAE)
    assert same(weights_file.load_autoencoder(tmp_path / "ae.pt"), VAE)
    assert same(weights_file.load_autoencoder(tmp_path / "ae.safetensors"), VAE)
    assert same(weights_file.load_model(tmp_path / "model.safetensors"), EMA)


def test_parameters_views_and_other_dtypes(tmp_path):
    values = torch.cat([value.flatten() for value in EMA.values()]).split([value.numel() for value in EMA.values()])
    state = {name: value.view(EMA[name].shape) for name, value in zip(EMA, values, strict=True)}
    state["layers.0.attention.wqkv.weight"] = state["layers.0.attention.wqkv.weight"].t().contiguous().t()
    state["norm.weight"] = torch.nn.Parameter(EMA["norm.weight"].double())
    path = model_file(tmp_path / "views.pt", ema=state)
    model = weights_file.load_model(path)
    path.write_bytes(b"")  # the network does not depend on the file
    assert same(model, EMA)
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(EMA)


def test_dtypes(tmp_path):
    model = weights_file.load_model(model_file(tmp_path / "model.pt"), dtype=torch.bfloat16)
    kept = {"query_token", "cls_embedding.weight", "emb_norm.weight", "norm.weight", "pos_for_diff.weight"}
    for name, parameter in model.named_parameters():
        is_norm = name in kept or (name.startswith("layers.") and "norm" in name)
        assert torch.equal(parameter, EMA[name] if is_norm else EMA[name].bfloat16()), name
    path = tmp_path / "half.safetensors"
    weights_file.save(path, model, dtype=torch.float16)
    stored = weights_file.read(path).states["model"]
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert {p.dtype for p in weights_file.load_model(path).parameters()} == {torch.float32}


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize("name", [*RELEASED_MODELS, "autoencoder_d16c32"])
def test_released_sizes_follow_from_shapes(name):
    rows = [line.split("\t") for line in (tiny.DATA / "released_tensors.tsv").read_text().splitlines()]
    shapes = {tensor: tuple(map(int, shape.split(","))) for network, tensor, shape in rows if network == name}
    state = {tensor: torch.empty(shape, device="meta") for tensor, shape in shapes.items()}
    key = "ema" if name in RELEASED_MODELS else "autoencoder"
    contents = weights_file.WeightsFile(pathlib.Path("released.pt"), "", {key: state}, {}, None, {})
    is_model = name in RELEASED_MODELS
    describe = network_config.describe_model if is_model else network_config.describe_autoencoder
    assert describe(contents).config == (RELEASED_MODELS[name].config if is_model else AutoencoderConfig())


@pytest.mark.parametrize(
    "changes",
    [{"dim": 128}, {"n_layer": 2}, {"head_dim": 128}, {"head_layers": 2}, {"head_layers": 2, "head_ada_ln": 2},
     {"parallel_num": 1}, {"grid": 4, "parallel_num": 16}, {"grid": 4}, {"bits": 16}, {"cls_token_num": 3},
     {"num_classes": 5}],
)  # fmt: skip
def test_sizes_follow_from_shapes(tmp_path, changes):
    config = dataclasses.replace(MODEL, **changes)
    path = model_file(tmp_path / "model.pt", ema=random_state(config, 0), model=None, args=None)
    description = network_config.describe_model(weights_file.read(path))
    assert description.config == config == weights_file.load_model(path).config
    defaults = dict.fromkeys(("token_order", "time_shift", "class_names"), "default")
    names = [field.name for field in dataclasses.fields(config)]
    assert description.sources == dict.fromkeys(names, "shapes") | defaults


@pytest.mark.parametrize("order", ["patch", "standard"])
@pytest.mark.parametrize("kind", [argparse.Namespace, dict])
def test_args_give_what_shapes_do_not_tell(tmp_path, order, kind):
    path = model_file(tmp_path / "model.pt", args=kind(parallel_mode=order, time_shift=1.5))
    description = network_config.describe_model(weights_file.read(path))
    assert description.config == dataclasses.replace(MODEL, token_order=order, time_shift=1.5)
    assert description.sources["token_order"] == description.sources["time_shift"] == "args"
    assert description.sources["dim"] == "shapes" and description.sources["class_names"] == "default"


def test_sizes_of_an_autoencoder_follow_from_shapes(tmp_path):
    config = AutoencoderConfig(widths=(32, 64, 96), blocks=2, bits=16)
    torch.save({"state_dict": random_state(config, 0)}, tmp_path / "ae.pt")
    description = network_config.describe_autoencoder(weights_file.read(tmp_path / "ae.pt"))
    assert description.config == config
    others = {name for name, source in description.sources.items() if source != "shapes"}
    assert others == {"split", "bit_depths", "gray_code"}


def test_an_autoencoder_with_split_positions_is_written_and_read(tmp_path):
    config = AutoencoderConfig(
        (40, 24), 1, 8, space_to_depth=2, split=2, bit_depths=(8, 8, 8, 4, 2, 2), gray_code=True, linear=True
    )
    network = Autoencoder(config)
    weights_file.save(tmp_path / "ae.safetensors", network)
    read = weights_file.load_autoencoder(tmp_path / "ae.safetensors")
    images = torch.rand(1, 3, 16, 8) * 2 - 1
    assert read.config == config and torch.equal(read.encode(images), network.eval().encode(images))
    contents = weights_file.read(tmp_path / "ae.safetensors")
    changes = (
        {"split": "2"}, {"split": 10**9}, {"gray_code": 2}, {"bit_depths": [4.5]}, {"bit_depths": [8] * 3},
        {"space_to_depth": 4},
    )  # fmt: skip
    for change in changes:
        changed = {"autoencoder": {**contents.config["autoencoder"], **change}}
        safetensors_files.save_tensors(
            tmp_path / "odd.safetensors", contents.states["autoencoder"], "autoencoder", changed
        )
        with pytest.raises(UserError, match=r"odd.safetensors: .*(split|gray_code|bits|bit_depths|space_to_depth)"):
            weights_file.load_autoencoder(tmp_path / "odd.safetensors")


def test_our_files_hold_their_configuration(tmp_path):
    config = dataclasses.replace(MODEL, token_order="standard", time_shift=3.0, class_names=("cat", "dog"))
    model = BitDance(config)
    saved = weights_file.save(tmp_path / "model.safetensors", model, EMA, metadata={"step": "7"})
    contents = weights_file.read(tmp_path / "model.safetensors")
    description = network_config.describe_model(contents)
    assert description.config == config and set(description.sources.values()) == {"file"}
    assert contents.metadata["step"] == "7" and contents.metadata["digest"] == saved
    assert same(weights_file.load_model(contents), EMA)


# ---------------------------------------------------------------- strictness


FAULTS: dict[str, Callable[[State, str], Any]] = {
    "is missing": lambda state, name: state.pop(name),
    "is not part of": lambda state, name: state.update({f"{name}.extra": torch.ones(1)}),
    "has the shape": lambda state, name: state.update({name: torch.ones(3, 5)}),
    "holds torch.int64": lambda state, name: state.update({name: state[name].long()}),
    "not finite": lambda state, name: state[name].view(-1)[3:4].fill_(float("nan")),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("kind", ["model", "autoencoder"])
def test_faults_name_the_tensor(tmp_path, kind, ours, fault):
    """In the released and in our own layout."""
    name = "head.net.final_layer.linear.weight" if kind == "model" else "decoder.mid_block.0.conv1.weight"
    config, original = (MODEL, EMA) if kind == "model" else (AUTOENCODER, VAE)
    state = {key: value.clone() for key, value in original.items()}
    FAULTS[fault](state, name)
    path = tmp_path / "file"
    if ours:
        safetensors_files.save_tensors(path, state, kind, {kind: dataclasses.asdict(config)})
    else:
        torch.save({"ema" if kind == "model" else "state_dict": state}, path)
    message = refusal(path, weights_file.load_model if kind == "model" else weights_file.load_autoencoder)
    assert name in message and fault in message


def test_missing_blocks_and_files_of_another_network(tmp_path):
    config = dataclasses.replace(MODEL, n_layer=3)
    state = {name: value for name, value in random_state(config, 0).items() if not name.startswith("layers.1.")}
    assert "layers.1.*" in refusal(model_file(tmp_path / "model.pt", ema=state))
    assert "holds no autoencoder" in refusal(our_model(tmp_path / "m"), weights_file.load_autoencoder)
    assert "holds no model" in refusal(autoencoder_file(tmp_path / "ae"), weights_file.load_model)
    checkpoint = our_checkpoint(tmp_path / "t", "autoencoder")
    assert "only a checkpoint of an autoencoder" in refusal(checkpoint, weights_file.load_model)


def test_values_too_large_for_the_dtype(tmp_path):
    name = "layers.0.attention.wo.weight"
    path = model_file(tmp_path / "model.pt", ema=EMA | {name: torch.full_like(EMA[name], 1e30)})
    assert name in refusal(path, lambda path: weights_file.load_model(path, dtype=torch.float16))
    model, path = weights_file.load_model(path), tmp_path / "half.safetensors"
    assert name in refusal(path, lambda path: weights_file.save(path, model, dtype=torch.float16))


# ---------------------------------------------------------------- our own files


@pytest.mark.parametrize("config", [MODEL, AUTOENCODER])
def test_round_trip_is_exact(tmp_path, config):
    path = tmp_path / "new folder" / "file.safetensors"
    network = BitDance(config) if isinstance(config, BitDanceConfig) else Autoencoder(config)
    saved = weights_file.save(path, network)
    load: Any = weights_file.load_model if isinstance(config, BitDanceConfig) else weights_file.load_autoencoder
    again = load(path)
    assert again.config == config and same(again, network.state_dict())
    assert saved == digest(network.state_dict()) == digest(again.state_dict())
    first = path.read_bytes()
    weights_file.save(path, again)
    assert digest(load(path).state_dict()) == saved and len(path.read_bytes()) == len(first)


@pytest.mark.parametrize("config", [MODEL, AUTOENCODER])
def test_integers_have_half_a_step_of_error(tmp_path, config):
    """Within half of a 127th of the largest magnitude of each row; vectors are in half precision."""
    state = random_state(config, 1)
    matrix = next(name for name, value in state.items() if value.ndim >= 2 and len(value) > 1)
    state[matrix][0] = 0
    state[matrix][1] *= 100
    network = BitDance(config) if isinstance(config, BitDanceConfig) else Autoencoder(config)
    load: Any = weights_file.load_model if isinstance(config, BitDanceConfig) else weights_file.load_autoencoder
    weights_file.save(tmp_path / "half.safetensors", network, state, torch.float16)
    weights_file.save(tmp_path / "integers.safetensors", network, state, torch.int8)
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("integers", "half")]
    loaded = load(tmp_path / "integers.safetensors").state_dict()
    assert sizes[0] < 0.75 * sizes[1]  # small tensors and names count in so small a network
    for name, value in state.items():
        if value.ndim < 2:
            assert torch.equal(loaded[name], value.half().float()), name
            continue
        rows = value.flatten(1)
        bound = rows.abs().amax(1, keepdim=True) / 127 * 0.501
        assert ((loaded[name].flatten(1) - rows).abs() <= bound).all(), name


@pytest.mark.parametrize("change", ["missing", "short", "half", "nan"])
def test_integers_with_false_scales(tmp_path, change):
    weights_file.save(tmp_path / "good.safetensors", BitDance(MODEL), EMA, torch.int8)
    tensors = safetensors.torch.load_file(tmp_path / "good.safetensors")
    scales = next(name for name in tensors if name.endswith(int8.SCALE))
    if change == "missing":
        del tensors[scales]
    else:
        value = tensors[scales]
        tensors[scales] = {"short": value[1:].clone(), "half": value.half(), "nan": value * torch.nan}[change]
    path = tmp_path / "bad.safetensors"
    safetensors_files.save_tensors(path, tensors, "model", {"model": dataclasses.asdict(MODEL)})
    assert ("not finite" if change == "nan" else "scales of") in refusal(path)


@pytest.mark.parametrize("network", ["model", "autoencoder"])
def test_a_checkpoint_is_a_file_of_weights(tmp_path, network):
    contents = weights_file.read(our_checkpoint(tmp_path / "checkpoint.safetensors", network))
    assert contents.parts == (network,) and {"model", "ema", "optimizer"} <= contents.states.keys()
    load: Any = weights_file.load_model if network == "model" else weights_file.load_autoencoder
    ema = EMA if network == "model" else VAE
    assert same(load(contents), ema)
    assert same(load(contents, weights="model"), {name: value + 1 for name, value in ema.items()})
    assert network == "model" or digest(contents.states["autoencoder"]) == digest(VAE)


@pytest.mark.parametrize("error", [RuntimeError("cut"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, error):
    path = our_model(tmp_path / "model.safetensors")
    before = path.read_bytes()

    def half(tensors: State, target: pathlib.Path, metadata: dict[str, str]) -> None:
        pathlib.Path(target).write_bytes(before[:1000])
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
        our_model(path, RAW)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.safetensors"]


def test_the_digest_identifies_tensors():
    # Runs store it as the identity of their autoencoder: it must not change.
    state = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(1, dtype=torch.int64)}
    expected = digest(state)
    assert expected == "63fc20a914221df0ed84c309af5dd183c2c26ee358b566677d66e3e4a12548c3"
    assert digest(dict(reversed(state.items()))) == expected
    assert digest(state | {"b": state["b"].t().contiguous().t()}) == expected
    changed = [{"b": state["b"] + 1e-6}, {"b": state["b"].view(3, 2)}, {"b": state["b"].double()}, {"c": torch.ones(0)}]
    digests = {digest(state | change) for change in changed}
    assert len(digests) == 4 and expected not in digests


def test_the_digest_of_an_autoencoder_does_not_depend_on_its_file(tmp_path):
    files = [model_file(tmp_path / "m.pt"), autoencoder_file(tmp_path / "a.pt", loss=torch.ones(1)), tmp_path / "a"]
    weights_file.save(files[2], weights_file.load_autoencoder(files[1]))
    states = [weights_file.read(file).states["autoencoder"] for file in files]
    assert {digest(state) for state in states} == {digest(VAE)}


@pytest.mark.parametrize(
    ("version", "words"),
    [(1, "written by an older version of bitdance (format 1 instead of 2): create it again."),
     (3, "written by a newer version of bitdance (format 3 instead of 2): update bitdance.")],
)  # fmt: skip
def test_files_of_other_versions(tmp_path, monkeypatch, version, words):
    with monkeypatch.context() as patch:
        patch.setattr(safetensors_files, "VERSION", version)
        path = our_model(tmp_path / "model.safetensors")
    assert refusal(path).endswith(words)


# ---------------------------------------------------------------- damaged and hostile files


class Evil:
    """Calls a function when it is unpickled without restrictions."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


class Plain:
    """An instance of a class that weights do not need."""


def with_entry(path: pathlib.Path, name: str, content: bytes, compression=zipfile.ZIP_STORED, folder="model") -> bytes:
    """A zip with one entry replaced or added, all checksums correct."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for entry in old.namelist():
            if entry != f"{folder}/{name}":
                new.writestr(entry, old.read(entry))
        new.writestr(f"{folder}/{name}", content)
    return buffer.getvalue()


def zipped(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def torch_bytes(data: Any, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(data, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def flips(name: str, content: bytes, count: int, start: int, stop: int) -> Iterator[tuple[str, bytes]]:
    generator = random.Random(name)
    for _ in range(count):
        place, bit = generator.randrange(start, stop), generator.randrange(8)
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        yield f"{name}: bit {bit} of byte {place} flipped", bytes(flipped)


def damaged(name: str, content: bytes, header: int) -> Iterator[tuple[str, bytes]]:
    """Truncations and flipped bits; beginning and end, of `header` bytes, get a share of their own."""
    whole = len(content)
    for length in (1, 3, 8, 15, 16, 100, header, whole // 3, whole // 2, whole - 100, whole - 1):
        yield f"{name}: first {length} bytes", content[:length]
    yield f"{name}: first half missing", content[whole // 2 :]
    yield f"{name}: one byte missing", content[: header // 2] + content[header // 2 + 1 :]
    yield f"{name}: a block of zeros", content[:header] + bytes(4096) + content[header + 4096 :]
    yield f"{name}: as text", content.decode("latin-1").encode()
    yield from flips(f"{name}, anywhere", content, 15, 0, whole)
    yield from flips(f"{name}, beginning", content, 10, 0, header)
    yield from flips(f"{name}, end", content, 10, whole - header, whole)


def hostile(marker: pathlib.Path, whole: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Pickles that carry code, at every position and in every container."""
    command = f"touch {marker}"
    payloads: dict[str, Any] = {
        "os.system": Evil(os.system, command),
        "eval": Evil(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Evil(exec, f"open({str(marker)!r}, 'w')"),
        "open": Evil(open, str(marker), "w"),
        "a method": Evil(getattr, pathlib.Path(marker), "touch"),
        "an instance": Plain(),
        "a function": os.system,
    }
    for name, payload in payloads.items():
        yield f"{name} alone", torch_bytes(payload)
        yield f"{name} in args", torch_bytes({"ema": EMA, "args": argparse.Namespace(lr=1e-3, nested=[{"x": payload}])})
        yield f"{name} among the tensors", torch_bytes({"model": {**EMA, "norm.weight": payload}})
        yield f"{name} in a legacy file", torch_bytes({"ema": EMA, "args": payload}, legacy=True)
        yield f"{name} in a zip", with_entry(whole, "data.pkl", pickle.dumps({"ema": payload}, 2))
    for protocol in range(6):
        yield f"pickle of protocol {protocol}", pickle.dumps({"ema": payloads["os.system"]}, protocol)
        yield f"protocol {protocol} in a zip", with_entry(whole, "data.pkl", pickle.dumps(payloads["eval"], protocol))
    yield "a TorchScript program", with_entry(whole, "constants.pkl", pickle.dumps((), 2))
    yield "a sparse tensor", torch_bytes({"ema": EMA | {"norm.weight": torch.ones(64).to_sparse()}})
    quantized = torch.quantize_per_tensor(torch.ones(64), 0.1, 0, torch.qint8)
    yield "a quantized tensor", torch_bytes({"ema": EMA | {"norm.weight": quantized}})


def unusable(whole: pathlib.Path) -> Iterator[bytes]:
    """Files of something else, and torch files of something else."""
    yield from (
        b"", b" " * 100, bytes(1000), b"config = 3\nnext line\n", b"\n\n  <html>Access denied</html>",
        b"<!DOCTYPE html>\n<html><body>404: not found</body></html>",
        b"\xef\xbb\xbf<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>",
        b'{"error": "Repository not found"}', b'        {"error": "Repository not found"}',
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n",
        b"\x89PNG\r\n\x1a\n" + bytes(100), b"\x1f\x8b\x08" + bytes(100), random.Random(0).randbytes(5000),
        zipped({}), zipped({"readme.txt": b"hello"}), zipped({"arr_0.npy": b"\x93NUMPY"}),
        zipped({"model/data.pkl": zipfile.ZipFile(whole).read("model/data.pkl")}),  # without the tensors
        with_entry(whole, "data.pkl", b""), with_entry(whole, "data.pkl", b"<html></html>"),
        with_entry(whole, "extra", bytes(10**6), zipfile.ZIP_DEFLATED),
        with_entry(whole, "data.pkl", pickle.dumps({}, 2), folder="other"),
    )  # fmt: skip
    odd_conv = {"encoder.down.0.block.0.conv1.weight": torch.ones(33, 32, 3, 3)}
    for data in (
        [1, 2], 3, torch.ones(3), None, {}, {"epochs": 3}, {"ema": 3}, {"ema": {"a": "b"}}, {"model": {}, "ema": {}},
        {"model": {1: torch.ones(1)}}, {"model": {"fc.weight": torch.ones(2, 2)}}, {"state_dict": VAE | odd_conv},
        {"state_dict": {name: value for name, value in VAE.items() if name.startswith("encoder.")}},
    ):  # fmt: skip
        yield torch_bytes(data)
    for args in (
        [1], {"parallel_mode": "weird"}, {"parallel_mode": ["patch"]}, {"time_shift": "x"}, {"time_shift": -1.0},
        {"time_shift": float("inf")}, argparse.Namespace(patch_size=2),
    ):  # fmt: skip
        yield torch_bytes({"ema": EMA, "args": args})
    for name, value in (
        ("cls_embedding.weight", torch.ones(3, 100)), ("cls_embedding.weight", torch.ones(1, 128)),
        ("pos_for_diff.weight", torch.ones(5, 64)), ("emb_norm.weight", torch.tensor(1.0)),
        ("emb_norm.weight", torch.ones(0)), ("proj_in.w1.weight", torch.ones(192, 9)),
        ("norm.weight", torch.ones(64, dtype=torch.complex64)), ("norm.weight", torch.ones(64).to(torch.float8_e4m3fn)),
        ("norm.weight", torch.ones(1).expand(1 << 40)), ("\x1b[2J\n", torch.ones(1)),
    ):  # fmt: skip
        yield torch_bytes({"ema": EMA | {name: value}})
    # Nested tuples as the key of a dictionary, which hashes all of them.
    nested = b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s."
    doubled = b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
    for content in (nested, b"\x80\x02}K\x01\x85q\x00" + doubled + b"K\x01s."):
        yield from (content, with_entry(whole, "data.pkl", content))
    numel, data = struct.pack("<i", EMA["cls_embedding.weight"].numel()), zipfile.ZipFile(whole).read("model/data.pkl")
    for other in (1 << 30, -5):  # numbers of elements
        forged = data.replace(b"M" + numel[:2], b"J" + struct.pack("<i", other))
        assert forged != data
        yield with_entry(whole, "data.pkl", forged)


def forged_headers(path: pathlib.Path) -> Iterator[bytes]:
    """Safetensors of ours with a wrong header; with correct checksums where that is possible."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]

    def file(header: Any, length: int | None = None) -> bytes:
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    for length in (0, 1, size - 1, size + 8, 1 << 32, 1 << 40, (1 << 64) - 1):
        yield file(header, length)
    for change in (
        {"shape": [1 << 40, 1 << 20]}, {"shape": [-64]}, {"shape": [8, 8]}, {"data_offsets": [0, 1 << 50]},
        {"data_offsets": [256, 0]}, {"data_offsets": [0, 256]}, {"dtype": "F3"}, {"dtype": "I32"},
    ):  # fmt: skip
        yield file(header | {"norm.weight": header["norm.weight"] | change})
    good = header.pop("__metadata__")
    yield from (file(header)[:-4], struct.pack("<Q", 200_000) + b"[" * 200_000, content + b"more")
    without_digest = {key: value for key, value in good.items() if key != "digest"}
    versions = [{"format_version": version} for version in ("1", "3", "?")]
    for change in (*versions, {"format": "pt"}, {"digest": "0" * 64}, {"config": "{}"}):
        yield file(header | {"__metadata__": good | change})
    config = json.loads(good["config"])["model"]
    changes: tuple[dict[str, Any], ...] = (
        {"colour": "red"}, {"n_layer": 10**9}, {"dim": 128}, {"dim": "64"}, {"class_names": [1, 2]},
        {"class_names": ["cat"]}, {"class_names": 2}, {"time_shift": "x"}, {"token_order": "weird"},
    )  # fmt: skip
    configs = ([config], {}, {"autoencoder": config}, *({"model": config | change} for change in changes))
    forged = [good | {"config": json.dumps(config)} for config in configs]
    forged += [good | {"kind": "banana"}, good | {"kind": "training"}, good | {"config": "[" * 100_000}, without_digest]
    for metadata in forged:
        checksum = safetensors_files._checksum(metadata)
        yield file(header | {"__metadata__": metadata | {"checksum": checksum}})


JUNK = ("Traceback", "Error", "Exception", "weights_only", "torch.load", "torch.serialization", "SafeTensor", "0x")


def refused(path: pathlib.Path, case: str, capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether `bitdance info` refuses a file, and that it does so in one sentence."""
    try:
        main(["info", str(path)])
    except SystemExit as stop:
        output = capsys.readouterr()
        line = output.err.removesuffix("\n")
        assert stop.code == 2 and output.out == "", case
        assert line.startswith("bitdance: ") and "\n" not in line and line.endswith("."), (case, line)
        assert str(path) in line and line.isprintable() and len(line) < 400 + len(str(path)), (case, line)
        assert not any(word in line for word in JUNK), (case, line)
        return True
    capsys.readouterr()
    return False


def test_damaged_files_are_refused_in_one_sentence(tmp_path, capsys):
    released = model_file(tmp_path / "model.pt", model=None), autoencoder_file(tmp_path / "ae.pt")
    bases = (*released, our_model(tmp_path / "model.safetensors"))
    originals = [weights_file.read(base).states for base in bases]
    path, count, harmless = tmp_path / "broken", 0, []
    for base, original in zip(bases, originals, strict=True):
        for case, content in damaged(base.name, base.read_bytes(), 2000):
            path.write_bytes(content)
            if refused(path, case, capsys):
                count += 1
                continue
            # Some bytes of a zip have no meaning, such as padding and dates: then every value must be as before.
            states = weights_file.read(path).states
            assert base.suffix == ".pt" and states.keys() == original.keys(), case
            assert all(digest(states[key]) == digest(original[key]) for key in states), case
            harmless.append(case)
    assert len(harmless) < 10, harmless
    for content in (*unusable(bases[0]), *forged_headers(bases[2])):
        path.write_bytes(content)
        assert refused(path, str(content[:300]), capsys), content[:300]
        count += 1
    (tmp_path / "empty").mkdir()
    for odd in (tmp_path / "empty", tmp_path / "missing"):
        assert refused(odd, str(odd), capsys)
    assert count >= 200


@pytest.mark.filterwarnings("ignore:torch.quantize")
def test_code_is_refused_and_never_run(tmp_path, capsys):
    marker, path = tmp_path / "executed", tmp_path / "evil"
    pickle.loads(pickle.dumps(Evil(os.system, f"touch {marker}")))
    assert marker.exists()  # without the restrictions it does
    marker.unlink()
    for case, content in hostile(marker, model_file(tmp_path / "model.pt")):
        path.write_bytes(content)
        assert refused(path, case, capsys), case
        assert not marker.exists(), case
        for load in (weights_file.load_model, weights_file.load_autoencoder):
            message = refusal(path, load)
            assert "carries code (" in message, (case, message)
        assert not marker.exists(), case


def test_the_reason_names_the_code(tmp_path):
    path = tmp_path / "evil.pt"
    path.write_bytes(torch_bytes({"ema": EMA, "args": argparse.Namespace(x=Evil(os.system, "true"))}))
    assert f"carries code ({os.system.__module__}.system," in refusal(path)
    path.write_bytes(torch_bytes({"ema": Plain()}))
    assert f"{Plain.__module__}.Plain" in refusal(path)


def test_zips_that_expand_or_lie_are_not_read(tmp_path, capsys, monkeypatch):
    """Compressed entries, sizes that differ, entries that overlap, and a pickle that only torch would find."""
    whole = model_file(tmp_path / "model.pt")
    data = whole.read_bytes()
    entry = data.rfind(b"PK\x01\x02")
    contents = [with_entry(whole, "extra", bytes(10**6), kind) for kind in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)]
    contents.append(data[: entry + 20] + struct.pack("<II", 40, 10**9) + data[entry + 28 :])
    contents.append(data[: entry + 20] + struct.pack("<II", 10**9, 10**9) + data[entry + 28 :])
    contents.append(with_entry(whole, "DATA.PKL", b"x"))
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda _: pytest.fail("the entries were read"))
    for number, content in enumerate(contents):
        whole.write_bytes(content)
        assert refused(whole, str(number), capsys)


@pytest.mark.parametrize(
    ("state", "config", "words"),
    [
        ({f"layers.{i}.norm.weight": torch.ones(1) for i in range(3000)}, {}, "n_layer 3000 is invalid"),
        ({f"head.net.res_blocks.{i}.w": torch.ones(1) for i in range(300)}, {}, "head_layers 300 is invalid"),
        ({}, {"class_names": ["x" * 70_000, "y"]}, "a class name has 70000 characters: shorten it to at most 1000."),
    ],
    ids=["layers", "blocks", "names"],
)
def test_names_in_a_file_cost_little(tmp_path, monkeypatch, state, config, words):
    monkeypatch.setattr(network_config, "empty_network", lambda *_: pytest.fail("a network was built"))
    content = {"model": {"class_names": [], **config}}
    safetensors_files.save_tensors(tmp_path / "model", EMA | state, "model", content)
    assert words in refusal(tmp_path / "model")


def test_a_large_grid_needs_no_memory_of_its_square():
    network = BitDance(dataclasses.replace(MODEL, grid=300))
    assert sum(buffer.nbytes for buffer in network.buffers()) < 10**8


def test_the_advice_for_a_damaged_checkpoint_is_to_delete_it(tmp_path):
    for name, advice in (("checkpoint-0000005.safetensors", "delete it."), ("m.safetensors", "download or copy it")):
        (tmp_path / name).write_bytes(our_checkpoint(tmp_path / "whole", "model").read_bytes()[:-1])
        assert advice in refusal(tmp_path / name)
