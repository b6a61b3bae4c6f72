"""Names that are spelled otherwise than on the disk, and links that may lead out of image_path where that is wanted."""
import os
import unicodedata

import pytest

import image_text_sim_clip as script
from addons.images import spellings

NFC = unicodedata.normalize("NFC", "é.png")
NFD = unicodedata.normalize("NFD", "é.png")


@pytest.mark.parametrize(("on_disk", "in_table"), [
    (NFC, NFD), (NFD, NFC), ("a b.png", "a%20b.png"), ("d/e.png", "d\\e.png"), ("d/e f.png", "d\\e%20f.png"),
    (f"d/{NFD}", f"d\\{NFC}"), (NFD, "%C3%A9.png"), ("a%20b.png", "a%20b.png"), ("a\\b.png", "a\\b.png"),
    (NFD, f"http://x/y/{NFC}"), ("a b.png", "file:///a b.png")])
def test_names_spelled_otherwise(tmp_path, on_disk, in_table):
    """A name with backslashes, percent signs or another of Unicode's forms is found; what is there as it stands goes first."""
    path = tmp_path / on_disk
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x")
    if in_table == on_disk:
        (tmp_path / "a").mkdir()
        for other in ("a b.png", "a/b.png"):
            (tmp_path / other).write_bytes(b"other")
    if in_table.startswith("file:"):
        in_table = f"file://{tmp_path}/a%20b.png"
    assert script.read_file(tmp_path, in_table, 100) == b"x"


@pytest.mark.parametrize("name", ["..\\secret.png", "%2e%2e/secret.png", "d\\..\\..\\secret.png", "%2e%2e%2fsecret.png"])
@pytest.mark.parametrize("follow_links", [False, True])
def test_no_spelling_leads_out(tmp_path, name, follow_links):
    """However it is spelled, no name leads out of image_path."""
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "images/d").mkdir(parents=True)
    with pytest.raises(script.RowFailure) as failure:
        script.read_file(tmp_path / "images", name, 100, follow_links)
    assert failure.value.status in ("forbidden", "missing")


def test_a_url_with_many_endings():
    """Few endings of an endless URL are spelled otherwise."""
    assert len(list(spellings.other_spellings([f"a%20{n}" for n in range(5000)]))) <= 12 * spellings.MOST_NAMES


def test_links_that_lead_out(tmp_path, write_config, write_table, run_main, read_table, picture_bytes):
    """With follow_links links lead out of image_path, to regular files only; names do not; without it both are forbidden."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / "b0").write_bytes(picture_bytes())
    os.mkfifo(blobs / "pipe")
    snapshot = tmp_path / "pictures"
    snapshot.mkdir()
    (snapshot / "0.png").symlink_to("../blobs/b0")
    (snapshot / "pipe.png").symlink_to("../blobs/pipe")
    (snapshot / "folder.png").symlink_to("../blobs")
    (snapshot / "round.png").symlink_to("round.png")
    (snapshot / "zero.png").symlink_to("/dev/zero")
    names = ["0.png", "pipe.png", "folder.png", "round.png", "zero.png", "../blobs/b0", "folder.png/b0"]
    names.append("folder.png/../blobs/b0")
    write_table([("url", "caption"), *((name, "c") for name in names)])
    found = {}
    for follow_links in (True, False):
        outcome = run_main("--config", write_config(follow_links=follow_links), "--fresh")
        assert outcome.code == 0, outcome.stderr
        found[follow_links] = [row["status"] for row in read_table(tmp_path / "out/scores.csv")]
    assert found[True] == ["ok", "forbidden", "forbidden", "missing", "forbidden", "forbidden", "ok", "missing"]
    assert found[False] == ["forbidden", "forbidden", "forbidden", "missing", *["forbidden"] * 4]


def test_the_cache_of_the_hub(tmp_path, write_config, write_table, run_main, read_table, picture_bytes):
    """A snapshot of the Hub's cache is read, whose files are links into the same cache; no other link leads out of it."""
    cache = tmp_path / "datasets--someone--shapes"
    snapshot = cache / "snapshots/abc/images"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs/b0").write_bytes(picture_bytes())
    (cache / "blobs/b1").symlink_to(tmp_path / "secret.png")
    (tmp_path / "secret.png").write_bytes(picture_bytes())
    (snapshot / "0.png").symlink_to("../../../blobs/b0")
    (snapshot / "1.png").symlink_to("../../../blobs/b1")
    (snapshot / "2.png").symlink_to("../../../../secret.png")
    write_table([("url", "caption"), *((f"{n}.png", "c") for n in range(4))])
    assert run_main("--config", write_config(image_path=str(snapshot))).code == 0
    assert [row["status"] for row in read_table(tmp_path / "out/scores.csv")] == ["ok", "forbidden", "forbidden", "missing"]


def test_blanks_around_a_name(tmp_path, write_config, write_table, run_main, read_table, picture_bytes):
    """Blanks around a path are the file's own where there is such a file, and else nothing; around a URL they are nothing."""
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "pictures" / name).write_bytes(picture_bytes())
    for name in (" a.png", "a.png ", " c.png"):
        (tmp_path / "pictures" / name).write_bytes(b"another file")
    rows = {"a.png": "ok", " a.png": "not_image", "a.png ": "not_image", " b.png ": "ok", " c.png": "not_image",
            "c.png": "missing", " http://x/a.png ": "ok", " ": "missing", "b.png/ ": "missing"}
    write_table([("url", "caption"), *((name, "c") for name in rows)])
    assert run_main("--config", write_config()).code == 0
    found = read_table(tmp_path / "out/scores.csv")
    assert [(row["url"], row["status"]) for row in found] == list(rows.items())


def test_a_name_that_is_no_utf8(tmp_path, score_input, picture_bytes):
    """A file's name with bytes that are no UTF-8 is shown with \\xe9 for such a byte, and its image is read."""
    folder = tmp_path / "f"
    folder.mkdir()
    for name, data in ((b"caf\xe9.png", picture_bytes()), (b"caf\xe9.txt", b"x"), (b"b.png", b"no image"), (b"b.txt", b"y")):
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(data)
    rows = score_input("f")[1]
    assert [(row["url"], row["caption"], row["status"]) for row in rows] == [
        ("b.png", "y", "not_image"), ("caf\\xe9.png", "x", "ok")]
    (tmp_path / "t.csv").write_text("url,caption\ncaf\\xe9.png,c\n")
    assert [row["status"] for row in score_input("t.csv", "--fresh", image_path=str(folder))[1]] == ["ok"]


def test_a_url_in_latin_1(tmp_path):
    """%E9 in a URL, which is no UTF-8, is the byte in the name of a file that was saved so; no other such URL has that file."""
    for name in (b"caf\xe9.png", b"caf\xe8.png"):
        with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
            file.write(name)
    assert script.read_file(tmp_path, "http://x/caf%E9.png", 100) == b"caf\xe9.png"
    assert script.read_file(tmp_path, "http://x/caf%E8.png", 100) == b"caf\xe8.png"
    with pytest.raises(script.RowFailure, match="missing"):
        script.read_file(tmp_path, "http://x/caf%E7.png", 100)
