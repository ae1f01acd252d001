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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

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
from dpkd.io.errors import NO_FILE, retry, write_errors
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
        self.attempt = 0
        """Number of the attempt that `load_newest` began."""
        self._base: CheckpointId | None = None
        self._saved_steps: set[int] = set()
        self._save: _Save | None = None

    def load_newest(self, parts: Mapping[str, Part]) -> int:
        """Begins an attempt: loads the newest committed checkpoint whose every file is as its manifest says.

        Returns its step, or 0 without any. Raises `UserError` where all are damaged, `StorageError` where they cannot
        be read; both on all ranks.
        """
        self.finish()
        self._saved_steps = set()
        outcome, *_ = self._on_all_ranks(lambda: retry(self._store.acquire) if self.world.rank == 0 else None)
        assert outcome is not None
        self.attempt, committed = outcome
        self._base = None
        for checkpoint in reversed(committed):
            with self._verified(checkpoint) as (folder, faults):
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
        self._save = _Save(self._store, CheckpointId(step, self.attempt), self.world, writers, self._sweep)

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
        if committed:  # whatever failed after that: a newer attempt may load it already
            return
        if error is not None:
            errors.append(error)

        def remove() -> None:
            if self.world.rank != 0:
                return
            with suppress(OSError):  # the first error is the one to raise, and the next attempt removes it
                if save.id not in self._store.committed():  # else a newer attempt may have loaded it
                    self._store.remove(save.id)
                self._store.fence.check(save.id.attempt)

        self._on_all_ranks(remove)
        raise StorageError(
            f"checkpoint at step {save.id.step} could not be written to {self._store.url} "
            f"({'; '.join(map(str, errors))}); the earlier ones stand. "
            "Free space or mend the storage, then give the same command again"
        )

    def _sweep(self) -> None:
        """Removes what nobody needs any more; what cannot be removed now is left to the next save."""
        try:
            retry(lambda: self._store.sweep(attempt=self.attempt, base=self._base, keep=self.keep))
        except StaleAttempt:
            pass  # which the next save raises
        except OSError as error:
            logger.info(f"{self._store.url}: older checkpoints cannot be removed ({error}); the next save tries again")

    @contextmanager
    def _verified(self, checkpoint: CheckpointId) -> Iterator[tuple[Path, list[str]]]:
        """The checkpoint's folder on this machine, and what the ranks found wrong with its files.

        On storage that is a path, all ranks together verify every file once; else the first rank of each machine
        copies the checkpoint, and verifies the copies.
        """
        shared = storage.local_path(self._store.place(checkpoint))
        copy = ("checkpoint", self.world.broadcast(secrets.token_hex(8)))
        verify: Callable[[], list[str]] = list
        with ExitStack() as copies:
            if shared is not None:
                folder, verify = shared, partial(self._faults, checkpoint, shared, self.world.rank, self.world.size)
            elif self.world.local_rank == 0:
                folder = copies.enter_context(lasting_folder(*copy))
                verify = partial(self._fetch, checkpoint, folder)
            else:
                folder = place(*copy)
            yield folder, sorted({fault for faults in self._on_all_ranks(verify) for fault in faults})
            if shared is None:
                self.world.barrier()  # nobody removes what another still loads

    def _fetch(self, checkpoint: CheckpointId, copy: Path) -> list[str]:
        """Copies a remote checkpoint to this machine; returns what is wrong with it."""
        with suppress(ValueError):  # a damaged manifest, which `_faults` names
            for path in retry(lambda: self._store.manifest(checkpoint)).files:
                with suppress(*NO_FILE):  # `_faults` says that it is missing
                    retry(partial(storage.copy_here, self._store.place(checkpoint, path), copy / path))
        return self._faults(checkpoint, copy, 0, 1)

    def _faults(self, checkpoint: CheckpointId, folder: Path, rank: int, size: int) -> list[str]:
        """What is wrong with the files in a local folder, with every `size`-th one from `rank` on."""
        try:
            files = retry(lambda: self._store.manifest(checkpoint)).files
        except ValueError as error:
            return [str(error)]
        faults = []
        for name, facts in list(files.items())[rank::size]:
            path = folder / name
            try:
                num_bytes = retry(path.stat).st_size
                if num_bytes != facts.size_bytes:
                    faults.append(f"{path.name} has {num_bytes} bytes, expected {facts.size_bytes}")
                elif retry(partial(storage.sha256, path)) != facts.sha256:
                    faults.append(f"{path.name} has another sha256 than its {MANIFEST} says")
            except NO_FILE:
                faults.append(f"{path.name} is missing")
            except OSError as error:
                if type(error) is StorageError:  # no permission, which says nothing of the checkpoint
                    raise
                faults.append(f"{path.name} cannot be read ({error})")
        if rank == 0:  # files that the manifest does not list, and that a part might read all the same
            there = (path.relative_to(folder).as_posix() for path in folder.glob("[!.]*/**/*") if path.is_file())
            faults += [f"{name} is not in its {MANIFEST}" for name in there if name not in files]
        return faults

    def _on_all_ranks(self, act: Callable[[], Result]) -> list[Result]:
        """What `act` returns on each rank, on every rank; so is the error of the first that fails."""
        own: Result | UserError | StorageError
        try:
            own = act()
        except (UserError, StorageError) as error:
            own = error
        results = []
        for outcome in self.world.gather(own):
            if isinstance(outcome, UserError | StorageError):
                raise outcome
            results.append(outcome)
        return results


@dataclass(eq=False)
class _Save:
    """One checkpoint on its way: a thread writes this rank's files, and on rank 0 commits the checkpoint."""

    store: CheckpointStore
    id: CheckpointId
    world: World
    writers: Mapping[str, Writer]
    on_commit: Callable[[], None]
    """Called on rank 0 once the checkpoint counts."""
    error: Exception | None = None
    committed: bool = False
    written: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, name="dpkd-checkpoint", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            retry(self._write)
            self.written.set()
            if self.world.rank == 0:
                self._commit()
                if self.committed:
                    self.on_commit()
        except Exception as error:  # noqa: BLE001  it is raised where `finish` is called
            self.error = portable(error)
        finally:
            self.written.set()

    def _write(self) -> None:
        """Writes this rank's files beside, hashes, flushes and moves each to its place, and lists them last."""
        files = {}
        beside = storage.local_path(self.store.place(self.id))
        with ExitStack() as stack:
            if beside is None:
                scratch = stack.enter_context(lasting_folder("saving", secrets.token_hex(8)))
            else:  # on the disk where the files will stand
                with write_errors(beside):
                    beside.mkdir(parents=True, exist_ok=True)
                    storage.sync(beside.parent)
                scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".rank-", dir=beside)))
            for name, write in self.writers.items():
                (scratch / name).mkdir()
                write(scratch / name)
            for path in sorted(path for path in scratch.rglob("*") if path.is_file()):
                name = path.relative_to(scratch).as_posix()
                files[name] = FileFacts(size_bytes=path.stat().st_size, sha256=storage.sha256(path))
                storage.deliver(path, self.store.place(self.id, name))
        write_files(self.store.place(self.id, self._list_name(self.world.rank)), files)

    def _list_name(self, rank: int) -> str:
        return f"files-{rank:05d}-of-{self.world.size:05d}.json"

    def _commit(self) -> None:
        """Publishes the manifest once all ranks have listed their files, unless the save is cancelled before."""
        names, wait_s = [self._list_name(rank) for rank in range(self.world.size)], POLL_S
        while not set(names).issubset(retry(lambda: storage.list_names(self.store.place(self.id)))):
            if self.cancelled.wait(wait_s):
                return
            retry(lambda: self.store.fence.check(self.id.attempt))  # a newer attempt may have removed them
            wait_s = min(LONGEST_POLL_S, 2 * wait_s)  # each listing is a request where storage is remote
        files: dict[str, FileFacts] = {}
        for name in names:
            files |= retry(partial(read_files, self.store.place(self.id, name)))
        retry(lambda: self.store.publish(Manifest(self.id, self.world.size, files)))
        self.committed = True
