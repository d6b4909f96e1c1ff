"""Wrong input: one sentence that says what, where and what to do, exit status 2, and no incomplete files."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
import small
import torch
from PIL import Image

from bitdance.cli import original_cli
from bitdance.cli.main import call, main
from bitdance.config import AutoencoderConfig
from bitdance.runtime.process_group import World
from bitdance.weights import weights_file


@pytest.fixture
def fails(capsys, tmp_path):
    """Runs a command that must fail with one sentence, besides that of the images found, and status 2; returns it."""
    torch.set_num_threads(1)

    def run(*arguments: object, leaves: tuple[str, ...] = ()) -> str:
        before = listing(tmp_path)
        words = [str(argument) for argument in arguments]
        with pytest.raises(SystemExit) as error:
            if words[0].endswith(".py"):
                call(small.LAUNCHERS[words[0]], words[1:])
            else:
                main(words)
        assert error.value.code == 2
        err = capsys.readouterr().err
        found = re.compile(r"\d+ images? of \d+ class")
        lines = [line for line in err.split("\n") if line and "\r" not in line and not found.search(line)]
        assert len(lines) == 1 and lines[0].startswith("bitdance: "), err
        assert "Traceback" not in err
        assert listing(tmp_path) - before == set(leaves)
        return lines[0].removeprefix("bitdance: ")

    return run


def listing(folder: pathlib.Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def sampling(place: pathlib.Path, output: pathlib.Path) -> list[object]:
    return ["--model", place / "model.safetensors", "--output", output, "--per-class", 1, "--num-steps", 2,
            "--device", "cpu"]  # fmt: skip


def training(place: pathlib.Path, results: pathlib.Path, data: object = None) -> list[object]:
    return ["--autoencoder", place / "autoencoder.safetensors", "--data-path", data or place / "pictures",
            "--image-size", 16, "--output", results, "--dim", 64, "--n-layer", 1, "--head-dim", 64,
            "--head-layers", 1, "--head-ada-ln", 1, "--cls-token-num", 2,
            "--batch-size", 4, "--max-steps", 2, "--num-workers", 1, "--device", "cpu",
            "--precision", "fp32", "--warmup-steps", 0]  # fmt: skip


# ------------------------------------------------------------ classes


def test_an_unknown_class_suggests_the_nearest(place, tmp_path, fails):
    model = small.save_pair(tmp_path, num_classes=1000)
    arguments = ["--model", model, "--output", tmp_path / "out", "--device", "cpu"]
    message = fails("sample", "goldn retriever", *arguments)
    assert "no class 'goldn retriever': did you mean golden retriever (207)" in message
    message = fails("sample", "crane", *arguments)
    assert "'crane' means 2 classes, give the id of one: 134 (" in message and "; 517 (" in message
    assert "class 1000 does not exist: the model has classes 0 to 999" in fails("sample", "207", "1000", *arguments)
    assert "class -1 does not exist" in fails("sample", *arguments, "--", "-1")


def test_classes_without_names(place, tmp_path, fails):
    assert "classes 0 to 2" in fails("sample", "3", *sampling(place, tmp_path / "out"))
    assert "there is no class 'cat'" in fails("sample", "cat", *sampling(place, tmp_path / "out"))


# ------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--per-class", 0], "--per-class 0 is invalid: it must be at least 1"),
        (["--num-images", 4], "leave out either it or --per-class"),
        (["--labels", "random"], "--labels goes with --num-images"),
        (["--batch-size", 0], "--batch-size 0 is invalid: it must be at least 1"),
        (["--seed", -1], "--seed -1 is invalid: it must be an integer between 0 and 4294967295"),
        (["--num-steps", 0], "--num-steps 0 is invalid: it must be an integer from 1 to 10000"),
        (["--cfg-scale", "nan"], "--cfg-scale nan is invalid"),
        (["--chunk-size", -1], "--chunk-size -1 is invalid"),
        (["--threads", 0], "--threads 0 is invalid: it must be at least 1"),
        (["--threads", 100_000], "--threads 100000 is invalid: it must be at most 256"),
        (["--device", "tpu"], "device 'tpu' cannot be used (there is no such device): choose cpu, cuda, cuda:N or mps"),
        (["--device", "cuda:77"], "device 'cuda:77' cannot be used"),
        (["--weights", "ema"], "holds no EMA weights"),
        (["--output", "grid.png"], "--output grid.png is the name of a file: name a folder"),
        (["--output", __file__], "it is a file; choose another place"),
    ],
)
def test_invalid_values_for_sampling(place, tmp_path, fails, arguments, words):
    assert words in fails("sample", *sampling(place, tmp_path / "out"), *arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image-size", 18], "--image-size 18 is invalid: it must be a multiple of 4, of the autoencoder"),
        (["--image-size", -16], "--image-size -16 is invalid"),
        (["--parallel-num", 9], "patches of 3x3 tokens do not divide the 4x4 grid"),
        (["--num-classes", 2], "has 3 classes, more than --num-classes 2"),
        (["--batch-size", 13], "holds 12 images, fewer than one batch of --batch-size 13: "),
        (["--epochs", -1], "--epochs -1 is invalid: it must be at least 1"),
        (["--lr", "nan"], "--lr nan is invalid"),
        (["--device", "tpu"], "device 'tpu' cannot be used"),
    ],
)
def test_invalid_values_for_training(place, tmp_path, fails, arguments, words):
    assert words in fails("train", *training(place, tmp_path / "run"), *arguments)


def test_a_batch_that_processes_cannot_share(place, tmp_path, fails, monkeypatch):
    world = World(0, 3, torch.device("cpu"))
    monkeypatch.setattr("bitdance.training.setup.init_distributed", lambda *_: contextlib.nullcontext(world))
    message = fails("train", *training(place, tmp_path / "run"))
    assert "--batch-size 4 cannot be split over 3 processes: make it a multiple" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--limit", 0], "--limit 0 is invalid"),
        (["--shown", 0], "--shown 0 is invalid"),
        (["--batch-size", -1], "--batch-size -1 is invalid"),
        (["--image-size", 0], "--image-size 0 is invalid"),
        (["--image-size", 18], "--image-size 18 is invalid: it must be a multiple of 4"),
        (["--image-size", 8], "images of 8 x 8 pixels are too small: set --image-size to 12 or more"),
    ],
)
def test_invalid_values_for_reconstruction(place, tmp_path, fails, arguments, words):
    fixed = ["--autoencoder", place / "autoencoder.safetensors", "--output", tmp_path / "out", "--device", "cpu"]
    assert words in fails("reconstruct", "--data-path", place / "pictures", *fixed, *arguments)


# ------------------------------------------------------------ files


def test_a_model_with_another_autoencoder(place, tmp_path, fails):
    wide = small.autoencoder(config=AutoencoderConfig(widths=(32, 32, 32), blocks=1, bits=16))
    weights_file.save(tmp_path / "wide.safetensors", wide)
    words = "the model has 8 bits per token and the autoencoder 16"
    assert words in fails("sample", *sampling(place, tmp_path / "out"), "--autoencoder", tmp_path / "wide.safetensors")
    arguments = ["--ckpt", place / "model.safetensors", "--trained-vae", tmp_path / "wide.safetensors",
                 "--sample-dir", tmp_path / "out", "--num-fid-samples", 4]  # fmt: skip
    assert words in fails("sample_ddp.py", *arguments)


def test_a_model_without_an_autoencoder(place, tmp_path, fails):
    shutil.copy(place / "model.safetensors", tmp_path / "alone.safetensors")
    message = fails("sample", "--model", tmp_path / "alone.safetensors", "--output", tmp_path / "out")
    assert "alone.safetensors holds no autoencoder, and there is none beside it: name one with --autoencoder" in message


def test_files_of_another_kind(place, tmp_path, fails):
    model, autoencoder = place / "model.safetensors", place / "autoencoder.safetensors"
    output = ["--output", tmp_path / "out", "--device", "cpu"]
    assert "holds no model, only autoencoder" in fails("sample", "--model", autoencoder, *output)
    assert "holds no autoencoder, only model" in fails("sample", "--model", model, "--autoencoder", model, *output)
    message = fails("sample", "--model", "nowhere.pt", *output)
    assert "there is no model 'nowhere.pt': name a file, the folder of a run, demo, demo-1x" in message
    assert "demo-16x, or BitDance-B-1X" in message
    assert "there is no autoencoder 'nowhere.pt'" in fails(
        "sample", "--model", model, "--autoencoder", "nowhere.pt", *output
    )
    assert "holds no weights: name another folder" in fails("sample", "--model", place / "pictures", *output)
    assert "too long" in fails("sample", "--model", "x" * 300, *output)
    assert "holds no model" in fails("convert", autoencoder, tmp_path / "out.safetensors", "--part", "model")
    (tmp_path / "text.pt").write_text("hello")
    message = fails("convert", tmp_path / "text.pt", tmp_path / "out.pt")
    assert "text.pt is neither a torch file nor safetensors" in message
    assert "holds no autoencoder" in fails(
        "reconstruct", "--data-path", place / "pictures", "--autoencoder", model, *output
    )


def test_a_released_model_that_was_not_downloaded(tmp_path, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = fails("sample", "--model", "BitDance-B-16X")
    assert "BitDance_B_16X.pt does not exist, and HF_HUB_OFFLINE disables downloads" in message


def test_an_unreadable_image_is_named(place, tmp_path, fails):
    data = shutil.copytree(place / "pictures", tmp_path / "data")
    bad = data / "class-1" / "2.png"
    bad.write_bytes(bad.read_bytes()[:60])
    tried = [*training(place, tmp_path / "run", data), "--max-steps", 3, "--max-bad-images", 0]
    message = fails("train", *tried, leaves=("run", "run/settings.json"))
    assert "--max-bad-images 0" in message and f"cannot read the image {bad}: " in message
    assert message.endswith("repair or remove it.")
    fixed = ["--autoencoder", place / "autoencoder.safetensors", "--output", tmp_path / "out", "--device", "cpu"]
    assert str(bad) in fails("reconstruct", "--data-path", data, *fixed, "--max-bad-images", 0)


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (command, kind)
        for command in ("train", "train-autoencoder", "reconstruct", "train.py")
        for kind in ("empty", "no folder", "text", "empty class")
    ],
)
def test_paths_without_images(place, tmp_path, fails, command, kind):
    data = tmp_path / "data"
    words = {
        "empty": "no images in", "no folder": "there is no such file or folder",
        "text": "not in a format that is read", "empty class": "the class folder 'b' in",
    }[kind]  # fmt: skip
    if kind == "text":
        data.write_text("hello")
    elif kind != "no folder":
        data.mkdir()
    if kind == "empty class":
        (data / "a").mkdir()
        (data / "b").mkdir()
        Image.new("RGB", (16, 16)).save(data / "a" / "a.png")
    autoencoder = place / "autoencoder.safetensors"
    run = tmp_path / "run"
    arguments = {
        "train": training(place, run, data),
        "train-autoencoder": ["--data-path", data, "--output", run, "--image-size", 16, "--widths", 32, 32],
        "reconstruct": ["--data-path", data, "--autoencoder", autoencoder, "--output", run, "--device", "cpu"],
        "train.py": ["--data-path", data, "--results-dir", run, "--trained-vae", autoencoder],
    }[command]
    message = fails(command, *arguments)
    assert words in message and str(data) in message


def test_a_folder_without_samples(place, tmp_path, fails):
    message = fails("nearest", tmp_path, "--data-path", place / "pictures", "--output", tmp_path / "out")
    assert f"no images in {tmp_path}" in message


# ------------------------------------------------------------ launchers


@pytest.mark.parametrize("script", ["train.py", "train_parallel.py"])
def test_training_without_an_autoencoder(place, tmp_path, fails, script):
    message = fails(script, "--data-path", place / "pictures", "--results-dir", tmp_path / "run")
    assert message.startswith("--trained-vae is missing: training needs the autoencoder")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "BitDance-B"], "--model BitDance-B contradicts the checkpoint"),
        (["--image-size", 512], "--image-size 512 contradicts the checkpoint, which has 16"),
        (["--latent-dim", 32], "--latent-dim 32 contradicts the checkpoint, which has 8"),
        (["--down-size", 16], "--down-size 16 contradicts the checkpoint, which has 4"),
        (["--num-classes", 1000], "--num-classes 1000 contradicts the checkpoint, which has 3"),
        (["--cls-token-num", 64], "--cls-token-num 64 contradicts"),
        (["--time-shift", 2], "--time-shift 2.0 contradicts"),
        (["--parallel-num", 4], "--parallel-num 4 contradicts the checkpoint, which has 1"),
        (["--patch-size", 2], "--patch-size 2 is invalid"),
        (["--num-fid-samples", 0], "--num-fid-samples 0 is invalid: it must be from 1 to 100000000"),
        (["--per-proc-batch-size", 0], "--per-proc-batch-size 0 is invalid"),
        (["--ckpt", "nowhere.pt"], "there is no model 'nowhere.pt'"),
        (["--seed", -1], "--seed -1 is invalid: it must be an integer between 0 and 4294967295"),
    ],
)
def test_flags_that_contradict_the_checkpoint(place, tmp_path, fails, arguments, words):
    fixed = ["--ckpt", place / "model.safetensors", "--sample-dir", tmp_path / "out", "--num-fid-samples", 2]
    assert words in fails("sample_ddp_parallel.py", *fixed, *arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--latent-dim", 32], "--latent-dim 32 contradicts"),
        (["--down-size", 16], "--down-size 16 contradicts"),
        (["--patch-size", 2], "--patch-size 2 is invalid"),
        (["--parallel-num", 0], "--parallel-num 0 is invalid: it must be at least 1"),
        (["--time-shift", 0], "--time-shift 0.0 is invalid"),
        (["--image-size", 17], "--image-size 17 is invalid: it must be a multiple of 4"),
    ],
)
def test_invalid_flags_for_training(place, tmp_path, fails, arguments, words):
    fixed = ["--data-path", place / "pictures", "--trained-vae", place / "autoencoder.safetensors",
             "--model", "BitDance-Tiny", "--image-size", 16, "--results-dir", tmp_path / "run",
             "--global-batch-size", 4]  # fmt: skip
    assert words in fails("train_parallel.py", *fixed, *arguments)


# ------------------------------------------------------------ folders and files that cannot be written


def test_a_folder_that_cannot_be_created(place, tmp_path, fails):
    """There is a file instead of a folder, which not even root can write to."""
    (tmp_path / "file").write_text("text")
    inside = tmp_path / "file" / "out"
    words = f"cannot make the folder {inside}"
    assert words in fails("sample", *sampling(place, inside))
    assert f"cannot make the folder {tmp_path / 'file' / 'out'}: {tmp_path / 'file'} is a file; choose" in fails(
        "train", *training(place, inside)
    )
    job = ["--ckpt", place / "model.safetensors", "--sample-dir", inside]
    assert "cannot make the folder" in fails("sample_ddp.py", *job)
    assert "cannot make the folder" in fails("convert", place / "model.safetensors", inside / "model.safetensors")
    assert (tmp_path / "file").read_text() == "text"


@pytest.fixture
def full_disk(monkeypatch):
    """A function that makes every fsync fail as on a full disk, after some that do not."""
    fsync, calls = os.fsync, []

    def fill(allowed: int = 0) -> None:
        def full(descriptor: int) -> None:
            calls.append(descriptor)
            if len(calls) > allowed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", full)

    return fill


def test_no_space(place, tmp_path, fails, full_disk):
    full_disk()
    autoencoder, data = place / "autoencoder.safetensors", place / "pictures"
    message = fails("sample", *sampling(place, tmp_path / "out"), leaves=("out",))
    assert "No space left on device; free some space or choose another place" in message
    message = fails("train", *training(place, tmp_path / "run"), "--max-steps", 1, leaves=("run",))
    assert re.search(rf"cannot write {tmp_path / 'run'}/\S+: No space left on device", message)
    assert "No space" in fails("convert", autoencoder, tmp_path / "copy.safetensors")
    words = ["--data-path", data, "--autoencoder", autoencoder, "--output", tmp_path / "out", "--device", "cpu"]
    assert "No space" in fails("reconstruct", *words)


def test_no_space_for_a_job(place, tmp_path, capsys, full_disk):
    full_disk()
    arguments = ["--ckpt", place / "model.safetensors", "--sample-dir", tmp_path / "out", "--num-fid-samples", 2,
                 "--sample-steps", 2, "--to-npz", "--mixed-precision", "none"]  # fmt: skip
    before = listing(tmp_path)
    with pytest.raises(SystemExit) as error:
        call(original_cli.sample, list(map(str, arguments)))
    assert error.value.code == 2
    assert "No space left on device" in capsys.readouterr().err
    left = {pathlib.PurePath(name).name for name in listing(tmp_path) - before if (tmp_path / name).is_file()}
    assert {name.split(".")[-1] for name in left} == {"log"}


def test_no_space_halfway_through_a_run(place, tmp_path, fails, full_disk):
    """For a checkpoint that is written in the background: the run ends at the next one."""
    full_disk(4)  # after the settings and a checkpoint, each with its folder
    arguments = [*training(place, tmp_path / "run"), "--max-steps", 9, "--save-every", 2, "--log-every", 9,
                 "--preview-every", 0]  # fmt: skip
    message = fails("train", *arguments, leaves=("run", "run/settings.json", "run/checkpoint-0000002.safetensors"))
    assert f"cannot write {tmp_path / 'run'}/checkpoint-0000004.safetensors: No space left on device" in message


def test_no_space_for_the_log(place, tmp_path, fails, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs a device that is always full")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").symlink_to("/dev/full")
    message = fails(
        "train", *training(place, tmp_path / "run"), "--max-steps", 1, "--log-every", 1, leaves=("run/settings.json",)
    )
    assert f"cannot write {tmp_path / 'run' / 'log.jsonl'}: No space left on device" in message


def test_files_that_may_not_grow(place, tmp_path):
    """A limit on the size of files has the effect of a full disk: no part of the file is left."""
    code = "from bitdance.cli.main import main; main()"

    def limit() -> None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    result = subprocess.run(
        [sys.executable, "-c", code, "convert", str(place / "model.safetensors"), str(tmp_path / "copy.safetensors")],
        cwd=small.ROOT, capture_output=True, text=True, preexec_fn=limit, timeout=300,
    )  # fmt: skip
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith(f"bitdance: cannot write {tmp_path / 'copy.safetensors'}")
    assert list(tmp_path.iterdir()) == []


def test_names_from_files_cannot_control_the_terminal(tmp_path, capsys):
    images = small.pictures(tmp_path / "images")
    (images / "class-0" / "\x1b[31m.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as stop:
        main(["encode", "--data-path", str(images), "--output", str(tmp_path / "out"), "--autoencoder", "demo",
              "--image-size", "32", "--max-bad-images", "0"])  # fmt: skip
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "\\x1b[31m.png" in err and "\x1b" not in err


def test_names_that_are_no_text(place, tmp_path, monkeypatch):
    folder = tmp_path / os.fsdecode("数据".encode("gbk"))
    shutil.copytree(place / "pictures", folder / os.fsdecode("猫".encode("gbk")))
    (folder / os.fsdecode("猫".encode("gbk")) / os.fsdecode("狗.png".encode("gbk"))).write_bytes(b"damaged")
    np.savez(tmp_path / os.fsdecode(b"\xd1\xf9.npz"), np.zeros((4, 16, 16, 3), np.uint8))
    output, autoencoder = folder.with_name(folder.name + "-out"), place / "autoencoder.safetensors"
    for command in (
        ["reconstruct", "--data-path", folder, "--autoencoder", autoencoder],
        ["encode", "--data-path", folder, "--autoencoder", autoencoder, "--image-size", 16],
        ["nearest", tmp_path / os.fsdecode(b"\xd1\xf9.npz"), "--data-path", folder],
    ):
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))  # as on a terminal, without escapes
        main([str(word) for word in (*command, "--output", output)])
        sys.stdout.flush()
        assert sys.stdout.buffer.getvalue()


@pytest.mark.parametrize("command", ["nearest s", "reconstruct"])
def test_commands_of_one_process_refuse_torchrun(command, capsys, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--data-path", "d"])
    assert stop.value.code == 2
    assert "this command runs in one process, not in 2: start it without torchrun." in capsys.readouterr().err


def test_a_tilde_within_an_argument_is_the_home_folder(tmp_path, monkeypatch):
    """The shell leaves that of --output=~/out as it is, and a folder "~" would be dangerous to remove."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    main(["sample", "cat", "--num-steps", "1", "--output=~/out", "--threads", "1"])
    assert (tmp_path / "home" / "out" / "grid.png").is_file() and not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("reconstruct --data-path {} --image-size 9000", "--image-size 9000 is invalid: it must be at most 8192"),
        ("evaluate {} --image-size 9000 --reference none", "--image-size 9000 is invalid: it must be at most 8192"),
        ("evaluate {} --reference none --output {}", "is a folder: name a file, for the report"),
        ("train-autoencoder --data-path {} --init-part decoder", "--init-part goes with --init-from"),
        (
            "train-autoencoder --data-path {} --perceptual-network lpips",
            "goes with --perceptual-weight: set it above 0",
        ),
        ("train-autoencoder --data-path {} --decoder-only", "--decoder-only needs --init-from"),
        ("train-autoencoder --data-path {} --gray-code", "--gray-code is an order of the levels of --bit-depths"),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(tmp_path, monkeypatch, capsys, arguments, words):
    pictures = small.pictures(tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments.replace("{}", str(pictures)).split())
    assert stop.value.code == 2 and words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


@pytest.mark.parametrize("command", ["train", "train-autoencoder", "encode"])
@pytest.mark.parametrize("folder", ["", "run"])
def test_results_among_the_images_are_refused(place, fails, command, folder):
    data = place / "pictures"
    autoencoder = () if command == "train-autoencoder" else ("--autoencoder", "demo")
    length = () if command == "encode" else ("--epochs", "1")
    message = fails(command, "--data-path", data, "--output", data / folder, *autoencoder, *length)
    assert "is, or is in, the folder of the data" in message


def test_a_run_folder_among_the_held_out_images_is_refused(place, fails, tmp_path):
    held_out = place / "pictures"
    small.pictures(tmp_path / "others", each=4, side=32)
    lengths = ("--val-path", held_out, "--output", held_out / "run", "--epochs", "1")
    assert "is, or is in, the folder of the data" in fails("train", "--data-path", tmp_path / "others", *lengths)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_name_that_is_not_utf8(fails, tmp_path):
    path = pathlib.Path(os.fsdecode(os.fsencode(tmp_path) + b"/u\xff.safetensors"))
    shutil.copy(small.ROOT / "bitdance" / "assets" / "demo_16x.safetensors", path)
    assert "its name is not UTF-8; rename it" in fails("info", path)
