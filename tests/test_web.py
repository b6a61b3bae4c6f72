"""The open web: late, dead and busy hosts hold up nobody else, and whatever strangers do stays within bounds."""
import asyncio
import asyncio.sslproto
import collections
import contextlib
import csv
import errno
import io
import itertools
import json
import math
import os
import queue
import resource
import signal
import socket
import ssl
import threading
import time
import urllib.parse

import pytest
from PIL import Image

import image_text_sim_clip as script
from addons.images import cache, exchange, fetch, flow, hosts, http_client, names, targets, web_report


def png(colour="red"):
    data = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(data, "PNG")
    return data.getvalue()


IMAGE = png()


def answer_with(body, *headers, code="200 OK"):
    head = "".join(f"{header}\r\n" for header in headers)
    return f"HTTP/1.1 {code}\r\nContent-Length: {len(body)}\r\n{head}\r\n".encode() + body


class RawServer:
    """Calls answer(connection, path, server) for each request of each connection, in a thread for each of these."""

    def __init__(self, answer, host="127.0.0.1"):
        self.answer = answer
        self.seen = []
        self.lines = []  # of the heads, whole
        self.closing = threading.Event()
        self.socket = socket.create_server((host, 0), backlog=256)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://{host}:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with connection, contextlib.suppress(OSError), connection.makefile("rb") as file:
            while line := file.readline():
                head = [line.decode().strip()]
                while (more := file.readline().decode().strip()):
                    head.append(more)
                self.lines += head
                self.seen.append(head[0].split(" ")[1])
                if self.answer(connection, self.seen[-1], self) == "close":
                    return

    def close(self):
        self.closing.set()
        self.socket.close()


@pytest.fixture
def serve():
    """Start raw servers, which end with the test."""
    started = []

    def start(answer, host="127.0.0.1"):
        started.append(RawServer(answer, host))
        return started[-1]
    yield start
    for server in started:
        server.close()


def send_image(connection, path, server):
    connection.sendall(answer_with(IMAGE))


def config_of(**keys):
    return script.Config(**{"image_path": "url", "pretrained_model": "none", "allow_private_hosts": True, "fetch_retries": 0,
                            "fetch_timeout_s": 3.0, **keys})


def fetcher(**keys):
    return fetch.open_source(config_of(**keys), 0)


def outcome(get, url):
    """("ok", "") or the status and detail of one fetch."""
    try:
        get(url)
        return "ok", ""
    except script.RowFailure as failure:
        return failure.status, failure.detail


def fetch_all(get, urls, timeout_s=30):
    """[(seconds since the start, status)] of all URLs at once, in their order."""
    done = queue.SimpleQueue()
    started = time.monotonic()

    def note(number, result):
        done.put((number, time.monotonic() - started, result.failure.status if result.failure else "ok"))
        get.release(result)
    get.submit((url, lambda result, number=number: note(number, result)) for number, url in enumerate(urls))
    found = {}
    for _ in urls:
        number, seconds, status = done.get(timeout=timeout_s)
        found[number] = (seconds, status)
    return [found[number] for number in range(len(urls))]


# ── Names and addresses ───────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("address", [
    "127.0.0.1", "10.1.2.3", "169.254.169.254", "168.63.129.16", "100.100.100.200", "192.0.0.192", "0.0.0.0", "224.0.0.1",
    "255.255.255.255", "::1", "fe80::1", "fd00:ec2::254", "fec0::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:168.63.129.16",
    "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b::a83f:8110", "64:ff9b:1::808:808", "2002:7f00:1::", "2001::1",
    "::7f00:1"])
def test_addresses_that_are_not_public(address):
    """Private, loopback, link-local, multicast, embedded and metadata addresses are not public."""
    assert not names.is_public(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "168.63.129.17", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:8.8.8.8",
                                     "64:ff9b::808:808"])
def test_addresses_that_are_public(address):
    """Neighbours of those, and any others, are; so is what NAT64 makes of a public IPv4 address."""
    assert names.is_public(address)


@pytest.mark.parametrize(("one", "other"), [
    ("http://EXAMPLE.org/a", "http://example.org./b"), ("http://example.org:80/", "http://user:word@example.org/"),
    ("http://127.1/", "http://0x7f000001/x"), ("http://[::1]/", "http://[0:0:0:0:0:0:0:1]/"),
    ("http://example.org/", "https://example.org:443/"), ("http://b\u00fccher.example/", "http://xn--bcher-kva.example/")])
def test_one_host_has_one_spelling(one, other):
    """A host is paced under one name, however it is spelled."""
    config = config_of()
    assert targets.read_url(one, config).host_name == targets.read_url(other, config).host_name


def test_another_port_is_another_host():
    """What listens at another port is another server."""
    config = config_of()
    assert targets.read_url("http://h.example:81/", config).host_name != targets.read_url("http://h.example/", config).host_name


def test_request_holds_no_more_than_one_line_of_the_url():
    """What a stranger writes into a URL cannot add a header, and neither can a user agent of two lines."""
    for url in ("http://h.example/a\r\nX: y", "http://h.example/a b\tc?d\ne", "http://h.example/\u2028\u00e9"):
        request = targets.read_url(url, config_of(user_agent="a\r\nB: c")).request.decode()
        headers = [line.split(":")[0] for line in request.split("\r\n")[1:-2]]
        assert headers == ["Host", "User-Agent", "Accept", "Accept-Encoding"]
        assert request.split("\r\n")[0].count(" ") == 2


@pytest.mark.parametrize(("written", "asked_for"), [
    ("/a%20b-100%.jpg", "/a%20b-100%25.jpg"), ("/50%25%20off%.jpg?q=%zz%20", "/50%25%20off%25.jpg?q=%25zz%20"),
    ("/%7Eme/%41%2d.png?sig=%2f%c3%a9", "/%7Eme/%41%2d.png?sig=%2f%c3%a9"), ("//a//b.png?x=//y", "//a//b.png?x=//y"),
    ("/a\\2020\\b.png?c=\\d", "/a/2020/b.png?c=%5Cd"), ("\\a.png", "/a.png"), ("/a\n\tb.png", "/ab.png"),
    ("/a/../b/./c.png", "/b/c.png"), ("/a/%2E%2e/b/%2e", "/b/"), ("/../../b/..", "/"), ("?x=1#y", "/?x=1"), ("", "/"),
    ("/a?", "/a?"), ("/a b\u00e9\u65e5\ud800.png", "/a%20b%C3%A9%E6%97%A5%ED%A0%80.png"),
    ("/a;b=c,d'(e)!*@:&+$~.png", "/a;b=c,d'(e)!*@:&+$~.png"),
    ("/[a]|{b}^\"<c>`.png", "/%5Ba%5D%7C%7Bb%7D%5E%22%3Cc%3E%60.png")])
def test_path_is_sent_as_it_is_written(written, asked_for):
    """What is escaped stays as it is, or a server that signs its URLs would refuse them; the rest is as browsers do it."""
    target = targets.read_url(f"http://h.example{written}", config_of())
    assert target.request.split(b"\r\n")[0].decode() == f"GET {asked_for} HTTP/1.1"
    assert target.url == f"http://h.example{asked_for}"
    assert target.place.host == "h.example"


@pytest.mark.parametrize(("location", "asked_for"), [
    ("/synspr\xf8ve.png", "/synspr%F8ve.png"), ("/\u00e9.png".encode().decode("latin-1"), "/%C3%A9.png"),
    ("b.png", "/a%20100%25/b.png"), ("?x=%e9\xe9", "/a%20100%25/c?x=%e9%E9"), ("\\b\\c.png", "/b/c.png")])
def test_redirect_is_read_as_browsers_do(serve, location, asked_for):
    """Bytes of any encoding in a Location are sent back as they came, and it counts from the URL that was asked for."""
    server = serve(lambda connection, path, server: connection.sendall(
        answer_with(IMAGE) if path == asked_for
        else f"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: {location}\r\n\r\n".encode("latin-1")))
    assert fetcher()(f"{server.url}/a%20100%/c") == IMAGE


def test_resolver_that_does_not_answer(monkeypatch):
    """A name whose look-up hangs is `dns`, in time, and other names are found meanwhile."""
    free = threading.Event()
    monkeypatch.setattr(names, "RESOLVE_TIMEOUT_S", 0.3)

    def hang(host, *arguments, **options):
        free.wait(20)
        raise socket.gaierror(-3, "Temporary failure in name resolution")
    monkeypatch.setattr(socket, "getaddrinfo", hang)
    get = fetcher(fetch_timeout_s=10.0)
    started = time.monotonic()
    assert outcome(get, "http://silent.example/x") == ("dns", "the resolver does not answer")
    assert time.monotonic() - started < 3
    free.set()


def test_deadline_within_a_look_up_is_dns(monkeypatch):
    """Also where the row's own deadline comes first, a name that is still being looked up is to blame."""
    free = threading.Event()

    def hang(host, *arguments, **options):
        free.wait(20)
        raise socket.gaierror(-3, "Temporary failure in name resolution")
    monkeypatch.setattr(socket, "getaddrinfo", hang)
    assert outcome(fetcher(fetch_timeout_s=0.5), "http://silent.example/x") == ("dns", "the resolver does not answer")
    free.set()


def test_names_that_hang_fail_no_others(serve, monkeypatch):
    """Names that wait for a thread, because others hang in all of them, are on nobody's clock."""
    server = serve(send_image)
    monkeypatch.setattr(names, "RESOLVE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(names, "MOST_THREADS", 4)

    def resolve(host, *arguments, **options):
        if host.startswith("slow"):
            time.sleep(1.0)
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    hosts_in_order = [f"slow{n}.example" for n in range(8)] + [f"good{n}.example" for n in range(8)]
    found = fetch_all(fetcher(fetch_timeout_s=0.9), [f"http://{host}:{server.port}/" for host in hosts_in_order])
    assert [status for _, status in found] == ["dns"] * 8 + ["ok"] * 8


def test_names_are_looked_up_once(serve, monkeypatch):
    """The answer of the resolver is kept, also among many rows that wait for the same one."""
    asked = []
    server = serve(lambda connection, path, server: connection.sendall(answer_with(IMAGE, "Connection: close")) or "close")

    def resolve(host, *arguments, **options):
        asked.append(host)
        time.sleep(0.1)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    get = fetcher()
    urls = [f"http://name.example:{server.port}/{n}" for n in range(20)]
    assert {status for _, status in fetch_all(get, urls)} == {"ok"}
    assert outcome(get, urls[0])[0] == "ok"
    assert asked == ["name.example"]


def test_fewer_threads_than_wished_for_look_all_names_up(monkeypatch):
    """Where the system allows no more threads, those that there are look up all names."""
    monkeypatch.setattr(names, "ask_system", lambda host: time.sleep(0.01) or [(socket.AF_INET, "93.184.216.34")])
    start = threading.Thread.start
    started = []

    def start_two(thread):
        started.append(thread)
        if len(started) > 2:
            raise RuntimeError("can't start new thread")
        start(thread)
    monkeypatch.setattr(threading.Thread, "start", start_two)

    async def look_up_many():
        resolver = names.Resolver(allow_private=False)
        return await asyncio.gather(*(resolver.find(f"host{number}.example") for number in range(20)))
    assert len(asyncio.run(look_up_many())) == 20 and len(started) == 3


def test_names_are_forgotten(monkeypatch):
    """A bounded number of names is kept, however many there are."""
    monkeypatch.setattr(names, "KEPT_NAMES", 50)
    monkeypatch.setattr(names, "ask_system", lambda host: [(socket.AF_INET, "93.184.216.34")])

    async def look_up_many():
        resolver = names.Resolver(allow_private=False)
        for number in range(300):
            await resolver.find(f"host{number}.example")
        return resolver
    resolver = asyncio.run(look_up_many())
    assert len(resolver._answers) == 50 and not resolver._asked


def test_next_address_is_tried(serve, monkeypatch):
    """Where the first address of a name refuses, the image comes from the second."""
    server = serve(send_image)
    places = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in ("127.0.0.99", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: places)
    assert fetcher()(f"http://two.example:{server.port}/x") == IMAGE


@pytest.fixture
def black_hole():
    """Have an address take no connection at a port, and not refuse any either: a listener whose queue is full."""
    with contextlib.ExitStack() as held:
        def dig(address, port):
            held.enter_context(socket.create_server((address, port), backlog=0))
            for _ in range(4):
                waiting = held.enter_context(socket.socket())
                waiting.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    waiting.connect((address, port))
        yield dig


def test_addresses_that_do_not_answer_hold_up_no_others(serve, monkeypatch, black_hole):
    """Where the first addresses of a name swallow all packets, as IPv6 of many machines does, the next ones are tried soon."""
    server = serve(send_image)
    monkeypatch.setattr(http_client, "NEXT_ADDRESS_S", 0.05)
    addresses = ["127.0.0.2", "127.0.0.3", "127.0.0.1"]
    for address in addresses[:2]:
        black_hole(address, server.port)
    places = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: places)
    assert fetcher(fetch_timeout_s=4.0)(f"http://three.example:{server.port}/x") == IMAGE


@pytest.mark.parametrize(("fetch_timeout_s", "within_s"), [(3.0, 5.0), (10.0, 5.0), (60.0, 30.0)])
def test_longer_deadline_waits_longer_for_a_connection(serve, monkeypatch, fetch_timeout_s, within_s):
    """A second pass with a longer deadline gives hosts that are slow to connect, or to speak TLS, longer as well."""
    waited = []
    connect = http_client._connect

    async def note(family, address, port, seconds):
        waited.append(seconds)
        return await connect(family, address, port, seconds)
    monkeypatch.setattr(http_client, "_connect", note)
    assert fetcher(fetch_timeout_s=fetch_timeout_s)(serve(send_image).url) == IMAGE
    assert waited == [within_s]


def test_addresses_of_both_kinds_take_turns(monkeypatch):
    """IPv4 and IPv6 addresses alternate, each kind in the resolver's order, and none is left out."""
    answer = [(socket.AF_INET6, 1, 6, "", (address, 0, 0, 0)) for address in ("2606::1", "2606::2", "2606::3")]
    answer += [(socket.AF_INET, 1, 6, "", (address, 0)) for address in ("93.184.216.34", "93.184.216.35")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: answer)
    assert [address for _, address in names.ask_system("h.example")] == ["2606::1", "93.184.216.34", "2606::2", "93.184.216.35",
                                                                         "2606::3"]


def test_private_addresses_of_a_public_name_are_left_out(serve, monkeypatch):
    """Of a name's addresses only the public ones are tried."""
    server = serve(send_image)
    tried = []
    places = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in ("127.0.0.1", "93.184.216.34")]

    def connect(self, address):
        tried.append(address[0])
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: places)
    monkeypatch.setattr(socket.socket, "connect", connect)
    assert outcome(fetcher(allow_private_hosts=False), f"http://two.example:{server.port}/x")[0] == "connect"
    assert tried == ["93.184.216.34"] and server.seen == []


# ── What a host will bear ─────────────────────────────────────────────────────────────────────────────────────────────

def serve_times(host, count, begin, gap_s):
    """Let the host serve `count` images, one after the other; returns when the last has come."""
    for number in range(count):
        host.note_start(begin + number * gap_s)
        host.in_flight -= 1
        host.note_served(begin + (number + 1) * gap_s, begin + number * gap_s)
    return begin + count * gap_s


def test_no_more_than_allowed_at_once():
    """A host is asked by so many fetches at a time as max_per_host says."""
    host = hosts.Host("h", 2, 60.0)
    for _ in range(2):
        assert host.next_start() <= 0
        host.note_start(0)
    assert host.next_start() == math.inf


def test_refusal_pauses_all_and_lowers_the_rate():
    """After a refusal the host rests as long as it asks for, and then is asked at three quarters of what it had accepted."""
    host = hosts.Host("h", 16, 60.0)
    now = serve_times(host, 20, 0.0, 0.01)
    assert host.note_refusal(now, now - 0.01, 5.0)
    assert host.next_start() == pytest.approx(now + 5)
    assert host.rate == pytest.approx(15)
    host.note_start(now + 5)
    host.in_flight -= 1
    assert host.next_start() == pytest.approx(now + 5 + 1 / 15)


def test_pauses_of_a_host_double_until_it_serves():
    """A host that does not say when to come back rests for one second, two, four, and from one again once it has served."""
    host = hosts.Host("h", 16, 600.0)
    now = 0.0
    for pause_s in (1, 2, 4, 8):
        host.note_refusal(now, now, 0.0)
        assert host.next_start() == pytest.approx(now + pause_s)
        now += pause_s
    host.note_served(now, now)
    host.note_refusal(now, now, 0.0)
    assert host.next_start() == pytest.approx(now + 1)


def test_refusals_of_one_burst_count_once():
    """Requests that were under way when the host refused tell nothing new."""
    host = hosts.Host("h", 16, 60.0)
    for number in range(10):
        host.note_refusal(0.1 + number / 100, 0.0, 0.0)
    assert host.next_start() == pytest.approx(1.1) and host.patience_s == pytest.approx(59)


def test_rate_grows_again():
    """While a host serves, its rate grows by two per cent a second."""
    host = hosts.Host("h", 16, 60.0)
    now = serve_times(host, 20, 0.0, 0.01)
    host.note_refusal(now, now, 1.0)
    before = host.rate
    serve_times(host, 100, now, 0.1)
    assert host.rate == pytest.approx(before * 1.02 ** 10, rel=0.01)


def test_patience_ends_and_comes_back():
    """Pauses use patience up, images give some back; a host without any is given up while it rests."""
    host = hosts.Host("h", 16, 10.0)
    assert host.note_refusal(0.0, 0.0, 8.0)
    assert not host.is_given_up(1.0)
    assert not host.note_refusal(8.0, 8.0, 8.0)
    assert host.is_given_up(9.0)
    serve_times(host, 30, 100.0, 1.0)
    assert host.patience_s == pytest.approx(3.0)
    assert not host.is_given_up(131.0)


def test_dead_host_is_left_alone_and_then_tried_by_one():
    """Five failures in a row, over three seconds, make a host dead for a minute, and one fetch finds out whether it is back."""
    host = hosts.Host("h", 16, 60.0)
    for _ in range(4):
        host.note_unreachable(9.0, 1.0, "connect")
    assert not host.is_dead(9.0)
    host.note_answer()
    for now in (10.0, 10.3, 10.9, 11.9):
        host.note_unreachable(now, now, "connect")
    host.note_unreachable(13.0, 12.9, "dns")
    assert host.is_dead(72.0) and host.dead_status == "dns"
    assert not host.is_dead(73.0)
    host.note_start(73.0)
    assert host.next_start() == math.inf
    host.in_flight -= 1
    host.note_answer()
    host.note_start(74.0)
    assert host.next_start() <= 74.0


def test_host_that_is_away_for_a_moment_is_not_dead():
    """Many fetches that fail of one short trouble count for little, and the host rests before others try it."""
    host = hosts.Host("h", 16, 60.0)
    for _ in range(16):
        host.note_unreachable(1.0, 0.9, "dns")
    assert not host.is_dead(1.0) and host.next_start() == pytest.approx(1.25)
    host.note_unreachable(1.3, 1.25, "dns")
    assert not host.is_dead(1.3) and host.next_start() == pytest.approx(1.8)


def test_host_that_fails_now_and_then_does_not_rest():
    """A host of which one or two connections fail among others is not made to rest for them."""
    host = hosts.Host("h", 16, 60.0)
    for number in range(20):
        host.note_unreachable(number, number, "connect")
        host.note_unreachable(number, number, "connect")
        assert host.next_start() <= number
        host.note_answer()


def test_short_trouble_of_the_resolver_costs_no_row(serve, monkeypatch):
    """A single look-up that fails costs none of the many rows of its host."""
    server = serve(send_image)
    asked = []

    def resolve(host, *arguments, **options):
        asked.append(host)
        time.sleep(0.05)
        if len(asked) == 1:
            raise socket.gaierror(-3, "Temporary failure in name resolution")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    found = fetch_all(fetcher(fetch_retries=2), [f"http://big.example:{server.port}/{n}" for n in range(200)])
    assert {status for _, status in found} == {"ok"} and len(asked) == 2


def test_hosts_are_forgotten(monkeypatch):
    """What is known of hosts that nobody waits for stays bounded, and what is in use is kept."""
    monkeypatch.setattr(hosts, "KEPT_HOSTS", 100)
    known = hosts.Hosts(16, 60.0)
    busy = known.find("busy.example")
    busy.in_flight = 1
    for number in range(1000):
        known.rest(known.find(f"host{number}.example"))
    known.rest(busy)
    assert len(known) == 101
    assert known.find("busy.example") is busy


# ── Fetching ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_own_queue_costs_no_time(serve):
    """A deadline counts from when a fetch has its turn: rows that wait for max_per_host do not time out."""
    server = serve(lambda connection, path, server: time.sleep(0.2) or connection.sendall(answer_with(IMAGE)))
    get = fetcher(max_per_host=1, fetch_timeout_s=1.0)
    found = fetch_all(get, [f"{server.url}/{n}" for n in range(8)])
    assert {status for _, status in found} == {"ok"}
    assert found[-1][0] > 1.2


def test_host_whose_turn_comes_while_others_begin(monkeypatch):
    """A paced host whose next turn comes while fetches are being begun is asked then, and the loop comes to an end."""
    class SlowClock:
        """An event loop in which each look at the clock takes a tenth of a second."""
        now = 0.0

        def time(self):
            self.now += 0.1
            return self.now

        def call_at(self, when, *call):
            return None
    get = fetcher()
    begun = []
    get._loop = SlowClock()
    monkeypatch.setattr(get, "_begin_task", lambda work: begun.append(work.close()))
    host = get.hosts.find("paced.example")
    host.rate = 15.0
    target = targets.read_url("http://paced.example/x", config_of())
    host.waiting.extend(fetch.Fetch("http://paced.example/x", print, target, host) for _ in range(10))
    get._look_at(host)
    done = threading.Thread(target=get._start_fetches, daemon=True)
    done.start()
    done.join(5)
    assert not done.is_alive()
    assert 1 <= len(begun) <= 10 and len(begun) + len(host.waiting) == 10


def test_slow_host_holds_up_no_other(serve):
    """A lump of a slow host's rows at the head of the table waits for itself alone."""
    def answer(connection, path, server):
        time.sleep(0.5)
        send_image(connection, path, server)
    slow = serve(answer)
    quick = serve(send_image, "127.0.0.2")
    get = fetcher(max_per_host=2, fetch_concurrency=4)
    found = fetch_all(get, [f"{slow.url}/{n}" for n in range(8)] + [f"{quick.url}/{n}" for n in range(20)])
    assert {status for _, status in found} == {"ok"}
    assert max(seconds for seconds, _ in found[8:]) < min(2.0, found[7][0])


@pytest.mark.slow
def test_host_that_limits_its_requests(serve):
    """All rows of a host that allows 20 requests a second are fetched, and those of others do not wait for it."""
    log = collections.deque()
    refused = []
    lock = threading.Lock()

    def answer(connection, path, server):
        with lock:
            now = time.monotonic()
            while log and now - log[0] > 1:
                log.popleft()
            is_allowed = len(log) < 20
            if is_allowed:
                log.append(now)
            else:
                refused.append(path)
        connection.sendall(answer_with(IMAGE) if is_allowed else answer_with(b"slow down", code="429 Too Many Requests"))
    limited = serve(answer)
    other = serve(send_image, "127.0.0.2")
    found = fetch_all(fetcher(fetch_timeout_s=1.0), [f"{limited.url}/{n}" for n in range(80)]
                      + [f"{other.url}/{n}" for n in range(100)])
    assert {status for _, status in found} == {"ok"}
    assert max(seconds for seconds, _ in found[80:]) < max(seconds for seconds, _ in found[:80])
    assert len(refused) < 80


def test_broken_page_costs_its_host_little(serve, monkeypatch):
    """A URL that answers 503 for ever ends as http_5xx, and the other images of its host come."""
    monkeypatch.setattr(hosts, "PAUSES_BETWEEN_IMAGES_S", (0.01, 0.1))

    def answer(connection, path, server):
        connection.sendall(answer_with(b"", code="503 Unavailable") if path == "/broken" else answer_with(IMAGE))
    server = serve(answer)
    get = fetcher(fetch_retries=1, max_per_host=1)
    assert outcome(get, f"{server.url}/broken") == ("http_5xx", "503")
    assert len(server.seen) == 2
    found = fetch_all(get, [f"{server.url}/{name}" for name in ("a", "broken", "b", "c", "d")])
    assert [status for _, status in found] == ["ok", "http_5xx", "ok", "ok", "ok"]
    assert server.seen.count("/broken") <= 2 + fetch.MOST_REFUSALS + 1


def test_dead_host_is_asked_no_more(monkeypatch):
    """Rows of a host that could not be reached several times in a row fail at once, and their detail says why."""
    monkeypatch.setattr(hosts, "FIRST_REST_S", 0.01)
    monkeypatch.setattr(hosts, "DEAD_AFTER_S", 0.0)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        get = fetcher(max_per_host=1)
        details = [outcome(get, f"{url}/{n}") for n in range(8)]
    assert {status for status, _ in details} == {"connect"}
    assert [("left alone" in detail) for _, detail in details] == [False] * hosts.DEAD_AFTER + [True] * (8 - hosts.DEAD_AFTER)


@pytest.mark.parametrize("before", [
    b"HTTP/1.1 103 Early Hints\r\nLink: </s.css>; rel=preload\r\n\r\n", b"HTTP/1.1 102 Processing\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n"])
def test_early_hints_are_read_past(serve, before):
    """Answers of 1xx before the image are no answers."""
    server = serve(lambda connection, path, server: connection.sendall(before + answer_with(IMAGE)))
    assert fetcher()(f"{server.url}/x") == IMAGE


def test_endless_early_hints_end(serve):
    """A server that sends nothing but early hints ends as connect."""
    def answer(connection, path, server):
        for _ in range(2000):
            connection.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n")
    assert outcome(fetcher(), f"{serve(answer).url}/x")[0] == "connect"


@pytest.mark.parametrize("head", [
    b"HTTP/1.1 200 OK\nContent-Length: %d\n\n", b"HTTP/1.1 200\r\ncontent-length:%d\r\n\r\n",
    b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n", b"HTTP/1.1 200 OK\r\nX-Long: a\r\n  b\r\nContent-Length: %d\r\n\r\n"])
def test_heads_of_odd_servers(serve, head):
    """Bare newlines, no reason, HTTP/1.0 and folded headers are read as other clients read them."""
    server = serve(lambda connection, path, server: connection.sendall(head % len(IMAGE) + IMAGE) or "close")
    assert fetcher()(f"{server.url}/x") == IMAGE


CHUNKED = f"{len(IMAGE):x}\r\n".encode() + IMAGE + b"\r\n0\r\n"


@pytest.mark.parametrize(("headers", "body"), [
    (f"Content-Length: {len(IMAGE)}\r\nContent-Length: {len(IMAGE)}", IMAGE),
    (f"Content-Length: {len(IMAGE)}, {len(IMAGE)}", IMAGE),
    ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", CHUNKED + b"\r\n"),
    ("Transfer-Encoding: identity, Chunked", CHUNKED + b"\r\n"),
    ("Transfer-Encoding: chunked\r\nContent-Length: 99999999999", CHUNKED + b"\r\n"),
    ("Transfer-Encoding: chunked", b"0" * 30 + CHUNKED + b"\r\n"),
    ("Transfer-Encoding: chunked", CHUNKED)])  # the line after the last chunk never comes
def test_bodies_of_odd_servers(serve, headers, body):
    """What is said twice counts once, chunks count before a length, and what is missing behind a whole body is no failure."""
    server = serve(lambda connection, path, server: connection.sendall(f"HTTP/1.1 200 OK\r\n{headers}\r\n\r\n".encode() + body))
    assert fetcher()(server.url) == IMAGE


def test_length_of_a_body_in_chunks_is_not_believed():
    """A short Content-Length beside chunks would have a long body pass the bound on memory."""
    head = http_client.Head(200, {"content-length": "10", "transfer-encoding": "chunked"}, True)
    assert head.length() is None
    assert http_client.Head(200, {"content-length": "10, 11"}, True).length() is None
    assert http_client.Head(200, {"content-length": "10, 10"}, True).length() == 10


def test_long_head_ends(serve):
    """A head is not kept beyond 256 KiB, however many headers of moderate length it has."""
    sent = []

    def send_head(connection, path, server):
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        for number in range(390):
            connection.sendall(f"X-{number}: {'x' * 60_000}\r\n".encode())
            sent.append(number)
        connection.sendall(b"\r\n")
    assert outcome(fetcher(), serve(send_head).url)[0] == "connect"
    assert len(sent) < 200


def test_tls_takes_little_memory():
    """Each of hundreds of TLS connections has a buffer of the size of the pieces that are read, not of asyncio's."""
    protocol = asyncio.sslproto.SSLProtocol(None, asyncio.Protocol(), ssl.create_default_context(), None)
    assert len(protocol._ssl_buffer) == http_client.CHUNK_BYTES


def test_redirect_said_twice_is_one(serve):
    """A Location that a server sends twice is followed."""
    server = serve(lambda connection, path, server: connection.sendall(
        answer_with(IMAGE) if path == "/there" else answer_with(b"", "Location: /there", "Location: /there", code="302 Found")))
    assert fetcher()(server.url) == IMAGE


def test_opt_out_of_a_redirect_is_respected(serve, tmp_path):
    """A server that opts out by the headers of its redirect is left alone, also by a cache that was filled without respect."""
    server = serve(lambda connection, path, server: connection.sendall(
        answer_with(IMAGE) if path == "/there"
        else answer_with(b"", "Location: /there", "X-Robots-Tag: noai", code="302 Found")))
    assert fetcher(respect_opt_out=False, cache_path=str(tmp_path))(server.url) == IMAGE
    assert outcome(fetcher(), server.url) == ("opted_out", "X-Robots-Tag")
    assert outcome(fetcher(cache_path=str(tmp_path)), server.url) == ("opted_out", "X-Robots-Tag")
    assert server.seen.count("/there") == 1


def test_connections_are_used_again(serve):
    """One connection serves one URL after the other, also after an error page."""
    connections = set()

    def answer(connection, path, server):
        connections.add(connection.fileno())
        connection.sendall(answer_with(b"no", code="404 Not Found") if path == "/no" else answer_with(IMAGE))
    server = serve(answer)
    get = fetcher()
    statuses = [outcome(get, f"{server.url}/{name}")[0] for name in ("a", "no", "b", "c")]
    assert statuses == ["ok", "http_4xx", "ok", "ok"]
    assert len(connections) == 1


def test_bytes_nobody_asked_for_are_not_taken_for_the_next_image(serve):
    """What a server sends beyond its answer ends the connection, and never becomes another row's image."""
    other = answer_with(png("blue"))
    server = serve(lambda connection, path, server: connection.sendall(answer_with(IMAGE) + other))
    get = fetcher()
    assert [get(f"{server.url}/{n}") for n in range(4)] == [IMAGE] * 4


def test_closed_connection_is_no_failure(serve):
    """A server that closes a kept connection without a word costs no row and no retry."""
    server = serve(lambda connection, path, server: connection.sendall(answer_with(IMAGE)) or "close")
    get = fetcher()
    assert [get(f"{server.url}/{n}") for n in range(5)] == [IMAGE] * 5
    assert len(server.seen) == 5


def test_408_on_a_kept_connection_is_its_end(serve):
    """A server that says 408 when it gives up an idle connection has not timed out the request that crosses it."""
    given_up = []

    def answer(connection, path, server):
        if connection.fileno() in given_up:
            connection.sendall(answer_with(b"", code="408 Request Timeout"))
            given_up.clear()
            return "close"
        given_up.append(connection.fileno())
        connection.sendall(answer_with(IMAGE))
        return ""
    server = serve(answer)
    get = fetcher()
    assert [get(f"{server.url}/{n}") for n in range(4)] == [IMAGE] * 4
    assert len(server.seen) > 4


@pytest.mark.parametrize("code", ["408 Request Timeout", "425 Too Early"])
def test_codes_that_may_pass(serve, code):
    """408 and 425 are tried again, and are http_4xx where that does not help."""
    server = serve(lambda connection, path, server: connection.sendall(
        answer_with(IMAGE) if len(server.seen) > 1 and path == "/x" else answer_with(b"", code=code)))
    assert fetcher(fetch_retries=1)(f"{server.url}/x") == IMAGE
    assert outcome(fetcher(fetch_retries=1), f"{server.url}/y") == ("http_4xx", code[:3])


def test_connections_stay_within_the_limit_on_open_files(serve, monkeypatch):
    """Fetches and kept connections leave descriptors for everything else, whatever the limit is."""
    for limit in (64, 256, 1024, 20_000):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, limit=limit: (limit, limit))
        under_way, kept = fetch.count_connections(config_of())
        assert under_way >= 1 and kept >= 1
        assert under_way + kept <= max(8, limit - fetch.FILES_KEPT_BACK)
    assert under_way == fetch.AUTO_CONCURRENCY
    get = fetcher(max_per_host=64)
    get.web.connections.most = 3
    server = serve(send_image)
    fetch_all(get, [f"{server.url}/{n}" for n in range(40)])
    assert get.web.connections._count <= 3


def test_too_many_open_files_are_told_and_cost_no_row(serve, monkeypatch, capfd):
    """Where the system has no descriptor left, fewer are fetched at a time, one line says so, and every image comes."""
    server = serve(send_image)
    monkeypatch.setattr(fetch, "FULL_PAUSE_S", 0.02)
    opened = []
    connect = http_client._connect

    async def connect_if_there_is_room(family, address, port, within_s):
        opened.append(port)
        if len(opened) < 12:
            raise OSError(errno.EMFILE, "Too many open files")
        return await connect(family, address, port, within_s)
    monkeypatch.setattr(http_client, "_connect", connect_if_there_is_room)
    get = fetcher()
    assert {status for _, status in fetch_all(get, [f"{server.url}/{n}" for n in range(20)])} == {"ok"}
    assert capfd.readouterr().err.count("too many open files (ulimit -n)") == 1
    assert get.flow.concurrency < 20


def test_fetches_that_do_not_end_leave_room_for_others(serve, monkeypatch):
    """Where hosts take long, others are asked meanwhile, although the first ones may still bring what they were asked for."""
    monkeypatch.setattr(fetch, "BURST_BYTES_A_CORE", 1)
    monkeypatch.setattr(flow, "RECENT_S", 0.2)
    slow = serve(lambda connection, path, server: server.closing.wait(20))
    quick = serve(send_image, "127.0.0.2")
    get = fetcher(max_per_host=100, fetch_timeout_s=2.0)
    urls = [f"{slow.url}/{n}" for n in range(2 * flow.ALWAYS_RECENT)]
    found = fetch_all(get, [*urls, f"{quick.url}/x"])
    assert [status for _, status in found] == ["timeout"] * len(urls) + ["ok"]
    assert found[-1][0] < 1.5


def test_waiting_for_a_place_costs_nothing(serve):
    """While as many fetches as may be are under way, and others wait, nobody looks again and again whether one may begin."""
    server = serve(lambda connection, path, server: server.closing.wait(20) and "close")
    get = fetcher(fetch_concurrency=4, fetch_timeout_s=2.5)
    looked = []
    look_again = get._look_again
    get._look_again = lambda: (looked.append(1), look_again())
    fetch_all(get, [f"{server.url}/{n}" for n in range(6)])
    assert len(looked) < 100


def test_large_bodies_take_turns(serve, monkeypatch):
    """Bodies beyond some size wait for room in memory, off their clock, and all arrive."""
    monkeypatch.setattr(exchange, "SMALL_BYTES", 1000)
    monkeypatch.setattr(exchange, "MEDIUM_BYTES", 100_000)
    monkeypatch.setattr(exchange, "MEDIUM_BUDGET", 200_000)
    monkeypatch.setattr(exchange, "LARGE_BUDGET", 1_000_000)
    body = bytes(400_000)

    def answer(connection, path, server):
        if path.startswith("/chunked"):
            connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for start in range(0, len(body), 50_000):
                connection.sendall(b"c350\r\n" + body[start:start + 50_000] + b"\r\n")
            connection.sendall(b"0\r\n\r\n")
        else:
            connection.sendall(answer_with(body if path.startswith("/large") else bytes(60_000)))
    server = serve(answer)
    get = fetcher(max_image_bytes=500_000, fetch_timeout_s=1.0, max_per_host=64)
    most = [0, 0]
    released = []
    done = queue.SimpleQueue()

    def hold_a_moment(result):
        most[0] = max(most[0], get.web.bytes._medium.taken)
        most[1] = max(most[1], get.web.bytes._large.taken)
        threading.Timer(0.05, lambda: (released.append(len(result.data)), get.release(result), done.put(result))).start()
    urls = [f"{server.url}/{kind}/{n}" for n in range(8) for kind in ("large", "medium", "chunked")]
    get.submit((url, hold_a_moment) for url in urls)
    found = [done.get(timeout=20) for _ in urls]
    assert {each.failure and each.failure.status for each in found} == {None}
    assert most[0] <= 200_000 and most[1] <= 1_000_000
    time.sleep(0.1)
    assert (get.web.bytes._medium.taken, get.web.bytes._large.taken) == (0, 0)


def test_body_that_breaks_off_gives_its_memory_back(serve, monkeypatch):
    """What a failed attempt held is free again."""
    monkeypatch.setattr(exchange, "SMALL_BYTES", 1000)

    def answer(connection, path, server):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5000000\r\n\r\n" + bytes(100_000))
        return "close"
    get = fetcher()
    assert outcome(get, f"{serve(answer).url}/x") == ("connect", "body shorter than promised")
    assert (get.web.bytes._medium.taken, get.web.bytes._large.taken) == (0, 0)


# ── Proxies ───────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def use_proxy(monkeypatch):
    """Have the environment name the server as its proxy, and public.example resolve to a public address."""
    def use(server):
        for name in list(os.environ):
            if name.lower().endswith("_proxy"):
                monkeypatch.delenv(name)
        monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{server.port}")
        resolve = socket.getaddrinfo

        def public(host, *arguments, **options):
            return resolve("93.184.216.34" if host == "public.example" else host, *arguments, **options)
        monkeypatch.setattr(socket, "getaddrinfo", public)
    return use


def tunnel(connection, path, server):
    """A proxy that agrees to every tunnel, and is itself what lies at its other end."""
    if path.startswith("93."):
        connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
    elif path == "/drip":
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        while not server.closing.wait(0.1):
            connection.sendall(b"X: y\r\n")
    else:
        connection.sendall(answer_with(IMAGE))


def test_proxy_is_asked_for_the_checked_address(serve, use_proxy):
    """The proxy gets the address, not a name that it would resolve again; the host's name goes through the tunnel."""
    proxy = serve(tunnel)
    use_proxy(proxy)
    get = fetcher(use_environment_proxies=True, allow_private_hosts=False)
    assert get("http://public.example/x") == IMAGE
    assert proxy.seen == ["93.184.216.34:80", "/x"]
    end_of_first = proxy.lines.index("GET /x HTTP/1.1")
    assert not any("public.example" in line for line in proxy.lines[:end_of_first])
    assert "Proxy-Authorization: Basic bWU6c2VjcmV0" in proxy.lines[:end_of_first]
    assert "Host: public.example" in proxy.lines[end_of_first:]
    assert not any("Authorization" in line for line in proxy.lines[end_of_first:])


def test_proxy_is_asked_for_the_next_address(serve, use_proxy, monkeypatch):
    """Where the proxy cannot reach the first address, as one without IPv6, it is asked for the next one."""
    def reach_ipv4(connection, path, server):
        if path.startswith("["):
            connection.sendall(answer_with(b"", code="503 Unreachable"))
            return "close"
        return tunnel(connection, path, server)
    server = serve(reach_ipv4)
    use_proxy(server)
    answer = [(socket.AF_INET6, 1, 6, "", ("2606:2800::1", 0, 0, 0)), (socket.AF_INET, 1, 6, "", ("93.184.216.34", 0))]
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *arguments, **options:
                        answer if host == "public.example" else resolve(host, *arguments, **options))
    get = fetcher(use_environment_proxies=True, allow_private_hosts=False)
    assert get("http://public.example/x") == IMAGE
    assert server.seen == ["[2606:2800::1]:80", "93.184.216.34:80", "/x"]


def test_proxied_head_that_drips_ends_in_time(serve, use_proxy):
    """The deadline counts through a proxy as well."""
    proxy = serve(tunnel)
    use_proxy(proxy)
    get = fetcher(use_environment_proxies=True, allow_private_hosts=False, fetch_timeout_s=0.8)
    started = time.monotonic()
    assert outcome(get, "http://public.example/drip")[0] == "timeout"
    assert time.monotonic() - started < 2


def test_private_url_is_refused_before_the_proxy(serve, use_proxy):
    """A proxy does not make private addresses public."""
    proxy = serve(tunnel)
    use_proxy(proxy)
    get = fetcher(use_environment_proxies=True, allow_private_hosts=False)
    assert outcome(get, "http://10.0.0.1/x")[0] == "forbidden"
    assert proxy.seen == []


@pytest.mark.parametrize("proxy", ["http://proxy:abc", "http://[::1", "http://proxy:99999", "socks5://proxy:1"])
def test_proxy_that_is_none(monkeypatch, proxy):
    """A proxy that cannot be read costs each row its failure, and holds up no run."""
    monkeypatch.setenv("http_proxy", proxy)
    status, detail = outcome(fetcher(use_environment_proxies=True), "http://h.example/x")
    assert status == "connect" and "environment's proxy" in detail


def test_certificates_of_the_environment(monkeypatch, tmp_path):
    """A bundle that cannot be read is told at the start; one in the form of a folder is read."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "none.pem"))
    with pytest.raises(script.Trouble, match="REQUESTS_CA_BUNDLE") as raised:
        fetcher(use_environment_proxies=True)
    assert raised.value.exit_code == script.EXIT_CONFIG
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path))
    fetcher(use_environment_proxies=True)


def test_bug_in_reading_a_url_reaches_the_run(monkeypatch):
    """Whatever goes wrong before a fetch begins is raised where it is waited for, and no run hangs."""
    monkeypatch.setattr(fetch, "read_url", lambda url, config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fetcher()("http://h.example/x")


def test_proxy_that_refuses(serve, use_proxy):
    """A proxy that allows no tunnel is connect, and the detail says so."""
    proxy = serve(lambda connection, path, server: connection.sendall(answer_with(b"", code="403 Forbidden")))
    use_proxy(proxy)
    get = fetcher(use_environment_proxies=True, allow_private_hosts=False)
    assert outcome(get, "http://public.example/x") == ("connect", "the environment's proxy refuses to connect (403)")


# ── The cache ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def entries(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("damage", [
    lambda data: data[:-3], lambda data: data + b"x", lambda data: b"", lambda data: IMAGE,
    lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: b"[]\n" + IMAGE, lambda data: b'{"kind": 7}\n' + IMAGE])
def test_damaged_cache_entries_are_fetched_anew(serve, tmp_path, damage):
    """An entry that is cut, changed or of another kind counts as not there, and is written anew."""
    server = serve(send_image)
    for _ in range(2):
        assert fetcher(cache_path=str(tmp_path))(f"{server.url}/x") == IMAGE
    assert len(server.seen) == 1
    entry, = entries(tmp_path)
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert fetcher(cache_path=str(tmp_path))(f"{server.url}/x") == IMAGE
    assert len(server.seen) == 2 and entry.read_bytes() == whole


def test_entry_that_cannot_be_read_is_fetched_anew(serve, tmp_path):
    """A folder where an entry should be costs nothing but the fetch."""
    server = serve(send_image)
    name = cache.Cache(str(tmp_path), 100, True)._path(f"{server.url}/x")
    name.mkdir(parents=True)
    assert fetcher(cache_path=str(tmp_path))(f"{server.url}/x") == IMAGE


def test_full_disk_leaves_nothing_in_the_cache(serve, tmp_path, monkeypatch):
    """A disk that is full in the middle of an entry keeps nothing of it, and the image comes."""
    server = serve(send_image)
    told = []
    monkeypatch.setattr(cache, "say", told.append)  # stderr may be a file, too, and as full
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        assert fetcher(cache_path=str(tmp_path / "cache"))(f"{server.url}/x") == IMAGE
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert entries(tmp_path / "cache") == []
    assert len(told) == 1 and "is not kept in cache_path" in told[0]


def test_cache_respects_an_opt_out(serve, tmp_path):
    """What was kept from a server that opts out is not used by a run that respects it."""
    server = serve(lambda connection, path, server: connection.sendall(answer_with(IMAGE, "X-Robots-Tag: noai")))
    assert fetcher(cache_path=str(tmp_path), respect_opt_out=False)(f"{server.url}/x") == IMAGE
    assert outcome(fetcher(cache_path=str(tmp_path)), f"{server.url}/x") == ("opted_out", "X-Robots-Tag")
    assert fetcher(cache_path=str(tmp_path), respect_opt_out=False)(f"{server.url}/x") == IMAGE
    assert len(server.seen) == 1


@pytest.mark.parametrize("page", [b"", b"\n <!DOCTYPE html><title>Are you human?</title>"])
def test_pages_are_not_kept(serve, tmp_path, page):
    """What a server sends instead of an image, for as long as it takes one for a robot, is asked for again by the next run."""
    server = serve(lambda connection, path, server: connection.sendall(answer_with(page if len(server.seen) < 2 else IMAGE)))
    assert fetcher(cache_path=str(tmp_path))(server.url) == page
    assert [fetcher(cache_path=str(tmp_path))(server.url) for _ in range(2)] == [IMAGE] * 2
    assert len(server.seen) == 2


def test_opt_out_that_is_learnt_later_empties_the_cache(serve, tmp_path):
    """Where an entry has to be fetched again and its server opts out by now, the entry goes."""
    opts_out = threading.Event()

    def answer(connection, path, server):
        connection.sendall(answer_with(IMAGE, "X-Robots-Tag: noai") if opts_out.is_set() else answer_with(IMAGE))
    server = serve(answer)
    assert fetcher(cache_path=str(tmp_path))(f"{server.url}/x") == IMAGE
    entry, = entries(tmp_path)
    entry.write_bytes(b"damaged")
    opts_out.set()
    assert outcome(fetcher(cache_path=str(tmp_path)), f"{server.url}/x")[0] == "opted_out"
    assert entries(tmp_path) == []


# ── A whole run ───────────────────────────────────────────────────────────────────────────────────────────────────────

def test_late_images_hold_up_no_other_partition(serve, write_config, write_table, run_main, read_table, tmp_path):
    """A row that never comes is told at the end of its partition, when those behind it have long been written."""
    def answer(connection, path, server):
        if path == "/late":
            server.closing.wait(20)
        send_image(connection, path, server)
    server = serve(answer)
    rows = [(f"{server.url}/late" if number == 1 else f"{server.url}/{number}", "c") for number in range(40)]
    write_table([("url", "caption"), *rows])
    config = write_config(image_path="url", allow_private_hosts=True, partition_rows=4, fetch_timeout_s=1.5)
    result = run_main("--config", config)
    assert result.code == 0, result.stderr
    scores = read_table(tmp_path / "out/scores.csv")
    assert [row["url"] for row in scores] == [url for url, _ in rows]
    assert [row["status"] for row in scores] == ["timeout" if number == 1 else "ok" for number in range(40)]
    ended = [json.loads(path.read_text())["ended"] for path in sorted((tmp_path / "out/parts").glob("part-*.json"))]
    assert len(ended) == 10 and max(ended) == ended[0] and ended[0] - max(ended[1:]) > 0.5


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_late_images_under_ray(serve, write_config, write_table, run_cli, read_table, tmp_path):
    """A Ray actor gets several partitions of URLs at a time, of which late images hold up their own alone."""
    pytest.importorskip("ray")

    def answer(connection, path, server):
        if path == "/late":
            server.closing.wait(60)
        send_image(connection, path, server)
    server = serve(answer)
    urls = [f"{server.url}/late" if number == 1 else f"{server.url}/{number}" for number in range(32)]
    write_table([("url", "caption"), *((url, "c") for url in urls)])
    config = write_config(image_path="url", allow_private_hosts=True, partition_rows=2, fetch_timeout_s=3, engine="ray")
    result = run_cli("--config", config, timeout=150)
    assert result.code == 0, result.stderr
    scores = read_table(tmp_path / "out/scores.csv")
    assert [row["url"] for row in scores] == urls
    assert [row["status"] for row in scores] == ["timeout" if number == 1 else "ok" for number in range(32)]
    ended = [json.loads(path.read_text())["ended"] for path in sorted((tmp_path / "out/parts").glob("part-*.json"))]
    assert len(ended) == 16 and max(ended[1:4]) < ended[0] - 1


def test_each_url_is_fetched_once_for_a_partition(serve, write_config, write_table, run_main, tmp_path):
    """Equal URLs of a partition are one fetch; those of different partitions are what a cache would have saved."""
    server = serve(send_image)
    write_table([("url", "caption"), *((f"{server.url}/{number % 5}", f"c {number}") for number in range(40))])
    config = write_config(image_path="url", allow_private_hosts=True, partition_rows=20)
    result = run_main("--config", config)
    assert len(server.seen) == 10
    profile = json.loads((tmp_path / "out/profile.json").read_text())
    assert profile["fetching"]["fetches"] == 10 and profile["fetching"]["repeated_share"] == 0.5
    assert "5 of 10 fetches, which a cache_path would save" in result.stderr
    assert sum(profile["fetching"]["seconds"]["up_to"].values()) == 10


def test_summary_names_the_hosts_that_failed(serve, write_config, write_table, run_main, tmp_path):
    """The hosts with most failures are told with their statuses, the worst first; broken images are not their fault."""
    def answer(connection, path, server):
        code = path.split("/")[1]
        body = b"<html>" if code == "page" else IMAGE
        connection.sendall(answer_with(body, code="200 OK" if code in ("ok", "page") else f"{code} No"))
    one = serve(answer)
    two = serve(answer, "127.0.0.2")
    urls = [f"{one.url}/404/{n}" for n in range(3)] + [f"{two.url}/404/{n}" for n in range(5)] + [f"{two.url}/500/x"]
    urls += [f"http://127.0.0.3:{one.port}/ok", f"{one.url}/ok/1", f"{one.url}/page/1"]
    write_table([("url", "caption"), *((url, "c") for url in urls)])
    result = run_main("--config", write_config(image_path="url", allow_private_hosts=True, partition_rows=5, fetch_retries=0))
    profile = json.loads((tmp_path / "out/profile.json").read_text())
    assert profile["fetching"]["worst_hosts"] == [
        {"host": "127.0.0.2", "failed": 6, "statuses": {"http_4xx": 5, "http_5xx": 1}},
        {"host": "127.0.0.1", "failed": 3, "statuses": {"http_4xx": 3}},
        {"host": "127.0.0.3", "failed": 1, "statuses": {"connect": 1}}]
    assert "127.0.0.2: 5 http_4xx, 1 http_5xx" in result.stderr


@pytest.mark.parametrize(("url", "host"), [
    ("http://user:p@ss@host.example/x", "host.example"), ("http://user:pass@[::1]:80/@", "::1"), ("http://h/a@b", "h"),
    ("http://h?a@b", "h"), ("user:pass@host/x", "-")])
def test_hosts_are_told_without_passwords(url, host):
    """What stands before a URL's host, with any number of @ in it, is told nowhere."""
    assert web_report.host_of(url) == host


def test_second_pass_with_a_longer_deadline(serve, write_config, write_table, run_main, read_table, tmp_path):
    """--retry-failed with a longer fetch_timeout_s scores what was too slow, and the report counts what is left."""
    server = serve(lambda connection, path, server: time.sleep(0.8 if path == "/slow" else 0) or connection.sendall(
        answer_with(IMAGE)))
    write_table([("url", "caption"), *((f"{server.url}/{name}", "c") for name in ("a", "slow", "b"))])
    config = write_config(image_path="url", allow_private_hosts=True, fetch_timeout_s=0.3)
    assert run_main("--config", config).result["failed"] == {"timeout": 1}
    again = run_main("--config", config, "--retry-failed", "--set", "fetch_timeout_s=5")
    assert again.code == 0 and again.result["scored"] == 3, again.stderr
    assert json.loads((tmp_path / "out/profile.json").read_text())["fetching"]["worst_hosts"] == []


@pytest.mark.slow
def test_scores_of_urls_are_those_of_files(serve, shapes, bundled_model, write_config, run_main, read_table, tmp_path):
    """Images that come in any order get the scores that files get, but for rounding (1e-6)."""
    folder = script.ADDONS.parent / "challenge_set/shapes"
    waits = itertools.cycle([0.0, 0.03, 0.0, 0.01, 0.1])

    def answer(connection, path, server):
        time.sleep(next(waits))
        connection.sendall(answer_with((folder / path.lstrip("/")).read_bytes()))
    server = serve(answer)
    assert run_main("--config", shapes(pretrained_model=bundled_model)).code == 0
    files = read_table(tmp_path / "out/scores.csv")
    table = tmp_path / "table.csv"
    with table.open(newline="") as file:
        header, *rows = list(csv.reader(file))
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([header, *([f"{server.url}/{row[0]}", *row[1:]] for row in rows)])
    config = write_config(image_path="url", allow_private_hosts=True, pretrained_model=bundled_model, partition_rows=70,
                          max_per_host=64, output_path=str(tmp_path / "urls"))
    assert run_main("--config", config).code == 0
    urls = read_table(tmp_path / "urls/scores.csv")
    assert [urllib.parse.urlsplit(row["url"]).path[1:] for row in urls] == [row["url"] for row in files]
    assert {row["status"] for row in urls} == {"ok"}
    for one, other in zip(files, urls, strict=True):
        assert abs(float(one["similarity"]) - float(other["similarity"])) <= 1e-6


def noise(width, height):
    """A PNG that takes a while to decode, and as much memory as its size says."""
    data = io.BytesIO()
    Image.effect_noise((width, height), 50).convert("RGB").save(data, "PNG", compress_level=1)
    return data.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("waiting_for", ["answers", "memory", "many rows"])
def test_interruption_waits_for_nobody(serve, start_cli, write_config, write_table, tmp_path, waiting_for):
    """Ctrl-C ends a run within two seconds, whatever its images wait for, and the same command goes on from there."""
    asked = threading.Event()
    large = noise(3000, 3000) if waiting_for == "memory" else IMAGE

    def answer(connection, path, server):
        asked.set()
        if waiting_for == "memory":
            connection.sendall(answer_with(large))
        else:
            server.closing.wait(60)
    server = serve(answer)
    rows = 20_000 if waiting_for == "many rows" else 50
    write_table([("url", "caption"), *((f"{server.url}/{number}", "c") for number in range(rows))])
    config = write_config(image_path="url", allow_private_hosts=True, fetch_timeout_s=60, max_per_host=64,
                          memory_budget_mib=32)  # for one image at a time
    process = start_cli("--config", config)
    assert asked.wait(60)
    time.sleep(1.0)
    since = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    assert time.monotonic() - since < 2
    assert not list((tmp_path / "out/parts").glob("*.trying"))


# ── The report ────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_seconds_are_told_by_quantiles():
    """Half, 90 and 99 % of the fetches took no longer than told, to within a fifth."""
    counts = collections.Counter()
    for number in range(1, 1001):
        web_report.count_seconds(counts, number / 1000)
    seconds = web_report.describe_seconds(counts)
    for key, exact in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert exact <= seconds[key] <= 1.2 * exact


def test_repeated_urls_are_estimated_from_a_sample():
    """Of a table with more rows than the sample holds, the share of repeated URLs is found to within a few per cent."""
    rows = 60 * web_report.SAMPLED_URLS // 10
    urls = [f"http://h.example/{number % (rows * 3 // 4)}" for number in range(rows)]
    reports = []
    for start in range(0, rows, 10_000):
        part = set(urls[start:start + 10_000])
        reports.append({"seconds": {}, "hosts": {}, "urls": len(part), "sample": web_report.sample_urls(part, rows)})
    total = web_report.add_up(reports, rows)
    assert sum(len(report["sample"]) for report in reports) < 1.1 * web_report.SAMPLED_URLS
    assert total["repeated_share"] == pytest.approx(0.25, abs=0.02)


def test_failing_hosts_are_counted_in_bounded_memory(monkeypatch):
    """The worst hosts are found among more hosts than are remembered."""
    monkeypatch.setattr(web_report, "HOSTS_IN_ALL", 100)
    reports = []
    for part in range(50):
        failing = {f"h{part}-{n}.example": {"dns": 1} for n in range(20)} | {"worst.example": {"timeout": 3}}
        reports.append({"seconds": {}, "hosts": failing, "urls": 23, "sample": []})
    worst = web_report.add_up(reports, 1000)["worst_hosts"]
    assert worst[0] == {"host": "worst.example", "failed": 150, "statuses": {"timeout": 150}} and len(worst) == 10
