"""Fetch images from URLs that strangers wrote: public addresses only, capped bytes, a deadline for the whole fetch.

Used by `image_path: url`. Every hop of a redirect is resolved once, checked, and connected to at the checked address
(requests-hardened pins it, so a second DNS answer cannot change it). Bodies are read by `read1`, because a timeout
counts from byte to byte and a slow drip never trips it; a watchdog does the same for headers and handshakes.
"""
import contextlib
import email.utils
import hashlib
import http.cookiejar
import ipaddress
import itertools
import logging
import math
import os
import pathlib
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any, NamedTuple

import requests
import requests_hardened
import urllib3
from requests_hardened.ip_filter import InvalidIPAddress
from requests_hardened.ip_filter_adapter import IPFilterAdapter

from image_text_sim_clip import Config, RowFailure, reserve_for_image

logging.getLogger("requests_hardened").setLevel(logging.CRITICAL)  # it warns of each refused address; the row says it

SOURCES = ("url",)

REDIRECTS = 5
CONNECT_TIMEOUT_S = 5.0  # of one attempt; the whole fetch has `fetch_timeout_s`
READ_TIMEOUT_S = 10.0  # from byte to byte, of one attempt
FIRST_PAUSE_S = 0.25  # before the second attempt; doubled from try to try
RETRY_AFTER_CAP_S = 10.0  # urllib3's own cap is six hours
CHUNK_BYTES = 65536


def open_source(config: Config, threads: int) -> "Fetcher":
    """The source `url` (see addons/images/__init__.py)."""
    return Fetcher(config, max(1, threads))


class PassingFailure(Exception):
    """A failure that may be gone at the next try, after `retry_after_s` seconds at the earliest."""

    def __init__(self, status: str, detail: str, retry_after_s: float = 0.0) -> None:
        super().__init__(status, detail)
        self.status = status
        self.detail = detail
        self.retry_after_s = retry_after_s


class Fetcher:
    """URL -> bytes through one session, which keeps connections for `threads` threads. Safe to call from many threads."""

    def __init__(self, config: Config, threads: int) -> None:
        self.config = config
        self.session = _open_session(config, threads)
        self._hosts: dict[str, threading.Semaphore] = {}
        self._lock = threading.Lock()
        self._cache = pathlib.Path(config.cache_path) if config.cache_path else None

    def __call__(self, url: str) -> bytes:
        """The body that `url` serves, or served an earlier run; tries again after passing troubles; raises RowFailure."""
        stored = self._cache_file(url)
        if stored and stored.is_file() and stored.stat().st_size <= self.config.max_image_bytes:
            return stored.read_bytes()
        deadline = time.monotonic() + self.config.fetch_timeout_s
        body = self._fetch(url, deadline)
        if stored:
            _store(stored, body)
        return body

    def _cache_file(self, url: str) -> pathlib.Path | None:
        if not self._cache:
            return None
        name = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
        return self._cache / name[:2] / name

    def _fetch(self, url: str, deadline: float) -> bytes:
        """Try until there is a body, a failure that will stay, or too little time; raises RowFailure."""
        for attempt in itertools.count():
            try:
                return self._fetch_once(url, deadline)
            except PassingFailure as passing:
                pause_s = max(passing.retry_after_s, FIRST_PAUSE_S * 2 ** attempt)
                if attempt >= self.config.fetch_retries or time.monotonic() + pause_s >= deadline:
                    raise RowFailure(passing.status, passing.detail) from None
                time.sleep(pause_s)
        raise AssertionError("counting has no end")

    def _fetch_once(self, url: str, deadline: float) -> bytes:
        """One attempt, redirects included; raises RowFailure or PassingFailure."""
        try:
            return self._follow(url, deadline)
        except InvalidIPAddress:
            raise RowFailure("forbidden", "address is not public") from None
        except requests.exceptions.InvalidSchema:
            raise RowFailure("forbidden", "only http and https") from None
        except (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema, UnicodeError,
                urllib3.exceptions.LocationValueError):
            raise RowFailure("missing", "not a URL") from None
        except requests.exceptions.SSLError:
            raise RowFailure("connect", "TLS certificate or handshake refused") from None
        except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise _as_passing(error, deadline) from None
        except ValueError:  # what http.client raises for a chunk of negative size
            raise PassingFailure("connect", "answer cannot be read") from None

    def _follow(self, url: str, deadline: float) -> bytes:
        """The body at the end of at most REDIRECTS redirects."""
        for _ in range(REDIRECTS + 1):
            if not _can_be_split(url):
                raise RowFailure("missing", "not a URL")
            with self._place_at_host(url, deadline):
                _WATCHDOG.set_deadline(deadline)
                with self._request(url, deadline) as response:
                    target = requests.Session.get_redirect_target(self.session, response)
                    if target is None:
                        self._check_response(response)
                        with _WATCHDOG.watch():
                            return self._read_body(response, deadline)
                    url = requests.compat.urljoin(url, target) if _can_be_split(target) else target
        raise RowFailure("connect", f"more than {REDIRECTS} redirects")

    def _request(self, url: str, deadline: float) -> requests.Response:
        """The answer to one GET, its head read and its body not."""
        left_s = max(0.05, deadline - time.monotonic())
        timeouts = (min(CONNECT_TIMEOUT_S, left_s), min(READ_TIMEOUT_S, left_s))
        return self.session.get(url, stream=True, allow_redirects=False, timeout=timeouts)

    @contextlib.contextmanager
    def _place_at_host(self, url: str, deadline: float) -> Iterator[None]:
        """At most `max_per_host` fetches at one host at a time."""
        host = re.sub(r"^\w+://(?:[^/@]*@)?", "", url.lower()).split("/", 1)[0]
        with self._lock:
            places = self._hosts.setdefault(host, threading.Semaphore(self.config.max_per_host))
        if not places.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise PassingFailure("timeout", "host too busy with this run's other fetches")
        try:
            yield
        finally:
            places.release()

    def _check_response(self, response: requests.Response) -> None:
        """Raise for an error status, an opted-out image or an encoded body."""
        code = response.status_code
        if code == 429 or code >= 500:
            status = "http_4xx" if code == 429 else "http_5xx"
            wait_s = _retry_after_s(response.headers.get("Retry-After", ""))
            if wait_s > RETRY_AFTER_CAP_S:
                raise RowFailure(status, f"{code}, asks to come back later")
            raise PassingFailure(status, str(code), wait_s)
        if not 200 <= code < 300:
            raise RowFailure("http_4xx", str(code))
        if self.config.respect_opt_out and re.search(r"\bno(image)?ai\b", response.headers.get("X-Robots-Tag", "").lower()):
            raise RowFailure("opted_out", "X-Robots-Tag")
        if response.headers.get("Content-Encoding", "identity").lower() not in ("identity", ""):
            raise RowFailure("unsupported", "encoded body")

    def _read_body(self, response: requests.Response, deadline: float) -> bytes:
        """At most `max_image_bytes`, no byte after the deadline."""
        most_bytes = self.config.max_image_bytes
        header = response.headers.get("Content-Length", "")
        promised = int(header) if re.fullmatch(r"[0-9]{1,18}", header) else 0
        if promised > most_bytes:
            raise RowFailure("too_large", f"more than {most_bytes} bytes")
        reserved = promised or CHUNK_BYTES
        deadline += _reserve(reserved + reserved // 4)  # a part more, because at its end a body is copied once
        body = bytearray()
        while True:
            if time.monotonic() > deadline:
                raise PassingFailure("timeout", "body did not end in time")
            chunk = response.raw.read1(CHUNK_BYTES, decode_content=False)
            if not chunk:
                break
            body += chunk
            if len(body) > reserved:  # a body of unknown length: in doubling steps
                deadline += _reserve(reserved)
                reserved *= 2
            if len(body) > most_bytes:
                raise RowFailure("too_large", f"more than {most_bytes} bytes")
        if time.monotonic() > deadline:  # cut by the watchdog, which looks like an end
            raise PassingFailure("timeout", "body did not end in time")
        if len(body) < promised:
            raise PassingFailure("connect", "body shorter than promised")
        return bytes(body)


def _reserve(count: int) -> float:
    """Wait until so many bytes fit into the budget of the run's images; returns the seconds that it took.

    They are no fault of the server's: the fetch gets them on top.
    """
    since = time.monotonic()
    with _WATCHDOG.paused():
        reserve_for_image(count)
    return time.monotonic() - since


def _can_be_split(url: str) -> bool:
    """Whether urllib can take the URL apart; it raises ValueError for "http://[bad/"."""
    try:
        urllib.parse.urlsplit(url)
        return True
    except ValueError:
        return False


def _as_passing(error: Exception, deadline: float) -> PassingFailure:
    """A network error of requests, urllib3 or the system as the status it means."""
    if time.monotonic() >= deadline:  # the watchdog cuts the connection, which looks like a reset
        return PassingFailure("timeout", "no answer in time")
    if isinstance(error, (requests.exceptions.Timeout, TimeoutError, urllib3.exceptions.TimeoutError)):
        return PassingFailure("timeout", "no answer in time")
    if caused_by(error, (socket.gaierror, urllib3.exceptions.NameResolutionError)):
        return PassingFailure("dns", "host name does not resolve")
    return PassingFailure("connect", "connection failed or broke off")


def _retry_after_s(header: str) -> float:
    """The seconds that a Retry-After header asks for, given as a number or as a date; 0 if it cannot be read."""
    if re.fullmatch(r"\d{1,9}", header):
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _store(path: pathlib.Path, body: bytes) -> None:
    """Keep `body` for the next run; a cache that cannot be written is no reason to lose the image."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(body)
        unfinished.replace(path)


def caused_by(error: BaseException | None, kinds: tuple[type[BaseException], ...]) -> bool:
    """Whether one of `kinds` is in the chain of causes, which urllib3 hides in `reason` or among the arguments."""
    for _ in range(10):
        if error is None or isinstance(error, kinds):
            break
        hidden = getattr(error, "reason", None)
        if not isinstance(hidden, BaseException):
            hidden = next((argument for argument in error.args if isinstance(argument, BaseException)), None)
        error = hidden or error.__cause__ or error.__context__
    return isinstance(error, kinds)


# ── The watchdog: a deadline for what a timeout does not bound ────────────────────────────────────────────────────────

class _Watch(NamedTuple):
    """A connection that is to be cut at `deadline` (of time.monotonic)."""

    deadline: float
    connection: urllib3.connection.HTTPConnection | None
    sock: socket.socket | None  # the response of a connection that will close keeps it, and the connection forgets it

    def cut(self) -> None:
        """Shut the socket down, so that whoever waits for it sees its end."""
        current = getattr(self.connection, "sock", None) or self.sock
        if current is None:  # not connected yet
            return
        with contextlib.suppress(OSError, TypeError):  # closed meanwhile; no real socket, as under some proxies
            socket.socket.shutdown(current, socket.SHUT_RDWR)


class _Fetching(threading.local):
    """What the calling thread fetches: until when, and through which connection."""

    deadline: float = math.inf
    connection: urllib3.connection.HTTPConnection | None = None
    sock: socket.socket | None = None


class _Watchdog:
    """Cuts the connection of a thread whose fetch is overdue while it connects, shakes hands, or waits for head or body."""

    def __init__(self) -> None:
        self._here = _Fetching()
        self._lock = threading.Lock()
        self._watched: dict[int, _Watch] = {}  # by the number of the fetching thread
        self._thread: threading.Thread | None = None

    def set_deadline(self, deadline: float) -> None:
        """Begin a request of the calling thread, which has until `deadline` (of time.monotonic)."""
        self._here.deadline = deadline
        self._here.connection = None
        self._here.sock = None

    @contextlib.contextmanager
    def watch(self, connection: urllib3.connection.HTTPConnection | None = None) -> Iterator[None]:
        """Cut `connection`, or the one last watched by this thread, if what happens inside lasts beyond the deadline."""
        here = self._here
        here.connection = connection or here.connection
        here.sock = getattr(here.connection, "sock", None) or here.sock
        with self._lock:
            self._watched[threading.get_ident()] = _Watch(here.deadline, here.connection, here.sock)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True, name="fetch watchdog")
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._watched.pop(threading.get_ident(), None)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Cut nothing of the calling thread's while in this context, and later by as much as it takes."""
        since = time.monotonic()
        with self._lock:
            watch = self._watched.pop(threading.get_ident(), None)
        yield
        self._here.deadline += time.monotonic() - since
        if watch:
            with self._lock:
                self._watched[threading.get_ident()] = watch._replace(deadline=self._here.deadline)

    def _run(self) -> None:
        while True:
            time.sleep(0.1)
            now = time.monotonic()
            with self._lock:
                for watch in self._watched.values():
                    if now > watch.deadline:
                        watch.cut()


_WATCHDOG = _Watchdog()


class _WatchedHTTPConnection(urllib3.connection.HTTPConnection):
    """A connection that the watchdog cuts when it is overdue at connecting or waiting for headers."""

    def connect(self) -> None:
        with _WATCHDOG.watch(self):
            super().connect()

    def getresponse(self) -> urllib3.response.HTTPResponse:  # type: ignore[override]  # as in urllib3 itself
        with _WATCHDOG.watch(self):
            return super().getresponse()


class _WatchedHTTPSConnection(_WatchedHTTPConnection, urllib3.connection.HTTPSConnection):
    """The same for TLS, whose handshake is part of connecting."""


class _HTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _WatchedHTTPConnection


class _HTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _WatchedHTTPSConnection


# ── The session: addresses checked, connections watched ───────────────────────────────────────────────────────────────

class _PublicOnly(IPFilterAdapter):
    """requests-hardened's adapter, which pins the address it has checked; and nothing that is not globally routed."""

    def build_connection_pool_key_attributes(
            self, request: requests.PreparedRequest, verify: bool | str,
            cert: str | tuple[str, str] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        host, pool = super().build_connection_pool_key_attributes(request, verify, cert)
        address = ipaddress.ip_address(host["host"].strip("[]"))
        if not address.is_global or address.is_multicast or address.is_reserved or getattr(address, "is_site_local", False):
            raise InvalidIPAddress(address)
        return host, pool


class _Session(requests_hardened.HTTPSession):
    def get_redirect_target(self, resp: requests.Response) -> None:
        """No redirect for requests to see: it would read the redirect's whole body, which may never end."""


def _open_session(config: Config, threads: int) -> requests.Session:
    """A session without cookies, without the environment's proxies and passwords unless asked, under the watchdog."""
    session = _Session(requests_hardened.Config(
        ip_filter_enable=False, ip_filter_allow_loopback_ips=False, never_redirect=True,
        default_timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S)))
    for scheme in ("http://", "https://"):
        adapter = requests.adapters.HTTPAdapter() if config.allow_private_hosts else _PublicOnly(scheme == "https://")
        adapter.init_poolmanager(256, threads)
        adapter.poolmanager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
        session.mount(scheme, adapter)
    session.trust_env = config.use_environment_proxies
    session.cookies.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
    # identity: a compressed body could be a bomb, and images are compressed already
    session.headers.update({"User-Agent": config.user_agent, "Accept": "image/*,*/*;q=0.1", "Accept-Encoding": "identity"})
    return session
