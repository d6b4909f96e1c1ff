"""The page's server: settings of gradio, its temporary folder, and its end."""

from __future__ import annotations

import importlib.util
import os
import queue
import secrets
import shutil
import signal
import socket
import tempfile
import threading

from bitdance.runtime.errors import UserError
from bitdance.web.guard import MAX_UPLOAD, Guard
from bitdance.web.offered_models import OfferedModels

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Addresses that only this machine reaches."""


def check_gradio() -> None:
    """Raises a `UserError` if gradio is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs gradio: pip install 'bitdance[web]'.")


def check_address(host: str, port: int) -> None:
    """Raises a `UserError` if a server cannot listen at this address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            if os.name == "posix":  # a port whose last connections are closing is free
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise UserError(f"host={host} is no address of this machine ({error.strerror}): choose another one.") from None
    except OSError as error:
        raise UserError(f"port={port} of {host} cannot be used ({error.strerror}): choose another one.") from None


def serve(models: OfferedModels, host: str, port: int) -> None:
    """Serves the page at an address until Ctrl-C or SIGTERM."""
    for variable in [variable for variable in os.environ if variable.startswith("GRADIO_")]:
        del os.environ[variable]  # such as paths to serve; options of the command alone count
    folder = os.path.join(os.path.realpath(tempfile.gettempdir()), f"bitdance-web-{secrets.token_hex(8)}")
    served = os.path.join(folder, "served")  # uploads, pictures and downloads
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "GRADIO_TEMP_DIR": served}
    from gradio.themes import Default
    from starlette.middleware import Middleware

    from bitdance.web.page import STYLE, build

    ended = _catch_signals()
    os.mkdir(folder, 0o700)  # only now, since a signal during the imports ends the process at once
    tempfile.tempdir = folder  # also of threads that still run at the end
    try:
        page = build(models)
        name_in_url = f"[{host}]" if ":" in host else host
        page.launch(
            server_name=name_in_url,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            allowed_paths=[],
            max_file_size=MAX_UPLOAD,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            footer_links=[],
            css=STYLE,
            theme=Default(font="system-ui", font_mono="monospace"),
            app_kwargs={"middleware": [Middleware(Guard, folder=served, hosts=LOOPBACK if host in LOOPBACK else None)]},
        )
        print(f"The page is at http://{name_in_url}:{page.server_port}/ (Ctrl-C ends it).", flush=True)
        ended.get()
        print(flush=True)
        page.close(verbose=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _catch_signals() -> queue.SimpleQueue[int]:
    """Returns a queue that receives the number of a first Ctrl-C or SIGTERM; a second one ends the process at once.

    An exception that a handler raises can be lost, as in a destructor.
    """
    caught: queue.SimpleQueue[int] = queue.SimpleQueue()

    def catch(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        caught.put(number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as Ctrl-C under nohup
                signal.signal(number, catch)
    return caught
