"""Families of text-to-image pipelines, one file each: how diffusers' own classes are asked to paint with a gradient.

Each file offers `FAMILY`, a class that fulfils the Protocol `Family` for one pipeline class of diffusers. It is chosen by
the class that the pipeline's model_index.json names. To add a family, put one file here; what families share lies in
`denoising.py` (models that predict noise, and flow matching).
"""
import dataclasses
import hashlib
import importlib
import pathlib
import pkgutil
from typing import ClassVar, Protocol

import diffusers
import torch
import transformers

from image_text_sim_clip import EXIT_MODEL, Trouble

FIRST_VALUES = 64  # of each weight, in the name of a pipeline's weights


@dataclasses.dataclass(frozen=True)
class Condition:
    """What a denoiser is told of n prompts."""

    states: torch.Tensor  # (n, tokens, d)
    pooled: torch.Tensor | None = None  # (n, p), where the family has such
    time_ids: torch.Tensor | None = None  # (n, 6), SDXL's: original size, corner of the crop, target size, each height first

    def __len__(self) -> int:
        return len(self.states)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that there are, by their names."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value is not None}

    def followed_by(self, other: "Condition") -> "Condition":
        """These n prompts and then the other's."""
        more = other.tensors()
        return Condition(**{name: torch.cat([value, more[name]]) for name, value in self.tensors().items()})

    def replaced_where(self, chosen: torch.Tensor, other: "Condition") -> "Condition":
        """The other's states where `chosen` (n,) bool says so; sizes and crops stay, because they tell of the image."""
        mixed = self.tensors()
        for name, value in other.tensors().items():
            if name != "time_ids":
                own = mixed[name]
                where = chosen.to(own.device).view(-1, *[1] * (own.ndim - 1))
                mixed[name] = torch.where(where, value.to(own), own)
        return Condition(**mixed)


@dataclasses.dataclass(frozen=True)
class Framing:
    """How n training images were cut out of their files: (n, 2) each, height or top first, in pixels."""

    original_sizes: torch.Tensor
    crop_corners: torch.Tensor  # of the square, in the image after it was resized


@dataclasses.dataclass(frozen=True)
class Moment:
    """One denoising step: the time that the denoiser is told, and what the scheduler needs to go on from there."""

    time: torch.Tensor  # a scalar
    change: float = 0.0  # flow matching: the next sigma less this one


class Family(Protocol):
    """What training needs of a family of pipelines. Latents are (n, C, h, w), in float32 at least; images (n, 3, H, W)."""

    pipeline_class: ClassVar[str]  # diffusers' name of it
    predicts_velocity: ClassVar[bool]  # whether it is trained by flow matching
    usual_guidance: ClassVar[float]
    lora_targets: ClassVar[tuple[str, ...]]  # the layers that get LoRA weights unless told otherwise
    may_lack: ClassVar[tuple[str, ...]]  # components that a folder may be without
    text_tokens: int | None  # to which T5's states are padded; None where there is no such encoder
    pipeline: diffusers.DiffusionPipeline

    def __init__(self, pipeline: diffusers.DiffusionPipeline) -> None:
        """Freeze the pipeline and give it a deterministic scheduler; raises Trouble (exit 6) where that cannot be."""

    @property
    def denoiser(self) -> diffusers.ModelMixin:
        """The model that learns: a UNet or a transformer."""

    @property
    def usual_side(self) -> int:
        """The width and height in pixels that it paints unless told otherwise."""

    @property
    def side_multiple(self) -> int:
        """Sides must be multiples of this."""

    @property
    def largest_side(self) -> int:
        """No larger image can be painted."""

    def latent_shape(self, side: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image of side x side pixels."""

    def encode_prompts(self, prompts: list[str], side: int, framing: Framing | None = None) -> Condition:
        """The condition of n prompts, as the pipeline's own `__call__` makes it."""

    def encode_nothing(self, count: int, side: int, framing: Framing | None = None) -> Condition:
        """The condition that stands for no prompt: what guidance leads away from, and what a dropped caption becomes."""

    def guides_by_two(self, guidance: float) -> bool:
        """Whether guidance means a second prediction, without the prompt."""

    def predict(self, latents: torch.Tensor, times: torch.Tensor, condition: Condition, guidance: float) -> torch.Tensor:
        """What the denoiser makes of n latents at `times`, a scalar or (n,).

        Where `condition` holds 2n prompts, the first n stand for no prompt, and the prediction is guided away from theirs.
        """

    def moments(self, steps: int, side: int) -> list[Moment]:
        """The denoising steps from pure noise to an image."""

    def step(self, prediction: torch.Tensor, moment: Moment, latents: torch.Tensor) -> torch.Tensor:
        """The latents after one denoising step."""

    def encode_images(self, images: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Scaled latents of images in [-1, 1]: a sample of the autoencoder's distribution, made with standard normal `noise`,
        or its mode without. An autoencoder that has no distribution gives its latents."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images in [0, 1] of scaled latents."""

    def draw_times(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """(count,): times to train at, on the CPU, distributed as in diffusers' training script."""

    def usual_errors(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor, condition: Condition,
                     guidance: float) -> torch.Tensor:
        """(n,): the loss of diffusers' training script for each of n clean latents, noised with `noise` at `times`."""

    def save_lora(self, folder: pathlib.Path) -> None:
        """Write the LoRA weights so that the pipeline's `load_lora_weights(folder)` takes them."""


def families() -> dict[str, type[Family]]:
    """The family classes by their pipelines' class names."""
    found = {}
    for module_info in pkgutil.iter_modules(__path__):
        family = getattr(importlib.import_module(f"{__name__}.{module_info.name}"), "FAMILY", None)
        if family:
            found[family.pipeline_class] = family
    return found


def load_family(name: str, revision: str, dtype: torch.dtype) -> Family:
    """A frozen pipeline from a folder or the Hub, as its family; raises Trouble (exit 6).

    A pipeline of an unknown class is refused before its weights are read.
    """
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    known = families()
    try:
        index = diffusers.DiffusionPipeline.load_config(name, revision=revision)
    except Exception as error:  # diffusers and the Hub raise nearly anything
        raise Trouble(EXIT_MODEL, f"cannot load the pipeline {name}: {tell(error)}") from error
    class_name = index.get("_class_name") if isinstance(index, dict) else None
    if class_name not in known:
        raise Trouble(EXIT_MODEL, f"{name} is a {class_name}; this example trains {', '.join(sorted(known))}")
    absent: dict[str, bool | None] = {part: None for part in known[class_name].may_lack if not any(index.get(part) or ())}
    if "safety_checker" in index:
        absent |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        pipeline = getattr(diffusers, class_name).from_pretrained(name, revision=revision, dtype=dtype, use_safetensors=True,
                                                                  **absent)
    except Exception as error:  # a broken folder makes diffusers raise nearly anything
        raise Trouble(EXIT_MODEL, f"cannot load the pipeline {name}: {tell(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return known[class_name](pipeline)


def identify_weights(pipeline: diffusers.DiffusionPipeline) -> str:
    """A name for the weights of a pipeline's models, which changes with them: a digest of each one's name, shape and first
    values."""
    digest = hashlib.sha256()
    for part_name, part in sorted(pipeline.components.items()):
        if isinstance(part, torch.nn.Module):
            for name, weight in part.named_parameters():
                digest.update(f"{part_name} {name} {list(weight.shape)}".encode())
                digest.update(weight.detach().flatten()[:FIRST_VALUES].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def tell(error: BaseException) -> str:
    """The error's class and the beginning of its message, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
