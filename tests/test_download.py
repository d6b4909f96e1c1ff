"""`bitdance download` against real HTTP servers on the loopback address: one like the hub, one like its storage."""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import http.server
import io
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import types

import pytest
from huggingface_hub import constants

from bitdance.cli.main import main
from bitdance.config import RELEASED_MODELS
from bitdance.runtime.errors import UserError
from bitdance.weights import hub, resolve

RESOLVE = f"/{hub.REPOSITORY}/resolve/main/"
CONTENT = {name: hashlib.sha256(name.encode()).digest() * 3000 for name in hub.HUB_FILES.values()}  # 96 KB each
B16 = CONTENT["BitDance_B_16X.pt"]
FOLDER = pathlib.Path("models/BitDance-ImageNet")
TARGET = FOLDER / "BitDance_B_16X.pt"


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` (path -> bytes) with ETags and ranges; `linked` ones by way of the storage, as the hub does.

    Each GET of a file takes one entry off `faults`: a number cuts the connection after so many bytes, "stall" also
    keeps it open, a three-digit text is a status, "html" a web page, "no range" ignores the range that was asked for.
    """

    daemon_threads = True
    storage: Server | None = None
    token: str | None = None
    http_error: int | None = None
    redirect: str | None = None
    headers: types.MappingProxyType[str, str] = types.MappingProxyType({})
    etag = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.faults: list[object] = []
        self.log: list[tuple[str, str, dict[str, str]]] = []
        self.hold = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def gets(self) -> list[dict[str, str]]:
        return [headers for method, _, headers in self.log if method == "GET"]

    def handle_error(self, request, client_address):
        pass  # connections that a test cuts


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_):
        pass

    def answer(self, status, headers=(), body=b""):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        server, path = self.server, self.path.partition("?")[0]
        server.log.append((self.command, self.path, {key.lower(): value for key, value in self.headers.items()}))
        if server.http_error:
            return self.answer(server.http_error)
        if server.redirect:
            return self.answer(302, {"Location": server.redirect})
        if server.token and self.headers["Authorization"] != f"Bearer {server.token}":
            return self.answer(401, {"X-Error-Code": "RepoNotFound"})
        body = server.files.get(path)
        if body is None:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        sha = hashlib.sha256(body).hexdigest()
        if server.storage:
            server.storage.files.setdefault(f"/blob/{path.rpartition('/')[2]}", body)
            linked = {"X-Linked-ETag": f'"{sha}"', "X-Linked-Size": str(len(body)), "X-Repo-Commit": "0" * 40}
            place = f"{server.storage.url}/blob/{path.rpartition('/')[2]}?signature=secret"
            return self.answer(302, {**linked, "ETag": '"of the pointer"', "Location": place})
        return self.file(body, f'"{sha[:8]}"' if server.etag else None)

    do_HEAD = do_GET

    def file(self, body, etag):
        if self.command == "HEAD" and self.path.startswith("/blob/"):
            return self.answer(403)  # addresses that are signed for a GET are for nothing else
        fault = self.server.faults.pop(0) if self.command == "GET" and self.server.faults else None
        if fault == "html":
            return self.answer(200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>Log in!</html>")
        if isinstance(fault, str) and fault.isdecimal():
            return self.answer(int(fault))
        headers = {**({"ETag": etag} if etag else {}), **self.server.headers}
        status, asked = 200, re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        if asked and fault != "no range" and self.headers["If-Range"] in (None, etag):
            status, start = 206, int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            body = body[start:]
        if not isinstance(fault, tuple | int):
            return self.answer(status, headers, body)
        sent, stalls = fault if isinstance(fault, tuple) else (fault, None)
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[:sent])
        self.wfile.flush()
        if stalls:
            self.server.hold.wait(10)
        self.close_connection = True


@pytest.fixture
def server():
    """The hub with all six files, and at `server.storage` where it sends one on to."""
    both = Server(), Server()
    both[0].storage = both[1]
    both[0].files = {RESOLVE + name: body for name, body in CONTENT.items()}
    yield both[0]
    for one in both:
        one.hold.set()
        one.shutdown()
        one.server_close()


@pytest.fixture(autouse=True)
def setting(server, tmp_path, monkeypatch):
    """An empty working folder, the hub at the loopback address, no waiting, nobody's token."""
    monkeypatch.chdir(tmp_path)
    use(server.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "WAITS", (0, 0, 0))
    monkeypatch.setattr(hub, "TIMEOUT", 0.5)
    plain = {name: f"{server.storage.url}/plain/{url.rpartition('/')[2]}" for name, url in hub.PLAIN_FILES.items()}
    monkeypatch.setattr(hub, "PLAIN_FILES", plain)
    for url in plain.values():
        server.storage.files[url.removeprefix(server.storage.url)] = url[-20:].encode() * 1000


def use(endpoint, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)


@pytest.fixture
def run(capsys):
    """Runs the command; returns what it prints."""

    def run(*names):
        main(["download", *names])
        return capsys.readouterr().out

    return run


@pytest.fixture
def fails(capsys):
    """Runs the command, which must end with status 2 and one sentence; returns that."""

    def fails(*names):
        with pytest.raises(SystemExit) as stop:
            main(["download", *names])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bitdance: ")]
        assert stop.value.code == 2 and len(lines) == 1
        assert all(path.suffix == ".part" for path in files())
        return lines[0]

    return fails


def files():
    return sorted(path for path in pathlib.Path().rglob("*") if path.is_file())


def digest_of(body):
    return hashlib.sha256(body).hexdigest()


# What is fetched, and where it lies


def test_the_names_and_addresses_are_the_published_ones(monkeypatch):
    monkeypatch.undo()
    assert list(hub.HUB_FILES) == ["B-1X", "B-4X", "B-16X", "L-1X", "H-1X", "autoencoder"]
    assert all(url.startswith("https://") for url in hub.PLAIN_FILES.values())
    assert hub.PLAIN_FILES["reference-256"].endswith("/imagenet/256/VIRTUAL_imagenet256_labeled.npz")
    assert hub.PLAIN_FILES["reference-512"].endswith("/imagenet/512/VIRTUAL_imagenet512.npz")


@pytest.mark.parametrize("name", ["B-16X", "BitDance-B-16X", "bitdance-b-16x"])
def test_one_model(server, run, name):
    out = run(name)
    assert files() == [TARGET] and TARGET.read_bytes() == B16
    assert str(TARGET) in out and "SHA-256 as published" in out
    assert [headers.get("range") for headers in server.storage.gets()] == [None]


def test_all_and_several_each_once(server, run):
    run("all", "B-1X", "autoencoder", "reference-256")
    evaluation = pathlib.Path("models/evaluation/VIRTUAL_imagenet256_labeled.npz")
    assert {path.name: path.read_bytes() for path in FOLDER.iterdir()} == CONTENT
    assert files() == sorted([*(FOLDER / name for name in CONTENT), evaluation])
    assert len(server.storage.gets()) == 7


def test_another_folder(run, tmp_path):
    run("autoencoder", "--folder", "elsewhere/deep")
    assert files() == [pathlib.Path("elsewhere/deep/ae_d16c32.pt")]


def test_a_progress_bar(capsys):
    main(["download", "autoencoder"])
    assert re.search(r"ae_d16c32\.pt: 100%.*96\.0k/96\.0k", capsys.readouterr().err)


def test_the_other_spelling_of_the_hub(server, run):
    server.files = {path.replace("X.pt", "x.pt"): body for path, body in server.files.items()}
    run("B-16X")
    assert files() == [TARGET] and TARGET.read_bytes() == B16


def test_a_file_in_the_other_spelling_is_not_fetched_again(server, run):
    run("B-16X")
    other = TARGET.rename(FOLDER / "BitDance_B_16x.pt")
    assert str(other) in run("B-16X")
    assert files() == [other] and len(server.storage.gets()) == 1


def test_what_is_whole_is_not_fetched_again(server, run):
    run("B-16X", "reference-512")
    before = len(server.storage.gets())
    assert run("B-16X", "reference-512").count("was there already") == 2
    assert len(server.storage.gets()) == before


def test_a_file_of_another_size_is_replaced(run):
    FOLDER.mkdir(parents=True)
    TARGET.write_bytes(B16[:-1])
    run("B-16X")
    assert files() == [TARGET] and TARGET.read_bytes() == B16


def test_verify_finds_a_damaged_byte(run):
    FOLDER.mkdir(parents=True)
    TARGET.write_bytes(b"\1" + B16[1:])
    assert "was there already, size" in run("B-16X")
    assert "fetched" in run("B-16X", "--verify")
    assert TARGET.read_bytes() == B16
    assert "was there already, SHA-256 as published" in run("B-16X", "--verify")


# Digests


def test_inception_is_checked_by_the_digest_in_its_name(server, run, fails, monkeypatch):
    weights = b"weights" * 999
    for digits, works in ((digest_of(weights)[:8], True), ("00000000", False)):
        server.storage.files[f"/plain/net-{digits}.pth"] = weights
        monkeypatch.setitem(hub.PLAIN_FILES, "inception", f"{server.storage.url}/plain/net-{digits}.pth")
        if works:
            assert "SHA-256 as published" in run("inception")
            pathlib.Path(f"models/evaluation/net-{digits}.pth").unlink()
        else:
            assert "is damaged: its SHA-256 is not the published 00000000" in fails("inception")
    assert files() == []


def test_what_is_not_what_the_hub_announced_is_thrown_away(server, fails):
    server.storage.files["/blob/BitDance_B_16X.pt"] = b"\1" + B16[1:]
    assert "BitDance_B_16X.pt is damaged" in fails("B-16X")
    assert files() == []


def test_the_md5_of_a_plain_file(server, run, fails):
    body = server.storage.files["/plain/VIRTUAL_imagenet512.npz"]
    server.storage.headers = {"Content-MD5": base64.b64encode(hashlib.md5(body).digest()).decode()}
    assert "MD5 as published" in run("reference-512")
    pathlib.Path("models/evaluation/VIRTUAL_imagenet512.npz").unlink()
    server.storage.headers = {"Content-MD5": base64.b64encode(bytes(16)).decode()}
    assert "its MD5 is not the published" in fails("reference-512")


# Interruptions


def test_a_cut_connection_goes_on_where_it_broke(server, run):
    server.storage.faults = [1000, 2000, "503", 3000]
    run("B-16X")
    assert [headers.get("range") for headers in server.storage.gets()] == [
        None, "bytes=1000-", "bytes=3000-", "bytes=3000-", "bytes=6000-"
    ]  # fmt: skip
    assert files() == [TARGET] and TARGET.read_bytes() == B16


def test_a_connection_that_always_breaks_leaves_what_came(server, run, fails):
    server.storage.faults = [100] * 20
    message = fails("B-16X")
    assert "ended the connection" in message and "what has come is kept: run the command again" in message
    (part,) = files()
    assert part.parent == FOLDER and part.name.startswith("BitDance_B_16X.pt.") and part.name.endswith(".part")
    kept, attempts = part.read_bytes(), len(server.storage.gets())
    assert kept and B16.startswith(kept)
    server.storage.faults = []
    run("B-16X")
    assert server.storage.gets()[attempts]["range"] == f"bytes={len(kept)}-"
    assert files() == [TARGET] and TARGET.read_bytes() == B16


def test_progress_renews_the_patience(server, run):
    server.storage.faults = [len(B16) // 20] * 15
    run("B-16X")
    assert TARGET.read_bytes() == B16


def test_a_stalled_connection_counts_as_broken(server, run):
    server.storage.faults = [(5000, "stalls")]
    run("B-16X")
    assert [headers.get("range") for headers in server.storage.gets()] == [None, "bytes=5000-"]
    assert TARGET.read_bytes() == B16


def test_a_server_without_ranges_sends_all_again(server, run):
    server.storage.faults = [5000, "no range"]
    run("B-16X")
    assert TARGET.read_bytes() == B16


def test_a_killed_process_goes_on_in_the_next(server, run):
    """By the environment alone, as users have it."""
    server.token = "hf_of_a_test"
    server.storage.faults = [(40_000, "stalls")]
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
    code = "from bitdance.cli.main import main; main(['download', 'B-16X'])"
    root = pathlib.Path(__file__).resolve().parent.parent
    environment["PYTHONPATH"] = str(root)
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: any(path.stat().st_size == 40_000 for path in files()), process)
    finally:
        process.kill()
        process.communicate()
    run("B-16X")
    assert [headers.get("range") for headers in server.storage.gets()] == [None, "bytes=40000-"]
    assert files() == [TARGET] and TARGET.read_bytes() == B16


def wait_for(condition, process):
    clock = threading.Event()
    for _ in range(600):
        with contextlib.suppress(FileNotFoundError):
            if condition():
                return
        assert process.poll() is None, process.stderr.read()
        clock.wait(0.05)
    raise AssertionError("it never came")


def test_a_file_that_changed_meanwhile_starts_over(server, run, fails):
    server.storage.faults = [100] * 20
    fails("B-16X")
    server.storage.faults = []
    other = bytes(reversed(B16))
    server.files[RESOLVE + TARGET.name] = server.storage.files["/blob/" + TARGET.name] = other
    before = len(server.storage.gets())
    run("B-16X")
    assert "range" not in server.storage.gets()[before]
    assert files() == [TARGET] and TARGET.read_bytes() == other  # the .part of the other version is gone


def test_a_plain_file_that_changes_between_two_connections(server, run, monkeypatch):
    path, old = "/plain/VIRTUAL_imagenet512.npz", server.storage.files["/plain/VIRTUAL_imagenet512.npz"]
    new = bytes(reversed(old))
    server.storage.faults = [1000]
    monkeypatch.setattr(hub.time, "sleep", lambda _: server.storage.files.update({path: new}))
    run("reference-512")
    _, second = server.storage.gets()
    assert second["range"] == "bytes=1000-" and second["if-range"] == f'"{digest_of(old)[:8]}"'
    assert pathlib.Path("models/evaluation/VIRTUAL_imagenet512.npz").read_bytes() == new


def test_without_any_version_nothing_is_continued(server, run):
    server.storage.etag, server.storage.faults = False, [1000]
    run("reference-512")
    assert [headers.get("range") for headers in server.storage.gets()] == [None, None]
    (target,) = files()
    assert target.read_bytes() == server.storage.files["/plain/VIRTUAL_imagenet512.npz"]


def test_a_file_of_another_size_than_announced(server, fails):
    server.storage.files["/blob/BitDance_B_16X.pt"] = B16[:-5]
    assert "has changed at 127.0.0.1 just now" in fails("B-16X")


@pytest.mark.parametrize("change", [lambda body: body[:-1], lambda body: body + b"more"])
def test_a_plain_file_that_changes_after_it_was_announced(server, fails, monkeypatch, change):
    path = "/plain/VIRTUAL_imagenet512.npz"
    check = hub._check_space

    def check_and_change(remotes):
        check(remotes)
        server.storage.files[path] = change(server.storage.files[path])

    monkeypatch.setattr(hub, "_check_space", check_and_change)
    assert "VIRTUAL_imagenet512.npz has changed at 127.0.0.1 just now" in fails("reference-512")
    assert files() == []


def test_several_at_once_fetch_it_once(server, capsys):
    server.storage.faults = [(3000, "stalls")]
    done: list[hub.DownloadResult] = []
    threads = [threading.Thread(target=lambda: done.extend(hub.download(["B-16X"])), daemon=True) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [file.path for file in done] == [TARGET] * 6
    assert files() == [TARGET] and TARGET.read_bytes() == B16
    assert [headers.get("range") for headers in server.storage.gets()] == [None, "bytes=3000-"]


# Whom the token is shown to


def test_the_token_goes_to_the_hub_alone(server, run):
    server.token = "hf_of_a_test"
    run("B-16X", "reference-256")
    assert {headers.get("authorization") for _, _, headers in server.log} == {"Bearer hf_of_a_test"}
    assert {headers.get("authorization") for _, _, headers in server.storage.log} == {None}


def test_without_a_token_none_is_sent(server, run, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    for name in ("HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH"):
        monkeypatch.setattr(constants, name, str(tmp_path / "nothing"), raising=False)
    run("B-16X")
    assert all("authorization" not in headers for _, _, headers in server.log)


# What can go wrong, each a sentence


@pytest.mark.parametrize(
    ("name", "near"),
    [("B-17X", "B-1"), ("BitDance-H-4X", "H-1X"), ("autoencodr", "autoencoder"), ("inceptoin", "inception"),
     ("reference256", "reference-256"), ("al", "all")],
)  # fmt: skip
def test_a_wrong_name_suggests_the_nearest(server, fails, name, near):
    message = fails("autoencoder", name)
    assert f"there is no download {name!r}: did you mean {near}" in message and "reference-512" in message
    assert server.log == []


def test_no_name_or_a_foreign_one(fails):
    assert "name what to fetch: B-1X" in fails()
    assert "did you mean" not in fails("zzz")


def test_offline(server, run, fails, monkeypatch):
    run("autoencoder")
    before = len(server.log)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "was there already, not compared" in run("autoencoder")
    (FOLDER / "ae_d16c32.pt").unlink()
    assert "ae_d16c32.pt is not there: downloading is switched off by HF_HUB_OFFLINE" in fails("autoencoder")
    assert len(server.log) == before


def test_no_such_host(fails, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "the address of 127.0.0.1 cannot be found: is there a network?" in fails("B-16X")


def test_a_refused_connection(fails, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    use(f"http://127.0.0.1:{port}", monkeypatch)
    assert "127.0.0.1 refuses the connection" in fails("B-16X")


def test_a_server_that_says_nothing(fails, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use(f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch)
        assert "127.0.0.1 did not answer for 0.1 seconds" in fails("B-16X")


@pytest.mark.parametrize(
    ("status", "words", "attempts"),
    [(404, "there is no file at", 2), (401, "HF_TOKEN", 1), (403, "HF_TOKEN", 1), (418, "with HTTP 418", 1),
     (429, "in trouble or busy (HTTP 429)", 4), (500, "in trouble or busy (HTTP 500)", 4), (503, "(HTTP 503)", 4)],
)  # fmt: skip
def test_statuses(server, fails, status, words, attempts):
    server.http_error = status
    assert words in fails("B-16X")
    assert len(server.log) == attempts and files() == []


def test_a_status_of_the_storage(server, fails):
    server.storage.faults = ["500"] * 20
    assert "(HTTP 500)" in fails("B-16X")
    server.storage.faults = ["403"]
    message = fails("B-16X")
    assert "HTTP 403" in message and "secret" not in message
    server.storage.faults = ["404"]
    assert "no longer has BitDance_B_16X.pt" in fails("B-16X")
    assert files() == []


def test_a_web_page_is_no_file(server, fails):
    server.storage.faults = ["html"]
    assert "answers with a web page instead of the file" in fails("B-16X")
    assert files() == []


def test_only_https(server, fails, monkeypatch):
    server.redirect = "http://192.0.2.1/login"
    assert "http://192.0.2.1/login is not fetched, only https is" in fails("B-16X")
    server.redirect = "file:///etc/passwd"
    assert "is not fetched" in fails("B-16X")
    for endpoint in ("http://hub.invalid", "ftp://127.0.0.1", "nonsense", "http://127.0.0.1.invalid"):
        use(endpoint, monkeypatch)
        assert "only https is" in fails("B-16X")


def test_redirections_without_end(server, fails):
    server.redirect = server.url + "/again"
    assert "round in circles" in fails("B-16X")
    assert len(server.log) == 10


def test_a_token_that_cannot_be_one(fails, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_é€secret")
    message = fails("B-16X")
    assert "the token in HF_TOKEN" in message and "secret" not in message


def test_too_little_space_is_seen_before_the_first_byte(server, fails, monkeypatch):
    free = types.SimpleNamespace(free=5 * len(B16))
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: free)
    assert "there is no space for" in fails("all")
    assert server.storage.log == []
    free.free = 6 * len(B16)
    main(["download", "all"])


def test_a_disk_that_fills_up(server, run, fails, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 50_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    with monkeypatch.context() as full:
        full.setattr(hub, "_CHUNK", 10_000)
        full.setattr("bitdance.runtime.atomic_files.open", lambda path, mode, **_: Full(path, mode), raising=False)
        assert "the disk is full while models/BitDance-ImageNet/BitDance_B_16X.pt is fetched" in fails("B-16X")
    (part,) = files()
    assert 0 < part.stat().st_size <= 50_000 and B16.startswith(part.read_bytes())
    run("B-16X")
    assert files() == [TARGET] and TARGET.read_bytes() == B16


def test_a_folder_that_cannot_be(fails, tmp_path):
    (tmp_path / "file.part").write_text("")
    assert "cannot make the folder" in fails("B-16X", "--folder", "file.part/models")


# Where other commands name a released model


@pytest.mark.parametrize("name", ["BitDance-B-16X", "B-16X", "b-16x"])
def test_a_model_comes_by_itself(server, name):
    assert resolve.find_model(name) == TARGET and TARGET.read_bytes() == B16
    before = len(server.log)
    assert resolve.find_model(name) == resolve.find_model(str(FOLDER / "BitDance_B_16x.pt")) == TARGET
    assert len(server.log) == before


def contents(path, *states):
    return types.SimpleNamespace(path=path, states=dict.fromkeys(states))


def test_its_autoencoder_comes_with_it(server):
    model = resolve.find_model("BitDance-B-16X")
    inside = contents(model, "model", "autoencoder")
    assert resolve.find_autoencoder(None, inside) is inside
    assert resolve.find_autoencoder("other.pt", contents(model, "model")) == pathlib.Path("other.pt")
    assert len(files()) == 1
    assert resolve.find_autoencoder(None, contents(model, "model")) == FOLDER / "ae_d16c32.pt"
    before = len(server.log)
    assert resolve.find_autoencoder(None, contents(model, "model")) == FOLDER / "ae_d16c32.pt"
    assert len(server.log) == before


def test_nothing_is_fetched_for_other_files(server):
    with pytest.raises(UserError, match="there is no model"):
        resolve.find_model("BitDance-B-2X")
    with pytest.raises(UserError, match="bitdance download H-1X --folder there"):
        resolve.find_model("there/BitDance_H_1X.pt")
    with pytest.raises(UserError, match="holds no autoencoder and none lies beside it"):
        resolve.find_autoencoder(None, contents(pathlib.Path("run/model.safetensors"), "model"))
    assert server.log == []


def test_a_model_offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in RELEASED_MODELS:
        with pytest.raises(UserError, match="is not there: downloading is switched off"):
            resolve.find_model(name)
