"""Several captions of one image: each is a row, in order, wherever the list stands."""
import io
import itertools
import json
import random
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import image_text_sim_clip as script
from addons import inputs
from addons.inputs import caption_lists, parquet

LISTS = [["a", "b"], [], ["c"], None, [None, "d", ""], [" ", None], ["e"] * 3]
ROWS = [("0", "a"), ("0", "b"), ("1", ""), ("2", "c"), ("3", ""), ("4", ""), ("4", "d"), ("4", ""), ("5", ""), ("6", "e"),
        ("6", "e"), ("6", "e")]
INDEX = [0, 1, 0, 0, 0, 0, 1, 2, 0, 0, 1, 2]


def write_lists(path, lists, **options):
    """A table of images 0.png, 1.png ... with lists of captions, of the kind that its name says."""
    rows = [{"url": f"{number}.png", "caption": captions, "n": number} for number, captions in enumerate(lists)]
    if path.suffix == ".parquet":
        kind = pa.schema([("url", pa.string()), ("caption", pa.list_(pa.string())), ("n", pa.int64())])
        pq.write_table(pa.Table.from_pylist(rows, kind), path, **options)
    elif path.suffix == ".tar":
        with tarfile.open(path, "w") as tar:
            for row in rows:
                for suffix, data in ((".png", b"image"), (".json", json.dumps(row).encode())):
                    info = tarfile.TarInfo(row["url"].removesuffix(".png") + suffix)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl", "t.tar"])
def test_each_caption_is_a_row(tmp_path, score_input, name):
    """Captions of a list are rows in order with their index; a list without text is one row that is empty_caption."""
    write_lists(tmp_path / name, LISTS)
    outcome, rows, _, manifest = score_input(name)
    assert [(row["n"], row["caption"].strip()) for row in rows] == ROWS
    assert [int(row["caption_index"]) for row in rows] == INDEX
    assert [row["status"] == "empty_caption" for row in rows] == [not row["caption"].strip() for row in rows]
    assert outcome.result["rows"] == manifest["rows"] == len(ROWS)
    assert outcome.result["input_rows"] == manifest["input_rows"] == len(LISTS)
    assert f"{len(ROWS)} of {len(LISTS)} input rows" in outcome.stderr
    assert score_input(name)[0].result == outcome.result


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl", "t.tar"])
@pytest.mark.parametrize("limit", range(1, len(ROWS) + 2))
def test_limit_counts_captions(tmp_path, name, limit):
    """`limit` counts captions; `input_rows` are those that they come from."""
    write_lists(tmp_path / name, LISTS)
    config = script.Config(csv_path=str(tmp_path / name), limit=limit)
    reader = inputs.find_reader(config.csv_path)
    manifest = reader.describe(config, tmp_path)
    assert (manifest["rows"], manifest["input_rows"]) == (min(limit, len(ROWS)), len({n for n, _ in ROWS[:limit]}))
    rows = reader.open(manifest, config, tmp_path).read(0, manifest["rows"])
    assert list(zip(rows["n"], rows["caption"].str.strip(), strict=True)) == ROWS[:limit]


def test_any_range_of_captions(tmp_path, monkeypatch):
    """Any range of caption rows, over files, row groups and pieces, is what the whole has there."""
    monkeypatch.setattr("addons.inputs.parquet.PIECE_ROWS", 2)
    rng = random.Random(5)
    for number in range(3):
        lists = [rng.choice(LISTS) for _ in range(7)]
        write_lists(tmp_path / f"{number}.parquet", lists, row_group_size=rng.randint(1, 7))
    pq.write_table(pa.table({"url": ["x", "y"], "caption": ["plain", "p"], "caption_index": [7, 8]}), tmp_path / "3.parquet")
    config = script.Config(csv_path=str(tmp_path))
    reader = inputs.find_reader(config.csv_path)
    manifest = reader.describe(config, tmp_path)
    whole = reader.open(manifest, config, tmp_path).read(0, manifest["rows"])
    assert list(whole["caption_index"])[-2:] == ["0", "0"] and list(whole["input_caption_index"])[-2:] == ["7", "8"]
    assert (whole["caption_index"] == "0").sum() == manifest["input_rows"] == 23
    rows = reader.open(manifest, config, tmp_path)
    ranges = list(itertools.combinations_with_replacement(range(len(whole) + 1), 2))
    for start, stop in rng.sample(ranges, 200):
        assert rows.read(start, stop).reset_index(drop=True).equals(whole[start:stop].reset_index(drop=True))


def test_lists_and_plain_captions_in_one_file(tmp_path, score_input):
    """In JSON Lines a list may come late, and a key caption_index of the input's own is kept under another name."""
    lines = [{"url": "a", "caption": "plain", "caption_index": "mine"}] * 3 + [{"url": "b", "caption": ["x", 2, True]}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, rows, _, manifest = score_input("t.jsonl")
    assert [(row["url"], row["caption"], row["caption_index"], row["input_caption_index"]) for row in rows] == [
        *[("a", "plain", "0", "mine")] * 3, ("b", "x", "0", ""), ("b", "2", "1", ""), ("b", "true", "2", "")]
    assert manifest["input_rows"] == 4


def test_an_image_with_many_captions_is_encoded_once(tmp_path, write_config, run_main, read_table, bundled_model, monkeypatch):
    """The image of a list is loaded and encoded once, and each caption gets the score that it gets alone."""
    shapes = str(script.ADDONS.parent / "challenge_set/shapes")
    captions = ["a large cyan triangle on a black background", "a red star", "a blue circle"]
    read = []
    real = script.read_file
    monkeypatch.setattr(script, "read_file", lambda folder, source, **o: read.append(source) or real(folder, source, **o))
    (tmp_path / "l.jsonl").write_text(json.dumps({"url": "shape-000.png", "caption": captions}) + "\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"url": "shape-000.png", "caption": c}) + "\n" for c in captions))
    found = {}
    for name in ("l", "p"):
        keys = {"image_path": shapes, "pretrained_model": bundled_model, "parity_rows": 0, "output_path": str(tmp_path / name)}
        outcome = run_main("--config", write_config(csv_path=str(tmp_path / f"{name}.jsonl"), **keys))
        assert outcome.code == 0, outcome.stderr
        found[name] = [row["similarity"] for row in read_table(tmp_path / name / "scores.csv")]
    assert found["l"] == found["p"] and len(set(found["l"])) == 3 and read == ["shape-000.png"] * 2


def test_a_list_without_end(tmp_path, score_input):
    """A line whose captions would repeat its other cells without bound is malformed."""
    line = {"url": "a" * 1_000_000, "caption": ["c"] * 100}
    (tmp_path / "t.jsonl").write_text(json.dumps({"url": "u", "caption": "c"}) + "\n" + json.dumps(line) + "\n")
    _, rows, bad, _ = score_input("t.jsonl")
    assert len(rows) == 1 and "too many for so long a line" in bad[0]["reason"]


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.large_list(pa.large_string()), pa.list_(pa.string(), 2),
                                  pa.list_(pa.int32())])
def test_kinds_of_lists(tmp_path, score_input, kind):
    """Any list of cells that have a plain text is read."""
    values = [[1, 2]] if pa.types.is_integer(kind.value_type) else [["1", "2"]]
    pq.write_table(pa.table({"url": ["u"], "caption": pa.array(values, kind)}), tmp_path / "t.parquet")
    assert [row["caption"] for row in score_input("t.parquet")[1]] == ["1", "2"]


def test_a_list_in_a_file_that_changed(tmp_path, score_input):
    """A file in which only the lists' lengths changed is not what was planned."""
    write_lists(tmp_path / "t.parquet", [["a"], ["b", "c"]])
    config = script.Config(csv_path=str(tmp_path / "t.parquet"))
    reader = inputs.find_reader(config.csv_path)
    manifest = reader.describe(config, tmp_path)
    write_lists(tmp_path / "t.parquet", [["a"], ["b"]])
    with pytest.raises(script.Trouble, match=r"t\.parquet"):
        reader.open(manifest, config, tmp_path).read(0, 3)


def test_split_list():
    """The captions of a JSON list; one empty text for none."""
    assert caption_lists.split_list([]) == caption_lists.split_list([None, " "]) == [""]
    assert caption_lists.split_list(["a", None, True]) == ["a", "", "true"]
    with pytest.raises(ValueError, match="a list with an object in it"):
        caption_lists.split_list(["a", {}])


def test_own_index_of_one_file_alone(tmp_path, score_input):
    """A column `caption_index` that only one file of a set has is empty in the rows of the others."""
    (tmp_path / "d").mkdir()
    for number, columns in enumerate([{"caption_index": [7]}, {}, {"caption_index": [9]}]):
        captions = ["c"] if number == 2 else [["a", "b"]]
        pq.write_table(pa.table({"url": [f"{number}.png"], "caption": captions, **columns}), tmp_path / f"d/{number}.parquet")
    rows = score_input("d")[1]
    assert [(row["url"], row["caption_index"], row["input_caption_index"]) for row in rows] == [
        ("0.png", "0", "7"), ("0.png", "1", "7"), ("1.png", "0", ""), ("1.png", "1", ""), ("2.png", "0", "9")]


def test_a_block_with_fewer_lists_than_it_counts(tmp_path, score_input, monkeypatch):
    """Where a block holds fewer lists than the file counts rows for it, the run ends in one line: no row is lost in silence."""
    write_lists(tmp_path / "t.parquet", LISTS, row_group_size=3)
    read = parquet.ParquetFile.read_pieces

    def cut_short(self, number, columns):
        return (piece.slice(0, 2) for piece in read(self, number, columns))
    monkeypatch.setattr(parquet.ParquetFile, "read_pieces", cut_short)
    outcome = score_input("t.parquet")[0]
    assert outcome.code == 3 and len(outcome.stderr.splitlines()) == 1 and "t.parquet" in outcome.stderr


def test_own_index_of_a_csv(tmp_path, score_input):
    """A CSV has no lists: its own column `caption_index` is passed through like any other, and no input rows are counted."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d/0.csv").write_text("url,caption,caption_index\n0.png,a,5\n1.png,b,x\n")
    (tmp_path / "d/1.csv").write_text("url,caption\n2.png,c\n")
    outcome, rows, _, manifest = score_input("d")
    assert [row["caption_index"] for row in rows] == ["5", "x", ""]
    assert "input_rows" not in outcome.result and "input_rows" not in manifest and "types" not in manifest
