"""Model folders as people have them: what does not fit is found when the model is loaded, and told with its cure."""
import dataclasses
import json
import pathlib
import re
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
from models import as_pickle, change_config, change_weights
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2

import image_text_sim_clip as script
from addons.models import faults, folders

BUNDLED = pathlib.Path(__file__).resolve().parent.parent / "challenge_set/shapes_clip"
LIBRARY_ADVICE = ("trust_remote_code", "pip install --upgrade", "ignore_mismatched", "above report", "weights_only=False",
                  "raise an issue")


def write(name, content):
    """A change that writes a file, given as text, bytes or JSON."""
    def change(folder):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if not isinstance(content, str | bytes):
            path.write_text(json.dumps(content), encoding="utf-8")
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return change


def remove(*patterns):
    """A change that takes files away."""
    def change(folder):
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()
    return change


def in_json(name, change_content):
    """A change of a JSON file, by a function that alters what is in it."""
    return lambda folder: change_config(folder, change_content, name)


def images(**keys):
    """A change of the image processor's settings, in whichever file they stand."""
    def change(folder):
        if (folder / "processor_config.json").exists():
            change_config(folder, lambda content: content["image_processor"].update(keys), "processor_config.json")
        else:
            change_config(folder, lambda content: content.update(keys), "preprocessor_config.json")
    return change


def rename_weights(old, new):
    """A change of the names of weights."""
    def change(folder):
        weights = load_file(folder / "model.safetensors")
        renamed = {re.sub(old, new, name): weight for name, weight in weights.items()}
        save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return change


def shard(folder):
    """Cut the weights into two files with an index, and lose the second."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    write("model.safetensors.index.json", index)(folder)
    (folder / "model.safetensors").unlink()


def shard_and_lose(folder):
    """The same, without the second file."""
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def into_subfolder(name, *more):
    """A change that moves all files into a subfolder, and does more."""
    def change(folder):
        (folder / name).mkdir()
        for path in [path for path in folder.iterdir() if path.is_file()]:
            shutil.move(path, folder / name / path.name)
        for step in more:
            step(folder)
    return change


def all_of(*changes):
    """Several changes, one after another."""
    def change(folder):
        for one in changes:
            one(folder)
    return change


def cut_short(name, size):
    """A change that loses the end of a file."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 605143316\n"
OPEN_CLIP = write("open_clip_config.json", {"model_cfg": {"embed_dim": 64}, "preprocess_cfg": {}})
# What is done to a folder of an architecture, and what the one line must hold.
FAULTS = {
    # sizes
    "a crop larger than the model reads": ("clip-base-patch32", images(size=336, crop_size=336),
                                           ["336 x 336", "224 x 224", "preprocessor_config.json", "config.json"]),
    "a crop smaller than the model reads": ("clip-new-eos", images(crop_size={"height": 64, "width": 64}),
                                            ["64 x 64", "80 x 80", "processor_config.json"]),
    "a crop that is no square": ("clip-large-patch14", images(crop_size={"height": 224, "width": 160}), ["160 x 224"]),
    "a squeeze to another size": ("siglip-base", images(size={"height": 384, "width": 384}), ["384 x 384", "224 x 224"]),
    "a bare size where nothing is cropped": ("siglip-base", images(size=224), ["size to a height and a width"]),
    "a bare size of SigLIP 2": ("siglip2-base", images(size=256), ["size to a height and a width", "224 x 224"]),
    "a model of another size": (
        "siglip2-base", in_json("config.json", lambda c: c["vision_config"].update(image_size=256)), []),
    "no centre crop": ("clip-base-patch32", images(do_center_crop=False), ["do_center_crop", "preprocessor_config.json"]),
    "no centre crop in a new folder": (None, images(do_center_crop=False), ["do_center_crop", "processor_config.json"]),
    "a shortest edge alone": ("siglip-base", images(size={"shortest_edge": 224}), ["size to a height and a width"]),
    "a longest edge": ("clip-base-patch32", images(size={"longest_edge": 224}), ["resize"]),
    "no resize": ("clip-laion-g", images(do_resize=False), ["resize"]),
    "an edge without bounds": (None, images(size={"shortest_edge": 10**6}), ["resize", "1000000"]),
    "an edge that is a word": (None, images(size={"shortest_edge": "64"}), ["resize"]),
    "an edge that is no whole number": (None, images(size={"shortest_edge": 64.5}), ["resize"]),
    "a negative size": ("siglip-base", images(size={"height": -224, "width": 224}), ["resize"]),
    # levels
    "a mean of a word": (None, images(image_mean=[0.5, "x", 0.5]), ["cannot load"]),
    "a mean of an object": ("clip-base-patch32", images(image_mean={}), ["cannot load"]),
    "a deviation of nothing": (None, images(image_std=[0.5, 0, 0.5]), ["image_std"]),
    "a negative deviation": ("siglip-base", images(image_std=[-0.5, -0.5, -0.5]), ["image_std"]),
    "a factor of nothing": ("siglip2-base", images(rescale_factor=0), ["rescale_factor"]),
    "a factor that is a word": ("siglip2-base", images(rescale_factor="1/255"), ["cannot load"]),
    "a way of resampling that is a word": ("siglip-base", images(resample="bicubic"), ["cannot load"]),
    "a way of resampling that Pillow lacks": (None, images(resample=9), ["cannot load"]),
    # files
    "no vocabulary": ("clip-base-patch32", remove("tokenizer*", "vocab.json"), ["vocabulary", "tokenizer.json"]),
    "merges without a vocabulary": ("clip-large-patch14", remove("tokenizer.json", "vocab.json"), ["vocabulary", "merges.txt"]),
    "no sentencepiece model": ("siglip-base", remove("spiece.model"), ["vocabulary", "spiece.model"]),
    "no preprocessor": ("siglip2-base", remove("preprocessor_config.json"), ["preprocessor_config.json", "copy"]),
    "no preprocessor in a new folder": (None, remove("processor_config.json"), ["preprocessor_config.json"]),
    "a pointer for weights": ("clip-base-patch32", write("model.safetensors", POINTER), ["model.safetensors", "git lfs pull"]),
    "a pointer for a vocabulary": ("siglip-base", write("spiece.model", POINTER), ["spiece.model", "git lfs pull"]),
    "a pointer for a tokenizer": ("siglip2-base", write("tokenizer.json", POINTER), ["tokenizer.json", "git lfs pull"]),
    "weights cut short": (None, cut_short("model.safetensors", 100_000), ["model.safetensors", "100000 bytes"]),
    "empty weights": (None, write("model.safetensors", b""), ["model.safetensors", "0 bytes"]),
    "a page for weights": (None, write("model.safetensors", "<html>not found</html>"), ["model.safetensors"]),
    "a header that is none": (None, write("model.safetensors", b"\x05" + bytes(7) + b"hello"), ["model.safetensors"]),
    "a shard that is missing": (None, shard_and_lose, ["model-00002-of-00002.safetensors", "1 of 2"]),
    "a config that is no JSON": ("clip-base-patch32", write("config.json", "{"), ["config.json is not JSON"]),
    "a preprocessor that is no JSON": (
        "siglip-base", write("preprocessor_config.json", "size: 3"), ["preprocessor_config.json"]),
    "a length that is a word": (
        "siglip2-base", in_json("tokenizer_config.json", lambda c: c.update(model_max_length="")), ["cannot load"]),
    "no token to pad with": ("siglip-base", in_json("tokenizer_config.json", lambda c: c.update(pad_token=None)), []),
    "architectures that are a number": (None, in_json("config.json", lambda c: c.update(
        architectures=1.5, model_type="no-such-model")), ["'no-such-model'"]),
    "a tokenizer config that is a list": (
        "clip-base-patch32", write("tokenizer_config.json", []), ["tokenizer_config.json"]),
    # weights
    "a projection of another shape": (None, lambda folder: change_weights(
        folder, lambda weights: weights.update({"text_projection.weight": torch.zeros(32, 128)})),
        ["text_projection.weight", "(32, 128)", "config.json"]),
    "more positions than weights": ("clip-base-patch32", in_json("config.json", lambda c: c["text_config"].update(
        max_position_embeddings=128)), ["position_embedding.weight", "(77, 128)", "(128, 128)"]),
    "another patch": ("siglip-base", in_json("config.json", lambda c: c["vision_config"].update(patch_size=32)),
                      ["embedding", "(128, 3, 16, 16)", "(128, 3, 32, 32)"]),
    "names with a prefix": (None, rename_weights("^", "model."), ["lacks weights", "model."]),
    "an adapter never merged": (None, rename_weights("q_proj.weight", "q_proj.base_layer.weight"),
                                         ["lacks weights", "q_proj.weight", "base_layer"]),
    "more layers than weights": ("siglip-base", in_json("config.json", lambda c: c["text_config"].update(num_hidden_layers=3)),
                                 ["lacks weights", "layers.2"]),
    # counts, of which test_family_configs.py tries many more
    "a negative number of heads": ("clip-base-patch32", in_json("config.json", lambda c: c["text_config"].update(
        num_attention_heads=-1)), []),
    "heads that do not divide": ("siglip-base", in_json("config.json", lambda c: c["vision_config"].update(
        num_attention_heads=3)), []),
    "a vocabulary without bounds": ("siglip2-base", in_json("config.json", lambda c: c["text_config"].update(
        vocab_size=10**12)), []),
    # other formats
    "open_clip's folder": ("clip-base-patch32", all_of(
        remove("config.json", "model.safetensors", "preprocessor_config.json"), OPEN_CLIP,
        write("open_clip_model.safetensors", b"x")), ["open_clip_config.json", "vision_cfg"]),
    "timm's config next to open_clip's": ("clip-base-patch32", all_of(
        remove("model.safetensors"), OPEN_CLIP, write("config.json", {"architecture": "vit_base_patch16_siglip_224"}),
        write("open_clip_model.safetensors", b"x")), ["open_clip_config.json", "vision_cfg"]),
    "a sentence-transformers folder": ("clip-base-patch32", into_subfolder("0_CLIPModel", write("modules.json", [])),
                                       ["sentence-transformers", "0_CLIPModel", "pretrained_model"]),
    "a sentence-transformers folder of text": ("clip-base-patch32", into_subfolder("0_Transformer", write("modules.json", [])),
                                               ["sentence-transformers", "0_Transformer"]),
    "a pipeline": (None, into_subfolder("text_encoder", write("model_index.json", {})), ["diffusers"]),
    "a training run": (None, into_subfolder("checkpoint-500", write("trainer_state.json", {})), ["checkpoint-500"]),
    "an ONNX export": (None, all_of(remove("*"), write("model.onnx", b"x")), ["another program"]),
    "a checkpoint alone": (None, all_of(remove("*"), write("epoch_10.pt", b"x")), ["only weights", "config.json"]),
    "nothing": (None, remove("*"), ["no config.json"]),
    "only a pickle": (None, as_pickle, ["model.safetensors", "a pickle can run code"]),
    "no model_type": ("clip-base-patch32", in_json("config.json", lambda c: c.pop("model_type")), ["model_type"]),
    # code of its own
    "a model with code": (None, in_json("config.json", lambda c: c.update(
        model_type="jina_clip", auto_map={"AutoModel": "jinaai/jina--modeling.JinaCLIPModel"})), ["'jina_clip'"]),
    "a tokenizer with code": (None, in_json("tokenizer_config.json", lambda c: c.update(
        tokenizer_class="MyTokenizer", auto_map={"AutoTokenizer": ["tok.MyTokenizer", None]})), ["MyTokenizer", "never run"]),
    "a known kind with code": ("siglip-base", in_json("config.json", lambda c: c.update(
        architectures=["MySigLIP"], auto_map={"AutoModel": "modeling.MySigLIP"})), ["MySigLIP", "never run"]),
    "a processor with code": (None, all_of(remove("processor_config.json"), write("preprocessor_config.json", {
        "image_processor_type": "MyProcessor", "auto_map": {"AutoImageProcessor": "proc.MyProcessor"}})),
        ["MyProcessor", "never run"]),
    "a processor nobody knows": (None, all_of(remove("processor_config.json"), write("preprocessor_config.json", {
        "image_processor_type": "NoSuchProcessor"})), []),
    "a processor under its old name": ("clip-base-patch32", images(image_processor_type="CLIPFeatureExtractor"), [
        "preprocessor_config.json names the image_processor_type CLIPFeatureExtractor", "CLIPImageProcessor today"]),
    "a text tower alone": (
        None, in_json("config.json", lambda c: c.update(model_type="clip_text_model")), ["'clip_text_model'"]),
}


@pytest.fixture
def broken(shelf, tmp_path):
    """A function that makes the folder of a fault: broken("nothing")."""
    def make(what):
        name, change, _ = FAULTS[what]
        folder = shelf.copy(name or str(BUNDLED), tmp_path / "a-model")
        change(folder)
        return folder
    return make


def assert_one_line(outcome, *parts):
    """Exit 6, one line that names the folder and holds `parts`, and no advice of a library."""
    assert outcome.code == 6, outcome.stderr
    assert outcome.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", outcome.stderr), outcome.stderr
    for part in parts:
        assert part in outcome.stderr, outcome.stderr
    for advice in LIBRARY_ADVICE:
        assert advice not in outcome.stderr


def test_a_revision_of_a_folder_is_told(run_main, shapes, bundled_model):
    """A folder has no revisions: one that is set is a warning, and the run goes on."""
    outcome = run_main("--config", shapes(pretrained_model=bundled_model, rows=2, revision="v2"))
    assert outcome.code == 0
    assert [line for line in outcome.stderr.splitlines() if line.startswith("warning") and "revision: v2" in line]
    assert "revision" not in run_main("--config", shapes(pretrained_model=bundled_model, rows=2), "--fresh").stderr


@pytest.mark.slow
@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_is_told_when_the_model_is_loaded(what, broken, run_main, shapes):
    """Each fault of a model folder is exit 6 and one line that names the file or the weight, before any row is scored."""
    folder = broken(what)
    outcome = run_main("--config", shapes(pretrained_model=str(folder), rows=2))
    assert_one_line(outcome, *FAULTS[what][2])
    if "resize" not in FAULTS[what][2]:
        assert "a-model" in outcome.stderr


@pytest.mark.slow
@pytest.mark.parametrize("what", sorted(FAULTS.keys() - {"a tokenizer with code", "a known kind with code"}))
def test_a_script_alone_ends_in_one_line_as_well(what, broken, run_main, shapes, tmp_path, monkeypatch):
    """Without addons/ the same folders are refused too, if in fewer words: no traceback, no score of a broken model."""
    monkeypatch.setattr(script, "ADDONS", tmp_path / "nowhere")
    outcome = run_main("--config", shapes(pretrained_model=str(broken(what)), rows=2))
    alone, *rest = outcome.stderr.splitlines(keepends=True)
    assert alone.startswith("the folder addons/ is not next to the script")
    assert_one_line(dataclasses.replace(outcome, stderr="".join(rest)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "change"), [
    ("clip-base-patch32", images(size=224, crop_size=224)),
    ("clip-base-patch32", images(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})),
    ("clip-base-patch32", images(size={"height": 224, "width": 224}, do_center_crop=False)),
    ("siglip-base", images(size=[224, 224])), (None, images(size=64, crop_size=64)), (None, shard), (None, OPEN_CLIP),
    (None, rename_weights("^", "clip.")),
    (None, all_of(OPEN_CLIP, write("open_clip_model.safetensors", b"x"))),
    (None, write("1_Pooling/config.json", {})), (None, write("modules.json", []))])
def test_a_sound_folder_is_scored(name, change, shelf, tmp_path, run_main, shapes):
    """Sizes as bare numbers or in words, weights in several files, other formats next to this one: all that is well scores."""
    folder = shelf.copy(name or str(BUNDLED), tmp_path / "a-model")
    change(folder)
    outcome = run_main("--config", shapes(pretrained_model=str(folder), rows=2))
    assert outcome.code == 0, outcome.stderr
    assert outcome.result["scored"] == 2


@pytest.mark.slow
def test_a_vocabulary_with_marks_that_the_model_does_not_embed(shelf, tmp_path, noise):
    """mT5's vocabulary ends with a hundred marks, which SigLIP's models for all languages do not embed: no caption becomes
    one of them, whatever is written in it. Where one could, the tokenizer is refused."""
    plain = shelf.copy("siglip-base", tmp_path / "plain")
    folder = shelf.copy("siglip-base", tmp_path / "a-model")
    pieces = sentencepiece_model_pb2.ModelProto.FromString((folder / "spiece.model").read_bytes())
    for number in reversed(range(100)):
        pieces.pieces.add(piece=f"▁<extra_id_{number}>", score=0.0, type=4)  # user-defined
    (folder / "spiece.model").write_bytes(pieces.SerializeToString())
    captions = ["two cats", "a <extra_id_5> dog ▁<extra_id_7> <extra_id_99>"]
    scorers = [script.Scorer(script.Config(pretrained_model=str(model), use_cuda=False)) for model in (plain, folder)]
    assert len(scorers[1].family.tokenizer) == len(scorers[0].family.tokenizer) + 100
    own, expected = (scorer.similarity([noise(90, 50)] * 2, captions) for scorer in scorers)
    assert np.array_equal(own, expected)
    change_config(folder, lambda config: config.update(tokenizer_class="T5Tokenizer", extra_ids=0), "tokenizer_config.json")
    with pytest.raises(script.Trouble, match="do not belong together"):
        script.Scorer(script.Config(pretrained_model=str(folder), use_cuda=False))


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "follows"), [
    ({"image_processor_type": "MobileViTImageProcessor"}, "exact"),  # turns red into blue
    ({"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0.8}, "exact"),  # enlarges before it cuts
    ({"image_processor_type": "LevitImageProcessor"}, "exact"),
    ({"image_processor_type": "EfficientNetImageProcessor", "include_top": True}, "fast")])  # normalises twice
def test_an_image_processor_with_a_way_of_its_own(changes, follows, shelf, tmp_path, noise):
    """A class that prepares images otherwise than its settings tell is exit 6 for the `preprocess` that does not follow it,
    and has the model's very pixels where one does."""
    folder = shelf.copy(str(BUNDLED), tmp_path / "a-model")
    images(**changes)(folder)
    for way in ("fast", "exact"):
        config = script.Config(pretrained_model=str(folder), use_cuda=False, preprocess=way)
        if way != follows:
            with pytest.raises(script.Trouble, match=f"{changes['image_processor_type']}, prepares images in") as trouble:
                script.Scorer(config)
            assert trouble.value.exit_code == 6 and f"preprocess: {way} does not follow" in str(trouble.value)
            continue
        scorer = script.Scorer(config)
        image = noise(90, 50)
        made = scorer.pixel_levels.numpy()[np.arange(3)[:, None, None], scorer.resize(image)]
        wanted = scorer.family.processor(image)["pixel_values"][0]
        np.testing.assert_allclose(made, wanted, atol=1e-5 if way == "exact" else 0.2)


@pytest.mark.slow
def test_a_bare_size_of_a_crop_means_what_the_words_mean(shelf, tmp_path, noise):
    """CLIP's `"size": n, "crop_size": n` scores as the sizes in words do, bit for bit."""
    plain = script.Scorer(script.Config(pretrained_model=str(BUNDLED), use_cuda=False))
    folder = shelf.copy(str(BUNDLED), tmp_path / "a-model")
    images(size=64, crop_size=64)(folder)
    bare = script.Scorer(script.Config(pretrained_model=str(folder), use_cuda=False))
    assert bare.similarity([noise(90, 50)], ["a cat"]) == plain.similarity([noise(90, 50)], ["a cat"])


def test_a_folder_of_the_hubs_cache(tmp_path, shelf, run_main, shapes):
    """models--owner--name, as it lies in the Hub's cache, is told with the id and the folder to set; a snapshot of links
    into blobs/ is scored."""
    repository = tmp_path / "models--some-one--my--model"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots/0123abc"
    shutil.copytree(BUNDLED, snapshot)
    for path in list(snapshot.iterdir()):
        blob = repository / "blobs" / path.name.replace(".", "-")
        path.rename(blob)
        path.symlink_to(f"../../blobs/{blob.name}")
    outcome = run_main("--config", shapes(pretrained_model=str(repository), rows=2))
    assert_one_line(outcome, "some-one/my--model", "snapshots/0123abc", "Hub's cache")
    assert run_main("--config", shapes(pretrained_model=str(snapshot), rows=2)).result["scored"] == 2


@pytest.mark.slow
def test_captions_that_would_be_filled_up_on_the_left(shelf, tmp_path, run_main, shapes):
    """SigLIP's captions are filled up on the right, as it was trained, whatever its tokenizer's config says; one line says
    so. For CLIP, which reads nothing of what they are filled up with, nothing is said."""
    for name, said in (("siglip2-base", 1), (str(BUNDLED), 0)):
        folder = shelf.copy(name, tmp_path / f"{said}-lines")
        change_config(folder, lambda config: config.update(padding_side="left"), "tokenizer_config.json")
        outcome = run_main("--config", shapes(pretrained_model=str(folder), rows=2, output_path=str(tmp_path / f"out-{said}")))
        assert outcome.code == 0 and outcome.stderr.count("fill captions up on the left") == said
    left, right = (script.Scorer(script.Config(pretrained_model=str(model), use_cuda=False))
                   for model in (tmp_path / "1-lines", shelf("siglip2-base")))
    assert torch.equal(left.encode_texts(left.tokenize(["a cat"])[0]), right.encode_texts(right.tokenize(["a cat"])[0]))


@pytest.mark.parametrize(("address", "cure"), [
    ("https://huggingface.co/openai/clip-vit-base-patch32", "set pretrained_model: openai/clip-vit-base-patch32"),
    ("https://huggingface.co/openai/clip-vit-base-patch32/tree/main", "set pretrained_model: openai/clip-vit-base-patch32"),
    ("hf://google/siglip-base-patch16-224", "set pretrained_model: google/siglip-base-patch16-224"),
    ("s3://bucket/model", "download it first"), ("https://huggingface.co/datasets/some-one/set", "download it first")])
def test_an_address_for_a_model(address, cure, run_main, write_config):
    """An address is no model: one line and exit 2, with the Hub id where it is a model's page there."""
    outcome = run_main("--config", write_config(pretrained_model=address))
    assert outcome.code == 2 and outcome.stderr.count("\n") == 1 and outcome.stderr.endswith(f"{cure}\n")


def test_weights_without_a_place_are_a_warning(shelf, tmp_path, run_main, shapes):
    """Weights that config.json has no place for are named in one warning: perhaps the config belongs to a smaller model."""
    folder = shelf.copy(str(BUNDLED), tmp_path / "a-model")
    change_config(folder, lambda config: config["text_config"].update(num_hidden_layers=2))
    outcome = run_main("--config", shapes(pretrained_model=str(folder), rows=2))
    warnings = [line for line in outcome.stderr.splitlines() if line.startswith("warning")]
    assert outcome.code == 0
    assert len(warnings) == 1
    assert "text_model.encoder.layers.2" in warnings[0]


@pytest.mark.parametrize(("names", "parts"), [
    (["open_clip_model.safetensors", "README.md"], ["open_clip_config.json", "next to them"]),
    (["modules.json", "0_CLIPModel/config.json", "0_CLIPModel/model.safetensors"], ["0_CLIPModel"]),
    (["model_index.json", "unet/config.json"], ["diffusers"]),
    (["ggml-model-q4.gguf"], ["another program"]),
    (["pytorch_model.bin"], ["only weights"]), ([".gitattributes"], ["no config.json"])])
def test_a_repository_is_judged_by_its_names(names, parts, monkeypatch):
    """What the Hub lists is told apart before anything is downloaded."""
    monkeypatch.setattr(script, "_list_hub_files", lambda name, revision: (set(names), ""))
    with pytest.raises(script.Trouble) as trouble:
        script.find_on_hub("some-one/model", "main", False)
    assert trouble.value.exit_code == 6
    for part in (*parts, "some-one/model"):
        assert part in str(trouble.value)


@pytest.mark.parametrize(("config", "part"), [
    ({"model_type": "blip-2"}, "is a 'blip-2' model"), ({"model_type": "clip_text_model"}, "is a 'clip_text_model' model"),
    ({"model_type": "clip", "architectures": ["EvaCLIPModel"], "auto_map": {"AutoModel": "its.EvaCLIPModel"}}, "EvaCLIPModel"),
    ({}, "names no model_type"), ([], "no JSON object")])
def test_a_repository_of_another_kind_is_not_downloaded(config, part, monkeypatch, tmp_path):
    """What a repository's config.json says is told before gigabytes of weights are downloaded."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = {"config.json", "preprocessor_config.json", "model.safetensors"}
    monkeypatch.setattr(script, "_list_hub_files", lambda name, revision: (names, ""))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, revision: str(tmp_path / file))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("it was downloaded"))
    with pytest.raises(script.Trouble, match=part) as trouble:
        script.find_on_hub("some-one/model", "main", False)
    assert trouble.value.exit_code == 6 and "some-one/model" in str(trouble.value)


@pytest.mark.parametrize("names", [
    ["config.json", "model.safetensors"], ["config.json", "pytorch_model.bin", "open_clip_pytorch_model.bin"],
    ["config.json", "model.safetensors.index.json", "open_clip_config.json"],
    ["adapter_config.json", "adapter_model.safetensors"]])
def test_a_repository_of_transformers_is_taken(names):
    """Repositories that also hold another format are taken for what transformers reads in them."""
    folders.check_names(names, "some-one/model")


@pytest.mark.parametrize(("text", "kept"), [
    ("Bad thing. Please pass the argument `trust_remote_code=True` to allow it.",
     "it asks for code of its own, which is never run"),
    ("Wrong shape.\nYou can set `ignore_mismatched_sizes` to True.", "Wrong shape."),
    ("No such type. Try pip install --upgrade transformers! See https://github.com/huggingface.", "No such type."),
    ("File is broken", "File is broken"), ("", "")])
def test_advice_of_libraries_is_left_out(text, kept):
    """Of a library's text what it recommends against this program's rules is not passed on."""
    assert faults.reason_of(ValueError(text)) == kept
