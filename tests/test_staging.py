"""Staging text at speed: the fast way gives what the careful reader alone gives, whatever the bytes and the block sizes."""
import codecs
import contextlib
import csv
import gzip
import hashlib
import io
import os
import pathlib
import shutil
import subprocess
import sys
from unittest import mock

import pytest
from conftest import stage
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import image_text_sim_clip as script
from addons.inputs import csv_blocks, text


def read_carefully(data, columns, separator=",", encoding="utf-8", limit=None, quoting="auto", revise=iter):
    """(rows, bad rows as text) of a table's bytes, header left out: the careful reader over the whole, and nothing else.

    `revise` takes the records behind the header's, and gives those that count.
    """
    codec = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
    lines = io.TextIOWrapper(io.BytesIO(data), encoding=codec, errors="surrogateescape", newline="")
    rows, bad, records = [], [], script.csv_records(iter(lines), separator, quoting=quoting)
    next(records)
    for line, fields, raw, _ in revise(records):
        if fields is not None and len(fields) == columns and script.is_text("".join(fields)):
            rows.append(fields)
        else:
            reason = script.why_malformed(fields, columns)
            bad.append((str(line), reason, raw.rstrip("\r\n")[:1000].encode("utf-8", "backslashreplace").decode()))
        if len(rows) == limit:
            break
    return rows, bad


def read_fast(folder, data, name="table.csv", **keys):
    """(what stage says, rows, bad rows) of the same bytes, staged."""
    (folder / name).write_bytes(data)
    config = script.Config(csv_path=str(folder / name), output_path=str(folder / "out"), **keys)
    (folder / "out").mkdir(exist_ok=True)
    described = stage(config, folder / "out")
    import pyarrow.parquet as pq
    table = pq.read_table(folder / "out/pairs.parquet")
    with (folder / "out/bad_rows.csv").open(encoding="utf-8", newline="") as file:
        bad = [tuple(row) for row in csv.reader(file, strict=True)][1:]
    assert (described["rows"], described["malformed"]) == (len(table), len(bad))
    return described, [list(row) for row in zip(*table.to_pydict().values(), strict=True)], bad


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for many small tables, on a disk that need not be waited for."""
    with mock.patch("os.fsync", lambda descriptor: None):
        yield tmp_path_factory.mktemp("staging")


PIECES = st.sampled_from([
    b"a,b\n", b"a,b\r\n", b"a,b\r", b'"a","b"\n', b'a,"b ""q"" b"\n', b'"",""\n', b",\n", b'a,"x\ny"\r\n', b'a,"x\r\ny"\n',
    b'the "best" one,b"b\n', b'a,b""\n', b'x"\n', b'",b\n', b"\n", b"\r", b"\r\n", b"a\n", b"a,b,c\n",
    b'"a\nb"\n', b'5" pipe,b\n', b'a,"oops\n', b'a,"b"c\n', b'"', b'""', b",", b"x",
    b"\xff", b"\xc3\xa9", b"\xc3", b"\xa9", b"\xef\xbb\xbf", b"\xed\xb2\x81", b"\0", b" ", b"\xe2\x80\xa8", b"\x85", b"\t",
    b'caf\xc3\xa9,"na\xc3\xafve, ""yes"""\n', b"a," + b"long " * 30 + b"\n"])
SIZES = st.tuples(st.integers(1, 300), st.integers(1, 40), st.integers(1, 9))


@contextlib.contextmanager
def block_sizes(block_bytes, line_piece_bytes, rows):
    """While in this context, text is cut into tiny pieces, and rows are handed over and written a few at a time."""
    with mock.patch.multiple(csv_blocks, BLOCK_BYTES=block_bytes, CAREFUL_BYTES=min(block_bytes, line_piece_bytes)), \
            mock.patch.object(text, "LINE_PIECE_BYTES", line_piece_bytes), \
            mock.patch.multiple(script, BATCH_ROWS=rows, STAGE_ROWS=rows):
        yield


@settings(max_examples=400, deadline=None)
@given(pieces=st.lists(PIECES, max_size=30), sizes=SIZES, limit=st.none() | st.integers(1, 9))
def test_fast_is_careful(folder, pieces, sizes, limit):
    """Rows, malformed lines, line numbers and bad_rows.csv do not depend on the way, for hostile tables and tiny blocks."""
    data = b"url,caption\n" + b"".join(pieces)
    with block_sizes(*sizes):
        _, rows, bad = read_fast(folder, data, limit=limit)
    assert (rows, bad) == read_carefully(data, 2, limit=limit)


@settings(max_examples=150, deadline=None)
@given(pieces=st.lists(PIECES, max_size=20), sizes=SIZES, encoding=st.sampled_from(
    ["ascii", "latin-1", "cp1252", "shift_jis", "gb18030", "utf-8-sig", "utf-7", "euc_jp"]), gz=st.booleans())
def test_fast_is_careful_in_other_encodings(folder, pieces, sizes, encoding, gz):
    """Nor in encodings other than UTF-8, whose undecodable bytes make malformed rows too, nor under gzip."""
    data = b"url,caption\n" + b"".join(pieces)
    name, packed = ("table.csv.gz", gzip.compress(data)) if gz else ("table.csv", data)
    with block_sizes(*sizes):
        try:
            described, rows, bad = read_fast(folder, packed, name=name, encoding=encoding)
        except script.Trouble as trouble:  # a codec that knows no escape, as before
            assert trouble.exit_code == 3
            with pytest.raises(UnicodeError):
                read_carefully(data, 2, encoding=encoding)
            return
    assert (rows, bad) == read_carefully(data, 2, encoding=encoding)
    assert described["files"][0]["sha256"] == hashlib.sha256(packed).hexdigest()


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=120) | st.text(st.sampled_from('ab,;\t"\r\n é'), max_size=120).map(str.encode),
       separator=st.sampled_from([",", ";", "\t", " ", "é", "a"]), width=st.integers(1, 3), sizes=SIZES)
def test_fast_is_careful_for_any_separator_and_width(folder, data, separator, width, sizes):
    """Nor for tables of one column or three, and separators of every kind. Quotes next to tabs: test_quoting.py."""
    assume(separator != "\t" or b'"' not in data)
    header = separator.join(["x", "y", "z"][:width]).encode() + b"\n"
    with block_sizes(*sizes):
        _, rows, bad = read_fast(folder, header + data, separator=separator, url_column="x", caption_column="x")
    assert (rows, bad) == read_carefully(header + data, width, separator)


def test_clean_blocks_need_no_careful_reader(folder, monkeypatch):
    """Quoted captions, line ends in them, quotes that are text, ragged and blank lines are all read the fast way."""
    monkeypatch.setattr(csv_blocks, "read_stretch", None)
    monkeypatch.setattr(csv_blocks, "BLOCK_BYTES", 200)
    monkeypatch.setattr(csv_blocks, "CAREFUL_BYTES", 200)
    literal = '5" pipe,the "best" one\n' * 3
    table = literal + "".join(f'a{n},"caption {n}, ""quoted""\r\nand long"\n' + "ragged\n\n" * (n % 3)
                              for n in range(50)) + literal
    _, rows, bad = read_fast(folder, b"url,caption\n" + table.encode())
    assert len(rows) == 56 and rows[0] == ['5" pipe', 'the "best" one']
    assert rows[10] == ["a7", 'caption 7, "quoted"\r\nand long']
    assert len(bad) == sum(n % 3 for n in range(50)) and bad[-1] == ("201", "1 fields instead of 2", "ragged")


def test_careful_reader_hands_back(folder, monkeypatch):
    """One stray quote in a long table costs one careful stretch, not the fast way for all the rest."""
    stretches, real = [], csv_blocks.read_stretch

    def counted(source, *arguments):
        stretches.append(source.line)
        return real(source, *arguments)
    monkeypatch.setattr(csv_blocks, "read_stretch", counted)
    monkeypatch.setattr(csv_blocks, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(csv_blocks, "CAREFUL_BYTES", 500)
    lines = [b'a,"b"\n'] * 40_000
    lines[20_000] = b'a,"b\n'
    _, rows, bad = read_fast(folder, b"url,caption\n" + b"".join(lines))
    assert len(rows) == 39_999 and [line for line, *_ in bad] == ["20002"]
    assert 1 <= len(stretches) <= 3


@settings(max_examples=200, deadline=None)
@given(pieces=st.lists(PIECES, max_size=30), rows=st.integers(1, 9), limit=st.none() | st.integers(1, 9),
       encoding=st.sampled_from(["utf-8", "UTF8", "latin-1", "cp1252"]))
def test_script_alone_is_careful(folder, pieces, rows, limit, encoding):
    """Without addons/ the script reads the same rows and bad rows, record by record."""
    data = b"url,caption\n" + b"".join(pieces)
    with mock.patch.object(script, "ADDONS", pathlib.Path("nowhere")), block_sizes(1, 1, rows):
        _, found, bad = read_fast(folder, data, limit=limit, encoding=encoding)
    assert (found, bad) == read_carefully(data, 2, limit=limit, encoding=encoding)


@pytest.fixture
def run_alone(tmp_path, run_cli, write_config):
    """Dry-run table.csv by a copy of the script that has no addons/ next to it."""
    (tmp_path / "alone").mkdir()
    shutil.copy(script.__file__, tmp_path / "alone")

    def run(**keys):
        return run_cli("--config", write_config(**keys), "--fresh", script_path=tmp_path / "alone/image_text_sim_clip.py",
                       env={"PYTHONPATH": ""})
    return run


ALONE = {
    "clean": ({}, 'url,caption\n\na,"b, ""c""\nd"\r\ne,f\ng,\n'.encode("utf-8-sig"), 3, 0),
    "limit": ({"limit": 2}, 'url,caption\n\na,"b, ""c""\nd"\r\nragged\ne,f\nx\ng,\n', 2, 1),
    "stray quotes": ({}, 'url,caption\na,"b\nc,d\ne,"f"g\n"h,i\nj,k', 2, 3),
    "ragged lines": ({}, "url,caption\na,b\nragged\n\nc,d,e\nf,g\n", 2, 2),
    "old line ends": ({}, b'url,caption\ra,"b\r\nc"\rd\re,f\r', 2, 1),
    "bytes that are not text": ({}, b"url,caption\na,\xff\nb,caf\xc3\xa9\n\xe9,c\n", 1, 2),
    "a line too long": ({}, "url,caption\na," + "x" * 16_000_001 + "\nb,y\n", 1, 1),
    "columns of one name": ({}, "note,url, note,caption,note_2\n1,u,2,c,3\n", 1, 0),
    "no header": ({"url_column": 1, "caption_column": 0}, 'a cat,u\n"a\ndog",v\nx\n', 2, 1),
    "another encoding": ({"encoding": "latin-1"}, "url,caption\na,\xe9\n".encode("latin-1"), 1, 0),
    "utf-16": ({"encoding": "utf-16"}, "url,caption\na,\xe9\n".encode("utf-16"), 1, 0),
    "another separator": ({"separator": ";"}, 'url;caption\na;"b;c"\nd;e;f\n', 1, 1),
}


@pytest.mark.parametrize("name", ALONE)
def test_script_alone_reads_any_csv(tmp_path, run_alone, run_main, write_config, write_table, name):
    """Without addons/ next to it the script reads flawed tables, too, and what it writes is the same byte for byte."""
    keys, table, rows, malformed = ALONE[name]
    write_table(table)
    outputs = []
    for run in (lambda: run_alone(**keys), lambda: run_main("--config", write_config(**keys), "--fresh")):
        outcome = run()
        assert (outcome.code, outcome.result["rows"], outcome.result["malformed"]) == (0, rows, malformed), outcome.stderr
        outputs.append([(tmp_path / "out" / file).read_bytes() for file in ("scores.csv", "manifest.json", "bad_rows.csv")])
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(("table", "words"), [
    ("", "header"), ('"url,caption\na,b\n', "header"),
    ("image,text\na,b\n", "no column 'url'"), ("url,caption,url\na,b,c\n", "more than one column 'url'")])
def test_script_alone_refuses_what_is_no_table(tmp_path, run_alone, run_main, write_config, write_table, table, words):
    """What is no table with the two columns is exit 3 and one line, the same as with addons/, and nothing is staged."""
    write_table(table)
    lines = []
    for run in (run_alone, lambda: run_main("--config", write_config(), "--fresh")):
        outcome = run()
        assert outcome.code == 3 and words in outcome.stderr.splitlines()[-1]
        assert not (tmp_path / "out/pairs.parquet").exists()
        lines.append(outcome.stderr.splitlines()[-1])
    assert lines[0] == lines[1]


@pytest.mark.parametrize("name", ["table.jsonl", "table.csv.gz", "table.parquet", "table.tar"])
def test_script_alone_names_what_other_kinds_need(tmp_path, run_alone, write_table, name):
    """An input of another kind needs addons/, which is said in one line, and nothing is staged."""
    path = write_table(b"", name)
    outcome = run_alone(csv_path=str(path))
    assert outcome.code == 2 and "addons" in outcome.stderr.splitlines()[-1]
    assert not (tmp_path / "out/pairs.parquet").exists()


@pytest.mark.parametrize(("table", "code"), [("url\tcaption\na\tb\n", 0), ('url\tcaption\na\t"b\nc\td\n', 2)])
def test_script_alone_reads_tabs_without_quotes(tmp_path, run_alone, write_table, table, code):
    """In a table separated by tabs quotes may be text, which addons/ tells: alone the first of them is exit 2 and one line."""
    outcome = run_alone(csv_path=str(write_table(table, "table.tsv")))
    assert outcome.code == code, outcome.stderr
    assert code == 0 or "quotes in it (unless quoting is none) needs addons" in outcome.stderr.splitlines()[-1]
    assert (tmp_path / "out/pairs.parquet").exists() == (code == 0)


@pytest.mark.parametrize("name", ["t.csv.gz", "t.tsv.gz", "t.txt.gz", "t.CSV.GZ"])
def test_gzipped_tables(folder, name):
    """Gzipped tables are read as they are, several members too; .tsv.gz has tabs; the sha256 is that of the packed file."""
    separator = "\t" if "tsv" in name else ","
    packed = b"".join(gzip.compress(part.encode()) for part in (f"url{separator}cap", f"tion\na{separator}b\n"))
    described, rows, _ = read_fast(folder, packed, name=name)
    assert rows == [["a", "b"]]
    assert described["files"][0] == {"name": name, "rows": 1, "bytes": len(packed), "mtime_ns": mock.ANY, "ctime_ns": mock.ANY,
                                     "sha256": hashlib.sha256(packed).hexdigest()}


@pytest.mark.parametrize("spoil", [lambda d: d[:-9], lambda d: d[:40] + b"\xff\xff\xff" + d[43:], lambda d: d[:-4] + b"abcd"])
def test_broken_gzip(folder, spoil):
    """A gzip file that is cut off or damaged is exit 3 and one line, and nothing is staged from it."""
    packed = gzip.compress(b"url,caption\n" + b"".join(b"a%d,b%d\n" % (n, n * 7919) for n in range(500)))
    shutil.rmtree(folder / "out", ignore_errors=True)
    with pytest.raises(script.Trouble, match="csv_path") as trouble:
        read_fast(folder, spoil(packed), name="broken.csv.gz")
    assert trouble.value.exit_code == 3 and not (folder / "out/pairs.parquet").exists()


def test_line_without_an_end(folder, monkeypatch):
    """A file without line ends is refused before it is held whole."""
    monkeypatch.setattr(text, "LONGEST_LINE_BYTES", 200_000)
    with pytest.raises(script.Trouble, match="longer than"):
        read_fast(folder, b"x" * 3_000_000)


def test_limit_still_hashes_all(folder):
    """With `limit`, the sha256 is still that of the whole file."""
    data = b"url,caption\n" + b"a,b\n" * 2_000_000
    described, rows, _ = read_fast(folder, data, limit=3)
    assert len(rows) == 3 and described["files"][0]["sha256"] == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("more", [b"is cut\nc,d\n", b""])
def test_table_that_is_written_while_it_is_read(folder, monkeypatch, more):
    """A table that somebody is still writing, whose last caption may be half of one, or writes anew, ends the run: exit 3."""
    from addons.inputs import staging
    append = staging.StagedTable.append

    def append_and_write(self, rows):
        append(self, rows)
        with (folder / "table.csv").open("ab") as table:
            table.write(more)
        os.utime(folder / "table.csv", ns=(1, 1))
    monkeypatch.setattr(staging.StagedTable, "append", append_and_write)
    with pytest.raises(script.Trouble, match="was written to or replaced while it was read") as trouble:
        read_fast(folder, b"url,caption\na,b\nb,a caption that ")
    assert trouble.value.exit_code == 3


def test_full_disk_while_staging(folder, monkeypatch):
    """An output disk that fills up while a block is written, which another thread does, is exit 5."""
    import pyarrow.parquet as pq

    def refuse(*arguments):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(pq.ParquetWriter, "write_table", refuse)
    with pytest.raises(script.Trouble, match="No space left") as trouble:
        read_fast(folder, b"url,caption\n" + b"a,b\n" * 20_000)
    assert trouble.value.exit_code == 5


CTRL_C_WHILE_ARROW_PARSES = """
import os, signal
import numpy as np
from addons.inputs import csv_blocks
caught = []
signal.signal(signal.SIGINT, lambda *arguments: caught.append(arguments))
real = csv_blocks.arrow_csv.ParseOptions
def interrupting_options(invalid_row_handler, **options):
    def interrupted(row):
        os.kill(os.getpid(), signal.SIGINT)
        return invalid_row_handler(row)
    return real(invalid_row_handler=interrupted, **options)
csv_blocks.arrow_csv.ParseOptions = interrupting_options
rows, bad = csv_blocks.parse_clean(b"1,2\\n3\\n", np.array([], int), ",", ["a", "b"], 1)
assert len(caught) == 1 and rows.to_pylist() == [{"a": "1", "b": "2"}] and len(bad) == 1
"""


def test_ctrl_c_while_arrow_parses_is_ours():
    """Arrow does not take SIGINT while it parses: its own handler lost one that came at the end of a block.

    In a process of its own, whose signals no other test and no test runner has an eye on.
    """
    done = subprocess.run([sys.executable, "-c", CTRL_C_WHILE_ARROW_PARSES], cwd=script.ADDONS.parent, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 0, done.stderr
