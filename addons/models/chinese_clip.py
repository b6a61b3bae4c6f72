"""Chinese CLIP (model_type chinese_clip): CLIP's image tower and a Chinese RoBERTa (OFA-Sys/chinese-clip-vit-base-patch16).

Captions were 52 tokens long in its training (Yang et al. 2022, arXiv 2211.01335, and `context_length=52` of its own code).
"""
from addons.models.masked_text import MaskedText


class ChineseClip(MaskedText):
    """CLIP whose captions BERT reads, pooled at the first token."""

    kind = "chinese_clip"
    architecture = "ChineseCLIPModel"
    trained_length = 52


FAMILY = ChineseClip
