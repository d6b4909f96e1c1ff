"""The Inception network against values of ADM's suite, files of its weights, and other feature extractors."""

from __future__ import annotations

import contextlib
import hashlib

import numpy as np
import pytest
import torch
from inception_inputs import DATA, images, weights

from bitdance.metrics import inception
from bitdance.metrics.features import FeatureExtractor, Features, load_feature_extractor
from bitdance.runtime.errors import UserError

SEEDS = {32: 15, 64: 11, 256: 12, 299: 13, 512: 14}
RESIZED = {  # side: seed of the image, SHA-256 of TensorFlow's float32 result
    32: (21, "6d630ea03725823d6c2a864b70f31b3bb98e36308756c2d826c3e6f1ee57ca95"),
    64: (22, "dad445904e90cfc23e926f51f4a060ae51e2f11fc00e22b39bda1874ef249f96"),
    128: (23, "95750476611598375c7081c1e423863393d2bc014b4674d762a7a17ee7ade698"),
    256: (24, "2e51592a2200205534006599fa98670c0283f8e2225ee140e62adef70e6290f8"),
    299: (25, "7e5765c58ac47dd7582156f531d5f4420f261d3d43585adc0f6dff0428654ae3"),
    512: (26, "2295114440a05c3dc41e899c11d42cd154cba06ecc9749aca2329a7be8c2a4fb"),
}
RESIZED_48X80 = "f974673abec6db9fa20a3213b1d4d965289eedc4ba3eaa00fcc229563be4177a"


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def relative(a: torch.Tensor | np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b))


@pytest.fixture(scope="session")
def state():
    return weights()


@pytest.fixture(scope="session")
def network(state):
    network = inception.Inception()
    network.load_state_dict(state, strict=False)
    return network.fold()


@pytest.fixture(scope="session")
def golden():
    with np.load(DATA / "inception.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="session")
def whole_file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / inception.FILE_NAMES[0]
    torch.save(state, path)
    return path


# ---------------------------------------------------------------- resizing


@pytest.mark.parametrize("side", RESIZED)
def test_resize_is_bit_identical_to_tensorflow(side):
    seed, digest = RESIZED[side]
    resized = inception.resize(torch.from_numpy(images(seed, 1, side)))
    assert resized.shape == (1, 299, 299, 3) and resized.is_contiguous()
    assert sha256(resized.numpy()) == digest


def test_resize_of_oblong_images(golden):
    image = torch.from_numpy(golden["resize_input_48x80"])
    assert sha256(inception.resize(image).numpy()) == RESIZED_48X80


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (2, 300), (298, 3), (600, 1)])
def test_resize_of_any_size_follows_the_formula(height, width):
    image = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    resized = inception.resize(torch.from_numpy(image)).numpy()
    f = np.float32
    for i in (0, 1, 100, 149, 297, 298):
        for j in (0, 2, 101, 150, 298):
            y, x = f(i) * (f(height) / f(299)), f(j) * (f(width) / f(299))
            top, left = min(int(y), height - 1), min(int(x), width - 1)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            p = image[0].astype(f)
            above = p[top, left] + (p[top, right] - p[top, left]) * (x - f(left))
            below = p[bottom, left] + (p[bottom, right] - p[bottom, left]) * (x - f(left))
            np.testing.assert_array_equal(resized[0, i, j], above + (below - above) * (y - f(top)))


@pytest.mark.parametrize("side", [299, 8])
def test_resize_does_not_change_its_input(side):
    image = torch.rand(1, side, side, 3) * 255
    before = image.clone()
    inception.resize(image).add_(1)
    assert torch.equal(image, before)


# ---------------------------------------------------------------- features


@pytest.mark.parametrize("side", SEEDS)
def test_features_agree_with_adm(network, golden, side):
    with torch.inference_mode():
        features = network(torch.from_numpy(images(SEEDS[side], 2, side)))
    assert [value.shape for value in features] == [(2, 2048), (2, 2023), (2, 1008)]
    for part, value in features._asdict().items():
        assert value.dtype == torch.float32
        for image in range(2):
            assert relative(value[image], golden[f"{part}_{side}"][image]) < 1e-4


def test_folding_changes_features_by_rounding_only(state, network, golden):
    plain = inception.Inception()
    plain.load_state_dict(state, strict=False)
    batch = torch.from_numpy(images(SEEDS[32], 2, 32))
    for one, other in zip(plain(batch), network(batch), strict=True):
        assert relative(one, other.numpy()) < 5e-5
    assert relative(plain(batch).pool, golden["pool_32"]) < 1e-4


def test_autocast_and_the_settings_of_the_caller(network):
    batch, before = torch.from_numpy(images(1, 1, 32)), torch.backends.cudnn.allow_tf32
    with torch.autocast("cpu", torch.bfloat16):
        inside = network(batch).pool
    assert torch.equal(inside, network(batch).pool)
    assert torch.backends.cudnn.allow_tf32 is before


# ---------------------------------------------------------------- files of weights


@pytest.mark.parametrize("zipped", [True, False])
def test_published_layouts_load(state, golden, tmp_path, zipped):
    counters = {
        name.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for name in state if "mean" in name
    }
    path = tmp_path / "weights.pth"
    torch.save(state | counters, path, _use_new_zipfile_serialization=zipped)
    extractor = inception.load_inception(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (extractor.name, extractor.size, extractor.digest) == ("inception-2015-12-05", 2048, digest)
    path.unlink()  # the network no longer needs it
    batch = images(SEEDS[64], 2, 64)
    batch.flags.writeable = False
    features = extractor(batch)
    assert set(features) == {"pool", "spatial", "logits"}
    assert max(relative(value, golden[f"{part}_64"]) for part, value in features.items()) < 1e-4


def test_the_file_is_found_under_both_published_names(tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "EVALUATION_FOLDER", tmp_path)
    with pytest.raises(UserError, match="bitdance download inception"):
        inception.find_inception_weights(None)
    for name in inception.FILE_NAMES[::-1]:
        (tmp_path / name).touch()
        assert inception.find_inception_weights(None) == tmp_path / name
    mine = tmp_path / "mine.pth"
    with pytest.raises(UserError, match=r"mine\.pth.*`inception_weights`"):
        inception.find_inception_weights(mine)
    mine.touch()
    assert inception.find_inception_weights(mine) == mine


def load_error(path) -> str:
    with pytest.raises(UserError) as error:
        inception.load_inception(path)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("fc.weight", lambda x: x[:1000].clone(), "fc.weight is torch.float32 of shape (1000, 2048) instead of"),
        ("fc.bias", lambda x: x.double(), "fc.bias is torch.float64 of shape (1008,) instead of torch.float32"),
        ("Mixed_6d.branch1x1.bn.running_var", lambda x: -x, "invalid values"),
        ("Mixed_7c.branch1x1.bn.bias", lambda x: x / 0, "invalid values"),
        ("Mixed_5b.branch1x1.bn.bias", lambda x: None, "Mixed_5b.branch1x1.bn.bias is missing"),
        ("Mixed_5b.branch1x1.bn.bias", lambda x: [1], "none of"),
    ],
)
def test_wrong_tensors_are_named(state, tmp_path, name, change, words):
    changed = state | {name: change(state[name])}
    path = tmp_path / "changed.pth"
    torch.save({key: value for key, value in changed.items() if value is not None}, path)
    assert words in load_error(path)


class Evil:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"<html>", {}, [], {"model": {}}, {"a": Evil()}, 3.0])
def test_other_files_are_refused(tmp_path, capsys, content):
    path = tmp_path / "other.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    load_error(path)
    load_error(tmp_path)
    assert not capsys.readouterr().out


def test_truncated_files_are_refused(whole_file, tmp_path):
    content = whole_file.read_bytes()
    path = tmp_path / "truncated.pth"
    for length in (10, 1000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        load_error(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_mutated_files_raise_only_user_errors(state, tmp_path, zipped):
    """The file lacks tensors, so that none can load."""
    part = {name: value for name, value in state.items() if name.startswith("Conv2d_1a")}
    path = tmp_path / "mutated.pth"
    torch.save(part, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(100):
        mutated = bytearray(whole)
        for index in random.integers(0, len(whole), random.integers(1, 20)):
            mutated[index] = random.integers(256)
        path.write_bytes(mutated)
        load_error(path)


def test_mutated_whole_files_load_or_raise_a_user_error(whole_file, tmp_path):
    """In the pickle and in the directory of the archive, where some bytes have no effect."""
    path = tmp_path / "mutated.pth"
    content, random = bytearray(whole_file.read_bytes()), np.random.default_rng(1)
    for region in ((0, 40_000), (len(content) - 40_000, len(content))):
        for offset in random.integers(*region, 4):
            content[offset] ^= 0xFF
            path.write_bytes(content)
            with contextlib.suppress(UserError):
                assert not inception.load_inception(path).digest.startswith(inception.PUBLISHED_DIGEST)
            content[offset] ^= 0xFF


# ---------------------------------------------------------------- other feature extractors


MINE = """
import torch
from bitdance.metrics.features import FeatureExtractor, Features

def function(images):
    flat = images.flatten(1)[:, :4].float()
    return Features(flat, logits=-flat)

NETWORK = FeatureExtractor("mine", 4, function, classifies=True)
def make(): return NETWORK
def fails(): raise RuntimeError("no such weights")
NUMBER = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    path = tmp_path / "mine_for_evaluation.py"
    path.write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    return path


def test_an_extractor_of_the_user_is_loaded_by_name(mine):
    batch = np.arange(2 * 5 * 5 * 3, dtype=np.uint8).reshape(2, 5, 5, 3)
    for name in (f"{mine}:NETWORK", f"{mine}:make", "mine_for_evaluation:NETWORK"):
        extractor = load_feature_extractor(name)
        assert (extractor.name, extractor.size, extractor.classifies, extractor.digest) == ("mine", 4, True, "")
        features = extractor(batch[:, ::-1])  # any strides
        assert features["pool"].tolist() == [[60, 61, 62, 63], [135, 136, 137, 138]] and "spatial" not in features
        assert np.array_equal(features["logits"], -features["pool"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mine_for_evaluation", "write module:attribute"),
        (":NETWORK", "write module:attribute"),
        ("mine_for_evaluation:not there", "write module:attribute"),
        ("mine_for_evaluation:absent", "AttributeError"),
        ("absent_for_evaluation:NETWORK", "ModuleNotFoundError"),
        ("absent/file.py:NETWORK", r"no file absent/file\.py"),
        ("mine_for_evaluation:fails", "no such weights"),
        ("mine_for_evaluation:NUMBER", "is int: expected"),
    ],
)
def test_wrong_names_are_refused(mine, name, words):
    with pytest.raises(UserError, match=words):
        load_feature_extractor(name)


@pytest.mark.parametrize(
    ("function", "classifies", "words"),
    [
        (lambda x: x.flatten(1)[:, :3].float(), False, r"pool as Tensor of shape \(2, 3\): .* shape \(2, 4\)"),
        (lambda x: torch.zeros(1, 4), False, r"pool as Tensor of shape \(1, 4\)"),
        (lambda x: torch.full((2, 4), float("nan")), False, "infinities or NaNs"),
        (lambda x: "features", False, "pool as str"),
        (lambda x: Features(torch.zeros(2, 4), torch.zeros(2)), False, r"spatial as Tensor of shape \(2,\)"),
        (lambda x: torch.zeros(2, 4), True, "no logits"),
    ],
)
def test_invalid_features_are_named(function, classifies, words):
    with pytest.raises(UserError, match=f"feature extractor odd .*{words}"):
        FeatureExtractor("odd", 4, function, classifies)(np.zeros((2, 4, 4, 3), np.uint8))


def test_features_are_float32_and_computed_without_gradients():
    parameter = torch.ones(4, dtype=torch.float64, requires_grad=True)
    extractor = FeatureExtractor("double", 4, lambda x: parameter * torch.ones(len(x), 1))
    pool = extractor(np.zeros((2, 4, 4, 3)))["pool"]
    assert pool.dtype == np.float32 and pool.tolist() == [[1.0] * 4] * 2
