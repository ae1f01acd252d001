"""The base of all settings, their readers for YAML and the command line, and the messages for wrong settings."""

import importlib
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import ErrorDetails

from dpkd.errors import UserError, did_you_mean


class Config(BaseModel):
    """A frozen group of settings; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


PathText = Annotated[str, AfterValidator(lambda path: str(Path(path).expanduser()) if path.startswith("~") else path)]
"""A path or URL; `~` is the home folder."""


def any_class_of(base: type[Config]) -> WrapValidator:
    """Lets a union of kinds also take `kind: package.module:Class`, a subclass of `base` in any installed package."""

    def validate(value: Any, built_in: ValidatorFunctionWrapHandler) -> Any:
        kind = value.get("kind") if isinstance(value, Mapping) else None
        if isinstance(value, base):
            return value
        if not isinstance(kind, str) or ":" not in kind:
            return built_in(value)
        module, _, name = kind.partition(":")
        try:
            chosen = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"kind {kind!r} cannot be loaded ({error}): give package.module:Class") from None
        if not (isinstance(chosen, type) and issubclass(chosen, base)):
            raise ValueError(f"kind {kind!r} is no subclass of {base.__module__}.{base.__name__}: make it one")  # noqa: TRY004
        try:
            return chosen.model_validate(value)
        except ValidationError as error:
            raise ValueError(explain(error, chosen)) from None

    return WrapValidator(validate)


TAKES_TEXT = "takes text"
"""Marks a field (`Annotated[..., TAKES_TEXT]`) whose validator also accepts plain text, such as a path."""


class _Loader(yaml.SafeLoader):
    """Loads plain values, dates as text; raises for a duplicate key, which plain YAML accepts."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002
        """The mapping of a node; a hook of PyYAML."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


_Loader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)


class _TextLoader(_Loader):
    """Loads every scalar as text, so that `no` and `00014` stay names."""

    yaml_implicit_resolvers: dict[str, Any] = {}


def read_yaml(text: str, *, scalars_as_text: bool = False) -> Any:
    """The content of YAML text as plain values; raises `yaml.YAMLError`, also for a duplicate key."""
    try:
        return yaml.load(text, Loader=_TextLoader if scalars_as_text else _Loader)  # noqa: S506 (both are SafeLoaders)
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        raise yaml.YAMLError(f"a value cannot be read: {error}") from error


def read_yaml_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises `UserError` with `--config`, the file and the fault."""
    try:
        tree = read_yaml(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeError) as error:
        raise UserError(f"--config {path}: cannot be read ({error}); give the path of a YAML file") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"--config {path}: holds {type(tree).__name__}, expected sections such as data and distill")
    return tree


def apply_override(tree: dict[str, Any], override: str, *, root: type[BaseModel]) -> None:
    """Sets one `key.path=value` in a tree of plain values; `root` is the model of the tree.

    The value of a text key is used literally; all other values are read as YAML. Raises `UserError` with the override.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r}: an override is written key.path=value, for example distill.training.steps=100")
    *parents, last = key.split(".")
    try:
        value = text if _is_text(text, reduce(_step, [*parents, last], root)) else read_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{override!r}: the value is not valid YAML: {error}") from None
    node: Any = tree
    for name in parents:
        if isinstance(node, dict) and isinstance(node.get(name), str | None):  # text is the `name` of a section
            node[name] = {} if node.get(name) is None else {"name": node[name]}
        node = node[_place(node, name, override)]
    node[_place(node, last, override)] = value


def _place(node: Any, name: str, override: str) -> Any:
    """The key in a mapping, or the position in a list, for `name`."""
    if isinstance(node, dict):
        return name
    if not isinstance(node, list):
        raise UserError(f"{override!r}: {node!r} is a plain value and has no key {name!r}")
    if not re.fullmatch(r"[0-9]{1,9}", name) or int(name) >= len(node):
        raise UserError(f"{override!r}: {name!r} is no position in a list of {len(node)}; positions start at 0")
    return int(name)


def _is_text(text: str, annotation: Any) -> bool:
    """Whether a field of this type uses the text literally."""
    members = list(_members(annotation))
    types = {member for member, _ in members}
    if text in ("null", "~", "") and NoneType in types:
        return False
    if any(TAKES_TEXT in metadata for _, metadata in members):
        return not text.startswith(("{", "["))
    return types - {NoneType} == {str}


def explain(error: ValidationError, root: type[BaseModel], *, overrides: Sequence[str] = ()) -> str:
    """One line per fault, in the order of the file: the key, its value, the expected value, the nearest known key.

    A line ends with the overrides that set the key or a part of its value.
    """
    lines = []
    for fault in error.errors(include_url=False):
        line = _line(fault, root)
        path = line.partition(": ")[0]
        keys = {text: re.escape(text.partition("=")[0]) for text in overrides}
        culprits = [t for t, key in keys.items() if t.startswith(f"{path}.") or re.search(rf"(?<![\w.]){key}\b", line)]
        lines.append(line + (f" (set on the command line: {' '.join(culprits)})" if culprits else ""))
    return lines[0] if len(lines) == 1 else f"{len(lines)} faults\n  " + "\n  ".join(lines)


def _line(fault: ErrorDetails, root: type[BaseModel]) -> str:
    keys, owner, annotation = _user_keys(fault["loc"], root)
    path, kind = ".".join(keys), fault["type"]
    if kind == "extra_forbidden":
        known = [field.alias or name for name, field in owner.model_fields.items()]
        hint = did_you_mean(keys[-1], known) or f" (known here: {', '.join(known)})"
        return f"{path}: no such key{hint}"
    if kind == "missing":
        return f"{path}: is missing and has no default"
    if kind == "union_tag_not_found":
        return f"{path}: needs a `kind`, one of {', '.join(_models_by_kind(annotation))}"
    if kind == "union_tag_invalid":
        tag, kinds = str(fault["ctx"]["tag"]), list(_models_by_kind(annotation))
        return f"{path}: no such kind {tag!r}{did_you_mean(tag, kinds)} (one of {', '.join(kinds)})"
    if kind == "value_error":
        return f"{path}: {fault['ctx']['error']}" if path else str(fault["ctx"]["error"])
    value = repr(fault["input"])
    value = value if len(value) <= 80 else value[:77] + "..."
    return f"{path}: {value} does not fit: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _user_keys(location: tuple[int | str, ...], root: type[BaseModel]) -> tuple[list[str], type[BaseModel], Any]:
    """The keys of the user, without pydantic's union tags; the model that has the last key; the type of its value."""
    keys: list[str] = []
    annotation, owner = root, root
    for part in location:
        models = [member for member, _ in _members(annotation) if _is_model(member)]
        by_kind = _models_by_kind(annotation)
        if len(models) > 1 and part in by_kind:
            annotation = by_kind[str(part)]
            continue
        keys.append(str(part))
        owner = models[0] if len(models) == 1 else owner
        annotation = _step(annotation, str(part))
    return keys, owner, annotation


def _step(annotation: Any, key: str) -> Any:
    """The type of the value at `key`: of a field, or of the values of a mapping or list; None for an unknown key."""
    for member, _ in _members(annotation):
        fields = (
            {field.alias or name: field for name, field in member.model_fields.items()} if _is_model(member) else {}
        )
        if key in fields:
            field = fields[key]
            metadata: Any = (field.annotation, *field.metadata)
            return Annotated[metadata] if field.metadata else field.annotation
        if get_origin(member) is dict:
            return get_args(member)[1]
        if get_origin(member) in (tuple, list):
            return get_args(member)[0]
    return None


def _members(annotation: Any, metadata: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yields (type, metadata) of each member of a union, or of the type if it is no union."""
    if get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0], (*metadata, *get_args(annotation)[1:]))
    elif get_origin(annotation) in (Union, UnionType):
        for option in get_args(annotation):
            yield from _members(option, metadata)
    else:
        yield annotation, metadata


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _models_by_kind(annotation: Any) -> dict[str, type[BaseModel]]:
    """The models of a union of several kinds, by kind."""
    models = [member for member, _ in _members(annotation) if _is_model(member) and "kind" in member.model_fields]
    return {str(model.model_fields["kind"].default): model for model in models}
