"""MetaCLIP 2 (model_type metaclip_2): CLIP for all languages, such as facebook/metaclip-2-worldwide-huge-quickgelu.

Its text tower is CLIP's, causal and pooled at end-of-text, with another tokenizer (Chuang et al. 2025, arXiv 2507.22062).
Unlike OpenAI's, its configs name the end-of-text as the tokenizer has it, and the model pools at its first place.
"""
from addons.models.xlm_pieces import XlmPieces
from image_text_sim_clip import EXIT_MODEL, Clip, Family, Trouble


class MetaClip2(XlmPieces, Clip):
    """CLIP with another vocabulary."""

    kind = "metaclip_2"
    architecture = "MetaClip2Model"

    def check_tokenizer(self) -> None:
        """Refuse a tokenizer that does not end captions where the model pools."""
        Family.check_tokenizer(self)
        expected = self.model.config.text_config.eos_token_id
        last = self.encode(["Ab"])[0][-1]
        if last != expected:
            raise Trouble(EXIT_MODEL, f"{self.name}: its config pools captions at id {expected}, but its tokenizer ends them "
                                      f"with id {last}")


FAMILY = MetaClip2
