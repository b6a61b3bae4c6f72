"""Decode images in a child process with limits of time and memory: doubtful ones, and all after a run crashed or hung.

A decoder that crashes or never returns then costs one row, with the status `crashed`, and not the run. The child, its
time limit and the pipes to it are the library pebble's.
"""
import concurrent.futures
import contextlib
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from addons.images.memory import image_memory
from addons.images.stopwatch import LOOK_S, Stopwatch
from image_text_sim_clip import (
    EXIT_CONFIG,
    REMARK,
    Config,
    ImageDecoder,
    ImageSettings,
    Remark,
    RowFailure,
    Trouble,
)

if TYPE_CHECKING:
    from concurrent.futures import Future

    import pebble
    from PIL import Image

Item = TypeVar("Item")

FOR_THE_ANSWER_BYTES = 400_000_000  # that the image goes back as, twice, beyond what decoding takes
WHY_A_CHILD = "images that may end their decoder are decoded in a process of their own"
START_LIMIT_S = 60.0  # for a new child to import what it needs, which does not count in an image's limit


class IsolatedDecoder:
    """Does in a child process what the script's ImageDecoder does here.

    Its method `decode` takes the place of an ImageLoader's. Safe to call from many threads, which take turns.
    """

    def __init__(self, config: Config, settings: ImageSettings) -> None:
        self.decoder = ImageDecoder(config, settings)  # which can be pickled
        self.limit_s = config.decode_timeout_s
        self.is_usable = True  # however its children end
        self.child_pid = 0  # 0: there is no child
        self._lock = threading.Lock()
        self._pool: pebble.ProcessPool | None = None
        self._closed = False

    def decode(self, data: bytes) -> "Image.Image":
        """Turn the bytes of an image file into an RGB image that is ready to be resized.

        Raises RowFailure for what is no proper image, and with the status `crashed` where the child ended or did not answer
        within `decode_timeout_s`; the next image then gets a new child. A child may take as much memory as the budget of the
        run's images has.
        """
        from PIL import Image
        with self._lock:
            if self._closed:
                raise RowFailure("not_tried", "the run has ended")
            pool = self._pool or self._start_child()
            try:
                answer = result_within(self.limit_s, pool.schedule(decode_here, (self.decoder, data)))
            except TimeoutError:
                self._end_child()
                raise RowFailure("crashed", "decoder did not return") from None
            except (OSError, RuntimeError):  # pebble.ProcessExpired; a child that ended before it had the image
                self._end_child()
                raise RowFailure("crashed", "decoder ended the process") from None
        if isinstance(answer, Refused):
            raise RowFailure(answer.status, answer.detail)
        image = Image.frombytes("RGB", answer.size, answer.pixels)
        image.info[REMARK] = answer.remark
        return image

    def _start_child(self) -> "pebble.ProcessPool":
        """Start a child and wait until it is ready; raises Trouble (exit 2) where that cannot be done."""
        try:
            import pebble
        except ImportError:
            raise Trouble(EXIT_CONFIG, f"{WHY_A_CHILD}: that needs pebble (pip install -r requirements.txt)") from None
        # spawn: a fork would copy the locks that torch's threads hold at this moment
        context = multiprocessing.get_context("spawn")
        self._pool = pebble.ProcessPool(max_workers=1, initializer=prepare_child,
                                        initargs=(image_memory(self.decoder.config.memory_budget_mib).total,),
                                        context=context)
        try:
            with _interruptions_blocked():
                ready = self._pool.schedule(os.getpid)
            self.child_pid = ready.result(START_LIMIT_S)
        except (OSError, RuntimeError) as error:
            self._end_child()
            raise Trouble(EXIT_CONFIG, f"{WHY_A_CHILD}, which cannot be started here ({str(error) or 'it does not answer'}): "
                                       "that needs a /dev/shm which can be written to, memory and a further process") from error
        return self._pool

    def _end_child(self) -> None:
        """End the child, whatever it is doing, and pebble's threads with it.

        The whole pool goes, because a child that ended in the middle of an answer leaves a half message in the pool's pipe.
        """
        if self._pool:
            self._pool.stop()
            self._pool.join()
            self._pool = None
            self.child_pid = 0

    def close(self) -> None:
        """End the child, without waiting for the image that it may be at; threads that still call get a RowFailure."""
        self._closed = True
        for process in multiprocessing.active_children():
            if process.pid == self.child_pid:
                process.kill()
        with self._lock:
            self._end_child()


@contextlib.contextmanager
def _interruptions_blocked() -> Iterator[None]:
    """Start threads and processes inside that never see what a terminal sends to all: it is this process's to handle.

    pebble's child ignores SIGINT once it runs, but not while it still imports, and never SIGHUP.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    resource_tracker.ensure_running()  # multiprocessing would start it with the first child, and unblock SIGINT thereby
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def result_within(limit_s: float, answer: "Future[Item]") -> Item:
    """What the child answers; TimeoutError where it takes longer. pebble's own limit goes by the clock on the wall."""
    stopwatch = Stopwatch()
    while not concurrent.futures.wait([answer], timeout=LOOK_S).done:
        if stopwatch.look() > limit_s:
            raise TimeoutError
    return answer.result()


# ── What runs in the child ────────────────────────────────────────────────────────────────────────────────────────────

class Decoded(NamedTuple):
    """An RGB image on its way to the parent: (width, height), three bytes a pixel, and what is to be said of it."""

    size: tuple[int, int]
    pixels: bytes
    remark: Remark


class Refused(NamedTuple):
    """A RowFailure on its way to the parent."""

    status: str
    detail: str


def prepare_child(most_bytes: int) -> None:
    """Import what decoding needs before the first image's time limit runs, and keep decoders off the parent's stdout.

    From here on the child may take `most_bytes` of memory more.
    """
    import PIL.Image
    PIL.Image.init()
    os.dup2(2, 1)  # stdout belongs to the result, and a C library may print
    with contextlib.suppress(OSError, ValueError, ImportError):  # a system without such limits; a lower one is set already
        import resource
        pages = int(pathlib.Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + most_bytes + FOR_THE_ANSWER_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def decode_here(decoder: ImageDecoder, data: bytes) -> Decoded | Refused:
    """Decode in this process, and return what can be pickled, whatever an image's metadata holds."""
    try:
        image = decoder(data)
    except RowFailure as failure:
        return Refused(failure.status, failure.detail)
    return Decoded(image.size, image.tobytes(), image.info.get(REMARK, Remark()))
