"""What evaluation takes of images: the features of a network, the Inception network's or any other's."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitdance.runtime.errors import UserError


class Features(NamedTuple):
    """Features of N images, all float32 and on one device.

    Attributes:
        pool: (N, size): for the Fréchet distance, precision and recall, and the kernel distance.
        spatial: (N, any) with the place in the image still in it, for the sFID; None where a network has none.
        logits: (N, classes), None where a network has none.
    """

    pool: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class FeatureExtractor:
    """A network that images are compared with: the plug of evaluation.

    Attributes:
        name: what the report calls it.
        size: numbers in a feature.
        function: takes (N, H, W, 3) uint8 images, gives their features: `Features`, or only the (N, size) tensor.
        classifies: whether the logits are over the classes of the data set, in the order of its labels, so that the
            share of images that are classified as their label can be reported.
        digest: SHA-256 of the file of weights, empty where there is none; the report records it.
    """

    name: str
    size: int
    function: Callable[[Tensor], Features | Tensor]
    classifies: bool = False
    digest: str = ""

    @property
    def key(self) -> str:
        """Name and digest as a part of a file's name."""
        plain = "".join(c if c.isalnum() or c in "-_" else "-" for c in self.name)
        return f"{plain}-{self.digest[:8]}" if self.digest else plain

    def __call__(self, images: Tensor | np.ndarray) -> Features:
        """The features of a batch.

        Args:
            images: (N, H, W, 3) in [0, 255], uint8 or, where a file has them, float32.

        Raises:
            UserError: the function does not give what `Features` promises, or not finite numbers.
        """
        with torch.no_grad():
            if isinstance(images, np.ndarray):
                images = torch.from_numpy(np.require(images, requirements=("C", "W")))
            result = self.function(images)
        features = result if isinstance(result, Features) else Features(result)
        for part, value in features._asdict().items():
            if value is None and part != "pool":
                continue
            if not isinstance(value, Tensor):
                raise UserError(
                    f"the feature network {self.name} gives {type(value).__name__} as {part}: expected a tensor."
                )
            if value.ndim != 2 or len(value) != len(images) or (part == "pool" and value.shape[1] != self.size):
                expected = f"({len(images)}, {self.size if part == 'pool' else 'any'})"
                raise UserError(
                    f"the feature network {self.name} gives {part} of shape {tuple(value.shape)}: expected {expected}."
                )
            if not value.isfinite().all():
                raise UserError(f"the feature network {self.name} gives {part} with infinities or NaNs: check it.")
        if self.classifies and features.logits is None:
            raise UserError(f"the feature network {self.name} classifies but gives no logits: return `Features`.")
        spatial, logits = (value if value is None else value.float() for value in features[1:])
        return Features(features.pool.float(), spatial, logits)


def load_feature_extractor(name: str) -> FeatureExtractor:
    """A feature network of the user's own; the module or file that defines it is run.

    Args:
        name: `module:attribute` or `path/to/file.py:attribute`; the attribute is a `FeatureExtractor`, or a function
            without arguments that makes one.

    Raises:
        UserError: there is no such module, file or attribute, running it fails, or it is something else.
    """
    source, colon, attribute = name.rpartition(":")
    if not (colon and source and attribute.isidentifier()):
        raise UserError(f"{name!r} names no feature network: write module:attribute or path/to/file.py:attribute.")
    try:
        found = getattr(_module(source), attribute)
        network = found if isinstance(found, FeatureExtractor) or not callable(found) else found()
    except UserError:
        raise
    except Exception as error:  # it is the user's code, which may raise anything
        raise UserError(f"the feature network {name} cannot be loaded ({type(error).__name__}: {error}).") from error
    if not isinstance(network, FeatureExtractor):
        raise UserError(
            f"{name} is {type(network).__name__}: expected a bitdance.metrics.features.FeatureExtractor, or a "
            "function without arguments that makes one."
        )
    return network


def _module(source: str) -> Any:
    if not source.endswith(".py"):
        return importlib.import_module(source)
    path = pathlib.Path(source)
    if not path.is_file():
        raise UserError(f"there is no file {path} with a feature network: check the path.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
