"""What is wrong with a JobSpec's document: every fault by its path, with what is allowed there.

Knows nothing of the JobSpec itself: `config.py` gives its models.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

import pydantic
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from longshore.documents import MAX_DEPTH, unplain
from longshore.errors import Fault

M = TypeVar("M", bound=BaseModel)
Json = dict[str, Any]

_MISFIT = "misfit"
# Each round takes out what the round before it found; nothing is hidden behind more than a few others.
_ROUNDS = 8


@dataclass(frozen=True)
class Misfit:
    """Parts that are fine by themselves and not together.

    Example: Misfit("train.warmup_steps", 10, "must not exceed train.steps 3", ("train.steps",))
    """

    path: str
    value: object
    message: str
    # Where the other parts are: when one of them is wrong by itself, this says nothing.
    others: tuple[str, ...]


def refuse(misfits: Sequence[Misfit]) -> None:
    """For a validator of a pydantic model: raises all of them as one error, if there are any."""
    if misfits:
        text = "; ".join(f"{misfit.path}: {misfit.message}" for misfit in misfits)
        # Pydantic's text is a template; its own text must not be read as one.
        raise PydanticCustomError(_MISFIT, "{text}", {"text": text, "misfits": list(misfits)})


def parse(model: type[M], document: Json, fallbacks: Json) -> tuple[M | None, list[Fault]]:
    """The document as a model, and everything that is wrong with it.

    With faults, the model is what is left without the faulty parts, so that the rest can be checked in the same go;
    None when that is too little.

    Args:
        fallbacks: values of required parts, for that remainder alone.
    """
    faults = unplain(document) + list(_yes_or_no(model, document, ""))
    rest = _plain_copy(document, 0)
    told = {fault.path for fault in faults}
    _remove(rest, told)
    for _ in range(_ROUNDS):
        try:
            return model.model_validate(rest), faults
        except pydantic.ValidationError as error:
            found = [item for entry in error.errors(include_url=False) for item in _findings(entry, model)]
        # What is still wrong without what was wrong with it goes as a whole.
        _remove(
            rest, [fault.path.rpartition(".")[0] if is_told(fault.path, told) else fault.path for fault, _ in found]
        )
        faults += [
            fault
            for fault, others in found
            if not is_told(fault.path, told) and not any(_touches(other, told) for other in others)
        ]
        told.update(fault.path for fault, _ in found)
        _fill(rest, fallbacks)
    return None, faults


def is_told(path: str, told: Set[str]) -> bool:
    """Whether a path is among the paths of the faults that were found, or inside one of them."""
    parts = path.split(".")
    return any(".".join(parts[:length]) in told for length in range(1, len(parts) + 1))


def _touches(path: str, told: Set[str]) -> bool:
    return is_told(path, told) or any(other.startswith(f"{path}.") for other in told)


def _plain_copy(value: Any, depth: int) -> Any:
    """A copy without what no JSON has as a key, and no deeper than a job may be."""
    if depth > MAX_DEPTH:
        return None
    if isinstance(value, dict):
        return {key: _plain_copy(part, depth + 1) for key, part in value.items() if isinstance(key, str)}
    return [_plain_copy(part, depth + 1) for part in value] if isinstance(value, list) else value


def _remove(document: Json, paths: Iterable[str]) -> None:
    for path in paths:
        holder = document
        *around, last = path.split(".")
        for name in around:
            inner = holder.get(name)
            if not isinstance(inner, dict):
                # An entry of a list takes the list with it: the others would get new numbers.
                last = name
                break
            holder = inner
        holder.pop(last, None)


def _fill(document: Json, fallbacks: Json) -> None:
    for name, value in fallbacks.items():
        if isinstance(value, dict) and isinstance(document.get(name), dict):
            _fill(document[name], value)
        else:
            document.setdefault(name, copy.deepcopy(value))


def _yes_or_no(model: type[BaseModel], document: Json, prefix: str) -> Iterator[Fault]:
    """`true` where a number belongs: pydantic would take it for 1."""
    for name, value in document.items():
        field = model.model_fields.get(name)
        if (
            isinstance(value, bool)
            and field is not None
            and {int, float} & {field.annotation, *get_args(field.annotation)}
        ):
            yield Fault(prefix + name, value, "must be a number")
        for part in _models(field) if isinstance(value, dict) else ():
            yield from _yes_or_no(part, value, f"{prefix}{name}.")


def _findings(entry: Any, model: type[BaseModel]) -> Iterator[tuple[Fault, list[str]]]:
    """The faults that one of pydantic's errors stands for, each with the paths of the parts that it presumes right."""
    where, part, field = _locate(model, entry["loc"])
    kind, value, context = entry["type"], entry["input"], entry.get("ctx", {})
    prefix = f"{where}." if where else ""
    if kind == _MISFIT:
        for misfit in context["misfits"]:
            fault = Fault(prefix + misfit.path, misfit.value, misfit.message)
            yield fault, [prefix + other for other in misfit.others]
    elif kind == "extra_forbidden":
        yield Fault(where, value, f"unknown key; allowed here: {', '.join(sorted(part.model_fields))}"), []
    elif kind == "missing":
        # Pydantic gives the part around it as the value.
        yield Fault(where, None, "is required"), []
    elif kind in ("union_tag_not_found", "union_tag_invalid"):
        name = context["discriminator"].strip("'")
        message = f"must be one of {', '.join(_tags(field, name))}"
        yield Fault(prefix + name, context.get("tag"), message), []
    else:
        yield Fault(where or "(job)", value, _message(entry, field)), []


def _message(entry: Any, field: FieldInfo | None) -> str:
    if entry["type"] in ("model_type", "model_attributes_type", "dict_type"):
        parts = _models(field)
        known = f" with keys of: {', '.join(sorted(parts[0].model_fields))}" if parts else ""
        return f"must be a mapping{known}"
    if entry["type"] == "path_type":
        return "must be a path in a string"
    if entry["type"] == "string_pattern_mismatch" and field is not None and field.description:
        return f"must be {field.description}"
    return str(entry["msg"]).removeprefix("Value error, ")


def _locate(model: type[BaseModel], loc: Sequence[object]) -> tuple[str, type[BaseModel], FieldInfo | None]:
    """An error's path as a person writes it; the part that it is in; the field that it is about, if there is one."""
    path: list[str] = []
    part, field = model, None
    for step in loc:
        variants = _models(field)
        tagged = [variant for variant in variants if len(variants) > 1 and step in _variant_tags(variant)]
        if tagged:
            # Pydantic's own step into one variant of a union, which no document has.
            part, field = tagged[0], None
            continue
        if variants and not isinstance(step, int):
            part = variants[0]
        path.append(str(step))
        if not isinstance(step, int):
            field = part.model_fields.get(str(step))
    return ".".join(path), part, field


def _models(field: FieldInfo | None) -> list[type[BaseModel]]:
    """The parts that a field may hold."""
    found: list[type[BaseModel]] = []
    waiting: list[object] = [] if field is None else [field.annotation]
    while waiting:
        item = waiting.pop(0)
        if isinstance(item, type) and issubclass(item, BaseModel):
            found.append(item)
        else:
            waiting += get_args(item)
    return found


def _variant_tags(variant: type[BaseModel]) -> tuple[object, ...]:
    return tuple(tag for name in ("kind", "name") if name in variant.model_fields for tag in _literals(variant, name))


def _tags(field: FieldInfo | None, name: str) -> list[str]:
    return [str(tag) for variant in _models(field) for tag in _literals(variant, name)]


def _literals(variant: type[BaseModel], name: str) -> tuple[object, ...]:
    return tuple(tag for tag in get_args(variant.model_fields[name].annotation) if isinstance(tag, str))
