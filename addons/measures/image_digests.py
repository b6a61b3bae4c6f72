"""A digest of each row's image in the parts, by which curation tells whether a file is still the one that was scored.

What is kept are the first 32 bits of the hash that the loader takes of the bytes anyway, 4 bytes a row: two files share them by
chance once in four thousand million cases. They are a column of the parts alone, of the type uint32, which no other column has
and which the results leave out (`result_tables` in the script).
"""
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from addons.measures import Measure, Measured
from image_text_sim_clip import Config, PartitionRun, Scored

if TYPE_CHECKING:
    import pyarrow as pa

NAME = "image_digest"


def short_digest(digest: bytes) -> int:
    """What is kept of `Loaded.digest`."""
    return int.from_bytes(digest[:4], "little")


def find_column(schema: "pa.Schema") -> str | None:
    """The name of the column of digests in a part; None for one that was written by the script alone."""
    return next((field.name for field in schema if field.type == "uint32"), None)


class ImageDigests(Measure):
    """The column of digests; in every run, also in a dry one."""

    name = "image_digests"
    stage: ClassVar[str] = "write"  # too short for one of its own
    needs_model: ClassVar[bool] = False
    _of_partition: dict[int, list[int | None]]  # those of the rows at hand, from `measure` until `revise`

    @classmethod
    def wanted(cls, config: Config) -> bool:
        """In every run."""
        return True

    def measure(self, run: PartitionRun, scored: Scored) -> Measured:
        """Note the digests of the rows at hand; None for a row whose image was not decoded."""
        digests = [short_digest(digest) for digest in scored.images.place_of_digest]
        places = map(scored.images.place_of.get, run.sources)
        self._of_partition = {run.partition.index: [None if place is None else digests[place] for place in places]}
        return Measured({}, {})

    def revise(self, run: PartitionRun, table: "pa.Table") -> "pa.Table":
        """Append them to the part's table; a row that --retry-failed has not tried again keeps the digest that it had."""
        import pyarrow as pa
        digests: list[int | None] = [None] * table.num_rows
        if run.replaced:
            earlier = find_column(run.replaced.table.schema)
            digests = run.replaced.table[earlier].to_pylist() if earlier else digests
        for row, digest in zip(np.asarray(run.rows.index).tolist(), self._of_partition.pop(run.partition.index), strict=True):
            digests[row] = digest
        name = NAME
        while name in table.column_names:
            name += "_"
        return table.append_column(name, pa.array(digests, pa.uint32()))


MEASURE = ImageDigests
