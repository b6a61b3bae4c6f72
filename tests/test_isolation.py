"""A picture that hangs the decoder or ends the process costs one row: the same command run again gets past it."""
import csv
import os
import pathlib
import signal
import threading
import time

import pytest

import image_text_sim_clip as script
from addons import isolate

ROOT = pathlib.Path(script.__file__).parent

# Loaded by every Python of the run: a picture of 13 x 13 pixels does to the decoder what a broken C library would.
POISON = """
import os, signal, sys, time
import PIL.Image
load = PIL.Image.Image.load
def poisoned(self):
    if self.size == (13, 13):
        time.sleep(3600) if {hangs} else os.kill(os.getpid(), signal.SIGSEGV)
    return load(self)
PIL.Image.Image.load = poisoned
import PIL.PngImagePlugin, PIL.ImageFile
file_load = PIL.ImageFile.ImageFile.load
def poisoned_file(self):
    if self.size == (13, 13):
        time.sleep(3600) if {hangs} else os.kill(os.getpid(), signal.SIGSEGV)
    return file_load(self)
PIL.ImageFile.ImageFile.load = poisoned_file
"""


@pytest.fixture
def poisoned_run(tmp_path, picture_bytes, write_config, write_table):
    """A table of 600 rows, one of them poison, in partitions of 100; returns the config and the environment."""
    def make(hangs, **keys):
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(POISON.format(hangs=hangs))
        config = write_config(partition_rows=100, loader_threads=2, **keys)
        for number in range(60):
            size = (13, 13) if number == 37 else (20, 20 + number)
            (tmp_path / "pictures" / f"{number}.png").write_bytes(picture_bytes("PNG", size=size, colour=(number, 9, 9)))
        write_table([("url", "caption"), *((f"{i if i == 37 else i % 36}.png", f"caption {i}") for i in range(60)),
                     *((f"{i % 36}.png", f"caption {i}") for i in range(60, 600))])
        return config, {"PYTHONPATH": str(tmp_path / "site")}
    return make


def statuses(tmp_path):
    """status -> captions of scores.csv."""
    found: dict[str, list[str]] = {}
    with (tmp_path / "out" / "scores.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["status"], []).append(row["caption"])
    return found


@pytest.mark.slow
def test_picture_that_kills_the_process_costs_one_row(poisoned_run, run_cli, tmp_path):
    """The first run dies; the same command again scores all other rows, and the poison row is `crashed`."""
    config, env = poisoned_run(hangs=False)
    first = run_cli("--config", config, env=env)
    assert first.code == -signal.SIGSEGV
    assert list((tmp_path / "out" / "parts").glob("*.trying"))
    second = run_cli("--config", config, env=env)
    assert second.code == 0, second.stderr
    assert second.result["failed"] == {"crashed": 1}
    assert second.result["rows"] == 600
    assert statuses(tmp_path)["crashed"] == ["caption 37"]
    assert not list((tmp_path / "out" / "parts").glob("*.trying"))


@pytest.mark.slow
def test_picture_that_hangs_the_decoder_costs_one_row(poisoned_run, start_cli, run_cli, tmp_path):
    """A run that hangs is killed by its user; the same command again ends, with one row `crashed`."""
    config, env = poisoned_run(hangs=True)
    first = start_cli("--config", config, env=env)
    time.sleep(4)
    assert first.poll() is None
    first.kill()
    first.wait()
    second = run_cli("--config", config, env=env)
    assert second.code == 0, second.stderr
    assert statuses(tmp_path)["crashed"] == ["caption 37"]


def test_isolated_decoding_gives_the_same_picture(noise, picture_bytes):
    """Child and parent agree on pixels and on statuses."""
    config = script.Config()
    decoder = isolate.IsolatedDecoder({}, script.RowFailure)
    data = picture_bytes("PNG", image=noise(120, 80))
    assert decoder(data, config).tobytes() == script.decode_image(data, config).tobytes()
    for broken in (b"", b"<html>", data[:200]):
        with pytest.raises(script.RowFailure) as here:
            script.decode_image(broken, config)
        with pytest.raises(script.RowFailure) as there:
            decoder(broken, config)
        assert (here.value.status, here.value.detail) == (there.value.status, there.value.detail)
    decoder.close()


def test_killed_child_is_replaced(noise, picture_bytes):
    """A child that was killed in between costs the picture at hand, and the next one gets a new child."""
    decoder, data = isolate.IsolatedDecoder({}, script.RowFailure), picture_bytes("PNG", image=noise(60, 60))
    decoder(data, script.Config())
    os.kill(decoder._child.pid, signal.SIGKILL)
    with pytest.raises(script.RowFailure, match="crashed"):
        decoder(data, script.Config())
    assert decoder(data, script.Config()).size == (60, 60)
    decoder.close()


@pytest.mark.slow
def test_kill_minus_nine_changes_no_result(shapes, start_cli, run_cli, tmp_path):
    """A partition left behind by a killed run is decoded in isolation, to the same bytes."""
    config = shapes(times=4, partition_rows=256)
    assert run_cli("--config", config).code == 0
    expected = (tmp_path / "out" / "scores.csv").read_bytes()
    assert run_cli("--config", config, "--fresh", "--set", "limit=300").code == 0
    for name in ("part-00000", "part-00001"):
        (tmp_path / "out" / "parts" / f"{name}.trying").touch()
    (tmp_path / "out" / "parts" / "part-00001.parquet").unlink()
    (tmp_path / "out" / "profile.json").unlink()
    assert run_cli("--config", config, "--set", "limit=300").code == 0
    assert expected.startswith((tmp_path / "out" / "scores.csv").read_bytes()[:2000])
    assert (tmp_path / "out" / "scores.csv").read_bytes() in expected


# ── Markers ───────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def worker(write_config, write_table, picture_bytes, tmp_path, monkeypatch):
    """A worker of a dry run over three partitions of two pictures, and an interruption of its own."""
    config = script.load_config(write_config(partition_rows=2, loader_threads=1))
    for number in range(6):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(picture_bytes("PNG", size=(8, 8 + number)))
    write_table([("url", "caption"), *((f"{number}.png", "c") for number in range(6))])
    monkeypatch.setattr(script, "INTERRUPTION", script.Interruption())
    return script.Worker(config, script.plan(config), "local")


def test_marker_is_there_before_the_first_picture(worker, monkeypatch):
    """A partition is marked before any of its pictures is decoded, or one that kills at once would never be found out."""
    marked, add = [], script.LoaderPool.add

    def noting(pool, load, sources):
        marked.append(len(list(worker.plan.output.glob("parts/*.trying"))))
        add(pool, load, sources)
    monkeypatch.setattr(script.LoaderPool, "add", noting)
    assert len(list(worker.run(worker.plan.partitions))) == 3
    assert marked == [1, 2, 2]  # its own, and that of the one before, which is at work


def test_marker_of_an_earlier_run_outlives_an_interruption(worker):
    """A run that is stopped before it comes to a partition left behind does not forget that partition."""
    first, second, third = worker.plan.partitions
    third.trying.touch()
    summaries = worker.run(worker.plan.partitions)
    next(summaries)
    script.INTERRUPTION._on_signal(signal.SIGTERM, None)
    with pytest.raises(script.Interrupted):
        next(summaries)
    assert first.parquet.exists() and not second.parquet.exists()
    assert list(third.folder.glob("*.trying")) == [third.trying]


def test_stopped_while_a_picture_hangs(worker, monkeypatch):
    """Who stops a run that hangs, by Ctrl-C, leaves the mark that has the next run try that partition in isolation."""
    begun = threading.Event()
    monkeypatch.setattr(script, "HANGS_S", 0.1)
    monkeypatch.setattr(script, "read_file", lambda *arguments: begun.set() or time.sleep(2) or b"")
    threading.Thread(target=lambda: (begun.wait() and time.sleep(0.3)) or script.INTERRUPTION._on_signal(2, None)).start()
    with pytest.raises(script.Interrupted):
        next(worker.run(worker.plan.partitions))
    assert worker.plan.partitions[0].trying.exists()


def test_captions_without_pictures_can_be_interrupted(worker, write_table):
    """Partitions that have nothing to load obey a signal as well."""
    write_table([("url", "caption"), *((f"{number}.png", "") for number in range(6))])
    plan = script.plan(worker.config)
    worker.plan = plan
    summaries = worker.run(plan.partitions)
    next(summaries)
    script.INTERRUPTION._on_signal(signal.SIGINT, None)
    with pytest.raises(script.Interrupted):
        next(summaries)
    assert not list(plan.output.glob("parts/*.trying"))
