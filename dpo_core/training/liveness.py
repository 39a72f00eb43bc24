"""Liveness: detects within seconds that another rank is lost, whatever this rank is doing.

A collective cannot distinguish a lost rank from a slow one: its timeout (`engine.timeout_seconds`) must be
longer than the slowest step and checkpoint. Therefore rank 0 keeps an idle TCP connection to each other rank.
The kernel of the other node answers its keep-alive probes, so a rank that computes, compiles, writes or holds
the interpreter's lock for minutes does not count as lost. A process that ends closes the connection at once;
a node that loses power or network stops answering. Rank 0 reports a lost rank to the others.
"""

import contextlib
import itertools
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import torch

from dpo_core.errors import StageFailed

_BYE, _TOKEN = b"bye", 32
_starts = itertools.count()


class LivenessMonitor:
    """The connections of this rank and the thread that listens on them. With one rank it does nothing.

    Args:
        lost: called in that thread with a description of the lost rank; must end the process with
            `os._exit`. The main thread may wait in C for a collective, or for an NCCL kernel that spins on
            the GPU: no exception can reach it there, and an orderly exit would wait too.
        grace: seconds in which the main thread may fail first, with an error that says more.
    """

    def __init__(self, lost: Callable[[str], None], grace: float = 3.0) -> None:
        self._lost, self._grace = lost, grace
        self._peers: dict[socket.socket, str] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="watch", daemon=True)

    def start(self, silence: float, timeout: float) -> None:
        """Connect and listen. Every rank calls this after it has joined the process group.

        Args:
            silence: seconds without an answer after which a rank is lost.
            timeout: seconds that rank 0 waits for the others to connect.

        Raises:
            StageFailed: rank 0 and another rank cannot reach each other.
        """
        group = torch.distributed.distributed_c10d
        rank, world = group.get_rank(), group.get_world_size()
        if world == 1:
            return
        # A new key each time: one process may run several jobs.
        self.connect(group._get_default_store(), f"watch/{next(_starts)}", rank, world, silence, timeout)

    def connect(self, store: Any, key: str, rank: int, world: int, silence: float, timeout: float) -> None:
        """As `start`, with any store of torch."""
        if rank == 0:
            self._accept(store, key, world - 1, time.monotonic() + timeout)
        else:
            self._join(store, key, rank, timeout)
        for peer in self._peers:
            _probe(peer, silence)
        self._thread.start()

    def _accept(self, store: Any, key: str, others: int, deadline: float) -> None:
        token = secrets.token_hex(_TOKEN // 2)
        with _server(others) as server:
            store.set(key, f"{server.getsockname()[1]} {token}")
            while len(self._peers) < others:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    peer, _ = server.accept()
                except TimeoutError:
                    connected = set(self._peers.values())
                    absent = [n for n in range(1, others + 1) if f"rank {n}" not in connected]
                    raise StageFailed(
                        f"{len(absent)} of {others} ranks did not connect to rank 0: "
                        f"{', '.join(map(str, absent[:8]))}{' …' if len(absent) > 8 else ''}",
                        "See job.log in the job's folder for their errors",
                    ) from None
                # Other connections to the port, such as a rank of an earlier start, lack the token.
                hello = _read(peer, _TOKEN + 8).decode(errors="replace")
                if hello[:_TOKEN] == token:
                    self._peers[peer] = f"rank {int(hello[_TOKEN:])}"
                else:
                    peer.close()

    def _join(self, store: Any, key: str, rank: int, timeout: float) -> None:
        port, token = store.get(key).decode().split()
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        try:
            peer = socket.create_connection((host, int(port)), timeout)
            peer.settimeout(None)
            peer.sendall(f"{token}{rank:8d}".encode())
        except OSError as error:
            raise StageFailed(
                f"rank {rank} cannot reach rank 0 at {host} port {port} ({error})",
                "Allow connections between the nodes on every TCP port",
            ) from error
        self._peers[peer] = "rank 0"

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    peer = cast(socket.socket, key.fileobj)
                    message = self._receive(peer)
                    if self._over.is_set():
                        return
                    if message == _BYE:
                        selector.unregister(peer)
                        continue
                    self._send(message)
                    if not self._over.wait(self._grace):
                        self._lost(message.decode())
                    return

    def _receive(self, peer: socket.socket) -> bytes:
        """The message of another rank (it leaves, or it has lost a rank), or why the connection failed."""
        try:
            message = peer.recv(200)
        except OSError as error:
            return f"{self._peers[peer]}: {error.strerror}".encode()
        return message or f"{self._peers[peer]} has ended".encode()

    def _send(self, message: bytes) -> None:
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.sendall(message)

    def mute(self) -> None:
        """Do not report lost ranks any more: the main thread has failed and reports its own error."""
        self._over.set()

    def leave(self) -> None:
        """Stop; the other ranks continue without this one."""
        self._over.set()
        self._send(_BYE)
        self.close()

    def close(self) -> None:
        """Stop. The other ranks count this one as lost unless `leave` was called."""
        self._over.set()
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)  # wakes the thread
        if self._thread.is_alive():
            self._thread.join()
        for peer in self._peers:
            peer.close()
        self._peers.clear()


def _server(backlog: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=backlog)


def _read(peer: socket.socket, size: int) -> bytes:
    peer.settimeout(5)
    data = b""
    with contextlib.suppress(OSError):
        while len(data) < size and (more := peer.recv(size - len(data))):
            data += more
    peer.settimeout(None)
    return data


def _probe(peer: socket.socket, silence: float) -> None:
    """Enable keep-alive: the kernel sends five probes within the allowed silence."""
    interval = max(1, int(silence / 5))
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", interval),
        ("TCP_KEEPINTVL", interval),
        ("TCP_KEEPCNT", 5),
        ("TCP_USER_TIMEOUT", int(silence * 1000)),  # overrides the count on systems that have it
    ):
        if hasattr(socket, option):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
