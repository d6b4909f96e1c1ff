"""What surrounds the steps of a run: checkpoints, logs, validation, previews, status, and how samples find it."""

from __future__ import annotations

import contextlib
import html.parser
import json
import os
import pathlib
import re
import shutil
import sys
import types
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import pytest
import small
import torch
from PIL import Image
from safetensors import safe_open

from bitdance.cli.main import main
from bitdance.config import ModelSizes
from bitdance.runtime import progress
from bitdance.runtime.errors import UserError
from bitdance.runtime.process_group import World
from bitdance.runtime.run_folder import exclusive
from bitdance.sampling.pipeline import load_pipeline
from bitdance.training import status
from bitdance.training.checkpointing import Checkpointer, read_newest
from bitdance.training.evaluation import Validation
from bitdance.training.losses import BitDanceLoss
from bitdance.training.optimizer import EMA
from bitdance.training.run_report import format_report
from bitdance.training.setup import train_model
from bitdance.training.train_config import LossConfig, TrainConfig
from bitdance.training.trainer import Trainer
from bitdance.weights import safetensors_files, weights_file

pytestmark = pytest.mark.usefixtures("quick_previews")

CPU = torch.device("cpu")
SIZES = ModelSizes(**small.SIZES, parallel_num=4)  # with short previews


@pytest.fixture(scope="module")
def place(place) -> pathlib.Path:
    """With held-out/ of two of the classes."""
    small.pictures(place / "held-out", each=3)
    shutil.rmtree(place / "held-out" / "class-0")
    return place


def train(place: pathlib.Path, output: pathlib.Path, loss: LossConfig | None = None, **changes: Any) -> None:
    run = small.train_config(place / "pictures", output, **changes)
    train_model(run, SIZES, loss or LossConfig(), place / "autoencoder.safetensors", "cpu")


def checkpoints(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def digest(folder: pathlib.Path) -> str:
    return weights_file.read(folder / "model.safetensors").metadata["digest"]


# ------------------------------------------------------------ checkpoints


def test_the_newest_checkpoints_are_kept_and_other_files_ignored(place, tmp_path):
    train(place, tmp_path, save_every=1, keep_checkpoints=3, max_steps=4)
    assert checkpoints(tmp_path) == [f"checkpoint-000000{step}.safetensors" for step in (2, 3, 4)]
    others = {"checkpoint-0000040 (copy).safetensors", "checkpoint-old.safetensors", "checkpoint-0000009.safetensors"}
    for name in sorted(others)[1:]:
        (tmp_path / name).write_bytes(b"of the user")
    (tmp_path / "checkpoint-0000009.safetensors").mkdir()
    train(place, tmp_path, save_every=4, max_steps=10)
    assert set(checkpoints(tmp_path)) == others | {f"checkpoint-00000{step}.safetensors" for step in ("08", "10")}
    facts = status.describe_run(tmp_path)
    assert [entry["file"] for entry in facts["checkpoints"]] == [
        "checkpoint-0000010.safetensors", "checkpoint-0000008.safetensors"
    ]  # fmt: skip


def test_samples_of_an_unfinished_run_say_so(place, tmp_path, capsys):
    train(place, tmp_path, max_steps=2)
    capsys.readouterr()
    finished = load_pipeline(tmp_path, device="cpu")
    assert "is not finished" not in capsys.readouterr().err
    (tmp_path / "model.safetensors").unlink()  # as before its last step
    unfinished = load_pipeline(tmp_path, device="cpu")
    assert f"{tmp_path} is not finished: checkpoint-0000002.safetensors is used." in capsys.readouterr().err
    for name, value in finished.model.state_dict().items():
        assert torch.equal(value, unfinished.model.state_dict()[name]), name


def test_checkpoints_by_the_clock(place, tmp_path):
    train(place, tmp_path, save_every=0, save_minutes=1e-9, keep_checkpoints=99, max_steps=3)
    assert [int(name[11:18]) for name in checkpoints(tmp_path)] == [1, 2, 3]


def test_a_checkpoint_holds_the_state_at_the_time_of_the_call(tmp_path):
    """Although it is written later, while training continues."""
    value = torch.arange(1000.0)
    checkpointer = Checkpointer(tmp_path, 2)
    for step in (1, 2, 3):
        checkpointer.save(step, {"model/a": value}, {"run": {}}, {"step": str(step)})
        value.add_(1)
    checkpointer.finish()
    assert checkpoints(tmp_path) == ["checkpoint-0000002.safetensors", "checkpoint-0000003.safetensors"]
    contents = read_newest(tmp_path, lambda _: None)
    assert contents is not None and contents.metadata["step"] == "3"
    assert torch.equal(contents.states["model"]["a"], torch.arange(1000.0) + 2)


def _resave(path: pathlib.Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> None:
    """Writes a checkpoint with other contents and right digests."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    names = ("format", "format_version", "digest", "checksum")
    own = {key: value for key, value in metadata.items() if key not in names}
    kind, config = own.pop("kind"), json.loads(own.pop("config"))
    safetensors_files.save_tensors(path, tensors, kind, config, **own)


def test_a_damaged_checkpoint_is_skipped(place, tmp_path, capsys, monkeypatch):
    """And one of other tensors or counts: the fused optimizer would write beyond the memory of a smaller tensor."""
    train(place, tmp_path / "run", save_every=1, max_steps=2)
    name, expected = "checkpoint-0000002.safetensors", digest(tmp_path / "run")
    whole = (tmp_path / "run" / name).read_bytes()
    with safe_open(tmp_path / "run" / name, "pt") as file:
        moment = next(key for key in file.keys() if key.startswith("optimizer/exp_avg_sq/"))  # noqa: SIM118
        ema = next(key for key in file.keys() if key.startswith("ema/"))  # noqa: SIM118
    one_byte = bytearray(whole)
    one_byte[-100] ^= 1
    changes = [
        lambda tensors, metadata: tensors.update({moment: tensors[moment].flatten()[:1].clone()}),
        lambda tensors, metadata: tensors.update({moment: tensors[moment].double()}),
        lambda tensors, metadata: tensors.update({f"{moment}x": tensors.pop(moment)}),
        lambda tensors, metadata: tensors.pop(ema),
        lambda tensors, metadata: metadata.pop("skipped"),
        lambda tensors, metadata: metadata.update(consecutive="-1"),
        lambda tensors, metadata: metadata.update(step="99999999"),
        lambda tensors, metadata: metadata.update(step="1"),
    ]
    monkeypatch.setattr(progress, "INTERVAL", 0.0)  # a line for each step
    for number, damage in enumerate((one_byte, whole[:-5], b"", *changes)):
        run = tmp_path / str(number)
        shutil.copytree(tmp_path / "run", run)
        _resave(run / name, damage) if callable(damage) else (run / name).write_bytes(damage)
        capsys.readouterr()
        train(place, run, max_steps=2)
        err = capsys.readouterr().err
        sentence, continues, first_step = err.splitlines()[:3]
        assert re.match(rf"bitdance: \S+{name} is .* resumes from checkpoint-0000001", sentence), number
        assert continues == f"bitdance: {run} continues after step 1; 1 are left."
        assert first_step.startswith("training: 2/2 steps") and "\r" not in err
        assert [name for name in checkpoints(run) if name.endswith("damaged")] == [f"{name}.damaged"]
        assert digest(run) == expected, number


def test_a_run_with_muon_resumes_exactly(place, tmp_path):
    for stop in (2, 3):
        train(place, tmp_path / "run", epochs=1, optimizer="muon", max_steps=stop)
    train(place, tmp_path / "whole", epochs=1, optimizer="muon")
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    contents = read_newest(tmp_path / "run", lambda _: None)
    assert contents is not None and any(name.startswith("momentum_buffer/") for name in contents.states["optimizer"])


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(place, tmp_path):
    train(place, tmp_path, save_every=2, max_steps=4)
    for path in tmp_path.glob("checkpoint-*"):
        path.write_bytes(path.read_bytes()[:-1])
    before = checkpoints(tmp_path)
    with pytest.raises(UserError, match=r"none of the 2 checkpoints in .* can be read: .*0000004\S+ is damaged"):
        train(place, tmp_path)
    assert checkpoints(tmp_path) == before


def test_files_of_earlier_runs_that_were_killed(place, tmp_path):
    """Before the first checkpoint a run starts over; temporary files are removed."""
    leftover = tmp_path / ".checkpoint-0000002.safetensors.123.0123abcd.tmp"
    leftover.write_bytes(b"half")
    (tmp_path / ".mine.tmp").write_bytes(b"keep")
    (tmp_path / "log.jsonl").write_text('{"step": 1, "time": 1.0}\n{"step": 2, "time": 2.0}\n')
    train(place, tmp_path, max_steps=3)
    assert not leftover.exists() and (tmp_path / ".mine.tmp").exists()
    assert [line["step"] for line in small.read_log(tmp_path)] == [1, 2, 3] and "loss" in small.read_log(tmp_path)[0]


def test_settings_are_recorded(place, tmp_path):
    train(place, tmp_path, LossConfig(perturb_rate=0.1), max_steps=2)
    found = json.loads((tmp_path / "settings.json").read_text())
    run = found["run"]
    assert (run["kind"], run["total_steps"], run["last_step"], run["steps_per_epoch"]) == ("model", 12, 2, 3)
    assert (run["processes"], run["device"]) == (1, "cpu")
    assert found["train"]["lr"] == 3e-3 and found["train"]["data_path"] == str(place / "pictures")
    assert found["model"]["n_layer"] == 2 and found["loss"]["perturb_rate"] == 0.1
    assert found["data"]["images"] == 12 and len(found["data"]["autoencoder"]) == 64


# ------------------------------------------------------------ logs


def tear(text: str) -> str:
    return text + '{"step": 9, "loss": 0.1'


def add_nuls(text: str) -> str:
    return text + "\0" * 100


def join_lines(text: str) -> str:
    first, second = text.splitlines(keepends=True)[-2:]
    return text.removesuffix(first + second) + first.strip() + second


def add_a_later_step(text: str) -> str:
    line = json.loads(text.splitlines()[-1])
    return text + json.dumps({**line, "step": line["step"] + 1}) + "\n"  # as if killed before the next checkpoint


def test_a_damaged_log_keeps_its_other_lines(place, tmp_path, capsys):
    train(place, tmp_path, max_steps=2)
    expected, path = [1, 2], tmp_path / "log.jsonl"
    for step, damage in enumerate((tear, add_nuls, join_lines, add_a_later_step), start=3):
        path.write_text(damage(path.read_text()))
        if damage is join_lines:
            expected = expected[:-2]
        capsys.readouterr()
        main(["info", str(tmp_path)])
        assert f" of {step - 1} (epoch" in capsys.readouterr().out
        train(place, tmp_path, max_steps=step)
        expected.append(step)
        assert [line["step"] for line in small.read_log(tmp_path)] == expected
        assert status.describe_run(tmp_path)["step"] == step


def test_a_log_that_is_no_file(place, tmp_path):
    os.mkfifo(tmp_path / "log.jsonl")
    with pytest.raises(UserError, match=r"log.jsonl is not a file: delete it"):
        train(place, tmp_path, max_steps=1)


def test_a_warm_up_or_an_ema_that_is_too_long_for_the_run_is_reported(place, tmp_path, capsys):
    train(place, tmp_path / "long", epochs=1, warmup_steps=4, ema=0.999)
    err = capsys.readouterr().err
    assert "warmup_steps=4 is more than the 3 steps of the run: the learning rate stays below its peak. Set" in err
    assert (
        "ema=0.999 keeps 100% of the initial weights after 3 steps" in err and "Set it to 0.5, or train longer." in err
    )
    train(place, tmp_path / "short", epochs=1, warmup_steps=3, ema=0.3)
    train(place, tmp_path / "test", epochs=2, max_steps=1, warmup_steps=4, ema=0.3)  # which ends early, on purpose
    err = capsys.readouterr().err
    assert "warmup_steps" not in err and "ema=" not in err


def test_tensorboard_and_wandb_log_the_same_metrics(place, tmp_path, monkeypatch):
    scalars, logged, started = [], [], []

    class SummaryWriter:
        def __init__(self, log_dir, purge_step):
            started.append((log_dir, purge_step))

        def add_scalar(self, name, value, step):
            scalars.append((name, value, step))

        def close(self):
            scalars.append("closed")

    def init(**arguments):
        started.append(arguments)
        return types.SimpleNamespace(
            log=lambda values, step: logged.append((values, step)), finish=lambda: logged.append("finished")
        )

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    train(place, tmp_path, max_steps=2, tensorboard=True, wandb="bits")
    lines = small.read_log(tmp_path)
    assert [value for name, value, _ in scalars[:-1] if name == "loss"] == [line["loss"] for line in lines]
    assert scalars[-1] == "closed" and logged[-1] == "finished"
    assert [values["loss"] for values, _ in logged[:-1]] == [line["loss"] for line in lines]
    assert [step for _, step in logged[:-1]] == [1, 2]
    train(place, tmp_path, max_steps=3, tensorboard=True, wandb="bits")
    assert [entry[1] for entry in started if isinstance(entry, tuple)] == [1, 3]
    first, second = (entry for entry in started if isinstance(entry, dict))
    assert first["id"] == second["id"] and first["project"] == "bits" and first["config"]["train"]["lr"] == 3e-3


@pytest.mark.parametrize(
    ("setting", "module", "extra"),
    [({"tensorboard": True}, "torch.utils.tensorboard", "tensorboard"), ({"wandb": "x"}, "wandb", "wandb")],
)
def test_missing_packages_are_named_before_anything_is_opened(tmp_path, monkeypatch, setting, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"`{extra}` needs a package: pip install 'bitdance\[{extra}\]'"):
        TrainConfig(tmp_path / "nothing", **setting)


def test_steps_do_not_wait_for_the_device(place, tmp_path, monkeypatch):
    """Between lines of the log no tensor is read."""
    calls: list[str] = []

    def counted(name):
        original = getattr(torch.Tensor, name)

        def call(self, *arguments):
            calls.append(name)
            return original(self, *arguments)

        return call

    for name in ("item", "tolist", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))

    def count(steps: int) -> int:
        calls.clear()
        train(place, tmp_path / str(steps), max_steps=steps, log_every=100, save_every=0, preview_every=0)
        return len(calls)

    # Each of the two threads that read images lists their indices, on the CPU, once per step.
    assert count(8) - count(4) == 2 * (8 - 4)


@pytest.mark.gpu
def test_steps_do_not_wait_for_the_gpu(place, tmp_path, monkeypatch):
    original = Trainer.train_step

    def watched(trainer, batch, lr):
        torch.cuda.set_sync_debug_mode("error" if trainer.step else "default")  # the first step initializes libraries
        try:
            return original(trainer, batch, lr)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "train_step", watched)
    run = small.train_config(place / "pictures", tmp_path, max_steps=5, log_every=5, accumulate=2, compile=False)
    train_model(run, SIZES, LossConfig(perturb_rate=0.1), place / "autoencoder.safetensors", "cuda")
    assert small.read_log(tmp_path)[-1]["step"] == 5


# ------------------------------------------------------------ validation and previews


@pytest.mark.parametrize("size", [1, 2])
def test_validation_is_deterministic_and_can_use_the_ema(place, tmp_path, size):
    """The loss is the same for any number of processes and calls; the network is left unchanged."""
    loss = LossConfig(class_dropout=0.5, perturb_rate=0.5)
    objective = BitDanceLoss(small.model(), small.autoencoder(), loss, seed=3)
    run = small.train_config(place / "pictures", tmp_path, val_path=place / "held-out", val_images=6, batch_size=2)
    classes = ("class-0", "class-1", "class-2")
    whole = Validation(objective, run, classes, World(0, 1, CPU))
    assert whole.steps == 3 and whole.loader.images.labels.tolist() == [1, 1, 1, 2, 2, 2]
    expected = whole.metrics()["val_loss"]
    assert whole.metrics()["val_loss"] == expected and objective.config == loss
    if size == 2:
        halves = []
        for rank in range(2):
            world = World(rank, 2, CPU)
            object.__setattr__(world, "mean", lambda value: value)
            halves.append(Validation(objective, run, classes, world).metrics()["val_loss"])
        assert sum(halves) / 2 == pytest.approx(expected, rel=1e-5) and halves[0] != halves[1]
        return
    # It is the loss without class dropout and perturbation.
    plain = BitDanceLoss(objective.network, objective.autoencoder, LossConfig(class_dropout=0.0), seed=3)
    assert Validation(plain, run, classes, World(0, 1, CPU)).metrics()["val_loss"] == expected
    network = objective.network
    before = [parameter.detach().clone() for parameter in network.parameters()]
    ema = EMA(network, 0.9)
    for value in ema.state.values():
        value.mul_(0.5)
    with ema.swapped_in(network):
        assert all(torch.equal(a, 0.5 * b) for a, b in zip(network.parameters(), before, strict=True))
        assert whole.metrics()["val_loss"] != expected
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), before, strict=True))


def test_validation_does_not_change_the_training(place, tmp_path):
    train(place, tmp_path / "plain", epochs=2)
    train(place, tmp_path / "validated", epochs=2, val_path=place / "held-out", val_every=2, val_images=4)
    plain, validated = small.read_log(tmp_path / "plain"), small.read_log(tmp_path / "validated")
    assert [line["loss"] for line in plain] == [line["loss"] for line in validated]
    assert [line["step"] for line in validated if "val_loss" in line] == [2, 4, 6]
    assert validated[-1]["val_loss"] < validated[1]["val_loss"]
    assert digest(tmp_path / "plain") == digest(tmp_path / "validated")


def test_validation_images_that_do_not_fit_the_training(place, tmp_path):
    small.pictures(tmp_path / "others", classes=4)
    with pytest.raises(UserError, match=r"has the class 'class-3', which the training images do not have"):
        train(place, tmp_path / "run", val_path=tmp_path / "others")
    with pytest.raises(UserError, match="has no split 'test'"):
        train(place, tmp_path / "run", val_path=place / "pictures")


def test_previews_show_fixed_classes_and_noise(place, tmp_path):
    train(place, tmp_path, max_steps=2, preview_every=1, lr=0.0)
    first, second = ((tmp_path / f"preview-000000{step}.png").read_bytes() for step in (1, 2))
    assert first == second  # the weights did not change
    with Image.open(tmp_path / "preview-0000001.png") as preview:
        assert preview.height == 3 * (2 * 16 + 2) + 2  # a row for each class, with its name at the left
        assert preview.width > 5 * (2 * 16 + 2) + 2 + 20


# ------------------------------------------------------------ status


def test_info_shows_a_run(place, tmp_path, capsys):
    run = tmp_path / "run"
    train(place, run, save_every=5, keep_checkpoints=3, val_path=place / "held-out", val_every=5)
    damaged = run / "checkpoint-0000010.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-3])
    (run / "report.html").unlink()
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    capsys.readouterr()
    main(["info", str(run)])
    out = capsys.readouterr().out
    for words in ("step                  12 of 12 (epoch 4.00)", "checkpoint-0000012.safetensors, 4.4 MB, complete",
                  "checkpoint-0000010.safetensors, 4.4 MB, damaged", "none, finished", "model.safetensors",
                  "skipped steps         0", "val_loss", "images/s, waiting",
                  f"report: {run / 'report.html'}"):  # fmt: skip
        assert words in out, out
    main(["info", str(run), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["step"] == 12 and facts["seconds_left"] == 0 and facts["skipped"] == 0
    assert [entry["complete"] for entry in facts["checkpoints"]] == [True, False, True]
    after = {path.name: path.read_bytes() for path in run.iterdir() if path.name != "report.html"}
    assert after == before  # nothing was changed or renamed


def test_info_says_that_a_run_has_stopped(place, tmp_path, capsys):
    train(place, tmp_path, max_steps=2, log_every=2, save_every=3)
    (tmp_path / "model.safetensors").unlink()
    for state in ("running", "stopped"):
        opened = exclusive(tmp_path, World(0, 1, CPU)) if state == "running" else contextlib.nullcontext()
        with opened:
            capsys.readouterr()
            main(["info", str(tmp_path)])
        out = capsys.readouterr().out
        assert ("run the same command again to resume" in out, "time left" in out) == (
            state == "stopped",
            state == "running",
        )
    # Steps after the last line of the log, and the digests of the older checkpoints, which need a long time.
    train(place, tmp_path, max_steps=7, log_every=5, save_every=3)
    lines = small.read_log(tmp_path)
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines if line["step"] <= 5))
    newest, older = (tmp_path / f"checkpoint-000000{step}.safetensors" for step in (7, 6))
    contents = bytearray(older.read_bytes())
    contents[-100] ^= 1
    older.write_bytes(contents)
    facts = status.describe_run(tmp_path)
    assert facts["step"] == 7 and facts["state"] == "finished"
    assert [entry["complete"] for entry in facts["checkpoints"]] == [True, True]
    shutil.copy(older, newest)
    assert [entry["complete"] for entry in status.describe_run(tmp_path)["checkpoints"]] == [False, True]


def test_a_complete_run_in_a_folder_that_cannot_be_written(place, tmp_path, capsys, monkeypatch):
    train(place, tmp_path, max_steps=2)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    capsys.readouterr()
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere but on read-only disks
    train(place, tmp_path, max_steps=2)
    assert capsys.readouterr().out == f"{tmp_path / 'model.safetensors'}: the run is complete.\n"
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    with pytest.raises(UserError, match="`lr` was"):
        train(place, tmp_path, max_steps=2, lr=1.0)


def test_info_of_damaged_settings(place, tmp_path):
    train(place, tmp_path, max_steps=1)
    path = tmp_path / "settings.json"
    good = path.read_text()
    for change in (
        {"run": {"kind": "../../x"}}, {"run": {"last_step": 10**400}}, {"run": {"last_step": "many"}}, {"train": []},
        {"run": {"steps_per_epoch": 0}}, {"train": {"batch_size": 1e999}}, "[" * 100_000, "\0", "{}",
    ):  # fmt: skip
        stored = json.loads(good)
        for name, values in change.items() if isinstance(change, dict) else ():
            stored[name] = {**stored[name], **values} if values else values
        path.write_text(change if isinstance(change, str) else json.dumps(stored))
        with pytest.raises(UserError, match="holds no training run"):
            status.describe_run(tmp_path)


@pytest.mark.parametrize("key", ["loss", "step", "time", "val_loss", "images_per_second", "mfu", "eval_fid", "skipped"])
def test_values_of_a_damaged_log(tmp_path, key):
    line = {"step": 1, "time": 1.0, "loss": 1.0, "images_per_second": 1.0, "waiting": 0.1}
    settings = {"run": {"kind": "model", "last_step": 5, "steps_per_epoch": 2}, "train": {"batch_size": 3}}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    text = json.dumps(line) + "\n"
    for value in ("text", [1], {}, 10**400, 1e999, float("nan"), 1e99, True):
        for others in ({}, {"loss": value, "images_per_second": value}, {"waiting": None}):
            text += json.dumps({**line, **others, key: value}) + "\n"
            (tmp_path / "log.jsonl").write_text(text)
            assert "step " in status.format_run(status.describe_run(tmp_path))
    page = format_report(tmp_path, status.describe_run(tmp_path))
    for svg in re.findall("<svg.*?</svg>", page):
        assert "nan" not in svg and "inf" not in svg
        ElementTree.fromstring(svg)


def test_status_of_a_run_that_has_just_started(place, tmp_path):
    train(place, tmp_path, max_steps=1)
    for path in [*tmp_path.glob("*.safetensors"), tmp_path / "log.jsonl"]:
        path.unlink()
    facts = status.describe_run(tmp_path)
    assert (facts["step"], facts["loss"], facts["weights"], facts["checkpoints"]) == (0, None, None, [])
    assert "none yet" in status.format_run(facts)
    assert "nothing is logged yet" in format_report(tmp_path, facts)
    with pytest.raises(UserError, match="holds no training run"):
        status.describe_run(place)


def test_the_report_names_the_whole_command(place, tmp_path):
    """A resumed run does not take all settings from its folder."""
    train(place, tmp_path, max_steps=1)
    settings = json.loads((tmp_path / "settings.json").read_text())
    settings["run"]["command"] = "bitdance train --data-path d --accumulate 2"
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert "--accumulate 2 --max-steps 2</pre>" in format_report(tmp_path, status.describe_run(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "log.jsonl").write_text("")
    settings["train"]["max_steps"] = None
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    facts = {**status.describe_run(tmp_path), "state": "finished"}
    epochs = 2 * settings["train"]["epochs"]
    assert f"--accumulate 2 --epochs {epochs}</pre>" in format_report(tmp_path, facts)


def chart(page: str, title: str) -> list[list[list[float]]]:
    """The curves of a chart: points of pixels."""
    svg = re.search(f'<svg [^>]*aria-label="{title}">.*?</svg>', page)
    assert svg, page
    lines = ElementTree.fromstring(svg[0]).iter("polyline")
    return [[[float(x) for x in point.split(",")] for point in line.attrib["points"].split()] for line in lines]


@pytest.mark.parametrize("count", [10, 2000])
def test_the_report_shows_the_curves(tmp_path, count):
    """From the first line of the log to the last; many lines are averaged."""
    lines = [{"step": step, "time": 0.0, "loss": 10.0 / step, "lr": 1e-3} for step in range(1, count + 1)]
    lines += [{"step": count, "time": 0.0, "val_loss": 0.5}]
    settings = {"run": {"kind": "model", "last_step": 5, "steps_per_epoch": 2}, "train": {"batch_size": 3}}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = format_report(tmp_path, status.describe_run(tmp_path))
    (loss, val_loss), (lr,) = chart(page, "loss"), chart(page, "learning rate")
    assert len(loss) == min(count, 288) and len(val_loss) == 1
    xs, ys = zip(*loss, strict=True)
    assert list(xs) == sorted(xs) and list(ys) == sorted(ys), "the loss falls from the left to the right"
    middle = loss[len(loss) // 2][1] - loss[0][1]
    assert middle > 0.4 * (loss[-1][1] - loss[0][1]), "on a logarithmic axis"
    assert val_loss[0][0] == loss[-1][0] and loss[0][1] < val_loss[0][1]
    assert len({y for _, y in lr}) == 1


def test_a_report_of_hostile_names(place, tmp_path, capsys):
    """Everything is text, whatever it contains, and pictures are only those of the folder."""
    evil = "<script>alert(1)</script>\" onload='x' &lt; \ud800 \x1b[2J  two"
    folder = tmp_path / 'a "b" <i>'
    train(place, folder, max_steps=1, log_every=1)
    settings = json.loads((folder / "settings.json").read_text())
    for section in settings.values():
        for name in section if isinstance(section, dict) else ():
            if name not in ("kind", "last_step", "steps_per_epoch", "batch_size"):
                section[name] = evil
    settings["model"]["class_names"] = [evil, 3, None]
    settings["train"]["epochs"] = 9 * 10**4299  # Python does not print the double of it
    (folder / "settings.json").write_text(json.dumps(settings | {evil: {evil: evil}, "other": 3}))
    with open(folder / "log.jsonl", "a") as log:
        log.write(json.dumps({"step": 1, "time": 1e99, "note": {evil: [evil]}, evil: 1.0}) + "\ntorn {\n")
    (folder / "preview-1 onload=x.png").write_bytes(b"")
    main(["info", str(folder)])
    tags: dict[str, set[str]] = {}

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.setdefault(tag, set()).update(name for name, _ in attributes)
            assert tag != "img" or dict(attributes)["src"] in ("samples.png", "preview-0000001.png")

    page = (folder / "report.html").read_text()
    Parser().feed(page)
    assert tags.keys() == {
        "html", "meta", "title", "style", "h1", "h2", "p", "table", "tr", "th", "td", "figure", "figcaption", "img",
        "div", "svg", "line", "text", "polyline", "circle", "span", "details", "summary", "pre",
    }  # fmt: skip
    assert not any(name.startswith("on") for names in tags.values() for name in names)
    assert tags["img"] == {"src", "alt", "loading"} and "&lt;script&gt;" in page and "://" not in page


def test_a_folder_that_cannot_be_written_is_described_all_the_same(place, tmp_path, capsys):
    train(place, tmp_path, max_steps=1)
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()
    capsys.readouterr()
    main(["info", str(tmp_path)])
    out, err = capsys.readouterr()
    assert "step                  1 of 1" in out and "report:" not in out
    assert err.count("\n") == 1 and f"cannot write {tmp_path / 'report.html'}" in err


def test_the_end_of_a_run_says_what_was_trained_and_where_it_is(place, tmp_path, capsys):
    run = tmp_path / "my run"
    train(place, run, max_steps=2, log_every=2)
    (line,) = small.read_log(run)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        rf"trained a model of 3 classes from 12 images: 2 steps in \d+ s, loss {line['loss']:.4f}", lines[0]
    )
    assert lines[1:] == [
        f"  weights: {run / 'model.safetensors'}",
        f"  training images beside samples: {run / 'samples.png'}",
        f"  report: {run / 'report.html'}",
        f"  bitdance sample --model '{run}'",
    ]
    train(place, run, max_steps=5)
    assert "12 images: 5 steps, the last 3 in " in capsys.readouterr().out
    train(place, run, max_steps=5)
    assert "12 images: 5 steps, loss" in capsys.readouterr().out


# ------------------------------------------------------------ sampling from a run


@pytest.mark.parametrize("name", ["demo", "ae.safetensors", "runs/ae"])
def test_samples_of_a_run_use_the_autoencoder_that_it_was_trained_with(place, tmp_path, monkeypatch, capsys, name):
    """Also from another working directory, when a file or a run folder was named by a relative path."""
    monkeypatch.chdir(tmp_path)
    size = {"image_size": 32 if name == "demo" else 16}
    train_flags = {"data_path": place / "pictures", "max_steps": 1, "batch_size": 4, "device": "cpu", **size}
    if name == "runs/ae":
        network = ["--widths", "32", "32", "32", "--blocks", "1", "--bits", "8"]
        main(["train-autoencoder", "--output", "runs/ae", *network, *small.flags(train_flags)])
    elif name == "ae.safetensors":
        shutil.copy(place / "autoencoder.safetensors", name)
    model = {"autoencoder": name, "output": "runs/model", **small.SIZES, "parallel_num": 4}
    main(["train", *small.flags(model | train_flags)])
    recorded = json.loads(pathlib.Path("runs/model/settings.json").read_text())["run"]["autoencoder"]
    assert recorded == (name if name == "demo" else str(tmp_path / name))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    main(["sample", "--model", "../runs/model", "--per-class", "1", "--num-steps", "2", "--device", "cpu"])
    assert "3 images of 3 classes" in (captured := capsys.readouterr()).out and "warning" not in captured.err
    with Image.open("samples/0000-class-0.png") as image:
        assert image.size == (size["image_size"],) * 2
