"""A score is what transformers itself says of that image and that caption, for each kind of model that is published.

The reference (`Reference`) shares no code with the script: it takes transformers' own classes by name, one pair at a
time, prepared as the model's authors prepare it, through another attention kernel.
"""
import contextlib
import csv
import math
import os
import pathlib
import unicodedata

import numpy as np
import pytest
import torch
import transformers
from models import ARCHITECTURES, CORPUS, change_config, change_weights
from PIL import Image
from transformers.convert_slow_tokenizer import bytes_to_unicode

import image_text_sim_clip as script
from addons.models import batch_size

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "challenge_set/shapes_clip"
SCORED = list(ARCHITECTURES)
# One of each way to take captions apart and to pool them: these are also scored in batches of 1 and of 64.
FOUR_KINDS = ["clip-new-eos", "clip-base-patch32", "siglip-base", "siglip2-base"]
pytestmark = pytest.mark.slow  # the models are built first

WORDS = " ".join(CORPUS).split()
CAPTIONS = [
    "cat", "A Photo Of TWO CATS", "a photo of two cats", "two cats, on a sofa!", "!!!", "x" * 300,
    *(" ".join(WORDS[i % len(WORDS)] for i in range(n)) for n in (15, 40, 62, 76, 200)),
    "emoji 😀🐈‍⬛🇨🇭 and more 🎉", "两只猫在沙发上", "ДВЕ КОШКИ на диване", "قطتان على أريكة", "İstanbul'da İKİ kedi, ß and ﬁne",
    "a cat <|endoftext|> and a dog", "<|startoftext|>a cat<|endoftext|>", "a cat </s> and <unk> a dog <pad>",
    "a cat <eos> and a dog <bos>", "<my-cat> on a sofa", "  spaces\tand\n\nlines \r\n everywhere  ", 'quotes "and", commas',
    "naïve cafe\u0301, zero\u200bwidth, nul\x01",
]


# To SigLIP's vocabulary, which has no byte symbols, these are unknown from beginning to end, or all punctuation.
UNKNOWN_TO_SIGLIP = {"!!!": "leaves nothing", "x" * 300: "knows nothing", "两只猫在沙发上": "knows nothing",
                     "ДВЕ КОШКИ на диване": "knows nothing", "قطتان على أريكة": "knows nothing"}


# ── The reference ─────────────────────────────────────────────────────────────────────────────────────────────────────

class Reference:
    """transformers called as the model cards show it, one pair at a time, in float32 on the CPU."""

    def __init__(self, folder, family):
        self.family = family
        model, images = (transformers.CLIPModel, transformers.CLIPImageProcessorPil) if family == "clip" else \
            (transformers.SiglipModel, transformers.SiglipImageProcessorPil)
        self.model = model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        self.images = images.from_pretrained(folder)
        self.tokenizer = {"clip": transformers.CLIPTokenizer, "siglip": transformers.SiglipTokenizer,
                          "siglip2": transformers.GemmaTokenizer}[family].from_pretrained(folder)

    def tokens(self, caption, **options):
        """What the tokenizer makes of a caption; SigLIP 2's does not lower-case, and was trained on lower case."""
        return self.tokenizer([caption.lower() if self.family == "siglip2" else caption], split_special_tokens=True, **options)

    def text_inputs(self, caption):
        """CLIP: as long as the caption, with its mask. SigLIP: 64 tokens, and no mask although one could be had."""
        if self.family == "clip":
            return dict(self.tokens(caption, padding=True, truncation=True, return_tensors="pt"))
        ids = self.tokens(caption, padding="max_length", truncation=True, max_length=64, return_tensors="pt")["input_ids"]
        assert ids.shape == (1, 64)
        return {"input_ids": ids}

    def cosine(self, image, caption):
        """From the model's own logits: without its bias, divided by its scale."""
        pixels = self.images(image.convert("RGB"), return_tensors="pt")
        with torch.inference_mode():
            logit = self.model(**pixels, **self.text_inputs(caption)).logits_per_image.double().item()
        bias = self.model.logit_bias.item() if self.family != "clip" else 0.0
        return (logit - bias) / math.exp(self.model.logit_scale.item())

    def is_cut(self, caption):
        """Whether the caption has more tokens, with those for its start and end, than the model has positions."""
        return len(self.tokens(caption)["input_ids"][0]) > self.model.config.text_config.max_position_embeddings


@pytest.fixture(scope="module")
def references(shelf):
    """Name of an architecture -> its Reference, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = Reference(shelf(name), ARCHITECTURES[name][1])
        return made[name]
    return get


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of images of all sizes: landscape, portrait, square, tiny, long; colour and grey; JPEG and PNG."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, width, height, mode in (
            ("landscape.png", 301, 170, "RGB"), ("portrait.jpg", 121, 200, "RGB"), ("large.jpg", 500, 403, "RGB"),
            ("tiny.png", 5, 7, "RGB"), ("grey.png", 90, 64, "L"), ("grey.jpg", 230, 231, "L"), ("square.png", 224, 224, "RGB"),
            ("dot.png", 1, 1, "RGB"), ("long.png", 12, 200, "RGB")):
        coarse = rng.integers(0, 256, (height // 9 + 1, width // 9 + 1, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=int)
        noisy = (smooth + rng.integers(-40, 41, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).convert(mode).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def pairs(images):
    """(file name, caption): each caption with some image, each image with the same caption."""
    names = sorted(path.name for path in images.iterdir())
    return [(names[i % len(names)], caption) for i, caption in enumerate(CAPTIONS)] + [(name, "Red Bicycle") for name in names]


@pytest.fixture(scope="module")
def expected(references, images, pairs):
    """Name of an architecture -> the reference's cosines of all pairs, and which captions are cut."""
    known = {}

    def get(name):
        if name not in known:
            reference, known[name] = references(name), []
            for file, caption in pairs:
                with Image.open(images / file) as image:
                    known[name].append((reference.cosine(image, caption), reference.is_cut(caption)))
        return known[name]
    return get


@pytest.fixture(scope="module")
def scorers():
    """Model folder and config keys -> a Scorer, loaded once."""
    made = {}

    def get(folder, **keys):
        key = (str(folder), *sorted(keys.items()))
        if key not in made:
            made[key] = script.Scorer(script.Config(pretrained_model=str(folder), use_cuda=False, **keys))
        return made[key]
    return get


# ── Equal to transformers ─────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("name", "batch_size"), [
    *((name, size) for name in FOUR_KINDS for size in (1, 7, 64)), *((name, 7) for name in SCORED if name not in FOUR_KINDS)])
def test_a_run_scores_what_transformers_scores(name, batch_size, shelf, images, pairs, expected, run_main, write_config,
                                               write_table, read_table):
    """Every row of scores.csv holds transformers' own cosine within 1e-5, its probability, and whether the caption was cut.

    Captions of which SigLIP's tokenizer knows nothing have no score.
    """
    table = write_table([("url", "caption"), *pairs])
    outcome = run_main("--config", write_config(
        csv_path=str(table), image_path=str(images), pretrained_model=str(shelf(name)), preprocess="exact", dtype="float32",
        batch_size=batch_size, partition_rows=13))
    assert outcome.code == 0, outcome.stderr
    unknown = UNKNOWN_TO_SIGLIP if name == "siglip-base" else {}
    assert outcome.result["scored"] == outcome.result["rows"] - len(unknown) == len(pairs) - len(unknown)
    cosines, cut = zip(*expected(name), strict=True)
    assert np.std(cosines) > 0.01, "a reference that says the same of every pair proves nothing"
    assert any(cut)
    assert not all(cut)
    siglip = name.startswith("siglip")
    scale, bias = {"siglip-base": (4.7652, -12.93), "siglip2-base": (4.7244, -16.7714)}.get(name, (0, 0))
    rows = read_table(table.parent / "out/scores.csv")
    for row, pair, cosine, was_cut in zip(rows, pairs, cosines, cut, strict=True):
        if pair[1] in unknown:
            assert (row["caption"], row["status"], row["similarity"]) == (pair[1], "empty_caption", "")
            assert unknown[pair[1]] in row["detail"]
            continue
        assert (row["url"], row["caption"], row["status"], row["detail"]) == (*pair, "ok", "")
        assert float(row["similarity"]) == pytest.approx(cosine, abs=1e-5), pair
        assert float(row["dissimilarity"]) == pytest.approx(1 - cosine, abs=1e-5), pair
        assert row["truncated"] == str(was_cut).lower(), pair
        chance = 1 / (1 + math.exp(-(math.exp(scale) * cosine + bias)))
        assert float(row["probability"]) == pytest.approx(chance, rel=2e-3) if siglip else row["probability"] == ""


@pytest.mark.parametrize("name", SCORED)
def test_exact_preprocessing_is_bit_for_bit(name, references, images, scorers, shelf, monkeypatch):
    """With `preprocess: exact` the model gets the very numbers that its own processor makes on Pillow."""
    scorer, seen = scorers(shelf(name), preprocess="exact", dtype="float32"), []
    original = scorer.family.model.get_image_features
    monkeypatch.setattr(scorer.family.model, "get_image_features", lambda pixel_values: seen.append(pixel_values) or original(
        pixel_values=pixel_values))
    paths = sorted(images.iterdir())
    scorer.similarity(paths, ["cat"] * len(paths))
    assert len(seen) == 1
    for path, got in zip(paths, seen[0], strict=True):
        with Image.open(path) as image:
            wanted = references(name).images(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(got, wanted), path.name


@pytest.mark.parametrize("size", [(1, 41), (41, 1), (2, 1001), (13, 301), (403, 20)])
def test_exact_preprocessing_of_strips(size, noise, references, scorers, shelf):
    """Pictures far longer than wide, whose centre alone the model sees, score as transformers scores them."""
    name, strip = "clip-base-patch32", noise(*size)
    scorer = scorers(shelf(name), preprocess="exact", dtype="float32")
    assert scorer.similarity([strip], ["cat"])[0] == pytest.approx(references(name).cosine(strip, "cat"), abs=1e-5)


@pytest.mark.parametrize("name", FOUR_KINDS)
def test_truncated_means_longer_than_the_context(name, scorers, shelf, references):
    """A caption that fills the context to its last token is not truncated, one of one token more is."""
    scorer, reference = scorers(shelf(name), dtype="float32"), references(name)
    context = 77 if name.startswith("clip") else 64
    lengths = {len(reference.tokens("a " * n)["input_ids"][0]): ("a " * n).strip() for n in range(40, 90)}
    fits, over = lengths[context], lengths[context + 1]
    ids, truncated = scorer.tokenize([fits, over, "a"])
    assert truncated == [False, True, False]
    assert [len(row) for row in ids[:2]] == [context, context]


@pytest.mark.parametrize("name", FOUR_KINDS)
def test_truncation_keeps_the_end_of_text(name, scorers, shelf):
    """A caption of 200 words keeps the context's first tokens and ends with the token that the model pools at."""
    scorer = scorers(shelf(name), dtype="float32")
    ids, truncated = scorer.tokenize([" ".join(WORDS * 6), " ".join(WORDS)])
    assert truncated[0]
    assert len(ids[0]) == scorer.family.context_length
    assert ids[0][-1] == {"clip": 49407, "sigl": 1}[name[:4]]
    assert ids[0][:20] == ids[1][:20]


@pytest.mark.parametrize("folder", [BUNDLED, *SCORED], ids=lambda folder: getattr(folder, "name", folder))
def test_every_text_encodes(folder, scorers, shelf):
    """Whatever characters a caption holds, it gets a finite embedding; to CLIP each of its bytes is a known symbol."""
    scorer = scorers(shelf(folder) if isinstance(folder, str) else folder, dtype="float32")
    letters = [chr(i) for i in [*range(1, 0x600), *range(0x2000, 0x2100), *range(0x1F600, 0x1F640), 0xE000, 0xFFFD, 0x10FFFF]]
    captions = ["".join(letters[i:i + 7]) for i in range(0, len(letters), 7)]
    ids, truncated = scorer.tokenize(captions)
    assert torch.isfinite(scorer.encode_texts(ids[::8])).all()
    assert {type(cut) for cut in truncated} == {bool}
    if scorer.family.kind == "clip":
        assert not any(truncated)
        tokenizer = scorer.family.tokenizer
        assert {(row[0], row[-1]) for row in ids} == {(tokenizer.bos_token_id, tokenizer.eos_token_id)}
        for caption, row in zip(captions, ids, strict=True):
            assert spelt(tokenizer, row[1:-1]) == spaceless(caption), ascii(caption)


BYTES = {symbol: byte for byte, symbol in bytes_to_unicode().items()}


def spelt(tokenizer, ids):
    """The text that CLIP tokens stand for, byte by byte, without white space."""
    symbols = "".join(token.removesuffix("</w>") for token in tokenizer.convert_ids_to_tokens(ids))
    return bytes(BYTES[symbol] for symbol in symbols).decode()


def spaceless(caption):
    """A caption as CLIP's tokenizer normalises it, without white space (U+001C to U+001F are none to it, unlike Python)."""
    lower = "".join(letter.lower() for letter in unicodedata.normalize("NFC", caption))
    return "".join(letter for letter in lower if not letter.isspace() or letter in "\x1c\x1d\x1e\x1f")


def test_the_bundled_model_pools_at_the_end_of_text(scorers):
    """shapes_clip's text embedding is its state at end-of-text, also for emoji, unknown words and long captions."""
    scorer = scorers(BUNDLED, dtype="float32")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(BUNDLED)
    model = transformers.CLIPModel.from_pretrained(BUNDLED, dtype=torch.float32, attn_implementation="eager").eval()
    captions = ["a red circle", "zebra 🦓 quux", "🎉", "a small red circle left of a large blue square on black " * 3]
    got = scorer.encode_texts(scorer.tokenize(captions)[0])
    for caption, row in zip(captions, got, strict=True):
        ids = tokenizer([caption], truncation=True, return_tensors="pt")["input_ids"]
        assert ids[0, -1] == tokenizer.eos_token_id
        with torch.inference_mode():
            state = model.text_model(input_ids=ids).last_hidden_state[0, -1]
            wanted = torch.nn.functional.normalize(model.text_projection(state), dim=-1)
        assert (row - wanted).abs().max() < 1e-6, caption


def test_special_tokens_in_a_caption_are_text(scorers, shelf):
    """`<|endoftext|>` or `</s>` inside a caption is spelt out, and what follows it still counts."""
    for name, token in (("clip-base-patch32", "<|endoftext|>"), ("siglip-base", "</s>"), ("siglip2-base", "<eos>")):
        scorer = scorers(shelf(name), dtype="float32")
        rows = scorer.encode_texts(scorer.tokenize([f"a cat {token} and a dog", f"a cat {token} on a sofa"])[0])
        assert (rows[0] - rows[1]).abs().max() > 1e-3, name
        assert scorer.tokenize([f"a cat {token} dog"])[0][0].count(scorer.family.tokenizer.eos_token_id) == 1, name


def test_capitals_do_not_count(scorers, shelf):
    """Every family reads a caption in lower case, also SigLIP 2, whose tokenizer leaves capitals alone."""
    for name in FOUR_KINDS:
        scorer = scorers(shelf(name), dtype="float32")
        ids = scorer.tokenize(["A Photo Of ÄPFEL", "a photo of äpfel"])[0]
        assert ids[0] == ids[1], name


def test_an_image_processor_called_fast_loads(shelf, tmp_path, scorers, noise):
    """A repository that names the old `...ImageProcessorFast` gives the same scores as one that names the plain class."""
    folder = shelf.copy("siglip2-base", tmp_path / "model")
    change_config(folder, lambda c: c.update(image_processor_type="SiglipImageProcessorFast"), "preprocessor_config.json")
    keys = {"dtype": "float32", "preprocess": "exact"}
    ours, plain = scorers(folder, **keys), scorers(shelf("siglip2-base"), **keys)
    assert ours.similarity([noise(50, 40)], ["cat"]) == plain.similarity([noise(50, 40)], ["cat"])


# ── Fast ways are as good ─────────────────────────────────────────────────────────────────────────────────────────────

def read_pairs(table, folder, limit):
    """Paths and captions of the first rows of a bundled table whose images are there."""
    with open(ROOT / table, encoding="utf-8", newline="") as file:
        rows = [(ROOT / folder / row["url"].rsplit("/", 1)[-1], row["caption"]) for row in csv.DictReader(file)]
    rows = [row for row in rows if row[0].is_file()][:limit]
    assert len(rows) > 10
    return zip(*rows, strict=True)


@pytest.mark.parametrize(("table", "folder"), [("shapes.csv", "shapes"), ("challenge_set.csv", "photos")])
def test_fast_preprocessing_moves_no_score_by_more_than_two_thousandths(table, folder, scorers):
    """On the bundled photographs and drawings `fast` differs from `exact` (it is another kernel), by 0.002 at most."""
    paths, captions = read_pairs(f"challenge_set/{table}", f"challenge_set/{folder}", 80)
    fast, exact = (scorers(BUNDLED, dtype="float32", preprocess=way).similarity(paths, captions) for way in ("fast", "exact"))
    assert np.abs(fast - exact).max() <= 2e-3
    if folder == "photos":  # drawings are not resized, so nothing moves
        assert np.abs(fast - exact).max() > 0


def test_bfloat16_moves_few_scores_by_more_than_a_hundredth(scorers):
    """In bfloat16 99 of 100 scores of the bundled drawings stay within 0.01 of those in float32."""
    paths, captions = read_pairs("challenge_set/shapes.csv", "challenge_set/shapes", 100)
    half, full = (scorers(BUNDLED, dtype=dtype).similarity(paths, captions) for dtype in ("bfloat16", "float32"))
    assert 0 < np.quantile(np.abs(half - full), 0.99) <= 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["siglip-base", "siglip2-base"])
def test_half_precision_does_not_round_scale_and_bias(name, dtype, scorers, shelf):
    """The two numbers that make a cosine a probability stay float32: in bfloat16 a scale of 117.35 would become 115.58."""
    half = scorers(shelf(name), dtype=dtype).family
    full = scorers(shelf(name), dtype="float32").family
    assert (half.scale, half.bias) == pytest.approx((full.scale, full.bias), rel=1e-6)
    assert half.probabilities(np.float32([0.1, 0.12])) == pytest.approx(full.probabilities(np.float32([0.1, 0.12])), rel=1e-5)


@pytest.mark.parametrize("name", ["clip-new-eos", "clip-base-patch32", "clip-laion-g"])
def test_trimming_captions_changes_nothing(name, scorers, shelf):
    """CLIP captions padded to the longest of a batch give the embeddings of captions padded to the whole context."""
    scorer = scorers(shelf(name), dtype="float32", batch_size=5)
    ids, _ = scorer.tokenize(CAPTIONS)
    whole = torch.tensor([row + [scorer.family.tokenizer.pad_token_id] * (77 - len(row)) for row in ids])
    with torch.inference_mode():
        wanted = torch.nn.functional.normalize(scorer.family.model.get_text_features(input_ids=whole).pooler_output, dim=-1)
    assert len({len(row) for row in ids}) > 10
    assert (scorer.encode_texts(ids) - wanted).abs().max() <= 1e-6


def test_images_and_captions_that_come_again_are_encoded_once(run_main, write_config, write_table, read_table, tmp_path,
                                                                noise, scorers, monkeypatch):
    """Repeated URLs, equal files under other names and repeated captions cost one encoding, and score as if encoded each."""
    (tmp_path / "pictures").mkdir()
    noise(70, 50, seed=1).save(tmp_path / "pictures/a.png")
    noise(60, 90, seed=2).save(tmp_path / "pictures/b.png")
    (tmp_path / "pictures/twin-of-a.png").write_bytes((tmp_path / "pictures/a.png").read_bytes())
    rows = [(file, caption) for caption in ("a red circle", "a blue square", "a red circle")
            for file in ("a.png", "b.png", "twin-of-a.png", "a.png")]
    counts = {"encode_images": 0, "encode_texts": 0}
    for method in counts:
        original = getattr(script.Scorer, method)

        def counted(self, batch, *clock, method=method, original=original):
            counts[method] += len(batch)
            return original(self, batch, *clock)
        monkeypatch.setattr(script.Scorer, method, counted)
    outcome = run_main("--config", write_config(csv_path=str(write_table([("url", "caption"), *rows])),
                                                pretrained_model=str(BUNDLED)))
    assert outcome.code == 0, outcome.stderr
    assert counts == {"encode_images": 2, "encode_texts": 2}
    for (file, caption), row in zip(rows, read_table(tmp_path / "out/scores.csv"), strict=True):
        alone = scorers(BUNDLED).similarity([tmp_path / "pictures" / file], [caption])[0]
        assert float(row["similarity"]) == pytest.approx(float(alone), abs=1e-6)


@pytest.mark.parametrize("name", FOUR_KINDS)
def test_a_score_does_not_depend_on_its_neighbours(name, scorers, shelf, images, pairs):
    """A pair scored alone, among others, and in another order differs by rounding only, by 1e-6 at most."""
    paths, captions = [images / file for file, _ in pairs], [caption for _, caption in pairs]
    together = scorers(shelf(name), dtype="float32").similarity(paths, captions)
    backwards = scorers(shelf(name), dtype="float32", batch_size=5).similarity(paths[::-1], captions[::-1])[::-1]
    alone = [scorers(shelf(name), dtype="float32").similarity([paths[i]], [captions[i]])[0] for i in range(0, len(paths), 3)]
    assert np.abs(together - backwards).max() <= 1e-6
    assert np.abs(together[::3] - alone).max() <= 1e-6


# ── The Python API ────────────────────────────────────────────────────────────────────────────────────────────────────

def test_the_api_takes_images_and_paths(write_config, images, shelf, references):
    """`Scorer(load_config(path)).similarity` gives float32 cosines for PIL images, Paths and strings, mixed and lazily."""
    scorer = script.Scorer(script.load_config(write_config(pretrained_model=str(shelf("clip-new-eos")), preprocess="exact")))
    paths = sorted(images.iterdir())
    opened = [Image.open(path) for path in paths]
    mixed = [(str(path), path, image)[i % 3] for i, (path, image) in enumerate(zip(paths, opened, strict=True))]
    captions = CAPTIONS[:len(paths)]
    by_path, by_image = scorer.similarity(paths, captions), scorer.similarity(opened, captions)
    assert (by_path.dtype, by_path.shape) == (np.float32, (len(paths),))
    assert np.array_equal(by_path, by_image)
    assert np.array_equal(by_path, scorer.similarity(iter(mixed), iter(captions)))
    wanted = [references("clip-new-eos").cosine(image, caption) for image, caption in zip(opened, captions, strict=True)]
    assert by_path == pytest.approx(wanted, abs=1e-5)


def test_the_api_wants_as_many_captions_as_images(scorers, noise):
    """Lists of different lengths are a ValueError that gives both lengths."""
    with pytest.raises(ValueError, match="2 images but 1 captions"):
        scorers(BUNDLED).similarity([noise(9, 9), noise(9, 9)], ["one"])
    with pytest.raises(ValueError, match="0 images but 1 captions"):
        scorers(BUNDLED).similarity([], ["one"])


def test_the_api_takes_nothing_for_nothing(scorers):
    """No pairs give an empty float32 array."""
    assert (scorers(BUNDLED).similarity([], []).shape, scorers(BUNDLED).similarity([], []).dtype) == ((0,), np.float32)


def test_the_caption_template_is_filled(scorers, run_main, shapes, read_table, tmp_path):
    """`caption_template` is what the model reads, with the caption in place of {}; from Python and from the command line."""
    paths, captions = read_pairs("challenge_set/shapes.csv", "challenge_set/shapes", 12)
    template = "a photo of {}, 100 %"
    filled = scorers(BUNDLED, caption_template=template).similarity(paths, captions)
    assert np.array_equal(filled, scorers(BUNDLED).similarity(paths, [f"a photo of {caption}, 100 %" for caption in captions]))
    assert not np.array_equal(filled, scorers(BUNDLED).similarity(paths, captions))
    assert run_main("--config", shapes(pretrained_model=str(BUNDLED), rows=12, caption_template=template)).code == 0
    rows = read_table(tmp_path / "out/scores.csv")
    assert [float(row["similarity"]) for row in rows] == pytest.approx(filled, abs=1e-6)
    assert [row["caption"] for row in rows] == list(captions)


def test_the_api_says_why_an_image_cannot_be_read(scorers, tmp_path):
    """A file that is no image raises RowFailure with its status."""
    (tmp_path / "page.png").write_text("<html></html>")
    with pytest.raises(script.RowFailure) as failure:
        scorers(BUNDLED).similarity([tmp_path / "page.png"], ["a"])
    assert failure.value.status == "not_image"


# ── Numbers that are none ─────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_caption_without_a_finite_embedding_is_non_finite(dtype, shelf, tmp_path, run_main, shapes, read_table):
    """Rows whose caption the model answers with NaN get the status non_finite and no numbers; the others are scored."""
    folder = shelf.copy(BUNDLED, tmp_path / "model")
    red = transformers.CLIPTokenizer.from_pretrained(folder).convert_tokens_to_ids("red</w>")

    def poison(weights):
        weights["text_model.embeddings.token_embedding.weight"][red] = math.nan
    change_weights(folder, poison)
    outcome = run_main("--config", shapes(pretrained_model=str(folder), dtype=dtype, rows=60))
    rows = read_table(tmp_path / "out/scores.csv")
    poisoned = ["red" in row["caption"].split() for row in rows]
    assert outcome.code == 0, outcome.stderr
    assert outcome.result["failed"] == {"non_finite": sum(poisoned)}
    assert 0 < sum(poisoned) < len(rows) == outcome.result["scored"] + sum(poisoned)
    for row, bad in zip(rows, poisoned, strict=True):
        assert row["status"] == ("non_finite" if bad else "ok")
        assert (row["similarity"] == row["dissimilarity"] == row["truncated"] == "") is bad


def test_a_model_that_gives_no_number_at_all_ends_well(shelf, tmp_path, run_main, shapes):
    """With a NaN in the image tower every row is non_finite, the mean is null, and the run still ends with exit 0."""
    folder = shelf.copy(BUNDLED, tmp_path / "model")
    change_weights(folder, lambda weights: weights["visual_projection.weight"].fill_(math.nan))
    outcome = run_main("--config", shapes(pretrained_model=str(folder), rows=20))
    assert outcome.code == 0, outcome.stderr
    assert outcome.result["failed"] == {"non_finite": 20}
    assert outcome.result["mean_similarity"] is None


def test_what_overflows_in_half_precision_is_done_again_in_float32(shelf, tmp_path, scorers):
    """Embeddings beyond float16's range are computed in float32 instead of being lost."""
    folder = shelf.copy(BUNDLED, tmp_path / "model")
    change_weights(folder, lambda weights: weights["text_projection.weight"].mul_(20_000))
    paths, captions = read_pairs("challenge_set/shapes.csv", "challenge_set/shapes", 20)
    half, full = scorers(folder, dtype="float16"), scorers(folder, dtype="float32")
    with torch.inference_mode():
        raw = half.family.model.get_text_features(input_ids=torch.tensor([half.tokenize([captions[0]])[0][0]])).pooler_output
    assert not torch.isfinite(raw).all(), "nothing overflows, so this test shows nothing"
    assert half.similarity(paths, captions) == pytest.approx(full.similarity(paths, captions), abs=5e-3)


# ── On a GPU ──────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def cuda():
    """Skip where torch has no CUDA device."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device here")


@pytest.fixture
def true_float32():
    """TF32 off, so that float32 on the GPU means float32."""
    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.parametrize("name", FOUR_KINDS)
@pytest.mark.usefixtures("cuda", "true_float32")
def test_a_gpu_in_float32_scores_as_the_cpu_does(name, shelf, scorers, images, pairs):
    """CUDA in float32 differs from the CPU by 1e-4 at most."""
    paths, captions = [images / file for file, _ in pairs], [caption for _, caption in pairs]
    gpu = script.Scorer(script.Config(pretrained_model=str(shelf(name)), use_cuda=True, dtype="float32"))
    assert gpu.device == "cuda"
    cpu = scorers(shelf(name), dtype="float32")
    assert np.abs(gpu.similarity(paths, captions) - cpu.similarity(paths, captions)).max() <= 1e-4


@pytest.mark.usefixtures("cuda")
def test_a_gpu_that_has_bfloat16_uses_it():
    """`dtype: auto` means bfloat16 on a GPU of compute capability 8 or above, and its scores stay near the CPU's."""
    if torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("this GPU has no bfloat16")
    paths, captions = read_pairs("challenge_set/shapes.csv", "challenge_set/shapes", 200)
    gpu, cpu = (script.Scorer(script.Config(pretrained_model=str(BUNDLED), use_cuda=use)) for use in (True, False))
    assert (gpu.device, gpu.dtype, gpu.family.model.dtype) == ("cuda", "bfloat16", torch.bfloat16)
    assert np.quantile(np.abs(gpu.similarity(paths, captions) - cpu.similarity(paths, captions)), 0.99) <= 1e-2


@pytest.mark.usefixtures("cuda")
def test_the_default_model_fits_a_4_gb_gpu(tmp_path, noise):
    """ViT-B/32 in its published shape, with the batch size that is found for it, stays within 4 GB of GPU memory."""
    from bench_work import write_clip
    write_clip(tmp_path / "clip-b32", "clip-b32")
    four_gb = 4 * 10**9
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(min(1.0, four_gb / torch.cuda.get_device_properties(0).total_memory))
    try:
        scorer = script.Scorer(script.Config(pretrained_model=str(tmp_path / "clip-b32"), use_cuda=True))
        scorer.batch_size = batch_size.find_batch_size(scorer)
        count = 2 * scorer.batch_size + 1
        scores = scorer.similarity([noise(224, 224)] * count, [f"caption {i}" for i in range(count)])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(scores) == count and np.isfinite(scores).all()
    assert torch.cuda.max_memory_reserved() <= four_gb


def test_without_a_gpu_use_cuda_warns_and_runs_on_the_cpu(capfd, monkeypatch):
    """`use_cuda: true` on a machine without CUDA says so in one line and scores in float32 on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    scorer = script.Scorer(script.Config(pretrained_model=str(BUNDLED), use_cuda=True))
    assert (scorer.device, scorer.dtype) == ("cpu", "float32")
    said = capfd.readouterr().err
    assert said.startswith("warning: ")
    assert said.count("\n") == 1


# ── Values known from the published weights ───────────────────────────────────────────────────────────────────────────

@pytest.fixture
def coco_image():
    """COCO val2017 000000039769 (two cats on a sofa), where this machine has it and may ask the Hub for weights."""
    if os.environ.get("IMAGE_TEXT_SIM_HUB") != "1":
        pytest.skip("needs huggingface.co: run with IMAGE_TEXT_SIM_HUB=1 and COCO_39769=<path of val2017/000000039769.jpg>")
    path = pathlib.Path(os.environ.get("COCO_39769", ""))
    if not path.is_file():
        pytest.skip("COCO_39769 does not name val2017/000000039769.jpg (images.cocodataset.org/val2017/000000039769.jpg)")
    return path


@pytest.mark.hub
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("model", "scale", "bias", "logits"), [
    ("openai/clip-vit-base-patch32", 100.0, 0.0, {"a photo of a cat": 24.5701, "a photo of a dog": 19.3049}),
    ("google/siglip-base-patch16-224", 117.3308, -12.9324, {"a photo of 2 cats": -0.7567, "a photo of 2 dogs": -10.3354}),
])
def test_published_weights_give_the_published_values(model, scale, bias, logits, coco_image, run_cli, write_config,
                                                     write_table, read_table, tmp_path):
    """The logits that transformers' own tests expect of the published weights, from a run with exact preprocessing."""
    table = write_table([("url", "caption"), *((coco_image.name, caption) for caption in logits)])
    config = write_config(csv_path=str(table), image_path=str(coco_image.parent), pretrained_model=model, preprocess="exact",
                          dtype="float32")
    outcome = run_cli("--config", config, timeout=1800, env={"HF_HUB_OFFLINE": None})
    assert outcome.code == 0, outcome.stderr
    for row, logit in zip(read_table(tmp_path / "out/scores.csv"), logits.values(), strict=True):
        assert float(row["similarity"]) * scale + bias == pytest.approx(logit, abs=0.02)
        with contextlib.suppress(ValueError):  # SigLIP's probability; CLIP has none
            assert math.log(float(row["probability"]) / (1 - float(row["probability"]))) == pytest.approx(logit, abs=0.02)
