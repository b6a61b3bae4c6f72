"""Fetch pictures from URLs that strangers wrote: public addresses only, capped bytes, a deadline for the whole fetch.

Used by `image_path: url`.
"""
import itertools
import re
import socket
import time
from typing import Any

import requests
import requests_hardened
import urllib3
from requests_hardened.ip_filter import InvalidIPAddress

REDIRECTS = 5
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5.0, 10.0  # of one attempt; the whole fetch has `fetch_timeout_s`
FIRST_PAUSE_S = 0.25  # before the second attempt; doubled from try to try
RETRY_AFTER_CAP_S = 10.0  # urllib3's own cap is six hours


class PassingFailure(Exception):
    """A failure that may be gone at the next try, after `retry_after_s` seconds at the earliest."""

    def __init__(self, status: str, detail: str, retry_after_s: float = 0.0) -> None:
        super().__init__(status, detail)
        self.status, self.detail, self.retry_after_s = status, detail, retry_after_s


class Fetcher:
    """URL -> bytes through one pooled session, safe to call from many threads.

    `config` gives fetch_timeout_s, fetch_retries, max_image_bytes, user_agent and allow_private_hosts; `failure` is the
    exception class raised as failure(status, detail) for a row that gets no picture.
    """

    def __init__(self, config: Any, threads: int, failure: type[Exception]) -> None:
        self.config, self.failure = config, failure
        self.session: requests.Session
        if config.allow_private_hosts:
            self.session = requests.Session()
            for scheme in ("http://", "https://"):
                self.session.mount(scheme, requests.adapters.HTTPAdapter(pool_connections=256, pool_maxsize=threads))
        else:  # resolves once, refuses addresses that are not public, connects to the one it checked; redirects included
            self.session = requests_hardened.HTTPSession(requests_hardened.Config(
                ip_filter_enable=True, ip_filter_allow_loopback_ips=False, never_redirect=False,
                default_timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S)))
            for adapter in self.session.adapters.values():
                adapter.init_poolmanager(256, threads)  # type: ignore[attr-defined]  # its constructor takes no pool size
        self.session.trust_env = False  # neither proxies nor .netrc of the environment
        self.session.max_redirects = REDIRECTS
        # identity: a compressed body could be a bomb, and pictures are compressed already
        self.session.headers.update({"User-Agent": config.user_agent, "Accept": "image/*,*/*;q=0.1",
                                     "Accept-Encoding": "identity"})

    def __call__(self, url: str) -> bytes:
        """The body that `url` serves; tries again after passing troubles; raises `failure`."""
        deadline = time.monotonic() + self.config.fetch_timeout_s
        for attempt in itertools.count():
            try:
                return self._fetch_once(url, deadline)
            except PassingFailure as passing:
                pause = max(passing.retry_after_s, FIRST_PAUSE_S * 2 ** attempt)
                if attempt >= self.config.fetch_retries or time.monotonic() + pause >= deadline:
                    raise self.failure(passing.status, passing.detail) from None
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _fetch_once(self, url: str, deadline: float) -> bytes:
        left = max(0.05, deadline - time.monotonic())
        timeouts = min(CONNECT_TIMEOUT_S, left), min(READ_TIMEOUT_S, left)
        try:
            with self.session.get(url, stream=True, timeout=timeouts) as response:
                self._check_response(response)
                return self._read_body(response, deadline)
        except InvalidIPAddress:
            raise self.failure("forbidden", "address is not public") from None
        except requests.exceptions.InvalidSchema:
            raise self.failure("forbidden", "only http and https") from None
        except (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema, UnicodeError):
            raise self.failure("missing", "not a URL") from None
        except requests.exceptions.TooManyRedirects:
            raise self.failure("connect", f"more than {REDIRECTS} redirects") from None
        except (requests.exceptions.Timeout, TimeoutError):
            raise PassingFailure("timeout", "no answer in time") from None
        except requests.exceptions.SSLError:
            raise self.failure("connect", "TLS certificate or handshake refused") from None
        except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            if caused_by(error, socket.gaierror) or caused_by(error, urllib3.exceptions.NameResolutionError):
                raise PassingFailure("dns", "host name does not resolve") from None
            raise PassingFailure("connect", "connection failed or broke off") from None

    def _check_response(self, response: requests.Response) -> None:
        """Raise for an error status, an opted-out picture or an encoded body."""
        code, after = response.status_code, response.headers.get("Retry-After", "")
        if code == 429 or code >= 500:
            wait, status = float(after) if re.fullmatch(r"\d{1,6}", after) else 0.0, "http_4xx" if code == 429 else "http_5xx"
            if wait > RETRY_AFTER_CAP_S:
                raise self.failure(status, f"{code}, asks to come back later")
            raise PassingFailure(status, str(code), wait)
        if not 200 <= code < 300:
            raise self.failure("http_4xx", str(code))
        if re.search(r"\bno(image)?ai\b", response.headers.get("X-Robots-Tag", "").lower()):
            raise self.failure("opted_out", "X-Robots-Tag")
        if response.headers.get("Content-Encoding", "identity").lower() not in ("identity", ""):
            raise self.failure("unsupported", "encoded body")

    def _read_body(self, response: requests.Response, deadline: float) -> bytes:
        """At most `max_image_bytes`, by `read1`: a timeout counts from byte to byte and a slow drip never trips it."""
        body, limit = bytearray(), self.config.max_image_bytes
        while True:
            if time.monotonic() > deadline:
                raise self.failure("timeout", "body did not end in time")
            try:
                chunk = response.raw.read1(65536, decode_content=False)
            except urllib3.exceptions.ReadTimeoutError:
                raise PassingFailure("timeout", "body stalled") from None
            except urllib3.exceptions.HTTPError:
                raise PassingFailure("connect", "body broke off") from None
            if not chunk:
                break
            body += chunk
            if len(body) > limit:
                raise self.failure("too_large", f"more than {limit} bytes")
        promised = response.headers.get("Content-Length", "")
        if promised.isdigit() and len(body) < int(promised):
            raise PassingFailure("connect", "body shorter than promised")
        return bytes(body)


def caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Whether a `kind` is anywhere in the chain of causes, which urllib3 hides in `reason` or among the arguments."""
    for _ in range(10):
        if error is None or isinstance(error, kind):
            break
        hidden = getattr(error, "reason", None) or next((a for a in error.args if isinstance(a, BaseException)), None)
        error = hidden if isinstance(hidden, BaseException) else error.__cause__ or error.__context__
    return isinstance(error, kind)
