"""Stable Diffusion 1 and 2: one text encoder, a UNet, DDIM."""
from typing import ClassVar

import torch

from examples.pipelines import Condition, Framing
from examples.pipelines.denoising import NoisePredicting


class StableDiffusion(NoisePredicting):
    """A StableDiffusionPipeline; no prompt is the empty one."""

    pipeline_class: ClassVar[str] = "StableDiffusionPipeline"
    usual_guidance: ClassVar[float] = 7.5

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], side: int, framing: Framing | None = None) -> Condition:
        """The text encoder's last states."""
        states, _ = self.pipeline.encode_prompt(prompts, self.pipeline.unet.device, 1, False)
        return Condition(states)

    def encode_nothing(self, count: int, side: int, framing: Framing | None = None) -> Condition:
        """The states of the empty prompt."""
        return self.encode_prompts([""] * count, side)


FAMILY = StableDiffusion
