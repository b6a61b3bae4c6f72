"""Results: what a run can do with its parts besides writing scores.csv, and what it shows on its way there.

    csv_rows.py      the fast writer of scores.csv and of what curate.py writes; the same bytes as the script's own
    formulas.py      `escape_formulas`: what a spreadsheet would run becomes plain text
    parquet.py       `output_format: parquet`: scores.parquet instead of scores.csv
    progress.py      the progress bar, or lines in a log
    memory_curve.py  memory-time.png
    cost.py          --plan: what the whole input will cost
    verify.py        --verify: is everything still as it was written?
    earlier_run.py   an output folder that holds another run: what differs, and whether it may go on
    retry.py         --retry-failed: which rows to score again

To write another kind of results, put a file <name>.py with `FORMAT = "<name>"` and a function `write` (see `Writer`) here
and set `output_format: <name>`; the results go to scores.<name>. The other files are called by the script where they are
needed, --plan, --verify and --retry-failed among them.
"""
import typing
from collections.abc import Iterable

if typing.TYPE_CHECKING:
    import pyarrow as pa


class Writer(typing.Protocol):
    """What a module of this room offers that writes a kind of results."""

    FORMAT: str

    def write(self, tables: "Iterable[pa.Table]", file: typing.BinaryIO) -> None:
        """Write the tables to `file`, which is open, empty and renamed to its name only when all is written.

        The tables come in the input's order, at least one even where there are no rows, and all have the columns of
        scores.csv: the input's, as text, then those of `config.result_columns` with their own types, null for no value.
        """
