"""The metrics: agreement with values of ADM's suite, properties that hold for any features, and invalid input.

tests/data/evaluator holds some of the values of ADM's evaluator; large inputs are generated again from seeds.
"""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdance.metrics.accuracy import top_k_accuracy
from bitdance.metrics.feature_set import read_statistics
from bitdance.metrics.frechet_distance import frechet_distance, trace_sqrt
from bitdance.metrics.inception_score import inception_score, shuffled_inception_score
from bitdance.metrics.kid import kid, subset_kid
from bitdance.metrics.precision_recall import precision_recall, squared_radii
from bitdance.metrics.statistics import Statistics, StatisticsAccumulator, compute_statistics
from bitdance.runtime.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "data" / "evaluator"


def load_agreement() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evaluation_agreement", ROOT / "benchmarks/evaluation_agreement.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


AGREEMENT = load_agreement()
CASES = {  # quick and slow ones
    "fid_rows": (
        "big_mean_32bit dead_channels_64 rankdef_n20_64 n2_64 onedim incep_256 incep_256_rankdef",
        "incep_2048_full incep_2048_rankdef",
    ),
    "precision_recall_rows": (
        "duplicates integer_grid_ties n4_vs_n5 incep_small n3 mixed_overflow",
        "incep_2048 incep_2048_b",
    ),
    "inception_score_rows": (
        "uniform same_rows onehot60_1008 underflow_gap120 n700 n513_batches",
        "n5000 n5001 n12345 pool_incep_a pool_incep_b",
    ),
}


@pytest.mark.parametrize(
    ("metric", "case"),
    [
        pytest.param(metric, case, marks=[pytest.mark.slow] * slow, id=f"{metric}-{case}")
        for metric, lists in CASES.items()
        for slow, cases in enumerate(lists)
        for case in cases.split()
    ],
)
def test_agrees_with_adm(metric: str, case: str) -> None:
    found = list(getattr(AGREEMENT, metric)(GOLDEN, lambda name: name == case))
    assert found
    assert not [row for row in found if not row.ok]


def test_all_stored_cases_are_compared() -> None:
    stored = {name.partition("/")[0] for name in AGREEMENT.load(GOLDEN, "fid")}
    assert stored == set(" ".join(CASES["fid_rows"]).split())


def test_a_disagreement_is_found() -> None:
    assert not AGREEMENT.Row("FID", "x", 1.0, 1.1, 0.05).ok
    assert not AGREEMENT.Row("FID", "x", 1.0, float("nan"), 0.05).ok


# Statistics


def rows(seed: int, count: int, dim: int = 8, offset: float = 0.0) -> np.ndarray:
    return (np.random.RandomState(seed).standard_normal((count, dim)) + offset).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 60), max_size=5), block=st.integers(1, 70), offset=st.sampled_from([0.0, 300.0, 1e5])
)
def test_batches_and_blocks_do_not_change_statistics(cuts: list[int], block: int, offset: float) -> None:
    x = rows(0, 60, 5, offset)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitdance.metrics.statistics.BLOCK", block)
        batches, whole = StatisticsAccumulator(5), compute_statistics(x)
        for start, stop in itertools.pairwise([0, *sorted(cuts), 60]):
            batches.add(x[start:stop])
        found = batches.statistics()
    np.testing.assert_array_equal(found.mean, whole.mean)
    np.testing.assert_array_equal(found.covariance, whole.covariance)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(found.mean, exact.mean(0), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(found.covariance, np.cov(exact, rowvar=False), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "features",
    [
        np.zeros(8, np.float32),
        np.zeros((2, 7), np.float32),
        np.zeros((2, 8), np.int64),
        np.full((2, 8), np.inf, np.float32),
        np.full((2, 8), 1e300),
    ],
)
def test_invalid_features_are_refused_and_not_added(features: np.ndarray) -> None:
    accumulator = StatisticsAccumulator(8)
    with pytest.raises(UserError):
        accumulator.add(features)
    with pytest.raises(UserError, match="the covariance of 0 images is undefined: give at least 2"):
        accumulator.statistics()


def save_adm(path: Path, **changes: np.ndarray | None) -> Path:
    arrays: dict[str, np.ndarray | None] = {
        "arr_0": np.zeros((1, 2, 2, 3), np.uint8),
        "mu": np.zeros(3, np.float32),
        "sigma": np.eye(3),
        "mu_s": np.ones(2, np.float32),
        "sigma_s": np.eye(2),
    }
    np.savez(path, **{key: value for key, value in (arrays | changes).items() if value is not None})
    return path


def test_statistics_of_adm_are_read(tmp_path: Path) -> None:
    fid, sfid = read_statistics(save_adm(tmp_path / "reference.npz"))
    assert fid is not None and fid.covariance.shape == (3, 3) and fid.mean.dtype == np.float32
    assert sfid is not None and sfid.mean.tolist() == [1, 1]
    none = dict.fromkeys(("mu", "sigma", "mu_s", "sigma_s"))
    assert read_statistics(save_adm(tmp_path / "images.npz", **none)) == (None, None)
    with pytest.raises(UserError, match=r"missing\.npz"):
        read_statistics(tmp_path / "missing.npz")


@pytest.mark.parametrize(
    "changes",
    [
        {"mu_s": None},
        {"mu": np.zeros(4, np.float32)},
        {"mu": np.zeros(3, np.int64)},
        {"sigma": np.full((3, 3), np.nan)},
        {"sigma": np.triu(np.ones((3, 3)))},
        {"sigma": -np.eye(3)},
        {"sigma": np.zeros((3, 3), object)},
        {"mu": np.zeros(0), "sigma": np.zeros((0, 0))},
        {"sigma_s": np.array(["a"])},
    ],
)
def test_invalid_statistics_are_refused(tmp_path: Path, changes: dict[str, np.ndarray | None]) -> None:
    with pytest.raises(UserError, match=r"reference\.npz"):
        read_statistics(save_adm(tmp_path / "reference.npz", **changes))


# Fréchet distance


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), m=st.integers(2, 40), n=st.integers(2, 40))
def test_frechet_is_symmetric_and_zero_for_identical_statistics(seed: int, m: int, n: int) -> None:
    a, b = compute_statistics(rows(seed, m, 12)), compute_statistics(rows(seed + 1, n, 12, 0.5))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), abs=1e-5)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(a, b) > 0.1


def test_trace_of_rank_deficient_covariances_is_a_nuclear_norm() -> None:
    x, y = rows(3, 20, 64).astype(np.float64), rows(4, 30, 64).astype(np.float64)
    exact = np.linalg.svd((x - x.mean(0)) @ (y - y.mean(0)).T, compute_uv=False).sum() / np.sqrt(19 * 29)
    assert trace_sqrt(np.cov(x, rowvar=False), np.cov(y, rowvar=False)) == pytest.approx(exact, abs=1e-5)
    full = np.cov(rows(5, 200, 64), rowvar=False)
    deficient = np.cov(x, rowvar=False)
    assert trace_sqrt(deficient, full) == pytest.approx(trace_sqrt(full, deficient), abs=1e-6)


def test_frechet_of_constant_features() -> None:
    constant, other = compute_statistics(np.ones((50, 4), np.float32)), compute_statistics(rows(0, 100, 4))
    expected = np.square(other.mean - 1).sum() + np.trace(other.covariance)
    assert frechet_distance(constant, other) == pytest.approx(expected)


@pytest.mark.parametrize(
    "bad",
    [
        compute_statistics(rows(0, 9, 7)),
        Statistics(np.full(8, np.nan), np.eye(8)),
        Statistics(np.zeros(8), np.full((8, 8), np.inf)),
        Statistics(np.zeros(8), np.eye(7)),
        Statistics(np.zeros(8), np.zeros((8, 8, 1))),
    ],
)
def test_frechet_refuses_invalid_statistics(bad: Statistics) -> None:
    with pytest.raises(UserError):
        frechet_distance(compute_statistics(rows(0, 9)), bad)


# Precision and recall


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("tile", [5, 64, 2048])
def test_distances_are_right_in_tiles_of_any_size(monkeypatch: pytest.MonkeyPatch, k: int, tile: int) -> None:
    monkeypatch.setattr("bitdance.metrics.precision_recall.TILE", tile)
    a, b = rows(0, 83, 16), rows(1, 71, 16, 0.2)

    def distances(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return np.square(u[:, None].astype(np.float64) - v[None]).sum(2)

    radii_a, radii_b = (np.sort(distances(x, x), axis=1)[:, k] for x in (a, b))
    cross = distances(a, b)
    expected = (cross <= radii_a[:, None]).any(0).mean(), (cross <= radii_b).any(1).mean()
    np.testing.assert_allclose(squared_radii(a, k), radii_a, rtol=1e-5)
    assert precision_recall(a, b, k) == pytest.approx(expected, abs=1e-12)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1


@pytest.mark.parametrize("dim", [64, 2048])
def test_copies_lie_inside_each_others_balls(monkeypatch: pytest.MonkeyPatch, dim: int) -> None:
    """Also if float32 does not give a distance of zero, and in tiles of another shape."""
    x = np.abs(rows(0, 40, dim))
    copies = np.repeat(x, 4, axis=0)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)
    monkeypatch.setattr("bitdance.metrics.precision_recall.TILE", 37)
    assert precision_recall(copies, x.repeat(5, axis=0)[::-1]) == (1, 1)


def test_a_tile_that_overflows_float16_is_computed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitdance.metrics.precision_recall.ADM_TILE", 20)
    x, y = rows(0, 40, 16), rows(1, 40, 16)
    x[:20] *= 2.0**10  # squares exceed 65504
    exact, rounded = squared_radii(x), squared_radii(x, adm_fp16=True)
    np.testing.assert_array_equal(rounded[:20], exact[:20])
    assert np.isfinite(rounded).all() and (rounded[20:] != exact[20:]).any()
    np.testing.assert_array_equal(rounded[20:], rounded[20:].astype(np.float16))
    assert precision_recall(x, y, adm_fp16=True).precision > 0


def test_precision_recall_refuses_invalid_features() -> None:
    good = rows(0, 9)
    for bad in (rows(0, 3), rows(0, 9, 7), np.full((9, 8), np.nan, np.float32), np.zeros(9, np.float32)):
        for pair in ((good, bad), (bad, good)):
            with pytest.raises(UserError):
                precision_recall(*pair)
    with pytest.raises(UserError, match="k=0"):
        squared_radii(good, 0)


# Inception Score


def test_images_sorted_by_class_need_the_shuffle() -> None:
    logits = 12 * np.eye(100, dtype=np.float32).repeat(50, axis=0)
    mixed = np.random.RandomState(5).permutation(logits)
    truth = inception_score(logits, chunk=5000)
    assert inception_score(logits, chunk=500) < 0.2 * truth
    assert shuffled_inception_score(logits, chunk=500) == pytest.approx(inception_score(mixed, chunk=500), rel=0.02)
    assert shuffled_inception_score(logits, chunk=500) == shuffled_inception_score(logits, chunk=500)
    assert shuffled_inception_score(logits) == pytest.approx(truth, rel=1e-12)


def test_a_short_last_chunk_has_full_weight() -> None:
    logits = rows(0, 25, 10) * 3
    parts = [inception_score(logits[start : start + 10]) for start in (0, 10, 20)]
    assert inception_score(logits, chunk=10) == pytest.approx(np.mean(parts), rel=1e-14)


def test_inception_score_of_extreme_logits() -> None:
    assert inception_score(5000 * np.eye(7, dtype=np.float32)) == pytest.approx(7)
    for bad in (np.zeros((0, 5), np.float32), np.full((3, 5), np.inf, np.float32), np.zeros(5, np.float32)):
        for score in (inception_score, shuffled_inception_score):
            with pytest.raises(UserError):
                score(bad)
    with pytest.raises(UserError, match="chunk=0"):
        inception_score(np.zeros((3, 5), np.float32), chunk=0)


# KID


def plain_kid(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x.astype(np.float64), y.astype(np.float64)
    xx, yy, xy = (((u @ v.T) / x.shape[1] + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
    m, n = len(x), len(y)
    off_diagonal = ~np.eye(m, dtype=bool), ~np.eye(n, dtype=bool)
    return xx[off_diagonal[0]].sum() / m / (m - 1) + yy[off_diagonal[1]].sum() / n / (n - 1) - 2 * xy.mean()


@pytest.mark.parametrize("block", [7, 2048])
def test_kid_equals_the_plain_formula(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr("bitdance.metrics.kid.BLOCK", block)
    x, y = rows(0, 60), rows(1, 45, offset=0.3)
    assert kid(x, y) == pytest.approx(plain_kid(x, y), abs=1e-12)
    assert kid(x, x) == pytest.approx(plain_kid(x, x), abs=1e-12)


def test_kid_over_subsets() -> None:
    x, y, same = rows(0, 400), rows(1, 300, offset=0.3), rows(2, 300)
    mean, std = subset_kid(x, y, subsets=50, size=60)
    assert mean == pytest.approx(kid(x, y), abs=3 * std / np.sqrt(50)) and std > 0
    assert subset_kid(x, y, 3, 60) == subset_kid(x, y, 3, 60)
    assert subset_kid(x, y, 3, 60) != subset_kid(x, y, 3, 60, seed=1)
    whole = subset_kid(y, same, subsets=2, size=300)
    assert whole.mean == pytest.approx(kid(y, same), abs=1e-12) and whole.std < 1e-12


def test_kid_is_unbiased() -> None:
    """Zero on average for two small sets of the same distribution."""
    values = [kid(rows(2 * seed, 10, 3), rows(2 * seed + 1, 10, 3)) for seed in range(300)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(300)
    assert min(values) < 0


def test_kid_refuses_invalid_features() -> None:
    for pair in ((rows(0, 1), rows(0, 5)), (rows(0, 5), rows(0, 5, 7))):
        with pytest.raises(UserError):
            kid(*pair)
    with pytest.raises(UserError, match="size=6 cannot be drawn from 5 and 50 rows"):
        subset_kid(rows(0, 5), rows(0, 50), 2, 6)


# Accuracy


def test_top_k_accuracy() -> None:
    logits = np.array([[3, 2, 1, 0], [0, 1, 2, 3], [1, 1, 1, 1], [0, 5, 4, 0]], np.float32)
    labels = np.array([0, 2, 1, 3])
    assert [top_k_accuracy(logits, labels, k) for k in (1, 2, 3, 4)] == [0.25, 0.75, 0.75, 1.0]


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 4], [-1, 0, 0], [0.0, 1.0, 2.0], [[0, 1, 2]]])
def test_invalid_labels_are_refused(labels: list) -> None:
    with pytest.raises(UserError, match="labels"):
        top_k_accuracy(np.zeros((3, 4), np.float32), np.array(labels))
