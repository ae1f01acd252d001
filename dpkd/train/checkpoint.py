"""Checkpoints that are whole or absent: one transaction over all parts, written while training goes on.

A save copies every part's state and returns; a thread then writes the copy, hashes and flushes every file, and lists
them in a file of its rank. Once all ranks have, rank 0 commits the checkpoint by its manifest (`checkpoint_store` draws
the folder). The next save waits for the one before, so that slow storage holds training back instead of filling
memory. Before any rank loads, all have verified the files, and they fall back together.
"""

import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar, cast

from dpkd.engine.state import Writer
from dpkd.engine.world import World
from dpkd.errors import StorageError, UserError, portable
from dpkd.io import storage
from dpkd.io.checkpoint_store import (
    MANIFEST,
    CheckpointId,
    CheckpointStore,
    FileFacts,
    Manifest,
    read_files,
    write_files,
)
from dpkd.io.errors import NO_FILE, retry
from dpkd.io.fence import StaleAttempt
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
    """The checkpoints of one stage, at a path or URL that all ranks see. All ranks call every verb except `failed`."""

    def __init__(self, url: str | Path, *, world: World, keep: int) -> None:
        self.world = world
        self.keep = keep
        self._store = CheckpointStore(str(url))
        self._attempt: int | None = None
        self._base: CheckpointId | None = None
        self._saved_steps: set[int] = set()
        self._save: _Save | None = None

    @property
    def attempt(self) -> int:
        """Number of the attempt that `load_newest` began."""
        assert self._attempt is not None, "load_newest begins it"
        return self._attempt

    def load_newest(self, parts: Mapping[str, Part]) -> int:
        """Begins an attempt: loads the newest committed checkpoint whose every file is as its manifest says.

        Returns its step, or 0 without any. Raises `UserError` where all are damaged, `StorageError` where they cannot
        be read; both on all ranks.
        """
        self.finish()
        self._saved_steps = set()
        self._attempt, committed = self._on_rank_zero(lambda: retry(self._store.acquire))
        self._base = None
        for checkpoint in reversed(committed):
            with self._local_copy(checkpoint) as (folder, verify):
                faults = self._agreed_faults(verify)
                if not faults:
                    for name, part in parts.items():
                        part.load(folder / name)
                    self._base = checkpoint
                    break
            if self.world.rank == 0:
                logger.info(f"checkpoint {checkpoint.name} is damaged and not used: {'; '.join(faults)}")
        if committed and self._base is None:
            raise UserError(
                f"{self._store.url}: all {len(committed)} checkpoints are damaged; restore one from a copy, "
                "or delete the folder to start the stage anew"
            )
        if self.world.rank == 0 and self._base == max(committed, default=None):  # a damaged one may yet be restored
            self._sweep()
        return self._base.step if self._base else 0

    def save(self, step: int, parts: Mapping[str, Part]) -> None:
        """Copies every part's state and begins to write it, once the save before has ended; raises as `finish`.

        A step that this attempt has saved is never written over.
        """
        self.finish()
        if step in self._saved_steps:
            return
        self._saved_steps.add(step)
        writers = {name: part.snapshot() for name, part in parts.items()}
        committed = self._sweep if self.world.rank == 0 else None
        self._save = _Save(self._store, CheckpointId(step, self.attempt), self.world, writers, committed=committed)

    def failed(self) -> bool:
        """Whether this rank's part of the save under way has failed: time for all to call `finish`."""
        return self._save is not None and self._save.error is not None

    def finish(self) -> None:
        """Returns once the save under way is committed; raises the same `StorageError` on all ranks where it is not.

        Raises `StaleAttempt` where a newer attempt has begun.
        """
        save, self._save = self._save, None
        if save is None:
            return
        save.written.wait()
        errors = [error for error in self.world.gather(save.error) if error is not None]
        if errors:
            save.cancelled.set()  # files of another rank are missing
        save.thread.join()
        committed, error = self.world.broadcast((save.committed, save.error))
        if committed:  # whatever a rank met once its files stood; from here on a newer attempt may load it
            return
        if error is not None:
            errors.append(error)
        self._on_rank_zero(lambda: self._remove(save.id))
        raise StorageError(
            f"checkpoint at step {save.id.step} could not be written to {self._store.url} "
            f"({'; '.join(map(str, errors))}); the earlier ones stand. "
            "Free space or mend the storage, then give the same command again"
        )

    def _remove(self, failed: CheckpointId) -> None:
        """Removes a save that failed; raises `StaleAttempt` where the cause may be that a newer attempt has begun."""
        with suppress(OSError):  # the first error is the one to raise, and the next attempt removes it
            if failed not in self._store.committed():  # else a newer attempt may have loaded it
                self._store.remove(failed)
            self._store.fence.check(failed.attempt)

    def _sweep(self) -> None:
        """Removes what nobody needs any more; what cannot be removed now is left to the next save."""
        try:
            retry(lambda: self._store.sweep(attempt=self.attempt, base=self._base, keep=self.keep))
        except StaleAttempt:
            pass  # which the next save raises
        except OSError as error:
            logger.info(f"{self._store.url}: older checkpoints cannot be removed ({error}); the next save tries again")

    @contextmanager
    def _local_copy(self, checkpoint: CheckpointId) -> Iterator[tuple[Path, Callable[[], list[str]]]]:
        """The checkpoint's folder on this machine, and what verifies this rank's share of its files.

        On storage that is a path, all ranks together verify every file once; else the first rank of each machine
        copies the checkpoint, and verifies the copies.
        """
        path = storage.local_path(self._store.place(checkpoint))
        if path is not None:
            yield path, partial(self._faults, checkpoint, path, share=(self.world.rank, self.world.size))
            return
        named = ("checkpoint", self.world.broadcast(secrets.token_hex(8)))
        if self.world.local_rank > 0:
            yield place(*named), list
            self.world.barrier()
            return
        with lasting_folder(*named) as copy:
            yield copy, partial(self._fetch, checkpoint, copy)
            self.world.barrier()  # nobody removes what another still loads

    def _fetch(self, checkpoint: CheckpointId, copy: Path) -> list[str]:
        """Copies a remote checkpoint to this machine; returns what is wrong with it."""
        with suppress(ValueError):  # a damaged manifest, which `_faults` names
            for path in retry(lambda: self._store.manifest(checkpoint)).files:
                with suppress(*NO_FILE):  # `_faults` says that it is missing
                    retry(partial(storage.copy_here, self._store.place(checkpoint, path), copy / path))
        return self._faults(checkpoint, copy, share=(0, 1))

    def _faults(self, checkpoint: CheckpointId, folder: Path, *, share: tuple[int, int]) -> list[str]:
        """What is wrong with a share (rank, of how many) of the files in a local folder."""
        try:
            files = retry(lambda: self._store.manifest(checkpoint)).files
        except ValueError as error:
            return [str(error)]
        rank, size = share
        mine = list(files.items())[rank::size]
        faults = [fault for path, facts in mine if (fault := _fault(folder / path, facts))]
        if rank == 0:  # files that the manifest does not list, and that a part might read all the same
            there = (path.relative_to(folder).as_posix() for path in folder.glob("[!.]*/**/*") if path.is_file())
            faults += [f"{name} is not in its {MANIFEST}" for name in there if name not in files]
        return faults

    def _agreed_faults(self, verify: Callable[[], list[str]]) -> list[str]:
        """What all ranks together found wrong; the error of one that could not verify is raised on all."""
        faults: list[str] = []
        error: Exception | None = None
        try:
            faults = verify()
        except (UserError, StorageError) as failure:
            error = failure
        outcomes = self.world.gather((faults, error))
        for _, error in outcomes:
            if error is not None:
                raise error
        return sorted({fault for of_rank, _ in outcomes for fault in of_rank})

    def _on_rank_zero(self, act: Callable[[], Result]) -> Result:
        """What `act` returns on rank 0, on every rank; its error is raised on all."""
        result: Result | None = None
        error: Exception | None = None
        if self.world.rank == 0:
            try:
                result = act()
            except (UserError, StorageError) as failure:
                error = failure
        result, error = self.world.broadcast((result, error))
        if error is not None:
            raise error
        return cast(Result, result)


class _Save:
    """One checkpoint on its way: a thread writes this rank's files, and on rank 0 commits the checkpoint."""

    def __init__(
        self,
        store: CheckpointStore,
        checkpoint: CheckpointId,
        world: World,
        writers: Mapping[str, Writer],
        *,
        committed: Callable[[], None] | None,
    ) -> None:
        """`committed` is called on rank 0 once the checkpoint counts, and is None on the other ranks."""
        self.id = checkpoint
        self.error: Exception | None = None
        self.committed = False
        self.written, self.cancelled = threading.Event(), threading.Event()
        self._store, self._world, self._writers, self._when_committed = store, world, writers, committed
        self.thread = threading.Thread(target=self._run, name="dpkd-checkpoint", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            retry(self._write)
            self.written.set()
            if self._when_committed is not None and self._all_written():
                self._commit()
                self.committed = True
                self._when_committed()
        except Exception as error:  # noqa: BLE001  it is raised where `finish` is called
            self.error = portable(error)
        finally:
            self.written.set()

    def _write(self) -> None:
        """Writes this rank's files beside, hashes, flushes and moves each to its place, and lists them last."""
        files = {}
        with self._scratch() as scratch:
            for name, write in self._writers.items():
                (scratch / name).mkdir()
                write(scratch / name)
            for path in sorted(path for path in scratch.rglob("*") if path.is_file()):
                name = path.relative_to(scratch).as_posix()
                files[name] = FileFacts(size_bytes=path.stat().st_size, sha256=storage.sha256(path))
                storage.deliver(path, self._store.place(self.id, name))
        write_files(self._place_of_list(self._world.rank), files)

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        """An empty folder on the disk where the files will stand, or on any where that is remote."""
        beside = storage.local_path(self._store.place(self.id))
        if beside is None:
            with lasting_folder("saving", secrets.token_hex(8)) as folder:
                yield folder
            return
        with storage.write_errors(beside):
            beside.mkdir(parents=True, exist_ok=True)
            storage.sync(beside.parent)
        with tempfile.TemporaryDirectory(prefix=".rank-", dir=beside) as scratch:
            yield Path(scratch)

    def _place_of_list(self, rank: int) -> str:
        return self._store.place(self.id, f"files-{rank:05d}-of-{self._world.size:05d}.json")

    def _all_written(self) -> bool:
        """Waits for the lists of all ranks; False where the save was cancelled before."""
        wait_s = POLL_S
        wanted = {self._place_of_list(rank).rpartition("/")[2] for rank in range(self._world.size)}
        while not wanted.issubset(retry(lambda: storage.list_names(self._store.place(self.id)))):
            if self.cancelled.wait(wait_s):
                return False
            retry(lambda: self._store.fence.check(self.id.attempt))  # a newer attempt may have removed them
            wait_s = min(LONGEST_POLL_S, 2 * wait_s)  # each listing is a request where storage is remote
        return True

    def _commit(self) -> None:
        files: dict[str, FileFacts] = {}
        for rank in range(self._world.size):
            files |= retry(partial(read_files, self._place_of_list(rank)))
        retry(lambda: self._store.publish(Manifest(self.id, self._world.size, files)))


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
        if type(error) is StorageError:  # no permission, which says nothing of the checkpoint
            raise
        return f"{path.name} cannot be read ({error})"
    return None
