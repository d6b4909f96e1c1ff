"""`bitdance web`: what the page does, what its server refuses, and the page in a browser."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator

import numpy as np
import pytest
import small
import torch
from PIL import Image

from bitdance import __version__
from bitdance.cli.main import main
from bitdance.data.decoding import reads_heif
from bitdance.runtime.errors import UserError
from bitdance.sampling.image_grid import image_grid
from bitdance.sampling.pipeline import Pipeline
from bitdance.sampling.unfinished import GREY, decode_unfinished
from bitdance.sampling.writers import TEXT_CHUNK
from bitdance.web import generation
from bitdance.web.generation import Settings
from bitdance.web.guard import MAX_CALL, Guard
from bitdance.web.offered_models import OfferedModels
from bitdance.web.server import LOOPBACK

SETTINGS = Settings(seed=3, preset="fast", cfg_scale=2.0, num_steps=2)


@pytest.fixture
def pipe() -> Pipeline:
    return Pipeline(small.model(parallel_num=4, class_names=("crane", "dog", "crane")), small.autoencoder())


def photograph(orientation: int = 1) -> bytes:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def read_archive(archive: bytes) -> tuple[np.ndarray, list[dict]]:
    """The images of an archive, and the settings in their text chunks, which are also those in samples.json."""
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        names = sorted(name for name in file.namelist() if name[0].isdigit())
        images = [Image.open(io.BytesIO(file.read(name))) for name in names]
        records = [json.loads(image.text[TEXT_CHUNK]) for image in images]
        assert json.loads(file.read("samples.json")) == records and "grid.png" in file.namelist()
    return np.stack([np.asarray(image) for image in images]), records


def test_images_grow_and_are_those_of_the_pipeline(pipe):
    frames = list(generation.sample(pipe, [1, 0], 2, SETTINGS))
    assert [frame.steps for frame in frames] == [4] * len(frames) and frames[-1].step == 4
    assert frames[0].step == 1 and frames[0].archive is None, "the first step is drawn"
    first, last = ((np.asarray(frame.grid)[:, -262:] == GREY).all(2) for frame in (frames[0], frames[-1]))
    assert first.sum() == 3 * 128**2 and not last.any(), "three of four patches of four images are missing"
    expected = pipe([1, 1, 0, 0], seed=3, preset="fast", cfg_scale=2.0, num_steps=2, output="np")
    assert frames[-1].grid.tobytes() == image_grid(expected, 2, ["dog", "crane"], 8).tobytes()
    images, records = read_archive(frames[-1].archive)
    assert np.array_equal(images, expected) and [record["number"] for record in records] == [0, 1, 2, 3]
    known = {"version": __version__, "model": "model", "seed": 3, "class": 0, "name": "crane", "solver": "dpmpp-2m-sde"}
    assert records[2].items() >= {**known, "cfg_scale": 2.0, "num_steps": 2}.items()


def test_completions_keep_the_first_rows(pipe):
    *_, last = generation.complete(pipe, photograph(), 1, 2, 3, SETTINGS)
    picture = generation.read_picture(pipe, photograph())
    settings = {"seed": 3, "preset": "fast", "cfg_scale": 2.0, "num_steps": 2, "output": "np"}
    original = picture.original[::20, ::20]
    expected = pipe.complete(original, 1, keep_rows=2, candidates=3, **settings)
    images, records = read_archive(last.archive)
    assert np.array_equal(images, expected) and records[0]["kept_tokens"] == list(range(8))
    assert np.array_equal(picture.reconstruction[::20, ::20], pipe.decode(pipe.encode(original), "np")[0])
    grid = np.asarray(last.grid)[2:-2, 2:-2]
    assert (grid[64:, 130:258] == GREY).all() and not (grid[:64, 130:258] == GREY).all(2).any(), "half is kept"
    turned = generation.read_picture(pipe, photograph(orientation=3)).original
    assert np.array_equal(turned, picture.original[::-1, ::-1]), "upright, as EXIF says"


def test_unfinished_images_are_grey_where_tokens_are_missing(pipe):
    tokens = torch.ones(2, 8, 8)  # two of four patches, which are the upper half
    pixels = decode_unfinished(pipe, tokens)
    assert pixels.shape == (2, 16, 16, 3) and (pixels[:, 8:] == GREY).all() and not (pixels[:, :8] == GREY).all()


def test_bits_are_drawn_token_by_token():
    bits = torch.full((8, 2, 2), -1.0)
    bits[5, 1, 0] = 1  # row 1, column 1 of the 2 x 4 squares of the lower left token
    drawn = generation.draw_bits(bits)
    side = 320 // 8
    white = np.argwhere((drawn == 255).all(2))
    height, width = 2 * side + 2, 4 * side + 2  # of a token with its frame
    assert drawn.shape == (2 * height, 2 * width, 3)
    assert white.min(0).tolist() == [height + 1 + side, 1 + side] and len(white) == side**2


def forever(draw, begun: threading.Event) -> Iterator:
    while True:
        begun.set()
        draw(1, 2, torch.ones(1, 4, 8))


def test_a_sampling_stops_when_nobody_waits_and_the_next_one_waits_for_it(pipe):
    begun, second, done = threading.Event(), threading.Event(), []
    watched = generation.watch(pipe, 1, lambda draw: forever(draw, begun))
    assert next(watched)[:2] == (1, 2)

    def call(draw):
        second.set()
        return np.zeros((1, 16, 16, 3), np.uint8)

    other = threading.Thread(target=lambda: done.extend(generation.watch(pipe, 1, call)))
    other.start()
    assert generation._turn.locked() and not second.is_set()
    watched.close()  # returns once the sampling has ended
    other.join(60)
    assert second.is_set() and done[0][:2] == (4, 4)


def test_errors_of_a_sampling_reach_the_page(pipe):
    def call(draw):
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        list(generation.watch(pipe, 1, call))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": -1}, "the seed must be an integer from 0 to 4294967295"),
        ({"seed": None}, "the seed must be"),
        ({"seed": 1.5}, "the seed must be"),
        ({"num_steps": 201}, "the number of solver steps must be an integer from 1 to 200"),
        ({"cfg_scale": float("nan")}, "the guidance scale must be a number from 0 to 50"),
        ({"cfg_scale": True}, "the guidance scale must be"),
        ({"preset": "slow"}, "the preset must be"),
        ({"preset": ["fast"]}, "the preset must be"),
    ],
)
def test_settings_out_of_range_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        Settings(**({"seed": 0, "preset": "fast", "cfg_scale": 3, "num_steps": 20} | changes))


def test_other_inputs_out_of_range_are_refused(pipe, monkeypatch):
    for classes, each, words in (
        ([], 1, "from 1 to 10 classes"),
        ([0] * 11, 1, "from 1 to 10 classes"),
        (None, 1, "from 1 to 10 classes"),
        ([3], 1, "class 3 does not exist"),
        (["../x"], 1, "choose a class of the list"),
        ([0], 11, "images of a class must be an integer from 1 to 10"),
        ([0], None, "images of a class"),
    ):
        with pytest.raises(UserError, match=words):
            generation.sample(pipe, classes, each, SETTINGS)
    for data, label, rows, count, words in (
        (None, 0, 2, 1, "upload a picture first"),
        (b"", 0, 2, 1, "cannot read the image that was uploaded: it is empty"),
        (b"no image", 0, 2, 1, "cannot read the image that was uploaded: it is in no known image format"),
        (photograph(), None, 2, 1, "choose a class of the list"),
        (photograph(), 0, 3, 1, "the number of rows to keep must be an integer from 0 to 2"),
        (photograph(), 0, 1, 1, "a multiple of 2"),
        (photograph(), 0, 2, 11, "the number of completions must be"),
    ):
        with pytest.raises(UserError, match=words):
            generation.complete(pipe, data, label, rows, count, SETTINGS)
    monkeypatch.setattr(generation, "MAX_PIXELS", 5 * 16**2)
    with pytest.raises(UserError, match="these are 6 images, and at most 5"):
        generation.sample(pipe, [0, 1], 3, SETTINGS)


def test_names_of_several_classes_have_their_ids(pipe):
    assert generation.class_choices(pipe.classes) == [("crane (0)", 0), ("dog", 1), ("crane (2)", 2)]


def test_models_are_offered_by_name_and_never_by_path(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in ("a/mine", "b/mine"):
        (tmp_path / run).mkdir(parents=True)
        small.save_pair(tmp_path / run)
    released = tmp_path / "models" / "BitDance-ImageNet"
    released.mkdir(parents=True)
    for name in ("ae_d16c32.pt", "BitDance_B_4x.pt"):
        (released / name).touch()
    loaded: list[str] = []

    def load(source: str) -> Pipeline:
        if len(loaded) == 4:
            raise UserError(f"{tmp_path} is damaged")
        loaded.append(source)
        return Pipeline(small.model(), small.autoencoder())

    models = OfferedModels(["a/mine", str(tmp_path / "b/mine"), "a/mine"], load)
    assert models.names == ["mine", "mine (2)", "demo-1x", "demo-4x", "demo-16x", "BitDance-B-4X"]
    assert models.get("mine (2)") is models.get("mine (2)")
    models.get("demo-1x")
    models.get("mine (2)")
    assert loaded == ["a/mine", str(tmp_path / "b/mine"), "demo-1x", str(tmp_path / "b/mine")], (
        "the last one stays loaded"
    )
    for name in ("a/mine", str(tmp_path / "a/mine"), "../mine", None, ["demo-1x"]):
        with pytest.raises(UserError, match="there is no such model"):
            models.get(name)
    with pytest.raises(UserError, match=r"^the model demo-1x cannot be loaded: the terminal of the server says why\.$"):
        models.get("demo-1x")
    assert f"{tmp_path} is damaged" in capsys.readouterr().err
    with pytest.raises(UserError, match="there is no model 'c'"):
        OfferedModels(["c"], load)


def ask(
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
    kind: str = "http",
    hosts: tuple[str, ...] | None = None,
) -> object:
    """The status of a request to a guarded application that answers all with 200, or the body that reached it."""
    sent: list[dict] = []

    async def app(scope, receive, send):
        reached = await receive() if body is not None else {}
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": reached.get("body", b"")})

    async def receive():
        return {"type": "http.request", "body": body or b"", "more_body": False}

    async def send(message):
        sent.append(message)

    headers = {"content-length": str(len(body or b""))} if headers is None else headers
    scope = {"type": kind, "path": path, "method": "GET" if body is None else "POST"}
    scope["headers"] = [(name.encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(Guard(app, "/tmp/page", hosts)(scope, receive, send))
    if sent[0].get("status") == 200:
        assert b"default-src 'self'" in dict(sent[0]["headers"])[b"content-security-policy"]
        return sent[1]["body"] if body is not None else 200
    return sent[0].get("status", sent[0]["type"])


def test_the_guard_lets_the_page_s_own_requests_pass():
    for path in ("/", "/config", "/assets/index-1.js", "/static/fonts/a.woff2", "/gradio_api/queue/data",
                 "/gradio_api/heartbeat/abc1", "/gradio_api/file=/tmp/page/0a/image.png"):  # fmt: skip
        assert ask(path) == 200, path
    call = json.dumps({"data": [{"path": "/tmp/page/0a/a.png"}, "http://x"], "fn_index": 1}).encode()
    assert ask("/gradio_api/queue/join", call) == call
    assert ask("/gradio_api/upload", b"x" * (MAX_CALL + 1)) == b"x" * (MAX_CALL + 1)


def test_the_guard_refuses_all_other_requests():
    for path in ("/gradio_api/file=/etc/passwd", "/gradio_api/file=/tmp/page/../../etc/passwd",
                 "/gradio_api/file=/tmp/page2/a", "/gradio_api/file=/tmp/page", "/gradio_api/file=http://example.org/",
                 "/gradio_api/file=/tmp/page/..\\x", "/static/../../etc/passwd", "/gradio_api/proxy=http://example.org/",
                 "/gradio_api/run/predict", "/gradio_api/call/sample", "/gradio_api/info", "/docs", "/monitoring",
                 "//etc/passwd", "/config/", "/gradio_api/heartbeat/a/b"):  # fmt: skip
        assert ask(path) == 403, path
    join = "/gradio_api/queue/join"
    for address in ("http://example.org/a.png", "HTTPS://example.org", "file:///etc/passwd"):
        assert ask(join, json.dumps({"data": [[{"path": address}]]}).encode()) == 403
    assert ask(join, b"{") == ask(join, b"[" * 60_000) == 403
    assert ask(join, b"x" * (MAX_CALL + 1)) == ask(join, b"{}", {}) == 413
    assert ask("/gradio_api/upload", b"x", {"content-length": "30000000"}) == 413
    assert ask("/", kind="websocket") == "websocket.close"


def test_the_guard_answers_to_the_names_of_this_machine():
    for host in ("localhost:7860", "127.0.0.1", "[::1]:7860"):
        assert ask("/", headers={"host": host}, hosts=LOOPBACK) == 200
    for host in ("example.org", "localhost.example.org:7860", "[::1", ""):
        assert ask("/", headers={"host": host}, hosts=LOOPBACK) == 403
    assert ask("/", headers={"host": "example.org"}) == 200


def test_what_the_command_refuses(capsys, monkeypatch):
    def message(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["web", *arguments])
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert message("--port", "70000") == "bitdance: --port 70000 is invalid: it must be from 1 to 65535.\n"
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert message() == "bitdance: the page needs gradio: pip install 'bitdance[web]'.\n"
    monkeypatch.setattr("bitdance.web.server.check_gradio", lambda: None)
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        assert f"--port {port} of 127.0.0.1 cannot be used (" in message("--port", str(port))
    assert "--host 1.2.3.4.5 is no address of this machine" in message("--host", "1.2.3.4.5")


@pytest.fixture
def server(tmp_path):
    """The address of a page with a tiny model, which ends with Ctrl-C without a word."""
    pytest.importorskip("gradio")
    model = small.save_pair(tmp_path, parallel_num=4, class_names=("crane", "dog", "crane"))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    # The settings of gradio in the environment do not count.
    environment = {**small.environment(), "TMPDIR": str(temporary), "GRADIO_ALLOWED_PATHS": "/", "GRADIO_SHARE": "1"}
    arguments = ["web", "--port", str(small.free_port()), "--model", str(model), "--device", "cpu", "--threads", "1"]
    arguments += ["--precision", "fp32"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bitdance", *arguments],
        cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    line = process.stdout.readline()
    yield line.split()[4] if line else pytest.fail(process.communicate()[1])
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output.strip(), errors) == (0, "", "") and not os.listdir(temporary)


@pytest.mark.slow
def test_the_server_ends_while_it_samples(server):
    """The fixture checks how."""
    functions = json.load(urllib.request.urlopen(f"{server}config"))["dependencies"]
    index = next(function["id"] for function in functions if function["api_name"] == "sample")
    data = [[0, 1, 2], 10, "demo-1x", 0, "exact", 3, 200]  # takes long
    call = json.dumps({"data": data, "fn_index": index, "session_hash": "a"}).encode()
    request = urllib.request.Request(f"{server}gradio_api/queue/join", call, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 200
    time.sleep(3)


def find_chromium(playwright) -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), playwright.chromium.executable_path)
    return found if os.path.exists(found) else pytest.skip("needs Chromium")


@pytest.mark.slow
def test_the_page_in_a_browser(server, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    for path in ("etc/passwd", f"{tmp_path}/model.safetensors"):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{server}gradio_api/file=/{path}")
    requests: list[str] = []
    forbidden: list[str] = []
    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            tmp_path / "profile",
            executable_path=find_chromium(playwright),
            args=[*flags.split(), "--disable-component-update", "--disable-sync"],
        )
        page = browser.pages[0]
        page.on("request", lambda request: requests.append(request.url))
        page.on("requestfailed", lambda request: request.failure == "csp" and forbidden.append(request.url))
        page.goto(server)

        def wait(action: str) -> Image.Image:
            """Clicks, waits for the end, and returns the picture of the grid as the browser has it."""
            page.click(f"#{action}")
            page.wait_for_function(f"document.querySelector('#{action}-status :is(input, textarea)').value == 'done'")
            picture = page.locator(f"#{action}-images img")
            assert np.asarray(Image.open(io.BytesIO(picture.screenshot()))).std() > 20, "it is visible"
            return Image.open(io.BytesIO(page.request.get(picture.get_attribute("src")).body()))

        grid = wait("sample")
        pipe = Pipeline(small.model(parallel_num=4, class_names=("crane", "dog", "crane")), small.autoencoder())
        images = pipe([label for label in range(3) for _ in range(4)], preset="fast", output="np")
        assert grid.tobytes() == image_grid(images, 4, ["crane", "dog", "crane"], 8).tobytes()
        with page.expect_download() as download:
            page.get_by_role("button", name="Download").first.click()
        saved, records = read_archive(pathlib.Path(download.value.path()).read_bytes())
        assert np.array_equal(saved, images) and records[5]["name"] == "dog"
        for number, seed in enumerate(("", "-1", "4294967296")):
            page.get_by_label("Seed").fill(seed)
            page.click("#sample")
            page.get_by_text("The seed must be an integer from 0 to 4294967295.").nth(number).wait_for()
        for label in ("Solver steps", "Guidance scale"):
            page.get_by_label(f"number input for {label}").fill("999")
        page.get_by_label("Seed").fill("7")
        assert not page.locator("#sample-status").get_by_text("Error").is_visible(), "it is shown as a message"
        page.get_by_role("tab", name="Complete").click()
        (tmp_path / "photo.png").write_bytes(photograph())
        page.set_input_files("input[type=file]", tmp_path / "photo.png")
        page.locator("img:visible").nth(2).wait_for()  # original, reconstruction and bits
        assert wait("complete").size == (5 * 130 + 2, 2 * 130 + 2)
        (tmp_path / "empty.png").touch()
        (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
        for name, words in (("empty.png", "it is empty"), ("phone.heic", "" if reads_heif() else "it is a HEIC")):
            page.get_by_role("button", name="Clear").first.click()
            page.set_input_files("input[type=file]", tmp_path / name)
            page.get_by_text(f"Cannot read the image that was uploaded: {words}").last.wait_for()
        browser.close()
    elsewhere = [url for url in requests if not url.startswith((server, "data:", "blob:"))]
    assert requests and set(elsewhere) <= set(forbidden), "what old releases of gradio load from elsewhere is not asked"
