"""The images of finished rows, read again the way the scoring script reads them: several at a time and in order."""
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from addons.curation.duplicates import ImageFacts, measure_image
from addons.curation.finished import FinishedRun
from addons.inputs import image_folders
from addons.measures.image_digests import find_column, short_digest
from image_text_sim_clip import (
    EXIT_INPUT,
    URL,
    Config,
    LoaderPool,
    RowFailure,
    Trouble,
    decode_image,
    find_reader,
    hash_image,
    loader_threads,
    open_source,
    say,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL import Image

    from addons.inputs import RowsWithImages

FETCHES_AHEAD = 64  # threads that wait for URLs, or for a store; in order, so that some late ones do not hold all


def open_rows_with_images(config: Config, run: FinishedRun) -> "RowsWithImages | None":
    """The rows of an input that brings its images along, such as tars; None where the images are elsewhere.

    Trouble (exit 3) for an input that is gone, unless it is a staged table without images, of which nothing more is read, and
    for another one than was scored where images are found by their place in it.
    """
    manifest = run.plan.manifest
    is_staged = "staged" in manifest
    if is_staged and "holds_images" not in manifest and manifest["kind"] != image_folders.READER.kind:
        return None
    scored_with = dataclasses.replace(run.plan.config, image_path=config.image_path)  # which may be another place by now
    reader = find_reader(config.csv_path)
    differences = [] if reader.kind == manifest["kind"] else [f"it was {manifest['kind']}, now {reader.kind}"]
    rows = None if differences else reader.open(manifest, scored_with, run.output)
    if rows is not None and not rows.brings_images:
        return None
    if not is_staged:
        differences = differences or reader.differences(manifest, scored_with)
    if differences or rows is None:
        raise Trouble(EXIT_INPUT, f"csv_path {config.csv_path!r} is not what was scored ({'; '.join(differences)}), so the "
                                  f"images of the scores in {run.output} cannot be read again")
    return cast("RowsWithImages", rows)


class ScoredImage(NamedTuple):
    """The image of a row: its URL or path, or its place in an input that brings images along; and the digest of the bytes that
    were scored, None where the parts hold none."""

    source: str
    digest: int | None


class ScoredDigests:
    """The digests that the parts of a run hold of its images (addons/measures/image_digests.py)."""

    def __init__(self, run: FinishedRun) -> None:
        self._run = run
        self._starts = np.array([partition.start for partition in run.plan.partitions])

    def of_rows(self, first_row: int, count: int) -> list[int | None]:
        """Those of rows of one part that follow each other."""
        index = int(np.searchsorted(self._starts, first_row, "right")) - 1
        digests = self._of_part(index)
        return digests[first_row - self._starts[index]:][:count] if digests else [None] * count

    @functools.lru_cache(maxsize=1)  # noqa: B019 - of this part, while its rows come in several pieces
    def _of_part(self, index: int) -> list[int | None]:
        """A part's digests; none for a part that was written by the script alone."""
        import pyarrow.parquet as pq
        with self._run.plan.partitions[index].parquet.open("rb") as file, pq.ParquetFile(file) as part:
            column = find_column(part.schema_arrow)
            digests: list[int | None] = part.read([column])[column].to_pylist() if column else []
            return digests


class RunImages:
    """Scored images -> bytes -> images. Use it in a `with`: at its end what is still queued is dropped.

    Whatever has other bytes than those that were scored fails as `changed`.
    """

    def __init__(self, config: Config, run: FinishedRun) -> None:
        """Open the source of images that the config names. Trouble (exit 3) for a folder or an input that is not there."""
        self._config = config
        self._source_name = run.source_name
        self._digests = ScoredDigests(run)
        self.changed: set[str] = set()  # the sources at which there is another image than was scored
        is_far = config.image_path == "url" or URL.match(config.image_path)
        threads = FETCHES_AHEAD if is_far else loader_threads(config)
        self._rows = open_rows_with_images(config, run)
        self._read = self._rows.read_bytes if self._rows else open_source(config, threads)
        if self._rows is None and config.image_path == "url" and not config.cache_path:
            say("image_path: url without cache_path: the images are fetched again")
        self._pool = LoaderPool[bytes | RowFailure](threads)

    def __enter__(self) -> "RunImages":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def locate(self, first_row: int, table: "pa.Table") -> list[ScoredImage]:
        """The image of each row of a chunk, whose rows are of one part."""
        if self._rows:
            sources = self._rows.sources(first_row, first_row + table.num_rows)
        else:
            sources = table[self._source_name].to_pylist()
        return list(map(ScoredImage, sources, self._digests.of_rows(first_row, table.num_rows)))

    def load(self, images: Sequence[ScoredImage]) -> Iterator[bytes | RowFailure]:
        """Yield for each image its bytes, or the RowFailure that says why there are none."""
        self._pool.add(self._read_or_fail, [image.source for image in images])
        for image in images:
            data = self._pool.take()
            if isinstance(data, bytes) and image.digest not in (None, short_digest(hash_image(data))):
                self.changed.add(image.source)
                data = RowFailure("changed", "not the image that was scored")
            yield data

    def _read_or_fail(self, source: str) -> bytes | RowFailure:
        try:
            return self._read(source)
        except RowFailure as failure:
            return RowFailure(failure.status, failure.detail)

    def decode(self, data: bytes) -> "Image.Image":
        """Bytes -> 8-bit RGB image; raises RowFailure."""
        return decode_image(data, self._config)

    def measure_all(self, images: Iterable[ScoredImage], perceptual: bool) -> dict[ScoredImage, ImageFacts | None]:
        """Each image's facts, or None where it cannot be read or is another one by now; every image is read once."""
        distinct = list(dict.fromkeys(images))
        facts = {}
        for image, data in zip(distinct, self.load(distinct), strict=True):
            facts[image] = None if isinstance(data, RowFailure) else self._measure(data, perceptual)
        return facts

    def _measure(self, data: bytes, perceptual: bool) -> ImageFacts | None:
        from PIL import Image
        try:
            return measure_image(data, self.decode, perceptual, self._config.exif_orientation)
        except (RowFailure, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None
