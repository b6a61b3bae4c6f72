"""`image_path: s3://bucket/images` and its like: images from a prefix of an object store.

A row's image is found as in a folder: by its relative path below the prefix, or by the longest ending of its URL's path that
exists there; a URL of the store itself, such as s3://bucket/images/a.png, is that object. Objects are fetched ahead by
threads of their own, many at a time, and given to the loaders in the order of the rows, so that batches, and with them the
scores' last digits, are those of a folder with the same files.
"""
import collections
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from addons.images.memory import reserve_for_image
from addons.stores import SCHEME
from addons.stores.remote import STORE, ExpiredCredentials, RemoteStore
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

FETCHING_THREADS = 64  # that `fetch_concurrency: auto` means here: each holds a connection
AHEAD = 4  # images that are fetched or held for each such thread
HELD_BYTES = 256 << 20  # of fetched images that wait for a loader; beyond it nothing more is fetched
MOST_KEY_BYTES = 1024  # what object stores allow


def open_source(config: Config, threads: int) -> "PrefixSource":
    """What reads an image below the prefix `image_path`. Raises Trouble (exit 3) where there is nothing below it."""
    if not STORE.is_folder(config.image_path.rstrip("/")):
        raise Trouble(EXIT_INPUT, f"image_path {config.image_path!r}: there are no objects below it")
    return open_prefix(config, config.image_path)


def open_prefix(config: Config, prefix: str) -> "PrefixSource":
    """What reads an image below a prefix."""
    wanted = FETCHING_THREADS if config.fetch_concurrency == "auto" else config.fetch_concurrency
    return PrefixSource(STORE, prefix.rstrip("/"), config.max_image_bytes, wanted)


class PrefixSource:
    """Reads the images below a prefix, from any thread."""

    def __init__(self, store: RemoteStore, prefix: str, max_bytes: int, fetching_threads: int) -> None:
        self._store = store
        self._prefix = prefix
        self._max_bytes = max_bytes
        self._fetching_threads = fetching_threads
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
        self._pool = PrefixPool(self, threads, self._fetching_threads) if threads else None
        return self._pool or ImagePool(threads)

    def fetch(self, source: str) -> bytes:
        """Get the image's bytes. Raises RowFailure, and Trouble (exit 3) for credentials that are no longer valid."""
        names = names_in_folder(source)
        if not names:
            raise RowFailure("missing", "no file name")
        for name in names:
            key = self._key_of(name)
            data = self._get(key) if key else None
            if data is not None:
                return data
        raise RowFailure("missing", "no such file in image_path")

    def _key_of(self, name: str) -> str:
        """The path below the prefix that a row's name means, "" for one that no object has; RowFailure for one outside."""
        if SCHEME.match(name):
            if not name.startswith(self._prefix + "/"):
                raise RowFailure("forbidden", "outside image_path")
            return name[len(self._prefix) + 1:]
        steps: list[str] = []
        for step in name.split("/"):
            if step == ".." and not steps:
                raise RowFailure("forbidden", "outside image_path")
            if step == "..":
                steps.pop()
            elif step not in ("", "."):
                steps.append(step)
        if name.startswith("/"):
            raise RowFailure("forbidden", "outside image_path")
        key = "/".join(steps)
        return key if is_text(key) and "\0" not in key and len(key.encode()) <= MOST_KEY_BYTES else ""

    def _get(self, key: str) -> bytes | None:
        """The object's bytes; None if there is none."""
        path = f"{self._prefix}/{key}"
        try:
            data = self._store.read_up_to(path, self._max_bytes + 1)
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

    def __init__(self, source: PrefixSource, threads: int, fetching_threads: int) -> None:
        super().__init__(threads)
        self._source = source
        self._fetchers = ThreadPoolExecutor(fetching_threads, "fetcher")
        self._window = max(self._window, threads + 8)
        self._most_ahead = AHEAD * fetching_threads
        self._lock = threading.Lock()
        self._to_fetch: collections.deque[str] = collections.deque()
        self._fetched: dict[str, collections.deque[Future[bytes]]] = {}
        self._ahead = 0  # being fetched, or fetched and not taken
        self._held_bytes = 0

    def add(self, load: Callable[[str], Loaded], sources: Iterable[str]) -> None:
        """See LoaderPool."""
        names = list(sources)
        with self._lock:
            self._to_fetch.extend(filter(None, (name.strip() for name in names)))
        self._fetch_more()
        super().add(load, names)

    def _fetch_more(self) -> None:
        with self._lock:
            while self._to_fetch and self._ahead < self._most_ahead and self._held_bytes < HELD_BYTES:
                source = self._to_fetch.popleft()
                self._ahead += 1
                future = self._fetchers.submit(self._fetch, source)
                self._fetched.setdefault(source, collections.deque()).append(future)

    def _fetch(self, source: str) -> bytes:
        data = self._source.fetch(source)
        with self._lock:
            self._held_bytes += len(data)
        return data

    def take_fetched(self, source: str) -> bytes | None:
        """What was fetched of `source`, waiting for it; None where it has not been begun. Raises what fetching raised."""
        with self._lock:
            futures = self._fetched.get(source)
            future = futures.popleft() if futures else None
            if futures is not None and not futures:
                del self._fetched[source]
            if future is None and source in self._to_fetch:
                self._to_fetch.remove(source)  # the caller fetches it, now
        if future is None:
            return None
        try:
            data = future.result()
        finally:
            with self._lock:
                self._ahead -= 1
                if future.done() and not future.cancelled() and future.exception() is None:
                    self._held_bytes -= len(future.result())
            self._fetch_more()
        return data

    def close(self) -> None:
        """See LoaderPool."""
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        super().close()
