"""Reading an append-only file that grows, is torn, is rewritten, and loses its end."""

import pytest

from chaos.aof import AofFile, parse, transactions


def resp(*parts: bytes) -> bytes:
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)


SET, BINARY = resp(b"SET", b"k", b"v"), resp(b"SET", b"k", b"\r\n*1\r\n$0\r\n\x00\xff")


def test_commands_come_whole_and_a_torn_last_one_not_at_all():
    data = SET + BINARY
    for size in range(len(SET), len(data)):
        assert [command for command, _ in parse(data[:size])] == [(b"SET", b"k", b"v")]
    assert [end for _, end in parse(data)] == [len(SET), len(data)]


def test_annotations_are_passed_over_and_strangers_refused():
    assert len(list(parse(b"#TS:1700000000\r\n" + SET))) == 1
    with pytest.raises(ValueError, match="expected a command"):
        list(parse(b"REDIS0011\r\n"))


def test_a_transaction_is_one_act_and_counts_only_when_it_is_whole():
    data = resp(b"MULTI") + SET + BINARY + resp(b"EXEC") + SET
    found = list(transactions(data))
    assert [len(item.commands) for item in found] == [2, 1]
    assert list(transactions(data[: -len(SET) - 1])) == []


def test_a_growing_file_is_followed_through_torn_writes_and_a_rewrite(tmp_path):
    first = tmp_path / "appendonly.aof.1.incr.aof"
    file = AofFile(tmp_path)
    assert file.read() == []
    first.write_bytes(SET + BINARY[:7])
    assert len(file.read()) == 1
    assert file.position == len(SET)
    with first.open("ab") as more:
        more.write(BINARY[7:] + SET)
    assert len(file.read()) == 2
    (tmp_path / "appendonly.aof.2.incr.aof").write_bytes(BINARY)
    assert len(file.read()) == 1
    assert file.path is not None
    assert file.path.name == "appendonly.aof.2.incr.aof"
    assert file.position == len(BINARY)


def test_after_going_back_it_reads_what_is_written_there(tmp_path):
    path = tmp_path / "appendonly.aof.1.incr.aof"
    path.write_bytes(SET + SET + SET[:4])
    file = AofFile(tmp_path)
    assert len(file.read()) == 2
    path.write_bytes(SET + BINARY)
    file.rewind(len(SET))
    assert [item.commands[0] for item in file.read()] == [(b"SET", b"k", b"\r\n*1\r\n$0\r\n\x00\xff")]
