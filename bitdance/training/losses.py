"""Losses: one module for the autoencoder, one for BitDance, each called with a batch.

They hold the network that is trained. The frozen autoencoder of a model is kept out of the parameters, so that it is
in no gradient, EMA or checkpoint.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitdance.data.crops import normalize
from bitdance.models import flow, philox
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.quantizer import entropy_loss, quantize, straight_through, unpack
from bitdance.models.tokens import flip_bits, grid_from_tokens, tokens_from_grid
from bitdance.models.transformer import BitDance
from bitdance.training.train_config import AutoencoderLossConfig, LossConfig


class AutoencoderLoss(nn.Module):
    """Reconstruction, entropy and commitment loss, with straight-through gradients."""

    def __init__(self, network: Autoencoder, config: AutoencoderLossConfig) -> None:
        super().__init__()
        self.network, self.config = network, config

    def forward(self, images: Tensor, labels: Tensor, indices: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss of images (B, H, W, 3) uint8; the other arguments are for `BitDanceLoss`."""
        x = normalize(images)  # (B, 3, H, W)
        latent = self.network.encoder(x).float()  # (B, C, h, w)
        reconstruction = self.network.decode(straight_through(latent)).float()
        squared, absolute = F.mse_loss(reconstruction, x), F.l1_loss(reconstruction, x)
        entropy = entropy_loss(latent)
        commitment = F.mse_loss(latent, quantize(latent).detach())
        weights = self.config
        loss = squared + weights.l1_weight * absolute + weights.entropy_weight * entropy.total
        loss = loss + weights.commitment_weight * commitment
        metrics = {
            "psnr": 10 * torch.log10(4 / squared),
            "entropy_sample": entropy.per_sample,
            "entropy_codebook": entropy.codebook,
            "commitment": commitment,
        }
        return loss, {name: value.detach() for name, value in metrics.items()}


class BitDanceLoss(nn.Module):
    """The loss of a model on the tokens of images or of a token cache.

    All random numbers are functions of the seed, the step and the index in the global batch.
    """

    def __init__(self, network: BitDance, autoencoder: Autoencoder, config: LossConfig, seed: int) -> None:
        super().__init__()
        self.network, self.config, self.seed = network, config, seed
        # In a list, where nn.Module does not register it.
        self._frozen = [autoencoder.requires_grad_(False).eval()]

    @property
    def autoencoder(self) -> Autoencoder:
        """The frozen autoencoder that makes the tokens."""
        return self._frozen[0]

    @torch.no_grad()
    def tokenize(self, inputs: Tensor) -> Tensor:
        """Converts images (B, H, W, 3) uint8, or packed bits (B, N, C / 8) uint8 in raster order, to (B, N, C) +-1."""
        grid = grid_from_tokens(unpack(inputs)) if inputs.ndim == 3 else self.autoencoder.encode(normalize(inputs))
        return tokens_from_grid(grid.float(), self.network.config.patch)

    def forward(self, inputs: Tensor, labels: Tensor, indices: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss.

        Args:
            inputs: images or packed bits, see `tokenize`.
            labels: (B,) int64.
            indices: (B,) int64, indices in the global batch.
            step: of the training.

        Returns:
            The loss, a float32 scalar, and further metrics (none).
        """
        with torch.no_grad():
            tokens = self.tokenize(inputs)
            perturbed, labels, t, x_0 = self.draw(tokens, labels, indices, step)
        return self.network.loss(tokens, labels, t, x_0, perturbed), {}

    def draw(self, tokens: Tensor, labels: Tensor, indices: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draws all random numbers of a step.

        Returns:
            Perturbed inputs (B, N, C), labels with class dropout (B,), timesteps (M * B * N / P,) and noise
            (M * B * N / P, P, C) for M copies; rows are ordered [copy, image, group].
        """
        net, config = self.network.config, self.config
        b, n, c = tokens.shape
        copies, steps, p = config.diff_batch_mul, net.ar_steps, net.parallel_num

        def uniform(stream: int, size: int, draws: int = 1) -> Tensor:
            return philox.uniform(self.seed, indices, size, stream=stream, step=step, draws=draws)

        inputs = tokens
        if config.perturb_rate > 0:
            r1, r2 = uniform(philox.TRAIN_FLIP, n * c, draws=2).unflatten(-1, (n, c))
            inputs = flip_bits(tokens, config.perturb_rate, r1, r2)
        dropped = uniform(philox.TRAIN_LABEL, 1)[0, :, 0] < config.class_dropout
        labels = torch.where(dropped, self.network.null_class, labels)
        if config.time_schedule == "uniform":
            t = uniform(philox.TRAIN_TIME, steps, draws=copies)  # (M, B, N / P)
            t = t if net.time_shift == 1 else flow.time_shift(t, net.time_shift)
        else:
            normal = philox.normal(self.seed, indices, steps, stream=philox.TRAIN_TIME, step=step, draws=copies)
            t = flow.logit_normal_timesteps(normal, config.time_mean, config.time_std, net.time_shift)
        x_0 = philox.normal(self.seed, indices, n * c, stream=philox.TRAIN_NOISE, step=step, draws=copies)
        return inputs, labels, t.flatten(), x_0.reshape(copies * b * steps, p, c)
