"""The original's `train.py`: the same flags (--help), one process or many under torchrun."""

import sys

from bitdance.cli.main import call
from bitdance.cli.original_cli import train

if __name__ == "__main__":
    call(train, sys.argv[1:])
