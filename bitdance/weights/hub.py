"""Download of published files: the released weights, ADM's reference batches, the Inception network and LPIPS.

`huggingface_hub` transfers files of the hub, `torch.hub` other files, into the folder `.<name>.download` beside the
destination. There a file is compared with the published size and SHA-256, synced and renamed. Within a command the
client of the hub continues after a broken connection; a plain address is tried three times. After a kill the next
command removes this folder and starts from the beginning.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import math
import pathlib
import re
import shutil
import socket
import sys
import urllib.request
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from urllib.parse import urlsplit

from bitdance.config import RELEASED_MODELS
from bitdance.runtime.atomic_files import atomic_write, file_digest, lock_file, make_folder
from bitdance.runtime.errors import UserError, did_you_mean

REPOSITORY = "shallowdream204/BitDance-ImageNet"
FOLDER = pathlib.Path("models/BitDance-ImageNet")
EVALUATION_FOLDER = pathlib.Path("models/evaluation")
AUTOENCODER_FILE = "ae_d16c32.pt"


class PlainFile(NamedTuple):
    """A published file from elsewhere: its address, its name here, and its SHA-256 or the first digits of it."""

    url: str
    file: str
    sha256: str = ""


HUB_FILES = {**{name: release.file for name, release in RELEASED_MODELS.items()}, "autoencoder": AUTOENCODER_FILE}
_ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
PLAIN_FILES = {
    "reference-256": PlainFile(f"{_ADM}/256/VIRTUAL_imagenet256_labeled.npz", "VIRTUAL_imagenet256_labeled.npz"),
    "reference-512": PlainFile(f"{_ADM}/512/VIRTUAL_imagenet512.npz", "VIRTUAL_imagenet512.npz"),
    "inception": PlainFile(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "pt_inception-2015-12-05-6726825d.pth",
        "6726825d",
    ),
    "vgg16": PlainFile(
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    ),
    "lpips-vgg": PlainFile(
        "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
        "lpips-vgg-v0.1.pth",
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    ),
}
GROUPS = {"all": tuple(HUB_FILES), "lpips": ("vgg16", "lpips-vgg")}
"""Names of several files."""

_TOKEN_ADVICE = "it may require a token in HF_TOKEN, or the one that is set may be wrong"
_ADVICE = {401: _TOKEN_ADVICE, 403: _TOKEN_ADVICE, 404: "it was moved or renamed; fetch it by hand"}
_NO_FILE = "the answer is not the file; does the network ask for a login?"


class DownloadResult(NamedTuple):
    """A file at its destination: its path, its size in bytes, and what was done and compared."""

    path: pathlib.Path
    size: int
    note: str


class _Remote(NamedTuple):
    url: str
    target: pathlib.Path
    size: int  # bytes
    sha256: str  # hexadecimal, or the first digits of it; "" if none is published
    revision: str = ""  # the commit of the hub's repository, "" for a file from elsewhere


def released_name(name: str) -> str | None:
    """The key in `RELEASED_MODELS` of a name such as B-16X or BitDance-B-16X, in any case; None if there is none."""
    short = name.upper().removeprefix("BITDANCE-")
    return short if short in RELEASED_MODELS else None


def is_repository(name: str) -> bool:
    """Returns whether a name is one of the hub: a user or an organization, a slash, and a name."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", name))


def fetch_repository(name: str) -> pathlib.Path:
    """Downloads the networks of a repository on the hub to the client's cache and returns their folder.

    It holds `model.safetensors` and `autoencoder.safetensors`, as `Pipeline.push_to_hub` writes, or one model in the
    released layout, and its autoencoder unless that is inside.

    Raises:
        UserError: there is no such repository, it holds something else, or it cannot be reached.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    try:
        with client_errors(f"{constants.ENDPOINT}/{name}", f"there is no file or folder {name}, nor a download of it"):
            files = HfApi(library_name="bitdance").list_repo_files(name)
            ours = [file for file in files if file in ("model.safetensors", "autoencoder.safetensors")]
            models = [file for file in files if file.endswith(".pt") and file != AUTOENCODER_FILE]
            if not ours and len(models) != 1:
                raise UserError(f"{name} on the hub holds {len(models)} models: download one file of it and name that.")
            wanted = ours or [file for file in (*models, AUTOENCODER_FILE) if file in files]
            return pathlib.Path(snapshot_download(name, allow_patterns=wanted))
    except UserError:
        with contextlib.suppress(Exception):  # whatever the client says of what is not in its cache
            return pathlib.Path(
                snapshot_download(name, local_files_only=True, allow_patterns=["*.safetensors", "*.pt"])
            )
        raise


def find(path: pathlib.Path) -> pathlib.Path | None:
    """The file at `path`, or the one beside it in the other spelling: the hub's page writes B_1X as B_1x."""
    old, new = ("X.pt", "x.pt") if path.name.endswith("X.pt") else ("x.pt", "X.pt")
    other = path.with_name(path.name.removesuffix(old) + new) if path.name.endswith(old) else path
    return next((candidate for candidate in (path, other) if candidate.exists()), None)


def download(names: Iterable[str], folder: pathlib.Path = FOLDER, verify: bool = False) -> Iterator[DownloadResult]:
    """Downloads published files that are not there yet; yields each as soon as it is at its destination.

    Before the first transfer all files are looked up on their servers, and the free disk space is compared with what
    they need. When several processes ask for the same file, one downloads it and the others wait. With HF_HUB_OFFLINE
    set, files that are there are used as they are.

    Args:
        names: released models such as B-16X or BitDance-B-16X, or other keys of `HUB_FILES`, `PLAIN_FILES` and
            `GROUPS`.
        folder: of the models and the autoencoder; the other files go to `EVALUATION_FOLDER`.
        verify: compare the SHA-256 of files that are there already, not only their sizes.

    Raises:
        UserError: a name is unknown, a file cannot be downloaded or is damaged, or the disk is too small.
    """
    from huggingface_hub import constants

    places = {name: find(folder / file) or folder / file for name, file in HUB_FILES.items()}
    places |= {name: EVALUATION_FOLDER / plain.file for name, plain in PLAIN_FILES.items()}
    targets = {name: places[name] for name in _resolve(names)}
    if constants.HF_HUB_OFFLINE:
        for target in targets.values():
            if not target.exists():
                raise UserError(
                    f"{target} does not exist, and HF_HUB_OFFLINE disables downloads: unset it, or copy the file there."
                )
            note = "already downloaded, not compared because HF_HUB_OFFLINE is set"
            yield DownloadResult(target, target.stat().st_size, note)
        return
    remotes = [_look_up(name, target) for name, target in targets.items()]
    present = {remote: _find_present(remote, verify) for remote in remotes}
    _check_space([remote for remote in remotes if not present[remote]])
    for remote in remotes:
        yield present[remote] or _fetch(remote, verify)


def _resolve(names: Iterable[str]) -> list[str]:
    """The keys of `HUB_FILES` and `PLAIN_FILES` that are meant, each once, with groups expanded."""
    known = {key.lower(): key for key in (*HUB_FILES, *PLAIN_FILES, *GROUPS)}
    chosen: list[str] = []
    for name in names:
        key = name.lower().removeprefix("bitdance-")
        if key not in known:
            hint = did_you_mean(name, known.values())
            raise UserError(f"there is no download {name!r}: {hint}choose from {', '.join(known.values())}.")
        chosen += GROUPS.get(key, (known[key],))
    return list(dict.fromkeys(chosen))


def _look_up(name: str, target: pathlib.Path) -> _Remote:
    """Asks the server for the size and the digest of a file."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    timeout, problem = constants.HF_HUB_ETAG_TIMEOUT, f"cannot download {target}"
    if plain := PLAIN_FILES.get(name):
        url = plain.url
        # The headers of a GET: the address that a server redirects to may be signed for that method only.
        with client_errors(url, problem), urllib.request.urlopen(url, timeout=timeout) as response:
            size = int(response.headers.get("Content-Length", 0))
            if not size or response.headers.get_content_type() == "text/html":
                raise OSError(_NO_FILE)
        return _Remote(url, target, size, plain.sha256)
    url = hf_hub_url(REPOSITORY, HUB_FILES[name])
    with client_errors(url, problem):
        # Without a network this fails at once, whereas hf_hub_download would retry for 23 seconds.
        try:
            metadata = get_hf_file_metadata(url, timeout=timeout)
        except EntryNotFoundError:
            url = url.replace("X.pt", "x.pt")
            metadata = get_hf_file_metadata(url, timeout=timeout)
        if metadata.size is None or metadata.commit_hash is None:
            raise OSError(_NO_FILE)
    sha256 = re.fullmatch("[0-9a-f]{64}", metadata.etag or "")
    return _Remote(url, target, metadata.size, sha256[0] if sha256 else "", metadata.commit_hash)


def _find_present(remote: _Remote, verify: bool) -> DownloadResult | None:
    """The file at its destination, if it has the published size and, with `verify`, the published SHA-256."""
    with contextlib.suppress(OSError, UserError):
        note = f"already downloaded, {_compare(remote.target, remote, verify)}"
        return DownloadResult(remote.target, remote.size, note)
    return None


def _compare(path: pathlib.Path, remote: _Remote, verify: bool) -> str:
    """Compares a file with the published one; returns what was compared, or raises a `UserError`."""
    sha256 = remote.sha256 if verify else ""
    if path.stat().st_size != remote.size or (sha256 and not file_digest(path).startswith(sha256)):
        expected = f"{remote.size} bytes" + (f" with SHA-256 {sha256}" if sha256 else "")
        raise UserError(f"the downloaded {remote.target.name} is damaged: expected {expected}; run the command again.")
    return "SHA-256 as published" if sha256 else "size as on the server"


def _check_space(remotes: list[_Remote]) -> None:
    """Compares the sizes of the files with the free space of each file system; creates their folders."""
    needed: collections.Counter[int] = collections.Counter()
    for remote in remotes:
        folder = remote.target.parent
        make_folder(folder)
        device, free = folder.stat().st_dev, shutil.disk_usage(folder).free
        needed[device] += remote.size
        if needed[device] > free:
            sizes = f"{needed[device] / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free"
            raise UserError(f"there is no space for {remote.target}: {sizes}; free some or choose another folder.")


def _fetch(remote: _Remote, verify: bool) -> DownloadResult:
    """Downloads a file, compares it and moves it to its destination, unless another process does so meanwhile."""
    from huggingface_hub import hf_hub_download

    target, name = remote.target, remote.url.rpartition("/")[2]
    lock, staging = (target.with_name(f".{target.name}.{suffix}") for suffix in ("lock", "download"))
    with lock_file(lock, math.inf, f"another process is downloading {target}: waiting for it."):
        try:
            if present := _find_present(remote, verify):
                return present
            shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
            make_folder(staging)
            with client_errors(remote.url, f"cannot download {target}"):
                if remote.revision:
                    # force_download: neither a copy from the client's cache, nor retries of its own look-up
                    hf_hub_download(REPOSITORY, name, revision=remote.revision, local_dir=staging, force_download=True)
                else:
                    _download_url(remote, staging / name)
            compared = _compare(staging / name, remote, verify=True)
            with atomic_write(target) as temporary:
                (staging / name).rename(temporary)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            with contextlib.suppress(OSError):
                lock.unlink()
    return DownloadResult(target, remote.size, f"fetched, {compared}")


def _download_url(remote: _Remote, path: pathlib.Path) -> None:
    """Downloads a file from a plain address; a connection that breaks off is tried again."""
    import torch.hub
    from huggingface_hub import constants

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(constants.HF_HUB_DOWNLOAD_TIMEOUT)  # `torch.hub` sets none
    try:
        for _ in range(3):
            torch.hub.download_url_to_file(remote.url, str(path), progress=sys.stderr.isatty())
            if path.stat().st_size == remote.size:  # it does not notice a truncated body
                break
    finally:
        socket.setdefaulttimeout(timeout)


@contextlib.contextmanager
def client_errors(url: str, problem: str) -> Iterator[None]:
    """Turns any error of a client into a `UserError`: the HTTP libraries behind huggingface_hub differ by version."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        host = urlsplit(url).hostname or url
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
            causes.append(cause)
        for cause in causes:
            status = getattr(getattr(cause, "response", cause), "status_code", getattr(cause, "code", None))
            if isinstance(status, int):
                advice = _ADVICE.get(status, "try again later")
                raise UserError(f"{host} answers {url} with HTTP {status}: {advice}.") from error
            if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"{problem}: the disk is full; free some space and run the command again.") from error
        root = causes[-1]
        # The text of other errors, and what is in brackets, may show the token or a signed address.
        text = re.split(r"[(\n]", str(root))[0].strip() if type(root) in (OSError, TimeoutError) else ""
        reason = getattr(root, "strerror", None) or text or type(root).__name__
        raise UserError(
            f"{problem} ({host}: {reason}): check the network, the proxy, and for the hub HF_ENDPOINT and "
            "HF_TOKEN, then run the command again."
        ) from error
