"""One learner incarnation: puts the parts together, prepares the policy, runs the loop, leaves the results."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import structlog
import torch
from transformers import PreTrainedModel

from longshore.config import JobSpec, WarmStartSpec
from longshore.learner.broker_link import BrokerLink, Cancelled
from longshore.learner.checkpoint import Snapshot, load_newest, restore_snapshot, take_snapshot, write_checkpoint
from longshore.learner.config import LearnerSettings
from longshore.learner.curriculum import Curriculum
from longshore.learner.difficulty import TaskBook
from longshore.learner.disk import when_there_is_room
from longshore.learner.durability import covered_by
from longshore.learner.durable_lines import newest_epoch
from longshore.learner.intake import Intake, Limits
from longshore.learner.ledger import Ledger
from longshore.learner.loop import LearnerLoop
from longshore.learner.model import build_policy, save_checkpoint
from longshore.learner.parts import Parts
from longshore.learner.progress import Progress
from longshore.learner.prompts import Prompts
from longshore.learner.publisher import Lineage, Publisher, VersionLog
from longshore.learner.ranks.ranks import ALONE, Ranks, join
from longshore.learner.replay.buffer import ReplayBuffer
from longshore.learner.reporter import Reporter
from longshore.learner.trainer import Trainer
from longshore.learner.warm_start import demonstrations, warm_start
from longshore.rollout_queue import broker
from longshore.rollout_queue.blobs import Blobs
from longshore.rpc.server import RpcServer
from longshore.settings import JobFile
from longshore.tasks.examples import open_source
from longshore.tasks.rendering import Renderer
from longshore.tasks.source import FirstTasks, TaskSource, TrainCursor, heldout_tasks
from longshore.weights.client import WeightsClient

log = structlog.get_logger()

# Training tasks that a new model's tokenizer is made from.
TOKENIZER_TASKS = 2000
# A warm start reports its loss this often, in seconds.
WARM_START_REPORT_S = 0.5


async def serve(settings: LearnerSettings, stop: asyncio.Event) -> None:
    """Runs the job of `settings.job_file` to its end, or until `stop` is set."""
    job = settings.load_job()
    torch.set_num_threads(job.spec.resources.threads)
    server = RpcServer(settings.listen)
    await server.start()
    client = broker.connect(settings.broker_url)
    weights = WeightsClient(settings.weights, job.ref, bytes.fromhex(job.learner_public_key))
    ranks = ALONE
    try:
        blobs = Blobs.open(settings.blobs_url) if settings.blobs_url else None
        resources = job.spec.resources
        link = BrokerLink(client, job.ref, settings.site, resources.max_attempts, resources.site_lease_s, blobs=blobs)
        if job.spec.train.processes > 1:
            ranks = await asyncio.to_thread(join, job.spec.train.processes, job.spec.train.compute.device)
        await _run(settings, job, link, weights, ranks, stop)
    finally:
        await asyncio.to_thread(ranks.end)
        await weights.close()
        await client.aclose()
        await server.drain(settings.drain_s)


async def _run(
    settings: LearnerSettings,
    job: JobFile,
    link: BrokerLink,
    weights: WeightsClient,
    ranks: Ranks,
    stop: asyncio.Event,
) -> None:
    spec, checkpoints = job.spec, settings.run_dir / "learner" / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    snapshot = await asyncio.to_thread(load_newest, checkpoints, tensors=ranks.size == 1)
    # A broker that lost more than its tail may have forgotten even the epochs since the checkpoint.
    records = (settings.run_dir / "learner" / name for name in ("issued.jsonl", "batches.jsonl"))
    recorded = await asyncio.to_thread(newest_epoch, *records)
    await link.open(at_least=max(_epoch(snapshot), recorded) + 1)
    reporter = Reporter(job.ref, spec, settings.run_dir, link.publish)
    await reporter.phase("loading")

    source = await asyncio.to_thread(_task_source, job)
    tasks = TrainCursor(source, spec.tasks.heldout_fraction, seed=spec.seed)
    seen = islice(iter(tasks.next, None), TOKENIZER_TASKS)
    policy, assets = await asyncio.to_thread(build_policy, spec, seen, settings.models_dir)
    # Seconds each with a real model: who looks whether this process lives must be answered meanwhile.
    renderer = await asyncio.to_thread(Renderer, assets)
    trainer = await asyncio.to_thread(_build_trainer, policy, spec, ranks)
    if snapshot is None:
        try:
            snapshot = await _first_light(job, trainer, renderer, source, reporter, checkpoints, link, stop)
        except Cancelled:
            await reporter.finish("cancelled", Progress(started_at=time.time()), Ledger())
            return
    await asyncio.to_thread(restore_snapshot, trainer, snapshot)
    await link.acknowledge(covered_by(snapshot))
    progress, ledger, tasks_known = _progress(snapshot), _ledger(snapshot), _tasks_known(snapshot)

    canary = _canary(source, spec.tasks.heldout_fraction, renderer)
    versions = VersionLog(settings.run_dir / "learner" / "versions.jsonl")
    publisher = Publisher(weights, settings.signing_key_file, assets, spec.weights.dtype, canary, versions, ranks)
    await publisher.start()
    progress.version = await publisher.publish(policy, progress.version, Lineage(progress.step, link.epoch, None))
    prompts = Prompts(renderer.prompt_ids)
    intake = Intake(link, ledger, job.ref, _limits(spec, policy, renderer), prompts)
    # Of an earlier incarnation there may be versions after our checkpoint's, and rollouts that they made.
    intake.newest_version = publisher.newest
    heldout = await asyncio.to_thread(heldout_tasks, source, spec.tasks.heldout_fraction, spec.evaluation.tasks)
    cursor, curriculum = _train_tasks(spec, source, progress, tasks_known)
    parts = Parts(
        job=job.ref,
        spec=spec,
        run_dir=settings.run_dir,
        link=link,
        publisher=publisher,
        trainer=trainer,
        ledger=ledger,
        intake=intake,
        progress=progress,
        cursor=cursor,
        heldout=heldout,
        reporter=reporter,
        stop=stop,
        max_unacknowledged=int(settings.unacknowledged_mb * 1024 * 1024),
        prompts=prompts,
        tasks_known=tasks_known,
        curriculum=curriculum,
        replay=await asyncio.to_thread(_replay, settings, spec, snapshot, link.epoch, tasks_known),
    )
    state = await LearnerLoop(parts).run()
    await reporter.phase("saving")
    await asyncio.to_thread(_save, trainer, assets, settings.run_dir)
    summary = await reporter.finish(state, progress, ledger)
    log.info("finished", **summary)


async def _first_light(
    job: JobFile,
    trainer: Trainer,
    renderer: Renderer,
    source: TaskSource,
    reporter: Reporter,
    checkpoints: Path,
    link: BrokerLink,
    stop: asyncio.Event,
) -> Snapshot:
    """Warm-starts the policy where the job says so, and makes the result durable as the checkpoint of step 0."""
    started_at = time.time()
    if job.spec.warm_start is not None:
        await reporter.phase("warm_start")
        tasks = iter(TrainCursor(source, job.spec.tasks.heldout_fraction, seed=job.spec.seed).next, None)
        examples = demonstrations(tasks, renderer, job.spec.warm_start, job.spec.seed)
        await _warm_start(trainer, examples, job.spec.warm_start, reporter, link, stop)
    progress = Progress(started_at=started_at)
    state = {"ledger": Ledger().state(), "progress": progress.state(), "epoch": link.epoch}
    snapshot = await asyncio.to_thread(take_snapshot, trainer, 0, state)
    folder = await when_there_is_room(lambda: write_checkpoint(checkpoints, snapshot), "the first checkpoint")
    return replace(snapshot, folder=folder)


async def _warm_start(
    trainer: Trainer,
    examples: Iterator[list[int]],
    spec: WarmStartSpec,
    reporter: Reporter,
    link: BrokerLink,
    stop: asyncio.Event,
) -> None:
    """Runs the warm start in a thread and tells how it goes. Raises Cancelled or Interrupted when told to end."""
    at, go_on = (0, 0.0), True

    def report(step: int, loss: float) -> bool:
        nonlocal at
        at = (step, loss)
        return go_on

    def run() -> None:
        with trainer.ranks.command("warm_start", spec.model_dump(mode="json")):
            warm_start(trainer.policy, examples, spec, report, trainer.ranks)

    training = asyncio.create_task(asyncio.to_thread(run))
    try:
        while not training.done():
            await asyncio.wait([training], timeout=WARM_START_REPORT_S)
            if at[0]:
                await reporter.warm_start(*at)
            await link.check_orders(stop)
    finally:
        # The thread must not go on behind our back: it ends at its next step.
        go_on = False
        await asyncio.wait([training])
    await training


def _build_trainer(policy: PreTrainedModel, spec: JobSpec, ranks: Ranks) -> Trainer:
    with ranks.command("build", {"config": policy.config.to_dict(), "seed": spec.seed}):
        return Trainer(policy, spec.train, spec.max_sampled, spec.seed, ranks)


def _save(trainer: Trainer, assets: dict[str, bytes], folder: Path) -> None:
    with trainer.ranks.command("save", {"folder": str(folder)}):
        save_checkpoint(trainer.policy, assets, folder / "checkpoint", trainer.ranks)
        if trainer.adapters is not None:
            trainer.adapters.save(folder / "adapter", trainer.ranks)


def _task_source(job: JobFile) -> TaskSource:
    return open_source(job.spec.tasks, job.spec.seed, job.spec.environment.name)


def _limits(spec: JobSpec, policy: PreTrainedModel, renderer: Renderer) -> Limits:
    return Limits(
        vocab_size=renderer.vocab_size,
        max_context=policy.config.max_position_embeddings,
        max_sampled=spec.max_sampled,
        temperature=spec.sampling.temperature,
    )


def _canary(source: TaskSource, heldout_fraction: float, renderer: Renderer) -> list[int]:
    """A fixed prompt with its answer: what a generator must score as the learner did."""
    task = TrainCursor(source, heldout_fraction).next()
    return [*renderer.prompt_ids(list(task.messages)), *renderer.reply_ids(task.answer or "canary")]


def _epoch(snapshot: Snapshot | None) -> int:
    epoch = snapshot.state["epoch"] if snapshot else 0
    assert isinstance(epoch, int)
    return epoch


def _progress(snapshot: Snapshot) -> Progress:
    state = snapshot.state["progress"]
    assert isinstance(state, dict)
    return Progress.restore(state)


def _ledger(snapshot: Snapshot) -> Ledger:
    state = snapshot.state["ledger"]
    assert isinstance(state, dict)
    return Ledger.restore(state)


def _tasks_known(snapshot: Snapshot) -> TaskBook:
    book = TaskBook()
    book.restore(snapshot.state.get("tasks", []))
    return book


def _train_tasks(
    spec: JobSpec, source: TaskSource, progress: Progress, known: TaskBook
) -> tuple[TrainCursor, Curriculum | None]:
    """Walks the training tasks from where the checkpoint stood; and who chooses among them, where the job says so."""
    told = spec.tasks.curriculum
    walked = source if told is None or told.pool is None else FirstTasks(source, told.pool)
    cursor = TrainCursor(walked, spec.tasks.heldout_fraction, progress.cursor, seed=spec.seed)
    return cursor, None if told is None else Curriculum(cursor, known, told, spec.seed)


def _replay(
    settings: LearnerSettings, spec: JobSpec, snapshot: Snapshot, epoch: int, tasks_known: TaskBook
) -> ReplayBuffer | None:
    """The replay buffer as the checkpoint has it, where the job has one."""
    if spec.train.replay is None:
        return None

    def success(task_id: str, otherwise: float) -> float:
        known = tasks_known.success(task_id)
        return otherwise if known is None else known

    buffer = ReplayBuffer(settings.run_dir / "learner" / "replay", spec.train.replay, spec.seed, epoch, success)
    buffer.restore(snapshot.state.get("replay"))
    return buffer
