"""ALIGN (model_type align): EfficientNet and BERT, such as kakaobrain/align-base.

Captions are cut at 64 tokens, as in its training (Jia et al. 2021, arXiv 2102.05918, and its processor's `max_length`). Its
logits are cosines divided by a temperature, so the scale is 1 / temperature.
"""
from addons.models.masked_text import MaskedText


class Align(MaskedText):
    """EfficientNet's pooled features against BERT's projected first token."""

    kind = "align"
    architecture = "AlignModel"
    takes_any_size = True
    attention = "eager"  # transformers has no other for it
    trained_length = 64

    def read_scale(self) -> float:
        """What a cosine is multiplied by: 1 / temperature."""
        return 1 / float(self.model.temperature.item())


FAMILY = Align
