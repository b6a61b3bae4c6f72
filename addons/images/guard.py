"""What keeps one image from holding up or ending a run: doubtful ones are decoded in child processes, all within a time limit.

Every run has a Guard around its decoder. Ordinary images are decoded here, by the script's own ImageDecoder: a child process
for each would cost small images most of their rate. What costs.py finds doubtful goes to a child, which can be ended. What
overruns `decode_timeout_s` here all the same is given up: its thread cannot be ended and is left to itself, and from then on
every image of the run is decoded in child processes, so that this happens to a few threads at most.
"""
import contextlib
import dataclasses
import functools
import queue
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from addons.images import costs
from addons.images.isolate import IsolatedDecoder
from addons.images.marks import Marks, are_left_behind
from addons.images.memory import Account, image_memory, open_account
from addons.images.stopwatch import LOOK_S, Stopwatch
from image_text_sim_clip import (
    PROFILED,
    Config,
    ImageDecoder,
    ImageLoader,
    ImageSettings,
    Partition,
    RowFailure,
    compute_in_one_thread,
    say,
    usable_cores,
)

if TYPE_CHECKING:
    from PIL import Image

    from image_text_sim_clip import Made

CHILDS_SHARE = 2  # a child may take the whole budget, which few images do: this part of it is reserved
MOST_HELPERS = 4096  # as many as loader threads ask for at a time

Work = Callable[[], "Made"]


class Guard:
    """Decodes with care. `attach` puts it into a loader, whose threads may all call it at once."""

    def __init__(self, config: Config, settings: ImageSettings) -> None:
        self.limit_s = config.decode_timeout_s
        self.max_pixels = config.max_image_pixels
        self.isolates_all = False
        self.marks = Marks()
        self._memory = image_memory(config.memory_budget_mib)
        self._config = config
        self._settings = settings
        self._here = ImageDecoder(config, settings)
        self._open()

    def _open(self) -> None:
        self._helpers = Pool(Helper, MOST_HELPERS)
        self._children = Pool(lambda: IsolatedDecoder(self._config, self._settings), usable_cores())

    def attach(self, loader: ImageLoader) -> ImageLoader:
        """A copy of the loader that is guarded. A line profiler wants all in one thread, which no other can watch."""
        return dataclasses.replace(loader, decode=self.decode, watch=None if PROFILED else self.watch,
                                   open_account=functools.partial(open_account, self._memory))

    def look_back(self, partitions: list[Partition], loader: ImageLoader) -> ImageLoader:
        """The loader for these partitions: where an earlier run died or hung in one, all images go to child processes."""
        if not are_left_behind(partitions):
            return loader
        if not self.isolates_all:
            self.isolates_all = True
            say("an earlier run ended in the middle of a partition: images are decoded in processes of their own")
        return dataclasses.replace(loader, on_gpu=None)

    def decode(self, data: bytes, account: Account | None) -> "Image.Image":
        """Do what ImageDecoder does, in this process or in a child; raises RowFailure."""
        if self.isolates_all or costs.look(data, self.max_pixels):
            assert account is not None  # `attach` has seen to it
            # before a child is taken, or those who hold memory could wait for a child that waits for memory
            account.reserve(self._memory.total // CHILDS_SHARE, is_last=True)
            with _waiting(account), self._children.lend() as child:  # the child has a limit of its own
                return child.decode(data)
        return self._here(data, account)

    def watch(self, work: Work, account: Account) -> "Made":
        """What `work()` returns or raises; RowFailure `crashed` where it takes longer than the limit.

        While `account` waits for memory or for a child, that does not count.
        """
        with self._helpers.lend() as helper:
            helper.begin(work)
            stopwatch = Stopwatch()
            while not helper.has_answered(LOOK_S):
                seconds = stopwatch.look()
                if account.waits:
                    stopwatch.restart()
                elif seconds > self.limit_s:
                    helper.give_up()
                    self._isolate_all()
                    raise RowFailure("crashed", "decoder did not return")
            return helper.take_answer()

    def _isolate_all(self) -> None:
        if not self.isolates_all:
            self.isolates_all = True
            say("an image was not decoded in time: from here on images are decoded in processes of their own")

    def close(self, hangs: bool = False) -> None:
        """End the children and the threads that are not at work. The guard may be used again.

        Where the run was stopped because it `hangs`, the partitions that were not finished stay marked.
        """
        self._children.close()
        self._helpers.close()
        self._open()
        if not hangs:
            self.marks.forget_rest()


@contextlib.contextmanager
def _waiting(account: Account) -> Iterator[None]:
    """While in this context, the image's own time does not run."""
    account.waits += 1
    try:
        yield
    finally:
        account.waits -= 1


# ── A thread that can be left to itself ───────────────────────────────────────────────────────────────────────────────

class Helper:
    """A thread that works for another one, which waits no longer than it wants to."""

    def __init__(self) -> None:
        self.is_usable = True
        self._work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Made | BaseException] = queue.SimpleQueue()
        self._answer: Made | BaseException | None = None
        threading.Thread(target=self._run, name="image", daemon=True).start()  # a daemon: the program's end waits for none

    def _run(self) -> None:
        compute_in_one_thread()
        while work := self._work.get():
            try:
                answer: Made | BaseException = work()
            except BaseException as error:  # whoever waits raises it
                answer = error
            del work  # holds the image's bytes
            self._answers.put(answer)
            del answer

    def begin(self, work: Work) -> None:
        """Have the thread do this."""
        self._work.put(work)

    def has_answered(self, within_s: float) -> bool:
        """Whether it has finished; waits so long for it."""
        try:
            self._answer = self._answers.get(timeout=within_s)
        except queue.Empty:
            return False
        return True

    def take_answer(self) -> "Made":
        """What the work returned; raises what it raised."""
        answer = self._answer
        self._answer = None
        try:
            if isinstance(answer, BaseException):
                raise answer
            assert answer is not None
            return answer
        finally:
            del answer  # or the error and its own traceback would hold on to each other, and to the image's bytes

    def give_up(self) -> None:
        """Wait no longer. The thread ends when its work does, if that ever happens."""
        self.is_usable = False
        self.close()

    def close(self) -> None:
        """Let the thread end when it has nothing to do."""
        self._work.put(None)


# ── Lending what one thread at a time may use ─────────────────────────────────────────────────────────────────────────

class Lendable(Protocol):
    """A Helper or an IsolatedDecoder."""

    is_usable: bool

    def close(self) -> None:
        """End it."""


Thing = TypeVar("Thing", bound=Lendable)


class Pool(Generic[Thing]):
    """Makes things when they are first needed, `most` at a time, and keeps those that are not in use for the next."""

    def __init__(self, make: Callable[[], Thing], most: int) -> None:
        self._make = make
        self._made: list[Thing] = []
        self._idle: list[Thing] = []
        self._places = threading.Semaphore(most)
        self._is_closed = False

    @contextlib.contextmanager
    def lend(self) -> Iterator[Thing]:
        """A thing to be used by the caller alone; waits for its turn. Raises RowFailure once the pool is closed."""
        with self._places:
            thing = self._take()
            try:
                yield thing
            finally:
                if thing.is_usable:
                    self._idle.append(thing)
                else:
                    self._made.remove(thing)

    def _take(self) -> Thing:
        if self._is_closed:
            raise RowFailure("not_tried", "the run has ended")
        try:
            return self._idle.pop()
        except IndexError:
            thing = self._make()
            self._made.append(thing)
            return thing

    def close(self) -> None:
        """End all things, those in use as well."""
        self._is_closed = True
        for thing in list(self._made):
            thing.close()
