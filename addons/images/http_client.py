"""HTTP/1.1 as far as fetching an image needs it, on asyncio: a GET, its head, its body in pieces, connections kept alive.

`requests` in threads was measured first: on one core it takes 0.8 ms of interpreter time a fetch and a thread for each host
that does not answer, this takes 0.2 ms and nothing while it waits. A deadline is asyncio's own (`asyncio.timeout`), so it
counts through connecting, the TLS handshake, a head that drips and a body that does. What a URL means, redirects, proxies and
certificates remain the business of `requests` (addons/images/fetch.py). Everything here runs in the event loop's thread.
"""
import asyncio
import asyncio.sslproto
import collections
import errno
import re
import socket
import ssl
from collections.abc import AsyncIterator
from typing import NamedTuple

from addons.images.names import Address

CONNECT_TIMEOUT_S = 5.0  # to one address, as much again for the TLS handshake; more with a longer `fetch_timeout_s`
NEXT_ADDRESS_S = 1.0  # until the next address of the host is tried
IDLE_S = 30.0  # how long a connection is kept for the next fetch at the same host
CHUNK_BYTES = 65536
LINE_BYTES = 65536  # of one line of a head
HEAD_LINES = 400  # of all heads of one answer, 1xx ones included
HEAD_BYTES = 256 * 1024  # of the same: a thousand fetches may be reading theirs
DRAINED_BYTES = 16384  # of an error page, which is read for the sake of the connection
DRAIN_S = 0.5  # for such a page, and for what may follow the last chunk of a body
asyncio.sslproto.SSLProtocol.max_size = CHUNK_BYTES  # asyncio's 256 KiB cost each TLS connection, kept ones too, 0.75 MiB
TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)


class BadAnswer(Exception):
    """What came back is not HTTP/1, or breaks off."""


class TooManyFiles(Exception):
    """This process, or this machine, has no file descriptor left for a connection."""


class Place(NamedTuple):
    """Whom to connect to, and over what; equal places may share a connection."""

    host: str  # as the certificate and the Host header have it
    port: int
    is_tls: bool
    proxy: str = ""  # host:port of the proxy on the way there


class Head(NamedTuple):
    """The head of an answer: code, and headers by their names in lower case.

    Those given several times are joined by commas, but that a value which is said again, as a proxy on the way may do, counts
    once.
    """

    code: int
    headers: dict[str, str]
    keeps_alive: bool

    def coding(self) -> str:
        """The last of the transfer codings, the one that says where the body ends; empty for none."""
        return self.headers.get("transfer-encoding", "").lower().rpartition(",")[2].strip()

    def length(self) -> int | None:
        """The body's length in bytes as Content-Length promises it.

        None where that is missing or no one number, or does not count, because the body has a transfer coding.
        """
        lengths = set(re.split(r"\s*,\s*", self.headers.get("content-length", "")))
        header = lengths.pop()
        is_number = not lengths and re.fullmatch(r"[0-9]{1,18}", header)
        return int(header) if is_number and self.coding() in ("", "identity") else None


class _Reader(asyncio.StreamReader):
    """A StreamReader that knows how many bytes have come in."""

    received = 0

    def feed_data(self, data: bytes) -> None:  # type: ignore[override]  # what every transport calls it with
        """Called by the transport."""
        self.received += len(data)
        super().feed_data(data)


class Connection:
    """One connection: requests go out, heads and bodies come in."""

    def __init__(self, place: Place, reader: _Reader, writer: asyncio.StreamWriter) -> None:
        self.place = place
        self.idle_since = 0.0
        self.is_drained = False  # the answer, though it was no image, has been read to its end
        self._reader = reader
        self._writer = writer
        self._consumed = 0

    def is_quiet(self) -> bool:
        """Whether it is open and nothing has come in that was not asked for, which would be taken for the next answer."""
        is_open = not self._writer.is_closing() and not self._reader.at_eof()
        return is_open and self._reader.received == self._consumed

    def close(self) -> None:
        """Drop it, without a farewell that the other side could delay."""
        self._writer.transport.abort()

    def send(self, head: bytes) -> None:
        """Send a request, which is a few hundred bytes."""
        self._writer.write(head)

    async def start_tls(self, context: ssl.SSLContext) -> None:
        """From now on speak TLS, through a proxy's tunnel."""
        self._consumed = self._reader.received
        await self._writer.start_tls(context, server_hostname=self.place.host)

    async def _read_line(self) -> bytes:
        try:
            line = await self._reader.readline()
        except ValueError:  # longer than LINE_BYTES
            raise BadAnswer("a line without end") from None
        self._consumed += len(line)
        if not line.endswith(b"\n"):
            raise BadAnswer("connection closed")
        return line.rstrip(b"\r\n")

    async def read_head(self) -> Head:
        """The head of the answer; those of 1xx before it (early hints) are read past."""
        lines_left = HEAD_LINES
        begin = self._consumed
        while True:
            status = re.match(rb"HTTP/1\.([0-9]) +([1-9][0-9]{2})(?: |$)", await self._read_line())
            if not status:
                raise BadAnswer("no HTTP/1")
            code = int(status[2])
            headers: dict[str, str] = {}
            last = ""
            while line := await self._read_line():
                lines_left -= 1
                if not lines_left or self._consumed - begin > HEAD_BYTES:
                    raise BadAnswer("a head without end")
                if line[:1] in (b" ", b"\t"):  # the last header goes on
                    if last:
                        headers[last] += " " + line.strip().decode("latin-1")
                    continue
                name, _, value = line.decode("latin-1").partition(":")
                last = name.strip().lower()
                text = value.strip()
                headers[last] = text if headers.get(last, text) == text else f"{headers[last]}, {text}"
            lines_left -= 1
            if not lines_left:
                raise BadAnswer("a head without end")
            if code >= 200:
                wish = headers.get("connection", "").lower()
                keeps_alive = "keep-alive" in wish if status[1] == b"0" else "close" not in wish
                return Head(code, headers, keeps_alive)

    async def read_body(self, head: Head) -> AsyncIterator[bytes]:
        """The body in pieces; BadAnswer if it ends before its time. At its end the connection may be kept, or is closed."""
        is_delimited = True
        length = head.length()
        if head.coding() == "chunked":
            async for piece in self._read_chunks():
                yield piece
        elif head.code in (204, 304):
            pass
        elif length is not None:
            async for piece in self._read_exactly(length):
                yield piece
        else:
            is_delimited = False
            while piece := await self._read_piece(CHUNK_BYTES):
                yield piece
        if not is_delimited or not head.keeps_alive:
            self.close()

    async def _read_piece(self, most: int) -> bytes:
        piece = await self._reader.read(most)
        self._consumed += len(piece)
        return piece

    async def _read_exactly(self, count: int) -> AsyncIterator[bytes]:
        left = count
        while left:
            piece = await self._read_piece(min(left, CHUNK_BYTES))
            if not piece:
                raise BadAnswer("body shorter than promised")
            left -= len(piece)
            yield piece

    async def _read_chunks(self) -> AsyncIterator[bytes]:
        while True:
            size = re.fullmatch(rb"\s*0*([0-9a-fA-F]{1,15})\s*(?:;.*)?", await self._read_line())
            if not size:
                raise BadAnswer("a chunk without a size")
            count = int(size[1], 16)
            if count == 0:
                await self._read_trailers()
                return
            async for piece in self._read_exactly(count):
                yield piece
            if await self._read_line():
                raise BadAnswer("a chunk longer than its size")

    async def _read_trailers(self) -> None:
        """Read what follows the last chunk, for the sake of the connection: the body is whole. Some servers forget its end."""
        try:
            async with asyncio.timeout(DRAIN_S):
                for _ in range(HEAD_LINES):
                    if not await self._read_line():
                        return
        except (TimeoutError, BadAnswer, OSError):
            pass
        self.close()

    async def drain(self, head: Head) -> None:
        """Read a short error page, so that the connection can be kept; close it if that would take long."""
        length = head.length()
        if length is None or length > DRAINED_BYTES or not head.keeps_alive:
            self.close()
            return
        try:
            async with asyncio.timeout(DRAIN_S):
                async for _ in self.read_body(head):
                    pass
            self.is_drained = True
        except (TimeoutError, BadAnswer, OSError):
            self.close()


async def open_connection(place: Place, addresses: list[Address], port: int, tls: ssl.SSLContext | None,
                          within_s: float = CONNECT_TIMEOUT_S) -> Connection:
    """Connect to one of `addresses`, the first that takes it, at `port`. Raises OSError (its TimeoutError, ssl's errors), or
    TooManyFiles.

    To connect may take `within_s`, and so may the TLS handshake. All but the last address have NEXT_ADDRESS_S: a machine whose
    IPv6 leads nowhere has most hosts' first address wrong. They are tried one after the other, as a host of many addresses
    could take all file descriptors otherwise.
    """
    loop = asyncio.get_running_loop()
    trouble: OSError = ConnectionRefusedError()
    for number, (family, address) in enumerate(addresses, 1):
        try:
            sock = await _connect(family, address, port, within_s if number == len(addresses) else NEXT_ADDRESS_S)
            try:
                async with asyncio.timeout(within_s):
                    reader = _Reader(LINE_BYTES, loop)
                    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
                    transport, _ = await loop.create_connection(lambda made=protocol: made, sock=sock, ssl=tls,
                                                                server_hostname=place.host if tls else None)
            except BaseException:
                sock.close()
                raise
            return Connection(place, reader, asyncio.StreamWriter(transport, protocol, reader, loop))
        except OSError as error:  # TimeoutError is one
            if error.errno in TOO_MANY_FILES:
                raise TooManyFiles from None
            trouble = error
    raise trouble


async def _connect(family: socket.AddressFamily, address: str, port: int, within_s: float) -> socket.socket:
    """A connection to one address. Raises OSError: TimeoutError when it takes longer than `within_s`."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        async with asyncio.timeout(within_s):
            await asyncio.get_running_loop().sock_connect(sock, (address, port))
    except BaseException:
        sock.close()
        raise
    return sock


class KeptConnections:
    """Connections that nobody uses at the moment, by their place: at most so many, the longest unused are closed first."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._count = 0
        self._idle: collections.OrderedDict[Place, list[Connection]] = collections.OrderedDict()

    def take(self, place: Place, now: float) -> Connection | None:
        """A connection to that place on which a request may be sent, or None."""
        kept = self._idle.get(place, [])
        while kept:
            connection = kept.pop()
            self._count -= 1
            if not kept:
                del self._idle[place]
            if connection.is_quiet() and now - connection.idle_since < IDLE_S:
                return connection
            connection.close()
        return None

    def keep(self, connection: Connection, now: float) -> None:
        """Keep the connection, if it is of use, for the next fetch."""
        if not connection.is_quiet():
            connection.close()
            return
        connection.is_drained = False
        connection.idle_since = now
        self._idle.setdefault(connection.place, []).append(connection)
        self._idle.move_to_end(connection.place)
        self._count += 1
        self.close_all_but(self.most)

    def close_old(self, now: float) -> None:
        """Close those that have not been used for IDLE_S."""
        for place, kept in list(self._idle.items()):
            if now - kept[-1].idle_since < IDLE_S:
                break  # places are in the order in which they were used last
            self._close_all(place)

    def close_all_but(self, count: int) -> None:
        """Close the longest unused until `count` are left."""
        while self._count > count:
            place = next(iter(self._idle))
            kept = self._idle[place]
            kept.pop(0).close()
            self._count -= 1
            if not kept:
                del self._idle[place]

    def _close_all(self, place: Place) -> None:
        for connection in self._idle.pop(place):
            connection.close()
            self._count -= 1
