"""A pipeline as a folder of weights with a model card, on disk or on the Hugging Face hub.

`Pipeline` calls these functions, so they cannot import it.
"""

from __future__ import annotations

import pathlib
import re
import tempfile
from collections.abc import Mapping
from typing import Any

import torch

from bitdance.runtime.atomic_files import NEW, atomic_write, make_folder, new_files, rename
from bitdance.runtime.errors import UserError, printable
from bitdance.runtime.run_folder import check_writable
from bitdance.sampling.image_grid import image_grid
from bitdance.sampling.writers import write_png
from bitdance.weights import hub, weights_file
from bitdance.weights.layout import CFG_SCALE, TOKENIZER_DIGEST
from bitdance.weights.network_config import count_parameters

CARD, PICTURE = "README.md", "samples.png"
MARK = "library_name: bitdance"
"""In the card of a folder of ours, which may be replaced."""

FILES = (CARD, "autoencoder.safetensors", "model.safetensors", PICTURE)
"""In the order in which they are put into the folder: the mark first."""

SHOWN_CLASSES, SHOWN_EACH = 10, 8


def save_pretrained(
    pipeline: Any, folder: pathlib.Path, metrics: Mapping[str, float] | None = None, name: str = "."
) -> None:
    """Writes a model, its autoencoder, some samples and a card that loads `name`; see `Pipeline.save_pretrained`."""
    check_writable(folder)
    is_used = folder.is_dir() and not all(path.name.startswith(NEW) for path in folder.iterdir())
    if is_used and (not _is_ours(folder / CARD) or any((folder / file).is_dir() for file in FILES)):
        raise UserError(f"{folder} holds other files: name a new folder, or one that `save_pretrained` wrote.")
    model, autoencoder = pipeline.model, pipeline.autoencoder
    metadata = {CFG_SCALE: f"{pipeline.defaults.cfg_scale:g}"}
    if pipeline.files:
        contents, source = (weights_file.read(path) for path in pipeline.files)
        metadata[TOKENIZER_DIGEST] = weights_file.tokenizer_digest(source)
        if pipeline.dtype != torch.float32:  # the files have more digits
            model = weights_file.load_model(contents, pipeline.weights)
            autoencoder = weights_file.load_autoencoder(source)
    labels = list(range(min(SHOWN_CLASSES, len(pipeline.classes))))
    names = [pipeline.classes.label(label) for label in labels]
    images = pipeline([label for label in labels for _ in range(SHOWN_EACH)], output="np")
    make_folder(folder)
    with new_files(folder) as new:
        with atomic_write(new / CARD) as temporary:
            temporary.write_text(_card(pipeline, metrics or {}, name), encoding="utf-8")
        weights_file.save(new / "autoencoder.safetensors", autoencoder)
        weights_file.save(new / "model.safetensors", model, metadata=metadata)
        write_png(new / PICTURE, image_grid(images, SHOWN_EACH, names, scale=None))
        for file in FILES:
            rename(new / file, folder / file)


def _is_ours(card: pathlib.Path) -> bool:
    """Returns whether the mark is at the beginning of a file, which may have any size."""
    if not card.is_file():
        return False
    with open(card, "rb") as file:
        return MARK.encode() in file.read(2**16)


def push_to_hub(pipeline: Any, name: str, private: bool = False, metrics: Mapping[str, float] | None = None) -> str:
    """Uploads a model, its autoencoder, some samples and a card; see `Pipeline.push_to_hub`."""
    from huggingface_hub import HfApi

    if not hub.is_repository(name):
        raise UserError(f"{name!r} is no name on the hub: give the user or organization, a slash, and a name.")
    api = HfApi(library_name="bitdance")
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(pipeline, pathlib.Path(folder), metrics, name)
        with hub.client_errors(f"{api.endpoint}/{name}", f"cannot upload to {name}"):
            api.create_repo(name, private=private, exist_ok=True)
            api.upload_folder(folder_path=folder, repo_id=name, commit_message="Upload a BitDance model")
    return f"{api.endpoint}/{name}"


def _card(pipeline: Any, metrics: Mapping[str, float], name: str) -> str:
    """Returns the text of the model card, Markdown; `name` is what its example loads."""
    config, autoencoder, defaults = pipeline.model.config, pipeline.autoencoder.config, pipeline.defaults
    side = autoencoder.down_size
    rows = {
        "images": f"{pipeline.image_size} x {pipeline.image_size} px, {config.num_classes} classes",
        "tokens": f"{config.grid} x {config.grid} of {config.bits} bits, {config.parallel_num} per step",
        "model": f"{_millions(pipeline.model)} parameters: width {config.dim}, {config.n_layer} layers; "
        f"head of width {config.head_dim} with {config.head_layers} blocks",
        "autoencoder": f"{_millions(pipeline.autoencoder)} parameters, {side} x {side} pixels per token",
        "sampling": f"guidance scale {defaults.cfg_scale:g}, {defaults.num_steps} steps of {defaults.solver}",
        **{name: f"{value:.4g}" for name, value in metrics.items()},
    }
    classes = ", ".join(_markdown(pipeline.classes.label(label)) for label in range(min(20, len(pipeline.classes))))
    more = ", ..." if len(pipeline.classes) > 20 else ""
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
{MARK}
pipeline_tag: unconditional-image-generation
tags: [bitdance, class-conditional, autoregressive]
---

# A BitDance model

Class-conditional images by an autoregressive transformer over binary tokens ([paper](https://arxiv.org/abs/2602.14041)).

![samples]({PICTURE})

| | |
|---|---|
{table}

Classes: {classes}{more}.

```python
import bitdance

pipe = bitdance.load_pipeline("{name}")
pipe([{pipeline.classes.label(0)!r}], seed=0)[0].save("image.png")
```
"""


def _markdown(name: str) -> str:
    """Returns a class name, whatever it is, as Markdown that shows it."""
    return re.sub(r"([\\`*_\[\]<>&!|~#])", r"\\\1", printable(name))


def _millions(network: torch.nn.Module) -> str:
    return f"{count_parameters(network) / 1e6:.2f} million"
