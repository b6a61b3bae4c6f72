"""What holds for every kind of input: killed and resumed it gives the same bytes, and hostile inputs conserve rows."""
import base64
import contextlib
import io
import json
import random
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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


def captions_of(row):
    """What the rows of a list of captions are."""
    texts = ["" if text is None else text for text in row["caption"]]
    return texts if any(text.strip() for text in texts) else [""]


def write_tar(path, rows):
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(rows):
            for suffix, data in ((".png", row["data"] or b""), (".json", json.dumps({"caption": row["caption"]}).encode())):
                info = tarfile.TarInfo(f"{number:05d}{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_input(kind, folder, rows):
    """Write the rows as an input of that kind; returns its csv_path."""
    plain = [{"url": row["url"], "caption": row["caption"]} for row in rows]
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
    if kind == "a set of tables":
        for number in range(2):
            path = folder / f"d/n={number}/t.jsonl"
            path.parent.mkdir(parents=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in plain[number::2]))
        return "d"
    for number, row in enumerate(rows):  # a folder of pairs
        (folder / "d").mkdir(exist_ok=True)
        (folder / f"d/{number:05d}.png").write_bytes(row["data"] or b"")
        (folder / f"d/{number:05d}.json").write_text(json.dumps({"caption": row["caption"]}))
    return "d"


KINDS = ["lists in lines", "lists in an array", "data: URIs", "lists in a tar", "images in Parquet", "a set of tables",
         "a folder of pairs"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed(tmp_path, score_input, picture_bytes, monkeypatch, kind):
    """A run that ends in the middle, again and again, ends with the bytes of one that did not."""
    csv_path = write_input(kind, tmp_path, make_rows(random.Random(3), 24, picture_bytes()))
    whole = score_input(csv_path, partition_rows=7)[0]
    assert whole.code == 0, whole.stderr
    expected = (tmp_path / "out/scores.csv").read_bytes()
    real = script.commit_part
    for arguments in (("--fresh",), (), ()):
        commits = []

        def commit_or_die(*values, commits=commits):
            commits.append(1)
            if len(commits) > 2:
                raise script.Interrupted(15)
            return real(*values)
        with monkeypatch.context() as patch, contextlib.suppress(script.Interrupted):
            patch.setattr(script, "commit_part", commit_or_die)
            score_input(csv_path, *arguments, partition_rows=7)
    outcome = score_input(csv_path, partition_rows=7)[0]
    assert outcome.code == 0 and (tmp_path / "out/scores.csv").read_bytes() == expected
    assert outcome.result["rows"] == whole.result["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_inputs_conserve_rows(tmp_path, kind, capsys):
    """Of 75 inputs of chance each row comes out once for each of its captions, in order; 525 over all kinds."""
    for seed in range(75):
        rng = random.Random(seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        rows = make_rows(rng, rng.randint(1, 12), b"image")
        csv_path = write_input(kind, folder, rows)
        config = script.Config(csv_path=str(folder / csv_path), limit=rng.choice([None, None, 3]))
        with script.locked(folder / "out"):
            manifest = inputs.find_reader(config.csv_path).describe(config, folder / "out")
        opened = inputs.find_reader(config.csv_path).open(manifest, config, folder / "out")
        if kind == "a set of tables":
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
