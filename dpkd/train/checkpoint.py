"""Checkpoints that are whole or absent: one transaction over all parts, written while training goes on.

A save copies every part's state and returns; a thread then writes the copy, hashes and flushes every file, and says so
in a file of its rank. Once all ranks have, rank 0 publishes the checkpoint by its manifest (`checkpoint_store` draws
what stands). The next save waits for the one before, so that slow storage holds training back instead of filling
memory. Before any rank loads, all have verified the files, and they fall back together.
"""

import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from dpkd.engine.state import Writer
from dpkd.engine.world import World
from dpkd.errors import StorageError, UserError, portable
from dpkd.io import storage
from dpkd.io.checkpoint_store import MANIFEST, CheckpointStore, FileFacts, Manifest, Mark, RankFiles, Superseded
from dpkd.io.errors import NO_FILE, retry
from dpkd.io.temporary_folder import lasting_folder, place
from dpkd.log import logger

Result = TypeVar("Result")

POLL_S, LONGEST_POLL_S = 0.05, 1.0


class Part(Protocol):
    """Something with state: an engine, a random generator. Called on every rank."""

    def snapshot(self) -> Writer:
        """Copies this rank's share; what it returns writes the copy. The next call may overwrite the copy."""

    def load(self, folder: Path) -> None:
        """Restores what the writers of all ranks wrote."""


class Checkpoints:
    """The checkpoints of one stage, at a path or URL that all ranks see. Every verb but `failed` is called by all."""

    def __init__(self, url: str | Path, *, world: World, keep: int) -> None:
        self.world = world
        self.keep = keep
        self._store = CheckpointStore(str(url))
        self._attempt: int | None = None
        self._base: Mark | None = None
        self._saved_steps: set[int] = set()
        self._saving: _Saving | None = None

    @property
    def attempt(self) -> int:
        """Number of the attempt that `load_newest` began."""
        assert self._attempt is not None, "load_newest begins it"
        return self._attempt

    def load_newest(self, parts: Mapping[str, Part]) -> int:
        """Begins an attempt: loads the newest checkpoint whose every file is as its manifest says.

        Returns its step, or 0 where there is none. Raises `UserError` where all are damaged.
        """
        self.finish()
        self._saved_steps = set()
        self._attempt, marks = self._by_first(lambda: retry(self._store.claim))
        self._base = None
        for mark in reversed(marks):
            with self._at_hand(mark) as (folder, look):
                faults = self._agreed(look)
                if not faults:
                    for name, part in parts.items():
                        part.load(folder / name)
                    self._base = mark
                    break
            if self.world.rank == 0:
                logger.info(f"checkpoint {mark.name} is damaged and not used: {'; '.join(faults)}")
        if marks and self._base is None:
            raise UserError(
                f"{self._store.url}: all {len(marks)} checkpoints are damaged; restore one from a copy, "
                "or delete the folder to start the stage anew"
            )
        if self.world.rank == 0 and self._base == max(marks, default=None):  # a damaged one may yet be restored
            self._sweep()
        return self._base.step if self._base else 0

    def save(self, step: int, parts: Mapping[str, Part]) -> None:
        """Copies every part's state and begins to write it, once the save before has ended; raises as `finish`.

        A step that this attempt has saved stands already, and is never written over.
        """
        self.finish()
        if step in self._saved_steps:
            return
        self._saved_steps.add(step)
        writers = {name: part.snapshot() for name, part in parts.items()}
        transaction = _Transaction(self._store, Mark(step, self.attempt), self.world, writers)
        self._saving = _Saving(transaction, publish=self._publish if self.world.rank == 0 else None)

    def failed(self) -> bool:
        """Whether this rank's part of the save under way has failed: time for all to call `finish`."""
        return self._saving is not None and self._saving.failed

    def finish(self) -> None:
        """Returns once the save under way is published; raises the same `StorageError` on all ranks where it is not."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        errors = [error for error in self.world.gather(saving.wait_for_writing()) if error is not None]
        if errors:
            saving.cancel()
        published, error = self.world.broadcast(saving.wait_for_publishing())
        if published:  # whatever a rank met once its files stood; from here on a newer attempt may load it
            return
        if error is not None:
            errors.append(error)
        self._by_first(lambda: self._abandon(saving.mark))
        raise StorageError(
            f"checkpoint at step {saving.mark.step} could not be written to {self._store.url} "
            f"({'; '.join(map(str, errors))}); the earlier ones stand. "
            "Free space or mend the storage, then give the same command again"
        )

    def _abandon(self, mark: Mark) -> bool:
        """Removes a save that failed; raises `Superseded` where the cause may be that a newer attempt has begun."""
        try:
            if mark not in self._store.standing():  # else its manifest stands, and a newer attempt may have loaded it
                self._store.abandon(mark)
            self._store.refuse_superseded(mark.attempt)
        except Superseded:
            raise
        except OSError:
            pass  # the first error is the one to tell, and the next attempt removes it
        return True

    def _publish(self, transaction: "_Transaction", cancelled: threading.Event) -> bool:
        """Rank 0, once it has written its own files: waits for those of the others, and makes the checkpoint count.

        Returns False where it was cancelled before.
        """
        wait_s = POLL_S
        while not (names := transaction.rank_files()):
            if cancelled.wait(wait_s):
                return False
            retry(lambda: self._store.refuse_superseded(transaction.mark.attempt))  # it may have swept this up
            wait_s = min(LONGEST_POLL_S, 2 * wait_s)  # each look is a request where storage is remote
        files: dict[str, FileFacts] = {}
        for name in names:
            data = retry(partial(storage.read_bytes, self._store.place(transaction.mark, name)))
            files |= RankFiles.model_validate_json(data).files
        retry(lambda: self._store.publish(transaction.mark, world_size=self.world.size, files=files))
        self._sweep()
        return True

    def _sweep(self) -> None:
        """Removes what nobody needs any more; what cannot be removed now is left to the next save."""
        try:
            retry(lambda: self._store.sweep(attempt=self.attempt, base=self._base, keep=self.keep))
        except Superseded:
            pass  # which the next save says
        except OSError as error:
            logger.info(f"{self._store.url}: older checkpoints cannot be removed ({error}); the next save tries again")

    @contextmanager
    def _at_hand(self, mark: Mark) -> Iterator[tuple[Path, Callable[[], list[str]]]]:
        """The checkpoint's folder on this machine, and a look at what is wrong with this rank's share of its files.

        On storage that is a path, all ranks together look at every file once; else the first rank of each machine
        copies the checkpoint, and looks at the copies.
        """
        path = storage.local_path(self._store.place(mark))
        if path is not None:
            yield path, partial(self._faults, mark, path, share=(self.world.rank, self.world.size))
            return
        named = ("checkpoint", self.world.broadcast(secrets.token_hex(8)))
        if self.world.local_rank > 0:
            yield place(*named), list
            self.world.barrier()
            return
        with lasting_folder(*named) as copy:
            yield copy, partial(self._fetch, mark, copy)
            self.world.barrier()  # nobody removes what another still loads

    def _fetch(self, mark: Mark, copy: Path) -> list[str]:
        """Copies a remote checkpoint to this machine; returns what is wrong with it."""
        try:
            for path in retry(lambda: self._store.manifest(mark)).files:
                with suppress(*NO_FILE):  # `_faults` tells that it is missing
                    retry(partial(storage.copy_here, self._store.place(mark, path), copy / path))
        except ValueError as error:
            return [str(error)]
        return self._faults(mark, copy, share=(0, 1))

    def _faults(self, mark: Mark, folder: Path, *, share: tuple[int, int]) -> list[str]:
        """What is wrong with a share (rank, of how many) of the files in a local folder."""
        try:
            manifest: Manifest = retry(lambda: self._store.manifest(mark))
        except ValueError as error:
            return [str(error)]
        rank, size = share
        mine = list(manifest.files.items())[rank::size]
        faults = [fault for path, facts in mine if (fault := _fault(folder / path, facts))]
        return faults + (_unlisted(folder, manifest) if rank == 0 else [])

    def _agreed(self, look: Callable[[], list[str]]) -> list[str]:
        """What all ranks together found wrong; the `UserError` of one that could not look is raised on all."""
        faults: list[str] = []
        error = None
        try:
            faults = look()
        except (UserError, StorageError) as failed:
            error = failed
        found = self.world.gather((faults, error))
        errors = [each for _, each in found if each is not None]
        if errors:
            raise errors[0]
        return sorted({fault for rank, _ in found for fault in rank})

    def _by_first(self, act: Callable[[], Result]) -> Result:
        """What `act` gives on rank 0, on every rank; its `UserError` is raised on all."""
        result, error = None, None
        if self.world.rank == 0:
            try:
                result = act()
            except (UserError, StorageError) as fault:
                error = fault
        result, error = self.world.broadcast((result, error))
        if error is not None:
            raise error
        assert result is not None
        return result


@dataclass(frozen=True)
class _Transaction:
    """One checkpoint to be written: this rank's writers by part."""

    store: CheckpointStore
    mark: Mark
    world: World
    writers: Mapping[str, Writer]

    def write(self) -> None:
        """Writes this rank's files beside, hashes, flushes and puts each where it belongs, and lists them last."""
        with self._scratch() as scratch:
            for name, write in self.writers.items():
                (scratch / name).mkdir()
                write(scratch / name)
            files = {}
            for path in sorted(path for path in scratch.rglob("*") if path.is_file()):
                name = path.relative_to(scratch).as_posix()
                files[name] = FileFacts(size_bytes=path.stat().st_size, sha256=storage.sha256(path))
                storage.deliver(path, self.store.place(self.mark, name))
        listed = RankFiles(files=files).model_dump_json(indent=1).encode()
        storage.write_bytes_atomic(self.store.place(self.mark, _files_name(self.world.rank, self.world.size)), listed)

    def rank_files(self) -> list[str]:
        """Names of the ranks' lists once all of them stand, none before."""
        names = [_files_name(rank, self.world.size) for rank in range(self.world.size)]
        there = set(retry(lambda: storage.list_names(self.store.place(self.mark))))
        return names if there.issuperset(names) else []

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        """An empty folder on the disk where the files will stand, or on any where that is remote."""
        beside = storage.local_path(self.store.place(self.mark))
        if beside is None:
            with lasting_folder("saving", secrets.token_hex(8)) as folder:
                yield folder
            return
        with storage.write_errors(beside):
            beside.mkdir(parents=True, exist_ok=True)
            storage.sync_folder(beside.parent)
        with tempfile.TemporaryDirectory(prefix=".rank-", dir=beside) as scratch:
            yield Path(scratch)


class _Saving:
    """A transaction in a thread of its own."""

    def __init__(
        self, transaction: _Transaction, *, publish: Callable[[_Transaction, threading.Event], bool] | None
    ) -> None:
        self.mark = transaction.mark
        self._transaction, self._publish = transaction, publish
        self._error: Exception | None = None
        self._published = False
        self._written, self._cancelled = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="dpkd-checkpoint", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether it has ended with an error."""
        return self._error is not None

    def wait_for_writing(self) -> Exception | None:
        """Waits until this rank's files are written; returns the error where they are not."""
        self._written.wait()
        return self._error

    def wait_for_publishing(self) -> tuple[bool, Exception | None]:
        """Waits for the end of it all; returns whether it counts now, and the error where it does not."""
        self._thread.join()
        return self._published, self._error

    def cancel(self) -> None:
        """Ends it without publishing: another rank's files are missing."""
        self._cancelled.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            retry(self._transaction.write)
            self._written.set()
            if self._publish is not None:
                self._published = self._publish(self._transaction, self._cancelled)
        except Exception as error:  # noqa: BLE001  it is raised where `finish` is called
            self._error = portable(error)
        finally:
            self._written.set()


def _files_name(rank: int, size: int) -> str:
    return f"files-{rank:05d}-of-{size:05d}.json"


def _unlisted(folder: Path, manifest: Manifest) -> list[str]:
    """Files of parts that the manifest does not vouch for, and that a part might read all the same."""
    there = (path.relative_to(folder).as_posix() for path in folder.glob("[!.]*/**/*") if path.is_file())
    return [f"{name} is not in its {MANIFEST}" for name in there if name not in manifest.files]


def _fault(path: Path, facts: FileFacts) -> str | None:
    try:
        size = retry(path.stat).st_size
        if size != facts.size_bytes:
            return f"{path.name} has {size} bytes, expected {facts.size_bytes}"
        if retry(partial(storage.sha256, path)) != facts.sha256:
            return f"{path.name} has another sha256 than its {MANIFEST} says"
    except NO_FILE:
        return f"{path.name} is missing"
    except OSError as error:
        if type(error) is StorageError:  # it says nothing of the checkpoint
            raise
        return f"{path.name} cannot be read ({error})"
    return None
