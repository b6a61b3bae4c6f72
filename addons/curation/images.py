"""The images of finished rows, read again the way the scoring script reads them: several at a time and in order."""
import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from addons.curation.duplicates import ImageFacts, measure_image
from addons.curation.finished import FinishedRun
from addons.inputs import image_folders
from image_text_sim_clip import (
    EXIT_INPUT,
    URL,
    Config,
    LoaderPool,
    RowFailure,
    Trouble,
    decode_image,
    find_reader,
    loader_threads,
    open_source,
    say,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL import Image

    from addons.inputs import Rows

FETCHES_AHEAD = 64  # threads that wait for URLs, or for a store; in order, so that some late ones do not hold all


def open_rows_with_images(config: Config, run: FinishedRun) -> "Rows | None":
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
    return rows


class RunImages:
    """Sources -> bytes -> images. Use it in a `with`: at its end what is still queued is dropped."""

    def __init__(self, config: Config, run: FinishedRun) -> None:
        """Open the source of images that the config names. Trouble (exit 3) for a folder or an input that is not there."""
        self._config = config
        self._source_name = run.source_name
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

    def locate(self, first_row: int, table: "pa.Table") -> list[str]:
        """The source of each row of a chunk: its URL or path, or its place in an input that brings images along."""
        if self._rows:
            return self._rows.sources(first_row, first_row + table.num_rows)
        return table[self._source_name].to_pylist()

    def load(self, sources: list[str]) -> Iterator[bytes | RowFailure]:
        """Yield for each source its bytes, or the RowFailure that says why there are none."""
        self._pool.add(self._read_or_fail, sources)
        for _ in sources:
            yield self._pool.take()

    def _read_or_fail(self, source: str) -> bytes | RowFailure:
        try:
            return self._read(source)
        except RowFailure as failure:
            return RowFailure(failure.status, failure.detail)

    def decode(self, data: bytes) -> "Image.Image":
        """Bytes -> 8-bit RGB image; raises RowFailure."""
        return decode_image(data, self._config)

    def measure_all(self, sources: Iterable[str], perceptual: bool) -> dict[str, ImageFacts | None]:
        """Each source's facts, or None where the image cannot be read; every source is read once."""
        names = list(dict.fromkeys(sources))
        facts = {}
        for name, data in zip(names, self.load(names), strict=True):
            facts[name] = None if isinstance(data, RowFailure) else self._measure(data, perceptual)
        return facts

    def _measure(self, data: bytes, perceptual: bool) -> ImageFacts | None:
        from PIL import Image
        try:
            return measure_image(data, self.decode, perceptual, self._config.exif_orientation)
        except (RowFailure, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None
