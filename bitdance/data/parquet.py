"""Images in parquet files, as the Hugging Face hub has ImageNet (`data/train-00000-of-00294.parquet`, ...).

A row cannot be read without decompressing its row group up to it, which for ImageNet is about 100 images of 0.1 MB.
From 2,000 photographs of ImageNet in groups of 100 (snappy), one thread decodes 205 images/s in shuffled order and 690
in order; from a tar it decodes 800 in either order. For many epochs use class folders, a zip or a tar.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from bitdance.data.class_names import are_imagenet, imagenet
from bitdance.data.decoding import decode_image
from bitdance.data.image_dataset import ImageDataset
from bitdance.runtime.errors import UserError, first_line

_MAX_CLASSES = 1 << 16  # a model has a row of embeddings for each
_MAX_EXPANSION = 4  # of a file to more than _MAX_EXPANDED: encoded images hardly compress, zeros do
_MAX_EXPANDED = 1 << 26
_MAX_ROWS = 1 << 24  # of a file; a billion equal labels need some bytes


class ParquetImages(ImageDataset):
    """Rows of parquet files with the columns `image`, a struct with `bytes`, and `label`, an integer.

    Class names are those that the hub's library, datasets, wrote into the files. The names of ImageNet's classes,
    and 1000 classes without names, become ImageNet's WordNet ids; other classes without names are called by their
    numbers. Images are called `<class>/<file>/<row>`.

    Raises:
        UserError: pyarrow is not installed, or a file is damaged or has other columns.
    """

    def __init__(self, path: pathlib.Path) -> None:
        try:
            import pyarrow.parquet as pq
        except ImportError as error:
            raise UserError(f"{path} is parquet, which needs pyarrow: pip install 'bitdance[data]'.") from error
        self.path = path
        self._files = find_parquet(path)
        self._footers, labels, groups, sizes = [], [], [], []
        for number, file in enumerate(self._files):
            try:
                with pq.ParquetFile(file, memory_map=True) as opened:
                    groups_of_file = [opened.metadata.row_group(i) for i in range(opened.metadata.num_row_groups)]
                    expanded = sum(group.total_byte_size for group in groups_of_file)
                    if expanded > max(_MAX_EXPANSION * file.stat().st_size, _MAX_EXPANDED):
                        raise ValueError("it expands to far more bytes than it has")
                    labels.append(_read_labels(opened))
                    self._footers.append(opened.metadata)
                    schema = opened.schema_arrow
                rows = [group.num_rows for group in groups_of_file]
                if sum(rows) != len(labels[-1]):
                    raise ValueError(f"it has {len(labels[-1])} labels for {sum(rows)} rows")
                groups += [(number, group) for group in range(len(rows))]
                sizes += rows
            except Exception as error:  # pyarrow has its own exceptions, and raises others too on damaged files
                raise UserError(f"cannot read {file}: {first_line(error)}; download or make it again.") from error
        self.labels = np.concatenate(labels)
        if not len(self.labels):
            raise UserError(f"no images in {path}: its parquet files have no rows.")
        self.classes = _find_classes(schema, int(self.labels.max()) + 1, path)
        self.upright = self.classes != imagenet().wordnet_ids
        self._groups = groups
        self._starts = np.cumsum([0, *sizes])
        self._local = threading.local()

    @property
    def files(self) -> list[pathlib.Path]:
        return list(self._files)

    def name(self, index: int) -> str:
        number, _, _, row = self._find(index)
        return f"{self.classes[self.labels[index]]}/{self._files[number].stem}/{row:06d}"

    def read(self, index: int) -> Image.Image:
        number, group, row, row_of_file = self._find(index)
        where = f"in row {row_of_file} of {self._files[number]}"
        try:
            # Each thread continues in the row group that it read last.
            position, following, images = getattr(self._local, "cursor", None) or (None, 0, iter(()))
            if position != (number, group) or following > row:
                following, images = 0, self._read_group(number, group)
            self._local.cursor = None  # after an error the group is opened again
            data = next(itertools.islice(images, row - following, None)).as_py()
            self._local.cursor = (number, group), row + 1, images
            if data is None:
                raise ValueError("the row holds no bytes of an image")
        except Exception as error:  # see above
            raise UserError(f"cannot read the image {where}: {first_line(error)}; make the file again.") from error
        return decode_image(data, where, self.upright)

    def _find(self, index: int) -> tuple[int, int, int, int]:
        """Returns the numbers of an image's file and row group, and its rows in the group and in the file."""
        index = range(len(self))[index]
        i = int(np.searchsorted(self._starts, index, side="right")) - 1
        number, group = self._groups[i]
        return number, group, index - int(self._starts[i]), index - int(self._starts[i - group])

    def _read_group(self, number: int, group: int) -> Iterator[Any]:
        """Yields the encoded images of a row group as Arrow scalars, decompressed row by row."""
        import pyarrow.parquet as pq

        # With the footer, opening takes 0.05 ms.
        opened = pq.ParquetFile(self._files[number], metadata=self._footers[number], memory_map=True)
        for batch in opened.iter_batches(1, [group], ["image.bytes"], use_threads=False):
            yield from batch.column(0).field(0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_local": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _local=threading.local())


def find_parquet(path: pathlib.Path) -> list[pathlib.Path]:
    """Returns the parquet files of a path in their order; an empty list if it is something else.

    The path is a file, a pattern, or a folder, whose files are in it or else in its `data/`: `train*.parquet` if there
    are any, otherwise all.
    """
    if path.is_file():
        with open(path, "rb") as file:
            return [path] if file.read(4) == b"PAR1" else []
    if path.is_dir():
        for folder in (path, path / "data"):
            files = sorted(file for file in folder.glob("*.parquet") if file.is_file() and file.name[0] != ".")
            if files:
                return [file for file in files if file.name.startswith("train")] or files
        return []
    return sorted(path.parent.glob(path.name)) if path.match("*[*?]*.parquet") else []


def _read_labels(file: Any) -> np.ndarray:
    """Checks the columns of an opened file and reads its labels, (N,) int64."""
    import pyarrow as pa

    if file.metadata.num_rows > _MAX_ROWS:
        raise ValueError(f"it has more than {_MAX_ROWS} rows")
    types = dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True))
    image, label = types.get("image"), types.get("label", pa.null())
    fields = {field.name: field.type for field in image} if isinstance(image, pa.StructType) else {}
    if fields.get("bytes") not in (pa.binary(), pa.large_binary()) or not pa.types.is_integer(label):
        raise ValueError(
            f"it has the columns {', '.join(types)[:200] or 'none'}, where an 'image' with 'bytes' and an integer "
            "'label' are expected"
        )
    column = file.read(columns=["label"], use_threads=False).column(0)
    if column.null_count:
        raise ValueError(f"row {column.to_pylist().index(None)} has no label")
    labels: np.ndarray = column.to_numpy()
    if len(labels) and not 0 <= labels.min() <= labels.max() < _MAX_CLASSES:
        raise ValueError(f"labels from {labels.min()} to {labels.max()}, where 0 to {_MAX_CLASSES - 1} are expected")
    return labels.astype(np.int64)


def _find_classes(schema: Any, count: int, path: pathlib.Path) -> tuple[str, ...]:
    """Returns the names of all classes, of which `count` have labels."""
    wordnet_ids = imagenet().wordnet_ids
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
        if not all(isinstance(name, str) for name in names):
            raise TypeError
        "".join(names).encode()  # raises for halves of surrogate pairs, which JSON can name
    except (KeyError, TypeError, ValueError, RecursionError):  # other programs write none
        return wordnet_ids if count == len(wordnet_ids) else tuple(map(str, range(count)))
    if len(names) < count:
        raise UserError(f"{path} names {len(names)} classes and has a label {count - 1}; download or make it again.")
    return wordnet_ids if are_imagenet(names) else tuple(names)
