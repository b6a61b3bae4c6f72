"""`duplicate_images: semantic`: images that show the same, by their saved embeddings, whatever was done to the files.

As SemDeDup (Abbas et al. 2023, arXiv 2303.09540) does: two images are duplicates if the cosine of their embeddings is at least
1 - `semantic_distance`, and only images of like clusters are compared. The images are taken the best row's first. Each joins a
leader within that distance, or leads a group itself, so of two leaders none is near the other, as far as the search finds it.

Up to EXACT_IMAGES images are compared with every leader. Beyond, faiss keeps the leaders in clusters, a byte for each number of
a vector, and looks into the PROBES nearest ones; what it finds is checked with the vectors themselves. These lie in a file, in
float16: a million of width 512 take 1 GB on disk; with all of them leading groups the program takes 0.8 GiB of memory.
"""
import dataclasses
import functools
import math
import pathlib
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from addons.curation.duplicates import Neighbours, find_first_source
from addons.curation.finished import FinishedRun
from addons.measures.embeddings import read_embeddings, unpack
from image_text_sim_clip import output_disk

if TYPE_CHECKING:
    import faiss

EXACT_IMAGES = 20_000
PROBES = 16  # clusters that are looked into
CANDIDATES = 4  # leaders that are checked for each image
SLACK = 0.005  # by which the cosines that faiss computes from bytes may be off
PLACE = np.uint64(0xFFFFFFFF)  # the part of an image's number that is its place; all ones for a row without an image
BATCH = 2048  # images that are looked up at a time
TRAINING_IMAGES = 40  # for each cluster; faiss warns below 39


# ── Vectors on disk ───────────────────────────────────────────────────────────────────────────────────────────────────

@dataclasses.dataclass(frozen=True)
class VectorFile:
    """Unit vectors in a file, (count, width) float16. It is read and not mapped, so that what was read takes no memory."""

    path: pathlib.Path
    count: int
    width: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """The vectors in [start, stop): float32 (stop - start, width), of length 1."""
        with self.path.open("rb") as file:
            file.seek(2 * self.width * start)
            numbers = np.fromfile(file, np.float16, (stop - start) * self.width)
        return unpack(numbers.reshape(-1, self.width))

    def read_some(self, places: np.ndarray) -> np.ndarray:
        """The vectors at `places` (n,): float32 (n, width), of length 1."""
        vectors = np.empty((len(places), self.width), np.float16)
        with self.path.open("rb") as file:
            for row, place in enumerate(places.tolist()):
                file.seek(2 * self.width * place)
                vectors[row] = np.fromfile(file, np.float16, self.width)
        return unpack(vectors)


class SavedImages:
    """The embeddings that a run saved of its images, each known by a number: its part's, then its place in the part's file."""

    def __init__(self, run: FinishedRun, folder: pathlib.Path, process: int) -> None:
        self._run = run
        self._path = folder / f".vectors.{process}.tmp"
        self._starts = np.array([partition.start for partition in run.plan.partitions])

    def numbers_of(self, first_row: int, count: int) -> np.ndarray:
        """The number of each row's image, uint64 (count,), of rows of one part; its place is PLACE for none."""
        index = int(np.searchsorted(self._starts, first_row, "right")) - 1
        places = self._places_in(index)[first_row - self._starts[index]:][:count]
        return (np.uint64(index) << np.uint64(32)) | np.where(places < 0, PLACE, places.astype(np.uint64))

    @functools.lru_cache(maxsize=1)  # noqa: B019 - of this part, while its rows come in several pieces
    def _places_in(self, index: int) -> np.ndarray:
        with self._run.plan.partitions[index].embeddings.open("rb") as stored, np.load(stored) as file:
            places: np.ndarray = file["image_of_row"]
            return places

    def write(self, numbers: np.ndarray) -> VectorFile:
        """Write the vectors of these images, (n,) uint64 without repetition, in this order."""
        parts = (numbers >> np.uint64(32)).astype(np.int64)
        places = (numbers & PLACE).astype(np.int64)
        by_part = np.argsort(parts, kind="stable")
        present, starts = np.unique(parts[by_part], return_index=True)
        width = 0
        with output_disk(self._path), self._path.open("wb") as file:
            for index, ranks in zip(present.tolist(), np.split(by_part, starts[1:]), strict=True):
                images = read_embeddings(self._run.plan.partitions[index].embeddings)["images"].astype(np.float16)
                width = images.shape[1]
                for rank in ranks.tolist():
                    file.seek(2 * width * rank)
                    file.write(images[places[rank]].tobytes())
        return VectorFile(self._path, len(numbers), width)

    def close(self) -> None:
        """Remove the file of vectors."""
        self._path.unlink(missing_ok=True)


# ── Groups ────────────────────────────────────────────────────────────────────────────────────────────────────────────

class Leaders:
    """The vectors that lead a group, found by any vector that is within `distance` of them."""

    def __init__(self, vectors: VectorFile, distance: float) -> None:
        self._vectors = vectors
        self._least = 1 - distance
        self._index = make_index(vectors)
        self._places = np.empty(0, np.int64)  # of the leaders in the file, in the order of the index

    def find(self, block: np.ndarray) -> np.ndarray:
        """For each vector of `block` (n, d) the place of a leader within the distance, -1 for none: int64 (n,)."""
        found = np.full(len(block), -1, np.int64)
        if not len(self._places):
            return found
        cosines, leaders = self._index.search(block, CANDIDATES)
        for rank in range(CANDIDATES):
            open_ones = np.flatnonzero((found < 0) & (leaders[:, rank] >= 0) & (cosines[:, rank] >= self._least - SLACK))
            places = self._places[leaders[open_ones, rank]]
            exact = np.einsum("nd,nd->n", block[open_ones], self._vectors.read_some(places), dtype=np.float64)
            is_near = exact >= self._least
            found[open_ones[is_near]] = places[is_near]
        return found

    def add(self, places: np.ndarray, block: np.ndarray) -> None:
        """Let the vectors `block` (n, d), at these places of the file, lead groups."""
        self._index.add(block)
        self._places = np.concatenate([self._places, places])


def make_index(vectors: VectorFile) -> "faiss.Index":
    """An empty index of faiss for up to vectors.count leaders: all are looked at, or clusters learnt from a sample."""
    import faiss
    if vectors.count <= EXACT_IMAGES:
        return faiss.IndexFlatIP(vectors.width)
    clusters = int(4 * math.sqrt(vectors.count))
    index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(vectors.width), vectors.width, clusters,
                                          faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    index.nprobe = PROBES
    index.cp.seed = 1234  # the same clusters in every run
    sample = np.linspace(0, vectors.count - 1, min(vectors.count, TRAINING_IMAGES * clusters)).astype(np.int64)
    index.train(vectors.read_some(sample))
    return index


def group_vectors(vectors: VectorFile, distance: float) -> np.ndarray:
    """For each vector, the best image's first, the place of the one that leads its group: int64 (count,)."""
    leaders = Leaders(vectors, distance)
    groups = np.empty(vectors.count, np.int64)
    for start in range(0, vectors.count, BATCH):
        block = vectors.read(start, min(start + BATCH, vectors.count))
        found = leaders.find(block)
        rest = np.flatnonzero(found < 0)
        near = block[rest].astype(np.float64) @ block[rest].astype(np.float64).T >= 1 - distance
        for number, place in enumerate(rest.tolist()):
            if found[place] < 0:
                joins = rest[number:][near[number, number:] & (found[rest[number:]] < 0)]
                found[joins] = start + place
                found[place] = start + place
        new = np.flatnonzero(found == start + np.arange(len(block)))
        leaders.add(start + new, block[new])
        groups[start:start + len(block)] = found
    return groups


@dataclasses.dataclass(frozen=True)
class SemanticImages:
    """Keeps, of images whose embeddings are near each other, the best-scoring source with all its captions."""

    saved: SavedImages
    distance: float  # 1 - the cosine
    name: ClassVar[str] = "duplicate_image"

    def find_staying(self, rows: Neighbours) -> np.ndarray:
        """For each row the place of the best one of its group, or its own if it is of that one's source: int64 (n,).

        A row without an embedding of its image, which another model has scored, is like no other.
        """
        staying = np.arange(len(rows.images))
        embedded = np.flatnonzero(rows.images & PLACE != PLACE)
        if not len(embedded):
            return staying
        distinct, first, image_of_row = np.unique(rows.images[embedded], return_index=True, return_inverse=True)
        order = np.argsort(first)  # the best row's image first
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        groups = group_vectors(self.saved.write(distinct[order]), self.distance)
        staying[embedded] = embedded[find_first_source(groups[rank[image_of_row]], rows.sources[embedded])]
        return staying
