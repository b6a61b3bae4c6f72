"""Decode pictures in a child process with a time limit, for a partition at which an earlier run died or hung.

A decoder that crashes or never returns then costs one row, `crashed`, and not the run. The child is this file run as a
program; parent and child talk over pipes: a JSON line with the length of what follows, then the bytes.
"""
import contextlib
import json
import os
import pathlib
import select
import subprocess
import sys
import threading
import time
from typing import Any

LIMIT_S = 15.0  # for one picture; 50 megapixels take one or two


class IsolatedDecoder:
    """(bytes, config, target) -> RGB picture, as the script's `decode_image`, but in a child process; raises `failure`.

    Safe to call from many threads, one picture at a time.
    """

    def __init__(self, settings: dict[str, Any], failure: type[Exception]) -> None:
        self.settings, self.failure = settings, failure
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def __call__(self, data: bytes, config: Any, target: tuple[int, int] | None = None, holding: object = None) -> Any:
        """Decode; a child that ends or does not answer in time is replaced, and its picture is `crashed`."""
        with self._lock:
            child = self._child or self._start()
            deadline = time.monotonic() + LIMIT_S
            try:
                _send(child.stdin, {"target": target, "length": len(data)}, data)
                reply = json.loads(_read_line(child.stdout, deadline))
                pixels = _read_exactly(child.stdout, reply["length"], deadline)
            except (OSError, EOFError, TimeoutError, ValueError) as error:
                self.close()
                late = isinstance(error, TimeoutError)
                raise self.failure("crashed", "decoder did not return" if late else "decoder ended the process") from None
        if "status" in reply:
            raise self.failure(reply["status"], reply["detail"])
        from PIL import Image
        return Image.frombytes("RGB", tuple(reply["size"]), pixels)

    def _start(self) -> subprocess.Popen[bytes]:
        """A child that has imported what it needs (not counted in the time limit)."""
        child = subprocess.Popen([sys.executable, __file__, json.dumps(self.settings)], stdin=subprocess.PIPE,  # noqa: S603
                                 stdout=subprocess.PIPE, bufsize=0, start_new_session=True)  # Ctrl-C is the parent's to handle
        assert child.stdout
        _read_line(child.stdout, time.monotonic() + 60)
        self._child = child
        return child

    def close(self) -> None:
        """End the child."""
        if self._child:
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
            self._child = None


def _send(pipe: Any, header: dict, body: bytes) -> None:
    for part in (json.dumps(header).encode() + b"\n", body):
        view = memoryview(part)
        while view:  # an unbuffered pipe may take less than it is given
            view = view[pipe.write(view):]


def _read_some(pipe: Any, count: int, deadline: float) -> bytes:
    """At least one and at most `count` bytes; TimeoutError after the deadline, EOFError if the other end is gone."""
    ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
    if not ready:
        raise TimeoutError
    data = os.read(pipe.fileno(), min(count, 1 << 20))
    if not data:
        raise EOFError
    return data


def _read_exactly(pipe: Any, count: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < count:
        data += _read_some(pipe, count - len(data), deadline)
    return bytes(data)


def _read_line(pipe: Any, deadline: float) -> bytes:
    line = bytearray()
    while not line.endswith(b"\n"):
        line += _read_some(pipe, 1, deadline)
    return bytes(line)


def serve() -> None:
    """The child: decode what comes in on stdin until it ends."""
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
    import PIL.Image

    import image_text_sim_clip as script
    PIL.Image.init()
    config = script.Config(**json.loads(sys.argv[1]))
    source, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # a decoder that prints must not disturb the answers
    _send(answers, {"ready": True}, b"")
    while line := source.readline():
        question = json.loads(line)
        target = tuple(question["target"]) if question["target"] else None
        try:
            image = script.decode_image(source.read(question["length"]), config, target)
            _send(answers, {"size": image.size, "length": image.width * image.height * 3}, image.tobytes())
        except script.RowFailure as failure:
            _send(answers, {"status": failure.status, "detail": failure.detail, "length": 0}, b"")


if __name__ == "__main__":
    serve()
