"""Decoding images, class folders and zips of them, CIFAR-10, and ADM's crops."""

from __future__ import annotations

import concurrent.futures
import gzip
import io
import multiprocessing
import os
import pathlib
import pickle
import struct
import tarfile
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import small
import torch
from PIL import Image

from bitdance.data import crops, decoding
from bitdance.data.decoding import decode_image
from bitdance.data.folders import ZipImages
from bitdance.data.image_dataset import ImageDataset, evenly_spaced
from bitdance.data.images import open_images
from bitdance.runtime.errors import UserError

# In the order that must come out: "dog" before "dog-2" although "dog-2/" < "dog/".
NAMES = ["cat/0000.png", "cat/0001.PNG", "dog/0000.png", "dog/0001.png", "dog-2/0000.png"]
LABELS = [0, 0, 1, 1, 2]
IGNORED = ["cat/notes.txt", "cat/.hidden.png", ".git/x.png", "__MACOSX/cat/._0000.png", "README.md"]


def picture(seed: int, size: tuple[int, int] = (6, 5)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format)
    return buffer.getvalue()


FILES = {name: encoded(picture(seed)) for seed, name in enumerate(NAMES)}


def write(path: pathlib.Path, data: bytes) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_folder(path: pathlib.Path, files: dict[str, bytes] = FILES) -> pathlib.Path:
    for name, data in files.items():
        write(path / name, data)
    return path


def write_zip(path: pathlib.Path, files: dict[str, bytes] = FILES) -> pathlib.Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in reversed(files.items()):
            archive.writestr(name, data)
    return path


def tar(files: dict[str, bytes], file_format: int = tarfile.GNU_FORMAT, mode: Any = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=file_format) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            if name.endswith("/"):
                member.type = tarfile.DIRTYPE
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def fails(path: pathlib.Path, *words: str, split: Any = "train") -> None:
    """Opening the path must fail with one line that holds the path and the words."""
    with pytest.raises(UserError) as caught:
        open_images(path, split)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in (str(path), *words)), message


def mutations(good: bytes, count: int, flips: int, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Copies of a file with some random bytes between `start` and `stop`."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        data = np.frombuffer(good, np.uint8).copy()
        data[rng.integers(start, min(stop or len(data), len(data)), flips)] = rng.integers(0, 256, flips)
        yield data.tobytes()


def pixels(found: ImageDataset) -> list[bytes]:
    return [found.read(index).tobytes() for index in range(len(found))]


def is_refused(path: pathlib.Path, split: Any = "train") -> bool:
    """Whether a path or an image in it is refused; anything but a `UserError` fails the test."""
    try:
        found = open_images(path, split)
        _ = [found.name(index) for index in range(len(found))], pixels(found)
    except UserError:
        return True
    return False


# ------------------------------------------------------------ folders and zips


@pytest.mark.parametrize("route", ["folder", "pictures.zip", "no-extension", "wrapped.zip", "pictures.tar", "wrapped"])
def test_every_route_gives_the_same_images(tmp_path: pathlib.Path, route: str) -> None:
    prefix = "train/" if "wrapped" in route else ""
    others = {name if "__" in name else prefix + name: b"not an image" for name in IGNORED}
    files = {**others, **{prefix + name: data for name, data in FILES.items()}}
    if route == "folder":
        path = write_folder(tmp_path / route, files)
    elif route in ("pictures.tar", "wrapped"):
        path = write(tmp_path / route, tar({f"./{name}": data for name, data in {"": b"", **files}.items()}))
    else:
        path = write_zip(tmp_path / route, {f"{prefix}cat/": b"", **files})
    opened = open_images(str(path))
    for found in (opened, pickle.loads(pickle.dumps(opened)), open_images(path)):  # a tar, the third time by its index
        assert found.path == path and found.classes == ("cat", "dog", "dog-2")
        assert found.labels.dtype == np.int64 and found.labels.tolist() == LABELS
        assert [found.name(index) for index in range(len(found))] == NAMES
        for index in range(len(found)):
            image = found.read(index)
            assert image.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(image), picture(index))
        with pytest.raises(IndexError):
            found.read(len(NAMES))


def test_one_class_in_a_zip_is_no_common_folder(tmp_path: pathlib.Path) -> None:
    found = open_images(write_zip(tmp_path / "one.zip", {"cat/a.png": b"", "cat/b.png": b""}))
    assert found.classes == ("cat",) and [found.name(0), found.name(1)] == ["cat/a.png", "cat/b.png"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_reopens_the_zip_under_a_held_lock(tmp_path: pathlib.Path) -> None:
    found = open_images(write_zip(tmp_path / "a.zip"))
    assert isinstance(found, ZipImages)
    mine, lock = found._open()
    with lock:  # as if another thread were reading at the moment of the fork
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=lambda: queue.put((found._open()[0] is mine, found.read(3).tobytes())))
        child.start()
        shared, data = queue.get(timeout=120)
        child.join(30)
    assert not shared and data == picture(3).tobytes()


def test_errors_of_folders(tmp_path: pathlib.Path) -> None:
    fails(tmp_path / "nowhere", "no such file or folder")
    fails(tmp_path, "no images", "<class>/<image>.jpg")
    write(tmp_path / "a.png", FILES[NAMES[0]])
    write_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    fails(tmp_path, "'empty'", "holds no images")
    (tmp_path / "empty").rmdir()
    fails(tmp_path, "no split 'test'", split="test")
    with pytest.raises(UserError, match="must be 'train' or 'test'"):
        open_images(tmp_path, split="val")  # type: ignore[arg-type]


def test_errors_of_zips(tmp_path: pathlib.Path) -> None:
    path = write_zip(tmp_path / "x.zip")
    fails(path, "no split", split="test")
    good = path.read_bytes()
    for data, words in (
        (b"<html>Not found</html>" * 100, "not a zip"),
        (b"", "not a zip"),
        (good[: len(good) // 2], "truncated"),
        (good[:-30], "truncated"),
    ):
        fails(write(path, data), words)
    fails(write_zip(path, {}), "no images")
    assert sum(is_refused(write(path, data)) for data in mutations(good, 150, 8)) > 100


@pytest.mark.parametrize("kind", ["text", "truncated", "empty", "bomb", "float", "large"])
@pytest.mark.parametrize("archive", [False, True])
def test_unreadable_image_is_named(
    tmp_path: pathlib.Path, kind: str, archive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {
        "text": b"<html></html>",
        "truncated": encoded(picture(0, (64, 64)), file_format="JPEG")[:1500],
        "empty": b"",
        "bomb": encoded(np.zeros((100, 100, 3), np.uint8)),
        "float": encoded(np.zeros((4, 4), np.float32), file_format="TIFF"),
        "large": bytes(2000),
    }[kind]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4500)
    for module in ("decoding", "folders"):
        monkeypatch.setattr(f"bitdance.data.{module}.MAX_FILE_BYTES", 1900)
    files = {"train/cat/bad.jpg" if archive else "cat/bad.jpg": data}
    path = write_zip(tmp_path / "x.zip", files) if archive else write_folder(tmp_path / "x", files)
    found = open_images(path)
    words = {"bomb": "too many pixels", "large": "more than 1900 bytes"}.get(kind, "cannot read the image")
    with pytest.raises(UserError, match=words) as caught:
        found.read(0)
    assert "cat/bad.jpg" in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("how", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED])
def test_zips_that_expand_to_gigabytes_are_not_expanded(tmp_path: pathlib.Path, how: int) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", how) as archive, archive.open("cat/0.png", "w") as file:
        for _ in range(3 << 8 if how == zipfile.ZIP_DEFLATED else 1):
            file.write(bytes(1 << 20))
    fails(tmp_path / "x.zip", "make it again")


@pytest.mark.parametrize(
    ("kind", "words"), [("narrow", "1 x 5000 pixels"), ("scans", "too many scans"), ("large", "too many pixels")]
)
def test_small_files_that_cost_gigabytes_are_refused(tmp_path: pathlib.Path, kind: str, words: str) -> None:
    jpeg = encoded(picture(0), "JPEG")
    data = {
        "narrow": lambda: encoded(np.zeros((5000, 1, 3), np.uint8)),
        "scans": lambda: jpeg[:-2] + jpeg[jpeg.index(b"\xff\xda") : -2] * 200 + jpeg[-2:],
        "large": lambda: encoded(np.zeros((8001, 8000), np.uint8)),
    }[kind]()
    with pytest.raises(UserError, match=words):
        decode_image(data, "x")


def test_grey_of_16_bits_needs_little_memory() -> None:
    data = encoded(np.zeros((2000, 2000), np.uint16))
    tracemalloc.start()
    decode_image(data, "x")
    assert tracemalloc.get_traced_memory()[1] < 8 * 2000**2
    tracemalloc.stop()


def test_files_that_vanish_are_named(tmp_path: pathlib.Path) -> None:
    folder = open_images(write_folder(tmp_path / "folder"))
    archive = pickle.loads(pickle.dumps(open_images(write_zip(tmp_path / "a.zip"))))
    (tmp_path / "folder" / NAMES[0]).unlink()
    (tmp_path / "a.zip").unlink()
    for found in (folder, archive):
        with pytest.raises(UserError, match=NAMES[0]):
            found.read(0)


def test_evenly_spaced() -> None:
    assert evenly_spaced(10, 3).tolist() == [0, 4, 9] and evenly_spaced(10, 3).dtype == np.int64
    assert evenly_spaced(3, None).tolist() == evenly_spaced(3, 7).tolist() == [0, 1, 2]


# ------------------------------------------------------------ decoding


@pytest.mark.parametrize(
    "kind", ["grey", "palette", "transparent", "alpha", "cmyk", "one-bit", "deep-grey", "deep-tiff"]
)
def test_every_mode_becomes_rgb(tmp_path: pathlib.Path, kind: str) -> None:
    rgb = picture(0)
    grey = rgb[..., 0]
    expected, options = np.repeat(grey[..., None], 3, axis=2), {}
    if kind == "grey":
        image = Image.fromarray(grey)
    elif kind in ("palette", "transparent"):
        image, expected = Image.frombytes("P", (6, 5), bytes(range(30))), rgb
        image.putpalette(rgb.tobytes())
        options = {"transparency": bytes([0] * 15 + [255] * 15)} if kind == "transparent" else {}
    elif kind == "alpha":
        image, expected = Image.fromarray(np.dstack([rgb, grey])), rgb
    elif kind == "cmyk":
        image = Image.frombytes("CMYK", (6, 5), np.dstack([255 - rgb, np.zeros_like(grey)]).tobytes())
        expected = rgb
    elif kind == "one-bit":
        image, expected = Image.fromarray(grey > 127), np.where(expected > 127, 255, 0)
    else:  # the byte v is 257 * v in 16 bits; the offset is below half a step, so it rounds away
        image = Image.fromarray(np.minimum(grey.astype(np.uint16) * 257 + 100, 65535).astype(np.uint16))
    path = tmp_path / ("x.tif" if kind in ("cmyk", "deep-tiff") else "x.png")
    image.save(path, **options)
    found = decoding.read_image(path)
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), expected)


def test_only_image_decoders_are_used() -> None:
    with pytest.raises(UserError, match="no known image format"):  # Pillow would start Ghostscript for EPS
        decoding.decode_image(encoded(picture(0), "EPS"), "x.jpg")


# ------------------------------------------------------------ CIFAR-10

CIFAR_CLASSES = ("airplane", "automobile", "bird")
BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def cifar_batch(number: int) -> tuple[np.ndarray, list[int]]:
    """Four images in the layout of the archive, planes of red, green, blue: (4, 3072) uint8, labels."""
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (4, 3072), dtype=np.uint8), [int(label) for label in rng.integers(0, 3, 4)]


def python2_batch(pixels: np.ndarray, labels: list[int]) -> bytes:
    """A batch in the opcodes of the official files, which Python 2 and an early NumPy wrote."""

    def text(data: bytes) -> bytes:
        return b"U" + bytes([len(data)]) + data if len(data) < 256 else b"T" + struct.pack("<i", len(data)) + data

    state = text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + state
    shape = b"".join(b"M" + struct.pack("<H", side) for side in pixels.shape) + b"\x86"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    array += b"(K\x01" + shape + dtype + b"\x89" + text(pixels.tobytes()) + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"labels") + listed + text(b"data") + array + b"u."


def cifar_files(layout: str) -> dict[str, bytes]:
    files: dict[str, bytes] = {"readme.html": b"<html></html>"}
    if layout == "binary":
        files["batches.meta.txt"] = "".join(f"{name}\n" for name in CIFAR_CLASSES).encode() + b"\n"
    else:
        key = str if layout == "python3" else str.encode
        meta = {key("label_names"): [key(name) for name in CIFAR_CLASSES], key("num_vis"): 3072}
        files["batches.meta"] = pickle.dumps(meta, protocol=2)
    for number, batch in enumerate(BATCHES):
        pixels, labels = cifar_batch(number)
        if layout == "binary":
            files[f"{batch}.bin"] = np.column_stack([np.array(labels, np.uint8), pixels]).tobytes()
        elif layout == "python2":
            files[batch] = python2_batch(pixels, labels)
        else:
            files[batch] = pickle.dumps({"labels": labels, "data": np.asfortranarray(pixels)}, protocol=2 + number % 3)
    return files


@pytest.mark.parametrize("mode", ["w:gz", "w", "folder"])
@pytest.mark.parametrize("layout", ["python2", "python3", "binary"])
def test_cifar10(tmp_path: pathlib.Path, layout: str, mode: str) -> None:
    files = {f"cifar-10-batches-xy/{name}": data for name, data in cifar_files(layout).items()}
    if mode == "folder":
        path = write_folder(tmp_path, files) / "cifar-10-batches-xy"
    else:
        path = write(tmp_path / "cifar.tar", tar(files, mode=mode))
    for split, numbers in (("train", range(5)), ("test", range(5, 6))):
        found = open_images(path, split=split)  # type: ignore[arg-type]
        assert found.classes == CIFAR_CLASSES
        assert found.labels.dtype == np.int64
        assert found.labels.tolist() == [label for number in numbers for label in cifar_batch(number)[1]]
        planes = np.concatenate([cifar_batch(number)[0] for number in numbers])
        assert len(found) == len(planes)
        for index in (0, 3, len(found) - 1):
            image = np.asarray(found.read(index))
            assert image.shape == (32, 32, 3) and image.dtype == np.uint8
            for row, column, channel in [(0, 0, 0), (0, 31, 1), (31, 0, 2), (17, 5, 1)]:
                assert image[row, column, channel] == planes[index, 1024 * channel + 32 * row + column]
            assert found.name(index) == f"{CIFAR_CLASSES[found.labels[index]]}/{index:05d}.png"
        assert len({found.name(index) for index in range(len(found))}) == len(found)
    assert len(open_images(path)) == 20
    assert open_images(path).read(7).mode == "RGB"


class _Malicious:
    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_hostile_pickles_of_cifar10(tmp_path: pathlib.Path) -> None:
    files, marker = cifar_files("python2"), tmp_path / "executed"
    code = pickle.dumps({"labels": [0], "data": _Malicious(marker)}, protocol=2)
    doubled = b"2\x86" * 60  # a tuple of itself twice, 60 times: hashing it as a key would take forever
    nested = b"](" * 50 + b"e" * 50
    batch = python2_batch(*cifar_batch(0))
    for name, data, *words in (
        ("batches.meta", code, "carries code", "mkdir"),
        ("data_batch_3", code, "carries code", "mkdir"),
        ("data_batch_1", batch.replace(b"U\x02u1", b"U\x02O8"), "'O8'"),  # numpy would take bytes for object pointers
        ("batches.meta", files["batches.meta"][:-1] + b"r\xff\xff\xff\x7f.", "memo index"),  # would cost gigabytes
        ("batches.meta", files["batches.meta"][:-1] + b"p2147483647\n.", "memo index"),
        ("batches.meta", files["batches.meta"][:-1] + b"\x96" + struct.pack("<Q", 1 << 40) + b".", "cannot read"),
        ("batches.meta", b"\x80\x02}K\x01\x85" + doubled + b"K\x01s.", "nested tuples"),
        ("batches.meta", b"\x80\x02}U\x0blabel_names" + nested + b"s.", "expected a string"),
        ("data_batch_1", batch.replace(b"labels](", b"labels](](e"), "not a list of integers"),
    ):
        path = write_folder(tmp_path / "cifar", {**files, name: data})
        fails(path, name, *words)
    assert not marker.exists()


def test_errors_of_cifar10(tmp_path: pathlib.Path) -> None:
    pixels, labels = cifar_batch(4)
    for layout, meta, batch in (
        ("python2", "batches.meta", "data_batch_5"),
        ("binary", "batches.meta.txt", "data_batch_5.bin"),
    ):
        folder, files = tmp_path / layout, cifar_files(layout)
        foreign = python2_batch(pixels, [9, *labels[1:]]) if layout == "python2" else b"\x09" + files[batch][1:]
        for name, data, words in [
            (batch, files[batch][:-5], "cannot read"),
            (batch, b"", "cannot read"),
            (batch, foreign, "a label is outside 0 to 2"),
            (meta, b"", "cannot read"),
        ]:
            fails(write_folder(folder, {**files, name: data}), name, words)
        (write_folder(folder, files) / batch).unlink()
        fails(folder, f"lacks {batch}")
        assert len(open_images(folder, split="test")) == 4
    packed = tar(cifar_files("binary"), mode="w:gz")
    fails(write(tmp_path / "x.tar.gz", packed[:-2000]), "is damaged")


def test_mutated_cifar10_pickles_raise_only_user_errors(tmp_path: pathlib.Path) -> None:
    files = cifar_files("python2")
    folder, refused = write_folder(tmp_path, files), 0
    for name in ("batches.meta", "test_batch"):
        for data in mutations(files[name], 150, 3, stop=190):
            refused += is_refused(write(folder / name, data).parent, "test")
        write(folder / name, files[name])
    assert refused > 200


def test_hostile_gzips_cost_neither_time_nor_memory(tmp_path: pathlib.Path) -> None:
    header = bytearray(tar({"x" * 120: b""})[:512])  # of a long name

    def with_size(size: int) -> bytes:
        header[124:136] = b"%011o\0" % size
        header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 256)
        return bytes(header)

    bombs = {
        "zeros": gzip.compress(with_size(1 << 32)[:512] + bytes(1 << 24)),
        "a large member": gzip.compress(tar({"data_batch_1": bytes(1 << 24)})[:512] * 3),
        "a name of gigabytes": gzip.compress(with_size(1 << 31) + bytes(1 << 20)),
        "many headers": gzip.compress(with_size(0) * 10_000),
        "many members": gzip.compress(b"".join(tar({f"{i}": b""})[:512] for i in range(1000))),
    }
    for name, data in bombs.items():
        path = write(tmp_path / "x.tar.gz", data)
        start = time.perf_counter()
        tracemalloc.start()
        fails(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 26 and time.perf_counter() - start < 5, name
        tracemalloc.stop()


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_tars_of_images_are_refused(tmp_path: pathlib.Path, mode: str) -> None:
    fails(write(tmp_path / "pictures.tar.x", tar(FILES, mode=mode)), "compressed", "decompress")


@pytest.mark.parametrize("data", [b"", bytes(2000), FILES[NAMES[0]], b"\x1f\x8b\x08 broken gzip"], ids="abcd")
def test_other_files_are_refused(tmp_path: pathlib.Path, data: bytes) -> None:
    fails(write(tmp_path / "x", data), "cifar-10-python.tar.gz")


# ------------------------------------------------------------ crops


def gradient(width: int, height: int) -> Image.Image:
    """Red is the column, green the row."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.dstack([columns, rows, np.zeros_like(rows)]).astype(np.uint8))


def test_center_crop() -> None:
    small = picture(0, (32, 32))
    np.testing.assert_array_equal(crops.to_array(crops.center_crop(Image.fromarray(small), 32)), small)
    pixels = crops.to_array(crops.center_crop(gradient(45, 32), 32))
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    assert pixels[0, 0].tolist() == [6, 0, 0]  # (45 - 32) // 2, rounded down
    assert pixels[31, 31].tolist() == [37, 31, 0]
    assert crops.to_array(crops.center_crop(gradient(32, 45), 32))[0, 0].tolist() == [0, 6, 0]
    # At four times the size nothing is left for the bicubic step: the result is the mean of 2 x 2, twice.
    pixels = picture(1, (128, 152))
    expected = pixels.astype(np.int64)
    for _ in range(2):
        expected = (expected[:, ::2] + expected[:, 1::2] + 1) // 2  # Pillow rounds after each axis, halves up
        expected = (expected[::2] + expected[1::2] + 1) // 2
    np.testing.assert_array_equal(crops.to_array(crops.center_crop(Image.fromarray(pixels), 32)), expected[3:35])


BOX, BICUBIC = Image.Resampling.BOX, Image.Resampling.BICUBIC


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((63, 100), [((32, 51), BICUBIC)]),  # 100 * 32 / 63 = 50.8
        ((64, 101), [((32, 50), BOX), ((32, 50), BICUBIC)]),
        ((301, 500), [((150, 250), BOX), ((75, 125), BOX), ((37, 62), BOX), ((32, 54), BICUBIC)]),  # 62 * 32 / 37
        ((20, 25), [((32, 40), BICUBIC)]),
    ],
)
def test_no_halving_below_twice_the_size(monkeypatch: pytest.MonkeyPatch, size: Any, expected: list[Any]) -> None:
    steps, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *args: steps.append(args) or resize(self, *args))
    assert crops.center_crop(gradient(*size), 32).size == (32, 32)
    assert steps == expected


def test_random_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    def corner(image: Image.Image, size: int, *draws: float) -> tuple[int, int]:
        left, top, _ = crops.to_array(crops.random_crop(image, size, draws))[0, 0].tolist()  # type: ignore[arg-type]
        return top, left

    # With the first draw 0 the short side stays 35 = size + 0, so a crop of 35 moves only along the columns.
    wide = gradient(37, 35)
    assert [corner(wide, 35, 0, 0.99, x)[1] for x in (0, 0.3, 0.34, 0.6, 0.67, 0.999)] == [0, 0, 1, 1, 2, 2]
    uniform = ((np.arange(0, 400) + 0.5) / 400).tolist()
    exact = gradient(45, 40)  # the largest length, 40 = ceil(32 / 0.8), keeps it: 9 rows and 14 columns to begin at
    assert {corner(exact, 32, 0.9999, draw, 0.5)[0] for draw in uniform} == set(range(9))
    assert {corner(exact, 32, 0.9999, 0.5, draw)[1] for draw in uniform} == set(range(14))
    lengths, scale = [], crops._scale_short_side
    monkeypatch.setattr(crops, "_scale_short_side", lambda image, size: lengths.append(size) or scale(image, size))
    for draw in uniform:
        assert crops.random_crop(exact, 32, (draw, 0.0, 0.0)).size == (32, 32)
    counts = np.bincount(lengths)[32:]
    assert len(counts) == 9 and counts.min() >= 44 and counts.max() <= 45  # 400 / 9, both ends included


def test_crop_arguments() -> None:
    image = Image.fromarray(picture(2, (500, 375)))
    for size in (256, 512):  # the published ones
        assert crops.center_crop(image, size).size == (size, size)
        assert crops.random_crop(image, size, (0.5, 0.5, 0.5)).size == (size, size)
    for draws in ((1.0, 0, 0), (0, -0.1, 0), (0, 0, float("nan"))):
        with pytest.raises(ValueError, match=r"\[0, 1\)"):
            crops.random_crop(image, 32, draws)
    with pytest.raises(ValueError, match="at least 1"):
        crops.center_crop(image, 0)


def test_flips_and_arrays() -> None:
    image = Image.fromarray(picture(3))
    np.testing.assert_array_equal(crops.to_array(crops.horizontal_flip(image)), picture(3)[:, ::-1])
    crops.to_array(image)[:] = 0  # an array of its own
    np.testing.assert_array_equal(np.asarray(image), picture(3))


def test_normalize() -> None:
    batch = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(2, 16, 8, 3)
    result = crops.normalize(batch)
    assert result.shape == (2, 3, 16, 8) and result.dtype == torch.float32 and result.is_contiguous()
    assert result.min() == -1 and result.max() == 1
    assert torch.equal(result[1, 2, 3, 4], batch[1, 3, 4, 2].float() / 127.5 - 1)
    for wrong in (batch.float(), batch[0], batch.permute(0, 3, 1, 2)):
        with pytest.raises(ValueError, match=r"\(B, H, W, 3\)"):
            crops.normalize(wrong)


@pytest.mark.parametrize(("limit", "together"), [(256, 1), (600, 2)])
def test_huge_images_of_all_threads_share_the_memory(monkeypatch, limit, together):
    """16 x 16 pixels count as huge here."""
    real, present, most, lock = decoding.to_rgb, 0, 0, threading.Lock()
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "PNG")

    def slow(image: Image.Image) -> Image.Image:
        time.sleep(0.01)
        return real(image)

    @decoding.one_image()
    def decode_and_crop(_: int) -> None:
        nonlocal present, most
        image = decode_image(file.getvalue(), "x")
        with lock:
            present += 1
            most = max(most, present)
        time.sleep(0.01)  # the crop, in which the whole image still takes memory
        with lock:
            present -= 1
        assert image.size == (16, 16)

    monkeypatch.setattr(decoding, "to_rgb", slow)
    monkeypatch.setattr(decoding, "MAX_PIXELS", limit)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(decode_and_crop, range(24)))
    assert most == together and decoding._pixels_in_memory == 0


def test_an_error_gives_the_memory_back(monkeypatch):
    @decoding.one_image()
    def fail() -> None:
        file = io.BytesIO()
        Image.new("RGB", (16, 16)).save(file, "PNG")
        decode_image(file.getvalue()[:-30], "x")

    for _ in range(3):
        with pytest.raises(UserError):
            fail()
    assert decoding._pixels_in_memory == 0


def test_webp_has_half_the_pixels():
    """Its decoder needs twice the memory of the others."""
    file = io.BytesIO()
    Image.new("RGB", (6000, 6000)).save(file, "WEBP", quality=0, method=0)
    with pytest.raises(UserError, match=r"too many pixels to decode .*WebP 32 million"):
        decode_image(file.getvalue(), "x")


def test_links_to_a_folder_above_are_not_followed(tmp_path):
    folder = small.pictures(tmp_path / "pictures")
    other = small.pictures(tmp_path / "other", classes=1, each=2)
    (folder / "class-0" / "again").symlink_to("..", target_is_directory=True)
    (folder / "class-0" / "self").symlink_to("self")
    (folder / "class-3").symlink_to(other / "class-0", target_is_directory=True)
    (other / "class-0" / "back").symlink_to(folder / "class-0", target_is_directory=True)
    (folder / "class-0" / "forth").symlink_to(other / "class-0", target_is_directory=True)
    with pytest.raises(UserError, match="different depths"):  # not 40 levels of links between two folders
        open_images(folder)
    (folder / "class-0" / "forth").unlink()
    (other / "class-0" / "back").unlink()
    assert open_images(folder).labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 2
