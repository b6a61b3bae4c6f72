"""The conversion that `runtime: openvino` computes with: made once for a model, and kept whole or not at all.

A conversion is a folder in the cache (`~/.cache/image_text_sim_clip/openvino`, or under XDG_CACHE_HOME), named after all that
decides its content: the files of the model, float32 or int8, the versions of the libraries, the calibration set. It holds both
encoders and the sha256 of each file, and it appears by one rename. Whoever wants the same one meanwhile waits for it.

int8 is calibrated on CALIBRATION_SET, the bundled photographs and drawings with their captions, and never on the table that
is scored: its scales decide every score a little, and a score must not depend on its neighbours. What multiplies bytes are
the linear layers inside both encoders but for those after attention; the layers around the encoders and those after attention
have few weights, and in eight bits they cost most of the accuracy (on the bundled model 99 % of the scores moved by less
than 0.045 with them, and by less than 0.008 without).
"""
import contextlib
import csv
import hashlib
import io
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import filelock
import numpy as np
import torch

from addons.models.openvino_runtime import REQUIREMENTS, import_openvino
from image_text_sim_clip import (
    ADDONS,
    DECISIVE_LIBRARIES,
    EXIT_CONFIG,
    EXIT_DISK,
    EXIT_MODEL,
    Config,
    Family,
    ImageDecoder,
    Json,
    Scorer,
    Trouble,
    file_sha256,
    find_versions,
    read_json,
    resize_fast,
    say,
)

if TYPE_CHECKING:
    import openvino
    from PIL import Image

IMAGE_FILE = "image.xml"
TEXT_FILE = "text.xml"
SEAL_FILE = "conversion.json"  # the sha256 of every other file, and what the conversion was made of
CALIBRATION_SET = ADDONS.parent / "challenge_set"
CALIBRATION_HASH = "fd49c89d88284fd29de90e9d"  # of the set's files; who takes a conversion from the cache needs no set
DRAWINGS_STEP = 2  # every second drawing
CAPTIONS_STEP = 4  # every fourth caption, without those of one drawing behind each other
MIN_COSINE = {"none": 0.9999, "int8": 0.98}  # of a converted encoder's features to torch's, on the calibration set
SAY_EVERY_S = 10.0
FULL_PRECISION = r".*(out_proj|attention\.output\.dense|attn\.proj).*"  # names of linear layers after attention

# what an encoder is traced with where nothing is calibrated; the last is longer than most models read
SAMPLE_CAPTIONS = ["a photo of a cat", "two dogs on a red table near the blue street", "a", "a large green square " * 40]

Item = TypeVar("Item")


# ── The cache ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def cache_folder() -> pathlib.Path:
    """Where conversions are kept; Trouble (exit 2) where nobody knows, as in a container whose user has no home folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - pathlib's may raise
    if home.startswith("~"):
        raise Trouble(EXIT_CONFIG, "runtime: openvino keeps converted models in the home folder, and there is none: set "
                                   "XDG_CACHE_HOME to a folder for them")
    return pathlib.Path(home) / "image_text_sim_clip" / "openvino"


def find_conversion(scorer: Scorer) -> pathlib.Path:
    """The folder of this model's conversion, which is made if there is none yet.

    Raises Trouble: exit 2 where a package or the calibration set is missing, 5 for the cache's disk, 6 for a model that
    cannot be converted or whose features then differ.
    """
    made_of = describe_conversion(scorer)
    name = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:24]
    folder = cache_folder() / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.parent / f"{name}.lock"):
            if not is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
                _make_conversion(scorer, made_of, folder)
    except OSError as error:
        raise Trouble(EXIT_DISK, f"cannot keep the converted model in {folder.parent}: {error.strerror or error}; "
                                 "XDG_CACHE_HOME says where it lies") from error
    return folder


def describe_conversion(scorer: Scorer) -> Json:
    """Everything that decides what a conversion holds."""
    is_int8 = scorer.config.quantization != "none"
    packages = (*DECISIVE_LIBRARIES, "openvino", *["nncf"] * is_int8)
    return {"model": scorer.files.identity, "kind": scorer.family.kind, "quantization": scorer.config.quantization,
            "libraries": find_versions(packages), "format": 1,
            "calibration": CALIBRATION_HASH if is_int8 else ""}


def is_whole(folder: pathlib.Path) -> bool:
    """Whether every file of the conversion is there and what had been written."""
    seal = read_json(folder / SEAL_FILE)
    if not seal:
        return False
    try:
        return all(file_sha256(folder / name) == digest for name, digest in seal["files"].items())
    except OSError:
        return False


def read_digest(folder: pathlib.Path) -> str:
    """One hash of all files of a conversion, for the manifest."""
    seal = read_json(folder / SEAL_FILE) or {}
    return hashlib.sha256(json.dumps(seal["files"], sort_keys=True).encode()).hexdigest()[:24]


def _make_conversion(scorer: Scorer, made_of: Json, folder: pathlib.Path) -> None:
    """Convert, check and write into a folder of another name, which is renamed when all of it is on the disk."""
    models = convert(scorer)
    runtime = import_openvino()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
        made = pathlib.Path(name) / "made"
        made.mkdir()
        for file, model in models.items():
            number_layers(model, file)
            try:
                runtime.save_model(model, made / file, compress_to_fp16=False)
            except RuntimeError as error:  # a full disk among others: OpenVINO says nothing of why
                raise OSError(f"OpenVINO cannot write there; {shutil.disk_usage(made).free / 1e6:,.0f} MB are free") from error
        digests = {path.name: file_sha256(path) for path in sorted(made.iterdir())}
        (made / SEAL_FILE).write_text(json.dumps({"files": digests, "made_of": made_of}, indent=1))
        for path in made.iterdir():
            with path.open("rb") as written:
                os.fsync(written.fileno())
        made.rename(folder)


def number_layers(model: "openvino.Model", name: str) -> None:
    """Name the layers by their places: the names that they come with count everything that the process has converted, and
    equal conversions are to be equal files."""
    model.set_friendly_name(name)
    for place, layer in enumerate(model.get_ordered_ops()):
        layer.set_friendly_name(f"{layer.get_type_name()}-{place}")


# ── Conversion ────────────────────────────────────────────────────────────────────────────────────────────────────────

class Tower(torch.nn.Module):
    """One encoder of a model as a module, so that it can be traced; `features` computes it, as the family says."""

    def __init__(self, model: torch.nn.Module, features: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        self.features = features

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Pixels (n, 3, H, W) or ids (n, length) -> (n, d)."""
        return self.features(self.model, values)


def convert(scorer: Scorer) -> "dict[str, openvino.Model]":
    """Both encoders of the scorer's model, by the name of their file, each as near to torch's as MIN_COSINE asks."""
    is_int8 = scorer.config.quantization != "none"
    if is_int8:
        check_calibration_set()
    images = calibration_images(scorer) if is_int8 else sample_images(scorer)
    captions = calibration_captions() if is_int8 else SAMPLE_CAPTIONS
    ids = [pad(scorer.family, row) for row in scorer.tokenize(captions)[0]]
    family = scorer.family
    towers = {IMAGE_FILE: (Tower(family.model, family.image_features), images),
              TEXT_FILE: (Tower(family.model, family.text_features), ids)}
    models = {}
    for file, (tower, items) in towers.items():
        name = f"{file.split('.')[0]} encoder"
        say(f"runtime: openvino converts the {name}, once for this model")
        model = trace(tower, items, scorer.config.pretrained_model)
        if is_int8:
            model = quantize(model, items, Progress(f"calibrating the {name}", passes=2 * len(items)))
        check_parity(model, tower, items, scorer.config)
        models[file] = model
    return models


def trace(tower: torch.nn.Module, items: Sequence[np.ndarray], name: str) -> "openvino.Model":
    """The tower as a model of OpenVINO's, for any number of items and, of captions, any length."""
    runtime = import_openvino()
    first = items[0]
    is_image = first.ndim == 4  # (1, 3, H, W); captions are (1, length)
    shape = [-1, *first.shape[1:]] if is_image else [-1, -1]
    kind = runtime.Type.f32 if is_image else runtime.Type.i64
    example = torch.from_numpy(np.concatenate([first, first]))
    try:
        with torch.no_grad(), _quietly():
            model: openvino.Model = runtime.convert_model(
                tower.eval(), example_input=example, input=[("values", runtime.PartialShape(shape), kind)])
    except Exception as error:  # the tracer and the converter raise nearly anything
        raise Trouble(EXIT_MODEL, f"runtime: openvino cannot convert {name} ({type(error).__name__}: "
                                  f"{' '.join(str(error).split())[:200]}): set runtime: torch") from error
    return model


def quantize(model: "openvino.Model", items: Sequence[np.ndarray], progress: "Progress") -> "openvino.Model":
    """The model with its encoder's linear layers in int8, their scales found on `items`; progress is told on the way."""
    with _quietly():
        try:
            import nncf
        except ImportError as error:
            raise Trouble(EXIT_CONFIG, f"quantization under runtime: openvino needs the package {error.name} "
                                       f"({REQUIREMENTS})") from None
        logging.getLogger("nncf").setLevel(logging.ERROR)
        kept = nncf.IgnoredScope(names=find_kept_layers(model), validate=False)
        # its bias correction takes as long again and changes nothing that can be seen
        settings = nncf.AdvancedQuantizationParameters(disable_bias_correction=True)
        quantized: openvino.Model = nncf.quantize(
            model, nncf.Dataset(items, progress.count), subset_size=len(items), model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=kept, advanced_parameters=settings)
    return quantized


def find_kept_layers(model: "openvino.Model") -> list[str]:
    """The names of the multiplications that stay as they are: those outside the encoder's layers, and those after attention."""
    kept = []
    for layer in model.get_ordered_ops():
        if layer.get_type_name() not in ("MatMul", "Convolution", "GroupConvolution"):
            continue
        name = layer.get_friendly_name()
        is_inside = re.search(r"\.(layers?|blocks|resblocks)\.\d+\.", name) and layer.get_type_name() == "MatMul"
        if not is_inside or re.match(FULL_PRECISION, name):
            kept.append(name)
    return kept


def check_parity(model: "openvino.Model", tower: torch.nn.Module, items: Sequence[np.ndarray], config: Config) -> None:
    """Raise Trouble (exit 6) where the converted encoder's features are not torch's."""
    runtime = import_openvino()
    compiled = runtime.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    few = items[::max(1, len(items) // 16)]
    lowest = 1.0
    with torch.inference_mode():
        for item in few:
            try:
                found = torch.from_numpy(np.array(compiled(item)[0]))
            except RuntimeError as error:  # traced with two items, it may compute nothing else
                raise Trouble(EXIT_MODEL, f"runtime: openvino converts {config.pretrained_model} to what does not compute "
                                          f"({' '.join(str(error).split())[:200]}): set runtime: torch") from error
            lowest = min(lowest, torch.nn.functional.cosine_similarity(found, tower(torch.from_numpy(item))).min().item())
    least = MIN_COSINE[config.quantization]
    if not lowest >= least:
        raise Trouble(EXIT_MODEL, f"runtime: openvino gives {config.pretrained_model} other features than torch does (cosine "
                                  f"{lowest:.4f}, at least {least} is asked for): set runtime: torch")


# ── The calibration set ───────────────────────────────────────────────────────────────────────────────────────────────

def check_calibration_set() -> None:
    """Raise Trouble (exit 2) where the set is missing or another one: int8's scales, and so all scores, would be others."""
    try:
        digests = [file_sha256(path) for path in calibration_files()]
    except OSError:
        digests = []
    if hashlib.sha256(" ".join(digests).encode()).hexdigest()[:24] != CALIBRATION_HASH:
        raise Trouble(EXIT_CONFIG, "quantization under runtime: openvino is calibrated with the images and captions in "
                                   "challenge_set/; next to the script they are missing or others, and "
                                   f"{cache_folder()} has no conversion of this model: set runtime: torch, or get them back")


def calibration_files() -> list[pathlib.Path]:
    """The images and tables of the calibration set."""
    photos = [path for path in sorted((CALIBRATION_SET / "photos").glob("*")) if path.suffix in (".png", ".jpg")]
    drawings = sorted((CALIBRATION_SET / "shapes").glob("*.png"))[::DRAWINGS_STEP]
    return [*photos, *drawings, CALIBRATION_SET / "challenge_set.csv", CALIBRATION_SET / "shapes.csv"]


def calibration_images(scorer: Scorer) -> list[np.ndarray]:
    """The set's images as the model reads them, float32 (1, 3, H, W): of each photograph the whole and its quarters, and the
    drawings. Read with the default settings, whatever the run's are."""
    decode = ImageDecoder(Config(), scorer.settings)
    prepared = []
    for path in [path for path in calibration_files() if path.suffix != ".csv"]:
        image = decode(path.read_bytes())
        pieces = [image, *quarters(image)] if path.parent.name == "photos" else [image]
        prepared += [normalise(scorer, piece) for piece in pieces]
    return prepared


def normalise(scorer: Scorer, image: "Image.Image") -> np.ndarray:
    """An RGB image, resized -> what the model reads, float32 (1, 3, H, W)."""
    fits = scorer.settings.knows_fast_resize()
    pixels = resize_fast(image, scorer.settings) if fits else scorer.resize(image)
    levels = scorer.pixel_levels.numpy()
    return np.stack([levels[channel][pixels[channel]] for channel in range(3)])[None]


def sample_images(scorer: Scorer) -> list[np.ndarray]:
    """A few images of coloured noise as the model reads them, float32 (1, 3, H, W); where nothing is calibrated."""
    from PIL import Image
    noise = np.random.default_rng(0).integers(0, 256, (4, 24, 32, 3), np.uint8)
    return [normalise(scorer, Image.fromarray(pixels).resize((640, 480))) for pixels in noise]


def quarters(image: "Image.Image") -> "list[Image.Image]":
    """The four quarters of an image."""
    width, height = image.size
    return [image.crop((left, top, left + width // 2, top + height // 2))
            for left, top in ((0, 0), (width // 2, 0), (0, height // 2), (width // 2, height // 2))]


def calibration_captions() -> list[str]:
    """Some of the set's captions, and one that is longer than any model reads."""
    captions: list[str] = []
    for table in [path for path in calibration_files() if path.suffix == ".csv"]:
        with table.open(encoding="utf-8", newline="") as file:
            captions += [row["caption"] for row in csv.DictReader(file)]
    return [" ".join(captions[:20]), *captions[::CAPTIONS_STEP]]


def pad(family: Family, ids: list[int]) -> np.ndarray:
    """A caption's ids as a run pads them, int64 (1, length)."""
    length = family.padded_length(ids) or min(family.context_length, -(-len(ids) // 8) * 8)
    return np.array([ids + [family.tokenizer.pad_token_id] * (length - len(ids))])


# ── Quiet, and progress ───────────────────────────────────────────────────────────────────────────────────────────────

@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the libraries' own words: their bars would go to stdout, whose last line is a run's result."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


class Progress:
    """Tells every SAY_EVERY_S seconds how far the passes over the calibration set have come."""

    def __init__(self, doing: str, passes: int) -> None:
        self._doing = doing
        self._passes = passes
        self._seen = 0
        self._said = time.monotonic()
        self._stderr = sys.stderr  # as it is before the libraries are kept quiet

    def count(self, item: Item) -> Item:
        """The item itself, counted."""
        self._seen += 1
        now = time.monotonic()
        if now - self._said > SAY_EVERY_S:
            self._said = now
            share = min(99, 100 * self._seen // self._passes)
            print(f"runtime: openvino, {self._doing}: {share} %", file=self._stderr, flush=True)
        return item
