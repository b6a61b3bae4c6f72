"""AltCLIP (model_type altclip): CLIP's image tower and XLM-R for many languages, such as BAAI/AltCLIP.

Captions are cut at 77 tokens, as in its training (Chen et al. 2022, arXiv 2211.06679, whose teacher is CLIP's text tower).
"""
from addons.models.masked_text import MaskedText
from addons.models.xlm_pieces import XlmPieces


class AltClip(XlmPieces, MaskedText):
    """CLIP whose captions XLM-R reads, pooled at the first token."""

    kind = "altclip"
    architecture = "AltCLIPModel"
    trained_length = 77

    def has_positions_behind_padding(self) -> bool:
        """They are, as its text tower is XLM-R."""
        return True


FAMILY = AltClip
