"""Long captions: of one that is far longer than what the model reads only the beginning is tokenized.

What comes behind a space so far behind moves none of the tokens that are read, so that ids and scores are those of the whole
caption, while a caption of megabytes costs no more than one of a page.
"""
from image_text_sim_clip import LONG_CAPTION, Family


def take_heads(family: Family, captions: list[str]) -> list[str]:
    """The captions, or of long ones as much as has twice the tokens that the model reads, and ends at a space.

    A long text without spaces is cut only where it is four times as long. A tokenizer that keeps the end of a caption needs
    all of it.
    """
    if getattr(family.tokenizer, "truncation_side", "right") == "left":
        return captions
    heads = list(captions)
    chars = LONG_CAPTION * family.context_length
    left = [place for place, caption in enumerate(captions) if len(caption) > chars]
    while left:
        is_long = chars >= 4 * LONG_CAPTION * family.context_length
        for place in left:
            head = captions[place][:chars]
            end = head.rfind(" ", chars // 2)
            heads[place] = head[:end] if end > 0 else head if is_long else ""
        lengths = map(len, family.encode([family.prepare(heads[place]) for place in left]))
        left = [place for place, length in zip(left, lengths, strict=True) if length <= 2 * family.context_length]
        chars *= 4
        for place in left:
            heads[place] = captions[place]
        left = [place for place in left if len(captions[place]) > chars]
    return heads
