"""`bitdance download` against two HTTP servers on the loopback address: one like the hub, one like its storage."""

from __future__ import annotations

import errno
import hashlib
import http.server
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time
import types

import pytest
import torch
from huggingface_hub import constants, file_download

from bitdance.cli.main import main
from bitdance.config import RELEASED_MODELS
from bitdance.runtime.errors import UserError
from bitdance.weights import hub, resolve

CONTENT = {name: hashlib.sha256(name.encode()).digest() * 3000 for name in hub.HUB_FILES.values()}  # 96 KB each
B16 = CONTENT["BitDance_B_16X.pt"]
FOLDER = pathlib.Path("models/BitDance-ImageNet")
TARGET = FOLDER / "BitDance_B_16X.pt"
REFERENCE = pathlib.Path("models/evaluation/VIRTUAL_imagenet512.npz")
TOKEN = "hf_of_a_test"


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` (name -> bytes): with a storage only their metadata and a redirection, as the hub does.

    Each GET of a file takes one entry off `faults`: a number cuts the connection after so many bytes, a negative one
    keeps it open, a three-digit text is a status, "html" a web page, "no range" ignores the range that was asked for.
    """

    daemon_threads = True

    def __init__(self, files, storage=None):
        super().__init__(("127.0.0.1", 0), Handler)
        # Another name than the hub's: the client follows a redirection within a host, and keeps the token.
        self.url = f"http://{'127.0.0.1' if storage else 'localhost'}:{self.server_port}"
        self.files, self.storage = dict(files), storage
        self.faults, self.ranges, self.tokens, self.status = [], [], [], None
        self.stopped = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # connections that a test cuts


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", sent=None, **headers):
        self.send_response(status)
        for key, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if sent is None else body[: abs(sent)])
        if sent is not None and sent < 0:
            self.server.stopped.wait(10)
        self.close_connection = sent is not None

    def do_GET(self):
        server, name = self.server, self.path.partition("?")[0].rpartition("/")[2]
        if name == "agent-harnesses":  # which the client asks for once a day
            return self.answer(404)
        server.tokens.append(self.headers["Authorization"])
        if self.command == "GET":
            server.ranges.append(self.headers["Range"])
        if server.status or name not in server.files:
            return self.answer(server.status or 404, **({} if server.status else {"X_Error_Code": "EntryNotFound"}))
        body = server.files[name]
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        if server.storage:
            linked = {"X_Linked_ETag": etag, "X_Linked_Size": len(body), "X_Repo_Commit": "0" * 40}
            return self.answer(302, ETag='"0"', Location=f"{server.storage.url}/{name}?signature=secret", **linked)
        fault = server.faults.pop(0) if self.command == "GET" and server.faults else None
        if fault == "html":
            return self.answer(200, b"<html>Log in!</html>", Content_Type="text/html; charset=utf-8")
        if isinstance(fault, str) and fault.isdecimal():
            return self.answer(int(fault))
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "") if fault != "no range" else None
        start = int(asked[1]) if asked else 0
        headers = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if asked else {}
        headers |= {"ETag": etag, "Content_Disposition": f'inline; filename="{name}";'}
        sent = fault if isinstance(fault, int) else None
        return self.answer(206 if asked else 200, body[start:], sent, **headers)

    do_HEAD = do_GET


@pytest.fixture
def server(monkeypatch):
    """The hub with all six files, and at `server.storage` where it redirects to; that also has the plain files."""
    names = {name: plain.file for name, plain in hub.PLAIN_FILES.items()}
    storage = Server({**CONTENT, **{file: file.encode() * 1000 for file in names.values()}})
    server = Server(CONTENT, storage)
    plain = {name: hub.PlainFile(f"{storage.url}/plain/{file}", file) for name, file in names.items()}
    monkeypatch.setattr(hub, "PLAIN_FILES", plain)
    yield server
    for one in (server, storage):
        one.stopped.set()
        one.shutdown()
        one.server_close()


@pytest.fixture(autouse=True)
def sleeps(server, tmp_path, monkeypatch):
    """An empty working folder, the hub at the loopback address, short time-outs; pauses are recorded, not made."""
    monkeypatch.chdir(tmp_path)
    use(server.url, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)  # what came of a chunk before a time-out is lost
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("HF_HUB_OFFLINE", False), ("HF_HUB_ETAG_TIMEOUT", 0.3), ("HF_HUB_DOWNLOAD_TIMEOUT", 0.3)):
        monkeypatch.setattr(constants, name, value)
    pauses, sleep = [], time.sleep

    def pause(seconds):
        pauses.append(seconds)
        sleep(0.01)

    monkeypatch.setattr(time, "sleep", pause)
    return pauses


def use(endpoint, monkeypatch):
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    for module in (constants, file_download):  # the latter up to 0.36
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


@pytest.fixture
def run(capsys):
    """Runs the command; returns what it prints."""

    def run(*names):
        main(["download", *names])
        return capsys.readouterr().out

    return run


@pytest.fixture
def fails(capsys):
    """Runs the command, which must end with status 2, one sentence and no file; returns the sentence."""

    def fails(*names):
        before = files()
        with pytest.raises(SystemExit) as stop:
            main(["download", *names])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bitdance: ")]
        assert stop.value.code == 2 and len(lines) == 1 and files() == before
        assert "secret" not in lines[0] and TOKEN not in lines[0]
        return lines[0]

    return fails


def files():
    return sorted(path for path in pathlib.Path().rglob("*") if path.is_file())


# What is fetched, and where it lies


def test_the_names_and_addresses_are_the_published_ones(monkeypatch):
    monkeypatch.undo()
    assert list(hub.HUB_FILES) == ["B-1X", "B-4X", "B-16X", "L-1X", "H-1X", "autoencoder"]
    assert all(plain.url.startswith("https://") for plain in hub.PLAIN_FILES.values())
    assert hub.PLAIN_FILES["reference-256"].url.endswith("/imagenet/256/VIRTUAL_imagenet256_labeled.npz")
    assert hub.PLAIN_FILES["reference-512"].url.endswith("/imagenet/512/VIRTUAL_imagenet512.npz")
    for plain in hub.PLAIN_FILES.values():  # PyTorch's convention for the names of weights
        if prefix := re.search(r"-([0-9a-f]{8})\.pth$", plain.url):
            assert plain.sha256.startswith(prefix[1])


def test_lpips_is_two_files(server, run, fails):
    out = run("lpips")
    assert [path.name for path in files()] == ["lpips-vgg-v0.1.pth", "vgg16-397923af.pth"]
    assert out.count("fetched") == 2
    assert "already downloaded" in run("vgg16", "lpips")


@pytest.mark.parametrize("name", ["B-16X", "b-16x", "BitDance-B-16X", "bitdance-b-16x"])
def test_one_model(server, run, name):
    out = run(name)
    assert files() == [TARGET] and TARGET.read_bytes() == B16
    assert str(TARGET) in out and "SHA-256 as published" in out and len(server.storage.ranges) == 1
    before = len(server.tokens)
    assert resolve.find_weights(name) == resolve.find_weights(str(FOLDER / "BitDance_B_16x.pt")) == TARGET
    assert len(server.tokens) == before


def test_all_and_several_each_once(server, run):
    assert "size as on the server" in run("all", "B-1X", "autoencoder", "reference-512", "--output", "else/where")
    assert {path.name: path.read_bytes() for path in pathlib.Path("else/where").iterdir()} == CONTENT
    assert len(files()) == 7 and REFERENCE.read_bytes() == server.storage.files[REFERENCE.name]
    assert len(server.storage.ranges) == 6 + 2  # of the plain file the headers first


@pytest.mark.parametrize(("name", "file"), [("autoencoder", "ae_d16c32.pt: "), ("reference-512", "")])
def test_a_progress_bar(capsys, monkeypatch, name, file):
    monkeypatch.setenv("TQDM_POSITION", "-1")  # the client shows none where there is no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    main(["download", name])
    assert re.search(rf"{file}100%.*([\d.]+)k/\1k", capsys.readouterr().err)


def test_the_other_spelling_of_the_hub(server, run):
    for one in (server, server.storage):
        one.files = {path.replace("X.pt", "x.pt"): body for path, body in one.files.items()}
    run("B-16X")
    assert files() == [TARGET] and TARGET.read_bytes() == B16
    other = TARGET.rename(FOLDER / "BitDance_B_16x.pt")
    assert str(other) in run("B-16X")
    assert files() == [other] and len(server.storage.ranges) == 1


def test_what_is_there_is_not_fetched_again(server, run):
    run("B-16X", "reference-512")
    before = len(server.storage.ranges)
    assert run("B-16X", "reference-512").count("already downloaded") == 2
    assert len(server.storage.ranges) == before + 1  # the headers of the plain file
    TARGET.write_bytes(B16[:-1])
    assert "fetched" in run("B-16X") and TARGET.read_bytes() == B16


def test_verify_finds_a_damaged_byte(run):
    FOLDER.mkdir(parents=True)
    TARGET.write_bytes(b"\1" + B16[1:])
    assert "already downloaded, size" in run("B-16X")
    assert "fetched" in run("B-16X", "--verify")
    assert TARGET.read_bytes() == B16
    assert "already downloaded, SHA-256 as published" in run("B-16X", "--verify")


def test_what_is_not_what_was_published_is_thrown_away(server, run, fails, monkeypatch):
    digest = hashlib.sha256(B16).hexdigest()
    for prefix in (digest[:8], "00000000"):  # as in the name of Inception's weights
        server.storage.files[f"net-{prefix}.pth"] = B16
        url, file = f"{server.storage.url}/net-{prefix}.pth", f"net-{prefix}.pth"
        monkeypatch.setitem(hub.PLAIN_FILES, "inception", hub.PlainFile(url, file, prefix))
        if prefix in digest:
            assert "SHA-256 as published" in run("inception")
        else:
            assert "is damaged: expected 96000 bytes with SHA-256 00000000" in fails("inception")
    server.storage.files[TARGET.name] = b"\1" + B16[1:]
    assert "BitDance_B_16X.pt is damaged" in fails("B-16X")


# Interruptions


def test_a_broken_connection_goes_on(server, run):
    server.storage.faults = [1000, 2000, 3000, -500]
    run("B-16X")
    assert server.storage.ranges == [None, "bytes=1000-", "bytes=3000-", "bytes=6000-", "bytes=6500-"]
    server.storage.faults = [None, 5000, None]
    run("reference-512")
    assert TARGET.read_bytes() == B16 and REFERENCE.read_bytes() == server.storage.files[REFERENCE.name]


def test_a_connection_that_always_breaks(server, run, fails):
    server.storage.faults = [0] * 20
    assert "cannot download models/BitDance-ImageNet/BitDance_B_16X.pt (127.0.0.1: " in fails("B-16X")
    assert len(server.storage.faults) == 14
    server.storage.faults = []
    run("B-16X")
    assert files() == [TARGET] and TARGET.read_bytes() == B16


def test_what_a_killed_process_left_is_removed(server, run):
    """By the environment, as users have it."""
    server.storage.faults = [-40_000]
    root = str(pathlib.Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "PYTHONPATH": root}
    code = "from bitdance.cli.main import main; main(['download', 'B-16X'])"
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as process:
        while not server.storage.ranges and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    assert server.storage.ranges and files() and not TARGET.exists()
    run("B-16X")
    assert files() == [TARGET] and TARGET.read_bytes() == B16
    assert set(server.tokens) == {f"Bearer {TOKEN}"}


def test_several_at_once_fetch_it_once(server, capsys):
    server.storage.faults = [-3000]
    done: list[hub.DownloadResult] = []
    threads = [threading.Thread(target=lambda: done.extend(hub.download(["B-16X"])), daemon=True) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [file.path for file in done] == [TARGET] * 6 and [file.note[:7] for file in done].count("fetched") == 1
    assert files() == [TARGET] and TARGET.read_bytes() == B16
    assert server.storage.ranges == [None, "bytes=3000-"]
    assert "another process is downloading" in capsys.readouterr().err


def test_the_token_goes_to_the_hub_only(server, run, monkeypatch, tmp_path):
    run("B-16X", "reference-256")
    assert set(server.tokens) == {f"Bearer {TOKEN}"} and set(server.storage.tokens) == {None}
    monkeypatch.delenv("HF_TOKEN")
    for name in ("HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH"):
        monkeypatch.setattr(constants, name, str(tmp_path / "nothing"), raising=False)
    server.tokens.clear()
    run("B-1X")
    assert set(server.tokens) == {None}


# What can go wrong, each a sentence


def test_names_that_are_none(server, fails):
    near = {"B-17X": "B-1", "BitDance-H-4X": "H-1X", "autoencodr": "autoencoder", "inceptoin": "inception",
            "reference256": "reference-256", "al": "all"}  # fmt: skip
    for name, meant in near.items():
        message = fails("autoencoder", name)
        assert f"there is no download {name!r}: did you mean {meant}" in message and "reference-512" in message
    assert "name what to download: B-1X" in fails()
    assert "did you mean" not in fails("zzz")
    assert server.tokens == []


def test_offline(server, run, fails, monkeypatch):
    run("autoencoder")
    before = len(server.tokens)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "already downloaded, not compared" in run("autoencoder")
    (FOLDER / "ae_d16c32.pt").unlink()
    for name, file in (("autoencoder", "ae_d16c32.pt"), ("reference-512", REFERENCE.name)):
        assert f"{file} does not exist, and HF_HUB_OFFLINE disables downloads" in fails(name)
    assert len(server.tokens) == before


@pytest.mark.parametrize("name", ["B-16X", "reference-512"])
def test_no_network_is_seen_at_once(fails, monkeypatch, sleeps, name):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    def redirect(address):
        use(address, monkeypatch)
        plain = hub.PlainFile(f"{address}/{REFERENCE.name}", REFERENCE.name)
        monkeypatch.setitem(hub.PLAIN_FILES, "reference-512", plain)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        redirect(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "(127.0.0.1: timed out): check the network" in fails(name)
    assert "(127.0.0.1: Connection refused): check the network, the proxy" in fails(name)
    redirect("ftp://127.0.0.1")
    assert "(127.0.0.1: " in fails(name)
    with monkeypatch.context() as nameless:
        nameless.setattr(socket, "getaddrinfo", unknown)
        redirect("http://hub.test")
        assert "(hub.test: Name or service not known)" in fails(name)
    assert sleeps == []


@pytest.mark.parametrize("name", ["B-16X", "reference-512"])
def test_statuses(server, fails, sleeps, name):
    url = server.url if name == "B-16X" else server.storage.url
    advice = {404: "moved or renamed", 401: "HF_TOKEN", 403: "HF_TOKEN"}
    for status in (404, 401, 403, 418, 429, 500, 503):
        server.status = server.storage.status = status
        message = fails(name)
        assert f" answers {url}/" in message and f" with HTTP {status}: " in message
        assert advice.get(status, "try again later") in message
    assert sleeps == []


def test_answers_that_are_no_file(server, fails, monkeypatch):
    for fault, words in (("500", "HTTP 500"), ("403", "HTTP 403"), ("404", "HTTP 404"), ("html", "should be of size")):
        server.storage.faults = [fault]
        assert words in fails("B-16X")
    server.storage.faults = ["html"]
    assert "the answer is not the file; does the network ask for a login?" in fails("reference-512")
    server.files.clear()
    assert "/BitDance_B_16X.pt with HTTP 404: it was moved or renamed" in fails("B-16X")
    use(server.storage.url, monkeypatch)  # which has the file, but is no hub
    assert "the answer is not the file; does the network ask for a login?" in fails("B-16X")


def test_a_token_that_cannot_be_one(fails, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_é€secret")
    assert "HF_TOKEN" in fails("B-16X")


def test_too_little_space_is_seen_before_the_first_byte(server, run, fails, monkeypatch):
    free = types.SimpleNamespace(free=5 * len(B16))
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: free)
    assert "there is no space for" in fails("all")
    assert server.storage.ranges == []
    free.free = 6 * len(B16)
    run("all")


@pytest.mark.parametrize("name", ["B-16X", "reference-512"])
def test_a_disk_that_fills_up(fails, monkeypatch, name):
    def fill(url, file, **_):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill_url(url, path, **_):
        with open(path, "wb") as file:
            fill(url, file)

    monkeypatch.setattr(file_download, "http_get", fill)
    monkeypatch.setattr(torch.hub, "download_url_to_file", fill_url)
    assert ": the disk is full; free some space" in fails(name)


def test_a_folder_that_cannot_be(fails, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot make the folder" in fails("B-16X", "--output", "file/models")


# Where other commands name a released model


def test_a_model_and_its_autoencoder_come_by_themselves(server):
    model = resolve.find_weights("BitDance-B-16X")
    assert model == TARGET and TARGET.read_bytes() == B16
    assert len(files()) == 1
    for _ in range(2):
        assert resolve.find_autoencoder_of(model) == FOLDER / "ae_d16c32.pt"
    assert len(server.storage.ranges) == 2


def test_nothing_is_fetched_for_other_files_or_offline(server, monkeypatch):
    with pytest.raises(UserError, match="there is no model"):
        resolve.find_weights("BitDance-B-2X")
    with pytest.raises(UserError, match="bitdance download H-1X --output there"):
        resolve.find_weights("there/BitDance_H_1X.pt")
    with pytest.raises(UserError, match="holds no autoencoder, and there is none beside it"):
        resolve.find_autoencoder_of(pathlib.Path("run/model.safetensors"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in RELEASED_MODELS:
        with pytest.raises(UserError, match="does not exist, and HF_HUB_OFFLINE disables downloads"):
            resolve.find_weights(name)
    assert server.tokens == []


def test_names_resolve_alike(tmp_path, monkeypatch, refused):
    """In every command; a name that is nearly one of ours gets a hint, and `info` downloads nothing."""
    monkeypatch.chdir(tmp_path)
    assert resolve.find_weights("demo").name == "demo_1x.safetensors"
    with pytest.raises(UserError, match=r"there is no model 'Demo': did you mean demo\? name a file"):
        resolve.find_weights("Demo")
    with pytest.raises(UserError, match="model=3 is no name: give a string or a path"):
        resolve.find_weights(3)  # type: ignore[arg-type]
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pathlib.Path, "home", lambda: pytest.fail("there is no home"))
    with pytest.raises(UserError, match=r"there is no model .~nobody-here/model.pt."):
        resolve.find_weights("~nobody-here/model.pt")
    (tmp_path / "some").mkdir()
    for name in ("some/BitDance_B_16X.pt", "some/notes.txt"):
        (tmp_path / name).write_text("")
    assert resolve.find_weights("some") == pathlib.Path("some/BitDance_B_16X.pt")
    (tmp_path / "some" / "other.pt").write_text("")
    with pytest.raises(UserError, match="some holds no weights: name another folder, or a file"):
        resolve.find_weights("some")
    for name in ("BitDance-B-16X", "b-16x"):
        assert f"{name} is not in models/BitDance-ImageNet: download it with `bitdance d" in refused(
            main, ["info", name]
        )


@pytest.mark.parametrize("content", ["{}", '{"run": 3}', '{"run": {"autoencoder": [1]}}', "[" * 10**5, "\xff", "[1]"])
def test_odd_settings_beside_a_model_name_no_autoencoder(tmp_path, content):
    (tmp_path / "settings.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="holds no autoencoder, and there is none beside it"):
        resolve.find_autoencoder_of(tmp_path / "model.safetensors")
