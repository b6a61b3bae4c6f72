"""What a table of pairs is: text tables are staged, Parquet files and webdataset tars are read where they lie.

A run asks `find_reader(csv_path)` and gets a Reader: by the suffix of the file, or of the files that a folder, a glob
(`shards/*.parquet`) or a pattern with numbers (`shards/{00000..00099}.tar`) stands for. The Reader describes the input once,
for manifest.json, opens its rows by number, and tells at the next start whether the input is still what was described.

To add a format, put ONE new file here that offers an instance as `READER`; no other file has to know of it.

* Text with one record after the other: a subclass of `text.TextReader` with `kind`, `suffixes` and `open_table`, which
  gives columns and batches of rows (json_lines.py). It is staged into the output's pairs.parquet.
* Files with a schema and blocks of rows: a subclass of `columnar.BlockReader` with `kind`, `suffixes` and `open_file`
  (parquet.py). Any number of files is read where they lie, and only the blocks that a partition needs.
* Anything else that is read where it lies: a subclass of `files.InPlaceReader` with `describe_files` and `open_files`
  (tars.py, whose rows bring their images along).
"""
import pathlib
from typing import TYPE_CHECKING, Any, Protocol

from image_text_sim_clip import EXIT_INPUT, Config, Trouble, room

if TYPE_CHECKING:
    import pandas as pd

Manifest = dict[str, Any]  # manifest.json, or what a reader adds to it


class Rows(Protocol):
    """The rows of an input by number, from 0."""

    brings_images: bool  # whether the images come with the rows, which then are RowsWithImages

    def read(self, start: int, stop: int) -> "pd.DataFrame":
        """Rows [start, stop) as columns of text, "" for NULL. Raises Trouble (exit 3) where the input has changed.

        The rows may be read in any order, by one thread at a time.
        """


class RowsWithImages(Rows, Protocol):
    """Rows that bring their images along: `brings_images` is True."""

    def sources(self, start: int, stop: int) -> list[str]:
        """What `read_bytes` takes for the image of each of the rows [start, stop)."""

    def read_bytes(self, source: str) -> bytes:
        """The bytes of an image, from any thread. Raises RowFailure where it is missing, too large or damaged."""


class Reader(Protocol):
    """One kind of input."""

    kind: str  # its name in manifest.json
    suffixes: tuple[str, ...]  # of its files, with the dot, in small letters

    def describe(self, config: Config, output: pathlib.Path) -> Manifest:
        """What manifest.json says of the input: kind, columns, rows, malformed, files; text is staged into `output` on the way.

        The same files give the same description. `starts`, if it is there, are the rows at which a partition has to begin.
        Raises Trouble (exit 3) for an input that cannot be used.
        """

    def open(self, manifest: Manifest, config: Config, output: pathlib.Path) -> Rows:
        """The rows of the input that `manifest` describes."""

    def differences(self, manifest: Manifest, config: Config) -> list[str]:
        """What differs between the input described, of this kind, and the one that is there now, in words; [] for nothing.

        Raises Trouble (exit 3) where there is none now.
        """


def find_reader(csv_path: str) -> Reader:
    """The reader for the input that `csv_path` names. Raises Trouble (exit 3) where it names nothing, or no reader fits.

    Whether files that are written out are there is the business of `check_there`.
    """
    from addons.inputs import delimited, files
    readers: list[Reader] = [module.READER for module in room("inputs") if hasattr(module, "READER")]
    last: Reader = delimited.READER
    return files.choose_reader(csv_path, [*(reader for reader in readers if reader is not last), last])


def check_there(csv_path: str) -> None:
    """Raise Trouble (exit 3) where there is no input that a reader fits, before anything is made for it."""
    from addons.inputs import files
    files.list_files(csv_path, find_reader(csv_path))


def needed_columns(config: Config) -> list[str]:
    """The names of the two columns that a row cannot do without. Raises Trouble (exit 3) for columns given by number."""
    if isinstance(config.url_column, int) or isinstance(config.caption_column, int):
        raise Trouble(EXIT_INPUT, "url_column and caption_column must be names: a table of this kind has a header")
    return list(dict.fromkeys((config.url_column, config.caption_column)))
