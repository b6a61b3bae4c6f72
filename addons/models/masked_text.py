"""What families share whose text tower is BERT's: it looks both ways, and is told by a mask where a caption ends."""
from typing import TYPE_CHECKING, Any, ClassVar

from image_text_sim_clip import EXIT_MODEL, Family, Trouble

if TYPE_CHECKING:
    import torch


class MaskedText(Family):
    """A family whose captions may be padded to any length, because the attention mask hides what was added."""

    trained_length: ClassVar[int]  # tokens of the captions that the model was trained with; its position table is longer

    def has_positions_behind_padding(self) -> bool:
        """Whether positions are counted from behind the padding's number, as RoBERTa and its kin count them."""
        return False

    def read_context_length(self) -> int:
        """The length that the model was trained with, or what its position table holds if that is less."""
        text = self.model.config.text_config
        begins = text.pad_token_id + 1 if self.has_positions_behind_padding() else 0
        return min(self.trained_length, int(text.max_position_embeddings) - begins)

    def check_tokenizer(self) -> None:
        """Refuse also a tokenizer whose padding is not the config's, where positions are counted from that."""
        super().check_tokenizer()
        expected = self.model.config.text_config.pad_token_id
        pads_with = self.tokenizer.pad_token_id
        if self.has_positions_behind_padding() and pads_with != expected:
            raise Trouble(EXIT_MODEL, f"{self.name}: its config counts positions from behind pad_token_id {expected}, but its "
                                      f"tokenizer pads with id {pads_with}")

    def padded_length(self, ids: list[int]) -> int:
        """The longest caption of the batch will do."""
        return 0

    def text_features(self, model: Any, ids: "torch.Tensor") -> "torch.Tensor":
        """(n, length) token ids -> (n, d) projected features; padding is masked."""
        mask = (ids != self.tokenizer.pad_token_id).long()
        features: torch.Tensor = model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
        return features
