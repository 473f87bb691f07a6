"""From one version to another: what has to be sent, the load itself, and its proof."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from longshore.errors import IntegrityError
from longshore.generator.canary import Proof
from longshore.generator.metrics import EngineMetrics
from longshore.generator.vllm_engine.options import VllmOptions
from longshore.generator.vllm_engine.segment import Segment

if TYPE_CHECKING:
    from longshore.generator.vllm_engine.process import VllmProcess


@dataclass(frozen=True)
class Version:
    """A version's tensors, as published, and what proves them."""

    version: int
    tensors: Mapping[str, Tensor]
    proof: Proof


@dataclass(frozen=True)
class Staged:
    """What has to be loaded to get from one version to another."""

    version: Version
    base: Version | None
    segment: Segment


def make_ready(version: Version, base: Version | None) -> Staged:
    """Copies what changed to where vLLM's workers read it. Raises IntegrityError: it is nothing that can be sent."""
    return Staged(version, base, Segment(to_send(version.tensors, base.tensors if base else None)))


class Loads:
    """Loads versions into one vLLM, and proves what is loaded."""

    def __init__(self, process: VllmProcess, metrics: EngineMetrics, options: VllmOptions) -> None:
        self._process = process
        self._metrics = metrics
        self._options = options
        self._serials = itertools.count()

    async def load(self, segment: Segment, version: int) -> str:
        """Loads between two decode steps; the label of what is drawn from now on.

        Raises:
            IntegrityError: it cannot be loaded; what the model holds now is undefined.
        """
        label = f"{version}/{next(self._serials)}"
        await self._process.pause(forget=self._options.recompute)
        await self._process.load(segment, label)
        await self._process.resume()
        return label

    async def prove(self, version: Version) -> None:
        """Scores a version's canaries with what is loaded, before all other requests. Raises IntegrityError."""
        scores = {}
        for number, canary in enumerate(version.proof.canaries):
            name = f"canary {number} of load {next(self._serials)}"
            scores[canary.token_ids] = await self._process.score(name, canary.token_ids)
        self._metrics.prove(version.proof.gap(lambda token_ids: scores[tuple(token_ids)]), self._options.dtype)


def to_send(tensors: Mapping[str, Tensor], resident: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """What differs from the resident version: everything where there is none.

    A tensor that comes as the same object did not change (see TorchViews). Blocks go whole: vLLM packs the tensors of
    one block together (q, k and v; gate and up; experts), and loads a packed one from all of its parts.
    """
    if resident is None:
        return dict(tensors)
    changed = {block_of(name) for name, tensor in tensors.items() if resident.get(name) is not tensor}
    return {name: tensor for name, tensor in tensors.items() if block_of(name) in changed}


def block_of(name: str) -> str:
    """The decoder layer that a tensor belongs to; outside of them its module.

    Example: block_of("model.layers.3.mlp.up_proj.weight") == "model.layers.3"
    """
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return name.rpartition(".")[0]


def check_like(tensors: Mapping[str, Tensor], resident: Mapping[str, Tensor] | None) -> None:
    """Raises IntegrityError where a version's tensors have other names or shapes than the resident one's."""
    if resident is None:
        return
    missing = sorted(resident.keys() - tensors.keys())
    extra = sorted(tensors.keys() - resident.keys())
    wrong = [
        f"{name} is {tuple(tensor.shape)}, not {tuple(resident[name].shape)}"
        for name, tensor in tensors.items()
        if name in resident and tensor.shape != resident[name].shape
    ]
    for what, names in (("missing", missing), ("unknown", extra), ("wrong shape", wrong)):
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise IntegrityError(f"the tensors are not those of the version that is served: {what}: {shown}")
