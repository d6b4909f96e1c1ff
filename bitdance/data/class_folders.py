"""Which files of a folder or an archive are images, and the class of each."""

from __future__ import annotations

import collections
import os
import pathlib
import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from bitdance.data.class_names import imagenet
from bitdance.data.decoding import HEIF_ADVICE, is_heif, is_image
from bitdance.runtime.errors import UserError, counted, printable

LABELS_FILE = "labels.json"
"""In a folder of image files: their labels, in the order of the file names."""

RECORD, GRID = "samples.json", "grid.png"
"""In a folder of samples: the record of the images, and all of them as one."""

TRAIN, HELD_OUT = "train", ("val", "valid", "validation", "test")
"""Names, in any case, of the folders of training images and of held-out images beside them."""

_COMPANIONS = frozenset({LABELS_FILE, RECORD, "thumbs.db", "desktop.ini"})
_PUBLISHED = re.compile(r"n\d{8}_|ILSVRC2012_")  # how the names of ImageNet's files begin
_EXPECTED = "images are expected in one folder per class, as in {}/<class>/<image>.jpg"
_SHOWN = 3

MAX_DEPTH = 64
"""Folders within one another."""


class FoundImages(NamedTuple):
    """The images of a folder or an archive, see `find_images`.

    Attributes:
        prefix: the folder that all of them are in, with a trailing "/", or "".
        names: their names relative to it, sorted by class and then by name.
        notes: what else is there, in words, such as "2 files ignored (...)", or "".
        held_out: the folder of held-out images, or "".
    """

    prefix: str
    names: list[str]
    notes: str
    held_out: str


def find_images(path: pathlib.Path, members: Collection[str]) -> FoundImages:
    """Finds the images among the files of a folder or an archive, and the folder that their classes are in.

    Folders that hold everything are stripped, as is `train/` if there are only folders of held-out images beside it.
    Pictures beside the class folders are ignored, unless they are the majority.

    Args:
        path: for error messages.
        members: names of files of any type, and of folders with a trailing "/".

    Raises:
        UserError: there are no images, a class folder is without images, or it is unclear which folders are classes.
    """
    companions = {*_COMPANIONS, GRID} if RECORD in members else _COMPANIONS
    members = [name for name in members if not is_hidden(name) and os.path.basename(name).lower() not in companions]
    images = [name for name in members if is_image(name)]
    if not images:
        raise UserError(f"no images in {path}{_but_heif(members)}: {_EXPECTED.format(path)}, as JPEG, PNG or the like.")
    if any(name.count("/") > MAX_DEPTH for name in images):
        raise UserError(f"{path} holds images more than {MAX_DEPTH} folders deep: {_EXPECTED.format(path)}.")
    prefix, held_out, beside = "", "", list[str]()
    while inside := [name for name in images if "/" in name[len(prefix) :]]:
        if len(inside) < len(images):
            beside += sorted(set(images).difference(inside))
        images = inside
        tops = {name[len(prefix) :].split("/", 1)[0] for name in images}
        if others := _held_out_folders(tops):
            held_out = prefix + others[0]
            tops.difference_update(others)
            apart = tuple(f"{prefix}{other}/" for other in others)
            images, members = ([name for name in group if not name.startswith(apart)] for group in (images, members))
        (top, *more) = tops
        is_class = all(name.count("/", len(prefix)) == 1 for name in images) and top.lower() != TRAIN
        if more or is_class or top in imagenet().wordnet_ids:
            break
        prefix += f"{top}/"
    if len(beside) > len(images):
        raise UserError(
            f"{path} holds {counted(len(beside), 'picture')} such as {printable(beside[0])} beside folders with "
            f"{len(images)}: move them into class folders, or the folders elsewhere."
        )
    names = sorted((name[len(prefix) :] for name in images), key=lambda name: name.split("/"))
    level = class_level(path, names)
    if level is not None:
        _refuse_empty(path, [member[len(prefix) :] for member in members if member.startswith(prefix)], names, level)
    notes = _describe_ignored(members, beside)
    if held_out:
        notes.insert(0, f"{held_out.rpartition('/')[2]}/ held out")
    return FoundImages(prefix, names, "; ".join(notes), held_out)


def _held_out_folders(folders: Collection[str]) -> list[str]:
    """Returns the folders of held-out images, in the order of `HELD_OUT`; none unless the only other one is `TRAIN`."""
    splits = {folder.lower(): folder for folder in folders}
    held_out = [splits[name] for name in HELD_OUT if name in splits]
    return held_out if TRAIN in splits and len(folders) == 1 + len(held_out) else []


def class_level(path: pathlib.Path, names: Collection[str]) -> int | None:
    """Returns which part of the names is the class: the last folder that is not the same for all images.

    Of folders named by WordNet ids, which may have any subfolders, it is the first one.

    Args:
        path: for error messages.
        names: of images, from `find_images`.

    Returns:
        The index of the part, None if the images are in no folder.

    Raises:
        UserError: images are at different depths, or two class folders have one name.
    """
    folders = collections.Counter(name.rpartition("/")[0] for name in names)
    parts = [folder.split("/") for folder in folders]
    if set(folders) == {""}:
        return None
    if {first for first, *_ in parts} <= set(imagenet().wordnet_ids):
        return 0
    first_of = {len(folder): "/".join(folder) for folder in sorted(parts, reverse=True)}
    if len(first_of) > 1:
        numbers = collections.Counter(name.count("/") for name in names)
        found = ", ".join(
            f"{numbers[depth]} in folders such as {printable(first_of[depth])}" for depth in sorted(first_of)
        )
        raise UserError(
            f"{path} holds images at different depths, so it is unclear which folders are classes ({found}): put the "
            "images of each class into one folder, all of them at the same depth."
        )
    level = max(
        (i for i, level in enumerate(zip(*parts, strict=True)) if len(set(level)) > 1), default=len(parts[0]) - 1
    )
    owner: dict[str, str] = {}
    for folder in parts:
        whole = "/".join(folder[: level + 1])
        if (other := owner.setdefault(folder[level], whole)) != whole:
            raise UserError(
                f"{path} holds two class folders of one name, {printable(other)} and {printable(whole)}: merge them, "
                "or give them different names."
            )
    return level


def is_published(names: Iterable[str]) -> bool:
    """Whether images outside of class folders have the names of ImageNet's files."""
    return all(_PUBLISHED.match(name) for name in names)


def name_of(path: pathlib.Path) -> str:
    """Returns the class of images without class folders: the name of their folder or archive."""
    folder = path.resolve()
    return folder.stem if path.is_file() else (folder.parent if folder.name.lower() == TRAIN else folder).name


def is_hidden(name: str) -> bool:
    """Whether a part of the name starts with a dot (but is not `.`) or is the folder that macOS adds to zip files."""
    return any((part.startswith(".") and part != ".") or part == "__MACOSX" for part in name.split("/"))


def _but_heif(members: Iterable[str]) -> str:
    number = sum(map(is_heif, members))
    return f" but {counted(number, 'HEIC file')} ({HEIF_ADVICE})" if number else ""


def _refuse_empty(path: pathlib.Path, members: list[str], names: list[str], level: int) -> None:
    """Refuses a class folder without images: skipping it would number the next classes unlike in a complete copy."""
    every, filled = (
        {tuple(folder.split("/")[: level + 1]) for folder in {name.rpartition("/")[0] for name in group} - {""}}
        for group in (members, names)
    )
    known = {folder[: i + 1] for folder in filled for i in range(len(folder))}
    if empty := sorted(every - known):
        folder = "/".join(empty[0])
        but = _but_heif(member for member in members if member.startswith(f"{folder}/"))
        raise UserError(f"the class folder {printable(folder)!r} in {path} holds no images{but}; fill it or remove it.")


def _describe_ignored(members: Iterable[str], beside: list[str]) -> list[str]:
    others = [name for name in members if name and not name.endswith("/") and not is_image(name)]
    heif = sum(map(is_heif, others))
    kinds = []
    if heif:
        kinds.append(f"{heif} HEIC")
    if number := len(others) - heif:
        endings = sorted({pathlib.PurePosixPath(name).suffix.lower() for name in others if not is_heif(name)} - {""})
        listed = ", ".join(map(printable, endings[:_SHOWN])) + ", ..." * (len(endings) > _SHOWN)
        kinds.append(("1 not an image" if number == 1 else f"{number} not images") + (f": {listed}" if listed else ""))
    if beside:
        listed = ", ".join(map(printable, beside[:_SHOWN])) + ", ..." * (len(beside) > _SHOWN)
        kinds.append(f"{counted(len(beside), 'picture')} beside the class folders: {listed}")
    if not kinds:
        return []
    if kinds == [f"{heif} HEIC"]:
        return [f"{counted(heif, 'HEIC file')} ignored: {HEIF_ADVICE}"]
    ignored = f"{counted(len(others) + len(beside), 'file')} ignored ({'; '.join(kinds)})"
    return [ignored, f"HEIC: {HEIF_ADVICE}"] if heif else [ignored]
