"""YAML that refuses a key given twice, which plain YAML would settle in silence."""

from typing import Any

import yaml


class _UniqueKeys:
    """What a loader does with the keys of a mapping."""

    def construct_mapping(self: Any, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)  # type: ignore[misc]
        return mapping


class _Loader(_UniqueKeys, yaml.SafeLoader):
    pass


class _TextLoader(_UniqueKeys, yaml.BaseLoader):
    pass


def read_yaml(text: str) -> Any:
    """The content as plain values; raises `yaml.YAMLError`."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader


def read_yaml_text(text: str) -> Any:
    """The content with every scalar as the text that stands there: `no` and `00014` stay names.

    Raises `yaml.YAMLError`.
    """
    return yaml.load(text, Loader=_TextLoader)  # noqa: S506 - makes nothing but text
