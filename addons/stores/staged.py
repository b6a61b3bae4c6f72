"""A staged table in an object store: read in ranges, of the very version that the manifest names."""
from typing import TYPE_CHECKING, cast

import pyarrow as pa
import pyarrow.parquet as pq

from addons.stores.paths import StorePath
from addons.stores.remote import STORE
from image_text_sim_clip import EXIT_VERIFY, Json, StagedRows, Trouble

if TYPE_CHECKING:
    import pathlib


def identify(path: "pathlib.Path") -> str:
    """What tells this version of an object from another. Raises FileNotFoundError."""
    info = STORE.stat(str(path))
    return f"{info.bytes} bytes, version {info.version or info.mtime_ns}"


class RemoteStagedRows(StagedRows):
    """The rows of pairs.parquet by number; its footer is read once."""

    def __init__(self, path: StorePath, manifest: Json) -> None:
        super().__init__(path)
        self._place = path
        self._identity: str = manifest.get("staged", {}).get(path.name, "")
        self._metadata: pq.FileMetaData | None = None

    def _read_table(self, start: int, stop: int) -> "pa.Table":
        with STORE.open_native(str(self._place)) as file:
            if identify(self._place) != self._identity:  # and a version that is replaced while it is read is an error
                raise Trouble(EXIT_VERIFY, f"{self._place} has been replaced by another process; run the same command again")
            with pq.ParquetFile(file, metadata=self._metadata) as staged:
                self._metadata = staged.metadata
                return cast(pa.Table, self._read_groups(staged, start, stop))
