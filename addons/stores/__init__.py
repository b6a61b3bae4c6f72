"""Where files lie: one Store per kind of place, the local disk (local.py) among them.

The readers of addons/inputs find, list and open their files through a Store, and so know nothing of disks. A run chooses
by the path alone: what begins with a scheme (`s3://bucket/pairs/`) goes to the store that names the scheme, everything else
to the local disk. To add a store, put ONE new file here that offers an instance as `STORE`; `find_store` finds it by its
`schemes`.

    local.py    the local disk
    remote.py   whatever fsspec knows: s3://, gs://, az://, hf://, memory:// ...
    s3_reader.py  GETs from S3 at less cost than through fsspec
    s3_many.py    many of them at a time, from one thread
    paths.py    `StorePath`: a place in a store that is handled as a pathlib.Path is, for `output_path` and staged tables
    leases.py   who plans, settles and finalises a run in a store: one process at a time
    commits.py  parts and manifests in a store: created only where there is none, and read many at a time
    ahead.py    parts that are read in order, ahead of who reads them
    staged.py   a staged table in a store
    spool.py    tars: each is fetched once, to a temporary file
    traffic.py  what `--plan` tells of requests and bytes
    images.py   `image_path: s3://...`: images from a prefix, fetched ahead

An object store fulfils the Protocol like this (fsspec's names in brackets):

* `info`: size, time of the last change and version that a HEAD request gives [`info`]; None on a 404.
* `is_folder`: whether any key begins with the path and a slash [`isdir`].
* `list_files`, `glob`: one listing of the prefix, sorted, folders left out [`ls`, `glob`], as full paths with the scheme.
* `open`: a file whose `seek` costs nothing and whose `read` is a range request [`open`], because tars and Parquet files
  are read by offset and never fetched whole.
* `open_native`: the same for Arrow; `pa.PythonFile(self.open(path), "r")` will do.

Errors of the place are OSErrors, as those of a disk are; `info`, `is_folder`, `list_files` and `glob` raise Trouble (exit 3)
where the place does not answer or does not let us in.
"""
import re
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Protocol

from image_text_sim_clip import EXIT_CONFIG, EXIT_INPUT, Json, Trouble, room

if TYPE_CHECKING:
    import pyarrow as pa

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
HUB_PAGE = re.compile(r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)(?!datasets/|spaces/)([\w-][\w.-]*/[\w.-]+)")


class FileInfo(NamedTuple):
    """What tells one version of a file from another."""

    bytes: int
    mtime_ns: int
    version: str = ""  # an ETag, or what else the place tells versions apart by; "" where it has no such thing


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
            store: Store | None = getattr(module, "STORE", None)
            if store and scheme[1].lower() in store.schemes:
                return store
        raise Trouble(EXIT_INPUT, f"{scheme[0]} paths are not read yet (nothing in addons/stores/ opens them), so download "
                                  f"{path!r} to a local disk first")
    from addons.stores import local
    return local.STORE


WRITTEN_KEYS = ("output_path", "cache_path")


def check_url(key: str, url: str) -> None:
    """Raise Trouble (exit 2) for a URL that the path `key` cannot have: one with secrets in it, with too few slashes ..."""
    scheme = SCHEME.match(url)
    if key == "pretrained_model":
        page = HUB_PAGE.match(url)
        cure = f"set pretrained_model: {page[1]}" if page else "download it first"
        raise Trouble(EXIT_CONFIG, f"pretrained_model {url!r}: models are read from a folder or the Hub (owner/name), not from "
                                   f"an address: {cure}")
    if not scheme:
        if key in WRITTEN_KEYS:
            raise Trouble(EXIT_CONFIG, f"{key} {url!r}: a place in a store is written with two slashes, such as s3://bucket/name")
        return
    place, _, query = url.partition("?")
    if "@" in place[scheme.end():].partition("/")[0] and scheme[1].lower() not in ("abfs", "abfss", "az", "adl"):
        raise Trouble(EXIT_CONFIG, f"{key} holds a user or a password: give those in the environment, or in storage_options")
    if scheme[1].lower() in ("http", "https"):
        if query:
            raise Trouble(EXIT_CONFIG, f"{key} {place!r} goes on with a query, which may hold a signature and would be kept "
                                       "with the results: download the file first")
        if key == "image_path":
            raise Trouble(EXIT_CONFIG, f"image_path {url!r}: set image_path: url to fetch each row's http(s) URL")
        if key in WRITTEN_KEYS:
            raise Trouble(EXIT_CONFIG, f"{key} {url!r}: nothing can be written there")
    if key in WRITTEN_KEYS and "versionId=" in query:  # a client would write every file to the object of which it is a version
        raise Trouble(EXIT_CONFIG, f"{key} {url!r} is one version of an object: nothing can be written there")
    if not place[scheme.end():].strip("/"):
        raise Trouble(EXIT_CONFIG, f"{key} {url!r} names no bucket")
    try:
        find_store(url)
    except Trouble as trouble:
        raise Trouble(EXIT_INPUT if key == "csv_path" else EXIT_CONFIG, f"{key}: {trouble}") from None


_OPTIONS: Json = {}


def set_storage_options(options: Json) -> None:
    """Take in the config's `storage_options`, which hold for the whole process."""
    _OPTIONS.clear()
    _OPTIONS.update(options)


def storage_options(scheme: str, schemes: tuple[str, ...]) -> Json:
    """What `storage_options` says for one of `schemes`: a section of that name, and every key that is no scheme's section."""
    common = {key: value for key, value in _OPTIONS.items() if not (key in schemes and isinstance(value, dict))}
    own = _OPTIONS.get(scheme)
    return common | own if isinstance(own, dict) else common
