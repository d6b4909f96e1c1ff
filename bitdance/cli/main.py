"""The command `bitdance`: finds the subcommand, runs it, and turns errors into sentences.

Nothing heavy is imported before a subcommand is chosen, so `bitdance --help` answers at once.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any

COMMANDS = {
    "sample": "generate images of classes: PNGs and one labelled grid",
    "download": "fetch released models, the autoencoder, or what an evaluation needs",
    "info": "show what is inside a file of weights, or how a training run goes",
    "encode": "store the bits of a set of images, to train from without the encoder",
    "train": "train a BitDance model on images or on stored bits",
    "train-autoencoder": "train an autoencoder on images",
    "evaluate": "FID, sFID, Inception Score, precision and recall of images",
    "sweep": "figures of a model over guidance scales, steps and solvers",
    "reconstruct": "encode and decode images: pictures, PSNR, SSIM and rFID",
    "nearest": "find the training image that is nearest to each generated one",
    "convert": "write weights in our format or in the released layout",
}


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: bitdance COMMAND [OPTIONS]    (bitdance COMMAND --help shows a command's options)",
            "",
            "Class-conditional images from an autoregressive transformer over binary tokens.",
            "",
            "commands:",
            *lines,
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    """Runs `bitdance` with these arguments, by default the process's; exits with status 2 on a user's error."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return
    if arguments[0] == "--version":
        from bitdance import __version__

        print(f"bitdance {__version__}")
        return
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f"bitdance: there is no command {name!r}: choose one of {', '.join(COMMANDS)}.", file=sys.stderr)
        raise SystemExit(2)
    call(importlib.import_module(f"bitdance.cli.{name.replace('-', '_')}").main, rest)


def call(command: Callable[..., None], *arguments: Any, **settings: Any) -> None:
    """Calls a command; a `UserError`, or a file that cannot be used, becomes one line on stderr and exit status 2."""
    from bitdance.runtime.errors import Interrupted, UserError

    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_launcher()
    try:
        command(*arguments, **settings)
    except (UserError, OSError) as error:
        print(f"bitdance: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate", str(error)):
            raise
        print(
            "bitdance: there is not enough memory: lower the batch size (--batch-size, --per-proc-batch-size, "
            "--global-batch-size) or --chunk-size.",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":  # all processes stop together
            print(f"bitdance: {stop}", file=sys.stderr)
        raise SystemExit(128 + stop.signal) from None
    except KeyboardInterrupt:
        print("bitdance: interrupted.", file=sys.stderr)
        raise SystemExit(130) from None


def _end_with_launcher() -> None:
    """Has Linux end this process with torchrun, which, when it is killed itself, would leave its processes behind.

    Called before anything heavy is imported, which takes seconds in which torchrun could end unnoticed.
    """
    if sys.platform != "linux":
        return
    import ctypes
    import signal

    parent, set_parent_death_signal = os.getppid(), 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it ended just before
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
