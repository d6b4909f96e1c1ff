"""The original's `train_parallel.py`: the same flags (--help), one process or many under torchrun."""

import sys

from bitdance.cli.main import call

if __name__ == "__main__":
    call("bitdance.cli.original_cli:train_parallel", sys.argv[1:])
