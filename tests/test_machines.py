"""The machines and habits that people have: odd interpreters and streams, disks that know less, processes that are stopped."""
import concurrent.futures
import contextlib
import errno
import json
import os
import pathlib
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings

import pytest
from conftest import ROOT

import image_text_sim_clip as script
from addons.engines import accelerate, ray
from addons.images import isolate, stopwatch
from addons.images.guard import Guard
from addons.measures import heads, passport
from addons.models import openvino_convert

DRY = {"pretrained_model": "none", "use_cuda": False}


@pytest.fixture
def config(tmp_path, write_table, write_config, picture_bytes):
    """The path of a config for a dry run over 3 rows."""
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / f"images/{number}.png").write_bytes(picture_bytes())
    table = write_table([["url", "caption"], *([f"{number}.png", f"caption {number}"] for number in range(3))])
    return write_config(csv_path=str(table), image_path=str(tmp_path / "images"), output_path=str(tmp_path / "out"), **DRY)


# ── Interpreters and streams ──────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("program", ["image_text_sim_clip.py", "curate.py"])
@pytest.mark.parametrize(("flags", "env"), [(("-I",), {}), ((), {"PYTHONSAFEPATH": "1"}), (("-OO", "-W", "error"), {})])
def test_interpreters(config, run_cli, program, flags, env):
    """An isolated or an optimising interpreter finds the script's own modules, from any folder."""
    if program == "curate.py":
        outcome = run_cli("--help", interpreter=flags, env=env, script_path=ROOT / program)
        assert outcome.code == 0 and "curate" in outcome.stdout, outcome
    else:
        outcome = run_cli("--config", config, interpreter=flags, env=env)
        assert outcome.code == 0 and outcome.result["scored"] == 3, outcome


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_stdout_takes_the_summary(config, run_cli, tmp_path, encoding):
    """An output_path that the encoding of stdout has no letters for costs no summary and no exit code."""
    out = tmp_path / "\u65e5\u672c \U0001f600"
    outcome = run_cli("--config", config, "--set", f"output_path={out}", env={"PYTHONIOENCODING": encoding})
    assert outcome.code == 0 and outcome.result["output"] == str(out / "scores.csv"), outcome


def test_interrupted_without_stdout(config, tmp_path):
    """SIGTERM ends a run whose stdout is closed with 143 as it ends any other."""
    program = ("import os, signal, sys; sys.argv[1:] = ['--config', sys.argv[1]]; import image_text_sim_clip as script\n"
               "script.find_engine = lambda config: lambda job: os.kill(os.getpid(), signal.SIGTERM)\nscript.run()")
    shell = f'"{sys.executable}" -c "$0" "{config}" >&-'
    done = subprocess.run(["bash", "-c", shell, program], capture_output=True, text=True, check=False, cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 143 and "Traceback" not in done.stderr, done


@pytest.mark.parametrize("program", ["image_text_sim_clip.py", "curate.py"])
def test_talk_does_not_go_to_stdout(tmp_path, program):
    """With stderr closed, what would be said is lost, and stdout is the result's alone."""
    shell = f'"{sys.executable}" "{ROOT / program}" --config nowhere.yaml 2>&-'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "", done


# ── Homes ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_no_home_folder(monkeypatch):
    """Where the user has no home folder, runtime: openvino says in one line what to set."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(script.Trouble, match="XDG_CACHE_HOME") as told:
        openvino_convert.cache_folder()
    assert told.value.exit_code == 2
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(openvino_convert.cache_folder()).startswith("/somewhere/")


def test_home_of_nobody():
    """A head in the home folder of somebody unknown is exit 2 and one line that names its key."""
    measure = object.__new__(heads.Heads)
    measure.config = script.Config(measures={"heads": {"aesthetic": {"file": "~nobody-of-that-name/head.pth"}}})
    with pytest.raises(script.Trouble, match=r"measures.heads.aesthetic .*no home folder for ~nobody-of-that-name") as told:
        _ = measure.files
    assert told.value.exit_code == 2


# ── Disks ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

def fail_for_folders(monkeypatch, code):
    sync = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        sync(descriptor)
    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize(("code", "exit_code"), [(errno.EINVAL, 0), (errno.EOPNOTSUPP, 0), (errno.EIO, 5)])
def test_disk_that_syncs_no_folders(config, run_main, monkeypatch, code, exit_code):
    """A disk that cannot force a folder to it (Samba, some FUSE) will do; one that fails in it will not."""
    fail_for_folders(monkeypatch, code)
    outcome = run_main("--config", config)
    assert outcome.code == exit_code, outcome


def test_disk_without_flock(config, run_main, monkeypatch, recwarn):
    """On a disk without flock (Lustre) a run is as right, and says nothing about it part by part."""
    import fcntl

    def flock(descriptor, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    monkeypatch.setattr(fcntl, "flock", flock)
    warnings.simplefilter("always")
    outcome = run_main("--config", config, "--set", "partition_rows=1")
    assert outcome.code == 0 and outcome.result["scored"] == 3
    assert not [warning for warning in recwarn if "flock" in str(warning.message)]


def fail_at(monkeypatch, name, code, method):
    """Have `method` of pathlib.Path fail for files of that name."""
    real = getattr(pathlib.Path, method)

    def fail(self, *arguments, **options):
        if self.name == name:
            raise OSError(code, os.strerror(code), str(self))
        return real(self, *arguments, **options)
    monkeypatch.setattr(pathlib.Path, method, fail)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize(("name", "method"), [("manifest.json", "read_bytes"), ("manifest.json", "stat"), ("parts", "stat"),
                                              ("part-00001.trying", "stat"), ("scores.csv", "stat"), ("pairs.parquet", "stat")])
def test_disk_that_answers_late(config, run_main, monkeypatch, tmp_path, name, method, code):
    """An error of the output's disk that may pass is exit 5 in one line, at whichever file: never another run, nor a bug."""
    with monkeypatch.context() as patch:
        fail_at(patch, name, code, method)
        outcome = run_main("--config", config, "--set", "partition_rows=1")
        assert outcome.code in (0, 5), outcome  # 0: nobody asks
    assert run_main("--config", config, "--set", "partition_rows=1").result["scored"] == 3
    before = (tmp_path / "out/scores.csv").read_bytes()
    (tmp_path / "out/parts/part-00001.parquet").unlink()
    with monkeypatch.context() as patch:
        fail_at(patch, name, code, method)
        outcome = run_main("--config", config, "--set", "partition_rows=1")
        assert outcome.code in (0, 5) and "--fresh" not in outcome.stderr and "anew" not in outcome.stderr, outcome
    assert run_main("--config", config, "--set", "partition_rows=1").code == 0
    assert (tmp_path / "out/scores.csv").read_bytes() == before


def test_no_room_for_temporary_files(monkeypatch):
    """An image that the score passport cannot keep on a full disk is not kept, and the run goes on."""
    def refuse(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", refuse)
    kept = passport.KeptImages()
    read = kept.keep_from({"large": b"0" * (passport.IN_MEMORY_BYTES + 1), "small": b"1"}.__getitem__)
    kept.wait_for(["large", "small"])
    assert len(read("large")) > passport.IN_MEMORY_BYTES and read("small") == b"1"
    assert kept.take("large") is None and kept.take("small") == b"1"
    kept.forget(["large", "small"])
    kept.close()


# ── Processes that are stopped ────────────────────────────────────────────────────────────────────────────────────────

class Clock:
    """A clock for `time.monotonic`, which passes when told to."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


def test_stopwatch_counts_no_stops(monkeypatch):
    """Between two looks at most a second counts, however long the process was stopped."""
    clock = Clock()
    monkeypatch.setattr(stopwatch.time, "monotonic", clock.monotonic)
    watch = stopwatch.Stopwatch()
    clock.now += 0.25
    assert watch.look() == 0.25
    clock.now += 7200
    assert watch.look() == 1.25
    watch.restart()
    clock.now += 0.5
    assert watch.look() == 0.5


def test_image_of_a_stopped_process(monkeypatch):
    """An image at whose decoding the process was stopped for an hour is no image that did not decode in time."""
    clock = Clock()
    monkeypatch.setattr(stopwatch.time, "monotonic", clock.monotonic)
    guard = Guard(script.Config(decode_timeout_s=2.0, **DRY), script.DRY_RUN_SETTINGS)

    class Idle:
        waits = 0
    stopped = threading.Event()

    def decode():
        clock.now += 3600
        stopped.wait(0.6)
        return "an image"
    assert guard.watch(decode, Idle()) == "an image" and not guard.isolates_all
    guard.close()
    answer = concurrent.futures.Future()
    threading.Timer(0.6, answer.set_result, ["an image"]).start()
    clock.now += 3600
    assert isolate.result_within(2.0, answer) == "an image"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no SIGSTOP here")
def test_stopped_and_continued(config, start_cli, tmp_path, write_table):
    """Ctrl-Z, or Slurm's suspension, in the middle of a run changes nothing in its results."""
    from PIL import Image
    for number in range(24):
        Image.effect_noise((2500, 2500), 80).convert("RGB").save(tmp_path / f"images/{number}.jpg")
    write_table([["url", "caption"], *([f"{number}.jpg", f"caption {number}"] for number in range(24))])
    process = start_cli("--config", config, "--set", "decode_timeout_s=4", "--set", "loader_threads=2")
    for _ in range(2):  # of which each counts for a second
        time.sleep(1)
        if process.poll() is None:
            process.send_signal(signal.SIGSTOP)
            time.sleep(5)
            process.send_signal(signal.SIGCONT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and json.loads(stdout)["scored"] == 24, stderr


def test_child_that_cannot_be_started(monkeypatch):
    """Without a /dev/shm to write to, the message says what is missing, and speaks of no crash that there was not."""
    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    monkeypatch.setattr("pebble.ProcessPool.schedule", refuse)
    decoder = isolate.IsolatedDecoder(script.Config(**DRY), script.DRY_RUN_SETTINGS)
    with pytest.raises(script.Trouble, match=r"Read-only file system.*/dev/shm") as told:
        decoder.decode(b"")
    assert told.value.exit_code == 2 and "crash" not in str(told.value)


# ── Engines that wait for others ──────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "many"}, {"WORLD_SIZE": "0"},
                                         {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "", "MASTER_PORT": "1"}])
def test_world_size_without_a_launcher(config, run_main, monkeypatch, environment):
    """A WORLD_SIZE that was left in the environment is exit 2 and one line with the two ways out."""
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    outcome = run_main("--config", config)
    assert outcome.code == 2 and "engine=local" in outcome.stderr and len(outcome.stderr.splitlines()) == 1, outcome
    assert run_main("--config", config, "--set", "engine=local").code == 0


def test_signals_while_ranks_are_awaited():
    """While torch waits for other ranks SIGTERM ends the process itself; afterwards the run hears it again."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGHUP)
    try:
        with accelerate.ended_by_signals():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) == script.INTERRUPTION._on_signal
    finally:
        for signum, handler in zip((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), before, strict=True):
            signal.signal(signum, handler)


@pytest.mark.slow
def test_rank_whose_others_never_come(config, start_cli):
    """A rank that waits for others can be ended by SIGTERM, within seconds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    process = start_cli("--config", config, env={"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                                                 "MASTER_PORT": str(port)})
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode in (-signal.SIGTERM, 143)


def test_rank_0_says_whom_it_waits_for(tmp_path, monkeypatch, capsys):
    """Who waits for ranks that may have died without a launcher that sees it is told which, once."""
    monkeypatch.setattr(accelerate, "TELL_AFTER_S", 0.0)
    marks = [tmp_path / f"rank-{rank}" for rank in (1, 2, 3)]
    marks[1].touch()
    for delay_s, mark in ((0.3, marks[0]), (0.5, marks[2])):
        threading.Timer(delay_s, mark.touch).start()
    accelerate.await_marks(marks)
    assert capsys.readouterr().err.count("waiting for ranks 1, 3") == 1 and not any(mark.exists() for mark in marks)


def test_slurm_tells_of_the_way_out(config, run_main, monkeypatch):
    """A task that leaves partitions to others says how many, and what to set where there are no others."""
    for name, value in (("ID", 0), ("MIN", 0), ("MAX", 2), ("COUNT", 3)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    outcome = run_main("--config", config, "--set", "partition_rows=1")
    assert outcome.code == 0 and "2 partitions are left" in outcome.stderr and "engine=local" in outcome.stderr


def test_ray_cluster_that_is_not_there():
    """An address at which no cluster listens is exit 2 at once; Ray itself tries for minutes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ray.refuse_unreachable(f"127.0.0.1:{port}")
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "head:many"):
        with pytest.raises(script.Trouble, match="no cluster answers") as told:
            ray.refuse_unreachable(address)
        assert told.value.exit_code == 2
    ray.refuse_unreachable("auto")


@pytest.mark.slow
@pytest.mark.parametrize(("key", "told"), [("ray_gpus=64", "GPUs on this machine"), ("ray_address=nonsense", "ray_address")])
def test_ray_that_would_wait_for_ever(config, run_cli, key, told):
    """More GPUs than the machine has, and an address that is none, are exit 2 in one line."""
    pytest.importorskip("ray")
    outcome = run_cli("--config", config, "--set", "engine=ray", "--set", key, timeout=90)
    assert outcome.code == 2 and told in outcome.stderr.splitlines()[-1], outcome
