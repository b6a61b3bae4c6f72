"""Images inside the table: bytes or structs in Parquet, data: URIs in any text, read a piece at a time."""
import base64
import csv
import io
import json
import pickle
import random
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import image_text_sim_clip as script
from addons import inputs
from addons.inputs import parquet, table_images

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_images(path, images, kind="struct", captions=None, **options):
    """A Parquet table of images, each (bytes or None, path or None)."""
    cells = {"struct": pa.array([{"bytes": data, "path": name} for data, name in images], STRUCT),
             "bytes": pa.array([data for data, _ in images], pa.binary()),
             "large": pa.array([data for data, _ in images], pa.large_binary()),
             "no path": pa.array([{"bytes": data} for data, _ in images], pa.struct([("bytes", pa.binary())]))}[kind]
    pq.write_table(pa.table({"image": cells, "text": captions or [f"c{n}" for n in range(len(images))]}), path, **options)


def open_rows(path, tmp_path, **keys):
    config = script.Config(csv_path=str(path), url_column="image", caption_column="text", **keys)
    reader = inputs.find_reader(config.csv_path)
    return reader.open(reader.describe(config, tmp_path), config, tmp_path)


@pytest.fixture
def score_images(score_input):
    """Dry-run a table with the columns image and text."""
    def run(name, *arguments, **keys):
        return score_input(name, *arguments, **{"url_column": "image", "caption_column": "text", **keys})
    return run


@pytest.mark.parametrize("kind", ["struct", "bytes", "large", "no path"])
def test_images_in_parquet(tmp_path, score_images, picture_bytes, kind):
    """Bytes and structs are images; what is shown is the path, or the row's number; what is no image is a status."""
    images = [(picture_bytes(), "a.png"), (b"junk", "b.png"), (None, None), (picture_bytes("JPEG"), None), (b"", "e")]
    write_images(tmp_path / "t.parquet", images, kind)
    outcome, rows, _, manifest = score_images("t.parquet", image_path=str(tmp_path / "nowhere"))
    assert [row["status"] for row in rows] == ["ok", "not_image", "missing", "ok", "not_image"], outcome.stderr
    shown = ["a.png", "b.png", "2", "3", "e"] if kind == "struct" else ["0", "1", "2", "3", "4"]
    assert [row["image"] for row in rows] == shown
    assert list(rows[0])[:2] == ["image", "text"] and manifest["columns"] == ["image", "text"]


def test_a_struct_without_bytes_is_a_path(tmp_path, score_images, picture_bytes):
    """Where a struct has a path and no bytes, the image lies in image_path."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(picture_bytes())
    images = [(None, "a.png"), (None, "b.png"), (None, "data:row/0/0/2"), (picture_bytes(), "a.png")]
    write_images(tmp_path / "t.parquet", images)
    assert [row["status"] for row in score_images("t.parquet")[1]] == ["ok", "missing", "corrupt", "ok"]


def test_embedded_images_get_the_scores_of_files(tmp_path, run_main, write_config, read_table, bundled_model):
    """The same images and captions give the same scores from files, from Parquet, with lists, and from data: URIs."""
    shapes = script.ADDONS.parent / "challenge_set/shapes"
    names = [f"shape-{n:03d}.png" for n in range(30)]
    images = [((shapes / name).read_bytes(), name) for name in names]
    captions = [f"a red circle {n}" for n in range(30)]
    (tmp_path / "files.csv").write_text("image,text\n" + "".join(f"{n},{c}\n" for n, c in zip(names, captions, strict=True)))
    write_images(tmp_path / "struct.parquet", images, captions=captions, row_group_size=7)
    write_images(tmp_path / "lists.parquet", images, captions=[[caption] for caption in captions], row_group_size=7)
    uris = ["data:image/png;base64," + base64.b64encode(data).decode() for data, _ in images]
    pq.write_table(pa.table({"image": uris, "text": captions}), tmp_path / "uris.parquet")
    (tmp_path / "uris.jsonl").write_text("".join(json.dumps({"image": u, "text": c}) + "\n"
                                                 for u, c in zip(uris, captions, strict=True)))
    found = {}
    for name in ("files.csv", "struct.parquet", "lists.parquet", "uris.parquet", "uris.jsonl"):
        config = write_config(csv_path=str(tmp_path / name), image_path=str(shapes), pretrained_model=bundled_model,
                              url_column="image", caption_column="text", parity_rows=0, partition_rows=8,
                              output_path=str(tmp_path / "out" / name))
        outcome = run_main("--config", config)
        assert outcome.code == 0 and outcome.result["scored"] == 30, outcome.stderr
        rows = read_table(tmp_path / "out" / name / "scores.csv")
        found[name] = [row["similarity"] for row in rows]
        assert [row["image"] for row in rows] == ([str(n) for n in range(30)] if "uris" in name else names)
    assert len({tuple(scores) for scores in found.values()}) == 1


def test_images_in_any_order_and_from_many_threads(tmp_path, monkeypatch):
    """Whoever asks gets the bytes of the row, in any order, over pieces, row groups and files; pieces are dropped meanwhile."""
    monkeypatch.setattr(parquet, "PIECE_ROWS", 3)
    monkeypatch.setattr(table_images, "KEPT_ROWS", 5)
    rng = random.Random(2)
    images = [(rng.randbytes(rng.randint(1, 40)) if rng.random() < 0.9 else b"same" * 10, None) for _ in range(100)]
    write_images(tmp_path / "0.parquet", images[:60], row_group_size=17)
    write_images(tmp_path / "1.parquet", images[60:], "bytes", row_group_size=100)
    rows = pickle.loads(pickle.dumps(open_rows(tmp_path / "*.parquet", tmp_path)))
    sources = rows.sources(0, 100)
    assert [rows.read_bytes(source) for source in sources] == [data for data, _ in images]
    order = rng.sample(range(100), 100)
    wrong = []

    def ask(numbers):
        wrong.extend(number for number in numbers if rows.read_bytes(sources[number]) != images[number][0])
    threads = [threading.Thread(target=ask, args=(order[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_images_are_decoded_once(tmp_path, monkeypatch):
    """Rows in order, however the loader threads overtake each other, read each row group once."""
    monkeypatch.setattr(parquet, "PIECE_ROWS", 10)
    write_images(tmp_path / "t.parquet", [(b"%d" % n, None) for n in range(300)], row_group_size=100)
    rows = open_rows(tmp_path / "t.parquet", tmp_path)
    sources = rows.sources(0, 300)
    decoded = []
    real = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches",
                        lambda self, *a, **o: decoded.extend(o["row_groups"]) or real(self, *a, **o))
    for start in range(0, 300, 20):
        for number in random.Random(start).sample(range(start, start + 20), 20):
            assert rows.read_bytes(sources[number]) == b"%d" % number
    assert decoded == [0, 1, 2]


@pytest.mark.parametrize("kind", ["struct", "bytes"])
def test_a_repeated_image_is_read_in_small_pieces(tmp_path, monkeypatch, kind):
    """An image that the file holds once and many rows repeat takes no more memory at a time than is allowed."""
    monkeypatch.setattr(parquet, "MOST_REPEATED_BYTES", 4_000_000)
    rng = random.Random(0)
    images = [(rng.randbytes(500_000), "a.png")] * 100 + [(rng.randbytes(9), "b.png")] * 100
    write_images(tmp_path / "t.parquet", images, kind)
    with open_rows(tmp_path / "t.parquet", tmp_path).open_file(0) as opened:
        pieces = list(opened.read_pieces(0, ["image.bytes" if kind == "struct" else "image"]))
    read = pa.concat_tables(pieces)["image"].to_pylist()
    assert [cell["bytes"] if kind == "struct" else cell for cell in read] == [data for data, _ in images]
    assert max(piece.nbytes for piece in pieces) < 4_100_000


def test_a_damaged_column_of_images(tmp_path, score_images, picture_bytes):
    """Images that cannot be read for damage in the file are rows with the status corrupt; the other row groups are read."""
    pictures = [(picture_bytes(colour=n), f"{n}.png") for n in range(40)]
    write_images(tmp_path / "t.parquet", pictures, row_group_size=10, compression="zstd", use_dictionary=False)
    column = pq.ParquetFile(tmp_path / "t.parquet").metadata.row_group(1).column(0)
    data = bytearray((tmp_path / "t.parquet").read_bytes())
    start = column.data_page_offset
    data[start:start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    (tmp_path / "t.parquet").write_bytes(data)
    rows = score_images("t.parquet")[1]
    assert [row["status"] for row in rows] == ["ok"] * 10 + ["corrupt"] * 10 + ["ok"] * 20


def test_images_beyond_the_limit(tmp_path, score_images, picture_bytes):
    """max_image_bytes holds for images in a table, however they are written."""
    data = picture_bytes()
    write_images(tmp_path / "t.parquet", [(data, None), (data + b"x" * 5000, None)])
    assert [row["status"] for row in score_images("t.parquet", max_image_bytes=4000)[1]] == ["ok", "too_large"]
    uris = [f"data:;base64,{base64.b64encode(data).decode()}", "data:," + "x" * 5000, "data:;base64," + "A" * 8001]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"image": uri, "text": "c"}) + "\n" for uri in uris))
    rows = score_images("t.jsonl", "--fresh", max_image_bytes=4000)[1]
    assert [row["status"] for row in rows] == ["ok", "too_large", "too_large"]


@pytest.mark.parametrize(("uri", "expected"), [
    ("data:image/png;base64,aGk=", b"hi"), ("DATA:;BASE64,aGk", b"hi"), ("data:;base64,aG%6B%3D", b"hi"),
    (" data:;base64,aG k=\n", b"hi"),
    ("data:;base64,-_-_", b"\xfb\xff\xbf"), ("data:text/plain,a%20b", b"a b"), ("data:,", b""),
    ("data:;base64,a", None), ("data:;base64,a*==", None), ("data:", None), ("data:image/png;base64", None),
    ("data:;base64,é", None)])
def test_data_uris(uri, expected):
    """base64 with or without its =, in either alphabet, or percent-encoded; what cannot be read is corrupt."""
    if expected is None:
        with pytest.raises(script.RowFailure) as failure:
            table_images.decode_data_uri(uri, 1000)
        assert failure.value.status == "corrupt"
    else:
        assert table_images.decode_data_uri(uri, 1000) == expected


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet"])
@pytest.mark.parametrize("image_path", ["pictures", "url"])
def test_data_uris_among_other_sources(tmp_path, score_images, picture_bytes, name, image_path):
    """In any table a data: URI is an image, shown as its row's number, among names or URLs."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(picture_bytes())
    uri = "data:image/png;base64," + base64.b64encode(picture_bytes()).decode()
    cells = ["a.png", uri, "data:;base64,*", "nowhere.png", "data:row/0/0/0"]
    if name == "t.jsonl":
        (tmp_path / name).write_text("".join(json.dumps({"image": cell, "text": "c"}) + "\n" for cell in cells))
    elif name == "t.parquet":
        pq.write_table(pa.table({"image": cells, "text": ["c"] * 5}), tmp_path / name)
    else:
        text = io.StringIO()
        csv.writer(text, delimiter="\t" if name == "t.tsv" else ",").writerows([("image", "text"), *((c, "c") for c in cells)])
        (tmp_path / name).write_text(text.getvalue())
    source = "url" if image_path == "url" else str(tmp_path / image_path)
    outcome, rows, _, _ = score_images(name, image_path=source)
    elsewhere = ["ok", "missing"] if image_path == "pictures" else ["missing", "missing"]
    if image_path == "url":
        elsewhere = [rows[0]["status"], rows[3]["status"]]
        assert "ok" not in elsewhere
    assert [row["status"] for row in rows] == [elsewhere[0], "ok", "corrupt", elsewhere[1], "corrupt"], outcome.stderr
    assert [row["image"] for row in rows] == ["a.png", "1", "2", "nowhere.png", "4"]
    assert score_images(name, image_path=source)[0].result == outcome.result


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.null()])
def test_paths_of_each_type_of_text(tmp_path, score_images, picture_bytes, kind):
    """The path of a struct is read whatever type of text it has (polars writes large strings), or none at all."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(picture_bytes())
    paths = [None, None, None] if pa.types.is_null(kind) else ["a.png", "b.png", "none.png"]
    cells = [{"bytes": data, "path": path} for data, path in zip([None, picture_bytes(), None], paths, strict=True)]
    images = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", kind)]))
    pq.write_table(pa.table({"image": images, "text": ["x", "y", "z"]}), tmp_path / "t.parquet")
    rows = score_images("t.parquet")[1]
    assert [row["image"] for row in rows] == [path or str(number) for number, path in enumerate(paths)]
    assert [row["status"] for row in rows] == ["ok" if paths[0] else "missing", "ok", "missing"]


def test_captions_of_one_image_show_one_number(tmp_path, score_images, picture_bytes):
    """The captions of one data: URI all show the same number, that of the first of them, and no other image has it."""
    uri = "data:;base64," + base64.b64encode(picture_bytes()).decode()
    rows = [{"image": uri, "text": ["a", "b"]}, {"image": uri, "text": "c"}, {"image": uri, "text": ["d", "e", "f"]}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = score_images("t.jsonl", partition_rows=2)[1]
    assert [(row["image"], row["text"]) for row in found] == [
        ("0", "a"), ("0", "b"), ("2", "c"), ("3", "d"), ("3", "e"), ("3", "f")]
    assert {row["status"] for row in found} == {"ok"}


def test_bytes_that_are_no_image_but_text(tmp_path, score_input):
    """Captions as bytes, which old writers leave unmarked as text, are refused with their type; of URLs as bytes it is said."""
    pq.write_table(pa.table({"url": ["a"], "caption": [b"c"]}), tmp_path / "c.parquet")
    outcome = score_input("c.parquet")[0]
    assert outcome.code == 3 and len(outcome.stderr.splitlines()) == 1 and "binary" in outcome.stderr
    pq.write_table(pa.table({"url": [b"https://x/a.png"], "caption": ["c"]}), tmp_path / "u.parquet")
    row = score_input("u.parquet", max_failure_rate=1.0)[1][0]
    assert row["status"] == "not_image" and "URL" in row["detail"]
