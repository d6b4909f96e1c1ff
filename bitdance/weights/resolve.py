"""From a name to a file of weights: `demo`, a released model, the folder of a training run, or a path."""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import pathlib
from typing import Literal

from bitdance.config import RELEASED_MODELS
from bitdance.runtime.atomic_files import read_json
from bitdance.runtime.errors import UserError, did_you_mean
from bitdance.runtime.run_folder import SETTINGS
from bitdance.weights import hub

DEMO = "demo"

DEMO_AUTOENCODER = "demo_autoencoder.safetensors"
DEMO_MODELS = {DEMO: "1x", **{f"{DEMO}-{name}": name for name in ("1x", "4x", "16x")}}
"""The models of the package by their names; all have one autoencoder."""

Part = Literal["model", "autoencoder"]
SUFFIXES = (".pt", ".safetensors")


def find_weights(name: str | os.PathLike[str], part: Part = "model", download: bool = True) -> pathlib.Path:
    """Finds a file of weights; a released file that is missing is downloaded.

    Args:
        name: `demo`, or `demo-1x`, `demo-4x` and `demo-16x`; a released model such as `B-16X` or `BitDance-B-16X`, in
            any case; `autoencoder`, the released one; the folder of a training run, whose finished weights, or else
            newest checkpoint, are meant; a folder with one file of weights; a file; or a repository on the hub,
            `user/name`.
        part: the network to find for `demo`, or in a folder with both.
        download: whether a missing released file is downloaded; otherwise it is an error.

    Raises:
        UserError: there is no such file, or it cannot be downloaded.
    """
    if not isinstance(name, str | os.PathLike):
        raise UserError(f"{part}={name!r} is no name: give a string or a path.")
    text = os.fspath(name)
    if text in DEMO_MODELS:
        return _asset(f"demo_{DEMO_MODELS[text]}.safetensors" if part == "model" else DEMO_AUTOENCODER)
    path = pathlib.Path(os.path.expanduser(text))  # that of pathlib raises where there is no home
    if path.is_dir():
        return _find_in_run(path, part)
    released = hub.released_name(text)
    if released or (text == "autoencoder" and not path.exists()):
        key = released or "autoencoder"
        if found := hub.find(hub.FOLDER / hub.HUB_FILES[key]):
            return found
        if not download:
            raise UserError(f"{text} is not in {hub.FOLDER}: download it with `bitdance download {key}`.")
        return _download(key)
    if found := hub.find(path):
        return found
    is_local = path.parent.name != "" and path.parent.is_dir()  # a mistyped folder is not looked up on the hub
    if hub.is_repository(text) and download and path.suffix not in SUFFIXES and not is_local:
        return _find_in_run(hub.fetch_repository(text), part)
    if meant := {file.lower(): key for key, file in hub.HUB_FILES.items()}.get(path.name.lower()):
        raise UserError(f"{path} does not exist: download it with `bitdance download {meant} --output {path.parent}`.")
    known = f"{DEMO}, or autoencoder, the released one"
    if part == "model":
        known = f"{', '.join(DEMO_MODELS)}, or {', '.join(f'BitDance-{key}' for key in RELEASED_MODELS)}"
    hint = did_you_mean(text, (*DEMO_MODELS, "autoencoder", *RELEASED_MODELS))
    if is_local:
        hint = did_you_mean(path.name, (other.name for other in path.parent.glob("*")))
    raise UserError(f"there is no {part} {text!r}: {hint}name a file, the folder of a run, {known}.")


def find_autoencoder_of(model: pathlib.Path) -> pathlib.Path:
    """Finds the autoencoder of a file without one: beside it, or as recorded in the settings of its run.

    Raises:
        UserError: there is none.
    """
    if model.parent == _asset(DEMO_AUTOENCODER).parent:
        return _asset(DEMO_AUTOENCODER)
    for place in (model.parent / hub.AUTOENCODER_FILE, model.parent / "autoencoder.safetensors"):
        if place.exists():
            return place
    name = None
    with contextlib.suppress(UserError, KeyError, TypeError):
        name = read_json(model.parent / SETTINGS, "restore it")["run"]["autoencoder"]
    if isinstance(name, str):
        return find_weights(name, "autoencoder")
    if model in (hub.find(hub.FOLDER / release.file) for release in RELEASED_MODELS.values()):
        return _download("autoencoder")
    raise UserError(f"{model} holds no autoencoder, and there is none beside it: name one with `autoencoder`.")


def _find_in_run(folder: pathlib.Path, part: Part) -> pathlib.Path:
    other = "autoencoder" if part == "model" else "model"
    files = [path for path in folder.iterdir() if path.suffix in SUFFIXES]
    newest, released = list(list_checkpoints(folder).values())[:1], folder / hub.AUTOENCODER_FILE
    alone = [path for path in files if path != released]
    alone = [released] if part == "autoencoder" and released in files else alone if len(alone) == 1 else []
    for path in (folder / f"{part}.safetensors", *newest, folder / f"{other}.safetensors", *alone):
        if path.is_file():
            return path
    inside = sorted(str(path) for path in folder.iterdir() if list_checkpoints(path))
    hint = f"did you mean {inside[0]}? " if inside else ""
    raise UserError(f"{folder} holds no weights: {hint}name another folder, or a file.")


def list_checkpoints(folder: pathlib.Path) -> dict[int, pathlib.Path]:
    """Returns the checkpoints in a folder by their steps, newest first; anything else is ignored."""
    files = filter(pathlib.Path.is_file, folder.glob("checkpoint-*.safetensors"))
    named = {path.stem.removeprefix("checkpoint-"): path for path in files}
    return dict(
        sorted(((int(step), path) for step, path in named.items() if step.isdecimal() and int(step)), reverse=True)
    )


def _download(name: str) -> pathlib.Path:
    (result,) = hub.download([name])
    return result.path


def _asset(name: str) -> pathlib.Path:
    return pathlib.Path(str(importlib.resources.files("bitdance") / "assets" / name))
