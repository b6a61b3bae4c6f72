"""Dissimilarity as a loss: the scorer's own number, with a gradient back to the pixels.

    from addons.loss import DissimilarityLoss
    from image_text_sim_clip import load_config

    loss = DissimilarityLoss(load_config("config.yaml"))
    error = loss(images, captions)      # images (n, 3, H, W) in [0, 1]; mean of 1 - cosine over the n pairs
    error.backward()

Model, tokenizer, sizes, crop and colours all come from `Scorer`, so that what is trained is what is scored. The scorer
reads bytes, and a byte has no gradient: here the same steps are done on floats. Used from Python only: the script
itself never imports this file (which imports it).
"""
from collections.abc import Sequence
from typing import Any, Literal

import torch

from image_text_sim_clip import EXIT_MODEL, Config, ImageSettings, Scorer, Trouble


class DissimilarityLoss(torch.nn.Module):
    """1 - cosine of each picture with its caption, differentiable in the picture; the model is frozen.

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
        self.scorer = Scorer(config)
        self.model = self.scorer.model  # registered, so that `to` and `double` reach it
        self.objective, self.reduction = objective, reduction
        if objective == "sigmoid" and self.scorer.kind != "siglip":
            raise Trouble(EXIT_MODEL, f"{config.pretrained_model} is no SigLIP model: it has no sigmoid loss of its own")
        if self.scorer.settings.resample not in (2, 3):
            raise Trouble(EXIT_MODEL, f"{config.pretrained_model} resizes with Pillow's filter "
                                      f"{self.scorer.settings.resample}; bilinear (2) and bicubic (3) have a gradient")
        scale, offset = _colour_steps(self.scorer.processor)
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

        Raises ValueError for another shape, for bytes, and for an empty caption (which the scorer does not score either).
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be floats (n, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images but {len(captions)} captions")
        if not all(caption.strip() for caption in captions):
            raise ValueError("an empty caption has no similarity to anything")
        image_unit, text_unit = self.encode_images(images), self.encode_captions(captions)  # (n, d) each
        if self.objective == "sigmoid":
            values = self._sigmoid_losses(image_unit, text_unit, captions)
        else:
            values = 1 - (image_unit * text_unit).sum(-1)
        return values.mean() if self.reduction == "mean" else values

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Unit embeddings (n, d) of float images (n, 3, H, W) in [0, 1]; in float32, or float64 if the module is."""
        pixels = crop_centre(resize(images.to(self.colour_scale), self.scorer.settings), self.scorer.settings.crop)
        values = pixels * self.colour_scale + self.colour_offset
        features = self.model.get_image_features(pixel_values=values.to(self.model.dtype)).pooler_output
        return torch.nn.functional.normalize(features.to(self.colour_scale.dtype), dim=-1)

    def encode_captions(self, captions: Sequence[str]) -> torch.Tensor:
        """Unit embeddings (n, d), constants, of captions put into the config's `caption_template`."""
        distinct = list(dict.fromkeys(captions))
        self.scorer.device = str(self.colour_scale.device)  # wherever this module has been moved since
        template = self.scorer.config.caption_template
        ids, _ = self.scorer.tokenize([template.replace("{}", caption) for caption in distinct])
        unit = self.scorer.encode_texts(ids).clone()  # a clone, because autograd refuses what inference mode has made
        places = {caption: i for i, caption in enumerate(distinct)}
        return unit[[places[caption] for caption in captions]].to(self.colour_scale)

    def _sigmoid_losses(self, image_unit: torch.Tensor, text_unit: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        """(n,): for each image, -log sigmoid(z (scale * cosine + bias)) summed over the batch's captions; z is 1 for its own
        caption and -1 for the others. A caption equal to its own is no wrong one and is left out."""
        logits = image_unit @ text_unit.T * self.scorer.scale + self.scorer.bias  # (n, n)
        own = torch.eye(len(captions), dtype=torch.bool, device=logits.device)
        equal = torch.tensor([[a == b for b in captions] for a in captions], device=logits.device)
        losses = -torch.nn.functional.logsigmoid(torch.where(own, logits, -logits))
        return losses.masked_fill(equal & ~own, 0.0).sum(1)


def _colour_steps(processor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, 3, 1, 1) each: what the model's own processor multiplies and adds, for colours in [0, 1] instead of bytes."""
    def per_channel(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)
    rescale = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    if not processor.do_normalize:
        return per_channel([rescale] * 3), per_channel([0.0] * 3)
    mean, std = per_channel(processor.image_mean), per_channel(processor.image_std)
    return rescale / std, -mean / std


def resize(images: torch.Tensor, settings: ImageSettings) -> torch.Tensor:
    """Float images (n, 3, H, W) at the model's size: the scorer's fast resize, without its rounding to bytes."""
    size = settings.resized(*images.shape[-2:])
    if size == tuple(images.shape[-2:]):
        return images
    mode = {2: "bilinear", 3: "bicubic"}[settings.resample]
    # bicubic overshoots at edges; bytes cannot, so what lies beyond is cut off as they cut it off
    return torch.nn.functional.interpolate(images, size, mode=mode, antialias=True).clamp(0, 1)


def crop_centre(images: torch.Tensor, crop: tuple[int, int] | None) -> torch.Tensor:
    """The middle of images (n, 3, H, W), the same pixels that the scorer takes; black border where they are too small."""
    if crop is None:
        return images
    missing = [max(0, wanted - has) for wanted, has in zip(crop, images.shape[-2:], strict=True)]
    if any(missing):
        above, left = (n - n // 2 for n in missing)
        images = torch.nn.functional.pad(images, (left, missing[1] // 2, above, missing[0] // 2))
    top, left = ((has - wanted) // 2 for wanted, has in zip(crop, images.shape[-2:], strict=True))
    return images[..., top:top + crop[0], left:left + crop[1]]
