"""Tables that strangers wrote: rows are conserved, formulas are defused and can be turned back, offsets are told."""
import csv
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import image_text_sim_clip as script
from addons.inputs.text import Text
from addons.results.formulas import escape_formula

CELLS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("=+-@\t\r\n\"',;\0"), max_size=12)


@given(CELLS)
def test_escaped_formulas_can_be_turned_back(cell):
    """Escaped, no cell starts like a formula; taking one ' away where the rule says so gives the cell back."""
    escaped = escape_formula(cell)
    assert not escaped.startswith(("=", "+", "-", "@", "\t", "\r"))
    assert (escaped[1:] if re.match(r"'+[=+\-@\t\r]", escaped) else escaped) == cell


def test_formulas_are_escaped_in_scores_csv_only(tmp_path, write_config, write_table, run_main, picture_bytes):
    """With `escape_formulas` the CSV's input cells are defused; numbers, and the typed parts, stay as they are."""
    config = write_config(escape_formulas=True)
    (tmp_path / "pictures" / "a.png").write_bytes(picture_bytes())
    write_table([("url", "caption", "note"), ("a.png", "=HYPERLINK(1)", "-5"), ("a.png", "plain", "'=1"), ("@x", "\tq", "'a")])
    assert run_main("--config", config).code == 0
    with (tmp_path / "out" / "scores.csv").open(newline="") as file:
        rows = [row[:3] for row in csv.reader(file)][1:]
    assert rows == [["a.png", "'=HYPERLINK(1)", "'-5"], ["a.png", "plain", "''=1"], ["'@x", "'\tq", "'a"]]
    import pyarrow.parquet as pq
    part = pq.read_table(tmp_path / "out" / "parts" / "part-00000.parquet")
    assert part["caption"].to_pylist() == ["=HYPERLINK(1)", "plain", "\tq"]


def test_table_without_header(tmp_path, write_config, write_table, run_main, picture_bytes):
    """Columns given by number: every line is a row, also the first."""
    config = write_config(url_column=1, caption_column=0)
    (tmp_path / "pictures" / "a.png").write_bytes(picture_bytes())
    write_table([("a cat", "a.png"), ("a dog", "missing.png")])
    outcome = run_main("--config", config)
    assert (outcome.code, outcome.result["rows"], outcome.result["scored"]) == (0, 2, 1)
    with (tmp_path / "out" / "scores.csv").open(newline="") as file:
        assert next(csv.reader(file))[:2] == ["column_0", "column_1"]


def test_columns_by_number_must_exist_and_go_together(write_config, write_table, run_main):
    """A number beyond the table is exit 3; one name and one number are exit 2."""
    write_table([("a cat", "a.png")])
    assert run_main("--config", write_config(url_column=1, caption_column=7)).code == 3
    assert run_main("--config", write_config(url_column=1, caption_column="caption")).code == 2


@pytest.mark.slow
def test_latin_1_is_told_with_its_byte_offset(tmp_path, write_config, write_table, run_main):
    """The first byte that is not UTF-8 is named by its offset, beyond a megabyte and after multi-byte characters too."""
    start = b"url,caption\n" + "a.jpg,ünï ☃\n".encode() * 90_000
    write_table(start + b"b.jpg,caf\xe9\nc.jpg,d\n")
    outcome = run_main("--config", write_config(max_failure_rate=1.0))
    assert outcome.code == 0
    assert outcome.result["malformed"] == 1
    assert f"offset {len(start) + 9}" in outcome.stderr
    assert "encoding: latin-1" in outcome.stderr


HOSTILE = st.text(st.sampled_from("ab,\"\n\r;=\t \0é☃"), max_size=8)


@pytest.mark.slow
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(st.tuples(HOSTILE, HOSTILE), max_size=12), tail=st.text(st.sampled_from("ab,\"\n\r"), max_size=20),
       noise=st.binary(max_size=6))
def test_hostile_tables_conserve_rows(tmp_path_factory, rows, tail, noise):
    """500 generated tables, well-formed rows with rubbish behind them: staged + malformed = records, cells unchanged."""
    folder = tmp_path_factory.mktemp("hostile")
    path = folder / "table.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows([("url", "caption"), *rows])
        file.write(tail)
    with path.open("ab") as file:
        file.write(noise)
    config = script.Config(csv_path=str(path), output_path=str(folder / "out"), pretrained_model="none")
    plan = script.make_plan(config)
    staged = plan.table.read(0, plan.row_count)
    found = list(zip(staged["url"], staged["caption"], strict=True))
    assert found[:len(rows)] == rows
    with (folder / "out" / "bad_rows.csv").open(newline="", encoding="utf-8") as file:
        assert len(list(csv.reader(file))) - 1 == plan.manifest["malformed"]
    records = list(script.csv_records(Text(str(path), "utf-8").lines(), ","))
    assert len(records) - 1 == plan.row_count + plan.manifest["malformed"]
