"""`.npz` files of images that are written as they come, so that 50,000 of them never lie in memory together."""

from __future__ import annotations

import os
import pathlib
import zipfile
from collections.abc import Iterable

import numpy as np

from bitdance.runtime.atomic_files import atomic_write


def write_npz(
    path: str | os.PathLike[str], batches: Iterable[np.ndarray], shape: tuple[int, ...], labels: np.ndarray
) -> None:
    """Writes `arr_0` (images or bits, in the order of the batches) and `arr_1` (labels), atomically.

    Args:
        batches: (B, H, W, 3) uint8 each, N images in all; or any other uint8 arrays of one shape an image.
        shape: (N, H, W, 3), or (N, ...).
        labels: (N,) int64.

    Raises:
        UserError: the file cannot be written.
        ValueError: the batches hold another number of images.
    """
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            written = 0
            for batch in batches:
                assert batch.dtype == np.uint8 and batch.shape[1:] == shape[1:], (batch.dtype, batch.shape)
                file.write(np.ascontiguousarray(batch).data)
                written += len(batch)
        if written != shape[0]:
            raise ValueError(f"{pathlib.Path(path)}: {written} images came where {shape[0]} were announced.")
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, labels.astype(np.int64))
