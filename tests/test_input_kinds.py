"""What holds for every kind of input: killed and resumed it gives the same bytes, and hostile inputs conserve rows."""
import base64
import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import random
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from unfinished_run import ends_at_third_part

import image_text_sim_clip as script
from addons import inputs

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
WORDS = ["a", "", " ", "b, c", 'd "e"', "f\ng", "é", "data:,x", "\\", "null", "[1]", "{", None]


def make_rows(rng, count, image):
    """Rows with captions that may be lists, and images that may be none."""
    rows = []
    for number in range(count):
        captions = [rng.choice(WORDS) for _ in range(rng.randint(0, 4))]
        data = rng.choice([image, image, b"junk", b"", None])
        rows.append({"url": f"{number}.png", "caption": captions, "data": data})
    return rows


def with_one_caption(row):
    """The row of a kind that has no lists."""
    return {**row, "caption": row["caption"][:1]}


def captions_of(row):
    """What the rows of a list of captions are."""
    texts = ["" if text is None else text for text in row["caption"]]
    return texts if any(text.strip() for text in texts) else [""]


def write_tar(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(rows):
            for suffix, data in ((".png", row["data"] or b""), (".json", json.dumps({"caption": row["caption"]}).encode())):
                info = tarfile.TarInfo(f"{number:05d}{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def csv_text(rows, **names):
    """A CSV of the first caption of each row, all cells quoted."""
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow([names.get("url", "url"), "caption"])
    writer.writerows([(row["url"], captions_of(with_one_caption(row))[0]) for row in rows])
    return text.getvalue()


def compressed(text, number):
    """A name's ending, and the text compressed so: another way for each number."""
    data = text.encode()
    ways = [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress),
            (".zst", lambda data: pa.compress(data, "zstd", asbytes=True))]
    suffix, compress = ways[number % len(ways)]
    return suffix, compress(data)


def write_set(kind, folder, rows):
    """Write every other row into each of two files of a set, in folders whose names are a column."""
    for number in range(2):
        half = rows[number::2]
        path = folder / f"d/n={number}"
        path.mkdir(parents=True, exist_ok=True)
        plain = [{"url": row["url"], "caption": row["caption"]} for row in half]
        if kind == "a set of CSVs":
            (path / "t.csv").write_text(csv_text(half))
        elif kind == "a set of compressed tables":
            suffix, data = compressed(csv_text(half), number + len(rows))
            (path / f"t.csv{suffix}").write_bytes(data)
        elif kind == "a set of arrays":
            (path / "t.json").write_text(json.dumps(plain))
        elif kind == "a set of Parquet files":
            pq.write_table(pa.table({"url": [row["url"] for row in half], "caption": pa.array(
                [row["caption"] for row in half], pa.list_(pa.string()))}), path / "t.parquet", row_group_size=2)
        elif kind == "a set of tars":
            write_tar(path / "t.tar", half)
        elif kind == "a set of pairs":
            write_pairs(path, half)
        elif kind == "a set of imagefolders":
            write_images(path, half)
            (path / "metadata.jsonl").write_text("".join(json.dumps({"file_name": row["url"], **row}) + "\n" for row in plain))
        else:
            (path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    return "d"


def write_images(path, rows):
    """The images of rows under their names."""
    path.mkdir(parents=True, exist_ok=True)
    for row in rows:
        (path / row["url"]).write_bytes(row["data"] or b"")


def write_pairs(path, rows):
    """Images in the rows' order, with a .json of the same name next to each."""
    path.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows):
        (path / f"{number:05d}.png").write_bytes(row["data"] or b"")
        (path / f"{number:05d}.json").write_text(json.dumps({"caption": row["caption"]}))


def write_imagefolder(kind, folder, rows):
    """Images with a metadata file that names them."""
    write_images(folder / "d", rows)
    if kind.endswith("csv"):
        (folder / "d/metadata.csv").write_text(csv_text(rows, url="file_name"))
    elif kind.endswith("jsonl"):
        lines = [json.dumps({"file_name": row["url"], "caption": row["caption"]}) + "\n" for row in rows]
        (folder / "d/metadata.jsonl").write_text("".join(lines))
    else:
        captions = pa.array([row["caption"] for row in rows], pa.list_(pa.string()))
        pq.write_table(pa.table({"file_name": [row["url"] for row in rows], "caption": captions}),
                       folder / "d/metadata.parquet", row_group_size=3)
    return "d"


def write_input(kind, folder, rows):
    """Write the rows as an input of that kind; returns its csv_path."""
    plain = [{"url": row["url"], "caption": row["caption"]} for row in rows]
    if kind.startswith("a set of"):
        return write_set(kind, folder, rows)
    if kind.startswith("an imagefolder"):
        return write_imagefolder(kind, folder, rows)
    if kind == "CSV":
        (folder / "t.csv").write_text(csv_text(rows))
        return "t.csv"
    if kind == "compressed":
        suffix, data = compressed(csv_text(rows), len(rows))
        (folder / f"t.csv{suffix}").write_bytes(data)
        return f"t.csv{suffix}"
    if kind == "lists in Parquet":
        captions = pa.array([row["caption"] for row in rows], pa.list_(pa.string()))
        pq.write_table(pa.table({"url": [row["url"] for row in rows], "caption": captions}), folder / "t.parquet",
                       row_group_size=3)
        return "t.parquet"
    if kind == "lists in lines":
        (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
        return "t.jsonl"
    if kind == "lists in an array":
        (folder / "t.json").write_text(json.dumps(plain, indent=1))
        return "t.json"
    if kind == "data: URIs":
        lines = [{**row, "url": "data:;base64," + base64.b64encode(full["data"] or b"").decode()}
                 for row, full in zip(plain, rows, strict=True)]
        (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        return "t.jsonl"
    if kind == "lists in a tar":
        write_tar(folder / "t.tar", rows)
        return "t.tar"
    if kind == "images in Parquet":
        table = pa.table({"url": pa.array([{"bytes": row["data"], "path": row["url"]} for row in rows], STRUCT),
                          "caption": pa.array([row["caption"] for row in rows], pa.list_(pa.string()))})
        (folder / "d").mkdir()
        pq.write_table(table.slice(0, len(rows) // 2), folder / "d/0.parquet", row_group_size=3)
        pq.write_table(table.slice(len(rows) // 2), folder / "d/1.parquet")
        return "d"
    assert kind == "a folder of pairs"
    write_pairs(folder / "d", rows)
    return "d"


KINDS = ["CSV", "compressed", "lists in lines", "lists in an array", "lists in Parquet", "images in Parquet", "data: URIs",
         "lists in a tar", "a folder of pairs", "an imagefolder with metadata.csv", "an imagefolder with metadata.jsonl",
         "an imagefolder with metadata.parquet", "a set of CSVs", "a set of compressed tables", "a set of tables",
         "a set of arrays", "a set of Parquet files", "a set of tars", "a set of pairs", "a set of imagefolders"]
WITHOUT_LISTS = ("CSV", "compressed", "an imagefolder with metadata.csv", "a set of CSVs", "a set of compressed tables")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed(tmp_path, score_input, picture_bytes, kind):
    """A run that ends in the middle, again and again, ends with the bytes of one that did not."""
    csv_path = write_input(kind, tmp_path, make_rows(random.Random(3), 24, picture_bytes()))
    whole = score_input(csv_path, partition_rows=7)[0]
    assert whole.code == 0, whole.stderr
    expected = (tmp_path / "out/scores.csv").read_bytes()
    for arguments in (("--fresh",), (), ()):
        with ends_at_third_part():
            score_input(csv_path, *arguments, partition_rows=7)
    outcome = score_input(csv_path, partition_rows=7)[0]
    assert outcome.code == 0 and (tmp_path / "out/scores.csv").read_bytes() == expected
    assert outcome.result["rows"] == whole.result["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_inputs_conserve_rows(tmp_path, kind, capsys):
    """Of 500 inputs of chance of every kind each row comes out once for each of its captions, in order."""
    for seed in range(500):
        rng = random.Random(seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        rows = make_rows(rng, rng.randint(1, 12), b"image")
        csv_path = write_input(kind, folder, rows)
        rows = list(map(with_one_caption, rows)) if kind in WITHOUT_LISTS else rows
        config = script.Config(csv_path=str(folder / csv_path), limit=rng.choice([None, None, 3]))
        with script.locked(folder / "out"):
            manifest = inputs.find_reader(config.csv_path).describe(config, folder / "out")
        opened = inputs.find_reader(config.csv_path).open(manifest, config, folder / "out")
        if kind.startswith("a set of"):
            rows = rows[0::2] + rows[1::2]
        expected = [caption for row in rows for caption in captions_of(row)][:config.limit]
        found = opened.read(0, manifest["rows"])
        assert list(found["caption"]) == expected and manifest["malformed"] == 0, seed
        if opened.brings_images:
            images = [row["data"] for row in rows for _ in captions_of(row)][:config.limit]
            for source, data in zip(opened.sources(0, len(found)), images, strict=True):
                with contextlib.suppress(script.RowFailure):
                    assert opened.read_bytes(source) == (data or b"")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_inputs_are_told(tmp_path, score_input, picture_bytes, kind):
    """An input with bytes of chance in it is rows, malformed lines, or one line and exit 3: never a traceback."""
    csv_path = write_input(kind, tmp_path, make_rows(random.Random(5), 12, picture_bytes()))
    paths = [path for path in (tmp_path / csv_path).rglob("*") if path.is_file()] or [tmp_path / csv_path]
    good = {path: path.read_bytes() for path in paths}
    rng = random.Random(9)
    for _ in range(12):
        for path, data in good.items():
            spoilt = bytearray(data)
            for _ in range(rng.randint(0, 3)):
                if spoilt:
                    spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
            path.write_bytes(spoilt[:rng.choice([len(spoilt), len(spoilt), len(spoilt) // 2])])
        outcome, rows, _, _ = score_input(csv_path, "--fresh")
        assert outcome.code in (0, 3), outcome.stderr
        if outcome.code == 0:
            failed = sum(outcome.result["failed"].values())
            assert len(rows) == outcome.result["rows"] == outcome.result["scored"] + failed
