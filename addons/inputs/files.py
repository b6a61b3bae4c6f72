"""Which files an input is made of, which reader fits them, and what all readers share that read files where they lie.

`csv_path` may be one file, a folder (read with its subfolders), a glob (`shards/*.parquet`), or a pattern with numbers or
words in braces (`shards/{00000..00099}.tar`, `{train,val}.csv`).
"""
import bisect
import contextlib
import glob
import itertools
import os
import pathlib
import posixpath
import re
import stat
import typing
import urllib.parse
from collections.abc import Callable, Container, Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from addons.inputs import Manifest, Reader, Rows
from addons.inputs.compression import MAGIC_BYTES, name_compression, plain_suffix, strip_compression
from addons.inputs.left_aside import LeftAside, kind_by_ending
from addons.stores import SCHEME, FileInfo, Store, find_store
from image_text_sim_clip import EXIT_INPUT, Config, Trouble

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

MOST_FILES = 10_000_000  # of one pattern; {0..9999999999} is a slip
MOST_DIFFERENCES = 3  # that are named one by one
FEW_FILES = 16  # of which each is asked for by itself; of more the folders are listed
NUMBERS = re.compile(r"(\d{1,18})\.\.(\d{1,18})(?:\.\.(\d{1,9}))?")  # first, last, step
BRACES = re.compile(r"\{(\d{1,18}\.\.\d{1,18}(?:\.\.\d{1,9})?|[^{}]*,[^{}]*)\}")
RUN_MARK = re.compile(r"\.lock(-\d+)?")  # a folder with such a file is what a run writes, and none of its input
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"  # what Hive and Spark name the folder of NULL
NOTES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # what `datasets` says of its tables
LOGS = ("_delta_log", ".hoodie")  # of tables (Delta Lake, Hudi) some of whose files may have been replaced by others
LOST = "lost+found"  # which the top folder of a disk has, and only root may enter
MOST_LOOKED_INTO = 100  # of files that no reader fits
WILDCARD = re.compile(r"[*?\[]")


class InputFile(NamedTuple):
    """A file of the input."""

    name: str  # relative to the folder that all files of the input share: what manifest.json and messages say
    path: str
    folder_columns: tuple[tuple[str, str], ...] = ()  # what the names of its folders say: for `lang=en`, ("lang", "en")

    @property
    def in_store(self) -> bool:
        """Whether it lies in an object store, where it may be replaced as a whole at any moment."""
        return SCHEME.match(self.path) is not None

    def info(self) -> FileInfo | None:
        """Size and time; None if there is no such file."""
        return find_store(self.path).info(self.path)

    def open(self) -> BinaryIO:
        """The file's bytes, for random access."""
        return find_store(self.path).open(self.path)

    def open_native(self) -> "pa.NativeFile":
        """The file's bytes, for Arrow."""
        return find_store(self.path).open_native(self.path)

    def read_range(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop), fewer where the file ends before; one request where it lies in an object store."""
        read: Callable[[str, int, int], bytes] | None = getattr(find_store(self.path), "read_range", None)
        if read:
            return read(self.path, start, stop)
        with self.open() as file:
            file.seek(start)
            return file.read(stop - start)

    def next_to(self, suffix: str) -> "InputFile":
        """The file of the same name with another suffix, which may be there or not."""
        return InputFile(self.name.rpartition(".")[0] + suffix, self.path.rpartition(".")[0] + suffix)


def is_other(info: FileInfo, planned: Manifest) -> bool:
    """Whether a file is another than its entry in manifest.json says, which has no version if it was planned elsewhere."""
    return bool(info.bytes != planned["bytes"] or planned.get("version", info.version) != info.version)


def as_text(name: str) -> str:
    r"""A file's name for messages and cells; bytes that are no UTF-8, which Python has as lone surrogates, become \xe9."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


# ── From csv_path to files ────────────────────────────────────────────────────────────────────────────────────────────

def expand_path(csv_path: str) -> list[str]:
    """The paths that `csv_path` stands for, each once, in order; those that are written out may not be there."""
    store = find_store(csv_path)
    if store.info(csv_path):
        return [csv_path]
    if store.is_folder(csv_path):
        below = list_below(csv_path)
        _refuse_log(csv_path, below.hidden_folders)
        return below.files
    paths = expand_braces(csv_path)
    if paths and WILDCARD.search(paths[0]):
        found = list(itertools.chain.from_iterable(map(store.glob, paths)))
        with listing(found):
            paths = [path for path in found if store.info(path)]
    return list(dict.fromkeys(paths))


@contextlib.contextmanager
def listing(paths: Sequence[str]) -> Iterator[None]:
    """While in this context, what a store is asked about many files is answered from one look at each of their folders."""
    remember = getattr(find_store(paths[0]), "remember", None) if len(paths) > FEW_FILES else None
    if remember is None:
        yield
        return
    with remember({path.rpartition("/")[0] for path in paths}):
        yield


def expand_braces(csv_path: str) -> list[str]:
    """`x{08..10}` to x08, x09, x10, `{a,b}` to a and b; every pair of braces in turn. Trouble (exit 3) for too many files."""
    paths = [csv_path]
    while paths and (braces := BRACES.search(paths[0])):
        count = len(_expand(braces[1])) * len(paths)
        if count > MOST_FILES:
            raise Trouble(EXIT_INPUT, f"csv_path {csv_path!r} stands for {count} files")
        paths = [path.replace(braces[0], word, 1) for path, word in itertools.product(paths, _expand(braces[1]))]
    return paths


def _expand(inside: str) -> Sequence[str]:
    """What stands between braces, spelled out."""
    numbers = NUMBERS.fullmatch(inside)
    if not numbers:
        return inside.split(",")
    first, last, step = numbers.groups()
    return Numbers(range(int(first), int(last) + 1, int(step or 1) or 1), len(first))


class Numbers(Sequence[str]):
    """Numbers as text with leading zeros."""

    def __init__(self, numbers: range, width: int) -> None:
        self._numbers = numbers
        self._width = width

    def __len__(self) -> int:
        return len(self._numbers)

    @typing.overload
    def __getitem__(self, place: int) -> str: ...
    @typing.overload
    def __getitem__(self, place: slice) -> Sequence[str]: ...

    def __getitem__(self, place: int | slice) -> str | Sequence[str]:
        if isinstance(place, slice):
            return [str(number).zfill(self._width) for number in self._numbers[place]]
        return str(self._numbers[place]).zfill(self._width)


class Below(NamedTuple):
    """What lies in a folder and its subfolders, in order; hidden are names that begin with a dot or an underline."""

    files: list[str]
    hidden_files: list[str]
    hidden_folders: list[str]


def list_below(folder: str) -> Below:
    """The files in a folder and, at any depth, in its subfolders; each folder once, whatever links lead to it."""
    store = find_store(folder)
    below = Below([], [], [])
    known: set[str] = set()
    waiting = [folder.rstrip("/") or "/"]
    while waiting:
        here = waiting.pop()
        real = os.path.realpath(here)
        if real in known:
            continue
        known.add(real)
        try:
            files, folders = _list_folder(store, here)
        except OSError as error:
            raise Trouble(EXIT_INPUT, f"cannot read the folder {here}: {error.strerror or error}") from None
        names = {path.rpartition("/")[2] for path in files}
        if any(map(RUN_MARK.fullmatch, names)) and here != folder.rstrip("/"):
            below.hidden_folders.append(here)  # the output of a run, this one's perhaps
            continue
        if any(map(RUN_MARK.fullmatch, names)) and "manifest.json" in names:
            raise Trouble(EXIT_INPUT, f"csv_path {folder!r} is the output of a run, which holds each row several times: name "
                                      f"one of its files, such as {folder.rstrip('/')}/scores.csv")
        for path in files:
            (below.hidden_files if is_hidden(path) else below.files).append(path)
        for path in reversed(folders):
            if is_hidden(path):
                below.hidden_folders.append(path)
            else:
                waiting.append(path)
    below.files.sort()
    return below


def name_inside(folder: str, path: str) -> str:
    """The path of what lies in a folder, counted from there, however the folder is spelled (`./data`, `data//`)."""
    return posixpath.relpath(path, folder)


def _list_folder(store: Store, folder: str) -> tuple[list[str], list[str]]:
    """The files in a folder itself, and the folders in it, both sorted; one request to a store that tells both at once."""
    list_both: Callable[[str], list[tuple[str, FileInfo | None]]] | None = getattr(store, "list_folder", None)
    if list_both:
        listed = sorted(list_both(folder))
        return [path for path, info in listed if info], [path.rstrip("/") for path, info in listed if not info]
    files = store.list_files(folder)
    known_files = set(files)
    others = [*store.glob(f"{glob.escape(folder)}/*"), *store.glob(f"{glob.escape(folder)}/.*")]
    return files, [path for path in others if path not in known_files and store.is_folder(path)]


def is_hidden(path: str) -> bool:
    """Whether the name of a file or folder says that it is none of the data."""
    name = path.rpartition("/")[2]
    return name.startswith((".", "_")) or name == LOST


def count_fixed_folders(csv_path: str) -> int:
    """How many names of folders are no column's: those of the folder `csv_path`, or those before its first wildcard."""
    is_folder = find_store(csv_path).is_folder(csv_path)
    names = [name for name in csv_path.split("/") if name not in ("", ".")]
    return len(names if is_folder else list(itertools.takewhile(lambda name: not re.search(r"[*?\[{]", name), names)))


def folder_columns(fixed_folders: int, path: str) -> tuple[tuple[str, str], ...]:
    """What the names of a path's folders say after so many of them: ("lang", "en") for `lang=en`."""
    folders = [name for name in path.split("/") if name not in ("", ".")][fixed_folders:-1]
    columns: dict[str, str] = {}
    for folder in folders:
        name, equals, value = folder.partition("=")
        if equals and name:
            columns[urllib.parse.unquote(name)] = "" if value == NO_VALUE else urllib.parse.unquote(value)
    return tuple(columns.items())


def list_files(csv_path: str, reader: Reader) -> list[InputFile]:
    """The files that `reader` has to read, in order. Raises Trouble (exit 3) unless there are any, and all are there."""
    paths = expand_path(csv_path)
    if find_store(csv_path).is_folder(csv_path):
        paths = fitting(reader, paths)
    if not paths:
        raise _name_nothing(csv_path, [reader])
    _refuse_twins(paths)
    with listing(paths):
        absent = [path for path in paths if find_store(path).info(path) is None]
    if absent:
        name = csv_path if paths == [csv_path] else absent[0].rpartition("/")[2]
        more = f", nor are there {len(absent) - 1} others" if absent[1:] else ""
        if not SCHEME.match(absent[0]):
            _refuse_locked(absent[0])
        raise Trouble(EXIT_INPUT, f"csv_path {csv_path!r}: no such file: {name}{more}{_where(csv_path)}")
    shared = _count_shared_folders(paths)
    if paths == [csv_path]:
        return [InputFile(csv_path.rpartition("/")[2], csv_path)]
    fixed = count_fixed_folders(csv_path)
    return [InputFile("/".join(path.split("/")[shared:]), path, folder_columns(fixed, path)) for path in paths]


def _refuse_locked(path: str) -> None:
    """Raise Trouble (exit 3) for a file that may well be there, but in a folder that may not be entered, and for a pipe."""
    try:
        mode = pathlib.Path(path).stat().st_mode
        if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            raise Trouble(EXIT_INPUT, f"csv_path {path} is a pipe or a device, which is not read: write a file first")
    except PermissionError as error:
        raise Trouble(EXIT_INPUT, f"cannot read csv_path {path}: {error.strerror}") from None
    except (OSError, ValueError):
        return


def _refuse_log(folder: str, hidden_folders: list[str]) -> None:
    """Raise Trouble (exit 3) for a folder whose files alone do not tell which of their rows count."""
    for log in hidden_folders:
        if log.rpartition("/")[2] in LOGS:
            name = name_inside(folder, log)
            raise Trouble(EXIT_INPUT, f"csv_path {folder!r} holds a table of which {name}/ alone tells what files count, and "
                                      "it is not read: write the table anew as Parquet, or name files with a pattern such as "
                                      f"{folder.rstrip('/')}/*.parquet to read them all")


def _refuse_twins(paths: list[str]) -> None:
    """Raise Trouble (exit 3) for a file that is there compressed, too: its rows would be read twice."""
    plain: dict[str, str] = {}
    for path in paths:
        twin = plain.setdefault(strip_compression(path), path)
        if twin != path and twin.lower() != path.lower():
            first, second = (name.rpartition("/")[2] for name in (twin, path))
            raise Trouble(EXIT_INPUT, f"{first} and {second} are one table, compressed and not: name the one that is meant")


def find_left_aside(csv_path: str, reader: Reader, used: Container[str] = ()) -> LeftAside:
    """What lies in the folder `csv_path` and below besides the files that `reader` reads, those that belong to them, and those
    `used` besides.

    Nothing for a path that is no folder: a glob or a pattern names what it means.
    """
    left_aside = LeftAside()
    store = find_store(csv_path)
    if store.info(csv_path) or not store.is_folder(csv_path):
        return left_aside
    below = list_below(csv_path)
    side_suffixes = reader.side_suffixes if isinstance(reader, InPlaceReader) else ()
    read = set(fitting(reader, below.files))
    stems = {path.rpartition(".")[0] for path in read}
    for path in below.files:
        belongs = path.lower().endswith(side_suffixes) and path.rpartition(".")[0] in stems
        if path not in read and not belongs and path not in used:
            left_aside.add(kind_by_ending(path), name_inside(csv_path, path))
    for path in below.hidden_files:
        left_aside.add("hidden files", name_inside(csv_path, path))
    for path in below.hidden_folders:
        left_aside.add("hidden folders", name_inside(csv_path, path) + "/")
    return left_aside


def _count_shared_folders(paths: list[str]) -> int:
    """With how many names of folders all of the paths begin."""
    folders = [path.split("/")[:-1] for path in paths]
    count = 0
    for names in zip(*folders, strict=False):
        if len(set(names)) > 1:
            break
        count += 1
    return count


def _where(csv_path: str) -> str:
    return "" if SCHEME.match(csv_path) else f" (in {pathlib.Path.cwd().name}/)"


def _name_nothing(csv_path: str, readers: Sequence[Reader]) -> Trouble:
    return Trouble(EXIT_INPUT, f"csv_path {csv_path!r} names no {_join_suffixes(readers)} file{_where(csv_path)}")


def _join_suffixes(readers: Sequence[Reader]) -> str:
    suffixes = [reader.suffixes[0] for reader in readers]
    return " or ".join(sorted(suffixes))


# ── From files to a reader ────────────────────────────────────────────────────────────────────────────────────────────

def fits(reader: Reader, path: str) -> bool:
    """Whether the path has one of the reader's suffixes; only text may be compressed as well."""
    name = path.lower() if isinstance(reader, InPlaceReader) else strip_compression(path)
    return name.endswith(reader.suffixes)


def fitting(reader: Reader, paths: list[str]) -> list[str]:
    """The files of a folder that fit the reader; a .txt is a note where there are tables besides, and NOTES always are."""
    fit = [path for path in paths if fits(reader, path) and path.rpartition("/")[2] not in NOTES]
    tables = [path for path in fit if plain_suffix(path) != ".txt"]
    return tables or fit


def choose_reader(csv_path: str, readers: Sequence[Reader]) -> Reader:
    """The one of `readers` for what `csv_path` names; the last of them reads a single file whose suffix nobody knows.

    Raises Trouble (exit 3) where it names nothing, or files of several kinds or of none.
    """
    paths = expand_path(csv_path)
    if find_store(csv_path).is_folder(csv_path):
        return _choose_in_folder(csv_path, paths, readers)
    if paths == [csv_path]:
        return _choose_for_file(csv_path, readers)
    return _choose_for_all(csv_path, paths, readers)


def _choose_for_file(csv_path: str, readers: Sequence[Reader]) -> Reader:
    fit = [reader for reader in readers if fits(reader, csv_path)]
    if fit:
        return fit[0]
    if _is_packed(csv_path, readers):
        raise _refuse_kinds(csv_path, [csv_path], readers)
    return readers[-1]


def _choose_for_all(csv_path: str, paths: list[str], readers: Sequence[Reader]) -> Reader:
    if not paths:
        raise _name_nothing(csv_path, readers)
    fit = [reader for reader in readers if fits(reader, paths[0])]
    if not fit or not all(fits(fit[0], path) for path in paths):
        raise _refuse_kinds(csv_path, paths, readers)
    return fit[0]


def _choose_in_folder(csv_path: str, paths: list[str], readers: Sequence[Reader]) -> Reader:
    """What is read where it lies goes before text, of which a .txt alone is a note; files of another kind do not matter."""
    for reader in readers:
        claims = getattr(reader, "claims", None)
        if claims and claims(paths):
            return reader
    found = [reader for reader in readers if not hasattr(reader, "claims") and fitting(reader, paths)]
    in_place = _in_place(found)
    side_suffixes = set(itertools.chain.from_iterable(reader.side_suffixes for reader in in_place))
    main = [reader for reader in in_place if not side_suffixes.intersection(reader.suffixes)]
    tables = [reader for reader in found if any(fits(reader, path) and plain_suffix(path) != ".txt" for path in paths)]
    candidates: Sequence[Reader] = main or in_place or tables or found
    if not candidates:
        for path in paths[:MOST_LOOKED_INTO]:  # raises Trouble for Arrow's files, workbooks and archives
            name_compression(InputFile(path, path).read_range(0, MAGIC_BYTES), path)
        if any(hasattr(reader, "claims") and fitting(reader, paths) for reader in readers):
            raise Trouble(EXIT_INPUT, f"csv_path {csv_path!r} is a folder of images without captions: none has a .txt, .caption"
                                      " or .json of its name next to it, and there is no table")
        raise _name_nothing(csv_path, readers)
    if len(candidates) > 1:
        example = f"*{candidates[0].suffixes[0]}"
        raise Trouble(EXIT_INPUT, f"csv_path {csv_path!r} is a folder with files of several kinds "
                                  f"({_join_suffixes(candidates)}): name those meant, as in {csv_path.rstrip('/')}/{example}")
    return candidates[0]


def _in_place(readers: Sequence[Reader]) -> "list[InPlaceReader]":
    return [reader for reader in readers if isinstance(reader, InPlaceReader)]


def _is_packed(path: str, readers: Sequence[Reader]) -> bool:
    """Whether the file is compressed and of a kind that is read from its midst."""
    return path.lower().endswith(".tgz") or any(fits(reader, strip_compression(path)) for reader in _in_place(readers))


def _refuse_kinds(csv_path: str, paths: list[str], readers: Sequence[Reader]) -> Trouble:
    kinds = {pathlib.PurePosixPath(path).suffix.lower() or "others" for path in paths}
    is_packed = any(_is_packed(path, readers) for path in paths)
    hint = "; tars and Parquet files must not be compressed, because they are read from their midst" if is_packed else ""
    return Trouble(EXIT_INPUT, f"csv_path {csv_path!r} must name {_join_suffixes(readers)} files, all of one kind, "
                               f"not {' and '.join(sorted(kinds))}{hint}")


def name_differences(entries: list[Manifest], there: list[InputFile],
                     has_changed: Callable[[InputFile, Manifest], bool]) -> list[str]:
    """Which files are gone, new or changed since manifest.json got its `entries`, in words; the first few one by one."""
    recorded = {entry["name"]: entry for entry in entries}
    found = {file.name: file for file in there}
    gone = [f"{name} is gone" for name in recorded if name not in found]
    new = [f"{name} is new" for name in found if name not in recorded]
    changed = [f"{name} has changed" for name, entry in recorded.items() if name in found and has_changed(found[name], entry)]
    words = gone + new + changed
    if len(words) <= MOST_DIFFERENCES:
        return words
    return [*words[:MOST_DIFFERENCES], f"and {len(words) - MOST_DIFFERENCES} more files of the input differ"]


# ── What readers share that read files where they lie ─────────────────────────────────────────────────────────────────

class InPlaceReader:
    """A Reader of files that are not staged: planned once, then read where they lie, a partition at a time.

    A subclass says `kind` and `suffixes`, what its files hold (`describe_files`), and how to read them (`open_files`).
    """

    kind: str
    suffixes: tuple[str, ...]
    side_suffixes: tuple[str, ...] = ()  # of files next to this kind's own that belong to them, and are no input themselves

    def describe_files(self, found: list[InputFile], config: Config) -> Manifest:
        """What manifest.json says of the files: kind, columns, rows, malformed, files (of each its name, rows and identity)."""
        raise NotImplementedError

    def open_files(self, manifest: Manifest, found: list[InputFile], config: Config) -> Rows:
        """The rows of the files that `manifest` describes."""
        raise NotImplementedError

    def identify(self, file: InputFile) -> Manifest:
        """What in a file's entry in manifest.json tells this version of it from another. Raises FileNotFoundError."""
        info = file.info()
        if info is None:
            raise FileNotFoundError(2, "no such file", file.path)
        identity = info._asdict()
        return identity if info.version else {key: value for key, value in identity.items() if key != "version"}

    def describe(self, config: Config, output: pathlib.Path) -> Manifest:
        """See Reader. Files behind the last row that `limit` asks for are left out, so that they may change."""
        found = list_files(config.csv_path, self)
        with listing([file.path for file in found]):
            described = self.describe_files(found, config)
        left_aside = find_left_aside(config.csv_path, self, self.used_besides(found, described))
        left_aside.tell(config.csv_path)
        described["left_aside"] = {**described.get("left_aside", {}), **left_aside.describe()}
        if config.limit is None or described["rows"] <= config.limit:
            return described
        counts = [file["rows"] for file in described["files"]]
        starts = itertools.accumulate(counts, initial=0)
        cut = {**described, "rows": config.limit}
        cut["files"] = [file for file, start in zip(described["files"], starts, strict=False) if start < config.limit]
        if "starts" in described:
            cut["starts"] = [start for start in described["starts"] if start < config.limit]
        return cut

    def open(self, manifest: Manifest, config: Config, output: pathlib.Path) -> Rows:
        """See Reader."""
        found = list_files(config.csv_path, self)[:len(manifest["files"])]  # `limit` may leave some out
        return self.open_files(manifest, found, config)

    def differences(self, manifest: Manifest, config: Config) -> list[str]:
        """See Reader."""
        found = list_files(config.csv_path, self)
        entries = manifest["files"]
        with listing([file.path for file in found]):
            return name_differences(entries, found[:len(entries)] if config.limit else found, self.has_changed)

    def used_besides(self, found: list[InputFile], described: Manifest) -> Container[str]:
        """The paths of files that were used to describe those that were found, so that nobody says they were left aside."""
        return ()

    def hash_index(self, file: InputFile) -> str | None:
        """A hash of what the file says of its own content, `index_sha256` in its entry; None where that would tell little."""
        return None

    def hash_again(self, file: InputFile, entry: Manifest) -> str | None:
        """`hash_index` of a file that has this entry in manifest.json."""
        return self.hash_index(file)

    def has_changed(self, file: InputFile, entry: Manifest) -> bool:
        """Whether it is another file; one of the same size under a new time is not if its index is the same."""
        identity = self.identify(file)
        changed = [key for key, value in identity.items() if entry.get(key) != value]
        # planned on a disk and now in a store, it has a version that it had not
        may_be_same = all(key.endswith("time_ns") or (key.endswith("version") and key not in entry) for key in changed)
        if not changed or not may_be_same or "index_sha256" not in entry:
            return bool(changed)
        try:
            return self.hash_again(file, entry) != entry["index_sha256"]
        except (OSError, Trouble):
            return True


class FileRows:
    """Rows by number over several files. A subclass reads a stretch of one file; see Rows."""

    brings_images = False

    def __init__(self, manifest: Manifest, found: list[InputFile]) -> None:
        self.columns: list[str] = manifest["columns"]
        self.files = found
        self.counts: list[int] = [file["rows"] for file in manifest["files"]]
        self.starts = list(itertools.accumulate(self.counts, initial=0))  # of each file, and the end

    def stretches(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Where the rows [start, stop) are: the file's place in `files`, the first row within it, and the end within it."""
        while start < stop:
            number = bisect.bisect_right(self.starts, start) - 1
            end = min(stop, self.starts[number + 1])
            yield number, start - self.starts[number], end - self.starts[number]
            start = end

    def read(self, start: int, stop: int) -> "pd.DataFrame":
        """Rows [start, stop) as columns of text."""
        raise NotImplementedError
