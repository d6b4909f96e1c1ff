"""Losses: one module for the autoencoder, one for BitDance, each called with a batch.

They hold the network that is trained. The frozen autoencoder of a model is kept out of the parameters, so that it is
in no gradient, EMA or checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitdance.data.crops import normalize
from bitdance.models import flow, philox
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.quantizer import entropy_loss, quantize, straight_through, unpack
from bitdance.models.tokens import flip_bits, grid_from_tokens, tokens_from_grid
from bitdance.models.transformer import BitDance
from bitdance.training.discriminator import PatchDiscriminator, adversarial_losses
from bitdance.training.perceptual import PerceptualLoss
from bitdance.training.train_config import AutoencoderLossConfig, LossConfig

MAX_ENCODED_PIXELS = 32 * 256**2
"""Pixels that the frozen encoder takes at once. Under autocast its norms are float32, 0.13 GB for each 256 x 256."""

DEAD_ENTROPY = 0.01
"""Entropy below which a bit counts as constant: it has one value in 99.9 % of the tokens."""


class AutoencoderLoss(nn.Module):
    """Loss of an autoencoder, with straight-through gradients, and of its discriminator.

    Args:
        network: the autoencoder.
        config: weights of the terms.
        perceptual: the perceptual loss; without it that term is left out.
    """

    def __init__(
        self, network: Autoencoder, config: AutoencoderLossConfig, perceptual: PerceptualLoss | None = None
    ) -> None:
        super().__init__()
        self.network, self.config = network, config
        self.perceptual = perceptual
        self.discriminator: PatchDiscriminator | None = None
        if config.adversarial_weight > 0:
            self.discriminator = PatchDiscriminator(config.discriminator_width, config.discriminator_layers)

    def forward(
        self, images: Tensor, labels: Tensor, indices: Tensor, step: int | Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss of images (B, H, W, 3) uint8.

        Args:
            images: of one size, which the autoencoder can encode.
            labels, indices: not used; `BitDanceLoss` uses them.
            step: of the training, a number or an int64 scalar on the device, for the ramp of the adversarial term.

        Returns:
            The loss, a float32 scalar, with gradients for the autoencoder and the discriminator, each from its own
            terms, and metrics without gradients.
        """
        weights = self.config
        x = normalize(images)  # (B, 3, H, W)
        latent = self.network.encoder(x).float()  # (B, C, h, w)
        bits = straight_through(latent)
        reconstruction = self.network.decoder(bits).float()  # not `decode`, which takes the Gray code
        squared = F.mse_loss(reconstruction, x)
        loss = weights.l2_weight * squared
        metrics = {"psnr": 10 * torch.log10(4 / squared), **_bit_metrics(bits)}
        if weights.l1_weight:
            loss = loss + weights.l1_weight * F.l1_loss(reconstruction, x)
        if weights.entropy_weight and not weights.decoder_only:
            entropy = entropy_loss(latent)
            loss = loss + weights.entropy_weight * entropy.total
            metrics |= {"entropy_sample": entropy.per_sample, "entropy_codebook": entropy.codebook}
        if weights.commitment_weight and not weights.decoder_only:
            commitment = F.mse_loss(latent, quantize(latent))
            loss = loss + weights.commitment_weight * commitment
            metrics["commitment"] = commitment
        if self.perceptual is not None and weights.perceptual_weight:
            metrics["perceptual"] = self.perceptual(reconstruction, x)
            loss = loss + weights.perceptual_weight * metrics["perceptual"]
        if self.discriminator is not None:
            generator_loss, discriminator_loss, real, fake = adversarial_losses(self.discriminator, x, reconstruction)
            length = weights.adversarial_ramp
            ramp = torch.as_tensor(step / length if length else 1.0).clamp(max=1.0)
            loss = loss + ramp * weights.adversarial_weight * generator_loss + discriminator_loss
            metrics |= {"discriminator_loss": discriminator_loss, "real_logit": real.mean(), "fake_logit": fake.mean()}
        return loss, {name: value.detach() for name, value in metrics.items()}

    def find_problems(self, metrics: Mapping[str, float | None]) -> set[str]:
        """Returns what is wrong with a training by the metrics of a line of its log, in sentences."""
        problems = set()
        dead, entropy, judged = (metrics.get(name) for name in ("dead_bits", "bit_entropy", "discriminator_loss"))
        if self.config.decoder_only:
            dead = entropy = None
        if dead is not None and dead >= 1:
            problems.add("some bits of the tokens are constant (dead_bits); raise `entropy_weight` or lower `lr`.")
        if entropy is not None and entropy < 0.5:
            problems.add("the bits carry less than half of what they could (bit_entropy); raise `entropy_weight`.")
        if judged is not None and judged < 0.02:
            problem = "the discriminator separates real and reconstructed patches perfectly (discriminator_loss)"
            problems.add(f"{problem}; lower `discriminator_width` or `adversarial_weight`.")
        return problems


def _bit_metrics(bits: Tensor) -> dict[str, Tensor]:
    """Returns the mean entropy of a bit, at most 1, and the number of bits of a token that are almost constant."""
    probability = ((bits.detach() + 1) / 2).mean((0, 2, 3)).clamp(1e-6, 1 - 1e-6)  # (C,)
    entropy = -(probability * probability.log2() + (1 - probability) * (1 - probability).log2())
    return {"bit_entropy": entropy.mean(), "dead_bits": (entropy < DEAD_ENTROPY).float().sum()}


class BitDanceLoss(nn.Module):
    """The loss of a model on the tokens of images or of a token cache.

    All random numbers are functions of the seed, the step and the index in the global batch.

    Args:
        network: the model to train.
        autoencoder: makes the tokens; it is frozen, and is not a submodule.
        config: weights and distributions of the loss.
        seed: 0 <= seed < 2**32.
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
        if inputs.ndim == 3:
            grid = grid_from_tokens(unpack(inputs))
        else:
            count = max(1, MAX_ENCODED_PIXELS // inputs[0, ..., 0].numel())
            grid = torch.cat([self.autoencoder.encode(normalize(part)) for part in inputs.split(count)])
        return tokens_from_grid(grid.float(), self.network.config.patch)

    def forward(
        self, inputs: Tensor, labels: Tensor, indices: Tensor, step: int | Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss.

        Args:
            inputs: images or packed bits, see `tokenize`.
            labels: (B,) int64.
            indices: (B,) int64, indices in the global batch.
            step: of the training, a number or an int64 scalar on the device of the inputs.

        Returns:
            The loss, a float32 scalar, and further metrics (none).
        """
        with torch.no_grad():
            tokens = self.tokenize(inputs)
            perturbed, labels, t, x_0 = self.draw(tokens, labels, indices, step)
        return self.network.loss(tokens, labels, t, x_0, perturbed), {}

    def draw(
        self, tokens: Tensor, labels: Tensor, indices: Tensor, step: int | Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
