"""Train a text-to-image pipeline so small that a CPU makes it: drawings of one large shape, 32 pixels wide.

    python examples/train_shapes_pipeline.py --out scores/training/pipeline      # about fifteen minutes on one core

It writes a StableDiffusionPipeline folder like any other, of four parts: the text tower of the bundled `shapes_clip`, as
it is; an AutoencoderTiny that passes pixels through; a UNet2DConditionModel of a million parameters, the only part that is
trained; a DDIM scheduler. It sees scenes of one large shape only (a small one is six pixels wide here), and never one whose
caption is among those of the bundled drawings, so that these can be asked for as something new.

The UNet predicts velocity (Salimans and Ho 2022) on a noise schedule that ends in pure noise (Lin et al. 2024): else
the brightness of the background would leak through the last step of noise, and sampling could not choose it.
"""
import argparse
import math
import pathlib
import random
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch
import transformers
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from transformers import CLIPTextModel, CLIPTokenizer

CHALLENGE_SET = pathlib.Path(__file__).resolve().parent.parent / "challenge_set"
sys.path.insert(0, str(CHALLENGE_SET))
from draw_shapes import Scene, caption, draw, held_out_scenes, random_scene  # noqa: E402 - lies in the folder named just above

SIDE, BATCH = 32, 16
MIDDLE, SPREAD, SHRINK = 0.5, 0.37, 0.05  # mean and deviation of the drawings' colours in [0, 1], and a small scale
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
    rng, forbidden = random.Random(seed), {caption(scene) for scene in held_out_scenes()}
    pixels, captions = np.empty((count, SIDE, SIDE, 3), np.uint8), []
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


@torch.no_grad()
def encode_captions(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Hidden states (n, tokens, width) as StableDiffusionPipeline makes them: padded to the full length."""
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return text_encoder(tokens.input_ids).last_hidden_state


def train_unet(unet: UNet2DConditionModel, scheduler: DDIMScheduler, latents: torch.Tensor, states: torch.Tensor,
               rows: torch.Tensor, steps: int) -> Iterator[EMAModel]:
    """Teach `unet` the velocity of noised `latents`; drawing i has caption `states[rows[i]]`, `states[0]` is the empty one.

    Yields the running average of the weights, which paints better than the last ones, now and then and at the end.
    """
    optimiser = torch.optim.AdamW(unet.parameters(), lr=1.5e-3, weight_decay=1e-3)
    schedule, average = cosine_schedule(optimiser, steps), EMAModel(unet.parameters(), decay=0.999, use_ema_warmup=True)
    started, recent = time.monotonic(), []
    for step in range(steps):
        chosen = torch.randint(len(latents), (BATCH,))
        clean, noise = latents[chosen], torch.randn(BATCH, *latents.shape[1:])
        times = torch.randint(scheduler.config.num_train_timesteps, (BATCH,))
        heard = states[torch.where(torch.rand(BATCH) < CAPTION_DROPOUT, 0, rows[chosen])]
        guess = unet(scheduler.add_noise(clean, noise, times), times, heard).sample
        loss = torch.nn.functional.mse_loss(guess, scheduler.get_velocity(clean, noise, times))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        average.step(unet.parameters())
        recent.append(loss.item())
        if step % 100 == 99:
            print(f"unet step {step + 1}  loss {np.mean(recent[-100:]):.4f}  {time.monotonic() - started:.0f} s", flush=True)
        if step % 300 == 299 or step == steps - 1:
            yield average


def train(out: pathlib.Path, seed: int, drawings: int, steps: int) -> None:
    """Make the whole pipeline from `seed` and write it to `out`."""
    torch.manual_seed(seed)
    transformers.utils.logging.set_verbosity_error()  # else it lists the vision tower, which is not asked for here
    transformers.utils.logging.disable_progress_bar()
    pixels, captions = training_drawings(drawings, seed)
    text_encoder = CLIPTextModel.from_pretrained(CHALLENGE_SET / "shapes_clip").eval().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(CHALLENGE_SET / "shapes_clip")
    distinct = ["", *sorted(set(captions))]
    states = encode_captions(text_encoder, tokenizer, distinct)
    rows = torch.tensor([distinct.index(text) for text in captions])
    autoencoder, unet, scheduler = build_autoencoder(), build_unet(text_encoder.config.hidden_size), build_scheduler()
    pipeline = StableDiffusionPipeline(
        vae=autoencoder, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    print(f"unet of {sum(p.numel() for p in unet.parameters()):,} parameters, {len(distinct) - 1} captions", flush=True)
    for average in train_unet(unet, scheduler, encode(autoencoder, pixels), states, rows, steps):
        average.store(unet.parameters())
        average.copy_to(unet.parameters())
        pipeline.save_pretrained(out)
        average.restore(unet.parameters())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("scores/training/pipeline"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drawings", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    train(options.out, options.seed, options.drawings, options.steps)
