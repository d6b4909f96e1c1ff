"""AdamW with the published parameter groups, learning rate, EMA, and the guard against non-finite gradients."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from bitdance.training.train_config import TrainConfig

NO_DECAY = ("proj_in", "cls_embedding", "query_token")
"""Parameters whose names contain one of these have no weight decay, whatever their shape."""


def parameter_groups(parameters: Mapping[str, Tensor], weight_decay: float) -> list[dict[str, object]]:
    """Returns two groups: tensors with two or more dimensions, except `NO_DECAY`, with weight decay; all others."""
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in parameters.items():
        has_decay = parameter.dim() >= 2 and not any(part in name for part in NO_DECAY)
        (decayed if has_decay else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def build_optimizer(parameters: Mapping[str, Tensor], config: TrainConfig) -> torch.optim.AdamW:
    """Returns fused AdamW over `parameter_groups`; its learning rate is set before each step."""
    groups = parameter_groups(parameters, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Returns the learning rate of a step: linear warm-up, constant, cosine from `decay_start` to `min_lr`."""
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if 0 < config.decay_start <= step and config.decay_start < total_steps:
        progress = (step - config.decay_start) / (total_steps - config.decay_start)
        return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr


class EMA:
    """The exponential moving average of a network's parameters: a <- decay * a + (1 - decay) * parameter."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}

    @torch.no_grad()
    def update(self, network: nn.Module, skipped: Tensor) -> None:
        """Updates the average, unless `skipped`, a scalar on the same device, is 1."""
        parameters = dict(network.named_parameters())
        current: list[Tensor] = [parameters[name].detach() for name in self.state]  # a file may have another order
        weight = (1 - self.decay) * (1 - skipped)
        torch._foreach_lerp_(list(self.state.values()), current, [weight] * len(current))

    @contextlib.contextmanager
    def swapped_in(self, network: nn.Module) -> Iterator[None]:
        """Swaps the network's parameters with their average, without a copy, for the duration of the context."""
        self._swap(network)
        try:
            yield
        finally:
            self._swap(network)

    def _swap(self, network: nn.Module) -> None:
        for name, parameter in network.named_parameters():
            parameter.data, self.state[name] = self.state[name], parameter.data


class NonFiniteGuard:
    """Decides on the device whether a step is skipped, and counts: steps with non-finite gradients are.

    The fused optimizer does not change parameters or its state where `found_inf` is 1, and neither does the EMA.
    Gradients have been averaged over all processes by then, so all decide alike.

    Args:
        device: of the gradients.
        skipped, consecutive: counts of a resumed run.
    """

    def __init__(self, device: torch.device, skipped: int = 0, consecutive: int = 0) -> None:
        self.skipped, self.consecutive = torch.tensor([skipped, consecutive], device=device).unbind()

    def check(self, grad_norm: Tensor) -> Tensor:
        """Returns 1 if the step is to be skipped, else 0: a float32 scalar on the device."""
        is_bad = ~torch.isfinite(grad_norm)
        self.skipped = self.skipped + is_bad
        self.consecutive = (self.consecutive + 1) * is_bad
        return is_bad.float()
