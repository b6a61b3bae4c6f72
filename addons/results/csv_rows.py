"""scores.csv, kept.csv and dropped.csv, a column at a time: the bytes of the script's plain writer, several times as fast.

Cells become text, are quoted where they must be and are joined to lines by Arrow's kernels, so that no cell is ever a Python
object. What is rare, a table with a carriage return in a cell, is left to the plain writer (`CsvRows`), which a test compares
this one with.
"""
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from image_text_sim_clip import CsvRows

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_AT_A_TIME = 1 << 14  # whose text is held a second time
QUOTED_FOR = (",", '"', "\n")  # a cell with one of these in it is quoted


class ArrowCsvRows(CsvRows):
    """Writes tables as CsvRows does, to the same bytes, in a thread of its own: the caller reads the next one meanwhile."""

    def __init__(self, file: BinaryIO, names: list[str]) -> None:
        super().__init__(file, names)
        self._text.flush()
        self._file = file
        self._thread = ThreadPoolExecutor(1, "csv")
        self._writing: Future[None] | None = None

    def write(self, table: "pa.Table") -> None:
        """Append the table's rows, when those before are written; what went wrong with those is raised here, or by `close`."""
        self._wait()
        self._writing = self._thread.submit(self._write_all, table)

    def close(self) -> None:
        """Hand the file back, complete."""
        self._wait()
        self._thread.shutdown()
        super().close()

    def _wait(self) -> None:
        if self._writing:
            self._writing.result()

    def _write_all(self, table: "pa.Table") -> None:
        for start in range(0, table.num_rows, ROWS_AT_A_TIME):
            self._write_some(table.slice(start, ROWS_AT_A_TIME))

    def _write_some(self, table: "pa.Table") -> None:
        import pyarrow as pa
        import pyarrow.compute as pc
        columns = [as_text(column) for column in table.columns]
        if len(columns) == 1 or any(contains(column, "\r") for column in columns):
            super().write(table)
            self._text.flush()
            return
        cells = [quote(column) for column in columns]
        nothing, end, comma = (pa.scalar(text, pa.large_string()) for text in ("", "\n", ","))
        cells[-1] = pc.binary_join_element_wise(cells[-1], nothing, end)
        lines = pc.binary_join_element_wise(*cells, comma)
        self._file.write(text_of(lines))


def as_text(column: "pa.ChunkedArray") -> "pa.Array":
    """A column's cells as text, "" for null: floats in the shortest digits that read back the same float32.

    Long strings, because the text of some thousand long captions may have more than 2 GiB.
    """
    import pyarrow as pa
    text = column.cast(pa.string()).cast(pa.large_string()).fill_null("")
    array: pa.Array = text.combine_chunks()
    return array


def text_of(array: "pa.Array") -> memoryview:
    """The bytes of all of the array's long strings, one behind the other."""
    if not len(array):
        return memoryview(b"")
    _, ends, data = array.buffers()
    places = np.frombuffer(ends, np.int64)[array.offset:array.offset + len(array) + 1]
    return memoryview(data if data is not None else b"")[int(places[0]):int(places[-1])]


def contains(array: "pa.Array", character: str) -> bool:
    """Whether any of the strings has this ASCII character; a search through all of them at once."""
    return bytes(text_of(array)).find(character.encode()) >= 0


def quote(array: "pa.Array") -> "pa.Array":
    """The strings with those quoted that a reader would otherwise take apart."""
    import pyarrow as pa
    import pyarrow.compute as pc
    found = [character for character in QUOTED_FOR if contains(array, character)]
    if not found:
        return array
    needs = pc.match_substring(array, found[0])
    for character in found[1:]:
        needs = pc.or_(needs, pc.match_substring(array, character))
    mark = pa.scalar('"', pa.large_string())
    inside = pc.replace_substring(array, '"', '""') if '"' in found else array
    return pc.if_else(needs, pc.binary_join_element_wise(mark, inside, mark, pa.scalar("", pa.large_string())), array)
