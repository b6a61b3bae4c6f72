"""Where the bytes of images come from, when it is not a folder, and what only some images or runs need.

An image source is a module of this room with the two names of `ImageSource` below. A run chooses it by its
`image_path`: the source whose `SOURCES` hold that value is opened, and any other `image_path` is a folder, which
the script reads itself.

To add one, put a file into this room, without a change anywhere else:

    SOURCES = ("archive",)                      # used by `image_path: archive`

    def open_source(config, threads):
        archive = Archive(...)
        return archive.read                     # (what the row's url column holds) -> the image file's bytes

What lives here:

    fetch.py         the source `url`: each row's URL is fetched, from public addresses only and within limits. It decides
                     which fetch has its turn when, flow.py how many are under way; web_pool.py loads a run's images as
                     they come, exchange.py is one attempt, http_client.py HTTP, targets.py what a URL means, names.py
                     names and addresses, hosts.py and suspicion.py what each host will bear, cache.py `cache_path`,
                     web_report.py what the summary tells
    marks.py         marks of the partitions being tried, by which a run that an image has killed is found out
    guard.py         a time limit around decoding; doubtful images, and all after a crash, go to child processes
    stopwatch.py     how long an image has been waited for, stops of the process apart
    memory.py        how much memory the images of a run may take together
    inside.py        opens a file of `image_path` so that no link leads out of it
    spellings.py     other spellings of a name that is not there
    costs.py         what a file will cost to decode, told from its structure
    isolate.py       decodes in a child process with limits of time and memory
    exif.py          which way up an image is, and what is said of one whose EXIF cannot be honoured
    plain_pixels.py  copies of a file without what lies around its pixels, for one that could not be read with it
    second_look.py   sets right what Pillow misreads without a word
    halves.py        refuses half images that decoders take for whole ones
    other_formats.py images of kinds that are not read here
    odd_images.py    16-bit, integer and float images, long strips, and what a file is that cannot be opened
    gpu_decode.py    `decode: gpu`, which decodes part of the JPEGs on the GPU

Guard, stopwatch, memory, inside, costs and the second look (with halves, EXIF and odd images) are part of every run; each of
the others is imported only by the run that needs it.
"""
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from image_text_sim_clip import Config


class ImageSource(Protocol):
    """What a module of this room offers to be an image source."""

    SOURCES: tuple[str, ...]
    """The values of `image_path` for which a run uses this source."""

    def open_source(self, config: "Config", threads: int) -> Callable[[str], bytes]:
        """Return the function that reads one image: what the row's url column holds -> the bytes of the image file.

        The function is called from `threads` loader threads at once (0: from the main thread alone). It raises RowFailure,
        with a status of STATUSES and a detail without times, addresses or absolute paths, for an image that cannot be had,
        and it returns or raises within a bounded time. Before it reads many bytes it calls `reserve_for_image` of memory.py,
        which waits until they fit into the run's budget of memory. `open_source` itself raises Trouble for a mistake in the
        config.

        Images of one partition are loaded in order. Where some may come late, what is returned can have two more methods, as
        Fetcher has: `open_pool(threads)`, which returns a pool that takes the place of the script's ImagePool, and
        `report_partition(plan, run, table)`, which returns what is to be kept next to a part. Such a pool bounds itself what
        is on its way, and reserves an image's bytes when a thread that decodes takes them.
        """
