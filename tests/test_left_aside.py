"""Nothing vanishes: what lies in a tar or a folder is a row's, or it is counted, named on the screen and in the manifest."""
import collections
import io
import itertools
import json
import random
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_inputs import write_tar

import image_text_sim_clip as script
from addons import inputs
from addons.inputs import files, left_aside, tars

ENDINGS = ["png", "PNG", "Jpg", "jpeg", "txt", "TXT", "json", "cls", "npy", "mp4", "", "heic", "seg.png", "v2.txt", "t x t"]
STEMS = ["0", "a.b", "IMG.2023.05.01", "x y", "ü", ".hidden", "_under", "k" * 120, "-"]
FOLDERS = ["", "d/", "d.v1/", "./", "./d/", "d/e/f/"]
KINDS = ["file"] * 8 + ["folder", "symlink", "hardlink", "pipe", "sparse", "pax"]


def add_member(tar, rng, number):
    """Add a member of chance; returns whether it is no folder."""
    kind = rng.choice(KINDS)
    ending = rng.choice(ENDINGS)
    info = tarfile.TarInfo(rng.choice(FOLDERS) + rng.choice(STEMS) + ("." + ending if ending else ""))
    data = b'{"caption": "c", "n": 1}' if ending == "json" else f"content {number}".encode()
    if kind == "folder":
        info.type = tarfile.DIRTYPE
    elif kind in ("symlink", "hardlink"):
        info.type = tarfile.SYMTYPE if kind == "symlink" else tarfile.LNKTYPE
        info.linkname = "0.png"
    elif kind == "pipe":
        info.type = tarfile.FIFOTYPE
    else:
        info.size = len(data)
    if kind == "sparse":
        info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": str(len(data)),
                            "GNU.sparse.map": f"0,{len(data)}"}
    elif kind == "pax":
        info.pax_headers = {"comment": "ü" * 50, "mtime": "1.5"}
    tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return kind != "folder"


@pytest.mark.slow
def test_every_member_is_a_rows_or_left_aside(tmp_path):
    """In 500 archives of chance every member but folders belongs to a row or is counted, and all rows can be read.

    Names with dots, in any case, in folders; links, pipes, duplicates, partial pairs, sparse files, pax headers.
    """
    path = tmp_path / "t.tar"
    seen = collections.Counter()
    for seed in range(500):
        rng = random.Random(seed)
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            members = sum(add_member(tar, rng, number) for number in range(rng.randint(1, 25)))
        index = tars.index_tar(files.InputFile("t.tar", str(path)))
        assert index.flaw == ""
        of_rows = sum(len(entry.members) for entry in index.entries)
        assert of_rows + index.left_aside.total == members, seed
        config = script.Config(csv_path=str(path))
        reader = inputs.find_reader(config.csv_path)
        if not index.entries:
            continue
        manifest = reader.describe(config, tmp_path)
        assert manifest["rows"] == len(index.entries)
        assert sum(kind["count"] for kind in manifest["left_aside"].values()) == index.left_aside.total
        rows = reader.open(manifest, config, tmp_path)
        table = rows.read(0, manifest["rows"])
        for entry, source, caption in zip(index.entries, rows.sources(0, len(table)), table["caption"], strict=True):
            if entry.image:
                assert rows.read_bytes(source).startswith(b"content ")
            assert caption == "c" or "json" not in entry.members
        seen.update(left_aside_kind for left_aside_kind in index.left_aside.counts)
    assert {"links", "devices and pipes", "sparse files", "hidden files", "files ending in .cls"} <= seen.keys()


@pytest.mark.slow
def test_every_file_of_a_folder_is_read_or_left_aside(tmp_path):
    """In 200 folders of chance every file and folder is read, belongs to one that is read, or is counted and named."""
    for seed in range(200):
        rng = random.Random(seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "0.parquet").write_bytes(ONE_ROW)
        for _ in range(rng.randint(0, 12)):
            name = rng.choice(["a", "B.c", "_x", ".y", "0"]) + rng.choice(["", ".parquet", ".PARQUET", ".json", ".csv", ".TXT"])
            target = folder / name
            if target.exists():
                continue
            if rng.random() < 0.2 and not name.startswith("."):
                target.mkdir()
                (target / "1.parquet").write_bytes(ONE_ROW)
            else:
                target.write_bytes(ONE_ROW)
        config = script.Config(csv_path=str(folder))
        manifest = inputs.find_reader(config.csv_path).describe(config, tmp_path)
        left = sum(kind["count"] for kind in manifest["left_aside"].values())
        assert manifest["rows"] == len(manifest["files"])
        hidden = [path for path in folder.iterdir() if path.is_dir() and path.name.startswith("_")]
        below = [path for path in folder.rglob("*") if path.is_file() and path.parent not in hidden]
        assert manifest["rows"] + left == len(below) + len(hidden), (seed, manifest)


def parquet_bytes(**columns):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


ONE_ROW = parquet_bytes(url=["u"], caption=["c"])


# ── Names in tars ─────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("image", "text"), [
    ("holiday.v2.png", "holiday.v2.txt"), ("IMG.2023.05.01.JPEG", "IMG.2023.05.01.TXT"), ("a/22.05.png", "a/22.05.txt"),
    ("./b/IMG_7.PNG", "b/IMG_7.TXT"), ("d.v1/e.f/g.webp", "d.v1/e.f/g.txt"), ("img.1200x800.jfif", "img.1200x800.txt"),
    ("1.tar.png", "1.tar.txt"), ("a b.c d.gif", "a b.c d.txt"), ("..x.png.png", "..x.png.txt"), ("_0.1.png", "_0.1.txt")])
def test_names_that_are_a_pair(tmp_path, score_input, picture_bytes, image, text):
    """An image and a text of one path up to the last dot are a pair, whatever other dots and cases are in it."""
    members = [("z.0.png", picture_bytes()), ("z.0.txt", b"another"), (image, picture_bytes()), (text, b"the caption")]
    write_tar(tmp_path / "t.tar", members)
    _, rows, _, manifest = score_input("t.tar")
    if image.startswith(".") and not image.startswith("./"):
        assert len(rows) == 1 and manifest["left_aside"]["hidden files"]["count"] == 2
        return
    assert [(row["url"], row["caption"], row["status"]) for row in rows] == [
        ("t.tar/z.0.png", "another", "ok"), (f"t.tar/{image}", "the caption", "ok")]
    assert manifest["left_aside"] == {}


def test_images_that_are_not_read_are_rows(tmp_path, score_input):
    """A member whose ending is an image format that is not read here is a row with a status, not gone."""
    write_tar(tmp_path / "t.tar", [member for ending in ("heic", "JXL", "svg", "psd") for member in (
        (f"1.{ending}", b"<svg/>" if ending == "svg" else b"\0\0\0\x18ftypheic" + bytes(40)), ("1.txt", b"c"))])
    assert [row["status"] for row in score_input("t.tar")[1]] == ["unsupported"] * 4


def test_partnerless_members_are_rows(tmp_path, score_input, picture_bytes):
    """An image without a text and a text without an image are rows that say so."""
    write_tar(tmp_path / "t.tar", [("d/1.png", picture_bytes()), ("e/1.txt", b"c"), ("2.json", b'{"caption": "x"}')])
    assert [row["status"] for row in score_input("t.tar")[1]] == ["empty_caption", "missing", "missing"]


def test_tars_without_a_row(tmp_path, score_input, picture_bytes):
    """Tars in which nothing is a row are exit 3, and what lies in them is named."""
    write_tar(tmp_path / "t.tar", [("1.mp4", b"x"), ("2.npy", b"x"), (".png", picture_bytes())])
    outcome, rows, _, _ = score_input("t.tar")
    assert outcome.code == 3 and rows is None and "has no rows" in outcome.stderr
    for word in ("1 files ending in .mp4 (such as t.tar/1.mp4)", "t.tar/2.npy", "1 hidden files"):
        assert word in outcome.stderr


def test_endings_of_chance_do_not_fill_the_manifest():
    """However many endings there are, a fixed number of kinds is told; the count stays right."""
    counted = left_aside.LeftAside()
    for number in range(1000):
        counted.add(left_aside.kind_by_ending(f"x.e{number}"), f"x.e{number}")
    assert counted.total == 1000 and len(counted.describe()) <= left_aside.MOST_KINDS + 1


def test_folder_with_other_things(tmp_path, score_input, picture_bytes):
    """What lies in a folder of shards and is none is counted and named; what belongs to a shard is not."""
    folder = tmp_path / "s"
    (folder / "more").mkdir(parents=True)
    write_tar(folder / "0.tar", [("0.png", picture_bytes()), ("0.txt", b"c")])
    (folder / "0.parquet").write_bytes(parquet_bytes(key=["0"]))
    (folder / "1.parquet").write_bytes(ONE_ROW)
    (folder / "0_stats.json").write_text("{}")
    (folder / "pairs.csv").write_text("url,caption\n")
    (folder / "more/1.cls").write_bytes(b"3")
    (folder / "._0.tar").write_bytes(b"junk")
    outcome, rows, _, manifest = score_input("s")
    assert len(rows) == 1
    assert manifest["left_aside"] == {
        "hidden files": {"count": 1, "first": "._0.tar"}, "files ending in .json": {"count": 1, "first": "0_stats.json"},
        "files ending in .parquet": {"count": 1, "first": "1.parquet"},
        "files ending in .csv": {"count": 1, "first": "pairs.csv"}, "files ending in .cls": {"count": 1, "first": "more/1.cls"}}
    assert "1 hidden files (such as ._0.tar)" in outcome.stderr


# ── Captions that are objects ─────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("caption", [{"en": "a"}, {}, [["a"]], ["a", {"en": "b"}]])
@pytest.mark.parametrize("before", [0, 3])
def test_nested_caption_in_json_lines(tmp_path, score_input, caption, before):
    """An object for a caption, or one in its list, is a line of bad_rows.csv, wherever it stands; other columns may."""
    plain = [{"url": f"u{n}", "caption": "plain", "tags": ["x"]} for n in range(before + 1)]
    lines = [*plain[:before], {"url": "v", "caption": caption, "tags": []}, plain[before]]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcome, rows, bad, _ = score_input("t.jsonl")
    assert [row["caption"] for row in rows] == ["plain"] * (before + 1) and rows[0]["tags"] == '["x"]'
    assert [row["line"] for row in bad] == [str(before + 1)] and "'caption' is a" in bad[0]["reason"]
    assert outcome.result["rows"] + outcome.result["malformed"] == len(lines)


def test_only_nested_captions_in_json_lines(tmp_path, score_input):
    """Where no line has a caption that is text, the one line says what is there instead."""
    (tmp_path / "t.jsonl").write_text('\n{"url": "u", "caption": {"en": "a"}}\n' * 3)
    outcome = score_input("t.jsonl")[0]
    assert outcome.code == 3 and "'caption' is an object, not text" in outcome.stderr and len(outcome.stderr.splitlines()) == 1


@pytest.mark.parametrize("captions", [[{"en": "a"}], [[["a"]]], [[{"en": "a"}]],
                                      pa.array([[("k", "v")]], pa.map_("string", "string"))])
def test_nested_caption_in_parquet(tmp_path, score_input, captions):
    """Parquet whose captions are objects is exit 3 and one line that says what can be read; nothing is scored."""
    (tmp_path / "0.parquet").write_bytes(ONE_ROW)
    (tmp_path / "1.parquet").write_bytes(parquet_bytes(url=["u"], caption=captions))
    for name in ("1.parquet", "*.parquet"):
        outcome, rows, _, _ = score_input(name, "--fresh")
        assert outcome.code == 3 and rows is None and len(outcome.stderr.splitlines()) == 1
        for word in ("'caption' is ", "in 1.parquet", "a list of texts"):
            assert word in outcome.stderr


def test_nested_caption_in_tars(tmp_path, score_input, picture_bytes):
    """A pair whose .json holds an object for a caption keeps its row, with its .txt or with empty_caption."""
    captions = [[{"en": "a"}], {"en": "a"}, [], "text", None, 5]
    members = [[(f"{n}.png", picture_bytes()), (f"{n}.json", json.dumps({"caption": caption}).encode())]
               for n, caption in enumerate(captions)]
    members[1].append(("1.txt", b"from txt"))
    write_tar(tmp_path / "t.tar", itertools.chain.from_iterable(members))
    outcome, rows, _, manifest = score_input("t.tar")
    assert [(row["caption"], row["status"]) for row in rows] == [
        ("", "empty_caption"), ("from txt", "ok"), ("", "empty_caption"), ("text", "ok"), ("", "empty_caption"), ("5", "ok")]
    assert manifest["files"][0]["nested_captions"] == 2
    assert "2 captions in the tars' .json are objects" in outcome.stderr
