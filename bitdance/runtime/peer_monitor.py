"""Processes on many machines end together: connections that break when a process dies, and a thread that notices.

torchrun stops the processes of its own machine when one of them dies; those of other machines would go on, and wait for
hours at the next point where all meet.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

PORT_KEY = "lifeline"
GOODBYE = b"."
GRACE = 1.0
"""Seconds that a process has to end by itself, with a better sentence, once another one has ended."""


class Lifeline:
    """Ends this process within seconds after another one of the same job has died.

    The first process listens, the others hold a connection to it, on which nothing is ever said but a goodbye: the
    system closes it when a process ends in whatever way, and keep-alive packets find machines that are gone.

    Args:
        store: of the process group, through which the first process says at which port it listens.
        host: where the first process runs.
        rank, size: of this process, and the number of all.
    """

    def __init__(self, store: Store, host: str, rank: int, size: int) -> None:
        self._rank = rank
        self._peers: dict[socket.socket, int] = {}
        self._leaving = threading.Event()
        if rank == 0:
            family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
            with socket.create_server(
                ("", 0), family=family, backlog=size, dualstack_ipv6=family != socket.AF_INET
            ) as server:
                server.settimeout(60.0)
                store.set(PORT_KEY, str(server.getsockname()[1]))
                while len(self._peers) < size - 1:
                    peer, _ = server.accept()
                    peer.settimeout(60.0)
                    self._peers[peer] = int.from_bytes(_receive(peer, 4), "big")
        else:
            port = int(store.get(PORT_KEY).decode())
            peer = socket.create_connection((host, port), timeout=60.0)
            peer.sendall(rank.to_bytes(4, "big"))
            self._peers[peer] = 0
        for peer in self._peers:
            peer.settimeout(None)
            _keep_alive(peer)
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer, selectors.EVENT_READ, data=peer)
            while selector.get_map():
                for key, _ in selector.select():
                    peer = key.data
                    try:
                        said = peer.recv(1)
                    except OSError:
                        said = b""
                    selector.unregister(peer)
                    if said != GOODBYE:
                        self._end(self._peers[peer])

    def _end(self, other: int) -> None:
        if self._leaving.wait(GRACE):
            return
        # The first process is the hub: where it ends, some process that it watched may have been the one that died.
        who = "the first process or one that it watched" if other == 0 else f"process {other}"
        print(
            f"bitdance: process {self._rank} stops, since {who} has ended: see its messages, then run the same command "
            "again.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def leave(self) -> None:
        """Says goodbye: from now on the others may go on without this process, and it without them."""
        self._leaving.set()
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.sendall(GOODBYE)


def _receive(peer: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        if not (more := peer.recv(count - len(data))):
            raise OSError("the connection broke")
        data += more
    return data


def _keep_alive(peer: socket.socket) -> None:
    """Has the system ask every few seconds whether the other machine is still there, where it can."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, seconds in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
