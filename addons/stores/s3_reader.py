"""GETs from S3 at a quarter of what they cost through s3fs, whose 2.7 ms of a CPU would be the limit for small images.

botocore, which s3fs brings, signs a URL (0.2 ms) with the credentials that it finds and renews, for whatever endpoint and
region it was told; urllib3, which requests brings, asks for it over connections that stay open. What is not a plain answer is
left to s3fs, which knows what it means.
"""
import functools
import json
import random
import time
from typing import Any

import botocore.config
import botocore.exceptions
import botocore.session
import urllib3

from image_text_sim_clip import Json

KNOWN_OPTIONS = {"key", "secret", "token", "anon", "profile", "endpoint_url", "config_kwargs", "client_kwargs"}
TRIES = 6
FIRST_WAIT_S = 0.1  # before a second try; doubled each time
URL_HOLDS_S = 900
CONNECT_S = 10.0
READ_S = 30.0


class NotPlain(Exception):
    """An answer, or a setting, that s3fs had better deal with."""


class S3Reader:
    """Reads objects of S3, from any thread."""

    def __init__(self, options: Json, connections: int) -> None:
        session = botocore.session.Session(profile=options.get("profile"))
        if options.get("key"):
            session.set_credentials(options["key"], options.get("secret"), options.get("token"))
        signing = botocore.UNSIGNED if options.get("anon") else "s3v4"
        config = botocore.config.Config(**{"signature_version": signing, **options.get("config_kwargs", {})})
        endpoint = {"endpoint_url": options["endpoint_url"]} if options.get("endpoint_url") else {}
        self._client = session.create_client("s3", config=config, **{**endpoint, **options.get("client_kwargs", {})})
        timeout = urllib3.Timeout(CONNECT_S, READ_S)
        self._http = urllib3.PoolManager(num_pools=8, maxsize=connections, retries=False, timeout=timeout)

    def sign(self, bucket: str, key: str) -> str:
        """A URL that may be asked for the object. Raises BotoCoreError where there are no credentials."""
        url: str = self._client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key},
                                                       ExpiresIn=URL_HOLDS_S)
        return url

    def read(self, bucket: str, key: str, start: int, stop: int | None) -> bytes:
        """The bytes [start, stop) of an object, fewer where it ends before; all of it without `stop`.

        Raises FileNotFoundError, and NotPlain for what s3fs is to try itself.
        """
        if not {".", ".."}.isdisjoint(key.split("/")):  # urllib3 would take these for steps in folders, and ask for another
            raise NotPlain
        headers = {} if stop is None else {"Range": f"bytes={start}-{stop - 1}"}
        for attempt in range(TRIES):
            if attempt:
                time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))  # noqa: S311 - no secret
            try:
                answer = self._http.request("GET", self.sign(bucket, key), headers=headers, decode_content=False)
            except botocore.exceptions.BotoCoreError as error:
                raise NotPlain from error
            except urllib3.exceptions.HTTPError:  # a connection that fails, or a body that is cut short
                continue
            if answer.status in (200, 206):
                return answer.data
            if answer.status == 404 and b"NoSuchKey" in answer.data:
                raise FileNotFoundError(f"no such object: {key}")
            if answer.status < 500 and answer.status != 429:
                break
        raise NotPlain


@functools.cache
def open_reader(options: str, connections: int, process: int) -> S3Reader | None:
    """The reader for these options of s3fs, as JSON; None for options that it does not know."""
    chosen: dict[str, Any] = json.loads(options)
    if chosen.keys() - KNOWN_OPTIONS:
        return None
    try:
        return S3Reader(chosen, connections)
    except (botocore.exceptions.BotoCoreError, TypeError, ValueError):
        return None
