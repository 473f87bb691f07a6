"""FSDP2: every rank holds a share of each parameter, its gradient and what the optimizer knows of it.

A decoder layer is gathered whole just before it is computed, and let go after; so are the embeddings, the last norm and
the head together. Gradients are summed, not averaged: what a rank computes is its share of the batch's loss.
Source: torch.distributed.fsdp.fully_shard (Zhao et al., arXiv 2304.11277, and its successor's documentation).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from longshore.learner.ranks.messages import Json
from longshore.learner.ranks.ranks import Ranks

_FORWARD = "longshore_forward"


def skeleton(config: Json) -> PreTrainedModel:
    """The leader's policy without weights, for a rank that gets its share of them later; `config` is of its kind."""
    made = AutoConfig.for_model(**config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(made, dtype=torch.float32)


def shard(model: nn.Module, blocks: Sequence[nn.Module], ranks: Ranks, device: str) -> None:
    """Leaves each rank its share of the leader's weights and buffers, on `device`. All ranks call this.

    Args:
        model: whole on the leader; on the others it may have no memory yet.
        blocks: the parts of it that are gathered one at a time.
        ranks: more than one.
        device: "cpu" or "cuda".
    """
    given = {name: parameter.detach() for name, parameter in model.named_parameters()} if ranks.is_leader else {}
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for part in [*blocks, model]:
        _give_memory(part, device)
        made = fully_shard(part, mesh=ranks.mesh, reshard_after_forward=True, mp_policy=precision)
        made.set_gradient_divide_factor(1.0)
        made.set_force_sum_reduction_for_comms(True)
    for name, parameter in model.named_parameters():
        # One at a time: no rank but the leader ever has room for two, and the leader lets go of what it has given.
        local(parameter).copy_(scattered(given.pop(name, None), parameter))
    for _, buffer in model.named_buffers():
        dist.broadcast(buffer, 0)


def as_forward(model: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(model, ...)` as a forward pass of `model`: its own parameters are whole meanwhile."""
    setattr(model, _FORWARD, types.MethodType(function, model))
    register_fsdp_forward_method(model, _FORWARD)
    made: Callable[..., Any] = getattr(model, _FORWARD)
    return made


def whole(value: Tensor) -> Tensor:
    """The value of what may be shared out among ranks; all of them call this, in the same order."""
    if isinstance(value, DTensor):
        full: Tensor = value.full_tensor()
        return full
    return value


def local(parameter: Tensor) -> Tensor:
    """This rank's share of it, the same memory; the parameter itself where it is not shared out."""
    if isinstance(parameter, DTensor):
        share: Tensor = parameter.to_local()
        return share.detach()
    return parameter


def is_shared_out(parameter: Tensor) -> bool:
    """Whether each rank has a share of it, and none has it all."""
    return isinstance(parameter, DTensor)


def scattered(value: Tensor | None, like: Tensor) -> Tensor:
    """This rank's share of the leader's value, as that of `like` and of its dtype; the others have None."""
    device = local(like).device
    given = torch.empty(like.shape, dtype=like.dtype, device=device) if value is None else value.to(device, like.dtype)
    share: Tensor = distribute_tensor(given, like.device_mesh, like.placements, src_data_rank=0).to_local()
    return share


def on_cpu(value: Tensor, ranks: Ranks) -> Tensor:
    """A copy on the CPU; of a share, as a share among the same ranks there."""
    if not isinstance(value, DTensor):
        return value.to("cpu", copy=True)
    own = local(value).to("cpu", copy=True)
    made: Tensor = DTensor.from_local(
        own, ranks.cpu_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
    )
    return made


def _give_memory(part: nn.Module, device: str) -> None:
    """What has no memory gets some, its content to come; what several modules share stays shared."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in part.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta and not isinstance(parameter, DTensor):
                if parameter not in made:
                    empty = torch.empty_like(parameter, device=device)
                    made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                setattr(module, name, made[parameter])
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
