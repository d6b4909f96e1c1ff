"""Metrics of a set of images, warnings about the set, and the report of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from bitdance.metrics.accuracy import top_k_accuracy
from bitdance.metrics.evaluation_config import EvaluationConfig
from bitdance.metrics.feature_set import FeatureSet
from bitdance.metrics.frechet_distance import frechet_distance
from bitdance.metrics.inception import NAME as INCEPTION
from bitdance.metrics.inception import PUBLISHED_DIGEST
from bitdance.metrics.inception_score import CHUNK, inception_score, shuffled_inception_score
from bitdance.metrics.kid import subset_kid
from bitdance.metrics.precision_recall import precision_recall
from bitdance.runtime.errors import UserError

PUBLISHED_COUNT = 50_000
K = 3
"""Neighbour whose distance is the radius in precision and recall."""

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
"""Headings of the metrics in a table, by their keys in JSON."""


def compute_metrics(
    samples: FeatureSet, reference: FeatureSet | None, adm_fp16: bool = False, kid: bool = False
) -> dict[str, float]:
    """Computes all metrics that the features of the two sets allow.

    Args:
        samples: must have features.
        reference: by the same extractor; without it only metrics that need none are computed.
        adm_fp16: see `precision_recall`.
        kid: add `kid` and its standard deviation over subsets, `kid_std`.

    Returns:
        `fid`, `sfid`, `precision`, `recall`; of logits `inception_score` (in a fixed random order) and
        `inception_score_in_order` (in the order of the file, as in ADM), or of a classifier `accuracy` and
        `top_5_accuracy`.

    Raises:
        UserError: the sets have different extractors, or are too small.
    """
    metrics: dict[str, float] = {}
    if samples.pool is None:
        raise UserError(f"{samples.about['source']} holds statistics without features: use it as `reference` only.")
    if reference is not None:
        check_extractor(samples.about["extractor"], samples.about["extractor_digest"], reference)
        if reference.statistics is not None:
            if samples.statistics is None:
                raise UserError(f"{samples.about['source']} holds a single image: a distance needs at least 2.")
            metrics["fid"] = frechet_distance(reference.statistics, samples.statistics)
        if reference.spatial is not None and samples.spatial is not None:
            metrics["sfid"] = frechet_distance(reference.spatial, samples.spatial)
        if reference.pool is not None:
            fewest = min(len(samples.pool), len(reference.pool))
            if fewest > K:
                metrics |= precision_recall(reference.pool, samples.pool, K, adm_fp16)._asdict()
            if kid and fewest >= 2:
                metrics["kid"], metrics["kid_std"] = subset_kid(reference.pool, samples.pool, size=min(1000, fewest))
    if samples.logits is not None and not samples.about.get("classifies"):
        metrics["inception_score"] = shuffled_inception_score(samples.logits)
        metrics["inception_score_in_order"] = inception_score(samples.logits)
    elif samples.logits is not None and samples.labels is not None:
        metrics["accuracy"] = top_k_accuracy(samples.logits, samples.labels)
        metrics["top_5_accuracy"] = top_k_accuracy(samples.logits, samples.labels, 5)
    return metrics


def check_extractor(name: str, digest: str, reference: FeatureSet) -> None:
    """Checks that a reference has the feature extractor of the samples; ADM's statistics do not name theirs.

    Raises:
        UserError: it has another one.
    """
    about = reference.about
    own, other = digest or name, about.get("extractor_digest") or about.get("extractor")
    if other is not None and own != other:
        shown = about.get("extractor_digest", "")[:12] or other
        raise UserError(
            f"the reference {about['source']} has features of another extractor ({shown}) than the samples "
            f"({digest[:12] or name}): extract them again."
        )


def find_problems(samples: FeatureSet, reference: FeatureSet | None, metrics: dict[str, float]) -> list[str]:
    """Finds properties of the images that distort metrics; returns a sentence for each."""
    about, labels, problems = samples.about, samples.labels, []
    count, low, high, height = (about[name] for name in ("count", "minimum", "maximum", "height"))
    if count < PUBLISHED_COUNT:
        problems.append(
            f"{count} images instead of {PUBLISHED_COUNT}: FID and sFID are too high (the bias is proportional to "
            "1/N), and precision and recall of different counts cannot be compared."
        )
    if about["type"] != "uint8":
        problems.append(
            f"pixels are {about['type']}, not uint8: they are used as they are, as in ADM; rounding to bytes would "
            "change the metrics slightly."
        )
    if low < 0 or high > 255 or high <= 2:
        problems.append(f"pixels lie between {low:g} and {high:g} instead of 0 and 255: all metrics are meaningless.")
    if about["duplicates"]:
        problems.append(
            f"{about['duplicates']} images are exact copies of others: recall falls, FID rises, and an image that "
            f"occurs more than {K} times has a radius near zero in precision and recall."
        )
    if height != about["width"]:
        problems.append(f"images are {about['width']} x {height}: they are resized to squares.")
    other = reference.about.get("height") if reference else None
    if other not in (None, height):
        problems.append(
            f"images are {height} px high, those of the reference {other} px: FID and sFID also measure the difference "
            "in sharpness."
        )
    ordered, shuffled = metrics.get("inception_score_in_order", 0.0), metrics.get("inception_score", 0.0)
    if labels is not None:
        counts = np.bincount(labels, minlength=about["num_classes"] or int(labels.max()) + 1)
        if counts.max() - counts.min() > 1:
            problems.append(
                f"classes have between {counts.min()} and {counts.max()} images: against a balanced reference FID and "
                "recall get worse, and the Inception Score falls."
            )
        if count > CHUNK and (np.diff(labels) >= 0).all() and counts.astype(bool).sum() > 1:
            problems.append("images are sorted by class: the Inception Score in order, which is ADM's, is too low.")
    elif count > CHUNK and ordered < 0.9 * shuffled:
        problems.append(
            "the Inception Score in order is more than 10 % lower than in random order: the images seem to be sorted "
            "by class, which makes ADM's score too low."
        )
    if about["extractor"] == INCEPTION and not about["extractor_digest"].startswith(PUBLISHED_DIGEST):
        problems.append(
            "the Inception weights are not the published file (by SHA-256): the metrics cannot be compared with "
            "published ones."
        )
    return problems


def evaluate_features(
    samples: Sequence[FeatureSet], reference: dict[str, FeatureSet] | None, config: EvaluationConfig
) -> dict[str, Any]:
    """Evaluates a set of images.

    Args:
        samples: its features by each extractor.
        reference: features by the name of their extractor.

    Returns:
        `metrics`, those of extractors other than Inception as `<extractor>:<metric>`, `warnings`, and `about` of each
        extractor; ready for JSON.

    Raises:
        UserError: the reference lacks an extractor, or as in `compute_metrics`.
    """
    metrics: dict[str, float] = {}
    warnings: list[str] | None = None
    for features in samples:
        extractor = features.about["extractor"]
        other = None if reference is None else reference.get(extractor)
        if reference is not None and other is None:
            raise UserError(f"the reference has no features of {extractor}: give it as images.")
        own = compute_metrics(features, other, config.adm_fp16, config.kid)
        warnings = find_problems(features, other, own) if warnings is None else warnings
        prefix = "" if extractor == INCEPTION else f"{extractor}:"
        metrics |= {prefix + name: value for name, value in own.items()}
    return {"metrics": metrics, "warnings": warnings or [], "about": [features.about for features in samples]}


def build_report(
    evaluations: dict[str, dict[str, Any]],
    reference: dict[str, FeatureSet] | None,
    config: EvaluationConfig,
    mean_std: bool = False,
) -> dict[str, Any]:
    """Builds the report of several sets of images, ready for JSON.

    Args:
        evaluations: results of `evaluate_features` by title.
        mean_std: add mean and sample standard deviation over all sets, if there are several, of the metrics of all.
    """
    report: dict[str, Any] = {
        "samples": evaluations,
        "reference": reference and {name: features.about for name, features in reference.items()},
        "settings": {name: value for name, value in dataclasses.asdict(config).items() if name != "cache"},
    }
    if mean_std and len(evaluations) > 1:
        rows = [row["metrics"] for row in evaluations.values()]
        values = {name: [row[name] for row in rows] for name in rows[0] if all(name in row for row in rows)}
        report["mean_std"] = {
            name: {"mean": np.mean(v).item(), "std": np.std(v, ddof=1).item()} for name, v in values.items()
        }
    return report


def format_table(report: dict[str, Any]) -> str:
    """Formats the metrics of a report as a Markdown table: a row per set of images, a column per metric."""
    rows: dict[str, dict[str, float]] = {title: row["metrics"] for title, row in report["samples"].items()}
    if mean_std := report.get("mean_std"):
        rows |= {key: {name: value[key] for name, value in mean_std.items()} for key in ("mean", "std")}
    columns = [name for name in HEADINGS if any(name in row for row in rows.values())]
    columns += sorted({name for row in rows.values() for name in row} - set(HEADINGS) - {"kid_std"})
    lines = [["", *(HEADINGS.get(name, name) for name in columns)]]
    lines += [[title, *(_format_cell(name, row) for name in columns)] for title, row in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [f"| {' | '.join(cell.ljust(w) for cell, w in zip(line, widths, strict=True))} |" for line in lines]
    return "\n".join([text[0], f"|{'|'.join('-' * (w + 2) for w in widths)}|", *text[1:]])


def _format_cell(name: str, row: dict[str, float]) -> str:
    digits = 4 if name in ("precision", "recall", "accuracy", "top_5_accuracy") else 5 if name == "kid" else 3
    return f"{row[name]:.{digits}f}" if name in row else ""


def format_warnings(report: dict[str, Any]) -> list[str]:
    """Formats the warnings of a report, each once; titles precede a warning that does not concern all sets."""
    titles: dict[str, list[str]] = {}
    for title, row in report["samples"].items():
        for warning in row["warnings"]:
            titles.setdefault(warning, []).append(title)
    return [
        warning if len(concerned) == len(report["samples"]) else f"{', '.join(concerned)}: {warning}"
        for warning, concerned in titles.items()
    ]
