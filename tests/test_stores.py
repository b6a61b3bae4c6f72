"""Tables and images in object stores: read through fsspec, to the same bytes as from a disk."""
import http.server
import json
import pathlib
import threading
import unicodedata

import pytest
import store_server
from test_inputs import sample, write_parquet, write_tar

import image_text_sim_clip as script
from addons import stores
from addons.images.cache import Cache
from addons.stores import local, remote
from addons.stores.paths import StorePath

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHAPES_FOLDER = ROOT / "challenge_set/shapes"


def results_of(folder):
    """The bytes of the results and of every part in a local folder."""
    paths = [pathlib.Path(folder, "scores.csv"), *sorted(pathlib.Path(folder, "parts").glob("*.parquet"))]
    return {path.name: path.read_bytes() for path in paths}


@pytest.fixture
def picture(picture_bytes):
    return picture_bytes("JPEG")


@pytest.mark.slow
def test_demo_from_a_bucket(bucket, shapes, run_main, tmp_path):
    """With everything in a bucket, or the table and the images alone, the demo's scores and parts are those of a disk."""
    keys = {"pretrained_model": str(ROOT / "challenge_set/shapes_clip"), "partition_rows": 25}
    assert run_main("--config", shapes(rows=60, output_path=str(tmp_path / "local"), **keys)).code == 0
    table = bucket.put("pairs/table.csv", (tmp_path / "table.csv").read_bytes())
    images = bucket.put_folder(SHAPES_FOLDER, "images")
    config = shapes(rows=60, **keys)
    outcome = run_main("--config", config, "--set", f"csv_path={table}", "--set", f"image_path={images}",
                       "--set", f"output_path={tmp_path / 'remote'}")
    assert outcome.code == 0, outcome.stderr
    local = results_of(tmp_path / "local")
    assert results_of(tmp_path / "remote") == local
    outcome = run_main("--config", config, "--set", f"csv_path={table}", "--set", f"image_path={images}",
                       "--set", f"output_path={bucket.url('out')}")
    assert outcome.code == 0, outcome.stderr
    there = {name.rpartition("/")[2]: bucket.read(name) for name in bucket.names("out")}
    assert {name: there[name] for name in local} == local


def write_tables(folder, picture):
    """A table of each kind in `folder`; returns what csv_path is for each."""
    (folder / "t.csv").write_text("url,caption\n1.png,one\n2.png,two\nbad\n", encoding="utf-8")
    (folder / "t.tsv").write_text("url\tcaption\n1.png\tone\n", encoding="utf-8")
    (folder / "t.jsonl").write_text('{"url": "1.png", "caption": "one"}\n{"url": "2.png"}\nx\n', encoding="utf-8")
    (folder / "shards").mkdir()
    write_parquet(folder / "shards/a-0.parquet")
    write_parquet(folder / "shards/a-1.parquet", start=10)
    (folder / "tars").mkdir()
    for number in range(2):
        write_tar(folder / f"tars/0000{number}.tar", sample("0", picture, "one") + sample("1", picture, "two"))
    (folder / "folder").mkdir()
    for number in range(3):
        (folder / f"folder/{number}.jpg").write_bytes(picture)
        (folder / f"folder/{number}.txt").write_text(f"caption {number}")
    return ["t.csv", "t.tsv", "t.jsonl", "shards", "shards/*.parquet", "tars/{00000..00001}.tar", "tars", "folder"]


@pytest.mark.parametrize("number", range(8))
def test_tables_of_each_kind(bucket, score_input, tmp_path, picture, number):
    """A table of each kind, and a folder, a glob or a pattern of them, gives the same results from a bucket as from a disk."""
    (tmp_path / "in").mkdir()
    name = write_tables(tmp_path / "in", picture)[number]
    bucket.put_folder(tmp_path / "in", "in")
    assert score_input(f"in/{name}", output_path=str(tmp_path / "local"))[0].code == 0
    config = {"csv_path": bucket.url(f"in/{name}"), "output_path": str(tmp_path / "remote")}
    arguments = [argument for key, value in config.items() for argument in ("--set", f"{key}={value}")]
    outcome = score_input("in/t.csv", *arguments)[0]
    assert outcome.code == 0, outcome.stderr
    assert results_of(tmp_path / "remote") == results_of(tmp_path / "local")
    assert score_input("in/t.csv", *arguments)[0].code == 0


@pytest.fixture
def score_bucket(bucket, write_config, run_main, read_table, tmp_path):
    """Dry-run rows (url, caption) over the images at image_path: (Outcome, rows of scores.csv)."""
    def run(rows, image_path, **keys):
        text = "url,caption\n" + "".join(f"{url},{caption}\n" for url, caption in rows)
        path = bucket.put("t.csv", text.encode())
        outcome = run_main("--config", write_config(csv_path=path, image_path=image_path, **keys))
        return outcome, read_table(tmp_path / "out/scores.csv") if (tmp_path / "out/scores.csv").exists() else None
    return run


def test_images_below_a_prefix(bucket, score_bucket, picture):
    """Names are found below the prefix as in a folder, by a URL's endings too, and a URL of the store is that object."""
    odd = "ä b#c?d%20[e]+&=.jpg"
    for name in ("a.jpg", "deep/er/b.jpg", odd, "x/c.jpg"):
        bucket.put(f"images/{name}", picture)
    bucket.put("other/z.jpg", picture)
    bucket.put("images/none.jpg", b"")
    rows = [("a.jpg", "ok"), ("./deep//er/../er/b.jpg", "ok"), (odd, "ok"), ("http://h/q/x/c.jpg?w=1", "ok"),
            (bucket.url("images/a.jpg"), "ok"), ("nothing.jpg", "missing"), ("deep", "missing"),
            ("../images/a.jpg", "ok"), ("../../../../images/a.jpg", "forbidden"), ("../other/z.jpg", "forbidden"),
            ("/images/a.jpg", "forbidden"), (bucket.url("other/z.jpg"), "forbidden"),
            ("none.jpg", "not_image"),
            ("y" * 1100, "missing"), ("s3://another/a.jpg", "forbidden")]
    outcome, scored = score_bucket(rows, bucket.url("images"))
    assert outcome.code == 0, outcome.stderr
    assert [row["status"] for row in scored] == [status for _, status in rows]


def test_names_spelled_otherwise(bucket, score_bucket, picture):
    """A name that is not there as the table has it is looked for as in a folder, in other spellings."""
    composed = unicodedata.normalize("NFC", "é.jpg")
    for name in ("a b.jpg", f"deep/{unicodedata.normalize('NFD', composed)}", "c%20d.jpg"):
        bucket.put(f"images/{name}", picture)
    rows = [("a%20b.jpg", "ok"), (f"deep\\{composed}", "ok"), (f"http://h/x/deep/{composed}", "ok"), ("c%20d.jpg", "ok"),
            ("c d.jpg", "missing"), ("%2e%2e/t.csv", "forbidden")]
    scored = score_bucket(rows, bucket.url("images"))[1]
    assert [row["status"] for row in scored] == [status for _, status in rows]


@pytest.mark.parametrize("anon", [False, True])
def test_steps_out_of_a_prefix(bucket, write_config, picture, monkeypatch, anon):
    """No step `..` in a URL of the store leads out of the prefix, though clients on the way would go there; `.` is no step."""
    from addons.stores import images
    for name in ("images/a.jpg", "images/deep/b.jpg", "other/z.jpg"):
        bucket.fs.pipe_file(f"{bucket.name}/{name}", picture, ACL="public-read")
    config = script.load_config(write_config())
    monkeypatch.setitem(stores._OPTIONS, "anon", anon)
    read = images.open_prefix(config, bucket.url("images"))
    for name in ("../other/z.jpg", "deep/../../other/z.jpg", "deep/../a.jpg"):
        with pytest.raises(script.RowFailure) as failure:
            read(bucket.url(f"images/{name}"))
        assert failure.value.status == "forbidden"
    assert read(bucket.url("images/deep/b.jpg")) == picture
    with pytest.raises(FileNotFoundError):
        remote.STORE.read_range(bucket.url("images/../other/z.jpg"), 0, 10)


@pytest.mark.parametrize("pattern", ["*.csv", "*", "**/*.csv", "*/*.csv", ".*", ".hidden/*.csv", "d/.*.csv", "*/.b.csv",
                                     "[a-z.]*.csv", "?hidden.csv", ".hidden/.*"])
def test_wildcards_name_what_they_name_on_a_disk(bucket, tmp_path, pattern):
    """A wildcard stands for the same files in a store as on a disk: for hidden ones only where the pattern says so."""
    for name in ("a.csv", ".hidden.csv", "d/b.csv", "d/.b.csv", ".hidden/c.csv", ".hidden/.d.csv", "d/e/f.csv", "d/.g/h.csv"):
        bucket.put(f"in/{name}", b"x")
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
    on_disk = [path for path in local.STORE.glob(f"{tmp_path}/in/{pattern}") if pathlib.Path(path).is_file()]
    in_store = [path for path in remote.STORE.glob(bucket.url(f"in/{pattern}")) if remote.STORE.info(path)]
    assert [path.removeprefix(bucket.url()) for path in in_store] == [path.removeprefix(str(tmp_path)) for path in on_disk]


def test_image_larger_than_allowed(bucket, score_bucket, picture):
    """An object larger than max_image_bytes is not read further, and its size is told."""
    bucket.put("images/a.jpg", picture + b"0" * 5000)
    scored = score_bucket([("a.jpg", "x")], bucket.url("images"), max_image_bytes=3000)[1]
    assert scored[0]["status"] == "too_large" and scored[0]["detail"] == f"{len(picture) + 5000} bytes"


@pytest.mark.parametrize(("key", "path", "says"), [
    ("csv_path", "s3://no-such-bucket-here/t.csv", "no such file"), ("csv_path", "{bucket}/no.csv", "no such file"),
    ("csv_path", "{bucket}/*.parquet", "names no"), ("image_path", "s3://no-such-bucket-here/images", "no objects below"),
    ("image_path", "{bucket}/nothing", "no objects below")])
def test_what_is_not_there(bucket, key, path, says, write_config, write_table, run_main):
    """A bucket, an object or a prefix that is not there is one line and exit 3."""
    write_table("url,caption\n1.png,x\n")
    outcome = run_main("--config", write_config(**{key: path.format(bucket=bucket.url())}))
    assert outcome.code == 3 and says in outcome.stderr and len(outcome.stderr.splitlines()) == 1


def test_table_that_is_replaced_between_runs(bucket, score_bucket, picture, run_main, write_config):
    """Another object under a table's or a shard's name is another input, even with the same size."""
    bucket.put("images/a.jpg", picture)
    assert score_bucket([("a.jpg", "one")], bucket.url("images"))[0].code == 0
    outcome = score_bucket([("a.jpg", "two")], bucket.url("images"))[0]
    assert outcome.code == 2 and "has changed" in outcome.stderr and len(outcome.stderr.splitlines()) == 1


def test_secrets_stay_secret(bucket, score_bucket, picture, tmp_path, s3_endpoint, monkeypatch, run_main, write_config):
    """Credentials in storage_options are used, and found neither in a file of the results nor in what is said."""
    for name in store_server.CREDENTIALS:
        monkeypatch.delenv(name)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    bucket.put("images/a.jpg", picture)
    options = {"s3": {"key": "AKIAOFNOBODYATALL", "secret": "hush-hush-hush", "endpoint_url": s3_endpoint}}
    outcome, scored = score_bucket([("a.jpg", "one")], bucket.url("images"), storage_options=options)
    assert outcome.code == 0 and scored[0]["status"] == "ok"
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    wrong = run_main("--config", write_config(csv_path=bucket.url("t.csv"), storage_options="secret=hush-hush-hush"))
    told = outcome.stderr + outcome.stdout + wrong.stderr + repr(script.Config(storage_options=options))
    assert wrong.code == 2 and b"hush" not in written and b"AKIAOF" not in written
    assert "hush" not in told and "AKIAOF" not in told
    stores.set_storage_options({})


def test_errors_without_secrets(monkeypatch):
    """What a store's client says is one line, without the secrets of the process and the signatures of URLs."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "top-secret-thing")
    said = remote.without_secrets("no\nhttps://h/x?X-Amz-Signature=abc123&y=1 with top-secret-thing")
    assert said == "no https://h/x?X-Amz-Signature=***&y=1 with ***"


def test_options_for_all_or_for_one_store():
    """A section under a scheme's name is for that store, every other key for all."""
    stores.set_storage_options({"anon": True, "client_kwargs": {"x": 1}, "s3": {"endpoint_url": "u"}})
    assert stores.storage_options("s3", ("s3", "gs")) == {"anon": True, "client_kwargs": {"x": 1}, "endpoint_url": "u"}
    assert stores.storage_options("gs", ("s3", "gs")) == {"anon": True, "client_kwargs": {"x": 1}}
    stores.set_storage_options({})


def test_memory_store(picture, score_input, tmp_path):
    """What lies in memory:// is read like any other store."""
    import fsspec
    system = fsspec.filesystem("memory")
    system.pipe_file("/m/t.csv", b"url,caption\na.jpg,x\n")
    system.pipe_file("/m/images/a.jpg", picture)
    outcome, rows, *_ = score_input("x", "--set", "csv_path=memory://m/t.csv", "--set", "image_path=memory://m/images")
    assert outcome.code == 0 and rows[0]["status"] == "ok"
    assert json.loads((tmp_path / "out/manifest.json").read_text())["files"][0]["name"] == "t.csv"


def test_cache_in_a_bucket(bucket):
    """What was fetched is kept in a bucket, found again, and forgotten; a damaged entry counts as not there."""
    cache = Cache(bucket.url("cache"), 1000, respect_opt_out=True)
    assert cache.read("http://h/a") is None
    cache.keep("http://h/a", b"body", opted_out=False)
    assert cache.read("http://h/a") == b"body"
    entry, = bucket.names("cache")
    bucket.put(entry, bucket.read(entry)[:-1])
    assert cache.read("http://h/a") is None
    cache.forget("http://h/a")
    assert bucket.names("cache") == []


def test_store_path_is_no_local_path(tmp_path, monkeypatch):
    """A path in a store keeps its slashes through what a path can do, and nothing takes it for one of the disk."""
    monkeypatch.chdir(tmp_path)
    path = StorePath("s3://bucket/a/b.csv")
    assert str(path) == "s3://bucket/a/b.csv" and str(path.parent / "c") == "s3://bucket/a/c" and path.name == "b.csv"
    assert str(path.with_name("d.csv")) == "s3://bucket/a/d.csv" and isinstance(path.parent, StorePath)
    for use in (lambda: path.chmod(0o600), lambda: path.rename("x")):
        with pytest.raises(TypeError, match="object store"):
            list(use() or ())
    assert list(tmp_path.iterdir()) == []


def test_dataset_on_the_hub(tmp_path, write_config, run_cli, read_table, picture):
    """A table and images in a dataset on the Hub are read with its few calls, and a file that is not there is one line."""
    hub = store_server.DatasetHub({"pairs/t.csv": b"url,caption\na.jpg,one\nb.jpg,two\n", "images/a.jpg": picture})
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    place = "hf://datasets/owner/name"
    config = write_config(csv_path=f"{place}/pairs/t.csv", image_path=f"{place}/images")
    outcome = run_cli("--config", config, env=environment)
    assert outcome.code == 0, outcome.stderr
    assert [row["status"] for row in read_table(tmp_path / "out/scores.csv")] == ["ok", "missing"]
    missing = run_cli("--config", config, "--set", f"csv_path={place}/pairs/none.csv", "--fresh", env=environment)
    hub.close()
    assert missing.code == 3 and len(missing.stderr.splitlines()) == 1, missing.stderr


def test_table_of_unknown_length(tmp_path, write_config, run_main):
    """A table from an http server that does not say how long it is cannot be read in ranges: one line and exit 3."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(b"url,caption\na.png,one\n")
        do_HEAD = do_GET

        def log_message(self, *_):
            pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        outcome = run_main("--config", write_config(csv_path=f"http://127.0.0.1:{server.server_port}/t.csv"))
        server.shutdown()
    assert outcome.code == 3 and len(outcome.stderr.splitlines()) == 1, outcome.stderr
    assert "does not tell how long it is: download it first" in outcome.stderr


@pytest.mark.slow
@pytest.mark.parametrize("place", ["pairs/t.csv", "images"])
def test_gated_dataset_on_the_hub(tmp_path, write_config, write_table, run_cli, picture, place):
    """A dataset that asks for a login is not said to be empty, or to hold no such file: exit 3 in the Hub's own words."""
    hub = store_server.DatasetHub({"pairs/t.csv": b"url,caption\na.jpg,one\n", "images/a.jpg": picture})
    hub.refusal = (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to dataset owner/name is restricted."})
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    table = write_table([("url", "caption"), ("a.jpg", "one")])
    keys = {"csv_path": str(table)} | {"image_path" if place == "images" else "csv_path": f"hf://datasets/owner/name/{place}"}
    outcome = run_cli("--config", write_config(**keys), env=environment)
    hub.close()
    assert outcome.code == 3 and len(outcome.stderr.splitlines()) == 1, outcome.stderr
    assert "no permission" in outcome.stderr and "restricted" in outcome.stderr
