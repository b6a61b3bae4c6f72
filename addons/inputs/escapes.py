r"""Quotes escaped by a backslash (`\"`), as Spark, MySQL and BigQuery write them, where `escape: auto` is to find them.

Where the head of a table has lines that are rows only so, more than it has lines that are rows only as CSV has it, the whole
table is read so. Elsewhere a record that is no row, is one line, and is a row once its `\"` are quotes, is that row.
"""
from collections.abc import Iterable, Iterator

from addons.inputs.text import Text
from image_text_sim_clip import Record, csv_records

ESCAPE = "\\"
HEAD_BYTES = 1_000_000  # of a table that are looked at
MOST_CUT_BYTES = 64_000  # at the end of these, where records may be cut
ESCAPED_QUOTE = '\\"'


def find_escape(text: Text, separator: str, width: int) -> str:
    """The escape of the table that follows in `text`, told from its head; "" for none. A row has `width` fields.

    Records are judged and not lines: a line of a field with line ends may well look like a row that is escaped.
    """
    head = text.peek(HEAD_BYTES)
    if ESCAPED_QUOTE.encode() not in head:
        return ""
    judged = head if len(head) < HEAD_BYTES else head[:-MOST_CUT_BYTES]
    last_line = len(judged.splitlines())
    lines = (line.decode("utf-8", text.errors) for line in head.splitlines(keepends=True))
    only_escaped = 0
    only_plain = 0
    for record in csv_records(lines, separator):
        if record.line > last_line:
            break
        if ESCAPED_QUOTE in record.raw:
            is_plain = record.fields is not None and len(record.fields) == width
            is_escaped = is_row(record.raw, separator, width)
            only_escaped += is_escaped and not is_plain
            only_plain += is_plain and not is_escaped
    return ESCAPE if only_escaped > only_plain else ""


def is_row(raw: str, separator: str, width: int) -> bool:
    """Whether a text by itself is a row of `width` fields, its quotes escaped."""
    records = list(csv_records(iter([raw]), separator, escape=ESCAPE))
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
