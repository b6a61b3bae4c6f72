"""Loads the images of `image_path: url` as they come: nobody waits in line behind a late one.

Several partitions are open at a time. Each image is decoded and given to the model when it is there, whichever partition it
belongs to, and a partition is finished when its last row is; until then further ones are opened, so that the fetcher always has
URLs of hosts that may be asked. Batches stay within their partition. In which order images come decides which of them share
a batch, and so a score's last digits.
"""
import collections
import dataclasses
import functools
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from addons.images.fetch import Fetcher, Outcome
from addons.images.memory import trim_memory
from addons.images.web_report import count_seconds
from image_text_sim_clip import (
    HANGS_S,
    INTERRUPTION,
    Clock,
    EmbeddedImages,
    ImageEncoder,
    ImageGatherer,
    ImageLoader,
    Loaded,
    PartitionRun,
    Scorer,
    compute_in_one_thread,
)

PENDING_IMAGES = 256  # with fewer on their way, the next partition is opened at once
OPEN_ROWS = 40_000  # beyond which no partition is opened to keep the fetcher busy …
OPEN_PARTITIONS = 3  # … unless fewer than these are open
HELD_IMAGES = 256  # in batches that are not full yet, of all open partitions together
TRIM_S = 5.0  # how often memory that was freed is given back, so that it does not grow with the length of a run
LOOK_S = 0.05  # how often it is looked whether the fetcher needs more URLs


@dataclasses.dataclass
class _Open:
    """A partition whose images are on their way."""

    run: PartitionRun
    gatherer: ImageGatherer
    missing: int  # images that have not come


@dataclasses.dataclass
class _Arrival:
    """An image that has been fetched and, where there are threads for that, decoded."""

    partition: int
    source: str
    load: ImageLoader
    outcome: Outcome
    loaded: Loaded | None = None
    bug: BaseException | None = None


class WebPool:
    """Does for URLs what the script's ImagePool does for files. One thread calls it; `threads` threads decode (0: that one)."""

    def __init__(self, fetcher: Fetcher, threads: int) -> None:
        self._fetcher = fetcher
        self._arrivals: queue.SimpleQueue[_Arrival] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(threads, "loader", compute_in_one_thread) if threads else None
        self._decoding: dict[int, float] = {}  # since when, by the thread that decodes
        self._open: dict[int, _Open] = {}  # by the partition's index
        self._pending = 0
        self._at_model: collections.deque[ImageEncoder] = collections.deque()  # whose batches are being encoded, in order
        self._trim_at = time.monotonic() + TRIM_S

    @property
    def hangs(self) -> bool:
        """Whether an image has been with its decoder for so long that the next run had better try it in isolation."""
        return any(time.monotonic() - since > HANGS_S for since in list(self._decoding.values()))

    def close(self) -> None:
        """Drop what waits and what is being fetched."""
        self._fetcher.drop_all()
        if self._threads:
            self._threads.shutdown(wait=False, cancel_futures=True)
        trim_memory()  # what comes next, the results, needs some

    def embed_partitions(self, runs: Iterator[PartitionRun], load: ImageLoader, scorer: "Scorer | None", clock: Clock,
                         on_loaded: "collections.abc.Callable[[], None]") -> Iterator[tuple[PartitionRun, EmbeddedImages]]:
        """Load and encode the images of each partition; yields the partitions as they are complete, in any order."""
        has_more = True
        while has_more or self._open:
            if has_more and self._wants_partition():
                opened = self._open_partition(next(runs, None), load, scorer, clock)
                has_more = opened is not None
                if opened and not opened.missing:
                    yield self._finish(opened)
                continue
            with clock.stage("wait_for_images"):
                arrival = self._take()
            INTERRUPTION.check()
            if arrival is None:
                continue
            opened = self._open[arrival.partition]
            self._add(opened, arrival, scorer, clock)
            on_loaded()
            if not opened.missing:
                yield self._finish(opened)

    def _wants_partition(self) -> bool:
        """Whether to open another partition now."""
        rows = sum(len(opened.run.rows) for opened in self._open.values())
        if rows > OPEN_ROWS and len(self._open) >= OPEN_PARTITIONS:
            return False
        return self._pending < PENDING_IMAGES or self._fetcher.is_hungry()

    def _open_partition(self, run: PartitionRun | None, load: ImageLoader, scorer: "Scorer | None",
                        clock: Clock) -> _Open | None:
        """Ask for the images of a partition; None at the end of all."""
        if run is None:
            return None
        index = run.partition.index
        sources = run.wanted()
        self._open[index] = _Open(run, ImageGatherer(scorer, clock), len(sources))
        self._pending += len(sources)
        self._fetcher.fetch_seconds[index] = collections.Counter()
        self._fetcher.submit((source.strip(), functools.partial(self._arrive, index, source, load)) for source in sources)
        return self._open[index]

    def _finish(self, opened: _Open) -> tuple[PartitionRun, EmbeddedImages]:
        del self._open[opened.run.partition.index]
        if time.monotonic() > self._trim_at:
            trim_memory()
            self._trim_at = time.monotonic() + TRIM_S
        return opened.run, opened.gatherer.finish()

    def _arrive(self, partition: int, source: str, load: ImageLoader, outcome: Outcome) -> None:
        """Called in the fetcher's thread."""
        arrival = _Arrival(partition, source, load, outcome)
        if self._threads is None:
            self._arrivals.put(arrival)
            return
        try:
            self._threads.submit(self._decode, arrival)
        except RuntimeError:  # closed meanwhile
            return

    def _decode(self, arrival: _Arrival) -> None:
        """Make of what was fetched what the model reads."""
        here = threading.get_ident()
        self._decoding[here] = time.monotonic()
        try:
            outcome = arrival.outcome
            arrival.loaded = self._fetcher.call_with(outcome, lambda: arrival.load(arrival.source))
            outcome.data = b""
            arrival.loaded.seconds["fetch"] = arrival.loaded.seconds.get("fetch", 0.0) + outcome.seconds
        except BaseException as bug:  # it is for the main thread, which waits for this image
            arrival.bug = bug
        finally:
            self._decoding.pop(here, None)
        if self._threads:
            self._arrivals.put(arrival)

    def _take(self) -> _Arrival | None:
        """The next image that is there, None if none comes for a moment."""
        try:
            arrival = self._arrivals.get(timeout=LOOK_S)
        except queue.Empty:
            return None
        if arrival.loaded is None and arrival.bug is None:
            self._decode(arrival)
        self._fetcher.release(arrival.outcome)
        if arrival.bug:
            raise arrival.bug
        return arrival

    def _add(self, opened: _Open, arrival: _Arrival, scorer: "Scorer | None", clock: Clock) -> None:
        """Give the image to the model, and see to it that few images wait for it."""
        assert arrival.loaded
        opened.missing -= 1
        self._pending -= 1
        clock.add(arrival.loaded.seconds)
        count_seconds(self._fetcher.fetch_seconds[arrival.partition], arrival.outcome.seconds)
        if opened.gatherer.add(arrival.source, arrival.loaded):
            self._at_model.append(opened.gatherer.encoder)
        if scorer is None:
            return
        encoders = [each.gatherer.encoder for each in self._open.values()]
        if sum(encoder.held_images for encoder in encoders) > max(HELD_IMAGES, 2 * scorer.batch_size):
            fullest = max(encoders, key=lambda encoder: encoder.held_images)
            fullest.flush()
            self._at_model.append(fullest)
        while len(self._at_model) > scorer.lanes:
            self._at_model.popleft().collect_batch()
