"""What an object store refuses, and what lies where a run is to write: one line or a status, never lost or mixed rows."""
import threading
import time
from concurrent.futures import CancelledError, Future

import fsspec
import pytest
from test_store_chaos import proxied  # noqa: F401 - a fixture
from test_store_output import remote_run, results_in, results_of  # noqa: F401 - a fixture

from addons.images.cache import Cache
from addons.stores import images, leases, remote
from addons.stores.paths import StorePath


def told_once(outcome, code, *words):
    """Whether a run ended with this exit code and one line of error that has these words."""
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error")]
    assert outcome.code == code and len(errors) == 1 and "Traceback" not in outcome.stderr, outcome.stderr
    for word in words:
        assert word in errors[0]


@pytest.mark.parametrize(("where", "code"), [("table.csv", 3), ("/out/", 5), ("prefix=out", 5)])
def test_no_permission(remote_run, proxied, where, code):  # noqa: F811
    """A table that may not be read is exit 3, results that may not be written or listed are exit 5, in one line."""
    proxied(1, ("403",), lambda method, path: where in path)
    told_once(remote_run(), code, "no permission")


@pytest.mark.parametrize("missing", [False, True])
def test_table_that_cannot_be_read_today(remote_run, bucket, proxied, missing):  # noqa: F811
    """A finished run whose table cannot be looked at is not called another run, to be discarded: exit 3."""
    assert remote_run().code == 0
    names = bucket.names("out/parts")
    if missing:
        table = bucket.read("table.csv")
        bucket.fs.rm_file(f"{bucket.name}/table.csv")
        outcome = remote_run()
        told_once(outcome, 3, "no such file")
        bucket.put("table.csv", table)
    else:
        proxied(1, ("403",), lambda method, path: "table.csv" in path)
        outcome = remote_run()
        told_once(outcome, 3, "no permission")
    assert "--fresh" not in outcome.stderr and bucket.names("out/parts") == names


def test_no_permission_to_write(remote_run, bucket, proxied):  # noqa: F811
    """A prefix that may be read alone is told before the table is staged, and by a run that has planned before."""
    proxy = proxied(1, ("403",), lambda method, path: method in ("PUT", "POST") and "/out" in path)
    told_once(remote_run(), 5, "no permission")
    assert bucket.names("out") == [] and proxy.met["403"]


def test_images_that_may_not_be_read(remote_run, proxied):  # noqa: F811
    """An image that may not be read is a row's failure."""
    proxied(1, ("403",), lambda method, path: path.partition("?")[0].endswith("images/2.png"))
    assert remote_run().result["failed"] == {"forbidden": 8, "missing": 8}


@pytest.mark.parametrize(("where", "kind"), [("images/", "expired"), ("images/", "invalid"), ("/out/parts/", "expired"),
                                             ("table.csv", "expired")])
def test_token_that_expires(remote_run, bucket, tmp_path, proxied, where, kind):  # noqa: F811
    """A token that expires in the middle ends the run in one line, makes no row a failure, and the same command goes on."""
    assert remote_run.local().code == 0
    requests = []

    def late(method, path):
        if where in path and method in ("GET", "PUT"):
            requests.append(path)
        return where in path and len(requests) > 2
    proxy = proxied(1, (kind,), late)
    outcome = remote_run()
    if proxy.met[kind]:
        told_once(outcome, 5 if "out" in where else 3, "expired" if kind == "expired" else "not valid")
    proxied(0)
    assert remote_run().code == 0
    assert results_in(bucket, "out") == results_of(tmp_path / "local")


def test_store_that_does_not_know_conditional_writes(remote_run, bucket, proxied, monkeypatch):  # noqa: F811
    """A store that answers a conditional write with 501 works for one worker, as one that overwrites does."""
    proxy = proxied(1, ("501",), lambda method, path: method == "PUT" and "/.create-" in path)
    leases.can_create.cache_clear()
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    told_once(remote_run(), 2, "one worker alone")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    assert remote_run().code == 0 and proxy.met["501"]
    assert not [name for name in bucket.names("out") if "lock" in name]
    leases.can_create.cache_clear()


def test_cache_in_no_bucket(bucket, capfd):
    """A cache that cannot be written is said once, and loses no image."""
    cache = Cache("s3://no-such-bucket-of-ours/cache", 1000, respect_opt_out=True)
    for _ in range(2):
        cache.keep("http://h/a", b"body", opted_out=False)
        assert cache.read("http://h/a") is None
    said = capfd.readouterr().err
    assert len(said.splitlines()) == 1 and "no-such-bucket-of-ours" in said and "Traceback" not in said


@pytest.mark.parametrize("key", ["csv_path", "image_path", "output_path"])
def test_no_such_bucket(remote_run, key):  # noqa: F811
    """A bucket that is not there is one line that names it, wherever it is named."""
    outcome = remote_run(**{key: "s3://no-such-bucket-of-ours/x"})
    told_once(outcome, 3 if key in ("csv_path", "image_path") else 5, "no-such-bucket-of-ours")


def test_prefix_that_holds_something_else(remote_run, bucket):  # noqa: F811
    """Parts without a manifest and a manifest of somebody else's are refused in one line, and nothing of them is touched."""
    bucket.put("out/parts/part-00000.parquet", b"of somebody")
    told_once(remote_run(), 2, "no readable manifest.json")
    bucket.put("out/manifest.json", b'{"name": "a web page"}')
    told_once(remote_run(), 2)
    assert bucket.read("out/parts/part-00000.parquet") == b"of somebody" and len(bucket.names("out")) <= 3
    for name in bucket.names("out"):
        bucket.fs.rm_file(f"{bucket.name}/{name}")
    for name in ("out", "out/notes.txt", "out/parts/notes.txt", "out-of-others/manifest.json"):
        bucket.put(name, b"of somebody")
    outcome = remote_run()
    assert outcome.code == 0 and outcome.result["scored"] == 32, outcome.stderr
    for name in ("out", "out/notes.txt", "out/parts/notes.txt", "out-of-others/manifest.json"):
        assert bucket.fs.cat_file(f"{bucket.name}/{name}") == b"of somebody"


def test_range_that_is_cut_short(bucket, proxied):  # noqa: F811
    """A range of which half arrives is asked for again, and a store that always cuts is an error, not a shorter object."""
    path = bucket.put("big", bytes(range(256)) * 4000)
    proxy = proxied(2, ("cut",), lambda method, path: method == "GET")
    for _ in range(4):
        assert remote.STORE.read_range(path, 1000, 900_000) == (bytes(range(256)) * 4000)[1000:900_000]
    assert proxy.met["cut"] >= 3


def test_many_at_a_time_meet_the_same_faults(bucket, proxied):  # noqa: F811
    """Ranges that are asked for many at a time come whole through faults, and fail as single ones do."""
    contents = {number: bytes([number]) * 1000 for number in range(40)}
    paths = {number: bucket.put(f"many/ä b#{number}", content) for number, content in contents.items()}
    proxied(5, ("503", "reset", "cut"), lambda method, path: method == "GET")
    ranges = remote.STORE.submit_ranges([(path, 10, 600) for path in paths.values()])
    assert [one.result() for one in ranges] == [content[10:600] for content in contents.values()]
    with pytest.raises(FileNotFoundError):
        remote.STORE.submit_ranges([(bucket.url("many/none"), 0, 10)])[0].result()
    proxied(1, ("403",), lambda method, path: "/many/" in path)
    with pytest.raises(PermissionError):
        remote.STORE.submit_ranges([(paths[0], 0, 10)])[0].result()
    fsspec.filesystem("memory").pipe_file("/many/x", b"abc")
    assert remote.STORE.submit_ranges([("memory://many/x", 1, 3)])[0].result() == b"bc"


def test_no_compressed_bodies_are_asked_for(bucket, proxied):  # noqa: F811
    """Nothing on the way, such as a gateway that compresses for whoever lets it, may change an object's bytes."""
    path = bucket.put("a.bmp", b"abc")
    proxy = proxied(0)
    assert remote.STORE.submit_ranges([(path, 0, 9)])[0].future.result() == b"abc"
    assert remote.STORE.read_range(path, 0, 9) == b"abc" == remote.STORE.read(path)
    assert len(proxy.requests) >= 3 and proxy.codings == {"identity"}


# ── What a killed process had sent in part ────────────────────────────────────────────────────────────────────────────

def begin_upload(bucket, key):
    """Send a piece of an object, as a process does that is killed before the next."""
    begun = bucket.fs.call_s3("create_multipart_upload", Bucket=bucket.name, Key=key)
    bucket.fs.call_s3("upload_part", Bucket=bucket.name, Key=key, UploadId=begun["UploadId"], PartNumber=1, Body=b"x" * 1000)


def test_unfinished_uploads_go_when_a_run_ends(remote_run, bucket, monkeypatch):  # noqa: F811
    """Whoever finishes a run gives up what killed processes had sent of its files, and nothing that is somebody else's."""
    own = ["out/scores.csv", "out/pairs.parquet", "out/parts/part-00003.npz", "out/curated/kept.csv"]
    others = ["out/of-somebody.bin", "out2/scores.csv", "scores.csv", "out/parts/of-somebody.bin"]
    for key in (*own, *others):
        begin_upload(bucket, key)
    with monkeypatch.context() as patch:
        patch.setattr(leases, "MOST_UPLOAD_S", 1e12)  # a worker may be sending a part
        assert remote_run().code == 0
    assert sorted(bucket.uploads()) == sorted([*own[2:], *others])
    leases.abort_uploads(StorePath(bucket.url("out")))
    assert sorted(bucket.uploads()) == sorted(others)


def test_unfinished_uploads_in_a_bucket_of_its_own(bucket):
    """They go as well where `output_path` is the bucket itself."""
    for key in ("scores.csv", "of-somebody.bin"):
        begin_upload(bucket, key)
    leases.abort_uploads(StorePath(bucket.url()))
    assert bucket.uploads() == ["of-somebody.bin"]


def test_uploads_that_may_not_be_listed(remote_run, bucket, proxied):  # noqa: F811
    """Who may not list unfinished uploads finishes the run all the same."""
    begin_upload(bucket, "out/scores.csv")
    proxy = proxied(1, ("403",), lambda method, path: "?uploads" in path)
    assert remote_run().code == 0 and proxy.met["403"]


@pytest.mark.parametrize("at_once", [1, 3, 64])
def test_images_on_their_way_are_bounded(monkeypatch, at_once):
    """Images of a prefix come in the order of the rows, and no more are asked for at a time than `fetch_concurrency` says."""
    system = fsspec.filesystem("memory")
    for number in range(40):
        system.pipe_file(f"/pool/images/{number}.png", b"%d" % number)
    counting = threading.Lock()
    now, most = [0], [0]
    read_range = remote.RemoteStore.read_range

    def read_slowly(self, *arguments):
        with counting:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.005)
        with counting:
            now[0] -= 1
        return read_range(self, *arguments)
    monkeypatch.setattr(remote.RemoteStore, "read_range", read_slowly)
    source = images.PrefixSource(remote.STORE, "memory://pool/images", 1000, at_once)
    pool = source.open_pool(2)
    try:
        pool.add(source, [f"{number}.png" for number in range(40)])
        assert [pool.take() for _ in range(40)] == [b"%d" % number for number in range(40)]
    finally:
        pool.close()
    assert most[0] <= at_once + 2  # a loader whose image is not on its way asks itself


def test_what_nobody_wants_is_not_read():
    """A range that was given up before it was read is not asked for again by whoever waits for it."""
    future = Future()
    future.cancel()
    with pytest.raises(CancelledError):
        remote.Range(future, "memory://nowhere/x", 0, 1).result()
