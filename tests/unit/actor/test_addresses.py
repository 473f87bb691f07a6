"""What LONGSHORE_GENERATOR stands for, with made-up names."""

from __future__ import annotations

from pathlib import Path

import pytest

from longshore.actor import addresses
from longshore.actor.addresses import Address, AddressBook, parse_entries
from longshore.errors import ConfigError


class Names:
    """A name server of our own."""

    def __init__(self, **known: list[str]) -> None:
        self.known = known
        self.asked: list[str] = []

    async def __call__(self, host: str) -> list[str]:
        self.asked.append(host)
        if host not in self.known:
            raise OSError(f"{host} is not known")
        return self.known[host]


def test_a_list_of_every_kind() -> None:
    text = " 127.0.0.1:7000, gpu:7001,[::1]:7002 ,unix:/run/g.sock,file:/etc/generators, "
    assert parse_entries(text) == (
        "127.0.0.1:7000",
        "gpu:7001",
        "[::1]:7002",
        "unix:/run/g.sock",
        "file:/etc/generators",
    )


@pytest.mark.parametrize("text", ["", " , ", "host", "host:", ":80", "host:0", "host:65536", "::1:80", "unix:", "a:b"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="LONGSHORE_GENERATOR"):
        parse_entries(text)


async def test_a_name_stands_for_all_its_addresses_each_once() -> None:
    names = Names(pods=["10.0.0.2", "10.0.0.1", "fd00::1"], one=["10.0.0.1"])
    book = AddressBook(["pods:70", "one:70", "127.0.0.1:5", "localhost:6", "[::1]:7", "unix:/x"], names)
    assert await book.read() == [
        Address("10.0.0.1:70", "pods"),
        Address("10.0.0.2:70", "pods"),
        Address("127.0.0.1:5"),
        Address("[::1]:7"),
        Address("[fd00::1]:70", "pods"),
        Address("localhost:6"),
        Address("unix:/x"),
    ]
    assert names.asked == ["pods", "one"]
    names.known["pods"] = ["10.0.0.9"]
    assert [address.target for address in await book.read()][:2] == ["10.0.0.1:70", "10.0.0.9:70"]


async def test_a_name_server_that_is_away_takes_nothing_away() -> None:
    names = Names(pods=["10.0.0.1"])
    book = AddressBook(["pods:70"], names)
    before = await book.read()
    del names.known["pods"]
    assert await book.read() == before != []


async def test_a_file_is_read_anew_and_bad_lines_hurt_nobody(tmp_path: Path) -> None:
    path = tmp_path / "generators, mine"
    book = AddressBook(parse_entries(f"{path.as_uri()},127.0.0.1:1"), Names())
    assert await book.read() == [Address("127.0.0.1:1")]
    path.write_text("# mine\n127.0.0.1:2  # the second\n\nnonsense\nfile:/etc/passwd\n127.0.0.1:1\n")
    assert await book.read() == [Address("127.0.0.1:1"), Address("127.0.0.1:2")]
    path.write_bytes(b"\xff\xfe127.0.0.1:2\n")
    assert await book.read() == [Address("127.0.0.1:1")]
    path.unlink()
    assert await book.read() == [Address("127.0.0.1:1")]


async def test_there_is_an_end_to_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "MAX_GENERATORS", 2)
    book = AddressBook([f"127.0.0.1:{port}" for port in range(1, 9)], Names())
    assert len(await book.read()) == 2
