"""Folders of images with their captions: files of the same name, or metadata files, straight from csv_path."""
import json
import os

import pytest

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
