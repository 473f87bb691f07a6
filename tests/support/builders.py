"""Hand-made rollouts for the learner's tests."""

from __future__ import annotations

from longshore.types import (
    EngineFingerprint,
    FinishReason,
    GivenSpan,
    JobRef,
    Message,
    Purpose,
    Rollout,
    SampledSpan,
    Sampling,
    Segment,
    Task,
    TicketRef,
    Turn,
    Verdict,
)

JOB = JobRef("default", "job-1")
TASK = Task("t-1", (Message("user", "Spell sun backward"),), answer="nus")


def rollout(
    group_id: int,
    index: int,
    reward: float = 1.0,
    *,
    prompt: tuple[int, ...] = (5, 6),
    reply: tuple[int, ...] = (7, 1),
    logprobs: tuple[float, ...] = (-0.5, -0.25),
    version: int = 0,
    purpose: Purpose = Purpose.TRAIN,
    task: Task = TASK,
) -> Rollout:
    return Rollout(
        ref=TicketRef(JOB, group_id, index),
        attempt=1,
        purpose=purpose,
        task_id=task.task_id,
        segments=(Segment("0", (*prompt, *reply), (GivenSpan(len(prompt)), SampledSpan(version, logprobs))),),
        turns=(Turn("0", len(prompt), len(reply), FinishReason.STOP),),
        sampling=(Sampling(1.0, 8),),
        engines=(EngineFingerprint("test", "1", "float32", ""),),
        finish=FinishReason.STOP,
        started_at=1.0,
        finished_at=2.0,
        site="home",
        actor="actor-0",
        verdicts=(Verdict(reward, "test@1"),),
    )
