"""`images` in profile.json: what a user may not expect of the images that were scored, counted.

Rows whose URL ends at the file at which another URL of the partition ends, and images whose EXIF says that they lie on their
side while `exif_orientation` is false. Counted per partition, so that memory stays flat; nothing is shown where both are 0.
"""
import collections
import os
import pathlib
import urllib.parse
from collections.abc import Iterable
from typing import ClassVar

from addons.measures import Measure, Measured, kept_by
from image_text_sim_clip import Config, Json, PartitionRun, Scored, as_path, in_store, names_in_folder

COUNTS = ("rows_that_share_a_file", "images_with_exif_orientation")


class Images(Measure):
    """The two counts; in every run, also in a dry one."""

    name = "images"
    stage: ClassVar[str] = "write"  # too short for one of its own
    needs_model: ClassVar[bool] = False

    @classmethod
    def wanted(cls, config: Config) -> bool:
        """In every run."""
        return True

    def measure(self, run: PartitionRun, scored: Scored) -> Measured:
        """Count in one partition; --retry-failed adds to what had been counted. What is 0 is not kept."""
        earlier = kept_by(Images, run.earlier) or {}
        sources = [] if self.plan.table.brings_images else run.sources
        turned = sum(remark.is_turned for remark in scored.images.remark_of.values())
        counts = (count_rows_that_share(sources, self.config.image_path), turned)
        kept = {name: earlier.get(name, 0) + count for name, count in zip(COUNTS, counts, strict=True)}
        return Measured({}, {name: count for name, count in kept.items() if count})

    @classmethod
    def add_up(cls, parts: Iterable[Json]) -> Json:
        """The sums over all parts."""
        total = dict.fromkeys(COUNTS, 0)
        for part in parts:
            for name, count in (kept_by(cls, part) or {}).items():
                total[name] += count
        return total

    @classmethod
    def describe(cls, total: Json) -> Json | None:
        """The sums, for profile.json."""
        return total

    @classmethod
    def tell(cls, entry: Json) -> str:
        """What is not 0, in words."""
        shared, turned = (entry[name] for name in COUNTS)
        words = []
        if shared:
            words.append(f"{shared:,} rows share the file in image_path at which their URL ends with another URL")
        if turned:
            words.append(f"{turned:,} have an EXIF orientation, which exif_orientation: false ignores and training libraries "
                         "heed: they turn what was scored as it is stored")
        return "; ".join(words)


def count_rows_that_share(sources: list[str], image_path: str) -> int:
    """How many of the rows' `sources` are http(s) URLs that end, in the folder `image_path`, at another URL's file, too.

    Only URLs of one last segment can; the others are not looked up.
    """
    folder = as_path(image_path)
    if not in_store(folder) and not folder.is_dir():
        return 0
    urls_of_name = collections.defaultdict(set)
    for source in map(str.strip, sources):
        if source[:8].lower().startswith(("http://", "https://")):
            urls_of_name[urllib.parse.unquote(source.partition("?")[0].rpartition("/")[2])].add(source)
    urls_of_file = collections.defaultdict(set)
    for urls in urls_of_name.values():
        for url in urls if len(urls) > 1 else ():
            urls_of_file[find_file(folder, url)].add(url)
    urls_of_file.pop(None, None)
    shared: set[str] = set()
    for urls in urls_of_file.values():
        if len(urls) > 1:
            shared |= urls
    return sum(source.strip() in shared for source in sources)


def find_file(folder: pathlib.Path, source: str) -> tuple[int, int] | None:
    """What tells the file at which a source ends from all others: its device and its number there; None for no file."""
    for name in names_in_folder(source):
        try:
            # on a disk a name with .. in it must stay as it is
            info = (folder / name).stat() if in_store(folder) else os.stat(f"{folder}/{name}")  # noqa: PTH116
        except (OSError, ValueError):
            continue
        return info.st_dev, info.st_ino
    return None


MEASURE = Images
