"""Tiny random pipelines of diffusers' own classes, one for each family: up to a few hundred thousand weights, 32 x 32 pixels.

A test file that imports this is skipped where the examples' packages are missing.

The text towers that want CLIP are the bundled model's; T5 is random, with a small vocabulary of its own. Weights are drawn
larger than the libraries do, so that prompts and times show in what is painted.
"""
import io
import math
import pathlib

import pytest

pytest.importorskip("diffusers", reason="needs examples/requirements.txt")
pytest.importorskip("peft", reason="needs examples/requirements.txt")

import sentencepiece
import torch
import transformers
from conftest import BUNDLED_MODEL
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

SIDE = 32
PROMPTS = ["a large red circle on a white background", "a small blue star on a black background",
           "a large green square on a grey background", "a small pink ring on a white background"]
T5_TEXTS = [*PROMPTS[:2], "nothing at all"]  # what its vocabulary is made of


def liven(module: torch.nn.Module) -> torch.nn.Module:
    """Weights of about unit gain, from this module's own seed."""
    generator = torch.Generator().manual_seed(sum(p.numel() for p in module.parameters()))
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(noise / math.sqrt(weight[0].numel()))
            else:
                weight.copy_(0.1 * noise + (1 if name.endswith("weight") else 0))  # a norm's, or a bias
    return module.eval()


def build_vae(channels: int, **settings) -> AutoencoderKL:
    """One that halves the side twice."""
    return liven(AutoencoderKL(
        block_out_channels=(8, 8, 8), latent_channels=channels, norm_num_groups=4, layers_per_block=1, sample_size=SIDE,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, **settings))


def build_unet(**settings) -> UNet2DConditionModel:
    """Two resolutions, the coarser one hears the prompt."""
    return liven(UNet2DConditionModel(
        sample_size=SIDE // 4, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, norm_num_groups=4, **settings))


def bundled_tower() -> tuple[CLIPTextModel, CLIPTokenizer]:
    """The bundled model's text tower, 128 wide."""
    transformers.utils.logging.set_verbosity_error()  # or it lists the vision tower
    return CLIPTextModel.from_pretrained(BUNDLED_MODEL), CLIPTokenizer.from_pretrained(BUNDLED_MODEL)


def projecting_tower() -> CLIPTextModelWithProjection:
    """A random tower with a projection, 32 wide, of the bundled model's vocabulary."""
    return liven(CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=602, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, projection_dim=32, bos_token_id=600, eos_token_id=601, pad_token_id=601)))


def build_t5(folder: pathlib.Path, width: int) -> tuple[T5EncoderModel, T5TokenizerFast]:
    """A random T5 encoder with a vocabulary of few pieces."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(T5_TEXTS), model_writer=trained, model_type="unigram", vocab_size=60, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2)
    (folder / "spiece.model").write_bytes(trained.getvalue())
    tokenizer = T5TokenizerFast.from_pretrained(folder, extra_ids=0, model_max_length=32)
    return liven(T5EncoderModel(T5Config(vocab_size=len(tokenizer) + 8, d_model=width, d_kv=16, d_ff=32, num_layers=1,
                                         num_heads=2))), tokenizer


def stable_diffusion(folder: pathlib.Path) -> StableDiffusionPipeline:
    """Predicts noise."""
    tower, tokenizer = bundled_tower()
    return StableDiffusionPipeline(
        vae=build_vae(4), text_encoder=tower, tokenizer=tokenizer, unet=build_unet(cross_attention_dim=128),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                                set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def stable_diffusion_xl(folder: pathlib.Path) -> StableDiffusionXLPipeline:
    """Two towers side by side, 128 + 32 wide; sizes and crops are told in 6 x 8 numbers."""
    tower, tokenizer = bundled_tower()
    unet = build_unet(cross_attention_dim=160, addition_embed_type="text_time", addition_time_embed_dim=8,
                      projection_class_embeddings_input_dim=6 * 8 + 32)
    return StableDiffusionXLPipeline(
        vae=build_vae(4), text_encoder=tower, tokenizer=tokenizer, text_encoder_2=projecting_tower(), tokenizer_2=tokenizer,
        unet=unet, add_watermarker=False, scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085,
                                                                 beta_end=0.012, clip_sample=False, steps_offset=1))


def stable_diffusion_3(folder: pathlib.Path) -> StableDiffusion3Pipeline:
    """Two projecting towers and T5."""
    t5, t5_tokenizer = build_t5(folder, 64)
    tokenizer = CLIPTokenizer.from_pretrained(BUNDLED_MODEL)
    transformer = liven(SD3Transformer2DModel(
        sample_size=SIDE // 4, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64,
        pos_embed_max_size=16))
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=build_vae(4, shift_factor=0.06),
        text_encoder=projecting_tower(), tokenizer=tokenizer, text_encoder_2=projecting_tower(), tokenizer_2=tokenizer,
        text_encoder_3=t5, tokenizer_3=t5_tokenizer)


def flux(folder: pathlib.Path) -> FluxPipeline:
    """CLIP's pooled embedding, T5's states, guidance as a number."""
    tower, tokenizer = bundled_tower()
    t5, t5_tokenizer = build_t5(folder, 32)
    transformer = liven(FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        pooled_projection_dim=128, guidance_embeds=True, axes_dims_rope=(4, 6, 6)))
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0), vae=build_vae(4, shift_factor=0.06),
        text_encoder=tower, tokenizer=tokenizer, text_encoder_2=t5, tokenizer_2=t5_tokenizer, transformer=transformer)


BUILDERS = {"stable_diffusion": stable_diffusion, "stable_diffusion_xl": stable_diffusion_xl,
            "stable_diffusion_3": stable_diffusion_3, "flux": flux}


class PipelineShelf:
    """The folders of tiny pipelines by their family's file name, each built on first use."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def __call__(self, name: str) -> pathlib.Path:
        """The folder of this family's pipeline."""
        target = self.folder / name / "pipeline"
        if not target.exists():
            target.parent.mkdir()
            BUILDERS[name](target.parent).save_pretrained(target)
        return target


def command_line(options: dict[str, object]) -> list[str]:
    """Options of the fine-tuning as arguments; a list has several values, or none; None leaves the option out."""
    arguments = []
    for name, value in options.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            arguments += [f"--{name.replace('_', '-')}", *map(str, values)]
    return arguments


class Killed(BaseException):
    """What ends a run here, with nothing written after it."""


def kill_at(trainer, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a Trainer that dies in the step of this number, counted from 0, before its weights change."""
    learn = trainer._learn

    def learn_or_die(number: int) -> None:
        if number == step:
            raise Killed
        learn(number)
    monkeypatch.setattr(trainer, "_learn", learn_or_die)
    with pytest.raises(Killed):
        trainer.run()
