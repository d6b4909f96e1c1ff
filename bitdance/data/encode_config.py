"""Settings of encoding; without the writer's imports, so that the command line can show them at once."""

from __future__ import annotations

import dataclasses

from bitdance.config import MAX_COUNT
from bitdance.runtime.errors import check_fields, check_seed
from bitdance.runtime.run_folder import FREE


@dataclasses.dataclass(frozen=True)
class EncodeConfig:
    """Settings of an encoding job.

    Attributes:
        image_size: side of the crops in pixels.
        crops: views per image: the centre crop, then random crops as in ADM.
        flips: also store each view mirrored.
        seed: of the random crops.
        batch_size: views encoded at once.
        shard_size: images per file, the least that is encoded again after an interruption.
        num_workers: threads that read images.
        max_bad_images: unreadable images that are tolerated, named and skipped; by default a tenth of your own
            pictures, at least 10, and 100 of ImageNet.
    """

    image_size: int = 256
    crops: int = 1
    flips: bool = True
    seed: int = 0
    batch_size: int = 32
    shard_size: int = 512
    num_workers: int = dataclasses.field(default=16, metadata=FREE)
    max_bad_images: int | None = dataclasses.field(default=None, metadata=FREE)

    def __post_init__(self) -> None:
        counts = "image_size crops batch_size shard_size num_workers"
        check_fields(self, counts, lambda value: 1 <= value <= MAX_COUNT, f"be from 1 to {MAX_COUNT}")
        check_fields(self, "max_bad_images", lambda value: value >= 0, "be at least 0")
        check_seed(self.seed)
