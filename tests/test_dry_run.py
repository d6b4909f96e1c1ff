"""`bitdance train --model` and `--dry-run`: the published recipes, and what a run will need before it starts."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import pytest
import small
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bitdance.cli import original_cli
from bitdance.cli import train as command
from bitdance.cli.main import call, main
from bitdance.config import RELEASED_MODELS, AutoencoderConfig
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.transformer import BitDance
from bitdance.training import estimate
from bitdance.training.flops import step_flops
from bitdance.training.losses import BitDanceLoss
from bitdance.training.train_config import LossConfig
from bitdance.weights import weights_file

NEEDED = ["--data-path", "/path/to/imagenet/train/", "--autoencoder", "models/BitDance-ImageNet/ae_d16c32.pt"]
TINY = [
    "--image-size", "16", "--dim", "64", "--n-layer", "2", "--head-dim", "64", "--head-layers", "2", "--head-ada-ln",
    "1", "--cls-token-num", "2", "--global-batch-size", "4", "--num-workers", "1", "--ema", "0.9", "--device", "cpu",
]  # fmt: skip


# ------------------------------------------------------------ recipes


@pytest.fixture
def resolved(monkeypatch):
    """A function -> what `train_model` would be called with by it."""
    got: dict[str, Any] = {}

    def train_model(run, sizes, loss, autoencoder_path, device=None, **others):
        got.update(run=run, sizes=sizes, loss=loss, autoencoder=autoencoder_path, device=device, **others)

    monkeypatch.setattr("bitdance.training.setup.train_model", train_model)

    def parse(function, arguments: list[str]) -> dict[str, Any]:
        got.clear()
        function(arguments)
        return dict(got)

    return parse


@pytest.mark.parametrize("name", RELEASED_MODELS)
def test_a_recipe_is_the_original_s_command(resolved, name):
    folder = f"results_bitdance_{name.lower().replace('-', '_')}"
    script, arguments = small.script_and_arguments(small.published_commands("training")[name])
    assert folder in arguments
    theirs = resolved(small.LAUNCHERS[script], arguments)
    ours = resolved(command.main, ["--model", name, *NEEDED, "--results-dir", folder])
    for part in ("run", "sizes", "loss", "autoencoder"):
        assert ours[part] == theirs[part], part
    assert ours["run"].lr == 6e-4 and not ours["dry_run"]


@pytest.mark.parametrize("spelled", ["BitDance-L-1X", "l-1x"])
def test_a_flag_wins_over_the_recipe(resolved, spelled):
    flags = ["--lr", "1e-4", "--no-compile", "--perturb-rate", "0.2", "--dim", "512", "--results-dir", "here"]
    got = resolved(command.main, [*flags, f"--model={spelled}", *NEEDED])
    run, sizes, loss = got["run"], got["sizes"], got["loss"]
    assert (run.lr, run.compile, run.epochs, str(run.results_dir)) == (1e-4, False, 800, "here")
    assert (sizes.dim, sizes.n_layer, loss.perturb_rate) == (512, 32, 0.2)
    last = resolved(command.main, ["--model", "B-4X", *NEEDED, "--model", "B-16X"])
    assert last["sizes"].parallel_num == 16


def test_without_a_recipe_defaults_are_as_before(resolved):
    got = resolved(command.main, NEEDED)
    assert (got["run"].epochs, got["run"].lr, got["sizes"].num_classes) == (400, 3e-4, None)
    assert got["loss"] == LossConfig()


@pytest.mark.parametrize(("wrong", "near"), [("B-2X", "B-"), ("L-1", "L-1X"), ("BitDance-H1X", "H-1X"), ("unet", "")])
def test_an_unknown_recipe_is_a_sentence(capsys, wrong, near):
    with pytest.raises(SystemExit) as stop:
        call(command.main, ["--model", wrong, *NEEDED])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and f"no recipe {wrong!r}" in said
    assert "B-1X, B-4X, B-16X, L-1X, H-1X" in said and (f"did you mean {near}" in said) == bool(near)


def test_what_a_recipe_leaves_open_must_be_given(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--model", "B-1X"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "--data-path" in said and "--autoencoder" in said


def test_help_shows_the_recipe(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--model", "H-1X", "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "1280" in said and "0.9999" in said


# ------------------------------------------------------------ dry run


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("dry")
    small.save_pair(folder)
    small.pictures(folder / "pictures")
    return folder


def arguments(place: pathlib.Path, results: pathlib.Path, *others: object) -> list[str]:
    fixed = ["--data-path", place / "pictures", "--autoencoder", place / "autoencoder.safetensors", *TINY]
    return ["train", *map(str, [*fixed, "--results-dir", results, *others])]


def foreseen(capsys, *command_line: Any) -> tuple[str, dict[str, Any]]:
    main(arguments(*command_line, "--dry-run"))
    said = capsys.readouterr().out
    return said, json.loads(said.splitlines()[-1])


def everything(folder: pathlib.Path) -> dict[pathlib.Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_it_says_what_a_run_needs_and_writes_nothing(place, tmp_path, capsys):
    before = everything(place)
    said, facts = foreseen(capsys, place, tmp_path / "run", "--epochs", 5, "--keep-epochs", 2, "--keep-checkpoints", 3)
    assert everything(place) == before and not list(tmp_path.iterdir())
    for word in ("weights", "gradients", "moments", "average", "autoencoder", "activations", "checkpoint", "images/s"):
        assert word in said
    network = small.model()
    count = sum(value.numel() for value in network.parameters())
    fixed = sum(value.numel() for value in small.autoencoder().parameters())
    memory = facts["memory"]
    assert facts["parameters"] == count
    assert (memory["weights"], memory["gradients"], memory["moments"]) == (4 * count, 4 * count, 8 * count)
    assert (memory["average"], memory["snapshot"], memory["autoencoder"]) == (4 * count, 16 * count, 4 * fixed)
    parts = ("weights", "gradients", "moments", "average", "autoencoder", "activations")
    assert memory["step"] == sum(memory[part] for part in parts)
    assert facts["checkpoint_bytes"] == 16 * count
    assert facts["disk_bytes"] == 3 * 16 * count + (2 + 1) * 8 * count  # epochs 2 and 4, and the finished weights
    assert (facts["steps"], facts["images"], facts["fits"], facts["device"]) == (15, 60, True, "cpu")
    assert facts["seconds"] == pytest.approx(15 * facts["seconds_per_step"]) and facts["seconds"] > 0
    objective = BitDanceLoss(network, small.autoencoder(), LossConfig(), 0)
    assert facts["step_flops"] == step_flops(objective, 4, 16, encodes=True)


def test_without_an_average_there_is_none(place, tmp_path, capsys):
    _, facts = foreseen(capsys, place, tmp_path / "run", "--ema", -1)
    assert facts["memory"]["average"] == 0 and facts["checkpoint_bytes"] == 12 * facts["parameters"]


def test_less_memory_by_parts_and_by_computing_twice(place, tmp_path, capsys):
    def activations(*flags: object) -> int:
        _, facts = foreseen(capsys, place, tmp_path / "run", "--global-batch-size", 8, *flags)
        return int(facts["memory"]["activations"])

    whole = activations()
    assert activations("--accumulate", 4) < 0.6 * whole
    assert activations("--grad-checkpointing") < whole


def test_a_checkpoint_is_as_large_as_was_said(place, tmp_path, capsys):
    _, facts = foreseen(capsys, place, tmp_path / "run", "--max-steps", 1)
    main(arguments(place, tmp_path / "run", "--max-steps", 1))
    (path,) = (tmp_path / "run").glob("checkpoint-*")
    assert facts["checkpoint_bytes"] < path.stat().st_size < facts["checkpoint_bytes"] + 50_000


def test_a_training_step_after_it_is_the_same(place, tmp_path, capsys):
    """Nothing that it does lasts, whether the folder is new or not."""
    main(arguments(place, tmp_path / "run", "--max-steps", 2))
    before = everything(tmp_path)
    capsys.readouterr()
    _, facts = foreseen(capsys, place, tmp_path / "run", "--max-steps", 3)
    assert everything(tmp_path) == before and facts["steps"] == 1


def test_one_that_does_not_fit_says_what_helps(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(estimate, "_free_memory", lambda device: 0)
    said, facts = foreseen(capsys, place, tmp_path / "run")
    assert not facts["fits"] and facts["seconds_per_step"] is None
    for word in ("does not fit", "`accumulate`", "`grad_checkpointing`", "bitdance encode"):
        assert word in said


WRONG = [
    (["--global-batch-size", "13"], "fewer than one batch"),
    (["--accumulate", "3"], "--accumulate 3 does not divide"),
    (["--num-classes", "2"], "more than --num-classes 2"),
    (["--image-size", "18"], "--image-size 18"),
    (["--data-path", "nowhere"], "nowhere"),
    (["--autoencoder", "nothing.pt"], "nothing.pt"),
    (["--results-dir", __file__], "cannot make the folder"),
]


@pytest.mark.parametrize(("flags", "sentence"), WRONG, ids=[sentence for _, sentence in WRONG])
@pytest.mark.parametrize("dry", [False, True])
def test_it_refuses_what_training_refuses(place, tmp_path, capsys, flags, sentence, dry):
    with pytest.raises(SystemExit) as stop:
        main([*arguments(place, tmp_path / "run", *flags), *(["--dry-run"] if dry else [])])
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and sentence in said[-1] and not (tmp_path / "run").exists()


def test_a_folder_of_another_run_is_refused(place, tmp_path, capsys):
    main(arguments(place, tmp_path / "run", "--max-steps", 1))
    with pytest.raises(SystemExit) as stop:
        main([*arguments(place, tmp_path / "run", "--lr", 1e-5), "--dry-run"])
    assert stop.value.code == 2 and "belongs to another run" in capsys.readouterr().err


def test_the_launchers_have_it_too(tmp_path, capsys):
    network = small.autoencoder(config=AutoencoderConfig(widths=(32,) * 5, blocks=1, bits=8))
    weights_file.save(tmp_path / "ae.safetensors", network)
    small.pictures(tmp_path / "pictures", classes=2, each=4, side=64)
    flags = [
        *("--model", "BitDance-Tiny", "--image-size", "64", "--num-classes", "2", "--global-batch-size", "4"),
        *("--trained-vae", str(tmp_path / "ae.safetensors"), "--data-path", str(tmp_path / "pictures")),
        *("--results-dir", str(tmp_path / "run"), "--dry-run"),
    ]
    before = everything(tmp_path)
    original_cli.train_parallel(flags)
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["seconds_per_step"] > 0 and everything(tmp_path) == before


def test_the_largest_model_needs_no_memory_to_be_described():
    """Of H-1X, 4 GB of weights, nothing is made; activations grow with the batch as a straight line."""
    config = dataclasses.replace(RELEASED_MODELS["H-1X"].config, n_layer=2)
    sample = torch.zeros((1, 256, 256, 3), dtype=torch.uint8)
    with FakeTensorMode():
        autoencoder = Autoencoder(AutoencoderConfig(widths=(32,) * 5, blocks=1))
        objective = BitDanceLoss(BitDance(config), autoencoder, LossConfig(), 0)
        one, two, three = (estimate._step_bytes(objective, n, sample, 2, True) for n in (64, 128, 192))
    assert three - two == pytest.approx(two - one, rel=0.01)
