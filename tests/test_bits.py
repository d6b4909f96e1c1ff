"""Stored bits: making them with any number of processes, reading them, and training from them."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
import small
import torch
from PIL import Image
from test_training import CPU, SIZES, config, log

from bitdance.cli import original_cli
from bitdance.cli.main import main
from bitdance.data.cache_writer import CacheWriter, EncodeResult
from bitdance.data.crops import center_crop, normalize, random_crop, to_array
from bitdance.data.images import open_images
from bitdance.data.token_cache import TokenDataset
from bitdance.models.quantizer import pack, unpack
from bitdance.models.tokens import tokens_from_grid
from bitdance.runtime.errors import UserError
from bitdance.runtime.process_group import World
from bitdance.training.loader import Loader
from bitdance.training.losses import BitDanceLoss
from bitdance.training.setup import train_autoencoder, train_model
from bitdance.training.train_config import AutoencoderLossConfig, LossConfig
from bitdance.weights import weights_file

ALONE = World(0, 1, CPU)


def noisy_pictures(folder: pathlib.Path, classes: int = 3, each: int = 4) -> pathlib.Path:
    """Pictures without symmetry, some wider than high, so that every crop and mirror image is another."""
    draw = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class-{label}").mkdir(parents=True)
        for number in range(each):
            pixels = draw.integers(0, 256, (20, 60 + 4 * (number % 2), 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"class-{label}" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    return noisy_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> pathlib.Path:
    return small.save_pair(tmp_path_factory.mktemp("pair")).parent / "autoencoder.safetensors"


def encode(data: pathlib.Path, weights: pathlib.Path, folder: pathlib.Path, **changes: object) -> EncodeResult:
    file = weights_file.read(weights)
    settings: Any = {"image_size": 16, "batch_size": 4, "shard_size": 5, "num_workers": 2, **changes}
    digest = weights_file.digest(file.states["autoencoder"])
    return CacheWriter(open_images(data), weights_file.load_autoencoder(file), digest, folder, **settings).run(ALONE)


def store(data: pathlib.Path, weights: pathlib.Path, folder: pathlib.Path, **changes: object) -> TokenDataset:
    encode(data, weights, folder, **changes)
    return TokenDataset(folder)


def arguments(data: pathlib.Path, weights: pathlib.Path, folder: pathlib.Path, *others: object) -> list[str]:
    given = ["encode", data, "--autoencoder", weights, "--output", folder, "--image-size", 16, "--batch-size", 4,
             "--shard-size", 5, "--num-workers", 2, "--device", "cpu", "--threads", 1, *others]  # fmt: skip
    return list(map(str, given))


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------------ making


def test_a_store_holds_the_bits_of_every_view(data, weights, tmp_path):
    bits = store(data, weights, tmp_path / "bits", crops=3, seed=7)
    assert bits.digest != store(data, weights, tmp_path / "other", crops=3, seed=8).digest
    images, network = open_images(data), weights_file.load_autoencoder(weights)
    assert len(bits) == 12 and bits.classes == images.classes and np.array_equal(bits.labels, images.labels)
    seen = set()
    for index in range(12):
        views = [
            to_array(view) for crop in views_by_hand(images.read(index), 7, index, 3) for view in (crop, mirrored(crop))
        ]
        with torch.no_grad():
            expected = pack(tokens_from_grid(network.encode(normalize(torch.from_numpy(np.stack(views))))))
        for crop in range(3):
            for flip in range(2):
                found = bits.read(index, crop, flip)
                assert found.shape == (16, 1) and found.dtype == np.uint8  # 16 tokens of 8 bits
                assert np.array_equal(found, expected[2 * crop + flip].numpy())
                seen.add(found.tobytes())
    assert len(seen) > 60  # of 72: they are really different views


def mirrored(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def views_by_hand(image: Image.Image, seed: int, index: int, crops: int) -> list[Image.Image]:
    from bitdance.models import philox

    made = [center_crop(image, 16)]
    for crop in range(1, crops):
        words = philox.uniform(seed, torch.tensor([index]), 3, stream=32, step=0, draws=crops)[crop, 0].tolist()
        made.append(random_crop(image, 16, (words[0], words[1], words[2])))
    return made


def test_the_metadata_say_how_a_store_was_made(data, weights, tmp_path):
    store(data, weights, tmp_path / "bits", crops=2, flips=False, seed=3)
    shard = weights_file.read(tmp_path / "bits" / "000002.safetensors")
    assert shard.metadata["kind"] == "tokens" and shard.metadata["format_version"] == "1"
    assert shard.config["covered"] == [10, 12] and shard.config["bad_images"] == []
    encoding = shard.config["info"]
    assert encoding["autoencoder"] == weights_file.read(weights).metadata["digest"]
    assert encoding["classes"] == ["class-0", "class-1", "class-2"]
    assert {name: encoding[name] for name in ("image_size", "grid", "bits", "crops", "flips", "seed", "precision")} == {
        "image_size": 16, "grid": 4, "bits": 8, "crops": 2, "flips": False, "seed": 3, "precision": "float32",
    }  # fmt: skip
    state = shard.states["tokens"]
    assert state["indices"].tolist() == [10, 11] and state["labels"].tolist() == [2, 2]
    assert tuple(state["bits"].shape) == (2, 2, 1, 16, 1)
    manifest = json.loads((tmp_path / "bits" / "token_cache.json").read_text())
    assert [entry["images"] for entry in manifest["shards"]] == [5, 5, 2]


def test_one_process_and_two_write_the_same_bytes(data, weights, tmp_path, capsys):
    script = tmp_path / "encode.py"
    script.write_text("from bitdance.cli.main import main\nmain()\n")
    main(arguments(data, weights, tmp_path / "1", "--crops", 2))
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["images"], said["bad_images"], said["shards"], said["made"], said["processes"]) == (12, 0, 3, 12, 1)
    run = small.run(script, *arguments(data, weights, tmp_path / "2", "--crops", 2), processes=2)
    assert json.loads(run.stdout.splitlines()[-1])["processes"] == 2
    one, two = contents(tmp_path / "1"), contents(tmp_path / "2")
    assert sorted(one) == [
        "000000.safetensors",
        "000001.safetensors",
        "000002.safetensors",
        "token_cache.json",
        "job.json",
    ]
    assert one == two


def test_an_interrupted_job_goes_on_and_ends_with_the_same_bytes(data, weights, tmp_path, monkeypatch):
    store(data, weights, tmp_path / "whole")
    right, calls = CacheWriter._encode, []

    def killed(self, pixels):
        calls.append(None)
        if len(calls) == 4:  # in the second shard
            raise KeyboardInterrupt
        return right(self, pixels)

    monkeypatch.setattr(CacheWriter, "_encode", killed)
    with pytest.raises(KeyboardInterrupt):
        store(data, weights, tmp_path / "bits")
    assert sorted(contents(tmp_path / "bits")) == ["000000.safetensors", "job.json"]
    with pytest.raises(UserError, match="is not finished: run the `bitdance encode`"):
        TokenDataset(tmp_path / "bits")
    first = (tmp_path / "bits" / "000000.safetensors").stat().st_mtime_ns
    outcome = encode(data, weights, tmp_path / "bits")
    assert outcome.made == 7 and outcome.images == 12
    assert (tmp_path / "bits" / "000000.safetensors").stat().st_mtime_ns == first  # kept, not made again
    assert contents(tmp_path / "bits") == contents(tmp_path / "whole")
    assert encode(data, weights, tmp_path / "bits").made == 0


@pytest.mark.parametrize("damage", ["flipped", "torn", "gone", "another"])
def test_a_damaged_shard_is_seen_and_made_again(data, weights, tmp_path, damage):
    store(data, weights, tmp_path / "bits")
    before = contents(tmp_path / "bits")
    path = tmp_path / "bits" / "000001.safetensors"
    place = before[path.name].index(weights_file.read(path).states["tokens"]["bits"].numpy().tobytes())
    if damage == "flipped":
        changed = bytearray(before[path.name])
        changed[place + 3] ^= 4
        path.write_bytes(bytes(changed))
        bits = TokenDataset(tmp_path / "bits")
        with pytest.raises(UserError, match=r"000001\.safetensors is damaged \(image 0, crop 0\): run the `bitdance"):
            bits.read(5, 0, 0)
        assert bits.read(0, 0, 0) is not None
    elif damage == "torn":
        path.write_bytes(before[path.name][:-20])
    elif damage == "gone":
        path.unlink()
    else:
        shutil.copy(tmp_path / "bits" / "000000.safetensors", path)
    if damage != "flipped":
        with pytest.raises(UserError, match=r"000001\.safetensors.*: run the `bitdance encode` that made it again"):
            TokenDataset(tmp_path / "bits")
    assert encode(data, weights, tmp_path / "bits").made == 5
    assert contents(tmp_path / "bits") == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"crops": 2}, "crops was 1, is 2"), ({"flips": False}, "flips was True, is False"), ({"seed": 1}, "seed was 0")],
)
def test_a_store_of_other_settings_is_not_mixed(data, weights, tmp_path, changes, words):
    store(data, weights, tmp_path / "bits")
    with pytest.raises(UserError, match="holds a job of other settings") as error:
        store(data, weights, tmp_path / "bits", **changes)
    assert words in str(error.value)


def test_a_damaged_manifest_is_a_sentence(data, weights, tmp_path):
    store(data, weights, tmp_path / "bits")
    path = tmp_path / "bits" / "token_cache.json"
    text = path.read_text()
    shorter = json.loads(text)
    del shorter["shards"][1]
    for wrong in (
        json.dumps(shorter),
        "",
        "[]",
        "{}",
        text.replace('"crops": 1', '"crops": 2'),
        text.replace('"crops"', '"crop"'),
    ):
        path.write_text(wrong)
        with pytest.raises(UserError, match="bitdance encode"):
            TokenDataset(tmp_path / "bits")


# ------------------------------------------------------------ training


def train(data: pathlib.Path, weights: pathlib.Path, folder: pathlib.Path, parallel_num: int = 1, **changes: object):
    run = config(data, folder, **{"epochs": 3, **changes})
    sizes = dataclasses.replace(SIZES, parallel_num=parallel_num)
    path = train_model(run, sizes, LossConfig(perturb_rate=0.2), weights, "cpu")
    return weights_file.read(path)


@pytest.mark.parametrize("parallel_num", [1, 4])
def test_training_from_bits_equals_training_from_images(data, weights, tmp_path, parallel_num):
    store(data, weights, tmp_path / "bits")
    images = train(data, weights, tmp_path / "a", parallel_num, random_crop=False)
    bits = train(tmp_path / "bits", weights, tmp_path / "b", parallel_num, random_crop=False)
    assert images.metadata["digest"] == bits.metadata["digest"]  # the same weights, bit for bit
    assert images.config == bits.config and images.metadata["autoencoder_digest"] == bits.metadata["autoencoder_digest"]
    a, b = (
        [(line["loss"], line["grad_norm"]) for line in log(tmp_path / folder)] for folder in ("a", "b")
    )  # the losses too
    assert a == b and len(a) == 9
    previews = [next((tmp_path / folder).glob("preview-*.png")).read_bytes() for folder in ("a", "b")]
    assert previews[0] == previews[1]  # decoded by the autoencoder


@pytest.mark.parametrize("parallel_num", [1, 4])
def test_the_objective_makes_the_same_tokens_of_both(data, weights, tmp_path, parallel_num):
    bits = store(data, weights, tmp_path / "bits", flips=False)
    images, network = open_images(data), weights_file.load_autoencoder(weights)
    objective = BitDanceLoss(small.model(parallel_num=parallel_num), network, LossConfig(), seed=0)
    crops = torch.from_numpy(np.stack([to_array(center_crop(images.read(i), 16)) for i in range(12)]))
    packed = torch.from_numpy(np.stack([bits.read(i, 0, 0) for i in range(12)]))
    assert torch.equal(objective.tokens(packed), objective.tokens(crops))


def test_a_compiled_objective_takes_packed_bits():
    objective = BitDanceLoss(small.model(parallel_num=4), small.autoencoder(), LossConfig(), seed=0)
    packed = torch.randint(0, 256, (2, 16, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = (packed, torch.tensor([0, 1]), torch.arange(2))
    expected = objective(*batch, 5)[0].item()
    torch._dynamo.reset()
    assert torch.compile(objective, backend="eager")(*batch, 5)[0].item() == pytest.approx(expected, rel=1e-6)


def views_seen(batches: Loader, bits: TokenDataset, steps: range) -> list[tuple[int, int, int]]:
    """(image, crop, flip) of everything that is read, found by its bits."""
    names = {
        bits.read(index, crop, flip).tobytes(): (index, crop, flip)
        for index in range(len(bits))
        for crop in range(bits.info.crops)
        for flip in range(1 + bits.info.flips)
    }
    assert len(names) == len(bits) * bits.info.crops * (1 + bits.info.flips)
    return [names[view.numpy().tobytes()] for step in steps for view in batches.load(step).inputs]


def test_crops_and_flips_are_drawn_anew_each_epoch(data, weights, tmp_path):
    bits = store(data, weights, tmp_path / "bits", crops=3, batch_size=100)
    whole = Loader(bits, config(data), ALONE)
    seen = views_seen(whole, bits, range(90))  # 30 epochs
    assert [index for index, _, _ in seen] == [int(i) for step in range(90) for i in whole.indices(step)]
    # As from images: random crops only, until the decay of augmentation brings centre crops.
    assert {crop for _, crop, _ in seen} == {1, 2}
    assert sum(crop == 1 for _, crop, _ in seen) / 360 == pytest.approx(0.5, abs=0.1)
    assert sum(flip for _, _, flip in seen) / 360 == pytest.approx(0.5, abs=0.1)
    parts = [Loader(bits, config(data), World(rank, 2, CPU)) for rank in range(2)]
    for step in (0, 7):
        expected = whole.load(step)
        assert torch.equal(torch.cat([part.load(step).inputs for part in parts]), expected.inputs)
        assert torch.equal(torch.cat([part.load(step).labels for part in parts]), expected.labels)
    late = Loader(bits, config(data, aug_decay_start_epoch=0, aug_decay_end_epoch=2), ALONE)
    assert {crop for _, crop, _ in views_seen(late, bits, range(6, 12))} == {0}


def test_a_store_without_flips_is_never_mirrored(data, weights, tmp_path):
    bits = store(data, weights, tmp_path / "bits", flips=False)
    assert {flip for _, _, flip in views_seen(Loader(bits, config(data), ALONE), bits, range(9))} == {0}


def test_a_run_from_bits_resumes_bit_for_bit(data, weights, tmp_path):
    store(data, weights, tmp_path / "bits", crops=2)
    whole = train(tmp_path / "bits", weights, tmp_path / "whole")
    train(tmp_path / "bits", weights, tmp_path / "parts", max_steps=4)
    parts = train(tmp_path / "bits", weights, tmp_path / "parts")
    assert parts.metadata["digest"] == whole.metadata["digest"]
    with pytest.raises(UserError, match="images was 12 stored as"):
        train(data, weights, tmp_path / "parts")


def test_validation_on_a_store_knows_its_autoencoder_by_the_file(data, tmp_path):
    """A file in half precision has another digest than the float32 network that is made of it."""
    weights = tmp_path / "autoencoder.safetensors"
    weights_file.save(weights, small.autoencoder().half())
    bits = store(data, weights, tmp_path / "bits")
    train(bits.path, weights, tmp_path / "run", val_path=bits.path, val_every=2, max_steps=2)
    (loss,) = [line["val_loss"] for line in log(tmp_path / "run") if "val_loss" in line]
    assert 0 < loss < 10
    store(data, small.save_pair(tmp_path).parent / "autoencoder.safetensors", tmp_path / "others")
    weights_file.save(weights, small.autoencoder().half())
    with pytest.raises(UserError, match="others was made by another autoencoder"):
        train(bits.path, weights, tmp_path / "run2", val_path=tmp_path / "others", max_steps=2)
    with pytest.raises(UserError, match="holds bits: an autoencoder is validated on images"):
        run = config(data, tmp_path / "run3", val_path=bits.path, max_steps=1)
        train_autoencoder(run, small.NETWORK, AutoencoderLossConfig(), "cpu")


def test_a_store_of_another_autoencoder_or_size_is_refused(data, weights, tmp_path):
    store(data, weights, tmp_path / "bits")
    weights_file.save(tmp_path / "other.safetensors", small.autoencoder(seed=9))
    with pytest.raises(UserError, match="was made by another autoencoder"):
        train(tmp_path / "bits", tmp_path / "other.safetensors", tmp_path / "run")
    with pytest.raises(UserError, match="was made from images of 16 px: use --image-size 16"):
        train(tmp_path / "bits", weights, tmp_path / "run", image_size=32)
    with pytest.raises(UserError, match="an autoencoder is trained on the images themselves"):
        train_autoencoder(config(tmp_path / "bits", tmp_path / "run"), small.NETWORK, AutoencoderLossConfig(), "cpu")
    assert not (tmp_path / "run").exists()


def test_the_originals_scripts_train_from_a_store(data, tmp_path):
    """Their image size is 256 px by default, their model has a size by name."""
    network = dataclasses.replace(small.NETWORK, widths=(32, 32, 32, 32, 32))
    weights_file.save(tmp_path / "ae.safetensors", small.autoencoder(config=network))
    store(data, tmp_path / "ae.safetensors", tmp_path / "bits", image_size=64)
    flags = ["--data-path", tmp_path / "bits", "--trained-vae", tmp_path / "ae.safetensors", "--image-size", 64,
             "--model", "BitDance-Tiny", "--num-classes", 3, "--latent-dim", 8, "--global-batch-size", 4,
             "--epochs", 1, "--mixed-precision", "none", "--results-dir"]  # fmt: skip
    original_cli.train([*map(str, flags), str(tmp_path / "1")])
    original_cli.train_parallel([*map(str, flags), str(tmp_path / "4"), "--parallel-num", "4"])
    assert (tmp_path / "1" / "model.safetensors").exists() and (tmp_path / "4" / "model.safetensors").exists()


def test_packed_bits_are_what_crosses_to_the_device(data, weights, tmp_path):
    bits = store(data, weights, tmp_path / "bits")
    batch = next(Loader(bits, config(data), ALONE).stream(0, 1))
    assert batch.inputs.dtype == torch.uint8 and tuple(batch.inputs.shape) == (4, 16, 1)
    assert tuple(unpack(batch.inputs).shape) == (4, 16, 8)


# ------------------------------------------------------------ broken images


@pytest.fixture
def damaged(data, tmp_path) -> pathlib.Path:
    """The pictures with three of twelve cut short."""
    folder = pathlib.Path(shutil.copytree(data, tmp_path / "damaged"))
    for name in ("class-0/1.png", "class-1/2.png", "class-1/3.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:60])
    return folder


def test_bad_images_are_named_once_and_replaced(damaged, capsys):
    images = open_images(damaged)
    whole = Loader(images, config(damaged), ALONE)
    batches = [whole.load(step) for step in range(9)]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and len(whole.bad_images) == 3
    for number, line in enumerate(sorted(lines, key=lambda line: line.split()[2])):
        assert line.startswith(f"bitdance: skipped, {number + 1} so far: cannot read the image {damaged}")
    for place in ("class-0/1.png", "class-1/2.png", "class-1/3.png"):
        assert sum(place in line for line in lines) == 1
    # The next whole one of the epoch's order takes the place, with its own label and crop.
    broken, crop = {1, 6, 7}, Loader(images, config(damaged), ALONE)
    for step, batch in enumerate(batches):
        order, draws = crop._draws(step // 3)
        for place, (pixels, label) in enumerate(zip(batch.inputs, batch.labels.tolist(), strict=True)):
            position = 4 * (step % 3) + place
            index = next(int(i) for i in np.roll(order, -position) if i not in broken)
            assert label == images.labels[index]
            assert np.array_equal(pixels, crop._crop(images, index, draws[index], 1.0))
    # Whatever the number of processes, of threads, and of steps that came before.
    parts = [Loader(images, config(damaged), World(rank, 2, CPU)) for rank in range(2)]
    for step in (8, 2):
        assert torch.equal(torch.cat([part.load(step).inputs for part in parts]), batches[step].inputs)
    for a, b in zip(Loader(images, config(damaged), ALONE).stream(4, 9), batches[4:], strict=True):
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.labels, b.labels)


def test_a_run_with_bad_images_resumes_bit_for_bit(damaged, weights, tmp_path):
    whole = train(damaged, weights, tmp_path / "whole")
    assert log(tmp_path / "whole")[-1]["bad_images"] == 3
    train(damaged, weights, tmp_path / "parts", max_steps=4)
    assert train(damaged, weights, tmp_path / "parts", max_bad_images=3).metadata["digest"] == whole.metadata["digest"]


def test_too_many_bad_images_stop_a_run(damaged, weights, tmp_path):
    with pytest.raises(UserError, match=r"broken than --max-broken 2 allows, the last one: cannot read"):
        train(damaged, weights, tmp_path / "run", max_bad_images=2)


def test_a_set_without_one_whole_image_is_a_sentence(damaged):
    for path in damaged.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"not one image of .* can be read"):
        Loader(open_images(damaged), config(damaged), ALONE).load(0)


def test_bad_images_are_left_out_of_a_store(damaged, weights, tmp_path, capsys):
    bits = store(damaged, weights, tmp_path / "bits")
    assert capsys.readouterr().err.count("bitdance: skipped, ") == 3
    assert bits.labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    shards = [weights_file.read(tmp_path / "bits" / f"00000{number}.safetensors") for number in range(3)]
    assert [shard.config["bad_images"] for shard in shards] == [
        ["class-0/1.png"],
        ["class-1/2.png", "class-1/3.png"],
        [],
    ]
    assert [shard.states["tokens"]["indices"].tolist() for shard in shards] == [[0, 2, 3, 4], [5, 8, 9], [10, 11]]
    undamaged = store(damaged, weights, tmp_path / "again", max_bad_images=3)
    assert np.array_equal(undamaged.read(8, 0, 1), bits.read(8, 0, 1))


def test_too_many_bad_images_stop_an_encoding_also_when_it_is_run_again(damaged, weights, tmp_path):
    for _ in range(2):
        with pytest.raises(UserError, match="--max-broken 2 allows, the last one"):
            store(damaged, weights, tmp_path / "bits", max_bad_images=2)
    assert not (tmp_path / "bits" / "token_cache.json").exists()
    assert len(store(damaged, weights, tmp_path / "bits", max_bad_images=3)) == 9


@pytest.mark.parametrize("flag", ["--crops", "--batch-size", "--shard-size", "--image-size", "--num-workers"])
def test_settings_that_do_not_fit_are_sentences(data, weights, tmp_path, capsys, flag):
    with pytest.raises(SystemExit, match="2"):
        main(arguments(data, weights, tmp_path / "bits", flag, 0))
    assert capsys.readouterr().err.startswith(f"bitdance: {flag} 0 does not fit")
    with pytest.raises(SystemExit, match="2"):
        main(arguments(data, weights, tmp_path / "bits", "--image-size", 18))
    assert "must be a multiple of 4" in capsys.readouterr().err
    assert not (tmp_path / "bits").exists()
