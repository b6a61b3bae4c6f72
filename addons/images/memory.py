"""How much memory the images of a run may take together, between reading them and the end of their resizing.

Every loader has an Account for the image it is at, from which its source, the decoder and what resizes reserve before they
take. A script alone counts nothing: there only the number of images in flight is bounded.
"""
import bisect
import contextlib
import ctypes
import functools
import itertools
import os
import pathlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from image_text_sim_clip import RowFailure, usable_cores

if TYPE_CHECKING:
    from PIL import Image

LARGE_BYTES = 160_000_000  # what an image takes while it is decoded; after a larger one the memory is given back at once


class ByteBudget:
    """The bytes that all threads together may hold between reading an image and the end of its resizing.

    Each image has an Account, from which it reserves. Who does not fit waits: first come, first served, and those who will
    ask for no more go before those who will. Where everyone who holds something waits, the next one goes on all the same;
    so no two can wait for each other, and an image that needs more than the whole budget is worked on alone.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.held = 0
        self._working = 0  # accounts that hold something and do not wait
        self._turns: list[tuple[bool, int]] = []  # of those who wait, in order
        self._numbers = itertools.count()
        self._changed = threading.Condition()

    def reserve(self, account: "Account", count: int, is_last: bool) -> None:
        """Have the account hold `count` bytes more, once they fit."""
        with self._changed:
            turn = (not is_last, next(self._numbers))
            bisect.insort(self._turns, turn)
            self._working -= account.held > 0
            account.waits += 1
            self._changed.notify_all()  # it may be the last of those who held and did not wait
            self._changed.wait_for(lambda: self._turns[0] == turn and self._has_room(count))
            account.waits -= 1
            self._turns.remove(turn)
            self._working += 1
            account.held += count
            self.held += count
            self._changed.notify_all()  # the next one may fit as well

    def _has_room(self, count: int) -> bool:
        return self.held + count <= self.total or not self._working

    def release(self, account: "Account", down_to: int) -> None:
        """Give back what the account holds beyond `down_to` bytes."""
        with self._changed:
            self._working -= account.held > 0
            self.held -= account.held - down_to
            account.held = down_to
            self._working += account.held > 0
            self._changed.notify_all()


class Account:
    """What one image holds of a ByteBudget until it is resized; a context manager that gives it back."""

    def __init__(self, budget: ByteBudget) -> None:
        self.held = 0
        self.waits = 0  # above 0: it waits for its turn, which is not the image's own time
        self._budget = budget
        self._is_closed = False
        self._before_decoding: int | None = None  # what was held when the image was first decoded: its file

    def reserve(self, count: int, is_last: bool = False) -> None:
        """Hold `count` bytes more, and wait until they fit; with `is_last` the account will ask for no more."""
        if self._is_closed:
            raise RowFailure("crashed", "decoder did not return")  # the image has been given up, and nobody hears this
        if count > 0:
            self._budget.reserve(self, count, is_last)

    def reserve_for_decoding(self, image: "Image.Image", stored_pixels: int) -> None:
        """Hold what an opened image takes until it is resized (see `decoding_bytes`), in place of what an earlier try took."""
        if self._before_decoding is None:
            self._before_decoding = self.held
        self.release(self._before_decoding)
        self.reserve(decoding_bytes(image, stored_pixels), is_last=True)

    def release(self, down_to: int = 0) -> None:
        """Give back what is held beyond `down_to` bytes."""
        if self.held - down_to > LARGE_BYTES:
            trim_memory()
        if self.held > down_to:
            self._budget.release(self, down_to)

    def __enter__(self) -> "Account":
        return self

    def __exit__(self, *error: object) -> None:
        self._is_closed = True
        self.release()


class _Here(threading.local):
    """What the calling thread is at."""

    account: Account | None = None


_HERE = _Here()


@contextlib.contextmanager
def open_account(budget: ByteBudget) -> Iterator[Account]:
    """An account for the image that the calling thread is at, and from which `reserve_for_image` reserves."""
    with Account(budget) as account:
        _HERE.account = account
        try:
            yield account
        finally:
            _HERE.account = None


def reserve_for_image(count: int) -> None:
    """Before a source reads so many bytes of an image: wait until they fit into the budget of the run's images.

    For the image that the calling thread is at, until it is resized; outside a loader nothing waits.
    """
    if _HERE.account:
        _HERE.account.reserve(count)


def machine_memory() -> int:
    """The bytes of memory that this process may use: the machine's, or less where its container (cgroup) has a limit."""
    import psutil
    limits = [psutil.virtual_memory().total]
    groups = pathlib.Path("/sys/fs/cgroup")
    places = [groups, groups / "memory"]
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines():
            controllers, _, path = line.partition(":")[2].partition(":")  # "" and a path with cgroup v2, "memory" with v1
            places.append(pathlib.Path(f"{groups}/{controllers}{path}"))
    for place, name in itertools.product(places, ("memory.max", "memory.limit_in_bytes")):
        with contextlib.suppress(OSError, ValueError):  # not there; "max"
            limits.append(int((place / name).read_text(encoding="ascii")))
    return min(limits)


@functools.cache
def image_memory(memory_budget_mib: int | str) -> ByteBudget:
    """The budget of this process's images. `auto`: 1 GiB, or 64 MiB a core where that is more; never above a quarter of what
    there is, which processes that a launcher started here share."""
    if memory_budget_mib != "auto":
        return ByteBudget(int(memory_budget_mib) * 2**20)
    share = machine_memory() // 4 // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return ByteBudget(min(share, max(2**30, usable_cores() * 2**26)))


# Bytes that a decoder takes for a pixel of the file besides the image: WebP's two canvases and their copy, the coefficients
# of a progressive JPEG, a TIFF's tile in the file's own form.
_WORK_BYTES = {"WEBP": 12, "AVIF": 12, "JPEG": 6, "TIFF": 8}


def decoding_bytes(image: "Image.Image", stored_pixels: int) -> int:
    """About the most bytes that an opened image will take until it is resized; `stored_pixels` are those of the file, of which
    `decode: scaled` may decode fewer."""
    pixels = image.width * image.height
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        stored_pixels = max(stored_pixels, int(tags.get(322, 0)) * int(tags.get(323, 0)))  # of a tile
    a_pixel = 4  # Pillow's RGB
    if pixels > 4_000_000:
        a_pixel += 6  # the copies that torch reads, because Pillow does not lend more than 16 MB
    if image.mode != "RGB":
        a_pixel += 5  # converted: the image again, and a mask
    for_a_stored_pixel = _WORK_BYTES.get(image.format or "", 0)
    if image.format == "JPEG" and not image.info.get("progressive"):
        for_a_stored_pixel = 0
    return pixels * a_pixel + stored_pixels * for_a_stored_pixel


def trim_memory() -> None:
    """Have the C library give freed memory back: without it, each thread keeps what its largest image took."""
    with contextlib.suppress(OSError, AttributeError):  # glibc has it, others do not
        ctypes.CDLL(None).malloc_trim(0)
