"""Going on with a rollout whose actor died: the environment is brought back to where the journal ends.

Knows episodes and environments, and nothing of the broker. An environment that cannot be brought back, or that now
answers otherwise than it did, is no error: the rollout is started anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from longshore.actor.episode import AttemptFailed, Behind, Surroundings, finish_of
from longshore.actor.journal_codec import Journaled
from longshore.errors import LongshoreError
from longshore.tasks.environment import Observation, Restoring
from longshore.tasks.rendering import Renderer
from longshore.types import Task


class CannotResume(LongshoreError):
    """The rollout has to start anew; the text says why."""


@dataclass(frozen=True)
class Resumed:
    """Surroundings in the state after the turns of `journaled`."""

    journaled: Journaled
    surroundings: Surroundings


async def resume(
    journaled: Journaled, task: Task, max_turns: int, renderer: Renderer, make: Callable[[], Surroundings]
) -> Resumed:
    """Brings an environment to the end of a journal, or to its newest snapshot.

    A finished episode, which only has to be scored, needs no environment.

    Raises:
        CannotResume
    """
    surroundings, behind = make(), journaled.behind
    if len(behind.turns) > max_turns:
        raise CannotResume(f"{len(behind.turns)} turns were played, {max_turns} are allowed")
    if finish_of(behind.turns[-1], len(behind.turns), max_turns) is not None:
        return Resumed(journaled, surroundings)
    try:
        if surroundings.restoring is Restoring.SNAPSHOT:
            return Resumed(await _restored(journaled, task, surroundings), surroundings)
        if surroundings.restoring is Restoring.REPLAY:
            await _replay(behind, task, renderer, surroundings)
            return Resumed(journaled, surroundings)
    except AttemptFailed as error:
        raise CannotResume(str(error)) from None
    raise CannotResume("the environment has neither snapshots nor is it deterministic")


async def _restored(journaled: Journaled, task: Task, surroundings: Surroundings) -> Journaled:
    found = journaled.up_to_snapshot()
    if found is None:
        raise CannotResume("no snapshot was kept")
    await surroundings.restore(task, found.entries[-1].snapshot or b"")
    return found


async def _replay(behind: Behind, task: Task, renderer: Renderer, surroundings: Surroundings) -> None:
    """Repeats every step with the replies that were kept."""
    if await surroundings.start(task) != behind.opening:
        raise CannotResume("the environment now opens otherwise than it did")
    for number, turn in enumerate(behind.turns):
        answer = await surroundings.step(renderer.text(turn.reply.token_ids))
        if _comparable(answer) != _comparable(turn.observation):
            raise CannotResume(f"the environment now answers turn {number} otherwise than it did")


def _comparable(answer: Observation) -> object:
    """An answer as it looks after its way through a journal."""
    try:
        return answer.messages, answer.done, json.loads(json.dumps(answer.info))
    except (TypeError, ValueError, RecursionError):
        raise CannotResume("the environment's info is not JSON") from None
