"""Fetching: what a server does becomes an image or a status, in time, in bounds, and never at a private address."""
import collections
import contextlib
import http.server
import io
import logging
import socket
import threading
import time
import urllib.parse

import pytest
from PIL import Image

import image_text_sim_clip as script

pytest.importorskip("requests")
from addons.images import fetch, hosts


def png(width=4, height=4):
    data = io.BytesIO()
    Image.new("RGB", (width, height), (255, 0, 0)).save(data, "PNG")
    return data.getvalue()


IMAGE = png()


class Handler(http.server.BaseHTTPRequestHandler):
    """Does what the first segment of the path says; see the method of that name."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.server.seen.append(self.path)
        self.server.headers_seen.append(self.headers)
        kind, _, rest = self.path.lstrip("/").partition("/")
        with contextlib.suppress(OSError):
            getattr(self, kind)(rest)

    def answer(self, code=200, body=IMAGE, **headers):
        self.send_response(code)
        headers.setdefault("Content_Length", str(len(body)))
        for name, value in headers.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def raw(self, *pieces, pause_s=0.0):
        """Send bytes as they are, then close."""
        self.close_connection = True
        for piece in pieces:
            self.wfile.write(piece)
            if self.server.closing.wait(pause_s):
                return

    def ok(self, rest):
        self.answer()

    def code(self, rest):
        self.answer(int(rest), b"no")

    def flaky(self, rest):
        """Fails with the code given, but for the last of so many requests."""
        code, failures = map(int, rest.split("/")[:2])
        self.answer(200 if self.server.seen.count(self.path) > failures else code)

    def later(self, rest):
        code, _, after = rest.partition("/")
        self.answer(int(code) if self.server.seen.count(self.path) == 1 else 200, Retry_After=after)

    def to(self, rest):
        self.answer(302, b"", Location=urllib.parse.unquote(rest))

    def hops(self, rest):
        left = int(rest)
        self.answer(302, b"", Location=f"/hops/{left - 1}") if left else self.answer()

    def loop(self, rest):
        self.answer(301, b"", Location="/loop")

    def slow_hops(self, rest):
        self.server.closing.wait(0.4)
        self.answer(302, b"", Location=f"/slow_hops/{int(rest) - 1}") if int(rest) else self.answer()

    def short(self, rest):
        self.close_connection = True
        self.answer(Content_Length=str(len(IMAGE) + 10))

    def odd_length(self, rest):
        self.close_connection = True
        self.answer(Content_Length=urllib.parse.unquote(rest))

    def no_length(self, rest):
        self.close_connection = True
        self.answer(Content_Length=None)

    def chunked(self, rest):
        self.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
                 *(b"%x\r\n%s\r\n" % (len(p), p) for p in (IMAGE[:30], IMAGE[30:])), b"" if rest else b"0\r\n\r\n")

    def bad_chunk(self, rest):
        self.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + IMAGE)

    def reset(self, rest):
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        if rest:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nabc")
            self.wfile.flush()
        self.connection.close()

    def hang_up(self, rest):
        self.close_connection = True

    def garbage(self, rest):
        self.raw(b"\x16\x03\x01 this is no HTTP\r\n\r\n")

    def drip(self, rest):
        """A byte every tenth of a second, far beyond any deadline used here."""
        self.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", *([b"x"] * 30), pause_s=0.1)

    def drip_head(self, rest):
        self.raw(b"HTTP/1.1 200 OK\r\n", *([b"X-A: b\r\n"] * 30), pause_s=0.1)

    def drip_redirect(self, rest):
        self.raw(b"HTTP/1.1 302 Found\r\nLocation: /ok\r\nContent-Length: 1000\r\n\r\n", *([b"x"] * 30), pause_s=0.1)

    def fat_redirect(self, rest):
        """A redirect whose body is far larger than any image may be."""
        self.close_connection = True
        self.wfile.write(b"HTTP/1.1 302 Found\r\nLocation: /ok\r\nContent-Length: 30000000\r\n\r\n")
        for _ in range(300):
            self.wfile.write(bytes(100_000))
            self.server.sent += 100_000

    def stall(self, rest):
        """Answers the head after `rest` seconds, and then nothing."""
        self.server.closing.wait(float(rest))
        self.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nabc", pause_s=20)

    def silent(self, rest):
        self.server.closing.wait(20)

    def endless(self, rest):
        self.raw(b"HTTP/1.1 200 OK\r\n\r\n", *([bytes(10_000)] * 10_000))

    def sized(self, rest):
        self.answer(body=bytes(int(rest)))

    def header(self, rest):
        name, _, value = rest.partition("/")
        self.answer(**{name: value.replace("_", " ")})

    def html(self, rest):
        self.answer(body=b"<!DOCTYPE html><html>not here</html>", Content_Type="image/jpeg")

    def empty(self, rest):
        self.answer(body=b"")


class Server(http.server.ThreadingHTTPServer):
    """Forgets its threads, and says nothing of the clients that hang up."""

    daemon_threads = True

    def handle_error(self, request, client_address):
        pass


@pytest.fixture
def server():
    """A server on a loopback port of its own; `seen` holds the paths asked for."""
    with Server(("127.0.0.1", 0), Handler) as httpd:
        httpd.seen, httpd.headers_seen, httpd.closing, httpd.sent = [], [], threading.Event(), 0
        httpd.url = f"http://127.0.0.1:{httpd.server_port}"
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield httpd
        httpd.closing.set()
        httpd.shutdown()
        thread.join()


@pytest.fixture
def quick(monkeypatch):
    """Shorter pauses between tries, and for hosts that refuse."""
    monkeypatch.setattr(fetch, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(hosts, "PAUSES_S", (0.01, 60.0))


def fetcher(**keys):
    config = script.Config(**{"image_path": "url", "pretrained_model": "none", "allow_private_hosts": True, "fetch_retries": 0,
                              "fetch_timeout_s": 5.0, **keys})
    return fetch.open_source(config, 2)


def test_a_folder_called_url_is_no_source_of_its_own(tmp_path, monkeypatch):
    """`image_path: url` fetches where a folder has that name as well, which is `./url`; another name says how to fetch."""
    (tmp_path / "url").mkdir()
    monkeypatch.chdir(tmp_path)
    assert isinstance(script.open_source(script.Config(image_path="url"), 0), fetch.Fetcher)
    assert not isinstance(script.open_source(script.Config(image_path="./url"), 0), fetch.Fetcher)
    with pytest.raises(script.Trouble, match=r"'URL': no such folder .*set image_path: url") as caught:
        script.open_source(script.Config(image_path="URL"), 0)
    assert caught.value.exit_code == script.EXIT_INPUT


def outcome(url, **keys):
    """(status, detail) of a fetch that fails, with how long it took."""
    started = time.monotonic()
    with pytest.raises(script.RowFailure) as caught:
        fetcher(**keys)(url)
    status, detail = caught.value.status, caught.value.detail
    assert status in script.STATUSES
    assert "127.0.0.1" not in detail and "0x" not in detail  # neither addresses of hosts nor of objects
    return status, detail, time.monotonic() - started


# ── Answers ───────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("path", ["ok", "no_length", "chunked", "hops/1", "hops/5", "to//ok",
                                  "header/Content-Encoding/identity", "header/X-Robots-Tag/noindex",
                                  "header/Content-Encoding/utf-8", "header/Content-Encoding/aws-chunked",
                                  "header/Content-Encoding/none", "header/Content-Encoding/png",
                                  "header/Content-Encoding/binary", "header/Content-Encoding/base64",
                                  "header/Content-Encoding/x-unknown", "header/Content-Type/nonsense",
                                  "header/Content-Disposition/attachment", "header/Content-Length-Hint/1"])
def test_image_arrives(server, path):
    """An image arrives whole: with a length, without one, in chunks, or after up to five redirects."""
    assert fetcher()(f"{server.url}/{path}") == IMAGE


@pytest.mark.parametrize(("code", "status"), [(400, "http_4xx"), (401, "http_4xx"), (403, "http_4xx"), (404, "http_4xx"),
                                              (410, "http_4xx"), (418, "http_4xx"), (500, "http_5xx"), (503, "http_5xx")])
def test_error_codes(server, quick, code, status):
    """An error code becomes a status with the code as its detail; what the client is to blame for is not tried again."""
    assert outcome(f"{server.url}/code/{code}", fetch_retries=2)[:2] == (status, str(code))
    assert len(server.seen) == (1 if code < 500 else 3)


@pytest.mark.parametrize(("path", "tries"), [("flaky/500/1", 2), ("flaky/503/2", 3), ("flaky/502/2", 3)])
def test_passing_troubles_are_tried_again(server, quick, path, tries):
    """5xx are tried again, fetch_retries times at the most."""
    assert fetcher(fetch_retries=2)(f"{server.url}/{path}") == IMAGE
    assert len(server.seen) == tries
    server.seen.clear()
    assert outcome(f"{server.url}/{path}", fetch_retries=tries - 2)[0] == "http_5xx"
    assert len(server.seen) == tries - 1


def test_pauses_grow(server, monkeypatch):
    """The pause before a try doubles from try to try."""
    monkeypatch.setattr(fetch, "FIRST_PAUSE_S", 0.1)
    started = time.monotonic()
    assert outcome(f"{server.url}/code/500", fetch_retries=3)[0] == "http_5xx"
    assert len(server.seen) == 4 and 0.7 <= time.monotonic() - started < 2


def test_refusals_spend_no_retries(server, quick):
    """429, again and again, is waited for without a retry of the row, until there is no patience left with its host."""
    assert fetcher(fetch_retries=0)(f"{server.url}/flaky/429/4") == IMAGE
    assert len(server.seen) == 5
    status, detail, took_s = outcome(f"{server.url}/code/429", host_patience_s=0.5, fetch_timeout_s=0.3)
    assert (status, detail) == ("http_4xx", "429, asks to come back later")
    assert 0.1 < took_s < 3


@pytest.mark.parametrize("code", [429, 503])
def test_retry_after_is_obeyed(server, quick, code):
    """Retry-After: 1 makes the next try wait a second, which counts neither as a retry nor towards the deadline."""
    started = time.monotonic()
    assert fetcher(fetch_retries=0, fetch_timeout_s=0.8)(f"{server.url}/later/{code}/1") == IMAGE
    assert 1 <= time.monotonic() - started < 2
    assert len(server.seen) == 2


@pytest.mark.parametrize(("after", "tries"), [("86400", 1), ("11", 1), ("99999999999999999999", 2), ("-5", 2), ("soon", 2),
                                              ("Wed, 21 Oct 2015 07:28:00 GMT", 2), ("0", 2)])
def test_retry_after_is_capped(server, quick, after, tries):
    """Who asks for more than host_patience_s is given up at once; one that says nothing sensible is paused as any other."""
    started = time.monotonic()
    if tries == 1:
        assert outcome(f"{server.url}/later/429/{after}", host_patience_s=10.0)[0] == "http_4xx"
    else:
        assert fetcher(host_patience_s=10.0)(f"{server.url}/later/429/{after}") == IMAGE
    assert len(server.seen) == tries
    assert time.monotonic() - started < 3


def test_host_that_is_given_up_is_asked_no_more(server, quick):
    """All rows of a host that asks to come back tomorrow fail at once, with its answer as their detail."""
    get = fetcher(host_patience_s=10.0)
    for _ in range(20):
        with pytest.raises(script.RowFailure, match="429, asks to come back later"):
            get(f"{server.url}/later/429/86400")
    assert len(server.seen) == 1


@pytest.mark.parametrize("path", ["loop", "hops/6", "hops/100"])
def test_redirect_loop(server, path):
    """More than five redirects are too many."""
    assert outcome(f"{server.url}/{path}", fetch_retries=2)[:2] == ("connect", "more than 5 redirects")
    assert len(server.seen) == 6


@pytest.mark.parametrize(("target", "status"), [("file:///etc/passwd", "forbidden"), ("ftp://127.0.0.1/x", "forbidden"),
                                                ("data:image/png;base64,AAAA", "forbidden"), ("/code/404", "http_4xx")])
def test_redirect_to_elsewhere(server, target, status):
    """A redirect's target is judged as a URL in the table would be."""
    assert outcome(f"{server.url}/to/{target}")[0] == status


@pytest.mark.parametrize("target", ["//[::1", "http://[bad/x.png"])
def test_redirect_to_nonsense(server, target):
    """A redirect to what cannot be parsed is one row's failure."""
    assert outcome(f"{server.url}/to/{target}")[0] == "missing"


@pytest.mark.parametrize("path", ["short", "chunked/cut", "bad_chunk", "reset", "reset/half", "hang_up", "garbage"])
def test_broken_connection(server, quick, path):
    """A body shorter than promised, a broken chunk, a reset or no HTTP at all: connect, after trying again."""
    assert outcome(f"{server.url}/{path}", fetch_retries=1)[0] == "connect"
    assert server.seen == [f"/{path}"] * 2


@pytest.mark.parametrize("length", ["", "-1", "0x10", "1e9", "many", "\xb2", "9" * 5000])
def test_odd_content_length(server, length):
    """A Content-Length that is no number, or none that a body could have, costs its row at most."""
    try:
        assert fetcher()(f"{server.url}/odd_length/{length}") == IMAGE
    except script.RowFailure as failure:
        assert failure.status == "connect"


def test_refused_connection(quick):
    """A port where nobody listens is connect."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/x.png"
    assert outcome(url, fetch_retries=1)[0] == "connect"


def test_tls_that_is_none(server, quick):
    """https to a server without TLS is connect, and not tried again."""
    status, detail, _ = outcome(server.url.replace("http:", "https:") + "/ok", fetch_retries=2)
    assert status == "connect" and "TLS" in detail


def test_name_that_does_not_resolve(monkeypatch, quick):
    """A host name that does not resolve is dns, with and without private addresses."""
    asked = []

    def fail(host, *arguments, **options):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    for allowed in (True, False):
        assert outcome("http://nowhere.invalid/x.png", allow_private_hosts=allowed, fetch_retries=1)[0] == "dns"
    assert asked == ["nowhere.invalid"] * 4


@pytest.mark.parametrize("value", ["noai", "noimageai", "noindex,_noai", "NoAI", "otherbot:_noai"])
def test_opted_out(server, value):
    """X-Robots-Tag: noai is respected, in any case and company."""
    assert outcome(f"{server.url}/header/X-Robots-Tag/{value}")[0] == "opted_out"


@pytest.mark.parametrize("value", ["gzip", "br", "deflate", "X-GZip", "identity,_zstd"])
def test_encoded_body(server, value):
    """A body with a Content-Encoding, which was not asked for and could be a bomb, is unsupported."""
    assert outcome(f"{server.url}/header/Content-Encoding/{value}")[:2] == ("unsupported", "encoded body")


def test_what_is_asked_for(server):
    """The request names this program, asks for images without compression, and carries no cookies or credentials."""
    fetcher(user_agent="tester/1.0")(f"{server.url}/ok")
    headers = server.headers_seen[0]
    assert headers["User-Agent"] == "tester/1.0"
    assert headers["Accept-Encoding"] == "identity" and headers["Accept"].startswith("image/")
    assert not {"Cookie", "Authorization", "Referer"} & set(headers)


def test_environment_is_ignored(server, monkeypatch, tmp_path):
    """Proxies and .netrc of the environment are not used."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetcher()(f"{server.url}/ok") == IMAGE
    assert "Authorization" not in server.headers_seen[0]


# ── Size and time ─────────────────────────────────────────────────────────────────────────────────────────────────────

def test_oversize(server):
    """max_image_bytes arrive, one more is too_large; a body without end is cut off there."""
    assert len(fetcher(max_image_bytes=1000)(f"{server.url}/sized/1000")) == 1000
    assert outcome(f"{server.url}/sized/1001", max_image_bytes=1000)[:2] == ("too_large", "more than 1000 bytes")
    assert outcome(f"{server.url}/endless", max_image_bytes=100_000)[0] == "too_large"


@pytest.mark.parametrize("path", ["drip", "silent", "stall/0"])
def test_slow_servers_end_in_time(server, path):
    """A server that drips, stalls or says nothing costs fetch_timeout_s, whatever the retries."""
    status, _, took_s = outcome(f"{server.url}/{path}", fetch_timeout_s=0.8, fetch_retries=5)
    assert status == "timeout"
    assert 0.7 < took_s < 0.8 + 0.5


@pytest.mark.slow
@pytest.mark.parametrize("path", ["drip_head", "slow_hops/5", "stall/0.7"])
def test_slower_servers_end_in_time(server, path):
    """Nor does one that drips its head, redirects slowly, or stalls late."""
    status, _, took_s = outcome(f"{server.url}/{path}", fetch_timeout_s=0.8, fetch_retries=5)
    assert status == "timeout"
    assert took_s < 0.8 + 0.5


def test_dripping_redirect_is_not_waited_for(server):
    """The body of a redirect says nothing that a fetch needs."""
    started = time.monotonic()
    assert fetcher(fetch_timeout_s=0.8)(f"{server.url}/drip_redirect")
    assert time.monotonic() - started < 0.8


def test_fat_redirect(server):
    """The body of a redirect is not read beyond max_image_bytes."""
    with contextlib.suppress(script.RowFailure):
        fetcher(max_image_bytes=1_000_000)(f"{server.url}/fat_redirect")
    assert server.sent < 20_000_000  # the rest of 30 MB stayed in the buffers on the way, or was never sent


def test_one_fetch_after_the_other(server):
    """One Fetcher serves many threads and reuses its connections."""
    fetch_one, found = fetcher(), []

    def work():
        found.extend(fetch_one(f"{server.url}/ok") for _ in range(10))
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [IMAGE] * 80


# ── Nonsense, and what is private ─────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("url", "status"), [
    ("file:///etc/passwd", "forbidden"), ("data:image/png;base64,iVBORw0KGgo=", "forbidden"),
    ("ftp://127.0.0.1/x.png", "forbidden"),
    ("javascript:alert(1)", "forbidden"), ("gopher://127.0.0.1:1/x", "forbidden"), ("httpx://127.0.0.1/x.png", "forbidden"),
    ("nonsense", "missing"), ("x.png", "missing"), ("//127.0.0.1/x.png", "missing"),
    ("http://", "missing"), ("http:///x.png", "missing"),
    ("http://[::1/x.png", "missing"), ("http://*/x.png", "missing"), ("\0", "missing"),
    ("http://127.0.0.1:99999999/x.png", "missing"), ("http://127.0.0.1:port/x.png", "missing"),
])
@pytest.mark.parametrize("allowed", [True, False])
def test_odd_urls(url, status, allowed):
    """What is no http URL is forbidden or missing, and nothing is asked of anybody."""
    assert outcome(url, allow_private_hosts=allowed, fetch_retries=2)[0] == status


@pytest.mark.parametrize("host", ["a..b", "a" * 300])
@pytest.mark.parametrize("allowed", [True, False])
def test_host_that_can_be_none(host, allowed, quick):
    """A host with an empty or an endless label is no URL."""
    assert outcome(f"http://{host}/x.png", allow_private_hosts=allowed)[0] == "missing"


PRIVATE = ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0.0.0.0", "[::1]", "[::]",
           "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "127.255.255.254", "10.0.0.1", "172.16.0.1", "192.168.1.1",
           "169.254.169.254", "100.64.0.1", "[fe80::1]", "[fd00:ec2::254]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]",
           "198.18.0.1", "224.0.0.1", "255.255.255.255", "240.0.0.1", "user:password@127.0.0.1", "LOCALHOST"]


@pytest.mark.parametrize("host", PRIVATE)
def test_private_hosts_are_refused(server, host):
    """Loopback, private, link-local and metadata addresses, however spelt, are forbidden; the server is never asked."""
    assert outcome(f"http://{host}:{server.server_port}/ok", allow_private_hosts=False, fetch_retries=2)[0] == "forbidden"
    assert server.seen == []


def test_name_that_resolves_to_a_private_address(server, monkeypatch):
    """It is the address that counts, not the name: an innocent name for a private address is forbidden."""
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: real("127.0.0.1", *a, **k))
    assert outcome(f"http://example.org:{server.server_port}/ok", allow_private_hosts=False)[0] == "forbidden"
    assert server.seen == []


def test_name_is_resolved_once(server, monkeypatch):
    """A name that becomes private after the check (rebinding) is not asked again: the checked address is the one used."""
    asked, reached = [], []

    def resolve(host, port, *arguments, **options):
        asked.append(host)
        address = "192.0.2.1" if host == "192.0.2.1" else "93.184.215.14" if len(asked) == 1 else "127.0.0.1"
        if host == "93.184.215.14":
            address = host
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    def connect(self, address):
        reached.append(address[0])
        raise ConnectionRefusedError(111, "Connection refused")
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket.socket, "connect", connect)
    assert outcome(f"http://example.org:{server.server_port}/ok", allow_private_hosts=False)[0] == "connect"
    assert reached == ["93.184.215.14"]
    assert server.seen == []


def test_private_hosts_are_refused_quietly(server, capfd):
    """A forbidden address is told in its row; a million of them must not fill stderr."""
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:
        outcome(f"{server.url}/ok", allow_private_hosts=False)
    finally:
        root.handlers = handlers
    assert capfd.readouterr().err == ""


# ── A whole run ───────────────────────────────────────────────────────────────────────────────────────────────────────

def test_run_over_urls(server, quick, write_config, write_table, run_main, read_table, tmp_path):
    """A run with `image_path: url` ends each row as a score or as a reason, asks once for equal URLs, and exits 0."""
    paths = ["ok", "code/404", "html", "empty", "header/X-Robots-Tag/noai", "ok", "sized/30", "code/500", "ok/other"]
    rows = [(f"{server.url}/{p}", f"caption {i}") for i, p in enumerate(paths)]
    rows += [("", "none"), ("file:///etc/passwd", "file"), (f"{server.url}/ok", "  ")]
    write_table([("url", "caption"), *rows])
    outcome = run_main("--config", write_config(image_path="url", allow_private_hosts=True, fetch_retries=1, loader_threads=4))
    assert outcome.code == 0, outcome.stderr
    scores = read_table(tmp_path / "out/scores.csv")
    assert [(r["url"], r["caption"]) for r in scores] == rows
    assert [r["status"] for r in scores] == [
        "ok", "http_4xx", "not_image", "not_image", "opted_out", "ok", "not_image", "http_5xx", "ok", "missing", "forbidden",
        "empty_caption"]
    assert collections.Counter(server.seen)["/ok"] == 1 and collections.Counter(server.seen)["/code/500"] == 2


def test_private_run_asks_nobody(server, write_config, write_table, run_main, read_table, tmp_path):
    """By default a table of private URLs reaches nobody, and every row says forbidden."""
    write_table([("url", "caption"), *((f"http://{h}:{server.server_port}/ok", "x") for h in PRIVATE)])
    assert run_main("--config", write_config(image_path="url", fetch_retries=2)).code == 0
    assert {r["status"] for r in read_table(tmp_path / "out/scores.csv")} == {"forbidden"}
    assert server.seen == []
