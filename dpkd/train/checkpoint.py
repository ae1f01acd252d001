"""Checkpoints that are whole or absent: one transaction over all parts, written during training.

A save copies the state of every part and returns. A thread then writes the copy, hashes and flushes every file, and
lists the files in a file of its rank. After all ranks have listed theirs, rank 0 commits the checkpoint by writing its
manifest (`checkpoint_store` shows the folder). A save waits for the previous one, so slow storage delays training
instead of filling memory. All ranks verify the files before any rank loads them, and fall back together.
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
    """An object with state, such as an engine or a random generator. Every rank calls its methods."""

    def snapshot(self) -> Writer:
        """Copies this rank's share of the state; returns the copy's writer. The next call may overwrite the copy."""

    def load(self, folder: Path) -> None:
        """Restores the state that the writers of all ranks wrote."""


class Checkpoints:
    """The checkpoints of one stage, at a path or URL that all ranks see. All ranks call each method except `failed`."""

    def __init__(self, url: str | Path, *, world: World, keep: int) -> None:
        self.world = world
        self.keep = keep
        self._store = CheckpointStore(str(url))
        self.attempt = 0
        """Number of the attempt that `load_newest` started."""
        self._base: CheckpointId | None = None
        self._saved_steps: set[int] = set()
        self._save: _Save | None = None

    def load_newest(self, parts: Mapping[str, Part]) -> int:
        """Starts an attempt, and loads the newest committed checkpoint whose files all match its manifest.

        Returns its step, or 0 without a checkpoint. Raises `UserError` if all are damaged and `StorageError` if they
        cannot be read, both on all ranks.
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
                "or delete the folder to start the stage again"
            )
        if self.world.rank == 0 and self._base == max(committed, default=None):  # the user may restore a damaged one
            self._sweep()
        return self._base.step if self._base else 0

    def save(self, step: int, parts: Mapping[str, Part]) -> None:
        """Waits for the previous save, copies the state of every part, and starts to write it.

        Never overwrites a step that this attempt has saved. Raises the errors of `finish`.
        """
        self.finish()
        if step in self._saved_steps:
            return
        self._saved_steps.add(step)
        writers = {name: part.snapshot() for name, part in parts.items()}
        self._save = _Save(self._store, CheckpointId(step, self.attempt), self.world, writers, self._sweep)

    def failed(self) -> bool:
        """Whether the running save has failed on this rank, so that all ranks should call `finish`."""
        return self._save is not None and self._save.error is not None

    def finish(self) -> None:
        """Waits until the running save is committed; raises the same `StorageError` on all ranks if it fails.

        Raises `StaleAttempt` if a newer attempt has started.
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
        if committed:  # errors after the commit do not count: a newer attempt may have loaded the checkpoint
            return
        if error is not None:
            errors.append(error)

        def remove() -> None:
            if self.world.rank != 0:
                return
            with suppress(OSError):  # the first error is raised below, and the next attempt removes the files
                if save.id not in self._store.committed():  # else a newer attempt may have loaded it
                    self._store.remove(save.id)
                self._store.fence.check(save.id.attempt)

        self._on_all_ranks(remove)
        raise StorageError(
            f"checkpoint at step {save.id.step} could not be written to {self._store.url} "
            f"({'; '.join(map(str, errors))}); the earlier ones are kept. "
            "Free space or repair the storage, then run the same command again"
        )

    def _sweep(self) -> None:
        """Removes checkpoints that are no longer needed; after an error the next save tries again."""
        try:
            retry(lambda: self._store.sweep(attempt=self.attempt, base=self._base, keep=self.keep))
        except StaleAttempt:
            pass  # the next save raises it
        except OSError as error:
            logger.info(f"{self._store.url}: older checkpoints cannot be removed ({error}); the next save tries again")

    @contextmanager
    def _verified(self, checkpoint: CheckpointId) -> Iterator[tuple[Path, list[str]]]:
        """The checkpoint's folder on this machine, and the faults that the ranks found in its files.

        If the storage is a path, all ranks together verify every file once. Otherwise the first rank of each machine
        copies the checkpoint and verifies the copies.
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
                self.world.barrier()  # no rank removes a copy that another still loads

    def _fetch(self, checkpoint: CheckpointId, copy: Path) -> list[str]:
        """Copies a remote checkpoint to this machine; returns its faults."""
        with suppress(ValueError):  # `_faults` reports a damaged manifest
            for path in retry(lambda: self._store.manifest(checkpoint)).files:
                with suppress(*NO_FILE):  # `_faults` reports a missing file
                    retry(partial(storage.copy_here, self._store.place(checkpoint, path), copy / path))
        return self._faults(checkpoint, copy, 0, 1)

    def _faults(self, checkpoint: CheckpointId, folder: Path, rank: int, size: int) -> list[str]:
        """Faults of the files in a local folder; checks every `size`-th file of the manifest from `rank` on."""
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
                if type(error) is StorageError:  # no permission: the checkpoint may be whole
                    raise
                faults.append(f"{path.name} cannot be read ({error})")
        if rank == 0:  # a part might read files that the manifest does not list
            names = (path.relative_to(folder).as_posix() for path in folder.glob("[!.]*/**/*") if path.is_file())
            faults += [f"{name} is not in its {MANIFEST}" for name in names if name not in files]
        return faults

    def _on_all_ranks(self, act: Callable[[], Result]) -> list[Result]:
        """The results of `act` by rank, on every rank; all ranks raise the error of the first rank that fails."""
        local_outcome: Result | UserError | StorageError
        try:
            local_outcome = act()
        except (UserError, StorageError) as error:
            local_outcome = error
        results = []
        for outcome in self.world.gather(local_outcome):
            if isinstance(outcome, UserError | StorageError):
                raise outcome
            results.append(outcome)
        return results


@dataclass(eq=False)
class _Save:
    """One running save: a thread writes this rank's files, and on rank 0 commits the checkpoint."""

    store: CheckpointStore
    id: CheckpointId
    world: World
    writers: Mapping[str, Writer]
    on_commit: Callable[[], None]
    """Called on rank 0 after the commit."""
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
        except Exception as error:  # noqa: BLE001 (`finish` raises it)
            self.error = portable(error)
        finally:
            self.written.set()

    def _write(self) -> None:
        """Writes this rank's files to a temporary folder, hashes, flushes and moves each, and lists them last."""
        files = {}
        folder = storage.local_path(self.store.place(self.id))
        with ExitStack() as stack:
            if folder is None:
                scratch = stack.enter_context(lasting_folder("saving", secrets.token_hex(8)))
            else:  # a rename needs the same disk
                with write_errors(folder):
                    folder.mkdir(parents=True, exist_ok=True)
                    storage.sync(folder.parent)
                scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".rank-", dir=folder)))
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
        """Publishes the manifest after all ranks have listed their files, unless the save is cancelled first."""
        names, wait_s = [self._list_name(rank) for rank in range(self.world.size)], POLL_S
        while not set(names).issubset(retry(lambda: storage.list_names(self.store.place(self.id)))):
            if self.cancelled.wait(wait_s):
                return
            retry(lambda: self.store.fence.check(self.id.attempt))  # a newer attempt may have removed the lists
            wait_s = min(LONGEST_POLL_S, 2 * wait_s)  # on remote storage each listing is a request
        files: dict[str, FileFacts] = {}
        for name in names:
            files |= retry(partial(read_files, self.store.place(self.id, name)))[0]
        retry(lambda: self.store.publish(Manifest(self.id, self.world.size, files)))
        self.committed = True
