"""Decoding of image files, the same for every command."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
import pathlib
import stat
import threading
import warnings
import zipfile
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from bitdance.runtime.errors import UserError, first_line

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"})
HEIF_EXTENSIONS = frozenset({".heic", ".heif"})
HEIF_ADVICE = "pip install 'bitdance[heic]' reads them"
MAX_FILE_BYTES = 1 << 28  # no photograph or CIFAR-10 batch is larger; a zip bomb is

MAX_PIXELS = 64_000_000  # of large cameras; those of WebP count twice, since its decoder takes 16 bytes for each
MAX_RATIO = 100  # of the sides: a crop of an image of 1 x 5000 pixels would scale it to gigabytes
MAX_SCANS = 100  # of a JPEG, which has about ten; each is decoded over the whole image
MAX_EXPANSION = 32  # of a zip to more than MAX_FILE_BYTES; arrays of pixels expand to a few times their size

# Above 32 MB malloc returns freed memory to the system. In Pillow's blocks of 16 MB, every reader would keep an image.
Image.core.set_block_size(1 << 26)

_turn, _local = threading.Condition(), threading.local()
_pixels_in_memory = 0

# Pillow warns of large images and odd tags, besides the errors, which name the image.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Pillow has decoders that are unsafe for untrusted files; that of EPS runs Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
_HEIF_BRANDS = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypheim", b"ftypheis", b"ftypmif1", b"ftypmsf1")

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def is_image(name: str) -> bool:
    """Whether a file name has the extension of an image that can be read: of HEIC only with pillow-heif."""
    extension = os.path.splitext(name)[1].lower()
    return extension in EXTENSIONS or (extension in HEIF_EXTENSIONS and reads_heif())


def is_heif(name: str) -> bool:
    """Whether a file name has the extension of a HEIC image."""
    return os.path.splitext(name)[1].lower() in HEIF_EXTENSIONS


@functools.cache
def reads_heif() -> bool:
    """Whether pillow-heif is installed."""
    return importlib.util.find_spec("pillow_heif") is not None


@functools.cache
def _register_heif() -> None:
    if not reads_heif():
        raise ValueError(f"it is a HEIC file ({HEIF_ADVICE})")
    import pillow_heif

    pillow_heif.register_heif_opener()


def read_image(path: pathlib.Path, upright: bool = False) -> Image.Image:
    """Reads an image file as `decode_image` does.

    Raises:
        UserError: the file cannot be read or decoded.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise UserError(f"cannot read the image {path}: it is a folder; name an image in it.")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
            raise UserError(f"cannot read the image {path}: it is not a regular file; remove it.")
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(
            f"cannot read the image {path}: {error.strerror or error}; check the path and its permissions."
        ) from error
    return decode_image(data, str(path), upright)


def decode_image(data: bytes, where: str, upright: bool = False) -> Image.Image:
    """Decodes the bytes of an image file to 8-bit RGB.

    Grey, palette and CMYK images are converted, 16-bit grey is scaled to 8 bits.

    Args:
        data: contents of the file, at most MAX_FILE_BYTES.
        where: name of the image for error messages.
        upright: turn the image as its EXIF orientation says, and lay transparency on white. Otherwise neither is done
            and alpha is dropped, as in ADM and torchvision.

    Raises:
        UserError: the bytes are not an image or are damaged, or the file or the image is too large.
    """
    try:
        if not data:
            raise ValueError("it is empty")
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
        is_heic = data[4:12] in _HEIF_BRANDS  # some programs call it .jpg
        if is_heic:
            _register_heif()
        with Image.open(io.BytesIO(data), formats=("HEIF",) if is_heic else _FORMATS) as image:
            pixels = image.width * image.height * (2 if image.format == "WEBP" else 1)
            if pixels > MAX_PIXELS:
                raise Image.DecompressionBombError
            if max(image.size) > MAX_RATIO * min(image.size):
                raise ValueError(
                    f"one side of its {image.width} x {image.height} pixels is over {MAX_RATIO} times the other"
                )
            if image.format == "JPEG" and data.count(b"\xff\xda") > MAX_SCANS:
                raise ValueError("it has too many scans")
            _take_turn(pixels)
            return _turn_upright(image, to_rgb(image, on_white=True)) if upright else to_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        most = f"at most {MAX_PIXELS // 10**6} million, WebP {MAX_PIXELS // 2 // 10**6} million"
        raise UserError(
            f"the image {where} has too many pixels to decode ({most}); remove it or scale it down."
        ) from error
    except MemoryError:  # says nothing about the image
        raise
    except Exception as error:  # on damaged bytes Pillow raises SyntaxError, struct.error, KeyError and others
        why = "it is in no known image format" if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise UserError(f"cannot read the image {where}: {why}; repair or remove it.") from error


@contextlib.contextmanager
def one_image() -> Iterator[None]:
    """Context in which a thread decodes an image and crops it.

    The images in such contexts of all threads have at most `MAX_PIXELS` together, or else there is a single one: with
    8 to 16 bytes a pixel, the readers of a set of huge images would need many gigabytes.
    """
    _local.pixels = 0
    try:
        yield
    finally:
        _take_turn(0)
        del _local.pixels


def _take_turn(pixels: int) -> None:
    """Waits until an image of this size fits; it replaces the one that this thread had in its context."""
    global _pixels_in_memory
    if (earlier := getattr(_local, "pixels", None)) is None:
        return
    with _turn:
        _pixels_in_memory -= earlier
        _turn.notify_all()
        _turn.wait_for(lambda: _pixels_in_memory == 0 or _pixels_in_memory + pixels <= MAX_PIXELS)
        _pixels_in_memory += pixels
    _local.pixels = pixels


def check_zip(archive: zipfile.ZipFile) -> None:
    """Checks how a zip is compressed, before anything in it is expanded.

    Raises:
        UserError: it is not stored or deflated, or says that it expands to too many bytes. More are never read.
    """
    members = archive.infolist()
    if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
        raise UserError(f"{archive.filename} is compressed by another method than deflate: make it again with that.")
    size = os.fstat(archive.fp.fileno()).st_size  # type: ignore[union-attr]  # (it is open)
    if sum(member.file_size for member in members) > max(MAX_EXPANSION * size, MAX_FILE_BYTES):
        raise UserError(f"{archive.filename} expands to far more bytes than it has: make it again without compression.")


def _turn_upright(image: Image.Image, rgb: Image.Image) -> Image.Image:
    """Turns the pixels of an image as its EXIF orientation says."""
    if image.format == "TIFF":  # Pillow does it
        return rgb
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data raise almost any type; the pixels are good
        return rgb
    return rgb if turn is None else rgb.transpose(turn)


def to_rgb(image: Image.Image, on_white: bool = False) -> Image.Image:
    """Converts an image of any mode to 8-bit RGB; alpha is dropped, or the image laid on white."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.mode.startswith("I"):  # 16-bit grey is "I;16" and its byte orders, "I" before Pillow 11
        grey = np.asarray(image)  # convert() would clip at 255
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("pixels of more than 16 bits have no defined range")
        bands = [((band.astype(np.int32) + 128) // 257).astype(np.uint8) for band in np.array_split(grey, 64)]
        return Image.fromarray(np.concatenate(bands)).convert("RGB")
    if on_white and image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(rgba, mask=rgba)
        return white
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")  # the same pixels without Pillow's warning
    return image.convert("RGB")
