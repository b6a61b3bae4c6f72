"""`cache_path`: what was fetched, for a rerun or another model. An entry is whole, or it counts as not there.

An entry is a file named by the sha256 of its URL: a line of JSON with the body's length and hash and whether its server opts
out, and then the body. A file of another kind, a damaged one, or one that cannot be read is fetched anew and overwritten.
"""
import contextlib
import hashlib
import json
import os
import pathlib
import threading

from image_text_sim_clip import RowFailure, Trouble, as_path, in_store, say

KIND = "image_text_sim_clip 1"
HEAD_BYTES = 512  # more than the line of JSON takes


class Cache:
    """A folder of entries, safe to share among threads and processes."""

    def __init__(self, folder: str, max_bytes: int, respect_opt_out: bool) -> None:
        self._folder = as_path(folder)
        self._max_bytes = max_bytes
        self._respect_opt_out = respect_opt_out
        self._has_told = False

    def _path(self, url: str) -> pathlib.Path:
        name = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
        return self._folder / name[:2] / name

    def read(self, url: str) -> bytes | None:
        """The body kept for `url`, None for none that can be used; RowFailure (opted_out) if its server is to be respected."""
        try:
            path = self._path(url)
            is_file = in_store(path) or path.is_file()
            if not is_file or path.stat().st_size > self._max_bytes + HEAD_BYTES:
                return None
            line, _, body = path.read_bytes().partition(b"\n")
            head = json.loads(line) if len(line) < HEAD_BYTES else {}
            is_whole = head["kind"] == KIND and head["bytes"] == len(body) and head["hash"] == _hash(body)
            if not is_whole or len(body) > self._max_bytes:
                return None
            opted_out = bool(head["opted_out"])
        except (OSError, Trouble, ValueError, KeyError, TypeError):  # Trouble: an object store that does not answer
            return None
        if opted_out and self._respect_opt_out:
            raise RowFailure("opted_out", "X-Robots-Tag")
        return body

    def keep(self, url: str, body: bytes, opted_out: bool) -> None:
        """Keep `body`; a disk that refuses keeps nothing of it, which is said once and is no reason to lose the image.

        A page, or nothing at all, is not kept: servers send such instead of an image while they think that one is a robot.
        """
        if body[:64].lstrip()[:1] in (b"", b"<"):
            return
        path = self._path(url)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        head = {"kind": KIND, "bytes": len(body), "hash": _hash(body), "opted_out": opted_out}
        try:
            if in_store(path):
                path.write_bytes(json.dumps(head).encode() + b"\n" + body)
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                file.write(json.dumps(head).encode() + b"\n")
                file.write(body)
            unfinished.replace(path)
        except OSError as error:
            if not self._has_told:
                self._has_told = True
                reason = error.strerror or error
                say(f"warning: cannot write {self._folder}: {reason}: what is fetched is not kept in cache_path")
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)

    def forget(self, url: str) -> None:
        """Drop what is kept for `url`, because its server has opted out since."""
        with contextlib.suppress(OSError):
            self._path(url).unlink(missing_ok=True)


def _hash(body: bytes) -> str:
    return hashlib.blake2b(body, digest_size=16).hexdigest()
