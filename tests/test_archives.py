"""ImageNet in its common forms: tars and their index, the hub's parquet files, WordNet ids as class folders."""

from __future__ import annotations

import concurrent.futures
import io
import json
import multiprocessing
import os
import pathlib
import pickle
import sys
import tarfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import small
from PIL import Image
from test_data import fails, is_refused, mutations, pixels, tar, write, write_folder, write_zip

from bitdance.config import BitDanceConfig, ModelSizes
from bitdance.data import tar as tar_reader
from bitdance.data.class_names import ClassNames, are_imagenet, imagenet
from bitdance.data.image_dataset import ImageDataset
from bitdance.data.images import open_images
from bitdance.runtime.errors import UserError
from bitdance.training.setup import _complete_sizes

# The first, the second and the last of ImageNet's classes, out of order.
NAMES = [f"{wordnet_id}/{wordnet_id}_{number}.JPEG" for wordnet_id in ("n15075141", "n01440764", "n01443537")
         for number in (10026, 7)]  # fmt: skip
ORDER = sorted(NAMES)
LABELS = [0, 0, 1, 1, 999, 999]
LONG = "n01440764/" + "long-" * 60 + ".JPEG"


def jpeg(name: str, size: int = 12) -> bytes:
    """A picture that only this name has; every third is grey."""
    pixels = np.random.default_rng(list(name.encode())).integers(0, 256, (size, size + 1, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if sum(name.encode()) % 3 == 0 else pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def expected(names: list[str]) -> list[bytes]:
    return [Image.open(io.BytesIO(jpeg(name))).convert("RGB").tobytes() for name in names]


def tar_of_tars(names: list[str] = NAMES) -> bytes:
    """As ILSVRC2012_img_train.tar: n01440764.tar and so on, each of n01440764_10026.JPEG and so on."""
    folders = {name.split("/")[0]: None for name in names}
    return tar({
        f"{folder}.tar": tar({name.split("/")[1]: jpeg(name) for name in names if name.startswith(folder)})
        for folder in folders
    })  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def index_of(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".index.safetensors")


def assert_same(found: ImageDataset, names: list[str] = ORDER, labels: list[int] = LABELS) -> None:
    assert [found.name(i) for i in range(len(found))] == names
    assert found.labels.dtype == np.int64 and found.labels.tolist() == labels
    assert pixels(found) == expected(names)
    with pytest.raises(IndexError):
        found.read(len(names))


# ------------------------------------------------------------ tars


@pytest.mark.parametrize("route", ["folder", "zip", "tar", "tar of tars"])
def test_wordnet_ids_get_the_labels_of_imagenet(tmp_path: pathlib.Path, route: str) -> None:
    files, path = {name: jpeg(name) for name in NAMES}, tmp_path / "set"
    if route in ("folder", "zip"):
        (write_folder if route == "folder" else write_zip)(path, files)
    else:
        write(path, tar(files) if route == "tar" else tar_of_tars())
    found = open_images(path)
    assert found.path == path and found.classes == imagenet().wordnet_ids
    assert_same(found)
    assert_same(pickle.loads(pickle.dumps(found)))
    assert_same(open_images(path))  # a tar, this time by its index


@pytest.mark.parametrize("file_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_every_length_in_every_tar_format(tmp_path: pathlib.Path, file_format: int) -> None:
    names = [f"b{'d' * 60}/{'f' * 60}.jpg", "c/ü.jpg", "c/x.jpg"]  # the first is longer than a header's own field
    if file_format != tarfile.USTAR_FORMAT:
        names.insert(0, "a/" + "long-" * 60 + ".jpg")
    path = write(tmp_path / "x.tar", tar({name: jpeg(name) for name in reversed(names)}, file_format))
    found = open_images(path)
    assert found.classes == ("a", "b" + "d" * 60, "c")[-len(names) + 1 :]
    assert_same(found, sorted(names), [found.classes.index(name.split("/")[0]) for name in sorted(names)])


def test_the_last_member_of_a_name_counts(tmp_path: pathlib.Path) -> None:
    once, again = tar({"a/x.jpg": b"an old version"}), tar({"a/x.jpg": jpeg("a/x.jpg")})
    assert_same(open_images(write(tmp_path / "x.tar", once[:1024] + again)), ["a/x.jpg"], [0])


def test_indexing_a_tar_does_not_read_its_data(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Counted(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            sizes.append(super().readinto(buffer) or 0)
            return sizes[-1]

    def counted(path: pathlib.Path, mode: str, buffering: int = io.DEFAULT_BUFFER_SIZE) -> io.BufferedReader:
        return io.BufferedReader(Counted(path), buffering)

    path = write(tmp_path / "x.tar", tar({f"a/{i}.jpg": bytes(50_000) for i in range(20)}))
    monkeypatch.setattr(tar_reader, "open", counted, raising=False)
    assert len(open_images(path)) == 20
    assert 0 < sum(sizes) < 50_000


def test_an_incomplete_cifar_tar_is_still_cifar(tmp_path: pathlib.Path) -> None:
    files = {"cifar-10/readme.html": b"", "cifar-10/batches.meta.txt": b"cat\n"}
    fails(write(tmp_path / "x.tar", tar(files)), "CIFAR-10's train split")


def test_the_index_is_made_once_and_kept_beside_the_tar(tmp_path: pathlib.Path, capsys, monkeypatch) -> None:
    path = write(tmp_path / "x.tar", tar_of_tars())
    open_images(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.tar", "x.tar.index.safetensors"]
    monkeypatch.setattr(tar_reader, "_make_index", None)  # making it again would fail
    assert_same(open_images(path))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("place", ["cache", "nowhere"])
def test_a_tar_in_a_folder_that_cannot_be_written(tmp_path, cache, capsys, monkeypatch, place) -> None:
    path = write(tmp_path / "x.tar", tar_of_tars())
    access = os.access
    locked = (tmp_path,) if place == "cache" else (tmp_path, cache / "bitdance")
    monkeypatch.setattr(os, "access", lambda folder, mode: folder not in locked and access(folder, mode))
    assert_same(open_images(path))
    assert [file.name for file in tmp_path.iterdir()] == ["x.tar"]
    kept = [file.name for file in (cache / "bitdance").iterdir()]
    err = capsys.readouterr().err
    if place == "cache":
        assert len(kept) == 1 and kept[0].endswith("-x.tar.index.safetensors") and err == ""
        monkeypatch.setattr(tar_reader, "_make_index", None)
        assert_same(open_images(path))
    else:
        assert kept == [] and f"the index of {path} cannot be kept" in err


def test_a_full_disk_prevents_only_the_index(tmp_path, capsys, monkeypatch) -> None:
    path = write(tmp_path / "x.tar", tar_of_tars())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert_same(open_images(path))
    assert "warning: cannot write" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["x.tar"]


@pytest.mark.parametrize(
    "change",
    [
        lambda offsets, sizes: (offsets + 512, sizes),
        lambda offsets, sizes: (np.append(offsets[:-1], 1 << 40), sizes),
        lambda offsets, sizes: (offsets, sizes[1:]),
        lambda offsets, sizes: (offsets, sizes.astype(np.float64)),
    ],
    ids=["shifted", "outside", "one lost", "another type"],
)
def test_an_index_that_does_not_fit_is_made_again(tmp_path, capsys, change: Callable[..., Any]) -> None:
    """The digest of the index is right: a faulty or hostile program wrote it."""
    path = write(tmp_path / "x.tar", tar_of_tars())
    open_images(path)
    index = tar_reader._read_index(index_of(path), path)
    assert index is not None
    index["offsets"], index["sizes"] = change(index["offsets"], index["sizes"])
    tar_reader._write_index(index_of(path), path, index)
    assert_same(open_images(path))
    assert "does not match the tar: it is made again" in capsys.readouterr().err
    assert_same(open_images(path))
    assert capsys.readouterr().err == ""


def test_a_stale_or_damaged_index_is_made_again(tmp_path, capsys) -> None:
    path = write(tmp_path / "x.tar", tar_of_tars())
    open_images(path)
    write(path, tar_of_tars(ORDER[:2]))
    assert_same(open_images(path), ORDER[:2], LABELS[:2])
    assert "does not match the tar: it is made again" in capsys.readouterr().err
    good, remade = index_of(path).read_bytes(), 0
    for number, data in enumerate([b"hello", *mutations(good, 100, 4)]):
        write(index_of(path), data[: 37 * number % len(data)] if number % 4 == 1 else data)
        found = open_images(path)
        assert found.labels.tolist() == LABELS[:2] and found.name(1) == ORDER[1]
        remade += "made again" in capsys.readouterr().err
    assert remade > 90


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_one_of_several_processes_makes_the_index(tmp_path: pathlib.Path, monkeypatch) -> None:
    path, log, make = write(tmp_path / "x.tar", tar_of_tars()), tmp_path / "log", tar_reader._make_index
    barrier = multiprocessing.get_context("fork").Barrier(3)

    def make_slowly(path: pathlib.Path) -> Any:
        with open(log, "a") as file:
            file.write("made\n")
        time.sleep(0.3)
        return make(path)

    def open_at_once() -> None:
        barrier.wait(60)
        assert pixels(open_images(path)) == expected(ORDER)

    monkeypatch.setattr(tar_reader, "_make_index", make_slowly)
    small.run_forked(open_at_once, 3)
    assert log.read_text() == "made\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log", "x.tar", "x.tar.index.safetensors"]


def read_all(found: ImageDataset) -> list[bytes]:
    return [data for _ in range(20) for data in pixels(found)]


@pytest.mark.parametrize("kind", ["zip", "tar", "parquet"])
def test_reading_in_several_threads_and_processes(tmp_path: pathlib.Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "parquet":
        parquet(path, ORDER)
    else:
        (write_zip(path, {name: jpeg(name) for name in NAMES}) if kind == "zip" else write(path, tar_of_tars()))
    found, here = open_images(path), expected(ORDER) * 20
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert all(result == here for result in threads.map(read_all, [found] * 4))
    methods = {"fork": 2, "spawn": 1} if kind == "tar" else {"fork": 2}  # each that is spawned imports torch
    for method in methods.keys() & set(multiprocessing.get_all_start_methods()):
        context = multiprocessing.get_context(method)
        with concurrent.futures.ProcessPoolExecutor(methods[method], mp_context=context) as pool:
            images = pool.map(found.read, [*range(6)] * 40, chunksize=120, timeout=120)
            assert read_all(found) == here
            assert [image.tobytes() for image in images] == here * 2


def test_errors_of_tars(tmp_path: pathlib.Path) -> None:
    good = tar({name: jpeg(name) for name in NAMES})
    second = 512 + -(-len(jpeg(NAMES[0])) // 512) * 512  # where its header begins
    link = tarfile.TarInfo("a/x.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "b/x.jpg"
    for data, *words in (
        (good[: second + 600], "damaged, truncated or unsuitable tar", "beyond the end"),
        (good[:second], "truncated", "without an end mark"),
        (good[:second] + b"x" * 512 + good[second + 512 :], "a header is damaged"),
        (tar_of_tars()[:-12_000], "truncated"),
        (tar({"n01440764.tar": b"x" * 2000}), "in n01440764.tar: a header is damaged"),
        (tar({"a.txt": b""}), "no images", "<class>/<image>.jpg"),
        (tar({"a/x.jpg": jpeg("a"), "b/": b""}), "the class folder 'b'", "holds no images"),
        (tar({"n01440764.tar": tar({}), "a.tar": tar({"x.jpg": b"x"})}), "class folder 'n01440764'"),
        (link.tobuf() + bytes(10_240), "a/x.jpg is a link", "--dereference"),
        (tar({"a.txt": b""})[:512] + tar({"a" * 200: b""})[:1024] * 20, "too long a name"),
    ):
        fails(write(tmp_path / "bad.tar", data), *words)
    fails(write(tmp_path / "bad.tar", good), "no split 'test'", split="test")


def test_unreadable_images_in_a_tar_are_named(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "x.tar", tar({"a/x.jpg": b"hello" * 500, "a/y.jpg": b""}))
    found = open_images(path)
    with pytest.raises(UserError, match=f"cannot read the image a/x.jpg in {path}"):
        found.read(0)
    with pytest.raises(UserError, match=f"cannot read the image a/y.jpg in {path}"):
        found.read(1)
    os.truncate(path, 1500)
    with pytest.raises(UserError, match=r"a/x.jpg in .* ends at byte 1500"):
        found.read(0)


@pytest.mark.parametrize("file_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_mutated_tars_raise_only_user_errors(tmp_path: pathlib.Path, file_format: int) -> None:
    inner = tar({name.split("/")[1]: jpeg(name, 4) for name in [*NAMES[:1], LONG]}, file_format)
    good = tar({"n01440764.tar": inner, "n01443537/x.JPEG": jpeg("x", 4)}, file_format).rstrip(b"\0")
    good += bytes(1024 + -len(good) % 512)
    headers = [i for i in range(0, len(good), 512) if good[i + 257 : i + 262] == b"ustar"]
    rng, refused = np.random.default_rng(0), 0
    for number, bad in enumerate(mutations(good, 50, 8)):
        refused += is_refused(write(tmp_path / "x.tar", bad[: rng.integers(len(bad))] if number % 5 == 1 else bad))
        # Changes a field of a header and corrects the checksum, which is compared first.
        data = np.frombuffer(good, np.uint8).copy()
        header = data[headers[rng.integers(len(headers))] :][:512]
        header[rng.integers(100, 270)] = rng.integers(256)
        total = int(header.sum()) - int(header[148:156].sum()) + 256
        header[148:156] = np.frombuffer(b"%06o\0 " % total, np.uint8)
        refused += is_refused(write(tmp_path / "x.tar", data.tobytes()))
    assert refused > 30


def test_a_name_with_a_null_character_is_refused(tmp_path):
    data = jpeg("a/x.jpg")
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name in (*(f"a/{number}.jpg" for number in range(100)), "a/x.jpg\0b/y.jpg"):
            member = tarfile.TarInfo("a/x.jpg")
            member.size, member.pax_headers = len(data), {"path": name}
            archive.addfile(member, io.BytesIO(data))
    fails(tmp_path / "x.tar", "contains a null character")


def test_the_index_of_a_tar_without_a_home(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without HOME and an entry of the user
    monkeypatch.chdir(tmp_path)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        member = tarfile.TarInfo("a/x.jpg")
        member.size = len(data := jpeg("a/x.jpg"))
        archive.addfile(member, io.BytesIO(data))
    assert len(open_images(tmp_path / "x.tar")) == 1 and not (tmp_path / "~").exists()


# ------------------------------------------------------------ parquet


def parquet(path: pathlib.Path, names: list[str], class_names: list[str] | None = None, **options: Any) -> pathlib.Path:
    """A file as the hub's library writes it; labels are ImageNet's."""
    pa = pytest.importorskip("pyarrow")
    wordnet_ids = list(imagenet().wordnet_ids or ())
    rows = [{"bytes": jpeg(name), "path": name.split("/")[1]} for name in names]
    labels = [wordnet_ids.index(name.split("/")[0]) for name in names]
    features = {"image": {"_type": "Image"}, "label": {"names": class_names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if class_names else None
    write_table(path, pa.table({"image": rows, "label": labels}).replace_schema_metadata(metadata), **options)
    return path


def write_table(path: pathlib.Path, table: Any, **options: Any) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pytest.importorskip("pyarrow.parquet").write_table(table, path, **{"row_group_size": 2, **options})
    return path


@pytest.mark.parametrize("route", ["file", "folder", "data folder", "pattern"])
def test_parquet_gives_the_same_images_and_labels(tmp_path: pathlib.Path, route: str) -> None:
    human = [", ".join(names) for names in imagenet().names]
    folder = tmp_path / "data"
    options = {"row_group_size": 2, "compression": "snappy"}
    parquet(folder / "train-00000-of-00002.parquet", ORDER if route == "file" else ORDER[:5], human, **options)
    if route != "file":
        parquet(folder / "train-00001-of-00002.parquet", ORDER[5:], human, **options)
        parquet(folder / "validation-00000-of-00001.parquet", ORDER[:1], human)
    path = {
        "file": folder / "train-00000-of-00002.parquet",
        "folder": folder,
        "data folder": tmp_path,
        "pattern": folder / "train-*.parquet",
    }[route]
    found = open_images(path)
    tarred = open_images(write(tmp_path / "x.tar", tar_of_tars()))
    assert found.classes == tarred.classes
    assert found.labels.dtype == np.int64 and found.labels.tolist() == LABELS
    assert len({found.name(i) for i in range(6)}) == 6
    last = "n15075141/train-00000-of-00002/000005" if route == "file" else "n15075141/train-00001-of-00002/000000"
    assert found.name(5) == found.name(-1) == last
    assert pixels(found) == pixels(tarred)
    assert pixels(pickle.loads(pickle.dumps(found))) == pixels(tarred)
    with pytest.raises(IndexError):
        found.read(6)
    if route == "data folder":
        assert len(open_images(folder / "validation-*.parquet")) == 1


def test_a_parquet_file_that_expands_to_gigabytes_is_refused(tmp_path: pathlib.Path) -> None:
    """All rows refer to one value of 70 MB, so that the file has kilobytes."""
    arrow = pytest.importorskip("pyarrow")
    value = arrow.DictionaryArray.from_arrays(arrow.array([0] * 16, arrow.int32()), arrow.array([bytes(7 * 10**7)]))
    table = arrow.table({"image": arrow.StructArray.from_arrays([value], ["bytes"]), "label": [0] * 16})
    pytest.importorskip("pyarrow.parquet").write_table(
        table, tmp_path / "x.parquet", compression="zstd", store_schema=False
    )
    assert (tmp_path / "x.parquet").stat().st_size < 10**6
    with pytest.raises(UserError, match="it expands to far more bytes than it has"):
        open_images(tmp_path / "x.parquet")


def test_parquet_in_any_order(tmp_path: pathlib.Path) -> None:
    """Each thread continues from the row group that it read last; it may also go back and jump."""
    names = [f"n01440764/{i}.JPEG" for i in range(100)]
    found = open_images(parquet(tmp_path / "x.parquet", names, row_group_size=40))
    order = [*range(100), *reversed(range(100)), *np.random.default_rng(0).integers(0, 100, 200).tolist()]
    right = expected(names)
    assert all(found.read(i).tobytes() == right[i] for i in order)


def test_classes_of_parquet(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.parquet"
    assert open_images(parquet(path, ORDER)).classes == imagenet().wordnet_ids  # 1000 without names
    assert open_images(parquet(path, ORDER[:4])).classes == ("0", "1")
    assert open_images(parquet(path, ORDER[:4], ["tench", "goldfish", "newt"])).classes == ("tench", "goldfish", "newt")
    others = [f"thing {i}" for i in range(1000)]
    assert open_images(parquet(path, ORDER, others)).classes == tuple(others)
    fails(parquet(path, ORDER, ["one", "two"]), "names 2 classes and has a label 999")


def test_parquet_without_pyarrow(tmp_path, monkeypatch) -> None:
    path = parquet(tmp_path / "x.parquet", ORDER)
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    fails(path, "needs pyarrow: pip install 'bitdance[data]'")


def test_errors_of_parquet(tmp_path: pathlib.Path) -> None:
    pa = pytest.importorskip("pyarrow")
    path = tmp_path / "x.parquet"
    image = {"bytes": jpeg("x"), "path": "x"}
    fails(write_table(path, pa.table({"img": [image], "label": [0]})), "the columns img, label", "'image' with 'bytes'")
    fails(write_table(path, pa.table({"image": [image]})), "the columns image, where")
    fails(write_table(path, pa.table({"image": ["x.jpg"], "label": [0]})), "'image' with 'bytes'")
    fails(write_table(path, pa.table({"image": [image], "label": ["cat"]})), "an integer 'label'")
    fails(write_table(path, pa.table({"image": [image], "label": [-1]})), "labels from -1 to -1")
    fails(write_table(path, pa.table({"image": [image], "label": [1 << 16]})), "labels from 65536 to 65536")
    fails(write_table(path, pa.table({"image": [image] * 2, "label": [0, None]})), "row 1 has no label")
    bomb = pa.table({"image": [{"bytes": bytes(1 << 26), "path": "x"}] * 2, "label": [0, 0]})
    fails(write_table(path, bomb, compression="zstd", use_dictionary=False), "expands to far more bytes")
    many = pa.table(
        {"image": pa.nulls((1 << 24) + 1, bomb.schema.field("image").type), "label": np.zeros((1 << 24) + 1, int)}
    )
    fails(write_table(path, many, row_group_size=1 << 25), "more than 16777216 rows")
    empty = pa.table({"image": [image], "label": [0]}).slice(0, 0)
    fails(write_table(path, empty), "no images", "have no rows")
    good = parquet(path, ORDER).read_bytes()
    fails(write(path, good[:-20]), "cannot read", "download or make it again")
    fails(path, "no split 'test'", split="test")
    path.unlink()
    fails(tmp_path / "x-*.parquet", "no such file or folder")
    rows = [{"bytes": b"hello", "path": "x"}, {"bytes": None, "path": "x"}, image]
    found = open_images(write_table(path, pa.table({"image": rows, "label": [0, 0, 0]})))
    with pytest.raises(UserError, match=f"cannot read the image in row 0 of {path}: it is in no known image format"):
        found.read(0)
    with pytest.raises(UserError, match=f"cannot read the image in row 1 of {path}: the row holds no bytes"):
        found.read(1)
    assert found.read(2).size == (13, 12)
    path.unlink()
    with pytest.raises(UserError, match="cannot read the image in row 0 of"):
        pickle.loads(pickle.dumps(found)).read(0)


def test_mutated_parquet_raises_only_user_errors(tmp_path: pathlib.Path) -> None:
    good = parquet(tmp_path / "x.parquet", NAMES).read_bytes()
    bad = [*mutations(good, 50, 4, 4, len(good) - 8), *mutations(good, 50, 4, len(good) - 1200, len(good) - 8)]
    assert sum(is_refused(write(tmp_path / "x.parquet", data)) for data in bad) > 30


# ------------------------------------------------------------ classes


def test_names_of_imagenet_are_known_in_every_spelling() -> None:
    known = imagenet()
    assert are_imagenet(known.wordnet_ids or ())
    assert are_imagenet([names[0] for names in known.names])
    joined = [", ".join(names) for names in known.names]
    assert are_imagenet(joined)
    assert are_imagenet(["something else", *joined[1:]])
    assert not are_imagenet(joined[:999])
    assert not are_imagenet(joined[1:] + joined[:1])


@pytest.mark.parametrize("folders", [("n01440764", "cat"), ("n01440764", "n99999999")])
def test_other_folders_are_numbered_in_order(tmp_path: pathlib.Path, folders) -> None:
    found = open_images(write(tmp_path / "x.tar", tar({f"{folder}/x.jpg": jpeg(folder) for folder in folders})))
    assert found.classes == tuple(sorted(folders)) and found.labels.tolist() == [0, 1]


def config(images: ImageDataset, num_classes: int | None = None) -> BitDanceConfig:
    sizes = ModelSizes(num_classes=num_classes)
    return _complete_sizes(sizes, small.autoencoder().config, 16, images)


def test_a_model_stores_the_names_of_its_classes(tmp_path: pathlib.Path) -> None:
    imagenets = open_images(write(tmp_path / "imagenet.tar", tar_of_tars()))
    own = open_images(write(tmp_path / "own.tar", tar({"dog/x.jpg": jpeg("x"), "cat/x.jpg": jpeg("x")})))
    model = config(imagenets)
    assert model.num_classes == 1000 and model.class_names == imagenet().wordnet_ids
    assert ClassNames.from_labels(model.class_names).label(1) == "goldfish"
    with pytest.raises(UserError, match=r"1000 classes, ImageNet's, .* more than num_classes=3: raise it"):
        config(imagenets, 3)
    assert config(own).class_names == ("cat", "dog")
    assert config(own, 4).class_names == ("cat", "dog", "class 2", "class 3")
    assert config(own, 1000).class_names[0] == "cat"  # not ImageNet's, although there are 1000
