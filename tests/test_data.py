"""Reading labelled images, and ADM's crops."""

from __future__ import annotations

import concurrent.futures
import io
import multiprocessing
import os
import pathlib
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from bitdance.data import crops, images
from bitdance.data.images import open_images
from bitdance.runtime.errors import UserError

# In the order that must come out: "dog" before "dog-2" although "dog-2/" < "dog/", nested folders flattened by name.
NAMES = ["cat/0000.png", "cat/0001.PNG", "dog/0000.png", "dog/deep/er/0000.png", "dog-2/0000.png"]
LABELS = [0, 0, 1, 1, 2]
IGNORED = ["cat/notes.txt", "cat/.hidden.png", ".git/x.png", "__MACOSX/cat/._0000.png", "README.md"]


def picture(seed: int, size: tuple[int, int] = (6, 5)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format)
    return buffer.getvalue()


def write_folder(root: pathlib.Path, names: list[str] = NAMES) -> pathlib.Path:
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(picture(seed)))
    return root


def write_zip(path: pathlib.Path, prefix: str = "", names: list[str] = NAMES) -> pathlib.Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for seed, name in reversed(list(enumerate(names))):
            archive.writestr(prefix + name, encoded(picture(seed)))
    return path


def add_tar(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def assert_named_set(found: images.ImageDataset) -> None:
    assert found.classes == ("cat", "dog", "dog-2")
    assert len(found) == len(NAMES)
    assert found.labels.dtype == np.int64 and found.labels.tolist() == LABELS
    assert [found.name(index) for index in range(len(found))] == NAMES
    for index in range(len(found)):
        image = found.read(index)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), picture(index))


# Folders and zips


def test_folder_of_class_folders(tmp_path: pathlib.Path) -> None:
    write_folder(tmp_path)
    for name in IGNORED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"not an image")
    found = open_images(str(tmp_path))
    assert_named_set(found)
    assert found.path == tmp_path
    assert_named_set(pickle.loads(pickle.dumps(found)))
    with pytest.raises(IndexError):
        found.read(len(NAMES))


@pytest.mark.parametrize("prefix", ["", "train/"])
@pytest.mark.parametrize("file_name", ["pictures.zip", "no-extension"])
def test_zip_of_class_folders(tmp_path: pathlib.Path, prefix: str, file_name: str) -> None:
    path = write_zip(tmp_path / file_name, prefix)
    with zipfile.ZipFile(path, "a") as archive:
        for name in IGNORED:
            archive.writestr(name if name.startswith("__MACOSX") else prefix + name, b"not an image")
        archive.writestr(f"{prefix}cat/", b"")
    found = open_images(path)
    assert_named_set(found)
    assert_named_set(pickle.loads(pickle.dumps(found)))


def test_zip_of_one_class_is_not_taken_for_a_wrapper(tmp_path: pathlib.Path) -> None:
    found = open_images(write_zip(tmp_path / "one.zip", names=["cat/a.png", "cat/b.png"]))
    assert found.classes == ("cat",) and [found.name(0), found.name(1)] == ["cat/a.png", "cat/b.png"]


def _read_all(found: images.ImageDataset) -> list[bytes]:
    return [found.read(index).tobytes() for _ in range(20) for index in range(len(found))]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_zip_in_several_processes(tmp_path: pathlib.Path, method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {method}")
    found = open_images(write_zip(tmp_path / "a.zip"))
    context = multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        jobs = [pool.submit(_read_all, found) for _ in range(2)]
        here = _read_all(found)
        assert all(job.result(timeout=60) == here for job in jobs)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_opens_the_zip_anew_even_under_a_held_lock(tmp_path: pathlib.Path) -> None:
    found = open_images(write_zip(tmp_path / "a.zip"))
    assert isinstance(found, images._ZipImages)
    mine, lock = found._open()
    with lock:  # as if another thread were reading at the moment of the fork
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=lambda: queue.put((found._open()[0] is mine, found.read(3).tobytes())))
        child.start()
        shared, pixels = queue.get(timeout=120)
        child.join(30)
    assert not shared and pixels == picture(3).tobytes()


def test_zip_in_several_threads(tmp_path: pathlib.Path) -> None:
    found = open_images(write_zip(tmp_path / "a.zip"))
    here = _read_all(found)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(result == here for result in pool.map(_read_all, [found] * 4))


@pytest.mark.parametrize(
    "kind", ["grey", "palette", "transparent", "alpha", "cmyk", "one-bit", "deep-grey", "deep-tiff"]
)
def test_every_mode_becomes_rgb(tmp_path: pathlib.Path, kind: str) -> None:
    rgb = picture(0)
    grey = rgb[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    path = tmp_path / "c" / ("x.tif" if kind in ("cmyk", "deep-tiff") else "x.png")
    path.parent.mkdir()
    if kind == "grey":
        Image.fromarray(grey).save(path)
    elif kind in ("palette", "transparent"):
        image = Image.frombytes("P", (6, 5), bytes(range(30)))
        image.putpalette(rgb.tobytes())
        if kind == "transparent":
            image.save(path, transparency=bytes([0] * 15 + [255] * 15))
        else:
            image.save(path)
        expected = rgb
    elif kind == "alpha":
        Image.fromarray(np.dstack([rgb, grey])).save(path)
        expected = rgb
    elif kind == "cmyk":
        Image.frombytes("CMYK", (6, 5), np.dstack([255 - rgb, np.zeros_like(grey)]).tobytes()).save(path)
        expected = rgb
    elif kind == "one-bit":
        Image.fromarray(grey > 127).save(path)
        expected = np.where(expected > 127, 255, 0)
    else:  # the byte v is 257 * v in 16 bits; the offset is below half a step, so it rounds away
        Image.fromarray(np.minimum(grey.astype(np.uint16) * 257 + 100, 65535).astype(np.uint16)).save(path)
    image = open_images(tmp_path).read(0)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), expected)


def _user_error(path: pathlib.Path, *parts: str, **options: str) -> None:
    with pytest.raises(UserError) as caught:
        open_images(path, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(path), *parts):
        assert part in message, message


def test_errors_of_folders(tmp_path: pathlib.Path) -> None:
    _user_error(tmp_path / "nowhere", "no such file or folder")
    _user_error(tmp_path, "no images", "<class>/<image>.jpg")
    (tmp_path / "a.png").write_bytes(encoded(picture(0)))
    _user_error(tmp_path, "no class folders", "<class>/<image>.jpg")
    write_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    _user_error(tmp_path, "'empty'", "holds no images")
    (tmp_path / "empty").rmdir()
    _user_error(tmp_path, "no split 'test'", split="test")
    with pytest.raises(UserError, match="must be 'train' or 'test'"):
        open_images(tmp_path, split="val")  # type: ignore[arg-type]


def test_errors_of_zips(tmp_path: pathlib.Path) -> None:
    good = write_zip(tmp_path / "good.zip").read_bytes()
    bad = tmp_path / "bad.zip"
    for data, part in [
        (b"<html>Not found</html>" * 100, "not a zip"),
        (b"", "not a zip"),
        (good[: len(good) // 2], "truncated"),
        (good[:-30], "truncated"),
    ]:
        bad.write_bytes(data)
        _user_error(bad, part)
    bad.unlink()
    _user_error(write_zip(bad, names=[]), "no images")
    bad.unlink()
    _user_error(write_zip(bad, names=["a.png"]), "no class folders")
    _user_error(tmp_path / "good.zip", "no split", split="test")


def test_mutated_zips_never_raise_anything_else(tmp_path: pathlib.Path) -> None:
    good = np.frombuffer(write_zip(tmp_path / "good.zip").read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    path = tmp_path / "bad.zip"
    refused = 0
    for _ in range(150):
        data = good.copy()
        data[rng.integers(0, len(data), 8)] = rng.integers(0, 256, 8)
        path.write_bytes(data.tobytes())
        try:
            found = open_images(path)
            for index in range(len(found)):
                found.read(index)
        except UserError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("kind", ["text", "truncated", "empty", "bomb", "float"])
@pytest.mark.parametrize("place", ["folder", "zip"])
def test_unreadable_image_is_named(
    tmp_path: pathlib.Path, kind: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {
        "text": b"<html></html>",
        "truncated": encoded(picture(0, (64, 64)), file_format="JPEG")[:1500],
        "empty": b"",
        "bomb": encoded(np.zeros((100, 100, 3), np.uint8)),
        "float": encoded(np.zeros((4, 4), np.float32), file_format="TIFF"),
    }[kind]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4500)
    if place == "folder":
        path = tmp_path / "set"
        (path / "cat").mkdir(parents=True)
        (path / "cat" / "bad.jpg").write_bytes(data)
    else:
        path = tmp_path / "set.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("train/cat/bad.jpg", data)
    found = open_images(path)
    with pytest.raises(UserError, match="too many pixels" if kind == "bomb" else "cannot read the image") as caught:
        found.read(0)
    assert "cat/bad.jpg" in str(caught.value) and str(path) in str(caught.value)


def test_files_that_vanish_are_named(tmp_path: pathlib.Path) -> None:
    folder = open_images(write_folder(tmp_path / "folder"))
    archive = pickle.loads(pickle.dumps(open_images(write_zip(tmp_path / "a.zip"))))
    (tmp_path / "folder" / NAMES[0]).unlink()
    (tmp_path / "a.zip").unlink()
    for found in (folder, archive):
        with pytest.raises(UserError, match=NAMES[0]):
            found.read(0)


def test_only_image_decoders_are_used() -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture(0)).save(buffer, "EPS")  # Pillow would start Ghostscript for it
    with pytest.raises(UserError, match="no known image format"):
        images.decode_image(buffer.getvalue(), "x.jpg")


# CIFAR-10

CIFAR_CLASSES = ("airplane", "automobile", "bird")
BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def cifar_batch(number: int) -> tuple[np.ndarray, list[int]]:
    """Four images as the archive keeps them, planes of red, green, blue: (4, 3072) uint8, labels."""
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (4, 3072), dtype=np.uint8), [int(label) for label in rng.integers(0, 3, 4)]


def python2_string(data: bytes) -> bytes:
    return b"U" + bytes([len(data)]) + data if len(data) < 256 else b"T" + struct.pack("<i", len(data)) + data


def python2_batch(pixels: np.ndarray, labels: list[int]) -> bytes:
    """A batch in the very opcodes of the official files, which Python 2 and an early numpy wrote."""
    text = python2_string
    dtype = (
        b"cnumpy\ndtype\n"
        + text(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
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


def write_cifar(tmp_path: pathlib.Path, files: dict[str, bytes], packed: bool) -> pathlib.Path:
    if packed:
        with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as archive:
            for name, data in files.items():
                add_tar(archive, f"cifar-10-batches-xy/{name}", data)
        return tmp_path / "cifar.tar.gz"
    folder = tmp_path / "cifar-10-batches"
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("layout", ["python2", "python3", "binary"])
def test_cifar10(tmp_path: pathlib.Path, layout: str, packed: bool) -> None:
    path = write_cifar(tmp_path, cifar_files(layout), packed)
    for split, numbers in (("train", range(5)), ("test", range(5, 6))):
        found = open_images(path, split=split)  # type: ignore[arg-type]
        assert found.classes == CIFAR_CLASSES
        assert found.labels.dtype == np.int64
        assert found.labels.tolist() == [label for number in numbers for label in cifar_batch(number)[1]]
        pixels = np.concatenate([cifar_batch(number)[0] for number in numbers])
        assert len(found) == len(pixels)
        for index in (0, 3, len(found) - 1):
            image = np.asarray(found.read(index))
            assert image.shape == (32, 32, 3) and image.dtype == np.uint8
            for row, column, channel in [(0, 0, 0), (0, 31, 1), (31, 0, 2), (17, 5, 1)]:
                assert image[row, column, channel] == pixels[index, 1024 * channel + 32 * row + column]
            assert found.name(index) == f"{CIFAR_CLASSES[found.labels[index]]}/{index:05d}.png"
        assert len({found.name(index) for index in range(len(found))}) == len(found)
    assert len(open_images(path)) == 20
    assert open_images(path).read(7).mode == "RGB"


class _Malicious:
    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("victim", ["batches.meta", "data_batch_3"])
def test_cifar10_pickle_with_code_is_refused(tmp_path: pathlib.Path, victim: str) -> None:
    files = cifar_files("python2")
    files[victim] = pickle.dumps({"labels": [0], "data": _Malicious(tmp_path / "executed")}, protocol=2)
    _user_error(write_cifar(tmp_path, files, packed=False), victim, "carries code", "mkdir")
    assert not (tmp_path / "executed").exists()


def test_cifar10_pickle_cannot_forge_arrays(tmp_path: pathlib.Path) -> None:
    """numpy's own unpickling would take raw bytes for object pointers here."""
    pixels, labels = cifar_batch(0)
    files = cifar_files("python2")
    files["data_batch_1"] = python2_batch(pixels, labels).replace(b"U\x02u1", b"U\x02O8")
    _user_error(write_cifar(tmp_path, files, packed=False), "data_batch_1", "'O8'")


def test_cifar10_pickle_cannot_ask_for_all_memory(tmp_path: pathlib.Path) -> None:
    files = cifar_files("python2")
    for bomb in (b"r\xff\xff\xff\x7f", b"p2147483647\n", b"\x96" + struct.pack("<Q", 1 << 40)):
        meta = files["batches.meta"][:-1] + bomb + b"."
        _user_error(write_cifar(tmp_path, {**files, "batches.meta": meta}, packed=False), "batches.meta", "cannot read")


def test_cifar10_errors(tmp_path: pathlib.Path) -> None:
    pixels, labels = cifar_batch(4)
    for layout, meta, batch in (
        ("python2", "batches.meta", "data_batch_5"),
        ("binary", "batches.meta.txt", "data_batch_5.bin"),
    ):
        (tmp_path / layout).mkdir()
        files = cifar_files(layout)
        foreign = python2_batch(pixels, [9, *labels[1:]]) if layout == "python2" else b"\x09" + files[batch][1:]
        for name, data, part in [
            (batch, files[batch][:-5], "cannot read"),
            (batch, b"", "cannot read"),
            (batch, foreign, "a label lies outside 0 to 2"),
            (meta, b"", "cannot read"),
        ]:
            _user_error(write_cifar(tmp_path / layout, {**files, name: data}, packed=False), name, part)
        folder = write_cifar(tmp_path / layout, files, packed=False)
        (folder / batch).unlink()
        _user_error(folder, f"lacks {batch}")
        assert len(open_images(folder, split="test")) == 4
    path = write_cifar(tmp_path, cifar_files("binary"), packed=True)
    path.write_bytes(path.read_bytes()[:-2000])
    _user_error(path)


def test_mutated_cifar10_pickles_never_raise_anything_else(tmp_path: pathlib.Path) -> None:
    files = cifar_files("python2")
    folder = write_cifar(tmp_path, files, packed=False)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        name = ("batches.meta", "test_batch")[rng.integers(2)]
        data = bytearray(files[name])
        for position in rng.integers(0, min(len(data), 190), 3):
            data[position] = rng.integers(256)
        folder.joinpath(name).write_bytes(data)
        try:
            open_images(folder, split="test")
        except UserError:
            refused += 1
        folder.joinpath(name).write_bytes(files[name])
    assert refused > 200


def test_other_files_are_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "pictures.tar.gz"  # a compressed tar cannot be read in place
    with tarfile.open(path, "w:gz") as archive:
        for seed, name in enumerate(NAMES):
            add_tar(archive, name, encoded(picture(seed)))
    _user_error(path, "not CIFAR-10", "cifar-10-python.tar.gz")
    for data in (b"", b"\x00" * 2000, encoded(picture(0)), b"\x1f\x8b\x08 broken gzip"):
        path.write_bytes(data)
        _user_error(path, "cifar-10-python.tar.gz")


# Crops


def gradient(width: int, height: int) -> Image.Image:
    """Red is the column, green the row."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.dstack([columns, rows, np.zeros_like(rows)]).astype(np.uint8))


def test_center_crop_leaves_an_image_of_the_size_alone() -> None:
    image = Image.fromarray(picture(0, (32, 32)))
    np.testing.assert_array_equal(crops.to_array(crops.center_crop(image, 32)), picture(0, (32, 32)))


def test_center_crop_takes_the_middle() -> None:
    pixels = crops.to_array(crops.center_crop(gradient(45, 32), 32))
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    assert pixels[0, 0].tolist() == [6, 0, 0]  # (45 - 32) // 2, rounded down
    assert pixels[31, 31].tolist() == [37, 31, 0]
    assert crops.to_array(crops.center_crop(gradient(32, 45), 32))[0, 0].tolist() == [0, 6, 0]


def test_center_crop_halves_with_a_box() -> None:
    """At exactly four times the size nothing is left for the bicubic step: the result is the mean of 2 x 2, twice."""
    pixels = picture(1, (128, 152))
    expected = pixels.astype(np.int64)
    for _ in range(2):
        expected = (expected[:, ::2] + expected[:, 1::2] + 1) // 2  # Pillow rounds after each axis, halves up
        expected = (expected[::2] + expected[1::2] + 1) // 2
    np.testing.assert_array_equal(crops.to_array(crops.center_crop(Image.fromarray(pixels), 32)), expected[3:35])


def test_no_halving_below_twice_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[tuple[int, int], int]] = []
    resize = Image.Image.resize

    def recorded(self: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
        steps.append((size, int(resample)))
        return resize(self, size, resample)

    monkeypatch.setattr(Image.Image, "resize", recorded)
    box, bicubic = int(Image.Resampling.BOX), int(Image.Resampling.BICUBIC)
    for image_size, expected in [
        ((63, 100), [((32, 51), bicubic)]),  # 100 * 32 / 63 = 50.8
        ((64, 101), [((32, 50), box), ((32, 50), bicubic)]),
        (
            (301, 500),
            [((150, 250), box), ((75, 125), box), ((37, 62), box), ((32, 54), bicubic)],
        ),  # 62 * 32 / 37 = 53.6
        ((20, 25), [((32, 40), bicubic)]),
    ]:
        steps.clear()
        assert crops.center_crop(gradient(*image_size), 32).size == (32, 32)
        assert steps == expected


def test_random_crop_reaches_every_offset() -> None:
    image = gradient(37, 35)
    # With the first draw 0 the short side stays 35 = size + 0, so a crop of 35 moves only along the columns.
    corners = [
        crops.to_array(crops.random_crop(image, 35, (0, 0.99, x)))[0, 0].tolist()
        for x in (0, 0.3, 0.34, 0.6, 0.67, 0.999999)
    ]
    assert corners == [[0, 0, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0], [2, 0, 0], [2, 0, 0]]


def test_random_crop_draws_the_short_side(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    corners: list[tuple[int, int]] = []
    scale, crop = crops._scale_short_side, crops._crop

    def recorded_scale(image: Image.Image, size: int) -> Image.Image:
        lengths.append(size)
        return scale(image, size)

    def recorded_crop(image: Image.Image, top: int, left: int, size: int) -> Image.Image:
        corners.append((top, left))
        return crop(image, top, left, size)

    monkeypatch.setattr(crops, "_scale_short_side", recorded_scale)
    monkeypatch.setattr(crops, "_crop", recorded_crop)
    image = gradient(90, 80)
    uniform = (np.arange(0, 400) + 0.5) / 400
    for draw in uniform:
        assert crops.random_crop(image, 32, (float(draw), 0.0, 0.0)).size == (32, 32)
    assert sorted(set(lengths)) == list(range(32, 41))  # 40 = ceil(32 / 0.8), both ends included
    counts = np.bincount(lengths)[32:]
    assert counts.min() >= 44 and counts.max() <= 45  # 400 / 9
    corners.clear()
    for draw in uniform:
        crops.random_crop(image, 32, (0.9999, float(draw), 0.5))
        crops.random_crop(image, 32, (0.9999, 0.5, float(draw)))
    # 90 x 80 halves to 45 x 40, which the short side of 40 keeps: 9 rows and 14 columns to begin at.
    assert {top for top, _ in corners} == set(range(9)) and {left for _, left in corners} == set(range(14))


def test_crops_in_the_published_sizes() -> None:
    image = Image.fromarray(picture(2, (500, 375)))
    for size in (256, 512):
        assert crops.center_crop(image, size).size == (size, size)
        assert crops.random_crop(image, size, (0.5, 0.5, 0.5)).size == (size, size)


def test_crop_arguments() -> None:
    image = gradient(40, 40)
    for draws in ((1.0, 0, 0), (0, -0.1, 0), (0, 0, float("nan"))):
        with pytest.raises(ValueError, match=r"\[0, 1\)"):
            crops.random_crop(image, 32, draws)
    with pytest.raises(ValueError, match="at least 1"):
        crops.center_crop(image, 0)


def test_horizontal_flip() -> None:
    pixels = picture(3)
    np.testing.assert_array_equal(crops.to_array(crops.horizontal_flip(Image.fromarray(pixels))), pixels[:, ::-1])


def test_to_array_can_be_written_to() -> None:
    image = Image.fromarray(picture(0))
    crops.to_array(image)[:] = 0
    np.testing.assert_array_equal(np.asarray(image), picture(0))


def test_normalize() -> None:
    import torch  # here, so that spawned processes need not wait for it

    batch = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(2, 16, 8, 3)
    result = crops.normalize(batch)
    assert result.shape == (2, 3, 16, 8) and result.dtype == torch.float32 and result.is_contiguous()
    assert result.min() == -1 and result.max() == 1
    assert torch.equal(result[1, 2, 3, 4], batch[1, 3, 4, 2].float() / 127.5 - 1)
    for wrong in (batch.float(), batch[0], batch.permute(0, 3, 1, 2)):
        with pytest.raises(ValueError, match=r"\(B, H, W, 3\)"):
            crops.normalize(wrong)
