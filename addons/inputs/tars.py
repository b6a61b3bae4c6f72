"""Webdataset tars as rows: the members of one key (an image, a .txt or .json) are a pair, as img2dataset writes them.

    shards/00000.tar:  000000000.jpg  000000000.txt  000000000.json  000000001.jpg ...

A member's key is its path up to the last dot of its name, so that `holiday.v2.png` and `holiday.v2.txt` are a pair. What is
no member of a pair (links, other endings, ...) is counted, named on the screen and in manifest.json. A tar is read by
offset, never unpacked. A pair's fields are those of its .json; its caption is the field that `caption_column` names, else the
.txt (a list of captions is no caption: such a pair is `empty_caption`); its URL is the field that `url_column` names, else
`<tar>/<image>`. Where img2dataset's own Parquet lies next to a tar, the pairs that it lists and the tar lacks (failed
downloads) are rows too.
"""
import tarfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from addons.images.memory import reserve_for_image
from addons.inputs import Manifest, needed_columns
from addons.inputs.columnar import is_textual, reading, to_text
from addons.inputs.files import FileRows, InPlaceReader, InputFile, as_text
from addons.inputs.json_lines import NestedCaption, check_width, parse_object
from addons.inputs.left_aside import LeftAside, kind_by_ending
from addons.inputs.parquet import ParquetFile
from image_text_sim_clip import EXIT_INPUT, Config, RowFailure, Trouble, column_name, say

if TYPE_CHECKING:
    import pandas as pd

# those that are not read here become rows all the same, and their status says so
IMAGES = ("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif", "heic",
          "heif", "jxl", "jp2", "svg", "psd", "ico", "ppm", "pgm", "tga")
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


class TarIndex(NamedTuple):
    """What a tar holds: its entries in order, what is wrong with it ("" if nothing), and what of it is no entry's member."""

    entries: list[Entry]
    flaw: str
    left_aside: LeftAside


# ── What a tar holds ──────────────────────────────────────────────────────────────────────────────────────────────────

def index_tar(tar_file: InputFile) -> TarIndex:
    """The entries of a tar; a flaw ends the list. Raises PermissionError, which is no flaw of the tar."""
    entries: list[Entry] = []
    left_aside = LeftAside()
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
                    kind = kind_of_member(info)
                    if kind in ("image", "txt", "json"):
                        _add_member(info, kind, entries, places)
                    elif kind:
                        left_aside.add(kind, info.name)
                end = tar.offset
            file.seek(end)
            rest = file.read(REST_BYTES)
    except PermissionError:
        raise
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, LookupError, TypeError, RecursionError) as error:
        return TarIndex(entries, str(error) or type(error).__name__, left_aside)
    # tarfile takes a damaged header, and the end of a file that was cut between two members, for the tar's end
    if not rest:
        return TarIndex(entries, "cut off", left_aside)
    return TarIndex(entries, "no valid header follows" if any(rest) else "", left_aside)


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


def kind_of_member(info: tarfile.TarInfo) -> str:
    """What a member is: "image", "txt" or "json" of an entry, "" for a folder, or the kind under which it is left aside."""
    if info.isdir():
        return ""
    if info.issym() or info.islnk():
        return "links"
    if not info.isreg():
        return "devices and pipes"
    if info.issparse():
        return "sparse files"
    by_name = kind_by_ending(info.name)
    ending = info.name.rpartition(".")[2].lower()
    if by_name == "hidden files" and not info.name.rpartition("/")[2].startswith("_"):
        return by_name
    if ending in IMAGES:
        return "image"
    return ending if ending in ("txt", "json") else by_name


def _add_member(info: tarfile.TarInfo, kind: str, entries: list[Entry], places: dict[str, int]) -> None:
    """Add a member of an entry to the one of its key, or begin one."""
    path = info.name.rpartition(".")[0]
    key = "/".join(name for name in path.split("/") if name not in ("", "."))
    if key not in places or kind in entries[places[key]].members:  # a key that comes again is another pair
        places[key] = len(entries)
        entries.append(Entry(key, {}, {}))
    entries[places[key]].members[kind] = Member(info.name, info.offset_data, info.size)


def index_shard(tar_file: InputFile) -> TarIndex:
    """`index_tar`, and behind its entries those that only the Parquet next to the tar knows.

    Raises Trouble (exit 3) for a Parquet that cannot be read, and PermissionError.
    """
    index = index_tar(tar_file)
    entries = index.entries
    side_file = tar_file.next_to(".parquet")
    if side_file.info() is None:
        return index
    with reading(side_file.name):
        columns = _read_side_file(side_file)
    there = {as_text(entry.key) for entry in entries} | {as_text(entry.key.rpartition("/")[2]) for entry in entries}
    for number, key in enumerate(columns.get("key", [])):
        if key not in there:
            fields = {name: cells[number] for name, cells in columns.items()}
            entries.append(Entry(key, {}, fields))
    return index


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


class Texts(NamedTuple):
    """What an entry's texts say: the fields of its .json, its caption, and whether the .json has a list or object for one."""

    fields: dict[str, str]
    caption: str
    has_nested_caption: bool


def read_members(tar_file: InputFile, entries: list[Entry], caption_column: str) -> Iterator[Texts]:
    """Each entry's texts; the caption is the field `caption_column`, else the .txt."""
    with tar_file.open() as file:
        def text_of(member: Member | None) -> str:
            if member is None or member.size > MAX_TEXT_BYTES:
                return ""
            file.seek(member.offset)
            return file.read(member.size).decode("utf-8-sig", "replace")
        for entry in entries:
            fields, is_nested = _read_fields(text_of(entry.members.get("json")) or "{}", caption_column)
            fields = {**entry.fields, **fields}
            caption = fields.get(caption_column) or text_of(entry.members.get("txt"))
            yield Texts(fields, caption, is_nested)


def _read_fields(text: str, caption_column: str) -> tuple[dict[str, str], bool]:
    """The fields of a .json, none for one that is no JSON (the .txt may still be there), and whether its caption is nested."""
    try:
        return parse_object(text, caption_column), False
    except NestedCaption:
        return {**parse_object(text), caption_column: ""}, True
    except ValueError:
        return {}, False


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
        nested = 0
        described: list[Manifest] = []
        left_aside = LeftAside()
        starts = [0]
        for file in found:
            try:
                entry, names = self._describe_tar(file, config, left_aside, is_only=len(found) == 1)
            except OSError as error:
                raise Trouble(EXIT_INPUT, f"cannot read {file.name}: {error.strerror or error}") from None
            columns.update(dict.fromkeys(names))
            check_width(len(columns))
            described.append(entry)
            nested += entry["nested_captions"]
            starts.append(starts[-1] + entry["rows"])
            if config.limit and starts[-1] >= config.limit:
                break
        rows = starts[-1]
        left_aside.tell("the tars")
        if nested:
            say(f"{nested:,} captions in the tars' .json are lists or objects, which are not read yet: those pairs get their "
                ".txt, or the status empty_caption")
        return {"kind": self.kind, "columns": list(columns), "rows": rows, "malformed": 0, "files": described,
                "left_aside": left_aside.describe(),
                "starts": sorted({start for start in starts if start < rows})}

    def _describe_tar(self, file: InputFile, config: Config, left_aside: LeftAside,
                      is_only: bool) -> tuple[Manifest, list[str]]:
        """A tar's entry in manifest.json, and the names of its pairs' fields; what is no pair's is added to `left_aside`.

        Raises OSError, and Trouble (exit 3) for an only file that is no tar.
        """
        entry = {"name": file.name, "rows": 0, **self.identify(file)}
        entries, flaw, left = index_shard(file)
        left_aside.add_all(left, f"{file.name}/")
        if flaw and not entries:
            if is_only:
                raise Trouble(EXIT_INPUT, f"{file.name} cannot be read as a tar: {flaw}")
            say(f"{file.name} cannot be read as a tar ({flaw}): no row of it is known")
        elif flaw:
            say(f"{file.name} is damaged ({flaw}): what comes after its first {len(entries)} pairs is lost")
        if flaw:
            entry["flaw"] = flaw
        entry["rows"] = len(entries)
        entry["nested_captions"] = 0
        names: dict[str, None] = {}
        for texts in read_members(file, entries, column_name(config.caption_column)):
            names.update(dict.fromkeys(texts.fields))
            check_width(len(names))
            entry["nested_captions"] += texts.has_nested_caption
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
                for entry, texts in zip(entries, read_members(file, entries, self.caption_column), strict=True):
                    rows.append(self._make_row(file, entry, texts))
            except OSError as error:
                raise Trouble(EXIT_INPUT, f"cannot read {file.name}: {error.strerror or error}") from None
        return pd.DataFrame(rows, columns=self.columns, dtype="str")

    def _make_row(self, file: InputFile, entry: Entry, texts: Texts) -> list[str]:
        name = as_text(entry.image.name if entry.image else entry.key)
        url = texts.fields.get(self.url_column) or f"{as_text(file.name)}/{name}"
        cells = {**texts.fields, self.caption_column: texts.caption, self.url_column: url}
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
            entries = index_shard(file).entries
        except PermissionError as error:
            raise Trouble(EXIT_INPUT, f"cannot read {file.name}: {error.strerror}") from None
        if len(entries) != self.counts[number]:
            raise Trouble(EXIT_INPUT, f"{file.name} has changed since the run was planned")
        return entries


READER = TarReader()
