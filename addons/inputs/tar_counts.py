"""How many pairs a tar has, as the files tell that img2dataset lays next to it, so that planning does not read the tar.

    shards/00000.tar  shards/00000.parquet  shards/00000_stats.json

The Parquet has a row for each sample that was tried, with its `key` and `status`: all of them are rows of the run, and those
that the tar lacks have no image. Without it, `successes` of the statistics are the pairs in the tar (`count` are those that
were tried, of which nothing else is known); the fields of the first pair of the first such tar then say which columns there
are, because no other file does. Whoever reads the tar finds out whether it holds what was counted.
"""
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from addons.inputs.caption_lists import CAPTION_INDEX
from addons.inputs.columnar import is_textual, reading
from addons.inputs.files import InputFile
from addons.inputs.json_lines import check_width, parse_rows

STATISTICS = "_stats.json"
MOST_STATISTICS_BYTES = 4_000_000
TAIL_BYTES = 1 << 16  # of a Parquet file, in which its footer mostly is
HEADS_BYTES = (1 << 18, 1 << 23)  # of a tar, in which its first pair is looked for
LOOKING_THREADS = 32
LOOKED_AT_ONCE = 1024


class Count(NamedTuple):
    """What a file next to a tar tells: how many rows the tar has, and which fields these have."""

    file: InputFile  # that tells it
    rows: int
    columns: tuple[str, ...]  # () where it does not tell
    sha256: str  # of what it says


def count_tars(tars: Sequence[InputFile], caption_column: str, limit: int | None) -> list[Count | None]:
    """What is known of each tar without reading it; None for one that has to be read, and behind the last row of `limit`.

    Raises Trouble (exit 3) for a file next to a tar that cannot be read.
    """
    counts: list[Count | None] = []
    rows = 0
    for count in _count_side_by_side(tars, caption_column):
        counts.append(count)
        rows += count.rows if count else 0
        if limit and rows >= limit:
            break
    counts += [None] * (len(tars) - len(counts))
    without_columns = [place for place, count in enumerate(counts) if count and not count.columns]
    first = next((place for place in without_columns if _rows_of(counts[place])), None)
    fields = find_fields(tars[first], caption_column) if first is not None else []
    for place in without_columns:
        count = counts[place]
        counts[place] = count._replace(columns=tuple(fields)) if count and fields is not None else None
    return counts


def _count_side_by_side(tars: Sequence[InputFile], caption_column: str) -> Iterator[Count | None]:
    with ThreadPoolExecutor(LOOKING_THREADS, "counting") as pool:
        for start in range(0, len(tars), LOOKED_AT_ONCE):
            yield from pool.map(lambda tar_file: count_tar(tar_file, caption_column), tars[start:start + LOOKED_AT_ONCE])


def _rows_of(count: Count | None) -> int:
    return count.rows if count else 0


def count_tar(tar_file: InputFile, caption_column: str) -> Count | None:
    """What the Parquet next to a tar tells, or else the statistics; None where neither does.

    Raises Trouble (exit 3) for a Parquet that cannot be read.
    """
    side_file = tar_file.next_to(".parquet")
    info = side_file.info()
    if info is not None:
        with reading(side_file.name):
            return _count_in_parquet(side_file, info.bytes, caption_column)
    return _count_in_statistics(tar_file.next_to(STATISTICS))


def hash_count(tar_file: InputFile, name: str) -> str:
    """The sha256 of what the file `name` next to a tar tells now, "" where it tells nothing. Raises Trouble (exit 3)."""
    if name.endswith(STATISTICS):
        count = _count_in_statistics(tar_file.next_to(STATISTICS))
        return count.sha256 if count else ""
    side_file = tar_file.next_to(".parquet")
    with reading(side_file.name):
        info = side_file.info()
        return hashlib.sha256(_read_footer(side_file, info.bytes)).hexdigest() if info else ""


# ── The Parquet ───────────────────────────────────────────────────────────────────────────────────────────────────────

def _count_in_parquet(side_file: InputFile, size: int, caption_column: str) -> Count | None:
    """The rows and columns of img2dataset's Parquet; None for any other, and where a caption may be a list."""
    footer = _read_footer(side_file, size)
    metadata = pq.read_metadata(pa.BufferReader(footer))
    schema = metadata.schema.to_arrow_schema()
    needed = ("key", "status", caption_column)
    is_plain = all(name in schema.names and is_textual(schema.field(name).type) for name in needed)
    if not is_plain or CAPTION_INDEX in schema.names:
        return None
    check_width(len(schema.names))
    return Count(side_file, metadata.num_rows, tuple(schema.names), hashlib.sha256(footer).hexdigest())


def _read_footer(side_file: InputFile, size: int) -> bytes:
    """The footer of a Parquet file of so many bytes, from its first byte to the file's end."""
    tail = side_file.read_range(max(0, size - TAIL_BYTES), size)
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if tail[-4:] != b"PAR1" or length > size:
        raise ValueError("it does not end as a Parquet file does")
    if length > len(tail):
        tail = side_file.read_range(size - length, size)
    return tail[-length:]


# ── The statistics ────────────────────────────────────────────────────────────────────────────────────────────────────

def _count_in_statistics(side_file: InputFile) -> Count | None:
    """The pairs that the statistics count in the tar; None where there are none, or not img2dataset's."""
    info = side_file.info()
    if info is None or info.bytes > MOST_STATISTICS_BYTES:
        return None
    with reading(side_file.name):
        text = side_file.read_range(0, info.bytes) if info.bytes else b""
    try:
        counts = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(counts, dict):
        return None
    successes = counts.get("successes")
    tried = counts.get("count")
    if type(successes) is not int or type(tried) is not int or not 0 <= successes <= tried:
        return None
    return Count(side_file, successes, (), hashlib.sha256(text).hexdigest())


def find_fields(tar_file: InputFile, caption_column: str) -> list[str] | None:
    """The fields of the first pair of a tar; None where they are not found, or its captions are a list. Trouble (exit 3)."""
    info = tar_file.info()
    if info is None:
        return None
    for size in HEADS_BYTES:
        with reading(tar_file.name):
            head = tar_file.read_range(0, min(size, info.bytes)) if info.bytes else b""
        text = _find_first_json(head, len(head) >= info.bytes)
        if text is not None:
            break
    if text is None:
        return None
    try:
        rows = parse_rows(text, caption_column)
    except ValueError:
        return None
    return list(rows[0]) if len(rows) == 1 and CAPTION_INDEX not in rows[0] else None


def _find_first_json(head: bytes, is_whole: bool) -> str | None:
    """The .json of the first pair in a tar's beginning, "{}" for a pair that has none; None where it is not whole there."""
    first = ""
    try:
        with tarfile.open(fileobj=io.BytesIO(head), mode="r:") as tar:
            for info in tar:
                key, _, ending = info.name.rpartition(".")
                if not info.isreg():
                    continue
                first = first or key
                if key != first:
                    return "{}"
                if info.offset_data + info.size > len(head):
                    return None
                if ending.lower() == "json":
                    return head[info.offset_data:info.offset_data + info.size].decode("utf-8-sig", "replace")
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, LookupError, TypeError, RecursionError):
        return None
    return "{}" if first and is_whole else None
