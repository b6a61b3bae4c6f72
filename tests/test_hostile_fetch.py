"""Servers that mean harm: nothing they do reaches what it should not, or holds a fetch beyond its deadline."""
import contextlib
import http.server
import io
import resource
import socket
import socketserver
import threading
import time

import pytest
from PIL import Image

import image_text_sim_clip as script
from addons.images import fetch, names

DEADLINE_S = 1.5


def jpeg():
    """A small image as bytes."""
    out = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(out, "JPEG")
    return out.getvalue()


class Hostile(http.server.BaseHTTPRequestHandler):
    """One path, one misdeed."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, code=200, body=b"", **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def drip(self, data, every_s=0.1, forever=True):
        with contextlib.suppress(OSError):
            for _ in range(400):
                self.wfile.write(data)
                self.wfile.flush()
                time.sleep(every_s)

    def do_GET(self):
        self.server.seen.append(self.path)
        self.close_connection = True
        with contextlib.suppress(OSError):
            getattr(self, "on_" + self.path.strip("/").split("/")[0].replace("-", "_"))()

    def on_good(self):
        self.close_connection = False
        self.answer(body=jpeg(), Content_Type="image/jpeg")

    def on_drip_body(self):
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.drip(b"x")

    def on_drip_headers(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        self.drip(b"X-A: b\r\n")

    def on_drip_status(self):
        self.drip(b"H")

    def on_endless(self):
        self.send_response(200)
        self.end_headers()
        for _ in range(100_000):
            self.wfile.write(b"x" * 65536)

    def on_endless_redirect(self):
        self.send_response(302)
        self.send_header("Location", "/good")
        self.end_headers()
        for _ in range(100_000):
            self.wfile.write(b"x" * 65536)

    def on_lying_length(self):
        self.answer(body=b"short", Content_Length="5000")

    def on_huge_length(self):
        self.answer(body=b"short", Content_Length="500000000000")

    def on_gzip_bomb(self):
        import gzip
        self.answer(body=gzip.compress(b"\0" * 50_000_000), Content_Encoding="gzip")

    def on_reset(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.connection.close()

    def on_loop(self):
        self.answer(302, Location="/loop/" + str(time.time()))

    def on_busy_1(self):
        self.answer(429, Retry_After="1")

    def on_busy_day(self):
        self.answer(503, Retry_After="86400")

    def on_busy_date(self):
        self.answer(503, Retry_After="Fri, 31 Dec 2100 23:59:59 GMT")

    def on_noai(self):
        self.answer(body=jpeg(), X_Robots_Tag="noindex, noai")

    def on_noimageai(self):
        self.answer(body=jpeg(), X_Robots_Tag="noimageai")

    def on_cookie(self):
        self.answer(body=(self.headers.get("Cookie") or "none").encode(), Set_Cookie="track=1; Path=/")

    def on_agent(self):
        self.answer(body=self.headers["User-Agent"].encode())

    def on_slow(self):
        with self.server.lock:
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        time.sleep(0.15)
        with self.server.lock:
            self.server.now -= 1
        self.answer(body=jpeg())

    def on_to_file(self):
        self.answer(302, Location="file:///etc/passwd")


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads, allow_reuse_address, request_queue_size = True, True, 64


@pytest.fixture(scope="module")
def server():
    """A hostile server on loopback; `.seen` lists the paths it was asked for."""
    hostile = Server(("127.0.0.1", 0), Hostile)
    hostile.seen, hostile.lock, hostile.now, hostile.most = [], threading.Lock(), 0, 0
    hostile.url = f"http://127.0.0.1:{hostile.server_port}"
    threading.Thread(target=hostile.serve_forever, daemon=True).start()
    yield hostile
    hostile.shutdown()


def fetcher(**settings):
    """A Fetcher with a short deadline that may reach loopback unless told otherwise."""
    values = {"image_path": "url", "fetch_timeout_s": DEADLINE_S, "fetch_retries": 3, "allow_private_hosts": True,
              "max_image_bytes": 1_000_000, "host_patience_s": DEADLINE_S} | settings
    return fetch.open_source(script.Config(**values), 8)


def outcome(get, url):
    """(status or 'ok', seconds) of one fetch."""
    started = time.monotonic()
    try:
        get(url)
        return "ok", time.monotonic() - started
    except script.RowFailure as failure:
        assert failure.status in script.STATUSES
        return failure.status, time.monotonic() - started


@pytest.mark.parametrize(("path", "status"), [
    ("good", "ok"), ("drip-body", "timeout"), ("drip-headers", "timeout"), ("drip-status", "timeout"),
    ("endless", "too_large"), ("endless-redirect", "ok"), ("lying-length", "connect"), ("huge-length", "too_large"),
    ("gzip-bomb", "unsupported"), ("reset", "connect"), ("loop", "connect"), ("busy-1", "http_4xx"),
    ("busy-day", "http_5xx"), ("busy-date", "http_5xx"), ("noai", "opted_out"), ("noimageai", "opted_out"),
    ("to-file", "forbidden"),
])
def test_every_misdeed_ends_in_time_with_its_status(server, path, status):
    """Each ends within the deadline and half a second, with the right status and in little memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    got, seconds = outcome(fetcher(), f"{server.url}/{path}")
    assert got == status
    assert seconds <= DEADLINE_S + 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


FORBIDDEN = [
    "http://127.0.0.1:{port}/good", "http://127.1:{port}/good", "http://2130706433:{port}/good", "http://0x7f000001:{port}/good",
    "http://0177.0.0.1:{port}/good", "http://localhost:{port}/good", "http://0.0.0.0:{port}/good", "http://[::1]:{port}/good",
    "http://[::ffff:127.0.0.1]:{port}/good", "http://[::ffff:7f00:1]:{port}/good", "http://[64:ff9b::7f00:1]:{port}/good",
    "http://[2002:7f00:1::]:{port}/good", "http://user:password@127.0.0.1:{port}/good", "http://127.0.0.1.:{port}/good",
    "http://10.0.0.1:{port}/", "http://172.16.0.1/", "http://192.168.1.1/", "http://169.254.169.254/latest/meta-data/",
    "http://100.64.0.1/", "http://[fe80::1]/", "http://[fc00::1]/", "http://[fec0::1]/", "http://224.0.0.1/", "http://[ff02::1]/",
    "http://240.0.0.1/", "http://255.255.255.255/", "http://192.0.2.1/", "http://198.18.0.1/", "http://[2001:db8::1]/",
    "https://127.0.0.1:{port}/good", "file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1:{port}/good",
    "data:image/png;base64,AA",
]


def test_forbidden_addresses_get_no_request(server):
    """Private, loopback, link-local, metadata, CGNAT, NAT64, 6to4, multicast ... in every spelling: the victim sees nothing."""
    del server.seen[:]
    get = fetcher(allow_private_hosts=False, fetch_retries=0)
    for url in FORBIDDEN:
        assert outcome(get, url.format(port=server.server_port))[0] in ("forbidden", "dns", "missing"), url
    assert server.seen == []
    assert len(FORBIDDEN) >= 24


def test_redirect_to_a_forbidden_address_is_refused(server, monkeypatch):
    """The second hop is checked as the first is: a public host that points inside gets nothing."""
    del server.seen[:]
    get = fetcher(allow_private_hosts=False, fetch_retries=0)
    look_up = names.Resolver.find

    async def first_hop_is_public(self, host, wait):
        if host == "public.example":  # stands for a public host: there is none within reach of a test
            return [(socket.AF_INET, "127.0.0.1")]
        return await look_up(self, host, wait)
    monkeypatch.setattr(names.Resolver, "find", first_hop_is_public)
    for number, target in enumerate(FORBIDDEN):
        location = target.format(port=server.server_port)
        monkeypatch.setattr(Hostile, "on_hop", lambda self, to=location: self.answer(302, Location=to), raising=False)
        assert outcome(get, f"http://public.example:{server.server_port}/hop")[0] in ("forbidden", "dns", "missing"), target
        assert server.seen == ["/hop"] * (number + 1), target


def test_dns_answer_that_changes_is_not_asked_again(server, monkeypatch):
    """Rebinding: the checked address is the one connected to; the name is resolved once a hop."""
    answers = iter(["93.184.216.34", "127.0.0.1", "127.0.0.1"])
    asked, tried = [], []

    def getaddrinfo(host, port, *arguments, **options):
        if host == "rebind.example":
            asked.append(host)
            host = next(answers)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))]

    def connect(self, address):
        tried.append(address[0])
        raise ConnectionRefusedError
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket.socket, "connect", connect)
    get = fetcher(allow_private_hosts=False, fetch_retries=0)
    assert outcome(get, f"http://rebind.example:{server.server_port}/good")[0] == "connect"
    assert (asked, tried) == (["rebind.example"], ["93.184.216.34"])


def test_no_cookies_and_an_agent_of_its_own(server):
    """Servers cannot follow a run by cookies, and are told who asks."""
    get = fetcher(user_agent="image_text_sim_clip/test")
    assert get(f"{server.url}/cookie") == b"none"
    assert get(f"{server.url}/cookie/again") == b"none"
    assert get(f"{server.url}/agent") == b"image_text_sim_clip/test"


def test_opting_out_is_respected_unless_told_otherwise(server):
    """`respect_opt_out: false` scores what is served with noai as well."""
    assert outcome(fetcher(respect_opt_out=False), f"{server.url}/noai")[0] == "ok"


def test_max_per_host_is_kept(server):
    """No more than `max_per_host` fetches are at one host at a time."""
    server.most = 0
    get = fetcher(max_per_host=2, fetch_timeout_s=10)
    threads = [threading.Thread(target=get, args=(f"{server.url}/slow/{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.most == 2


def test_cache_serves_the_second_run(server, tmp_path):
    """With `cache_path`, a URL is downloaded once; failures are not kept."""
    del server.seen[:]
    for _ in range(2):
        assert outcome(fetcher(cache_path=str(tmp_path)), f"{server.url}/good/cached") [0] == "ok"
        assert outcome(fetcher(cache_path=str(tmp_path), fetch_retries=0), f"{server.url}/lying-length/cached")[0] == "connect"
    assert server.seen == ["/good/cached", "/lying-length/cached", "/lying-length/cached"]
    assert not list(tmp_path.glob("**/*.tmp"))


def test_environment_proxies_are_off_unless_asked(server, monkeypatch):
    """A proxy in the environment is used only with `use_environment_proxies: true`."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert outcome(fetcher(), f"{server.url}/good")[0] == "ok"
    assert outcome(fetcher(use_environment_proxies=True, fetch_retries=0), f"{server.url}/good")[0] == "connect"
