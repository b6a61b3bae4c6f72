"""A loopback server for benchmarks: every path is a JPEG of about 60 kB, answered after a wait, on a port that it prints.

    python tests/slow_server.py FOLDER WAIT_S     # the JPEGs of FOLDER, in turns; ends when its standard input closes
"""
import asyncio
import itertools
import pathlib
import sys


async def main(folder, wait_s):
    """Serve until standard input ends."""
    images = itertools.cycle([path.read_bytes() for path in sorted(pathlib.Path(folder).glob("*.jpg"))])

    async def answer(reader, writer):
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                await asyncio.sleep(wait_s)
                data = next(images)
                head = f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
                writer.write(head.encode() + data)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2])))
