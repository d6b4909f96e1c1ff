"""Atomic writing, leftovers of killed processes, and image grids."""

from __future__ import annotations

import errno
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import ImageFont

from bitdance.runtime import atomic_files
from bitdance.runtime.atomic_files import atomic_write, remove_leftovers
from bitdance.runtime.errors import UserError
from bitdance.sampling import image_grid as image_grid_module
from bitdance.sampling.image_grid import image_grid, rows_without_names


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("old", [None, "old"])
def test_the_file_appears_when_it_is_complete(tmp_path, old):
    path = tmp_path / "a" / "b" / "file.txt"
    if old:
        path.parent.mkdir(parents=True)
        path.write_text(old)
    with atomic_write(str(path)) as temporary:
        assert temporary.parent == path.parent, "a rename between file systems would not be atomic"
        temporary.write_text("new")
        assert path.read_text() == old if old else not path.exists()
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), FileNotFoundError(2, "gone", "other")])
def test_an_error_inside_is_raised_and_leaves_nothing(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(type(error)) as raised, atomic_write(path) as temporary:
        temporary.write_text("half")
        raise error
    assert raised.value is error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["file/inside", "file/deeper/inside"])
def test_a_file_instead_of_a_folder(tmp_path, name):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"cannot make the folder .*file.*another place"), atomic_write(tmp_path / name):
        pytest.fail("nothing can be written there")
    assert (tmp_path / "file").read_text() == "no folder"


def test_a_folder_instead_of_the_file(tmp_path):
    (tmp_path / "taken").mkdir()
    with (
        pytest.raises(UserError, match=r"cannot write .*taken: Is a directory; delete it\."),
        atomic_write(tmp_path / "taken") as temporary,
    ):
        temporary.write_text("new")
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "a"))

    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    with (
        pytest.raises(UserError, match=r"cannot make the folder .*Permission denied; choose another place"),
        atomic_write(tmp_path / "a" / "b" / "file.txt"),
    ):
        pytest.fail("nothing can be written there")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"cannot write .*Permission denied"), atomic_write(tmp_path / "f") as temporary:
        temporary.write_text("new")
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_devices_and_pipes_are_not_replaced(kind, tmp_path):
    path = tmp_path / "output"
    if kind == "device":
        path.symlink_to(os.devnull)  # a link, so that a failure of this test replaces no device
    else:
        os.mkfifo(path)
    with pytest.raises(UserError, match="it is a device, pipe or socket"), atomic_write(path):
        raise AssertionError("nothing is written")
    assert not path.is_file() and os.listdir(tmp_path) == ["output"]


def test_too_long_a_name(tmp_path):
    path = tmp_path / ("x" * 300)
    with pytest.raises(UserError, match=r"cannot write .*choose another place"), atomic_write(path) as file:
        file.write_text("new")


@pytest.mark.parametrize("where", ["fsync", "write"])
def test_no_space_left(tmp_path, monkeypatch, where):
    path = tmp_path / "file.txt"
    path.write_text("old")
    if where == "fsync":
        monkeypatch.setattr(os, "fsync", no_space)
    message = r"cannot write .*file.txt: No space left.*free some space"
    with pytest.raises(UserError, match=message), atomic_write(path) as file:
        file.write_text("half")
        if where == "write":
            no_space()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def images_of(count, height=3, width=2):
    """Image i has the value 10 i, except for its top left pixel."""
    images = np.stack([np.full((height, width, 3), 10 * i, np.uint8) for i in range(count)])
    images[:, 0, 0] = (255, 0, 7)
    return images


def test_positions_in_a_grid():
    sheet = np.asarray(image_grid(images_of(5), columns=3))
    assert sheet.shape == (2 * (3 + 2) + 2, 3 * (2 + 2) + 2, 3)
    expected = np.full_like(sheet, 255)
    for i, image in enumerate(images_of(5)):
        top, left = 2 + 5 * (i // 3), 2 + 4 * (i % 3)
        expected[top : top + 3, left : left + 2] = image
    assert np.array_equal(sheet, expected), "the sixth cell and all gaps are white"


def test_a_grid_enlarges_without_interpolation():
    images = images_of(2)
    sheet = np.asarray(image_grid(images, columns=2, scale=4))
    for i, image in enumerate(images):
        assert np.array_equal(sheet[2:14, 2 + 10 * i : 10 + 10 * i], image.repeat(4, axis=0).repeat(4, axis=1))


def test_labels_are_left_of_their_rows():
    images, labels = images_of(4, 32, 32), ["short", "a rather longer label"]
    plain = np.asarray(image_grid(images, columns=2))
    labelled = np.asarray(image_grid(images, columns=2, labels=labels))
    margin = labelled.shape[1] - plain.shape[1]
    assert labelled.shape[0] == plain.shape[0]
    assert np.array_equal(labelled[:, margin:], plain)
    ink = [(labelled[34 * row : 34 * (row + 1), :margin] < 128).all(axis=-1) for row in range(2)]
    assert 0 < ink[0].sum() < ink[1].sum()
    assert not ink[1][:, 0].any(), "the longest label fits"


def test_labels_have_no_boxes_of_missing_characters(monkeypatch):
    default = ImageFont.load_default(14)
    name = "Stra\u00dfe"
    if image_grid_module._can_draw(default, name):
        pytest.skip("this version of Pillow has a larger font")
    for label in (name, "\u72ac", "\u043a\u043e\u0448\u043a\u0430"):
        fonts = list(image_grid_module._load_fonts(14))
        text, font = image_grid_module._fit_label(label, 0, fonts)
        assert image_grid_module._can_draw(font, text) and (text == label) == (font is not fonts[0])
    monkeypatch.setattr(image_grid_module, "FONTS", ())
    monkeypatch.setattr(image_grid_module, "_matplotlib_fonts", list)
    assert rows_without_names(["cat", "\u72ac", "row 3"]) == "row 2 is \u72ac"
    alone = list(image_grid_module._load_fonts(14))
    for label, text in (
        ("na\u00efve", "naive"),
        ("\u72ac", "row 3"),
        ("Sch\u00f6ne Schiffe \u8239", "row 3"),
        ("\x1b[31m", "[31m"),
        ("x" * 70_000, "x" * 57 + "..."),
    ):
        assert image_grid_module._fit_label(label, 2, alone) == (text, alone[0])


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    """The first is a temporary file of `atomic_write`, the second one of safetensors."""
    left = [".model.safetensors.4711.0123abcd.tmp", ".tmpF5E8Ak"]
    kept = ["model.safetensors", ".hidden", "notes.tmp", ".tmp", ".tmpfiles", ".mine.tmp", ".tmpABCDEF.txt"]
    for name in left + kept:
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of a process's files")
def test_leftovers_of_safetensors_are_removed(tmp_path):
    """The system kills a process that exceeds its limit of the size of a file."""
    script = """
import resource, signal, sys
import torch
from safetensors.torch import save_file
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))
save_file({"a": torch.zeros(10**6)}, sys.argv[1])
"""
    target = tmp_path / "a.safetensors"
    process = subprocess.run([sys.executable, "-c", script, str(target)], capture_output=True)
    assert process.returncode == -signal.SIGXFSZ
    remove_leftovers(tmp_path)
    target.unlink(missing_ok=True)  # of a version of safetensors that writes in place
    assert list(tmp_path.iterdir()) == []


def test_only_small_regular_files_of_json_are_read(tmp_path, monkeypatch):
    """A pipe would be waited for, and a link to /dev/zero read until the memory is full."""
    monkeypatch.setattr(atomic_files, "MAX_JSON", 300_000)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "large").write_text('{"a": "' + "b" * 300_000 + '"}')
    (tmp_path / "deep").write_text("[" * 200_000)
    for name, reason in (("pipe", "regular"), ("endless", "regular"), ("large", "300009 bytes"), ("deep", "deeply")):
        with pytest.raises(UserError, match=rf"{name} cannot be read \(it .*{reason}.*\): delete it\."):
            atomic_files.read_json(tmp_path / name, "delete it")
    (tmp_path / "good").write_text('{"a": 1}')
    assert atomic_files.read_json(tmp_path / "good", "delete it") == {"a": 1}
