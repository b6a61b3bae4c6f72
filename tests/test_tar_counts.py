"""Tars that img2dataset's own files tell of are planned without being read, and disagreement is told when they are."""
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_inputs import assert_refused, sample, write_tar

from addons.inputs import tar_counts, tars


def write_shard(folder, number, pairs, failed=1, *, parquet=True, statistics=True, **more):
    """A shard as img2dataset lays it: so many pairs in the tar, `failed` downloads that the Parquet alone knows."""
    folder.mkdir(exist_ok=True)
    members = []
    table = {"url": [], "caption": [], "key": [], "status": [], "error_message": [], "width": []}
    for place, image in enumerate([*pairs, *[None] * failed]):
        key = f"{number:05d}{place:04d}"
        row = {"url": f"http://x/{key}", "caption": f"caption {key}", "key": key,
               "status": "failed_to_download" if image is None else "success",
               "error_message": "HTTP Error 404" if image is None else None, "width": None if image is None else 8}
        for name, cell in row.items():
            table[name].append(cell)
        if image is not None:
            members += [(f"{key}.jpg", image), (f"{key}.json", json.dumps(row | more).encode()),
                        (f"{key}.txt", row["caption"].encode())]
    write_tar(folder / f"{number:05d}.tar", members)
    if parquet:
        pq.write_table(pa.table(table), folder / f"{number:05d}.parquet")
    if statistics:
        write_statistics(folder, number, len(pairs) + failed, len(pairs))


def write_statistics(folder, number, count, successes):
    text = json.dumps({"count": count, "successes": successes, "failed_to_download": count - successes, "duration": 1.5})
    (folder / f"{number:05d}_stats.json").write_text(text)


@pytest.fixture
def picture(picture_bytes):
    return picture_bytes("JPEG")


@pytest.mark.parametrize("parquet", [True, False])
def test_the_same_as_if_they_were_read(tmp_path, score_input, picture, monkeypatch, parquet):
    """What the files next to tars tell gives the rows, columns and order that reading the tars gives, with no tar indexed."""
    for number in range(3):
        write_shard(tmp_path / "s", number, [picture] * (number + 1), parquet=parquet)
    with monkeypatch.context() as patch:
        patch.setattr(tar_counts, "count_tars", lambda found, *_: [None] * len(found))
        outcome = score_input("s", output_path=str(tmp_path / "read"))[0]
        assert outcome.code == 0, outcome.stderr
    monkeypatch.setattr(tars.TarReader, "_describe_tar", lambda *_: pytest.fail("a tar was read to be planned"))
    outcome, rows, _, manifest = score_input("s")
    assert outcome.code == 0, outcome.stderr
    assert (tmp_path / "out/scores.csv").read_bytes() == (tmp_path / "read/scores.csv").read_bytes()
    assert len(rows) == (9 if parquet else 6) and outcome.result["scored"] == 6
    source = "00000.parquet" if parquet else "00000_stats.json"
    assert manifest["files"][0]["counted_by"] == source and len(manifest["files"]) == 3
    assert manifest["left_aside"] == {}
    assert score_input("s")[0].code == 0


@pytest.mark.parametrize("statistics", [
    "{}", "junk", "[1]", '{"count": 1, "successes": 2}', '{"count": true, "successes": true}', '{"count": 3, "successes": -1}',
    '{"count": 3, "successes": 2.0}', ""])
def test_statistics_of_others_do_not_count(tmp_path, score_input, picture, statistics):
    """A file of that name that is none of img2dataset's is left alone, and the tar is read."""
    write_shard(tmp_path / "s", 0, [picture] * 2, parquet=False)
    (tmp_path / "s/00000_stats.json").write_text(statistics)
    _, rows, _, manifest = score_input("s")
    assert len(rows) == 2 and "counted_by" not in manifest["files"][0]
    assert manifest["left_aside"]["files ending in .json"]["count"] == 1


def test_more_or_fewer_pairs_than_counted(tmp_path, score_input, picture):
    """A tar that does not hold what the statistics count is one line and exit 3 that says what to do, and no row is scored."""
    for successes in (1, 3):
        write_shard(tmp_path / "s", 0, [picture] * 2, parquet=False)
        write_statistics(tmp_path / "s", 0, 5, successes)
        outcome = score_input("s", "--fresh")[0]
        assert_refused(outcome, f"00000.tar holds 2 pairs, but 00000_stats.json tells of {successes} rows", "remove", "--fresh")
    (tmp_path / "s/00000_stats.json").unlink()
    assert score_input("s", "--fresh")[0].result["scored"] == 2


def test_pairs_that_the_parquet_does_not_list(tmp_path, score_input, picture):
    """A tar with a pair that the Parquet does not list is refused when it is read; what it lacks of those listed is missing."""
    write_shard(tmp_path / "s", 0, [picture] * 2)
    whole = (tmp_path / "s/00000.tar").read_bytes()
    write_tar(tmp_path / "s/00000.tar", sample("000000000", picture, "c") + sample("another", picture, "c"))
    assert_refused(score_input("s")[0], "00000.tar holds 4 pairs, but 00000.parquet tells of 3 rows")
    (tmp_path / "s/00000.tar").write_bytes(whole[:len(whole) // 2])
    outcome, rows, *_ = score_input("s", "--fresh")
    assert outcome.code == 0 and "00000.tar is damaged" in outcome.stderr
    assert [row["status"] for row in rows] == ["ok", "empty_caption", "missing"]  # the second one's texts are cut away
    assert rows[2]["url"] == "http://x/000000002"
    (tmp_path / "s/00000.tar").write_bytes(b"no tar")
    assert_refused(score_input("s", "--fresh")[0], "00000.tar cannot be read as a tar")


@pytest.mark.parametrize("parquet", [True, False])
def test_lists_of_captions(tmp_path, score_input, picture, parquet):
    """Lists of captions, whose rows no statistics count, are counted by reading; one that comes as a surprise is refused."""
    write_shard(tmp_path / "s", 0, [picture] * 2, failed=0, parquet=parquet, caption=["a", "b"])
    if parquet:
        table = pq.read_table(tmp_path / "s/00000.parquet")
        lists = pa.array([["a", "b"], ["a", "b"]])
        pq.write_table(table.set_column(1, "caption", lists), tmp_path / "s/00000.parquet")
    outcome, rows, *_ = score_input("s")
    assert outcome.code == 0 and [row["caption"] for row in rows] == ["a", "b"] * 2
    members = [*sample("000000000", picture, "c"), ("000000001.jpg", picture), ("000000001.json", b'{"caption": ["a", "b"]}')]
    write_shard(tmp_path / "t", 0, [picture] * 2, failed=0, parquet=parquet)
    write_tar(tmp_path / "t/00000.tar", members)
    assert_refused(score_input("t", "--fresh")[0], "00000.tar holds lists of captions")


def test_fields_that_are_not_told(tmp_path, score_input, picture):
    """A field of the .json that neither the Parquet nor the first pair tells of is left aside, and named once."""
    write_shard(tmp_path / "s", 0, [picture] * 2, licence="free")
    outcome, rows, *_ = score_input("s")
    assert outcome.code == 0 and "licence" not in rows[0] and outcome.stderr.count("the fields licence") == 1


def test_tars_with_and_without_statistics(tmp_path, score_input, picture):
    """A tar without them among others is read to be planned, and the rows keep their order; `limit` ends where it should."""
    for number in range(4):
        write_shard(tmp_path / "s", number, [picture] * 2, failed=0, parquet=number == 1, statistics=number == 3)
    outcome, rows, _, manifest = score_input("s")
    assert outcome.code == 0 and [row["key"] for row in rows] == [f"{n:05d}000{i}" for n in range(4) for i in range(2)]
    counted = [file.get("counted_by") for file in manifest["files"]]
    assert counted == [None, "00001.parquet", None, "00003_stats.json"]
    outcome, rows, _, manifest = score_input("s", "--fresh", limit=5)
    assert len(rows) == 5 and len(manifest["files"]) == 3


def test_first_pair_in_the_beginning(tmp_path):
    """The first pair's fields are found behind a long image, and are {} for a pair without; not in what is no tar."""
    for members, found in (([("1.jpg", bytes(300_000)), ("1.json", b'{"a": 1}'), ("2.jpg", b"")], ["a"]),
                           ([("1.jpg", b"x"), ("2.json", b'{"a": 1}')], []), ([("1.json", b'{"a": 1, "b": 2}')], ["a", "b"]),
                           ([("1.jpg", b"x")], []), ([("1.json", b'{"caption": ["x"]}')], None), ([], None)):
        write_tar(tmp_path / "t.tar", members)
        assert tar_counts.find_fields(tars.InputFile("t.tar", str(tmp_path / "t.tar")), "caption") == found
    for junk in (b"", b"junk" * 300):
        (tmp_path / "t.tar").write_bytes(junk)
        assert tar_counts.find_fields(tars.InputFile("t.tar", str(tmp_path / "t.tar")), "caption") is None
