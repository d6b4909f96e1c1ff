"""AdamW with the published parameter groups, and the moving average of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitdance.config import RunConfig

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


def build_optimizer(network: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; its learning rate is set before each step."""
    groups = parameter_groups(network, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


class EMA:
    """The exponential moving average of a network's parameters: a <- decay * a + (1 - decay) * parameter."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        parameters = dict(network.named_parameters())
        current: list[Tensor] = [parameters[name].detach() for name in self.state]  # a file's order is its own
        torch._foreach_lerp_(list(self.state.values()), current, 1 - self.decay)
