"""`bitdance evaluate`, `sweep` and `sample --evaluate`, with a small network in place of Inception."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import random
import zipfile

import numpy as np
import pytest
import small
import torch
from PIL import Image

from bitdance.cli.main import main
from bitdance.metrics import inception, references
from bitdance.metrics.evaluation_config import EvaluationConfig
from bitdance.metrics.feature_set import (
    FeatureSet,
    describe_pixels,
    extract_features,
    read_feature_set,
    summarize_pixels,
    write_feature_set,
)
from bitdance.metrics.features import FeatureExtractor, Features
from bitdance.metrics.frechet_distance import frechet_distance
from bitdance.metrics.image_sources import ImageSource, NpzSource, open_source
from bitdance.metrics.precision_recall import precision_recall
from bitdance.metrics.report import build_report, compute_metrics, find_problems, format_table
from bitdance.metrics.statistics import compute_statistics
from bitdance.runtime.errors import UserError
from bitdance.runtime.process_group import World, init_distributed
from bitdance.sampling.job import JobConfig, SamplingJob
from bitdance.sampling.pipeline import Pipeline
from bitdance.sampling.sampler import SamplingConfig

SINGLE = World(0, 1, torch.device("cpu"))
SIZE = 12


def project(images: torch.Tensor) -> Features:
    """Means over a 2 x 2 grid as features, over a 3 x 3 grid as spatial features, and logits."""
    x = images.float().movedim(3, 1) / 255
    pool = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
    spatial = torch.nn.functional.adaptive_avg_pool2d(x, 3).flatten(1)
    return Features(pool, spatial, pool[:, ::4] * 30)


SMALL = FeatureExtractor(inception.NAME, SIZE, project, digest=inception.PUBLISHED_DIGEST + "0" * 56)


@pytest.fixture(autouse=True)
def small_extractor(monkeypatch):
    """The small network in place of Inception, which has its own tests."""
    monkeypatch.setattr(references.FeatureExtractors, "loaded", (SMALL,))


def pixels(count: int = 30, side: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def save(path: pathlib.Path, images: np.ndarray, labels: np.ndarray | None = None) -> pathlib.Path:
    np.savez(path, *([images] if labels is None else [images, labels]))
    return path


def save_images(folder: pathlib.Path, images: np.ndarray) -> pathlib.Path:
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index}.png")
    return folder


def extract(path: pathlib.Path, images: np.ndarray, labels: np.ndarray | None = None, **options) -> FeatureSet:
    return extract_features(open_source(save(path, images, labels)), [SMALL], SINGLE, **options)[0]


def run(tmp_path: pathlib.Path, *arguments: object) -> dict:
    output = tmp_path / "evaluation.json"
    options = ("--output", output, "--cache", tmp_path / "cache", "--device", "cpu")
    main(["evaluate", *map(str, (*arguments, *options))])
    return json.loads(output.read_text())


def only(record: dict) -> dict:
    (row,) = record["samples"].values()
    return row


# ------------------------------------------------------------ sources


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "f4", "<i8", ">f8"])
def test_an_npz_is_read_in_blocks(tmp_path, compressed, dtype):
    images, labels = pixels(11).astype(dtype), np.arange(11)
    (np.savez_compressed if compressed else np.savez)(tmp_path / "a.npz", images, labels)
    source = open_source(tmp_path / "a.npz")
    assert (source.shape, source.dtype, source.labels.tolist()) == ((11, 8, 8, 3), np.dtype(dtype), list(range(11)))
    for ranks in (1, 2, 3):
        parts = [list(source.blocks(4, rank, ranks)) for rank in range(ranks)]
        found = [parts[index % ranks][index // ranks] for index in range(3)]
        assert sum(map(len, parts)) == 3 and [len(block) for block in found] == [4, 4, 3]
        assert np.array_equal(np.concatenate(found), images)


def test_an_npz_with_other_names_is_read_by_its_only_images(tmp_path):
    np.savez(tmp_path / "a.npz", samples=pixels(5), other=np.arange(3))
    source = open_source(tmp_path / "a.npz")
    assert len(source) == 5 and source.labels is None


def test_folders_of_images(tmp_path):
    images = pixels(6)
    folder = save_images(tmp_path / "flat", images)
    source = open_source(folder)
    assert np.array_equal(np.concatenate(list(source.blocks(4))), images) and source.labels is None
    (folder / "labels.json").write_text("[2, 1, 0, 2, 1, 0]")
    assert open_source(folder).labels.tolist() == [2, 1, 0, 2, 1, 0]
    assert open_source(folder, limit=2).labels.tolist() == [2, 0]
    Image.fromarray(pixels(1, 20)[0]).save(folder / "9.png")
    (folder / "labels.json").unlink()
    with pytest.raises(UserError, match=r"9\.png in .* has 20 x 20 pixels, the first image 8 x 8: .* `image_size`"):
        list(open_source(folder).blocks(4))
    assert open_source(folder, image_size=4).shape == (7, 4, 4, 3)
    source = open_source(small.pictures(tmp_path / "classes"))
    assert (len(source), source.num_classes, source.shape[1]) == (12, 3, 16)
    assert source.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    Image.fromarray(images[0]).save(tmp_path / "classes" / "stray.png")
    source = open_source(tmp_path / "classes")
    assert len(source) == 12 and "beside the class folders: stray.png" in source.summary
    for text in ("[" * 200_000, "{}", "[1e999]", "[1, 2, 3, 4, 5, 99999999]", "[[]]"):
        (folder / "labels.json").write_text(text)
        with pytest.raises(UserError, match=r"labels\.json"):
            open_source(folder, image_size=4)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ([pixels(4)[..., :1]], r"\(4, 8, 8, 1\): expected numbers"),
        ([np.zeros((0, 8, 8, 3), np.uint8)], r"\(0, 8, 8, 3\)"),
        ([np.zeros((4, 8, 8, 3), complex)], "complex128"),
        ([np.zeros((4, 3))], r"\(4, 3\)"),
        ([np.asfortranarray(pixels(4))], "Fortran order"),
        ([np.array([None, 1], object)], "object"),
        ([pixels(4), np.arange(3)], "expected 4 integer labels"),
        ([pixels(4), np.full(4, -1)], "label -1"),
        ([pixels(4), np.zeros(4)], "float64"),
    ],
)
def test_invalid_arrays(tmp_path, arrays, words):
    np.savez(tmp_path / "a.npz", *arrays)
    with pytest.raises(UserError, match=words):
        open_source(tmp_path / "a.npz")


def test_invalid_sources(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        open_source(tmp_path / "nothing")
    (tmp_path / "x.job").mkdir()
    with pytest.raises(UserError, match="unfinished sampling job"):
        open_source(tmp_path / "x.job")
    with pytest.raises(UserError, match="leave out `image_size`"):
        open_source(save(tmp_path / "a.npz", pixels(4)), image_size=4)
    np.savez(tmp_path / "c.npz", a=pixels(2), b=pixels(2))
    with pytest.raises(UserError, match="holds no arr_0"):
        open_source(tmp_path / "c.npz")
    # A header that announces far more than the file holds: no memory is allocated for it.
    header = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 512, 512, 3)}
    np.lib.format.write_array_header_1_0(header, shape)
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + b"x" * 100)
    with pytest.raises(UserError, match=r"arr_0\.npy is truncated"):
        open_source(tmp_path / "d.npz")


def test_200_mutated_files_are_refused_or_read_unchanged(tmp_path):
    """Files of images and of features."""
    features = extract(tmp_path / "images.npz", pixels(8), np.arange(8) % 3)
    write_feature_set(tmp_path / "features.npz", features)
    files = [(tmp_path / name).read_bytes() for name in ("images.npz", "features.npz")]
    draw, refused = random.Random(0), 0
    for number in range(200):
        whole = bytearray(files[number % 2])
        kind = number // 2 % 4
        if kind == 0:
            whole = whole[: draw.randrange(len(whole))]
        elif kind == 1:
            del whole[draw.randrange(len(whole)) :][: draw.randrange(1, 200)]
        else:
            for _ in range(1 if kind == 2 else 30):
                whole[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path = tmp_path / "mutated.npz"
        path.write_bytes(whole)
        try:
            found = read_feature_set(path)
            if found is None:
                found = extract_features(open_source(path), [SMALL], SINGLE)[0]
            if found.pool is None:
                raise UserError("no features")
            assert np.array_equal(found.pool, features.pool) and found.about["count"] == 8  # a byte without effect
        except UserError as error:
            refused += 1
            assert len(str(error)) > 10 and "\n" not in str(error)
    assert refused >= 140


# ------------------------------------------------------------ features


def test_features_do_not_depend_on_the_batch_size(tmp_path, monkeypatch):
    monkeypatch.setattr("bitdance.metrics.statistics.BLOCK", 8)
    images, labels = pixels(23), np.arange(23) % 3
    expected = project(torch.from_numpy(images))
    sets = [extract(tmp_path / "a.npz", images, labels, batch_size=size) for size in (1, 5, 8, 20, 32)]
    for found in sets:
        assert np.array_equal(found.pool, expected.pool) and np.array_equal(found.logits, expected.logits)
        assert np.array_equal(found.statistics.covariance, sets[0].statistics.covariance)
        assert np.array_equal(found.spatial.mean, sets[0].spatial.mean)
        for statistics, features in ((found.statistics, expected.pool), (found.spatial, expected.spatial)):
            np.testing.assert_allclose(statistics.covariance, np.cov(features.numpy().T.astype(float)), atol=1e-12)
        assert found.about["content"] == content_digest(NpzSource(tmp_path / "a.npz"))
        assert found.about["count"] == 23
    kept = extract(tmp_path / "a.npz", images, labels, keep=3)
    assert np.array_equal(kept.pool, expected.pool.numpy()[[0, 11, 22]]) and kept.logits is None
    np.testing.assert_array_equal(kept.statistics.mean, sets[0].statistics.mean)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("processes", [2, 3])
def test_features_do_not_depend_on_the_number_of_processes(tmp_path, processes):
    expected = extract(tmp_path / "a.npz", pixels(23), np.arange(23) % 3, batch_size=4)

    def extract_part() -> None:
        with init_distributed("cpu", 1) as world:
            sets = extract_features(open_source(tmp_path / "a.npz"), [SMALL], world, batch_size=4)
            assert len(sets) == world.is_main
            for features in sets:
                write_feature_set(tmp_path / "f.npz", features)

    small.run_forked(extract_part, processes)
    found = read_feature_set(tmp_path / "f.npz")
    assert np.array_equal(found.pool, expected.pool) and np.array_equal(found.logits, expected.logits)
    assert found.about["content"] == expected.about["content"]
    assert compute_metrics(found, expected) == compute_metrics(expected, expected)


def content_digest(source: ImageSource, batch_size: int = 256) -> str:
    summaries = [summarize_pixels(images) for images in source.blocks(batch_size)]
    return str(describe_pixels(summaries, str(source.dtype), source.labels)["content"])


def test_the_digest_is_of_pixels_and_labels_in_any_format(tmp_path):
    images = pixels(5)
    digests = [content_digest(open_source(save(tmp_path / "a.npz", images)))]
    digests.append(content_digest(open_source(save_images(tmp_path / "flat", images)), batch_size=2))
    assert digests[0] == digests[1]
    others = [images[::-1], images.astype(np.float32), images[:4]]
    digests += [content_digest(open_source(save(tmp_path / "b.npz", other))) for other in others]
    digests.append(content_digest(open_source(save(tmp_path / "b.npz", images, np.arange(5)))))
    assert len(set(digests)) == 5
    with pytest.raises(UserError, match="not finite"):
        extract(tmp_path / "nan.npz", np.where(images == images.max(), np.nan, images))


def test_stored_features_are_bit_identical(tmp_path):
    found = extract(tmp_path / "a.npz", pixels(9), np.arange(9))
    write_feature_set(tmp_path / "f.npz", found)
    stored = read_feature_set(tmp_path / "f.npz")
    for name in ("pool", "logits", "labels"):
        assert np.array_equal(getattr(found, name), getattr(stored, name))
    assert compute_metrics(stored, found) == compute_metrics(found, found)
    assert stored.about == {**found.about, "format": "bitdance-features", "format_version": 2}
    old = np.frombuffer(json.dumps({**stored.about, "format_version": 1}).encode(), np.uint8)
    np.savez(tmp_path / "old.npz", about=old, pool=found.pool)
    with pytest.raises(UserError, match=r"old\.npz is not of format bitdance-features 2: extract the features again"):
        read_feature_set(tmp_path / "old.npz")


def test_statistics_beside_which_are_other_arrays(tmp_path):
    found = extract(tmp_path / "x.npz", pixels(10))
    statistics = compute_statistics(found.pool)
    np.savez(tmp_path / "s.npz", mu=statistics.mean, sigma=statistics.covariance, pool=found.pool, labels=np.zeros(0))
    stored = read_feature_set(tmp_path / "s.npz")
    assert stored.pool is None and stored.labels is None and np.array_equal(stored.statistics.mean, statistics.mean)


def test_metrics_are_those_of_the_functions(tmp_path):
    a, b = (extract(tmp_path / "x.npz", pixels(40, seed=seed)) for seed in (1, 2))
    metrics = compute_metrics(a, b, kid=True)
    expected = frechet_distance(compute_statistics(b.pool), compute_statistics(a.pool))
    assert metrics["fid"] == pytest.approx(expected, rel=1e-9)
    assert (metrics["precision"], metrics["recall"]) == tuple(precision_recall(b.pool, a.pool))
    scores = {"inception_score", "inception_score_in_order"}
    assert set(metrics) == {"fid", "sfid", "precision", "recall", "kid", "kid_std"} | scores
    assert abs(compute_metrics(a, a)["fid"]) < 1e-9
    with pytest.raises(UserError, match=r"has features of another extractor \(c{12}\)"):
        compute_metrics(a, dataclasses.replace(b, about={**b.about, "extractor_digest": "c" * 64}))
    with pytest.raises(UserError, match="x holds statistics without features"):
        compute_metrics(FeatureSet({"source": "x", "count": 3}, None, None), None)


def test_accuracy_of_a_classifier(tmp_path):
    def classify(images: torch.Tensor) -> Features:
        brightness = images.float().mean((1, 2, 3))
        return Features(brightness[:, None], None, -(brightness[:, None] - torch.tensor([20.0, 120.0, 220.0])).square())

    extractor = FeatureExtractor("brightness", 1, classify, classifies=True)
    images = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (10, 130, 255, 0)])
    source = open_source(save(tmp_path / "a.npz", images, np.array([0, 1, 2, 2])))
    found = extract_features(source, [extractor], SINGLE)[0]
    assert compute_metrics(found, None) == {"accuracy": 0.75, "top_5_accuracy": 1.0}


# ------------------------------------------------------------ warnings

GOOD, LABELS = pixels(12), np.arange(12) % 3
GOOD[0, 0, 0], GOOD[1, 0, 0] = 0, 255


@pytest.mark.parametrize(
    ("images", "labels", "about", "words"),
    [
        (GOOD, LABELS, {}, ""),
        (GOOD, LABELS, {"count": 60}, "60 images instead of 50000: FID and sFID are too high"),
        (GOOD.astype(np.float32), LABELS, {}, "pixels are float32, not uint8"),
        (GOOD / 255.0, LABELS, {}, "pixels lie between 0 and 1 instead of 0 and 255"),
        (GOOD.astype(int) - 100, LABELS, {}, "pixels lie between -100 and 155"),
        (GOOD[[0, 1, 2, 0, 4, 5, 6, 0, 8, 9, 10, 11]], LABELS, {}, "2 images are exact copies of others"),
        (GOOD, np.array([0] * 10 + [1, 2]), {}, "classes have between 1 and 10 images"),
        (GOOD[:, :6], LABELS, {}, "images are 8 x 6"),
        (GOOD, LABELS, {"extractor_digest": "0123"}, "not the published file"),
    ],
)
def test_each_problem_has_its_warning(tmp_path, images, labels, about, words):
    found = extract(tmp_path / "w.npz", images, labels)
    found = dataclasses.replace(found, about={**found.about, "count": 50_000, **about})
    warnings = " ".join(find_problems(found, None, compute_metrics(found, None)))
    assert words in warnings and bool(words) == bool(warnings)


@pytest.mark.parametrize(("labelled", "words"), [(True, "are sorted by class"), (False, "seem to be sorted by class")])
def test_order_by_class_is_noticed_with_and_without_labels(tmp_path, labelled, words):
    colours = np.repeat(np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0]], np.uint8), 5000, axis=0)
    images = np.broadcast_to(colours[:, None, None], (20_000, 2, 2, 3)).copy()
    labels = np.repeat(np.arange(4), 5000)
    for order in (np.arange(20_000), np.random.default_rng(0).permutation(20_000)):
        found = extract(tmp_path / "o.npz", images[order], labels[order] if labelled else None, batch_size=500)
        metrics = compute_metrics(found, None)
        is_sorted = order[0] == 0
        assert (metrics["inception_score_in_order"] < 0.9 * metrics["inception_score"]) == is_sorted
        assert any(words in problem for problem in find_problems(found, None, metrics)) == is_sorted


# ------------------------------------------------------------ commands


def test_evaluate_against_images_and_their_stored_reference(tmp_path, capsys, monkeypatch, refused):
    samples = save(tmp_path / "samples.npz", pixels(20, seed=1), np.arange(20) % 2)
    real = save(tmp_path / "real.npz", pixels(25, seed=2))
    record = run(tmp_path, samples, "--reference", real)
    first = only(record)["metrics"]
    printed = capsys.readouterr()
    assert "| samples.npz |" in printed.out and f"{first['fid']:.3f}" in printed.out
    assert "20 images instead of 50000" in printed.err
    assert record["reference"][SMALL.name]["content"] == content_digest(NpzSource(real))
    (cached,) = (tmp_path / "cache").iterdir()
    assert only(run(tmp_path, samples, "--reference", cached))["metrics"] == first
    with monkeypatch.context() as patch:  # features of the reference are cached, its pixels are not read again
        patch.setattr(references, "extract_features", None)
        blocks = NpzSource.blocks
        patch.setattr(NpzSource, "blocks", lambda self, *sizes: None if self.path == real else blocks(self, *sizes))
        assert only(run(tmp_path, samples, "--reference", real))["metrics"] == first
    cached.write_bytes(b"damaged")
    assert "cannot be read" in refused(run, tmp_path, samples, "--reference", real)
    cached.unlink()
    main(f"evaluate {real} --make-reference --cache {tmp_path / 'cache'} --device cpu".split())
    (made,) = (tmp_path / "cache").glob("reference-real-8-*.npz")
    assert only(run(tmp_path, samples, "--reference", made))["metrics"] == first
    save(real, pixels(25, seed=3))  # another file of the same name and size
    assert only(run(tmp_path, samples, "--reference", real))["metrics"]["fid"] != first["fid"]


def test_statistics_of_adm_replace_those_of_the_images(tmp_path):
    samples, mean = save(tmp_path / "s.npz", pixels(20)), np.full(SIZE, 0.3)
    stored = {"mu": mean, "sigma": np.eye(SIZE), "mu_s": np.zeros(27), "sigma_s": np.eye(27)}
    np.savez(tmp_path / "adm.npz", arr_0=pixels(10, seed=3), **stored)
    np.savez(tmp_path / "statistics.npz", **stored)
    save(tmp_path / "images.npz", pixels(10, seed=3))
    batch, statistics, images = (
        only(run(tmp_path, samples, "--reference", tmp_path / f"{name}.npz"))["metrics"]
        for name in ("adm", "statistics", "images")
    )
    assert batch["fid"] == statistics["fid"] > 5 and batch["sfid"] == statistics["sfid"]
    assert "precision" in batch and "precision" not in statistics
    assert images["precision"] == batch["precision"] and images["fid"] != batch["fid"]


def test_mean_and_std_of_several_samples(tmp_path, capsys):
    paths = [save(tmp_path / f"{s}.npz", pixels(15, seed=s)) for s in range(3)]
    real = save(tmp_path / "real.npz", pixels(20, seed=9))
    record = run(tmp_path, *paths, "--reference", real, "--mean-std")
    fids = [row["metrics"]["fid"] for row in record["samples"].values()]
    assert record["mean_std"]["fid"]["mean"] == pytest.approx(np.mean(fids), rel=1e-12)
    assert record["mean_std"]["fid"]["std"] == pytest.approx(np.std(fids, ddof=1), rel=1e-12)
    titles = [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:7]]
    assert titles == ["0.npz", "1.npz", "2.npz", "mean", "std"]


OWN = """
from bitdance.metrics.features import FeatureExtractor
network = FeatureExtractor("mine", 3, lambda images: images.float().mean((1, 2)))
"""


def test_an_extractor_of_the_user_with_and_without_inception(tmp_path, capsys, monkeypatch):
    (tmp_path / "extractor.py").write_text(OWN)
    samples, real = (save(tmp_path / f"{s}.npz", pixels(15, seed=s)) for s in (1, 2))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)  # where no Inception weights have been downloaded
    arguments = (samples, "--reference", real, "--features", "extractor.py:network")
    own = only(run(tmp_path, *arguments))
    assert set(own["metrics"]) == {"mine:fid", "mine:precision", "mine:recall"} and len(own["about"]) == 1
    assert capsys.readouterr().err.count("Inception is left out: run `bitdance download inception`") == 1
    with pytest.raises(SystemExit):
        run(tmp_path, *arguments, "--inception-weights", "missing.pth")
    text = capsys.readouterr().err
    assert "no Inception weights in missing.pth" in text and "--features to efficientnet-lite0" in text
    (tmp_path / "models/evaluation").mkdir(parents=True)
    (tmp_path / "models/evaluation" / inception.FILE_NAMES[0]).touch()
    monkeypatch.setattr(references, "load_inception", lambda path, device: SMALL)
    both = only(run(tmp_path, *arguments))
    assert {"fid", "inception_score"} < set(both["metrics"]) and len(both["about"]) == 2
    assert own["metrics"].items() < both["metrics"].items() and "left out" not in capsys.readouterr().err


def test_sampling_extracts_the_features_of_its_file(tmp_path, capsys, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    path = small.save_pair(tmp_path, parallel_num=4)
    real = save(tmp_path / "real.npz", pixels(20, 16, seed=9))
    options = "--num-images 7 --batch-size 3 --num-steps 2 --device cpu --threads 1 --evaluate --cache cache"
    arguments = f"sample --model {path} --output out --reference {real} {options}".split()
    main(arguments)
    assert not list(tmp_path.glob("out/*-n-7-????????.npz"))
    (first,) = tmp_path.glob("out/*.metrics.json")
    direct = only(json.loads(first.read_text()))
    main([*arguments, "--npz"])
    (images,) = tmp_path.glob("out/*-n-7-????????.npz")
    through = only(run(tmp_path, images, "--reference", real))
    assert direct["metrics"] == pytest.approx(through["metrics"], rel=1e-6, abs=1e-9)
    assert direct["about"][0]["content"] == through["about"][0]["content"]
    assert direct["warnings"] == through["warnings"]
    capsys.readouterr()
    main([*arguments, "--seeds", "2"])
    printed = capsys.readouterr().out
    assert all(f"| {row} " in printed for row in ("seed 0", "seed 1", "mean", "std"))
    for pattern in ("seeds-0-to-1", "seed"):
        assert len(list(tmp_path.glob(f"out/*-{pattern}-*.metrics.json"))) == 1
    assert "--seed 4294967296 is invalid" in refused(main, [*arguments, "--seeds", "2", "--seed", str(2**32 - 1)])


def test_sampling_with_features_resumes(tmp_path, monkeypatch):
    pipe = Pipeline(small.model(parallel_num=4), small.autoencoder())
    config = JobConfig(num_images=7, batch_size=3, seed=1)
    jobs = [SamplingJob(pipe, tmp_path / name, SamplingConfig(2, 2.0), config, (), (SMALL,)) for name in ("a", "b")]
    jobs[0].run(SINGLE)
    generate, calls = Pipeline.generate, []

    def interrupt(self, sample_ids, *arguments, **options):
        calls.append(sample_ids[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, sample_ids, *arguments, **options)

    monkeypatch.setattr(Pipeline, "generate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        jobs[1].run(SINGLE)
    jobs[1].run(SINGLE)
    assert calls == [0, 3, 6, 6]
    a, b = (read_feature_set(*job.results.values()) for job in jobs)
    assert np.array_equal(a.pool, b.pool) and compute_metrics(a, b)["fid"] == compute_metrics(a, a)["fid"]


def test_sweep(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = small.save_pair(tmp_path, parallel_num=4)
    real = save(tmp_path / "real.npz", pixels(20, 16, seed=9))
    options = "--num-images 6 --batch-size 6 --cfg-scale 1 3 --num-steps 2 --solver euler heun --device cpu"
    arguments = f"sweep --model {path} --output out --reference {real} {options} --threads 1 --cache cache".split()
    main(arguments)
    record = json.loads((tmp_path / "out" / "sweep.json").read_text())
    titles = [f"cfg {scale}, 2 steps, {solver}" for solver in ("euler", "heun") for scale in (1, 3)]
    assert list(record["samples"]) == titles
    fids = {title: row["metrics"]["fid"] for title, row in record["samples"].items()}
    assert len(set(fids.values())) == 4
    assert f"lowest FID: {min(fids, key=fids.get)}" in capsys.readouterr().out
    main(arguments)  # nothing is sampled again
    assert {json.loads(line)["sampled"] for line in capsys.readouterr().out.splitlines() if line.startswith("{")} == {0}


def test_a_sweep_without_settings_is_around_those_of_the_model(tmp_path, capsys, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)  # where no Inception weights have been downloaded
    path = small.save_pair(tmp_path, parallel_num=4)
    real = save(tmp_path / "real.npz", pixels(20, 16, seed=9))
    (tmp_path / "extractor.py").write_text(OWN)
    how = f"--num-images 4 --reference {real} --features extractor.py:network --device cpu --threads 1 --cache cache"
    main(f"sweep --model {path} --output out {how}".split())
    record = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert list(record["samples"]) == [f"cfg {scale}, 20 steps, dpmpp-2m-sde" for scale in (1.5, 2.25, 3, 4.5)]
    assert "lowest mine:fid: cfg " in capsys.readouterr().out


def test_reconstruct_gives_the_rfid(tmp_path, monkeypatch, capsys):
    small.save_pair(tmp_path)
    monkeypatch.setattr("bitdance.cli.reconstruct._load_inception", lambda command, world: SMALL)
    data = small.pictures(tmp_path / "data")
    options = f"--autoencoder {tmp_path / 'autoencoder.safetensors'} --output {tmp_path / 'out'} --device cpu"
    main(f"reconstruct --data-path {data} --batch-size 5 {options}".split())
    record = json.loads((tmp_path / "out" / "reconstruction.json").read_text())
    sheet = np.asarray(Image.open(tmp_path / "out" / "reconstruction.png"))
    assert record["rfid"] > 0 and f"rFID {record['rfid']:.3f}" in capsys.readouterr().out and sheet.ndim == 3


def test_reconstruct_reports_another_extractor_under_its_own_name(tmp_path, monkeypatch, capsys):
    """Here one that classifies every image as class 1, which a third of the images have."""
    small.save_pair(tmp_path)
    (tmp_path / "one.py").write_text(
        "import torch\n"
        "from bitdance.metrics.features import FeatureExtractor, Features\n"
        "def run(x):\n"
        "    pool = x.float().mean((1, 2))\n"
        "    return Features(pool, logits=torch.tensor([[0.0, 1.0, 0.0]]).repeat(len(x), 1))\n"
        "one = FeatureExtractor('one', 3, run, classifies=True)\n"
    )
    options = f"--autoencoder {tmp_path / 'autoencoder.safetensors'} --output {tmp_path / 'out'} --device cpu"
    data = small.pictures(tmp_path / "data")
    main(f"reconstruct --data-path {data} --features {tmp_path / 'one.py'}:one {options}".split())
    record = json.loads((tmp_path / "out" / "reconstruction.json").read_text())
    assert record["accuracy"] == record["accuracy_of_originals"] == pytest.approx(1 / 3)
    assert record["frechet_distance"] > 0 and record["feature_extractor"] == "one" and "rfid" not in record
    assert f"Frechet distance {record['frechet_distance']:.3f} (one), accuracy 33.33%" in capsys.readouterr().out


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(UserError, match=r"pipe\.npz is not a regular file"):
        read_feature_set(tmp_path / "pipe.npz")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "name the images to evaluate"),
        ("samples.npz --mean-std", "--mean-std needs at least two"),
        ("samples.npz --feature-batch-size 0", "--feature-batch-size 0 is invalid"),
        ("samples.npz --keep 3", "--keep 3 is invalid"),
        ("samples.npz", "there is no published reference for images of 8 x 8 pixels"),
        ("published.npz", "run `bitdance download reference-256`"),
        ("samples.npz --reference none.npz", "no images at"),
        ("statistics.npz --reference none", "use it as --reference only"),
        (". --reference none", "no images in"),
        ("empty.npz --reference none", "cannot be read as an .npz file"),
        ("zip.npz --reference none", "cannot be read as an .npz file"),
        ("html.npz --reference none", "cannot be read as an .npz file"),
        ("numpy.npy --reference none", "cannot be read as an .npz file"),
    ],
)
def test_invalid_input(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "samples.npz", pixels(5))
    save(tmp_path / "published.npz", pixels(5, 256))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(3), sigma=np.eye(3))
    others = {"empty.npz": b"", "zip.npz": b"PK\x03\x04" + b"x" * 99, "html.npz": b"<html>", "numpy.npy": b"\x93NUMPY"}
    for name, data in others.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *arguments.split())
    message = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and message.startswith("bitdance: ") and "\n" not in message and words in message
    assert not (tmp_path / "evaluation.json").exists()


def test_report_and_table():
    rows = {"a": {"fid": 1.0, "precision": 0.5}, "b": {"fid": 3.0, "mine:fid": 7.0}}
    evaluations = {title: {"metrics": metrics} for title, metrics in rows.items()}
    report = build_report(evaluations, None, EvaluationConfig(), mean_std=True)
    assert report["mean_std"] == {"fid": {"mean": 2.0, "std": pytest.approx(2**0.5)}}
    assert format_table(report).splitlines() == [
        "|      | FID   | precision | mine:fid |",
        "|------|-------|-----------|----------|",
        "| a    | 1.000 | 0.5000    |          |",
        "| b    | 3.000 |           | 7.000    |",
        "| mean | 2.000 |           |          |",
        "| std  | 1.414 |           |          |",
    ]


@pytest.mark.parametrize(
    ("how", "size", "words"),
    [
        (zipfile.ZIP_BZIP2, 1000, "another method than deflate"),
        (zipfile.ZIP_LZMA, 1000, "another method than deflate"),
        (zipfile.ZIP_DEFLATED, 1 << 23, "expands to far more bytes"),
    ],
)
@pytest.mark.parametrize("name", ["arr_0", "about", "sigma"])
def test_arrays_that_expand_to_gigabytes_are_not_expanded(tmp_path, monkeypatch, how, size, words, name):
    """A gigabyte is a megabyte here."""
    monkeypatch.setattr("bitdance.data.decoding.MAX_FILE_BYTES", 1 << 20)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", how) as archive:
        with archive.open(f"{name}.npy", "w") as file:
            shape = (size // 768, 16, 16, 3) if name == "arr_0" else (size,)
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for start in range(0, size, 1 << 20):
                file.write(bytes(min(1 << 20, size - start)))
        archive.writestr("mu.npy" if name == "sigma" else "x", b"")
    for read in (read_feature_set, open_source):
        with pytest.raises(UserError, match=words):
            read(tmp_path / "a.npz")


ODD = [None, [], {}, "\x1b[31m", "x" * 5000, -1, 10**100, True]


@pytest.mark.parametrize("field", ["count", "height", "num_classes", "extractor", "extractor_digest", "type", "source"])
def test_stored_features_with_odd_descriptions(tmp_path, capsys, monkeypatch, field):
    found = extract(tmp_path / "images.npz", pixels(9), np.arange(9))
    for value in ODD:
        features = dataclasses.replace(found, about={**found.about, field: value})
        write_feature_set(tmp_path / "f.npz", features)
        for arguments in (("f.npz", "--reference", "none"), ("images.npz", "--reference", "f.npz")):
            monkeypatch.chdir(tmp_path)
            with contextlib.suppress(SystemExit):
                run(tmp_path, *arguments)
            assert "\x1b" not in (output := capsys.readouterr().err) and "x" * 300 not in output
    nested = np.frombuffer(b"[" * 200_000, np.uint8)
    np.savez(tmp_path / "f.npz", about=nested, pool=found.pool)
    with pytest.raises(UserError, match="cannot be read"):
        read_feature_set(tmp_path / "f.npz")
