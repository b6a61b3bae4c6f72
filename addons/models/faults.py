"""What is wrong with a model that a library could not load, in one line."""
import pickle
import re

UNWELCOME_ADVICE = ("trust_remote_code", "ignore_mismatched_sizes", "weights_only", "pip install", "upgrade", "report",
                    "force_download", "from_tf", "from_flax", "huggingface.co", "https://", "issue")


def reason_of(error: Exception) -> str:
    """The text of a library's error, without the sentences that recommend what this program never does, or has silenced."""
    if isinstance(error, pickle.UnpicklingError):
        return "its pytorch_model.bin holds more than weights"
    if "trust_remote_code" in str(error):
        return "it asks for code of its own, which is never run"
    sentences = re.split(r"(?<=[.!?:])\s+|\n+", str(error))
    unwelcome = re.compile("|".join(map(re.escape, UNWELCOME_ADVICE)), re.I)
    return " ".join(sentence for sentence in sentences if not unwelcome.search(sentence))[:300]
