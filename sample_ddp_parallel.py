"""The original's `sample_ddp_parallel.py`: the same flags (--help), one process or many under torchrun."""

import sys

from bitdance.cli.main import call
from bitdance.cli.original_cli import sample_parallel

if __name__ == "__main__":
    call(sample_parallel, sys.argv[1:])
