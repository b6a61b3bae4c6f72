"""`runtime: openvino`: both encoders computed by OpenVINO, which is faster than torch on a CPU, most of all in int8.

The encoders are converted once from the loaded torch model and kept in a cache folder (addons/models/openvino_convert.py);
who comes later, workers and resumptions among them, takes them from there. The model of torch stays as it is: it scores the
rows of the score passport, and what is not finite in fewer bits. A score depends on nothing but its own image and caption:
batch size, order and the number of threads change no bit.

`dtype: float32` and `bfloat16` are the same conversion, computed with more or fewer bits. With `quantization: int8` the
linear layers inside the encoders multiply bytes, with scales that were found once, on bundled images and captions; the rest
is computed in `dtype`.
"""
import importlib.util
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from image_text_sim_clip import EXIT_CONFIG, EXIT_MODEL, Config, Family, Json, Scorer, Trouble, say

if TYPE_CHECKING:
    import pathlib
    import types

    import openvino

REQUIREMENTS = "pip install -r addons/requirements-cpu.txt"
UNCONVERTED = ("align",)  # its last pooling has a window larger than its image, which OpenVINO 2026.4 refuses
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


def import_openvino() -> "types.ModuleType":
    """The openvino package, kept from reporting its use to its maker; Trouble (exit 2) where it is missing.

    OpenVINO and NNCF send what is converted and how, unless openvino_telemetry cannot be imported; the first one to import
    them decides, so they are imported here alone.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # documented: importing it then fails
    try:
        import openvino
    except ImportError as error:
        raise Trouble(EXIT_CONFIG, f"runtime: openvino needs the package {error.name} ({REQUIREMENTS})") from None
    return openvino


def open_runtime(scorer: Scorer) -> "Encoders | None":
    """The encoders of the scorer's model under OpenVINO; None where `runtime: auto` leaves it to torch.

    `auto` takes OpenVINO on a CPU where it is installed, int8 is asked for and the model can be converted. Raises Trouble:
    exit 2 where the config asks for OpenVINO and something else that does not go with it, or where a package is missing,
    exit 6 for a model that cannot be converted.
    """
    reason = _why_not(scorer.config, scorer.device, scorer.dtype, scorer.family)
    if scorer.config.runtime == "auto":
        is_installed = all(importlib.util.find_spec(name) for name in ("openvino", "nncf"))
        if reason or scorer.config.quantization == "none" or not is_installed:
            return None
    if reason:
        raise Trouble(EXIT_CONFIG, f"runtime: openvino {reason}")
    import_openvino()
    from addons.models import openvino_convert
    try:
        return Encoders(scorer, openvino_convert.find_conversion(scorer))
    except Trouble as trouble:
        if scorer.config.runtime == "openvino" or trouble.exit_code != EXIT_MODEL:
            raise
        say(f"warning: {trouble}; running in torch")
        return None


def _why_not(config: Config, device: str, dtype: str, family: Family) -> str:
    """What does not go with OpenVINO, and what to do; empty where nothing is in the way."""
    if device != "cpu":
        return "computes on the CPU: set use_cuda: false, or runtime: torch"
    if config.compile:
        return "needs no compile, which is torch's: set compile: false, or runtime: torch"
    if dtype not in PRECISIONS:
        return f"has no dtype: {dtype}; take {' or '.join(PRECISIONS)}"
    if type(family).features_of_bytes is not Family.features_of_bytes:
        return f"needs images of one size, and {family.kind} models read each in its own shape: set runtime: torch"
    if family.kind in UNCONVERTED:
        return f"cannot convert {family.kind} models: set runtime: torch"
    return ""


class Encoders:
    """Both encoders of one model, compiled; offers what a Family does with its model, for as many lanes as there are."""

    def __init__(self, scorer: Scorer, folder: "pathlib.Path") -> None:
        import openvino

        from addons.models import openvino_convert
        self.family = scorer.family
        self.quantization = "none" if scorer.config.quantization == "none" else "int8 by calibration"
        self._own_model = scorer.family.model
        self._digest = openvino_convert.read_digest(folder)
        core = openvino.Core()
        if scorer.dtype == "bfloat16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise Trouble(EXIT_CONFIG, "dtype: bfloat16: this CPU computes no bfloat16 under OpenVINO: take float32")
        lanes = max(1, scorer.lanes)
        # a stream is a lane's: one thread for its arithmetic. Pinned to a core, they would share it with loaders' and other
        # processes' threads
        settings = {"INFERENCE_NUM_THREADS": lanes, "NUM_STREAMS": lanes, "ENABLE_CPU_PINNING": False,
                    "INFERENCE_PRECISION_HINT": PRECISIONS[scorer.dtype]}
        self._images = Compiled(core, folder / openvino_convert.IMAGE_FILE, settings)
        self._texts = Compiled(core, folder / openvino_convert.TEXT_FILE, settings)
        # OpenVINO's Python part sets itself up in the first call, and two threads whose first calls come together wait for
        # each other for ever: one holds the interpreter, the other one what is being set up
        self._texts(openvino_convert.pad(self.family, self.family.tokenize(["a"])[0][0]))

    def identity(self) -> Json:
        """What the manifest says of it: the runtime, and the hash of the converted model."""
        return {"runtime": "openvino", "conversion": self._digest}

    def features_of_bytes(self, model: Any, pixels: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """uint8 (n, 3, H, W) and the value of each level (3, 256) -> (n, d) features, float32."""
        if model is not self._own_model:  # one in plain float32, for what was not finite
            return self.family.features_of_bytes(model, pixels, levels)
        given = pixels.numpy()
        values = np.empty(given.shape, np.float32)
        for channel, values_of_level in enumerate(levels.numpy()):
            values[:, channel] = values_of_level[given[:, channel]]
        return self._images(values)

    def text_features(self, model: Any, ids: torch.Tensor) -> torch.Tensor:
        """(n, length) token ids -> (n, d) features, float32."""
        if model is not self._own_model:
            return self.family.text_features(model, ids)
        return self._texts(ids.numpy())


class Compiled:
    """A converted encoder, ready to be called from any number of threads, each of which has a request of its own."""

    def __init__(self, core: "openvino.Core", path: "pathlib.Path", settings: Json) -> None:
        self._model = core.compile_model(str(path), "CPU", settings)
        self._mine = threading.local()

    def __call__(self, values: np.ndarray) -> torch.Tensor:
        """An array (n, ...) -> (n, d) float32."""
        if not hasattr(self._mine, "request"):
            self._mine.request = self._model.create_infer_request()
        found = self._mine.request.infer({0: values}, share_inputs=True)[0]
        return torch.from_numpy(np.array(found, np.float32))
