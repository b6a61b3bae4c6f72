"""Webdataset tars as rows: the members of one key (an image, a .txt or .json) are a pair, as img2dataset writes them.

    shards/00000.tar:  000000000.jpg  000000000.txt  000000000.json  000000001.jpg ...

A tar is read by offset, never unpacked. A pair's fields are those of its .json; its caption is the field that
`caption_column` names, else the .txt; its URL is the field that `url_column` names, else `<tar>/<image>`. Where
img2dataset's own Parquet lies next to a tar, the pairs that it lists and the tar lacks (failed downloads) are rows too.
"""
import tarfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from addons.inputs import Manifest, needed_columns
from addons.inputs.columnar import is_textual, reading, to_text
from addons.inputs.files import FileRows, InPlaceReader, InputFile, as_text
from addons.inputs.json_lines import check_width, parse_object
from addons.inputs.parquet import ParquetFile
from image_text_sim_clip import EXIT_INPUT, Config, RowFailure, Trouble, column_name, reserve_for_image, say

if TYPE_CHECKING:
    import pandas as pd

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
MOST_HEADER_BYTES = 1_000_000  # of a long name or a pax header
MOST_PAX_KEYS = 1000  # that hold for a whole tar
_HEADER_TYPES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
MAX_TEXT_BYTES = 16_000_000  # of a .txt or .json; a longer one is no caption
REST_BYTES = 1 << 20  # behind the last member, of which a whole tar has nothing but zeros


class Member(NamedTuple):
    """Where a file lies in its tar."""

    name: str
    offset: int
    size: int


class Entry(NamedTuple):
    """The members of one key; the fields of a pair that the tar lacks, from the Parquet next to it."""

    key: str
    members: dict[str, Member]  # "image", "txt", "json" -> where
    fields: dict[str, str]

    @property
    def image(self) -> Member | None:
        """The image's place, None where there is none."""
        return self.members.get("image")


# ── What a tar holds ──────────────────────────────────────────────────────────────────────────────────────────────────

def index_tar(tar_file: InputFile) -> tuple[list[Entry], str]:
    """The entries of a tar in its order, and what is wrong with it ("" if nothing): a flaw ends the list.

    Raises PermissionError, which is no flaw of the tar.
    """
    entries: list[Entry] = []
    places: dict[str, int] = {}  # of the last entry of each key
    try:
        with tar_file.open() as file:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=BoundedInfo) as tar:
                for info in tar:
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
                    if tar.offset <= info.offset or info.size < 0:  # Python 3.11 would read it again for ever
                        raise tarfile.ReadError("a member of negative size")
                    if len(tar.pax_headers) > MOST_PAX_KEYS:  # each member gets a copy
                        raise tarfile.ReadError("too many pax headers")
                    _add_member(info, entries, places)
                end = tar.offset
            file.seek(end)
            rest = file.read(REST_BYTES)
    except PermissionError:
        raise
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, LookupError, TypeError, RecursionError) as error:
        return entries, str(error) or type(error).__name__
    # tarfile takes a damaged header, and the end of a file that was cut between two members, for the tar's end
    if not rest:
        return entries, "cut off"
    return entries, "no valid header follows" if any(rest) else ""


class BoundedInfo(tarfile.TarInfo):
    """A TarInfo that refuses what leads backwards, and headers that would fill the memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "BoundedInfo":
        """See tarfile; raises HeaderError for a negative size, and for a long name or pax header beyond MOST_HEADER_BYTES."""
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0:
            raise tarfile.HeaderError("a member of negative size")
        if info.type in _HEADER_TYPES and info.size > MOST_HEADER_BYTES:
            raise tarfile.HeaderError("a header that is too long")
        return info


def _add_member(info: tarfile.TarInfo, entries: list[Entry], places: dict[str, int]) -> None:
    """Add a member that is an image, a .txt or a .json to the entry of its key, or begin one."""
    folder, _, base = info.name.rpartition("/")
    stem, _, suffix = base.partition(".")
    kind = "image" if suffix.lower() in IMAGES else suffix.lower()
    if not info.isreg() or info.issparse() or kind not in ("image", "txt", "json"):
        return
    key = f"{folder}/{stem}" if folder else stem
    if key not in places or kind in entries[places[key]].members:  # a key that comes again is another pair
        places[key] = len(entries)
        entries.append(Entry(key, {}, {}))
    entries[places[key]].members[kind] = Member(info.name, info.offset_data, info.size)


def index_shard(tar_file: InputFile) -> tuple[list[Entry], str]:
    """`index_tar`, and behind its entries those that only the Parquet next to the tar knows.

    Raises Trouble (exit 3) for a Parquet that cannot be read, and PermissionError.
    """
    entries, flaw = index_tar(tar_file)
    side_file = tar_file.next_to(".parquet")
    if side_file.info() is None:
        return entries, flaw
    with reading(side_file.name):
        columns = _read_side_file(side_file)
    there = {as_text(entry.key) for entry in entries} | {as_text(entry.key.rpartition("/")[2]) for entry in entries}
    for number, key in enumerate(columns.get("key", [])):
        if key not in there:
            fields = {name: cells[number] for name, cells in columns.items()}
            entries.append(Entry(key, {}, fields))
    return entries, flaw


def _read_side_file(side_file: InputFile) -> dict[str, list[str]]:
    """The textual columns of the Parquet next to a tar as text, by name; {} for one without keys, which is none of ours."""
    with ParquetFile(side_file) as opened:
        names = [field.name for field in opened.schema if is_textual(field.type)]
        if "key" not in names:
            return {}
        blocks = [opened.read_block(number, names) for number in range(len(opened.block_rows))]
    if not blocks:
        return {}
    table = pa.concat_tables(blocks)
    return {name: to_text(table[name]).to_pylist() for name in names}


def read_members(tar_file: InputFile, entries: list[Entry]) -> Iterator[dict[str, str]]:
    """Each entry's fields: those of its .json, and its .txt under the key "" (no JSON of img2dataset has it)."""
    with tar_file.open() as file:
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


# ── Reader and rows ───────────────────────────────────────────────────────────────────────────────────────────────────

class TarReader(InPlaceReader):
    """Webdataset tars, any number of them; each begins a partition."""

    kind = "tar"
    suffixes = (".tar",)
    side_suffixes = (".parquet",)  # img2dataset lays one next to each tar

    def identify(self, file: InputFile) -> Manifest:
        """Size and time of a tar, and of the Parquet next to it."""
        side_info = file.next_to(".parquet").info()
        side_bytes = side_info.bytes if side_info else None
        side_mtime_ns = side_info.mtime_ns if side_info else None
        return {**super().identify(file), "side_bytes": side_bytes, "side_mtime_ns": side_mtime_ns}

    def describe_files(self, found: list[InputFile], config: Config) -> Manifest:
        """What the tars hold: every header and .json is read once, no image. What is wrong with a tar is said."""
        columns = dict.fromkeys(needed_columns(config))
        described: list[Manifest] = []
        starts = [0]
        for file in found:
            try:
                entry, names = self._describe_tar(file, is_only=len(found) == 1)
            except OSError as error:
                raise Trouble(EXIT_INPUT, f"cannot read {file.name}: {error.strerror or error}") from None
            columns.update(dict.fromkeys(names))
            check_width(len(columns))
            described.append(entry)
            starts.append(starts[-1] + entry["rows"])
            if config.limit and starts[-1] >= config.limit:
                break
        rows = starts[-1]
        return {"kind": self.kind, "columns": list(columns), "rows": rows, "malformed": 0, "files": described,
                "starts": sorted({start for start in starts if start < rows})}

    def _describe_tar(self, file: InputFile, is_only: bool) -> tuple[Manifest, list[str]]:
        """A tar's entry in manifest.json, and the names of its pairs' fields.

        Raises OSError, and Trouble (exit 3) for an only file that is no tar.
        """
        entry = {"name": file.name, "rows": 0, **self.identify(file)}
        entries, flaw = index_shard(file)
        if flaw and not entries:
            if is_only:
                raise Trouble(EXIT_INPUT, f"{file.name} cannot be read as a tar: {flaw}")
            say(f"{file.name} cannot be read as a tar ({flaw}): no row of it is known")
        elif flaw:
            say(f"{file.name} is damaged ({flaw}): what comes after its first {len(entries)} pairs is lost")
        if flaw:
            entry["flaw"] = flaw
        entry["rows"] = len(entries)
        names: dict[str, None] = {}
        for fields in read_members(file, entries):
            names.update(dict.fromkeys(fields))
            check_width(len(names))
        names.pop("", None)
        return entry, list(names)

    def open_files(self, manifest: Manifest, found: list[InputFile], config: Config) -> "TarRows":
        """The rows of the tars."""
        return TarRows(manifest, found, config)


class TarRows(FileRows):
    """Rows of tars by number, and the images they stand for. The index of one tar is kept."""

    brings_images = True

    def __init__(self, manifest: Manifest, found: list[InputFile], config: Config) -> None:
        super().__init__(manifest, found)
        self.url_column = column_name(config.url_column)
        self.caption_column = column_name(config.caption_column)
        self.max_bytes = config.max_image_bytes
        self._indexed_number = -1  # the place in `files` of the tar whose index is kept
        self._entries: list[Entry] = []

    def read(self, start: int, stop: int) -> "pd.DataFrame":
        """Rows [start, stop) as columns of text; what a pair's .json lacks is ""."""
        import pandas as pd
        rows = []
        for number, entries in self._slices(start, stop):
            file = self.files[number]
            try:
                for entry, fields in zip(entries, read_members(file, entries), strict=True):
                    rows.append(self._make_row(file, entry, fields))
            except OSError as error:
                raise Trouble(EXIT_INPUT, f"cannot read {file.name}: {error.strerror or error}") from None
        return pd.DataFrame(rows, columns=self.columns, dtype="str")

    def _make_row(self, file: InputFile, entry: Entry, fields: dict[str, str]) -> list[str]:
        name = as_text(entry.image.name if entry.image else entry.key)
        caption = fields.get(self.caption_column) or fields[""]
        url = fields.get(self.url_column) or f"{as_text(file.name)}/{name}"
        cells = {**fields, self.caption_column: caption, self.url_column: url}
        return [cells.get(column, "") for column in self.columns]

    def sources(self, start: int, stop: int) -> list[str]:
        """What `read_bytes` wants for each of the rows [start, stop): tar, offset, size and name; two pairs never share one."""
        found = []
        for number, entries in self._slices(start, stop):
            for entry in entries:
                if entry.image:
                    found.append(f"{number}:{entry.image.offset}:{entry.image.size}:{entry.image.name}")
                else:
                    found.append(f"{number}:::{entry.key}")
        return found

    def read_bytes(self, source: str) -> bytes:
        """The image that one of `sources` names. Raises RowFailure: missing, too_large or corrupt."""
        number, offset, size, _ = source.split(":", 3)
        if not offset:
            raise RowFailure("missing", "no image in the tar")
        if int(size) > self.max_bytes:
            raise RowFailure("too_large", f"{size} bytes")
        reserve_for_image(int(size))
        try:
            with self.files[int(number)].open() as file:
                file.seek(int(offset))
                data = file.read(int(size))
        except OSError:
            raise RowFailure("corrupt", "the disk cannot read the tar") from None
        if len(data) < int(size):
            raise RowFailure("corrupt", "the tar is cut off within it")
        return data

    def _slices(self, start: int, stop: int) -> Iterator[tuple[int, list[Entry]]]:
        """The entries of the rows [start, stop), and the place in `files` of the tar that they are in."""
        for number, first, end in self.stretches(start, stop):
            if self._indexed_number != number:
                self._entries = self._index(number)
                self._indexed_number = number
            yield number, self._entries[first:end]

    def _index(self, number: int) -> list[Entry]:
        file = self.files[number]
        try:
            entries, _ = index_shard(file)
        except PermissionError as error:
            raise Trouble(EXIT_INPUT, f"cannot read {file.name}: {error.strerror}") from None
        if len(entries) != self.counts[number]:
            raise Trouble(EXIT_INPUT, f"{file.name} has changed since the run was planned")
        return entries


READER = TarReader()
