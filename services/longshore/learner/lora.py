"""LoRA: a policy whose weights stay as they are, and small adapters beside its projections that are trained (peft's).

    y = x W^T + scale * (x A^T) B^T,   scale = alpha / rank,   A [rank, in], B [out, rank], B zero at first

What leaves the learner is *merged*, W + scale * B A under W's own name: policy versions and the final checkpoint are
those of an ordinary model, and every engine serves them. The sum is the one that `weight_store.codec.adapter` defines
to the bit, so that W once, and then A and scale * B, are enough to send. Gradients, optimizer state, references and the
learner's own checkpoints are of the adapters alone. There is no dropout: a log-prob would differ from the engine's by
chance.
Source: Hu et al., arXiv 2106.09685.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from longshore.config import LoraSpec
from longshore.errors import ConfigError
from longshore.learner.ranks.ranks import ALONE, Ranks
from longshore.learner.ranks.sharding import is_shared_out, local, scattered, whole
from longshore.weight_store.codec.adapter import merge
from longshore.weights.client import Product
from longshore.weights.client import Tensor as Published

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WRAPPED = ".base_layer"
_ADAPTER = "default"


class Adapters:
    """The adapters of one policy, which has them inside from here on."""

    def __init__(self, policy: PreTrainedModel, spec: LoraSpec, seed: int, ranks: Ranks = ALONE) -> None:
        """
        Args:
            policy: is changed: its projections get adapters, and nothing else of it is trained.
            seed: of the adapters' first weights.
            ranks: those that will share the policy out; the leader has its weights.

        Raises:
            ConfigError: peft is not installed, or the policy has no such projections.
        """
        peft = _peft()
        _check_targets(policy, spec)
        self.base_digest = _digest(policy) if ranks.is_leader else ""
        config = peft.LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,
            lora_dropout=0.0,
            target_modules=list(spec.target_modules),
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(seed)
        self._inside = peft.get_peft_model(policy, config)

    def save(self, folder: Path, ranks: Ranks = ALONE) -> None:
        """Writes the adapters as peft does: adapter_config.json and adapter_model.safetensors. On every rank."""
        trained = ((name, whole(value.detach())) for name, value in trained_parameters(self._inside))
        weights = {name: value.cpu() for name, value in trained if ranks.is_leader}
        if ranks.is_leader:
            self._inside.save_pretrained(folder, safe_serialization=True, state_dict=weights)


def trained_parameters(policy: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What a train step changes: all parameters, or those of the adapters."""
    return ((name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad)


@dataclass(frozen=True)
class Part:
    """One parameter of the ordinary model that a policy amounts to, and what an adapter adds to it."""

    # In the ordinary model.
    name: str
    # Without the adapter; not to be written to.
    value: Tensor
    # A and scale * B, copied; None where there is no adapter, or it adds nothing yet.
    product: Product | None


def has_adapters(policy: nn.Module) -> bool:
    """Whether it is one that adapters were put into."""
    return next(_layers(policy), None) is not None


def parts(policy: nn.Module) -> Iterator[Part]:
    """The parameters of the ordinary model, tied ones once; one at a time, whole also where ranks share them out."""
    for name, parameter, layer in _ordinary(policy):
        product = None if layer is None else _product(name, layer)
        yield Part(name, whole(parameter.detach()), product)


def merged_parameters(policy: nn.Module) -> dict[str, Tensor]:
    """Name -> value of the ordinary model, adapters added; tied weights once. Not to be written to."""
    return {part.name: merged(part) for part in parts(policy)}


def merged(part: Part) -> Tensor:
    """A parameter of the ordinary model, adapters added. Not to be written to."""
    if part.product is None:
        return part.value
    (value,) = merge([as_published(part.name, part.value)], [part.product])
    return from_published(value).to(part.value.device)


def as_published(name: str, value: Tensor) -> Published:
    """A tensor's bytes, over its own memory where it is on the CPU: not to be written to from then on."""
    data = value.detach().cpu().contiguous()
    raw = data.view(torch.uint8).numpy().data.toreadonly().cast("B")
    return Published(name, str(data.dtype).removeprefix("torch."), tuple(data.shape), cast("bytes", raw))


def from_published(tensor: Published) -> Tensor:
    """The same memory as a torch tensor; not to be written to."""
    with warnings.catch_warnings():
        # torch warns of memory that must not be written to.
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(tensor.data, dtype=getattr(torch, tensor.dtype)).view(tensor.shape)


def _product(name: str, layer: Any) -> Product | None:
    down, up = (whole(side[_ADAPTER].weight.detach()) for side in (layer.lora_A, layer.lora_B))
    if not bool(up.any()):
        return None
    return Product(
        name, as_published(f"{name}.down", down.clone()), as_published(f"{name}.up", up * layer.scaling[_ADAPTER])
    )


class holding:  # noqa: N801 - used as a context manager, reads as a verb
    """Runs a block with other weights in a policy, by the names of `merged_parameters`; its adapters add nothing.

    Of a policy that ranks share out, the leader has the values, of every parameter, and each rank gets its shares.
    """

    def __init__(self, policy: nn.Module, values: dict[str, Tensor]) -> None:
        self._policy = policy
        self._values = values

    def __enter__(self) -> None:
        self._kept: list[tuple[nn.Parameter, Tensor]] = []
        for name, parameter in self._policy.named_parameters():
            value = self._values.get(_outer(name))
            if ".lora_B." in name:
                self._kept.append((parameter, _exchanged(parameter, torch.zeros_like(local(parameter)))))
            elif ".lora_A." in name:
                continue
            elif is_shared_out(parameter):
                self._kept.append((parameter, _exchanged(parameter, scattered(value, parameter))))
            elif value is not None:
                self._kept.append((parameter, _exchanged(parameter, value)))

    def __exit__(self, *error: object) -> None:
        for parameter, data in self._kept:
            _exchanged(parameter, data)


def _exchanged(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Puts a value into a parameter, or this rank's share into its share; returns what was there."""
    if not is_shared_out(parameter):
        before = parameter.data
        parameter.data = value
        return before
    # FSDP gathers from the memory that it knows.
    own = local(parameter)
    before = own.clone()
    own.copy_(value)
    return before


def _ordinary(policy: nn.Module) -> Iterator[tuple[str, nn.Parameter, Any]]:
    """The parameters of the ordinary model: name there, the policy's own parameter, the layer of its adapter if any."""
    layers = dict(_layers(policy))
    for name, parameter in policy.named_parameters():
        if name.partition(".lora_")[0] not in layers:
            owner, wrapped, last = name.rpartition(f"{_WRAPPED}.")
            yield _outer(name), parameter, layers[owner] if wrapped and last == "weight" else None


def _outer(name: str) -> str:
    """A parameter's name in the model without adapters."""
    return name.replace(f"{_WRAPPED}.", ".")


def _layers(policy: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that have adapters, by name."""
    return ((name, module) for name, module in policy.named_modules() if hasattr(module, "get_delta_weight"))


def _check_targets(policy: PreTrainedModel, spec: LoraSpec) -> None:
    outside = {policy.get_output_embeddings(), policy.get_input_embeddings()}
    linear = {
        name.rpartition(".")[2]
        for name, module in policy.named_modules()
        if isinstance(module, nn.Linear) and module not in outside
    }
    unknown = sorted(set(spec.target_modules) - linear)
    if unknown:
        raise ConfigError(
            f"train.lora.target_modules: a {type(policy).__name__} has no projections called {', '.join(unknown)}; "
            f"it has {', '.join(sorted(linear))}"
        )


def _digest(policy: nn.Module) -> str:
    """Tells one model's weights from another's: adapters mean nothing beside other weights."""
    digest = hashlib.sha256()
    for name, parameter in policy.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError("train.lora needs peft: install longshore[lora] where the learner runs") from None
    return peft
