"""The demo model that is part of the package."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bitdance.cli.main import main
from bitdance.models.philox import normal
from bitdance.models.transformer import BitDance
from bitdance.sampling.sampler import SamplingConfig, sample_noise, sample_tokens
from bitdance.weights import weights_file
from bitdance.weights.resolve import find_weights

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SAMPLING = SamplingConfig(num_steps=5, cfg_scale=3.0)


@pytest.fixture(scope="module")
def model() -> BitDance:
    return weights_file.load_model("demo")


def sample(model: BitDance, batch_size: int) -> Tensor:
    """Samples an image of each class."""
    batches = [
        sample_tokens(model, labels, sample_noise(model, 0, labels, SAMPLING.num_draws), SAMPLING)
        for labels in torch.arange(10).split(batch_size)
    ]
    return torch.cat(batches)


def test_files(model):
    paths = [find_weights("demo", part) for part in ("model", "autoencoder")]
    assert sum(path.stat().st_size for path in paths) <= 12_000_000
    assert model.config.class_names == CLASSES
    assert model.config.grid * weights_file.load_autoencoder("demo").config.down_size == 32
    contents = [weights_file.read(path) for path in paths]
    assert contents[0].metadata["tokenizer_digest"] == weights_file.tokenizer_digest(contents[1])


def test_it_distinguishes_classes(model):
    """The loss of its samples is lower with their classes than with others."""
    tokens, labels = sample(model, 10), torch.arange(10)
    steps = model.config.ar_steps
    x_0 = normal(1, torch.arange(10 * steps), model.config.bits, stream=99, step=0)[0][:, None]
    t = torch.linspace(0.05, 0.9, steps).repeat(10)
    with torch.no_grad():
        right, wrong = (model.loss(tokens, classes, t, x_0) for classes in (labels, (labels + 5) % 10))
    assert right < wrong


def test_bits_do_not_depend_on_the_batch_size_except_for_rounding(model):
    whole = sample(model, 10)
    for batch_size in (1, 4):
        assert (sample(model, batch_size) == whole).float().mean() >= 0.999


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
