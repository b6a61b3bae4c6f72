"""Inputs of every kind. Text tables are staged (staging.py); Parquet files and webdataset tars (tars.py) are read where they
lie, planned from metadata alone.

`csv_path` may be one file, a folder, a glob (`shards/*.parquet`), or a pattern with numbers (`shards/{00000..00099}.tar`).
`describe` says once what there is (for manifest.json), `open_rows` reads rows by number, and `same_input` tells at the
next start whether the input is still what was described.
"""
import bisect
import glob
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

PLANNING_THREADS = 8  # footers are read side by side: on a network disk each costs a round trip
MOST_FILES = 10_000_000  # of one pattern; {0..9999999999} is a slip

Trouble = Callable[[str], Exception]  # makes the script's Trouble for an input that cannot be used, from one line


def kind_of(csv_path: str) -> str:
    """Which reader `csv_path` asks for: csv or jsonl, which are staged, or shards (Parquet, tars), read where they lie."""
    path, name = pathlib.Path(csv_path), csv_path.lower().removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson")):
        return "jsonl"
    is_shards = name.endswith((".parquet", ".tar", ".tgz")) or path.is_dir()
    return "shards" if is_shards or (re.search(r"[*?{\[]", csv_path) and not path.is_file()) else "csv"


def check_there(csv_path: str, trouble: Trouble) -> None:
    """Raise `trouble` where there is no input, before anything is made for it."""
    if kind_of(csv_path) == "shards":
        find_files(csv_path, trouble)
    elif not pathlib.Path(csv_path).is_file():
        raise trouble(f"csv_path {csv_path!r} is no file here (in {pathlib.Path.cwd().name}/)")


def describe(config: Any, output: pathlib.Path, trouble: Trouble, say: Callable[[str], None], atomic_file: Any) -> dict:
    """What the manifest says of the input: kind, columns, rows, malformed, files; text is staged into `output` on the way."""
    kind = kind_of(config.csv_path)
    if kind == "shards":
        return describe_shards(config, trouble, say)
    from addons import staging
    return staging.stage(config, kind, output, trouble, say, atomic_file)


def describe_shards(config: Any, trouble: Trouble, say: Callable[[str], None]) -> dict:
    """What `csv_path` holds: kind, columns, rows, malformed, files (name, rows, bytes, mtime_ns); `starts` for tars.

    `config` gives csv_path, url_column, caption_column and limit. The same files give the same description. `starts`
    are the row numbers at which a partition has to begin; what is wrong with some file or column is told by `say`.
    """
    kind, files = find_files(config.csv_path, trouble)
    if isinstance(config.url_column, int):
        raise trouble("url_column and caption_column must be names: a table of this kind has a header")
    if kind == "tar":
        from addons import tars
        described = tars.describe(files, config, trouble, say)
    else:
        described = _describe_parquet(files, config, trouble, say)
    return _cut_to_limit(described, config.limit)


def open_rows(described: dict, config: Any, trouble: Trouble, failure: type[Exception]) -> Any:
    """A reader of the rows that `described` counts, with `read(start, stop)` to a DataFrame of text, "" for NULL.

    For tars it also has `sources(start, stop)`, one name per row, and `read_bytes(source)`, safe to call from many
    threads, which raises failure(status, detail) for an image that is not there or damaged.
    """
    kind, files = find_files(config.csv_path, trouble)
    files = files[:len(described["files"])]  # `limit` may leave some out
    if kind == "tar":
        from addons import tars
        return tars.TarRows(described, files, config, trouble, failure)
    return ParquetRows(described, files, trouble)


def same_input(described: dict, config: Any) -> list[str]:
    """What differs between the input described and the one that is there now, in words; nothing if it is the same."""
    if described["kind"] in ("csv", "jsonl"):
        from addons import staging
        kind = kind_of(config.csv_path)
        if kind != described["kind"]:
            return [f"the input was {described['kind']}, now {kind}"]
        return staging.same_table(described, config.csv_path)
    try:
        kind, files = find_files(config.csv_path, ValueError)
    except ValueError as error:
        return [str(error)]
    if kind != described["kind"]:
        return [f"the input was {described['kind']}, now {kind}"]
    recorded = {file["name"]: file for file in described["files"]}
    found = dict(files[:len(recorded)] if config.limit else files)
    words = [f"{name} is gone" for name in recorded if name not in found]
    words += [f"{name} is new" for name in found if name not in recorded]
    for name, file in recorded.items():
        if name in found and any(file[key] != value for key, value in identify(found[name]).items()):
            words.append(f"{name} has changed")
    return words if len(words) <= 3 else [*words[:3], f"and {len(words) - 3} more files of the input differ"]


def identify(path: pathlib.Path) -> dict:
    """Size and time of a shard, and of the Parquet that img2dataset lays beside a tar."""
    info = path.stat()
    identity: dict[str, Any] = {"bytes": info.st_size, "mtime_ns": info.st_mtime_ns}
    beside = path.with_suffix(".parquet")
    if path.suffix == ".tar":
        identity["beside"] = [beside.stat().st_size, beside.stat().st_mtime_ns] if beside.is_file() else None
    return identity


# ── Which files ───────────────────────────────────────────────────────────────────────────────────────────────────────

def find_files(csv_path: str, trouble: Trouble) -> tuple[str, list[tuple[str, pathlib.Path]]]:
    """The kind (parquet or tar) and the (name, path) of each file, in order; names are relative to the folder they share."""
    paths = list(dict.fromkeys(_expand(csv_path, trouble)))
    if not paths:
        raise trouble(f"csv_path {csv_path!r} names no .parquet or .tar file here (in {pathlib.Path.cwd().name}/)")
    kinds = {path.suffix.lower() for path in paths}
    if len(kinds) != 1 or not kinds <= {".parquet", ".tar"}:
        hint = "; tars must not be compressed, because images are read from their midst" if kinds & {".gz", ".tgz"} else ""
        raise trouble(f"csv_path {csv_path!r} must name .parquet or .tar files, not {' and '.join(sorted(kinds))}{hint}")
    absent = [path for path in paths if not path.is_file()]
    if absent:
        raise trouble(f"csv_path {csv_path!r}: {absent[0].name} is no file here" +
                      (f", nor are {len(absent) - 1} more" if absent[1:] else ""))
    parent = pathlib.Path(os.path.commonpath([path.parent for path in paths]))
    return kinds.pop()[1:], [(path.relative_to(parent).as_posix(), path) for path in paths]


def _expand(csv_path: str, trouble: Trouble) -> Iterable[pathlib.Path]:
    path = pathlib.Path(csv_path)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith((".", "_"))]
        tars = [file for file in files if file.suffix.lower() == ".tar"]  # img2dataset lays a Parquet beside each
        return tars or [file for file in files if file.suffix.lower() == ".parquet"]
    names = [csv_path]
    while match := re.search(r"\{(\d+)\.\.(\d+)\}", names[0]):
        first, last = match.groups()
        numbers = range(int(first), int(last) + 1)
        if len(numbers) * len(names) > MOST_FILES:
            raise trouble(f"csv_path {csv_path!r} stands for {len(numbers) * len(names)} files")
        names = [name.replace(match[0], str(n).zfill(len(first)), 1) for name in names for n in numbers]
        if not names:
            return []
    if any(re.search(r"[*?\[]", name) for name in names[:1]):
        return [pathlib.Path(found) for name in names for found in sorted(glob.glob(name, recursive=True))]  # noqa: PTH207 - absolute, too
    return map(pathlib.Path, names)


def _cut_to_limit(described: dict, limit: int | None) -> dict:
    """The description of the first `limit` rows: files after them are left out, so that they may change."""
    if limit is None or described["rows"] <= limit:
        return described
    starts = itertools.accumulate((file["rows"] for file in described["files"]), initial=0)
    files = [file for file, start in zip(described["files"], starts, strict=False) if start < limit]
    cut = {"starts": [start for start in described["starts"] if start < limit]} if "starts" in described else {}
    return {**described, "rows": limit, "files": files, **cut}


# ── Parquet ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def _describe_parquet(files: list[tuple[str, pathlib.Path]], config: Any, trouble: Trouble, say: Callable[[str], None]) -> dict:
    needed = dict.fromkeys((config.url_column, config.caption_column))
    columns: dict[str, None] = {}
    left_out: set[str] = set()
    described = []

    def look(file: tuple[str, pathlib.Path]) -> tuple[list[tuple[str, bool]], dict]:
        metadata = read_footer(*file, trouble)
        fields = [(field.name, is_textual(field.type)) for field in metadata.schema.to_arrow_schema()]
        return fields, {"name": file[0], "rows": metadata.num_rows, **identify(file[1])}

    with ThreadPoolExecutor(PLANNING_THREADS) as pool:
        for fields, file in pool.map(look, files):
            names = [name for name, _ in fields]
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise trouble(f"{file['name']} has more than one column {sorted(twice)[0]!r}")
            for name in needed:
                if (name, True) not in fields:
                    problem = "is no text in" if name in names else "is not among the columns of"
                    raise trouble(f"{name!r} {problem} {file['name']}: {', '.join(names)[:300]}")
            columns.update((name, None) for name, textual in fields if textual)
            left_out.update(name for name, textual in fields if not textual)
            described.append(file)
    if left_out:
        say(f"columns that are neither text nor numbers stay behind: {', '.join(sorted(left_out))[:300]}")
    return {"kind": "parquet", "columns": list(columns), "rows": sum(file["rows"] for file in described), "malformed": 0,
            "files": described, "left_out": sorted(left_out)}


def read_footer(name: str, path: pathlib.Path, trouble: Trouble) -> Any:
    """A file's FileMetaData; its schema has been read as well, so that a footer with flaws is found here."""
    try:
        metadata = pq.read_metadata(path)
        metadata.schema.to_arrow_schema()
        return metadata
    except (OSError, ValueError, pa.ArrowException) as error:  # ArrowInvalid is a ValueError, ArrowNotImplemented is none
        raise trouble(f"cannot read {name}: {error}") from None


def is_textual(kind: pa.DataType) -> bool:
    """Whether cells of this type have one plain text: strings, numbers, truth values, dates and times."""
    types = pa.types
    if types.is_dictionary(kind):
        return is_textual(kind.value_type)
    return any(test(kind) for test in (types.is_string, types.is_large_string, types.is_string_view, types.is_integer,
                                       types.is_floating, types.is_boolean, types.is_decimal, types.is_date,
                                       types.is_time, types.is_timestamp, types.is_null))


def to_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Any textual column as strings, "" for NULL; bytes that are no UTF-8, which Parquet lets pass, become U+FFFD."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_null(column.type):
        return pa.chunked_array([pa.array([""] * len(column), pa.string())])
    text = column.cast(pa.string()).fill_null("")
    try:
        text.validate(full=True)
    except pa.ArrowInvalid:
        cells = [cell.as_py().decode("utf-8", "replace") for cell in text.cast(pa.binary())]
        return pa.chunked_array([pa.array(cells, pa.string())])
    return text


class ParquetRows:
    """Rows of Parquet files by number. One decoded row group is kept, so that consecutive partitions decode it once."""

    def __init__(self, described: dict, files: list[tuple[str, pathlib.Path]], trouble: Trouble) -> None:
        self.columns, self.files, self.trouble = described["columns"], files, trouble
        self.rows = [file["rows"] for file in described["files"]]
        self.starts = list(itertools.accumulate(self.rows, initial=0))  # of each file, and the end
        self._forget()

    def _forget(self) -> None:
        self._file: tuple[int, Any, list[int]] = (-1, None, [])  # which, opened, first row of each row group and the end
        self._group: tuple[int, int, Any] = (-1, -1, None)  # of which file, which, as a table of text

    def __getstate__(self) -> dict:
        """Without open files: an engine may send the reader to another process."""
        state = self.__dict__.copy()
        state["_file"], state["_group"] = (-1, None, []), (-1, -1, None)
        return state

    def read(self, start: int, stop: int) -> Any:
        """Rows [start, stop) as a pandas DataFrame of text columns; a column that a file lacks is "" there."""
        pieces = [self._empty(), *self._pieces(start, stop)]
        return pa.concat_tables(pieces).to_pandas()

    def _pieces(self, start: int, stop: int) -> Iterator[pa.Table]:
        while start < stop:
            n = bisect.bisect_right(self.starts, start) - 1
            groups = self._open(n)
            row = start - self.starts[n]
            g = bisect.bisect_right(groups, row) - 1
            end = min(groups[g + 1], stop - self.starts[n])
            yield self._decode(n, g).slice(row - groups[g], end - row)
            start += end - row

    def _open(self, n: int) -> list[int]:
        if self._file[0] != n:
            name, path = self.files[n]
            metadata = read_footer(name, path, self.trouble)
            if metadata.num_rows != self.rows[n]:
                raise self.trouble(f"{name} has changed since the run was planned")
            sizes = (metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))
            groups = list(itertools.accumulate(sizes, initial=0))
            if groups[-1] != metadata.num_rows:
                raise self.trouble(f"cannot read {name}: its footer counts {metadata.num_rows} rows and {groups[-1]}")
            self._file = (n, pq.ParquetFile(path, metadata=metadata), groups)
        return self._file[2]

    def _decode(self, n: int, g: int) -> pa.Table:
        if self._group[:2] != (n, g):
            self._group = (-1, -1, None)  # the old one goes before the new one comes
            opened = self._file[1]
            textual = {field.name for field in opened.schema_arrow if is_textual(field.type)}
            try:
                table = opened.read_row_group(g, columns=[name for name in self.columns if name in textual])
                if (rows := len(table)) != self._file[2][g + 1] - self._file[2][g]:
                    raise ValueError("a row group has not the rows that its footer counts")
                cells = [to_text(table[name]) if name in textual else pa.chunked_array([pa.array([""] * rows, pa.string())])
                         for name in self.columns]
            except (OSError, ValueError, pa.ArrowException) as error:
                raise self.trouble(f"cannot read {self.files[n][0]}: {error}") from None
            self._group = (n, g, pa.Table.from_arrays(cells, schema=self._empty().schema))
        return self._group[2]

    def _empty(self) -> pa.Table:
        return pa.schema([(name, pa.string()) for name in self.columns]).empty_table()
