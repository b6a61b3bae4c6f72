"""Whatever fsspec knows by a scheme: s3://bucket/key, gs://, az://, hf://datasets/owner/name/file, memory:// and many more.

Credentials come from where each store's own tools look for them (the environment, ~/.aws, a machine's role, `hf auth login`),
or from the config's `storage_options`; none of them is ever written or shown. What fsspec's file systems and their clients
raise becomes an OSError whose text is one line without secrets. One client is shared by all threads of a process.
"""
import collections
import contextlib
import datetime
import errno
import functools
import io
import json
import logging
import os
import random
import re
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

import fsspec
import pyarrow as pa

from addons.stores import SCHEME, FileInfo, storage_options
from image_text_sim_clip import EXIT_CONFIG, EXIT_INPUT, Json, Trouble

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

    from addons.stores.s3_reader import S3Reader

# fsspec's names for what is no place of its own: this disk, archives, caches and wrappers around other places
NO_PLACES = {"file", "local", "data", "dir", "generic", "reference", "cached", "blockcache", "filecache", "simplecache", "tar",
             "zip", "libarchive", "async_wrapper", "asyncwrapper", "asynclocal"}
SCHEMES = tuple(sorted(set(fsspec.available_protocols()) - NO_PLACES))
READ_BLOCK_BYTES = 8 << 20  # of a file that is read from its beginning to its end
WRITE_BLOCK_BYTES = 16 << 20  # a smaller object is one PUT, a larger one a multipart upload in such pieces
LISTING_THREADS = 16
REQUEST_THREADS = 32
CONFLICT_PAUSES_S = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)  # before another try to create what others are creating, too
CONNECTIONS = 256  # that an S3 client may keep open
SECRET = re.compile(r"key|secret|token|password|passwd|credential|connection_string|sas", re.I)
SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "HF_TOKEN", "AZURE_STORAGE_KEY",
                    "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_CONNECTION_STRING",
                    "AZURE_CLIENT_SECRET")
NO_LONGER_VALID = ("ExpiredToken", "token has expired", "TokenRefreshRequired", "InvalidToken", "token included in the request "
                   "is expired", "InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed",
                   "Invalid Credentials", "invalid_grant",  # Google's, and the Hub's
                   "AuthenticationFailed", "InvalidAuthenticationInfo")  # Azure's


class ExpiredCredentials(PermissionError):
    """The store no longer takes the credentials: no file is to blame for that, and no further request will fare better."""


class Conflict(OSError):
    """Another process is writing the same object in this moment; S3 asks to try again."""


# ── Errors in one line, without secrets ───────────────────────────────────────────────────────────────────────────────

def _secrets_in(options: Json) -> Iterator[str]:
    """Texts in `storage_options` that are, by the name of their key, secrets."""
    for key, value in options.items():
        if isinstance(value, dict):
            yield from _secrets_in(value)
        elif isinstance(value, str) and SECRET.search(str(key)):
            yield value


def without_secrets(text: str) -> str:
    """`text` in one line, with *** for every secret of this process's storage_options and environment."""
    secrets = [*_secrets_in(storage_options("", ())), *(os.environ.get(name, "") for name in SECRET_VARIABLES)]
    for secret in secrets:
        if len(secret) >= 4:  # a shorter one is no secret, and would make holes in words
            text = text.replace(secret, "***")
    text = re.sub(r"([?&][^=&\s]*(?:sig|signature|token|key)[^=&\s]*=)[^&\s\"']+", r"\1***", text, flags=re.I)
    return " ".join(text.split())[:500]


def _describe_error(error: BaseException) -> str:
    """What went wrong, in one line."""
    said = [str(argument) for argument in error.args if isinstance(argument, str) and argument.strip()]
    text = without_secrets(said[0] if said and isinstance(error, OSError) else str(error))
    return text or type(error).__name__


def _is_about_credentials(error: BaseException) -> bool:
    """Whether the store has refused the credentials themselves; s3fs keeps the client's own error as the cause."""
    told = f"{error} {error.__cause__}"
    return any(text.lower() in told.lower() for text in NO_LONGER_VALID)


def _code_of(error: BaseException) -> int:
    """The HTTP status of the answer that an error tells of, 0 for none; its text may have any number, such as a part's."""
    for told in (error, error.__cause__):
        answer = getattr(told, "response", None)
        if isinstance(answer, dict):  # botocore's
            return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        for code in (getattr(answer, "status_code", None), getattr(told, "status_code", None), getattr(told, "code", None)):
            if str(code).isdigit():
                return int(str(code))
    return 0


@contextlib.contextmanager
def calling(path: str) -> Iterator[None]:
    """What a store's client raises in this block becomes an OSError: not found, exists, no permission, or anything else."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        if _code_of(error) in (401, 403):  # of a gated or private dataset the Hub's client says that there is none
            reason = f"no permission ({_describe_error(error.__cause__ or error)})"
            raise PermissionError(errno.EACCES, reason, path) from None
        said = _describe_error(error)
        reason = f"no such bucket or object ({said})" if SCHEME.match(said) else said  # gcsfs says an address and no more
        raise FileNotFoundError(errno.ENOENT, reason, path) from None
    except FileExistsError as error:
        raise FileExistsError(errno.EEXIST, "it exists already", path) from error
    except IsADirectoryError as error:
        raise IsADirectoryError(errno.EISDIR, "it is a folder", path) from error
    except PermissionError as error:
        kind = ExpiredCredentials if _is_about_credentials(error) else PermissionError
        raise kind(errno.EACCES, f"no permission ({_describe_error(error)})", path) from None
    except TimeoutError:
        raise TimeoutError(errno.ETIMEDOUT, "the store does not answer in time", path) from None
    except (Trouble, AssertionError, MemoryError):
        raise
    except Exception as error:  # each store's client has its own kinds
        code = _code_of(error)
        if code == 412 or "pre-condition" in str(error) or "ConditionNotMet" in str(error):
            raise FileExistsError(errno.EEXIST, "it exists already", path) from None
        if _is_about_credentials(error):
            raise ExpiredCredentials(errno.EACCES, f"no permission ({_describe_error(error)})", path) from None
        if code in (401, 403) or str(error).startswith("Forbidden: "):  # as gcsfs tells of 403
            raise PermissionError(errno.EACCES, f"no permission ({_describe_error(error)})", path) from None
        if code == 409:
            raise Conflict(errno.EREMOTEIO, f"the object store did not do it ({_describe_error(error)})", path) from None
        number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        number = errno.EREMOTEIO if number in (errno.EIO, errno.ENOENT) else number  # EIO is a disk's, and is never tried again
        reason = f"the object store did not do it ({type(error).__name__}: {_describe_error(error)})"
        raise OSError(number, reason, path) from None


# ── File systems ──────────────────────────────────────────────────────────────────────────────────────────────────────

def scheme_of(path: str) -> str:
    """The scheme of a URL, in small letters."""
    scheme = SCHEME.match(path)
    assert scheme
    return scheme[1].lower()


def open_file_system(path: str) -> "tuple[AbstractFileSystem, str]":
    """The file system that a URL lies in, and the path that it has there. Trouble (exit 2) for a package that is missing."""
    scheme = scheme_of(path)
    path = scheme + path[len(scheme):]
    try:
        kind = fsspec.get_filesystem_class(scheme)
        from_url = kind._get_kwargs_from_urls(path)
        options = json.dumps({**storage_options(scheme, SCHEMES), **from_url}, sort_keys=True, default=str)
        system = _open_file_system(scheme, options, os.getpid())
    except ImportError as error:
        raise Trouble(EXIT_CONFIG, f"the object store {scheme}:// needs a missing package ({without_secrets(str(error))}; "
                                   "pip install -r addons/requirements-cloud.txt)") from None
    except (TypeError, ValueError) as error:
        raise Trouble(EXIT_CONFIG, f"storage_options do not fit {scheme}:// ({without_secrets(str(error))})") from None
    return system, cast(str, kind._strip_protocol(path))


@functools.cache
def _open_file_system(scheme: str, options: str, process: int) -> "AbstractFileSystem":
    """One file system for all threads of a process: fsspec itself would make one for each thread."""
    chosen: dict[str, Any] = json.loads(options)
    if scheme in ("gs", "gcs"):
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs what it raises, with a traceback
    if scheme in ("s3", "s3a"):
        chosen["config_kwargs"] = {"max_pool_connections": CONNECTIONS, **chosen.get("config_kwargs", {})}
    return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True, **chosen)


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Threads for requests that no event loop can wait for."""
    return ThreadPoolExecutor(count, "requests")


# ── The store ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def _time_of(found: Json) -> int:
    """When an object was written, in ns, from what its store tells; 0 where it does not."""
    for key in ("LastModified", "last_modified", "modified", "mtime", "updated", "created"):
        moment = found.get(key)
        if isinstance(moment, str):
            with contextlib.suppress(ValueError):
                moment = datetime.datetime.fromisoformat(moment)
        if isinstance(moment, datetime.datetime):
            moment = moment.timestamp()
        if isinstance(moment, (int, float)):
            return int(moment * 1_000_000) * 1000
    return 0


def _version_of(found: Json) -> str:
    """What tells one version of an object from another; "" where its store has no such thing."""
    for key in ("ETag", "etag", "generation", "VersionId", "blob_id", "md5Hash", "content_md5"):
        if found.get(key):
            return str(found[key]).strip('"')
    return ""


def _info_of(found: Json) -> FileInfo:
    """Size, time and version; with a version the time in whole seconds, whose fractions some stores tell in listings alone."""
    version = _version_of(found)
    time_ns = _time_of(found)
    return FileInfo(int(found.get("size") or 0), time_ns - time_ns % 10**9 if version else time_ns, version)


class Traffic:
    """How many requests of each kind this process has sent, and how many bytes it has read and written."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts: collections.Counter[str] = collections.Counter()

    def add(self, kind: str, read: int = 0, written: int = 0) -> None:
        """Count a request."""
        with self._lock:
            self.counts.update({kind: 1, "bytes_read": read, "bytes_written": written})


TRAFFIC = Traffic()


class Range(NamedTuple):
    """A range that is being read."""

    future: "Future[bytes]"
    path: str
    start: int
    stop: int

    def result(self) -> bytes:
        """Its bytes, waiting for them; what was no plain answer is asked for once more, and fails as `read_range` does."""
        try:
            return self.future.result()
        except CancelledError:  # the run is at its end
            raise
        except Exception:  # each way of reading has its own kinds; all errors are to be told alike
            return STORE.read_range(self.path, self.start, self.stop)


class Upload(NamedTuple):
    """An object of S3 that is being sent in pieces, or was, by a process that is no more."""

    path: str
    number: str
    begun_s: float  # since 1970


class RemoteStore:
    """Objects in stores that fsspec knows. Paths are URLs with their scheme."""

    schemes: tuple[str, ...] = SCHEMES

    def __init__(self) -> None:
        self._remembered: dict[str, dict[str, FileInfo]] = {}  # by folder and path

    @contextlib.contextmanager
    def remember(self, folders: Collection[str]) -> Iterator[None]:
        """While in this context, `info` of what lies in these folders is what one listing of each says.

        Not of a store in memory, whose listings tell other times. Raises Trouble (exit 3) where the store does not answer.
        """
        plain = [folder for folder in folders if scheme_of(folder) != "memory" and "//" not in folder.partition("://")[2]]
        new = [folder for folder in plain if folder not in self._remembered]
        with ThreadPoolExecutor(LISTING_THREADS, "listing") as pool:
            listings = list(pool.map(self.list_folder, new))
        for folder, listed in zip(new, listings, strict=True):
            self._remembered[folder] = {path: info for path, info in listed if info}
        try:
            yield
        finally:
            for folder in new:
                self._remembered.pop(folder, None)

    def stat(self, path: str) -> FileInfo:
        """Size, time and version of an object. Raises FileNotFoundError, or another OSError where the store does not tell."""
        system, inner = open_file_system(path)
        with calling(path):
            TRAFFIC.add("HEAD")
            system.invalidate_cache(system._parent(inner))
            try:
                found = self._head(path, inner) if scheme_of(path) in ("s3", "s3a") else system.info(inner)
            except OSError as error:
                if error.errno == errno.EINVAL:  # the answer to a HEAD has no words for what is wrong, that to a GET has
                    system.cat_file(inner, start=0, end=1)
                raise
            if found["type"] != "file":
                raise FileNotFoundError("it is a folder")
            if scheme_of(path) == "memory":
                found = {**found, "modified": system.modified(inner)}
            return _info_of(found)

    def _head(self, path: str, inner: str) -> Json:
        """What S3 says of an object; s3fs would list the folder besides where there is none, in case that it is one."""
        system, _ = open_file_system(path)
        bucket, key, version = system.split_path(inner)
        if not key:
            raise FileNotFoundError("it is a bucket")
        versioned = {"VersionId": version} if version else {}
        answer = system.call_s3("head_object", system.kwargs, Bucket=bucket, Key=key, **versioned, **system.req_kw)
        return {"type": "file", "size": answer["ContentLength"], "ETag": answer.get("ETag"),
                "LastModified": answer.get("LastModified")}

    def info(self, path: str) -> FileInfo | None:
        """Size, time and version of an object; None if there is none."""
        remembered = self._remembered.get(path.rpartition("/")[0])
        if remembered is not None:
            return remembered.get(path)
        try:
            return self.stat(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unreadable(path, error) from None

    def is_folder(self, path: str) -> bool:
        """Whether there are objects below the path."""
        system, inner = open_file_system(path)
        try:
            with calling(path):
                bucket, _, prefix = inner.strip("/").partition("/")
                if scheme_of(path) in ("s3", "s3a") and prefix:  # s3fs would list all of it
                    page = system.call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{prefix}/", MaxKeys=1)
                    return bool(page.get("Contents"))
                if system.isdir(inner):
                    return True
                if scheme_of(path) not in ("http", "https"):  # where every address is a file, and some are folders as well
                    return bool(system.info(inner)["type"] == "directory")  # most clients' isdir takes any trouble for a no
                return False
        except FileNotFoundError:
            return False
        except OSError as error:
            raise _unreadable(path, error) from None

    def list_files(self, folder: str) -> list[str]:
        """URLs of the objects that lie in the folder itself, sorted."""
        return sorted(path for path, info in self.list_folder(folder) if info)

    def list_folder(self, folder: str) -> list[tuple[str, FileInfo | None]]:
        """URLs of what lies in the folder itself, each with what is known of it: None for a folder. Trouble (exit 3)."""
        system, inner = open_file_system(folder)
        try:
            with calling(folder):
                found = system.ls(inner, detail=True)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _unreadable(folder, error) from None
        listed: list[tuple[str, FileInfo | None]] = []
        for entry in found:
            info = None
            if entry["type"] == "file":
                info = _info_of(entry)
            name = self._with_scheme(folder, entry["name"])
            if entry["name"].strip("/") != inner.strip("/"):  # some stores list the folder's own mark
                listed.append((name, info))
        return listed

    def names_from(self, beginning: str) -> Iterator[str]:
        """Names of a folder's own objects that begin as `beginning` ends; in S3 page by page, as they are asked for.

        Trouble (exit 3) where the store does not answer.
        """
        folder = beginning.rpartition("/")[0]
        system, inner = open_file_system(beginning)
        if scheme_of(beginning) not in ("s3", "s3a"):
            names = (path.rpartition("/")[2] for path, info in self.list_folder(folder) if info)
            yield from (name for name in names if name.startswith(beginning.rpartition("/")[2]))
            return
        bucket, _, prefix = inner.partition("/")
        if beginning.endswith("/"):
            prefix += "/"  # which fsspec takes away
        more: Json = {}
        while True:
            try:
                with calling(folder):
                    page = system.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, Delimiter="/", **more)
            except FileNotFoundError:
                return
            except OSError as error:
                raise _unreadable(folder, error) from None
            yield from (entry["Key"].rpartition("/")[2] for entry in page.get("Contents", []))
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def glob(self, pattern: str) -> list[str]:
        """URLs that fit the pattern (`*`, `?`, `[a-z]`, and `**` for folders in folders), sorted.

        As on a disk, no wildcard stands for a name that begins with a dot, unless a step of the pattern begins with one.
        """
        system, inner = open_file_system(pattern)
        try:
            with calling(pattern):
                found = sorted(self._with_scheme(pattern, name) for name in system.glob(inner))
            written_out = len(re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]) + 1
            asks_for_hidden = "/." in pattern[written_out - 1:]
            return [path for path in found if asks_for_hidden or "/." not in path[written_out - 1:]]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _unreadable(pattern, error) from None

    def _with_scheme(self, path: str, name: str) -> str:
        scheme = SCHEME.match(path)
        assert scheme
        return name if SCHEME.match(name) else scheme[0] + name.lstrip("/")

    def open(self, path: str) -> BinaryIO:
        """The object's bytes, for random access; a FileExpired, which is an OSError, where it is replaced while it is read."""
        return self._open(path, "readahead")

    def _open(self, path: str, cache_type: str) -> BinaryIO:
        system, inner = open_file_system(path)
        with calling(path):
            if scheme_of(path) == "memory":  # its files are one object for all who read them
                return io.BytesIO(system.cat_file(inner))
            file = system.open(inner, "rb", block_size=READ_BLOCK_BYTES, cache_type=cache_type)
            if getattr(file, "size", 0) is None:  # as of an http server that makes the file up while it sends it
                file.close()
                raise OSError(errno.EREMOTEIO, "its server does not tell how long it is: download it first")
            return cast(BinaryIO, RemoteFile(path, file))

    def open_native(self, path: str) -> "pa.NativeFile":
        """The object's bytes, for Arrow, which asks for the ranges that it needs."""
        return pa.PythonFile(self._open(path, "none"), "r")

    def read(self, path: str) -> bytes:
        """All bytes of an object."""
        system, inner = open_file_system(path)
        with calling(path):
            if scheme_of(path) in ("s3", "s3a"):
                return bytes(system.cat_file(inner, max_concurrency=1))  # with more it asks for the size first
            return bytes(system.cat_file(inner))

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of an object."""
        system, inner = open_file_system(path)
        with calling(path):
            data = self._read_quickly(path, inner, start, stop)
            return bytes(system.cat_file(inner, start=start, end=stop)) if data is None else data

    def submit_ranges(self, ranges: Sequence[tuple[str, int, int]], at_once: int = 0) -> "list[Range]":
        """The same of many objects, all of one store, at a time: of each its path, the first byte, and where to stop.

        No more than `at_once` are asked for at a time; 0: as many as is good for small objects.
        """
        if not ranges:
            return []
        inner_paths = [open_file_system(path)[1] for path, _, _ in ranges]
        reader = self._quick_reader(ranges[0][0], inner_paths[0])
        if reader is None or any("?versionId=" in inner for inner in inner_paths):
            return [Range(_threads(at_once or REQUEST_THREADS).submit(self.read_range, *one), *one) for one in ranges]
        from addons.stores import s3_many
        places = [inner.partition("/") for inner in inner_paths]
        wanted = [s3_many.Wanted(bucket, key, start, stop)
                  for (bucket, _, key), (_, start, stop) in zip(places, ranges, strict=True)]
        futures = s3_many.open_many(reader, at_once or s3_many.REQUESTS, os.getpid()).submit(wanted)
        return [Range(future, *one) for future, one in zip(futures, ranges, strict=True)]

    def _quick_reader(self, path: str, inner: str) -> "S3Reader | None":
        """What reads an object of S3 without s3fs; None for what only s3fs can read."""
        if scheme_of(path) not in ("s3", "s3a") or "?versionId=" in inner:
            return None
        from addons.stores import s3_reader
        options = json.dumps(storage_options(scheme_of(path), SCHEMES), sort_keys=True, default=str)
        return s3_reader.open_reader(options, CONNECTIONS, os.getpid())

    def _read_quickly(self, path: str, inner: str, start: int, stop: int) -> bytes | None:
        """The same from S3 without s3fs; None where s3fs has to do it."""
        from addons.stores import s3_reader
        reader = self._quick_reader(path, inner)
        bucket, _, key = inner.partition("/")
        if reader is None:
            return None
        try:
            return reader.read(bucket, key, start, stop)
        except s3_reader.NotPlain:
            return None

    def read_up_to(self, path: str, size: int, begun: Range | None = None) -> bytes:
        """The first `size` bytes of an object, fewer where it has no more; they may have been `begun` to be read."""
        try:
            data = begun.result() if begun else self.read_range(path, 0, size)
            TRAFFIC.add("GET", read=len(data))
            return data
        except (FileNotFoundError, PermissionError):
            raise
        except OSError:
            if self.stat(path).bytes:  # a store has no range of an empty object
                raise
            return b""

    def write(self, path: str, content: bytes) -> None:
        """Write an object whole, in place of one that is there."""
        system, inner = open_file_system(path)
        with calling(path):
            system.pipe_file(inner, content)

    def create(self, path: str, content: bytes) -> None:
        """Write an object whole; FileExistsError where there is one. Of several at a time one succeeds."""
        for pause_s in CONFLICT_PAUSES_S:
            try:
                self._create_once(path, content)
                return
            except Conflict:
                time.sleep(pause_s * random.uniform(0.5, 1.5))  # noqa: S311 - no secret
        self._create_once(path, content)

    def _create_once(self, path: str, content: bytes) -> None:
        system, inner = open_file_system(path)
        with calling(path):
            system.pipe_file(inner, content, mode="create")

    def open_writer(self, path: str) -> "RemoteWriter":
        """A file to write an object of any size: it appears whole when this is closed, or not at all."""
        system, inner = open_file_system(path)
        with calling(path):
            return RemoteWriter(path, system.open(inner, "wb", block_size=WRITE_BLOCK_BYTES))

    def remove(self, path: str) -> None:
        """Remove an object. Raises FileNotFoundError where the store tells that there was none."""
        system, inner = open_file_system(path)
        with calling(path):
            system.rm_file(inner)

    def list_uploads(self, folder: str) -> Iterator[Upload]:
        """Objects below a folder of S3 that have been sent in part; other stores forget theirs by themselves.

        Raises OSError where the store does not tell.
        """
        if scheme_of(folder) not in ("s3", "s3a"):
            return
        system, inner = open_file_system(folder)
        bucket, _, prefix = inner.partition("/")
        more: Json = {}
        while True:
            with calling(folder):
                page = system.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/".lstrip("/"), **more)
            for found in page.get("Uploads", []):
                path = self._with_scheme(folder, f"{bucket}/{found['Key']}")
                yield Upload(path, found["UploadId"], found["Initiated"].timestamp())
            if not page.get("IsTruncated"):
                return
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def abort_upload(self, upload: Upload) -> None:
        """Have the store forget what was sent; also if it has forgotten it already. Raises OSError."""
        system, inner = open_file_system(upload.path)
        bucket, _, key = inner.partition("/")
        with calling(upload.path), contextlib.suppress(FileNotFoundError):
            system.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload.number)

    def copy(self, source: str, target: str) -> None:
        """Copy an object within its store."""
        system, inner = open_file_system(source)
        with calling(source):
            system.cp_file(inner, open_file_system(target)[1])


class RemoteFile(io.RawIOBase):
    """An open object, whose errors are those of `calling`."""

    def __init__(self, path: str, file: Any) -> None:
        self._path = path
        self._file = file

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is, at no cost."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place."""
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        """The place."""
        return int(self._file.tell())

    def read(self, size: int | None = -1) -> bytes:
        """The next `size` bytes, fewer only at the end."""
        with calling(self._path):
            data = bytes(self._file.read(-1 if size is None else size))
        TRAFFIC.add("GET", read=len(data))
        return data

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer."""
        data = self.read(len(buffer))
        buffer[:len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            self._file.close()
        super().close()


class RemoteWriter(io.RawIOBase):
    """An object being written: `close` makes it appear, `discard` leaves nothing of it."""

    def __init__(self, path: str, file: Any) -> None:
        self._path = path
        self._file = file

    def writable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """How many bytes have been written."""
        return int(self._file.tell())

    def write(self, data: Any) -> int:
        """Add bytes; those that fill a piece are sent."""
        with calling(self._path):
            return int(self._file.write(data))

    def finish(self) -> None:
        """Send the rest, and have the object appear."""
        with calling(self._path):
            self._file.close()

    def discard(self) -> None:
        """Give it up: what was sent is taken back."""
        self._file.closed = True  # or its collection would send it
        with contextlib.suppress(Exception):  # whatever the reason was, it is on its way already
            self._file.discard()


def _unreadable(path: str, error: OSError) -> Trouble:
    return Trouble(EXIT_INPUT, f"cannot read {path}: {error.strerror or error}")


STORE = RemoteStore()
