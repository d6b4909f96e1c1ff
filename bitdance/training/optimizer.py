"""AdamW with the published parameter groups, the moving average of the weights, and steps that are skipped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bitdance.config import TrainConfig

NO_DECAY = ("proj_in", "cls_embedding", "query_token")
"""Parameters whose names contain one of these are not decayed, whatever their shape."""


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: tensors with two or more dimensions, decayed but for `NO_DECAY`; and all others."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        wanted = parameter.dim() >= 2 and not any(part in name for part in NO_DECAY)
        (decayed if wanted else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def build_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; its learning rate is set before each step."""
    groups = parameter_groups(network, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


class EMA:
    """The exponential moving average of a network's parameters: a <- decay * a + (1 - decay) * parameter."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}

    @torch.no_grad()
    def update(self, network: nn.Module, skipped: Tensor) -> None:
        """Moves the average towards the parameters, but where `skipped`, a scalar on their device, is 1 and not 0."""
        parameters = dict(network.named_parameters())
        current: list[Tensor] = [parameters[name].detach() for name in self.state]  # a file's order is its own
        weight = (1 - self.decay) * (1 - skipped)
        torch._foreach_lerp_(list(self.state.values()), current, [weight] * len(current))

    @contextlib.contextmanager
    def swapped_in(self, network: nn.Module) -> Iterator[None]:
        """Exchanges the network's parameters for their average, without a copy, for as long as the context lasts."""
        self._swap(network)
        try:
            yield
        finally:
            self._swap(network)

    def _swap(self, network: nn.Module) -> None:
        for name, parameter in network.named_parameters():
            parameter.data, self.state[name] = self.state[name], parameter.data


class NonFiniteGuard:
    """Which steps are skipped, decided and counted on the device: those whose gradients are not finite.

    The fused optimizer leaves parameters and its own state alone where `found_inf` is 1, and the moving average does
    too. Gradients have been averaged over all processes by then, so that all decide alike.

    Args:
        skipped, consecutive: the counts of a run that is resumed.
    """

    def __init__(self, device: torch.device, skipped: int = 0, consecutive: int = 0) -> None:
        self.skipped, self.consecutive = torch.tensor([skipped, consecutive], device=device).unbind()

    def judge(self, grad_norm: Tensor) -> Tensor:
        """1 where the step is to be skipped, else 0: a float32 scalar on the device."""
        bad = ~torch.isfinite(grad_norm)
        self.skipped = self.skipped + bad
        self.consecutive = (self.consecutive + 1) * bad
        return bad.float()
