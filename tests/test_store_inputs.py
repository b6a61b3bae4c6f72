"""A table of each kind with everything in an object store, and how few requests it takes to plan tars that lie there."""
import collections
import gzip
import http.server
import json
import pickle
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_inputs import sample, write_parquet, write_tar
from test_store_chaos import proxied  # noqa: F401 - a fixture
from test_store_output import remote_run, results_in, results_of, strange_objects  # noqa: F401 - a fixture
from test_tar_counts import write_shard

import image_text_sim_clip as script
from addons.stores import remote, spool, traffic
from addons.stores.paths import StorePath

ROWS = [{"url": f"{n % 3}.png", "caption": f"caption {n}", "licence": "free" if n % 2 else None} for n in range(9)]
KINDS = ["t.csv", "t.csv.gz", "t.tsv", "t.jsonl", "t.json", "t.parquet", "holds-images.parquet", "tars", "counted",
         "statistics", "pairs", "imagefolder", "metadata", "sets/*.csv", "sets/{a,b}.csv", "parquets", "lang"]


def write_kinds(folder, picture):
    """A table of each of KINDS in `folder`, and the images 0.png to 2.png in images/; picture(n) makes one."""
    for name in ("images", "tars", "pairs/deep", "imagefolder", "metadata", "sets", "parquets", "lang/lang=en", "lang/lang=de"):
        (folder / name).mkdir(parents=True)
    images = [picture(n) for n in range(3)]
    for number, image in enumerate(images):
        (folder / f"images/{number}.png").write_bytes(image)
        (folder / f"pairs/deep/ä {number}.png").write_bytes(image)
        (folder / f"pairs/deep/ä {number}.txt").write_text(f"caption {number}")
        for name in ("imagefolder", "metadata"):
            (folder / f"{name}/{number}.png").write_bytes(image)
    table = "url,caption,licence\n" + "".join(f"{r['url']},{r['caption']},{r['licence'] or ''}\n" for r in ROWS) + "bad\n"
    for name in ("t.csv", "sets/a.csv", "sets/b.csv", "lang/lang=en/t.csv", "lang/lang=de/t.csv"):
        (folder / name).write_text(table)
    (folder / "t.csv.gz").write_bytes(gzip.compress(table.encode()))
    (folder / "t.tsv").write_text(table.replace(",", "\t"))
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "bad\n")
    (folder / "t.json").write_text(json.dumps(ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "t.parquet", row_group_size=4)
    own = [{**row, "url": {"bytes": images[n % 3], "path": f"{n}.png"}} for n, row in enumerate(ROWS)]
    pq.write_table(pa.Table.from_pylist(own), folder / "holds-images.parquet", row_group_size=4)
    for number in range(2):
        write_parquet(folder / f"parquets/{number}.parquet", start=10 * number)
        write_tar(folder / f"tars/{number}.tar", [m for n in range(3) for m in sample(f"{n}", images[n], f"caption {n}")])
        write_shard(folder / "counted", number, images)
        write_shard(folder / "statistics", number, images, parquet=False)
    lines = "".join(json.dumps({"file_name": f"{n}.png", "caption": f"caption {n}"}) + "\n" for n in range(3))
    (folder / "imagefolder/metadata.jsonl").write_text(lines)
    names = [{"file_name": f"{n}.png", "caption": f"caption {n}"} for n in range(2)]
    pq.write_table(pa.Table.from_pylist(names), folder / "metadata/metadata.parquet")


@pytest.fixture
def both(bucket, tmp_path, write_config, run_main, picture_bytes):
    """Run an input of in/ on the disk, and the same of a bucket with everything there: both(name, *arguments, **keys).

    Returns both outcomes; their results must be the same, to the byte.
    """
    def run(name, *arguments, place="in", **keys):
        local = {"csv_path": str(tmp_path / "in" / name), "image_path": str(tmp_path / "in/images"),
                 "output_path": str(tmp_path / "local"), **keys}
        there = {"csv_path": bucket.url(place) + "/" + name, "image_path": bucket.url(place) + "/images",
                 "output_path": bucket.url(f"{place} out"), **keys}
        if not (tmp_path / "in").exists():
            write_kinds(tmp_path / "in", lambda n: picture_bytes(colour=n))
            bucket.put_folder(tmp_path / "in", place)
        outcomes = [run_main("--config", write_config(**values), *arguments) for values in (local, there)]
        assert [outcome.code for outcome in outcomes] == [0, 0], [outcome.stderr for outcome in outcomes]
        assert results_in(bucket, f"{place} out") == results_of(tmp_path / "local")
        bad_rows = tmp_path / "local/bad_rows.csv"
        if bad_rows.exists():
            assert bucket.read(f"{place} out/bad_rows.csv") == bad_rows.read_bytes()
        assert strange_objects(bucket, f"{place} out") == []
        return outcomes
    return run


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_with_everything_in_a_bucket(both, name):
    """Results, parts and lines set aside are those of a disk to the byte, where a run is cut into many parts, and a second
    start finds it finished."""
    first = both(name, partition_rows=2)
    assert first[1].result["scored"] > 0 or name == "parquets"
    assert both(name, partition_rows=2)[1].result["scored"] == first[1].result["scored"]


def test_names_with_odd_characters(both):
    """A prefix with spaces, percent signs and letters of any kind is one place, for tables, images, results and folders."""
    for name in ("t.csv", "pairs", "counted"):
        both(name, "--fresh", place="ä b#c%20d+e&=(f)")


def test_cache_in_the_same_bucket(bucket, picture_bytes, tmp_path, write_config, run_main):
    """With `cache_path` in the bucket, what was fetched from the web is fetched once, and the results are those of a disk."""
    asked = []
    image = picture_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(image)))
            self.end_headers()
            self.wfile.write(image)

        def log_message(self, *_):
            pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        text = "url,caption\n" + "".join(f"http://127.0.0.1:{server.server_port}/{n},c\n" for n in range(5))
        (tmp_path / "web.csv").write_text(text)
        keys = {"csv_path": bucket.put("web.csv", text.encode()), "image_path": "url", "allow_private_hosts": True,
                "cache_path": bucket.url("cache")}
        for name in ("one", "two"):
            outcome = run_main("--config", write_config(**keys, output_path=bucket.url(name)))
            assert outcome.code == 0 and outcome.result["scored"] == 5, outcome.stderr
        local = {**keys, "csv_path": str(tmp_path / "web.csv"), "cache_path": str(tmp_path / "cache")}
        assert run_main("--config", write_config(**local, output_path=str(tmp_path / "local"))).code == 0
        server.shutdown()
    assert len([path for path in asked if path != "/robots.txt"]) == 10
    assert bucket.read("one/scores.csv") == bucket.read("two/scores.csv") == (tmp_path / "local/scores.csv").read_bytes()


# ── Tars that are planned without being read ──────────────────────────────────────────────────────────────────────────

def plan_in(bucket, name, **keys):
    """Plan an input of the bucket as a run does, without doing it."""
    config = script.Config(csv_path=bucket.url(name), output_path=bucket.url("out"), pretrained_model="none", **keys)
    return script.make_plan(config)


@pytest.mark.slow
@pytest.mark.parametrize("parquet", [True, False])
def test_requests_to_plan_200_tars(bucket, tmp_path, picture_bytes, proxied, parquet):  # noqa: F811
    """Of 200 tars with img2dataset's Parquet no byte is read, with its statistics alone the first pair of the first tar.

    Nor does anybody ask for the size of each."""
    write_shard(tmp_path / "in", 0, [picture_bytes(colour=n) for n in range(4)], parquet=parquet)
    files = {path.name.removeprefix("00000"): path.read_bytes() for path in (tmp_path / "in").iterdir()}
    for number in range(200):
        for ending, data in files.items():
            bucket.put(f"in/{number:05d}{ending}", data)
    proxy = proxied(every=0)
    for name in ("in/{00000..00199}.tar", "in/*.tar", "in"):
        proxy.requests.clear()
        plan = plan_in(bucket, name)
        assert plan.row_count == 200 * (5 if parquet else 4) and len(plan.partitions) == 200
        of_tars = [(method, size) for method, path, size in proxy.requests if path.partition("?")[0].endswith(".tar")]
        gets = [size for method, size in of_tars if method == "GET"]
        assert (gets == []) if parquet else (len(gets) == 1 and gets[0] <= 1 << 18)
        assert len(of_tars) - len(gets) < 10 and len(proxy.requests) < 200 + 100  # one for each file that tells, and lists
        remove_run(bucket)


def remove_run(bucket):
    for name in bucket.names("out"):
        bucket.fs.rm_file(f"{bucket.name}/{name}")


def test_tars_without_statistics_are_counted_once(bucket, tmp_path, picture_bytes, proxied, monkeypatch):  # noqa: F811
    """Tars that nothing tells of are fetched once each to be planned, several at a time, and not again by a second start."""
    for number in range(6):
        write_shard(tmp_path / "in", number, [picture_bytes()] * 2, parquet=False, statistics=False)
    bucket.put_folder(tmp_path / "in", "in")
    proxy = proxied(every=0)
    at_work = []
    most = []
    read_range = remote.RemoteStore.read_range

    def watch(self, path, start, stop):
        at_work.append(path)
        most.append(len(at_work))
        threading.Event().wait(0.05)
        try:
            return read_range(self, path, start, stop)
        finally:
            at_work.remove(path)
    monkeypatch.setattr(remote.RemoteStore, "read_range", watch)
    assert plan_in(bucket, "in").row_count == 12 and max(most) > 1
    assert plan_in(bucket, "in").row_count == 12
    gets = [path for method, path, _ in proxy.requests if method == "GET" and path.partition("?")[0].endswith(".tar")]
    assert len(gets) == len(set(gets)) == 6


def test_next_tar_comes_while_one_is_scored(bucket, tmp_path, picture_bytes, monkeypatch):
    """Whoever goes through tars, or every second one, finds the next fetched; one that nobody asks for is taken away."""
    for number in range(8):
        write_shard(tmp_path / "in", number, [picture_bytes()] * 2, failed=0)
    bucket.put_folder(tmp_path / "in", "in")
    fetched = []
    known = set(spool.spool_folder().glob("*.fetched"))
    fetch = spool.fetch
    monkeypatch.setattr(spool, "fetch", lambda file, number, *rest: (fetched.append(number), fetch(file, number, *rest))[1])
    for step, asked in ((1, [0, 1, 2, 3]), (2, [0, 2, 4]), (3, [1, 4, 6])):
        fetched.clear()
        table = plan_in(bucket, "in").table
        for number in asked:
            assert table.read(2 * number, 2 * number + 2)["key"].tolist()[0] == f"{number:05d}0000"
        upcoming = [asked[-1] + step] if step < 3 else []
        for thread in threading.enumerate():
            if isinstance(thread, spool.Fetching):
                thread.join()
        assert sorted(fetched) == sorted({*asked, *upcoming, *([7] if step == 3 else [])})
        assert pickle.loads(pickle.dumps(table)).read(0, 1)["key"].tolist() == ["000000000"]
        left = {path for path in spool.spool_folder().glob("*.fetched") if path not in known}
        known |= left
        assert len(left) <= spool.KEPT + 2  # those that were asked for last, the next, and that of the copy


@pytest.mark.parametrize("name", ["counted", "statistics", "tars"])
def test_tar_that_is_replaced_after_planning(both, bucket, write_config, name):
    """A tar that another one of the same size and number of pairs has replaced since it was planned is one line, and no row."""
    both(name)
    remove_parts = [path for path in bucket.names("in out") if "part-" in path or path.endswith(("scores.csv", "profile.json"))]
    for path in remove_parts:
        bucket.fs.rm_file(f"{bucket.name}/{path}")
    config = write_config(csv_path=bucket.url(f"in/{name}"), image_path=bucket.url("in/images"),
                          output_path=bucket.url("in out"))
    job = script.Job(script.load_config(config))
    job.make_plan()
    first = next(path for path in bucket.names(f"in/{name}") if path.endswith(".tar"))
    bucket.put(first, bucket.read(first).replace(b"caption", b"CAPTION"))
    with pytest.raises(script.Trouble, match="replaced since the run was planned") as raised:
        job.work(job.pending())
    assert raised.value.exit_code == 3
    assert [path for path in bucket.names("in out/parts") if path.endswith(".parquet")] == []


def test_parquet_that_is_replaced_after_planning(both, bucket, write_config):
    """So is a Parquet file, before it is opened and between two of its row groups."""
    both("t.parquet", partition_rows=4)
    config = write_config(csv_path=bucket.url("in/t.parquet"), image_path=bucket.url("in/images"), partition_rows=4,
                          output_path=bucket.url("in out"))
    job = script.Job(script.load_config(config))
    job.make_plan()
    other = bucket.read("in/t.parquet").replace(b"caption 7", b"CAPTION 7")
    assert len(job.plan.table.read(0, 4)) == 4
    bucket.put("in/t.parquet", other)
    with pytest.raises(script.Trouble, match="replaced while it was read"):
        job.plan.table.read(4, 8)
    table = script.find_reader(job.config.csv_path).open(job.plan.manifest, job.config, StorePath(bucket.url("in out")))
    with pytest.raises(script.Trouble, match="has changed since the run was planned"):
        table.read(0, 4)


def test_a_run_moves_from_the_disk_to_a_bucket(both, bucket, tmp_path, write_config, run_main):
    """A run that was planned with files on the disk goes on with the same files in a bucket, and the other way round."""
    for name in ("counted", "tars", "parquets", "t.csv"):
        both(name, "--fresh")
        for begun, output in ((str(tmp_path / "in"), str(tmp_path / "local")), (bucket.url("in"), bucket.url("in out"))):
            for place in (str(tmp_path / "in"), bucket.url("in")):
                keys = {"csv_path": f"{place}/{name}", "image_path": f"{begun}/images", "output_path": output}
                outcome = run_main("--config", write_config(**keys))
                assert outcome.code == 0, outcome.stderr


def test_plan_tells_the_requests_of_a_part(bucket, remote_run, proxied):  # noqa: F811
    """The requests of a part are those that --plan tells: a run of as many rows in more parts takes just as many more."""
    proxy = proxied(every=0)
    counts = []
    for size in (1, 5):
        proxy.requests.clear()
        assert remote_run(output_path=bucket.url(f"out{size}"), partition_rows=size).code == 0
        counts.append(collections.Counter(method for method, path, _ in proxy.requests if "/parts/" in path or "json" in path))
    more = {method: round((counts[0][method] - counts[1][method]) / (40 - 8)) for method in counts[0]}
    assert more == traffic.REQUESTS_OF_A_PART


def test_plan_tells_of_whole_tars(both, bucket, run_main, write_config, proxied):  # noqa: F811
    """--plan counts a tar that is fetched as a whole, and says as much as a run then takes."""
    both("counted")
    config = write_config(csv_path=bucket.url("in/counted"), output_path=bucket.url("planned"))
    told = run_main("--config", config, "--plan").result["object_store"]
    size = sum(len(bucket.read(path)) for path in bucket.names("in/counted") if path.endswith((".tar", ".parquet")))
    assert told["bytes_read"] == pytest.approx(size / 8 * 1e6, rel=1e-3)
    proxy = proxied(every=0)
    assert run_main("--config", config).code == 0
    gets = [path for method, path, _ in proxy.requests if method == "GET" and path.partition("?")[0].endswith(".tar")]
    assert len(gets) == 2 and told["GET"] >= 4 / 8 * 1e6
