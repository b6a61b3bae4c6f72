"""Fine-tune a text-to-image pipeline with dissimilarity as the error.

    python examples/finetune_text_to_image.py --model runwayml/stable-diffusion-v1-5 --prompts prompts.csv \\
        --teacher config.yaml --judge judge.yaml --output tuned

    prompts -> pipeline (the last K denoising steps with gradient) -> pictures -> DissimilarityLoss of the teacher
                  ^                                                                     |
                  +------------------- only LoRA weights learn ------------------------+

The gradient of 1 - cosine(picture, prompt) runs through the model that scores, the decoder and the last K denoising
steps (DRaFT-K: Clark et al. 2024; AlignProp: Prabhudesai et al. 2023). A pipeline can learn to please its teacher with
pixels that mean nothing to anybody else. So a second scorer, the judge, is asked about held-out prompts and never
trains: where the teacher's number falls and the judge's does not, the pipeline is cheating. `--stay-near`, `--crop`
and `--noise` make that harder, and so does stopping early.

With --images FOLDER in place of --prompts it trains on a curated `imagefolder` (metadata.jsonl with file_name, text,
dissimilarity), by the usual loss of diffusion models, in which pairs of low dissimilarity count more.

In --output: `log.jsonl` (both scores), `before.png` and `after.png` (same prompts, same noise), `held_out.csv` (both
scores of every such picture), `pytorch_lora_weights.safetensors` for `pipeline.load_lora_weights`, and `state.pt`,
from which the same command goes on. The last line on stdout is one JSON object.
"""
import argparse
import contextlib
import csv
import dataclasses
import json
import math
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from image_text_sim_clip import (  # noqa: E402 - the script lies in the folder named just above
    EXIT_CONFIG,
    EXIT_FAILURES,
    EXIT_INPUT,
    EXIT_MODEL,
    Config,
    RowFailure,
    Scorer,
    Trouble,
    atomic_file,
    decode_image,
    load_config,
    output_disk,
    say,
)

try:
    import accelerate
    import diffusers
    import peft
    import torch
    from diffusers.training_utils import cast_training_params
    from diffusers.utils import convert_state_dict_to_diffusers
    from PIL import Image

    from addons.loss import DissimilarityLoss
except ImportError as missing:
    say(f"error: this example needs the package {missing.name} (pip install -r requirements.txt -r examples/requirements.txt)")
    sys.exit(EXIT_CONFIG)

PREDICTIONS = ("epsilon", "v_prediction", "sample")  # what a UNet may say: the noise, the velocity, or the image itself
# what may differ between a run and its resumption
HARMLESS_OPTIONS = {"steps", "output", "evaluate_every", "save_every", "fresh", "gradient_checkpointing"}


# ── What to train on ──────────────────────────────────────────────────────────────────────────────────────────────────

def read_prompts(path: pathlib.Path, column: str) -> list[str]:
    """The distinct, non-empty captions of a CSV's `column`, in order; raises Trouble (exit 3)."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if column not in (rows.fieldnames or []):
                raise Trouble(EXIT_INPUT, f"{path} has no column {column!r}; its columns: {', '.join(rows.fieldnames or [])}")
            prompts = list(dict.fromkeys(row[column].strip() for row in rows if (row[column] or "").strip()))
    except (OSError, UnicodeError, csv.Error) as error:
        raise Trouble(EXIT_INPUT, f"cannot read prompts from {path}: {error}") from None
    if not prompts:
        raise Trouble(EXIT_INPUT, f"{path} holds no prompt in its column {column!r}")
    return prompts


def split_prompts(prompts: list[str], held_out: list[str]) -> tuple[list[str], list[str]]:
    """Prompts to train with and prompts only watched: `held_out`, or a tenth (at most 64), evenly out of `prompts`."""
    if not held_out:
        held_out = prompts[::max(10, math.ceil(len(prompts) / 64))]
    training = [prompt for prompt in prompts if prompt not in set(held_out)]
    if not training:
        raise Trouble(EXIT_INPUT, "no prompt is left to train with: all are held out")
    return training, held_out


@dataclasses.dataclass(frozen=True)
class Pair:
    """One row of a curated set: its file, caption, and how much it counts (1 on average)."""

    path: pathlib.Path
    caption: str
    weight: float


def read_imagefolder(folder: pathlib.Path, temperature: float) -> list[Pair]:
    """The rows of `folder`/train/metadata.jsonl (as curate.py writes it), or of `folder`/metadata.jsonl.

    Weights are exp(-dissimilarity / temperature), divided by their mean; an infinite temperature makes all count alike.
    """
    table = folder / "train/metadata.jsonl"
    table = table if table.is_file() else folder / "metadata.jsonl"
    try:
        rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
        known = [(table.parent / row["file_name"], row["text"], float(row["dissimilarity"])) for row in rows]
    except OSError as error:
        raise Trouble(EXIT_INPUT, f"cannot read {table}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise Trouble(EXIT_INPUT, f"{table}: every line must be an object with file_name, text and dissimilarity "
                                  f"({type(error).__name__}: {error})") from None
    if not known:
        raise Trouble(EXIT_INPUT, f"{table} is empty")
    lowest = min(row[2] for row in known)
    weights = [math.exp((lowest - dissimilarity) / temperature) for *_, dissimilarity in known]
    mean = sum(weights) / len(weights)
    return [Pair(path, text, w / mean) for (path, text, _), w in zip(known, weights, strict=True)]


def read_picture(path: pathlib.Path, side: int, config: Config) -> torch.Tensor:
    """(3, side, side) in [-1, 1]: the centre square of the image, resized. Raises Trouble (exit 3) naming the file.

    It is decoded as `config`, the scorer's, says (EXIF orientation, colour under transparency, AVIF): what is trained on is
    what was scored.
    """
    import numpy as np
    try:
        picture = decode_image(path.read_bytes(), config)
    except (OSError, RowFailure) as error:
        raise Trouble(EXIT_INPUT, f"cannot read the picture {path}: {error}") from None
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    square = picture.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + edge, top + edge))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1


# ── The pipeline, as something to differentiate ───────────────────────────────────────────────────────────────────────

def load_pipeline(name: str, revision: str, dtype: torch.dtype) -> Any:
    """A frozen StableDiffusionPipeline from a folder or the Hub, with a DDIM scheduler; raises Trouble (exit 6)."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(name, revision=revision, dtype=dtype, safety_checker=None,
                                                               requires_safety_checker=False, use_safetensors=True)
    except Exception as error:  # a broken folder makes diffusers raise nearly anything
        raise Trouble(EXIT_MODEL, f"cannot load the pipeline {name}: {type(error).__name__}: {str(error)[:300]}") from error
    if not isinstance(pipeline, diffusers.StableDiffusionPipeline):
        raise Trouble(EXIT_MODEL, f"{name} is a {type(pipeline).__name__}; this example trains a StableDiffusionPipeline")
    prediction = pipeline.scheduler.config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise Trouble(EXIT_MODEL, f"{name}: its scheduler has the prediction_type {prediction!r}; this example knows "
                                  f"{', '.join(PREDICTIONS)}")
    # deterministic, so that a picture hangs on its noise alone, and differentiable in every step
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.requires_grad_(False)
    return pipeline


class Painter:
    """A pipeline with LoRA weights: prompts and noise in, pictures out, with a gradient through the last steps."""

    def __init__(self, pipeline: Any, options: argparse.Namespace, device: torch.device) -> None:
        self.pipeline, self.options, self.device = pipeline.to(device), options, device
        torch.manual_seed(options.seed)  # of the LoRA weights' start
        pipeline.unet.add_adapter(peft.LoraConfig(r=options.lora_rank, lora_alpha=options.lora_rank,
                                                  init_lora_weights="gaussian", target_modules=options.lora_targets))
        cast_training_params(pipeline.unet, torch.float32)
        if options.gradient_checkpointing:
            pipeline.unet.enable_gradient_checkpointing()
        pipeline.unet.train()  # or its checkpointing would stay off

    def lora(self) -> dict[str, torch.nn.Parameter]:
        """The weights that learn, by name; no others ever change."""
        return {name: p for name, p in self.pipeline.unet.named_parameters() if "lora_" in name}

    def side(self) -> int:
        """Width and height of a picture in pixels."""
        return self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor

    def noise(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """(count, C, h, w) float32: where pictures start. Drawn on the CPU, so that a seed means the same everywhere."""
        config = self.pipeline.unet.config
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        return torch.randn(shape, generator=generator).to(self.device)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> torch.Tensor:
        """Text states for one call of the UNet: (n, tokens, d), or (2n, tokens, d) with the empty prompt first if guided."""
        guided = self.options.guidance != 1
        states, empty = self.pipeline.encode_prompt(prompts, self.device, 1, guided)
        return torch.cat([empty, states]) if guided else states

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """What the UNet makes of float32 latents (n, C, h, w), guided by `--guidance`, in float32."""
        copies = len(states) // len(latents)
        inputs = torch.cat([latents] * copies).to(states.dtype)
        out = self.pipeline.unet(inputs, timestep, encoder_hidden_states=states).sample.float()
        if copies == 1:
            return out
        empty, heard = out.chunk(2)
        return empty + self.options.guidance * (heard - empty)

    def paint(self, prompts: list[str], noise: torch.Tensor, gradient_steps: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures (n, 3, H, W) float32 in [0, 1], and how far the last steps strayed from the base model's (a scalar).

        Only the last `gradient_steps` denoising steps are remembered for the gradient. The distance is the mean squared
        difference to what the UNet says without its LoRA weights, and 0 where `--stay-near` does not ask for it.
        """
        scheduler, states, latents = self.pipeline.scheduler, self.encode_prompts(prompts), noise
        scheduler.set_timesteps(self.options.denoising_steps, device=self.device)
        strayed = torch.zeros((), device=self.device)
        for number, timestep in enumerate(scheduler.timesteps):
            remembered = number >= self.options.denoising_steps - gradient_steps
            with torch.set_grad_enabled(remembered):
                out = self.predict(latents, timestep, states)
                if remembered and self.options.stay_near:
                    with torch.no_grad(), self.without_lora():
                        base = self.predict(latents, timestep, states)
                    strayed = strayed + (out - base).square().mean() / gradient_steps
                latents = scheduler.step(out, timestep, latents).prev_sample
        with torch.set_grad_enabled(gradient_steps > 0):
            vae = self.pipeline.vae
            decoded = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample.float()
            return (decoded / 2 + 0.5).clamp(0, 1), strayed

    @contextlib.contextmanager
    def without_lora(self) -> Iterator[None]:
        """The base model, while it lasts."""
        self.pipeline.unet.disable_adapters()
        try:
            yield
        finally:
            self.pipeline.unet.enable_adapters()

    def imitation_errors(self, pictures: torch.Tensor, captions: list[str], generator: torch.Generator) -> torch.Tensor:
        """(n,): the usual loss of a diffusion model for pictures (n, 3, H, W) in [-1, 1], at one random time each."""
        vae, scheduler = self.pipeline.vae, self.pipeline.scheduler
        with torch.no_grad():
            encoded = vae.encode(pictures.to(self.device, vae.dtype))
            # AutoencoderKL gives a distribution, AutoencoderTiny the latents themselves
            latents = (encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents).float()
            latents = latents * vae.config.scaling_factor
            states, _ = self.pipeline.encode_prompt(captions, self.device, 1, False)
        noise = torch.randn(latents.shape, generator=generator).to(self.device)
        times = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), generator=generator).to(self.device)
        if scheduler.config.prediction_type == "v_prediction":
            wanted = scheduler.get_velocity(latents, noise, times)
        else:
            wanted = {"epsilon": noise, "sample": latents}[scheduler.config.prediction_type]
        out = self.predict(scheduler.add_noise(latents, noise, times), times, states)
        return (out - wanted).square().mean(dim=(1, 2, 3))


def vary(images: torch.Tensor, crop: float, noise: float, generator: torch.Generator) -> torch.Tensor:
    """Each picture (n, 3, H, W) cut to a random window, of `crop` to 1 of its side, and stretched back; then grain is added.

    What pleases the teacher at one exact place in the pixels is lost by this, what is drawn is not.
    """
    count = len(images)
    scale = 1 - (1 - crop) * torch.rand(count, 1, generator=generator)
    centre = (2 * torch.rand(count, 2, generator=generator) - 1) * (1 - scale)
    window = torch.zeros(count, 2, 3)
    window[:, 0, 0] = window[:, 1, 1] = scale[:, 0]
    window[:, :, 2] = centre
    places = torch.nn.functional.affine_grid(window.to(images), list(images.shape), align_corners=False)
    cut = torch.nn.functional.grid_sample(images, places, padding_mode="border", align_corners=False)
    return (cut + noise * torch.randn(images.shape, generator=generator).to(images)).clamp(0, 1)


# ── Watching ──────────────────────────────────────────────────────────────────────────────────────────────────────────

class Watch:
    """Paints the held-out prompts, always from the same noise, and has the scorers score that as they would saved files."""

    def __init__(self, painter: Painter, teacher: Scorer, judge: Scorer | None, prompts: list[str],
                 options: argparse.Namespace) -> None:
        self.painter, self.prompts, self.options = painter, prompts * options.pictures, options
        self.scorers = {"teacher": teacher} | ({"judge": judge} if judge else {})

    def look(self) -> tuple[list[Any], dict[str, list[float]]]:
        """The pictures as 8-bit RGB, and each scorer's dissimilarity for each."""
        noise = self.painter.noise(len(self.prompts), torch.Generator().manual_seed(self.options.seed))
        pictures: list[Any] = []
        for start in range(0, len(self.prompts), self.options.batch):
            part = slice(start, start + self.options.batch)
            images, _ = self.painter.paint(self.prompts[part], noise[part])
            levels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            pictures += [Image.fromarray(one) for one in levels]
        return pictures, {name: [round(1 - float(cosine), 6) for cosine in scorer.similarity(pictures, self.prompts)]
                          for name, scorer in self.scorers.items()}


def make_grid(pictures: list[Any], columns: int = 8, most: int = 32) -> Any:
    """Up to `most` pictures of one size in rows, a white line of two pixels between them."""
    shown = pictures[:most]
    width, height = shown[0].width + 2, shown[0].height + 2
    grid = Image.new("RGB", (min(columns, len(shown)) * width - 2, math.ceil(len(shown) / columns) * height - 2), "white")
    for i, picture in enumerate(shown):
        grid.paste(picture, (i % columns * width, i // columns * height))
    return grid


class Journal:
    """log.jsonl: one object a line, either of a step or of a look at the held-out prompts."""

    def __init__(self, path: pathlib.Path, up_to: int) -> None:
        self.path, self.rows = path, []
        if path.exists():  # what was logged after the saved step will happen again
            lines = path.read_text(encoding="utf-8").splitlines()
            self.rows = [row for row in map(json.loads, lines) if row["step"] <= up_to]
        with output_disk(path):
            path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append one row."""
        self.rows.append(row)
        with output_disk(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def looks(self) -> list[dict[str, Any]]:
        """The rows that hold a look at the held-out prompts, oldest first."""
        return [row for row in self.rows if "teacher" in row]


# ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────────

class Trainer:
    """Everything that one run needs, put together from the options; `run` trains and returns the summary."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.output
        self.pairs = read_imagefolder(options.images, options.temperature) if options.images else []
        prompts = read_prompts(options.prompts, options.column) if options.prompts else \
            list(dict.fromkeys(pair.caption for pair in self.pairs))
        held_out = read_prompts(options.held_out, options.column) if options.held_out else []
        self.prompts, self.held_out = split_prompts(prompts, held_out)
        self.pairs = [pair for pair in self.pairs if pair.caption in set(self.prompts)]
        self.accelerator = accelerate.Accelerator(mixed_precision=options.mixed_precision, cpu=options.cpu)
        dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[options.mixed_precision]
        device = self.accelerator.device
        self.loss = DissimilarityLoss(_on_device(load_config(options.teacher), device)).to(device)
        judge = Scorer(_on_device(load_config(options.judge), device)) if options.judge else None
        if judge and judge.files.identity == self.loss.scorer.files.identity:
            raise Trouble(EXIT_CONFIG, "the judge has the teacher's weights: it would only repeat what the teacher says")
        self.painter = Painter(load_pipeline(options.model, options.revision, dtype), options, device)
        self.optimiser = self.accelerator.prepare(torch.optim.AdamW(
            self.painter.lora().values(), lr=options.learning_rate, weight_decay=options.weight_decay))
        self.watch = Watch(self.painter, self.loss.scorer, judge, self.held_out, options)

    def run(self) -> dict[str, Any]:
        """Train up to `--steps`, from the saved state if there is one; returns the summary."""
        begun = self.load()
        main = self.accelerator.is_main_process
        journal = Journal(self.out / "log.jsonl", begun) if main else None
        for step in range(begun, self.options.steps + 1):
            if journal and (step % self.options.evaluate_every == 0 or step == self.options.steps):
                self.evaluate(journal, step)
            if main and step > begun and (step % self.options.save_every == 0 or step == self.options.steps):
                self.save(step)
            if step < self.options.steps:
                row = self.advance(step)
                if journal:
                    journal.write({"step": step + 1, **row})
        self.accelerator.wait_for_everyone()
        return self.summarise(journal) if journal else {}

    def advance(self, step: int) -> dict[str, float]:
        """One step of the optimiser. Its prompts and noise hang on seed, step and process alone: no state to save for them."""
        place = (self.options.seed * 1_000_003 + step) * self.accelerator.num_processes + self.accelerator.process_index
        generator = torch.Generator().manual_seed(place)
        with self.accelerator.autocast():
            values = self.imitate(generator) if self.pairs else self.please_teacher(generator)
        if not torch.isfinite(values["loss"]):
            raise Trouble(EXIT_FAILURES, f"the loss is not finite at step {step}; try a lower --learning-rate")
        self.optimiser.zero_grad()
        self.accelerator.backward(values["loss"])
        weights = list(self.painter.lora().values())
        for weight in weights:  # so few that averaging them by hand is cheaper than wrapping the UNet
            weight.grad = self.accelerator.reduce(weight.grad, "mean")
        self.accelerator.clip_grad_norm_(weights, 1.0)
        self.optimiser.step()
        return {name: round(value.item(), 6) for name, value in values.items()}

    def please_teacher(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Paint a batch of prompts; the loss is the teacher's dissimilarity, plus what `--stay-near` adds."""
        chosen = torch.randint(len(self.prompts), (self.options.batch,), generator=generator)
        prompts = [self.prompts[i] for i in chosen]
        noise = self.painter.noise(len(prompts), generator)
        images, strayed = self.painter.paint(prompts, noise, self.options.gradient_steps)
        dissimilarity = self.loss(vary(images, self.options.crop, self.options.noise, generator), prompts)
        return {"loss": dissimilarity + self.options.stay_near * strayed, "dissimilarity": dissimilarity, "strayed": strayed}

    def imitate(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Learn a batch of curated pictures, each counted by its weight."""
        chosen = torch.randint(len(self.pairs), (self.options.batch,), generator=generator)
        pairs = [self.pairs[i] for i in chosen]
        config = self.loss.scorer.config
        pictures = torch.stack([read_picture(pair.path, self.painter.side(), config) for pair in pairs])
        errors = self.painter.imitation_errors(pictures, [pair.caption for pair in pairs], generator)
        weights = torch.tensor([pair.weight for pair in pairs], device=errors.device)
        return {"loss": (weights * errors).mean(), "unweighted": errors.mean()}

    def evaluate(self, journal: Journal, step: int) -> None:
        """Log both scores of the held-out prompts, and keep the first and the latest pictures."""
        if any(row["step"] == step for row in journal.looks()):
            return  # of an earlier start
        pictures, scores = self.watch.look()
        journal.write({"step": step, **scores})
        say(f"step {step}: held-out dissimilarity " + ", ".join(f"{name} {_mean(v):.4f}" for name, v in scores.items()))
        with output_disk(self.out):
            make_grid(pictures).save(self.out / ("before.png" if step == 0 else "after.png"))

    def save(self, step: int) -> None:
        """Write the LoRA weights for diffusers, then `state.pt`, whose presence means that the step is complete."""
        layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(self.painter.pipeline.unet))
        with output_disk(self.out), atomic_file(self.out / "state.pt") as file:
            diffusers.StableDiffusionPipeline.save_lora_weights(self.out, unet_lora_layers=layers)
            torch.save({"step": step, "lora": {name: p.data for name, p in self.painter.lora().items()},
                        "optimiser": self.optimiser.state_dict()}, file)

    def load(self) -> int:
        """Take up the state of an earlier start with the same options and return its step; 0 where there is none."""
        options = {k: str(v) for k, v in vars(self.options).items() if k not in HARMLESS_OPTIONS}
        known, state_path = self.out / "options.json", self.out / "state.pt"
        if state_path.exists() and not self.options.fresh:
            earlier = json.loads(known.read_text(encoding="utf-8"))
            for name, value in options.items():
                if earlier.get(name) != value:
                    raise Trouble(EXIT_CONFIG, f"{self.out} was begun with another {name} ({earlier.get(name)}, now {value}): "
                                               "discard it with --fresh, or write elsewhere with --output")
            state = torch.load(state_path, map_location=self.accelerator.device, weights_only=True)
            if state["step"] > self.options.steps:
                raise Trouble(EXIT_CONFIG, f"{self.out} holds {state['step']} steps already, more than --steps "
                                           f"{self.options.steps}: discard them with --fresh, or write elsewhere with --output")
            for name, weight in self.painter.lora().items():
                weight.data.copy_(state["lora"][name])
            self.optimiser.load_state_dict(state["optimiser"])
            return state["step"]
        self.accelerator.wait_for_everyone()  # all have looked before anything is removed
        if self.accelerator.is_main_process:
            with output_disk(self.out):
                self.out.mkdir(parents=True, exist_ok=True)
                for name in ("state.pt", "log.jsonl"):
                    (self.out / name).unlink(missing_ok=True)
                known.write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
        return 0

    def summarise(self, journal: Journal) -> dict[str, Any]:
        """Write held_out.csv and return the means before and after."""
        before, after = journal.looks()[0], journal.looks()[-1]
        names = list(self.watch.scorers)
        with output_disk(self.out), open(self.out / "held_out.csv", "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["prompt", *(f"{name}_{when}" for name in names for when in ("before", "after"))])
            for i, prompt in enumerate(self.watch.prompts):
                table.writerow([prompt, *(row[name][i] for name in names for row in (before, after))])
        scores = {name: {"before": round(_mean(before[name]), 4), "after": round(_mean(after[name]), 4)} for name in names}
        return {"steps": self.options.steps, "prompts": len(self.prompts), "held_out": len(self.held_out), **scores,
                "output": str(self.out)}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _on_device(config: Config, device: torch.device) -> Config:
    return dataclasses.replace(config, use_cuda=device.type == "cuda")


# ── Command line ──────────────────────────────────────────────────────────────────────────────────────────────────────

RANGES = {"steps": (1, 10**9), "batch": (1, 10**6), "pictures": (1, 10**6), "denoising_steps": (1, 1000),
          "lora_rank": (1, 4096), "guidance": (1, 100), "stay_near": (0, math.inf), "crop": (0.1, 1), "noise": (0, 1),
          "temperature": (1e-6, math.inf), "evaluate_every": (1, 10**9), "save_every": (1, 10**9)}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; what is out of range is Trouble (exit 2)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, path = parser.add_argument, pathlib.Path
    add("--model", required=True, help="a StableDiffusionPipeline: a folder, or a Hub id")
    add("--revision", default="main", help="of the Hub's model")
    add("--prompts", type=path, help="a CSV of prompts to train with")
    add("--images", type=path, help="or: a curated imagefolder to train on")
    add("--temperature", type=float, default=0.1, help="with --images: weights are exp(-dissimilarity / this); inf: none")
    add("--column", default="caption", help="of the prompts' CSV")
    add("--held-out", type=path, help="a CSV of prompts that are only watched; without it a tenth of the prompts")
    add("--pictures", type=int, default=1, help="painted of each held-out prompt")
    add("--teacher", type=path, required=True, help="a config.yaml: the scorer that trains")
    add("--judge", type=path, help="a config.yaml with another model: the scorer that only watches")
    add("--output", type=path, default=path("tuned"))
    add("--fresh", action="store_true", help="discard an earlier run in --output")
    add("--steps", type=int, default=200)
    add("--batch", type=int, default=4, help="pictures of one step, for each process")
    add("--learning-rate", type=float, default=1e-4)
    add("--weight-decay", type=float, default=1e-4)
    add("--denoising-steps", type=int, default=20)
    add("--gradient-steps", type=int, default=1, help="K: through how many of them the gradient runs")
    add("--guidance", type=float, default=7.5, help="classifier-free guidance; 1: none")
    add("--stay-near", type=float, default=0.0, help="weight of the distance to the base model")
    add("--crop", type=float, default=0.9, help="the teacher sees random windows of this to all of a picture's side")
    add("--noise", type=float, default=0.02, help="and grain of this strength")
    add("--lora-rank", type=int, default=8)
    add("--lora-targets", nargs="+", default=["to_q", "to_k", "to_v", "to_out.0"], help="layers of the UNet that get them")
    add("--mixed-precision", choices=("no", "fp16", "bf16"), default="no")
    add("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    add("--cpu", action="store_true", help="also where there is a GPU")
    add("--evaluate-every", type=int, default=50)
    add("--save-every", type=int, default=50)
    add("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if bool(options.prompts) == bool(options.images):
        raise Trouble(EXIT_CONFIG, "give either --prompts or --images")
    for name, (low, high) in (RANGES | {"gradient_steps": (1, options.denoising_steps)}).items():
        if not low <= getattr(options, name) <= high:
            raise Trouble(EXIT_CONFIG, f"--{name.replace('_', '-')} must lie in [{low}, {high}], got {getattr(options, name)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Train as the arguments say; the summary is printed by the first process."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    summary = Trainer(parse_arguments(arguments)).run()
    if summary:
        print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Trouble as trouble:
        say(f"error: {trouble}")
        sys.exit(trouble.exit_code)
