"""Fetching what is published: the released weights, ADM's reference batches, the Inception network.

The hub's own client says where the hub is, whose token is sent and whether the network may be used at all. The
transfer is done here, with the standard library, for the hub and for plain addresses alike: the client (1.31 to 2.4 at
least) begins an interrupted file anew in the next process and compares sizes, not digests; and its errors, retries and
HTTP library differ from one major version to the next.

A file arrives in `<name>.<version>.part` beside its place, is checked, synced and renamed. The version is a digest of
what the server said of the file, so what was begun is continued only while that file is still the same one.
"""

from __future__ import annotations

import base64
import contextlib
import difflib
import errno
import hashlib
import http.client
import itertools
import math
import os
import pathlib
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, BinaryIO, NamedTuple
from urllib.parse import urljoin, urlsplit

from bitdance.config import RELEASED_MODELS
from bitdance.runtime.atomic_files import file_digest, lock_file, make_folder, rename
from bitdance.runtime.errors import UserError

if TYPE_CHECKING:
    from tqdm import tqdm

REPOSITORY = "shallowdream204/BitDance-ImageNet"
FOLDER = pathlib.Path("models/BitDance-ImageNet")
EVALUATION_FOLDER = pathlib.Path("models/evaluation")
AUTOENCODER_FILE = "ae_d16c32.pt"

HUB_FILES = {**{name: release.file for name, release in RELEASED_MODELS.items()}, "autoencoder": AUTOENCODER_FILE}
PLAIN_FILES = {
    "reference-256": "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    "VIRTUAL_imagenet256_labeled.npz",
    "reference-512": "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/512/"
    "VIRTUAL_imagenet512.npz",
    "inception": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
}
ALL = "all"

TIMEOUT = 15.0
"""Seconds without a byte after which a connection counts as dead."""
WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further attempt; a hundredth of the file resets the count."""
_REDIRECTS = 10
_CHUNK = 2**20


class DownloadResult(NamedTuple):
    """A file that is in its place: its path, its size in bytes, and what was done and compared."""

    path: pathlib.Path
    size: int
    note: str


class _Remote(NamedTuple):
    """A published file: its address, place, size in bytes, what tells its versions apart, and its digest if known."""

    url: str
    target: pathlib.Path
    size: int
    version: str  # empty: nothing tells, so nothing begun is continued
    if_range: str | None  # the version, where the server that it came from is the one that sends the bytes
    algorithm: str | None
    digest: str  # hexadecimal, or the beginning of it

    @property
    def part(self) -> pathlib.Path:
        """Where the file arrives."""
        key = hashlib.sha256(f"{self.version} {self.size}".encode()).hexdigest()[:12]
        return self.target.with_name(f"{self.target.name}.{key}.part")


class _PassingFault(UserError):
    """A fault that may be gone a moment later."""


class _NoConnection(_PassingFault):
    """No connection came about: worth another attempt only where there was one before."""


def released_name(name: str) -> str | None:
    """The name in the zoo of a released model that is written as B-16X or BitDance-B-16X, in any case."""
    short = name.upper().removeprefix("BITDANCE-")
    return short if short in RELEASED_MODELS else None


def find(path: pathlib.Path) -> pathlib.Path | None:
    """The file at `path`, or the one beside it in the other spelling: the hub's page writes B_1X as B_1x."""
    old, new = ("X.pt", "x.pt") if path.name.endswith("X.pt") else ("x.pt", "X.pt")
    other = path.with_name(path.name.removesuffix(old) + new) if path.name.endswith(old) else path
    return next((place for place in (path, other) if place.exists()), None)


def download(
    names: Iterable[str],
    folder: pathlib.Path = FOLDER,
    evaluation_folder: pathlib.Path = EVALUATION_FOLDER,
    verify: bool = False,
) -> Iterator[DownloadResult]:
    """Fetches published files, unless they are there; yields each as soon as it is in its place.

    All are looked up, and the free space is compared with what they need, before the first is fetched. A call that is
    interrupted leaves a `.part`, from which the next one goes on. When several
    processes ask for one file, one fetches it.

    Args:
        names: released models such as B-16X or BitDance-B-16X, autoencoder, reference-256, reference-512, inception;
            all stands for the models and the autoencoder.
        folder: of the models and the autoencoder.
        evaluation_folder: of the others.
        verify: compare the digests of files that are there already, not only their sizes.

    Raises:
        UserError: a name is unknown, a file cannot be fetched or is damaged, or the disk is too small.
    """
    from huggingface_hub import constants

    chosen = _resolve(names)
    targets = {name: _target(name, folder, evaluation_folder) for name in chosen}
    if constants.HF_HUB_OFFLINE:
        for target in targets.values():
            yield _without_network(target)
        return
    remotes = [_locate(name, target) for name, target in targets.items()]
    there = {remote.target: _present(remote, verify) for remote in remotes}
    _check_space([remote for remote in remotes if there[remote.target] is None])
    for remote in remotes:
        yield there[remote.target] or _fetch(remote, verify)


def _resolve(names: Iterable[str]) -> list[str]:
    """The names as they are written here, each once, with `all` spelled out."""
    known = [*HUB_FILES, *PLAIN_FILES]
    chosen: list[str] = []
    for name in names:
        key = released_name(name) or name.lower()
        if key != ALL and key not in known:
            spelled = {other.lower(): other for other in (*known, ALL)}
            near = difflib.get_close_matches(key.removeprefix("bitdance-").lower(), spelled, n=1, cutoff=0.5)
            hint = f"did you mean {spelled[near[0]]}? " if near else ""
            raise UserError(f"there is no download {name!r}: {hint}choose from {', '.join(known)}, {ALL}.")
        chosen += list(HUB_FILES) if key == ALL else [key]
    return list(dict.fromkeys(chosen))


def _target(name: str, folder: pathlib.Path, evaluation_folder: pathlib.Path) -> pathlib.Path:
    if name in HUB_FILES:
        return find(folder / HUB_FILES[name]) or folder / HUB_FILES[name]
    return evaluation_folder / PLAIN_FILES[name].rpartition("/")[2]


def _without_network(target: pathlib.Path) -> DownloadResult:
    if not target.exists():
        raise UserError(
            f"{target} is not there: downloading is switched off by HF_HUB_OFFLINE; unset it, or copy the file there."
        )
    return DownloadResult(
        target, target.stat().st_size, "was there already, not compared because HF_HUB_OFFLINE is set"
    )


def _locate(name: str, target: pathlib.Path) -> _Remote:
    """Asks the server what it has under a name.

    Raises:
        UserError: it has nothing, or does not answer.
    """
    from huggingface_hub import constants

    if name in PLAIN_FILES:
        urls = [PLAIN_FILES[name]]
    else:
        spellings = dict.fromkeys((HUB_FILES[name], HUB_FILES[name].replace("X.pt", "x.pt")))
        urls = [f"{constants.ENDPOINT}/{REPOSITORY}/resolve/main/{spelling}" for spelling in spellings]
    for url in urls:
        with contextlib.suppress(FileNotFoundError):
            return _ask(url, target)
    raise UserError(f"there is no file at {urls[0]} (HTTP 404): it was moved or renamed; fetch it by hand.")


def _ask(url: str, target: pathlib.Path) -> _Remote:
    """Size, version and digest of the file at an address, from the headers alone.

    Raises:
        FileNotFoundError: there is none.
        UserError: the server does not answer, or not with a file.
    """
    for wait in itertools.chain(WAITS, [None]):
        try:
            with _request("HEAD", url) as response:
                headers = response.headers
            break
        except _NoConnection:
            raise
        except _PassingFault:
            if wait is None:
                raise
            time.sleep(wait)
    # The hub answers for the storage that it sends one on to: the file's digest and size stand in headers of its own,
    # and the storage's ETag is another one.
    linked = headers.get("X-Linked-Size")
    size = linked or headers.get("Content-Length") or ""
    if not size.isdecimal():
        raise UserError(f"{urlsplit(url).hostname} does not say how large {target.name} is: try again later.")
    etag = (headers.get("X-Linked-ETag") if linked else headers.get("ETag")) or ""
    weak = not etag or etag.startswith("W/")  # equal ones do not promise equal bytes
    version = etag if linked or not weak else headers.get("Last-Modified") or ""
    algorithm, digest = None, ""
    if published := re.search(r"-([0-9a-f]{8})\.pth$", url):  # PyTorch's custom: the beginning of the SHA-256
        algorithm, digest = "sha256", published[1]
    elif linked and (sha := re.fullmatch('"?([0-9a-f]{64})"?', etag)):
        algorithm, digest = "sha256", sha[1]
    elif not linked and re.fullmatch("[A-Za-z0-9+/]{22}==", headers.get("Content-MD5") or ""):
        algorithm, digest = "md5", base64.b64decode(headers["Content-MD5"]).hex()
    return _Remote(url, target, int(size), version, None if linked else version, algorithm, digest)


def _present(remote: _Remote, verify: bool) -> DownloadResult | None:
    """The file, if it is there and whole: of the right size, and to be sure of the right digest."""
    try:
        size = remote.target.stat().st_size
    except OSError:
        return None
    if size != remote.size:
        return None
    if not verify or not remote.algorithm:
        return DownloadResult(remote.target, size, "was there already, size as on the server")
    if not file_digest(remote.target, remote.algorithm).startswith(remote.digest):
        return None
    return DownloadResult(remote.target, size, f"was there already, {_title(remote.algorithm)} as published")


def _check_space(remotes: list[_Remote]) -> None:
    """Compares what is still to come with what is free, over all files of each file system.

    Raises:
        UserError: it does not fit.
    """
    needed: dict[int, int] = {}
    for remote in remotes:
        folder = remote.target.parent
        make_folder(folder)
        device = folder.stat().st_dev
        begun = remote.part.stat().st_size if remote.part.exists() else 0
        needed[device] = needed.get(device, 0) + max(0, remote.size - begun)
        free = shutil.disk_usage(folder).free
        if needed[device] > free:
            raise UserError(
                f"there is no space for {remote.target}: {needed[device] / 1e9:.2f} GB are to come and "
                f"{free / 1e9:.2f} GB are free; free some or choose another folder."
            )


def _fetch(remote: _Remote, verify: bool) -> DownloadResult:
    """Fetches a file into its `.part`, checks it and moves it to its place.

    Raises:
        UserError: it cannot be fetched or written, or is not what was published.
    """
    from tqdm import tqdm

    waiting = f"another process fetches {remote.part.name}: waiting for it."
    with lock_file(remote.part, math.inf, waiting) as part:
        # Another process may have brought the file while this one waited.
        if os.fstat(part.fileno()).st_size == 0 and (there := _present(remote, verify)):
            remote.part.unlink(missing_ok=True)
            return there
        try:
            bar_settings = {"unit": "B", "unit_scale": True, "dynamic_ncols": True, "mininterval": 0.5}
            with tqdm(total=remote.size, desc=remote.target.name, **bar_settings) as bar:
                _receive(remote, part, bar)
            if remote.algorithm and not file_digest(remote.part, remote.algorithm).startswith(remote.digest):
                part.truncate(0)
                raise UserError(
                    f"what came for {remote.target} is damaged: its {_title(remote.algorithm)} is not the published "
                    f"{remote.digest}; run the command again."
                )
            os.fsync(part.fileno())
            # In one go: between two renames another process would find neither, and fetch it all again.
            rename(remote.part, remote.target)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"the disk is full while {remote.target} is fetched: free some space and run the command again; "
                    "it goes on from what has come."
                ) from error
            raise UserError(f"cannot write {remote.target}: {error.strerror or error}.") from error
        finally:
            with contextlib.suppress(FileNotFoundError):
                if remote.part.stat().st_size == 0:
                    remote.part.unlink()
    for stale in remote.target.parent.glob(f"{remote.target.name}.*.part"):  # of versions that are no longer published
        if stale != remote.part:  # which is by now that of another process
            stale.unlink(missing_ok=True)
    compared = f"{_title(remote.algorithm)} as published" if remote.algorithm else "size as on the server"
    return DownloadResult(remote.target, remote.size, f"fetched, {compared}")


def _receive(remote: _Remote, part: BinaryIO, bar: tqdm) -> None:
    """Fills a `.part`, in as many connections as it takes.

    Raises:
        UserError: attempt after attempt failed, or what the server sends is not the file.
    """
    waits, mark = iter(WAITS), 0
    while True:
        have = part.seek(0, os.SEEK_END)
        if have == remote.size:
            return
        if have > remote.size:  # where locks do not work, two processes may have written
            have = part.truncate(0)
        if have > mark + remote.size // 100:
            waits, mark = iter(WAITS), have
        try:
            _receive_some(remote, part, bar)
            if part.seek(0, os.SEEK_END) < remote.size:
                raise _PassingFault(f"{urlsplit(remote.url).hostname} ended the connection before the file was whole")
        except _PassingFault as fault:
            wait = next(waits, None)
            if wait is None:
                raise UserError(
                    f"{remote.target.name} could not be fetched, after {len(WAITS) + 1} attempts: {fault}; what has "
                    "come is kept: run the command again to go on."
                ) from fault
            time.sleep(wait)


def _receive_some(remote: _Remote, part: BinaryIO, bar: tqdm) -> None:
    """Appends what one connection brings.

    Raises:
        _PassingFault: it broke.
        UserError: what the server sends is not the file.
    """
    have = part.seek(0, os.SEEK_END) if remote.version else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    if have and remote.if_range:
        headers["If-Range"] = remote.if_range
    host = urlsplit(remote.url).hostname
    try:
        response = _request("GET", remote.url, headers)
    except FileNotFoundError:
        raise UserError(f"{host} no longer has {remote.target.name}: run the command again.") from None
    with response:
        if response.status != 206:
            part.truncate(0)  # the whole file comes: the server knows no ranges, or has another version now
            have = 0
        length, span = response.headers.get("Content-Length"), response.headers.get("Content-Range")
        if (length and length != str(remote.size - have)) or (
            response.status == 206 and span != f"bytes {have}-{remote.size - 1}/{remote.size}"
        ):
            raise UserError(f"{remote.target.name} has changed at {host} just now: run the command again.")
        bar.n = bar.initial = have  # what was there before is no part of the speed
        while have < remote.size:
            try:
                chunk = response.read1(min(_CHUNK, remote.size - have))
            except (OSError, http.client.HTTPException) as error:
                raise _fault(remote.url, error) from error
            if not chunk:
                return
            rest = memoryview(chunk)
            while rest:
                rest = rest[part.write(rest) :]
            have += len(chunk)
            bar.update(len(chunk))


class _AsItIs(urllib.request.HTTPErrorProcessor):
    """Hands over every answer, redirections and errors too: urllib's own way turns a redirected HEAD into a GET."""

    def http_response(
        self, request: urllib.request.Request, response: http.client.HTTPResponse
    ) -> http.client.HTTPResponse:
        return response

    https_response = http_response


def _request(method: str, url: str, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
    """Sends a request and follows redirections; a HEAD stops where the hub describes what it sends one on to.

    Raises:
        FileNotFoundError: the server has no such file.
        _PassingFault: no connection, or the server is in trouble.
        UserError: the server refuses, or answers with something else than a file.
    """
    from bitdance import __version__

    opener = urllib.request.build_opener(_AsItIs)
    start = url
    for _ in range(_REDIRECTS):
        _check_address(url, start)
        request = urllib.request.Request(url, method=method, headers={**(headers or {}), **_authorization(url)})
        request.add_header("User-Agent", f"bitdance/{__version__}")
        try:
            response: http.client.HTTPResponse = opener.open(request, timeout=TIMEOUT)
        except (OSError, http.client.HTTPException) as error:
            raise _fault(url, error) from error
        except ValueError:  # the message of which may hold the token
            raise UserError(f"{url}, or the token in HF_TOKEN, has characters that it cannot have.") from None
        moved = response.status in (301, 302, 303, 307, 308) and response.headers.get("Location")
        if not moved or (method == "HEAD" and response.headers.get("X-Linked-Size")):
            if not moved:
                _check_answer(url, response)
            return response
        response.close()
        url = urljoin(url, moved)
    raise UserError(f"{urlsplit(start).hostname} sends one round in circles for {start}: try again later.")


def _check_address(url: str, start: str) -> None:
    """Only https; plain http only from a loopback address to a loopback address, as in tests."""
    loopback = re.compile(r"http://(127\.0\.0\.1|\[::1\])[:/]")
    if not url.startswith("https://") and not (loopback.match(url) and loopback.match(start)):
        raise UserError(
            f"{url.partition('?')[0]} is not fetched, only https is: is HF_ENDPOINT right, or does the network ask for "
            "a login?"
        )


def _authorization(url: str) -> dict[str, str]:
    """The user's token, for the hub alone and not for where it sends one on to."""
    from huggingface_hub import constants, get_token

    if urlsplit(url)[:2] != urlsplit(constants.ENDPOINT)[:2]:
        return {}
    token = get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _check_answer(url: str, response: http.client.HTTPResponse) -> None:
    """Closes an answer that is no file, and says why.

    Raises:
        FileNotFoundError, _PassingFault, UserError: see `_request`.
    """
    host, status = urlsplit(url).hostname, response.status
    if status in (200, 206) and response.headers.get_content_type() != "text/html":
        return
    response.close()
    if status in (404, 410):
        raise FileNotFoundError(url)
    if status in (401, 403):
        raise UserError(
            f"{host} refuses {url.partition('?')[0]} (HTTP {status}): it may ask for a token, in HF_TOKEN, or the one "
            "that is set may be wrong."
        )
    if status in (408, 429) or status >= 500:
        raise _PassingFault(f"{host} is in trouble or busy (HTTP {status}): try again later.")
    if status in (200, 206):
        raise UserError(f"{host} answers with a web page instead of the file: does the network ask for a login?")
    raise UserError(f"{host} answers {url.partition('?')[0]} with HTTP {status}: try again later.")


def _fault(url: str, error: Exception) -> UserError:
    """What went wrong with a connection, as a sentence."""
    host = urlsplit(url).hostname
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, socket.gaierror):
        return _NoConnection(f"the address of {host} cannot be found: is there a network?")
    if isinstance(reason, ConnectionRefusedError):
        return _NoConnection(f"{host} refuses the connection: is the network or a proxy set up?")
    if isinstance(reason, ssl.SSLCertVerificationError):
        return _NoConnection(f"the certificate of {host} cannot be verified ({reason.verify_message}).")
    if isinstance(reason, TimeoutError):
        # urllib wraps what happens before the request is out: that a firewall swallows it all is likelier then.
        kind = _NoConnection if isinstance(error, urllib.error.URLError) else _PassingFault
        return kind(f"{host} did not answer for {TIMEOUT:g} seconds: is there a network?")
    if isinstance(reason, ConnectionError | http.client.HTTPException):
        return _PassingFault(f"the connection to {host} broke off ({type(reason).__name__}): try again later.")
    return _NoConnection(f"cannot connect to {host}: {reason}.")


def _title(algorithm: str) -> str:
    return {"sha256": "SHA-256", "md5": "MD5"}[algorithm]
