"""Datasets as the library `datasets` lays them out are scored, curated and exported to what it loads; tables keep columns."""
import base64
import io
import json
import pathlib
import tarfile

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

import curate
import image_text_sim_clip as script

SHAPES = script.ADDONS.parent / "challenge_set/shapes"
NAMES = [f"shape-{number:03d}.png" for number in range(12)]


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    """The real library, with its caches in tmp_path."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf/datasets"))
    return pytest.importorskip("datasets")


@pytest.fixture
def score_and_export(run_main, write_config, bundled_model, tmp_path):
    """Score an input and export what is kept; returns the summary and the folder of the export."""
    def run(csv_path, export, **keys):
        config = write_config(**{"csv_path": str(csv_path), "image_path": str(SHAPES), "pretrained_model": bundled_model,
                                 "parity_rows": 0, "curate": {"export": export}, **keys})
        outcome = run_main("--config", config, "--fresh")
        assert outcome.code == 0, outcome.stderr
        assert curate.main(["--config", str(config)]) == 0
        return outcome, tmp_path / "out/curated" / export
    return run


def make_dataset(datasets):
    """Images embedded in the table, with lists of captions, numbers and truth values."""
    features = datasets.Features({"image": datasets.Image(), "captions": datasets.List(datasets.Value("string")),
                                  "score": datasets.Value("float32"), "number": datasets.Value("int64"),
                                  "is_odd": datasets.Value("bool"), "licence": datasets.Value("string")})
    rows = [{"image": {"bytes": (SHAPES / name).read_bytes(), "path": name}, "captions": [f"a red circle {n}", "a star"],
             "score": n / 8, "number": n or None, "is_odd": n % 2 == 1, "licence": "CC0"} for n, name in enumerate(NAMES)]
    return datasets.Dataset.from_list(rows, features=features)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["to_parquet", "shards"])
def test_a_dataset_comes_back(tmp_path, datasets, score_and_export, layout):
    """Parquet as `datasets` writes it is scored, curated, and exported to an imagefolder that `datasets` loads, typed."""
    made = make_dataset(datasets)
    folder = tmp_path / "repo"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\n")
    (folder / ".gitattributes").write_text("*.parquet filter=lfs\n")
    shards = 1 if layout == "to_parquet" else 3
    for number in range(shards):  # what push_to_hub puts into data/
        made.shard(shards, number, contiguous=True).to_parquet(folder / f"data/train-{number:05d}-of-{shards:05d}.parquet")
    outcome, exported = score_and_export(folder, "imagefolder", url_column="image", caption_column="captions",
                                         image_path="nowhere", partition_rows=5)
    assert outcome.result["scored"] == 24 and outcome.result["input_rows"] == 12
    loaded = datasets.load_dataset("imagefolder", data_dir=str(exported), split="train")
    assert len(loaded) == 24
    first = loaded[2]
    assert first["image"].size == (64, 64) or first["image"].size[0] > 0
    assert (first["text"], first["number"], first["is_odd"], first["score"], first["licence"], first["caption_index"]) == (
        "a red circle 1", 1, True, 0.125, "CC0", 0)
    assert loaded[0]["number"] is None and loaded.features["number"].dtype == "int64"
    assert loaded.features["is_odd"].dtype == "bool" and "float" in loaded.features["score"].dtype
    files = sorted(pathlib.Path(exported).rglob("*.png"))
    assert files[0].read_bytes() == (SHAPES / NAMES[0]).read_bytes()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("export", ["webdataset", "imagefolder"])
def test_exports_keep_the_columns(tmp_path, score_and_export, kind, export):
    """The input's other columns are in the exports, numbers as such where the table had types; no two names clash."""
    rows = [{"url": name, "caption": "a star", "id": n, "size": n + 0.5, "ok": True, "text": "t", "row": "r", "mixed": n,
             "similarity": "s", "empty": None} for n, name in enumerate(NAMES[:3])]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    elif kind == "jsonl":
        rows[2]["mixed"] = "x"
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pa.csv.write_csv(pa.Table.from_pylist(rows), tmp_path / "t.csv")
    _, exported = score_and_export(tmp_path / f"t.{kind}", export)
    if export == "imagefolder":
        found = [json.loads(line) for line in (exported / "train/metadata.jsonl").read_text().splitlines()]
    else:
        with tarfile.open(exported / "kept-00000.tar") as tar:
            found = [json.loads(tar.extractfile(name).read()) for name in tar.getnames() if name.endswith(".json")]
    typed = kind != "csv"
    assert [row["id"] for row in found] == ([0, 1, 2] if typed else ["0", "1", "2"])
    assert [row["size"] for row in found] == ([0.5, 1.5, 2.5] if typed else ["0.5", "1.5", "2.5"])
    assert found[0]["ok"] in ((True,) if typed else ("true",)) and found[0]["text"] == "a star"
    assert (found[0]["input_text"], found[0]["input_row"], found[0]["input_similarity"]) == ("t", "r", "s")
    assert isinstance(found[0]["similarity"], float) and found[0]["row"] == 0
    assert [row["mixed"] for row in found] == ([0, 1, 2] if kind == "parquet" else ["0", "1", "x" if kind == "jsonl" else "2"])


def test_unsigned_numbers_keep_their_digits(tmp_path, score_and_export):
    """A column with whole numbers that need all of 64 bits is exported as text, which nobody rounds; others stay numbers."""
    table = pa.table({"url": NAMES[:3], "caption": ["a star"] * 3, "hash": pa.array([1, None, 2**64 - 1], pa.uint64()),
                      "small": pa.array([1, None, 2**63 - 1], pa.uint64())})
    pq.write_table(table, tmp_path / "t.parquet")
    _, exported = score_and_export(tmp_path / "t.parquet", "imagefolder")
    found = [json.loads(line) for line in (exported / "train/metadata.jsonl").read_text().splitlines()]
    assert [row["hash"] for row in found] == ["1", "", "18446744073709551615"]
    assert [row["small"] for row in found] == [1, None, 2**63 - 1]


@pytest.mark.slow
def test_names_of_files_stay_text(tmp_path, datasets, score_and_export):
    """Columns that `datasets` would take for paths of images come back as text, under other names."""
    rows = [{"url": name, "caption": "a star", "file_name": f"COCO_{n}.jpg", "mask_file_name": "m.png", "file_names": "a b",
             "profile_name": "p"} for n, name in enumerate(NAMES[:3])]
    pa.csv.write_csv(pa.Table.from_pylist(rows), tmp_path / "t.csv")
    _, exported = score_and_export(tmp_path / "t.csv", "imagefolder")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(exported), split="train")
    names = ("filename", "mask_filename", "filenames", "profile_name", "url")
    assert [loaded[1][name] for name in names] == ["COCO_1.jpg", "m.png", "a b", "p", NAMES[1]]


@pytest.mark.parametrize("rules", [{"one_caption_per_image": True}, {"duplicate_images": "exact"}])
def test_captions_of_a_data_uri(tmp_path, score_and_export, monkeypatch, rules):
    """Rows with one data: URI are of one image, as those with one URL are, and one_caption_per_image need not look at it."""
    uris = ["data:image/png;base64," + base64.b64encode((SHAPES / name).read_bytes()).decode() for name in NAMES[:2]]
    sources = [uris[0], NAMES[2], NAMES[2], uris[1], uris[0]]
    lines = [json.dumps({"url": url, "caption": [f"a red circle {n}", f"a blue star {n}"]}) for n, url in enumerate(sources)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    if "one_caption_per_image" in rules:
        monkeypatch.setattr(curate, "judge_images", None)
    score_and_export(tmp_path / "t.jsonl", "csv", curate=rules, partition_rows=4)
    kept = pyarrow.csv.read_csv(tmp_path / "out/curated/kept.csv").to_pylist()
    images = {sources[int(row["caption"].split()[-1])] for row in kept}
    assert len(images) == 3 and len(kept) == (3 if "one_caption_per_image" in rules else 10)


def test_a_folder_of_images_is_read_again(tmp_path, score_and_export):
    """Of a folder of images, these are exported, whatever lies under the same names in `image_path`."""
    for folder, names in (("in", NAMES[:3]), ("pictures", NAMES[3:6])):
        (tmp_path / folder / "deep").mkdir(parents=True)
        for number, name in enumerate(names):
            (tmp_path / folder / f"deep/{number}.png").write_bytes((SHAPES / name).read_bytes())
            (tmp_path / folder / f"deep/{number}.txt").write_text(f"a red circle {number}")
    _, exported = score_and_export(tmp_path / "in", "imagefolder", image_path=str(tmp_path / "pictures"))
    images = [path.read_bytes() for path in sorted(exported.rglob("*.png"))]
    assert images == [(SHAPES / name).read_bytes() for name in NAMES[:3]]


def write_tar_of(path, order):
    with tarfile.open(path, "w") as tar:
        for number in order:
            for ending, content in (("png", (SHAPES / NAMES[number]).read_bytes()), ("txt", b"a red circle %d" % number)):
                member = tarfile.TarInfo(f"{number:03d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_parquet_of(path, order):
    images = [{"bytes": (SHAPES / NAMES[number]).read_bytes(), "path": f"{number}.png"} for number in order]
    rows = [{"image": image, "caption": f"a red circle {number}"} for image, number in zip(images, order, strict=True)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)


@pytest.mark.parametrize(("name", "write"), [("t.tar", write_tar_of), ("t.parquet", write_parquet_of)])
def test_images_of_another_input_are_not_exported(tmp_path, score_and_export, name, write):
    """Images that are found by their place in an input are not read from another one: neither replaced nor named since."""
    write(tmp_path / name, range(4))
    write(tmp_path / f"other-{name}", [3, 1, 2, 0])
    _, exported = score_and_export(tmp_path / name, "imagefolder", url_column="image", image_path="nowhere")
    written = sorted(exported.rglob("*"))
    arguments = ["--config", str(tmp_path / "config.yaml"), "--set", "curate.export=webdataset"]
    with pytest.raises(script.Trouble, match="is not what was scored") as trouble:
        curate.main([*arguments, "--set", f"csv_path={tmp_path / f'other-{name}'}"])
    assert trouble.value.exit_code == script.EXIT_INPUT
    (tmp_path / f"other-{name}").replace(tmp_path / name)
    with pytest.raises(script.Trouble, match="is not what was scored"):
        curate.main(arguments)
    assert sorted(exported.rglob("*")) == written and not (tmp_path / "out/curated/webdataset").exists()
    assert curate.main([*arguments, "--set", "curate.export=parquet"]) == 0


@pytest.mark.parametrize("rules", [{"one_caption_per_image": True}, {"duplicate_images": "exact"}])
def test_images_of_one_name_in_a_table(tmp_path, score_and_export, rules):
    """Images inside a table are one by their path and bytes: `datasets` keeps of a path no more than the file's name."""
    images = [0, 1, 0, 2, 2, 0]  # the third has another name, the fourth the first one's
    paths = ["a.png", "b.png", "c.png", "a.png", "a.png", "a.png"]
    rows = [{"image": {"bytes": (SHAPES / NAMES[number]).read_bytes(), "path": path}, "caption": f"a red circle {n}"}
            for n, (number, path) in enumerate(zip(images, paths, strict=True))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=2)
    score_and_export(tmp_path / "t.parquet", "csv", url_column="image", image_path="nowhere",
                     curate=rules, partition_rows=3)
    kept = pyarrow.csv.read_csv(tmp_path / "out/curated/kept.csv").to_pylist()
    found = [int(row["caption"].rpartition(" ")[2]) for row in kept]
    groups = [{0, 5}, {1}, {2}, {3, 4}]
    if "duplicate_images" in rules:  # the captions of one path and content stay, those of equal bytes elsewhere go
        assert {1, 3, 4} <= set(found) and set(found) & {0, 2, 5} in ({0, 5}, {2})
    else:
        assert [len(group & set(found)) for group in groups] == [1, 1, 1, 1] and len(found) == 4
