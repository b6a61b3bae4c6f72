r"""`escape_formulas`: in the CSV files, what a spreadsheet would run as a formula is plain text.

A ' is put before such a text. To undo it, take one ' away from each cell that matches ^'+[=+\-@\t\r].
"""
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

FORMULA = r"^('*[=+\-@\t\r])"


def escape_formula(cell: str) -> str:
    """The cell, with a ' before it where a spreadsheet would run it."""
    return "'" + cell if re.match(FORMULA, cell) else cell


def escape_table(table: "pa.Table") -> "pa.Table":
    """The table with its names and texts escaped, and its other cells as text: a negative number begins with a space, which
    whoever reads numbers skips."""
    import pyarrow as pa
    import pyarrow.compute as pc
    escaped = []
    for column in table.columns:
        if pa.types.is_string(column.type):
            cells = pc.replace_substring_regex(column, FORMULA, r"'\1")
        else:
            cells = pc.replace_substring_regex(column.cast(pa.string()), "^-", " -")
        escaped.append(cells)
    return pa.Table.from_arrays(escaped, names=[escape_formula(name) for name in table.column_names])
