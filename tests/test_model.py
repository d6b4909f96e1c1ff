"""The networks: the released shapes, the cache, the two samplers, the first weights, precision."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import get_args

import pytest
import tiny
import torch
import torch.nn.functional as F
from reference_sampler import sample_reference
from torch import nn

from bitdance.config import RELEASED_MODELS, AutoencoderConfig, SolverName
from bitdance.models import flow, philox
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.layers import ProductAttention, attend
from bitdance.models.packed_linear import PackedLinear, packed_linears
from bitdance.models.transformer import BitDance
from bitdance.sampling.sampler import (
    CompiledFunctions,
    SamplerFunctions,
    SamplingConfig,
    guided_prediction,
    head_sampler,
    sample_noise,
    sample_tokens,
)

LABELS = torch.tensor([2, 5, 9])


def released_shapes():
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for line in (tiny.DATA / "released_tensors.tsv").read_text().splitlines():
        model, name, shape = line.split("\t")
        shapes.setdefault(model, {})[name] = tuple(map(int, shape.split(",")))
    return shapes


def random_tokens(config, batch=3, seed=0):
    words = philox.words(seed, torch.arange(batch), config.num_tokens * config.bits, stream=philox.TRAIN_FLIP, step=0)[
        0
    ]
    return ((words & 1) * 2.0 - 1).reshape(batch, config.num_tokens, config.bits)


def few_steps(p, **changes):
    """The tiny model with a grid of 4 x 4 tokens (8 x 8 for 16X), so that sampling takes few steps."""
    if p == 16:
        return tiny.model(p, **changes)
    model = BitDance(tiny.config(p, grid=4, **changes))
    state = tiny.model_state(p)
    model.load_state_dict({**state, "pos_for_diff.weight": state["pos_for_diff.weight"][:16]})
    return model.eval()


# ------------------------------------------------------------ the released files


@pytest.mark.parametrize("name", [*RELEASED_MODELS, "autoencoder_d16c32"])
def test_released_names_and_shapes(name):
    shapes = released_shapes()
    assert shapes.keys() == {*RELEASED_MODELS, "autoencoder_d16c32"}
    with torch.device("meta"):
        network = (
            BitDance(RELEASED_MODELS[name].config) if name in RELEASED_MODELS else Autoencoder(AutoencoderConfig())
        )
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == shapes[name]
    assert all(value.is_meta for value in network.state_dict().values()), "nothing was computed"
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    published = {
        "B-1X": 242.37, "B-4X": 260.10, "B-16X": 260.11, "L-1X": 527.27, "H-1X": 1007.96, "autoencoder_d16c32": 460.29,
    }  # fmt: skip
    assert round(millions, 2) == published[name]
    assert name not in RELEASED_MODELS or RELEASED_MODELS[name].parameters == published[name]


# ------------------------------------------------------------ the cache and the samplers


@pytest.mark.parametrize("order", ["patch", "standard"])
@pytest.mark.parametrize("p", tiny.PARALLEL_NUMS)
def test_prefill_and_steps_equal_teacher_forcing(p, order):
    model = tiny.model(p, token_order=order)
    tokens = random_tokens(model.config)
    with torch.no_grad():
        expected = model(tokens, LABELS)
        cache = model.new_cache(len(LABELS))
        made = [model.prefill(LABELS, cache)]
        for i in range(model.config.ar_steps - 1):
            made.append(model.step(tokens[:, i * p : (i + 1) * p], cache))
    assert cache.length == model.config.cls_token_num + model.config.num_tokens - 1, "the cache is just full"
    assert tiny.relative_error(torch.cat(made, dim=1), expected) <= 1e-5


@pytest.mark.parametrize("p", tiny.PARALLEL_NUMS)
def test_a_condition_sees_all_groups_before_its_own_and_nothing_else(p):
    model = tiny.model(p)
    tokens = random_tokens(model.config, batch=1)
    group = 2
    changed = tokens.clone()
    changed[:, group * p : (group + 1) * p] *= -1
    with torch.no_grad():
        before, after = (model(t, LABELS[:1]) for t in (tokens, changed))
    different = (before - after).abs().amax(dim=-1)[0] > 1e-6
    assert different.tolist() == [place >= (group + 1) * p for place in range(model.config.num_tokens)]


def settings_of(case):
    scale, schedule, share_first = case
    return SamplingConfig(num_steps=3, cfg_scale=scale, cfg_schedule=schedule, share_first=share_first)


CASES = [(1.0, "linear", False), (3.2, "linear", False), (3.2, "linear", True), (1.5, "constant", False)]


def real_noise(model, images=(7, 0, 4_000_000_000)):
    return sample_noise(model, 99, torch.tensor(images), draws=4)


def fast_sampler(model, case, images=(7, 0, 4_000_000_000)):
    return sample_tokens(model, LABELS, real_noise(model, images), settings_of(case))


def both_samplers(model, case):
    return fast_sampler(model, case), sample_reference(model, LABELS, real_noise(model), *case)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("p", tiny.PARALLEL_NUMS)
def test_the_engine_equals_the_reference_bit_for_bit(p, case):
    model = few_steps(p)
    fast, reference = both_samplers(model, case)
    assert fast.shape == (3, model.config.num_tokens, model.config.bits)
    assert torch.equal(fast.abs(), torch.ones_like(fast))
    assert torch.equal(fast, reference)


@pytest.mark.parametrize("p", tiny.PARALLEL_NUMS)
def test_steps_of_static_shapes_equal_steps(p):
    model = few_steps(p)
    tokens = random_tokens(model.config).split(p, dim=1)
    caches = [model.new_cache(len(LABELS)) for _ in range(2)]
    functions = [SamplerFunctions(model), CompiledFunctions(model, backend="eager")]
    with torch.no_grad():
        for cache in caches:
            model.prefill(LABELS, cache)
        for new in tokens[:-1]:
            expected, found = (part.transformer_step(new, cache) for part, cache in zip(functions, caches, strict=True))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert caches[0].length == caches[1].length


@pytest.mark.parametrize(("solver", "p"), [("euler-maruyama", 1), ("dpmpp-2m-sde", 4), ("heun", 16)])
def test_compiled_functions_need_one_graph_for_all_steps(solver, p):
    """The same bits from functions without a graph break, which are not compiled again from step to step."""
    model = few_steps(p)
    settings = SamplingConfig(num_steps=3, cfg_scale=3.2, solver=solver)
    draw = sample_noise(model, 99, torch.tensor([7, 0, 1]), settings.num_draws)
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    functions = CompiledFunctions(model, backend=count)
    for labels in (LABELS, LABELS.flip(0)):
        expected = sample_tokens(model, labels, draw, settings)
        assert torch.equal(sample_tokens(model, labels, draw, settings, functions=functions), expected)
    # Predictions with and without guidance and a step of the transformer; solver steps with and without noise, and for
    # two solvers with what they keep, each for one row per image and for two (the first tokens, without guidance).
    assert len(graphs) == 2 + 1 + 2 * (3 if solver == "dpmpp-2m-sde" else 2)


def test_the_loop_of_a_token_compiles_as_one_graph():
    """All steps of the solver, guidance and noise; the same graph at each token."""
    model = few_steps(4)
    settings, graphs = SamplingConfig(num_steps=3, cfg_scale=3.2), []
    draw = sample_noise(model, 99, torch.tensor([7, 0, 1]), settings.num_draws)
    loop = head_sampler(model, settings, SamplerFunctions(model))

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(loop, fullgraph=True, dynamic=False, backend=count)
    with torch.no_grad():
        for step, scale in enumerate((1.5, 2.0, 3.2)):
            cond = torch.randn(6, 4, model.config.dim, generator=torch.Generator().manual_seed(step))
            arguments = cond, draw(step, False), torch.tensor(scale), 3
            assert torch.equal(compiled(*arguments), loop(*arguments))
    assert len(graphs) == 1


def test_the_number_of_steps_changes_along_the_sequence():
    model, counts = few_steps(4), []
    settings = SamplingConfig(num_steps=9, cfg_scale=2.0, final_num_steps=3)
    functions = SamplerFunctions(model)
    functions.predict = lambda *arguments: counts.append(1) or guided_prediction(*arguments)
    draw = sample_noise(model, 5, torch.tensor([0, 1, 2]), settings.num_draws)
    after = []
    sample_tokens(model, LABELS, draw, settings, lambda *_: after.append(len(counts)), functions)
    assert model.config.ar_steps == 4
    assert [b - a for a, b in itertools.pairwise([0, *after])] == [10, 8, 6, 4]
    same = dataclasses.replace(settings, final_num_steps=9)
    expected = sample_tokens(model, LABELS, draw, dataclasses.replace(settings, final_num_steps=None))
    assert torch.equal(sample_tokens(model, LABELS, draw, same), expected)


def test_guidance_on_an_interval():
    """Where there is none, the unconditional rows are not evaluated; without any, the samples are those of scale 1."""
    model, rows = few_steps(4), []
    settings = SamplingConfig(4, 3.0, "constant", cfg_interval=(0.2, 0.5))
    functions = SamplerFunctions(model)
    functions.predict = lambda *arguments: rows.append(len(arguments[3])) or guided_prediction(*arguments)
    draw = sample_noise(model, 5, torch.tensor([0, 1, 2]), settings.num_draws)
    found = sample_tokens(model, LABELS, draw, settings, functions=functions)
    assert rows == [3, 6, 6, 3, 3] * model.config.ar_steps, "times 0, 0.2375, 0.475, 0.7125, 0.95"
    whole = sample_tokens(model, LABELS, draw, dataclasses.replace(settings, cfg_interval=(0.0, 1.0)))
    assert not torch.equal(found, whole)
    never = sample_tokens(model, LABELS, draw, dataclasses.replace(settings, cfg_interval=(0.96, 1.0)))
    assert torch.equal(never, sample_tokens(model, LABELS, draw, SamplingConfig(4, 1.0)))


class StaticResults:
    """Calls like a CUDA graph: each returns the same memory, and what it held before is lost."""

    def __init__(self, function):
        self.function, self.results = function, {}

    def __call__(self, net, x, *arguments):
        if x.shape in self.results:
            self.results[x.shape].fill_(float("nan"))
        result = self.function(net, x, *arguments)
        return self.results.setdefault(x.shape, result).copy_(result)


@pytest.mark.parametrize("solver", get_args(SolverName))
@pytest.mark.parametrize("p", [1, 16])
def test_predictions_may_be_overwritten_by_the_next(p, solver):
    model = few_steps(p)
    settings = SamplingConfig(num_steps=5, cfg_scale=3.2, solver=solver)
    draw = sample_noise(model, 99, torch.tensor([7, 0, 1]), settings.num_draws)
    functions = SamplerFunctions(model)
    functions.predict = StaticResults(guided_prediction)
    expected = sample_tokens(model, LABELS, draw, settings)
    for _ in range(2):
        assert torch.equal(sample_tokens(model, LABELS, draw, settings, functions=functions), expected)
    assert functions.predict.results


def test_attention_is_computed_without_cudnn(monkeypatch):
    enabled = []
    model, settings = few_steps(16), settings_of(CASES[1])

    def predict(*arguments):
        enabled.append((torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()))
        return guided_prediction(*arguments)

    functions, before = SamplerFunctions(model), torch.backends.cuda.cudnn_sdp_enabled()
    functions.predict = predict
    draw = sample_noise(model, 1, torch.tensor([7, 0, 1]), settings.num_draws)
    sample_tokens(model, LABELS, draw, settings, functions=functions)
    assert set(enabled) == {(False, True)}
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.slow
@pytest.mark.parametrize("p", [1, 4])
def test_compiled_bits_equal_the_reference(p):
    torch._dynamo.reset()
    model = few_steps(p)
    fast = sample_tokens(model, LABELS, real_noise(model), settings_of(CASES[1]), functions=CompiledFunctions(model))
    assert torch.equal(fast, sample_reference(model, LABELS, real_noise(model), *CASES[1]))


@pytest.mark.parametrize("p", tiny.PARALLEL_NUMS)
def test_packed_weights_sample_the_same_bits(p):
    model = few_steps(p)
    expected, before = fast_sampler(model, CASES[1]), dict(model.named_modules())
    with pytest.raises(KeyboardInterrupt), packed_linears(model):
        inside = list(model.modules())
        assert any(isinstance(part, PackedLinear) for part in inside) == torch.backends.mkldnn.is_available()
        assert not torch.backends.mkldnn.is_available() or not any(type(part) is torch.nn.Linear for part in inside)
        assert torch.equal(fast_sampler(model, CASES[1]), expected)
        raise KeyboardInterrupt
    assert dict(model.named_modules()) == before
    assert torch.equal(fast_sampler(model, CASES[1]), expected)


def test_weights_that_cannot_be_packed_are_used_as_they_are(monkeypatch):
    """As in bf16 on a CPU without instructions for it, under autocast, or on a GPU."""
    model = few_steps(1)
    expected = fast_sampler(model, CASES[0])
    with torch.autocast("cpu", torch.bfloat16), packed_linears(model):
        assert not any(isinstance(part, PackedLinear) for part in model.modules())

    def refuse(weight):
        raise RuntimeError("mkldnn_reorder_linear_weight: bf16 path needs the cpu support avx_ne_convert")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    with packed_linears(model):
        assert not any(isinstance(part, PackedLinear) for part in model.modules())
        assert torch.equal(fast_sampler(model, CASES[0]), expected)
    with torch.device("meta"):
        other = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with packed_linears(other):
        assert type(other[0]) is torch.nn.Linear


def test_the_engine_equals_the_reference_with_a_time_shift_and_in_raster_order():
    fast, reference = both_samplers(tiny.model(16, time_shift=3.0, token_order="standard"), CASES[1])
    assert torch.equal(fast, reference)


@pytest.mark.parametrize("solver", get_args(SolverName))
def test_the_sampler_embeds_times_once_and_takes_other_functions(solver):
    model = few_steps(4)
    settings = dataclasses.replace(settings_of(CASES[1]), solver=solver)
    draw = sample_noise(model, 5, torch.tensor([0, 1, 2]), settings.num_draws)
    expected = sample_tokens(model, LABELS, draw, settings)
    calls, embeddings = [], []
    handle = model.head.net.time_embed.register_forward_hook(lambda *_: embeddings.append(None))

    def predict(net, x, time, cond, scale):
        calls.append(x.shape)
        return guided_prediction(net, x, time, cond, scale)

    functions = SamplerFunctions(model)
    functions.predict = predict
    assert torch.equal(sample_tokens(model, LABELS, draw, settings, functions=functions), expected)
    handle.remove()
    assert len(embeddings) == 1
    assert len(calls) == (7 if solver == "heun" else 4) * model.config.ar_steps
    assert torch.equal(expected.abs(), torch.ones_like(expected))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("p", [1, 4])
def test_compiled_bits_on_a_gpu(p, mode):
    """The same bits in float32 as without compilation, in repeated calls, and no waiting for the GPU in either."""
    torch._dynamo.reset()
    model, settings = few_steps(p).to("cuda"), settings_of(CASES[1])
    draw = sample_noise(model, 1, torch.tensor([10, 11, 12], device="cuda"), settings.num_draws)
    labels, functions = LABELS.to("cuda"), CompiledFunctions(model, mode)
    expected = sample_tokens(model, labels, draw, settings)
    found = [sample_tokens(model, labels, draw, settings, functions=functions) for _ in range(3)]
    assert all(torch.equal(tokens, found[0]) for tokens in found)
    assert (found[0] == expected).float().mean() > 0.999
    head = head_sampler(model, settings, functions)
    cond, noise = torch.randn(6, p, model.config.dim, device="cuda"), draw(1, False)
    scale = torch.full((), 2.0, device="cuda")
    head(cond, noise, scale, settings.num_steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        head(cond, noise, scale, settings.num_steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("p", [1, 4, 16])
def test_a_gpu_samples_what_a_cpu_does(p):
    """In float32 nearly all bits are those of the CPU; in bf16 the sampler runs and makes bits."""
    model, settings = few_steps(p), settings_of(CASES[1])
    images = torch.tensor([10, 11, 12])
    expected = sample_tokens(model, LABELS, sample_noise(model, 1, images, settings.num_draws), settings)
    for dtype, least in ((torch.float32, 0.99), (torch.bfloat16, 0.6)):
        model = model.to("cuda", dtype)
        draw = sample_noise(model, 1, images.to("cuda"), settings.num_draws)
        tokens = sample_tokens(model, LABELS.to("cuda"), draw, settings)
        assert (tokens.cpu() == expected).float().mean() > least
        assert torch.equal(tokens.abs(), torch.ones_like(tokens))


def test_what_changes_an_image_and_what_does_not():
    model = tiny.model(16)
    samples = {case: fast_sampler(model, case) for case in CASES}
    for i, case in enumerate(CASES):
        assert not any(torch.equal(samples[case], samples[other]) for other in CASES[:i])
    # Sharing the first tokens leaves the conditional ones as they were; what follows them differs.
    alone, shared = samples[CASES[1]], samples[CASES[2]]
    assert torch.equal(alone[:, :16], shared[:, :16])
    assert not torch.equal(alone[:, 16:32], shared[:, 16:32])
    # With the constant schedule there is no unguided first step to share.
    assert torch.equal(fast_sampler(model, (1.5, "constant", True)), samples[CASES[3]])
    assert not torch.equal(fast_sampler(model, CASES[0], images=(1, 2, 3)), samples[CASES[0]])


def test_the_callback_gets_the_tokens_of_each_step():
    model, calls = tiny.model(16), []
    noise = sample_noise(model, 0, torch.arange(3), 4)
    config = SamplingConfig(num_steps=3, cfg_scale=2.0)
    tokens = sample_tokens(model, LABELS, noise, config, lambda *call: calls.append(call))
    assert [call[:2] for call in calls] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(torch.equal(so_far, tokens[:, : 16 * step]) for step, _, so_far in calls)


# ------------------------------------------------------------ the first weights


@pytest.fixture(scope="module", params=tiny.PARALLEL_NUMS)
def fresh(request):
    torch.manual_seed(0)
    return BitDance(tiny.config(request.param, dim=192, num_classes=20))  # head width 128


def test_first_weights_of_the_transformer(fresh):
    for name, parameter in fresh.named_parameters():
        if name.startswith("head."):
            continue
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            count = parameter.numel()
            assert parameter.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * count)), name
            assert abs(parameter.mean().item()) < 5 * 0.02 / math.sqrt(count), name
            assert parameter.abs().max() > 0.05, f"{name}: a normal law, not a uniform one"


def test_first_weights_of_the_head(fresh):
    net = fresh.head.net
    zero = {*net.ada_ln_blocks, net.final_layer.ada_ln_modulation, net.final_layer.linear}
    normal = {net.time_embed.mlp[0], net.time_embed.mlp[2]}
    for name, module in net.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        assert not module.bias.any(), name
        if module in zero:
            assert not module.weight.any(), name
        elif module in normal:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            bound = math.sqrt(6 / (module.in_features + module.out_features))
            assert 0.98 * bound < module.weight.abs().max().item() <= bound, name
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name


def test_the_first_loss_is_that_of_predicting_zero(fresh):
    """The prediction is off by x_1, every bit of which has the square 1, over max(1 - t, 0.05)."""
    config = fresh.config
    tokens, rows = random_tokens(config), 2 * 3 * config.ar_steps
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(rows, generator=generator)
    x_0 = torch.randn(rows, config.parallel_num, config.bits, generator=generator)
    loss = fresh.loss(tokens, LABELS, t, x_0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((1 / (1 - t).clamp_min(0.05) ** 2).mean().item(), rel=1e-5)


def test_the_loss_tiles_conditions_and_targets_by_copy():
    """Two copies in one call are the mean of the two alone; inputs are what is read, tokens what is aimed at."""
    model = tiny.model(4)
    tokens = random_tokens(model.config)
    generator = torch.Generator().manual_seed(0)
    rows = 3 * model.config.ar_steps
    t = flow.logit_normal_timesteps(torch.randn(2, rows, generator=generator), -0.8, 0.8)
    x_0 = torch.randn(2, rows, 4, 32, generator=generator)
    with torch.no_grad():
        both = model.loss(tokens, LABELS, t.flatten(), x_0.flatten(0, 1))
        alone = [model.loss(tokens, LABELS, t[i], x_0[i]).item() for i in range(2)]
        perturbed = model.loss(tokens, LABELS, t[0], x_0[0], inputs=-tokens)
        same = model.loss(tokens, LABELS, t[0], x_0[0], inputs=tokens)
    assert both.item() == pytest.approx(sum(alone) / 2, rel=1e-5)
    assert perturbed.item() != pytest.approx(alone[0], rel=1e-4)
    assert same.item() == alone[0]


# ------------------------------------------------------------ modes and precision


@pytest.mark.parametrize("p", [1, 4])
def test_dropout_acts_in_training_only(p):
    torch.manual_seed(0)
    model = BitDance(tiny.config(p), drop_rate=0.3)
    model.load_state_dict(tiny.model_state(p))
    tokens = random_tokens(model.config)
    with torch.no_grad():
        assert not torch.equal(model(tokens, LABELS), model(tokens, LABELS))
        model.eval()
        assert torch.equal(model(tokens, LABELS), tiny.model(p)(tokens, LABELS))
    rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert rates.count(0.3) == 1 + 2 * model.config.n_layer, "proj_in, attention and feed-forward of every layer"
    assert set(rates) <= {0.0, 0.3}, "the head has none"


@pytest.mark.parametrize("keys", [20, 600])
@pytest.mark.parametrize("kind", ["mask", "causal", "full"])
def test_attention_in_half_precision(keys, kind, monkeypatch):
    """Short and long sequences, in training and in inference: the values and gradients of float32 but for rounding."""
    torch.manual_seed(0)
    exact = [torch.randn(2, 3, keys, 16, requires_grad=True) for _ in range(3)]
    half = [x.detach().bfloat16().requires_grad_() for x in exact]
    lower = torch.arange(keys)[:, None] >= torch.arange(keys)
    mask = {"mask": lower, "causal": "causal", "full": None}[kind]
    expected = F.scaled_dot_product_attention(*exact, attn_mask=None if kind == "full" else lower)
    fused, calls = F.scaled_dot_product_attention, []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **b: calls.append(1) or fused(*a, **b))
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(*half, mask)
    assert len(calls) == (keys > 512)
    assert found.dtype == torch.bfloat16 and tiny.relative_error(found, expected.detach()) < 0.01
    with torch.no_grad():
        assert tiny.relative_error(attend(*half, mask), expected.detach()) < 0.01
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found.float() * weights).sum().backward()
    assert all(tiny.relative_error(a.grad, b.grad) < 0.02 for a, b in zip(half, exact, strict=True))


@pytest.mark.parametrize("strength", [1, 4, 16])
def test_gradients_of_attention_are_as_exact_as_those_of_the_fused_kernel(strength):
    torch.manual_seed(0)
    half = [(torch.randn(8, 2, 64, 32) * scale**0.5).bfloat16() for scale in (strength, strength, 1, 1)]
    lower = torch.ones(64, 64, dtype=torch.bool).tril()

    def gradients(function, dtype):
        *inputs, gradient = (x.to(dtype, copy=True) for x in half)
        inputs = [x.requires_grad_() for x in inputs]
        function(*inputs, attn_mask=lower).backward(gradient)
        return [x.grad for x in inputs]

    exact = gradients(F.scaled_dot_product_attention, torch.float64)
    fused = gradients(F.scaled_dot_product_attention, torch.bfloat16)
    ours = gradients(lambda q, k, v, attn_mask: ProductAttention.apply(q, k, v, attn_mask), torch.bfloat16)
    for expected, other, found in zip(exact, fused, ours, strict=True):
        assert tiny.relative_error(found, expected) < max(0.004, 1.1 * tiny.relative_error(other, expected))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("p", [1, 4])
def test_other_precisions(p, dtype, tolerance):
    exact, model = few_steps(p), few_steps(p).to(dtype)
    assert model.rotary.dtype == torch.float32, "angles rounded to bf16 would misplace tokens"
    assert torch.equal(model.rotary, exact.rotary)
    tokens = random_tokens(model.config)
    t = torch.linspace(0.05, 0.9, 3 * model.config.ar_steps)
    x_0 = torch.randn(len(t), p, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cond = model(tokens, LABELS)
        loss = model.loss(tokens, LABELS, t, x_0)
        assert tiny.relative_error(cond, exact(tokens, LABELS)) < tolerance
        assert tiny.relative_error(loss, exact.loss(tokens, LABELS, t, x_0)) < tolerance
    assert cond.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    assert model.dtype == dtype == model.new_cache(1).keys[0].dtype
    if dtype == torch.bfloat16:  # norms and embeddings keep their float32 values
        assert torch.equal(model.norm.weight, exact.norm.weight)
        assert torch.equal(model.cls_embedding.weight, exact.cls_embedding.weight)
    assert loss.dtype == torch.float32
    out = fast_sampler(model, CASES[1])
    assert out.dtype == torch.float32
    assert torch.equal(out.abs(), torch.ones_like(out))


def test_a_model_made_without_memory_is_whole_once_it_is_filled():
    expected = tiny.model(4)
    with torch.device("meta"):
        model = BitDance(tiny.config(4))
    model.to_empty(device="cpu").load_state_dict(tiny.model_state(4))
    assert torch.equal(model.rotary, expected.rotary)
    assert torch.equal(model.blocks, expected.blocks)


def test_an_image_that_does_not_fit_the_autoencoder():
    autoencoder = tiny.autoencoder()
    assert autoencoder.encode(torch.zeros(1, 3, 16, 48)).shape == (1, 32, 1, 3)
    with pytest.raises(ValueError, match=r"40x16 pixels.*multiples of 16"):
        autoencoder.encode(torch.zeros(1, 3, 16, 40))
