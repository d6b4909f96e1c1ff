# ruff: noqa: E402 (the folder of the tests comes first on the path)
"""Hostile files for the commands. Each try runs one command in a forked process with limits of time and memory.

``python tests/fuzz.py --tries 2000 --seed 0`` prints a table of the outcomes by class of file and the tries that broke
the promise of docs/security.md; ``--keep FOLDER`` keeps their files. A try is a function of its class and number.
"""

from __future__ import annotations

import argparse
import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import pathlib
import pickle
import random
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parent.parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from small import pictures, save_pair

from bitdance.cli.main import main
from bitdance.metrics.features import FeatureExtractor
from bitdance.weights.safetensors_files import save_tensors

MAX_SECONDS, MAX_BYTES = 10.0, 10**9
MARKER = "executed"
ODD = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    2**100,
    1e308,
    float("nan"),
    "",
    "x" * 70_000,
    "\x1b[31m",
    "\ud800",
    [],
    {},
    [[1]],
    {"a": 1},
    0.5,
    "7",
]
"""Values for a field of JSON."""


class Outcome(NamedTuple):
    """What a try did: `kind` is `ok`, or how the promise was broken; bytes are above those of the parent process."""

    kind: str
    seconds: float
    memory: int
    status: int
    output: str


def _brightness(images: torch.Tensor) -> torch.Tensor:
    """A feature extractor: mean and spread of each channel."""
    x = images.float().flatten(1, 2)
    return torch.cat([x.mean(1), x.std(1)], 1)


brightness = FeatureExtractor("brightness", 6, _brightness)


# ---------------------------------------------------------------- mutations


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Returns the data with some bytes changed, cut, repeated, or filled with zeros."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at, size = rng.randrange(len(changed) or 1), rng.choice([1, 1, 2, 4, 8, 64])
        kind = rng.randrange(6)
        if kind == 0:
            changed[at : at + size] = rng.randbytes(size)
        elif kind == 1:
            changed[at : at + size] = bytes([rng.choice([0, 255])]) * size
        elif kind == 2:
            del changed[at:]
        elif kind == 3:
            changed[at:at] = changed[at : at + size]
        elif kind == 4:
            changed[at : at + 4] = struct.pack(rng.choice("<>") + "I", rng.choice([0, 2**31 - 1, 2**32 - 1, 10**9]))
        elif changed:
            changed[at % len(changed)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def mutate_json(rng: random.Random, value: Any) -> Any:
    """Returns the value with one field changed, removed or added."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        value = dict(value) if isinstance(value, dict) else list(value)
        kind = rng.random()
        if kind < 0.1:
            del value[key]
        elif kind < 0.2 and isinstance(value, dict):
            value[rng.choice(["\x1b[31mred", "x" * 70_000, "__class__", "format"])] = rng.choice(ODD)
        else:
            value[key] = mutate_json(rng, value[key])
        return value
    return rng.choice(ODD)


def dump_json(rng: random.Random, value: Any) -> bytes:
    """Returns mutated JSON as text; sometimes no JSON, or nested deeply."""
    if rng.random() < 0.1:
        depth = rng.choice([10, 1000, 200_000])
        return b"[" * depth + b"]" * depth
    text = json.dumps(mutate_json(rng, value)).encode()
    return mutate_bytes(rng, text) if rng.random() < 0.2 else text


class Reduce:
    """Pickles to a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def hostile_pickle(rng: random.Random) -> bytes:
    """Returns a pickle that executes something, is large, or has odd types."""
    nested: Any = []
    for _ in range(rng.choice([10, 200])):
        nested = [nested]
    choices: list[Any] = [
        Reduce(os.system, f"touch {MARKER}"),
        Reduce(eval, f"open({MARKER!r}, 'w')"),
        Reduce(bytearray, 3 * 10**9),
        Reduce(open, MARKER, "w"),
        {"state_dict": Reduce(exec, f"open({MARKER!r}, 'w')")},
        {"state_dict": {("a", "b"): 1, "c": nested}},
        {"ema": nested, "model": {}, "args": {"model": "\x1b[31m"}},
        {b"data": [[1, 2], [3]], b"labels": (1, 2)},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [10**9, -1]},
        {b"data": np.zeros((2, 5), np.float32), b"fine_labels": nested},
        nested,
        rng.choice(ODD[:-4]),
    ]
    data = pickle.dumps(rng.choice(choices), protocol=rng.choice([2, 4]))
    return mutate_bytes(rng, data) if rng.random() < 0.2 else data


def rewrite_zip(rng: random.Random, data: bytes, pickles: bool = False) -> bytes:
    """Returns the zip with a bomb or a pickle as a member, in any compression, or with a directory that lies."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        names = source.namelist()
        chosen = rng.choice(names)
        for name in names:
            body, how = source.read(name), zipfile.ZIP_STORED
            if name == chosen:
                how = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
                kind = rng.randrange(4)
                if kind == 0 and how != zipfile.ZIP_STORED:
                    body = bytes(rng.choice([10**8, 2 * 10**9]) if how == zipfile.ZIP_BZIP2 else 2 * 10**8)
                elif kind == 1 and pickles:
                    body = hostile_pickle(rng)
                elif kind == 2:
                    name = rng.choice(["../escape", "/tmp/escape", "\x1b[31m.png", "x" * 60_000, name + "\n"])
                else:
                    body = mutate_bytes(rng, body)
            target.writestr(name, body, compress_type=how)
    data = out.getvalue()
    if rng.random() < 0.3:  # sizes in the directory
        at = data.rfind(b"PK\x01\x02")
        data = data[: at + 20] + struct.pack("<II", *rng.choices([0, 5, 2**31, 2**32 - 2], k=2)) + data[at + 28 :]
    return data


# ---------------------------------------------------------------- classes of files


class Seeds:
    """Valid files that the tries start from, made once in a folder."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        save_pair(folder / "nets")
        self.weights = folder / "nets" / "model.safetensors"
        self.autoencoder = folder / "nets" / "autoencoder.safetensors"
        self.pictures = pictures(folder / "pictures", classes=3, each=2)
        self.run(["convert", self.weights, folder / "released.pt"])
        self.run(["convert", self.autoencoder, folder / "autoencoder.pt"])
        common = ["--image-size", 16, "--autoencoder", self.autoencoder]
        self.run(["encode", "--data-path", self.pictures, "--output", folder / "tokens", *common])
        small = ["--dim", 64, "--n-layer", 1, "--head-dim", 64, "--head-layers", 1, "--head-ada-ln", 1]
        self.train = ["train", "--image-size", 16, "--batch-size", 2, "--epochs", 2, "--cls-token-num", 2]
        self.train += ["--autoencoder", self.autoencoder, *small, "--num-workers", 1]
        tokens = ["--data-path", folder / "tokens"]
        self.run([*self.train, *tokens, "--output", folder / "run", "--save-every", 2, "--max-steps", 4])
        self.images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
        np.savez(folder / "images.npz", self.images)
        np.savez(folder / "statistics.npz", mu=np.zeros(6), sigma=np.eye(6), mu_s=np.zeros(6), sigma_s=np.eye(6))

    def run(self, arguments: list[Any]) -> None:
        outcome = run_command([str(argument) for argument in arguments], self.folder, 120)
        assert outcome.status == 0, outcome.output


def put(folder: pathlib.Path, name: str, data: bytes) -> pathlib.Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def weights_commands(rng: random.Random, seeds: Seeds, path: pathlib.Path, is_model: bool) -> list[Any]:
    if is_model:
        sample = ["sample", "--model", path, "--autoencoder", seeds.autoencoder, "--num-steps", 2, "--output", "out"]
        return rng.choice([["info", path], sample, ["convert", path, "converted.safetensors"]])
    sample = ["sample", "--model", seeds.weights, "--autoencoder", path, "--num-steps", 2, "--output", "out"]
    reconstruct = [
        "reconstruct",
        "--data-path",
        seeds.pictures,
        "--autoencoder",
        path,
        "--output",
        "out",
        "--image-size",
        16,
    ]
    return rng.choice([["info", path], sample, reconstruct, ["convert", path, "converted.safetensors"]])


def released_weights(rng: random.Random, seeds: Seeds, folder: pathlib.Path) -> list[Any]:
    is_model = rng.random() < 0.6
    data = (seeds.folder / ("released.pt" if is_model else "autoencoder.pt")).read_bytes()
    kind = rng.random()
    if kind < 0.35:
        data = mutate_bytes(rng, data)
    elif kind < 0.7:
        data = rewrite_zip(rng, data, pickles=True)
    elif kind < 0.85:
        data = hostile_pickle(rng)
    else:
        buffer = io.BytesIO()
        sizes = rng.choice([{"pos_embed": torch.zeros(1)}, {"a": torch.zeros(1).expand(10**10)}, {1: 2}, []])
        with contextlib.suppress(Exception):
            torch.save(rng.choice([sizes, {"state_dict": sizes}, {"ema": sizes, "model": sizes, "args": 3}]), buffer)
        data = buffer.getvalue() or b"x"
    return weights_commands(rng, seeds, put(folder, "file.pt", data), is_model)


def our_weights(rng: random.Random, seeds: Seeds, folder: pathlib.Path) -> list[Any]:
    is_model = rng.random() < 0.6
    data = (seeds.weights if is_model else seeds.autoencoder).read_bytes()
    if rng.random() < 0.3:
        data = mutate_bytes(rng, data)
    else:
        (size,) = struct.unpack("<Q", data[:8])
        header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
        kind = rng.random()
        if kind < 0.4:  # a configuration with a right checksum
            metadata = header["__metadata__"]
            tensors = load_file(seeds.weights if is_model else seeds.autoencoder)
            path = folder / "file.safetensors"
            save_tensors(path, tensors, metadata["kind"], mutate_json(rng, json.loads(metadata["config"])))
            return weights_commands(rng, seeds, path, is_model)
        if kind < 0.5:  # many layers, few bytes
            names = {
                f"layers.{i}.attention.wqkv.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
                for i in range(30_000)
            }
            header = {"__metadata__": header["__metadata__"], **names}
        else:
            header = mutate_json(rng, header)
        text = json.dumps(header).encode()
        data = struct.pack("<Q", rng.choice([len(text)] * 9 + [2**40])) + text + body
    return weights_commands(rng, seeds, put(folder, "file.safetensors", data), is_model)


def evaluate_command(rng: random.Random, seeds: Seeds, path: pathlib.Path) -> list[Any]:
    images = seeds.folder / "images.npz"
    pair = rng.choice([[path, "--reference", images], [images, "--reference", path]])
    return ["evaluate", *pair, "--features", f"{__file__}:brightness", "--cache", "features"]


def npz_of_images(rng: random.Random, seeds: Seeds, folder: pathlib.Path) -> list[Any]:
    buffer = io.BytesIO()
    kind = rng.randrange(5)
    if kind == 0:
        name = rng.choice(["images.npz", "statistics.npz"])
        data = (seeds.folder / name).read_bytes()
        data = mutate_bytes(rng, data) if rng.random() < 0.5 else rewrite_zip(rng, data)
    elif kind == 1:
        odd = [
            np.zeros((0, 16, 16, 3), np.uint8), np.zeros((5, 16, 16, 4), np.uint8), np.zeros((5, 3), np.uint8),
            np.full((3, 16, 16, 3), np.nan, np.float32), np.array(3), np.array(["a"]), np.zeros((2, 0, 0, 3), np.uint8),
            np.zeros((4, 16, 16, 3), np.complex64), np.zeros((4, 16, 16, 3), "<U3"), np.zeros(7, [("a", "<i4")]),
        ]  # fmt: skip
        np.savez(buffer, rng.choice(odd))
        data = buffer.getvalue()
    elif kind == 2:
        np.savez(buffer, np.array([Reduce(os.system, f"touch {MARKER}")], dtype=object))
        data = buffer.getvalue()
    else:  # a header that promises more than there is
        shape = rng.choice([(10**6, 256, 256, 3), (2**40,), (10**5, 1, 1, 3), (-1, 16, 16, 3), (10**12, 16, 16, 3)])
        text = repr({"descr": rng.choice(["|u1", "<f4", "|O", "<U100000000"]), "fortran_order": False, "shape": shape})
        text += " " * (-(len(text) + 11) % 64) + "\n"
        member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + bytes(100)
        with zipfile.ZipFile(buffer, "w") as file:
            names = rng.choice([["arr_0.npy"], ["mu.npy", "sigma.npy"], ["arr_0.npy", "arr_0.npy"]])
            for name in names:
                file.writestr(
                    name,
                    member,
                    compress_type=rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]),
                )
        data = buffer.getvalue()
    path = put(folder, "file.npz", data)
    nearest = ["nearest", path, "--data-path", seeds.pictures, "--output", "out.png"]
    return rng.choice([evaluate_command(rng, seeds, path), evaluate_command(rng, seeds, path), nearest])


def image_bytes(rng: random.Random) -> bytes:
    """Returns an image file that is changed, a bomb, or extreme in its shape."""
    buffer = io.BytesIO()
    kind = rng.randrange(5)
    mode, size = rng.choice(["RGB", "L", "P", "RGBA", "I;16", "CMYK", "1"]), (16, 16)
    if kind == 1:
        size = rng.choice([(1, 5000), (5000, 1), (1, 1), (9000, 9000)])
    form = {"CMYK": "JPEG", "I;16": "PNG"}.get(mode, rng.choice(["PNG", "GIF", "BMP", "TIFF", "WEBP"]))
    if mode in ("RGB", "L"):
        form = rng.choice(["PNG", "JPEG"])
    with contextlib.suppress(Exception):
        Image.new(mode, size).save(buffer, form)
    data = buffer.getvalue() or b"nothing"
    if kind == 2 and data[:4] == b"\x89PNG":  # the header promises a large image
        data = data[:16] + struct.pack(">II", *rng.choices([30_000, 2**31 - 1, 0], k=2)) + data[24:]
    return data if kind == 1 else mutate_bytes(rng, data)


def data_command(rng: random.Random, seeds: Seeds, path: pathlib.Path) -> list[Any]:
    small = ["--image-size", 16, "--autoencoder", seeds.autoencoder]
    return rng.choice(
        [
            ["encode", "--data-path", path, "--output", "out", *small, "--num-workers", 1],
            [*seeds.train, "--data-path", path, "--output", "out", "--max-steps", 1],
            ["nearest", seeds.folder / "images.npz", "--data-path", path, "--output", "out.png"],
            ["reconstruct", "--data-path", path, "--output", "out", *small],
            evaluate_command(rng, seeds, path),
        ]
    )


def folders(rng: random.Random, seeds: Seeds, folder: pathlib.Path) -> list[Any]:
    target = folder / "set"
    shutil.copytree(seeds.pictures, target)
    for _ in range(rng.choice([1, 3])):
        name = rng.choice([b"a.png", b"b.jpg", b"\xff\xfe.png", b"\x1b[31m.jpeg", b"c.webp", b"d.txt", b".e.png"])
        place = os.path.join(os.fsencode(target), rng.choice([b"class-0", b"class-1", b"\xff\xfe", b"new", b"."]))
        os.makedirs(place, exist_ok=True)
        kind = rng.random()
        with contextlib.suppress(FileExistsError):
            if kind < 0.1:
                os.mkfifo(os.path.join(place, name))
            elif kind < 0.2:
                os.symlink(rng.choice(["/dev/zero", "/dev/random", "loop", ".."]), os.path.join(place, name))
            else:
                with open(os.path.join(place, name), "xb") as file:
                    file.write(image_bytes(rng))
    return data_command(rng, seeds, target)


def zips(rng: random.Random, seeds: Seeds, folder: pathlib.Path) -> list[Any]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for path in sorted(seeds.pictures.rglob("*.png")):
            file.writestr(str(path.relative_to(seeds.pictures)), path.read_bytes())
        file.writestr(rng.choice(["class-0/x.png", "../x.png", "class-1/\x1b.png", "x.png"]), image_bytes(rng))
    data = rng.choice([mutate_bytes, rewrite_zip])(rng, buffer.getvalue())
    return data_command(rng, seeds, put(folder, "set.zip", data))


def tars(rng: random.Random, seeds: Seeds, folder: pathlib.Path) -> list[Any]:
    buffer = io.BytesIO()
    form = rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
    with tarfile.open(fileobj=buffer, mode="w", format=form) as file:
        for path in sorted(seeds.pictures.rglob("*.png")):
            file.add(path, str(path.relative_to(seeds.pictures)))
        info = tarfile.TarInfo(rng.choice(["class-0/x.png", "../x.png", "a" * 90 + "/x.png", "class-1/\x1b.png"]))
        body = image_bytes(rng)
        info.size = len(body)
        info.type = rng.choice([tarfile.REGTYPE] * 4 + [tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE])
        if form == tarfile.PAX_FORMAT:
            info.pax_headers = rng.choice(
                [{}, {"size": "9" * 30}, {"path": "x" * 10**5}, {"GNU.sparse.map": "1," * 99}]
            )
        file.addfile(info, io.BytesIO(body))
    data = buffer.getvalue()
    kind = rng.random()
    if kind < 0.5:  # headers are what is read first
        at = 512 * rng.randrange(len(data) // 512)
        data = data[:at] + mutate_bytes(rng, data[at : at + 512]) + data[at + 512 :]
    elif kind < 0.7:
        data = mutate_bytes(rng, data)
    elif kind < 0.8:
        data = rng.choice([gzip.compress, bz2.compress, lzma.compress])(rng.choice([data, bytes(5 * 10**8)]))
    elif kind < 0.9:  # one header, repeated
        header = bytearray(tarfile.TarInfo("x.png").tobuf())
        header[156:157] = rng.choice([b"x", b"g", b"L", b"K", b"S"])
        data = bytes(header) * rng.choice([1, 500])
    return data_command(rng, seeds, put(folder, "set.tar", data))


def cifar_archives(rng: random.Random, seeds: Seeds, folder: pathlib.Path) -> list[Any]:
    buffer = io.BytesIO()
    count = rng.choice([2, 10])
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]
        for name in names:
            pixels = np.random.default_rng(0).integers(0, 256, (count, 3072), dtype=np.uint8)
            body: Any = {b"data": pixels, b"labels": [i % 10 for i in range(count)], b"batch_label": b"x"}
            if name == "batches.meta":
                body = {b"label_names": [str(i).encode() for i in range(10)], b"num_cases_per_batch": count}
            data = pickle.dumps(body, protocol=2)
            if rng.random() < 0.3:
                data = hostile_pickle(rng) if rng.random() < 0.6 else mutate_bytes(rng, data)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return data_command(rng, seeds, put(folder, "cifar-10-python.tar.gz", buffer.getvalue()))


def token_caches(rng: random.Random, seeds: Seeds, folder: pathlib.Path) -> list[Any]:
    target = folder / "tokens"
    shutil.copytree(seeds.folder / "tokens", target)
    path = rng.choice(sorted(path for path in target.iterdir() if path.is_file()))
    data = path.read_bytes()
    path.write_bytes(
        dump_json(rng, json.loads(data)) if path.suffix == ".json" and rng.random() < 0.8 else mutate_bytes(rng, data)
    )
    again = [
        "encode",
        "--data-path",
        seeds.pictures,
        "--output",
        target,
        "--image-size",
        16,
        "--autoencoder",
        seeds.autoencoder,
    ]
    train = [*seeds.train, "--data-path", target, "--output", "out", "--max-steps", 1]
    return rng.choice([again, train, train, ["info", path]])


def run_folders(rng: random.Random, seeds: Seeds, folder: pathlib.Path) -> list[Any]:
    target = folder / "run"
    shutil.copytree(seeds.folder / "run", target)
    files = sorted(path for path in target.iterdir() if path.is_file() and path.suffix != ".png")
    for path in rng.sample(files, rng.choice([1, 1, 2])):
        data = path.read_bytes()
        kind = rng.random()
        if path.suffix == ".json" and kind < 0.8:
            data = dump_json(rng, json.loads(data))
        elif path.suffix == ".jsonl" and kind < 0.6:
            tail = rng.choice(
                [
                    b'{"step": 3, "lo',
                    bytes(100),
                    b'{"a":1}{"b":2}\n',
                    b"[" * 10**5 + b"\n",
                    b"\xff\xfe\n",
                    b'{"step": "x"}\n',
                ]
            )
            data += tail
        elif path.suffix == ".safetensors" and kind < 0.7:
            (size,) = struct.unpack("<Q", data[:8])
            text = json.dumps(mutate_json(rng, json.loads(data[8 : 8 + size]))).encode()
            data = struct.pack("<Q", len(text)) + text + data[8 + size :]
        elif path.suffix == ".safetensors" and kind < 0.9:
            resave(rng, path)
            continue
        else:
            data = mutate_bytes(rng, data)
        path.write_bytes(data)
    if rng.random() < 0.3:
        newest = max(target.glob("checkpoint-*.safetensors"))
        name = rng.choice(
            [
                "checkpoint-0000040 (copy).safetensors",
                "checkpoint-9999999.safetensors",
                "checkpoint-x.safetensors",
                "\udcff.safetensors",
            ]
        )
        shutil.copy(newest, target / name)
    train = [
        *seeds.train,
        "--data-path",
        seeds.folder / "tokens",
        "--output",
        target,
        "--save-every",
        2,
        "--max-steps",
        6,
    ]
    sample = ["sample", "--model", target, "--autoencoder", seeds.autoencoder, "--num-steps", 2, "--output", "out"]
    return rng.choice([train, train, ["info", target], sample])


def resave(rng: random.Random, path: pathlib.Path) -> None:
    """Writes other contents with right digests: tensors renamed, of other shapes or types, or another step."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = rng.choice(sorted(tensors))
    kind = rng.randrange(6)
    if kind == 0:
        tensors[name + "x"] = tensors.pop(name)
    elif kind == 1:
        tensors[name] = tensors[name].flatten()[: rng.choice([0, 1, 3])].clone()
    elif kind == 2:
        tensors[name] = tensors[name].to(rng.choice([torch.float64, torch.int64, torch.bfloat16, torch.uint8]))
    elif kind == 3:
        del tensors[name]
    else:
        for key in rng.sample(sorted(metadata), 1):
            if key not in ("format", "format_version", "kind", "config", "digest", "checksum"):
                metadata[key] = rng.choice(["-1", "x", "99999999", "", "1e9", "[]", "null"])
    own = {
        key: value for key, value in metadata.items() if key not in ("format", "format_version", "digest", "checksum")
    }
    kind = own.pop("kind")
    settings = json.loads(own.pop("config"))
    save_tensors(path, tensors, kind, settings, **own)


def jobs(rng: random.Random, seeds: Seeds, folder: pathlib.Path) -> list[Any]:
    """A sampling job that was interrupted: its parts and settings."""
    arguments = ["sample", "--model", seeds.weights, "--autoencoder", seeds.autoencoder, "--num-steps", 2]
    arguments += ["--num-images", 6, "--batch-size", 2, "--npz", "--output", folder / "job"]
    first = run_command([str(argument) for argument in arguments], folder, 60)
    if first.status != 0:
        return arguments
    (result,) = (folder / "job").glob("*.npz")
    parts = result.with_suffix(".job")
    parts.mkdir()
    settings = json.loads(result.with_suffix(".json").read_text())
    put(parts, "settings.json", dump_json(rng, settings) if rng.random() < 0.7 else json.dumps(settings).encode())
    buffer = io.BytesIO()
    np.savez(
        buffer,
        images=np.zeros(rng.choice([(2, 16, 16, 3), (1, 16, 16, 3), (2,)]), np.uint8),
        halved=np.zeros((), np.uint8),
    )
    put(
        parts,
        "000000.npz",
        rng.choice(
            [buffer.getvalue(), mutate_bytes(rng, buffer.getvalue()), rewrite_zip(rng, buffer.getvalue(), True)]
        ),
    )
    result.unlink()
    if rng.random() < 0.7:
        result.with_suffix(".json").unlink()
    else:
        put(result.parent, result.with_suffix(".json").name, dump_json(rng, settings))
    return arguments


def special_files(rng: random.Random, seeds: Seeds, folder: pathlib.Path) -> list[Any]:
    path = folder / "special"
    kind = rng.randrange(5)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path = pathlib.Path(rng.choice(["/dev/zero", "/dev/null", "/dev/random", "/proc/self/mem"]))
    elif kind == 2:
        path = folder / rng.choice(["\udcff\udcfe", "\x1b[31m", "x" * 300, "a\nb"])
    elif kind == 3:
        path.symlink_to(path)
    else:
        path.write_bytes(rng.choice([b"", b"\0", b"PK\x03\x04", b"\x93NUMPY", b"{}", b"\x80\x04."]))
    return rng.choice(
        [
            data_command(rng, seeds, path),
            weights_commands(rng, seeds, path, True),
            weights_commands(rng, seeds, path, False),
            [
                "sample",
                "--model",
                seeds.weights,
                "--autoencoder",
                seeds.autoencoder,
                "--num-steps",
                2,
                "--output",
                path,
            ],
        ]
    )


def parquet_files(rng: random.Random, seeds: Seeds, folder: pathlib.Path) -> list[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    target = folder / "parquet" / "data"
    target.mkdir(parents=True)
    rows = [{"bytes": image_bytes(rng), "path": "a\x1b.jpg"} for _ in range(4)]
    labels: Any = rng.choice([[0, 1, 2, 0], [0, -1, 5000, 2**40], ["a", "b", "c", "d"], [None] * 4])
    column: Any = rng.choice([rows, [row["bytes"] for row in rows], [None] * 4])
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": column, rng.choice(["label", "label", "other"]): labels}), buffer)
    data = buffer.getvalue()
    put(target, "train-00000-of-00001.parquet", mutate_bytes(rng, data) if rng.random() < 0.6 else data)
    return data_command(rng, seeds, folder / "parquet")


CLASSES: dict[str, Callable[[random.Random, Seeds, pathlib.Path], list[Any]]] = {
    "released weights (.pt)": released_weights,
    "weights (.safetensors)": our_weights,
    "arrays (.npz)": npz_of_images,
    "image folders": folders,
    "zips": zips,
    "tars": tars,
    "CIFAR-10 archives": cifar_archives,
    "parquet": parquet_files,
    "token caches": token_caches,
    "training runs": run_folders,
    "sampling jobs": jobs,
    "special files": special_files,
}


# ---------------------------------------------------------------- running


def run_command(arguments: list[str], folder: pathlib.Path, seconds: float = 6 * MAX_SECONDS) -> Outcome:
    """Runs a command in a forked process in `folder`."""
    log = folder / ".output"
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            os.setsid()
            os.chdir(folder)
            null, out = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o666)
            for descriptor, source in ((0, null), (1, out), (2, out)):
                os.dup2(source, descriptor)
            sys.stdout, sys.stderr = (
                os.fdopen(1, "w", buffering=1),
                os.fdopen(2, "w", buffering=1, errors="backslashreplace"),
            )
            torch.set_num_threads(1)
            main(arguments)
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(status)
    before = _resident(os.getpid())
    while True:
        done, state, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() - start > seconds or _resident(pid) > before + 3 * MAX_BYTES:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            _, state, usage = os.wait4(pid, 0)
            break
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):  # its workers
        os.killpg(pid, signal.SIGKILL)
    output = log.read_bytes().decode(errors="backslashreplace") if log.exists() else ""
    memory = max(0, usage.ru_maxrss * 1024 - before)
    elapsed, status = time.monotonic() - start, os.waitstatus_to_exitcode(state)
    busy = usage.ru_utime + usage.ru_stime
    if (folder / MARKER).exists() or (folder / "out" / MARKER).exists():
        kind = "executed"
    elif memory > MAX_BYTES:
        kind = "memory"
    elif elapsed > seconds or busy > MAX_SECONDS or (elapsed > MAX_SECONDS and busy < elapsed / 4):
        kind = "slow"
    elif status < 0:
        kind = "crash"
    elif "Traceback" in output or status not in (0, 2):
        kind = "traceback"
    elif status == 2 and sum(line.startswith("bitdance: ") for line in output.splitlines()) == 0:
        kind = "no sentence"
    elif "\x1b" in output or "\0" in output:
        kind = "escape"
    elif max(map(len, output.splitlines()), default=0) > 2000:
        kind = "long line"
    else:
        kind = "ok"
    return Outcome(kind, busy, memory, status, output)


def _resident(pid: int) -> int:
    try:
        return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def attack(
    names: list[str], numbers: range, seed: int, seeds: Seeds, keep: pathlib.Path | None = None
) -> Iterator[tuple[str, int, list[str], Outcome]]:
    """Yields (class, number, arguments, outcome) of each try."""
    for number in numbers:
        for name in names:
            folder = pathlib.Path(tempfile.mkdtemp(prefix="try-"))
            try:
                arguments = [
                    str(argument) for argument in CLASSES[name](random.Random(f"{seed} {name} {number}"), seeds, folder)
                ]
                outcome = run_command(arguments, folder)
                if keep is not None and outcome.kind != "ok":
                    target = keep / f"{name.split(' ')[0]}-{number}-{outcome.kind.replace(' ', '-')}"
                    shutil.rmtree(target, ignore_errors=True)
                    target.mkdir(parents=True)
                    (target / "report.txt").write_text(f"{arguments}\n{outcome}\n", errors="backslashreplace")
                yield name, number, arguments, outcome
            finally:
                shutil.rmtree(folder, ignore_errors=True)


def print_table(outcomes: dict[str, list[Outcome]]) -> None:
    kinds = sorted({outcome.kind for found in outcomes.values() for outcome in found} - {"ok"})
    print("| class | tries | in order | " + " | ".join([*kinds, "largest memory, MB", "longest, s"]) + " |")
    print("|" + "---|" * (5 + len(kinds)))
    for name, found in outcomes.items():
        counts = [sum(outcome.kind == kind for outcome in found) for kind in ["ok", *kinds]]
        largest = f"{max(outcome.memory for outcome in found) / 1e6:.0f}"
        longest = f"{max(outcome.seconds for outcome in found):.1f}"
        print(f"| {name} | {len(found)} | " + " | ".join([*map(str, counts), largest, longest]) + " |")


def run_attack() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first try of each class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--classes", nargs="*", default=list(CLASSES), help="beginnings of names of classes")
    parser.add_argument("--keep", type=pathlib.Path)
    options = parser.parse_args()
    names = [name for name in CLASSES if name.startswith(tuple(options.classes))]
    outcomes: dict[str, list[Outcome]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        seeds = Seeds(pathlib.Path(folder))
        numbers = range(options.first, options.first + -(-options.tries // len(names)))
        for name, number, arguments, outcome in attack(names, numbers, options.seed, seeds, options.keep):
            outcomes[name].append(outcome)
            if outcome.kind != "ok":
                end = ascii(outcome.output.strip()[-300:])
                print(f"{outcome.kind}: {name} {number}: {ascii(' '.join(arguments))[:300]}\n    {end}", flush=True)
    print_table(outcomes)
    raise SystemExit(any(outcome.kind != "ok" for found in outcomes.values() for outcome in found))


if __name__ == "__main__":
    run_attack()
