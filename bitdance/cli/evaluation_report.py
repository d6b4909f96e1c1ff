"""What the commands that evaluate share: the comparison and its report."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from bitdance.config import EvaluationConfig
from bitdance.runtime.errors import UserError

if TYPE_CHECKING:
    from bitdance.metrics.feature_set import FeatureSet
    from bitdance.sampling.job import JobResult


def compare(
    samples: list[FeatureSet], reference: dict[str, FeatureSet] | None, config: EvaluationConfig
) -> tuple[dict[str, float], list[str]]:
    """All figures of a set of images, those of further networks as `<network>:<figure>`, and the warnings."""
    from bitdance.metrics.report import figures, warnings

    result: dict[str, float] = {}
    found: list[str] = []
    for number, one in enumerate(samples):
        other = None if reference is None else reference.get(str(one.about["network"]))
        if reference is not None and other is None:
            if number:
                raise UserError(f"the reference has no features by {one.about['network']}: give it as images.")
            other = next(iter(reference.values()))
        own = figures(one, other, config.adm_fp16, config.kernel)
        if number == 0:
            found = warnings(one, other, own)
        result |= own if number == 0 else {f"{one.about['network']}:{name}": value for name, value in own.items()}
    return result, found


def row_of(outcome: JobResult, reference: dict[str, FeatureSet] | None, config: EvaluationConfig) -> dict[str, Any]:
    """What `report` wants of a job that took features."""
    from bitdance.metrics.feature_set import read_feature_set

    sets = [read_feature_set(path) for kind, path in outcome.results.items() if kind.startswith("features.")]
    found = [one for one in sets if one is not None]
    figures, warnings = compare(found, reference, config)
    return {"figures": figures, "warnings": warnings, "about": [one.about for one in found]}


def report(
    rows: dict[str, dict[str, Any]],
    reference: dict[str, FeatureSet] | None,
    config: EvaluationConfig,
    output: pathlib.Path,
    spread: bool,
) -> None:
    """Prints the table and the warnings, and writes everything as JSON.

    Args:
        rows: by title: `figures`, `warnings` and `about`.
        spread: add mean and standard deviation of each figure over all rows, where there are more than one.
    """
    from bitdance.metrics.report import mean_and_std, table
    from bitdance.runtime.atomic_files import atomic_write

    shown = {title: row["figures"] for title, row in rows.items()}
    over_all = mean_and_std(list(shown.values())) if spread and len(rows) > 1 else {}
    if over_all:
        shown |= {what: {name: value[what] for name, value in over_all.items()} for what in ("mean", "std")}
    print(table(shown))
    said: dict[str, list[str]] = {}
    for title, row in rows.items():
        for warning in row["warnings"]:
            said.setdefault(warning, []).append(title)
    for warning, titles in said.items():
        of = "" if len(titles) == len(rows) else f"{', '.join(titles)}: "
        print(f"bitdance: {of}{warning}", file=sys.stderr)
    record = {
        "samples": rows,
        "reference": None if reference is None else {name: found.about for name, found in reference.items()},
        "settings": {name: value for name, value in dataclasses.asdict(config).items() if name != "cache"},
        **({"spread": over_all} if over_all else {}),
    }
    with atomic_write(output) as temporary:
        temporary.write_text(json.dumps(record, indent=1, default=str) + "\n")
    print(f"written to {output}")
