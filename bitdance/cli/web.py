"""`bitdance web`: a page in the browser to sample and complete images."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys

from bitdance.cli.options import PrecisionOptions
from bitdance.cli.parsing import parse
from bitdance.runtime.errors import check_fields

EXAMPLES = """
bitdance web
bitdance web --model runs/mine BitDance-B-16X --port 8000
"""


@dataclasses.dataclass(frozen=True)
class Page:
    """What the page offers, and where.

    Attributes:
        model: models to offer besides demo and the downloaded ones in models/BitDance-ImageNet: folders of training
            runs, files of weights, or released models, which are downloaded.
        host: address to listen at. The page has no password: with another address than the default, all who reach it
            can use it.
        port: port to listen at.
    """

    model: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 7860


@dataclasses.dataclass(frozen=True)
class Web:
    """Serve a page in the browser to sample and complete images (pip install 'bitdance[web]')."""

    page: Page = dataclasses.field(default_factory=Page)
    where: PrecisionOptions = dataclasses.field(default_factory=PrecisionOptions)


def main(arguments: list[str]) -> None:
    """Runs the command."""
    command = parse(Web, arguments, "bitdance web", EXAMPLES)
    page = command.page
    check_fields(page, "port", lambda value: 1 <= value <= 65535, "be from 1 to 65535")
    from bitdance.web.server import check_address, check_gradio, serve

    check_gradio()
    check_address(page.host, page.port)
    from bitdance.sampling.pipeline import load_pipeline
    from bitdance.web.offered_models import OfferedModels

    with command.where.init_distributed(only_one=True) as world:
        load = functools.partial(load_pipeline, device=world.device, dtype=command.where.precision)
        serve(OfferedModels(page.model, load), page.host, page.port)
    sys.stdout.flush()
    os._exit(0)  # a thread that is sampling would abort the process at the end of the interpreter
