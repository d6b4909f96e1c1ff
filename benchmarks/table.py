"""Prints the results of `speed.py` as one table in Markdown.

    python benchmarks/table.py LOG [LOG ...]

Each file is the output of a run, whose last line is JSON; others are named and left out.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

VARIANTS = ("ours", "compiled", "reference", "other")
FACTS = {"model", "batch_size", "num_steps", "precision", "device", "torch", "tflops", "gb_per_second"} | {
    "parts",
    "peak_memory_gb",
}
HEADER = f"| run | part | {' | '.join(VARIANTS)} | limit | reached | peak |\n|{'---|' * (len(VARIANTS) + 5)}"


def read_facts(path: pathlib.Path) -> dict[str, Any] | None:
    """Returns the JSON of the last line, or None if the file is no output of `speed.py`."""
    try:
        facts = json.loads(path.read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return None
    return facts if isinstance(facts, dict) and set(facts) >= FACTS and isinstance(facts["parts"], dict) else None


def rows(facts: dict[str, Any]) -> list[str]:
    """Returns a row for each part: seconds, the limit, and how much of it the faster one of ours reaches."""
    run = f"{facts['model']}, {facts['batch_size']} images, {facts['num_steps']} steps, {facts['precision']}"
    lines = []
    for part, values in facts["parts"].items():
        seconds, limit = values["seconds"], values["limit_seconds"]
        columns = [f"{seconds[name]:.3g} s" if name in seconds else "" for name in VARIANTS]
        peak = f"{facts['peak_memory_gb'][part]:.1f} GB" if part in facts["peak_memory_gb"] else ""
        reached = f"{limit:.3g} s | {100 * values['limit_ratio']:.0f} %"
        lines.append(f"| {run} | {part} | {' | '.join(columns)} | {reached} | {peak} |")
    return lines


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit("usage: python benchmarks/table.py LOG [LOG ...]")
    table, ceilings = [], []
    for path in map(pathlib.Path, sys.argv[1:]):
        if (facts := read_facts(path)) is None:
            print(f"{path}: not a result of speed.py", file=sys.stderr)
            continue
        table += rows(facts)
        ceilings.append(
            f"{path.stem}: {facts['device']}, PyTorch {facts['torch']}, {facts['tflops']:.1f} TFLOP/s, "
            f"{facts['gb_per_second']:.0f} GB/s"
        )
    if not table:
        raise SystemExit("no result of speed.py among the files")
    print("\n".join([HEADER, *table, "", *ceilings]))


if __name__ == "__main__":
    main()
