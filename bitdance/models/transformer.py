"""BitDance: class and tokens -> conditions for the head; one class for every number of tokens per step.

A short, plain reference sampler is part of the model; what is fast lies elsewhere and is tested against it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitdance.config import BitDanceConfig
from bitdance.models import flow
from bitdance.models.head import DiffusionHead
from bitdance.models.layers import KVCache, SwiGLU, TransformerBlock, rotary_table
from bitdance.models.tokens import block_causal_mask, positions

Noise = Callable[[int, bool], Tensor]
"""(AR step, null rows?) -> (S + 1, B, P, C) float32: all the normal numbers that one step of sampling takes."""


class BitDance(nn.Module):
    """The transformer over binary tokens and its diffusion head (section 3 of arXiv 2602.14041).

    Sequence: K class tokens, P - 1 learned query tokens, then the projected tokens but for the last P; its last N
    positions are the conditions of the N tokens.
    """

    rotary: Tensor
    mask: Tensor

    def __init__(self, config: BitDanceConfig, drop_rate: float = 0.0, grad_checkpointing: bool = False) -> None:
        """Makes a model with fresh weights.

        Args:
            drop_rate: dropout of `proj_in`, of the attention's output and of the feed-forward layers.
            grad_checkpointing: in training keep only each layer's input, of the head too, and compute the rest again
                when needed.
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
        """Switches what `grad_checkpointing` says on or off, in the transformer and in the head."""
        self.grad_checkpointing = self.head.net.grad_checkpointing = enabled

    def reset_parameters(self) -> None:
        """Linear and Embedding weights and the query tokens N(0, 0.02), biases 0; the head sets its own."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if self.config.parallel_num > 1:
            nn.init.normal_(self.query_token, std=0.02)

    def reset_buffers(self) -> None:
        """Computes the tables that no file holds, in float32, on the device of the parameters."""
        config, device = self.config, self.norm.weight.device
        prefix = config.cls_token_num + config.parallel_num - 1
        # A token's centre, moved on by one, so that (0, 0) is left for class and query tokens; (x, y) = (column, row).
        centres = positions(config.grid, config.patch).flip(-1).float() + 0.5 + 1
        places = torch.cat([torch.zeros(prefix, 2), centres])[: config.cls_token_num + config.num_tokens - 1]
        mask = block_causal_mask(config.cls_token_num - 1, config.num_tokens, config.parallel_num)
        self.register_buffer("rotary", rotary_table(places, config.dim // config.n_head).to(device), persistent=False)
        self.register_buffer("mask", mask.to(device), persistent=False)
        self.head.net.time_embed.reset_buffers()

    def _apply(self, *args: Any, **kwargs: Any) -> BitDance:
        """What `to`, `half` and `to_empty` do; tables stay in float32, and after `to_empty` they are right."""
        super()._apply(*args, **kwargs)
        self.reset_buffers()
        return self

    @property
    def null_class(self) -> int:
        """The class that stands for no class, for guidance."""
        return self.config.num_classes

    def class_tokens(self, labels: Tensor) -> Tensor:
        """Class and query tokens: (B,) int64 -> (B, K + P - 1, D)."""
        x = self.cls_embedding(labels).unflatten(-1, (self.config.cls_token_num, self.config.dim))
        if self.config.parallel_num > 1:
            x = torch.cat([x, self.query_token.expand(len(labels), -1, -1)], dim=1)
        return x

    def hidden(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Teacher forcing: tokens (B, n, C) made so far, n = N - P or a smaller multiple of P -> (B, n + P, D).

        Row i of the result sees the class and all tokens before the group of token i.
        """
        x = torch.cat([self.class_tokens(labels), self.proj_in(tokens.to(self.norm.weight.dtype))], dim=1)
        x = self.emb_norm(x)  # (B, K + P - 1 + n, D)
        length = x.shape[1]
        rotary, mask = self.rotary[:length], self.mask[:length, :length]
        for layer in self.layers:
            if self.grad_checkpointing and self.training:
                x = checkpoint(layer, x, rotary, mask, use_reentrant=False)
            else:
                x = layer(x, rotary, mask)
        return self.norm(x[:, self.config.cls_token_num - 1 :])

    def trunk(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The conditions of all tokens: (B, N, C) +-1 and (B,) int64 -> (B, N, D)."""
        return self.hidden(tokens[:, : -self.config.parallel_num], labels) + self.pos_for_diff.weight

    def loss(self, tokens: Tensor, labels: Tensor, t: Tensor, x_0: Tensor, inputs: Tensor | None = None) -> Tensor:
        """The training loss, a float32 scalar.

        The batch is tiled M times, once for each draw of time and noise: rows [copy, image, group].

        Args:
            tokens: (B, N, C) +-1, the target.
            labels: (B,) int64, dropped classes already replaced by `null_class`.
            t: (M * B * N / P,) times in [0, 1].
            x_0: (M * B * N / P, P, C) standard normal noise.
            inputs: what the transformer reads instead of `tokens`, for perturbed inputs.
        """
        cond = self.trunk(tokens if inputs is None else inputs, labels)
        groups = (-1, self.config.parallel_num)
        cond, target = cond.flatten(0, 1).unflatten(0, groups), tokens.flatten(0, 1).unflatten(0, groups)
        copies = len(t) // len(target)
        return self.head.loss(target.repeat(copies, 1, 1), cond.repeat(copies, 1, 1), t, x_0)

    def new_cache(self, batch: int) -> KVCache:
        """An empty key/value cache for `batch` rows, in the parameters' dtype."""
        config, weight = self.config, self.norm.weight
        shape = (batch, config.n_head, config.cls_token_num + config.num_tokens - 1, config.dim // config.n_head)
        return KVCache(config.n_layer, *shape, weight.dtype, weight.device)

    def _advance(self, x: Tensor, cache: KVCache) -> Tensor:
        start, end = cache.length, cache.length + x.shape[1]
        x = self.emb_norm(x)
        for i, layer in enumerate(self.layers):
            x = layer(x, self.rotary[start:end], self.mask[start:end, :end], cache, i)
        cache.length = end
        group = (end - self.config.cls_token_num + 1) // self.config.parallel_num - 1
        p = self.config.parallel_num
        return self.norm(x[:, -p:]) + self.pos_for_diff.weight[group * p : (group + 1) * p]

    def prefill(self, labels: Tensor, cache: KVCache) -> Tensor:
        """Fills an empty cache with the class: (B,) int64 -> the conditions of the first P tokens, (B, P, D)."""
        return self._advance(self.class_tokens(labels), cache)

    def step(self, new: Tensor, cache: KVCache) -> Tensor:
        """Adds the P tokens just made, (B, P, C) +-1, and returns the conditions of the next P, (B, P, D)."""
        return self._advance(self.proj_in(new.to(self.norm.weight.dtype)), cache)

    @torch.no_grad()
    def sample_reference(
        self,
        labels: Tensor,
        noise: Noise,
        cfg_scale: float = 1.0,
        cfg_schedule: str = "linear",
        share_first: bool = False,
    ) -> Tensor:
        """Samples tokens as slowly and as plainly as possible: (B,) int64 -> (B, N, C) +-1.

        The whole sequence is computed anew for each step. With guidance (cfg_scale > 1) the second half of the rows
        carries the null class. Where the guidance of a step is exactly 1 (the first, in the linear schedule) both
        halves are sampled on their own unless `share_first`, so the null rows see first tokens of their own: the
        published figures were made that way.
        """
        config, p, b = self.config, self.config.parallel_num, len(labels)
        guided = cfg_scale > 1
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, self.null_class)])
        tokens = torch.zeros(len(labels), 0, config.bits, device=labels.device)
        for i in range(config.ar_steps):
            scale = flow.guidance_scale(cfg_scale, i, config.ar_steps, cfg_schedule) if guided else 1.0
            cond = self.hidden(tokens, labels)[:, -p:] + self.pos_for_diff.weight[i * p : (i + 1) * p]
            if scale > 1 or (guided and share_first):
                new = self._integrate(cond, noise(i, False), scale).repeat(2, 1, 1)
            elif guided:
                new = self._integrate(cond, torch.cat([noise(i, False), noise(i, True)], dim=1))
            else:
                new = self._integrate(cond, noise(i, False))
            tokens = torch.cat([tokens, torch.where(new > 0, 1.0, -1.0)], dim=1)
        return tokens[:b]

    def _integrate(self, cond: Tensor, noise: Tensor, scale: float | None = None) -> Tensor:
        """x before the sign: cond (R, P, D), noise (S + 1, R, P, C); with guidance R / 2 rows of noise and of x.

        Euler-Maruyama from t = 0 to 0.95, then one Euler step; written out here so that the solvers of `flow` have
        something to be compared with.
        """

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            if scale is None:
                return self.head.velocity(x, t.expand(len(x)), cond)
            v_cond, v_null = self.head.velocity(torch.cat([x, x]), t.expand(2 * len(x)), cond).chunk(2)
            return v_null + scale * (v_cond - v_null)

        x, t = noise[0], torch.tensor(0.0, device=noise.device)
        s = self.config.time_shift
        grid = torch.linspace(0, 0.95, len(noise), device=noise.device)
        grid = (1 / s) / ((1 / s) + (1 / grid - 1))
        for dt, n in zip(grid[1:] - grid[:-1], noise[1:], strict=True):
            v = velocity(x, t)
            score = (t * v - x) / ((1 - t) ** 2 + t * (1 - t))
            x = x + (v + (1 - t) * score) * dt + (2.0 * (1.0 - t) * dt) ** 0.5 * n
            t = t + dt
        return x + velocity(x, torch.tensor(0.95, device=x.device)) * 0.05
