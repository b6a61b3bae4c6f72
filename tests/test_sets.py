"""Sets of files, folders of them, and files that are compressed: each row and each malformed line keeps its place."""
import bz2
import gzip
import io
import json
import lzma
import os
import zipfile

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from small_inputs import write_tar

from addons import inputs
from addons.inputs import files
from addons.inputs.compression import unpack
from addons.stores import local


def pairs(rows):
    return [(row["url"], row["caption"]) for row in rows]


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(folder, **texts):
    """Files below the folder, "/" in a name as "__"."""
    for name, text in texts.items():
        path = folder / name.replace("__", "/").replace("_csv", ".csv").replace("_jsonl", ".jsonl").replace("_txt", ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize("csv_path", ["d", "d/*.csv", "d/{a,b}.csv", "d/{a,b,a}.csv"])
def test_a_set_of_tables(tmp_path, score_input, csv_path):
    """Files are read in order; bad lines keep the number in their own file; the manifest has each file."""
    write(tmp_path / "d", a_csv="url,caption\nu1,c1\nragged\n", b_csv='caption,url,n\nc2,u2,7\n\n"x\nc3,u3,8\n')
    outcome, rows, bad, manifest = score_input(csv_path)
    assert pairs(rows) == [("u1", "c1"), ("u2", "c2"), ("u3", "c3")] and [row["n"] for row in rows] == ["", "7", "8"]
    assert [(row["file"], row["line"]) for row in bad] == [("a.csv", "3"), ("b.csv", "4")]
    assert [(file["name"], file["rows"]) for file in manifest["files"]] == [("a.csv", 1), ("b.csv", 2)]
    assert (outcome.result["rows"], outcome.result["malformed"]) == (3, 2)
    assert score_input(csv_path)[0].result == outcome.result


def test_limit_in_a_set(tmp_path, score_input):
    """`limit` ends within the file that it falls into; what comes after may change."""
    write(tmp_path / "d", a_csv="url,caption\nu1,c1\nu2,c2\n", b_csv="url,caption\nu3,c3\nbad\n", c_csv="url,caption\nu4,c4\n")
    _, rows, bad, manifest = score_input("d", limit=3)
    assert len(rows) == 3 and not bad and [file["name"] for file in manifest["files"]] == ["a.csv", "b.csv"]
    write(tmp_path / "d", c_csv="url,caption\nelse,c4\n")
    assert score_input("d", limit=3)[0].code == 0
    write(tmp_path / "d", b_csv="url,caption\nu5,c3\nbad\n")
    assert "b.csv has changed" in score_input("d", limit=3)[0].stderr


@pytest.mark.parametrize(("change", "words"), [
    ({"d__b_csv": "url,caption\nu2,c3\n"}, ["b.csv has changed"]), ({"d__c_csv": "url,caption\nu3,c3\n"}, ["c.csv is new"]),
    ({"d__b_csv": None}, ["b.csv is gone"])])
def test_a_changed_set_is_refused(tmp_path, score_input, change, words):
    """A set goes on under new time stamps, and is refused by name where a file changed, came or went."""
    write(tmp_path / "d", a_csv="url,caption\nu1,c1\n", b_csv="url,caption\nu2,c2\n")
    first = score_input("d")[0]
    for name in ("a.csv", "b.csv"):
        os.utime(tmp_path / "d" / name, ns=(1, 1))
    assert score_input("d")[0].result == first.result
    for name, text in change.items():
        if text is None:
            (tmp_path / "d/b.csv").unlink()
        else:
            write(tmp_path, **{name: text})
    outcome = score_input("d")[0]
    assert outcome.code == 2 and len(outcome.stderr.splitlines()) == 1
    assert all(word in outcome.stderr for word in words)


def test_json_lines_with_other_keys_in_each_file(tmp_path, score_input):
    """Keys of all files become columns, wherever they first appear, also behind the first megabyte; so do lists of captions."""
    plain = [{"url": f"u{n}", "caption": "c" * 1000} for n in range(1500)]
    first = {"caption": "c", "url": "u", "other": True}
    last = {"url": "l", "caption": ["m", "n"], "later": None}
    write(tmp_path / "d", a_jsonl=jsonl(*plain, {"url": "x", "caption": "y", "late": 1}), b_jsonl="",
          c_jsonl=jsonl(first, *plain, last))
    _, rows, _, manifest = score_input("d")
    assert manifest["columns"] == ["url", "caption", "other", "late", "later", "caption_index"]
    assert [rows[1500][name] for name in ("url", "late", "other", "caption_index")] == ["x", "1", "", "0"]
    assert [(row["caption"], row["caption_index"]) for row in rows[-2:]] == [("m", "0"), ("n", "1")]
    assert manifest["rows"] == 3004 and manifest["input_rows"] == 3003


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_folders_become_columns(tmp_path, score_input, kind):
    """Folders are read with their subfolders, hidden ones aside; `key=value` in their names become columns."""
    for number, folder in enumerate(["", "lang=en/y=1", "lang=de%20x", "lang=__HIVE_DEFAULT_PARTITION__", "_tmp", ".git"]):
        path = tmp_path / "d" / folder
        path.mkdir(parents=True, exist_ok=True)
        row = {"url": f"u{number}", "caption": "c"} | ({"lang": "own"} if number == 1 else {})
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist([row]), path / "t.parquet")
        elif kind == "jsonl":
            (path / "t.jsonl").write_text(jsonl(row))
        else:
            (path / "t.csv").write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    (tmp_path / "d/README.txt").write_text("notes")
    _, rows, _, manifest = score_input("d")
    assert [(row["url"], row["lang"], row["y"]) for row in rows] == [
        ("u3", "", ""), ("u2", "de x", ""), ("u1", "own", "1"), ("u0", "", "")]
    assert manifest["left_aside"]["hidden folders"]["count"] == 2
    if kind == "csv":
        assert [(row["lang"], row["y"]) for row in score_input("d/*/y=1/*.csv", "--fresh")[1]] == [("own", "1")]


def test_folders_of_tars_become_columns(tmp_path, score_input, picture_bytes):
    """`key=value` in the names of tars' folders become columns, a caption too; a pair's own field goes before them."""
    fields = [b"{}", b'{"lang": "own"}', b'{"lang": ""}', b'{"caption": ["x", "y"]}']
    for number, folder in enumerate(["", "lang=en/y=1", "lang=de%20x/label=a cat", "lang=__HIVE_DEFAULT_PARTITION__"]):
        (tmp_path / "d" / folder).mkdir(parents=True, exist_ok=True)
        members = [(f"{number}.png", picture_bytes()), (f"{number}.json", fields[number]), (f"{number}.txt", b"c")]
        write_tar(tmp_path / "d" / folder / "t.tar", members[:2] if number == 2 else members)
    _, rows, _, manifest = score_input("d")
    assert [(row["caption"], row["lang"], row["y"], row["label"]) for row in rows] == [
        ("x", "", "", ""), ("y", "", "", ""), ("", "de x", "", "a cat"), ("c", "own", "1", ""), ("c", "", "", "")]
    assert manifest["rows"] == 5 and {"lang", "y", "label"} < {*manifest["columns"]}
    rows = score_input("d/lang=de%20x/*/*.tar", "--fresh", caption_column="label")[1]
    assert [(row["label"], row["status"]) for row in rows] == [("a cat", "ok")]


def test_output_inside_the_input(tmp_path, score_input):
    """What a run writes below the folder that it reads is no input of its resumption."""
    write(tmp_path / "d", a_csv="url,caption\nu1,c1\n")
    first = score_input("d", output_path=str(tmp_path / "d/scores"))[0]
    assert first.code == 0 and first.result["rows"] == 1
    again = score_input("d", output_path=str(tmp_path / "d/scores"))[0]
    assert again.result == first.result and (tmp_path / "d/scores/scores.csv").exists()


def test_links_to_folders(tmp_path):
    """Folders that link to each other are read once."""
    write(tmp_path / "d", a__t_csv="url,caption\nu1,c1\n", b__t_csv="url,caption\nu1,c1\n")
    (tmp_path / "d/a/up").symlink_to("..")
    (tmp_path / "d/b/other").symlink_to("../a")
    assert [path.rpartition("/d/")[2] for path in files.expand_path(str(tmp_path / "d"))] == ["a/t.csv", "b/t.csv"]


@pytest.mark.parametrize(("pattern", "paths"), [
    ("x{08..10}", ["x08", "x09", "x10"]), ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]), ("{0..6..3}", ["0", "3", "6"]),
    ("{a..b}", ["{a..b}"]), ("{a}", ["{a}"]), ("a{,.x}", ["a", "a.x"]), ("{}", ["{}"])])
def test_braces(pattern, paths):
    """Numbers, with a step, and words in braces are spelled out as a shell does; other braces stay."""
    assert files.expand_braces(pattern) == paths


def compress(data, suffix, path):
    """The file of that name with the data, compressed as the suffix says."""
    if suffix in (".zst", ".lz4"):
        with pa.CompressedOutputStream(str(path), {".zst": "zstd", ".lz4": "lz4"}[suffix]) as file:
            file.write(data)
    else:
        path.write_bytes({".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, "": bytes}[suffix](data))


SUFFIXES = ["", ".gz", ".bz2", ".xz", ".zst", ".lz4"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl"])
def test_compressed_tables(tmp_path, score_input, suffix, name):
    """Each compression is read by its name, and under the name of a plain table as well."""
    separator = "\t" if name == "t.tsv" else ","
    text = f"url{separator}caption\na{separator}b\n" if name != "t.jsonl" else jsonl({"url": "a", "caption": "b"})
    for shown in (name + suffix, name):
        compress(text.encode(), suffix, tmp_path / shown)
        outcome, rows, _, manifest = score_input(shown, "--fresh")
        assert outcome.code == 0 and pairs(rows) == [("a", "b")], outcome.stderr
        assert manifest["files"][0]["bytes"] == (tmp_path / shown).stat().st_size


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_truncated_compression(tmp_path, score_input, suffix):
    """A compressed table that is cut off is exit 3 and one line with its name."""
    compress(b"url,caption\n" + os.urandom(3000).hex().encode() + b",b\n" * 500, suffix, tmp_path / "t.csv")
    data = (tmp_path / "t.csv").read_bytes()
    (tmp_path / f"t.csv{suffix}").write_bytes(data[:len(data) // 2])
    outcome = score_input(f"t.csv{suffix}")[0]
    assert outcome.code == 3 and len(outcome.stderr.splitlines()) == 1 and f"t.csv{suffix}" in outcome.stderr


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_streams_behind_each_other(tmp_path, score_input, suffix):
    """What is compressed in several streams is read to its end; one that is damaged where it begins is told, and no row behind
    it is lost in silence, as Python's own readers of bzip2 and xz lose it."""
    for number, text in enumerate(("url,caption\na,b\n", "c,d\ne,", "f\n")):
        compress(text.encode(), suffix, tmp_path / str(number))
    first, second, third = ((tmp_path / str(number)).read_bytes() for number in range(3))
    whole = {".bz2": first + bytes(512) + second + third, ".xz": first + bytes(4) + second + third}
    (tmp_path / f"t.csv{suffix}").write_bytes(whole.get(suffix, first + second + third))
    assert pairs(score_input(f"t.csv{suffix}")[1]) == [("a", "b"), ("c", "d"), ("e", "f")]
    for rest in (b"X" + second[1:] + third, second + b"X" + third[1:], second + third[:len(third) // 2]):
        (tmp_path / f"t.csv{suffix}").write_bytes(first + rest)
        outcome = score_input(f"t.csv{suffix}", "--fresh")[0]
        assert outcome.code == 3 and len(outcome.stderr.splitlines()) == 1 and f"t.csv{suffix}" in outcome.stderr


@pytest.mark.parametrize("suffix", [".bz2", ".xz"])
def test_streams_of_any_size(suffix):
    """Pieces of any size are those of the text, however much longer than its file it is."""
    text = os.urandom(300_000) + bytes(5_000_000) + os.urandom(1000)
    packed = {".bz2": bz2.compress, ".xz": lzma.compress}[suffix]
    data = io.BytesIO(packed(text[:400_000]) + packed(b"") + packed(text[400_000:]))
    stream = unpack(data, {".bz2": "bz2", ".xz": "xz"}[suffix])
    pieces = []
    while piece := stream.read(70_000):
        assert len(piece) <= 70_000
        pieces.append(piece)
    assert b"".join(pieces) == text and stream.read(10) == b""


def test_files_that_are_no_text(tmp_path, score_input):
    """Archives and binary tables under any name of a text are told for what they are, in one line and exit 3."""
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.writestr("pairs.csv", "url,caption\na,b\n")
    pq.write_table(pa.table({"url": ["a"], "caption": ["b"]}), tmp_path / "p.parquet")
    pyarrow.feather.write_feather(pa.table({"url": ["a"], "caption": ["b"]}), tmp_path / "t.feather")
    (tmp_path / "t.csv").write_bytes((tmp_path / "p.parquet").read_bytes())
    (tmp_path / "t.xlsx").write_bytes((tmp_path / "t.zip").read_bytes())
    for name, word in (("t.zip", "zip archive"), ("t.csv", "Parquet"), ("t.xlsx", "Excel"), ("t.feather", "Feather")):
        outcome = score_input(name, "--fresh")[0]
        assert outcome.code == 3 and len(outcome.stderr.splitlines()) == 1 and word in outcome.stderr, outcome.stderr


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet", "u.tar", "d"])
def test_pointers_of_git_lfs(tmp_path, score_input, name):
    """What Git LFS leaves in place of a file that was not fetched is told as that, whatever kind it stands for."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    (tmp_path / "d").mkdir()
    for path in ("d/a.parquet", "d/b.parquet", "t.csv", "t.jsonl", "t.parquet", "u.tar"):
        (tmp_path / path).write_bytes(pointer)
    outcome = score_input(name)[0]
    assert outcome.code == 3 and len(outcome.stderr.splitlines()) == 1 and "git lfs pull" in outcome.stderr


def test_archives_called_parquet(tmp_path, score_input):
    """A zip under the name of a Parquet file is told as one; a Parquet file that is cut off is still told as damaged."""
    (tmp_path / "z.parquet").write_bytes(b"PK\x03\x04" + bytes(50))
    assert "zip archive" in score_input("z.parquet")[0].stderr
    pq.write_table(pa.table({"url": ["a"], "caption": ["b"]}), tmp_path / "p.parquet")
    (tmp_path / "p.parquet").write_bytes((tmp_path / "p.parquet").read_bytes()[:-9])
    outcome = score_input("p.parquet")[0]
    assert outcome.code == 3 and "cannot read p.parquet" in outcome.stderr


def test_table_from_a_pipe(tmp_path, score_input):
    """A pipe, such as the shell's <(...), is told as one: no such file would be untrue."""
    os.mkfifo(tmp_path / "t.csv")
    outcome = score_input("t.csv")[0]
    assert outcome.code == 3 and len(outcome.stderr.splitlines()) == 1 and "is a pipe" in outcome.stderr


def test_output_of_a_run_as_input(tmp_path, score_input):
    """The folder that a run has written holds its rows several times over, so it is refused; a file in it is a table."""
    (tmp_path / "t.csv").write_text("url,caption\na,b\n")
    assert score_input("t.csv")[0].code == 0
    outcome = score_input("out", output_path=str(tmp_path / "again"))[0]
    assert outcome.code == 3 and len(outcome.stderr.splitlines()) == 1 and "scores.csv" in outcome.stderr
    assert score_input("out/scores.csv", output_path=str(tmp_path / "again"))[0].result["rows"] == 1


def test_columns_that_change_type_between_files(tmp_path, score_input):
    """Parquet files whose columns differ, in type or at all, are one table of text."""
    (tmp_path / "d").mkdir()
    pq.write_table(pa.table({"url": ["a"], "caption": ["b"], "n": [1]}), tmp_path / "d/0.parquet")
    pq.write_table(pa.table({"caption": ["c"], "url": ["d"], "n": ["x"], "m": [0.5]}), tmp_path / "d/1.parquet")
    pq.write_table(pa.table({"caption": [["e", "f"]], "url": [b"no image"], "n": [[1]]}), tmp_path / "d/2.parquet")
    outcome, rows, _, _ = score_input("d")
    assert outcome.code == 0, outcome.stderr
    assert [(row["caption"], row["n"], row["m"]) for row in rows] == [
        ("b", "1", ""), ("c", "x", "0.5"), ("e", "", ""), ("f", "", "")]
    (tmp_path / "d/3.parquet").write_bytes(b"no parquet")
    outcome = score_input("d", "--fresh")[0]
    assert outcome.code == 3 and "3.parquet" in outcome.stderr.splitlines()[-1]


def test_a_file_of_a_set_without_the_columns(tmp_path, score_input):
    """A file of a set that lacks a column that counts is exit 3 and named."""
    write(tmp_path / "d", a_csv="url,caption\nu1,c1\n", b_csv="url,text\nu1,c1\n")
    outcome = score_input("d")[0]
    assert outcome.code == 3 and "b.csv has no column 'caption'" in outcome.stderr and len(outcome.stderr.splitlines()) == 1


def test_several_kinds_of_tables(tmp_path):
    """A folder with tables of several kinds is refused by name; a .txt is a note where there are others."""
    write(tmp_path / "d", a_csv="url,caption\nu1,c1\n", note_txt="x")
    assert inputs.find_reader(str(tmp_path / "d")).kind == "csv"
    assert [file.name for file in files.list_files(str(tmp_path / "d"), inputs.find_reader(str(tmp_path / "d")))] == ["a.csv"]
    write(tmp_path / "d", b_jsonl="")
    with pytest.raises(files.Trouble, match="several kinds"):
        inputs.find_reader(str(tmp_path / "d"))


@pytest.mark.parametrize("csv_path", ["d", "./d", "././d//", "d/../d"])
def test_names_do_not_depend_on_how_the_folder_is_spelled(tmp_path, score_input, csv_path):
    """What lies in a folder is named from there, on the screen and in the manifest, however csv_path spells it."""
    write(tmp_path / "d", aa__t_csv="url,caption\nu1,c1\n", ba__t_csv="url,caption\nu2,c2\nragged\n", notes_txt="x")
    _, rows, bad, manifest = score_input(csv_path)
    assert len(rows) == 2 and [row["file"] for row in bad] == ["ba/t.csv"]
    assert manifest["left_aside"] == {"files ending in .txt": {"count": 1, "first": "notes.txt"}}
    assert [file["name"] for file in manifest["files"]] == ["aa/t.csv", "ba/t.csv"]


@pytest.mark.parametrize("csv_path", ["d", "d/*", "d/t.csv{,.gz}"])
def test_a_table_that_is_there_compressed_too(tmp_path, score_input, csv_path):
    """A table next to its compressed self is told, because its rows would be scored twice."""
    write(tmp_path / "d", t_csv="url,caption\nu1,c1\n")
    (tmp_path / "d/t.csv.gz").write_bytes(gzip.compress((tmp_path / "d/t.csv").read_bytes()))
    outcome = score_input(csv_path)[0]
    assert outcome.code == 3 and "t.csv and t.csv.gz are one table, compressed and not" in outcome.stderr
    assert [row["url"] for row in score_input("d/t.csv")[1]] == ["u1"]


@pytest.mark.parametrize("log", ["_delta_log", ".hoodie"])
def test_tables_that_are_told_by_a_log(tmp_path, score_input, log):
    """A folder whose log tells which files count is refused: files that were replaced lie there, too; a pattern reads all."""
    (tmp_path / "d" / log).mkdir(parents=True)
    for number in range(2):
        pq.write_table(pa.table({"url": ["u"], "caption": [f"c{number}"]}), tmp_path / f"d/{number}.parquet")
    outcome = score_input("d")[0]
    assert outcome.code == 3 and len(outcome.stderr.splitlines()) == 1 and f"{log}/ alone tells" in outcome.stderr
    assert len(score_input("d/*.parquet")[1]) == 2


def test_what_datasets_saves(tmp_path, score_input):
    """What `save_to_disk` writes is told as what it is; the notes that `datasets` lays next to tables are no tables."""
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"url": ["u1"], "caption": ["c1"]})
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "saved")
    for csv_path in ("saved", "saved/train", "saved/train/*.arrow"):
        outcome = score_input(csv_path)[0]
        assert outcome.code == 3 and len(outcome.stderr.splitlines()) == 1 and ".arrow" in outcome.stderr
    assert "load_from_disk" in score_input("saved")[0].stderr
    write(tmp_path / "d", t_jsonl=jsonl({"url": "u1", "caption": "c1"}))
    (tmp_path / "d/dataset_infos.json").write_text('{\n"default": {}}')
    _, rows, _, manifest = score_input("d")
    assert [row["url"] for row in rows] == ["u1"] and manifest["left_aside"]["files ending in .json"]["count"] == 1


@pytest.mark.parametrize(("suffix", "codec"), [(".zst", "zstd"), (".lz4", "lz4")])
def test_frames_that_are_skipped(tmp_path, score_input, suffix, codec):
    """What pzstd and others put between compressed stretches is skipped, also at the beginning of the file."""
    skipped = b"\x50\x2a\x4d\x18\x04\0\0\0size"
    stretches = [pa.compress(text, codec, asbytes=True) for text in (b"url,caption\n", b"u1,c1\n")]
    (tmp_path / f"t.csv{suffix}").write_bytes(skipped + skipped.join(stretches))
    assert pairs(score_input(f"t.csv{suffix}")[1]) == [("u1", "c1")]


def test_folders_that_may_not_be_entered(tmp_path, score_input, monkeypatch):
    """A subfolder that may not be read is one line that names it, since its rows would be missing; lost+found is left aside."""
    write(tmp_path / "d", a__t_csv="url,caption\nu1,c1\n")
    for name in ("b", "lost+found"):
        (tmp_path / "d" / name).mkdir()
    real = local.LocalStore.list_files

    def list_or_refuse(self, folder):
        if folder.endswith(("/b", "/lost+found")):
            raise PermissionError(13, "Permission denied", folder)
        return real(self, folder)
    monkeypatch.setattr(local.LocalStore, "list_files", list_or_refuse)
    outcome = score_input("d")[0]
    assert outcome.code == 3 and outcome.stderr.endswith("/d/b: Permission denied\n"), outcome.stderr
    (tmp_path / "d/b").rmdir()
    _, rows, _, manifest = score_input("d")
    assert len(rows) == 1 and manifest["left_aside"]["hidden folders"]["first"] == "lost+found/"


def test_a_file_in_a_folder_that_may_not_be_entered(tmp_path, score_input, monkeypatch):
    """A file that cannot even be looked for is told as one that may not be read, not as one that is not there."""
    real = os.stat

    def refuse(path, **options):
        if "locked" in str(path):
            raise PermissionError(13, "Permission denied")
        return real(path, **options)
    monkeypatch.setattr(os, "stat", refuse)
    outcome = score_input("locked/t.csv")[0]
    assert outcome.code == 3 and outcome.stderr.endswith("locked/t.csv: Permission denied\n"), outcome.stderr


@pytest.mark.parametrize(("name", "data"), [
    ("b.csv", b""), ("b.csv", b"\r\n \n"), ("b.csv", b"\xef\xbb\xbf"), ("b.csv.gz", gzip.compress(b"", mtime=0)),
    ("b.csv.bz2", bz2.compress(b"\n")), ("b.jsonl", b""), ("b.jsonl.gz", gzip.compress(b"", mtime=0)), ("b.json", b"[\n]\n"),
    ("b.json.xz", lzma.compress(b"[]"))])
def test_shards_that_hold_nothing(tmp_path, score_input, name, data):
    """A file of a set that holds nothing, compressed or not, has no rows, and does not keep the run from going on."""
    kind = name.split(".")[1]
    write(tmp_path / "d", a_csv="url,caption\nu1,c1\n" if kind == "csv" else jsonl({"url": "u1", "caption": "c1"}))
    (tmp_path / "d/a.csv").rename(tmp_path / f"d/a.{kind}")
    (tmp_path / "d" / name).write_bytes(data)
    first = score_input("d")[0]
    assert first.code == 0 and first.result["rows"] == 1 and score_input("d")[0].result == first.result
    (tmp_path / "d" / f"c.{kind}").write_bytes((tmp_path / f"d/a.{kind}").read_bytes())
    assert f"c.{kind} is new" in score_input("d")[0].stderr


def test_small_files_in_the_encoding_of_the_config(tmp_path, score_input):
    """Whether a small file of a set is empty is seen in the encoding of the config."""
    (tmp_path / "d").mkdir()
    for number, rows in enumerate([[{"url": "u1", "caption": "é"}], []]):
        (tmp_path / f"d/{number}.json").write_bytes(json.dumps(rows, ensure_ascii=False).encode("utf-16"))
    assert pairs(score_input("d", encoding="utf-16")[1]) == [("u1", "é")]
