"""Settings of the C libraries under PyTorch on CPUs; does not import PyTorch, since some must come before that."""

from __future__ import annotations

import ctypes
import os
import platform

SPIN_COUNT = 1000
"""Iterations for which an idle thread of OpenMP waits actively. By default it may wait for long, and a loop of small
operations on all cores is then up to ten times slower as soon as another process uses one of them."""

KEPT_BLOCK, KEPT_BYTES = 1 << 28, 1 << 30
"""Memory that is kept for the next tensor when it is freed: blocks up to the first size, and up to the second in all.
By default, each tensor of more than 32 MB is given back to the system, which clears its pages for the next one."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def tune_cpu() -> None:
    """Sets how threads wait and how memory is kept; where the user has set them, those settings stay.

    How threads wait is read when PyTorch is imported for the first time, so call this before.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    if platform.libc_ver()[0] == "glibc" and not any(name.startswith("MALLOC_") for name in os.environ):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, KEPT_BLOCK)
        library.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
