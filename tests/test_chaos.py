"""Two minutes of kill -9 at any moment, under every engine: nothing is lost, nothing is mixed, nothing becomes other bytes."""
import collections
import contextlib
import csv
import http.server
import itertools
import json
import os
import pathlib
import random
import socket
import threading
import time

import forked
import numpy as np
import psutil
import pytest

import image_text_sim_clip as script
from addons.measures.embeddings import read_embeddings

ROOT = pathlib.Path(script.__file__).parent
CHAOS_S = float(os.environ.get("CHAOS_S", "100"))  # for all tests of this file together, about
SEED = int(os.environ.get("CHAOS_SEED", "12"))
ROWS = 96
MOST_KILLS = 6  # of one run; then it may end
MOST_CHANGES = 40  # in the folder of parts, before a kill; a part makes about four


def outcome_of(folder):
    """What a run is for: the results, every part and every file of embeddings, as bytes."""
    paths = [folder / "scores.csv", *folder.glob("parts/part-*.parquet"), *folder.glob("parts/part-*.npz")]
    return {path.name: path.read_bytes() for path in paths}


def leftovers(folder):
    return [path.name for path in folder.rglob("*") if path.name.endswith((".tmp", ".trying", ".next"))]


def read_rows(folder):
    with open(folder / "scores.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def context():
    return forked.make_context()


@pytest.fixture
def lines():
    """(picture, caption) of each row."""
    with open(ROOT / "challenge_set/shapes.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [(row["url"], f"{row['caption']}, row {number}") for number, row in enumerate(rows[:ROWS])]


@pytest.fixture
def config(lines, write_table, write_config, bundled_model):
    """A run with embeddings and a passport in 24 parts."""
    write_table([("url", "caption"), *lines])
    return write_config(image_path=str(ROOT / "challenge_set/shapes"), pretrained_model=bundled_model, partition_rows=4,
                        save_embeddings="float16", parity_rows=12, loader_threads=2)


@pytest.fixture
def undisturbed(context, config, tmp_path):
    """The files of a run that nobody disturbs."""
    arguments = ("--config", config, "--set", f"output_path={tmp_path / 'undisturbed'}")
    assert forked.start(context, tmp_path / "log", *arguments).wait() == 0
    return outcome_of(tmp_path / "undisturbed")


def kill_at_random(commands, parts, rng):
    """Wait until something has been made, renamed or removed in the folder `parts` a random number of times, or all commands
    have ended; then kill -9 some of them, one at least. Returns how many were at work still."""
    left = rng.randint(1, MOST_CHANGES)
    seen = 0
    while left and any(command.process.is_alive() for command in commands):
        with contextlib.suppress(FileNotFoundError):
            changed = parts.stat().st_mtime_ns
            left -= changed != seen
            seen = changed
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, 0.01))
    killed = 0
    for command in rng.sample(commands, rng.randint(1, len(commands))):
        if command.process.is_alive():
            killed += command.kill() == -9
    return killed


def rounds(rng, share):
    """Number after number for that share of CHAOS_S, at least once."""
    until = time.monotonic() + share * CHAOS_S
    for number in itertools.count():
        if number and time.monotonic() > until:
            return
        yield number, rng


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("processes", [1, 2], ids=["local", "two at once"])
def test_killed_and_started_again(context, config, undisturbed, tmp_path, processes):
    """One process or two on one folder, killed up to six times: exit 0 and the undisturbed run's bytes, or it is not done."""
    kills = 0
    for number, rng in rounds(random.Random(SEED + processes), 0.2):
        out = tmp_path / f"out-{number}"
        arguments = ("--config", config, "--set", f"output_path={out}")
        for _ in range(rng.randint(1, MOST_KILLS)):
            commands = [forked.start(context, tmp_path / "log", *arguments) for _ in range(processes)]
            kills += kill_at_random(commands, out / "parts", rng)
            for command in commands:
                assert command.wait() in (0, -9), command.stderr
        last = [forked.start(context, tmp_path / "log", *arguments) for _ in range(processes)]
        assert [command.wait() for command in last] == [0] * processes, [command.stderr for command in last]
        assert outcome_of(out) == undisturbed and leftovers(out) == []
    assert kills


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_slurm_tasks_killed_and_submitted_again(context, config, undisturbed, tmp_path):
    """Three tasks of an array, each killed at random and submitted again until all have ended: the undisturbed bytes."""
    kills = 0
    for number, rng in rounds(random.Random(SEED + 3), 0.15):
        out = tmp_path / f"out-{number}"

        def submit(task, out=out):
            environment = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "3"}
            return forked.start(context, tmp_path / "log", "--config", config, "--set", f"output_path={out}",
                                environment=environment)
        left = [0, 1, 2]
        for attempt in range(4):
            commands = {task: submit(task) for task in left}
            if attempt < 3:
                kills += kill_at_random(list(commands.values()), out / "parts", rng)
            codes = {task: command.wait() for task, command in commands.items()}
            assert set(codes.values()) <= {0, -9}, [command.stderr for command in commands.values()]
            left = [task for task, code in codes.items() if code] or [rng.randrange(3)]
        assert outcome_of(out) == undisturbed and leftovers(out) == []
    assert kills


def free_port():
    """A port of the loopback address that nobody listens at, as text."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_torchrun_killed(context, config, undisturbed, start_cli, tmp_path):
    """Two ranks and their launcher killed at once with parts half done: the same command, and another engine, end alike."""
    rng = random.Random(SEED + 4)
    out = tmp_path / "out"
    group = start_cli("--config", config, interpreter=("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
                                                       free_port()))
    wanted = rng.randint(2, 12)
    while group.poll() is None and len(list(out.glob("parts/part-*.parquet"))) < wanted:
        time.sleep(0.002)
    for member in [psutil.Process(group.pid), *psutil.Process(group.pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    group.communicate()
    assert 0 < len(list(out.glob("parts/part-*.parquet"))) < 24
    again = start_cli("--config", config, interpreter=("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
                                                       free_port()))
    _, stderr = again.communicate(timeout=110)
    assert again.returncode == 0, stderr
    assert outcome_of(out) == undisturbed
    (out / "parts/part-00007.npz").unlink()
    assert forked.start(context, tmp_path / "log", "--config", config).wait() == 0
    assert outcome_of(out) == undisturbed and leftovers(out) == []


class FlakyServer(http.server.ThreadingHTTPServer):
    """Answers 200 or 503 by chance until `is_well`; a picture that a part has once been given is gone (404) on later days."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, pictures):
        self.pictures = pictures
        self.rng = random.Random(SEED)
        self.share = 0.5
        self.gone = set()
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), FlakyAnswer)

    def answer(self, path):
        """The status and the body of one request: /<row>/<name of the picture>."""
        row, _, name = path.strip("/").partition("/")
        with self.lock:
            if int(row) in self.gone:
                return 404, b""
            return (200, self.pictures[name]) if self.rng.random() < self.share else (503, b"")


class FlakyAnswer(http.server.BaseHTTPRequestHandler):
    """One request to a FlakyServer."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        code, body = self.server.answer(self.path)
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def flaky(lines):
    """A FlakyServer on the loopback address."""
    names = {name for name, _ in lines}
    server = FlakyServer({name: (ROOT / "challenge_set/shapes" / name).read_bytes() for name in names})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def committed_rows(config):
    """The rows that parts hold a score for, whatever state the run is in."""
    plan = script.make_plan(script.load_config(config), joins=True)
    scored = set()
    for partition in plan.partitions:
        part = script.read_part(plan, partition, thorough=True)
        if part:
            scored |= {partition.start + i for i, status in enumerate(part.table["status"].to_pylist()) if status == "ok"}
    return scored


def check_finished(config, out, truth):
    """Rows, counts, scores and embeddings of a finished run belong together."""
    rows = read_rows(out)
    profile = json.loads((out / "profile.json").read_text())
    statuses = collections.Counter(row["status"] for row in rows)
    assert "not_tried" not in statuses and len(rows) == ROWS
    assert profile["failed"] | {"ok": profile["scored"]} == {"ok": 0} | statuses
    for number, row in enumerate(rows):
        assert row["caption"] == truth[number][0]
        if row["status"] == "ok":
            assert float(row["similarity"]) == pytest.approx(truth[number][1], abs=1e-5)
    for path in sorted(out.glob("parts/part-*.npz")):
        saved = read_embeddings(path)
        start = int(path.name[5:10]) * 4
        for i, (image, text) in enumerate(zip(saved["image_of_row"], saved["text_of_row"], strict=True)):
            assert (image >= 0) == (rows[start + i]["status"] == "ok")
            if image >= 0:
                score = float(np.dot(saved["images"][image], saved["texts"][text]))
                assert score == pytest.approx(truth[start + i][1], abs=2e-3)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("processes", [1, 2], ids=["one", "two at once"])
def test_retries_on_a_flaky_server_are_killed(context, config, undisturbed, flaky, lines, write_table, write_config,
                                              bundled_model, tmp_path, processes):
    """--retry-failed, killed at random, over a server that answers by chance and forgets what was scored: no score is lost."""
    truth = [(row["caption"], float(row["similarity"])) for row in read_rows(tmp_path / "undisturbed")]
    write_table([("url", "caption"), *((f"http://127.0.0.1:{flaky.server_port}/{number}/{name}", caption)
                                       for number, (name, caption) in enumerate(lines))], "urls.csv")
    kills = 0
    for number, rng in rounds(random.Random(SEED + 5 + processes), 0.2):
        out = tmp_path / f"flaky-{number}"
        urls = write_config("urls.yaml", csv_path=str(tmp_path / "urls.csv"), image_path="url", allow_private_hosts=True,
                            fetch_retries=0, host_patience_s=0, pretrained_model=bundled_model, partition_rows=4,
                            save_embeddings="float16", parity_rows=12, output_path=str(out), max_per_host=32)
        flaky.gone = set()
        flaky.share = 0.5
        assert forked.start(context, tmp_path / "log", "--config", urls).wait() == 0
        scored = committed_rows(urls)
        for attempt in range(5):
            flaky.gone = set(scored)
            flaky.share = 1.0 if attempt == 4 else 0.4
            commands = [forked.start(context, tmp_path / "log", "--config", urls, "--retry-failed") for _ in range(processes)]
            if attempt < 4:
                kills += kill_at_random(commands, out / "parts", rng)
            for command in commands:
                assert command.wait() in (0, -9), command.stderr
            now = committed_rows(urls)
            assert scored <= now, f"lost: {sorted(scored - now)}"
            scored = now
        verified = forked.start(context, tmp_path / "log", "--config", urls, "--verify")
        assert verified.wait() == 0, verified.stderr
        check_finished(urls, out, truth)
        assert scored == set(range(ROWS)) and leftovers(out) == []
    assert kills
