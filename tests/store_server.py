"""An S3 server on loopback (moto), and what tests do with its buckets."""
import contextlib
import http.client
import http.server
import itertools
import os
import pathlib
import socket
import struct
import subprocess
import sys
import threading
import time

import fsspec

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "AKIATESTKEYOFTESTS", "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-tests",
               "AWS_DEFAULT_REGION": "us-east-1"}
_NUMBERS = itertools.count(1)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@contextlib.contextmanager
def s3_server():
    """Start moto's server; yields its URL."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_port(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def wait_for_port(port):
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise AssertionError("the server does not start")


class Bucket:
    """A new, empty bucket."""

    def __init__(self, endpoint):
        self.endpoint = endpoint
        self.name = f"bucket-{os.getpid()}-{next(_NUMBERS)}"
        self.fs = fsspec.filesystem("s3", endpoint_url=endpoint, key=CREDENTIALS["AWS_ACCESS_KEY_ID"],
                                    secret=CREDENTIALS["AWS_SECRET_ACCESS_KEY"], use_listings_cache=False)
        self.fs.mkdir(self.name)

    def url(self, path=""):
        return f"s3://{self.name}/{path}".rstrip("/")

    def put(self, path, data):
        self.fs.pipe_file(f"{self.name}/{path}", data)
        return self.url(path)

    def put_folder(self, folder, prefix):
        for path in sorted(pathlib.Path(folder).rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return self.url(prefix)

    def read(self, path):
        return self.fs.cat_file(f"{self.name}/{path}")

    def names(self, prefix=""):
        found = self.fs.find(f"{self.name}/{prefix}")
        return [path.removeprefix(f"{self.name}/") for path in found]


class FaultyProxy:
    """Between client and server: every n-th request meets a fault, in turn; so many and no more.

    `503`: SlowDown instead of an answer. `reset`: the connection is reset. `cut`: the answer ends within its body.
    `lost`: the request takes effect, and the connection is reset before the answer.
    """

    KINDS = ("503", "reset", "cut", "lost")

    def __init__(self, endpoint, every=10, kinds=KINDS):
        self._server = endpoint.removeprefix("http://")
        self._every = every
        self._kinds = itertools.cycle(kinds)
        self._count = itertools.count(1)
        self.met = dict.fromkeys(kinds, 0)
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do(self):
                proxy.handle(self)
            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = do

            def log_message(self, *_):
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):
                pass
        self._listener = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._listener.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._listener.server_address[1]}"

    def close(self):
        self._listener.shutdown()
        self._listener.server_close()

    def handle(self, request):
        number = next(self._count)
        kind = next(self._kinds) if self._every and number % self._every == 0 else ""
        body = self._read_body(request)
        if kind:
            self.met[kind] += 1
        if kind == "reset":
            self._reset(request)
            return
        if kind == "503":
            self._answer(request, 503, {}, b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your "
                                           b"request rate.</Message></Error>")
            return
        connection = http.client.HTTPConnection(self._server, timeout=60)
        hop_by_hop = ("transfer-encoding", "expect")
        headers = {name: value for name, value in request.headers.items() if name.lower() not in hop_by_hop}
        headers["Content-Length"] = str(len(body))
        connection.request(request.command, request.path, body=body, headers=headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if kind == "lost":
            self._reset(request)
            return
        self._answer(request, answer.status, dict(answer.getheaders()), content, is_cut=kind == "cut")

    @staticmethod
    def _read_body(request):
        if request.headers.get("Expect", "").lower() == "100-continue":
            request.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if request.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(request.rfile.readline().split(b";")[0], 16):
                body += request.rfile.read(size)
                request.rfile.readline()
            request.rfile.readline()
            return body
        return request.rfile.read(int(request.headers.get("Content-Length") or 0))

    @staticmethod
    def _reset(request):
        request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.close_connection = True
        request.connection.close()

    @staticmethod
    def _answer(request, status, headers, content, is_cut=False):
        request.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                request.send_header(name, value)
        length = headers.get("Content-Length") or headers.get("content-length") or str(len(content))
        request.send_header("Content-Length", length if request.command == "HEAD" else str(len(content)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content[:len(content) // 2] if is_cut else content)
        request.wfile.flush()
        if is_cut:
            request.close_connection = True
            request.connection.shutdown(socket.SHUT_WR)
