"""What a page's server answers: the requests that the page itself makes, and nothing else.

The framework has more routes than the page needs, some of which fetch addresses or serve files of the server. All but
those listed here are refused before they reach it.
"""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Awaitable, Callable, Container, MutableMapping
from typing import Any

MAX_UPLOAD = 20 * 2**20
"""Bytes of an uploaded picture."""

MAX_CALL = 2**16
"""Bytes of any other request: a few settings."""

_API = "/gradio_api"
_ROUTES = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)|/(assets|static|svelte)/.+"
    rf"|{_API}/(startup-events|app_id|theme\.css|cancel|reset|upload|upload_progress|queue/(join|data)|heartbeat/\w+)"
)
_FILE = f"{_API}/file="
_OWN = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'; form-action 'self'"
"""A content security policy: the browser loads nothing from anywhere else."""

_HEADERS = [(b"content-security-policy", _OWN.encode()), (b"referrer-policy", b"no-referrer")]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """ASGI middleware that refuses, with status 403 or 413, what the page does not ask for.

    Args:
        app: the application behind it.
        folder: the only folder whose files are served, absolute.
        hosts: names of the server that a request may have, None for any. Otherwise the page of a foreign server could
            let its own name point to this machine (DNS rebinding) and send requests.
    """

    def __init__(
        self, app: Callable[[Any, Receive, Send], Awaitable[None]], folder: str, hosts: Container[str] | None = None
    ) -> None:
        self._app, self._folder, self._hosts = app, folder.rstrip("/") + "/", hosts

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if scope["type"] != "http" or not self._is_known(scope["path"]) or not self._is_host(headers.get(b"host", b"")):
            await _refuse(scope, send, 403)
            return
        is_upload = scope["path"] == f"{_API}/upload"
        if scope["method"] == "POST":
            length = headers.get(b"content-length", b"")
            most = MAX_UPLOAD + MAX_CALL if is_upload else MAX_CALL
            if not length.isdigit() or int(length) > most:
                await _refuse(scope, send, 413)
                return
            if not is_upload:
                body = await _read(receive)
                if not _is_harmless(body):
                    await _refuse(scope, send, 403)
                    return
                receive = _replay(body, receive)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        await self._app(scope, receive, send_with_headers)

    def _is_host(self, header: bytes) -> bool:
        if self._hosts is None:
            return True
        try:
            return urllib.parse.urlsplit(f"//{header.decode('latin-1')}").hostname in self._hosts
        except ValueError:
            return False

    def _is_known(self, path: str) -> bool:
        if ".." in path.split("/") or "\\" in path or "\0" in path:
            return False
        if path.startswith(_FILE):
            return path.removeprefix(_FILE).startswith(self._folder)
        return _ROUTES.fullmatch(path) is not None


async def _refuse(scope: Message, send: Send, status: int) -> None:
    if scope["type"] != "http":
        await send({"type": "websocket.close"})
        return
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"This server does not answer that.\n"})


async def _read(receive: Receive) -> bytes:
    body, more = b"", True
    while more and len(body) <= MAX_CALL:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """Returns a `receive` that gives a body that was read, then what comes next."""
    is_given = False

    async def replay() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _is_harmless(body: bytes) -> bool:
    """Whether no file in the arguments of a call is an address, which the framework would fetch."""
    try:
        parts = [json.loads(body or b"null")]
    except (ValueError, RecursionError):
        return False
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            path = part.get("path")
            if isinstance(path, str) and ":" in path.split("/")[0]:
                return False
            parts += part.values()
        elif isinstance(part, list):
            parts += part
    return True
