"""Models in open_clip's format: open_clip_config.json with open_clip_model.safetensors (or open_clip_pytorch_model.bin).

Plain ViTs and timm's ViTs of SigLIP, each with open_clip's own text tower, are read here without open_clip, timm or
torchvision (open_clip_towers.py). Any other tower is borrowed from open_clip_torch, where that can be imported. Images and
captions are prepared as open_clip prepares them, in either case by this project (open_clip_images.py, open_clip_text.py).
"""
import pathlib
import types
from typing import Any

import torch

from addons.models import open_clip_files as found_files
from addons.models.open_clip_config import OpenClipConfig, TokenizerConfig, read_config
from addons.models.open_clip_images import OpenClipImages
from addons.models.open_clip_text import (
    find_cleaning,
    load_byte_tokenizer,
    load_hugging_face_tokenizer,
    separator_of,
)
from addons.models.open_clip_towers import UnfitWeights, build_model
from image_text_sim_clip import EXIT_MODEL, Family, ImageSettings, ModelFiles, Trouble

INSTALL = "pip install --no-deps open_clip_torch timm ftfy regex wcwidth, and a torchvision that matches your torch"


class OpenClip(Family):
    """A model of open_clip's, as its config describes it."""

    kind = "open_clip"

    def __init__(self, model: Any, tokenizer: Any, processor: OpenClipImages, name: str, config: OpenClipConfig,
                 tokenizer_origin: str) -> None:
        self.config = config
        self.tokenizer_origin = tokenizer_origin
        self._clean = find_cleaning(config.tokenizer.clean, name)
        self._separator = separator_of(tokenizer, config.tokenizer, name)
        super().__init__(model, tokenizer, processor, name)
        self.bias = float(model.logit_bias) if config.has_bias else None

    @classmethod
    def load(cls, files: ModelFiles, name: str) -> "OpenClip":
        """Model (float32, on the CPU), tokenizer and preprocessing. Raises Trouble (exit 6)."""
        config = read_config(files.folder, name)
        if config.no_twin:
            model: torch.nn.Module = BorrowedModel.load(files, name, config)
        else:
            try:
                model = build_model(config, found_files.load_weights(files, name))
            except UnfitWeights as error:
                raise Trouble(EXIT_MODEL, f"{name} (open_clip's format) {error}") from None
        tokenizer, origin = load_tokenizer(files, name, config.tokenizer)
        return cls(model.eval().requires_grad_(False), tokenizer, OpenClipImages(config.preprocess), name, config, origin)

    def image_settings(self) -> ImageSettings:
        """How images are resized and cropped."""
        settings: ImageSettings = self.processor.settings
        return settings

    def describe(self) -> dict[str, Any]:
        """What the manifest and profile.json say besides: what was published under which name, and what it reads."""
        published = pathlib.Path(self.name).resolve().name if pathlib.Path(self.name).is_dir() else self.name
        return {"family": self.kind, "published_name": published.removeprefix("hf-hub:"),
                "architecture": self.config.architecture, "image_size": list(self.config.preprocess.size),
                "context_length": self.context_length, "tokenizer": self.tokenizer_origin}

    def check_tokenizer(self) -> None:
        """Refuse a tokenizer that does not belong to the model; a borrowed tower does not tell how many words it knows."""
        if not self.config.no_twin:
            super().check_tokenizer()

    def prepare(self, caption: str) -> str:
        """The caption, cleaned."""
        return self._clean(caption)

    def padded_length(self, ids: list[int]) -> int:
        """The whole context, but for a causal tower pooled at end-of-text, where nothing behind that counts."""
        text = self.config.text
        if text is None or not text.causal or text.pool == "last":
            return self.context_length
        is_end_the_largest = text.pool == "argmax" and not self.config.tokenizer.repository
        is_end_the_first = text.pool == "eos" and self.tokenizer.pad_token_id != text.eos_id and text.eos_id in ids
        return 0 if is_end_the_largest or is_end_the_first or text.pool == "first" else self.context_length

    def image_features(self, model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) normalised pixels -> (n, d) projected features."""
        features: torch.Tensor = model.encode_image(pixel_values)
        return features

    def text_features(self, model: Any, ids: torch.Tensor) -> torch.Tensor:
        """(n, length) token ids -> (n, d) projected features; to CLIPA separators are 0."""
        read = ids if self._separator is None else ids.masked_fill(ids == self._separator, 0)
        features: torch.Tensor = model.encode_text(read)
        return features


def load_tokenizer(files: ModelFiles, name: str, config: TokenizerConfig) -> tuple[Any, str]:
    """The tokenizer, and where it comes from, for the manifest.

    A local folder brings its own where it has one; a repository's config may name another repository, of which one commit is
    taken and recorded.
    """
    if not config.repository:
        return load_byte_tokenizer(files.folder, name)
    is_own = config.repository == name.removeprefix("hf-hub:")
    is_local = pathlib.Path(name).is_dir()
    if is_own or (is_local and found_files.has_tokenizer(files.folder)):
        return load_hugging_face_tokenizer(files.folder, name), "the model's"
    folder = found_files.find_second_repository(config.repository, name)
    return load_hugging_face_tokenizer(folder, name), f"{config.repository}@{folder.resolve().name}"


class BorrowedModel(torch.nn.Module):
    """A model of open_clip_torch's own, for towers that transformers has no module for."""

    def __init__(self, model: torch.nn.Module, config: TokenizerConfig) -> None:
        super().__init__()
        self.model = model
        self.logit_scale = model.logit_scale
        bias = getattr(model, "logit_bias", None)
        self.logit_bias = torch.zeros(()) if bias is None else bias
        self.config = types.SimpleNamespace(text_config=types.SimpleNamespace(
            max_position_embeddings=config.context_length, vocab_size=config.vocab_size))

    @classmethod
    def load(cls, files: ModelFiles, name: str, config: OpenClipConfig) -> "BorrowedModel":
        """Have open_clip_torch load the folder. Raises Trouble (exit 6), in one line where it cannot be imported."""
        try:
            import open_clip
        except Exception as error:  # a torchvision that does not match raises RuntimeError
            raise Trouble(EXIT_MODEL, f"{name} has a tower that transformers lacks ({config.no_twin}), so it needs "
                                      f"open_clip_torch, which cannot be imported ({type(error).__name__}: "
                                      f"{str(error)[:100]}): {INSTALL}") from None
        try:
            model = open_clip.create_model(f"local-dir:{files.folder}", precision="fp32", device="cpu", weights_only=True)
        except Exception as error:  # open_clip raises nearly anything
            raise Trouble(EXIT_MODEL, f"cannot load {name} with open_clip_torch: {type(error).__name__}: "
                                      f"{str(error)[:300]}") from error
        return cls(model, config.tokenizer)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.model.parameters()).dtype

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) -> (n, d)."""
        features: torch.Tensor = self.model.encode_image(pixels)  # type: ignore[operator]
        return features

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        """(n, context length) -> (n, d)."""
        features: torch.Tensor = self.model.encode_text(ids)  # type: ignore[operator]
        return features


FAMILY = OpenClip
