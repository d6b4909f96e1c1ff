"""Layers shared by the transformer and the head: rotary embedding, attention with a static cache, SwiGLU."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_SHORT = 128
"""Keys up to which a sequence counts as short in `attend`."""
MAX_TRAINED = 512
"""Keys up to which training in half precision on a CPU keeps the attention probabilities for the backward pass."""
MAX_QUERIES = 16
"""Queries up to which matrix products are faster than PyTorch's fused kernel on a CPU, for any number of keys."""
CACHED_BYTES = 1 << 22
"""Size of a copy of keys that stays in the cache of a CPU until it is read."""
MAX_ROWS = 65_535
"""Rows of a batch that the fused kernels of a GPU take."""


def swiglu_hidden(dim: int) -> int:
    """Returns the hidden width of the transformer's SwiGLU: 8/3 of the width, rounded up to a multiple of 256."""
    return 256 * -(-int(8 * dim / 3) // 256)


def swiglu(x: Tensor, w1: nn.Linear, w2: nn.Linear) -> Tensor:
    """Computes w2(silu(gate) * value), where w1 outputs gate and value concatenated."""
    gate, value = w1(x).chunk(2, dim=-1)
    return w2(F.silu(gate) * value)


class SwiGLU(nn.Module):
    """Gated feed-forward layer with dropout: (..., dim_in) -> (..., dim_out)."""

    def __init__(self, dim_in: int, hidden: int, dim_out: int, bias: bool, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim_in, 2 * hidden, bias=bias)
        self.w2 = nn.Linear(hidden, dim_out, bias=bias)
        self.dropout = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(swiglu(x, self.w1, self.w2))


def rotary_table(positions: Tensor, head_dim: int) -> Tensor:
    """Computes cosines and sines of the 2-D rotary embedding.

    Args:
        positions: (L, 2) float, (x, y) of each position.

    Returns:
        (L, head_dim / 2, 2) float32: the first half of the angles depends on x, the second on y.
    """
    half = head_dim // 2
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, half, 2).float() / half))  # (head_dim / 4,)
    angles = torch.cat([positions[:, :1] * frequencies, positions[:, 1:] * frequencies], dim=-1)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates channel pairs (2i, 2i + 1) of x (B, H, L, d) by the angles of `table` (L, d / 2, 2), in float32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


Mask = Tensor | Literal["causal"] | None
"""(n or 1, m) bool, True where a query attends to a key; "causal" if each attends to itself and those before it, which
the fused kernels of a GPU compute without a mask; None if all attend to all."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """Computes scaled dot-product attention: q (B, H, n, d), k and v (B, H, m, d) -> (B, H, n, d).

    Some are computed by matrix products, with logits and softmax in float32: few queries on a CPU, short sequences in
    training in half precision, where the backward pass of PyTorch's fused kernel is several times slower on CPUs (on
    GPUs it pads each sequence to 128, which takes memory; not measured), and short sequences of more rows than the
    grid of a CUDA kernel can have.
    """
    is_short, is_half = k.shape[2] <= MAX_SHORT, q.dtype in (torch.bfloat16, torch.float16)
    on_cpu, trained = q.device.type == "cpu", q.requires_grad and is_half
    with_backward = on_cpu and trained and k.shape[2] <= MAX_TRAINED and not torch.compiler.is_compiling()
    by_products = with_backward or (is_short and (q.shape[0] > MAX_ROWS or trained))
    if not by_products and not (on_cpu and q.shape[2] <= MAX_QUERIES and not q.requires_grad):
        if isinstance(mask, str):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if isinstance(mask, str):
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if with_backward:
        result: Tensor = ProductAttention.apply(q, k, v, mask)
        return result
    rows = max(1, CACHED_BYTES // (4 * k[0].numel()))
    is_split = is_half and not by_products and len(q) > rows and not torch.compiler.is_compiling()
    if is_split:  # a few rows at a time, since keys are copied to float32
        parts = (part.split(rows) for part in (q, k, v))
        return torch.cat([_attend_by_products(*part, mask) for part in zip(*parts, strict=True)])  # type: ignore[call-arg]
    return _attend_by_products(q, k, v, mask)


def _attend_by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    with _no_autocast(q):
        return _probabilities(q, k, mask).to(v.dtype) @ v


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    logits = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-2, -1)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return logits.softmax(dim=-1)


def _no_autocast(x: Tensor) -> torch.autocast:
    # Tensors of the meta device occur in estimates of memory, which need no autocast.
    return torch.autocast("cpu" if x.device.type == "meta" else x.device.type, enabled=False)


class ProductAttention(torch.autograd.Function):
    """Attention by matrix products whose backward pass multiplies in half precision.

    Automatic differentiation would multiply in float32, as the logits are. The gradients are as exact as those of
    PyTorch's fused kernel, which rounds them alike.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        with _no_autocast(q):
            weights = _probabilities(q, k, mask).to(v.dtype)  # (B, H, n, m)
            ctx.save_for_backward(q, k, v, weights)
            return weights @ v

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, weights = ctx.saved_tensors
        with _no_autocast(q):
            of_weights = gradient @ v.transpose(-2, -1)
            of_logits = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype) * q.shape[-1] ** -0.5
            of_k, of_v = of_logits.transpose(-2, -1) @ q, weights.transpose(-2, -1) @ gradient
            return of_logits @ k, of_k, of_v, None


@dataclasses.dataclass
class KVCache:
    """Static key/value cache.

    Attributes:
        keys, values: (B, H, L, d), one tensor per layer.
        length: positions that are filled.
        positions: (n,) int64, where `extend` writes, if it is a tensor so that all shapes are static; `length` is then
            not used.
    """

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0
    positions: Tensor | None = None

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends keys and values (B, H, n, d) of a layer and returns all of them, (B, H, length + n, d).

        The caller increases `length` once all layers have been extended. With `positions`, all L are returned.
        """
        if self.positions is not None:
            self.keys[layer].index_copy_(2, self.positions, key)
            self.values[layer].index_copy_(2, self.positions, value)
            return self.keys[layer], self.values[layer]
        end = self.length + key.shape[2]
        self.keys[layer][:, :, self.length : end] = key
        self.values[layer][:, :, self.length : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class Attention(nn.Module):
    """Multi-head attention with a fused projection `wqkv` (q, k, v in that order)."""

    def __init__(self, dim: int, n_head: int, bias: bool = False, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.n_head = n_head
        self.wqkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.wo = nn.Linear(dim, dim, bias=bias)
        self.dropout = nn.Dropout(drop_rate)

    def forward(
        self, x: Tensor, rotary: Tensor | None = None, mask: Mask = None, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        """Applies attention: (B, n, D) -> (B, n, D).

        Args:
            x: (B, n, D).
            rotary: (n, d / 2, 2) table for these positions, or None.
            mask: see `Mask`; None for full attention.
            cache: extended with the keys and values of layer `layer`, or None.
            layer: index in the cache.
        """
        q, k, v = self.wqkv(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B, H, n, d)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        y = attend(q, k, v, mask)
        return self.dropout(self.wo(y.transpose(1, 2).flatten(2)))


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: RMSNorm (eps 1e-6), attention and SwiGLU without biases.

    Norms and the residual sum have the dtype of x, matrix products that of their weights.
    """

    def __init__(self, dim: int, n_head: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.attention = Attention(dim, n_head, drop_rate=drop_rate)
        self.feed_forward = SwiGLU(dim, swiglu_hidden(dim), dim, bias=False, drop_rate=drop_rate)
        self.attention_norm = nn.RMSNorm(dim, eps=1e-6)
        self.ffn_norm = nn.RMSNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, rotary: Tensor, mask: Mask, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        dtype = self.attention.wqkv.weight.dtype
        x = x + self.attention(self.attention_norm(x).to(dtype), rotary, mask, cache, layer)
        return x + self.feed_forward(self.ffn_norm(x).to(dtype))
