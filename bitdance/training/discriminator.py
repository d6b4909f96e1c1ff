"""The discriminator of an autoencoder: a network that classifies patches of images as real or reconstructed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): images (B, 3, H, W) to logits (B, 1, h, w), one per overlapping patch.

    Args:
        width: channels of the first layer; each further layer has twice as many, at most 8 x `width`.
        layers: convolutions of stride 2; with 3 of them, a patch is 70 x 70 pixels.
    """

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        modules: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for i in range(1, layers + 1):
            wider = width * min(2**i, 8)
            stride = 2 if i < layers else 1
            modules += [
                nn.Conv2d(channels, wider, 4, stride=stride, padding=1, bias=False),
                # Batch statistics would couple real and reconstructed images, and processes.
                nn.GroupNorm(8, wider),
                nn.LeakyReLU(0.2),
            ]
            channels = wider
        self.layers = nn.Sequential(*modules, nn.Conv2d(channels, 1, 4, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def adversarial_losses(discriminator: nn.Module, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes hinge losses, such that one backward pass serves both networks.

    The generator's loss has no gradient with respect to the discriminator's parameters, and the discriminator's loss
    none with respect to `fake`, so their sum can be minimized by one optimizer.

    Args:
        discriminator: maps images to logits.
        real: images (B, 3, H, W).
        fake: their reconstructions, with gradients.

    Returns:
        The generator's loss, the discriminator's loss, and the logits of real and reconstructed images.
    """
    frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    generator_loss = -functional_call(discriminator, frozen, (fake,)).float().mean()
    real_logits, fake_logits = discriminator(torch.cat([real, fake.detach()])).float().chunk(2)
    discriminator_loss = 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())
    return generator_loss, discriminator_loss, real_logits, fake_logits
