"""One attempt to fetch an image: connect to a checked address, ask, judge the answer, read it within time and memory."""
import asyncio
import collections
import contextlib
import dataclasses
import email.utils
import functools
import os
import pathlib
import re
import ssl
import time

from requests.utils import DEFAULT_CA_BUNDLE_PATH

from addons.images.http_client import (
    CONNECT_TIMEOUT_S,
    BadAnswer,
    Connection,
    Head,
    KeptConnections,
    open_connection,
)
from addons.images.names import MOST_THREADS, Address, NameFailure, NoName, NotPublic, Resolver
from addons.images.targets import Target, follow_redirect
from image_text_sim_clip import EXIT_CONFIG, Config, RowFailure, Trouble

REDIRECT_CODES = (301, 302, 303, 307, 308)
REFUSING_CODES = (429, 503)
REQUEST_TIMED_OUT = 408
TOO_EARLY = 425
# what changes a body; servers also send base64, UTF-8, image/png and more as a Content-Encoding, which browsers pass over
CODINGS = {"gzip", "x-gzip", "deflate", "br", "zstd", "compress", "x-compress"}
MOST_TUNNELS = 3  # that a proxy is asked for in turn: it may have no IPv6
SMALL_BYTES = 128 * 2**10
MEDIUM_BYTES = 4 * 2**20
MEDIUM_BUDGET = 96 * 2**20  # of all bodies of up to MEDIUM_BYTES that are held at a time
LARGE_BUDGET = 192 * 2**20  # of the longer ones


class PassingFailure(Exception):
    """A failure that may be gone at the next try."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(status, detail)
        self.status = status
        self.detail = detail


class Unreachable(PassingFailure):
    """The same, and it was the host that could not be reached: its name or its address."""


class Refused(Exception):
    """The host answered that it is asked too often; 0 seconds if it does not say when to come back."""

    def __init__(self, code: int, retry_after_s: float) -> None:
        super().__init__(code)
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def status(self) -> str:
        """The row's status, should nothing come of waiting."""
        return "http_4xx" if self.code == 429 else "http_5xx"

    def is_bare_503(self) -> bool:
        """Whether it may as well be a host that is broken for good."""
        return self.code == 503 and not self.retry_after_s


class Redirected(Exception):
    """The image is said to be at another URL."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.url = url


@dataclasses.dataclass(eq=False)
class Attempt:
    """One attempt on its way; times are those of the event loop's clock."""

    target: Target
    ends: float  # its deadline, later by what it has `waited_s`
    waited_s: float = 0.0  # for room in memory, or for a thread that looks its name up: neither is the server's fault
    holding: "Holding" = dataclasses.field(default_factory=lambda: Holding())
    is_resolving: bool = False  # the host's name is being looked up
    is_reading: bool = False  # the head has come
    opted_out: bool = False  # the server opts out, and the config does not mind
    clock: asyncio.Timeout | None = None

    async def wait_unclocked(self, event: "asyncio.Future[None]") -> None:
        """Wait for the event, off the clock."""
        loop = asyncio.get_running_loop()
        since = loop.time()
        if self.clock:
            self.clock.reschedule(None)
        await event
        waited_s = loop.time() - since
        self.waited_s += waited_s
        self.ends += waited_s
        if self.clock:
            self.clock.reschedule(self.ends)


class Budget:
    """Bytes that may be held at a time; who wants some waits for its turn, the first first."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0
        self._waiting: collections.deque[tuple[int, asyncio.Future[None]]] = collections.deque()

    def _fits(self, count: int) -> bool:
        return self.taken + count <= self.most or not self.taken

    async def take(self, attempt: Attempt, count: int) -> None:
        """Take so many bytes for a body, off the attempt's clock if they have to be waited for."""
        if self._fits(count) and not self._waiting:
            self.taken += count
            return
        event: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, event))
        try:
            await attempt.wait_unclocked(event)
        except BaseException:
            if event.done() and not event.cancelled():  # given in the moment of being cancelled
                self.give_back(count)
            raise

    def give_back(self, count: int) -> None:
        """So many bytes are held no longer."""
        self.taken -= count
        while self._waiting:
            wanted, event = self._waiting[0]
            if not event.done() and not self._fits(wanted):
                break
            self._waiting.popleft()
            if not event.done():
                self.taken += wanted
                event.set_result(None)


@dataclasses.dataclass(eq=False)
class Holding:
    """What one body holds of the budgets, from the wire to the decoder."""

    medium: int = 0
    large: int = 0
    seen: int = 0  # bytes of it that have come


class BytesInFlight:
    """Bounds the memory that bodies take: those of some size have to wait for room, and long ones apart from the others.

    A body may hold SMALL_BYTES without asking. Beyond, it needs as many as it promises to have (Content-Length); one that
    promises nothing needs MEDIUM_BYTES, and beyond those as many as an image may have at all. Servers that promise much and
    send little so hold up nobody but other long images.
    """

    def __init__(self, most_of_one: int) -> None:
        self._most_of_one = most_of_one
        self._medium = Budget(MEDIUM_BUDGET)
        self._large = Budget(LARGE_BUDGET)

    async def count(self, attempt: Attempt, piece: int, promised: int | None) -> None:
        """A piece of so many bytes has come; returns when the body may be read on."""
        held = attempt.holding
        held.seen += piece
        if held.seen <= SMALL_BYTES or held.large:
            return
        is_long = held.seen > MEDIUM_BYTES or (promised or 0) > MEDIUM_BYTES
        if not is_long and not held.medium:
            count = min(promised or MEDIUM_BYTES, MEDIUM_BYTES)
            await self._medium.take(attempt, count)
            held.medium = count
        if is_long:
            await self._large.take(attempt, promised or self._most_of_one)
            held.large = promised or self._most_of_one

    def give_back(self, held: Holding) -> None:
        """The body is held no longer."""
        if held.medium:
            self._medium.give_back(held.medium)
        if held.large:
            self._large.give_back(held.large)
        held.medium = 0
        held.large = 0


class Web:
    """What attempts share: resolvers, kept connections, TLS, and the bound on memory. For the event loop's thread alone."""

    def __init__(self, config: Config, kept_connections: int, resolvers: int) -> None:
        self.config = config
        self.connections = KeptConnections(kept_connections)
        self.bytes = BytesInFlight(config.max_image_bytes)
        self._connect_s = max(CONNECT_TIMEOUT_S, config.fetch_timeout_s / 2)  # a second pass is for those that are slow
        self._resolver = Resolver(config.allow_private_hosts, min(MOST_THREADS, resolvers))
        self._proxy_resolver = Resolver(allow_private=True)
        if config.use_environment_proxies:
            self._tls = open_tls(config)  # what is wrong with the environment is told at the start

    async def get(self, attempt: Attempt) -> bytes:
        """The image; raises RowFailure, PassingFailure, Redirected, Refused, or TooManyFiles.

        What `attempt.holding` says of it is taken from `bytes` until the caller gives it back.
        """
        try:
            async with asyncio.timeout_at(attempt.ends) as attempt.clock:
                return await self._exchange(attempt)
        except TimeoutError:
            if attempt.is_resolving:
                raise Unreachable("dns", "the resolver does not answer") from None
            detail = "body did not end in time" if attempt.is_reading else "no answer in time"
            raise PassingFailure("timeout", detail) from None
        except BadAnswer as error:
            raise PassingFailure("connect", str(error) if attempt.is_reading else "answer cannot be read") from None
        except OSError:
            raise PassingFailure("connect", "connection failed or broke off") from None

    async def _exchange(self, attempt: Attempt) -> bytes:
        connection, head = await self._ask(attempt)
        attempt.is_reading = True
        try:
            await self._judge(connection, head, attempt)
            return await self._read_body(connection, head, attempt)
        except BaseException:
            self.bytes.give_back(attempt.holding)
            if not connection.is_drained:
                connection.close()
            raise
        finally:
            self.connections.keep(connection, asyncio.get_running_loop().time())

    async def _ask(self, attempt: Attempt) -> tuple[Connection, Head]:
        """Send the request, and read the head of the answer."""
        target = attempt.target
        kept = self.connections.take(target.place, asyncio.get_running_loop().time())
        if kept:
            with contextlib.suppress(BadAnswer, OSError):  # the server had given it up, which is no failure
                head = await self._send_and_read_head(kept, target)
                if head.code != REQUEST_TIMED_OUT:  # what some servers say when they give up an idle connection
                    return kept, head
                kept.close()
        connection = await self._connect(attempt)
        return connection, await self._send_and_read_head(connection, target)

    async def _send_and_read_head(self, connection: Connection, target: Target) -> Head:
        try:
            connection.send(target.request)
            return await connection.read_head()
        except BaseException:
            connection.close()
            raise

    async def _connect(self, attempt: Attempt) -> Connection:
        """A new connection to a checked address of the host, through the proxy if there is one."""
        target = attempt.target
        place = target.place
        attempt.is_resolving = True
        try:
            addresses = await self._resolver.find(place.host, attempt.wait_unclocked)
        except NameFailure as failure:
            raise Unreachable("dns", str(failure)) from None
        except NotPublic:
            raise RowFailure("forbidden", "address is not public") from None
        except NoName:
            raise RowFailure("missing", "not a URL") from None
        attempt.is_resolving = False
        try:
            if target.proxy:
                return await self._connect_by_proxy(attempt, addresses)
            return await open_connection(place, addresses, place.port, self._tls if place.is_tls else None, self._connect_s)
        except ssl.SSLError:
            raise RowFailure("connect", "TLS certificate or handshake refused") from None
        except TimeoutError:
            raise Unreachable("timeout", "no answer in time") from None
        except OSError:
            raise Unreachable("connect", "connection failed or broke off") from None

    async def _connect_by_proxy(self, attempt: Attempt, goals: list[Address]) -> Connection:
        """A tunnel through the proxy to the first checked address that it reaches: a name it would resolve for itself."""
        proxy = attempt.target.proxy
        assert proxy
        try:
            addresses = await self._proxy_resolver.find(proxy.host, attempt.wait_unclocked)
        except (NameFailure, NoName):
            raise PassingFailure("connect", "the environment's proxy has no address") from None
        code = 0
        for _, goal in goals[:MOST_TUNNELS]:
            connection = await open_connection(attempt.target.place, addresses, proxy.port, None, self._connect_s)
            try:
                code = await self._ask_for_tunnel(connection, attempt.target, goal)
                if 200 <= code < 300:
                    return connection
            except BaseException:
                connection.close()
                raise
            connection.close()
            if code < 500:  # it would refuse any address
                break
        raise PassingFailure("connect", f"the environment's proxy refuses to connect ({code})")

    async def _ask_for_tunnel(self, connection: Connection, target: Target, goal: str) -> int:
        """Ask the proxy for a tunnel to the address `goal`; the code that it answers."""
        proxy = target.proxy
        assert proxy
        goal = f"[{goal}]:{target.place.port}" if ":" in goal else f"{goal}:{target.place.port}"
        secret = f"Proxy-Authorization: {proxy.authorization}\r\n" if proxy.authorization else ""
        connection.send(f"CONNECT {goal} HTTP/1.1\r\nHost: {goal}\r\n{secret}\r\n".encode())
        head = await connection.read_head()
        if 200 <= head.code < 300 and target.place.is_tls:
            await connection.start_tls(self._tls)
        return head.code

    @functools.cached_property
    def _tls(self) -> ssl.SSLContext:
        return open_tls(self.config)

    async def _judge(self, connection: Connection, head: Head, attempt: Attempt) -> None:
        """Raise for a redirect, an error, an opted-out image or an encoded body."""
        code = head.code
        location = head.headers.get("location", "")
        attempt.opted_out = bool(re.search(r"\bno(image)?ai\b", head.headers.get("x-robots-tag", "").lower()))
        if attempt.opted_out and self.config.respect_opt_out and code < 400:  # a redirect speaks for its URL as well
            raise RowFailure("opted_out", "X-Robots-Tag")
        if code in REDIRECT_CODES and location:
            if head.length() == 0:  # any other body says nothing, and may never end
                await connection.drain(head)
            raise Redirected(follow_redirect(attempt.target.url, location))
        if not 200 <= code < 300:
            await connection.drain(head)
        if code in REFUSING_CODES:
            raise Refused(code, read_retry_after(head.headers.get("retry-after", "")))
        if code >= 500:
            raise PassingFailure("http_5xx", str(code))
        if code in (REQUEST_TIMED_OUT, TOO_EARLY):
            raise PassingFailure("http_4xx", str(code))
        if not 200 <= code < 300:
            raise RowFailure("http_4xx", str(code))
        codings = re.split(r"[\s,]+", head.headers.get("content-encoding", "").lower())
        transfer = head.headers.get("transfer-encoding", "").lower().replace("chunked", "").strip(" ,")
        if transfer not in ("", "identity") or not CODINGS.isdisjoint(codings):
            raise RowFailure("unsupported", "encoded body")

    async def _read_body(self, connection: Connection, head: Head, attempt: Attempt) -> bytes:
        """At most `max_image_bytes`."""
        most_bytes = self.config.max_image_bytes
        too_large = RowFailure("too_large", f"more than {most_bytes} bytes")
        if (head.length() or 0) > most_bytes:
            raise too_large
        pieces = []
        async for piece in connection.read_body(head):
            if attempt.holding.seen + len(piece) > most_bytes:
                raise too_large
            await self.bytes.count(attempt, len(piece), head.length())
            pieces.append(piece)
        return b"".join(pieces)


def open_tls(config: Config) -> ssl.SSLContext:
    """How servers' certificates are verified: by the bundle that `requests` uses, or the one that the environment names."""
    bundle = ""
    if config.use_environment_proxies:
        bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or ""
    path = bundle or DEFAULT_CA_BUNDLE_PATH
    is_folder = pathlib.Path(path).is_dir()
    try:
        context = ssl.create_default_context(cafile=None if is_folder else path, capath=path if is_folder else None)
    except OSError as error:  # ssl's are
        if not bundle:
            raise
        reason = "is no bundle of certificates" if isinstance(error, ssl.SSLError) else f"cannot be read: {error.strerror}"
        raise Trouble(EXIT_CONFIG, f"REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE: {bundle} {reason}") from None
    context.set_alpn_protocols(["http/1.1"])
    return context


def read_retry_after(header: str) -> float:
    """The seconds that a Retry-After header asks for, given as a number or as a date; 0 if it cannot be read."""
    if re.fullmatch(r"[0-9]{1,9}", header):
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
