"""The original's `sample_ddp.py`: the same flags (--help), one process or many under torchrun."""

import sys

from bitdance.cli.main import call
from bitdance.cli.original_cli import sample

if __name__ == "__main__":
    call(sample, sys.argv[1:])
