"""What a training step minimises: one module for the autoencoder, one for BitDance, each called with a batch.

They hold the network that is trained; what stays fixed (the autoencoder under BitDance) is kept out of their
parameters, so that it is in no gradient, no EMA and no checkpoint.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitdance.config import AutoencoderLossConfig, LossConfig
from bitdance.data.crops import normalize
from bitdance.models import flow, philox
from bitdance.models.autoencoder import Autoencoder, to_uint8
from bitdance.models.quantizer import entropy_loss, quantize, straight_through, unpack
from bitdance.models.tokens import flip_bits, grid_from_tokens, tokens_from_grid
from bitdance.models.transformer import BitDance
from bitdance.sampling.sampler import SampleSettings, decode_tokens, image_noise, sample_tokens

Metrics = dict[str, Tensor]


class AutoencoderLoss(nn.Module):
    """Reconstruction, entropy and commitment, with gradients straight through the bits."""

    def __init__(self, network: Autoencoder, config: AutoencoderLossConfig) -> None:
        super().__init__()
        self.network, self.config = network, config

    def forward(self, images: Tensor, labels: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Metrics]:
        x = normalize(images)
        pre_sign = self.network.encoder(x).float()
        reconstruction = self.network.decode(straight_through(pre_sign)).float()
        squared, absolute = F.mse_loss(reconstruction, x), F.l1_loss(reconstruction, x)
        entropy = entropy_loss(pre_sign)
        commitment = F.mse_loss(pre_sign, quantize(pre_sign).detach())
        weights = self.config
        loss = (
            squared
            + weights.l1_weight * absolute
            + weights.entropy_weight * entropy.total
            + weights.commitment_weight * commitment
        )
        psnr = 10 * torch.log10(4 / squared.detach())
        return loss, {
            "psnr": psnr,
            "entropy_sample": entropy.per_sample.detach(),
            "entropy_codebook": entropy.codebook.detach(),
            "commitment": commitment.detach(),
        }

    @torch.no_grad()
    def preview(self, images: Tensor, labels: Tensor, network: Autoencoder) -> Tensor:
        """Pictures and their reconstructions, each above its own: (2 B, H, W, 3) uint8, two rows of B."""
        return torch.cat([images, to_uint8(network.decode(network.encode(normalize(images))))])


class BitDanceLoss(nn.Module):
    """The head's loss on the tokens of images or of stored bits; every draw a function of (seed, step, place)."""

    def __init__(self, network: BitDance, autoencoder: Autoencoder, config: LossConfig, seed: int) -> None:
        super().__init__()
        self.network, self.config, self.seed = network, config, seed
        # Kept in a list, where nn.Module does not look.
        self._fixed = [autoencoder.requires_grad_(False).eval()]

    @property
    def autoencoder(self) -> Autoencoder:
        """The autoencoder that makes the tokens; it is not trained."""
        return self._fixed[0]

    @torch.no_grad()
    def tokens(self, inputs: Tensor) -> Tensor:
        """Images (B, H, W, 3) uint8, or packed bits (B, N, C / 8) uint8 in raster order -> (B, N, C) +-1."""
        grid = grid_from_tokens(unpack(inputs)) if inputs.ndim == 3 else self.autoencoder.encode(normalize(inputs))
        return tokens_from_grid(grid.float(), self.network.config.patch)

    def forward(self, inputs: Tensor, labels: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Metrics]:
        with torch.no_grad():
            tokens = self.tokens(inputs)
            flipped, labels, t, x_0 = self.draw(tokens, labels, rows, step)
        return self.network.loss(tokens, labels, t, x_0, flipped), {}

    def draw(self, tokens: Tensor, labels: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Everything random in a step.

        Returns:
            Inputs with flipped bits (B, N, C), labels with dropped classes (B,), times (M * B * N / P,) and noise
            (M * B * N / P, P, C), rows [copy, image, group] with M copies.
        """
        net, config = self.network.config, self.config
        b, n, c = tokens.shape
        copies, steps, p = config.diff_batch_mul, net.ar_steps, net.parallel_num

        def uniform(stream: int, size: int, draws: int = 1) -> Tensor:
            return philox.uniform(self.seed, rows, size, stream=stream, step=step, draws=draws)

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
            normal = philox.normal(self.seed, rows, steps, stream=philox.TRAIN_TIME, step=step, draws=copies)
            t = flow.logit_normal_timesteps(normal, config.time_mean, config.time_std, net.time_shift)
        x_0 = philox.normal(self.seed, rows, n * c, stream=philox.TRAIN_NOISE, step=step, draws=copies)
        return inputs, labels, t.flatten(), x_0.reshape(copies * b * steps, p, c)

    @torch.no_grad()
    def preview(self, inputs: Tensor, labels: Tensor, network: BitDance) -> Tensor:
        """Samples of the batch's classes with fixed noise: (B, H, W, 3) uint8."""
        settings = SampleSettings(num_steps=25, cfg_scale=2.0)
        draw = image_noise(network, 0, torch.arange(len(labels), device=labels.device), settings.num_draws)
        tokens = sample_tokens(network, labels, draw, settings)
        return decode_tokens(network, self.autoencoder, tokens, chunk=1)  # a preview is to need less than a step
