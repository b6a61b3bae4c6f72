"""An S3 server on loopback (moto), and what tests do with its buckets."""
import contextlib
import hashlib
import http.client
import http.server
import itertools
import json
import os
import pathlib
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse

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

    def uploads(self):
        """The keys of objects that were sent in part."""
        return [found["Key"] for found in self.fs.list_multipart_uploads(self.name)]

    def names(self, prefix=""):
        found = self.fs.find(f"{self.name}/{prefix}")
        return [path.removeprefix(f"{self.name}/") for path in found]


REFUSALS = {"503": (503, "SlowDown", "Please reduce your request rate."), "403": (403, "AccessDenied", "Access Denied"),
            "expired": (400, "ExpiredToken", "The provided token has expired."),
            "409": (409, "ConditionalRequestConflict", "The conditional request cannot succeed: a conflict."),
            "invalid": (400, "InvalidToken", "The provided token is malformed or otherwise not valid."),
            "501": (501, "NotImplemented", "A header you provided implies functionality that is not implemented")}


class FaultyProxy:
    """Between client and server: every n-th request meets a fault, in turn; so many and no more.

    `503`: SlowDown instead of an answer. `reset`: the connection is reset. `cut`: the answer ends within its body.
    `lost`: the request takes effect, and the connection is reset before the answer. `403`: AccessDenied. `expired`: the
    session's token is no longer valid. Only requests for which `only(method, path)` holds are counted, if it is given.
    """

    KINDS = ("503", "reset", "cut", "lost")

    def __init__(self, endpoint, every=10, kinds=KINDS, only=None):
        self._server = endpoint.removeprefix("http://")
        self._every = every
        self._only = only or (lambda method, path: True)
        self._kinds = itertools.cycle(kinds)
        self._count = itertools.count(1)
        self.met = dict.fromkeys(kinds, 0)
        self.requests = []  # (method, path, bytes of the answer's body)
        self.codings = set()  # the Accept-Encoding of all of them
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
        counts = self._every and self._only(request.command, urllib.parse.unquote(request.path))
        kind = next(self._kinds) if counts and next(self._count) % self._every == 0 else ""
        body = self._read_body(request)
        self.codings.add(request.headers.get("Accept-Encoding"))
        if kind:
            self.met[kind] += 1
        if kind == "reset":
            self._reset(request)
            return
        if kind in REFUSALS:
            status, code, message = REFUSALS[kind]
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
            self._answer(request, status, {"Content-Type": "application/xml"}, body.encode())
            return
        connection = http.client.HTTPConnection(self._server, timeout=60)
        hop_by_hop = ("transfer-encoding", "expect")
        headers = {name: value for name, value in request.headers.items() if name.lower() not in hop_by_hop}
        headers["Content-Length"] = str(len(body))
        connection.request(request.command, request.path, body=body, headers=headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        self.requests.append((request.command, request.path, len(content)))
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


class DatasetHub:
    """A dataset on a Hub: the few calls that hf://datasets/owner/name/... needs."""

    def __init__(self, files):
        self.requests = []
        self.refusal = None  # (status, headers) of the answer to whatever is asked of the Hub's API
        hub = self
        commit = "c" * 40

        def describe(name):
            return {"type": "file", "path": name, "oid": hashlib.sha1(files[name]).hexdigest(), "size": len(files[name])}

        def list_tree(folder, is_recursive):
            start = f"{folder}/" if folder else ""
            below = sorted(name for name in files if name.startswith(start))
            folders = {start + name.removeprefix(start).partition("/")[0] for name in below if "/" in name.removeprefix(start)}
            own = below if is_recursive else [name for name in below if "/" not in name.removeprefix(start)]
            return [{"type": "directory", "path": name, "oid": "d" * 40, "size": 0} for name in sorted(folders)] + [
                describe(name) for name in own]

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self, status, body, headers=()):
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": commit, **dict(headers)}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def answer_json(self, content):
                self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

            def do_GET(self):
                path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
                hub.requests.append(f"{self.command} {self.path}")
                rest = path.removeprefix("/api/datasets/owner/name")
                if hub.refusal and path.startswith("/api/"):
                    self.answer(hub.refusal[0], b"{}", hub.refusal[1])
                    return
                if path.startswith("/datasets/owner/name/resolve/"):
                    self.send_file(path.split("/", 6)[6])
                elif rest == path:
                    self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                elif rest.startswith("/tree/"):
                    self.answer_json(list_tree("/".join(rest.split("/")[3:]), "recursive=true" in self.path.lower()))
                else:
                    self.answer_json({"_id": "0" * 24, "id": "owner/name", "sha": commit, "private": False, "tags": [],
                                      "downloads": 0, "likes": 0, "siblings": []})
            do_HEAD = do_GET

            def do_POST(self):
                hub.requests.append(f"POST {self.path}")
                asked = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                names = asked.get("paths") or []
                found = [describe(name) for name in names if name in files]
                found += [{"type": "directory", "path": name, "oid": "d" * 40} for name in names
                          if any(file.startswith(f"{name}/") for file in files)]
                self.answer_json(found)

            def send_file(self, name):
                if name not in files:
                    self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                    return
                body = files[name]
                headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "Accept-Ranges": "bytes"}
                asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
                if asked:
                    first = int(asked[1])
                    part = body[first:int(asked[2]) + 1]
                    headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(body)}"
                    self.answer(206, part, headers)
                else:
                    self.answer(200, body, headers)
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
