"""AdamW with the published parameter groups or Muon, learning rate, EMA, and the guard against non-finite gradients."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from bitdance.runtime.errors import UserError
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


HIDDEN = re.compile(r"(layers|head\.net\.res_blocks|head\.net\.ada_ln_blocks)\.\d+\.")
"""Beginnings of the names of parameters in the hidden layers of a model, whose matrices Muon updates."""


class Optimizer:
    """Fused AdamW over `parameter_groups`, or Muon for the matrices of hidden layers and AdamW for the rest.

    Muon (Jordan et al. 2024) moves a matrix by its momentum with all singular values set to about 1, here with the root
    mean square of AdamW's updates (arXiv 2502.16982), so that both take the same learning rate.

    Args:
        parameters: by name; the state is known by these names.
        config: of the run.

    Raises:
        UserError: Muon is chosen, and there are no such matrices, or PyTorch is too old to have it.
    """

    def __init__(self, parameters: Mapping[str, Tensor], config: TrainConfig) -> None:
        self._parameters = dict(parameters)
        self._matrices: dict[str, Tensor] = {}
        self.muon: torch.optim.Optimizer | None = None
        if config.optimizer == "muon":
            self._matrices = {name: p for name, p in parameters.items() if p.dim() == 2 and HIDDEN.match(name)}
            if not self._matrices:
                raise UserError("optimizer=muon is for models, not for autoencoders: use adamw.")
            if not hasattr(torch.optim, "Muon"):
                raise UserError(f"optimizer=muon needs PyTorch 2.9 or newer, not {torch.__version__}: update it.")
            self.muon = torch.optim.Muon(
                self._matrices.values(),
                lr=config.lr,
                weight_decay=config.weight_decay,
                momentum=0.95,
                adjust_lr_fn="match_rms_adamw",
            )
            for parameter in self._matrices.values():  # or a skipped first step would leave it without a state
                self.muon.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        groups = parameter_groups(
            {name: p for name, p in parameters.items() if name not in self._matrices}, config.weight_decay
        )
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)

    def zero_grad(self) -> None:
        """Removes all gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def step(self, lr: float, skipped: Tensor) -> None:
        """Takes a step with a learning rate, unless `skipped`, a scalar on the device, is 1.

        AdamW reads it on the device; with Muon the host waits for it.
        """
        for optimizer in (self.adamw, self.muon):
            for group in optimizer.param_groups if optimizer else ():
                group["lr"] = lr
        self.adamw.found_inf = skipped  # type: ignore[attr-defined]
        self.adamw.step()
        if self.muon is not None and not skipped:
            self.muon.step()

    def state(self) -> dict[str, Tensor]:
        """Returns the tensors to store, `<key>/<name of the parameter>`; none of AdamW before the first step."""
        return {
            f"{key}/{name}": value
            for name, parameter in self._parameters.items()
            for key, value in self._optimizer_of(name).state[parameter].items()
        }

    def state_templates(self) -> dict[str, Tensor]:
        """Returns tensors of the shapes and types of `state` after a step; their values mean nothing."""
        tensors = {f"momentum_buffer/{name}": value for name, value in self._matrices.items()}
        for name, value in self._parameters.items():
            if name not in self._matrices:
                tensors |= {f"exp_avg/{name}": value, f"exp_avg_sq/{name}": value, f"step/{name}": torch.zeros(())}
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the tensors that `state` returned, which have to be on the device of the parameters."""
        for name, parameter in self._parameters.items():
            keys = ("momentum_buffer",) if name in self._matrices else ("step", "exp_avg", "exp_avg_sq")
            self._optimizer_of(name).state[parameter] = {key: tensors[f"{key}/{name}"] for key in keys}

    def _optimizer_of(self, name: str) -> torch.optim.Optimizer:
        return self.muon if self.muon is not None and name in self._matrices else self.adamw


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Returns the learning rate of step 0, 1, ...: linear warm-up from 0, then constant, then a cosine to `min_lr`.

    The cosine begins at `decay_start`; with `decay_start=0`, or at or after `total_steps`, the rate stays constant.
    """
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
    """Finds and counts the steps whose gradients are not finite, on the device.

    `check` returns 1 for such a step; the optimizer and the EMA then change nothing. (With Muon the host reads this
    value at each step, see `Optimizer.step`.) Gradients have been averaged over all processes by then, so all decide
    alike.

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
