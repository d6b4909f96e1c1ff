"""BitDance: an autoregressive transformer over binary tokens with a diffusion head; one class for any P."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitdance.config import BitDanceConfig
from bitdance.models.head import DiffusionHead
from bitdance.models.layers import KVCache, Mask, SwiGLU, TransformerBlock, rotary_table
from bitdance.models.tokens import attention_blocks, positions


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of a parameter of a model whose matrix products have `dtype`.

    In half precision the norms, the embeddings and so the residual sums of the transformer stay in float32, as under
    the original's autocast. All parameters of the head have `dtype`.
    """
    is_half = dtype in (torch.bfloat16, torch.float16)
    is_kept = re.search("norm|embedding|query_token|pos_for_diff", name) and not name.startswith("head.")
    return torch.float32 if is_half and is_kept else dtype


class BitDance(nn.Module):
    """The transformer over binary tokens and its diffusion head (section 3 of arXiv 2602.14041).

    The input sequence is K class tokens, P - 1 learned query tokens, then the projected tokens except the last P. The
    outputs at the last N positions condition the head for the N tokens.
    """

    rotary: Tensor
    blocks: Tensor

    def __init__(self, config: BitDanceConfig, drop_rate: float = 0.0, grad_checkpointing: bool = False) -> None:
        """Initializes a model with random weights.

        Args:
            config: sizes.
            drop_rate: dropout of `proj_in`, of the attention output and of the feed-forward layers.
            grad_checkpointing: in training, keep only the input of each layer (also in the head) and recompute the
                other activations in the backward pass.
        """
        super().__init__()
        self.config = config
        dim, p = config.dim, config.parallel_num
        if p > 1:
            self.query_token = nn.Parameter(torch.empty(1, p - 1, dim))
        self.cls_embedding = nn.Embedding(config.num_classes + 1, dim * config.cls_token_num)
        self.proj_in = SwiGLU(config.bits, int(1.5 * dim), dim, bias=True, drop_rate=drop_rate)
        self.emb_norm = nn.RMSNorm(dim, eps=1e-6)
        self.layers = nn.ModuleList(TransformerBlock(dim, config.n_head, drop_rate) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.pos_for_diff = nn.Embedding(config.num_tokens, dim)
        self.reset_parameters()
        self.head = DiffusionHead(config)
        self.reset_buffers()
        self.set_grad_checkpointing(grad_checkpointing)

    def set_grad_checkpointing(self, enabled: bool) -> None:
        """Switches activation checkpointing on or off, in the transformer and in the head."""
        self.grad_checkpointing = self.head.net.grad_checkpointing = enabled

    def reset_parameters(self) -> None:
        """Draws linear, embedding and query weights from N(0, 0.02) and zeroes biases; the head initializes itself."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if self.config.parallel_num > 1:
            nn.init.normal_(self.query_token, std=0.02)

    def reset_buffers(self) -> None:
        """Computes the rotary table (float32) and the attention blocks, which no file stores, on the model's device."""
        config, device = self.config, self.norm.weight.device
        prefix = config.cls_token_num + config.parallel_num - 1
        with torch.device("cpu"):  # even if the parameters are on the meta device
            # Token centres, shifted by one since (0, 0) is the position of class and query tokens; (x, y) is (column,
            # row).
            centres = positions(config.grid, config.patch).flip(-1).float() + 0.5 + 1
            xy = torch.cat([torch.zeros(prefix, 2), centres])[: config.cls_token_num + config.num_tokens - 1]
            blocks = attention_blocks(config.cls_token_num - 1, config.num_tokens, config.parallel_num)
            rotary = rotary_table(xy, config.dim // config.n_head)
        self.register_buffer("rotary", rotary.to(device), persistent=False)
        self.register_buffer("blocks", blocks.to(device), persistent=False)
        self.head.net.time_embed.reset_buffers()

    def _apply(self, *args: Any, **kwargs: Any) -> BitDance:
        """Implements `to`, `half` and `to_empty`.

        Buffers stay in float32 and are recomputed after `to_empty`. Of the parameters, those that `stored_dtype` names
        stay in float32.
        """
        half = torch.bfloat16
        kept = {name: value.data for name, value in self.named_parameters() if stored_dtype(name, half) != half}
        super()._apply(*args, **kwargs)
        for name, before in kept.items():
            parameter = self.get_parameter(name)
            if (dtype := stored_dtype(name, parameter.dtype)) != parameter.dtype:
                parameter.data = before.to(parameter.device, dtype)
        self.reset_buffers()
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of matrix products and of the key/value cache."""
        return self.proj_in.w1.weight.dtype

    @property
    def null_class(self) -> int:
        """Index of the null class, the unconditional input of classifier-free guidance."""
        return self.config.num_classes

    def class_tokens(self, labels: Tensor) -> Tensor:
        """Embeds labels as class tokens, followed by the query tokens: (B,) int64 -> (B, K + P - 1, D)."""
        x = self.cls_embedding(labels).unflatten(-1, (self.config.cls_token_num, self.config.dim))
        if self.config.parallel_num > 1:
            x = torch.cat([x, self.query_token.expand(len(labels), -1, -1)], dim=1)
        return x

    def forward_features(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Computes the normalized hidden states, teacher-forced.

        Args:
            tokens: (B, n, C), +-1, the first n tokens; n is a multiple of P, at most N - P.
            labels: (B,) int64.

        Returns:
            (B, n + P, D). Row i depends on the class and on all tokens before the group of token i.
        """
        x = torch.cat([self.class_tokens(labels), self.proj_in(tokens.to(self.dtype))], dim=1)
        x = self.emb_norm(x)  # (B, K + P - 1 + n, D)
        length = x.shape[1]
        rotary, mask = self.rotary[:length], self._mask(length)
        for layer in self.layers:
            if self.grad_checkpointing and self.training:
                x = checkpoint(layer, x, rotary, mask, use_reentrant=False)
            else:
                x = layer(x, rotary, mask)
        return self.norm(x[:, self.config.cls_token_num - 1 :])

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Computes the conditions of all tokens, teacher-forced: (B, N, C) +-1 and (B,) int64 -> (B, N, D)."""
        return self.forward_features(tokens[:, : -self.config.parallel_num], labels) + self.pos_for_diff.weight

    def loss(self, tokens: Tensor, labels: Tensor, t: Tensor, x_0: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Computes the training loss, a float32 scalar.

        The batch is repeated M times with different timesteps and noise; rows are ordered [copy, image, group].

        Args:
            tokens: (B, N, C), +-1, the targets.
            labels: (B,) int64; dropped labels have been replaced by `null_class`.
            t: (M * B * N / P,) timesteps in [0, 1].
            x_0: (M * B * N / P, P, C) standard normal noise.
            inputs: (B, N, C), tokens that the transformer reads in place of `tokens`, for input perturbation.
        """
        cond = self(tokens if inputs is None else inputs, labels)
        groups = (-1, self.config.parallel_num)
        cond, target = cond.flatten(0, 1).unflatten(0, groups), tokens.flatten(0, 1).unflatten(0, groups)
        copies = len(t) // len(target)
        return self.head.loss(target.repeat(copies, 1, 1), cond.repeat(copies, 1, 1), t, x_0)

    def new_cache(self, batch: int) -> KVCache:
        """Allocates an empty key/value cache for `batch` rows, in the dtype of matrix products."""
        config, device = self.config, self.norm.weight.device
        in_autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if in_autocast else self.dtype
        shape = (batch, config.n_head, config.cls_token_num + config.num_tokens - 1, config.dim // config.n_head)
        tensors = [torch.zeros(shape, dtype=dtype, device=device) for _ in self.layers for _ in "kv"]
        return KVCache(tensors[: config.n_layer], tensors[config.n_layer :])

    def _mask(self, length: int) -> Mask:
        """Returns the mask of the first `length` positions."""
        if self.config.parallel_num == 1:
            return "causal"
        return self.blocks[:length, None] >= self.blocks[:length]

    def _extend(self, x: Tensor, rotary: Tensor, mask: Mask, cache: KVCache) -> Tensor:
        """Processes new inputs (B, n, D) and returns the hidden states of the last P of them, (B, P, D)."""
        x = self.emb_norm(x.to(self.emb_norm.weight.dtype))
        for i, layer in enumerate(self.layers):
            x = layer(x, rotary, mask, cache, i)
        cache.length += x.shape[1]
        return self.norm(x[:, -self.config.parallel_num :])

    def prefill(self, labels: Tensor, cache: KVCache) -> Tensor:
        """Processes the class and query tokens and returns the first conditions: (B,) int64 -> (B, P, D)."""
        x = self.class_tokens(labels)
        length, p = x.shape[1], self.config.parallel_num
        return self._extend(x, self.rotary[:length], self._mask(length), cache) + self.pos_for_diff.weight[:p]

    def step(self, new: Tensor, cache: KVCache) -> Tensor:
        """Processes the P newest tokens and returns the conditions of the next P: (B, P, C) +-1 -> (B, P, D).

        They attend to all positions so far and to each other, so there is no mask.
        """
        start, p = cache.length, self.config.parallel_num
        rotary, first = self.rotary[start : start + p], start - self.config.cls_token_num + 1
        x = self._extend(self.proj_in(new.to(self.dtype)), rotary, None, cache)
        return x + self.pos_for_diff.weight[first : first + p]

    def step_at(self, new: Tensor, keys: list[Tensor], values: list[Tensor], position: Tensor) -> Tensor:
        """Does the same as `step` with static shapes, to be compiled: attention is masked, over the whole cache.

        Args:
            new: (B, P, C), +-1.
            keys, values: of the cache, updated in place.
            position: () int64, positions in the cache so far.
        """
        positions = position + torch.arange(self.config.parallel_num, device=new.device)
        mask = torch.arange(keys[0].shape[2], device=new.device) <= positions[-1:, None]  # (1, L)
        cache = KVCache(keys, values, positions=positions)
        x = self._extend(self.proj_in(new.to(self.dtype)), self.rotary[positions], mask, cache)
        return x + self.pos_for_diff(positions - self.config.cls_token_num + 1)
