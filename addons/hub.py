"""Find a model on the Hugging Face Hub, at one commit, or in the Hub's local cache; download what is missing."""
import pathlib
import sys

import huggingface_hub

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class NotFound(Exception):
    """The model cannot be had; the message says what was tried."""


def find_on_hub(name: str, revision: str, safetensors_only: bool) -> tuple[pathlib.Path, bool]:
    """The folder of the model's snapshot, which is named after the commit, and whether its weights are safetensors.

    Raises NotFound. Where the Hub cannot be asked (no network, HF_HUB_OFFLINE), the cache answers.
    """
    files, tried = _list_files(name, revision)
    has_safetensors = bool(files & set(SAFETENSORS))
    refused = f"{name} has no safetensors at revision {revision}, and safetensors_only is set"
    if files and safetensors_only and not has_safetensors:
        raise NotFound(refused)
    # offline the client holds the cache against the repository's whole list: no pattern for a format never asked for
    weights = ["model*.safetensors" if has_safetensors else "pytorch_model*.bin"] if files else []
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    try:
        folder = pathlib.Path(huggingface_hub.snapshot_download(  # by branch or tag, or the cache would not know it offline
            name, revision=revision, allow_patterns=["*.json", "*.txt", "*.model", *weights], local_files_only=not files))
    except Exception as error:
        reason = error.__cause__ or error  # the client's own error says only that it is not in the cache either
        tried += ", the local cache (not there)" if not files else f", the Hub ({type(reason).__name__}: {str(reason)[:120]})"
        raise NotFound(f"cannot get {name} ({revision}): {tried}") from None
    safetensors = any((folder / f).exists() for f in SAFETENSORS)
    if not safetensors and not any((folder / f).exists() for f in PICKLES):
        raise NotFound(f"{name} ({revision}) has no weights this program reads: {tried}")
    if not safetensors and safetensors_only:
        raise NotFound(refused)
    return folder, safetensors


def _list_files(name: str, revision: str) -> tuple[set[str], str]:
    """The names of the revision's files, none if the Hub cannot say; and what was tried, in words."""
    tried = f"tried the folder {name!r} (none here)"
    try:
        info = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=15)
        return {sibling.rfilename for sibling in info.siblings or ()}, tried
    except Exception as error:  # the client raises its own, its HTTP library's and the system's errors
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE is set" if offline else f"{type(error).__name__}: {str(error)[:120]}"
        return set(), f"{tried}, the Hub ({reason})"
