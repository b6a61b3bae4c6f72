"""A place in an object store, handled as a pathlib.Path is: what writes a run to a disk writes it to a bucket as well.

Only what the program does with such places is here. Everything else that a Path can do fails (it asks for `__fspath__`)
instead of touching the local disk. Two things are other than on a disk: folders need not be made, and a file that is opened
to be written appears whole when it is closed, or not at all.

`universal_pathlib` offers more methods and not those that count here: an object created only where there is none, an
identity without a second request, and reading errors that are not mistaken for "no such file".
"""
import contextlib
import fnmatch
import hashlib
import io
import itertools
import os
import pathlib
import re
import stat
import typing
from collections.abc import Generator, Iterator
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Self

from addons.stores import FileInfo, ahead, remote
from image_text_sim_clip import EXIT_DISK, Trouble

if TYPE_CHECKING:
    from typing_extensions import Buffer


class StorePath(pathlib.PosixPath):
    """A URL such as s3://bucket/folder/file as a path. Trouble (exit 5) where its store does not answer when it is read."""

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)  # pathlib takes two slashes for one

    def __fspath__(self) -> str:
        raise TypeError(f"{self} lies in an object store, which the system cannot open")

    def as_posix(self) -> str:
        """The URL."""
        return str(self)

    # ── Look ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Size and times. A version, such as an ETag, stands in for the number of the inode and for the time of change."""
        with asking(self):
            return as_stat(remote.STORE.stat(str(self)))

    def exists(self) -> bool:
        """Whether there is such an object."""
        return self.is_file()

    def is_file(self) -> bool:
        """Whether there is such an object."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether there are objects below it."""
        with asking(self):
            return remote.STORE.is_folder(str(self))

    def is_symlink(self) -> bool:
        """There are none."""
        return False

    def resolve(self, strict: bool = False) -> Self:
        """It is absolute as it stands."""
        return self

    def glob(self, pattern: str) -> Generator[Self, None, None]:
        """The objects in this folder itself whose names fit; of an S3 bucket no more is listed than is asked for."""
        beginning = re.split(r"[*?\[]", pattern)[0]
        with asking(self):
            for name in remote.STORE.names_from(f"{self}/{beginning}"):
                if fnmatch.fnmatchcase(name, pattern):
                    yield self / name

    def iterdir(self) -> Generator[Self, None, None]:
        """What is in this folder, folders too."""
        with asking(self):
            found = remote.STORE.list_folder(str(self))
        yield from (self / path.rstrip("/").rpartition("/")[2] for path, _ in found)

    def rglob(self, pattern: str) -> Generator[Self, None, None]:
        """The objects in this folder and below whose names fit."""
        yield from (path for path, _ in self.walk_objects() if fnmatch.fnmatchcase(path.name, pattern))

    def walk_objects(self) -> Generator[tuple[Self, FileInfo], None, None]:
        """The objects in this folder and below, each with what the listing says of it."""
        with asking(self):
            found = remote.STORE.list_folder(str(self))
        for path, info in found:
            name = path.rstrip("/").rpartition("/")[2]
            if info is None:
                yield from (self / name).walk_objects()
            else:
                yield self / name, info

    # ── Read ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def read_bytes(self) -> bytes:
        """All bytes."""
        with asking(self):
            content = ahead.take(str(self))
            return remote.STORE.read(str(self)) if content is None else content

    def open(self, mode: str = "r", *arguments: Any, **options: Any) -> IO[Any]:  # type: ignore[override]
        """A file to read from in ranges ("rb", "r"), or to write whole ("wb"), which appears when it is closed."""
        if mode == "wb":
            return typing.cast(BinaryIO, _Closing(remote.STORE.open_writer(str(self))))
        with asking(self):
            file = remote.STORE.open(str(self))
        if mode == "rb":
            return file
        assert mode == "r", f"a store's files are not opened to {mode!r}"
        return io.TextIOWrapper(io.BufferedReader(typing.cast(Any, file)), *arguments[1:], **options)

    # ── Write ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def write_bytes(self, data: "Buffer") -> int:
        """Write the object whole."""
        content = bytes(data)
        remote.STORE.write(str(self), content)
        return len(content)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None, newline: str | None = None) -> int:
        """Write the object whole."""
        return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        """Write an empty object."""
        remote.STORE.write(str(self), b"")

    def create(self, data: bytes) -> None:
        """Write the object whole; FileExistsError where there is one, by whomever."""
        remote.STORE.create(str(self), data)

    @contextlib.contextmanager
    def writing(self) -> Iterator[BinaryIO]:
        """A file whose content takes this name when the block ends; nothing of it stays where the block fails."""
        file = remote.STORE.open_writer(str(self))
        try:
            yield typing.cast(BinaryIO, file)
        except BaseException:
            file.discard()
            raise
        file.finish()

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object; a store may not tell whether there was one."""
        try:
            remote.STORE.remove(str(self))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmdir(self) -> None:
        """Folders are not there of themselves."""

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Folders need not be made."""

    def replace(self, target: str | os.PathLike[str]) -> Self:
        """Have the object under another name instead."""
        assert isinstance(target, StorePath)
        remote.STORE.copy(str(self), str(target))
        self.unlink(missing_ok=True)
        return typing.cast(Self, target)


class _Closing(io.RawIOBase):
    """A writer for those who open, write and close; an error in a `with` block leaves nothing of the object."""

    def __init__(self, writer: remote.RemoteWriter) -> None:
        self._writer = writer
        self._ended = False

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: "Buffer") -> int:
        """Add bytes."""
        return self._writer.write(data)

    def tell(self) -> int:
        """How many bytes have been written."""
        return self._writer.tell()

    def close(self) -> None:
        """Have the object appear."""
        if not self._ended:
            self._ended = True
            self._writer.finish()
        super().close()

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is not None:
            self._ended = True
            self._writer.discard()
        self.close()


@contextlib.contextmanager
def asking(path: StorePath) -> Iterator[None]:
    """A store that does not answer is Trouble (exit 5), which nobody takes for an object that is not there."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Trouble(EXIT_DISK, f"cannot read {path}: {error.strerror or error}") from None
    except Trouble as trouble:
        raise Trouble(EXIT_DISK, str(trouble)) from None


def as_stat(info: FileInfo) -> os.stat_result:
    """What is known of an object as the system tells it of a file."""
    version = int.from_bytes(hashlib.sha256(info.version.encode()).digest()[:7], "big") if info.version else info.mtime_ns
    times_s = [info.mtime_ns // 10**9, info.mtime_ns // 10**9, version // 10**9]
    times_ns = [info.mtime_ns, info.mtime_ns, version]
    fields = itertools.chain([stat.S_IFREG | 0o644, version, 0, 1, 0, 0, info.bytes], times_s, map(float, times_s), times_ns)
    return os.stat_result(fields)
