"""Webdataset tars as rows: the members of one key (an image, a .txt or .json) are a pair, as img2dataset writes them.

    shards/00000.tar:  000000000.jpg  000000000.txt  000000000.json  000000001.jpg ...

A tar is read by offset, never unpacked. A pair's fields are those of its .json; its caption is the field that
`caption_column` names, else the .txt; its URL is the field that `url_column` names, else `<tar>/<image>`. Where
img2dataset's own Parquet lies beside a tar, the pairs that it lists and the tar lacks (failed downloads) are rows too.
"""
import bisect
import itertools
import pathlib
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from addons.inputs import Trouble, identify, is_textual, read_footer, to_text
from addons.json_lines import parse_object

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
MAX_TEXT_BYTES = 16_000_000  # of a .txt or .json; a longer one is no caption


class Member(NamedTuple):
    """Where a file lies in its tar."""

    name: str
    offset: int
    size: int


class Entry(NamedTuple):
    """The members of one key; the fields of a pair that the tar lacks, from the Parquet beside it."""

    key: str
    members: dict[str, Member]  # "image", "txt", "json" -> where
    fields: dict[str, str]

    @property
    def image(self) -> Member | None:
        """The picture's place, None where there is none."""
        return self.members.get("image")


def index_tar(path: pathlib.Path) -> tuple[list[Entry], str]:
    """The entries of a tar in its order, and what is wrong with it ("" if nothing): a flaw ends the list."""
    entries: list[Entry] = []
    places: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
                folder, _, base = info.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                kind = "image" if suffix.lower() in IMAGES else suffix.lower()
                if not info.isreg() or info.issparse() or kind not in ("image", "txt", "json"):
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if key not in places or kind in entries[places[key]].members:  # a key that comes again is another pair
                    places[key] = len(entries)
                    entries.append(Entry(key, {}, {}))
                entries[places[key]].members[kind] = Member(info.name, info.offset_data, info.size)
            end = tar.offset
        with path.open("rb") as file:
            file.seek(end)
            rest = file.read(1 << 20)
    except PermissionError:
        raise  # no flaw of the tar
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        return entries, str(error) or type(error).__name__
    # tarfile takes a damaged header, and the end of a file that was cut between two members, for the tar's end
    return entries, "" if rest and not any(rest) else "no valid header follows" if rest else "cut off"


def read_members(path: pathlib.Path, entries: list[Entry]) -> Iterator[dict[str, str]]:
    """Each entry's fields: those of its .json, and its .txt under the key "" (no JSON of img2dataset has it)."""
    with path.open("rb") as file:
        def text_of(member: Member | None) -> str:
            if member is None or member.size > MAX_TEXT_BYTES:
                return ""
            file.seek(member.offset)
            return file.read(member.size).decode("utf-8-sig", "replace")
        for entry in entries:
            try:
                fields = parse_object(text_of(entry.members.get("json")) or "{}")
            except ValueError:
                fields = {}  # a .json that is none: the .txt may still be there
            yield {**entry.fields, **fields, "": text_of(entry.members.get("txt"))}


def index_shard(path: pathlib.Path, trouble: Trouble) -> tuple[list[Entry], str]:
    """`index_tar`, and behind its entries those that only the Parquet beside the tar knows."""
    entries, flaw = index_tar(path)
    beside = path.with_suffix(".parquet")
    if beside.is_file():
        schema = read_footer(beside.name, beside, trouble).schema.to_arrow_schema()
        names = [field.name for field in schema if is_textual(field.type)]
        if "key" in names:
            there = {entry.key for entry in entries} | {entry.key.rpartition("/")[2] for entry in entries}
            try:
                table = pq.read_table(beside, columns=names)
                columns = {name: to_text(table[name]).to_pylist() for name in names}
            except (OSError, ValueError, pa.ArrowException) as error:
                raise trouble(f"cannot read {beside.name}: {error}") from None
            entries += [Entry(key, {}, {name: columns[name][n] for name in names})
                        for n, key in enumerate(columns["key"]) if key not in there]
    return entries, flaw


def describe(files: list[tuple[str, pathlib.Path]], config: Any, trouble: Trouble, say: Callable[[str], None]) -> dict:
    """What the tars hold, for manifest.json (see inputs.describe): every header and .json is read once, no image."""
    columns = dict.fromkeys((config.url_column, config.caption_column))
    described: list[dict] = []
    for name, path in files:
        try:
            identity = identify(path)
            entries, flaw = index_shard(path, trouble)
            if flaw and not entries:
                if len(files) == 1:
                    raise trouble(f"{name} cannot be read as a tar: {flaw}")
                say(f"{name} cannot be read as a tar ({flaw}): no row of it is known")
            elif flaw:
                say(f"{name} is damaged ({flaw}): what comes after its first {len(entries)} pairs is lost")
            for fields in read_members(path, entries):
                columns.update(dict.fromkeys(fields))
        except OSError as error:
            raise trouble(f"cannot read {name}: {error.strerror or error}") from None
        described.append({"name": name, "rows": len(entries), **identity} | ({"flaw": flaw} if flaw else {}))
        if config.limit and sum(file["rows"] for file in described) >= config.limit:
            break
    columns.pop("", None)
    starts = [*itertools.accumulate((file["rows"] for file in described), initial=0)]
    return {"kind": "tar", "columns": list(columns), "rows": starts[-1], "malformed": 0, "files": described,
            "starts": sorted({start for start in starts if start < starts[-1]})}


class TarRows:
    """Rows of tars by number, and the images they stand for. The index of one tar is kept."""

    def __init__(self, described: dict, files: list[tuple[str, pathlib.Path]], config: Any, trouble: Trouble,
                 failure: type[Exception]) -> None:
        self.columns, self.described, self.files = described["columns"], described["files"], files
        self.url_column, self.caption_column, self.max_bytes = config.url_column, config.caption_column, config.max_image_bytes
        self.trouble, self.failure = trouble, failure
        self.starts = list(itertools.accumulate((file["rows"] for file in self.described), initial=0))
        self._indexed: tuple[int, list[Entry]] = (-1, [])

    def read(self, start: int, stop: int) -> Any:
        """Rows [start, stop) as a pandas DataFrame of text columns; what a pair's .json lacks is ""."""
        import pandas as pd
        rows = []
        for n, entries in self._slices(start, stop):
            name, path = self.files[n]
            for entry, fields in zip(entries, self._fields(name, path, entries), strict=True):
                caption = fields.get(self.caption_column) or fields[""]
                url = fields.get(self.url_column) or f"{name}/{entry.image.name if entry.image else entry.key}"
                cells = {**fields, self.caption_column: caption, self.url_column: url}
                rows.append([cells.get(column, "") for column in self.columns])
        return pd.DataFrame(rows, columns=self.columns, dtype="str")

    def sources(self, start: int, stop: int) -> list[str]:
        """What `read_bytes` wants for each of the rows [start, stop): tar, offset, size and name; two pairs never share one."""
        return [f"{n}:{entry.image.offset}:{entry.image.size}:{entry.image.name}" if entry.image else f"{n}:::{entry.key}"
                for n, entries in self._slices(start, stop) for entry in entries]

    def read_bytes(self, source: str) -> bytes:
        """The image that one of `sources` names; raises `failure` with missing, too_large or corrupt."""
        n, offset, size, _ = source.split(":", 3)
        if not offset:
            raise self.failure("missing", "no image in the tar")
        if int(size) > self.max_bytes:
            raise self.failure("too_large", f"{size} bytes")
        try:
            with self.files[int(n)][1].open("rb") as file:
                file.seek(int(offset))
                data = file.read(int(size))
        except OSError:
            raise self.failure("corrupt", "the disk cannot read the tar") from None
        if len(data) < int(size):
            raise self.failure("corrupt", "the tar is cut off within it")
        return data

    def _fields(self, name: str, path: pathlib.Path, entries: list[Entry]) -> Iterator[dict[str, str]]:
        try:
            yield from read_members(path, entries)
        except OSError as error:
            raise self.trouble(f"cannot read {name}: {error.strerror or error}") from None

    def _slices(self, start: int, stop: int) -> Iterator[tuple[int, list[Entry]]]:
        while start < stop:
            n = bisect.bisect_right(self.starts, start) - 1
            first = self.starts[n]
            if self._indexed[0] != n:
                name, path = self.files[n]
                try:
                    entries, _ = index_shard(path, self.trouble)
                except PermissionError as error:
                    raise self.trouble(f"cannot read {name}: {error.strerror}") from None
                if len(entries) != self.described[n]["rows"]:
                    raise self.trouble(f"{name} has changed since the run was planned")
                self._indexed = (n, entries)
            end = min(stop, self.starts[n + 1])
            yield n, self._indexed[1][start - first:end - first]
            start = end
