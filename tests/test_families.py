"""A score of a further family is what transformers itself says of that image and that caption.

The reference calls the family's own classes of transformers, one pair at a time, padded and masked as the model cards show.
"""
import json
import re

import numpy as np
import pytest
import torch
import transformers
from family_models import FAMILIES, FamilyShelf
from models import CORPUS, change_config, change_weights, write_weights
from PIL import Image
from unfinished_run import ends_at_third_part

import image_text_sim_clip as script
from addons.measures.embeddings import read_embeddings

pytestmark = pytest.mark.slow  # the models are built first

CLASSES = {"chinese_clip": (transformers.ChineseCLIPModel, transformers.BertTokenizer, 52),
           "altclip": (transformers.AltCLIPModel, transformers.XLMRobertaTokenizer, 77),
           "metaclip_2": (transformers.MetaClip2Model, transformers.XLMRobertaTokenizer, 77),
           "align": (transformers.AlignModel, transformers.BertTokenizer, 64),
           "siglip2": (transformers.Siglip2Model, transformers.GemmaTokenizer, 64),
           "aimv2": (transformers.Aimv2Model, transformers.CLIPTokenizer, 77),
           "vision_text_dual_encoder": (transformers.VisionTextDualEncoderModel, transformers.BertTokenizer, 512)}
EVERY = [*FAMILIES, "clip-base-patch32", "siglip-base"]  # those in the script as well, whose scores test_models.py proves
SIDES = {"siglip2": 256, "clip-base-patch32": 224, "siglip-base": 224}  # of the images that a model reads, where it is not 64
LOWER_CASED = ("siglip2",)  # by who calls the tokenizer
UNMASKED = ("siglip2",)  # as they were trained
WORDS = " ".join(CORPUS).split()
CAPTIONS = ["cat", "A Photo Of TWO CATS", "a photo of a dog in the snow", "一只狗在雪地里的照片", "猫坐在沙发上",
            "two cats, on a sofa!", "ДВЕ КОШКИ", "!!!", "naïve 😀 and \t tabs",
            *(" ".join(WORDS[i % len(WORDS)] for i in range(n)) for n in (15, 50, 76, 300))]
SIZES = [(301, 170), (121, 200), (64, 64), (5, 7), (90, 64), (12, 200)]


@pytest.fixture(scope="module")
def family_shelf(tmp_path_factory):
    """Model folders by the name of a family, each built on first use."""
    return FamilyShelf(tmp_path_factory.mktemp("families"))


@pytest.fixture
def model_of(family_shelf, shelf):
    """The folder of the model of one of EVERY."""
    return lambda name: family_shelf(name) if name in FAMILIES else shelf(name)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of images of several sizes and shapes."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(1)
    for number, (width, height) in enumerate(SIZES):
        coarse = rng.integers(0, 256, (height // 9 + 1, width // 9 + 1, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


class Reference:
    """transformers called as the model cards show it, in float32 on the CPU."""

    def __init__(self, name, folder):
        self.name = name
        model, tokenizer, self.length = CLASSES[name]
        self.model = model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        self.tokenizer = tokenizer.from_pretrained(folder)
        self.images = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")

    def prepare(self, caption):
        return caption.lower() if self.name in LOWER_CASED else caption

    def is_cut(self, caption):
        return len(self.tokenizer(self.prepare(caption), padding=False, truncation=False)["input_ids"]) > self.length

    def cosine(self, path, caption):
        pixels = self.images(Image.open(path).convert("RGB"), return_tensors="pt")
        text = self.tokenizer([self.prepare(caption)], padding="max_length", truncation=True, max_length=self.length,
                              return_tensors="pt", return_attention_mask=self.name not in UNMASKED)
        with torch.inference_mode():
            image = self.model.get_image_features(**pixels).pooler_output
            caption = self.model.get_text_features(**text).pooler_output
            return torch.nn.functional.cosine_similarity(image.double(), caption.double()).item()


@pytest.fixture
def score(run_main, write_config, write_table, images, tmp_path, read_table):
    """Score all captions with all images in turn; the rows of scores.csv whose captions the tokenizer knows."""
    def run(model, **keys):
        pairs = [(f"{i % len(SIZES)}.png", caption) for i, caption in enumerate(CAPTIONS * 2)]
        write_table([("url", "caption"), *pairs])
        keys = {"pretrained_model": str(model), "image_path": str(images), "preprocess": "exact", "dtype": "float32", **keys}
        outcome = run_main("--config", write_config(**keys), "--fresh")
        assert outcome.code == 0, outcome.stderr
        rows = read_table(tmp_path / "out/scores.csv")
        unknown = [row["caption"] for row in rows if row["status"] != "ok"]
        foreign = [caption for caption in CAPTIONS if not re.search("[A-Za-z]", caption)]
        assert len(rows) == len(pairs) and {*unknown} <= {*(foreign if "siglip-base" in str(model) else ["ДВЕ КОШКИ"])}
        return [row for row in rows if row["status"] == "ok"]
    return run


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_similarity_is_what_transformers_says(name, batch_size, score, family_shelf, images):
    """In float32 and preprocessed exactly, every similarity equals the reference's within 1e-5, whatever the batches."""
    reference = Reference(name, family_shelf(name))
    rows = score(family_shelf(name), batch_size=batch_size)
    found = [float(row["similarity"]) for row in rows]
    expected = [reference.cosine(images / row["url"], row["caption"]) for row in rows]
    assert np.abs(np.array(found) - expected).max() <= 1e-5
    assert np.std(expected) > 0.01  # a thousand times the difference that is allowed, or a mistake would not show
    assert [row["truncated"] for row in rows] == [str(reference.is_cut(row["caption"])).lower() for row in rows]


@pytest.mark.parametrize("name", FAMILIES)
def test_control_tokens_in_a_caption_are_text(name, family_shelf, images):
    """A caption that contains the tokenizer's own control tokens is read to its end."""
    scorer = script.Scorer(script.Config(pretrained_model=str(family_shelf(name)), use_cuda=False))
    tokenizer = scorer.family.tokenizer
    control = tokenizer.sep_token or tokenizer.eos_token
    captions = [f"a photo {control} of two cats", f"a photo {control} of a dog", f"a photo {' '.join(control)} of a dog"]
    one, other, spaced = scorer.similarity([images / "0.png"] * 3, captions)
    assert abs(one - other) > 1e-4
    if name in ("altclip", "metaclip_2"):  # BERT's tokenizer splits them itself, in another way than at each letter
        assert abs(other - spaced) < 1e-6
    ids = scorer.tokenize(captions)[0]
    assert all(row.count(tokenizer.convert_tokens_to_ids(control)) == 1 for row in ids)


@pytest.mark.parametrize("name", EVERY)
def test_shortcuts_stay_near_the_exact_way(name, score, model_of, tmp_path):
    """bfloat16, int8 and the fast resize change a score by what they may; saved embeddings give the very scores.

    Of ALIGN int8 takes the text tower alone.
    """
    def similarities(**keys):
        return np.array([float(row["similarity"]) for row in score(model_of(name), **keys)])
    exact = similarities()
    assert np.abs(similarities(preprocess="fast") - exact).max() < 2e-2
    assert np.abs(similarities(dtype="bfloat16") - exact).max() < 5e-2
    assert 0 < np.abs(similarities(quantization="int8", runtime="torch") - exact).max() < 5e-2
    assert np.array_equal(similarities(save_embeddings="float32"), exact)
    saved = read_embeddings(tmp_path / "out/parts/part-00000.npz")
    rows = saved["image_of_row"] >= 0
    cosines = (saved["images"][saved["image_of_row"]] * saved["texts"][saved["text_of_row"]]).sum(1)
    has_text = saved["text_of_row"][rows] >= 0
    assert np.abs(cosines[rows][has_text] - exact).max() < 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_passport_agrees(name, score, family_shelf, tmp_path):
    """The score passport, which goes its own slow way, finds the same scores."""
    score(family_shelf(name), parity_rows=10)
    passport = json.loads((tmp_path / "out/profile.json").read_text())["passport"]
    assert passport["rows"] == 10 and passport["max_difference"] < 1e-5


@pytest.mark.parametrize("name", EVERY)
def test_loss_is_the_dissimilarity_and_has_a_gradient(name, model_of, images):
    """The loss of a family is 1 - its similarity, and reaches the pixels."""
    from addons.loss import DissimilarityLoss
    config = script.Config(pretrained_model=str(model_of(name)), use_cuda=False)
    loss = DissimilarityLoss(config, reduction="none")
    side = SIDES.get(name, 64)  # as the model reads it: floats are not rounded where they are resized
    image = Image.open(images / "2.png").convert("RGB").resize((side, side))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float().div(255).requires_grad_()
    caption = "a photo of a dog in the snow"
    error = loss(pixels, [caption])
    expected = 1 - script.Scorer(config).similarity([image], [caption])
    assert abs(error.item() - expected[0]) < 1e-4
    error.sum().backward()
    assert pixels.grad.abs().sum() > 0


def test_a_dual_encoder_whose_tower_has_one_kind_of_attention(family_shelf, tmp_path, score, images):
    """An image tower that knows no sdpa, ConvNeXt here, is read as transformers reads it."""
    folder = family_shelf.copy("vision_text_dual_encoder", tmp_path / "convnext")
    change_config(folder, lambda config: config.update(vision_config={
        "model_type": "convnext", "image_size": 64, "hidden_sizes": [8, 16, 16, 64], "depths": [1] * 4, "hidden_size": 64}))
    write_weights(folder, 5, logit_scale=3.0)
    rows = score(folder)
    reference = Reference("vision_text_dual_encoder", folder)
    expected = [reference.cosine(images / row["url"], row["caption"]) for row in rows]
    assert np.abs(np.array([float(row["similarity"]) for row in rows]) - expected).max() <= 1e-5


def test_a_dual_encoder_without_a_logit_scale(family_shelf, tmp_path, score, capfd):
    """A file that lacks nothing but the logit scale scores as with it; one line says where its config's is taken."""
    folder = family_shelf.copy("vision_text_dual_encoder", tmp_path / "no-scale")
    expected = [row["similarity"] for row in score(folder)]
    change_weights(folder, lambda weights: weights.pop("logit_scale"))
    assert [row["similarity"] for row in score(folder)] == expected
    config = script.Config(pretrained_model=str(folder), use_cuda=False)
    capfd.readouterr()
    assert abs(script.Scorer(config).family.scale - np.exp(2.6592)) < 1e-4
    assert capfd.readouterr().err.count("has no logit_scale") == 1
    change_weights(folder, lambda weights: weights.pop("text_projection.weight"))
    with pytest.raises(script.Trouble, match="do not belong together"):
        script.Scorer(config)


SHAPES = [(16, 16), (1, 300), (4000, 30), (1000, 3), (7, 5), (640, 480), (2000, 600), (255, 257)]  # (width, height)


def test_naflex_patches_are_those_of_transformers(family_shelf):
    """Bytes of images of every shape become the very patches, masks and shapes that transformers' processor makes."""
    folder = family_shelf("siglip2")
    scorer = script.Scorer(script.Config(pretrained_model=str(folder), use_cuda=False, preprocess="exact"))
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    rng = np.random.default_rng(2)
    images = [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in SHAPES]
    expected = processor(images, return_tensors="pt")
    seen = {}

    class Spy:
        """Stands in for the model, and keeps what it is called with."""

        dtype = torch.float32

        def parameters(self):
            return scorer.family.model.parameters()

        def get_image_features(self, **inputs):
            seen.update(inputs)
            return scorer.family.model.get_image_features(**inputs)
    packed = scorer.stack([scorer.resize(image) for image in images])
    assert packed.dtype == torch.uint8
    features = scorer.family.features_of_bytes(Spy(), packed, scorer.pixel_levels)
    assert torch.equal(seen["spatial_shapes"], expected["spatial_shapes"])
    assert torch.equal(seen["pixel_attention_mask"], expected["pixel_attention_mask"])
    assert (seen["pixel_values"] - expected["pixel_values"]).abs().max() < 1e-6
    with torch.inference_mode():
        assert (features - scorer.family.model.get_image_features(**expected).pooler_output).abs().max() < 1e-5


def test_naflex_reads_as_many_patches_as_its_processor_says(family_shelf, tmp_path, score, images):
    """A processor that asks for more patches is obeyed; one that cuts others than the model reads, or so many that an image
    would take gigabytes, is refused."""
    folder = family_shelf.copy("siglip2", tmp_path / "more")
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"max_num_patches": 400}))
    rows = score(folder)
    reference = Reference("siglip2", folder)
    expected = [reference.cosine(images / row["url"], row["caption"]) for row in rows]
    assert np.abs(np.array([float(row["similarity"]) for row in rows]) - expected).max() <= 1e-5
    file.write_text(json.dumps(settings | {"patch_size": 14}))
    with pytest.raises(script.Trouble, match=r"patches of 14 pixels.*reads 16"):
        script.Scorer(script.Config(pretrained_model=str(folder), use_cuda=False))
    for most in (10**6, 0, -1, 2.5, "256"):
        file.write_text(json.dumps(settings | {"max_num_patches": most}))
        with pytest.raises(script.Trouble, match=r"\(max_num_patches\), where a whole number|cannot load"):
            script.Scorer(script.Config(pretrained_model=str(folder), use_cuda=False))


def test_a_word_about_every_family_that_is_not_read(family_shelf, run_main, shapes, tmp_path):
    """A model of a type that no file of addons/models knows is one line, exit 6."""
    folder = family_shelf.copy("altclip", tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "owlvit"}))
    outcome = run_main("--config", shapes(rows=3, pretrained_model=str(folder)))
    assert outcome.code == 6 and "owlvit" in outcome.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", EVERY)
def test_killed_and_resumed_gives_the_same_scores(name, score, model_of, run_main, tmp_path):
    """A run that ends in its midst is finished by another one to the same bytes, saved embeddings too."""
    score(model_of(name), partition_rows=7, save_embeddings="float16")
    files = ["scores.csv", *(f"parts/{path.name}" for path in (tmp_path / "out/parts").glob("*.npz"))]
    assert len(files) == 1 + 4
    whole = {file: (tmp_path / "out" / file).read_bytes() for file in files}
    with ends_at_third_part() as commits:
        run_main("--config", tmp_path / "config.yaml", "--fresh")
    assert len(commits) == 3 and not (tmp_path / "out/scores.csv").exists()
    outcome = run_main("--config", tmp_path / "config.yaml")
    assert outcome.code == 0, outcome.stderr
    assert {file: (tmp_path / "out" / file).read_bytes() for file in files} == whole


@pytest.mark.timeout(400)
def test_two_ranks_score_every_family(model_of, shapes, run_main, start_cli, read_table, tmp_path):
    """Under torchrun two ranks write for every family what one process does, byte for byte, and a run of its own as well."""
    models = {name.replace("-", "_"): str(model_of(name)) for name in sorted(EVERY)}
    config = shapes(pretrained_model=models, rows=40, partition_rows=10, save_embeddings="float16", use_cuda=False)
    process = start_cli("--config", config, interpreter=("-m", "torch.distributed.run", "--nproc-per-node", "2"))
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert run_main("--config", config, "--set", f"output_path={tmp_path / 'local'}").code == 0
    files = ["scores.csv", *(f"parts/{path.name}" for path in (tmp_path / "local/parts").glob("*.npz"))]
    assert len(files) == 1 + 4 * len(EVERY)
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "local" / file).read_bytes(), file
    rows = read_table(tmp_path / "out/scores.csv")
    for name, model in models.items():
        own = shapes(pretrained_model=model, rows=40, partition_rows=10, output_path=str(tmp_path / name))
        assert run_main("--config", own).code == 0
        end = "" if name == next(iter(models)) else f"_{name}"
        for column in ("similarity", "probability", "status"):
            expected = [row[column] for row in read_table(tmp_path / name / "scores.csv")]
            assert [row[column + end] for row in rows] == expected, (name, column)
        assert len({row["similarity" + end] for row in rows}) > 20, name
