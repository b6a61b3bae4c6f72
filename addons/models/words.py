"""Words that were added to a tokenizer and trained, such as `<my-cat>` of a textual inversion: each stays one token.

The script has captions tokenized with `split_special_tokens`, so that a caption which contains `<|endoftext|>` does not end
there. That would take apart every word that was added as a special token, and with sentencepiece every added word at all.
"""
import json
import re
from typing import Any

from tokenizers import Tokenizer
from transformers.tokenization_python import Trie


class WholeWords:
    """Calls a tokenizer so that `words` stay whole and `control` tokens are text; made once, as it changes the tokenizer."""

    def __init__(self, tokenizer: Any, words: list[str], control: list[str]) -> None:
        self.tokenizer = tokenizer
        self.control = control
        self.any_word = re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)))
        self.is_fast = bool(tokenizer.is_fast)
        if self.is_fast:
            self._mark_words_as_plain(set(words))
        else:
            self._look_for_words_alone(words)

    def _mark_words_as_plain(self, words: set[str]) -> None:
        """Have the words be added tokens that are not special: `split_special_tokens` leaves such ones whole."""
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for token in state["added_tokens"]:
            if token["content"] in words:
                token["special"] = False
        self.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))  # transformers has no other way to replace it

    def _look_for_words_alone(self, words: list[str]) -> None:
        """Have a tokenizer in Python cut captions at the words, and no longer at control tokens."""
        self.tokenizer.tokens_trie = Trie(words)

    def __call__(self, captions: list[str], split_special_tokens: bool = True, **options: Any) -> dict[str, list[list[int]]]:
        """What the tokenizer itself returns for `captions`."""
        if self.is_fast:
            return dict(self.tokenizer(captions, split_special_tokens=True, **options))
        ids: list[list[int]] = []
        for caption in captions:  # a tokenizer in Python does one after another, too
            has_word = self.any_word.search(caption) is not None
            text = self._spell_control(caption) if has_word else caption
            ids += self.tokenizer([text], split_special_tokens=not has_word, **options)["input_ids"]
        return {"input_ids": ids}

    def _spell_control(self, caption: str) -> str:
        """The caption with a space inside each control token, which would be taken as such where it stands between words."""
        for token in self.control:
            caption = caption.replace(token, f"{token[0]} {token[1:]}")
        return caption

    def lower(self, caption: str) -> str:
        """The caption in lower case, but for the words."""
        out = ""
        end = 0
        for match in self.any_word.finditer(caption):
            out += caption[end:match.start()].lower() + match.group()
            end = match.end()
        return out + caption[end:].lower()
