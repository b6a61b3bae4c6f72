"""Where files lie: one Store per kind of place, the local disk (local.py) among them.

The readers of addons/inputs find, list and open their files through a Store, and so know nothing of disks. A run chooses
by the path alone: what begins with a scheme (`s3://bucket/pairs/`) goes to the store that names the scheme, everything else
to the local disk. To add a store, put ONE new file here that offers an instance as `STORE`; `find_store` finds it by its
`schemes`. An object store fulfils the Protocol like this (fsspec's names in brackets):

* `info`: the size and the time of the last change that a HEAD request gives [`info`]; None on a 404.
* `is_folder`: whether any key begins with the path and a slash [`isdir`].
* `list_files`, `glob`: one listing of the prefix, sorted, folders left out [`ls`, `glob`], as full paths with the scheme.
* `open`: a file whose `seek` costs nothing and whose `read` is a range request [`open`], because tars and Parquet files
  are read by offset and never fetched whole.
* `open_native`: the same for Arrow; `pa.PythonFile(self.open(path), "r")` will do.

Errors of the place are OSErrors, as those of a disk are.
"""
import re
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Protocol

from image_text_sim_clip import EXIT_INPUT, Trouble, room

if TYPE_CHECKING:
    import pyarrow as pa

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


class FileInfo(NamedTuple):
    """What tells one version of a file from another."""

    bytes: int
    mtime_ns: int


class Store(Protocol):
    """A place where files lie. Paths are text with forward slashes; the methods may be called from many threads."""

    schemes: tuple[str, ...]

    def info(self, path: str) -> FileInfo | None:
        """Size and time of a file; None if there is no such file."""

    def is_folder(self, path: str) -> bool:
        """Whether the path is a folder."""

    def list_files(self, folder: str) -> list[str]:
        """Paths of the files that lie in the folder itself, sorted."""

    def glob(self, pattern: str) -> list[str]:
        """Paths that fit the pattern (`*`, `?`, `[a-z]`, and `**` for folders in folders), sorted."""

    def open(self, path: str) -> BinaryIO:
        """The file's bytes, for random access."""

    def open_native(self, path: str) -> "pa.NativeFile":
        """The file's bytes, for Arrow."""


def find_store(path: str) -> Store:
    """The store that a path lies in. Raises Trouble (exit 3) for a scheme that no file of this room knows."""
    scheme = SCHEME.match(path)
    if scheme:
        for module in room("stores"):
            if scheme[1].lower() in module.STORE.schemes:
                return module.STORE
        raise Trouble(EXIT_INPUT, f"{scheme[0]} paths are not read yet (nothing in addons/stores/ opens them), so download "
                                  f"{path!r} to a local disk first")
    from addons.stores import local
    return local.STORE

