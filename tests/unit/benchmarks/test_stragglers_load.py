"""The pure parts of benchmarks/stragglers.py: the draw of durations, the simulated clock, the statistics."""

import math
import statistics

import pytest

from benchmarks.stragglers_load import Course, Load, Watch, lognormals, long_tasks, make_rollout, share, simulate
from longshore.rpc.convert_rollout import rollout_from_bytes, rollout_to_bytes
from longshore.types import JobRef, TicketRef

JOB = JobRef("default", "job")


def load(sigma: float = 1.0, **more: float) -> Load:
    settings = {
        "mean_s": 0.5,
        "slots": 8,
        "group_size": 4,
        "groups_per_step": 4,
        "target_staleness": 3,
        "train_s": 0.5,
        "steps": 60,
        **more,
    }
    return Load(sigma=sigma, **settings)


@pytest.mark.parametrize("sigma", [1.0, 1.5])
def test_durations_are_lognormal_with_exactly_the_mean(sigma):
    durations = load(sigma, steps=2000).durations()
    assert len(durations) == 32_000
    assert math.fsum(durations) / len(durations) == pytest.approx(0.5, rel=1e-12)
    logs = [math.log(duration) for duration in durations]
    assert statistics.pstdev(logs) == pytest.approx(sigma, rel=0.02)
    # A lognormal's median is exp(-sigma^2 / 2) of its mean; that of a sample of this size is near.
    assert statistics.median(durations) == pytest.approx(0.5 * math.exp(-sigma * sigma / 2), rel=0.1)


def test_durations_depend_on_the_seed_and_nothing_else():
    assert load().durations() == load(target_staleness=0, slots=1, train_s=9.0).durations()
    assert load().durations() != load(seed=1).durations()
    assert lognormals(1.0, 10, 0) == lognormals(1.0, 20, 0)[:10]


@pytest.mark.parametrize(
    ("more", "fluid"),
    [({}, 16.0), ({"train_s": 2.0}, 8.0), ({"mean_s": 0.25}, 32.0), ({"train_s": 0.0}, 16.0), ({"mean_s": 0.0}, 32.0)],
)
def test_the_fluid_limit_is_the_slower_of_the_two(more, fluid):
    assert load(**more).fluid == fluid


def test_the_steady_state_leaves_out_both_ends():
    assert load(steps=40, target_staleness=3).steady_steps == (4, 36)
    # Too short for that, yet never empty.
    first, last = load(steps=2, target_staleness=3).steady_steps
    assert 1 <= first < last <= 2


def test_long_tasks_are_the_longest_tenth():
    durations = [float(number) for number in range(1000)]
    assert long_tasks(durations) == set(range(900, 1000))
    assert long_tasks(list(reversed(durations))) == set(range(100))


def test_share():
    assert share({1, 2}, [1, 2, 3, 4]) == 0.5
    assert share({9}, range(4)) == 0.0
    with pytest.raises(ValueError, match="nothing"):
        share({1}, [])


def test_throughput_counts_what_ended_between_two_steps():
    course = Course(ended=[10.0, 12.0, 13.0, 14.0])
    assert course.throughput(1, 4, batch=16) == 12.0
    assert course.throughput(2, 3, batch=16) == 16.0
    with pytest.raises(ValueError, match="no time"):
        course.throughput(2, 2, batch=16)


def test_a_watch_sees_a_broken_invariant_and_keeps_count():
    watch = Watch(limit=10)
    watch.issue(10)
    watch.consume(4)
    watch.issue(4)
    assert (watch.broken, watch.highest, watch.looks) == (0, 10, 3)
    watch.issue(1)
    assert (watch.broken, watch.highest) == (1, 11)
    watch.consume(12)
    assert watch.broken == 2, "more was consumed than issued"


def test_a_simulated_run_trains_every_ticket_once_within_the_limit():
    watched = load(1.5)
    watch = Watch(watched.limit)
    course = simulate(watched, watch)
    trained = [number for step in course.trained for number in step]
    assert sorted(trained) == list(range(watched.tickets))
    assert len(course.ended) == watched.steps
    assert course.ended == sorted(course.ended)
    assert (watch.issued, watch.consumed, watch.broken) == (watched.tickets, watched.tickets, 0)
    assert watch.highest == watched.limit


def test_a_synchronous_loop_is_never_stale_and_takes_the_time_of_each_batch():
    synchronous = load(target_staleness=0, slots=16, steps=5)
    course = simulate(synchronous)
    assert set(course.staleness) == {0}
    durations, batch = synchronous.durations(), synchronous.batch
    # A slot for each: a batch lasts as long as its slowest.
    slowest = [max(durations[start : start + batch]) for start in range(0, synchronous.tickets, batch)]
    assert course.ended[-1] == pytest.approx(sum(slowest) + 5 * synchronous.train_s)


def test_more_places_bring_the_simulated_learner_to_the_fluid_limit():
    def of_the_limit(target: int) -> float:
        tried = load(1.5, target_staleness=target, steps=200)
        course = simulate(tried)
        return course.throughput(*tried.steady_steps, tried.batch) / tried.fluid

    assert of_the_limit(0) < of_the_limit(1) < 0.95 < of_the_limit(7) < 1.1


def test_the_rollouts_pass_every_check_and_give_each_group_signal():
    rollouts = [make_rollout(TicketRef(JOB, 3, index), "3", version=7) for index in range(4)]
    assert [rollout_from_bytes(rollout_to_bytes(rollout)) for rollout in rollouts] == rollouts
    assert [rollout.verdict.reward for rollout in rollouts] == [0.0, 1.0, 0.0, 1.0]
    assert {rollout.min_version for rollout in rollouts} == {7}
