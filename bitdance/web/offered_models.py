"""The models that a page offers by name. What a browser sends is never used as a path."""

from __future__ import annotations

import pathlib
import sys
import threading
from collections.abc import Callable, Iterable

from bitdance.config import RELEASED_MODELS
from bitdance.runtime.errors import UserError, one_line
from bitdance.sampling.pipeline import Pipeline
from bitdance.weights import hub
from bitdance.weights.resolve import DEMO, DEMO_MODELS, find_weights


class OfferedModels:
    """Models by the names that are shown; the first one is loaded at once, and the one that was used last stays so.

    Args:
        given: names or paths as of `load_pipeline`, offered before the demo model and the downloaded models.
        load: loads a pipeline from one of them.

    Raises:
        UserError: one of `given` cannot be found, or the first model cannot be loaded.
    """

    def __init__(self, given: Iterable[str], load: Callable[[str], Pipeline]) -> None:
        self._sources: dict[str, str] = {}
        for source in given:
            find_weights(source)
            self._add(pathlib.Path(source).absolute().name, source)
        for name in DEMO_MODELS:
            if name != DEMO:  # which is one of the others
                self._add(name, name)
        if hub.find(hub.FOLDER / hub.AUTOENCODER_FILE):
            for name, release in RELEASED_MODELS.items():
                if hub.find(hub.FOLDER / release.file):
                    self._add(f"BitDance-{name}", f"BitDance-{name}")
        self._load, self._lock = load, threading.Lock()
        first = next(iter(self._sources))
        self._loaded: tuple[str, Pipeline] | None = (first, load(self._sources[first]))

    def _add(self, name: str, source: str) -> None:
        if source in self._sources.values():
            return
        number = sum(known.partition(" (")[0] == name for known in self._sources) + 1
        self._sources[name if number == 1 else f"{name} ({number})"] = source

    @property
    def names(self) -> list[str]:
        """The names, the first of which is chosen at first."""
        return list(self._sources)

    def get(self, name: object) -> Pipeline:
        """Returns a model by its name; loads it if it is not the last one.

        Raises:
            UserError: there is no such name, or the model cannot be loaded; the reason is printed on stderr, since it
                can contain paths.
        """
        if not isinstance(name, str) or name not in self._sources:
            raise UserError("there is no such model: choose one of the list.")
        with self._lock:
            if self._loaded is None or self._loaded[0] != name:
                self._loaded = None  # before another one takes memory
                try:
                    self._loaded = name, self._load(self._sources[name])
                except UserError as error:
                    print(f"bitdance: {one_line(str(error))}", file=sys.stderr)
                    raise UserError(
                        f"the model {name} cannot be loaded: the terminal of the server says why."
                    ) from None
            return self._loaded[1]
