"""`save_embeddings`: image and text embeddings next to the scores, so that a new caption or threshold needs no image again.

One file a partition, `parts/part-00012.npz` (uncompressed; read it with `numpy.load`, or with `read_embeddings`):

    images (m, d), texts (k, d)          unit vectors, a row for each distinct image and each distinct caption
    image_of_row, text_of_row (rows,)    int32: the row of `images` / `texts` of each row of the part, -1 where it has none
    image_scales (m,), text_scales (k,)  only with int8: float32; vector = int8 values * scale

A part's metadata holds the sha256 of its file, and without it the part is not done.
"""
import io
import pathlib
from typing import TYPE_CHECKING

import numpy as np

from addons.measures import Measured
from addons.measures.drift import DriftMeasure
from image_text_sim_clip import Config, Json, PartitionRun, Scored

if TYPE_CHECKING:
    import numpy.typing as npt

DRIFT_ROWS = 64  # rows of a partition whose score is computed again from what is saved, to tell what fewer bits cost
LEVELS = 127


# ── Fewer bits ────────────────────────────────────────────────────────────────────────────────────────────────────────

def pack(vectors: "npt.ArrayLike", kind: str) -> tuple[np.ndarray, np.ndarray | None]:
    """float32 vectors (n, d) as `kind` (float32 | float16 | int8) and, for int8, their scales (n,), else None.

    A vector that is not finite belongs to no row with a score, and becomes zeros. The largest |value| of an int8 vector
    lies on level 127.
    """
    vectors = np.asarray(vectors, np.float32)
    vectors = np.where(np.isfinite(vectors).all(axis=1, keepdims=True), vectors, np.float32(0))
    if kind != "int8":
        return vectors.astype(kind), None
    scales = np.maximum(np.abs(vectors).max(axis=1, initial=0.0), np.finfo(np.float32).tiny) / np.float32(LEVELS)
    return np.rint(vectors / scales[:, None]).astype(np.int8), scales.astype(np.float32)


def unpack(packed: np.ndarray, scales: np.ndarray | None = None) -> np.ndarray:
    """What `pack` made, as float32 vectors of length 1 (rounding has changed their length a little)."""
    vectors = packed.astype(np.float32)
    if scales is not None:
        vectors *= scales[:, None]
    unit: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return unit


def read_embeddings(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The file's float32 unit vectors and places: images, texts, image_of_row, text_of_row."""
    with path.open("rb") as stored, np.load(stored) as file:
        arrays = {name: file[name] for name in file.files}
    return {"images": unpack(arrays["images"], arrays.get("image_scales")),
            "texts": unpack(arrays["texts"], arrays.get("text_scales")),
            "image_of_row": arrays["image_of_row"], "text_of_row": arrays["text_of_row"]}


# ── One partition's file ──────────────────────────────────────────────────────────────────────────────────────────────

def _pack_partition(run: PartitionRun, scored: Scored, kind: str) -> dict[str, np.ndarray]:
    """The arrays of the partition's file, for the rows at hand; the other rows of the partition have -1."""
    has_score = np.isfinite(scored.cosines)
    arrays = {}
    for name, vector_of_row in (("image", scored.image_of_row), ("text", scored.text_of_row)):
        of_row = np.full(run.partition.stop - run.partition.start, -1, np.int32)
        of_row[np.asarray(run.rows.index)] = np.where(has_score, vector_of_row, -1)
        arrays[f"{name}_of_row"] = of_row
    for name, vectors in (("image", scored.image_embeddings), ("text", scored.text_embeddings)):
        packed, scales = pack(_as_array(vectors), kind)
        arrays[f"{name}s"] = packed
        if scales is not None:
            arrays[f"{name}_scales"] = scales
    return arrays


def _as_array(vectors: "npt.ArrayLike | None") -> np.ndarray:
    """Embeddings as float32 (n, d); (0, 0) where no row has any."""
    if vectors is None:
        return np.empty((0, 0), np.float32)
    return np.asarray(vectors, np.float32)


def _append_arrays(before: dict[str, np.ndarray], added: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a file and those of rows that were scored later, together; rows that had embeddings keep them."""
    merged = {}
    for name in ("image", "text"):
        old = before[f"{name}_of_row"]
        new = added[f"{name}_of_row"]
        merged[f"{name}_of_row"] = np.where(new >= 0, new + len(before[f"{name}s"]), old).astype(np.int32)
        for array in (f"{name}s", f"{name}_scales"):
            if array in added:
                filled = [values for values in (before[array], added[array]) if values.size]
                merged[array] = np.concatenate(filled) if filled else added[array]
    return merged


def _sample_drift(scored: Scored, arrays: dict[str, np.ndarray]) -> list[list[float]]:
    """[score from what is saved, score] of up to DRIFT_ROWS rows, spread evenly over those that have embeddings."""
    rows = np.flatnonzero((arrays["image_of_row"] >= 0) & (arrays["text_of_row"] >= 0))
    if not len(rows):
        return []
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), DRIFT_ROWS)).astype(int)]
    images = arrays["image_of_row"][rows]
    texts = arrays["text_of_row"][rows]
    saved = (_unpack_some(arrays, "image", images) * _unpack_some(arrays, "text", texts)).sum(axis=1)
    exact = (_as_array(scored.image_embeddings)[images] * _as_array(scored.text_embeddings)[texts]).sum(axis=1)
    return [[float(a), float(b)] for a, b in zip(saved, exact, strict=True)]


def _unpack_some(arrays: dict[str, np.ndarray], name: str, places: np.ndarray) -> np.ndarray:
    """The unit vectors (n, d) at some places (n,) of the packed images or texts."""
    scales = arrays.get(f"{name}_scales")
    return unpack(arrays[f"{name}s"][places], None if scales is None else scales[places])


# ── The measure ───────────────────────────────────────────────────────────────────────────────────────────────────────

class SavedEmbeddings(DriftMeasure):
    """Files of embeddings next to the parts; `saved_embeddings` in profile.json says what saving them in fewer bits costs."""

    name = "saved_embeddings"

    @classmethod
    def wanted(cls, config: Config) -> bool:
        """Where `save_embeddings` says so and there is a model."""
        return config.pretrained_model != "none" and config.save_embeddings != "none"

    def measure(self, run: PartitionRun, scored: Scored) -> Measured:
        """The partition's file; with --retry-failed, what is new is added to what the file holds that is there."""
        kind = self.config.save_embeddings
        arrays = _pack_partition(run, scored, kind)
        drift = _sample_drift(scored, arrays)
        if run.replaced:
            with run.partition.embeddings.open("rb") as stored, np.load(stored) as file:
                arrays = _append_arrays(dict(file), arrays)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        return Measured({}, {"kind": kind, "drift": drift}, {run.partition.embeddings: buffer.getvalue()})

    @classmethod
    def pairs_of(cls, kept: Json) -> list[list[float]]:
        """[score from what is saved, score] of the rows that were computed again."""
        return list(kept["drift"])


MEASURE = SavedEmbeddings
