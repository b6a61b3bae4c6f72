"""The scorers of a run: one or several teachers whose losses make one error, and the judge, which is none of them."""
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Literal

import torch

from addons.loss import DissimilarityLoss
from image_text_sim_clip import EXIT_CONFIG, Config, Scorer, Trouble, load_config

Objective = Literal["cosine", "sigmoid"]


@dataclasses.dataclass(frozen=True)
class TeacherSetting:
    """A teacher as the command line names it."""

    config: pathlib.Path
    weight: float
    objective: Objective


class Teachers(torch.nn.Module):
    """One error from several models: the mean of their losses by their weights. Raises Trouble as DissimilarityLoss does.

    A single teacher's weight makes no difference. Weights count what is added: a sigmoid loss of a batch of 8 is larger than
    a dissimilarity, and may want a smaller weight.
    """

    def __init__(self, settings: Sequence[TeacherSetting], device: torch.device) -> None:
        super().__init__()
        total = sum(setting.weight for setting in settings)
        self.weights = [setting.weight / total for setting in settings]
        self.losses = [DissimilarityLoss(on_device(load_config(setting.config), device), setting.objective)
                       for setting in settings]
        self.parts = torch.nn.ModuleList(self.losses)  # whose weights are this module's as well
        self.to(device)

    def forward(self, images: torch.Tensor, captions: Sequence[str]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The error of images (n, 3, H, W) in [0, 1], a scalar, and each teacher's own loss."""
        values = [loss(images, captions) for loss in self.losses]
        error = sum(weight * value for weight, value in zip(self.weights, values, strict=True))
        return error, values

    @property
    def scorers(self) -> list[Scorer]:
        """The teachers as scorers, in order."""
        return [loss.scorer for loss in self.losses]

    def mean(self, values: Sequence[Sequence[float]]) -> list[float]:
        """The teachers' dissimilarities of n images as one number each, by the same weights."""
        return [round(sum(weight * one for weight, one in zip(self.weights, of_image, strict=True)), 6)
                for of_image in zip(*values, strict=True)]


def load_judge(path: pathlib.Path, teachers: Teachers, device: torch.device) -> Scorer:
    """The judge's scorer; raises Trouble (exit 2) where it has a teacher's weights."""
    judge = Scorer(on_device(load_config(path), device))
    if any(judge.files.identity == scorer.files.identity for scorer in teachers.scorers):
        raise Trouble(EXIT_CONFIG, "the judge has the teacher's weights: it would only repeat what the teacher says")
    return judge


def on_device(config: Config, device: torch.device) -> Config:
    """The config with `use_cuda` as the device is."""
    return dataclasses.replace(config, use_cuda=device.type == "cuda")


def pair_teachers(configs: Sequence[pathlib.Path], weights: Sequence[float] | None,
                  objectives: Sequence[Objective] | None) -> list[TeacherSetting]:
    """The command line's lists, one entry a teacher; raises Trouble (exit 2) where they do not belong together."""
    for name, given in (("--teacher-weights", weights), ("--objective", objectives)):
        if given and len(given) != len(configs):
            raise Trouble(EXIT_CONFIG, f"{name} must have as many values as --teacher ({len(configs)}), got {len(given)}")
    shares = list(weights or [1.0] * len(configs))
    if not all(0 < share < float("inf") for share in shares):
        raise Trouble(EXIT_CONFIG, f"--teacher-weights must be above 0, got {' '.join(map(str, shares))}")
    aims: list[Objective] = list(objectives) if objectives else ["cosine" for _ in configs]
    return [TeacherSetting(config, share, aim) for config, share, aim in zip(configs, shares, aims, strict=True)]
