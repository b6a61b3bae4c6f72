"""`image_path: s3://bucket/images` and its like: images from a prefix of an object store.

A row's image is found as in a folder: by its relative path below the prefix, or by the longest ending of its URL's path that
exists there, and if there is none, by another spelling of it; a URL of the store itself, such as s3://bucket/images/a.png, is
that object. Objects are fetched ahead, many at a time, and given to the loaders in the order of the rows, so that batches, and
with them the scores' last digits, are those of a folder with the same files.
"""
import collections
import functools
import itertools
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from addons.images.memory import reserve_for_image
from addons.images.spellings import other_spellings
from addons.stores import SCHEME
from addons.stores.remote import STORE, ExpiredCredentials, Range, RemoteStore
from image_text_sim_clip import (
    EXIT_INPUT,
    Config,
    ImagePool,
    Loaded,
    RowFailure,
    Trouble,
    is_text,
    names_in_folder,
)

AT_ONCE = 64  # what `fetch_concurrency: auto` means here: each holds a connection
AHEAD = 4  # images that are fetched or held for each of them
HELD_BYTES = 256 << 20  # of fetched images that wait for a loader; beyond it nothing more is fetched
MOST_KEY_BYTES = 1024  # what object stores allow


def open_source(config: Config, threads: int) -> "PrefixSource":
    """What reads an image below the prefix `image_path`. Raises Trouble (exit 3) where there is nothing below it."""
    if not STORE.is_folder(config.image_path.rstrip("/")):
        raise Trouble(EXIT_INPUT, f"image_path {config.image_path!r}: there are no objects below it")
    return open_prefix(config, config.image_path)


def open_prefix(config: Config, prefix: str) -> "PrefixSource":
    """What reads an image below a prefix."""
    wanted = AT_ONCE if config.fetch_concurrency == "auto" else config.fetch_concurrency
    return PrefixSource(STORE, prefix.rstrip("/"), config.max_image_bytes, wanted)


class PrefixSource:
    """Reads the images below a prefix, from any thread."""

    def __init__(self, store: RemoteStore, prefix: str, max_bytes: int, at_once: int) -> None:
        self._store = store
        self._prefix = prefix
        self._max_bytes = max_bytes
        self._at_once = at_once
        self._pool: PrefixPool | None = None

    def __call__(self, source: str) -> bytes:
        """The bytes of the image that `source` names; see ImageSource."""
        data = self._pool.take_fetched(source) if self._pool else None
        if data is None:
            data = self.fetch(source)
        reserve_for_image(len(data))
        return data

    def open_pool(self, threads: int) -> ImagePool:
        """The pool that loads a run's images, and fetches ahead of the loaders."""
        self._pool = PrefixPool(self, threads, self._at_once) if threads else None
        return self._pool or ImagePool(threads)

    def fetch(self, source: str, skipped: int = 0) -> bytes:
        """Get the image's bytes, but for what the first `skipped` of its names mean.

        Raises RowFailure, and Trouble (exit 3) for credentials that are no longer valid.
        """
        names = names_in_folder(source)
        if not names:
            raise RowFailure("missing", "no file name")
        for name in itertools.chain(names[skipped:], other_spellings(names)):
            key = self._key_of(name)
            data = self._get(self._path_of(key)) if key else None
            if data is not None:
                return data
        raise RowFailure("missing", "no such file in image_path")

    def begin(self, sources: list[str]) -> "list[Range | None]":
        """Begin to fetch what the first name of each source means; None for one of which that is no object's."""
        keys = [self._first_key(source) for source in sources]
        ranges = self._store.submit_ranges([(self._path_of(key), 0, self._max_bytes + 1) for key in keys if key], self._at_once)
        coming = iter(ranges)
        return [next(coming) if key else None for key in keys]

    def finish(self, source: str, begun: "Range | None") -> bytes:
        """The bytes of an image that was begun, waiting for them; raises as `fetch` does."""
        if begun is None:
            return self.fetch(source)
        data = self._get(begun.path, begun)
        return self.fetch(source, skipped=1) if data is None else data

    def _first_key(self, source: str) -> str:
        names = names_in_folder(source)
        try:
            return self._key_of(names[0]) if names else ""
        except RowFailure:  # told when it is fetched
            return ""

    def _path_of(self, key: str) -> str:
        return f"{self._prefix}/{key}"

    def _key_of(self, name: str) -> str:
        """The path below the prefix that a row's name means, "" for one that no object has; RowFailure for one outside."""
        if SCHEME.match(name):
            if not name.startswith(self._prefix + "/"):
                raise RowFailure("forbidden", "outside image_path")
            key = name[len(self._prefix) + 1:]
            if ".." in key.split("/"):  # no folder to a store, but to some that are asked on the way
                raise RowFailure("forbidden", "outside image_path")
            return key
        inside = self._prefix.partition("://")[2].split("/")
        steps = list(inside)
        for step in name.split("/"):
            if step == "..":
                del steps[-1:]
            elif step not in ("", "."):
                steps.append(step)
        if steps[:len(inside)] != inside:
            raise RowFailure("forbidden", "outside image_path")
        if name.startswith("/"):
            raise RowFailure("forbidden", "outside image_path")
        key = "/".join(steps[len(inside):])
        return key if is_text(key) and "\0" not in key and len(key.encode()) <= MOST_KEY_BYTES else ""

    def _get(self, path: str, begun: Range | None = None) -> bytes | None:
        """The object's bytes, which may be on their way; None if there is none."""
        try:
            data = self._store.read_up_to(path, self._max_bytes + 1, begun)
            if len(data) > self._max_bytes:
                raise RowFailure("too_large", f"{self._store.stat(path).bytes} bytes")
        except FileNotFoundError:
            return None
        except ExpiredCredentials as error:
            raise Trouble(EXIT_INPUT, f"cannot read {self._prefix}: {error.strerror}") from None
        except PermissionError:
            raise RowFailure("forbidden", "no permission to read the file") from None
        except TimeoutError:
            raise RowFailure("timeout", "the object store did not answer in time") from None
        except OSError:
            raise RowFailure("connect", "the object store did not answer") from None
        return data


class PrefixPool(ImagePool):
    """An ImagePool whose images are fetched before a loader thread takes them, so that no decoder waits for the network."""

    def __init__(self, source: PrefixSource, threads: int, at_once: int) -> None:
        super().__init__(threads)
        self._source = source
        self._window = max(self._window, threads + 8)
        self._at_once = at_once
        self._lock = threading.Lock()
        self._held_lock = threading.Lock()  # another one, as whoever counts may be called while the first is held
        self._to_fetch: collections.deque[str] = collections.deque()
        self._fetched: dict[str, collections.deque[Range | None]] = {}
        self._ahead = 0  # being fetched, or fetched and not taken
        self._held = 0  # of these, fetched
        self._held_bytes = 0

    def add(self, load: Callable[[str], Loaded], sources: Iterable[str]) -> None:
        """See LoaderPool."""
        names = list(sources)
        with self._lock:
            self._to_fetch.extend(name for name in names if name.strip())
        self._fetch_more()
        super().add(load, names)

    def _fetch_more(self) -> None:
        """Begin as many as may be on their way; not one by one, each of which would wake another thread."""
        with self._lock:
            on_their_way = self._ahead - self._held
            count = min(len(self._to_fetch), self._at_once - on_their_way, AHEAD * self._at_once - self._ahead)
            if count < min(len(self._to_fetch), max(1, self._at_once // 4)) or self._held_bytes > HELD_BYTES:
                return
            sources = [self._to_fetch.popleft() for _ in range(count)]
            self._ahead += count
            for source, begun in zip(sources, self._source.begin(sources), strict=True):
                self._fetched.setdefault(source, collections.deque()).append(begun)
                if begun:
                    begun.future.add_done_callback(self._count_held)

    def _count_held(self, future: "Future[bytes]", sign: int = 1) -> None:
        """Count a future that is done."""
        with self._held_lock:
            self._held += sign
            if not future.cancelled() and future.exception() is None:
                self._held_bytes += sign * len(future.result())

    def take_fetched(self, source: str) -> bytes | None:
        """What was fetched of `source`, waiting for it; None where it has not been begun. Raises what fetching raised."""
        with self._lock:
            waiting = self._fetched.get(source)
            is_begun = waiting is not None
            begun = waiting.popleft() if waiting else None
            if is_begun and not waiting:
                del self._fetched[source]
            if not is_begun and source in self._to_fetch:
                self._to_fetch.remove(source)  # the caller fetches it, now
        if not is_begun:
            return None
        try:
            return self._source.finish(source, begun)
        finally:
            if begun:  # done now, unless there was no waiting for it
                begun.future.add_done_callback(functools.partial(self._count_held, sign=-1))
            with self._lock:
                self._ahead -= 1
            self._fetch_more()

    def close(self) -> None:
        """See LoaderPool."""
        with self._lock:
            for begun in itertools.chain.from_iterable(self._fetched.values()):
                if begun:
                    begun.future.cancel()
        super().close()
