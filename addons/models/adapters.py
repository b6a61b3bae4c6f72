"""Adapters of peft (LoRA and its like), alone or next to their base model: merged into the base, so that one model scores.

transformers would take an adapter in silence where peft is installed, and leave it out in silence where it is not. Here it is
either merged or refused. A folder with an adapter holds `adapter_config.json` and `adapter_model.safetensors`; where it has no
`config.json` and weights of its own, the base model is the one that `adapter_config.json` names.
"""
import contextlib
import json
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from addons.models.faults import reason_of
from image_text_sim_clip import (
    ADAPTER,
    EXIT_MODEL,
    PICKLES,
    SAFETENSORS,
    FolderPlaces,
    ModelFiles,
    Trouble,
    find_in_folder,
    find_on_hub,
)

if TYPE_CHECKING:
    import torch

ADAPTER_WEIGHTS = "adapter_model.safetensors"
MERGED_TYPES = ("LORA", "ADALORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT", "HRA", "VERA", "LN_TUNING")
REFUSED_KEYS = ("megatron_config", "arrow_config")  # these import modules, or load other adapters, by names in the file
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "spiece.model", "tokenizer.model")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def read_adapter_config(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """What adapter_config.json says; raises Trouble (exit 6) for one that cannot be merged, or has no weights next to it."""
    try:
        config = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise Trouble(EXIT_MODEL, f"{name}: its {ADAPTER} is not JSON: copy it again from where it came from")
    kind = config.get("peft_type")
    refused = [key for key in REFUSED_KEYS if config.get(key)]
    if kind not in MERGED_TYPES or refused:
        what = f"uses {refused[0]}" if refused else f"is of type {kind}"
        raise Trouble(EXIT_MODEL, f"{name}: its adapter {what}, which cannot be merged; merged are {', '.join(MERGED_TYPES)}")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise Trouble(EXIT_MODEL, f"{name} holds {ADAPTER}, but no {ADAPTER_WEIGHTS}: save the adapter with safetensors, or "
                                  f"remove {ADAPTER} to score with the base model")
    return config


def find_base(folder: pathlib.Path, name: str, safetensors_only: bool = False) -> ModelFiles | None:
    """The base model of the adapter in `folder`, which its config names; None where the base lies in `folder` itself.

    Raises Trouble (exit 6) where there is none to be had, and for a base with an adapter of its own.
    """
    config = read_adapter_config(folder, name)
    own_weights = any((folder / file).is_file() for file in (*SAFETENSORS, *PICKLES))
    if own_weights and (folder / "config.json").is_file():
        return None
    named = str(config.get("base_model_name_or_path") or "")
    local = _find_local_base(folder, named, name)
    if local:
        base = find_in_folder(local, f"{named}, the base model of {name},")
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", named):
        base = find_on_hub(named, config.get("revision") or "main", safetensors_only)
    else:
        raise Trouble(EXIT_MODEL, f"{name} is an adapter, and its {ADAPTER} names the base model {named!r}, which is neither a "
                                  "folder here nor a Hub id: set base_model_name_or_path there")
    if base.has_adapter:
        raise Trouble(EXIT_MODEL, f"{name} is an adapter to {named}, which has an adapter itself: merge that one first")
    return base


def _find_local_base(folder: pathlib.Path, named: str, name: str) -> pathlib.Path | None:
    """The model folder that `named` is: seen from here, as peft reads it, or from the adapter's own folder.

    Raises Trouble (exit 6) where these are two models, of which nobody knows which one the adapter was trained on.
    """
    candidates = [pathlib.Path(named), folder / named] if named else []
    found = {path.resolve(): path for path in candidates if path.is_dir() and (path / "config.json").is_file()}
    if len(found) > 1:
        raise Trouble(EXIT_MODEL, f"{name} is an adapter, and the base model {named!r} that its {ADAPTER} names is one model "
                                  "seen from here and another one seen from its folder: write the whole path there")
    return next(iter(found.values()), next((path for path in candidates if path.is_dir()), None))


@contextlib.contextmanager
def open_places(files: ModelFiles) -> Iterator[FolderPlaces]:
    """Where to read base weights, tokenizer and image processor from: those next to the adapter go before the base's."""
    folder = files.folder
    if files.base is None:
        with tempfile.TemporaryDirectory() as view:  # the base alone, or transformers would load the adapter by itself
            for path in folder.iterdir():
                if path.is_file() and not path.name.startswith("adapter_"):
                    (pathlib.Path(view) / path.name).symlink_to(path.resolve())
            yield FolderPlaces(pathlib.Path(view), folder, folder)
        return
    base = files.base.folder
    has_tokenizer = any((folder / file).is_file() for file in TOKENIZER_FILES)
    has_processor = any((folder / file).is_file() for file in PROCESSOR_FILES)
    yield FolderPlaces(base, folder if has_tokenizer else base, folder if has_processor else base)


def merge(model: "torch.nn.Module", files: ModelFiles, name: str) -> "torch.nn.Module":
    """The model with the adapter's weights merged in; raises Trouble (exit 6) where they do not fit, and without peft."""
    try:
        import peft
    except ImportError:
        raise Trouble(EXIT_MODEL, f"{name} holds an adapter, which needs peft (pip install -r addons/requirements.txt); to "
                                  f"score with the base model alone, remove its {ADAPTER}") from None
    from safetensors.torch import load_file
    try:
        config = peft.PeftConfig.from_pretrained(str(files.folder))
        config.task_type = None  # the wrappers for tasks ask for methods that these models lack
        wrapped = peft.PeftModel.from_pretrained(model, str(files.folder), config=config)
        given = set(load_file(files.folder / ADAPTER_WEIGHTS))
        taken = set(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
        fits_nothing = sorted(given - taken - set(wrapped.state_dict()))
        missing = sorted(taken - given)
        merged: torch.nn.Module = wrapped.merge_and_unload(safe_merge=True)
    except Exception as error:  # peft raises nearly anything where config, weights and model do not belong together
        raise Trouble(EXIT_MODEL, f"cannot merge the adapter of {name}: {type(error).__name__}: {reason_of(error)}") from error
    if fits_nothing or missing:
        what = f"has no place for {fits_nothing[0]}" if fits_nothing else f"lacks {missing[0]}"
        raise Trouble(EXIT_MODEL, f"{name}: its adapter and its base model do not belong together: the merged model {what}")
    return merged
