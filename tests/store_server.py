"""An S3 server on loopback (moto), and what tests do with its buckets."""
import contextlib
import itertools
import os
import pathlib
import socket
import subprocess
import sys
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
