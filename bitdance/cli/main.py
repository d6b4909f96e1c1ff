"""The command `bitdance`: finds the subcommand, runs it and prints errors as sentences.

Nothing heavy is imported before a subcommand is chosen, so `bitdance --help` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pkgutil
import signal
import sys
import textwrap
import threading
import types
from collections.abc import Callable

COMMANDS = {
    "sample": "sample images of classes: PNGs and a labelled grid",
    "complete": "keep a part of an image and sample the rest",
    "web": "a page in the browser to sample and complete images",
    "download": "download released models, the autoencoder, or what an evaluation needs",
    "info": "show what is in a file of weights, or the status of a training run",
    "encode": "encode a set of images to a token cache, to train from without the encoder",
    "train": "train a BitDance model on images or on a token cache",
    "train-autoencoder": "train an autoencoder on images",
    "evaluate": "FID, sFID, Inception Score, precision and recall of images",
    "sweep": "evaluate a model over guidance scales, steps and solvers",
    "reconstruct": "encode and decode images: pictures, PSNR, SSIM and rFID",
    "nearest": "find the nearest training image of each sample",
    "convert": "write weights in our format or in the released layout",
    "publish": "write a model with a model card to a folder, or upload it to the hub",
    "doctor": "check this machine, the installation and the downloaded files",
}

EXAMPLES = """
bitdance sample   # ten images of each class of the demo model, in samples/
bitdance sample "golden retriever" 388 --model BitDance-B-16X
bitdance train --data-path pictures --output runs/mine --time 10m
bitdance info runs/mine
"""

# Errors of the system that a user can fix: a path, permissions, space.
_NAMES = "ENOENT EACCES EPERM ENOSPC EROFS EISDIR ENOTDIR EEXIST ENAMETOOLONG ENOTEMPTY EFBIG ELOOP EDQUOT"
_USER_ERRORS = {getattr(errno, name) for name in _NAMES.split() if hasattr(errno, name)}


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {name:<{width}}{text}" for name, text in COMMANDS.items())
    return f"""\
usage: bitdance COMMAND [OPTIONS]    (bitdance COMMAND --help shows the options of a command)

Class-conditional image generation with an autoregressive transformer over binary tokens.

commands:
{commands}

examples:
{textwrap.indent(EXAMPLES.strip(), "  ")}

--version shows the version, --debug with any command the traceback of an error."""


def main(arguments: list[str] | None = None) -> None:
    """Runs `bitdance` with these arguments, by default the process's; exits with status 2 on a user's error."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = next((argument for argument in arguments if argument != "--debug"), "--help")
    if name in ("-h", "--help", "help"):
        call(lambda _: print(_help()), [])
        return
    if name == "--version":
        from bitdance import __version__

        call(lambda _: print(f"bitdance {__version__}"), [])
        return
    if name not in COMMANDS:
        call(lambda _: _refuse(name), [])
        return
    arguments.remove(name)
    call(f"bitdance.cli.{name.replace('-', '_')}:main", arguments)


def _refuse(name: str) -> None:
    from bitdance.runtime.errors import UserError, did_you_mean

    raise UserError(f"there is no command {name!r}: {did_you_mean(name, COMMANDS)}choose one of {', '.join(COMMANDS)}.")


def call(command: Callable[[list[str]], None] | str, arguments: list[str]) -> None:
    """Calls a command and prints errors that a user can fix as one line, with exit status 2.

    Those are a `UserError`, a path that cannot be used, and a lack of memory. Any other exception is an error of this
    program, and its traceback is shown. Ctrl-C ends in a sentence, too, with exit status 130, and a second one at once.

    Args:
        command: takes the arguments; or "module:function", which is imported here, where Ctrl-C is handled.
        arguments: of the command; `--debug` among them shows the traceback of every error.
    """
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not under nohup
    is_handled = is_default and threading.current_thread() is threading.main_thread()
    if is_handled:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        _call(command, arguments)
    except KeyboardInterrupt as interrupt:
        if is_handled:
            signal.signal(signal.SIGINT, _end_interrupted)
        advice = f": {interrupt}" if interrupt.args else ""
        print(f"bitdance: interrupted{advice}.", file=sys.stderr)
        _end_at_once(130)
        raise SystemExit(130) from None
    finally:
        if is_handled and signal.getsignal(signal.SIGINT) is _interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _call(command: Callable[[list[str]], None] | str, arguments: list[str]) -> None:
    from bitdance.runtime.cpu_tuning import tune_cpu
    from bitdance.runtime.errors import Interrupted, UserError, is_out_of_memory, one_line

    tune_cpu()  # before the command imports PyTorch
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the program that started this one
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files need not be text
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_launcher()
    try:
        _check_current_folder()
        if isinstance(command, str):
            command = pkgutil.resolve_name(command)
        assert callable(command)
        command([argument for argument in arguments if argument != "--debug"])
        sys.stdout.flush()
    except BrokenPipeError:  # the program that reads the output has ended, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _end_at_once(1)
        raise SystemExit(1) from None
    except Exception as error:
        if "--debug" in arguments:
            _end_at_once(1, with_traceback=True)
            raise
        if isinstance(error, Interrupted):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would end in a traceback of the clean-up
            if os.environ.get("RANK", "0") == "0":  # all processes stop together
                print(f"bitdance: {error}", file=sys.stderr)
            raise SystemExit(128 + error.signal) from None
        from bitdance.cli.parsing import memory_advice, with_flags

        if isinstance(error, UserError):
            message = with_flags(str(error))
        elif isinstance(error, OSError) and error.errno in _USER_ERRORS and error.strerror:
            message = f"cannot use {error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
        elif is_out_of_memory(error):
            message = f"there is not enough memory: {memory_advice()}."
        else:
            _end_at_once(1, with_traceback=True)
            raise
        print(f"bitdance: {one_line(message)}", file=sys.stderr)
        _end_at_once(2)
        raise SystemExit(2) from None


def _check_current_folder() -> None:
    """Raises a `UserError` if the current folder has been removed: PyTorch could not be imported."""
    from bitdance.runtime.errors import UserError

    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder does not exist any more: change to another one.") from None


def _interrupt(number: int, frame: types.FrameType | None) -> None:
    """Handles a first Ctrl-C; during an import, which it could turn into another error or a crash, it ends at once."""
    signal.signal(signal.SIGINT, _end_interrupted)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _end_interrupted(number, frame)
        frame = frame.f_back
    raise KeyboardInterrupt


def _end_interrupted(number: int, frame: types.FrameType | None) -> None:
    os.write(2, b"\nbitdance: interrupted.\n")  # not by print, which a signal may have interrupted
    os._exit(130)


def _end_at_once(status: int, with_traceback: bool = False) -> None:
    """Ends a process that failed beside others: the clean-up of NCCL at exit could wait for them until its time-out.

    Does nothing in a single process.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return
    if with_traceback:
        import traceback

        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _end_with_launcher() -> None:
    """Has Linux end this process with torchrun, which leaves its processes running when it is killed.

    Called before anything heavy is imported, which takes seconds in which torchrun could end unnoticed.
    """
    if sys.platform != "linux":
        return
    import ctypes

    parent, set_parent_death_signal = os.getppid(), 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it ended just before
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
