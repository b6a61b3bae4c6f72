"""Names and addresses: which host a URL names, which addresses it has, and which of them may be asked.

A resolver that does not answer must not hold a fetch for as long as the system waits for it, so names are looked up in
threads of their own, with a deadline that counts from when a thread takes the name up: names that hang must not have others
fail. Answers are kept for a while, together with the judgement about each address: what was checked is what is connected to.
Everything here but the look-up itself runs in the thread of the fetcher's event loop.
"""
import asyncio
import collections
import ipaddress
import queue
import re
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from requests_hardened.ip_filter import EXTRA_BLOCKED_NET_RANGES

RESOLVE_TIMEOUT_S = 5.0  # for one name; the system's own resolver may take half a minute
KEPT_S = 300.0  # how long an answer is good for
KEPT_NAMES = 10_000  # a table may have millions of hosts
MOST_THREADS = 256  # each waits for one name, by a descriptor
STACK_BYTES = 512 * 1024  # of such a thread, which holds little

# Services of a cloud that answer to its own machines only, at addresses that are otherwise public.
METADATA_NETWORKS = (ipaddress.ip_network("168.63.129.16/32"),)  # Azure

# RFC 6052: how machines that have IPv6 alone reach a host that has IPv4 alone, whose address the last 32 bits are
NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = tuple[socket.AddressFamily, str]  # of the kind AF_INET or AF_INET6, and as text


class NameFailure(Exception):
    """A host name that has no address, or none in time; the message says which."""


class NotPublic(Exception):
    """A host all of whose addresses are private, loopback, link-local, a metadata service, or otherwise not public."""


class NoName(Exception):
    """What stands where a URL has its host can be no host name."""


def is_public(address: str) -> bool:
    """Whether the IP address, given as text, belongs to the open internet."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped:
            return is_public(str(ip.ipv4_mapped))
        if ip.is_site_local:
            return False
        if ip in NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) % 2**32)))
    if not ip.is_global or ip.is_private or ip.is_multicast or ip.is_reserved:
        return False
    return not any(ip in network for network in (*EXTRA_BLOCKED_NET_RANGES, *METADATA_NETWORKS))


def one_spelling(host: str) -> str:
    """The host in the one way that all its spellings come to: lower case, no dot at its end, 127.1 as 127.0.0.1."""
    plain = host.lower().rstrip(".")
    if re.fullmatch(r"[0-9a-fx.]+", plain):
        try:
            return socket.inet_ntoa(socket.inet_aton(plain))  # takes the octal, hexadecimal and short spellings
        except OSError:
            return plain
    if ":" in plain:
        try:
            return str(ipaddress.ip_address(plain))
        except ValueError:
            return plain
    return plain


class _Answer(NamedTuple):
    """The addresses of a host that may be asked, none if it has no public one, and until when that is good."""

    addresses: list[Address]
    until: float  # of the event loop's clock


class _Question(NamedTuple):
    """A name that is being looked up, or waits for a thread to do so."""

    begun: "asyncio.Future[None]"
    answer: "asyncio.Future[list[Address]]"


async def _wait(event: "asyncio.Future[None]") -> None:
    await event


class Resolver:
    """Host name -> the addresses that may be asked, in the system's order. Used in the event loop's thread alone."""

    def __init__(self, allow_private: bool, most_threads: int = MOST_THREADS) -> None:
        self._allow_private = allow_private
        self._most_threads = most_threads
        self._answers: collections.OrderedDict[str, _Answer] = collections.OrderedDict()
        self._asked: dict[str, _Question] = {}  # many rows may wait for one host
        self._waiting: collections.deque[str] = collections.deque()  # those of `_asked` that no thread has taken up
        self._questions: queue.SimpleQueue[tuple[str, asyncio.Future[list[Address]]]] = queue.SimpleQueue()
        self._threads = 0

    async def find(self, host: str, wait: "Callable[[asyncio.Future[None]], Awaitable[None]]" = _wait) -> list[Address]:
        """At least one address; raises NameFailure, NotPublic, or NoName. `wait` waits for a free thread, off any clock."""
        loop = asyncio.get_running_loop()
        kept = self._answers.get(host)
        if kept is None or kept.until < loop.time():
            found = await self._look_up(host, wait)
            if not self._allow_private:
                found = [address for address in found if is_public(address[1].partition("%")[0])]
            kept = _Answer(found, loop.time() + KEPT_S)
            self._answers[host] = kept
            if len(self._answers) > KEPT_NAMES:
                self._answers.popitem(last=False)
        self._answers.move_to_end(host)
        if not kept.addresses:
            raise NotPublic
        return kept.addresses

    async def _look_up(self, host: str, wait: "Callable[[asyncio.Future[None]], Awaitable[None]]") -> list[Address]:
        literal = _read_literal(host)
        if literal:
            return [literal]
        question = self._asked.get(host)
        if question is None:
            loop = asyncio.get_running_loop()
            question = _Question(loop.create_future(), loop.create_future())
            self._asked[host] = question
            question.answer.add_done_callback(lambda answer: self._forget_question(host, answer))
            self._waiting.append(host)
            self._hand_out()
        if not question.begun.done():
            await wait(asyncio.shield(question.begun))
        try:
            async with asyncio.timeout(RESOLVE_TIMEOUT_S):
                return await asyncio.shield(question.answer)
        except TimeoutError:
            raise NameFailure("the resolver does not answer") from None

    def _forget_question(self, host: str, answer: "asyncio.Future[list[Address]]") -> None:
        del self._asked[host]
        if not answer.cancelled():
            answer.exception()  # nobody may be waiting any more, and asyncio would complain of an error not looked at
        self._hand_out()

    def _hand_out(self) -> None:
        """Give names to threads, as long as there are some that wait and threads that have none."""
        while self._waiting and len(self._asked) - len(self._waiting) < self._most_threads:
            if len(self._asked) - len(self._waiting) >= self._threads and not self._start_thread():
                return
            host = self._waiting.popleft()
            question = self._asked[host]
            question.begun.set_result(None)
            self._questions.put((host, question.answer))

    def _start_thread(self) -> bool:
        """Start one more thread; False where the system allows none, and those that there are have to do."""
        before = threading.stack_size(STACK_BYTES)
        try:
            # a daemon: one that waits for a dead resolver must not hold the end of the run
            threading.Thread(target=self._answer_questions, name="resolver", daemon=True).start()
        except RuntimeError:
            if not self._threads:
                raise
            self._most_threads = self._threads
            return False
        finally:
            threading.stack_size(before)
        self._threads += 1
        return True

    def _answer_questions(self) -> None:
        while True:
            host, future = self._questions.get()
            loop = future.get_loop()
            try:
                loop.call_soon_threadsafe(_settle, future, ask_system(host), None)
            except Exception as error:  # whatever it is, it is for the one who asked
                loop.call_soon_threadsafe(_settle, future, None, error)


def _settle(future: "asyncio.Future[list[Address]]", addresses: list[Address] | None, error: Exception | None) -> None:
    if future.done():
        return
    if error:
        future.set_exception(error)
    else:
        future.set_result(addresses or [])


def _read_literal(host: str) -> Address | None:
    """The host as an address, if it is spelled as one in the usual way."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return None
    return (socket.AF_INET if ip.version == 4 else socket.AF_INET6), host


def ask_system(host: str) -> list[Address]:
    """What the system's resolver answers, at least one address; raises NameFailure or NoName."""
    try:
        answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except UnicodeError:  # a label that is empty or too long
        raise NoName from None
    except OSError:  # socket.gaierror among them
        raise NameFailure("host name does not resolve") from None
    addresses: list[Address] = []
    for family, _, _, _, place in answers:
        if family in (socket.AF_INET, socket.AF_INET6) and (family, place[0]) not in addresses:
            addresses.append((family, str(place[0])))
    if not addresses:
        raise NameFailure("host name does not resolve")
    return _alternate(addresses)


def _alternate(addresses: list[Address]) -> list[Address]:
    """The addresses in their order, but that IPv4 and IPv6 take turns: where one of them leads nowhere, the other is near."""
    first = addresses[0][0]
    ours = [address for address in addresses if address[0] == first]
    others = [address for address in addresses if address[0] != first]
    turns = [*zip(ours, others, strict=False)]
    return [*(address for turn in turns for address in turn), *ours[len(turns):], *others[len(turns):]]
