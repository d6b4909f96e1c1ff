"""Images in parquet files, as the Hugging Face hub has ImageNet (`data/train-00000-of-00294.parquet`, ...).

A parquet file is made to be read from its beginning to its end. A row cannot be reached without unpacking the row
group up to it, which for ImageNet is some 100 images of 0.1 MB: from 2,000 of its photographs in groups of 100
(snappy), one thread decodes 205 images/s in shuffled order and 690 in order, against 800 from a tar in either order.
To train for many epochs, class folders, a zip or a tar are better.
"""

from __future__ import annotations

import json
import pathlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from bitdance.data.class_names import are_imagenet, imagenet
from bitdance.data.image_dataset import MAX_FILE_BYTES, ImageDataset, decode_image
from bitdance.runtime.errors import UserError

_ROWS_AT_ONCE = 16  # fewer cost calls, more cost bytes that nobody asked for
_MAX_CLASSES = 1 << 20


class ParquetImages(ImageDataset):
    """Rows of parquet files with the columns `image`, a struct with `bytes`, and `label`, an integer.

    Class names are those that the hub's library wrote into the file; those of ImageNet, and 1000 nameless classes,
    become its WordNet ids, as in every other format; other nameless classes are called by their numbers. Images are
    called `<class>/<file>/<row>`.
    """

    def __init__(self, path: pathlib.Path) -> None:
        try:
            import pyarrow.parquet as pq
        except ImportError as error:
            raise UserError(f"{path} is parquet, which needs pyarrow: pip install 'bitdance[data]'.") from error
        self.path = path
        self._files = find_parquet(path)
        self._footers = []
        labels, groups, names = [], [], None
        for number, file in enumerate(self._files):
            try:
                with pq.ParquetFile(file, memory_map=True) as opened:
                    _check_columns(opened.schema_arrow)
                    names = _class_names(opened.schema_arrow) if names is None else names
                    column = opened.read(columns=["label"], use_threads=False).column(0)
                    labels.append(_labels(column.to_pylist() if column.null_count else column.to_numpy()))
                    self._footers.append(opened.metadata)
                sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.metadata.num_row_groups)]
                if sum(sizes) != len(labels[-1]):
                    raise ValueError(f"it has {len(labels[-1])} labels for {sum(sizes)} rows")
                groups += [(number, group, size) for group, size in enumerate(sizes)]
            except Exception as error:  # pyarrow has its own exceptions, and raises others too on damaged files
                raise UserError(f"cannot read {file}: {_reason(error)}; download or make it again.") from error
        self.labels = np.concatenate(labels)
        if not len(self.labels):
            raise UserError(f"no images in {path}: its parquet files have no rows.")
        self.classes = _classes(names, int(self.labels.max()) + 1, path)
        table = np.array(groups, dtype=np.int64)
        self._groups, self._ends = table[:, :2], np.cumsum(table[:, 2])
        self._reading = threading.local()

    def name(self, index: int) -> str:
        index = range(len(self))[index]
        number, _, _, row = self._find(index)
        return f"{self.classes[self.labels[index]]}/{self._files[number].stem}/{row:06d}"

    def read(self, index: int) -> Image.Image:
        index = range(len(self))[index]
        number, group, row, row_of_file = self._find(index)
        where = f"in row {row_of_file} of {self._files[number]}"
        try:
            data = self._bytes(number, group, row)
            if data is None:
                raise ValueError("the row holds no bytes of an image")
            if len(data) > MAX_FILE_BYTES:
                raise ValueError(f"it has {len(data)} bytes")
        except Exception as error:  # as above
            self._reading.rows = None  # it stopped somewhere: start anew
            raise UserError(f"cannot read the image {where}: {_reason(error)}; make the file again.") from error
        return decode_image(data, where)

    def _find(self, index: int) -> tuple[int, int, int, int]:
        """The number of an image's file, the row group in it, and the row in the group and in the file."""
        place = int(np.searchsorted(self._ends, index, side="right"))
        number, group = map(int, self._groups[place])
        first, first_of_file = (int(self._ends[i - 1]) if i else 0 for i in (place, place - group))
        return number, group, index - first, index - first_of_file

    def _bytes(self, number: int, group: int, row: int) -> bytes | None:
        """The encoded image in a row of a row group.

        Each thread keeps its place in the row group that it read last: the rows behind it cost no more than in reading
        from beginning to end.
        """
        rows = getattr(self._reading, "rows", None)
        if rows is None or rows.place != (number, group) or rows.first > row:
            rows = self._reading.rows = _Rows(self._files[number], self._footers[number], (number, group))
        return rows.read(row)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reading": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _reading=threading.local())


class _Rows:
    """The encoded images of one row group, read onward, a few rows at a time.

    Attributes:
        place: the numbers of the file and the group.
        first: the first row that can still be read.
    """

    def __init__(self, file: pathlib.Path, footer: Any, place: tuple[int, int]) -> None:
        import pyarrow.parquet as pq

        self.place, self.first = place, 0
        self._part: Any = ()  # an Arrow array
        # Opening costs a twentieth of a millisecond since the footer is known; it leaves no file open afterwards.
        opened = pq.ParquetFile(file, metadata=footer, memory_map=True)
        self._parts = opened.iter_batches(_ROWS_AT_ONCE, [place[1]], ["image.bytes"], use_threads=False)

    def read(self, row: int) -> bytes | None:
        while row >= self.first + len(self._part):
            self.first += len(self._part)
            self._part = next(self._parts).column(0).field(0)
        return self._part[row - self.first].as_py()


def find_parquet(path: pathlib.Path) -> list[pathlib.Path]:
    """The parquet files that a path means, in their order; none where it means something else.

    A file; or those matching a pattern; or those in a folder, or else in its `data/`: `train*.parquet` where there are
    such, or else all.
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
    image, label = types.get("image"), types.get("label")
    fields = {image.field(i).name: image.field(i).type for i in range(image.num_fields)} if image is not None else {}
    is_binary = fields.get("bytes") in (pa.binary(), pa.large_binary())
    if not is_binary or label is None or not pa.types.is_integer(label):
        raise ValueError(
            f"it has the columns {', '.join(types)[:200] or 'none'}, where an 'image' with 'bytes' and an integer "
            "'label' are expected"
        )


def _labels(values: Sequence[int | None] | np.ndarray) -> np.ndarray:
    """Checked labels, (N,) int64."""
    if not isinstance(values, np.ndarray):
        raise ValueError(f"row {list(values).index(None)} has no label")
    if len(values) and not 0 <= values.min() <= values.max() < _MAX_CLASSES:
        raise ValueError(f"labels from {values.min()} to {values.max()}, where 0 or more are expected")
    return values.astype(np.int64)


def _class_names(schema: Any) -> list[str] | None:
    """The names of the labels that the hub's library, datasets, wrote into a schema."""
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _classes(names: list[str] | None, count: int, path: pathlib.Path) -> tuple[str, ...]:
    """The names of all classes, of which `count` have labels."""
    if names is not None and len(names) < count:
        raise UserError(f"{path} names {len(names)} classes and has a label {count - 1}; download or make it again.")
    if are_imagenet(names) if names is not None else count == len(imagenet()):
        wordnet_ids = imagenet().wordnet_ids
        assert wordnet_ids is not None
        return wordnet_ids
    return tuple(names) if names is not None else tuple(map(str, range(count)))


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
