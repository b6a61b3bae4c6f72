"""open_clip's towers out of transformers' blocks, and how its weights are renamed for them.

Nothing is computed that open_clip does not compute. Its blocks are transformers' CLIP blocks under other names: what was one
matrix for query, key and value becomes three, and the factors of a layer scale go into the matrix before them. Around the
blocks lies what its configs switch: class token or map pooling, a norm before the blocks or none, the norm before or after
pooling, a causal mask or none, five ways to pool, a projection with or without a bias. Attributes are named as in
transformers' CLIPModel, so that what works on its towers (int8, compile) works on these.
"""
import types
from collections.abc import Iterator

import torch
from transformers import CLIPVisionConfig, SiglipVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoder
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

from addons.models.open_clip_config import Blocks, ImageTowerConfig, NoTwin, OpenClipConfig, TextTowerConfig

Weights = dict[str, torch.Tensor]
TIMM_EPS = 1e-6  # of every norm in timm's ViTs


# ── Towers ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def _encoder(blocks: Blocks) -> CLIPEncoder:
    """transformers' stack of CLIP blocks."""
    config = CLIPVisionConfig(
        hidden_size=blocks.width, intermediate_size=blocks.mlp_width, num_attention_heads=blocks.heads,
        num_hidden_layers=blocks.layers, hidden_act=blocks.activation, layer_norm_eps=blocks.norm_eps)
    config._attn_implementation = "sdpa"
    return CLIPEncoder(config)  # type: ignore[arg-type] # the config of one tower is what it reads


class ImageTower(torch.nn.Module):
    """Normalised pixels (n, 3, H, W) -> projected features (n, d)."""

    def __init__(self, config: ImageTowerConfig, blocks: Blocks, embed_dim: int) -> None:
        super().__init__()
        self.pool = config.pool
        self.pool_before_norm = config.pool_before_norm
        width = blocks.width
        is_siglip = config.pool == "map"
        self.patch_embedding = torch.nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=is_siglip)
        self.class_embedding = None if is_siglip else torch.nn.Parameter(torch.empty(width))
        self.position_embedding = torch.nn.Parameter(torch.empty(config.positions, width))
        self.pre_layrnorm = torch.nn.LayerNorm(width, blocks.norm_eps) if config.norm_before else torch.nn.Identity()
        self.encoder = _encoder(blocks)
        self.post_layernorm = torch.nn.LayerNorm(width, blocks.norm_eps)
        self.head: torch.nn.Module | None = None
        if is_siglip:
            self.head = SiglipMultiheadAttentionPoolingHead(SiglipVisionConfig(
                hidden_size=width, intermediate_size=blocks.mlp_width, num_attention_heads=blocks.heads,
                hidden_act=blocks.activation, layer_norm_eps=blocks.norm_eps))
        self.projection = _projection(config.projection, width, embed_dim)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) -> (n, d)."""
        states = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (n, patches, width)
        if self.class_embedding is not None:
            first = self.class_embedding.expand(pixels.shape[0], 1, -1)  # len() would be a constant where it is traced
            states = torch.cat([first, states], dim=1)
        states = self.pre_layrnorm(states + self.position_embedding)
        states = self.encoder(inputs_embeds=states, attention_mask=None, is_causal=False).last_hidden_state
        if not self.pool_before_norm:
            states = self.post_layernorm(states)
        if self.head is not None:
            pooled = self.head(states)
        else:
            pooled = states[:, 0] if self.pool == "tok" else states[:, 1:].mean(dim=1)
        if self.pool_before_norm:
            pooled = self.post_layernorm(pooled)
        features: torch.Tensor = self.projection(pooled)
        return features


class TextTower(torch.nn.Module):
    """Token ids (n, length) -> projected features (n, d)."""

    def __init__(self, config: TextTowerConfig, embed_dim: int) -> None:
        super().__init__()
        self.pool = config.pool
        self.eos_id = config.eos_id
        self.is_causal = config.causal
        width = config.blocks.width
        self.token_embedding = torch.nn.Embedding(config.vocab_size, width)
        self.position_embedding = torch.nn.Parameter(torch.empty(config.context_length, width))
        self.encoder = _encoder(config.blocks)
        self.final_layer_norm = torch.nn.LayerNorm(width, config.blocks.norm_eps)
        self.projection = _projection(config.projection, width, embed_dim)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(n, length) -> (n, d); without a causal mask, or pooled at the last token, `length` must be the whole context."""
        states = self.token_embedding(ids) + self.position_embedding[:ids.shape[1]]
        states = self.encoder(inputs_embeds=states, attention_mask=None, is_causal=self.is_causal).last_hidden_state
        states = self.final_layer_norm(states)
        rows = torch.arange(ids.shape[0], device=ids.device)
        if self.pool == "argmax":
            pooled = states[rows, ids.argmax(dim=-1)]
        elif self.pool == "eos":
            pooled = states[rows, (ids == self.eos_id).int().argmax(dim=-1)]
        else:
            pooled = states[:, 0 if self.pool == "first" else -1]
        features: torch.Tensor = self.projection(pooled)
        return features


def _projection(kind: str, width: int, embed_dim: int) -> torch.nn.Module:
    """`kind`: matrix, linear (with a bias), or none."""
    if kind == "none":
        return torch.nn.Identity()
    return torch.nn.Linear(width, embed_dim, bias=kind == "linear")


class OpenClipModel(torch.nn.Module):
    """Both towers, scale and bias."""

    def __init__(self, image_tower: ImageTower, text_tower: TextTower, config: TextTowerConfig) -> None:
        super().__init__()
        self.vision_model = image_tower
        self.text_model = text_tower
        self.logit_scale = torch.nn.Parameter(torch.empty(()))
        self.logit_bias = torch.nn.Parameter(torch.zeros(()))
        # as transformers' models tell what a tokenizer has to fit
        self.config = types.SimpleNamespace(text_config=types.SimpleNamespace(
            max_position_embeddings=config.context_length, vocab_size=config.vocab_size))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.text_model.position_embedding.dtype

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) -> (n, d)."""
        features: torch.Tensor = self.vision_model(pixels)
        return features

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        """(n, length) -> (n, d)."""
        features: torch.Tensor = self.text_model(ids)
        return features


# ── Weights ───────────────────────────────────────────────────────────────────────────────────────────────────────────

MOST_MISSING = 1000  # weights, until no more are looked for


class UnfitWeights(Exception):
    """Weights that are missing, left over, or of another shape: its text says which."""


class Store:
    """open_clip's weights, taken out one by one as copies in float32: a file of safetensors is mapped into memory, and what is
    written into it while a run goes on would change the model, or end the process."""

    def __init__(self, weights: Weights) -> None:
        self.left = dict(weights)
        self.missing: list[str] = []

    def take(self, name: str) -> torch.Tensor:
        """The weight of that name; an empty one, and a note of it, where there is none. UnfitWeights where many are missing."""
        if name not in self.left:
            self.missing.append(name)
            if len(self.missing) > MOST_MISSING:  # a config with a billion layers would never come to its end
                self.check_empty()
            return torch.empty(0)
        return self.left.pop(name).to(torch.float32, copy=True)

    def layer(self, old: str, new: str, bias: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
        """Weight and bias of a layer under its new name."""
        yield f"{new}.weight", self.take(f"{old}.weight")
        if bias:
            yield f"{new}.bias", self.take(f"{old}.bias")

    def check_empty(self) -> None:
        """Raise UnfitWeights where weights were missing or are left over."""
        if self.missing:
            raise UnfitWeights(f"lacks weights: {', '.join(self.missing[:3])} ...")
        if self.left:
            raise UnfitWeights(f"has weights that its config has no place for: {', '.join(sorted(self.left)[:3])} ...")


def build_model(config: OpenClipConfig, weights: Weights) -> OpenClipModel:
    """The model of `config` with open_clip's `weights`, in float32. Raises UnfitWeights, NoTwin where there are no towers."""
    if config.image is None or config.text is None:
        raise NoTwin(config.no_twin)
    store = Store(_in_plain_form(weights))
    image_blocks = config.image.blocks or _measure_siglip(config.image, store)
    renamed = {"logit_scale": store.take("logit_scale").reshape(-1)[:1].squeeze()}
    if config.has_bias and "logit_bias" in store.left:  # without one open_clip takes 0
        renamed["logit_bias"] = store.take("logit_bias").reshape(-1)[:1].squeeze()
    rename_image = _rename_plain_tower if config.image.blocks else _rename_siglip_tower
    renamed |= {f"vision_model.{name}": weight for name, weight in rename_image(store, config.image, image_blocks)}
    renamed |= {f"text_model.{name}": weight for name, weight in _rename_text_tower(store, config.text)}
    store.check_empty()
    with torch.device("meta"):
        model = OpenClipModel(ImageTower(config.image, image_blocks, config.embed_dim),
                              TextTower(config.text, config.embed_dim), config.text)
    renamed.setdefault("logit_bias", torch.zeros(()))
    try:
        model.load_state_dict(renamed, assign=True)
    except RuntimeError as error:  # a list of all of them, over many lines
        lines = str(error).splitlines()
        raise UnfitWeights(f"has weights of other shapes than its config asks for: {lines[-1].strip()}") from None
    return model


# What OpenAI's archives and older checkpoints hold besides weights.
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "text.attn_mask")


def _in_plain_form(weights: Weights) -> Weights:
    """Names as CLIP has them: without the `module.` of a training run, and without the `text.` of CustomTextCLIP."""
    plain: Weights = {}
    for name, weight in weights.items():
        short = name.removeprefix("module.").removeprefix("text.")
        if short not in NO_WEIGHTS:
            plain[short] = weight
    return plain


def _measure_siglip(config: ImageTowerConfig, store: Store) -> Blocks:
    """Sizes of timm's tower, from its weights."""
    layers = 0
    while f"visual.trunk.blocks.{layers}.norm1.weight" in store.left:
        layers += 1
    first = store.left.get("visual.trunk.blocks.0.mlp.fc1.weight")
    if first is None or first.ndim != 2 or first.shape[1] % config.head_width:
        raise UnfitWeights("lacks weights: visual.trunk.blocks.0.mlp.fc1.weight ...")
    mlp_width, width = first.shape
    return Blocks(layers, width, width // config.head_width, mlp_width, config.activation, TIMM_EPS, False)


def _rename_plain_tower(store: Store, config: ImageTowerConfig, blocks: Blocks) -> Iterator[tuple[str, torch.Tensor]]:
    """open_clip's VisionTransformer."""
    yield "class_embedding", store.take("visual.class_embedding")
    yield "position_embedding", store.take("visual.positional_embedding")
    yield from store.layer("visual.conv1", "patch_embedding", bias=False)
    if config.norm_before:
        yield from store.layer("visual.ln_pre", "pre_layrnorm")
    yield from _rename_blocks(store, "visual.transformer", blocks)
    yield from store.layer("visual.ln_post", "post_layernorm")
    yield "projection.weight", store.take("visual.proj").t().contiguous()


def _rename_text_tower(store: Store, config: TextTowerConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """open_clip's TextTransformer."""
    yield from store.layer("token_embedding", "token_embedding", bias=False)
    yield "position_embedding", store.take("positional_embedding")
    yield from _rename_blocks(store, "transformer", config.blocks)
    yield from store.layer("ln_final", "final_layer_norm")
    if config.projection == "linear":
        yield from store.layer("text_projection", "projection")
    elif config.projection == "matrix":
        yield "projection.weight", store.take("text_projection").t().contiguous()


def _rename_blocks(store: Store, tower: str, blocks: Blocks) -> Iterator[tuple[str, torch.Tensor]]:
    for number in range(blocks.layers):
        old = f"{tower}.resblocks.{number}"
        new = f"encoder.layers.{number}"
        yield from store.layer(f"{old}.ln_1", f"{new}.layer_norm1")
        yield from _split_in_three(store, f"{old}.attn.in_proj_weight", f"{new}.self_attn", "weight")
        yield from _split_in_three(store, f"{old}.attn.in_proj_bias", f"{new}.self_attn", "bias")
        yield from _scaled(store, f"{old}.attn.out_proj", f"{new}.self_attn.out_proj", f"{old}.ls_1", blocks)
        yield from store.layer(f"{old}.ln_2", f"{new}.layer_norm2")
        yield from store.layer(f"{old}.mlp.c_fc", f"{new}.mlp.fc1")
        yield from _scaled(store, f"{old}.mlp.c_proj", f"{new}.mlp.fc2", f"{old}.ls_2", blocks)


def _split_in_three(store: Store, old: str, new: str, what: str) -> Iterator[tuple[str, torch.Tensor]]:
    """One matrix, or bias, for query, key and value (3 x width, ...) as three."""
    for part, values in zip("qkv", store.take(old).chunk(3), strict=False):
        yield f"{new}.{part}_proj.{what}", values


def _scaled(store: Store, old: str, new: str, scale: str, blocks: Blocks) -> Iterator[tuple[str, torch.Tensor]]:
    """A layer's weight and bias times the layer scale behind it: g (W x + b) = (g W) x + g b."""
    weight = store.take(f"{old}.weight")
    bias = store.take(f"{old}.bias")
    if blocks.layer_scale:
        factors = store.take(f"{scale}.gamma")
        if len(factors) == len(weight):
            weight = weight * factors[:, None]
            bias = bias * factors
    yield f"{new}.weight", weight
    yield f"{new}.bias", bias


def _rename_siglip_tower(store: Store, config: ImageTowerConfig, blocks: Blocks) -> Iterator[tuple[str, torch.Tensor]]:
    """timm's VisionTransformer with map pooling."""
    trunk = "visual.trunk"
    yield "position_embedding", store.take(f"{trunk}.pos_embed").squeeze(0)
    yield from store.layer(f"{trunk}.patch_embed.proj", "patch_embedding")
    for number in range(blocks.layers):
        old = f"{trunk}.blocks.{number}"
        new = f"encoder.layers.{number}"
        yield from store.layer(f"{old}.norm1", f"{new}.layer_norm1")
        yield from _split_in_three(store, f"{old}.attn.qkv.weight", f"{new}.self_attn", "weight")
        yield from _split_in_three(store, f"{old}.attn.qkv.bias", f"{new}.self_attn", "bias")
        yield from store.layer(f"{old}.attn.proj", f"{new}.self_attn.out_proj")
        yield from store.layer(f"{old}.norm2", f"{new}.layer_norm2")
        yield from store.layer(f"{old}.mlp.fc1", f"{new}.mlp.fc1")
        yield from store.layer(f"{old}.mlp.fc2", f"{new}.mlp.fc2")
    yield from store.layer(f"{trunk}.norm", "post_layernorm")
    yield from _rename_map_pooling(store, f"{trunk}.attn_pool")
    if config.projection != "none":
        yield from store.layer("visual.head.proj", "projection", bias=config.projection == "linear")


def _rename_map_pooling(store: Store, old: str) -> Iterator[tuple[str, torch.Tensor]]:
    """timm's AttentionPoolLatent: its query and its key-and-value matrix become torch's one for all three."""
    yield "head.probe", store.take(f"{old}.latent")
    for what in ("weight", "bias"):
        query = store.take(f"{old}.q.{what}")
        yield f"head.attention.in_proj_{what}", torch.cat([query, store.take(f"{old}.kv.{what}")])
    yield from store.layer(f"{old}.proj", "head.attention.out_proj")
    yield from store.layer(f"{old}.norm", "head.layernorm")
    yield from store.layer(f"{old}.mlp.fc1", "head.mlp.fc1")
    yield from store.layer(f"{old}.mlp.fc2", "head.mlp.fc2")
