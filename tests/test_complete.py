"""Completion of images: kept tokens, their order, and the command."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
import small
import torch
from PIL import Image

from bitdance.cli.main import main
from bitdance.models.quantizer import unpack
from bitdance.models.tokens import grid_from_tokens, positions
from bitdance.runtime.errors import UserError
from bitdance.sampling.pipeline import Pipeline


def make(parallel_num: int) -> Pipeline:
    return Pipeline(small.model(parallel_num=parallel_num), small.autoencoder())


def sample_bits(pipe: Pipeline, labels: list[int], seed: int = 5, **settings: object) -> torch.Tensor:
    """(B, C, h, w) of a sampling with guidance, whose first tokens are shared as those of a completion are."""
    config = pipe.sampling_config(2.0, 4, share_first=True, **settings)
    packed = pipe.generate(range(len(labels)), labels, config, seed).bits
    return grid_from_tokens(unpack(torch.from_numpy(packed)), pipe.model.config.patch).float()


@pytest.mark.parametrize("p", [1, 4, 16])
def test_the_completion_of_a_sample_with_its_noise_is_the_sample(p):
    pipe, seen = make(p), []
    bits = sample_bits(pipe, [0, 2, 1])
    expected = pipe.decode(bits, output="np")
    for kept in range(0, 16, p):
        found = pipe.complete(bits, [0, 2, 1], keep_tokens=kept, seed=5, cfg_scale=2.0, num_steps=4, share_first=True,
                              output="np", callback=lambda i, n, tokens: seen.append((i, tokens.shape[1])))  # fmt: skip
        assert np.array_equal(found, expected)
    assert seen == [(i + 1, (i + 1) * p) for i in range(16 // p)] * (16 // p), "each step is reported"


def test_rows_masks_and_candidates_keep_what_they_say():
    pipe = make(4)
    bits = sample_bits(pipe, [0, 2])
    seen: list[torch.Tensor] = []
    settings = {"num_steps": 3, "solver": "euler-maruyama", "callback": lambda i, n, tokens: seen.append(tokens)}
    images = pipe.complete(bits, 1, keep_rows=2, candidates=3, batch_size=4, **settings)
    assert len(images) == 6
    full = torch.cat([tokens for tokens in seen if tokens.shape[1] == 16])
    grids = grid_from_tokens(full, 2)  # (6, C, 4, 4)
    assert torch.equal(grids[:, :, :2], bits.repeat_interleave(3, 0)[:, :, :2])
    assert len({grid[:, 2:].numpy().tobytes() for grid in grids}) >= 4, "2 if candidates had one noise"
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1, 2] = mask[3, 0] = True
    seen.clear()
    pipe.complete(bits[:1], 0, mask=mask.numpy(), **settings)
    grid = grid_from_tokens(seen[-1], 2)
    assert torch.equal(grid[0][:, mask], bits[0][:, mask]) and not torch.equal(grid[0], bits[0])
    assert positions(4, 2)[4].tolist() == [0, 2], "the second patch is to the right of the first"


def test_what_cannot_be_completed_is_refused():
    pipe = make(4)
    image = Image.new("RGB", (40, 30), "red")
    assert pipe.complete(image, 0, keep_rows=2, num_steps=2)[0].size == (16, 16)
    for settings, words in (
        ({}, "give either `keep_rows`"),
        ({"keep_rows": 2, "keep_tokens": 4}, "give either `keep_rows`"),
        ({"keep_rows": 3}, "keep_rows=3 is invalid: it must be an integer from 0 to 2, a multiple of 2"),
        ({"keep_rows": 4}, "keep_rows=4 is invalid"),
        ({"keep_tokens": 6}, "a multiple of 4, since the model samples 4 tokens at once"),
        ({"mask": np.ones((4, 4))}, "bool of shape"),
        ({"mask": "mask.png"}, "bool of shape"),
        ({"mask": np.array([["a"] * 4] * 4)}, "bool of shape"),
        ({"mask": np.ones((2, 2), bool)}, r"bool of shape \(4, 4\)"),
        ({"keep_rows": 2, "candidates": 0}, "candidates=0"),
        ({"keep_rows": 2, "candidates": True}, "candidates=True"),
    ):
        with pytest.raises(UserError, match=words):
            pipe.complete(image, 0, **settings)
    with pytest.raises(UserError, match="3 classes for 1 images"):
        pipe.complete(image, [0, 1, 2], keep_rows=2)
    with pytest.raises(ValueError, match=r"must be -1 or \+1"):
        pipe.complete(torch.full((1, 8, 4, 4), torch.nan), 0, keep_rows=2)
    with pytest.raises(ValueError, match="4 x 4 tokens"):
        pipe.complete(np.zeros((32, 32, 3), np.uint8), 0, keep_rows=2)


def test_known_tokens_follow_their_images_when_memory_runs_out(monkeypatch):
    pipe = make(1)
    bits = sample_bits(pipe, [0, 2, 1])
    expected = pipe.decode(bits, output="np")
    small.limit_memory(monkeypatch, lambda ids: len(ids) > 1)
    found = pipe.complete(bits, [0, 2, 1], keep_tokens=7, seed=5, cfg_scale=2.0, num_steps=4, share_first=True,
                          output="np")  # fmt: skip
    assert np.array_equal(found, expected)


@pytest.fixture
def command(tmp_path, capsys):
    model = small.save_pair(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 16, 3), np.uint8)).save(tmp_path / "photo.png")
    black = Image.new("L", (64, 64))
    black.paste(255, (0, 0, 3, 3))
    black.save(tmp_path / "mask.png")
    Image.new("L", (64, 64)).save(tmp_path / "black.png")

    def run(*arguments: str, image: str = "photo.png") -> tuple[str, pathlib.Path]:
        flags = {"model": model, "output": tmp_path / "out", "num_steps": 2, "candidates": 3, "device": "cpu"}
        try:
            main(["complete", str(tmp_path / image), *small.flags(flags), *arguments])
        except SystemExit as error:
            assert error.code == 2
        output = capsys.readouterr()
        return output.out + "".join(output.err.splitlines(True)[-1:]), tmp_path / "out"

    return run


def test_the_command_writes_completions_and_their_settings(command, tmp_path):
    text, folder = command("--class", "1", "--seed", "3")
    assert "3 completions of" in text
    record = json.loads((folder / "samples.json").read_text())
    assert [image["class"] for image in record["images"]] == [1, 1, 1] and record["seed"] == 3
    images = [Image.open(folder / image["file"]) for image in record["images"]]
    known = {"model": f"{tmp_path.name}-model", "seed": 3, "class": 1, "number": 2, "num_steps": 2}
    known["kept_tokens"] = list(range(8))
    assert json.loads(images[2].text["bitdance"]).items() >= known.items()
    assert all(image.size == (16, 16) for image in images) and len({image.tobytes() for image in images}) == 3
    grid = np.asarray(Image.open(folder / "grid.png").convert("L"))
    assert (grid == 128).sum() > 96 * 40, "what is sampled is grey in the second image"
    command("--class", "1", "--mask", str(tmp_path / "mask.png"), "--candidates", "1")
    grid = np.asarray(Image.open(folder / "grid.png").convert("L"))
    assert 24**2 <= (grid == 128).sum() < 2 * 24**2, "one token of 16"
    assert not (folder / record["images"][2]["file"]).exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--class", "dgo"], "there is no class 'dgo'"),
        ([], "--class is missing"),
        (["--class", "1", "--keep-rows", "4"], "--keep-rows 4 is invalid: it must be an integer from 0 to 3"),
        (["--class", "1", "--keep-rows", "0"], "nothing is to be kept: change --keep-rows or --mask"),
        (["--class", "1", "--candidates", "0"], "--candidates 0 is invalid"),
        (["--class", "1", "--cfg-scale", "nan"], "--cfg-scale nan is invalid"),
        (["--class", "1", "--num-steps", "0"], "--num-steps 0 is invalid"),
        (["--class", "1", "--output", "x.png"], "--output x.png is the name of a file"),
        (["--class", "1", "--output", "x.JPEG"], "--output x.JPEG is the name of a file"),
        (["--class", "1", "--mask", "{}/gone.png"], "No such file or directory; check the path and its permissions."),
        (["--class", "1", "--mask", "{}/black.png"], "nothing is to be sampled"),
        (["--class", "1", "--mask", "{}/model.safetensors"], "model.safetensors"),
        (["--class", "1", "--mask", "{}/mask.png", "--keep-rows", "2"], "leave one of them out"),
    ],
)
def test_what_the_command_refuses(command, tmp_path, arguments, words):
    text, folder = command(*(argument.format(tmp_path) for argument in arguments))
    assert words in text and text.startswith("bitdance: ") and not folder.exists()
