"""What this process computes on: its device, and the CPU cores it may use."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import torch

from bitdance.runtime.errors import UserError, first_line

MAX_THREADS = 256
"""CPU threads of a process; too many end it with SIGSEGV."""


def choose_device(name: str | None = None, local_rank: int = 0) -> torch.device:
    """Returns the device of that name, by default a GPU if there is one.

    Args:
        name: `cpu`, `cuda`, `cuda:N` or `mps`. With `cuda`, each process of a machine gets a GPU of its own.
        local_rank: index of this process on its machine.

    Raises:
        UserError: the device does not exist or cannot be used.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if not isinstance(name, str) or not re.fullmatch(r"cpu|mps|cuda(:[0-9]{1,4})?", name):
            raise RuntimeError("there is no such device")
        device = torch.device(name)
        if name == "cuda":
            device = torch.device("cuda", local_rank % max(torch.cuda.device_count(), 1))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise UserError(f"device {name!r} cannot be used ({reason}): choose cpu, cuda, cuda:N or mps.") from None
    return device


def computes_bf16(device: torch.device) -> bool:
    """Returns whether bf16 is faster than float32: on GPUs, and on CPUs that have instructions for it."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    # With this variable a user keeps oneDNN, which computes the products, from instructions that the CPU has.
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    if not re.search("DEFAULT|ALL|BF16|FP16|AMX|AVX10", allowed):
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Returns whether a device computes matrix products in bf16; `auto` means if that is faster than float32.

    Raises:
        UserError: the precision is unknown.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise UserError(f"precision={precision!r} is unknown: use auto, fp32 or bf16.")
    return precision == "bf16" or (precision == "auto" and computes_bf16(device))


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Disables TensorFloat-32, which rounds float32 to 10 bits in convolutions and matrix products of GPUs."""
    before = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def num_cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(threads: int | None) -> None:
    """Sets the number of CPU threads of this process; None leaves it as it is.

    Raises:
        UserError: it is out of range.
    """
    if threads is not None:
        if not 1 <= threads <= MAX_THREADS:
            rule = "at least 1" if threads < 1 else f"at most {MAX_THREADS}"
            raise UserError(f"threads={threads} is invalid: it must be {rule}.")
        torch.set_num_threads(threads)
