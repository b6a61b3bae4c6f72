"""Quotes in a table separated by tabs, where they may be text: most programs that write .tsv know no quoting."""
import io
from collections.abc import Iterable, Iterator

from image_text_sim_clip import Config, Record, separator_of


class LiteralQuotes:
    """Where `quoting: auto` reads quotes as text: in a table separated by tabs, where they would swallow rows.

    Most programs that write .tsv know no quoting. A quoted field that swallows lines which would each be a whole row is none,
    and a line whose quotes do not balance, but which is a whole row without them, is that row. `lines` counts such rows.
    """

    def __init__(self, config: "Config") -> None:
        self.separator = separator_of(config)
        self.is_possible = self.separator == "\t" and config.quoting == "auto"
        self.lines = 0

    def reread(self, records: Iterable[Record], width: int) -> Iterator[Record]:
        """The records, those line by line that are none; a row has `width` fields."""
        for record in records:
            pieces = self._split(record, width) if self.is_possible and '"' in record.raw else []
            yield from pieces or [record]

    def _split(self, record: Record, width: int) -> list[Record]:
        """The record's physical lines as records, their quotes as text; [] where the record is right as it is."""
        pieces: list[Record] = []
        for number, line in enumerate(io.StringIO(record.raw, newline=""), record.line):
            text = line.rstrip("\r\n")
            if text:
                pieces.append(Record(number, text.split(self.separator), line, settled=False))
        rows = sum(len(piece.fields or ()) == width for piece in pieces)
        is_row = record.fields is not None and len(record.fields) == width
        if (is_row and (len(pieces) == 1 or rows < len(pieces))) or not rows:
            return []
        self.lines += rows
        pieces[-1] = pieces[-1]._replace(settled=record.settled)
        return pieces
