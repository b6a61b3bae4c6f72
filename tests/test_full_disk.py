"""A full disk in every phase: exit 5 in one line, nothing half-written, and with space again the same bytes."""
import http.server
import os
import pathlib
import subprocess
import threading

import forked
import pytest

import image_text_sim_clip as script

ROOT = pathlib.Path(script.__file__).parent
EXPORTS = ("csv", "parquet", "imagefolder", "webdataset")


def bytes_in(folder):
    """Every file that has the same bytes each time: not times, profile, plots, locks and the manifest (times of the input)."""
    passing = {"profile.json", "manifest.json", "memory-time.png", ".lock", ".commit.lock"}
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files
            if path.name not in passing and not path.match("parts/part-*.json")}


def is_one_line(stderr):
    """Whether a refusal says one thing: one line that begins with error."""
    lines = [line for line in stderr.splitlines() if "lines of" not in line and "staged again" not in line]
    return len(lines) == 1 and lines[0].startswith("error: cannot write")


@pytest.fixture(scope="module")
def context():
    return forked.make_context()


@pytest.fixture
def scored(tmp_path, write_config, bundled_model):
    """Config of a run with the bundled model, embeddings and a passport, into out/ (which is not there yet)."""
    lines = (ROOT / "challenge_set/shapes.csv").read_text().splitlines(keepends=True)
    (tmp_path / "table.csv").write_text("".join([*lines[:40], "shape-000.png,one,field,too,many\n", *lines[40:60]]))
    return write_config(image_path=str(ROOT / "challenge_set/shapes"), pretrained_model=bundled_model, partition_rows=20,
                        save_embeddings="float16")


def sizes_to_try(folder):
    """Limits below each file's size, so that every file in turn is the one that does not fit; and none at all."""
    sizes = {path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return [0, *sorted({size - 1 for size in sizes if size > 1})]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_file_may_grow_beyond(scored, context, tmp_path):
    """Whatever the largest file that the disk takes: the run ends with 5 in one line, and later with the same bytes."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert forked.start(context, tmp_path / "log", "--config", scored, "--set", f"output_path={whole}").wait() == 0
    expected = bytes_in(whole)
    codes = []
    for limit in sizes_to_try(whole):
        run = forked.start(context, tmp_path / "log", "--config", scored, "--fresh", most_bytes=limit)
        codes.append(run.wait())
        assert codes[-1] in (0, 5), (limit, run.stderr)
        assert codes[-1] == 0 or is_one_line(run.stderr), (limit, run.stderr)
        assert [path for path in out.rglob("*") if path.suffix in (".tmp", ".next")] == []
        again = forked.start(context, tmp_path / "log", "--config", scored)
        assert again.wait() == 0, (limit, again.stderr)
        assert bytes_in(out) == expected, limit
    assert codes.count(5) >= 6  # bad rows, table, manifest, embeddings, parts, scores, profile


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("export", EXPORTS)
def test_no_file_of_an_export_may_grow_beyond(scored, context, tmp_path, export):
    """The same for curate.py and each of its exports."""
    arguments = ("--config", scored, "--set", f"curate.export={export}", "--set", "curate.keep_fraction=0.5", "--set",
                 "curate.shard_rows=10", "--set", "curate.review=true")
    assert forked.start(context, tmp_path / "log", "--config", scored).wait() == 0
    curated = tmp_path / "out/curated"
    assert forked.start(context, tmp_path / "log", *arguments, program="curate").wait() == 0
    expected = bytes_in(curated)
    limits = sizes_to_try(curated)
    for limit in limits[::max(1, len(limits) // 12)]:
        subprocess.run(["rm", "-r", str(curated)], check=True)
        run = forked.start(context, tmp_path / "log", *arguments, program="curate", most_bytes=limit)
        code = run.wait()
        assert code in (0, 5) and (code == 0 or is_one_line(run.stderr)), (limit, run.stderr)
        assert not (curated / "curated.json").exists() or code == 0
        again = forked.start(context, tmp_path / "log", *arguments, program="curate")
        assert again.wait() == 0, (limit, again.stderr)
        assert bytes_in(curated) == expected, limit


@pytest.fixture
def server():
    """A loopback server: every path ends in a picture's number; those in `busy` answer 500, those in `gone` 404."""
    pictures = {path.name: path.read_bytes() for path in (ROOT / "challenge_set/shapes").glob("*.png")}

    class Answer(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            name = self.path.strip("/")
            code = 500 if name in server.busy else 404 if name in server.gone else 200
            body = pictures[name] if code == 200 else b""
            self.send_response(code)
            self.send_header("Content-Type", "image/png")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.busy = set()
    server.gone = set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_retry_on_a_full_disk_loses_no_row(scored, server, context, write_table, write_config, bundled_model, tmp_path):
    """--retry-failed on a disk that takes only smaller files ends with 5; rows that are gone from the server keep scores."""
    names = [f"shape-{n:03d}.png" for n in range(20)]
    write_table([("url", "caption"), *((f"http://127.0.0.1:{server.server_port}/{n}", f"a red square, {n}") for n in names)])
    config = write_config(pretrained_model=bundled_model, image_path="url", allow_private_hosts=True, fetch_retries=0,
                          partition_rows=10, save_embeddings="float16")
    server.busy = set(names[::5])
    assert forked.start(context, tmp_path / "log", "--config", config).wait() == 0
    server.busy = set()
    server.gone = set(names) - set(names[::5])
    before = bytes_in(tmp_path / "out")
    sizes = sorted({path.stat().st_size for path in (tmp_path / "out/parts").glob("part-*.*[tz]")})
    for limit in (0, 200, *(size + step for size in sizes for step in (-1, 0, 100))):
        run = forked.start(context, tmp_path / "log", "--config", config, "--retry-failed", most_bytes=limit)
        code = run.wait()
        assert code in (0, 5), (limit, run.stderr)
        assert code == 0 or is_one_line(run.stderr), (limit, run.stderr)
        if code == 0:
            break
        verified = forked.start(context, tmp_path / "log", "--config", config, "--verify")
        assert verified.wait() == 0, verified.stderr
        whole_parts = {name: data for name, data in bytes_in(tmp_path / "out").items() if name.startswith("parts/")}
        assert whole_parts.keys() == {name for name in before if name.startswith("parts/")}
    last = forked.start(context, tmp_path / "log", "--config", config, "--retry-failed")
    assert last.wait() == 0 and last.result["scored"] == 20, last.stderr
    assert forked.start(context, tmp_path / "log", "--config", config, "--verify").wait() == 0


@pytest.fixture
def small_disk(tmp_path):
    """(mount a file system at out/, give it more space, unmount it); skipped where that is not allowed."""
    out = tmp_path / "out"
    out.mkdir()

    def mount(options):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(out)], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("no file system can be mounted here")

    def unmount():
        subprocess.run(["umount", str(out)], capture_output=True, check=False)

    def enlarge():
        subprocess.run(["mount", "-o", "remount,size=64m,nr_inodes=10000", str(out)], check=True)
    if os.geteuid() or not pathlib.Path("/proc/mounts").exists():
        pytest.skip("only root can mount a file system")
    yield mount, enlarge, unmount
    unmount()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["bytes", "files"])
def test_small_disk(scored, small_disk, context, tmp_path, kind):
    """On a disk with room for n blocks or n files, for each n until it is enough: 5 in one line, then the same bytes."""
    mount, enlarge, unmount = small_disk
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert forked.start(context, tmp_path / "log", "--config", scored, "--set", f"output_path={whole}").wait() == 0
    expected = bytes_in(whole)
    codes = []
    for count in range(2, 80, 1 if kind == "files" else 3):
        mount(f"nr_inodes={count}" if kind == "files" else f"size={count * 4}k")
        try:
            run = forked.start(context, tmp_path / "log", "--config", scored)
            codes.append(run.wait())
            assert codes[-1] in (0, 5), (count, run.stderr)
            assert codes[-1] == 0 or is_one_line(run.stderr), (count, run.stderr)
            enlarge()
            again = forked.start(context, tmp_path / "log", "--config", scored)
            assert again.wait() == 0, (count, again.stderr)
            assert bytes_in(out) == expected, count
        finally:
            unmount()
        if codes[-1] == 0:
            break
    assert codes[-1] == 0 and codes.count(5) >= 5
