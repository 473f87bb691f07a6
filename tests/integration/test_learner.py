"""The learner process over the real broker and the real weight store, fed by a simulated site.

The site's rollouts depend on the tickets alone, so a learner that was killed must end with the same weights, bit for
bit, as one that was not.
"""

import asyncio
import contextlib
import json
import signal
from pathlib import Path

import pytest
from processes import Service
from safetensors.torch import load_file
from simulated_site import SimulatedSite

from longshore.config import EvaluationSpec
from longshore.rollout_queue import broker
from longshore.rollout_queue.channel import JobChannel
from longshore.rollout_queue.ledger import Ledger
from longshore.settings import JobFile
from longshore.signing import SigningKey
from longshore.types import JobRef
from longshore.weights.client import WeightsClient

STEPS = 40


def spec(name: str, tasks: Path, **train: object) -> dict[str, object]:
    return {
        "name": name,
        "model": {
            "kind": "new",
            "hidden_size": 32,
            "layers": 1,
            "heads": 2,
            "kv_heads": 2,
            "intermediate_size": 64,
            "max_context": 48,
        },
        "tasks": {"source": "jsonl", "path": str(tasks), "heldout_fraction": 0.2},
        "verifier": {"name": "exact-match"},
        "warm_start": {"steps": 5, "batch_size": 4},
        "train": {
            "steps": STEPS,
            "groups_per_step": 4,
            "group_size": 4,
            "checkpoint_every": 7,
            "target_staleness": 1,
            **train,
        },
        "evaluation": {"tasks": 6},
        "weights": {"dtype": "float32", "keep": 4},
    }


class Bench:
    """A broker, a weight store, a simulated site and one job's learner."""

    def __init__(self, folder, private_broker, name, settings, **train) -> None:
        self.folder = folder
        self.broker = private_broker
        self.job = JobRef("default", name)
        self.key = SigningKey.create(folder / "learner.key")
        self.run_dir = folder / "run"
        self.run_dir.mkdir()
        tasks = folder / "tasks.jsonl"
        tasks.write_text("".join(json.dumps({"prompt": f"{n}+{n}=", "answer": str(2 * n)}) + "\n" for n in range(200)))
        job_file = JobFile(
            project="default", job=name, spec=spec(name, tasks, **train), learner_public_key=self.key.public_key.hex()
        )
        (folder / "job.json").write_text(job_file.model_dump_json())
        self.weights = Service("weights", folder, store_url=folder / "store").start()
        self.learner = Service(
            "learner",
            folder,
            job_file=folder / "job.json",
            broker_url=private_broker.url,
            weights=self.weights.address,
            run_dir=self.run_dir,
            signing_key_file=folder / "learner.key",
            **settings,
        )
        self.site = SimulatedSite(private_broker.url, self.job)

    @contextlib.asynccontextmanager
    async def running(self):
        self.weights.wait_serving()
        client = WeightsClient(self.weights.address, self.job, self.key.public_key)
        await client.register_key(keep=4)
        await client.close()
        answering = asyncio.create_task(self.site.run())
        self.learner.start()
        try:
            yield self
        finally:
            answering.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await answering
            await self.site.close()
            self.learner.stop()
            self.weights.stop()

    async def until_step(self, step: int) -> None:
        async def reached() -> None:
            path = self.run_dir / "metrics.jsonl"
            while not path.exists() or len(path.read_text().splitlines()) < step:
                assert self.learner.process.poll() is None, self.learner.tail()
                await asyncio.sleep(0.02)

        await asyncio.wait_for(reached(), 90)

    async def finished(self) -> dict[str, object]:
        code = await asyncio.to_thread(self.learner.wait, 120)
        assert code == 0, self.learner.tail()
        return json.loads((self.run_dir / "summary.json").read_text())

    def weights_bytes(self) -> bytes:
        return (self.run_dir / "checkpoint" / "model.safetensors").read_bytes()

    def steps(self) -> list[int]:
        return [int(json.loads(line)["step"]) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]

    async def broker_counts(self):
        client = broker.connect(self.broker.url)
        try:
            return await Ledger(client, self.job).counts()
        finally:
            await client.aclose()


@pytest.fixture
def make_bench(tmp_path, private_broker):
    def make(name: str, settings: dict[str, object] | None = None, **train: object) -> Bench:
        folder = tmp_path / name
        folder.mkdir()
        return Bench(folder, private_broker, name, settings or {}, **train)

    return make


def check_accounts(summary, counts) -> None:
    accounted = summary["rollouts_accounted"]
    assert summary["rollouts_issued"] == summary["rollouts_trained"] + sum(accounted.values())
    assert accounted["evaluation"] == 12
    # Exactly what the steps need was issued: nothing is left over.
    assert summary["rollouts_issued"] == STEPS * 16 + 12
    assert summary["rollouts_trained"] > STEPS * 8
    assert counts.balanced
    live = ("queued", "running", "delivered")
    assert not any(counts.states.get(state) for state in live), counts


def check_whole(bench, summary, counts) -> None:
    """A job that ran to its end: each step once, each rollout used once, each version number once."""
    check_accounts(summary, counts)
    assert summary["state"] == "succeeded"
    # Replayed steps found their versions published already: no number was used twice or skipped.
    assert summary["steps"] == summary["policy_version"] == STEPS
    assert bench.steps() == list(range(1, STEPS + 1))
    assert (bench.run_dir / "reward.png").stat().st_size > 10_000
    assert counts.states["trained"] == summary["rollouts_trained"]
    records = [json.loads(line) for line in (bench.run_dir / "learner" / "batches.jsonl").read_text().splitlines()]
    last = {record["step"]: record for record in records}
    uses = [tuple(use) for step in sorted(last) for use in last[step]["uses"]]
    assert len(uses) == len(set(uses)) == STEPS * 16


async def test_a_learner_killed_twice_ends_with_the_same_bits(make_bench):
    calm, killed = make_bench("calm"), make_bench("killed")
    # Keys carry no job, so both jobs get the same rollouts.
    async with calm.running():
        check_whole(calm, await calm.finished(), await calm.broker_counts())
    async with killed.running():
        for step in (5, 17):
            await killed.until_step(step)
            killed.learner.kill()
            killed.learner.start()
        summary = await killed.finished()
    check_whole(killed, summary, await killed.broker_counts())
    assert killed.weights_bytes() == calm.weights_bytes()


async def test_a_learner_of_adapters_goes_on_after_a_kill_and_leaves_an_ordinary_model(make_bench):
    bench = make_bench("adapters", steps=8, checkpoint_every=3, lora={"rank": 2, "alpha": 4})
    async with bench.running():
        await bench.until_step(4)
        bench.learner.kill()
        bench.learner.start()
        summary = await bench.finished()
        client = WeightsClient(bench.weights.address, bench.job, bench.key.public_key)
        published, base = await client.fetch(9), await client.fetch(0)
        await client.close()
    # Version 0 is the model before the warm start, 1 what that gave; a step that was taken again is its version again.
    assert (summary["steps"], summary["policy_version"]) == (8, 9)
    assert {one.name for one, other in zip(base.tensors, published.tensors, strict=True) if one != other} == {
        f"model.layers.0.{block}_proj.weight"
        for block in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    }
    kinds = [path.read_bytes()[:4] for path in bench.run_dir.parent.rglob("blobs/*")]
    assert kinds.count(b"LSA\x01") >= 4, "every version that is kept came as an adapter"
    saved = load_file(bench.run_dir / "checkpoint" / "model.safetensors")
    assert {tensor.name: tensor.data for tensor in published.tensors} == {
        name: value.numpy().tobytes() for name, value in saved.items()
    }
    assert not [name for name in saved if "lora" in name or "base_layer" in name]
    newest = max((bench.run_dir / "learner" / "checkpoints").glob("checkpoint_*"))
    assert {".lora_" in name for name in load_file(newest / "model.safetensors")} == {True}
    assert load_file(bench.run_dir / "adapter" / "adapter_model.safetensors")


async def test_a_broker_killed_twice_loses_nothing(make_bench):
    bench = make_bench("broker")
    async with bench.running():
        for step in (4, 12):
            await bench.until_step(step)
            bench.broker.kill()
            await asyncio.sleep(0.5)
            bench.broker.start()
        summary = await bench.finished()
    counts = await bench.broker_counts()
    check_accounts(summary, counts)
    # Whatever the broker forgot, its counts are those of the learner again.
    assert counts.issued == summary["rollouts_issued"]
    assert {state: count for state, count in counts.states.items() if count} == {
        "trained": summary["rollouts_trained"],
        **summary["rollouts_accounted"],
    }


async def test_a_store_that_restarts_is_waited_for(make_bench):
    bench = make_bench("store")
    async with bench.running():
        await bench.until_step(4)
        bench.weights.kill()
        await asyncio.sleep(0.5)
        bench.weights.start()
        summary = await bench.finished()
    assert summary["policy_version"] == STEPS


async def test_cancel_accounts_for_what_is_out(make_bench):
    bench = make_bench("cancel", steps=100_000)
    async with bench.running():
        await bench.until_step(3)
        client = broker.connect(bench.broker.url)
        await JobChannel(client, bench.job).command("cancel")
        await client.aclose()
        summary = await bench.finished()
    assert summary["state"] == "cancelled"
    accounted = summary["rollouts_accounted"]
    assert accounted["cancelled"] > 0
    assert summary["rollouts_issued"] == summary["rollouts_trained"] + sum(accounted.values())
    assert (await bench.broker_counts()).balanced


async def test_cancel_is_obeyed_during_the_warm_start(make_bench):
    bench = make_bench("early")
    job_file = JobFile.model_validate_json((bench.folder / "job.json").read_text())
    longer = job_file.spec.warm_start.model_copy(update={"steps": 100_000})
    changed = job_file.model_copy(update={"spec": job_file.spec.model_copy(update={"warm_start": longer})})
    (bench.folder / "job.json").write_text(changed.model_dump_json())
    async with bench.running():
        client = broker.connect(bench.broker.url)
        channel = JobChannel(client, bench.job)
        after, events = "0", []
        while not any(event["type"] == "warm_start" for event in events):
            page = await channel.read(after, 100, 500)
            events += [event for _, event in page]
            after = page[-1][0] if page else after
        await channel.command("cancel")
        await client.aclose()
        summary = await bench.finished()
    assert summary["state"] == "cancelled"
    assert (summary["steps"], summary["rollouts_issued"]) == (0, 0)


async def test_a_job_whose_every_ticket_is_refused_is_given_up(make_bench):
    bench = make_bench("refused")
    bench.site.refusing = True
    async with bench.running():
        assert await asyncio.to_thread(bench.learner.wait, 60) == 2
    assert "ended without a single rollout" in bench.learner.tail()
    assert "verifier_failed" in bench.learner.tail()


async def test_sigterm_leaves_a_checkpoint_and_the_job_goes_on(make_bench):
    bench = make_bench("drain")
    async with bench.running():
        await bench.until_step(4)
        bench.learner.process.send_signal(signal.SIGTERM)
        assert bench.learner.wait(30) == 1
        before = max(bench.steps())
        newest = max((bench.run_dir / "learner" / "checkpoints").glob("checkpoint_*"))
        assert json.loads((newest / "manifest.json").read_text())["step"] >= before
        bench.learner.start()
        summary = await bench.finished()
    assert summary["steps"] == STEPS


def judged_later(ref):
    """Two of four rollouts go home unscored. One's verdict comes 30 tickets later, the other's 90 later, or never."""
    if ref.index < 2:
        return None
    if ref.index == 2:
        return 30
    return 90 if ref.group_id % 7 else 10**9


async def test_late_verdicts_are_trained_on_and_survive_a_kill(make_bench):
    steps = 22
    # No checkpoint is due by its number: all are made because of the bytes that wait for one.
    bench = make_bench("late", {"unacknowledged_mb": 0.02}, steps=steps, checkpoint_every=10_000)
    bench.site.judged_later = judged_later
    async with bench.running():
        await bench.until_step(13)
        bench.learner.kill()
        bench.learner.start()
        summary = await bench.finished()
        counts = await bench.broker_counts()
    # The replayed steps had the same late members, and came to the same bits: their versions were published already.
    assert summary["steps"] == summary["policy_version"] == steps
    assert bench.steps() == list(range(1, steps + 1))
    records = [json.loads(line) for line in (bench.run_dir / "learner" / "batches.jsonl").read_text().splitlines()]
    last = {record["step"]: record for record in records}
    uses = [tuple(use) for step in sorted(last) for use in last[step]["uses"]]
    assert len(uses) == len(set(uses))
    late = {key for record in last.values() for key in record["late"]}
    assert len(late) > steps
    accounted = summary["rollouts_accounted"]
    assert accounted["no_verdict"] > 0
    assert summary["rollouts_issued"] == summary["rollouts_trained"] + sum(accounted.values())
    assert counts.balanced
    assert counts.issued == summary["rollouts_issued"]
    assert counts.states["trained"] == summary["rollouts_trained"]
    newest = max((bench.run_dir / "learner" / "checkpoints").glob("checkpoint_*"))
    assert int(newest.name.rpartition("_")[2]) > 3


async def test_what_is_replayed_and_evaluated_meanwhile_survives_a_kill(make_bench):
    steps = 18
    replay = {"share": 0.5, "max_uses": 3, "ess_floor": 0.01}
    bench = make_bench("again", steps=steps, checkpoint_every=5, replay=replay)
    job_file = JobFile.model_validate_json((bench.folder / "job.json").read_text())
    changed = job_file.spec.model_copy(update={"evaluation": EvaluationSpec(tasks=6, every=4)})
    (bench.folder / "job.json").write_text(job_file.model_copy(update={"spec": changed}).model_dump_json())
    async with bench.running():
        await bench.until_step(9)
        bench.learner.kill()
        bench.learner.start()
        summary = await bench.finished()
        counts = await bench.broker_counts()
        client = WeightsClient(bench.weights.address, bench.job, bench.key.public_key)
        pinned = {state.name: state.version for state in await client.pointers()}["pin/evaluated"]
        await client.close()
    # The replayed steps drew the same groups and came to the same bits: their versions were published already.
    assert summary["steps"] == summary["policy_version"] == steps
    lines = [json.loads(line) for line in (bench.run_dir / "metrics.jsonl").read_text().splitlines()]
    check_replayed(bench, steps, lines[-1])
    check_evaluated(summary["evaluations"], steps, lines)
    # However many versions came after it, the store keeps one that is being evaluated.
    assert pinned == summary["evaluations"][-2]["version"]
    # A ticket is closed by its first use, and each evaluation has each of its tickets once.
    evaluated = 6 * len(summary["evaluations"])
    assert summary["rollouts_accounted"]["evaluation"] == evaluated
    assert summary["rollouts_issued"] == steps * 16 + evaluated == counts.issued
    assert counts.states["trained"] == summary["rollouts_trained"] > steps * 8


def check_replayed(bench, steps, line) -> None:
    """The batch records name no use twice, and the buffer is what the last step says of it."""
    records = [json.loads(line) for line in (bench.run_dir / "learner" / "batches.jsonl").read_text().splitlines()]
    assert len(records) > steps
    last = {record["step"]: record for record in records}
    uses = [tuple(use) for step in sorted(last) for use in last[step]["uses"]]
    assert len(uses) == len(set(uses))
    again = [(key, use) for key, use in uses if use > 1]
    assert {use for _, use in again} == {2, 3}
    assert len(again) > steps * 8
    assert {key for key, _ in again} <= {key for key, use in uses if use == 1}
    assert line["replay/rollouts"] == 4 * line["replay/groups"] > 0
    assert 0 < line["replay/ess"] <= 1
    kept = list((bench.run_dir / "learner" / "replay").iterdir())
    assert len(kept) == line["replay/kept_groups"]
    assert sum(path.stat().st_size for path in kept) == line["replay/kept_bytes"]


def check_evaluated(rows, steps, lines) -> None:
    """Each evaluation is of the version that its step made, and none was taken twice or waited for."""
    assert [(row["when"], row["step"]) for row in (rows[0], rows[-1])] == [("before", 0), ("after", steps)]
    between = [row["step"] for row in rows if row["when"] == "step"]
    assert len(between) >= 3
    assert len(set(between)) == len(between)
    assert all(row["version"] == row["step"] for row in rows)
    assert all((row["tasks"], row["scored"], row["interval"]) == (6, 6, "wilson") for row in rows)
    assert all(0 <= row["low"] <= row["reward"] <= row["high"] <= 1 for row in rows)
    told = [(line["step"], line["eval/step"]) for line in lines if "eval/step" in line]
    assert len(told) >= len(between) - 1
    # One that had ended before the kill is told with its own step, when that is taken again.
    assert all(step >= evaluated for step, evaluated in told)
    assert any(step > evaluated > 0 for step, evaluated in told)


async def test_rollouts_of_versions_after_the_checkpoint_are_as_good_as_ever(make_bench):
    steps = 18
    bench = make_bench("ahead", steps=steps, checkpoint_every=10)

    def newest() -> int:
        # A step's line is there once its version is on its way, and the one before in the store.
        path = bench.run_dir / "metrics.jsonl"
        return max(0, len(path.read_text().splitlines()) - 1) if path.exists() else 0

    bench.site.version = newest
    async with bench.running():
        # Behind the checkpoint of step 10, before that of step 20.
        await bench.until_step(14)
        bench.learner.kill()
        # What is out is answered by a version that the next incarnation did not make itself.
        await asyncio.sleep(0.5)
        bench.learner.start()
        summary = await bench.finished()
    assert "rejected" not in summary["rollouts_accounted"]
    assert summary["policy_version"] == steps
    assert summary["staleness_max"] <= 4
