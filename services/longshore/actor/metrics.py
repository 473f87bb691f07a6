"""What an actor counts."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from longshore.actor.balancing import Standing

_JOB = ("project", "job", "site")

ROLLOUTS = Counter("longshore_actor_rollouts_total", "Attempts by how they ended", (*_JOB, "outcome"))
ATTEMPTS = Counter(
    "longshore_actor_attempts_total",
    "Attempts by how they began: fresh, resumed where an earlier one's journal ends, restarted in spite of one",
    (*_JOB, "start"),
)
RUNNING = Gauge("longshore_actor_running_rollouts", "Attempts in progress", _JOB)
SECONDS = Histogram(
    "longshore_actor_rollout_seconds",
    "Time from a claim to its delivery",
    _JOB,
    buckets=(0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3600, 10800, 86400),
)
TOKENS = Counter("longshore_actor_sampled_tokens_total", "Sampled tokens of finished rollouts", _JOB)
RETRIES = Counter("longshore_actor_retries_total", "Calls repeated because a peer was away", (*_JOB, "peer"))
GENERATORS = Gauge(
    "longshore_actor_generators",
    "Generators that the actor knows: serving, absent (no proven version, or no answer), set_aside after failures",
    (*_JOB, "state"),
)
OUTSTANDING = Gauge("longshore_actor_outstanding_requests", "Requests at a generator", (*_JOB, "generator"))
LIMIT = Gauge(
    "longshore_actor_outstanding_limit", "Requests that a generator may have, by its own pressure", (*_JOB, "generator")
)
WITHOUT_PLACE = Gauge("longshore_actor_requests_without_place", "Requests for which no generator has room", _JOB)
MOVED = Counter(
    "longshore_actor_moved_replies_total",
    "Replies that another generator went on with because theirs was slow or silent",
    (*_JOB, "reason"),
)
MOVED_TOKENS = Counter(
    "longshore_actor_moved_tokens_total", "Tokens of those, prompts included, that were computed again", _JOB
)
JOURNAL_TURNS = Counter(
    "longshore_actor_journal_turns_total", "Turns of interrupted rollouts that were saved or lost", (*_JOB, "fate")
)
JOURNAL_TOKENS = Counter(
    "longshore_actor_journal_tokens_total", "Sampled tokens of those turns, saved or lost", (*_JOB, "fate")
)
UNJOURNALED = Counter(
    "longshore_actor_journal_failures_total", "Times that a turn or a snapshot was not kept", (*_JOB, "reason")
)
SPOOL_RECORDS = Gauge("longshore_actor_spool_rollouts", "Rollouts in the spool", _JOB)
SPOOL_BYTES = Gauge("longshore_actor_spool_bytes", "Bytes of the spool on the disk", _JOB)
UNSPOOLED = Counter(
    "longshore_actor_unspooled_rollouts_total", "Rollouts that were delivered without a spool's copy", _JOB
)
HELD = Counter("longshore_actor_held_deliveries_total", "Deliveries put off because the broker had no room", _JOB)
REDELIVERED = Counter(
    "longshore_actor_redelivered_rollouts_total",
    "Spooled rollouts delivered again, by what came of it",
    (*_JOB, "outcome"),
)


class ActorMetrics:
    """Turns what the parts of an actor report into metrics of its job."""

    def __init__(self, project: str, job: str, site: str) -> None:
        self._labels = (project, job, site)
        # Generators that have a series of their own.
        self._named: set[str] = set()

    def started(self, running: int) -> None:
        RUNNING.labels(*self._labels).set(running)

    def ended(self, outcome: str, seconds: float, running: int) -> None:
        RUNNING.labels(*self._labels).set(running)
        SECONDS.labels(*self._labels).observe(seconds)
        ROLLOUTS.labels(*self._labels, outcome).inc()

    def began(self, start: str) -> None:
        ATTEMPTS.labels(*self._labels, start).inc()

    def journal_used(self, fate: str, turns: int, tokens: int) -> None:
        JOURNAL_TURNS.labels(*self._labels, fate).inc(turns)
        JOURNAL_TOKENS.labels(*self._labels, fate).inc(tokens)

    def not_journaled(self, reason: str) -> None:
        UNJOURNALED.labels(*self._labels, reason).inc()

    def sampled(self, tokens: int) -> None:
        TOKENS.labels(*self._labels).inc(tokens)

    def retried_generator(self) -> None:
        RETRIES.labels(*self._labels, "generator").inc()

    def moved(self, reason: str, tokens: int) -> None:
        MOVED.labels(*self._labels, reason).inc()
        MOVED_TOKENS.labels(*self._labels).inc(tokens)

    def generators(self, standings: list[Standing], waiting: int) -> None:
        WITHOUT_PLACE.labels(*self._labels).set(waiting)
        aside = sum(item.set_aside for item in standings)
        serving = sum(item.serving for item in standings) - aside
        counts = {"serving": serving, "set_aside": aside, "absent": len(standings) - serving - aside}
        for state, count in counts.items():
            GENERATORS.labels(*self._labels, state).set(count)
        for item in standings:
            OUTSTANDING.labels(*self._labels, item.name).set(item.outstanding)
            LIMIT.labels(*self._labels, item.name).set(item.limit)
        names = {item.name for item in standings}
        for gone in self._named - names:
            OUTSTANDING.remove(*self._labels, gone)
            LIMIT.remove(*self._labels, gone)
        self._named = names

    def retried_verifier(self) -> None:
        RETRIES.labels(*self._labels, "verifier").inc()

    def spool_holds(self, records: int, size: int) -> None:
        SPOOL_RECORDS.labels(*self._labels).set(records)
        SPOOL_BYTES.labels(*self._labels).set(size)

    def not_spooled(self) -> None:
        UNSPOOLED.labels(*self._labels).inc()

    def held(self) -> None:
        HELD.labels(*self._labels).inc()

    def redelivered(self, outcome: str) -> None:
        REDELIVERED.labels(*self._labels, outcome).inc()
