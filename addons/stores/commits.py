"""Manifests and parts in an object store: each is one PUT, made only where there is none yet."""
import collections
import concurrent.futures
import contextlib
import json
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from addons.stores import FileInfo, ahead
from addons.stores.leases import can_create
from addons.stores.paths import StorePath, asking
from addons.stores.remote import STORE, Range
from image_text_sim_clip import (
    EXIT_CONFIG,
    EXIT_DISK,
    FlawedPart,
    Json,
    Part,
    Partition,
    Plan,
    Trouble,
    addon,
    metadata_in,
    output_disk,
    read_part,
    seal,
    write_bytes,
)

TRIES = 5  # to commit a part against others that commit it, too
LOOKED_AT_ONCE = 1024  # parts whose footers are asked for, and held, together
TAIL_BYTES = 65_536  # of a part, in which its footer mostly is


# ── Create once ───────────────────────────────────────────────────────────────────────────────────────────────────────

def create(path: StorePath, content: bytes) -> bool:
    """Write an object whole, only where there is none; whether it is there now with this content, by whomever."""
    with output_disk(path):
        if not can_create(str(path.parent)):
            path.write_bytes(content)
            return True
        try:
            path.create(content)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                return path.read_bytes() == content  # ours, if the answer to an earlier try was lost
            return False
    return True


def create_manifest(path: StorePath, manifest: Json) -> None:
    """Write the manifest of a new run. Raises Trouble (exit 2) where another process has planned one meanwhile."""
    text = json.dumps(seal(manifest), indent=1, ensure_ascii=False) + "\n"
    if not create(path, text.encode("utf-8", "backslashreplace")):
        raise Trouble(EXIT_CONFIG, f"{path.parent} has been planned by another process meanwhile: the same command joins its "
                                   "run if it is the same")


def commit(plan: Plan, partition: Partition, data: bytes, metadata: Json, replaced: Part | None,
           files: Mapping[Path, bytes]) -> Json:
    """Write the part, unless this run's is there already; returns the metadata of the one that counts. See `commit_part`."""
    plan.check_still_there()
    if replaced is not None:
        there = _metadata_of(plan, partition)
        if there is None or there["sha256"] == replaced.metadata["sha256"]:
            addon("results.retry", "--retry-failed").replace_part(partition, data, metadata, files)
            return metadata
        return there
    path = StorePath(partition.parquet)
    for _ in range(TRIES):
        for file, content in files.items():
            write_bytes(file, content)
        if create(path, data):
            return metadata
        there = _metadata_of(plan, partition, thorough=bool(files))
        if there:
            return there
        plan.check_still_there()
        with output_disk(path):
            path.unlink(missing_ok=True)  # of a run that was planned here before, or damaged
    raise Trouble(EXIT_DISK, f"cannot write {path}: other processes write it all the time")


def _metadata_of(plan: Plan, partition: Partition, thorough: bool = False) -> Json | None:
    """The metadata of this run's part, read now; None where there is none, or it is damaged."""
    ahead.end(str(partition.parquet.parent))
    try:
        part = read_part(plan, partition, thorough)
    except FlawedPart:
        return None
    return part.metadata if part else None


# ── Look at many parts ────────────────────────────────────────────────────────────────────────────────────────────────

class Known(NamedTuple):
    """A part that was looked at: which version, and its footer, packed."""

    info: FileInfo
    footer: bytes


class Parts:
    """The parts of a folder as they were when it was last looked at; footers that are known are not read again."""

    def __init__(self) -> None:
        self.listed: dict[str, FileInfo] = {}
        self._known: dict[str, Known] = {}

    def look(self, folder: StorePath) -> None:
        """List the folder once, and read the footers of parts that are new or others, many at a time."""
        with asking(folder):
            listed = {path.rpartition("/")[2]: info for path, info in STORE.list_folder(str(folder)) if info}
        names = [name for name in listed if name.startswith("part-") and name.endswith(".parquet")]
        new = [name for name in names if name not in self._known or self._known[name].info != listed[name]]
        for start in range(0, len(new), LOOKED_AT_ONCE):
            sizes = {name: listed[name].bytes for name in new[start:start + LOOKED_AT_ONCE]}
            for name, footer in zip(sizes, read_footers(folder, sizes), strict=True):
                self._known[name] = Known(listed[name], zlib.compress(footer, 1))
        self.listed = listed

    def footer(self, name: str) -> bytes | None:
        """The footer of a part, None for one that is not there or is none."""
        if name not in self.listed or name not in self._known:
            return None
        return zlib.decompress(self._known[name].footer) or None


_LOCK = threading.Lock()
_FOLDERS: dict[str, Parts] = collections.defaultdict(Parts)


def look_at_parts(folder: StorePath, reads_all: bool) -> None:
    """Have `read_footer` and `size_of` answer for the folder as it is now; whoever `reads_all` parts in order need not wait."""
    with _LOCK:
        _FOLDERS[str(folder)].look(folder)
        if reads_all:
            ahead.begin(str(folder), _FOLDERS[str(folder)].listed)
        else:
            ahead.end(str(folder))


def read_footer(path: StorePath) -> bytes | None:
    """The footer of a part; as it was when its folder was last looked at, if it was."""
    folder = str(path.parent)
    if folder in _FOLDERS:
        return _FOLDERS[folder].footer(path.name)
    try:
        return _read_tail(path, path.stat().st_size) or None
    except FileNotFoundError:
        return None


def size_of(path: StorePath) -> int | None:
    """The bytes of a file next to a part, None for none; as it was when its folder was last looked at, if it was."""
    folder = str(path.parent)
    if folder in _FOLDERS:
        info = _FOLDERS[folder].listed.get(path.name)
        return info.bytes if info else None
    return path.stat().st_size if path.exists() else None


def read_footers(folder: StorePath, sizes: Mapping[str, int]) -> list[bytes]:
    """The footer of each of these Parquet files of so many bytes, in order; b"" for any other file."""
    tails = STORE.submit_ranges([(f"{folder}/{name}", max(0, size - TAIL_BYTES), max(1, size)) for name, size in sizes.items()])
    # all of them before the first is looked at: a second thread at work would have this one wait for the interpreter's lock
    concurrent.futures.wait([tail.future for tail in tails])
    return [_read_tail(folder / name, size, tail) for (name, size), tail in zip(sizes.items(), tails, strict=True)]


def _read_tail(path: StorePath, size: int, read: Range | None = None) -> bytes:
    """The footer of a Parquet file of so many bytes; b"" for any other file. `read` has its end, if that was asked for."""
    try:
        if not size:
            return b""
        tail = read.result() if read else STORE.read_range(str(path), max(0, size - TAIL_BYTES), size)
        length = int.from_bytes(tail[-8:-4], "little")
        if tail[-4:] != b"PAR1" or length + 12 > size:
            return b""
        if length + 8 > len(tail):
            tail = STORE.read_range(str(path), size - 8 - length, size)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise Trouble(EXIT_DISK, f"cannot read {path}: {error.strerror or error}") from None
    return tail[-8 - length:-8] if metadata_in(tail[-8 - length:-8]) else b""
