"""open_clip's format: what open_clip 3.3.0 said of tiny models with its published switches is what comes out here.

The reference lies in open_clip_reference/, with the script that asked open_clip itself; neither it nor timm, nor torchvision
is needed here.
"""
import json
import math
import shutil

import numpy as np
import open_clip_models as tiny
import pytest
import torch
from safetensors.torch import load_file, save_file

import image_text_sim_clip as script
from addons.models import open_clip_text
from addons.models.open_clip_config import PreprocessConfig, TokenizerConfig
from addons.models.open_clip_images import OpenClipImages, image_settings

EMBEDDINGS = np.load(tiny.REFERENCE / "embeddings.npz")
ODD = tiny.read_reference("captions")
COLOURS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name of a tiny model -> its folder, written once."""
    root = tmp_path_factory.mktemp("open-clip")

    def get(name):
        folder = root / name
        return folder if folder.exists() else tiny.write_model(folder, name)
    return get


@pytest.fixture(scope="module")
def scorers(folders):
    """Name of a tiny model and config keys -> a Scorer, loaded once."""
    made = {}

    def get(name, **keys):
        key = (name, *sorted(keys.items()))
        if key not in made:
            made[key] = script.Scorer(script.Config(pretrained_model=str(folders(name)), use_cuda=False, **keys))
        return made[key]
    return get


# ── Equal to open_clip ────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.MODELS)
def test_embeddings_are_those_of_open_clip(name, scorers):
    """Images and captions prepared and embedded here are open_clip's: token ids equal, pixels equal, embeddings within 1e-5."""
    scorer = scorers(name, preprocess="exact", dtype="float32")
    wanted = {key: EMBEDDINGS[f"{name}/{key}"] for key in ("images", "texts", "logits", "ids", "pixels")}
    images = [tiny.picture(*size, seed) for seed, size in enumerate(tiny.SIZES)]
    pixels = torch.cat([scorer.family.processor(image, return_tensors="pt")["pixel_values"] for image in images])
    assert np.array_equal(pixels[:, :, ::16, ::16].numpy(), wanted["pixels"])
    ids, _ = scorer.tokenize(tiny.CAPTIONS)
    pad = scorer.family.tokenizer.pad_token_id
    rows = np.array([row + [pad] * (scorer.family.context_length - len(row)) for row in ids])
    if name == "clipa":
        rows[rows == scorer.family.tokenizer.sep_token_id] = 0  # as the tower reads it
    assert np.array_equal(rows, wanted["ids"])
    image_units = scorer.encode_images(torch.from_numpy(np.stack([scorer.resize(image) for image in images])))
    text_units = scorer.encode_texts(ids)
    assert np.abs(image_units.numpy() - wanted["images"]).max() <= 1e-5
    assert np.abs(text_units.numpy() - wanted["texts"]).max() <= 1e-5
    logits = image_units @ text_units.T * scorer.family.scale + (scorer.family.bias or 0)
    assert np.abs(logits.numpy() - wanted["logits"]).max() <= 2e-4
    assert wanted["logits"].std() > 0.05, "a reference that says the same of every pair proves nothing"
    chance = scorer.family.probabilities(np.float32([0.1]))
    has_bias = "init_logit_bias" in tiny.MODELS[name][0]["model_cfg"]
    assert (chance is not None) is has_bias
    if has_bias:
        assert chance[0] == pytest.approx(1 / (1 + math.exp(7.5 - 0.1 * math.exp(2.5))), rel=1e-5)


def test_weights_written_anew_while_a_run_goes_on(tmp_path):
    """What is written into the file of weights, by a training run or a download, changes nothing in a model that is loaded."""
    folder = tiny.write_model(tmp_path / "model", "quickgelu")
    path = folder / "open_clip_model.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(path).items()}
    for filling in range(0, 64, 8):  # until weights lie in the file as torch would place them in memory
        save_file(weights, path, metadata={"filling": "." * filling})
        begin = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        if begin % 64 == 0:
            break
    assert begin % 64 == 0
    scorer = script.Scorer(script.Config(pretrained_model=str(folder), use_cuda=False))
    image = tiny.picture(70, 50, 1)
    before = scorer.similarity([image], ["a cat"])
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(np.random.default_rng(1).standard_normal(path.stat().st_size // 8).astype(np.float32).tobytes())
    assert scorer.similarity([image], ["a cat"]) == before
    path.write_bytes(b"")
    assert scorer.similarity([image], ["a cat"]) == before


@pytest.mark.parametrize("variant", ODD["ids"])
def test_odd_captions_become_the_same_tokens(variant, tmp_path):
    """200 odd captions, cleaned and cut, have open_clip's token ids, for its own tokenizer and for those of Hugging Face."""
    length, clean = {"own-lower": (77, "lower"), "own-whitespace": (77, "whitespace"), "own-canonicalize": (32, "canonicalize"),
                     "siglip": (64, "canonicalize"), "siglip2": (64, "canonicalize"), "bert": (32, "whitespace"),
                     "worldwide": (77, "whitespace")}[variant]
    config = TokenizerConfig(length, 49408, "", clean, variant == "bert")
    cleaned = [open_clip_text.find_cleaning(clean, "it")(caption) for caption in ODD["captions"]]
    if variant.startswith("own"):
        tiny.write_bpe(tmp_path)
        tokenizer, _ = open_clip_text.load_byte_tokenizer(tmp_path, "it")
        separator = None
    else:
        tokenizer = open_clip_text.load_hugging_face_tokenizer(tiny.REFERENCE / variant, "it")
        separator = open_clip_text.separator_of(tokenizer, config, "it")
    rows = tokenizer(cleaned, truncation=True, max_length=length)["input_ids"]
    for caption, row, wanted in zip(ODD["captions"], rows, ODD["ids"][variant], strict=True):
        got = [0 if token == separator else token for token in row]
        assert got + [tokenizer.pad_token_id] * (length - len(got)) == wanted, caption
    assert len({tuple(row) for row in rows}) > 150


@pytest.mark.parametrize("steps", tiny.STEPS)
def test_pixels_are_those_of_open_clip(steps, monkeypatch):
    """60 sizes of images, resized, cropped, filled up and normalised as open_clip's transforms do it, to the last bit."""
    frame, keys = tiny.STEPS[steps]
    config = PreprocessConfig(frame, keys["resize_mode"], "bilinear" if keys["interpolation"] == "bilinear" else "bicubic",
                              *COLOURS, keys.get("fill_color", 0))
    processor = OpenClipImages(config)
    compared = 0
    for seed, (size, wanted) in enumerate(zip(tiny.sizes_of_images(), tiny.read_reference("pixels")[steps], strict=True)):
        image = tiny.picture(*size, seed)
        exact = processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0].numpy()
        assert exact.shape == (3, *frame)
        if wanted != "fails":  # open_clip fails where a side becomes 0
            assert tiny.digest(exact) == wanted, size
            compared += 1
        fast = script.resize_fast(image, image_settings(config))
        difference = np.abs(fast.astype(int) - exact)
        assert difference.mean() < 0.5 and (difference <= 2).mean() > 0.98, size
    assert compared >= 59
    whole = np.load(tiny.REFERENCE / "pixels.npz")[steps]
    assert np.array_equal(processor(tiny.picture(*tiny.sizes_of_images()[13], 13))["pixel_values"][0].numpy(), whole)


def test_the_reference_has_every_switch():
    """The tiny models have each word of open_clip's configs that is read here, so that none goes without a proof."""
    from addons.models import open_clip_config as words
    used = {"vision": set(), "text": set()}
    for config, _ in tiny.MODELS.values():
        used["vision"] |= set(config["model_cfg"]["vision_cfg"])
        used["text"] |= set(config["model_cfg"]["text_cfg"])
    beyond = {"attentional_pool", "attn_pooler_queries", "attn_pooler_heads", "block_type", "timm_drop", "timm_drop_path",
              "output_tokens", *words.OTHER_BLOCKS, "embed_cls", "pad_id", "tokenizer_mode"}
    assert {word for word in words.VISION_WORDS - used["vision"] - beyond if "hf_" not in word} == set()
    assert {word for word in words.TEXT_WORDS - used["text"] - beyond if not word.startswith("hf_")} == {"final_ln_after_pool"}
    assert len(tiny.MODELS) >= 12


# ── The same through every way of the program ─────────────────────────────────────────────────────────────────────────

THREE_KINDS = ["quickgelu", "clipa", "siglip"]  # open_clip's own tokenizer, cut to the longest; whole context; a timm tower


@pytest.fixture
def pairs(tmp_path, write_table, write_config):
    """Writes 25 pairs, each image with each caption; pairs(model folder, **keys) is a config of a run over them."""
    (tmp_path / "pictures").mkdir(exist_ok=True)
    for seed, size in enumerate(tiny.SIZES):
        tiny.picture(*size, seed).save(tmp_path / f"pictures/{seed}.png")
    table = write_table([("url", "caption"), *((f"{i}.png", caption) for i in range(5) for caption in tiny.CAPTIONS)])

    def make(folder, **keys):
        return write_config(csv_path=str(table), pretrained_model=str(folder), **{"preprocess": "exact", **keys})
    return make


def expected_cosines(name):
    """open_clip's cosines of those 25 pairs."""
    return (EMBEDDINGS[f"{name}/images"] @ EMBEDDINGS[f"{name}/texts"].T).reshape(-1)


def similarities(read_table, folder):
    return np.array([float(row["similarity"]) for row in read_table(folder / "scores.csv")])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "batch"), [*((name, size) for name in THREE_KINDS for size in (1, 7, 64)),
                                             ("longest", 7), ("worldwide", 7), ("siglip2", 7)])
def test_a_run_scores_what_open_clip_scores(name, batch, folders, pairs, run_main, read_table, tmp_path):
    """Every row of scores.csv is open_clip's cosine within 1e-5, in batches of 1, 7 and 64, and its own probability."""
    outcome = run_main("--config", pairs(folders(name), batch_size=batch, partition_rows=9))
    assert outcome.code == 0, outcome.stderr
    rows = read_table(tmp_path / "out/scores.csv")
    wanted = expected_cosines(name)
    assert np.abs(similarities(read_table, tmp_path / "out") - wanted).max() <= 1e-5
    assert np.ptp(wanted) > 0.03
    chances = 1 / (1 + np.exp(7.5 - wanted * math.exp(2.5)))
    for row, chance in zip(rows, chances, strict=True):
        has_bias = "init_logit_bias" in tiny.MODELS[name][0]["model_cfg"]
        assert float(row["probability"]) == pytest.approx(chance, rel=1e-3) if has_bias else row["probability"] == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", THREE_KINDS)
@pytest.mark.parametrize("keys", [{"quantization": "int8", "runtime": "torch"}, {"dtype": "bfloat16"}, {"preprocess": "fast"}],
                         ids=["int8", "bfloat16", "fast"])
def test_fewer_bits_drift_little(name, keys, folders, pairs, run_main, read_table, tmp_path):
    """int8, bfloat16 and fast preprocessing stay near open_clip's cosines, and the score passport states the same drift."""
    outcome = run_main("--config", pairs(folders(name), parity_rows=25, **keys))
    assert outcome.code == 0, outcome.stderr
    drift = np.abs(similarities(read_table, tmp_path / "out") - expected_cosines(name)).max()
    assert 0 < drift <= 0.05
    passport = json.loads((tmp_path / "out/profile.json").read_text())["passport"]
    assert passport["rows"] == 25
    assert passport["max_difference"] == pytest.approx(drift, abs=2e-5), "the passport's reference is open_clip's score"


@pytest.mark.slow
@pytest.mark.parametrize("name", THREE_KINDS)
def test_saved_embeddings_are_open_clips(name, folders, pairs, run_main, tmp_path):
    """`save_embeddings` keeps the unit vectors that open_clip gives."""
    from addons.measures.embeddings import read_embeddings
    outcome = run_main("--config", pairs(folders(name), save_embeddings="float32"))
    assert outcome.code == 0, outcome.stderr
    kept = read_embeddings(tmp_path / "out/parts/part-00000.npz")
    for row in range(25):
        image = kept["images"][kept["image_of_row"][row]]
        text = kept["texts"][kept["text_of_row"][row]]
        assert np.abs(image - EMBEDDINGS[f"{name}/images"][row // 5]).max() <= 1e-5
        assert np.abs(text - EMBEDDINGS[f"{name}/texts"][row % 5]).max() <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", [*THREE_KINDS, "oblong", "longest"])
def test_the_loss_is_the_score_with_its_gradient(name, folders, scorers):
    """At the model's own size DissimilarityLoss is 1 - open_clip's cosine, and its gradient that of finite differences."""
    from addons.loss import DissimilarityLoss
    loss = DissimilarityLoss(script.Config(pretrained_model=str(folders(name)), use_cuda=False))
    height, width = scorers(name, preprocess="exact", dtype="float32").family.config.preprocess.size
    image = tiny.picture(width, height, 3)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    score = scorers(name, preprocess="exact", dtype="float32").similarity([image], tiny.CAPTIONS[:1])[0]
    assert loss(pixels, tiny.CAPTIONS[:1]).item() == pytest.approx(1 - score, abs=1e-5)
    small = torch.full((1, 3, 3, 4), 0.5, dtype=torch.float64) + 0.1 * torch.rand(1, 3, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda values: loss.double()(values, tiny.CAPTIONS[:1]), small.requires_grad_())


@pytest.mark.slow
def test_the_sigmoid_loss_is_for_models_with_a_bias(folders):
    """`objective: sigmoid` works for SigLIP in open_clip's format and is refused in one line for its CLIP."""
    from addons.loss import DissimilarityLoss
    images = torch.rand(3, 3, 40, 40)
    config = script.Config(pretrained_model=str(folders("siglip")), use_cuda=False)
    assert torch.isfinite(DissimilarityLoss(config, "sigmoid")(images, tiny.CAPTIONS[:3]))
    with pytest.raises(script.Trouble, match="no SigLIP model"):
        DissimilarityLoss(script.Config(pretrained_model=str(folders("quickgelu")), use_cuda=False), "sigmoid")


@pytest.mark.slow
@pytest.mark.parametrize("name", THREE_KINDS)
def test_a_run_is_resumed_and_shared_with_the_same_bytes(name, folders, pairs, run_main, run_cli, tmp_path):
    """A resumed run, and one under torchrun with two ranks, end with the very bytes of one that went through."""
    config = pairs(folders(name), partition_rows=5)
    assert run_main("--config", config).code == 0
    whole = (tmp_path / "out/scores.csv").read_bytes()
    (tmp_path / "out/parts/part-00002.parquet").unlink()
    outcome = run_main("--config", config)
    assert outcome.code == 0, outcome.stderr
    assert (tmp_path / "out/scores.csv").read_bytes() == whole
    shared = run_cli("--config", config, "--set", f"output_path={tmp_path / 'shared'}", timeout=110,
                     interpreter=("-m", "torch.distributed.run", "--nproc-per-node", "2"))
    assert shared.code == 0, shared.stderr
    assert (tmp_path / "shared/scores.csv").read_bytes() == whole


@pytest.mark.slow
def test_compiled_towers_score_the_same(folders, scorers, monkeypatch):
    """`compile` finds the towers of open_clip's models and pads for them; the scores stay."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(type(self).__name__))
    scorer = script.Scorer(script.Config(pretrained_model=str(folders("quickgelu")), use_cuda=False, compile=True))
    assert compiled == ["ImageTower", "TextTower"]
    images = [tiny.picture(*size, seed) for seed, size in enumerate(tiny.SIZES)]
    plain = scorers("quickgelu").similarity(images, tiny.CAPTIONS)
    assert np.abs(scorer.similarity(images, tiny.CAPTIONS) - plain).max() <= 1e-5


@pytest.mark.slow
def test_the_profile_says_what_was_published(folders, pairs, run_main, tmp_path):
    """profile.json has the family, the published name, the architecture, the size, the context and whose words they are."""
    assert run_main("--config", pairs(folders("oblong"))).code == 0
    profile = json.loads((tmp_path / "out/profile.json").read_text())
    kept = ("family", "published_name", "architecture", "image_size", "context_length", "tokenizer", "model_type")
    assert {key: profile[key] for key in kept} == {
        "family": "open_clip", "published_name": "oblong", "architecture": "ViT-2x128-16-48", "image_size": [48, 64],
        "context_length": 77, "tokenizer": "the model's", "model_type": "open_clip"}


# ── Captions ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_the_vocabulary_may_come_in_three_forms(tmp_path):
    """tokenizer.json, vocab.json with merges.txt, and open_clip's own file give the same ids."""
    tiny.write_bpe(tmp_path)
    own, _ = open_clip_text.load_byte_tokenizer(tmp_path, "it")
    vocabulary, merges = open_clip_text._read_vocabulary(tmp_path)
    (tmp_path / tiny.BPE_FILE).unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n", encoding="utf-8")
    two_files, _ = open_clip_text.load_byte_tokenizer(tmp_path, "it")
    (tmp_path / "vocab.json").unlink()
    bpe = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": vocabulary, "merges": [" ".join(pair) for pair in merges]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": bpe}), encoding="utf-8")
    one_file, _ = open_clip_text.load_byte_tokenizer(tmp_path, "it")
    captions = ODD["captions"]
    assert own(captions) == two_files(captions) == one_file(captions)


def test_a_control_word_in_a_caption_is_text(scorers):
    """<end_of_text>, which ends a caption for open_clip, is read as text: what stands behind it still counts."""
    scorer = scorers("quickgelu", preprocess="exact", dtype="float32")
    for word in ("<end_of_text>", "<start_of_text>", "<|endoftext|>"):
        ids = scorer.tokenize([f"a cat {word} and a dog"])[0][0]
        assert (ids[0], ids[-1]) == (49406, 49407)
        assert not {49406, 49407} & set(ids[1:-1])
        units = scorer.encode_texts(scorer.tokenize([f"a cat {word}", f"a cat {word} and a dog"])[0])
        assert (units[0] @ units[1]).item() < 0.999


def test_truncated_means_longer_than_the_context(scorers):
    """A caption that fills the context is not truncated, one of one token more is, and keeps its end."""
    scorer = scorers("quickgelu", preprocess="exact", dtype="float32")
    ids, truncated = scorer.tokenize(["cat " * 75, "cat " * 76, "&amp;" * 90])
    assert truncated == [False, True, True]
    assert [len(row) for row in ids] == [77, 77, 77]
    assert {row[-1] for row in ids} == {49407}


BORROWED = {
    "attentional pooling": {"attentional_pool": True, "attn_pooler_queries": 1, "attn_pooler_heads": 4},
    "ResNet": {"layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
    "normed queries": {"qk_norm": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BORROWED)
def test_a_borrowed_tower_scores_what_open_clip_scores(kind, tmp_path):
    """Where open_clip_torch can be imported, a tower that transformers lacks has its cosines and its vocabulary."""
    try:
        import open_clip
    except Exception as error:  # torchvision's RuntimeError among them
        pytest.skip(f"open_clip_torch cannot be imported here ({type(error).__name__})")
    config = json.loads(json.dumps(tiny.MODELS["gelu"][0]))
    config["model_cfg"]["vision_cfg"] |= {"image_size": 64, "patch_size": 16, **BORROWED[kind]}
    torch.manual_seed(0)
    made = open_clip.model.CLIP(**config["model_cfg"])
    save_file({name: value.clone() for name, value in made.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    images = [tiny.picture(*size, seed) for seed, size in enumerate(tiny.SIZES)]
    with torch.inference_mode():
        units = model.eval().encode_image(torch.stack([transform(image) for image in images]), normalize=True)
        texts = model.encode_text(open_clip.get_tokenizer(f"local-dir:{tmp_path}")(tiny.CAPTIONS), normalize=True)
    scorer = script.Scorer(script.Config(pretrained_model=str(tmp_path), use_cuda=False, preprocess="exact"))
    got = scorer.similarity(images, tiny.CAPTIONS)
    assert np.abs(got - (units * texts).sum(-1).numpy()).max() <= 1e-5
    assert scorer.family.describe()["tokenizer"] == "open_clip_torch's"


@pytest.mark.parametrize(("section", "word", "value", "says"), [
    ("text_cfg", "layers", 10**9, "lacks weights"), ("vision_cfg", "layers", 10**9, "lacks weights"),
    ("text_cfg", "vocab_size", 10**12, "other shapes"), ("text_cfg", "heads", -1, "a whole number above 0"),
    ("text_cfg", "heads", 3, "heads can share"), ("vision_cfg", "width", float("inf"), "cannot load")])
def test_a_count_that_no_model_has_is_one_line(folders, tmp_path, section, word, value, says):
    """A config that asks for more than its weights, or counts that are none, is told at once and in one line (exit 6)."""
    folder = tmp_path / "a-model"
    shutil.copytree(folders("quickgelu"), folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"][section][word] = value
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(script.Trouble, match=says) as told:
        script.Scorer(script.Config(pretrained_model=str(folder), use_cuda=False))
    assert told.value.exit_code == 6 and "\n" not in str(told.value)
