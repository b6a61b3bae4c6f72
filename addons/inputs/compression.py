"""Compressed text: gzip, bzip2, xz, Zstandard and LZ4, told by how a file begins, not by its name; archives are refused."""
import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

import pyarrow as pa

from image_text_sim_clip import EXIT_INPUT, Trouble

SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".lz4")  # behind the suffix of a text
MAGIC_BYTES = 40  # of a file that are looked at
PACKED_BYTES = 1 << 17  # of a file that are read at a time
ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowException)  # what reading a damaged file raises


class Magic(NamedTuple):
    """How a file of a kind begins, and what it is called."""

    start: bytes
    name: str


COMPRESSED = (Magic(b"\x1f\x8b", "gzip"), Magic(b"\xfd7zXZ\0", "xz"), Magic(b"\x28\xb5\x2f\xfd", "zstd"),
              Magic(b"\x04\x22\x4d\x18", "lz4"))
SKIPPABLE = re.compile(rb"[P-_]\*M\x18")  # begins what zstd and lz4 skip; pzstd puts some before each stretch
BZIP2_START = b"BZh"  # a digit and six bytes that are pi follow
BZIP2_BLOCK = b"1AY&SY"
BZIP2_EMPTY = b"\x17\x72\x45\x38\x50\x90"
REFUSED = (Magic(b"PK\x03\x04", "a zip archive (or an Excel workbook), which is not read: unpack it, or save the sheet as CSV"),
           Magic(b"PK\x05\x06", "an empty zip archive"),
           Magic(b"7z\xbc\xaf\x27\x1c", "a 7z archive, which is not read: unpack it"),
           Magic(b"Rar!\x1a\x07", "a RAR archive, which is not read: unpack it"),
           Magic(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Excel workbook, which is not read: save the sheet as CSV"),
           Magic(b"PAR1", "a Parquet file under another name: call it .parquet"),
           Magic(b"ARROW1", "an Arrow (Feather) file, which is not read: write it as Parquet "
                            "(pandas.read_feather(...).to_parquet(...))"),
           Magic(b"\xff\xff\xff\xff", "an Arrow stream, as save_to_disk of datasets writes it, which is not read: write it as "
                                      "Parquet (datasets.load_from_disk(...).to_parquet(...))"),
           Magic(b"version https://git-lfs.github.com/spec/", "what Git LFS leaves in place of a file that was not fetched: "
                                                              "run git lfs pull"),
           Magic(b"FEA1", "a Feather file of version 1, which is not read: write it as Parquet"))


def plain_suffix(name: str) -> str:
    """The suffix of a file's name in small letters, that of a compression left out: `.csv` of `a.csv.gz`."""
    name = strip_compression(name)
    dot = name.rfind(".")
    return name[dot:] if dot > name.rfind("/") else ""


def strip_compression(name: str) -> str:
    """A file's name in small letters, without the suffix of a compression."""
    name = name.lower()
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
    return name.removesuffix(suffix)


def name_compression(start: bytes, path: str) -> str:
    """How a file that begins with `start` is compressed, "" for not at all. Raises Trouble (exit 3) for what is no text."""
    for magic in REFUSED:
        if start.startswith(magic.start):
            raise Trouble(EXIT_INPUT, f"{path} is {magic.name}")
    if start.startswith(BZIP2_START) and start[4:10] in (BZIP2_BLOCK, BZIP2_EMPTY):
        return "bz2"
    if SKIPPABLE.match(start):
        return "lz4" if path.lower().endswith(".lz4") else "zstd"
    return next((magic.name for magic in COMPRESSED if start.startswith(magic.start)), "")


class ArrowStream:
    """What pyarrow unpacks, as a file."""

    def __init__(self, file: BinaryIO, codec: str) -> None:
        self._stream = pa.CompressedInputStream(pa.PythonFile(file, "r"), codec)

    def read(self, size: int) -> bytes:
        """The next bytes, fewer only at the end."""
        data: bytes = self._stream.read(size)
        return data


class Streams:
    """Streams of bzip2 or xz one after the other, as pbzip2 and pixz write them, unpacked.

    Python's own files take a stream that does not begin as one for the end, and whatever follows is lost in silence.
    """

    def __init__(self, file: BinaryIO, begin: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]) -> None:
        self._file = file
        self._begin = begin
        self._stream = begin()

    def read(self, size: int) -> bytes:
        """The next bytes, `size` at most; none only at the end. Raises what is among ERRORS where the file is damaged."""
        data = b""
        while not data:
            packed = b""
            if self._stream.eof:
                packed = self._next_stream()
                if not packed:
                    break
                self._stream = self._begin()
            elif self._stream.needs_input:
                packed = self._file.read(PACKED_BYTES)
                if not packed:
                    raise EOFError("it ends within a compressed stream")
            data = self._stream.decompress(packed, size)
        return data

    def _next_stream(self) -> bytes:
        """The bytes with which the next stream begins; zeros, which tapes and xz put between streams, are left out."""
        packed = self._stream.unused_data.lstrip(b"\0")
        while not packed:
            more = self._file.read(PACKED_BYTES)
            if not more:
                break
            packed = more.lstrip(b"\0")
        return packed


Unpacked = BinaryIO | gzip.GzipFile | ArrowStream | Streams


def unpack(file: BinaryIO, compression: str) -> Unpacked:
    """The text in a file that is compressed so."""
    if compression == "gzip":
        return gzip.GzipFile(fileobj=file, mode="rb")
    if compression == "bz2":
        return Streams(file, bz2.BZ2Decompressor)
    if compression == "xz":
        return Streams(file, lzma.LZMADecompressor)
    return ArrowStream(file, compression) if compression else file
