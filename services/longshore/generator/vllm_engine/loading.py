"""Which of a version's tensors have to be sent to an engine that holds another one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from longshore.errors import IntegrityError


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
