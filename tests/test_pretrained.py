"""Folders with a model card, and the hub: against a server on the loopback address that speaks its protocol."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import pathlib
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import small
import torch
from huggingface_hub import constants

import bitdance
from bitdance.cli.main import main
from bitdance.data.class_names import ClassNames
from bitdance.runtime.atomic_files import NEW
from bitdance.runtime.errors import UserError
from bitdance.sampling.pipeline import Pipeline, load_pipeline
from bitdance.sampling.pretrained import MARK, _card
from bitdance.weights import weights_file
from bitdance.weights.resolve import find_weights

COMMIT = "1" * 40


class Hub(http.server.ThreadingHTTPServer):
    """A hub of one repository, u/n, that takes one upload. `status` is answered to everything if it is set."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.created: dict[str, object] = {}
        self.status = 0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, content: object, status: int = 200, **headers: object) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(self.server.status or status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        server, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Authorization"] == "Bearer hf_of_a_test"
        if self.path == "/api/repos/create":
            server.created = json.loads(body)
            self.answer({"url": f"{server.url}/u/n"})
        elif self.path == "/api/models/u/n/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if name.endswith(".safetensors") else "regular" for name in names]
            self.answer({"files": [
                {"path": name, "uploadMode": mode, "shouldIgnore": False}
                for name, mode in zip(names, modes, strict=True)
            ]})  # fmt: skip
        elif self.path == "/u/n.git/info/lfs/objects/batch":
            self.answer({"transfer": "basic", "objects": [
                {**file, "actions": {"upload": {"href": f"{server.url}/put/{file['oid']}", "header": {}}}}
                for file in json.loads(body)["objects"]
            ]})  # fmt: skip
        elif self.path == "/api/models/u/n/commit/main":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    server.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    server.files[value["path"]] = server.objects[value["oid"]]
            self.answer({"commitUrl": f"{server.url}/u/n/commit/{COMMIT}", "commitOid": COMMIT, "hookOutput": ""})
        else:
            self.answer({}, 200 if self.path == "/api/validate-yaml" else 404)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.objects[self.path.rpartition("/")[2]] = content
        self.answer({})

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/u/n/tree/"):
            self.answer([{"type": "file", "path": name, "size": 1, "oid": "0"} for name in self.server.files])
            return
        if self.path.startswith("/api/models/u/n"):
            files = [{"rfilename": name} for name in self.server.files]
            self.answer({"id": "u/n", "sha": COMMIT, "siblings": files})
            return
        content = self.server.files.get(self.path.partition("?")[0].rpartition("/")[2])
        if content is None:
            self.answer({}, 404)
        else:
            self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[Hub]:
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def pipeline(tmp_path: pathlib.Path) -> Pipeline:
    small.save_pair(tmp_path)
    pipe = load_pipeline(tmp_path / "model.safetensors", device="cpu", dtype=torch.bfloat16)
    pipe.defaults = type(pipe.defaults)(cfg_scale=2.5, num_steps=2)
    return pipe


def test_a_folder_holds_exact_networks_samples_and_a_card(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "mine", metrics={"FID": 12.345678})
    again = Pipeline.from_pretrained(tmp_path / "mine", device="cpu", dtype=torch.float32)
    expected = load_pipeline(tmp_path / "model.safetensors", device="cpu", dtype=torch.float32)
    assert again.defaults.cfg_scale == 2.5
    assert np.array_equal(
        again([0, 1], num_steps=2, output="np"), expected([0, 1], num_steps=2, cfg_scale=2.5, output="np")
    )
    card = (tmp_path / "mine" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: bitdance\n") and "| FID | 12.35 |" in card and "samples.png" in card
    assert 'load_pipeline(".")' in card
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        "README.md", "autoencoder.safetensors", "model.safetensors", "samples.png"]  # fmt: skip
    pipeline.save_pretrained(tmp_path / "mine")  # its own folder is replaced
    assert "FID" not in (tmp_path / "mine" / "README.md").read_text()


@pytest.mark.parametrize("card", ["mine", "x" * 2**20 + MARK, MARK])
def test_a_folder_of_others_is_left_as_it_is(pipeline, tmp_path, card):
    (tmp_path / "other" / "model.safetensors").mkdir(parents=True)
    (tmp_path / "other" / "README.md").write_text(card)
    if card != MARK:
        (tmp_path / "other" / "model.safetensors").rmdir()
    with pytest.raises(UserError, match="holds other files: name a new folder"):
        pipeline.save_pretrained(tmp_path / "other")
    assert (tmp_path / "other" / "README.md").read_text() == card


def test_a_read_only_folder_is_found_before_sampling(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # root may write anywhere
    monkeypatch.setattr(Pipeline, "__call__", lambda *_, **__: pytest.fail("found only after sampling"))
    with pytest.raises(UserError, match="cannot be written; choose another place"):
        pipeline.save_pretrained(tmp_path / "mine")


def test_a_card_shows_class_names_as_they_are(pipeline, tmp_path):
    pipeline.classes = ClassNames.from_labels(["<script>", "a\nb", "![x](y)", "\ud800", "hen_1"])
    text = _card(pipeline, {}, ".")
    assert r"Classes: \<script\>, 'a\\nb', \!\[x\](y), '\\ud800', hen\_1." in text and text.isascii()


def test_a_folder_is_whole_or_can_be_written_again(pipeline, tmp_path, monkeypatch):
    def fail(*arguments, **others):
        raise UserError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="full"):
        patch.setattr("bitdance.sampling.pretrained.write_png", fail)
        pipeline.save_pretrained(tmp_path / "mine")
    assert not list((tmp_path / "mine").iterdir())
    (tmp_path / "mine" / f"{NEW}of-a-killed-process").mkdir()
    pipeline.save_pretrained(tmp_path / "mine")
    assert len(list((tmp_path / "mine").iterdir())) == 4


def test_a_model_goes_to_the_hub_and_back(pipeline, hub, tmp_path, monkeypatch):
    assert pipeline.push_to_hub("u/n", private=True) == f"{hub.url}/u/n"
    assert hub.created["name"] == "n" and hub.created["visibility"] == "private"
    assert set(hub.files) == {"README.md", "autoencoder.safetensors", "model.safetensors", "samples.png"}
    found = load_pipeline("u/n", device="cpu", dtype=torch.float32)
    expected = weights_file.load_model(tmp_path / "model.safetensors")
    assert weights_file.digest(found.model.state_dict()) == weights_file.digest(expected.state_dict())
    assert found.defaults.cfg_scale == 2.5
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what is in the cache needs no hub
    assert bitdance.load_model("u/n").config == found.model.config


def test_what_the_hub_refuses(pipeline, hub, monkeypatch):
    for status, words in ((401, "HTTP 401: it may require a token in HF_TOKEN"), (404, "HTTP 404: it was moved")):
        hub.status = status
        for call in (lambda: pipeline.push_to_hub("u/n"), lambda: load_pipeline("u/n")):
            with pytest.raises(UserError, match=words):
                call()
    hub.status = 0
    hub.files = dict.fromkeys(("BitDance_B_1x.pt", "BitDance_B_4x.pt", "ae_d16c32.pt"), b"x")
    with pytest.raises(UserError, match="u/n on the hub holds 2 models: download one"):
        load_pipeline("u/n")
    with pytest.raises(UserError, match="'n' is no name on the hub"):
        pipeline.push_to_hub("n")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="no file or folder u/n, nor a download"):
        load_pipeline("u/n")


def test_a_folder_of_the_original_s_files_loads_as_ours_does(tmp_path):
    model, autoencoder = tmp_path / "BitDance_B_1x.pt", tmp_path / "ae_d16c32.pt"
    for path in (model, autoencoder):
        path.touch()
    assert find_weights(tmp_path) == model and find_weights(tmp_path, "autoencoder") == autoencoder
    (tmp_path / "BitDance_B_4x.pt").touch()
    with pytest.raises(UserError, match="holds no weights: name another folder"):
        find_weights(tmp_path)


def test_torch_hub(capsys):
    pipe = torch.hub.load(small.ROOT, "pipeline", "demo", source="local", device="cpu")
    assert pipe(0, num_steps=1)[0].size == (32, 32)


def test_the_command(tmp_path, capsys, hub, refused):
    run = small.save_pair(tmp_path).parent
    settings = {"run": {"kind": "model", "last_step": 9, "steps_per_epoch": 3}, "train": {"batch_size": 4}}
    (run / "settings.json").write_text(json.dumps(settings))
    lines = [{"step": 6, "time": 0.5, "loss": 1.5, "val_loss": 1.25}, {"step": 9, "time": 1.5, "eval_fid": 20.5}]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--model", str(run), "--device", "cpu", "--threads", "1"]
    main(["publish", "--output", str(tmp_path / "out"), *options])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| training steps | 9 |" in card and "| validation loss | 1.25 |" in card and "| FID | 20.5 |" in card
    main(["publish", "u/n", *options])
    assert hub.files["README.md"].decode() == card.replace('"."', '"u/n"') and hub.created["visibility"] == "public"
    assert f"published {hub.url}/u/n" in capsys.readouterr().out
    for arguments in (options, ["u/n", "--output", "x", *options]):
        assert "say where to publish" in refused(main, ["publish", *arguments])
