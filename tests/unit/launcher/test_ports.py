from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from longshore.errors import ConfigError
from longshore.launcher.ports import PortReservations, check_free
from longshore.rpc.sockets import bind_shared


@pytest.fixture
def ports() -> Iterator[PortReservations]:
    with contextlib.closing(PortReservations()) as ports:
        yield ports


def listen(port: int) -> socket.socket:
    listener = bind_shared("127.0.0.1", port)
    listener.listen(200)
    return listener


def test_one_name_is_one_port(ports: PortReservations) -> None:
    text = ports.fill("127.0.0.1:${PORT:a.grpc} ${PORT:b} ${PORT:a.grpc} ${OTHER} $PORT")
    a, b = ports.port("a.grpc"), ports.port("b")
    assert a != b
    assert text == f"127.0.0.1:{a} {b} {a} ${{OTHER}} $PORT"


def test_connections_reach_the_listener_and_never_the_holder(ports: PortReservations) -> None:
    port = ports.port("a")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    for _ in range(2):
        with listen(port) as listener:
            listener.settimeout(5)
            for _ in range(100):
                with socket.create_connection(("127.0.0.1", port), timeout=5):
                    listener.accept()[0].close()


def test_a_held_port_is_given_to_nobody_else(ports: PortReservations) -> None:
    port = ports.port("a")
    with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
        stranger.bind(("127.0.0.1", port))
    with contextlib.ExitStack() as held:
        others = {held.enter_context(bind_shared("127.0.0.1", 0)).getsockname()[1] for _ in range(300)}
    assert len(others) == 300
    assert port not in others


def test_closing_gives_the_ports_back() -> None:
    ports = PortReservations()
    port = ports.port("a")
    ports.close()
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", port))


def test_a_port_that_something_listens_on_is_not_free() -> None:
    with listen(0) as listener, pytest.raises(ConfigError, match=r"port \d+ cannot be had.*--port"):
        check_free(listener.getsockname()[1])
