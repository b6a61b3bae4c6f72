"""What one row does to another: one caption per image, one of several equal pictures, one of several equal captions.

Rows are compared by 64-bit hashes in plain arrays, about 80 bytes a row that is still there, so 100 million rows take
8 GB. Two different texts or files share such a hash by chance in one of 3,700 runs of 100 million rows.
The best row of a group is the one with the highest similarity, and of equal ones the first.
"""
import dataclasses
import hashlib
import io
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np


def hash_bytes(data: bytes) -> int:
    """64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@dataclasses.dataclass(frozen=True)
class PictureFacts:
    """What the rules need to know of a picture: pixels, and a hash that equal (or, perceptually, similar) ones share."""

    width: int
    height: int
    fingerprint: int


def measure_picture(data: bytes, decode: Callable[[bytes], Any], perceptual: bool) -> PictureFacts:
    """Facts of an encoded picture. `decode` (bytes -> RGB PIL picture, raises for a broken one) is called for `perceptual`.

    Otherwise only the header is read. Raises OSError or ValueError, or what `decode` raises.
    """
    from PIL import Image
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
    if not perceptual:
        return PictureFacts(width, height, hash_bytes(data))
    import imagehash
    return PictureFacts(width, height, int(str(imagehash.phash(decode(data))), 16))


class Candidates:
    """Rows that passed the rules for one row: parallel arrays, gathered in chunks."""

    NAMES = ("row", "key", "source", "caption", "picture")

    def __init__(self) -> None:
        self._chunks: list[tuple[Any, ...]] = []

    def add(self, rows: Any, keys: Any, sources: Any, captions: Any, pictures: Any) -> None:
        """Row numbers, order keys of the similarities, and 64-bit hashes of URL, caption and picture, (n,) each."""
        types = (np.int64, np.uint32, np.uint64, np.uint64, np.uint64)
        columns = (rows, keys, sources, captions, pictures)
        self._chunks.append(tuple(np.asarray(c, t) for c, t in zip(columns, types, strict=True)))

    def gather(self) -> dict[str, Any]:
        """All chunks, one array a name, the best row first."""
        if not self._chunks:
            return {name: np.empty(0, np.int64) for name in self.NAMES}
        whole = [np.concatenate(column) for column in zip(*self._chunks, strict=True)]
        self._chunks.clear()
        order = np.lexsort((whole[0], ~whole[1]))
        return {name: column[order] for name, column in zip(self.NAMES, whole, strict=True)}


def is_first_of_group(groups: Any) -> Any:
    """Which elements of (n,) are the first of their value: bool (n,)."""
    first = np.zeros(len(groups), bool)
    first[np.unique(groups, return_index=True)[1]] = True
    return first


def is_of_first_source(groups: Any, sources: Any) -> Any:
    """Which elements belong to the source that is met first in their group: an image keeps all its captions. bool (n,)."""
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    return sources == sources[first][group]


def group_similar(fingerprints: Any, distance: int) -> Any:
    """(n,) uint64 perceptual hashes, the best row first -> (n,) groups: each joins the first within `distance` bits.

    So of two that lead a group, none is within `distance` bits of the other. A hash within d bits of another equals it in
    at least one of d + 1 bands of bits, so only those that share a band are compared. Time grows with the square of the
    number of different pictures, slowly: good for a million, not for a hundred million.
    """
    bounds = [64 * band // (distance + 1) for band in range(distance + 2)]
    bands = [(low, (1 << high - low) - 1) for low, high in itertools.pairwise(bounds)]
    leaders: list[dict[int, list[int]]] = [{} for _ in bands]
    group_of: dict[int, int] = {}

    def find_leader(fingerprint: int) -> int | None:
        for (low, mask), table in zip(bands, leaders, strict=True):
            for leader in table.get(fingerprint >> low & mask, ()):
                if (leader ^ fingerprint).bit_count() <= distance:
                    return leader
        return None
    for fingerprint in np.asarray(fingerprints, np.uint64).tolist():
        if fingerprint in group_of:
            continue
        leader = find_leader(fingerprint)
        if leader is None:
            leader = fingerprint
            for (low, mask), table in zip(bands, leaders, strict=True):
                table.setdefault(fingerprint >> low & mask, []).append(fingerprint)
        group_of[fingerprint] = leader
    return np.array([group_of[f] for f in np.asarray(fingerprints, np.uint64).tolist()], np.uint64)


def find_duplicates(candidates: Candidates, one_caption_per_image: bool, images: str, distance: int,
                    captions: str) -> dict[str, Any]:
    """Row numbers to drop, by the name of the rule; the rules are applied in this order, each to what the last one left.

    `images` is keep, exact or perceptual (then within `distance` bits), `captions` is keep or exact.
    """
    left, dropped = candidates.gather(), {}

    def keep(rule: str, which: Any) -> None:
        dropped[rule] = left["row"][~which]
        left.update({name: column[which] for name, column in left.items()})
    if one_caption_per_image:
        keep("one_caption_per_image", is_first_of_group(left["source"]))
    if images != "keep":
        groups = left["picture"] if images == "exact" else group_similar(left["picture"], distance)
        keep("duplicate_image", is_of_first_source(groups, left["source"]))
    if captions != "keep":
        keep("duplicate_caption", is_first_of_group(left["caption"]))
    return dropped
