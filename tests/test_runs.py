"""What surrounds the steps of a run: checkpoints, settings, validation, logs, operations, reports, parts of a batch."""

from __future__ import annotations

import json
import pathlib
import re
import sys
import types

import numpy as np
import pytest
import small
import torch
from bitdance.training.transfer import parts
from bitdance.training.validation import Validation
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bitdance.cli.main import main
from bitdance.runtime.errors import UserError
from bitdance.runtime.process_group import World
from bitdance.sampling.image_grid import Curve, chart
from bitdance.training import flops, status
from bitdance.training.checkpointing import Checkpointer, newest
from bitdance.training.losses import AutoencoderLoss, BitDanceLoss
from bitdance.training.optimizer import EMA, NonFiniteGuard, build_optimizer
from bitdance.training.setup import train_autoencoder, train_model
from bitdance.training.train_config import AutoencoderLossConfig, LossConfig, ModelSizes, TrainConfig
from bitdance.training.trainer import Run
from bitdance.weights import weights_file

CPU = torch.device("cpu")
SIZES = ModelSizes(dim=64, n_layer=2, head_dim=64, head_layers=2, head_ada_ln=1, cls_token_num=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A folder with autoencoder.safetensors, pictures/ of 12 images, and held-out/ of two of their classes."""
    folder = tmp_path_factory.mktemp("place")
    weights_file.save(folder / "autoencoder.safetensors", small.autoencoder())
    small.pictures(folder / "pictures")
    small.pictures(folder / "held-out", classes=3, each=3)
    for path in sorted((folder / "held-out").rglob("class-0/*")):
        path.unlink()
    (folder / "held-out" / "class-0").rmdir()
    return folder


def settings(place: pathlib.Path, results: pathlib.Path, **changes: object) -> TrainConfig:
    fixed: dict[str, object] = {
        "image_size": 16, "epochs": 4, "global_batch_size": 4, "lr": 3e-3, "warmup_steps": 0, "decay_start": 0,
        "ema": 0.9, "mixed_precision": "none", "num_workers": 2, "log_every": 1,
    }  # fmt: skip
    return TrainConfig(data_path=place / "pictures", results_dir=results, **{**fixed, **changes})  # type: ignore[arg-type]


def train(place: pathlib.Path, results: pathlib.Path, loss: LossConfig | None = None, **changes: object) -> None:
    run = settings(place, results, **changes)
    train_model(run, SIZES, loss or LossConfig(), place / "autoencoder.safetensors", "cpu")


def log(folder: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


# ------------------------------------------------------------ checkpoints


def test_the_newest_checkpoints_are_kept(place, tmp_path):
    train(place, tmp_path, save_every=3)
    assert names(tmp_path) == ["checkpoint-0000009.safetensors", "checkpoint-0000012.safetensors"]
    train(place, tmp_path / "three", save_every=2, keep_checkpoints=3)
    assert [int(name[11:18]) for name in names(tmp_path / "three")] == [8, 10, 12]


def test_checkpoints_by_the_clock(place, tmp_path):
    train(place, tmp_path, save_every=0, save_minutes=1e-9, keep_checkpoints=99)
    assert [int(name[11:18]) for name in names(tmp_path)] == list(range(1, 13))


def test_a_checkpoint_is_of_the_moment_it_was_asked_for(tmp_path):
    """Although it is written later, and training goes on meanwhile."""
    value = torch.arange(1000.0)
    saved = Checkpointer(tmp_path, 2)
    for step in (1, 2, 3):
        saved.save(step, {"model/a": value}, {"run": {}}, {"step": str(step)})
        value.add_(1)
    saved.finish()
    assert names(tmp_path) == ["checkpoint-0000002.safetensors", "checkpoint-0000003.safetensors"]
    contents = newest(tmp_path)
    assert contents is not None and contents.metadata["step"] == "3"
    assert torch.equal(contents.states["model"]["a"], torch.arange(1000.0) + 2)


@pytest.mark.parametrize("damage", ["a byte", "the end", "everything"])
def test_a_damaged_checkpoint_is_passed_over(place, tmp_path, capsys, damage):
    train(place, tmp_path / "whole")
    train(place, tmp_path / "run", save_every=3, max_steps=9)
    last = tmp_path / "run" / "checkpoint-0000009.safetensors"
    data = bytearray(last.read_bytes())
    data[-100] ^= 1
    last.write_bytes({"a byte": data, "the end": data[:-5], "everything": b""}[damage])
    capsys.readouterr()
    train(place, tmp_path / "run")
    err = capsys.readouterr().err
    assert re.search(r"bitdance: \S+checkpoint-0000009.safetensors is .*goes on from checkpoint-0000006", err)
    assert "6/12" in err  # where the progress bar begins
    assert [name for name in names(tmp_path / "run") if name.endswith("damaged")] == [f"{last.name}.damaged"]
    a, b = (weights_file.read(tmp_path / name / "model.safetensors").metadata["digest"] for name in ("whole", "run"))
    assert a == b


def test_when_all_checkpoints_are_damaged_nothing_is_begun_anew(place, tmp_path):
    train(place, tmp_path, save_every=2, max_steps=4)
    for path in tmp_path.glob("checkpoint-*"):
        path.write_bytes(path.read_bytes()[:-1])
    before = names(tmp_path)
    with pytest.raises(UserError, match=r"none of the 2 checkpoints in .* can be read: .*0000004\S+ is damaged"):
        train(place, tmp_path)
    assert names(tmp_path) == before


def test_what_a_killed_run_left_half_written_is_removed(place, tmp_path):
    left = tmp_path / ".checkpoint-0000002.safetensors.123.0123abcd.tmp"
    left.write_bytes(b"half")
    (tmp_path / ".mine.tmp").write_bytes(b"keep")
    train(place, tmp_path, max_steps=1)
    assert not left.exists() and (tmp_path / ".mine.tmp").exists()


def test_the_settings_lie_beside_the_run(place, tmp_path):
    train(place, tmp_path, LossConfig(perturb_rate=0.1), max_steps=2)
    found = json.loads((tmp_path / "settings.json").read_text())
    assert (found["kind"], found["total_steps"], found["last_step"], found["steps_per_epoch"]) == ("model", 12, 2, 3)
    assert found["run"]["lr"] == 3e-3 and found["run"]["data_path"] == str(place / "pictures")
    assert found["model"]["n_layer"] == 2 and found["loss.perturb_rate"] == 0.1
    assert len(found["autoencoder.digest"]) == 64
    with pytest.raises(UserError, match="belongs to another run"):
        train(place, tmp_path, lr=1.0)
    assert json.loads((tmp_path / "settings.json").read_text()) == found


def test_a_run_that_never_saved_begins_its_log_anew(place, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    train(place, tmp_path, max_steps=3)
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3] and "loss" in log(tmp_path)[0]


def test_a_long_warm_up_is_said(place, tmp_path, capsys):
    train(place, tmp_path, max_steps=2, warmup_steps=3)
    out = capsys.readouterr().out
    assert "the warm-up (--warmup-steps 3) is longer than the run (2 steps): the learning rate stays below" in out
    train(place, tmp_path / "other", max_steps=3, warmup_steps=3)
    assert "warm-up" not in capsys.readouterr().out


# ------------------------------------------------------------ skipped steps


def test_a_skipped_step_leaves_everything_as_it_was():
    network = torch.nn.Linear(3, 2)
    optimizer, ema = build_optimizer(network, TrainConfig(pathlib.Path("x"), lr=0.1)), EMA(network, 0.5)
    health = NonFiniteGuard(CPU)

    def step(gradient: float) -> None:
        for parameter in network.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        skipped = health.judge(norm)
        optimizer.found_inf = skipped
        optimizer.step()
        ema.update(network, skipped)

    def state() -> list[torch.Tensor]:
        moments = [value for parameter in network.parameters() for value in optimizer.state[parameter].values()]
        return [value.detach().clone() for value in (*network.parameters(), *moments, *ema.state.values())]

    step(1.0)
    before = state()
    for gradient in (float("nan"), float("inf")):
        step(gradient)
        assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert (int(health.skipped), int(health.consecutive)) == (2, 2)
    step(1.0)
    assert all(not torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert (int(health.skipped), int(health.consecutive)) == (2, 0)


def test_steps_do_not_make_the_host_wait(place, tmp_path, monkeypatch):
    """Between lines of the log nothing asks for a number."""
    asked: list[str] = []

    def counted(name):
        real = getattr(torch.Tensor, name)

        def call(self, *arguments):
            asked.append(name)
            return real(self, *arguments)

        return call

    for name in ("item", "tolist", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))

    def asks(steps: int) -> int:
        asked.clear()
        train(place, tmp_path / str(steps), max_steps=steps, log_every=100, save_every=0, preview_every=0)
        return len(asked)

    # Each of the two threads that read images lists their indices, on the CPU, once a step.
    assert asks(8) - asks(4) == 2 * (8 - 4)


@pytest.mark.gpu
def test_steps_on_a_gpu_do_not_make_the_host_wait(place, tmp_path, monkeypatch):
    real = Run.one_step

    def watched(run, batch):
        torch.cuda.set_sync_debug_mode("error" if run.step else "default")  # the first step sets libraries up
        try:
            return real(run, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Run, "one_step", watched)
    run = settings(place, tmp_path, max_steps=5, log_every=5, accumulate=2)
    train_model(run, SIZES, LossConfig(perturb_rate=0.1), place / "autoencoder.safetensors", "cuda")
    assert log(tmp_path)[-1]["step"] == 5


# ------------------------------------------------------------ validation


@pytest.mark.parametrize("size", [1, 2])
def test_validation_is_fixed_and_of_the_averaged_weights(place, tmp_path, size):
    """The same number however many processes look, however often; a network as it was comes back."""
    loss = LossConfig(class_dropout=0.5, perturb_rate=0.5)
    objective = BitDanceLoss(small.model(), small.autoencoder(), loss, seed=3)
    run = settings(place, tmp_path, val_path=place / "held-out", val_images=6, global_batch_size=2)
    classes = ("class-0", "class-1", "class-2")
    whole = Validation(objective, run, classes, World(0, 1, CPU))
    assert whole.count == 3 and whole.batches.images.labels.tolist() == [1, 1, 1, 2, 2, 2]
    expected = whole.loss().item()
    assert whole.loss().item() == expected and objective.config == loss
    if size == 2:
        halves = []
        for rank in range(2):
            world = World(rank, 2, CPU)
            object.__setattr__(world, "mean", lambda value: value)
            halves.append(Validation(objective, run, classes, world).loss().item())
        assert sum(halves) / 2 == pytest.approx(expected, rel=1e-5) and halves[0] != halves[1]
        return
    # Without dropped classes and flipped bits the loss is that of the tokens themselves.
    plain = BitDanceLoss(objective.network, objective.autoencoder, LossConfig(class_dropout=0.0), seed=3)
    assert Validation(plain, run, classes, World(0, 1, CPU)).loss().item() == expected
    network = objective.network
    before = [parameter.detach().clone() for parameter in network.parameters()]
    ema = EMA(network, 0.9)
    for value in ema.state.values():
        value.mul_(0.5)
    with ema.swapped_in(network):
        assert all(torch.equal(a, 0.5 * b) for a, b in zip(network.parameters(), before, strict=True))
        assert whole.loss().item() != expected
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), before, strict=True))


def test_validation_changes_nothing_of_the_training(place, tmp_path):
    train(place, tmp_path / "plain")
    train(place, tmp_path / "validated", val_path=place / "held-out", val_every=2, val_images=4)
    plain, validated = log(tmp_path / "plain"), log(tmp_path / "validated")
    assert [line["loss"] for line in plain] == [line["loss"] for line in validated]
    seen = [line["step"] for line in validated if "val_loss" in line]
    assert seen == [2, 4, 6, 8, 10, 12] and validated[-1]["val_loss"] < validated[1]["val_loss"]
    weights = [weights_file.read(tmp_path / name / "model.safetensors") for name in ("plain", "validated")]
    assert weights[0].metadata["digest"] == weights[1].metadata["digest"]


def test_validation_data_that_do_not_fit(place, tmp_path):
    small.pictures(tmp_path / "others", classes=4)
    with pytest.raises(UserError, match=r"has the class 'class-3', which the training images do not have"):
        train(place, tmp_path / "run", val_path=tmp_path / "others")
    with pytest.raises(UserError, match="has no split 'test'"):
        train(place, tmp_path / "run", val_path=place / "pictures")


def test_an_autoencoder_is_validated_too(place, tmp_path):
    run = settings(place, tmp_path, val_path=place / "held-out", max_steps=3, val_every=0)
    train_autoencoder(run, small.NETWORK, AutoencoderLossConfig(), "cpu")
    assert ["val_loss" in line for line in log(tmp_path)] == [False, False, True]


def test_previews_are_of_fixed_classes(place, tmp_path):
    train(place, tmp_path, max_steps=2, preview_every=1, lr=0.0)
    first, second = ((tmp_path / f"preview-000000{step}.png").read_bytes() for step in (1, 2))
    assert first == second  # the same classes and the same noise, of weights that did not change
    with Image.open(tmp_path / "preview-0000001.png") as preview:
        assert preview.size == (8 * (2 * 16 + 2) + 2, 2 * (2 * 16 + 2) + 2)


# ------------------------------------------------------------ logs


def test_tensorboard_and_wandb_get_what_the_log_gets(place, tmp_path, monkeypatch):
    scalars, logged, begun = [], [], []

    class SummaryWriter:
        def __init__(self, log_dir, purge_step):
            begun.append((log_dir, purge_step))

        def add_scalar(self, name, value, step):
            scalars.append((name, value, step))

        def close(self):
            scalars.append("closed")

    def init(**arguments):
        begun.append(arguments)
        return types.SimpleNamespace(
            log=lambda values, step: logged.append((values, step)), finish=lambda: logged.append("finished")
        )

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    train(place, tmp_path, max_steps=2, tensorboard=True, wandb="bits")
    lines = log(tmp_path)
    assert [value for name, value, _ in scalars[:-1] if name == "loss"] == [line["loss"] for line in lines]
    assert scalars[-1] == "closed" and logged[-1] == "finished"
    assert [values["loss"] for values, _ in logged[:-1]] == [line["loss"] for line in lines]
    assert [step for _, step in logged[:-1]] == [1, 2]
    train(place, tmp_path, max_steps=3, tensorboard=True, wandb="bits")
    assert [entry[1] for entry in begun if isinstance(entry, tuple)] == [1, 3]
    first, second = (entry for entry in begun if isinstance(entry, dict))
    assert first["id"] == second["id"] and first["project"] == "bits" and first["config"]["run"]["lr"] == 3e-3


@pytest.mark.parametrize(
    ("flag", "module", "extra"),
    [
        ({"tensorboard": True}, "torch.utils.tensorboard", "tensorboard"),
        ({"wandb": "x"}, "wandb", "wandb"),
    ],
)
def test_missing_packages_are_named(place, tmp_path, monkeypatch, flag, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"--{extra} needs a package .* pip install 'bitdance\[{extra}\]'"):
        train(place, tmp_path, **flag)


# ------------------------------------------------------------ operations


@pytest.mark.parametrize("parallel_num", [1, 4])
@pytest.mark.parametrize("encodes", [True, False])
def test_operations_of_a_step_of_a_model(parallel_num, encodes):
    network = small.model(parallel_num=parallel_num, head_layers=4, head_ada_ln=2)
    objective = BitDanceLoss(network, small.autoencoder(), LossConfig(diff_batch_mul=3), seed=0).train()
    images = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8)
    labels, rows = torch.arange(5) % 3, torch.arange(5)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if encodes:
            objective(images, labels, rows, 0)[0].backward()
        else:
            inputs, dropped, t, x_0 = objective.draw(torch.ones(5, 16, 8), labels, rows, 0)
            network.loss(torch.ones(5, 16, 8), dropped, t, x_0, inputs).backward()
    found = flops.step_flops(objective, 5, 16, encodes=encodes)
    assert found == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_operations_of_a_step_of_an_autoencoder():
    objective = AutoencoderLoss(small.autoencoder(), AutoencoderLossConfig())
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        objective(images, torch.zeros(2), torch.arange(2), 0)[0].backward()
    assert flops.step_flops(objective, 2, 32, encodes=True) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_peaks_of_gpus():
    assert flops.peak_bf16("NVIDIA H200") == flops.peak_bf16("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak_bf16("NVIDIA H100 PCIe") == 756e12 and flops.peak_bf16("NVIDIA A100-SXM4-80GB") == 312e12
    assert flops.peak_bf16("NVIDIA L40S") == 362e12 and flops.peak_bf16("NVIDIA L4") == 121e12
    assert flops.peak_bf16("NVIDIA H20") == 148e12 and flops.peak_bf16("NVIDIA GH200 480GB") == 989e12
    assert flops.peak_bf16("Some other card") is None


# ------------------------------------------------------------ reports


def test_info_shows_a_run_and_plots_it(place, tmp_path, capsys):
    run, val_path = tmp_path / "run", place / "held-out"
    train(place, run, epochs=10, max_steps=24, save_every=10, keep_checkpoints=3, val_path=val_path, val_every=5)
    damaged = run / "checkpoint-0000020.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-3])
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    capsys.readouterr()
    main(["info", str(run)])
    out = capsys.readouterr().out
    for words in ("step                  24 of 24 (epoch 8.00)", "checkpoint-0000024.safetensors, 3.6 MB, whole",
                  "checkpoint-0000020.safetensors, 3.6 MB, damaged", "none, it is done", "model.safetensors",
                  "skipped steps         0", "val_loss", "images/s, waiting"):  # fmt: skip
        assert words in out, out
    main(["info", str(run), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["step"] == 24 and facts["seconds_left"] == 0 and facts["skipped"] == 0
    assert [entry["whole"] for entry in facts["checkpoints"]] == [True, False, True]
    with Image.open(run / "loss.png") as picture:
        assert picture.size == (960, 540)
    after = {path.name: path.read_bytes() for path in run.iterdir() if path.name != "loss.png"}
    assert after == before  # looking changes nothing


def test_a_run_that_has_only_begun(place, tmp_path):
    train(place, tmp_path, max_steps=1)
    for path in [*tmp_path.glob("*.safetensors"), tmp_path / "log.jsonl"]:
        path.unlink()
    facts = status.describe(tmp_path)
    assert facts["step"] == 0 and facts["loss"] is None and facts["checkpoints"] == [] and facts["weights"] is None
    assert "step" in status.text(facts) and status.plot(tmp_path) is None
    with pytest.raises(UserError, match="holds no run"):
        status.describe(place)


def test_a_chart_shows_its_curves_where_they_are():
    x = np.arange(101)
    picture = np.asarray(chart([Curve("falls", x, 1 - x / 100, "#ff0000")], "title", "step")).astype(int)
    red = (picture[..., 0] > 200) & (picture[..., 1] < 80)
    rows, columns = np.nonzero(red[80:])  # below the legend
    middle = columns.size // 2
    order = np.argsort(columns, kind="stable")
    left, right = rows[order[: middle // 4]].mean(), rows[order[-middle // 4 :]].mean()
    assert left < right - 250  # high on the left, low on the right
    one = np.asarray(chart([Curve("one", [3], [0.5], "#ff0000")], "", "")).astype(int)
    assert ((one[..., 0] > 200) & (one[..., 1] < 80)).sum() > 20


# ------------------------------------------------------------ parts of a batch


def test_a_batch_in_parts_trains_like_a_whole_one(place, tmp_path):
    loss = LossConfig(perturb_rate=0.3)
    for count in (1, 2, 4):
        train(place, tmp_path / str(count), loss, accumulate=count, epochs=7, max_steps=20)
    whole = log(tmp_path / "1")
    assert len(whole) == 20
    for count in (2, 4):
        for a, b in zip(whole, log(tmp_path / str(count)), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)


def test_parts_that_do_not_divide_a_batch(place, tmp_path):
    with pytest.raises(UserError, match="--accumulate 3 does not divide the 4 images of a process"):
        train(place, tmp_path, accumulate=3)


def test_parts_are_those_of_the_batch_in_order():
    from bitdance.training.loader import Batch

    batch = Batch(torch.arange(6).view(6, 1, 1, 1), torch.arange(6), torch.arange(6))
    found = list(parts(batch, 3))
    assert [part.labels.tolist() for part in found] == [[0, 1], [2, 3], [4, 5]]
    assert torch.equal(torch.cat([part.inputs for part in found]), batch.inputs)


@pytest.mark.parametrize("parallel_num", [1, 4])
def test_grad_checkpointing_keeps_less_of_every_part(parallel_num):
    """Counts the bytes that the backward pass of trunk and head keep."""
    network = small.model(parallel_num=parallel_num, n_layer=4, head_layers=4).train()
    tokens = torch.ones(8, 16, 8)
    t, x_0 = torch.full((4 * 8 * 16 // parallel_num,), 0.5), torch.zeros(4 * 8 * 16 // parallel_num, parallel_num, 8)
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

    def kept(run) -> int:
        storages: dict[int, int] = {}

        def note(value: torch.Tensor) -> torch.Tensor:
            storage = value.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            result = run()
        assert result.requires_grad
        return sum(storages.values())

    cond = torch.zeros(4 * 8 * 16 // parallel_num, parallel_num, 64, requires_grad=True)
    target = torch.ones(4 * 8 * 16 // parallel_num, parallel_num, 8)
    whole = {}
    for again in (False, True):
        network.set_grad_checkpointing(again)
        whole[again] = (
            kept(lambda: network(tokens, torch.zeros(8, dtype=torch.int64))),
            kept(lambda: network.head.loss(target, cond, t, x_0)),
        )
    for plain, less in zip(whole[False], whole[True], strict=True):
        assert less < 0.4 * plain
