"""The figures of a set of images, and what is wrong with the set, in numbers and sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bitdance.metrics.accuracy import top_k_accuracy
from bitdance.metrics.feature_set import FeatureSet
from bitdance.metrics.frechet_distance import frechet_distance
from bitdance.metrics.inception import NAME as INCEPTION
from bitdance.metrics.inception import PUBLISHED_DIGEST
from bitdance.metrics.inception_score import CHUNK, inception_score, shuffled_inception_score
from bitdance.metrics.kid import subset_kid
from bitdance.metrics.precision_recall import precision_recall
from bitdance.runtime.errors import UserError

PUBLISHED_COUNT = 50_000

HEADINGS = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "IS",
    "inception_score_in_order": "IS in order",
    "precision": "precision",
    "recall": "recall",
    "kid": "KID",
    "accuracy": "accuracy",
    "top_5_accuracy": "top-5",
}
"""Names of the figures in a table; the keys are those in the JSON."""


def figures(
    samples: FeatureSet, reference: FeatureSet | None, adm_fp16: bool = False, kernel: bool = False, k: int = 3
) -> dict[str, float]:
    """All figures that the two sets allow.

    Of Inception features: `fid`, `sfid`, `precision`, `recall`, `inception_score` (in a fixed random order) and
    `inception_score_in_order` (chunks of the file's order, as ADM computes it). Of another network's the same but for
    the scores; of a classifier `accuracy` and `top_5_accuracy`.

    Args:
        samples: must have features.
        reference: by the same network; without it only what needs none.
        adm_fp16: precision and recall with the rounding that ADM's have.
        kernel: add `kid` and its standard deviation over subsets, `kid_std`.
        k: neighbour whose distance is the radius of precision and recall.

    Raises:
        UserError: the sets are not by the same network, or too small.
    """
    result: dict[str, float] = {}
    if samples.pool is None:
        raise UserError(f"{samples.about['source']} has statistics but no features: it serves only as a reference.")
    if reference is not None:
        result |= _distances(samples, reference, adm_fp16, kernel, k)
    if samples.logits is not None:
        if samples.about.get("classifies"):
            if samples.labels is not None:
                result["accuracy"] = top_k_accuracy(samples.logits, samples.labels)
                result["top_5_accuracy"] = top_k_accuracy(samples.logits, samples.labels, 5)
        else:
            result["inception_score"] = shuffled_inception_score(samples.logits)
            result["inception_score_in_order"] = inception_score(samples.logits)
    return result


def _distances(samples: FeatureSet, reference: FeatureSet, adm_fp16: bool, kernel: bool, k: int) -> dict[str, float]:
    result: dict[str, float] = {}
    check_network(samples.about, reference)
    if reference.statistics is not None:
        if samples.statistics is None:
            raise UserError(f"{samples.about['source']} holds a single image: a distance needs at least 2.")
        result["fid"] = frechet_distance(reference.statistics, samples.statistics)
    if reference.spatial is not None and samples.spatial is not None:
        result["sfid"] = frechet_distance(reference.spatial, samples.spatial)
    if reference.pool is not None and samples.pool is not None:
        fewest = min(len(samples.pool), len(reference.pool))
        if fewest > k:
            result |= precision_recall(reference.pool, samples.pool, k, adm_fp16)._asdict()
        if kernel and fewest >= 2:
            distance = subset_kid(reference.pool, samples.pool, size=min(1000, fewest))
            result |= {"kid": distance.mean, "kid_std": distance.std}
    return result


def check_network(about: Mapping[str, Any], reference: FeatureSet) -> None:
    """Checks that a reference is by the network of the samples.

    Args:
        about: `network` and `network_digest` of the samples, as in `FeatureSet`.

    Raises:
        UserError: it is by another.
    """
    networks = [side.get("network_digest") or side.get("network") for side in (about, reference.about)]
    if networks[1] is not None and networks[0] != networks[1]:  # ADM's statistics do not say
        raise UserError(
            f"the reference {reference.about['source']} was taken with another network ({networks[1]}) than the "
            f"samples ({networks[0]}): make it again."
        )


def mean_and_std(results: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation (of the sample, ddof 1) of each figure that all results have."""
    names = [name for name in results[0] if all(name in result for result in results)]
    values = {name: np.array([result[name] for result in results]) for name in names}
    return {name: {"mean": float(v.mean()), "std": float(v.std(ddof=1))} for name, v in values.items()}


def warnings(samples: FeatureSet, reference: FeatureSet | None, result: dict[str, float]) -> list[str]:
    """What about the images changes which figure, as sentences."""
    about, count, found = samples.about, samples.about["count"], []

    def say(sentence: str) -> None:
        found.append(sentence)

    if count < PUBLISHED_COUNT:
        say(
            f"{count} images instead of {PUBLISHED_COUNT}: FID and sFID come out too high (the bias grows as 1/N), and "
            "precision and recall of different counts cannot be compared."
        )
    if about.get("type") not in (None, "uint8"):
        say(
            f"pixels are {about['type']}, not uint8: they are taken as they are, as ADM does; rounded to bytes the "
            "figures would differ a little."
        )
    low, high = about.get("minimum", 0), about.get("maximum", 255)
    if low < 0 or high > 255 or high <= 2:
        say(f"pixels lie between {low:g} and {high:g} instead of 0 and 255: every figure is meaningless.")
    if about.get("duplicates"):
        say(
            f"{about['duplicates']} images are exact copies of others: recall falls, FID rises, and whatever is there "
            "more than 3 times has a ball of no size in precision and recall."
        )
    _check_sizes(about, reference, say)
    _check_labels(samples, result, say)
    if about.get("network") == INCEPTION and not about["network_digest"].startswith(PUBLISHED_DIGEST):
        say(
            "the Inception weights are not the published file (by its SHA-256): no figure here can stand beside a "
            "published one."
        )
    return found


def _check_sizes(about: dict[str, Any], reference: FeatureSet | None, say: Any) -> None:
    if about.get("height") != about.get("width"):
        say(f"images are {about['width']} x {about['height']}: the network sees them squeezed into squares.")
    other = None if reference is None else reference.about.get("height")
    if other is not None and other != about.get("height"):
        say(
            f"images are {about['height']} px high, the reference's {other} px: FID and sFID then measure the "
            "difference in sharpness too."
        )


def _check_labels(samples: FeatureSet, result: dict[str, float], say: Any) -> None:
    labels, count = samples.labels, samples.about["count"]
    ordered, shuffled = result.get("inception_score_in_order"), result.get("inception_score")
    if labels is not None:
        classes = samples.about.get("num_classes") or int(labels.max()) + 1
        counts = np.bincount(labels, minlength=classes)
        if counts.max() - counts.min() > 1:
            say(
                f"classes have between {counts.min()} and {counts.max()} images: against a balanced reference FID and "
                "recall suffer, and the Inception Score falls."
            )
        if count > CHUNK and (np.diff(labels) >= 0).all() and counts.astype(bool).sum() > 1:
            say(
                "images are in the order of their classes: the Inception Score in that order, which is ADM's, is too "
                "low."
            )
    elif shuffled is not None and ordered is not None and count > CHUNK and ordered < 0.9 * shuffled:
        say(
            "the Inception Score in the order of the file is lower by more than a tenth than in random order: the "
            "images seem to be sorted by class, so ADM's would be too low."
        )


def table(rows: dict[str, dict[str, float]]) -> str:
    """A Markdown table: a row a set of images, a column a figure."""
    columns = [name for name in HEADINGS if any(name in row for row in rows.values())]
    columns += sorted({name for row in rows.values() for name in row} - set(HEADINGS) - {"kid_std"})
    lines = [["", *(HEADINGS.get(name, name) for name in columns)]]
    lines += [[title, *(_cell(name, row) for name in columns)] for title, row in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [f"| {' | '.join(cell.ljust(w) for cell, w in zip(line, widths, strict=True))} |" for line in lines]
    return "\n".join([text[0], f"|{'|'.join('-' * (w + 2) for w in widths)}|", *text[1:]])


def _cell(name: str, row: dict[str, float]) -> str:
    if name not in row:
        return ""
    digits = 4 if name in ("precision", "recall", "accuracy", "top_5_accuracy") else 5 if name == "kid" else 3
    return f"{row[name]:.{digits}f}"
