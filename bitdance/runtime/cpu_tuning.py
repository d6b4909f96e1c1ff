"""Settings of the C libraries under PyTorch on CPUs; does not import PyTorch, since some must come before that."""

from __future__ import annotations

import ctypes
import os
import platform

SPIN_COUNT = 1000
"""Iterations for which an idle thread of OpenMP waits actively. By default it may wait for long, and a loop of small
operations on all cores is then up to ten times slower as soon as another process uses one of them."""

KEPT_BLOCK, KEPT_END = 1 << 28, 1 << 30
"""Blocks up to the first size are kept for the next tensor when they are freed. Free memory at the end of the heap is
given back to the system beyond the second size. By default, each tensor of more than 32 MB is given back, and the
system clears its pages for the next one."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def tune_cpu() -> None:
    """Sets how threads wait and how memory is kept; where the user has set them, those settings stay.

    How threads wait is read when PyTorch is imported for the first time, so call this before.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    is_set = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if platform.libc_ver()[0] == "glibc" and not is_set:
        library = ctypes.CDLL(None)
        if library.mallopt(_M_MMAP_THRESHOLD, KEPT_BLOCK):  # glibc before 2.35 allows at most 32 MB and returns 0
            library.mallopt(_M_TRIM_THRESHOLD, KEPT_END)
