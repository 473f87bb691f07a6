"""The proof goes red for each way in which a run can be wrong, one at a time."""

import copy
from collections import Counter

import pytest

from chaos.learner_tap import CheckpointFacts, LearnerFacts, Record, VersionFacts, checkpoint_of, record_of
from chaos.proof import Evidence, Expected, prove
from chaos.shadow import Delivery, QueueShadow
from longshore.learner.ledger import Ledger
from longshore.types import Purpose, Task

STEPS, GROUPS, SIZE = 10, 2, 2


def keys_of(step: int) -> tuple[str, ...]:
    return tuple(f"{2 * (step - 1) + group}.{index}" for group in range(GROUPS) for index in range(SIZE))


def good() -> Evidence:
    """A job of 10 steps with 4 rollouts each, in which all went well."""
    keys = [key for step in range(1, STEPS + 1) for key in keys_of(step)]
    home = QueueShadow()
    home.history.issued = Counter(keys)
    home.history.deliveries = {key: [Delivery(1, key, "west")] for key in keys}
    home.history.checks = 99
    home.now.counts = {"issued": len(keys), "bytes": 0, "state:queued@home": 0, "state:trained@west": len(keys)}
    records = [Record(step, 1, (2 * step - 2, 2 * step - 1), keys_of(step)) for step in range(1, STEPS + 1)]
    ends = dict.fromkeys(keys, "trained")
    learner = LearnerFacts(
        records=records,
        checkpoints={
            1: CheckpointFacts(1, 5, 1, 24, {"trained": 20}, 4, dict.fromkeys(keys[:20], "trained")),
            2: CheckpointFacts(2, STEPS, 1, len(keys), {"trained": len(keys)}, 0, ends, {"trained@west": len(keys)}),
        },
        versions={n: VersionFacts(n, n, 1, n - 1 if n else None) for n in range(STEPS + 1)},
        ends=ends,
    )
    summary = {
        "rollouts_issued": len(keys),
        "rollouts_trained": len(keys),
        "rollouts_accounted": {},
        "eval_before": 0.2,
        "eval_after": 0.8,
    }
    rewards = [(step, 0.1 * step) for step in range(1, STEPS + 1)]
    site = QueueShadow()
    site.history.issued = Counter(keys[:4])
    return Evidence(
        Expected(STEPS, GROUPS, SIZE), "succeeded", summary, home, learner, rewards, {"west": site}, readings=5
    )


def lost_ticket(evidence: Evidence) -> None:
    evidence.home.history.issued["99.0"] = 1


def left_over(evidence: Evidence) -> None:
    evidence.learner.ends["19.1"] = "job_finished"


def rejected(evidence: Evidence) -> None:
    evidence.learner.ends["19.1"] = "rejected"


def never_issued(evidence: Evidence) -> None:
    del evidence.home.history.issued["0.0"]


def attempted_anew(evidence: Evidence) -> None:
    evidence.home.history.issued_after_end.append("0.0")


def trained_twice(evidence: Evidence) -> None:
    evidence.learner.records[4] = Record(5, 1, (8, 0), (*keys_of(5)[:3], "0.0"))


def second_use(evidence: Evidence) -> None:
    """Step 6 trains on a rollout of step 5 once more, and step 8 does as if it had not."""
    evidence.learner.records[5] = Record(6, 1, (10, 11), keys_of(6), ((keys_of(5)[0], 2),))
    evidence.learner.records[7] = Record(8, 1, (14, 15), keys_of(8), ((keys_of(5)[0], 2),))


def replayed_before_its_time(evidence: Evidence) -> None:
    evidence.learner.records[4] = Record(5, 1, (8, 9), keys_of(5), ((keys_of(5)[0], 2),))


def use_left_out(evidence: Evidence) -> None:
    evidence.learner.records[5] = Record(6, 1, (10, 11), keys_of(6), ((keys_of(5)[0], 3),))


def version_of_other_replays(evidence: Evidence) -> None:
    evidence.learner.records.append(Record(5, 2, (8, 9), keys_of(5), ((keys_of(4)[0], 2),)))


def never_delivered(evidence: Evidence) -> None:
    del evidence.home.history.deliveries["3.1"]


def replayed_otherwise(evidence: Evidence) -> None:
    """Step 5 was taken and published, then taken again with other rollouts, and the first version is in the line."""
    evidence.learner.records.append(Record(5, 2, (8, 9), keys_of(5)[:3]))


def consumed_unseen(evidence: Evidence) -> None:
    evidence.learner.records[4] = Record(5, 1, (8, 9), keys_of(5)[:3])


def step_missing(evidence: Evidence) -> None:
    del evidence.learner.records[3]


def version_without_record(evidence: Evidence) -> None:
    evidence.learner.versions[7] = VersionFacts(7, 7, 3, 6)


def checkpoint_ahead(evidence: Evidence) -> None:
    evidence.learner.checkpoints[1] = CheckpointFacts(1, 5, 1, 28, {"trained": 24}, 4, {})


def checkpoint_unbalanced(evidence: Evidence) -> None:
    evidence.learner.checkpoints[1] = CheckpointFacts(1, 5, 1, 25, {"trained": 20}, 4, {})


def broker_counts_differ(evidence: Evidence) -> None:
    evidence.home.now.counts["state:trained@west"] -= 1
    evidence.home.now.counts["issued"] -= 1


def broker_counts_another_site(evidence: Evidence) -> None:
    evidence.home.now.counts["state:trained@home"] = evidence.home.now.counts.pop("state:trained@west")


def summary_differs(evidence: Evidence) -> None:
    evidence.summary = {**evidence.summary, "rollouts_issued": 41}


def equation_failed(evidence: Evidence) -> None:
    evidence.home.history.failures.append("at 77: issued 4 is not 3")


def equation_failed_at_the_site(evidence: Evidence) -> None:
    evidence.sites["west"].history.failures.append("at 77: issued 4 is not 3")


def equation_unchecked(evidence: Evidence) -> None:
    evidence.readings = 0


def site_idle(evidence: Evidence) -> None:
    for key, found in evidence.home.history.deliveries.items():
        evidence.home.history.deliveries[key] = [item._replace(site="home") for item in found]


def site_makes_up_tickets(evidence: Evidence) -> None:
    evidence.sites["west"].history.issued["50.0"] = 1


def reward_flat(evidence: Evidence) -> None:
    evidence.rewards = [(step, 0.3) for step, _ in evidence.rewards]


def heldout_flat(evidence: Evidence) -> None:
    evidence.summary = {**evidence.summary, "eval_after": 0.3}


def job_failed(evidence: Evidence) -> None:
    evidence.state = "failed"


def broker_holds_on(evidence: Evidence) -> None:
    evidence.home.now.tickets["0.0"] = None  # type: ignore[assignment]


RUINS = [
    lost_ticket,
    left_over,
    rejected,
    never_issued,
    attempted_anew,
    trained_twice,
    second_use,
    replayed_before_its_time,
    use_left_out,
    version_of_other_replays,
    never_delivered,
    replayed_otherwise,
    consumed_unseen,
    step_missing,
    version_without_record,
    checkpoint_ahead,
    checkpoint_unbalanced,
    broker_counts_differ,
    broker_counts_another_site,
    summary_differs,
    equation_failed,
    equation_failed_at_the_site,
    equation_unchecked,
    site_idle,
    site_makes_up_tickets,
    reward_flat,
    heldout_flat,
    job_failed,
    broker_holds_on,
]


def test_a_good_run_is_proven():
    assert prove(good()) == []


@pytest.mark.parametrize("ruin", RUINS, ids=lambda ruin: ruin.__name__)
def test_every_wrong_is_a_breach(ruin):
    evidence = copy.deepcopy(good())
    ruin(evidence)
    assert prove(evidence) != []


def test_uses_that_follow_each_other_are_no_breach():
    evidence = good()
    again = keys_of(1)[:2]
    for step, use in ((2, 2), (5, 3), (9, 4)):
        record = evidence.learner.records[step - 1]
        evidence.learner.records[step - 1] = Record(
            step, 1, record.groups, record.uses, tuple((key, use) for key in again)
        )
    assert prove(evidence) == []


def test_a_record_is_read_as_the_learner_writes_it():
    found = record_of(b'{"step":7,"epoch":2,"groups":[12,9],"uses":[["12.0",1],["9.0",1]],"late":[]}\n')
    assert found == Record(7, 2, (12, 9), ("12.0", "9.0"))
    found = record_of(b'{"step":7,"epoch":2,"groups":[12],"uses":[["12.0",1],["9.0",2]],"late":[]}\n')
    assert found == Record(7, 2, (12,), ("12.0",), (("9.0", 2),))


def test_a_checkpoint_is_read_as_the_ledger_writes_it():
    ledger = Ledger()
    task = Task("t", (), answer="x")
    ledger.issue(task, Purpose.TRAIN, 2)
    ledger.settle_all("job_finished")
    ledger.issue(task, Purpose.TRAIN, 3)
    facts = checkpoint_of(3, 8, {"epoch": 2, "ledger": ledger.state()})
    assert facts == CheckpointFacts(
        3, 8, 2, 5, {"job_finished": 2}, 3, {"0.0": "job_finished", "0.1": "job_finished"}, {"job_finished@home": 2}
    )


def test_a_version_that_a_learner_published_of_the_checkpoint_it_began_with_needs_no_record() -> None:
    evidence = good()
    evidence.learner.versions[5] = VersionFacts(5, 5, 2, 4)
    assert prove(evidence) == []
    # Of step 6 there is no checkpoint.
    evidence.learner.versions[6] = VersionFacts(6, 6, 2, 5)
    assert len(prove(evidence)) == 1
