"""The values used last, up to a number: open files and indexes of shards, of which a data set may have thousands."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")

MAX_FILES = 64
"""Shards that one reader keeps open."""
MAX_INDEXES = 256
"""Shard indexes that one reader keeps in memory: some 40 MB at 1,024 samples a shard."""


class LRUCache(Generic[Value]):
    """Values by number; `on_evict` gets those not used for the longest time, and all of them with this object."""

    def __init__(self, limit: int, *, on_evict: Callable[[Value], object] = id) -> None:
        self._limit = limit
        self._on_evict = on_evict
        self._values: OrderedDict[int, Value] = OrderedDict()

    def get(self, number: int, make: Callable[[int], Value]) -> Value:
        """The value of that number, made where it is not kept."""
        if number not in self._values:
            while len(self._values) >= self._limit:  # before: the limit holds while the next is made
                self._on_evict(self._values.popitem(last=False)[1])
            self._values[number] = make(number)
        self._values.move_to_end(number)
        return self._values[number]

    def __del__(self) -> None:
        for value in self._values.values():
            self._on_evict(value)
