"""Model folders as people have them: what is wrong with one is found before it is loaded, and told with its cure in one line.

`check_names` looks at names alone, those in a folder or those that the Hub lists before anything is downloaded; `check_listed`
also at the config.json that is downloaded first, and `check_folder` into all files. What only the loaded model can tell
(weights, sizes, vocabulary, whether it computes) the script checks itself.
"""
import contextlib
import json
import math
import pathlib
import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from image_text_sim_clip import (
    ADAPTER,
    EXIT_MODEL,
    FAMILIES,
    SAFETENSORS,
    Family,
    Json,
    ModelFiles,
    Scorer,
    Trouble,
    find_family,
    say,
)

if TYPE_CHECKING:
    import torch

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
# Each line a set of files that together are a vocabulary.
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",), ("spiece.model",), ("tokenizer.model",),
                ("sentencepiece.bpe.model",))
POINTER = b"version https://git-lfs"  # the first bytes of what git leaves in place of a large file
LONGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it
COUNTS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size",
          "max_position_embeddings", "image_size", "patch_size", "num_channels")  # of config.json and its sections, all from 1
MOST_LEVELS = 2.0  # of 255, that an image prepared here may be from the model's own, on average; the fast resize is 0.1 off
SPARE_WEIGHTS = 1_000_000  # that a model may have besides, whatever its files hold


def check_names(names: Collection[str], name: str) -> None:
    """Raise Trouble (exit 6) where these files, paths inside the model `name`, are no model that the script reads."""
    if "config.json" in names and not _is_open_clip_alone(names):
        return
    if ADAPTER in names:
        return
    raise Trouble(EXIT_MODEL, f"{name} {_describe_other_format(names)}")


def _is_open_clip_alone(names: Collection[str]) -> bool:
    """Whether only open_clip's weights are there; many repositories have them next to those that transformers reads."""
    own = any(re.fullmatch(r"(model|pytorch_model)\b.*\.(safetensors|bin)(\.index\.json)?", file) for file in names)
    return any(file.startswith("open_clip") for file in names) and not own


def _describe_other_format(names: Collection[str]) -> str:
    """Which format these files are in, and what to do about it."""
    inner = sorted(path for path in names if path.count("/") == 1 and path.endswith("/config.json"))
    folders = [path.split("/")[0] for path in inner]
    if any(file.startswith("open_clip") for file in names):
        return ("holds open_clip's weights without open_clip_config.json, which says how they are read: put that file next to "
                "them, or take the model's conversion for transformers, with config.json and model.safetensors")
    if "modules.json" in names:
        clip = next((folder for folder in folders if "CLIP" in folder), folders[0] if folders else "0_CLIPModel")
        return (f"is a sentence-transformers folder, whose model lies in {clip}: set pretrained_model to a local copy of that "
                f"folder, .../{clip}")
    if "model_index.json" in names:
        return "is a diffusers pipeline, which makes images: set pretrained_model to the CLIP model that is to score them"
    if any(file.endswith((".gguf", ".onnx", ".ggml", ".mlmodel", ".tflite")) for file in names):
        return "is a model for another program: take the original, with config.json and model.safetensors"
    if folders:
        return f"holds no config.json: not a model folder; there is one in {folders[0]}: set pretrained_model to that folder"
    if any(file.endswith((".pt", ".pth", ".ckpt", ".bin", ".safetensors")) for file in names):
        return ("holds no config.json, only weights: copy config.json, preprocessor_config.json and the tokenizer's files of "
                "its base model to it")
    return "holds no config.json: not a model folder"


def fetch_config(repository: str, revision: str, names: Collection[str]) -> pathlib.Path | None:
    """A folder with the config.json of a repository of the Hub, which is downloaded alone; None where there is none, or it
    cannot be had."""
    import huggingface_hub
    if "config.json" not in names:
        return None
    try:
        return pathlib.Path(huggingface_hub.hf_hub_download(repository, "config.json", revision=revision)).parent
    except Exception:  # what it is will be told where all files are downloaded
        return None


def check_listed(names: Collection[str], name: str, config_folder: pathlib.Path | None) -> None:
    """Raise Trouble (exit 6) for a repository of the Hub that is no model that the script reads, before gigabytes of it are
    downloaded: by its files' names, and by its config.json where that could be had."""
    check_names(names, name)
    if config_folder and ADAPTER not in names:
        _refuse_own_code(_read_object(config_folder / "config.json", name), "config.json", name)
        find_family(ModelFiles(config_folder, "", True), name)


def check_folder(folder: pathlib.Path, name: str) -> None:
    """Raise Trouble (exit 6) for a folder with a file that is missing, broken or not what its name says."""
    files = {path.name for path in folder.iterdir() if path.is_file()}
    _refuse_cache_folder(folder, name)
    inner = {f"{path.parent.name}/{path.name}" for path in folder.glob("*/config.json")}
    check_names(files | inner, name)
    for file in sorted(files):
        if file.endswith((".json", ".safetensors", ".model", ".bin")):
            _refuse_pointer(folder / file, name)
        if file in ("config.json", "tokenizer.json", "tokenizer_config.json", ADAPTER, *PROCESSOR_FILES):
            _refuse_own_code(_read_object(folder / file, name), file, name)
        if file in PROCESSOR_FILES:
            _refuse_old_class(_read_object(folder / file, name), file, name)
    if "config.json" in files:
        check_counts(_read_object(folder / "config.json", name), name)
    for file in sorted(_weights_files(folder, files, name)):
        _check_safetensors(folder / file, name)
    # an adapter takes what it lacks from its base model, and another kind of model is refused for its kind
    if ADAPTER not in files and _read_object(folder / "config.json", name).get("model_type") in FAMILIES:
        _check_is_complete(files, name)


def _refuse_cache_folder(folder: pathlib.Path, name: str) -> None:
    """Raise Trouble (exit 6) for a repository's folder in the Hub's cache, whose models lie in its snapshots."""
    snapshots = sorted(path.name for path in folder.glob("snapshots/*") if path.is_dir())
    if snapshots and folder.name.startswith("models--"):
        raise Trouble(EXIT_MODEL, f"{name} is a folder of the Hub's cache: set pretrained_model to "
                                  f"{folder.name.removeprefix('models--').replace('--', '/', 1)}, with HF_HUB_OFFLINE=1 where "
                                  f"there is no network, or to the folder snapshots/{snapshots[0]} in it")


def check_counts(config: Json, name: str, section: str = "") -> None:
    """Raise Trouble (exit 6) for a config, or a section of one, with sizes and numbers of things that nothing can have."""
    place = f"{name}: its config.json says in {section} that" if section else f"{name}: its config.json says that"
    for key in COUNTS:
        value = config.get(key)
        if isinstance(value, bool | int | float | str) and (type(value) is not int or value < 1):
            raise Trouble(EXIT_MODEL, f"{place} {key} is {value!r:.40}, where a whole number from 1 belongs: take the "
                                      "config.json that belongs to the weights")
    width = config.get("hidden_size")
    heads = config.get("num_attention_heads")
    if isinstance(width, int) and isinstance(heads, int) and width % heads and not config.get("head_dim"):
        raise Trouble(EXIT_MODEL, f"{place} {heads} attention heads share a hidden_size of {width}, which they do not divide: "
                                  "take the config.json that belongs to the weights")
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config"):
            check_counts(value, name, key)


@contextlib.contextmanager
def bounded_by_weights(files: ModelFiles, name: str) -> Iterator[None]:
    """While in this context, a model that is built may be several times as large as its files of weights, and no larger.

    transformers would fill what the files lack with numbers of chance: of a vocabulary of 10^9 that is all the memory.
    Raises Trouble (exit 6) for a config that asks for more.
    """
    from torch.nn.modules import module
    folder = (files.base or files).folder
    held = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    most = held + SPARE_WEIGHTS  # a weight takes two bytes in a file, or four
    asked = 0

    def count_weight(owner: "torch.nn.Module", key: str, weight: "torch.nn.Parameter | None") -> None:
        nonlocal asked
        asked += weight.numel() if weight is not None and weight.is_meta else 0
        if asked > most:
            raise Trouble(EXIT_MODEL, f"{name}: its config.json asks for more than {most:,} weights, and its files of weights "
                                      f"hold {held:,} bytes: take the config.json that belongs to them")
    hook = module.register_module_parameter_registration_hook(count_weight)
    try:
        yield
    finally:
        hook.remove()


def check_preparing(scorer: Scorer) -> None:
    """Raise Trouble (exit 6) where the model's own image processor makes of an image what the script does not.

    Some classes of transformers do more than the script asks them about: they enlarge by `crop_pct` before they cut, turn red
    into blue, or normalise twice. `preprocess: exact` follows most of them, `fast` some.
    """
    family = scorer.family
    warn_of_padding(family)
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    image = Image.fromarray(noise).resize((320, 240), Image.Resampling.BILINEAR)
    wanted = np.asarray(family.processor(image)["pixel_values"][0])
    levels = scorer.pixel_levels.cpu().numpy()
    made = levels[np.arange(3)[:, None, None], scorer.resize(image)]  # (3, H, W)
    apart = np.abs(made - wanted).mean() if made.shape == wanted.shape else math.inf
    step = (levels[:, -1] - levels[:, 0]).mean() / 255
    if apart > MOST_LEVELS * step:
        kind = type(family.processor).__name__.removesuffix("Pil")
        other = "fast" if scorer.config.preprocess == "exact" else "exact"
        raise Trouble(EXIT_MODEL, f"{family.name}: its image processor, {kind}, prepares images in a way of its own, which "
                                  f"preprocess: {scorer.config.preprocess} does not follow: try preprocess: {other}")


def warn_of_padding(family: Family) -> None:
    """Say where a tokenizer would fill captions up on the left, and the model reads what they are filled up with."""
    reads_padding = family.padded_length(family.encode(["a"])[0]) > 0
    if reads_padding and getattr(family.tokenizer, "padding_side", "right") == "left":
        say(f"warning: {family.name}: its tokenizer would fill captions up on the left; they are filled up on the right, as "
            f"{family.kind} models were trained")


def _refuse_pointer(path: pathlib.Path, name: str) -> None:
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise Trouble(EXIT_MODEL, f"{name}: its {path.name} is a pointer of Git LFS, not the file: run git lfs pull there")


def _read_object(path: pathlib.Path, name: str) -> Json:
    """The JSON object in a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Trouble(EXIT_MODEL, f"{name}: its {path.name} is not JSON ({error}): copy it again") from None
    if not isinstance(content, dict):
        raise Trouble(EXIT_MODEL, f"{name}: its {path.name} holds no JSON object: copy it again")
    return content


def find_own_code(content: Json) -> str:
    """The class that a config file asks for by code of its own, for which transformers would take another; else empty."""
    if not content.get("auto_map"):
        return ""
    import transformers
    architectures = content.get("architectures")
    named = [content.get("tokenizer_class"), content.get("image_processor_type"),
             *(architectures if isinstance(architectures, list) else [])]
    return next((str(one) for one in named if one and not hasattr(transformers, str(one))), "")


def _refuse_own_code(content: Json, file: str, name: str) -> None:
    """Raise Trouble (exit 6) where a file asks for a class by code of its own."""
    foreign = find_own_code(content)
    if foreign:
        raise Trouble(EXIT_MODEL, f"{name}: its {file} asks for {foreign}, which comes with code of its own, and that is never "
                                  "run")


def _refuse_old_class(content: Json, file: str, name: str) -> None:
    """Raise Trouble (exit 6) for an image processor under the name of its class of old, which transformers no longer knows."""
    kind = str(content.get("image_processor_type"))
    if kind.endswith("FeatureExtractor"):
        now = kind.replace("FeatureExtractor", "ImageProcessor")
        raise Trouble(EXIT_MODEL, f"{name}: its {file} names the image_processor_type {kind}, which transformers calls {now} "
                                  "today: write that there, in a local copy of a model of the Hub")


def is_for_transformers(config: Json) -> bool:
    """Whether a config.json is for transformers without code of its own."""
    return bool(config.get("model_type")) and not find_own_code(config)


def _weights_files(folder: pathlib.Path, files: set[str], name: str) -> set[str]:
    """The names of the safetensors files that are read; Trouble (exit 6) where the index names one that is not there."""
    wanted = {"adapter_model.safetensors"} & files
    single, index = SAFETENSORS
    if single in files:
        return wanted | {single}
    if index in files:
        shards = {str(shard) for shard in _read_object(folder / index, name).get("weight_map", {}).values()}
        missing = sorted(shards - files)
        if missing:
            raise Trouble(EXIT_MODEL, f"{name} holds no {missing[0]}, which its {index} names ({len(missing)} of {len(shards)} "
                                      "files of weights are missing): copy or download it again")
        return wanted | shards
    return wanted


def _check_safetensors(path: pathlib.Path, name: str) -> None:
    """Raise Trouble (exit 6) for a file that is cut short, or no safetensors file at all."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(LONGEST_HEADER, size - 8):
            raise Trouble(EXIT_MODEL, f"{name}: its {path.name} ({size} bytes) is cut short or no safetensors file: copy or "
                                      "download it again")
        try:
            header = json.loads(file.read(length))
            end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise Trouble(EXIT_MODEL, f"{name}: its {path.name} begins with no header: copy or download it again") from None
    if size != 8 + length + end:
        raise Trouble(EXIT_MODEL, f"{name}: its {path.name} has {size} bytes and should have {8 + length + end}: copy or "
                                  "download it again")


def _check_is_complete(files: set[str], name: str) -> None:
    """Raise Trouble (exit 6) for a folder without a vocabulary, or without its image processor's config."""
    if not any(files.issuperset(vocabulary) for vocabulary in VOCABULARIES):
        raise Trouble(EXIT_MODEL, f"{name} holds no vocabulary (tokenizer.json, vocab.json with merges.txt, or spiece.model): "
                                  "copy the files of its base model's tokenizer to it")
    if files.isdisjoint(PROCESSOR_FILES):
        raise Trouble(EXIT_MODEL, f"{name} holds no preprocessor_config.json: copy the one of its base model to it")
