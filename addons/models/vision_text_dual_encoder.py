"""Two towers joined by projections (model_type vision-text-dual-encoder), such as clip-italian/clip-italian.

transformers' own class for an image tower (ViT, CLIP, ...) and a text tower (BERT, RoBERTa, ...) that were trained together
(Zhai et al. 2022, arXiv 2111.07991). Both are read by their pooler. How long captions were in training is told by no file: as
many tokens are read as the tokenizer and the position table allow.
"""
from typing import Any

from addons.models.masked_text import MaskedText
from image_text_sim_clip import EXIT_MODEL, Json, Trouble, say

MOST_TOKENS = 512
FEWEST_TOKENS = 3  # of a caption: its beginning, a word, its end


class DualEncoder(MaskedText):
    """Any two towers with poolers."""

    kind = "vision-text-dual-encoder"
    architecture = "VisionTextDualEncoderModel"
    attention = None  # not every tower has sdpa, which is taken where there is one
    trained_length = MOST_TOKENS

    @staticmethod
    def check_weights(model: Any, loading: Json, name: str) -> None:
        """A file may lack the logit scale, as those of training programs that held it fast do: no cosine needs it."""
        if set(loading["missing_keys"]) == {"logit_scale"}:
            say(f"warning: {name} has no logit_scale, so labels and contrast use logit_scale_init_value of its config.json; "
                "similarities do without")
            model.logit_scale.data.fill_(model.config.logit_scale_init_value)
            loading = loading | {"missing_keys": set()}
        MaskedText.check_weights(model, loading, name)

    def has_positions_behind_padding(self) -> bool:
        """RoBERTa's are, and those of its kin."""
        kind = self.model.config.text_config.model_type
        return "roberta" in kind or kind == "camembert"

    def read_context_length(self) -> int:
        """The least of what the tokenizer and the position table hold."""
        most = self.tokenizer.model_max_length
        if isinstance(most, bool) or most < FEWEST_TOKENS:
            raise Trouble(EXIT_MODEL, f"{self.name}: its tokenizer_config.json says that captions have {most} tokens at most "
                                      f"(model_max_length), where a number from {FEWEST_TOKENS} belongs")
        return int(min(most, super().read_context_length()))

    def prepare(self, caption: str) -> str:
        """The caption; with XLM-R's tokenizer a space between the letters of each control token in it."""
        if "▁" not in self.tokenizer.get_vocab():
            return caption
        for token in self.control_tokens():
            caption = caption.replace(token, " ".join(token))
        return caption


FAMILY = DualEncoder
