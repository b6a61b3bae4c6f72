"""A loopback web for benchmarks: JPEGs of about 60 kB after a wait, and servers that fail, on a port that it prints.

    python tests/slow_server.py FOLDER WAIT_S     # the JPEGs of FOLDER, in turns; ends when its standard input closes

A path may say otherwise: /KIND/WAIT_MS/anything, with one of the kinds below.
"""
import asyncio
import collections
import itertools
import os
import pathlib
import sys
import time

NEVER_S = 120  # how long who does not answer, or drips, keeps on
ALLOWED_PER_S = 20  # of a host with a limit


class Web:
    """Answers by what the path says."""

    def __init__(self, folder, wait_s):
        self.images = itertools.cycle([path.read_bytes() for path in sorted(pathlib.Path(folder).glob("*.jpg"))])
        self.wait_s = wait_s
        self.allowed = collections.defaultdict(collections.deque)  # host -> when it answered within the last second

    async def serve(self, reader, writer):
        """One connection."""
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                line, *headers = head.decode("latin-1").split("\r\n")
                host = next((header[5:].strip() for header in headers if header.lower().startswith("host:")), "")
                parts = line.split(" ")[1].split("/")
                is_kind = len(parts) > 3 and hasattr(self, parts[1])
                kind = parts[1] if is_kind else "ok"
                await asyncio.sleep(int(parts[2]) / 1000 if is_kind else self.wait_s)
                await getattr(self, kind)(writer, host, "/".join(parts[3:]))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    def answer(self, writer, body=b"", code="200 OK", kind="image/jpeg", more=""):
        """One whole answer."""
        writer.write(f"HTTP/1.1 {code}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body)

    async def ok(self, writer, host, rest):
        """An image."""
        self.answer(writer, next(self.images))

    async def gone(self, writer, host, rest):
        """404."""
        self.answer(writer, b"no such page", "404 Not Found", "text/plain")

    async def broken(self, writer, host, rest):
        """500."""
        self.answer(writer, b"sorry", "500 Internal Server Error", "text/plain")

    async def moved(self, writer, host, rest):
        """A redirect to an image."""
        self.answer(writer, b"", "302 Found", more=f"Location: /ok/50/{rest}\r\n")

    async def page(self, writer, host, rest):
        """HTML where an image should be."""
        self.answer(writer, b"<!DOCTYPE html><html>a page</html>", kind="text/html")

    async def never(self, writer, host, rest):
        """No answer."""
        await asyncio.sleep(NEVER_S)
        raise ConnectionError

    async def drip(self, writer, host, rest):
        """An image that comes byte by byte, two a second."""
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: 100000\r\n\r\n")
        for _ in range(2 * NEVER_S):
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.5)
        raise ConnectionError

    async def limited(self, writer, host, rest):
        """An image, but no more than ALLOWED_PER_S from that host."""
        now = time.monotonic()
        log = self.allowed[host]
        while log and now - log[0] > 1:
            log.popleft()
        if len(log) < ALLOWED_PER_S:
            log.append(now)
            self.answer(writer, next(self.images))
        else:
            self.answer(writer, b"slow down", "429 Too Many Requests", "text/plain")


async def main(folder, wait_s):
    """Serve until standard input ends."""
    web = Web(folder, wait_s)
    server = await asyncio.start_server(web.serve, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    os._exit(0)  # without a word about the connections that are still open


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2])))
