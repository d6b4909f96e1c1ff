"""The perceptual and adversarial terms of an autoencoder's loss, and its initialization."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from bitdance.config import AutoencoderConfig
from bitdance.models.autoencoder import (
    Autoencoder,
    binary_from_gray,
    cells_from_tokens,
    gray_from_binary,
    successive_approximation,
    tokens_from_cells,
)
from bitdance.models.quantizer import quantize, straight_through
from bitdance.runtime.atomic_files import file_digest
from bitdance.runtime.errors import UserError
from bitdance.training.discriminator import PatchDiscriminator, adversarial_losses
from bitdance.training.perceptual import VGG16, VGG_CHANNELS, PerceptualLoss, load_perceptual_loss
from bitdance.training.principal_components import initialize_linear
from bitdance.weights.hub import PLAIN_FILES


def test_successive_approximation_rounds_to_two_to_the_depth_levels():
    x = torch.linspace(-1.2, 1.2, 501).reshape(1, 1, 1, -1).repeat(1, 2, 1, 1)
    latent = successive_approximation(x, (4, 1))
    assert latent.shape == (1, 5, 1, 501)
    bits = quantize(latent)
    value = sum(bits[:, k] * 0.5 ** (k + 1) for k in range(4))
    assert len(value.unique()) == 16
    assert (value - x[:, 0].clamp(-1, 1)).abs().max() <= 1 / 16 + 1e-6
    assert torch.equal(bits[:, 4], quantize(x[:, 1]))


def test_gradients_pass_through_all_bits():
    x = torch.tensor([0.3, -0.7, 1.5]).reshape(1, 1, 1, 3).requires_grad_()
    bits = straight_through(successive_approximation(x, (3,)))
    (bits * torch.tensor([0.5, 0.25, 0.125]).reshape(1, 3, 1, 1)).sum().backward()
    assert torch.allclose(x.grad.flatten(), torch.tensor([0.875, 0.875, 0.0]))


def test_neighbouring_levels_differ_in_one_bit_of_the_gray_code():
    x = torch.linspace(-0.99, 0.99, 64).reshape(1, 1, 1, -1)
    bits = quantize(successive_approximation(torch.cat([x, x], dim=1), (4, 2)))
    gray = gray_from_binary(bits, (4, 2))
    assert torch.equal(binary_from_gray(gray, (4, 2)), bits)
    levels = [list(dict.fromkeys(map(tuple, part[0, :, 0].T.tolist()))) for part in gray.split((4, 2), dim=1)]
    assert [len(level) for level in levels] == [16, 4]
    for level in levels:
        assert all(sum(a != b for a, b in zip(*pair, strict=True)) == 1 for pair in itertools.pairwise(level))


def test_the_gray_code_changes_tokens_and_not_images():
    config = AutoencoderConfig((32, 32), 1, 8, split=2, bit_depths=(6, 4, *[2] * 11), space_to_depth=4)
    binary, gray = (Autoencoder(dataclasses.replace(config, gray_code=code)).eval() for code in (False, True))
    gray.load_state_dict(binary.state_dict())
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        bits = [network.encode(images) for network in (binary, gray)]
        assert not torch.equal(*bits) and torch.equal(bits[1].abs(), torch.ones_like(bits[1]))
        assert torch.equal(gray.decode(bits[1]), binary.decode(bits[0]))


def test_tokens_of_a_cell_are_neighbours():
    x = torch.arange(2 * 8 * 3 * 3).reshape(2, 8, 3, 3)
    tokens = tokens_from_cells(x, 2)
    assert tokens.shape == (2, 2, 6, 6)
    assert torch.equal(tokens[:, :, 2, 5], x[:, 2:4, 1, 2])  # row 2 = 2 * 1 + 0, column 5 = 2 * 2 + 1: the second token
    assert torch.equal(cells_from_tokens(tokens, 2), x)


def test_principal_components_are_transform_coding():
    torch.manual_seed(0)
    smooth = F.interpolate(torch.randn(256, 3, 4, 4), scale_factor=4, mode="bilinear").clamp(-1, 1)
    depths = (6, 5, 5, 4, 4, 4, 2, 2)
    network = Autoencoder(AutoencoderConfig((32,), 1, 32, space_to_depth=8, bit_depths=depths, linear=True))
    initialize_linear(network, smooth)
    blocks = F.pixel_unshuffle(smooth, 8).movedim(1, -1).reshape(-1, 192)
    centred = blocks - blocks.mean(0)
    _, _, vectors = torch.linalg.svd(centred, full_matrices=False)
    kept = (centred @ vectors[: len(depths)].T).square().sum() / centred.square().sum()
    error = (network.decode(network.encode(smooth)) - smooth).square().sum() / centred.square().sum()
    # The error is at least what the components leave out, and little more.
    assert 1 - kept < error < 1 - kept + 0.05


def test_each_network_gets_only_its_own_gradient():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=8, layers=2)
    real, fake = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32, requires_grad=True)
    generator_loss, discriminator_loss, *_ = adversarial_losses(discriminator, real, fake)
    assert torch.allclose(generator_loss, -discriminator(fake).mean(), atol=1e-6)
    parameters = list(discriminator.parameters())
    expected = torch.autograd.grad(
        0.5 * (F.relu(1 - discriminator(real)).mean() + F.relu(1 + discriminator(fake.detach())).mean()), parameters
    )
    (generator_loss + discriminator_loss).backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-6)
    discriminator.requires_grad_(False)
    assert torch.allclose(fake.grad, torch.autograd.grad(-discriminator(fake).mean(), fake)[0], atol=1e-6)


def test_perceptual_loss_is_zero_for_equal_images_and_grows_with_blur():
    torch.manual_seed(0)
    network = VGG16().requires_grad_(False)
    loss = PerceptualLoss(network)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    blurred = [F.avg_pool2d(x, k, stride=1, padding=k // 2).requires_grad_() for k in (3, 7)]
    assert loss(x, x).item() == 0
    small, large = (loss(image, x) for image in blurred)
    assert 0 < small < large
    large.backward()
    assert blurred[1].grad.abs().sum() > 0


def test_lpips_weights_its_channels(tmp_path, monkeypatch):
    torch.manual_seed(0)
    network = VGG16()
    lins = {f"lin{i}.model.1.weight": torch.full((1, c[0], 1, 1), i + 1.0) for i, c in enumerate(VGG_CHANNELS)}
    states = {"vgg16": network.state_dict() | {"classifier.0.weight": torch.zeros(2, 2)}, "lpips-vgg": lins}
    for key, state in states.items():
        path = tmp_path / PLAIN_FILES[key].file
        torch.save(state, path, _use_new_zipfile_serialization=False)  # the published files have this older format
        monkeypatch.setitem(PLAIN_FILES, key, PLAIN_FILES[key]._replace(sha256=file_digest(path)))
    loss = load_perceptual_loss("lpips", tmp_path, torch.device("cpu"))
    x, y = torch.rand(2, 1, 3, 64, 64) * 2 - 1
    parts = [
        (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean() * (i + 1)
        for i, (a, b) in enumerate(zip(network.stages(x), network.stages(y), strict=True))
    ]
    assert torch.allclose(loss(x, y), sum(parts), rtol=1e-5)


def test_files_that_are_not_the_published_ones_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no .*vgg16-397923af.pth: run `bitdance download lpips`"):
        load_perceptual_loss("lpips", tmp_path, torch.device("cpu"))
    torch.save(VGG16().state_dict(), tmp_path / "vgg16-397923af.pth")
    with pytest.raises(UserError, match=r"vgg16-397923af.pth is damaged or another file"):
        load_perceptual_loss("lpips", tmp_path, torch.device("cpu"))


def test_discriminator_learns():
    """Within 30 steps it tells noise from smooth images."""
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=8, layers=2)
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=2e-3)
    for _ in range(30):
        real = F.interpolate(torch.randn(8, 3, 4, 4), scale_factor=8, mode="bilinear")
        _, loss, real_logits, fake_logits = adversarial_losses(discriminator, real, torch.randn(8, 3, 32, 32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3 and real_logits.mean() > 0 > fake_logits.mean()
