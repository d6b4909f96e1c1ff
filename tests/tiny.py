"""The tiny models that belong to the golden arrays of tests/data/golden: weights drawn from a fixed seed.

The arrays hold inputs and outputs of the original implementation in float32 on a CPU.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import math
import pathlib

import numpy as np
import torch
from torch import Tensor

from bitdance.config import AutoencoderConfig, BitDanceConfig
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.quantizer import pack
from bitdance.models.transformer import BitDance

DATA = pathlib.Path(__file__).parent / "data"
PARALLEL_NUMS = (1, 4, 16)
AUTOENCODER = AutoencoderConfig(widths=(32, 32, 64, 64, 128), blocks=1)
DIGESTS = {1: "37397a7537072669", 4: "cadcf0813a055831", 16: "631751711c545cca"}


def config(parallel_num: int, **changes: object) -> BitDanceConfig:
    sizes: dict[str, object] = {
        "dim": 128, "n_layer": 3, "head_dim": 128, "head_layers": 4, "grid": 8, "cls_token_num": 8, "num_classes": 10,
        "parallel_num": parallel_num,
    }  # fmt: skip
    return BitDanceConfig(**{**sizes, **changes})  # type: ignore[arg-type]


@functools.cache
def names_and_shapes(parallel_num: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a tiny checkpoint, in its order (which the random draws follow), autoencoder under `vae.`."""
    lines = (DATA / "golden" / "tiny_tensors.tsv").read_text().splitlines()
    rows = (line.split("\t") for line in lines)
    return {name: tuple(map(int, shape.split(","))) for p, name, shape in rows if int(p) == parallel_num}


@functools.cache
def state_dicts(parallel_num: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(ema, model): the two state dicts of a checkpoint; `model` is a little off, as raw weights are."""
    generator = torch.Generator().manual_seed(1000 + parallel_num)
    ema = {}
    for name, shape in names_and_shapes(parallel_num).items():
        w = torch.randn(shape, generator=generator)
        if name.endswith("bias"):
            w = 0.05 * w
        elif "embedding" in name:
            w = 0.5 * w
        elif name.startswith(("pos_for_diff", "query_token")):
            w = 0.2 * w
        elif len(shape) == 1:
            w = 1 + 0.1 * w
        else:
            w = w / math.sqrt(math.prod(shape[1:]))
        ema[name] = w
    raw = {
        name: w if name.startswith("vae.") else w + 0.01 * torch.randn(w.shape, generator=generator)
        for name, w in ema.items()
    }
    digest = hashlib.sha256()
    for name, w in ema.items():
        digest.update(name.encode())
        digest.update((w.double() * 1e4).round().to(torch.int64).numpy().tobytes())
    assert digest.hexdigest()[:16] == DIGESTS[parallel_num], "this torch draws other random weights"
    return ema, raw


def model_state(parallel_num: int) -> dict[str, Tensor]:
    return {name: w for name, w in state_dicts(parallel_num)[0].items() if not name.startswith("vae.")}


def autoencoder_state(parallel_num: int = 1) -> dict[str, Tensor]:
    return {name[4:]: w for name, w in state_dicts(parallel_num)[0].items() if name.startswith("vae.")}


def model(parallel_num: int, **changes: object) -> BitDance:
    """The tiny model with the weights of the golden arrays, in evaluation mode."""
    net = BitDance(config(parallel_num, **changes))
    net.load_state_dict(model_state(parallel_num))
    return net.eval()


def autoencoder(parallel_num: int = 1) -> Autoencoder:
    net = Autoencoder(AUTOENCODER)
    net.load_state_dict(autoencoder_state(parallel_num))
    return net.eval()


def save_checkpoint(path: pathlib.Path, parallel_num: int, **args: object) -> None:
    """Writes a file of the released layout: `ema`, `model`, `epochs`, `args`."""
    ema, raw = state_dicts(parallel_num)
    settings = {
        "model": f"tiny-{parallel_num}x", "image_size": 128, "down_size": 16, "patch_size": 1, "latent_dim": 32,
        "num_classes": 10, "cls_token_num": 8, "parallel_num": parallel_num, "ema": 0.9999, "lr": 6e-4, **args,
    }  # fmt: skip
    namespace = argparse.Namespace(**settings)
    torch.save({"model": raw, "ema": ema, "epochs": 3, "args": namespace}, path)


def save_autoencoder(path: pathlib.Path) -> None:
    torch.save({"state_dict": autoencoder_state()}, path)


def group_indices(bits: Tensor) -> Tensor:
    """Codebook indices of a grid of bits: (B, C, h, w) +-1 -> (C / 8, B * h * w) int64."""
    return pack(bits.flatten(2).mT).long().permute(2, 0, 1).flatten(1)


class Golden:
    """One golden file; `unread` are the arrays that nothing has looked at."""

    def __init__(self, parallel_num: int) -> None:
        with np.load(DATA / "golden" / f"tiny_{parallel_num}x.npz") as file:
            self.arrays = dict(file)
        self.unread = set(self.arrays)

    def __getitem__(self, name: str) -> Tensor:
        self.unread.discard(name)
        return torch.from_numpy(self.arrays[name])

    def strings(self, name: str) -> list[str]:
        self.unread.discard(name)
        return [str(s) for s in self.arrays[name]]


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||, in float64."""
    a, b = a.detach().double(), b.double()
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    return float((a - b).norm() / b.norm())
