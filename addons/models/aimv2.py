"""AIMv2 (model_type aimv2): Apple's AIMv2 with a text tower, such as apple/aimv2-large-patch14-224-lit.

CLIP's tokenizer; the text tower was trained causal and pooled at the first end-of-text (Fini et al. 2024, arXiv 2411.14402, the
LiT variant). transformers makes it causal only where it is given a mask. The logit scale is never above `max_logit_scale`.
"""
from typing import TYPE_CHECKING, Any

from image_text_sim_clip import Clip

if TYPE_CHECKING:
    import torch


class Aimv2(Clip):
    """CLIP's tokenizer in front of AIMv2's two towers."""

    kind = "aimv2"
    architecture = "Aimv2Model"
    attention = "eager"  # with sdpa transformers 5.23 drops the causal mask of captions that fill their batch

    def read_scale(self) -> float:
        """What a cosine is multiplied by, held between 1 and the config's most."""
        return float(min(max(super().read_scale(), 1.0), self.model.config.max_logit_scale))

    def text_features(self, model: Any, ids: "torch.Tensor") -> "torch.Tensor":
        """(n, length) token ids -> (n, d) projected features; what lies behind end-of-text is not looked at."""
        import torch
        features: torch.Tensor = model.get_text_features(input_ids=ids, attention_mask=torch.ones_like(ids)).pooler_output
        return features


FAMILY = Aimv2
