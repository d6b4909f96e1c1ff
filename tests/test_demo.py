"""The model that ships inside the package."""

import importlib.resources
import json

import numpy as np
import pytest
import torch
from PIL import Image

from bitdance.cli.main import main
from bitdance.weights import network_config, weights_file

ASSETS = importlib.resources.files("bitdance") / "assets"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(scope="module")
def files():
    return ASSETS / "demo_model.safetensors", ASSETS / "demo_autoencoder.safetensors"


def test_it_is_small_and_knows_its_classes_and_its_autoencoder(files):
    model, autoencoder = (weights_file.read(str(file)) for file in files)
    assert sum(len(file.read_bytes()) for file in files) <= 10_000_000
    config = network_config.describe_model(model).config
    assert config.class_names == CLASSES
    assert config.grid * network_config.describe_autoencoder(autoencoder).config.down_size == 32
    assert model.metadata["autoencoder_digest"] == autoencoder.metadata["digest"]


def test_it_tells_its_classes_apart(files):
    """On its own samples the loss under the class that was asked for is lower than under another one."""
    from bitdance.models.philox import normal
    from bitdance.sampling.sampler import SamplingConfig, sample_noise, sample_tokens

    model = weights_file.load_model(str(files[0]))
    labels = torch.arange(10).repeat(2)
    draw = sample_noise(model, 0, torch.arange(20), 20)
    tokens = sample_tokens(model, labels, draw, SamplingConfig(20, cfg_scale=3.0))
    steps, bits = model.config.ar_steps, model.config.bits
    x_0 = normal(1, torch.arange(20 * steps), bits, stream=99, step=0)[0][:, None]
    t = torch.linspace(0.05, 0.9, steps).repeat(20)
    with torch.no_grad():
        right, wrong = (model.loss(tokens, asked, t, x_0) for asked in (labels, (labels + 5) % 10))
    assert right < wrong


def test_across_batch_sizes_nearly_all_bits_are_equal(files):
    from bitdance.sampling.sampler import SamplingConfig, sample_noise, sample_tokens

    model = weights_file.load_model(str(files[0]))
    settings, labels, numbers = SamplingConfig(20, cfg_scale=3.0), torch.arange(10).repeat(3), torch.arange(30)

    def sample(size):
        made = []
        for part, rows in zip(labels.split(size), numbers.split(size), strict=True):
            made.append(sample_tokens(model, part, sample_noise(model, 7, rows, settings.num_draws), settings))
        return torch.cat(made)

    whole = sample(30)
    for size in (1, 7):
        assert (sample(size) == whole).float().mean() >= 0.999


def test_make_sample_makes_a_labelled_grid_of_all_classes(tmp_path, capsys):
    main(["sample", "--output", str(tmp_path / "samples"), "--per-class", "2", "--sample-steps", "4"])
    assert capsys.readouterr().out.strip().endswith("grid.png")
    record = json.loads((tmp_path / "samples" / "samples.json").read_text())
    assert [image["name"] for image in record["images"]] == [name for name in CLASSES for _ in range(2)]
    pictures = [np.asarray(Image.open(tmp_path / "samples" / image["file"])) for image in record["images"]]
    assert all(picture.shape == (32, 32, 3) for picture in pictures)
    assert min(picture.std() for picture in pictures) > 5, "an image without contrast"
    assert len({picture.tobytes() for picture in pictures}) == 20
    assert (tmp_path / "samples" / "grid.png").exists()
