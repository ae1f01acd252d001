"""The pool protocol: maps a function over items, in other processes, surviving their death."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Pool(Protocol):
    """Independent work on items, in any order."""

    num_workers: int

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        """Yields (index of the item, result) as they finish; an item whose worker died is tried again elsewhere.

        An exception of `function` itself is raised here unchanged, and the rest of the work is cancelled.
        """
