"""Progress without a terminal: a line now and then, which tells all that a log has to tell."""
import re
import time

import pytest

from addons.results import progress
from image_text_sim_clip import PartSummary


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves: clock.now += 40."""
    class Clock:
        now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    return Clock


def test_a_log_gets_one_line_in_thirty_seconds(clock, capfd):
    """Rows, share, rate, time left and failures by status; however many images come, not more often than that."""
    log = progress.ProgressLog(2400, 0)
    for _ in range(400):
        clock.now += 0.1
        log.image_loaded()
    log.partition_done(PartSummary(600, {"ok": 580, "timeout": 17, "corrupt": 3}))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and re.match(r"300 of 2,400 rows \(12\.5%\), 10\.0 rows/s, 03:30 left$", lines[0]), lines
    clock.now += 30
    log.image_loaded()
    lines = capfd.readouterr().err.splitlines()
    assert lines == ["601 of 2,400 rows (25.0%), 8.6 rows/s, 03:29 left; failed so far: 3 corrupt, 17 timeout"]


def test_a_resumed_run_tells_its_own_rate(clock, capfd):
    """Rows that an earlier run did are in the share, but not in the rate."""
    log = progress.ProgressLog(1000, 900)
    clock.now += 50
    log.partition_done(PartSummary(50, {"ok": 50}))
    assert capfd.readouterr().err.splitlines() == ["950 of 1,000 rows (95.0%), 1.0 rows/s, 00:50 left"]


def test_nothing_done_yet_is_told_without_a_rate(clock, capfd):
    """A partition that ends without a row, such as an empty share, divides by nothing."""
    log = progress.ProgressLog(10, 0)
    clock.now += 31
    log.partition_done(PartSummary(0, {}))
    assert capfd.readouterr().err.splitlines() == ["0 of 10 rows (0.0%), 0.0 rows/s, unknown time left"]


@pytest.mark.parametrize("quiet", [False, True])
def test_quiet_shows_no_progress(quiet, shapes, run_main, tmp_path, monkeypatch, read_table):
    """Without --quiet a run whose stderr is a file tells how far it is; with it, only the summary comes."""
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.0)
    outcome = run_main("--config", shapes(rows=30, partition_rows=10), *(["--quiet"] if quiet else []))
    assert outcome.code == 0 and len(read_table(tmp_path / "out/scores.csv")) == 30
    assert ("of 30 rows" in outcome.stderr) is not quiet
