"""Quotes in tables separated by tabs: where they would swallow rows they are text, and `quoting: none` has them all be text."""
import csv
import io
import random
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_staging import block_sizes, read_carefully, read_fast

import image_text_sim_clip as script
from addons.inputs import csv_blocks
from addons.inputs.literal_quotes import LiteralQuotes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for many small tables, on a disk that need not be waited for."""
    with mock.patch("os.fsync", lambda descriptor: None):
        yield tmp_path_factory.mktemp("quoting")


@pytest.mark.parametrize(("table", "rows", "bad", "literal"), [
    ('a\t"Starry night over\nb\tcalm\nc\tthe Rhone"\nd\t"hello" said\ne\tplain\n',
     [["a", '"Starry night over'], ["b", "calm"], ["c", 'the Rhone"'], ["d", '"hello" said'], ["e", "plain"]], [], 4),
    ('"Starry\ta\nover"\tb\nx\tc\n', [['"Starry', "a"], ['over"', "b"], ["x", "c"]], [], 2),  # the fields add up
    ('a\t"one\r\nb\ttwo"\r\n', [["a", '"one'], ["b", 'two"']], [], 2),
    ('a\t"one\nb\ttwo\n', [["a", '"one'], ["b", "two"]], [], 1),                             # never closed
    ('a\t"first line\nsecond line"\nb\tx\n', [["a", "first line\nsecond line"], ["b", "x"]], [], 0),   # a field, rightly
    ('a\t"first line\n\nb\tlast line"\n', [["a", '"first line'], ["b", 'last line"']], [], 2),
    ('a\t"say ""hi"" \tthere"\n', [["a", 'say "hi" \tthere']], [], 0),
    ('a\t"x"\nb\ty\n', [["a", "x"], ["b", "y"]], [], 0),
    ('a\t"b\nc\td\te"\tf\ng\th\n', [["a", '"b'], ["g", "h"]], ["3"], 1),  # no row as a field, nor the 2nd line
    ('a\t5" pipe\nb\tthe "best"\n', [["a", '5" pipe'], ["b", 'the "best"']], [], 0),
])
def test_quotes_that_would_swallow_rows(folder, table, rows, bad, literal):
    """In a TSV a quoted field that swallows whole rows is none, and the run says how many lines that concerns."""
    described, found, malformed = read_fast(folder, b"url\tcaption\n" + table.encode(), "t.tsv")
    assert found == rows and [line for line, *_ in malformed] == bad
    assert described["literal_lines"] == literal


@pytest.mark.parametrize(("name", "separator"), [("t.tsv", "\t"), ("t.csv", ","), ("t.txt", ";")])
def test_quoting_none(folder, name, separator):
    """With quoting: none each line is a row, whatever quotes it has, and quotes stay in their cells."""
    lines = ['"url"|"a"', 'x|"Starry night', 'y|over the Rhone"', '"z|w"', 'v|say ""hi""', 'only one', '"|"']
    table = "url|caption\n" + "\n".join(lines) + "\n"
    described, found, malformed = read_fast(folder, table.replace("|", separator).encode(), name, quoting="none",
                                            separator=separator)
    assert found == [line.split("|") for line in lines if "|" in line] and [line for line, *_ in malformed] == ["7"]
    assert described["literal_lines"] == 0


def test_csv_keeps_its_quoting(folder):
    """In a table separated by commas nothing changes: a line of prose often has a comma, and a quoted field may go on."""
    described, found, _ = read_fast(folder, b'url,caption\na,"one, two\nthree, four"\nb,c\n')
    assert found == [["a", "one, two\nthree, four"], ["b", "c"]] and described["literal_lines"] == 0


def test_the_user_is_told(write_config, write_table, run_main, tmp_path, read_table):
    """One line tells how many lines were read with their quotes as text, and of the key."""
    path = write_table('url\tcaption\na\t"one\nb\ttwo"\n', "t.tsv")
    outcome = run_main("--config", write_config(csv_path=str(path)))
    assert "2 lines of" in outcome.stderr and "quoting: none" in outcome.stderr and outcome.result["rows"] == 2
    assert [row["caption"] for row in read_table(tmp_path / "out/scores.csv")] == ['"one', 'two"']
    outcome = run_main("--config", write_config(csv_path=str(path), quoting="none"), "--fresh")
    assert "quoting" not in outcome.stderr and outcome.result["rows"] == 2
    assert run_main("--config", write_config(csv_path=str(path))).code == 2  # it decides rows, so it is part of the run


PIECES = st.sampled_from([b"a\tb", b'"', b"\t", b"\n", b"\r\n", b"\r", b'a\t"b', b'"\t"', b'""', b'x"', b"word", b"\n\n",
                          b"\xff", b'q\t"r\ns\tt"\n', b'"u\tv\nw"\tx\n', "é".encode(), b"a\tb\n", b"a\tb\tc\n"])


@settings(max_examples=200, deadline=None)
@given(pieces=st.lists(PIECES, max_size=30), rows=st.integers(1, 9), quoting=st.sampled_from(["auto", "none"]),
       block=st.sampled_from([(1, 1), (20, 5), (1_000_000, 128_000)]))
def test_blocks_and_records_agree(folder, pieces, rows, quoting, block):
    """Whether a TSV is read in blocks of any size or record by record, its rows, bad rows and count of literal lines agree."""
    data = b"url\tcaption\n" + b"".join(pieces)
    with block_sizes(*block, rows):
        described, *fast = read_fast(folder, data, "t.tsv", quoting=quoting)
    literal = LiteralQuotes(script.Config(csv_path="t.tsv", quoting=quoting))
    careful = read_carefully(data, 2, "\t", quoting=quoting, revise=lambda records: literal.reread(records, 2))
    assert tuple(fast) == careful and described["literal_lines"] == literal.lines
    if quoting == "none":
        lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")[1:]
        assert len(fast[0]) + len(fast[1]) == sum(bool(line) for line in lines)


# ── Escaped quotes ────────────────────────────────────────────────────────────────────────────────────────────────────

SPARK = ('url,caption\na,"a sign that says \\"open\\" on a door"\nb,plain\nc,"he said \\"\nd,"5\\" pipe, new"\n'
         'e,"x \\",\\" y"\nf,back\\slash\ng,5\\" wide\n')


def test_escaped_quotes_are_found(tmp_path, score_input):
    """A table with lines that are rows only with their quotes escaped is read so, and that is told."""
    (tmp_path / "t.csv").write_text(SPARK)
    outcome, rows, bad, _ = score_input("t.csv")
    assert [(row["url"], row["caption"]) for row in rows] == [
        ("a", 'a sign that says "open" on a door'), ("b", "plain"), ("d", '5" pipe, new'), ("e", 'x "," y'),
        ("f", "back\\slash"), ("g", '5" wide')]
    assert [row["line"] for row in bad] == ["4"] and "a backslash escapes quotes" in outcome.stderr
    assert [row["url"] for row in score_input("t.csv", "--fresh", escape="none")[1]] == ["b", "c", "f", "g"]


def test_a_few_escaped_quotes_in_another_table(tmp_path, score_input):
    """Where more lines are rows only as CSV has it, a line with escaped quotes is mended by itself, and those are counted."""
    (tmp_path / "t.csv").write_text('url,caption\na,"C:\\"\nb,"D:\\"\nc,"say \\"hi\\" now"\nd,"E:\\"\n')
    outcome, rows, bad, _ = score_input("t.csv")
    assert [row["caption"] for row in rows] == ["C:\\", "D:\\", 'say "hi" now', "E:\\"] and not bad
    assert "1 lines of" in outcome.stderr and "escape:" in outcome.stderr


def test_escape_of_a_whole_table(tmp_path, score_input):
    """With `escape` all of a table is read so: line ends in such fields as well; other backslashes stay."""
    (tmp_path / "t.csv").write_text('url,caption\na,"b \\"\n\\" c"\nd,5\\" wide\ne,C:\\new\\, x\nf,"\\\\"\n')
    _, rows, bad, _ = score_input("t.csv", escape="\\")
    assert [(row["url"], row["caption"]) for row in rows] == [
        ("a", 'b "\n" c'), ("d", '5" wide'), ("e", "C:\\new, x"), ("f", "\\")] and not bad


@pytest.mark.parametrize("escape", ["\\", "auto"])
def test_what_pandas_writes_is_read(tmp_path, score_input, escape):
    """A table that pandas writes with an escape comes back as it was."""
    import pandas
    captions = ['say "hi"', "plain", 'a, "b"', '"', "x\\y"]
    table = pandas.DataFrame({"url": list("abcde"), "caption": captions})
    table.to_csv(tmp_path / "t.csv", index=False, doublequote=False, escapechar="\\")
    assert [row["caption"] for row in score_input("t.csv", escape=escape)[1]][:4] == captions[:4]


def test_backslashes_in_a_sound_table(tmp_path, score_input):
    """A backslash before a quote at a line's end within a field makes no table of escaped quotes out of one that is sound."""
    captions = ['a poster, 5\\"\nby 7"', "C:\\\\x", "plain"]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("url", "caption"), *zip("abc", captions, strict=True)])
    outcome, rows, bad, _ = score_input("t.csv")
    assert [row["caption"] for row in rows] == captions and not bad and "escape" not in outcome.stderr


def test_whatever_csv_writes_is_read(folder):
    """Tables of chance that Python's csv writes, full of backslashes, quotes and line ends, are read as they were."""
    rng = random.Random(5)
    for _ in range(400):
        pieces = rng.choice([["\\", '"', ",", "\n", "a", " "], ['\\"', "\n", "a", ",", "\r\n"], ["\\\\", '"', "a", "\n"]])
        count = rng.randint(1, 12)
        rows = [[f"{row}.png", "".join(rng.choices(pieces, k=rng.randint(0, 9)))] for row in range(count)]
        text = io.StringIO(newline="")
        quoting = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
        csv.writer(text, quoting=quoting, lineterminator="\n").writerows([["url", "caption"], *rows])
        (folder / "t.csv").write_text(text.getvalue(), newline="")
        table = csv_blocks.open_table(script.Config(csv_path=str(folder / "t.csv")), [])
        found = [list(row.values()) for batch, _ in table.batches for row in batch.to_pylist()]
        assert found == rows, text.getvalue()


def test_an_escape_that_cannot_be(run_main, write_config):
    """An escape of several characters, or a quote, is exit 2 and one line."""
    for escape in ("", "\\\\", '"'):
        outcome = run_main("--config", write_config(escape=escape))
        assert outcome.code == 2 and "escape" in outcome.stderr
