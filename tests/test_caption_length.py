"""Long captions: the tokens are those of the whole, and neither memory nor time follows what the model does not read."""
import random
import tracemalloc

import pytest

import image_text_sim_clip as script

KINDS = {
    "words": lambda rng: " ".join("".join(rng.choices("abcdefgh", k=rng.randint(1, 9))) for _ in range(2500)),
    "one word": lambda rng: "".join(rng.choices("abc", k=9000)),
    "no spaces": lambda rng: "".join(rng.choices("大象在水边喝水，天空很蓝。", k=6000)),
    "marks": lambda rng: "".join(rng.choices("a <|endoftext|>.,'\t\n  é😀", k=6000)),
    "spaces": lambda rng: "a" + " " * 7000 + " b" * 200,
    "early spaces": lambda rng: "a b c d " + "x" * 9000,
    "late word": lambda rng: "x" * rng.randint(100, 9000) + " word" * 300,
}


@pytest.fixture(scope="module", params=["challenge_set/shapes_clip", "siglip-base"])
def family(request, shelf):
    """The bundled model's tokenizer, and SigLIP's."""
    name = str(script.ADDONS.parent / request.param) if "/" in request.param else str(shelf(request.param))
    return script.Scorer(script.Config(pretrained_model=name, use_cuda=False)).family


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_long_captions(family, kind):
    """Whatever is cut off before a long caption is tokenized, its ids and whether it was cut are those of the whole."""
    rng = random.Random(7)
    lengths = (9000, 5000, 3000, 2049, 1300, 1233, 700, 513, 512, 100) * 3
    captions = [KINDS[kind](rng)[:length] for length in lengths]
    ids, truncated = family.tokenize(captions)
    prepared = [family.prepare(caption) for caption in captions]
    assert ids == family.encode(prepared, truncation=True, max_length=family.context_length)
    assert truncated == [len(whole) > family.context_length for whole in family.encode(prepared)]


def test_the_end_of_long_captions(family, monkeypatch):
    """A tokenizer whose `truncation_side` is left keeps the end of a long caption, as it does when it is called alone."""
    monkeypatch.setattr(family.tokenizer, "truncation_side", "left")
    caption = "a photo of a dog " * 500 + "two cats on a sofa"
    kept = family.encode([family.prepare(caption)], truncation=True, max_length=family.context_length)
    assert family.tokenize([caption]) == (kept, [True])
    assert kept != family.encode(["a photo of a dog " * 500], truncation=True, max_length=family.context_length)


def test_memory_of_long_captions(family):
    """2,000 captions of 2,000 characters, and two of 3 MB, take no more memory than some copies of the longest one.

    SigLIP's tokenizer, which is written in Python, makes about 16 of a text that is one unknown word.
    """
    captions = ["some words of a caption " * 90] * 2000
    tracemalloc.start()
    family.tokenize([*captions, "a word " * 430_000, "x" * 3_000_000])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80_000_000
