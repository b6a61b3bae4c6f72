"""Flips and cuts anywhere in what a run leaves: each is found or harmless, and no cell ever becomes another."""
import os
import pathlib
import random
import shutil

import pytest

import image_text_sim_clip as script
from addons.results import earlier_run

ROOT = pathlib.Path(script.__file__).parent
ROUNDS = int(os.environ.get("DAMAGE_ROUNDS", "300"))
CODES = (0, 2, 3, 5, 7)  # that a damaged folder may give
LOST = ("scores.csv", "profile.json", "parts/part-00002.parquet", "parts/part-00003.parquet", "parts/part-00003.npz")


def bytes_that_count(folder):
    """Results, parts, embeddings and malformed lines, by name; not times, plots and locks."""
    wanted = [folder / "scores.csv", folder / "bad_rows.csv", folder / "pairs.parquet", *folder.glob("parts/part-*.parquet"),
              *folder.glob("parts/part-*.npz")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in wanted if path.is_file()}


def damage(path, rng):
    """Flip a bit, set a byte, zero a stretch, cut, lengthen or empty the file; returns what was done."""
    data = bytearray(path.read_bytes())
    place = rng.randrange(max(1, len(data)))
    how = rng.choice(("flip", "flip", "flip", "byte", "byte", "zeros", "cut", "longer", "empty"))
    if not data or how == "longer":
        data += b"}\n"
    elif how == "flip":
        data[place] ^= 1 << rng.randrange(8)
    elif how == "byte":
        data[place] = rng.choice(b"e0-9\"{},: x\xff")
    elif how == "zeros":
        data[place:place + 16] = bytes(len(data[place:place + 16]))
    else:
        del data[place if how == "cut" else 0:]
    path.write_bytes(data)
    return f"{how} at {place}"


@pytest.fixture
def scorers(monkeypatch):
    """Each config's scorer is loaded once, however many runs there are."""
    load = script.load_scorer
    loaded = {}

    def reuse(config):
        if config not in loaded:
            loaded[config] = load(config)
        return loaded[config]
    monkeypatch.setattr(script.Config, "__hash__", lambda self: hash(self.pretrained_model))
    monkeypatch.setattr(script, "load_scorer", reuse)


@pytest.fixture
def whole(tmp_path, write_config, run_main, bundled_model, scorers):
    """(config, folder of a finished run): 24 pairs in four parts with embeddings and a passport, and a malformed line."""
    lines = (ROOT / "challenge_set/shapes.csv").read_text().splitlines(keepends=True)
    (tmp_path / "table.csv").write_text("".join([*lines[:20], "shape-000.png,one,field,too,many,is,no,row\n", *lines[20:25]]))
    config = write_config(image_path=str(ROOT / "challenge_set/shapes"), pretrained_model=bundled_model, partition_rows=6,
                          save_embeddings="float16", loader_threads=0)
    assert run_main("--config", config).code == 0
    (tmp_path / "out").rename(tmp_path / "whole")
    return config, tmp_path / "whole"


def lay_out(source, out, half):
    """Copy a finished run to `out`; `half` takes away what is written last, as if the run had been killed."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(source, out)
    for name in LOST if half else ():
        (out / name).unlink()


def end_well(run_main, config, out, expected):
    """Run the same command, as its messages tell, until it is done; returns what --verify and the runs said on the way."""
    said = []
    for arguments in ((), (), ("--verify",), ()):
        outcome = run_main("--config", config, *arguments)
        said.append((arguments, outcome.code, outcome.stderr.strip().splitlines()[-1:]))
        assert outcome.code in CODES, said
        if outcome.code == 2:
            assert "--fresh" in outcome.stderr, said
            assert run_main("--config", config, "--fresh").code == 0
        elif outcome.code == 0 and not arguments:
            found = bytes_that_count(out)
            assert found["scores.csv"].count(b"\n") == expected["scores.csv"].count(b"\n"), said
    assert said[-1][1] == 0, said
    return said


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("half", [True, False], ids=["half done", "finished"])
def test_damage_anywhere_is_found_or_harmless(whole, run_main, tmp_path, half):
    """A flip or cut in any file ends in the undisturbed run's bytes by the same command, --verify, and what they say.

    What counts is never other than it was after an exit 0, but for bytes of a finished run that only --verify reads.
    """
    config, source = whole
    out = tmp_path / "out"
    expected = bytes_that_count(source)
    rng = random.Random(7 + half)
    for number in range(ROUNDS // 2):
        lay_out(source, out, half)
        files = sorted(path for path in out.rglob("*") if path.is_file())
        path = files[number % len(files)] if number < 2 * len(files) else rng.choice(files)
        name = str(path.relative_to(out))
        how = damage(path, rng)
        first = run_main("--config", config)
        assert first.code in CODES, (name, how, first)
        assert first.code == 0 or first.stdout == "", (name, how, first)
        errors = [line for line in first.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == (first.code != 0) and "Traceback" not in first.stderr, (name, how, first)
        if first.code == 0 and (half or not name.startswith(("parts/", "scores"))):
            found = bytes_that_count(out)
            differing = [n for n in expected if found.get(n) != expected[n]]
            assert differing in ([], [name]) and (differing == [] or name.endswith(".npz")), (name, how, differing)
        said = end_well(run_main, config, out, expected)
        assert bytes_that_count(out) == expected, (name, how, said)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["manifest.json", "profile.json", "parts/part-00001.json"])
def test_changed_numbers_in_json_are_not_believed(whole, run_main, tmp_path, name):
    """Every digit of the small JSON files, changed to another, leaves the results as they are and no number that is wrong."""
    config, source = whole
    out = tmp_path / "out"
    expected = bytes_that_count(source)
    data = (source / name).read_bytes()
    digits = [place for place, byte in enumerate(data) if byte in b"0123456789"]
    for place in random.Random(3).sample(digits, 12):
        lay_out(source, out, half=False)
        changed = bytearray(data)
        changed[place] = b"1234567890"[changed[place] - ord("0")]
        (out / name).write_bytes(changed)
        outcome = run_main("--config", config)
        assert outcome.code == (2 if name == "manifest.json" else 0), outcome
        if outcome.code == 0:
            assert outcome.result["rows"] == 24 and outcome.result["malformed"] == 1
        assert bytes_that_count(out) == expected


@pytest.mark.slow
def test_staged_table_is_staged_again(whole, run_main, tmp_path):
    """pairs.parquet and bad_rows.csv that are gone, cut, flipped or a folder are told in one line and staged again."""
    config, source = whole
    out = tmp_path / "out"
    expected = bytes_that_count(source)
    for name in script.STAGED_FILES:
        for how in ("gone", "cut", "flipped", "folder"):
            lay_out(source, out, half=True)
            data = bytearray((out / name).read_bytes())
            data[len(data) // 2] ^= 1
            (out / name).unlink()
            if how == "folder":
                (out / name).mkdir()
            elif how != "gone":
                (out / name).write_bytes(data if how == "flipped" else data[:-7])
            outcome = run_main("--config", config)
            assert outcome.code == 0 and "staged again" in outcome.stderr, (name, how, outcome)
            assert bytes_that_count(out) == expected


def test_table_that_goes_away_under_a_worker(whole, run_main, tmp_path):
    """A staged table that is lost while the run reads it ends that run with exit 7 in one line; the same command ends it."""
    config, source = whole
    out = tmp_path / "out"
    lay_out(source, out, half=True)
    plan = script.make_plan(script.load_config(config))
    worker = script.Worker(plan.config, plan, "local", script.Clock())
    (out / "pairs.parquet").unlink()
    with pytest.raises(script.Trouble, match="stages the table again") as trouble:
        list(worker.run(plan.partitions[2:]))
    assert trouble.value.exit_code == 7
    assert run_main("--config", config).code == 0 and bytes_that_count(out) == bytes_that_count(source)


def test_disk_that_cannot_be_reached_costs_no_part(whole, run_main, monkeypatch, tmp_path):
    """An error that may pass (no permission, too many open files) is exit 5, and never takes a part for missing or flawed."""
    config, source = whole
    lay_out(source, tmp_path / "out", half=False)
    before = bytes_that_count(tmp_path / "out")
    (tmp_path / "out/scores.csv").unlink()
    real = pathlib.Path.open
    real_bytes = pathlib.Path.read_bytes
    for number in (13, 24, 116):  # EACCES, EMFILE, ESTALE
        def fail(self, *arguments, real=real, number=number, **options):
            if self.name == "part-00001.parquet":
                raise OSError(number, os.strerror(number))
            return real(self, *arguments, **options)
        with monkeypatch.context() as patch:
            patch.setattr(pathlib.Path, "open", fail)
            for arguments in ((), ("--retry-failed",), ("--verify",)):
                outcome = run_main("--config", config, *arguments)
                assert outcome.code == 5 and "cannot read" in outcome.stderr, outcome
        with monkeypatch.context() as patch:
            patch.setattr(pathlib.Path, "read_bytes", lambda self: fail(self, real=real_bytes))
            assert run_main("--config", config).code == 5
    assert run_main("--config", config).code == 0 and bytes_that_count(tmp_path / "out") == before


def test_leftovers_of_others_go_when_they_are_old(tmp_path):
    """A temporary file of another process space stays for a week after its last write; an empty one, a mark, always."""
    (tmp_path / "parts").mkdir()
    names = {"old": b"half", "new": b"half", "mark": b""}
    for name, content in names.items():
        path = tmp_path / f"parts/.part-{name}.another-space.1.tmp"
        path.write_bytes(content)
        if name != "new":
            os.utime(path, (1, 1))
    earlier_run.remove_leftovers(tmp_path)
    assert sorted(path.name.split(".")[1] for path in (tmp_path / "parts").iterdir()) == ["part-mark", "part-new"]


# ── A retry replaces two files ────────────────────────────────────────────────────────────────────────────────────────

class Killed(BaseException):
    """Stands for kill -9 at a rename: nothing after it is done."""


@pytest.fixture
def late_rows(tmp_path, write_table, write_config, run_main, bundled_model, scorers, late):
    """Config of a finished run of one part with embeddings, of whose ten rows five failed for a passing reason."""
    for name in ("here.png", "late.png"):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        shutil.copy(ROOT / f"challenge_set/shapes/shape-00{len(name) - 8}.png", tmp_path / "pictures" / name)
    write_table([("url", "caption"), *((("here.png", "late.png")[i % 2], f"a red square {i}") for i in range(10))])
    config = write_config(pretrained_model=bundled_model, save_embeddings="float16", loader_threads=0)
    with late("late.png"):
        assert run_main("--config", config).result["failed"] == {"timeout": 5}
    return config


def statuses_of(config):
    plan = script.make_plan(script.load_config(config), joins=True)
    return script.read_part(plan, plan.partitions[0], thorough=True).table["status"].to_pylist()


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_retry_killed_at_any_rename(late_rows, run_main, monkeypatch, tmp_path, after):
    """--retry-failed that dies before or after any of its renames leaves the old part or the new one, with its embeddings."""
    config, out = late_rows, tmp_path / "out"
    shutil.copytree(out, tmp_path / "before")
    assert run_main("--config", config, "--retry-failed").result["scored"] == 10
    expected = bytes_that_count(out)
    real = pathlib.Path.replace
    reached = 0
    for number in range(1, 20):
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "before", out)
        calls = []

        def die(self, target, number=number, calls=calls):
            calls.append(target)
            if len(calls) == number and not after:
                raise Killed
            done = real(self, target)
            if len(calls) == number:
                raise Killed
            return done
        with monkeypatch.context() as patch:
            patch.setattr(pathlib.Path, "replace", die)
            try:
                run_main("--config", config, "--retry-failed")
                break
            except Killed:
                reached += 1
        assert statuses_of(config) in (["ok", "timeout"] * 5, ["ok"] * 10), calls
        (tmp_path / "pictures/here.png").rename(tmp_path / "gone")  # a row that is tried again without need would be lost
        try:
            outcome = run_main("--config", config, "--retry-failed")
        finally:
            (tmp_path / "gone").rename(tmp_path / "pictures/here.png")
        assert outcome.result["scored"] == 10, (calls, outcome)
        assert bytes_that_count(out) == expected, calls
    assert reached >= 4  # embeddings, part, embeddings again, results


def test_two_retries_leave_one_outcome(late_rows, run_main, tmp_path):
    """Of two processes that retry the same part the first to commit stays: its rows and its embeddings belong together."""
    config = script.load_config(late_rows)
    plans = [script.make_plan(config, joins=True) for _ in range(2)]
    for plan in plans:
        plan.refresh()
    workers = [script.Worker(config, plan, str(number), script.Clock()).run(plan.partitions, retry=True)
               for number, plan in enumerate(plans)]
    parts = [script.PartitionRun.open(plan, plan.partitions[0], retry=True) for plan in plans]
    assert [len(part.rows) for part in parts] == [5, 5]
    for worker in workers:
        assert [summary.statuses for summary in worker] == [{"ok": 10}]
    assert statuses_of(late_rows) == ["ok"] * 10
    assert run_main("--config", late_rows, "--verify").code == 0


def test_two_workers_whose_embeddings_differ(late_rows, monkeypatch, run_main, tmp_path):
    """Two processes at one new part, whose images differed by chance: part and embeddings are those of the first to commit."""
    config = script.load_config(late_rows, [f"output_path={tmp_path / 'two'}"])
    plans = [script.make_plan(config) for _ in range(2)]
    workers = [script.Worker(config, plan, str(number), script.Clock()) for number, plan in enumerate(plans)]
    commit = script.commit_part
    waiting = []

    def commit_later(*arguments):
        waiting.append(arguments)
        return script.PartSummary(10, {"ok": 10})
    with monkeypatch.context() as patch:
        patch.setattr(script, "commit_part", commit_later)
        for worker in workers:
            list(worker.run(worker.plan.partitions))
            (tmp_path / "pictures/late.png").unlink(missing_ok=True)
    assert sorted(commit(*waiting[1]).statuses) == ["missing", "ok"]
    assert sorted(commit(*waiting[0]).statuses) == ["missing", "ok"]
    plan = script.make_plan(config, joins=True)
    assert script.read_part(plan, plan.partitions[0], thorough=True).table["status"].to_pylist() == ["ok", "missing"] * 5


def test_second_terminal_does_not_undo_the_first(late_rows, tmp_path):
    """A second process that starts before the first has committed anything leaves what the first has settled."""
    config = script.load_config(late_rows, [f"output_path={tmp_path / 'two'}"])
    first_plan = script.make_plan(config)
    first = script.Worker(config, first_plan, "first", script.Clock())
    second_plan = script.make_plan(config)
    assert [summary.rows for summary in first.run(first_plan.partitions)] == [10]
    second = script.Worker(config, second_plan, "second", script.Clock())
    assert [summary.rows for summary in second.run(second_plan.partitions)] == [10]
