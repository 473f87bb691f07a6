"""The JobSpec: what `POST /v1/jobs` takes and every process of a job reads.

Importable without torch, because the gateway validates learner settings. Checks that need more than the document
itself (does the file exist, is the verifier installed) are in `tasks/check.py`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from longshore.config_base import Spec
from longshore.config_credit import AnyCredit, BatchWhitened, Credit, Gae, OverlongSpec
from longshore.config_curriculum import CurriculumSpec
from longshore.config_model import AnyModel, NewModel
from longshore.config_objective import DppoObjective, EssStepSpec, KlSpec, Objective, with_default_objective
from longshore.config_replay import ReplaySpec
from longshore.documents import MAX_BYTES, parse_yaml
from longshore.errors import Fault, InvalidJobSpec
from longshore.job_faults import Misfit, parse, refuse

NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$"
Name = Annotated[str, Field(pattern=NAME_PATTERN, description="1-40 characters of a-z, 0-9 and -")]
Json = dict[str, object]
# The site that has the learner; every other one is named in a job's `sites`.
HOME_SITE = "home"
_MODEL_PARTS = ("model.kind", "model.path", "model.max_context")


class TasksSpec(Spec):
    """Where problems come from. `source` names an entry point of `longshore.task_sources`."""

    source: str = Field(min_length=1)
    # Only for file-backed sources.
    path: Path | None = None
    # Only for reasoning-gym: the data set's name.
    dataset: str | None = None
    options: Json = Field(default_factory=dict)
    curriculum: CurriculumSpec | None = Field(None, description="absent: every task as often as every other")
    examples: int = Field(
        0, ge=0, le=64, description="solved training tasks that are shown as earlier turns before every problem"
    )
    heldout_fraction: float = Field(
        0.1, ge=0.0, le=0.5, description="share of task texts kept from all training, chosen by a hash of the text"
    )


class EnvironmentSpec(Spec):
    """What answers the model's turns. `name` names an entry point of `longshore.environments`."""

    name: str = "single-turn"
    options: Json = Field(default_factory=dict)
    max_turns: int = Field(1, ge=1, le=1000)


class VerifierSpec(Spec):
    """Who scores. `name` names an entry point of `longshore.verifiers`."""

    name: str = Field(min_length=1)
    options: Json = Field(default_factory=dict)
    timeout_s: float = Field(10.0, gt=0, le=86400, description="seconds that one score may take")


class SamplingSpec(Spec):
    """How rollouts are drawn. The whole distribution is sampled: truncation would falsify the log-probs."""

    temperature: float = Field(1.0, gt=0, le=10, allow_inf_nan=False)
    max_new_tokens: int = Field(16, ge=1, le=131072)


class WarmStartSpec(Spec):
    """Supervised training before version 0: right demonstrations first, then some that are wrong on purpose, so that
    the policy knows the task without being reliable at it."""

    steps: int = Field(330, ge=1, le=1_000_000)
    batch_size: int = Field(32, ge=1, le=65536, description="demonstrations a step")
    learning_rate: float = Field(2e-3, gt=0, le=1)
    clean_fraction: float = Field(0.85, ge=0, le=1, description="share of the steps that sees right answers only")
    wrong_fraction: float = Field(0.65, ge=0, le=1, description="share of wrong answers in the steps after that")


class ComputeSpec(Spec):
    """What the learner computes with; see docs/learner.md."""

    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the forward and backward pass; master weights, optimizer and log-probs are float32"
    )
    pack_tokens: int = Field(
        4096, ge=16, le=2**24, description="tokens computed at a time: bounds memory, not what is learned"
    )


class LoraSpec(Spec):
    """Adapters in place of all weights; see docs/learner.md. Needs longshore[lora] where the learner runs."""

    rank: int = Field(16, ge=1, le=4096)
    alpha: float = Field(32.0, gt=0, le=1e6, description="what the adapters add is scaled by alpha / rank")
    target_modules: tuple[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")], ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        max_length=64,
        description="projections of every layer that get one, by the last part of their names",
    )


class TrainSpec(Spec):
    """The learner's loop. A batch is `groups_per_step * group_size` rollouts."""

    steps: int = Field(ge=1, le=10_000_000)
    groups_per_step: int = Field(16, ge=1, le=65536)
    group_size: int = Field(8, ge=2, le=4096, description="rollouts a task; at least 2, so that there is a baseline")
    learning_rate: float = Field(3e-4, gt=0, le=1)
    final_learning_rate: float | None = Field(None, gt=0, le=1, description="linear decay to this; absent: constant")
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    objective: Objective = Field(
        DppoObjective(), description="absent: dppo, or topr where target_staleness is 16 or more (docs/staleness.md)"
    )
    advantage: Credit | None = Field(None, description="absent: what goes with the objective")
    overlong: OverlongSpec | None = None
    kl: KlSpec | None = Field(None, description="absent: no pull towards the policy that training began with")
    ess_step: EssStepSpec | None = None
    optimal_baseline: Literal["group", "batch"] | None = Field(
        None, description="shift advantages by the baseline of least variance over each group, or over the batch"
    )
    target_staleness: int = Field(
        1,
        ge=0,
        le=100_000,
        description="issued - consumed <= (this + 1) * batch; 0 is on-policy",
    )
    checkpoint_every: int = Field(25, ge=1, description="train steps between durable checkpoints")
    zero_variance: Literal["skip", "resample"] = Field(
        "skip",
        description="groups of equal rewards: leave them out, or have other tasks attempted in their place",
    )
    replay: ReplaySpec | None = Field(None, description="absent: each rollout is trained on once")
    compute: ComputeSpec = ComputeSpec()
    processes: int = Field(
        1,
        ge=1,
        le=64,
        description="that share out the learner's weights, gradients and optimizer, each with a device of its own",
    )
    lora: LoraSpec | None = Field(None, description="absent: all weights are trained")

    _objective = model_validator(mode="before")(with_default_objective)

    @model_validator(mode="after")
    def _credit_fits(self) -> TrainSpec:
        if self.zero_variance == "resample" and isinstance(self.credit, (BatchWhitened, Gae)):
            message = f"has no place beside advantage {self.credit.name}: equal rewards are a signal to it; take skip"
            refuse([Misfit("zero_variance", self.zero_variance, message, ("advantage", "objective"))])
        if isinstance(self.credit, Gae) and self.optimal_baseline:
            message = "has no place beside advantage gae, which has a baseline of its own: leave it out"
            refuse([Misfit("optimal_baseline", self.optimal_baseline, message, ("advantage",))])
        return self

    @property
    def batch_size(self) -> int:
        """Rollouts a train step."""
        return self.groups_per_step * self.group_size

    @property
    def credit(self) -> AnyCredit:
        """How rewards become advantages."""
        return self.advantage or self.objective.credit


class EvaluationSpec(Spec):
    """Held-out tasks, sampled once each at the training temperature, before the first train step and after the last;
    and now and then in between, while training goes on."""

    tasks: int = Field(0, ge=0, le=1_000_000)
    every: int = Field(0, ge=0, le=10_000_000, description="train steps between evaluations; 0: none in between")


class GeneratorSpec(Spec):
    """What draws the tokens; see docs/generation.md."""

    engine: Literal["torch", "vllm"] = Field("torch", description="vllm needs an environment of its own: make vllm")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="what the engine computes in")
    update: Literal["keep", "drain"] = Field(
        "keep", description="running requests go on under a new version, or end before it is loaded"
    )
    kv_after_update: Literal["keep", "recompute"] = Field(
        "keep", description="the cache of requests that go on: as the old weights left it, or computed anew"
    )
    tensor_parallel: int = Field(1, ge=1, le=64, description="devices that share one model")

    @model_validator(mode="after")
    def _engine_can(self) -> GeneratorSpec:
        if self.engine == "vllm":
            return self
        refuse(
            [
                Misfit(name, value, f"must be {only} with engine torch", ("engine",))
                for name, value, only in (
                    ("dtype", self.dtype, "float32"),
                    ("tensor_parallel", self.tensor_parallel, 1),
                )
                if value != only
            ]
        )
        return self


class WeightsSpec(Spec):
    """How policy versions are published."""

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    keep: int = Field(8, ge=2, description="newest versions kept in the store")


class ResourcesSpec(Spec):
    """How many processes, and how wide each is."""

    actors: int = Field(2, ge=0, le=1024, description="0: the sites below do all the work")
    generators: int = Field(1, ge=1, le=1024, description="actors spread their requests over them")
    verifiers: int = Field(1, ge=1, le=1, description="each has `verifier_workers` scoring processes")
    rollouts_per_actor: int = Field(64, ge=1, le=4096)
    generator_slots: int = Field(128, ge=1, le=4096, description="requests decoded together")
    verifier_workers: int = Field(1, ge=1, le=64)
    threads: int = Field(1, ge=1, le=1024, description="torch threads of the learner and of each generator")
    actor_lease_s: float = Field(15.0, ge=1, le=3600)
    site_lease_s: float = Field(
        4 * 3600.0,
        ge=1,
        le=30 * 24 * 3600,
        description="seconds of silence after which others get its tickets",
    )
    max_attempts: int = Field(5, ge=1, le=100, description="attempts at a ticket before it is a dead letter")


class SiteSpec(Spec):
    """A rollout site: a broker, a relay, a verifier, generators and actors of its own."""

    name: Name
    actors: int = Field(1, ge=1, le=1024)
    rollouts_per_actor: int | None = Field(None, ge=1, le=4096, description="absent: as in resources")
    generators: int | None = Field(None, ge=1, le=1024, description="absent: as in resources")
    generator_slots: int | None = Field(None, ge=1, le=4096, description="absent: as in resources")
    allowance: int | None = Field(
        None, ge=1, le=1_000_000, description="tickets that it may hold at a time; absent: twice what it works on"
    )


class JobSpec(Spec):
    """One training run."""

    name: Name
    project: Name = "default"
    seed: int = Field(0, ge=0, lt=2**32)
    model: AnyModel = NewModel()
    tasks: TasksSpec
    environment: EnvironmentSpec = EnvironmentSpec()
    verifier: VerifierSpec
    sampling: SamplingSpec = SamplingSpec()
    warm_start: WarmStartSpec | None = None
    train: TrainSpec
    evaluation: EvaluationSpec = EvaluationSpec()
    generator: GeneratorSpec = GeneratorSpec()
    weights: WeightsSpec = WeightsSpec()
    resources: ResourcesSpec = ResourcesSpec()
    sites: tuple[SiteSpec, ...] = Field((), max_length=64, description="rollout sites beside the home site")

    @property
    def max_sampled(self) -> int:
        """The most tokens that a rollout can have sampled."""
        return self.sampling.max_new_tokens * self.environment.max_turns

    def resources_at(self, site: str) -> ResourcesSpec:
        """What the processes of a site have to themselves."""
        for spec in self.sites:
            if spec.name == site:
                widths = {"actors", "rollouts_per_actor", "generators", "generator_slots"}
                own = spec.model_dump(include=widths, exclude_none=True)
                return self.resources.model_copy(update=own)
        return self.resources

    @model_validator(mode="after")
    def _parts_fit(self) -> JobSpec:
        misfits = []
        if self.evaluation.tasks and not self.tasks.heldout_fraction:
            message = "needs tasks.heldout_fraction > 0: nothing would be held out"
            misfits.append(Misfit("evaluation.tasks", self.evaluation.tasks, message, ("tasks.heldout_fraction",)))
        if self.evaluation.every and not self.evaluation.tasks:
            message = "needs evaluation.tasks > 0: there is nothing to evaluate"
            misfits.append(Misfit("evaluation.every", self.evaluation.every, message, ("evaluation.tasks",)))
        reply = self.sampling.max_new_tokens
        if isinstance(self.model, NewModel) and reply >= self.model.max_context:
            message = f"must be below model.max_context {self.model.max_context}: the prompt needs room too"
            misfits.append(Misfit("sampling.max_new_tokens", reply, message, _MODEL_PARTS))
        turns = self.environment.max_turns
        if self.environment.name == "single-turn" and turns != 1:
            message = "must be 1 with environment.name single-turn"
            misfits.append(Misfit("environment.max_turns", turns, message, ("environment.name",)))
        if self.generator.engine == "vllm" and not 0.01 <= self.sampling.temperature <= 2:
            message = "must lie in 0.01..2 with generator.engine vllm"
            misfits.append(Misfit("sampling.temperature", self.sampling.temperature, message, ("generator.engine",)))
        if self.tasks.examples and self.environment.name != "single-turn":
            message = "is for environment.name single-turn: others make their own conversation of a task"
            misfits.append(Misfit("tasks.examples", self.tasks.examples, message, ("environment.name",)))
        if self.generator.engine == "vllm" and self.evaluation.every:
            message = "must be 0 with generator.engine vllm: it has no room for the evaluated version beside the newest"
            misfits.append(Misfit("evaluation.every", self.evaluation.every, message, ("generator.engine",)))
        if self.train.warmup_steps > self.train.steps:
            message = f"must not exceed train.steps {self.train.steps}"
            misfits.append(Misfit("train.warmup_steps", self.train.warmup_steps, message, ("train.steps",)))
        refuse(misfits + self._site_misfits())
        return self

    def _site_misfits(self) -> list[Misfit]:
        names = [site.name for site in self.sites]
        misfits = [
            Misfit("sites", name, "a name is there twice", ()) for name in sorted(set(names)) if names.count(name) > 1
        ]
        if HOME_SITE in names:
            misfits.append(Misfit("sites", HOME_SITE, "this is the home site's name; take another", ()))
        if not self.resources.actors and not names:
            misfits.append(Misfit("resources.actors", 0, "0 needs sites: nobody would make rollouts", ("sites",)))
        return misfits


def parse_job(document: object) -> JobSpec:
    """Validates a parsed YAML or JSON document.

    Raises:
        InvalidJobSpec: with every fault, by path.
    """
    spec, faults = parse_what_stands(document)
    if faults or spec is None:
        raise InvalidJobSpec(faults)
    return spec


def parse_what_stands(document: object) -> tuple[JobSpec | None, list[Fault]]:
    """As parse_job, without raising: every fault, and the job as it would be without its faulty parts, so that the
    rest can be checked in the same go; None when too little is left."""
    if not isinstance(document, dict):
        return None, [Fault("(document)", document, _NO_MAPPING)]
    # What every job must say for itself, and what nothing else depends on.
    return parse(JobSpec, document, {"name": "unnamed", "train": {"steps": 1}, "verifier": {"name": "exact-match"}})


def load_job(path: Path) -> Json:
    """Reads a YAML or JSON job file and makes its relative paths absolute, from the file's own folder.

    Raises:
        InvalidJobSpec: the file is missing or too large, is not YAML, or is not a mapping.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InvalidJobSpec([Fault(str(path), path.name, f"cannot be read: {error.strerror}")]) from None
    if len(data) > MAX_BYTES:
        raise InvalidJobSpec([Fault(str(path), path.name, f"is larger than {MAX_BYTES} bytes")])
    try:
        # JSON is YAML.
        document = parse_yaml(data.decode("utf-8-sig"))
    except ValueError as error:
        raise InvalidJobSpec([Fault(str(path), path.name, f"is not a job in YAML: {error}")]) from None
    if not isinstance(document, dict):
        raise InvalidJobSpec([Fault(str(path), document, _NO_MAPPING)])
    for part in ("tasks", "model"):
        section = document.get(part)
        if isinstance(section, dict) and isinstance(place := section.get("path"), str) and "\0" not in place:
            section["path"] = os.path.realpath(path.parent / place)
    return document


_NO_MAPPING = "must be a mapping of keys; see examples/first-light.yaml"
