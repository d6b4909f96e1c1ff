"""The command line: help, messages in the flags of the command, errors and exit statuses, and `bitdance info`."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import platform
import re
import signal
import subprocess
import sys
from typing import Any

import pytest
import small
import torch

from bitdance.cli import parsing
from bitdance.cli.info import _released_as
from bitdance.cli.main import COMMANDS, call, main
from bitdance.cli.parsing import Positional
from bitdance.config import RELEASED_MODELS, AutoencoderConfig
from bitdance.runtime.cpu_tuning import SPIN_COUNT
from bitdance.runtime.errors import Interrupted, UserError
from bitdance.weights import safetensors_files, weights_file

COMPUTING = {"sample", "encode", "train", "train-autoencoder", "evaluate", "sweep", "reconstruct", "nearest"}


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command or launcher that exits; returns the status and its output, stdout and stderr together."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            if arguments[0] in small.LAUNCHERS:
                call(small.LAUNCHERS[arguments[0]], list(arguments[1:]))
            else:
                main(list(arguments))
        output = capsys.readouterr()
        return stop.value.code or 0, output.out + output.err

    return run


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("name", [*COMMANDS, *small.LAUNCHERS])
def test_help(run, name):
    status, text = run(name, "--help")
    is_launcher = name in small.LAUNCHERS
    assert status == 0 and text.startswith(f"usage: {name if is_launcher else 'bitdance ' + name} ")
    assert "\noptions:\n" in text and "\n  --debug " in text and " options\n" not in text and "----" not in text
    assert not re.search(r"None|\(default: *(False|'')?\)|--no-no-|\n\n\n| \n|`[a-z]+_[a-z_]+`", text)
    examples = text.partition("\nexamples:\n")[2].splitlines()
    command = rf"(torchrun --nproc_per_node[= ]8 |python ){name}" if is_launcher else rf".*bitdance {name}\b"
    assert examples and all(re.match(rf"  {command}", line) for line in examples)
    # Each option has a text, on its line or on the next one.
    lines = text.partition("\nexamples:")[0].splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if re.match(r"  -", line) and not re.match(r"  -.*\S  +\S", line):
            assert re.match(r"   +[^\s(]", following), line
    flags = set(re.findall(r"--[\w-]+", text.partition("\noptions:")[2].partition("\nexamples:")[0]))
    assert {"--device", "--threads"} <= flags or (name not in COMPUTING and not is_launcher)
    if not is_launcher:  # the original's names are only in the launchers
        assert not flags & {"--results-dir", "--sample-dir", "--global-batch-size", "--global-seed", "--sample-steps",
                            "--mixed-precision", "--trained-vae", "--ckpt", "--folder"}  # fmt: skip


def test_options_of_training_have_titles(run):
    titles = ["options", "Data", "Schedule and optimizer", "Precision, speed and memory",
              "Checkpoints, previews and log", "Validation and evaluation during training"]  # fmt: skip
    for name in ("train", "train-autoencoder"):
        found = re.findall(r"^(\S.*):$", run(name, "--help")[1], re.M)
        assert found[: len(titles)] == titles and found[-2:] == ["Where to compute", "examples"]
        assert len(found) == len(titles) + 4  # network and loss


def test_a_recipe_shows_its_defaults(run):
    text = run("train", "--recipe", "B-16X", "--help")[1]
    assert re.search(r"--epochs INT .*\n.*\(default: 800\)", text)
    status, text = run("train", "--recipe", "B-17X", "--data-path", "x", "--autoencoder", "demo")
    assert status == 2 and "there is no recipe 'B-17X': did you mean B-1" in text
    text = run("train-autoencoder", "--recipe", "small", "--help")[1]
    assert "(default: 4)" in text.partition("--space-to-depth INT")[2].partition("--split")[0]
    status, text = run("train-autoencoder", "--recipe", "smal", "--data-path", "x")
    assert status == 2 and "there is no recipe 'smal': did you mean small? --recipe takes d16c32 or small." in text


def test_the_list_of_commands(capsys):
    for arguments in ([], ["--help"], ["help"], ["--debug"]):
        main(arguments)
        out = capsys.readouterr().out
        assert all(f"  {name} " in out for name in COMMANDS) and "examples:" in out
    main(["--version"])
    assert re.fullmatch(r"bitdance \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_help_imports_nothing_heavy():
    code = f"""
import sys
from bitdance.cli import original_cli
from bitdance.cli.main import main
launchers = original_cli.sample, original_cli.sample_parallel, original_cli.train, original_cli.train_parallel
commands = [lambda arguments, name=name: main([name, *arguments]) for name in {list(COMMANDS)}]
for command in (main, *commands, *launchers):
    try:
        command(["--help"])
    except SystemExit:
        pass
heavy = ("torch", "numpy", "PIL", "safetensors", "huggingface_hub", "gradio", "pillow_heif", "pyarrow", "wandb")
print([m for m in heavy if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=small.ROOT, env=small.environment(), capture_output=True)
    assert done.stdout.decode().splitlines()[-1] == "[]", done.stderr.decode()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_large_tensors_reuse_memory():
    """Without new pages from the system, unless a variable of glibc's malloc is set."""
    code = """
import os, resource
from bitdance.cli.main import call

def command(arguments):
    import torch
    for _ in range(20):  # the first ones may not fit into what the ones before have left
        torch.ones(10_000_000)  # 40 MB, more than glibc's limit
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(10_000_000)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

call(command, [])
del os.environ["MALLOC_ARENA_MAX"]
call(command, [])
"""
    environment = small.environment() | {"MALLOC_ARENA_MAX": "4"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    untuned, tuned = map(int, done.stdout.split())
    assert tuned < 100 <= untuned


def test_output_that_is_closed():
    """By `>&-` or a program that starts others without it: sys.stdout is None."""
    for number in (1, 2):
        command = ["sh", "-c", f'"$0" "$@" {number}>&-', sys.executable, "-m", "bitdance", "info", "demo"]
        done = subprocess.run(command, cwd=small.ROOT, env=small.environment(), capture_output=True)
        assert (done.returncode, done.stderr) == (0, b""), done.stderr.decode()


@pytest.mark.parametrize("size", ["", "x", "0"])
def test_a_number_of_processes_that_is_none(run, monkeypatch, size):
    monkeypatch.setenv("WORLD_SIZE", size)
    status, text = run("sample", "--model", "demo", "cat")
    assert status == 2 and f"WORLD_SIZE={size} in the environment must be an integer of at least 1" in text


def test_threads_wait_passively_after_a_short_time(monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    call(lambda arguments: None, [])
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.delenv("OMP_WAIT_POLICY")
    call(lambda arguments: None, [])
    assert os.environ["GOMP_SPINCOUNT"] == str(SPIN_COUNT)


def test_what_loading_a_model_imports(monkeypatch):
    """Not the compiler, which takes over a second, and PyTorch only after the setting of its threads."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    code = """
import bitdance, os, sys
load = bitdance.load_pipeline
print("torch" in sys.modules, os.environ["GOMP_SPINCOUNT"])
load("demo", device="cpu")
print("torch._dynamo" in sys.modules)
"""
    assert small.run("-c", code).stdout == f"True {SPIN_COUNT}\nFalse\n"


# ---------------------------------------------------------------- arguments that do not parse


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["smaple"], "bitdance: there is no command 'smaple': did you mean sample?"),
        (["xyz"], "bitdance: there is no command 'xyz': choose one of sample, "),
        (["sample", "--cfg-scal", "3"], "there is no option --cfg-scal (did you mean --cfg-scale?)"),
        (["train.py", "--data-path", "x", "--trained-vea", "y"], "(did you mean --trained-vae?)"),
        (["sample", "--num-steps", "few"], "--num-steps expects an integer, not 'few'; see bitdance sample --help."),
        (["sample", "--num-steps=2", "--cfg-scale", "x"], "--cfg-scale expects a number, not 'x'"),
        (["train-autoencoder", "--data-path", "x", "--bit-depths", "a"], "--bit-depths expects an integer, not 'a'"),
        (["sweep", "--cfg-scale", "1", "x"], "--cfg-scale expects a number, not 'x'"),
        (["sample", "--num-steps", "1.5"], "--num-steps expects an integer, not '1.5'"),
        (["sample", "--num-steps"], "--num-steps needs a value; see bitdance sample --help."),
        (["sample", "--solver", "foo"], "foo is invalid: choose one of dpmpp-2m-sde, euler, euler-maruyama, heun."),
        (["sample", "--end-time", "0.99"], "--end-time 0.99 is invalid: it must be a number from 0.05 to 0.95."),
        (["sample", "--cfg-interval", "0.5", "0.5"], "--cfg-interval (0.5, 0.5) is invalid: it must be two times"),
        (["train"], "--data-path is missing; see bitdance train --help."),
        (["train", "--output", "x"], "--data-path is missing; see bitdance train --help."),
        (["train", "--recipe", "B-1X"], "--autoencoder, --data-path are missing; see bitdance train --help."),
        (["train", "--epoch", "1"], "there is no option --epoch (did you mean --epochs?); "),
        (["reconstruct", "odd"], "the argument odd is not expected; --data-path is missing; see bitdance reconstruct "),
        (["convert", "a"], "TARGET is missing; see bitdance convert --help."),
        (["encode", "--data-path", "x", "--output="], "--output is empty: give a value."),
        (["evaluate", "x", "--cache", ""], "--cache is empty: give a value."),
        (["encode", "--data_path="], "--data_path is empty: give a value."),
        (["nearest", ""], "an argument is empty: give a value."),
        (["evaluate", "x", "--reference-limit", "0"], "--reference-limit 0 is invalid: it must be at least 1."),
        (["train.py", "--results-dir", ""], "--results-dir is empty: give a value."),
        (["train_parallel.py"], "--data-path is missing; see train_parallel.py --help."),
    ],
)  # fmt: skip
def test_arguments_that_do_not_parse(run, arguments, words):
    status, text = run(*arguments)
    assert status == 2 and words in text and "None" not in text and "----" not in text
    assert text.startswith("bitdance: ") and text.count("\n") == 1 and text.endswith(".\n")


# ---------------------------------------------------------------- fields and flags


@dataclasses.dataclass(frozen=True)
class Group:
    num_steps: int = 50
    per_proc_batch_size: int = 1


@dataclasses.dataclass(frozen=True)
class Command:
    samples: Positional[str]
    group: Group = dataclasses.field(default_factory=Group)


def test_fields_are_shown_as_flags(monkeypatch):
    monkeypatch.setattr(parsing, "_flags", {})
    assert parsing.with_flags("num_steps=0 is invalid") == "num_steps=0 is invalid"  # nothing was parsed
    command = parsing.parse(Command, ["x", "--num-steps", "1", "--num-steps", "2"], "command",
                            aliases={"batch_size": "per_proc_batch_size"})  # fmt: skip
    assert command == Command("x", Group(2))
    for message, expected in {
        "num_steps=0 is invalid: it must be at least 1.": "--num-steps 0 is invalid: it must be at least 1.",
        "set `num_steps`, or batch_size=4": "set --num-steps, or --per-proc-batch-size 4",
        "name `samples`": "name SAMPLES",
        "`cfg_scale`, cfg_scale=3 and a num_steps that is": "`cfg_scale`, cfg_scale=3 and a num_steps that is",
        "run `bitdance encode`; my.num_steps=3 x-num_steps=3": "run `bitdance encode`; my.num_steps=3 x-num_steps=3",
    }.items():
        assert parsing.with_flags(message) == expected


@pytest.mark.parametrize(
    ("arguments", "message", "expected"),
    [
        (["sample_ddp.py", "--ckpt", "x"],
         "batch_size=1 num_images=2 num_steps=3 cfg_scale=4 threads=7 `output` `precision` `autoencoder` `eval_every`",
         "--per-proc-batch-size 1 --num-fid-samples 2 --sample-steps 3 --cfg-scale 4 --threads 7 --sample-dir "
         "--mixed-precision --trained-vae `eval_every`"),
        (["train_parallel.py", "--data-path", "x", "--trained-vae", "y"],
         "batch_size=1 seed=2 keep_epochs=3 time_mean=4 time_std=5 parallel_num=6 `output` `precision` accumulate=2",
         "--global-batch-size 1 --global-seed 2 --keep-freq 3 --P-mean 4 --P-std 5 --parallel-num 6 --results-dir "
         "--mixed-precision accumulate=2"),
        (["sweep"], "cfg_scale=1 solver=heun num_steps=2 `reference`",
         "--cfg-scale 1 --solver heun --num-steps 2 --reference"),
        (["nearest", "folder", "--data-path", "x"], "`samples` `data_path`", "SAMPLES --data-path"),
    ],
)  # fmt: skip
def test_fields_of_real_commands(run, monkeypatch, arguments, message, expected):
    def fail(*_: object, **__: object) -> None:
        raise UserError(message)

    # In this order: bitdance.training.setup imports init_distributed by name.
    for name in ("bitdance.training.setup.train_model", "bitdance.runtime.process_group.init_distributed"):
        monkeypatch.setattr(name, fail)
    assert run(*arguments) == (2, f"bitdance: {expected}\n")


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (UserError("lower `cfg_scale`\n  now."), 2, "lower --cfg-scale now."),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.zip"), 2,
         "cannot use a.zip: No such file or directory."),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), 2, "cannot use /a: Permission denied."),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device."),
        (MemoryError(), 2, "there is not enough memory: use a lower --batch-size or a lower --chunk-size or a lower "
         "--feature-batch-size."),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "there is not enough memory: "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "there is not enough memory: "),
        (Interrupted("stopped at step 3.", signal.SIGTERM), 143, "stopped at step 3."),
        (KeyboardInterrupt(), 130, "interrupted."),
        (KeyboardInterrupt("run it again"), 130, "interrupted: run it again."),
    ],
)  # fmt: skip
def test_errors_of_users_are_one_sentence(run, monkeypatch, error, status, sentence):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("bitdance.cli.sample._check", fail)
    found, text = run("sample")
    assert found == status and text.startswith(f"bitdance: {sentence}") and text.count("\n") == 1
    if isinstance(error, Exception):
        for arguments in (["--debug", "sample"], ["sample", "--debug"]):
            with pytest.raises(type(error)):
                main(arguments)


KILL = "import os, signal; kill = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
ENDED = "bitdance: interrupted.\n"


@pytest.mark.parametrize(
    ("body", "out", "err"),
    [
        ("try:\n    kill()\nexcept BaseException:\n    raise ImportError", "", f"\n{ENDED}"),
        ("def main(_):\n    try:\n        kill()\n    finally:\n        print('cleaned up')", "cleaned up\n", ENDED),
        ("def main(_):\n    try:\n        kill()\n    finally:\n        kill()\n        print('no')", "", f"\n{ENDED}"),
        ("def main(_):\n    import atexit\n    atexit.register(kill)\n    kill()", "", 2 * f"\n{ENDED}"),
    ],
    ids=["while a command is imported", "in a command", "twice", "a second time at exit"],
)
def test_ctrl_c_ends_in_a_sentence(tmp_path, body, out, err):
    (tmp_path / "command.py").write_text(KILL + body)
    script = tmp_path / "script.py"
    handled = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which nohup ignores
    script.write_text(f"{handled}from bitdance.cli.main import call\ncall('command:main', [])\n")
    result = small.run(script, check=False)
    assert (result.returncode, result.stdout) == (130, out)
    assert result.stderr.replace("\n", "") == err.replace("\n", "")


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), KeyError("x"), TypeError("x"), RuntimeError("x"), OSError("x"), OSError(errno.EIO, "x", "y"),
     ValueError("the class 'out of memory' is unknown"), AssertionError()],
    ids=repr,
)  # fmt: skip
def test_errors_of_the_program_are_not_hidden(monkeypatch, error):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("bitdance.cli.sample._check", fail)
    with pytest.raises(type(error)) as raised:
        main(["sample"])
    assert raised.value is error


def test_tracebacks_and_statuses_of_processes():
    code = """
import sys, bitdance.cli.info, bitdance.cli.main
def fail(arguments):
    raise KeyError("a bug")
bitdance.cli.info.main = fail
bitdance.cli.main.main(["info"])
"""
    for arguments, status, line in (
        (["-c", code], 1, "KeyError: 'a bug'"),
        (["train.py", "--data-path", "x"], 2, "bitdance: --trained-vae is missing: training needs the autoencoder"),
        (["train.py", "--debug", "--data-path", "x"], 1, "bitdance.runtime.errors.UserError: `trained_vae` is missing"),
    ):
        done = small.run(*arguments, check=False)
        assert done.returncode == status and done.stderr.splitlines()[-1].startswith(line), done.stderr
        assert ("Traceback" in done.stderr) == (status == 1)


def test_what_to_do_about_memory_is_in_flags_of_the_command(run, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    # In this order: bitdance.training.setup imports init_distributed by name.
    for name in ("bitdance.training.setup.train_model", "bitdance.runtime.process_group.init_distributed"):
        monkeypatch.setattr(name, fail)
    monkeypatch.setattr("bitdance.weights.resolve.find_weights", fail)
    for arguments, advice in (
        (
            ["train", "--data-path", "x", "--autoencoder", "y", "--epochs", "1"],
            "use a lower --batch-size or a higher --accumulate.",
        ),
        (["train.py", "--data-path", "x", "--trained-vae", "y"], "use a lower --global-batch-size."),
        (["sample_ddp.py", "--ckpt", "x"], "use a lower --per-proc-batch-size or a lower --chunk-size."),
        (["info", "x"], "close other programs."),
    ):
        assert run(*arguments) == (2, f"bitdance: there is not enough memory: {advice}\n")


# ---------------------------------------------------------------- bitdance info

ARGS = argparse.Namespace(parallel_mode="patch", time_shift=2.0, lr=6e-4, betas=(0.9, 0.95), trained_vae=None)


@pytest.fixture
def info(capsys):
    """Runs `bitdance info` and returns its output."""

    def run(path: object, *flags: str) -> str:
        main(["info", str(path), *flags])
        output = capsys.readouterr()
        assert output.err == ""
        return output.out

    return run


@pytest.fixture
def released(tmp_path):
    """Writes a model with its autoencoder in the released layout."""

    def write(args: object) -> object:
        inside = {f"vae.{name}": value for name, value in small.autoencoder().state_dict().items()}
        state = small.model().state_dict() | inside
        torch.save({"model": state, "ema": state, "epochs": 3, "args": args}, tmp_path / "model.pt")
        return tmp_path / "model.pt"

    return write


def test_info_of_a_released_file(released, info):
    path = released(ARGS)
    words = {" ".join(line.split()) for line in info(path).splitlines()}
    assert {"weights ema; model is there too", "dim 64 from shapes", "token_order patch from args"} <= words
    assert "lr 0.0006" in words and "class_names none published default" in words
    facts = json.loads(info(path, "--json"))
    assert facts["model"]["config"]["time_shift"] == {"value": 2.0, "source": "args"}
    assert facts["model"]["weights"] == "ema" and facts["model"]["weights_in_file"] == ["ema", "model"]
    assert facts["model"]["parameters"] == sum(value.numel() for value in small.model().state_dict().values())
    assert facts["autoencoder"]["config"]["widths"]["value"] == [32, 32, 32]
    assert facts["model"]["released_as"] is None and facts["args"]["betas"] == [0.9, 0.95]


def test_info_of_our_files(tmp_path, info):
    network = small.model(num_classes=2, class_names=("cat", "dog"))
    digest = weights_file.save(tmp_path / "model.safetensors", network)
    facts = json.loads(info(tmp_path / "model.safetensors", "--json"))
    assert facts["model"]["config"]["class_names"] == {"value": ["cat", "dog"], "source": "file"}
    assert facts["metadata"]["digest"] == digest and "cat, dog" in info(tmp_path / "model.safetensors")
    tensors = {f"{part}/{n}": v for part in ("ema", "model") for n, v in small.autoencoder().state_dict().items()}
    config = {"autoencoder": dataclasses.asdict(small.NETWORK)}
    safetensors_files.save_tensors(tmp_path / "run", tensors, "training", config, step="5", network="autoencoder")
    facts = json.loads(info(tmp_path / "run", "--json"))
    assert facts["metadata"]["step"] == "5" and facts["args"] == {}
    assert facts["autoencoder"]["weights"] == "ema" and "model" not in facts


def test_info_names_the_released_model():
    for name, release in RELEASED_MODELS.items():
        assert _released_as(release.config) == f"BitDance-{name}"
    assert _released_as(AutoencoderConfig()) == "ae_d16c32" and _released_as(small.NETWORK) is None
    named = dataclasses.replace(RELEASED_MODELS["B-1X"].config, class_names=("x",) * 1000)
    assert _released_as(named) == "BitDance-B-1X"


def test_info_prints_odd_args(released, info):
    bomb: Any = ["lol"]
    for _ in range(60):
        bomb = [bomb, bomb]  # its text would have 2^60 words
    args = {"bomb": bomb, "escape": "\x1b[2J\nnew", "nan": float("nan"), 3: torch.ones(1), "long": list(range(1000))}
    path = released(args)
    assert len(info(path)) < 10_000 and "\x1b" not in info(path)
    facts = json.loads(info(path, "--json"), parse_constant=pytest.fail)
    assert facts["args"]["bomb"] == "<list>" and facts["args"]["3"] == "<Tensor>" and facts["args"]["nan"] == "nan"


@pytest.mark.parametrize("arguments", [["evaluate", "--help"], ["--help"]])
def test_a_reader_that_ends_early_is_no_error(arguments):
    """As in `bitdance evaluate --help | head`."""
    code = f"from bitdance.cli.main import main; main({arguments})"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=small.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 1


def test_a_current_folder_that_was_removed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    with pytest.raises(SystemExit) as end:
        call(lambda arguments: None, [])
    assert end.value.code == 2 and capsys.readouterr().err.startswith("bitdance: the current folder does not exist")


def test_a_very_long_message_is_shortened(run):
    status, text = run("info", "x" * 100 + "/" + "y" * 200 + "/" * 4000 + "z.pt")
    assert status == 2 and text.count("\n") == 1 and " ... " in text and len(text) < 1600
    assert text.startswith("bitdance: ") and text.rstrip().endswith(".")
