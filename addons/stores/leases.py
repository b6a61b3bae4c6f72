"""Who plans, settles and finalises a run in an object store: one process at a time, whoever holds the lease.

A lease is a row of objects with rising numbers (`.lock-000001`, `.lock-000002`, …), each created only where there is none, so
that of several processes one gets the next number. The highest number counts. Its holder writes the object anew every few
seconds; one that has not been written for LEASE_S by the store's own clock is of a dead process, and the next number may be
taken. An empty object is a lease that was given back.

No row depends on it: a process that was asleep for longer than its lease finds at its next commit that the run is another's,
because manifests and parts are created only where there is none, and every part bears the mark of its run.
"""
import contextlib
import functools
import os
import secrets
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from addons.stores.paths import StorePath, asking
from addons.stores.remote import STORE
from image_text_sim_clip import EXIT_CONFIG, INTERRUPTION, RUN_FILES, Config, Trouble, output_disk, say

LEASE_S = 15.0  # how long a lease holds that is not renewed
RENEW_S = 4.0
LOOK_AGAIN_S = 0.5
SAY_AFTER_S = 5.0


class Seen(NamedTuple):
    """An object of a lease: its number, its bytes (0: given back) and when it was written, in ns of the store's clock."""

    number: int
    bytes: int
    written_ns: int


class _Lease:
    """A lease that this process holds, renewed by a thread of its own."""

    def __init__(self, path: StorePath) -> None:
        self._path = path
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            with contextlib.suppress(OSError):  # tried again; a lease that runs out costs no row
                self._path.write_bytes(_ME)

    def give_back(self) -> None:
        """End it."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # it runs out by itself
            self._path.write_bytes(b"")


_ME = f"{os.getpid()}-{secrets.token_hex(8)}".encode()


@contextlib.contextmanager
def leased(folder: StorePath, name: str) -> Iterator[None]:
    """Hold the lease `name` in `folder` for the block, and wait for it; nothing where the store cannot tell who is first."""
    with output_disk(folder):
        has_order = can_create(str(folder))
    if not has_order:
        yield
        return
    with output_disk(folder):
        mine = _wait_for(folder, name)
    lease = _Lease(mine)
    try:
        yield
    finally:
        lease.give_back()


def _wait_for(folder: StorePath, name: str) -> StorePath:
    """The object that this process has created: it holds the lease."""
    since = time.monotonic()
    told = False
    while True:
        INTERRUPTION.check()
        seen = _look(folder, name)
        last = max(seen, default=Seen(0, 0, 0))
        if not last.bytes or _has_run_out(folder, name, last):
            mine = folder / f"{name}-{last.number + 1:06d}"
            if _create(mine) and max(_look(folder, name)).number == last.number + 1:
                for old in seen:
                    (folder / f"{name}-{old.number:06d}").unlink(missing_ok=True)
                return mine
            continue
        if not told and time.monotonic() - since > SAY_AFTER_S:
            told = True
            say(f"{folder}: another process is planning or finishing this run; waiting for it")
        time.sleep(LOOK_AGAIN_S)


def _create(path: StorePath) -> bool:
    try:
        path.create(_ME)
    except FileExistsError:  # somebody's; or a request of ours that came through when its answer did not
        return path.read_bytes() == _ME
    return True


def _look(folder: StorePath, name: str) -> list[Seen]:
    """The objects of the lease that are there."""
    found = []
    with asking(folder):
        listed = STORE.list_folder(str(folder))
    for path, info in listed:
        number = path.rpartition("/")[2].removeprefix(name + "-")
        if info and path.rpartition("/")[2].startswith(name + "-") and number.isdigit():
            found.append(Seen(int(number), info.bytes, info.mtime_ns))
    return found


def _has_run_out(folder: StorePath, name: str, lease: Seen) -> bool:
    """Whether the lease is older than LEASE_S by the store's clock, which an object written now tells."""
    probe = folder / f"{name}-now-{_ME.decode()}"
    probe.write_bytes(b"")
    try:
        now_ns = STORE.stat(str(probe)).mtime_ns
    finally:
        probe.unlink(missing_ok=True)
    return now_ns - lease.written_ns > LEASE_S * 1e9


PROBE = ".create-"
TRIES = 3  # whoever finishes a run takes probes away, which may be that of a worker that has just begun


@functools.cache
def can_create(folder: str) -> bool:
    """Whether the store refuses to create an object that is there already."""
    probe = StorePath(folder) / f"{PROBE}{_ME.decode()}"
    try:
        for _ in range(2 * TRIES):
            probe.create(b"")
    except FileExistsError:
        return True
    except OSError as error:
        if "not implemented" not in str(error):  # as some stores answer that know no conditional writes
            raise
    finally:
        probe.unlink(missing_ok=True)
    return False


def remove_probes(folder: StorePath) -> None:
    """Take away what `can_create` of killed workers has left, and what they had sent of large files; under the run's lease."""
    with asking(folder):
        listed = STORE.list_folder(str(folder))
    for path, _ in listed:
        if path.rpartition("/")[2].startswith(PROBE):
            StorePath(path).unlink(missing_ok=True)
    abort_uploads(folder)


MOST_UPLOAD_S = 86_400  # how old an unfinished upload is that no process is at any more


def abort_uploads(folder: StorePath) -> None:
    """Give up the unfinished uploads of this program's files, which S3 keeps, unseen and paid for, of killed processes.

    Of a file that only the holder of the lease writes at once, of others when they are old. Who may not list them, or give
    them up, leaves that to a rule of the bucket.
    """
    with contextlib.suppress(OSError):
        for upload in STORE.list_uploads(str(folder)):
            name = upload.path.removeprefix(f"{folder}/")
            is_mine = name in RUN_FILES or name.startswith(("parts/part-", "curated/"))
            if name in RUN_FILES or (is_mine and time.time() - upload.begun_s > MOST_UPLOAD_S):
                STORE.abort_upload(upload)


def check_workers(config: Config, folder: StorePath) -> None:
    """Raise Trouble (exit 2) where several workers are to share a store that cannot tell who is first."""
    launched = any(os.environ.get(name, "1") not in ("", "1") for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
    is_alone = config.engine in ("auto", "local") and not launched and "SLURM_ARRAY_TASK_ID" not in os.environ
    with output_disk(folder):
        has_order = is_alone or can_create(str(folder))
    if not has_order:
        raise Trouble(EXIT_CONFIG, f"output_path {config.output_path!r}: this store cannot create an object only where there "
                                   "is none, so one worker alone can write there: take engine: local, or another store")
