"""Finding and loading what a command line names: the demo model, a released one, or files."""

from __future__ import annotations

import importlib.resources
import pathlib
import sys
from typing import TYPE_CHECKING, Literal

from bitdance.config import RELEASED_MODELS, BitDanceConfig
from bitdance.runtime.errors import UserError
from bitdance.weights import hub

if TYPE_CHECKING:
    import torch

    from bitdance.data.class_names import ClassNames
    from bitdance.models.autoencoder import Autoencoder
    from bitdance.models.transformer import BitDance
    from bitdance.weights.weights_file import Contents, Weights

DEMO = "demo"

Precision = Literal["auto", "none", "bf16"]


def find_model(name: str) -> pathlib.Path:
    """The file of a model: `demo`, a released model's name, or a path; a released model is fetched if it is not there.

    Raises:
        UserError: there is no such file, or it cannot be fetched.
    """
    if name == DEMO:
        return _asset("demo_model.safetensors")
    released = hub.released_name(name)
    path = hub.FOLDER / RELEASED_MODELS[released].file if released else pathlib.Path(name)
    if found := hub.find(path):
        return found
    if released:
        return _fetch(released)
    if meant := next(
        (key for key, release in RELEASED_MODELS.items() if release.file.lower() == path.name.lower()), None
    ):
        raise UserError(f"{path} is not there: fetch it with `bitdance download {meant} --folder {path.parent}`.")
    known = ", ".join(f"BitDance-{key}" for key in RELEASED_MODELS)
    raise UserError(f"there is no model {name!r}: name a file, {DEMO}, or one of {known}.")


def find_autoencoder(name: str | None, model: Contents) -> pathlib.Path | Contents:
    """The autoencoder that goes with a model: the one named, the one inside the file, or the one that lies beside it.

    That of a released model, where it was put by `bitdance download`, is fetched if it is not there.

    Raises:
        UserError: there is none, or it cannot be fetched.
    """
    if name is None and model.path == _asset("demo_model.safetensors"):
        name = DEMO
    if name is not None:
        return find_autoencoder_alone(name)
    if "autoencoder" in model.states:
        return model
    for place in (model.path.parent / hub.AUTOENCODER_FILE, model.path.parent / "autoencoder.safetensors"):
        if place.exists():
            return place
    if model.path in (hub.find(hub.FOLDER / release.file) for release in RELEASED_MODELS.values()):
        return _fetch("autoencoder")
    raise UserError(f"{model.path} holds no autoencoder and none lies beside it: name one with --autoencoder.")


def find_autoencoder_alone(name: str) -> pathlib.Path:
    """The file of an autoencoder that is named without a model: `demo`, or a path."""
    return _asset("demo_autoencoder.safetensors") if name == DEMO else pathlib.Path(name)


def load_pair(
    model_name: str, autoencoder_name: str | None, weights: Weights | None, device: torch.device, precision: Precision
) -> tuple[BitDance, Autoencoder, Contents]:
    """Loads a model and its autoencoder, casts them once and moves them to the device.

    Raises:
        UserError: a file is missing or damaged, or the two do not fit each other.
    """
    from bitdance.sampling.sampler import check_fit
    from bitdance.weights import weights_file

    contents = weights_file.read(find_model(model_name))
    dtype = choose_dtype(precision, device)
    model = weights_file.load_model(contents, weights, dtype)
    place = find_autoencoder(autoencoder_name, contents)
    source = place if isinstance(place, weights_file.Contents) else weights_file.read(place)
    autoencoder = weights_file.load_autoencoder(source, dtype)
    check_fit(model, autoencoder)
    trained_with = contents.metadata.get("autoencoder_digest")
    if trained_with and trained_with != weights_file.digest(source.states["autoencoder"]):
        print(
            f"bitdance: warning: {contents.path} was not trained with {source.path}: unless that is the same "
            "autoencoder in another precision, the pictures will show nothing.",
            file=sys.stderr,
        )
    return model.to(device), autoencoder.to(device), contents


def choose_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype to compute in without gradients; `auto` is bf16 on GPUs that compute with it, else float32."""
    import torch

    from bitdance.runtime.devices import computes_bf16

    is_bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda" and computes_bf16(device))
    return torch.bfloat16 if is_bf16 else torch.float32


def class_names(config: BitDanceConfig) -> ClassNames:
    """The names of a model's classes: its own, ImageNet's for 1000 nameless ones, else numbers."""
    from bitdance.data.class_names import ClassNames, imagenet, numbered

    if config.class_names:
        return ClassNames.from_labels(config.class_names)
    return imagenet() if config.num_classes == 1000 else numbered(config.num_classes)


def _fetch(name: str) -> pathlib.Path:
    """Fetches one released file."""
    (file,) = hub.download([name])
    return file.path


def _asset(name: str) -> pathlib.Path:
    return pathlib.Path(str(importlib.resources.files("bitdance") / "assets" / name))
