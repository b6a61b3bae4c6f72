"""Fetch images from URLs that strangers wrote: public addresses only, capped bytes, a deadline for each, and no host pressed.

Used by `image_path: url`. All fetches of a process run in one thread, that of its event loop, where waiting costs nothing:
a host that does not answer holds one place among `fetch_concurrency`, and a row that waits for a host which wants to be left
alone holds none. This file decides which fetch has its turn when. What is done in a turn is in exchange.py, HTTP itself in
http_client.py, what a URL means in targets.py, names and addresses in names.py, what a host will bear in hosts.py.
"""
import asyncio
import collections
import contextlib
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from addons.images.cache import Cache
from addons.images.exchange import Attempt, BytesInFlight, Holding, PassingFailure, Redirected, Refused, Unreachable, Web
from addons.images.flow import Flow
from addons.images.hosts import DEAD_AFTER, Host, Hosts
from addons.images.http_client import TooManyFiles
from addons.images.memory import reserve_for_image
from addons.images.targets import Target, can_be_split, read_url
from image_text_sim_clip import Config, Loaded, RowFailure, say, usable_cores

if TYPE_CHECKING:
    import pyarrow as pa

    from addons.images.web_pool import WebPool
    from addons.images.web_report import Report
    from image_text_sim_clip import PartitionRun, Plan

SOURCES = ("url",)

REDIRECTS = 5
FIRST_PAUSE_S = 0.25  # before the second attempt; doubled from try to try
MOST_REFUSALS = 8  # of one row by a host that serves others
AUTO_CONCURRENCY = 1024
FILES_KEPT_BACK = 128  # descriptors for everything else that this process opens
FILES_OF_A_RESOLVER = 8  # of so many descriptors one is for looking names up
MOST_KEPT = 512  # connections for later: each takes some 65 kB, 210 kB with TLS
FETCHING_SHARE = 2 / 3  # of the other descriptors; the rest are connections kept for later
UNCLAIMED_IMAGES = 128  # fetched or decoded, and not taken yet: beyond that no new fetch begins
BURST_BYTES_A_CORE = 16 * 2**20  # that may come at once
FULL_PAUSE_S = 0.2  # when there are too many open files
MOST_TIMES_FULL = 50
SUBMITTED_AT_ONCE = 50  # URLs that are read between two looks at the sockets
TIDY_S = 10.0  # connections that have long been unused are looked for so often
CACHE_THREADS = 8
DROP_S = 5.0


def open_source(config: Config, threads: int) -> "Fetcher":
    """The source `url` (see addons/images/__init__.py)."""
    return Fetcher(config)


@dataclasses.dataclass
class Outcome:
    """What became of a fetch: `data` or a `failure`; `seconds` are those of its attempts, not those in which it had no turn.

    Whoever needs the data no longer says so by `Fetcher.release`, so that others can be fetched.
    """

    data: bytes = b""
    failure: RowFailure | None = None
    seconds: float = 0.0
    holding: Holding = dataclasses.field(default_factory=Holding)
    bug: Exception | None = None

    def get(self) -> bytes:
        """The bytes, or the failure raised."""
        if self.bug:
            raise self.bug
        if self.failure:
            raise self.failure
        return self.data


OnDone = Callable[[Outcome], None]


@dataclasses.dataclass(eq=False)
class Fetch:
    """One URL on its way, through attempts and redirects."""

    url: str  # as the table has it
    on_done: OnDone
    target: Target
    host: Host  # that it waits for, or is fetched from
    hops: int = 0
    attempts: int = 0
    refusals: int = 0
    times_full: int = 0
    spent_s: float = 0.0
    opted_out: bool = False  # it, or a redirect on its way, has a server that opts out, and the config does not mind


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """The loop in which this process fetches, in a thread of its own that ends with the process."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="fetching", daemon=True).start()
    return loop


def count_files() -> int:
    """How many file descriptors this process may have."""
    try:
        import resource
        return min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 2**20)
    except (ImportError, ValueError):  # elsewhere than on POSIX
        return 1024


def count_connections(config: Config) -> tuple[int, int]:
    """How many fetches may be under way, and how many unused connections may be kept, with the file descriptors there are."""
    free = max(8, count_files() - FILES_KEPT_BACK)
    most = AUTO_CONCURRENCY if config.fetch_concurrency == "auto" else config.fetch_concurrency
    concurrency = max(1, min(most, int(free * FETCHING_SHARE)))
    return concurrency, max(1, min(concurrency, free - concurrency, MOST_KEPT))


class Fetcher:
    """URL -> bytes. Call it from any thread for one URL; or `submit` many, and be called back in the event loop's thread.

    What 0.1 took besides the config, callers may still give: it is of no use any more.
    """

    def __init__(self, config: Config, *obsolete: object) -> None:
        self.config = config
        concurrency, kept_connections = count_connections(config)
        self.flow = Flow(concurrency, usable_cores() * BURST_BYTES_A_CORE, UNCLAIMED_IMAGES)
        self.fetch_seconds: dict[int, collections.Counter[int]] = {}  # by partition, see web_report.py
        self.hosts = Hosts(config.max_per_host, config.host_patience_s)
        self.web = Web(config, kept_connections, max(1, count_files() // FILES_OF_A_RESOLVER))
        self._loop = event_loop()
        self._here = threading.local()  # .lent: the Outcome that a call in this thread is to return
        self._listed: collections.deque[Host] = collections.deque()  # hosts that may be asked now, in turns
        self._tasks: set[asyncio.Task[None]] = set()
        self._looks_again_at = math.inf  # whether more fetches may begin
        self._lock = threading.Lock()
        self._submissions = 0  # lists of URLs that have not been read to their end
        self._has_said_full = False
        self._tidy_at = 0.0
        self._cache: Cache | None = None
        self._disk = Host("", CACHE_THREADS, 0.0)  # with a cache, rows wait for it first, and then for their host if they must
        if config.cache_path:
            self._cache = Cache(config.cache_path, config.max_image_bytes, config.respect_opt_out)
            self._disk_threads = ThreadPoolExecutor(CACHE_THREADS, "cache")

    # ── For other threads ─────────────────────────────────────────────────────────────────────────────────────────────

    def __call__(self, url: str) -> bytes:
        """The body that `url` serves, or served an earlier run; tries again after passing troubles; raises RowFailure.

        On its way the web's own bound counts it, here the budget of the run's images: a fetch never waits for that.
        """
        lent: Outcome | None = getattr(self._here, "lent", None)
        if lent is None:
            answer: Future[Outcome] = Future()
            self.submit([(url.strip(), answer.set_result)])
            outcome = answer.result()
            self.release(outcome)
        else:
            outcome = lent
        data = outcome.get()
        reserve_for_image(len(data))
        return data

    def call_with(self, outcome: Outcome, load: Callable[[], Loaded]) -> Loaded:
        """`load()`, in which a call of this fetcher returns what has been fetched already."""
        self._here.lent = outcome
        try:
            return load()
        finally:
            self._here.lent = None

    def submit(self, fetches: Iterable[tuple[str, OnDone]]) -> None:
        """Fetch each URL when its host's turn comes, and then call its `OnDone`."""
        with self._lock:
            self._submissions += 1
        self._loop.call_soon_threadsafe(self._read_some, iter(fetches))

    def release(self, outcome: Outcome) -> None:
        """The outcome's data is needed no longer."""
        self._loop.call_soon_threadsafe(self._release, outcome.holding)

    def is_hungry(self) -> bool:
        """Whether it could begin more fetches at once, if it only had URLs of hosts that may be asked."""
        return not self._submissions and not self._listed and self.flow.may_start(self._loop.time())

    def drop_all(self) -> None:
        """Forget what waits and cut what is under way, without calling anybody back."""
        with contextlib.suppress(TimeoutError):  # nobody waits longer for a run to end
            asyncio.run_coroutine_threadsafe(self._drop_all(), self._loop).result(DROP_S)

    def open_pool(self, threads: int) -> "WebPool":
        """The pool that loads a run's images as they come; `threads` decode."""
        from addons.images.web_pool import WebPool
        return WebPool(self, threads)

    def report_partition(self, plan: "Plan", run: "PartitionRun", table: "pa.Table") -> "Report":
        """What is kept next to a part about its fetches; `table` holds the results of the whole partition."""
        from addons.images.web_report import describe_partition
        return describe_partition(self.config, plan, run, table, self.fetch_seconds.pop(run.partition.index, None))

    # ── Turns (all that follows runs in the event loop's thread) ──────────────────────────────────────────────────────

    def _read_some(self, fetches: Iterator[tuple[str, OnDone]]) -> None:
        """Queue some URLs at their hosts, and go on with the others after whatever else is to be done."""
        for _ in range(SUBMITTED_AT_ONCE):
            pair = next(fetches, None)
            if pair is None:
                with self._lock:
                    self._submissions -= 1
                break
            url, on_done = pair
            try:
                target = read_url(url, self.config)
            except RowFailure as failure:
                self._deliver(on_done, Outcome(failure=failure.with_traceback(None)))
                continue
            except Exception as bug:  # it must reach the run, which waits for this row
                self._deliver(on_done, Outcome(bug=bug))
                continue
            host = self._disk if self._cache else self.hosts.find(target.host_name)
            self._queue(Fetch(url, on_done, target, host))
        else:
            self._loop.call_soon(self._read_some, fetches)
        self._start_fetches()

    def _queue(self, fetch: Fetch, is_next: bool = False) -> None:
        """Have the fetch wait for its host, before the others if it `is_next`."""
        if is_next:
            fetch.host.waiting.appendleft(fetch)
        else:
            fetch.host.waiting.append(fetch)
        self._look_at(fetch.host)

    def _look_at(self, host: Host) -> None:
        """List the host if it may be asked now, or see to it that it is looked at when it may; give up one that is dead."""
        now = self._loop.time()
        if host.is_dead(now):
            self._give_up(host, host.dead_status, f"host not reached {DEAD_AFTER} times in a row, left alone for a while")
        elif host.is_given_up(now):
            self._give_up(host, *_describe_refusal(host.refusal_code))
        if not host.waiting:
            self.hosts.rest(host)
        elif not host.is_listed:
            start = host.next_start()
            if start <= now:
                host.is_listed = True
                self._listed.append(host)
            elif start < host.wakes_at:  # infinity: it is looked at when one of its fetches ends
                host.wakes_at = start
                self._loop.call_at(start, self._wake, host)

    def _wake(self, host: Host) -> None:
        host.wakes_at = float("inf")
        self._look_at(host)
        self._start_fetches()

    def _start_fetches(self) -> None:
        """Begin as many fetches as there is room for; the hosts that may be asked take turns."""
        now = self._loop.time()
        while self._listed and self.flow.may_start(now):
            now = self._loop.time()  # anew, or a host whose turn has come meanwhile would be listed again and again
            host = self._listed.popleft()
            host.is_listed = False
            if host.waiting and host.next_start() <= now:
                host.note_start(now)
                fetch = host.waiting.popleft()
                self.flow.note_start(fetch, now)
                self._begin_task(self._run(fetch))
            self._look_at(host)
        if self._listed and self.flow.looks_again_at() < self._looks_again_at:
            self._looks_again_at = self.flow.looks_again_at()
            self._loop.call_at(self._looks_again_at, self._look_again)
        if now > self._tidy_at:
            self._tidy_at = now + TIDY_S
            self.web.connections.close_old(now)

    def _look_again(self) -> None:
        self._looks_again_at = math.inf
        self._start_fetches()

    def _begin_task(self, work: "collections.abc.Coroutine[None, None, None]") -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _give_up(self, host: Host, status: str, detail: str) -> None:
        """All rows that wait for the host end with that status."""
        while host.waiting:
            self._fail(host.waiting.popleft(), RowFailure(status, detail))

    def _fail(self, fetch: Fetch, reason: RowFailure) -> None:
        self._deliver(fetch.on_done, Outcome(failure=reason.with_traceback(None), seconds=fetch.spent_s))

    def _deliver(self, on_done: OnDone, outcome: Outcome) -> None:
        self.flow.note_outcome(len(outcome.data))
        on_done(outcome)

    def _release(self, holding: Holding) -> None:
        self.flow.note_taken()
        self.web.bytes.give_back(holding)
        self._start_fetches()

    async def _drop_all(self) -> None:
        self._listed.clear()
        for host in (self._disk, *self.hosts):
            host.waiting.clear()
            host.is_listed = False
        ending = list(self._tasks)
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        self.flow.forget_outcomes()
        self.web.bytes = BytesInFlight(self.config.max_image_bytes)

    async def _run(self, fetch: Fetch) -> None:
        """What is done in a turn."""
        host = fetch.host
        try:
            if host is self._disk:
                await self._look_into_cache(fetch)
            else:
                await self._try(fetch)
        except Exception as bug:  # it must reach the run, which waits for this row
            self._deliver(fetch.on_done, Outcome(bug=bug))
        finally:
            self.flow.note_end(fetch)
            host.in_flight -= 1
            self._look_at(host)
            self._start_fetches()

    async def _look_into_cache(self, fetch: Fetch) -> None:
        """Deliver what the cache holds of the URL, or have the row wait for its host."""
        assert self._cache
        try:
            body = await self._loop.run_in_executor(self._disk_threads, self._cache.read, fetch.url)
        except RowFailure as failure:
            self._fail(fetch, failure)
            return
        if body is None:
            fetch.host = self.hosts.find(fetch.target.host_name)
            self._queue(fetch)
        else:
            attempt = Attempt(fetch.target, float("inf"))
            await self.web.bytes.count(attempt, len(body), len(body))
            self._deliver(fetch.on_done, Outcome(body, holding=attempt.holding))

    async def _try(self, fetch: Fetch) -> None:
        """One attempt over the network; it ends with a body, a failure, or the wait for another turn."""
        host = fetch.host
        began = self._loop.time()
        attempt = Attempt(fetch.target, began + self.config.fetch_timeout_s - fetch.spent_s)
        trouble: Exception | None = None
        body = b""
        try:
            body = await self.web.get(attempt)
        except (RowFailure, PassingFailure, Redirected, Refused, TooManyFiles) as error:
            trouble = error.with_traceback(None)
            trouble.__context__ = None  # its traceback would keep what had been read
        now = self._loop.time()
        if isinstance(trouble, TooManyFiles):
            self._make_room(fetch)
            return
        if isinstance(trouble, Refused) and not (trouble.is_bare_503() and not host.has_served):
            self._wait_for_host(fetch, began, trouble)
            return
        fetch.spent_s += now - began - attempt.waited_s
        fetch.opted_out |= attempt.opted_out
        if isinstance(trouble, Unreachable):
            host.note_unreachable(now, began + attempt.waited_s, "dns" if trouble.status == "dns" else "connect")
        elif attempt.is_reading:
            host.note_answer()
        if isinstance(trouble, Refused):
            trouble = PassingFailure(trouble.status, str(trouble.code))
        if trouble is None:
            host.note_served(now, began)
            await self._keep_in_cache(fetch, body)
            self._deliver(fetch.on_done, Outcome(body, seconds=fetch.spent_s, holding=attempt.holding))
        elif isinstance(trouble, Redirected):
            self._follow(fetch, trouble.url)
        elif isinstance(trouble, PassingFailure):
            self._try_again(fetch, trouble)
        elif isinstance(trouble, RowFailure):
            await self._forget_if_opted_out(fetch, trouble)
            self._fail(fetch, trouble)

    async def _keep_in_cache(self, fetch: Fetch, body: bytes) -> None:
        if self._cache:
            await self._loop.run_in_executor(self._disk_threads, self._cache.keep, fetch.url, body, fetch.opted_out)

    async def _forget_if_opted_out(self, fetch: Fetch, reason: RowFailure) -> None:
        if self._cache and reason.status == "opted_out":
            await self._loop.run_in_executor(self._disk_threads, self._cache.forget, fetch.url)

    def _follow(self, fetch: Fetch, url: str) -> None:
        """Have the fetch wait for the host that a redirect names."""
        fetch.hops += 1
        try:
            if fetch.hops > REDIRECTS:
                raise RowFailure("connect", f"more than {REDIRECTS} redirects")
            if fetch.spent_s >= self.config.fetch_timeout_s:
                raise RowFailure("timeout", "no answer in time")
            if not can_be_split(url):
                raise RowFailure("missing", "not a URL")
            fetch.target = read_url(url, self.config)
        except RowFailure as failure:
            self._fail(fetch, failure)
            return
        fetch.host = self.hosts.find(fetch.target.host_name)
        self._queue(fetch, is_next=True)

    def _wait_for_host(self, fetch: Fetch, began: float, refused: Refused) -> None:
        """The host wants to be left alone: its rows wait for it, and this one takes its turn behind them."""
        host = fetch.host
        host.note_answer()
        host.refusal_code = refused.code
        fetch.refusals += 1
        if not host.note_refusal(self._loop.time(), began, refused.retry_after_s, refused.is_bare_503()):
            self._fail(fetch, RowFailure(*_describe_refusal(refused.code)))
        elif fetch.refusals > MOST_REFUSALS and host.has_served:
            self._fail(fetch, RowFailure(refused.status, str(refused.code)))
        else:
            self._queue(fetch)

    def _try_again(self, fetch: Fetch, passing: PassingFailure) -> None:
        """Another attempt after a pause, for which no place is held, if there are retries and time left."""
        pause_s = FIRST_PAUSE_S * 2 ** fetch.attempts
        fetch.attempts += 1
        if fetch.attempts > self.config.fetch_retries or fetch.spent_s + pause_s >= self.config.fetch_timeout_s:
            self._fail(fetch, RowFailure(passing.status, passing.detail))
            return
        fetch.spent_s += pause_s
        self._begin_task(self._queue_later(fetch, pause_s))

    async def _queue_later(self, fetch: Fetch, pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        fetch.host = self.hosts.find(fetch.target.host_name)  # it may have been forgotten meanwhile
        self._queue(fetch, is_next=True)
        self._start_fetches()

    def _make_room(self, fetch: Fetch) -> None:
        """There are too many open files: fetch fewer at a time from now on, and this one once more."""
        self.web.connections.close_all_but(0)
        self.web.connections.most = 0
        self.flow.concurrency = max(1, min(self.flow.concurrency, self.flow.in_flight - 1))
        if not self._has_said_full:
            self._has_said_full = True
            say(f"too many open files (ulimit -n): fetching {self.flow.concurrency} images at a time")
        fetch.times_full += 1
        if fetch.times_full > MOST_TIMES_FULL:
            self._fail(fetch, RowFailure("connect", "too many open files"))
        else:
            self._begin_task(self._queue_later(fetch, FULL_PAUSE_S))


def _describe_refusal(code: int) -> tuple[str, str]:
    """Status and detail of a row whose host refuses for longer than there is patience."""
    return ("http_4xx" if code == 429 else "http_5xx"), f"{code}, asks to come back later"
