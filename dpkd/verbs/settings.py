"""`dpkd settings`: every setting with its values, its default, and what it is; also as a JSON schema for editors."""

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from dpkd.config import Config
from dpkd.errors import UserError, did_you_mean
from dpkd.log import logger
from dpkd.report.figures import markdown_table
from dpkd.settings import Settings

BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<", "minItems": "length ≥"}
TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true, false",
    "null": "null",
    "array": "list",
    "object": "mapping",
}

Schema = dict[str, Any]


class Setting(NamedTuple):
    """One key of the settings."""

    key: str
    """`teachers.<name>.objectives.<n>{rotation}.share`: a part in `<>` is free, a part in `{}` is the `kind`."""
    values: str
    default: str
    purpose: str


def settings(key: str | None = None, *, form: Literal["text", "markdown", "schema"] = "text") -> None:
    """Logs the settings of `key` and below it, or all; raises `UserError` for no such key.

    The form `schema` is the JSON schema of a whole settings file.
    """
    if form == "schema":
        logger.info(json.dumps(settings_schema(), indent=1, ensure_ascii=False))
        return
    found = every_setting()
    if key is not None:
        below = [each for each in found if f".{key}." in f".{each.key}.".replace("{", ".").replace("}", "")]
        if not below:
            raise UserError(f"{key}: no such setting{did_you_mean(key, [each.key for each in found])}")
        found = below
    if form == "markdown":
        rows = [[f"`{each.key}`", each.values, each.default and f"`{each.default}`", each.purpose] for each in found]
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        logger.info("\n".join(markdown_table([["key", "values", "default", "what it is"], *escaped])))
        return
    for each in found:
        default = f" (default {each.default})" if each.default else ""
        logger.info(f"{each.key}{': ' if each.values else ''}{each.values}{default}")
        for line in textwrap.wrap(each.purpose, 100):
            logger.info(f"    {line}")


def every_setting() -> list[Setting]:
    """All settings in the order of the sections; those of a class stand where it is used first."""
    schema = settings_schema()
    return list(_below({"$ref": "#/$defs/Settings"}, "", classes={"Settings": schema, **schema["$defs"]}, first={}))


def settings_schema() -> Schema:
    """The JSON schema of a settings file; the sentences under the fields of the classes are its descriptions."""
    schema = Settings.model_json_schema()
    waiting, found = [Config], {}
    while waiting:
        waiting += (model := waiting.pop()).__subclasses__()
        found[model.__name__] = model
    for name, part in {"Settings": schema, **schema["$defs"]}.items():
        for base in reversed(found[name].__mro__):
            if issubclass(base, Config):
                (parsed,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
                assert isinstance(parsed, ast.ClassDef)
                for pair in zip(parsed.body, parsed.body[1:], strict=False):
                    match pair:
                        case ast.AnnAssign(target=ast.Name(id=key)), ast.Expr(value=ast.Constant(value=str(sentence))):
                            field = part.get("properties", {}).get(key.removesuffix("_"), {})
                            field["description"] = " ".join(sentence.split())
    return schema


def _below(field: Schema, key: str, *, classes: Schema, first: dict[str, str]) -> Iterator[Setting]:
    """The settings of the classes in the values of a field; `first` has the first key of each class."""
    options = _options(field)
    names = [option["$ref"].rpartition("/")[2] for option in options if "$ref" in option]
    for name in names:
        part = classes[name]
        kind = part.get("properties", {}).get("kind", {}).get("const") if len(names) > 1 else None
        place = key if kind is None else f"{key}{{{kind}}}"
        if name in first:
            if kind is None:
                yield Setting(f"{place}.…", "", "", f"as {first[name]}")
            continue
        first[name] = place
        if kind is not None:
            yield Setting(place, "", "", " ".join(part.get("description", "").split()))
        for inner_name, inner in part.get("properties", {}).items():
            if inner_name != "kind":
                inner_key = f"{place}.{inner_name}" if place else inner_name
                yield _setting(inner_key, inner, classes=classes)
                yield from _below(inner, inner_key, classes=classes, first=first)
    for option in options:
        named = [option.get("additionalProperties"), *option.get("patternProperties", {}).values()]
        for entry, end in [*((entry, "<name>") for entry in named), (option.get("items"), "<n>")]:
            if isinstance(entry, dict):
                yield from _below(entry, f"{key}.{end}", classes=classes, first=first)


def _setting(key: str, field: Schema, *, classes: Schema) -> Setting:
    words, refs = [], []
    for option in _options(field):
        if "$ref" in option:
            refs.append(option["$ref"].rpartition("/")[2])
        elif "enum" in option or "const" in option:
            words.append(" | ".join(map(str, option.get("enum", [option.get("const")]))))
        else:
            bounds = [f"{sign} {option[bound]}" for bound, sign in BOUNDS.items() if bound in option]
            words.append(" ".join([TYPES.get(option.get("type", ""), ""), *bounds]))
    default = json.dumps(field["default"], ensure_ascii=False) if "default" in field else ""
    if refs and field.get("default") and len(default) > 30:
        default = ""  # its own keys have them
    purpose = field.get("description") or (classes[refs[0]].get("description", "") if len(refs) == 1 else "")
    return Setting(key, " or ".join(filter(None, dict.fromkeys(words))), default, " ".join(purpose.split()))


def _options(field: Schema) -> list[Schema]:
    """The alternatives of a field; a field without them is one."""
    several = field.get("anyOf") or field.get("oneOf")
    return [found for option in several for found in _options(option)] if several else [field]
