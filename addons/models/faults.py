"""What is wrong with a model that cannot be loaded, or does not belong together, in one line and with its cure."""
import pathlib
import pickle
import re

from image_text_sim_clip import Json

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


def tell_sizes(made: tuple[int, int] | None, side: int | None, folder: pathlib.Path) -> str:
    """How an image processor, read from `folder`, goes wrong: it makes images of the (height, width) `made`, of any shape where
    that is None, and the model reads squares of `side` pixels."""
    file = next((name for name in ("processor_config.json", "preprocessor_config.json") if (folder / name).is_file()), "")
    if made is None:
        return (f": it neither crops nor squeezes, so that images keep their shapes, and the model reads {side} x {side} "
                f"pixels: in its {file} set do_center_crop to true, or size to a height and a width")
    return (f": it makes {made[1]} x {made[0]} pixels ({file}), and the model reads {side} x {side} (config.json): one of the "
            "two files belongs to another model")


def tell_weights(loading: Json) -> str:
    """Which weights are missing or have another shape, of what transformers tells of its `loading`."""
    unused = sorted(loading["unexpected_keys"])
    missing = sorted(loading["missing_keys"])
    if missing:
        others = f"; it has others, such as {unused[0]}" if unused else ""
        return f": it lacks weights: {', '.join(missing[:3])} ...{others}"
    key, found, expected = min(loading["mismatched_keys"])
    return f": {key} has the shape {tuple(found)}, and the config asks for {tuple(expected)}"
