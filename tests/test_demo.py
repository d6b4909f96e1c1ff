"""The demo models that are part of the package."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bitdance.cli.main import main
from bitdance.models.philox import normal
from bitdance.models.transformer import BitDance
from bitdance.sampling.pipeline import load_pipeline
from bitdance.sampling.sampler import SamplingConfig, sample_noise, sample_tokens
from bitdance.weights import weights_file
from bitdance.weights.resolve import find_weights

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SAMPLING = SamplingConfig(num_steps=5, cfg_scale=24.0)
PARALLEL_NUMS = {"demo-1x": 1, "demo-4x": 4, "demo-16x": 16}


@pytest.fixture(scope="module", params=PARALLEL_NUMS)
def model(request) -> BitDance:
    return weights_file.load_model(request.param)


@pytest.fixture(scope="module")
def tokens(model) -> Tensor:
    return sample(model, 10)


def sample(model: BitDance, batch_size: int) -> Tensor:
    """Samples an image of each class."""
    batches = [
        sample_tokens(model, labels, sample_noise(model, 0, labels, SAMPLING.num_draws), SAMPLING)
        for labels in torch.arange(10).split(batch_size)
    ]
    return torch.cat(batches)


def test_files():
    autoencoder, paths = find_weights("demo", "autoencoder"), [find_weights(name) for name in PARALLEL_NUMS]
    assert find_weights("demo") in paths
    assert sum(path.stat().st_size for path in (autoencoder, *paths)) <= 12_000_000
    digest = weights_file.tokenizer_digest(weights_file.read(autoencoder))
    for path, (name, p) in zip(paths, PARALLEL_NUMS.items(), strict=True):
        assert find_weights(name, "autoencoder") == autoencoder
        assert weights_file.read(path).metadata["tokenizer_digest"] == digest
        pipeline = load_pipeline(name, device="cpu")
        config = pipeline.model.config
        assert config.class_names == CLASSES and config.parallel_num == p and pipeline.image_size == 32
        assert pipeline.defaults.cfg_scale > 1


def test_it_distinguishes_classes(model, tokens):
    """The loss of its samples is lower with their classes than with others."""
    labels = torch.arange(10)
    steps, p = model.config.ar_steps, model.config.parallel_num
    x_0 = normal(1, torch.arange(10 * steps), p * model.config.bits, stream=99, step=0)[0].unflatten(1, (p, -1))
    t = torch.linspace(0.05, 0.9, steps).repeat(10)
    with torch.no_grad():
        right, wrong = (model.loss(tokens, classes, t, x_0) for classes in (labels, (labels + 5) % 10))
    assert right < wrong


def test_bits_do_not_depend_on_the_batch_size_except_for_rounding(model, tokens):
    """The last of the batches of three has one image."""
    assert (sample(model, 3) == tokens).float().mean() >= 0.999


def test_sample_writes_a_labelled_grid_of_all_classes(tmp_path, capsys):
    main(["sample", "--output", str(tmp_path / "samples"), "--per-class", "2", "--num-steps", "4"])
    assert capsys.readouterr().out.strip().endswith("grid.png")
    record = json.loads((tmp_path / "samples" / "samples.json").read_text())
    assert [image["name"] for image in record["images"]] == [name for name in CLASSES for _ in range(2)]
    images = [np.asarray(Image.open(tmp_path / "samples" / image["file"])) for image in record["images"]]
    assert all(image.shape == (32, 32, 3) for image in images)
    assert min(image.std() for image in images) > 5, "an image without contrast"
    assert len({image.tobytes() for image in images}) == 20
    assert (tmp_path / "samples" / "grid.png").exists()
