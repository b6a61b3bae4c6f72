"""The progress bar: pairs done, pairs/s, time left and failures; quiet where stderr is no terminal."""
import sys

import tqdm

from image_text_sim_clip import PartSummary


class ProgressBar:
    """Follows a run of `row_count` rows, `done` of them done already."""

    def __init__(self, row_count: int, done: int) -> None:
        self._bar = tqdm.tqdm(total=row_count, initial=done, unit=" pairs", smoothing=0.05, disable=not sys.stderr.isatty(),
                              dynamic_ncols=True, mininterval=0.5)
        self._ahead = 0  # rows shown of the partition at work

    def image_loaded(self) -> None:
        """Move the bar by one image; the rows that share it or need none follow with `partition_done`."""
        self._ahead += 1
        self._bar.update(1)

    def partition_done(self, summary: PartSummary, failed: int) -> None:
        """Move the bar to the partition's end, and show how many rows of this run have failed so far."""
        self._bar.update(summary.rows - self._ahead)
        self._ahead = 0
        self._bar.set_postfix(failed=failed)

    def close(self) -> None:
        """Leave the bar as it is and give the line back."""
        self._bar.close()
