"""`bitdance reconstruct`: what an autoencoder makes of images it is given."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING, Literal

from bitdance.cli.parsing import Positional, parse
from bitdance.runtime.errors import UserError
from bitdance.weights.resolve import DEMO, find_weights

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
        image_size: images are scaled and cropped to this side; by default the side of the first one.
        split: train or test, for CIFAR-10's archives.
        limit: use only so many images, spread over the set.
        shown: images in the picture.
        batch_size: images at a time.
        rfid: the Fréchet distance between the images and their reconstructions too, in Inception features; by default
            where the Inception weights are there.
        inception_weights: file of the Inception network; by default the downloaded one.
        device: cpu, cuda, cuda:N or mps; by default a GPU where there is one.
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
            raise UserError(f"--{name.replace('_', '-')} {value} does not fit: it must be at least 1.")
    from bitdance.runtime.process_group import init_distributed

    with init_distributed(command.device, command.threads) as world:
        _reconstruct(command, world)


def _reconstruct(command: Reconstruct, world: World) -> None:
    import numpy as np
    import torch
    from tqdm import tqdm

    from bitdance.data.crops import center_crop, normalize, to_array
    from bitdance.data.image_dataset import evenly_spaced
    from bitdance.data.images import open_images
    from bitdance.metrics.feature_set import Collector, arrays_of
    from bitdance.metrics.frechet_distance import frechet_distance
    from bitdance.metrics.psnr_ssim import WINDOW, psnr, ssim
    from bitdance.models.autoencoder import to_uint8
    from bitdance.runtime.atomic_files import atomic_write
    from bitdance.sampling.image_grid import image_grid
    from bitdance.weights.weights_file import load_autoencoder

    path = find_weights(command.autoencoder, "autoencoder")
    autoencoder = load_autoencoder(path).to(world.device)
    images = open_images(command.data, command.split)
    size = command.image_size or min(images.read(0).size)
    if size % autoencoder.config.down_size or size < WINDOW:
        raise UserError(
            f"--image-size {size} does not fit: it must be a multiple of {autoencoder.config.down_size} "
            f"and at least {WINDOW}."
        )
    count = min(len(images), command.limit or len(images))
    network = _inception(command, world)
    collectors = [Collector(network, count, keep=1) for _ in range(2)] if network else []
    chosen, shown = evenly_spaced(len(images), count), evenly_spaced(count, command.shown)
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    ratios, similarities = [], []
    with tqdm(total=count, unit="image", dynamic_ncols=True) as bar, torch.no_grad():
        for start in range(0, count, command.batch_size):
            part = chosen[start : start + command.batch_size]
            batch = [to_array(center_crop(images.read(int(i)), size)) for i in part]
            original = torch.from_numpy(np.stack(batch)).to(world.device)
            decoded = to_uint8(autoencoder.decode(autoencoder.encode(normalize(original))))
            ratios.append(psnr(original.cpu(), decoded.cpu()))
            similarities.append(ssim(original.cpu(), decoded.cpu()))
            for collector, pixels in zip(collectors, (original, decoded), strict=False):
                assert network is not None
                collector.add(arrays_of(network, pixels.cpu().numpy()))
            for i in shown[(shown >= start) & (shown < start + len(batch))] - start:
                pairs.append((original[i].cpu().numpy(), decoded[i].cpu().numpy()))
            bar.update(len(batch))
    figures = {
        "autoencoder": str(path),
        "data": str(command.data),
        "images": count,
        "image_size": size,
        "psnr": float(torch.cat(ratios).mean()),
        "ssim": float(torch.cat(similarities).mean()),
    }
    if network and count > 1:
        real, made = (collector.finish({}, None).statistics for collector in collectors)
        assert real is not None and made is not None
        figures |= {"rfid": frechet_distance(real, made), "inception_digest": network.digest}
    above, below = (np.stack(part) for part in zip(*pairs, strict=True))
    with atomic_write(command.output / "reconstruction.json") as temporary:
        temporary.write_text(json.dumps(figures, indent=1) + "\n")
    picture = command.output / "reconstruction.png"
    with atomic_write(picture) as temporary:
        sheet = image_grid(
            np.concatenate([above, below]), len(shown), ("original", "decoded"), scale=max(1, 96 // size)
        )
        sheet.save(temporary, format="PNG")
    rfid = f", rFID {figures['rfid']:.3f}" if "rfid" in figures else ""
    print(f"{count} images: PSNR {figures['psnr']:.2f} dB, SSIM {figures['ssim']:.3f}{rfid}: {picture}")


def _inception(command: Reconstruct, world: World) -> FeatureExtractor | None:
    """The Inception network, if it is wanted, or if nobody said that it is not and it is there."""
    from bitdance.metrics.inception import find_weights, load_inception

    if command.rfid is False:
        return None
    try:
        path = find_weights(command.inception_weights)
    except UserError:
        if command.rfid or command.inception_weights:
            raise
        return None
    return load_inception(path, world.device).feature_extractor()
