"""`bitdance reconstruct`: encode and decode images with an autoencoder."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING

from bitdance.cli.options import DataOptions, DeviceOptions
from bitdance.cli.parsing import parse
from bitdance.runtime.errors import UserError, check_fields

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
        rfid: compute rFID, the FID between the images and their reconstructions; by default if the Inception weights
            are found.
        inception_weights: weights of the Inception network; by default the downloaded file.
    """

    autoencoder: str = "demo"
    batch_size: int = 100
    rfid: bool | None = None
    inception_weights: pathlib.Path | None = None

    def __post_init__(self) -> None:
        check_fields(self, "batch_size", lambda value: value >= 1, "be at least 1")


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
    from bitdance.runtime.process_group import init_distributed

    with init_distributed(command.where.device, command.where.threads) as world:
        _reconstruct(command.data, command.how, command.results, world)


def _reconstruct(data: DataOptions, how: How, results: Results, world: World) -> None:
    import numpy as np
    import torch

    from bitdance.data.crops import center_crop, normalize, to_array
    from bitdance.data.image_dataset import evenly_spaced
    from bitdance.data.images import open_images
    from bitdance.metrics.frechet_distance import frechet_distance
    from bitdance.metrics.psnr_ssim import WINDOW, psnr, ssim
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
    images = open_images(data.data_path, data.split)
    size = data.image_size or min(images.read(0).size)
    if size % autoencoder.config.down_size or size < WINDOW:
        raise UserError(
            f"image_size={size} is invalid: it must be a multiple of {autoencoder.config.down_size} and at least "
            f"{WINDOW}."
        )
    extractor = _load_inception(how, world)
    accumulators = [StatisticsAccumulator(extractor.size) for _ in range(2)] if extractor else []
    chosen = evenly_spaced(len(images), data.limit)
    count, shown = len(chosen), evenly_spaced(len(chosen), results.shown)
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    ratios, similarities = [], []
    with progress_bar(count, "reconstructing", "images") as bar, torch.no_grad():
        for start in range(0, count, how.batch_size):
            part = chosen[start : start + how.batch_size]
            batch = [to_array(center_crop(images.read(int(i)), size)) for i in part]
            original = torch.from_numpy(np.stack(batch)).to(world.device)
            decoded = to_uint8(autoencoder.decode(autoencoder.encode(normalize(original))))
            ratios.append(psnr(original.cpu(), decoded.cpu()))
            similarities.append(ssim(original.cpu(), decoded.cpu()))
            for accumulator, pixels in zip(accumulators, (original, decoded), strict=False):
                assert extractor is not None
                accumulator.add(extractor(pixels.cpu().numpy())["pool"])
            for i in shown[(shown >= start) & (shown < start + len(batch))] - start:
                pairs.append((original[i].cpu().numpy(), decoded[i].cpu().numpy()))
            bar.update(len(batch))
    metrics = {
        "autoencoder": str(path),
        "data": str(data.data_path),
        "images": count,
        "image_size": size,
        "psnr": float(torch.cat(ratios).mean()),
        "ssim": float(torch.cat(similarities).mean()),
    }
    if extractor and count > 1:
        real, reconstructed = (accumulator.statistics() for accumulator in accumulators)
        metrics |= {"rfid": frechet_distance(real, reconstructed), "inception_digest": extractor.digest}
    above, below = (np.stack(part) for part in zip(*pairs, strict=True))
    write_json(results.output / "reconstruction.json", metrics)
    picture = results.output / "reconstruction.png"
    both, labels = np.concatenate([above, below]), ("original", "decoded")
    write_png(picture, image_grid(both, len(shown), labels, scale=max(1, 96 // size)))
    rfid = f", rFID {metrics['rfid']:.3f}" if "rfid" in metrics else ""
    print(f"{count} images: PSNR {metrics['psnr']:.2f} dB, SSIM {metrics['ssim']:.3f}{rfid}: {picture}")


def _load_inception(how: How, world: World) -> FeatureExtractor | None:
    """Loads the Inception network if `rfid` asks for it, or by default if its weights are found."""
    from bitdance.metrics.inception import find_weights, load_inception

    if how.rfid is False:
        return None
    try:
        path = find_weights(how.inception_weights)
    except UserError:
        if how.rfid or how.inception_weights:
            raise
        return None
    return load_inception(path, world.device)
