"""Work on two pools at once, one ahead of the other: items are handed out once the first is through with them."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, TypeVar

from dpkd.launch.pool import Pool

Item = TypeVar("Item")
Earlier = TypeVar("Earlier")


@contextmanager
def ahead(
    items: Sequence[Item], *, pool: Pool, function: Callable[[Earlier], Any], earlier: Sequence[Earlier]
) -> Iterator[Sequence[Item]]:
    """The items for another pool, where `items[i]` waits until `function(earlier[i])` is done on `pool`.

    Begins once the first is done, so that the other pool does not take the room in which this one comes up. An error of
    this pool is raised where an item is asked for; whatever ends the block ends this pool.
    """
    behind = _Behind(items)
    thread = threading.Thread(target=behind.follow, args=(pool, function, earlier), name="dpkd-ahead", daemon=True)
    thread.start()
    try:
        behind.wait_for_first()
        yield behind
    finally:
        behind.stop()
        thread.join()


class _Behind(Sequence[Item]):
    """The items, each of which can be had once its number is done."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = items
        self._done: set[int] = set()
        self._error: BaseException | None = None
        self._stopped = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        item = self._items[index]  # first: nothing is to be waited for beyond the last
        self._wait_for(lambda: index in self._done)
        return item

    def wait_for_first(self) -> None:
        """Returns once some item can be had, or there are none."""
        self._wait_for(lambda: bool(self._done) or not self._items)

    def follow(self, pool: Pool, function: Callable[[Earlier], Any], earlier: Sequence[Earlier]) -> None:
        """Does the earlier work, and lets go what it is done with."""
        try:
            results: Any = pool.map(function, earlier, until=lambda: self._stopped)
            with closing(results):
                for index, _ in results:
                    with self._changed:
                        self._done.add(index)
                        self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001  raised in the thread that waits
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def stop(self) -> None:
        """Ends the earlier work."""
        self._stopped = True

    def _wait_for(self, reached: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: reached() or self._error is not None)
            if not reached():
                assert self._error is not None
                raise self._error
