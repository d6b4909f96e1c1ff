"""Training without settings: those that follow from images and time, and weights that come from another model."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest
import small
import tiny
import torch
from PIL import Image

from bitdance.cli.main import main
from bitdance.data.class_names import imagenet
from bitdance.models.tokens import grid_from_tokens, tokens_from_grid
from bitdance.models.transformer import BitDance
from bitdance.runtime.errors import UserError
from bitdance.sampling.pipeline import load_pipeline
from bitdance.training import automatic
from bitdance.training.initialization import initialize_model
from bitdance.training.losses import AutoencoderLoss, BitDanceLoss
from bitdance.training.train_config import AutoencoderLossConfig, LossConfig, TrainConfig
from bitdance.training.trainer import Trainer
from bitdance.weights import weights_file
from bitdance.weights.resolve import find_weights

RUN = TrainConfig(pathlib.Path("x"))
RATE = automatic.LearningRate("muon", 4e-3, "of a test")


@pytest.fixture(autouse=True)
def short_trials(monkeypatch):
    monkeypatch.setattr(automatic, "TRIAL_SECONDS", 0.0)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("20m", 1200), ("1.5h", 5400), ("2d", 172_800)])
def test_times(text, seconds):
    assert automatic.parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "20", "m", "-5m", "0s", "20 min", "1h30m", "nan", "infh"])
def test_other_times_are_refused(text):
    with pytest.raises(UserError, match=r"such as 90s, 20m, 1\.5h or 2d"):
        automatic.parse_time(text)


@pytest.mark.parametrize("count", [1, 3, 4, 15, 100, 1000, 50_000])
@pytest.mark.parametrize("seconds", [60.0, 600.0, 36_000.0])
@pytest.mark.parametrize("step", [0.01, 1.0])
def test_a_schedule_suits_its_run(count, seconds, step):
    size = automatic.choose_batch_size(count)
    assert 1 <= size <= min(64, count) and (count < 4 or count // size >= 4)
    config, time = dataclasses.replace(RUN, batch_size=size), automatic.StepTime(step, seconds)
    run, reasons = automatic.choose_schedule(config, count, (), time, RATE, fine_tunes=True)
    steps = run.epochs * (count // size)
    assert steps * step <= max(seconds, step * max(automatic.MIN_STEPS, count // size))
    assert run.epochs <= automatic.MAX_EPOCHS
    assert 1 <= run.warmup_steps == run.decay_start <= max(1, steps // 20)
    assert run.ema**steps < 0.05 or steps < 5, "nothing of the start is left"
    assert len(reasons) == 6


@pytest.mark.parametrize(
    ("given", "epochs", "steps"),
    [({"max_steps": 40}, 5, 40), ({"epochs": 3}, 3, 27), ({"epochs": 30, "max_steps": 100}, 30, 100)],
)
def test_a_number_of_steps_is_kept_and_the_rest_follows(given, epochs, steps):
    config = dataclasses.replace(RUN, batch_size=10, **given)
    run, (_, length, *_) = automatic.choose_schedule(config, 99, given, None, RATE, fine_tunes=True)
    assert (run.epochs, run.max_steps) == (epochs, given.get("max_steps"))
    assert length == f"{steps} steps of 10 images ({steps / 9:.3g} epochs), as given"
    assert run.ema == pytest.approx(max(0.5, 1 - 10 / steps)) and run.warmup_steps == steps // 20


def test_what_is_given_is_kept_and_no_reason_speaks_of_it():
    """And what depends on it follows."""
    changes = {"lr": 2e-4, "ema": 0.9, "warmup_steps": 7, "random_crop": True, "epochs": 50}
    config = dataclasses.replace(RUN, batch_size=10, **changes)
    run, reasons = automatic.choose_schedule(config, 100, changes, None, RATE, fine_tunes=True)
    assert {name: getattr(run, name) for name in changes} == changes
    assert run.min_lr == 2e-6 and run.decay_start == 7
    both = {**changes, "min_lr": 0.0, "decay_start": 3}
    run, few = automatic.choose_schedule(dataclasses.replace(config, **both), 100, both, None, RATE, fine_tunes=True)
    assert (run.min_lr, run.decay_start) == (0.0, 3) and not any("decay" in reason for reason in few)
    assert run.optimizer == "muon" and "optimizer Muon" in reasons
    text = "\n".join(reasons)
    assert "decay of the learning rate to 2e-06" in text
    assert not any(word in text for word in ("learning rate 0", "warm-up", "EMA", "crops")), text


def test_a_given_optimizer_is_kept():
    run, reasons = automatic.choose_schedule(RUN, 1000, {"optimizer", "epochs"}, None, RATE, fine_tunes=True)
    assert run.optimizer == "adamw" and "learning rate 0.004 with AdamW: of a test" in reasons


def test_learning_rates():
    choose = automatic.choose_learning_rate
    assert choose(None, 128, True)[:2] == (("muon", 4e-3) if hasattr(torch.optim, "Muon") else ("adamw", 2e-3))
    assert choose("adamw", 128, False)[:2] == ("adamw", 2e-3)
    assert choose(None, 768, True)[:2] == ("adamw", 1e-4) and choose("muon", 768, False)[:2] == ("muon", 3e-4)


@pytest.fixture
def pictures(tmp_path) -> pathlib.Path:
    folder = small.pictures(tmp_path / "pictures")
    (folder / "class-0").rename(folder / "Horse")
    return folder


def test_a_folder_of_pictures_is_enough(pictures, tmp_path, capsys, monkeypatch, quick_previews):
    monkeypatch.setattr(automatic, "MIN_STEPS", 6)
    monkeypatch.setattr(automatic, "measure_step", lambda *arguments: 10.0)
    run = tmp_path / "run"
    command = ["train", "--data-path", str(pictures), "--output", str(run), "--time", "1s", "--device", "cpu"]
    command += ["--preview-every", "100"]
    main([*command, "--lr=2e-4", "--perturb_rate", "0.2"])
    out, err = capsys.readouterr()
    assert err.count(f"bitdance: {pictures}: 12 images of 3 classes (Horse, class-1, class-2)\n") == 1
    assert "settings that were not given:" in out
    assert "6 steps of 2 images (1 epochs), 10 s a step: the least that is of use" in out
    assert "learning rate 0" not in out and "input bits" not in out
    assert "starts from demo; 2 of 3 classes are new and start from the embedding of no class." in err
    scale = load_pipeline("demo", device="cpu").defaults.cfg_scale
    assert load_pipeline(run, device="cpu").defaults.cfg_scale == scale, "that of the model to start from"
    stored = json.loads((run / "settings.json").read_text())
    assert stored["train"].items() >= {"eval_cfg_scale": scale, "lr": 2e-4, "epochs": 1, "ema": 0.5}.items()
    assert stored["model"]["class_names"] == ["Horse", "class-1", "class-2"]
    with Image.open(run / "samples.png") as image:
        assert image.width > 13 * 64 and image.height > 3 * 64
    capsys.readouterr()

    def fail(*arguments):
        raise AssertionError("a run that goes on is not measured again")

    monkeypatch.setattr(automatic, "measure_step", fail)
    main(command)
    err = capsys.readouterr().err
    assert "--time does not count, --epochs extends it" in err and "nothing is left to do" in err
    for name in ("_write_preview", "_write_comparison"):
        monkeypatch.setattr(Trainer, name, lambda *_: None)  # they were written already
    main(["train", "--data-path", str(pictures), "--output", str(run), "--device", "cpu", "--epochs", "2",
          "--max-steps", "7"])  # fmt: skip
    assert "epochs extended from 1 to 2" in capsys.readouterr().err
    assert json.loads((run / "settings.json").read_text())["train"]["epochs"] == 2


def test_the_time_of_a_step_is_measured():
    of_model = BitDanceLoss(small.model(), small.autoencoder(), LossConfig(), 0)
    of_autoencoder = AutoencoderLoss(small.autoencoder(), AutoencoderLossConfig())
    for objective, shape in ((of_model, (2, 16, 16, 3)), (of_model, (2, 16, 1)), (of_autoencoder, (2, 16, 16, 3))):
        assert 0 < automatic.measure_step(objective, shape, torch.device("cpu"), in_bf16=False) < 10


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--time", "5m", "--epochs", "3"], "--time sets the number of epochs: leave out either it or --epochs"),
        (["--time", "soon"], "--time soon is invalid: give a number and a unit"),
        (["--time", ""], "--time is empty: give a value."),
        (["--recipe", "B-1X", "--autoencoder", "demo", "--time", "5m"], "--time goes without --recipe: set --epochs"),
        (["--time", "-5m"], "--time -5m is invalid: give a number and a unit"),
        (["--max-steps", "9" * 400], "is invalid: it must be at most 1000000000000."),
        (["--batch_size", "13"], "holds 12 images, fewer than one batch of --batch-size 13: lower it or add images."),
        (["--init-from", "nothing"], "there is no model 'nothing'"),
        (["--init-from", "demo", "--epochs", "1", "--dim", "64"], "has other sizes than this model (dim 128, not 64)"),
    ],
)
def test_what_does_not_go_together(pictures, tmp_path, refused, more, sentence):
    assert sentence in refused(
        main, ["train", "--data-path", str(pictures), "--output", str(tmp_path / "run"), "--device", "cpu", *more]
    )
    assert not (tmp_path / "run").exists()


def test_the_output_folder_is_checked_before_anything_is_measured(pictures, tmp_path, refused, monkeypatch):
    (tmp_path / "file").write_text("")
    small.save_pair(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "settings.json").write_text('{"run": {}, "train": {}, "loss": {}, "autoencoder": {}}')
    monkeypatch.setattr(automatic, "measure_step", lambda *arguments: pytest.fail("it was measured"))
    for name, sentence in (("file", "file: it is a file; choose another place."), ("other", "another kind of run")):
        assert sentence in refused(main, ["train", "--data-path", str(pictures), "--output", str(tmp_path / name)])


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [("model", "dim", None), ("model", "n_layer", ["a"]), ("loss", "time_mean", None), ("loss", "time_schedule", [])],
)
def test_stored_settings_of_other_types_are_damage(pictures, tmp_path, refused, section, field, value):
    stored = {"run": {"autoencoder": "demo"}, "train": {"epochs": 3, "lr": 1}, "model": {"dim": 64}, "loss": {}}
    (tmp_path / "checkpoint-0000001.safetensors").touch()
    (tmp_path / "settings.json").write_text(json.dumps({**stored, section: {field: value}}))
    assert "settings.json is damaged: restore it, or delete" in refused(
        main, ["train", "--data-path", str(pictures), "--output", str(tmp_path), "--device", "cpu"]
    )


def test_errors_of_this_program_are_not_called_damage(pictures, tmp_path, monkeypatch):
    class Broken(LossConfig):
        def __init__(self, **settings):
            raise TypeError("ours")

    stored = {"run": {"autoencoder": "demo"}, "train": {}, "model": {}, "loss": {}}
    (tmp_path / "checkpoint-0000001.safetensors").touch()
    (tmp_path / "settings.json").write_text(json.dumps(stored))
    monkeypatch.setattr("bitdance.cli.train.LossConfig", Broken)
    with pytest.raises(TypeError, match="ours"):
        main(["train", "--data-path", str(pictures), "--output", str(tmp_path), "--device", "cpu"])


def test_the_demo_autoencoder_is_fine_tuned(pictures, tmp_path, capsys):
    run = tmp_path / "run"
    command = ["train-autoencoder", "--data-path", str(pictures), "--output", str(run), "--device", "cpu"]
    main([*command, "--max-steps", "2", "--precision", "fp32"])
    out = capsys.readouterr().out
    assert "2 steps of 2 images (0.333 epochs), as given" in out
    assert "trained an autoencoder of 12 images: 2 steps" in out
    demo, trained = (weights_file.load_autoencoder(find_weights(name, "autoencoder")) for name in ("demo", run))
    assert trained.config == demo.config
    changes = [(value - demo.state_dict()[name]).abs().max().item() for name, value in trained.state_dict().items()]
    assert 0 < max(changes) < 2e-3
    main([*command, "--time", "1s"])
    assert "6 steps, the last 4 in" in capsys.readouterr().out, "it goes on with its settings to the end of the epoch"


def test_several_processes_need_a_number_of_steps(pictures, tmp_path, refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "several processes need --epochs" in refused(
        main, ["train", "--data-path", str(pictures), "--output", str(tmp_path / "run")]
    )


# ------------------------------------------------------------ weights of another model


def saved(tmp_path, p, **changes) -> tuple[BitDance, pathlib.Path]:
    model = BitDance(tiny.config(p, **changes))
    small.randomize(model, 1)
    path = tmp_path / "model.safetensors"
    weights_file.save(path, model)
    return model, path


@pytest.mark.parametrize("p", [1, 4])
def test_only_what_must_change_is_replaced(tmp_path, p):
    classes = tuple(f"class {i}" for i in range(tiny.config(p).num_classes))
    other, path = saved(tmp_path, p, class_names=classes)
    names = ("new", "Class 1", "other")
    model = BitDance(dataclasses.replace(other.config, num_classes=3, class_names=names))
    sentence = initialize_model(model, path)
    assert sentence.endswith("; 2 of 3 classes are new and start from the embedding of no class")
    table, mine = other.cls_embedding.weight, model.cls_embedding.weight
    assert torch.equal(mine, table[[-1, 1, -1, -1]])
    theirs = other.state_dict()
    kept = {name: value for name, value in model.state_dict().items() if name != "cls_embedding.weight"}
    assert kept.keys() == theirs.keys() - {"cls_embedding.weight"}
    assert all(torch.equal(value, theirs[name]) for name, value in kept.items())
    same = BitDance(other.config)
    assert initialize_model(same, path) == f"starts from {path}"
    assert all(torch.equal(value, theirs[name]) for name, value in same.state_dict().items())


def test_classes_of_a_released_model_are_known_by_their_names(tmp_path):
    """Though their files have none: of 1000 classes without names they are ImageNet's."""
    other, path = saved(tmp_path, 1, num_classes=1000)
    names = ("Golden_retriever", "n01440764", "crane", "207")  # there are two cranes, and numbers are no names
    model = BitDance(dataclasses.replace(other.config, num_classes=4, class_names=names))
    assert "2 of 4 classes are new" in initialize_model(model, path)
    assert torch.equal(model.cls_embedding.weight, other.cls_embedding.weight[[207, 0, -1, -1, -1]])
    model = BitDance(dataclasses.replace(other.config, class_names=imagenet().wordnet_ids))
    assert initialize_model(model, path) == f"starts from {path}"
    assert torch.equal(model.cls_embedding.weight, other.cls_embedding.weight)


@pytest.mark.parametrize("p", [1, 4])
def test_positions_of_another_grid_are_interpolated(tmp_path, p):
    other, path = saved(tmp_path, p)
    grid = 2 * other.config.grid
    side = other.config.grid
    rows = torch.linspace(0, 1, side)[None, None, :, None].expand(1, other.config.dim, -1, side)
    state = other.state_dict() | {"pos_for_diff.weight": tokens_from_grid(rows, other.config.patch)[0]}
    weights_file.save(path, other, state)
    model = BitDance(dataclasses.replace(other.config, grid=grid))
    assert f"to {grid} x {grid}" in initialize_model(model, path)
    found = grid_from_tokens(model.pos_for_diff.weight[None].detach(), other.config.patch)[0, 0]
    assert torch.allclose(found, found[:, :1].expand(-1, grid), atol=1e-6), "the same in each row"
    assert (found[:, 0].diff() >= 0).all() and found[0, 0] == 0 and found[-1, 0] == 1


def test_other_sizes_are_named(tmp_path):
    other, path = saved(tmp_path, 4)
    model = BitDance(dataclasses.replace(other.config, n_layer=other.config.n_layer + 1))
    with pytest.raises(UserError, match=r"has other sizes than this model \(n_layer \d, not \d\): `init_from` needs"):
        initialize_model(model, path)
