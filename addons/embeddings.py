"""`save_embeddings`: image and text embeddings beside the scores, so that a new caption or threshold needs no picture again.

One file a partition, `parts/part-00012.npz` (uncompressed; read it with `numpy.load`, or with `read_embeddings`):

    images (m, d), texts (k, d)          unit vectors, a row for each distinct picture and each distinct caption
    image_of_row, text_of_row (rows,)    int32: the row of `images` / `texts` of each row of the part, -1 where it has none
    image_scales (m,), text_scales (k,)  only with int8: float32; vector = int8 values * scale

It is written before the part's parquet, so that a finished part has its embeddings.
"""
import hashlib
import io
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

DRIFT_ROWS = 64  # rows of a partition whose score is computed again from what is saved, to tell what fewer bits cost
LEVELS = 127


def pack(vectors: Any, kind: str) -> tuple[Any, Any]:
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


def unpack(packed: Any, scales: Any = None) -> Any:
    """What `pack` made, as float32 vectors of length 1 (rounding has changed their length a little)."""
    vectors = packed.astype(np.float32)
    if scales is not None:
        vectors *= scales[:, None]
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def read_embeddings(path: pathlib.Path) -> dict[str, Any]:
    """The file's float32 unit vectors and places: images, texts, image_of_row, text_of_row."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    return {"images": unpack(arrays["images"], arrays.get("image_scales")),
            "texts": unpack(arrays["texts"], arrays.get("text_scales")),
            "image_of_row": arrays["image_of_row"], "text_of_row": arrays["text_of_row"]}


def save(partition: Any, kind: str, places: Any, embedded: Any, write: Callable[[pathlib.Path, bytes], None]) -> dict[str, Any]:
    """Write a partition's file through `write(path, data)`; returns what the part's JSON keeps of it.

    `embedded` is (images (m, d), texts (k, d), rows of images, rows of texts; both -1 where a row at hand has none), or
    None where no row has any. `places` are the places of the rows at hand in the partition: all of them, or with
    --retry-failed those that were scored again, which are added to the file that is there.
    """
    rows, path = partition.stop - partition.start, partition.embeddings
    images, texts, image_rows, text_rows = embedded or (np.empty((0, 0)), np.empty((0, 0)), -1, -1)
    arrays = {"image_of_row": np.full(rows, -1, np.int32), "text_of_row": np.full(rows, -1, np.int32)}
    for name, vectors in (("image", images), ("text", texts)):
        arrays[f"{name}s"], scales = pack(vectors, kind)
        if scales is not None:
            arrays[f"{name}_scales"] = scales
    arrays["image_of_row"][np.asarray(places)], arrays["text_of_row"][np.asarray(places)] = image_rows, text_rows
    sample = _drift_sample(images, texts, arrays)
    if len(places) < rows and path.exists():
        with np.load(path) as before:
            arrays = _append(dict(before), arrays)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    data = buffer.getvalue()
    write(path, data)
    return {"kind": kind, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "drift": sample}


def _append(before: dict[str, Any], added: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a file and those of rows that were scored later, together; rows that had embeddings keep them."""
    merged = {}
    for name in ("image", "text"):
        old, new = before[f"{name}_of_row"], added[f"{name}_of_row"]
        merged[f"{name}_of_row"] = np.where(new >= 0, new + len(before[f"{name}s"]), old).astype(np.int32)
        for array in (f"{name}s", f"{name}_scales"):
            if array in added:
                parts = [part for part in (before[array], added[array]) if part.size]
                merged[array] = np.concatenate(parts) if parts else added[array]
    return merged


def _drift_sample(images: Any, texts: Any, arrays: dict[str, Any]) -> list[list[float]]:
    """[score from what is saved, score] of up to DRIFT_ROWS rows, spread evenly over those that have embeddings."""
    rows = np.flatnonzero((arrays["image_of_row"] >= 0) & (arrays["text_of_row"] >= 0))
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), DRIFT_ROWS)).astype(int)] if len(rows) else rows
    at_image, at_text = arrays["image_of_row"][rows], arrays["text_of_row"][rows]
    if not len(rows):
        return []
    scales = (arrays[f"{name}_scales"][at] if f"{name}_scales" in arrays else None
              for name, at in (("image", at_image), ("text", at_text)))
    saved = (unpack(arrays["images"][at_image], next(scales)) * unpack(arrays["texts"][at_text], next(scales))).sum(axis=1)
    exact = (np.asarray(images, np.float32)[at_image] * np.asarray(texts, np.float32)[at_text]).sum(axis=1)
    return [[float(a), float(b)] for a, b in zip(saved, exact, strict=True)]
