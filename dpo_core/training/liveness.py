"""Notices within seconds that another rank is gone, whatever this one is doing.

A collective cannot tell a lost rank from a slow one: its limit (`engine.timeout_seconds`) must outlast the
slowest step and checkpoint. So rank 0 and each other rank hold one idle TCP connection beside. It is the
kernel at the far end that answers its keep-alive probes: a rank that computes, compiles, writes or holds the
interpreter's lock for minutes is never taken for a lost one. A process that ends closes the connection at
once; a node without power or cable lets it fall silent. Rank 0 tells the others whom it lost.
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
    """The connections of this rank and the thread that listens to them. With one rank it does nothing.

    Args:
        lost: called in that thread with what is known of the lost rank, and must end the process with
            `os._exit`: the main thread may wait in C for a collective, or for an NCCL kernel that spins on
            the GPU, where no exception reaches it, and an orderly exit would wait there too.
        grace: seconds for the main thread to fail by itself, which says more than that a rank is gone.
    """

    def __init__(self, lost: Callable[[str], None], grace: float = 3.0) -> None:
        self._lost, self._grace = lost, grace
        self._peers: dict[socket.socket, str] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="watch", daemon=True)

    def start(self, silence: float, timeout: float) -> None:
        """Connect and listen; every rank calls this once all have joined the process group.

        Args:
            silence: seconds without a sign of life after which a rank is lost.
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
        """As `start`, by any store of torch."""
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
                    raise StageFailed(
                        f"{others - len(self._peers)} of {others} ranks did not connect to rank 0",
                        "Look at their logs",
                    ) from None
                # Whoever else finds the port, a rank of a start that failed for one, does not know the token.
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
                "Let the nodes reach each other on every TCP port",
            ) from error
        self._peers[peer] = "rank 0"

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    peer = cast(socket.socket, key.fileobj)
                    word = self._hear(peer)
                    if self._over.is_set():
                        return
                    if word == _BYE:
                        selector.unregister(peer)
                        continue
                    self._tell(word)
                    if not self._over.wait(self._grace):
                        self._lost(word.decode())
                    return

    def _hear(self, peer: socket.socket) -> bytes:
        """What another rank says: that it leaves, or whom it has lost; or why it says nothing any more."""
        try:
            word = peer.recv(200)
        except OSError as error:
            return f"{self._peers[peer]}: {error.strerror}".encode()
        return word or f"{self._peers[peer]} has ended".encode()

    def _tell(self, word: bytes) -> None:
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.sendall(word)

    def mute(self) -> None:
        """The main thread has failed and is about to say why: from now on this thread says nothing."""
        self._over.set()

    def leave(self) -> None:
        """Say good-bye and stop; the others go on without this rank."""
        self._over.set()
        self._tell(_BYE)
        self.close()

    def close(self) -> None:
        """Stop. To the others this rank is lost, unless it has left."""
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
    """Let the kernel ask for a sign of life five times within the silence that it bears."""
    interval = max(1, int(silence / 5))
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", interval),
        ("TCP_KEEPINTVL", interval),
        ("TCP_KEEPCNT", 5),
        ("TCP_USER_TIMEOUT", int(silence * 1000)),  # decides in place of the count, where there is one
    ):
        if hasattr(socket, option):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
