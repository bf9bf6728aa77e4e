"""The event loop with short turns, and the limit of headers."""

import contextlib
import socket
import time

import pytest

from edgeke.serving.front import Loop


@pytest.fixture
def loop():
    made = Loop()
    yield made
    made.close()


@pytest.fixture
def pairs():
    with contextlib.ExitStack() as stack:
        made = [socket.socketpair() for _ in range(50)]
        for pair in made:
            for each in pair:
                stack.enter_context(each)
        yield made


def test_a_turn_reads_few_sockets_and_all_get_theirs(loop, pairs):
    turns, reads = [0], []

    def turn():
        turns[0] += 1
        if len(reads) < 200:
            loop.call_soon(turn)
        else:
            loop.stop()

    def read(number, one):
        one.recv(1)
        reads.append((turns[0], number))
        pairs[number][1].send(b"x")  # it is ready again at once

    for number, (one, other) in enumerate(pairs):
        other.send(b"x")
        loop.add_reader(one, read, number, one)
    loop.call_soon(turn)
    loop.run_forever()
    assert max(sum(at == t for at, _ in reads) for t in range(turns[0] + 1)) <= 8
    assert sorted(number for _, number in reads[:50]) == [*range(50)], "nobody is read twice first"


def test_what_waited_while_the_loop_was_busy_has_come_before(loop, pairs):
    (one, other), since = pairs[0], []

    def busy():
        other.send(b"x")
        time.sleep(0.05)

    def read():
        one.recv(1)
        since.append(time.perf_counter() - loop.since)
        loop.stop()

    loop.add_reader(one, read)
    loop.call_soon(busy)
    loop.run_forever()
    loop.call_later(0.05, other.send, b"x")  # the loop is idle meanwhile
    loop.run_forever()
    assert since[0] >= 0.05
    assert since[1] < 0.04


def test_a_socket_that_is_gone_is_not_read(loop, pairs):
    """All are ready in one look; the first one that is read closes the others."""
    reads = []

    def read(number, one):
        one.recv(1)
        reads.append(number)
        for other, _ in pairs:
            if other is not one and other.fileno() >= 0:
                loop.remove_reader(other)
                other.close()
        loop.call_later(0.02, loop.stop)

    for number, (one, other) in enumerate(pairs):
        other.send(b"x")
        loop.add_reader(one, read, number, one)
    loop.run_forever()
    assert len(reads) == 1


@pytest.mark.parametrize(
    "head",
    [
        b"GET /v2 HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 70_000,
        b"GET /v2 HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 20_000,
        b"GET /" + b"v" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"POST /classify HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1;"
        + b"x" * 90_000,
    ],
)
def test_a_head_that_is_too_large_or_never_ends_is_refused(server, head):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        answer = b""
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(head), 10_000):
                client.sendall(head[start : start + 10_000])
                time.sleep(0.01)
            while part := client.recv(65536):
                answer += part
    assert answer.startswith(b"HTTP/1.1 4") or not answer
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(
            b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 30_000 + b"\r\n\r\n"
        )
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
