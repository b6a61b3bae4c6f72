"""`heads`: small networks on the image's embedding, such as LAION's aesthetics predictor: a column for each.

    measures:
      heads:
        aesthetic: {file: sac+logos+ava1-l14-linearMSE.pth, model: openai/clip-vit-large-patch14}
        nsfw: {file: nsfw.safetensors, activation: relu, output: sigmoid, standardise: true}

A head is one linear layer or several, one after the other; its file holds their `weight` (out, in) and `bias` (out,) under any
names, in the order of the numbers in these. It is a safetensors file, or a .pth of torch, which is read with `weights_only`, so
that it cannot run code. The last layer gives one number, which is the column's value.

* `activation` stands between the layers: none (as in LAION's published MLPs), relu, gelu, silu or tanh.
* `output` is the last layer's number as it is (raw), or its sigmoid.
* `standardise: true`: the file also holds a `mean` and a `variance` (or `std`) of the input; the input's mean is taken off, and
  what is left is divided by the standard deviation.
* `input` is the embedding of length 1 (unit), or as the model gives it (raw).

A head is made for one model. It is refused for embeddings of another width, and for another model than `model` says, or
the metadata of a safetensors file does (`model`).
"""
import dataclasses
import functools
import pathlib
import re
import warnings
from typing import TYPE_CHECKING, Literal

import numpy as np

from addons.measures.image_columns import ImageColumns, check_column_name, is_same_model
from addons.sections import check_section
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
    say,
)

if TYPE_CHECKING:
    import torch

MEANS = ("mean",)
SPREADS = {"variance": 0.5, "var": 0.5, "std": 1.0}  # of a tensor by this name: the power of it that is the standard deviation


@dataclasses.dataclass(frozen=True)
class HeadSettings:
    """The keys of one head."""

    file: str = ""
    activation: Literal["none", "relu", "gelu", "silu", "tanh"] = "none"
    output: Literal["raw", "sigmoid"] = "raw"
    standardise: bool = False
    input: Literal["unit", "raw"] = "unit"
    model: str | None = None  # the model whose embeddings it was made for: a Hub id or a folder, whose last segment counts


@dataclasses.dataclass(frozen=True)
class HeadFile:
    """What a head's file holds."""

    tensors: "dict[str, torch.Tensor]"
    metadata: dict[str, str]  # of a safetensors file


class BadHead(Exception):
    """Why a file makes no head, for the user."""


# ── Files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

def read_head_file(path: pathlib.Path) -> HeadFile:
    """The tensors of a .safetensors or a torch file. Raises BadHead for any other."""
    import torch
    from safetensors import SafetensorError, safe_open
    if not path.is_file():
        raise BadHead("no such file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
                return HeadFile(tensors, file.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise BadHead(f"not a safetensors file ({error})") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch thinks of the pickle's protocol
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file makes torch raise nearly anything
        raise BadHead(f"not a file of weights alone, which is all that is read ({type(error).__name__})") from None
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]  # a checkpoint of Lightning
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise BadHead("holds no weights by name (a state_dict)")
    return HeadFile(loaded, {})


def _last_name(name: str) -> str:
    """The last part of a tensor's name: `weight` of `layers.0.weight`."""
    return name.rpartition(".")[2]


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """A key by which `layers.10` comes after `layers.2`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


# ── The network ───────────────────────────────────────────────────────────────────────────────────────────────────────

@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer in float64: `weight` (out, in) and `bias` (out,)."""

    weight: "torch.Tensor"
    bias: "torch.Tensor"


@dataclasses.dataclass(frozen=True)
class Head:
    """Linear layers one after the other, with what stands before, between and behind them."""

    settings: HeadSettings
    layers: list[Layer]
    mean: "torch.Tensor | None" = None  # (d,) float64
    spread: "torch.Tensor | None" = None  # (d,) float64

    @property
    def width(self) -> int:
        """d, the length of the embeddings that it takes."""
        return int(self.layers[0].weight.shape[1])

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The head's value of each of the embeddings (m, d): float64 (m,)."""
        import torch
        between = torch.nn.Identity() if self.settings.activation == "none" \
            else getattr(torch.nn.functional, self.settings.activation)
        values = torch.from_numpy(images.astype(np.float64))
        if self.mean is not None and self.spread is not None:
            values = (values - self.mean) / self.spread
        for number, layer in enumerate(self.layers):
            values = torch.nn.functional.linear(between(values) if number else values, layer.weight, layer.bias)
        values = values[:, 0]
        found: np.ndarray = (values.sigmoid() if self.settings.output == "sigmoid" else values).numpy()
        return found


def build_head(file: HeadFile, settings: HeadSettings) -> Head:
    """The head of a file's tensors, each of which must have its place. Raises BadHead where they make none."""
    import torch
    tensors = {name: tensor.double() for name, tensor in file.tensors.items()}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise BadHead(f"{name} holds numbers that are not finite")
    layers: list[Layer] = []
    for name in sorted(tensors, key=_by_numbers):
        if _last_name(name) != "weight":
            continue
        weight = tensors.pop(name)
        if weight.ndim != 2:
            raise BadHead(f"{name} has {weight.ndim} dimensions, so it is no linear layer's")
        width = weight.shape[0]
        bias = tensors.pop(name.removesuffix("weight") + "bias", torch.zeros(width, dtype=torch.float64))
        if bias.shape != (width,):
            raise BadHead(f"the bias next to {name} has the shape {tuple(bias.shape)}, not ({width},)")
        if layers and layers[-1].weight.shape[0] != weight.shape[1]:
            raise BadHead(f"{name} takes {weight.shape[1]} numbers, and the layer before it gives {layers[-1].weight.shape[0]}")
        layers.append(Layer(weight, bias))
    if not layers:
        raise BadHead("holds no linear layer (no tensor called weight)")
    if layers[-1].weight.shape[0] != 1:
        raise BadHead(f"its last layer gives {layers[-1].weight.shape[0]} numbers, and a column takes one")
    mean = None
    spread = None
    if settings.standardise:
        mean, spread = _take_standard(tensors, layers[0].weight.shape[1])
    if tensors:
        hint = "; standardise: true uses a mean and a variance" if _last_name(next(iter(tensors))) in (*MEANS, *SPREADS) else ""
        raise BadHead(f"holds {', '.join(sorted(tensors))}, which no linear layer needs{hint}")
    return Head(settings, layers, mean, spread)


def _take_standard(tensors: "dict[str, torch.Tensor]", width: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """The input's mean and standard deviation, (width,) each, taken out of `tensors`."""
    means = [name for name in tensors if _last_name(name) in MEANS]
    spreads = [name for name in tensors if _last_name(name) in SPREADS]
    if len(means) != 1 or len(spreads) != 1:
        raise BadHead("standardise: true needs one tensor called mean, and one called variance or std")
    mean = tensors.pop(means[0]).flatten()
    spread = tensors.pop(spreads[0]).flatten() ** SPREADS[_last_name(spreads[0])]
    if len(mean) != width or len(spread) != width or not bool((spread > 0).all()):
        raise BadHead(f"{means[0]} and {spreads[0]} must hold {width} numbers, all of the latter above 0")
    return mean, spread


# ── The measure ───────────────────────────────────────────────────────────────────────────────────────────────────────

class Heads(ImageColumns):
    """A column for each head."""

    name = "heads"

    def __init__(self, config: Config, plan: Plan, scorer: Scorer, loader: ImageLoader) -> None:
        super().__init__(config, plan, scorer, loader)
        self._heads = {name: self._load(name, settings) for name, settings in self.read_settings(config).items()}
        if any(head.settings.input == "raw" for head in self._heads.values()):
            scorer.keeps_norms = True

    @classmethod
    def read_settings(cls, config: Config) -> dict[str, HeadSettings]:
        """The heads of the config, by name. Trouble (exit 2) for a section that makes none."""
        section = f"measures.{cls.name}"
        given = (config.measures or {}).get(cls.name)
        if not isinstance(given, dict) or not given:
            raise Trouble(EXIT_CONFIG, f"{section} must be a section of heads, each with its file, got {given!r}")
        heads = {}
        for name in sorted(given, key=str):
            check_column_name(name, section)
            if not isinstance(given[name], dict):
                raise Trouble(EXIT_CONFIG, f"{section}.{name} must be a section of keys, got {given[name]!r}")
            heads[name] = check_section(HeadSettings, given[name], f"{section}.{name}")
            if not heads[name].file:
                raise Trouble(EXIT_CONFIG, f"{section}.{name} needs file, the path of its weights")
        return heads

    @classmethod
    def columns_for(cls, config: Config) -> tuple[Column, ...]:
        """A column for each head."""
        return tuple(Column(name, "float", f"what the head {pathlib.Path(head.file).name} gives for the image")
                     for name, head in cls.read_settings(config).items())

    @functools.cached_property
    def files(self) -> Json:
        """The sha256 of each head's file."""
        found = {}
        for name, settings in self.read_settings(self.config).items():
            path = self._place_of(name, settings)
            found[name] = file_sha256(path) if path.is_file() else None
        return found

    def _place_of(self, name: str, settings: HeadSettings) -> pathlib.Path:
        """The path of a head's file; Trouble (exit 2) for the home folder of somebody unknown."""
        return pathlib.Path(expand_home(f"measures.{self.name}.{name}", settings.file))

    def _load(self, name: str, settings: HeadSettings) -> Head:
        """The head of that name; Trouble (exit 2) for a file that makes none, or one made for another model."""
        try:
            file = read_head_file(self._place_of(name, settings))
            head = build_head(file, settings)
            self._refuse_other_model(name, file, head)
            return head
        except BadHead as bad:
            raise Trouble(EXIT_CONFIG, f"measures.{self.name}.{name}: {settings.file}: {bad}") from None

    def _refuse_other_model(self, name: str, file: HeadFile, head: Head) -> None:
        """Raise BadHead for a head that was made for embeddings of another width, or of another model."""
        ours = self.config.pretrained_model
        if head.width != self.width:
            raise BadHead(f"takes embeddings of width {head.width}, and {ours} gives {self.width}")
        made_for = head.settings.model or file.metadata.get("model")
        if made_for and not is_same_model(made_for, ours):
            raise BadHead(f"was made for {made_for}, and this run's model is {ours}")
        if not made_for:
            say(f"measures.{self.name}.{name}: {head.settings.file} does not say which model it was made for, so only its "
                "width was compared; `model:` under it says so")

    def values_of_images(self, images: np.ndarray, norms: np.ndarray | None) -> dict[str, np.ndarray]:
        """What each head gives."""
        values = {}
        for name, head in self._heads.items():
            given = images.astype(np.float64)
            if head.settings.input == "raw":
                assert norms is not None
                given = given * norms.astype(np.float64)[:, None]
            values[name] = head(given)
        return values


MEASURE = Heads
