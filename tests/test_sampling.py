"""`bitdance sample`, the job behind the figures, and what looks at files: reconstruct, nearest, convert."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import weakref

import numpy as np
import pytest
import small
import torch
from PIL import Image

from bitdance.cli import original_cli
from bitdance.cli.main import main
from bitdance.config import AutoencoderLossConfig, TrainConfig
from bitdance.metrics.nearest_neighbours import find_nearest
from bitdance.metrics.psnr_ssim import psnr, ssim
from bitdance.models.quantizer import unpack
from bitdance.runtime import run_folder
from bitdance.runtime.errors import UserError
from bitdance.runtime.process_group import World
from bitdance.sampling import job
from bitdance.sampling.pipeline import Generator, balanced_labels, cut, make_labels
from bitdance.sampling.sampler import SampleSettings, decode_tokens
from bitdance.sampling.writers import write_npz
from bitdance.training.setup import train_autoencoder
from bitdance.weights import weights_file
from bitdance.weights.resolve import load_pair

NAMES = ("cat", "dog", "sea lion")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> pathlib.Path:
    """A file of a tiny model, its autoencoder beside it."""
    return small.save_pair(tmp_path_factory.mktemp("pair"), class_names=NAMES)


def sample(model: pathlib.Path, folder: pathlib.Path, *arguments: object) -> pathlib.Path:
    fixed = ["--model", model, "--output", folder, "--sample-steps", 4, "--cfg-scale", 3, "--device", "cpu"]
    main(["sample", *map(str, (*arguments, *fixed))])
    return folder


def images(folder: pathlib.Path) -> np.ndarray:
    """What the record lists, in its order: (B, H, W, 3) uint8."""
    record = json.loads((folder / "samples.json").read_text())["images"]
    return np.stack([np.asarray(Image.open(folder / entry["file"])) for entry in record])


def labels(folder: pathlib.Path) -> list[int]:
    return [entry["class"] for entry in json.loads((folder / "samples.json").read_text())["images"]]


def alike(a: np.ndarray, b: np.ndarray) -> bool:
    difference = np.abs(a.astype(int) - b.astype(int))
    return difference.max() <= 1 and (difference == 0).mean() >= 0.99


# ------------------------------------------------------------ bitdance sample


def test_the_files_of_a_call(model, tmp_path, capsys):
    folder = sample(model, tmp_path / "out", "--per-class", 2)
    out, err = capsys.readouterr()
    assert out.strip() == f"6 images of 3 classes: {folder / 'grid.png'}"
    assert "96/96" in err  # six images, sixteen steps each
    assert sorted(path.name for path in folder.iterdir()) == [
        "0000-cat.png", "0001-cat.png", "0002-dog.png", "0003-dog.png", "0004-sea-lion.png", "0005-sea-lion.png",
        "grid.png", "samples.json",
    ]  # fmt: skip
    assert images(folder).shape == (6, 16, 16, 3)
    assert len({picture.tobytes() for picture in images(folder)}) == 6
    record = json.loads((folder / "samples.json").read_text())
    assert record["images"][4] == {"file": "0004-sea-lion.png", "class": 2, "name": "sea lion", "number": 4}
    assert (record["seed"], record["cfg_scale"], record["sample_steps"]) == (0, 3.0, 4)
    with Image.open(folder / "grid.png") as grid:
        side = 96 + 2  # small pictures are enlarged to 96 pixels
        assert grid.height == 3 * side + 2
        margin = grid.width - (2 * side + 2)
        assert 12 < margin < 150
        first = np.asarray(grid.convert("RGB"))[2 : 2 + 96, margin + 2 : margin + 2 + 96]
    assert np.array_equal(first[::6, ::6], images(folder)[0])


def test_a_seed_gives_the_same_bytes_and_another_seed_others(model, tmp_path):
    first, again = (sample(model, tmp_path / name, "--per-class", 1, "--seed", 5) for name in ("a", "b"))
    other = sample(model, tmp_path / "c", "--per-class", 1, "--seed", 6)
    for path in first.glob("*.png"):
        assert path.read_bytes() == (again / path.name).read_bytes()
        assert path.read_bytes() != (other / path.name).read_bytes()


def test_an_image_depends_on_its_class_number_and_settings_alone(model, tmp_path):
    whole = images(sample(model, tmp_path / "whole", "--per-class", 2))
    single = images(sample(model, tmp_path / "single", "--per-class", 2, "--batch-size", 1))
    uneven = images(sample(model, tmp_path / "uneven", "--per-class", 2, "--batch-size", 4, "--chunk-size", 3))
    assert alike(whole, single) and alike(whole, uneven)
    # The first two are cats in both calls, whatever stands beside them.
    few = images(sample(model, tmp_path / "few", "cat", "2", "--per-class", 2))
    assert alike(whole[:2], few[:2]) and not alike(whole[2:4], few[2:])
    # Class, guidance and steps do change an image.
    others = {"class": ["dog"], "cfg": ["cat", "--cfg-schedule", "constant"], "share": ["cat", "--share-first"]}
    for name, changes in others.items():
        changed = images(sample(model, tmp_path / name, *changes, "--per-class", 2))
        assert not alike(whole[:2], changed), name


def test_classes_by_id_and_name(model, tmp_path):
    folder = sample(model, tmp_path / "out", "sea_lion", "0", "Dog,0", "--per-class", 1)
    assert labels(folder) == [2, 0, 1, 0]
    assert labels(sample(model, folder, "all", "--per-class", 1)) == [0, 1, 2]


def test_many_classes_without_names(tmp_path):
    """1000 nameless classes are ImageNet's: by default the first twenty, and two of them are cranes."""
    model = small.save_pair(tmp_path, num_classes=1000)
    folder = sample(model, tmp_path / "out", "--per-class", 1)
    assert labels(folder) == list(range(20))
    assert (folder / "0000-tench.png").exists()
    assert labels(sample(model, folder, "golden retriever", "n02099601", "--per-class", 1)) == [207, 207]


def test_an_earlier_call_leaves_nothing_and_foreign_files_stay(model, tmp_path):
    folder = sample(model, tmp_path / "out", "--per-class", 2)
    (folder / "holiday.png").write_bytes(b"mine")
    (folder / "0007-cat.png").write_bytes(b"mine too")
    sample(model, folder, "dog", "--per-class", 1)
    assert sorted(path.name for path in folder.iterdir()) == [
        "0000-dog.png", "0007-cat.png", "grid.png", "holiday.png", "samples.json",
    ]  # fmt: skip
    assert (folder / "holiday.png").read_bytes() == b"mine"


def test_whatever_the_record_of_an_earlier_call_says_it_does_not_stand_in_the_way(model, tmp_path):
    folder = tmp_path / "out"
    (folder / "inner").mkdir(parents=True)
    files = [{"file": "inner"}, {"file": 3}, {"file": "x" * 300}, {"file": ""}]
    (folder / "samples.json").write_text(json.dumps({"images": files}))
    sample(model, folder, "dog", "--per-class", 1)
    assert (folder / "0000-dog.png").exists() and (folder / "inner").is_dir()


def test_a_record_cannot_make_the_command_remove_files_elsewhere(model, tmp_path):
    victim = tmp_path / "victim.png"
    victim.write_bytes(b"mine")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "samples.json").write_text(json.dumps({"images": [{"file": "../victim.png"}, {"file": str(victim)}]}))
    sample(model, folder, "dog", "--per-class", 1)
    assert victim.read_bytes() == b"mine"


def test_a_call_that_fails_leaves_the_images_of_an_earlier_one(model, tmp_path):
    folder = sample(model, tmp_path / "out", "cat", "--per-class", 1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for wrong in (["bird"], ["cat", "--per-class", 0], ["cat", "--seed", -1], ["cat", "--batch-size", 0]):
        with pytest.raises(SystemExit):
            sample(model, folder, *wrong)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_guidance_and_steps_are_published_ones_for_a_released_file(model, tmp_path):
    released = tmp_path / "BitDance_B_16X.pt"  # what it holds does not matter here
    released.write_bytes(model.read_bytes())
    (tmp_path / "autoencoder.safetensors").write_bytes(model.with_name("autoencoder.safetensors").read_bytes())
    folder = tmp_path / "out"
    main(["sample", "cat", "--per-class", "1", "--model", str(released), "--output", str(folder), "--device", "cpu"])
    record = json.loads((folder / "samples.json").read_text())
    assert (record["cfg_scale"], record["sample_steps"]) == (6.1, 100)


def test_raw_weights_on_request(tmp_path):
    """A run's checkpoint holds both; `--weights model` samples the raw ones."""
    raw, averaged = small.model(seed=1), small.model(seed=2)
    tensors = {f"model/{name}": value for name, value in raw.state_dict().items()}
    tensors |= {f"ema/{name}": value for name, value in averaged.state_dict().items()}
    config = {"model": dataclasses.asdict(raw.config)}
    weights_file.save_tensors(tmp_path / "checkpoint.safetensors", tensors, "training", config, trains="model")
    weights_file.save(tmp_path / "raw.safetensors", raw)
    weights_file.save(tmp_path / "averaged.safetensors", averaged)
    weights_file.save(tmp_path / "autoencoder.safetensors", small.autoencoder())

    def made(name: str, *arguments: str) -> np.ndarray:
        folder = tmp_path / f"{name}{len(arguments)}"
        return images(sample(tmp_path / f"{name}.safetensors", folder, "0", "--per-class", 1, *arguments))

    assert np.array_equal(made("checkpoint"), made("averaged"))
    assert np.array_equal(made("checkpoint", "--weights", "model"), made("raw"))


# ------------------------------------------------------------ labels, npz, jobs


@pytest.mark.parametrize(("count", "classes"), [(50, 10), (57, 10), (7, 10), (1000, 1000), (10, 3)])
def test_balanced_labels(count, classes):
    found = balanced_labels(count, classes, seed=3)
    assert found.shape == (count,) and found.dtype == np.int64
    counts = np.bincount(found, minlength=classes)
    whole, rest = divmod(count, classes)
    assert set(counts.tolist()) <= {whole, whole + 1} and (counts == whole + 1).sum() == rest
    assert np.array_equal(found, balanced_labels(count, classes, seed=3))
    assert not np.array_equal(found, balanced_labels(count, classes, seed=4))
    assert not np.array_equal(found, np.sort(found))


def test_every_split_of_balanced_labels_has_most_classes():
    """The Inception Score takes tenths of the images as they come."""
    splits = balanced_labels(10_000, 100, seed=0).reshape(10, 1000)
    assert all(len(set(split.tolist())) == 100 for split in splits)
    assert all(np.bincount(split).max() < 30 for split in splits)


def test_cut():
    assert list(cut(10, 4)) == [range(0, 4), range(4, 8), range(8, 10)]
    assert list(cut(4, 100)) == [range(0, 4)]
    for count, size in ((0, 1), (-3, 1), (1, 0), (1, -2)):
        with pytest.raises(UserError):
            list(cut(count, size))


def test_write_npz(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 4, 6, 3), dtype=np.uint8)
    path = tmp_path / "deep" / "images.npz"
    write_npz(path, (pixels[:3], pixels[3:7, ::1], pixels[7:]), pixels.shape, np.arange(7))
    with np.load(path, allow_pickle=False) as file:
        assert sorted(file) == ["arr_0", "arr_1"]
        assert file["arr_0"].dtype == np.uint8 and np.array_equal(file["arr_0"], pixels)
        assert file["arr_1"].dtype == np.int64 and file["arr_1"].tolist() == list(range(7))
    before = path.read_bytes()
    for count in (6, 8):
        with pytest.raises(ValueError, match=f"{count} images came where 7 were announced"):
            write_npz(path, [np.zeros((count, 4, 6, 3), np.uint8)], pixels.shape, np.arange(7))
    assert [p.name for p in path.parent.iterdir()] == ["images.npz"] and path.read_bytes() == before


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(small.model(), small.autoencoder(), SampleSettings(3, 2.0), seed=1)


def run(plan: job.Job, generator: Generator) -> pathlib.Path:
    """The first result of a job that is run by one process."""
    return next(iter(job.run(plan, generator, World(0, 1, CPU)).results.values()))


class Alone(World):
    """One of several processes that run one after the other here, so it waits for nobody."""

    def barrier(self) -> None:
        pass

    def broadcast(self, value):
        return value


CPU = torch.device("cpu")
SETTINGS: dict[str, object] = {"seed": 1}


def test_a_job_writes_an_npz_and_does_not_repeat_itself(generator, tmp_path, monkeypatch):
    plan = job.Job(tmp_path / "made", 7, 3, ("npz",), SETTINGS)
    path = run(plan, generator)
    assert path == tmp_path / "made.npz" and listing(tmp_path) == ["made.json", "made.npz"]
    with np.load(path) as file:
        assert file["arr_0"].shape == (7, 16, 16, 3)
        assert np.array_equal(file["arr_1"], balanced_labels(7, 3, 1))
        expected = generator.images([3, 4, 5], file["arr_1"][3:6].tolist()).pixels
        assert np.array_equal(file["arr_0"][3:6], expected)
    before = path.read_bytes()
    monkeypatch.setattr(Generator, "images", None)  # would fail if it were called
    assert run(plan, generator) == path and path.read_bytes() == before


def test_an_interrupted_job_goes_on_where_it_stopped(generator, tmp_path, monkeypatch):
    plan = job.Job(tmp_path / "made", 7, 3, ("npz",), SETTINGS)
    job.run(job.Job(tmp_path / "other", 7, 3, ("npz",), SETTINGS), generator, World(0, 1, CPU))
    real, calls = Generator.images, []

    def stops(self, numbers, classes):
        calls.append(list(numbers))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, numbers, classes)

    monkeypatch.setattr(Generator, "images", stops)
    with pytest.raises(KeyboardInterrupt):
        job.run(plan, generator, World(0, 1, CPU))
    assert not plan.path.with_name("made.npz").exists()
    path = run(plan, generator)
    assert calls == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [6, 7, 8]]  # finished batches are not made again
    assert path.read_bytes() == (tmp_path / "other.npz").read_bytes()
    assert listing(tmp_path) == ["made.json", "made.npz", "other.json", "other.npz"]
    assert (tmp_path / "made.json").read_text() == (tmp_path / "other.json").read_text()


def test_a_batch_too_large_for_the_memory_is_made_in_halves(generator, monkeypatch):
    whole, told = generator.images(range(5), [0, 1, 2, 0, 1]).pixels, []
    made = Generator._images

    def small_memory(self, numbers, labels, progress):
        if len(numbers) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made(self, numbers, labels, progress)

    monkeypatch.setattr(Generator, "_images", small_memory)
    generator = dataclasses.replace(generator, report=told.append)
    halves = generator.images(range(5), [0, 1, 2, 0, 1]).pixels
    assert alike(whole, halves)
    assert [line.split(":")[0] for line in told] == [
        "not enough memory for 5 images at a time", "not enough memory for 3 images at a time",
    ]  # fmt: skip
    monkeypatch.setattr(Generator, "_images", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA")))
    with pytest.raises(torch.OutOfMemoryError):
        generator.images([0], [0])


def test_random_labels_and_packed_bits_on_request(model, tmp_path, capsys):
    words = ["sample", "--model", model, "--device", "cpu", "--output", tmp_path, "--num-images", 7, "--npz",
             "--labels", "random", "--save-bits", "--sample-steps", 3, "--batch-size", 3]  # fmt: skip
    main(list(map(str, words)))
    path = pathlib.Path(json.loads(capsys.readouterr().out.splitlines()[-1])["result"])
    network = weights_file.load_model(model)
    with np.load(path) as images, np.load(path.with_name(path.stem + "-bits.npz")) as bits:
        assert "random-labels" in path.name
        assert np.array_equal(images["arr_1"], make_labels("random", 7, 3, 0)) and images["arr_1"].dtype == np.int64
        assert np.array_equal(bits["arr_1"], images["arr_1"])
        assert bits["arr_0"].shape == (7, network.config.num_tokens, network.config.bits // 8)
        tokens = unpack(torch.from_numpy(bits["arr_0"]))
        autoencoder = weights_file.load_autoencoder(model.parent / "autoencoder.safetensors")
        assert alike(decode_tokens(network, autoencoder, tokens).numpy(), images["arr_0"])


def test_a_job_in_bf16(model, tmp_path, capsys):
    def made(folder: str, precision: str, seed: int = 0) -> tuple[pathlib.Path, np.ndarray, torch.Tensor]:
        words = ["sample", "--model", model, "--device", "cpu", "--output", tmp_path / folder, "--num-images", 12,
                 "--npz", "--save-bits", "--sample-steps", 4, "--cfg-scale", 2, "--batch-size", 4, "--seed", seed,
                 "--mixed-precision", precision]  # fmt: skip
        main(list(map(str, words)))
        path = pathlib.Path(json.loads(capsys.readouterr().out.splitlines()[-1])["result"])
        with np.load(path) as images, np.load(path.with_name(path.stem + "-bits.npz")) as bits:
            return path, images["arr_0"], unpack(torch.from_numpy(bits["arr_0"]))

    path, pixels, tokens = made("first", "bf16")
    again = made("again", "bf16")[0]
    assert "-bf16-" in path.name and path.name == again.name and path.read_bytes() == again.read_bytes()
    assert pixels.shape == (12, 16, 16, 3) and pixels.dtype == np.uint8
    # Bits that rounding flips change what follows, but most stay as they are; of another seed 0.7 are equal.
    name, _, exact = made("exact", "none")
    assert "-fp32-" in name.name and 0.85 < float((tokens == exact).float().mean()) < 1
    assert float((made("other", "none", seed=1)[2] == exact).float().mean()) < 0.8
    # The same bits, decoded in float32, are the same pictures but for rounding.
    autoencoder = weights_file.load_autoencoder(model.parent / "autoencoder.safetensors")
    difference = np.abs(decode_tokens(weights_file.load_model(model), autoencoder, tokens).numpy().astype(int) - pixels)
    assert 0 < difference.mean() < 2


def test_random_labels():
    labels = make_labels("random", 30_000, 10, seed=4)
    assert labels.min() == 0 and labels.max() == 9
    assert np.abs(np.bincount(labels) - 3000).max() < 300 and len(set(np.bincount(labels))) > 5
    assert not np.array_equal(labels, make_labels("random", 30_000, 10, seed=5))
    assert np.array_equal(labels[:10], make_labels("random", 10, 10, seed=4))
    assert np.array_equal(make_labels("balanced", 30, 10, 4), balanced_labels(30, 10, 4))


@pytest.mark.parametrize("script", ["bitdance sample", "sample_ddp.py"])
def test_what_the_file_held_is_free_when_a_job_begins(model, tmp_path, monkeypatch, script):
    """A file of both weights and the autoencoder is three times what the job needs."""
    module = "bitdance.cli.sample" if script == "bitdance sample" else "bitdance.cli.original_cli"
    held, jobs = [], []

    def load(*arguments):
        made = load_pair(*arguments)
        held.append(weakref.ref(made[-1]))
        return made

    monkeypatch.setattr(f"{module}.load_pair", load)
    monkeypatch.setattr(f"{module}.run_job", lambda *_, **facts: jobs.append((held[0](), facts["stem"])))
    if script == "bitdance sample":
        main(["sample", "--model", str(model), "--output", str(tmp_path), "--num-images", "1", "--device", "cpu"])
    else:
        original_cli.sample(["--ckpt", str(model), "--sample-dir", str(tmp_path)])
    assert jobs == [(None, "model-model")]


def test_the_command_makes_the_same_job_as_the_launcher(model, tmp_path, capsys):
    common = ["--sample-steps", 3, "--cfg-scale", 2, "--seed", 5, "--mixed-precision", "none"]
    words = ["sample", "--model", model, "--device", "cpu", "--output", tmp_path / "a", "--num-images", 7, "--npz",
             "--batch-size", 3, *common]  # fmt: skip
    main(list(map(str, words)))
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["images"] == facts["made"] == 7
    original_cli.sample(list(map(str, ["--ckpt", model, "--sample-dir", tmp_path / "b", "--num-fid-samples", 7,
                                   "--per-proc-batch-size", 3, "--to-npz", *common])))  # fmt: skip
    (ours,), (theirs,) = (list((tmp_path / folder).glob("*.npz")) for folder in "ab")
    assert str(ours) == facts["result"] and ours.read_bytes() == theirs.read_bytes()
    assert ours.name == theirs.name
    for wrong in (["--npz"], ["--save-bits"], ["dog", "--num-images", "3"]):
        with pytest.raises(SystemExit):
            main(["sample", "--model", str(model), *wrong])
        assert "--num-images" in capsys.readouterr().err


def listing(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".log")


def share(plan: job.Job, generator: Generator, rank: int, size: int) -> None:
    """What one of several processes does up to the point where all wait for each other."""
    plan.folder.mkdir(exist_ok=True)
    run_folder.claim(plan.folder / job.MANIFEST, job._manifest(plan, Alone(0, size, CPU)), Alone(0, size, CPU))
    labels = balanced_labels(plan.num_images, generator.model.config.num_classes, generator.seed)
    batches = list(cut(plan.num_images, plan.batch_size))
    missing = list(range(len(batches)))
    job._make_batches(plan, plan.missing, generator, Alone(rank, size, CPU), batches, missing, labels, print)


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_makes_the_same_npz(generator, tmp_path, size):
    one = run(job.Job(tmp_path / "one", 8, 3, ("npz",), SETTINGS), generator)
    plan = job.Job(tmp_path / "many", 8, 3, ("npz",), SETTINGS)
    for rank in range(size):
        share(plan, generator, rank, size)
        assert plan.missing and len(list(plan.folder.glob("*.npz"))) == {2: [2, 3], 3: [1, 2, 3]}[size][rank]
    assert run(plan, generator).read_bytes() == one.read_bytes()
    assert not plan.folder.exists()


def test_a_job_of_other_settings_is_refused_with_the_differences(generator, tmp_path):
    plan = job.Job(tmp_path / "made", 4, 2, ("npz",), SETTINGS)
    share(plan, generator, 1, 2)
    for changed, said in (
        (dataclasses.replace(plan, settings={"seed": 2}), "seed was 1, is 2"),
        (dataclasses.replace(plan, batch_size=4), "batch_size was 2, is 4"),
        (dataclasses.replace(plan, settings={}), "seed was 1, is None"),
    ):
        with pytest.raises(UserError, match=said):
            job.run(changed, generator, World(0, 1, CPU))
    (plan.folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest.json cannot be read .* delete"):
        job.run(plan, generator, World(0, 1, CPU))
    assert plan.missing


def test_a_finished_job_of_other_settings_is_refused_with_the_differences(generator, tmp_path):
    plan = job.Job(tmp_path / "made", 4, 2, ("npz", "bits"), SETTINGS)
    job.run(plan, generator, World(0, 1, CPU))
    before = plan.results["npz"].read_bytes()
    for changed, said in (
        (dataclasses.replace(plan, settings={"seed": 2}), "seed was 1, is 2"),
        (dataclasses.replace(plan, batch_size=4), "batch_size was 2, is 4"),
    ):
        with pytest.raises(UserError, match=rf"made\.npz, .*made-bits\.npz: made with other settings \({said}\)"):
            job.run(changed, generator, World(0, 1, CPU))
    assert job.run(dataclasses.replace(plan, kinds=("npz",)), generator, World(0, 1, CPU)).made == 0
    for broken in ("{", "[1]"):
        plan.record.write_text(broken)
        with pytest.raises(UserError, match=r"made\.json cannot be read"):
            job.run(plan, generator, World(0, 1, CPU))
    plan.record.unlink()
    assert job.run(plan, generator, World(0, 1, CPU)).made == 0
    assert plan.results["npz"].read_bytes() == before


def test_what_is_asked_for_later_is_made_of_the_same_images(generator, tmp_path, capsys):
    plan = job.Job(tmp_path / "made", 4, 2, ("npz",), SETTINGS)
    before = run(plan, generator).read_bytes()
    both, whole = dataclasses.replace(plan, kinds=("npz", "bits")), tmp_path / "whole" / "made"
    assert job.run(both, generator, World(0, 1, CPU)).made == 4
    assert "made.npz: there already, all images are made again for the rest." in capsys.readouterr().err
    run(dataclasses.replace(both, path=whole), generator)
    assert both.results["bits"].read_bytes() == whole.with_name("made-bits.npz").read_bytes()
    assert both.results["npz"].read_bytes() == before


def test_batches_made_in_halves_are_recorded(generator, tmp_path, monkeypatch):
    made = Generator._images

    def small_memory(self, numbers, labels, progress):
        if len(numbers) > 2 and numbers[0] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made(self, numbers, labels, progress)

    monkeypatch.setattr(Generator, "_images", small_memory)
    plan = job.Job(tmp_path / "made", 8, 3, ("npz",), SETTINGS)
    job.run(plan, generator, World(0, 1, CPU))
    assert json.loads(plan.record.read_text())["made in halves"] == [1]
    assert "3 to 5 are made in two halves" in (tmp_path / "made.rank0.log").read_text()


def test_a_second_run_of_a_job_is_kept_out(generator, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "PATIENCE", 0.2)
    plan = job.Job(tmp_path / "made", 4, 2, ("npz",), SETTINGS)
    with (
        run_folder.alone(plan.folder, plan.lock, World(0, 1, CPU)),
        pytest.raises(UserError, match="another process works on"),
    ):
        job.run(plan, generator, World(0, 1, CPU))
    assert run(plan, generator).exists()


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "another", "not a zip"])
def test_a_damaged_part_is_made_again(generator, tmp_path, damage):
    expected = run(job.Job(tmp_path / "expected", 4, 2, ("npz",), SETTINGS), generator)
    plan = job.Job(tmp_path / "made", 4, 2, ("npz",), SETTINGS)
    share(plan, generator, 1, 2)
    data = bytearray(plan.part(1).read_bytes())
    if damage == "torn":
        data = data[:-100]
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
    elif damage == "empty":
        data = bytearray()
    elif damage == "not a zip":
        data = bytearray(b"\x93NUMPY" * 100)
    plan.part(1).write_bytes(data)
    if damage == "another":
        np.savez(plan.part(1), images=np.zeros((1, 16, 16, 3), np.uint8))
    assert run(plan, generator).read_bytes() == expected.read_bytes()


def test_a_part_that_is_damaged_at_the_last_moment_is_removed_and_said(generator, tmp_path, monkeypatch):
    plan = job.Job(tmp_path / "made", 4, 2, ("npz",), SETTINGS)
    made = job._make_batches

    def then_damage(*arguments):
        count = made(*arguments)
        plan.part(1).write_bytes(b"")
        return count

    monkeypatch.setattr(job, "_make_batches", then_damage)
    with pytest.raises(UserError, match=r"000001\.npz was damaged or lost: run the command again"):
        job.run(plan, generator, World(0, 1, CPU))
    assert plan.missing and plan.part(0).exists() and not plan.part(1).exists()


def test_a_job_writes_a_folder_of_pngs(generator, tmp_path, monkeypatch):
    path = run(job.Job(tmp_path / "made", 4, 3, ("pngs",), SETTINGS), generator)
    assert sorted(p.name for p in path.iterdir()) == [*(f"{i:06d}.png" for i in range(4)), "labels.json"]
    job.run(job.Job(tmp_path / "made", 4, 3, ("npz",), SETTINGS), generator, World(0, 1, CPU))
    with np.load(tmp_path / "made.npz") as file:
        assert json.loads((path / "labels.json").read_text()) == file["arr_1"].tolist()
        for i, pixels in enumerate(file["arr_0"]):
            assert np.array_equal(np.asarray(Image.open(path / f"{i:06d}.png")), pixels)
    assert listing(tmp_path) == ["made", "made.json", "made.npz"]
    # A finished folder is not made again.
    monkeypatch.setattr(type(generator), "images", lambda *_: pytest.fail("images were made again"))
    assert run(job.Job(tmp_path / "made", 4, 3, ("pngs",), SETTINGS), generator) == path


# ------------------------------------------------------------ figures


def pattern(seed: int, height: int, width: int, noise: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture and a noisy copy, by whole numbers alone."""
    y, x = np.mgrid[:height, :width]
    a = np.stack([(x * 7 + y * 3 + seed * 40) % 256, (x * y + seed) % 256, (y * 11 - x * 5) % 256], -1).astype(np.uint8)
    error = (x * 13 + y * 29 + seed) % (2 * noise + 1) - noise
    return a, np.clip(a.astype(int) + error[..., None], 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("arguments", "expected_psnr", "expected_ssim"),
    [
        # scikit-image 0.26: peak_signal_noise_ratio(a, b, data_range=255) and structural_similarity(a, b,
        # gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=2)
        ((0, 16, 16, 8), 34.50934756749501, 0.9569102862214249),
        ((1, 24, 20, 40), 21.087480915829175, 0.5697212041609104),
        ((2, 32, 32, 3), 42.18434637942272, 0.9956439352820569),
    ],
)
def test_psnr_and_ssim_are_those_of_scikit_image(arguments, expected_psnr, expected_ssim):
    a, b = (torch.from_numpy(picture)[None] for picture in pattern(*arguments))
    assert psnr(a, b).tolist() == pytest.approx([expected_psnr], abs=1e-9)
    assert ssim(a, b).tolist() == pytest.approx([expected_ssim], abs=1e-9)


def test_psnr_and_ssim_are_figures_of_each_pair():
    first, second = pattern(0, 16, 16, 8), pattern(5, 16, 16, 20)
    a, b = (torch.from_numpy(np.stack(part)) for part in zip(first, second, strict=True))
    for figure in (psnr, ssim):
        together = figure(a, b)
        assert together.shape == (2,) and together[0] > together[1]
        assert together.tolist() == pytest.approx([figure(a[i : i + 1], b[i : i + 1]).item() for i in range(2)])
    assert psnr(a, a).isinf().all() and ssim(a, a).tolist() == pytest.approx([1, 1])


def test_nearest_finds_a_mirrored_copy():
    rng = np.random.default_rng(0)
    references = rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    queries = rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    queries[0] = references[17]
    queries[1] = references[33][:, ::-1]
    seen: list[int] = []
    distance, index, mirrored = find_nearest(queries, references, seen.append)
    assert distance[:2].max() < 0.1 and index[:2].tolist() == [17, 33] and mirrored[:2].tolist() == [False, True]
    assert sum(seen) == 40
    both = np.stack([references, references[:, :, ::-1]]).astype(float)
    brute = np.sqrt(((both - queries[2]) ** 2).mean(axis=(2, 3, 4)))
    assert distance[2] == pytest.approx(brute.min(), abs=1e-3)
    assert brute[int(mirrored[2]), index[2]] == brute.min()


def test_nearest_looks_at_all_blocks(monkeypatch):
    monkeypatch.setattr("bitdance.metrics.nearest_neighbours.BLOCK", 7)
    references = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)
    distance, index, mirrored = find_nearest(references[::-1], references)
    assert index.tolist() == list(range(39, -1, -1)) and not mirrored.any() and distance.max() < 0.1


def test_the_command_nearest(model, tmp_path, capsys):
    folder = sample(model, tmp_path / "out", "--per-class", 2)
    data = small.pictures(tmp_path / "data")
    Image.fromarray(images(folder)[3][:, ::-1]).save(data / "class-1" / "planted.png")
    held_out = small.pictures(tmp_path / "held-out", each=2)
    capsys.readouterr()
    fixed = ["--held-out", held_out, "--output", tmp_path / "near", "--shown", 2]
    main(["nearest", *map(str, [folder, data, *fixed])])
    figures = json.loads((tmp_path / "near" / "nearest.json").read_text())
    assert figures["images"] == 6 and figures["training_images"] == 13
    assert figures["minimum"] < 0.1 < figures["median"]
    assert figures["held_out"]["mean"] < 0.1  # these pictures are among the training images
    with Image.open(tmp_path / "near" / "nearest.png") as sheet:
        assert sheet.height == 2 * 98 + 2
    assert "generated images minimum 0.0" in capsys.readouterr().out


def test_the_command_reconstruct(model, tmp_path, capsys):
    data = small.pictures(tmp_path / "data", each=3)
    autoencoder = model.with_name("autoencoder.safetensors")
    arguments = [str(data), "--autoencoder", str(autoencoder), "--device", "cpu", "--batch-size", "4"]
    main(["reconstruct", *arguments, "--output", str(tmp_path / "all"), "--shown", "5"])
    figures = json.loads((tmp_path / "all" / "reconstruction.json").read_text())
    assert (figures["images"], figures["image_size"]) == (9, 16)
    paths = sorted(data.rglob("*.png"))
    original = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths]))
    network = weights_file.load_autoencoder(autoencoder)
    x = original.permute(0, 3, 1, 2).float() / 127.5 - 1
    decoded = (127.5 * network.decode(network.encode(x)) + 128).clamp(0, 255).byte().permute(0, 2, 3, 1)
    assert figures["psnr"] == pytest.approx(psnr(original, decoded).mean().item(), abs=0.05)
    assert figures["ssim"] == pytest.approx(ssim(original, decoded).mean().item(), abs=0.005)
    assert f"PSNR {figures['psnr']:.2f} dB" in capsys.readouterr().out
    with Image.open(tmp_path / "all" / "reconstruction.png") as sheet:
        assert sheet.height == 2 * 98 + 2 and sheet.width > 5 * 98
    main(["reconstruct", *arguments, "--output", str(tmp_path / "few"), "--limit", "2", "--image-size", "12"])
    few = json.loads((tmp_path / "few" / "reconstruction.json").read_text())
    assert (few["images"], few["image_size"]) == (2, 12)


def test_the_command_convert(model, tmp_path, capsys):
    target = tmp_path / "small.safetensors"
    main(["convert", str(model), str(target), "--dtype", "bfloat16"])
    assert capsys.readouterr().out.startswith("model in bfloat16, ")
    original, converted = weights_file.load_model(model), weights_file.load_model(target)
    assert converted.config == original.config
    for name, value in original.state_dict().items():
        assert torch.equal(converted.state_dict()[name], value.bfloat16().float())
    assert target.stat().st_size < 0.6 * model.stat().st_size


def test_convert_goes_both_ways_bit_for_bit(tmp_path):
    """Ours -> released layout -> ours: the same tensors, and nothing that shapes cannot tell is lost."""
    names = ("cat", "dog", "sea lion")
    settings = {"parallel_num": 4, "token_order": "standard", "time_shift": 2.0, "class_names": names}
    small.save_pair(tmp_path, **settings)
    model, autoencoder = tmp_path / "model.safetensors", tmp_path / "autoencoder.safetensors"
    for words in (
        ["convert", model, tmp_path / "all.pt", "--autoencoder", autoencoder],
        ["convert", tmp_path / "all.pt", tmp_path / "model2.safetensors"],
        ["convert", tmp_path / "all.pt", tmp_path / "autoencoder2.safetensors", "--part", "autoencoder"],
        ["convert", autoencoder, tmp_path / "autoencoder.pt"],
    ):
        main(list(map(str, words)))
    for name in ("model", "autoencoder"):
        first, second = (weights_file.read(tmp_path / f"{name}{i}.safetensors") for i in ("", "2"))
        assert first.metadata["digest"] == second.metadata["digest"]
    config = weights_file.load_model(tmp_path / "all.pt").config
    assert config == weights_file.load_model(tmp_path / "model.safetensors").config
    assert {key: getattr(config, key) for key in settings} == settings
    released = torch.load(tmp_path / "all.pt", weights_only=False)
    assert set(released) == {"model", "args"}
    assert any(key.startswith("vae.decoder.") for key in released["model"])
    assert torch.load(tmp_path / "autoencoder.pt", weights_only=True).keys() == {"state_dict"}


@pytest.mark.parametrize("averaged", [True, False])
def test_convert_takes_an_autoencoder_out_of_its_training(tmp_path, capsys, averaged):
    data = small.pictures(tmp_path / "data")
    ema = 0.9 if averaged else 0.0
    run = TrainConfig(data, tmp_path / "run", 16, max_steps=1, global_batch_size=4, num_workers=1, ema=ema)
    finished = train_autoencoder(run, small.NETWORK, AutoencoderLossConfig(), "cpu")
    main(
        [
            "convert",
            str(next((tmp_path / "run").glob("checkpoint-*.safetensors"))),
            str(tmp_path / "converted.safetensors"),
        ]
    )
    assert capsys.readouterr().out.splitlines()[-1].startswith("autoencoder in float32, ")
    a, b = (weights_file.load_autoencoder(path).state_dict() for path in (finished, tmp_path / "converted.safetensors"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
