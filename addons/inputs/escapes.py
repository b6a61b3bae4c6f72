r"""Quotes escaped by a backslash (`\"`), as Spark, MySQL and BigQuery write them, where `escape: auto` is to find them.

Where the head of a table has lines that are rows only so, more than it has lines that are rows only as CSV has it, the whole
table is read so. Elsewhere a record that is no row, is one line, and is a row once its `\"` are quotes, is that row.
"""
from collections.abc import Iterable, Iterator

from addons.inputs.text import Text
from image_text_sim_clip import Record, csv_records

ESCAPE = "\\"
HEAD_BYTES = 1_000_000  # of a table that are looked at
ESCAPED_QUOTE = '\\"'


def find_escape(text: Text, separator: str, width: int) -> str:
    """The escape of the table that follows in `text`, told from its head; "" for none. A row has `width` fields."""
    head = text.peek(HEAD_BYTES)
    only_escaped = 0
    only_plain = 0
    for data in head[:head.rfind(b"\n") + 1].splitlines():
        line = data.decode("utf-8", text.errors)
        if ESCAPED_QUOTE in line:
            is_plain = is_row(line, separator, width, "")
            is_escaped = is_row(line, separator, width, ESCAPE)
            only_escaped += is_escaped and not is_plain
            only_plain += is_plain and not is_escaped
    return ESCAPE if only_escaped > only_plain else ""


def is_row(line: str, separator: str, width: int, escape: str) -> bool:
    """Whether a line by itself is a row of `width` fields."""
    records = list(csv_records(iter([line]), separator, escape=escape))
    return len(records) == 1 and records[0].fields is not None and len(records[0].fields) == width


class EscapedQuotes:
    """Reads flawed records once more, with escaped quotes; `lines` counts those that are rows so."""

    def __init__(self, separator: str, is_possible: bool) -> None:
        self.separator = separator
        self.is_possible = is_possible
        self.lines = 0

    def reread(self, records: Iterable[Record], width: int) -> Iterator[Record]:
        """The records, those that are no row of `width` fields read once more where that makes them one."""
        for record in records:
            is_row = record.fields is not None and len(record.fields) == width
            if is_row or not self.may_repair(record.raw):
                yield record
                continue
            again = list(csv_records(iter([record.raw]), self.separator, record.line, escape=ESCAPE))
            if len(again) == 1 and again[0].fields is not None and len(again[0].fields) == width:
                self.lines += 1
                yield record._replace(fields=again[0].fields)
            else:
                yield record

    def may_repair(self, raw: str) -> bool:
        """Whether a record that is no row may be one with its quotes escaped."""
        return self.is_possible and ESCAPED_QUOTE in raw and len(raw.splitlines()) == 1
