"""Dissimilarity as a loss: the scorer's own number, with a gradient back to the pixels.

    from addons.loss import DissimilarityLoss
    from image_text_sim_clip import load_config

    loss = DissimilarityLoss(load_config("config.yaml"))
    error = loss(images, captions)      # images (n, 3, H, W) in [0, 1]; mean of 1 - cosine over the n pairs
    error.backward()

Model, tokenizer, sizes, crop, resize and colours all come from the script, so that what is trained is what is scored. The
scorer reads bytes, and a byte has no gradient: here the same steps are done on floats. Used from Python only: the script
itself never imports this file (which imports it).
"""
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch

from image_text_sim_clip import (
    EXIT_MODEL,
    RESAMPLE_MODES,
    Config,
    ImageSettings,
    Scorer,
    Trouble,
    clean_caption,
    crop_centre,
)

ROUNDING = 1e-4  # by which a clamped value may be off after a conversion; it changes no loss that anybody could see


class DissimilarityLoss(torch.nn.Module):
    """1 - cosine of each image with its caption, differentiable in the image; the model is frozen.

    `objective`: "cosine", or for SigLIP models also "sigmoid", the loss that SigLIP was trained with (Zhai et al. 2023,
    algorithm 1), with the model's own scale and bias: every other caption of the batch counts as a wrong one.
    `reduction`: "mean" over the pairs (a scalar), or "none" (n values).
    Raises Trouble (exit 6) for a model that cannot be loaded, or whose resize has no gradient here.
    """

    def __init__(self, config: Config, objective: Literal["cosine", "sigmoid"] = "cosine",
                 reduction: Literal["mean", "none"] = "mean") -> None:
        super().__init__()
        if objective not in ("cosine", "sigmoid") or reduction not in ("mean", "none"):
            raise ValueError(f"objective is cosine or sigmoid, reduction is mean or none; got {objective!r}, {reduction!r}")
        self.objective = objective
        self.reduction = reduction
        self.scorer = Scorer(config)
        self.family = self.scorer.family
        self.model = self.family.model  # registered, so that `to` and `double` reach it
        if objective == "sigmoid" and self.family.bias is None:
            raise Trouble(EXIT_MODEL, f"{config.pretrained_model} is no SigLIP model: it has no sigmoid loss of its own")
        if not self.scorer.settings.knows_fast_resize():
            raise Trouble(EXIT_MODEL, f"{config.pretrained_model} resizes with Pillow's filter "
                                      f"{self.scorer.settings.resample}; bilinear (2) and bicubic (3) have a gradient")
        scale, offset = _colour_steps(self.family.processor)
        self.register_buffer("colour_scale", scale.to(self.scorer.device), persistent=False)
        self.register_buffer("colour_offset", offset.to(self.scorer.device), persistent=False)
        self.eval()

    colour_scale: torch.Tensor
    colour_offset: torch.Tensor

    def train(self, mode: bool = True) -> "DissimilarityLoss":
        """Stay in evaluation mode, also when a trainer puts the module that holds this one into training mode."""
        return super().train(False)

    def forward(self, images: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        """The loss of n float images (n, 3, H, W) in [0, 1] with n captions: a scalar, or (n,) with reduction "none".

        Raises ValueError for another shape, for bytes, for values outside [0, 1] or NaN, and for an empty caption (which the
        scorer does not score either).
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be floats (n, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images but {len(captions)} captions")
        if not all(caption.strip() for caption in captions):
            raise ValueError("an empty caption has no similarity to anything")
        image_unit = self.encode_images(images)  # (n, d)
        text_unit = self.encode_captions(captions)  # (n, d)
        if self.objective == "sigmoid":
            values = self._sigmoid_losses(image_unit, text_unit, captions)
        else:
            values = 1 - (image_unit * text_unit).sum(-1)
        return values.mean() if self.reduction == "mean" else values

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Unit embeddings (n, d) of float images (n, 3, H, W) in [0, 1]; in float32, or float64 if the module is.

        Raises ValueError for values outside that range, or NaN.
        """
        refuse_other_ranges(images)
        pixels = resize_with_gradient(images.to(self.colour_scale), self.scorer.settings)
        values = pixels * self.colour_scale + self.colour_offset
        features = self.family.image_features(self.model, values.to(self._model_dtype()))
        return torch.nn.functional.normalize(features.to(self.colour_scale.dtype), dim=-1)

    def _model_dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def encode_captions(self, captions: Sequence[str]) -> torch.Tensor:
        """Unit embeddings (n, d), constants, of captions put into the config's `caption_template`."""
        self.scorer.device = str(self.colour_scale.device)  # wherever this module has been moved since
        ids = self._tokenize(captions)
        distinct = list(dict.fromkeys(ids))
        unit = self.scorer.encode_texts(list(map(list, distinct))).clone()  # autograd refuses what inference mode has made
        places = {of_caption: place for place, of_caption in enumerate(distinct)}
        return unit[[places[of_caption] for of_caption in ids]].to(self.colour_scale)

    def _tokenize(self, captions: Sequence[str]) -> list[tuple[int, ...]]:
        """What the model reads of each caption: tokens, which may be the same of captions that differ."""
        template = self.scorer.config.caption_template
        texts = [clean_caption(caption, self.scorer.config) for caption in captions]
        return [tuple(ids) for ids in self.scorer.tokenize([template.replace("{}", text) for text in texts])[0]]

    def _sigmoid_losses(self, image_unit: torch.Tensor, text_unit: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        """(n,): for each image, -log sigmoid(z (scale * cosine + bias)) summed over the batch's captions; z is 1 for its own
        caption and -1 for the others. A caption of which the model reads the same is no wrong one and is left out."""
        assert self.family.bias is not None  # the constructor has seen to it
        with torch.autocast(image_unit.device.type, enabled=False):  # which would round cosines before they are scaled up
            logits = image_unit @ text_unit.T * self.family.scale + self.family.bias  # (n, n)
        ids = self._tokenize(captions)
        numbers = {of_caption: number for number, of_caption in enumerate(dict.fromkeys(ids))}
        caption_numbers = torch.tensor([numbers[of_caption] for of_caption in ids], device=logits.device)  # (n,)
        own = torch.eye(len(captions), dtype=torch.bool, device=logits.device)
        equal = caption_numbers[:, None] == caption_numbers
        losses = -torch.nn.functional.logsigmoid(torch.where(own, logits, -logits))
        return losses.masked_fill(equal & ~own, 0.0).sum(1)


def refuse_other_ranges(images: torch.Tensor) -> None:
    """Raise ValueError, which names the range, for images with values outside [0, 1] (beyond rounding) or NaN.

    Diffusion pipelines make images in [-1, 1], and image files hold [0, 255]: such images would get a loss, but another's.
    """
    if not images.numel():
        return
    values = images.detach()
    low, high = (value.item() for value in torch.aminmax(values))  # NaN if any value is
    if low >= -ROUNDING and high <= 1 + ROUNDING:
        return
    if math.isnan(low):
        count = int(torch.isnan(values).sum())
        known = torch.nan_to_num(values, nan=0.5)
        raise ValueError(f"images must lie in [0, 1], got {count} NaN of {values.numel()} values; the others lie in "
                         f"[{known.min().item():g}, {known.max().item():g}]")
    cure = ""
    if low >= -1 - ROUNDING and high <= 1 + ROUNDING:
        cure = "; images in [-1, 1] become so by images / 2 + 0.5"
    elif low >= 0 and high <= 255:
        cure = "; images in [0, 255] become so by images / 255"
    raise ValueError(f"images must lie in [0, 1], got values in [{low:g}, {high:g}]{cure}")


def resize_with_gradient(pixels: torch.Tensor, settings: ImageSettings) -> torch.Tensor:
    """(n, 3, h, w) floats in [0, 1] -> (n, 3, H, W), resized and cropped as the scorer does it with bytes."""
    size = settings.resized(*pixels.shape[-2:])
    if size != tuple(pixels.shape[-2:]):
        resize = torch.nn.functional.interpolate
        pixels = resize(pixels, size, mode=RESAMPLE_MODES[settings.resample], antialias=True)
        pixels = pixels.clamp(0, 1)  # bicubic overshoots at edges, and bytes cannot
    return crop_centre(pixels, settings)


def _colour_steps(processor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, 3, 1, 1) each: what the model's own processor multiplies and adds, for colours in [0, 1] instead of bytes."""
    rescale = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    if not processor.do_normalize:
        return _per_channel([rescale] * 3), _per_channel([0.0] * 3)
    mean = _per_channel(processor.image_mean)
    std = _per_channel(processor.image_std)
    return rescale / std, -mean / std


def _per_channel(values: Sequence[float]) -> torch.Tensor:
    """One number per colour, in a shape that applies to images: (1, 3, 1, 1) float32."""
    return torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)
