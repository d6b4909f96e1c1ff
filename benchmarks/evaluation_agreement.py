"""Agreement of the metrics with ADM's evaluation suite: a Markdown table of all golden cases.

    python benchmarks/evaluation_agreement.py FOLDER

FOLDER holds results of ADM: inception_random.npz, inception_random_bn.npz, resize_tf1.npz, fid.npz and .json,
precision_recall.npz and .json, inception_score.npz; metrics without a file are left out (tests/data/evaluator holds
some of the cases). Large inputs are not stored but generated here and compared with their SHA-256. The exit status is 1
if a case disagrees.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import pathlib
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from bitdance.metrics.frechet_distance import frechet_distance
from bitdance.metrics.inception_score import inception_score
from bitdance.metrics.precision_recall import precision_recall, squared_radii
from bitdance.metrics.statistics import compute_statistics
from bitdance.runtime.errors import UserError

Wanted = Callable[[str], bool]
"""Name of a case -> whether to compare it."""


class Row(NamedTuple):
    """A row of the table."""

    metric: str
    case: str
    adm: float
    ours: float
    tolerance: float
    """Of the absolute difference."""

    @property
    def difference(self) -> float:
        return abs(self.ours - self.adm)

    @property
    def ok(self) -> bool:
        return self.difference <= self.tolerance


# Inputs. Uniform numbers of RandomState and single IEEE operations are bit-identical on every machine.


def normals(seed: int, rows: int, columns: int) -> np.ndarray:
    """Approximately normal numbers, float64: standardized sums of four uniform ones."""
    random = np.random.RandomState(seed)
    total = random.random_sample((rows, columns))
    for _ in range(3):
        total = total + random.random_sample((rows, columns))
    return (total - 2.0) * 1.7320508075688772


def features(
    seed: int, rows: int, dim: int, shift: float = 0.0, clusters: int = 40, noise: float = 0.30, spread: float = 0.25
) -> np.ndarray:
    """Clustered, non-negative features like Inception's; the cluster centres are the same for all seeds."""
    centres = normals(77, clusters, dim) * spread
    labels = np.random.RandomState(seed + 1).randint(0, clusters, size=rows)
    scales = np.random.RandomState(78).random_sample(dim) * 1.2 + 0.4
    x = (normals(seed, rows, dim) * noise + centres[labels] + (0.35 + shift)) * scales
    return np.maximum(x, 0.0).astype(np.float32)


def peaky_logits(seed: int, rows: int, amplitude: float) -> np.ndarray:
    """Logits with one large entry in each row."""
    x = normals(seed, rows, 1008)
    x[np.arange(rows), np.random.RandomState(seed).randint(0, 1008, rows)] += amplitude
    return x.astype(np.float32)


def classifier() -> np.ndarray:
    """A random last layer of Inception without its bias, (2048, 1008) float32."""
    random = np.random.RandomState((zlib.crc32(b"fc.weight") + 20240607) & 0xFFFFFFFF)
    return (random.random_sample((1008, 2048)) * 0.5 - 0.25).astype(np.float32).T


def checked(array: np.ndarray, sha256: str) -> np.ndarray:
    """Returns the array if it is the input of ADM."""
    if hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest() != sha256:
        raise SystemExit("an input could not be reproduced: its SHA-256 differs from that in the golden file.")
    return array


PAIRS = {
    "incep_2048_full": lambda: (features(300, 3000, 2048), features(400, 2500, 2048, 0.01)),
    "incep_2048_rankdef": lambda: (features(300, 600, 2048), features(400, 700, 2048, 0.01)),
    "incep_2048": lambda: (features(300, 2000, 2048), features(400, 1500, 2048, 0.01)),
    "incep_2048_b": lambda: (
        features(500, 3000, 2048, spread=0.05),
        features(600, 3000, 2048, noise=0.295, spread=0.05),
    ),
    "incep_256": lambda: (features(100, 500, 256), features(200, 450, 256, 0.02)),
    "incep_small": lambda: (features(100, 500, 256), features(200, 450, 256, 0.02)),
    "incep_256_rankdef": lambda: (features(100, 120, 256), features(200, 100, 256, 0.02)),
}
"""(reference, sample)."""

LOGITS = {
    "n5000": lambda: peaky_logits(2, 5000, 7),
    "n5001": lambda: peaky_logits(3, 5001, 7),
    "n12345": lambda: peaky_logits(4, 12345, 9),
    "n700": lambda: peaky_logits(5, 700, 7),
    "n513_batches": lambda: peaky_logits(6, 513, 7),
    "onehot60_1008": lambda: (60 * np.eye(1008)).astype(np.float32),
    "pool_incep_a": lambda: features(300, 1300, 2048),
    "pool_incep_b": lambda: features(700, 513, 2048, clusters=200),
}


def pair(golden: dict[str, np.ndarray], case: str, names: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """The two inputs of a case, stored or generated; a single column is stored flat."""
    first, second = (f"{case}/{name}" for name in names)
    if first in golden and golden[first].dtype == np.float32:
        a, b = golden[first], golden[second]
        return a.reshape(len(a), -1), b.reshape(len(b), -1)
    digests = [
        str(golden[key if key in golden else f"{case}/sha_{name}"])
        for key, name in zip((first, second), names, strict=True)
    ]
    a, b = PAIRS[case]()
    return checked(a, digests[0]), checked(b, digests[1])


def load(folder: pathlib.Path, name: str) -> dict[str, np.ndarray]:
    with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def cases(golden: dict[str, np.ndarray], key: str, wanted: Wanted) -> list[str]:
    names = [name.partition("/")[0] for name in golden if name.endswith(f"/{key}")]
    return [name for name in names if wanted(name)]


# Metrics: each function yields the rows of a file in METRICS.


def fid_rows(folder: pathlib.Path, wanted: Wanted) -> Iterator[Row]:
    """FID with ADM's float32 mean, and with our float64 mean against the same in float64."""
    golden = load(folder, "fid")
    exact = json.loads((folder / "fid.json").read_text())["cases"]
    for case in cases(golden, "adm_fid", wanted):
        reference, sample = pair(golden, case, ("a", "b"))
        # ADM adds 1e-6 to the diagonals when its matrix root fails, which changes its FID.
        slack = 2e-2 if case.startswith("dead_channels") else 0.0
        for adm_mean in (True, False):
            statistics = [compute_statistics(x) for x in (reference, sample)]
            if adm_mean:  # a float32 sum in the order of the rows
                means = (x.mean(0) for x in (reference, sample))
                statistics = [dataclasses.replace(s, mean=mean) for s, mean in zip(statistics, means, strict=True)]
            ours = frechet_distance(*statistics)
            theirs = float(golden[f"{case}/adm_fid"]) if adm_mean else exact[case]["eigh_mu64"]
            metric = "FID" if adm_mean else "FID, float64 mean (not ADM)"
            tolerance = max(slack if adm_mean else 0.0, 1e-6 * max(1.0, abs(theirs)))
            yield Row(metric, case, theirs, ours, tolerance)


def precision_recall_rows(folder: pathlib.Path, wanted: Wanted) -> Iterator[Row]:
    """Precision and recall in float32 and with float16 rounding, without tolerance, and the radii."""
    golden = load(folder, "precision_recall")
    facts = json.loads((folder / "precision_recall.json").read_text())
    for case in cases(golden, "precision_fp32", wanted):
        reference, sample = pair(golden, case, ("ref", "sample"))
        ours = precision_recall(reference, sample)
        yield Row("precision", case, float(golden[f"{case}/precision_fp32"]), ours.precision, 0.0)
        yield Row("recall", case, float(golden[f"{case}/recall_fp32"]), ours.recall, 0.0)
        for name, x in (("ref", reference), ("sample", sample)):
            theirs, norms = golden[f"{case}/radii_{name}_fp32"], np.square(x, dtype=np.float64).sum(1)
            error = np.max(np.abs(squared_radii(x) - theirs) / np.maximum(norms, 1.0))
            yield Row(f"radii of {name}, error / squared norm (at least 1)", case, 0.0, float(error), 1e-5)
        rounded = precision_recall(reference, sample, adm_fp16=True)
        for name, value, theirs in zip(("precision", "recall"), rounded, golden[f"{case}/emul_gpu16"], strict=True):
            yield Row(f"{name}, float16 on a GPU (imitation of ADM)", case, float(theirs), value, 0.0)
    if wanted("n3") and "n3" in facts:
        try:
            precision_recall(np.zeros((3, 8), np.float32), np.zeros((3, 8), np.float32))
            refused = 0.0
        except UserError:
            refused = 1.0
        yield Row("fewer than 4 rows are refused", "n3", 1.0, refused, 0.0)
    if wanted("mixed_overflow") and "mixed_overflow/pr_one_block" in golden:
        reference, sample = features(100, 500, 256), features(200, 450, 256, 0.02)
        reference[:150] *= 64
        ours = precision_recall(reference, sample, adm_fp16=True)
        for name, value, theirs in zip(
            ("precision", "recall"), ours, golden["mixed_overflow/pr_one_block"], strict=True
        ):
            # ADM computes the block in float32, but the samples' radii in float16, as on a CPU.
            yield Row(f"{name}, beyond float16", "mixed_overflow", float(theirs), value, 1e-2)


def inception_score_rows(folder: pathlib.Path, wanted: Wanted) -> Iterator[Row]:
    """The Inception Score in float64; ADM's is float32."""
    golden = load(folder, "inception_score")
    for case in cases(golden, "adm_is", wanted):
        logits = golden[f"{case}/logits"]
        if logits.dtype != np.float32:
            logits = checked(LOGITS[case](), str(logits))
        exact, adm = float(golden[f"{case}/fp64_is"]), float(golden[f"{case}/adm_is"])
        ours = inception_score(logits, int(golden[f"{case}/split_size"]))
        if not math.isnan(adm):
            yield Row("Inception Score", case, adm, ours, 1e-6 * adm)
        yield Row("Inception Score in float64 (not ADM)", case, exact, ours, 1e-10 * exact)
    for case in cases(golden, "sha", wanted):
        logits = checked(LOGITS[case](), str(golden[f"{case}/sha"])) @ classifier()
        for chunk in (5000, 400):
            adm, exact, _ = golden[f"{case}/split{chunk}"].tolist()
            ours = inception_score(logits, chunk)
            yield Row(f"Inception Score, chunks of {chunk}", case, adm, ours, 1e-6 * adm)


def inception_rows(folder: pathlib.Path, wanted: Wanted) -> Iterator[Row]:
    """Relative L2 error of the network's outputs with random weights, and differences from TensorFlow's resize."""
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests"))
    import inception_inputs
    import torch

    from bitdance.metrics.inception import Inception, resize

    golden = load(folder, "inception_random")
    network = Inception()
    network.load_state_dict(inception_inputs.weights(folder / "inception_random_bn.npz"), strict=False)
    network.fold()
    for side in sorted(int(name.removeprefix("images_")) for name in golden if name.startswith("images_")):
        if not wanted(str(side)):
            continue
        with torch.inference_mode():
            found = network(torch.from_numpy(golden[f"images_{side}"]))
        outputs = {"pool": found.pool, "spatial": found.spatial, "logits_unbiased": found.logits}
        outputs["softmax"] = found.logits.softmax(1)
        for name, ours in outputs.items():
            adm = golden[f"{name}_{side}"]
            error = np.linalg.norm(ours.numpy() - adm) / np.linalg.norm(adm)
            yield Row(f"Inception, {name}, relative error", f"{side} px", 0.0, float(error), 1e-4)
    resized = load(folder, "resize_tf1")
    for size in (name.removeprefix("in_") for name in resized if name.startswith("in_")):
        if wanted(size):
            ours = resize(torch.from_numpy(resized[f"in_{size}"])).numpy()
            different = float((ours != resized[f"out_{size}"]).sum())
            yield Row("resize, values that differ", size, 0.0, different, 0.0)


METRICS = {
    "inception_random": inception_rows,
    "fid": fid_rows,
    "precision_recall": precision_recall_rows,
    "inception_score": inception_score_rows,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="the folder of golden files")
    folder = parser.parse_args().folder
    print("| metric | case | ADM | ours | difference | tolerance | ok |\n|---|---|---|---|---|---|---|")
    wrong = 0
    for name, rows in METRICS.items():
        if not (folder / f"{name}.npz").exists():
            print(f"{name}.npz is not in {folder}: left out.", file=sys.stderr)
            continue
        for row in rows(folder, lambda case: True):
            numbers = f"{row.adm:.10g} | {row.ours:.10g} | {row.difference:.1e} | {row.tolerance:.1e}"
            print(f"| {row.metric} | {row.case} | {numbers} | {'yes' if row.ok else '**no**'} |", flush=True)
            wrong += not row.ok
    if wrong:
        print(f"\n{wrong} rows disagree.", file=sys.stderr)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
