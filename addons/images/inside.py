"""Opens a file inside a folder without a moment at which a link could lead out of it.

The script alone resolves the path, looks whether it lies inside, and opens it; who can change the folder meanwhile could swap
a folder for a link in between. Here nothing is opened by a path of more than one step.
"""
import collections
import errno
import functools
import os
import pathlib
import stat

from addons.images.memory import reserve_for_image
from image_text_sim_clip import RowFailure

MAX_LINKS = 40  # followed on the way to one file, as Linux does
HUB_FOLDERS = ("datasets--", "models--", "spaces--")  # how the folders of the Hub's cache begin, one for each repository
_FOLDER_FLAGS = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)


def read_inside(folder: pathlib.Path, name: str, max_bytes: int) -> bytes | None:
    """The bytes of `folder`/`name`, None where there is no such file; RowFailure for one that may not be read."""
    handle = _open_blob(folder, name)
    if handle is None:
        handle = _open_inside(folder, name)
    if handle is None:
        return None
    return _read_and_close(handle, max_bytes)


@functools.cache
def find_blobs(folder: pathlib.Path) -> pathlib.Path | None:
    """Where the files of the Hub's cache lie that `folder`, a snapshot or a folder in one, has links to; None for no such."""
    for snapshots in [path for path in folder.parents if path.name == "snapshots"]:
        blobs = snapshots.parent / "blobs"
        if snapshots.parent.name.startswith(HUB_FOLDERS) and blobs.is_dir() and not blobs.is_symlink():
            return blobs
    return None


def _open_blob(folder: pathlib.Path, name: str) -> int | None:
    """A descriptor of the file in the same cache that a link in a snapshot leads to; None for no such link."""
    blobs = find_blobs(folder)
    if blobs is None or name.startswith("/") or ".." in name.split("/"):
        return None
    try:
        path = f"{folder}/{name}"
        target = os.path.normpath(f"{os.path.dirname(path)}/{os.readlink(path)}")  # noqa: PTH115, PTH120 - texts, nothing more
        if os.path.dirname(target) != str(blobs):  # noqa: PTH120
            return None
        place = os.open(blobs, _FOLDER_FLAGS)
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            return os.open(os.path.basename(target), flags, dir_fd=place)  # noqa: PTH119
        finally:
            os.close(place)
    except (OSError, ValueError):  # no link, or one to nothing
        return None


def read_following(folder: pathlib.Path, name: str, max_bytes: int) -> bytes | None:
    """The same with `follow_links`: the name as it is spelled must stay inside, links may lead to any regular file."""
    path = os.path.normpath(f"{folder}/{name}" if not name.startswith("/") else name)
    if os.path.commonpath([folder, path]) != str(folder):
        raise RowFailure("forbidden", "outside image_path")
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO must not block
    except PermissionError:
        raise RowFailure("forbidden", "no permission to read the file") from None
    except (OSError, ValueError):  # none there; a name too long, or with a NUL; links in a circle
        return None
    return _read_and_close(handle, max_bytes)


def _open_inside(folder: pathlib.Path, name: str) -> int | None:
    """A descriptor of `folder`/`name`, None where there is none; RowFailure for one that may not be read.

    The path is walked step by step on descriptors, and links are read, not followed by the system: what is swapped on the
    way cannot lead out between a check and the opening. Links that stay inside, absolute ones as well, are followed.
    """
    here = -1
    try:
        if not name.startswith("/") and ".." not in name and _is_absent(f"{folder}/{name}"):
            return None  # at once: a URL may have thousands of endings
        here = os.open(folder, _FOLDER_FLAGS)
        root = os.fstat(here)
        steps = collections.deque(_steps_of(name))
        links = 0
        while steps:
            step = steps.popleft()
            if not steps and step not in ("..", "/") and not _is_inside(here, root):
                raise RowFailure("forbidden", "outside image_path")
            found = _take_step(here, step, is_last=not steps)
            if isinstance(found, str):
                links += 1
                if links > MAX_LINKS:
                    return None
                steps.extendleft(reversed(_steps_of(found)))
                continue
            os.close(here)
            here = found
        if stat.S_ISDIR(os.fstat(here).st_mode) and not _is_inside(here, root):
            raise RowFailure("forbidden", "outside image_path")
        opened = here
        here = -1
        return opened
    except (FileNotFoundError, NotADirectoryError):
        if here >= 0 and not _is_inside(here, root):
            raise RowFailure("forbidden", "outside image_path") from None
        return None
    except PermissionError:
        raise RowFailure("forbidden", "no permission to read the file") from None
    except (OSError, ValueError) as error:  # a name too long, or with a NUL
        if isinstance(error, OSError) and error.errno in (errno.EIO, errno.ESTALE):
            raise RowFailure("corrupt", "the disk cannot read the file") from None
        return None
    finally:
        if here >= 0:
            os.close(here)


def _is_absent(path: str) -> bool:
    """Whether there is nothing of that name, as far as it may be looked for."""
    try:
        os.lstat(path)
    except PermissionError:
        return False
    except (OSError, ValueError):
        return True
    return False


def _steps_of(path: str) -> list[str]:
    """The names that a path goes through; "/" first where it is absolute."""
    steps = [step for step in path.split("/") if step not in ("", ".")]
    return ["/", *steps] if path.startswith("/") else steps


def _take_step(here: int, step: str, is_last: bool) -> int | str:
    """A descriptor of the folder or, at the end, of the file called `step` in the folder `here`; the text of a link."""
    if step in ("..", "/"):
        return os.open(step, _FOLDER_FLAGS, dir_fd=here)
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC if is_last else _FOLDER_FLAGS  # a FIFO must not block
    try:
        return os.open(step, flags, dir_fd=here)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR, errno.EMLINK):  # what systems say of a link that is not followed
            raise
        try:
            return os.readlink(step, dir_fd=here)
        except OSError:  # no link either, or no more
            raise NotADirectoryError from None


def _is_inside(here: int, root: os.stat_result) -> bool:
    """Whether the folder `here` is `root` or lies below it, by going up from it."""
    info = os.fstat(here)
    climber = os.dup(here)
    try:
        while (info.st_dev, info.st_ino) != (root.st_dev, root.st_ino):
            above = os.open("..", _FOLDER_FLAGS, dir_fd=climber)
            os.close(climber)
            climber = above
            last = info
            info = os.fstat(climber)
            if (info.st_dev, info.st_ino) == (last.st_dev, last.st_ino):  # the top
                return False
        return True
    finally:
        os.close(climber)


def _read_and_close(handle: int, max_bytes: int) -> bytes:
    """The bytes of the opened file; RowFailure for one that is too large, no regular file, or cannot be read."""
    try:
        return _read_regular(handle, max_bytes)
    except OSError:
        raise RowFailure("corrupt", "the disk cannot read the file") from None
    finally:
        os.close(handle)


def _read_regular(handle: int, max_bytes: int) -> bytes:
    info = os.fstat(handle)
    if not stat.S_ISREG(info.st_mode):
        raise RowFailure("forbidden", "not a regular file")
    if info.st_size > max_bytes:
        raise RowFailure("too_large", f"{info.st_size} bytes")
    reserve_for_image(info.st_size)
    with open(handle, "rb", closefd=False) as file:
        return file.read(max_bytes + 1)
