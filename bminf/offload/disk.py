"""Blobs that wait in a file: the file, the thread that reads it, and reading ahead.

The file is one nameless temporary file, read straight into a slot, or into staging buffers in host
memory before they are used; what lies in a file of the model, as it is to be read, stays there and
is on the disk once. A thread reads the next blobs as soon as a buffer is free, in the order learned
from the last pass. What is done with a blob, such as queueing its transfer to a device, is
handed over as a job. Jobs are done in the order they are given, also those that need nothing from
the file: of two transfers into one slot, the later one must be the last. A wrong guess costs one
read that is waited for.

Nothing here knows of devices. A buffer is free again when a function says so by returning.
"""

from __future__ import annotations

import atexit
import mmap
import os
import shutil
import tempfile
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from bminf.checkpoint.stored import InFile
from bminf.errors import ArgumentError, OffloadError
from bminf.units import format_bytes


class Outcome:
    """Whether a job has ended, and with which error.

    As concurrent.futures.Future, of which it has what is used here: one is made for every copy, and
    that one takes 17 Python calls where this takes four.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._is_done = False
        self._in_progress = threading.Lock()
        self._in_progress.acquire()

    def end(self, error: BaseException | None = None) -> None:
        """The job has ended; called once."""
        self.error = error
        self._is_done = True  # first, so that an interrupt in wait() leaves nobody waiting
        self._in_progress.release()

    def done(self) -> bool:
        return self._is_done

    def wait(self, timeout_s: float = -1) -> None:
        """Return when the job has ended. Raises TimeoutError."""
        if self._is_done:
            return
        if not self._in_progress.acquire(timeout=timeout_s):
            raise TimeoutError
        self._in_progress.release()

    def result(self, timeout_s: float = -1) -> None:
        """As wait(), and raise what the job raised."""
        if not self._is_done:
            self.wait(timeout_s)
        if self.error is not None:
            raise self.error


AT_ONCE = Outcome()
"""Of what was done by the thread that asked for it."""
AT_ONCE.end()

_Job = tuple[Callable[[], object], Outcome]
_File = tempfile._TemporaryFileWrapper


class Reader:
    """A daemon thread with a queue.

    No executor: all executors of a process share a lock, and hold it while they start a thread.
    The garbage collector may find a dead model in just that moment, and its finalizer would wait
    for that lock forever. SimpleQueue.put is made for finalizers: stop() never waits.
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._last = AT_ONCE
        # The thread knows the queue only, so that a model that nobody holds can be collected.
        self._thread = threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], object]) -> Outcome:
        """Do `job` after all that was submitted before; the outcome holds its error."""
        self._last = outcome = Outcome()  # first, so that an interrupt leaves no job unseen
        self._jobs.put((job, outcome))
        return outcome

    def is_idle(self) -> bool:
        """Whether all jobs have ended, where only one thread submits at a time."""
        return self._last.done()

    def stop(self) -> None:
        """End the thread once all jobs are done; it is not waited for."""
        self._jobs.put(None)

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()


def _work(jobs: SimpleQueue[_Job | None]) -> None:
    while (given := jobs.get()) is not None:
        job, outcome = given
        try:
            job()
        except BaseException as error:
            outcome.end(error)
        else:
            outcome.end()
        del given, job, outcome  # an idle thread keeps nothing alive


_MEMORY_FILE_SYSTEMS = {"tmpfs", "ramfs"}


class FileStore:
    """Blobs of given sizes in a temporary file of `offload_dir`.

    The file has no name where the system allows that, and vanishes with the process in any case.
    Its room is reserved at once, so that a full disk is found before anything is moved.
    lying: blobs, by number, that are read from other files as they lie there, until they are
    written to. The first read of each compares its checksum, and raises CheckpointError.
    Raises OffloadError where the folder cannot be written or has not enough room.
    """

    def __init__(
        self,
        blob_bytes: Sequence[int],
        offload_dir: str | Path | None = None,
        lying: Mapping[int, InFile] | None = None,
    ) -> None:
        self._blob_bytes = list(blob_bytes)
        self._lying = {block: _Lying(run) for block, run in (lying or {}).items()}
        own = [0 if block in self._lying else size for block, size in enumerate(blob_bytes)]
        self._offsets, self._end = _offsets(own)
        if offload_dir is not None and not isinstance(offload_dir, str | os.PathLike):
            raise ArgumentError(
                f"offload_dir={offload_dir!r} is a {type(offload_dir).__name__}; give a path"
            )
        try:
            folder = offload_folder(offload_dir)
        except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a NUL
            raise OffloadError(f"offload_dir={offload_dir!r} is not a folder: {error}") from error
        self._file = _open(folder, self._end)
        self._descriptor = self._file.fileno()
        weakref.finalize(self, self._file.close)

    def is_lying(self, block: int) -> bool:
        """Whether a blob is read from another file, so that nothing has to be written."""
        return block in self._lying

    def write(self, block: int, blob: torch.Tensor, start: int = 0) -> None:
        """Keep a blob, or the part of one from byte `start` on. blob: (bytes,) uint8, CPU."""
        if block in self._lying:
            self._take(block)
        self._transfer("writing", _write_at, bytes_of(blob), self._offsets[block] + start)

    def read_into(self, block: int, blob: torch.Tensor | memoryview) -> None:
        """Fetch a blob. blob: (bytes of the block,) uint8, CPU; it is overwritten."""
        lying = self._lying.get(block)
        if lying is not None and not lying.is_compared:
            lying.compare_into(blob)
            return
        data = bytes_of(blob) if isinstance(blob, torch.Tensor) else blob
        start = self._offsets[block] if lying is None else lying.run.offset
        self._transfer("reading", _read_at, data, start, lying)

    def read_cached(self, block: int, blob: memoryview) -> bool:
        """Fetch a blob if it is in the page cache; whether it was.

        Where not, bytes of `blob` may be overwritten. Errors are left to read_into(), too.
        """
        lying = self._lying.get(block)
        if lying is not None and not lying.is_compared:
            return False
        start = self._offsets[block] if lying is None else lying.run.offset
        try:
            return _read_cached_at(lying or self._file, blob, start) == len(blob)
        except (OSError, ValueError, NotImplementedError):  # the last one: the C library is older
            return False

    def _take(self, block: int) -> None:
        """Move a blob from where it lies into the temporary file, to be written to."""
        blob = self.map(block)
        offset = -(-self._end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._transfer("writing", _write_at, bytes_of(blob), offset)
        self._offsets[block], self._end = offset, offset + len(blob)
        del self._lying[block]

    def _transfer(
        self,
        what: str,
        move: Callable[[Any, memoryview, int], int],
        data: memoryview,
        start: int,
        lying: _Lying | None = None,
    ) -> None:
        try:
            while data:
                count = move(lying or self._file, data, start)
                if count == 0:
                    raise OSError("the file is shorter than it was")
                data, start = data[count:], start + count
        except (OSError, ValueError) as error:
            place = "" if lying is None else f" from {lying.run.file.path}"
            raise OffloadError(f"{what} a streamed block{place} failed: {error}") from error

    def map(self, block: int) -> torch.Tensor:
        """The blob as (bytes of the block,) uint8, mapped: pages are read when they are touched.

        Writing to it changes a private copy. It stays valid after close().
        """
        if block in self._lying:
            return self._lying[block].run.read()
        nbytes = self._blob_bytes[block]
        region = mmap.mmap(
            self._descriptor, nbytes, access=mmap.ACCESS_COPY, offset=self._offsets[block]
        )
        with torch.inference_mode(False):
            return torch.frombuffer(region, dtype=torch.uint8)

    def close(self) -> None:
        self._file.close()
        self._lying = {}


class _Lying:
    """A blob in a file that was there before, which stays open.

    is_compared: whether its checksum was compared, and it is read straight from then on.
    """

    def __init__(self, run: InFile) -> None:
        self.run, self.is_compared = run, False
        self._opened = run.file.opened()

    def fileno(self) -> int:
        return self._opened.fd

    def compare_into(self, blob: torch.Tensor | memoryview) -> None:
        """Read it for the first time.   Raises CheckpointError."""
        with torch.inference_mode(False):
            if not isinstance(blob, torch.Tensor):
                blob = torch.frombuffer(blob, dtype=torch.uint8)
            self.run.read_into(blob)
        self.is_compared = True


def _offsets(blob_bytes: Sequence[int]) -> tuple[list[int], int]:
    """Where each blob starts, such that it can be mapped, and where the last one ends."""
    offsets, end = [], 0
    for nbytes in blob_bytes:
        offsets.append(-(-end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY)
        end = offsets[-1] + nbytes
    return offsets, end


def _open(folder: Path, nbytes: int) -> _File[bytes]:
    try:
        free = shutil.disk_usage(folder).free
        if free < nbytes:
            raise OSError(f"{format_bytes(free)} are free there")
        file = tempfile.TemporaryFile(dir=folder, buffering=0)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(1, nbytes))
            else:
                os.ftruncate(file.fileno(), nbytes)
        except BaseException:
            file.close()
            raise
    except OSError as error:
        raise OffloadError(
            f"{format_bytes(nbytes)} of streamed blocks cannot be kept in {str(folder)!r}: "
            f"{error}; give a folder with room on a disk as offload_dir=..."
        ) from error
    return file  # type: ignore[return-value]


def offload_folder(offload_dir: str | Path | None) -> Path:
    """The folder to use; by default a temporary one that is not itself in memory."""
    if offload_dir is not None:
        folder = Path(offload_dir)
        if _file_system(folder) in _MEMORY_FILE_SYSTEMS:
            warnings.warn(
                f"offload_dir={str(folder)!r} lies in memory, so streamed blocks do not leave it; "
                "give a folder on a disk",
                stacklevel=2,
            )
        return folder
    folder, other = Path(tempfile.gettempdir()), Path("/var/tmp")
    if _file_system(folder) in _MEMORY_FILE_SYSTEMS and os.access(other, os.W_OK):
        return other
    return folder


def _file_system(folder: Path) -> str:
    """Its kind ("ext4", "tmpfs", ...), or "" where the system does not tell."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return ""
    path, best, kind = folder.resolve(), Path("/"), ""
    for line in mounts.read_text().splitlines():
        _, point, file_system, *_ = line.split()
        mount = Path(point.encode().decode("unicode_escape"))
        if path.is_relative_to(mount) and mount.is_relative_to(best):
            best, kind = mount, file_system
    return kind


def bytes_of(blob: torch.Tensor) -> memoryview:
    """The memory of `blob`: (bytes,) uint8, CPU."""
    return memoryview(blob.numpy())  # type: ignore[arg-type]


# preadv and pwrite move bytes at an offset in one call and without the GIL; Windows has neither.
if hasattr(os, "preadv"):

    def _read_at(file: Any, data: memoryview, start: int) -> int:
        return os.preadv(file.fileno(), [data], start)

    def _write_at(file: Any, data: memoryview, start: int) -> int:
        return os.pwrite(file.fileno(), data, start)

else:

    def _read_at(file: Any, data: memoryview, start: int) -> int:
        file.seek(start)
        return int(file.readinto(data) or 0)

    def _write_at(file: Any, data: memoryview, start: int) -> int:
        file.seek(start)
        return int(file.write(data))


# Linux moves what is in the page cache and stops where it would have to wait for the disk.
if hasattr(os, "RWF_NOWAIT"):

    def _read_cached_at(file: Any, data: memoryview, start: int) -> int:
        return os.preadv(file.fileno(), [data], start, os.RWF_NOWAIT)

else:

    def _read_cached_at(file: Any, data: memoryview, start: int) -> int:
        return 0


NUM_STAGES = 2

_ENDED = "the streaming ended before this block was read"

Wait = Callable[[], object]
"""Returns once a staging buffer may be overwritten."""


class Staging:
    """Which blob is in which staging buffer, and which one is read next, into which.

    Blobs are numbered 0 .. num_blobs - 1 as in the file. Neither bytes, threads nor a clock.
    held: for each buffer the blob that is in it, or is being read into it.
    """

    def __init__(self, num_blobs: int) -> None:
        self.held: list[int | None] = [None] * NUM_STAGES
        self._by_age = list(range(NUM_STAGES))  # the buffer that was filled longest ago is first
        self._follows = {blob: (blob + 1) % num_blobs for blob in range(num_blobs)}
        self._last_asked = num_blobs - 1

    def ask(self, blob: int) -> None:
        """`blob` is asked for now; it is expected there the next time."""
        self._follows[self._last_asked] = blob
        self._last_asked = blob

    def next_read(self, waited_for: Iterable[int]) -> tuple[int, int] | None:
        """(buffer, blob) of the next read, which begins now; None when all is there that can be.

        waited_for: blobs that were asked for and not used yet, in order; they come first.
        """
        wanted = self._wanted(waited_for)
        missing = [blob for blob in wanted if blob not in self.held]
        if not missing:
            return None
        stage = next(index for index in self._by_age if self.held[index] not in wanted)
        self._by_age.remove(stage)
        self._by_age.append(stage)
        self.held[stage] = missing[0]
        return stage, missing[0]

    def forget(self, blob: int) -> None:
        """What a buffer holds of `blob` is out of date, or was not read."""
        self.held = [None if held == blob else held for held in self.held]

    def _wanted(self, waited_for: Iterable[int]) -> list[int]:
        """The different blobs that the buffers shall hold: one each at most."""
        wanted, blob = list(waited_for), self._last_asked
        for _ in range(NUM_STAGES):
            blob = self._follows[blob]
            wanted.append(blob)
        return list(dict.fromkeys(wanted))[:NUM_STAGES]


@dataclass
class _Task:
    """A job to be done in its turn. blob: that it needs and is called with, or None."""

    blob: int | None
    job: Callable[[Any], Any]
    done: Outcome = field(default_factory=Outcome)


class ReadAhead:
    """Jobs in order, some of them with a blob out of `store` in a staging buffer.

    buffers: NUM_STAGES times (bytes of the largest blob,) uint8 on the CPU.
    reader: a thread for nothing else; it is ended by close() or release().
    """

    def __init__(
        self,
        store: FileStore,
        blob_bytes: Sequence[int],
        buffers: Sequence[torch.Tensor],
        reader: Reader,
    ) -> None:
        self._store, self._reader = store, reader
        self._blob_bytes, self._buffers = list(blob_bytes), list(buffers)
        self._is_free: list[Wait] = [_at_once] * NUM_STAGES  # returns when the last use has ended
        self._staging = Staging(len(self._blob_bytes))
        self._reading: int | None = None  # the buffer that is being filled
        self._tasks: deque[_Task] = deque()
        self._lock = threading.Lock()  # of all the above; held while a job is done, never to read
        self._is_closed = False  # set without the lock, for finalizers
        self._at_exit = partial(_close, weakref.ref(self))
        atexit.register(self._at_exit)

    def fetch(self, blob: int, use: Callable[[torch.Tensor], Wait]) -> Outcome:
        """Have use(buffer) called, once the buffer holds `blob` and all earlier jobs are done.

        use: gets (bytes of the blob,) uint8 and returns what waits until it need not be kept; uses
        of one buffer end in the order they began. It is called by this thread or by the reader.
        The outcome has its error, or OffloadError for a read that failed.
        """
        task = _Task(blob, use)
        with self._lock:
            self._staging.ask(blob)
            # One a fetch: a failed read ends its round, and whoever still waits has a round to
            # come. Before the task is queued, so that an interrupt leaves no task without one.
            self._reader.submit(self._read_ahead)
            self._enqueue(task)
        return task.done

    def do(self, job: Callable[[], object]) -> Outcome:
        """Have job() called after all earlier jobs: now, unless one of those waits for its blob."""
        task = _Task(None, lambda _: job())
        with self._lock:
            self._enqueue(task)
        return task.done

    def write(self, blob: int, data: torch.Tensor, start: int = 0) -> None:
        """Keep new bytes of `blob`, from byte `start` on, in the file. data: (bytes,) uint8, CPU.

        Jobs that were given before may still see the old ones.
        """
        try:
            self._store.write(blob, data, start)
        finally:
            with self._lock:
                self._staging.forget(blob)  # also if it is being read just now: see _end_read

    def close(self, finish: Callable[[], None]) -> None:
        """As release(), and wait until that is done. Raises what finish() raises."""
        finished = self.release(finish)
        self._reader.join()
        if finished.done():  # not where this was done before: the thread has ended
            finished.result()

    def release(self, finish: Callable[[], None]) -> Outcome:
        """Do no more jobs, then call finish() in the reader's thread; neither is waited for.

        For finalizers: it takes no lock. The file is closed, what waits gets an OffloadError. An
        interrupted call may be repeated, so finish() may be called twice.
        """
        self._is_closed = True
        finished = self._reader.submit(partial(self._finish, finish))
        self._reader.stop()
        return finished

    # ---- with the lock held ---------------------------------------------------------------------

    def _enqueue(self, task: _Task) -> None:
        if self._is_closed:
            task.done.end(OffloadError(_ENDED))
            return
        self._tasks.append(task)
        self._run_ready_tasks()

    def _run_ready_tasks(self) -> None:
        while self._tasks and not self._is_closed and self._is_ready(self._tasks[0]):
            self._run(self._tasks[0])

    def _is_ready(self, task: _Task) -> bool:
        held = self._staging.held
        return task.blob is None or (task.blob in held and held.index(task.blob) != self._reading)

    def _run(self, task: _Task) -> None:
        try:
            if task.blob is None:
                task.job(None)
            else:
                stage = self._staging.held.index(task.blob)
                self._is_free[stage] = task.job(self._blob_in(stage, task.blob))
            task.done.end()
        except BaseException as error:  # an interrupt, too, must not leave anybody waiting
            if not task.done.done():
                task.done.end(_as_offload_error(error))
            if not isinstance(error, Exception):
                raise
        finally:
            self._tasks.popleft()

    def _fail(self, error: Exception, blob: int | None = None) -> None:
        """Give up the jobs that wait for `blob`; None: all."""
        failed = [task for task in self._tasks if blob is None or task.blob == blob]
        for task in failed:
            self._tasks.remove(task)
            task.done.end(error)

    def _blob_in(self, stage: int, blob: int) -> torch.Tensor:
        return self._buffers[stage][: self._blob_bytes[blob]]

    # ---- in the reader's thread -----------------------------------------------------------------

    def _read_ahead(self) -> None:
        """Read until the buffers hold all they can; a failure ends it, so that none is repeated."""
        while (read := self._start_read()) is not None:
            stage, blob = read
            try:
                self._is_free[stage]()
                self._is_free[stage] = _at_once  # nobody uses a buffer that is being filled
                self._store.read_into(blob, self._blob_in(stage, blob))
            except Exception as error:
                self._end_read(blob, error)
                return
            self._end_read(blob)

    def _start_read(self) -> tuple[int, int] | None:
        with self._lock:
            if self._is_closed:
                return None
            read = self._staging.next_read(
                task.blob for task in self._tasks if task.blob is not None
            )
            if read is not None:
                self._reading = read[0]
            return read

    def _end_read(self, blob: int, error: Exception | None = None) -> None:
        with self._lock:
            # A blob that was written meanwhile is not held any more, and read anew if it is wanted.
            self._reading = None
            if error is not None:
                self._staging.forget(blob)
                self._fail(error, blob)
            self._run_ready_tasks()

    def _finish(self, finish: Callable[[], None]) -> None:
        with self._lock:
            self._fail(OffloadError(_ENDED))
        try:
            finish()
        finally:
            self._store.close()
            atexit.unregister(self._at_exit)


def _close(ahead: weakref.ref[ReadAhead]) -> None:
    # A thread that is inside a driver's call while the interpreter ends brings the process down.
    if (living := ahead()) is not None:
        living.close(_at_once)


def _at_once() -> None:
    """The wait for a buffer that is free."""


def _as_offload_error(error: BaseException) -> Exception:
    # An interrupt is for the thread it came to; who waits for the blob is to try again.
    if isinstance(error, Exception):
        return error
    return OffloadError(f"handing over a streamed block was cut short by {type(error).__name__}")
