"""What the commands that evaluate share: the networks, the reference, the report."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from bitdance.errors import UserError

if TYPE_CHECKING:
    from bitdance.data.images import Split
    from bitdance.distributed import World
    from bitdance.evaluation.feature_sets import FeatureSet
    from bitdance.evaluation.features import FeatureNetwork
    from bitdance.evaluation.sources import Source
    from bitdance.generation.job import Outcome

NO_REFERENCE = "none"


@dataclasses.dataclass(frozen=True)
class EvaluationFlags:
    """How images are evaluated.

    Attributes:
        reference: what to compare with: ADM's reference batch or statistics, a stored reference, an .npz of images, a
            folder, a data set; none for the Inception Score alone. By default ADM's batch for the size of the images.
        reference_split: train or test, for CIFAR-10's archives.
        reference_limit: only so many pictures of a reference, spread over it.
        inception_weights: file of the Inception network; by default the downloaded one.
        features: further networks, each as module:attribute or path/to/file.py:attribute (this runs that code).
        adm_fp16: precision and recall with the rounding of ADM's on a GPU.
        kernel: the unbiased kernel distance too.
        feature_batch_size: images that a network takes at once.
        cache: folder where features of references are kept.
    """

    reference: str | None = None
    reference_split: str = "train"
    reference_limit: int | None = None
    inception_weights: pathlib.Path | None = None
    features: tuple[str, ...] = ()
    adm_fp16: bool = False
    kernel: bool = False
    feature_batch_size: int = 32
    cache: pathlib.Path = pathlib.Path("models/evaluation/features")

    def __post_init__(self) -> None:
        if self.feature_batch_size < 1:
            raise UserError(f"--feature-batch-size {self.feature_batch_size} does not fit: it must be at least 1.")
        if self.reference_split not in ("train", "test"):
            raise UserError(f"--reference-split {self.reference_split} does not fit: it is train or test.")


class Networks:
    """The Inception network and those of `--features`, read when they are first needed."""

    def __init__(self, flags: EvaluationFlags, world: World) -> None:
        self._flags, self._world = flags, world
        self._loaded: tuple[FeatureNetwork, ...] | None = None

    def __call__(self) -> tuple[FeatureNetwork, ...]:
        """The Inception network first.

        Raises:
            UserError: a file is missing, damaged, or something else.
        """
        if self._loaded is None:
            from bitdance.evaluation.features import load_feature_network
            from bitdance.evaluation.inception import find_weights, load_inception

            own = tuple(load_feature_network(name) for name in self._flags.features)
            inception = load_inception(find_weights(self._flags.inception_weights), self._world.device)
            self._loaded = (inception.feature_network(), *own)
            if len({network.key for network in self._loaded}) < len(self._loaded):
                raise UserError("two feature networks have one name: give each its own.")
        return self._loaded


def features_of(source: Source, networks: tuple[FeatureNetwork, ...], world: World, flags: EvaluationFlags,
                keep: int | None = None) -> list[FeatureSet]:  # fmt: skip
    """Features of a source by each network, with a bar; in the first process."""
    from tqdm import tqdm

    from bitdance.evaluation.feature_sets import take_features

    with tqdm(total=len(source), unit="image", desc=f"features of {source.path.name}", dynamic_ncols=True,
              disable=not world.is_main) as bar:  # fmt: skip
        return take_features(source, networks, world, flags.feature_batch_size, keep, bar.update)


def find_reference(flags: EvaluationFlags, side: int, networks: Networks, world: World) -> dict[str, FeatureSet] | None:
    """The reference by the name of each network, in the first process (empty in the others); None for none.

    Args:
        side: height and width of the images to evaluate; pictures are cropped to it.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if flags.reference == NO_REFERENCE:
        return None
    from bitdance.evaluation.feature_sets import read_feature_set, with_published_statistics
    from bitdance.evaluation.sources import NpzSource, open_source

    path = pathlib.Path(flags.reference).expanduser() if flags.reference else _published(side)
    if path.is_file() and path.suffix.lower() == ".npz":
        if (stored := read_feature_set(path)) is not None:
            return {str(stored.about.get("network", networks()[0].name)): stored}
        source: Source = open_source(path)
    else:
        source = open_source(path, side, _split(flags.reference_split), flags.reference_limit)
    found = _cached(source, networks(), world, flags)
    if isinstance(source, NpzSource) and found:
        first = networks()[0].name
        found[first] = with_published_statistics(found[first], path)
    return found


def _split(name: str) -> Split:
    return "test" if name == "test" else "train"


def _published(side: int) -> pathlib.Path:
    from bitdance.hub import EVALUATION_FOLDER, PLAIN_FILES

    name = f"reference-{side}"
    if name not in PLAIN_FILES:
        raise UserError(
            f"there is no published reference for images of {side} x {side} pixels: name one with --reference (a data "
            "set will do), or --reference none for the Inception Score alone."
        )
    path = EVALUATION_FOLDER / PLAIN_FILES[name].rpartition("/")[2]
    if not path.exists():
        raise UserError(
            f"ADM's reference batch is not there ({path}): run `bitdance download {name}`, or name another with "
            "--reference."
        )
    return path


def _cached(
    source: Source, networks: tuple[FeatureNetwork, ...], world: World, flags: EvaluationFlags
) -> dict[str, FeatureSet]:
    """Features of a reference, from the cache where they are there; what is missing is taken and kept there."""
    from bitdance.evaluation.feature_sets import content_digest, read_feature_set, write_feature_set

    content = world.from_main(content_digest(source) if world.is_main else "")
    files = {network.name: flags.cache / f"{content[:16]}-{network.key}.npz" for network in networks}
    missing = world.from_main([name for name, file in files.items() if not file.exists()])
    wanted = tuple(network for network in networks if network.name in missing)
    taken = features_of(source, wanted, world, flags) if wanted else []
    if not world.is_main:
        return {}
    for found in taken:
        try:
            write_feature_set(files[found.about["network"]], found)
        except UserError as error:
            print(f"bitdance: features of {source.path} are not kept: {error}", file=sys.stderr)
    result = {found.about["network"]: found for found in taken}
    for name, file in files.items():
        if name not in result:
            stored = read_feature_set(file)
            assert stored is not None
            result[name] = stored
    return result


def compare(
    samples: list[FeatureSet], reference: dict[str, FeatureSet] | None, flags: EvaluationFlags
) -> tuple[dict[str, float], list[str]]:
    """All figures of a set of images, those of further networks as `<network>:<figure>`, and the warnings."""
    from bitdance.evaluation.report import figures, warnings

    result: dict[str, float] = {}
    found: list[str] = []
    for number, one in enumerate(samples):
        other = None if reference is None else reference.get(str(one.about["network"]))
        if reference is not None and other is None:
            if number:
                raise UserError(f"the reference has no features by {one.about['network']}: give it as images.")
            other = next(iter(reference.values()))
        own = figures(one, other, flags.adm_fp16, flags.kernel)
        if number == 0:
            found = warnings(one, other, own)
        result |= own if number == 0 else {f"{one.about['network']}:{name}": value for name, value in own.items()}
    return result, found


def row_of(outcome: Outcome, reference: dict[str, FeatureSet] | None, flags: EvaluationFlags) -> dict[str, Any]:
    """What `report` wants of a job that took features."""
    from bitdance.evaluation.feature_sets import read_feature_set

    sets = [read_feature_set(path) for kind, path in outcome.results.items() if kind.startswith("features.")]
    found = [one for one in sets if one is not None]
    figures, warnings = compare(found, reference, flags)
    return {"figures": figures, "warnings": warnings, "about": [one.about for one in found]}


def report(
    rows: dict[str, dict[str, Any]],
    reference: dict[str, FeatureSet] | None,
    flags: EvaluationFlags,
    output: pathlib.Path,
    spread: bool,
) -> None:
    """Prints the table and the warnings, and writes everything as JSON.

    Args:
        rows: by title: `figures`, `warnings` and `about`.
        spread: add mean and standard deviation of each figure over all rows, where there are more than one.
    """
    from bitdance.evaluation.report import spread_of, table
    from bitdance.files import atomic_write

    shown = {title: row["figures"] for title, row in rows.items()}
    over_all = spread_of(list(shown.values())) if spread and len(rows) > 1 else {}
    if over_all:
        shown |= {what: {name: value[what] for name, value in over_all.items()} for what in ("mean", "std")}
    print(table(shown))
    said: dict[str, list[str]] = {}
    for title, row in rows.items():
        for warning in row["warnings"]:
            said.setdefault(warning, []).append(title)
    for warning, titles in said.items():
        of = "" if len(titles) == len(rows) else f"{', '.join(titles)}: "
        print(f"bitdance: {of}{warning}", file=sys.stderr)
    record = {
        "samples": rows,
        "reference": None if reference is None else {name: found.about for name, found in reference.items()},
        "settings": {name: value for name, value in dataclasses.asdict(flags).items() if name != "cache"},
        **({"spread": over_all} if over_all else {}),
    }
    with atomic_write(output) as temporary:
        temporary.write_text(json.dumps(record, indent=1, default=str) + "\n")
    print(f"written to {output}")
