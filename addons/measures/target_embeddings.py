"""`target_embeddings`: how near each image is to the images of another run, those that you would like to have more of.

    measures:
      target_embeddings: scores/target     # the other run's output_path; or one of its parts/part-*.npz, or a .npy of vectors

The other run saved its embeddings (`save_embeddings`), of the same model. Two columns: `target_max` is the largest cosine of
the image with any target image, `target_norm` the 2-norm of the cosines with all of them, which grows with the root of their
number. They are NormSim with p = infinity and p = 2 of Wang et al. 2024, "CLIPLoss and Norm-Based Data Selection Methods for
Multimodal Contrastive Learning", arXiv 2405.19547, with one difference: a target that points the other way does not count as
near in `target_max`.

The target images are held in memory, as float32; sums are in float64. `target_norm` needs no more than a matrix of the size of
the embedding, and time grows with the number of target images for `target_max` alone.
"""
import functools
import hashlib
import pathlib
from collections.abc import Iterator

import numpy as np

from addons.measures.embeddings import read_embeddings, unpack
from addons.measures.image_columns import ImageColumns, is_same_model
from addons.models.several import MEASURE_NAME
from image_text_sim_clip import (
    EXIT_CONFIG,
    Column,
    Config,
    ImageLoader,
    Json,
    Plan,
    Scorer,
    Trouble,
    expand_home,
    file_sha256,
    read_json,
)

TILE = 4096  # target images in one matrix product


class BadTarget(Exception):
    """Why a file or a folder holds no target, for the user."""


# ── Files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

def find_target_files(path: pathlib.Path, model: str) -> list[pathlib.Path]:
    """The files with the target's vectors: `path` itself, or those that a run left below it; of a run with several models
    `model`'s, or else the first one's. Raises BadTarget without any."""
    if path.is_file():
        return [path]
    models = find_target_models(path)
    wanted = next((name for name in models if is_same_model(models[name], model)), "")
    there = sorted(path.glob("part-*.npz")) or sorted((path / "parts").glob("part-*.npz"))
    files = [file for file in there if name_of_model(file) == wanted]
    if not files:
        raise BadTarget("holds no part-*.npz; score the target images with save_embeddings" if path.is_dir()
                        else "no such file or folder")
    return files


def name_of_model(file: pathlib.Path) -> str:
    """The name, in its run, of the model whose embeddings a file holds: part-00012.dfn.npz; empty for the first one."""
    return file.stem.partition(".")[2] if file.suffix == ".npz" else ""


def find_target_models(path: pathlib.Path) -> dict[str, str]:
    """The models that the run whose files these are was scored with, by `name_of_model`; none without a manifest.json."""
    for folder in (path, path.parent, path.parent.parent):
        settings = (read_json(folder / "manifest.json") or {}).get("settings")
        if settings:
            further = (settings.get("measures") or {}).get(MEASURE_NAME) or []
            return {"": str(settings.get("pretrained_model"))} | dict(further[1:])
    return {}


def read_target(files: list[pathlib.Path]) -> np.ndarray:
    """The unit vectors of all target images, float32 (t, d). Raises BadTarget for a file that is none of these."""
    vectors = [_read_images(file) for file in files]
    vectors = [images for images in vectors if len(images)]
    if not vectors:
        raise BadTarget("holds no image's embedding")
    if len({images.shape[1] for images in vectors}) > 1:
        raise BadTarget("holds embeddings of several widths")
    return np.concatenate(vectors)


def _read_images(file: pathlib.Path) -> np.ndarray:
    """The unit vectors of one file's images, float32 (t, d): those of a part that belong to a row, or all of a .npy."""
    try:
        if file.suffix == ".npz":
            saved = read_embeddings(file)
            return saved["images"][np.unique(saved["image_of_row"][saved["image_of_row"] >= 0])]
        vectors = np.load(file, allow_pickle=False)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise BadTarget(f"{file.name} holds no saved embeddings ({type(error).__name__})") from None
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or vectors.dtype.kind != "f":
        raise BadTarget(f"{file.name} does not hold a matrix of numbers with a vector in each row")
    if not np.isfinite(vectors).all():
        raise BadTarget(f"{file.name} holds numbers that are not finite")
    return unpack(vectors)


# ── Similarities ──────────────────────────────────────────────────────────────────────────────────────────────────────

def _cut(vectors: np.ndarray) -> Iterator[np.ndarray]:
    """Up to TILE of the vectors at a time, in float64."""
    for start in range(0, len(vectors), TILE):
        yield vectors[start:start + TILE].astype(np.float64)


def find_largest(images: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The largest cosine of each of `images` (m, d) with any of `target` (t, d): float64 (m,)."""
    largest = np.full(len(images), -np.inf)
    for start in range(0, len(images), TILE):
        block = images[start:start + TILE].astype(np.float64)
        for tile in _cut(target):
            part = largest[start:start + TILE]
            np.maximum(part, (block @ tile.T).max(axis=1), out=part)
    return largest


def multiply_with_itself(target: np.ndarray) -> np.ndarray:
    """The sum over target vectors t of t t^T, float64 (d, d), of which x^T S x is the sum of the squared cosines with x."""
    products = np.zeros((target.shape[1], target.shape[1]))
    for tile in _cut(target):
        products += tile.T @ tile
    return products


def find_norms(images: np.ndarray, products: np.ndarray) -> np.ndarray:
    """The 2-norm of the cosines of each of `images` (m, d) with the vectors whose `products` these are: float64 (m,)."""
    vectors = images.astype(np.float64)
    squares = np.einsum("md,md->m", vectors @ products, vectors)
    norms: np.ndarray = np.sqrt(np.maximum(squares, 0.0))
    return norms


# ── The measure ───────────────────────────────────────────────────────────────────────────────────────────────────────

class TargetEmbeddings(ImageColumns):
    """The columns `target_max` and `target_norm`."""

    name = "target_embeddings"
    columns = (Column("target_max", "float", "largest cosine of the image with a target image (NormSim)"),
               Column("target_norm", "float", "2-norm of the cosines of the image with all target images (NormSim)"))

    def __init__(self, config: Config, plan: Plan, scorer: Scorer, loader: ImageLoader) -> None:
        path = pathlib.Path(expand_home(f"measures.{self.name}", self.read_settings(config)))
        try:
            if path.resolve() in (plan.output.resolve(), (plan.output / "parts").resolve()):
                raise BadTarget("is this run's own folder")
            self._target_files = find_target_files(path, config.pretrained_model)
            super().__init__(config, plan, scorer, loader)
            made_by = find_target_models(path).get(name_of_model(self._target_files[0]))
            if made_by and not is_same_model(made_by, config.pretrained_model):
                raise BadTarget(f"was scored with {made_by}, and this run's model is {config.pretrained_model}")
            self._target = read_target(self._target_files)
            if self._target.shape[1] != self.width:
                raise BadTarget(f"has embeddings of width {self._target.shape[1]}, and this run's model gives {self.width}")
        except BadTarget as bad:
            raise Trouble(EXIT_CONFIG, f"measures.{self.name}: {path}: {bad}") from None

    @classmethod
    def read_settings(cls, config: Config) -> str:
        """The path that the config gives. Trouble (exit 2) for anything else."""
        path = (config.measures or {}).get(cls.name)
        if not isinstance(path, str) or not path.strip():
            raise Trouble(EXIT_CONFIG, f"measures.{cls.name} must be the output_path of a run with save_embeddings, "
                                       f"got {path!r}")
        return path

    @functools.cached_property
    def files(self) -> Json:
        """A sha256 over those of the target's files."""
        digest = hashlib.sha256()
        for file in self._target_files:
            digest.update(file_sha256(file).encode())
        return {"target": digest.hexdigest()}

    @functools.cached_property
    def _products(self) -> np.ndarray:
        return multiply_with_itself(self._target)

    def values_of_images(self, images: np.ndarray, norms: np.ndarray | None) -> dict[str, np.ndarray]:
        """The largest cosine with a target image, at most 1, and the 2-norm of the cosines with all of them."""
        return {"target_max": np.minimum(find_largest(images, self._target), 1.0),
                "target_norm": find_norms(images, self._products)}


MEASURE = TargetEmbeddings
