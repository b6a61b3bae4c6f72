"""open_clip_config.json: what it says, word by word. A word that is not known here is refused by name, never guessed at.

The words are those of open_clip_torch 3.3.0: the fields of its CLIPVisionCfg, CLIPTextCfg and PreprocessCfg, and the
arguments of its CLIP and CustomTextCLIP.
"""
import dataclasses
import json
import pathlib
import re

from image_text_sim_clip import EXIT_MODEL, Trouble

CONFIG_FILE = "open_clip_config.json"

JsonObject = dict[str, object]

TOP_WORDS = {"model_cfg", "preprocess_cfg"}
MODEL_WORDS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale", "init_logit_bias",
               "nonscalar_logit_scale", "multimodal_cfg"}
BLOCK_WORDS = {"layers", "width", "mlp_ratio", "ls_init_value", "pool_type", "final_ln_after_pool", "output_tokens",
               "act_kwargs", "norm_kwargs", "block_type", "qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner",
               "scale_attn", "scale_fc"}
VISION_WORDS = BLOCK_WORDS | {
    "head_width", "patch_size", "image_size", "patch_dropout", "attentional_pool", "attn_pooler_queries", "attn_pooler_heads",
    "no_ln_pre", "pos_embed_type", "timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias",
    "timm_drop", "timm_drop_path"}
TEXT_WORDS = BLOCK_WORDS | {
    "context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "heads", "embed_cls", "pad_id",
    "eos_id", "no_causal_mask", "proj_bias", "proj_type", "hf_model_name", "hf_model_pretrained", "hf_proj_type",
    "hf_pooler_type"}
PREPROCESS_WORDS = {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"}

# Switches of the blocks that change what they compute, and that transformers' blocks do not have.
OTHER_BLOCKS = ("output_tokens", "qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")

# timm's SigLIP towers by the beginning of their name: channels of a head. Widths and layers are seen from the weights.
SIGLIP_HEADS = {"vit_base": 64, "vit_large": 64, "vit_so400m": 72, "vit_giantopt": 96}
SIGLIP_NAME = re.compile(r"(vit_\w+?)_patch(\d+)_siglip_(\d+)(?:\.\w+)?")
# Those whose blocks have the tanh form of GELU (timm 1.0.31, vision_transformer.py); the others have the exact one.
TANH_TOWERS = {"vit_base_patch32_siglip_256", "vit_large_patch16_siglip_512", "vit_so400m_patch16_siglip_256",
               "vit_so400m_patch16_siglip_384", "vit_so400m_patch16_siglip_512", "vit_giantopt_patch16_siglip_256",
               "vit_giantopt_patch16_siglip_384"}
SIGLIP_TOWERS = TANH_TOWERS | {
    "vit_base_patch16_siglip_224", "vit_base_patch16_siglip_256", "vit_base_patch16_siglip_384", "vit_base_patch16_siglip_512",
    "vit_large_patch16_siglip_256", "vit_large_patch16_siglip_384", "vit_so400m_patch14_siglip_224",
    "vit_so400m_patch14_siglip_378", "vit_so400m_patch14_siglip_384"}


class NoTwin(Exception):
    """A tower that transformers has no module for: its text names the words of the config that ask for it."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A stack of transformer blocks: sizes in channels."""

    layers: int
    width: int
    heads: int
    mlp_width: int
    activation: str  # transformers' name
    norm_eps: float
    layer_scale: bool


@dataclasses.dataclass(frozen=True)
class ImageTowerConfig:
    """The image tower: sizes are (height, width) in pixels."""

    blocks: Blocks | None  # None: timm's, whose sizes its weights tell
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    norm_before: bool = True
    pool: str = "tok"  # tok | avg | map
    pool_before_norm: bool = False
    projection: str = "matrix"  # matrix | linear (with a bias) | none
    head_width: int = 64
    activation: str = "gelu"

    @property
    def positions(self) -> int:
        """Patches, and the class token."""
        grid = (self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1])
        return grid[0] * grid[1] + (self.pool != "map")


@dataclasses.dataclass(frozen=True)
class TextTowerConfig:
    """The text tower."""

    blocks: Blocks
    context_length: int
    vocab_size: int
    causal: bool
    pool: str  # argmax | eos | first | last
    eos_id: int
    projection: str  # matrix | linear | none


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """How captions become token ids."""

    context_length: int
    vocab_size: int
    repository: str  # hf_tokenizer_name; empty: open_clip's own byte-level BPE
    clean: str  # lower | whitespace | canonicalize
    strip_separator: bool


@dataclasses.dataclass(frozen=True)
class PreprocessConfig:
    """How an image becomes pixels; the size comes from the image tower."""

    size: tuple[int, int]
    resize_mode: str
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fill_color: int


@dataclasses.dataclass(frozen=True)
class OpenClipConfig:
    """All that an open_clip_config.json says. Where `no_twin` is not empty, it says why there are no towers here."""

    embed_dim: int
    image: ImageTowerConfig | None
    text: TextTowerConfig | None
    tokenizer: TokenizerConfig
    preprocess: PreprocessConfig
    has_bias: bool
    architecture: str
    no_twin: str


class Section:
    """One section of the config, whose words are taken with their type checked; raises Trouble (exit 6) naming a word."""

    def __init__(self, name: str, values: object, known: set[str], model: str) -> None:
        self.name = name
        self.model = model
        if not isinstance(values, dict):
            raise Trouble(EXIT_MODEL, f"{model}: {name} of its {CONFIG_FILE} is not a section of words")
        self.values: JsonObject = values
        unknown = sorted(str(word) for word in values if word not in known)
        if unknown:
            raise Trouble(EXIT_MODEL, f"{model}: {name} of its {CONFIG_FILE} has the word {unknown[0]!r}, which this program "
                                      "does not know, so it cannot tell what the model computes")

    def refuse(self, word: str, expected: str) -> Trouble:
        """What to raise for a value that means nothing here."""
        return Trouble(EXIT_MODEL, f"{self.model}: {word} in {self.name} of its {CONFIG_FILE} is {self.values.get(word)!r}; "
                                   f"this program knows {expected}")

    def number(self, word: str, default: float) -> float:
        """A number; null and a missing word are the default."""
        value = self.values.get(word)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.refuse(word, "a number")
        return value

    def count(self, word: str, default: int) -> int:
        """A whole number above 0."""
        value = self.number(word, default)
        if value != int(value) or value < 1:
            raise self.refuse(word, "a whole number above 0")
        return int(value)

    def flag(self, word: str) -> bool:
        """true or false; null and a missing word are false."""
        value = self.values.get(word)
        if value not in (None, True, False):
            raise self.refuse(word, "true and false")
        return bool(value)

    def choice(self, word: str, default: str, choices: tuple[str, ...]) -> str:
        """One of several words; null and a missing word are the default."""
        value = self.values.get(word)
        chosen = default if value is None else value
        if chosen not in choices:
            raise self.refuse(word, ", ".join(choices))
        return str(chosen)

    def text(self, word: str) -> str:
        """A text; null and a missing word are empty."""
        value = self.values.get(word)
        if value is not None and not isinstance(value, str):
            raise self.refuse(word, "a text")
        return value or ""

    def pair(self, word: str, default: int) -> tuple[int, int]:
        """(height, width), given as one number or as two."""
        value = self.values.get(word)
        if value is None:
            value = default
        given = value if isinstance(value, list) else [value, value]
        sides = [side for side in given if isinstance(side, int) and side > 0]
        if len(given) != 2 or len(sides) != 2:
            raise self.refuse(word, "one or two whole numbers of pixels")
        return sides[0], sides[1]

    def colours(self, word: str, default: tuple[float, float, float]) -> tuple[float, ...]:
        """Three numbers, given as three or as one for all."""
        value = self.values.get(word)
        if value is None or value == []:
            return default
        given = value if isinstance(value, list) else [value] * 3
        numbers = [float(part) for part in given if isinstance(part, (int, float)) and not isinstance(part, bool)]
        if len(given) != 3 or len(numbers) != 3:
            raise self.refuse(word, "one or three numbers")
        return tuple(numbers)

    def section(self, word: str, known: set[str]) -> "Section":
        """A section within this one; null and a missing word are an empty one."""
        value = self.values.get(word)
        return Section(f"{self.name}.{word}", {} if value is None else value, known, self.model)


def read_config(folder: pathlib.Path, model: str) -> OpenClipConfig:
    """Read folder/open_clip_config.json; `model` is what messages call it. Raises Trouble (exit 6)."""
    try:
        content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Trouble(EXIT_MODEL, f"{model}: its {CONFIG_FILE} cannot be read: {type(error).__name__}") from None
    top = Section("the top", content, TOP_WORDS, model)
    if "model_cfg" not in top.values:
        raise Trouble(EXIT_MODEL, f"{model}: its {CONFIG_FILE} lacks model_cfg")
    whole = Section("model_cfg", top.values["model_cfg"], MODEL_WORDS, model)
    vision = Section("vision_cfg", whole.values.get("vision_cfg"), VISION_WORDS, model)
    text = Section("text_cfg", whole.values.get("text_cfg"), TEXT_WORDS, model)
    preprocess = top.section("preprocess_cfg", PREPROCESS_WORDS)
    image_tower: ImageTowerConfig | None = None
    text_tower: TextTowerConfig | None = None
    no_twin = ""
    try:
        if "multimodal_cfg" in whole.values:
            raise NoTwin("multimodal_cfg")
        image_tower = _read_image_tower(vision, whole.flag("quick_gelu"))
        text_tower = _read_text_tower(text, whole.flag("quick_gelu"))
    except NoTwin as missing:
        no_twin = str(missing)
    return OpenClipConfig(whole.count("embed_dim", 0), image_tower, text_tower, _read_tokenizer(text),
                          _read_preprocess(preprocess, vision.pair("image_size", 224)),
                          whole.values.get("init_logit_bias") is not None, _name_architecture(vision, whole), no_twin)


def _read_image_tower(vision: Section, quick_gelu: bool) -> ImageTowerConfig:
    """Raises NoTwin where transformers has no such tower."""
    timm_name = vision.text("timm_model_name")
    if timm_name:
        return _read_siglip_tower(vision, timm_name)
    if isinstance(vision.values.get("layers"), list):
        raise NoTwin("vision_cfg.layers (a ResNet)")
    if vision.values.get("attentional_pool"):
        raise NoTwin("vision_cfg.attentional_pool")
    width = vision.count("width", 768)
    heads = width // vision.count("head_width", 64)
    pool = vision.choice("pool_type", "tok", ("tok", "avg", "none"))
    if pool == "none":
        raise NoTwin("vision_cfg.pool_type none")
    vision.choice("pos_embed_type", "learnable", ("learnable", "sin_cos_2d"))  # both lie among the weights
    vision.number("patch_dropout", 0)  # only in training
    return ImageTowerConfig(
        _read_blocks(vision, width, heads, quick_gelu), vision.pair("image_size", 224), vision.pair("patch_size", 16),
        norm_before=not vision.flag("no_ln_pre"), pool=pool, pool_before_norm=vision.flag("final_ln_after_pool"))


def _read_siglip_tower(vision: Section, timm_name: str) -> ImageTowerConfig:
    named = SIGLIP_NAME.fullmatch(timm_name)
    name = timm_name.partition(".")[0]
    pool = vision.text("timm_pool") or "avg"
    projection = vision.values.get("timm_proj", "linear")
    if name not in SIGLIP_TOWERS or not named:
        raise NoTwin(f"vision_cfg.timm_model_name {timm_name}")
    if pool != "map" or projection not in ("none", "linear"):
        raise NoTwin(f"vision_cfg.timm_pool {pool} with timm_proj {projection}")
    if projection == "linear":
        projection = "linear" if vision.flag("timm_proj_bias") else "matrix"
    size = int(named[3])
    if vision.pair("image_size", 224) != (size, size):
        raise vision.refuse("image_size", f"{size}, which {timm_name} is made for")
    return ImageTowerConfig(
        None, (size, size), (int(named[2]), int(named[2])), norm_before=False, pool="map", projection=str(projection),
        head_width=SIGLIP_HEADS[named[1]], activation="gelu_pytorch_tanh" if name in TANH_TOWERS else "gelu")


def _read_text_tower(text: Section, quick_gelu: bool) -> TextTowerConfig:
    """Raises NoTwin where transformers has no such tower."""
    if text.text("hf_model_name"):
        raise NoTwin(f"text_cfg.hf_model_name {text.text('hf_model_name')}")
    if text.flag("embed_cls"):
        raise NoTwin("text_cfg.embed_cls")
    pool = text.choice("pool_type", "argmax", ("argmax", "eos", "first", "last", "none"))
    if pool == "none":
        raise NoTwin("text_cfg.pool_type none")
    text.flag("final_ln_after_pool")  # the norm is of each token, and one token is pooled
    projection = "linear" if text.flag("proj_bias") else "matrix"
    if text.choice("proj_type", "linear", ("linear", "none")) == "none":
        projection = "none"
    return TextTowerConfig(
        _read_blocks(text, text.count("width", 512), text.count("heads", 8), quick_gelu), text.count("context_length", 77),
        text.count("vocab_size", 49408), not text.flag("no_causal_mask"), pool, int(text.number("eos_id", 2)), projection)


def _read_blocks(section: Section, width: int, heads: int, quick_gelu: bool) -> Blocks:
    for word in OTHER_BLOCKS:
        if section.flag(word):
            raise NoTwin(f"{section.name}.{word}")
    if section.choice("block_type", "default", ("default", "custom")) != "default":
        raise NoTwin(f"{section.name}.block_type custom")
    if not heads or width % heads:
        raise section.refuse("width", f"widths that its {heads} heads can share")
    approximate = section.section("act_kwargs", {"approximate"}).choice("approximate", "none", ("none", "tanh"))
    if quick_gelu and section.values.get("act_kwargs"):
        raise section.refuse("act_kwargs", "it without quick_gelu only")
    activation = "gelu_pytorch_tanh" if approximate == "tanh" else "gelu"
    return Blocks(
        section.count("layers", 12), width, heads, int(width * section.number("mlp_ratio", 4.0)),
        "quick_gelu" if quick_gelu else activation, section.section("norm_kwargs", {"eps"}).number("eps", 1e-5),
        section.values.get("ls_init_value") is not None)


def _read_tokenizer(text: Section) -> TokenizerConfig:
    repository = text.text("hf_tokenizer_name")
    known = {"clean", "strip_sep_token"} if repository else {"clean"}
    options = text.section("tokenizer_kwargs", known)
    if text.text("tokenizer_mode"):
        raise text.refuse("tokenizer_mode", "null only")
    clean = options.choice("clean", "whitespace" if repository else "lower", ("lower", "whitespace", "canonicalize"))
    return TokenizerConfig(text.count("context_length", 77), text.count("vocab_size", 49408), repository, clean,
                           options.flag("strip_sep_token"))


def _read_preprocess(preprocess: Section, image_size: tuple[int, int]) -> PreprocessConfig:
    preprocess.choice("mode", "RGB", ("RGB",))
    interpolation = preprocess.choice("interpolation", "bicubic", ("bicubic", "bilinear", "random"))
    fill = preprocess.number("fill_color", 0)
    if fill != int(fill) or not 0 <= fill <= 255:
        raise preprocess.refuse("fill_color", "one level, 0 to 255")
    std = preprocess.colours("std", (0.26862954, 0.26130258, 0.27577711))
    if not all(std):
        raise preprocess.refuse("std", "numbers other than 0")
    return PreprocessConfig(
        image_size, preprocess.choice("resize_mode", "shortest", ("shortest", "longest", "squash")),
        "bilinear" if interpolation == "bilinear" else "bicubic",  # random is bicubic outside training
        preprocess.colours("mean", (0.48145466, 0.4578275, 0.40821073)), std, int(fill))


# The letters that open_clip gives plain ViTs, by width and layers.
VIT_LETTERS = {(384, 12): "S", (512, 12): "M", (768, 12): "B", (896, 12): "B-plus", (1024, 24): "L", (1280, 32): "H",
               (1408, 40): "g", (1664, 48): "bigG", (1792, 56): "e"}


def _name_architecture(vision: Section, whole: Section) -> str:
    """What open_clip calls the image tower: ViT-L-14-quickgelu with its image size, or timm's name."""
    timm_name = vision.text("timm_model_name")
    if timm_name:
        return timm_name
    if isinstance(vision.values.get("layers"), list):
        return "ResNet"
    size = (vision.count("width", 768), vision.count("layers", 12))
    letter = VIT_LETTERS.get(size, f"{size[1]}x{size[0]}")
    height = vision.pair("image_size", 224)[0]
    quick = "-quickgelu" if whole.flag("quick_gelu") else ""
    return f"ViT-{letter}-{vision.pair('patch_size', 16)[0]}-{height}{quick}"
