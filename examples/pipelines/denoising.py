"""What families share: models that predict noise, sampled by DDIM, and flow matching, sampled by Euler's method."""
import abc
import contextlib
import math
import pathlib
from collections.abc import Iterator
from typing import ClassVar

import diffusers
import peft
import torch
from diffusers.utils import convert_state_dict_to_diffusers

from examples.pipelines import Condition, Moment
from image_text_sim_clip import EXIT_MODEL, Trouble

PREDICTIONS = ("epsilon", "v_prediction", "sample")  # what a UNet may say: the noise, the velocity, or the image itself
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # the layers that diffusers' scripts give LoRA weights in a UNet
JOINT_ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
                   "attn.add_v_proj", "attn.to_add_out")  # and in a transformer, whose text has layers of its own


def upcast(values: torch.Tensor) -> torch.Tensor:
    """The values in float32, or as they are in float64."""
    return values if values.dtype == torch.float64 else values.float()


class Autoencoded:
    """A pipeline with an autoencoder, whose weights are frozen: from images to latents and back."""

    may_lack: ClassVar[tuple[str, ...]] = ()
    pipeline: diffusers.DiffusionPipeline

    @property
    def largest_side(self) -> int:
        """The models of most families have no bound of their own."""
        return 2**16

    def freeze(self) -> None:
        """No weight of the pipeline learns."""
        for part in self.pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False)
                part.eval()

    def _scale_and_shift(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled latents are the autoencoder's less a shift, times a scale: (scale, shift), in a shape that applies to them."""
        def as_latents(values: float | list[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=latents.dtype, device=latents.device).view(1, -1, 1, 1)
        config = self.pipeline.vae.config
        scale = as_latents(float(config.scaling_factor))
        shift = as_latents(float(config.get("shift_factor") or 0.0))
        if config.get("latents_mean") and config.get("latents_std"):  # of some autoencoders for SDXL
            scale = scale / as_latents(config.latents_std)
            shift = as_latents(config.latents_mean)
        return scale, shift

    @contextlib.contextmanager
    def _own_precision(self) -> Iterator[None]:
        """No autocast while an autoencoder in float32 works: some overflow in half precision."""
        vae = self.pipeline.vae
        if vae.dtype == torch.float32:
            with torch.autocast(vae.device.type, enabled=False):
                yield
        else:
            yield

    def encode_images(self, images: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Scaled latents of images in [-1, 1]: a sample made with standard normal `noise`, or the mode without."""
        vae = self.pipeline.vae
        with torch.no_grad(), self._own_precision():
            encoded = vae.encode(images.to(vae.device, vae.dtype))
            if not hasattr(encoded, "latent_dist"):  # AutoencoderTiny has none
                latents = encoded.latents
            elif noise is None:
                latents = encoded.latent_dist.mode()
            else:
                latents = encoded.latent_dist.mean + encoded.latent_dist.std * noise.to(encoded.latent_dist.mean)
        latents = upcast(latents)
        scale, shift = self._scale_and_shift(latents)
        return (latents - shift) * scale

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images in [0, 1] of scaled latents."""
        vae = self.pipeline.vae
        scale, shift = self._scale_and_shift(latents)
        with self._own_precision():
            decoded = vae.decode((latents / scale + shift).to(vae.dtype)).sample
        return (upcast(decoded) / 2 + 0.5).clamp(0, 1)


class NoisePredicting(Autoencoded):
    """Families with a UNet that predicts noise, velocity or image, and a DDIM scheduler."""

    predicts_velocity: ClassVar[bool] = False
    text_tokens: int | None = None
    lora_targets: ClassVar[tuple[str, ...]] = ATTENTION

    def __init__(self, pipeline: diffusers.DiffusionPipeline) -> None:
        self.pipeline = pipeline
        config = pipeline.scheduler.config
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS:
            raise Trouble(EXIT_MODEL, f"{pipeline.config._name_or_path}: its scheduler has the prediction_type {prediction!r}; "
                                      f"this example knows {', '.join(PREDICTIONS)}")
        if "EDM" in type(pipeline.scheduler).__name__:  # whose noise is not that of any DDIM scheduler
            raise Trouble(EXIT_MODEL, f"{pipeline.config._name_or_path}: its scheduler {type(pipeline.scheduler).__name__} is "
                                      "for models that were trained by EDM; this example does not train those")
        # deterministic, so that an image depends on its noise alone, and differentiable in every step
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(config, clip_sample=False)
        self.freeze()

    @property
    def denoiser(self) -> diffusers.ModelMixin:
        """The UNet."""
        return self.pipeline.unet

    @property
    def usual_side(self) -> int:
        """The side in pixels that it was made for."""
        return self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def side_multiple(self) -> int:
        """What `__call__` asks for, and what the UNet halves."""
        return math.lcm(8, self.pipeline.vae_scale_factor)

    def latent_shape(self, side: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents."""
        edge = side // self.pipeline.vae_scale_factor
        return self.pipeline.unet.config.in_channels, edge, edge

    def guides_by_two(self, guidance: float) -> bool:
        """Classifier-free guidance (Ho and Salimans 2022)."""
        return guidance > 1

    def ask_unet(self, latents: torch.Tensor, times: torch.Tensor, condition: Condition) -> torch.Tensor:
        """The UNet's answer to as many latents as prompts."""
        return self.pipeline.unet(latents, times, encoder_hidden_states=condition.states).sample

    def predict(self, latents: torch.Tensor, times: torch.Tensor, condition: Condition, guidance: float) -> torch.Tensor:
        """What the UNet makes of the latents, guided where the condition holds twice as many prompts."""
        copies = len(condition) // len(latents)
        inputs = torch.cat([latents] * copies).to(condition.states.dtype)
        told = times if times.ndim == 0 else torch.cat([times] * copies)
        return guide(upcast(self.ask_unet(inputs, told, condition)), copies, guidance)

    def moments(self, steps: int, side: int) -> list[Moment]:
        """The times of DDIM."""
        self.pipeline.scheduler.set_timesteps(steps, device=self.pipeline.unet.device)
        return [Moment(time) for time in self.pipeline.scheduler.timesteps]

    def step(self, prediction: torch.Tensor, moment: Moment, latents: torch.Tensor) -> torch.Tensor:
        """One step of DDIM."""
        return self.pipeline.scheduler.step(prediction, moment.time, latents).prev_sample

    def draw_times(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """(count,) int64: all times alike."""
        return torch.randint(self.pipeline.scheduler.config.num_train_timesteps, (count,), generator=generator)

    def usual_errors(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor, condition: Condition,
                     guidance: float) -> torch.Tensor:
        """(n,): the mean square of what the UNet says less noise, velocity or image, as its scheduler's prediction_type asks.

        The loss of diffusers' examples/text_to_image/train_text_to_image_lora.py (and ..._lora_sdxl.py), without --snr_gamma.
        """
        scheduler = self.pipeline.scheduler
        if scheduler.config.prediction_type == "v_prediction":
            wanted = scheduler.get_velocity(latents, noise, times)
        else:
            wanted = {"epsilon": noise, "sample": latents}[scheduler.config.prediction_type]
        predicted = self.predict(scheduler.add_noise(latents, noise, times), times, condition, guidance)
        return (predicted - wanted).square().mean(dim=(1, 2, 3))

    def save_lora(self, folder: pathlib.Path) -> None:
        """Write pytorch_lora_weights.safetensors."""
        layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(self.pipeline.unet))
        type(self.pipeline).save_lora_weights(folder, unet_lora_layers=layers)


class FlowMatching(Autoencoded, abc.ABC):
    """Families with a transformer that predicts the velocity from image to noise, sampled by Euler's method.

    At sigma in [0, 1] the latents are (1 - sigma) clean + sigma noise, and the velocity is noise - clean (Lipman et al. 2023,
    Liu et al. 2023).
    """

    predicts_velocity: ClassVar[bool] = True
    lora_targets: ClassVar[tuple[str, ...]] = JOINT_ATTENTION

    def __init__(self, pipeline: diffusers.DiffusionPipeline) -> None:
        self.pipeline = pipeline
        config = pipeline.scheduler.config
        if "Flow" not in type(pipeline.scheduler).__name__:
            raise Trouble(EXIT_MODEL, f"{pipeline.config._name_or_path}: its scheduler {type(pipeline.scheduler).__name__} is "
                                      "none of flow matching")
        pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=False)
        # its times and sigmas are those of training, and stay so: `set_timesteps` changes those of the pipeline's own
        self.training = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
        self.freeze()

    @property
    def denoiser(self) -> diffusers.ModelMixin:
        """The transformer."""
        return self.pipeline.transformer

    def step(self, prediction: torch.Tensor, moment: Moment, latents: torch.Tensor) -> torch.Tensor:
        """One step of Euler's method."""
        return latents + moment.change * prediction

    def scheduled(self, steps: int, **settings: object) -> list[Moment]:
        """The times and sigmas that the pipeline's scheduler gives with these settings."""
        scheduler = self.pipeline.scheduler
        scheduler.set_timesteps(steps, device=self.pipeline.transformer.device, **settings)
        changes = scheduler.sigmas.diff().tolist()
        return [Moment(time, change) for time, change in zip(scheduler.timesteps, changes, strict=True)]

    def shift_of(self, tokens: int, usual_max_shift: float) -> float:
        """How far the sigmas of an image of so many tokens are moved towards noise (mu of diffusers' `calculate_shift`)."""
        config = self.pipeline.scheduler.config
        few = config.get("base_image_seq_len", 256)
        many = config.get("max_image_seq_len", 4096)
        low = config.get("base_shift", 0.5)
        high = config.get("max_shift", usual_max_shift)
        return low + (high - low) * (tokens - few) / (many - few)

    @abc.abstractmethod
    def predict(self, latents: torch.Tensor, times: torch.Tensor, condition: Condition, guidance: float) -> torch.Tensor:
        """The velocity at `times`, as the Protocol says."""

    def sigmas_of(self, times: torch.Tensor) -> torch.Tensor:
        """(n, 1, 1, 1): the sigmas that belong to times of training."""
        known = self.training.timesteps.to(times)
        places = (known[None] - times[:, None]).abs().argmin(dim=1)
        return self.training.sigmas.to(times)[places].view(-1, 1, 1, 1)

    def times_at(self, shares: torch.Tensor) -> torch.Tensor:
        """The times of training at `shares` in [0, 1) of the way from noise to image, as diffusers' scripts choose them."""
        count = self.training.config.num_train_timesteps
        return self.training.timesteps[(shares * count).long().clamp(max=count - 1)]

    def velocity_errors(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor, condition: Condition,
                        guidance: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, C, h, w): the predicted velocity of noised latents less the true one; and their sigmas (n, 1, 1, 1)."""
        sigmas = self.sigmas_of(times).to(latents)
        noised = (1 - sigmas) * latents + sigmas * noise
        predicted = self.predict(noised, times, condition, guidance)
        return predicted - (noise - latents), sigmas

    def save_lora(self, folder: pathlib.Path) -> None:
        """Write pytorch_lora_weights.safetensors."""
        layers = peft.get_peft_model_state_dict(self.pipeline.transformer)
        type(self.pipeline).save_lora_weights(folder, transformer_lora_layers=layers)


def guide(predicted: torch.Tensor, copies: int, guidance: float) -> torch.Tensor:
    """Predictions for n prompts of 2n, the first n of which stand for no prompt; of n as they are (copies = 1)."""
    if copies == 1:
        return predicted
    empty, heard = predicted.chunk(2)
    return empty + guidance * (heard - empty)
