"""Hand-made sequences and the loss of a batch of them, for the learner's tests."""

from __future__ import annotations

import torch

from longshore.learner.batch_loss import BatchLoss, Others, Scores
from longshore.learner.objectives.normalise import totals_of, trained_before
from longshore.learner.objectives.registry import build_objective
from longshore.learner.sequences import TrainSequence
from longshore.learner.streams import streams_of

LIMIT = 10


def sequence(rollout, advantage, behaviour, version=0, group=0, weight=1.0, carried=False, use=1):
    """A prompt of one token and a reply of as many as have log-probs."""
    count = len(behaviour)
    return TrainSequence(
        rollout=rollout,
        group=group,
        token_ids=[5] + [6] * count,
        sampled=[False] + [True] * count,
        behaviour=[0.0, *behaviour],
        temperature=[1.0] * (count + 1),
        versions=[-1] + [version] * count,
        turns=[-1] + [0] * count,
        advantages=[0.0] + [advantage] * count,
        weights=[0.0] + [weight] * count,
        rewards=[0.0] * (count + 1),
        carried=[carried] * (count + 1),
        use=use,
    )


def loss_of(spec, sequences, logps, parts, others=None):
    """Loss, gradient and metrics of a batch whose log-probs are `logps` (a list a sequence), computed in `parts` (each
    a list of sequence numbers)."""
    parameters = [torch.tensor(values, dtype=torch.float32, requires_grad=True) for values in logps]
    loss = BatchLoss(spec, build_objective(spec.objective), totals_of(sequences), trained_before(sequences), 7, LIMIT)
    passes = []
    for part in parts:
        logp = torch.cat([parameters[number] for number in part])
        scores = Scores(logp, torch.zeros_like(logp), (2 * logp).exp().detach() + 0.01)
        passes.append((streams_of([(number, sequences[number]) for number in part]), scores))
    if loss.wants_preview:
        loss.preview(passes)
    total = 0.0
    for number, (streams, scores) in enumerate(passes):
        extra = Others() if others is None else others(parts[number])
        share = loss.add(number, streams, scores, extra)
        share.backward()
        total += float(share.detach())
    return total, [parameter.grad.tolist() for parameter in parameters], loss
