"""Estimates the memory that sampling needs from the sizes of the networks, with tensors that have no data."""

from __future__ import annotations

import dataclasses

import torch

from bitdance.config import AutoencoderConfig, BitDanceConfig
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.tokens import grid_from_tokens
from bitdance.models.transformer import BitDance
from bitdance.runtime.memory_tracker import MemoryTracker
from bitdance.sampling.sampler import SamplerFunctions, SamplingConfig, head_sampler, sample_noise


@dataclasses.dataclass(frozen=True)
class SamplingMemory:
    """Memory of sampling a batch, in bytes, without that of Python, PyTorch and CUDA themselves.

    Attributes:
        weights: of model and autoencoder.
        cache: keys and values of the transformer.
        tokens: peak of the other tensors while tokens are sampled: noise and activations.
        decoder: peak while a chunk of images is decoded.
    """

    weights: int
    cache: int
    tokens: int
    decoder: int

    @property
    def peak(self) -> int:
        """The memory that is needed; the cache is freed before the images are decoded."""
        return self.weights + max(self.cache + self.tokens, self.decoder)


@torch.no_grad()
def estimate_memory(
    sizes: BitDanceConfig,
    autoencoder: AutoencoderConfig,
    config: SamplingConfig,
    batch_size: int,
    chunk_size: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> SamplingMemory:
    """Estimates the memory for a batch.

    Args:
        sizes, autoencoder: of the networks.
        config: sampling settings.
        batch_size: images sampled at once.
        chunk_size: images decoded at once, 0 for all.
        dtype: of matrix products.
    """
    with torch.device("meta"):
        model = BitDance(sizes).eval().to(dtype)
        network = Autoencoder(autoencoder).eval().to(dtype)
        weights = sum(value.nbytes for part in (model, network) for value in part.parameters())
        rows = 2 * batch_size if config.cfg_scale > 1 else batch_size
        with MemoryTracker() as tracker:
            cache = model.new_cache(rows)
            cached, tracker.peak = tracker.current, 0
            cond = model.prefill(torch.zeros(rows, dtype=torch.int64), cache)
            if sizes.ar_steps > 1:
                cache.length = sizes.cls_token_num - 1 + sizes.num_tokens - sizes.parallel_num  # the last step
                cond = model.step(torch.zeros(rows, sizes.parallel_num, sizes.bits), cache)
            ids = torch.zeros(batch_size, dtype=torch.int64)
            noise = sample_noise(model, 0, ids, config.num_draws)
            both = torch.cat([noise(0, False), noise(0, True)], dim=1) if rows > batch_size else noise(0, False)
            head_sampler(model, config, SamplerFunctions(model))(cond, both, None, config.num_steps)  # the first token
            tokens = tracker.peak - cached
        del cache, cond, both
        with MemoryTracker() as tracker:
            count = min(chunk_size or batch_size, batch_size)
            bits = grid_from_tokens(torch.zeros(count, sizes.num_tokens, sizes.bits, dtype=dtype), sizes.patch)
            network.decode(bits)
    return SamplingMemory(weights, cached, tokens, tracker.peak)


def find_batch_size(memory: SamplingMemory, batch_size: int, chunk_size: int, available: float) -> int:
    """Returns the number of images that fit into `available` bytes, by the estimate for these sizes.

    Cache, noise and activations grow with the batch, and the decoder's with the chunk (0: the whole batch).
    """
    free, decoded = available - memory.weights, min(chunk_size or batch_size, batch_size)
    fitting = int(free / ((memory.cache + memory.tokens) / batch_size))
    in_decoder = int(free / (memory.decoder / decoded))
    return max(0, min(fitting, in_decoder) if not chunk_size or in_decoder < chunk_size else fitting)
