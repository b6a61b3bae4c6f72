"""Results in an object store: the same bytes as on a disk, each row once, whoever dies or races."""
import asyncio
import collections
import json
import pathlib

import pytest

import image_text_sim_clip as script
from addons.measures import embeddings
from addons.stores import ahead, commits, leases, remote, s3_many
from addons.stores.paths import StorePath

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHAPES_FOLDER = ROOT / "challenge_set/shapes"
RUN_FILES = {"manifest.json", "pairs.parquet", "bad_rows.csv", "scores.csv", "profile.json"}


def results_of(folder):
    """The bytes of the results and of every part in a local folder, by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in (folder / "scores.csv", *sorted((folder / "parts").glob("*.parquet")))}


def results_in(bucket, prefix):
    """The same of a folder in a bucket."""
    names = [name for name in bucket.names(prefix) if name.endswith(("/scores.csv", ".parquet")) and "pairs" not in name]
    return {name.removeprefix(prefix + "/"): bucket.read(name) for name in names}


def strange_objects(bucket, prefix):
    """Objects below the prefix that no finished run has; a lease that was given back is an empty object."""
    names = [name.removeprefix(prefix + "/") for name in bucket.names(prefix)]
    return [name for name in names if name not in RUN_FILES and not name.startswith((".lock-", ".commit.lock-", "memory-time"))
            and not (name.startswith("parts/part-") and name.endswith((".parquet", ".json")))]


@pytest.fixture
def remote_run(bucket, tmp_path, write_config, run_main, picture_bytes):
    """Dry-run a small table, all of it in a bucket, and the same on disk into local/; run(*arguments, **keys)."""
    (tmp_path / "pictures").mkdir(exist_ok=True)
    for number in range(4):
        (tmp_path / f"pictures/{number}.png").write_bytes(picture_bytes(colour=number))
    table = "url,caption\n" + "".join(f"{n % 5}.png,caption {n}\n" for n in range(40)) + "bad\n"
    (tmp_path / "table.csv").write_text(table, encoding="utf-8")
    bucket.put_folder(tmp_path / "pictures", "images")
    bucket.put("table.csv", table.encode())

    def run(*arguments, **keys):
        values = {"csv_path": bucket.url("table.csv"), "image_path": bucket.url("images"), "output_path": bucket.url("out"),
                  "partition_rows": 7, **keys}
        return run_main("--config", write_config("remote.yaml", **values), *arguments)

    def run_local(*arguments, **keys):
        return run_main("--config", write_config(partition_rows=7, output_path=str(tmp_path / "local"), **keys), *arguments)
    run.local = run_local
    return run


def test_all_in_a_bucket(remote_run, bucket, tmp_path):
    """Table, images and results in a bucket give what they give on a disk, to the byte, and nothing is left besides."""
    assert remote_run.local().code == 0
    outcome = remote_run()
    assert outcome.code == 0, outcome.stderr
    assert results_in(bucket, "out") == results_of(tmp_path / "local")
    assert bucket.read("out/bad_rows.csv") == (tmp_path / "local/bad_rows.csv").read_bytes()
    assert outcome.result["output"] == bucket.url("out/scores.csv") and outcome.result["scored"] == 32
    assert strange_objects(bucket, "out") == []


def test_run_again_verify_and_fresh(remote_run, bucket):
    """A finished run is summed up again, verified, damaged, mended, and discarded with --fresh."""
    assert remote_run().code == 0
    before = results_in(bucket, "out")
    again = remote_run()
    assert again.code == 0 and again.result["scored"] == 32
    assert remote_run("--verify").code == 0
    part = bytearray(bucket.read("out/parts/part-00002.parquet"))
    part[40] ^= 1
    bucket.put("out/parts/part-00002.parquet", bytes(part))
    damaged = remote_run("--verify")
    assert damaged.code == 7 and "part-00002.parquet" in damaged.stderr
    assert remote_run().code == 0 and results_in(bucket, "out") == before
    refused = remote_run(batch_size=3)
    assert refused.code == 2 and "holds another run" in refused.stderr
    bucket.put("out/of-somebody.txt", b"x")
    assert remote_run("--fresh", batch_size=3).code == 0
    assert bucket.read("out/of-somebody.txt") == b"x"


def test_resume_does_what_is_missing(remote_run, bucket):
    """A run of which parts are missing does those, and reads the others' footers only."""
    assert remote_run().code == 0
    before = results_in(bucket, "out")
    for name in ("parts/part-00001.parquet", "parts/part-00004.parquet", "profile.json"):
        bucket.fs.rm_file(f"{bucket.name}/out/{name}")
    outcome = remote_run()
    assert outcome.code == 0 and results_in(bucket, "out") == before


def test_parts_are_read_ahead_of_who_sums_up(remote_run, bucket, monkeypatch):
    """Parts and the times next to them are read side by side to be summed up, each once, and whoever ends that reads anew."""
    assert remote_run(partition_rows=1).code == 0
    before = results_in(bucket, "out")
    bucket.fs.rm_file(f"{bucket.name}/out/profile.json")
    reads = []
    ask = s3_many.ManyReader._ask

    at_work = []
    most = []

    async def watch(session, url, headers):
        reads.append(url.partition("?")[0])
        at_work.append(url)
        most.append(len(at_work))
        await asyncio.sleep(0.05)
        at_work.remove(url)
        return await ask(session, url, headers)
    monkeypatch.setattr(commits, "_FOLDERS", collections.defaultdict(commits.Parts))  # nothing is known yet
    with monkeypatch.context() as patch:
        patch.setattr(s3_many.ManyReader, "_ask", staticmethod(watch))
        assert remote_run(partition_rows=1).code == 0
    assert max(most) > 16 and results_in(bucket, "out") == before
    assert sum(path.endswith("00007.json") for path in reads) == 1
    assert sum(path.endswith("00007.parquet") for path in reads) == 2  # its footer, and the whole
    folder = StorePath(bucket.url("out/parts"))
    commits.look_at_parts(folder, reads_all=True)
    assert (folder / "part-00000.parquet").read_bytes() == before["parts/part-00000.parquet"]
    bucket.put("out/parts/part-00009.parquet", b"another")
    ahead.end(str(folder))
    assert (folder / "part-00009.parquet").read_bytes() == b"another"


def test_marks_of_killed_workers_go(remote_run, bucket):
    """The mark of a worker that was killed when its part had been written goes with the end of the run."""
    assert remote_run().code == 0
    bucket.put("out/parts/part-00002.trying", b"")
    assert [path.name for path in StorePath(bucket.url("out/parts")).glob("*.trying")] == ["part-00002.trying"]
    assert remote_run().code == 0 and strange_objects(bucket, "out") == []


def test_retry_failed_with_embeddings(remote_run, bucket, monkeypatch):
    """What failed for a passing reason is tried again: part and embeddings are replaced, as on a disk."""
    model = {"pretrained_model": str(ROOT / "challenge_set/shapes_clip"), "save_embeddings": "float16"}
    original = remote.RemoteStore.read_up_to

    def fail(self, path, size, begun=None):
        if path.endswith("2.png"):
            raise TimeoutError("late")
        return original(self, path, size, begun)
    with monkeypatch.context() as patch:
        patch.setattr(remote.RemoteStore, "read_up_to", fail)
        outcome = remote_run(**model)
    assert outcome.code == 0 and outcome.result["failed"]["timeout"] == 8, outcome.stderr
    outcome = remote_run("--retry-failed", **model)
    assert outcome.code == 0 and "timeout" not in outcome.result["failed"], outcome.stderr
    assert outcome.result["failed"] == {"missing": 8} and outcome.result["scored"] == 32
    rows = embeddings.read_embeddings(StorePath(bucket.url("out/parts/part-00001.npz")))["image_of_row"]
    assert (rows >= 0).sum() == 6
    assert remote_run("--verify", **model).code == 0
    assert [name for name in strange_objects(bucket, "out") if not name.endswith(".npz")] == []


def test_plan_tells_the_cost(remote_run, bucket):
    """--plan counts requests and bytes per million rows, and leaves the store with the plan alone."""
    outcome = remote_run("--plan")
    assert outcome.code == 0 and outcome.result["rows"] == 40, outcome.stderr
    told = outcome.result["object_store"]
    assert told["GET"] > 1e6 and told["PUT"] >= 3 * 6 / 40 * 1e6 and told["bytes_read"] > 1e6
    assert "per million rows" in outcome.stderr and "object_store" not in remote_run.local("--plan").result
    assert not [name for name in bucket.names("out") if "part-" in name]


# ── Leases, and what is created once ──────────────────────────────────────────────────────────────────────────────────

def test_lease_of_a_dead_process_runs_out(bucket, monkeypatch):
    """Who died with a lease is waited for until it runs out by the store's clock; the numbers rise."""
    monkeypatch.setattr(leases, "LEASE_S", 2.0)
    folder = StorePath(bucket.url("out"))
    bucket.put("out/.lock-000007", b"dead")
    with leases.leased(folder, ".lock"):
        assert bucket.names("out") == ["out/.lock-000008"] and bucket.read("out/.lock-000008")
    assert bucket.read("out/.lock-000008") == b""
    with leases.leased(folder, ".lock"):
        assert bucket.names("out") == ["out/.lock-000009"]


def test_created_once(bucket):
    """A part or manifest is created by one alone; another that wrote the same bytes counts as having written it."""
    path = StorePath(bucket.url("out/parts/part-00000.parquet"))
    assert commits.create(path, b"one") and commits.create(path, b"one") and not commits.create(path, b"two")
    assert path.read_bytes() == b"one"


def test_prefix_without_permission_or_bucket(remote_run, write_config):
    """A bucket that is not there is one line and exit 5, before anything is staged."""
    outcome = remote_run(output_path="s3://no-such-bucket-of-ours/out")
    assert outcome.code == 5 and len(outcome.stderr.splitlines()) == 1 and "no-such-bucket-of-ours" in outcome.stderr


def test_store_without_conditional_create(remote_run, bucket, monkeypatch):
    """A store that overwrites what it was to create works for one worker, and is refused for several in one line."""
    monkeypatch.setattr(remote.RemoteStore, "create", lambda self, path, content: self.write(path, content))
    leases.can_create.cache_clear()
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    refused = remote_run()
    assert refused.code == 2 and "one worker alone" in refused.stderr and len(refused.stderr.splitlines()) == 1
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    assert remote_run().code == 0
    leases.can_create.cache_clear()


def test_results_stream(bucket, monkeypatch):
    """A large object is sent in pieces, and one whose writer fails leaves nothing."""
    monkeypatch.setattr(remote, "WRITE_BLOCK_BYTES", 5 << 20)
    path = StorePath(bucket.url("big"))
    with script.atomic_file(path) as file:
        for _ in range(12):
            file.write(b"x" * (1 << 20))
    assert path.stat().st_size == 12 << 20
    with pytest.raises(ZeroDivisionError), script.atomic_file(StorePath(bucket.url("none"))) as file:
        file.write(b"x" * (12 << 20))
        raise ZeroDivisionError
    assert bucket.names() == ["big"] and not bucket.fs.list_multipart_uploads(bucket.name)
    assert json.loads(json.dumps(path.name)) == "big"


def test_curate_in_a_bucket(remote_run, bucket, tmp_path, write_config, capfd):
    """curate.py reads a run in a bucket and writes tables, plots, review page and every export there, as on a disk."""
    import curate
    model = {"pretrained_model": str(ROOT / "challenge_set/shapes_clip"), "save_embeddings": "float16"}
    assert remote_run.local(**model).code == 0 and remote_run(**model).code == 0
    for export in ("csv", "parquet", "imagefolder", "webdataset", "clip-retrieval"):
        section = {"keep_fraction": 0.5, "export": export, "review": export == "csv", "duplicate_images": "exact",
                   "shard_rows": 3}
        for name in ("local", "remote"):
            config = script.load_config(tmp_path / ("config.yaml" if name == "local" else "remote.yaml"))
            for _ in range(2):  # the second time it goes on from what is there
                curate.curate(script.dataclasses.replace(config, curate=section))
        local = {path.relative_to(tmp_path / "local").as_posix(): path.read_bytes()
                 for path in (tmp_path / "local/curated").rglob("*") if path.is_file() and path.name[0] != "."}
        there = {name.removeprefix("out/"): bucket.read(name) for name in bucket.names("out/curated") if "/." not in name}
        assert there.keys() == local.keys()
        differ = [name for name in local if there[name] != local[name] and not name.endswith((".png", ".json", ".html"))]
        assert differ == []
    capfd.readouterr()
