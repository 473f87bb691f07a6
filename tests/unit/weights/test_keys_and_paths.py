"""Whose signature a reader believes, and which paths it takes."""

from __future__ import annotations

import pytest
from weight_parcels import JOB, KEY, delta_parcel, full_parcel, history

from longshore.errors import IntegrityError, Rejected
from longshore.proto.v1 import weights_pb2
from longshore.signing import SigningKey
from longshore.types import JobRef
from longshore.weight_store.decoding import max_encoding_bytes
from longshore.weight_store.keychain import sign_rotation
from longshore.weight_store.paths import MAX_PATH_TIMES, base_of, checked_path
from longshore.weight_store.payload import tensor_info
from longshore.weights.keys import KeyRing

SECOND, THIRD, STRANGER = SigningKey.generate(), SigningKey.generate(), SigningKey.generate()
OTHERS_TURN = sign_rotation(KEY, JobRef("p", "x"), SECOND.public_key, 1, 1.0)
FIRST_TURN = sign_rotation(KEY, JOB, SECOND.public_key, 1, 1.0)
SECOND_TURN = sign_rotation(SECOND, JOB, THIRD.public_key, 2, 2.0)
TENSORS = history(5, size=400)
INFOS = [tensor_info(tensor) for tensor in TENSORS[0]]
FULL = [full_parcel(version, tensors).header.encoding for version, tensors in enumerate(TENSORS)]
DELTA = {
    (base, version): delta_parcel(version, TENSORS[version], base, TENSORS[base]).header.encoding
    for base, version in ((0, 1), (1, 2), (2, 3), (0, 3))
}


def test_the_trusted_key_is_known_and_no_other() -> None:
    ring = KeyRing(JOB, KEY.public_key)
    assert KEY.key_id in ring
    assert ring.key(KEY.key_id) == KEY.public_key
    assert SECOND.key_id not in ring
    with pytest.raises(IntegrityError, match="not known to be one of p/j's"):
        ring.key(SECOND.key_id)


def test_keys_after_the_trusted_one_are_believed_and_none_before() -> None:
    ring = KeyRing(JOB, SECOND.public_key)
    ring.extend(KEY.public_key, [FIRST_TURN, SECOND_TURN])
    assert THIRD.key_id in ring
    # Anybody could make a key that hands over to the trusted one.
    assert KEY.key_id not in ring
    forged = sign_rotation(STRANGER, JOB, SECOND.public_key, 1, 1.0)
    ring.extend(STRANGER.public_key, [forged])
    with pytest.raises(IntegrityError):
        ring.key(STRANGER.key_id)


@pytest.mark.parametrize(
    ("first", "rotations"),
    [
        pytest.param(STRANGER, [], id="another job's key"),
        pytest.param(STRANGER, [sign_rotation(STRANGER, JOB, THIRD.public_key, 1, 1.0)], id="another chain"),
        pytest.param(KEY, [sign_rotation(STRANGER, JOB, SECOND.public_key, 1, 1.0)], id="signed by a stranger"),
        pytest.param(KEY, [SECOND_TURN], id="a link is missing"),
        pytest.param(KEY, [OTHERS_TURN], id="another job's rotation"),
    ],
)
def test_a_chain_that_does_not_hold_adds_nothing(first: SigningKey, rotations) -> None:
    ring = KeyRing(JOB, KEY.public_key)
    with pytest.raises(IntegrityError):
        ring.extend(first.public_key, rotations)
    assert [key.key_id in ring for key in (KEY, SECOND, THIRD, STRANGER)] == [True, False, False, False]


def test_what_was_believed_stays_believed() -> None:
    ring = KeyRing(JOB, KEY.public_key)
    ring.extend(KEY.public_key, [FIRST_TURN, SECOND_TURN])
    ring.extend(KEY.public_key, [FIRST_TURN])
    assert THIRD.key_id in ring


def steps(*found: tuple[int, weights_pb2.Encoding]) -> list[weights_pb2.PathStep]:
    return [weights_pb2.PathStep(version=version, encoding=encoding) for version, encoding in found]


def test_paths_that_lead_there() -> None:
    for path, base in (
        (steps((3, FULL[3])), None),
        (steps((3, DELTA[2, 3])), 2),
        (steps((1, DELTA[0, 1]), (2, DELTA[1, 2]), (3, DELTA[2, 3])), 0),
        (steps((2, FULL[2]), (3, DELTA[2, 3])), None),
    ):
        found = checked_path(path, 3, INFOS)
        assert [step.version for step in found] == [step.version for step in path]
        assert base_of(found) == base


def changed(encoding: weights_pb2.Encoding, **values: object) -> weights_pb2.Encoding:
    other = weights_pb2.Encoding()
    other.CopyFrom(encoding)
    for name, value in values.items():
        setattr(other, name, value)
    return other


@pytest.mark.parametrize(
    "path",
    [
        pytest.param([], id="no path"),
        pytest.param(steps((2, DELTA[1, 2])), id="ends elsewhere"),
        pytest.param(steps((1, DELTA[0, 1]), (3, DELTA[2, 3])), id="a step is missing"),
        pytest.param(steps((2, FULL[2]), (3, FULL[3])), id="a full one in the middle"),
        pytest.param(steps((3, changed(FULL[3], kind=0))), id="of no kind"),
        pytest.param(steps((3, changed(FULL[3], codec="zip"))), id="an unknown codec"),
        pytest.param(steps((3, changed(FULL[3], base_version=2))), id="a full one with a base"),
        pytest.param(steps((3, changed(DELTA[2, 3], base_version=3))), id="a delta from itself"),
        pytest.param(steps((3, changed(FULL[3], size=2**40))), id="too large"),
        pytest.param(steps((3, changed(FULL[3], sha256=b"x"))), id="a short address"),
    ],
)
def test_paths_that_cannot_be_taken(path: list[weights_pb2.PathStep]) -> None:
    with pytest.raises(Rejected):
        checked_path(path, 3, INFOS)


def test_a_path_may_not_fill_the_memory() -> None:
    count = 2 * MAX_PATH_TIMES
    found = [(1, changed(DELTA[0, 1], size=max_encoding_bytes(INFOS)))]
    found += [(version, changed(found[0][1], base_version=version - 1)) for version in range(2, count)]
    with pytest.raises(Rejected, match="no way to version"):
        checked_path(steps(*found), count - 1, INFOS)
    short = found[: MAX_PATH_TIMES // 2]
    assert len(checked_path(steps(*short), len(short), INFOS)) == len(short)
