"""The page's server: settings of gradio, its temporary folder, and its end."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading

from bitdance.runtime.errors import UserError
from bitdance.web.guard import MAX_UPLOAD, Guard
from bitdance.web.offered_models import OfferedModels


def check_gradio() -> None:
    """Raises a `UserError` if gradio is not installed."""
    import importlib.util

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
    """Serves the page until Ctrl-C or SIGTERM.

    Args:
        models: what the page offers.
        host: address to listen at.
        port: its port.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="bitdance-web-") as name:  # uploads, pictures and downloads
        folder = os.path.realpath(name)
        for variable in [variable for variable in os.environ if variable.startswith("GRADIO_")]:
            del os.environ[variable]  # such as paths to serve; options of the command alone count
        os.environ |= {
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_RUN_HISTORY": "False",
            "GRADIO_TEMP_DIR": folder,
        }
        from gradio.themes import Default
        from starlette.middleware import Middleware

        from bitdance.web.page import STYLE, build

        page = build(models)
        name_in_url = f"[{host}]" if ":" in host else host
        try:
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
                app_kwargs={"middleware": [Middleware(Guard, folder=folder)]},
            )
            print(f"The page is at http://{name_in_url}:{page.server_port}/ (Ctrl-C ends it).", flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            print()
        finally:
            page.close(verbose=False)
