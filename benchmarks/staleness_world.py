"""One job in one process: a tiny policy, a task without a verifier's cost, and the learner's own credit and train step.

Rollouts are drawn from the weights of a version that is a given number of versions old, never a younger one, and carry
the log-probs and the version of those weights, as an engine's would: what the learner then does is what it does in
production. Nothing else is delayed, reordered or lost.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from longshore.config import TrainSpec
from longshore.learner.credit.batch import credit_batch
from longshore.learner.trainer import Trainer
from longshore.types import (
    EngineFingerprint,
    FinishReason,
    GivenSpan,
    JobRef,
    Purpose,
    Rollout,
    SampledSpan,
    Sampling,
    Segment,
    TicketRef,
    Turn,
    Verdict,
)

_JOB = JobRef("default", "staleness")
_ENGINE = EngineFingerprint("benchmark", "1", "float32", "")


@dataclass(frozen=True)
class Game:
    """A task whose answer is a function of its prompt: symbols in, as many symbols out."""

    name: str
    symbols: int
    length: int
    # "reverse": from its end to its beginning; "sort": in order of size; "sums": each the sum of those up to it, modulo
    # the number of symbols.
    answer: Literal["reverse", "sort", "sums"]
    # Whether an answer counts by its share of right symbols, or only when it is right as a whole.
    is_partial: bool
    # Mean reward that counts as learned.
    target: float
    # At which on-policy runs take more than a thousand train steps.
    learning_rate: float

    def answers(self, prompts: Tensor) -> Tensor:
        """[B, length] of [B, length]."""
        if self.answer == "sort":
            return prompts.sort(dim=1).values
        return prompts.flip(1) if self.answer == "reverse" else prompts.cumsum(1) % self.symbols

    def rewards(self, prompts: Tensor, replies: Tensor) -> Tensor:
        """[B] of [B, length] each."""
        right = (self.answers(prompts) == replies).float().mean(1)
        return right if self.is_partial else (right == 1).float()


GAMES = (
    # Learned in a hundred steps: for a quick look.
    Game("pair", symbols=4, length=2, answer="reverse", is_partial=True, target=0.85, learning_rate=3e-3),
    Game("sort", symbols=4, length=3, answer="sort", is_partial=False, target=0.9, learning_rate=4e-4),
    # On-policy runs of the default stay at 0.7 here: they have settled on a part of the prompts.
    Game("sums", symbols=4, length=3, answer="sums", is_partial=False, target=0.6, learning_rate=1e-3),
)


@dataclass(frozen=True)
class Setting:
    """What one run is made of."""

    game: Game
    train: TrainSpec
    staleness: int
    seed: int
    # Train steps between two looks at the current policy, and rollouts of one look.
    look_every: int = 8
    look_size: int = 256


@dataclass
class Course:
    """What came of it. Lists have one entry a look."""

    steps: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    # Means over the train steps since the look before.
    kl: list[float] = field(default_factory=list)
    ess: list[float] = field(default_factory=list)
    masked: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def steps_to(self, target: float, window: int = 4) -> int | None:
        """Train steps until the mean of `window` looks reached the target; None: it did not."""
        for end in range(window, len(self.rewards) + 1):
            if math.fsum(self.rewards[end - window : end]) / window >= target:
                return self.steps[end - 1]
        return None

    def final(self, window: int = 8) -> float:
        """Mean reward of the last looks."""
        last = self.rewards[-window:]
        return math.fsum(last) / len(last)


class World:
    """A policy that learns from rollouts of its own past."""

    def __init__(self, setting: Setting) -> None:
        torch.manual_seed(setting.seed)
        self._setting = setting
        policy, self._actor = _policy(setting.game), _policy(setting.game)
        self._trainer = Trainer(policy, setting.train, setting.game.length)
        self._random = torch.Generator().manual_seed(setting.seed)
        # Weights of the versions from the one that rollouts are drawn from to the newest.
        self._versions: deque[tuple[int, list[Tensor]]] = deque(maxlen=setting.staleness + 1)

    def run(self) -> Course:
        """All train steps."""
        setting, course, started = self._setting, Course(), time.monotonic()
        told: list[dict[str, float]] = []
        for number in range(1, setting.train.steps + 1):
            self._versions.append((number - 1, self._weights()))
            told.append(self._step(number))
            if number % setting.look_every == 0:
                course.steps.append(number)
                course.rewards.append(self._look())
                for name, values in (
                    ("mismatch_kl/mean", course.kl),
                    ("is_ratio/ess", course.ess),
                    ("policy/masked_frac", course.masked),
                    ("policy/entropy", course.entropy),
                ):
                    values.append(math.fsum(line[name] for line in told if name in line) / len(told))
                told.clear()
        course.seconds = time.monotonic() - started
        return course

    def _step(self, number: int) -> dict[str, float]:
        train = self._setting.train
        version, weights = self._versions[0]
        prompts = self._prompts(train.groups_per_step).repeat_interleave(train.group_size, 0)
        replies, logps = self._draw(weights, prompts)
        ask = torch.full((len(prompts), 1), self._setting.game.symbols)
        rewards = self._setting.game.rewards(prompts, replies).tolist()
        columns = zip(torch.cat([prompts, ask], 1).tolist(), replies.tolist(), logps.tolist(), rewards, strict=True)
        rollouts = [_rollout(number, index, version, *column) for index, column in enumerate(columns)]
        size = train.group_size
        groups = [rollouts[start : start + size] for start in range(0, len(rollouts), size)]
        return self._trainer.step(number, credit_batch(groups, [], train).sequences, number - 1)

    def _look(self) -> float:
        prompts = self._prompts(self._setting.look_size)
        replies, _ = self._draw(self._weights(), prompts)
        return float(self._setting.game.rewards(prompts, replies).mean())

    def _prompts(self, count: int) -> Tensor:
        game = self._setting.game
        return torch.randint(game.symbols, (count, game.length), generator=self._random)

    def _weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._trainer.policy.parameters()]

    def _draw(self, weights: Sequence[Tensor], prompts: Tensor) -> tuple[Tensor, Tensor]:
        """[B, length] replies and their log-probs under these weights."""
        context = torch.cat([prompts, torch.full((len(prompts), 1), self._setting.game.symbols)], 1)
        logps: list[Tensor] = []
        with torch.no_grad():
            torch._foreach_copy_(list(self._actor.parameters()), list(weights))
            for _ in range(self._setting.game.length):
                log_probs = self._actor(input_ids=context, use_cache=False).logits[:, -1].float().log_softmax(-1)
                drawn = log_probs.exp().multinomial(1, generator=self._random)
                logps.append(log_probs.gather(1, drawn))
                context = torch.cat([context, drawn], 1)
        return context[:, prompts.shape[1] + 1 :], torch.cat(logps, 1)


def _policy(game: Game) -> LlamaForCausalLM:
    """A Llama of two narrow layers; its last symbol asks for the answer."""
    config = LlamaConfig(
        vocab_size=game.symbols + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2 * game.length + 1,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        dtype="float32",
    )
    return LlamaForCausalLM(config).float()


def _rollout(
    number: int, index: int, version: int, prompt: list[int], reply: list[int], logps: list[float], reward: float
) -> Rollout:
    return Rollout(
        ref=TicketRef(_JOB, number, index),
        attempt=1,
        purpose=Purpose.TRAIN,
        task_id="",
        segments=(Segment("0", (*prompt, *reply), (GivenSpan(len(prompt)), SampledSpan(version, tuple(logps)))),),
        turns=(Turn("0", len(prompt), len(reply), FinishReason.LENGTH),),
        sampling=(Sampling(1.0, len(reply)),),
        engines=(_ENGINE,),
        finish=FinishReason.LENGTH,
        started_at=0.0,
        finished_at=0.0,
        site="home",
        actor="benchmark",
        verdicts=(Verdict(reward, "game@1"),),
    )
