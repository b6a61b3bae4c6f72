"""An image that hangs the decoder or ends the process costs one row: the same command run again gets past it."""
import contextlib
import csv
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

import image_text_sim_clip as script
from addons.images import isolate
from addons.images.marks import mark_of

ROOT = pathlib.Path(script.__file__).parent

# Loaded by every Python of the run: an image of 13 x 13 pixels does to the decoder what a broken C library would.
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


SETTINGS = script.DRY_RUN_SETTINGS


@pytest.fixture
def decoder():
    """An isolated decoder for the dry run's settings."""
    made = isolate.IsolatedDecoder(script.Config(decode="scaled"), SETTINGS)
    yield made
    made.close()


@pytest.fixture
def poison(tmp_path, monkeypatch):
    """Have every Python that is started from now on hang, or die, at an image of 13 x 13 pixels."""
    def spread(hangs):
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(POISON.format(hangs=hangs))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return spread


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
@pytest.mark.parametrize("interpreter", [(), ("-m", "memory_profiler")], ids=["python", "memory_profiler"])
def test_image_that_kills_the_process_costs_one_row(poisoned_run, run_cli, tmp_path, interpreter):
    """The first run dies; the same command again scores all other rows, and the poison row is `crashed`.

    Under memory_profiler __main__ is the profiler, which the child must not mistake for this program.
    """
    config, env = poisoned_run(hangs=False)
    first = run_cli("--config", config, env=env, interpreter=interpreter)
    assert first.code == -signal.SIGSEGV
    assert list((tmp_path / "out" / "parts").glob("*.trying"))
    second = run_cli("--config", config, env=env, interpreter=interpreter)
    assert second.code == 0, second.stderr
    assert '"rows": 600' in second.stdout and '"failed": {"crashed": 1}' in second.stdout
    assert statuses(tmp_path)["crashed"] == ["caption 37"]
    assert not list((tmp_path / "out" / "parts").glob("*.trying"))


@pytest.mark.slow
def test_image_that_hangs_the_decoder_costs_one_row(poisoned_run, start_cli, run_cli, tmp_path):
    """A run that hangs is killed by its user; the same command again ends, with one row `crashed`."""
    config, env = poisoned_run(hangs=True)
    first = start_cli("--config", config, env=env)
    patience = time.monotonic() + 60
    while not list((tmp_path / "out/parts").glob("*.trying")) and time.monotonic() < patience:  # a busy machine starts late
        time.sleep(0.1)
    time.sleep(4)
    assert first.poll() is None
    first.kill()
    first.wait()
    second = run_cli("--config", config, env=env, timeout=110)
    assert second.code == 0, second.stderr
    assert statuses(tmp_path)["crashed"] == ["caption 37"]


@pytest.mark.slow
def test_image_that_hangs_the_decoder_costs_one_row_of_the_same_run(poisoned_run, run_cli, tmp_path):
    """What overruns decode_timeout_s is `crashed`, and the run goes on with all others."""
    config, env = poisoned_run(hangs=True, decode_timeout_s=1.0)
    outcome = run_cli("--config", config, env=env)
    assert outcome.code == 0, outcome.stderr
    assert outcome.result["failed"] == {"crashed": 1}
    assert statuses(tmp_path)["crashed"] == ["caption 37"]
    assert not list((tmp_path / "out" / "parts").glob("*.trying"))


@pytest.mark.slow
def test_after_a_crash_all_that_is_left_is_isolated(run_cli, tmp_path, picture_bytes, write_config, write_table):
    """Six images that kill the process, in six partitions, take two runs: the second one decodes everything in isolation."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(POISON.format(hangs=False))
    config = write_config(partition_rows=10, loader_threads=2)
    for number in range(60):
        size = (13, 13) if number % 10 == 5 else (20, 20 + number)
        (tmp_path / "pictures" / f"{number}.png").write_bytes(picture_bytes("PNG", size=size, colour=(number, 9, 9)))
    write_table([("url", "caption"), *((f"{number}.png", f"caption {number}") for number in range(60))])
    env = {"PYTHONPATH": str(tmp_path / "site")}
    assert run_cli("--config", config, env=env).code == -signal.SIGSEGV
    second = run_cli("--config", config, env=env)
    assert second.code == 0, second.stderr
    assert second.result["failed"] == {"crashed": 6} and second.result["scored"] == 54


def test_isolated_decoding_gives_the_same_image(decoder, noise, picture_bytes):
    """Child and parent agree on pixels and on statuses."""
    config = script.Config(decode="scaled")
    for data in (picture_bytes("PNG", image=noise(120, 80)), picture_bytes("JPEG", image=noise(1000, 900)),
                 picture_bytes("PNG", image=noise(3, 1001))):
        here, there = script.ImageDecoder(config, SETTINGS)(data), decoder.decode(data)
        assert (here.mode, here.size, here.tobytes()) == (there.mode, there.size, there.tobytes())
    for broken in (b"", b"<html>", data[:200]):
        with pytest.raises(script.RowFailure) as here:
            script.decode_image(broken, config)
        with pytest.raises(script.RowFailure) as there:
            decoder.decode(broken)
        assert (here.value.status, here.value.detail) == (there.value.status, there.value.detail)


def test_killed_child_is_replaced(decoder, noise, picture_bytes):
    """A child that was killed in between costs the image at hand, and the next one gets a new child."""
    data = picture_bytes("PNG", image=noise(60, 60))
    for pause_s in (0, 0.5):  # before and after it is noticed
        decoder.decode(data)
        os.kill(decoder.child_pid, signal.SIGKILL)
        time.sleep(pause_s)
        with pytest.raises(script.RowFailure, match="crashed: decoder ended the process"):
            decoder.decode(data)
        assert decoder.decode(data).size == (60, 60)


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.05, 0.2, 0.4, 0.6, 0.8, 1.0])
def test_child_that_is_killed_while_it_answers_is_replaced(decoder, picture_bytes, after_s):
    """A child may end at any moment, also in the middle of its answer: one image is lost, and nobody waits for ever."""
    large = picture_bytes("PNG", size=(7000, 7000), compress_level=1)
    decoder.decode(picture_bytes("PNG"))
    killer = threading.Timer(after_s, os.kill, (decoder.child_pid, signal.SIGKILL))
    killer.start()
    with contextlib.suppress(script.RowFailure):
        decoder.decode(large)
    killer.join()
    with contextlib.suppress(script.RowFailure):  # killed after its answer
        decoder.decode(picture_bytes("PNG"))
    assert decoder.decode(picture_bytes("PNG")).size == (40, 30)


def test_decoder_that_does_not_return_is_ended(decoder, poison, picture_bytes):
    """An image that is not decoded within the limit is `crashed`, and the process that hung at it is gone."""
    poison(hangs=True)
    decoder.limit_s = 0.5
    decoder.decode(picture_bytes("PNG"))
    hung = decoder.child_pid
    started = time.monotonic()
    with pytest.raises(script.RowFailure, match="crashed: decoder did not return"):
        decoder.decode(picture_bytes("PNG", size=(13, 13)))
    assert time.monotonic() - started < 5
    assert not psutil.pid_exists(hung)
    assert decoder.decode(picture_bytes("PNG")).size == (40, 30)


def test_closing_does_not_wait_for_an_image_that_hangs(decoder, poison, picture_bytes):
    """Who stops a run at an image that hangs does not wait for its limit, nor do the threads behind that image."""
    poison(hangs=True)
    decoder.decode(picture_bytes("PNG"))
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(decoder.decode, picture_bytes("PNG", size=(13, 13))) for _ in range(4)]
        time.sleep(0.5)
        started = time.monotonic()
        decoder.close()
    assert time.monotonic() - started < 3
    assert {future.exception().status for future in waiting} == {"crashed", "not_tried"}


def test_start_of_the_child_is_not_in_the_limit(decoder, tmp_path, picture_bytes, monkeypatch):
    """The time that a new child takes to import what it needs is not an image's."""
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep(1)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    decoder.limit_s = 0.5
    assert decoder.decode(picture_bytes("PNG")).size == (40, 30)


def test_child_that_cannot_start_is_trouble(decoder, tmp_path, picture_bytes, monkeypatch):
    """Where no child can be started, the run says so in one line: no image is to blame."""
    (tmp_path / "sitecustomize.py").write_text("import os\nos._exit(1)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(script.Trouble, match="cannot be started"):
        decoder.decode(picture_bytes("PNG"))


def test_many_threads_share_the_child(decoder, picture_bytes):
    """Each thread gets its own image back."""
    data = {n: picture_bytes("PNG", size=(n, 5)) for n in range(1, 41)}
    decoder.decode(data[1])
    with ThreadPoolExecutor(8) as pool:
        assert [image.width for image in pool.map(decoder.decode, data.values())] == list(data)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_interrupt_is_the_parents(decoder, picture_bytes, signum):
    """Ctrl-C, or a terminal that closes, which reach all processes of that terminal, do not end the child."""
    decoder.decode(picture_bytes("PNG"))
    child = decoder.child_pid
    os.kill(child, signum)
    time.sleep(0.1)
    assert decoder.decode(picture_bytes("PNG")).size == (40, 30)
    assert decoder.child_pid == child


def test_interrupt_while_the_child_starts(decoder, tmp_path, picture_bytes, monkeypatch):
    """Nor does it before the child has set up its signals."""
    (tmp_path / "sitecustomize.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert decoder.decode(picture_bytes("PNG")).size == (40, 30)


def test_child_ends_with_its_parent(tmp_path):
    """A killed run leaves no child behind."""
    program = ("import os\nimport image_text_sim_clip as script\nfrom addons.images import isolate\n"
               "decoder = isolate.IsolatedDecoder(script.Config(), script.DRY_RUN_SETTINGS)\n"
               "try: decoder.decode(b'')\nexcept script.RowFailure: print(decoder.child_pid, flush=True)\n"
               "os.kill(os.getpid(), 9)")
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, encoding="utf-8", timeout=60)
    assert ended.returncode == -signal.SIGKILL
    child, since = int(ended.stdout), time.monotonic()
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() - since < 5
        time.sleep(0.05)


def test_decoder_that_prints(decoder, picture_bytes, capfd):
    """What a C library prints in the child goes to stderr: stdout belongs to the result."""
    decoder.decode(picture_bytes("PNG"))
    decoder._pool.schedule(os.write, (1, b"libpng: hello")).result(10)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "libpng: hello")


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
    """A worker of a dry run over three partitions of two images, and an interruption of its own."""
    config = script.load_config(write_config(partition_rows=2, loader_threads=1))
    for number in range(6):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(picture_bytes("PNG", size=(8, 8 + number)))
    write_table([("url", "caption"), *((f"{number}.png", "c") for number in range(6))])
    monkeypatch.setattr(script, "INTERRUPTION", script.Interruption())
    return script.Worker(config, script.make_plan(config), "local", script.Clock())


def test_marker_is_there_before_the_first_image(worker, monkeypatch):
    """A partition is marked before any of its images is decoded, or one that kills at once would never be found out."""
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
    mark_of(third).touch()
    summaries = worker.run(worker.plan.partitions)
    next(summaries)
    script.INTERRUPTION._on_signal(signal.SIGTERM, None)
    with pytest.raises(script.Interrupted):
        next(summaries)
    assert first.parquet.exists() and not second.parquet.exists()
    assert list(third.folder.glob("*.trying")) == [mark_of(third)]


def test_stopped_while_an_image_hangs(worker, monkeypatch):
    """Who stops a run that hangs, by Ctrl-C, leaves the mark that has the next run try that partition in isolation."""
    begun = threading.Event()
    monkeypatch.setattr(script, "HANGS_S", 0.1)

    def hang(source):
        begun.set()
        time.sleep(2)
        return b""

    def interrupt():
        begun.wait()
        time.sleep(0.3)
        script.INTERRUPTION._on_signal(signal.SIGINT, None)
    worker.loader = dataclasses.replace(worker.loader, read=hang)
    threading.Thread(target=interrupt).start()
    with pytest.raises(script.Interrupted):
        next(worker.run(worker.plan.partitions))
    assert mark_of(worker.plan.partitions[0]).exists()


def test_captions_without_images_can_be_interrupted(worker, write_table):
    """Partitions that have nothing to load obey a signal as well."""
    write_table([("url", "caption"), *((f"{number}.png", "") for number in range(6))])
    plan = script.make_plan(worker.config)
    worker.plan = plan
    summaries = worker.run(plan.partitions)
    next(summaries)
    script.INTERRUPTION._on_signal(signal.SIGINT, None)
    with pytest.raises(script.Interrupted):
        next(summaries)
    assert not list(plan.output.glob("parts/*.trying"))
