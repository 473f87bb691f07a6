"""What must hold when a job has ended, checked from the independent log against what Longshore says of itself.

Pure. Each check returns the breaches that it found, as sentences with numbers and examples; none means proven.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from chaos.learner_tap import LearnerFacts, Record
from chaos.shadow import LIVE, QueueShadow

# Outcomes of rollouts that were part of a batch.
CONSUMED = frozenset({"trained", "zero_variance"})
# Outcomes that say that nothing went wrong. Tickets that are still out when the last step is done ("job_finished") are
# as lost as any other, for admission issues no more than the steps need; and nothing in this test deserves rejection.
GOOD = CONSUMED | {"evaluation"}
EXHAUSTED = "attempts_exhausted"
# Least rise of the mean reward, from the first 5 train steps to the last tenth and on held-out tasks.
REWARD_RISE = 0.2
# Largest share of the tickets that may have run out of attempts, so many actors die.
MAX_EXHAUSTED = 0.02


@dataclass(frozen=True)
class Expected:
    """What the job's file asks for."""

    steps: int
    groups_per_step: int
    group_size: int


@dataclass
class Evidence:
    """One job: the independent log (`home`, `sites`, `learner`) and what Longshore says (`state`, `summary`)."""

    expected: Expected
    state: str
    summary: Mapping[str, object]
    home: QueueShadow
    learner: LearnerFacts
    # Steps and mean rewards, from metrics.jsonl.
    rewards: Sequence[tuple[int, float]]
    sites: Mapping[str, QueueShadow] = field(default_factory=dict)
    # Readings of the product's own ledger during the run: how many, and those that did not balance.
    readings: int = 0
    unbalanced: Sequence[str] = ()


def prove(evidence: Evidence) -> list[str]:
    """Every breach; empty when nothing was lost, nothing was trained on twice, and the job did its work."""
    checks = (finished, none_lost, counts_agree, none_twice, lineage, checkpoints, equation, sites, reward)
    return [breach for check in checks for breach in check(evidence)]


def surviving(records: Sequence[Record]) -> dict[int, Record]:
    """The records that the surviving history consists of: the last one of each step, of its newest epoch."""
    return {record.step: record for record in sorted(records, key=lambda record: record.epoch)}


def finished(evidence: Evidence) -> list[str]:
    breaches = []
    if evidence.state != "succeeded":
        breaches.append(f"the job ended as {evidence.state}")
    steps = evidence.expected.steps
    recorded = surviving(evidence.learner.records)
    if sorted(recorded) != list(range(1, steps + 1)):
        breaches.append(f"batches were recorded for {len(recorded)} steps, not for the {steps} of the job")
    short = [step for step, record in recorded.items() if len(record.groups) != evidence.expected.groups_per_step]
    if short:
        breaches.append(f"{len(short)} batches have another number of groups, for example step {short[0]}")
    return breaches + evidence.learner.faults


def none_lost(evidence: Evidence) -> list[str]:
    """Every ticket that the home broker was seen to be given has ended, for a reason, in a durable checkpoint."""
    issued, ends = set(evidence.home.history.issued), evidence.learner.ends
    breaches = []
    if lost := issued - set(ends):
        breaches.append(f"LOST: {len(lost)} of {len(issued)} tickets have no end in any checkpoint: {_some(lost)}")
    if made_up := set(ends) - issued:
        breaches.append(f"{len(made_up)} tickets ended that the broker never saw: {_some(made_up)}")
    for outcome in sorted(set(ends.values()) - GOOD):
        keys = [key for key, end in ends.items() if end == outcome]
        if outcome != EXHAUSTED or len(keys) > MAX_EXHAUSTED * len(issued):
            breaches.append(f"LOST: {len(keys)} of {len(issued)} tickets ended as {outcome}: {_some(keys)}")
    if again := evidence.home.history.issued_after_end:
        breaches.append(f"LOST: {len(again)} tickets were attempted anew after they had ended: {_some(again)}")
    if evidence.home.now.tickets:
        breaches.append(f"the broker still holds {len(evidence.home.now.tickets)} tickets of an ended job")
    return breaches


def counts_agree(evidence: Evidence) -> list[str]:
    """The broker's counts, the last checkpoint, the summary and the log say the same of how tickets ended."""
    log = Counter(evidence.learner.ends.values())
    said: dict[str, tuple[int, Counter[str]]] = {
        "the log": (len(evidence.home.history.issued), log),
        "the broker": (evidence.home.now.counts.get("issued", 0), _finals(evidence.home.now.counts)),
    }
    if evidence.learner.checkpoints:
        newest = evidence.learner.checkpoints[max(evidence.learner.checkpoints)]
        said["the last checkpoint"] = (newest.issued, Counter(newest.outcomes))
    summary = evidence.summary
    accounted = summary.get("rollouts_accounted") or {}
    assert isinstance(accounted, dict)
    outcomes = Counter({"trained": _int(summary.get("rollouts_trained")), **accounted})
    said["the summary"] = (_int(summary.get("rollouts_issued")), outcomes)
    breaches = [
        f"{who}: {issued} issued is not {sum(ends.values())} ended, {dict(ends)}"
        for who, (issued, ends) in said.items()
        if issued != sum(ends.values())
    ]
    issued, ends = said["the log"]
    breaches += [
        f"{who} and the log differ: {other} issued, {dict(+counts)} against {issued}, {dict(+ends)}"
        for who, (other, counts) in said.items()
        if (other, +counts) != (issued, +ends)
    ]
    return breaches + _sites_agree(evidence)


def _sites_agree(evidence: Evidence) -> list[str]:
    """The broker and the last checkpoint say the same of what came from which site."""
    if not evidence.learner.checkpoints:
        return []
    newest = evidence.learner.checkpoints[max(evidence.learner.checkpoints)]
    counts = evidence.home.now.counts
    broker = {name.removeprefix("state:"): number for name, number in counts.items() if name.startswith("state:")}
    ended = {name: number for name, number in broker.items() if number and name.partition("@")[0] not in LIVE}
    learner = {name: number for name, number in newest.by_site.items() if number}
    return [] if ended == learner else [f"by site, the broker says {ended} and the last checkpoint {learner}"]


def none_twice(evidence: Evidence) -> list[str]:
    """Each (rollout, use) is in at most one surviving batch, was delivered before, and ended as consumed."""
    history = evidence.home.history
    records = surviving(evidence.learner.records)
    uses = Counter(key for record in records.values() for key in record.uses)
    breaches = []
    if twice := [key for key, times in uses.items() if times > 1]:
        breaches.append(f"TWICE: {len(twice)} rollouts are in more than one surviving batch: {_some(twice)}")
    breaches += _replayed_in_turn([records[step] for step in sorted(records)])
    if unseen := [key for key in uses if key not in history.deliveries]:
        breaches.append(f"{len(unseen)} rollouts were trained on that nobody delivered: {_some(unseen)}")
    consumed = {key for key, end in evidence.learner.ends.items() if end in CONSUMED}
    if unused := consumed - set(uses):
        breaches.append(f"LOST: {len(unused)} rollouts ended as consumed and are in no batch: {_some(unused)}")
    if unsettled := set(uses) - consumed:
        breaches.append(f"TWICE: {len(unsettled)} rollouts of a batch ended as something else: {_some(unsettled)}")
    return breaches


def _replayed_in_turn(records: Sequence[Record]) -> list[str]:
    """A rollout's uses are 1, 2, 3, ..., each in one batch, in the order of the steps."""
    seen: dict[str, int] = {}
    wrong = []
    for record in records:
        for key, use in record.again:
            if use != seen.get(key, 0) + 1 or use == 1:
                wrong.append(f"{key} (use {use})")
            seen[key] = use
        # A batch replays nothing of its own.
        seen |= dict.fromkeys(record.uses, 1)
    return [f"TWICE: {len(wrong)} uses are not the next ones of their rollouts: {_some(wrong)}"] if wrong else []


def lineage(evidence: Evidence) -> list[str]:
    """Versions that are in the final model's line were made of the very batches that the surviving history names."""
    facts, kept = evidence.learner, surviving(evidence.learner.records)
    by_place = {(record.step, record.epoch): record for record in facts.records}
    # A learner that starts from a checkpoint publishes it, where the one before did not come to: no batch is recorded.
    begun = {(found.step, found.epoch) for found in facts.checkpoints.values()}
    breaches = []
    for version in _line(facts):
        found = facts.versions[version]
        made_of = by_place.get((found.step, found.epoch))
        if made_of is None and any(step == found.step and epoch < found.epoch for step, epoch in begun):
            continue
        if found.step and made_of is None:
            breaches.append(f"version {version} is of step {found.step}, epoch {found.epoch}, which has no record")
        elif made_of is not None and _made_of(kept[found.step]) != _made_of(made_of):
            breaches.append(f"TWICE: version {version} was made of a batch that step {found.step} has disowned")
    steps = [facts.versions[version].step for version in _line(facts)]
    if any(later <= earlier for earlier, later in zip(steps[1:], steps, strict=False)):
        breaches.append("a version's parent is not of an earlier step")
    return breaches


def _made_of(record: Record) -> tuple[object, ...]:
    return record.uses, record.again


def _line(facts: LearnerFacts) -> list[int]:
    """The newest version and its ancestors, newest first, as far as they were seen."""
    line: list[int] = []
    version: int | None = max(facts.versions, default=None)
    while version is not None and version in facts.versions:
        line.append(version)
        version = facts.versions[version].parent
    return line


def checkpoints(evidence: Evidence) -> list[str]:
    """Every checkpoint that was ever on disk balances, and contains exactly the batches up to its step."""
    breaches = []
    records = surviving(evidence.learner.records)
    for number, found in sorted(evidence.learner.checkpoints.items()):
        if found.issued != sum(found.outcomes.values()) + found.open_tickets:
            breaches.append(f"checkpoint {number}: {found.issued} issued, {found.outcomes}, {found.open_tickets} open")
        consumed = sum(found.outcomes.get(outcome, 0) for outcome in CONSUMED)
        batched = sum(len(record.uses) for step, record in records.items() if step <= found.step)
        if consumed != batched:
            breaches.append(f"checkpoint {number} counts {consumed} consumed rollouts, its batches have {batched}")
    return breaches


def equation(evidence: Evidence) -> list[str]:
    """issued = sum of the states, after every act of every broker and at every reading of the product's ledger."""
    breaches = [f"the equation failed: {failure}" for failure in evidence.home.history.failures[:3]]
    for site, queue in evidence.sites.items():
        breaches += [f"the equation failed at {site}: {failure}" for failure in queue.history.failures[:3]]
    if evidence.home.history.checks == 0 or evidence.readings == 0:
        breaches.append("the equation was never checked")
    return breaches + [f"the ledger did not balance: {reading}" for reading in evidence.unbalanced[:3]]


def sites(evidence: Evidence) -> list[str]:
    """A rollout site attempts nothing but what home issued, and holds nothing of a job that has ended."""
    breaches = []
    home = set(evidence.home.history.issued)
    for site, queue in evidence.sites.items():
        if strange := set(queue.history.issued) - home:
            breaches.append(f"site {site} has {len(strange)} tickets that home never issued: {_some(strange)}")
        delivered = sum(found.site == site for many in evidence.home.history.deliveries.values() for found in many)
        if not delivered:
            breaches.append(f"site {site} delivered nothing home: it was not part of the test")
    return breaches


def reward(evidence: Evidence) -> list[str]:
    """The reward rose by REWARD_RISE while training, and on held-out tasks."""
    steps = [step for step, _ in evidence.rewards]
    if steps != list(range(1, evidence.expected.steps + 1)):
        return [f"metrics.jsonl has {len(steps)} lines; each of the {evidence.expected.steps} steps must have one"]
    values = [value for _, value in evidence.rewards]
    tail = values[-max(1, len(values) // 10) :]
    first, last = _mean(values[:5]), _mean(tail)
    before, after = (evidence.summary.get(name) for name in ("eval_before", "eval_after"))
    breaches = []
    if last < first + REWARD_RISE:
        breaches.append(f"the reward went from {first:.3f} to {last:.3f}, less than {REWARD_RISE} up")
    if not isinstance(before, float) or not isinstance(after, float) or after < before + REWARD_RISE:
        breaches.append(f"on held-out tasks the reward went from {before} to {after}, less than {REWARD_RISE} up")
    return breaches


def _finals(counts: Mapping[str, int]) -> Counter[str]:
    """Outcomes of all sites together."""
    found: Counter[str] = Counter()
    for name, number in counts.items():
        outcome = name.removeprefix("state:").partition("@")[0]
        if name.startswith("state:") and outcome not in LIVE:
            found[outcome] += number
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def _some(keys: Iterable[str]) -> str:
    ordered = sorted(keys)
    return ", ".join(ordered[:5]) + (", ..." if len(ordered) > 5 else "")


def _int(value: object) -> int:
    return value if isinstance(value, int) else -1
