"""From a name to a file of weights: `demo`, a released model, the folder of a training run, or a path."""

from __future__ import annotations

import importlib.resources
import json
import os
import pathlib
import re
from typing import Literal

from bitdance.config import RELEASED_MODELS
from bitdance.runtime.errors import UserError
from bitdance.weights import hub

DEMO = "demo"

Part = Literal["model", "autoencoder"]


def find_weights(name: str | os.PathLike[str], part: Part = "model") -> pathlib.Path:
    """Finds a file of weights; a released file that is missing is downloaded.

    Args:
        name: `demo`; a released model such as `B-16X` or `BitDance-B-16X`, in any case; `autoencoder`, the released
            one; the folder of a training run, whose finished weights, or else newest checkpoint, are meant; or a file.
        part: the network to find for `demo`, or in a folder with both.

    Raises:
        UserError: there is no such file, or it cannot be downloaded.
    """
    text = os.fspath(name)
    if text == DEMO:
        return _asset(f"demo_{part}.safetensors")
    path = pathlib.Path(text).expanduser()
    if path.is_dir():
        return _find_in_run(path, part)
    released = hub.released_name(text)
    if released or (text == "autoencoder" and not path.exists()):
        file = RELEASED_MODELS[released].file if released else hub.AUTOENCODER_FILE
        return hub.find(hub.FOLDER / file) or _download(released or "autoencoder")
    if found := hub.find(path):
        return found
    files = {release.file.lower(): key for key, release in RELEASED_MODELS.items()}
    files[hub.AUTOENCODER_FILE.lower()] = "autoencoder"
    if meant := files.get(path.name.lower()):
        raise UserError(f"{path} does not exist: download it with `bitdance download {meant} --output {path.parent}`.")
    known = ", ".join(f"BitDance-{key}" for key in RELEASED_MODELS) if part == "model" else "autoencoder"
    raise UserError(f"there is no {part} {text!r}: name a file, the folder of a run, {DEMO}, or {known}.")


def find_autoencoder_of(model: pathlib.Path) -> pathlib.Path:
    """Finds the autoencoder of a file without one: beside it, or as recorded in the settings of its run.

    Raises:
        UserError: there is none.
    """
    if model == _asset("demo_model.safetensors"):
        return _asset("demo_autoencoder.safetensors")
    for place in (model.parent / hub.AUTOENCODER_FILE, model.parent / "autoencoder.safetensors"):
        if place.exists():
            return place
    try:
        settings = json.loads((model.parent / "settings.json").read_text())
        return find_weights(settings["run"]["autoencoder"], "autoencoder")
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if model in (hub.find(hub.FOLDER / release.file) for release in RELEASED_MODELS.values()):
        return _download("autoencoder")
    raise UserError(f"{model} holds no autoencoder, and there is none beside it: name one with `autoencoder`.")


def _find_in_run(folder: pathlib.Path, part: Part) -> pathlib.Path:
    other = "autoencoder" if part == "model" else "model"
    checkpoints = [path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+\.safetensors", path.name)]
    newest = sorted(checkpoints, key=lambda path: int(path.stem.partition("-")[2]))[-1:]
    for path in (folder / f"{part}.safetensors", *newest, folder / f"{other}.safetensors"):
        if path.is_file():
            return path
    raise UserError(f"{folder} holds no weights yet: name another folder, or a file.")


def _download(name: str) -> pathlib.Path:
    (result,) = hub.download([name])
    return result.path


def _asset(name: str) -> pathlib.Path:
    return pathlib.Path(str(importlib.resources.files("bitdance") / "assets" / name))
