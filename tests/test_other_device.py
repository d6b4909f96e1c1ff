"""Sampling, decoding and training on a device that is not the CPU: no device mismatches, and no waiting for it.

Tensors of the meta device have no data. An operation on one and on a tensor of the CPU raises, as it would for a GPU,
and so does one that reads a value on the host (`item`, a condition, `nonzero`), which would wait for a GPU. Copies from
the host, which also wait, are counted, and so are operations that are not views: each is a kernel on a GPU.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bitdance.config import RELEASED_MODELS, AutoencoderConfig
from bitdance.models import flow
from bitdance.models.autoencoder import Autoencoder, to_uint8
from bitdance.models.transformer import BitDance
from bitdance.sampling.sampler import SamplingConfig, guided_prediction, sample_noise, sample_tokens
from bitdance.training.losses import BitDanceLoss
from bitdance.training.optimizer import EMA, NonFiniteGuard
from bitdance.training.train_config import LossConfig

DEVICE = torch.device("meta")
NO_KERNELS = {"_unsafe_view", "device", "detach", "empty", "empty_like"}


class Kernels(TorchDispatchMode):
    """Counts operations that are not views, and copies from the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device == DEVICE:
            self.count += not func.is_view and func.overloadpacket.__name__ not in NO_KERNELS
            inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
            self.copies += any(value.device.type == "cpu" for value in inputs)
        return result


@pytest.fixture
def fused_attention(monkeypatch):
    """One kernel, as on a GPU."""
    fused = torch.library.custom_op(
        "tests::attention",
        lambda q, k, v: torch.empty_like(q),
        mutates_args=(),
        schema="(Tensor q, Tensor k, Tensor v) -> Tensor",
    )
    fused.register_fake(lambda q, k, v: torch.empty_like(q))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, **others: fused(q, k, v))


def networks(model="B-4X", grid=4, **changes):
    sizes = dataclasses.replace(RELEASED_MODELS[model].config, grid=grid, n_layer=2, **changes)
    with DEVICE:
        return BitDance(sizes), Autoencoder(AutoencoderConfig(widths=(32, 32), bits=sizes.bits))


def only_on_the_cpu(function):
    def call(*args, device=None, **kwargs):
        assert device is not None and torch.device(device).type == "cpu"
        return function(*args, device=device, **kwargs)

    return call


@pytest.mark.parametrize(
    ("model", "grid", "solver"), [("B-1X", 2, "heun"), ("B-4X", 4, "euler-maruyama"), ("B-16X", 4, "heun")]
)
def test_sampling_and_decoding(monkeypatch, model, grid, solver):
    network, autoencoder = networks(model, grid)
    network.eval()
    labels, ids = (torch.zeros(2, dtype=torch.int64, device=DEVICE) for _ in range(2))
    config, steps = SamplingConfig(3, 3.2, solver=solver), []
    noise_fn = sample_noise(network, 0, ids, config.num_draws)
    for name in ("tensor", "as_tensor"):  # which copy from the host too, without an operation that could be seen
        monkeypatch.setattr(torch, name, only_on_the_cpu(getattr(torch, name)))
    with Kernels() as kernels:
        tokens = sample_tokens(network, labels, noise_fn, config, lambda step, total, tokens: steps.append(step))
    assert tokens.shape == (2, grid**2, 32) and tokens.device == DEVICE
    assert steps == list(range(1, network.config.ar_steps + 1))
    assert kernels.copies == 2, "the solver's timesteps and coefficients, once for a batch"
    with torch.no_grad():
        pixels = to_uint8(autoencoder.decode(torch.ones(2, 32, 4, 4, device=DEVICE)))
    assert pixels.device == DEVICE and pixels.dtype == torch.uint8


@pytest.mark.parametrize(("model", "token_cache"), [("B-1X", False), ("B-1X", True), ("B-4X", False)])
def test_training(model, token_cache):
    network, autoencoder = networks(model, cls_token_num=4)
    objective = BitDanceLoss(network.train(), autoencoder, LossConfig(perturb_rate=0.1), seed=0)
    parameters = dict(network.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), foreach=True)
    ema, guard = EMA(network, 0.999), NonFiniteGuard(DEVICE)
    shape = (2, 16, 4) if token_cache else (2, 8, 8, 3)
    indices = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with Kernels() as kernels:
        for step in range(2):
            loss, _ = objective(torch.zeros(shape, dtype=torch.uint8, device=DEVICE), indices, indices, step)
            loss.backward()
            skipped = guard.check(nn.utils.clip_grad_norm_(parameters.values(), 1.0))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(network, skipped)
    assert loss.device == skipped.device == DEVICE
    assert kernels.copies == 0
    assert all(value.device == DEVICE for value in ema.state.values())


@pytest.mark.usefixtures("fused_attention")
@pytest.mark.parametrize(("model", "limit"), [("B-1X", 53), ("B-4X", 89), ("B-16X", 89), ("H-1X", 96)])
def test_the_kernels_of_a_solver_step(model, limit):
    """Uncompiled sampling is bound by their number on a GPU."""
    network, _ = networks(model)
    net, p, width = network.eval().head.net, network.config.parallel_num, network.config.head_dim
    x, scale, coefficients = (torch.ones(size, device=DEVICE) for size in ((2, p, 32), (), (4,)))
    time, cond = torch.ones(1, 1, width, device=DEVICE), torch.ones(4, p, width, device=DEVICE)
    with torch.no_grad(), Kernels() as kernels:
        prediction = guided_prediction(net, x, time, cond, scale)
    assert kernels.count <= limit
    with torch.no_grad(), Kernels() as kernels:
        flow.solver_step(x, prediction, coefficients, x)
    assert kernels.count <= 3
