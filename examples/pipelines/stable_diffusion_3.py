"""Stable Diffusion 3 and 3.5: three text encoders (the third may be missing), a transformer, flow matching."""
from typing import ClassVar

import torch

from examples.pipelines import Condition, Framing, Moment
from examples.pipelines.denoising import FlowMatching, guide, upcast


class StableDiffusion3(FlowMatching):
    """A StableDiffusion3Pipeline; no prompt is the empty one."""

    pipeline_class: ClassVar[str] = "StableDiffusion3Pipeline"
    usual_guidance: ClassVar[float] = 7.0
    may_lack: ClassVar[tuple[str, ...]] = ("text_encoder_3", "tokenizer_3")
    text_tokens: int | None = 256  # as the pipeline's `__call__`; diffusers' training script takes 77

    @property
    def usual_side(self) -> int:
        """The side in pixels that it was made for."""
        return self.pipeline.transformer.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def side_multiple(self) -> int:
        """A latent pixel times the transformer's patch."""
        return self.pipeline.vae_scale_factor * self.pipeline.patch_size

    @property
    def largest_side(self) -> int:
        """It has learnt positions for so many patches and no more."""
        return self.pipeline.transformer.config.pos_embed_max_size * self.side_multiple

    def latent_shape(self, side: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents."""
        edge = side // self.pipeline.vae_scale_factor
        return self.pipeline.transformer.config.in_channels, edge, edge

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], side: int, framing: Framing | None = None) -> Condition:
        """The states of both CLIP encoders side by side, then T5's; and both pooled embeddings."""
        states, _, pooled, _ = self.pipeline.encode_prompt(prompts, None, None, device=self.pipeline.transformer.device,
                                                           do_classifier_free_guidance=False,
                                                           max_sequence_length=self.text_tokens)
        return Condition(states, pooled)

    def encode_nothing(self, count: int, side: int, framing: Framing | None = None) -> Condition:
        """The empty prompt, in all encoders."""
        return self.encode_prompts([""] * count, side)

    def guides_by_two(self, guidance: float) -> bool:
        """Classifier-free guidance."""
        return guidance > 1

    def predict(self, latents: torch.Tensor, times: torch.Tensor, condition: Condition, guidance: float) -> torch.Tensor:
        """The velocity, guided where the condition holds twice as many prompts."""
        copies = len(condition) // len(latents)
        inputs = torch.cat([latents] * copies).to(condition.states.dtype)
        told = times.expand(len(inputs)) if times.ndim == 0 else torch.cat([times] * copies)
        out = self.pipeline.transformer(hidden_states=inputs, timestep=told, encoder_hidden_states=condition.states,
                                        pooled_projections=condition.pooled).sample
        return guide(upcast(out), copies, guidance)

    def moments(self, steps: int, side: int) -> list[Moment]:
        """As the pipeline's `__call__` sets its scheduler."""
        if not self.pipeline.scheduler.config.get("use_dynamic_shifting"):
            return self.scheduled(steps)
        tokens = (side // self.side_multiple) ** 2
        return self.scheduled(steps, mu=self.shift_of(tokens, usual_max_shift=1.16))

    def draw_times(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """(count,): the sigmoid of a standard normal, "logit-normal" (Esser et al. 2024), is the share of the way."""
        return self.times_at(torch.randn(count, generator=generator).sigmoid())

    def usual_errors(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor, condition: Condition,
                     guidance: float) -> torch.Tensor:
        """(n,): the mean square of the error in the clean latents that the predicted velocity stands for, sigma times its own.

        The loss of diffusers' examples/dreambooth/train_dreambooth_lora_sd3.py with its defaults (--precondition_outputs 1,
        --weighting_scheme logit_normal, which weights all alike).
        """
        errors, sigmas = self.velocity_errors(latents, noise, times, condition, guidance)
        return (sigmas * errors).square().mean(dim=(1, 2, 3))


FAMILY = StableDiffusion3
