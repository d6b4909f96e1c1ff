"""`bitdance download`: the released weights, and what an evaluation or a perceptual loss needs."""

from __future__ import annotations

import dataclasses
import pathlib

from bitdance.cli.parsing import Positional, parse
from bitdance.runtime.errors import UserError
from bitdance.weights import hub

EXAMPLES = """
bitdance download B-16X autoencoder
bitdance download reference-256 inception
bitdance download lpips
bitdance download all --verify
"""


@dataclasses.dataclass(frozen=True)
class Download:
    """Download released files; those that are complete are not downloaded again.

    Attributes:
        names: B-1X, B-4X, B-16X, L-1X, H-1X (or BitDance-B-1X, ...), autoencoder, or all for these six; reference-256
            and reference-512 (ADM's reference batches); inception (the network behind the FID); lpips (vgg16 and
            lpips-vgg, the networks of a perceptual loss).
        output: folder of the models and the autoencoder; the other files are in models/evaluation.
        verify: also compare the SHA-256 of files that were downloaded earlier, not only their sizes.
    """

    names: Positional[tuple[str, ...]] = ()
    output: pathlib.Path = hub.FOLDER
    verify: bool = False


def main(arguments: list[str]) -> None:
    """Runs the command."""
    command = parse(Download, arguments, "bitdance download", EXAMPLES)
    if not command.names:
        raise UserError(f"name what to download: {', '.join((*hub.HUB_FILES, *hub.PLAIN_FILES, *hub.GROUPS))}.")
    for file in hub.download(command.names, command.output, verify=command.verify):
        print(f"{file.path}: {file.size / 1e6:.1f} MB, {file.note}", flush=True)
