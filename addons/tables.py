"""Careful reading of messy text tables: one stray quote, or a byte that is no text, costs its own line and no other.

text.py parses clean blocks at full speed and comes here for the rest, a stretch at a time. What is a row, what is
malformed and why is decided here; on clean text the fast way gives the same, which the tests prove on hostile tables.
"""
import codecs
import collections
import csv
import gzip
import pathlib
from collections.abc import Iterator
from typing import Any

MAX_RECORD_CHARS = 16_000_000  # a record longer than this is an unbalanced quote, not a caption
BATCH_ROWS = 8192  # rows handed over at a time

Malformed = tuple[int, int, str, str]  # rows before it in its batch, its line, the reason, its text
Batch = tuple[Any, list[Malformed]]  # rows as a table of text, and the malformed records among them


def csv_records(lines: Iterator[str], separator: str, number: int = 1) -> Iterator[tuple[int, list[str] | None, str, bool]]:
    """Yield (line number, fields, raw text, settled) for each record; fields is None where the text is no valid record.

    `number` is that of the first line. A record that cannot be parsed (an unbalanced quote swallows what follows) costs
    its first line only: the lines after it are read again, so that one stray quote does not take a neighbour with it.
    `settled` says that no line waits to be read again: what comes next is the start of a record for any reader.
    """
    again: collections.deque[str] = collections.deque()
    taken: list[str] = []

    def feed() -> Iterator[str]:
        size, hasty = 0, False
        while True:
            if not taken:  # lines that an unbalanced quote had swallowed get a shorter limit, or many would take for ever
                size, hasty = 0, bool(again)
            line = again.popleft() if again else next(lines, None)
            if line is None:
                return
            taken.append(line)
            size += len(line)
            if size > MAX_RECORD_CHARS or (hasty and (len(taken) > 100 or size > 1_000_000)):
                raise csv.Error("record too long")
            yield line

    csv.field_size_limit(MAX_RECORD_CHARS)
    reader = csv.reader(feed(), delimiter=separator, strict=True)
    while True:
        fields: list[str] | None
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error:
            fields = None
            again.extendleft(reversed(taken[1:]))
            del taken[1:]
            reader = csv.reader(feed(), delimiter=separator, strict=True)
        raw = "".join(taken)
        if fields != [] and raw.strip("\r\n"):
            yield number, fields, raw, not again
        number += len(taken)
        taken.clear()


def careful_batches(text: Any, separator: str, columns: list[str], size: int) -> Iterator[Batch]:
    """Read records one by one from `text` (a text.Text) until `size` bytes have passed and a record ends for sure.

    Yields batches of BATCH_ROWS rows at most.
    """
    passed = 0

    def lines() -> Iterator[str]:
        nonlocal passed
        for line in text.lines():
            passed += len(line)  # characters, which are no more than bytes: the stretch may be longer than asked, not shorter
            yield line

    rows: list[list[str]] = []
    malformed: list[Malformed] = []
    for line, fields, raw, settled in csv_records(lines(), separator, text.line):
        if fields is not None and len(fields) == len(columns) and is_text("".join(fields)):
            rows.append(fields)
        else:
            malformed.append((len(rows), line, why_malformed(fields, len(columns)), raw.rstrip("\r\n")))
        done = settled and passed >= size
        if done or len(rows) == BATCH_ROWS or len(malformed) == BATCH_ROWS:
            yield to_table(rows, columns), malformed
            rows, malformed = [], []
        if done:
            return
    yield to_table(rows, columns), malformed


def to_table(rows: list[list[str]], columns: list[str]) -> Any:
    """Rows of text to a table of string columns; TypeError or ValueError for cells that are no text (None becomes "")."""
    import pyarrow as pa
    cells = zip(*rows, strict=True) if rows else [()] * len(columns)
    return pa.Table.from_arrays([pa.array(column, pa.string()).fill_null("") for column in cells], names=columns)


def is_text(text: str) -> bool:
    """Whether the text decoded cleanly: undecodable bytes arrive as lone surrogates."""
    try:
        text.encode("utf-8")
        return True
    except UnicodeEncodeError:
        return False


def is_utf8(block: bytes, end: int) -> bool:
    """Whether the first `end` bytes are UTF-8; Arrow's check is several times as fast as decoding."""
    import pyarrow as pa
    try:
        pa.Array.from_buffers(pa.binary(), 1, [None, pa.array([0, end], pa.int32()).buffers()[1], pa.py_buffer(block)]).cast(
            pa.string())
        return True
    except pa.ArrowInvalid:
        return False


def why_malformed(fields: list[str] | None, expected: int) -> str:
    """The reason that bad_rows.csv gives; `fields` is None where the quotes do not balance."""
    if fields is None:
        return "quotes do not balance"
    return f"{len(fields)} fields instead of {expected}" if len(fields) != expected else "bytes that are not text"


def find_first_bad_byte(path: pathlib.Path, encoding: str) -> int:
    """Where the file (unzipped, if it ends in .gz) stops being text, in bytes from its start."""
    decoder, offset = codecs.getincrementaldecoder(encoding)("strict"), 0
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        while block := file.read(1 << 20):
            kept = len(decoder.getstate()[0])  # bytes of a character that the last block began
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                return offset - kept + error.start
            offset += len(block)
    return offset
