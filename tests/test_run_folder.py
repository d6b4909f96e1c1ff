"""Run folders: the lock, the settings, and which of them may change on resume."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from typing import Any

import pytest
import small
import torch

from bitdance.runtime import run_folder
from bitdance.runtime.errors import UserError
from bitdance.runtime.process_group import World
from bitdance.runtime.run_folder import (
    EXTEND,
    FREE,
    STORED,
    Machine,
    check_apart,
    check_settings,
    compare,
    exclusive,
)

CPU = torch.device("cpu")
SINGLE = World(0, 1, CPU)

RAISED = " (it can only be raised, and only after the end of the run)"


@dataclasses.dataclass(frozen=True)
class Settings:
    seed: int
    path: pathlib.Path = pathlib.Path("a")
    sizes: tuple[int, ...] = (1, 2)
    workers: int = dataclasses.field(default=4, metadata=FREE)
    threads: int = dataclasses.field(default=1, metadata=STORED)
    epochs: int = dataclasses.field(default=10, metadata=EXTEND)


def stored(**changes: Any) -> dict[str, Any]:
    """Returns the settings as a file holds them; a field of None is missing."""
    whole = {"seed": 0, "path": "a", "sizes": [1, 2], "workers": 4, "threads": 1, "epochs": 10, **changes}
    return {"run": {name: value for name, value in whole.items() if value is not None}}


@pytest.mark.parametrize(
    ("found", "ours", "differences"),
    [
        (stored(), {}, []),
        (stored(seed=1), {}, ["`seed` was 1, is 0"]),
        (stored(path="b", sizes=[1, 3]), {}, ["`path` was b, is a", "`sizes` was [1, 3], is [1, 2]"]),
        (stored(workers=9, threads=9), {}, []),
        (stored(path=None, sizes=None), {}, []),  # missing fields have their defaults
        (stored(path=None), {"path": pathlib.Path("b")}, ["`path` was a, is b"]),
        (stored(seed=None), {}, ["`seed` was None, is 0"]),  # it has no default
        (stored(b=1, a=2), {}, ["`a` is unknown to this release", "`b` is unknown to this release"]),
        ({"run": stored()["run"], "section": {"of": "a later release"}}, {}, []),
        ({"run": [1]}, {"seed": None}, ["`?` is unknown to this release"]),
        ({}, {"seed": None}, []),
        (stored(), {"epochs": 11}, [f"`epochs` was 10, is 11{RAISED}"]),
        (stored(), {"epochs": 9}, [f"`epochs` was 10, is 9{RAISED}"]),
    ],
)  # fmt: skip
def test_compare(found, ours, differences):
    assert compare(found, {"run": Settings(**{"seed": 0, **ours})}) == differences


@pytest.mark.parametrize(("epochs", "is_allowed"), [(11, True), (10, True), (9, False)])
def test_finished_work_may_be_extended(epochs, is_allowed):
    assert (not compare(stored(), {"run": Settings(0, epochs=epochs)}, extensible=True)) == is_allowed
    assert compare(stored(epochs="many"), {"run": Settings(0, epochs=epochs)}, extensible=True)


def check(folder: pathlib.Path, is_finished: bool = False, **changes: Any) -> run_folder.ResumedSettings:
    sections, has_parts = {"run": Settings(**{"seed": 0, **changes})}, folder.exists()
    return check_settings(folder, sections, SINGLE, has_parts, lambda stored: is_finished)


def test_settings_are_written_once(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    assert check(folder) == ({"run": stored()["run"]}, [])
    path = folder / "settings.json"
    assert json.loads(path.read_text()) == {"format_version": 2, **stored()}
    monkeypatch.setattr(run_folder, "write_json", None)  # writing again would fail
    assert check(folder) == ({"run": stored()["run"]}, [])
    monkeypatch.undo()
    # The new value of a free field, the stored number of threads.
    assert check(folder, workers=8, threads=2).settings == stored(workers=8)
    assert json.loads(path.read_text())["run"] == stored(workers=8)["run"]


def test_settings_that_differ_are_refused(tmp_path):
    tmp_path /= "run"
    check(tmp_path)
    before = (tmp_path / "settings.json").read_bytes()
    message = rf"{tmp_path} belongs to a run with other settings \(`seed` was 0, is 1; `epochs` was 10, is 12 \(it can"
    with pytest.raises(UserError, match=message):
        check(tmp_path, seed=1, epochs=12)
    assert (tmp_path / "settings.json").read_bytes() == before
    resumed = check(tmp_path, is_finished=True, epochs=12)
    assert resumed == (stored(epochs=12), ["epochs extended from 10 to 12"])
    assert json.loads((tmp_path / "settings.json").read_text())["run"]["epochs"] == 12


@pytest.mark.parametrize("content", ["", "[]", "{", "{}", '"text"', "\x00", "[" * 10_000, None])
def test_damaged_settings_are_refused(tmp_path, content):
    """Also if they are missing although there are parts, which would otherwise be taken for some of these settings."""
    if content is not None:
        (tmp_path / "settings.json").write_text(content)
    with pytest.raises(
        UserError, match=f"settings.json cannot be read .*: restore it, or delete {tmp_path} to start over"
    ):
        check(tmp_path)


def test_number_of_threads():
    before = torch.get_num_threads()
    Machine.apply({"threads": before + 1}, SINGLE)
    assert torch.get_num_threads() == before + 1
    for threads in (0, None, True, "2", 257):
        with pytest.raises(UserError, match=f"threads={threads!r} in the settings is invalid"):
            Machine.apply({"threads": threads}, SINGLE)


# ------------------------------------------------------------ lock


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_only_one_process_works_in_a_folder(tmp_path, monkeypatch):
    folder = tmp_path / "parent" / "run"
    monkeypatch.setattr(run_folder, "LOCK_TIMEOUT", 0.1)

    def enter_second() -> None:
        with pytest.raises(UserError) as caught, exclusive(folder, SINGLE):
            pass
        assert str(caught.value) == f"another process works in {folder}: wait for it to finish, or stop it first."
        with exclusive(folder, World(1, 2, CPU)):  # another process of the same job
            pass

    with exclusive(folder, SINGLE):
        assert not folder.exists() and folder.with_name("run.lock").exists()
        small.run_forked(enter_second, 1)
        assert folder.with_name("run.lock").exists()
    assert list(folder.parent.iterdir()) == []
    with exclusive(folder, SINGLE):
        pass


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), UserError("stop"), StopIteration()])
def test_an_error_inside_is_raised_unchanged(tmp_path, error):
    with pytest.raises(type(error)) as raised, exclusive(tmp_path / "run", SINGLE):
        raise error
    assert raised.value is error and list(tmp_path.iterdir()) == []


def test_ctrl_c_inside_says_how_to_resume(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="run the same command again to resume"), exclusive(tmp_path, SINGLE):
        raise KeyboardInterrupt


@pytest.mark.parametrize(("output", "is_refused"), [("", True), ("run", True), ("a/run", True), ("../run", False)])
def test_a_run_folder_among_the_images_is_refused(tmp_path, output, is_refused):
    data = tmp_path / "pictures"
    data.mkdir()
    with pytest.raises(UserError, match="the folder of the data") if is_refused else contextlib.nullcontext():
        check_apart(data / output, data)


def test_leftovers_are_removed_by_the_first_process(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (".a.npz.12.0123abcd.tmp", "kept"):
        (folder / name).touch()
    with exclusive(folder, World(1, 2, CPU)):
        assert len(list(folder.iterdir())) == 2
    with exclusive(folder, SINGLE):
        assert [path.name for path in folder.iterdir()] == ["kept"]


def test_without_parts_the_settings_may_change(tmp_path):
    check_settings(tmp_path, {"run": Settings(seed=0)}, SINGLE, has_parts=False)
    check_settings(tmp_path, {"run": Settings(seed=1)}, SINGLE, has_parts=False)
    assert json.loads((tmp_path / "settings.json").read_text())["run"]["seed"] == 1
    (tmp_path / "settings.json").write_text("{")
    check_settings(tmp_path, {"run": Settings(seed=2)}, SINGLE, has_parts=False)
    with pytest.raises(UserError, match=r"`seed` was 2, is 3"):
        check_settings(tmp_path, {"run": Settings(seed=3)}, SINGLE, has_parts=True)


def test_a_folder_that_links_to_itself_is_named(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match=r"loop"), exclusive(tmp_path / "loop", SINGLE):
        pass
