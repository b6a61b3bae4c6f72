"""Webdataset tars as rows: the members of one key (an image, a .txt or .json) are a pair, as img2dataset writes them.

    shards/00000.tar:  000000000.jpg  000000000.txt  000000000.json  000000001.jpg ...

A member's key is its path up to the last dot of its name, so that `holiday.v2.png` and `holiday.v2.txt` are a pair. What is
no member of a pair (links, other endings, ...) is counted, named on the screen and in manifest.json. A tar is read by
offset, never unpacked, and a run is planned without reading it where a file next to it tells how many pairs it has
(tar_counts.py). A pair's fields are those of its .json; its caption is the field that `caption_column` names, else the .txt (a
list of captions makes as many rows, see caption_lists.py; an object is no caption); its URL is the field that `url_column`
names, else `<tar>/<image>`. What a pair lacks the names of the tar's folders may say (`lang=en/00000.tar`). Where img2dataset's
own Parquet lies next to a tar, the pairs that it lists and the tar lacks (failed downloads) are rows too.
"""
import codecs
import hashlib
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from addons.images.memory import reserve_for_image
from addons.inputs import Manifest, needed_columns, tar_counts
from addons.inputs.caption_lists import CAPTION_INDEX
from addons.inputs.columnar import is_textual, reading, to_text
from addons.inputs.compression import MAGIC_BYTES, name_compression
from addons.inputs.files import FileRows, InPlaceReader, InputFile, as_text
from addons.inputs.json_lines import Cells, NestedCaption, check_width, parse_object, parse_rows
from addons.inputs.left_aside import LeftAside, kind_by_ending
from addons.inputs.parquet import ParquetFile
from image_text_sim_clip import EXIT_INPUT, Config, RowFailure, Trouble, column_name, say

if TYPE_CHECKING:
    import pandas as pd

    from addons.stores import FileInfo
    from addons.stores.spool import Spool

# those that are not read here become rows all the same, and their status says so
IMAGES = ("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif", "heic",
          "heif", "jxl", "jp2", "svg", "psd", "ico", "ppm", "pgm", "tga")
MOST_HEADER_BYTES = 1_000_000  # of a long name or a pax header
MOST_PAX_KEYS = 1000  # that hold for a whole tar
_HEADER_TYPES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
MAX_TEXT_BYTES = 16_000_000  # of a .txt or .json; a longer one is no caption
JSON_ENCODING = "utf-8"  # of each .json, whatever the encoding of a .txt
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
    gathered = _Gathered(entries)
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
                        gathered.add(info, kind)
                    elif kind:
                        left_aside.add(kind, info.name)
                end = tar.offset
            file.seek(end)
            rest = file.read(REST_BYTES)
    except PermissionError:
        raise
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, LookupError, TypeError, RecursionError) as error:
        return TarIndex(entries, _tell_packed(tar_file) or str(error) or type(error).__name__, left_aside)
    # tarfile takes a damaged header, and the end of a file that was cut between two members, for the tar's end
    if not rest:
        return TarIndex(entries, "cut off", left_aside)
    return TarIndex(entries, "no valid header follows" if any(rest) else "", left_aside)


def _tell_packed(tar_file: InputFile) -> str:
    """What a file is that is no tar but an archive, or compressed; "" for what is none of these."""
    try:
        kind = name_compression(tar_file.read_range(0, MAGIC_BYTES), tar_file.name)
    except Trouble as trouble:
        return str(trouble)
    except OSError:
        return ""
    return f"it is compressed ({kind}), and tars are read from their midst: unpack it" if kind else ""


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


class _Gathered:
    """Members gathered into entries by their keys.

    A key whose member of a kind is there already is that of another pair, and so are the members right before it that came back
    to that key with it: where shards whose keys begin at 0 were joined, no image gets a text of the other one's.
    """

    def __init__(self, entries: list[Entry]) -> None:
        self._entries = entries
        self._places: dict[str, int] = {}  # of the last entry of each key
        self._last_key: str | None = None
        self._is_back = False  # whether the last members came back to a key that others had followed
        self._came_back: list[str] = []  # their kinds

    def add(self, info: tarfile.TarInfo, kind: str) -> None:
        """Add a member to the entry of its key, or begin one."""
        path = info.name.rpartition(".")[0]
        key = "/".join(name for name in path.split("/") if name not in ("", "."))
        if key != self._last_key:
            self._last_key = key
            self._is_back = key in self._places
            self._came_back = []
        if kind in self._came_back:  # nothing of another pair came back, but this kind of member twice
            self._came_back = []
        if key not in self._places or kind in self._entries[self._places[key]].members:
            self._begin(key)
        elif self._is_back:
            self._came_back.append(kind)
        self._entries[self._places[key]].members[kind] = Member(info.name, info.offset_data, info.size)

    def _begin(self, key: str) -> None:
        """Begin an entry with the members that came back to its key."""
        members = {kind: self._entries[self._places[key]].members.pop(kind) for kind in self._came_back}
        self._is_back = False
        self._came_back = []
        self._places[key] = len(self._entries)
        self._entries.append(Entry(key, members, {}))


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
    """What an entry's texts say: its fields, once for each of its captions, and whether its .json has an object for one."""

    rows: list[Cells]
    has_nested_caption: bool
    has_flaw: bool  # bytes that are no text, each of which has become U+FFFD


def decode_text(data: bytes, encoding: str) -> tuple[str, bool]:
    """What lies next to an image as text, and whether bytes of it are none: those become U+FFFD.

    What begins with the byte order mark of UTF-16, as PowerShell and Notepad write it, has that encoding.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    try:
        return data.decode(encoding).removeprefix("\ufeff"), False
    except UnicodeError:
        return data.decode(encoding, "replace").removeprefix("\ufeff"), True


def tell_flawed(count: int, place: str, encoding: str) -> str:
    """What to say of texts with bytes that are no text; "" for none."""
    if not count:
        return ""
    return (f"{count:,} texts in {place} are not {encoding}: what cannot be read in them is U+FFFD now (if they are latin-1, "
            "set encoding: latin-1)")


def read_members(tar_file: InputFile, entries: list[Entry], config: Config) -> Iterator[Texts]:
    """Each entry's texts; the caption is the field that `caption_column` names, else the .txt."""
    caption_column = column_name(config.caption_column)
    flawed: list[Member] = []  # of the entry at hand
    with tar_file.open() as file:
        def text_of(member: Member | None, encoding: str) -> str:
            if member is None or member.size > MAX_TEXT_BYTES:
                return ""
            file.seek(member.offset)
            text, has_flaw = decode_text(file.read(member.size), encoding)
            if has_flaw:
                flawed.append(member)
            return text
        for entry in entries:
            flawed.clear()
            rows, is_nested = read_cells(text_of(entry.members.get("json"), JSON_ENCODING) or "{}", caption_column)
            rows = [{**entry.fields, **cells} for cells in rows]
            if not rows[0].get(caption_column) and len(rows) == 1:
                rows[0][caption_column] = text_of(entry.members.get("txt"), config.encoding)
            yield Texts(rows, is_nested, bool(flawed))


def read_cells(text: str, caption_column: str) -> tuple[list[Cells], bool]:
    """The fields of a .json, for each of its captions, and whether that is nested; none for what is no JSON."""
    try:
        return parse_rows(text, caption_column), False
    except NestedCaption:
        return [{**parse_object(text), caption_column: ""}], True
    except ValueError:
        return [{}], False


class Pick(NamedTuple):
    """A row: the place of its entry in its tar, and which of the entry's captions it is."""

    place: int
    caption: int


def hash_entries(entries: list[Entry]) -> str:
    """The sha256 of where everything lies in a tar, and of what the Parquet next to it says."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(repr((entry.key, sorted(entry.members.items()), sorted(entry.fields.items()))).encode("utf-8", "replace"))
    return digest.hexdigest()


# ── Reader and rows ───────────────────────────────────────────────────────────────────────────────────────────────────

def fetch_in_turn(found: list[InputFile]) -> Iterator[InputFile]:
    """Copies of tars that lie in an object store, and of the Parquet next to each, until the next one is asked for."""
    from addons.stores import spool
    return spool.fetch_in_turn(found, ".parquet")


def open_spool(found: list[InputFile], entries: list[Manifest]) -> "Spool":
    """What fetches tars that lie in an object store, each once, and as the entries of manifest.json say."""
    from addons.stores import spool
    return spool.Spool(found, entries, ".parquet")


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
        identity = {**super().identify(file), "side_bytes": side_bytes, "side_mtime_ns": side_mtime_ns}
        return identity | {"side_version": side_info.version} if side_info and side_info.version else identity

    def describe_files(self, found: list[InputFile], config: Config) -> Manifest:
        """What the tars hold, as the files next to them tell; of other tars every header and .json is read once, no image.

        What is wrong with a tar is said.
        """
        needed = needed_columns(config)
        columns = dict.fromkeys(needed)
        nested = 0
        flawed = 0
        input_rows = 0
        described: list[Manifest] = []
        left_aside = LeftAside()
        starts = [0]
        counts = tar_counts.count_tars(found, needed[-1], config.limit)
        unread = [file for file, count in zip(found, counts, strict=True) if count is None]
        fetched = fetch_in_turn(unread) if is_in_store(found) else iter(unread)
        for file, count in zip(found, counts, strict=True):
            if count:
                entry = {"name": file.name, "rows": count.rows, **self.identify(file), "counted_by": count.file.name,
                         "index_sha256": count.sha256}
                names: Sequence[str] = count.columns
                first_rows: Sequence[int] = range(count.rows)
            else:
                try:
                    entry, names, first_rows = self._describe_tar(file, next(fetched), config, left_aside, len(found) == 1)
                except OSError as error:
                    raise Trouble(EXIT_INPUT, f"cannot read {file.name}: {error.strerror or error}") from None
            columns.update(dict.fromkeys([*names, *dict(file.folder_columns)]))
            check_width(len(columns))
            described.append(entry)
            nested += entry.get("nested_captions", 0)
            flawed += entry.get("flawed_texts", 0)
            input_rows += sum(not config.limit or starts[-1] + row < config.limit for row in first_rows)
            starts.append(starts[-1] + entry["rows"])
            if config.limit and starts[-1] >= config.limit:
                break
        rows = starts[-1]
        left_aside.tell("the tars")
        if nested:
            say(f"{nested:,} captions in the tars' .json are objects, or lists of other things than captions: those pairs get "
                "their .txt, or the status empty_caption")
        if flawed:
            say(tell_flawed(flawed, "the tars", config.encoding))
        manifest = {"kind": self.kind, "columns": list(columns), "rows": rows, "malformed": 0, "files": described,
                    "left_aside": left_aside.describe(),
                    "starts": sorted({start for start in starts if start < rows})}
        return manifest | {"input_rows": input_rows} if CAPTION_INDEX in columns else manifest

    def _describe_tar(self, file: InputFile, here: InputFile, config: Config, left_aside: LeftAside,
                      is_only: bool) -> tuple[Manifest, list[str], list[int]]:
        """A tar's entry in manifest.json, the names of its pairs' fields, and the first row of each pair.

        `here` is the tar itself or, of one in an object store, its copy. What is no pair's is added to `left_aside`.

        Raises OSError, and Trouble (exit 3) for an only file that is no tar.
        """
        entry = {"name": file.name, "rows": 0, **self.identify(file)}
        entries, flaw, left = index_shard(here)
        left_aside.add_all(left, f"{file.name}/")
        if flaw and not entries:
            if is_only:
                raise Trouble(EXIT_INPUT, f"{file.name} cannot be read as a tar: {flaw}")
            say(f"{file.name} cannot be read as a tar ({flaw}): no row of it is known")
        elif flaw:
            say(f"{file.name} is damaged ({flaw}): what comes after its first {len(entries)} pairs is lost")
        if flaw:
            entry["flaw"] = flaw
        entry["index_sha256"] = hash_entries(entries)
        entry["nested_captions"] = 0
        names: dict[str, None] = {}
        first_rows = []
        for texts in read_members(here, entries, config):
            names.update(dict.fromkeys(texts.rows[0]))
            check_width(len(names))
            entry["nested_captions"] += texts.has_nested_caption
            if texts.has_flaw:
                entry["flawed_texts"] = entry.get("flawed_texts", 0) + 1
            first_rows.append(entry["rows"])
            entry["rows"] += len(texts.rows)
        if entry["rows"] != len(entries):
            entry["input_rows"] = len(entries)
        return entry, list(names), first_rows

    def used_besides(self, found: list[InputFile], described: Manifest) -> set[str]:
        """The statistics of tars that were planned without being read."""
        pairs = zip(found, described["files"], strict=False)  # `limit` leaves some out
        return {file.next_to(tar_counts.STATISTICS).path for file, entry in pairs if "counted_by" in entry}

    def hash_index(self, file: InputFile) -> str:
        """What the tar and the Parquet next to it hold, where in them."""
        return hash_entries(index_shard(file).entries)

    def hash_again(self, file: InputFile, entry: Manifest) -> str:
        """The same or, of a tar that was not read to plan it, the hash of what told its rows."""
        return tar_counts.hash_count(file, entry["counted_by"]) if "counted_by" in entry else self.hash_index(file)

    def open_files(self, manifest: Manifest, found: list[InputFile], config: Config) -> "TarRows":
        """The rows of the tars."""
        return TarRows(manifest, found, config)


class TarRows(FileRows):
    """Rows of tars by number, and the images they stand for. The index of one tar is kept."""

    brings_images = True

    def __init__(self, manifest: Manifest, found: list[InputFile], config: Config) -> None:
        super().__init__(manifest, found)
        self.url_column = column_name(config.url_column)
        self.config = config
        self.max_bytes = config.max_image_bytes
        self.entry_counts: list[int] = [file.get("input_rows", file["rows"]) for file in manifest["files"]]
        self.counted_by: list[str] = [file.get("counted_by", "") for file in manifest["files"]]  # a file next to it, or itself
        self._planned: list[Manifest] = manifest["files"]
        self._told: set[str] = set()  # what need not be said of each tar
        self._spool: Spool | None = open_spool(found, manifest["files"]) if is_in_store(found) else None
        self._infos: dict[int, FileInfo | None] = {}  # of tars on a disk, by their places in `files`, as they were indexed
        self._indexed_number = -1  # the place in `files` of the tar whose index is kept
        self._entries: list[Entry] = []
        self._picks: Sequence[Pick] = []  # of the rows of that tar

    def read(self, start: int, stop: int) -> "pd.DataFrame":
        """Rows [start, stop) as columns of text; what a pair's .json lacks is ""."""
        import pandas as pd
        rows = []
        for number, picks in self._slices(start, stop):
            file = self.files[number]
            places = list(dict.fromkeys(pick.place for pick in picks))
            entries = [self._entries[place] for place in places]
            try:
                texts_of = dict(zip(places, read_members(self._fetch(number), entries, self.config), strict=True))
            except OSError as error:
                raise Trouble(EXIT_INPUT, f"cannot read {file.name}: {error.strerror or error}") from None
            if self.counted_by[number]:
                self._check_texts(number, texts_of.values())
            rows += [self._make_row(number, pick, texts_of[pick.place].rows) for pick in picks]
        return pd.DataFrame(rows, columns=self.columns, dtype="str")

    def _make_row(self, number: int, pick: Pick, rows: list[Cells]) -> list[str]:
        if pick.caption >= len(rows):
            raise self._refuse_other(number)
        file = self.files[number]
        entry = self._entries[pick.place]
        cells = rows[pick.caption]
        name = as_text(entry.image.name if entry.image else entry.key)
        of_folders = dict(file.folder_columns)
        last = {**of_folders, self.url_column: f"{as_text(file.name)}/{name}", CAPTION_INDEX: "0"}
        return [cells.get(column) or last.get(column, "") for column in self.columns]

    def sources(self, start: int, stop: int) -> list[str]:
        """What `read_bytes` wants for each of the rows [start, stop): tar, offset, size and name; two pairs never share one."""
        found = []
        for number, picks in self._slices(start, stop):
            for pick in picks:
                entry = self._entries[pick.place]
                if entry.image:
                    found.append(f"{number}:{entry.image.offset}:{entry.image.size}:{entry.image.name}")
                else:
                    found.append(f"{number}:::{entry.key}")
        return found

    def read_bytes(self, source: str) -> bytes:
        """The image that one of `sources` names. Raises RowFailure: missing, too_large or corrupt; Trouble for another tar."""
        number, offset, size, _ = source.split(":", 3)
        if not offset:
            raise RowFailure("missing", "no image in the tar")
        if int(size) > self.max_bytes:
            raise RowFailure("too_large", f"{size} bytes")
        reserve_for_image(int(size))
        tar_file = self._spool.find(int(number)) if self._spool else self.files[int(number)]
        info = tar_file.info()
        if self._spool is None and info is not None and info != self._infos.get(int(number), info):
            raise self._refuse_other(int(number))  # other images may lie at that place now
        try:
            with tar_file.open() as file:
                file.seek(int(offset))
                data = file.read(int(size))
        except OSError:
            raise RowFailure("corrupt", "the disk cannot read the tar") from None
        if len(data) < int(size):
            raise RowFailure("corrupt", "the tar is cut off within it")
        return data

    def _slices(self, start: int, stop: int) -> Iterator[tuple[int, "Sequence[Pick]"]]:
        """Which entry and which of its captions each of the rows [start, stop) is, and the place in `files` of their tar."""
        for number, first, end in self.stretches(start, stop):
            if self._indexed_number != number:
                self._entries = self._index(number)
                self._picks = self._pick(number)
                self._indexed_number = number
            yield number, self._picks[first:end]

    def _fetch(self, number: int) -> InputFile:
        """The tar where it can be read all over. Trouble (exit 3) for one in an object store that cannot be fetched."""
        if self._spool is None:
            return self.files[number]
        try:
            return self._spool.fetch(number)
        except OSError as error:
            raise Trouble(EXIT_INPUT, f"cannot read {self.files[number].name}: {error.strerror or error}") from None

    def _index(self, number: int) -> list[Entry]:
        file = self.files[number]
        if self._spool is None:
            self._infos[number] = file.info()
            if READER.has_changed(file, self._planned[number]):
                raise self._refuse_other(number)
        try:
            index = index_shard(self._fetch(number))
        except PermissionError as error:
            raise Trouble(EXIT_INPUT, f"cannot read {file.name}: {error.strerror}") from None
        if self.counted_by[number]:
            self._check_index(number, index)
        elif len(index.entries) != self.entry_counts[number]:
            raise self._refuse_other(number)
        return index.entries

    def _check_index(self, number: int, index: TarIndex) -> None:
        """Say what planning did not see in a tar that it did not read.

        Trouble (exit 3) where the tar does not hold what was counted, or a file that is the only one is no tar.
        """
        name = self.files[number].name
        has_pairs = any(entry.members for entry in index.entries)
        if index.flaw and not has_pairs and len(self.files) == 1:
            raise Trouble(EXIT_INPUT, f"{name} cannot be read as a tar: {index.flaw}")
        if index.flaw:
            say(f"{name} is damaged ({index.flaw}): pairs that come after that have no image")
        if index.left_aside.total and "left aside" not in self._told:
            self._told.add("left aside")
            index.left_aside.tell(f"{name}, and perhaps in other tars")
        if len(index.entries) != self.counts[number]:
            raise self._refuse_count(number, f"{len(index.entries)} pairs")

    def _check_texts(self, number: int, read: Iterable[Texts]) -> None:
        """Say which fields no file next to the tars has told of; Trouble (exit 3) for lists of captions, which it did not."""
        if any(len(texts.rows) > 1 for texts in read):
            raise self._refuse_count(number, "lists of captions, of which each is a row")
        unknown = {name for texts in read for name in texts.rows[0]} - set(self.columns) - {CAPTION_INDEX}
        if unknown - self._told:
            self._told.update(unknown)
            say(f"left aside in {self.files[number].name}, and perhaps in other tars, because {self.counted_by[number]} does "
                f"not tell of them: the fields {', '.join(sorted(unknown))[:300]}")

    def _refuse_other(self, number: int) -> Trouble:
        return Trouble(EXIT_INPUT, f"{self.files[number].name} has changed since the run was planned")

    def _refuse_count(self, number: int, found: str) -> Trouble:
        counted_by = self.counted_by[number]
        return Trouble(EXIT_INPUT, f"{self.files[number].name} holds {found}, but {counted_by} tells of "
                                   f"{self.counts[number]} rows: put right or remove {counted_by}, and plan again with --fresh")

    def _pick(self, number: int) -> "list[Pick]":
        """The rows of a tar; where it has lists of captions, its .json files are read again to know how long they are."""
        if self.counts[number] == self.entry_counts[number]:
            return [Pick(place, 0) for place in range(self.counts[number])]
        file = self.files[number]
        picks: list[Pick] = []
        try:
            for place, texts in enumerate(read_members(self._fetch(number), self._entries, self.config)):
                picks += [Pick(place, caption) for caption in range(len(texts.rows))]
        except OSError as error:
            raise Trouble(EXIT_INPUT, f"cannot read {file.name}: {error.strerror or error}") from None
        if len(picks) != self.counts[number]:
            raise self._refuse_other(number)
        return picks


def is_in_store(found: list[InputFile]) -> bool:
    """Whether the tars lie in an object store."""
    return bool(found) and found[0].in_store


READER = TarReader()
