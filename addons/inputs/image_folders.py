"""Folders of images with their captions: a .txt or .json of the same name next to each, or an imagefolder's metadata files.

    shapes/0.png  shapes/0.txt  shapes/a/1.jpg  shapes/a/1.json ...        the key is the path up to the last dot
    train/0.png  train/1.png ...  train/metadata.jsonl                     {"file_name": "0.png", "caption": ...}

The images come from the folder itself, and `image_path` does not count; a row's URL is the image's path inside the folder. With
metadata files (metadata.csv, .jsonl or .parquet, as Hugging Face's `datasets` reads them) their rows are the rows, and images
that none of them names are counted. Else each image is one, or one for each of its captions: the field of its .json that
`caption_column` names, else its .txt or .caption; an image without a text is `empty_caption`. All text is staged, as that of
tables is.
"""
import dataclasses
import functools
import hashlib
import itertools
import pathlib
import posixpath
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from addons.images.spellings import other_spellings
from addons.inputs import Manifest, Rows, delimited, files, json_lines, needed_columns, parquet
from addons.inputs.caption_lists import CAPTION_INDEX
from addons.inputs.columnar import remark_on_left_out
from addons.inputs.compression import plain_suffix
from addons.inputs.files import InputFile, as_text
from addons.inputs.json_lines import Cells, check_width
from addons.inputs.left_aside import LeftAside, kind_by_ending
from addons.inputs.staging import OpenTable, describe_file, hash_file
from addons.inputs.tars import IMAGES, JSON_ENCODING, MAX_TEXT_BYTES, decode_text, read_cells, tell_flawed
from addons.inputs.text import TextReader, TextTable, open_staged
from addons.stores import SCHEME, FileInfo, find_store
from image_text_sim_clip import (
    BATCH_ROWS,
    EXIT_INPUT,
    Batch,
    Config,
    Trouble,
    addon,
    column_name,
    names_in_folder,
    read_file,
    to_table,
)

if TYPE_CHECKING:
    import pandas as pd

TEXT_SUFFIXES = (".txt", ".caption")
SIDE_SUFFIXES = (*TEXT_SUFFIXES, ".json")
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
UNNAMED = "images that no row of a metadata file names"
FILE_NAME = "file_name"  # the column of metadata files that names the image, from the folder that they lie in


class Pair(NamedTuple):
    """An image and the files of its captions; None for one that is not there."""

    image: str
    text: str | None
    json: str | None


class FolderFile(InputFile):
    """All pairs of a folder as one file of the input: what is known of it is known of all together."""

    def info(self) -> FileInfo | None:
        """How many bytes its texts have together, images counted as one each; the last time that any was written."""
        size = 0
        newest = 0
        for pair in find_pairs(self.path):
            for path in pair:
                info = find_store(path).info(path) if path else None
                if info:
                    size += 1 if path == pair.image else info.bytes
                    newest = max(newest, info.mtime_ns)
        return FileInfo(size, newest)


def stem_of(path: str) -> str:
    """A path up to the last dot of its name."""
    return path.rpartition(".")[0]


def find_pairs(csv_path: str) -> list[Pair]:
    """The images that `csv_path` names, in order, each with the files of its captions."""
    paths = files.expand_path(csv_path)
    images = [path for path in paths if path.lower().endswith(READER.suffixes)]
    if find_store(csv_path).is_folder(csv_path):
        others = paths
    else:
        others = [stem_of(image) + suffix for image, suffix in itertools.product(images, SIDE_SUFFIXES)]
        others = [path for path in others if find_store(path).info(path)]
    sides = {(stem_of(path), plain_suffix(path)): path for path in others if path.lower().endswith(SIDE_SUFFIXES)}
    pairs = []
    for image in images:
        texts = (sides.get((stem_of(image), suffix)) for suffix in TEXT_SUFFIXES)
        pairs.append(Pair(image, next(filter(None, texts), None), sides.get((stem_of(image), ".json"))))
    return pairs


def find_metadata(csv_path: str) -> list[InputFile]:
    """The metadata files of the folder."""
    if not find_store(csv_path).is_folder(csv_path):
        return []
    fixed = files.count_fixed_folders(csv_path)
    found = [path for path in files.expand_path(csv_path) if path.rpartition("/")[2].lower() in METADATA_NAMES]
    return [InputFile(files.name_inside(csv_path, path), path, files.folder_columns(fixed, path)) for path in found]


def read_text(path: str | None, encoding: str) -> tuple[str, bool]:
    """The text of a caption's file, without the line's end behind it, and whether bytes of it are no text.

    "" for no file, or one that is too long for a caption.
    """
    info = find_store(path).info(path) if path else None
    if path is None or info is None or info.bytes > MAX_TEXT_BYTES:
        return "", False
    try:
        with find_store(path).open(path) as file:
            data = file.read()
    except OSError as error:
        raise Trouble(EXIT_INPUT, f"cannot read {as_text(path)}: {error.strerror or error}") from None
    text, has_flaw = decode_text(data, encoding)
    return text.rstrip("\r\n"), has_flaw


class ImageFolderReader(TextReader):
    """Images in a folder with their captions next to them."""

    kind = "images"
    suffixes = tuple(f".{ending}" for ending in IMAGES)

    def claims(self, paths: list[str]) -> bool:
        """Whether the files of a folder are images with their captions, whatever else lies there."""
        stems = {stem_of(path) for path in paths if path.lower().endswith(self.suffixes)}
        sides = {stem_of(path) for path in paths if path.lower().endswith(SIDE_SUFFIXES)}
        has_metadata = any(path.rpartition("/")[2].lower() in METADATA_NAMES for path in paths)
        return bool(stems) and (has_metadata or not stems.isdisjoint(sides))

    def find_files(self, config: Config) -> list[InputFile]:
        """The metadata files, or else all pairs as one file. Trouble (exit 3) for two metadata files in one folder."""
        needed_columns(config)
        name = config.csv_path.rstrip("/").rpartition("/")[2]
        metadata = find_metadata(config.csv_path)
        of_folders: dict[str, InputFile] = {}
        for file in metadata:
            other = of_folders.setdefault(posixpath.dirname(file.path), file)
            if other is not file:
                raise Trouble(EXIT_INPUT, f"{other.name} and {file.name} are both metadata of the same images: take one of the "
                                          "two away")
        return metadata or [FolderFile(name, config.csv_path)]

    def left_aside(self, config: Config, staged: pathlib.Path) -> LeftAside:
        """What in the folder is neither an image nor of one, and the images that the metadata files do not name."""
        left_aside = LeftAside()
        metadata = {file.path for file in find_metadata(config.csv_path)}
        pairs = find_pairs(config.csv_path)
        used = metadata.union(pair.image for pair in pairs)
        if not metadata:
            used.update(filter(None, itertools.chain.from_iterable(pair[1:] for pair in pairs)))
        elif config.limit is None:  # else the rows behind the last one may name them
            for name in find_unnamed(pairs, config, staged):
                left_aside.add(UNNAMED, as_text(name))
        if find_store(config.csv_path).is_folder(config.csv_path):
            below = files.list_below(config.csv_path)
            for path in [*below.files, *below.hidden_files]:
                if path not in used:
                    left_aside.add(kind_by_ending(path), files.name_inside(config.csv_path, path))
        return left_aside

    def guess_types(self, file: InputFile, config: Config) -> dict[str, str]:
        """Those of the columns of the first metadata file; texts next to images have none."""
        if isinstance(file, FolderFile):
            return {}
        if file.path.lower().endswith(".parquet"):
            types: dict[str, str] = describe_metadata(file, config).get("types", {})
            return types
        return reader_of(file.path).guess_types(file, config)

    def opener(self, config: Config) -> OpenTable:
        """What opens a metadata file, or the pairs of the folder."""
        if find_metadata(config.csv_path):
            return functools.partial(open_metadata, config.csv_path)
        return self.open_table

    def open_table(self, config: Config, known: list[str]) -> TextTable:
        """Open the pairs of a folder."""
        reading = PairsReading(config, known)
        return TextTable(reading.columns, reading.read_batches(), reading.sha256, remarks=reading.remarks)

    def differences(self, manifest: Manifest, config: Config) -> list[str]:
        """See Reader. Pairs are compared by their names and texts."""
        pairs = self.find_files(config)[0]
        if not isinstance(pairs, FolderFile) or len(manifest["files"]) > 1:
            return super().differences(manifest, config)
        entry = manifest["files"][0]
        if all(entry.get(key) == value for key, value in describe_file(pairs).items()):
            return []
        if PairsReading(config, manifest["columns"]).sha256() == entry["sha256"]:
            return []
        return [f"the images or captions in {pairs.name} are others"]

    def open(self, manifest: Manifest, config: Config, output: pathlib.Path) -> Rows:
        """See Reader."""
        return FolderRows(open_staged(manifest, output), config)


READER = ImageFolderReader()


# ── Metadata files ────────────────────────────────────────────────────────────────────────────────────────────────────

def open_metadata(root: str, config: Config, known: list[str]) -> TextTable:
    """A metadata file below `root` as a table whose URLs are the images' paths from there.

    Its own column of the URLs' name becomes input_<name>, unless that is `file_name`.
    """
    url_column = column_name(config.url_column)
    own = {url_column: FILE_NAME, f"input_{url_column}": url_column} if url_column != FILE_NAME else {}
    shown = {FILE_NAME: url_column, url_column: f"input_{url_column}"} if url_column != FILE_NAME else {}
    folder = posixpath.relpath(posixpath.dirname(config.csv_path), root)
    prefix = "" if folder == "." else f"{folder}/"
    config = dataclasses.replace(config, url_column=FILE_NAME)
    if config.csv_path.lower().endswith(".parquet"):
        table = open_parquet(InputFile(posixpath.relpath(config.csv_path, root), config.csv_path), config)
    else:
        table = open_text(config, [own.get(name, name) for name in known])

    def batches() -> Iterator[Batch]:
        for rows, malformed in table.batches:
            names = pc.binary_join_element_wise(prefix, rows[FILE_NAME], "")
            rows = rows.set_column(rows.schema.get_field_index(FILE_NAME), FILE_NAME, names)
            yield rows.rename_columns([shown.get(name, name) for name in rows.column_names]), malformed
    return table._replace(columns=[shown.get(name, name) for name in table.columns], batches=batches())


def open_text(config: Config, known: list[str]) -> TextTable:
    """A metadata file of text. Raises Trouble (exit 3) where it does not name its images as such files do."""
    try:
        return reader_of(config.csv_path).open_table(config, known)
    except Trouble as trouble:
        if repr(FILE_NAME) not in str(trouble):
            raise
        name = config.csv_path.rpartition("/")[2]
        raise Trouble(EXIT_INPUT, f"{config.csv_path} is no metadata of the images next to it, which name these in "
                                  f"{FILE_NAME!r}, and their captions in {config.caption_column!r} (caption_column): to read it"
                                  f" as any other table, let csv_path name {name}, and image_path the folder") from None


def reader_of(path: str) -> TextReader:
    """What reads a metadata file of text."""
    return delimited.READER if plain_suffix(path) == ".csv" else json_lines.READER


def describe_metadata(file: InputFile, config: Config) -> Manifest:
    """What is in a metadata.parquet. Raises Trouble (exit 3) where its names of files are not text."""
    config = dataclasses.replace(config, url_column=FILE_NAME)
    described = parquet.READER.describe_files([InputFile(file.name, file.path)], config)
    if FILE_NAME in described["columns"] and described.get("holds_images"):
        raise Trouble(EXIT_INPUT, f"{FILE_NAME!r} is not text in {file.name}: images inside a Parquet file are read where "
                                  "csv_path names it")
    return described


def open_parquet(file: InputFile, config: Config) -> TextTable:
    """A metadata.parquet as a table of text."""
    described = describe_metadata(file, config)
    rows = parquet.READER.open_files(described, [file], config)

    def batches() -> Iterator[Batch]:
        for piece in rows.read_pieces(0, described["rows"]):
            yield piece, []

    def remarks() -> list[str]:
        return list(filter(None, [remark_on_left_out(described)]))
    return TextTable(described["columns"], batches(), lambda: hash_file(file), remarks=remarks)


def find_unnamed(pairs: list[Pair], config: Config, staged: pathlib.Path) -> list[str]:
    """The paths, inside the folder, of the images that no staged row names, in order."""
    root = folder_of(config.csv_path)
    there = dict.fromkeys(posixpath.relpath(pair.image, root) for pair in pairs)
    named: set[str] = set()
    url_column = column_name(config.url_column)
    with staged.open("rb") as opened, pq.ParquetFile(opened) as file:
        for batch in file.iter_batches(columns=[url_column]):
            for url in batch[url_column].to_pylist():
                name = posixpath.normpath(url)
                if name in there:
                    named.add(name)
                    continue
                own = names_in_folder(url)
                named.update(map(posixpath.normpath, [*own, *other_spellings(own)]))
    return [name for name in there if name not in named]


# ── Pairs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

class PairsReading:
    """The pairs of a folder as a table, hashed as they are read."""

    def __init__(self, config: Config, known: list[str]) -> None:
        self._config = config
        self._pairs = find_pairs(config.csv_path)
        self._root = folder_of(config.csv_path)
        self._fixed_folders = files.count_fixed_folders(config.csv_path)
        self._digest = hashlib.sha256()
        self._url = column_name(config.url_column)
        self._caption = column_name(config.caption_column)
        self._encoding = config.encoding
        self._flawed = 0  # pairs with bytes in their texts that are no text
        self._left = self._read_rows()
        self.columns = known or self._find_columns()

    def _find_columns(self) -> list[str]:
        """The columns of all rows; where there are no .json files there is nothing to look for."""
        columns = dict.fromkeys((self._url, self._caption))
        for pair in self._pairs:
            columns.update(dict(files.folder_columns(self._fixed_folders, pair.image)))
            if pair.json:
                fields, _ = read_text(pair.json, JSON_ENCODING)
                columns.update(dict.fromkeys(self._read_fields(fields)[0]))
                check_width(len(columns))
        return list(columns)

    def _read_fields(self, text: str) -> list[Cells]:
        """The fields of a .json, once for each of its captions; its own URL, from where the image may have come, set aside."""
        rows, _ = read_cells(text, self._caption)
        own = {self._url: f"input_{self._url}"}
        return [{own.get(name, name): cell for name, cell in cells.items()} for cells in rows]

    def _read_rows(self) -> Iterator[Cells]:
        for pair in self._pairs:
            name = posixpath.relpath(pair.image, self._root)
            text, has_flaw = read_text(pair.text, self._encoding)
            fields, has_flawed_fields = read_text(pair.json, JSON_ENCODING)
            self._flawed += has_flaw or has_flawed_fields
            self._digest.update(repr((name, text, fields)).encode("utf-8", "backslashreplace"))
            rows = self._read_fields(fields or "{}")
            for cells in rows:
                from_folders = dict(files.folder_columns(self._fixed_folders, pair.image))
                own = cells.get(self._caption) or (text if len(rows) == 1 else "")
                caption = own or from_folders.get(self._caption, "")
                yield {CAPTION_INDEX: "0", **from_folders, **cells, self._caption: caption, self._url: as_text(name)}

    def read_batches(self) -> Iterator[Batch]:
        """Batches of rows."""
        while batch := list(itertools.islice(self._left, BATCH_ROWS)):
            yield self._to_table(batch), []

    def _to_table(self, batch: list[Cells]) -> pa.Table:
        return to_table([[cells.get(column, "") for column in self.columns] for cells in batch], self.columns)

    def remarks(self) -> list[str]:
        """What is to be said of the texts, once all are read."""
        return list(filter(None, [tell_flawed(self._flawed, self._config.csv_path, self._encoding)]))

    def sha256(self) -> str:
        """Of the names of all images and all of their texts; reads what is left of them."""
        for _ in self._left:
            pass
        return self._digest.hexdigest()


def folder_of(csv_path: str) -> str:
    """The folder from which the paths of the images count: `csv_path` itself, or what comes before its wildcards."""
    if find_store(csv_path).is_folder(csv_path):
        return csv_path
    fixed = list(itertools.takewhile(lambda name: not set(name) & set("*?[{"), csv_path.split("/")[:-1]))
    return "/".join(fixed) or ("/" if csv_path.startswith("/") else ".")


class FolderRows:
    """The staged rows of a folder of images, which brings these along."""

    brings_images = True

    def __init__(self, rows: Rows, config: Config) -> None:
        self.rows = rows
        self.url_column = column_name(config.url_column)
        folder = folder_of(config.csv_path)
        self._read: Callable[[str], bytes]
        if SCHEME.match(folder):
            self._read = addon("stores.images", "csv_path").open_prefix(config, folder)
            return
        self._read = functools.partial(read_file, pathlib.Path(folder).resolve(), max_bytes=config.max_image_bytes)
        if config.follow_links:
            self._read = functools.partial(self._read, follow_links=True)

    def read(self, start: int, stop: int) -> "pd.DataFrame":
        """Rows [start, stop) as columns of text."""
        return self.rows.read(start, stop)

    def sources(self, start: int, stop: int) -> list[str]:
        """The paths of the images inside the folder."""
        urls: list[str] = self.rows.read(start, stop)[self.url_column].tolist()
        return urls

    def read_bytes(self, source: str) -> bytes:
        """The bytes of an image. Raises RowFailure."""
        return self._read(source)
