"""What families share whose text tower is BERT's: it looks both ways, and is told by a mask where a caption ends."""
from typing import TYPE_CHECKING, Any, ClassVar

from image_text_sim_clip import Family

if TYPE_CHECKING:
    import torch


class MaskedText(Family):
    """A family whose captions may be padded to any length, because the attention mask hides what was added."""

    trained_length: ClassVar[int]  # tokens of the captions that the model was trained with; its position table is longer

    def read_context_length(self) -> int:
        """The length that the model was trained with, or what its position table holds if that is less."""
        positions: int = super().read_context_length()
        return min(self.trained_length, positions)

    def padded_length(self, ids: list[int]) -> int:
        """The longest caption of the batch will do."""
        return 0

    def text_features(self, model: Any, ids: "torch.Tensor") -> "torch.Tensor":
        """(n, length) token ids -> (n, d) projected features; padding is masked."""
        mask = (ids != self.tokenizer.pad_token_id).long()
        features: torch.Tensor = model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
        return features
