# ruff: noqa: E402 (the folders of the tests and of the package come first on the path)
"""Hostile files for every command: each try damages valid files in their inner structure and runs a command on them.

``python tests/fuzz.py --tries 2000 --seed 0 --results results.jsonl`` prints the tries that broke the promise of
docs/security.md and a table; ``--table results.jsonl ...`` prints the table of earlier runs together, ``--keep FOLDER``
keeps the files of broken tries. A try depends only on seed, class and number: ``--classes tars --first 17 --tries 1``.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gzip
import importlib
import io
import itertools
import json
import os
import pathlib
import pickle
import pickletools
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

sys.path[:0] = [str(folder) for folder in pathlib.Path(__file__).resolve().parents[:2]]
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from small import SIZES, pictures, save_pair

from bitdance.cli.main import COMMANDS, main
from bitdance.config import AutoencoderConfig, BitDanceConfig
from bitdance.metrics.features import FeatureExtractor
from bitdance.weights.network_config import empty_network
from bitdance.weights.safetensors_files import save_tensors

MAX_SECONDS, MAX_BYTES, MAX_FILE = 10.0, 10**9, 10**7
HUGE = 3 << 29  # bytes that a bomb expands to
MARKER = "executed"
NAMES = ["../../escaped", "/a", "a/b", "", ".", "..", "\x1b[31m", "a\nb", "\0", "\udcff", "\u202e", "x" * 70_000]
ODD = [None, True, -1, 0, 1, 7, 2**31, 2**63, 2**100, 1e308, -0.5, float("nan"), [], {}, [[1]], {"a": 1}, "7", *NAMES]

brightness = FeatureExtractor("brightness", 6, lambda x: torch.cat([x.float().mean((1, 2)), x.float().std((1, 2))], 1))
SHORT = "--num-steps 2 --batch-size 2 --autoencoder {autoencoder}"
SAMPLE = f"sample --model {{model}} {SHORT}"
TRAIN = "train --image-size 16 --batch-size 2 --epochs 2 --max-steps 1 --num-workers 1 --log-every 1 --dim 64 "
TRAIN += "--n-layer 1 --head-dim 64 --head-layers 1 --head-ada-ln 1 --cls-token-num 2 --autoencoder {autoencoder}"
TRAIN_AUTOENCODER = "train-autoencoder --image-size 16 --widths 32 32 32 --blocks 1 --bits 8 --batch-size 2 --epochs 2"
ENCODE = "encode --image-size 16 --num-workers 1 --autoencoder {autoencoder}"
FEATURES = f"--features {__file__}:brightness"
JOBS = {
    "train": f"{TRAIN} --max-steps 6 --data-path {{pictures}} --output job --save-every 2",
    "train-autoencoder": f"{TRAIN_AUTOENCODER} --max-steps 5 --data-path {{pictures}} --output job --save-every 2",
    "encode": f"{ENCODE} --data-path {{pictures}} --output job --shard-size 2",
    "sample": f"{SAMPLE} --num-images 6 --npz --save-bits --output job",
    "evaluate-samples": f"{SAMPLE} --num-images 6 --evaluate --reference {{images}} --cache job --output job "
    + FEATURES,
    "evaluate": f"evaluate {{images}} --reference {{pictures}} --save-features --cache job --output job/r {FEATURES}",
    "samples": f"{SAMPLE} --per-class 1 --output job",
    "convert": "convert {model} job/file.pt",
    "convert-autoencoder": "convert {autoencoder} job/file.pt",
}
"""Commands that write to the folder `job`; those that can be interrupted continue what is there."""


# ---------------------------------------------------------------- damage to bytes, JSON and pickles


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at, size = rng.randrange(len(changed) + 1), rng.choice([1, 1, 2, 4, 8, 64])
        number = struct.pack(rng.choice("<>") + "I", rng.choice([0, 2**31 - 1, 2**32 - 1, 10**9]))
        old, flipped = changed[at : at + size], bytes(byte ^ 1 << rng.randrange(8) for byte in changed[at : at + 1])
        changed[at : at + size] = rng.choice([rng.randbytes(size), bytes(size), b"\xff" * size, b"", old * 2, flipped])
        if rng.random() < 0.2:
            changed[at : at + 4] = number
    return bytes(changed[: rng.choice([None, None, None, None, rng.randrange(len(changed) + 1)])])


def mutate_json(rng: random.Random, value: Any) -> Any:
    """Returns the value with one field changed, removed or added, at any depth."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(ODD)
    value = value.copy()
    key, kind = rng.choice(list(value) if isinstance(value, dict) else range(len(value))), rng.random()
    if kind < 0.1:
        del value[key]
    elif kind < 0.2 and isinstance(value, dict):
        value[rng.choice(NAMES)] = rng.choice(ODD)
    else:
        value[key] = mutate_json(rng, value[key])
    return value


def dump_json(rng: random.Random, value: Any) -> bytes:
    """Returns mutated JSON as text; sometimes text that is no JSON, nested deeply, or with odd numbers."""
    text = json.dumps(mutate_json(rng, value)).encode()
    number = re.sub(rb"\d+", rng.choice([b"9" * 5000, b"1e999"]), text, count=1)
    deep = [b"[" * 200_000, b'{"a":' * 200_000, b"[" * 900 + b"]" * 900]
    return rng.choice([*[text] * 12, mutate_bytes(rng, text), number, *deep])


CALL = b"X\x0e\0\0\0touch executed\x85R"
FRAGMENTS = [
    b"cposix\nsystem\n" + CALL, b"X\5\0\0\0posixX\6\0\0\0system\x93" + CALL, b"ctorch\nload\n" + CALL, b"N",
    b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R", b"(X\x0e\0\0\0touch executediposix\nsystem\n", b"}Nb", b")R",
    b"})" + b"2\x86" * 60 + b"Ns",  # a key whose hash takes 2 ** 60 steps
    b"]q\xc8" + b"0](h\xc8h\xc8eq\xc8" * 40,  # a list of 2 ** 40 items when it is printed
    b"(K\1\x90", b"\x82\1", b"]" * 900 + b"a" * 899, b"]" * 100_000 + b"a" * 99_999, b"](" + b"]" * 100_000 + b"e",
    b"K\1" * 100_000, b"\x8b\x40\x42\x0f\0" + b"\x7f" * 10**6, b"I" + b"9" * 9000 + b"\n", b"I" + b"9" * 4000 + b"\n",
    b"Nr\xff\xff\xff\x7f", b"\x96" + bytes(5) + b"\1\0\0", b"\x8d" + bytes(7) + b"\x3f", b"G\x7f\xf8" + bytes(6),
    b"ccollections\nOrderedDict\n)R", b"cargparse\nNamespace\n)\x81}(X\1\0\0\0aNub", b"ctorch\nSize\n((K\1K\xfftR",
]  # fmt: skip
"""Opcodes that leave one object on the stack: code, bombs, odd values."""


def random_opcode(rng: random.Random) -> bytes:
    """Returns any opcode of any protocol with an argument of the right form."""
    op = rng.choice(pickletools.opcodes)
    size = op.arg.n if op.arg else 0
    argument = rng.randbytes(max(0, size))
    if size == pickletools.UP_TO_NEWLINE:
        argument = rng.choice([b"1\n", b"os\n", b"-99999999999\n", b"'a'\n", b"x" * 300 + b"\n"]) * 2
    elif size < 0:  # a length comes first, which may be a lie
        form, largest = {-2: ("<B", 255), -3: ("<i", 2**31 - 1), -4: ("<I", 2**32 - 1), -5: ("<Q", 2**62)}[size]
        argument = struct.pack(form, rng.choice([3, 3, 3, largest])) + b"abc"
    return op.code.encode("latin-1") + argument


def hostile_pickle(rng: random.Random, data: bytes) -> bytes:
    """Returns the pickle with opcodes replaced, repeated, added or removed; what follows the pickle stays."""
    if rng.random() < 0.2:
        return rng.choice([mutate_bytes(rng, data), b"\x80\2" + rng.choice(FRAGMENTS) + b"."])
    starts = [position for _, _, position in pickletools.genops(data)]
    ops = [data[start:end] for start, end in itertools.pairwise([*starts, starts[-1] + 1])]
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at, kind = rng.randrange(1, len(ops)), rng.randrange(6)
        code = ops[at][:1] or b"?"
        if kind < 3:
            ops[at] = [b"", ops[at] * 2, random_opcode(rng) + ops[at]][kind]
        elif code in b"KMJ\x8a":
            ops[at] = pickle.dumps(rng.choice([0, 1, -1, 3, 2**31 - 1, 2**40, 2**63, -(2**63), 10**30]), 2)[2:-1]
        elif code in b"XU\x8cTC" and kind < 5:
            name = rng.choice([*NAMES, "model", "args", "cuda:9", "meta", "big", "O8", "f8", "V9999"])
            text = b"T" + struct.pack("<i", len(name)) + name.encode("ascii", "replace")
            ops[at] = text if code in b"UTC" else pickle.dumps(name, 3)[2:-1]
        else:
            others = [b"ctorch\nIntStorage\n", b"ctorch._utils\n_rebuild_parameter\n", b"cnumpy\ndtype\n"]
            ops[at] = rng.choice(others if code == b"c" and kind < 5 else FRAGMENTS)
    return b"".join(ops) + data[starts[-1] + 1 :]


# ---------------------------------------------------------------- hostile archives, arrays and images

STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
METHODS = (STORED, DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


@functools.lru_cache(8)
def zeros(method: int, start: bytes = b"") -> bytes:
    """Compresses some bytes and HUGE zeros."""
    block = bytes(1 << 24)
    if method == DEFLATED:  # each block becomes the same bytes
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        first = packer.compress(start) + packer.flush(zlib.Z_FULL_FLUSH)
        return first + (packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)) * (HUGE >> 24) + b"\3\0"
    packer = zipfile._get_compressor(method)  # type: ignore[attr-defined]
    return b"".join(packer.compress(part) for part in [start, *[block] * (HUGE >> 24)]) + packer.flush()


def make_zip(files: dict[str, bytes], method: int = 0, only: str = "", bomb: bool = False, copies: int = 1) -> bytes:
    """Writes a zip. The member `only` alone is compressed; with `bomb`, HUGE zeros follow its first bytes."""
    out, directory, offset, count = [], [], 0, 0
    for name, body in files.items():
        how, encoded = method if name == only else STORED, os.fsencode(name)[:65_535]
        how = how or DEFLATED if bomb and name == only else how
        packer, size = zipfile._get_compressor(how), len(body)  # type: ignore[attr-defined]
        packed = packer.compress(body) + packer.flush() if packer else body
        if bomb and name == only:
            start = body[:128] if how == DEFLATED else b""  # the header of an array
            packed, size = zeros(how, start), len(start) + HUGE
        fields = [63, 0x800, how, 0, 0, zlib.crc32(body), len(packed), size, len(encoded), 0]
        for _ in range(copies if name == only else 1):
            directory += [struct.pack("<4s6H3I5H2I", b"PK\1\2", 63, *fields, 0, 0, 0, 0, offset), encoded]
            count += 1
        out += [struct.pack("<4s5H3I2H", b"PK\3\4", *fields), encoded, packed]
        offset += sum(map(len, out[-3:]))
    listed = b"".join(directory)
    return b"".join([*out, listed, struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(listed), offset, 0)])


HEADERS = {b"PK\3\4": (6, 8, 18, 22, 26, 28), b"PK\1\2": (8, 10, 20, 24, 28, 30, 42), b"PK\5\6": (8, 10, 12, 16)}
"""Marks of the headers of a zip, and where in them flags, methods, sizes, counts and offsets are."""


def hostile_zip(rng: random.Random, files: dict[str, bytes]) -> bytes:
    """Returns the files as a damaged zip: a bomb, odd names and methods, many entries for one member, lies."""
    name, kind = rng.choice(sorted(files)), rng.randrange(6)
    if kind == 0:
        files = files | {rng.choice(NAMES) + rng.choice(["", name, "\n", "/x.png", ".npy"]): files[name]}
    data = make_zip(files, rng.choice(METHODS), name, kind == 2, rng.choice([2, 60_000]) if kind == 1 else 1)
    if kind == 3:
        return mutate_bytes(rng, data)
    if kind == 4:
        mark = rng.choice(list(HEADERS))
        at = rng.choice([found.start() for found in re.finditer(mark, data)]) + rng.choice(HEADERS[mark])
        data = data[:at] + struct.pack("<H", rng.choice([0, 1, 5, 8, 9, 99, 32_768, 65_535])) + data[at + 2 :]
    return data


def npy(header: str, body: bytes = bytes(100)) -> bytes:
    """Returns a file of an array with any header, of 128 bytes if it is short."""
    header = header[:60_000].ljust(117) + "\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode() + body


SHAPES = [
    (10**6, 256, 256, 3), (2**40,), (2**62, 8), (20_000, 20_000), (-1, 16, 16, 3), (12, 16, 16, 3), (), (0, 3), (6,),
    (12,), (0, 16, 16, 3), (5, 16, 16, 4), (2, 0, 0, 3), (6, 6), (3, 50_000, 1, 3), (1,) * 60, (900, 900), (2, 6),
]  # fmt: skip
TYPES = ["|u1", "<f8", "<f4", "<i8", "|b1", ">f8", "<c8", "|O", "<U100000000", "|S0", "|V0", "M8[us]", "x" * 9000]


def hostile_array(rng: random.Random) -> bytes:
    """Returns a file of an array of an odd type or shape, or with a header that lies or is none."""
    shape, kind = rng.choice(SHAPES), rng.choice([*TYPES, [("a", "<i4", (10**6,))]])
    header = repr({"descr": kind, "fortran_order": rng.choice([False] * 9 + ODD), "shape": shape})
    size = 8 * int(np.prod(shape, dtype=float))
    body = rng.choice([b"\0", b"\xff", b"\x7f"]) * (size if 0 <= size < MAX_FILE else 100)
    return npy(rng.choice([header] * 9 + ["(" * 9000, "9" * 9000]), body[: size // rng.choice([1, 1, 2, 8])])


def hostile_npz(rng: random.Random, data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        files = {name: file.read(name) for name in file.namelist()}
    name, kind = rng.choice(sorted(files)), rng.random()
    if kind < 0.2:
        return hostile_zip(rng, files)
    if kind < 0.5 and "about.npy" in files:
        text = dump_json(rng, json.loads(np.load(io.BytesIO(files["about.npy"])).tobytes()))
        files["about.npy"] = npy(repr({"descr": "|u1", "fortran_order": False, "shape": (len(text),)}), text)
    else:
        files[rng.choice([name] * 4 + ["arr_1.npy", "x.npy"])] = hostile_array(rng)
    return make_zip(files, rng.choice(METHODS), name, bomb=rng.random() < 0.2)


@functools.cache
def png(width: int, height: int, depth: int, color: int) -> bytes:
    """Returns a black image, a bomb if it is large; without all of its data if those are more than 300 MB."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    row = 1 + -(-width * depth * {0: 1, 2: 3, 3: 1, 6: 4}[color] // 8)
    packer, rows = zlib.compressobj(), min(height, 3 * 10**8 // row)
    data = b"".join(packer.compress(bytes(row)) for _ in range(rows)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


SIDES = [(1, 50_000), (50_000, 1), (1, 10**6), (9_000, 9_000), (13_000, 13_000), (30_000, 30_000), (2**31 - 1, 1)]
PLAIN = b"P3 1200 1200 255 ,P2 1800 1800 255 ,P1 9000 9000 ,P6 20000 20000 255 ,P5 4 4 70000 ,Pf 9 9 1.0 ".split(b",")


def image_bytes(rng: random.Random) -> bytes:
    """Returns an image file: damaged, a bomb, of an odd form, or with a size in its header that is a lie."""
    kind, buffer = rng.randrange(6), io.BytesIO()
    if kind == 0:
        return png(*rng.choice(SIDES), *rng.choice([(8, 0), (16, 0), (8, 2), (1, 0), (16, 6), (8, 3)]))
    if kind == 1:
        return rng.choice(PLAIN) + b"7 " * rng.choice([9, 4 * 10**6])
    image = Image.new(rng.choice(["RGB", "L", "P", "RGBA", "I;16", "CMYK", "1", "LA", "F"]), (16, 16))
    form = rng.choice(["PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG"])
    try:
        image.save(buffer, form)
    except (OSError, ValueError):  # the format does not have this mode
        image.convert("RGB").save(buffer, form)
    data = buffer.getvalue()
    if kind == 2:  # wherever the format keeps its size
        for form in ("<HH", ">HH", "<II"):
            data = data.replace(struct.pack(form, 16, 16), struct.pack(form, *rng.choices([0, 1, 30_000, 65_535], k=2)))
    return mutate_bytes(rng, data[:200]) + data[200:] if kind > 3 else data


def with_checksum(header: bytes, kind: bytes = b"") -> bytes:
    block = bytearray(header[:512].ljust(512, b"\0"))
    block[156:157] = kind or block[156:157]
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def make_tar(files: dict[str, bytes], rng: random.Random | None = None) -> bytes:
    """Writes files as a tar. With `rng`, a damaged one: odd names and types, headers that lie with right checksums."""
    form = rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]) if rng else tarfile.GNU_FORMAT
    buffer, kind = io.BytesIO(), rng.random() if rng else 1.0
    with tarfile.open(fileobj=buffer, mode="w", format=form) as file:
        for name, body in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            if rng and rng.random() < 0.2:
                info.name = rng.choice([*NAMES, "x" * 9000, "a/" * 4000]) + rng.choice(["", name, "/a.png", ".tar"])
                info.type = rng.choice([b"0", b"0", b"0", b"0", b"1", b"2", b"3", b"6", b"5", b"S", b"?"])
                headers = [{}, {"size": "9" * 30}, {"path": "x" * 10**5}, {"GNU.sparse.map": "1," * 99}]
                info.pax_headers = rng.choice([*headers, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}])
            file.addfile(info, io.BytesIO(body) if info.isreg() else None)
    data = buffer.getvalue()
    if rng and kind < 0.5:
        at = 512 * rng.randrange(len(data) // 512)
        data = data[:at] + with_checksum(mutate_bytes(rng, data[at : at + 512])) + data[at + 512 :]
    elif rng and kind < 0.7:  # one header many times
        header = with_checksum(data, rng.choice([b"0", b"x", b"g", b"L", b"K", b"5"]))
        data = rng.choice([mutate_bytes(rng, data), header * 500 + bytes(1024), header * 19_000 + bytes(1024)])
    return data


def gzip_bomb(name: str) -> bytes:
    """Returns a gzipped tar whose only member, with this name, is a bomb."""
    info, head = tarfile.TarInfo(name), zlib.compressobj(9, zlib.DEFLATED, -15)
    info.size = HUGE
    start = head.compress(info.tobuf()) + head.flush(zlib.Z_FULL_FLUSH)
    return gzip.compress(b"")[:10] + start + zeros(DEFLATED) + bytes(8)


# ---------------------------------------------------------------- hostile weights and folders


def read_file(path: pathlib.Path) -> tuple[dict[str, str], dict[str, torch.Tensor], Any]:
    """Reads metadata, tensors and configuration of a safetensors file."""
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return metadata, tensors, json.loads(metadata["config"])


def forge(rng: random.Random, path: pathlib.Path) -> None:
    """Rewrites a safetensors file of ours with other tensors, configuration or metadata, and right checksums."""
    metadata, tensors, settings = read_file(path)
    name, kind = rng.choice(sorted(tensors)), rng.randrange(8)
    value = tensors.pop(name)
    types = [torch.float64, torch.int64, torch.bfloat16, torch.uint8, torch.bool, torch.complex64, torch.float8_e5m2]
    if kind < 6:
        name = rng.choice([name + "x", "x/y", *filter(str.isascii, NAMES)]) if kind == 3 else name
        shorter, filled = value.flatten()[: rng.choice([0, 1, 3])].clone(), torch.full_like(value, rng.choice([0, 99]))
        tensors[name] = {0: shorter, 1: filled, 2: value.to(rng.choice(types))}.get(kind, value)
    added = {"format", "format_version", "digest", "checksum", "config"}  # when the file is written
    own = {key: metadata[key] for key in sorted(metadata.keys() - added)}
    if kind == 5:
        texts = ["-1", "x", "99999999", "", "1e9", "training", "tokens", "model", "\x1b[31m", "9" * 5000]
        own[rng.choice(["step", "skipped", *own])] = rng.choice(texts)
    save_tensors(path, tensors, own.pop("kind"), mutate_json(rng, settings) if kind > 5 else settings, **own)


SIZES_OF_MODELS: list[dict[str, Any]] = [
    {"grid": 250}, {"grid": 100}, {"cls_token_num": 10_000}, {"num_classes": 30_000}, {"bits": 8192}, {"n_layer": 60},
    {"parallel_num": 40_000, "grid": 200}, {"head_layers": 60}, {"time_shift": 1e308}, {"time_shift": 1e-308},
    *({"class_names": (name, "b", "c")} for name in [*NAMES, "x" * 5_000_000]),
]  # fmt: skip
BLOCKS = {
    "n_layer": "layers.{}.w", "head_layers": "head.net.res_blocks.{}.w", "head_ada_ln": "head.net.ada_ln_blocks.{}.w",
    "blocks": "encoder.mid_block.{}.w", "widths": "encoder.down.{}.block.0.conv1.weight",
}  # fmt: skip


def extreme_network(rng: random.Random, path: pathlib.Path, is_model: bool) -> bool:
    """Writes a network of zeros with extreme sizes or names, or with many blocks that are empty.

    Returns whether it honestly takes long to compute, so that it should only be loaded.
    """
    levels, bits = rng.choice([(31, 8), (12, 8), (8, 8), (3, 8192)])
    size = rng.choice(SIZES_OF_MODELS) if is_model else {"widths": (32,) * levels, "blocks": 1, "bits": bits}
    config: Any = AutoencoderConfig()
    if is_model:
        config = BitDanceConfig(**{**SIZES, "grid": 4, "bits": 8, "num_classes": 3})
    vars(config).update(size)  # without the checks of a configuration
    shapes = {name: value.shape for name, value in empty_network(config).named_parameters()}
    settings = vars(config).copy()
    if rng.random() < 0.3:
        field, count = rng.choice(sorted(BLOCKS.keys() & settings)), rng.choice([1000, 30_000])
        shapes |= {BLOCKS[field].format(i): (32, 0, 1, 1) for i in range(count)}
        settings[field] = (32,) * count if field == "widths" else count
    part = "model" if is_model else "autoencoder"
    tensors = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}
    save_tensors(path, tensors, part, {part: settings})
    return bool(size.keys() & {"grid", "cls_token_num"}) or (not is_model and levels > 3)


def special(rng: random.Random, path: pathlib.Path) -> None:
    """Makes something other than an ordinary file at a path where nothing is, or leaves it so."""
    kind = rng.randrange(7)
    if kind < 3:
        path.symlink_to(["/dev/zero", path.name, "."][kind])
    elif kind < 6:
        [os.mkfifo, os.mkdir, pathlib.Path.touch][kind - 3](path)  # type: ignore[operator]


ADDED = "checkpoint-9999999.safetensors checkpoint-x.safetensors \udcff.safetensors 999999.npz .x.1.0123abcd.tmp"


def damage(rng: random.Random, root: pathlib.Path) -> None:
    """Damages one or two files of a folder in ways that fit their kinds, or adds others."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix not in (".png", ".log", ".lock"))
    for path in rng.sample(files, min(len(files), rng.choice([1, 1, 2]))):
        data, kind = path.read_bytes(), rng.random()
        if kind < 0.2:
            path.unlink()
            special(rng, path)
        elif kind > 0.9 or path.suffix not in (".json", ".jsonl", ".safetensors", ".npz"):
            path.write_bytes(mutate_bytes(rng, data))
        elif path.suffix == ".json":
            path.write_bytes(dump_json(rng, json.loads(data)))
        elif path.suffix == ".jsonl":
            line = dump_json(rng, json.loads(data.splitlines()[0])) + b"\n"
            path.write_bytes(data + rng.choice([b'{"step": 3, "lo', bytes(100), b'{"a":1}{"b":2}\n', *[line] * 5]))
        elif path.suffix == ".npz":
            path.write_bytes(hostile_npz(rng, data))
        else:
            forge(rng, path)
    if rng.random() < 0.25:
        added = root / rng.choice(ADDED.split())
        shutil.copy(files[0], added) if files[0].is_file() and rng.random() < 0.5 else special(rng, added)


# ---------------------------------------------------------------- the classes: files and commands that read them


class Seeds:
    """Valid files that the tries start from; results of jobs are made when they are first needed."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.base = folder, 0
        folder.mkdir(exist_ok=True)
        self.paths = {"model": save_pair(folder), "autoencoder": folder / "autoencoder.safetensors"}
        self.paths |= {"pictures": pictures(folder / "pictures", classes=3, each=2), "images": folder / "images.npz"}
        self.paths["statistics"] = folder / "statistics.npz"
        pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
        np.savez(self.paths["images"], pixels, np.arange(12) % 3)
        np.savez(self.paths["statistics"], mu=np.zeros(6), sigma=np.eye(6), mu_s=np.zeros(6), sigma_s=np.eye(6))
        self.files = {f"class-{i % 3}/{i}.png": path.read_bytes() for i, path in enumerate(folder.rglob("*.png"))}
        batch = {b"data": np.zeros((4, 3072), np.uint8), b"labels": [0, 1, 2, 3], b"filenames": [b"a.png"] * 4}
        self.cifar = {
            name: pickle.dumps(batch, 2) for name in ["test_batch", *(f"data_batch_{i}" for i in range(1, 6))]
        }
        self.cifar["batches.meta"] = pickle.dumps({b"label_names": [b"%d" % i for i in range(10)], b"num_vis": 3072}, 2)
        outcome = run_command(f"evaluate {{images}} --reference {{pictures}} {FEATURES}".format_map(self.paths), folder)
        self.base = outcome.memory

    def job(self, name: str, deaths: int = 0) -> pathlib.Path:
        """Returns the folder of a job that died at the renaming of its file number `deaths`; 0: that has ended."""
        folder = self.folder / f"{name}-{deaths}"
        if not folder.exists():
            folder.mkdir()
            outcome = run_command(JOBS[name].format_map(self.paths), folder, deaths=deaths)
            assert outcome.status == 0 or (deaths and outcome.status == DIED), outcome.output
        return folder / "job"


class Try(NamedTuple):
    """What a class of files is made from: valid files, random numbers, and an empty folder."""

    seeds: Seeds
    rng: random.Random
    folder: pathlib.Path

    def put(self, name: str, data: bytes) -> pathlib.Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[:MAX_FILE])
        return path

    def copy(self, source: pathlib.Path, name: str) -> pathlib.Path:
        return pathlib.Path((shutil.copytree if source.is_dir() else shutil.copy2)(source, self.folder / name))

    def read_weights(self, path: pathlib.Path, is_model: bool, only_load: bool = False) -> str:
        """A command that reads a file of weights, and computes with them unless `only_load`."""
        if self.rng.random() < 0.05:
            return f"evaluate {{images}} --reference none --inception-weights {path}"
        sample = f"sample --per-class 1 --output out {SHORT}"
        commands = [f"info {path}", f"convert {path} {self.rng.choice(['out.safetensors', 'out.pt'])}"]
        if only_load:
            return self.rng.choice(commands)
        if is_model:
            return self.rng.choice([*commands, f"{sample} --model {path}", f"{sample} --model {path}"])
        used = [
            f"{sample} --model {{model}}",
            *(f"{job} --data-path {{pictures}} --output out" for job in (ENCODE, TRAIN)),
        ]
        used.append("reconstruct --data-path {pictures}")
        return self.rng.choice([*commands, *(f"{command} --autoencoder {path}" for command in used)])

    def read_images(self, path: pathlib.Path) -> str:
        """A command that reads a set of images."""
        split = self.rng.choice(["", "--split test"]) if "cifar" in str(path) else ""
        writers = (f"{command} --output out" for command in (ENCODE, f"{ENCODE} --crops 2", TRAIN))
        reconstruct = f"reconstruct --autoencoder {{autoencoder}} --image-size 16 {split}"
        train = f"{TRAIN_AUTOENCODER} --output out --max-steps 1"
        commands = [*writers, train, reconstruct, f"nearest {self.seeds.job('samples')}"]
        ways = [f"{path} --image-size 16 {split} --reference {{images}}", f"{{images}} --reference {path}"]
        evaluate = f"evaluate {self.rng.choice(ways)} {FEATURES}"
        return self.rng.choice([*(f"{command} --data-path {path}" for command in commands), evaluate])

    def damaged(self, jobs: str, *commands: str) -> str:
        """The damaged folder of a job that has died or ended, and a command that reads or continues it."""
        name = self.rng.choice(jobs.split())
        deaths = self.rng.choice([0] * (15 if commands else 2) + [2, 3, 4, 6])
        path = self.copy(self.seeds.job(name, deaths), "work/job")
        damage(self.rng, path)
        return self.rng.choice(commands or [JOBS[name]])


def released_weights(t: Try) -> str:
    is_model, kind = t.rng.random() < 0.6, t.rng.random()
    path = t.copy(t.seeds.job("convert" if is_model else "convert-autoencoder") / "file.pt", "file.pt")
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    if kind < 0.25:  # the form without a zip: magic number, version, system, weights, names of the storages, bytes
        torch.save(torch.load(path, weights_only=False), path, _use_new_zipfile_serialization=False)
        rest, data = path.read_bytes(), b""
        for _ in range(5):
            size = 1 + max(position for _, _, position in pickletools.genops(rest))
            data += hostile_pickle(t.rng, rest[:size]) if t.rng.random() < 0.3 else rest[:size]
            rest = rest[size:]
        path.write_bytes(data + rest)
    elif kind < 0.7:
        name = next(name for name in members if name.endswith("data.pkl"))
        path.write_bytes(make_zip({**members, name: hostile_pickle(t.rng, members[name])}))
    elif kind < 0.9:
        path.write_bytes(hostile_zip(t.rng, members))
    else:
        is_costly = extreme_network(t.rng, t.folder / "extreme", is_model)
        _, tensors, settings = read_file(t.folder / "extreme")
        names = list(settings.get("model", {}).get("class_names", ()))
        torch.save({"ema" if is_model else "state_dict": tensors, "args": {"class_names": names}}, path)
        return t.read_weights(path, is_model, is_costly)
    return t.read_weights(path, is_model)


def our_weights(t: Try) -> str:
    is_model, kind = t.rng.random() < 0.6, t.rng.random()
    path = t.copy(t.seeds.paths["model" if is_model else "autoencoder"], "file.safetensors")
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    if kind < 0.2:
        text = dump_json(t.rng, json.loads(data[8:end]))
        text = struct.pack("<Q", t.rng.choice([len(text)] * 5 + [2**40, 2**63])) + text + data[end:]
        path.write_bytes(t.rng.choice([text, mutate_bytes(t.rng, data)]))
    elif kind < 0.5:
        return t.read_weights(path, is_model, extreme_network(t.rng, path, is_model))
    else:
        forge(t.rng, path)
    return t.read_weights(path, is_model)


def arrays(t: Try) -> str:
    features = next(path for path in t.seeds.job("evaluate").glob("*.npz") if "about" in np.load(path))
    source = t.rng.choice([t.seeds.paths["images"], t.seeds.paths["statistics"], features])
    path = t.put("file.npz", hostile_npz(t.rng, source.read_bytes()))
    uses = [f"{{images}} --reference {path}", f"{path} --reference {{images}}", f"{path} --make-reference"]
    return f"evaluate {t.rng.choice(uses if len(np.load(source)) != 4 else uses[:1])} {FEATURES}"


def image_folders(t: Try) -> str:
    if t.rng.random() < 0.3:  # flat, of `bitdance sample`
        path = t.copy(t.seeds.job("samples"), "set") / t.rng.choice(["samples.json", "labels.json"])
        if path.name == "samples.json":
            path.write_bytes(dump_json(t.rng, json.loads(path.read_text())))
            return f"nearest {path.parent} --data-path {{pictures}}"
        path.write_bytes(dump_json(t.rng, [0, 1, 2]))
        return f"evaluate {path.parent} --reference none {FEATURES}"
    target = t.copy(t.seeds.paths["pictures"], "set")
    for _ in range(t.rng.choice([1, 3])):
        place = target / t.rng.choice(["class-0", "class-1", "\udcff\udcfe", "a\nb\x1b", "."])
        path = place / t.rng.choice(
            ["a.png", "b.jpg", "\udcff\udcfe.png", "\x1b[31m.jpeg", "c.webp", "d.txt", "\n.png"]
        )
        place.mkdir(exist_ok=True)
        if os.path.lexists(path):
            continue
        if t.rng.random() < 0.8:
            path.write_bytes(image_bytes(t.rng))
        else:
            special(t.rng, path)
    return t.read_images(target)


def with_images(t: Try) -> dict[str, bytes]:
    """Valid files of a set of images, with none to two hostile images among them."""
    names = ["class-0/x.png", "x.png", "class-1/\x1b.png", "class-2/y.webp"]
    return t.seeds.files | {t.rng.choice(names): image_bytes(t.rng) for _ in range(t.rng.choice([0, 1, 2]))}


def tars(t: Try) -> str:
    kind, files = t.rng.random(), with_images(t)
    if kind < 0.2:  # a hostile index beside a valid tar
        path = t.put("set.tar", make_tar(t.seeds.files))
        run_command(f"nearest {t.seeds.job('samples')} --data-path {path}", t.folder)
        forge(t.rng, t.folder / "set.tar.index.safetensors")
        return t.read_images(path)
    if kind < 0.35:  # a tar for each class, as ImageNet's
        inside = {"a.png": files["class-0/0.png"], "b.png": image_bytes(t.rng)}
        files = {f"{name}.tar": make_tar(inside, t.rng) for name in ("n01440764", "b")}
    return t.read_images(t.put("set.tar", make_tar(files, t.rng)))


def cifar_archives(t: Try) -> str:
    rng, files, is_pickled = t.rng, dict(t.seeds.cifar), t.rng.random() < 0.7
    if not is_pickled:
        files = {f"{name}.bin": (b"\1" + bytes(3072)) * 3 for name in files} | {"batches.meta.txt": b"a\nb\nc\n"}
    name = rng.choice([*files, *(name for name in files if "meta" in name)])
    large = b"\x80\2}U\4dataB" + struct.pack("<I", 240 << 20) + bytes(240 << 20) + b"s."
    others = [rng.choice([large, mutate_bytes(rng, files[name]), b"a\n" * 10**6])]
    files[name] = rng.choice([*others, *[hostile_pickle(rng, files[name])] * 8] if is_pickled else others)
    files = {f"cifar-10-batches-py/{key}": body for key, body in files.items()}
    if rng.random() < 0.2:
        for key, body in files.items():
            t.put(key, body)
        if rng.random() < 0.3:
            damage(rng, t.folder / "cifar-10-batches-py")
        return t.read_images(t.folder / "cifar-10-batches-py")
    tar = make_tar(files)
    packed = gzip.compress(tar, 1)
    odd = [gzip_bomb(rng.choice(list(files))), tar, mutate_bytes(rng, packed), gzip.compress(make_tar(files, rng), 1)]
    return t.read_images(t.put("cifar-10-python.tar.gz", rng.choice([*[packed] * 6, *odd])))


def parquet_files(t: Try) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng, kind, count = t.rng, t.rng.randrange(5), 8
    rows: Any = [{"bytes": rng.choice([*t.seeds.files.values(), image_bytes(rng)])} for _ in range(count)]
    labels: Any = pa.array([0, 1, 2, 0] * 2)
    if kind == 0:
        values = [[0, -1, 5000, 2**40] * 2, ["a"] * 8, [2**20 - 1] * 8, [[1]] * 8, [1.5] * 8, [None] * 8]
        labels = rng.choice(
            [*map(pa.array, values), pa.array([2**64 - 1] * 8, pa.uint64()), labels.dictionary_encode()]
        )
    elif kind == 1:
        rows = [rng.choice([b"x", None, {"bytes": "x"}, {"bytes": None}, {"bytes": [1]}, [{"bytes": b"x"}]])] * count
    elif kind == 2:  # one value that many rows refer to
        value = pa.DictionaryArray.from_arrays(pa.array([0] * 16, pa.int32()), pa.array([bytes(10**8)]))
        rows, labels = pa.StructArray.from_arrays([value], ["bytes"]), pa.array([0, 1] * 8)
    elif kind == 3:  # many rows in a few bytes
        count = 5 * 10**7
        rows, labels = pa.nulls(count, pa.struct({"bytes": pa.binary()})), pa.nulls(count, pa.int64()).fill_null(1)
    table = pa.table({rng.choice(["image"] * 5 + NAMES[:2]): rows, rng.choice(["label"] * 5 + ["image"]): labels})
    names = dump_json(rng, {"info": {"features": {"label": {"names": ["a", "b", "c"]}}}})
    buffer, codec = io.BytesIO(), rng.choice(["snappy", "zstd", "gzip", "none"])
    table, size = table.replace_schema_metadata({b"huggingface": names}), 3 if kind > 3 else 10**8
    pq.write_table(table, buffer, compression=codec, store_schema=kind != 2, row_group_size=size)
    data = buffer.getvalue()
    return t.read_images(t.put("set/train.parquet", mutate_bytes(rng, data) if kind == 4 else data).parent)


STARTS = [b"", b"\0", b"PK\3\4", b"PK\5\6" + bytes(18), b"\x93NUMPY", b"\x80\4.", b"PAR1", b"\x1f\x8b", bytes(8) + b"{"]
DEVICES = ["/dev/zero", "/dev/null", "/dev/random", "/dev/full", "/dev/fd", "/proc/self/mem"]
ODD_FILES = ["\udcff\udcfe", "\x1b[31m", "x" * 300, "a\nb", "`model`=x", "*.parquet", "[a-.npz"]
READ_FIRST = ["settings.json", "samples.json", "token_cache.json", "batches.meta", "x.parquet", "model.safetensors"]


def special_files(t: Try) -> str:
    rng, kind, path = t.rng, t.rng.randrange(5), t.folder / "special"
    if kind == 0:
        special(rng, path)
    elif kind == 1:
        path = pathlib.Path(rng.choice(DEVICES))
    elif kind == 2:
        path = t.folder / rng.choice(ODD_FILES)
        with contextlib.suppress(OSError):
            path.write_bytes(b"x")
    elif kind == 3:
        path.mkdir()
        special(rng, path / rng.choice(READ_FIRST))
    else:
        name = "special" + rng.choice(["", ".npz", ".pt", ".zip", ".tar"])
        path = t.put(name, rng.choice(STARTS) + rng.randbytes(rng.choice([0, 5000])))
    writers = [*(f"{job} --data-path {{pictures}}" for job in (ENCODE, TRAIN)), JOBS["sample"], JOBS["samples"]]
    commands = [f"{command.replace(' --output job', '')} --output {path}" for command in writers]
    readers = f"info {path},nearest {path} --data-path {{pictures}},evaluate {path} --reference none {FEATURES}"
    commands += [*readers.split(","), t.read_images(path), t.read_images(path)]
    return rng.choice([*commands, t.read_weights(path, True), t.read_weights(path, False)])


CLASSES: dict[str, Callable[[Try], str]] = {
    "released weights (.pt)": released_weights,
    "weights (.safetensors)": our_weights,
    "arrays (.npz)": arrays,
    "image folders": image_folders,
    "zips": lambda t: t.read_images(t.put("set.zip", hostile_zip(t.rng, with_images(t)))),
    "tars": tars,
    "CIFAR-10 archives": cifar_archives,
    "parquet": parquet_files,
    "token caches": lambda t: t.damaged("encode", f"{TRAIN} --data-path job --output out"),
    "training runs": lambda t: t.damaged(
        "train train-autoencoder", "info job", "info job --json", "convert job out.pt", f"sample --model job {SHORT}"
    ),
    "continued training": lambda t: t.damaged("train train-autoencoder"),
    "continued encoding": lambda t: t.damaged("encode"),
    "continued sampling": lambda t: t.damaged("sample evaluate-samples evaluate"),
    "special files": special_files,
}


# ---------------------------------------------------------------- running


DIED = 99  # exit status


class Outcome(NamedTuple):
    """What a try did. `kind` is `ok` or how the promise was broken; bytes are those above an honest command's."""

    kind: str
    seconds: float
    memory: int
    status: int
    output: str


def run_command(command: str, folder: pathlib.Path, deaths: int = 0, base: int = 0) -> Outcome:
    """Runs a command in a forked process in `folder`; it dies at its renaming of a file number `deaths`.

    The seconds are of CPU time, since the machine may be shared; the memory is that above `base` and this process's.
    """
    logs, old, stalled = [folder / ".out", folder / ".err"], _leftovers(folder), False
    base, start, progress = base + _usage("self")[2], time.monotonic(), (0.0, time.monotonic())
    pid = os.fork()
    if pid == 0:
        _child(command, folder, logs, deaths)
    while not (ended := os.wait4(pid, os.WNOHANG))[0]:
        (busy, memory, _), now = _usage(str(pid)), time.monotonic()
        progress = (busy, now) if busy > progress[0] + 0.05 else progress
        stalled = now - progress[1] > 20 or now - start > 120
        if stalled or busy > 1.2 * MAX_SECONDS or memory > base + 3 * MAX_BYTES:
            os.kill(pid, signal.SIGKILL)
            ended = os.wait4(pid, 0)
            break
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):  # its workers
        os.killpg(pid, signal.SIGKILL)
    out, err = (log.read_bytes().decode(errors="backslashreplace") if log.exists() else "" for log in logs)
    status, seconds = os.waitstatus_to_exitcode(ended[1]), ended[2].ru_utime + ended[2].ru_stime
    memory, lines = max(0, ended[2].ru_maxrss * 1024 - base), err.splitlines()
    broken = {
        "executed": any(folder.parent.rglob(MARKER)),
        "escaped": any(folder.parent.glob("escaped*")),
        "hang": stalled or seconds > MAX_SECONDS,
        "memory": memory > MAX_BYTES,
        "crash": status < 0,
        "traceback": "Traceback" in err or status not in (0, 2, DIED),
        "no sentence": status == 2 and not (lines and lines[-1].startswith("bitdance: ")),
        "other lines": status == 2 and any(not line.startswith("bitdance: ") for line in lines),
        "control characters": re.search(r"[^\n\t -~\xa0-\U0010ffff]|[\u202a-\u202e]", out + err) is not None,
        "long line": max(map(len, (*lines, *out.splitlines())), default=0) > 2000,
        "leftovers": status in (0, 2) and bool(_leftovers(folder) - old),
    }
    kind = next((kind for kind, found in broken.items() if found), "ok")
    return Outcome(kind, seconds, memory, status, f"{out}\n{err}")


def _child(command: str, folder: pathlib.Path, logs: list[pathlib.Path], deaths: int) -> None:
    status, replace, calls = 70, os.replace, itertools.count(1)

    def dying(*paths: Any, **options: Any) -> None:
        if next(calls) == deaths:
            os._exit(DIED)
        replace(*paths, **options)

    try:
        os.setsid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # when the parent process dies
        os.chdir(folder)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        for number, path in enumerate([pathlib.Path(os.devnull), *logs]):
            os.dup2(os.open(path, os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o666), number)
        sys.stdout = open(1, "w", buffering=1, encoding="utf-8")  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        torch.set_num_threads(1)
        os.replace = dying
        main([word for word in command.split(" ") if word])
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as the interpreter does
        os._exit(status)


def _leftovers(folder: pathlib.Path) -> set[str]:
    """Returns the temporary files and locks in and beside a folder."""
    return {str(path) for path in folder.parent.rglob("*") if re.search(r"\.tmp\w*$|\.lock$", path.name)}


def _usage(pid: str) -> tuple[float, int, int]:
    """Returns the seconds of CPU time of a process, its resident bytes, and those that are not of files."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    _, resident, shared, *_ = map(int, pathlib.Path(f"/proc/{pid}/statm").read_text().split())
    page = os.sysconf("SC_PAGE_SIZE")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), resident * page, (resident - shared) * page


PRELOADED = [f"bitdance.cli.{command.replace('-', '_')}" for command in COMMANDS]
PRELOADED += ["bitdance.training.setup", "bitdance.sampling.job", "bitdance.metrics.report", "torch._dynamo"]
"""Modules that are imported once for all tries."""


def attack(names: list[str], numbers: range, seed: int, keep: pathlib.Path | None = None) -> Iterator[dict[str, Any]]:
    """Yields the class, seed, number, command and outcome of each try."""
    for module in PRELOADED:
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as place:
        seeds = Seeds(pathlib.Path(place) / "seeds")
        for number, name in itertools.product(numbers, names):
            folder = pathlib.Path(place) / f"try-{number}-{list(CLASSES).index(name)}"
            (folder / "work").mkdir(parents=True)
            made = CLASSES[name](Try(seeds, random.Random(f"{seed} {name} {number}"), folder))
            command = made.format_map(seeds.paths)
            outcome = run_command(command, folder / "work", base=seeds.base)
            yield {"class": name, "seed": seed, "number": number, "command": command, **outcome._asdict()}
            if keep and outcome.kind != "ok":
                keep.mkdir(parents=True, exist_ok=True)
                subprocess.run(["cp", "-rP", folder, keep / f"{seed}-{folder.name}-{outcome.kind}"], check=False)
            shutil.rmtree(folder, ignore_errors=True)


OTHERS = ("no sentence", "other lines", "control characters", "long line", "leftovers")
COLUMNS = {
    "executed": ("executed", "escaped"), "tracebacks": ("traceback",), "hangs": ("hang",), "crashes": ("crash",),
    "over 1 GB": ("memory",), "other faults": OTHERS,
}  # fmt: skip


def print_table(results: list[dict[str, Any]]) -> None:
    """Prints the table of docs/security.md."""
    print(f"| class | tries | {' | '.join(COLUMNS)} | largest memory, MB | longest, s of CPU |\n|" + "---|" * 10)
    for name in [*dict.fromkeys(result["class"] for result in results), "all"]:
        chosen = [result for result in results if name in ("all", result["class"])]
        counts = [sum(result["kind"] in kinds for result in chosen) for kinds in COLUMNS.values()]
        memory, seconds = max(result["memory"] for result in chosen) / 1e6, max(result["seconds"] for result in chosen)
        print(f"| {name} | {len(chosen)} | {' | '.join(map(str, counts))} | {memory:.0f} | {seconds:.1f} |")


def run_attack() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=1400, help="number of tries, divided among the classes")
    parser.add_argument("--first", type=int, default=0, help="number of the first try of each class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--classes", nargs="*", default=[""], help="beginnings of names of classes")
    parser.add_argument("--keep", type=pathlib.Path, help="folder for the files of tries that broke the promise")
    parser.add_argument("--results", type=pathlib.Path, help="file to add the outcomes to, as JSON lines")
    parser.add_argument("--table", type=pathlib.Path, nargs="*", help="only print the table of these files of results")
    options = parser.parse_args()
    results = [json.loads(line) for path in options.table or () for line in path.read_text().splitlines()]
    names = [name for name in CLASSES if name.startswith(tuple(options.classes))]
    numbers = range(options.first, options.first + -(-options.tries // len(names)))
    for result in () if options.table else attack(names, numbers, options.seed, options.keep):
        results.append({**result, "output": result["output"][-2000:]})
        if result["kind"] != "ok":
            print(*(ascii(result[key])[-400:] for key in ("kind", "class", "number", "command", "output")), flush=True)
        if options.results:
            with open(options.results, "a") as file:
                file.write(json.dumps(results[-1]) + "\n")
    print_table(results)
    raise SystemExit(any(result["kind"] != "ok" for result in results))


if __name__ == "__main__":
    run_attack()
