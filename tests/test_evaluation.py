"""`bitdance evaluate`, `sweep` and `sample --evaluate`: images in, figures out, with a small network in the plug."""

from __future__ import annotations

import dataclasses
import io
import json
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
from bitdance.metrics.feature_set import (
    Checks,
    FeatureSet,
    content_digest,
    read_feature_set,
    take_features,
    write_feature_set,
)
from bitdance.metrics.features import FeatureExtractor, Features
from bitdance.metrics.frechet_distance import frechet_distance
from bitdance.metrics.image_sources import NpzSource, open_source
from bitdance.metrics.precision_recall import precision_recall
from bitdance.metrics.report import figures, mean_and_std, table, warnings
from bitdance.metrics.statistics import feature_statistics
from bitdance.runtime.errors import UserError
from bitdance.runtime.process_group import World

ALONE = World(0, 1, torch.device("cpu"))
SIZE = 12


def project(images: torch.Tensor) -> Features:
    """Means over a grid of 2 x 2 as features, of 3 x 3 as spatial ones, and logits of both."""
    x = images.float().movedim(3, 1) / 255
    pool = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
    spatial = torch.nn.functional.adaptive_avg_pool2d(x, 3).flatten(1)
    return Features(pool, spatial, pool[:, ::4] * 30)


SMALL = FeatureExtractor(inception.NAME, SIZE, project, digest=inception.PUBLISHED_DIGEST + "0" * 56)


@pytest.fixture(autouse=True)
def plugged(monkeypatch):
    """The small network in place of the Inception network: the latter has tests of its own."""
    monkeypatch.setattr(references.FeatureExtractors, "__call__", lambda self: (SMALL,))


def pixels(count: int = 30, side: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def save(path: pathlib.Path, images: np.ndarray, labels: np.ndarray | None = None) -> pathlib.Path:
    np.savez(path, *([images] if labels is None else [images, labels]))
    return path


def run(tmp_path: pathlib.Path, *arguments: object) -> dict:
    output = tmp_path / "evaluation.json"
    main(
        [
            "evaluate",
            *map(str, arguments),
            "--output",
            str(output),
            "--cache",
            str(tmp_path / "cache"),
            "--device",
            "cpu",
        ]
    )
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
    assert (
        source.shape == (11, 8, 8, 3) and source.dtype == np.dtype(dtype) and source.labels.tolist() == list(range(11))
    )
    for ranks in (1, 2, 3):
        found = {number: block for rank in range(ranks) for number, block in source.blocks(4, rank, ranks)}
        assert [len(found[number]) for number in (0, 1, 2)] == [4, 4, 3]
        assert np.array_equal(np.concatenate([found[number] for number in (0, 1, 2)]), images)


def test_an_npz_of_another_making_is_read_by_its_only_images(tmp_path):
    np.savez(tmp_path / "a.npz", samples=pixels(5), other=np.arange(3))
    source = open_source(tmp_path / "a.npz")
    assert len(source) == 5 and source.labels is None


def test_folders_of_pictures(tmp_path):
    images = pixels(6)
    folder = tmp_path / "flat"
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}.png")
    source = open_source(folder)
    assert np.array_equal(np.concatenate([block for _, block in source.blocks(4)]), images) and source.labels is None
    (folder / "labels.json").write_text("[2, 1, 0, 2, 1, 0]")
    assert open_source(folder).labels.tolist() == [2, 1, 0, 2, 1, 0]
    assert open_source(folder, limit=2).labels.tolist() == [2, 0]
    Image.fromarray(pixels(1, 20)[0]).save(folder / "9.png")
    (folder / "labels.json").unlink()
    with pytest.raises(UserError, match=r"9\.png in .* has 20 x 20 pixels, the first picture 8 x 8: .* --image-size"):
        list(open_source(folder).blocks(4))
    assert open_source(folder, image_size=4).shape == (7, 4, 4, 3)
    classes = small.pictures(tmp_path / "classes")
    source = open_source(classes)
    assert (len(source), source.num_classes, source.shape[1]) == (12, 3, 16)
    assert source.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_bad_sources(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        open_source(tmp_path / "nothing")
    (tmp_path / "x.job").mkdir()
    with pytest.raises(UserError, match="unfinished sampling job"):
        open_source(tmp_path / "x.job")
    with pytest.raises(UserError, match="leave out --image-size"):
        open_source(save(tmp_path / "a.npz", pixels(4)), image_size=4)
    for array, words in (
        (pixels(4)[..., :1], r"\(4, 8, 8, 1\): expected numbers"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"\(0, 8, 8, 3\)"),
        (np.zeros((4, 8, 8, 3), complex), "complex128"),
        (np.zeros((4, 3)), r"\(4, 3\)"),
        (np.asfortranarray(pixels(4)), "column by column"),
        (np.array([None, 1], object), "cannot be read|object"),
    ):
        np.savez(tmp_path / "b.npz", array)
        with pytest.raises(UserError, match=words):
            open_source(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", a=pixels(2), b=pixels(2))
    with pytest.raises(UserError, match="holds no arr_0"):
        open_source(tmp_path / "c.npz")
    for labels, words in (
        (np.arange(3), "expected 4 integer labels"),
        (np.full(4, -1), "label -1"),
        (np.zeros(4), "float64"),
    ):
        with pytest.raises(UserError, match=words):
            open_source(save(tmp_path / "d.npz", pixels(4), labels))


def test_200_mutated_files_end_in_sentences(tmp_path):
    """Of images and of features: each is refused in a sentence, or what is read of it is untouched."""
    images = save(tmp_path / "images.npz", pixels(8), np.arange(8) % 3).read_bytes()
    features = take_features(open_source(tmp_path / "images.npz"), [SMALL], ALONE)[0]
    write_feature_set(tmp_path / "features.npz", features)
    stored = (tmp_path / "features.npz").read_bytes()
    draw, refused = random.Random(0), 0
    for number in range(200):
        whole = bytearray((images, stored)[number % 2])
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
                found = take_features(open_source(path), [SMALL], ALONE)[0]
            if found.pool is None:
                raise UserError("no features")
            assert np.array_equal(found.pool, features.pool) and found.about["count"] == 8  # a harmless place was hit
        except UserError as error:
            refused += 1
            assert len(str(error)) > 10 and "\n" not in str(error)
    assert refused >= 140


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.npz", b""), ("a.npz", b"PK\x03\x04" + b"x" * 99), ("a.npz", b"<html>"), ("a.npy", b"\x93NUMPY")],
)
def test_files_that_are_none(tmp_path, capsys, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", str(tmp_path / name), "--reference", "none", "--output", str(tmp_path / "out.json")])
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and said.startswith("bitdance: ") and "\n" not in said
    assert not (tmp_path / "out.json").exists()


# ------------------------------------------------------------ features


def test_features_are_those_of_the_images_whatever_the_batch(tmp_path):
    images, labels = pixels(23), np.arange(23) % 3
    source = open_source(save(tmp_path / "a.npz", images, labels))
    expected = project(torch.from_numpy(images))
    for size in (1, 5, 32):
        found = take_features(source, [SMALL], ALONE, batch_size=size)[0]
        assert np.array_equal(found.pool, expected.pool.numpy()) and np.array_equal(
            found.logits, expected.logits.numpy()
        )
        np.testing.assert_allclose(
            found.spatial.covariance, np.cov(expected.spatial.numpy().T.astype(float)), atol=1e-12
        )
        assert found.about["content"] == content_digest(source) and found.about["count"] == 23
    kept = take_features(source, [SMALL], ALONE, keep=3)[0]
    assert np.array_equal(kept.pool, expected.pool.numpy()[[0, 11, 22]]) and kept.logits is None
    np.testing.assert_array_equal(kept.statistics.mean, found.statistics.mean)


TAKE = """
import sys
import numpy as np, torch
sys.path.insert(0, sys.argv[3])
import test_evaluation
from bitdance.runtime.process_group import init_distributed
from bitdance.metrics.feature_set import take_features, write_feature_set
from bitdance.metrics.image_sources import open_source
import pathlib

with init_distributed("cpu", 1) as world:
    found = take_features(open_source(sys.argv[1]), [test_evaluation.SMALL], world, batch_size=4)
    assert len(found) == (world.rank == 0)
    for one in found:
        write_feature_set(pathlib.Path(sys.argv[2]), one)
"""


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_takes_the_same_features(tmp_path, processes):
    samples = save(tmp_path / "a.npz", pixels(23), np.arange(23) % 3)
    (tmp_path / "take.py").write_text(TAKE)
    small.run(tmp_path / "take.py", samples, tmp_path / "f.npz", small.ROOT / "tests", processes=processes)
    expected = take_features(open_source(samples), [SMALL], ALONE, batch_size=4)[0]
    found = read_feature_set(tmp_path / "f.npz")
    assert np.array_equal(found.pool, expected.pool) and np.array_equal(found.logits, expected.logits)
    assert found.about["content"] == expected.about["content"]
    assert figures(found, expected) == figures(expected, expected)


def test_a_batch_size_changes_no_bit_of_the_statistics(tmp_path, monkeypatch):
    for module in ("feature_set", "statistics"):
        monkeypatch.setattr(f"bitdance.metrics.{module}.BLOCK", 8)
    source = open_source(save(tmp_path / "a.npz", pixels(23)))
    found = [take_features(source, [SMALL], ALONE, batch_size=size)[0] for size in (1, 5, 8, 20)]
    for one in found[1:]:
        assert np.array_equal(one.statistics.covariance, found[0].statistics.covariance)
        assert np.array_equal(one.spatial.mean, found[0].spatial.mean)
    np.testing.assert_allclose(found[0].statistics.covariance, np.cov(found[0].pool.T.astype(float)), atol=1e-12)


def test_the_digest_is_of_pixels_and_labels_however_they_are_kept(tmp_path):
    images = pixels(5)
    digests = [content_digest(open_source(save(tmp_path / "a.npz", images)))]
    (tmp_path / "flat").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "flat" / f"{number}.png")
    digests.append(content_digest(open_source(tmp_path / "flat"), batch_size=2))
    assert digests[0] == digests[1]
    others = [images[::-1], images.astype(np.float32), images[:4]]
    digests += [content_digest(open_source(save(tmp_path / "b.npz", other))) for other in others]
    digests.append(content_digest(open_source(save(tmp_path / "b.npz", images, np.arange(5)))))
    assert len(set(digests)) == 5


def test_stored_features_are_the_same_to_the_bit(tmp_path):
    found = take_features(open_source(save(tmp_path / "a.npz", pixels(9), np.arange(9))), [SMALL], ALONE)[0]
    write_feature_set(tmp_path / "f.npz", found)
    again = read_feature_set(tmp_path / "f.npz")
    for name in ("pool", "logits", "labels"):
        assert np.array_equal(getattr(found, name), getattr(again, name))
    assert figures(again, found) == figures(found, found)
    assert {**again.about, "format": 0, "format_version": 0} == {**found.about, "format": 0, "format_version": 0}


def test_the_figures_are_what_the_functions_give(tmp_path):
    a, b = (take_features(open_source(save(tmp_path / "x.npz", pixels(40, seed=s))), [SMALL], ALONE)[0] for s in (1, 2))
    result = figures(a, b, kernel=True)
    expected = frechet_distance(feature_statistics(b.pool), feature_statistics(a.pool))
    assert result["fid"] == pytest.approx(expected, rel=1e-9)
    assert (result["precision"], result["recall"]) == tuple(precision_recall(b.pool, a.pool))
    assert set(result) == {
        "fid", "sfid", "precision", "recall", "kid", "kid_std", "inception_score",
        "inception_score_in_order",
    }  # fmt: skip
    assert abs(figures(a, a)["fid"]) < 1e-9
    with pytest.raises(UserError, match="taken with another network"):
        figures(a, dataclasses.replace(b, about={**b.about, "network_digest": "another"}))


def test_a_classifier_in_the_plug(tmp_path):
    def classify(images: torch.Tensor) -> Features:
        brightness = images.float().mean((1, 2, 3))
        return Features(brightness[:, None], None, -(brightness[:, None] - torch.tensor([20.0, 120.0, 220.0])).square())

    network = FeatureExtractor("brightness", 1, classify, classifies=True)
    labels = np.array([0, 1, 2, 2])
    images = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (10, 130, 255, 0)])
    found = take_features(open_source(save(tmp_path / "a.npz", images, labels)), [network], ALONE)[0]
    assert figures(found, None) == {"accuracy": 0.75, "top_5_accuracy": 1.0}


# ------------------------------------------------------------ warnings


def said(images: np.ndarray, labels: np.ndarray | None, tmp_path: pathlib.Path, **about: object) -> str:
    found = take_features(open_source(save(tmp_path / "w.npz", images, labels)), [SMALL], ALONE)[0]
    found = dataclasses.replace(found, about={**found.about, "count": 50_000, **about})
    return " ".join(warnings(found, None, figures(found, None)))


def test_each_fault_has_its_warning(tmp_path):
    good, labels = pixels(12), np.arange(12) % 3
    good[0, 0, 0], good[1, 0, 0] = 0, 255
    assert said(good, labels, tmp_path) == ""
    assert "60 images instead of 50000: FID and sFID come out too high" in said(good, labels, tmp_path, count=60)
    assert "pixels are float32, not uint8" in said(good.astype(np.float32), labels, tmp_path)
    assert "pixels lie between 0 and 1 instead of 0 and 255" in said(good / 255.0, labels, tmp_path)
    assert "pixels lie between -100 and 155" in said(good.astype(int) - 100, labels, tmp_path)
    assert "2 images are exact copies of others" in said(good[[0, 1, 2, 0, 4, 5, 6, 0, 8, 9, 10, 11]], labels, tmp_path)
    assert "classes have between 1 and 10 images" in said(good, np.array([0] * 10 + [1, 2]), tmp_path)
    assert "images are 8 x 6" in said(good[:, :6], labels, tmp_path)
    assert "not the published file" in said(good, labels, tmp_path, network_digest="0123")


def test_class_order_is_noticed_with_and_without_labels(tmp_path):
    colours = np.repeat(np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0]], np.uint8), 5000, axis=0)
    images = np.broadcast_to(colours[:, None, None], (20_000, 2, 2, 3)).copy()
    labels = np.repeat(np.arange(4), 5000)
    for given, words in ((labels, "in the order of their classes"), (None, "seem to be sorted by class")):
        found = take_features(open_source(save(tmp_path / "o.npz", images, given)), [SMALL], ALONE, 500)[0]
        result = figures(found, None)
        assert result["inception_score_in_order"] < 0.9 * result["inception_score"]
        assert any(words in sentence for sentence in warnings(found, None, result))
        order = np.random.default_rng(0).permutation(20_000)
        mixed = save(tmp_path / "m.npz", images[order], None if given is None else labels[order])
        found = take_features(open_source(mixed), [SMALL], ALONE, 500)[0]
        assert not any("order" in sentence for sentence in warnings(found, None, figures(found, None)))


def test_an_image_that_is_not_a_number(tmp_path):
    images = pixels(3).astype(np.float32)
    images[1, 2, 3, 0] = np.nan
    with pytest.raises(UserError, match="not finite"):
        take_features(open_source(save(tmp_path / "a.npz", images)), [SMALL], ALONE)


# ------------------------------------------------------------ commands


def test_evaluate_against_images_and_their_stored_reference(tmp_path, capsys):
    samples = save(tmp_path / "samples.npz", pixels(20, seed=1), np.arange(20) % 2)
    real = save(tmp_path / "real.npz", pixels(25, seed=2))
    record = run(tmp_path, samples, "--reference", real)
    first = only(record)["figures"]
    printed = capsys.readouterr()
    assert "| samples.npz |" in printed.out and f"{first['fid']:.3f}" in printed.out
    assert "20 images instead of 50000" in printed.err
    assert record["reference"][SMALL.name]["content"] == content_digest(NpzSource(real))
    (kept,) = (tmp_path / "cache").iterdir()
    assert only(run(tmp_path, samples, "--reference", kept))["figures"] == first
    kept.write_bytes(b"broken")
    with pytest.raises(SystemExit):
        run(tmp_path, samples, "--reference", real)
    assert "cannot be read" in capsys.readouterr().err
    kept.unlink()
    run(tmp_path, real, "--make-reference")
    (made,) = (tmp_path / "cache").glob("reference-real-8-*.npz")
    again = only(run(tmp_path, samples, "--reference", made))["figures"]
    assert again == first


def test_the_features_of_a_reference_are_taken_once(tmp_path, monkeypatch):
    samples, real = (save(tmp_path / f"{s}.npz", pixels(10, seed=s)) for s in (1, 2))
    expected = only(run(tmp_path, samples, "--reference", real))["figures"]
    taken = []
    features_of = references.features_of
    monkeypatch.setattr(references, "features_of", lambda *a, **k: taken.append(a[0].path) or features_of(*a, **k))
    assert only(run(tmp_path, samples, "--reference", real))["figures"] == expected
    assert taken == [samples]  # and not of the reference


def test_adms_statistics_take_the_place_of_those_of_the_images(tmp_path):
    samples, mean = save(tmp_path / "s.npz", pixels(20)), np.full(SIZE, 0.3)
    stored = {"mu": mean, "sigma": np.eye(SIZE), "mu_s": np.zeros(27), "sigma_s": np.eye(27)}
    np.savez(tmp_path / "adm.npz", arr_0=pixels(10, seed=3), **stored)
    np.savez(tmp_path / "statistics.npz", **stored)
    batch = only(run(tmp_path, samples, "--reference", tmp_path / "adm.npz"))["figures"]
    alone = only(run(tmp_path, samples, "--reference", tmp_path / "statistics.npz"))["figures"]
    assert batch["fid"] == alone["fid"] > 5 and batch["sfid"] == alone["sfid"]
    assert "precision" in batch and "precision" not in alone
    images = only(run(tmp_path, samples, "--reference", save(tmp_path / "x.npz", pixels(10, seed=3))))["figures"]
    assert images["precision"] == batch["precision"] and images["fid"] != batch["fid"]


def test_several_samples_with_their_spread(tmp_path, capsys):
    paths = [save(tmp_path / f"{s}.npz", pixels(15, seed=s)) for s in range(3)]
    real = save(tmp_path / "real.npz", pixels(20, seed=9))
    record = run(tmp_path, *paths, "--reference", real, "--spread")
    fids = [row["figures"]["fid"] for row in record["samples"].values()]
    assert record["spread"]["fid"]["mean"] == pytest.approx(np.mean(fids), rel=1e-12)
    assert record["spread"]["fid"]["std"] == pytest.approx(np.std(fids, ddof=1), rel=1e-12)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:7]] == [
        "0.npz", "1.npz", "2.npz", "mean", "std",
    ]  # fmt: skip


def test_a_network_of_ones_own_beside_inception(tmp_path, monkeypatch):
    own = FeatureExtractor("mine", 3, lambda images: images.float().mean((1, 2)))
    monkeypatch.setattr(references.FeatureExtractors, "__call__", lambda self: (SMALL, own))
    samples, real = (save(tmp_path / f"{s}.npz", pixels(15, seed=s)) for s in (1, 2))
    row = only(run(tmp_path, samples, "--reference", real))
    assert {"fid", "mine:fid", "mine:precision"} < set(row["figures"]) and len(row["about"]) == 2


def test_sampling_takes_the_features_that_the_file_has(tmp_path, capsys):
    path = small.save_pair(tmp_path)
    real = save(tmp_path / "real.npz", pixels(20, 16, seed=9))
    arguments = ["--model", str(path), "--output", str(tmp_path / "out"), "--num-images", "7", "--batch-size", "3",
                 "--sample-steps", "2", "--device", "cpu", "--threads", "1", "--reference", str(real), "--evaluate",
                 "--cache", str(tmp_path / "cache")]  # fmt: skip
    main(["sample", *arguments])
    assert not list((tmp_path / "out").glob("*-n-7-????????.npz"))
    (first,) = (tmp_path / "out").glob("*.figures.json")
    direct = only(json.loads(first.read_text()))
    main(["sample", *arguments, "--npz"])
    (images,) = (tmp_path / "out").glob("*-n-7-????????.npz")
    through = only(run(tmp_path, images, "--reference", real))
    assert through["figures"].keys() == direct["figures"].keys()
    for name, value in through["figures"].items():
        assert direct["figures"][name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    assert direct["about"][0]["content"] == through["about"][0]["content"]
    assert direct["warnings"] == through["warnings"]
    capsys.readouterr()
    main(["sample", *arguments, "--seeds", "2"])
    shown = capsys.readouterr()
    assert all(f"| {row} " in shown.out for row in ("seed 0", "seed 1", "mean", "std"))


def test_sampling_with_features_goes_on_where_it_stopped(tmp_path):
    from bitdance.sampling import job
    from bitdance.sampling.pipeline import Generator
    from bitdance.sampling.sampler import SamplingConfig

    generator = Generator(small.model(), small.autoencoder(), SamplingConfig(2, 2.0), seed=1)
    plans = [job.Job(tmp_path / name / "made", 7, 3, (), {"seed": 1}, networks=(SMALL,)) for name in ("a", "b")]
    job.run(plans[0], generator, ALONE)
    real, calls = Generator.images, []

    def stops(self, numbers, labels):
        calls.append(numbers[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, numbers, labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "images", stops)
        with pytest.raises(KeyboardInterrupt):
            job.run(plans[1], generator, ALONE)
        job.run(plans[1], generator, ALONE)
    assert calls == [0, 3, 6, 6]
    (kind,) = plans[0].results
    a, b = (read_feature_set(plan.results[kind]) for plan in plans)
    assert np.array_equal(a.pool, b.pool) and figures(a, b)["fid"] == figures(a, a)["fid"]


def test_sweep(tmp_path, capsys):
    path = small.save_pair(tmp_path)
    real = save(tmp_path / "real.npz", pixels(20, 16, seed=9))
    arguments = ["sweep", "--model", str(path), "--output", str(tmp_path / "out"), "--num-images", "6",
                 "--batch-size", "6", "--cfg-scales", "1", "3", "--sample-steps", "2", "--solvers", "euler", "heun",
                 "--device", "cpu", "--threads", "1", "--reference", str(real),
                 "--cache", str(tmp_path / "cache")]  # fmt: skip
    main(arguments)
    record = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert list(record["samples"]) == [
        f"cfg {scale}, 2 steps, {solver}" for solver in ("euler", "heun") for scale in (1, 3)
    ]
    fids = {title: row["figures"]["fid"] for title, row in record["samples"].items()}
    assert len(set(fids.values())) == 4
    out = capsys.readouterr().out
    assert f"lowest FID: {min(fids, key=fids.get)}" in out
    main(arguments)  # nothing is made again
    assert {json.loads(line)["made"] for line in capsys.readouterr().out.splitlines() if line.startswith("{")} == {0}


def test_reconstruct_gives_the_rfid(tmp_path, monkeypatch, capsys):
    from bitdance.cli import reconstruct

    small.save_pair(tmp_path)
    monkeypatch.setattr(reconstruct, "_inception", lambda command, world: SMALL)
    data = small.pictures(tmp_path / "data")
    main(["reconstruct", str(data), "--autoencoder", str(tmp_path / "autoencoder.safetensors"), "--output",
          str(tmp_path / "out"), "--batch-size", "5", "--device", "cpu"])  # fmt: skip
    record = json.loads((tmp_path / "out" / "reconstruction.json").read_text())
    sheet = np.asarray(Image.open(tmp_path / "out" / "reconstruction.png"))
    assert record["rfid"] > 0 and f"rFID {record['rfid']:.3f}" in capsys.readouterr().out and sheet.ndim == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name what to evaluate"),
        (["{samples}", "--spread"], "--spread needs at least two"),
        (["{samples}", "--feature-batch-size", "0"], "--feature-batch-size 0 does not fit"),
        (["{samples}", "--keep", "3"], "--keep 3 does not fit"),
        (["{samples}"], "there is no published reference for images of 8 x 8 pixels"),
        (["{samples}", "--reference", "{folder}/none.npz"], "no images at"),
        (["{folder}/statistics.npz", "--reference", "none"], "it serves only as a --reference"),
        (["{folder}", "--reference", "none"], "no images in"),
    ],
)
def test_bad_input(tmp_path, capsys, arguments, words):
    samples = save(tmp_path / "samples.npz", pixels(5))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *[argument.format(samples=samples, folder=tmp_path) for argument in arguments])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and words in said and not (tmp_path / "evaluation.json").exists()


def test_a_published_reference_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    samples = save(tmp_path / "samples.npz", pixels(5, 256))
    with pytest.raises(SystemExit):
        run(tmp_path, samples)
    assert "run `bitdance download reference-256`" in capsys.readouterr().err


# ------------------------------------------------------------ the rest


def test_spread_and_table():
    spread = mean_and_std([{"fid": 1.0, "x": 2.0}, {"fid": 3.0}])
    assert spread == {"fid": {"mean": 2.0, "std": pytest.approx(2**0.5)}}
    text = table({"a": {"fid": 1.23456, "precision": 0.5}, "b": {"fid": 2.0, "mine:fid": 7.0}})
    assert text.splitlines() == [
        "|   | FID   | precision | mine:fid |",
        "|---|-------|-----------|----------|",
        "| a | 1.235 | 0.5000    |          |",
        "| b | 2.000 |           | 7.000    |",
    ]


def test_checks_merge_in_order():
    images = pixels(6)
    whole, parts = Checks.of(images), Checks.of(images[:2])
    parts.merge(Checks.of(images[2:]))
    assert parts.report("uint8", None) == whole.report("uint8", None)


def test_statistics_alone_have_no_figures():
    found = FeatureSet({"source": "x", "count": 3}, None, None)
    with pytest.raises(UserError, match="x has statistics but no features"):
        figures(found, None)


def test_an_npz_with_a_lying_header(tmp_path):
    """It announces far more than it holds: nothing is made room for."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 512, 512, 3)}
    )
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + b"x" * 100)
    with pytest.raises(UserError, match=r"arr_0\.npy is truncated"):
        open_source(tmp_path / "a.npz")
