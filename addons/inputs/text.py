"""What text tables share: their bytes in one pass, hashed, unzipped and transcoded on the way, and their readers' base."""
import codecs
import dataclasses
import gzip
import hashlib
import io
import pathlib
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa

from addons.inputs import Manifest, files
from addons.stores import find_store
from image_text_sim_clip import EXIT_INPUT, Config, CsvReader, TextTable, Trouble

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
    """A table's text as UTF-8 bytes in one pass: hashed, unzipped (.gz) and transcoded on the way, little of it held.

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
            self._file = HashingFile(find_store(path).open(path))
        except OSError as error:
            raise Trouble(EXIT_INPUT, f"cannot read csv_path {path}: {error.strerror}") from None
        self._bytes: io.RawIOBase | gzip.GzipFile = self._file
        if path.lower().endswith(".gz"):
            self._bytes = gzip.GzipFile(fileobj=self._file, mode="rb")
        codec = codecs.lookup(encoding).name
        self._decoder: codecs.IncrementalDecoder | None = None
        self.errors = "surrogateescape"  # how bytes of this text become characters again
        if codec != "utf-8":
            self._decoder = codecs.getincrementaldecoder(encoding)("surrogateescape")
            self.errors = "surrogatepass"
        else:
            self._skip_mark()

    def _skip_mark(self) -> None:
        """Leave out the byte order mark of UTF-8; refuse that of UTF-16."""
        start = self.peek(4)
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise Trouble(EXIT_INPUT, f"{self.path} is UTF-16; set encoding: utf-16, or save it as UTF-8")
        if start.startswith(codecs.BOM_UTF8):
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
        except (EOFError, OSError, zlib.error) as error:
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


class TextReader(CsvReader):
    """A Reader of text that is staged. A subclass says `kind`, `suffixes` and how to open the table.

    The table is one file, gzipped or not; a folder, glob or pattern is fine where it stands for one.
    """

    def open_table(self, config: Config, known: list[str]) -> TextTable:
        """Open the table at `config.csv_path`: its columns, and batches of its rows and malformed records, in order.

        Where a later batch has columns that the first ones lack, it is opened again, with `known` the columns found by then;
        else `known` is empty. Raises Trouble (exit 3) for a table that cannot be read.
        """
        raise NotImplementedError

    def describe(self, config: Config, output: pathlib.Path) -> Manifest:
        """See Reader."""
        described = super().describe(self._name_file(config), output)
        left_aside = files.find_left_aside(config.csv_path, self)
        left_aside.tell(config.csv_path)
        return {**described, "left_aside": left_aside.describe()}

    def differences(self, manifest: Manifest, config: Config) -> list[str]:
        """See Reader."""
        try:
            return super().differences(manifest, self._name_file(config))
        except Trouble as trouble:
            return [str(trouble)]

    def _name_file(self, config: Config) -> Config:
        found = files.list_files(config.csv_path, self)
        if len(found) > 1:
            raise Trouble(EXIT_INPUT, f"csv_path {config.csv_path!r} names {len(found)} files: {self.kind} is read from one")
        return dataclasses.replace(config, csv_path=found[0].path)
