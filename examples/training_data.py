"""What is trained on: prompts of a CSV, or curated pairs of an `imagefolder` or a `webdataset`, streamed in a shuffled order.

Of curated pairs only captions, the column that weights them and where their bytes lie are read ahead, and of these no more
than a shuffle buffer is held. The order depends on the seed alone, so a resumption finds its place again.
"""
import csv
import dataclasses
import hashlib
import heapq
import io
import itertools
import json
import math
import pathlib
import random
import tarfile
from collections.abc import Iterable, Iterator
from typing import IO, Protocol

import numpy as np
import torch
from PIL import Image

from image_text_sim_clip import EXIT_CONFIG, EXIT_INPUT, Config, RowFailure, Trouble, decode_image

SHUFFLE_ROWS = 10_000  # pairs that wait in the shuffle buffer, without their images
BLOCK_LINES = 10_000  # lines of metadata.jsonl that are shuffled as one shard
MOST_HELD_OUT = 64
LEAST_TEMPERATURE = 1e-6
IMAGE_ENDINGS = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"}
MOST_TEXT_BYTES = 2**20  # of a tar's .json or .txt


# ── Prompts ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def read_prompts(path: pathlib.Path, column: str) -> list[str]:
    """The distinct, non-empty captions of a CSV's `column`, in order; raises Trouble (exit 3)."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if column not in (rows.fieldnames or []):
                raise Trouble(EXIT_INPUT, f"{path} has no column {column!r}; its columns: {', '.join(rows.fieldnames or [])}")
            prompts = list(dict.fromkeys(row[column].strip() for row in rows if (row[column] or "").strip()))
    except (OSError, UnicodeError, csv.Error) as error:
        raise Trouble(EXIT_INPUT, f"cannot read prompts from {path}: {error}") from None
    if not prompts:
        raise Trouble(EXIT_INPUT, f"{path} holds no prompt in its column {column!r}")
    return prompts


def split_prompts(prompts: list[str], held_out: list[str]) -> tuple[list[str], list[str]]:
    """Prompts to train with and prompts only watched: `held_out`, or a tenth (at most 64), evenly out of `prompts`."""
    if not held_out:
        held_out = prompts[::max(10, math.ceil(len(prompts) / MOST_HELD_OUT))]
    training = [prompt for prompt in prompts if prompt not in set(held_out)]
    if not training:
        raise Trouble(EXIT_INPUT, "no prompt is left to train with: all are held out")
    return training, held_out


# ── Curated pairs ─────────────────────────────────────────────────────────────────────────────────────────────────────

@dataclasses.dataclass(frozen=True)
class Pair:
    """One row of a curated set: its caption, the cell that weights it, and where its image's bytes lie."""

    caption: str
    cell: float | None  # None where the weighting column is empty
    path: pathlib.Path
    offset: int = 0
    size: int | None = None  # None: to the end of the file

    def read(self, most_bytes: int) -> bytes:
        """The image's bytes; raises OSError, or Trouble (exit 3) for more than `most_bytes`."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read(most_bytes + 1 if self.size is None else min(self.size, most_bytes + 1))
        if len(data) > most_bytes:
            raise Trouble(EXIT_INPUT, f"cannot read the image {self.path}: more than {most_bytes} bytes")
        return data


class Shard(Protocol):
    """A part of a curated set that is read from its beginning to its end."""

    def pairs(self, column: str | None) -> Iterator[Pair]:
        """The pairs, with the cells of `column`; raises Trouble (exit 3) that names the place."""


@dataclasses.dataclass(frozen=True)
class MetadataLines:
    """Some lines of an imagefolder's metadata.jsonl, from byte `start` on."""

    path: pathlib.Path
    start: int
    lines: int

    def pairs(self, column: str | None) -> Iterator[Pair]:
        """One pair a line."""
        with open_input(self.path) as file:
            file.seek(self.start)
            for line in itertools.islice(file, self.lines):
                if not line.strip():
                    continue
                row = parse_row(line, str(self.path))
                name = row.get("file_name")
                if not isinstance(name, str) or pathlib.PurePosixPath(name).is_absolute() or ".." in name.split("/"):
                    raise Trouble(EXIT_INPUT, f"{self.path}: every line must have a file_name below its folder, got {name!r}")
                yield Pair(caption_of(row, str(self.path)), cell_of(row, column, str(self.path)), self.path.parent / name)


@dataclasses.dataclass(frozen=True)
class Tar:
    """One tar of a webdataset: an image, a .json and perhaps a .txt for each key, one key after the other."""

    path: pathlib.Path

    def pairs(self, column: str | None) -> Iterator[Pair]:
        """One pair a key; only headers and texts are read."""
        with open_input(self.path) as file:
            for key, members in itertools.groupby(self._members(file), lambda member: split_name(member.name)[0]):
                pair = self._pair(file, f"{self.path}: {key}", list(members), column)
                if pair:
                    yield pair

    def _members(self, file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.isfile():
                        yield member
                    tar.members = []  # type: ignore[attr-defined] # or it would keep them all
        except tarfile.TarError as error:
            raise Trouble(EXIT_INPUT, f"cannot read {self.path}: {error} (a tar must not be compressed)") from None

    def _pair(self, file: IO[bytes], place: str, members: list[tarfile.TarInfo], column: str | None) -> Pair | None:
        """The pair of one key's members; None for a key without an image."""
        by_ending = {split_name(member.name)[1]: member for member in members}
        image = next((member for ending, member in by_ending.items() if ending in IMAGE_ENDINGS), None)
        if image is None:
            return None
        texts = {ending: read_member(file, by_ending[ending], place) for ending in ("json", "txt") if ending in by_ending}
        row = parse_row(texts.get("json", b"{}"), place)
        if "txt" in texts:
            row["text"] = texts["txt"].decode("utf-8", "replace")
        return Pair(caption_of(row, place), cell_of(row, column, place), self.path, image.offset_data, image.size)


def split_name(name: str) -> tuple[str, str]:
    """A member's key and ending, as webdataset cuts them: at the first dot of the file's own name."""
    folder, slash, file_name = name.rpartition("/")
    stem, _, ending = file_name.partition(".")
    return folder + slash + stem, ending.lower()


def read_member(file: IO[bytes], member: tarfile.TarInfo, place: str) -> bytes:
    """The bytes of a text in a tar."""
    if member.size > MOST_TEXT_BYTES:
        raise Trouble(EXIT_INPUT, f"{place}: a text of {member.size} bytes")
    file.seek(member.offset_data)
    return file.read(member.size)


def open_input(path: pathlib.Path) -> io.BufferedReader:
    """The file, open for reading; raises Trouble (exit 3)."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise Trouble(EXIT_INPUT, f"cannot read {path}: {error.strerror}") from None


def parse_row(line: bytes, place: str) -> dict[str, object]:
    """A JSON object; raises Trouble (exit 3) for anything else."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise Trouble(EXIT_INPUT, f"{place}: a row is no JSON ({' '.join(str(error).split())[:100]})") from None
    if not isinstance(row, dict):
        raise Trouble(EXIT_INPUT, f"{place}: a row is no JSON object")
    return row


def caption_of(row: dict[str, object], place: str) -> str:
    """The row's text; raises Trouble (exit 3) where there is none."""
    text = row.get("text")
    if not isinstance(text, str) or not text.strip():
        raise Trouble(EXIT_INPUT, f"{place}: every row must have a text, got {text!r}")
    return text.strip()


def cell_of(row: dict[str, object], column: str | None, place: str) -> float | None:
    """The row's number in `column`, None for an empty cell or without a column; raises Trouble (exit 3) for anything else."""
    if column is None:
        return None
    if column not in row:
        raise Trouble(EXIT_INPUT, f"{place}: a row has no column {column!r} to weight by; it has {', '.join(sorted(row))}")
    cell = row[column]
    if cell is None:
        return None
    if isinstance(cell, (int, float)) and math.isfinite(cell):
        return float(cell)
    raise Trouble(EXIT_INPUT, f"{place}: the column {column!r} must hold numbers, got {cell!r}")


def find_shards(path: pathlib.Path) -> list[Shard]:
    """The shards of an `imagefolder` or a `webdataset` (a folder of tars, or one tar); raises Trouble (exit 3)."""
    if path.suffix == ".tar" and path.is_file():
        return [Tar(path)]
    for table in (path / "train/metadata.jsonl", path / "metadata.jsonl"):
        if table.is_file():
            return cut_lines(table)
    tars = sorted(path.glob("*.tar"))
    if not tars:
        raise Trouble(EXIT_INPUT, f"{path} is no imagefolder (metadata.jsonl, train/metadata.jsonl) and no webdataset (*.tar)")
    return [Tar(tar) for tar in tars]


def cut_lines(table: pathlib.Path) -> list[Shard]:
    """The lines of metadata.jsonl, cut into shards."""
    shards: list[Shard] = []
    with open_input(table) as file:
        start = 0
        while lines := list(itertools.islice(file, BLOCK_LINES)):
            shards.append(MetadataLines(table, start, len(lines)))
            start += sum(map(len, lines))
    return shards


@dataclasses.dataclass(frozen=True)
class Weighting:
    """How much pairs count: exp(cell / temperature), or exp(-cell / temperature) where low cells are the good ones."""

    column: str
    prefer: str  # low or high
    temperature: float

    @property
    def needed_column(self) -> str | None:
        """The column to read; None where all pairs count alike."""
        return None if math.isinf(self.temperature) else self.column

    def exponent(self, pair: Pair) -> float | None:
        """The logarithm of the pair's weight before weights are scaled; None for an empty cell."""
        if self.needed_column is None:
            return 0.0
        if pair.cell is None:
            return None
        return (-pair.cell if self.prefer == "low" else pair.cell) / self.temperature


class CuratedSet:
    """The pairs to train on, their weights (1 on average), and the captions that are only watched."""

    def __init__(self, path: pathlib.Path, weighting: Weighting, held_out: list[str], seed: int) -> None:
        self.shards = find_shards(path)
        self.weighting = weighting
        self.seed = seed
        self.held_out = held_out or self._choose_held_out()
        self._watched = set(self.held_out)
        self.count = 0
        self.watched = 0  # pairs whose caption is held out
        self.left_out = 0  # pairs whose weighting cell is empty
        self._highest = -math.inf
        self._total = 0.0  # of exp(exponent - highest)
        self._take_stock()
        if not self.count:
            raise Trouble(EXIT_INPUT, f"{path} holds no pair to train on: {self.watched} are held out, {self.left_out} have an "
                                      f"empty {weighting.column}")

    def _all_pairs(self) -> Iterator[Pair]:
        for shard in self.shards:
            yield from shard.pairs(self.weighting.needed_column)

    def _choose_held_out(self) -> list[str]:
        """A tenth of the captions, at most 64: those whose hashes are the least. At least one."""
        rows = 0
        least: list[tuple[int, str]] = []  # a heap whose first is the greatest of them, as negative hashes
        chosen: set[str] = set()
        for pair in self._all_pairs():
            rows += 1
            if pair.caption in chosen:
                continue
            entry = (-int.from_bytes(hashlib.sha256(pair.caption.encode()).digest()[:8]), pair.caption)
            chosen.add(pair.caption)
            heapq.heappush(least, entry)
            if len(least) > MOST_HELD_OUT:
                chosen.discard(heapq.heappop(least)[1])
        wanted = max(1, min(MOST_HELD_OUT, math.ceil(rows / 10)))
        return [caption for _, caption in sorted(least, reverse=True)[:wanted]]

    def _take_stock(self) -> None:
        """Count the pairs to train on and sum their weights, in one pass."""
        for pair in self._all_pairs():
            if pair.caption in self._watched:
                self.watched += 1
                continue
            exponent = self.weighting.exponent(pair)
            if exponent is None:
                self.left_out += 1
                continue
            self.count += 1
            if exponent > self._highest:
                self._total *= math.exp(self._highest - exponent)
                self._highest = exponent
            self._total += math.exp(exponent - self._highest)

    def weight(self, pair: Pair) -> float:
        """How much the pair counts; 1 on average."""
        exponent = self.weighting.exponent(pair)
        assert exponent is not None
        return math.exp(exponent - self._highest) * self.count / self._total

    def stream(self, skip: int = 0) -> Iterator[Pair]:
        """Pairs without end, each once an epoch, each epoch in an order of its own; the first `skip` are passed over."""
        epoch, within = divmod(skip, self.count)
        for number in itertools.count(epoch):
            order = random.Random(f"{self.seed} {number}")  # noqa: S311 - repeatable, not secret
            shards = order.sample(self.shards, len(self.shards))
            pairs = itertools.chain.from_iterable(map(self._trained, shards))
            yield from itertools.islice(shuffled(pairs, order, SHUFFLE_ROWS), within, None)
            within = 0

    def _trained(self, shard: Shard) -> Iterator[Pair]:
        for pair in shard.pairs(self.weighting.needed_column):
            if pair.caption not in self._watched and self.weighting.exponent(pair) is not None:
                yield pair

    def digest(self) -> str:
        """A name for what is trained on, which changes with it: of the number of pairs, their weights and captions watched."""
        text = json.dumps([self.count, self.left_out, self._highest, self._total, sorted(self._watched)])
        return hashlib.sha256(text.encode()).hexdigest()


def shuffled(pairs: Iterable[Pair], order: random.Random, most: int) -> Iterator[Pair]:
    """The pairs through a buffer of `most`, which gives a random one for each that comes in."""
    waiting: list[Pair] = []
    for pair in pairs:
        if len(waiting) < most:
            waiting.append(pair)
            continue
        place = order.randrange(most)
        yield waiting[place]
        waiting[place] = pair
    order.shuffle(waiting)
    yield from waiting


# ── Images ────────────────────────────────────────────────────────────────────────────────────────────────────────────

@dataclasses.dataclass(frozen=True)
class TrainingImage:
    """A square of an image, and how it was cut."""

    pixels: torch.Tensor  # (3, side, side) in [-1, 1]
    original_size: tuple[int, int]  # height, width
    crop_corner: tuple[int, int]  # top, left, in the image resized so that its shorter side is `side`


def read_image(pair: Pair, side: int, config: Config) -> TrainingImage:
    """The centre square of the pair's image, resized. Raises Trouble (exit 3) naming the file.

    It is decoded as `config`, the scorer's, says (EXIF orientation, colour under transparency, AVIF): what is trained on is
    what was scored.
    """
    try:
        image = decode_image(pair.read(config.max_image_bytes), config)
    except (OSError, RowFailure) as error:
        raise Trouble(EXIT_INPUT, f"cannot read the image {pair.path}: {error}") from None
    edge = min(image.size)
    left = (image.width - edge) // 2
    top = (image.height - edge) // 2
    square = image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + edge, top + edge))
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1
    return TrainingImage(pixels, (image.height, image.width), (round(top * side / edge), round(left * side / edge)))


def default_preference(column: str) -> str:
    """Whether low or high cells of the column are the good ones: low for a dissimilarity."""
    return "low" if "dissimilarity" in column else "high"


def check_temperature(temperature: float) -> None:
    """Raise Trouble (exit 2) for a temperature that weights nothing, or by which a cell could become infinite."""
    if not temperature >= LEAST_TEMPERATURE:
        raise Trouble(EXIT_CONFIG, f"--temperature must be at least {LEAST_TEMPERATURE}, got {temperature}")
