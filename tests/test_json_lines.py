"""JSON Lines: each object is a row whose cells give its values back, and the fast way finds what line by line finds."""
import csv
import gzip
import json
from unittest import mock

import pyarrow.parquet as pq
import pytest
from conftest import stage
from hypothesis import given, settings
from hypothesis import strategies as st

import image_text_sim_clip as script
from addons.inputs import json_lines


def pairs(rows):
    return [(row["url"], row["caption"]) for row in rows]


def assert_refused(outcome, words):
    assert outcome.code == 3 and len(outcome.stderr.splitlines()) == 1, outcome
    assert words in outcome.stderr


def test_json_lines(tmp_path, score_input):
    """Keys are columns; numbers keep their digits, nested values are JSON, null and absent are empty, bad lines are told."""
    (tmp_path / "t.jsonl").write_text('{"url": "a", "caption": "x, \\"y\\"\\nz", "n": 1.50, "big": 12345678901234567890123}\n\n'
                                      '{"caption": "NA", "url": "b", "n": null, "ok": true, "tags": ["é", {"k": 1e5}]}\n'
                                      '[1]\nnot json\n{"url": "c"}\n{"url": "d", "caption": null, "n": -0}\n')
    outcome, rows, bad, manifest = score_input("t.jsonl")
    assert outcome.code == 0 and outcome.result["rows"] == 3 and outcome.result["malformed"] == 3
    assert list(rows[0])[:6] == ["url", "caption", "n", "big", "ok", "tags"]
    assert [list(row.values())[:6] for row in rows] == [
        ["a", 'x, "y"\nz', "1.50", "12345678901234567890123", "", ""],
        ["b", "NA", "", "", "true", '["é", {"k": 100000.0}]'], ["d", "", "-0", "", "", ""]]
    assert [(line["line"], line["reason"]) for line in bad] == [
        ("4", "not a JSON object"), ("5", "not JSON: Expecting value"), ("6", "no key 'caption'")]
    assert manifest["kind"] == "jsonl" and rows[2]["status"] == "empty_caption"


def test_json_lines_with_late_keys(tmp_path, score_input, monkeypatch):
    """A key that first appears long after the first block is a column all the same, and no row before it is lost."""
    monkeypatch.setattr(json_lines, "FIRST_BYTES", 100)
    monkeypatch.setattr(json_lines, "BATCH_ROWS", 7)
    lines = [{"url": f"u{n}", "caption": "c", **({"late": n} if n == 50 else {}), **({"later": n} if n == 60 else {})}
             for n in range(70)]
    (tmp_path / "t.ndjson.gz").write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode() + b"x\n"))
    outcome, rows, bad, manifest = score_input("t.ndjson.gz")
    assert manifest["columns"] == ["url", "caption", "late", "later"]
    assert [row["late"] for row in rows] == [str(n) if n == 50 else "" for n in range(70)]
    assert rows[60]["later"] == "60" and [line["line"] for line in bad] == ["71"] and outcome.result["rows"] == 70


def test_json_lines_limit(tmp_path, score_input):
    """limit ends the table before what is behind it is judged, its keys included."""
    (tmp_path / "t.jsonl").write_text('{"url": 1, "caption": 2}\nbad\n{"url": 3, "caption": 4}\n'
                                      'worse\n{"url": 5, "caption": 6, "z": 7}')
    _, rows, bad, manifest = score_input("t.jsonl", limit=2)
    assert pairs(rows) == [("1", "2"), ("3", "4")] and [line["text"] for line in bad] == ["bad"]
    assert manifest["columns"] == ["url", "caption"]


def test_json_keys_are_columns_as_they_are(tmp_path, score_input):
    """Keys with spaces around them, empty ones, and ones that differ in spaces alone are columns of their own."""
    (tmp_path / "t.jsonl").write_text('{"url": "a", "caption": "b", " n ": 1, "": 2}\n{"url": "c", "caption": "d", "n": 3}\n')
    _, rows, _, manifest = score_input("t.jsonl")
    assert manifest["columns"] == ["url", "caption", " n ", "", "n"]
    assert [(row[" n "], row[""], row["n"]) for row in rows] == [("1", "2", ""), ("", "", "3")]


@pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
def test_nan_is_no_caption(tmp_path, score_input, name):
    """NaN, which Python writes for what is missing, is no caption, and leaves a column of numbers one; Infinity is text."""
    lines = ['{"url": "a", "caption": NaN, "n": NaN}', '{"url": "b", "caption": ["x", NaN], "n": 1.5}',
             '{"url": "c", "caption": "NaN", "n": 2}', '{"url": "d", "caption": Infinity, "n": 2}']
    (tmp_path / name).write_text("[" + ",\n".join(lines) + "]" if name == "t.json" else "\n".join(lines))
    _, rows, _, manifest = score_input(name)
    assert [row["caption"] for row in rows] == ["", "x", "", "NaN", "Infinity"]
    assert rows[0]["status"] == rows[2]["status"] == "empty_caption"
    assert [row["n"] for row in rows] == ["", "1.5", "1.5", "2", "2"] and manifest["types"]["n"] == "float"


def test_json_lines_need_names(tmp_path, score_input):
    """Columns given by number are refused: there is no order of columns to count in."""
    (tmp_path / "t.jsonl").write_text('{"url": "a", "caption": "b"}\n')
    assert_refused(score_input("t.jsonl", url_column=0, caption_column=1)[0], "must be names")


@pytest.mark.parametrize("csv_path", ["s", "s/*.jsonl*"])
def test_json_lines_in_a_folder(tmp_path, score_input, csv_path):
    """A folder or glob with one such file is that file; with more it is all of them, and those without a byte do not matter."""
    (tmp_path / "s").mkdir()
    (tmp_path / "s/notes.txt").write_text("x")
    (tmp_path / "s/t.jsonl.gz").write_bytes(gzip.compress(b'{"url": "a", "caption": "b"}\n'))
    outcome, rows, _, _ = score_input(csv_path)
    assert outcome.code == 0 and pairs(rows) == [("a", "b")]
    assert score_input(csv_path)[0].result == outcome.result
    (tmp_path / "s/u.jsonl").write_text("")
    (tmp_path / "s/v.jsonl").write_text('{"url": "c", "caption": "d"}\n')
    assert pairs(score_input(csv_path, "--fresh")[1]) == [("a", "b"), ("c", "d")]


@pytest.mark.parametrize("line", [
    "{" * 100_000, '{"url": ' + "[" * 100_000, '{"url":"a","caption":"\\ud800"}', '{"url":"a","caption":"b"} x',
    '{"url":"a","caption":{"n": ' + "9" * 5000 + "}}", '{"url":"a","caption":"\udcff"}', "", '"', "NaN"])
def test_odd_json_is_malformed(line):
    """No text is more than a malformed line: nesting without end, half characters, numbers without end."""
    rows, reason = json_lines.parse_line(line, ["url", "caption"])
    assert rows == [] and reason


def test_json_lines_without_the_columns(tmp_path, score_input):
    """JSON Lines in which no line has the columns are refused, and so is an empty file."""
    (tmp_path / "t.jsonl").write_text('{"image": "a", "text": "b"}\n')
    assert_refused(score_input("t.jsonl")[0], "no JSON object that has 'url' and 'caption'")
    (tmp_path / "t.jsonl").write_text("")
    assert_refused(score_input("t.jsonl")[0], "no JSON object that has 'url' and 'caption'")


CELL = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) |
                    st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
                    lambda inner: st.lists(inner, max_size=2), max_leaves=4)


@given(objects=st.lists(st.dictionaries(st.sampled_from(["url", "caption", "a", "b", ""]), CELL), max_size=8))
@settings(max_examples=60, deadline=None)
def test_json_cells_can_be_read_back(tmp_path_factory, objects):
    """Each object with both keys is a row, or one for each caption of a list, whose cells give the values back."""
    folder = tmp_path_factory.mktemp("json")
    (folder / "t.jsonl").write_text('{"url": "", "caption": ""}\n' + "".join(json.dumps(o) + "\n" for o in objects))
    described = stage(script.Config(csv_path=str(folder / "t.jsonl"), output_path=str(folder)), folder)
    rows = pq.read_table(folder / "pairs.parquet").to_pylist()[1:]
    good = [o for o in objects if {"url", "caption"} <= o.keys() and not is_nested(o["caption"])]
    expected = [o | {"caption": caption, "caption_index": place} for o in good
                for place, caption in enumerate(captions_of(o["caption"]))]
    assert described["rows"] == len(expected) + 1 and described["malformed"] == len(objects) - len(good)
    for row, values in zip(rows, expected, strict=True):
        for key, value in values.items():
            if isinstance(value, str | None):
                assert row[key] == (value or "")
            elif key in row:
                assert json.loads(row[key]) == value
        assert all(row[key] == "" for key in row.keys() - values.keys())


def is_nested(caption):
    """Whether a caption is a list with something else than captions in it."""
    return isinstance(caption, list) and any(isinstance(value, list | dict) for value in caption)


def captions_of(caption):
    """The captions of a cell: one for each of a list, one empty text where that holds none."""
    if not isinstance(caption, list):
        return [caption]
    return caption if any(value is not None and str(value).strip() for value in caption) else [""]


# ── The fast way ──────────────────────────────────────────────────────────────────────────────────────────────────────

WORD = st.sampled_from(["a", "", "2020-01-01", "2020-01-01 00:00:00", "12", "é", r"x\ny", r'\"n\": 1', "-0, ", r"\ud83d\ude00",
                        r"\u0000", "}", "{"]).map(lambda text: f'"{text}"')
NUMBER = st.sampled_from(["1", "-0", "0", "1.50", "-0.0", "1e5", "1E+2", "9223372036854775808", "0.1", "1e999",
                          "12345.123456789"])
OTHER = st.sampled_from(["null", "true", "false", "[]", '[1.0, {"n": 2.50}]', '{"n": 1.0}', "NaN", "-Infinity", r'"\ud800"',
                         "01", "+1"])


def as_line(cells):
    return "{" + ", ".join(f'"{key}": {value}' for key, value in cells) + "}"


LINE = st.lists(st.tuples(st.sampled_from(["url", "caption", "n", "m"]), WORD | WORD | NUMBER | NUMBER | OTHER), max_size=4,
                unique_by=lambda cell: cell[0]).map(as_line)
GOOD = st.tuples(WORD, WORD, NUMBER, NUMBER).map(lambda cells: as_line(zip(("url", "caption", "n", "m"), cells, strict=True)))
ODD = st.sampled_from([
    "", " ", "[1]", "x", "{}{}", "{}", "\r", '{"url": "a",\r"caption": "b"}',
    '{"url": "a",', '"caption": "b"}', '{"url": "a", "caption": "b"} ',
    '{"url": "a", "url": "b", "caption": "c"}', '{"url": "a", "caption": "b"}{"url": "c", "caption": "d"}',
    '{"url": "a", "caption": "tab\t"}', '{"url": "a", "caption": "\xff"}', '{"url": "a", "caption": "b",}'])


@given(lines=st.lists(GOOD | GOOD | GOOD | LINE | ODD, max_size=14), block=st.integers(20, 900),
       end=st.sampled_from(["\n", "\n", "\r\n"]), limit=st.none() | st.integers(1, 8),
       encoding=st.sampled_from(["utf-8", "latin-1"]))
@settings(max_examples=300, deadline=None)
def test_fast_is_line_by_line(tmp_path_factory, lines, block, end, limit, encoding):
    """Arrow's way gives the rows, digits, malformed lines and line numbers that Python's gives, for hostile lines, too."""
    folder, found = tmp_path_factory.getbasetemp(), []
    text = '{"url": "", "caption": ""}\n' + end.join(lines)
    (folder / "t.jsonl").write_bytes(text.encode(encoding))
    config = script.Config(csv_path=str(folder / "t.jsonl"), output_path=str(folder), limit=limit)
    for plain in (json_lines.parse_plain, lambda *arguments: None):
        with mock.patch.multiple(json_lines, BLOCK_BYTES=block, FIRST_BYTES=50, parse_plain=plain, BATCH_ROWS=3), \
                mock.patch("os.fsync", lambda descriptor: None):
            described = stage(config, folder)
        found.append((described, pq.read_table(folder / "pairs.parquet").to_pydict(), (folder / "bad_rows.csv").read_bytes()))
    assert found[0] == found[1]


def test_plain_lines_are_read_fast(tmp_path, score_input, monkeypatch):
    """Strings, numbers and truth values, absent and null ones too, need no reading line by line, and keep their digits."""
    monkeypatch.setattr(json_lines.LineParser, "_read_lines", None)
    late = ', "late": 1'
    (tmp_path / "t.jsonl").write_text("".join(
        f'{{"url": "u{n}", "caption": "2020-01-01", "x": {n}.50, "n": {n}, "ok": true, "none": null{late * (n > 5)}}}\n'
        for n in range(20)))
    assert [list(row.values())[:7] for row in score_input("t.jsonl")[1]] == [
        [f"u{n}", "2020-01-01", f"{n}.50", str(n), "true", "", "1" * (n > 5)] for n in range(20)]


@pytest.mark.parametrize("ending", ["jsonl", "json", "jsonl.gz"])
def test_first_line_may_be_long(tmp_path, score_input, ending):
    """A first row of several megabytes is a row, and its keys are columns; a line without end is told."""
    csv.field_size_limit(10 * 1024 * 1024)
    caption = "long " * 700_000
    lines = [json.dumps({"url": "a", "caption": caption, "own": "x"}), json.dumps({"url": "b", "caption": "short"})]
    text = f"[{','.join(lines)}]" if ending == "json" else "\n".join(lines)
    data = text.encode()
    (tmp_path / f"t.{ending}").write_bytes(gzip.compress(data, 1) if ending.endswith("gz") else data)
    rows = score_input(f"t.{ending}")[1]
    assert [(row["url"], len(row["caption"]), row["own"]) for row in rows] == [("a", len(caption), "x"), ("b", 5, "")]
