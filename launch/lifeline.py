"""A connection from each worker to its coordinator, which the kernel closes when the process ends, however it ends.

So a death is known at once, on whichever node it is. Who leaves an epoch as it should says so first. The other way
round, a worker whose line is cut ends itself: its rank is somebody else's by then, who must be the only one to write in
the run's folder.

    worker -> coordinator       its epoch and rank, when it is at work; GOODBYE, before it leaves

A process that is stopped closes nothing, and neither does a node without power: heartbeats and Ray tell of those.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import struct
import threading
from contextlib import suppress

import torch.distributed as dist

_KEY = "lifelines"  # in the store at which workers meet: the coordinator's port
_HELLO, _GOODBYE = struct.Struct("<ii"), b"."
_MOST = 4096  # workers that may come while nobody waits for news
# A worker asks whether the coordinator is there: after so many seconds of silence, then every so many, so many times.
# One that is cut off from it ends within half a minute.
_ASKS = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4))


class Lifelines:
    """The coordinator's ends of all lines. One thread uses it; any may call `wake`."""

    def __init__(self, host: str, store: dist.Store) -> None:
        """`host`: by which workers reach this process; `store`: where they learn the port."""
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        self._listener = socket.create_server((host, 0), family=family, backlog=_MOST)
        self._waker, self._woken = socket.socketpair()
        self._heard: dict[socket.socket, bytes] = {}  # on each line
        self._epoch = 0
        self._selector = selectors.DefaultSelector()
        for end in (self._listener, self._woken):
            self._watch(end)
        self._waker.setblocking(False)
        store.set(_KEY, str(self._listener.getsockname()[1]))

    def begin(self, epoch: int) -> None:
        """Only workers of `epoch` count from now on. The lines of others are cut, also of those that come late."""
        self._epoch = epoch
        for line, heard in list(self._heard.items()):
            if not self._may_hold(heard):
                self._close(line)

    def wait(self, seconds: float) -> list[int]:
        """The ranks whose lines broke. Waits up to `seconds` for anything to happen, or for `wake`."""
        broken = []
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._listener:
                with suppress(OSError):  # who came has gone again
                    line, _ = self._listener.accept()
                    self._heard[line] = b""
                    self._watch(line)
            elif key.fileobj is self._woken:
                self._woken.recv(1 << 12)
            else:
                assert isinstance(key.fileobj, socket.socket)
                broken += self._hear(key.fileobj)
        return broken

    def wake(self) -> None:
        """End a `wait` that goes on, or the next one."""
        with suppress(OSError):  # it is full: many woke it
            self._waker.send(b".")

    def cut(self, rank: int) -> None:
        """Have the worker of that rank end itself, as soon as it can."""
        for line, heard in list(self._heard.items()):
            if heard == _HELLO.pack(self._epoch, rank):
                self._close(line)

    def _hear(self, line: socket.socket) -> list[int]:
        """Take what came on a line; the rank that has lost it, if one has."""
        try:
            came = line.recv(1 << 12)
        except OSError:  # it was reset
            came = b""
        heard = self._heard[line] = self._heard[line] + came
        if came and self._may_hold(heard):
            return []
        self._close(line)
        return [] if came or len(heard) != _HELLO.size else [_HELLO.unpack(heard)[1]]

    def _may_hold(self, heard: bytes) -> bool:
        """Whether it is, as far as it goes, what a worker of this epoch says."""
        said = struct.pack("<i", self._epoch)
        return heard[: len(said)] == said[: len(heard)] and len(heard) <= _HELLO.size + len(_GOODBYE)

    def _watch(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._selector.register(end, selectors.EVENT_READ)

    def _close(self, line: socket.socket) -> None:
        del self._heard[line]
        self._selector.unregister(line)
        line.close()


class Lifeline:
    """A worker's end, until it is closed. When it is cut before, the process ends at once.

    None is held where the coordinator at `host` holds none, or cannot be reached there, as behind a firewall: of a
    death Ray will tell then.
    """

    def __init__(self, host: str, store: dist.Store, epoch: int, rank: int) -> None:
        self._closed, self._line = False, None
        if not store.check([_KEY]):
            return
        try:
            self._line = socket.create_connection((host, int(store.get(_KEY))))
            self._line.sendall(_HELLO.pack(epoch, rank))
        except OSError as error:
            logging.getLogger(__name__).warning("no line to the coordinator: %s", error)
            return
        self._line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _ASKS:
            self._line.setsockopt(socket.IPPROTO_TCP, option, value)
        threading.Thread(target=self._hold, args=(self._line,), name="lifeline", daemon=True).start()

    def _hold(self, line: socket.socket) -> None:
        with line, suppress(OSError):
            line.recv(1)  # nothing ever comes but the end
        if not self._closed:
            os._exit(1)

    def close(self) -> None:
        """The worker leaves, and lives."""
        self._closed = True
        if self._line is not None:
            with suppress(OSError):  # it was cut just now
                self._line.sendall(_GOODBYE)
                self._line.shutdown(socket.SHUT_RDWR)
