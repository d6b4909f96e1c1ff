"""Files of weights: every layout is read exactly, ours are written atomically, no broken or hostile file does harm."""

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
from bitdance.weights import weights_file

MODEL = BitDanceConfig(
    dim=64,
    n_layer=1,
    head_dim=64,
    head_layers=1,
    head_ada_ln=1,
    parallel_num=4,
    grid=2,
    bits=8,
    cls_token_num=2,
    num_classes=2,
)
AUTOENCODER = AutoencoderConfig(widths=(32, 32), blocks=1, bits=8)
State = dict[str, Tensor]


def random_state(config: BitDanceConfig | AutoencoderConfig, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in weights_file.shapes(config).items()}


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
    weights_file.save_tensors(
        path, state, "model", {"model": dataclasses.asdict(dataclasses.replace(MODEL, **changes))}
    )
    return path


def our_training(path: pathlib.Path, trains: str) -> pathlib.Path:
    config, state = (MODEL, EMA) if trains == "model" else (AUTOENCODER, VAE)
    tensors = {f"{part}/{name}": value for part in ("model", "ema") for name, value in state.items()}
    tensors |= {f"model/{name}": value + 1 for name, value in state.items()}
    tensors["optimizer/step/" + next(iter(state))] = torch.tensor(5.0)
    content = {trains: dataclasses.asdict(config), "run": {"run.lr": 1e-3}}
    weights_file.save_tensors(path, tensors, "training", content, step="5", network=trains)
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
def test_the_ema_is_preferred(tmp_path: pathlib.Path, legacy: bool) -> None:
    path = tmp_path / "model.pt"
    torch.save({"model": RAW | INSIDE, "ema": EMA | INSIDE}, path, _use_new_zipfile_serialization=not legacy)
    assert same(bitdance.load_model(path), EMA)
    assert same(bitdance.load_model(path, "ema"), EMA)
    assert same(bitdance.load_model(path, "model"), RAW)
    assert same(bitdance.load_autoencoder(path), VAE)


def test_one_kind_of_weights(tmp_path: pathlib.Path) -> None:
    raw = model_file(tmp_path / "raw.pt", ema=None)
    ema = model_file(tmp_path / "ema.pt", model=None, args=None)
    empty = model_file(tmp_path / "empty.pt", ema={})
    assert same(weights_file.load_model(raw), RAW) and same(weights_file.load_model(ema), EMA)
    assert same(weights_file.load_model(empty), RAW)
    assert "no EMA weights" in refusal(raw, lambda path: weights_file.load_model(path, "ema"))
    assert "no raw weights" in refusal(ema, lambda path: weights_file.load_model(path, "model"))


def test_the_golden_models_are_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tiny.pt"
    tiny.save_checkpoint(path, 4)
    model = bitdance.load_model(path)
    assert same(model, tiny.model_state(4)) and model.config == tiny.config(4)
    assert torch.equal(model.rotary, tiny.model(4).rotary) and torch.equal(model.mask, tiny.model(4).mask)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    autoencoder = bitdance.load_autoencoder(path)
    assert autoencoder.config == tiny.AUTOENCODER and same(autoencoder, tiny.autoencoder_state(4))


def test_an_autoencoder_with_losses_beside_it(tmp_path: pathlib.Path) -> None:
    extra = {"loss.discriminator.main.0.weight": torch.ones(3), "quantize.codebook": torch.ones(2, dtype=torch.int64)}
    autoencoder = weights_file.load_autoencoder(autoencoder_file(tmp_path / "ae.pt", **extra))
    assert same(autoencoder, VAE) and autoencoder.config == AUTOENCODER


def test_the_state_dict_of_a_module(tmp_path: pathlib.Path) -> None:
    """As training saves it: an OrderedDict with versions beside the tensors, and an optimizer beside that."""
    model = BitDance(MODEL)
    loss = sum(parameter.sum() for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    loss.backward()  # type: ignore[union-attr]
    optimizer.step()
    path = model_file(tmp_path / "model.pt", ema=None, model=model.state_dict(), optimizer=optimizer.state_dict())
    assert same(weights_file.load_model(path), model.state_dict())


def test_bare_state_dicts(tmp_path: pathlib.Path) -> None:
    torch.save(EMA | INSIDE, tmp_path / "model.pt")
    torch.save(VAE | {"loss.w": torch.ones(1)}, tmp_path / "ae.pt")
    safetensors.torch.save_file(VAE, tmp_path / "ae.safetensors")
    safetensors.torch.save_file(EMA, tmp_path / "model.safetensors", {"format": "pt"})
    assert same(weights_file.load_model(tmp_path / "model.pt"), EMA)
    assert same(weights_file.load_autoencoder(tmp_path / "model.pt"), VAE)
    assert same(weights_file.load_autoencoder(tmp_path / "ae.pt"), VAE)
    assert same(weights_file.load_autoencoder(tmp_path / "ae.safetensors"), VAE)
    assert same(weights_file.load_model(tmp_path / "model.safetensors"), EMA)


def test_odd_but_harmless_tensors(tmp_path: pathlib.Path) -> None:
    """Parameters, views of one storage, transposed ones, several types: the numbers count."""
    everything = torch.cat([value.flatten() for value in EMA.values()])
    state, start = {}, 0
    for name, value in EMA.items():
        state[name] = everything[start : start + value.numel()].view(value.shape)
        start += value.numel()
    state["layers.0.attention.wqkv.weight"] = state["layers.0.attention.wqkv.weight"].t().contiguous().t()
    state["norm.weight"] = torch.nn.Parameter(EMA["norm.weight"].double())
    model = weights_file.load_model(model_file(tmp_path / "views.pt", ema=state))
    assert same(model, EMA)
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(EMA)


def test_a_loaded_network_does_not_hang_on_the_file(tmp_path: pathlib.Path) -> None:
    path = model_file(tmp_path / "model.pt")
    model = weights_file.load_model(path)
    path.write_bytes(b"")
    assert same(model, EMA)


def test_dtypes(tmp_path: pathlib.Path) -> None:
    model = weights_file.load_model(model_file(tmp_path / "model.pt"), dtype=torch.bfloat16)
    assert all(torch.equal(p, EMA[name].bfloat16()) for name, p in model.named_parameters())
    path = tmp_path / "half.safetensors"
    weights_file.save(path, model, dtype=torch.float16)
    stored = weights_file.read(path).states["model"]
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert {p.dtype for p in weights_file.load_model(path).parameters()} == {torch.float32}


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize("name", [*RELEASED_MODELS, "autoencoder_d16c32"])
def test_released_sizes_follow_from_shapes(name: str) -> None:
    rows = [line.split("\t") for line in (tiny.DATA / "released_tensors.tsv").read_text().splitlines()]
    shapes = {tensor: tuple(map(int, shape.split(","))) for network, tensor, shape in rows if network == name}
    state = {tensor: torch.empty(shape, device="meta") for tensor, shape in shapes.items()}
    key = "ema" if name in RELEASED_MODELS else "autoencoder"
    contents = weights_file.Contents(pathlib.Path("released.pt"), "", {key: state}, {}, None, {})
    if name in RELEASED_MODELS:
        assert weights_file.describe_model(contents).config == RELEASED_MODELS[name].config
    else:
        assert weights_file.describe_autoencoder(contents).config == AutoencoderConfig()


@pytest.mark.parametrize(
    "changes",
    [
        {"dim": 128},
        {"n_layer": 2},
        {"head_dim": 128},
        {"head_layers": 2},
        {"head_layers": 2, "head_ada_ln": 2},
        {"parallel_num": 1},
        {"grid": 4, "parallel_num": 16},
        {"grid": 4},
        {"bits": 16},
        {"cls_token_num": 3},
        {"num_classes": 5},
    ],
)
def test_every_size_is_inferred(tmp_path: pathlib.Path, changes: dict[str, int]) -> None:
    config = dataclasses.replace(MODEL, **changes)
    path = model_file(tmp_path / "model.pt", ema=random_state(config, 0), model=None, args=None)
    description = weights_file.describe_model(weights_file.read(path))
    assert description.config == config == weights_file.load_model(path).config
    asked = ("token_order", "time_shift", "class_names")
    assert description.sources == {
        field.name: "default" if field.name in asked else "shapes" for field in dataclasses.fields(config)
    }


@pytest.mark.parametrize("order", ["patch", "standard"])
@pytest.mark.parametrize("kind", [argparse.Namespace, dict])
def test_args_tell_what_shapes_cannot(tmp_path: pathlib.Path, order: str, kind: Any) -> None:
    path = model_file(tmp_path / "model.pt", args=kind(parallel_mode=order, time_shift=1.5))
    description = weights_file.describe_model(weights_file.read(path))
    assert description.config == dataclasses.replace(MODEL, token_order=order, time_shift=1.5)
    assert description.sources["token_order"] == description.sources["time_shift"] == "args"
    assert description.sources["dim"] == "shapes" and description.sources["class_names"] == "default"


def test_autoencoder_sizes_are_inferred(tmp_path: pathlib.Path) -> None:
    config = AutoencoderConfig(widths=(32, 64, 96), blocks=2, bits=16)
    torch.save({"state_dict": random_state(config, 0)}, tmp_path / "ae.pt")
    description = weights_file.describe_autoencoder(weights_file.read(tmp_path / "ae.pt"))
    assert description.config == config and set(description.sources.values()) == {"shapes"}


def test_our_files_hold_their_configuration(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(MODEL, token_order="standard", time_shift=3.0, class_names=("cat", "dog"))
    model = BitDance(config)
    digest = weights_file.save(tmp_path / "model.safetensors", model, EMA, metadata={"step": "7"})
    contents = weights_file.read(tmp_path / "model.safetensors")
    description = weights_file.describe_model(contents)
    assert description.config == config and set(description.sources.values()) == {"file"}
    assert contents.metadata["step"] == "7" and contents.metadata["digest"] == digest
    assert same(weights_file.load_model(contents), EMA)


# ---------------------------------------------------------------- strictness


FAULTS: dict[str, Callable[[State], Any]] = {
    "is missing": lambda state: state.pop("{}"),
    "is not part of": lambda state: state.update({"{}.extra": torch.ones(1)}),
    "has the shape": lambda state: state.update({"{}": torch.ones(3, 5)}),
    "holds torch.int64": lambda state: state.update({"{}": state["{}"].long()}),
    "not finite": lambda state: state["{}"].view(-1)[3:4].fill_(float("nan")),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("kind", ["model", "autoencoder"])
def test_faults_name_the_tensor(tmp_path: pathlib.Path, kind: str, ours: bool, fault: str) -> None:
    """In the released and in our own layout."""
    name = "head.net.final_layer.linear.weight" if kind == "model" else "decoder.mid_block.0.conv1.weight"
    config, state = (MODEL, dict(EMA)) if kind == "model" else (AUTOENCODER, dict(VAE))
    assert name in state
    renamed = {("{}" if key == name else key): value.clone() for key, value in state.items()}
    FAULTS[fault](renamed)
    state = {key.replace("{}", name): value for key, value in renamed.items()}
    path = tmp_path / "file"
    if ours:
        weights_file.save_tensors(path, state, kind, {kind: dataclasses.asdict(config)})
    else:
        torch.save({"ema" if kind == "model" else "state_dict": state}, path)
    message = refusal(path, weights_file.load_model if kind == "model" else weights_file.load_autoencoder)
    assert name in message and fault in message


def test_whole_blocks_and_the_other_kind_of_file(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(MODEL, n_layer=3)
    state = {name: value for name, value in random_state(config, 0).items() if not name.startswith("layers.1.")}
    assert "layers.1.*" in refusal(model_file(tmp_path / "model.pt", ema=state))
    assert "holds no autoencoder" in refusal(our_model(tmp_path / "m"), weights_file.load_autoencoder)
    assert "holds no model" in refusal(autoencoder_file(tmp_path / "ae"), weights_file.load_model)
    training = our_training(tmp_path / "t", "autoencoder")
    assert "only the training of an autoencoder" in refusal(training, weights_file.load_model)


def test_too_large_for_the_type(tmp_path: pathlib.Path) -> None:
    path = model_file(tmp_path / "model.pt", ema=EMA | {"norm.weight": torch.full((64,), 1e30)})
    assert "norm.weight" in refusal(path, lambda path: weights_file.load_model(path, dtype=torch.float16))


# ---------------------------------------------------------------- our own files


@pytest.mark.parametrize("config", [MODEL, AUTOENCODER])
def test_round_trip_is_exact(tmp_path: pathlib.Path, config: Any) -> None:
    path = tmp_path / "new folder" / "file.safetensors"
    network = BitDance(config) if isinstance(config, BitDanceConfig) else Autoencoder(config)
    digest = weights_file.save(path, network)
    load: Any = weights_file.load_model if isinstance(config, BitDanceConfig) else weights_file.load_autoencoder
    again = load(path)
    assert again.config == config and same(again, network.state_dict())
    assert digest == weights_file.digest(network.state_dict()) == weights_file.digest(again.state_dict())
    first = path.read_bytes()
    weights_file.save(path, again)
    assert weights_file.digest(load(path).state_dict()) == digest and len(path.read_bytes()) == len(first)


@pytest.mark.parametrize("trains", ["model", "autoencoder"])
def test_the_state_of_a_run_is_a_file_of_weights(tmp_path: pathlib.Path, trains: str) -> None:
    contents = weights_file.read(our_training(tmp_path / "checkpoint.safetensors", trains))
    assert contents.parts == (trains,) and {"model", "ema", "optimizer"} <= contents.states.keys()
    if trains == "model":
        assert same(weights_file.load_model(contents), EMA)
        assert same(weights_file.load_model(contents, "model"), {name: value + 1 for name, value in EMA.items()})
    else:
        assert same(weights_file.load_autoencoder(contents), VAE)
        assert weights_file.digest(contents.states["autoencoder"]) == weights_file.digest(VAE)


@pytest.mark.parametrize("error", [RuntimeError("cut"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failed_save_leaves_the_old_file(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = our_model(tmp_path / "model.safetensors")
    before = path.read_bytes()

    def half(tensors: State, target: pathlib.Path, metadata: dict[str, str]) -> None:
        pathlib.Path(target).write_bytes(before[:1000])
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
        our_model(path, RAW)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.safetensors"]


def test_the_digest_identifies_tensors() -> None:
    # Runs store this value as the identity of their autoencoder: it must never change.
    state = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(1, dtype=torch.int64)}
    digest = weights_file.digest(state)
    assert digest == "63fc20a914221df0ed84c309af5dd183c2c26ee358b566677d66e3e4a12548c3"
    assert weights_file.digest(dict(reversed(state.items()))) == digest
    assert weights_file.digest(state | {"b": state["b"].t().contiguous().t()}) == digest
    changed = [{"b": state["b"] + 1e-6}, {"b": state["b"].view(3, 2)}, {"b": state["b"].double()}, {"c": torch.ones(0)}]
    digests = {weights_file.digest(state | change) for change in changed}
    assert len(digests) == 4 and digest not in digests


def test_the_digest_of_an_autoencoder_does_not_depend_on_its_file(tmp_path: pathlib.Path) -> None:
    files = [model_file(tmp_path / "m.pt"), autoencoder_file(tmp_path / "a.pt", loss=torch.ones(1))]
    weights_file.save(tmp_path / "a.safetensors", weights_file.load_autoencoder(files[1]))
    files.append(tmp_path / "a.safetensors")
    states = [weights_file.read(file).states["autoencoder"] for file in files]
    assert {weights_file.digest(state) for state in states} == {weights_file.digest(VAE)}


# ---------------------------------------------------------------- bitdance info


def info(path: pathlib.Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    main(["info", str(path), *flags])
    output = capsys.readouterr()
    assert output.err == ""
    return output.out


def test_info(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = model_file(tmp_path / "model.pt")
    words = {" ".join(line.split()) for line in info(path, capsys).splitlines()}
    assert {"weights ema; model is there too", "dim 64 from shapes", "token_order patch from args"} <= words
    assert "lr 0.0006" in words and "class_names none published default" in words
    facts = json.loads(info(path, capsys, "--json"))
    assert facts["model"]["config"]["time_shift"] == {"value": 2.0, "source": "args"}
    assert facts["model"]["weights"] == "ema" and facts["model"]["weights_in_file"] == ["ema", "model"]
    assert facts["model"]["parameters"] == sum(value.numel() for value in EMA.values())
    assert facts["autoencoder"]["config"]["widths"]["value"] == [32, 32]
    assert facts["model"]["released_as"] is None and facts["args"]["betas"] == [0.9, 0.95]


def test_info_of_our_files(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = our_model(tmp_path / "model.safetensors", class_names=("cat", "dog"))
    facts = json.loads(info(path, capsys, "--json"))
    assert facts["model"]["config"]["class_names"] == {"value": ["cat", "dog"], "source": "file"}
    assert facts["metadata"]["digest"] == weights_file.digest(EMA) and "cat, dog" in info(path, capsys)
    facts = json.loads(info(our_training(tmp_path / "run", "autoencoder"), capsys, "--json"))
    assert facts["metadata"]["step"] == "5" and facts["args"] == {"run.lr": 1e-3}
    assert facts["autoencoder"]["weights"] == "ema" and "model" not in facts


def test_info_names_the_released_model() -> None:
    from bitdance.cli.info import _released

    assert [_released(release.config) for release in RELEASED_MODELS.values()] == [
        f"BitDance-{name}" for name in RELEASED_MODELS
    ]
    assert _released(AutoencoderConfig()) == "ae_d16c32" and _released(AUTOENCODER) is None
    assert _released(dataclasses.replace(RELEASED_MODELS["B-1X"].config, class_names=("x",) * 1000)) == "BitDance-B-1X"


def test_info_prints_odd_args(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    bomb: Any = ["lol"]
    for _ in range(60):
        bomb = [bomb, bomb]  # its text would have 2^60 words
    args = {"bomb": bomb, "escape": "\x1b[2J\nnew", "nan": float("nan"), 3: torch.ones(1), "long": list(range(1000))}
    path = model_file(tmp_path / "model.pt", args=args)
    assert len(info(path, capsys)) < 10_000 and "\x1b" not in info(path, capsys)
    facts = json.loads(info(path, capsys, "--json"), parse_constant=pytest.fail)
    assert facts["args"]["bomb"] == "<list>" and facts["args"]["3"] == "<Tensor>" and facts["args"]["nan"] == "nan"


# ---------------------------------------------------------------- broken and hostile files


class Evil:
    """Runs a command where it is unpickled freely."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


class Plain:
    """An instance of a class that weights do not need."""


def with_entry(
    path: pathlib.Path, name: str, content: bytes, compression: int = zipfile.ZIP_STORED, folder: str = "model"
) -> bytes:
    """A zip with one entry replaced or added, all checksums correct."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for entry in old.namelist():
            if entry != f"{folder}/{name}":
                new.writestr(entry, old.read(entry))
        new.writestr(f"{folder}/{name}", content)
    return buffer.getvalue()


def zipped(**entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name.replace("__", "/").replace("_", "."), content)
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
    """Pickles that carry code, in every wrapping."""
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


def wrong(whole: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Files of something else, and torch files of something else."""
    yield "empty", b""
    yield "blank", b" " * 100
    yield "zeros", bytes(1000)
    yield "text", b"config = 3\nnext line\n"
    yield "HTML", b"<!DOCTYPE html>\n<html><body>404: not found</body></html>"
    yield "HTML with blanks", b"\n\n  <html>Access denied</html>"
    yield "XML", b"\xef\xbb\xbf<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>"
    yield "JSON", b'{"error": "Repository not found"}'
    yield "JSON that begins late", b'        {"error": "Repository not found"}'
    yield "Git LFS", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
    yield "PNG", b"\x89PNG\r\n\x1a\n" + bytes(100)
    yield "gzip", b"\x1f\x8b\x08" + bytes(100)
    yield "random", random.Random(0).randbytes(5000)
    yield "zip of nothing", zipped()
    yield "zip of text", zipped(readme_txt=b"hello")
    yield "zip of arrays", zipped(arr_0_npy=b"\x93NUMPY")
    yield "zip with an empty pickle", with_entry(whole, "data.pkl", b"")
    yield "zip with HTML for a pickle", with_entry(whole, "data.pkl", b"<html></html>")
    yield "zip with a missing tensor", zipped(**{"model__data_pkl": zipfile.ZipFile(whole).read("model/data.pkl")})
    yield "zip that is compressed", with_entry(whole, "extra", bytes(10**6), zipfile.ZIP_DEFLATED)
    yield "zip with two pickles", with_entry(whole, "data.pkl", pickle.dumps({}, 2), folder="other")
    for name, data in {
        "a list": [1, 2],
        "a number": 3,
        "a tensor": torch.ones(3),
        "nothing": None,
        "an empty dictionary": {},
        "no weights": {"epochs": 3},
        "weights that are a number": {"ema": 3},
        "weights of text": {"ema": {"a": "b"}},
        "names that are numbers": {"model": {1: torch.ones(1)}},
        "no tensors": {"model": {}, "ema": {}},
        "other tensors": {"model": {"fc.weight": torch.ones(2, 2)}},
        "args in a list": {"ema": EMA, "args": [1]},
        "a token order": {"ema": EMA, "args": {"parallel_mode": "weird"}},
        "a token order that is a list": {"ema": EMA, "args": {"parallel_mode": ["patch"]}},
        "no time shift": {"ema": EMA, "args": {"time_shift": "x"}},
        "a negative time shift": {"ema": EMA, "args": {"time_shift": -1.0}},
        "an infinite time shift": {"ema": EMA, "args": {"time_shift": float("inf")}},
        "a patch size": {"ema": EMA, "args": argparse.Namespace(patch_size=2)},
        "a torn class embedding": {"ema": EMA | {"cls_embedding.weight": torch.ones(3, 100)}},
        "a grid that is no square": {"ema": EMA | {"pos_for_diff.weight": torch.ones(5, 64)}},
        "no classes": {"ema": EMA | {"cls_embedding.weight": torch.ones(1, 128)}},
        "a scalar": {"ema": EMA | {"emb_norm.weight": torch.tensor(1.0)}},
        "an empty tensor": {"ema": EMA | {"emb_norm.weight": torch.ones(0)}},
        "bits that are not bytes": {"ema": EMA | {"proj_in.w1.weight": torch.ones(192, 9)}},
        "complex numbers": {"ema": EMA | {"norm.weight": torch.ones(64, dtype=torch.complex64)}},
        "8-bit numbers": {"ema": EMA | {"norm.weight": torch.ones(64).to(torch.float8_e4m3fn)}},
        "a huge view": {"ema": EMA | {"norm.weight": torch.ones(1).expand(1 << 40)}},
        "escapes in a name": {"ema": EMA | {"\x1b[2J\n": torch.ones(1)}},
        "an autoencoder of odd width": {
            "state_dict": random_state(AUTOENCODER, 0)
            | {"encoder.down.0.block.0.conv1.weight": torch.ones(33, 32, 3, 3)}
        },
        "half an autoencoder": {"state_dict": {k: v for k, v in VAE.items() if k.startswith("encoder.")}},
    }.items():
        yield name, torch_bytes(data)
    # Written by hand: nested tuples as the key of a dictionary, which hashes them all.
    nested = b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s."
    doubled = b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
    bomb = b"\x80\x02}K\x01\x85q\x00" + doubled + b"K\x01s."
    for name, content in {"deep nesting": nested, "a memo bomb": bomb}.items():
        yield name, with_entry(whole, "data.pkl", content)
        yield f"{name} alone", content
    numel = struct.pack("<i", EMA["cls_embedding.weight"].numel())
    for other in (1 << 30, -5):
        data = zipfile.ZipFile(whole).read("model/data.pkl")
        lying = data.replace(b"M" + numel[:2], b"J" + struct.pack("<i", other))
        assert lying != data
        yield f"a tensor of {other} numbers", with_entry(whole, "data.pkl", lying)


def lying(path: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Safetensors of ours whose header says what is not so; checksums are made to fit where that is possible."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]

    def file(header: Any, data: bytes = data, length: int | None = None) -> bytes:
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    for length in (0, 1, size - 1, size + 8, 1 << 32, 1 << 40, (1 << 64) - 1):
        yield f"header of {length} bytes", file(header, length=length)
    for name, change in {
        "huge shape": {"shape": [1 << 40, 1 << 20]},
        "negative shape": {"shape": [-64]},
        "other shape": {"shape": [8, 8]},
        "huge offsets": {"data_offsets": [0, 1 << 50]},
        "reversed offsets": {"data_offsets": [256, 0]},
        "overlapping offsets": {"data_offsets": [0, 256]},
        "unknown type": {"dtype": "F3"},
        "other type": {"dtype": "I32"},
    }.items():
        yield name, file(header | {"norm.weight": header["norm.weight"] | change})
    yield "no metadata", file({name: value for name, value in header.items() if name != "__metadata__"})[:-4]
    yield "nested header", struct.pack("<Q", 200_000) + b"[" * 200_000
    yield "more data than said", content + b"more"
    good = header["__metadata__"]
    metadata: dict[str, dict[str, str]] = {
        "a later version": {**good, "format_version": "2"},
        "another format": {**good, "format": "pt"},
        "another digest": {**good, "digest": "0" * 64},
        "another configuration": {**good, "config": "{}"},
        "no digest": {key: value for key, value in good.items() if key != "digest"},
    }
    config = json.loads(good["config"])["model"]
    for name, content_config, kind in (
        ("unknown kind", {"model": config}, "banana"),
        ("configuration that is a list", [config], "model"),
        ("no configuration", {}, "model"),
        ("other configuration", {"autoencoder": config}, "model"),
        ("a later field", {"model": config | {"colour": "red"}}, "model"),
        ("billions of layers", {"model": config | {"n_layer": 10**9}}, "model"),
        ("other width", {"model": config | {"dim": 128}}, "model"),
        ("text width", {"model": config | {"dim": "64"}}, "model"),
        ("class names", {"model": config | {"class_names": [1, 2]}}, "model"),
        ("few class names", {"model": config | {"class_names": ["cat"]}}, "model"),
        ("class names that are a number", {"model": config | {"class_names": 2}}, "model"),
        ("time shift", {"model": config | {"time_shift": "x"}}, "model"),
        ("token order", {"model": config | {"token_order": "weird"}}, "model"),
        ("training", {"model": config}, "training"),
    ):
        forged = {**good, "kind": kind, "config": json.dumps(content_config)}
        metadata[name] = {**forged, "checksum": weights_file._checksum(forged)}
    for name, values in metadata.items():
        yield f"metadata: {name}", file({**header, "__metadata__": values})
    broken = {**good, "config": "[" * 100_000}
    yield "metadata: nested", file({**header, "__metadata__": {**broken, "checksum": weights_file._checksum(broken)}})


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


def test_broken_files_are_refused_in_one_sentence(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    bases = [model_file(tmp_path / "model.pt", model=None), autoencoder_file(tmp_path / "ae.pt")]
    bases.append(our_model(tmp_path / "model.safetensors"))
    originals = [weights_file.read(base).states for base in bases]
    path, count, harmless = tmp_path / "broken", 0, []
    for base, original in zip(bases, originals, strict=True):
        for case, content in damaged(base.name, base.read_bytes(), 2000):
            path.write_bytes(content)
            if refused(path, case, capsys):
                count += 1
                continue
            # Some bytes of a zip carry nothing, such as padding and dates: then every number must be as it was.
            states = weights_file.read(path).states
            assert base.suffix == ".pt" and states.keys() == original.keys(), case
            assert all(weights_file.digest(states[key]) == weights_file.digest(original[key]) for key in states), case
            harmless.append(case)
    assert len(harmless) < 10, harmless
    for case, content in (*wrong(bases[0]), *lying(bases[2])):
        path.write_bytes(content)
        assert refused(path, case, capsys), case
        count += 1
    for odd in (tmp_path, tmp_path / "missing"):
        assert refused(odd, str(odd), capsys)
    assert count >= 200


@pytest.mark.filterwarnings("ignore:torch.quantize")
def test_code_is_refused_and_never_run(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker, path = tmp_path / "executed", tmp_path / "evil"
    pickle.loads(pickle.dumps(Evil(os.system, f"touch {marker}")))
    assert marker.exists()  # it does what it must not do here
    marker.unlink()
    for case, content in hostile(marker, model_file(tmp_path / "model.pt")):
        path.write_bytes(content)
        assert refused(path, case, capsys), case
        assert not marker.exists(), case
        for load in (weights_file.load_model, weights_file.load_autoencoder):
            message = refusal(path, load)
            assert "carries code (" in message, (case, message)
        assert not marker.exists(), case


def test_the_reason_names_the_code(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "evil.pt"
    path.write_bytes(torch_bytes({"ema": EMA, "args": argparse.Namespace(x=Evil(os.system, "true"))}))
    assert f"carries code ({os.system.__module__}.system," in refusal(path)
    path.write_bytes(torch_bytes({"ema": Plain()}))
    assert f"{Plain.__module__}.Plain" in refusal(path)
