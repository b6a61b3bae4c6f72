"""Where a model in open_clip's format lies: a folder, the Hub, and the second repository that its tokenizer may come from."""
import functools
import pathlib
import pickle
import re
import zipfile
from collections.abc import Collection
from typing import TYPE_CHECKING

from addons.models.folders import PROCESSOR_FILES, is_for_transformers
from addons.models.open_clip_config import CONFIG_FILE
from image_text_sim_clip import BUNDLED_HINT, EXIT_MODEL, PICKLES, SAFETENSORS, ModelFiles, Trouble, read_json, say

if TYPE_CHECKING:
    import torch

SAFETENSORS_FILE = "open_clip_model.safetensors"
PICKLE_FILE = "open_clip_pytorch_model.bin"
TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
                   "config.json"]

# OpenAI's archives, and where transformers finds the same weights; its ResNets are in open_clip's format only.
OPENAI_MODELS = {
    "ViT-B-32": "openai/clip-vit-base-patch32", "ViT-B-16": "openai/clip-vit-base-patch16",
    "ViT-L-14": "openai/clip-vit-large-patch14", "ViT-L-14-336px": "openai/clip-vit-large-patch14-336",
    "RN50": "hf-hub:timm/resnet50_clip.openai", "RN101": "hf-hub:timm/resnet101_clip.openai",
    "RN50x4": "hf-hub:timm/resnet50x4_clip.openai", "RN50x16": "hf-hub:timm/resnet50x16_clip.openai",
    "RN50x64": "hf-hub:timm/resnet50x64_clip.openai"}


def is_meant(files: Collection[str], name: str, folder: pathlib.Path | None) -> bool:
    """Whether a model that has open_clip's config among its files is read in that format: where its name asks for it by
    open_clip's prefix, and where it is not in transformers' format as well, which takes an image processor, weights and a
    config.json, in `folder`, that is transformers' own and not timm's, or for code that is never run."""
    is_in_transformers_format = has_any(files, PROCESSOR_FILES) and has_any(files, (*SAFETENSORS, *PICKLES))
    if is_in_transformers_format and folder:
        is_in_transformers_format = is_for_transformers(read_json(folder / "config.json") or {})
    return name.startswith("hf-hub:") or not is_in_transformers_format


def has_any(files: Collection[str], wanted: tuple[str, ...]) -> bool:
    """Whether one of the wanted is among the files."""
    return any(file in files for file in wanted)


def find_in_folder(folder: pathlib.Path, name: str, safetensors_only: bool) -> ModelFiles:
    """A folder in open_clip's format; a pickle in it is read with weights_only, and one line warns of it."""
    has_safetensors = (folder / SAFETENSORS_FILE).is_file()
    if not has_safetensors and not (folder / PICKLE_FILE).is_file():
        raise Trouble(EXIT_MODEL, f"{name} holds {CONFIG_FILE}, but neither {SAFETENSORS_FILE} nor {PICKLE_FILE}")
    if not has_safetensors and safetensors_only:
        raise Trouble(EXIT_MODEL, f"{name} has no {SAFETENSORS_FILE}, and safetensors_only is set")
    if not has_safetensors:
        say(f"warning: {name} has no {SAFETENSORS_FILE}; reading {PICKLE_FILE} with weights_only")
    return ModelFiles(folder, "", has_safetensors, open_clip=True)


def refuse_openai_checkpoint(name: str) -> None:
    """Raise Trouble (exit 6) with the Hub id to use instead, where `name` is one of OpenAI's archives, or called like one."""
    path = pathlib.Path(name)
    if path.is_dir():
        return _refuse_openai_folder(path, name)
    is_archive = path.is_file() and _is_jit_archive(path)
    stem = re.sub(r"[/@]", "-", path.stem if path.suffix == ".pt" else name)
    known = OPENAI_MODELS.get(stem)
    if known and (is_archive or path.suffix == ".pt" or not path.exists()):
        raise Trouble(EXIT_MODEL, f"{name} is one of OpenAI's own checkpoints, an archive that holds code, which this program "
                                  f"does not run; the same weights are on the Hub: set pretrained_model: {known}")
    if is_archive:
        raise Trouble(EXIT_MODEL, f"{name} is a TorchScript archive, which holds code that this program does not run; OpenAI's "
                                  f"own are on the Hub as {', '.join(list(OPENAI_MODELS.values())[:4])}")
    if path.is_file():
        raise Trouble(EXIT_MODEL, f"{name} is a file: pretrained_model names a folder with a model and its config, or a Hub id "
                                  f"(owner/name); {BUNDLED_HINT}")
    return None


def _refuse_openai_folder(folder: pathlib.Path, name: str) -> None:
    """Raise Trouble (exit 6) for a folder that holds OpenAI's archives and no model that is read here."""
    if any((folder / config).is_file() for config in ("config.json", CONFIG_FILE)):
        return
    for path in sorted(folder.glob("*.pt")):
        if path.stem in OPENAI_MODELS:
            raise Trouble(EXIT_MODEL, f"{name} holds {path.name}, one of OpenAI's own checkpoints, which this program does "
                                      "not read; the same weights are on the Hub: set pretrained_model: "
                                      f"{OPENAI_MODELS[path.stem]}")


def _is_jit_archive(path: pathlib.Path) -> bool:
    """Whether the file is TorchScript's: a zip with a folder `code`. Nothing of it is loaded."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


def load_weights(files: ModelFiles, name: str) -> "dict[str, torch.Tensor]":
    """Name -> weight, as they lie in the file; Trouble (exit 6) for one that holds more than weights, or is damaged."""
    import torch
    from safetensors.torch import load_file
    path = files.folder / (SAFETENSORS_FILE if files.safetensors else PICKLE_FILE)
    try:
        if files.safetensors:
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own text recommends weights_only=False
        raise Trouble(EXIT_MODEL, f"cannot load {name}: its {PICKLE_FILE} holds more than weights") from None
    except Exception as error:  # a damaged file makes them raise nearly anything
        if _is_jit_archive(path):
            raise Trouble(EXIT_MODEL, f"cannot load {name}: its {PICKLE_FILE} is a TorchScript archive, "
                                      "which holds code") from None
        raise Trouble(EXIT_MODEL, f"cannot load {name}: {type(error).__name__}: {str(error)[:300]}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]  # a checkpoint of a training run
    weights = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)} \
        if isinstance(content, dict) else {}
    if not weights or len(weights) != len(content):
        raise Trouble(EXIT_MODEL, f"cannot load {name}: its {PICKLE_FILE} is not a table of weights")
    return weights


@functools.cache
def find_second_repository(repository: str, name: str) -> pathlib.Path:
    """Download the tokenizer that `name`'s config takes from another repository; its folder is called by the commit.

    Where the Hub cannot be asked, its local cache answers. Raises Trouble (exit 6). One process asks once, so that a second
    copy of the model does not get another commit.
    """
    import huggingface_hub
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(repository, allow_patterns=TOKENIZER_FILES))
    except Exception as error:  # the client raises its own, its HTTP library's and the system's errors
        reason = error.__cause__ or error
        raise Trouble(EXIT_MODEL, f"cannot get {repository}, from which {name} takes its tokenizer (hf_tokenizer_name): "
                                  f"{type(reason).__name__}: {str(reason)[:160]}") from None


def has_tokenizer(folder: pathlib.Path) -> bool:
    """Whether a Hugging Face tokenizer lies in the folder."""
    return any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "spiece.model",
                                                      "sentencepiece.bpe.model", "vocab.json"))
