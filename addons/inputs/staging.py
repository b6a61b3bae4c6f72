"""Text tables become the output's pairs.parquet: any number of files, one after the other, each with its own line numbers.

Columns are those of all files together, in the order in which they first appear; what a file lacks is "" in its rows, or what
the names of its folders say (`lang=en/`).
"""
import contextlib
import dataclasses
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from addons.inputs import Manifest
from addons.inputs.caption_lists import CAPTION_INDEX, count_staged
from addons.inputs.columnar import constant_cells, find_data_uris
from addons.inputs.files import InputFile, as_text
from addons.inputs.text import HashingFile, Text, TextTable, find_first_bad_byte
from addons.stores import SCHEME
from image_text_sim_clip import (
    EXIT_INPUT,
    MAX_COLUMNS,
    BadRows,
    Config,
    StagedTable,
    Trouble,
    atomic_file,
    column_name,
    say,
)

MOST_EMPTY_BYTES = 100  # of a file that holds nothing, compressed or not
TYPES = {"int": r"^(-?\d{1,18})?$", "float": r"^(-?\d+(\.\d+)?([eE][+-]?\d+)?)?$", "bool": r"^(true|false)?$"}

OpenTable = Callable[[Config, list[str]], TextTable]  # see text.TextReader


class FileOfBadRows(BadRows):
    """bad_rows.csv of a set of files: the name of its file before each line."""

    columns = ("file", "line", "reason", "text")


@dataclasses.dataclass
class Staged:
    """What one pass over the files has staged, and whether it came to its end."""

    columns: list[str]  # more than the pass was begun with: it ended there
    has_lists: bool  # whether the column caption_index is a caption's place in its list
    rows: int = 0
    malformed: int = 0
    literal_lines: int = 0
    has_data_uris: bool = False
    types: dict[str, str] = dataclasses.field(default_factory=dict)  # of columns that are not text as far as was read
    files: list[Manifest] = dataclasses.field(default_factory=list)
    cuts: list[int] = dataclasses.field(default_factory=list)


class Reading(NamedTuple):
    """A file of the input, and the config that reads it."""

    file: InputFile
    config: Config
    may_have_lists: bool  # of captions: a CSV has none, and a column caption_index of its own is like any other


def stage_files(kind: str, open_table: OpenTable, found: list[InputFile], config: Config, output: pathlib.Path,
                types: dict[str, str] | None = None) -> Manifest:
    """Stage the files; returns what the manifest says of them (see CsvReader, which does it for a script alone)."""
    files = leave_out_empty(found, config.encoding)
    readings = [Reading(file, dataclasses.replace(config, csv_path=file.path),
                        kind != "csv" and not file.path.lower().endswith(".csv")) for file in files]
    columns = _find_columns(readings, open_table)
    is_first = True
    while True:
        staged = _stage_once(readings, open_table, columns, is_first, config, output, types or {})
        if staged.columns == columns:
            break
        columns = staged.columns
        is_first = False
    described = {"kind": kind, "columns": columns, "rows": staged.rows, "malformed": staged.malformed,
                 "literal_lines": staged.literal_lines, "files": staged.files}
    if staged.cuts:
        described["cuts"] = staged.cuts
    if staged.types:
        described["types"] = staged.types
    if staged.has_lists:
        described["input_rows"] = count_staged(output / "pairs.parquet")
    if staged.has_data_uris:
        described["holds_images"] = True
    return described


def leave_out_empty(found: list[InputFile], encoding: str) -> list[InputFile]:
    """The files of a set less those that hold nothing, as many programs write shards; the first one where all are empty.

    Nothing are blanks, and a JSON array without elements, compressed or not. Raises Trouble (exit 3) for a damaged file.
    """
    return [file for file in found if len(found) == 1 or not _is_empty(file, encoding)] or found[:1]


def _is_empty(file: InputFile, encoding: str) -> bool:
    info = file.info()
    if info is None or info.bytes > MOST_EMPTY_BYTES:
        return False
    words = Text(file.path, encoding).peek(MOST_EMPTY_BYTES).split()
    return not words or (".json" in file.path.lower() and words in ([b"[]"], [b"[", b"]"]))


def _find_columns(readings: list[Reading], open_table: OpenTable) -> list[str]:
    """The columns that the files' heads show, those that their folders name at the end."""
    columns: dict[str, None] = {}
    for reading in readings:
        columns.update(dict.fromkeys(open_table(reading.config, []).columns))
    for reading in readings:
        columns.update(dict.fromkeys(dict(reading.file.folder_columns)))
    check_width(columns)
    return list(columns)


def check_width(columns: dict[str, None]) -> None:
    """Raise Trouble (exit 3) for files that have more columns together than a table of pairs."""
    if len(columns) > MAX_COLUMNS:
        raise Trouble(EXIT_INPUT, f"the files have more than {MAX_COLUMNS} different columns together: no table of pairs")


def _stage_once(readings: list[Reading], open_table: OpenTable, columns: list[str], is_first: bool, config: Config,
                output: pathlib.Path, types: dict[str, str]) -> Staged:
    """Write pairs.parquet and bad_rows.csv; ends early where a file has columns that are not among `columns`."""
    has_lists = CAPTION_INDEX in columns and any(reading.may_have_lists for reading in readings)
    staged = Staged(columns, has_lists, types=dict(types))
    if has_lists:
        staged.types[CAPTION_INDEX] = "int"
    with atomic_file(output / "bad_rows.csv") as bad_file, atomic_file(output / "pairs.parquet") as staged_file:
        bad = (FileOfBadRows if len(readings) > 1 else BadRows)(bad_file, config.escape_formulas)
        table = StagedTable(staged_file, columns)
        try:
            for reading in readings:
                if config.limit and staged.rows >= config.limit:
                    break
                _FileStager(reading, config, staged, bad, table).stage(open_table, [] if is_first else columns)
                if staged.columns != columns:
                    break
            table.finish()
        finally:
            table.close()
    staged.malformed = bad.count
    staged.cuts = table.cuts
    return staged


class _FileStager:
    """Stages one file behind the others."""

    def __init__(self, reading: Reading, config: Config, staged: Staged, bad: BadRows, table: StagedTable) -> None:
        self.file = reading.file
        self.config = reading.config
        self.limit = config.limit
        self.staged = staged
        self.bad = bad
        self.table = table
        self.folder_columns = dict(reading.file.folder_columns)

    def stage(self, open_table: OpenTable, known: list[str]) -> None:
        """Add the file's rows; where it has new columns, `staged.columns` has them afterwards, and nothing else counts."""
        staged = self.staged
        identity = describe_file(self.file)
        own = [name for name in known if name not in self.folder_columns]
        text = open_table(self.config, own)
        first_row = staged.rows
        first_undecodable = self.bad.undecodable
        self.bad.place = (as_text(self.file.name),) if isinstance(self.bad, FileOfBadRows) else ()
        for batch, malformed in text.batches:
            if set(batch.column_names) - set(staged.columns):
                columns = dict.fromkeys([*staged.columns, *batch.column_names])
                check_width(columns)
                staged.columns = list(columns)
                return
            left = self.limit - staged.rows if self.limit else len(batch) + 1
            self._append(batch.slice(0, left))
            for before, line, reason, raw in malformed:
                if before < left:  # what comes after the last row is not even judged
                    self.bad.add(line, reason, raw)
            if staged.rows == self.limit:
                break
        literal_lines = text.literal_lines()
        staged.literal_lines += literal_lines
        self._tell(self.bad.undecodable - first_undecodable, literal_lines)
        for remark in text.remarks():
            say(remark)
        staged.files.append({"name": self.file.name, "rows": staged.rows - first_row, **identity,
                             "sha256": text.sha256()})
        now = describe_file(self.file)
        if any(now.get(key) != identity.get(key) for key in ("bytes", "mtime_ns", "version")):
            raise Trouble(EXIT_INPUT, f"{self.file.path} was written to or replaced while it was read: run the same command "
                                      "again when it is complete")

    def _append(self, batch: pa.Table) -> None:
        staged = self.staged
        cells = [self._cells(batch, name) for name in staged.columns]
        rows = pa.Table.from_arrays(cells, names=staged.columns)
        if not staged.has_data_uris:
            staged.has_data_uris = bool(find_data_uris(rows[column_name(self.config.url_column)]).any())
        for name in [name for name, kind in staged.types.items() if name in staged.columns and not has_type(rows[name], kind)]:
            staged.types.pop(name)
        self.table.append(rows)
        staged.rows += len(rows)

    def _cells(self, batch: pa.Table, name: str) -> pa.ChunkedArray:
        """A column of the batch; of one that it lacks what the folder says, or else nothing."""
        default = self.folder_columns.get(name, "0" if name == CAPTION_INDEX and self.staged.has_lists else "")
        if name not in batch.column_names:
            return constant_cells(default, len(batch))
        cells = batch[name]
        if name in self.folder_columns:
            is_empty = pc.equal(cells, "")
            cells = pc.if_else(is_empty, default, cells)
        return cells

    def _tell(self, undecodable: int, literal_lines: int) -> None:
        """Say what is odd about the whole file."""
        path = self.config.csv_path
        if undecodable:
            offset = find_first_bad_byte(path, self.config.encoding)
            say(f"{undecodable} lines of {path} are not {self.config.encoding}; the first such byte is at offset {offset} "
                "(if the file is latin-1, set encoding: latin-1)")
        if literal_lines:
            say(f"{literal_lines} lines of {path} are rows only if their quotes are text, and were read so; if that is true of "
                "all its quotes, set quoting: none")


def has_type(cells: pa.ChunkedArray, kind: str) -> bool:
    """Whether all cells of a column are of that type, or empty."""
    return bool(pc.all(pc.match_substring_regex(cells, TYPES[kind])).as_py() is not False)


def describe_file(file: InputFile) -> Manifest:
    """Size and times of a file, which change with its content. Raises Trouble (exit 3) where it is gone."""
    info = file.info()
    if info is None:
        raise Trouble(EXIT_INPUT, f"cannot read csv_path {file.path}: no such file")
    described: Manifest = {"bytes": info.bytes, "mtime_ns": info.mtime_ns}
    if info.version:
        described["version"] = info.version
    if not SCHEME.match(file.path):  # a write that keeps the modification time still moves the change time
        with contextlib.suppress(OSError):  # a glob, of the images of a folder
            described["ctime_ns"] = pathlib.Path(file.path).stat().st_ctime_ns
    return described


def hash_file(file: InputFile) -> str:
    """The sha256 of a file as it is stored."""
    with file.open() as opened:
        return HashingFile(opened).sha256()


def has_changed(file: InputFile, entry: Manifest) -> bool:
    """Whether a file is another than the manifest's `entry` says: by size and times at once, else by its sha256."""
    try:
        described = describe_file(file)
        if all(entry.get(key) == value for key, value in described.items()):
            return False
        return bool(described["bytes"] != entry["bytes"] or hash_file(file) != entry["sha256"])
    except (OSError, Trouble):
        return True
