"""Links carry bytes whole and in order, tell of the other side's end, and let in whoever read the store."""

from __future__ import annotations

import socket
from contextlib import suppress
from datetime import timedelta
from threading import Thread, Timer
from time import sleep

import pytest
import torch
import torch.distributed as dist

from expertmesh.parallel.link import Hello, Link, LinkBroken, Listener, Seat, as_bytes, connect, naming, silent_address

WAIT = timedelta(seconds=20)


@pytest.fixture
def store() -> dist.HashStore:
    made = dist.HashStore()
    made.set_timeout(WAIT)
    return made


def pair(store: dist.Store, timeout: timedelta = WAIT) -> tuple[Link, Link]:
    """An attention worker's end and the FFN worker's."""
    listener = Listener(store, Seat(0))
    attention = connect(store, 3, Seat(0), 1, timeout)
    ffn, who = listener.accept()
    listener.close()
    assert who == Hello(3, 1)
    return attention, ffn


MESSAGES = [
    ([b""], "nothing"),
    ([b"a"], "one byte"),
    ([b"head", b"", b"body"], "an empty buffer between others"),
    ([bytes(range(256)) * 40_000], "ten megabytes: more than any buffer of the system"),
    ([b"h", *[bytes([i]) * 1000 for i in range(200)]], "many buffers"),
]


@pytest.mark.parametrize("buffers, reason", MESSAGES, ids=[reason for _, reason in MESSAGES])
def test_messages_arrive_whole(store, buffers, reason):
    attention, ffn = pair(store)
    sender = Thread(target=attention.send, args=(buffers,), daemon=True)
    sender.start()
    whole = b"".join(buffers)
    memory = ffn.memory(len(whole))
    ffn.receive(memory)
    assert bytes(memory) == whole
    sender.join(20)
    ffn.send([b"ok"])
    answer = memoryview(bytearray(2))
    attention.receive(answer)
    assert bytes(answer) == b"ok"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.uint8, torch.float8_e4m3fn])
def test_tensors_are_bytes(dtype):
    tensor = torch.arange(6).view(2, 3).to(dtype)
    data = as_bytes(tensor)
    assert len(data) == 6 * dtype.itemsize
    assert torch.equal(torch.frombuffer(data, dtype=torch.uint8), tensor.view(-1).view(torch.uint8))
    assert len(as_bytes(tensor[:0])) == 0
    as_bytes(tensor)[:] = bytes(len(data))
    assert not tensor.float().any(), "the memory itself, not a copy"


def test_links_are_their_own(store):
    """Two micro-batches of one pair: a message of one does not come out of the other."""
    listener = Listener(store, Seat(0))
    ends = {}
    for micro_batch in range(2):
        attention = connect(store, 0, Seat(0), micro_batch, WAIT)
        link, who = listener.accept()
        ends[who.micro_batch] = attention, link
    ends[1][0].send([b"one"])
    ends[0][0].send([b"two"])
    for micro_batch, said in ((0, b"two"), (1, b"one")):
        memory = ends[micro_batch][1].memory(3)
        ends[micro_batch][1].receive(memory)
        assert bytes(memory) == said


def test_the_other_end_is_gone(store):
    attention, ffn = pair(store)
    ffn.close()
    with pytest.raises(LinkBroken, match="FFN worker 5 is gone"), naming(5):
        attention.receive(memoryview(bytearray(1)))
    for _ in range(100):  # the system takes the first ones, and of the others `receive` says it
        attention.send([bytes(1 << 16)])
    with pytest.raises(LinkBroken, match="FFN worker 5 is gone"), naming(5):
        attention.receive(memoryview(bytearray(1)))
    with pytest.raises(LinkBroken, match="FFN worker 7 is gone"), naming(7):
        attention.renew(ConnectionError())  # its listener closed with it, and nobody came
    with pytest.raises(OSError):
        for _ in range(100):
            ffn.send([bytes(1 << 16)])


def test_a_thread_that_waits_notices_its_own_end_closing(store):
    attention, ffn = pair(store)
    seen = []

    def wait() -> None:
        try:
            ffn.receive(ffn.memory(1))
        except OSError as error:
            seen.append(error)

    thread = Thread(target=wait, daemon=True)
    thread.start()
    ffn.close()
    thread.join(20)
    assert seen and attention


def test_silence_is_an_end_for_whoever_waits_for_an_answer(store):
    attention, _ = pair(store, timeout=timedelta(seconds=0.05))
    with pytest.raises(LinkBroken, match="FFN worker 2 did not answer in time"), naming(2):
        attention.receive(memoryview(bytearray(1)))


def test_strangers_are_not_let_in(store):
    listener = Listener(store, Seat(0))
    host, port, _ = store.get(Seat(0).key).decode().split()
    impostor = socket.create_connection((host, int(port)))
    impostor.sendall(bytes(24))
    mute = socket.create_connection((host, int(port)))
    mute.close()
    friend = connect(store, 1, Seat(0), 0, WAIT)
    link, who = listener.accept()
    assert who == Hello(1, 0)
    impostor.settimeout(20)
    assert impostor.recv(1) == b"", "it is hung up on"
    friend.send([b"x"])
    memory = link.memory(1)
    link.receive(memory)
    assert bytes(memory) == b"x"


def test_a_worker_that_comes_again_is_found_at_its_new_place(store):
    first = Listener(store, Seat(0))
    first.close()
    second = Listener(store, Seat(0))
    connect(store, 0, Seat(0), 0, WAIT)
    assert second.accept()[1] == Hello(0, 0)


def test_nobody_there():
    store = dist.HashStore()
    store.set(Seat(4).key, f"127.0.0.1 1 {bytes(16).hex()}")
    with pytest.raises(LinkBroken, match="FFN worker 4 is gone"):
        connect(store, 0, Seat(4), 0, WAIT)


def test_who_comes_is_waited_for_from_the_beginning(store):
    """The address that is there is of one that has gone; the next comes a moment later."""
    store.set(Seat(0).key, f"127.0.0.1 1 {bytes(16).hex()}")
    coming: list[Listener] = []
    late = Timer(0.2, lambda: coming.append(Listener(store, Seat(0))))
    late.start()
    attention = connect(store, 0, Seat(0), 0, WAIT, patience=20)
    late.join()
    coming[0].accept()
    attention.close()


def come_when_another_is_silent(store: dist.Store, asked: memoryview) -> None:
    """An FFN worker that hears one question and says ok."""
    while silent_address(store, Seat(0)) is None:
        sleep(0.01)
    later, _ = Listener(store, Seat(0)).accept()
    later.receive(asked)
    later.send([b"ok"])


def test_a_silent_worker_is_told_of_until_another_has_come(store):
    """It takes connections, as a stopped process does; the one that comes later is asked what it was asked."""
    silent = Listener(store, Seat(0))
    assert silent_address(store, Seat(0)) is None
    attention = connect(store, 3, Seat(0), 1, timedelta(seconds=0.05), patience=20)
    attention.send([b"question"])
    said, asked = memoryview(bytearray(2)), memoryview(bytearray(8))
    with pytest.raises(TimeoutError) as caught:
        attention.receive(said)
    thread = Thread(target=come_when_another_is_silent, args=(store, asked), daemon=True)
    thread.start()
    attention.renew(caught.value)
    with suppress(TimeoutError):
        attention.receive(said)
    thread.join(20)
    assert bytes(asked) == b"question" and not thread.is_alive()
    assert silent_address(store, Seat(0)) is None and silent


def test_one_that_is_stopped_takes_no_large_question(store):
    """More than the system holds for it: sending is what times out, and `receive` says so."""
    listener, large = Listener(store, Seat(0)), bytes(64 << 20)
    attention = connect(store, 3, Seat(0), 1, timedelta(seconds=0.2), patience=20)
    attention.send([large])
    with pytest.raises(TimeoutError) as caught:
        attention.receive(memoryview(bytearray(2)))
    said, asked = memoryview(bytearray(2)), memoryview(bytearray(len(large)))
    thread = Thread(target=come_when_another_is_silent, args=(store, asked), daemon=True)
    thread.start()
    attention.renew(caught.value)
    attention.receive(said)
    assert bytes(said) == b"ok" and listener


def test_silence_goes_on(store):
    listener = Listener(store, Seat(0))
    attention = connect(store, 3, Seat(0), 1, timedelta(seconds=0.05), patience=0.2)
    with pytest.raises(LinkBroken, match="FFN worker 4 did not answer in time"), naming(4):
        attention.renew(TimeoutError())
    assert silent_address(store, Seat(0)) is not None and listener
