"""Turns a failed validation into sentences: the key, its value, what was expected, for a misspelt key the nearest."""

import difflib
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

MAX_SHOWN = 12


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """One line per fault, in the order of the file."""
    faults = error.errors(include_url=False)
    lines = [_line(fault, root) for fault in faults[:MAX_SHOWN]]
    if len(faults) > MAX_SHOWN:
        lines.append(f"and {len(faults) - MAX_SHOWN} more")
    return lines[0] if len(lines) == 1 else f"{len(faults)} faults\n  " + "\n  ".join(lines)


def _line(fault: ErrorDetails, root: type[BaseModel]) -> str:
    path, owner, annotation = _walk(fault["loc"], root)
    kind, value = fault["type"], fault["input"]
    if kind == "extra_forbidden":
        return f"{path}: no such key{_nearest(str(fault['loc'][-1]), owner)}"
    if kind == "missing":
        return f"{path}: is missing and has no default"
    if kind == "union_tag_not_found":
        return f"{path}: needs a `kind`, one of {', '.join(_kinds(annotation))}"
    if kind == "union_tag_invalid":
        tags = _kinds(annotation)
        tag = str(fault["ctx"]["tag"])
        near = difflib.get_close_matches(tag, tags, n=1)
        return (
            f"{path}: no such kind {tag!r}{f', did you mean {near[0]!r}?' if near else ''} (one of {', '.join(tags)})"
        )
    if kind == "value_error":
        message = str(fault["ctx"]["error"])
        return f"{path}: {message}" if path else message
    return f"{path}: {_short(value)} does not fit: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _nearest(key: str, owner: type[BaseModel] | None) -> str:
    if owner is None:
        return ""
    known = list(owner.model_fields)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else f" (known here: {', '.join(known)})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _walk(location: tuple[int | str, ...], root: type[BaseModel]) -> tuple[str, type[BaseModel] | None, Any]:
    """The key as the user wrote it (without pydantic's union tags), the model that owns its last part, and its type."""
    shown: list[str] = []
    here: Any = root
    owner: type[BaseModel] | None = root
    for part in location:
        member = _member(here, part)
        if member is not None:  # a union's tag: not part of the user's key
            here = owner = member
            continue
        shown.append(str(part))
        owner = here if isinstance(here, type) and issubclass(here, BaseModel) else owner
        here = _child(here, part)
        if isinstance(here, type) and issubclass(here, BaseModel) and part != location[-1]:
            owner = here
    return ".".join(shown), owner, here


def _kinds(annotation: Any) -> list[str]:
    return [str(model.model_fields["kind"].default) for model in _models(annotation)]


def _member(annotation: Any, tag: int | str) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return None
    for model in _models(annotation):
        kind = model.model_fields.get("kind")
        if kind is not None and kind.default == tag and len(list(_models(annotation))) > 1:
            return model
    return None


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Annotated, Union) or type(annotation).__name__ == "UnionType":
        for argument in get_args(annotation):
            yield from _models(argument)


def _child(annotation: Any, part: int | str) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(str(part))
        return None if field is None else _bare(field.annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is dict:
        return _bare(arguments[1])
    if origin in (tuple, list):
        return _bare(arguments[0])
    return None


def _bare(annotation: Any) -> Any:
    """`X | None` as X where only one model or container is meant; unions of several kinds stay."""
    options = [option for option in get_args(annotation) if option is not type(None)]
    is_union = get_origin(annotation) is Union or type(annotation).__name__ == "UnionType"
    return options[0] if is_union and len(options) == 1 else annotation
