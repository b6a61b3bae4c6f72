"""CSV and TSV, one file or many; what is a row is decided by csv_blocks.py, which keeps to the script's careful reader."""
import dataclasses

from addons.inputs import csv_blocks
from addons.inputs.compression import plain_suffix
from addons.inputs.text import TextReader, TextTable
from image_text_sim_clip import Config


class DelimitedReader(TextReader):
    """Records whose fields are separated by one character. A file whose suffix nobody knows is read so, too."""

    kind = "csv"
    suffixes: tuple[str, ...] = (".csv", ".tsv", ".txt")

    def open_table(self, config: Config, known: list[str]) -> TextTable:
        """Open the table at `config.csv_path`; `known` does not matter, because its first record names all columns."""
        if config.separator == "auto" and plain_suffix(config.csv_path) == ".tsv":
            config = dataclasses.replace(config, separator="\t")
        return csv_blocks.open_table(config, known)


READER = DelimitedReader()
