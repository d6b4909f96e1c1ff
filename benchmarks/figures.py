"""Times the figures beside the straightforward way, in turns; the last line is JSON.

    OMP_NUM_THREADS=2 python benchmarks/figures.py

The straightforward ways: the trace of the matrix square root from all complex eigenvalues, or by Newton and Schulz's
iteration; distances as one full matrix, sorted. `--full` adds precision and recall of 50,000 samples against 10,000
references, our way alone. Memory is the largest growth of the process while a function ran.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bitdance.metrics.frechet_distance import trace_sqrt
from bitdance.metrics.inception_score import inception_score
from bitdance.metrics.kid import subset_kid
from bitdance.metrics.precision_recall import precision_recall
from bitdance.metrics.statistics import compute_statistics


def trace_by_eigenvalues(a: np.ndarray, b: np.ndarray) -> float:
    return float(torch.linalg.eigvals(torch.from_numpy(a @ b)).sqrt().real.sum())


def trace_by_newton_schulz(a: np.ndarray, b: np.ndarray, steps: int = 50) -> float:
    product = torch.from_numpy(a @ b)
    norm = product.norm()
    identity = torch.eye(len(a), dtype=torch.float64)
    y, z = product / norm, identity
    for _ in range(steps):
        t = (3 * identity - z @ y) / 2
        y, z = y @ t, t @ z
    return float(y.trace() * norm.sqrt())


def precision_recall_of_full_matrices(reference: np.ndarray, sample: np.ndarray) -> tuple[float, float]:
    def distances(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return np.square(u).sum(1)[:, None] - 2 * (u @ v.T) + np.square(v).sum(1)

    reference_radii, sample_radii = (np.sort(distances(x, x), axis=1)[:, 3] for x in (reference, sample))
    cross = distances(reference, sample)
    return float((cross <= reference_radii[:, None]).any(0).mean()), float((cross <= sample_radii).any(1).mean())


def resident() -> int:
    """Bytes of memory that the process holds, on Linux; 0 elsewhere."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return 0


def measure(function: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds, the largest growth of memory in GB, and what the function returned."""
    before, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        result = function()
    finally:
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
    return seconds, max(0, peak - before) / 1e9, result


def clustered(seed: int, count: int, dim: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((100, dim), np.float32) * 0.25
    x = random.standard_normal((count, dim), np.float32)
    x *= 0.3
    x += 0.35
    for start in range(0, count, 1000):
        x[start : start + 1000] += centres[random.integers(0, 100, len(x[start : start + 1000]))]
    return np.maximum(x, 0, out=x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--count", type=int, default=6000, help="rows of each set")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="add 50,000 samples against 10,000 references")
    args = parser.parse_args()

    reference, sample = clustered(1, args.count, args.dim), clustered(2, args.count, args.dim)
    a, b = compute_statistics(reference).covariance, compute_statistics(sample).covariance
    logits = clustered(3, args.count, 1008) * 8
    contenders: dict[str, dict[str, Callable[[], Any]]] = {
        "trace of the square root": {
            "ours": lambda: trace_sqrt(a, b),
            "all eigenvalues": lambda: trace_by_eigenvalues(a, b),
            "Newton-Schulz, 50 steps": lambda: trace_by_newton_schulz(a, b),
        },
        "precision and recall": {
            "ours": lambda: precision_recall(reference, sample),
            "full matrices": lambda: precision_recall_of_full_matrices(reference, sample),
        },
        "statistics": {
            "ours": lambda: float(compute_statistics(reference).mean.sum()),
            "np.cov": lambda: float(np.cov(reference, rowvar=False).shape and reference.mean(0).sum()),
        },
        "Inception Score": {"ours": lambda: inception_score(logits)},
        "kernel distance, 10 subsets": {"ours": lambda: subset_kid(reference, sample, subsets=10)},
    }
    seen: dict[tuple[str, str], list[tuple[float, float, Any]]] = {}
    for _ in range(args.rounds):
        for figure, ways in contenders.items():
            for way, function in ways.items():
                seen.setdefault((figure, way), []).append(measure(function))
    if args.full:
        del reference, sample
        reference, sample = clustered(1, 10_000, args.dim), clustered(2, 50_000, args.dim)
        seen["precision and recall, 50,000 x 10,000", "ours"] = [measure(lambda: precision_recall(reference, sample))]

    print("| figure | way | seconds (median) | fastest | memory, GB | value |\n|---|---|---|---|---|---|")
    summary = []
    for (figure, way), runs in seen.items():
        seconds, memory = [run[0] for run in runs], max(run[1] for run in runs)
        value = ", ".join(f"{number:.6g}" for number in np.atleast_1d(runs[0][2]))
        print(f"| {figure} | {way} | {np.median(seconds):.2f} | {min(seconds):.2f} | {memory:.2f} | {value} |")
        summary.append({"figure": figure, "way": way, "seconds": round(float(np.median(seconds)), 3), "gb": memory})
    settings = {"dim": args.dim, "count": args.count, "rounds": args.rounds, "threads": torch.get_num_threads()}
    print(json.dumps({"benchmark": "figures", **settings, "results": summary}))


if __name__ == "__main__":
    main()
