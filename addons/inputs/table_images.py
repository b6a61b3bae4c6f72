"""Images inside the table: bytes, the struct {bytes, path} of Hugging Face's `datasets`, and data: URIs in a column of text.

The loader threads ask for images about in the order of the rows. A block's images are therefore read a piece at a time, from
its first row on, and the last pieces are kept; never a whole column. A row whose image lies elsewhere (a struct with a path and
without bytes, a plain URL among data: URIs) is read from `image_path`, as in any other table.
"""
import base64
import binascii
import collections
import contextlib
import functools
import itertools
import threading
import urllib.parse
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from addons.images.memory import reserve_for_image
from addons.inputs import Manifest, Rows
from addons.inputs.caption_lists import CAPTION_INDEX
from addons.inputs.columnar import (
    DATA_URI,
    BlockFile,
    BlockReader,
    BlockRows,
    Piece,
    find_data_uris,
    is_image,
    is_textual,
    to_text,
)
from addons.inputs.files import InputFile
from image_text_sim_clip import Config, RowFailure, Trouble, column_name, loader_threads, open_source

if TYPE_CHECKING:
    import pandas as pd

IN_TABLE = "data:row/"  # begins the source of an image that the table holds as bytes; no data: URI that can be read does
KEPT_BYTES = 64_000_000  # of pieces that were read …
KEPT_ROWS = 64  # … and rows, beyond which the oldest goes
STREAMS = 2  # one for who goes through all rows in order, and one for who looks back


# ── data: URIs ────────────────────────────────────────────────────────────────────────────────────────────────────────

def decode_data_uri(uri: str, max_bytes: int) -> bytes:
    """The bytes that a data: URI holds, base64 or percent-encoded. Raises RowFailure: too_large or corrupt."""
    head, comma, body = uri.strip().partition(",")
    if not comma:
        raise RowFailure("corrupt", "a data: URI without data")
    if not head.lower().endswith(";base64"):
        data = urllib.parse.unquote_to_bytes(body)
    else:
        if len(body) > max_bytes * 2:
            raise RowFailure("too_large", f"{len(body)} characters")
        reserve_for_image(len(body))
        body = urllib.parse.unquote(body) if "%" in body else body
        letters = "".join(body.split()).replace("-", "+").replace("_", "/").rstrip("=")
        try:
            data = base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
        except (binascii.Error, ValueError):
            raise RowFailure("corrupt", "a data: URI that is not base64") from None
    if len(data) > max_bytes:
        raise RowFailure("too_large", f"{len(data)} bytes")
    return data


class ImageSource:
    """What reads the images of a table: those inside it, and through `image_path` those elsewhere."""

    def __init__(self, config: Config, read_in_table: Callable[[str], bytes] | None, has_pool: bool = False) -> None:
        self._max_bytes = config.max_image_bytes
        self._read_in_table = read_in_table
        self._elsewhere: Callable[[str], bytes] | None = None
        with contextlib.suppress(Trouble):  # `image_path` may mean nothing to such a table
            self._elsewhere = open_source(config, loader_threads(config))
        for name in ("open_pool", "report_partition") if has_pool else ():  # of a source whose images may come late
            if hasattr(self._elsewhere, name):
                setattr(self, name, getattr(self._elsewhere, name))

    def __call__(self, source: str) -> bytes:
        """The bytes of an image. Raises RowFailure."""
        if source.startswith(IN_TABLE) and self._read_in_table:
            return self._read_in_table(source)
        if source.lstrip()[:len(DATA_URI)].lower() == DATA_URI:
            return decode_data_uri(source, self._max_bytes)
        if self._elsewhere is None:
            raise RowFailure("missing", "not in the table, and image_path names nothing")
        return self._elsewhere(source)


# ── Bytes in a column ─────────────────────────────────────────────────────────────────────────────────────────────────

class ImagePiece(NamedTuple):
    """Images of some rows of a block that follow each other."""

    place: tuple[int, int]  # of the file in the input, and of the block in the file
    first: int  # which of the block's rows is the first
    images: pa.Array  # (n,) bytes, plain or as a dictionary
    paths: list[str]  # (n,) "" for none

    def holds(self, place: tuple[int, int], row: int) -> bool:
        """Whether the row of that block is among them."""
        return self.place == place and self.first <= row < self.first + len(self.images)


class ImageStream:
    """The images of one block from its first row on, a piece at a time."""

    def __init__(self, place: tuple[int, int], opened: BlockFile, url_column: str) -> None:
        self.place = place
        self.next_row = 0
        self._opened = opened
        self._url_column = url_column
        kind = opened.schema.field(url_column).type
        self._is_struct = pa.types.is_struct(kind)
        columns = [url_column]
        if self._is_struct:
            columns = [f"{url_column}.bytes"]
            if has_path(kind):
                columns.append(f"{url_column}.path")
        self._pieces = opened.read_pieces(place[1], columns)

    def read(self) -> ImagePiece:
        """The next piece. Raises ValueError where the block ends, or what Arrow and the disk raise."""
        table = next(self._pieces, None)
        if table is None:
            raise ValueError("a block has not the rows that the file counts for it")
        column = table[self._url_column].combine_chunks()
        images = column
        paths = [""] * len(column)
        if self._is_struct:
            images = column.field("bytes")
            images = pc.if_else(column.is_valid(), images, None) if column.null_count else images
            paths = paths_of(table[self._url_column])
        piece = ImagePiece(self.place, self.next_row, images, paths)
        self.next_row += len(column)
        return piece

    def close(self) -> None:
        """Close the file."""
        self._opened.close()


def has_path(kind: pa.DataType) -> bool:
    """Whether a struct of bytes has a path, too."""
    place = kind.get_field_index("path")
    return bool(place >= 0 and is_textual(kind.field(place).type))


def paths_of(column: pa.ChunkedArray) -> list[str]:
    """The field `path` of a column of structs as text, "" for none."""
    if column.type.get_field_index("path") < 0:
        return [""] * len(column)
    paths: list[str] = to_text(pa.chunked_array([pc.struct_field(column.combine_chunks(), "path")])).to_pylist()
    return paths


class TableImages:
    """The images of a table by file, block and row, for many threads that ask for them about in order."""

    def __init__(self, open_file: Callable[[int], BlockFile], url_column: str) -> None:
        self._open_file = open_file
        self._url_column = url_column
        self._lock = threading.Lock()
        self._streams: list[ImageStream] = []
        self._kept: collections.deque[ImagePiece] = collections.deque()
        self._broken: dict[tuple[int, int], int] = {}  # by block, the row from which on it cannot be read

    def find(self, place: tuple[int, int], row: int) -> tuple[pa.Buffer | None, str]:
        """The bytes of a row's image, None where there are none, and its path. Raises RowFailure: corrupt."""
        with self._lock:
            piece = next((kept for kept in self._kept if kept.holds(place, row)), None) or self._read_on(place, row)
        scalar = piece.images[row - piece.first]
        if isinstance(scalar, pa.DictionaryScalar):
            scalar = scalar.value if scalar.is_valid else None
        has_bytes = scalar is not None and scalar.is_valid
        return (scalar.as_buffer() if has_bytes else None), piece.paths[row - piece.first]

    def _read_on(self, place: tuple[int, int], row: int) -> ImagePiece:
        if row >= self._broken.get(place, row + 1):
            raise RowFailure("corrupt", "the table cannot be read there")
        stream = self._choose(place, row)
        try:
            while True:
                piece = stream.read()
                self._keep(piece)
                if piece.holds(place, row):
                    return piece
        except (OSError, ValueError, pa.ArrowException):
            self._broken[place] = stream.next_row
            self._streams.remove(stream)
            stream.close()
            raise RowFailure("corrupt", "the table cannot be read there") from None

    def _choose(self, place: tuple[int, int], row: int) -> ImageStream:
        """The stream that comes to the row, begun anew where there is none."""
        fitting = [stream for stream in self._streams if stream.place == place and stream.next_row <= row]
        if fitting:
            return max(fitting, key=lambda stream: stream.next_row)
        if len(self._streams) == STREAMS:
            self._streams.pop(0).close()
        self._streams.append(ImageStream(place, self._open_file(place[0]), self._url_column))
        return self._streams[-1]

    def _keep(self, piece: ImagePiece) -> None:
        self._kept.append(piece)
        rows = sum(len(kept.images) for kept in self._kept)
        size = sum(kept.images.nbytes for kept in self._kept)
        while len(self._kept) > 1:
            oldest = self._kept[0]
            if rows - len(oldest.images) < KEPT_ROWS and (size <= KEPT_BYTES or len(self._kept) == 2):
                break
            self._kept.popleft()
            rows -= len(oldest.images)
            size -= oldest.images.nbytes


class BlockRowsWithImages(BlockRows):
    """Rows of files with blocks, of which one at least holds images."""

    brings_images = True

    def __init__(self, reader: BlockReader, manifest: Manifest, found: list[InputFile], config: Config) -> None:
        self.config = config
        super().__init__(reader, manifest, found, config)

    def _forget(self) -> None:
        super()._forget()
        self._sources: list[str] = []
        self._sources_of = (0, 0)  # the rows that they are of

    @functools.cached_property
    def _images(self) -> TableImages:
        return TableImages(self.open_file, self.url_column)

    @functools.cached_property
    def _read_image(self) -> ImageSource:
        return ImageSource(self.config, self._read_in_table)

    def read_bytes(self, source: str) -> bytes:
        """The image that one of `sources` names. Raises RowFailure."""
        return self._read_image(source)

    def _read_in_table(self, source: str) -> bytes:
        number, block, row = map(int, source.removeprefix(IN_TABLE).split("/"))
        data, path = self._images.find((number, block), row)
        if data is not None:
            if data.size > self.config.max_image_bytes:
                raise RowFailure("too_large", f"{data.size} bytes")
            reserve_for_image(data.size)
            image = bytes(data)
            if image[:4].lower() == b"http":
                raise RowFailure("not_image", "the column holds bytes, and these are a URL: write it as strings")
            return image
        if not path:
            raise RowFailure("missing", "no image in the table")
        return self._read_image(as_source(path))

    def read(self, start: int, stop: int) -> "pd.DataFrame":
        """Rows [start, stop) as columns of text."""
        self._sources = []
        self._sources_of = (0, 0)
        rows = super().read(start, stop)
        self._sources_of = (start, stop)
        return rows

    def sources(self, start: int, stop: int) -> list[str]:
        """What `read_bytes` takes: the place of an image in the table, a data: URI, or where else it is."""
        if self._sources_of != (start, stop):
            self.read(start, stop)
        return self._sources

    def stored_columns(self, opened: BlockFile) -> list[str]:
        """The columns that are read of a file: of images their paths."""
        kind = opened.schema.field(self.url_column).type
        columns = super().stored_columns(opened)
        if pa.types.is_struct(kind) and has_path(kind):
            columns.append(f"{self.url_column}.path")
        return columns

    def to_rows(self, opened: BlockFile, number: int, block: int, piece: Piece) -> pa.Table:
        """The rows of a piece with all columns as text; for an image in the table its path, or the number of its row."""
        first_row = self.first_input_rows[number] + sum(opened.block_rows[:block])
        numbers = [str(row) for row in (first_row + piece.places).tolist()]
        table = piece.table
        place = table.schema.get_field_index(self.url_column)
        if is_image(opened.schema.field(self.url_column).type):
            self._sources += [f"{IN_TABLE}{number}/{block}/{row}" for row in piece.places.tolist()]
            paths = paths_of(table[self.url_column]) if place >= 0 and pa.types.is_struct(table.schema.types[place]) else []
            shown = [path if path.strip() else row for path, row in zip(paths or [""] * len(numbers), numbers, strict=True)]
            table = table.remove_column(place) if place >= 0 else table
        else:
            urls = to_text(table[self.url_column])
            shown, sources = show_numbers(urls, numbers)
            self._sources += sources
            table = table.remove_column(place)
        table = table.append_column(self.url_column, pa.array(shown, pa.string()))
        return super().to_rows(opened, number, block, piece._replace(table=table))


def show_numbers(urls: pa.ChunkedArray, numbers: list[str]) -> tuple[list[str], list[str]]:
    """What is shown of the cells of a column of text, a row's number for a data: URI; and the source of each."""
    cells = urls.to_pylist()
    is_uri = find_data_uris(urls).tolist()
    shown = [row if inside else cell for cell, inside, row in zip(cells, is_uri, numbers, strict=True)]
    return shown, [as_source(cell) if inside else cell for cell, inside in zip(cells, is_uri, strict=True)]


def as_source(cell: str) -> str:
    """A cell as a source, which must not be taken for the place of an image in the table."""
    return DATA_URI if cell.strip().lower().startswith(IN_TABLE) else cell


# ── A staged table ────────────────────────────────────────────────────────────────────────────────────────────────────

class StagedRowsWithImages:
    """The rows of a staged text table in which some images are data: URIs."""

    brings_images = True

    def __init__(self, rows: Rows, config: Config, has_lists: bool = False) -> None:
        self.rows = rows
        self.has_lists = has_lists  # of captions
        self.config = config
        self.url_column = column_name(config.url_column)
        self._sources: list[str] = []
        self._sources_of = (0, 0)  # the rows that they are of

    @functools.cached_property
    def read_bytes(self) -> ImageSource:
        """What reads an image; one that may fetch brings its own pool, see addons/images."""
        return ImageSource(self.config, None, has_pool=True)

    def __getstate__(self) -> dict[str, object]:
        """Without what has been opened or read."""
        kept = {name: value for name, value in self.__dict__.items() if name != "read_bytes"}
        return kept | {"_sources": [], "_sources_of": (0, 0)}

    def read(self, start: int, stop: int) -> "pd.DataFrame":
        """Rows [start, stop) as columns of text; for a data: URI the row's number, of a list's captions that of the first."""
        rows = self.rows.read(start, stop)
        places = [int(place) for place in rows[CAPTION_INDEX]] if self.has_lists else itertools.repeat(0)
        numbers = [str(row - place) for row, place in zip(range(start, stop), places, strict=False)]
        self._sources = rows[self.url_column].tolist()
        self._sources_of = (start, stop)
        rows[self.url_column] = show_numbers(pa.chunked_array([pa.array(self._sources, pa.string())]), numbers)[0]
        return rows

    def sources(self, start: int, stop: int) -> list[str]:
        """The data: URIs, and where the other images are."""
        if self._sources_of != (start, stop):
            self.read(start, stop)
        return self._sources
