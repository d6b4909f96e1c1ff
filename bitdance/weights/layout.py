"""What a file of weights holds: state dicts by name, and how the tensor names of a file divide into networks."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any

from bitdance.config import Weights
from bitdance.runtime.errors import UserError, printable

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]

CFG_SCALE, TOKENIZER_DIGEST = "cfg_scale", "tokenizer_digest"
"""In the metadata of a model's file: its guidance scale, and the digest of the encoder that made its tokens."""


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """Contents of a file of weights, before a network is built from it.

    Attributes:
        path: the file.
        layout: description of the layout, for `bitdance info`.
        states: state dicts by name: `ema`, `model`, `autoencoder`, of a checkpoint also `optimizer` and
            `discriminator`; only those that the file has. The tensors may be memory maps of the file.
        args: training arguments stored beside the weights, if any; only values that JSON has.
        config: configuration stored in the file; None for files that are not in our format.
        metadata: the other metadata of the file.
    """

    path: pathlib.Path
    layout: str
    states: dict[str, State]
    args: dict[str, Any]
    config: dict[str, Any] | None
    metadata: dict[str, str]

    @property
    def trains_autoencoder(self) -> bool:
        """Whether this is a checkpoint of an autoencoder, whose `ema` and `model` are autoencoders."""
        return self.metadata.get("network") == "autoencoder"

    @property
    def parts(self) -> tuple[str, ...]:
        """The networks that can be loaded: `model`, `autoencoder` or both."""
        has_model = not self.trains_autoencoder and (self.states.get("ema") or self.states.get("model"))
        found = {"model": has_model, "autoencoder": self.states.get("autoencoder")}
        return tuple(name for name, state in found.items() if state)

    def choose_weights(self, weights: Weights | None = None) -> Weights:
        """Returns which weights of the model to use: by default the EMA if there is one.

        Raises:
            UserError: the file does not have these weights, or no model.
        """
        candidates: tuple[Weights, ...] = (weights,) if weights else ("ema", "model")
        for name in candidates:
            if "model" in self.parts and self.states.get(name):
                return name
        names = {"ema": "EMA weights", "model": "raw weights", None: "model"}
        raise self.lacks(names.get(weights, f"weights {weights!r}"))

    def lacks(self, wanted: str) -> UserError:
        """Returns the error for something that the file does not have; it names what the file has."""
        found = ", ".join(name for name, state in self.states.items() if state) or "nothing"
        found = "a checkpoint of an autoencoder" if self.trains_autoencoder else printable(found)
        return UserError(f"{self.path} holds no {wanted}, only {found}: name another file.")


def split_state(state: State, name: str) -> dict[str, State]:
    """Divides a state dict into the network, called `name`, and the autoencoder stored in it under `vae.`."""
    inside = {key[4:]: value for key, value in state.items() if key.startswith("vae.")}
    parts = {name: {key: value for key, value in state.items() if not key.startswith("vae.")}}
    return parts | ({"autoencoder": select_autoencoder(inside)} if inside else {})


def split_bare_state(state: State) -> dict[str, State]:
    """Divides a state dict that is not inside a dictionary; its tensor names tell which network it is."""
    if "emb_norm.weight" not in state and (autoencoder := select_autoencoder(state)):
        return {"autoencoder": autoencoder}
    return split_state(state, "model")


def select_autoencoder(state: State) -> State:
    """Selects the tensors of the autoencoder; its training stores losses and discriminators beside them."""
    return {name: value for name, value in state.items() if name.startswith(("encoder.", "decoder."))}


def damaged(path: pathlib.Path, why: str = "") -> UserError:
    """Returns the error for a file that cannot be read, and why."""
    what = f"is damaged ({why})" if why else "is damaged or not a file of weights"
    remedy = "delete it" if path.name.startswith("checkpoint-") else "download or copy it again"
    return UserError(f"{path} {what}: {remedy}.")
