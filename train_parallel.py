"""The original's `train_parallel.py`: the same flags (--help), one process or many under torchrun."""

import sys

from bitdance.cli.main import call
from bitdance.cli.original_cli import train_parallel

if __name__ == "__main__":
    call(train_parallel, sys.argv[1:])
