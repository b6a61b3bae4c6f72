"""Many GETs from S3 at a time by one thread of its own, whose event loop waits for all of them.

As many threads as requests would spend most of their time on the interpreter's lock: 64 of them took 2.4 ms of CPU for a GET,
this takes a tenth of it. aiohttp and botocore come with s3fs. What is not a plain answer is left to s3fs, as in s3_reader.py.
"""
import asyncio
import atexit
import contextlib
import functools
import random
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

import aiohttp
import botocore.exceptions
import yarl

from addons.stores.s3_reader import CONNECT_S, FIRST_WAIT_S, READ_S, TRIES, NotPlain, S3Reader

REQUESTS = 64  # at a time, of small objects


class Wanted(NamedTuple):
    """The bytes [start, stop) of an object."""

    bucket: str
    key: str
    start: int
    stop: int


class ManyReader:
    """Reads objects of S3, many at a time."""

    def __init__(self, reader: S3Reader, at_once: int) -> None:
        self._reader = reader
        self._at_once = at_once
        self._loop = asyncio.new_event_loop()
        self._session: aiohttp.ClientSession | None = None
        self._may_ask = asyncio.Semaphore(at_once)
        self._tasks: set[asyncio.Task[None]] = set()
        threading.Thread(target=self._loop.run_forever, name="reading many", daemon=True).start()
        atexit.register(self._close)

    def submit(self, wanted: Sequence[Wanted]) -> "list[Future[bytes]]":
        """The bytes of each of these ranges, fewer where its object ends before; each fails as `S3Reader.read` does."""
        futures: list[Future[bytes]] = [Future() for _ in wanted]
        self._loop.call_soon_threadsafe(self._begin, wanted, futures)  # once for all: each call wakes the other thread
        return futures

    def _begin(self, wanted: Sequence[Wanted], futures: "list[Future[bytes]]") -> None:
        for one, future in zip(wanted, futures, strict=True):
            task = self._loop.create_task(self._read(one, future))
            self._tasks.add(task)  # or nobody would hold it
            task.add_done_callback(self._tasks.discard)

    async def _read(self, wanted: Wanted, future: "Future[bytes]") -> None:
        async with self._may_ask:
            if not future.set_running_or_notify_cancel():
                return
            try:
                data = await self._try(wanted)
            except Exception as error:  # whoever waits for it gets it
                future.set_exception(error)
            else:
                future.set_result(data)

    async def _try(self, wanted: Wanted) -> bytes:
        headers = {"Range": f"bytes={wanted.start}-{wanted.stop - 1}", "Accept-Encoding": "identity"}
        if self._session is None:
            self._session = _open_session(self._at_once)
        for attempt in range(TRIES):
            if attempt:
                await asyncio.sleep(FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))  # noqa: S311 - no secret
            try:
                data = await self._ask(self._session, self._reader.sign(wanted.bucket, wanted.key), headers)
            except botocore.exceptions.BotoCoreError as error:
                raise NotPlain from error
            except aiohttp.ClientSSLError as error:
                raise NotPlain from error
            except (aiohttp.ClientError, TimeoutError):  # a connection that fails, or a body that is cut short
                continue
            if data is not None:
                return data
        raise NotPlain

    @staticmethod
    async def _ask(session: aiohttp.ClientSession, url: str, headers: dict[str, str]) -> bytes | None:
        """The answer's bytes, None for one that is worth another try. Raises FileNotFoundError and NotPlain."""
        async with session.get(yarl.URL(url, encoded=True), headers=headers, allow_redirects=False) as answer:
            data = await answer.read()
        if answer.status in (200, 206):
            return data
        if answer.status == 404 and b"NoSuchKey" in data:
            raise FileNotFoundError("no such object")
        if answer.status < 500 and answer.status != 429:
            raise NotPlain
        return None

    def _close(self) -> None:
        """Close the connections, or Python would complain of them at its end."""
        if self._session is not None:
            with contextlib.suppress(Exception):  # nothing is lost by it
                asyncio.run_coroutine_threadsafe(self._session.close(), self._loop).result(timeout=1)


def _open_session(connections: int) -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(sock_connect=CONNECT_S, sock_read=READ_S)
    connector = aiohttp.TCPConnector(limit=connections)
    return aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False, trust_env=True)


@functools.cache
def open_many(reader: S3Reader, at_once: int, process: int) -> ManyReader:
    """What reads many objects with the settings of `reader`, so many at a time, in this process."""
    return ManyReader(reader, at_once)
