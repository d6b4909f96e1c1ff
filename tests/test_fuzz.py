"""A short run of the fuzzer: a hostile file of each class, always the same ones; `make fuzz` tries more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from small import ROOT, environment

LIMIT = 240  # seconds on a busy machine; a quiet one needs about 10


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, and starts processes by forking")
def test_hostile_files_end_in_a_sentence():
    process = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "fuzz.py", "--tries", "14", "--seed", "5"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LIMIT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its own children die with it
    assert process.returncode == 0, output
