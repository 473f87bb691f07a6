"""From rewards to advantages, and from rollouts to the tensors of a forward pass."""

import dataclasses

import pytest
import torch
from builders import rollout

from longshore.learner.advantage import group_advantages, has_signal
from longshore.learner.batch import micro_batches, sequences_of
from longshore.types import GivenSpan, SampledSpan, Segment


def test_group_mean_by_hand():
    assert group_advantages([1.0, 0.0, 0.5, 0.5], "group-mean") == [0.5, -0.5, 0.0, 0.0]


def test_group_mean_std_by_hand():
    # mean 0.5, population deviation 0.5
    assert group_advantages([1.0, 0.0], "group-mean-std") == pytest.approx([1.0, -1.0], abs=1e-5)


def test_signal():
    assert has_signal([0.0, 1.0])
    assert not has_signal([0.5, 0.5, 0.5])
    assert not has_signal([1.0])


def test_sequence_streams_line_up_with_tokens():
    (sequence,) = sequences_of(rollout(0, 0), advantage=0.5)
    assert sequence.token_ids == [5, 6, 7, 1]
    assert sequence.sampled == [False, False, True, True]
    assert sequence.behaviour == [0.0, 0.0, -0.5, -0.25]
    assert sequence.versions == [-1, -1, 0, 0]


def test_a_segment_that_extends_another_carries_the_prefix_without_loss():
    base = rollout(0, 0)
    child = Segment("1", (9, 8), (GivenSpan(1), SampledSpan(3, (-1.0,))), parent_segment_id="0", prefix_len=3)
    first, second = sequences_of(dataclasses.replace(base, segments=(*base.segments, child)), 1.0)
    assert first.token_ids == [5, 6, 7, 1]
    assert second.token_ids == [5, 6, 7, 9, 8]
    assert second.sampled == [False, False, False, False, True]
    assert second.behaviour[-1] == -1.0


def test_micro_batch_points_at_the_position_before_each_sampled_token():
    (micro,) = micro_batches(sequences_of(rollout(0, 0), 0.5), max_tokens=100)
    assert micro.input_ids.tolist() == [[5, 6, 7, 1]]
    assert micro.rows.tolist() == [0, 0]
    assert micro.columns.tolist() == [1, 2]
    assert micro.targets.tolist() == [7, 1]
    assert micro.behaviour.tolist() == [-0.5, -0.25]
    assert micro.advantages.tolist() == [0.5, 0.5]


def test_micro_batches_hold_every_token_once_within_the_budget():
    sequences = [
        sequence
        for length in (2, 9, 4, 7, 30, 3)
        for sequence in sequences_of(
            rollout(0, 0, reply=tuple(range(length)), logprobs=(-0.1,) * length), advantage=float(length)
        )
    ]
    batches = list(micro_batches(sequences, max_tokens=24))
    assert sum(batch.targets.numel() for batch in batches) == sum(sum(item.sampled) for item in sequences)
    for batch in batches:
        assert batch.input_ids.numel() <= 24 or batch.input_ids.shape[0] == 1
    assert sorted(torch.cat([batch.advantages for batch in batches]).unique().tolist()) == [2, 3, 4, 7, 9, 30]
