"""Settings of an evaluation."""

from __future__ import annotations

import dataclasses
import pathlib

from bitdance.config import Split
from bitdance.runtime.errors import check_fields


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Settings of an evaluation.

    Attributes:
        reference: reference images: ADM's reference batch or statistics, a stored reference, an .npz of images, a
            folder, a data set; none for the Inception Score only. By default ADM's batch for the size of the images.
        reference_split: train or test, for CIFAR-10's archives.
        reference_limit: use only this many images of a reference, evenly spaced over it.
        inception_weights: weights of the Inception network; by default the downloaded file, and if there is none, only
            `features` are evaluated.
        features: further feature extractors: efficientnet-lite0, or module:attribute or path/to/file.py:attribute (this
            runs that code); the attribute is a `bitdance.metrics.features.FeatureExtractor`, or a function that returns
            one.
        adm_fp16: precision and recall with the float16 rounding of ADM on a GPU.
        kid: add the Kernel Inception Distance.
        feature_batch_size: batch size of the feature extractors.
        cache: folder of the cached features of references.
    """

    reference: str | None = None
    reference_split: Split = "train"
    reference_limit: int | None = None
    inception_weights: pathlib.Path | None = None
    features: tuple[str, ...] = ()
    adm_fp16: bool = False
    kid: bool = False
    feature_batch_size: int = 32
    cache: pathlib.Path = pathlib.Path("models/evaluation/features")

    def __post_init__(self) -> None:
        check_fields(self, "feature_batch_size reference_limit", lambda value: value >= 1, "be at least 1")
