"""Stable Diffusion XL: two text encoders, pooled embeddings, sizes and crops told to the UNet, an autoencoder in float32."""
from typing import ClassVar

import diffusers
import torch

from examples.pipelines import Condition, Framing
from examples.pipelines.denoising import NoisePredicting


class StableDiffusionXL(NoisePredicting):
    """A StableDiffusionXLPipeline. No prompt is all zeros, or the empty prompt where its config says so."""

    pipeline_class: ClassVar[str] = "StableDiffusionXLPipeline"
    usual_guidance: ClassVar[float] = 5.0

    def __init__(self, pipeline: diffusers.DiffusionPipeline) -> None:
        super().__init__(pipeline)
        pipeline.vae.to(torch.float32)  # it overflows in float16 (`force_upcast`), and bfloat16 costs colours

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], side: int, framing: Framing | None = None) -> Condition:
        """The last states but one of both text encoders, side by side, and the second one's pooled embedding."""
        states, _, pooled, _ = self.pipeline.encode_prompt(prompts, device=self.pipeline.unet.device,
                                                           do_classifier_free_guidance=False)
        return Condition(states, pooled, self._time_ids(len(prompts), side, framing).to(pooled))

    @torch.no_grad()
    def encode_nothing(self, count: int, side: int, framing: Framing | None = None) -> Condition:
        """As the pipeline makes its negative prompt when none is given."""
        _, states, _, pooled = self.pipeline.encode_prompt([""] * count, device=self.pipeline.unet.device,
                                                           do_classifier_free_guidance=True)
        return Condition(states, pooled, self._time_ids(count, side, framing).to(pooled))

    @staticmethod
    def _time_ids(count: int, side: int, framing: Framing | None) -> torch.Tensor:
        """(count, 6): as the pipeline has them for a whole image of this side, or as a training image was cut."""
        target = torch.full((count, 2), side)
        if framing is None:
            return torch.cat([target, torch.zeros_like(target), target], dim=1)
        return torch.cat([framing.original_sizes, framing.crop_corners, target], dim=1)

    def ask_unet(self, latents: torch.Tensor, times: torch.Tensor, condition: Condition) -> torch.Tensor:
        """The UNet's answer, which hears pooled embeddings, sizes and crops as well."""
        added = {"text_embeds": condition.pooled, "time_ids": condition.time_ids}
        return self.pipeline.unet(latents, times, encoder_hidden_states=condition.states, added_cond_kwargs=added).sample


FAMILY = StableDiffusionXL
