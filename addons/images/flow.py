"""How many fetches are under way: as many as may wait for answers, and no more than bring what there is room for.

Hosts that do not answer cost nothing but their place. Those that do answer may do so all at once, and what they send is held
until it is decoded. A fetch is `recent` in its first second, in which most answers come.
"""
import collections
import math

from addons.images.exchange import SMALL_BYTES

RECENT_S = 1.0
FIRST_GUESS_BYTES = 100_000  # of an image
REMEMBERED_IMAGES = 64  # whose sizes make up the guess for the next
ALWAYS_RECENT = 32  # fetches that may be under way however large images are


class Flow:
    """Counts fetches and images; used in the event loop's thread alone, times are those of its clock."""

    def __init__(self, concurrency: int, burst_bytes: int, most_unclaimed: int) -> None:
        self.concurrency = concurrency
        self.in_flight = 0
        self._burst_bytes = burst_bytes  # that may come at once
        self._most_unclaimed = most_unclaimed  # images that have come and have not been taken
        self._unclaimed = 0
        self._recent: collections.OrderedDict[object, float] = collections.OrderedDict()  # since when, the oldest first
        self._mean_bytes = float(FIRST_GUESS_BYTES)

    def may_start(self, now: float) -> bool:
        """Whether there is room for another fetch."""
        if self._is_full():
            return False
        while self._recent and next(iter(self._recent.values())) <= now - RECENT_S:
            self._recent.popitem(last=False)
        expected = len(self._recent) + self._unclaimed
        return expected < ALWAYS_RECENT or expected * self._mean_bytes < self._burst_bytes

    def _is_full(self) -> bool:
        """Whether a fetch has to end, or an image to be taken, before another fetch may start."""
        return self.in_flight >= self.concurrency or self._unclaimed >= self._most_unclaimed

    def looks_again_at(self) -> float:
        """When the oldest recent fetch will not be recent any more; infinity if there is none, or if that would not help."""
        return math.inf if self._is_full() else next(iter(self._recent.values()), math.inf) + RECENT_S

    def note_start(self, fetch: object, now: float) -> None:
        """The fetch begins."""
        self.in_flight += 1
        self._recent[fetch] = now

    def note_end(self, fetch: object) -> None:
        """The fetch, or this attempt, has ended."""
        self.in_flight -= 1
        self._recent.pop(fetch, None)

    def note_outcome(self, byte_count: int) -> None:
        """An outcome waits to be taken: an image of so many bytes, or a failure (0)."""
        self._unclaimed += 1
        if byte_count:  # longer bodies wait for room of their own
            self._mean_bytes += (min(byte_count, SMALL_BYTES) - self._mean_bytes) / REMEMBERED_IMAGES

    def note_taken(self) -> None:
        """An outcome has been taken."""
        self._unclaimed -= 1

    def forget_outcomes(self) -> None:
        """Nobody will take what has come so far."""
        self._unclaimed = 0
