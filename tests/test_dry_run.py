"""`bitdance train --recipe` and `--dry-run`: the published recipes, and what a run needs before it starts."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import types
from typing import Any

import pytest
import small
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bitdance.cli import original_cli
from bitdance.cli import train as command
from bitdance.cli.main import call, main
from bitdance.config import RELEASED_MODELS, AutoencoderConfig
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.transformer import BitDance
from bitdance.training import automatic, estimate
from bitdance.training.discriminator import PatchDiscriminator
from bitdance.training.flops import step_flops
from bitdance.training.losses import AutoencoderLoss, BitDanceLoss
from bitdance.training.perceptual import PerceptualLoss
from bitdance.training.train_config import AutoencoderLossConfig, LossConfig
from bitdance.weights import weights_file

NEEDED = ["--data-path", "/path/to/imagenet/train/", "--autoencoder", "models/BitDance-ImageNet/ae_d16c32.pt"]
TINY = [
    "--image-size", "16", "--dim", "64", "--n-layer", "1", "--head-dim", "64", "--head-layers", "1", "--head-ada-ln",
    "1", "--cls-token-num", "2", "--batch-size", "4", "--num-workers", "1", "--ema", "0.9", "--device", "cpu",
    "--epochs", "1",
]  # fmt: skip


# ------------------------------------------------------------ recipes


@pytest.fixture
def resolved(monkeypatch):
    """A function that parses a command line and returns the arguments of `train_model`."""
    got: dict[str, Any] = {}

    def train_model(run, sizes, loss, autoencoder, device=None, threads=None, **others):
        got.update(run=run, sizes=sizes, loss=loss, autoencoder=autoencoder, device=device, **others)

    monkeypatch.setattr("bitdance.training.setup.train_model", train_model)

    def parse(function, arguments: list[str]) -> dict[str, Any]:
        got.clear()
        function(arguments)
        return dict(got)

    return parse


@pytest.mark.parametrize("name", RELEASED_MODELS)
def test_a_recipe_equals_the_original_command(resolved, name):
    folder = f"results_bitdance_{name.lower().replace('-', '_')}"
    script, arguments = small.script_and_arguments(small.published_commands("training")[name])
    original = resolved(small.LAUNCHERS[script], arguments)
    found = resolved(command.main, ["--recipe", name, *NEEDED, "--output", folder])
    for part in ("run", "sizes", "loss", "autoencoder"):
        assert found[part] == original[part], part
    run, sizes, release = found["run"], found["sizes"], RELEASED_MODELS[name]
    assert (str(run.output), str(run.data_path)) == (folder, "/path/to/imagenet/train")
    assert (run.epochs, run.lr, run.batch_size, run.ema) == (800, 6e-4, 1024, 0.9999)
    assert found["loss"].perturb_rate == release.perturb_rate and not found["dry_run"]
    for field in ("dim", "n_layer", "head_dim", "head_layers", "head_ada_ln", "parallel_num", "cls_token_num"):
        assert getattr(sizes, field) == getattr(release.config, field), field


@pytest.mark.parametrize("spelled", ["BitDance-L-1X", "l-1x"])
def test_flags_override_the_recipe(resolved, spelled):
    flags = ["--lr", "1e-4", "--no-compile", "--perturb-rate", "0.2", "--dim", "512", "--output", "here"]
    got = resolved(command.main, [*flags, f"--recipe={spelled}", *NEEDED])
    run, sizes, loss = got["run"], got["sizes"], got["loss"]
    assert (run.lr, run.compile, run.epochs, str(run.output)) == (1e-4, False, 800, "here")
    assert (sizes.dim, sizes.n_layer, loss.perturb_rate) == (512, 32, 0.2)
    last = resolved(command.main, ["--recipe", "B-4X", *NEEDED, "--recipe", "B-16X"])
    assert last["sizes"].parallel_num == 16


@pytest.mark.parametrize(("wrong", "near"), [("B-2X", "B-"), ("L-1", "L-1X"), ("BitDance-H1X", "H-1X"), ("unet", "")])
def test_an_unknown_recipe(capsys, wrong, near):
    with pytest.raises(SystemExit) as stop:
        call(command.main, ["--recipe", wrong, *NEEDED])
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.count("\n") == 1 and f"no recipe {wrong!r}" in text
    assert "B-1X, B-4X, B-16X, L-1X, H-1X" in text and (f"did you mean {near}" in text) == bool(near)


# ------------------------------------------------------------ dry run


@pytest.fixture(autouse=True)
def few_repetitions(monkeypatch):
    monkeypatch.setattr(estimate, "REPEAT_SECONDS", 0.0)
    monkeypatch.setattr(automatic, "TRIAL_SECONDS", 0.0)


@pytest.fixture
def untimed(monkeypatch):
    """Without the measured steps."""
    monkeypatch.setattr(estimate, "measure_time", lambda *arguments: None)


def arguments(place: pathlib.Path, output: pathlib.Path, *others: object) -> list[str]:
    fixed = ["--data-path", place / "pictures", "--autoencoder", place / "autoencoder.safetensors", *TINY]
    return ["train", *map(str, [*fixed, "--output", output, *others])]


def dry_run(capsys, *command_line: Any) -> tuple[str, dict[str, Any]]:
    main(arguments(*command_line, "--dry-run"))
    text = capsys.readouterr().out
    return text, json.loads(text.splitlines()[-1])


def everything(folder: pathlib.Path) -> dict[pathlib.Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_it_prints_what_a_run_needs_and_writes_nothing(place, tmp_path, capsys):
    before = everything(place)
    text, facts = dry_run(capsys, place, tmp_path / "run", "--epochs", 5, "--keep-epochs", 2, "--keep-checkpoints", 3,
                          "--parallel-num", 1, "--optimizer", "adamw")  # fmt: skip
    assert everything(place) == before and not list(tmp_path.iterdir())
    for words in ("weights", "gradients", "optimizer", "ema", "frozen", "activations", "checkpoint",
                  "TFLOPs per step", "images/s"):  # fmt: skip
        assert words in text
    network = small.model(n_layer=1, head_layers=1)
    count = sum(value.numel() for value in network.parameters())
    frozen = sum(value.numel() for value in small.autoencoder().parameters())
    memory = facts["memory"]
    assert facts["parameters"] == count
    assert (memory["weights"], memory["gradients"], memory["optimizer"]) == (4 * count, 4 * count, 8 * count)
    assert (memory["ema"], memory["checkpoint"], memory["frozen"]) == (4 * count, 16 * count, 4 * frozen)
    parts = ("weights", "gradients", "optimizer", "ema", "frozen", "activations")
    assert memory["step"] == sum(memory[part] for part in parts)
    assert facts["checkpoint_bytes"] == 16 * count
    # Three checkpoints and one that is being written; the weights of epochs 2 and 4, and the final ones.
    assert facts["disk_bytes"] == (3 + 1) * 16 * count + (2 + 1) * 4 * count
    assert f"disk         {16 * count / 1e6:.2f} MB per checkpoint, " in text and " 0.00 GB" not in text
    assert (facts["steps"], facts["images"], facts["fits"], facts["device"]) == (15, 60, True, "cpu")
    assert facts["seconds"] == pytest.approx(15 * facts["seconds_per_step"]) and facts["seconds"] > 0
    objective = BitDanceLoss(network, small.autoencoder(), LossConfig(), 0)
    assert facts["step_flops"] == step_flops(objective, 4, 16, encodes=True)


def test_without_ema(place, tmp_path, capsys, untimed):
    _, facts = dry_run(capsys, place, tmp_path / "run", "--ema", -1, "--optimizer", "adamw")
    assert facts["memory"]["ema"] == 0 and facts["checkpoint_bytes"] == 12 * facts["parameters"]


def test_microbatches_and_grad_checkpointing_need_less_memory(place, tmp_path, capsys, untimed):
    def activations(*flags: object) -> int:
        _, facts = dry_run(
            capsys, place, tmp_path / "run", "--batch-size", 8, "--n-layer", 2, "--head-layers", 2, *flags
        )
        return int(facts["memory"]["activations"])

    whole = activations()
    assert activations("--accumulate", 4) < 0.6 * whole
    assert activations("--grad-checkpointing") < whole


def test_a_resumed_run_counts_the_steps_left_and_nothing_is_changed(
    place, tmp_path, capsys, untimed, quick_previews, refused
):
    """Not even a damaged checkpoint, whose step is taken from its name."""
    _, facts = dry_run(capsys, place, tmp_path / "run", "--max-steps", 2)
    assert facts["steps"] == 2
    main(arguments(place, tmp_path / "run", "--epochs", 2, "--save-every", 4))
    newest = tmp_path / "run" / "checkpoint-0000006.safetensors"
    assert facts["checkpoint_bytes"] < newest.stat().st_size < facts["checkpoint_bytes"] + 50_000
    newest.write_bytes(b"damaged")
    (tmp_path / "run" / "checkpoint-0000040 (copy).safetensors").write_bytes(b"")
    before = everything(tmp_path)
    capsys.readouterr()
    for flags, steps in ((["--epochs", 2, "--max-steps", 3], 0), (["--epochs", 4], 6)):
        _, facts = dry_run(capsys, place, tmp_path / "run", *flags)
        assert (facts["steps"], facts["images"]) == (steps, 4 * steps)
    assert "belongs to a run with other settings (--lr was" in refused(
        main, [*arguments(place, tmp_path / "run", "--epochs", 2, "--lr", 1e-5), "--dry-run"]
    )
    assert everything(tmp_path) == before


def test_a_run_that_does_not_fit_says_what_helps(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(estimate, "_free_memory", lambda device: 0)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=0))
    text, facts = dry_run(capsys, place, tmp_path / "run")
    assert not facts["fits"] and facts["seconds_per_step"] is None
    for word in ("does not fit into memory", "`accumulate`", "`grad_checkpointing`", "bitdance encode",
                 "disk of", "`keep_checkpoints`"):  # fmt: skip
        assert word in text


class Stages(nn.Module):
    """Stands in for the network of a perceptual loss."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 1, bias=False).requires_grad_(False)

    def stages(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.conv(x)]


def test_an_autoencoder_has_a_dry_run_too(place, tmp_path, capsys, monkeypatch):
    """With a discriminator, a perceptual loss and a frozen encoder, which count where they need memory."""
    perceptual = PerceptualLoss(Stages(), [torch.ones(10)])
    monkeypatch.setattr("bitdance.training.setup.load_perceptual_loss", lambda *arguments: perceptual)
    network = small.autoencoder()
    encoder, decoder, discriminator = (
        sum(value.nbytes for value in part.parameters())
        for part in (network.encoder, network.decoder, PatchDiscriminator(8, 1))
    )
    settings = {"image_size": 16, "bits": 8, "blocks": 1, "batch_size": 4, "num_workers": 1, "ema": 0.9,
                "data_path": place / "pictures", "output": tmp_path / "run", "device": "cpu"}  # fmt: skip
    fixed = ["train-autoencoder", *small.flags(settings), "--widths", "32", "32", "32", "--dry-run"]
    before = everything(place)
    main(fixed)
    plain = json.loads(capsys.readouterr().out.splitlines()[-1])
    others = {"perceptual_weight": 1, "adversarial_weight": 1, "discriminator_width": 8, "discriminator_layers": 1,
              "init_from": place / "autoencoder.safetensors"}  # fmt: skip
    main([*fixed, *small.flags(others), "--decoder-only"])
    text = capsys.readouterr().out
    facts = json.loads(text.splitlines()[-1])
    assert everything(place) == before and not list(tmp_path.iterdir())
    whole = encoder + decoder
    assert plain["memory"]["gradients"] == plain["memory"]["weights"] == plain["memory"]["ema"] == whole
    assert plain["memory"]["frozen"] == 0 and facts["memory"]["frozen"] == 4 * 30
    assert facts["memory"]["weights"] == whole + discriminator
    assert facts["memory"]["gradients"] == decoder + discriminator
    assert facts["checkpoint_bytes"] == 2 * whole + discriminator + 2 * (decoder + discriminator)
    losses = (AutoencoderLoss(network, AutoencoderLossConfig(decoder_only=only)) for only in (True, False))
    decoder_flops, flops = (step_flops(loss, 4, 16, encodes=True) for loss in losses)
    assert 0.5 < decoder_flops / flops < 0.8  # without the backward pass of the encoder
    assert facts["memory"]["activations"] > 0 and facts["memory"]["preview"] > 0
    assert facts["seconds"] == pytest.approx(facts["steps"] * facts["seconds_per_step"]) and facts["steps"] == 400 * 3
    for words in ("parameters   autoencoder", "discriminator", "perceptual 0.00 M"):
        assert words in text


WRONG = [
    (["--batch-size", "13"], "fewer than one batch"),
    (["--accumulate", "3"], "--accumulate 3 does not divide"),
    (["--num-classes", "2"], "more than --num-classes 2"),
    (["--image-size", "18"], "--image-size 18"),
    (["--data-path", "nowhere"], "nowhere"),
    (["--autoencoder", "nothing.pt"], "nothing.pt"),
    (["--output", __file__], "cannot make the folder"),
]


def test_an_evaluation_of_images_leaves_no_features(place, tmp_path, capsys, untimed, monkeypatch):
    """It would read all of them, and the Inception weights."""
    monkeypatch.chdir(tmp_path)
    dry_run(capsys, place, tmp_path / "run", "--eval-every", 1, "--eval-reference", place / "pictures")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("flags", "sentence"), WRONG, ids=[sentence for _, sentence in WRONG])
@pytest.mark.parametrize("dry", [False, True])
def test_it_refuses_what_training_refuses(place, tmp_path, capsys, flags, sentence, dry):
    with pytest.raises(SystemExit) as stop:
        main([*arguments(place, tmp_path / "run", *flags), *(["--dry-run"] if dry else [])])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and sentence in lines[-1] and not (tmp_path / "run").exists()


def test_the_launchers_have_it_too(tmp_path, capsys):
    network = small.autoencoder(config=AutoencoderConfig(widths=(32,) * 5, blocks=1, bits=8))
    weights_file.save(tmp_path / "ae.safetensors", network)
    small.pictures(tmp_path / "pictures", classes=2, each=4, side=32)
    flags = [
        *("--model", "BitDance-Tiny", "--image-size", "32", "--num-classes", "2", "--global-batch-size", "4"),
        *("--trained-vae", str(tmp_path / "ae.safetensors"), "--data-path", str(tmp_path / "pictures")),
        *("--results-dir", str(tmp_path / "run"), "--dry-run"),
    ]
    before = everything(tmp_path)
    original_cli.train_parallel(flags)
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["seconds_per_step"] > 0 and everything(tmp_path) == before


def test_the_memory_of_a_large_model_is_estimated_without_using_it():
    """Of weights and activations as large as those of H-1X; activations grow linearly with the batch."""
    config = dataclasses.replace(RELEASED_MODELS["H-1X"].config, n_layer=1, head_layers=3)
    sample = torch.zeros((1, 256, 256, 3), dtype=torch.uint8)
    with FakeTensorMode():
        autoencoder = Autoencoder(AutoencoderConfig(widths=(32,) * 5, blocks=1))
        objective = BitDanceLoss(BitDance(config), autoencoder, LossConfig(), 0)
        one, two, three = (estimate._step_bytes(objective, n, sample, 1, True) for n in (64, 128, 192))
    assert three - two == pytest.approx(two - one, rel=0.01) and three > 2e10
