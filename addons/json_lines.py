"""JSON Lines as a table of text: one object a line, its keys the columns, in the order in which they first appear.

Cells are text as the file has it: strings without their quotes, numbers in their own digits, true and false as words,
null and a key that is not there as an empty cell, nested values as JSON. A line that is no object, or that lacks the
URL's or the caption's key, is malformed. Used for .jsonl and .ndjson, gzipped or not.
"""
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import json as arrow_json

from addons.tables import Batch, Malformed, is_text, is_utf8, to_table

BATCH_ROWS = 8192  # rows handed over at a time
BLOCK_BYTES = 4_000_000  # of text that Arrow parses at a time
FIRST_BYTES = 1_000_000  # of text in which the columns are looked for before the first row is written
LINE_ENDS = ("\n", "\r\n", "\r", "")

_DECODER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)  # numbers keep the digits they have


def open_batches(text: Any, config: Any, known: list[str]) -> tuple[list[str], Iterator[Batch]]:
    """The columns, and the batches of rows and malformed lines.

    `text` is a text.Text, `known` the columns that an earlier try found. Where a later line has a key that `known`
    and the first FIRST_BYTES lack, the batches end with an empty table of all columns there are: begin again with them.
    """
    needed = [config.url_column, config.caption_column]
    if known:
        return list(known), _batches(text, needed, list(known), config.limit)
    columns: dict[str, None] = {}
    head = text.peek(FIRST_BYTES)
    lines = head.splitlines()
    rows = 0
    for line in lines if len(head) < FIRST_BYTES else lines[:-1]:
        values, _ = parse_line(line.decode("utf-8", text.errors), needed)
        columns.update(dict.fromkeys(values or ()))
        rows += values is not None
        if rows == config.limit:
            break
    return list(columns), _batches(text, needed, list(columns), config.limit)


def parse_line(line: str, needed: list[str]) -> tuple[dict[str, str] | None, str]:
    """One line to (cells by key, ""), or to (None, why it is no row)."""
    if not is_text(line):
        return None, "bytes that are not text"
    try:
        values = parse_object(line)
    except ValueError as error:
        return None, str(error)
    absent = [key for key in needed if key not in values]
    return (None, f"no key {absent[0]!r}") if absent else (values, "")


def parse_object(text: str) -> dict[str, str]:
    """The cells of one JSON object by key; ValueError says why it is none."""
    try:
        values = _DECODER.decode(text)
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        for key, value in values.items():
            if not isinstance(value, str):
                values[key] = "" if value is None else str(value).lower() if isinstance(value, bool) else \
                    json.dumps(json.loads(text)[key], ensure_ascii=False)  # nested: its numbers are numbers again
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    if "\\u" in text and not is_text("".join((*values, *values.values()))):
        raise ValueError("half a surrogate pair")
    return values


def _batches(text: Any, needed: list[str], columns: list[str], limit: int | None) -> Iterator[Batch]:
    total = 0
    strings: set[str] = set()
    while block := text.peek(BLOCK_BYTES):
        end = block.rfind(b"\n") + 1
        plain = parse_plain(block[:end], columns, needed, strings)
        if plain is not None:
            text.at += end
            text.line += len(plain)
        for rows, malformed in [(plain, [])] if plain else _parse_lines(text, end, needed, columns, limit and limit - total):
            yield rows, malformed
            total += len(rows)
            if rows.column_names != columns:
                return
        if limit and total >= limit:
            return


def parse_plain(block: bytes, columns: list[str], needed: list[str], strings: set[str]) -> pa.Table | None:
    """The rows of whole lines that hold nothing odd, by Arrow; None where it could see them otherwise than `parse_line`.

    Arrow keeps no number's digits: those of fractions are looked up in the text, and must give Arrow's values in its order.
    `strings` are the columns that Arrow may not take for times, learned from call to call.
    """
    lines = block.count(b"\n")
    if not lines or block.count(b"}\n{") != lines - 1 or block[:1] != b"{" or block[-2:] != b"}\n":
        return None  # objects that do not stand one on a line
    if re.search(rb"\\u[dD]", block) or re.search(rb"-0+\s*[,}]", block):
        return None  # half a character, perhaps; a whole number that is a negative zero, perhaps
    if b"\r" in block or not is_utf8(block, len(block)):
        return None
    try:
        read_options = arrow_json.ReadOptions(use_threads=False, block_size=len(block) + 1)
        fields = pa.schema([(name, pa.string()) for name in strings])
        table = arrow_json.read_json(pa.BufferReader(block), read_options, arrow_json.ParseOptions(explicit_schema=fields))
        strings.update(field.name for field in table.schema if pa.types.is_string(field.type))
        taken_for_times = {field.name for field in table.schema if pa.types.is_timestamp(field.type)}
        if taken_for_times - strings:
            strings.update(taken_for_times)
            return parse_plain(block, columns, needed, strings)
        if len(table) != lines or not set(columns).issuperset(table.column_names) or any(
                name not in table.column_names or table[name].null_count for name in needed):
            return None
        cells = [_to_text(table[name], name, block) if name in table.column_names else pa.array([""] * lines)
                 for name in columns]
        return pa.Table.from_arrays(cells, columns)
    except (pa.ArrowException, ValueError):  # ArrowInvalid is a ValueError; so is what this module raises
        strings.clear()
        return None


def _to_text(column: pa.ChunkedArray, name: str, block: bytes) -> pa.ChunkedArray:
    """A column of Arrow's as the text that the block has; ValueError where that is not sure."""
    if pa.types.is_floating(column.type):
        key = re.escape(json.dumps(name, ensure_ascii=False).encode())
        digits = re.findall(key + rb"\s*:\s*(-?[0-9][0-9.eE+-]*)", block)  # within a string the quotes would have backslashes
        there = column.is_valid().to_numpy()
        if len(digits) != np.count_nonzero(there) or not np.array_equal(
                np.array(digits, "S").astype(np.float64), column.drop_null().to_numpy()):
            raise ValueError("digits that cannot be told")
        texts = np.full(len(column), "", object)
        texts[there] = [word.decode() for word in digits]
        return pa.chunked_array([pa.array(texts, pa.string())])
    if pa.types.is_nested(column.type):
        raise ValueError("nested")
    return column.cast(pa.string()).fill_null("")


def _parse_lines(text: Any, size: int, needed: list[str], columns: list[str], limit: int | None) -> Iterator[Batch]:
    """Batches of the next `size` bytes of lines, one line at least; ends with all columns where a line has new ones."""
    passed, total, lines = 0, 0, text.lines()
    while passed < max(size, 1) and (batch := list(itertools.islice(lines, BATCH_ROWS))):
        passed += sum(map(len, batch))
        first = text.line - len(batch)
        malformed: list[Malformed] = []
        try:
            table = to_table([_scan(line, columns) for line in batch], columns)
        except (StopIteration, ValueError, TypeError, AttributeError, RecursionError):  # some line is not plain
            table, malformed, new = _parse_carefully(batch, first, needed, columns, limit and limit - total)
            if new:
                left = limit and limit - total - len(table)
                yield to_table([], _all_columns(lines, needed, [*columns, *new], left)), []
                return
        total += len(table)
        yield table, malformed
        if limit and total >= limit:
            return


def _scan(line: str, columns: list[str]) -> list[str]:
    """The cells of a plain line: an object with these very keys in this order, and nothing around it; else an exception."""
    values, end = _DECODER.scan_once(line, 0)  # type: ignore[attr-defined]
    if line[end:] not in LINE_ENDS or list(values) != columns:
        raise ValueError
    return list(values.values())  # of which to_table refuses what is no string


def _parse_carefully(batch: list[str], first: int, needed: list[str], columns: list[str], limit: int | None) \
        -> tuple[Any, list[Malformed], list[str]]:
    """Up to `limit` rows of a batch, its malformed lines, and the keys that are no column yet; `first` is its line number."""
    rows: list[list[str]] = []
    malformed: list[Malformed] = []
    new: dict[str, None] = {}
    for number, line in enumerate(batch, first):
        if limit is not None and len(rows) == limit:
            break
        if not line.strip(" \t\r\n"):
            continue
        values, reason = parse_line(line, needed)
        if values is None:
            malformed.append((len(rows), number, reason, line.rstrip("\r\n")))
        else:
            new.update((key, None) for key in values if key not in columns)
            rows.append([values.get(column, "") for column in columns])
    return to_table(rows, columns), malformed, list(new)


def _all_columns(lines: Iterator[str], needed: list[str], columns: list[str], limit: int | None) -> list[str]:
    """`columns`, and behind them the keys that the next `limit` rows have more."""
    found = dict.fromkeys(columns)
    rows = (values for line in lines if (values := parse_line(line, needed)[0]))
    for values in itertools.islice(rows, limit):
        found.update(dict.fromkeys(values))
    return list(found)
