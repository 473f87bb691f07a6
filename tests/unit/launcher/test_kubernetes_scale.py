from __future__ import annotations

from longshore.launcher.kubernetes.cluster_settings import ScaleSettings
from longshore.launcher.kubernetes.pod_logs import new_lines
from longshore.launcher.kubernetes.scale import COOLDOWN_S, Demand, Steady, pods_for

BOUNDS = ScaleSettings(min=1, max=8)


def test_as_many_pods_as_have_work_within_the_bounds() -> None:
    assert [pods_for(Demand(queued, 64), 64, BOUNDS) for queued in (0, 1, 64, 65, 10_000)] == [1, 2, 2, 3, 8]
    assert pods_for(Demand(0, 0), 64, BOUNDS) == 1


def test_up_at_once_and_down_after_a_while_of_less() -> None:
    steady = Steady()
    assert steady.want(2, 0.0) == 2
    assert steady.want(5, 10.0) == 5
    assert steady.want(1, 20.0) == 5
    assert steady.want(3, 30.0) == 5
    # The five are forgotten; what came after them not yet.
    assert steady.want(1, 11.0 + COOLDOWN_S) == 3
    assert steady.want(1, 31.0 + COOLDOWN_S) == 1


def test_lines_of_a_log_come_once_and_whole() -> None:
    text = "2026-01-01T00:00:01Z a\n2026-01-01T00:00:02Z b c\n2026-01-01T00:00:03Z half"
    assert new_lines(text, "") == (["a", "b c"], "2026-01-01T00:00:02Z")
    assert new_lines(text, "2026-01-01T00:00:01Z") == (["b c"], "2026-01-01T00:00:02Z")
    assert new_lines("", "x") == ([], "x")
