"""What families share whose tokenizer has XLM-R's pieces."""
from image_text_sim_clip import Family


class XlmPieces(Family):
    """A family whose tokenizer takes control tokens in a caption for what they say, whatever it is asked.

    `<s>`, `</s>`, `<pad>` and the like are pieces of its vocabulary, so that `split_special_tokens` does not keep a caption
    that contains `</s>` from ending there. They are taken apart before.
    """

    def prepare(self, caption: str) -> str:
        """The caption with a space between the letters of each control token in it."""
        for token in self.tokenizer.all_special_tokens:
            if token in caption:
                caption = caption.replace(token, " ".join(token))
        return caption
