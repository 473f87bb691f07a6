"""The pure parts of benchmarks/weight_sync_codec.py and of its versions."""

import numpy as np
import pytest

from benchmarks.weight_sync_codec import Peer, entropy
from benchmarks.weight_sync_steps import Chain
from longshore.weight_store.payload import Tensor, tensor_info


def test_entropy_of_a_half_that_goes_up_or_down():
    """Of 64 elements of one exponent half change, evenly up and down: a bit an element, and a bit a change."""
    before = np.full(64, 0x3F88, np.uint16)
    after = before.copy()
    after[:16] += 1
    after[16:32] -= 1
    assert entropy(before, after) == pytest.approx(64 + 32)


def test_entropy_is_given_the_exponent():
    """What follows from the exponent costs nothing."""
    before = np.repeat(np.array([0x3F88, 0x3D08], np.uint16), 50)
    assert entropy(before, np.where(before == 0x3D08, before + 1, before)) == 0
    assert entropy(before, before) == 0


def test_entropy_counts_a_change_of_sign_as_a_step_on_the_line():
    before = np.array([1, 1, 0x8001, 0x8001], np.uint16)
    # From the smallest number over both zeros to the smallest below them, and back.
    assert entropy(before, np.array([0x8001, 0x8001, 1, 1], np.uint16)) == 4


def test_the_peer_gives_back_what_it_was_given():
    rng = np.random.default_rng(0)
    old, new = (Tensor("w", "bfloat16", (100,), rng.bytes(200)) for _ in range(2))
    peer = Peer([new])
    (made,) = peer.decode(peer.encode([old], [new]), [old], [tensor_info(new)])
    assert made.tobytes() == new.data


def test_a_chain_applies_its_steps_one_after_another(tmp_path):
    np.save(tmp_path / "version0.npy", np.arange(6, dtype=np.uint16))
    np.savez(tmp_path / "step001.npz", positions=np.array([1], np.uint32), bits=np.array([9], np.uint16))
    np.savez(tmp_path / "step002.npz", positions=np.array([1, 5], np.uint32), bits=np.array([8, 7], np.uint16))
    versions = list(Chain("x", tmp_path, [("a", (2, 2)), ("b", (2,))]).versions())
    rows = [np.concatenate([np.frombuffer(tensor.data, np.uint16) for tensor in one]).tolist() for one in versions]
    assert rows == [[0, 1, 2, 3, 4, 5], [0, 9, 2, 3, 4, 5], [0, 8, 2, 3, 4, 7]]
