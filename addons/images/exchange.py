"""One attempt to fetch an image: connect to a checked address, ask, judge the answer, read it within time and memory."""
import asyncio
import contextlib
import dataclasses
import email.utils
import functools
import os
import re
import ssl
import time
from collections.abc import Iterator

from requests.utils import DEFAULT_CA_BUNDLE_PATH

from addons.images.http_client import (
    BadAnswer,
    Connection,
    Head,
    KeptConnections,
    open_connection,
)
from addons.images.names import NameFailure, NoName, NotPublic, Resolver
from addons.images.targets import Target, follow_redirect
from image_text_sim_clip import Config, RowFailure

REDIRECT_CODES = (301, 302, 303, 307, 308)
REFUSING_CODES = (429, 503)


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
    waited_s: float = 0.0  # for room in memory, which is not the server's fault
    held_bytes: int = 0  # of the body, counted in BytesInFlight
    is_reading: bool = False  # the head has come
    opted_out: bool = False  # the server opts out, and the config does not mind
    clock: asyncio.Timeout | None = None

    async def wait_for_room(self, event: "asyncio.Future[None]") -> None:
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


class BytesInFlight:
    """Counts the bytes of bodies from the wire to the decoder; beyond `most` only the oldest attempt may read on.

    So what is held exceeds the bound by one body at most, and there is always one that can be read to its end.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0
        self._readers: dict[Attempt, None] = {}  # the oldest first
        self._waiting: list[asyncio.Future[None]] = []

    def is_full(self) -> bool:
        """Whether nothing new should be begun."""
        return self.held >= self.most

    @contextlib.contextmanager
    def reading(self, attempt: Attempt) -> Iterator[None]:
        """The attempt reads its body inside; at an error what it held is given back."""
        self._readers[attempt] = None
        try:
            yield
        except BaseException:
            self.give_back(attempt.held_bytes)
            attempt.held_bytes = 0
            raise
        finally:
            del self._readers[attempt]
            self._wake()

    async def take(self, attempt: Attempt, count: int) -> None:
        """Count bytes that have come in; returns when the attempt may read on."""
        self.held += count
        attempt.held_bytes += count
        while self.held > self.most and next(iter(self._readers)) is not attempt:
            event: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(event)
            await attempt.wait_for_room(event)

    def give_back(self, count: int) -> None:
        """So many bytes are held no longer."""
        self.held -= count
        self._wake()

    def _wake(self) -> None:
        for event in self._waiting:
            if not event.done():
                event.set_result(None)
        self._waiting.clear()


class Web:
    """What attempts share: resolvers, kept connections, TLS, and the bound on memory. For the event loop's thread alone."""

    def __init__(self, config: Config, kept_connections: int, most_bytes: int) -> None:
        self.config = config
        self.connections = KeptConnections(kept_connections)
        self.bytes = BytesInFlight(most_bytes)
        self._resolver = Resolver(config.allow_private_hosts)
        self._proxy_resolver = Resolver(allow_private=True)

    async def get(self, attempt: Attempt) -> bytes:
        """The image; raises RowFailure, PassingFailure, Redirected, Refused, or TooManyFiles.

        `attempt.held_bytes` of it are counted in `bytes` until the caller gives them back.
        """
        try:
            async with asyncio.timeout_at(attempt.ends) as attempt.clock:
                return await self._exchange(attempt)
        except TimeoutError:
            detail = "body did not end in time" if attempt.is_reading else "no answer in time"
            raise PassingFailure("timeout", detail) from None
        except BadAnswer as error:
            raise PassingFailure("connect", str(error) if attempt.is_reading else "answer cannot be read") from None
        except OSError:
            raise PassingFailure("connect", "connection failed or broke off") from None

    async def _exchange(self, attempt: Attempt) -> bytes:
        connection, head = await self._ask(attempt.target)
        attempt.is_reading = True
        try:
            await self._judge(connection, head, attempt)
            with self.bytes.reading(attempt):
                body = await self._read_body(connection, head, attempt)
        except BaseException:
            if not connection.is_drained:
                connection.close()
            raise
        finally:
            self._keep(connection)
        return body

    def _keep(self, connection: Connection) -> None:
        self.connections.keep(connection, asyncio.get_running_loop().time())

    async def _ask(self, target: Target) -> tuple[Connection, Head]:
        """Send the request, and read the head of the answer."""
        kept = self.connections.take(target.place, asyncio.get_running_loop().time())
        if kept:
            with contextlib.suppress(BadAnswer, OSError):  # the server had given it up, which is no failure
                return kept, await self._send_and_read_head(kept, target)
        connection = await self._connect(target)
        return connection, await self._send_and_read_head(connection, target)

    async def _send_and_read_head(self, connection: Connection, target: Target) -> Head:
        try:
            connection.send(target.request)
            return await connection.read_head()
        except BaseException:
            connection.close()
            raise

    async def _connect(self, target: Target) -> Connection:
        """A new connection to a checked address of the host, through the proxy if there is one."""
        place = target.place
        try:
            addresses = await self._resolver.find(place.host)
        except NameFailure as failure:
            raise Unreachable("dns", str(failure)) from None
        except NotPublic:
            raise RowFailure("forbidden", "address is not public") from None
        except NoName:
            raise RowFailure("missing", "not a URL") from None
        try:
            if target.proxy:
                return await self._connect_by_proxy(target, addresses[0][1])
            return await open_connection(place, addresses, place.port, self._tls if place.is_tls else None)
        except ssl.SSLError:
            raise RowFailure("connect", "TLS certificate or handshake refused") from None
        except TimeoutError:
            raise Unreachable("timeout", "no answer in time") from None
        except OSError:
            raise Unreachable("connect", "connection failed or broke off") from None

    async def _connect_by_proxy(self, target: Target, address: str) -> Connection:
        """A tunnel through the proxy, which is asked for the checked address: a name it would resolve for itself."""
        proxy = target.proxy
        assert proxy
        place = target.place
        try:
            addresses = await self._proxy_resolver.find(proxy.host)
        except (NameFailure, NoName):
            raise PassingFailure("connect", "the environment's proxy has no address") from None
        connection = await open_connection(place, addresses, proxy.port, None)
        try:
            goal = f"[{address}]:{place.port}" if ":" in address else f"{address}:{place.port}"
            secret = f"Proxy-Authorization: {proxy.authorization}\r\n" if proxy.authorization else ""
            connection.send(f"CONNECT {goal} HTTP/1.1\r\nHost: {goal}\r\n{secret}\r\n".encode())
            head = await connection.read_head()
            if not 200 <= head.code < 300:
                raise PassingFailure("connect", f"the environment's proxy refuses to connect ({head.code})")
            if place.is_tls:
                await connection.start_tls(self._tls)
        except BaseException:
            connection.close()
            raise
        return connection

    @functools.cached_property
    def _tls(self) -> ssl.SSLContext:
        bundle = DEFAULT_CA_BUNDLE_PATH
        if self.config.use_environment_proxies:
            bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or bundle
        context = ssl.create_default_context(cafile=bundle)
        context.set_alpn_protocols(["http/1.1"])
        return context

    async def _judge(self, connection: Connection, head: Head, attempt: Attempt) -> None:
        """Raise for a redirect, an error, an opted-out image or an encoded body."""
        code = head.code
        location = head.headers.get("location", "")
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
        if not 200 <= code < 300:
            raise RowFailure("http_4xx", str(code))
        attempt.opted_out = bool(re.search(r"\bno(image)?ai\b", head.headers.get("x-robots-tag", "").lower()))
        if attempt.opted_out and self.config.respect_opt_out:
            raise RowFailure("opted_out", "X-Robots-Tag")
        encodings = (head.headers.get("content-encoding", ""), head.headers.get("transfer-encoding", "").replace("chunked", ""))
        if any(encoding.strip(" ,").lower() not in ("", "identity") for encoding in encodings):
            raise RowFailure("unsupported", "encoded body")

    async def _read_body(self, connection: Connection, head: Head, attempt: Attempt) -> bytes:
        """At most `max_image_bytes`."""
        most_bytes = self.config.max_image_bytes
        too_large = RowFailure("too_large", f"more than {most_bytes} bytes")
        if (head.length() or 0) > most_bytes:
            raise too_large
        pieces = []
        async for piece in connection.read_body(head):
            if attempt.held_bytes + len(piece) > most_bytes:
                raise too_large
            await self.bytes.take(attempt, len(piece))
            pieces.append(piece)
        return b"".join(pieces)


def read_retry_after(header: str) -> float:
    """The seconds that a Retry-After header asks for, given as a number or as a date; 0 if it cannot be read."""
    if re.fullmatch(r"[0-9]{1,9}", header):
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
