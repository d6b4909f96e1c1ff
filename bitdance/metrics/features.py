"""Feature extractors: the networks whose features images are compared in, Inception's or the user's own."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitdance.runtime.errors import UserError


class Features(NamedTuple):
    """Features of N images, on one device.

    Attributes:
        pool: (N, size), for the Fréchet distance, precision and recall, and KID.
        spatial: (N, any) features that keep the position in the image, for sFID; optional.
        logits: (N, classes); optional.
    """

    pool: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class FeatureExtractor:
    """A network whose features images are compared in.

    Attributes:
        name: its name in reports.
        size: dimensions of a feature.
        function: maps (N, H, W, 3) uint8 images to `Features`, or to the (N, size) tensor only.
        classifies: whether the logits are over the classes of the data set, in the order of its labels; the accuracy is
            reported then.
        digest: SHA-256 of the file of weights, empty without a file; it is stored with the features.
    """

    name: str
    size: int
    function: Callable[[Tensor], Features | Tensor]
    classifies: bool = False
    digest: str = ""

    @property
    def key(self) -> str:
        """Name and digest as a part of a file name."""
        plain = re.sub(r"[^\w-]", "-", self.name)
        return f"{plain}-{self.digest[:8]}" if self.digest else plain

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Extracts the features of a batch.

        Args:
            images: (N, H, W, 3) in [0, 255]; types other than uint8 are converted to float32, as in ADM.

        Returns:
            The fields of `Features` that the function returned, as float32 arrays.

        Raises:
            UserError: the function returned something else, or values that are not finite.
        """
        images = images if images.dtype == np.uint8 else images.astype(np.float32, copy=False)
        with torch.no_grad():
            result = self.function(torch.from_numpy(np.require(images, requirements=("C", "W"))))
        features = result if isinstance(result, Features) else Features(result)
        arrays: dict[str, np.ndarray] = {}
        for name, value in features._asdict().items():
            if value is None and name != "pool":
                continue
            shape = tuple(value.shape) if isinstance(value, Tensor) else ()
            if len(shape) != 2 or shape[0] != len(images) or (name == "pool" and shape[1] != self.size):
                raise UserError(
                    f"feature extractor {self.name} returns {name} as {type(value).__name__} of shape {shape}: it must "
                    f"be a tensor of shape ({len(images)}, {self.size if name == 'pool' else 'any'})."
                )
            arrays[name] = value.float().cpu().numpy()
            if not np.isfinite(arrays[name]).all():
                raise UserError(f"feature extractor {self.name} returns {name} with infinities or NaNs: check it.")
        if self.classifies and "logits" not in arrays:
            raise UserError(f"feature extractor {self.name} classifies but returns no logits: return `Features`.")
        return arrays


def load_feature_extractor(name: str) -> FeatureExtractor:
    """Loads a feature extractor of the user; the module or file that defines it is run.

    Args:
        name: `module:attribute` or `path/to/file.py:attribute`; the attribute is a `FeatureExtractor`, or a function
            without arguments that returns one.

    Raises:
        UserError: there is no such module, file or attribute, running it fails, or it is something else.
    """
    source, colon, attribute = name.rpartition(":")
    if not (colon and source and attribute.isidentifier()):
        raise UserError(f"{name!r} names no feature extractor: write module:attribute or path/to/file.py:attribute.")
    try:
        found = getattr(_import(source), attribute)
        extractor = found if isinstance(found, FeatureExtractor) or not callable(found) else found()
    except UserError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise UserError(f"feature extractor {name} cannot be loaded ({type(error).__name__}: {error}).") from error
    if not isinstance(extractor, FeatureExtractor):
        raise UserError(
            f"{name} is {type(extractor).__name__}: expected a bitdance.metrics.features.FeatureExtractor, or a "
            "function without arguments that returns one."
        )
    return extractor


def _import(source: str) -> Any:
    if not source.endswith(".py"):
        return importlib.import_module(source)
    path = pathlib.Path(source)
    if not path.is_file():
        raise UserError(f"there is no file {path} with a feature extractor: check the path.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
