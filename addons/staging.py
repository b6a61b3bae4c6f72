"""Text tables (CSV, TSV, JSON Lines, gzipped or not) into one Parquet under the output, in one streaming pass.

Rows go to pairs.parquet, malformed records to bad_rows.csv. How the text is read is the business of text.py.
"""
import contextlib
import csv
import functools
import hashlib
import io
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from addons import tables, text

STAGE_ROWS = 8192  # rows of one row group: what is held in memory at a time, and what the script reads at a time


def stage(config: Any, kind: str, output: pathlib.Path, trouble: Callable[[str], Exception], say: Callable[[str], None],
          atomic_file: Callable[[pathlib.Path], Any], known: Iterable[str] = ()) -> dict:
    """Stage the table at `config.csv_path`, of `kind` csv or jsonl; `known` are columns that an earlier try found.

    Returns what the manifest says of the input: kind, columns, rows, malformed, files (name, rows, bytes, time, sha256).
    """
    path, rows, malformed, undecodable = pathlib.Path(config.csv_path), 0, 0, 0
    info = path.stat()
    sha256, columns, batches = text.open_table(config, kind, known, separator(config),
                                               functools.partial(name_columns, config=config, trouble=trouble), trouble)
    found = columns
    with atomic_file(output / "bad_rows.csv") as bad_file, atomic_file(output / "pairs.parquet") as staged_file:
        bad = csv.writer(io.TextIOWrapper(bad_file, "utf-8", "backslashreplace", "", write_through=True), lineterminator="\n")
        bad.writerow(("line", "reason", "text"))
        with staged_table(staged_file, columns) as write:
            for table, records in batches:
                if (found := table.column_names) != columns:
                    break
                left = config.limit - rows if config.limit else len(table) + 1
                write(table := table.slice(0, left))
                rows += len(table)
                for before, line, reason, raw in records:
                    if before < left:  # what comes after the last row is not even judged
                        malformed += 1
                        undecodable += any("\ud800" <= character <= "\udfff" for character in raw)
                        bad.writerow((line, reason, raw[:1000]))
                if rows == config.limit:
                    break
    if found != columns:  # JSON Lines: late lines have keys that the first ones lack, and all are known now
        return stage(config, kind, output, trouble, say, atomic_file, found)
    if undecodable:
        say(f"{undecodable} lines of {path} are not {config.encoding}; the first such byte is at offset "
            f"{tables.find_first_bad_byte(path, config.encoding)} (if the file is latin-1, set encoding: latin-1)")
    file = {"name": path.name, "rows": rows, "bytes": info.st_size, "mtime_ns": info.st_mtime_ns, "sha256": sha256()}
    return {"kind": kind, "columns": columns, "rows": rows, "malformed": malformed, "files": [file]}


def same_table(described: dict, csv_path: str) -> list[str]:
    """Whether the table is still what was staged: its size and time, or else its sha256; what differs, in words."""
    path, file = pathlib.Path(csv_path), described["files"][0]
    if not path.is_file():
        return [f"the input {path} is gone"]
    info = path.stat()
    if (info.st_size, info.st_mtime_ns) == (file["bytes"], file["mtime_ns"]):
        return []
    with path.open("rb") as content:
        same = hashlib.file_digest(content, "sha256").hexdigest() == file["sha256"]
    return [] if same else [f"the content of {path} has changed"]


def name_columns(first: Sequence[str], config: Any, trouble: Callable[[str], Exception]) -> list[str]:
    """The columns' names, all different, from a table's first record; raises `trouble` unless both needed are there once."""
    numbered = isinstance(config.url_column, int)
    if not first:
        raise trouble(f"{config.csv_path} has no readable {'row' if numbered else 'header line'}")
    names = [f"column_{n}" for n in range(len(first))] if numbered else [name.strip() for name in first]
    for key in ("url_column", "caption_column"):
        wanted = f"column_{getattr(config, key)}" if numbered else getattr(config, key)
        if names.count(wanted) != 1:
            problem = "has no column" if wanted not in names else "has more than one column"
            raise trouble(f"{config.csv_path} {problem} {wanted!r} ({key}); its columns: {', '.join(names)[:300]}")
    unique: list[str] = []
    for name in names:
        copies = (f"{name}_{n}" for n in itertools.count(2))
        unique.append(name if name not in unique else next(c for c in copies if c not in unique + names))
    return unique


def separator(config: Any) -> str:
    """The character between two fields."""
    is_tsv = config.csv_path.lower().removesuffix(".gz").endswith(".tsv")
    return config.separator if config.separator != "auto" else "\t" if is_tsv else ","


@contextlib.contextmanager
def staged_table(file: BinaryIO, columns: list[str]) -> Iterator[Callable[[Any], None]]:
    """Give a function that appends tables of text to the Parquet `file`, in row groups of STAGE_ROWS, beside the parsing."""
    schema = pa.schema([(name, pa.string()) for name in columns])
    held, writing = schema.empty_table(), None
    with pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=False) as writer, ThreadPoolExecutor(1) as pool:
        def write(rows: Any, last: bool = False) -> None:
            nonlocal held, writing
            held = pa.concat_tables([held, rows])
            whole = len(held) - (0 if last else len(held) % STAGE_ROWS)
            if writing:
                writing.result()  # no more than one block waits to be written
            writing = pool.submit(writer.write_table, held.slice(0, whole), STAGE_ROWS) if whole else None
            held = held.slice(whole)
        yield write
        write(schema.empty_table(), last=True)
        if writing:
            writing.result()
