"""Any sequence of what learners and actors can do keeps the ledger's equation, and delivers no ticket twice.

A model of a few lines says what each call must answer; the real broker has to agree, and to hold what the model holds.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from longshore.errors import Conflict, Fenced, NotFound, Rejected
from longshore.rollout_queue import broker, heads, site_leases
from longshore.rollout_queue.journal import Journal
from longshore.rollout_queue.rollouts import Delivery, End
from longshore.rollout_queue.site_leases import SiteLeases
from longshore.rollout_queue.tickets import Claim

MAX_ATTEMPTS = 2
ACTORS = st.sampled_from(["actor-0", "actor-1", "actor-2"])
SITES = st.sampled_from(["west", "east"])
CONTENTS = st.lists(st.sampled_from([b"a", b"b"]), min_size=1, max_size=3)
HOME = ("delivered", "awaiting_verdict")
FINAL = {"attempts_exhausted", "too_long", "trained", "zero_variance", "rejected", "cancelled"}


@dataclass
class Model:
    """What the broker should know of one ticket."""

    state: str = "queued"
    attempt: int = 0
    tries: int = 0
    payload: bytes = b""
    unscored: bool = False
    # The rollout site that leased it.
    site: str = ""
    journal: list[bytes] = field(default_factory=list)
    history: list[str] = field(default_factory=list)

    def to(self, state: str) -> None:
        self.history.append(state)
        self.state = state
        if state in FINAL or state in HOME:
            self.journal = []
        if state == "queued":
            self.site = ""


class QueueMachine(RuleBasedStateMachine):
    """Rules are calls; `claims` holds every claim ever made, stale ones above all."""

    url = ""
    make_bench: type
    claims = Bundle("claims")
    deliveries = Bundle("deliveries")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.client = broker.connect(self.url)
        self.bench = self.make_bench(self.client, max_attempts=MAX_ATTEMPTS)
        self.models: dict[str, Model] = {}
        self.epoch = 0
        self.incarnation = self.run(broker.incarnation(self.client))
        # Who leased what.
        self.site_of: dict[tuple[str, int, str], str] = {}
        self.next_group = 0
        # Ticket keys of the rollouts that the learner has been given.
        self.seen: list[str] = []

    def teardown(self) -> None:
        self.run(broker.forget_job(self.client, self.bench.job))
        self.run(self.client.aclose())
        self.runner.close()

    def run(self, coroutine):
        return self.runner.run(coroutine)

    def holds(self, claim: Claim) -> bool:
        model = self.models[claim.ticket.ref.key]
        return model.state in ("running", "spooled") and model.attempt == claim.attempt

    def may_deliver(self, claim: Claim) -> bool:
        """Its lease may have run out: while nobody has started anew, the rollout is as good as ever."""
        model = self.models[claim.ticket.ref.key]
        return self.holds(claim) or (model.state == "queued" and model.attempt == claim.attempt)

    @initialize(target=claims, actor=ACTORS)
    def setup(self, actor: str):
        """Every run starts with work to do: hypothesis leaves whole rules out of most runs, issue and claim too."""
        self.run(self.bench.tickets.setup())
        self.epoch = self.run(self.bench.tickets.open_epoch())
        self.issue_new(8)
        return self.started(self.run(self.bench.tickets.claim(actor, 6, 0)))

    # -- learner -----------------------------------------------------------------------------------------------------

    @rule(size=st.integers(1, 4))
    def issue(self, size: int) -> None:
        self.issue_new(size)

    def issue_new(self, size: int) -> None:
        new = [self.bench.ticket(self.next_group, index) for index in range(size)]
        self.next_group += 1
        known = [self.bench.ticket(*map(int, key.split("."))) for key, m in self.models.items() if m.state not in FINAL]
        assert self.run(self.bench.tickets.issue(self.epoch, known + new)) == size
        self.models |= {ticket.ref.key: Model() for ticket in new}

    @rule()
    def restart_learner(self) -> None:
        self.epoch = self.run(self.bench.tickets.open_epoch())

    @rule(behind=st.integers(1, 3))
    def old_learner(self, behind: int) -> None:
        old = max(0, self.epoch - behind)
        for call in (
            self.bench.tickets.issue(old, [self.bench.ticket(999, 0)]),
            self.bench.tickets.close(old, "cancelled"),
            self.bench.rollouts.acknowledge(old, [End(None, key, "trained") for key in (*self.models, "999.0")]),
        ):
            with pytest.raises(Fenced):
                self.run(call)

    def given(self, again: bool) -> list[Delivery]:
        """What the learner reads, checked against the model."""
        if again:
            found = self.run(self.bench.rollouts.read_pending())
        else:
            found = self.run(self.bench.rollouts.read(3, 0))
            self.seen += [item.ticket_key for item in found if item.payload is not None]
        for item in found:
            model = self.models[item.ticket_key]
            assert item.attempt == model.attempt
            if item.verdict is not None:
                assert (model.state, model.unscored, item.verdict) == ("delivered", True, b"verdict")
            elif item.payload is None:
                assert model.state == item.final_reason
            else:
                assert model.state == "delivered" or (model.state, model.unscored) == ("awaiting_verdict", True)
                assert (item.payload, item.awaiting_verdict) == (model.payload, model.unscored)
        return found

    @rule(target=deliveries, again=st.booleans())
    def read(self, again: bool):
        return multiple(*self.given(again))

    @rule(again=st.booleans(), outcome=st.sampled_from(["trained", "zero_variance"]))
    def train(self, again: bool, outcome: str) -> None:
        for delivery in self.given(again):
            self.acknowledge_one(delivery, outcome)

    @rule(delivery=deliveries, outcome=st.sampled_from(["trained", "zero_variance"]))
    def acknowledge(self, delivery: Delivery, outcome: str) -> None:
        self.acknowledge_one(delivery, outcome)

    def acknowledge_one(self, delivery: Delivery, outcome: str) -> None:
        end = End(delivery.entry_id, delivery.ticket_key, delivery.final_reason or outcome)
        self.run(self.bench.rollouts.acknowledge(self.epoch, [end]))
        if self.models[delivery.ticket_key].state in HOME:
            self.models[delivery.ticket_key].to(outcome)

    @rule(delivery=consumes(deliveries))
    def dead_letter(self, delivery: Delivery) -> None:
        if delivery.payload is None and delivery.verdict is None:
            return
        self.run(self.bench.rollouts.dead_letter(self.epoch, delivery, "schema", "model"))
        if self.models[delivery.ticket_key].state in HOME:
            self.models[delivery.ticket_key].to("rejected")

    @rule(really=st.integers(0, 9))
    def close(self, really: int) -> None:
        if really != 9:
            # It leaves nothing to do, so it must be rare.
            return
        live = [model for model in self.models.values() if model.state not in FINAL]
        expected = Counter(model.state for model in live)
        assert self.run(self.bench.tickets.close(self.epoch, "cancelled")) == expected
        for model in live:
            model.to("cancelled")

    # -- actors ------------------------------------------------------------------------------------------------------

    def started(self, found: list[Claim]):
        for claim in found:
            model = self.models[claim.ticket.ref.key]
            assert model.state in ("queued", "running")
            assert claim.attempt == model.attempt + 1
            model.attempt, model.tries, model.site = claim.attempt, model.tries + 1, ""
            assert model.tries <= MAX_ATTEMPTS
            model.to("running")
        return multiple(*found)

    @rule(target=claims, actor=ACTORS, count=st.integers(1, 4))
    def claim(self, actor: str, count: int):
        queued = sum(model.state == "queued" for model in self.models.values())
        found = self.run(self.bench.tickets.claim(actor, count, 0))
        assert len(found) == min(count, queued)
        return self.started(found)

    @rule(target=claims, actor=ACTORS)
    def take_over(self, actor: str):
        running = {key: model for key, model in self.models.items() if model.state == "running" and not model.site}
        found = self.run(self.bench.tickets.take_over(actor, 1000, 0))
        expected = {key for key, model in running.items() if model.tries < MAX_ATTEMPTS}
        assert {claim.ticket.ref.key for claim in found} == expected
        for key in running.keys() - expected:
            running[key].to("attempts_exhausted")
        return self.started(found)

    @rule(actor=ACTORS, held=st.lists(claims, max_size=4, unique_by=lambda claim: claim.fence))
    def renew(self, actor: str, held: list[Claim]) -> None:
        assert self.run(self.bench.tickets.renew(actor, held)) == [claim for claim in held if not self.holds(claim)]

    @rule(claim=claims, index=st.integers(0, 2))
    def journal(self, claim: Claim, index: int) -> None:
        model, journal = self.models[claim.ticket.ref.key], Journal(self.client, self.bench.job)
        turn = f"{claim.attempt} {index}".encode()
        if not self.holds(claim):
            with pytest.raises(Fenced):
                self.run(journal.append(claim, index, turn))
        elif index > len(model.journal):
            with pytest.raises(Rejected, match="gap"):
                self.run(journal.append(claim, index, turn))
        else:
            self.run(journal.append(claim, index, turn))
            model.journal[index:] = [turn]
        assert self.run(journal.read(claim)) == model.journal

    @rule(claim=claims, contents=CONTENTS, unscored=st.booleans())
    def deliver(self, claim: Claim, contents: list[bytes], unscored: bool) -> None:
        for content in contents:
            self.deliver_one(claim, content, unscored)

    def deliver_one(self, claim: Claim, content: bytes, unscored: bool) -> None:
        model = self.models[claim.ticket.ref.key]
        repeat = model.state in HOME and model.payload == content
        if not self.may_deliver(claim) and not repeat:
            with pytest.raises(Fenced):
                self.run(self.bench.rollouts.deliver(claim, content, unscored))
            return
        assert self.run(self.bench.rollouts.deliver(claim, content, unscored)) is not repeat
        if not repeat:
            model.payload, model.unscored = content, unscored
            model.to("awaiting_verdict" if unscored else "delivered")

    @rule(claim=claims)
    def judge(self, claim: Claim) -> None:
        for key in (claim.ticket.ref.key, *(key for key, m in self.models.items() if m.state == "awaiting_verdict")):
            model, deliver_verdict = self.models[key], self.bench.rollouts.deliver_verdict
            if model.state == "awaiting_verdict":
                self.run(deliver_verdict(key, b"verdict"))
                model.to("delivered")
            else:
                with pytest.raises(NotFound if model.state in FINAL else Conflict):
                    self.run(deliver_verdict(key, b"verdict"))

    @rule(claim=claims, drain=st.booleans())
    def give_back(self, claim: Claim, drain: bool) -> None:
        held = self.holds(claim)
        self.run(self.bench.tickets.give_back(claim, "drain" if drain else "failed"))
        if held:
            model = self.models[claim.ticket.ref.key]
            model.tries -= drain
            model.journal = model.journal if drain else []
            model.to("attempts_exhausted" if model.tries >= MAX_ATTEMPTS else "queued")

    @rule(claim=claims)
    def reject(self, claim: Claim) -> None:
        held = self.holds(claim)
        self.run(self.bench.tickets.reject(claim, "too_long", ""))
        if held:
            self.models[claim.ticket.ref.key].to("too_long")

    # -- a rollout site ----------------------------------------------------------------------------------------------

    def leased(self, found: list[Claim], *, counts: bool):
        for claim in found:
            model = self.models[claim.ticket.ref.key]
            assert claim.attempt == model.attempt + 1
            model.attempt, model.tries, model.site = claim.attempt, model.tries + counts, self.site_of[claim.fence]
            model.journal = []
            model.to("running")
        return multiple(*found)

    @rule(target=claims, site=SITES, count=st.integers(1, 3))
    def lease(self, site: str, count: int):
        queued = [model for model in self.models.values() if model.state == "queued"]
        exhausted = {id(model) for model in queued if model.tries >= MAX_ATTEMPTS}
        assert not exhausted
        found = self.run(self.bench_of(site).lease(count))
        assert len(found) == min(count, len(queued))
        self.site_of |= {claim.fence: site for claim in found}
        return self.leased(found, counts=True)

    @rule(target=claims, site=SITES, keys=st.lists(st.integers(0, 30), max_size=4, unique=True))
    def adopt(self, site: str, keys: list[int]):
        names = [name for number, name in enumerate(self.models) if number in keys]
        queued = {name for name in names if self.models[name].state == "queued"}
        found = self.run(self.bench_of(site).adopt([*names, "998.0"]))
        assert {claim.ticket.ref.key for claim in found} == queued
        self.site_of |= {claim.fence: site for claim in found}
        return self.leased(found, counts=False)

    @rule(site=SITES, spooled=st.booleans(), chosen=st.lists(claims, max_size=4, unique_by=lambda claim: claim.fence))
    def renew_site(self, site: str, spooled: bool, chosen: list[Claim]) -> None:
        chosen = [claim for claim in chosen if self.site_of.get(claim.fence) == site]
        held = [claim for claim in chosen if self.holds(claim)]
        lost = self.run(self.bench_of(site).renew([(claim, spooled) for claim in chosen]))
        assert lost == [claim for claim in chosen if claim not in held]
        for claim in held:
            self.models[claim.ticket.ref.key].to("spooled" if spooled else "running")

    @rule(site=SITES)
    def what_a_site_holds(self, site: str) -> None:
        held = {claim.fence for claim in self.run(self.bench_of(site).held())}
        assert held == {fence for fence, owner in self.site_of.items() if owner == site and self.fence_holds(fence)}

    def fence_holds(self, fence: tuple[str, int, str]) -> bool:
        model = self.models[fence[0]]
        return model.state in ("running", "spooled") and model.attempt == fence[1]

    @rule(target=claims, site=SITES)
    def lease_what_ran_out(self, site: str):
        """With nothing queued, every leased ticket is offered anew, for here each lease has run out."""
        if any(model.state == "queued" for model in self.models.values()):
            return multiple()
        out = {key: model for key, model in self.models.items() if model.site and model.state in ("running", "spooled")}
        expected = {key for key, model in out.items() if model.tries < MAX_ATTEMPTS}
        found = self.run(self.bench_of(site, lease_ms=0).lease(1000))
        assert {claim.ticket.ref.key for claim in found} == expected
        for key in out.keys() - expected:
            out[key].to("attempts_exhausted")
        self.site_of |= {claim.fence: site for claim in found}
        return self.leased(found, counts=True)

    @rule(really=st.integers(0, 2))
    def expire(self, really: int) -> None:
        if really:
            return
        out = [model for model in self.models.values() if model.site and model.state in ("running", "spooled")]
        assert self.run(site_leases.expire(self.client, self.bench.job, 0, max_attempts=MAX_ATTEMPTS)) == len(out)
        for model in out:
            model.to("queued" if model.tries < MAX_ATTEMPTS else "attempts_exhausted")

    def bench_of(self, site: str, lease_ms: int = 3_600_000) -> SiteLeases:
        return SiteLeases(self.client, self.bench.job, site, max_attempts=MAX_ATTEMPTS, lease_ms=lease_ms)

    @rule()
    def reconcile(self) -> None:
        """The counts made anew from what is there are those that were."""
        before = self.run(self.bench.ledger.counts())
        finals = {
            (site, state): number
            for site, states in before.by_site.items()
            for state, number in states.items()
            if state in FINAL
        }
        for given in (None, finals):
            assert self.run(self.bench.rollouts.reconcile(self.epoch, self.incarnation, given)) == before.issued
            assert self.run(self.bench.ledger.counts()) == before
        ended = {key for key, model in self.models.items() if model.state in FINAL}
        assert self.run(self.bench.rollouts.covered(list(self.models))) == ended

    # -- what must hold ----------------------------------------------------------------------------------------------

    @invariant()
    def the_broker_agrees(self) -> None:
        # `states` checks issued = sum of states, and hashes and streams against the counts.
        counted = self.run(self.bench.states())
        assert counted == Counter(model.state for model in self.models.values())

    @invariant()
    def each_ticket_is_delivered_at_most_once(self) -> None:
        assert len(self.seen) == len(set(self.seen))
        assert all(model.history.count(state) <= 1 for model in self.models.values() for state in HOME)
        entries = self.run(self.client.xrange(self.bench.keys.rollouts))
        waiting = [heads.read(fields[b"rollout"]).key for _, fields in entries if b"payload" in fields]
        judged = [fields[b"key"].decode() for _, fields in entries if b"verdict" in fields]
        assert sorted(judged) == sorted(key for key, m in self.models.items() if m.state == "delivered" and m.unscored)
        assert sorted(waiting) == sorted(key for key, model in self.models.items() if model.state in HOME)


def test_any_sequence_of_calls_keeps_the_ledger(broker_url, make_bench):
    QueueMachine.url = broker_url
    QueueMachine.make_bench = make_bench
    hypothesis.stateful.run_state_machine_as_test(
        QueueMachine,
        settings=hypothesis.settings(
            max_examples=30,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )
