"""How far a run is: a bar on a terminal, and a line now and then in a log."""
import collections
import sys
import time

import tqdm

from image_text_sim_clip import PartSummary, say

LOG_EVERY_S = 30.0  # at most one line of progress in this time


class ProgressBar:
    """The bar: pairs done, pairs/s, time left and failures. Follows a run of `row_count` rows, `done` of them done already."""

    def __init__(self, row_count: int, done: int) -> None:
        self._bar = tqdm.tqdm(total=row_count, initial=done, unit=" pairs", smoothing=0.05, dynamic_ncols=True, mininterval=0.5)
        self._ahead = 0  # rows shown of the partition at work
        self._failed = 0

    def image_loaded(self) -> None:
        """Move the bar by one image; the rows that share it or need none follow with `partition_done`."""
        self._ahead += 1
        self._bar.update(1)

    def partition_done(self, summary: PartSummary) -> None:
        """Move the bar to the partition's end, and show how many rows of this run have failed so far."""
        self._bar.update(summary.rows - self._ahead)
        self._ahead = 0
        self._failed += summary.rows - summary.statuses.get("ok", 0)
        self._bar.set_postfix(failed=self._failed)

    def close(self) -> None:
        """Leave the bar as it is and give the line back."""
        self._bar.close()


class ProgressLog:
    """The same in words for a log: a whole line, at most one every LOG_EVERY_S seconds, and none for a short run."""

    def __init__(self, row_count: int, done: int) -> None:
        self._row_count = row_count
        self._done = done
        self._done_before = done
        self._ahead = 0
        self._failures = collections.Counter[str]()
        self._began = time.monotonic()
        self._told = self._began

    def image_loaded(self) -> None:
        """Count one image; the rows that share it or need none follow with `partition_done`."""
        self._ahead += 1
        self._tell_when_due()

    def partition_done(self, summary: PartSummary) -> None:
        """Count the partition's rows and failures."""
        self._done += summary.rows
        self._ahead = 0
        self._failures.update({status: count for status, count in summary.statuses.items() if status != "ok"})
        self._tell_when_due()

    def close(self) -> None:
        """Nothing is left to do: the summary follows."""

    def _tell_when_due(self) -> None:
        now = time.monotonic()
        if now - self._told >= LOG_EVERY_S:
            self._told = now
            say(self._describe(now - self._began))

    def _describe(self, elapsed_s: float) -> str:
        done = min(self._row_count, self._done + self._ahead)
        rate = (done - self._done_before) / elapsed_s
        left = tqdm.tqdm.format_interval((self._row_count - done) / rate) if rate else "unknown time"
        failed = ", ".join(f"{count:,} {status}" for status, count in sorted(self._failures.items()))
        return (f"{done:,} of {self._row_count:,} rows ({done / max(1, self._row_count):.1%}), {rate:,.1f} rows/s, {left} left"
                + (f"; failed so far: {failed}" if failed else ""))


def start_progress(row_count: int, done: int) -> ProgressBar | ProgressLog:
    """The bar where stderr is a terminal, else the lines for a log."""
    return ProgressBar(row_count, done) if sys.stderr.isatty() else ProgressLog(row_count, done)
