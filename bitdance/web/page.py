"""The layout of the page, with gradio."""

from __future__ import annotations

import contextlib
import functools
import html
import pathlib
import secrets
import tempfile
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

from bitdance.config import PRESETS
from bitdance.data.decoding import HEIF_EXTENSIONS
from bitdance.runtime.errors import UserError, is_out_of_memory, one_line
from bitdance.web import generation
from bitdance.web.generation import MAX_CLASSES, MAX_EACH, MAX_SCALE, MAX_STEPS, Frame, Settings
from bitdance.web.offered_models import OfferedModels

if TYPE_CHECKING:
    import gradio as gr

PRESET_LABELS = {"fast": "fast: second-order solver", "exact": "exact: solver as published"}

SHOWN_CLASSES = 3
"""Classes that are chosen at first."""

STYLE = ":is(#sample-status, #complete-status) :is(.error, .clear-status) { display: none; }"
"""Without the mark of an error beside the status: gradio also shows it for many samplings that were stopped, and errors
are shown as messages."""

GUIDANCE = "1 is none; larger values give images more typical of their class, with less variety."


def build(models: OfferedModels) -> gr.Blocks:
    """Returns the page, which samples with these models."""
    import gradio as gr

    first = models.get(models.names[0])
    grid, patch = first.model.config.grid, first.model.config.patch
    choices = generation.class_choices(first.classes)
    # Queued events of one id run one after the other.
    event: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}

    def frames(iterator: Generator[Frame, None, None]) -> Iterator[tuple[Any, str, Any]]:
        """Yields (grid, status, file to download)."""
        # The folder is there until gradio has copied the file from it.
        with contextlib.closing(iterator), tempfile.TemporaryDirectory() as folder:
            for frame in iterator:
                status, button = f"step {frame.step} of {frame.steps}", gr.DownloadButton(interactive=False)
                if frame.archive is not None:
                    path = pathlib.Path(folder, "bitdance.zip")
                    path.write_bytes(frame.archive)
                    status, button = "done", gr.DownloadButton(value=str(path), interactive=True)
                yield frame.grid, status, button

    @_show_errors
    def sample(classes: Any, each: Any, name: Any, *settings: Any) -> Iterator[tuple[Any, str, Any]]:
        yield from frames(generation.sample(models.get(name), classes, each, Settings(*settings)))

    @_show_errors
    def complete(
        data: Any, label: Any, rows: Any, each: Any, name: Any, *settings: Any
    ) -> Iterator[tuple[Any, str, Any]]:
        pipeline = models.get(name)
        yield from frames(generation.complete(pipeline, data, label, rows, each, Settings(*settings)))

    @_show_errors
    def show(data: Any, name: Any) -> Iterator[Any]:
        yield list(generation.read_picture(models.get(name), data)) if data is not None else [None] * 3

    @_show_errors
    def choose_model(name: Any) -> Iterator[list[Any]]:
        pipeline = models.get(name)
        config, choices = pipeline.model.config, generation.class_choices(pipeline.classes)
        rows = {"maximum": config.grid - config.patch, "step": config.patch, "value": _half(config.grid, config.patch)}
        yield [
            gr.Dropdown(choices=choices, value=_first(choices)),
            gr.Dropdown(choices=choices, value=choices[0][1]),
            gr.Slider(**rows),
            gr.Slider(value=min(pipeline.defaults.cfg_scale, MAX_SCALE)),
        ]

    with gr.Blocks(title="BitDance", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(
            "# BitDance\nImages of classes, sampled token by token. The same settings and seed give the same images."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                model = gr.Dropdown(models.names, label="Model", value=models.names[0], filterable=False)
                seed = gr.Number(0, label="Seed", precision=0)  # `Settings` says what it must be
                new_seed = gr.Button("New seed", size="sm")
                preset = gr.Radio([(PRESET_LABELS[name], name) for name in PRESET_LABELS], value="fast", label="Preset")
                steps = gr.Slider(1, MAX_STEPS, PRESETS["fast"]["num_steps"], step=1, label="Solver steps")
                guidance = min(first.defaults.cfg_scale, MAX_SCALE)
                scale = gr.Slider(0, MAX_SCALE, guidance, step=0.05, label="Guidance scale", info=GUIDANCE)
            with gr.Column(scale=3, min_width=500):
                with gr.Tab("Sample"):
                    classes = gr.Dropdown(
                        choices, value=_first(choices), multiselect=True, max_choices=MAX_CLASSES, label="Classes"
                    )
                    each = gr.Slider(1, MAX_EACH, 4, step=1, label="Images of each class")
                    sampled = _Results("Sample")
                with gr.Tab("Complete a picture"):
                    file = gr.File(
                        label="Picture", type="binary", file_types=["image", *sorted(HEIF_EXTENSIONS)], height=120
                    )
                    with gr.Row():
                        shown = []
                        for title in ("As the model sees it", "Decoded from its bits", "Bits of its tokens"):
                            with gr.Column(min_width=150):
                                gr.Markdown(title)
                                shown.append(_image(height=230, buttons=[]))
                    label = gr.Dropdown(choices, value=choices[0][1], label="Class of the rest")
                    with gr.Row():
                        rows = gr.Slider(
                            0, grid - patch, _half(grid, patch), step=patch, label="Rows of tokens to keep"
                        )
                        candidates = gr.Slider(1, MAX_EACH, 8, step=1, label="Completions")
                    completed = _Results("Complete")
        settings = [model, seed, preset, scale, steps]
        new_seed.click(lambda: secrets.randbelow(2**32), outputs=seed, api_visibility="private")
        # `input`: only what a person chooses, not what another event has set.
        preset.input(lambda name: PRESETS[name]["num_steps"], preset, steps, api_visibility="private")
        model.input(choose_model, model, [classes, label, rows, scale], **event).then(
            show, [file, model], shown, **event
        )
        file.change(show, [file, model], shown, **event)
        sampled.connect(sample, [classes, each, *settings], event)
        completed.connect(complete, [file, label, rows, candidates, *settings], event)
    return page.queue(max_size=16)


class _Results:
    """Buttons to start and to stop, the grid, a line of text, and the download."""

    def __init__(self, action: str) -> None:
        import gradio as gr

        with gr.Row():
            self.start = gr.Button(action, variant="primary", elem_id=action.lower())
            self.stop = gr.Button("Stop")
            self.status = gr.Textbox(
                show_label=False, container=False, interactive=False, max_lines=1, elem_id=f"{action.lower()}-status"
            )
        self.grid = _image(buttons=["fullscreen"], elem_id=f"{action.lower()}-images")
        self.download = gr.DownloadButton("Download PNGs with their settings", interactive=False)

    def connect(self, function: Callable[..., Any], inputs: list[Any], event: dict[str, Any]) -> None:
        """Has the buttons call a function, and stop it."""
        outputs = [self.grid, self.status, self.download]
        run = self.start.click(
            function, inputs, outputs, show_progress_on=self.status, show_progress="minimal", **event
        )
        self.stop.click(lambda: "stopped", outputs=self.status, cancels=run, api_visibility="private")


def _image(**settings: Any) -> gr.Image:
    import gradio as gr

    return gr.Image(format="png", interactive=False, show_label=False, **settings)


def _first(choices: list[tuple[str, int]]) -> list[int]:
    return [index for _, index in choices[:SHOWN_CLASSES]]


def _half(grid: int, patch: int) -> int:
    return grid // patch // 2 * patch


def _show_errors(function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Has the page show an error that the user can mend as a sentence; other errors are printed on the terminal."""
    import gradio as gr

    @functools.wraps(function)
    def call(*arguments: Any) -> Iterator[Any]:
        try:
            yield from function(*arguments)
        except UserError as error:
            text = one_line(str(error))
            raise gr.Error(html.escape(text[0].upper() + text[1:]), print_exception=False) from None
        except Exception as error:
            if not is_out_of_memory(error):
                raise gr.Error("This failed: the terminal of the server says why.") from error
            raise gr.Error("There is not enough memory: choose fewer images.", print_exception=False) from None

    return call
