"""Exports: what other programs load, and what an interruption leaves."""
import functools
import hashlib
import http.server
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import BUNDLED_MODEL
from finished_run import last_json, write_finished_run

import image_text_sim_clip as script

ROOT = pathlib.Path(__file__).resolve().parent.parent
CAPTIONS = ['a "red" circle', "line\nbreak", "naïve – ünïcode 🎨", "<script>alert(1)</script>", "NA", "comma, comma", "six",
            "seven"]


@pytest.fixture
def finished(tmp_path, write_config, picture_bytes):
    """Eight scored rows of six images in five formats, the last row below the cut, and a config that keeps the others."""
    config, pictures = write_config(curate={"min_similarity": 0.2}), tmp_path / "pictures"
    names = ["a.png", "b.jpg", "c.webp", "d.gif", "e.png", "f.bmp"]
    for number, name in enumerate(names):
        kind = {"jpg": "JPEG"}.get(name[2:], name[2:].upper())
        (pictures / name).write_bytes(picture_bytes(kind, size=(20 + number, 10), colour=40 * number))
    sources = [*names[:5], "a.png", "http://example.org/path/b.jpg", "f.bmp"]
    write_finished_run(tmp_path / "out", np.linspace(0.9, 0.1, 8), CAPTIONS, sources, random=np.linspace(-0.2, 0.2, 50),
                       partition_rows=3)
    return config


STOPS_EARLY = """
import os, sys
import image_text_sim_clip as scoring
left, plain = int(sys.argv.pop(1)), scoring.atomic_file
class Dying:  # the process is gone in the middle of writing a file of the export, with no time to tidy up
    def __init__(self, file): self.file = file
    def write(self, data):
        global left
        left -= 1
        if left == 0:
            self.file.write(data[:len(data) // 2])
            self.file.flush()
            os._exit(9)
        return self.file.write(data)
    def __getattr__(self, name): return getattr(self.file, name)
import contextlib
@contextlib.contextmanager
def atomic_file(path):
    with plain(path) as file:
        yield Dying(file) if path.parent.name != "curated" else file
scoring.atomic_file = atomic_file  # before the exports import it
import curate
curate.draw_plots = lambda *_: None
sys.exit(curate.main(sys.argv[1:]))
"""


def curate_in_process(config, *keys, dies_at=0):
    command = [sys.executable, "-c", STOPS_EARLY, str(dies_at), "--config", str(config), *(f"--set=curate.{k}" for k in keys)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60)


def tree_of(folder):
    """Every file below the folder with its hash."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "moments"), [("imagefolder", (1, 4, 10)), ("webdataset", (1, 9, 20))])
def test_interrupted_export_resumes_to_identical_files(finished, tmp_path, kind, moments):
    """A process killed in the middle of a write, again and again, leaves nothing that a rerun does not put right."""
    keys, folder = (f"export={kind}", "shard_rows=3"), tmp_path / "out/curated"
    assert curate_in_process(finished, *keys).returncode == 0
    expected = tree_of(folder)
    assert len(expected) >= 6
    shutil.rmtree(folder)
    for moment in moments:
        done = curate_in_process(finished, *keys, dies_at=moment)
        assert done.returncode == 9, done.stderr
        assert tree_of(folder) != expected
    done = curate_in_process(finished, *keys)
    assert done.returncode == 0, done.stderr
    assert tree_of(folder) == expected
    assert last_json(done.stdout)["exported"] == 7


@pytest.mark.slow
def test_imagefolder_loads_with_datasets(finished, run_curate_main, tmp_path, monkeypatch):
    """load_dataset("imagefolder") gives each kept row: the image that was scored, its caption and its scores."""
    datasets = pytest.importorskip("datasets")
    assert run_curate_main(finished, export="imagefolder")["exported"] == 7
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "out/curated/imagefolder"),
                                   cache_dir=str(tmp_path / "cache"), split="train")
    assert loaded.num_rows == 7
    assert loaded.column_names == ["image", "text", "row", "url", "similarity", "dissimilarity"]
    rows = sorted(loaded, key=lambda row: row["row"])
    assert [row["text"] for row in rows] == CAPTIONS[:7]
    assert [row["image"].width for row in rows] == [20, 21, 22, 23, 24, 20, 21]
    expected = np.linspace(0.9, 0.1, 8).astype(np.float32)[:7]
    assert np.array([row["similarity"] for row in rows], np.float32).tolist() == expected.tolist()
    assert all(abs(row["similarity"] + row["dissimilarity"] - 1) < 1e-6 for row in rows)


@pytest.mark.slow
def test_webdataset_loads_with_webdataset(finished, run_curate_main, tmp_path):
    """The tars hold an image, a caption and the scores under each key, shard after shard."""
    webdataset = pytest.importorskip("webdataset")
    assert run_curate_main(finished, export="webdataset", shard_rows=3)["exported"] == 7
    shards = sorted(map(str, (tmp_path / "out/curated/webdataset").glob("*.tar")))
    assert [pathlib.Path(s).name for s in shards] == ["kept-00000.tar", "kept-00001.tar", "kept-00002.tar"]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode("pil"))
    assert [sample["txt"] for sample in samples] == CAPTIONS[:7]
    assert [sample["json"]["row"] for sample in samples] == list(range(7))
    images = [next(sample[k] for k in ("png", "jpg", "webp", "gif") if k in sample) for sample in samples]
    assert [image.width if hasattr(image, "width") else 0 for image in images][:2] == [20, 21]
    assert samples[0]["json"]["similarity"] == pytest.approx(0.9)


@pytest.fixture
def run_curate_main(monkeypatch, capfd):
    """Run curate.main without plots and return its JSON: run_curate_main(config, export="parquet")."""
    import curate

    def run(config, **keys):
        monkeypatch.setattr(curate, "draw_plots", lambda *_: None)
        assert curate.main(["--config", str(config), *(f"--set=curate.{k}={json.dumps(v)}" for k, v in keys.items())]) == 0
        return last_json(capfd.readouterr().out)
    return run


def test_parquet_has_types(finished, run_curate_main, tmp_path):
    """kept.parquet holds the columns of scores.csv: text as text, numbers as float32."""
    run_curate_main(finished, export="parquet")
    table = pq.read_table(tmp_path / "out/curated/kept.parquet")
    assert table.column_names == ["url", "caption", *script.column_names(script.RESULT_COLUMNS)]
    assert table["caption"].to_pylist() == CAPTIONS[:7]
    assert str(table.schema.field("similarity").type) == str(table.schema.field("random_percentile").type) == "float"
    assert all(0 <= share <= 1 for share in table["percentile"].to_pylist())


def test_images_are_the_scored_bytes(finished, run_curate_main, tmp_path):
    """The export copies files as they are, under the ending of what they really are."""
    pictures = tmp_path / "pictures"
    (pictures / "a.png").rename(pictures / "a.tmp")
    shutil.copy(pictures / "b.jpg", pictures / "a.png")  # a JPEG by the name of a PNG
    run_curate_main(finished, export="imagefolder")
    folder = tmp_path / "out/curated/imagefolder/train/00000"
    assert sorted(path.name for path in folder.iterdir())[:2] == ["000000000.jpg", "000000001.jpg"]
    assert (folder / "000000000.jpg").read_bytes() == (pictures / "b.jpg").read_bytes()


def test_another_choice_never_mixes_with_the_last(finished, run_curate_main, tmp_path):
    """An export of other rows is removed before the new one is written; the same one is not written again."""
    folder = tmp_path / "out/curated"
    run_curate_main(finished, export="imagefolder")
    metadata = folder / "imagefolder/train/metadata.jsonl"
    written = metadata.stat().st_mtime_ns
    assert run_curate_main(finished, export="imagefolder")["exported"] == 7
    assert metadata.stat().st_mtime_ns == written
    assert run_curate_main(finished, export="imagefolder", min_similarity=0.5)["exported"] == 4
    assert len(list((folder / "imagefolder/train/00000").iterdir())) == 4
    before = tree_of(folder / "imagefolder")
    for kind in ("csv", "parquet", "webdataset"):  # trying another choice costs no export of another kind
        run_curate_main(finished, export=kind, min_similarity=0.3)
    assert tree_of(folder / "imagefolder") == before


def test_tables_of_another_choice_go(finished, run_curate_main, tmp_path):
    """kept.parquet and not_exported.csv are of the rows in kept.csv: those of an earlier choice are not left next to it."""
    (tmp_path / "pictures/c.webp").unlink()
    folder = tmp_path / "out/curated"
    run_curate_main(finished, export="imagefolder")
    assert (folder / "not_exported.csv").exists()
    run_curate_main(finished, export="parquet")
    assert (folder / "not_exported.csv").exists()
    run_curate_main(finished, export="parquet", min_similarity=0.3)
    assert (folder / "kept.parquet").exists() and not (folder / "not_exported.csv").exists()
    run_curate_main(finished, min_similarity=0.3)
    assert (folder / "kept.parquet").exists()
    run_curate_main(finished, min_similarity=0.5)
    assert not (folder / "kept.parquet").exists()
    (folder / "kept.parquet").write_bytes(b"none of ours")
    run_curate_main(finished, min_similarity=0.5)
    assert not (folder / "kept.parquet").exists()


@pytest.mark.parametrize("kind", ["imagefolder", "webdataset"])
def test_export_behind_a_link(finished, run_curate_main, tmp_path, kind):
    """An export's folder may be a link to another disk: the link stays, and what lies behind it is of one choice alone."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out/curated").mkdir()
    (tmp_path / "out/curated" / kind).symlink_to(tmp_path / "disk")
    assert run_curate_main(finished, export=kind)["exported"] == 7
    assert run_curate_main(finished, export=kind, min_similarity=0.5)["exported"] == 4
    assert (tmp_path / "out/curated" / kind).is_symlink()
    linked = tree_of(tmp_path / "disk")
    (tmp_path / "out/curated" / kind).unlink()
    run_curate_main(finished, export=kind, min_similarity=0.5)
    assert tree_of(tmp_path / "out/curated" / kind) == linked


@pytest.mark.parametrize("kind", ["imagefolder", "webdataset"])
def test_image_that_is_gone(finished, run_curate_main, tmp_path, kind):
    """A kept row whose image is gone is listed in not_exported.csv, and exported once it is back."""
    image = tmp_path / "pictures/c.webp"
    image.rename(tmp_path / "elsewhere")
    outcome = run_curate_main(finished, export=kind)
    assert (outcome["kept"], outcome["exported"], outcome["not_exported"]) == (7, 6, 1)
    listed = (tmp_path / "out/curated/not_exported.csv").read_text()
    assert listed.startswith("row,url,reason\n2,c.webp,missing")
    (tmp_path / "elsewhere").rename(image)
    outcome = run_curate_main(finished, export=kind)
    assert (outcome["exported"], outcome["not_exported"]) == (7, 0)
    assert not (tmp_path / "out/curated/not_exported.csv").exists()
    folder = tmp_path / "out/curated" / kind
    names = {path.name for path in folder.rglob("*.webp")}
    for path in folder.rglob("*.tar"):
        with tarfile.open(path) as tar:
            names.update(tar.getnames())
    assert "000000002.webp" in names


def test_images_of_urls_come_from_the_cache(tmp_path, run_main, run_curate_main, write_config, write_table, picture_bytes):
    """With cache_path what was scored from the web is exported without asking the web again."""
    data = picture_bytes("JPEG")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/a.jpg"
    write_table([["url", "caption"], [url, "one"], [url, "two"]])
    config = write_config(image_path="url", cache_path=str(tmp_path / "cache"), allow_private_hosts=True, loader_threads=1)
    assert run_main("--config", config).result["scored"] == 2
    server.shutdown()
    server.server_close()
    shutil.rmtree(tmp_path / "out")
    write_finished_run(tmp_path / "out", [0.3, 0.4], ["one", "two"], [url, url])
    assert run_curate_main(config, export="imagefolder")["exported"] == 2
    assert (tmp_path / "out/curated/imagefolder/train/00000/000000001.jpg").read_bytes() == data


@pytest.mark.slow
def test_tars_in_tars_out(shapes, run_main, run_curate_main, write_config, tmp_path):
    """What was exported as webdataset can be scored from its tars and curated again: the same images and captions."""
    first = shapes(rows=30, pretrained_model=BUNDLED_MODEL)
    assert run_main("--config", first).code == 0
    assert run_curate_main(first, export="webdataset", shard_rows=7, max_random_rate=0.05)["exported"] > 10
    tars = tmp_path / "out/curated/webdataset"
    again = write_config("again.yaml", csv_path=str(tars), image_path=str(tmp_path / "nowhere"), caption_column="text",
                         pretrained_model=BUNDLED_MODEL, output_path=str(tmp_path / "again"))
    outcome = run_main("--config", again)
    assert outcome.code == 0, outcome.stderr
    kept = run_curate_main(again, export="imagefolder", duplicate_images="exact", min_width=10, review=True)
    assert kept["exported"] == kept["kept"] == outcome.result["scored"] > 10
    lines = (tmp_path / "again/curated/imagefolder/train/metadata.jsonl").read_text().splitlines()
    names = [json.loads(line) for line in lines]
    for line in names:
        exported = tmp_path / "again/curated/imagefolder/train" / line["file_name"]
        assert exported.read_bytes() == (ROOT / "challenge_set/shapes" / line["url"]).read_bytes()
    captions = [caption.decode() for path in sorted(tars.glob("*.tar")) for caption in texts_of(path)]
    assert [line["text"] for line in names] == captions


def texts_of(path):
    """The .txt members of a tar, in order."""
    with tarfile.open(path) as tar:
        return [tar.extractfile(member).read() for member in tar if member.name.endswith(".txt")]


class Killed(BaseException):
    """Stands for kill -9."""


@pytest.mark.parametrize("kind", ["imagefolder", "webdataset"])
def test_export_killed_while_it_removes_another(finished, run_curate_main, monkeypatch, tmp_path, kind):
    """Whenever a run of rule B dies while it takes A's files away, A again ends with all of A's files, and B with B's."""
    folder = tmp_path / "out/curated"
    first = {"export": kind, "shard_rows": 2}
    second = first | {"keep_fraction": 0.5}
    run_curate_main(finished, **first)
    wanted = tree_of(folder)
    real = {name: getattr(os, name) for name in ("unlink", "rename", "rmdir")}
    died = 0
    for number in range(1, 40):
        calls = []

        def die(name, *arguments, number=number, calls=calls, **options):
            calls.append(name)
            if len(calls) == number:
                raise Killed
            return real[name](*arguments, **options)
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, functools.partial(die, name))
            try:
                run_curate_main(finished, **second)
            except Killed:
                died += 1
        state = json.loads((folder / f"{kind}.json").read_text()) if (folder / f"{kind}.json").exists() else {}
        assert state.get("complete") is not True or (folder / kind).exists()
        run_curate_main(finished, **first)
        assert tree_of(folder) == wanted, number
        if len(calls) < number:
            break
    assert died >= 5


@pytest.mark.parametrize("damage", ["gone", "cut", "one more", "state"])
def test_export_that_is_not_as_it_was_is_written_anew(finished, run_curate_main, tmp_path, damage):
    """An export whose files are fewer, other in length or more than when it was complete is not taken for complete."""
    folder = tmp_path / "out/curated"
    run_curate_main(finished, export="imagefolder")
    wanted = tree_of(folder)
    image = next((folder / "imagefolder").rglob("*.png"))
    if damage == "gone":
        image.unlink()
    elif damage == "cut":
        image.write_bytes(image.read_bytes()[:-5])
    elif damage == "one more":
        image.with_name("another.png").write_bytes(b"not of this export")
    else:
        state = folder / "imagefolder.json"
        state.write_text(state.read_text().replace('"exported": 7', '"exported": 8'))
    assert run_curate_main(finished, export="imagefolder")["exported"] == 7
    assert tree_of(folder) == wanted


@pytest.mark.parametrize(("kind", "own"), [("imagefolder", "README.md"), ("imagefolder", "train/00000/000000002.txt"),
                                           ("webdataset", "kept-00000.idx"), ("webdataset", "index/sizes.json")])
def test_what_others_laid_next_to_an_export_stays(finished, run_curate_main, tmp_path, kind, own):
    """A card or an index next to an export leaves it complete, also once the images are gone; it is not removed unasked."""
    target = tmp_path / "out/curated" / kind
    run_curate_main(finished, export=kind)
    (target / own).parent.mkdir(exist_ok=True)
    (target / own).write_text("mine")
    (target / ".cache").mkdir()
    (target / ".cache/state").write_text("not worth a word")
    wanted = tree_of(target)
    shutil.rmtree(tmp_path / "pictures")
    (tmp_path / "pictures").mkdir()
    assert run_curate_main(finished, export=kind)["exported"] == 7
    assert tree_of(target) == wanted
    with pytest.raises(script.Trouble, match=f"holds files that curate.py has not written, such as {own}") as caught:
        run_curate_main(finished, export=kind, min_similarity=0.5)
    assert caught.value.exit_code == 2 and tree_of(target) == wanted
    (target / own).unlink()
    run_curate_main(finished, export=kind, min_similarity=0.5)
    assert not (target / ".cache").exists()


def test_what_others_laid_next_to_an_image_is_no_image(finished, run_curate_main, tmp_path):
    """An export that goes on finds its own images, whatever has their names otherwise."""
    run_curate_main(finished, export="imagefolder")
    train = tmp_path / "out/curated/imagefolder/train"
    wanted = (train / "metadata.jsonl").read_text()
    for name in ("000000000", "000000002"):
        (train / "00000" / f"{name}.txt").write_text("mine")
        (train / "00000" / f"{name}.zip").write_text("mine")
    state = tmp_path / "out/curated/imagefolder.json"
    script.write_sealed(state, script.read_sealed(state) | {"complete": False})
    (train / "metadata.jsonl").unlink()
    assert run_curate_main(finished, export="imagefolder")["exported"] == 7
    assert (train / "metadata.jsonl").read_text() == wanted


def test_an_export_in_a_bucket_is_looked_at_by_listing(finished, run_curate_main, tmp_path, bucket, monkeypatch):
    """Whether an export in a store is complete takes a listing, and no request for each of its files."""
    import curate
    from addons.stores import remote
    bucket.put_folder(tmp_path / "out", "out")
    keys = ["--config", str(finished), "--set", f"output_path={bucket.url('out')}", "--set", "curate.export=imagefolder"]
    monkeypatch.setattr(curate, "draw_plots", lambda *_: None)
    assert curate.main(keys) == 0
    asked = []
    stat = remote.RemoteStore.stat
    monkeypatch.setattr(remote.RemoteStore, "stat", lambda self, path: asked.append(path) or stat(self, path))
    assert curate.main(keys) == 0
    assert [path for path in asked if "/imagefolder/" in path] == []
    (image, *_) = [name for name in bucket.names("out/curated/imagefolder") if name.endswith(".png")]
    bucket.fs.rm_file(f"{bucket.name}/{image}")
    assert curate.main(keys) == 0
    assert image in bucket.names("out/curated/imagefolder")


def test_images_in_a_bucket_are_read_side_by_side(finished, run_curate_main, tmp_path, bucket, monkeypatch):
    """As many images of a store are waited for at a time as URLs: not one for each core."""
    from addons.stores import images
    bucket.put_folder(tmp_path / "pictures", "images")
    fetch = images.PrefixSource.fetch
    together = threading.Barrier(2, timeout=20)

    def fetch_together(self, source):
        if source in ("a.png", "b.jpg"):  # of the first partition
            together.wait()
        return fetch(self, source)
    monkeypatch.setattr(images.PrefixSource, "fetch", fetch_together)
    config = yaml.safe_load(finished.read_text())
    finished.write_text(yaml.safe_dump(config | {"image_path": bucket.url("images"), "loader_threads": 1}))
    assert run_curate_main(finished, duplicate_images="exact", min_similarity=0.65)["kept"] == 3
