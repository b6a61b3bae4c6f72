"""FLUX.1: CLIP's pooled embedding and T5's states, a transformer on packed latents, flow matching, distilled guidance."""
from typing import ClassVar

import numpy as np
import torch

from examples.pipelines import Condition, Framing, Moment
from examples.pipelines.denoising import FlowMatching, upcast


class Flux(FlowMatching):
    """A FluxPipeline. Guidance is a number that the transformer hears (dev) or nothing (schnell): never a second prediction."""

    pipeline_class: ClassVar[str] = "FluxPipeline"
    usual_guidance: ClassVar[float] = 3.5
    text_tokens: int | None = 512  # as the pipeline's `__call__` and diffusers' training script

    @property
    def usual_side(self) -> int:
        """The side in pixels that it was made for."""
        return self.pipeline.default_sample_size * self.pipeline.vae_scale_factor

    @property
    def side_multiple(self) -> int:
        """Two latent pixels: 2 x 2 of them make a token."""
        return 2 * self.pipeline.vae_scale_factor

    def latent_shape(self, side: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents before they are packed."""
        edge = side // self.pipeline.vae_scale_factor
        return self.pipeline.transformer.config.in_channels // 4, edge, edge

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], side: int, framing: Framing | None = None) -> Condition:
        """T5's states and CLIP's pooled embedding."""
        states, pooled, _ = self.pipeline.encode_prompt(prompts, device=self.pipeline.transformer.device,
                                                        max_sequence_length=self.text_tokens)
        return Condition(states, pooled)

    def encode_nothing(self, count: int, side: int, framing: Framing | None = None) -> Condition:
        """The empty prompt, in both encoders."""
        return self.encode_prompts([""] * count, side)

    def guides_by_two(self, guidance: float) -> bool:
        """Never."""
        return False

    def predict(self, latents: torch.Tensor, times: torch.Tensor, condition: Condition, guidance: float) -> torch.Tensor:
        """The velocity, in latents that are not packed."""
        count, _, height, width = latents.shape
        transformer = self.pipeline.transformer
        places = self.pipeline._prepare_latent_image_ids(count, height // 2, width // 2, latents.device, condition.states.dtype)
        text_places = torch.zeros(condition.states.shape[1], 3).to(condition.states)
        strength = torch.full((count,), guidance, device=latents.device) if transformer.config.guidance_embeds else None
        packed = self.pipeline._pack_latents(latents, *latents.shape).to(condition.states.dtype)
        out = transformer(hidden_states=packed, timestep=times.expand(count).to(packed.dtype) / 1000, guidance=strength,
                          pooled_projections=condition.pooled, encoder_hidden_states=condition.states, txt_ids=text_places,
                          img_ids=places).sample
        scale = self.pipeline.vae_scale_factor
        return upcast(self.pipeline._unpack_latents(out, height * scale, width * scale, scale))

    def moments(self, steps: int, side: int) -> list[Moment]:
        """As the pipeline's `__call__` sets its scheduler: evenly spaced sigmas, moved by the number of tokens."""
        tokens = (side // self.side_multiple) ** 2
        own_sigmas = self.pipeline.scheduler.config.get("use_flow_sigmas")
        sigmas = None if own_sigmas else np.linspace(1.0, 1 / steps, steps)
        return self.scheduled(steps, sigmas=sigmas, mu=self.shift_of(tokens, usual_max_shift=1.15))

    def draw_times(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """(count,): all times alike."""
        return self.times_at(torch.rand(count, generator=generator))

    def usual_errors(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor, condition: Condition,
                     guidance: float) -> torch.Tensor:
        """(n,): the mean square of the predicted velocity less the true one.

        The loss of diffusers' examples/dreambooth/train_dreambooth_lora_flux.py with its defaults (--weighting_scheme none);
        a transformer that hears guidance is told `guidance`, as --guidance_scale there.
        """
        errors, _ = self.velocity_errors(latents, noise, times, condition, guidance)
        return errors.square().mean(dim=(1, 2, 3))


FAMILY = Flux
