"""The four launchers: each flag of the original parses and sets the right field, and those of sampling run.

tests/test_published.py trains with the other two.
"""

from __future__ import annotations

import json
import pathlib
import runpy
import shutil
from typing import Any

import numpy as np
import pytest
import small
import torch

from bitdance.cli import original_cli
from bitdance.config import RELEASED_MODELS, AutoencoderConfig, BitDanceConfig
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.transformer import BitDance
from bitdance.sampling.pipeline import Pipeline
from bitdance.weights import weights_file

SCRIPTS = ("sample_ddp.py", "sample_ddp_parallel.py", "train.py", "train_parallel.py")
NEEDED = {"sample": ["--ckpt", "model.pt"], "train": ["--data-path", "images", "--trained-vae", "ae.pt"]}

# Flag, value (None for a switch), field, and its value then. When sampling the fields are those of the flags, in
# training those of run (TrainConfig), sizes (ModelSizes), loss (LossConfig) or call (other arguments of train_model).
SHARED_SAMPLE = [
    ("--model", "BitDance-B", "model.model", "BitDance-B"),
    ("--image-size", "512", "model.image_size", 512),
    ("--down-size", "16", "model.down_size", 16),
    ("--patch-size", "1", "model.patch_size", 1),
    ("--num-classes", "1000", "model.num_classes", 1000),
    ("--cls-token-num", "32", "model.cls_token_num", 32),
    ("--latent-dim", "32", "model.latent_dim", 32),
    ("--diff-batch-mul", "2", "model.diff_batch_mul", 2),
    ("--grad-checkpointing", None, "model.grad_checkpointing", True),
    ("--trained-vae", "vae.pt", "model.trained_vae", "vae.pt"),
    ("--drop-rate", "0.1", "model.drop_rate", 0.1),
    ("--perturb-schedule", "constant", "model.perturb_schedule", "constant"),
    ("--perturb-rate", "0.1", "model.perturb_rate", 0.1),
    ("--perturb-rate-max", "0.2", "model.perturb_rate_max", 0.2),
    ("--time-schedule", "uniform", "model.time_schedule", "uniform"),
    ("--time-shift", "2", "model.time_shift", 2.0),
    ("--P-std", "0.7", "model.P_std", 0.7),
    ("--P-mean", "-0.5", "model.P_mean", -0.5),
]
SAMPLE = [
    *SHARED_SAMPLE,
    ("--ckpt", "other.pt", "sample.ckpt", "other.pt"),
    ("--sample-dir", "out", "sample.sample_dir", pathlib.Path("out")),
    ("--per-proc-batch-size", "384", "sample.per_proc_batch_size", 384),
    ("--num-fid-samples", "100", "sample.num_fid_samples", 100),
    ("--cfg-scale", "3.2", "sample.cfg_scale", 3.2),
    ("--seed", "5", "sample.seed", 5),
    ("--sample-steps", "50", "sample.sample_steps", 50),
    ("--no-ema", None, "sample.no_ema", True),
    ("--mixed-precision", "none", "sample.mixed_precision", "none"),
    ("--to-npz", None, "sample.to_npz", True),
    ("--chunk-size", "64", "sample.chunk_size", 64),
    ("--device", "cpu", "sample.device", "cpu"),  # this and the following are not in the original
    ("--threads", "2", "sample.threads", 2),
]
SAMPLE_PARALLEL = [
    ("--parallel-num", "16", "parallel.parallel_num", 16),
    ("--parallel-mode", "standard", "parallel.parallel_mode", "standard"),
]
TRAIN = [
    ("--model", "BitDance-H", "sizes.dim", 1280),
    ("--image-size", "512", "run.image_size", 512),
    ("--down-size", "16", "call.expected_down_size", 16),
    ("--patch-size", "1", "run.image_size", 256),
    ("--num-classes", "10", "sizes.num_classes", 10),
    ("--cls-token-num", "32", "sizes.cls_token_num", 32),
    ("--latent-dim", "32", "call.expected_bits", 32),
    ("--diff-batch-mul", "2", "loss.diff_batch_mul", 2),
    ("--grad-checkpointing", None, "run.grad_checkpointing", True),
    ("--trained-vae", "vae.pt", "call.autoencoder", "vae.pt"),
    ("--drop-rate", "0.1", "loss.drop_rate", 0.1),
    ("--perturb-schedule", "constant", "loss.perturb_rate", 0.0),
    ("--perturb-rate", "0.1", "loss.perturb_rate", 0.1),
    ("--perturb-rate-max", "0.2", "loss.perturb_rate", 0.0),  # unused
    ("--time-schedule", "uniform", "loss.time_schedule", "uniform"),
    ("--time-shift", "2", "sizes.time_shift", 2.0),
    ("--P-std", "0.7", "loss.time_std", 0.7),
    ("--P-mean", "-0.5", "loss.time_mean", -0.5),
    ("--data-path", "elsewhere", "run.data_path", pathlib.Path("elsewhere")),
    ("--aug-decay-start-epoch", "7", "run.aug_decay_start_epoch", 7),
    ("--aug-decay-end-epoch", "9", "run.aug_decay_end_epoch", 9),
    ("--ema", "0.9999", "run.ema", 0.9999),
    ("--no-compile", None, "run.compile", False),
    ("--tmp-results-dir", "scratch", "run.output", pathlib.Path("results")),  # unused
    ("--results-dir", "out", "run.output", pathlib.Path("out")),
    ("--epochs", "800", "run.epochs", 800),
    ("--lr", "6e-4", "run.lr", 6e-4),
    ("--min-lr", "1e-6", "run.min_lr", 1e-6),
    ("--warmup-steps", "10", "run.warmup_steps", 10),
    ("--decay-start", "30", "run.decay_start", 30),
    ("--weight-decay", "0.1", "run.weight_decay", 0.1),
    ("--beta1", "0.8", "run.beta1", 0.8),
    ("--beta2", "0.99", "run.beta2", 0.99),
    ("--max-grad-norm", "2", "run.max_grad_norm", 2.0),
    ("--global-batch-size", "1024", "run.batch_size", 1024),
    ("--global-seed", "4", "run.seed", 4),
    ("--num-workers", "2", "run.num_workers", 2),
    ("--log-every", "10", "run.log_every", 10),
    ("--mixed-precision", "none", "run.precision", "fp32"),
    ("--keep-freq", "5", "run.keep_epochs", 5),
    ("--max-steps", "3", "run.max_steps", 3),  # this and the following are not in the original
    ("--dry-run", None, "call.dry_run", True),
    ("--device", "cpu", "call.device", "cpu"),
    ("--threads", "2", "call.threads", 2),
]
TRAIN_PARALLEL = [
    ("--parallel-num", "16", "sizes.parallel_num", 16),
    ("--parallel-mode", "standard", "sizes.token_order", "standard"),
]
FLAGS = {
    "sample_ddp.py": SAMPLE,
    "sample_ddp_parallel.py": SAMPLE + SAMPLE_PARALLEL,
    "train.py": TRAIN,
    "train_parallel.py": TRAIN + TRAIN_PARALLEL,
}


@pytest.fixture
def configured(monkeypatch):
    """Returns the settings that a launcher would work with: (script, arguments) -> settings."""
    got: dict[str, Any] = {}

    def run_sample(sample, model, parallel):
        got.update(sample=sample, model=model, parallel=parallel)

    def train_model(run, sizes, loss, autoencoder, device, threads, **call):
        call |= {"autoencoder": autoencoder, "device": device, "threads": threads}
        got.update(run=run, sizes=sizes, loss=loss, call=call)

    monkeypatch.setattr(original_cli, "run_sample", run_sample)
    monkeypatch.setattr("bitdance.training.setup.train_model", train_model)

    def parse(script: str, arguments: list[str]) -> dict[str, Any]:
        got.clear()
        small.LAUNCHERS[script](arguments)
        return dict(got)

    return parse


def value_of(got: dict[str, Any], field: str) -> Any:
    part, name = field.split(".")
    return got[part][name] if isinstance(got[part], dict) else getattr(got[part], name)


def command_lines(rows: list[tuple[str, str | None, str, Any]]) -> list[list[tuple[str, str | None, str, Any]]]:
    """Distributes flags over a few command lines, none of which has a field or an expected value twice."""
    lines: list[list[tuple[str, str | None, str, Any]]] = []
    for row in rows:
        fits = (line for line in lines if all(other[2] != row[2] and other[3] != row[3] for other in line))
        line = next(fits, None)
        if line is None:
            lines.append(line := [])
        line.append(row)
    return lines


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_flag_of_the_original(configured, script):
    for line in command_lines(FLAGS[script]):
        words = [word for flag, value, _, _ in line for word in (flag, value) if word is not None]
        got = configured(script, [*NEEDED[script.split("_")[0].removesuffix(".py")], *words])
        for flag, _, field, expected in line:
            found = value_of(got, field)
            assert found == expected and type(found) is type(expected), flag


def test_defaults_are_the_originals(configured):
    sample = configured("sample_ddp_parallel.py", NEEDED["sample"])["sample"]
    assert (str(sample.sample_dir), sample.per_proc_batch_size, sample.num_fid_samples) == ("samples", 32, 50_000)
    assert (sample.cfg_scale, sample.seed, sample.sample_steps, sample.chunk_size) == (4.6, 99, 100, 0)
    assert (sample.no_ema, sample.mixed_precision, sample.to_npz) == (False, "bf16", False)
    got = configured("train_parallel.py", NEEDED["train"])
    run, sizes, loss = got["run"], got["sizes"], got["loss"]
    assert (run.image_size, run.epochs, run.batch_size, run.seed) == (256, 400, 256, 0)
    assert (run.lr, run.min_lr, run.warmup_steps, run.decay_start) == (3e-4, 1e-5, 20_000, 20_000)
    assert (run.weight_decay, run.beta1, run.beta2, run.max_grad_norm) == (0.05, 0.9, 0.95, 1.0)
    assert (run.ema, run.num_workers, run.log_every, run.keep_epochs, run.compile) == (-1, 16, 100, 50, None)
    assert (run.aug_decay_start_epoch, run.aug_decay_end_epoch, run.random_crop) == (700, 750, True)
    assert (run.precision, run.grad_checkpointing, run.max_steps) == ("bf16", False, None)
    assert (sizes.parallel_num, sizes.token_order, sizes.cls_token_num, sizes.num_classes) == (4, "patch", 64, 1000)
    assert (sizes.time_shift, loss.drop_rate) == (1.0, 0.0)
    assert (loss.diff_batch_mul, loss.time_mean, loss.time_std, loss.time_schedule) == (4, -0.8, 0.8, "logit_normal")
    assert (loss.class_dropout, loss.perturb_rate) == (0.1, 0.0)
    assert configured("train.py", NEEDED["train"])["sizes"].parallel_num == 1


@pytest.mark.parametrize("script", ["sample_ddp.py", "train.py"])
def test_the_last_value_of_a_repeated_flag_wins(configured, script):
    kind = "sample" if script.startswith("sample") else "train"
    repeated = {"sample": ["--seed", "1", "--seed", "2"], "train": ["--global-seed", "1", "--global-seed", "2"]}[kind]
    got = configured(script, [*NEEDED[kind], *repeated])
    assert (got["sample"].seed if kind == "sample" else got["run"].seed) == 2


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("wrong", [["--no-such-flag", "1"], ["--model", "BitDance-XXL"], ["--image-size", "big"]])
def test_invalid_arguments_exit_with_status_2(configured, refused, script, wrong):
    kind = "sample" if script.startswith("sample") else "train"
    assert wrong[0] in refused(configured, script, [*NEEDED[kind], *wrong])


@pytest.mark.parametrize("script", ["sample_ddp.py", "train.py"])
def test_flags_of_the_parallel_scripts_are_not_in_the_others(configured, script):
    with pytest.raises(SystemExit) as error:
        configured(script, [*NEEDED[script.split("_")[0].removesuffix(".py")], "--parallel-num", "4"])
    assert error.value.code == 2


@pytest.mark.parametrize("name", ["B-1X", "B-4X", "B-16X", "L-1X", "H-1X"])
def test_the_published_sampling_commands(configured, name):
    release = RELEASED_MODELS[name]
    script, arguments = small.script_and_arguments(small.published_commands("sampling")[name])
    got = configured(script, arguments)
    sample, model, parallel = got["sample"], got["model"], got["parallel"]
    assert sample.ckpt == f"models/BitDance-ImageNet/{release.file}" and sample.to_npz
    assert model.trained_vae == "models/BitDance-ImageNet/ae_d16c32.pt" and str(sample.sample_dir) == "results"
    assert (sample.cfg_scale, sample.per_proc_batch_size, sample.chunk_size) == (
        release.sampling.cfg_scale, release.batch_size, release.sampling.chunk_size,
    )  # fmt: skip
    assert (model.model, model.latent_dim) == (release.family, 32)
    assert (parallel.parallel_num or 1) == release.config.parallel_num
    # The flags contradict nothing in the released files.
    with torch.device("meta"):
        pipeline = Pipeline(BitDance(release.config), Autoencoder(AutoencoderConfig()), name, release.sampling)
    original_cli._check_against_checkpoint(pipeline, model, parallel)


# ------------------------------------------------------------ the scripts of sampling


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> pathlib.Path:
    """A folder with an autoencoder with tokens of 16 px, and models with P = 1 and P = 4."""
    folder = tmp_path_factory.mktemp("launchers")
    network = small.autoencoder(config=AutoencoderConfig(widths=(32,) * 5, blocks=1, bits=8))
    weights_file.save(folder / "ae.safetensors", network)
    for p in (1, 4):
        config = BitDanceConfig(dim=128, n_layer=3, head_dim=128, head_layers=4, grid=4, bits=8, cls_token_num=4,
                                num_classes=5, parallel_num=p)  # fmt: skip
        model = BitDance(config)
        small.randomize(model, 1)
        weights_file.save(folder / f"model-{p}.safetensors", model)
    return folder


def sample_arguments(files: pathlib.Path, folder: pathlib.Path, p: int) -> list[object]:
    return ["--model", "BitDance-Tiny", "--image-size", 64, "--latent-dim", 8, "--num-classes", 5,
            "--cls-token-num", 4, "--trained-vae", files / "ae.safetensors",
            "--ckpt", files / f"model-{p}.safetensors", "--sample-dir", folder, "--cfg-scale", 2,
            "--sample-steps", 3, "--num-fid-samples", 7, "--per-proc-batch-size", 2, "--to-npz",
            "--mixed-precision", "none", "--chunk-size", 1, "--threads", 1]  # fmt: skip


def read_npz(folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
    (path,) = (path for path in folder.iterdir() if path.suffix not in (".log", ".json"))  # nothing else is left
    assert path.suffix == ".npz"
    with np.load(path) as file:
        return path, dict(file)


@pytest.mark.parametrize(("script", "p"), [("sample_ddp.py", 1), ("sample_ddp_parallel.py", 4)])
def test_sampling_scripts_write_an_npz(files, tmp_path, capsys, monkeypatch, script, p):
    """With several processes under torchrun the same one."""
    more = ["--parallel-num", 4] if p == 4 else []
    words = list(map(str, [script, *sample_arguments(files, tmp_path / "single", p), *more]))
    monkeypatch.setattr("sys.argv", words)
    runpy.run_path(str(small.ROOT / script), run_name="__main__")
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (facts["images"], facts["sampled"], facts["processes"]) == (7, 7, 1) and facts["seconds"] > 0
    path, single = read_npz(tmp_path / "single")
    assert single["arr_0"].shape == (7, 64, 64, 3) and single["arr_0"].dtype == np.uint8
    assert single["arr_1"].dtype == np.int64 and np.bincount(single["arr_1"], minlength=5).min() >= 1
    assert len({image.tobytes() for image in single["arr_0"]}) >= 5
    assert [log.name.split(".")[-2] for log in (tmp_path / "single").glob("*.log")] == ["rank0"]
    if p == 1:
        return
    done = small.run(script, *sample_arguments(files, tmp_path / "several", p), *more, processes=2)
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["processes"] == 2 and facts["sampled"] < 7
    several, _ = read_npz(tmp_path / "several")
    assert several.name == path.name and several.read_bytes() == path.read_bytes()
    logs = sorted(log.name.split(".")[-2] for log in (tmp_path / "several").glob("*.log"))
    assert logs == ["rank0", "rank1"]


def test_another_model_of_the_same_name_makes_another_result(files, tmp_path):
    shutil.copy(files / "model-4.safetensors", tmp_path / "model-4.safetensors")
    shutil.copy(files / "ae.safetensors", tmp_path / "ae.safetensors")
    arguments = [str(a) for a in sample_arguments(tmp_path, tmp_path / "out", 4)]
    original_cli.sample_parallel(arguments)
    network = weights_file.load_model(tmp_path / "model-4.safetensors")
    small.randomize(network, 2)
    weights_file.save(tmp_path / "model-4.safetensors", network)
    original_cli.sample_parallel(arguments)
    first, second = (np.load(path)["arr_0"] for path in sorted((tmp_path / "out").glob("*.npz")))
    assert not np.array_equal(first, second)
