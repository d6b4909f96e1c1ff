"""A CIFAR-10 classifier: the feature extractor of this example, and the program that trained it.

    bitdance evaluate samples.npz --reference cifar10_test.zip --features examples/cifar10/classifier.py:extractor
    python examples/cifar10/classifier.py --data-path cifar10_train.zip --val-path cifar10_test.zip

`classifier.safetensors` beside this file is what the second command wrote to runs/cifar10; to use the result of another
training, copy it there. Its features have another scale, so compare only Fréchet distances that were computed with one
file.

A residual network of nine layers (Page 2018, half the width). It classifies an image by the sum of the logits of the
image and of its mirror image; the features are those of the image alone. It is a measure for this example only: nothing
that is computed with it can be compared with published numbers.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bitdance.cli.main import call
from bitdance.data.crops import normalize, to_array
from bitdance.data.images import open_images
from bitdance.metrics.accuracy import top_k_accuracy
from bitdance.metrics.features import FeatureExtractor, Features
from bitdance.metrics.frechet_distance import frechet_distance
from bitdance.metrics.psnr_ssim import psnr, ssim
from bitdance.metrics.statistics import Statistics, StatisticsAccumulator
from bitdance.runtime.atomic_files import atomic_write, file_digest, make_folder
from bitdance.runtime.devices import MAX_THREADS
from bitdance.runtime.errors import UserError, check_fields
from bitdance.runtime.progress import progress_bar
from bitdance.runtime.run_folder import check_writable

WEIGHTS = pathlib.Path(__file__).with_name("classifier.safetensors")
NAME = "cifar10-classifier-mirrored"
NUM_FEATURES, CLASSES = 256, 10


def conv(c_in: int, c_out: int) -> nn.Sequential:
    """Returns a 3x3 convolution with batch normalization and ReLU."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class ResidualBlock(nn.Module):
    """Adds two convolutions to the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(conv(channels, channels), conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convs(x)


class Classifier(nn.Module):
    """Maps images (B, 3, 32, 32) in [-1, 1] to features (B, 256) and logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            conv(3, 32),
            *(conv(32, 64), nn.MaxPool2d(2), ResidualBlock(64)),
            *(conv(64, 128), nn.MaxPool2d(2)),
            *(conv(128, NUM_FEATURES), nn.MaxPool2d(2), ResidualBlock(NUM_FEATURES)),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        )
        self.fc = nn.Linear(NUM_FEATURES, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pool = self.layers(x)
        return pool, self.fc(pool)


def classify(network: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the features of images (B, 32, 32, 3) uint8, and the summed logits of images and mirror images."""
    x = normalize(images)
    pool, logits = network(x)
    return pool, logits + network(x.flip(3))[1]


def extractor() -> FeatureExtractor:
    """Returns the trained classifier as a feature extractor, which also reports accuracy.

    Raises:
        UserError: its weights are missing, damaged or of another network.
    """
    network = Classifier().eval().requires_grad_(False)
    try:
        network.load_state_dict(load_file(WEIGHTS))
    except (OSError, SafetensorError, RuntimeError):
        raise UserError(f"{WEIGHTS} is missing, damaged or of another network: restore it.") from None
    digest = file_digest(WEIGHTS)

    def extract(images: Tensor) -> Features:
        pool, logits = classify(network, images)
        return Features(pool, logits=logits)

    return FeatureExtractor(NAME, NUM_FEATURES, extract, classifies=True, digest=digest)


class ReconstructionMetrics:
    """Compares reconstructions with their originals, whose features are computed once.

    Args:
        original: (N, 32, 32, 3) uint8.
        labels: (N,) int64.
    """

    def __init__(self, original: Tensor, labels: Tensor) -> None:
        self._original, self._labels, self._network = original, labels, extractor()
        self._statistics, _ = self._classify(original)

    def __call__(self, decoded: Tensor) -> dict[str, float]:
        """Returns PSNR, SSIM, and of the classifier the accuracy and the Fréchet distance.

        Args:
            decoded: the reconstructions, (N, 32, 32, 3) uint8.
        """
        parts = zip(self._original.split(100), decoded.split(100), strict=True)
        statistics, logits = self._classify(decoded)
        return {
            "psnr": psnr(self._original, decoded).mean().item(),
            "ssim": torch.cat([ssim(a, b) for a, b in parts]).mean().item(),
            "accuracy": top_k_accuracy(logits, self._labels.numpy()),
            "frechet_distance": frechet_distance(self._statistics, statistics),
        }

    def _classify(self, images: Tensor) -> tuple[Statistics, np.ndarray]:
        accumulator, logits = StatisticsAccumulator(self._network.size), []
        for part in images.split(100):
            features = self._network(part.numpy())
            accumulator.add(features["pool"])
            logits.append(features["logits"])
        return accumulator.statistics(), np.concatenate(logits)


def set_threads(options: argparse.Namespace) -> None:
    """Has PyTorch use the CPU threads that an option gives.

    Raises:
        UserError: the number is not in 1 to `MAX_THREADS`.
    """
    check_fields(options, "threads", lambda value: 1 <= value <= MAX_THREADS, f"be from 1 to {MAX_THREADS}")
    torch.set_num_threads(options.threads)


def check_output(path: pathlib.Path) -> None:
    """Raises a `UserError` if a file cannot be written, before the work whose result it is to hold."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'not a regular file'}: give the file to write.")
    check_writable(path.parent)


def load_images(path: pathlib.Path) -> tuple[Tensor, Tensor]:
    """Returns all images (N, 32, 32, 3) uint8 and their labels (N,) int64.

    Raises:
        UserError: the images cannot be read, or do not have 32 x 32 pixels and at most ten classes.
    """
    images = open_images(path)
    views = [to_array(images.read(i)) for i in range(len(images))]
    if {view.shape for view in views} != {(32, 32, 3)}:
        raise UserError(f"{path} has images of other sizes than 32 x 32 pixels: these examples are for CIFAR-10.")
    if len(images.classes) > CLASSES:
        raise UserError(f"{path} has more than {CLASSES} classes: these examples are for CIFAR-10.")
    pixels = np.stack(views)
    return torch.from_numpy(pixels), torch.from_numpy(images.labels)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flips half of the images (B, 32, 32, 3) and shifts all by up to 4 pixels, repeating the border."""
    flipped = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flipped[:, None, None, None], images.flip(2), images)
    shifts = torch.randint(-4, 5, (2, len(images), 1), generator=generator)
    rows, columns = (torch.arange(32) + shifts).clamp(0, 31)
    return images[torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]


def accuracy(network: Classifier, images: Tensor, labels: Tensor) -> float:
    """Returns the fraction of images that are classified correctly, in bf16 autocast, with the float32 weights."""
    network.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        predicted = torch.cat([classify(network, part)[1].argmax(dim=1) for part in images.split(100)])
    network.train()
    return (predicted == labels).double().mean().item()


def train(
    data: pathlib.Path, val: pathlib.Path, output: pathlib.Path, epochs: int, batch_size: int = 256, lr: float = 0.4
) -> None:
    """Trains a classifier with SGD and a one-cycle schedule, and writes its weights in float16.

    Args:
        data: training images.
        val: held-out images, which are classified after each epoch.
        output: file to write.
        epochs: passes over the training images.
        batch_size: images in a step.
        lr: peak learning rate.

    Raises:
        UserError: the images are not those of CIFAR-10, or the file cannot be written.
    """
    check_output(output)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    (images, labels), held_out = load_images(data), load_images(val)
    network = Classifier().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    batch_size = min(batch_size, len(images))
    steps = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * steps, pct_start=0.2)
    with progress_bar(epochs * steps, "training", "steps") as bar:
        for epoch in range(epochs):
            order = torch.randperm(len(images), generator=generator)[: steps * batch_size]
            for batch in order.split(batch_size):
                x = normalize(augment(images[batch], generator)).contiguous(memory_format=torch.channels_last)
                with torch.autocast("cpu", torch.bfloat16):
                    _, logits = network(x)
                loss = F.cross_entropy(logits.float(), labels[batch], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            bar.write(f"epoch {epoch + 1} of {epochs}: {accuracy(network, *held_out):.2%} correct")
    make_folder(output.parent)
    with atomic_write(output) as temporary:
        try:
            save_file({name: value.contiguous() for name, value in network.half().state_dict().items()}, temporary)
        except SafetensorError as error:
            raise OSError(None, str(error)) from error  # for the sentence of `atomic_write`
    print(f"wrote {output}")


def main(arguments: list[str]) -> None:
    """Trains a classifier."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data-path", type=pathlib.Path, required=True, help="training images")
    parser.add_argument("--val-path", type=pathlib.Path, required=True, help="held-out images")
    output = pathlib.Path("runs/cifar10/classifier.safetensors")
    parser.add_argument("--output", type=pathlib.Path, default=output, help="file to write")
    parser.add_argument("--epochs", type=int, default=30, help="passes over the training images")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    options = parser.parse_args(arguments)
    check_fields(options, "epochs", lambda value: 1 <= value <= 10_000, "be from 1 to 10000")
    set_threads(options)
    train(options.data_path, options.val_path, options.output, options.epochs)


if __name__ == "__main__":
    call(main, sys.argv[1:])
