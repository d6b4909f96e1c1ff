"""The sampler: labels -> tokens, with a key/value cache, guidance and timestep embeddings computed once.

Tests compare it with a reference sampler that recomputes the whole sequence at every step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bitdance.config import MAX_SCALE, MAX_SOLVER_STEPS, PRESETS, Preset, SamplingDefaults
from bitdance.models import flow, philox
from bitdance.models.autoencoder import Autoencoder, to_uint8
from bitdance.models.head import HeadNetwork
from bitdance.models.layers import KVCache
from bitdance.models.transformer import BitDance
from bitdance.runtime.errors import UserError, check_fields, first_line, is_out_of_memory

NoiseFn = Callable[[int, bool], Tensor]
"""(autoregressive step, for the unconditional rows?) -> (draws, B, P, C) float32 standard normal noise."""

StepCallback = Callable[[int, int, Tensor], object]
"""Called after each autoregressive step with (steps done, steps in total, tokens so far (B, n, C))."""


ATTENTION_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Without cuDNN's attention, which prepares itself anew for each number of keys, and so at each step."""


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Settings that change the samples of a model, besides labels and noise.

    Attributes:
        num_steps: S, steps of the head's solver, without the last prediction.
        cfg_scale: guidance scale; 1 or less disables guidance.
        cfg_schedule: `linear` grows from 1 with the autoregressive step; `constant`.
        share_first: whether the unconditional rows take the tokens of the conditional ones also in steps whose guidance
            scale is 1 (the first one of the linear schedule); the published samples do not.
        solver: see `flow.make_solver`; `euler-maruyama` is the published one.
        final_num_steps: S at the last autoregressive step; S changes linearly from `num_steps` to it. None for the same
            S at every step.
        end_time: 0.05 <= end_time <= 0.95, where the solver's steps end and the last prediction is made.
        grid_power: of the solver's time grid, see `flow.time_grid`.
        cfg_interval: solver times (first, last) between which there is guidance.
    """

    num_steps: int
    cfg_scale: float
    cfg_schedule: str = "linear"
    share_first: bool = False
    solver: str = "euler-maruyama"
    final_num_steps: int | None = None
    end_time: float = 1 - flow.LAST_STEP
    grid_power: float = 1.0
    cfg_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        def check_range(names: str, kind: Any, low: float, high: float, noun: str = "a number") -> None:
            rule = f"be {noun} from {low} to {high}"
            check_fields(self, names, lambda value: isinstance(value, kind) and low <= value <= high, rule)

        check_range("num_steps final_num_steps", int, 1, MAX_SOLVER_STEPS, "an integer")
        check_range("cfg_scale", int | float, 0, MAX_SCALE)
        check_range("end_time", int | float, 0.05, 1 - flow.LAST_STEP)
        check_range("grid_power", int | float, 0.1, 10)
        check_fields(
            self,
            "cfg_interval",
            lambda value: len(value) == 2 and 0 <= value[0] < value[1] <= 1,
            "be two times from 0 to 1, in order",
        )
        flow.make_solver(self.solver, 1)  # raises for an unknown solver
        flow.guidance_scale(self.cfg_scale, 0, 1, self.cfg_schedule)

    @property
    def num_draws(self) -> int:
        """Normal numbers per bit that the solver needs."""
        return flow.count_draws(self.solver, max(self.num_steps, self.final_num_steps or 1))

    def num_steps_at(self, step: int, steps: int) -> int:
        """Returns S at an autoregressive step, 0 <= step < steps."""
        last = self.num_steps if self.final_num_steps is None else self.final_num_steps
        return round(self.num_steps + (last - self.num_steps) * step / max(1, steps - 1))


def complete_config(defaults: SamplingDefaults, preset: Preset | None = None, **given: Any) -> SamplingConfig:
    """Completes settings by those of a preset, if any, and by the defaults of a model.

    Args:
        defaults: of the model.
        preset: `exact` or `fast`, see `bitdance.config.PRESETS`.
        given: fields of `SamplingConfig`, which override the preset; None where none is given.

    Raises:
        UserError: the preset is unknown, or a setting is out of range.
    """
    if preset is not None and preset not in list(PRESETS):  # `in` of a dict raises for a value without a hash
        raise UserError(f"preset={preset!r} is unknown: use {' or '.join(PRESETS)}.")
    settings = {name: getattr(defaults, name) for name in ("cfg_scale", "num_steps", "solver", "share_first")}
    settings |= PRESETS[preset] if preset else {}
    return SamplingConfig(**(settings | {name: value for name, value in given.items() if value is not None}))


class SamplerFunctions:
    """The functions in which a sampler spends its time, with static shapes.

    Attributes:
        predict: a guided prediction of the head, (network, x (R, P, C), embedded time (1, 1, d), embedded condition,
            guidance scale () or None) -> (R, P, C) float32. With a scale the condition has 2 R rows, of which the
            second half is unconditional.
        solver_step: `flow.solver_step`.
        transformer_step: `BitDance.step`, (tokens, cache) -> conditions.
        decode: (autoencoder, bits (B, C, h, w)) -> (B, H, W, 3) uint8.
    """

    def __init__(self, model: BitDance) -> None:
        self.predict = guided_prediction
        self.solver_step = flow.solver_step
        self.transformer_step = model.step
        self.decode = decode_pixels


MAX_GRAPHS = 64
"""Graphs of one function: a few for each batch size and solver."""


class CompiledFunctions(SamplerFunctions):
    """The same, compiled by `torch.compile` at their first calls, once for each size of a batch.

    Args:
        model: whose functions they are.
        mode: of `torch.compile`. CUDA graphs (`reduce-overhead`) are used for the prediction alone: their results are
            overwritten by the next call, so nothing that lasts longer may come from one. On a CPU it has no effect.
        backend: of `torch.compile`.

    Attributes:
        sizes: of batches that have been sampled.
        chunks: numbers of images that have been decoded at once.
    """

    def __init__(self, model: BitDance, mode: str = "default", backend: str | Callable[..., Any] = "inductor") -> None:
        settings: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": backend}
        graphs: dict[str, Any] = {"mode": mode}
        if model.norm.weight.device.type == "cpu" and backend == "inductor":
            settings["options"] = {"freezing": True}  # without it, bf16 weights are not packed
            graphs = {}
        torch._dynamo.config.recompile_limit = max(MAX_GRAPHS, torch._dynamo.config.recompile_limit)
        self.sizes: set[int] = set()
        self.chunks: set[int] = set()
        self._arguments = model, mode, backend
        self.predict = torch.compile(guided_prediction, **settings, **graphs)
        self.solver_step = torch.compile(flow.solver_step, **settings)
        self.decode = torch.compile(decode_pixels, **settings)
        self._step_at = torch.compile(model.step_at, **settings)

    def renewed(self) -> CompiledFunctions:
        """Returns the same functions, to be compiled again."""
        return CompiledFunctions(*self._arguments)

    def transformer_step(self, new: Tensor, cache: KVCache) -> Tensor:
        """Calls the compiled `BitDance.step_at`."""
        position = torch.full((), cache.length, dtype=torch.int64, device=new.device)
        cache.length += new.shape[1]
        return self._step_at(new, cache.keys, cache.values, position)


def padded_size(size: int, known: Iterable[int]) -> int:
    """Returns the size to pad a batch to: a known one that is at most twice as large, or `size`."""
    return min((other for other in known if size <= other <= 2 * size), default=size)


def decode_pixels(autoencoder: Autoencoder, bits: Tensor) -> Tensor:
    """Decodes bits (B, C, h, w), +-1 in the autoencoder's dtype, to pixels (B, H, W, 3) uint8."""
    return to_uint8(autoencoder.decode(bits))


def find_compiler_problem(device: torch.device) -> str | None:
    """Compiles a small function and returns why that is impossible on a device, or None."""
    try:
        torch.compile(torch.neg)(torch.zeros(2, device=device))
    except Exception as error:  # of the compiler, of the folder of its cache, or of the C++ compiler
        return describe_compiler_error(error)
    return None


def is_compiler_error(error: Exception) -> bool:
    """Returns whether an error of a compiled function is one of the compiler, and not of what was compiled.

    Memory that ran out while the compiler ran is not: the same would happen without it.
    """
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor")) and not is_out_of_memory(error)


def describe_compiler_error(error: Exception) -> str:
    """Returns the first line of the compiler's message, without PyTorch's line about the backend that failed."""
    return first_line(getattr(error, "inner_exception", error))


def guided_prediction(net: HeadNetwork, x: Tensor, time: Tensor, cond: Tensor, scale: Tensor | None) -> Tensor:
    """Predicts x_1 with guidance, see `SamplerFunctions`."""
    rows = x if scale is None else torch.cat([x, x])
    prediction = net.denoise(rows.to(cond.dtype), time, cond).float()
    if scale is None:
        return prediction
    with_class, without = prediction.chunk(2)
    return flow.apply_cfg(with_class, without, scale)


def sample_noise(model: BitDance, seed: int, sample_ids: Tensor, draws: int) -> NoiseFn:
    """Returns the noise of samples, a function of the seed and their ids alone.

    Args:
        model: gives P and C.
        seed: 0 <= seed < 2**32.
        sample_ids: (B,) int64, on the device that samples.
        draws: `SamplingConfig.num_draws`.
    """
    p, c = model.config.parallel_num, model.config.bits

    def noise_fn(step: int, unconditional: bool) -> Tensor:
        stream = philox.SAMPLE_NULL if unconditional else philox.SAMPLE
        noise = philox.normal(seed, sample_ids, p * c, stream=stream, step=step, draws=draws)
        return noise.unflatten(-1, (p, c))  # (draws, B, P, C)

    return noise_fn


@torch.no_grad()
@sdpa_kernel(ATTENTION_BACKENDS)
def sample_tokens(
    model: BitDance,
    labels: Tensor,
    noise_fn: NoiseFn,
    config: SamplingConfig,
    callback: StepCallback | None = None,
    functions: SamplerFunctions | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """Samples tokens: (B,) int64 labels -> (B, N, C) +-1.

    With guidance the batch is doubled: the second half of the rows is unconditional. In a step whose guidance scale is
    exactly 1 (the first step of the linear schedule) both halves are sampled independently, unless `share_first`.

    Args:
        model: on the device of the labels.
        labels: (B,) int64.
        noise_fn: the noise of each step, from `sample_noise`.
        config: sampling settings.
        callback: called after each autoregressive step.
        functions: compiled ones, see `CompiledFunctions`.
        known: (B, N, C), tokens that are not sampled, +-1, and 0 for the others. They are put in place of what the head
            samples (teacher forcing), so only later steps depend on them. Steps without another token cost no solver.
    """
    steps, b = model.config.ar_steps, len(labels)
    guided = config.cfg_scale > 1
    given: list[Tensor] = []
    is_known = [False] * steps
    if known is not None:
        given = list((torch.cat([known, known]) if guided else known).split(model.config.parallel_num, dim=1))
        is_known = torch.stack([group.all() for group in given]).tolist()
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, model.null_class)])
    cache = model.new_cache(len(labels))
    functions = functions or SamplerFunctions(model)
    sample_head = head_sampler(model, config, functions)

    def sample_group(i: int, cond: Tensor) -> Tensor:
        """Samples the tokens of a step: (R, P, D) -> (R, P, C)."""
        scale = flow.guidance_scale(config.cfg_scale, i, steps, config.cfg_schedule) if guided else 1.0
        shared = scale > 1 or (guided and config.share_first)
        noise = noise_fn(i, False)  # (draws, B, P, C)
        if guided and not shared:
            noise = torch.cat([noise, noise_fn(i, True)], dim=1)  # (draws, 2 B, P, C)
        # Created on the device: copying a number to a GPU would synchronize with it.
        guidance = torch.full((), scale, device=cond.device) if shared else None
        x = sample_head(cond, noise, guidance, config.num_steps_at(i, steps))
        new = torch.where(x > 0, 1.0, -1.0)
        return torch.cat([new, new]) if shared else new

    groups: list[Tensor] = []
    for i in range(steps):
        cond = model.prefill(labels, cache) if i == 0 else functions.transformer_step(groups[-1], cache)  # (R, P, D)
        new = given[i] if is_known[i] else sample_group(i, cond)
        groups.append(torch.where(given[i] == 0, new, given[i]) if given else new)  # (R, P, C)
        if callback is not None:
            callback(i + 1, steps, torch.cat(groups, dim=1)[:b])
    return torch.cat(groups, dim=1)[:b]


def head_sampler(
    model: BitDance, config: SamplingConfig, functions: SamplerFunctions
) -> Callable[[Tensor, Tensor, Tensor | None, int], Tensor]:
    """Returns a function that samples tokens from the head; the solver's timesteps are embedded only once.

    It takes cond (R, P, D), noise (draws, R, P, C), the guidance scale () or None, and the number of solver steps. With
    a scale the second half of the rows of cond is unconditional, and noise has R / 2 rows, shared by both halves. It
    returns x (R or R / 2, P, C), whose sign is the tokens.
    """
    net, device = model.head.net, model.norm.weight.device
    first, last = config.cfg_interval

    def make(num_steps: int) -> tuple[flow.Solver, Tensor, list[bool]]:
        """Returns a solver, its embedded timesteps (evaluations, 1, 1, d), and which of them are guided."""
        solver = flow.make_solver(config.solver, num_steps, model.config.time_shift, config.end_time, config.grid_power)
        guided = [first <= t <= last for t in solver.timesteps.tolist()]
        solver = solver.to(device)
        return solver, net.time_embed(solver.timesteps)[:, None, None], guided

    steps = model.config.ar_steps
    solvers = {size: make(size) for size in {config.num_steps_at(i, steps) for i in range(steps)}}

    def sample(cond: Tensor, noise: Tensor, scale: Tensor | None, num_steps: int) -> Tensor:
        solver, times, guided = solvers[num_steps]
        embedded = net.cond_embed(cond.to(model.dtype))

        def predict(x: Tensor, index: int) -> Tensor:
            if scale is not None and not guided[index]:
                return functions.predict(net, x, times[index], embedded[: len(x)], None)
            return functions.predict(net, x, times[index], embedded, scale)

        return flow.integrate(solver, predict, noise, functions.solver_step)

    return sample
