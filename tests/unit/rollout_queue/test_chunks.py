"""Calls to the broker are bounded in tickets and in bytes: each holds it while it runs."""

from longshore.rollout_queue import tickets


def chunks(sizes):
    encoded = ((str(number), bytes(size)) for number, size in enumerate(sizes))
    found = list(tickets._chunked(encoded))
    keys = [key for chunk in found for key in chunk[::2]]
    assert keys == [str(number) for number in range(len(sizes))]
    return [[len(payload) for payload in chunk[1::2]] for chunk in found]


def test_small_tickets_are_bounded_by_their_number():
    assert [len(chunk) for chunk in chunks([10] * 1001)] == [500, 500, 1]


def test_large_tickets_are_bounded_by_their_bytes(monkeypatch):
    monkeypatch.setattr(tickets, "_CALL_BYTES", 100)
    assert chunks([60, 40, 1, 200, 50, 50]) == [[60, 40], [1], [200], [50, 50]]


def test_nothing_makes_no_call():
    assert chunks([]) == []
