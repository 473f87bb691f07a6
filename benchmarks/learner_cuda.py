"""The CUDA side of benchmarks/learner.py: tokens a second, model FLOP utilisation (MFU) and memory of a train step.

Needs torch, transformers and numpy alone, besides this repository: a machine with a GPU may have nothing else.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import Report
from benchmarks.learner_load import Load, make_load, make_model, model_flops, sequence_of
from longshore.learner.batch import micro_batches
from longshore.learner.policy_compute import PolicyCompute
from longshore.learner.sequences import TrainSequence

# Dense bfloat16 rate of an H100 or H200 (SXM), from NVIDIA's data sheet.
HOPPER_FLOPS = 989.4e12
MFU_GOAL = 0.45


@dataclass(frozen=True)
class Variant:
    """One way to compute a model's step."""

    model: str
    pack_tokens: int
    groups: int
    compiled: bool = True

    @property
    def name(self) -> str:
        how = "compiled blocks" if self.compiled else "blocks as they are"
        return f"{self.model}, packs of {self.pack_tokens}, {how}"


# Groups a step: with these few places of the packs stay empty (a number for the report says how many).
GROUPS = 48


def variants(model: str | None, *, quick: bool) -> list[Variant]:
    """What is tried, the most telling first: the time may not last for all."""
    if model == "small":
        return [Variant("small", 2048, 2)]
    every = [
        Variant("1.5b", 16384, GROUPS),
        Variant("1b", 16384, GROUPS),
        Variant("0.5b", 32768, GROUPS),
        Variant("1.5b", 8192, GROUPS),
        Variant("1.5b", 8192, GROUPS, compiled=False),
    ]
    chosen = [variant for variant in every if model in (None, variant.model)]
    return chosen[:1] if quick else chosen


class Step:
    """A train step as the learner takes it: packs, a clipped objective, gradients in float32, AdamW."""

    def __init__(self, variant: Variant, device: str) -> None:
        self.policy = make_model(variant.model)
        self.compute = PolicyCompute(
            self.policy,
            device=device,
            dtype=torch.bfloat16,
            pack_tokens=variant.pack_tokens,
            compiled=variant.compiled and device == "cuda",
        )
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-6, betas=(0.9, 0.95), fused=True)

    def take(self, sequences: Sequence[TrainSequence], trained: int) -> None:
        self.compute.refresh()
        self.optimizer.zero_grad(set_to_none=True)
        for micro in micro_batches(sequences, self.compute.pack_tokens):
            micro = micro.to(self.compute.device)
            logp = self.compute.scores(micro).logp
            (clipped(logp, logp.detach(), micro.streams.advantages).sum() / trained).backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()


def clipped(logp: Tensor, behaviour: Tensor, advantages: Tensor) -> Tensor:
    """[N] GRPO's loss of each token."""
    ratio = (logp - behaviour).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


def measure(
    report: Report, model: str | None, *, quick: bool, seconds: float, device: str, kernels: Path | None
) -> None:
    """Adds figures of each variant, as long as `seconds` last.

    `kernels` gets a table of where the first one's time goes.
    """
    began = time.monotonic()
    if device == "cuda":
        report.note(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    _attempt(report, "check", lambda: _check(report, device))
    if importlib.util.find_spec("pydantic") is None:
        report.skip("the trainer's step", "pydantic is not installed")
    else:
        _attempt(report, "the trainer's step", lambda: _check_trainer(report, device))
    longest = 40.0
    for variant in variants(model, quick=quick):
        clock = time.monotonic()
        left = seconds - (clock - began)
        if left < longest:
            report.skip(variant.name, f"{left:.0f} s were left")
            continue
        report.note(f"{clock - began:.0f} s: {variant.name}")
        _attempt(report, variant.name, functools.partial(_measure, report, variant, device, kernels))
        kernels = None
        longest = max(longest, time.monotonic() - clock)


def _attempt(report: Report, name: str, measured: Callable[[], None]) -> None:
    try:
        measured()
    except Exception as error:  # noqa: BLE001
        # Time on a lent machine is short: what goes wrong with one variant must not cost the others theirs.
        traceback.print_exc()
        report.skip(name, f"{type(error).__name__}: {str(error)[:200]}")
    gc.collect()
    torch.cuda.empty_cache()


def _measure(report: Report, variant: Variant, device: str, kernels: Path | None) -> None:
    load = make_load(variant.model, variant.groups)
    sequences, step = load.sequences(), Step(variant, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first = _timed(step, sequences, load, device)
    times = [_timed(step, sequences, load, device) for _ in range(5)]
    took = statistics.median(times)
    trees = [micro.tree for micro in micro_batches(sequences, variant.pack_tokens)]
    used = model_flops(variant.model, trees, load.trained) / took / HOPPER_FLOPS
    filled = sum(tree.size for tree in trees) / sum(step.compute.padded(tree) for tree in trees)
    told = f"{took:.3f} s a step ({min(times):.3f}-{max(times):.3f}), the first {first:.0f} s"
    packs = f"{load.trained} in {len(trees)} packs, which are {filled:.1%} full"
    report.note(f"{variant.name}: MFU {used:.3f}, {told}; {packs}")
    report.add(f"{variant.name}: MFU", used, against=told, at_least=MFU_GOAL)
    report.add(f"{variant.name}: trained tokens", load.trained / took, "/s", against=packs)
    if device == "cuda":
        report.add(f"{variant.name}: peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
    if kernels is not None:
        _write_kernels(kernels, step, sequences, load)


def _timed(step: Step, sequences: Sequence[TrainSequence], load: Load, device: str) -> float:
    clock = time.monotonic()
    step.take(sequences, load.trained)
    _wait(device)
    return time.monotonic() - clock


def _check(report: Report, device: str) -> None:
    """The device's log-probs and gradients against the CPU's, whose equality with the plain path is tested."""
    sequences = _small_sequences()
    expected_logp, expected = _logp_and_gradients(sequences, "cpu", compiled=False)
    logp, gradients = _logp_and_gradients(sequences, device, compiled=device == "cuda")
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(gradients, expected, strict=True))
    report.add(
        "float32 log-probs, largest difference from the CPU's", float((logp - expected_logp).abs().max()), at_most=1e-3
    )
    report.add("float32 gradients, largest relative difference from the CPU's", worst, at_most=1e-3)


def _check_trainer(report: Report, device: str) -> None:
    """What the learner itself calls: a step with all that may belong to one, against the same on the CPU."""
    from longshore.config import TrainSpec
    from longshore.learner.trainer import Trainer

    made: list[tuple[dict[str, float], list[Tensor]]] = []
    for where in ("cpu", device):
        document: dict[str, object] = {
            "steps": 10,
            "learning_rate": 1e-3,
            "objective": {"name": "dapo"},
            "kl": {"coefficient": 0.01},
            "compute": {"device": where, "pack_tokens": 2048},
        }
        trainer = Trainer(make_model("small"), TrainSpec.model_validate(document))
        metrics = [trainer.step(number, _small_sequences(), 0) for number in (1, 2)]
        made.append((metrics[-1], [parameter.detach().cpu() for parameter in trainer.policy.parameters()]))
    (expected, weights), (final, moved) = made
    worst = max(abs(final[name] - expected[name]) / (abs(expected[name]) + 1e-3) for name in expected)
    report.add("the trainer's metrics of a second step, relative to the CPU's", worst, at_most=0.01)
    apart = max(float((a - b).norm() / b.norm()) for a, b in zip(moved, weights, strict=True))
    report.add("weights after it, relative to the CPU's", apart, at_most=0.01)


def _small_sequences() -> list[TrainSequence]:
    load = make_load("small", 2, seed=1)
    cut = [(p, c[:200]) for p, g in zip(load.prompts, load.completions, strict=True) for c in g]
    return [sequence_of(number, p, c, (-1.0) ** number) for number, (p, c) in enumerate(cut)]


def _logp_and_gradients(
    sequences: Sequence[TrainSequence], device: str, *, compiled: bool
) -> tuple[Tensor, list[Tensor]]:
    policy = make_model("small")
    with torch.no_grad():
        # Small random weights would make every token as likely as any other.
        for parameter in policy.parameters():
            parameter.mul_(3.0) if parameter.ndim == 2 else None
    compute = PolicyCompute(policy, device=device, pack_tokens=2048, compiled=compiled)
    compute.refresh()
    logps = []
    for micro in micro_batches(sequences, 2048):
        micro = micro.to(compute.device)
        logp = compute.scores(micro).logp
        (logp * micro.streams.advantages).sum().backward()
        logps.append(logp.detach().cpu())
    return torch.cat(logps), [parameter.grad.cpu() for parameter in policy.parameters()]


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _write_kernels(path: Path, step: Step, sequences: Sequence[TrainSequence], load: Load) -> None:
    """Where a step's time goes, by kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step.take(sequences, load.trained)
        torch.cuda.synchronize()
    kernels = sorted(profiler.key_averages(), key=lambda one: -one.self_device_time_total)
    total = sum(one.self_device_time_total for one in kernels) or 1
    lines = [f"{total / 1e3:9.1f} ms in all"]
    for one in kernels[:40]:
        took = one.self_device_time_total
        lines.append(f"{took / 1e3:9.1f} ms {took / total:6.1%} {one.count:6d} x {one.key[:100]}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
