"""Marks of the partitions that are being tried: an image that ends or hangs its run is found out by the next one.

A worker marks a partition before any of its images is decoded, and takes the mark away when the part is there. So only a worker
that was killed, or hung until it was stopped, leaves one behind; from then on images are decoded in child processes.
"""
import contextlib
import pathlib
from collections.abc import Iterable

from image_text_sim_clip import Partition, in_store, output_disk, remove_path


def mark_of(partition: Partition) -> pathlib.Path:
    """The file that exists while a worker is at the partition."""
    return partition.folder / f"part-{partition.index:05d}.trying"


class Marks:
    """The marks that a worker has made."""

    def __init__(self) -> None:
        self._made: set[pathlib.Path] = set()

    def begin(self, partition: Partition) -> None:
        """Mark a partition; one that an earlier run has left stays that run's."""
        mark = mark_of(partition)
        with output_disk(mark):
            if not mark.exists():
                mark.touch()
                self._made.add(mark)

    def finish(self, partition: Partition) -> None:
        """Take the mark of a finished partition away, whoever has made it."""
        mark = mark_of(partition)
        with output_disk(mark):
            remove_path(mark)
        self._made.discard(mark)

    def forget_rest(self) -> None:
        """Take away those of partitions that were not finished, because the run was stopped."""
        for mark in self._made:
            with contextlib.suppress(OSError):  # a disk that is gone; the run has ended, or has said so itself
                mark.unlink(missing_ok=True)
        self._made.clear()


def are_left_behind(partitions: list[Partition]) -> bool:
    """Whether an earlier run died or hung in one of the partitions."""
    if not partitions:
        return False
    folder = partitions[0].folder
    if len(partitions) > 1 and in_store(folder):  # one list instead of thousands of requests
        there = {path.name for path in folder.glob("part-*.trying")}
        return any(mark_of(partition).name in there for partition in partitions)
    with output_disk(folder):
        return any(mark_of(partition).exists() for partition in partitions)


def remove_marks(paths: Iterable[pathlib.Path]) -> None:
    """Remove what is left when all parts are there: of workers that were killed when theirs had been written."""
    for mark in paths:
        with contextlib.suppress(OSError):
            remove_path(mark)
