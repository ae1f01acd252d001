"""YAML of plain values, within bounds: any text gives a tree or `yaml.YAMLError`.

Refused besides what is not YAML: a key given twice, which plain YAML settles in silence; tags that make other things
than text, numbers, lists and mappings; and what is small as a file and large in memory, such as aliases of aliases.
"""

from collections.abc import Hashable
from typing import Any, ClassVar

import yaml

MAX_CHARACTERS = 1 << 18
MAX_SCALAR_CHARACTERS = 10_000
MAX_DEPTH = 32
MAX_NODES = 20_000
"""Values in the tree, those behind an alias counted each time that it stands there."""


class _Bounded(yaml.SafeLoader):
    """A safe loader that counts what it makes."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._num_nodes = 0
        self._size_of: dict[str | None, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node; PyYAML's own hook, called for every node and alias."""
        event = self.peek_event()
        before = self._num_nodes
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _error(f"more than {MAX_DEPTH} lists and mappings inside one another", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._size_of:
                raise _error(f"*{event.anchor} stands inside itself", event)
            self._num_nodes += self._size_of[event.anchor]
        else:
            self._num_nodes += 1
            self._size_of[event.anchor] = self._num_nodes - before
        if self._num_nodes > MAX_NODES:
            raise _error(f"more than {MAX_NODES:,} values, counting those behind aliases", event)
        if isinstance(node, yaml.ScalarNode):
            _refuse_odd_scalar(node.value, event)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        """The mapping; raises for a key that stands twice."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        seen: set[Hashable] = set()
        for key in keys:
            if key == "<<":
                raise _error("<< is not read: give an alias of the whole section", node)
            if isinstance(key, list | dict):
                raise _error("a list or a mapping cannot be a key", node)
            if key in seen:
                raise _error(f"key {key!r} stands twice", node)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """The number; raises for one of more than 64 bits, which Python may not even print."""
        value: int = super().construct_yaml_int(node)
        if value.bit_length() > 64:
            raise _error("a whole number of more than 64 bits", node)
        return value


_Bounded.yaml_constructors = {
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
}
_Bounded.add_constructor("tag:yaml.org,2002:int", _Bounded.construct_yaml_int)
for _tag in ("timestamp", "merge"):
    _Bounded.add_constructor(f"tag:yaml.org,2002:{_tag}", yaml.SafeLoader.construct_yaml_str)


class _BoundedText(_Bounded):
    """The same, which takes no scalar for anything but text."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
    yaml_constructors: ClassVar[dict[str | None, Any]] = {
        tag: make
        for tag, make in _Bounded.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("str", "seq", "map")
    }


def read_yaml(text: str) -> Any:
    """The content as plain values; raises `yaml.YAMLError`."""
    return _read(text, _Bounded)


def read_yaml_text(text: str) -> Any:
    """The content with every scalar as the text that stands there: `no` and `00014` stay names.

    Raises `yaml.YAMLError`.
    """
    return _read(text, _BoundedText)


def _read(text: str, loader: type[_Bounded]) -> Any:
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"{len(text):,} characters, more than {MAX_CHARACTERS:,}")
    try:
        return yaml.load(text, Loader=loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:  # of a tag's own making
        raise yaml.YAMLError(f"a value is not what its tag or its form says: {error}") from error


def _error(problem: str, where: yaml.Event | yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, where.start_mark)


def _refuse_odd_scalar(text: str, event: yaml.Event) -> None:
    if len(text) > MAX_SCALAR_CHARACTERS:
        raise _error(f"a value of {len(text):,} characters, more than {MAX_SCALAR_CHARACTERS:,}", event)
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise _error("a value holds a character that no file name or text can", event)
