"""Names of a model's classes: looks up a class by id, name or WordNet id, and the name of a class."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import re
import unicodedata
from collections.abc import Sequence

from bitdance.runtime.errors import UserError

MAX_LISTED = 10
"""Classes of which the message about an unknown name lists all."""


def _key(name: str) -> str:
    """Normalizes a name: case, spaces, underscores, dashes, quotes and the Unicode form make no difference."""
    name = unicodedata.normalize("NFKC", name).casefold().replace("\u2019", "'")
    return re.sub(r"[\s_\-\u2010-\u2015]+", " ", name).strip()


def _shorten(query: object) -> str:
    return repr(query[:59] + "…" if isinstance(query, str) and len(query) > 60 else query)


@dataclasses.dataclass(frozen=True, repr=False)
class ClassNames:
    """The names of a model's classes, in the order of their ids.

    Attributes:
        names: the names of each class, at least one; the first is its label.
        wordnet_ids: the WordNet id of each class ("n02099601"); empty if the classes are not WordNet's.
        definitions: a short definition of each class, which distinguishes classes with the same name; or empty.
    """

    names: tuple[tuple[str, ...], ...]
    wordnet_ids: tuple[str, ...] = ()
    definitions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.names:
            raise UserError("a model needs at least one class, and this one has none.")

    @classmethod
    def from_labels(cls, labels: Sequence[str]) -> ClassNames:
        """Makes names from one label per class, such as folder names; WordNet ids of ImageNet get ImageNet's names."""
        known = imagenet()
        ids = {wordnet_id: i for i, wordnet_id in enumerate(known.wordnet_ids)}
        if labels and ids.keys() >= set(labels):
            rows = [ids[label] for label in labels]
            return cls(tuple(known.names[i] for i in rows), tuple(labels), tuple(known.definitions[i] for i in rows))
        return cls(tuple((label,) for label in labels))

    def __repr__(self) -> str:
        return f"ClassNames({len(self)}: {', '.join(names[0] for names in self.names[:5])}{', ...' * (len(self) > 5)})"

    def __len__(self) -> int:
        return len(self.names)

    def label(self, index: int) -> str:
        """Returns the first name of class `index`.

        Raises:
            UserError: `index` is out of range.
        """
        return self.names[self._checked(index)][0]

    def find(self, query: str | int) -> int:
        """Looks up a class by its id (0 to the number of classes - 1), a name or its WordNet id.

        In names, case does not matter, and spaces, "_" and "-" are the same. All names of a class, joined by ", ", are
        a name too. Digits are always an id, even if a label is a number.

        Raises:
            UserError: no class matches, or more than one; the message lists similar names or all matching classes.
        """
        if isinstance(query, str) and re.fullmatch(r"-?[0-9]{1,20}", query.strip()):
            query = int(query.strip())  # which strips more than int() does
        if not isinstance(query, str | bool):
            with contextlib.suppress(TypeError):  # no integer
                return self._checked(operator.index(query))
        key = _key(query) if isinstance(query, str) else ""
        if not key:
            raise UserError(f"{_shorten(query)} is not a class: give an id, a name or a WordNet id.")
        classes = self._index.get(key, [])
        if len(classes) > 1:
            listed = "; ".join(self._distinguish(i, key) for i in classes)
            raise UserError(f"{_shorten(query)} means {len(classes)} classes, give the id of one: {listed}.")
        if not classes:
            if near := self._nearest(key):
                advice = f"did you mean {', '.join(near)}?"
            elif len(self) <= MAX_LISTED:
                advice = f"give one of {', '.join(f'{self.label(i)} ({i})' for i in range(len(self)))}."
            else:
                advice = f"give a name or an id, 0 to {len(self) - 1}."
            raise UserError(f"there is no class {_shorten(query)}: {advice}")
        return classes[0]

    def find_name(self, name: str) -> int | None:
        """Returns the class of a name, as in `find`, or of a WordNet id; None if there is none, or more than one."""
        classes = self._index.get(_key(name), [])
        return classes[0] if len(classes) == 1 else None

    def find_all(self, queries: Sequence[str | int]) -> list[int]:
        """Looks up several classes, in the given order, with repetitions.

        Each query is an argument of `find`, "all", or a comma-separated list; a string that is itself a name is not
        split.

        Raises:
            UserError: as `find`.
        """
        classes: list[int] = []
        for query in [queries] if isinstance(queries, str) else queries:
            text = query if isinstance(query, str) else ""
            parts = [part for part in text.split(",") if part.strip()]
            if _key(text) == "all":
                classes += range(len(self))
            elif "," in text and parts and _key(text) not in self._index:
                classes += self.find_all(parts)
            else:
                classes.append(self.find(query))
        return classes

    @functools.cached_property
    def _index(self) -> dict[str, list[int]]:
        """Classes in ascending order by the key of a name, of all names joined, or of a WordNet id."""
        index: dict[str, list[int]] = {}
        for i, names in enumerate(self.names):
            for key in {_key(name) for name in (*names, ", ".join(names), *self.wordnet_ids[i : i + 1])}:
                index.setdefault(key, []).append(i)
        return index

    def _checked(self, index: int) -> int:
        if 0 <= index < len(self):
            return index
        shown = index if abs(index) < 10**20 else "with such a large id"  # Python refuses to print the largest
        raise UserError(f"class {shown} does not exist: the model has classes 0 to {len(self) - 1}.")

    def _distinguish(self, index: int, key: str) -> str:
        others = ", ".join(name for name in self.names[index] if _key(name) != key)
        if not others and self.definitions:
            others = self.definitions[index].replace(";", ",")
        return f"{index} ({others})" if others else str(index)

    def _nearest(self, key: str) -> list[str]:
        """Returns up to three "name (id)" with the query as a word or its beginning, or with a similar spelling."""
        from difflib import get_close_matches

        names = {_key(name): name for names in self.names for name in names}
        with_words = [other for other in names if f" {key} " in f" {other} "]
        with_starts = [other for other in names if f" {key}" in f" {other}"]
        near = [name for some in (with_words, with_starts) for name in get_close_matches(key[:100], some, 10, 0)]
        near += get_close_matches(key[:100], names, 10)
        found: dict[int, str] = {}
        for other in near:
            for i in self._index[other]:
                found.setdefault(i, f"{names[other]} ({i})")
        return list(found.values())[:3]


@functools.cache
def imagenet() -> ClassNames:
    """Returns the 1000 classes of ILSVRC-2012 in their standard order (by WordNet id), with WordNet's names."""
    import importlib.resources

    file = importlib.resources.files("bitdance") / "assets" / "imagenet_classes.tsv"
    rows = [line.split("\t") for line in file.read_text("utf-8").splitlines()]
    wordnet_ids, names, definitions = zip(*rows, strict=True)
    return ClassNames(tuple(tuple(row.split(", ")) for row in names), wordnet_ids, definitions)


def names_of(labels: Sequence[str], count: int) -> ClassNames:
    """Returns the names of a model of `count` classes: its labels, else ImageNet's for 1000 classes, else numbers."""
    if labels:
        return ClassNames.from_labels(labels)
    return imagenet() if count == 1000 else numbered(count)


def are_imagenet(labels: Sequence[str]) -> bool:
    """Whether these are names or WordNet ids of ImageNet's 1000 classes in their order; 1 % may be unknown."""
    known = imagenet()
    if len(labels) != len(known):
        return False
    names = ((label, *label.split(",")) for label in labels)
    found = [any(i in known._index.get(_key(name), ()) for name in group) for i, group in enumerate(names)]
    return sum(found) >= 0.99 * len(known)


def numbered(count: int) -> ClassNames:
    """Returns the names "class 0", "class 1", ... for a model whose `count` classes have no names."""
    return ClassNames(tuple((f"class {i}",) for i in range(count)))
