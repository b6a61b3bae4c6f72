"""Folders of images with their captions: files of the same name, or metadata files, straight from csv_path."""
import json
import os
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_inputs import write_tar

import image_text_sim_clip as script
from addons import inputs


@pytest.fixture
def folder(tmp_path, picture_bytes):
    """Write files into the folder `f`: an image for each name of one, else the text."""
    def write(**files):
        for name, content in files.items():
            path = tmp_path / "f" / name.replace("__", "/").replace("_DOT_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture_bytes(colour=len(name)) if content is None else content.encode())
        return tmp_path / "f"
    return write


def test_images_with_texts(tmp_path, folder, score_input):
    """A .txt, .caption or .json next to an image is its caption; all in folders below; what is no pair's is counted."""
    folder(**{"a_DOT_png": None, "a_DOT_txt": "an a\n", "d__b_DOT_JPG": None,
              "d__b_DOT_json": '{"caption": ["x", "y"], "n": 5}', "c_DOT_v2_DOT_webp": None,
              "c_DOT_v2_DOT_caption": "a c", "alone_DOT_png": None, "notes_DOT_txt": "x",
              "_DOT_hidden_DOT_png": None, "lang=en__e_DOT_png": None, "lang=en__e_DOT_txt": "\ufeffan e",
              "list_DOT_csv": "url,caption\nu,c\n", "broken_DOT_png": "no image", "broken_DOT_json": "{",
              "broken_DOT_txt": "t"})
    outcome, rows, bad, manifest = score_input("f", image_path="nowhere at all")
    assert [(row["url"], row["caption"], row["caption_index"], row["n"], row["lang"], row["status"]) for row in rows] == [
        ("a.png", "an a", "0", "", "", "ok"), ("alone.png", "", "0", "", "", "empty_caption"),
        ("broken.png", "t", "0", "", "", "not_image"), ("c.v2.webp", "a c", "0", "", "", "ok"),
        ("d/b.JPG", "x", "0", "5", "", "ok"), ("d/b.JPG", "y", "1", "5", "", "ok"),
        ("lang=en/e.png", "an e", "0", "", "en", "ok")]
    assert bad == [] and manifest["kind"] == "images" and manifest["input_rows"] == 6
    assert {kind: entry["first"] for kind, entry in manifest["left_aside"].items()} == {
        "files ending in .csv": "list.csv", "files ending in .txt": "notes.txt", "hidden files": ".hidden.png"}
    assert score_input("f", image_path="nowhere at all")[0].result == outcome.result
    glob_rows = score_input("f/*.png", "--fresh")[1]
    assert [(row["url"], row["caption"]) for row in glob_rows] == [("a.png", "an a"), ("alone.png", ""), ("broken.png", "t")]


def write_parquet(path, rows, **columns):
    """A Parquet file of rows given as dictionaries, or of columns."""
    pq.write_table(pa.Table.from_pylist(rows) if rows else pa.table(columns), path)


def test_metadata_in_parquet(tmp_path, folder, score_input):
    """metadata.parquet is read as its kin of text: its own url is set aside, lists give rows, numbers keep their type."""
    folder(**{f"{name}_DOT_png": None for name in ("train__0", "train__1", "train__2", "test__0")})
    write_parquet(tmp_path / "f/train/metadata.parquet", [
        {"file_name": "0.png", "text": ["a", "b"], "n": 1, "url": "http://x/0", "box": [[1]]},
        {"file_name": "1.png", "text": [], "n": None, "url": None, "box": None},
        {"file_name": "./9.png", "text": ["c"], "n": 3, "url": "", "box": []}])
    folder(test__metadata_DOT_jsonl='{"file_name": "0.png", "text": "t", "n": 4}\n')
    outcome, rows, bad, manifest = score_input("f", caption_column="text", image_path="nowhere")
    assert [(row["url"], row["text"], row["caption_index"], row["n"], row["input_url"], row["status"]) for row in rows] == [
        ("test/0.png", "t", "0", "4", "", "ok"), ("train/0.png", "a", "0", "1", "http://x/0", "ok"),
        ("train/0.png", "b", "1", "1", "http://x/0", "ok"), ("train/1.png", "", "0", "", "", "empty_caption"),
        ("train/./9.png", "c", "0", "3", "", "missing")]
    assert bad == [] and manifest["input_rows"] == 4 and manifest["types"] == {"n": "int", "caption_index": "int"}
    assert outcome.stderr.count("left out: box") == 1
    assert score_input("f", caption_column="text", image_path="nowhere")[0].result == outcome.result
    write_parquet(tmp_path / "f/train/metadata.parquet", [{"file_name": "0.png", "text": ["a", "B"]}])
    changed = score_input("f", caption_column="text", image_path="nowhere")[0]
    assert changed.code == 2 and "train/metadata.parquet has changed" in changed.stderr


@pytest.mark.parametrize(("columns", "says"), [
    ({"text": ["c"]}, "'file_name' is not among the columns"), ({"file_name": ["0.png"]}, "'text' is not among the columns"),
    ({"file_name": [b"x"], "text": ["c"]}, "'file_name' is not text"), (None, "metadata.parquet")])
def test_metadata_in_parquet_that_cannot_be_read(tmp_path, folder, score_input, columns, says):
    """A metadata.parquet without the columns, with images in place of names, or damaged, is one line and exit 3."""
    folder(**{"0_DOT_png": None})
    if columns:
        write_parquet(tmp_path / "f/metadata.parquet", None, **columns)
    else:
        (tmp_path / "f/metadata.parquet").write_bytes(b"PAR1 and no more")
    outcome = score_input("f", caption_column="text")[0]
    assert outcome.code == 3 and says in outcome.stderr and len(outcome.stderr.splitlines()) == 1


def test_two_metadata_files_of_the_same_images(folder, score_input):
    """Metadata files of two kinds in one folder would give each image twice: exit 3 and one line with both names."""
    folder(train__0_DOT_png=None, train__metadata_DOT_csv="file_name,caption\n0.png,c\n",
           train__metadata_DOT_jsonl='{"file_name": "0.png", "caption": "c"}\n')
    outcome = score_input("f")[0]
    assert outcome.code == 3 and len(outcome.stderr.splitlines()) == 1
    assert "train/metadata.csv and train/metadata.jsonl are both metadata" in outcome.stderr


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_images_that_no_metadata_names(tmp_path, folder, score_input, ending):
    """Images that no row names are counted in one line and in the manifest, however the others are spelt."""
    names = ["0.png", "a b.png", "caf\u0065\u0301.png", "d/1.png", "d/2.png", "3.png"]
    folder(**{name.replace("/", "__").replace(".", "_DOT_"): None for name in names})
    named = ["./0.png", "a%20b.png", "caf\u00e9.png", "d\\1.png", "0.png"]
    if ending == "parquet":
        write_parquet(tmp_path / "f/metadata.parquet", [{"file_name": name, "text": "c"} for name in named])
    elif ending == "csv":
        folder(metadata_DOT_csv="file_name,text\n" + "".join(f"{name},c\n" for name in named))
    else:
        folder(metadata_DOT_jsonl="".join(json.dumps({"file_name": name, "text": "c"}) + "\n" for name in named))
    outcome, rows, _, manifest = score_input("f", caption_column="text")
    assert [row["status"] for row in rows] == ["ok"] * 5
    assert manifest["left_aside"] == {"images that no row of a metadata file names": {"count": 2, "first": "3.png"}}
    assert "2 images that no row of a metadata file names (such as 3.png)" in outcome.stderr
    assert "left_aside" not in score_input("f", "--fresh", caption_column="text", limit=1)[3]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_imagefolders(tmp_path, folder, score_input, name):
    """An imagefolder's metadata files are the table; file_name counts from the folder that the file lies in."""
    def metadata(rows):
        if name.endswith("csv"):
            return "file_name,text,url\n" + "".join(f"{file},{text},http://x/{file}\n" for file, text in rows) + "ragged\n"
        lines = [json.dumps({"file_name": file, "text": text, "url": f"http://x/{file}"}) for file, text in rows]
        return "\n".join([*lines, "{\n"])
    shown = name.replace(".", "_DOT_")
    folder(**{"train__0_DOT_png": None, "train__1_DOT_png": None, "test__a__0_DOT_png": None, "0_DOT_png": None,
              f"train__{shown}": metadata([("0.png", "c0"), ("1.png", "c1"), ("9.png", "c9"), ("../../secret.png", "s")]),
              f"test__{shown}": metadata([("a/0.png", "t0")])})
    (tmp_path / "secret.png").write_bytes((tmp_path / "f/0.png").read_bytes())
    _, rows, bad, _ = score_input("f", caption_column="text", image_path="nowhere")
    assert [(row["url"], row["text"], row["input_url"], row["status"]) for row in rows] == [
        ("test/a/0.png", "t0", "http://x/a/0.png", "ok"), ("train/0.png", "c0", "http://x/0.png", "ok"),
        ("train/1.png", "c1", "http://x/1.png", "ok"), ("train/9.png", "c9", "http://x/9.png", "missing"),
        ("train/../../secret.png", "s", "http://x/../../secret.png", "forbidden")]
    assert [row["file"] for row in bad] == [f"test/{name}", f"train/{name}"]
    by_name = score_input("f", "--fresh", caption_column="text", url_column="file_name")[1]
    assert [row["file_name"] for row in by_name] == [row["url"] for row in rows]


@pytest.mark.parametrize("change", ["text", "image", "gone"])
def test_a_changed_folder_is_refused(tmp_path, folder, score_input, change):
    """A folder of pairs goes on under new time stamps, and is refused where a text or an image came, went or changed."""
    path = folder(a_DOT_png=None, a_DOT_txt="an a", b_DOT_png=None, b_DOT_txt="a b")
    first = score_input("f")[0]
    assert first.code == 0
    for name in ("a.png", "a.txt"):
        os.utime(path / name, ns=(1, 1))
    assert score_input("f")[0].result == first.result
    if change == "text":
        (path / "a.txt").write_text("an A")
    elif change == "image":
        folder(c_DOT_png=None)
    else:
        (path / "b.png").unlink()
    outcome = score_input("f")[0]
    assert outcome.code == 2 and len(outcome.stderr.splitlines()) == 1 and "in f are others" in outcome.stderr


def test_images_beside_other_tables(tmp_path, folder):
    """Images without captions next to them make no folder of pairs: the table that lies there is the input."""
    folder(a_DOT_png=None, pairs_DOT_csv="url,caption\na.png,c\n", notes_DOT_txt="x")
    assert inputs.find_reader(str(tmp_path / "f")).kind == "csv"
    folder(a_DOT_txt="c")
    assert inputs.find_reader(str(tmp_path / "f")).kind == "images"


def test_images_without_any_caption(folder, score_input):
    """A folder of images alone is told as that."""
    folder(a_DOT_png=None, README_DOT_md="x")
    outcome = score_input("f")[0]
    assert outcome.code == 3 and len(outcome.stderr.splitlines()) == 1 and "images without captions" in outcome.stderr


@pytest.mark.parametrize("table", [{"metadata_DOT_csv": "image,caption\na.png,c\n"},
                                   {"metadata_DOT_jsonl": '{"image": "a.png", "caption": "c"}\n'}])
def test_metadata_with_another_column_of_names(folder, score_input, table):
    """Metadata that name their images otherwise than in `file_name` are refused with the way to read them."""
    folder(a_DOT_png=None, **table)
    outcome = score_input("f", url_column="image")[0]
    assert outcome.code == 3 and len(outcome.stderr.splitlines()) == 1
    assert "'file_name'" in outcome.stderr and "image_path" in outcome.stderr


def test_scores_of_a_folder_are_those_of_a_table(tmp_path, run_main, write_config, read_table, bundled_model):
    """Images with a .txt next to them get the scores that a table of them gives."""
    shapes = script.ADDONS.parent / "challenge_set/shapes"
    (tmp_path / "f").mkdir()
    for number in range(20):
        (tmp_path / f"f/{number:02d}.png").write_bytes((shapes / f"shape-{number:03d}.png").read_bytes())
        (tmp_path / f"f/{number:02d}.txt").write_text(f"a red star {number}\n")
    table = "url,caption\n" + "".join(f"{number:02d}.png,a red star {number}\n" for number in range(20))
    (tmp_path / "t.csv").write_text(table)
    found = []
    for name in ("f", "t.csv"):
        config = write_config(csv_path=str(tmp_path / name), image_path=str(tmp_path / "f"), pretrained_model=bundled_model,
                              parity_rows=0, output_path=str(tmp_path / "out" / name))
        assert run_main("--config", config).code == 0
        found.append((tmp_path / "out" / name / "scores.csv").read_bytes())
    assert found[0] == found[1]


def test_texts_in_other_encodings(tmp_path, folder, score_input, picture_bytes):
    """Texts with the mark of UTF-16 are read so, others by `encoding`, in a folder as in a tar; flawed ones are counted."""
    texts = {"a.txt": "é".encode("utf-16"), "b.txt": "é".encode("latin-1"), "c.txt": "é\r\n".encode(),
             "d.json": '{"caption": "é"}'.encode(), "e.txt": "é".encode("utf-8-sig")}
    members = [(f"{name[0]}.png", picture_bytes()) for name in texts]
    folder(**{f"{name[0]}_DOT_png": None for name in texts})
    for name, text in texts.items():
        (tmp_path / "f" / name).write_bytes(text)
    write_tar(tmp_path / "t.tar", [*members, *texts.items()])
    for csv_path in ("f", "t.tar"):
        outcome, rows, _, _ = score_input(csv_path, "--fresh")
        assert [row["caption"].strip() for row in rows] == ["é", "\ufffd", "é", "é", "é"]
        assert "1 texts in " in outcome.stderr and "are not utf-8" in outcome.stderr
        outcome, rows, _, _ = score_input(csv_path, "--fresh", encoding="latin-1")
        assert [row["caption"].strip() for row in rows] == ["é", "é", "Ã©", "é", "ï»¿Ã©"] and "texts in" not in outcome.stderr


def test_metadata_below_a_folder_spelled_with_a_dot(tmp_path, folder, score_input):
    """Metadata files are told apart by their names from the folder on, so that a changed one is refused by its name."""
    for number, name in enumerate(("aa", "ba")):
        folder(**{f"{name}__0_DOT_png": None, f"{name}__metadata_DOT_csv": f"file_name,caption\n0.png,c{number}\n"})
    assert [file["name"] for file in score_input("./f")[3]["files"]] == ["aa/metadata.csv", "ba/metadata.csv"]
    (tmp_path / "f/aa/metadata.csv").write_text("file_name,caption\n0.png,C0\n")
    assert "aa/metadata.csv has changed" in score_input("./f")[0].stderr


def test_a_text_that_may_not_be_read(tmp_path, folder, score_input, monkeypatch):
    """A caption's file that may not be read is one line that names it: it is the input's fault and not the output's."""
    folder(a_DOT_png=None, a_DOT_txt="x")
    real = pathlib.Path.open

    def refuse(self, *arguments, **options):
        if self.name == "a.txt":
            raise PermissionError(13, "Permission denied")
        return real(self, *arguments, **options)
    monkeypatch.setattr(pathlib.Path, "open", refuse)
    outcome = score_input("f")[0]
    assert outcome.code == 3 and outcome.stderr.endswith("/f/a.txt: Permission denied\n"), outcome.stderr


def test_where_images_came_from_is_kept(folder, score_input):
    """The URL in a .json, as img2dataset writes it next to each image, becomes the column `input_url`."""
    folder(**{"00000__0_DOT_jpg": None, "00000__0_DOT_json": '{"caption": "c", "url": "http://x/0", "status": "success"}',
              "00000__1_DOT_jpg": None, "00000__1_DOT_txt": "d"})
    rows = score_input("f")[1]
    assert [(row["url"], row["input_url"], row["caption"], row["input_status"], row["status"]) for row in rows] == [
        ("00000/0.jpg", "http://x/0", "c", "success", "ok"), ("00000/1.jpg", "", "d", "", "ok")]
