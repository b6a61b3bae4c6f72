"""What is known of each host, and when it may be asked next: hosts are paced, not punished.

A host that answers 429, or 503, is left alone for a while, all of its rows together, and from then on asked at a rate that it
has shown to accept, which grows again slowly. Where that does not help, because it answers 503 at random, it is asked as often
as it once served, and not left alone. A host that cannot be reached several times in a row is dead for a while.
Nothing here waits or looks at a clock: `now` is always given, in seconds of one monotonic clock.
"""
import bisect
import collections
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from addons.images.suspicion import SLOWEST_RATE, Suspicion

if TYPE_CHECKING:
    from addons.images.fetch import Fetch

PAUSES_S = (1.0, 60.0)  # after refusals that do not say how long to wait: the first, doubled each time, and the longest
REFUSED_SHARE = 0.75  # of the rate that a host accepted before it refused
GROWTH_PER_S = 0.02  # of the rate, while a host accepts it
PATIENCE_PER_IMAGE_S = 0.1  # what a host that serves an image gets back of the patience it has used up
DEAD_AFTER = 5  # failures in a row to connect or to resolve, …
DEAD_AFTER_S = 3.0  # … over so long: a resolver or a server that is away for a moment costs few rows
DEAD_FOR_S = 60.0
REST_AFTER = 3  # such failures in a row a host rests for a moment: one now and then says nothing
FIRST_REST_S = 0.25  # doubled each time
KEPT_HOSTS = 5_000  # that nobody waits for, with what has been learnt of them

# Of 503 without Retry-After between images:
PAUSES_BETWEEN_IMAGES_S = (0.5, 4.0)  # the first and the longest
RANDOM_IN_A_ROW = 6  # so many times a host that answers 503 at random is asked again at once


class Host:
    """One host: its rows that wait, its fetches under way, and how it has answered so far."""

    def __init__(self, name: str, most_at_once: int, patience_s: float) -> None:
        self.name = name
        self.waiting: collections.deque[Fetch] = collections.deque()
        self.in_flight = 0
        self.is_listed = False  # among the hosts that may be asked now
        self.wakes_at = math.inf  # when it will be looked at again
        self.has_served = False
        self.rate = math.inf  # requests a second
        self.patience_s = patience_s
        self.dead_status = ""  # `connect` or `dns`, of the last failure to reach it
        self.refusal_code = 429  # of the last refusal
        self._most_at_once = most_at_once
        self._most_patience_s = patience_s
        self._served: collections.deque[float] = collections.deque(maxlen=256)  # when, for the last second's rate
        self._next_start = -math.inf
        self._paused_until = -math.inf
        self._refused_at = -math.inf
        self._refusals = 0  # in a row
        self._grown_at = -math.inf
        self._suspicion = Suspicion()
        self._failures = 0  # in a row
        self._failing_since = -math.inf  # when the first of them began
        self._rests = 0  # since then
        self._rested_at = -math.inf  # when the last of them began
        self._dead_until = -math.inf

    def next_start(self) -> float:
        """When the next fetch may begin; infinity while as many as allowed are under way."""
        most = 1 if self._failures >= DEAD_AFTER else self._most_at_once  # a single one finds out whether it is back
        if self.in_flight >= most:
            return math.inf
        return max(self._paused_until, self._next_start)

    def is_dead(self, now: float) -> bool:
        """Whether it could not be reached so often in a row that it is not asked for now."""
        return now < self._dead_until

    def is_given_up(self, now: float) -> bool:
        """Whether it goes on refusing although all patience with it has been used up."""
        return self.patience_s <= 0 and now < self._paused_until

    def note_start(self, now: float) -> None:
        """A fetch begins."""
        self.in_flight += 1
        self._next_start = max(now, self._next_start) + 1 / self.rate

    def note_answer(self) -> None:
        """It answered, whatever it said: it is not dead."""
        self._failures = 0
        self._rests = 0

    def note_served(self, now: float, began: float) -> None:
        """It served what was asked for then: it gets back some patience, and may be asked a little faster."""
        self.has_served = True
        self._refusals = 0
        self._suspicion.note_served(began, self._refused_at)
        self._served.append(now)
        self.patience_s = min(self._most_patience_s, self.patience_s + PATIENCE_PER_IMAGE_S)
        if math.isfinite(self.rate) and not self._suspicion.is_random(now):
            self.rate *= 1 + GROWTH_PER_S * min(1.0, now - self._grown_at)
            self._grown_at = now

    def note_refusal(self, now: float, began: float, retry_after_s: float, is_bare_503: bool = False) -> bool:
        """It refused a request that `began` then, and wants to be left alone for `retry_after_s` (0: it does not say).

        Returns whether there is patience to wait for it. Many may be under way when it refuses: those that began before the
        refusal tell nothing new, unless they ask for a longer pause. `is_bare_503`: the answer was 503 without Retry-After,
        which may as well come at random.
        """
        is_news = began >= self._refused_at
        if is_bare_503:
            self._suspicion.note_refusal(now)
        if is_news:
            self._refusals += 1
            if is_bare_503 and self._suspicion.judge(now, max(self._refused_at, self._paused_until)):
                self.rate = max(self.rate, self._most_in_a_second())
            self._refused_at = now
        refusals = self._refusals
        if is_bare_503 and self._suspicion.is_random(now):
            refusals -= RANDOM_IN_A_ROW
            if refusals <= 0:
                return self.patience_s > 0
        elif is_news:
            self._slow_down(now, self._suspicion.slowest_rate(now) if is_bare_503 else SLOWEST_RATE)
        if is_news or retry_after_s:
            first_s, longest_s = PAUSES_BETWEEN_IMAGES_S if is_bare_503 else PAUSES_S
            self._pause(now, retry_after_s or min(longest_s, first_s * 2 ** min(30, refusals - 1)))
        return self.patience_s > 0

    def _most_in_a_second(self) -> int:
        """The most images of the last 256 that it served within a second."""
        served = sorted(self._served)
        return max(bisect.bisect_right(served, begin + 1.0) - number for number, begin in enumerate(served))

    def _pause(self, now: float, pause_s: float) -> None:
        """Leave it alone for so long from now on, at the cost of the patience with it."""
        longer_s = now + pause_s - max(now, self._paused_until)
        if longer_s > 0:
            if longer_s > self.patience_s:
                self.patience_s = 0.0
                longer_s = min(longer_s, PAUSES_S[1])
            self.patience_s -= min(longer_s, self.patience_s)
            self._paused_until = max(now, self._paused_until) + longer_s

    def _slow_down(self, now: float, slowest_rate: float) -> None:
        """From now on ask at a rate below what it accepted in the second before it refused, or at half the rate so far."""
        accepted = sum(now - served <= 1.0 for served in self._served)
        rates = [self.rate / 2, accepted * REFUSED_SHARE or math.inf]
        if accepted and self._refusals == 1:
            rates[0] = self.rate * REFUSED_SHARE
        slowest = min(rates)
        self.rate = max(slowest_rate, slowest if math.isfinite(slowest) else 1.0)
        self._next_start = now
        self._grown_at = now

    def note_unreachable(self, now: float, began: float, status: str) -> None:
        """It could not be connected to, or its name not resolved (`status` connect or dns), by an attempt that `began` then.

        It rests for a moment before others try, or many that wait would all fail of one short trouble.
        """
        if not self._failures:
            self._failing_since = began
        self._failures += 1
        self.dead_status = status
        if self._failures >= DEAD_AFTER and now - self._failing_since >= DEAD_AFTER_S:
            self._dead_until = now + DEAD_FOR_S
        elif self._failures >= REST_AFTER and began >= self._rested_at:  # those under way meanwhile tell nothing new
            self._rested_at = now
            self._next_start = max(self._next_start, now + FIRST_REST_S * 2 ** min(self._rests, 4))
            self._rests += 1

    def is_idle(self) -> bool:
        """Whether nothing waits for it or is under way."""
        return not self.waiting and not self.in_flight


class Hosts:
    """All hosts that are asked, and the last KEPT_HOSTS of those that were."""

    def __init__(self, most_at_once: int, patience_s: float) -> None:
        self._most_at_once = most_at_once
        self._patience_s = patience_s
        self._by_name: dict[str, Host] = {}
        self._idle: collections.OrderedDict[str, Host] = collections.OrderedDict()  # the longest idle first

    def __len__(self) -> int:
        return len(self._by_name)

    def __iter__(self) -> Iterator[Host]:
        return iter(list(self._by_name.values()))

    def find(self, name: str) -> Host:
        """The host of that name, which is in use from now on until it is `rested`."""
        self._idle.pop(name, None)
        host = self._by_name.get(name)
        if host is None:
            host = Host(name, self._most_at_once, self._patience_s)
            self._by_name[name] = host
        return host

    def rest(self, host: Host) -> None:
        """Nobody waits for the host for now; of too many such, the one that has rested longest is forgotten."""
        if not host.is_idle() or self._by_name.get(host.name) is not host:
            return
        self._idle[host.name] = host
        if len(self._idle) > KEPT_HOSTS:
            name, _ = self._idle.popitem(last=False)
            del self._by_name[name]
