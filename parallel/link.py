"""Links between attention and FFN workers: a connection for each pair of them and each micro-batch in flight.

An FFN worker listens at a port that the kernel chose and says so in the store where all workers meet; attention workers
connect. There is no world and no group: a lost worker breaks its own links, and one that comes later joins like the
first. Each side can go as often as it likes; the store only holds the newest address of each seat. A service may have
another FFN pool beside the present one, with seats of its own, until it has changed over.

An attention worker that loses an FFN worker waits for the next one in that seat and asks it the same again: experts
keep nothing of a request. One that is silent for too long is as good as lost; that is left in the store for whoever can
end it.

A message is a head of fixed size and buffers after it, sent as they lie and received into one buffer, which is made
once for each link and grows to the largest message.

Why sockets and not gloo, whose groups of two would do: an exchange of 64 KiB there and back takes 85 us over gloo where
one thread waits, 3,450 us for each of three threads that wait on one pair, and 32 us for each of three over sockets
(two cores, real-time priority, torch 2.13). What carries GPU memory without the host has to offer `ask` and `answer`
likewise; today rows are copied through the host.
"""

from __future__ import annotations

import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

Buffer = memoryview | bytes
_HELLO = struct.Struct("<16sii")  # token, attention worker, micro-batch
_CONNECT_S = 60.0  # for an FFN worker that has said where it is
RETRY_S = 0.05  # until the store is asked again where the next one is


class LinkBroken(RuntimeError):
    """The other side of a link is gone, or did not answer in time."""


class Hello(NamedTuple):
    """Who connected."""

    attention: int
    micro_batch: int


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, whatever its dtype."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


class Seat(NamedTuple):
    """A place that one FFN worker after another may hold."""

    ffn: int
    pool: int = 0

    @property
    def key(self) -> str:
        return f"pool-{self.pool}-ffn-{self.ffn}"

    @property
    def silent_key(self) -> str:
        return f"{self.key}-silent"


class Link:
    """One end of a connection. One thread uses it at a time."""

    def __init__(self, connection: socket.socket, timeout: float | None) -> None:
        """`timeout`: longest silence within which the other side must say something; None: it may take its time."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(timeout)
        self._connection = connection
        self._memory = bytearray(1 << 16)

    def send(self, buffers: Sequence[Buffer]) -> None:
        """Raises OSError when the other side is gone."""
        left = [memoryview(buffer) for buffer in buffers if len(buffer)]
        while left:
            sent = self._connection.sendmsg(left)
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = left[0][sent:]

    def receive(self, into: memoryview) -> None:
        """Fill `into`. Raises ConnectionError when the other side is gone before, TimeoutError when it is silent."""
        done = 0
        while done < len(into):
            count = self._connection.recv_into(into[done:])
            if not count:
                raise ConnectionResetError("closed by the other side")
            done += count

    def memory(self, size: int) -> memoryview:
        """`size` bytes of the link's own buffer, good until the next call."""
        if size > len(self._memory):
            self._memory = bytearray(max(size, 2 * len(self._memory)))
        return memoryview(self._memory)[:size]

    def close(self) -> None:
        # Without shutdown, a thread that waits in recv on the socket would not notice.
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._connection.close()


class LastingLink:
    """An attention worker's end. It outlives the FFN worker: `renew` finds the next one in that seat.

    A `send` that fails says nothing; the `receive` that follows raises its error.
    """

    def __init__(self, dial: Callable[[str], tuple[Link, str]], report: Callable[[str], None], patience: float) -> None:
        """`dial`: a link and its address, which is not the one given. `report`: an address is silent.

        `patience`: seconds within which somebody must be reached.
        """
        self._dial, self._report, self._patience = dial, report, patience
        self._link, self._address = self._first()
        self._asked: list[Buffer] = []
        self._unsent: OSError | None = None

    def _first(self) -> tuple[Link, str]:
        """Whoever said where it is may be gone by now, and the next one be on its way."""
        until = time.monotonic() + self._patience
        while True:
            try:
                return self._dial("")
            except OSError:
                if time.monotonic() >= until:
                    raise
                time.sleep(RETRY_S)

    def send(self, buffers: Sequence[Buffer]) -> None:
        self._asked = list(buffers)
        try:
            self._link.send(buffers)
        except OSError as error:  # TimeoutError: one that is stopped takes what the system holds for it, and no more
            self._unsent = error

    def receive(self, into: memoryview) -> None:
        if self._unsent is not None:
            raise self._unsent
        self._link.receive(into)

    def renew(self, why: OSError) -> None:
        """Reach an FFN worker and ask it what was asked last. Raises `why` where there is none for too long."""
        silent, until = isinstance(why, TimeoutError), time.monotonic() + self._patience
        not_this = self._address if silent else ""
        if silent:
            self._report(self._address)
        while time.monotonic() < until:
            self._link.close()
            try:
                self._link, self._address = self._dial(not_this)
                self._link.send(self._asked)
                self._unsent = None
                return
            except OSError:
                time.sleep(RETRY_S)
        raise why

    def close(self) -> None:
        self._link.close()


class Listener:
    """Where an FFN worker is reached."""

    def __init__(self, store: dist.Store, seat: Seat) -> None:
        host = _own_address(store)
        self._token = secrets.token_bytes(16)  # whoever has not read the store is not let in
        self._socket = socket.create_server((host, 0), backlog=1024)
        port = self._socket.getsockname()[1]
        store.set(seat.key, f"{host} {port} {self._token.hex()}")

    def accept(self) -> tuple[Link, Hello]:
        """The next link. Raises OSError once the listener is closed."""
        while True:
            connection, _ = self._socket.accept()
            try:
                connection.settimeout(_CONNECT_S)
                token, attention, micro_batch = _HELLO.unpack(_exactly(connection, _HELLO.size))
            except OSError:
                connection.close()
                continue
            if not secrets.compare_digest(token, self._token):
                connection.close()
                continue
            return Link(connection, None), Hello(attention, micro_batch)

    def close(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._socket.close()


def connect(
    store: dist.Store, attention: int, seat: Seat, micro_batch: int, timeout: timedelta, patience: float = 0.0
) -> LastingLink:
    """Attention worker's side of a link; waits until the FFN worker has said where it is.

    `timeout`: of one answer. `patience`: seconds for a new FFN worker to come when this one is gone.
    """

    def dial(not_this: str) -> tuple[Link, str]:
        address = store.get(seat.key).decode()
        if address == not_this:
            raise ConnectionRefusedError("nobody else has come yet")
        host, port, token = address.split()
        connection = socket.create_connection((host, int(port)), _CONNECT_S)
        connection.sendall(_HELLO.pack(bytes.fromhex(token), attention, micro_batch))
        return Link(connection, timeout.total_seconds()), address

    def report(address: str) -> None:
        store.set(seat.silent_key, address)

    with naming(seat.ffn):
        return LastingLink(dial, report, patience)


def has_come(store: dist.Store, seat: Seat) -> bool:
    """Whether an FFN worker has said where it is."""
    return store.check([seat.key])


def silent_address(store: dist.Store, seat: Seat) -> bytes | None:
    """Where an attention worker says that the FFN worker does not answer; None: nobody does, or another has come."""
    if not store.check([seat.silent_key]):
        return None
    address = store.get(seat.silent_key)
    return address if address == store.get(seat.key) else None


@contextmanager
def naming(ffn: int) -> Iterator[None]:
    """A socket tells of an address; whoever reads the error wants to know which worker it was."""
    try:
        yield
    except OSError as error:
        why = "did not answer in time" if isinstance(error, TimeoutError) else "is gone"
        raise LinkBroken(f"FFN worker {ffn} {why}") from error


def _exactly(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        if not (part := connection.recv(size - len(received))):
            raise ConnectionResetError("closed by the other side")
        received += part
    return received


def _own_address(store: dist.Store) -> str:
    """The address of this machine from where the store is; a store without one is in this process."""
    host = getattr(store, "host", "127.0.0.1")
    if host in ("127.0.0.1", "localhost"):
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
        probe.connect((host, store.port))  # type: ignore[attr-defined]
        return probe.getsockname()[0]
