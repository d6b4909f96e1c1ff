"""The token cache: encoding with any number of processes, reading, training from it; unreadable images."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
import small
import torch
from PIL import Image

from bitdance.cli import original_cli
from bitdance.cli.main import main
from bitdance.config import ModelSizes
from bitdance.data.cache_writer import CacheWriter, EncodeResult
from bitdance.data.crops import center_crop, horizontal_flip, normalize, random_crop, to_array
from bitdance.data.encode_config import EncodeConfig
from bitdance.data.images import open_images
from bitdance.data.token_cache import TokenDataset
from bitdance.models import philox
from bitdance.models.quantizer import pack, unpack
from bitdance.models.tokens import tokens_from_grid
from bitdance.runtime.errors import UserError
from bitdance.runtime.process_group import World
from bitdance.training.loader import Loader
from bitdance.training.losses import BitDanceLoss
from bitdance.training.setup import train_autoencoder, train_model
from bitdance.training.train_config import AutoencoderLossConfig, LossConfig
from bitdance.weights import safetensors_files, weights_file

pytestmark = pytest.mark.usefixtures("quick_previews")
CPU = torch.device("cpu")
SINGLE = World(0, 1, CPU)
FILES = ["000000.safetensors", "000001.safetensors", "000002.safetensors", "settings.json", "token_cache.json"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    """Twelve images without symmetry, some wider than high, so that all crops and mirrored views differ."""
    folder, draw = tmp_path_factory.mktemp("data") / "pictures", np.random.default_rng(0)
    for label in range(3):
        (folder / f"class-{label}").mkdir(parents=True)
        for number in range(4):
            pixels = draw.integers(0, 256, (20, 60 + 4 * (number % 2), 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"class-{label}" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def weights(place) -> pathlib.Path:
    return place / "autoencoder.safetensors"


@pytest.fixture(scope="module")
def shared(data, weights, tmp_path_factory) -> pathlib.Path:
    """A token cache that no test changes."""
    folder = tmp_path_factory.mktemp("shared") / "cache"
    encode(data, weights, folder)
    return folder


@pytest.fixture
def cache(shared, tmp_path) -> pathlib.Path:
    """A copy of it."""
    return pathlib.Path(shutil.copytree(shared, tmp_path / "cache"))


def encode(data: pathlib.Path, weights: pathlib.Path, folder: pathlib.Path, **changes: object) -> EncodeResult:
    file = weights_file.read(weights)
    settings: Any = {"image_size": 16, "batch_size": 4, "shard_size": 5, "num_workers": 2, **changes}
    network, digest = weights_file.load_autoencoder(file), weights_file.tokenizer_digest(file)
    return CacheWriter(open_images(data), network, digest, folder, EncodeConfig(**settings)).run(SINGLE)


def encoded(data: pathlib.Path, weights: pathlib.Path, folder: pathlib.Path, **changes: object) -> TokenDataset:
    encode(data, weights, folder, **changes)
    return TokenDataset(folder)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ------------------------------------------------------------ encoding


def test_a_cache_holds_the_bits_of_every_view(data, weights, tmp_path):
    found = encoded(data, weights, tmp_path / "cache", crops=3, seed=7)
    assert found.digest != encoded(data, weights, tmp_path / "other", crops=3, seed=8).digest
    images, network = open_images(data), weights_file.load_autoencoder(weights)
    assert len(found) == 12 and found.classes == images.classes and np.array_equal(found.labels, images.labels)
    seen = set()
    for index in range(12):
        image = images.read(index)
        draws = philox.uniform(7, torch.tensor([index]), 3, stream=32, step=0, draws=3)[1:, 0].tolist()
        crops = [center_crop(image, 16), *(random_crop(image, 16, (a, b, c)) for a, b, c in draws)]
        views = np.stack([to_array(view) for crop in crops for view in (crop, horizontal_flip(crop))])
        with torch.no_grad():
            expected = pack(tokens_from_grid(network.encode(normalize(torch.from_numpy(views))))).numpy()
        for crop, flip in np.ndindex(3, 2):
            view = found.read(index, crop, flip)
            assert view.shape == (16, 1) and view.dtype == np.uint8  # 16 tokens of 8 bits
            assert np.array_equal(view, expected[2 * crop + flip])
            seen.add(view.tobytes())
    assert len(seen) > 60  # of 72: the views differ


def test_metadata_of_a_cache(data, weights, tmp_path):
    encode(data, weights, tmp_path, crops=2, flips=False, seed=3)
    shard = weights_file.read(tmp_path / "000002.safetensors")
    assert shard.metadata["kind"] == "tokens" and shard.metadata["format_version"] == "2"
    info = shard.config.pop("info")
    assert shard.config == {"covered": [10, 12], "bad_images": []}
    assert info["autoencoder"] == weights_file.tokenizer_digest(weights_file.read(weights))
    assert info["classes"] == ["class-0", "class-1", "class-2"]
    assert {name: info[name] for name in ("image_size", "grid", "bits", "crops", "flips", "seed", "precision")} == {
        "image_size": 16, "grid": 4, "bits": 8, "crops": 2, "flips": False, "seed": 3, "precision": "float32",
    }  # fmt: skip
    state = shard.states["tokens"]
    assert state["indices"].tolist() == [10, 11] and state["labels"].tolist() == [2, 2]
    assert tuple(state["bits"].shape) == (2, 2, 1, 16, 1)
    manifest = json.loads((tmp_path / "token_cache.json").read_text())
    assert manifest["info"] == info and [entry["images"] for entry in manifest["shards"]] == [5, 5, 2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_one_process_and_two_write_the_same_bytes(data, weights, tmp_path, capfd):
    options = "--image-size 16 --batch-size 4 --shard-size 5 --num-workers 2 --device cpu --threads 1 --crops 2"
    for processes in (1, 2):
        command = f"encode --data-path {data} --autoencoder {weights} --output {tmp_path}/{processes} {options}"
        small.run_forked(functools.partial(main, command.split()), processes)
        result = json.loads(capfd.readouterr().out.splitlines()[-1])
        counts = [result[name] for name in ("images", "bad_images", "shards", "encoded", "processes")]
        assert counts == [12, 0, 3, 12 if processes == 1 else 7, processes]
    assert contents(tmp_path / "1") == contents(tmp_path / "2") and list(contents(tmp_path / "1")) == FILES


def test_an_interrupted_job_continues_and_ends_with_the_same_bytes(data, weights, shared, tmp_path, monkeypatch):
    right, calls = CacheWriter._encode, []

    def killed(self, pixels):
        calls.append(None)
        if len(calls) == 4:  # in the second shard
            raise KeyboardInterrupt
        return right(self, pixels)

    monkeypatch.setattr(CacheWriter, "_encode", killed)
    with pytest.raises(KeyboardInterrupt):
        encode(data, weights, tmp_path)
    assert list(contents(tmp_path)) == ["000000.safetensors", "settings.json"]
    with pytest.raises(UserError, match="is not finished: run the same `bitdance encode` command again"):
        TokenDataset(tmp_path)
    first = (tmp_path / "000000.safetensors").stat().st_mtime_ns
    result = encode(data, weights, tmp_path)
    assert result.encoded == 7 and result.images == 12
    assert (tmp_path / "000000.safetensors").stat().st_mtime_ns == first  # kept, not encoded again
    assert contents(tmp_path) == contents(shared)
    assert encode(data, weights, tmp_path).encoded == 0


@pytest.mark.parametrize("damage", ["changed bit", "truncated", "missing", "another shard"])
def test_a_damaged_shard_is_detected_and_encoded_again(data, weights, cache, damage):
    before = contents(cache)
    path = cache / "000001.safetensors"
    start = before[path.name].index(weights_file.read(path).states["tokens"]["bits"].numpy().tobytes())
    if damage == "changed bit":
        changed = bytearray(before[path.name])
        changed[start + 3] ^= 4
        path.write_bytes(bytes(changed))
        found = TokenDataset(cache)
        with pytest.raises(UserError, match=r"000001\.safetensors is damaged \(image 0, crop 0\): run the same `bitd"):
            found.read(5, 0, 0)
        assert found.read(0, 0, 0) is not None
    else:
        if damage == "truncated":
            path.write_bytes(before[path.name][:-20])
        elif damage == "missing":
            path.unlink()
        else:
            path.write_bytes(before["000000.safetensors"])
        with pytest.raises(UserError, match=r"000001\.safetensors.*: run the same `bitdance encode` command again"):
            TokenDataset(cache)
    assert encode(data, weights, cache).encoded == 5
    assert contents(cache) == before


@pytest.mark.parametrize(
    "change",
    [{"covered": None}, {"covered": [0, "5"]}, {"covered": [0]}, {"covered": [5, 10**6]}, {"bad_images": None},
     {"bad_images": [[]]}, {"info": []}],
)  # fmt: skip
def test_shards_with_odd_metadata_are_refused_and_encoded_again(data, weights, cache, change):
    before, path = contents(cache), cache / "000001.safetensors"
    file = weights_file.read(path)
    config = {name: value for name, value in {**file.config, **change}.items() if value is not None}
    safetensors_files.save_tensors(path, file.states["tokens"], "tokens", config)
    with pytest.raises(UserError, match=r"000001\.safetensors.*: run the same `bitdance encode` command again"):
        TokenDataset(cache)
    assert encode(data, weights, cache).encoded == 5
    assert contents(cache) == before


def test_images_that_were_removed_are_named(data, weights, shared, tmp_path):
    fewer = shutil.copytree(data, tmp_path / "data")
    next(fewer.rglob("*.png")).unlink()
    with pytest.raises(UserError, match=r"it had 12 images, now there are 11; the names of the images, or how"):
        encode(fewer, weights, shared)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"crops": 2}, "`crops` was 1, is 2"),
        ({"flips": False}, "`flips` was True, is False"),
        ({"seed": 1}, "`seed` was 0"),
    ],
)
def test_other_settings_are_refused(data, weights, shared, changes, words):
    with pytest.raises(UserError, match="belongs to a run with other settings") as error:
        encode(data, weights, shared, **changes)
    assert words in str(error.value)


def test_a_damaged_manifest_is_refused_and_written_again(data, weights, cache):
    path, before = cache / "token_cache.json", contents(cache)
    text = path.read_text()
    shorter = json.loads(text)
    del shorter["shards"][1]
    other, unknown = text.replace('"crops": 1', '"crops": 2'), text.replace('"crops"', '"crop"')
    odd = [text.replace(old, new) for old, new in (('"grid": 4', '"grid": "4"'), ('"bits": 8', '"bits": []'),
           ('"flips": true', '"flips": {}'), ('"images": 12', '"images": 0'))]  # fmt: skip
    for wrong in (json.dumps(shorter), "", "[]", "{}", "[" * 200_000, other, unknown, *odd):
        assert wrong != text
        path.write_text(wrong)
        with pytest.raises(UserError, match="bitdance encode"):
            TokenDataset(cache)
    assert encode(data, weights, cache).encoded == 0 and contents(cache) == before
    for written in (other, json.dumps(shorter)):
        path.write_text(written)
        assert encode(data, weights, cache).encoded == 0 and contents(cache) == before
    encode(data, weights, cache)
    assert contents(cache) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *(({name: 0}, f"{name}=0 is invalid") for name in ("crops", "batch_size", "shard_size", "image_size")),
        ({"num_workers": 0}, "num_workers=0 is invalid"),
        ({"max_bad_images": -1}, "max_bad_images=-1 is invalid"),
        ({"seed": -1}, "seed=-1 is invalid"),
        ({"image_size": 18}, "must be a multiple of 4"),
    ],
)
def test_invalid_settings_are_refused(data, weights, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        encode(data, weights, tmp_path / "cache", **changes)
    assert not (tmp_path / "cache").exists()


# ------------------------------------------------------------ training


def train(data: pathlib.Path, weights: pathlib.Path, folder: pathlib.Path, **changes: object):
    config = small.train_config(data, folder, **{"epochs": 3, **changes})
    sizes = ModelSizes(**small.SIZES, parallel_num=4)
    return weights_file.read(train_model(config, sizes, LossConfig(perturb_rate=0.2), weights, "cpu"))


def loader(images: Any, rank: int = 0, size: int = 1, **changes: object) -> Loader:
    return Loader(images, small.train_config(images.path, pathlib.Path("unused"), **changes), World(rank, size, CPU))


def test_training_from_a_cache_equals_training_from_images(data, weights, shared, tmp_path):
    images, tokens = (
        train(path, weights, tmp_path / name, epochs=2, random_crop=False)
        for path, name in ((data, "a"), (shared, "b"))
    )
    assert images.config == tokens.config
    for key in ("digest", "tokenizer_digest"):
        assert images.metadata[key] == tokens.metadata[key]  # the same weights, bit for bit
    a, b = ([(line["loss"], line["grad_norm"]) for line in small.read_log(tmp_path / folder)] for folder in ("a", "b"))
    assert a == b and len(a) == 6
    previews = [next((tmp_path / folder).glob("preview-*.png")).read_bytes() for folder in ("a", "b")]
    assert previews[0] == previews[1]  # decoded by the autoencoder


@pytest.mark.parametrize("parallel_num", [1, 4])
def test_images_and_cache_give_the_same_tokens(data, weights, shared, parallel_num):
    found, images = TokenDataset(shared), open_images(data)
    network = weights_file.load_autoencoder(weights)
    objective = BitDanceLoss(small.model(parallel_num=parallel_num), network, LossConfig(), seed=0)
    crops = torch.from_numpy(np.stack([to_array(center_crop(images.read(i), 16)) for i in range(12)]))
    packed = torch.from_numpy(np.stack([found.read(i, 0, 0) for i in range(12)]))
    assert torch.equal(objective.tokenize(packed), objective.tokenize(crops))


def test_a_compiled_loss_takes_packed_bits():
    """What follows is as of images, see test_compiling_needs_two_graphs_for_any_number_of_steps."""
    objective = BitDanceLoss(small.model(parallel_num=4), small.autoencoder(), LossConfig(), seed=0)
    packed = torch.randint(0, 256, (2, 16, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    compiled = torch.compile(objective.tokenize, backend="eager", fullgraph=True)
    assert torch.equal(compiled(packed), objective.tokenize(packed))


def views_seen(batches: Loader, found: TokenDataset, steps: range) -> list[tuple[int, int, int]]:
    """Returns (image, crop, flip) of every view that is read, identified by its bits."""
    views = list(np.ndindex(len(found), *found.info.view_shape[:2]))
    names = {found.read(*view).tobytes(): view for view in views}
    assert len(names) == len(views)
    return [names[view.numpy().tobytes()] for step in steps for view in batches.load(step).inputs]


def test_crops_and_flips_are_drawn_anew_each_epoch(data, weights, tmp_path):
    found = encoded(data, weights, tmp_path, crops=3, batch_size=100)
    whole = loader(found)
    seen = views_seen(whole, found, range(90))  # 30 epochs
    assert [index for index, _, _ in seen] == [i for step in range(90) for i in small.image_indices(whole, step)]
    # As from images: only random crops until `aug_decay_start_epoch`.
    assert {crop for _, crop, _ in seen} == {1, 2}
    assert sum(crop == 1 for _, crop, _ in seen) / 360 == pytest.approx(0.5, abs=0.1)
    assert sum(flip for _, _, flip in seen) / 360 == pytest.approx(0.5, abs=0.1)
    parts = [loader(found, rank, 2) for rank in range(2)]
    for step in (0, 7):
        expected = whole.load(step)
        assert torch.equal(torch.cat([part.load(step).inputs for part in parts]), expected.inputs)
        assert torch.equal(torch.cat([part.load(step).labels for part in parts]), expected.labels)
    late = loader(found, aug_decay_start_epoch=0, aug_decay_end_epoch=2)
    assert {crop for _, crop, _ in views_seen(late, found, range(6, 12))} == {0}


def test_a_cache_without_flips_is_never_mirrored(data, weights, tmp_path):
    found = encoded(data, weights, tmp_path, flips=False)
    assert {flip for _, _, flip in views_seen(loader(found), found, range(9))} == {0}


def test_a_run_from_a_cache_resumes_bit_for_bit(data, weights, tmp_path):
    encode(data, weights, tmp_path / "cache", crops=2)
    whole = train(tmp_path / "cache", weights, tmp_path / "whole")
    assert (tmp_path / "whole" / "samples.png").is_file(), "training images are decoded"
    train(tmp_path / "cache", weights, tmp_path / "parts", max_steps=4)
    assert train(tmp_path / "cache", weights, tmp_path / "parts").metadata["digest"] == whole.metadata["digest"]
    with pytest.raises(UserError, match="names of the images, or how they are decoded, differ"):
        train(data, weights, tmp_path / "parts")


def test_validation_on_a_cache_compares_the_digest_of_the_autoencoder_file(data, shared, tmp_path):
    """A file in half precision has another digest than the float32 network loaded from it."""
    weights = tmp_path / "autoencoder.safetensors"
    weights_file.save(weights, small.autoencoder().half())
    cache = tmp_path / "cache"
    encode(data, weights, cache)
    train(cache, weights, tmp_path / "run", val_path=cache, val_every=2, max_steps=2)
    (loss,) = [line["val_loss"] for line in small.read_log(tmp_path / "run") if "val_loss" in line]
    assert 0 < loss < 10
    (held_out := tmp_path / "held-out").mkdir()
    shutil.copytree(data / "class-2", held_out / "class-2")  # label 0 there, and 2 in training
    encode(held_out, weights, tmp_path / "cache2")
    train(cache, weights, tmp_path / "run4", val_path=tmp_path / "cache2", val_every=2, max_steps=2)
    assert any("val_loss" in line for line in small.read_log(tmp_path / "run4"))
    with pytest.raises(UserError, match=f"{shared} was made by another autoencoder"):
        train(cache, weights, tmp_path / "run2", val_path=shared, max_steps=2)
    with pytest.raises(UserError, match="an autoencoder is validated on images"):
        run = small.train_config(data, tmp_path / "run3", val_path=cache, max_steps=1)
        train_autoencoder(run, small.NETWORK, AutoencoderLossConfig(), "cpu")


def test_a_cache_of_another_autoencoder_or_size_is_refused(data, weights, shared, tmp_path):
    weights_file.save(tmp_path / "other.safetensors", small.autoencoder(seed=9))
    with pytest.raises(UserError, match=r"other settings \(the weights of the `autoencoder` differ\)"):
        encode(data, tmp_path / "other.safetensors", shared)
    with pytest.raises(UserError, match="was made by another autoencoder"):
        train(shared, tmp_path / "other.safetensors", tmp_path / "run")
    with pytest.raises(UserError, match="was made from images of 16 px: set image_size=16"):
        train(shared, weights, tmp_path / "run", image_size=32)
    with pytest.raises(UserError, match="an autoencoder is trained on images"):
        train_autoencoder(small.train_config(shared, tmp_path / "run"), small.NETWORK, AutoencoderLossConfig(), "cpu")
    assert not (tmp_path / "run").exists()


def test_a_launcher_trains_from_a_cache(data, tmp_path):
    """With its own flags."""
    network = dataclasses.replace(small.NETWORK, widths=(32, 32, 32, 32, 32))
    weights_file.save(tmp_path / "ae.safetensors", small.autoencoder(config=network))
    encode(data, tmp_path / "ae.safetensors", tmp_path / "cache", image_size=64)
    flags = ["--data-path", tmp_path / "cache", "--trained-vae", tmp_path / "ae.safetensors", "--image-size", 64,
             "--model", "BitDance-Tiny", "--num-classes", 3, "--latent-dim", 8, "--global-batch-size", 4,
             "--epochs", 1, "--mixed-precision", "none", "--parallel-num", 4,
             "--results-dir", tmp_path / "run"]  # fmt: skip
    original_cli.train_parallel(list(map(str, flags)))
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_batches_hold_packed_bits(data, shared):
    batch = next(loader(TokenDataset(shared)).stream(0, 1))
    assert batch.inputs.dtype == torch.uint8 and tuple(batch.inputs.shape) == (4, 16, 1)
    assert tuple(unpack(batch.inputs).shape) == (4, 16, 8)


# ------------------------------------------------------------ bad images

BAD = ("class-0/1.png", "class-1/2.png", "class-1/3.png")


@pytest.fixture
def damaged(data, tmp_path) -> pathlib.Path:
    """The images, three of twelve truncated."""
    folder = pathlib.Path(shutil.copytree(data, tmp_path / "damaged"))
    for name in BAD:
        (folder / name).write_bytes((folder / name).read_bytes()[:60])
    return folder


def test_bad_images_are_named_once_and_replaced(damaged, capsys):
    images = open_images(damaged)
    whole = loader(images)
    batches = [whole.load(step) for step in range(9)]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(whole.bad_images) == 3
    start = "bitdance: skipped an unreadable image ({} so far): cannot read the image " + str(damaged)
    for number, line in enumerate(sorted(lines), 1):
        assert line.startswith(start.format(number))
    assert all(sum(name in line for line in lines) == 1 for name in BAD)
    # The next readable image in the epoch's order replaces it, with its own label and crop.
    bad, crop = {1, 6, 7}, loader(images)
    for step, batch in enumerate(batches):
        order, draws = crop._draws(step // 3)
        for place, (pixels, label) in enumerate(zip(batch.inputs, batch.labels.tolist(), strict=True)):
            position = 4 * (step % 3) + place
            index = next(int(i) for i in np.roll(order, -position) if i not in bad)
            assert label == images.labels[index]
            assert np.array_equal(pixels, crop._view(index, draws[index], 1.0))
    # For any number of processes and threads, and after any step.
    parts = [loader(images, rank, 2) for rank in range(2)]
    for step in (8, 2):
        assert torch.equal(torch.cat([part.load(step).inputs for part in parts]), batches[step].inputs)
    for a, b in zip(loader(images).stream(4, 9), batches[4:], strict=True):
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.labels, b.labels)


def test_a_run_with_bad_images_resumes_bit_for_bit(damaged, weights, tmp_path):
    whole = train(damaged, weights, tmp_path / "whole")
    assert small.read_log(tmp_path / "whole")[-1]["bad_images"] == 3
    train(damaged, weights, tmp_path / "parts", max_steps=4)
    parts = train(damaged, weights, tmp_path / "parts", max_bad_images=3)
    assert parts.metadata["digest"] == whole.metadata["digest"]


def test_too_many_bad_images_stop_a_run(damaged, weights, tmp_path):
    with pytest.raises(UserError, match=r"unreadable than max_bad_images=2 allows, the last: cannot read"):
        train(damaged, weights, tmp_path / "run", max_bad_images=2)
    for path in damaged.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"no image of .* can be read"):
        loader(open_images(damaged), max_bad_images=12).load(0)
    with pytest.raises(UserError, match=r"none of the images of .* can be read"):
        encode(damaged, weights, tmp_path / "cache", max_bad_images=12)


def test_bad_images_are_left_out_of_a_cache(damaged, weights, tmp_path, capsys):
    found = encoded(damaged, weights, tmp_path / "cache")
    assert capsys.readouterr().err.count("bitdance: skipped an unreadable image") == 3
    for _ in range(2):
        with pytest.raises(UserError, match="max_bad_images=2 allows, the last"):
            encode(damaged, weights, tmp_path / "again", max_bad_images=2)
    assert not (tmp_path / "again" / "token_cache.json").exists()
    encode(damaged, weights, tmp_path / "again", max_bad_images=3)
    again, whole = contents(tmp_path / "again"), contents(found.path)
    assert again.keys() == whole.keys()
    assert all(again[name] == whole[name] for name in FILES if name != "settings.json")  # has the last `max_bad_images`
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    shards = [weights_file.read(found.path / name) for name in FILES[:3]]
    assert [shard.config["bad_images"] for shard in shards] == [[BAD[0]], list(BAD[1:]), []]
    assert [shard.states["tokens"]["indices"].tolist() for shard in shards] == [[0, 2, 3, 4], [5, 8, 9], [10, 11]]
