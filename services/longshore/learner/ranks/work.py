"""One train step as the ranks share it out: packs in rounds, a round being a pass on every rank at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from longshore.learner.batch import MicroBatch, micro_batches
from longshore.learner.objectives.normalise import Totals, totals_of, trained_before
from longshore.learner.ranks.messages import Message
from longshore.learner.sequences import TrainSequence
from longshore.learner.streams import TokenStreams
from longshore.learner.token_tree import Node, TokenTree

STEP = "step"
# A pass without a pack: so that every rank takes part in each.
NOTHING = -1
# Budgets that are tried when packs do not come out even, in shares of what would be even.
_SHARES = (1.0, 1.1, 1.25)


@dataclass(frozen=True)
class Work:
    """What every rank is told of a train step."""

    number: int
    policy_version: int
    totals: Totals
    # [sequences] bool, whether a sequence's rollout was trained on before.
    again: torch.Tensor
    micros: tuple[MicroBatch, ...]
    # Rounds of one pack a rank, by its number in `micros`, or NOTHING.
    rounds: tuple[tuple[int, ...], ...]

    def of(self, rank: int) -> list[int]:
        """A rank's packs, one a round."""
        return [turn[rank] for turn in self.rounds]


def share_out(
    number: int, sequences: Sequence[TrainSequence], policy_version: int, max_tokens: int, ranks: int
) -> Work:
    """Lays a batch out for a number of ranks, none of which is given a pack above `max_tokens` places.

    With several ranks, a round takes as long as its largest pack: packs of like size are computed together, and where
    the last round would leave ranks idle, packs are made smaller, if that is done sooner for all it computes twice.
    """
    micros = list(micro_batches(sequences, max_tokens))
    rounds = _rounds(micros, ranks)
    if ranks > 1 and micros and len(micros) % ranks:
        even = sum(micro.tree.size for micro in micros) / (ranks * len(rounds))
        for share in _SHARES:
            smaller = list(micro_batches(sequences, min(max_tokens, int(share * even) + 1)))
            others = _rounds(smaller, ranks)
            if _time(smaller, others) < _time(micros, rounds):
                micros, rounds = smaller, others
    return Work(number, policy_version, totals_of(sequences), trained_before(sequences), tuple(micros), rounds)


def _rounds(micros: Sequence[MicroBatch], ranks: int) -> tuple[tuple[int, ...], ...]:
    if ranks == 1:
        return tuple((number,) for number in range(len(micros)))
    largest_first = sorted(range(len(micros)), key=lambda number: -micros[number].tree.size)
    rounds: list[tuple[int, ...]] = []
    for start in range(0, len(micros), ranks):
        turn = largest_first[start : start + ranks]
        turn += [NOTHING] * (ranks - len(turn))
        # To and fro, so that the same rank does not get the largest of each.
        rounds.append(tuple(turn if len(rounds) % 2 == 0 else reversed(turn)))
    return tuple(rounds)


def _time(micros: Sequence[MicroBatch], rounds: Sequence[Sequence[int]]) -> int:
    """Places that the busiest rank of each round computes, over all rounds."""
    return sum(max(micros[number].tree.size for number in turn if number != NOTHING) for turn in rounds)


def to_message(work: Work) -> Message:
    """For another rank."""
    tensors = {"by_rollout": work.totals.by_rollout, "again": work.again}
    for number, micro in enumerate(work.micros):
        tree = micro.tree
        tensors[f"{number}|token_ids"] = torch.from_numpy(tree.token_ids)
        tensors[f"{number}|positions"] = torch.from_numpy(tree.positions)
        nodes = [(node.start, node.length, node.end) for node in tree.nodes]
        tensors[f"{number}|nodes"] = torch.tensor(nodes, dtype=torch.int64)
        tensors[f"{number}|places"], tensors[f"{number}|targets"] = micro.places, micro.targets
        for name, stream in vars(micro.streams).items():
            tensors[f"{number}|streams.{name}"] = stream
    told = {
        "number": work.number,
        "policy_version": work.policy_version,
        "tokens": work.totals.tokens,
        "micros": len(work.micros),
        "rounds": work.rounds,
    }
    return Message(STEP, told, tensors)


def from_message(message: Message) -> Work:
    """As the leader has it, but for what only laying it out needed: the trees' members."""
    told, tensors = message.told, message.tensors
    micros = []
    for number in range(_number(told["micros"])):
        own = {name.partition("|")[2]: value for name, value in tensors.items() if name.startswith(f"{number}|")}
        nodes = tuple(Node(*map(int, row)) for row in own["nodes"].tolist())
        tree = TokenTree(own["token_ids"].numpy(), own["positions"].numpy(), nodes, (), ())
        streams = TokenStreams(**{item.name: own[f"streams.{item.name}"] for item in fields(TokenStreams)})
        micros.append(MicroBatch(tree, own["places"], own["targets"], streams))
    totals = Totals(_number(told["tokens"]), tensors["by_rollout"])
    assert isinstance(told["rounds"], list)
    rounds = tuple(tuple(turn) for turn in told["rounds"])
    return Work(
        _number(told["number"]), _number(told["policy_version"]), totals, tensors["again"], tuple(micros), rounds
    )


def nothing() -> MicroBatch:
    """A pack of one token, whose loss counts for nothing."""
    zero, one = torch.zeros(1, dtype=torch.int64), torch.ones(1)
    tree = TokenTree(zero.numpy(), zero.numpy(), (Node(0, 1, 1),), (), ())
    streams = TokenStreams(
        behaviour=one,
        temperature=one,
        versions=zero,
        advantages=one,
        weights=one,
        rewards=one,
        sequences=zero,
        groups=zero,
        rollouts=zero,
        turns=zero,
        carried=zero.bool(),
    )
    return MicroBatch(tree, zero, zero, streams)


def _number(value: object) -> int:
    assert isinstance(value, int)
    return value
