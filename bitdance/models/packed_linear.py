"""Linear layers for inference on CPUs, with weights in the memory layout of oneDNN's matrix products.

`nn.Linear` on a CPU converts its bf16 weight to that layout in every call, and multiplies float32 by another library.
PyTorch's compiler packs weights in the same way, by the operators that this module calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A linear layer with a packed copy of the weight: (..., in) -> (..., out), equal up to rounding, no gradients.

    Raises:
        RuntimeError, AttributeError: this CPU or this build of PyTorch cannot pack weights of this dtype.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())  # not a parameter
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")  # no activation


@contextlib.contextmanager
def packed_linears(module: nn.Module) -> Iterator[None]:
    """Replaces the linear layers of a module by packed ones for the duration of the context.

    It takes a second copy of their weights. Where packing is not possible, nothing is replaced: on a GPU, under
    autocast, and in bf16 on a CPU without instructions for it.
    """
    places = [(parent, *child) for parent in module.modules() for child in parent.named_children()]
    linears = [(parent, name, child) for parent, name, child in places if type(child) is nn.Linear]
    packed: list[PackedLinear] = []
    if all(linear.weight.device.type == "cpu" for *_, linear in linears) and not torch.is_autocast_enabled("cpu"):
        with contextlib.suppress(RuntimeError, AttributeError):
            packed = [PackedLinear(linear) for *_, linear in linears]
    try:
        for (parent, name, _), layer in zip(linears, packed, strict=False):  # none if packing is not possible
            setattr(parent, name, layer)
        yield
    finally:
        for parent, name, linear in linears:
            setattr(parent, name, linear)
