"""The local disk, and whatever is mounted there."""
import glob
import os
import pathlib
import stat
from typing import BinaryIO

import pyarrow as pa

from addons.stores import FileInfo


class LocalStore:
    """Files of the operating system. Paths are relative to the current folder, as in a config."""

    schemes: tuple[str, ...] = ()  # what has no scheme lies here

    def info(self, path: str) -> FileInfo | None:
        """Size and time of a file; None if there is no such file, or its folder may not be entered."""
        try:
            found = pathlib.Path(path).stat()
        except (OSError, ValueError):  # ValueError: a NUL in the path
            return None
        return FileInfo(found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None

    def is_folder(self, path: str) -> bool:
        """Whether the path is a folder."""
        return os.path.isdir(path)  # noqa: PTH112 - pathlib's raises where it may not look

    def list_files(self, folder: str) -> list[str]:
        """Paths of the files that lie in the folder itself, sorted."""
        return [path.as_posix() for path in sorted(pathlib.Path(folder).iterdir()) if os.path.isfile(path)]  # noqa: PTH113

    def glob(self, pattern: str) -> list[str]:
        """Paths that fit the pattern (`*`, `?`, `[a-z]`, and `**` for folders in folders), sorted."""
        found = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - pathlib's takes no absolute pattern
        return [pathlib.Path(path).as_posix() for path in found]

    def open(self, path: str) -> BinaryIO:
        """The file's bytes, for random access."""
        return pathlib.Path(path).open("rb")

    def open_native(self, path: str) -> "pa.NativeFile":
        """The file's bytes, for Arrow, which then reads them without Python."""
        return pa.OSFile(os.fsencode(path), "r")


STORE = LocalStore()
