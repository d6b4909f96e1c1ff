"""`bitdance reconstruct`: encode and decode images with an autoencoder."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any

from bitdance.cli.options import DataOptions, DeviceOptions
from bitdance.cli.parsing import parse
from bitdance.runtime.errors import UserError, check_fields, counted

if TYPE_CHECKING:
    from bitdance.metrics.features import FeatureExtractor
    from bitdance.runtime.process_group import World

EXAMPLES = """
bitdance reconstruct --data-path pictures.zip --image-size 32
bitdance reconstruct --data-path imagenet/val --autoencoder autoencoder --image-size 256 --limit 1000
"""


@dataclasses.dataclass(frozen=True)
class How:
    """How to reconstruct.

    Attributes:
        autoencoder: demo, autoencoder (the released one), the folder of a training run, or a file of weights.
        batch_size: images at once.
        max_bad_images: unreadable images that are tolerated, named and skipped; by default a tenth of your own
            pictures, at least 10, and 100 of ImageNet.
        rfid: compute rFID, the FID between the images and their reconstructions; by default if the Inception weights
            are found.
        inception_weights: weights of the Inception network; by default the downloaded file.
        features: another feature extractor in place of Inception: efficientnet-lite0, or module:attribute or
            path/to/file.py:attribute (this runs that code). The Frechet distance between its features is computed, and
            the accuracy if it is a classifier.
    """

    autoencoder: str = "demo"
    batch_size: int = 100
    max_bad_images: int | None = None
    rfid: bool | None = None
    inception_weights: pathlib.Path | None = None
    features: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "batch_size", lambda value: value >= 1, "be at least 1")
        check_fields(self, "max_bad_images", lambda value: value >= 0, "be at least 0")


@dataclasses.dataclass(frozen=True)
class Results:
    """What to write.

    Attributes:
        output: folder for reconstruction.png and reconstruction.json.
        shown: images in the picture.
    """

    output: pathlib.Path = pathlib.Path("reconstruction")
    shown: int = 16

    def __post_init__(self) -> None:
        check_fields(self, "shown", lambda value: value >= 1, "be at least 1")


@dataclasses.dataclass(frozen=True)
class Reconstruct:
    """Encode and decode images: a picture of both, PSNR, SSIM and rFID."""

    data: DataOptions
    how: How = dataclasses.field(default_factory=How)
    results: Results = dataclasses.field(default_factory=Results)
    where: DeviceOptions = dataclasses.field(default_factory=DeviceOptions)


def main(arguments: list[str]) -> None:
    """Runs the command."""
    command = parse(Reconstruct, arguments, "bitdance reconstruct", EXAMPLES)
    with command.where.init_distributed(only_one=True) as world:
        _reconstruct(command.data, command.how, command.results, world)


def _reconstruct(data: DataOptions, how: How, results: Results, world: World) -> None:
    import numpy as np
    import torch

    from bitdance.data.crops import normalize
    from bitdance.data.decoding import is_image
    from bitdance.data.image_dataset import evenly_spaced, print_summary
    from bitdance.metrics.frechet_distance import frechet_distance
    from bitdance.metrics.image_sources import ImageFileSource
    from bitdance.metrics.psnr_ssim import WINDOW, psnr, ssim
    from bitdance.metrics.references import find_extractor
    from bitdance.metrics.statistics import StatisticsAccumulator
    from bitdance.models.autoencoder import to_uint8
    from bitdance.runtime.atomic_files import write_json
    from bitdance.runtime.progress import progress_bar
    from bitdance.sampling.image_grid import image_grid
    from bitdance.sampling.writers import write_png
    from bitdance.weights.resolve import find_weights
    from bitdance.weights.weights_file import load_autoencoder

    path = find_weights(how.autoencoder, "autoencoder")
    autoencoder = load_autoencoder(path).to(world.device)
    options = (data.image_size, data.split, data.limit)
    source = ImageFileSource(data.data_path, *options, skips=True, max_bad_images=how.max_bad_images)
    print_summary(source.summary)
    _, stored_height, stored_width, _ = source.shape
    if data.image_size is not None:
        autoencoder.config.grid(data.image_size)
    cell = autoencoder.config.cell_size
    height, width = (side // cell * cell for side in (stored_height, stored_width))
    is_one = is_image(data.data_path.name)
    if data.image_size is None and not is_one:  # the images of a set may have several sizes
        height = width = min(height, width)
        source.crop(height)
    if min(height, width) < WINDOW or height * width <= cell**2:  # one cell has no variance to normalize by
        size, least = f"{stored_width} x {stored_height} pixels", cell * max(2, -(-WINDOW // cell))
        raise UserError(f"images of {size} are too small: set `image_size` to {least} or more.")
    top, left = ((source.shape[i] - side) // 2 for i, side in ((1, height), (2, width)))
    extractor = find_extractor(how.features, world) if how.features else _load_inception(how, world)
    correct = np.zeros(2)
    accumulators = [StatisticsAccumulator(extractor.size) for _ in range(2)] if extractor else []
    pairs: list[list[np.ndarray]] = []
    shown = set(evenly_spaced(len(source), results.shown).tolist())
    ratios, similarities = [], []
    with progress_bar(len(source), "reconstructing", "images") as bar, torch.no_grad():
        for number, block in enumerate(source.blocks(how.batch_size)):
            positions = range(number * how.batch_size, min((number + 1) * how.batch_size, len(source)))
            bar.update(len(positions))
            if not len(block):
                continue
            block = np.ascontiguousarray(block[:, top : top + height, left : left + width])
            original = torch.from_numpy(block).to(world.device)
            decoded = to_uint8(autoencoder.decode(autoencoder.encode(normalize(original)))).cpu().numpy()
            ratios.append(psnr(torch.from_numpy(block), torch.from_numpy(decoded)))
            similarities.append(ssim(torch.from_numpy(block), torch.from_numpy(decoded)))
            readable = [position for position in positions if position not in source.bad_images]
            for i, (accumulator, pixels) in enumerate(zip(accumulators, (block, decoded), strict=False)):
                assert extractor is not None
                features = extractor(pixels)
                accumulator.add(features["pool"])
                if extractor.classifies and source.labels is not None:
                    correct[i] += (features["logits"].argmax(1) == source.labels[readable]).sum()
            for position, *pair in zip(readable, block, decoded, strict=True):
                if position in shown or not pairs:
                    pairs.append(pair)
    count, side = len(source) - len(source.bad_images), height if height == width else [height, width]
    metrics: dict[str, Any] = {
        "autoencoder": str(path),
        "data": str(data.data_path),
        "images": count,
        "image_size": side,
        "psnr": float(torch.cat(ratios).mean()),
        "ssim": float(torch.cat(similarities).mean()),
    }
    if extractor and count > 1:
        real, reconstructed = (accumulator.statistics() for accumulator in accumulators)
        inception = how.features is None
        metrics["rfid" if inception else "frechet_distance"] = frechet_distance(real, reconstructed)
        metrics |= {"inception_digest": extractor.digest} if inception else {"feature_extractor": extractor.key}
        if extractor.classifies and source.labels is not None:
            metrics |= {"accuracy": correct[1] / count, "accuracy_of_originals": correct[0] / count}
    above, below = (np.stack(part) for part in zip(*pairs, strict=True))
    write_json(results.output / "reconstruction.json", metrics)
    picture = results.output / "reconstruction.png"
    both, labels = np.concatenate([above, below]), ("original", "decoded")
    write_png(picture, image_grid(both, len(pairs), labels, scale=None))
    distance = f", rFID {metrics['rfid']:.3f}" if "rfid" in metrics else ""
    if "frechet_distance" in metrics:
        distance = f", Frechet distance {metrics['frechet_distance']:.3f} ({metrics['feature_extractor']})"
    if "accuracy" in metrics:
        distance += f", accuracy {metrics['accuracy']:.2%} (originals {metrics['accuracy_of_originals']:.2%})"
    size = ""
    if data.image_size is None:
        size = f" at {width} x {height} pixels"
        if (height, width) != (stored_height, stored_width):
            size += f" ({'cropped from' if is_one else 'the first one has'} {stored_width} x {stored_height})"
    skipped = f" ({len(source.bad_images)} unreadable skipped)" if len(source.bad_images) else ""
    quality = f"PSNR {metrics['psnr']:.2f} dB, SSIM {metrics['ssim']:.3f}{distance}"
    print(f"{counted(count, 'image')}{skipped}{size}: {quality}: {picture}")


def _load_inception(how: How, world: World) -> FeatureExtractor | None:
    """Loads the Inception network if `rfid` asks for it, or by default if its weights are found."""
    from bitdance.metrics.inception import find_inception_weights, load_inception

    if how.rfid is False:
        return None
    try:
        path = find_inception_weights(how.inception_weights)
    except UserError:
        if how.rfid or how.inception_weights:
            raise
        return None
    return load_inception(path, world.device)
