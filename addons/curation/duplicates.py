"""What one row does to another: one caption per image, one of several equal images, one of several equal captions.

Rows are compared by 64-bit hashes in plain arrays, about 80 bytes a row that is still there, so 100 million rows take
8 GB. Two different texts or files share such a hash by chance in one of 3,700 runs of 100 million rows.
The best row of a group is the one with the highest similarity, and of equal ones the first.
"""
import dataclasses
import hashlib
import io
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from addons.curation import NeighbourRule
from addons.images.exif import find_orientation

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from PIL import Image

    from addons.curation.rules import Curation
    from addons.curation.semantic import SavedImages


def hash_bytes(data: bytes) -> int:
    """64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@dataclasses.dataclass(frozen=True)
class ImageFacts:
    """What the rules need to know of an image: pixels, a hash that equal (or, perceptually, similar) ones share, and one of
    its bytes."""

    width: int
    height: int
    fingerprint: int
    content: int


def measure_image(data: bytes, decode: "Callable[[bytes], Image.Image]", perceptual: bool,
                  turns: bool = False) -> ImageFacts:
    """Facts of an encoded image. `decode` (bytes -> RGB image, raises for a broken one) is called for `perceptual`.

    Otherwise only the header is read, unless it cannot be; `turns` says that `decode` heeds EXIF orientations. Raises OSError
    or ValueError, or what `decode` raises.
    """
    from PIL import Image
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                if turns and find_orientation(image) in (5, 6, 7, 8):
                    width, height = height, width
    except Exception:  # what lies around the pixels makes Pillow raise nearly anything; the scorer may read them all the same
        width, height = decode(data).size
    content = hash_bytes(data)
    if not perceptual:
        return ImageFacts(width, height, content, content)
    import imagehash
    return ImageFacts(width, height, int(str(imagehash.phash(decode(data))), 16), content)


class Neighbours(NamedTuple):
    """Rows that passed the rules for one row, as parallel arrays (n,), the best row first."""

    rows: np.ndarray  # int64: numbers in the input
    keys: np.ndarray  # uint32: order keys of the similarities
    sources: np.ndarray  # uint64: hashes of URL or path; where the table holds the images, of path and bytes
    captions: np.ndarray  # uint64: hashes of the captions
    images: np.ndarray  # uint64: fingerprints of the images

    def select(self, which: np.ndarray) -> "Neighbours":
        """Those at `which`, an index or a bool array, in its order."""
        return Neighbours(*(column[which] for column in self))


class Candidates:
    """Gathers, chunk by chunk, the rows to be compared with each other."""

    def __init__(self) -> None:
        self._chunks: list[Neighbours] = []
        self.add([], [], [], [], [])  # gives the types when there is no other chunk

    def add(self, rows: "ArrayLike", keys: "ArrayLike", sources: "ArrayLike", captions: "ArrayLike",
            images: "ArrayLike") -> None:
        """Keep a chunk, its rows in any order: see `Neighbours`."""
        self._chunks.append(Neighbours(np.asarray(rows, np.int64), np.asarray(keys, np.uint32), np.asarray(sources, np.uint64),
                                       np.asarray(captions, np.uint64), np.asarray(images, np.uint64)))

    def gather(self) -> Neighbours:
        """All chunks together, the best row first; they are given away, so that they are held once."""
        whole = Neighbours(*(np.concatenate(arrays) for arrays in zip(*self._chunks, strict=True)))
        self._chunks.clear()
        return whole.select(np.lexsort((whole.rows, ~whole.keys)))


# ── Groups ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def find_first_of_group(groups: np.ndarray) -> np.ndarray:
    """For each element of (n,) the place of the first one of its value: int64 (n,)."""
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    return first[group]


def find_first_source(groups: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """The same, but the elements of the source that is met first in a group stay all: an image keeps its captions."""
    first = find_first_of_group(groups)
    return np.where(sources == sources[first], np.arange(len(groups)), first)


class Leaders:
    """The perceptual hashes that lead a group, found by any hash that is within `distance` bits of them.

    A hash within d bits of another equals it in at least one of d + 1 bands of bits, so only those that share a band are
    compared. Time grows with the square of the number of different images, slowly: good for a million, not for a hundred
    million.
    """

    def __init__(self, distance: int) -> None:
        bounds = [64 * band // (distance + 1) for band in range(distance + 2)]
        self._distance = distance
        self._bands = list(itertools.pairwise(bounds))  # (lowest bit, bit after the highest)
        self._with_bits: list[dict[int, list[int]]] = [{} for _ in self._bands]  # of each band: its bits -> leaders

    def _cut(self, fingerprint: int) -> list[int]:
        """The bits of each band."""
        return [fingerprint >> low & (1 << high - low) - 1 for low, high in self._bands]

    def find(self, fingerprint: int) -> int | None:
        """The first leader within the distance, band by band; None where there is none."""
        for bits, leaders in zip(self._cut(fingerprint), self._with_bits, strict=True):
            for leader in leaders.get(bits, ()):
                if (leader ^ fingerprint).bit_count() <= self._distance:
                    return leader
        return None

    def add(self, fingerprint: int) -> None:
        """Let this hash lead a group."""
        for bits, leaders in zip(self._cut(fingerprint), self._with_bits, strict=True):
            leaders.setdefault(bits, []).append(fingerprint)


def group_similar(fingerprints: np.ndarray, distance: int) -> np.ndarray:
    """(n,) uint64 perceptual hashes, the best row first -> (n,) groups: each joins a leader within `distance` bits.

    A hash that finds no leader leads a group itself. So of two leaders none is within `distance` bits of the other.
    """
    leaders = Leaders(distance)
    group_of: dict[int, int] = {}
    hashes = np.asarray(fingerprints, np.uint64).tolist()
    for fingerprint in hashes:
        if fingerprint in group_of:
            continue
        leader = leaders.find(fingerprint)
        if leader is None:
            leader = fingerprint
            leaders.add(fingerprint)
        group_of[fingerprint] = leader
    return np.array([group_of[fingerprint] for fingerprint in hashes], np.uint64)


# ── Rules ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

@dataclasses.dataclass(frozen=True)
class OneCaptionPerImage:
    """Keeps the best row of each URL or path."""

    name: ClassVar[str] = "one_caption_per_image"

    def find_staying(self, rows: Neighbours) -> np.ndarray:
        """For each row the place of the best one of its source: int64 (n,)."""
        return find_first_of_group(rows.sources)


@dataclasses.dataclass(frozen=True)
class EqualImages:
    """Keeps, of images with the same bytes, the best-scoring source with all its captions."""

    name: ClassVar[str] = "duplicate_image"

    def find_staying(self, rows: Neighbours) -> np.ndarray:
        """For each row the place of the best one of its image, or its own if it is of that one's source: int64 (n,)."""
        return find_first_source(rows.images, rows.sources)


@dataclasses.dataclass(frozen=True)
class SimilarImages:
    """Keeps, of images whose perceptual hashes differ by few bits, the best-scoring source with all its captions."""

    distance: int  # bits
    name: ClassVar[str] = "duplicate_image"

    def find_staying(self, rows: Neighbours) -> np.ndarray:
        """For each row the place of the best one of its group, or its own if it is of that one's source: int64 (n,)."""
        return find_first_source(group_similar(rows.images, self.distance), rows.sources)


@dataclasses.dataclass(frozen=True)
class EqualCaptions:
    """Keeps the best row of each caption."""

    name: ClassVar[str] = "duplicate_caption"

    def find_staying(self, rows: Neighbours) -> np.ndarray:
        """For each row the place of the best one of its caption: int64 (n,)."""
        return find_first_of_group(rows.captions)


def make_neighbour_rules(curation: "Curation", saved: "SavedImages | None" = None) -> list[NeighbourRule]:
    """The rules between rows that the keys ask for, in the order in which they are applied; `saved` for the semantic one."""
    made: list[NeighbourRule] = []
    if curation.one_caption_per_image:
        made.append(OneCaptionPerImage())
    if curation.duplicate_images == "exact":
        made.append(EqualImages())
    if curation.duplicate_images == "perceptual":
        made.append(SimilarImages(curation.perceptual_distance))
    if curation.duplicate_images == "semantic":
        from addons.curation.semantic import SemanticImages
        assert saved
        made.append(SemanticImages(saved, curation.semantic_distance))
    if curation.duplicate_captions == "exact":
        made.append(EqualCaptions())
    return made


class Dropped(NamedTuple):
    """What a rule between rows drops, as row numbers of the input in parallel arrays, int64 (n,)."""

    rows: np.ndarray  # the dropped ones
    stays: np.ndarray  # of each, the row that stays for it


def find_duplicates(rows: Neighbours, rules: Sequence[NeighbourRule]) -> dict[str, Dropped]:
    """What is dropped, by the name of the rule; each rule is applied to what the last one left."""
    dropped = {}
    for rule in rules:
        staying = rule.find_staying(rows)
        goes = staying != np.arange(len(staying))
        dropped[rule.name] = Dropped(rows.rows[goes], rows.rows[staying[goes]])
        rows = rows.select(~goes)
    return dropped
