"""What the launcher does about a cluster that is not as it should be; the cluster is one in memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from kube import MemoryCluster, cluster_settings, plan_in

from longshore.errors import Rejected, Unavailable
from longshore.launcher.kubernetes import launcher as launcher_module
from longshore.launcher.kubernetes import pod_logs, scaler
from longshore.launcher.kubernetes import watcher as watcher_module
from longshore.launcher.kubernetes.launcher import KubernetesLauncher
from longshore.launcher.kubernetes.scale import Demand
from longshore.launcher.spec import ProcessState, UnitState, UnitStatus

SITES: dict[str, Any] = {"sites": [{"name": "west", "actors": 1}], "resources": {"actors": 2}}


class Bench:
    """A launcher over two clusters in memory, watched until the test ends."""

    def __init__(self, **clusters: dict[str, Any]) -> None:
        self.settings = cluster_settings(**clusters)
        self.clusters = {name: MemoryCluster() for name in self.settings.clusters}
        self.home, self.west = self.clusters["home"], self.clusters["west"]
        self.demand = Demand(0, 0)
        self.units: dict[str, UnitStatus] = {}
        self.launcher = self.fresh()

    def fresh(self) -> KubernetesLauncher:
        async def lag(job: str, project: str, site: str) -> Demand:
            return self.demand

        return KubernetesLauncher(self.settings, lambda name, settings: self.clusters[name], lag)

    @contextlib.asynccontextmanager
    async def watched(self, launcher: KubernetesLauncher | None = None) -> AsyncIterator[KubernetesLauncher]:
        watched = launcher or self.launcher

        async def follow() -> None:
            async for units in watched.watch():
                self.units = units

        task = asyncio.create_task(follow())
        try:
            yield watched
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            # The clusters are told of nothing that could be waited for.
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def settled(self) -> None:
        """Until two looks at each cluster have found nothing to do."""
        for cluster in self.clusters.values():
            if not cluster.down:
                count = -1
                while count != len(cluster.applied):
                    count = len(cluster.applied)
                    await asyncio.sleep(0.1)


def _ready(bench: Bench, prefix: str) -> bool:
    """Whether all processes that are named so have been seen ready."""
    found = [process for process in bench.units["j-1"].processes if process.name.startswith(prefix)]
    return bool(found) and all(process.state is ProcessState.READY for process in found)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher_module, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(watcher_module, "SOON_S", 0.0)
    monkeypatch.setattr(watcher_module, "_FIRST_BACKOFF_S", 0.02)
    monkeypatch.setattr(watcher_module, "_MAX_BACKOFF_S", 0.05)
    monkeypatch.setattr(scaler, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(pod_logs, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(launcher_module, "TELL_EVERY_S", 0.02)
    monkeypatch.setattr(launcher_module, "FIRST_LOOK_S", 0.5)


async def test_a_job_is_made_in_both_clusters_seen_ready_and_removed_whole(tmp_path: Path) -> None:
    bench = Bench()
    async with bench.watched() as launcher:
        await launcher.apply("j-1", plan_in(tmp_path, bench.settings, **SITES))
        await bench.until(lambda: bool(bench.home.names("Job") and bench.west.names("StatefulSet")))
        await bench.settled()
        bench.home.run_pods()
        bench.west.run_pods()
        await bench.until(lambda: bench.units["j-1"].ready)
        names = {process.name for process in bench.units["j-1"].processes}
        assert {"learner", "actor-0", "actor-1", "west-relay", "west-broker", "west-actor-0"} <= names
        learner_log = tmp_path / "runs" / "j-1" / "logs" / "learner.log"
        await bench.until(learner_log.exists)
        assert learner_log.read_text() == "ls-j-1-learner-0 speaks\n"
        await launcher.remove("j-1", "the test's end")
        assert bench.home.objects == {}
        assert bench.west.objects == {}
        await bench.until(lambda: bench.units == {})


async def test_a_look_at_what_is_as_it_should_be_changes_nothing(tmp_path: Path) -> None:
    bench = Bench()
    async with bench.watched() as launcher:
        await launcher.apply("j-1", plan_in(tmp_path, bench.settings))
        await bench.until(lambda: bool(bench.home.names("Job")))
        await bench.settled()
        count = len(bench.home.applied)
        # Each object once: the anchor first, and again with nothing.
        assert len(bench.home.applied) == len(set(bench.home.applied))
        assert bench.home.applied[0] == ("ConfigMap", "ls-j-1")
        await asyncio.sleep(0.2)
        assert len(bench.home.applied) == count


async def test_what_somebody_deleted_or_changed_is_mended(tmp_path: Path) -> None:
    bench = Bench()
    async with bench.watched() as launcher:
        await launcher.apply("j-1", plan_in(tmp_path, bench.settings))
        await bench.until(lambda: bool(bench.home.names("Job")))
        await bench.settled()
        bench.home.edit("Deployment", "ls-j-1-actor", replicas=0)
        del bench.home.objects["Service", "ls-j-1-generator"]
        await bench.until(lambda: bench.home.objects["Deployment", "ls-j-1-actor"]["spec"]["replicas"] == 2)
        await bench.until(lambda: ("Service", "ls-j-1-generator") in bench.home.objects)
        # Even its anchor, with which all else went.
        await bench.home.delete("v1", "ConfigMap", "ls-j-1")
        assert not bench.home.names("Deployment")
        await bench.until(lambda: ("Deployment", "ls-j-1-actor") in bench.home.objects)


async def test_a_gateway_that_starts_again_finds_what_runs_and_changes_nothing(tmp_path: Path) -> None:
    bench = Bench()
    plan = plan_in(tmp_path, bench.settings, **SITES)
    async with bench.watched() as launcher:
        await launcher.apply("j-1", plan)
        await bench.until(lambda: bool(bench.home.names("Job") and bench.west.names("Deployment")))
        await bench.settled()
        bench.home.run_pods()
        bench.west.run_pods()
        await bench.until(lambda: bench.units["j-1"].ready)
    before = {key: found["metadata"] for key, found in bench.home.objects.items()}
    bench.units = {}
    async with bench.watched(bench.fresh()) as again:
        # It says what is there before it knows why.
        await bench.until(lambda: "j-1" in bench.units)
        await again.apply("j-1", plan)
        await bench.until(lambda: bool(bench.units["j-1"].processes) and bench.units["j-1"].ready)
        await bench.settled()
        assert {key: found["metadata"] for key, found in bench.home.objects.items()} == before


async def test_what_nobody_wants_any_more_is_told_and_can_be_removed(tmp_path: Path) -> None:
    bench = Bench()
    async with bench.watched() as launcher:
        await launcher.apply("j-1", plan_in(tmp_path, bench.settings))
        await bench.until(lambda: bool(bench.home.names("Job")))
    async with bench.watched(bench.fresh()) as again:
        await bench.until(lambda: bench.units == {"j-1": UnitStatus("j-1", UnitState.RUNNING)})
        await again.remove("j-1", "its job has ended")
        assert bench.home.objects == {}


async def test_a_cluster_that_is_away_holds_up_no_other_and_is_cleaned_up_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher_module, "AWAY_S", 0.05)
    bench = Bench()
    async with bench.watched() as launcher:
        await launcher.apply("j-1", plan_in(tmp_path, bench.settings, **SITES))
        await bench.until(lambda: bool(bench.west.names("Deployment")))
        await bench.settled()
        bench.west.run_pods()
        await bench.until(lambda: _ready(bench, "west-"))
        bench.west.down = True
        bench.home.run_pods()
        # What was known of it last stays known, and home goes on being looked after.
        await bench.until(lambda: bench.units["j-1"].ready)
        bench.home.edit("Deployment", "ls-j-1-actor", replicas=7)
        await bench.until(lambda: bench.home.objects["Deployment", "ls-j-1-actor"]["spec"]["replicas"] == 2)
        await asyncio.sleep(0.1)
        await launcher.remove("j-1", "cancelled while west was away")
        assert bench.home.objects == {}
        assert bench.west.objects
        # Another job that does not need it starts.
        await launcher.apply("j-2", plan_in(tmp_path, bench.settings, unit="j-2"))
        await bench.until(lambda: ("Job", "ls-j-2-learner") in bench.home.objects)
        bench.west.down = False
        await bench.until(lambda: not bench.west.objects)


async def test_removal_waits_for_the_home_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher_module, "REMOVE_S", 0.2)
    bench = Bench()
    async with bench.watched() as launcher:
        await launcher.apply("j-1", plan_in(tmp_path, bench.settings))
        await bench.until(lambda: bool(bench.home.names("Job")))
        bench.home.down = True
        with pytest.raises(Unavailable, match="home"):
            await launcher.remove("j-1", "paused")
        bench.home.down = False
        await launcher.remove("j-1", "paused")
        assert bench.home.objects == {}


async def test_a_pod_that_is_replaced_keeps_its_name_and_counts_a_restart(tmp_path: Path) -> None:
    bench = Bench()
    async with bench.watched() as launcher:
        await launcher.apply("j-1", plan_in(tmp_path, bench.settings))
        await bench.until(lambda: bool(bench.home.names("Job")))
        await bench.settled()
        bench.home.run_pods()
        await bench.until(lambda: bench.units["j-1"].ready)
        del bench.home.objects["Pod", "ls-j-1-actor-0"]
        await bench.until(lambda: not bench.units["j-1"].ready)
        bench.home.add_pod("Deployment", "ls-j-1-actor", 7)
        await bench.until(lambda: bench.units["j-1"].ready)
        restarts = {process.name: process.restarts for process in bench.units["j-1"].processes}
        assert restarts == {"learner": 0, "generator-0": 0, "verifier-0": 0, "actor-0": 1, "actor-1": 0}


async def test_a_learner_is_made_anew_for_a_new_image_unless_it_has_ended(tmp_path: Path) -> None:
    bench = Bench()
    plan = plan_in(tmp_path, bench.settings)
    for ended in (False, True):
        async with bench.watched(bench.fresh()) as launcher:
            await launcher.apply("j-1", plan)
            await bench.until(lambda: ("Job", "ls-j-1-learner") in bench.home.objects)
            await bench.settled()
        job = bench.home.objects["Job", "ls-j-1-learner"]
        if ended:
            job["status"] = {"conditions": [{"type": "Complete", "status": "True"}]}
        before, tag = job["metadata"]["uid"], f"with-{ended}"
        image = bench.settings.image.model_copy(update={"tag": tag})
        bench.settings = bench.settings.model_copy(update={"image": image})
        async with bench.watched(bench.fresh()) as launcher:
            await launcher.apply("j-1", plan)
            await bench.until(lambda: tag in str(bench.home.objects["Deployment", "ls-j-1-actor"]))  # noqa: B023 - at once
            await bench.settled()
        now = bench.home.objects["Job", "ls-j-1-learner"]
        assert (now["metadata"]["uid"] == before, tag in str(now)) == (ended, not ended)


async def test_a_learner_that_is_done_ends_the_job(tmp_path: Path) -> None:
    bench = Bench()
    async with bench.watched() as launcher:
        await launcher.apply("j-1", plan_in(tmp_path, bench.settings))
        await bench.until(lambda: bool(bench.home.names("Job")))
        await bench.settled()
        bench.home.objects["Job", "ls-j-1-learner"]["status"] = {"conditions": [{"type": "Complete", "status": "True"}]}
        await bench.until(lambda: bench.units["j-1"].state is UnitState.SUCCEEDED)


async def test_three_deaths_in_a_row_before_it_was_ready_end_the_job_with_its_last_words(tmp_path: Path) -> None:
    bench = Bench()
    async with bench.watched() as launcher:
        await launcher.apply("j-1", plan_in(tmp_path, bench.settings))
        await bench.until(lambda: bool(bench.home.names("Job")))
        await bench.settled()
        bench.home.run_pods()
        pod = bench.home.objects["Pod", "ls-j-1-generator-0"]
        (status,) = pod["status"]["containerStatuses"]
        last = {"exitCode": 2, "message": "longshore generator: no such model\n"}
        await bench.until(lambda: bench.units["j-1"].ready)
        for deaths in range(1, 4):
            assert bench.units["j-1"].state is UnitState.RUNNING
            status |= {"restartCount": deaths, "ready": False, "started": False, "lastState": {"terminated": last}}
            if deaths < 3:
                await bench.until(
                    lambda: any(
                        process.state is ProcessState.BACKOFF and process.restarts == deaths  # noqa: B023 - at once
                        for process in bench.units["j-1"].processes
                    )
                )
        await bench.until(lambda: bench.units["j-1"].state is UnitState.FAILED)
        assert "no such model" in bench.units["j-1"].message
        assert "3 times in a row" in bench.units["j-1"].message


async def test_what_a_cluster_will_never_take_ends_the_job_with_its_words(tmp_path: Path) -> None:
    bench = Bench()
    bench.home.refuses = "Deployment"
    async with bench.watched() as launcher:
        await launcher.apply("j-1", plan_in(tmp_path, bench.settings))
        await bench.until(lambda: "j-1" in bench.units and bench.units["j-1"].state is UnitState.FAILED)
        assert "Deployment is invalid" in bench.units["j-1"].message


async def test_a_site_without_a_cluster_is_refused_by_name(tmp_path: Path) -> None:
    bench = Bench()
    with pytest.raises(Rejected, match="no cluster is configured for east; there are home, west"):
        plan_in(tmp_path, bench.settings, sites=[{"name": "east", "actors": 1}])


async def test_actors_follow_the_tickets_up_at_once(tmp_path: Path) -> None:
    bench = Bench(home={"services": {"actor": {"scale": {"min": 1, "max": 5}}}})
    async with bench.watched() as launcher:
        await launcher.apply("j-1", plan_in(tmp_path, bench.settings, resources={"rollouts_per_actor": 10}))

        def actors() -> int:
            found = bench.home.objects.get(("Deployment", "ls-j-1-actor"))
            return int(found["spec"]["replicas"]) if found else -1

        await bench.until(lambda: actors() == 1)
        bench.demand = Demand(queued=21, running=10)
        await bench.until(lambda: actors() == 4)
        bench.demand = Demand(queued=2100, running=10)
        await bench.until(lambda: actors() == 5)
        # Down only after a while of less.
        bench.demand = Demand(0, 0)
        await asyncio.sleep(0.2)
        assert actors() == 5
