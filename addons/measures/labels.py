"""`labels`: what an image shows, told by prompts alone: a column with a probability for each label.

    measures:
      labels:
        watermark: ["a photo with a watermark", "a clean photo"]
        drawing: [["a drawing", "an illustration"], ["a photo", "a photograph"], "a chart"]

A label has two prompts or more. Its column holds the probability of the first among them: softmax over the prompts of the
model's own logit scale times the cosine of image and prompt. A prompt that is a list of several wordings is their mean, each of
length 1 before and the mean brought back to length 1, as in "prompt ensembling" of CLIP's authors (Radford et al. 2021, section
3.1.4, and their notebook Prompt_Engineering_for_ImageNet). Prompts are read as they stand, without `caption_template`.
"""
import functools

import numpy as np

from addons.measures.image_columns import ImageColumns, check_column_name
from image_text_sim_clip import EXIT_CONFIG, Column, Config, Trouble

Prompts = dict[str, list[list[str]]]  # of each label its prompts, each with one wording or more


def softmax_of_first(logits: np.ndarray) -> np.ndarray:
    """The first column's share of each row of `logits`, (m, p) float64 -> (m,)."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    share: np.ndarray = powers[:, 0] / powers.sum(axis=1)
    return share


def read_wordings(prompt: object, section: str) -> list[str]:
    """A prompt's wordings: it is text, or a list of texts. Trouble (exit 2) for anything else, and for empty text."""
    given = prompt if isinstance(prompt, list) else [prompt]
    wordings = [wording for wording in given if isinstance(wording, str) and wording.strip()]
    if not given or len(wordings) < len(given):
        raise Trouble(EXIT_CONFIG, f"{section}: a prompt must be text, or a list of texts, got {prompt!r}")
    return wordings


class Labels(ImageColumns):
    """A column for each label, with the probability of its first prompt."""

    name = "labels"

    @classmethod
    def read_settings(cls, config: Config) -> Prompts:
        """The labels of the config by name, and their prompts. Trouble (exit 2) for what makes no label."""
        section = f"measures.{cls.name}"
        given = (config.measures or {}).get(cls.name)
        if not isinstance(given, dict) or not given:
            raise Trouble(EXIT_CONFIG, f"{section} must be a section of labels, each with its prompts, got {given!r}")
        labels: Prompts = {}
        for name in sorted(given, key=str):
            check_column_name(name, section)
            prompts = given[name]
            if not isinstance(prompts, list) or len(prompts) < 2:
                raise Trouble(EXIT_CONFIG, f"{section}.{name} must be a list of two prompts or more, the label's first, got "
                                           f"{prompts!r}")
            labels[name] = [read_wordings(prompt, f"{section}.{name}") for prompt in prompts]
        return labels

    @classmethod
    def columns_for(cls, config: Config) -> tuple[Column, ...]:
        """A column for each label."""
        return tuple(Column(name, "float", f"probability of {prompts[0][0]!r} among {len(prompts)} prompts")
                     for name, prompts in cls.read_settings(config).items())

    @functools.cached_property
    def _vectors(self) -> dict[str, np.ndarray]:
        """Each label's prompts as unit vectors, float64 (prompts, d). Trouble (exit 2) for one that the model cannot read: it
        is too long, or its tokenizer knows nothing of it."""
        vector_of: dict[str, np.ndarray] = {}
        labels = self.read_settings(self.config)
        for prompts in labels.values():
            for wordings in prompts:
                vector_of |= dict.fromkeys(wordings, np.empty(0))
        ids, truncated = self.scorer.tokenize(list(vector_of))
        for wording, row, is_cut in zip(vector_of, ids, truncated, strict=True):
            unread = self.scorer.family.judge_caption(row)[0]
            if unread:
                raise Trouble(EXIT_CONFIG, f"measures.{self.name}: {wording!r} says nothing to the model: {unread}")
            if is_cut:
                raise Trouble(EXIT_CONFIG, f"measures.{self.name}: {wording!r} is longer than the model reads "
                                           f"({self.scorer.family.context_length} tokens)")
        vectors = np.asarray(self.scorer.encode_texts(ids)).astype(np.float64)
        vector_of = dict(zip(vector_of, vectors, strict=True))
        return {name: np.array([_average([vector_of[wording] for wording in wordings]) for wordings in prompts])
                for name, prompts in labels.items()}

    def values_of_images(self, images: np.ndarray, norms: np.ndarray | None) -> dict[str, np.ndarray]:
        """The probability of each label's first prompt."""
        scaled = images.astype(np.float64) * self.scorer.family.scale
        return {name: softmax_of_first(scaled @ vectors.T) for name, vectors in self._vectors.items()}


def _average(vectors: list[np.ndarray]) -> np.ndarray:
    """The mean of unit vectors (d,), brought back to length 1."""
    mean = np.mean(vectors, axis=0)
    unit: np.ndarray = mean / np.linalg.norm(mean)
    return unit


MEASURE = Labels
