"""Training: schedules, optimizer, batches, random draws, FLOPs, and whole runs of a few steps."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import small
import torch
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bitdance.cli.main import main
from bitdance.config import ModelSizes
from bitdance.data.images import open_images
from bitdance.models.transformer import BitDance
from bitdance.runtime.errors import UserError
from bitdance.runtime.process_group import World
from bitdance.training import flops, losses
from bitdance.training import trainer as trainer_module
from bitdance.training.evaluation import Validation
from bitdance.training.loader import Batch, Loader, random_crop_probability
from bitdance.training.losses import AutoencoderLoss, BitDanceLoss
from bitdance.training.optimizer import EMA, NonFiniteGuard, Optimizer, learning_rate, parameter_groups
from bitdance.training.setup import train_autoencoder, train_model
from bitdance.training.train_config import AutoencoderLossConfig, LossConfig, TrainConfig
from bitdance.training.trainer import DataInfo, Trainer
from bitdance.weights import safetensors_files, weights_file
from bitdance.weights.layout import WeightsFile

pytestmark = pytest.mark.usefixtures("quick_previews")

CPU = torch.device("cpu")
SIZES = ModelSizes(**small.SIZES, parallel_num=4)  # with short previews


@pytest.fixture
def data(place) -> pathlib.Path:
    """A folder of 12 images, and autoencoder.safetensors beside it."""
    return place / "pictures"


def config(data: pathlib.Path, **changes: Any) -> TrainConfig:
    return small.train_config(data, pathlib.Path("unused"), **changes)


def train(
    data: pathlib.Path, output: pathlib.Path, loss: LossConfig | None = None, sizes: ModelSizes = SIZES, **changes: Any
) -> pathlib.Path | None:
    run = small.train_config(data, output, **changes)
    return train_model(run, sizes, loss or LossConfig(), data.parent / "autoencoder.safetensors", "cpu")


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read(folder: pathlib.Path, step: int) -> WeightsFile:
    return weights_file.read(folder / f"checkpoint-{step:07d}.safetensors")


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
    decayed, others = parameter_groups(dict(network.named_parameters()), 0.05)
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
    optimizer = Optimizer(dict(network.named_parameters()), run)
    network.weight.grad, network.bias.grad = torch.tensor([[4.0]]), torch.tensor([-5.0])
    optimizer.step(0.1, torch.tensor(0.0))
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


def test_muon_moves_hidden_matrices_by_orthogonal_matrices():
    network = small.model()
    parameters = dict(network.named_parameters())
    run = TrainConfig(pathlib.Path("x"), lr=0.1, weight_decay=0.05, optimizer="muon")
    optimizer, before = Optimizer(parameters, run), {name: p.detach().clone() for name, p in parameters.items()}
    generator = torch.Generator().manual_seed(0)
    for p in parameters.values():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step(0.1, torch.tensor(0.0))
    hidden = {name for name in parameters if name.startswith(("layers.", "head.net.res_blocks", "head.net.ada_ln"))}
    moved = {name.removeprefix("momentum_buffer/") for name in optimizer.state() if name.startswith("momentum_buffer/")}
    assert moved == {name for name in hidden if parameters[name].dim() == 2} and len(moved) > 6
    for name, p in parameters.items():
        update = (before[name] * (1 - 0.1 * 0.05) - p.detach()) / 0.1
        if name in moved:
            singular = torch.linalg.svdvals(update) / (0.2 * max(p.shape) ** 0.5)
            assert singular.min() > 0.5 and singular.max() < 1.3, name
    assert {name.split("/", 1)[0] for name in optimizer.state()} == {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}
    shapes = {name: value.shape for name, value in optimizer.state().items()}
    assert shapes == {name: value.shape for name, value in optimizer.state_templates().items()}
    with pytest.raises(UserError, match="optimizer=muon is for models"):
        Optimizer(dict(small.autoencoder().named_parameters()), run)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_skipped_step_changes_nothing(kind):
    network = small.model()
    config = TrainConfig(pathlib.Path("x"), lr=0.1, optimizer=kind)
    optimizer, ema = Optimizer(dict(network.named_parameters()), config), EMA(network, 0.5)
    guard = NonFiniteGuard(CPU)

    def step(gradient: float) -> None:
        for parameter in network.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        skipped = guard.check(torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0))
        optimizer.step(0.1, skipped)
        ema.update(network, skipped)

    def state() -> list[torch.Tensor]:
        tensors = (*network.parameters(), *optimizer.state().values(), *ema.state.values())
        return [value.detach().clone() for value in tensors]

    step(1.0)
    before = state()
    for gradient in (float("nan"), float("inf")):
        step(gradient)
        assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert (int(guard.skipped), int(guard.consecutive)) == (2, 2)
    step(1.0)
    assert all(not torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert (int(guard.skipped), int(guard.consecutive)) == (2, 0)


# ------------------------------------------------------------ batches


def loader(data: pathlib.Path, rank: int = 0, size: int = 1, **changes: Any) -> Loader:
    return Loader(open_images(data), config(data, **changes), World(rank, size, CPU))


def epochs(batches: Loader, count: int) -> list[list[int]]:
    """The images of some epochs, in their order."""
    size = batches.steps_per_epoch
    return [
        [index for i in range(size) for index in small.image_indices(batches, size * epoch + i)]
        for epoch in range(count)
    ]


@pytest.mark.parametrize("size", [2, 4])
def test_the_global_batch_is_the_same_for_any_number_of_processes(data, size):
    whole, parts = loader(data), [loader(data, rank, size) for rank in range(size)]
    for step in (0, 2, 3, 7):
        expected, found = whole.load(step), [part.load(step) for part in parts]
        inputs, labels, indices = (torch.cat(values) for values in zip(*found, strict=True))
        assert torch.equal(indices, torch.arange(4))
        assert torch.equal(inputs, expected.inputs) and torch.equal(labels, expected.labels)


def test_each_image_occurs_once_per_epoch_and_epochs_differ(data):
    found = epochs(loader(data), 3)
    assert all(sorted(epoch) == list(range(12)) for epoch in found)
    assert len({tuple(epoch) for epoch in found}) == 3
    assert epochs(loader(data, seed=1), 1) != found[:1]


def test_images_that_do_not_fill_a_batch_are_left_to_other_epochs(data):
    found = epochs(loader(data, batch_size=5), 8)
    assert all(len(set(epoch)) == len(epoch) == 10 for epoch in found)
    assert set().union(*found) == set(range(12))


def test_epochs_may_be_requested_in_any_order(data):
    """With one batch per epoch, threads read more epochs at a time than are kept."""
    expected = epochs(loader(data, batch_size=12), 6)
    assert len({tuple(order) for order in expected}) == 6
    batches = loader(data, batch_size=12)
    for step in (3, 2, 1, 0, 5, 0, 4, 3):
        assert small.image_indices(batches, step) == expected[step]


def test_a_resumed_stream_continues_identically(data):
    whole, rest = list(loader(data).stream(0, 8)), list(loader(data).stream(5, 8))
    assert len(whole) == 8 and len(rest) == 3
    for a, b in zip(whole[5:], rest, strict=True):
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.labels, b.labels)
    assert list(loader(data).stream(8, 8)) == []


def test_centre_crops_are_the_images_half_of_them_flipped(data):
    images, batches = open_images(data), loader(data, random_crop=False)
    count = 0
    for step in range(30):
        batch = batches.load(step)
        for pixels, label, index in zip(batch.inputs, batch.labels, small.image_indices(batches, step), strict=True):
            original = torch.from_numpy(np.array(images.read(index)))
            assert label == images.labels[index]
            flipped = torch.equal(pixels, original.flip(1))
            assert flipped or torch.equal(pixels, original)
            count += flipped
    assert 0.35 < count / 120 < 0.65


def test_random_crops_differ_between_epochs(data):
    batches = loader(data)
    views: dict[int, set[bytes]] = {}
    for step in range(9):
        for index, pixels in zip(small.image_indices(batches, step), batches.load(step).inputs, strict=True):
            views.setdefault(index, set()).add(pixels.numpy().tobytes())
    assert sum(map(len, views.values())) > 2.5 * len(views)  # of 3


def test_microbatches_are_parts_of_the_batch_in_order():
    batch = Batch(torch.arange(6).view(6, 1, 1, 1), torch.arange(6), torch.arange(6))
    found = list(batch.split_microbatches(3))
    assert [part.labels.tolist() for part in found] == [[0, 1], [2, 3], [4, 5]]
    assert torch.equal(torch.cat([part.inputs for part in found]), batch.inputs)


# ------------------------------------------------------------ draws


def objective(loss: LossConfig, parallel_num: int = 1, **changes: object) -> BitDanceLoss:
    return BitDanceLoss(small.model(parallel_num=parallel_num, **changes), small.autoencoder(), loss, seed=3)


def random_tokens(batch: int) -> torch.Tensor:
    return torch.randint(0, 2, (batch, 16, 8), generator=torch.Generator().manual_seed(0)) * 2.0 - 1


@pytest.mark.parametrize("parallel_num", [1, 4])
def test_draws_depend_only_on_the_index_in_the_global_batch(parallel_num):
    loss = LossConfig(diff_batch_mul=3, class_dropout=0.5, perturb_rate=0.5)
    part = objective(loss, parallel_num)
    tokens, labels, indices = random_tokens(8), torch.arange(8) % 3, torch.arange(8)
    steps = 16 // parallel_num
    inputs, dropped, t, x_0 = part.draw(tokens, labels, indices, 5)
    assert inputs.shape == tokens.shape
    assert t.shape == (3 * 8 * steps,) and x_0.shape == (3 * 8 * steps, parallel_num, 8)
    times, noise = t.view(3, 8, steps), x_0.view(3, 8, steps, parallel_num, 8)
    for part_of in ([0, 1, 2, 3], [4, 5, 6, 7], [6]):
        few = part.draw(tokens[part_of], labels[part_of], indices[part_of], 5)
        assert torch.equal(few[0], inputs[part_of]) and torch.equal(few[1], dropped[part_of])
        # The words are equal; logarithms may differ in the last bit with the length of a vector.
        torch.testing.assert_close(few[2].view(3, -1, steps), times[:, part_of], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(few[3].view(3, -1, steps, parallel_num, 8), noise[:, part_of], rtol=1e-6, atol=1e-6)
    other = part.draw(tokens, labels, indices, 6)
    assert not torch.equal(other[2], t) and not torch.equal(other[3], x_0) and not torch.equal(other[0], inputs)
    # All images, copies and groups have their own noise.
    assert len(torch.unique(t)) == len(t) and len(torch.unique(x_0)) > 0.99 * x_0.numel()


def test_rates_of_dropped_classes_and_flipped_bits():
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
def test_distribution_of_timesteps(shift):
    tokens, labels, indices = random_tokens(1000), torch.zeros(1000, dtype=torch.int64), torch.arange(1000)
    part = objective(LossConfig(diff_batch_mul=2), time_shift=shift)
    t = part.draw(tokens, labels, indices, 0)[2].double()
    assert t.min() > 0 and t.max() < 1
    # logit(t) ~ N(-0.8, 0.8); a shift s subtracts log s.
    logit = torch.log(t / (1 - t)) + math.log(shift)
    assert logit.mean().item() == pytest.approx(-0.8, abs=0.02)
    assert logit.std().item() == pytest.approx(0.8, abs=0.02)
    uniform = objective(LossConfig(diff_batch_mul=2, time_schedule="uniform"), time_shift=shift)
    u = uniform.draw(tokens, labels, indices, 0)[2].double()
    u = u * shift / (1 + u * (shift - 1))  # undoes the shift
    assert u.min() >= 0 and u.max() < 1
    tenths = torch.arange(1, 10).double() / 10
    assert torch.quantile(u, tenths).tolist() == pytest.approx(tenths.tolist(), abs=0.01)


def test_the_frozen_autoencoder_is_not_trained():
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


@pytest.mark.parametrize("parallel_num", [1, 4])
def test_grad_checkpointing_keeps_fewer_activations(parallel_num):
    """Counts the bytes that transformer and head keep for the backward pass."""
    network = small.model(parallel_num=parallel_num, n_layer=4, head_layers=4).train()
    tokens = torch.ones(8, 16, 8)
    rows = 4 * 8 * 16 // parallel_num
    t, x_0 = torch.full((rows,), 0.5), torch.zeros(rows, parallel_num, 8)
    cond, target = torch.zeros(rows, parallel_num, 64, requires_grad=True), torch.ones(rows, parallel_num, 8)
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

    def kept(function) -> int:
        storages: dict[int, int] = {}

        def note(value: torch.Tensor) -> torch.Tensor:
            storage = value.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            result = function()
        assert result.requires_grad
        return sum(storages.values())

    found = {}
    for enabled in (False, True):
        network.set_grad_checkpointing(enabled)
        found[enabled] = (
            kept(lambda: network(tokens, torch.zeros(8, dtype=torch.int64))),
            kept(lambda: network.head.loss(target, cond, t, x_0)),
        )
    for plain, checkpointed in zip(found[False], found[True], strict=True):
        assert checkpointed < 0.4 * plain


def check_one_graph(part: nn.Module, batch: tuple[torch.Tensor, ...], steps: tuple[int, ...]) -> list[float]:
    """Checks that the number of the step is no constant of the graph; returns the losses of the steps."""
    losses, graphs = [part(*batch, step)[0].item() for step in steps], []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(part, backend=count)
    assert [compiled(*batch, torch.tensor(step))[0].item() for step in steps] == pytest.approx(losses, rel=1e-6)
    assert len(graphs) == 1
    return losses


def test_compiling_needs_one_graph_for_all_steps():
    part = objective(LossConfig(perturb_rate=0.2), n_layer=1, head_layers=1).train()
    part.network.set_grad_checkpointing(True)
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    losses = check_one_graph(part, (images, torch.tensor([0, 1]), torch.arange(2)), (0, 1, 2, 3, 7, 100))
    assert len(set(losses)) == 6


def test_compiling_an_autoencoder_needs_one_graph_for_all_steps():
    """Those of the ramp of the adversarial weight and later ones."""
    config = AutoencoderLossConfig(
        adversarial_weight=0.1, adversarial_ramp=3, discriminator_width=8, discriminator_layers=1
    )
    part = AutoencoderLoss(small.autoencoder(), config)
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    assert len(set(check_one_graph(part, (images, torch.zeros(2), torch.arange(2)), (0, 1, 2, 3, 7)))) == 4


def test_without_a_ramp_the_adversarial_weight_counts_from_the_first_step():
    images, rest = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8), (torch.zeros(2), torch.arange(2))
    losses = {}
    for ramp, step in ((0, 0), (4, 4), (4, 0)):
        torch.manual_seed(0)
        config = AutoencoderLossConfig(
            adversarial_weight=0.5, adversarial_ramp=ramp, discriminator_width=8, discriminator_layers=1
        )
        losses[ramp, step] = AutoencoderLoss(small.autoencoder(), config)(images, *rest, step)[0].item()
    assert losses[0, 0] == losses[4, 4] != losses[4, 0]


# ------------------------------------------------------------ FLOPs


@pytest.mark.parametrize(("parallel_num", "encodes"), [(1, True), (4, False)])
def test_flops_of_a_step_of_a_model(parallel_num, encodes):
    part = objective(LossConfig(diff_batch_mul=3), parallel_num, head_layers=4, head_ada_ln=2).train()
    images = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8)
    labels, indices = torch.arange(5) % 3, torch.arange(5)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if encodes:
            part(images, labels, indices, 0)[0].backward()
        else:
            inputs, dropped, t, x_0 = part.draw(torch.ones(5, 16, 8), labels, indices, 0)
            part.network.loss(torch.ones(5, 16, 8), dropped, t, x_0, inputs).backward()
    assert flops.step_flops(part, 5, 16, encodes) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_flops_of_a_step_of_an_autoencoder():
    part = AutoencoderLoss(small.autoencoder(), AutoencoderLossConfig())
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        part(images, torch.zeros(2), torch.arange(2), 0)[0].backward()
    assert flops.step_flops(part, 2, 32, encodes=True) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_peak_of_a_gpu():
    for device, tflops in {
        "NVIDIA H200": 989, "NVIDIA H100 80GB HBM3": 989, "NVIDIA GH200 480GB": 989, "NVIDIA H100 PCIe": 756,
        "NVIDIA A100-SXM4-80GB": 312, "NVIDIA L40S": 362, "NVIDIA L4": 121, "NVIDIA H20": 148, "NVIDIA A10G": 0,
        "NVIDIA RTX A4000": 0, "NVIDIA RTX A1000 Laptop GPU": 0, "Another GPU": 0,
    }.items():  # fmt: skip
        assert flops.peak_bf16(device) == (tflops * 1e12 or None), device


# ------------------------------------------------------------ whole runs


def test_an_autoencoder_learns_and_leaves_its_files(data, tmp_path):
    held_out = small.pictures(tmp_path / "held-out", each=2)
    settings = {"epochs": 14, "save_every": 0, "keep_epochs": 7, "random_crop": False, "val_every": 0}
    run = small.train_config(data, tmp_path / "run", val_path=held_out, **settings)
    path = train_autoencoder(run, small.NETWORK, AutoencoderLossConfig(), "cpu")
    lines = small.read_log(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 43))
    assert ["val_loss" in line for line in lines] == [False] * 41 + [True]
    psnr = [line["psnr"] for line in lines]
    assert sum(psnr[-6:]) / 6 > sum(psnr[:6]) / 6 + 1.5  # dB
    assert {"loss", "grad_norm", "lr", "images_per_second", "waiting", "epoch", "entropy_sample"} <= lines[0].keys()
    assert names(tmp_path / "run") == [
        "autoencoder.safetensors", "checkpoint-0000042.safetensors", "epoch_14.safetensors", "epoch_7.safetensors",
        "log.jsonl", "preview-0000042.png", "report.html", "settings.json",
    ]  # fmt: skip
    assert names(tmp_path) == ["held-out", "run"]  # no lock is left
    network = weights_file.load_autoencoder(path)
    assert network.config == small.NETWORK
    state = read(tmp_path / "run", 42).states
    assert all(torch.equal(value, state["ema"][name]) for name, value in network.state_dict().items())
    with Image.open(tmp_path / "run" / "preview-0000042.png") as preview:
        assert preview.size == (4 * (2 * 16 + 2) + 2, 2 * (2 * 16 + 2) + 2)  # images above reconstructions


@pytest.mark.parametrize("parallel_num", [1, 4])
def test_a_model_learns_and_leaves_its_files(data, tmp_path, parallel_num):
    path = train(data, tmp_path / "run", sizes=dataclasses.replace(SIZES, parallel_num=parallel_num), epochs=12)
    losses = [line["loss"] for line in small.read_log(tmp_path / "run")]
    assert len(losses) == 36
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert names(tmp_path / "run") == [
        "checkpoint-0000036.safetensors", "log.jsonl", "model.safetensors", "preview-0000036.png", "report.html",
        "samples.png", "settings.json",
    ]  # fmt: skip
    network = weights_file.load_model(path)
    assert network.config.class_names == ("class-0", "class-1", "class-2")
    assert (network.config.num_classes, network.config.grid, network.config.parallel_num) == (3, 4, parallel_num)
    states = read(tmp_path / "run", 36).states
    assert states.keys() == {"ema", "model", "optimizer"}
    assert not any(name.startswith(("encoder", "decoder", "vae")) for name in states["model"])
    assert any(not torch.equal(value, states["model"][name]) for name, value in states["ema"].items())


def test_without_ema_the_raw_weights_are_kept(data, tmp_path):
    path = train(data, tmp_path, ema=-1.0, max_steps=2)
    states = read(tmp_path, 2).states
    assert states.keys() == {"model", "optimizer"}
    kept = weights_file.load_model(path).state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in states["model"].items())


def test_bf16_autocast_trains_float32_weights(data, tmp_path):
    path = train(data, tmp_path, precision="bf16", max_steps=2, grad_checkpointing=True)
    assert all(math.isfinite(line["loss"]) for line in small.read_log(tmp_path))
    assert {value.dtype for value in weights_file.read(path).states["model"].values()} == {torch.float32}


def test_more_classes_than_the_images_have(data, tmp_path, capsys):
    path = train(data, tmp_path, sizes=dataclasses.replace(SIZES, num_classes=5), max_steps=1)
    config = weights_file.load_model(path).config
    assert config.num_classes == 5
    assert config.class_names == ("class-0", "class-1", "class-2", "class 3", "class 4")
    assert f"warning: {data} has images of 3 classes, and the model 5" in capsys.readouterr().err


def test_microbatches_train_like_the_whole_batch(data, tmp_path):
    for count in (1, 2, 4):
        train(data, tmp_path / str(count), LossConfig(perturb_rate=0.3), accumulate=count, max_steps=3)
    whole = small.read_log(tmp_path / "1")
    assert len(whole) == 3
    for count in (2, 4):
        for a, b in zip(whole, small.read_log(tmp_path / str(count)), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    with pytest.raises(UserError, match="accumulate=3 does not divide the 4 images of a process"):
        train(data, tmp_path / "3", accumulate=3)


def test_two_processes_train_like_one(data, tmp_path):
    """Same global batch and draws: losses agree to rounding, also when another number of processes resumes the run."""
    settings = {
        "autoencoder": data.parent / "autoencoder.safetensors", "data_path": data, "image_size": 16, **small.SIZES,
        "batch_size": 4, "lr": 3e-3, "warmup_steps": 0, "perturb_rate": 0.3, "precision": "fp32", "ema": 0.9,
        "num_workers": 1, "log_every": 1, "device": "cpu",
    }  # fmt: skip
    flags = ["train", *small.flags(settings)]
    processes = small.start(tmp_path, [*flags, "--output", str(tmp_path / "2"), "--max-steps", "4"], size=2)
    main([*flags, "--output", str(tmp_path / "1"), "--max-steps", "6"])
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0], (tmp_path / "err0").read_text()
    assert json.loads((tmp_path / "2" / "settings.json").read_text())["run"]["processes"] == 2
    assert len(small.read_log(tmp_path / "2")) == 4
    main([*flags, "--output", str(tmp_path / "2"), "--max-steps", "6"])
    one, two = small.read_log(tmp_path / "1"), small.read_log(tmp_path / "2")
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    states = [weights_file.load_model(tmp_path / name / "model.safetensors").state_dict() for name in ("1", "2")]
    assert all((value - states[1][name]).abs().max() < 1e-3 for name, value in states[0].items())


def compile_on_the_cpu() -> None:
    """With the graphs and the autograd of a GPU's compilation, but without generated code."""
    real = nn.Module.compile
    trainer_module.find_compiler_problem = lambda device: None
    backend = torch._dynamo.backends.registry.lookup_backend("aot_eager")

    def count(graph: Any, inputs: Any) -> Any:
        print("compiled a graph", flush=True)
        return backend(graph, inputs)

    nn.Module.compile = lambda module: real(module, backend=count, fullgraph=True)


@pytest.mark.slow
def test_compiled_processes_with_checkpointing_train_like_an_eager_one(data, tmp_path):
    settings = {
        "autoencoder": data.parent / "autoencoder.safetensors", "data_path": data, "image_size": 16, **small.SIZES,
        "batch_size": 4, "lr": 3e-3, "warmup_steps": 0, "perturb_rate": 0.3, "precision": "fp32", "ema": 0.9,
        "num_workers": 1, "log_every": 1, "device": "cpu", "max_steps": 5, "preview_every": 0,
    }  # fmt: skip
    flags = ["train", *small.flags(settings)]
    more = ["--compile", "--grad-checkpointing", "--output", str(tmp_path / "2")]
    processes = small.start(tmp_path, [*flags, *more], size=2, prepare=compile_on_the_cpu)
    main([*flags, "--output", str(tmp_path / "1")])
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0], (tmp_path / "err0").read_text()
    assert (tmp_path / "out0").read_text().count("compiled a graph") == 1, "the step is no constant of the graph"
    one, two = small.read_log(tmp_path / "1"), small.read_log(tmp_path / "2")
    assert [line["step"] for line in two] == [1, 2, 3, 4, 5]
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(("compiles", "problem", "expected"), [(None, None, 0), (True, None, 1), (True, "no g++", 0)])
def test_training_on_a_cpu_is_compiled_on_request_and_where_possible(
    data, tmp_path, monkeypatch, capsys, compiles, problem, expected
):
    calls: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: calls.append(module))
    monkeypatch.setattr(trainer_module, "find_compiler_problem", lambda device: problem)
    config = small.train_config(data, tmp_path, compile=compiles)
    objective = BitDanceLoss(small.model(), small.autoencoder(), LossConfig(), 0)
    Trainer(objective, config, loader(data), World(0, 1, CPU), DataInfo(12, ""))
    assert len(calls) == expected
    assert ("training runs uncompiled (no g++)" in capsys.readouterr().err) == (problem is not None)


def test_a_compiler_that_fails_ends_training_with_advice(data, tmp_path, monkeypatch):
    def fail(graph: object, inputs: object) -> Any:
        raise RuntimeError("C++ compile error\nmany lines")

    monkeypatch.setattr(trainer_module, "find_compiler_problem", lambda device: None)
    monkeypatch.setattr(
        nn.Module, "compile", lambda module: setattr(module, "forward", torch.compile(module.forward, backend=fail))
    )
    with pytest.raises(UserError, match=r"compiling the loss failed \(.*C\+\+ compile error\): turn `compile` off"):
        train(data, tmp_path / "run", compile=True)
    assert not list(tmp_path.rglob("*.safetensors")), "nothing is half-written"


def test_code_of_the_head_in_bf16_declares_no_name_twice(inductor_code):
    """With P = 1, Inductor 2.13 made C++ code from two equal gradients of biases that no compiler accepts."""
    head, rows = small.model(head_layers=1).head, 64
    with torch.autocast("cpu", torch.bfloat16):
        loss = torch.compile(head.loss)(
            torch.ones(rows, 1, 8), torch.zeros(rows, 1, 64), torch.zeros(rows), torch.zeros(rows, 1, 8)
        )
    loss.backward()
    code = "".join(inductor_code)
    assert re.search(r"auto (at_BFloat16_\w+) = ", code), "sums over rows are written as bfloat16"
    assert not re.search(r"auto (at_BFloat16_\w+) = [^}]*auto \1 = ", code)


@pytest.mark.slow
@pytest.mark.parametrize("parallel_num", [1, 4])
def test_compiled_gradients_in_bf16_are_as_exact_as_uncompiled_ones(parallel_num):
    part = objective(LossConfig(), parallel_num)
    tokens = torch.randint(0, 256, (8, 16, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def gradients(loss: Callable[..., Any], bf16: bool) -> torch.Tensor:
        part.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value, _ = loss(tokens, torch.arange(8) % 3, torch.arange(8), torch.tensor(5))
        value.backward()
        return torch.cat([p.grad.flatten() for p in part.network.parameters() if p.grad is not None])

    torch._dynamo.reset()
    exact, uncompiled = gradients(part, bf16=False), gradients(part, bf16=True)
    compiled = gradients(torch.compile(part), bf16=True)
    assert 0 < (compiled - uncompiled).norm() < 0.1 * exact.norm()
    assert (compiled - exact).norm() < 1.2 * (uncompiled - exact).norm()


def test_images_are_encoded_in_parts(monkeypatch):
    part = objective(LossConfig())
    images = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8)
    expected = part.tokenize(images)
    sizes, real = [], part.autoencoder.encode
    monkeypatch.setattr(losses, "MAX_ENCODED_PIXELS", 2 * 16 * 16)
    monkeypatch.setattr(part.autoencoder, "encode", lambda x: sizes.append(len(x)) or real(x))
    assert torch.equal(part.tokenize(images), expected) and sizes == [2, 2, 1]


@pytest.mark.slow
def test_two_processes_train_an_autoencoder_and_its_discriminator_like_one(data, tmp_path):
    settings = {
        "data_path": data, "image_size": 16, "widths": "16 16", "blocks": 1, "bits": 8, "space_to_depth": 2,
        "batch_size": 4, "lr": 3e-3, "warmup_steps": 0, "precision": "fp32", "ema": 0.9, "num_workers": 1,
        "log_every": 1, "device": "cpu", "entropy_weight": 0, "adversarial_weight": 0.1, "adversarial_ramp": 2,
        "discriminator_width": 8, "discriminator_layers": 1, "max_steps": 4,
    }  # fmt: skip
    flags = ["train-autoencoder", *" ".join(small.flags(settings)).split(), "--linear"]
    processes = small.start(tmp_path, [*flags, "--output", str(tmp_path / "2")], size=2)
    main([*flags, "--output", str(tmp_path / "1")])
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    one, two = small.read_log(tmp_path / "1"), small.read_log(tmp_path / "2")
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "discriminator_loss", "real_logit", "fake_logit"):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name
        for name in ("grad_norm", "discriminator_grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-3), name
    states = [weights_file.load_autoencoder(tmp_path / name).state_dict() for name in ("1", "2")]
    assert all((value - states[1][name]).abs().max() < 1e-3 for name, value in states[0].items())


# ------------------------------------------------------------ resuming


def test_an_interrupted_run_ends_like_an_uninterrupted_one(data, tmp_path):
    def run(folder: str, **changes: Any) -> None:
        loss = LossConfig(perturb_rate=0.3, drop_rate=0.1)
        train(data, tmp_path / folder, loss, epochs=3, warmup_steps=4, decay_start=4, **changes)

    run("whole")
    run("parts", max_steps=2)
    run("parts", max_steps=5, num_workers=1, log_every=2)
    run("parts")
    a, b = (read(tmp_path / folder, 9) for folder in ("whole", "parts"))
    assert a.metadata["step"] == b.metadata["step"] == "9"
    assert a.metadata["digest"] == b.metadata["digest"]  # of parameters, EMA and optimizer, bit for bit
    assert a.states["optimizer"].keys() == b.states["optimizer"].keys()
    finished = [weights_file.read(tmp_path / folder / "model.safetensors") for folder in ("whole", "parts")]
    assert finished[0].metadata["digest"] == finished[1].metadata["digest"]
    run("parts")  # no step is left
    assert read(tmp_path / "parts", 9).metadata["digest"] == a.metadata["digest"]


@pytest.mark.parametrize("is_adversarial", [False, True])
def test_an_interrupted_autoencoder_run_ends_like_an_uninterrupted_one(data, tmp_path, is_adversarial):
    network, loss = small.NETWORK, AutoencoderLossConfig()
    if is_adversarial:
        network = dataclasses.replace(network, linear=True, space_to_depth=2)
        loss = AutoencoderLossConfig(
            l1_weight=0.5, adversarial_weight=0.1, adversarial_ramp=3, discriminator_width=8, discriminator_layers=1
        )
    for folder, stops in (("whole", (4,)), ("parts", (1, 4))):
        for stop in stops:
            run = small.train_config(data, tmp_path / folder, max_steps=stop)
            train_autoencoder(run, network, loss, "cpu")
    a, b = (read(tmp_path / folder, 4) for folder in ("whole", "parts"))
    assert a.metadata["digest"] == b.metadata["digest"] and a.metadata["step"] == "4"
    assert ("discriminator" in a.states) == is_adversarial


def test_a_discriminator_of_another_shape_is_not_loaded(data, tmp_path):
    """A checkpoint whose discriminator does not fit counts as damaged, like one whose optimizer does not."""
    loss = AutoencoderLossConfig(adversarial_weight=0.1, discriminator_width=8, discriminator_layers=1)
    train_autoencoder(small.train_config(data, tmp_path, max_steps=1), small.NETWORK, loss, "cpu")
    contents = read(tmp_path, 1)
    states = {part: dict(state) for part, state in contents.states.items() if part != "autoencoder"}
    states["discriminator"]["layers.0.bias"] = torch.zeros(9)
    tensors = {f"{part}/{name}": value for part, state in states.items() for name, value in state.items()}
    metadata = {name: contents.metadata[name] for name in ("step", "skipped", "consecutive", "network")}
    path = tmp_path / "checkpoint-0000001.safetensors"
    safetensors_files.save_tensors(path, tensors, "training", contents.config, **metadata)
    with pytest.raises(UserError, match="the tensors of its discriminator are not those of the network"):
        train_autoencoder(small.train_config(data, tmp_path, max_steps=2), small.NETWORK, loss, "cpu")


@pytest.mark.parametrize("part", ["all", "decoder"])
def test_an_autoencoder_starts_from_another(data, tmp_path, part):
    weights_file.save(tmp_path / "start.safetensors", small.autoencoder(seed=5))
    run = small.train_config(data, tmp_path / "run", max_steps=1, lr=0.0, weight_decay=0.0)
    start = {"init_from": str(tmp_path / "start.safetensors"), "init_part": part}
    path = train_autoencoder(run, small.NETWORK, AutoencoderLossConfig(), "cpu", **start)
    trained, given = weights_file.load_autoencoder(path).state_dict(), small.autoencoder(seed=5).state_dict()
    for name, value in trained.items():
        if part == "all" or name.startswith("decoder."):
            assert torch.allclose(value, given[name], rtol=0, atol=1e-6), name
    assert torch.equal(trained["encoder.conv_in.weight"], given["encoder.conv_in.weight"]) == (part == "all")
    wider = dataclasses.replace(small.NETWORK, bits=16)
    with pytest.raises(UserError, match=r"start.safetensors has other sizes \(.* is \(.*\) instead of"):
        train_autoencoder(
            dataclasses.replace(run, output=tmp_path / "b"), wider, AutoencoderLossConfig(), "cpu", **start
        )
    assert not list((tmp_path / "b").glob("*.safetensors")) if (tmp_path / "b").exists() else True


def test_a_run_that_continues_says_that_it_does_not_start_again(data, tmp_path, capsys):
    weights_file.save(tmp_path / "start.safetensors", small.autoencoder(seed=5))
    start = {"init_from": str(tmp_path / "start.safetensors")}
    for stop, notes in ((1, 0), (2, 1)):
        run = small.train_config(data, tmp_path / "run", max_steps=stop)
        train_autoencoder(run, small.NETWORK, AutoencoderLossConfig(), "cpu", **start)
        note = f"{run.output} is continued from its checkpoint, not from {start['init_from']}."
        assert capsys.readouterr().err.count(note) == notes


def test_an_unreadable_image_is_named_once_also_where_principal_components_are_computed(data, tmp_path, capsys):
    folder = pathlib.Path(shutil.copytree(data, tmp_path / "data"))
    bad = sorted(folder.rglob("*.png"))[0]
    bad.write_bytes(bad.read_bytes()[:60])
    linear = dataclasses.replace(small.NETWORK, linear=True)
    train_autoencoder(small.train_config(folder, tmp_path / "run", max_steps=3), linear, AutoencoderLossConfig(), "cpu")
    assert capsys.readouterr().err.count("skipped an unreadable image") == 1


def test_a_decoder_is_trained_alone(data, tmp_path):
    """The tokens stay the same, and so does the exactness of a resumed run."""
    weights_file.save(tmp_path / "start.safetensors", small.autoencoder(seed=5), dtype=torch.float16)
    start = {"init_from": str(tmp_path / "start.safetensors")}
    loss = AutoencoderLossConfig(decoder_only=True)
    for folder, stops in (("whole", (4,)), ("parts", (1, 4))):
        for stop in stops:
            run = small.train_config(data, tmp_path / folder, max_steps=stop, ema=0.9)
            path = train_autoencoder(run, small.NETWORK, loss, "cpu", **start)
    states = [read(tmp_path / folder, 4) for folder in ("whole", "parts")]
    assert states[0].metadata["digest"] == states[1].metadata["digest"]
    trained, given = (weights_file.load_autoencoder(file).state_dict() for file in (path, start["init_from"]))
    same = {name.split(".")[0]: set() for name in trained}
    for name, value in trained.items():
        same[name.split(".")[0]].add(torch.equal(value, given[name]))
    assert same["encoder"] == {True} and False in same["decoder"]
    digests = [weights_file.tokenizer_digest(weights_file.read(file)) for file in (path, start["init_from"])]
    assert digests[0] == digests[1]
    with pytest.raises(UserError, match="`decoder_only` needs `init_from`"):
        train_autoencoder(dataclasses.replace(run, output=tmp_path / "new"), small.NETWORK, loss, "cpu")
    with pytest.raises(UserError, match="`decoder_only` keeps the encoder of `init_from`: leave `init_part` out"):
        train_autoencoder(run, small.NETWORK, loss, "cpu", **start, init_part="decoder")
    other = dataclasses.replace(small.NETWORK, bit_depths=(4, 4), bits=8)
    plain = AutoencoderLossConfig(decoder_only=True, entropy_weight=0, commitment_weight=0)
    with pytest.raises(UserError, match=r"keeps the tokens of .*start.safetensors, .*: bit_depths \(\)"):
        train_autoencoder(dataclasses.replace(run, output=tmp_path / "new"), other, plain, "cpu", **start)


def test_validation_of_an_autoencoder_leaves_the_discriminator_out(data, tmp_path):
    network, run = small.autoencoder(), small.train_config(data, tmp_path, val_path=small.pictures(tmp_path / "val"))
    values = []
    for weight in (0.0, 0.5):
        config = AutoencoderLossConfig(adversarial_weight=weight, discriminator_width=8, discriminator_layers=1)
        values.append(Validation(AutoencoderLoss(network, config), run, ("a",), World(0, 1, CPU)).metrics())
    assert values[0] == values[1] and {"val_loss", "val_psnr", "val_ssim"} == values[0].keys()


@pytest.mark.parametrize(
    ("network", "loss", "message"),
    [
        ({"widths": (32, 32), "space_to_depth": 8}, {}, r"image_size=16 is invalid: it must be larger than 16"),
        ({}, {"adversarial_weight": 0.1}, r"image_size=16 is invalid: with discriminator_layers=3 at least 24"),
        ({"bits": 8, "bit_depths": (4, 4)}, {}, r"`bit_depths` needs commitment_weight=0 and entropy_weight=0"),
    ],
)
def test_settings_of_an_autoencoder_that_cannot_work(data, tmp_path, network, loss, message):
    config = dataclasses.replace(small.NETWORK, **network)
    with pytest.raises(UserError, match=message):
        train_autoencoder(small.train_config(data, tmp_path / "run"), config, AutoencoderLossConfig(**loss), "cpu")
    assert not (tmp_path / "run").exists()


def test_what_all_processes_have_alike(data, tmp_path, monkeypatch):
    """DDP gives them the weights of the first: the EMA is no copy of those before. It need not send buffers."""
    given: dict[str, Any] = {}

    class FirstProcess(nn.Module):
        def __init__(self, module: nn.Module, **options: Any) -> None:
            super().__init__()
            given.update(options)
            for parameter in module.parameters():
                parameter.data.fill_(0.5)

    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", FirstProcess)
    objective = AutoencoderLoss(small.autoencoder(), AutoencoderLossConfig())
    run = small.train_config(data, tmp_path)
    trainer = Trainer(objective, run, loader(data, 1, 2), World(1, 2, CPU), DataInfo(12, ""))
    assert all((value == 0.5).all() for value in trainer.ema.state.values())
    assert given["broadcast_buffers"] is False


def test_problems_of_an_autoencoder_are_named():
    objective = AutoencoderLoss(small.autoencoder(), AutoencoderLossConfig())
    healthy = {"dead_bits": 0.0, "bit_entropy": 0.98, "discriminator_loss": 0.9}
    assert objective.find_problems(healthy) == objective.find_problems({}) == set()
    cases = (("dead_bits", 2.0, "constant"), ("bit_entropy", 0.3, "half"), ("discriminator_loss", 0.01, "patch"))
    for name, value, word in cases:
        (problem,) = objective.find_problems({**healthy, name: value})
        assert word in problem and name in problem
    bits = torch.ones(2, 8, 4, 4)
    bits[:, 3:] = torch.rand(2, 5, 4, 4).sub(0.5).sign()
    assert losses._bit_metrics(bits)["dead_bits"] == 3


def test_other_settings_are_refused_with_the_differences(data, tmp_path):
    train(data, tmp_path, max_steps=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError) as error:
        train(data, tmp_path, LossConfig(drop_rate=0.1), dataclasses.replace(SIZES, n_layer=3), max_steps=2, lr=1e-4,
              seed=7, num_workers=1)  # fmt: skip
    message = str(error.value)
    assert message.startswith(f"{tmp_path} belongs to a run with other settings (")
    for change in ("`lr` was 0.003, is 0.0001", "`seed` was 0, is 7", "`n_layer` was 2, is 3"):
        assert change in message
    assert "`drop_rate` was 0.0, is 0.1" in message
    assert "max_steps" not in message and "weight_decay" not in message and "num_workers" not in message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_images_or_another_autoencoder_are_refused(data, tmp_path):
    place = tmp_path / "place"
    shutil.copytree(data.parent, place)
    train(data, tmp_path / "run", max_steps=1)
    train(place / "pictures", tmp_path / "run", max_steps=2)  # images and autoencoder may be moved
    first = sorted((place / "pictures").rglob("*.png"))[0]
    first.rename(first.with_name("renamed.png"))
    with pytest.raises(UserError, match="the names of the images, or how they are decoded, differ"):
        train(place / "pictures", tmp_path / "run")
    first.with_name("renamed.png").rename(first)
    shutil.copy(first, first.with_name("another.png"))
    with pytest.raises(UserError, match=r"\(it had 12 images, now there are 13; the names of the images, or "):
        train(place / "pictures", tmp_path / "run")
    first.with_name("another.png").unlink()
    weights_file.save(place / "autoencoder.safetensors", small.autoencoder(seed=9))
    with pytest.raises(UserError, match=r"\(the weights of the `autoencoder` differ\)"):
        train(place / "pictures", tmp_path / "run")


def test_the_folder_of_another_kind_of_run_is_refused_in_few_words(data, tmp_path):
    train(data, tmp_path, max_steps=1)
    with pytest.raises(UserError, match=rf"^{tmp_path} belongs to another kind of run: use another folder"):
        train_autoencoder(
            small.train_config(data, tmp_path, batch_size=6), small.NETWORK, AutoencoderLossConfig(), "cpu"
        )
    settings = {"ema": 0.5, "lr": 1.0, "seed": 1, "beta1": 0.1, "beta2": 0.1, "min_lr": 1.0, "warmup_steps": 9}
    others = {"weight_decay": 0.0, "max_grad_norm": 2.0, "decay_start": 3, "batch_size": 6, "random_crop": False}
    with pytest.raises(UserError, match=r"; and 2 more\): use those settings"):
        train(data, tmp_path, **settings, **others)


def test_a_setting_of_a_later_release_has_its_default_in_older_runs(data, tmp_path):
    train(data, tmp_path, max_steps=1)
    stored = json.loads((tmp_path / "settings.json").read_text())
    assert stored["train"].pop("weight_decay") == 0.05
    (tmp_path / "settings.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"\(`weight_decay` was 0.05, is 0.1\)"):
        train(data, tmp_path, max_steps=2, weight_decay=0.1)
    train(data, tmp_path, max_steps=2)
    assert json.loads((tmp_path / "settings.json").read_text())["train"]["weight_decay"] == 0.05


def test_more_epochs_extend_a_finished_run(data, tmp_path, capsys):
    train(data, tmp_path / "whole", epochs=3)
    train(data, tmp_path / "run", epochs=2, max_steps=4)
    settings = tmp_path / "run" / "settings.json"
    reached = settings.read_text()
    settings.write_text(reached.replace('"last_step": 4', '"last_step": 6'))
    with pytest.raises(UserError, match=r"\(`epochs` was 2, is 3 \(it can only be raised"):  # it is not finished
        train(data, tmp_path / "run", epochs=3)
    settings.write_text(reached)
    train(data, tmp_path / "run", epochs=2)
    capsys.readouterr()
    train(data, tmp_path / "run", epochs=3)
    change = "epochs extended from 2 to 3"
    output = capsys.readouterr()
    assert f"bitdance: {change}" in output.err.splitlines()
    assert "12 images: 9 steps, the last 3 in " in output.out.splitlines()[0]
    lines = small.read_log(tmp_path / "run")
    assert [(line["step"], line.get("note")) for line in lines] == [
        *((step, None) for step in range(1, 7)), (6, change), *((step, None) for step in range(7, 10)),
    ]  # fmt: skip
    # With a constant learning rate it ends like a run that had three epochs from the start.
    assert read(tmp_path / "run", 9).metadata["digest"] == read(tmp_path / "whole", 9).metadata["digest"]
    with pytest.raises(UserError, match=r"\(`epochs` was 3, is 2 \(it can only be raised"):
        train(data, tmp_path / "run", epochs=2)


def test_more_steps_or_epochs_continue_a_run_that_ended_at_its_limit_of_steps(data, tmp_path, capsys):
    train(data, tmp_path, epochs=2, max_steps=4)
    train(data, tmp_path, epochs=2, max_steps=4)
    assert "nothing is left to do; a larger `max_steps` or more `epochs` would continue it." in capsys.readouterr().err
    train(data, tmp_path, epochs=2, max_steps=5)
    train(data, tmp_path, epochs=3)
    assert "epochs extended from 2 to 3" in capsys.readouterr().err
    assert small.read_log(tmp_path)[-1]["step"] == 9


def test_a_folder_with_missing_or_other_settings(data, tmp_path):
    train(data, tmp_path, max_steps=1)
    path, another = tmp_path / "settings.json", "belongs to another kind of run: use another folder, or delete it to"
    for settings, sentence in (
        (None, "has checkpoints but no settings.json: restore it, or delete the folder to start over."),
        ("{", "settings.json cannot be read"),
        ('{"sampling": {"num_steps": 100}}', f"{another} start over."),
        ('{"run": []}', f"{another} start over."),
    ):
        path.unlink() if settings is None else path.write_text(settings)
        before = names(tmp_path)
        with pytest.raises(UserError) as error:
            train(data, tmp_path, max_steps=2)
        assert sentence in str(error.value) and "\n" not in str(error.value)
        assert names(tmp_path) == before


# ------------------------------------------------------------ steps that are not finite


def test_too_many_skipped_steps_stop_the_run_and_leave_the_batch(data, tmp_path, monkeypatch):
    monkeypatch.setattr(BitDance, "loss", lambda self, tokens, *rest: self.norm.weight.sum() * float("nan"))
    sentence = (
        r"not finite in 4 consecutive steps, up to step 4: the batch is in .*bad-batch-4.*; "
        r"lower `lr`, or train in float32 \(`precision`\)"
    )
    with pytest.raises(UserError, match=sentence):
        train(data, tmp_path, max_skipped=3, log_every=2)
    assert not list(tmp_path.glob("checkpoint*")) and not (tmp_path / "model.safetensors").exists()
    contents = weights_file.read(tmp_path / "bad-batch-4.safetensors")
    assert contents.metadata["step"] == "4"
    for name, value in loader(data).load(3)._asdict().items():
        assert torch.equal(contents.states["batch"][name], value)


def test_a_step_that_is_not_finite_changes_nothing(data, tmp_path, monkeypatch):
    """Weights, EMA and optimizer are those after the step before; the count survives an interruption."""
    loss, steps = BitDance.loss, []

    def bad_at_the_second_step(self, *arguments):
        if isinstance(arguments[0], FakeTensor):  # FLOPs are counted before the first step
            return loss(self, *arguments)
        steps.append(None)
        return loss(self, *arguments) * (float("nan") if len(steps) == 2 else 1)

    def run(folder: str, stop: int) -> WeightsFile:
        train(data, tmp_path / folder, max_steps=stop, log_every=100)
        return read(tmp_path / folder, stop)

    one = run("one", 1)
    monkeypatch.setattr(BitDance, "loss", bad_at_the_second_step)
    two = run("two", 2)
    assert two.metadata["digest"] == one.metadata["digest"]
    assert (two.metadata["skipped"], two.metadata["consecutive"]) == ("1", "1")
    first, second = small.read_log(tmp_path / "one")[-1], small.read_log(tmp_path / "two")[-1]
    assert second["skipped"] == 1 and second["loss"] == first["loss"] and second["grad_norm"] == first["grad_norm"]
    four = run("two", 4)
    assert (four.metadata["skipped"], four.metadata["consecutive"]) == ("1", "0")
    assert four.metadata["digest"] != one.metadata["digest"]
    assert all(value.isfinite().all() for value in four.states["model"].values())


def test_a_first_step_that_is_not_finite(data, tmp_path, monkeypatch):
    """The optimizer has no state of its own yet."""
    monkeypatch.setattr(BitDance, "loss", lambda self, tokens, *rest: self.norm.weight.sum() * float("nan"))
    train(data, tmp_path, max_steps=1)
    states = read(tmp_path, 1).states
    assert all(torch.equal(value, states["model"][name]) for name, value in states["ema"].items())
    assert not any(value.any() for value in states["optimizer"].values())
    line = small.read_log(tmp_path)[0]
    assert line["loss"] is None and line["skipped"] == 1


@pytest.mark.slow
def test_a_compiled_run_on_a_cpu_resumes_bit_for_bit(data, tmp_path, monkeypatch):
    """Its losses are those of an uncompiled run up to rounding."""
    if problem := trainer_module.find_compiler_problem(CPU):
        pytest.skip(problem)
    train(data, tmp_path / "eager", epochs=2)
    compiled, real = [], nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: (compiled.append(module), real(module)))
    train(data, tmp_path / "whole", epochs=2, compile=True)
    train(data, tmp_path / "parts", epochs=2, compile=True, max_steps=3)
    train(data, tmp_path / "parts", epochs=2, compile=True)
    assert len(compiled) == 3
    assert read(tmp_path / "parts", 6).metadata["digest"] == read(tmp_path / "whole", 6).metadata["digest"]
    losses = [[line["loss"] for line in small.read_log(tmp_path / name)] for name in ("whole", "eager")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, None])
def test_a_gpu_trains_and_resumes(data, tmp_path, compiled):
    def run(folder: str, **changes: Any) -> list[float]:
        config = small.train_config(data, tmp_path / folder, epochs=2, compile=compiled, **changes)
        train_model(config, SIZES, LossConfig(), data.parent / "autoencoder.safetensors", "cuda")
        return [line["loss"] for line in small.read_log(tmp_path / folder)]

    whole = run("whole")
    run("parts", max_steps=3)
    assert run("parts") == pytest.approx(whole, rel=1e-4)
