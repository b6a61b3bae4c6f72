"""Several models in one pass: `pretrained_model: {b32: openai/clip-vit-base-patch32, dfn: hf-hub:apple/DFN2B-CLIP-ViT-B-16}`.

Every image is fetched and decoded once and resized for each model; then each model's encoder reads its own batch. The first
model gives the plain columns, and all that looks at embeddings works on its own; addons/measures/further_models.py scores
captions with the others and adds their columns. On the way from loader to encoder an image is a `PixelsOfAll`, and what an
encoder gives are the embeddings of all models side by side, those of the first model last.
"""
import dataclasses
import math
import pathlib
import re
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import safetensors

from addons.images.memory import machine_memory
from image_text_sim_clip import (
    EXIT_CONFIG,
    EXIT_MODEL,
    Config,
    EmbeddedImages,
    ImageSettings,
    Json,
    ModelFiles,
    Scorer,
    Trouble,
    check_path,
    expand_home,
    find_model,
)

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

MEASURE_NAME = "further_models"
SPARE_BYTES = 200 * 2**20  # for batches on their way
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "open_clip_model*.safetensors", "open_clip_pytorch_model*.bin")


# ── The config ────────────────────────────────────────────────────────────────────────────────────────────────────────

def take_apart(values: Json) -> Json:
    """The keys of a config whose `pretrained_model` is a mapping, with its first model there and all of them under
    `measures.further_models`. Trouble (exit 2) for a mapping that names no models."""
    models = values["pretrained_model"]
    check_models(models)
    models = {name: expand_home(f"pretrained_model.{name}", model) for name, model in models.items()}
    first = next(iter(models.values()))
    if len(models) == 1:
        return values | {"pretrained_model": first}
    measures = values.get("measures") or {}
    if not isinstance(measures, dict):
        raise Trouble(EXIT_CONFIG, f"measures must be a section of keys, got {measures!r}")
    pairs = [[name, model] for name, model in models.items()]  # a list: their order counts, and a manifest's keys are sorted
    return values | {"pretrained_model": first, "measures": measures | {MEASURE_NAME: pairs}}


def check_models(models: object) -> None:
    """Trouble (exit 2) unless it is a mapping of names that may end a column's name to Hub ids or folders."""
    if not isinstance(models, dict) or not models:
        raise Trouble(EXIT_CONFIG, f"pretrained_model must be a model, or a mapping of names to models, got {models!r}")
    for name, model in models.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9]\w*", name, re.ASCII):
            raise Trouble(EXIT_CONFIG, f"pretrained_model: a model's name is made of letters, digits and _, got {name!r}")
        if name == "similarity":
            raise Trouble(EXIT_CONFIG, "pretrained_model: no model can be called similarity: curate.by means the first by it")
        if not isinstance(model, str) or model in ("", "none"):
            raise Trouble(EXIT_CONFIG, f"pretrained_model.{name} must be a Hub id or a folder, got {model!r}")
        check_path(f"pretrained_model.{name}", model)


def all_models(config: Config) -> dict[str, str]:
    """The models by name, the first one first; none for a run with one model."""
    return dict((config.measures or {}).get(MEASURE_NAME) or ())


def further_models(config: Config) -> dict[str, str]:
    """The models after the first, by name; none for a run with one model."""
    return dict(list(all_models(config).items())[1:])


def config_of(config: Config, model: str) -> Config:
    """The config of a run with this model alone, and without measures that are asked for."""
    return dataclasses.replace(config, pretrained_model=model, measures=None)


# ── Images for all ────────────────────────────────────────────────────────────────────────────────────────────────────

class PixelsOfAll(tuple[Any, ...]):
    """What each model reads of an image, or of a batch of images: the first model's comes first."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True)
class SettingsOfAll(ImageSettings):
    """What an image is decoded for that several models will read, each of which trims and resizes it itself."""

    models: tuple[ImageSettings, ...] = ()

    def target(self) -> tuple[int, int] | None:
        """The size that `decode: scaled` must not go below twice of: the largest that any model asks for."""
        targets = [settings.target() for settings in self.models]
        known = [target for target in targets if target]
        if len(known) < len(targets):
            return None
        return max(height for height, _ in known), max(width for _, width in known)


def settings_of_all(models: list[ImageSettings]) -> ImageSettings:
    """What images are decoded for."""
    first = models[0]
    if all(settings == first for settings in models):
        return first
    return SettingsOfAll(None, None, None, first.resample, keeps_strips=True, models=tuple(models))


# ── The scorer ────────────────────────────────────────────────────────────────────────────────────────────────────────

class SeveralScorer(Scorer):
    """The scorer of the first model, which has those of the others in `further` and encodes images for all of them."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.further: dict[str, Scorer] = {}
        for name, model in further_models(config).items():
            self.further[name] = self._load(name, config_of(config, model))
        self.decoding = settings_of_all([scorer.settings for scorer in self._all()])
        self._widths: tuple[int, ...] = ()  # of the further models' embeddings, once an image has been encoded

    def _load(self, name: str, config: Config) -> Scorer:
        """The scorer of a further model; Trouble (exit 6) that says by how much it does not fit next to the others."""
        import torch
        needed = count_weights(find_model(config), self.device, self.dtype)
        free = free_memory(self.device)
        if needed + SPARE_BYTES > free:
            raise does_not_fit(name, config, needed, free)
        try:
            return Scorer(config)
        except (torch.OutOfMemoryError, MemoryError):
            raise does_not_fit(name, config, needed, free) from None

    def _all(self) -> list[Scorer]:
        return [self, *self.further.values()]

    def identity(self) -> Json:
        """What decides the scores: the first model's as in a run of its own, and the others' under names with theirs."""
        found = super().identity()
        found["files"] = dict(found["files"])
        for name, scorer in self.further.items():
            of_one = scorer.identity()
            found["files"] |= {f"{name}/{file}": digest for file, digest in of_one["files"].items()}
            own = {"files", "libraries", "device", "batch_size", "decoder"}
            found |= {f"{key}_{name}": value for key, value in of_one.items() if key not in own}
        names = all_models(self.config)
        found["weights_mib"] = {name: round(weights_of(scorer) / 2**20, 1)
                                for name, scorer in zip(names, self._all(), strict=True)}
        return found

    def resize_for_all(self, image: "Image.Image") -> "np.ndarray":
        """RGB image -> a `PixelsOfAll` of (3, H, W) arrays of bytes, which takes the place of one array."""
        made: dict[ImageSettings, np.ndarray] = {}  # the fast resize of models that read the same is done once
        arrays = []
        for scorer in self._all():
            is_fast = self.config.preprocess == "fast" and scorer.settings.knows_fast_resize()
            arrays.append(made[scorer.settings] if scorer.settings in made else scorer.resize(image))
            if is_fast:
                made[scorer.settings] = arrays[-1]
        pixels: Any = PixelsOfAll(arrays)
        of_all: np.ndarray = pixels
        return of_all

    def stack(self, batch: list[Any]) -> Any:
        """Images for one model or for all -> what `encode_images` takes."""
        if not isinstance(batch[0], PixelsOfAll):
            return super().stack(batch)
        own, *others = zip(*batch, strict=True)
        stacked = [scorer.stack(list(images)) for scorer, images in zip(self.further.values(), others, strict=True)]
        return PixelsOfAll([super().stack(list(own)), *stacked])

    def encode_images(self, pixels: "Any | Future[torch.Tensor]") -> "torch.Tensor":
        """A batch for one model -> (n, d) as Scorer does it; one for all -> their embeddings side by side, the first last."""
        if not isinstance(pixels, PixelsOfAll):
            return super().encode_images(pixels)
        import torch
        own, *others = pixels
        embeddings = [scorer.encode_images(batch) for scorer, batch in zip(self.further.values(), others, strict=True)]
        self._widths = tuple(part.shape[1] for part in embeddings)
        return torch.cat([*embeddings, super().encode_images(own)], dim=1)

    def own_embeddings(self, images: EmbeddedImages) -> "torch.Tensor | None":
        """The first model's part of the images' embeddings, (m, d)."""
        if images.embeddings is None:
            return None
        return images.embeddings[:, sum(self._widths):].contiguous()

    def images_of(self, name: str, images: EmbeddedImages) -> EmbeddedImages:
        """The images as a further model sees them."""
        if images.embeddings is None:
            return images
        place = list(self.further).index(name)
        start = sum(self._widths[:place])
        part = images.embeddings[:, start:start + self._widths[place]].contiguous()
        return dataclasses.replace(images, embeddings=part, norms=None)


# ── Memory ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def count_weights(files: ModelFiles, device: str, dtype: str) -> int:
    """The bytes that a model's weights take on the device: on the CPU they are float32 at first, however they are stored."""
    folder = (files.base or files).folder
    paths: set[pathlib.Path] = set()
    for pattern in WEIGHTS:
        paths.update(folder.glob(pattern))
    weight_bytes = 4 if device == "cpu" or dtype == "float32" else 2
    return sum(count_values(path) * weight_bytes if path.suffix == ".safetensors" else path.stat().st_size for path in paths)


def count_values(path: pathlib.Path) -> int:
    """How many numbers a safetensors file holds, as its header says."""
    with safetensors.safe_open(path, "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - it is no dict


def weights_of(scorer: Scorer) -> int:
    """The bytes of a loaded model's weights."""
    model = scorer.family.model
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def free_memory(device: str) -> int:
    """The bytes that are free on the device: of the GPU, or of the machine within the limit of its container."""
    if device == "cuda":
        import torch
        return int(torch.cuda.mem_get_info()[0])
    import psutil
    used = psutil.Process().memory_info().rss
    return int(min(psutil.virtual_memory().available, machine_memory() - used))


def does_not_fit(name: str, config: Config, needed: int, free: int) -> Trouble:
    """What to say of a model for which there is no room next to the others."""
    return Trouble(EXIT_MODEL, f"pretrained_model.{name}: {config.pretrained_model} does not fit next to the others: its "
                               f"weights are {needed / 2**20:,.0f} MiB, and {max(0, free) / 2**20:,.0f} MiB are free; score "
                               "it in a run of its own, or take fewer models")
