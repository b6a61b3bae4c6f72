"""How hosts are paced over many requests: simulated servers on a simulated clock, so that minutes take no time."""
import collections
import heapq
import math
import random
from typing import NamedTuple

import pytest

from addons.images import exchange, fetch, flow, hosts


class Found(NamedTuple):
    """What became of all rows of a host: `seconds` are those of the simulated clock."""

    served: int
    refused: int
    failed: int
    seconds: float


def ask_all(answer, rows=400, latency_s=0.05, is_bare_503=True):
    """Ask a host for all rows as Fetcher does; `answer(now)` is True for an image, False for 503 (or 429)."""
    host = hosts.Host("h", 16, 120.0)
    waiting = collections.deque([0] * rows)  # how often each row has been refused
    under_way = []
    counts = collections.Counter()
    now = 0.0
    for number in range(100_000):
        start = host.next_start() if waiting else math.inf
        if start <= now or start < (under_way[0][0] if under_way else math.inf):
            now = max(now, start)
            host.note_start(now)
            heapq.heappush(under_way, (now + latency_s, number, now, waiting.popleft(), answer(now + latency_s / 2)))
            continue
        if not under_way:
            break
        now, _, began, refusals, is_served = heapq.heappop(under_way)
        host.in_flight -= 1
        counts["served" if is_served else "refused"] += 1
        if is_served:
            host.note_served(now, began)
        elif is_bare_503 and not host.has_served:
            waiting.append(refusals)
        elif host.note_refusal(now, began, 0.0, is_bare_503) and refusals < fetch.MOST_REFUSALS:
            waiting.append(refusals + 1)
        else:
            counts["failed"] += 1
        if host.is_given_up(now):
            counts["failed"] += len(waiting)
            waiting.clear()
    assert counts["served"] + counts["failed"] == rows
    return Found(counts["served"], counts["refused"], counts["failed"], now)


def refuse_at_random(share, seed):
    rng = random.Random(seed)
    return lambda now: rng.random() >= share


def allow_per_second(count):
    """At most so many within any second."""
    log = collections.deque()

    def answer(now):
        while log and now - log[0] > 1:
            log.popleft()
        if len(log) >= count:
            return False
        log.append(now)
        return True
    return answer


def fill_bucket(per_second, size):
    """So many a second on average, after a burst of `size`."""
    left = size
    since = 0.0

    def answer(now):
        nonlocal left, since
        left = min(size, left + (now - since) * per_second)
        since = now
        if left < 1:
            return False
        left -= 1
        return True
    return answer


@pytest.mark.parametrize("latency_s", [0.002, 0.05, 0.5])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.5])
def test_host_that_answers_503_at_random(share, latency_s):
    """Slowing down does not help a host that answers 503 at random: it gets its rows served at a rate that it can bear."""
    for seed in range(20):
        found = ask_all(refuse_at_random(share, seed), latency_s=latency_s)
        assert found.served >= 0.98 * 400
        assert found.seconds < 240  # two rows a second or more


@pytest.mark.parametrize("is_bare_503", [True, False])
@pytest.mark.parametrize("latency_s", [0.002, 0.05, 0.5])
@pytest.mark.parametrize("count", [5, 20, 100])
def test_host_that_limits_its_rate(count, latency_s, is_bare_503):
    """A host that allows so many requests a second serves all of its rows, at half of that rate or more, and refuses few."""
    found = ask_all(allow_per_second(count), latency_s=latency_s, is_bare_503=is_bare_503)
    assert found.failed == 0 and found.refused < 0.15 * 400
    assert found.seconds < 2 * 400 / count + 20


@pytest.mark.parametrize("latency_s", [0.002, 0.05, 0.5])
@pytest.mark.parametrize(("per_second", "size"), [(5, 20), (20, 100), (1, 30)])
def test_host_that_allows_a_burst(per_second, size, latency_s):
    """What a host took in a burst is not taken for what it goes on to take, also where it refuses by 503."""
    found = ask_all(fill_bucket(per_second, size), latency_s=latency_s)
    assert found.served >= 0.99 * 400 and found.refused < 400


def test_host_that_is_down_is_left_alone():
    """A host that has served and then answers nothing but 503 is asked a few dozen times, until patience with it ends."""
    found = ask_all(lambda now: now < 1.0)
    assert found.refused - found.failed < 80 and found.failed > 0
    assert found.seconds < 200


def test_flaky_host_that_limits_its_rate_later():
    """That 503 comes at random is not believed for ever: a host that limits its rate afterwards gets its rows served, too."""
    flaky = refuse_at_random(0.5, 3)
    limited = allow_per_second(2)
    found = ask_all(lambda now: flaky(now) if now < 60 else limited(now), rows=1500)
    assert found.served >= 0.97 * 1500


# ── How many at a time ────────────────────────────────────────────────────────────────────────────────────────────────

def start_all(control, now, first=0):
    """Begin as many fetches as may begin now, named by numbers; returns how many are under way."""
    number = first
    while control.may_start(now):
        control.note_start(number, now)
        number += 1
    return control.in_flight


def test_no_more_fetches_than_bring_what_finds_room():
    """As many may begin within a second as could bring the bytes that there is room for, by the size of images so far."""
    control = flow.Flow(1000, 30_000_000, 128)
    assert start_all(control, 0.0) == 30_000_000 // flow.FIRST_GUESS_BYTES
    small = flow.Flow(1000, 30_000_000, 128)
    for _ in range(1000):
        small.note_outcome(30_000)
        small.note_taken()
    assert start_all(small, 0.0) == pytest.approx(1000, abs=2)
    large = flow.Flow(1000, 30_000_000, 128)
    for _ in range(1000):
        large.note_outcome(20_000_000)
        large.note_taken()
    assert start_all(large, 0.0) == pytest.approx(30_000_000 / exchange.SMALL_BYTES, abs=2)


def test_late_fetches_leave_room_for_others():
    """Fetches that have waited for a second are not expected to bring theirs at once: others begin, up to the most of all."""
    control = flow.Flow(1000, 30_000_000, 128)
    assert start_all(control, 0.0) == 300
    assert control.looks_again_at() == flow.RECENT_S
    assert start_all(control, 0.5, 300) == 300
    assert start_all(control, 1.0, 300) == 600
    assert start_all(control, 2.0, 600) == 900
    assert start_all(control, 3.0, 900) == 1000
    for number in range(500):
        control.note_end(number)
    assert start_all(control, 4.5, 1000) == 800


def test_images_that_nobody_takes_stop_the_fetches():
    """While so many images wait to be taken, no fetch begins; failures count as well, until they are taken."""
    control = flow.Flow(1000, 10**12, 3)
    for byte_count in (5, 0, 0):
        assert control.may_start(0.0)
        control.note_outcome(byte_count)
    assert not control.may_start(0.0)
    control.note_taken()
    assert control.may_start(0.0)


def test_few_fetches_may_always_begin():
    """However little room there is, some fetches are under way."""
    assert start_all(flow.Flow(1000, 1, 128), 0.0) == flow.ALWAYS_RECENT
