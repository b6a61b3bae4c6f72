"""Many GETs from S3 at a time by one thread of its own, whose event loop waits for all of them.

As many threads as requests would spend most of their time on the interpreter's lock: 64 of them took 2.4 ms of CPU for a GET,
this takes 0.2 ms. aiohttp and botocore come with s3fs. What is not a plain answer is left to s3fs, as in s3_reader.py.
"""
import asyncio
import atexit
import contextlib
import functools
import random
import threading
from concurrent.futures import Future

import aiohttp
import botocore.exceptions
import yarl

from addons.stores.s3_reader import CONNECT_S, FIRST_WAIT_S, READ_S, TRIES, NotPlain, S3Reader

REQUESTS = 64  # at a time


class ManyReader:
    """Reads objects of S3, many at a time."""

    def __init__(self, reader: S3Reader) -> None:
        self._reader = reader
        self._loop = asyncio.new_event_loop()
        self._session: aiohttp.ClientSession | None = None
        self._may_ask = asyncio.Semaphore(REQUESTS)
        threading.Thread(target=self._loop.run_forever, name="reading many", daemon=True).start()
        atexit.register(self._close)

    def submit(self, bucket: str, key: str, start: int, stop: int | None) -> "Future[bytes]":
        """The bytes [start, stop) of an object, all of it without `stop`; fails as `S3Reader.read` does."""
        return asyncio.run_coroutine_threadsafe(self._read(bucket, key, start, stop), self._loop)

    async def _read(self, bucket: str, key: str, start: int, stop: int | None) -> bytes:
        headers = {} if stop is None else {"Range": f"bytes={start}-{stop - 1}"}
        async with self._may_ask:
            if self._session is None:
                self._session = _open_session()
            for attempt in range(TRIES):
                if attempt:
                    await asyncio.sleep(FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))  # noqa: S311 - no secret
                try:
                    data = await self._ask(self._session, self._reader.sign(bucket, key), headers)
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


def _open_session() -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(sock_connect=CONNECT_S, sock_read=READ_S)
    connector = aiohttp.TCPConnector(limit=REQUESTS)
    return aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False, trust_env=True)


@functools.cache
def open_many(reader: S3Reader, process: int) -> ManyReader:
    """What reads many objects with the settings of `reader`, in this process."""
    return ManyReader(reader)
