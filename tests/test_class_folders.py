"""What people's folders of pictures look like, and how their pictures are decoded."""

from __future__ import annotations

import io
import os
import pathlib
import sys
import types
import zipfile

import numpy as np
import pytest
import small
from PIL import Image

from bitdance.config import ModelSizes
from bitdance.data import decoding
from bitdance.data.bad_images import BadImages
from bitdance.data.images import open_images
from bitdance.metrics.evaluation_config import EvaluationConfig
from bitdance.metrics.image_sources import open_source
from bitdance.metrics.references import _cache_key
from bitdance.runtime.errors import UserError
from bitdance.training.setup import train_model
from bitdance.training.status import describe_run, status_rows
from bitdance.training.train_config import LossConfig
from bitdance.weights import weights_file


def save(path: pathlib.Path, image: Image.Image | None = None, **options) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (16, 16), "red")).save(path, **options)
    return path


def fill(folder: pathlib.Path, *names: str) -> pathlib.Path:
    """Writes images, and empty files under other names."""
    for name in names:
        save(folder / name) if decoding.is_image(name) else (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.png"], "1 image of 1 class (pictures)"),
        (
            ["a.png", "x.txt", ".DS_Store", "Thumbs.db"],
            "1 image of 1 class (pictures), 1 file ignored (1 not an image: .txt)",
        ),
        (["animals/Cat/a.png", "plants/Tall rose/a.png"], "2 images of 2 classes (Cat, Tall rose)"),
        (["n01440764/a.png", "n01443537/images/deep/b.png"], "2 images of 2 classes (n01440764, n01443537)"),
        (["cat/images/a.png", "猫/images/a.png"], "2 images of 2 classes (cat, 猫)"),
        ([f"{c}/a.png" for c in "abcdefghij"], "10 images of 10 classes (a, b, c, d, e, f, g, h, ...)"),
        (
            ["a/a.png", "b/a.png", "z.png", "x.txt", "a/y.txt"],
            "2 images of 2 classes (a, b), "
            "3 files ignored (2 not images: .txt; 1 picture beside the class folders: z.png)",
        ),
        (
            ["cat/a.png", "cat/a.HEIC", "cat/b.heif"],
            "1 image of 1 class (cat), 2 HEIC files ignored: pip install 'bitdance[heic]' reads them",
        ),
    ],
)
def test_what_is_found(tmp_path, monkeypatch, names, expected):
    monkeypatch.setattr(decoding, "reads_heif", lambda: False)
    assert open_images(fill(tmp_path / "pictures", *names)).summary == f"{tmp_path / 'pictures'}: {expected}"


def test_a_folder_of_training_images_beside_held_out_ones(tmp_path):
    folder = fill(tmp_path / "pictures", "Train/cat/a.png", "Train/dog/a.png", "test/cat/a.png", "valid/cat/b.png")
    found = open_images(folder)
    assert found.summary == f"{folder / 'Train'}: 2 images of 2 classes (cat, dog), valid/ held out"
    assert found.held_out == folder / "valid" and found.name(0) == "cat/a.png" and found.read(0).size == (16, 16)
    flat = open_images(fill(tmp_path / "flat", "train/a.png", "val/a.png"))
    assert (len(flat), flat.classes) == (1, ("flat",))
    assert open_images(fill(tmp_path / "alone", "train/cat/a.png", "train/dog/a.png")).classes == ("cat", "dog")
    assert open_images(fill(tmp_path / "toys", "train/a.png", "val/a.png", "ball/a.png")).classes == (
        "ball",
        "train",
        "val",
    )


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["cat/a.png", "cat/b.png", "dog/old/a.png"], ["2 in folders such as cat, 1 in folders such as dog/old"]),
        (["cat/2020/a.png", "dog/2020/a.png", "dog/2021/a.png"], ["one name, cat/2020 and dog/2020"]),
        (["a.png", "b.png", "old/a.png"], ["2 pictures such as a.png beside folders with 1"]),
        (["cat/a.png", "dog/a.heic"], ["class folder 'dog'", "holds no images but 1 HEIC file (pip install"]),
        (["cat/a.heic", "dog/a.heic"], ["no images in", "but 2 HEIC files"]),
        (["a/" * 65 + "a.png"], ["more than 64 folders deep"]),
        (["cat/a.png", "dog/a.txt"], ["class folder 'dog'", "holds no images; fill it"]),
    ],
)
def test_what_is_unclear_is_asked(tmp_path, monkeypatch, names, words):
    monkeypatch.setattr(decoding, "reads_heif", lambda: False)
    with pytest.raises(UserError) as error:
        open_images(fill(tmp_path / "pictures", *names))
    assert all(word in str(error.value) for word in [*words, str(tmp_path)]), error.value


CORNER = np.zeros((4, 6, 3), np.uint8)
CORNER[0, 0] = 255


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tif"])
def test_own_pictures_are_turned_upright(tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(CORNER)
    opened = [
        open_images(save(tmp_path / name / f"x.{kind}", stored, exif=exif).parents[1])
        for name in ("a/cat", "b/n01440764")
    ]
    own, published = (np.asarray(found.read(0)) for found in opened)
    assert own.shape[:2] == ((6, 4) if orientation > 4 else (4, 6)) and own.sum() == 765
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    assert own[corner[orientation]].all()
    assert (opened[0].upright, opened[1].upright) == (True, False)
    if kind == "png":
        assert np.array_equal(published, CORNER)


def test_the_decoding_is_part_of_the_fingerprint(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    found = open_images(save(tmp_path / "a" / "cat" / "x.png", exif=exif).parents[1])
    before = found.digest
    found.upright = False
    assert found.digest != before
    flat = save(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG", Image.fromarray(CORNER), exif=exif).parent
    assert open_source(flat).shape == (1, 4, 6, 3)
    save(flat / "x.jpg", Image.fromarray(CORNER), exif=exif)
    assert open_source(flat).shape == (2, 6, 4, 3)
    source = open_source(flat / "x.jpg")
    assert source.shape == (1, 6, 4, 3)
    key = _cache_key(source, EvaluationConfig())
    source.upright = False
    assert _cache_key(source, EvaluationConfig()) != key


def test_a_reference_is_known_by_all_its_files(tmp_path):
    """Also by those that links lead to; another folder with as many images is another reference."""
    keys = []
    for name in ("a", "b"):
        save(tmp_path / "there" / name / "0.png")
        (tmp_path / name).mkdir()
        (tmp_path / name / "cat").symlink_to(tmp_path / "there" / name)
        keys.append(_cache_key(open_source(tmp_path / name, 8), EvaluationConfig()))
    os.utime(tmp_path / "there" / "a" / "0.png", ns=(0, 1))
    keys.append(_cache_key(open_source(tmp_path / "a", 8), EvaluationConfig()))
    assert len(set(keys)) == 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_is_laid_on_white(mode):
    image, options = Image.new("RGBA", (2, 1), (0, 0, 0, 255)), {}
    image.putpixel((1, 0), (0, 0, 0, 0))
    if mode == "RGB":
        image, options = Image.fromarray(np.array([[[0, 0, 0], [9, 9, 9]]], np.uint8)), {"transparency": (9, 9, 9)}
    data = io.BytesIO()
    image.convert(mode).save(data, "PNG", **options)
    found = np.asarray(decoding.decode_image(data.getvalue(), "x", upright=True))
    assert found.tolist() == [[[0, 0, 0], [255, 255, 255]]]
    assert np.asarray(decoding.decode_image(data.getvalue(), "x")).max() < 10


def test_a_lack_of_memory_is_not_a_bad_image(monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MemoryError):
        decoding.decode_image(bytes(100), "x.jpg")


def test_heic_is_read_by_pillow_heif(monkeypatch):
    data = b"\0\0\0\x18ftypheic" + bytes(20)
    monkeypatch.setattr(decoding, "reads_heif", lambda: False)
    with pytest.raises(UserError, match=r"x\.jpg: it is a HEIC file \(pip install 'bitdance\[heic\]' reads them\)"):
        decoding.decode_image(data, "x.jpg")
    calls = []
    module = types.SimpleNamespace(register_heif_opener=lambda: calls.append(1))
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    monkeypatch.setattr(decoding, "reads_heif", lambda: True)
    monkeypatch.setattr(Image, "open", lambda file, formats: Image.new("RGB", (3, 2)) if formats == ("HEIF",) else None)
    decoding._register_heif.cache_clear()
    assert [decoding.decode_image(data, "x").size for _ in range(2)] == [(3, 2)] * 2 and calls == [1]
    assert decoding.is_image("a/X.HEIC")
    decoding._register_heif.cache_clear()


@pytest.mark.parametrize("fits", [True, False])
def test_a_run_uses_held_out_pictures_and_skips_unreadable_ones(tmp_path, capsys, quick_previews, fits):
    folder = tmp_path / "pictures"
    small.pictures(folder / "train", each=3)
    small.pictures(folder / "val", each=2)
    if not fits:
        (folder / "val" / "class-0").rename(folder / "val" / "horse")
    (folder / "train" / "class-0" / "0.png").write_bytes(b"")
    weights_file.save(tmp_path / "autoencoder.safetensors", small.autoencoder())
    run, sizes = small.train_config(folder, tmp_path / "run", max_steps=2), ModelSizes(**small.SIZES, parallel_num=4)
    train_model(run, sizes, LossConfig(), tmp_path / "autoencoder.safetensors", "cpu")
    out, err = capsys.readouterr()
    assert "from 8 images (1 unreadable): 2 steps" in out
    assert f"{folder / 'train'}: 9 images of 3 classes (class-0, class-1, class-2), val/ held out\n" in err
    assert any("val_loss" in line for line in small.read_log(tmp_path / "run")) == fits
    assert f"{folder / 'val'}: 6 images" in err if fits else "no held-out images are used: " in err
    train_model(run, sizes, LossConfig(), tmp_path / "autoencoder.safetensors", "cpu")
    assert "from 8 images (1 unreadable): 2 steps" in capsys.readouterr().out, "without reading an image"
    facts = describe_run(tmp_path / "run")
    assert facts["unreadable_images"] == 1 and ("unreadable images", "1") in status_rows(facts)
    assert ("unreadable images", "1, met by the first process") in status_rows({**facts, "processes": 2})


def test_more_unreadable_pictures_than_a_tenth_end_a_run(tmp_path):
    found = open_images(fill(tmp_path, *(f"cat/{number}.png" for number in range(150))))
    assert BadImages(None, found).limit == 15 and BadImages(3, found).limit == 3 and BadImages(None).limit == 100
    found.upright = False  # as ImageNet
    assert BadImages(None, found).limit == 100


def test_folders_that_links_or_depth_make_endless(tmp_path):
    folders = [tmp_path / "linked" / name for name in "abcdef"]
    for folder in folders:
        save(folder / "1.png")
        for other in folders:
            if other != folder:
                (folder / f"to-{other.name}").symlink_to(other)  # six folders, nearly 2000 ways
    with pytest.raises(UserError, match="lead to one folder more than 100 times"):
        open_images(tmp_path / "linked")
    save(pathlib.Path(tmp_path / "deep", *"x" * 400, "1.png"))
    with pytest.raises(UserError, match="more than 64 folders deep"):
        open_images(tmp_path / "deep")


def test_a_zip_of_names_that_begin_with_a_dot_and_a_slash(tmp_path):
    pixels = (small.pictures(tmp_path / "pictures") / "class-0" / "0.png").read_bytes()
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for name in ("./a/0.png", "./b/0.png"):
            archive.writestr(name, pixels)
    images = open_images(tmp_path / "pictures.zip")
    assert images.classes == ("a", "b") and images.read(1).size == images.read(0).size


def test_a_zip_of_backslashes_is_refused_since_all_would_be_one_class(tmp_path):
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for name in ("cat\\1.png", "dog\\2.png"):
            archive.write(save(tmp_path / "1.png"), name)
    with pytest.raises(UserError, match="make it again with another program"):
        open_images(tmp_path / "pictures.zip")
