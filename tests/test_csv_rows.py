"""The fast writer of scores.csv, kept.csv and dropped.csv against the script's plain one, which is the reference."""
import io

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import image_text_sim_clip as script
from addons.results import csv_rows

# what csv.writer, a spreadsheet or a splitter of lines could trip over, and plain text
CELLS = st.one_of(st.text(max_size=12), st.sampled_from([
    "", " ", ",", '"', '""', "\n", "\r", "\r\n", "a,b", 'say "no"', "two\nlines", "old\rMac", "=1+1", "'=1",
    "-3", "+x", "@x", "\tx", "NA", "null", "\0", "\u2028", "é", "猫", "\U0001f408", "'", "a\x0bb", "\ufeff"]))
FLOATS = st.one_of(st.none(), st.floats(width=32))


def write(kind, tables):
    """The bytes that a writer makes of the tables."""
    file = io.BytesIO()
    rows = kind(file, tables[0].column_names)
    for table in tables:
        rows.write(table)
    rows.close()
    return file.getvalue()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(CELLS, CELLS, FLOATS, st.one_of(st.none(), st.booleans()), CELLS), max_size=12),
       st.integers(0, 12))
def test_fast_rows_are_the_plain_ones(rows, cut):
    """Whatever the cells and how the rows are spread over tables: the same bytes as csv.writer's."""
    kinds = {"=name": pa.string(), "caption": pa.string(), "similarity": pa.float32(), "truncated": pa.bool_(),
             "status": pa.string()}
    cells = list(zip(*rows, strict=True)) or [()] * len(kinds)
    columns = [pa.array(column, kind) for column, kind in zip(cells, kinds.values(), strict=True)]
    table = pa.table(columns, names=list(kinds))
    tables = [table.slice(0, cut), table.slice(cut)]
    assert write(csv_rows.ArrowCsvRows, tables) == write(script.CsvRows, tables)


@pytest.mark.parametrize("cells", [[""], ["a", None, ""], ['"', "x,y"]])
def test_a_lone_column_is_written_alike(cells):
    """csv.writer quotes an empty cell that is alone in its row: so does the fast writer."""
    table = pa.table({"caption": pa.array(cells, pa.string())})
    assert write(csv_rows.ArrowCsvRows, [table]) == write(script.CsvRows, [table])


def test_floats_are_the_shortest_that_read_back():
    """Each float32 comes back to the bit, and no shorter text of its digits does."""
    values = np.random.default_rng(0).integers(0, 2**32, 3000, np.uint32).view(np.float32)
    values = values[np.isfinite(values)]
    text = write(csv_rows.ArrowCsvRows, [pa.table({"caption": ["x"] * len(values), "similarity": values})]).decode()
    cells = [line.split(",")[1] for line in text.splitlines()[1:]]
    assert (np.array([np.float32(cell) for cell in cells]) == values).all()
    digits = [len(cell.split("e")[0].strip("-").replace(".", "").strip("0")) for cell in cells]
    fewest = [len(np.format_float_scientific(value, unique=True, trim="-").split("e")[0].strip("-").replace(".", ""))
              for value in values]
    assert digits == fewest


def test_many_rows_are_cut_into_stretches(monkeypatch):
    """A table longer than what is held a second time comes out whole and in order."""
    monkeypatch.setattr(csv_rows, "ROWS_AT_A_TIME", 7)
    table = pa.table({"url": [f"{n}.png" for n in range(50)], "caption": ["a, b" if n % 9 == 0 else "c" for n in range(50)]})
    assert write(csv_rows.ArrowCsvRows, [table]) == write(script.CsvRows, [table])


def test_what_goes_wrong_while_writing_is_raised():
    """A disk that is full is told by the next call, never lost in the writing thread."""
    class FullDisk(io.BytesIO):
        def write(self, data):
            if len(data) > 100:
                raise OSError(28, "No space left on device")
            return super().write(data)
    rows = csv_rows.ArrowCsvRows(FullDisk(), ["a", "b"])
    rows.write(pa.table({"a": ["x" * 200], "b": ["y"]}))
    with pytest.raises(OSError, match="No space"):
        rows.close()


def test_a_run_with_and_without_the_fast_writer(shapes, bundled_model, run_main, monkeypatch, tmp_path):
    """scores.csv of a real run is the plain writer's, byte for byte."""
    tables = []
    for name in ("fast", "plain"):
        if name == "plain":
            monkeypatch.setattr(csv_rows, "ArrowCsvRows", script.CsvRows)
        assert run_main("--config", shapes(rows=60, pretrained_model=bundled_model, output_path=str(tmp_path / name))).code == 0
        tables.append((tmp_path / name / "scores.csv").read_bytes())
    assert tables[0] == tables[1]
    assert tables[0].count(b"\n") == 61
