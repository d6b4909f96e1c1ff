"""Images in parquet files, as the Hugging Face hub has ImageNet (`data/train-00000-of-00294.parquet`, ...).

A row cannot be read without decompressing its row group up to it, which for ImageNet is about 100 images of 0.1 MB.
From 2,000 photographs of ImageNet in groups of 100 (snappy), one thread decodes 205 images/s in shuffled order and 690
in order; from a tar it decodes 800 in either order. For many epochs use class folders, a zip or a tar.
"""

from __future__ import annotations

import json
import pathlib
import threading
from typing import Any

import numpy as np
from PIL import Image

from bitdance.data.class_names import are_imagenet, imagenet
from bitdance.data.decoding import decode_image, reason
from bitdance.data.image_dataset import ImageDataset
from bitdance.runtime.errors import UserError

_BATCH = 16  # rows that are decompressed at once
_MAX_CLASSES = 1 << 20


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
        self._footers, labels, groups, names = [], [], [], None
        for number, file in enumerate(self._files):
            try:
                with pq.ParquetFile(file, memory_map=True) as opened:
                    _check_columns(opened.schema_arrow)
                    labels.append(_read_labels(opened))
                    self._footers.append(opened.metadata)
                    names = _class_names(opened.schema_arrow) if names is None else names
                sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.metadata.num_row_groups)]
                if sum(sizes) != len(labels[-1]):
                    raise ValueError(f"it has {len(labels[-1])} labels for {sum(sizes)} rows")
                groups += [(number, group, size) for group, size in enumerate(sizes)]
            except Exception as error:  # pyarrow has its own exceptions, and raises others too on damaged files
                raise UserError(f"cannot read {file}: {reason(error)}; download or make it again.") from error
        self.labels = np.concatenate(labels)
        if not len(self.labels):
            raise UserError(f"no images in {path}: its parquet files have no rows.")
        self.classes = _classes(names, int(self.labels.max()) + 1, path)
        table = np.array(groups, dtype=np.int64)
        self._groups, self._ends = table[:, :2], np.cumsum(table[:, 2])
        self._reader = threading.local()

    def name(self, index: int) -> str:
        index = range(len(self))[index]
        number, _, _, row = self._find(index)
        return f"{self.classes[self.labels[index]]}/{self._files[number].stem}/{row:06d}"

    def read(self, index: int) -> Image.Image:
        number, group, row, row_of_file = self._find(range(len(self))[index])
        where = f"in row {row_of_file} of {self._files[number]}"
        reader = getattr(self._reader, "group", None)  # each thread continues in the row group that it read last
        try:
            if reader is None or reader.position != (number, group) or reader.first > row:
                reader = _GroupReader(self._files[number], self._footers[number], (number, group))
            self._reader.group = None  # after an error the group is opened again
            data = reader.read(row)
            self._reader.group = reader
            if data is None:
                raise ValueError("the row holds no bytes of an image")
        except Exception as error:  # see above
            raise UserError(f"cannot read the image {where}: {reason(error)}; make the file again.") from error
        return decode_image(data, where)

    def _find(self, index: int) -> tuple[int, int, int, int]:
        """Returns the numbers of an image's file and row group, and its rows in the group and in the file."""
        i = int(np.searchsorted(self._ends, index, side="right"))
        number, group = map(int, self._groups[i])
        first, first_of_file = (int(self._ends[j - 1]) if j else 0 for j in (i, i - group))
        return number, group, index - first, index - first_of_file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _reader=threading.local())


class _GroupReader:
    """Reads the encoded images of one row group forward, a few rows at a time.

    Attributes:
        position: the numbers of the file and the group.
        first: the first row that can still be read.
    """

    def __init__(self, file: pathlib.Path, footer: Any, position: tuple[int, int]) -> None:
        import pyarrow.parquet as pq

        self.position, self.first = position, 0
        self._batch: Any = ()  # an Arrow array
        opened = pq.ParquetFile(file, metadata=footer, memory_map=True)  # 0.05 ms with the footer
        self._batches = opened.iter_batches(_BATCH, [position[1]], ["image.bytes"], use_threads=False)

    def read(self, row: int) -> bytes | None:
        while row >= self.first + len(self._batch):
            self.first += len(self._batch)
            self._batch = next(self._batches).column(0).field(0)
        return self._batch[row - self.first].as_py()


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


def _check_columns(schema: Any) -> None:
    import pyarrow as pa

    types = dict(zip(schema.names, schema.types, strict=True))
    image, label = types.get("image"), types.get("label", pa.null())
    fields = {field.name: field.type for field in image} if isinstance(image, pa.StructType) else {}
    if fields.get("bytes") not in (pa.binary(), pa.large_binary()) or not pa.types.is_integer(label):
        raise ValueError(
            f"it has the columns {', '.join(types)[:200] or 'none'}, where an 'image' with 'bytes' and an integer "
            "'label' are expected"
        )


def _read_labels(file: Any) -> np.ndarray:
    """Reads the labels of an opened file, (N,) int64."""
    column = file.read(columns=["label"], use_threads=False).column(0)
    if column.null_count:
        raise ValueError(f"row {column.to_pylist().index(None)} has no label")
    labels: np.ndarray = column.to_numpy()
    if len(labels) and not 0 <= labels.min() <= labels.max() < _MAX_CLASSES:
        raise ValueError(f"labels from {labels.min()} to {labels.max()}, where 0 or more are expected")
    return labels.astype(np.int64)


def _class_names(schema: Any) -> list[str] | None:
    """Returns the names of the labels that the hub's library wrote into a schema."""
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _classes(names: list[str] | None, count: int, path: pathlib.Path) -> tuple[str, ...]:
    """Returns the names of all classes, of which `count` have labels."""
    if names is not None and len(names) < count:
        raise UserError(f"{path} names {len(names)} classes and has a label {count - 1}; download or make it again.")
    wordnet_ids = imagenet().wordnet_ids or ()
    if are_imagenet(names) if names is not None else count == len(wordnet_ids):
        return wordnet_ids
    return tuple(names) if names is not None else tuple(map(str, range(count)))
