"""Whole runs: every row ends once, whatever fails or stops; what is finished stays; the same command goes on."""
import errno
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import types
import weakref
import zipfile

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

import image_text_sim_clip as script

ROOT = pathlib.Path(script.__file__).parent
MODEL = str(ROOT / "challenge_set/shapes_clip")


def files(folder):
    """Relative path -> (mtime, content) of every file below a folder."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def is_whole(part):
    """Whether a part has both its digests: of the file with zeros for the two, and of the JSON up to the second."""
    data = part.read_bytes()
    of_file, own = re.findall(rb'"file_sha256": "([0-9a-f]{64})", "sha256": "([0-9a-f]{64})"', data)[-1]
    blank = data.replace(of_file, b"0" * 64).replace(own, b"0" * 64)
    text = data[data.rfind(b'{"run"'):data.rfind(b'"file_sha256"')]
    return hashlib.sha256(blank).hexdigest() == of_file.decode() and hashlib.sha256(text + of_file).hexdigest() == own.decode()


def leftovers(folder):
    return [str(p) for p in folder.rglob("*.tmp")]


def float32(text):
    return np.float32(text)


@pytest.fixture
def pictures(tmp_path, picture_bytes):
    """Fill tmp_path/pictures with n small pictures of different colours and return their names."""
    def make(count):
        folder = tmp_path / "pictures"
        folder.mkdir(exist_ok=True)
        names = [f"{i:04d}.png" for i in range(count)]
        for i, name in enumerate(names):
            (folder / name).write_bytes(picture_bytes("PNG", size=(8, 6), colour=(i % 256, i // 256, 99)))
        return names
    return make


@pytest.fixture
def small(tmp_path, pictures, write_config, write_table):
    """Config of a dry run over 10 pairs in 3 partitions."""
    def make(rows=10, **keys):
        names = pictures(rows)
        write_table([["url", "caption"], *([name, f"caption {i}"] for i, name in enumerate(names))])
        return write_config(**{"partition_rows": 4, "loader_threads": 0, **keys})
    return make


# ── Faults ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def make_faults(folder, picture_bytes, noise):
    """Files with every fault that a folder run meets; returns [(url, caption, status expected)]."""
    jpeg, png = picture_bytes("JPEG", image=noise(64, 48)), picture_bytes("PNG", image=noise(64, 48))
    (folder.parent / "outside.png").write_bytes(png)
    contents = {
        "empty.jpg": b"", "page.jpg": b"<html>not here</html>", "text.png": b"hello", "drawing.jpg": b"<svg xmlns='x'/>",
        "paper.jpg": b"%PDF-1.4", "half.jpg": jpeg[:len(jpeg) // 2], "half.png": png[:len(png) // 2], "head.jpg": jpeg[:20],
        "flipped.png": png[:60] + bytes([png[60] ^ 255]) + png[61:], "wide.png": picture_bytes("PNG", size=(3000, 1000)),
        "heavy.bmp": picture_bytes("BMP", size=(300, 300)), "other.ppm": picture_bytes("PPM")}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    with zipfile.ZipFile(folder / "archive.jpg", "w") as archive:
        archive.writestr("a", "b")
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to("../outside.png")
    (folder / "dead.png").symlink_to("nowhere.png")
    (folder / "loop.png").symlink_to("loop.png")
    return [(*pair, status) for status, pairs in {
        "missing": [("nowhere.png", "x"), ("https://example.org/none.png", "x"), ("", "no url"), ("   ", "x"),
                    ("a\0b.png", "x"), ("x" * 300, "x"), ("dead.png", "x"), ("loop.png", "x"), ("https://example.org/", "x")],
        "forbidden": [("../outside.png", "x"), ("/etc/passwd", "x"), ("link.png", "x"), ("pipe.png", "x"), ("..", "x"),
                      ("https://example.org/%2e%2e%2foutside.png", "x")],
        "too_large": [("heavy.bmp", "x")],
        "not_image": [("empty.jpg", "x"), ("page.jpg", "x"), ("text.png", "x"), ("archive.jpg", "x")],
        "unsupported": [("drawing.jpg", "x"), ("paper.jpg", "x"), ("other.ppm", "x")],
        "corrupt": [("half.jpg", "x"), ("half.png", "x"), ("head.jpg", "x"), ("flipped.png", "x")],
        "bomb": [("wide.png", "x")],
        "empty_caption": [("0000.png", ""), ("0001.png", " \t"), ("nowhere.png", "\n")],
    }.items() for pair in pairs]


@pytest.fixture
def faulty(tmp_path, pictures, write_table, write_config, picture_bytes, noise):
    """A table of 1,000 rows of which every tenth is at fault; returns (config path, rows, statuses expected)."""
    def make(**keys):
        names = pictures(300)
        faults = itertools.cycle(make_faults(tmp_path / "pictures", picture_bytes, noise))
        rows = [next(faults) if i % 10 == 3 else (names[i * 7 % 300], f"caption, \"{i}\"", "ok") for i in range(1000)]
        write_table([["id", "url", "caption"], *([i, url, caption] for i, (url, caption, _) in enumerate(rows))])
        config = write_config(max_image_bytes=200_000, max_image_pixels=1_000_000, **keys)
        return config, rows, [status for *_, status in rows]
    return make


def check_faulty(outcome, scores, rows, expected):
    """1,000 rows out, in order, each with the status it must have, and exit 0."""
    assert outcome.code == 0, outcome.stderr
    assert [row["id"] for row in scores] == [str(i) for i in range(1000)]
    assert [(row["url"], row["caption"]) for row in scores] == [(url, caption) for url, caption, _ in rows]
    assert [row["status"] for row in scores] == expected
    assert len(set(expected)) == 9
    failed = {status: expected.count(status) for status in set(expected) - {"ok"}}
    assert outcome.result["failed"] == failed and sum(failed.values()) == 100
    assert (outcome.result["rows"], outcome.result["scored"], outcome.result["malformed"]) == (1000, 900, 0)
    for row in scores:
        assert "/" not in row["detail"] and "0x" not in row["detail"], row


@pytest.mark.filterwarnings("ignore")
def test_every_fault_of_a_folder(faulty, run_main, read_table, tmp_path):
    """1,000 rows with 10 % faults of every kind give 1,000 rows in order, each fault with its status, and exit 0."""
    config, rows, expected = faulty()
    check_faulty(run_main("--config", config), read_table(tmp_path / "out/scores.csv"), rows, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_fault_with_a_model(faulty, run_main, read_table, tmp_path):
    """The same with the bundled model: a score where the status is ok, and empty score cells everywhere else."""
    config, rows, expected = faulty(pretrained_model=MODEL, partition_rows=256)
    outcome = run_main("--config", config)
    scores = read_table(tmp_path / "out/scores.csv")
    check_faulty(outcome, scores, rows, expected)
    for row in scores:
        cells = [row[name] for name in ("similarity", "dissimilarity", "truncated")]
        if row["status"] == "ok":
            assert -1 <= float(cells[0]) <= 1 and cells[2] in ("true", "false")
        else:
            assert cells == ["", "", ""]
        assert row["probability"] == ""  # CLIP has none


@pytest.mark.parametrize("url", ["sub", ".", "https://example.org/sub", "http://[bad/x.png"])
def test_one_odd_row_costs_only_itself(small, write_table, run_main, read_table, tmp_path, url):
    """A row that names a folder, or a URL that cannot be parsed, costs only itself."""
    config = small()
    (tmp_path / "pictures/sub").mkdir()
    write_table([["url", "caption"], ["0000.png", "x"], [url, "x"], ["0001.png", "x"]])
    assert run_main("--config", config).code == 0
    statuses = [row["status"] for row in read_table(tmp_path / "out/scores.csv")]
    assert statuses[0] == statuses[2] == "ok" and statuses[1] in ("missing", "forbidden")


def test_malformed_lines_are_counted(small, write_table, run_main, read_table, tmp_path):
    """input rows = scored + failed + malformed, in the summary and in the files."""
    config = small()
    write_table("url,caption\n0000.png,x\nragged\nnone.png,x\n0001.png,\n0002.png,\"open\n0003.png,x\n")
    result = run_main("--config", config).result
    assert (result["rows"], result["scored"], result["malformed"]) == (4, 2, 2)
    assert result["failed"] == {"empty_caption": 1, "missing": 1}
    assert len(read_table(tmp_path / "out/bad_rows.csv")) == 2


def test_equal_urls_are_read_once(small, write_table, run_main, monkeypatch, tmp_path):
    """Within a partition a picture is loaded once, however many captions it has."""
    config, read = small(partition_rows=100), []
    write_table([["url", "caption"], *(["0000.png", f"c{i}"] for i in range(20)), ["0001.png", "y"]])
    real = script.read_file
    monkeypatch.setattr(script, "read_file", lambda folder, source, **options:
                        read.append(source) or real(folder, source, **options))
    assert run_main("--config", config).result["scored"] == 21
    assert sorted(read) == ["0000.png", "0001.png"]


def test_image_path_that_is_none(small, run_main, tmp_path):
    """An image_path that is no folder is exit 3 and one line, not a thousand missing pictures."""
    outcome = run_main("--config", small(), "--set", f"image_path={tmp_path / 'nowhere'}")
    assert outcome.code == 3
    assert outcome.stderr.splitlines()[-1].startswith("error: image_path ")


# ── Files that a run leaves ───────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.slow
def test_scores_are_exact(shapes, run_main, read_table, tmp_path):
    """scores.csv has the promised columns; each float is the shortest text that reads back the same float32 as the part's."""
    config = shapes(rows=60, pretrained_model=MODEL, partition_rows=25)
    outcome = run_main("--config", config)
    assert outcome.code == 0, outcome.stderr
    scores = read_table(tmp_path / "out/scores.csv")
    assert list(scores[0]) == [
        "url", "caption", "match", "similarity", "dissimilarity", "probability", "percentile", "random_percentile", "truncated",
        "status", "detail"]
    parts = [pq.read_table(tmp_path / f"out/parts/part-{i:05d}.parquet") for i in range(3)]
    assert [part.num_rows for part in parts] == [25, 25, 10]
    stored = np.concatenate([part["similarity"].to_numpy() for part in parts])
    assert stored.dtype == np.float32
    for row, value in zip(scores, stored, strict=True):
        assert float32(row["similarity"]) == value and float32(row["dissimilarity"]) == np.float32(1) - value
        assert len(row["similarity"]) <= len(np.format_float_positional(value, unique=True)) + 1
        assert (row["status"], row["detail"], row["truncated"], row["probability"]) == ("ok", "", "false", "")
    assert math.isclose(outcome.result["mean_similarity"], float(stored.astype(np.float64).mean()), rel_tol=1e-12)


def test_result_and_profile_keys(small, run_main, tmp_path):
    """The JSON object and profile.json have the promised keys, and agree with each other."""
    result = run_main("--config", small()).result
    assert list(result) == ["rows", "scored", "failed", "malformed", "pairs_per_s", "mean_similarity", "output"]
    profile = json.loads((tmp_path / "out/profile.json").read_text())
    assert {k: profile[k] for k in list(result)[:-1]} == {k: v for k, v in result.items() if k != "output"}
    assert set(profile) >= {"seconds_per_pair", "days_for_100_million_pairs", "bottleneck", "peak_rss_mib", "peak_gpu_mib",
                            "partitions", "wall_s", "truncated", "model", "revision", "preprocess", "decode", "versions",
                            "python", "script", "finished", "workers", "capacity_pairs_per_s", "scores_sha256"}
    assert set(profile["seconds_per_pair"]["stages"]) == set(script.STAGES)
    assert profile["partitions"] == 3 and profile["finished"] is True and profile["peak_rss_mib"] > 10
    assert profile["bottleneck"] in script.STAGES
    assert math.isclose(profile["days_for_100_million_pairs"], 1e8 / profile["pairs_per_s"] / 86400)
    assert result["output"] == str(tmp_path / "out/scores.csv")


def test_parts_say_what_they_are(small, run_main, tmp_path):
    """Each part's own footer holds its sha256, rows and statuses, and the run it belongs to; no JSON beside it counts."""
    config = small()
    assert run_main("--config", config).code == 0
    plan = script.make_plan(script.load_config(config), joins=True)
    for partition, rows in zip(plan.partitions, (4, 4, 2), strict=True):
        metadata = script.read_part_metadata(plan, partition)
        assert is_whole(partition.parquet) and metadata["run"] == plan.fingerprint
        assert (metadata["partition"], metadata["rows"], metadata["statuses"]) == (partition.index, rows, {"ok": rows})
        assert (metadata["similarity_sum"], metadata["similarity_count"], metadata["truncated"]) == (0, 0, 0)  # a dry run
        assert script.read_part(plan, partition).metadata == metadata
    assert sorted(p.name for p in (tmp_path / "out/parts").iterdir() if p.suffix != ".json") == \
        ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]


def test_times_are_never_needed(small, run_main, tmp_path):
    """Without the files of seconds and peaks a run is as finished as with them; only its times and memory are lost."""
    config, out = small(), tmp_path / "out"
    first = run_main("--config", config).result
    scores = (out / "scores.csv").read_bytes()
    for path in out.glob("parts/*.json"):
        path.unlink()
    (out / "scores.csv").unlink()
    before = files(out / "parts")
    again = run_main("--config", config)
    assert again.code == 0 and again.result | {"pairs_per_s": 0} == first | {"pairs_per_s": 0}
    assert (out / "scores.csv").read_bytes() == scores and files(out / "parts") == before
    (out / "parts/part-00000.json").write_text("{half")
    (out / "scores.csv").unlink()
    assert run_main("--config", config).code == 0 and (out / "scores.csv").read_bytes() == scores


@pytest.mark.parametrize("finished", [True, False])
def test_part_of_another_run_is_no_part_of_this(small, run_main, tmp_path, finished):
    """A part that was copied from another run's folder bears that run's mark, and is done again."""
    config, out, other = small(), tmp_path / "out", tmp_path / "other"
    assert run_main("--config", config, "--set", f"output_path={other}", "--set", "exif_orientation=true").code == 0
    assert run_main("--config", config).code == 0
    expected = (out / "parts/part-00001.parquet").read_bytes()
    if not finished:
        (out / "scores.csv").unlink()
    shutil.copy(other / "parts/part-00001.parquet", out / "parts")
    assert (out / "parts/part-00001.parquet").read_bytes() != expected
    assert run_main("--config", config).code == 0
    assert (out / "parts/part-00001.parquet").read_bytes() == expected


def test_parts_are_deterministic(small, run_main, tmp_path):
    """Two runs write the same bytes into scores.csv and into every part."""
    first, second = tmp_path / "first", tmp_path / "second"
    config = small()
    for folder, threads in ((first, 0), (second, 3)):
        assert run_main("--config", config, "--set", f"output_path={folder}", "--set", f"loader_threads={threads}").code == 0
    for name in ("scores.csv", *(f"parts/part-{i:05d}.parquet" for i in range(3))):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_memory_picture_and_quiet_stderr(small, run_cli, tmp_path):
    """As a command a run draws memory-time.png; stderr, no terminal here, shows no progress bar and no control characters."""
    outcome = run_cli("--config", small(rows=60))
    assert outcome.code == 0, outcome.stderr
    assert (tmp_path / "out/memory-time.png").read_bytes().startswith(b"\x89PNG")
    assert re.sub(r"[ -~\n]", "", outcome.stderr) == ""
    assert "%|" not in outcome.stderr and "it/s" not in outcome.stderr
    assert len(outcome.stdout.splitlines()) == 1
    assert leftovers(tmp_path) == []


def test_odd_pictures_are_quiet(small, run_cli, picture_bytes, tmp_path):
    """A picture with a broken EXIF block is scored, or fails, in its row; it is nothing to warn about on stderr."""
    config = small()
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"
    (tmp_path / "pictures/0003.png").write_bytes(picture_bytes("JPEG", exif=exif))
    outcome = run_cli("--config", config, "--set", "exif_orientation=true")
    assert outcome.code == 0
    assert "Warning" not in outcome.stderr


@pytest.mark.parametrize("key", ["csv_path", "image_path", "output_path", "pretrained_model", "cache_path"])
@pytest.mark.parametrize("name", ["a\\0b", "a" * 300, "a/" + "é" * 200])
def test_paths_that_are_none(small, run_main, tmp_path, key, name):
    """A path that no file system takes is exit 2 and one line."""
    outcome = run_main("--config", small(), "--set", f'{key}="{name}"')
    assert outcome.code == 2 and key in outcome.stderr and len(outcome.stderr.splitlines()) == 1


def test_names_cannot_steer_the_terminal(capsys):
    """Control characters that a stranger wrote into a name are shown as escapes."""
    script.say("error: no \x1b[2Jfile\x9b31m\u202egnp.exe, caf\u00e9\r")
    assert capsys.readouterr().err == "error: no \\x1b[2Jfile\\x9b31m\\u202egnp.exe, caf\u00e9\\r\n"


@pytest.mark.slow
def test_nobody_listens(small, tmp_path):
    """With stderr closed, full or gone a run goes on; with nobody at stdout it ends with exit 5 in one line, results kept."""
    config, script_path = small(), ROOT / "image_text_sim_clip.py"
    shell = f'"{sys.executable}" "{script_path}" --config "{config}"'
    for talk in ("2>&-", "--fresh 2>/dev/full", "--fresh 2> >(exec 0<&- >&- 2>&-; sleep 9)"):
        done = subprocess.run(["bash", "-c", f"{shell} {talk}"], capture_output=True, text=True, check=False)
        assert done.returncode == 0 and json.loads(done.stdout)["rows"] == 10
    done = subprocess.run(["bash", "-c", f"{shell} >/dev/full"], capture_output=True, text=True, check=False)
    assert done.returncode == 5 and "stdout" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert (tmp_path / "out/scores.csv").exists()


# ── Again ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.slow
def test_finished_run_again(shapes, run_main, run_cli, tmp_path):
    """A finished run started again prints its summary soon, loads no model, and leaves every file untouched."""
    config = shapes(rows=20, pretrained_model=MODEL)
    first = run_main("--config", config)
    before = files(tmp_path / "out")
    started = time.perf_counter()
    again = run_cli("--config", config, interpreter=("-X", "importtime"))
    assert time.perf_counter() - started < 3
    assert again.code == 0 and again.result == first.result
    log = [line for line in again.stderr.splitlines() if line.startswith("import time:")]
    packages = {line.rpartition("|")[2].strip().partition(".")[0] for line in log}
    assert "yaml" in packages and not packages & {"torch", "transformers", "pandas", "matplotlib"}
    assert "mean similarity" in again.stderr
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("key", ["batch_size=7", "caption_template='a {}'", "limit=9", "preprocess=exact", "partition_rows=5",
                                 "caption_column=url", "decode=scaled", "transparent_over=black", "max_image_bytes=99999"])
def test_other_settings_are_refused(small, run_main, tmp_path, key):
    """A setting that decides scores may not change within a run; the refusal names it, old and new value and the ways out."""
    config = small()
    assert run_main("--config", config).code == 0
    before = files(tmp_path / "out")
    outcome = run_main("--config", config, "--set", key)
    assert outcome.code == 2
    name, value = key.split("=")
    line = outcome.stderr.splitlines()[-1]
    old, new = getattr(script.load_config(config), name), yaml.safe_load(value)
    assert f"({name} was {old!r}, now {new!r})" in line
    assert "--fresh" in line and "output_path" in line
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("key", ["loader_threads=3", "max_failure_rate=0.5", "user_agent=me", "use_cuda=true",
                                 "safetensors_only=true"])
def test_harmless_settings_may_change(small, run_main, key):
    """A setting on which no score hangs may change."""
    config = small()
    first = run_main("--config", config)
    assert run_main("--config", config, "--set", key).result == first.result


def test_changed_content_is_refused(small, run_main, write_table, tmp_path):
    """A changed table is another run, even with the same size and time; a touched or moved one with the same content is not."""
    config = small()
    path = tmp_path / "table.csv"
    first = run_main("--config", config)
    os.utime(path, (1, 1))
    assert run_main("--config", config).result == first.result
    shutil.copy(path, tmp_path / "moved.csv")
    assert run_main("--config", config, "--set", f"csv_path={tmp_path / 'moved.csv'}").result == first.result
    path.write_text(path.read_text().replace("caption 3", "caption x"))
    outcome = run_main("--config", config)
    assert outcome.code == 2 and f"{path.name} has changed" in outcome.stderr
    path.unlink()
    outcome = run_main("--config", config)
    assert outcome.code == 3 and "no such file" in outcome.stderr
    assert "--fresh" not in outcome.stderr  # it may come back, and nothing says that the run is another


def test_other_model_or_device_is_refused(small, run_main, tmp_path):
    """What only the loaded model can tell (weights, device, batch size) may not change either, once a part is written."""
    def scorer(**identity):
        return types.SimpleNamespace(config=script.Config(batch_size=32), identity=lambda: identity)
    config = script.load_config(small())
    plan = script.make_plan(config)
    script.settle(plan, scorer(weights="a", device="cpu"))
    plan = script.make_plan(config)  # no part yet, nothing to mix
    script.settle(plan, scorer(weights="b", device="cpu"))
    plan.partitions[0].parquet.write_bytes(b"a part")
    plan = script.make_plan(config)
    with pytest.raises(script.Trouble) as trouble:
        script.settle(plan, scorer(weights="b", device="cuda"))
    assert trouble.value.exit_code == 2
    assert "device was 'cpu', now 'cuda'" in str(trouble.value) and "weights" not in str(trouble.value)


def test_fresh(small, run_main, read_table, tmp_path):
    """--fresh discards the old run and nothing else in the folder."""
    config, out = small(), tmp_path / "out"
    assert run_main("--config", config).code == 0
    mine = [out / "notes.txt", out / "sub/mine.csv", out / "scores.csv.bak"]
    mine[1].parent.mkdir()
    for path in mine:
        path.write_text("mine")
    outcome = run_main("--config", config, "--fresh", "--set", "limit=3", "--set", "partition_rows=2")
    assert outcome.code == 0 and outcome.result["rows"] == 3
    assert len(read_table(out / "scores.csv")) == 3
    assert sorted(p.name for p in (out / "parts").iterdir()) == [
        "part-00000.json", "part-00000.parquet", "part-00001.json", "part-00001.parquet"]
    assert all(path.read_text() == "mine" for path in mine)


def test_input_that_is_not_there_costs_no_results(small, run_main, tmp_path):
    """A mistyped csv_path is exit 3, with --fresh as well, and discards nothing; after a run without parts, too."""
    config, out = small(), tmp_path / "out"
    assert run_main("--config", config).code == 0
    before = files(out)
    outcome = run_main("--config", config, "--fresh", "--set", f"csv_path={tmp_path / 'tabel.csv'}")
    assert outcome.code == 3 and "tabel.csv" in outcome.stderr and len(outcome.stderr.splitlines()) == 1
    assert files(out) == before
    for part in parts_in(out):
        part.unlink()
    assert run_main("--config", config, "--set", f"csv_path={tmp_path / 'tabel.csv'}").code == 3


@pytest.mark.parametrize(("source", "folder"), [
    ("data/scores.csv", "data"), ("data/pairs.parquet", "data"), ("data", "data"), ("data/*.parquet", "data"),
    ("link/pairs.parquet", "data")])
@pytest.mark.parametrize("fresh", [False, True])
def test_results_never_go_over_the_input(small, run_main, tmp_path, source, folder, fresh):
    """A table that has the name of a result, in the folder of the results, is refused, and stays."""
    import pandas
    config, data = small(), tmp_path / "data"
    data.mkdir()
    (tmp_path / "link").symlink_to(data)
    shutil.copy(tmp_path / "table.csv", data / "scores.csv")
    pandas.read_csv(tmp_path / "table.csv").to_parquet(data / "pairs.parquet")
    before = files(data)
    keys = [f"csv_path={tmp_path / source}", f"output_path={tmp_path / folder}"]
    outcome = run_main("--config", config, *(["--fresh"] if fresh else []), "--set", keys[0], "--set", keys[1])
    assert outcome.code == 2 and "output_path" in outcome.stderr and len(outcome.stderr.splitlines()) == 1
    assert files(data) == before


def test_results_beside_the_input(small, run_main, tmp_path):
    """A table in the folder of the results is read where it lies, if it has a name of its own."""
    config = small(output_path=str(tmp_path))
    assert run_main("--config", config).result["rows"] == 10
    assert run_main("--config", config, "--fresh").result["rows"] == 10


def test_run_that_scored_nothing_may_change(small, run_main, tmp_path):
    """A run that ended before its first part loses nothing by another setting: it is planned anew, without --fresh."""
    config = small()
    assert run_main("--config", config, "--set", f"image_path={tmp_path / 'nowhere'}").code == 3
    assert run_main("--config", config, "--set", "limit=5").result["rows"] == 5


def test_empty_table_that_grows(small, write_table, run_main, read_table, tmp_path):
    """A table that had no rows at the first run is scored when it has some."""
    config = small()
    table = (tmp_path / "table.csv").read_bytes()
    write_table("url,caption\n")
    assert run_main("--config", config).code == 3
    write_table(table)
    outcome = run_main("--config", config)
    assert outcome.code == 2 or (outcome.result["rows"] == 10 and len(read_table(tmp_path / "out/scores.csv")) == 10)


@pytest.mark.parametrize("damage", ["unlink", "truncate"])
def test_lost_manifest(small, write_table, run_main, read_table, tmp_path, damage):
    """Without its manifest an old run's results are never taken for those of another."""
    config = small()
    assert run_main("--config", config).code == 0
    manifest = tmp_path / "out/manifest.json"
    manifest.unlink() if damage == "unlink" else manifest.write_bytes(manifest.read_bytes()[:50])
    rows = [["url", "caption"], *(["none.png", "other"] for _ in range(10))]
    write_table(rows)
    outcome = run_main("--config", config)
    assert outcome.code == 2 or [[r["url"], r["caption"]] for r in read_table(tmp_path / "out/scores.csv")] == rows[1:]


def test_folder_of_an_older_version_is_refused(small, run_main, tmp_path):
    """A folder with parts that version 0.1 wrote, each with a JSON beside it, is exit 2 in one line, and stays as it is."""
    config, out = small(), tmp_path / "out"
    assert run_main("--config", config).code == 0
    manifest = json.loads((out / "manifest.json").read_text())
    manifest = {key: value for key, value in manifest.items() if key != "format"} | {"version": "0.1.0"}
    (out / "manifest.json").write_text(json.dumps(manifest))
    before = files(out)
    for extra in ((), ("--retry-failed",), ("--verify",)):
        outcome = run_main("--config", config, *extra)
        assert outcome.code == 2 and "0.1.0" in outcome.stderr and "--fresh" in outcome.stderr
        assert len(outcome.stderr.splitlines()) == 1 and files(out) == before
    assert run_main("--config", config, "--fresh").result["scored"] == 10


# ── Stopped ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def wait_for(condition, process, timeout_s=60):
    """Wait until `condition()`; fails when the process ends before."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, f"ended before: {process.communicate()}"
        assert time.monotonic() < end
        time.sleep(0.002)


def parts_in(out):
    return sorted((out / "parts").glob("part-*.parquet"))


@pytest.mark.slow
def test_signals(shapes, start_cli, run_main, tmp_path):
    """Each signal ends a run with 128 + its number and keeps its finished parts; the same command ends in the same bytes."""
    config, out = shapes(times=3, pretrained_model=MODEL, partition_rows=256, batch_size=8), tmp_path / "out"
    wanted = 8
    kept = {}
    is_heard = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN  # under nohup nobody hears it
    for signum, parts in ((signal.SIGINT, 1), (signal.SIGTERM, 3), *([(signal.SIGHUP, 5)] if is_heard else [])):
        process = start_cli("--config", config)
        wait_for(lambda parts=parts: len(parts_in(out)) >= parts, process)
        process.send_signal(signum)
        sent = time.monotonic()
        stdout, stderr = process.communicate(timeout=30)
        assert time.monotonic() - sent < 5
        assert process.returncode == 128 + signum
        assert stdout == "" and "Traceback" not in stderr
        assert "the same command" in stderr.splitlines()[-1]
        assert leftovers(tmp_path) == []
        assert parts <= len(parts_in(out)) < wanted
        assert not (out / "scores.csv").exists()
        now = files(out / "parts")
        assert kept.items() <= now.items()  # untouched since
        kept = {n: v for n, v in now.items() if n.replace(".json", ".parquet") in now}
    assert run_main("--config", config).code == 0
    assert kept.items() <= files(out / "parts").items()
    assert len(parts_in(out)) == wanted
    whole = tmp_path / "whole"
    assert run_main("--config", config, "--set", f"output_path={whole}").code == 0
    assert (out / "scores.csv").read_bytes() == (whole / "scores.csv").read_bytes()
    for part in parts_in(whole):
        assert part.read_bytes() == (out / "parts" / part.name).read_bytes()


def test_second_signal_stops_at_once(monkeypatch):
    """The first signal is a wish that is obeyed between batches; the second raises where it strikes."""
    interruption = script.Interruption()
    interruption.deferred = True
    interruption._on_signal(signal.SIGINT, None)
    with pytest.raises(script.Interrupted):
        interruption.check()
    with pytest.raises(script.Interrupted) as second:
        interruption._on_signal(signal.SIGTERM, None)
    assert second.value.signum == signal.SIGTERM


def test_signal_while_waiting_for_a_picture(monkeypatch):
    """A signal is obeyed while the run waits for a slow picture."""
    interruption = script.Interruption()
    monkeypatch.setattr(script, "INTERRUPTION", interruption)
    pool = script.LoaderPool(1)
    pool.add(lambda source: time.sleep(1.5), ["slow"])
    interruption.deferred = True
    interruption._on_signal(signal.SIGINT, None)
    started = time.monotonic()
    with pytest.raises(script.Interrupted):
        pool.take()
    pool.close()
    assert time.monotonic() - started < 1


@pytest.mark.slow
def test_killed(shapes, start_cli, run_main, tmp_path):
    """kill -9 at five moments, from the staging to the last part, changes nothing in what the last rerun writes."""
    config, out = shapes(times=8, partition_rows=125, loader_threads=1), tmp_path / "out"
    moments = [out.exists, (out / "manifest.json").exists, *(lambda n=n: len(parts_in(out)) >= n for n in (2, 8, 14))]
    for moment in moments:
        process = start_cli("--config", config)
        wait_for(moment, process)
        process.kill()
        process.communicate()
        done = parts_in(out)
        assert len(done) < 39 and not (out / "scores.csv").exists()
        assert all(is_whole(part) for part in done)
    outcome = run_main("--config", config)
    assert outcome.code == 0 and outcome.result["rows"] == outcome.result["scored"] == 4800
    assert leftovers(tmp_path) == []
    whole = tmp_path / "whole"
    assert run_main("--config", config, "--set", f"output_path={whole}").code == 0
    assert (out / "scores.csv").read_bytes() == (whole / "scores.csv").read_bytes()


# ── Damaged ───────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("damage", ["truncate", "empty", "unlink", "longer", "no metadata", "broken metadata", "no footer"])
@pytest.mark.parametrize("finished", [False, True])
def test_incomplete_part_is_done_again(small, run_main, tmp_path, damage, finished):
    """A part that is cut off, or without its metadata, is done again."""
    config, out = small(), tmp_path / "out"
    assert run_main("--config", config).code == 0
    before = {name: content for name, (_, content) in files(out).items() if name.endswith((".csv", ".parquet"))}
    if not finished:
        (out / "profile.json").unlink()
        (out / "scores.csv").unlink()
    part = out / "parts/part-00001.parquet"
    data = part.read_bytes()
    if damage == "unlink":
        part.unlink()
    elif damage == "no metadata":
        pq.write_table(pq.read_table(part).replace_schema_metadata(None), part)
    else:
        part.write_bytes({"truncate": data[:-10], "empty": b"", "longer": data + b"PAR1", "no footer": data[:-4] + b"xxxx",
                          "broken metadata": data.replace(b'"statuses"', b'"statuses')}[damage])
    outcome = run_main("--config", config)
    assert outcome.code == 0 and outcome.result["scored"] == 10
    assert {name: content for name, (_, content) in files(out).items() if name.endswith((".csv", ".parquet"))} == before
    assert pq.read_metadata(part).num_rows == 4


@pytest.mark.parametrize("place", [4, 0.3, -9])
def test_flipped_byte_is_found(small, run_main, tmp_path, place):
    """A byte that changed on disk is found when scores.csv is written: exit 7, and the same command again repairs it."""
    config, out = small(), tmp_path / "out"
    assert run_main("--config", config).code == 0
    scores, part = (out / "scores.csv").read_bytes(), out / "parts/part-00001.parquet"
    (out / "scores.csv").unlink()
    data = bytearray(part.read_bytes())
    data[int(place * len(data)) if isinstance(place, float) else place] ^= 1
    part.write_bytes(data)
    outcome = run_main("--config", config)
    assert outcome.code == 7
    assert "part-00001" in outcome.stderr and outcome.stdout == "" and not (out / "scores.csv").exists()
    assert leftovers(tmp_path) == []
    outcome = run_main("--config", config)
    assert outcome.code == 0 and outcome.result["scored"] == 10
    assert (out / "scores.csv").read_bytes() == scores


def test_flipped_byte_in_the_metadata_is_found_at_once(small, run_main, tmp_path):
    """A byte that changed in what the footer says of a part is found at the next start, which does the part again."""
    config, out = small(), tmp_path / "out"
    assert run_main("--config", config).code == 0
    scores, part = (out / "scores.csv").read_bytes(), out / "parts/part-00001.parquet"
    (out / "scores.csv").unlink()
    data = part.read_bytes()
    for key in (b'"run"', b'"rows"', b'"statuses"', b'"measures"', b'"files"', b'"file_sha256"', b'"sha256"'):
        place = data.rfind(key) + 2
        part.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1:])
        assert run_main("--config", config).code == 0
        assert part.read_bytes() == data and (out / "scores.csv").read_bytes() == scores


def without_first_row(part):
    return part and part._replace(table=part.table.slice(1))


def test_lost_rows_are_noticed(small, run_main, monkeypatch, tmp_path):
    """Fewer rows out than in is exit 7, never a shorter scores.csv."""
    real = script.read_part
    monkeypatch.setattr(script, "read_part", lambda plan, partition: without_first_row(real(plan, partition)))
    outcome = run_main("--config", small())
    assert outcome.code == 7 and "10 rows came in" in outcome.stderr


def test_lost_rows_leave_no_scores(small, run_main, monkeypatch, tmp_path):
    """Where rows are missing, no scores.csv is left that would look complete."""
    real = script.read_part
    monkeypatch.setattr(script, "read_part", lambda plan, partition: without_first_row(real(plan, partition)))
    assert run_main("--config", small()).code == 7
    assert not (tmp_path / "out/scores.csv").exists()


# ── Too many failures ─────────────────────────────────────────────────────────────────────────────────────────────────

def failing_table(write_table, rows, ok=0):
    """A table of `rows` rows of which all but the first `ok` name no picture."""
    write_table([["url", "caption"], *(["0000.png" if i < ok else f"none-{i}.png", f"c{i}"] for i in range(rows))])


def test_too_many_failures(small, write_table, run_main, read_table, tmp_path):
    """With too many failures the run stops with exit 4 and the likely cause; scores.csv is complete, the rest not_tried."""
    config = small(partition_rows=300)
    failing_table(write_table, 2000)
    outcome = run_main("--config", config)
    assert outcome.code == 4
    last = outcome.stderr.splitlines()[-1]
    assert "1200 of 1200 rows failed" in last and "missing (1200)" in last and "image_path" in last
    assert outcome.result["failed"] == {"missing": 1200, "not_tried": 800} and outcome.result["rows"] == 2000
    scores = read_table(tmp_path / "out/scores.csv")
    assert [r["status"] for r in scores] == ["missing"] * 1200 + ["not_tried"] * 800
    assert [r["caption"] for r in scores] == [f"c{i}" for i in range(2000)]
    assert json.loads((tmp_path / "out/profile.json").read_text())["finished"] is False


def test_stopped_run_goes_on_with_another_limit(small, write_table, run_main, read_table, tmp_path):
    """After exit 4 the same command with max_failure_rate: 1.0 does the rest."""
    config = small(partition_rows=300)
    failing_table(write_table, 2000)
    assert run_main("--config", config).code == 4
    outcome = run_main("--config", config, "--set", "max_failure_rate=1.0")
    assert outcome.code == 0 and outcome.result["failed"] == {"missing": 2000}
    assert {r["status"] for r in read_table(tmp_path / "out/scores.csv")} == {"missing"}


@pytest.mark.parametrize(("rows", "ok", "rate", "code"), [
    (999, 0, 0.0, 0), (999, 0, 0.9, 0), (1000, 0, 0.9, 4), (1000, 0, 1.0, 0), (1000, 100, 0.9, 0),
    (1000, 99, 0.9, 4), (1000, 999, 0.0, 4), (1000, 1000, 0.0, 0)])
def test_failures_are_judged_from_a_thousand_rows(small, write_table, run_main, rows, ok, rate, code):
    """max_failure_rate is a limit that may be reached; it is judged from 1,000 rows on, and 1.0 turns it off."""
    config = small(partition_rows=1000, max_failure_rate=rate)
    failing_table(write_table, rows, ok)
    assert run_main("--config", config).code == code


# ── The output disk ───────────────────────────────────────────────────────────────────────────────────────────────────

def test_output_path_is_a_file(small, run_main, tmp_path):
    """An output_path that is a file is exit 5 and one line; the file stays."""
    (tmp_path / "file").write_text("mine")
    for extra in ((), ("--fresh",)):
        outcome = run_main("--config", small(), "--set", f"output_path={tmp_path / 'file'}", *extra)
        assert outcome.code == 5 and len(outcome.stderr.splitlines()) == 1
        assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(small, run_main, tmp_path):
    """An output_path that may not be written is exit 5."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o500)
    outcome = run_main("--config", small())
    (tmp_path / "out").chmod(0o700)
    assert outcome.code == 5 and "cannot write" in outcome.stderr


@pytest.mark.slow
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_every_disk_error_is_survived(small, run_main, monkeypatch, tmp_path, call):
    """Whichever call to the disk fails: exit 5, no half-written file, no *.tmp, and the same command does the rest."""
    config, out = small(), tmp_path / "out"
    assert run_main("--config", config).code == 0
    expected = (out / "scores.csv").read_bytes()
    real, failures = getattr(os, call), 0
    for number in itertools.count(1):
        shutil.rmtree(out)
        calls = itertools.count(1)

        def fail(*arguments, calls=calls, number=number, **options):
            if next(calls) == number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **options)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            outcome = run_main("--config", config)
        if outcome.code == 0:
            break
        failures += 1
        assert outcome.code == 5, outcome.stderr
        assert "No space left" in outcome.stderr.splitlines()[-1]
        assert outcome.stdout == ""
        assert leftovers(tmp_path) == []
        assert all(is_whole(part) for part in parts_in(out))
        assert not (out / "scores.csv").exists() or (out / "scores.csv").read_bytes() == expected
        assert run_main("--config", config).code == 0
        assert (out / "scores.csv").read_bytes() == expected
    written = 9  # bad_rows, pairs, manifest twice, three parts, scores, profile; a part's times may be lost
    assert failures >= {"replace": written, "fsync": 2 * written}[call]  # the file, and the folder it is in


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 2_000, 20_000])
def test_full_disk(small, run_cli, run_main, write_table, tmp_path, limit):
    """A disk that takes no more bytes is exit 5 and leaves nothing half-written."""
    config = small(partition_rows=200)
    write_table([["url", "caption"], *([f"{i % 10:04d}.png", hashlib.sha256(b"%d" % i).hexdigest()] for i in range(1000))])

    def restrict():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    outcome = run_cli("--config", config, preexec_fn=restrict)
    assert outcome.code == 5, outcome.stderr
    assert "cannot write" in outcome.stderr and "Traceback" not in outcome.stderr
    assert leftovers(tmp_path) == []
    assert run_main("--config", config).result["scored"] == 1000


@pytest.mark.slow
def test_disk_full_while_drawing(small, run_cli, tmp_path):
    """memory-time.png is the least: where it alone does not fit, the scores are there and correct."""
    config = small(rows=60)

    def restrict():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    outcome = run_cli("--config", config, preexec_fn=restrict)
    assert outcome.code in (0, 5)
    assert "Traceback" not in outcome.stderr
    assert len((tmp_path / "out/scores.csv").read_text().splitlines()) == 61
    assert leftovers(tmp_path) == []


def test_atomic_file_keeps_the_old_content(tmp_path):
    """A file that is being replaced stays as it was until the new one is complete, and if it never is."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with script.atomic_file(path) as file:
        file.write(b"new and longer")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new and longer"
    for error in (ValueError, KeyboardInterrupt, script.Interrupted):
        with pytest.raises(error), script.atomic_file(path) as file:
            file.write(b"half")
            raise error(15)
        assert path.read_bytes() == b"new and longer"
    assert leftovers(tmp_path) == []


def test_leftovers_of_a_killed_run_are_removed(small, run_main, tmp_path):
    """What a killed run left half-written is removed by the next."""
    config, out = small(), tmp_path / "out"
    (out / "parts").mkdir(parents=True)
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    host, pid = script.HOST, int(ended.stdout)
    for name in ("parts/.part-00000.parquet", ".scores.csv", ".pairs.parquet"):
        (out / f"{name}.{host}.{pid}.tmp").write_bytes(b"half")
    kept = [out / "mine.tmp", out / f".scores.csv.another-machine.{pid}.tmp", out / f".scores.csv.{host}.{os.getpid()}.7.tmp",
            out / f"parts/.part-00001.json.{host}.{os.getppid()}.tmp"]
    for path in kept:
        path.write_text("mine, or somebody's who is at work")
    assert run_main("--config", config).code == 0
    assert sorted(leftovers(tmp_path)) == sorted(map(str, kept))


# ── Alone, and under a profiler ───────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.slow
def test_script_alone(run_cli, read_table, tmp_path):
    """The script copied alone into an empty folder, with a model, a table and pictures, does the main job."""
    shutil.copy(ROOT / "image_text_sim_clip.py", tmp_path)
    shutil.copytree(ROOT / "challenge_set/shapes_clip", tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    for number in range(5):
        shutil.copy(ROOT / f"challenge_set/shapes/shape-{number:03d}.png", tmp_path / "pictures")
    lines = (ROOT / "challenge_set/shapes.csv").read_text().splitlines(keepends=True)
    (tmp_path / "pairs.csv").write_text("".join(lines[:14]))
    (tmp_path / "c.yaml").write_text("csv_path: pairs.csv\nimage_path: pictures\nuse_cuda: false\npretrained_model: model\n")
    outcome = run_cli("--config", "c.yaml", script_path=tmp_path / "image_text_sim_clip.py", env={"PYTHONPATH": None})
    assert outcome.code == 0, outcome.stderr
    assert outcome.result["rows"] == outcome.result["scored"] == 13
    good = [row for row in read_table(tmp_path / "scores/scores.csv") if row["match"] == "good"]
    assert len(good) >= 4 and all(0.3 < float(row["similarity"]) <= 1 for row in good)
    told = outcome.stderr.splitlines()
    assert "addons/ is not next to the script" in told[0] and "addons" not in "".join(told[1:]), told
    table = [line.split("  ")[0] for line in map(str.strip, told[1:])]  # of times and memory, as with the add-ons
    assert table == ["pairs", "pre-processing", "metric", "total", "memory", "rate", "limited by", "mean similarity"], told
    other = run_cli("--config", "c.yaml", "--set", "caption_column=match", script_path=tmp_path / "image_text_sim_clip.py",
                    env={"PYTHONPATH": None})
    assert other.code == 2 and "holds another run: discard it with --fresh, or write elsewhere" in other.stderr


@pytest.mark.slow
def test_script_alone_goes_on(run_cli, tmp_path):
    """Copied alone the script does what is left of its own run, and refuses, in one line, to go on with another model."""
    shutil.copy(ROOT / "image_text_sim_clip.py", tmp_path)
    shutil.copytree(ROOT / "challenge_set/shapes_clip", tmp_path / "model")
    keys = {"csv_path": str(ROOT / "challenge_set/shapes.csv"), "image_path": str(ROOT / "challenge_set/shapes"), "limit": 40,
            "use_cuda": False, "pretrained_model": "model", "partition_rows": 10, "output_path": "out"}
    (tmp_path / "c.yaml").write_text(json.dumps(keys))

    def run():
        return run_cli("--config", "c.yaml", script_path=tmp_path / "image_text_sim_clip.py", env={"PYTHONPATH": None})
    assert run().code == 0
    expected = (tmp_path / "out/scores.csv").read_bytes()
    parts = sorted((tmp_path / "out/parts").glob("*.parquet"))
    parts[1].unlink()
    times = [path.stat().st_mtime_ns for path in parts if path.exists()]
    (tmp_path / "out/scores.csv").unlink()
    outcome = run()
    assert outcome.code == 0 and outcome.result["scored"] == 40
    assert (tmp_path / "out/scores.csv").read_bytes() == expected
    assert [path.stat().st_mtime_ns for path in parts if path != parts[1]] == times
    (tmp_path / "model/processor_config.json").write_text(
        (tmp_path / "model/processor_config.json").read_text().replace("bicubic", "bilinear") + "\n")
    outcome = run()
    assert outcome.code == 2 and "another model" in outcome.stderr.splitlines()[-1]


@pytest.mark.slow
def test_memory_profiler(shapes, run_cli):
    """Under `python -m memory_profiler` the run ends well and prints a line-by-line table for each main function."""
    pytest.importorskip("memory_profiler")
    outcome = run_cli("--config", shapes(rows=20, pretrained_model=MODEL), interpreter=("-m", "memory_profiler"), timeout=110)
    assert outcome.code == 0, outcome.stderr
    tables = outcome.stdout.split("Filename: ")[1:]
    assert len(tables) >= 5 and all("Line #" in table and "MiB" in table for table in tables)
    shown = {match for table in tables for match in re.findall(r"^ +\d+ [^\n]*?\bdef (\w+)\(", table, re.M)}
    assert {"make_plan", "encode_images", "encode_texts", "finalize"} <= shown
    assert '"scored": 20' in outcome.stdout


# ── Neighbours do not matter ──────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.slow
def test_full_gpu_halves_the_batch(shapes, run_main, read_table, monkeypatch, tmp_path):
    """Batches that the GPU has no room for are halved until they fit, which is recorded, and give the same scores; where
    not even a single row fits, the run ends with exit 6 and one line. The failed try's memory is free before the next."""
    import torch
    config, room, held = shapes(rows=60, pretrained_model=MODEL, batch_size=32), 5, []
    assert run_main("--config", config).code == 0
    expected = [float(row["similarity"]) for row in read_table(tmp_path / "out/scores.csv")]
    real = script.Scorer._embed

    class Activations:
        pass

    def embed(scorer, forward, batch, with_norms=False):
        def full(model, part):
            mine = Activations()
            assert all(one() is None for one in held)
            if len(part) > room:
                held.append(weakref.ref(mine))
                raise torch.OutOfMemoryError
            return forward(model, part)
        return real(scorer, full if forward.__name__ != "full" else forward, batch, with_norms)
    monkeypatch.setattr(script.Scorer, "_embed", embed)
    monkeypatch.setattr(script, "usable_cores", lambda: 1)
    assert run_main("--config", config, "--fresh").code == 0
    assert json.loads((tmp_path / "out/profile.json").read_text())["oom_halvings"] == len(held) > 0
    assert [float(row["similarity"]) for row in read_table(tmp_path / "out/scores.csv")] == pytest.approx(expected, abs=1e-5)
    room = 0
    outcome = run_main("--config", config, "--fresh")
    assert outcome.code == 6 and len(outcome.stderr.splitlines()) == 1 and "GPU" in outcome.stderr


@pytest.mark.slow
def test_scores_do_not_depend_on_the_cut(shapes, run_main, read_table, tmp_path):
    """Batch size, thread count, partition size and the other rows change no score by more than 1e-5."""
    config = shapes(rows=150, pretrained_model=MODEL)
    found = {}
    cuts = [("auto", "auto", "auto"), (1, 0, 40), (7, 3, 64), (64, 1, 13), (32, 2, 150)]
    for number, (batch, threads, partition) in enumerate(cuts):
        out = tmp_path / f"out-{number}"
        keys = [f"batch_size={batch}", f"loader_threads={threads}", f"partition_rows={partition}", f"output_path={out}"]
        assert run_main("--config", config, *itertools.chain.from_iterable(("--set", key) for key in keys)).code == 0
        found[number] = np.array([float32(row["similarity"]) for row in read_table(out / "scores.csv")])
    assert len(found[0]) == 150 and found[0].std() > 0.05
    for number in range(1, 5):
        assert np.abs(found[number] - found[0]).max() <= 1e-5
    alone = tmp_path / "alone"
    header, *lines = (tmp_path / "table.csv").read_text().splitlines(keepends=True)
    (tmp_path / "table.csv").write_text(header + lines[77])
    assert run_main("--config", config, "--set", f"output_path={alone}").code == 0
    assert abs(float32(read_table(alone / "scores.csv")[0]["similarity"]) - found[0][77]) <= 1e-5


def test_output_names():
    """Columns keep their names but for those that a result needs, and never become one another."""
    results = script.column_names(script.Config().result_columns)
    for names in itertools.product(["url", "status", "input_status", "input_input_status", "detail"], repeat=3):
        if len(set(names)) == 3:
            out = script.output_names(names, results)
            assert len({*out, *results}) == 3 + len(results)
            assert [a for a, b in zip(names, out, strict=True) if a != b] == [n for n in names if n in results]
            assert all(b.startswith("input_") and b.endswith(a) for a, b in zip(names, out, strict=True) if a != b)


@pytest.mark.parametrize(("rows", "size"), [(0, 256), (1, 256), (51_199, 256), (60_000, 300), (3_000_000, 10_000)])
def test_automatic_partition_size(small, monkeypatch, rows, size):
    """partition_rows: auto is rows / 200, between 256 and 10,000, from the input alone."""
    config = script.load_config(small(), ["partition_rows=auto"])
    described = {"kind": "csv", "columns": ["url", "caption"], "rows": rows, "malformed": 0, "files": []}
    monkeypatch.setattr(type(script.find_reader(config.csv_path)), "describe", lambda *_: described)
    plan = script.make_plan(config)
    assert plan.manifest["partition_rows"] == size
    assert sum(p.stop - p.start for p in plan.partitions) == rows
    assert len({p.parquet for p in plan.partitions}) == math.ceil(rows / size)


def test_statuses_of_the_code():
    """Every status that the code raises is one of STATUSES."""
    files = [ROOT / "image_text_sim_clip.py", *(ROOT / "addons/images").glob("*.py")]
    text = "".join(file.read_text() for file in files)
    raised = set(re.findall(r"(?:RowFailure|PassingFailure|Unreachable)\(\"(\w+)\"", text))
    assert len(raised) > 9 and raised <= set(script.STATUSES)


def test_atomic_file_reaches_the_disk_first(tmp_path, monkeypatch):
    """The content is on the disk before the name is, and the name before the next step."""
    path, calls, fsync, replace = tmp_path / "file", [], os.fsync, os.replace

    def noted_fsync(descriptor):
        info = os.fstat(descriptor)
        calls.append("folder" if stat.S_ISDIR(info.st_mode) else f"{info.st_size} bytes")
        fsync(descriptor)

    def noted_replace(*arguments, **options):
        calls.append("rename")
        replace(*arguments, **options)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    with script.atomic_file(path) as file:
        file.write(b"content")
    assert calls == ["7 bytes", "rename", "folder"]
