from __future__ import annotations

import pytest
from weight_parcels import JOB, KEY, Bench, full_parcel, history

from longshore.errors import Conflict, Fenced, IntegrityError, NotFound, Rejected
from longshore.signing import SigningKey, key_id
from longshore.types import JobRef
from longshore.weight_store.keychain import sign_rotation, verify_chain
from longshore.weight_store.version import sign_pointer

SECOND, THIRD = SigningKey.generate(), SigningKey.generate()


def rotation(key: SigningKey, to: SigningKey, serial: int, job: JobRef = JOB):
    return sign_rotation(key, job, to.public_key, serial, 1.0)


FIRST_TURN, SECOND_TURN = rotation(KEY, SECOND, 1), rotation(SECOND, THIRD, 2)


def test_a_chain_gives_its_keys_oldest_first() -> None:
    keys = verify_chain(JOB, KEY.public_key, [FIRST_TURN, SECOND_TURN])
    assert keys == [KEY.public_key, SECOND.public_key, THIRD.public_key]
    assert verify_chain(JOB, KEY.public_key, []) == [KEY.public_key]


@pytest.mark.parametrize(
    ("first", "rotations"),
    [
        pytest.param(SECOND, [FIRST_TURN], id="another first key"),
        pytest.param(KEY, [SECOND_TURN], id="a link is missing"),
        pytest.param(KEY, [FIRST_TURN, rotation(KEY, THIRD, 2)], id="signed by an older key"),
        pytest.param(KEY, [rotation(KEY, SECOND, 2)], id="out of turn"),
        pytest.param(KEY, [rotation(KEY, SECOND, 1, JobRef("p", "other"))], id="another job's"),
        pytest.param(KEY, [FIRST_TURN, rotation(SECOND, KEY, 2)], id="brings a key back"),
        pytest.param(KEY, [FIRST_TURN, FIRST_TURN], id="twice"),
    ],
)
def test_a_chain_that_does_not_hold_is_refused(first: SigningKey, rotations) -> None:
    with pytest.raises(IntegrityError):
        verify_chain(JOB, first.public_key, rotations)


def test_a_key_that_is_none_is_refused() -> None:
    with pytest.raises(Rejected):
        verify_chain(JOB, KEY.public_key, [sign_rotation(KEY, JOB, b"short", 1, 1.0)])


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    bench.publish(full_parcel(0, history(1)[0]))
    return bench


def test_after_a_rotation_only_the_newest_key_publishes_and_moves_pointers(bench: Bench) -> None:
    bench.store.rotate_key(FIRST_TURN)
    old = full_parcel(1, history(2)[1])
    with pytest.raises(Fenced, match=f"{KEY.key_id}.*superseded by key {SECOND.key_id}"):
        bench.publish(old)
    old.header.ClearField("head")
    with pytest.raises(Fenced, match="the manifest"):
        bench.publish(old)
    with pytest.raises(Fenced):
        bench.point("serving", 0)
    bench.publish(full_parcel(1, history(2)[1], key=SECOND))
    bench.point("serving", 0, key=SECOND)
    assert (bench.head(), bench.numbers()) == (1, [1, 0])


def test_what_older_keys_signed_stays_valid(bench: Bench) -> None:
    sent = full_parcel(1, history(2)[1])
    bench.publish(sent)
    bench.point("serving", 0)
    bench.store.rotate_key(FIRST_TURN)
    bench.restarted()
    # The very same manifest and pointers again.
    assert bench.publish(sent) is True
    bench.point("serving", 0)
    with pytest.raises(Fenced):
        bench.publish(full_parcel(1, history(2)[1], serial=99))


def test_rotations_are_idempotent_and_follow_each_other(bench: Bench) -> None:
    with pytest.raises(Conflict):
        bench.store.rotate_key(SECOND_TURN)
    for _ in range(2):
        bench.store.rotate_key(FIRST_TURN)
    with pytest.raises(Conflict):
        bench.store.rotate_key(rotation(KEY, THIRD, 1))
    with pytest.raises(IntegrityError):
        bench.store.rotate_key(rotation(KEY, THIRD, 2))
    bench.store.rotate_key(SECOND_TURN)
    bench.restarted()
    first, rotations = bench.store.keys(JOB)
    assert [key_id(key) for key in verify_chain(JOB, first, rotations)] == [
        KEY.key_id,
        SECOND.key_id,
        THIRD.key_id,
    ]


def test_any_key_of_the_chain_may_register_again_and_no_other(bench: Bench) -> None:
    bench.store.rotate_key(FIRST_TURN)
    for key in (KEY, SECOND):
        bench.store.register_key(JOB, key.public_key, keep=5)
    with pytest.raises(Conflict):
        bench.store.register_key(JOB, THIRD.public_key, keep=5)


def test_a_job_without_a_key_cannot_be_rotated() -> None:
    bench = Bench()
    other = JobRef("p", "other")
    with pytest.raises(NotFound):
        bench.store.rotate_key(rotation(KEY, SECOND, 1, other))
    with pytest.raises(NotFound):
        bench.store.keys(other)


def test_a_mirror_takes_older_keys_but_moves_no_name_back_to_one(bench: Bench) -> None:
    store = bench.restarted(mirror=True)
    store.rotate_key(FIRST_TURN)
    bench.publish(full_parcel(1, history(2)[1]))
    assert bench.head() == 1
    bench.publish(full_parcel(2, history(3)[2], key=SECOND))
    bench.publish(full_parcel(3, history(4)[3], serial=50))
    assert (bench.head(), bench.numbers()) == (2, [3, 2, 1, 0])
    with pytest.raises(Fenced):
        store.set_pointer(sign_pointer(KEY, JOB, "head", 3, 60, 2e9))
