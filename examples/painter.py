"""A pipeline with LoRA weights: prompts and noise in, images out, with a gradient through the last denoising steps."""
import contextlib
import dataclasses
from collections.abc import Iterator

import peft
import torch
from diffusers.training_utils import cast_training_params

from examples.pipelines import Condition, Family, Framing, tell
from image_text_sim_clip import EXIT_CONFIG, Trouble


@dataclasses.dataclass(frozen=True)
class Painting:
    """How images are painted."""

    side: int  # pixels
    denoising_steps: int
    guidance: float


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which weights learn."""

    rank: int
    targets: tuple[str, ...]
    seed: int  # of their start


@dataclasses.dataclass(frozen=True)
class Painted:
    """Images (n, 3, H, W) in [0, 1], and how far the remembered steps strayed from the base model's: scalars.

    `strayed` is the mean squared difference of the predictions, `norm_strayed` that of the predictions' norms relative to the
    base model's, 0 where the norm is the same. Both are 0 where they were not asked for.
    """

    images: torch.Tensor
    strayed: torch.Tensor
    norm_strayed: torch.Tensor


class Painter:
    """A family's pipeline whose denoiser has LoRA weights in float32; nothing else learns."""

    def __init__(self, family: Family, painting: Painting, lora: Lora, device: torch.device,
                 gradient_checkpointing: bool = False) -> None:
        self.family = family
        self.painting = painting
        self.device = device
        family.pipeline.to(device)
        torch.manual_seed(lora.seed)
        try:
            family.denoiser.add_adapter(peft.LoraConfig(r=lora.rank, lora_alpha=lora.rank, init_lora_weights="gaussian",
                                                        target_modules=list(lora.targets)))
        except ValueError as error:
            raise Trouble(EXIT_CONFIG, f"--lora-targets {' '.join(lora.targets)}: {tell(error)}") from None
        cast_training_params(family.denoiser, torch.float32)
        if gradient_checkpointing:
            family.denoiser.enable_gradient_checkpointing()

    def lora(self) -> dict[str, torch.nn.Parameter]:
        """The weights that learn, by name."""
        return {name: weight for name, weight in self.family.denoiser.named_parameters() if weight.requires_grad}

    def noise(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Pure noise to start from, (count, C, h, w)."""
        shape = (count, *self.family.latent_shape(self.painting.side))
        return torch.randn(shape, generator=generator).to(self.device)

    def conditions(self, prompts: list[str]) -> Condition:
        """What the denoiser is told: n prompts, or no prompt n times and then the n prompts, where guidance needs both."""
        heard = self.family.encode_prompts(prompts, self.painting.side)
        if not self.family.guides_by_two(self.painting.guidance):
            return heard
        return self.family.encode_nothing(len(prompts), self.painting.side).followed_by(heard)

    def paint(self, prompts: list[str], noise: torch.Tensor, gradient_steps: int = 0,
              measure_distance: bool = False) -> Painted:
        """Paint the prompts from `noise`; only the last `gradient_steps` denoising steps are remembered for the gradient."""
        family = self.family
        condition = self.conditions(prompts)
        strayed = torch.zeros((), device=self.device)
        norm_strayed = torch.zeros((), device=self.device)
        latents = noise
        for number, moment in enumerate(family.moments(self.painting.denoising_steps, self.painting.side)):
            remembered = number >= self.painting.denoising_steps - gradient_steps
            with torch.set_grad_enabled(remembered):
                predicted = family.predict(latents, moment.time, condition, self.painting.guidance)
                if remembered and measure_distance:
                    with torch.no_grad(), self.without_lora():
                        base = family.predict(latents, moment.time, condition, self.painting.guidance)
                    strayed = strayed + (predicted - base).square().mean() / gradient_steps
                    norm_strayed = norm_strayed + relative_norm_change(predicted, base) / gradient_steps
                latents = family.step(predicted, moment, latents)
        with torch.set_grad_enabled(gradient_steps > 0):
            return Painted(family.decode(latents), strayed, norm_strayed)

    @contextlib.contextmanager
    def without_lora(self) -> Iterator[None]:
        """The base model, while it lasts."""
        self.family.denoiser.disable_adapters()
        try:
            yield
        finally:
            self.family.denoiser.enable_adapters()

    def imitation_errors(self, images: torch.Tensor, captions: list[str], draws: "ImitationDraws",
                         framing: Framing | None = None) -> torch.Tensor:
        """(n,): the family's usual loss for images (n, 3, H, W) in [-1, 1], at one time each; not all captions are heard."""
        side = images.shape[-1]
        latents = self.family.encode_images(images, draws.sample_noise)
        condition = self.family.encode_prompts(captions, side, framing)
        if draws.dropped.any():
            nothing = self.family.encode_nothing(len(captions), side, framing)
            condition = condition.replaced_where(draws.dropped, nothing)
        return self.family.usual_errors(latents, draws.noise.to(latents), draws.times.to(latents.device), condition,
                                        self.painting.guidance)


@dataclasses.dataclass(frozen=True)
class ImitationDraws:
    """What is drawn by lot to train on n images: (n, C, h, w) twice, (n,) times of the family, (n,) bool."""

    noise: torch.Tensor
    sample_noise: torch.Tensor  # of the autoencoder's distribution
    times: torch.Tensor
    dropped: torch.Tensor  # captions that are not heard

    @classmethod
    def draw(cls, family: Family, count: int, side: int, drop_rate: float, generator: torch.Generator) -> "ImitationDraws":
        """All of it from one generator, on the CPU."""
        shape = (count, *family.latent_shape(side))
        return cls(noise=torch.randn(shape, generator=generator), sample_noise=torch.randn(shape, generator=generator),
                   times=family.draw_times(count, generator), dropped=torch.rand(count, generator=generator) < drop_rate)

    def part(self, chosen: slice) -> "ImitationDraws":
        """The draws of some of the images."""
        return ImitationDraws(self.noise[chosen], self.sample_noise[chosen], self.times[chosen], self.dropped[chosen])


def relative_norm_change(predicted: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """A scalar: the mean over n predictions (n, C, h, w) of ((|predicted| - |base|) / |base|) squared."""
    base_norm = base.flatten(1).norm(dim=1)
    return (predicted.flatten(1).norm(dim=1) / base_norm - 1).square().mean()


# ── What the teacher sees of an image ─────────────────────────────────────────────────────────────────────────────────

@dataclasses.dataclass(frozen=True)
class Variation:
    """Random windows and grain for n images: sides and centres in [0, 1] and [-1, 1] before `crop` scales them."""

    shares: torch.Tensor  # (n, 1)
    centres: torch.Tensor  # (n, 2)
    grain: torch.Tensor  # (n, 3, H, W)

    @classmethod
    def draw(cls, count: int, size: tuple[int, int], generator: torch.Generator) -> "Variation":
        """Windows first, then grain."""
        return cls(torch.rand(count, 1, generator=generator), torch.rand(count, 2, generator=generator),
                   torch.randn(count, 3, *size, generator=generator))

    def part(self, chosen: slice) -> "Variation":
        """The variation of some of the images."""
        return Variation(self.shares[chosen], self.centres[chosen], self.grain[chosen])

    def apply(self, images: torch.Tensor, crop: float, noise: float) -> torch.Tensor:
        """Each image cut to a window of `crop` to 1 of its side and stretched back; then grain of strength `noise` is added."""
        scale = 1 - (1 - crop) * self.shares
        centre = (2 * self.centres - 1) * (1 - scale)
        window = torch.zeros(len(images), 2, 3)
        window[:, 0, 0] = window[:, 1, 1] = scale[:, 0]
        window[:, :, 2] = centre
        places = torch.nn.functional.affine_grid(window.to(images), list(images.shape), align_corners=False)
        cut = torch.nn.functional.grid_sample(images, places, padding_mode="border", align_corners=False)
        return (cut + noise * self.grain.to(images)).clamp(0, 1)


def vary(images: torch.Tensor, crop: float, noise: float, generator: torch.Generator) -> torch.Tensor:
    """Images (n, 3, H, W) through random windows, with grain.

    What pleases the teacher at one exact place in the pixels is lost by this, what is drawn is not.
    """
    height, width = images.shape[-2:]
    return Variation.draw(len(images), (height, width), generator).apply(images, crop, noise)
