"""What text tables share: their bytes in one pass, hashed, unpacked and transcoded on the way, and their readers' base."""
import codecs
import hashlib
import io
import pathlib
import typing
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

import pyarrow as pa

from addons.inputs import Manifest, Rows, files
from addons.inputs.compression import ERRORS, MAGIC_BYTES, Unpacked, name_compression, unpack
from addons.inputs.left_aside import LeftAside
from addons.stores import find_store
from image_text_sim_clip import EXIT_INPUT, Batch, Config, StagedRows, Trouble, addon, in_store

if typing.TYPE_CHECKING:
    from addons.inputs.staging import OpenTable

READ_BYTES = 1 << 20  # of a file at a time, at least
LINE_PIECE_BYTES = 65_536  # of text that is cut into physical lines at a time
LONGEST_LINE_BYTES = 64_000_000  # a file with a longer line is no table; nothing is held beyond this


class HashingFile(io.RawIOBase):
    """A file whose bytes are hashed as they are read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def readable(self) -> bool:
        """It is."""
        return True

    def read(self, size: int = -1) -> bytes:
        """The next bytes of the file as it is stored."""
        data = self._file.read(size)
        self._digest.update(data)
        return data

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()

    def sha256(self) -> str:
        """Of the whole file as it is stored; reads what is left of it."""
        while self.read(READ_BYTES):
            pass
        self.close()
        return self._digest.hexdigest()


class Text:
    """A table's text as UTF-8 bytes in one pass: hashed, unpacked and transcoded on the way, little of it held.

    `peek` shows what comes next, `take` and `lines` go on. What a codec cannot read becomes lone surrogates, which no UTF-8
    holds: such lines are told from good ones later. `line` is the number of the physical line that comes next, from 1.
    """

    def __init__(self, path: str, encoding: str) -> None:
        self.path = path
        self.encoding = encoding
        self.line = 1
        self.taken_bytes = 0
        self._held = b""  # what has been read and not thrown away yet
        self._at = 0  # how much of that has been taken
        self._ended = False
        try:
            stored = find_store(path).open(path)
            compression = name_compression(stored.read(MAGIC_BYTES), path)
            stored.seek(0)
        except OSError as error:
            raise Trouble(EXIT_INPUT, f"cannot read csv_path {path}: {error.strerror}") from None
        self._file = HashingFile(stored)
        self._bytes: Unpacked = unpack(typing.cast(BinaryIO, self._file), compression)
        codec = codecs.lookup(encoding).name
        self._decoder: codecs.IncrementalDecoder | None = None
        self.errors = "surrogateescape"  # how bytes of this text become characters again
        if codec != "utf-8":
            self._decoder = codecs.getincrementaldecoder(encoding)("surrogateescape")
            self.errors = "surrogatepass"
        self._skip_mark()

    def _skip_mark(self) -> None:
        """Leave out the byte order mark, which is here in UTF-8 whatever the codec; refuse that of UTF-16 for none."""
        start = self.peek(4)
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise Trouble(EXIT_INPUT, f"{self.path} is UTF-16; set encoding: utf-16, or save it as UTF-8")
        while self.peek(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:  # some programs add one to a file that has one
            self.take(len(codecs.BOM_UTF8), lines=0)

    def peek(self, size: int) -> bytes:
        """The next `size` bytes of text, fewer only at its end. Raises Trouble (exit 3) where it cannot be read."""
        try:
            while len(self._held) - self._at < size and not self._ended:
                data = self._bytes.read(max(size, READ_BYTES)) or b""
                self._ended = not data
                if self._decoder:
                    data = self._decoder.decode(data, self._ended).encode("utf-8", "surrogatepass")
                self._held = self._held[self._at:] + data
                self._at = 0
        except ERRORS as error:
            raise Trouble(EXIT_INPUT, f"cannot read csv_path {self.path} to its end: {error}") from None
        except UnicodeError as error:  # a codec without surrogateescape, such as utf-16
            raise Trouble(EXIT_INPUT, f"{self.path} is not {self.encoding}: {error}") from None
        return self._held[self._at:self._at + size]

    def take(self, size: int, lines: int) -> None:
        """Go on behind the next `size` bytes, which `peek` has shown and which end `lines` physical lines."""
        self._at += size
        self.taken_bytes += size
        self.line += lines

    def put_back(self, lines: list[str]) -> None:
        """Come back to before `lines`, the last that were taken."""
        data = "".join(lines).encode("utf-8", self.errors)
        self._held = data + self._held[self._at:]
        self._at = 0
        self.taken_bytes -= len(data)
        self.line -= len(lines)

    def lines(self) -> Iterator[str]:
        """Take physical lines one by one, their ends kept; what no codec could read is in them as lone surrogates."""
        size = LINE_PIECE_BYTES
        while piece := self.peek(size):
            lines = piece.splitlines(keepends=True)
            is_last = self._ended and self._at + len(piece) == len(self._held)
            if not is_last:
                del lines[-1]  # it may go on, or end in \r with a \n to come
            size = LINE_PIECE_BYTES if lines else 2 * size
            if size > LONGEST_LINE_BYTES:
                raise Trouble(EXIT_INPUT, f"{self.path} is not a table: line {self.line} is longer than {size // 2} bytes")
            for line in lines:
                self.take(len(line), lines=1)
                yield line.decode("utf-8", self.errors)

    def sha256(self) -> str:
        """Of the file as it is stored; reads what is left of it."""
        return self._file.sha256()


def is_utf8(block: bytes, end: int) -> bool:
    """Whether the first `end` bytes are UTF-8; Arrow's check is several times as fast as decoding."""
    offsets = pa.array([0, end], pa.int32()).buffers()[1]
    one_cell = pa.Array.from_buffers(pa.binary(), 1, [None, offsets, pa.py_buffer(block)])
    try:
        one_cell.cast(pa.string())
    except pa.ArrowInvalid:
        return False
    return True


def find_first_bad_byte(path: str, encoding: str) -> int:
    """Where the text of a file, unpacked, stops being text, in bytes from its start; its length if it is all text."""
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    offset = 0
    with find_store(path).open(path) as stored:
        compression = name_compression(stored.read(MAGIC_BYTES), path)
        stored.seek(0)
        text = unpack(stored, compression)
        while block := text.read(READ_BYTES):
            begun = len(decoder.getstate()[0])  # bytes of a character that the last block began
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                return offset - begun + error.start
            offset += len(block)
    return offset


class TextTable(NamedTuple):
    """A table of text, opened: its columns, its rows in batches, and, once all are read, the sha256 of its file.

    `literal_lines` counts the lines whose quotes were read as text although `quoting: auto` (literal_quotes.py), `remarks` are
    what else is to be said of how it was read.
    """

    columns: list[str]
    batches: Iterator[Batch]
    sha256: Callable[[], str]
    literal_lines: Callable[[], int] = lambda: 0
    remarks: Callable[[], list[str]] = list


def open_staged(manifest: Manifest, output: pathlib.Path) -> StagedRows:
    """The rows that were staged into `output`, of the version that the manifest names where that is in an object store."""
    if in_store(output):
        rows: StagedRows = addon("stores.staged", "output_path").RemoteStagedRows(output / "pairs.parquet", manifest)
        return rows
    return StagedRows(output / "pairs.parquet")


class TextReader:
    """A Reader of text that is staged. A subclass says `kind`, `suffixes` and how to open a table.

    The input is one file or a set of them, each compressed or not.
    """

    kind: str
    suffixes: tuple[str, ...]

    def open_table(self, config: Config, known: list[str]) -> TextTable:
        """Open the table at `config.csv_path`: its columns, and batches of its rows and malformed records, in order.

        Where a later batch has columns that the first ones lack, it is opened again, with `known` the columns found by then;
        else `known` is empty. Raises Trouble (exit 3) for a table that cannot be read.
        """
        raise NotImplementedError

    def find_files(self, config: Config) -> list[files.InputFile]:
        """The files that are staged, in order. Raises Trouble (exit 3) unless there are any, and all are there."""
        return files.list_files(config.csv_path, self)

    def left_aside(self, config: Config, staged: pathlib.Path) -> LeftAside:
        """What else lies where `csv_path` is a folder; the rows that were found are in the Parquet file `staged`."""
        return files.find_left_aside(config.csv_path, self)

    def opener(self, config: Config) -> "OpenTable":
        """What opens each of the files, as `open_table` does."""
        return self.open_table

    def guess_types(self, file: files.InputFile, config: Config) -> dict[str, str]:
        """Which columns seem to be other than text: int, float or bool, by name. A kind that has no types knows none."""
        return {}

    def describe(self, config: Config, output: pathlib.Path) -> Manifest:
        """See Reader."""
        from addons.inputs.staging import stage_files
        found = self.find_files(config)
        described = stage_files(self.kind, self.opener(config), found, config, output, self.guess_types(found[0], config))
        left_aside = self.left_aside(config, output / "pairs.parquet")
        left_aside.tell(config.csv_path)
        return described | {"left_aside": left_aside.describe()} if left_aside.total else described

    def open(self, manifest: Manifest, config: Config, output: pathlib.Path) -> Rows:
        """See Reader."""
        rows = open_staged(manifest, output)
        if "holds_images" not in manifest:
            return rows
        from addons.inputs.table_images import StagedRowsWithImages
        return StagedRowsWithImages(rows, config, has_lists="input_rows" in manifest)

    def differences(self, manifest: Manifest, config: Config) -> list[str]:
        """See Reader. An input of one file may have another name."""
        from addons.inputs.staging import has_changed, leave_out_empty
        found = self.find_files(config)
        entries = manifest["files"]
        if len(entries) == len(found) == 1:
            return [f"{found[0].name} has changed"] if has_changed(found[0], entries[0]) else []
        there = leave_out_empty(found, config.encoding)
        return files.name_differences(entries, there[:len(entries)] if config.limit else there, has_changed)
