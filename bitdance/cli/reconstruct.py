"""`bitdance reconstruct`: encode and decode images with an autoencoder."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING, Literal

from bitdance.cli.parsing import Positional, parse
from bitdance.runtime.errors import UserError
from bitdance.weights.resolve import DEMO, find_autoencoder_alone

if TYPE_CHECKING:
    from bitdance.metrics.features import FeatureExtractor
    from bitdance.runtime.process_group import World


@dataclasses.dataclass(frozen=True)
class Reconstruct:
    """Encode and decode images: a picture of both, PSNR, SSIM and rFID.

    Attributes:
        data: images: a folder, zip or tar of class folders, ImageNet's tar or parquet, CIFAR-10's archives.
        autoencoder: `demo`, or a file of weights.
        output: folder for reconstruction.png and reconstruction.json.
        image_size: scale and crop images to squares of this size; by default the shorter side of the first one.
        split: train or test, for CIFAR-10's archives.
        limit: use only this many images, evenly spaced over the set.
        shown: images in the picture.
        batch_size: batch size of the autoencoder and the Inception network.
        rfid: compute rFID, the FID between the images and their reconstructions; by default if the Inception weights
            are found.
        inception_weights: weights of the Inception network; by default the downloaded file.
        device: cpu, cuda, cuda:N or mps; by default a GPU if there is one.
        threads: CPU threads; by default all cores.
    """

    data: Positional[pathlib.Path]
    autoencoder: str = DEMO
    output: pathlib.Path = pathlib.Path("reconstruction")
    image_size: int | None = None
    split: Literal["train", "test"] = "train"
    limit: int | None = None
    shown: int = 16
    batch_size: int = 100
    rfid: bool | None = None
    inception_weights: pathlib.Path | None = None
    device: str | None = None
    threads: int | None = None


def main(arguments: list[str]) -> None:
    """Runs the command."""
    command = parse(Reconstruct, arguments, "bitdance reconstruct")
    for name in ("image_size", "limit", "shown", "batch_size"):
        value = getattr(command, name)
        if value is not None and value < 1:
            raise UserError(f"{name}={value} is invalid: it must be at least 1.")
    from bitdance.runtime.process_group import init_distributed

    with init_distributed(command.device, command.threads) as world:
        _reconstruct(command, world)


def _reconstruct(command: Reconstruct, world: World) -> None:
    import numpy as np
    import torch
    from tqdm import tqdm

    from bitdance.data.crops import center_crop, normalize, to_array
    from bitdance.data.images import open_images, spread
    from bitdance.metrics.frechet_distance import frechet_distance
    from bitdance.metrics.psnr_ssim import WINDOW, psnr, ssim
    from bitdance.metrics.statistics import StatisticsAccumulator
    from bitdance.models.autoencoder import to_uint8
    from bitdance.runtime.atomic_files import atomic_write
    from bitdance.sampling.image_grid import grid
    from bitdance.weights.weights_file import load_autoencoder

    path = find_autoencoder_alone(command.autoencoder)
    autoencoder = load_autoencoder(path).to(world.device)
    images = open_images(command.data, command.split)
    size = command.image_size or min(images.read(0).size)
    if size % autoencoder.config.down_size or size < WINDOW:
        raise UserError(
            f"image_size={size} is invalid: it must be a multiple of {autoencoder.config.down_size} and at least "
            f"{WINDOW}."
        )
    extractor = _load_inception(command, world)
    accumulators = [StatisticsAccumulator(extractor.size) for _ in range(2)] if extractor else []
    chosen = spread(len(images), command.limit)
    count, shown = len(chosen), spread(len(chosen), command.shown)
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    ratios, similarities = [], []
    with tqdm(total=count, unit="image", dynamic_ncols=True) as bar, torch.no_grad():
        for start in range(0, count, command.batch_size):
            part = chosen[start : start + command.batch_size]
            batch = np.stack([to_array(center_crop(images.read(int(i)), size)) for i in part])
            original = torch.from_numpy(batch).to(world.device)  # (B, size, size, 3) uint8
            decoded = to_uint8(autoencoder.decode(autoencoder.encode(normalize(original)))).cpu()
            ratios.append(psnr(torch.from_numpy(batch), decoded))
            similarities.append(ssim(torch.from_numpy(batch), decoded))
            for accumulator, pixels in zip(accumulators, (batch, decoded.numpy()), strict=False):
                assert extractor is not None
                accumulator.add(extractor(pixels)["pool"])
            for i in shown[(shown >= start) & (shown < start + len(batch))] - start:
                pairs.append((batch[i], decoded[i].numpy()))
            bar.update(len(batch))
    metrics = {
        "autoencoder": str(path),
        "data": str(command.data),
        "images": count,
        "image_size": size,
        "psnr": float(torch.cat(ratios).mean()),
        "ssim": float(torch.cat(similarities).mean()),
    }
    if extractor and count > 1:
        real, reconstructed = (accumulator.statistics() for accumulator in accumulators)
        metrics |= {"rfid": frechet_distance(real, reconstructed), "inception_digest": extractor.digest}
    above, below = (np.stack(part) for part in zip(*pairs, strict=True))
    with atomic_write(command.output / "reconstruction.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=1) + "\n")
    picture = command.output / "reconstruction.png"
    with atomic_write(picture) as temporary:
        sheet = grid(np.concatenate([above, below]), len(shown), ("original", "decoded"), scale=max(1, 96 // size))
        sheet.save(temporary, format="PNG")
    rfid = f", rFID {metrics['rfid']:.3f}" if "rfid" in metrics else ""
    print(f"{count} images: PSNR {metrics['psnr']:.2f} dB, SSIM {metrics['ssim']:.3f}{rfid}: {picture}")


def _load_inception(command: Reconstruct, world: World) -> FeatureExtractor | None:
    """Loads the Inception network if `rfid` asks for it, or by default if its weights are found."""
    from bitdance.metrics.inception import find_weights, load_inception

    if command.rfid is False:
        return None
    try:
        path = find_weights(command.inception_weights)
    except UserError:
        if command.rfid or command.inception_weights:
            raise
        return None
    return load_inception(path, world.device)
