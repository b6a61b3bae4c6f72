"""Tables: every line of the input becomes a row of scores.csv or a line of bad_rows.csv, and no cell changes on the way."""
import csv
import io
import pathlib
import tempfile
import time
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import image_text_sim_clip as script

RESULT_COLUMNS = script.column_names(script.Config().result_columns)


def records(text, separator=","):
    """csv_records over text."""
    found = script.csv_records(iter(io.StringIO(text, newline="")), separator)
    return [record[:3] for record in found]


@pytest.fixture
def rows_of(tmp_path, write_config, write_table, run_main, read_table):
    """Dry-run a table and return (Outcome, rows of scores.csv, rows of bad_rows.csv)."""
    def run(content, name="table.csv", **keys):
        path = write_table(content, name)
        outcome = run_main("--config", write_config(csv_path=str(path), **keys), "--fresh")
        out = tmp_path / "out"
        return outcome, *(read_table(out / f) if (out / f).exists() else None for f in ("scores.csv", "bad_rows.csv"))
    return run


def captions(rows):
    return [row["caption"] for row in rows]


# ── csv_records ───────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("text", "expected"), [
    ("a,b\nc,d\n", [(1, ["a", "b"]), (2, ["c", "d"])]),
    ("a,b\r\nc,d", [(1, ["a", "b"]), (2, ["c", "d"])]),
    ("a,b\rc,d\r", [(1, ["a", "b"]), (2, ["c", "d"])]),
    ("\n\na,b\n\r\n\nc,d\n", [(3, ["a", "b"]), (6, ["c", "d"])]),
    ('a,"b\nb\r\nb\rb"\nc,d\n', [(1, ["a", "b\nb\r\nb\rb"]), (5, ["c", "d"])]),
    ('a,"b ""quoted"" b"\n', [(1, ["a", 'b "quoted" b'])]),
    ('5" pipe,b"b\n', [(1, ['5" pipe', 'b"b'])]),
    (",\n,,\n", [(1, ["", ""]), (2, ["", "", ""])]),
    ('""\n', [(1, [""])]),
    ("", []),
    ("\n\r\n", []),
])
def test_records(text, expected):
    """Each record comes with the number of its first physical line, whatever the line ends; blank lines are none."""
    assert [(line, fields) for line, fields, _ in records(text)] == expected


@pytest.mark.parametrize(("text", "bad"), [
    ('u,c\nx,"abc\ny,d\nz,"e"\n', [2]),                       # swallows up to a quote that does not end a field
    ('u,c\nx,"abc\ny,d\nz,e\n', [2]),                         # swallows all
    ('u,c\nx,d\ny,"abc', [3]),                                # at the end of the file
    ('u,c\n"a\n"b\n"c\nd,e\n', [2, 3, 4]),                    # one after the other
    ('u,c\nx,"a"b\ny,d\n', [2]),                              # text behind the closing quote
    ('u,c\nx,"a\\"b"\ny,d\n', [2]),                           # backslashes are no escape
    ('u,c\nx,"a\nb"c\ny,"q\nq"\nz,"\n', [2, 6]),              # good quoted line ends among them
])
def test_unbalanced_quote_costs_its_own_line(text, bad):
    """A stray quote takes no neighbour with it: the lines after it are read again."""
    found = records(text)
    assert [line for line, fields, _ in found if fields is None] == bad
    assert "".join(raw for *_, raw in found) == text


def test_line_after_a_bad_quote_is_a_record_again():
    """What a stray quote swallowed comes back as it was, with its own line number."""
    assert records('x,"abc\ny,"d\ne"\nz,f\n') == [
        (1, None, 'x,"abc\n'), (2, ["y", "d\ne"], 'y,"d\ne"\n'), (4, ["z", "f"], "z,f\n")]


def test_endless_record_is_cut_off():
    """A record longer than any caption is given up as an unbalanced quote."""
    with mock.patch.object(script, "MAX_RECORD_CHARS", 1000):
        found = records('x,"abc\n' + "y,d\n" * 1000)
        assert found[0] == (1, None, 'x,"abc\n')
        assert len(found) == 1001


def test_many_stray_quotes_take_no_quadratic_time():
    """A table in which every line leaves a quote open is read in a time that grows as its length does."""
    started = time.process_time()
    assert sum(fields is None for _, fields, _ in records('x",",a\n' * 5000)) == 5000
    assert time.process_time() - started < 0.8


# ── Bytes to rows ─────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_bom(rows_of, end, bom):
    """Unix, Windows and old Mac line ends give the same rows, with a BOM or without."""
    text = end.join(["url,caption", "a.png,one", 'b.png,"two"', "c.png,drei é", ""])
    outcome, rows, bad = rows_of(bom + text.encode())
    assert outcome.code == 0
    assert captions(rows) == ["one", "two", "drei é"]
    assert list(rows[0]) == ["url", "caption", *RESULT_COLUMNS]
    assert bad == []


def test_last_line_without_end(rows_of):
    """The last row counts without a line end, too."""
    assert captions(rows_of(b"url,caption\na,x\nb,y")[1]) == ["x", "y"]


def test_quoted_newlines(rows_of):
    """Line ends of every kind inside quotes stay in the cell."""
    cell = "first\nsecond\r\nthird\rfourth, \"quoted\""
    outcome, rows, _ = rows_of([["url", "caption"], ["a", cell], ["b", "plain"]])
    assert outcome.result["rows"] == 2
    # the csv module leaves a lone carriage return bare outside quotes, so it must be quoted here
    assert captions(rows) == [cell, "plain"]


def test_fields_of_a_megabyte(rows_of):
    """A field of a megabyte, eight times what the csv module takes by default, is kept."""
    long = "x" * 1_000_000
    _, rows, bad = rows_of(f"url,caption\na,{long}\nb,y\n")
    assert captions(rows) == [long, "y"]
    assert bad == []


def test_field_of_sixteen_megabytes_is_bad_but_harmless(rows_of):
    """A line beyond the limit goes to bad_rows.csv, cut to 1,000 characters; its neighbours stay."""
    _, rows, bad = rows_of("url,caption\na," + "x" * 16_000_001 + "\nb,y\n")
    assert captions(rows) == ["y"]
    assert [(b["line"], b["reason"], len(b["text"])) for b in bad] == [("2", "longer than 16000000 characters", 1000)]


def test_ragged_rows(rows_of):
    """Lines with too few or too many fields go to bad_rows.csv with number and reason; no column shifts."""
    outcome, rows, bad = rows_of("url,caption,note\na,b,c\nd,e\nf,g,h,i\nj\nk,l,m\n")
    assert [(r["url"], r["caption"], r["note"]) for r in rows] == [("a", "b", "c"), ("k", "l", "m")]
    assert [(b["line"], b["reason"], b["text"]) for b in bad] == [
        ("3", "2 fields instead of 3", "d,e"), ("4", "4 fields instead of 3", "f,g,h,i"), ("5", "1 fields instead of 3", "j")]
    assert outcome.result["malformed"] == 3
    assert "3 lines" in outcome.stderr and "bad_rows.csv" in outcome.stderr


def test_bad_rows_have_true_line_numbers(rows_of):
    """Quoted newlines, blank lines and other bad lines before a bad one do not shift its number."""
    text = 'url,caption\n\na,"x\ny\rz"\r\n\r\nragged\nb,"oops\nc,d\n\n"q\n"\ne,f\ntoo,many,fields\n'
    outcome, rows, bad = rows_of(text)
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    assert [int(b["line"]) for b in bad] == [7, 8, 11, 14]
    assert [lines[int(b["line"]) - 1] for b in bad] == ["ragged", 'b,"oops', '"q', "too,many,fields"]
    assert [b["reason"] for b in bad] == ["1 fields instead of 2", "quotes do not balance", "1 fields instead of 2",
                                          "3 fields instead of 2"]
    assert captions(rows) == ["x\ny\rz", "d", "f"]
    assert outcome.result["rows"] == 3


@pytest.mark.parametrize("word", ["NA", "null", "None", "nan", "NaN", "N/A", "true", "1.0", "007", "1e5", "-", "#N/A",
                                  "<NA>", "inf"])
def test_words_stay_text(rows_of, word):
    """Captions that other readers take for missing values or numbers stay the text they are."""
    _, rows, _ = rows_of(f"url,caption\n{word},{word}\n")
    assert (rows[0]["url"], rows[0]["caption"]) == (word, word)
    assert rows[0]["status"] == "missing"  # and not empty_caption


def test_spaces_stay(rows_of):
    """Spaces around cells are part of them."""
    _, rows, _ = rows_of("url,caption\n a , b \n")
    assert (rows[0]["url"], rows[0]["caption"]) == (" a ", " b ")


def test_blank_captions(rows_of):
    """A caption of nothing but white space is an empty caption, and no picture is looked for."""
    _, rows, _ = rows_of([["url", "caption"], ["../a", ""], ["../a", "  \t"], ["../a", "\n"],
                          ["../a", "\u2003"], ["../a", "."]])
    assert [r["status"] for r in rows] == ["empty_caption"] * 4 + ["forbidden"]


def test_nul_bytes(rows_of):
    """NUL bytes in a caption stay in it."""
    _, rows, bad = rows_of(b"url,caption\na,x\0y\nb,z\n")
    assert captions(rows) == ["x\0y", "z"]
    assert bad == []


def test_blank_lines(rows_of):
    """Blank lines are neither rows nor malformed."""
    outcome, rows, bad = rows_of("\n\nurl,caption\n\na,x\n\r\n\nb,y\n\n")
    assert captions(rows) == ["x", "y"]
    assert bad == [] and outcome.result["malformed"] == 0


# ── Headers ───────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("header", ["url,caption,url", "caption,url,caption", " url,url,caption"])
def test_needed_column_twice(rows_of, header):
    """A header with one of the two needed columns twice is refused: which is meant?"""
    outcome, rows, _ = rows_of(f"{header}\na,b,c\n")
    assert outcome.code == 3
    assert "more than one column" in outcome.stderr and rows is None


def test_other_columns_twice(rows_of):
    """Other columns of the same name are kept apart, also from a name that the numbering would give."""
    _, rows, _ = rows_of("note,url,note,caption,note_2,,,note\n1,u,2,c,3,4,5,6\n")
    assert list(rows[0])[:8] == ["note", "url", "note_3", "caption", "note_2", "", "_2", "note_4"]
    assert list(rows[0].values())[:8] == ["1", "u", "2", "c", "3", "4", "5", "6"]


def test_padded_header(rows_of):
    """Spaces around a header's names do not hide the columns."""
    _, rows, _ = rows_of(' url , caption\t," note"\na,b,c\n')
    assert [rows[0][k] for k in ("url", "caption", "note")] == ["a", "b", "c"]


def test_header_is_case_sensitive_and_named(rows_of):
    """A missing column is refused with the config key and the columns that there are."""
    outcome, rows, _ = rows_of("URL,text\na,b\n")
    assert outcome.code == 3 and rows is None
    assert len(outcome.stderr.splitlines()) == 1
    for hint in ("'url'", "url_column", "URL, text"):
        assert hint in outcome.stderr


@pytest.mark.parametrize(("text", "cure"), [("a.png,a star\nb.png,b\n", "set url_column (by number, from 0, where there is no"),
                                            ("url;caption\na.png;a\n", "set the separator")])
def test_missing_column_says_what_to_set(rows_of, text, cure):
    """The line about a missing column names the key to set: the column's, or the separator where there is one column alone."""
    outcome, rows, _ = rows_of(text)
    assert outcome.code == 3 and cure in outcome.stderr and len(outcome.stderr.splitlines()) == 1 and rows is None


def test_other_column_names(rows_of):
    """url_column and caption_column name the columns, which may be one and the same."""
    outcome, rows, _ = rows_of("TEXT,URL\nhello,../x\n", url_column="URL", caption_column="TEXT")
    assert outcome.code == 0 and rows[0]["status"] == "forbidden"
    assert rows_of("x\n../a\n", url_column="x", caption_column="x")[1][0]["status"] == "forbidden"


def test_clashing_columns_are_renamed(rows_of):
    """An input column with a result's name is written as input_<name>, and keeps its cells."""
    _, rows, _ = rows_of("status,url,similarity,caption,input_status,detail\ns,u,0.5,c,i,d\n")
    assert list(rows[0]) == ["input_input_status", "url", "input_similarity", "caption", "input_status", "input_detail",
                             *RESULT_COLUMNS]
    assert list(rows[0].values())[:6] == ["s", "u", "0.5", "c", "i", "d"]
    assert rows[0]["status"] == "missing" and rows[0]["similarity"] == ""


def test_needed_column_that_clashes(rows_of):
    """Even the caption column may have a result's name."""
    _, rows, _ = rows_of("url,detail\n../u,hello\n", caption_column="detail")
    assert rows[0]["input_detail"] == "hello" and rows[0]["status"] == "forbidden"


def test_carriage_return_in_a_header(rows_of):
    """A column name with a lone carriage return can be read back."""
    _, rows, _ = rows_of('url,caption,"odd\rname"\na,b,c\n')
    assert rows[0]["odd\rname"] == "c"


def test_carriage_return_in_a_bad_row(rows_of):
    """A malformed line with a carriage return in it can be read back from bad_rows.csv."""
    _, _, bad = rows_of('url,caption\na,"b\rc",d\n')
    assert bad[0]["text"] == 'a,"b\rc",d'


@pytest.mark.parametrize("line", ["sep=;\n", '"sep=;"\r\n', "\ufeffSEP=;\n"])
def test_line_that_names_the_separator(rows_of, line):
    """A first line `sep=;`, written for Excel, says what separates fields and is no header; `separator` goes before it."""
    _, rows, bad = rows_of(line + "url;caption\na,1;b\nx\n")
    assert captions(rows) == ["b"] and rows[0]["url"] == "a,1" and [cell["line"] for cell in bad] == ["4"]
    assert captions(rows_of(line + "url,caption\na,b;c\n", separator=",")[1]) == ["b;c"]


# ── Encodings, separators ─────────────────────────────────────────────────────────────────────────────────────────────

def test_two_byte_order_marks(rows_of):
    """Programs that add a byte order mark to a file that has one hide no column by it."""
    assert captions(rows_of(b"\xef\xbb\xbf\xef\xbb\xbfurl,caption\na,b\n")[1]) == ["b"]


def test_a_mark_that_nobody_sees(rows_of):
    """A byte order mark within a column's name is shown by its number where that column is missed."""
    outcome = rows_of('"\ufeffurl","caption"\na,b\n')[0]
    assert outcome.code == 3 and r"\ufeffurl, caption" in outcome.stderr


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_said_clearly(rows_of, encoding):
    """A UTF-16 table with a BOM is refused with the word and what to set."""
    bom = "" if encoding == "utf-16" else "\ufeff"
    outcome, rows, _ = rows_of(f"{bom}url,caption\na,b\n".encode(encoding))
    assert outcome.code == 3 and rows is None
    assert "UTF-16" in outcome.stderr and "encoding: utf-16" in outcome.stderr


@pytest.mark.parametrize(("encoding", "bom"), [("utf-16", ""), ("utf-16-le", ""), ("utf-16-le", "\ufeff"),
                                               ("utf-16-be", "\ufeff"), ("utf-32-le", "\ufeff")])
def test_utf16_with_the_key(rows_of, encoding, bom):
    """encoding: utf-16 reads it; where the order of the bytes is named, too, a BOM is no part of the first column's name."""
    _, rows, _ = rows_of(f"{bom}url,caption\na,ß→\n".encode(encoding), encoding=encoding)
    assert captions(rows) == ["ß→"]


def test_broken_utf16(rows_of):
    """A UTF-16 table that ends in half a character is refused, not half read."""
    outcome, rows, _ = rows_of("url,caption\na,b\n".encode("utf-16")[:-1], encoding="utf-16")
    assert outcome.code == 3 and rows is None
    assert "utf-16" in outcome.stderr


def test_latin1_lines_go_to_bad_rows(rows_of):
    """In a UTF-8 table, lines in another encoding go to bad_rows.csv with their numbers; their neighbours stay."""
    _, rows, bad = rows_of(b"url,caption\na,caf\xc3\xa9\nb,caf\xe9\nc,x\n\xffd,y\n")
    assert captions(rows) == ["café", "x"]
    assert [(b["line"], b["reason"]) for b in bad] == [("3", "bytes that are not text"), ("5", "bytes that are not text")]
    assert bad[0]["text"].startswith("b,caf") and bad[0]["text"].isprintable()


@pytest.mark.parametrize(("encoding", "word"), [("latin-1", "café"), ("cp1252", "“naïve” €"), ("shift_jis", "猫の写真"),
                                                ("gb18030", "猫😀"), ("koi8-r", "кошка"), ("utf8", "猫"), ("UTF-8", "猫")])
def test_encoding_key(rows_of, encoding, word):
    """The encoding key reads tables in other encodings; scores.csv is UTF-8 always."""
    _, rows, bad = rows_of(f"url,caption\na,{word}\n".encode(encoding), encoding=encoding)
    assert captions(rows) == [word] and bad == []


@pytest.mark.parametrize("spelling", ["utf-8", "UTF8", "utf8", "utf_8"])
def test_bom_in_every_spelling_of_utf8(rows_of, spelling):
    """However the config spells UTF-8, a BOM is no part of the first column's name."""
    assert captions(rows_of(b"\xef\xbb\xbfurl,caption\na,b\n", encoding=spelling)[1]) == ["b"]


def test_tsv(rows_of):
    """A .tsv file is separated by tabs, and commas are text."""
    _, rows, _ = rows_of("url\tcaption\na,b\tone, two\n", name="table.tsv")
    assert (rows[0]["url"], rows[0]["caption"]) == ("a,b", "one, two")


@pytest.mark.parametrize("separator", [";", "|", "\t", " ", ":"])
def test_separator_key(rows_of, separator):
    """The separator key reads tables with other separators; scores.csv has commas always."""
    _, rows, _ = rows_of(f"url{separator}caption\na,b{separator}c,d\n", separator=separator)
    assert (rows[0]["url"], rows[0]["caption"]) == ("a,b", "c,d")


def test_separator_overrules_the_suffix(rows_of):
    """separator: "," holds for a .tsv file, too."""
    assert captions(rows_of("url,caption\na,b\n", name="table.tsv", separator=",")[1]) == ["b"]


# ── Unreadable inputs ─────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("content", [b"", b"\n\r\n\n", b"\xef\xbb\xbf", b'"url,caption\n', b"url,caption\xff\na,b\n"])
def test_no_header(rows_of, tmp_path, content):
    """A table without a readable header line is refused; nothing is left that a later run could take for its own."""
    outcome, rows, _ = rows_of(content)
    assert outcome.code == 3 and rows is None
    assert "header" in outcome.stderr and len(outcome.stderr.splitlines()) == 1
    assert not (tmp_path / "out/manifest.json").exists()
    assert list((tmp_path / "out").rglob("*.tmp")) == []


@pytest.mark.parametrize("header", ["url,caption", "url,caption\r\n", "status,url,caption\n"])
def test_header_only(rows_of, tmp_path, header):
    """A header without rows is no input: exit 3, one line and no results, as often as it is tried."""
    for _ in range(2):
        outcome, rows, bad = rows_of(header)
        assert outcome.code == 3 and "has no rows" in outcome.stderr and len(outcome.stderr.splitlines()) == 1
        assert rows is None and bad == [] and outcome.stdout == ""


@pytest.mark.parametrize(("content", "name"), [("url,caption\na\nb,c,d\n", "table.csv"), ("url\tcaption\n\n\n", "t.tsv"),
                                               ('{"url": "a"}\n{"caption": 3}\n', "t.jsonl")])
def test_no_rows_but_malformed_ones(rows_of, content, name):
    """A table of which nothing is a row is exit 3; where lines were set aside, the one line says so."""
    outcome, rows, _ = rows_of(content, name)
    assert outcome.code == 3 and rows is None
    assert ("bad_rows.csv" in outcome.stderr) == ("c,d" in content)


def test_missing_file_or_folder(write_config, run_main, tmp_path):
    """A csv_path that is not there, or is a folder, is exit 3 and one line with its name."""
    for path in (tmp_path / "nowhere.csv", tmp_path):
        outcome = run_main("--config", write_config(csv_path=str(path)))
        assert outcome.code == 3
        assert str(path) in outcome.stderr and len(outcome.stderr.splitlines()) == 1
        assert not (tmp_path / "out").exists()


def test_unreadable_file(write_config, write_table, run_main, monkeypatch):
    """A table that may not be read is exit 3, with the system's reason."""
    write_table("url,caption\n")
    config, real = write_config(), pathlib.Path.open

    def refuse(self, *arguments, **options):
        if self.name == "table.csv":
            raise PermissionError(13, "Permission denied")
        return real(self, *arguments, **options)
    monkeypatch.setattr(pathlib.Path, "open", refuse)
    outcome = run_main("--config", config)
    assert outcome.code == 3 and "Permission denied" in outcome.stderr


@pytest.mark.parametrize(("limit", "expected"), [(1, 1), (2, 2), (3, 3), (4, 3), (100, 3)])
def test_limit(rows_of, limit, expected):
    """limit takes the first so many rows; what comes after them is not even judged."""
    outcome, rows, bad = rows_of("url,caption\na,1\nbad\nb,2\nc,3\nworse\n", limit=limit)
    assert captions(rows) == ["1", "2", "3"][:expected]
    assert outcome.result["rows"] == expected
    assert [b["text"] for b in bad] == {1: [], 2: ["bad"], 3: ["bad"]}.get(limit, ["bad", "worse"])


def test_limit_at_the_edge_of_a_chunk(rows_of, monkeypatch):
    """limit holds where it falls on the edge of what is staged at a time."""
    monkeypatch.setattr(script, "STAGE_ROWS", 4)
    text = "url,caption\n" + "".join(f"u,{i}\n" for i in range(20))
    for limit in (3, 4, 5, 8, 19, 20):
        assert captions(rows_of(text, limit=limit)[1]) == [str(i) for i in range(limit)]


# ── Nothing is lost ───────────────────────────────────────────────────────────────────────────────────────────────────

def dry_run(folder, table, **keys):
    """Plan, run and write scores.csv for the bytes of a table; returns (plan, header and rows of scores.csv)."""
    (folder / "pictures").mkdir(exist_ok=True)
    (folder / "table.csv").write_bytes(table)
    config = script.Config(csv_path=str(folder / "table.csv"), image_path=str(folder / "pictures"), pretrained_model="none",
                           output_path=str(folder / "out"), loader_threads=0, **keys)
    plan = script.make_plan(config, fresh=True)
    job = script.Job(config)
    job.plan = plan
    job.work(job.pending())
    with (folder / "out/scores.csv").open("wb") as file:
        script.write_csv(script.Snapshot(plan), file)
    with open(folder / "out/scores.csv", encoding="utf-8", newline="") as file:
        return plan, list(csv.reader(file, strict=True))


def bad_lines(folder):
    with open(folder / "out/bad_rows.csv", encoding="utf-8", newline="") as file:
        return [int(row["line"]) for row in csv.DictReader(file)]


HOSTILE = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.text(st.sampled_from('",\r\n\t\0 ab;é\u2028\x85\x1c'), max_size=8),
    st.sampled_from(["NA", "", " ", "null", '"', '""', "\r", "\n", "=1+1", "\ufeff", "../x", "a" * 300]))
NAMES = st.lists(st.sampled_from(["note", "status", "similarity", "input_status", "detail", "x y", "ä,b", 'q"q', "a\nb", "0",
                                  ""]), max_size=4, unique=True)


@st.composite
def tables(draw):
    """(header, rows of text): the two needed columns among others, in any order."""
    header = draw(st.permutations(["url", "caption", *draw(NAMES)]))
    return header, draw(st.lists(st.lists(HOSTILE, min_size=len(header), max_size=len(header)), max_size=9))


def quoted(rows, end):
    """Rows as a table in which every cell is quoted."""
    return "".join(",".join('"' + cell.replace('"', '""') + '"' for cell in row) + end for row in rows).encode()


@pytest.fixture(scope="module")
def quick_folder():
    """A folder for many small runs, and a disk that need not be waited for."""
    with tempfile.TemporaryDirectory() as folder, mock.patch("os.fsync", lambda descriptor: None):
        yield pathlib.Path(folder)


@pytest.mark.slow
@given(table=tables(), end=st.sampled_from(["\n", "\r\n", "\r"]), partition_rows=st.integers(1, 10),
       chunk=st.integers(1, 5), threads=st.sampled_from([0, 0, 0, 2]))
@settings(max_examples=120, deadline=None)
def test_no_cell_changes(quick_folder, table, end, partition_rows, chunk, threads):
    """Rows come out as they went in: all of them, in order, text unchanged, for any partition and chunk sizes."""
    header, rows = table
    with mock.patch.object(script, "STAGE_ROWS", chunk):
        plan, (names, *out) = dry_run(quick_folder, quoted([header, *rows], end), partition_rows=partition_rows)
    width = len(header)
    assert len(names) == len(set(names)) == width + len(RESULT_COLUMNS)
    assert [row[:width] for row in out] == rows
    assert plan.row_count == len(rows) and plan.manifest["malformed"] == 0
    assert [a.stop for a in plan.partitions[:-1]] == [b.start for b in plan.partitions[1:]]
    counts = [script.read_part_metadata(plan, partition)["rows"] for partition in plan.partitions]
    assert sum(counts) == len(rows) and all(0 < n <= partition_rows for n in counts)
    statuses = [row[-2] for row in out]
    assert set(statuses) <= set(script.STATUSES) - {"ok", "not_tried"}  # there is no picture in the folder


GOOD_LINE = st.sampled_from([b"a,b", b"NA,caf\xc3\xa9", b",", b"x,5\" pipe", b'"x","y, ""z"""', b"u, v ", b"u,\0"])
BAD_LINE = st.sampled_from([b"a", b"a,b,c", b'x,"oops', b'"oops', b"a,\xff", b"\xe9,b", b"  ", b'"a"b,c', b",,,,,,"])
BLANK_LINE = st.just(b"")


@pytest.mark.slow
@given(lines=st.lists(st.one_of(GOOD_LINE, GOOD_LINE, BAD_LINE, BLANK_LINE), max_size=25),
       end=st.sampled_from([b"\n", b"\r\n", b"\r"]), partition_rows=st.integers(1, 12))
@settings(max_examples=120, deadline=None)
def test_every_line_is_a_row_or_malformed(quick_folder, lines, end, partition_rows):
    """Every line but blank ones is a row of scores.csv or a line of bad_rows.csv, there with its physical line number."""
    quotes_open = {b'x,"oops', b'"oops'}
    if quotes_open & set(lines):  # a quoted cell further down would rightly close it
        lines = [line for line in lines if line in quotes_open or b'"' not in line]
    plan, (_, *out) = dry_run(quick_folder, end.join([b"url,caption", *lines, b""]), partition_rows=partition_rows)
    bad = {b"a", b"a,b,c", b'x,"oops', b'"oops', b"a,\xff", b"\xe9,b", b"  ", b'"a"b,c', b",,,,,,"}
    expected = [number for number, line in enumerate(lines, 2) if line in bad]
    good = [line for line in lines if line and line not in bad]
    assert bad_lines(quick_folder) == expected
    assert plan.manifest["malformed"] == len(expected)
    assert len(out) == plan.row_count == len(good)
    assert [row[:2] for row in out] == [next(csv.reader([line.decode()])) for line in good]


@given(data=st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_read(quick_folder, data):
    """Any bytes after a header are rows and bad rows; nothing is raised, and the count of what comes out agrees."""
    plan, (_, *out) = dry_run(quick_folder, b"caption,url\n" + data, partition_rows=4)
    assert len(out) == plan.row_count
    assert len(bad_lines(quick_folder)) == plan.manifest["malformed"]
    assert plan.row_count + plan.manifest["malformed"] <= data.count(b"\n") + data.count(b"\r") + 1
