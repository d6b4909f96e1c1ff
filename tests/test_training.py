"""Training: schedules, optimizer, batches, draws, and whole runs of a few steps."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import shutil

import numpy as np
import pytest
import small
import torch
from PIL import Image

from bitdance.cli.main import main
from bitdance.data.images import open_images
from bitdance.models.transformer import BitDance
from bitdance.runtime.errors import UserError
from bitdance.runtime.process_group import World
from bitdance.training.loader import Batch, Loader, random_crop_probability
from bitdance.training.losses import BitDanceLoss
from bitdance.training.optimizer import EMA, build_optimizer, learning_rate, parameter_groups
from bitdance.training.setup import train_autoencoder, train_model
from bitdance.training.train_config import AutoencoderLossConfig, LossConfig, ModelSizes, TrainConfig
from bitdance.weights import weights_file

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    return small.pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> pathlib.Path:
    """A folder with model.safetensors and autoencoder.safetensors."""
    return small.save_pair(tmp_path_factory.mktemp("pair")).parent


def config(data: pathlib.Path, results: pathlib.Path = pathlib.Path("unused"), **changes: object) -> TrainConfig:
    settings: dict[str, object] = {
        "image_size": 16, "epochs": 4, "global_batch_size": 4, "lr": 3e-3, "warmup_steps": 0, "decay_start": 0,
        "ema": 0.9, "mixed_precision": "none", "num_workers": 2, "log_every": 1,
    }  # fmt: skip
    return TrainConfig(data_path=data, results_dir=results, **{**settings, **changes})  # type: ignore[arg-type]


SIZES = ModelSizes(dim=64, n_layer=2, head_dim=64, head_layers=2, head_ada_ln=1, cls_token_num=2)


def log(folder: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------ schedules and optimizer


def test_learning_rate():
    run = TrainConfig(pathlib.Path("x"), lr=6e-4, min_lr=1e-5, warmup_steps=20, decay_start=40)

    def rate(step: int) -> float:
        return learning_rate(run, step, 140)

    assert rate(0) == 0
    assert rate(1) == pytest.approx(3e-5)
    assert rate(10) == pytest.approx(3e-4)
    assert rate(19) == pytest.approx(5.7e-4)
    assert rate(20) == rate(39) == 6e-4  # the plateau
    assert rate(40) == pytest.approx(6e-4)  # the cosine starts where the plateau ends
    assert rate(65) == pytest.approx(1e-5 + 5.9e-4 * (1 + math.sqrt(0.5)) / 2)
    assert rate(90) == pytest.approx(3.05e-4)  # halfway: (6e-4 + 1e-5) / 2
    assert rate(140) == pytest.approx(1e-5)


def test_learning_rate_of_the_published_schedule_decays_right_after_the_warm_up():
    run = TrainConfig(pathlib.Path("x"), lr=6e-4)
    total = 800 * (1_281_167 // 1024)
    assert learning_rate(run, 19_999, total) == pytest.approx(6e-4 * 19_999 / 20_000)
    assert learning_rate(run, 20_000, total) == pytest.approx(6e-4)
    assert learning_rate(run, total - 1, total) == pytest.approx(1e-5, rel=1e-4)


@pytest.mark.parametrize("decay_start", [0, 140, 200])
def test_learning_rate_without_decay_stays(decay_start):
    run = TrainConfig(pathlib.Path("x"), lr=6e-4, warmup_steps=0, decay_start=decay_start)
    assert {learning_rate(run, step, 140) for step in (0, 1, 70, 139)} == {6e-4}


def test_random_crop_probability():
    run = TrainConfig(pathlib.Path("x"))  # falls from epoch 700 to 750
    assert [random_crop_probability(run, epoch) for epoch in (0, 700, 725, 740, 750, 799)] == pytest.approx(
        [1, 1, 0.5, 0.2, 0, 0]
    )
    for start, end in ((-1, 750), (700, 700), (700, 600)):
        never = dataclasses.replace(run, aug_decay_start_epoch=start, aug_decay_end_epoch=end)
        assert random_crop_probability(never, 799) == 1


@pytest.mark.parametrize("parallel_num", [1, 4])
def test_parameter_groups(parallel_num):
    network = small.model(parallel_num=parallel_num)
    decayed, others = parameter_groups(network, 0.05)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decayed_names = {names[id(parameter)] for parameter in decayed["params"]}
    other_names = {names[id(parameter)] for parameter in others["params"]}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
    assert decayed_names.isdisjoint(other_names) and decayed_names | other_names == set(names.values())
    # The input projection of the head is called input_proj, and decays.
    assert {"layers.0.attention.wqkv.weight", "pos_for_diff.weight", "head.net.input_proj.weight"} <= decayed_names
    assert {"proj_in.w1.weight", "proj_in.w2.weight", "cls_embedding.weight"} <= other_names
    assert {"emb_norm.weight", "head.net.input_proj.bias", "proj_in.w1.bias"} <= other_names
    assert parallel_num == 1 or "query_token" in other_names


def test_optimizer_takes_a_step_by_hand():
    """AdamW's first step moves by the rate against the gradient's sign, after the decay took lr * weight_decay."""
    network = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(network.weight, 2.0)
    torch.nn.init.constant_(network.bias, 3.0)
    run = TrainConfig(pathlib.Path("x"), lr=0.1, weight_decay=0.05)
    optimizer = build_optimizer(network, run)
    network.weight.grad, network.bias.grad = torch.tensor([[4.0]]), torch.tensor([-5.0])
    optimizer.step()
    assert network.weight.item() == pytest.approx(2 * (1 - 0.1 * 0.05) - 0.1)
    assert network.bias.item() == pytest.approx(3 + 0.1)


def test_ema():
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(network.weight, 1.0)
    ema = EMA(network, 0.75)
    for value, expected in ((5.0, 2.0), (6.0, 3.0), (3.0, 3.0)):  # average <- 0.75 average + 0.25 value
        torch.nn.init.constant_(network.weight, value)
        ema.update(network, torch.tensor(0.0))
        assert ema.state["weight"].item() == expected
        assert network.weight.item() == value


# ------------------------------------------------------------ batches


def join(parts: list[Batch]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.cat([getattr(part, name) for part in parts]) for name in ("inputs", "labels", "rows"))


@pytest.mark.parametrize("size", [2, 4])
def test_the_global_batch_is_the_same_for_any_number_of_processes(data, size):
    images = open_images(data)
    run = config(data)
    whole = Loader(images, run, World(0, 1, CPU))
    parts = [Loader(images, run, World(rank, size, CPU)) for rank in range(size)]
    for step in (0, 2, 3, 7):
        expected, found = whole.load(step), join([part.load(step) for part in parts])
        assert torch.equal(found[2], torch.arange(4))
        assert torch.equal(found[0], expected.inputs) and torch.equal(found[1], expected.labels)


def test_every_image_comes_once_an_epoch_and_epochs_differ(data):
    batches = Loader(open_images(data), config(data), World(0, 1, CPU))
    assert batches.steps_per_epoch == 3
    epochs = [torch.cat([batches.indices(3 * epoch + i) for i in range(3)]).tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = Loader(open_images(data), config(data, global_seed=1), World(0, 1, CPU))
    assert torch.cat([other.indices(i) for i in range(3)]).tolist() != epochs[0]


def test_images_that_do_not_fill_a_batch_wait_for_another_epoch(data):
    batches = Loader(open_images(data), config(data, global_batch_size=5), World(0, 1, CPU))
    assert batches.steps_per_epoch == 2
    seen = [torch.cat([batches.indices(2 * epoch), batches.indices(2 * epoch + 1)]) for epoch in range(8)]
    assert all(len(set(epoch.tolist())) == 10 for epoch in seen)
    assert set(torch.cat(seen).tolist()) == set(range(12))


def test_a_resumed_stream_goes_on_as_if_nothing_had_happened(data):
    images, run = open_images(data), config(data)
    whole = list(Loader(images, run, World(0, 1, CPU)).stream(0, 8))
    rest = list(Loader(images, run, World(0, 1, CPU)).stream(5, 8))
    assert len(whole) == 8 and len(rest) == 3
    for a, b in zip(whole[5:], rest, strict=True):
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.labels, b.labels)
    assert list(Loader(images, run, World(0, 1, CPU)).stream(8, 8)) == []


def test_centre_crops_are_the_images_themselves_half_of_them_mirrored(data):
    images = open_images(data)
    batches = Loader(images, config(data, random_crop=False), World(0, 1, CPU))
    mirrored = 0
    for step in range(30):
        batch = batches.load(step)
        for pixels, label, index in zip(batch.inputs, batch.labels, batches.indices(step).tolist(), strict=True):
            original = torch.from_numpy(np.array(images.read(index)))
            assert label == images.labels[index]
            flipped = torch.equal(pixels, original.flip(1))
            assert flipped or torch.equal(pixels, original)
            mirrored += flipped
    assert 0.35 < mirrored / 120 < 0.65


def test_random_crops_differ_between_epochs(data):
    batches = Loader(open_images(data), config(data), World(0, 1, CPU))
    views: dict[int, set[bytes]] = {}
    for step in range(9):
        for index, pixels in zip(batches.indices(step).tolist(), batches.load(step).inputs, strict=True):
            views.setdefault(index, set()).add(pixels.numpy().tobytes())
    assert sum(map(len, views.values())) > 2.5 * len(views)  # of 3


# ------------------------------------------------------------ draws


def objective(loss: LossConfig, parallel_num: int = 1, **changes: object) -> BitDanceLoss:
    return BitDanceLoss(small.model(parallel_num=parallel_num, **changes), small.autoencoder(), loss, seed=3)


def random_tokens(batch: int) -> torch.Tensor:
    return torch.randint(0, 2, (batch, 16, 8), generator=torch.Generator().manual_seed(0)) * 2.0 - 1


def test_epochs_may_be_asked_for_in_any_order(data):
    """Of a set of one batch an epoch, readers work on more epochs at a time than are kept."""
    batches, alone = (Loader(open_images(data), config(data, global_batch_size=12), World(0, 1, CPU)) for _ in range(2))
    expected = [alone.indices(step).tolist() for step in range(6)]
    assert len({tuple(order) for order in expected}) == 6
    for step in (3, 2, 1, 0, 5, 0, 4, 3):
        assert batches.indices(step).tolist() == expected[step]


@pytest.mark.parametrize("parallel_num", [1, 4])
def test_draws_depend_on_the_place_in_the_global_batch_alone(parallel_num):
    loss = LossConfig(diff_batch_mul=3, class_dropout=0.5, perturb_rate=0.5)
    part = objective(loss, parallel_num)
    tokens, labels, rows = random_tokens(8), torch.arange(8) % 3, torch.arange(8)
    steps = 16 // parallel_num
    inputs, dropped, t, x_0 = part.draw(tokens, labels, rows, 5)
    assert inputs.shape == tokens.shape
    assert t.shape == (3 * 8 * steps,) and x_0.shape == (3 * 8 * steps, parallel_num, 8)
    times, noise = t.view(3, 8, steps), x_0.view(3, 8, steps, parallel_num, 8)
    for places in ([0, 1, 2, 3], [4, 5, 6, 7], [6]):
        few = part.draw(tokens[places], labels[places], rows[places], 5)
        assert torch.equal(few[0], inputs[places]) and torch.equal(few[1], dropped[places])
        # The words are equal; logarithms may differ in the last bit with the length of a vector.
        torch.testing.assert_close(few[2].view(3, -1, steps), times[:, places], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(few[3].view(3, -1, steps, parallel_num, 8), noise[:, places], rtol=1e-6, atol=1e-6)
    other = part.draw(tokens, labels, rows, 6)
    assert not torch.equal(other[2], t) and not torch.equal(other[3], x_0) and not torch.equal(other[0], inputs)
    # All rows, copies and groups have noise of their own.
    assert len(torch.unique(t)) == len(t) and len(torch.unique(x_0)) > 0.99 * x_0.numel()


def test_rate_of_dropped_classes_and_of_flipped_bits():
    part = objective(LossConfig(diff_batch_mul=1, class_dropout=0.1, perturb_rate=0.4))
    tokens, labels = random_tokens(2000), torch.arange(2000) % 3
    inputs, dropped, _, _ = part.draw(tokens, labels, torch.arange(2000), 0)
    null = dropped == 3
    assert torch.equal(dropped[~null], labels[~null])
    assert null.double().mean().item() == pytest.approx(0.1, abs=0.03)
    flipped = inputs != tokens
    assert torch.equal(inputs.abs(), torch.ones_like(inputs))
    assert flipped.double().mean().item() == pytest.approx(0.2, abs=0.005)  # r1 < 0.4 r2: half of the rate
    untouched = objective(LossConfig(diff_batch_mul=1, class_dropout=0.0)).draw(tokens, labels, torch.arange(2000), 0)
    assert torch.equal(untouched[0], tokens) and torch.equal(untouched[1], labels)


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_law_of_times(shift):
    tokens, labels, rows = random_tokens(1000), torch.zeros(1000, dtype=torch.int64), torch.arange(1000)
    part = objective(LossConfig(diff_batch_mul=2), time_shift=shift)
    t = part.draw(tokens, labels, rows, 0)[2].double()
    assert t.min() > 0 and t.max() < 1
    # logit(t) ~ N(-0.8, 0.8); a shift s subtracts log s.
    logit = torch.log(t / (1 - t)) + math.log(shift)
    assert logit.mean().item() == pytest.approx(-0.8, abs=0.02)
    assert logit.std().item() == pytest.approx(0.8, abs=0.02)
    uniform = objective(LossConfig(diff_batch_mul=2, time_schedule="uniform"), time_shift=shift)
    u = uniform.draw(tokens, labels, rows, 0)[2].double()
    u = u * shift / (1 + u * (shift - 1))  # undoes the shift
    assert u.min() >= 0 and u.max() < 1
    tenths = torch.arange(1, 10).double() / 10
    assert torch.quantile(u, tenths).tolist() == pytest.approx(tenths.tolist(), abs=0.01)


def test_the_fixed_autoencoder_is_no_part_of_what_is_trained():
    part = objective(LossConfig())
    own = {f"network.{name}" for name, _ in part.network.named_parameters()}
    assert {name for name, _ in part.named_parameters()} == own == set(part.state_dict())
    assert not any(parameter.requires_grad for parameter in part.autoencoder.parameters())
    part.train()
    assert not part.autoencoder.training
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    loss, _ = part(images, torch.tensor([0, 1]), torch.arange(2), 0)
    loss.backward()
    assert all(parameter.grad is None for parameter in part.autoencoder.parameters())
    assert all(parameter.grad is not None for parameter in part.network.parameters())


@pytest.mark.parametrize("parallel_num", [1, 4])
def test_grad_checkpointing_gives_the_same_gradients(parallel_num):
    plain = objective(LossConfig(), parallel_num)
    again = objective(LossConfig(), parallel_num)
    again.network.set_grad_checkpointing(True)
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for part in (plain, again):
        part.train()
        part(images, torch.tensor([0, 1]), torch.arange(2), 0)[0].backward()
    for a, b in zip(plain.network.parameters(), again.network.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)


# ------------------------------------------------------------ whole runs


def test_an_autoencoder_learns_and_leaves_its_files(data, tmp_path, capsys):
    run = config(data, tmp_path / "run", epochs=14, save_every=0, keep_epochs=7, random_crop=False)
    path = train_autoencoder(run, small.NETWORK, AutoencoderLossConfig(), "cpu")
    lines = log(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 43))
    psnr = [line["psnr"] for line in lines]
    assert sum(psnr[-6:]) / 6 > sum(psnr[:6]) / 6 + 1.5  # dB
    assert {"loss", "grad_norm", "lr", "images_per_second", "waiting", "epoch", "entropy_sample"} <= lines[0].keys()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "autoencoder.safetensors", "checkpoint-0000042.safetensors", "settings.json",
        "epoch_14.safetensors", "epoch_7.safetensors",
        "log.jsonl", "preview-0000042.png",
    ]  # fmt: skip
    network = weights_file.load_autoencoder(path)
    assert network.config == small.NETWORK
    state = weights_file.read(tmp_path / "run" / "checkpoint-0000042.safetensors").states
    assert all(torch.equal(value, state["ema"][name]) for name, value in network.state_dict().items())
    with Image.open(tmp_path / "run" / "preview-0000042.png") as preview:
        assert preview.size == (4 * (2 * 16 + 2) + 2, 2 * (2 * 16 + 2) + 2)  # images above reconstructions
    assert capsys.readouterr().err.count("42/42")


@pytest.mark.parametrize("parallel_num", [1, 4])
def test_a_model_learns_and_leaves_its_files(data, pair, tmp_path, parallel_num):
    run = config(data, tmp_path / "run", epochs=20)
    sizes = dataclasses.replace(SIZES, parallel_num=parallel_num)
    path = train_model(run, sizes, LossConfig(), pair / "autoencoder.safetensors", "cpu")
    losses = [line["loss"] for line in log(tmp_path / "run")]
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "checkpoint-0000060.safetensors", "settings.json", "log.jsonl", "model.safetensors", "preview-0000060.png",
    ]  # fmt: skip
    network = weights_file.load_model(path)
    assert network.config.class_names == ("class-0", "class-1", "class-2")
    assert (network.config.num_classes, network.config.grid, network.config.parallel_num) == (3, 4, parallel_num)
    contents = weights_file.read(tmp_path / "run" / "checkpoint-0000060.safetensors")
    assert contents.states.keys() == {"ema", "model", "optimizer"}
    assert not any(name.startswith(("encoder", "decoder", "vae")) for name in contents.states["model"])
    raw = contents.states["model"]
    assert any(not torch.equal(value, raw[name]) for name, value in contents.states["ema"].items())


def test_without_ema_the_raw_weights_are_what_is_kept(data, pair, tmp_path):
    run = config(data, tmp_path, ema=-1.0, max_steps=2)
    path = train_model(run, SIZES, LossConfig(), pair / "autoencoder.safetensors", "cpu")
    contents = weights_file.read(tmp_path / "checkpoint-0000002.safetensors")
    assert contents.states.keys() == {"model", "optimizer"}
    kept = weights_file.load_model(path).state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in contents.states["model"].items())


def test_an_interrupted_run_ends_like_one_that_was_not(data, pair, tmp_path):
    loss = LossConfig(perturb_rate=0.3)

    def train(folder: str, **changes: object) -> None:
        run = config(data, tmp_path / folder, epochs=3, warmup_steps=4, decay_start=4, **changes)
        train_model(run, dataclasses.replace(SIZES, drop_rate=0.1), loss, pair / "autoencoder.safetensors", "cpu")

    train("whole")
    train("parts", max_steps=2)
    train("parts", max_steps=5, num_workers=1, log_every=2)
    train("parts")
    a, b = (weights_file.read(tmp_path / folder / "checkpoint-0000009.safetensors") for folder in ("whole", "parts"))
    assert a.metadata["step"] == b.metadata["step"] == "9"
    assert a.metadata["digest"] == b.metadata["digest"]  # of parameters, EMA and optimizer, bit for bit
    assert a.states["optimizer"].keys() == b.states["optimizer"].keys()
    finished = [weights_file.read(tmp_path / folder / "model.safetensors") for folder in ("whole", "parts")]
    assert finished[0].metadata["digest"] == finished[1].metadata["digest"]
    train("parts")  # nothing is left to do
    assert (
        weights_file.read(tmp_path / "parts" / "checkpoint-0000009.safetensors").metadata["digest"]
        == a.metadata["digest"]
    )


def test_an_interrupted_autoencoder_run_ends_like_one_that_was_not(data, tmp_path):
    for folder, stops in (("whole", (4,)), ("parts", (1, 4))):
        for stop in stops:
            run = config(data, tmp_path / folder, max_steps=stop)
            train_autoencoder(run, small.NETWORK, AutoencoderLossConfig(), "cpu")
    a, b = (weights_file.read(tmp_path / folder / "checkpoint-0000004.safetensors") for folder in ("whole", "parts"))
    assert a.metadata["digest"] == b.metadata["digest"] and a.metadata["step"] == "4"


def test_a_run_of_other_settings_is_refused_with_the_differences(data, pair, tmp_path):
    train_model(config(data, tmp_path, max_steps=1), SIZES, LossConfig(), pair / "autoencoder.safetensors", "cpu")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = config(data, tmp_path, max_steps=2, lr=1e-4, global_seed=7)
    loss = LossConfig(perturb_rate=0.1)
    with pytest.raises(UserError) as error:
        train_model(other, dataclasses.replace(SIZES, n_layer=3), loss, pair / "autoencoder.safetensors", "cpu")
    message = str(error.value)
    assert "checkpoint-0000001.safetensors belongs to another run" in message
    for change in ("run.lr was 0.003, is 0.0001", "run.global_seed was 0, is 7", "model.n_layer was 2, is 3"):
        assert change in message
    assert "loss.perturb_rate was 0.0, is 0.1" in message
    assert "max_steps" not in message and "weight_decay" not in message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_set_of_as_many_images_makes_another_run(data, pair, tmp_path):
    def train(folder: pathlib.Path) -> None:
        train_model(
            config(folder, tmp_path / "run", max_steps=1), SIZES, LossConfig(), pair / "autoencoder.safetensors"
        )

    train(data)
    moved = pathlib.Path(shutil.copytree(data, tmp_path / "moved"))
    train(moved)  # where the images lie does not matter
    first = sorted(moved.rglob("*.png"))[0]
    first.rename(first.with_name("renamed.png"))
    with pytest.raises(UserError, match=r"images was .* is"):
        train(moved)


def test_another_autoencoder_makes_another_run(data, pair, tmp_path):
    run = config(data, tmp_path / "run", max_steps=1)
    train_model(run, SIZES, LossConfig(), pair / "autoencoder.safetensors", "cpu")
    weights_file.save(tmp_path / "other.safetensors", small.autoencoder(seed=9))
    with pytest.raises(UserError, match=r"autoencoder\.digest was "):
        train_model(run, SIZES, LossConfig(), tmp_path / "other.safetensors", "cpu")


def test_bf16_autocast_trains_float32_weights(data, pair, tmp_path):
    run = config(data, tmp_path, mixed_precision="bf16", max_steps=2, grad_checkpointing=True)
    path = train_model(run, SIZES, LossConfig(), pair / "autoencoder.safetensors", "cpu")
    assert all(math.isfinite(line["loss"]) for line in log(tmp_path))
    assert {value.dtype for value in weights_file.read(path).states["model"].values()} == {torch.float32}


def test_too_many_skipped_steps_stop_the_run_and_leave_the_batch(data, pair, tmp_path, monkeypatch):
    monkeypatch.setattr(BitDance, "loss", lambda self, tokens, *rest: self.norm.weight.sum() * float("nan"))
    run = config(data, tmp_path, max_skipped=3, log_every=2)
    with pytest.raises(UserError, match=r"not finite in 4 steps in a row, up to step 4: its batch is in .*bad-batch-4"):
        train_model(run, SIZES, LossConfig(), pair / "autoencoder.safetensors", "cpu")
    assert not list(tmp_path.glob("checkpoint*")) and not (tmp_path / "model.safetensors").exists()
    contents = weights_file.read(tmp_path / "bad-batch-4.safetensors")
    expected = Loader(open_images(data), run, World(0, 1, CPU)).load(3)
    assert contents.metadata["step"] == "4"
    for name in ("inputs", "labels", "rows"):
        assert torch.equal(contents.states["batch"][name], getattr(expected, name))


def test_a_step_that_is_not_finite_changes_nothing(data, pair, tmp_path, monkeypatch):
    """Weights, average and optimizer are as after the step before; the count outlives an interruption."""
    right, steps = BitDance.loss, []

    def wrong_at_the_second_step(self, *arguments):
        steps.append(None)
        return right(self, *arguments) * (float("nan") if len(steps) == 2 else 1)

    def train(folder: str, stop: int) -> weights_file.WeightsFile:
        run = config(data, tmp_path / folder, max_steps=stop, log_every=100)
        train_model(run, SIZES, LossConfig(), pair / "autoencoder.safetensors", "cpu")
        return weights_file.read(tmp_path / folder / f"checkpoint-{stop:07d}.safetensors")

    one = train("one", 1)
    monkeypatch.setattr(BitDance, "loss", wrong_at_the_second_step)
    two = train("two", 2)
    assert two.metadata["digest"] == one.metadata["digest"]
    assert (two.metadata["skipped"], two.metadata["consecutive"]) == ("1", "1")
    first, second = log(tmp_path / "one")[-1], log(tmp_path / "two")[-1]
    assert second["skipped"] == 1 and second["loss"] == first["loss"] and second["grad_norm"] == first["grad_norm"]
    four = train("two", 4)
    assert (four.metadata["skipped"], four.metadata["consecutive"]) == ("1", "0")
    assert four.metadata["digest"] != one.metadata["digest"]
    assert all(value.isfinite().all() for value in four.states["model"].values())


def test_a_first_step_that_is_not_finite(data, pair, tmp_path, monkeypatch):
    """The optimizer has no state of its own yet."""
    monkeypatch.setattr(BitDance, "loss", lambda self, tokens, *rest: self.norm.weight.sum() * float("nan"))
    run = config(data, tmp_path, max_steps=1)
    train_model(run, SIZES, LossConfig(), pair / "autoencoder.safetensors", "cpu")
    states = weights_file.read(tmp_path / "checkpoint-0000001.safetensors").states
    assert all(torch.equal(value, states["model"][name]) for name, value in states["ema"].items())
    assert not any(value.any() for value in states["optimizer"].values())
    assert log(tmp_path)[0]["loss"] is None and log(tmp_path)[0]["skipped"] == 1


def test_a_resumed_run_does_not_log_a_step_twice(data, pair, tmp_path, monkeypatch):
    def train(**changes: object) -> None:
        run = config(data, tmp_path, epochs=3, log_every=1, **changes)
        train_model(run, SIZES, LossConfig(), pair / "autoencoder.safetensors", "cpu")

    train(max_steps=2)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write(json.dumps({"step": 3, "loss": 1.0}) + "\n")  # as if it had been killed before the next checkpoint
    train(max_steps=4)
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_compiling_takes_two_graphs_however_many_steps(grad_checkpointing):
    """The step's number must not be compiled in: each step would be compiled anew."""
    part = objective(LossConfig(perturb_rate=0.2))
    part.network.set_grad_checkpointing(grad_checkpointing)
    part.train()
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    batch = (images, torch.tensor([0, 1]), torch.arange(2))
    steps = (0, 1, 2, 3, 7, 100)
    expected = [part(*batch, step)[0].item() for step in steps]
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(part, backend=count)
    assert [compiled(*batch, step)[0].item() for step in steps] == pytest.approx(expected, rel=1e-6)
    assert 1 <= len(graphs) <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_trains_and_resumes(data, pair, tmp_path, compiled):
    def train(folder: str, **changes: object) -> list[float]:
        run = config(
            data, tmp_path / folder, epochs=2, mixed_precision="none", compile=compiled, log_every=1, **changes
        )
        train_model(run, SIZES, LossConfig(), pair / "autoencoder.safetensors", "cuda")
        return [line["loss"] for line in log(tmp_path / folder)]

    whole = train("whole")
    train("parts", max_steps=3)
    assert train("parts") == pytest.approx(whole, rel=1e-4)


def test_more_classes_than_the_images_have(data, pair, tmp_path, capsys):
    sizes = dataclasses.replace(SIZES, num_classes=5)
    run = config(data, tmp_path, max_steps=1)
    path = train_model(run, sizes, LossConfig(), pair / "autoencoder.safetensors", "cpu")
    network = weights_file.load_model(path)
    assert network.config.num_classes == 5
    assert network.config.class_names == ("class-0", "class-1", "class-2", "class 3", "class 4")
    assert f"warning: {data} has images of 3 classes only, and the model 5" in capsys.readouterr().err


def test_two_processes_train_like_one(data, pair, tmp_path):
    """Same global batch, same draws: the losses agree to rounding, also of a run that goes on with another number."""
    script = tmp_path / "train.py"
    script.write_text("from bitdance.cli.main import main\nmain()\n")
    settings = ["train", "--autoencoder", pair / "autoencoder.safetensors", "--data-path", data, "--image-size", 16,
                "--dim", 64, "--n-layer", 2, "--head-dim", 64, "--head-layers", 2, "--head-ada-ln", 1,
                "--cls-token-num", 2, "--global-batch-size", 4, "--max-steps", 4, "--lr", 3e-3, "--warmup-steps", 0,
                "--perturb-rate", 0.3, "--mixed-precision", "none", "--ema", 0.9, "--num-workers", 1, "--log-every", 1,
                "--device", "cpu", "--results-dir"]  # fmt: skip
    main([*map(str, settings), str(tmp_path / "1")])
    small.run(script, *settings, tmp_path / "2", processes=2)
    one, two = log(tmp_path / "1"), log(tmp_path / "2")
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    networks = [weights_file.load_model(tmp_path / name / "model.safetensors").state_dict() for name in ("1", "2")]
    for name, value in networks[0].items():
        assert (value - networks[1][name]).abs().max() < 1e-3
