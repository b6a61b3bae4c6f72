"""A row's score is that of its own caption: unknown captions are told, trained words stay whole, HTML entities are counted."""
import json
import pathlib

import pytest
import torch
import transformers
from models import ARCHITECTURES, change_config, change_weights
from PIL import Image

import image_text_sim_clip as script
from addons.loss import DissimilarityLoss
from addons.measures import passport

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUNDLED = str(ROOT / "challenge_set/shapes_clip")
THREE_KINDS = ["clip-base-patch32", "siglip-base", "siglip2-base"]


@pytest.fixture
def score(run_main, write_config, write_table, read_table, tmp_path, noise):
    """Score one image with each of some captions: (Outcome, rows of scores.csv, profile.json)."""
    def run(captions, *arguments, **keys):
        table = write_table([("url", "caption"), *(("a.png", caption) for caption in captions)])
        config = write_config(csv_path=str(table), **keys)
        noise(90, 64).save(tmp_path / "pictures/a.png")
        outcome = run_main("--config", config, *arguments)
        assert outcome.code == 0, outcome.stderr
        return outcome, read_table(tmp_path / "out/scores.csv"), json.loads((tmp_path / "out/profile.json").read_text())
    return run


def tokens_of_transformers(folder, caption, family):
    """The ids that transformers itself gives a caption, which was lower-cased by hand for SigLIP 2."""
    kinds = {"clip": transformers.CLIPTokenizer, "siglip": transformers.SiglipTokenizer, "siglip2": transformers.GemmaTokenizer}
    tokenizer = kinds[family].from_pretrained(folder)
    return tokenizer([caption.lower() if family == "siglip2" else caption], padding=False)["input_ids"][0]


# ── Captions that the tokenizer does not know ─────────────────────────────────────────────────────────────────────────

NOTHING_LEFT = ["!!!", "...", "?!", "---", "(.)", "#_#"]
ALL_UNKNOWN = ["两只猫在沙发上", "ДВЕ КОШКИ", "😀🐈", "قطتان", "一辆 旧 自行车", "🎉!!!🎉", "ñ Ж 猫"]


@pytest.mark.slow
def test_a_caption_that_the_tokenizer_does_not_know_gets_no_score(shelf, score):
    """SigLIP has no byte symbols: what is all unknown to it, or all cleaned away, is empty_caption and says why."""
    known = ["two cats", "a 猫 on a sofa"]
    outcome, rows, _ = score([*NOTHING_LEFT, *ALL_UNKNOWN, *known], pretrained_model=str(shelf("siglip-base")))
    status = {row["caption"]: (row["status"], row["detail"], row["similarity"] != "") for row in rows}
    for caption in NOTHING_LEFT:
        assert status[caption] == ("empty_caption", "the tokenizer leaves nothing of it", False)
    for caption in ALL_UNKNOWN:
        assert status[caption] == ("empty_caption", "the tokenizer knows nothing of it", False)
    for caption in known:
        assert status[caption] == ("ok", "", True)
    assert outcome.result["failed"] == {"empty_caption": len(NOTHING_LEFT) + len(ALL_UNKNOWN)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip-base-patch32", "siglip2-base", "clip-new-eos"])
def test_a_tokenizer_with_byte_symbols_knows_every_caption(name, shelf, score):
    """CLIP and SigLIP 2 spell what they do not know in bytes: the same captions get scores, each its own."""
    captions = [*NOTHING_LEFT[:3], *ALL_UNKNOWN]
    outcome, rows, profile = score(captions, pretrained_model=str(shelf(name)))
    assert outcome.result["scored"] == len(captions)
    assert len({row["similarity"] for row in rows}) == len(captions)
    assert profile["captions"]["partly_unknown"] == 0


@pytest.mark.slow
def test_a_template_does_not_hide_an_unknown_caption(shelf, score):
    """With "a photo of {}" a caption is judged without the template, which the tokenizer knows."""
    _, rows, _ = score(["两只猫", "!!!", "cats"], pretrained_model=str(shelf("siglip-base")), caption_template="a photo of {}")
    assert [row["status"] for row in rows] == ["empty_caption", "empty_caption", "ok"]


@pytest.mark.slow
def test_partly_unknown_captions_are_counted(shelf, score):
    """Captions with some unknown tokens are scored, counted in profile.json and told in the summary."""
    captions = ["two cats", "two 猫", "a dog 🎉", "Жa cat", "two cats"]
    outcome, rows, profile = score(captions, pretrained_model=str(shelf("siglip-base")), partition_rows=2)
    assert [row["status"] for row in rows] == ["ok"] * 5
    assert profile["captions"] == {"partly_unknown": 3, "with_html_entities": 0}
    assert "captions  3 partly unknown to the tokenizer" in outcome.stderr


@pytest.mark.slow
def test_only_unknown_captions(shelf, score):
    """A partition in which the tokenizer knows no caption is finished like any other."""
    outcome, rows, _ = score(ALL_UNKNOWN, pretrained_model=str(shelf("siglip-base")), save_embeddings="float32")
    assert outcome.result["failed"] == {"empty_caption": len(ALL_UNKNOWN)}
    assert len(rows) == len(ALL_UNKNOWN)


@pytest.mark.slow
def test_unknown_captions_are_no_random_captions(shelf, score):
    """The other rows' scores, and what they are compared with, are as if the unknown captions were not there."""
    known = ["two cats", "a dog in the snow", "mountains by the sea"]
    keys = {"pretrained_model": str(shelf("siglip-base")), "parity_rows": 0}
    alone = score(known, "--fresh", **keys)
    among = score([*known, "两只猫", "!!!"], "--fresh", **keys)
    assert [row["similarity"] for row in among[1][:3]] == [row["similarity"] for row in alone[1]]
    assert [row["random_percentile"] for row in among[1][:3]] == [row["random_percentile"] for row in alone[1]]


@pytest.mark.slow
def test_what_is_read_decides(shelf, score):
    """A caption whose first 64 tokens are all unknown is not saved by a known word that is cut off."""
    _, rows, _ = score(["猫 " * 70 + "cat", "猫 " * 10 + "cat"], pretrained_model=str(shelf("siglip-base")))
    assert [row["status"] for row in rows] == ["empty_caption", "ok"]


# ── Words that were added to a tokenizer ──────────────────────────────────────────────────────────────────────────────

def add_words(folder, *words, special=True):
    """Add words to a model folder's tokenizer and trained embeddings for them to its model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    before = max(tokenizer.get_vocab().values()) + 1
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(words)})
    else:
        tokenizer.add_tokens(list(words))
    tokenizer.save_pretrained(folder)
    name = "text_model.embeddings.token_embedding.weight"
    size = before + len(words)

    def grow(weights):
        rows = torch.randn(size - len(weights[name]), weights[name].shape[1], generator=torch.Generator().manual_seed(1))
        weights[name] = torch.cat([weights[name], rows])
    change_weights(folder, grow)
    change_config(folder, lambda config: config["text_config"].update(vocab_size=size))
    if tokenizer.eos_token == "<|endoftext|>":  # no longer the largest id, at which CLIP's old configs have it pooled
        change_config(folder, lambda config: config["text_config"].update(eos_token_id=49407))
    return folder


WITH_WORDS = ["a photo of <my-cat> on a sofa", "<my-cat>", "two<my-cat>cats", "<my-cat> <my-dog> <my-cat>", "<my-dog>, a dog",
              "A Photo Of <my-cat>", "🎉 <my-cat> 猫", "a photo of two cats"]


@pytest.fixture
def with_words(shelf, tmp_path):
    """A function that gives a copy of an architecture with <my-cat> and <my-dog> added."""
    def make(name, special=True, words=("<my-cat>", "<my-dog>")):
        return add_words(shelf.copy(name, tmp_path / "with-words"), *words, special=special)
    return make


@pytest.mark.slow
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", THREE_KINDS)
def test_added_words_stay_whole(name, special, with_words):
    """A trained word, added as a special token or as a plain one, is the one token that transformers reads."""
    folder = with_words(name, special)
    family = ARCHITECTURES[name][1]
    scorer = script.Scorer(script.Config(pretrained_model=str(folder), use_cuda=False))
    word = scorer.family.tokenizer.convert_tokens_to_ids("<my-cat>")
    ids = scorer.tokenize(WITH_WORDS)[0]
    for caption, got in zip(WITH_WORDS, ids, strict=True):
        assert got == tokens_of_transformers(folder, caption, family), caption
        assert got.count(word) == caption.count("<my-cat>")


@pytest.mark.slow
@pytest.mark.parametrize("name", THREE_KINDS)
def test_control_tokens_are_text_next_to_added_words(name, with_words):
    """`<|endoftext|>` and its like are spelt out also in a caption with a trained word, which stays whole."""
    scorer = script.Scorer(script.Config(pretrained_model=str(with_words(name)), use_cuda=False))
    tokenizer = scorer.family.tokenizer
    word = tokenizer.convert_tokens_to_ids("<my-cat>")
    end = tokenizer.eos_token
    captions = [f"<my-cat> {end} and a dog", f"<my-cat>{end}<my-cat>", f"{end}", f"{end} <my-cat> {tokenizer.pad_token}"]
    for caption, ids in zip(captions, scorer.tokenize(captions)[0], strict=True):
        assert ids.count(tokenizer.eos_token_id) == 1, caption
        assert ids[-1] == tokenizer.eos_token_id
        assert ids.count(word) == caption.count("<my-cat>"), caption


@pytest.mark.slow
def test_an_added_word_with_capitals_keeps_them(with_words):
    """SigLIP 2's captions are lower-cased, but not the words that were added with capitals."""
    scorer = script.Scorer(script.Config(pretrained_model=str(with_words("siglip2-base", words=("<MyCat>",))), use_cuda=False))
    word = scorer.family.tokenizer.convert_tokens_to_ids("<MyCat>")
    got, lower = scorer.tokenize(["A Photo Of <MyCat>", "a photo of <MyCat>"])[0]
    assert word in got
    assert got == lower


@pytest.mark.slow
@pytest.mark.parametrize("name", THREE_KINDS)
def test_scores_of_added_words_are_those_of_transformers(name, with_words, score):
    """A run scores a caption with a trained word as transformers does, and the score passport agrees."""
    folder = with_words(name)
    _, rows, profile = score(WITH_WORDS, pretrained_model=str(folder), preprocess="exact", dtype="float32", parity_rows=8)
    assert [row["status"] for row in rows] == ["ok"] * len(rows)
    family = ARCHITECTURES[name][1]
    kinds = {"clip": transformers.CLIPModel}
    model = kinds.get(family, transformers.SiglipModel).from_pretrained(folder, dtype=torch.float32).eval()
    images = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    padding = transformers.AutoTokenizer.from_pretrained(folder).pad_token_id
    with Image.open(folder.parent / "pictures/a.png") as image:
        pixels = images(image.convert("RGB"), return_tensors="pt")
    for row in rows:
        ids = tokens_of_transformers(folder, row["caption"], family)
        if family != "clip":
            ids += [padding] * (64 - len(ids))
        with torch.inference_mode():
            image_part = model.get_image_features(**pixels).pooler_output
            text_part = model.get_text_features(input_ids=torch.tensor([ids])).pooler_output
            cosine = torch.nn.functional.cosine_similarity(image_part, text_part).item()
        assert float(row["similarity"]) == pytest.approx(cosine, abs=1e-5), row["caption"]
    assert profile["passport"]["rows"] == 8
    assert profile["passport"]["max_difference"] < 1e-5


@pytest.mark.slow
def test_an_added_word_without_an_embedding_is_refused(shelf, tmp_path):
    """A special token that the tokenizer gives and the model has no embedding for is exit 6, not an IndexError at its row."""
    folder = shelf.copy("clip-base-patch32", tmp_path / "a-model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<my-cat>"]})
    tokenizer.save_pretrained(folder)
    with pytest.raises(script.Trouble, match="do not belong together") as trouble:
        script.Scorer(script.Config(pretrained_model=str(folder), use_cuda=False))
    assert trouble.value.exit_code == 6


# ── The score passport sees faults ────────────────────────────────────────────────────────────────────────────────────

def lose_a_token(encode):
    """A fault: the first token of each caption is lost."""
    return lambda self, captions, **options: [ids[:1] + ids[2:] for ids in encode(self, captions, **options)]


def shout(prepare):
    """A fault: words are put behind each caption."""
    return lambda self, captions, **options: prepare(self, [f"{caption} red red red" for caption in captions], **options)


def spell_words(encode):
    """A fault: special tokens that were trained are taken apart."""
    def spelt(self, captions, **options):
        return self.tokenizer(captions, split_special_tokens=True, return_attention_mask=False, **options)["input_ids"]
    return spelt


@pytest.mark.parametrize("fault", [lose_a_token, shout])
def test_the_passport_sees_a_fault_of_our_tokenizing(fault, shapes, run_main, tmp_path, monkeypatch):
    """Captions that are taken apart wrongly show in the score passport, which does it by itself."""
    monkeypatch.setattr(script.Family, "encode", fault(script.Family.encode))
    outcome = run_main("--config", shapes(pretrained_model=BUNDLED, rows=30, max_score_drift=0.005))
    assert outcome.code == script.EXIT_VERIFY
    assert json.loads((tmp_path / "out/profile.json").read_text())["passport"]["max_difference"] > 0.005


@pytest.mark.slow
def test_the_passport_sees_words_taken_apart(with_words, score, monkeypatch):
    """A trained word that is spelt shows in the score passport."""
    folder = with_words("clip-base-patch32")
    monkeypatch.setattr(script.Family, "_find_whole_words", lambda self: None)
    monkeypatch.setattr(script.Family, "encode", spell_words(None))
    _, _, profile = score(WITH_WORDS, pretrained_model=str(folder), preprocess="exact", parity_rows=8)
    assert profile["passport"]["max_difference"] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", THREE_KINDS)
def test_the_passport_reads_control_tokens_as_text(name, shelf, score):
    """A caption with `<|endoftext|>` in it, or its like, agrees with its reference: both spell it."""
    captions = ["a cat <|endoftext|> and a dog", "a cat </s> and a dog", "a cat <eos> and a dog", "a <unk> dog", "two cats"]
    _, rows, profile = score(captions, pretrained_model=str(shelf(name)), preprocess="exact", dtype="float32", parity_rows=8)
    assert [row["status"] for row in rows] == ["ok"] * 5
    assert profile["passport"]["rows"] == 5
    assert profile["passport"]["max_difference"] < 1e-5


@pytest.mark.slow
def test_a_caption_with_both_is_not_scored_twice(with_words, score):
    """A control token and a trained word in one caption: transformers has no way to read it as it is meant, so no reference."""
    captions = ["<my-cat> <|endoftext|> x", "a cat"]
    _, rows, profile = score(captions, pretrained_model=str(with_words("clip-base-patch32")), parity_rows=8)
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert profile["passport"]["rows"] == 1


def test_the_passport_has_a_tokenizer_of_its_own(monkeypatch):
    """The reference's ids come from a tokenizer that the scorer has never touched."""
    scorer = script.Scorer(script.Config(pretrained_model=BUNDLED, use_cuda=False))
    expected = scorer.tokenize(["a large red circle"])[0][0]
    reference = passport.Reference(scorer)
    monkeypatch.setattr(scorer.family, "tokenizer", None)
    ids = reference._prepare_caption("a large red circle")
    assert ids[:len(expected)] == expected
    assert len(ids) == scorer.family.context_length


# ── HTML in captions ──────────────────────────────────────────────────────────────────────────────────────────────────

ENTITIES = {"Tom &amp; Jerry": "Tom & Jerry", "a dog &amp;amp; a cat": "a dog & a cat", "caf&eacute;": "café",
            "it&#39;s a cat": "it's a cat", "&quot;red&quot;": '"red"', "&#x1F408; on a sofa": "🐈 on a sofa",
            "a &lt;b&gt;dog&lt;/b&gt;": "a <b>dog</b>", "R&D and AT&T": "R&D and AT&T", "a red circle": "a red circle"}


def test_entities_are_counted_and_read_as_they_stand(score):
    """By default captions with HTML entities are scored as they stand, counted, and told with the key that undoes them."""
    outcome, rows, profile = score(ENTITIES, pretrained_model=BUNDLED, partition_rows=4)
    assert [row["caption"] for row in rows] == list(ENTITIES)
    assert profile["captions"]["with_html_entities"] == 7
    assert "7 with HTML entities, read as they stand (caption_clean: unescape)" in outcome.stderr


def test_unescape_reads_what_is_meant(score):
    """`caption_clean: unescape` scores each caption as the one without entities; the columns keep what stood there."""
    _, rows, profile = score(ENTITIES, pretrained_model=BUNDLED, caption_clean="unescape")
    assert [row["caption"] for row in rows] == list(ENTITIES)
    assert profile["captions"]["with_html_entities"] == 0
    _, plain, _ = score(ENTITIES.values(), "--fresh", pretrained_model=BUNDLED)
    assert [row["similarity"] for row in rows] == [row["similarity"] for row in plain]


def test_what_unescapes_to_nothing_is_an_empty_caption(score):
    """A caption of non-breaking spaces in HTML is empty once it is unescaped."""
    _, rows, _ = score(["&nbsp;", "&amp;nbsp; &#160;", "a cat"], pretrained_model=BUNDLED, caption_clean="unescape")
    assert [row["status"] for row in rows] == ["empty_caption", "empty_caption", "ok"]


def test_a_summary_without_entities_says_nothing_of_them(score):
    """Where no caption has an entity there is no line."""
    outcome, _, profile = score(["a & b", "R&D", "x &; y"], pretrained_model=BUNDLED)
    assert profile["captions"] == {"partly_unknown": 0, "with_html_entities": 0}
    assert "captions" not in outcome.stderr


def test_python_and_the_loss_clean_captions_too(noise):
    """`similarity` and `DissimilarityLoss` read a caption as a run does."""
    image = noise(64, 64)
    scorers = {clean: script.Scorer(script.Config(pretrained_model=BUNDLED, use_cuda=False, caption_clean=clean))
               for clean in ("none", "unescape")}
    assert scorers["unescape"].similarity([image], ["a &amp; b"]) == scorers["none"].similarity([image], ["a & b"])
    assert scorers["none"].similarity([image], ["a &amp; b"]) != scorers["none"].similarity([image], ["a & b"])
    losses = {clean: DissimilarityLoss(script.Config(pretrained_model=BUNDLED, use_cuda=False, caption_clean=clean))
              for clean in ("none", "unescape")}
    assert torch.equal(losses["unescape"].encode_captions(["a &amp; b"]), losses["none"].encode_captions(["a & b"]))


def test_another_cleaning_is_another_run(score, run_main, tmp_path):
    """A run is not resumed with another `caption_clean`."""
    score(["a &amp; b"], pretrained_model=BUNDLED)
    outcome = run_main("--config", tmp_path / "config.yaml", "--set", "caption_clean=unescape")
    assert outcome.code == 2
    assert "caption_clean was 'none'" in outcome.stderr


def test_retried_rows_are_counted_once(run_main, write_config, write_table, tmp_path, noise, late):
    """--retry-failed adds what it scores, and counts no entity twice."""
    table = write_table([("url", "caption"), ("a.png", "a &amp; b"), ("late.png", "c &amp; d"), ("a.png", "e")])
    config = write_config(csv_path=str(table), pretrained_model=BUNDLED)
    for name in ("a.png", "late.png"):
        noise(64, 64, seed=len(name)).save(tmp_path / "pictures" / name)
    with late("late.png"):
        assert run_main("--config", config).result["failed"] == {"timeout": 1}
    assert run_main("--config", config, "--retry-failed").result["scored"] == 3
    assert json.loads((tmp_path / "out/profile.json").read_text())["captions"]["with_html_entities"] == 2


def test_sound_captions_are_left_alone():
    """With the default a caption is not touched, whatever stands in it."""
    config = script.Config()
    for caption in [*ENTITIES, "  a  ", "&nbsp;", "x" * 1000]:
        assert script.clean_caption(caption, config) is caption
