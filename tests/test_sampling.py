"""`bitdance sample`, the job behind the figures, and what looks at files: reconstruct, nearest, convert."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import pathlib
import pickle
import re

import numpy as np
import pytest
import small
import torch
from PIL import Image

import bitdance
from bitdance.cli import original_cli
from bitdance.cli.main import main
from bitdance.config import RELEASED_MODELS
from bitdance.data.class_names import ClassNames
from bitdance.metrics.nearest_neighbours import find_nearest
from bitdance.metrics.psnr_ssim import psnr, ssim
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.quantizer import unpack
from bitdance.runtime.atomic_files import NEW
from bitdance.runtime.errors import UserError
from bitdance.runtime.memory_tracker import MemoryTracker
from bitdance.runtime.progress import ProgressLines
from bitdance.sampling import pipeline as pipeline_module
from bitdance.sampling import sampler
from bitdance.sampling.labels import make_labels
from bitdance.sampling.memory import estimate_memory
from bitdance.sampling.pipeline import Pipeline, load_pipeline, split_batches
from bitdance.sampling.sampler import CompiledFunctions, SamplingConfig
from bitdance.sampling.writers import list_entries, write_npz
from bitdance.training.setup import train_autoencoder
from bitdance.training.train_config import AutoencoderLossConfig, TrainConfig
from bitdance.weights import safetensors_files, weights_file

NAMES = ("cat", "dog", "sea lion")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> pathlib.Path:
    """A file of a tiny model with 4 steps of 4 tokens, its autoencoder beside it."""
    return small.save_pair(tmp_path_factory.mktemp("pair"), class_names=NAMES, parallel_num=4)


def sample(model: pathlib.Path, folder: pathlib.Path, *arguments: object) -> pathlib.Path:
    fixed = ["--model", model, "--output", folder, "--num-steps", 4, "--cfg-scale", 3, "--device", "cpu",
             "--precision", "fp32"]  # fmt: skip
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
    assert err == ""  # no bar where there is no terminal
    assert sorted(path.name for path in folder.iterdir()) == [
        "0000-cat.png", "0001-cat.png", "0002-dog.png", "0003-dog.png", "0004-sea-lion.png", "0005-sea-lion.png",
        "grid.png", "samples.json",
    ]  # fmt: skip
    assert images(folder).shape == (6, 16, 16, 3)
    assert len({picture.tobytes() for picture in images(folder)}) == 6
    record = json.loads((folder / "samples.json").read_text())
    assert record["images"][4] == {"file": "0004-sea-lion.png", "class": 2, "name": "sea lion", "number": 4}
    assert (record["seed"], record["cfg_scale"], record["num_steps"]) == (0, 3.0, 4)
    text = json.loads(Image.open(folder / "0004-sea-lion.png").text["bitdance"])
    known = {"class": 2, "name": "sea lion", "number": 4, "seed": 0, "cfg_scale": 3.0, "num_steps": 4}
    assert text.items() >= {**known, "solver": "dpmpp-2m-sde", "version": bitdance.__version__}.items()
    assert text["model"] == f"{model.parent.name}-model", "the folder, without its path"
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
    others = {"class": ["dog"], "cfg": ["cat", "--cfg-schedule", "constant"], "share": ["cat", "--no-share-first"]}
    for name, changes in others.items():
        changed = images(sample(model, tmp_path / name, *changes, "--per-class", 2))
        assert not alike(whole[:2], changed), name


def test_classes_by_id_and_name(model, tmp_path):
    folder = sample(model, tmp_path / "out", "sea_lion", "0", "Dog,0", "--per-class", 1)
    assert labels(folder) == [2, 0, 1, 0]
    assert labels(sample(model, folder, "all", "--per-class", 1)) == [0, 1, 2]


def test_many_classes_without_names(tmp_path):
    """1000 nameless classes are ImageNet's: by default the first twenty, and two of them are cranes."""
    model = small.save_pair(tmp_path, num_classes=1000, parallel_num=4)
    folder = sample(model, tmp_path / "out", "--per-class", 1)
    assert labels(folder) == list(range(20))
    assert (folder / "0000-tench.png").exists()
    assert labels(sample(model, folder, "golden retriever", "n02099601", "--per-class", 1)) == [207, 207]


def test_an_earlier_call_leaves_nothing_and_foreign_files_stay(model, tmp_path):
    folder = sample(model, tmp_path / "out", "--per-class", 2)
    (folder / "holiday.png").write_bytes(b"mine")
    (folder / "0007-cat.png").write_bytes(b"mine too")
    (folder / f"{NEW}of-a-killed-process").mkdir()
    sample(model, folder, "dog", "--per-class", 1)
    assert sorted(path.name for path in folder.iterdir()) == [
        "0000-dog.png", "0007-cat.png", "grid.png", "holiday.png", "samples.json",
    ]  # fmt: skip
    assert (folder / "holiday.png").read_bytes() == b"mine"


def test_whatever_the_record_of_an_earlier_call_says_it_does_not_stand_in_the_way(model, tmp_path):
    """Nor can it make the command remove files elsewhere."""
    folder, victim = tmp_path / "out", tmp_path / "victim.png"
    (folder / "inner").mkdir(parents=True)
    victim.write_bytes(b"mine")
    (folder / "mine.txt").write_text("mine")
    names = ["inner", 3, "x" * 300, "", "../victim.png", str(victim), "mine.txt"]
    (folder / "samples.json").write_text(json.dumps({"images": [{"file": name} for name in names]}))
    sample(model, folder, "dog", "--per-class", 1)
    assert (folder / "0000-dog.png").exists() and (folder / "inner").is_dir()
    assert victim.read_bytes() == b"mine" and (folder / "mine.txt").exists()


def test_a_call_that_fails_leaves_the_images_of_an_earlier_one(model, tmp_path):
    folder = sample(model, tmp_path / "out", "cat", "--per-class", 1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for wrong in (["bird"], ["cat", "--per-class", 0], ["cat", "--seed", -1], ["cat", "--batch-size", 0]):
        with pytest.raises(SystemExit):
            sample(model, folder, *wrong)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["grid.png", "0000-dog.png", "samples.json"])
def test_files_of_others_are_not_overwritten(model, tmp_path, refused, monkeypatch, name):
    monkeypatch.setattr(Pipeline, "__call__", lambda *_, **__: pytest.fail("found only after sampling"))
    (tmp_path / name).write_bytes(b"[" * 100_000)
    message = refused(sample, model, tmp_path, "dog")
    assert f"{tmp_path / name} is not of an earlier sampling: move it, or choose another --output." in message
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_in_place_of_a_file_is_found_before_sampling(model, tmp_path, refused, monkeypatch):
    before = sorted(path.name for path in sample(model, tmp_path / "out", "dog", "--per-class", 1).iterdir())
    (tmp_path / "out" / "grid.png").unlink()
    (tmp_path / "out" / "grid.png").mkdir()
    monkeypatch.setattr(Pipeline, "__call__", lambda *_, **__: pytest.fail("found only after sampling"))
    assert "grid.png is not of an earlier sampling" in refused(sample, model, tmp_path / "out", "dog")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


def test_a_read_only_folder_is_found_before_sampling(model, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # root may write anywhere
    monkeypatch.setattr(Pipeline, "__call__", lambda *_, **__: pytest.fail("found only after sampling"))
    assert f"{tmp_path} cannot be written; choose another place" in refused(sample, model, tmp_path, "dog")


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """The sizes that functions which only seem to be compiled decode; tests/test_model.py compiles them."""
    sizes: list[int] = []

    def keep(function, **settings):
        is_decoder = function is sampler.decode_pixels
        return lambda *arguments: (is_decoder and sizes.append(len(arguments[1]))) or function(*arguments)

    monkeypatch.setattr(torch, "compile", keep)
    return sizes


def test_compiled_batches_are_padded_to_sizes_that_are_known(model, decoded):
    pipe = load_pipeline(model, device="cpu", dtype=torch.float32)
    config, steps = pipe.sampling_config(2.0, 3), []
    expected = pipe.generate([5, 6, 7], [0, 1, 2], config, seed=1)
    pipe.compile("default")
    pipe.generate(range(5), [0] * 5, config)
    found = pipe.generate([5, 6, 7], [0, 1, 2], config, 1, callback=lambda i, n, tokens: steps.append(tokens.shape))
    assert pipe.functions.sizes == {5}
    assert np.array_equal(found.bits, expected.bits) and np.abs(found.pixels.astype(int) - expected.pixels).max() <= 1
    assert len(steps) == 4 and all(shape[0] == 3 for shape in steps)
    pipe.generate([0], [0], config)
    assert pipe.functions.sizes == {1, 5}, "five times as many rows are not worth it"


def test_compiled_chunks_are_padded(model, decoded):
    pipe = load_pipeline(model, device="cpu", dtype=torch.float32)
    bits = torch.randint(0, 2, (7, 16, pipe.model.config.bits)) * 2.0 - 1
    expected = pipe.decode_tokens(bits)
    pipe.functions = CompiledFunctions(pipe.model)
    for chunk_size, sizes in ((5, [5, 2]), (4, [5, 5]), (0, [7]), (20, [7]), (3, [5, 5, 2])):
        decoded.clear()
        pixels = pipe.decode_tokens(bits, chunk_size)
        assert pixels.shape == expected.shape and (pixels.int() - expected.int()).abs().max() <= 1
        assert decoded == sizes, "a chunk of less than half of the size has its own graph"
    decoded.clear()
    pipe.decode(torch.ones(3, pipe.autoencoder.config.bits, 2, 2))
    assert decoded == [], "it is not compiled"


def test_without_a_compiler_everything_runs_uncompiled(model, capsys):
    pipe = load_pipeline(model, device="cpu")
    bits = torch.ones(2, 16, pipe.model.config.bits)
    for call in (
        lambda: pipe.decode_tokens(bits).numpy(),
        lambda: pipe.generate([3], [1], pipe.sampling_config(2.0, 3)).bits,
    ):
        expected = call()
        torch._dynamo.reset()
        pipe.functions = CompiledFunctions(pipe.model, backend=fail_to_compile)
        assert np.array_equal(call(), expected)
        assert "runs uncompiled" in capsys.readouterr().err and pipe.functions is None


def test_only_jobs_on_a_gpu_are_compiled_by_default(model, tmp_path, monkeypatch):
    modes = []
    monkeypatch.setattr(pipeline_module, "CompiledFunctions", lambda model, mode: modes.append(mode))
    monkeypatch.setattr(pipeline_module, "find_compiler_problem", lambda device: None)
    pipe = load_pipeline(model, device="cpu")
    pipe.compile()
    assert modes == []
    monkeypatch.setattr(Pipeline, "device", torch.device("cuda", 0))
    pipe.compile()
    pipe.compile("default")
    assert modes == ["reduce-overhead", "default"]
    monkeypatch.undo()
    called = []
    monkeypatch.setattr(Pipeline, "compile", lambda self, mode="auto": called.append(mode))
    sample(model, tmp_path / "a", "--per-class", 1)
    assert called == []
    sample(model, tmp_path / "b", "--num-images", 1)
    sample(model, tmp_path / "c", "--num-images", 1, "--compile", "no")
    sample(model, tmp_path / "d", "--per-class", 1, "--compile", "default")
    assert called == ["auto", "default"]


def test_a_compiled_batch_that_does_not_fit_is_not_padded_to_the_size_that_failed(model, monkeypatch, decoded):
    pipe, tried = load_pipeline(model, device="cpu"), []
    pipe.functions = CompiledFunctions(pipe.model)
    pipe.functions.sizes.add(2)  # as if it had fitted before
    small.limit_memory(monkeypatch, lambda ids: tried.append(len(ids)) or len(ids) > 1)
    batch = pipe.generate([4, 5], [0, 1], pipe.sampling_config(2.0, 2), report=lambda line: None)
    assert tried == [2, 1, 1] and batch.halved
    assert pipe.functions is not None and pipe.functions.sizes == {1}


def test_a_lack_of_memory_of_the_compiler_is_not_taken_for_a_missing_one(model, monkeypatch, decoded):
    error = torch._dynamo.exc.BackendCompilerFailed(print, RuntimeError("CUDA out of memory"), None)
    pipe = load_pipeline(model, device="cpu")
    pipe.functions = CompiledFunctions(pipe.model)
    real = pipeline_module.sample_tokens

    def fail(network, labels, *arguments):
        if len(labels) > 1:
            raise error
        return real(network, labels, *arguments)

    monkeypatch.setattr(pipeline_module, "sample_tokens", fail)
    assert pipe.generate([4, 5], [0, 1], pipe.sampling_config(2.0, 2), report=lambda line: None).halved
    assert pipe.functions is not None


def test_a_job_is_not_a_mixture_of_compiled_and_uncompiled_batches(model, tmp_path, monkeypatch, capsys):
    """Their images differ in bf16, and the settings say which they are."""
    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail_to_compile)
    folder = tmp_path / "a"
    sample(model, folder, "--num-images", 2, "--npz", "--compile", "default", "--num-steps", 2)
    assert "runs uncompiled (no C++ compiler): install" in capsys.readouterr().err
    assert json.loads(next(folder.glob("*.json")).read_text())["networks"]["compiled"] is False
    monkeypatch.undo()
    monkeypatch.setattr(pipeline_module, "find_compiler_problem", lambda device: None)
    monkeypatch.setattr(CompiledFunctions.__init__, "__defaults__", ("default", fail_to_compile))
    torch._dynamo.reset()
    with pytest.raises(SystemExit):
        sample(model, tmp_path / "b", "--num-images", 2, "--npz", "--compile", "default", "--num-steps", 2)
    error = capsys.readouterr().err
    assert "compiling failed in a job that is sampled by compiled functions: remove" in error
    assert "and sample with `bitdance sample --compile no`." in error
    assert not list((tmp_path / "b").glob("*.npz"))


def fail_to_compile(*arguments):
    raise RuntimeError("no C++ compiler")


def test_progress_counts_a_halved_batch_once(model, tmp_path, monkeypatch):
    counts = []
    monkeypatch.setattr(ProgressLines, "update", lambda bar, n: (setattr(bar, "n", bar.n + n), counts.append(bar.n)))
    real = sampler.sample_tokens

    def limited(network, labels, noise_fn, config, callback=None, functions=None, known=None):
        def stop(step, steps, tokens):
            callback(step, steps, tokens)
            if len(labels) > 2 and step == 2:
                raise torch.OutOfMemoryError

        return real(network, labels, noise_fn, config, stop, functions)

    monkeypatch.setattr(pipeline_module, "sample_tokens", limited)
    sample(model, tmp_path / "out", "--per-class", 1)
    assert counts == [3, 6, *range(1, 5), *(4 + 2 * step for step in range(1, 5))]


def test_guidance_and_steps_are_published_ones_for_a_released_file(model, tmp_path):
    released = tmp_path / "BitDance_B_16X.pt"  # what it holds does not matter here
    released.write_bytes(model.read_bytes())
    (tmp_path / "autoencoder.safetensors").write_bytes(model.with_name("autoencoder.safetensors").read_bytes())
    folder = tmp_path / "out"
    main(["sample", "cat", "--per-class", "1", "--model", str(released), "--output", str(folder), "--device", "cpu"])
    record = json.loads((folder / "samples.json").read_text())
    assert (record["cfg_scale"], record["num_steps"]) == (6.1, 100)


def test_raw_weights_on_request(tmp_path):
    """A run's checkpoint holds both; `--weights model` samples the raw ones."""
    raw, averaged = small.model(seed=1), small.model(seed=2)
    tensors = {f"model/{name}": value for name, value in raw.state_dict().items()}
    tensors |= {f"ema/{name}": value for name, value in averaged.state_dict().items()}
    config = {"model": dataclasses.asdict(raw.config)}
    safetensors_files.save_tensors(tmp_path / "checkpoint.safetensors", tensors, "training", config, network="model")
    weights_file.save(tmp_path / "raw.safetensors", raw)
    weights_file.save(tmp_path / "averaged.safetensors", averaged)
    weights_file.save(tmp_path / "autoencoder.safetensors", small.autoencoder())

    def made(name: str, *arguments: str) -> np.ndarray:
        folder = tmp_path / f"{name}{len(arguments)}"
        return images(sample(tmp_path / f"{name}.safetensors", folder, "0", "--per-class", 1, *arguments))

    assert np.array_equal(made("checkpoint"), made("averaged"))
    assert np.array_equal(made("checkpoint", "--weights", "model"), made("raw"))


# ------------------------------------------------------------ the pipeline


def test_the_pipeline_gives_what_the_command_writes(model, tmp_path):
    written = images(sample(model, tmp_path / "out", "dog", "cat", "--per-class", 1, "--seed", 5))
    pipe, calls = load_pipeline(model, device="cpu", dtype="fp32"), []
    settings = {"seed": 5, "cfg_scale": 3.0, "num_steps": 4}
    found = pipe(["dog", 0], **settings, callback=lambda *call: calls.append(call))
    assert [image.size for image in found] == [(16, 16)] * 2
    assert np.array_equal(np.stack([np.asarray(image) for image in found]), written)
    assert [call[:2] for call in calls] == [(step, 4) for step in range(1, 5)]
    assert calls[2][2].shape == (2, 12, 8) and set(calls[2][2].unique().tolist()) == {-1.0, 1.0}
    assert np.array_equal(pipe(["dog", 0], **settings, output="np"), written)
    tensor = pipe(["dog", 0], **settings, output="pt")
    assert tensor.dtype == torch.uint8 and np.array_equal(tensor.numpy(), written)
    assert alike(np.concatenate([pipe("dog", **settings, output="np"), written[1:]]), written)
    assert alike(pipe(["dog", 0], **settings, output="np", batch_size=1, chunk_size=1), written)


def test_the_pipeline_encodes_and_decodes(model, tmp_path):
    pipe = load_pipeline(model, device="cpu")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    bits = pipe.encode([Image.fromarray(image) for image in pixels])
    assert bits.shape == (2, 8, 4, 4) and set(bits.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(bits, pipe.encode(pixels)) and torch.equal(bits, pipe.encode(torch.from_numpy(pixels)))
    assert torch.equal(bits[:1], pipe.encode(Image.fromarray(pixels[0])))
    assert torch.equal(bits[:1], pipe.encode(pixels[0]))
    large = Image.fromarray(rng.integers(0, 256, (50, 40, 3), dtype=np.uint8))
    assert pipe.encode(large.convert("L")).shape == (1, 8, 4, 4)
    decoded = pipe.decode(bits, output="np")
    assert decoded.shape == (2, 16, 16, 3) and np.array_equal(np.asarray(pipe.decode(bits)[1]), decoded[1])
    with pytest.raises(ValueError, match="uint8"):
        pipe.encode(np.zeros((2, 16, 16, 3)))


def test_settings_of_the_pipeline_are_checked(model):
    pipe = load_pipeline(model, device="cpu", dtype="fp32")
    assert len(pipe.classes) == 3 and pipe.classes.label(2) == "sea lion"
    for classes, settings, words in (
        ("bird", {}, "no class 'bird'"),
        (3, {}, "class 3 does not exist"),
        ("cat", {"seed": -1}, "seed=-1"),
        ("cat", {"num_steps": 0}, "num_steps=0"),
        ("cat", {"batch_size": 0}, "batch_size=0"),
        ("cat", {"chunk_size": -1}, "chunk_size=-1"),
        ("cat", {"solver": "x"}, "solver='x'"),
        ("cat", {"output": "jpeg"}, "output='jpeg'"),
        ("cat", {"callback": 3}, "callback=3 is no function"),
        ("cat", {"batch_size": 2.5}, "batch_size=2.5"),
        ("cat", {"chunk_size": "x"}, "chunk_size=x"),
        ("cat", {"cfg_scale": 1e39}, "cfg_scale=1e[+]39 is invalid: it must be a number from 0 to 1000"),
        ("cat", {"num_steps": 10**20}, "it must be an integer from 1 to 10000"),
        ("cat", {"num_steps": 2.5}, "num_steps=2.5 is"),
        ("cat", {"cfg_scale": "3"}, "cfg_scale=3 is"),
        ("cat", {"seed": "a"}, "seed=a is"),
        ("cat", {"seed": 1.5}, "seed=1.5 is"),
        ([], {}, "no classes are given"),
        (None, {}, "None is not a class"),
        (3.5, {}, "3.5 is not a class"),
    ):
        with pytest.raises(UserError, match=words):
            pipe(classes, **settings)
    with pytest.raises(TypeError, match=r"there is no option 'sed' \(did you mean seed\?\)"):
        pipe("cat", sed=1)
    for known in (3, torch.zeros(2, 16, 8)):
        with pytest.raises(ValueError, match=r"known must be a tensor of shape \(1, 16, 8\)"):
            pipe("cat", known=known)
    assert repr(pipe) == f"Pipeline('{model.parent.name}-model', 16 px, 3 classes, float32 on cpu)"
    assert repr(pipe.classes) == "ClassNames(3: cat, dog, sea lion)"
    for name, settings, words in (
        (3, {}, "model=3 is no name"),
        ("demo", {"weights": "emma"}, "holds no weights 'emma'"),
        ("demo", {"dtype": 3}, "precision=3 is unknown"),
        ("demo", {"dtype": "bf17"}, "precision='bf17' is unknown: use auto, fp32 or bf16"),
        ("demo", {"device": 3}, "device 3 cannot be used"),
    ):
        with pytest.raises(UserError, match=words):
            load_pipeline(name, **settings)
    with pytest.raises(UserError, match="8 bits per token and the autoencoder 16"):
        Pipeline(small.model(), Autoencoder(dataclasses.replace(small.NETWORK, bits=16)))


def test_names_work_wherever_a_file_does(model, tmp_path, monkeypatch):
    """A file, the folder of a run, the demo; a run's autoencoder is found by its settings."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "model.safetensors").write_bytes(model.read_bytes())
    settings = {"run": {"autoencoder": str(model.parent / "autoencoder.safetensors")}}
    (run / "settings.json").write_text(json.dumps(settings))
    expected = load_pipeline(model, device="cpu")(0, num_steps=2, output="np")
    assert np.array_equal(load_pipeline(run, device="cpu")(0, num_steps=2, output="np"), expected)
    assert np.array_equal(load_pipeline(str(run), device="cpu")(0, num_steps=2, output="np"), expected)
    assert bitdance.load_model(run).config == bitdance.load_model(model).config
    assert bitdance.load_model("demo").config.grid == bitdance.load_pipeline("demo", device="cpu").model.config.grid
    assert bitdance.load_autoencoder("demo").config.bits == bitdance.load_model("demo").config.bits
    (run / "model.safetensors").rename(run / "checkpoint-0000012.safetensors")
    (run / "checkpoint-0000002.safetensors").write_bytes(b"old")
    (run / "checkpoint-0000040 (copy).safetensors").write_bytes(b"not a checkpoint")
    assert bitdance.load_model(run).config == bitdance.load_model(model).config
    with pytest.raises(UserError, match=r"holds no weights: did you mean .*\? name another folder"):
        load_pipeline(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    with pytest.raises(UserError, match=r"there is no model .*mien': did you mean mine\? name a file, the folder"):
        load_pipeline(tmp_path / "runs" / "mien", device="cpu")
    with pytest.raises(
        UserError, match=r"runs/BitDance_B_1X.pt does not exist: download it with `bitdance download B-1X"
    ):
        load_pipeline(tmp_path / "runs" / "BitDance_B_1X.pt", device="cpu")
    with pytest.raises(UserError, match="there is no model 'nothing'"):
        bitdance.load_model("nothing")
    with pytest.raises(UserError, match="there is no autoencoder 'nothing'"):
        load_pipeline(model, autoencoder="nothing")


def test_settings_come_from_the_call_the_preset_the_file_and_the_published_ones(model, tmp_path, refused):
    pipe = load_pipeline(model, device="cpu")
    fast = pipe.sampling_config(preset="fast")
    assert (fast.cfg_scale, fast.solver, fast.num_steps) == (3.0, "dpmpp-2m-sde", 20) and fast == pipe.sampling_config()
    assert pipe.sampling_config(preset="fast", num_steps=7, solver=None) == dataclasses.replace(fast, num_steps=7)
    pipe.defaults = RELEASED_MODELS["B-16X"].sampling
    assert pipe.sampling_config() == pipe.sampling_config(preset="exact") == SamplingConfig(100, 6.1)
    for preset in ("slow", []):
        with pytest.raises(UserError, match=rf"preset={re.escape(repr(preset))} is unknown: use exact or fast"):
            pipe("cat", preset=preset)
    for interval in (3, "ab", (0, 0.5, 1)):
        with pytest.raises(UserError, match="it must be two times from 0 to 1, in order"):
            pipe("cat", cfg_interval=interval)
    main(["convert", str(model), str(tmp_path / "own.safetensors"), "--cfg-scale", "4.5"])
    main(["convert", str(tmp_path / "own.safetensors"), str(tmp_path / "again.safetensors")])
    own = load_pipeline(tmp_path / "again.safetensors", autoencoder=model.parent / "autoencoder.safetensors")
    assert own.sampling_config().cfg_scale == 4.5
    weights_file.save(tmp_path / "own.safetensors", own.model, metadata={"cfg_scale": "nan"})
    with pytest.raises(UserError, match=r"own\.safetensors gives the guidance scale 'nan': convert it again"):
        load_pipeline(tmp_path / "own.safetensors", autoencoder=model.parent / "autoencoder.safetensors")
    for source, scale, words in (
        (model, "-1", "--cfg-scale -1.0 is invalid"),
        (model.parent / "autoencoder.safetensors", "3", "--cfg-scale is stored with a model"),
    ):
        assert words in refused(main, ["convert", str(source), str(tmp_path / "x.safetensors"), "--cfg-scale", scale])


def test_the_networks_of_a_pipeline_are_ordinary_modules(model):
    """Sampling packs weights for its own duration only."""
    pipe = load_pipeline(model, device="cpu")
    expected = pipe([0, 1], num_steps=2, output="np")
    other = pickle.loads(pickle.dumps(copy.deepcopy(pipe)))
    assert np.array_equal(other([0, 1], num_steps=2, output="np"), expected)
    other.model.load_state_dict(pipe.model.state_dict())
    other.model.to(torch.float64).to(pipe.dtype)
    assert np.array_equal(other([0, 1], num_steps=2, output="np"), expected)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.zero_()
    assert not np.array_equal(other([0, 1], num_steps=2, output="np"), expected)
    other.model.requires_grad_().head.net.final_layer.linear(torch.ones(1, 64, dtype=other.dtype)).sum().backward()


def test_numbers_and_arrays_of_numpy_and_torch_are_taken(model):
    pipe = load_pipeline(model, device=torch.device("cpu"))
    expected = pipe([2, 0], seed=1, num_steps=2, cfg_scale=2.0, output="np")
    settings = {"seed": np.int64(1), "num_steps": np.int32(2), "cfg_scale": np.float32(2), "batch_size": np.int8(2)}
    for classes in (np.array([2, 0]), torch.tensor([2, 0]), [np.int64(2), np.int32(0)]):
        assert np.array_equal(pipe(classes, output="np", chunk_size=np.int64(0), **settings), expected)
    assert len(pipe(np.array(1), num_steps=1)) == len(pipe(torch.tensor(1), num_steps=1)) == 1
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    bits = pipe.encode(pixels[:, :, ::-1])
    assert torch.equal(bits, pipe.encode(np.ascontiguousarray(pixels[:, :, ::-1])))
    array = bits.numpy()
    assert np.array_equal(pipe.decode(array[::-1], "np"), pipe.decode(array, "np")[::-1])


def test_ids_and_labels_that_do_not_fit(model):
    pipe = load_pipeline(model, device="cpu")
    for ids, labels in ([], []), ([1, 2], [0]), ([1], [3]), ([1], [-1]), ([-1], [0]), ([2**32], [0]):
        with pytest.raises(ValueError, match="sample ids"):
            pipe.generate(ids, labels, pipe.sampling_config(2.0, 2))


def test_values_that_are_no_images_or_bits(model):
    pipe = load_pipeline(model, device="cpu")
    empty, doubles = np.zeros((0, 16, 16, 3), np.uint8), np.zeros((16, 16, 3))
    for images in (pathlib.Path("x.png"), "x.png", ["x.png"], [], 5, empty, np.array(["a"]), doubles):
        with pytest.raises(ValueError, match=r"images must be PIL images|pixels must be uint8"):
            pipe.encode(images)
    good = torch.ones(1, 8, 4, 4)
    for bits in (None, ["a"], good > 0, good[:0], good[:, :, :0], good[:, :, :1, :1]):
        with pytest.raises(ValueError, match="bits must"):
            pipe.decode(bits)
    with pytest.raises(ValueError, match=r"bits must have shape \(B, 8, h, w\), not \(1, 5, 5\)"):
        pipe.decode(torch.zeros(1, 5, 5))
    for value in (float("nan"), 0.0, 2.0):
        with pytest.raises(ValueError, match=r"bits must be -1 or \+1"):
            pipe.decode(good * value)
    with pytest.raises(UserError, match="output='gif' is unknown"):
        pipe.decode(good, "gif")
    with pytest.raises(UserError, match="mode='nonsense' is unknown: use auto, default or reduce-overhead"):
        pipe.compile("nonsense")
    for device, dtype in ((torch.device("cuda", 0), "auto"), (torch.device("meta"), "auto"), ("cpu", torch.int8)):
        with pytest.raises(UserError, match=r"cannot be used|dtype=torch.int8 is invalid"):
            load_pipeline(model, device=device, dtype=dtype)
    grey = np.arange(16 * 16, dtype=np.uint8).reshape(16, 16)
    bits = pipe.encode([Image.fromarray(grey), Image.fromarray(grey.astype(np.uint16) * 257)])
    assert torch.equal(bits[0], bits[1]), "16 bits a pixel are scaled to 8"


def test_a_disk_that_fills_up_keeps_the_earlier_images(model, tmp_path, monkeypatch):
    before = {path: path.read_bytes() for path in sample(model, tmp_path, "--per-class", 1).iterdir()}
    real = Image.Image.save

    def save(image, path, *arguments, **settings):
        if "0001" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(image, path, *arguments, **settings)

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(SystemExit):
        sample(model, tmp_path, "--per-class", 2)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_more_images_than_a_folder_should_have(model, tmp_path, refused):
    for arguments, message in (
        (["--per-class", 10**9], "use --num-images for so many"),
        (["--batch-size", 10**9, "--dry-run"], "--batch-size 1000000000 is invalid: it must be at most 1000000"),
    ):
        assert message in refused(sample, model, tmp_path / "out", *arguments)
    sample(model, tmp_path / "out", "--batch-size", 10**6, "--dry-run")
    sample(model, tmp_path / "out", "--num-images", 2, "--batch-size", 10**6)
    assert len(list((tmp_path / "out").rglob("*.png"))) == 2


def test_bf16_on_request(model):
    pipe = load_pipeline(model, device="cpu", dtype="bf16")
    assert pipe.dtype == torch.bfloat16 == next(pipe.autoencoder.parameters()).dtype
    assert load_pipeline(model, device="cpu", dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("fast", [True, False])
def test_the_default_precision_is_what_the_cpu_computes_fast(model, monkeypatch, fast):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda fast=fast: fast)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert load_pipeline(model, device="cpu").dtype == (torch.bfloat16 if fast else torch.float32)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert load_pipeline(model, device="cpu").dtype == torch.float32


def test_a_batch_that_does_not_fit_into_memory_is_halved(model, monkeypatch):
    pipe, config, messages = load_pipeline(model, device="cpu"), SamplingConfig(3, 2.0), []
    whole = pipe.generate(range(5), [0, 1, 2, 0, 1], config, seed=1).pixels
    small.limit_memory(monkeypatch, lambda ids: len(ids) > 2)
    halves = pipe.generate(range(5), [0, 1, 2, 0, 1], config, seed=1, report=messages.append).pixels
    assert alike(whole, halves)
    assert [line.split(":")[0] for line in messages] == [
        "not enough memory for 5 images at once", "not enough memory for 3 images at once",
    ]  # fmt: skip
    small.limit_memory(monkeypatch, lambda ids: True)
    with pytest.raises(torch.OutOfMemoryError):
        pipe.generate([0], [0], config)


def test_a_size_that_did_not_fit_is_not_tried_again(model, monkeypatch):
    pipe, config, tried = load_pipeline(model, device="cpu"), SamplingConfig(3, 2.0), []
    small.limit_memory(monkeypatch, lambda ids: tried.append(len(ids)) or len(ids) > 2)
    for _ in range(2):
        pipe.generate(range(4), [0, 1, 2, 0], config, report=lambda line: None)
    assert tried == [4, 2, 2, 2, 2]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_decoder_without_enough_memory_keeps_the_tokens(model, monkeypatch, error):
    pipe, config = load_pipeline(model, device="cpu"), SamplingConfig(3, 2.0)
    whole = pipe.generate(range(5), [0] * 5, config, seed=1)
    real, sizes, messages, sampled = pipe.autoencoder.decode, [], [], []

    def decode(bits):
        sizes.append(len(bits))
        if len(bits) > 2:
            raise error
        return real(bits)

    monkeypatch.setattr(pipe.autoencoder, "decode", decode)
    count = lambda step, steps, tokens: sampled.append(step)  # noqa: E731
    found = pipe.generate(range(5), [0] * 5, config, 1, callback=count, report=messages.append)
    assert np.array_equal(found.bits, whole.bits) and alike(found.pixels, whole.pixels)
    assert len(sampled) == pipe.model.config.ar_steps, "sampled once"
    assert sizes == [5, 2, 2, 1] and not found.halved
    assert messages == ["not enough memory to decode 5 images at once: 2 are decoded at once from now on."]
    pipe.decode_tokens(torch.ones(3, 16, 8))
    assert sizes[4:] == [2, 1]
    monkeypatch.setattr(pipe.autoencoder, "decode", lambda bits: (_ for _ in ()).throw(error))
    with pytest.raises(RuntimeError, match=re.escape(str(error))):
        pipe.decode_tokens(torch.ones(3, 16, 8))


def test_a_cpu_decodes_large_images_one_at_a_time(model, monkeypatch):
    pipe, sizes = load_pipeline(model, device="cpu"), []
    monkeypatch.setattr(pipeline_module, "MAX_CHUNK_PIXELS", 2 * pipe.image_size**2)
    real = pipe.autoencoder.decode
    monkeypatch.setattr(pipe.autoencoder, "decode", lambda bits: sizes.append(len(bits)) or real(bits))
    pipe.decode_tokens(torch.ones(5, 16, 8), chunk_size=4)
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize(("parallel_num", "cfg_scale"), [(1, 3.0), (16, 1.0)])
def test_the_estimated_memory_is_that_of_sampling(parallel_num, cfg_scale):
    """Counted in a real run, whose attention on a CPU has other temporary tensors."""
    config = SamplingConfig(20, cfg_scale)
    network = small.model(parallel_num=parallel_num, num_classes=3)
    pipe = Pipeline(network, small.autoencoder())
    sizes, coder = network.config, pipe.autoencoder.config
    estimate = estimate_memory(sizes, coder, config, batch_size=32, chunk_size=8, dtype=torch.float32)
    with torch.no_grad(), MemoryTracker() as tracker:
        noise_fn = sampler.sample_noise(network, 0, torch.arange(32), config.num_draws)
        tokens = sampler.sample_tokens(network, torch.zeros(32, dtype=torch.int64), noise_fn, config)
    assert estimate.cache + estimate.tokens == pytest.approx(tracker.peak, rel=0.1)
    with torch.no_grad(), MemoryTracker() as tracker:
        pipe.decode_tokens(tokens[:8])
    assert estimate.decoder == pytest.approx(tracker.peak, rel=0.2)
    assert estimate.weights == sum(p.nbytes for part in (network, pipe.autoencoder) for p in part.parameters())


def test_dry_run_of_sampling_needs_no_weights(tmp_path, capsys, monkeypatch, refused):
    """The sizes of released models are known; 18.1 and 29.3 GB are their caches at the published batch sizes."""
    monkeypatch.chdir(tmp_path)
    for name, size, cache in (("B-1X", 384, 18.1), ("H-1X", 224, 29.3)):
        settings = ["--batch-size", size, "--num-images", 1000, "--precision", "bf16", "--num-steps", 2]
        main(["sample", "--model", f"BitDance-{name}", *map(str, settings), "--dry-run"])
        facts = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (facts["images"], facts["batch_size"]) == (1000, size)
        assert facts["cache"] / 1e9 == pytest.approx(cache, abs=0.05)
        assert facts["peak"] == facts["weights"] + facts["cache"] + facts["tokens"]
        assert facts["largest_batches"]["80"] > size
    main(["sample", "285", "volcano", "--model", "BitDance-B-1X", "--per-class", "4", "--num-steps", "2", "--dry-run"])
    text = capsys.readouterr().out
    assert text.startswith("8 images, 8 at once") and json.loads(text.splitlines()[-1])["cache"] < facts["cache"] / 20
    assert "the model has 32 bits per token and the autoencoder 16" in refused(
        main, ["sample", "--model", "BitDance-B-1X", "--autoencoder", "demo", "--dry-run"]
    )
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------ labels, npz, jobs


@pytest.mark.parametrize(("count", "classes"), [(50, 10), (57, 10), (7, 10), (1000, 1000), (10, 3)])
def test_balanced_labels(count, classes):
    found = make_labels("balanced", count, classes, seed=3)
    assert found.shape == (count,) and found.dtype == np.int64
    counts = np.bincount(found, minlength=classes)
    whole, rest = divmod(count, classes)
    assert set(counts.tolist()) <= {whole, whole + 1} and (counts == whole + 1).sum() == rest
    assert np.array_equal(found, make_labels("balanced", count, classes, seed=3))
    assert not np.array_equal(found, make_labels("balanced", count, classes, seed=4))
    assert not np.array_equal(found, np.sort(found))


def test_every_split_of_balanced_labels_has_most_classes():
    """The Inception Score takes tenths of the images as they come."""
    splits = make_labels("balanced", 10_000, 100, seed=0).reshape(10, 1000)
    assert all(len(set(split.tolist())) == 100 for split in splits)
    assert all(np.bincount(split).max() < 30 for split in splits)


def test_random_labels():
    labels = make_labels("random", 30_000, 10, seed=4)
    assert labels.min() == 0 and labels.max() == 9
    assert np.abs(np.bincount(labels) - 3000).max() < 300 and len(set(np.bincount(labels))) > 5
    assert not np.array_equal(labels, make_labels("random", 30_000, 10, seed=5))
    assert np.array_equal(labels[:10], make_labels("random", 10, 10, seed=4))


def test_split_batches():
    assert list(split_batches(10, 4)) == [range(0, 4), range(4, 8), range(8, 10)]
    assert list(split_batches(4, 100)) == [range(0, 4)]
    for count, size in ((0, 1), (-3, 1), (1, 0), (1, -2)):
        with pytest.raises(UserError):
            list(split_batches(count, size))


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
        with pytest.raises(ValueError, match=f"got {count} images, expected 7"):
            write_npz(path, [np.zeros((count, 4, 6, 3), np.uint8)], pixels.shape, np.arange(7))
    assert [p.name for p in path.parent.iterdir()] == ["images.npz"] and path.read_bytes() == before


def test_random_labels_and_packed_bits_on_request(model, tmp_path, capsys):
    words = ["sample", "--model", model, "--device", "cpu", "--output", tmp_path, "--num-images", 7, "--npz",
             "--labels", "random", "--save-bits", "--num-steps", 3, "--batch-size", 3]  # fmt: skip
    main(list(map(str, words)))
    path = pathlib.Path(json.loads(capsys.readouterr().out.splitlines()[-1])["result"])
    network = weights_file.load_model(model)
    with np.load(path) as images, np.load(path.with_name(path.stem + "-bits.npz")) as bits:
        assert "random-labels" in path.name
        assert np.array_equal(images["arr_1"], make_labels("random", 7, 3, 0)) and images["arr_1"].dtype == np.int64
        assert np.array_equal(bits["arr_1"], images["arr_1"])
        assert bits["arr_0"].shape == (7, network.config.num_tokens, network.config.bits // 8)
        tokens = unpack(torch.from_numpy(bits["arr_0"]))
        assert alike(load_pipeline(model, device="cpu").decode_tokens(tokens).numpy(), images["arr_0"])


def test_a_job_in_bf16(model, tmp_path, capsys):
    def made(folder: str, precision: str, seed: int = 0) -> tuple[pathlib.Path, np.ndarray, torch.Tensor]:
        words = ["sample", "--model", model, "--device", "cpu", "--output", tmp_path / folder, "--num-images", 12,
                 "--npz", "--save-bits", "--num-steps", 4, "--cfg-scale", 2, "--batch-size", 4, "--seed", seed,
                 "--precision", precision]  # fmt: skip
        main(list(map(str, words)))
        path = pathlib.Path(json.loads(capsys.readouterr().out.splitlines()[-1])["result"])
        with np.load(path) as images, np.load(path.with_name(path.stem + "-bits.npz")) as bits:
            return path, images["arr_0"], unpack(torch.from_numpy(bits["arr_0"]))

    path, pixels, tokens = made("first", "bf16")
    again = made("again", "bf16")[0]
    assert "-bf16-" in path.name and path.name == again.name and path.read_bytes() == again.read_bytes()
    assert pixels.shape == (12, 16, 16, 3) and pixels.dtype == np.uint8
    # Bits that rounding flips change what follows, but most stay as they are; of another seed 0.7 are equal.
    name, _, exact = made("exact", "fp32")
    assert "-fp32-" in name.name and 0.85 < float((tokens == exact).float().mean()) < 1
    assert float((made("other", "fp32", seed=1)[2] == exact).float().mean()) < 0.8
    # The same bits, decoded in float32, are the same pictures but for rounding.
    difference = np.abs(
        load_pipeline(model, device="cpu", dtype="fp32").decode_tokens(tokens).numpy().astype(int) - pixels
    )
    assert 0 < difference.mean() < 2


def test_the_command_makes_the_same_job_as_the_launcher(model, tmp_path, capsys, refused):
    common = ["--cfg-scale", 2, "--seed", 5]
    words = ["sample", "--model", model, "--device", "cpu", "--output", tmp_path / "a", "--num-images", 7, "--npz",
             "--batch-size", 3, "--num-steps", 3, "--precision", "fp32",
             "--preset", "exact", *common]  # fmt: skip
    main(list(map(str, words)))
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["images"] == facts["sampled"] == 7
    original_cli.sample(list(map(str, ["--ckpt", model, "--sample-dir", tmp_path / "b", "--num-fid-samples", 7,
                                   "--per-proc-batch-size", 3, "--to-npz", "--sample-steps", 3,
                                   "--mixed-precision", "none", *common])))  # fmt: skip
    (ours,), (theirs,) = (list((tmp_path / folder).glob("*.npz")) for folder in "ab")
    assert str(ours) == facts["result"] and ours.read_bytes() == theirs.read_bytes()
    assert ours.name == theirs.name
    for wrong in (["--npz"], ["--save-bits"], ["dog", "--num-images", "3"]):
        assert "--num-images" in refused(main, ["sample", "--model", str(model), *wrong])


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
    distance, index, mirrored = find_nearest(queries, [references[:30], references[:0], references[30:]])
    assert distance[:2].max() < 0.1 and index[:2].tolist() == [17, 33] and mirrored[:2].tolist() == [False, True]
    both = np.stack([references, references[:, :, ::-1]]).astype(float)
    brute = np.sqrt(((both - queries[2]) ** 2).mean(axis=(2, 3, 4)))
    assert distance[2] == pytest.approx(brute.min(), abs=1e-3)
    assert brute[int(mirrored[2]), index[2]] == brute.min()


def test_nearest_looks_at_all_blocks(monkeypatch):
    monkeypatch.setattr("bitdance.metrics.nearest_neighbours.BLOCK", 7 * 48)  # of the queries
    references = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)
    distance, index, mirrored = find_nearest(references[::-1], np.split(references, 8))
    assert index.tolist() == list(range(39, -1, -1)) and not mirrored.any() and distance.max() < 0.1


def test_the_command_nearest(model, tmp_path, capsys):
    folder = sample(model, tmp_path / "out", "--per-class", 2)
    data = small.pictures(tmp_path / "data")
    Image.fromarray(images(folder)[3][:, ::-1]).save(data / "class-1" / "planted.png")
    held_out = small.pictures(tmp_path / "held-out", each=2)
    capsys.readouterr()
    fixed = ["--held-out", held_out, "--output", tmp_path / "near", "--shown", 2]
    main(["nearest", *map(str, [folder, "--data-path", data, *fixed])])
    figures = json.loads((tmp_path / "near" / "nearest.json").read_text())
    assert figures["images"] == 6 and figures["training_images"] == 13
    assert figures["minimum"] < 0.1 < figures["median"]
    assert figures["held_out"]["mean"] < 0.1  # these pictures are among the training images
    with Image.open(tmp_path / "near" / "nearest.png") as sheet:
        assert sheet.height == 2 * 98 + 2
    assert f"generated images minimum {figures['minimum']:.1f}" in capsys.readouterr().out


def test_nearest_streams_an_npz_and_skips_bad_images(model, tmp_path, capsys, refused):
    data = small.pictures(tmp_path / "data")
    planted = np.asarray(Image.open(data / "class-2" / "1.png"))
    np.savez(tmp_path / "samples.npz", np.stack([planted, planted[::-1]]))
    (data / "class-0" / "0.png").write_bytes(b"damaged")
    Image.new("RGB", (1, 5000)).save(data / "class-1" / "narrow.png")
    arguments = ["nearest", str(tmp_path / "samples.npz"), "--data-path", str(data), "--output", str(tmp_path / "near")]
    main([*arguments, "--shown", "1"])
    figures = json.loads((tmp_path / "near" / "nearest.json").read_text())
    assert figures["images"] == 2 and figures["training_images"] == 11 and figures["minimum"] < 0.1
    assert "class-0/0.png" in (errors := capsys.readouterr().err) and "1 x 5000 pixels" in errors
    with Image.open(tmp_path / "near" / "nearest.png") as sheet:  # the first pair is the picture and its original
        pixels = np.asarray(sheet)
    top, bottom = (pixels[y : y + 96, -98:-2] for y in (2, 100))
    assert np.array_equal(top, bottom)
    for wrong, words in (["--max-bad-images", "1"], "--max-bad-images 1"), (["--max-bad-images", "-1"], "at least 0"):
        assert words in refused(main, [*arguments, *wrong])
    (tmp_path / "bad" / "a").mkdir(parents=True)
    (tmp_path / "bad" / "a" / "x.png").write_bytes(b"damaged")
    assert "none of the images of" in refused(main, [*arguments, "--data-path", str(tmp_path / "bad")])
    np.savez(tmp_path / "samples.npz", np.zeros((2, 8, 16, 3), np.uint8))
    assert "give square ones" in refused(main, arguments)


def test_reconstruct_takes_one_image_of_any_size_and_skips_bad_ones(model, tmp_path, capsys, refused):
    data = small.pictures(tmp_path / "data", side=19)
    fixed = ["--autoencoder", str(model.with_name("autoencoder.safetensors")), "--output", str(tmp_path / "out")]
    Image.new("RGB", (30, 21), "red").save(tmp_path / "x.jpg")
    main(["reconstruct", "--data-path", str(tmp_path / "x.jpg"), *fixed])
    assert "1 image at 28 x 20 pixels (cropped from 30 x 21): PSNR" in capsys.readouterr().out
    main(["reconstruct", "--data-path", str(data / "class-1"), *fixed])
    assert "4 images at 16 x 16 pixels (the first one has 19 x 19): PSNR" in capsys.readouterr().out
    (data / "class-0" / "0.png").write_bytes(b"damaged")
    main(["reconstruct", "--data-path", str(data), *fixed, "--shown", "1"])
    output = capsys.readouterr()
    assert "11 images (1 unreadable skipped) at 16 x 16 pixels (the first one has 19 x 19)" in output.out
    assert "class-0/0.png" in output.err
    assert "--max-bad-images 0" in refused(
        main, ["reconstruct", "--data-path", str(data), *fixed, "--max-bad-images", "0"]
    )


def test_an_image_of_one_cell_is_not_reconstructed(model, tmp_path, monkeypatch, refused):
    """Its normalization would divide by the variance of one value."""
    monkeypatch.setattr("bitdance.metrics.psnr_ssim.WINDOW", 1)
    data = small.pictures(tmp_path / "data", side=4)
    arguments = ["--data-path", str(data), "--autoencoder", str(model.with_name("autoencoder.safetensors"))]
    error = refused(main, ["reconstruct", *arguments, "--output", str(tmp_path / "out")])
    assert "images of 4 x 4 pixels are too small: set --image-size to 8 or more." in error


def test_the_command_reconstruct(model, tmp_path, capsys):
    data = small.pictures(tmp_path / "data", each=3)
    autoencoder = model.with_name("autoencoder.safetensors")
    arguments = ["--data-path", str(data), "--autoencoder", str(autoencoder), "--device", "cpu", "--batch-size", "4"]
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


def test_an_autoencoder_that_the_released_layout_cannot_describe_is_not_converted_to_it(tmp_path, refused):
    for more in (["--part", "autoencoder"], ["--autoencoder", "demo"]):
        err = refused(main, ["convert", "demo", str(tmp_path / "x.pt"), *more])
        assert "no place for the `split`, `bit_depths` and `gray_code` of this autoencoder: use .safetensors." in err
    assert not list(tmp_path.iterdir())


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
    run = TrainConfig(data, tmp_path / "run", 16, max_steps=1, batch_size=4, num_workers=1, ema=ema)
    finished = train_autoencoder(run, small.NETWORK, AutoencoderLossConfig(), "cpu")
    main(
        [
            "convert",
            str(next((tmp_path / "run").glob("checkpoint-*.safetensors"))),
            str(tmp_path / "converted.safetensors"),
        ]
    )
    assert capsys.readouterr().out.splitlines()[-1].startswith("autoencoder in float32, ")
    if averaged:
        for weights in ("model", "ema"):
            (checkpoint,) = (tmp_path / "run").glob("checkpoint-*.safetensors")
            for suffix in ("safetensors", "pt"):
                target = tmp_path / f"{weights}.{suffix}"
                main(["convert", str(checkpoint), str(target), "--weights", weights])
                state, stored = weights_file.load_autoencoder(target).state_dict(), weights_file.read(checkpoint)
                assert all(torch.equal(state[name], value) for name, value in stored.states[weights].items())
    a, b = (weights_file.load_autoencoder(path).state_dict() for path in (finished, tmp_path / "converted.safetensors"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_names_of_files_are_short_whatever_the_alphabet():
    assert list_entries(ClassNames.from_labels(["Birds & Bees"]), [0])[0]["file"] == "0000-birds-bees.png"
    (entry,) = list_entries(ClassNames.from_labels(["\U00020000" * 60]), [0])
    assert len(entry["file"].encode()) < 200  # with what is added while it is written at most 255
