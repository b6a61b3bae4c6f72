"""Long runs: kills, engines, damage, retries. Nothing is lost, nothing twice, and every way gives the same bytes."""
import contextlib
import csv
import json
import multiprocessing
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

import image_text_sim_clip as script
from addons.results import memory_curve, retry

ROOT = pathlib.Path(script.__file__).parent
MODEL = str(ROOT / "challenge_set/shapes_clip")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")


def outcome_of(folder):
    """What a run is for: the results and every part, as bytes."""
    return {path.name: path.read_bytes() for path in sorted([folder / "scores.csv", *folder.glob("parts/*.parquet")])}


def parts_in(folder):
    return len(list(folder.glob("parts/part-*.parquet")))


def temporary_files(folder):
    return [str(p) for p in folder.rglob("*") if p.name.endswith((".tmp", ".trying"))]


@pytest.fixture
def dry(tmp_path, picture_bytes, write_table, write_config):
    """Config of a dry run over 120 pairs, some without a picture, in 40 partitions."""
    (tmp_path / "pictures").mkdir(exist_ok=True)
    for i in range(0, 120, 2):
        (tmp_path / f"pictures/{i}.png").write_bytes(picture_bytes("PNG", size=(8, 6), colour=(i, 0, 99)))
    write_table([["url", "caption"], *([f"{i}.png", f"caption {i}"] for i in range(120))])
    return write_config(partition_rows=3, loader_threads=0)


@pytest.fixture
def scored(tmp_path, write_config):
    """Config of a run with the bundled model over 120 pairs in 40 partitions."""
    lines = (ROOT / "challenge_set/shapes.csv").read_text().splitlines(keepends=True)
    (tmp_path / "table.csv").write_text("".join(lines[:121]))
    return write_config(csv_path=str(tmp_path / "table.csv"), image_path=str(ROOT / "challenge_set/shapes"),
                        pretrained_model=MODEL, partition_rows=3)


# ── kill -9 ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def run_quietly(arguments, careless):
    """In a child: the script as a command, without its picture of memory. `careless` trusts that a part exists; of these,
    "slow" writes in small steps and renames, "slow without rename" writes in place."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    memory_curve.MemoryCurve = lambda clock: None
    if careless:
        script.part_is_done = lambda plan, partition: partition.parquet.exists()
        careful = script.atomic_file

        class Slowly:
            def __init__(self, file):
                self.file = file

            def write(self, data):
                for start in range(0, len(data), max(1, len(data) // 4)):
                    self.file.write(data[start:start + max(1, len(data) // 4)])
                    self.file.flush()
                    time.sleep(0.0005)

        @contextlib.contextmanager
        def slow_file(path):
            if not path.match("parts/part-*.parquet"):
                with careful(path) as file:
                    yield file
            elif careless == "slow":
                with careful(path) as file:
                    yield Slowly(file)
            else:
                with path.open("wb") as file:
                    yield Slowly(file)
        script.atomic_file = slow_file
    try:
        code = script.main(arguments)
    except script.Trouble as trouble:
        code = trouble.exit_code
    os._exit(code)


@pytest.fixture(scope="module")
def forks():
    """Processes that start in milliseconds, because everything is imported in the server they are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["image_text_sim_clip", "pandas", "pyarrow.parquet", "pyarrow.compute", "PIL.Image",
                                    "numpy", "tqdm", "filelock", "psutil"])
    return context


def start(forks, arguments, careless=""):
    process = forks.Process(target=run_quietly, args=([str(a) for a in arguments], careless))
    process.start()
    return process


def finish(process, code=0):
    process.join(60)
    assert process.exitcode == code, process.exitcode


def kill_between_parts(forks, arguments, out, careless, rng, whole_s):
    """Start a run and kill -9 it at a random moment after its first part; whether it was killed before its last."""
    process = start(forks, arguments, careless)
    for _ in range(20_000):
        if parts_in(out) or not process.is_alive():
            break
        time.sleep(0.001)
    time.sleep(rng.uniform(0, whole_s))
    process.kill()
    process.join(60)
    return 0 < parts_in(out) < 40


def killed_runs_that_differ(forks, tmp_path, config, careless, kills, seed):
    """How many of `kills` runs, killed once and started again, end with other files than an undisturbed run."""
    rng, counted, differing = random.Random(seed), 0, 0
    undisturbed = tmp_path / "undisturbed"
    finish(start(forks, ["--config", config, "--set", f"output_path={undisturbed}"], careless))
    expected, begun = outcome_of(undisturbed), time.monotonic()
    finish(start(forks, ["--config", config, "--set", f"output_path={undisturbed}", "--fresh"], careless))
    whole_s = (time.monotonic() - begun) * 0.7
    for number in range(kills * 4):
        out = tmp_path / f"killed-{number}"
        arguments = ["--config", config, "--set", f"output_path={out}"]
        if not kill_between_parts(forks, arguments, out, careless, rng, whole_s):
            continue
        counted += 1
        process = start(forks, arguments, careless)
        process.join(60)
        differing += process.exitcode != 0 or outcome_of(out) != expected
        if process.exitcode == 0:
            assert temporary_files(out) == []
        if counted == kills:
            break
    assert counted == kills
    return differing


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_any_moment_dry(forks, dry, tmp_path, seed):
    """A run killed between its first and last part and started again ends as an undisturbed one does: 2 x 50 kills."""
    assert killed_runs_that_differ(forks, tmp_path, dry, "", 50, seed) == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_rename_is_what_protects(forks, dry, tmp_path):
    """Where existence alone counts, the rename keeps every killed run whole; without it the same loop finds differences."""
    assert killed_runs_that_differ(forks, tmp_path / "with", dry, "slow", 15, 3) == 0
    assert killed_runs_that_differ(forks, tmp_path / "without", dry, "slow without rename", 15, 3) > 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_with_a_model(scored, start_cli, run_main, tmp_path):
    """The same with the bundled model, five times."""
    assert run_main("--config", scored, "--set", f"output_path={tmp_path / 'undisturbed'}").code == 0
    expected, rng, counted = outcome_of(tmp_path / "undisturbed"), random.Random(4), 0
    for number in range(20):
        out = tmp_path / f"killed-{number}"
        process = start_cli("--config", scored, "--set", f"output_path={out}")
        while process.poll() is None and not parts_in(out):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.communicate()
        if 0 < parts_in(out) < 40:
            counted += 1
            assert run_main("--config", scored, "--set", f"output_path={out}").code == 0
            assert outcome_of(out) == expected
        if counted == 5:
            break
    assert counted == 5


def test_sigterm_leaves_nothing_behind(forks, dry, start_cli, run_main, tmp_path):
    """SIGTERM ends the run with 143 and no temporary file; the same command does the rest."""
    assert run_main("--config", dry, "--set", f"output_path={tmp_path / 'undisturbed'}").code == 0
    process = start_cli("--config", dry)
    while process.poll() is None and not parts_in(tmp_path / "out"):
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143 and 0 < parts_in(tmp_path / "out") < 40
    assert temporary_files(tmp_path / "out") == []
    assert run_main("--config", dry).code == 0
    assert outcome_of(tmp_path / "out") == outcome_of(tmp_path / "undisturbed")


# ── Engines ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def workers_of(out):
    return {json.loads(path.read_text())["worker"] for path in out.glob("parts/part-*.json")}


@pytest.fixture
def torchrun(start_cli):
    """Run the script under torchrun with two ranks; returns (exit code, stdout, stderr)."""
    def run(*arguments):
        process = start_cli(*arguments, interpreter=TORCHRUN)
        stdout, stderr = process.communicate(timeout=110)
        return process.returncode, stdout, stderr
    return run


@pytest.mark.slow
def test_torchrun_gives_the_same_bytes(scored, torchrun, run_main, tmp_path):
    """Two ranks both work, one of them writes the one JSON line, and the files are those of a single process."""
    assert run_main("--config", scored, "--set", f"output_path={tmp_path / 'local'}").code == 0
    code, stdout, stderr = torchrun("--config", scored)
    assert code == 0, stderr
    assert "world size 2" in stderr
    assert outcome_of(tmp_path / "out") == outcome_of(tmp_path / "local")
    assert workers_of(tmp_path / "out") == {"rank 0", "rank 1"}
    assert [json.loads(line)["scored"] for line in stdout.splitlines() if line.startswith("{")] == [120]
    assert temporary_files(tmp_path / "out") == []


def test_accelerate_with_one_process_says_so(dry, run_main, monkeypatch, tmp_path):
    """`accelerate launch --cpu` starts one process whatever is asked: the run says so, and is right."""
    assert run_main("--config", dry, "--set", f"output_path={tmp_path / 'local'}").code == 0
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    outcome = run_main("--config", dry)
    assert outcome.code == 0 and "world size 1" in outcome.stderr and "--multi_gpu" in outcome.stderr
    assert outcome_of(tmp_path / "out") == outcome_of(tmp_path / "local")


@pytest.mark.slow
def test_ray_gives_the_same_bytes(scored, run_cli, run_main, tmp_path):
    """A local Ray cluster writes the files of a single process."""
    pytest.importorskip("ray")
    assert run_main("--config", scored, "--set", f"output_path={tmp_path / 'local'}").code == 0
    outcome = run_cli("--config", scored, "--set", "engine=ray", timeout=110)
    assert outcome.code == 0, outcome.stderr
    assert outcome_of(tmp_path / "out") == outcome_of(tmp_path / "local")
    assert all(worker.startswith("actor ") for worker in workers_of(tmp_path / "out"))
    assert outcome.result["scored"] == 120


@pytest.mark.slow
def test_two_groups_on_one_folder(dry, start_cli, run_main, tmp_path):
    """Two torchruns started by mistake on one folder both end, each by its own ranks' marks, with the right results."""
    assert run_main("--config", dry, "--set", f"output_path={tmp_path / 'local'}").code == 0
    groups = [start_cli("--config", dry, interpreter=(*TORCHRUN, "--master-port", port)) for port in free_ports(2)]
    ended = [(*group.communicate(timeout=110), group.returncode) for group in groups]
    assert [code for *_, code in ended] == [0, 0], ended
    assert outcome_of(tmp_path / "out") == outcome_of(tmp_path / "local")
    assert temporary_files(tmp_path / "out") == []


def free_ports(count):
    """Ports of the loopback address that nobody listens at, as text."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [str(one.getsockname()[1]) for one in sockets]


@pytest.mark.slow
def test_killed_under_one_engine_finished_under_another(scored, start_cli, run_main, torchrun, tmp_path):
    """Parts of a killed torchrun, parts of a killed local run and parts of Slurm tasks add up to the same files."""
    assert run_main("--config", scored, "--set", f"output_path={tmp_path / 'local'}").code == 0
    out = tmp_path / "out"
    for interpreter in (TORCHRUN, ()):
        before = parts_in(out)
        process = start_cli("--config", scored, interpreter=interpreter)
        while process.poll() is None and parts_in(out) < before + 2:
            time.sleep(0.002)
        family = [process, *psutil.Process(process.pid).children(recursive=True)]  # torchrun's ranks are sessions of their own
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.communicate()
        assert before < parts_in(out) < 40
    slurm = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "1"}
    process = start_cli("--config", scored, env=slurm)
    process.communicate(timeout=60)
    assert process.returncode == 0 and outcome_of(out) == outcome_of(tmp_path / "local")
    assert temporary_files(out) == []


def test_slurm_tasks_share_and_finish_once(dry, start_cli, run_main, tmp_path):
    """Two array tasks started together do their halves; one of them writes the results and the one JSON line."""
    assert run_main("--config", dry, "--set", f"output_path={tmp_path / 'local'}").code == 0
    tasks = [start_cli("--config", dry, env={"SLURM_ARRAY_TASK_ID": str(n), "SLURM_ARRAY_TASK_MIN": "4",
                                             "SLURM_ARRAY_TASK_STEP": "3", "SLURM_ARRAY_TASK_COUNT": "2"}) for n in (4, 7)]
    ended = [task.communicate(timeout=60) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], ended
    assert [line for stdout, _ in ended for line in stdout.splitlines() if '"rows": 120' in line].__len__() == 1
    assert outcome_of(tmp_path / "out") == outcome_of(tmp_path / "local")
    assert workers_of(tmp_path / "out") == {"task 0", "task 1"}
    again = [start_cli("--config", dry, env={"SLURM_ARRAY_TASK_ID": str(n), "SLURM_ARRAY_TASK_COUNT": "2"}) for n in (0, 1)]
    assert sorted(bool(task.communicate(timeout=60)[0]) for task in again) == [False, True]


@pytest.mark.parametrize(("extra", "told"), [(["--fresh"], "--fresh"), (["--retry-failed"], "--retry-failed")])
def test_slurm_refuses_what_tasks_would_undo(dry, run_main, monkeypatch, extra, told):
    """--fresh and --retry-failed, which need one process that speaks for all, are refused in one line."""
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    outcome = run_main("--config", dry, *extra)
    assert outcome.code == 2 and told in outcome.stderr and len(outcome.stderr.splitlines()) == 1


def test_slurm_task_killed_before_it_finalised(dry, run_main, monkeypatch, tmp_path):
    """A task that died after the last part, and is put into the queue again with its number, writes the results."""
    assert run_main("--config", dry).code == 0
    expected = outcome_of(tmp_path / "out")
    (tmp_path / "out/profile.json").unlink()
    (tmp_path / "out/scores.csv").unlink()
    for name, value in (("ID", 3), ("MIN", 0), ("MAX", 3), ("COUNT", 4)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert run_main("--config", dry).result["rows"] == 120 and outcome_of(tmp_path / "out") == expected
    assert run_main("--config", dry).stdout == ""  # others have finalised


def test_slurm_array_with_gaps_is_refused(dry, run_main, monkeypatch):
    """--array=0,3,7 would leave partitions that fall to no task: refused in one line; a single number does all that is left."""
    for name, value in (("ID", 7), ("MIN", 0), ("MAX", 7), ("COUNT", 3), ("STEP", 1)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    outcome = run_main("--config", dry)
    assert outcome.code == 2 and "no range" in outcome.stderr and len(outcome.stderr.splitlines()) == 1
    for name, value in (("MIN", 7), ("COUNT", 1)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert run_main("--config", dry).result["rows"] == 120


def test_run_whose_folder_is_planned_anew(dry, tmp_path, write_table):
    """A run ends with exit 2 when another discards its folder by --fresh: no part of the one is taken for the other's."""
    config = script.load_config(dry)
    plan = script.make_plan(config)
    summaries = script.Worker(config, plan, "local", script.Clock()).run(plan.partitions)
    next(summaries)
    late = script.make_plan(config)
    write_table([["url", "caption"], *(["0.png", "another table"] for _ in range(120))])
    script.make_plan(config, fresh=True)
    assert parts_in(tmp_path / "out") == 0
    with pytest.raises(script.Trouble, match="planned anew") as trouble:
        next(summaries)
    assert trouble.value.exit_code == 2 and parts_in(tmp_path / "out") == 0
    with pytest.raises(script.Trouble, match="planned anew"):
        script.Worker(config, late, "local", script.Clock())
    other = script.Worker(config, script.make_plan(config), "local", script.Clock())
    assert len(list(other.run(other.plan.partitions))) == 40


def test_looking_for_work_changes_nothing(dry, run_main, tmp_path):
    """A task that lists what is pending takes nothing from another that finalises at the same moment."""
    assert run_main("--config", dry).code == 0
    (tmp_path / "out/parts/part-00003.parquet").unlink()
    job = script.Job(script.load_config(dry))
    job.make_plan(joins=True)
    assert [p.index for p in job.pending()] == [3] and (tmp_path / "out/profile.json").exists()
    job.work(job.pending())
    assert not (tmp_path / "out/profile.json").exists()


def test_part_that_comes_while_results_are_written(dry, run_main, monkeypatch, tmp_path):
    """A part that another worker adds while scores.csv is written without it does not make the run finished."""
    assert run_main("--config", dry).code == 0
    expected, last = outcome_of(tmp_path / "out"), tmp_path / "out/parts/part-00039.parquet"
    job = script.Job(script.load_config(dry))
    job.make_plan(joins=True)
    (tmp_path / "out/profile.json").unlink()
    last.rename(tmp_path / "aside")
    write_csv = script.write_csv
    with monkeypatch.context() as patch:
        patch.setattr(script, "write_csv", lambda *arguments: write_csv(*arguments) or (tmp_path / "aside").rename(last))
        assert script.finalize(job)["failed"]["not_tried"] == 3
    assert json.loads((tmp_path / "out/profile.json").read_text())["finished"] is False
    assert run_main("--config", dry).code == 0 and outcome_of(tmp_path / "out") == expected


def place_of(monkeypatch, environment, **keys):
    """The (place, tasks) that Slurm's variables give a process, without the word SLURM_ before each; None for engine local."""
    from addons.engines import slurm
    with monkeypatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("SLURM")]:
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name if name == "WORLD_SIZE" else f"SLURM_{name}", str(value))
        config = script.Config(**keys)
        engine = script.find_engine(config)
        if engine is not slurm.run:
            return engine.__module__.rpartition(".")[2]
        return tuple(slurm.find_task(config))


SRUN = {"NTASKS": 4, "PROCID": 3, "STEP_NUM_TASKS": 4}
ARRAY = {"ARRAY_TASK_ID": 6, "ARRAY_TASK_MIN": 5, "ARRAY_TASK_MAX": 7, "ARRAY_TASK_COUNT": 3}


@pytest.mark.parametrize(("environment", "keys", "place"), [
    (SRUN, {}, (3, 4)), (SRUN | {"PROCID": 0}, {}, (0, 4)), (SRUN | ARRAY, {}, (7, 12)), (ARRAY, {}, (1, 3)),
    (ARRAY | {"NTASKS": 4, "PROCID": 0}, {}, (1, 3)),                     # sbatch alone, in an array
    ({"NTASKS": 4, "PROCID": 0}, {}, "image_text_sim_clip"),              # sbatch alone: one process
    (SRUN | {"STEP_NUM_TASKS": 1, "PROCID": 0}, {}, "image_text_sim_clip"), (SRUN | {"WORLD_SIZE": 2}, {}, "accelerate"),
    (SRUN | {"WORLD_SIZE": 1}, {}, (3, 4)), (SRUN | {"STEP_NUM_TASKS": 1, "PROCID": 0}, {"engine": "slurm"}, (0, 1)),
    (ARRAY, {"slurm_total": 2000}, (6, 2000)), (ARRAY, {"slurm_total": 2000, "slurm_offset": 1000}, (1006, 2000)),
    (ARRAY | {"ARRAY_TASK_MIN": 6, "ARRAY_TASK_MAX": 6, "ARRAY_TASK_COUNT": 1}, {"slurm_total": 2000}, (6, 2000)),
    (SRUN | ARRAY, {"slurm_total": 20, "slurm_offset": 10}, (67, 80)), (SRUN, {"engine": "local"}, "image_text_sim_clip"),
])
def test_slurm_task_knows_its_place(monkeypatch, environment, keys, place):
    """srun's tasks count only where SLURM_STEP_NUM_TASKS tells of it, in an array both do, and WORLD_SIZE goes first."""
    assert place_of(monkeypatch, environment, **keys) == place


def test_slurm_tasks_of_all_arrays_share_all(monkeypatch):
    """The tasks of two arrays, each started three times by srun, have every place once."""
    places = [place_of(monkeypatch, {"ARRAY_TASK_ID": number, "STEP_NUM_TASKS": 3, "PROCID": process}, slurm_total=9,
                       slurm_offset=offset)
              for offset, count in ((0, 5), (5, 4)) for number in range(count) for process in range(3)]
    assert sorted(places) == [(place, 27) for place in range(27)]


@pytest.mark.parametrize(("environment", "keys", "words"), [
    (ARRAY, {"slurm_offset": 5}, "slurm_total"), (SRUN, {"slurm_total": 5}, "sbatch --array"),
    (ARRAY, {"slurm_total": 6}, "beyond"), (ARRAY, {"slurm_total": 9, "slurm_offset": 3}, "beyond"),
    (SRUN | {"PROCID": "x"}, {}, "SLURM_PROCID"), ({}, {"engine": "slurm"}, "srun")])
def test_slurm_numbers_that_do_not_fit(monkeypatch, environment, keys, words):
    """Keys and variables from which no task could tell its share are refused."""
    with pytest.raises(script.Trouble, match=words) as caught:
        place_of(monkeypatch, environment, **keys)
    assert caught.value.exit_code == 2


@pytest.mark.slow
def test_srun_tasks_share_and_finish_once(dry, start_cli, run_main, tmp_path):
    """Three processes that srun starts on one folder score each row once, and together write one result."""
    assert run_main("--config", dry, "--set", f"output_path={tmp_path / 'local'}").code == 0
    tasks = [start_cli("--config", dry, env={"SLURM_PROCID": str(n), "SLURM_STEP_NUM_TASKS": "3", "SLURM_NTASKS": "3"})
             for n in range(3)]
    ended = [task.communicate(timeout=60) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0, 0], ended
    assert sum('"rows": 120' in stdout for stdout, _ in ended) == 1
    assert outcome_of(tmp_path / "out") == outcome_of(tmp_path / "local")
    assert workers_of(tmp_path / "out") == {"task 0", "task 1", "task 2"}


def test_slurm_without_slurm(dry, run_main, monkeypatch):
    """engine: slurm outside a job array is refused in one line."""
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    outcome = run_main("--config", dry, "--set", "engine=slurm")
    assert outcome.code == 2 and "sbatch" in outcome.stderr


@pytest.mark.parametrize("workers", ["0", "'2:1'", "many", "'1:2:3'"])
def test_ray_workers_that_are_no_range(dry, run_main, workers):
    """ray_workers is a number or min:max, and said so before a cluster is started."""
    outcome = run_main("--config", dry, "--set", "engine=ray", "--set", f"ray_workers={workers}")
    assert outcome.code == 2 and "ray_workers" in outcome.stderr, outcome


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_sigterm_under_ray(dry, start_cli, run_main, tmp_path):
    """Ray takes SIGTERM over when it starts; the run takes it back, ends with 143 in one line, and is finished by another."""
    pytest.importorskip("ray")
    process = start_cli("--config", dry, "--set", "engine=ray", "--set", "partition_rows=1")
    while process.poll() is None and not parts_in(tmp_path / "out"):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 143 and "same command" in stderr.splitlines()[-1], stderr
    assert parts_in(tmp_path / "out") < 120
    assert run_main("--config", dry, "--set", "partition_rows=1").result["rows"] == 120


NODE_LOSS = """
import json, pathlib, subprocess, sys, threading, time
from ray.cluster_utils import Cluster
arguments, out = sys.argv[1:-1], pathlib.Path(sys.argv[-1])
mine = {"node_ip_address": "127.0.0.1", "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **mine})
nodes = [cluster.add_node(num_cpus=2, node_ip_address="127.0.0.1") for _ in range(2)]
cluster.wait_for_nodes()
run = subprocess.Popen([sys.executable, *arguments, "--set", f"ray_address={cluster.address}"])
workers = set()
while run.poll() is None and len(workers) < 2:
    time.sleep(0.05)
    for path in out.glob("parts/part-*.json"):
        try:
            workers.add(json.loads(path.read_text())["worker"])
        except ValueError:
            pass
done = len(list(out.glob("parts/part-*.parquet")))
cluster.remove_node(nodes[1], allow_graceful=False)
code = run.wait()
print(json.dumps({"code": code, "done_before_the_loss": done, "workers_before": len(workers)}))
cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ray_survives_the_loss_of_a_node(dry, run_main, write_table, tmp_path):
    """One of two nodes dies half-way: every row comes out once, the files are those of a single process."""
    pytest.importorskip("ray")
    write_table([["url", "caption"], *([f"{i % 120}.png", f"caption {i}"] for i in range(1800))])
    assert run_main("--config", dry, "--set", f"output_path={tmp_path / 'local'}").code == 0
    (tmp_path / "lose.py").write_text(NODE_LOSS)
    command = [sys.executable, str(tmp_path / "lose.py"), str(ROOT / "image_text_sim_clip.py"), "--config", str(dry),
               "--set", "engine=ray", "--set", "ray_workers=4", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path, check=False,
                          env=os.environ | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"})  # all of it on the loopback address
    told = json.loads(next(line for line in done.stdout.splitlines() if "done_before_the_loss" in line))
    assert told["code"] == 0, done.stderr
    assert told["workers_before"] >= 2 and told["done_before_the_loss"] < 600, told
    assert outcome_of(tmp_path / "out") == outcome_of(tmp_path / "local")


# ── Damage ────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.slow
def test_truncation_anywhere_is_found(dry, run_main, tmp_path):
    """A part cut off at any of 50 places is done again by the next run."""
    assert run_main("--config", dry).code == 0
    expected, part = outcome_of(tmp_path / "out"), tmp_path / "out/parts/part-00007.parquet"
    data, rng = part.read_bytes(), random.Random(5)
    for place in [0, 1, len(data) - 1, *(rng.randrange(len(data)) for _ in range(47))]:
        part.write_bytes(data[:place])
        assert run_main("--config", dry).code == 0
        assert outcome_of(tmp_path / "out") == expected


@pytest.mark.slow
def test_any_flipped_bit_is_found(dry, run_main, tmp_path):
    """Of 50 bits flipped anywhere in a part, --verify finds each and so does a run; each is done again.

    Where the flip makes the part one that is not there or not this run's, which a look at its footer shows, the run does it
    again at once; any other is found when the results are written.
    """
    assert run_main("--config", dry).code == 0
    out = tmp_path / "out"
    expected, part, rng = outcome_of(out), out / "parts/part-00007.parquet", random.Random(6)
    for number in range(50):
        data = bytearray(part.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        part.write_bytes(data)
        if number % 2:
            (out / "scores.csv").unlink()
            plan = script.make_plan(script.load_config(dry), joins=True)
            is_done = script.part_is_done(plan, plan.partitions[7])
            outcome = run_main("--config", dry)
        else:
            is_done = True
            outcome = run_main("--config", dry, "--verify")
        if is_done:
            assert outcome.code == 7 and "part-00007" in outcome.stderr and outcome.stdout == "", outcome
        else:
            assert outcome.code == 0 and part.read_bytes() == expected[part.name], outcome
        assert run_main("--config", dry).code == 0
        assert outcome_of(out) == expected


def test_verify_a_sound_run(dry, run_main, tmp_path):
    """--verify of a sound run says how much it read, changes nothing and ends with 0."""
    assert run_main("--config", dry).code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    outcome = run_main("--config", dry, "--verify")
    assert outcome.code == 0 and outcome.result["verified_parts"] == 40 and outcome.result["rows"] == 120
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_verify_finds_changed_scores(dry, run_main, tmp_path):
    """A scores.csv that is not as written is found, removed and written again."""
    assert run_main("--config", dry).code == 0
    scores = tmp_path / "out/scores.csv"
    data = scores.read_bytes()
    scores.write_bytes(data.replace(b"caption 8,", b"caption 9,"))
    outcome = run_main("--config", dry, "--verify")
    assert outcome.code == 7 and "scores.csv" in outcome.stderr
    assert run_main("--config", dry).code == 0 and scores.read_bytes() == data


def test_verify_needs_a_run(dry, run_main, tmp_path):
    """--verify of a folder without a run is exit 2, and makes no folder."""
    outcome = run_main("--config", dry, "--verify")
    assert outcome.code == 2 and "no run" in outcome.stderr and not (tmp_path / "out").exists()


# ── --retry-failed, output_format ─────────────────────────────────────────────────────────────────────────────────────

def change_statuses(config, changes):
    """Rewrite the parts as if rows had failed otherwise: {row number: (status, detail)}."""
    import pyarrow as pa
    plan = script.make_plan(script.load_config(config), joins=True)
    for partition in plan.partitions:
        part = script.read_part(plan, partition)
        table = part.table
        columns = {name: table[name].to_pylist() for name in table.column_names}
        for i in range(len(table)):
            if partition.start + i in changes:
                columns["status"][i], columns["detail"][i] = changes[partition.start + i]
        changed = pa.table({name: pa.array(values, table.schema.field(name).type) for name, values in columns.items()})
        script.commit_part(plan, partition, changed, part.metadata["measures"], part)
    out = plan.output
    (out / "profile.json").unlink()
    (out / "scores.csv").unlink()


@pytest.mark.parametrize("engine", ["local", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_retry_failed(dry, run_main, torchrun, tmp_path, engine):
    """Rows that failed for a passing reason are tried again, those that failed for good and those scored are not."""
    assert run_main("--config", dry).code == 0
    out = tmp_path / "out"
    expected = (out / "scores.csv").read_bytes()
    passing = {0: ("timeout", "x"), 4: ("connect", ""), 6: ("dns", ""), 8: ("http_5xx", "503"), 10: ("http_4xx", "429"),
               12: ("http_4xx", "429, asks to come back later"), 13: ("timeout", "no picture then, none now")}
    lasting = {20: ("http_4xx", "404"), 22: ("corrupt", "x"), 24: ("forbidden", "")}
    change_statuses(dry, passing | lasting)
    assert run_main("--config", dry).result["failed"]["timeout"] == 2
    untouched = out / "parts/part-00030.parquet"
    before = untouched.stat().st_mtime_ns
    if engine == "local":
        assert run_main("--config", dry, "--retry-failed").code == 0
    else:
        code, _, stderr = torchrun("--config", dry, "--retry-failed")
        assert code == 0, stderr
    rows = list(csv.reader((out / "scores.csv").read_text().splitlines()))
    wanted = list(csv.reader(expected.decode().splitlines()))
    for number, (row, want) in enumerate(zip(rows[1:], wanted[1:], strict=True)):
        assert tuple(row[-2:]) == lasting.get(number, tuple(want[-2:])), number
        assert row[:2] == want[:2]
    assert untouched.stat().st_mtime_ns == before
    assert run_main("--config", dry, "--verify").code == 0


def test_retry_on_top_of_what_is_pending(dry, run_main, tmp_path):
    """--retry-failed also does parts that are not there yet; without anything to do it prints the summary."""
    assert run_main("--config", dry).code == 0
    expected = outcome_of(tmp_path / "out")
    (tmp_path / "out/parts/part-00003.parquet").unlink()
    for _ in range(2):
        outcome = run_main("--config", dry, "--retry-failed")
        assert outcome.code == 0 and outcome.result["rows"] == 120 and outcome_of(tmp_path / "out") == expected


@pytest.mark.parametrize("damage", ["cut off", "scrambled", "footer scrambled"])
def test_retry_finds_flawed_parts(dry, run_main, tmp_path, damage):
    """--retry-failed names a part that is not as written, whatever the damage, and does all of it again."""
    assert run_main("--config", dry).code == 0
    expected, part = outcome_of(tmp_path / "out"), tmp_path / "out/parts/part-00003.parquet"
    data = part.read_bytes()
    place = slice(4, len(data) // 2) if damage == "scrambled" else slice(-300, -8)
    flawed = bytearray(data)
    flawed[place] = bytes(byte ^ 255 for byte in data[place])
    part.write_bytes(data[:500] if damage == "cut off" else flawed)
    outcome = run_main("--config", dry, "--retry-failed")
    assert outcome.code == 0 and "part-00003" in outcome.stderr, outcome
    assert outcome_of(tmp_path / "out") == expected


@pytest.mark.slow
def test_retried_rows_score_as_at_first(scored, run_main, read_table, tmp_path):
    """With a model, a row that is scored again gets its score, wherever in the part it stands."""
    assert run_main("--config", scored).code == 0
    first = read_table(tmp_path / "out/scores.csv")
    change_statuses(scored, dict.fromkeys((0, 9, 10, 55, 119), ("timeout", "")))
    assert run_main("--config", scored, "--retry-failed").code == 0
    for row, want in zip(read_table(tmp_path / "out/scores.csv"), first, strict=True):
        assert float(row["similarity"]) == pytest.approx(float(want["similarity"]), abs=1e-6)
        # the random pairs of the rows tried again are drawn among those rows, so the percentiles are others
        assert all(row[key] == want[key] for key in row if "similarity" not in key and "percentile" not in key)


def test_may_pass():
    """Of the statuses, the network's and the busy servers' may pass."""
    import pyarrow as pa
    details = ["404"] * len(script.STATUSES) + ["429", "429, asks to come back later", "408", "425", "404", "42", ""]
    status = [*script.STATUSES, *["http_4xx"] * 7]
    table = pa.table({"status": status, "detail": details})
    assert [s for s, may in zip(status, retry.may_pass(table), strict=True) if may] == \
        ["timeout", "dns", "connect", "http_5xx", *["http_4xx"] * 4]


def test_parquet_results(dry, run_main, read_table, tmp_path):
    """output_format: parquet writes the rows of scores.csv, with types, and may be asked for later."""
    import pyarrow.parquet as pq
    assert run_main("--config", dry).code == 0
    outcome = run_main("--config", dry, "--set", "output_format=parquet")
    assert outcome.code == 0 and outcome.result["output"].endswith("scores.parquet")
    table = pq.read_table(tmp_path / "out/scores.parquet").to_pylist()
    rows = read_table(tmp_path / "out/scores.csv")
    assert [(r["url"], r["caption"], r["status"], r["detail"]) for r in table] == \
        [(r["url"], r["caption"], r["status"], r["detail"]) for r in rows]


def test_no_parquet_results_of_no_rows(write_config, write_table, run_main, tmp_path):
    """A table without rows is an error, and leaves no scores.parquet that looks like a result."""
    write_table([["url", "caption", "note"]])
    assert run_main("--config", write_config(output_format="parquet")).code == 3
    assert not (tmp_path / "out/scores.parquet").exists()


# ── Rates ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_rate_counts_time_once():
    """Workers side by side share their seconds, one after the other they add up, and a pause in between is nobody's."""
    def part(begun, ended):
        return {"ended": ended, "wall_s": ended - begun}
    assert script.busy_time([]) == 0
    assert script.busy_time([part(0, 10), part(10, 20)]) == 20
    assert script.busy_time([part(0, 10), part(0, 10), part(2, 5)]) == 10
    assert script.busy_time([part(1000, 1010), part(5, 10)]) == 15


def test_rate_of_a_run_that_others_finished(dry, run_main, tmp_path):
    """A run that was resumed under other workers' names is not the faster for it, and a retried row counts no row beside it."""
    assert run_main("--config", dry).code == 0
    out = tmp_path / "out"
    for number, path in enumerate(sorted(out.glob("parts/*.json"))):
        summary = json.loads(path.read_text()) | {"worker": f"actor {number}", "ended": 100.0 + number, "wall_s": 1.0}
        path.write_text(json.dumps(script.seal(summary)))
    (out / "profile.json").unlink()
    assert run_main("--config", dry).result["pairs_per_s"] == pytest.approx(120 / 40)
    change_statuses(dry, {3: ("timeout", "")})
    assert run_main("--config", dry, "--retry-failed").code == 0
    assert json.loads((out / "parts/part-00001.json").read_text())["tried"] == 1
    assert json.loads((out / "profile.json").read_text())["tried"] == 118


# ── Memory ────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_does_not_grow_with_the_rows(tmp_path, write_config, picture_bytes, run_cli):
    """The peak for 300,000 rows is at most 1.1 times that for 100,000, in partitions of the same size.

    Fewer would not do: a table of some megabytes fills all of staging's blocks, and after some twenty partitions the allocators
    keep no more. Of up to three runs of each the least counts: which pages the allocators keep while staging's two threads
    hand blocks over is chance, a tenth of the peak; what grows with the rows is there in every run.
    """
    (tmp_path / "pictures").mkdir()
    for i in range(20):
        (tmp_path / f"pictures/{i}.png").write_bytes(picture_bytes("PNG", size=(32, 32), colour=(i, 0, 0)))

    def measure_peak(rows: int, number: int) -> float:
        table = tmp_path / f"{rows}.csv"
        table.write_text("url,caption\n" + "".join(f"{i % 20}.png,caption number {i} of a long table\n" for i in range(rows)))
        out = tmp_path / f"out-{rows}-{number}"
        config = write_config(csv_path=str(table), output_path=str(out), partition_rows=1000)
        assert run_cli("--config", config, timeout=120).code == 0
        return max(json.loads(path.read_text())["peak_rss_mib"] for path in out.glob("parts/*.json"))

    few = []
    many = []
    for number in range(3):
        few.append(measure_peak(100_000, number))
        many.append(measure_peak(300_000, number))
        if min(many) <= 1.1 * min(few):
            break
    assert min(many) <= 1.1 * min(few), (few, many)
