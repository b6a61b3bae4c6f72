"""Tables, tars, configs and names of strangers: linear time, bounded memory, rows or one line."""
import csv
import io
import itertools
import json
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import image_text_sim_clip as script
from addons.inputs import columnar, json_lines, tars
from addons.inputs.files import InputFile, as_text
from addons.results.formulas import escape_table


@pytest.fixture
def image(tmp_path, picture_bytes):
    """An image a.png in the folder of images; its bytes."""
    (tmp_path / "pictures").mkdir(exist_ok=True)
    data = picture_bytes()
    (tmp_path / "pictures" / "a.png").write_bytes(data)
    return data


def write_tar(path, members, **options):
    """A tar of (name, bytes)."""
    with tarfile.open(path, "w", encoding="utf-8", errors="surrogateescape", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


# ── Long rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_long_rows_are_staged_and_scored_in_short_stretches(image, write_table, score_input, monkeypatch):
    """Rows that are long together begin new row groups and partitions; the results are those of the whole table."""
    rows = [("a.png", f"caption {n} " + ("long " * 1000 if 40 <= n < 60 else "")) for n in range(100)]
    write_table([("url", "caption"), *rows])
    _, whole, _, manifest = score_input("table.csv")
    assert "cuts" not in manifest
    monkeypatch.setattr(script, "STAGE_BYTES", 20_000)
    outcome, found, _, manifest = score_input("table.csv", "--fresh")
    assert outcome.code == 0 and found == whole
    assert len(manifest["cuts"]) >= 5 and all(40 <= cut <= 61 for cut in manifest["cuts"])
    edges = [0, *manifest["cuts"], 100]
    sizes = [sum(len(caption) for _, caption in rows[start:stop]) for start, stop in itertools.pairwise(edges)]
    assert max(sizes) < 30_000


def test_staged_rows_are_found_in_row_groups_of_any_size(tmp_path):
    """A row is found by its number, whatever the sizes of the row groups before it."""
    table = pa.table({"n": [str(n) for n in range(50)]})
    with pq.ParquetWriter(tmp_path / "pairs.parquet", table.schema) as writer:
        for start, stop in ((0, 7), (7, 8), (8, 30), (30, 50)):
            writer.write_table(table.slice(start, stop - start))
    rows = script.StagedRows(tmp_path / "pairs.parquet")
    for start, stop in ((0, 50), (7, 8), (6, 9), (29, 31), (49, 50), (0, 1), (20, 20)):
        assert rows.read(start, stop)["n"].tolist() == [str(n) for n in range(start, stop)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip-base-patch32", "siglip-base", "siglip2-base"])
def test_long_caption_has_the_tokens_of_its_beginning(shelf, name):
    """A caption of a megabyte is read as the model would read it whole, and is told to be cut."""
    scorer = script.Scorer(script.Config(pretrained_model=str(shelf(name)), use_cuda=False))
    words = "a large red circle on grey, "
    captions = [words * 40_000, words * 800, "dog" * 30_000, " " * 30_000 + "a dog", "short"]
    ids, cut = scorer.tokenize(captions)
    family = scorer.family
    expected = family.encode([family.prepare(caption) for caption in captions], truncation=True,
                             max_length=family.context_length)
    assert [ids[n] for n in (0, 1, 3, 4)] == [expected[n] for n in (0, 1, 3, 4)]
    assert cut[:2] == [True, True] and cut[4] is False and len(ids[2]) == len(expected[2])


def test_captions_are_tokenized_some_at_a_time(bundled_model, monkeypatch):
    """However many there are, captions are tokenized a few at a time, in their order and none left out."""
    family = script.Scorer(script.Config(pretrained_model=bundled_model, use_cuda=False)).family
    captions = [f"a photo of {n} circles" for n in range(script.TOKENIZED_AT_ONCE + 1)]
    whole = family.encode(captions)
    counts = []
    encode = family.encode
    monkeypatch.setattr(family, "encode", lambda some, **options: counts.append(len(some)) or encode(some, **options))
    assert family.tokenize(captions) == (whole, [False] * len(captions))
    assert counts == [script.TOKENIZED_AT_ONCE, 1]
    assert family.tokenize([]) == ([], [])


# ── Columns and cells ─────────────────────────────────────────────────────────────────────────────────────────────────

def test_wide_header_is_refused(write_table, score_input):
    """A table of more columns than pairs ever have is one line, whatever its size."""
    write_table([("url", "caption", *(f"c{n}" for n in range(50_000)))])
    outcome, *_ = score_input("table.csv")
    assert outcome.code == 3 and "columns, more than" in outcome.stderr and len(outcome.stderr) < 300


def test_a_key_of_its_own_in_each_row_is_refused(tmp_path, score_input):
    """Rows that together have more keys than a table may have columns are one line."""
    lines = [json.dumps({"url": "a.png", "caption": "c", f"key{n}": n}) for n in range(3000)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    outcome, *_ = score_input("t.jsonl")
    assert outcome.code == 3 and "different keys" in outcome.stderr


def test_one_row_of_too_many_keys_is_malformed(tmp_path, image, score_input):
    """A line with thousands of keys costs itself, and no other line."""
    wide = {"url": "a.png", "caption": "c"} | {f"k{n}": [n] for n in range(5000)}
    lines = [json.dumps({"url": "a.png", "caption": "good"}), json.dumps(wide), json.dumps({"url": "a.png", "caption": "x"})]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    outcome, rows, bad, _ = score_input("t.jsonl")
    assert outcome.code == 0 and len(rows) == 2
    assert bad[0]["reason"].startswith("more than")


def test_nested_values_are_decoded_once(monkeypatch):
    """However many nested values an object has, its text is decoded twice in all; numbers in them stay numbers."""
    calls = []
    loads = json.loads
    monkeypatch.setattr(json_lines.json, "loads", lambda text: calls.append(1) or loads(text))
    cells = json_lines.parse_object(json.dumps({f"k{n}": [n, 0.5, None] for n in range(1000)}))
    assert len(calls) == 1
    assert cells["k7"] == "[7, 0.5, null]"


@pytest.mark.slow
def test_parquet_that_repeats_a_long_value_is_read_in_bounded_memory(tmp_path, image, score_input, monkeypatch):
    """A small file whose dictionary stands for gigabytes is read where its rows fit, and else refused in one line."""
    rows = 2000
    table = pa.table({"url": ["a.png"] * rows, "caption": ["c" * 300_000] * rows})
    pq.write_table(table, tmp_path / "t.parquet", compression="zstd")
    assert (tmp_path / "t.parquet").stat().st_size < 100_000
    monkeypatch.setattr(columnar, "MOST_TEXT_BYTES", 50_000_000)
    outcome, *_ = score_input("t.parquet")
    assert outcome.code == 3 and "set partition_rows lower" in outcome.stderr
    assert len(outcome.stderr.strip().splitlines()) == 1
    csv.field_size_limit(script.MAX_RECORD_CHARS)  # for the reading of scores.csv
    outcome, found, *_ = score_input("t.parquet", "--fresh", partition_rows=100, limit=300)
    assert outcome.code == 0 and len(found) == 300 and len(found[7]["caption"]) == 300_000


@pytest.mark.parametrize(("kind", "told"), [("ms", "1970-01-01"), (("ms", "Nowhere/At_all"), "0")])
def test_odd_cells_in_other_columns_do_not_stop_a_run(tmp_path, image, score_input, kind, told):
    """Dates of no calendar and of no time zone, in a column that does not count, are told as well as can be."""
    when = pa.array([0, 2**62, None], pa.timestamp(*[kind] if isinstance(kind, str) else kind))
    pq.write_table(pa.table({"url": ["a.png"] * 3, "caption": ["a", "b", "c"], "when": when}), tmp_path / "t.parquet")
    outcome, rows, *_ = score_input("t.parquet")
    assert outcome.code == 0, outcome.stderr
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert rows[2]["when"] == "" and rows[0]["when"].startswith(told)


# ── Tars ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

def with_size(path, name, size):
    """The tar with another size in the header of `name`, and its checksum made right."""
    data = bytearray(path.read_bytes())
    at = data.rindex(name.encode() + b"\0")
    data[at + 124:at + 136] = (size & (1 << 96) - 1).to_bytes(12, "big") if size < 0 else b"%011o\0" % size
    data[at + 148:at + 156] = b" " * 8
    data[at + 148:at + 156] = b"%06o\0 " % sum(data[at:at + 512])
    path.write_bytes(bytes(data))
    return path


@pytest.mark.parametrize("size", [-512, -1, -1024, -10**9])
@pytest.mark.parametrize("name", ["0.txt", "1.png"])
def test_tar_that_leads_backwards_ends(tmp_path, image, score_input, size, name):
    """A negative size ends the tar where it stands, instead of having it read again for ever."""
    members = [("0.png", image), ("0.txt", b"good"), ("1.png", image), ("1.txt", b"x")]
    with_size(write_tar(tmp_path / "t.tar", members), name, size)
    outcome, rows, *_ = score_input("t.tar")
    assert outcome.code == 0 and len(rows) == 1
    assert "negative size" in outcome.stderr


@pytest.mark.parametrize("headers", [{"size": "-512"}, {"size": "-1"}, {"size": "x"}, {"GNU.sparse.size": "-5"},
                                     {f"key{n}": "v" * 100 for n in range(20_000)}])
def test_pax_headers_are_bounded(tmp_path, headers):
    """Nor can pax headers lead backwards, or fill the memory; what comes before them is read."""
    with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, pax in (("0.png", {}), ("1.png", headers)):
            info = tarfile.TarInfo(name)
            info.size = 3
            info.pax_headers = pax
            tar.addfile(info, io.BytesIO(b"png"))
    entries = tars.index_tar(InputFile("t.tar", str(tmp_path / "t.tar"))).entries
    assert entries[0].image.name == "0.png" and all(entry.image.size >= 0 for entry in entries)


def test_global_pax_headers_do_not_pile_up(tmp_path):
    """Each member gets a copy of what holds for the whole tar, so that has to be little."""
    with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.PAX_FORMAT,
                      pax_headers={f"key{n}": "v" for n in range(5000)}) as tar:
        tar.addfile(tarfile.TarInfo("0.png"), io.BytesIO(b""))
    entries, flaw, _ = tars.index_tar(InputFile("t.tar", str(tmp_path / "t.tar")))
    assert entries == [] and "pax" in flaw


# ── Names that are no UTF-8 ───────────────────────────────────────────────────────────────────────────────────────────

def test_names_in_other_encodings_are_shown_with_escapes():
    """A byte that is no UTF-8 is shown as its number; text stays as it is."""
    assert as_text("caf\udce9 é.png") == "caf\\xe9 é.png"


def test_key_that_is_no_utf8_is_a_row(tmp_path, image, score_input):
    """A member's name in Latin-1 is a row with its image, and its name can be read."""
    write_tar(tmp_path / "t.tar", [("caf\udce9.png", image), ("caf\udce9.txt", b"a caption")], format=tarfile.USTAR_FORMAT)
    outcome, rows, *_ = score_input("t.tar")
    assert outcome.code == 0 and rows[0]["status"] == "ok"
    assert rows[0]["url"].endswith("caf\\xe9.png")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ".tar"])
def test_table_whose_own_name_is_no_utf8(tmp_path, image, run_main, write_config, suffix):
    """A table of any kind is read, and read again, whatever its name and its output's name are."""
    path = os.fsencode(tmp_path) + b"/t\xe9" + suffix.encode()
    if suffix == ".tar":
        write_tar(os.fsdecode(path), [("0.png", image), ("0.txt", b"c")])
    elif suffix == ".parquet":
        pq.write_table(pa.table({"url": ["a.png"], "caption": ["c"]}), tmp_path / "t.parquet")
        (tmp_path / "t.parquet").rename(os.fsdecode(path))
    else:
        text = "url,caption\na.png,c\n" if suffix == ".csv" else '{"url": "a.png", "caption": "c"}\n'
        with open(path, "w") as file:
            file.write(text)
    arguments = ["--config", write_config(), "--set", "csv_path=" + os.fsdecode(path),
                 "--set", "output_path=" + os.fsdecode(os.fsencode(tmp_path) + b"/o\xe9")]
    for _ in range(2):
        outcome = run_main(*arguments)
        assert outcome.code == 0 and outcome.result["scored"] == 1, outcome.stderr


# ── Configs ───────────────────────────────────────────────────────────────────────────────────────────────────────────

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize("text", [
    BOMB, "limit: 0x" + "f" * 1_000_00, "limit: " + "9" * 200_000, "limit: " + ":".join(["59"] * 20_000),
    "parity_rows: -" + "1" * 5000, "max_failure_rate: 1" + ":00" * 3000 + ".5", "csv_path: &x [*x]",
    "measures: {<<: [{a: 1}, &b {b: 2}], c: *b}", "# " + "x" * 2_000_000])
def test_config_that_grows_when_it_is_read_is_one_line(tmp_path, run_main, text):
    """Aliases, numbers of thousands of digits and files of megabytes are refused, in one line of moderate length."""
    (tmp_path / "c.yaml").write_text(text)
    outcome = run_main("--config", tmp_path / "c.yaml")
    assert outcome.code == 2
    assert len(outcome.stderr.strip().splitlines()) == 1 and len(outcome.stderr) < 1000


def test_bomb_is_one_for_yaml():
    """The text above does grow where aliases are followed."""
    assert len(str(yaml.safe_load(BOMB)["d"])) > 9**4


# ── Formulas ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_header_and_malformed_lines_are_escaped_too(tmp_path, image, write_table, score_input):
    """With escape_formulas no cell of any CSV begins as a formula does, the header's and bad_rows.csv's included."""
    write_table([("url", "caption", "=cmd()", "@x"), ("a.png", "c", "-1", "+1"), ("=too short",)])
    outcome, *_ = score_input("table.csv", escape_formulas=True)
    assert outcome.code == 0
    cells = []
    for path in (tmp_path / "out").glob("*.csv"):
        with path.open(newline="") as file:
            for row in csv.reader(file):
                cells += row
    assert "'=cmd()" in cells and "'=too short" in cells and "'-1" in cells
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]


def test_negative_scores_stay_numbers(tmp_path):
    """A negative number gets a space, which those who read numbers skip; no value stays none, a name is a text."""
    columns = [pa.array(["-x", None]), pa.array([-0.25, None], pa.float32()), pa.array(["y", "z"])]
    table = pa.Table.from_arrays(columns, ["=caption", "similarity", "'=caption"])
    escaped = escape_table(table)
    with (tmp_path / "t.csv").open("wb") as file:
        rows = script.CsvRows(file, escaped.column_names)
        rows.write(escaped)
        rows.close()
    assert (tmp_path / "t.csv").read_text() == "'=caption,similarity,''=caption\n'-x, -0.25,y\n,,z\n"
    import pandas
    assert pandas.read_csv(tmp_path / "t.csv")["similarity"].tolist()[0] == -0.25
