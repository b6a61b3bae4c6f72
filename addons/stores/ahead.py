"""Reads the parts of a run ahead of the one who reads them all in order, so that nobody waits for the network between two.

Whoever sums up a run reads every part, and the times next to it, one after the other: at 20 ms each, 10,000 parts would take
minutes. Only the thread that has asked for it is served, each file once, and it finds out as ever whether what it reads is what
it looked at before.
"""
import collections
import threading
from collections.abc import Mapping

from addons.stores import FileInfo
from addons.stores.remote import STORE, Range

AHEAD = 128  # files of each kind that are read, or wait to be taken
HELD_BYTES = 64 << 20  # of parts that are read or wait; a larger one is read alone
SUFFIXES = (".parquet", ".json")


class _Queue:
    """The files of one kind: those that are left to be read, and those that are being read or wait."""

    def __init__(self, names: list[str]) -> None:
        self.left = collections.deque(names)
        self.coming: dict[str, Range] = {}
        self.held_bytes = 0


class ReadAhead:
    """The files of a folder that are read in order, for one thread."""

    def __init__(self, folder: str, listed: Mapping[str, FileInfo]) -> None:
        self.thread = threading.get_ident()
        self._folder = folder
        self._sizes = {name: info.bytes for name, info in listed.items() if name.startswith("part-") and info.bytes}
        self._queues = {suffix: _Queue(sorted(name for name in self._sizes if name.endswith(suffix))) for suffix in SUFFIXES}

    def take(self, name: str) -> bytes | None:
        """The bytes of a file, waiting for it; None for one that is not being read. Raises what reading it raised."""
        queue = self._queues.get(name[name.rfind("."):])
        if queue is None or name not in self._sizes:
            return None
        coming = queue.coming.pop(name, None)
        if coming is not None:
            queue.held_bytes -= self._sizes[name]
        while queue.left and queue.left[0] <= name:  # the first of all, which whoever asks for it reads
            queue.left.popleft()
        if len(queue.coming) <= AHEAD // 2:  # not one by one, each of which would wake another thread
            self._read_more(queue)
        return coming.result() if coming else None

    def _read_more(self, queue: _Queue) -> None:
        following: list[str] = []
        while queue.left and len(queue.coming) + len(following) < AHEAD:
            size = self._sizes[queue.left[0]]
            if queue.held_bytes + size > HELD_BYTES:
                break
            queue.held_bytes += size
            following.append(queue.left.popleft())
        ranges = STORE.submit_ranges([(f"{self._folder}/{name}", 0, self._sizes[name]) for name in following])
        queue.coming.update(zip(following, ranges, strict=True))


_FOLDERS: dict[str, ReadAhead] = {}


def begin(folder: str, listed: Mapping[str, FileInfo]) -> None:
    """From now on read the parts of a folder ahead of this thread, which reads them in order."""
    end(folder)
    _FOLDERS[folder] = ReadAhead(folder, listed)


def end(folder: str) -> None:
    """Read no more ahead in a folder: whoever reads there wants what is there now."""
    _FOLDERS.pop(folder, None)


def take(path: str) -> bytes | None:
    """What was read ahead of a file, None for nothing. Raises OSError where it could not be read."""
    folder, _, name = path.rpartition("/")
    reading = _FOLDERS.get(folder)
    return reading.take(name) if reading and reading.thread == threading.get_ident() else None
