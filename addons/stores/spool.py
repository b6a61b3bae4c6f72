"""Files of an object store that are read all over, such as tars: each is fetched once, as a stream, to a temporary file.

At most a few lie on the disk at a time, in a folder that ends with the process; what a killed process left is removed by the
next one.
"""
import collections
import contextlib
import errno
import functools
import itertools
import math
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import psutil

from addons.inputs.files import InputFile, is_other
from addons.stores import SCHEME, FileInfo, find_store
from addons.stores.remote import RemoteStore
from image_text_sim_clip import Json

AHEAD = 4  # files that are fetched side by side when all are read in turn
KEPT = 3  # files that are kept of those that were asked for last: the loaders may still be at the one before
COPY_BYTES = 16 << 20  # that are asked for at a time
FOLDER_NAME = "image_text_sim_clip-spool-"


@functools.cache
def spool_folder() -> pathlib.Path:
    """This process's folder for fetched files."""
    place = pathlib.Path(tempfile.gettempdir())
    for left in place.glob(f"{FOLDER_NAME}*"):
        number = left.name.removeprefix(FOLDER_NAME).partition("-")[0]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            shutil.rmtree(left, ignore_errors=True)
    holder = tempfile.TemporaryDirectory(prefix=f"{FOLDER_NAME}{psutil.Process().pid}-", ignore_cleanup_errors=True)
    _HOLDERS.append(holder)
    return pathlib.Path(holder.name)


_NUMBERS = itertools.count()
_HOLDERS: list["tempfile.TemporaryDirectory[str]"] = []  # each ends with the process


def fetch(file: InputFile, number: int, side_suffix: str, planned: Json | None = None) -> InputFile:
    """Fetch a file, and the one next to it with `side_suffix` if it is there; where they lie now.

    Raises OSError, also for one that is no longer what its entry `planned` of manifest.json says.
    """
    target = spool_folder() / f"{number}-{next(_NUMBERS)}.fetched"  # each its own: other inputs have a file of this number too
    copy(file, target, planned)
    side = file.next_to(side_suffix)
    if side.info() is not None:
        copy(side, target.with_suffix(side_suffix))
    return InputFile(file.name, str(target))


def copy(file: InputFile, target: pathlib.Path, planned: Json | None = None) -> None:
    """Copy an object to a file of this disk, in order. OSError for one that is replaced meanwhile or cut short."""
    before = look_at(file)
    if planned is not None and is_other(before, planned):
        raise OSError(errno.EREMOTEIO, "it has been replaced since the run was planned", file.path)
    with target.open("wb") as copied:
        for start in range(0, before.bytes, COPY_BYTES):
            copied.write(file.read_range(start, min(start + COPY_BYTES, before.bytes)))
    if look_at(file) != before or target.stat().st_size != before.bytes:
        raise OSError(errno.EREMOTEIO, "it was replaced while it was read", file.path)


def look_at(file: InputFile) -> FileInfo:
    """Size, time and version of an object as they are now. Raises FileNotFoundError."""
    store = find_store(file.path)
    info = store.stat(file.path) if isinstance(store, RemoteStore) else store.info(file.path)
    if info is None:
        raise FileNotFoundError(errno.ENOENT, "no such file", file.path)
    return info


def count_requests(entry: Json) -> Json:
    """The requests and bytes that it takes to fetch a file with this entry in manifest.json, and the one next to it."""
    sizes = [entry["bytes"], *([entry["side_bytes"]] if entry.get("side_bytes") is not None else [])]
    looks = 2 * len(sizes) + 1  # before and after each, and whether there is one next to it
    return {"HEAD": looks, "GET": sum(math.ceil(size / COPY_BYTES) for size in sizes), "bytes_read": sum(sizes)}


def remove(file: InputFile, side_suffix: str) -> None:
    """Remove a fetched file and the one next to it."""
    path = pathlib.Path(file.path)
    path.unlink(missing_ok=True)
    path.with_suffix(side_suffix).unlink(missing_ok=True)


def fetch_in_turn(files: list[InputFile], side_suffix: str) -> Iterator[InputFile]:
    """Each file where it can be read all over: where it lies, or fetched, some ahead, until the next one is asked for."""
    if not files or not SCHEME.match(files[0].path):
        yield from files
        return
    waiting: collections.deque[Future[InputFile]] = collections.deque()
    numbered = enumerate(files)
    with ThreadPoolExecutor(AHEAD, "spool") as pool:
        try:
            while True:
                for number, file in numbered:
                    waiting.append(pool.submit(fetch, file, number, side_suffix))
                    if len(waiting) == AHEAD:
                        break
                if not waiting:
                    return
                fetched = waiting.popleft().result()
                yield fetched
                remove(fetched, side_suffix)
        finally:
            for future in waiting:
                future.cancel()
            for future in waiting:
                with contextlib.suppress(Exception):
                    remove(future.result(), side_suffix)


class Fetching(threading.Thread):
    """A file that is being fetched, which somebody will ask for, or nobody."""

    def __init__(self, number: int, fetch_file: Callable[[], InputFile]) -> None:
        super().__init__(name="spool", daemon=True)  # the end of the process does not wait for it
        self.number = number
        self._fetch = fetch_file
        self._fetched: InputFile | None = None
        self._error: OSError | None = None
        self.start()

    def run(self) -> None:
        """Fetch it."""
        try:
            self._fetched = self._fetch()
        except OSError as error:  # of a file that nobody may ask for
            self._error = error

    def take(self) -> InputFile:
        """Where it lies now, waiting for it. Raises OSError."""
        self.join()
        if self._error or self._fetched is None:
            raise self._error or OSError(errno.EREMOTEIO, "it could not be fetched")
        return self._fetched


class Spool:
    """The fetched files of one input that were asked for last, by their number, and the one that is asked for next.

    Whoever has asked for two files will ask for the next at the same distance: a worker goes through all of them, or through
    every n-th.
    """

    def __init__(self, files: list[InputFile], entries: list[Json], side_suffix: str) -> None:
        self._files = files
        self._entries = entries  # of manifest.json, one for each of the files
        self._side_suffix = side_suffix
        self._forget()

    def _forget(self) -> None:
        self._fetched: dict[int, InputFile] = {}
        self._asked: list[int] = []  # the last three
        self._next: Fetching | None = None

    def __getstate__(self) -> Json:
        """Without what was fetched: an engine may send it to another machine."""
        return {"_files": self._files, "_entries": self._entries, "_side_suffix": self._side_suffix}

    def __setstate__(self, state: Json) -> None:
        self.__dict__.update(state)
        self._forget()

    def fetch(self, number: int) -> InputFile:
        """The file of that number where it can be read all over. Raises OSError."""
        if not SCHEME.match(self._files[number].path):
            return self._files[number]
        if number not in self._fetched:
            self._fetched[number] = self._take(number)
            for old in list(self._fetched)[:-KEPT]:
                remove(self._fetched.pop(old), self._side_suffix)
            self._asked = [*self._asked[-2:], number]
            self._fetch_next()
        return self._fetched[number]

    def _take(self, number: int) -> InputFile:
        fetching = self._next
        self._next = None
        if fetching is None:
            return self._fetch(number)
        if fetching.number == number:
            return fetching.take()
        with contextlib.suppress(OSError):  # nobody wants it
            remove(fetching.take(), self._side_suffix)
        return self._fetch(number)

    def _fetch_next(self) -> None:
        """Begin to fetch the file that is asked for next, where the last distances between two tell which that is."""
        distances = {later - earlier for earlier, later in itertools.pairwise(self._asked)}
        if len(distances) == 1:
            number = self._asked[-1] + distances.pop()
            if self._asked[-1] < number < len(self._files):
                self._next = Fetching(number, functools.partial(self._fetch, number))

    def _fetch(self, number: int) -> InputFile:
        return fetch(self._files[number], number, self._side_suffix, self._entries[number])

    def find(self, number: int) -> InputFile:
        """The same without fetching: where it lies if it is not here."""
        return self._fetched.get(number, self._files[number])
