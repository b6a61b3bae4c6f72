"""Train a text-to-image pipeline so small that a CPU makes it: drawings of one large shape, 32 pixels wide.

    python examples/train_shapes_pipeline.py --out scores/training/pipeline      # about fifteen minutes on one core
    python examples/train_shapes_pipeline.py --kind flow --out scores/training/flow/pipeline

It writes a StableDiffusionPipeline folder like any other, of four parts: the text tower of the bundled `shapes_clip`, as
it is; an AutoencoderTiny that passes pixels through; a UNet2DConditionModel of a million parameters, the only part that is
trained; a DDIM scheduler. With --kind flow it is a StableDiffusion3Pipeline without T5: the same tower in both places for
CLIP, the same autoencoder, an SD3Transformer2DModel of a million parameters, flow matching. It sees scenes of one large
shape only (a small one is six pixels wide here), and never one whose caption is among those of the bundled drawings, so
that these can be asked for as something new.

The UNet predicts velocity (Salimans and Ho 2022) on a noise schedule that ends in pure noise (Lin et al. 2024): else
the brightness of the background would leak through the last step of noise, and sampling could not choose it.
"""
import argparse
import functools
import json
import math
import pathlib
import random
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import transformers
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import EMAModel
from transformers import CLIPConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

CHALLENGE_SET = pathlib.Path(__file__).resolve().parent.parent / "challenge_set"
sys.path.insert(0, str(CHALLENGE_SET))
from draw_shapes import Scene, caption, draw, held_out_scenes, random_scene  # noqa: E402 - lies in the folder named just above

SIDE = 32
PATCH = 4  # pixels of a side, in flow matching's transformer
BATCH = 16
MIDDLE = 0.5  # the mean of the drawings' colours in [0, 1]
SPREAD = 0.37  # and their deviation
SHRINK = 0.05  # a small scale
T5_TOKENS = 1  # of zeros, in place of T5's states (fine-tuning's --text-tokens)
CAPTION_DROPOUT = 0.1  # share of drawings learnt without their caption, so that classifier-free guidance has a base


def draw_centred(scene: Scene, rng: random.Random) -> np.ndarray:
    """The drawing (SIDE, SIDE, 3) uint8 of a scene of one shape, moved to the middle, give or take two pixels.

    A UNet of this size learns what to paint long before it learns to decide where; the scorers do not mind the place.
    """
    pixels = np.asarray(draw(scene, SIDE, rng))
    drawn = np.argwhere((pixels != pixels[0, 0]).any(-1))  # (n, 2): rows and columns that are not background
    middle = (drawn.min(0) + drawn.max(0) + 1) // 2
    return np.roll(pixels, [SIDE // 2 - at + rng.randint(-2, 2) for at in middle], (0, 1))


def training_drawings(count: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Pixels (count, 3, SIDE, SIDE) uint8 of scenes of one large shape, and their captions; held-out scenes never appear."""
    rng = random.Random(seed)
    forbidden = {caption(scene) for scene in held_out_scenes()}
    pixels = np.empty((count, SIDE, SIDE, 3), np.uint8)
    captions: list[str] = []
    while len(captions) < count:
        scene = random_scene(rng, 1)
        if scene.things[0].size == "large" and caption(scene) not in forbidden:
            pixels[len(captions)] = draw_centred(scene, rng)
            captions.append(caption(scene))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), captions


def build_autoencoder() -> AutoencoderTiny:
    """One that passes pixels through: latents are the three colours, moved and scaled to about zero mean and unit variance.

    At 32 pixels there is nothing to compress, and a latent-diffusion pipeline needs an autoencoder all the same. Its
    convolutions are set to copy, and on a small scale (`SHRINK`), where the tanh in front of the decoder is a straight
    line: a byte that went through both comes back as the same byte.
    """
    model = AutoencoderTiny(encoder_block_out_channels=(16,), decoder_block_out_channels=(16,), latent_channels=3,
                            num_encoder_blocks=(0,), num_decoder_blocks=(0,), scaling_factor=1 / (SHRINK * SPREAD))
    first, last = model.encoder.layers  # colours in [0, 1] -> 16 channels -> latents
    widen, _, narrow = model.decoder.layers  # latents -> 16 channels -> (ReLU) -> colours in [0, 1]
    with torch.no_grad():
        for layer in (first, last, widen, narrow):
            torch.nn.init.dirac_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
        last.weight.mul_(SHRINK)
        last.bias.fill_(-SHRINK * MIDDLE)
        widen.weight.div_(SHRINK)
        widen.bias[:3] = MIDDLE
    return model.eval().requires_grad_(False)


@torch.no_grad()
def encode(autoencoder: AutoencoderTiny, pixels: torch.Tensor) -> torch.Tensor:
    """Scaled latents (n, 3, SIDE, SIDE) of uint8 pixels (n, 3, SIDE, SIDE)."""
    parts = [autoencoder.encode(part.float() / 127.5 - 1).latents for part in pixels.split(256)]
    return torch.cat(parts) * autoencoder.config.scaling_factor


def cosine_schedule(optimiser: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A short warm-up, then down to zero along half a cosine."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: min(1.0, (i + 1) / 50) * 0.5 * (1 + math.cos(math.pi * i / steps)))


def build_unet(text_width: int) -> UNet2DConditionModel:
    """Three resolutions, 32, 16 and 8 pixels wide; the coarsest and the middle of the UNet look at the caption."""
    return UNet2DConditionModel(
        sample_size=SIDE, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"), cross_attention_dim=text_width,
        attention_head_dim=4, norm_num_groups=8)


def build_scheduler() -> DDIMScheduler:
    """A noise schedule with nothing of the image left at its end, sampled from that end."""
    return DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
                         rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False, steps_offset=1)


def build_transformer(text_width: int, pooled_width: int) -> SD3Transformer2DModel:
    """Six layers, 64 wide, on 8 x 8 patches of four pixels: patches of two would take three times as long."""
    return SD3Transformer2DModel(
        sample_size=SIDE, patch_size=PATCH, in_channels=3, out_channels=3, num_layers=6, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=text_width, caption_projection_dim=64, pooled_projection_dim=pooled_width,
        pos_embed_max_size=SIDE // PATCH)


def build_noise_pipeline() -> StableDiffusionPipeline:
    """With a UNet that has learnt nothing yet."""
    text_encoder = CLIPTextModel.from_pretrained(CHALLENGE_SET / "shapes_clip").eval().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(CHALLENGE_SET / "shapes_clip")
    autoencoder = build_autoencoder()
    unet = build_unet(text_encoder.config.hidden_size)
    return StableDiffusionPipeline(
        vae=autoencoder, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=build_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def build_flow_pipeline() -> StableDiffusion3Pipeline:
    """With a transformer that has learnt nothing yet, and no T5."""
    width = CLIPConfig.from_pretrained(CHALLENGE_SET / "shapes_clip").projection_dim
    assert width  # of the bundled model
    tower = CLIPTextModelWithProjection.from_pretrained(CHALLENGE_SET / "shapes_clip", projection_dim=width)
    tower.eval().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(CHALLENGE_SET / "shapes_clip")
    return StableDiffusion3Pipeline(
        transformer=build_transformer(2 * tower.config.hidden_size, 2 * width), scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=build_autoencoder(), text_encoder=tower, tokenizer=tokenizer, text_encoder_2=tower, tokenizer_2=tokenizer,
        text_encoder_3=None, tokenizer_3=None)


@torch.no_grad()
def encode_captions(pipeline: StableDiffusionPipeline | StableDiffusion3Pipeline, captions: list[str]) -> torch.Tensor:
    """What the pipeline's denoiser hears, (n, tokens, width), padded to the full length; with a pooled embedding, that last."""
    if isinstance(pipeline, StableDiffusionPipeline):
        tokens = pipeline.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return pipeline.text_encoder(tokens.input_ids).last_hidden_state
    states, _, pooled, _ = pipeline.encode_prompt(captions, None, None, do_classifier_free_guidance=False,
                                                  max_sequence_length=T5_TOKENS)
    last = torch.nn.functional.pad(pooled, (0, states.shape[-1] - pooled.shape[-1]))
    return torch.cat([states, last[:, None]], dim=1)


# What a denoiser says of noised latents, and what it should say: (clean, noise, hear) -> (said, wanted). `hear` gives the
# captions' states, some of them dropped; it is asked after the times are drawn.
Objective = Callable[[torch.Tensor, torch.Tensor, Callable[[], torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]


def noise_objective(unet: UNet2DConditionModel, scheduler: DDIMScheduler) -> Objective:
    """The velocity at a random time of the noise schedule."""
    def ask(clean: torch.Tensor, noise: torch.Tensor, hear: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        times = torch.randint(scheduler.config.num_train_timesteps, (len(clean),))
        said = unet(scheduler.add_noise(clean, noise, times), times, hear()).sample
        return said, scheduler.get_velocity(clean, noise, times)
    return ask


def flow_objective(transformer: SD3Transformer2DModel, pooled_width: int) -> Objective:
    """The velocity of flow matching, noise - clean, at a logit-normal sigma (Esser et al. 2024).

    States hold the pooled embedding as their last token.
    """
    def ask(clean: torch.Tensor, noise: torch.Tensor, hear: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        sigmas = torch.randn(len(clean)).sigmoid()
        share = sigmas.view(-1, 1, 1, 1)
        heard = hear()
        said = transformer(hidden_states=(1 - share) * clean + share * noise, timestep=1000 * sigmas,
                           encoder_hidden_states=heard[:, :-1], pooled_projections=heard[:, -1, :pooled_width]).sample
        return said, noise - clean
    return ask


def drop_captions(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The states of some drawings' captions, a share of them the empty caption's."""
    return states[torch.where(torch.rand(len(rows)) < CAPTION_DROPOUT, 0, rows)]


def train_denoiser(denoiser: torch.nn.Module, ask: Objective, latents: torch.Tensor, states: torch.Tensor, rows: torch.Tensor,
                   steps: int) -> Iterator[EMAModel]:
    """Teach the denoiser; drawing i has caption `states[rows[i]]`, `states[0]` is the empty one.

    Yields the running average of the weights, which paints better than the last ones, now and then and at the end.
    """
    optimiser = torch.optim.AdamW(denoiser.parameters(), lr=1.5e-3, weight_decay=1e-3)
    schedule = cosine_schedule(optimiser, steps)
    average = EMAModel(denoiser.parameters(), decay=0.999, use_ema_warmup=True)
    started = time.monotonic()
    recent = []
    for step in range(steps):
        chosen = torch.randint(len(latents), (BATCH,))
        clean = latents[chosen]
        noise = torch.randn(BATCH, *latents.shape[1:])
        said, wanted = ask(clean, noise, functools.partial(drop_captions, states, rows[chosen]))
        loss = torch.nn.functional.mse_loss(said, wanted)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        average.step(denoiser.parameters())
        recent.append(loss.item())
        if step % 100 == 99:
            print(f"step {step + 1}  loss {np.mean(recent[-100:]):.4f}  {time.monotonic() - started:.0f} s", flush=True)
        if step % 300 == 299 or step == steps - 1:
            yield average


def train(out: pathlib.Path, kind: str, seed: int, drawings: int, steps: int) -> None:
    """Make the whole pipeline from `seed` and write it to `out`, `trained.json` last; `kind` is noise or flow."""
    torch.manual_seed(seed)
    transformers.utils.logging.set_verbosity_error()  # else it lists the vision tower, which is not asked for here
    transformers.utils.logging.disable_progress_bar()
    pixels, captions = training_drawings(drawings, seed)
    pipeline = build_noise_pipeline() if kind == "noise" else build_flow_pipeline()
    distinct = ["", *sorted(set(captions))]
    states = encode_captions(pipeline, distinct)
    rows = torch.tensor([distinct.index(text) for text in captions])
    if kind == "noise":
        denoiser = pipeline.unet
        ask = noise_objective(denoiser, pipeline.scheduler)
    else:
        denoiser = pipeline.transformer
        ask = flow_objective(denoiser, denoiser.config.pooled_projection_dim)
    count = sum(weight.numel() for weight in denoiser.parameters())
    print(f"{type(denoiser).__name__} of {count:,} parameters, {len(distinct) - 1} captions", flush=True)
    for average in train_denoiser(denoiser, ask, encode(pipeline.vae, pixels), states, rows, steps):
        average.store(denoiser.parameters())
        average.copy_to(denoiser.parameters())
        pipeline.save_pretrained(out)
        average.restore(denoiser.parameters())
    settings = {"kind": kind, "seed": seed, "drawings": drawings, "steps": steps}
    (out / "trained.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", choices=("noise", "flow"), default="noise")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("scores/training/pipeline"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drawings", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    train(options.out, options.kind, options.seed, options.drawings, options.steps)
