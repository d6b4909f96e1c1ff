"""Linear layers for inference on CPUs, with weights in the memory layout of oneDNN's matrix products.

`nn.Linear` on a CPU converts its bf16 weight to that layout in every call, and multiplies float32 by another library.
PyTorch's compiler packs weights in the same way, by the operators that this module calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A linear layer with a packed weight, which holds the same numbers: (..., in) -> (..., out).

    The results of `nn.Linear` up to rounding. It has no gradients; `state_dict` has the weight in its usual layout.

    Raises:
        NotImplementedError, RuntimeError: this CPU or PyTorch cannot pack weights of this dtype.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")  # no activation

    def unpacked(self) -> nn.Linear:
        """Returns an ordinary linear layer with the same weight."""
        weight = self.weight.detach().to_dense()
        linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        linear.weight, linear.bias = nn.Parameter(weight), self.bias
        return linear

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight.detach().to_dense()


def pack_linears(module: nn.Module) -> None:
    """Replaces the linear layers of a module by packed ones, or none where that is not possible.

    The module can then only be used for inference on a CPU, in its present dtype.
    """
    with contextlib.suppress(RuntimeError, AttributeError):  # bf16 on a CPU without instructions for it; other builds
        _replace(module, nn.Linear, PackedLinear)


def unpack_linears(module: nn.Module) -> None:
    """Undoes `pack_linears`."""
    _replace(module, PackedLinear, PackedLinear.unpacked)


def _replace(module: nn.Module, kind: type, function: Callable[[Any], nn.Module]) -> None:
    places = [(parent, *child) for parent in module.modules() for child in parent.named_children()]
    new = [(parent, name, function(child)) for parent, name, child in places if type(child) is kind]
    for parent, name, child in new:  # once all have been made
        setattr(parent, name, child)
