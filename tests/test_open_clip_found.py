"""Where a model in open_clip's format is found, and the one line for what is none: folders, the Hub, OpenAI's archives."""
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import types

import filelock
import open_clip_models as tiny
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_hub import DRIVER, ROOT, Evil, FakeHub, environment

import image_text_sim_clip as script
from addons.models.open_clip_config import read_config
from addons.results import earlier_run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with its words; not to be changed."""
    return tiny.write_model(tmp_path_factory.mktemp("model") / "tiny-vit", "quickgelu")


@pytest.fixture
def own(model, tmp_path):
    """A copy of it that a test may break."""
    return pathlib.Path(shutil.copytree(model, tmp_path / "own"))


def load(folder, **keys):
    return script.Scorer(script.Config(pretrained_model=str(folder), use_cuda=False, **keys))


def refusal(folder, **keys):
    """The one line, of exit 6, with which a model is refused."""
    with pytest.raises(script.Trouble) as trouble:
        load(folder, **keys)
    assert trouble.value.exit_code == 6
    assert "\n" not in str(trouble.value)
    return str(trouble.value)


def change(folder, place, **words):
    """Set words in a section of open_clip_config.json; `place` is the path to it."""
    path = folder / "open_clip_config.json"
    content = json.loads(path.read_text())
    section = content
    for name in place.split("/"):
        section = section.setdefault(name, {}) if name else section
    section.update(words)
    path.write_text(json.dumps(content))


# ── Words ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("place", "words", "named"), [
    ("", {"training": {}}, ["'training'"]),
    ("model_cfg", {"moe": True}, ["'moe'"]),
    ("model_cfg/vision_cfg", {"registers": 4}, ["vision_cfg", "'registers'"]),
    ("model_cfg/text_cfg", {"rope": True}, ["text_cfg", "'rope'"]),
    ("preprocess_cfg", {"crop_pct": 0.9}, ["preprocess_cfg", "'crop_pct'"]),
    ("model_cfg/text_cfg", {"tokenizer_kwargs": {"reduction_mask": "simple"}}, ["tokenizer_kwargs", "'reduction_mask'"]),
    ("model_cfg/text_cfg", {"tokenizer_kwargs": {"clean": "upper"}}, ["clean", "'upper'"]),
    ("model_cfg/text_cfg", {"hf_tokenizer_name": "a/b", "tokenizer_kwargs": {"trust_remote_code": True}},
     ["'trust_remote_code'"]),
    ("model_cfg/text_cfg", {"tokenizer_mode": "clips"}, ["tokenizer_mode", "'clips'"]),
    ("model_cfg/text_cfg", {"pool_type": "mean"}, ["pool_type", "'mean'"]),
    ("model_cfg/vision_cfg", {"pool_type": "max"}, ["pool_type", "'max'"]),
    ("model_cfg/vision_cfg", {"pos_embed_type": "rope"}, ["pos_embed_type", "'rope'"]),
    ("model_cfg/vision_cfg", {"act_kwargs": {"approximate": "tanh"}}, ["act_kwargs", "quick_gelu"]),
    ("model_cfg/vision_cfg", {"norm_kwargs": {"bias": False}}, ["norm_kwargs", "'bias'"]),
    ("model_cfg/vision_cfg", {"width": "wide"}, ["width", "'wide'"]),
    ("model_cfg/vision_cfg", {"head_width": 40}, ["width", "128"]),
    ("model_cfg/vision_cfg", {"image_size": [64, 64, 3]}, ["image_size"]),
    ("model_cfg", {"embed_dim": None}, ["embed_dim"]),
    ("model_cfg", {"quick_gelu": "yes"}, ["quick_gelu", "'yes'"]),
    ("preprocess_cfg", {"resize_mode": "stretch"}, ["resize_mode", "'stretch'"]),
    ("preprocess_cfg", {"interpolation": "lanczos"}, ["interpolation", "'lanczos'"]),
    ("preprocess_cfg", {"mode": "L"}, ["mode", "'L'"]),
    ("preprocess_cfg", {"fill_color": [1, 2, 3]}, ["fill_color"]),
    ("preprocess_cfg", {"fill_color": 256}, ["fill_color", "256"]),
    ("preprocess_cfg", {"mean": [0.5, 0.5]}, ["mean"]),
    ("preprocess_cfg", {"std": 0}, ["std"]),
    ("model_cfg/vision_cfg", {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": "none",
                              "image_size": 256}, ["image_size", "224"]),
])
def test_what_is_not_known_is_refused_by_its_word(place, words, named, own):
    """A word or a value that this program does not know is one line that names it, whichever section it stands in."""
    change(own, place, **words)
    line = refusal(own)
    assert "open_clip_config.json" in line
    for part in named:
        assert part in line


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_cfg": 3}', '{"model_cfg": {"embed_dim": 8}}', "\x00\xff"])
def test_a_config_that_is_none_is_refused(content, own):
    """A broken open_clip_config.json is one line that names it."""
    (own / "open_clip_config.json").write_text(content, encoding="latin-1")
    assert "open_clip_config.json" in refusal(own)


def test_words_that_only_training_reads_change_nothing(own, model):
    """Patch dropout, initial scales, pretrained flags and null words are known, and the model is the same."""
    change(own, "model_cfg", init_logit_scale=4.6, nonscalar_logit_scale=False)
    change(own, "model_cfg/vision_cfg", patch_dropout=0.5, timm_model_pretrained=False, timm_drop_path=None, ls_init_value=None,
           attn_pooler_queries=64, attentional_pool=False, pool_type=None, block_type="default")
    change(own, "model_cfg/text_cfg", pad_id=0, hf_model_pretrained=True, hf_proj_type="mlp", embed_cls=False)
    before = read_config(model, "it")
    after = read_config(own, "it")
    assert (before.image, before.text, before.preprocess) == (after.image, after.text, after.preprocess)


# ── Weights ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def change_weights(folder, alter):
    path = folder / "open_clip_model.safetensors"
    weights = load_file(path)
    alter(weights)
    save_file(weights, path)


@pytest.mark.parametrize(("alter", "named"), [
    (lambda weights: weights.pop("visual.proj"), ["lacks weights", "visual.proj"]),
    (lambda weights: weights.pop("visual.transformer.resblocks.1.attn.in_proj_bias"), ["lacks weights", "in_proj_bias"]),
    (lambda weights: weights.pop("logit_scale"), ["lacks weights", "logit_scale"]),
    (lambda weights: weights.update({"visual.transformer.resblocks.2.ln_1.bias": torch.ones(128)}), ["no place", "blocks.2"]),
    (lambda weights: weights.update({"logit_bias": torch.zeros(())}), ["no place", "logit_bias"]),
    (lambda weights: weights.update({"visual.positional_embedding": torch.zeros(10, 128)}), ["other shapes"]),
])
def test_weights_that_do_not_fit_are_refused(alter, named, own):
    """Weights that are missing, left over or of another shape are one line that says which, and are never made up."""
    change_weights(own, alter)
    line = refusal(own)
    for part in ("open_clip", *named):
        assert part in line


@pytest.mark.slow
@pytest.mark.parametrize("config", [
    {"architecture": "vit_base_patch32_clip_224", "num_classes": 512, "pretrained_cfg": {"tag": "openai"}},
    {"model_type": "clip", "architectures": ["MarqoFashionCLIP"], "auto_map": {"AutoModel": "marqo.MarqoFashionCLIP"}}])
def test_what_transformers_cannot_read_is_read_in_open_clips_format(config, own, model, shelf):
    """A folder with both formats' files whose config.json is timm's, or for code of its own, is open_clip's; one that
    transformers can read is not."""
    image = tiny.picture(70, 50, 1)
    for path in shelf("clip-base-patch32").iterdir():
        if not (own / path.name).exists():
            shutil.copy(path, own)
    (own / tiny.BPE_FILE).replace(own / "aside")
    assert load(own).family.kind == "clip"
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (own / name).unlink()
    (own / "aside").replace(own / tiny.BPE_FILE)
    (own / "config.json").write_text(json.dumps(config))
    scorer = load(own)
    assert scorer.family.kind == "open_clip"
    assert scorer.similarity([image], ["two cats"]) == load(model).similarity([image], ["two cats"])


@pytest.mark.slow
def test_other_forms_of_the_same_weights_score_the_same(own, model):
    """`module.` of a training run, CustomTextCLIP's `text.`, half precision and one-element scales load as the plain form."""
    wanted = load(model).similarity([tiny.picture(70, 60, 1)], ["two cats"])

    def rename(weights):
        for name in list(weights):
            value = weights.pop(name)
            is_text = not name.startswith(("visual", "logit"))
            weights[f"module.{'text.' if is_text else ''}{name}"] = value.reshape(1) if name == "logit_scale" else value
    change_weights(own, rename)
    assert load(own).similarity([tiny.picture(70, 60, 1)], ["two cats"]) == wanted
    change_weights(own, lambda weights: weights.update({name: value.half() for name, value in weights.items()}))
    scorer = load(own)
    assert scorer.family.model.dtype == torch.float32
    assert scorer.similarity([tiny.picture(70, 60, 1)], ["two cats"]) == pytest.approx(wanted, abs=5e-3)


def as_pickle(folder, content=None):
    """open_clip_pytorch_model.bin instead of safetensors."""
    weights = load_file(folder / "open_clip_model.safetensors")
    torch.save(content(weights) if content else weights, folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_model.safetensors").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("content", [None, lambda weights: {"epoch": 3, "state_dict": weights}], ids=["weights", "checkpoint"])
def test_a_pickle_is_read_with_one_warning(content, own, model, capfd):
    """open_clip_pytorch_model.bin, also a training run's checkpoint, scores the same, with one line of warning."""
    as_pickle(own, content)
    capfd.readouterr()
    scorer = load(own)
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert "open_clip_pytorch_model.bin with weights_only" in warnings[0]
    assert scorer.files.safetensors is False
    image = tiny.picture(70, 60, 1)
    assert scorer.similarity([image], ["two cats"]) == load(model).similarity([image], ["two cats"])
    assert "safetensors_only" in refusal(own, safetensors_only=True)


def test_a_malicious_pickle_does_not_run(own, tmp_path):
    """A .bin that would run code is refused, and its code has not run."""
    pickle.loads(pickle.dumps(Evil(tmp_path / "it-works")))
    assert (tmp_path / "it-works").is_dir(), "this pickle does nothing, so the test shows nothing"
    as_pickle(own, lambda weights: {"logit_scale": Evil(tmp_path / "was-here")})
    assert "more than weights" in refusal(own)
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a pickle at all", pickle.dumps([1, 2])])
def test_a_pickle_that_is_none_is_refused(content, own):
    """A damaged .bin, or one of other things, is one line."""
    (own / "open_clip_model.safetensors").unlink()
    (own / "open_clip_pytorch_model.bin").write_bytes(content)
    assert "own" in refusal(own)


def test_a_folder_without_weights_or_words_is_refused(own):
    """Without weights one line names both files; without a vocabulary it says which files would do. Nothing is guessed."""
    (own / tiny.BPE_FILE).unlink()
    line = refusal(own)
    assert "vocabulary" in line and "tokenizer.json" in line
    (own / "open_clip_model.safetensors").unlink()
    line = refusal(own)
    assert "open_clip_model.safetensors" in line and "open_clip_pytorch_model.bin" in line


def test_a_vocabulary_of_another_model_is_refused(own):
    """Words with more ids than the model embeds, far fewer, or no end of text are one line."""
    (own / tiny.BPE_FILE).unlink()
    bpe = {"type": "BPE", "end_of_word_suffix": "</w>", "merges": []}
    few = {f"w{i}": i for i in range(50)} | {"<|startoftext|>": 50, "<|endoftext|>": 51}
    for vocabulary, named in ((few, "belong together"), ({"a": 0}, "<|endoftext|>")):
        (own / "tokenizer.json").write_text(json.dumps({"model": {**bpe, "vocab": vocabulary}}))
        assert named in refusal(own)
    (own / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece", "vocab": {}}}))
    assert "vocabulary" in refusal(own)


def test_marks_that_cleaning_takes_apart_need_no_embedding(tmp_path):
    """mT5's hundred marks may lie beyond the model's vocabulary where the cleaning of captions leaves none of them whole."""
    folder = tiny.write_model(tmp_path / "i18n", "so400m-i18n")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] += [[f"▁<extra_id_{number}>", 0.0] for number in range(100)]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    scorer = load(folder)
    assert len(scorer.family.tokenizer) > 100 and max(scorer.tokenize(["<extra_id_5> ▁<extra_id_7>"])[0][0]) < 60
    change(folder, "model_cfg/text_cfg", tokenizer_kwargs={"clean": "whitespace"})
    assert "do not belong together" in refusal(folder)


def test_without_ftfy_one_line_says_what_to_install(own, monkeypatch):
    """Captions are never cleaned otherwise than open_clip cleans them."""
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert "pip install -r addons/requirements.txt" in refusal(own)


def test_a_model_trained_again_is_another_model(own, model):
    """The identity of a folder changes with its weights, its config and its vocabulary."""
    first = script.find_model(script.Config(pretrained_model=str(own))).identity
    change_weights(own, lambda weights: weights.update({"logit_scale": torch.tensor(3.0)}))
    second = script.find_model(script.Config(pretrained_model=str(own))).identity
    change(own, "preprocess_cfg", resize_mode="longest")
    third = script.find_model(script.Config(pretrained_model=str(own))).identity
    (own / tiny.BPE_FILE).write_bytes((own / tiny.BPE_FILE).read_bytes() + b"\0")
    assert len({first, second, third, script.find_model(script.Config(pretrained_model=str(own))).identity}) == 4


# ── Towers that are borrowed ──────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("place", "words", "named"), [
    ("model_cfg/vision_cfg", {"timm_model_name": "convnext_base"}, "timm_model_name convnext_base"),
    ("model_cfg/vision_cfg", {"timm_model_name": "vit_base_patch16_siglip_gap_224", "timm_pool": "avg"}, "siglip_gap"),
    ("model_cfg/vision_cfg", {"layers": [3, 4, 6, 3]}, "ResNet"),
    ("model_cfg/vision_cfg", {"attentional_pool": True}, "attentional_pool"),
    ("model_cfg/vision_cfg", {"qk_norm": True}, "qk_norm"),
    ("model_cfg/text_cfg", {"scale_fc": True}, "scale_fc"),
    ("model_cfg/text_cfg", {"hf_model_name": "roberta-base"}, "hf_model_name roberta-base"),
    ("model_cfg/text_cfg", {"embed_cls": True}, "embed_cls"),
    ("model_cfg", {"multimodal_cfg": {"width": 8}}, "multimodal_cfg"),
])
def test_a_tower_without_a_twin_needs_open_clip_torch(place, words, named, own, monkeypatch):
    """One line names the tower and how to install open_clip_torch without letting pip bring a torchvision along."""
    monkeypatch.setitem(sys.modules, "open_clip", None)
    change(own, place, **words)
    line = refusal(own)
    assert named in line
    assert "pip install --no-deps open_clip_torch timm ftfy regex wcwidth" in line


def test_a_torchvision_that_does_not_match_is_told(own, monkeypatch, tmp_path):
    """Where importing open_clip ends in torchvision's RuntimeError, the line gives it."""
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    (tmp_path / "site/open_clip").mkdir(parents=True)
    (tmp_path / "site/open_clip/__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    change(own, "model_cfg/vision_cfg", attentional_pool=True)
    assert "operator torchvision::nms does not exist" in refusal(own)


class LentModel(torch.nn.Module):
    """What open_clip.create_model returns, for the test below: the towers that are known, under open_clip's names."""

    def __init__(self, family):
        super().__init__()
        self.inner = family.model
        self.logit_scale = family.model.logit_scale

    def encode_image(self, pixels):
        return self.inner.encode_image(pixels)

    def encode_text(self, ids):
        assert ids.shape[1] == 77, "a tower that is not known gets the whole context"
        return self.inner.encode_text(ids)


@pytest.mark.slow
def test_a_borrowed_tower_is_scored(own, model, monkeypatch):
    """open_clip_torch, where it can be imported, loads the folder; images and captions are prepared here all the same."""
    asked = []

    def create_model(name, **options):
        asked.append((name, options["weights_only"]))
        return LentModel(load(model).family)
    monkeypatch.setitem(sys.modules, "open_clip", types.SimpleNamespace(create_model=create_model))
    change(own, "model_cfg/vision_cfg", attentional_pool=True)
    images = [tiny.picture(*size, seed) for seed, size in enumerate(tiny.SIZES)]
    scorer = load(own)
    assert asked == [(f"local-dir:{own}", True)]
    assert scorer.similarity(images, tiny.CAPTIONS) == pytest.approx(load(model).similarity(images, tiny.CAPTIONS), abs=1e-6)
    assert "quantization needs a vision_model" in refusal(own, quantization="int8", runtime="torch")


# ── OpenAI's own archives ─────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def archive(tmp_path):
    """A TorchScript archive, as OpenAI published its models."""
    path = tmp_path / "ViT-B-32.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))
    return path


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_openais_archives_are_told_with_the_hub_id(archive, tmp_path):
    """ViT-B-32.pt, the folder it lies in, its name alone and OpenAI's own name for it are one line with the Hub id to use."""
    for name in (archive, tmp_path, "ViT-B-32.pt", "ViT-B/32", "./elsewhere/ViT-B-32.pt"):
        assert "pretrained_model: openai/clip-vit-base-patch32" in refusal(name), name
    assert "openai/clip-vit-large-patch14-336" in refusal("ViT-L/14@336px")
    assert "hf-hub:timm/resnet50_clip.openai" in refusal("RN50.pt")


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_another_archive_or_file_is_told(archive, tmp_path):
    """A TorchScript archive of another name, or any other file, is one line; nothing of it is loaded."""
    archive.rename(tmp_path / "mine.pt")
    assert "TorchScript archive" in refusal(tmp_path / "mine.pt")
    (tmp_path / "weights.safetensors").write_bytes(b"x")
    assert "is a file" in refusal(tmp_path / "weights.safetensors")


# ── The Hub ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def run_all(hub, cache, root, runs, **changes):
    """Run the script once for each (label, model, keys) in one process; returns label -> (exit code, stdout, stderr)."""
    lines = []
    for label, name, keys in runs:
        keys = {"pretrained_model": name, "output_path": root / label, "limit": 3, "use_cuda": "false", **keys}
        overrides = [f"--set={key}={value}" for key, value in keys.items()]
        lines.append(["--config", str(ROOT / "challenge_set/demo.yaml"), *overrides])
    done = subprocess.run([sys.executable, "-c", DRIVER], input=json.dumps(lines), capture_output=True, cwd=ROOT,
                          encoding="utf-8", env=environment(hub, cache, **changes), timeout=110)
    assert (done.returncode, done.stderr) == (0, "")
    return dict(zip((label for label, *_ in runs), json.loads(done.stdout), strict=True))


def publish(hub, root, shelf):
    """The repositories: a plain ViT at two revisions, one as a pickle, one in both formats, a SigLIP with a second repository
    for its tokenizer. Returns their commits."""
    folders = {name: tiny.write_model(root / name, "quickgelu", tokenizer=False) for name in ("plain", "older", "pickle")}
    for folder in folders.values():
        tiny.write_tokenizer_json(folder)
    change_weights(folders["older"], lambda weights: weights.update({"visual.proj": -weights["visual.proj"]}))
    as_pickle(folders["pickle"])
    both = pathlib.Path(shutil.copytree(shelf("clip-new-eos"), root / "both"))
    tiny.write_model(both, "quickgelu", tokenizer=False)
    siglip = tiny.write_model(root / "siglip", "siglip", tokenizer=False)
    commits = {name: hub.add(f"some-one/{name}", root / name) for name in ("plain", "pickle", "both", "siglip")}
    commits["older"] = hub.add("some-one/plain", folders["older"], "v0.9")
    commits["words"] = hub.add("timm/ViT-B-16-SigLIP", tiny.REFERENCE / "siglip")
    change(siglip, "model_cfg/text_cfg", hf_tokenizer_name="some-one/nowhere")
    shutil.copytree(siglip, root / "lost")
    commits["lost"] = hub.add("some-one/lost", root / "lost")
    change(siglip, "model_cfg/text_cfg", hf_tokenizer_name="timm/ViT-B-16-SigLIP")
    return commits


@pytest.fixture(scope="module")
def hub_story(tmp_path_factory, shelf):
    """The story, told once: of several test processes the first tells it and the others read it from a file."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return types.SimpleNamespace(**tell_story(tmp_path_factory.mktemp("hub"), shelf))
    root = tmp_path_factory.getbasetemp().parent / "open-clip-hub"
    with filelock.FileLock(f"{root}.lock"):
        if not (root / "story.json").exists():
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir()
            (root / "story.json").write_text(json.dumps(tell_story(root, shelf) | {"root": ""}), encoding="utf-8")
    return types.SimpleNamespace(**json.loads((root / "story.json").read_text(encoding="utf-8")) | {"root": root})


def tell_story(root, shelf):
    """Runs while the Hub answers, offline, and after it has gone: label -> outcome, the commits, and what was asked for."""
    hub = FakeHub()
    commits = publish(hub, root / "repositories", shelf)
    cache = root / "cache"
    outcomes = run_all(hub, cache, root, [
        ("plain", "some-one/plain", {}), ("prefixed", "hf-hub:some-one/plain", {}),
        ("older", "hf-hub:some-one/plain", {"revision": "v0.9"}), ("pickle", "some-one/pickle", {}),
        ("refused", "some-one/pickle", {"safetensors_only": "true"}), ("transformers", "some-one/both", {}),
        ("open_clip", "hf-hub:some-one/both", {}), ("siglip", "some-one/siglip", {}), ("lost", "some-one/lost", {})])
    asked = list(hub.requests)
    outcomes |= run_all(hub, cache, root, [("offline", "hf-hub:some-one/plain", {}),
                                           ("offline-siglip", "some-one/siglip", {})], HF_HUB_OFFLINE="1")
    asked_offline = hub.requests[len(asked):]
    hub.stop()
    outcomes |= run_all(hub, cache, root, [("gone", "some-one/plain", {"revision": "v0.9"}),
                                           ("gone-siglip", "some-one/siglip", {})])
    return {"root": root, "commits": commits, "outcomes": outcomes, "asked": asked, "asked_offline": asked_offline}


def resolved(story, label):
    code, _, stderr = story.outcomes[label]
    assert code == 0, stderr
    return json.loads((story.root / label / "manifest.json").read_text())["resolved"]


def scores(story, label, read_table):
    assert story.outcomes[label][0] == 0, story.outcomes[label]
    return [row["similarity"] for row in read_table(story.root / label / "scores.csv")]


@pytest.mark.slow
@pytest.mark.timeout(300)  # the first test waits for the whole story
def test_a_repository_is_found_downloaded_and_recorded(hub_story, read_table):
    """owner/name and hf-hub:owner/name score alike; the commit, the published name and the format are in the manifest."""
    assert scores(hub_story, "plain", read_table) == scores(hub_story, "prefixed", read_table)
    known = resolved(hub_story, "plain")
    assert known["weights"] == hub_story.commits["plain"]
    assert (known["model_type"], known["published_name"], known["safetensors"]) == ("open_clip", "some-one/plain", True)
    fetched = {path.rsplit("/", 1)[-1] for path in hub_story.asked if path.startswith("/cdn/some-one/plain/")}
    assert fetched == {"open_clip_model.safetensors"}


@pytest.mark.slow
def test_a_revision_is_another_model(hub_story, read_table):
    """`revision` takes a tag of an open_clip repository and gets that revision's weights."""
    assert resolved(hub_story, "older")["weights"] == hub_story.commits["older"]
    older = [-float(score) for score in scores(hub_story, "older", read_table)]
    assert older == [float(score) for score in scores(hub_story, "plain", read_table)]


@pytest.mark.slow
def test_a_repository_of_pickles_works_with_one_warning(hub_story, read_table):
    """open_clip_pytorch_model.bin is read with weights_only and a warning, or refused by safetensors_only before a download."""
    assert scores(hub_story, "pickle", read_table) == scores(hub_story, "plain", read_table)
    warnings = [line for line in hub_story.outcomes["pickle"][2].splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert "open_clip_pytorch_model.bin" in warnings[0]
    assert hub_story.outcomes["refused"][0] == 6
    assert "safetensors_only" in hub_story.outcomes["refused"][2]


@pytest.mark.slow
def test_of_two_formats_the_name_chooses(hub_story, read_table):
    """A repository in both formats is read in transformers' unless its name has the prefix hf-hub:."""
    assert resolved(hub_story, "transformers")["model_type"] == "clip"
    assert resolved(hub_story, "open_clip")["model_type"] == "open_clip"


@pytest.mark.slow
def test_the_second_repository_is_one_commit_and_recorded(hub_story):
    """The tokenizer that a config takes from elsewhere is downloaded at one commit, which the manifest and the profile name."""
    wanted = f"timm/ViT-B-16-SigLIP@{hub_story.commits['words']}"
    assert resolved(hub_story, "siglip")["tokenizer"] == wanted
    assert json.loads((hub_story.root / "siglip/profile.json").read_text())["tokenizer"] == wanted
    code, _, stderr = hub_story.outcomes["lost"]
    assert code == 6
    assert "some-one/nowhere" in stderr and "hf_tokenizer_name" in stderr
    assert stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("label", "before"), [("offline", "prefixed"), ("offline-siglip", "siglip"), ("gone", "older"),
                                               ("gone-siglip", "siglip")])
def test_without_the_hub_the_cache_is_used(label, before, hub_story, read_table):
    """Offline, or with the Hub gone, both repositories come from the cache, at the same commits, with the same scores."""
    assert resolved(hub_story, label) == resolved(hub_story, before)
    assert scores(hub_story, label, read_table) == scores(hub_story, before, read_table)
    assert hub_story.asked_offline == []


def test_the_second_repository_is_pinned_for_a_run(tmp_path):
    """A run begun with one commit of the tokenizer is refused with another, by its name."""
    recorded = {"tokenizer": f"timm/ViT-B-16-SigLIP@{'a' * 40}"}
    with pytest.raises(script.Trouble, match="tokenizer was"):
        earlier_run.refuse_other_model(tmp_path, {"tokenizer": f"timm/ViT-B-16-SigLIP@{'b' * 40}"}, recorded)
