"""Decoding of image files, the same for every command."""

from __future__ import annotations

import io
import os
import pathlib
import stat

import numpy as np
from PIL import Image, UnidentifiedImageError

from bitdance.runtime.errors import UserError

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"})
MAX_FILE_BYTES = 1 << 28  # no photograph or CIFAR-10 batch is larger; a zip bomb is

# Pillow has decoders that are unsafe for untrusted files; that of EPS runs Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")


def is_image(name: str) -> bool:
    """Whether a file name has the extension of an image."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def read_image(path: pathlib.Path) -> Image.Image:
    """Reads an image file as `decode_image` does.

    Raises:
        UserError: the file cannot be read or decoded.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise UserError(f"cannot read the image {path}: it is not a regular file; remove it.")
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read the image {path}: {error.strerror or error}; check its permissions.") from error
    return decode_image(data, str(path))


def decode_image(data: bytes, where: str) -> Image.Image:
    """Decodes the bytes of an image file to 8-bit RGB.

    Grey, palette and CMYK images are converted, alpha is dropped, 16-bit grey is scaled to 8 bits. EXIF orientation is
    not applied, as in ADM and torchvision.

    Args:
        data: contents of the file, at most MAX_FILE_BYTES.
        where: name of the image for error messages.

    Raises:
        UserError: the bytes are not an image or are damaged, or the file or the image is too large.
    """
    try:
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return to_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"the image {where} has too many pixels to decode; remove it or scale it down.") from error
    except Exception as error:  # on damaged bytes Pillow raises SyntaxError, struct.error, KeyError and others
        why = "it is in no known image format" if isinstance(error, UnidentifiedImageError) else reason(error)
        raise UserError(f"cannot read the image {where}: {why}; repair or remove it.") from error


def reason(error: Exception) -> str:
    """Returns the first line of an error's message, or the type of an error without a message."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to 8-bit RGB, as `decode_image` does."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.mode.startswith("I"):  # 16-bit grey is "I;16" and its byte orders, "I" before Pillow 11
        grey = np.asarray(image).astype(np.int64)  # convert() would clip at 255
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("pixels of more than 16 bits have no defined range")
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")  # the same pixels without Pillow's warning
    return image.convert("RGB")
