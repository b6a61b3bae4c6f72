"""The progress bar (rows done, pairs/s, time left, failures), quiet where stderr is no terminal; and too many failures."""
import collections
import sys
from collections.abc import Callable

import tqdm

JUDGED_FROM_ROWS = 1000

LIKELY_CAUSE = {"missing": "is image_path the right folder?",
                "dns": "is there a network?", "connect": "is there a network?",
                "timeout": "is the network slow, or fetch_timeout_s short?", "forbidden": "are these addresses private?"}


class Progress:
    """Follows a run of `rows` rows, `done` of them done already; `too_many` makes the exception, of one line, that ends it."""

    def __init__(self, rows: int, done: int, max_failure_rate: float, too_many: Callable[[str], Exception]) -> None:
        self.max_failure_rate, self.too_many = max_failure_rate, too_many
        self.rows, self.failures, self._ahead = 0, collections.Counter[str](), 0
        self.bar = tqdm.tqdm(total=rows, initial=done, unit=" pairs", smoothing=0.05, disable=not sys.stderr.isatty(),
                             dynamic_ncols=True, mininterval=0.5)
        self.close = self.bar.close

    def image_loaded(self) -> None:
        """Move the bar by a picture; the rows that share it or need none follow with `partition_done`."""
        self._ahead += 1
        self.bar.update(1)

    def partition_done(self, summary: dict, judge: bool = True) -> None:
        """Count a partition's statuses; with `judge`, raise `too_many` when too many rows of at least 1,000 have failed."""
        self.bar.update(summary["rows"] - self._ahead)
        self.rows, self._ahead = self.rows + summary["rows"], 0
        self.failures.update({k: n for k, n in summary["statuses"].items() if k != "ok"})
        failed = self.failures.total()
        self.bar.set_postfix(failed=failed)
        if judge and self.rows >= JUDGED_FROM_ROWS and failed > self.max_failure_rate * self.rows:
            worst, count = self.failures.most_common(1)[0]
            raise self.too_many(f"{failed} of {self.rows} rows failed, more than max_failure_rate ({self.max_failure_rate}) "
                                f"allows; most often {worst} ({count}): {LIKELY_CAUSE.get(worst, 'see the column detail')}")
