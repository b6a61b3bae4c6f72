"""Inputs that are read where they lie: Parquet and webdataset tars become rows, and what is wrong is said in a line."""
import collections
import csv
import dataclasses
import datetime
import decimal
import fnmatch
import gzip
import io
import itertools
import json
import os
import pickle
import random
import types
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_inputs import write_tar

import image_text_sim_clip as script
from addons import inputs, stores
from addons.inputs import columnar, csv_blocks, files, parquet, tars, text


def pairs(rows):
    return [(row["url"], row["caption"]) for row in rows]


def open_rows(config, **changes):
    """The rows of an input that is read where it lies, described with `changes`."""
    reader = inputs.find_reader(config.csv_path)
    return reader.open(reader.describe(config, None) | changes, config, None)


def assert_refused(outcome, *words):
    assert outcome.code == 3 and len(outcome.stderr.splitlines()) == 1, outcome
    for word in words:
        assert word in outcome.stderr


# ── Parquet ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def write_parquet(path, start=0, rows=10, row_group_size=4, **columns):
    table = pa.table({"url": [f"u{n}" for n in range(start, start + rows)],
                      "caption": [f"caption {n}" for n in range(start, start + rows)], **columns})
    pq.write_table(table, path, row_group_size=row_group_size)


def test_parquet_folder(tmp_path, score_input):
    """A folder of Parquet files is read in the order of their names, never staged; other files there do not matter."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for n, start in (("b", 10), ("a", 0), ("c", 20)):
        write_parquet(folder / f"{n}.parquet", start)
    (folder / "_SUCCESS").touch()
    (folder / "._a.parquet").write_bytes(b"junk")
    outcome, rows, _, manifest = score_input("shards", partition_rows=7)
    assert outcome.code == 0 and pairs(rows) == [(f"u{n}", f"caption {n}") for n in range(30)]
    assert [file["name"] for file in manifest["files"]] == ["a.parquet", "b.parquet", "c.parquet"]
    assert not (tmp_path / "out/pairs.parquet").exists()


def test_parquet_cells_are_text(tmp_path, score_input):
    """Numbers, dates, truth values and dictionaries come through as text, NULL as empty; the rest is said to be left out."""
    write_parquet(tmp_path / "t.parquet", rows=2, i=pa.array([1, None], pa.int64()), f=pa.array([0.1, float("nan")]),
                  f32=pa.array([0.1, None], pa.float32()), b=[True, None], day=[datetime.date(2020, 1, 2), None],
                  at=pa.array([0, None], pa.timestamp("ms")), money=[decimal.Decimal("1.50"), None],
                  word=pa.array(["x", None]).dictionary_encode(), nothing=pa.nulls(2), raw=[b"1", b"2"], deep=[[1], []],
                  large=pa.array(["é", None], pa.large_string()), view=pa.array(["v", None], pa.string_view()))
    outcome, rows, _, manifest = score_input("t.parquet")
    assert [list(row.values())[2:-len(script.Config().result_columns)] for row in rows] == [
        ["1", "0.1", "0.1", "true", "2020-01-02", "1970-01-01 00:00:00.000", "1.50", "x", "", "é", "v"],
        ["", "nan", "", "", "", "", "", "", "", "", ""]]
    assert manifest["left_out"] == ["deep", "raw"] and "deep, raw" in outcome.stderr


def test_uuids_are_passed_through(tmp_path, score_input):
    """A column of UUIDs, the key of many a table, comes through as their text, whatever the row groups."""
    keys = [uuid.UUID(int=number * 2**90 + number) for number in range(7)]
    column = pa.array([key.bytes for key in keys[:-1]] + [None], pa.uuid())
    write_parquet(tmp_path / "t.parquet", rows=7, row_group_size=2, id=column)
    assert [row["id"] for row in score_input("t.parquet")[1]] == [*map(str, keys[:-1]), ""]


@pytest.mark.parametrize("encoding", ["PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
def test_parquet_in_each_encoding_of_text(tmp_path, score_input, monkeypatch, picture, encoding):
    """Text, images and lists are read in the encodings of newer writers, too, of which Arrow makes no dictionaries."""
    monkeypatch.setattr(parquet, "MOST_REPEATED_BYTES", 2000)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    urls = {"text": pa.array([f"a/long/prefix/{n}.png" for n in range(20)]),
            "struct": pa.array([{"bytes": picture, "path": f"{n}.png"} for n in range(20)], image),
            "bytes": pa.array([picture] * 20, pa.binary())}
    leaves = {"text": ["url"], "struct": ["url.bytes", "url.path"], "bytes": ["url"]}
    for kind, cells in urls.items():
        for captions, leaf in ((["c"] * 20, "caption"), ([["c", "d"]] * 20, "caption.list.element")):
            pq.write_table(pa.table({"url": cells, "caption": captions}), tmp_path / "t.parquet", use_dictionary=False,
                           column_encoding=dict.fromkeys([leaf, *leaves[kind]], encoding), row_group_size=7)
            outcome, rows, _, _ = score_input("t.parquet", "--fresh")
            assert outcome.code == 0, outcome.stderr
            expected = ["c", "d"] if leaf != "caption" else ["c"]
            assert [row["caption"] for row in rows] == expected * 20
            assert {row["status"] for row in rows} == {"missing" if kind == "text" else "ok"}


def test_parquet_whose_values_begin_alike(tmp_path, score_input, monkeypatch):
    """Long values of which the file holds little, because each begins as the one before, are one line and fill no memory."""
    monkeypatch.setattr(parquet, "MOST_PREFIXED_BYTES", 1_000_000)
    captions = {"long.parquet": ["c" * 10_000 + str(n) for n in range(1000)], "short.parquet": [f"c{n}" for n in range(1000)]}
    for name, texts in captions.items():
        pq.write_table(pa.table({"url": ["u"] * 1000, "caption": texts}), tmp_path / name, use_dictionary=False,
                       column_encoding={"caption": "DELTA_BYTE_ARRAY"})
    assert score_input("short.parquet")[0].result["rows"] == 1000
    outcome = score_input("long.parquet", "--fresh")[0]
    assert outcome.code == 3 and len(outcome.stderr.splitlines()) == 1 and "over 32 times what the file holds" in outcome.stderr


def test_parquet_files_with_other_columns(tmp_path, score_input):
    """Columns that only some files have are empty in the others; the two that are needed must be in all."""
    write_parquet(tmp_path / "a.parquet", rows=1, one=["1"])
    write_parquet(tmp_path / "b.parquet", rows=1, two=[2])
    _, rows, _, _ = score_input("*.parquet")
    assert [(row["one"], row["two"]) for row in rows] == [("1", ""), ("", "2")]
    pq.write_table(pa.table({"url": ["x"]}), tmp_path / "c.parquet")
    assert_refused(score_input("*.parquet", "--fresh")[0], "'caption'", "c.parquet")


def test_parquet_with_bytes_that_are_no_text(tmp_path, score_input):
    """A string cell that is not UTF-8, which Parquet lets pass, keeps its row; the bytes become U+FFFD."""
    bad = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")])
    pq.write_table(pa.table({"url": ["u", "v"], "caption": bad}), tmp_path / "t.parquet")
    assert [row["caption"] for row in score_input("t.parquet")[1]] == ["a\ufffd", "b"]


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda p: p.write_bytes(b"PAR1 no footer"), ["cannot read"]),
    (lambda p: p.write_bytes(b""), ["cannot read"]),
    (lambda p: p.write_bytes(p.read_bytes()[:-20]), ["cannot read"]),
    (lambda p: pq.write_table(pa.table([["u"], ["v"], ["c"]], ["url", "url", "caption"]), p), ["more than one column 'url'"]),
    (lambda p: pq.write_table(pa.table({"url": ["u"], "caption": [b"c"]}), p), ["'caption' is not text"]),
    (lambda p: pq.write_table(pa.table({"URL": ["u"], "TEXT": ["c"]}), p), ["'url' is not among", "URL, TEXT"])])
def test_parquet_that_cannot_be_used(tmp_path, score_input, spoil, words):
    """A footer with flaws, absent columns, double ones or ones without text are exit 3 and one line with the file's name."""
    path = tmp_path / "t.parquet"
    write_parquet(path)
    spoil(path)
    assert_refused(score_input("t.parquet")[0], "t.parquet", *words)
    assert not (tmp_path / "out/parts").exists()


@pytest.mark.slow
def test_mutated_parquet_is_one_line(tmp_path, score_input):
    """Parquet files with bytes of chance in them are rows or one line and exit 3, never a traceback."""
    rng, codes = random.Random(3), collections.Counter()
    write_parquet(tmp_path / "good.parquet", rows=40, row_group_size=10, n=list(range(40)))
    good = (tmp_path / "good.parquet").read_bytes()
    for _ in range(60):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / "t.parquet").write_bytes(data)
        outcome = score_input("t.parquet", "--fresh")[0]
        assert outcome.code in (0, 3), outcome.stderr
        codes[outcome.code] += 1
    assert codes[3] > 5


@pytest.mark.parametrize(("csv_path", "words"), [
    ("nowhere.parquet", ["nowhere.parquet"]), ("nowhere/*.parquet", ["names no"]), ("empty", ["names no"]),
    ("s/{0..2}.tar", ["2.tar"]), ("s/{5..3}.tar", ["names no"]), ("s/*", [".parquet or .tar"]), ("s/a.tar.gz", ["compressed"]),
    ("s/{0..99999999999}.tar", ["stands for"])])
def test_files_that_are_not_there(tmp_path, score_input, csv_path, words):
    """Files that are absent, of two kinds or compressed are exit 3 and one line."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "s").mkdir()
    for name in ("0.tar", "1.tar", "a.tar.gz", "b.parquet"):
        (tmp_path / "s" / name).touch()
    if csv_path == "s/a.tar.gz":
        csv_path = "s/*.tar.gz"
    assert_refused(score_input(csv_path)[0], *words)


def test_patterns(tmp_path):
    """Numbers in braces keep zeros and order, globs and folders are sorted, names are relative to the folder shared."""
    for name in ("a/08.tar", "a/09.tar", "a/10.tar", "b/08.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(pattern):
        csv_path = str(tmp_path / pattern)
        return [file.name for file in files.list_files(csv_path, inputs.find_reader(csv_path))]
    assert names("a/{08..10}.tar") == ["08.tar", "09.tar", "10.tar"] == names("a") == names("a/*.tar")
    assert names("*/*8.tar") == ["a/08.tar", "b/08.tar"] == names("**/08.tar")
    assert names("a/{8..9}.tar".replace("{8", "{08")) == ["08.tar", "09.tar"]
    assert names("a/{1..1}{0..0}.tar") == ["10.tar"]


@pytest.mark.parametrize("groups", [1, 3, 100])
def test_reading_any_range(tmp_path, groups):
    """Any range of rows is what the whole has there, over files and row groups of any size, empty ones too."""
    for n, rows in enumerate((5, 0, 11, 1)):
        write_parquet(tmp_path / f"{n}.parquet", 100 * n, rows, groups)
    config = script.Config(csv_path=str(tmp_path))
    whole = open_rows(config).read(0, 17)
    reader = pickle.loads(pickle.dumps(open_rows(config)))
    assert reader.read(3, 4)["url"].tolist() == ["u3"]
    reader = pickle.loads(pickle.dumps(reader))  # in the midst of its work, too
    assert list(whole["url"]) == [f"u{100 * n + i}" for n, rows in enumerate((5, 0, 11, 1)) for i in range(rows)]
    for start, stop in itertools.combinations_with_replacement(range(18), 2):
        assert reader.read(start, stop).reset_index(drop=True).equals(whole[start:stop].reset_index(drop=True))


def test_a_row_group_is_decoded_once(tmp_path, monkeypatch):
    """Consecutive partitions within one row group, however many, decode it once."""
    write_parquet(tmp_path / "t.parquet", rows=1000, row_group_size=500)
    config = script.Config(csv_path=str(tmp_path / "t.parquet"))
    reader = open_rows(config)
    decoded, real = [], pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches",
                        lambda self, *a, **o: decoded.extend(o["row_groups"]) or real(self, *a, **o))
    urls = [url for start in range(0, 1000, 50) for url in reader.read(start, start + 50)["url"]]
    assert urls == [f"u{n}" for n in range(1000)]
    assert decoded == [0, 1]


# ── Webdataset tars ───────────────────────────────────────────────────────────────────────────────────────────────────

def sample(key, image, caption, **fields):
    """Three members as img2dataset writes them."""
    fields = {"caption": caption, "url": f"http://x/{key}", "key": key, "status": "success", **fields}
    return [(f"{key}.jpg", image), (f"{key}.txt", caption.encode()), (f"{key}.json", json.dumps(fields).encode())]


@pytest.fixture
def picture(picture_bytes):
    return picture_bytes("JPEG")


def test_tars(tmp_path, score_input, picture):
    """Members of one key are a row, its image is read from the tar, and each tar is a partition."""
    (tmp_path / "s").mkdir()
    for n in range(3):
        members = [m for i in range(n + 1) for m in sample(f"{n:05d}{i:04d}", picture, f"c{n}{i}", width=i)]
        write_tar(tmp_path / f"s/{n:05d}.tar", members)
    for pattern in ("s/{00000..00002}.tar", "s", "s/*.tar"):
        outcome, rows, _, manifest = score_input(pattern, "--fresh", image_path=str(tmp_path / "not there"))
        assert outcome.code == 0 and {row["status"] for row in rows} == {"ok"}
        assert pairs(rows) == [(f"http://x/{n:05d}{i:04d}", f"c{n}{i}") for n in range(3) for i in range(n + 1)]
        assert [row["width"] for row in rows] == ["0", "0", "1", "0", "1", "2"] and rows[0]["input_status"] == "success"
        assert manifest["starts"] == [0, 1, 3] and manifest["kind"] == "tar"
        assert len(list((tmp_path / "out/parts").glob("*.parquet"))) == 3


def test_keys_of_joined_tars(tmp_path, score_input, picture):
    """Where tars were joined whose keys begin at 0, members that come back with another image are that image's; lone ones are
    those of the image that had none."""
    write_tar(tmp_path / "t.tar", [
        ("0.png", picture), ("1.json", b'{"caption": "first 1"}'), ("1.png", picture), ("2.png", picture), ("3.png", picture),
        ("0.json", b'{"caption": "second 0"}'), ("0.png", picture), ("0.txt", b"x"), ("1.png", picture), ("2.txt", b"late 2"),
        ("3.txt", b"second 3"), ("3.png", picture)])
    _, rows, _, _ = score_input("t.tar")
    assert pairs(rows) == [("t.tar/0.png", ""), ("t.tar/1.png", "first 1"), ("t.tar/2.png", "late 2"), ("t.tar/3.png", ""),
                           ("t.tar/0.png", "second 0"), ("t.tar/1.png", ""), ("t.tar/3.png", "second 3")]
    assert [row["status"] for row in rows] == [("ok" if row["caption"] else "empty_caption") for row in rows]


@pytest.mark.parametrize("flag", ["--verify", "--retry-failed"])
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_finished_runs_of_shards(tmp_path, score_input, picture, kind, flag):
    """A finished run on shards verifies, and has nothing to retry where no failure can pass."""
    write_parquet(tmp_path / "t.parquet")
    write_tar(tmp_path / "u.tar", sample("1", picture, "c") + sample("2", b"", "c"))
    name = {"parquet": "t.parquet", "tar": "u.tar"}[kind]
    first = score_input(name, output_format="parquet")[0]
    second = score_input(name, flag, output_format="parquet")[0]
    assert first.code == second.code == 0, second.stderr


def test_scores_do_not_depend_on_where_the_pictures_lie(tmp_path, bundled_model, run_main, write_config, read_table):
    """The bundled model gives each drawing in a tar the score that it has in a folder."""
    shapes = script.pathlib.Path(script.__file__).parent / "challenge_set/shapes"
    with (shapes.parent / "shapes.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))[:6]
    write_tar(tmp_path / "t.tar", [m for n, row in enumerate(table) for m in (
        (f"{n}.png", (shapes / row["url"]).read_bytes()), (f"{n}.json", json.dumps(row).encode()))])
    found = []
    for keys in ({"csv_path": str(shapes.parent / "shapes.csv"), "image_path": str(shapes), "limit": 6},
                 {"csv_path": str(tmp_path / "t.tar")}):
        outcome = run_main("--config", write_config(pretrained_model=bundled_model, **keys), "--fresh")
        assert outcome.code == 0 and outcome.result["scored"] == 6
        found.append([(row["url"], row["caption"], row["similarity"]) for row in read_table(tmp_path / "out/scores.csv")])
    assert found[0] == found[1]


def test_tars_are_cut_where_asked(tmp_path, score_input, picture):
    """With `partition_rows`, partitions begin at each tar and every so many rows within."""
    for n in range(2):
        write_tar(tmp_path / f"{n}.tar", [m for i in range(5) for m in sample(f"{n}{i}", picture, "c")])
    assert len(score_input("{0..1}.tar", partition_rows=2)[1]) == 10
    parts = sorted((tmp_path / "out/parts").glob("*.parquet"))
    assert [pq.read_metadata(part).num_rows for part in parts] == [2, 2, 1, 2, 2, 1]


def test_tar_entries_that_lack_something(tmp_path, score_input, picture):
    """No image is `missing`, no caption `empty_caption`, a broken image `corrupt`; a .txt alone will do, without .json."""
    write_tar(tmp_path / "t.tar", [
        ("d/1.x.jpg", picture), ("d/1.txt", b"c1"), ("2.txt", "\ufeffc2".encode()), ("3.PNG", picture),
        ("4.jpg", b"no picture"), ("4.json", b'{"caption": "c4", "url": null}'),
        ("5.jpg", picture), ("5.json", b"{broken"), ("5.txt", b"c\xff5"),
        ("README", b"x"), ("6.cls", b"1"), ("7.cls", b"1"), ("1.jpg", picture), ("1.txt", b"again"), ("1.jpg", picture[:-40]),
        ("1.txt", b"third")])
    outcome, rows, _, manifest = score_input("t.tar")
    assert [(row["url"], row["caption"], row["status"]) for row in rows] == [
        ("t.tar/d/1.x.jpg", "", "empty_caption"), ("t.tar/d/1", "c1", "missing"),
        ("t.tar/2", "c2", "missing"), ("t.tar/3.PNG", "", "empty_caption"),
        ("t.tar/4.jpg", "c4", "not_image"), ("t.tar/5.jpg", "c\ufffd5", "ok"), ("t.tar/1.jpg", "again", "ok"),
        ("t.tar/1.jpg", "third", "corrupt")]
    assert manifest["left_aside"] == {"files without an ending": {"count": 1, "first": "t.tar/README"},
                                      "files ending in .cls": {"count": 2, "first": "t.tar/6.cls"}}
    assert "2 files ending in .cls (such as t.tar/6.cls)" in outcome.stderr


def test_parquet_beside_a_tar(tmp_path, score_input, picture):
    """Downloads that failed, which img2dataset names only in the Parquet beside the tar, are rows that failed."""
    write_tar(tmp_path / "0.tar", sample("00", picture, "c0") + sample("02", picture, "c2"))
    pq.write_table(pa.table({"url": ["http://x/00", "http://x/01", "http://x/02"], "caption": ["c0", "c1", "c2"],
                             "key": ["00", "01", "02"], "status": ["success", "failed_to_download", "success"]}),
                   tmp_path / "0.parquet")
    _, rows, _, _ = score_input("0.tar")
    assert [(row["url"], row["input_status"], row["status"]) for row in rows] == [
        ("http://x/00", "success", "ok"), ("http://x/02", "success", "ok"), ("http://x/01", "failed_to_download", "missing")]
    assert pairs(score_input(".", "--fresh")[1]) == pairs(rows)
    data = bytearray((tmp_path / "0.parquet").read_bytes())
    for cut in (data[:-9], data[:20] + bytes(60) + data[80:]):
        (tmp_path / "0.parquet").write_bytes(cut)
        assert_refused(score_input("0.tar", "--fresh")[0], "cannot read 0.parquet")


def test_same_url_twice_in_tars(tmp_path, score_input, picture):
    """Two pairs of one URL keep each its own image."""
    write_tar(tmp_path / "a.tar", sample("1", picture, "c", url="u") + sample("2", b"", "c", url="u"))
    write_tar(tmp_path / "b.tar", sample("1", b"junk", "c", url="u") + sample("2", picture, "c", url="u"))
    assert [row["status"] for row in score_input("*.tar")[1]] == ["ok", "not_image", "not_image", "ok"]


@pytest.mark.parametrize("cut", [700, 1500, 5000, 100, 0])
def test_truncated_tar_costs_its_own_rows(tmp_path, score_input, picture, cut):
    """A tar that is cut anywhere keeps the rows before the cut, costs no other tar's, and is named."""
    members = [m for i in range(4) for m in sample(f"{i}", picture, f"c{i}")]
    write_tar(tmp_path / "a.tar", members)
    write_tar(tmp_path / "b.tar", members)
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:cut])
    outcome, rows, _, manifest = score_input("*.tar")
    assert outcome.code == 0 and "a.tar" in outcome.stderr
    assert [row["status"] for row in rows][-4:] == ["ok"] * 4
    assert len(rows) == 4 + manifest["files"][0]["rows"] and manifest["files"][0]["flaw"]
    assert {row["status"] for row in rows[:-4]} <= {"ok", "empty_caption", "corrupt", "missing"}


def test_no_tar_at_all(tmp_path, score_input, monkeypatch):
    """A single file that is no tar, or may not be read, is exit 3; among others it is named and costs its own rows."""
    (tmp_path / "a.tar").write_bytes(gzip.compress(b"no tar"))
    assert_refused(score_input("a.tar")[0], "a.tar cannot be read as a tar: it is compressed (gzip)")
    (tmp_path / "a.tar").write_bytes(b"no tar")
    assert_refused(score_input("a.tar")[0], "a.tar cannot be read as a tar")
    write_tar(tmp_path / "b.tar", [("1.txt", b"x")])
    real = script.pathlib.Path.open

    def refuse(self, *arguments, **options):
        if self.name == "b.tar":
            raise PermissionError(13, "Permission denied")
        return real(self, *arguments, **options)
    monkeypatch.setattr(script.pathlib.Path, "open", refuse)
    assert_refused(score_input("b.tar")[0], "b.tar", "Permission denied")
    monkeypatch.undo()
    outcome, rows, _, _ = score_input("*.tar")
    assert outcome.code == 0 and len(rows) == 1 and "a.tar cannot be read as a tar" in outcome.stderr


def test_cut_between_members_is_noticed(tmp_path):
    """A tar that ends without its end mark, or goes on after a damaged header, is no whole tar."""
    write_tar(tmp_path / "t.tar", [("1.txt", b"x" * 512), ("2.txt", b"y" * 512), ("3.txt", b"z" * 512)])
    whole = (tmp_path / "t.tar").read_bytes()
    tar_file = files.InputFile("t.tar", str(tmp_path / "t.tar"))
    assert tars.index_tar(tar_file).flaw == ""
    for data, count, flaw in ((whole[:2048], 2, "cut off"), (whole[:3072] + bytes(1024) + whole, 3, "no valid header follows"),
                              (whole[:1024] + b"?" * 512 + whole[1536:], 1, "no valid header follows")):
        (tmp_path / "t.tar").write_bytes(data)
        index = tars.index_tar(tar_file)
        assert (len(index.entries), index.flaw) == (count, flaw)


@pytest.mark.slow
def test_mutated_tars_are_rows(tmp_path, score_input, picture):
    """Tars with bytes of chance in them are rows and statuses, or one line and exit 3, never a traceback."""
    rng = random.Random(5)
    write_tar(tmp_path / "good.tar", [m for i in range(5) for m in sample(f"{i}", picture, f"c{i}")])
    good = (tmp_path / "good.tar").read_bytes()
    for _ in range(80):
        data = bytearray(good)
        for _ in range(rng.randint(1, 12)):
            data[rng.choice((rng.randrange(len(data)), rng.randrange(0, 6000)))] = rng.randrange(256)
        (tmp_path / "t.tar").write_bytes(data[:rng.choice((len(data), rng.randrange(len(data))))])
        outcome = score_input("t.tar", "--fresh")[0]
        assert outcome.code == 0 or "cannot be read as a tar" in outcome.stderr, outcome.stderr
        assert outcome.code in (0, 3)


def test_damage_while_running(tmp_path, picture):
    """An image that is grown too large or gone is a row's failure; a tar that is written anew, or of other rows, is Trouble."""
    write_tar(tmp_path / "t.tar", sample("1", picture, "c"))
    config = script.Config(csv_path=str(tmp_path / "t.tar"), max_image_bytes=len(picture))
    reader = open_rows(config)
    (source,) = reader.sources(0, 1)
    assert reader.read_bytes(source) == picture
    reader.max_bytes -= 1
    with pytest.raises(script.RowFailure, match="too_large"):
        reader.read_bytes(source)
    reader.max_bytes += 1
    os.truncate(tmp_path / "t.tar", 600)
    with pytest.raises(script.Trouble, match="changed since"):
        reader.read_bytes(source)
    (tmp_path / "t.tar").unlink()
    with pytest.raises(script.RowFailure, match="corrupt"):
        reader.read_bytes(source)
    write_tar(tmp_path / "t.tar", sample("1", picture, "c") + sample("2", picture, "c"))
    with pytest.raises(script.Trouble, match="changed since"):
        open_rows(config, files=[{"rows": 1}]).read(0, 1)


@pytest.mark.parametrize("kind", ["parquet", "images", "tar"])
def test_input_that_is_replaced_while_running(tmp_path, monkeypatch, score_input, picture, kind):
    """A file that is replaced in the midst of a run by one of as many rows ends it: no row gets another's image or caption."""
    path = tmp_path / ("t.tar" if kind == "tar" else "t.parquet")

    def write(words):
        if kind == "tar":
            members = [sample(f"{n}{words}"[:5], picture, f"{words}{n}") for n in range(6)]
            write_tar(tmp_path / "new", list(itertools.chain.from_iterable(members)))
        else:
            cells = [{"bytes": picture, "path": f"{words}{n}"} for n in range(6)]
            urls = [cell["path"] for cell in cells] if kind == "parquet" else cells
            pq.write_table(pa.table({"url": urls, "caption": [f"{words}{n}" for n in range(6)]}), tmp_path / "new",
                           row_group_size=2)
        (tmp_path / "new").rename(path)
    write("old")
    begun = []
    real = script.PartitionRun.open

    def replace_then_open(plan, partition, retry):
        if partition.index == 1:
            begun.append(partition)
            write("new")
        return real(plan, partition, retry)
    monkeypatch.setattr(script.PartitionRun, "open", replace_then_open)
    outcome = score_input(path.name, partition_rows=2, loader_threads=0)[0]
    assert begun and outcome.code == 3 and len(outcome.stderr.splitlines()) == 1, outcome.stderr


# ── Where files lie, and new kinds ────────────────────────────────────────────────────────────────────────────────────────

class MemoryStore:
    """Files in memory under mem://, as an object store would have them."""

    schemes = ("mem",)

    def __init__(self, contents):
        self.contents = contents

    def info(self, path):
        return stores.FileInfo(len(self.contents[path]), 1) if path in self.contents else None

    def is_folder(self, path):
        return any(name.startswith(path.rstrip("/") + "/") for name in self.contents)

    def list_files(self, folder):
        return [name for name in sorted(self.contents) if name.rpartition("/")[0] == folder.rstrip("/")]

    def glob(self, pattern):
        return [name for name in sorted(self.contents) if fnmatch.fnmatch(name, pattern)]

    def open(self, path):
        return io.BytesIO(self.contents[path])

    def open_native(self, path):
        return pa.PythonFile(self.open(path), "r")


def test_inputs_lie_in_any_store(tmp_path, monkeypatch, picture):
    """Parquet and tars, with what lies next to them, are found and read through the store that the path's scheme names."""
    write_parquet(tmp_path / "a.parquet")
    write_tar(tmp_path / "t.tar", sample("1", picture, "c"))
    pq.write_table(pa.table({"url": ["v"], "caption": ["w"], "key": ["2"]}), tmp_path / "t.parquet")
    store = MemoryStore({"mem://b/x/0/a.parquet": (tmp_path / "a.parquet").read_bytes(),
                         "mem://b/x/1/a.parquet": (tmp_path / "a.parquet").read_bytes(),
                         "mem://b/t/t.tar": (tmp_path / "t.tar").read_bytes(),
                         "mem://b/t/t.parquet": (tmp_path / "t.parquet").read_bytes()})
    monkeypatch.setattr(stores, "room", lambda name: [types.SimpleNamespace(STORE=store)])
    for csv_path in ("mem://b/x/*/a.parquet", "mem://b/x/{0..1}/a.parquet"):
        config = script.Config(csv_path=csv_path)
        manifest = inputs.find_reader(csv_path).describe(config, None)
        assert [file["name"] for file in manifest["files"]] == ["0/a.parquet", "1/a.parquet"]
        assert list(open_rows(config).read(9, 12)["url"]) == ["u9", "u0", "u1"]
    config = script.Config(csv_path="mem://b/t")
    rows = open_rows(config)
    assert list(rows.read(0, 2)["caption"]) == ["c", "w"]
    assert rows.read_bytes(rows.sources(0, 1)[0]) == picture
    with pytest.raises(script.Trouble, match="no such file"):
        inputs.check_there("mem://b/x/{0..2}/a.parquet")


def test_unknown_store_is_one_line(tmp_path, score_input, run_main, write_config):
    """A scheme that no store knows is exit 3 and one line with the scheme."""
    for path in ("s4://bucket/t.parquet", "s4://bucket/t.csv"):
        assert_refused(run_main("--config", write_config(csv_path=path)), "s4://")


def test_a_new_kind_of_blocks(tmp_path, monkeypatch):
    """A reader of files with blocks is a class that opens one: folders, globs, patterns, changes and errors come with it."""
    class ArrowFile(columnar.BlockFile):
        def __init__(self, file):
            self.opened = pa.ipc.open_file(file.open_native())
            self.schema = self.opened.schema
            self.block_rows = [self.opened.get_batch(n).num_rows for n in range(self.opened.num_record_batches)]

        def read_block(self, number, columns):
            return pa.Table.from_batches([self.opened.get_batch(number)]).select(columns)

    class ArrowReader(columnar.BlockReader):
        kind = "arrow"
        suffixes = (".arrow",)

        def open_file(self, file):
            return ArrowFile(file)

    monkeypatch.setattr(inputs, "room", lambda name: [*script.room(name), types.SimpleNamespace(READER=ArrowReader())])
    (tmp_path / "s").mkdir()
    for n in range(3):
        table = pa.table({"url": [f"u{n}{i}" for i in range(5)], "caption": ["c"] * 5, "n": [n] * 5, "raw": [b""] * 5})
        with pa.ipc.new_file(tmp_path / f"s/{n}.arrow", table.schema) as file:
            file.write_table(table, max_chunksize=2)
    for csv_path in ("s", "s/*.arrow", "s/{0..2}.arrow"):
        config = script.Config(csv_path=str(tmp_path / csv_path), limit=12)
        reader = inputs.find_reader(config.csv_path)
        manifest = reader.describe(config, None)
        assert (manifest["kind"], manifest["rows"], manifest["columns"]) == ("arrow", 12, ["url", "caption", "n"])
        found = reader.open(manifest, config, None).read(0, 12)
        assert list(found["url"]) == [f"u{n}{i}" for n in range(3) for i in range(5)][:12] and found["n"][11] == "2"
        assert reader.differences(manifest, config) == []
    touch(tmp_path / "s/1.arrow")
    assert reader.differences(manifest, config) == ["1.arrow has changed"]
    (tmp_path / "s/0.arrow").write_bytes(b"ARROW1 no more")
    with pytest.raises(script.Trouble, match=r"cannot read 0\.arrow"):
        reader.describe(config, None)
    write_parquet(tmp_path / "s/a.parquet")
    with pytest.raises(script.Trouble, match="several kinds"):
        inputs.find_reader(str(tmp_path / "s"))


def test_a_new_kind_of_text(tmp_path, monkeypatch):
    """A reader of text is a class that opens a table; what is staged, counted and compared comes with it."""
    class PipeReader(text.TextReader):
        kind = "psv"
        suffixes = (".psv",)

        def open_table(self, config, known):
            return csv_blocks.open_table(dataclasses.replace(config, separator="|"), known)

    monkeypatch.setattr(inputs, "room", lambda name: [*script.room(name), types.SimpleNamespace(READER=PipeReader())])
    (tmp_path / "t.psv.gz").write_bytes(gzip.compress(b"url|caption\na|b,c\nragged\n"))
    for csv_path in (tmp_path / "t.psv.gz", tmp_path / "*.psv.gz", tmp_path):
        config = script.Config(csv_path=str(csv_path))
        reader = inputs.find_reader(config.csv_path)
        with script.locked(tmp_path / "out"):
            manifest = reader.describe(config, tmp_path / "out")
        assert (manifest["kind"], manifest["rows"], manifest["malformed"]) == ("psv", 1, 1)
        assert reader.open(manifest, config, tmp_path / "out").read(0, 1).to_dict("records") == [{"url": "a", "caption": "b,c"}]
        assert reader.differences(manifest, config) == []
    (tmp_path / "t.psv.gz").write_bytes(gzip.compress(b"url|caption\na|d\n"))
    assert "has changed" in reader.differences(manifest, config)[0]


# ── Resume ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def touch(path):
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize(("change", "words"), [
    (lambda s: write_parquet(s / "a.parquet", 5, 9), ["a.parquet has changed"]),
    (lambda s: (write_parquet(s / "b.parquet", 20), touch(s / "b.parquet")), ["b.parquet has changed"]),
    (lambda s: (s / "b.parquet").unlink(), ["b.parquet is gone"]),
    (lambda s: write_parquet(s / "c.parquet"), ["c.parquet is new"]),
    (lambda s: [write_parquet(s / f"{n}.parquet") for n in range(9)], ["is new", "and 6 more"]),
    (lambda s: write_tar(s / "0.tar", []), ["was parquet, now tar"])])
def test_a_changed_input_is_refused(tmp_path, score_input, change, words):
    """A finished run goes on where nothing changed, and is refused, naming the file, where one changed, came or went."""
    (tmp_path / "s").mkdir()
    write_parquet(tmp_path / "s/a.parquet")
    write_parquet(tmp_path / "s/b.parquet", 10)
    first = score_input("s")
    assert first[0].code == 0
    assert score_input("s")[0].result == first[0].result
    change(tmp_path / "s")
    outcome = score_input("s")[0]
    assert outcome.code == 2 and len(outcome.stderr.splitlines()) == 1
    for word in words:
        assert word in outcome.stderr


def test_an_input_that_is_gone_is_not_another(tmp_path, score_input):
    """Where all files are gone, that is what is said (exit 3): nobody is told to discard the run for it."""
    (tmp_path / "s").mkdir()
    write_parquet(tmp_path / "s/a.parquet")
    assert score_input("s")[0].code == 0
    (tmp_path / "s/a.parquet").unlink()
    outcome = score_input("s")[0]
    assert outcome.code == 3 and "names no" in outcome.stderr and "--fresh" not in outcome.stderr


def test_a_changed_tar_is_refused(tmp_path, score_input, picture):
    """So is a tar that changed, or the Parquet beside it."""
    write_tar(tmp_path / "0.tar", sample("1", picture, "c"))
    assert score_input("0.tar")[0].code == score_input("0.tar")[0].code == 0
    write_parquet(tmp_path / "0.parquet")
    assert score_input("0.tar")[0].code == 2


def test_limit_leaves_later_files_alone(tmp_path, score_input):
    """With `limit`, files behind the last row may change and come."""
    (tmp_path / "s").mkdir()
    for n in range(3):
        write_parquet(tmp_path / f"s/{n}.parquet", n * 10)
    _, rows, _, manifest = score_input("s", limit=12)
    assert len(rows) == 12 and len(manifest["files"]) == 2
    write_parquet(tmp_path / "s/2.parquet", 7, 7)
    assert score_input("s", limit=12)[0].code == 0
    write_parquet(tmp_path / "s/1.parquet", 30)
    assert score_input("s", limit=12)[0].code == 2


def test_a_moved_input_goes_on(tmp_path, score_input):
    """The same files elsewhere, and the same content under another time stamp, are the same input."""
    (tmp_path / "s").mkdir()
    write_parquet(tmp_path / "s/a.parquet")
    assert score_input("s")[0].code == 0
    (tmp_path / "s").rename(tmp_path / "t")
    touch(tmp_path / "t/a.parquet")
    assert score_input("t")[0].code == 0
    write_tar(tmp_path / "t.tar", sample("1", b"", "c"))
    assert score_input("t.tar", "--fresh")[0].code == 0
    touch(tmp_path / "t.tar")
    assert score_input("t.tar")[0].code == 0
    (tmp_path / "t.jsonl").write_text('{"url": "a", "caption": "b"}')
    assert score_input("t.jsonl", "--fresh")[0].code == 0
    touch(tmp_path / "t.jsonl")
    assert score_input("t.jsonl")[0].code == 0
    (tmp_path / "t.jsonl").write_text('{"url": "a", "caption": "c"}')
    outcome = score_input("t.jsonl")[0]
    assert outcome.code == 2 and "has changed" in outcome.stderr


def test_other_kinds_of_the_same_rows(tmp_path, score_input):
    """CSV, TSV.gz, JSON Lines and Parquet of the same pairs give the same scores.csv."""
    rows = [(f"u{n}", f'caption "{n}", ünï\nline') for n in range(25)]
    quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in [("url", "caption"), *rows]]
    (tmp_path / "t.csv").write_text("\n".join(quoted))
    (tmp_path / "t.tsv.gz").write_bytes(gzip.compress("\n".join(quoted).replace('","', '"\t"').encode()))
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"url": url, "caption": text}) + "\n" for url, text in rows))
    pq.write_table(pa.table([[url for url, _ in rows], [text for _, text in rows]], ["url", "caption"]), tmp_path / "t.parquet")
    written = set()
    for name in ("t.csv", "t.tsv.gz", "t.jsonl", "t.parquet"):
        outcome, found, _, _ = score_input(name, "--fresh", partition_rows=10)
        assert outcome.code == 0 and pairs(found) == rows
        written.add((tmp_path / "out/scores.csv").read_bytes())
    assert len(written) == 1
