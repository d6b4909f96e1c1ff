"""Compares time and memory of the metrics with straightforward implementations; the last line is JSON.

    OMP_NUM_THREADS=2 python benchmarks/metrics.py

Straightforward are: the trace of the matrix square root from all complex eigenvalues, or by Newton-Schulz iteration;
sorted distances in one full matrix; `numpy.cov`. `--full` adds precision and recall of 50,000 samples and 10,000
reference images, with this package only. Memory is the largest increase of the resident memory during a call.
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


def resident_bytes() -> int:
    """Returns the resident memory of the process on Linux, 0 elsewhere."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return 0


def measure(function: Callable[[], Any]) -> tuple[float, float, Any]:
    """Returns the seconds of a call, the largest increase of memory in GB, and the result."""
    before, peak, done = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, resident_bytes())

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
    parser.add_argument("--num-images", type=int, default=6000, help="rows of each set of features")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="add 50,000 samples and 10,000 reference images")
    options = parser.parse_args()

    reference, sample = clustered(1, options.num_images, options.dim), clustered(2, options.num_images, options.dim)
    a, b = compute_statistics(reference).covariance, compute_statistics(sample).covariance
    logits = clustered(3, options.num_images, 1008) * 8
    methods: dict[str, dict[str, Callable[[], Any]]] = {
        "trace of the square root": {
            "bitdance": lambda: trace_sqrt(a, b),
            "all eigenvalues": lambda: trace_by_eigenvalues(a, b),
            "Newton-Schulz, 50 steps": lambda: trace_by_newton_schulz(a, b),
        },
        "precision and recall": {
            "bitdance": lambda: precision_recall(reference, sample),
            "full matrices": lambda: precision_recall_of_full_matrices(reference, sample),
        },
        "statistics": {
            "bitdance": lambda: float(compute_statistics(reference).mean.sum()),
            "np.cov": lambda: float(np.cov(reference, rowvar=False).shape and reference.mean(0).sum()),
        },
        "Inception Score": {"bitdance": lambda: inception_score(logits)},
        "KID, 10 subsets": {"bitdance": lambda: subset_kid(reference, sample, 10, min(1000, options.num_images))},
    }
    runs: dict[tuple[str, str], list[tuple[float, float, Any]]] = {}
    for _ in range(options.rounds):
        for metric, functions in methods.items():
            for method, function in functions.items():
                runs.setdefault((metric, method), []).append(measure(function))
    if options.full:
        del reference, sample
        reference, sample = clustered(1, 10_000, options.dim), clustered(2, 50_000, options.dim)
        result = measure(lambda: precision_recall(reference, sample))
        runs["precision and recall, 50,000 x 10,000", "bitdance"] = [result]

    print("| metric | method | seconds (median) | fastest | memory, GB | value |\n|---|---|---|---|---|---|")
    results = []
    for (metric, method), measured in runs.items():
        seconds, memory = [run[0] for run in measured], max(run[1] for run in measured)
        median = float(np.median(seconds))
        value = ", ".join(f"{number:.6g}" for number in np.atleast_1d(measured[0][2]))
        print(f"| {metric} | {method} | {median:.2f} | {min(seconds):.2f} | {memory:.2f} | {value} |")
        results.append({"metric": metric, "method": method, "seconds": round(median, 3), "memory_gb": round(memory, 3)})
    print(json.dumps({"settings": vars(options), "threads": torch.get_num_threads(), "results": results}))


if __name__ == "__main__":
    main()
