# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0",
#   "transformers==5.23.0",
#   "huggingface_hub==2.4.0",
#   "safetensors==0.8.0",
#   "sentencepiece==0.2.3",
#   "protobuf==7.36.2",
#   "pillow==13.0.0",
#   "numpy==2.4.6",
#   "pandas==3.1.1",
#   "pyarrow==26.0.1",
#   "pyyaml==6.0.3",
#   "requests==2.34.2",
#   "requests-hardened==1.3.0",
#   "filelock==4.2.12",
#   "pebble==5.2.3",
#   "psutil==7.2.2",
#   "tqdm==4.70.1",
#   "matplotlib==3.11.2",
#   "memory_profiler==0.61.0",
# ]
# ///
"""How well do an image and a caption belong together?  One number per row, from a pretrained CLIP or SigLIP model.

    python image_text_sim_clip.py --config config.yaml

`similarity` is the cosine of the angle between the image's and the caption's embedding, in [-1, 1]; higher means a
better match. Compare it among rows scored by one model: it is not a percentage, and two models' numbers do not compare.
For SigLIP, `probability` is sigmoid(scale * cosine + bias): the model's own chance that the two belong together.

    pairs: CSV                (addons/inputs: every other kind of table)
        | stage + plan        one streaming pass into Parquet, malformed lines aside; fixed row ranges; manifest.json
        v
    partition 00000 ... N     an engine only decides WHERE a partition runs
        |
        v   Worker(config, plan)
        |      rows -> loader threads: read, decode, resize to uint8   (bounded, in order, across partition edges)
        |           -> batch -> image encoder, text encoder (normalised and multiplied in float32)
        |      every row ends as a score or as a reason
        v
    parts/part-00012.parquet  one file that appears whole and bears the mark of its run: it exists = done = resume
        | finalize
        v
    scores.csv (input order) . profile.json . memory-time.png . summary

The file reads in that order: trouble, config, pairs, plan, images, model, one partition, parts, engines, results, main.
Heavy libraries are imported where they are used, so that a mistake in the config is answered at once. What only some
runs need lies in addons/, one folder for each role; add-ons import their names from here.
"""
import argparse
import bisect
import builtins
import codecs
import collections
import concurrent.futures
import contextlib
import csv
import dataclasses
import difflib
import errno
import fnmatch
import functools
import gc
import hashlib
import html
import importlib
import io
import itertools
import json
import math
import os
import pathlib
import platform
import re
import signal
import struct
import sys
import time
import types
import typing
import urllib.parse
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Literal, NamedTuple

INSTALL = "pip install -r requirements.txt, or activate the environment that has it (source .venv/bin/activate)"
try:
    import yaml
except ModuleNotFoundError:
    if __name__ != "__main__":
        raise
    print(f"error: the package yaml is missing: {INSTALL}", file=sys.stderr)
    sys.exit(2)

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    import torch
    from PIL import Image

    from addons.images.guard import Guard
    from addons.images.memory import Account
    from addons.inputs import Reader, Rows, RowsWithImages
    from addons.measures import Measure
    from addons.models.openvino_runtime import Encoders
    from addons.results.memory_curve import MemoryCurve
    from addons.results.progress import ProgressBar, ProgressLog
    from addons.stores.paths import StorePath

__version__ = "0.2.0"

Json = dict[str, Any]  # an object as the json module reads and writes it

# memory_profiler (-m, mprof) and kernprof put `profile` among the builtins; without them it does nothing. Tracing two
# profiled functions in two threads crashes the run, so PROFILED also turns the loader threads off; and where a profiled
# function calls another, the caller's table shows wrong increments, so none of those marked here calls another.
PROFILED = hasattr(builtins, "profile")
profile: Callable[[Callable[..., Any]], Callable[..., Any]] = getattr(builtins, "profile", lambda function: function)


# ── Trouble ───────────────────────────────────────────────────────────────────────────────────────────────────────────
# Three kinds, three fates: a user's mistake is one line and an exit code, a row's failure is a status, a bug is a traceback.

EXIT_CONFIG = 2
EXIT_INPUT = 3
EXIT_FAILURES = 4
EXIT_DISK = 5
EXIT_MODEL = 6
EXIT_VERIFY = 7

STATUSES = ("ok", "missing", "forbidden", "timeout", "dns", "connect", "http_4xx", "http_5xx", "too_large", "not_image",
            "unsupported", "corrupt", "bomb", "empty_caption", "opted_out", "non_finite", "oom", "crashed", "not_tried")
# oom is kept for engines that give a row up where this one halves its batch, down to a row, before it gives the run up


class Trouble(Exception):
    """What the user can mend: told in one line on stderr, ends the program with `exit_code`."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code


class RowFailure(Exception):
    """Why one row gets no score: a `status` of STATUSES and a `detail` without times, addresses or absolute paths."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(status, detail)
        self.status = status
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.status}: {self.detail}"


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP: unwinds to `run`, which exits with 128 + the signal's number."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Interruption:
    """Turns the first signal into a wish to stop that `check` obeys between batches; the second one stops at once."""

    def __init__(self) -> None:
        self.signum = 0
        self.deferred = False

    def install(self) -> None:
        """Listen to SIGINT, SIGTERM, and SIGHUP of a terminal that closes, unless `nohup` ignores it (main thread only)."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._on_signal)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._on_signal)

    def _on_signal(self, signum: int, frame: types.FrameType | None) -> None:
        if self.signum or not self.deferred:
            raise Interrupted(signum)
        self.signum = signum
        say("stopping after this batch; finished partitions are kept, the same command goes on from there")

    def check(self) -> None:
        """Raise Interrupted if a signal came while `deferred` was set."""
        if self.signum:
            raise Interrupted(self.signum)


INTERRUPTION = Interruption()


def say(message: str) -> None:
    """Write one line of talk to stderr (stdout belongs to the result). What a stranger named cannot steer the terminal."""
    shown = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]", lambda odd: ascii(odd[0])[1:-1], message)
    with contextlib.suppress(OSError, RuntimeError):  # a full disk, a terminal that has gone; a signal amid another line
        print(shown, file=sys.stderr, flush=True)


@contextlib.contextmanager
def output_disk(path: os.PathLike[str] | str) -> Iterator[None]:
    """Turn an OSError while writing `path` into Trouble with the exit code for a full or broken output disk."""
    try:
        yield
    except OSError as error:
        raise Trouble(EXIT_DISK, f"cannot write {path}: {error.strerror or error}") from error


# ── Add-ons: what only some runs need ─────────────────────────────────────────────────────────────────────────────────

ADDONS = pathlib.Path(__file__).resolve().parent / "addons"  # missing where the script was copied alone


def addon(name: str, key: str) -> types.ModuleType:
    """Import addons/<name> because `key` asks for it; Trouble (exit 2) says what is missing."""
    try:
        return importlib.import_module(f"addons.{name}")
    except ImportError as error:
        missing = error.name or ""
        if missing.split(".")[0] == "addons":
            raise Trouble(EXIT_CONFIG, f"{key} needs {missing.replace('.', '/')}, which is not next to the script") from error
        file = "addons/requirements-scale.txt" if name.startswith("engines.") else "requirements.txt"
        file = "addons/requirements-cloud.txt" if name.startswith("stores") else file
        raise Trouble(EXIT_CONFIG, f"{key} needs the package {missing} (pip install -r {file})") from error


def room_names(room_name: str) -> list[str]:
    """The names of the files in addons/<room_name>, in order; none for a script that stands alone."""
    return sorted(path.stem for path in (ADDONS / room_name).glob("[a-z]*.py"))


def room(room_name: str) -> list[types.ModuleType]:
    """Every module of addons/<room_name>, in the order of their file names."""
    return [addon(f"{room_name}.{name}", f"addons/{room_name}") for name in room_names(room_name)]


# ── Config ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def setting(default: Any, low: float = -math.inf, high: float = math.inf) -> Any:
    """A config key with a default and, for numbers, the range it must lie in (both ends included)."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high})


@dataclasses.dataclass(frozen=True)
class Config:
    """Every key of config.yaml, which says in a comment what each is for. Raises Trouble (exit 2) on a bad value."""

    # the original's four
    csv_path: str = "challenge_set/challenge_set.csv"
    image_path: str = "challenge_set/photos"
    use_cuda: bool = True
    pretrained_model: str = "openai/clip-vit-base-patch32"
    # the model
    revision: str = "main"
    safetensors_only: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none", "int8"] = "none"
    compile: bool = False
    runtime: Literal["auto", "torch", "openvino"] = "auto"
    # the table
    url_column: str | int = setting("url", 0)
    caption_column: str | int = setting("caption", 0)
    caption_template: str = "{}"
    caption_clean: Literal["none", "unescape"] = "none"
    separator: str = "auto"
    quoting: Literal["auto", "none"] = "auto"
    escape: str = "auto"
    encoding: str = "utf-8"
    limit: int | None = setting(None, 1)
    escape_formulas: bool = False
    # images
    preprocess: Literal["fast", "exact"] = "fast"
    decode: Literal["exact", "scaled", "gpu"] = "exact"
    follow_links: bool = False
    transparent_over: str = "white"
    exif_orientation: bool = False
    avif: bool = False
    max_image_bytes: int = setting(50_000_000, 1)
    max_image_pixels: int = setting(50_000_000, 1)
    memory_budget_mib: int | Literal["auto"] = setting("auto", 16, 2**30)
    decode_timeout_s: float = setting(20.0, 0.1, 3600)
    # fetching (image_path: url)
    fetch_timeout_s: float = setting(10.0, 0.01, 3600)
    fetch_retries: int = setting(2, 0, 100)
    fetch_concurrency: int | Literal["auto"] = setting("auto", 1, 65536)
    user_agent: str = "image_text_sim_clip/0.2 (image-caption similarity; respects X-Robots-Tag: noai)"
    respect_opt_out: bool = True
    max_per_host: int = setting(16, 1, 1024)
    host_patience_s: float = setting(120.0, 0.0, 86400)
    cache_path: str | None = None
    use_environment_proxies: bool = False
    allow_private_hosts: bool = False
    # the run
    output_path: str = "scores"
    storage_options: Json | None = dataclasses.field(default=None, repr=False)  # it may hold secrets
    batch_size: int | Literal["auto"] = setting("auto", 1, 65536)
    partition_rows: int | Literal["auto"] = setting("auto", 1, 10_000_000)
    loader_threads: int | Literal["auto"] = setting("auto", 0, 1024)
    engine: str = "auto"
    slurm_offset: int = setting(0, 0)
    slurm_total: int | None = setting(None, 1)
    ray_address: str | None = None
    ray_workers: str | int = setting(1, 1)
    ray_gpus: float = setting(0.0, 0.0, 64)
    output_format: str = "csv"
    save_embeddings: Literal["none", "float32", "float16", "int8"] = "none"
    measures: Json | None = None
    parity_rows: int | Literal["auto"] = setting("auto", 0, 10_000)
    max_score_drift: float | None = setting(None, 0.0, 2.0)
    max_failure_rate: float = setting(0.9, 0.0, 1.0)
    # the second job, curate.py, which checks what is in it (addons/curation/rules.py)
    curate: Json | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))
        if isinstance(self.url_column, int) != isinstance(self.caption_column, int):
            raise Trouble(EXIT_CONFIG, "url_column and caption_column must both be names, or both be numbers")
        for key in PATH_KEYS:
            path = expand_home(key, getattr(self, key) or "")
            check_path(key, path)
            object.__setattr__(self, key, path if getattr(self, key) is not None else None)  # the class is frozen
        if self.storage_options:
            addon("stores", "storage_options").set_storage_options(self.storage_options)
        if self.caption_template.count("{}") != 1:
            raise Trouble(EXIT_CONFIG, f"caption_template must hold {{}} exactly once, got {self.caption_template!r}")
        if self.max_score_drift is not None and self.parity_rows == 0:
            raise Trouble(EXIT_CONFIG, "max_score_drift needs parity_rows: with 0 nothing is scored twice")
        if self.separator != "auto" and (len(self.separator) != 1 or self.separator in '"\r\n'):
            raise Trouble(EXIT_CONFIG, f"separator must be auto or one character, such as ; or \"\\t\", got {self.separator!r}")
        if self.escape not in ("auto", "none") and (len(self.escape) != 1 or self.escape in ('"', "\r", "\n", self.separator)):
            raise Trouble(EXIT_CONFIG, f"escape must be auto, none or one character such as \\, got {self.escape!r}")
        formats = ["csv"]
        if self.output_format != "csv":  # which files of addons/results write a kind of results only they themselves can say
            formats += [name for name in room_names("results") if hasattr(addon(f"results.{name}", "output_format"), "FORMAT")]
        choices = {"engine": ["auto", "local", *room_names("engines")], "output_format": formats}
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise Trouble(EXIT_CONFIG, f"{key} must be {' | '.join(known)}, got {getattr(self, key)!r}")
        try:
            "a".encode(self.encoding)
        except (LookupError, ValueError):
            raise Trouble(EXIT_CONFIG, f"encoding: Python knows none called {self.encoding!r}") from None
        from PIL import ImageColor
        try:
            ImageColor.getrgb(self.transparent_over)
        except ValueError:
            raise Trouble(EXIT_CONFIG, f"transparent_over must be a colour such as white or #ff8800, got "
                                       f"{self.transparent_over!r}") from None

    @functools.cached_property
    def result_columns(self) -> "tuple[Column, ...]":
        """The columns that a run adds to its input, in order; they depend on the config alone. Each part asks for them."""
        measured = itertools.chain.from_iterable(measure.columns_for(self) for measure in find_measures(self))
        return (*SCORE_COLUMNS, *measured, *STATUS_COLUMNS)


# Keys that may differ between a run and its resumption, because no score depends on them, and no status but those of servers
# that are late at one time and not at another. `use_cuda` is here because the device that was really used is recorded, and
# compared, in the manifest's `resolved`.
HARMLESS_KEYS = {"csv_path", "use_cuda", "output_path", "storage_options", "output_format", "loader_threads", "engine",
                 "ray_address", "ray_workers", "ray_gpus", "slurm_offset", "slurm_total",
                 "max_failure_rate", "user_agent", "safetensors_only", "max_per_host", "cache_path",
                 "use_environment_proxies", "curate", "parity_rows", "max_score_drift", "fetch_timeout_s", "fetch_retries",
                 "fetch_concurrency", "host_patience_s", "memory_budget_mib", "decode_timeout_s"}


PATH_KEYS = ("csv_path", "image_path", "output_path", "pretrained_model", "cache_path")
URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.I)


def expand_home(key: str, value: str) -> str:
    """The path with the home folder in place of a leading `~` or `~name`; Trouble (exit 2) where nobody knows that folder."""
    path = os.path.expanduser(value)  # noqa: PTH111 - pathlib's takes the ./ off ./~name, a folder of that name
    if path.startswith("~"):
        raise Trouble(EXIT_CONFIG, f"{key} {value!r}: there is no home folder for {value.split('/')[0]}; "
                                   f"a folder of that name is ./{value}")
    return path


def as_path(text: str) -> pathlib.Path:
    """The path that `text` names, on a disk or, where it begins with a scheme, in an object store (addons/stores)."""
    if URL.match(text):
        return addon("stores.paths", repr(text)).StorePath(text)
    return pathlib.Path(text)


def in_store(path: pathlib.Path) -> bool:
    """Whether the path lies in an object store."""
    return URL.match(str(path)) is not None


def check_path(key: str, value: str) -> None:
    """Raise Trouble (exit 2) for a path that no file system or object store takes."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", value, re.I):  # s3://bucket, also with a slash too few
        addon("stores", key).check_url(key, value)
    path = value.encode("utf-8", "surrogatepass")
    if b"\0" in path or max(len(name) for name in path.split(b"/")) > 255:
        raise Trouble(EXIT_CONFIG, f"{key} holds what no file name can: a NUL, or more than 255 bytes between two /")


def _accepts(kind: Any, value: object) -> bool:
    """Whether `value` is of the annotated `kind`; True is not an int, 3 is a float."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_accepts(k, value) for k in typing.get_args(kind))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, origin or kind) and not (kind is int and isinstance(value, bool))


def _in_words(kind: Any) -> str:
    """The annotated `kind` in a user's words."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        return " | ".join(typing.get_args(kind))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_in_words(k) for k in typing.get_args(kind))
    return {str: "text", bool: "true | false", int: "a whole number", float: "a number", type(None): "null",
            dict: "a section of keys", list: "a list"}[origin or kind]


def check_value(field: "dataclasses.Field[Any]", value: object, section: str = "") -> None:
    """Raise Trouble (exit 2) unless `value` is of the field's type and within its range; `section` is named before it."""
    if not _accepts(field.type, value):
        shown = f", got {repr(value)[:300]}" if field.repr else ""
        raise Trouble(EXIT_CONFIG, f"{section}{field.name} must be {_in_words(field.type)}{shown}")
    low = field.metadata.get("low", -math.inf)
    high = field.metadata.get("high", math.inf)
    if isinstance(value, (int, float)) and not low <= value <= high:
        raise Trouble(EXIT_CONFIG, f"{section}{field.name} must lie in [{low}, {high}], got {value}")


def check_keys(kind: type, values: Json, section: str = "") -> None:
    """Raise Trouble (exit 2) for a key that the dataclass `kind` does not have, and name the nearest one it has."""
    known = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, 1, 0.5)
            hint = f"; did you mean {section + nearest[0]!r}?" if nearest else ""
            raise Trouble(EXIT_CONFIG, f"unknown key {section + str(key)!r}{hint}")


MAX_CONFIG_BYTES = 1_000_000
MAX_NUMBER_CHARS = 100  # Python takes for ever over a number of a million digits
_YAML_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _UniqueKeys(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice instead of silently keeping the last, and what grows when it is read."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases (*name) are not read here, line {self.peek_event().start_mark.line + 1}")
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.tag in _YAML_NUMBERS and len(node.value) > MAX_NUMBER_CHARS:
            raise yaml.YAMLError(f"a number of {len(node.value)} digits, line {node.start_mark.line + 1}")
        return super().construct_object(node, deep)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise Trouble(EXIT_CONFIG, f"{key} is given twice (line {key_node.start_mark.line + 1})")
            seen.add(key)
        return super().construct_mapping(node, deep)


# what its constructors raise for "2001-99-99", "{a: 1}: 2" and the like is not all YAMLError
_YAML_ERRORS = (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError,
                ArithmeticError)


def load_config(path: os.PathLike[str] | str, overrides: Iterable[str] = ()) -> Config:
    """Read the YAML file at `path`, apply `overrides` ("key=value", value as YAML) and return the checked Config.

    Raises Trouble (exit 2) for an unreadable file, an unknown or repeated key, a wrong type or a value out of range.
    """
    try:
        with pathlib.Path(expand_home("--config", os.fspath(path))).open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
        if len(content) > MAX_CONFIG_BYTES:
            raise Trouble(EXIT_CONFIG, f"{path} is no config: it has more than {MAX_CONFIG_BYTES} bytes")
        values = yaml.load(content.decode("utf-8"), _UniqueKeys)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise Trouble(EXIT_CONFIG, f"cannot read the config {path}: {error.strerror}") from None
    except _YAML_ERRORS as error:
        raise Trouble(EXIT_CONFIG, f"{path} is not valid YAML: {error}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise Trouble(EXIT_CONFIG, f"{path} must hold 'key: value' lines")
    for override in overrides:
        _apply_override(values, override)
    if isinstance(values.get("pretrained_model"), dict):
        values = addon("models.several", "pretrained_model").take_apart(values)
    check_keys(Config, values)
    drift = values.get("max_score_drift")
    if isinstance(drift, str) and re.fullmatch(r"\d+(\.\d*)?[eE]-?\d+", drift):
        values["max_score_drift"] = float(drift)  # YAML 1.1 takes 1e-3 for text
    return Config(**values)


def _apply_override(values: Json, override: str) -> None:
    """Set one key of `values`, or one of a section (`curate.export=csv`), as `--set` asks."""
    key, equals, value = override.partition("=")
    if not equals:
        raise Trouble(EXIT_CONFIG, f"--set needs key=value, got {override!r}")
    try:
        loaded = yaml.load(value, _UniqueKeys) if is_text(value) else value  # noqa: S506 - a SafeLoader; no UTF-8: a path
    except _YAML_ERRORS:
        raise Trouble(EXIT_CONFIG, f"--set {override}: the value is not valid YAML; quote it for the shell and for YAML: "
                                   f"--set '{key}=\"...\"'") from None
    section, dot, inner = key.strip().partition(".")
    held = values.get(section) or {}
    if dot and isinstance(held, dict):
        values[section] = held | {inner: loaded}
    else:
        values[key.strip()] = loaded


# ── Columns of the results ────────────────────────────────────────────────────────────────────────────────────────────

class Column(NamedTuple):
    """A column of scores.csv: its name, its type ("float", "bool" or "text") and what it says."""

    name: str
    type: str
    meaning: str


SCORE_COLUMNS = (
    Column("similarity", "float", "cosine of the two embeddings, in [-1, 1]"),
    Column("dissimilarity", "float", "1 - similarity"),
    Column("probability", "float", "SigLIP only: sigmoid(scale * cosine + bias)"),
    # of these two only the whole run can tell; addons/measures/random_pairs.py fills them
    Column("percentile", "float", "share of this run's scored rows that score below, in [0, 1]"),
    Column("random_percentile", "float", "share of random pairs that score below, in [0, 1]"),
)
STATUS_COLUMNS = (
    Column("truncated", "bool", "the caption is longer than the model reads"),
    Column("status", "text", "ok, or why there is no score"),
    Column("detail", "text", "more about the status"),
)
RESULT_COLUMNS = (*SCORE_COLUMNS, *STATUS_COLUMNS)  # a run's own; those of further measures stand between the two


def find_measures(config: Config) -> "list[type[Measure]]":
    """What is computed besides the similarity (addons/measures), as the config asks for; nothing for a script alone."""
    if ADDONS.is_dir():
        return addon("measures", "measures").find_measures(config)
    for key in ("measures", "save_embeddings", "max_score_drift"):
        if getattr(config, key) not in (None, {}, "none"):
            addon("measures", key)
    return []


def column_names(columns: Iterable[Column]) -> list[str]:
    """The names of `columns`."""
    return [column.name for column in columns]


def arrow_type(column: Column) -> "pa.DataType":
    """The pyarrow type of a column's cells."""
    import pyarrow as pa
    return {"float": pa.float32(), "bool": pa.bool_(), "text": pa.string()}[column.type]


def output_names(columns: Iterable[str], results: Iterable[str]) -> list[str]:
    """The input's column names as scores.csv shows them: one that is in `results` becomes input_<name>."""
    names = list(columns)
    reserved = set(results)
    taken = {*names, *reserved}
    shown = []
    for name in names:
        if name in reserved:
            while name in taken:
                name = "input_" + name
            taken.add(name)
        shown.append(name)
    return shown


# ── Pairs: read a CSV with care ───────────────────────────────────────────────────────────────────────────────────────
# One stray quote, or a byte that is not text, costs its own line and no other. What is a row, what is malformed and why is
# decided here; addons/inputs/csv_blocks.py reads clean stretches faster, to the same rows.

MAX_RECORD_CHARS = 16_000_000  # a record longer than this is an unbalanced quote, not a caption
MAX_COLUMNS = 2000  # each costs a cell in every row
MAX_LINE_CHARS = 64_000_000  # a file with a longer line is not a table; nothing is held beyond this
BATCH_ROWS = 8192  # rows handed over at a time

Malformed = tuple[int, int, str, str]  # rows before it in its batch, its line, the reason, its text
Batch = tuple["pa.Table", list[Malformed]]  # rows as a table of text, and the malformed records among them


class Record(NamedTuple):
    """A record of a CSV: the number of its first line, its fields (None where it cannot be parsed) and its raw text.

    `settled` says that no line waits to be read again: what comes next is the start of a record for any reader.
    """

    line: int
    fields: list[str] | None
    raw: str
    settled: bool


def read_lines(path: pathlib.Path, encoding: str) -> Iterator[str]:
    """The physical lines of a text file, their ends kept; bytes that are not text become lone surrogates."""
    codec = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
    try:
        with path.open(encoding=codec, errors="surrogateescape", newline="") as file:
            for number in itertools.count(1):
                line = file.readline(MAX_LINE_CHARS)
                if len(line) == MAX_LINE_CHARS:
                    raise Trouble(EXIT_INPUT, f"{path} is not a table: line {number} is longer than {MAX_LINE_CHARS} bytes")
                if not line:
                    return
                yield line
    except OSError as error:
        raise Trouble(EXIT_INPUT, f"cannot read csv_path {path}: {error.strerror or error}") from None
    except UnicodeError as error:  # a codec without surrogateescape, such as utf-16
        raise Trouble(EXIT_INPUT, f"{path} is not in its encoding: {error}") from None


class _Feed(Iterator[str]):
    """What `csv_records` gives to csv.reader: lines one by one, those of the record at hand kept in `taken`."""

    def __init__(self, lines: Iterator[str], escape: str) -> None:
        self.lines = lines
        self.escape = escape
        self.again: collections.deque[str] = collections.deque()  # lines that an unbalanced quote had swallowed
        self.begin()

    def begin(self) -> None:
        """Begin a new record. Where lines are read again, limits are shorter, or many stray quotes would take for ever."""
        self.taken: list[str] = []
        self.chars = 0
        self.most_lines = 100 if self.again else sys.maxsize
        self.most_chars = 1_000_000 if self.again else MAX_RECORD_CHARS

    def give_back(self) -> None:
        """Have all lines of the record but its first one read again."""
        self.again.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]

    def __next__(self) -> str:
        line = self.again.popleft() if self.again else next(self.lines)
        self.taken.append(line)
        self.chars += len(line)
        if self.chars > self.most_chars or len(self.taken) > self.most_lines:
            raise csv.Error("record too long")
        if not self.escape:
            return line
        # csv would drop it before any character; here it stays, but before those that it can escape
        escape = re.escape(self.escape)
        return re.sub(f"{escape}(?:([{escape}\"\r\n,;\t|])|)", lambda found: found[0] if found[1] else 2 * self.escape, line)


def csv_records(lines: Iterator[str], separator: str, number: int = 1, quoting: str = "auto",
                escape: str = "") -> Iterator[Record]:
    """Yield the records in `lines`; `number` is that of the first line. With `quoting` "none" each line is one.

    `escape` is the character that makes a quote, a separator, a line's end or itself behind it plain text; "" for none.

    A record that cannot be parsed (an unbalanced quote swallows what follows) costs its first line only: the lines after
    it are read again, so that one stray quote does not take a neighbour with it.
    """
    csv.field_size_limit(MAX_RECORD_CHARS)
    feed = _Feed(lines, escape)
    start = functools.partial(csv.reader, feed, delimiter=separator, strict=True, escapechar=escape or None,
                              quoting=csv.QUOTE_NONE if quoting == "none" else csv.QUOTE_MINIMAL)
    reader = start()
    while True:
        fields: list[str] | None
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error:
            fields = None
            feed.give_back()
            reader = start()
        raw = "".join(feed.taken)
        count = len(feed.taken)
        is_blank = fields == [] or not raw.strip("\r\n")
        if not is_blank:
            yield Record(number, fields, raw, settled=not feed.again)
        number += count
        feed.begin()


def careful_batches(records: Iterable[Record], columns: list[str], until: Callable[[], bool]) -> Iterator[Batch]:
    """Sort records into rows and malformed ones; stop when `until()` is true and a record has ended for sure."""
    rows: list[list[str]] = []
    malformed: list[Malformed] = []
    chars = 0
    for record in records:
        fields = record.fields
        chars += len(record.raw)
        if fields is not None and len(fields) == len(columns) and is_text("".join(fields)):
            rows.append(fields)
        else:
            is_long = fields is None and len(record.raw) > MAX_RECORD_CHARS
            reason = f"longer than {MAX_RECORD_CHARS} characters" if is_long else why_malformed(fields, len(columns))
            malformed.append((len(rows), record.line, reason, record.raw.rstrip("\r\n")))
        done = record.settled and until()
        if done or len(rows) == BATCH_ROWS or len(malformed) == BATCH_ROWS or chars > STAGE_BYTES:
            yield to_table(rows, columns), malformed
            rows = []
            malformed = []
            chars = 0
        if done:
            return
    yield to_table(rows, columns), malformed


def to_table(rows: list[list[str]], columns: list[str]) -> "pa.Table":
    """Rows of text to a table of string columns; TypeError or ValueError for cells that are not text (None becomes "")."""
    import pyarrow as pa
    cells = zip(*rows, strict=True) if rows else [()] * len(columns)
    return pa.Table.from_arrays([pa.array(column, pa.string()).fill_null("") for column in cells], names=columns)


def is_text(text: str) -> bool:
    """Whether the text decoded cleanly: undecodable bytes arrive as lone surrogates."""
    try:
        text.encode("utf-8")
        return True
    except UnicodeEncodeError:
        return False


def why_malformed(fields: list[str] | None, expected: int) -> str:
    """The reason that bad_rows.csv gives; `fields` is None where the quotes do not balance."""
    if fields is None:
        return "quotes do not balance"
    return f"{len(fields)} fields instead of {expected}" if len(fields) != expected else "bytes that are not text"


def column_name(column: str | int) -> str:
    """A column's name in the staged table; a number means a table without a header, counted from 0."""
    return column if isinstance(column, str) else f"column_{column}"


def name_columns(first: Sequence[str], config: Config) -> list[str]:
    """The columns' names, all different, from a table's first record; Trouble (exit 3) unless both needed are there once."""
    is_numbered = isinstance(config.url_column, int)
    if not first:
        raise Trouble(EXIT_INPUT, f"{config.csv_path} has no readable {'row' if is_numbered else 'header line'}")
    if len(first) > MAX_COLUMNS:
        raise Trouble(EXIT_INPUT, f"{config.csv_path} has {len(first)} columns, more than {MAX_COLUMNS}: no table of pairs")
    names = [f"column_{n}" for n in range(len(first))] if is_numbered else [name.strip() for name in first]
    for key in ("url_column", "caption_column"):
        wanted = column_name(getattr(config, key))
        if names.count(wanted) != 1:
            problem = "has no column" if wanted not in names else "has more than one column"
            cure = "the separator" if len(names) == 1 else f"{key} (by number, from 0, where there is no header)"
            raise Trouble(EXIT_INPUT, f"{config.csv_path} {problem} {wanted!r} ({key}); its columns: {', '.join(names)[:300]}; "
                                      f"set {cure}")
    unique: dict[str, None] = {}
    taken = set(names)
    for name in names:
        if name in unique:
            number = 2
            while f"{name}_{number}" in taken:
                number += 1
            name = f"{name}_{number}"
            taken.add(name)
        unique[name] = None
    return list(unique)


def separator_of(config: Config) -> str:
    """The character between two fields."""
    if config.separator != "auto":
        return config.separator
    return "\t" if config.csv_path.lower().removesuffix(".gz").endswith(".tsv") else ","


# ── Pairs: stage ──────────────────────────────────────────────────────────────────────────────────────────────────────

STAGE_ROWS = 8192  # rows of one row group of the staged table: what is held in memory at a time
STAGE_BYTES = 16_000_000  # of text in one row group: where rows are long, it has fewer of them


class StagedTable:
    """The Parquet file that a text table is staged into, written by a thread of its own while the next rows are parsed."""

    def __init__(self, file: BinaryIO, columns: list[str]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq
        schema = pa.schema([(name, pa.string()) for name in columns])
        self.cuts: list[int] = []  # the rows at which a row group, and a partition, begins because the ones before are long
        self._written = 0
        self._held: pa.Table = schema.empty_table()
        self._writer = pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=False)
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def append(self, rows: "pa.Table") -> None:
        """Add rows; whole row groups are written, the rest is held."""
        import pyarrow as pa
        for start, stop in _short_stretches(rows):
            piece = rows.slice(start, stop - start)
            if self._held.nbytes + piece.nbytes > STAGE_BYTES and len(self._held) % STAGE_ROWS:
                self._cut()
            self._held = pa.concat_tables([self._held, piece])
            self._write(len(self._held) - len(self._held) % STAGE_ROWS)

    def _cut(self) -> None:
        """End the row group before it has all its rows, and begin a partition with the next one."""
        self._write(len(self._held))
        self.cuts.append(self._written)

    def _write(self, count: int) -> None:
        if self._writing:
            self._writing.result()  # no more than one block waits to be written
            self._writing = None
        if count:
            self._writing = self._pool.submit(self._writer.write_table, self._held.slice(0, count), STAGE_ROWS)
            self._held = self._held.slice(count)
            self._written += count

    def finish(self) -> None:
        """Write what is held, and the footer."""
        self._write(len(self._held))
        self._write(0)
        self._writer.close()

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown()
        self._writer.close()


def _short_stretches(rows: "pa.Table") -> Iterator[tuple[int, int]]:
    """[start, stop) of stretches of rows that hold STAGE_BYTES at most, or one row; all of them where that is enough."""
    stretches = [(0, len(rows))]
    while stretches:
        start, stop = stretches.pop()
        if stop - start > 1 and rows.slice(start, stop - start).nbytes > STAGE_BYTES:
            middle = (start + stop) // 2
            stretches += [(middle, stop), (start, middle)]
        else:
            yield start, stop


class BadRows:
    """bad_rows.csv: the malformed records, a line each; `place` are the cells before those of `add`."""

    columns: tuple[str, ...] = ("line", "reason", "text")

    def __init__(self, file: BinaryIO, escape: bool = False) -> None:
        text = io.TextIOWrapper(file, "utf-8", "backslashreplace", "", write_through=True)
        self._escape = escape
        self._writer = csv.writer(text, lineterminator="\n")
        self._writer.writerow(self.columns)
        self.place: tuple[str, ...] = ()
        self._text = text  # a wrapper that is collected would close the file
        self.count = 0
        self.undecodable = 0

    def add(self, line: int, reason: str, raw: str) -> None:
        """Write one record."""
        self.count += 1
        self.undecodable += not is_text(raw)
        text = raw[:1000]
        if self._escape:
            text = addon("results.formulas", "escape_formulas").escape_formula(text)
        self._writer.writerow((*self.place, line, reason, text))


class StagedRows:
    """The rows of pairs.parquet by number."""

    brings_images = False

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._starts: list[int] | None = None  # of the row groups, and the end

    def read(self, start: int, stop: int) -> "pd.DataFrame":
        """Rows [start, stop) as a DataFrame of text columns."""
        import pyarrow as pa
        try:
            table = self._read_table(start, stop)
        except (OSError, pa.ArrowException) as error:
            raise Trouble(EXIT_VERIFY, f"cannot read {self._path}, which was sound when this run began ({error}): the same "
                                       "command stages the table again") from None
        if len(table) != stop - start:
            raise Trouble(EXIT_VERIFY, f"{self._path} has been replaced by another process; run the same command again")
        return table.to_pandas()

    def _read_table(self, start: int, stop: int) -> "pa.Table":
        """Rows [start, stop), fewer where the file ends before."""
        import pyarrow.parquet as pq
        with self._path.open("rb") as file, pq.ParquetFile(file) as staged:
            return self._read_groups(staged, start, stop)

    def _read_groups(self, staged: Any, start: int, stop: int) -> "pa.Table":
        """Rows [start, stop) of an open pq.ParquetFile."""
        if self._starts is None or self._starts[-1] != staged.metadata.num_rows:  # another process may have replaced it
            counts = (staged.metadata.row_group(number).num_rows for number in range(staged.num_row_groups))
            self._starts = list(itertools.accumulate(counts, initial=0))
        first = max(0, bisect.bisect_right(self._starts, start) - 1)
        last = bisect.bisect_left(self._starts, stop)
        groups = list(range(first, min(last, staged.num_row_groups)))
        table = staged.read_row_groups(groups) if groups else staged.schema_arrow.empty_table()
        return table.slice(start - self._starts[first], stop - start)


class CsvReader:
    """The reader of CSV and TSV of a script alone; addons/inputs has a faster one, to the same rows, and all others."""

    kind: str = "csv"
    suffixes: tuple[str, ...] = (".csv", ".tsv", ".txt")

    def describe(self, config: Config, output: pathlib.Path) -> Json:
        """Stream the table into pairs.parquet, and its malformed records into bad_rows.csv, both in `output`.

        Returns what the manifest says of the input: kind, columns, rows, malformed, files (name, rows, bytes, times, sha256)
        and, where there are very long rows, cuts.
        """
        path = pathlib.Path(config.csv_path)
        info = path.stat()
        columns, batches = self._open_table(config)
        rows = 0
        with atomic_file(output / "bad_rows.csv") as bad_file, atomic_file(output / "pairs.parquet") as staged_file:
            bad = BadRows(bad_file, config.escape_formulas)
            with contextlib.closing(StagedTable(staged_file, columns)) as staged:
                for batch, malformed in batches:
                    left = config.limit - rows if config.limit else len(batch) + 1
                    kept = batch.slice(0, left)
                    staged.append(kept)
                    rows += len(kept)
                    for before, line, reason, raw in malformed:
                        if before < left:  # what comes after the last row is not even judged
                            bad.add(line, reason, raw)
                    if rows == config.limit:
                        break
                staged.finish()
        if bad.undecodable:
            say(f"{bad.undecodable} lines of {path} are not {config.encoding} (if the file is latin-1, set encoding: latin-1)")
        file = {"name": path.name, "rows": rows, "bytes": info.st_size, "mtime_ns": info.st_mtime_ns,
                "ctime_ns": info.st_ctime_ns, "sha256": file_sha256(path)}
        described = {"kind": self.kind, "columns": columns, "rows": rows, "malformed": bad.count, "literal_lines": 0,
                     "files": [file]}
        return described | {"cuts": staged.cuts} if staged.cuts else described

    def _open_table(self, config: Config) -> tuple[list[str], Iterator[Batch]]:
        """The table's columns and its batches; it is read record by record."""
        separator = separator_of(config)
        escape = "" if config.escape in ("auto", "none") else config.escape
        lines = read_lines(pathlib.Path(config.csv_path), config.encoding)
        records = csv_records(lines, separator, quoting=config.quoting, escape=escape)
        first = next(records, None)
        fields = (first.fields if first else None) or []
        columns = name_columns(fields if is_text("".join(fields)) else [], config)
        if first and isinstance(config.url_column, int):  # no header: the first record is a row, too
            records = itertools.chain([first], records)
        if separator == "\t" and config.quoting == "auto":
            records = self._without_quotes(records)
        return columns, careful_batches(records, columns, lambda: False)

    @staticmethod
    def _without_quotes(records: Iterator[Record]) -> Iterator[Record]:
        """The records; Trouble (exit 2) at the first quote: most programs that write tabs know no quoting."""
        for record in records:
            if '"' in record.raw:
                addon("inputs.literal_quotes", "a table separated by tabs with quotes in it (unless quoting is none)")
            yield record

    def open(self, manifest: Json, config: Config, output: pathlib.Path) -> StagedRows:
        """The staged rows by number."""
        return StagedRows(output / "pairs.parquet")

    def differences(self, manifest: Json, config: Config) -> list[str]:
        """What differs between the table that was staged and the one that is there now, in words; nothing if it is the same.

        Size and both times answer at once (a write that keeps the modification time still moves the change time); otherwise
        the sha256 decides.
        """
        path = pathlib.Path(config.csv_path)
        file = manifest["files"][0]
        if not path.is_file():
            return [f"the input {path} is gone"]
        info = path.stat()
        if (info.st_size, info.st_mtime_ns, info.st_ctime_ns) == (file["bytes"], file["mtime_ns"], file.get("ctime_ns")):
            return []
        return [] if file_sha256(path) == file["sha256"] else [f"the content of {path} has changed"]


# ── Plan: what a run is ───────────────────────────────────────────────────────────────────────────────────────────────

FOLDER_FORMAT = 2  # of the output folder; 0.1 wrote format 1, whose parts were two files
RUN_FILES = ("manifest.json", "pairs.parquet", "bad_rows.csv", "scores.csv", "scores.parquet", "profile.json",
             "memory-time.png", "curated/curated.json")
STAGED_FILES = ("pairs.parquet", "bad_rows.csv")  # what staging writes; manifest.json has the sha256 of each


@dataclasses.dataclass(frozen=True)
class Partition:
    """A fixed range of rows, [start, stop), and the files its results go to."""

    index: int
    start: int
    stop: int
    folder: pathlib.Path

    @property
    def parquet(self) -> pathlib.Path:
        """The part: the rows and their results. It appears whole; that it is there is the mark of done."""
        return self.folder / f"part-{self.index:05d}.parquet"

    @property
    def times(self) -> pathlib.Path:
        """Seconds, worker and memory peaks of the part; it may be missing, and no score depends on it."""
        return self.folder / f"part-{self.index:05d}.json"

    @property
    def embeddings(self) -> pathlib.Path:
        """With save_embeddings: the embeddings of its images and captions; written before the part."""
        return self.folder / f"part-{self.index:05d}.npz"


@dataclasses.dataclass
class Plan:
    """What a run is: its manifest and its partitions, the same for every engine and every resumption.

    `manifest` holds the input's identity, the settings that decide a score (`settings`) and what only the loaded model can
    tell (`resolved`, see `settle`); `fingerprint`, a hash of it, is what the parts of this run are marked with.
    """

    config: Config
    output: pathlib.Path
    manifest: Json
    partitions: list[Partition]
    table: "Rows"
    begins: bool = False  # nothing was scored yet when it was made: another model than before may be settled on
    other_libraries: list[str] = dataclasses.field(default_factory=list)  # those here that the run was not begun with

    def __post_init__(self) -> None:
        self.fingerprint = fingerprint_of(self.manifest)
        self._known_mark: tuple[int, ...] = ()  # of the manifest on disk when it was last found to be this plan's

    @property
    def row_count(self) -> int:
        """How many rows came in."""
        return self.manifest["rows"]

    def resolve(self, resolved: Json) -> None:
        """Take in what only a loaded model could tell."""
        self.manifest["resolved"] = resolved
        self.fingerprint = fingerprint_of(self.manifest)

    def refresh(self) -> None:
        """Take in what other processes have settled since; Trouble (exit 2) if they have planned another run."""
        known = read_manifest(self.output)
        if known is None or _without_model(known) != _without_model(self.manifest):
            raise _planned_anew(self.output)
        if "resolved" in known:
            self.resolve(known["resolved"])

    def check_still_there(self) -> None:
        """Trouble (exit 2) unless the manifest on disk is this plan's; it is read again only when it is another file."""
        path = self.output / "manifest.json"
        with _reading(path):
            info = path.stat()
            mark = (info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
            if mark == self._known_mark:
                return
            known = read_manifest(self.output)
            if known and fingerprint_of(known) == self.fingerprint and known["settings"] == self.manifest["settings"]:
                self._known_mark = mark
                return
        raise _planned_anew(self.output)


def _planned_anew(output: pathlib.Path) -> Trouble:
    return Trouble(EXIT_CONFIG, f"{output} has been planned anew by another process: this run's parts are not for it")


def _without_model(manifest: Json) -> str:
    """The fingerprint of what was known before a model was loaded, and where the images are."""
    bare = {key: value for key, value in manifest.items() if key != "resolved"}
    return f"{fingerprint_of(bare)} {manifest['settings'].get('image_path')}"


def fingerprint_of(manifest: Json) -> str:
    """A hash of everything in the manifest that decides a row or its score, in hexadecimal; not where the same files lie."""
    decisive = {key: value for key, value in manifest.items() if key not in ("version", "staged", "files")}
    if manifest["settings"].get("image_path") != "url":
        decisive["settings"] = manifest["settings"] | {"image_path": ""}
    decisive["files"] = [{key: value for key, value in file.items() if not key.endswith(("time_ns", "version"))}
                         for file in manifest["files"]]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:32]


def find_reader(csv_path: str) -> "Reader":
    """The reader for `csv_path`: CsvReader for a script alone, else the one of addons/inputs that its name asks for."""
    if ADDONS.is_dir():
        return addon("inputs", "csv_path").find_reader(csv_path)
    if not csv_path.lower().endswith(CsvReader.suffixes):
        addon("inputs", f"csv_path {csv_path!r}")
    return CsvReader()


def check_input(csv_path: str) -> None:
    """Raise Trouble (exit 3) where there is no input, before anything is made or discarded for it."""
    if ADDONS.is_dir():
        addon("inputs", "csv_path").check_there(csv_path)
    elif not pathlib.Path(csv_path).is_file():
        raise Trouble(EXIT_INPUT, f"csv_path {csv_path!r}: no such file (in {pathlib.Path.cwd().name}/)")


@profile
def make_plan(config: Config, fresh: bool = False, joins: bool = False) -> Plan:
    """Stage the input, or check that `output_path` holds this very run; cut the rows into partitions.

    Raises Trouble: exit 2 if the folder holds another run, 3 for the input, 5 for the output disk. A process that `joins`
    others at work on the run leaves what they have settled.
    """
    output = as_path(config.output_path)
    if fresh or not has_parts(output):
        check_input(config.csv_path)
    if would_overwrite(as_path(config.csv_path), output):
        raise Trouble(EXIT_CONFIG, f"csv_path {config.csv_path!r} is where results go in output_path {config.output_path!r}: "
                                   "write elsewhere with --set output_path=...")
    if in_store(output):
        addon("stores.leases", "output_path").check_workers(config, output)
    staged = {} if fresh else describe_staged(output)  # before the lock: a table may be large, and many tasks start at once
    with locked(output), output_disk(output):
        if ADDONS.is_dir():
            addon("results.earlier_run", "output_path").tidy_up(output)
        if fresh:
            discard_run(output)
        manifest = read_manifest(output)
        if (manifest is not None or has_parts(output)) and not is_this_run(manifest, config, staged):
            alone = f"{output} holds another run: discard it with --fresh, or write elsewhere; telling what differs"
            manifest = addon("results.earlier_run", alone).check(manifest, config, output, staged)
        if manifest is None:
            manifest = _write_manifest(config, output)
        (output / "parts").mkdir(exist_ok=True)
        begins = not joins and not has_parts(output)
    table = find_reader(config.csv_path).open(manifest, config, output)
    return Plan(config, output, manifest, cut_rows(manifest, output), table, begins)


def read_manifest(output: pathlib.Path) -> Json | None:
    """manifest.json as it was written, None where there is none; one of another format is not checked."""
    known = read_json(output / "manifest.json")
    if known is not None and known.get("format") != FOLDER_FORMAT:
        return known
    return read_sealed(output / "manifest.json")


def would_overwrite(source: pathlib.Path, output: pathlib.Path) -> bool:
    """Whether a run into the folder `output` would write over its own input `source`: a table, a folder or a glob."""
    is_own_file = source.parent.resolve() == output.resolve() and any(fnmatch.fnmatch(name, source.name) for name in RUN_FILES)
    return is_own_file or source.resolve() in (output.resolve(), (output / "parts").resolve())


def cut_rows(manifest: Json, output: pathlib.Path) -> list[Partition]:
    """The partitions of the run that `manifest` describes."""
    rows = manifest["rows"]
    # no partition crosses the edge of a tar, or a place where very long rows begin a new one
    edges = sorted({*manifest.get("starts", [0][:rows]), *manifest.get("cuts", []), rows})
    starts: list[int] = []
    for edge, following in itertools.pairwise(edges):
        starts.extend(range(edge, following, manifest["partition_rows"]))
    ranges = itertools.pairwise([*starts, rows])
    return [Partition(index, start, stop, output / "parts") for index, (start, stop) in enumerate(ranges)]


def has_parts(output: pathlib.Path) -> bool:
    """Whether anything is scored in `output` already."""
    with output_disk(output / "parts"):
        return any((output / "parts").glob("part-*.parquet"))


def settings_of(config: Config) -> Json:
    """The keys that decide a score or a status."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in HARMLESS_KEYS}


def is_this_run(manifest: Json | None, config: Config, staged: dict[str, str]) -> bool:
    """Whether `manifest` describes this very run and `staged`, the sha256 of what staging has left, is as it was written.

    What becomes of anything else is decided, and said, in addons/results/earlier_run.py.
    """
    if manifest is None or manifest.get("format") != FOLDER_FORMAT:
        return False
    has_these_settings = manifest["settings"] == json.loads(json.dumps(settings_of(config)))
    with contextlib.suppress(Trouble):  # there is no input any more
        reader = find_reader(config.csv_path)
        return (has_these_settings and reader.kind == manifest["kind"] and not reader.differences(manifest, config)
                and manifest.get("staged", staged) == staged)
    return False


def describe_staged(output: pathlib.Path) -> dict[str, str]:
    """The sha256 of each file that staging has left in `output`."""
    found = {}
    # in a store it is a version, which takes no read
    identify = addon("stores.staged", "output_path").identify if in_store(output) else file_sha256
    for name in STAGED_FILES:
        with contextlib.suppress(OSError):  # missing, or a folder
            found[name] = identify(output / name)
    return found


def _write_manifest(config: Config, output: pathlib.Path) -> Json:
    """Describe (and stage) the input, and write the manifest of a new run."""
    with output_disk(output):
        forget_results(output)  # of a run whose table was empty
        for name in STAGED_FILES:
            remove_path(output / name)  # of a run that was planned and never scored
        remove_path(output / "manifest.json")  # whose workers then find that it is gone
        described = find_reader(config.csv_path).describe(config, output)
    size = config.partition_rows
    if size == "auto" and "starts" in described:
        size = max(1, described["rows"])  # a tar is one partition
    elif size == "auto":
        size = min(10_000, max(256, described["rows"] // 200))
    manifest = {"version": __version__, "format": FOLDER_FORMAT, "settings": settings_of(config), **described,
                "partition_rows": size}
    if (output / "pairs.parquet").exists():
        manifest["staged"] = describe_staged(output)
    if in_store(output):
        addon("stores.commits", "output_path").create_manifest(output / "manifest.json", manifest)
    else:
        write_sealed(output / "manifest.json", manifest)
    if described["malformed"]:
        say(f"{described['malformed']} lines of {config.csv_path} are not rows: see {output / 'bad_rows.csv'}")
    return json.loads(json.dumps(manifest))  # as it is read back, so that the two compare equal


def settle(plan: Plan, scorer: "Scorer | None") -> None:
    """Record in the manifest what only the loaded model could tell, or refuse a worker that differs from the first one."""
    with locked(plan.output):
        manifest = read_manifest(plan.output)
        if manifest is None or _without_model(manifest) != _without_model(plan.manifest):
            raise _planned_anew(plan.output)
        recorded = manifest.get("resolved")
        may_change = plan.begins and not has_parts(plan.output)
        if scorer and scorer.config.batch_size == "auto" and ADDONS.is_dir():
            addon("models.batch_size", "batch_size: auto").settle_batch_size(scorer, recorded or {}, may_change)
        resolved = scorer.identity() if scorer else {}
        if not may_change and recorded not in (None, resolved):
            resolved = addon("results.earlier_run", "a run begun with another model").go_on_with(plan, resolved, recorded)
        plan.resolve(resolved)
        if resolved != recorded:
            write_sealed(plan.output / "manifest.json", manifest | {"resolved": resolved})
        forget_results(plan.output)


DECISIVE_LIBRARIES = ("torch", "transformers", "tokenizers", "pillow")


def refuse_changed_files(plan: Plan) -> None:
    """Trouble (exit 2) where files of a local model have changed since the run was begun, finished or not; loads nothing."""
    recorded = plan.manifest.get("resolved", {}).get("files")
    if not recorded or not has_parts(plan.output):
        return
    folder = pathlib.Path(plan.config.pretrained_model)
    if not folder.is_dir() or hash_decisive_files(folder) != recorded:
        addon("results.earlier_run", "a run begun with another model").refuse_changed_files(plan, recorded)


def forget_results(output: pathlib.Path) -> None:
    """Take away what an earlier run summed up: from here on there is work under way."""
    with output_disk(output):
        (output / "profile.json").unlink(missing_ok=True)


def discard_run(output: pathlib.Path) -> None:
    """Remove this program's own files from `output`; anything else there stays.

    The manifest goes first, and no part can be committed meanwhile: a worker of the old run then finds that it is gone.
    """
    with output_disk(output), locked(output, COMMIT_LOCK):
        for name in RUN_FILES:
            remove_path(output / name)
        for path in (output / "parts").glob("part-*"):
            remove_path(path)


def remove_path(path: pathlib.Path) -> None:
    """Remove a file, or an empty folder that stands in its place; nothing where there is none."""
    if not in_store(path) and path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        with contextlib.suppress(NotADirectoryError):  # below a file, where nothing can be
            path.unlink(missing_ok=True)


# ── Images: find and decode ───────────────────────────────────────────────────────────────────────────────────────────

ALLOWED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_ASPECT = 200  # a strip of 1 x 100,000 px would be resized to gigabytes before its centre is cut out; so that is cut first
MAX_LONG_EDGE = 32_768  # and where the model squeezes the whole strip, it is first shrunk to at most this, in whole steps


def open_source(config: Config, threads: int) -> Callable[[str], bytes]:
    """What reads an image's bytes: a folder, or what addons/images knows under the name that `image_path` gives (url)."""
    # a folder called url is ./url; pathlib's is_dir raises where it may not look
    if config.image_path != "url" and os.path.isdir(config.image_path):  # noqa: PTH112
        folder = pathlib.Path(config.image_path).resolve()
        return functools.partial(read_file, folder, max_bytes=config.max_image_bytes, follow_links=config.follow_links)
    if config.image_path == "url":
        addon("images.fetch", "image_path: url")  # says so where it is missing
    for module in room("images"):
        if config.image_path in getattr(module, "SOURCES", ()):
            return module.open_source(config, threads)
    if URL.match(config.image_path):
        return addon("stores.images", "image_path").open_source(config, threads)
    raise Trouble(EXIT_INPUT, f"image_path {config.image_path!r}: no such folder (in {pathlib.Path.cwd().name}/); "
                              "to fetch each row's URL, set image_path: url")


MAX_PATH_CHARS = 4096  # of a URL's path that is looked up: no file system has longer ones


def names_in_folder(source: str) -> list[str]:
    """The paths inside `image_path` at which the image of `source` may lie; the first that exists is the one.

    A relative path, or a file:// URI, is that path and no other; blanks around a path may be its own. The path of an http(s)
    URL is looked up by its endings, the longest first (a/b/1.png, b/1.png, 1.png), each as it stands and with its %20 and the
    like decoded. [] for no name at all.
    """
    plain = source.strip()
    scheme = plain.partition("://")[0].lower() if "://" in plain else ""
    if scheme not in ("http", "https", "file"):
        return [name for name in dict.fromkeys((source, plain)) if not name.endswith("/")]
    try:
        url = urllib.parse.urlsplit(plain)
    except ValueError:
        return []
    if scheme == "file":
        return [urllib.parse.unquote(url.path)] if url.path and url.netloc in ("", "localhost") else []
    path = url.path
    if path.endswith("/"):
        return []
    if len(path) > MAX_PATH_CHARS:
        path = path[-MAX_PATH_CHARS:].partition("/")[2]
    segments: list[str] = []
    for segment in path.split("/"):
        if segment == "..":
            del segments[-1:]
        elif segment not in ("", "."):
            segments.append(segment)
    names: dict[str, None] = {}
    for first in range(len(segments)):
        ending = segments[first:]
        names["/".join(ending)] = None
        names["/".join(map(urllib.parse.unquote, ending))] = None
    return list(names)


def read_file(folder: pathlib.Path, source: str, max_bytes: int, follow_links: bool = False) -> bytes:
    """The bytes of the file inside `folder` that `source`, a path or a URL, names (see `names_in_folder`).

    With `follow_links` a link inside may lead out. A name that is not there may be spelled otherwise (addons/images/spellings).
    """
    names = names_in_folder(source)
    if not names:
        raise RowFailure("missing", "no file name")
    read: Callable[[pathlib.Path, str, int], bytes | None] = read_inside
    if ADDONS.is_dir() or follow_links:
        inside = addon("images.inside", "follow_links" if follow_links else "image_path")
        read = inside.read_following if follow_links else inside.read_inside
    spellings: Iterable[str] = addon("images.spellings", "image_path").other_spellings(names) if ADDONS.is_dir() else ()
    for name in itertools.chain(names, spellings):
        data = read(folder, name, max_bytes)
        if data is not None:
            return data
    raise RowFailure("missing", "no such file in image_path")


def read_inside(folder: pathlib.Path, name: str, max_bytes: int) -> bytes | None:
    """The bytes of `folder`/`name`, None where there is no such file; RowFailure for one that may not be read.

    For a script alone: addons/images/inside.py leaves no moment between the check and the opening.
    """
    try:
        path = (folder / name).resolve(strict=True)
        if not path.is_relative_to(folder):
            raise RowFailure("forbidden", "outside image_path")
        if not path.is_file():
            raise RowFailure("forbidden", "not a regular file")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except PermissionError:
        raise RowFailure("forbidden", "no permission to read the file") from None
    except (OSError, ValueError, RuntimeError):  # none there; a name too long, or with a NUL; links in a circle
        return None
    if len(data) > max_bytes:
        raise RowFailure("too_large", f"more than {max_bytes} bytes")
    return data


class Remark(NamedTuple):
    """What a sound image has that its pixels do not show: an EXIF orientation that the config ignores; a row's `detail`."""

    is_turned: bool = False
    detail: str = ""


NO_REMARK = Remark()
REMARK = "image_text_sim_clip remark"  # the key under which `info` of a decoded image has its Remark


def decode_image(data: bytes, config: Config, target: tuple[int, int] | None = None,
                 account: "Account | None" = None) -> "Image.Image":
    """Bytes to an 8-bit RGB image; raises RowFailure. `target` (width, height) lets `decode: scaled` shrink JPEGs.

    An image refused as corrupt is tried again without what lies around its pixels. What is to be said of an image that is
    sound stands in its `info[REMARK]`. Where there is an `account`, the memory that this takes is reserved from it first.
    """
    try:
        return decode_as_it_is(data, config, target, account)
    except RowFailure as failure:
        refusal = (failure.status, failure.detail)  # for another one: this one's traceback holds the image
    if refusal[0] == "corrupt" and ADDONS.is_dir():
        decode = addon("images.plain_pixels", "decode").decode_without_metadata
        image: Image.Image | None = decode(data, config, target, account)
        if image:
            return image
    raise RowFailure(*refusal)


def decode_as_it_is(data: bytes, config: Config, target: tuple[int, int] | None, account: "Account | None") -> "Image.Image":
    """`decode_image` of these very bytes."""
    from PIL import Image, UnidentifiedImageError
    _prepare_pillow(config.max_image_pixels)
    formats = (*ALLOWED_FORMATS, "AVIF") if config.avif else ALLOWED_FORMATS
    try:
        with failing_its_row("decode"), Image.open(io.BytesIO(data), formats=formats) as image:
            pixels = image.width * image.height
            if pixels > config.max_image_pixels:
                raise RowFailure("bomb", f"{image.width} x {image.height} pixels")
            if config.decode == "scaled" and target and image.format == "JPEG":
                image.draft(None, (2 * target[0], 2 * target[1]))  # never below twice the target: nearer shows in the score
            if account:
                account.reserve_for_decoding(image, pixels)
            image.load()
            image.info[REMARK] = NO_REMARK  # a stranger's text may have this key
            right = addon("images.second_look", "decode").look_again(image, data, config) if ADDONS.is_dir() else image
            rgb = to_rgb(right, config)
            rgb.info[REMARK] = right.info[REMARK]
            return rgb
    except UnidentifiedImageError:
        raise RowFailure(*_odd_images().why_unidentified(data)) from None


@contextlib.contextmanager
def failing_its_row(doing: str) -> Iterator[None]:
    """Turn what Pillow and torch raise for an image's sake into a RowFailure; `doing` is what could lack memory."""
    from PIL import Image, UnidentifiedImageError
    try:
        yield
    except (RowFailure, UnidentifiedImageError):
        raise
    except Image.DecompressionBombError:
        raise RowFailure("bomb", "too many pixels") from None
    except MemoryError:
        raise RowFailure("bomb", f"not enough memory to {doing}") from None
    except (OSError, ValueError, TypeError, SyntaxError, NotImplementedError, IndexError, KeyError, AttributeError,
            EOFError, OverflowError, ZeroDivisionError, AssertionError, RuntimeError, struct.error) as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):  # how torch says it
            raise RowFailure("bomb", f"not enough memory to {doing}") from None
        raise RowFailure("corrupt", type(error).__name__) from None


@functools.cache
def _prepare_pillow(max_pixels: int) -> None:
    """Keep Pillow's own pixel limit from lying below ours, and its warnings about strangers' images off stderr."""
    from PIL import Image
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _odd_images() -> types.ModuleType:
    """The add-on for images that are rarely met; for a script alone, such an image is `unsupported`."""
    try:
        return importlib.import_module("addons.images.odd_images")
    except ImportError:
        raise RowFailure("unsupported", "needs addons/images/odd_images.py next to the script") from None


def to_rgb(image: "Image.Image", config: Config) -> "Image.Image":
    """Any PIL image (first frame) as 8-bit RGB, where a bare `convert` would give silent white or black.

    Wide numbers are scaled (addons/images/odd_images), transparency is laid over `transparent_over`.
    """
    from PIL import Image, ImageOps
    if config.exif_orientation:
        image = addon("images.exif", "exif_orientation").turn_upright(image) if ADDONS.is_dir() \
            else ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _odd_images().grey_from_numbers(image).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        above = image if image.mode == "RGBA" else image.convert("RGBA")
        below = Image.new("RGB", above.size, config.transparent_over)
        below.paste(above, mask=above.getchannel("A"))
        return below
    return image if image.mode == "RGB" else image.convert("RGB")


# ── Images: resize to what the model reads ────────────────────────────────────────────────────────────────────────────

@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """How the model's own image processor resizes and crops: sizes are (height, width) in pixels."""

    shortest_edge: int | None
    size: tuple[int, int] | None
    crop: tuple[int, int] | None
    resample: int  # Pillow's number: 2 bilinear, 3 bicubic
    fill: int = 0  # the level, of 255, around an image smaller than the crop
    keeps_strips: bool = False  # an image longer than any model reads stays whole: several models will each trim their own

    @classmethod
    def of(cls, processor: Any) -> "ImageSettings":
        """Read them from a transformers image processor; raises Trouble (exit 6) for steps this program does not know."""
        size = dict(processor.size)
        edge = size.get("shortest_edge")
        pair = (size["height"], size["width"]) if size.get("height") and size.get("width") else None
        crop = processor.crop_size if getattr(processor, "do_center_crop", False) else None
        pads = getattr(processor, "do_pad", False)
        sides = [*([edge] if edge else pair or [0]), *([crop["height"], crop["width"]] if crop else [])]
        are_sides = all(type(side) is int and 0 < side <= MAX_SIDE for side in sides)
        if not processor.do_resize or size.get("longest_edge") or not are_sides or pads:
            raise Trouble(EXIT_MODEL, f"the model's image processor asks for an unknown resize: {size}")
        return cls(edge, pair, (crop["height"], crop["width"]) if crop else None, int(processor.resample))

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize, rounded as transformers rounds."""
        if self.size:
            return self.size
        assert self.shortest_edge
        long_edge = int(self.shortest_edge * max(height, width) / min(height, width))
        return (long_edge, self.shortest_edge) if height > width else (self.shortest_edge, long_edge)

    def place_crop(self, height: int, width: int) -> tuple[int, int]:
        """Where the crop begins in a resized image, as in transformers: (top, left), negative where that is smaller."""
        assert self.crop
        top = (height - self.crop[0]) // 2 if height >= self.crop[0] else -math.ceil((self.crop[0] - height) / 2)
        left = (width - self.crop[1]) // 2 if width >= self.crop[1] else -math.ceil((self.crop[1] - width) / 2)
        return top, left

    def target(self) -> tuple[int, int] | None:
        """The size that `decode: scaled` must not go below twice of."""
        return (self.shortest_edge, self.shortest_edge) if self.shortest_edge else self.size

    def knows_fast_resize(self) -> bool:
        """Whether torch's antialiased kernel has the model's way of resampling."""
        return self.resample in RESAMPLE_MODES


RESAMPLE_MODES = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers and torch's names
MAX_SIDE = 4096  # pixels that an image processor may ask for: each image is held in that size, and no model reads as much

# What a dry run (`pretrained_model: none`) resizes to: the shape that most models read.
DRY_RUN_SETTINGS = ImageSettings(224, None, (224, 224), 2)


def trim_strip(image: "Image.Image", settings: ImageSettings) -> "Image.Image":
    """A strip in bounded size, others as they are: to resize it as it is would take gigabytes.

    Where the model's crop keeps the centre only, a strip longer than MAX_ASPECT is cut to its centre; where the model reads
    the whole strip, one longer than MAX_LONG_EDGE pixels is shrunk by averaging, to a size still far above the model's.
    """
    is_cropped = settings.shortest_edge and settings.crop
    if settings.keeps_strips or max(image.size) <= (MAX_ASPECT * min(image.size) if is_cropped else MAX_LONG_EDGE):
        return image
    odd_images = _odd_images()
    return odd_images.trim_strip(image, MAX_ASPECT) if is_cropped else odd_images.shorten_strip(image, MAX_LONG_EDGE)


def crop_centre(pixels: "torch.Tensor", settings: ImageSettings) -> "torch.Tensor":
    """(n, 3, h, w) resized pixels -> (n, 3, H, W) as the model's processor crops: bytes, or floats in [0, 1].

    They get a border of `fill` where they are smaller than the crop.
    """
    import torch
    if settings.crop is None:
        return pixels
    height, width = pixels.shape[-2:]
    top, left = settings.place_crop(height, width)
    if height < settings.crop[0] or width < settings.crop[1]:
        below = max(0, settings.crop[0] - height + min(top, 0))
        right = max(0, settings.crop[1] - width + min(left, 0))
        fill = settings.fill / 255 if pixels.is_floating_point() else settings.fill
        pixels = torch.nn.functional.pad(pixels, (max(0, -left), right, max(0, -top), below), value=fill)
    top = max(0, top)
    left = max(0, left)
    return pixels[..., top:top + settings.crop[0], left:left + settings.crop[1]]


def resize_fast(image: "Image.Image", settings: ImageSettings) -> "np.ndarray":
    """RGB image -> (3, H, W) uint8 array by torch's antialiased kernel, within one level of 255 of Pillow's.

    It is the kernel that transformers' own default backend calls.
    """
    import numpy as np
    import torch
    image = trim_strip(image, settings)
    pixels = _lend_pixels(image).permute(2, 0, 1)[None]  # (1, 3 or 4, h, w), channels last in memory
    resized = torch.nn.functional.interpolate(pixels, settings.resized(image.height, image.width),
                                              mode=RESAMPLE_MODES[settings.resample], antialias=True)
    return np.ascontiguousarray(crop_centre(resized, settings)[0, :3].numpy())


def _lend_pixels(image: "Image.Image") -> "torch.Tensor":
    """The image's (h, w, 4) uint8 tensor in Pillow's own memory, which has four bytes a pixel; a copy (h, w, 3) where
    Pillow cannot lend it: before 11.3, and beyond 16 MB."""
    import numpy as np
    import pyarrow as pa
    import torch
    if hasattr(image, "__arrow_c_array__"):
        with contextlib.suppress(ValueError):
            return torch.from_dlpack(pa.array(image).flatten()).view(image.height, image.width, 4)
    return torch.from_numpy(np.array(image))


def resize_coarsely(image: "Image.Image") -> "np.ndarray":
    """RGB image -> (3, 224, 224) uint8 array for a dry run, which loads no torch: nobody looks at it, so that it may be quick.

    Without the gap Pillow takes six times as long as torch's kernel, and a dry run longer than a real one.
    """
    import numpy as np
    from PIL import Image
    return np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR, reducing_gap=1.0)).transpose(2, 0, 1)


# ── Images: load them ahead ───────────────────────────────────────────────────────────────────────────────────────────

@dataclasses.dataclass
class Loaded:
    """What a loader thread made of one source: `pixels` (3, H, W) uint8 and a `remark`, or a `failure`; seconds per stage.

    With `decode: gpu` some pixels are an `OnGpu` instead (addons/images/gpu_decode.py), and `is_on_gpu` is set.
    """

    pixels: Any = None
    remark: Remark = NO_REMARK
    failure: RowFailure | None = None
    digest: bytes = b""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    is_on_gpu: bool = False


def hash_image(data: bytes) -> bytes:
    """The hash, of 16 bytes, by which files with equal bytes are one image (`Loaded.digest`)."""
    return hashlib.blake2b(data, digest_size=16).digest()


@dataclasses.dataclass(frozen=True)
class ImageDecoder:
    """Bytes -> RGB image, ready to be resized for the model that `settings` describe; raises RowFailure."""

    config: Config
    settings: ImageSettings

    @profile
    def __call__(self, data: bytes, account: "Account | None" = None) -> "Image.Image":
        """Decode one image; for `account` see `decode_image`."""
        image = decode_image(data, self.config, self.settings.target(), account)
        return trim_strip(image, self.settings)


Made = tuple["np.ndarray", Remark]  # pixels (3, H, W) uint8, and what is to be said of the image


@dataclasses.dataclass(frozen=True)
class ImageLoader:
    """Source (URL or path) -> Loaded. Runs in loader threads; who wants another way makes a copy by dataclasses.replace."""

    read: Callable[[str], bytes]
    decode: "Callable[[bytes, Account | None], Image.Image]"
    resize: "Callable[[Image.Image], np.ndarray]"
    on_gpu: Callable[[bytes, bytes], Any] | None = None  # (bytes, digest) -> OnGpu for what the GPU decodes, else None
    # these two by addons/images: what one image may take of the run's memory; what does the work, and gives up in time
    open_account: "Callable[[], contextlib.AbstractContextManager[Account | None]]" = contextlib.nullcontext
    watch: "Callable[[Callable[[], Made], Account], Made] | None" = None

    def __call__(self, source: str) -> Loaded:
        """Read, decode and resize one source; never raises for what is wrong with it."""
        loaded = Loaded()
        clock = Clock(loaded.seconds)
        with self.open_account() as account:
            try:
                self._load(source, loaded, clock, account)
            except RowFailure as failure:
                loaded.failure = RowFailure(failure.status, failure.detail)  # anew: what it came from holds on to the bytes
        return loaded

    def _load(self, source: str, loaded: Loaded, clock: "Clock", account: "Account | None") -> None:
        if not source.strip():
            raise RowFailure("missing", "no URL")
        with clock.stage("fetch"):
            data = self.read(source)
        loaded.digest = hash_image(data)
        if self.on_gpu:
            loaded.pixels = self.on_gpu(data, loaded.digest)
            loaded.is_on_gpu = loaded.pixels is not None
        if loaded.is_on_gpu:
            loaded.remark = loaded.pixels.remark
        else:
            loaded.pixels, loaded.remark = self.make_pixels(data, account, clock)

    def make_pixels(self, data: bytes, account: "Account | None", clock: "Clock | None" = None) -> "Made":
        """Decode and resize; raises RowFailure. `account` holds what it takes until its caller gives it back."""
        own = Clock()  # an image that is given up may go on, and must not touch what others read by then

        def make() -> "Made":
            with own.stage("decode", time.thread_time):
                image = self.decode(data, account)
            with own.stage("resize", time.thread_time), failing_its_row("resize"):
                return self.resize(image), image.info.get(REMARK, NO_REMARK)
        made = self.watch(make, account) if self.watch and account else make()
        if clock:
            clock.add(own.seconds)
        return made


Item = typing.TypeVar("Item")


def wait_for(future: "Future[Item]") -> None:
    """Wait until the future has a result, but not through an interruption."""
    while not concurrent.futures.wait([future], timeout=0.2).done:
        INTERRUPTION.check()


def compute_in_one_thread() -> None:
    """Keep torch to this thread for its arithmetic: there are as many threads as cores already. No torch: a dry run."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


HANGS_S = 15.0  # an image that was waited for longer than this when the run was stopped is tried in isolation by the next


class LoaderPool(typing.Generic[Item]):
    """Loads sources ahead of their use: `add` them, `take` them in the same order; a bounded number is in flight."""

    def __init__(self, threads: int) -> None:
        self.hangs = False  # the run was stopped while it waited for an image that does not come
        self._window = 4 * threads + 8
        self._waiting: collections.deque[tuple[Callable[[str], Item], str]] = collections.deque()
        self._flying: collections.deque[Future[Item]] = collections.deque()
        self._pool = ThreadPoolExecutor(threads, "loader", compute_in_one_thread) if threads else None

    def add(self, load: Callable[[str], Item], sources: Iterable[str]) -> None:
        """Queue names (not images: those stay within the window) to be loaded by `load`."""
        self._waiting.extend((load, source) for source in sources)
        self._launch()

    def _launch(self) -> None:
        while self._pool and self._waiting and len(self._flying) < self._window:
            load, source = self._waiting.popleft()
            self._flying.append(self._pool.submit(load, source))

    def take(self) -> Item:
        """The oldest source's result; waits for it, but not through an interruption."""
        if not self._pool:
            load, source = self._waiting.popleft()
            return load(source)
        future = self._flying.popleft()
        since = time.monotonic()
        try:
            wait_for(future)
        finally:
            self.hangs = not future.done() and time.monotonic() - since > HANGS_S
        self._launch()
        return future.result()

    def close(self) -> None:
        """Drop what is queued; what is being read is not waited for."""
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)


def loader_threads(config: Config) -> int:
    """How many loader threads `auto` means: as many as there are cores, more for URLs, none under a line profiler."""
    if PROFILED:
        return 0
    if config.loader_threads != "auto":
        return config.loader_threads
    spare = 4 if config.image_path == "url" else 1  # fetching needs the interpreter, for which some wait while others decode
    return min(32, spare * usable_cores())


def usable_cores() -> int:
    """The cores that this process may use: its share where a launcher started several here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


# ── Clock ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

# The stages of one pair's way, in order. Several threads share the work, so decode, resize and, on the CPU, the encoders
# count CPU seconds of their thread; fetch and a GPU's encoders count wall seconds. The last two are what the main thread
# waited for.
LOADER_STAGES = ("fetch", "decode", "resize")
PREPARE_STAGES = (*LOADER_STAGES, "tokenize")
METRIC_STAGES = ("image_encoder", "text_encoder", "score")
STAGES = (*PREPARE_STAGES, *METRIC_STAGES, "random_pairs", "write", "wait_for_images", "wait_for_model")


class Clock:
    """Seconds per stage, added up in the dict given; `now` is the stage at work, for the memory curve."""

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds = {} if seconds is None else seconds
        self.now = "start"

    def take(self) -> dict[str, float]:
        """The seconds so far; the clock begins again."""
        seconds = self.seconds
        self.seconds = {}
        return seconds

    def add(self, seconds: dict[str, float]) -> None:
        """Add another clock's seconds to this one's."""
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value

    @contextlib.contextmanager
    def stage(self, name: str, timer: Callable[[], float] = time.perf_counter) -> Iterator[None]:
        """Count what happens inside towards `name`."""
        started = timer()
        self.now = name
        try:
            yield
        finally:
            self.add({name: timer() - started})


def gpu_memory_mib(peak: bool = False) -> float:
    """Memory that torch holds on the GPU, in MiB; 0 without one (and without importing torch to find out)."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "cuda") or not torch.cuda.is_initialized():
        return 0.0
    used: int = torch.cuda.max_memory_reserved() if peak else torch.cuda.memory_reserved()
    return used / 2**20


def peak_memory_mib() -> float:
    """The most memory this process has ever held, in MiB."""
    with contextlib.suppress(OSError):  # elsewhere than on Linux; the number below counts who started this process, too
        status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        if peak := re.search(r"^VmHWM:\s+(\d+) kB", status, re.M):
            return int(peak[1]) / 2**10
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ── Model: find ───────────────────────────────────────────────────────────────────────────────────────────────────────

BUNDLED_HINT = "without the Hub, run the bundled model: python image_text_sim_clip.py --config challenge_set/demo.yaml"
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER = "adapter_config.json"
# Everything in a model folder that is read and decides a score, by patterns of names.
DECISIVE_FILES = ("config.json", *SAFETENSORS, "model-*-of-*.safetensors", "*processor_config.json", "tokenizer*", "vocab.*",
                  "merges.txt", "*.model", "added_tokens.json", "special_tokens_map.json", "adapter_*",
                  "open_clip_*", "bpe_simple_vocab*")
OPEN_CLIP_CONFIG = "open_clip_config.json"


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A folder with a model in it: `commit` is the Hub's, empty for a local folder; `base` is what an adapter alone changes."""

    folder: pathlib.Path
    commit: str
    safetensors: bool
    base: "ModelFiles | None" = None
    open_clip: bool = False  # in open_clip's format (addons/models/open_clip.py), not transformers'

    @property
    def has_adapter(self) -> bool:
        """Whether the folder holds an adapter, alone or next to its base model."""
        return (self.folder / ADAPTER).is_file()

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """The sha256 of each local file that decides a score, by name; none for the Hub, where the commit says it all."""
        found = {} if self.commit else hash_decisive_files(self.folder)
        of_base = self.base.digests if self.base else {}
        return found | {f"base/{name}": digest for name, digest in of_base.items()}

    @property
    def identity(self) -> str:
        """The Hub's commit; for a local folder a hash of the hashes of its files."""
        own = self.commit or hashlib.sha256(json.dumps(self.digests, sort_keys=True).encode()).hexdigest()[:16]
        return f"{own} on {self.base.identity}" if self.base else own


def hash_decisive_files(folder: pathlib.Path) -> dict[str, str]:
    """The sha256 of each file in `folder` that is read and decides a score, by name."""
    shards = _name_shards(folder)
    paths = [path for path in sorted(folder.iterdir())
             if path.is_file() and (path.name in shards or any(fnmatch.fnmatch(path.name, name) for name in DECISIVE_FILES))]
    with ThreadPoolExecutor(usable_cores()) as pool:
        digests = pool.map(lambda path: _hash_unchanged(path, path.stat().st_size, path.stat().st_mtime_ns), paths)
        return {path.name: digest for path, digest in zip(paths, digests, strict=True)}


def _name_shards(folder: pathlib.Path) -> set[str]:
    """The files of weights that the folder's index names, which may call them anything."""
    files = (read_json(folder / SAFETENSORS[1]) or {}).get("weight_map")
    return set(map(str, files.values())) if isinstance(files, dict) else set()


@functools.lru_cache
def _hash_unchanged(path: pathlib.Path, size: int, time_ns: int) -> str:
    """The sha256 of a file, read once for as long as it has this size and time."""
    return file_sha256(path)


def find_model(config: Config) -> ModelFiles:
    """A local folder, the Hub (at one commit) or the Hub's local cache; raises Trouble (exit 6) that says what was tried."""
    name = config.pretrained_model
    folder = pathlib.Path(name)
    if ADDONS.is_dir():
        addon("models.open_clip_files", "pretrained_model").refuse_openai_checkpoint(name)
    if folder.is_dir():
        if config.revision != Config.revision:
            say(f"warning: {name} is a folder, so that revision: {config.revision} says nothing; it is for models of the Hub")
        return find_in_folder(folder, name, config.safetensors_only)
    if not re.fullmatch(r"(hf-hub:)?[\w-][\w.-]*/[\w.-]+", name):
        raise Trouble(EXIT_MODEL, f"pretrained_model {name!r} is neither a folder nor a Hub id (owner/name); {BUNDLED_HINT}")
    files = find_on_hub(name, config.revision, config.safetensors_only)
    if not (files.base or files).safetensors:
        file = "open_clip_pytorch_model.bin" if files.open_clip else "pytorch_model.bin"
        say(f"warning: {name} has no safetensors at this revision; reading {file} with weights_only")
    return files


def find_in_folder(folder: pathlib.Path, name: str, safetensors_only: bool = False) -> ModelFiles:
    """The model in a local folder; raises Trouble (exit 6) for a folder that is none."""
    if is_open_clip({path.name for path in folder.iterdir()}, name, folder):
        open_clip_files = addon("models.open_clip_files", f"pretrained_model {name!r} (open_clip's format)")
        return open_clip_files.find_in_folder(folder, name, safetensors_only)
    if ADDONS.is_dir():
        addon("models.folders", f"pretrained_model {name!r}").check_folder(folder, name)
    if (folder / ADAPTER).is_file():
        adapters = addon("models.adapters", f"the adapter in {name}")
        return ModelFiles(folder, "", True, adapters.find_base(folder, name))
    if not (folder / "config.json").is_file():
        raise Trouble(EXIT_MODEL, f"{name} holds no config.json: not a model folder")
    if not any((folder / file).is_file() for file in SAFETENSORS):
        raise Trouble(EXIT_MODEL, f"{name} holds no model.safetensors: local folders must (a pickle can run code)")
    return ModelFiles(folder, "", True)


def is_open_clip(files: set[str], name: str, folder: pathlib.Path | None) -> bool:
    """Whether a model with these files, whose config.json lies in `folder`, if it can be had, is read in open_clip's format."""
    return OPEN_CLIP_CONFIG in files and ADDONS.is_dir() and addon("models.open_clip_files", name).is_meant(files, name, folder)


def find_on_hub(name: str, revision: str, safetensors_only: bool) -> ModelFiles:
    """Download what is missing of the model at one commit. Where the Hub cannot be asked (no network, HF_HUB_OFFLINE), its
    local cache answers. Raises Trouble (exit 6) that says what was tried."""
    import huggingface_hub.utils
    repository = name.removeprefix("hf-hub:")
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    listed, tried = _list_hub_files(repository, revision)
    folders = addon("models.folders", f"pretrained_model {name!r}") if listed and ADDONS.is_dir() else None
    config_folder = folders.fetch_config(repository, revision, listed) if folders else None
    is_listed_open_clip = is_open_clip(listed, name, config_folder)
    if folders and not is_listed_open_clip:
        folders.check_listed(listed, name, config_folder)
    prefix = "open_clip_" if is_listed_open_clip else ""
    has_safetensors = not listed.isdisjoint(prefix + file for file in SAFETENSORS)
    patterns = ["*.json", "*.txt", "*.model"]
    if listed:  # offline the client holds the cache against the whole list: no pattern for what was never asked for
        patterns.append(prefix + ("model*.safetensors" if has_safetensors or safetensors_only else "pytorch_model*.bin"))
        patterns += ["adapter_model*.safetensors"] * (ADAPTER in listed)
    try:
        folder = pathlib.Path(huggingface_hub.snapshot_download(  # by branch or tag, or the cache would not know it offline
            repository, revision=revision, allow_patterns=patterns, local_files_only=not listed))
    except Exception as error:
        reason = error.__cause__ or error  # the client's own error says only that it is not in the cache either
        tried += f", the Hub ({type(reason).__name__}: {str(reason)[:120]})" if listed else ", the local cache (not there)"
        raise Trouble(EXIT_MODEL, f"cannot get {name} ({revision}): {tried}; {BUNDLED_HINT}") from None
    files = {path.name for path in folder.iterdir() if path.exists()}
    open_clip = is_open_clip(files, name, folder)
    prefix = "open_clip_" if open_clip else ""
    safetensors = not files.isdisjoint(prefix + file for file in SAFETENSORS)
    commit = folder.resolve().name
    base: ModelFiles | None = None
    if ADAPTER in files and not open_clip:
        base = addon("models.adapters", f"the adapter in {name}").find_base(folder, name, safetensors_only)
    if base is None and not safetensors and safetensors_only:
        raise Trouble(EXIT_MODEL, f"{name} has no safetensors at revision {revision}, and safetensors_only is set; "
                                  f"{BUNDLED_HINT}")
    if base is None and not safetensors and files.isdisjoint(prefix + file for file in PICKLES):
        raise Trouble(EXIT_MODEL, f"{name} ({revision}) has no weights this program reads: {tried}; {BUNDLED_HINT}")
    if ADDONS.is_dir() and not open_clip:
        addon("models.folders", f"pretrained_model {name!r}").check_folder(folder, name)
    return ModelFiles(folder, commit, safetensors, base, open_clip)


def _list_hub_files(name: str, revision: str) -> tuple[set[str], str]:
    """The names of the revision's files, none if the Hub cannot say; and what was tried, in words."""
    import huggingface_hub
    tried = f"tried the folder {name!r} (none here)"
    try:
        info = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=15)
        return {sibling.rfilename for sibling in info.siblings or ()}, tried
    except Exception as error:  # the client raises its own, its HTTP library's and the system's errors
        is_offline = huggingface_hub.constants.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE is set" if is_offline else f"{type(error).__name__}: {str(error)[:120]}"
        return set(), f"{tried}, the Hub ({reason})"


def choose_device(config: Config) -> str:
    """'cuda' where there is one and it is asked for; warns where it is asked for and missing."""
    import torch
    if config.use_cuda and torch.cuda.is_available():
        return "cuda"
    if config.use_cuda:
        say("warning: use_cuda is true, but torch sees no CUDA device; running on the CPU")
    return "cpu"


def choose_dtype(config: Config, device: str) -> str:
    """The dtype that `auto` means: bfloat16 on a GPU that has it, float16 on an older one, float32 on the CPU."""
    import torch
    if config.dtype != "auto":
        return config.dtype
    if device == "cpu":
        return "float32"
    return "bfloat16" if torch.cuda.get_device_capability()[0] >= 8 else "float16"


# ── Model: families ───────────────────────────────────────────────────────────────────────────────────────────────────

class FolderPlaces(NamedTuple):
    """The folders that weights, tokenizer and image processor are read from: one and the same, but for adapters."""

    weights: pathlib.Path
    tokenizer: pathlib.Path
    images: pathlib.Path


class Family:
    """A loaded model with its tokenizer and image processor, and what is particular to its kind.

    Clip and Siglip are here; another kind is a subclass in addons/models, in a file named after its model type. `model` is in
    evaluation mode; `scale` and, where there is one, `bias` turn a cosine into the model's own logit.
    """

    kind: ClassVar[str]  # config.json's model_type
    architecture: ClassVar[str]  # its class in transformers
    attention: ClassVar[str | None] = "sdpa"  # the implementation of attention that is asked for; None: transformers chooses
    takes_any_size: ClassVar[bool] = False  # whether images may have another size than its config says, as convolutions allow
    folders: FolderPlaces | None = None  # where it was read from

    def __init__(self, model: Any, tokenizer: Any, processor: Any, name: str) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.processor = processor
        self.name = name
        # read before the model is cast: bfloat16 makes 115.58 of SigLIP's 117.35
        self.scale = self.read_scale()
        self.bias: float | None = None  # of a model that was trained with SigLIP's loss
        self.context_length = self.read_context_length()
        self._whole_words: Any = None
        self._whole_words = self._find_whole_words()
        self._frame = self.encode([""])[0]  # the ids that go around every caption
        space = self.tokenizer.convert_tokens_to_ids("▁")
        self._says_nothing = {*self._frame, self.tokenizer.unk_token_id, space}
        self.check_tokenizer()

    @classmethod
    def load(cls, files: ModelFiles, name: str) -> "Family":
        """Model (float32, on the CPU), tokenizer and Pillow image processor. Remote code never runs.

        Raises Trouble (exit 6) for files that do not make a whole model.
        """
        os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # transformers would ask an outside service to convert
        import torch
        import transformers
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        adapters = addon("models.adapters", f"the adapter in {name}") if files.has_adapter else None
        one_place = FolderPlaces(files.folder, files.folder, files.folder)
        bounds = addon("models.folders", "pretrained_model").bounded_by_weights(files, name) if ADDONS.is_dir() else None
        with (telling_of_model(name), bounds or contextlib.nullcontext(),
              adapters.open_places(files) if adapters else contextlib.nullcontext(one_place) as at):
            model, loading = getattr(transformers, cls.architecture).from_pretrained(
                at.weights, dtype=torch.float32, attn_implementation=cls.attention, output_loading_info=True,
                use_safetensors=(files.base or files).safetensors, ignore_mismatched_sizes=True)
            tokenizer = transformers.AutoTokenizer.from_pretrained(at.tokenizer, trust_remote_code=False)
            # explicit, because the default backend depends on what is installed, and the two differ slightly
            processor = transformers.AutoImageProcessor.from_pretrained(at.images, backend="pil", trust_remote_code=False)
        cls.check_weights(model, loading, name)
        if adapters:
            model = adapters.merge(model, files, name)
        family = cls(model.eval().requires_grad_(False), tokenizer, processor, name)
        family.folders = at
        family.check_sizes(at.images)
        return family

    def control_tokens(self) -> list[str]:
        """The tokens that mark where a text begins and ends, and the like: in a caption they are text."""
        names = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
        tokens = [getattr(self.tokenizer, name, None) for name in names]
        return [str(token) for token in tokens if token]

    def _find_whole_words(self, prepare: Callable[[str], str] = str) -> Any:
        """What keeps words whole that were added to the tokenizer; None where no word, once prepared, would be spelt."""
        control = self.control_tokens()
        words = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.content not in control]
        got = self.encode([prepare(word) for word in words]) if words else []
        if all(own in ids for own, ids in zip(self.tokenizer.convert_tokens_to_ids(words), got, strict=True)):
            return None
        keeper = addon("models.words", f"{self.name}, to whose tokenizer words were added,")
        return keeper.WholeWords(self.tokenizer, words, control)

    @staticmethod
    def check_weights(model: Any, loading: Json, name: str) -> None:
        """Raise Trouble (exit 6) where weights of `model` are missing or of another shape: what it has there is chance."""
        if loading["missing_keys"] or loading["mismatched_keys"]:
            more = addon("models.faults", "pretrained_model").tell_weights(loading) if ADDONS.is_dir() else ""
            raise Trouble(EXIT_MODEL, f"{name}: its weights and its config.json do not belong together{more}")
        unused = sorted(loading["unexpected_keys"])
        if unused:
            say(f"warning: {name} has {len(unused)} weights that its config.json has no place for, such as {unused[0]}: unused")

    def check_sizes(self, folder: pathlib.Path) -> None:
        """Raise Trouble (exit 6) for an image processor, read from `folder`, that makes other images than the model reads."""
        settings = ImageSettings.of(self.processor)
        made = settings.crop or settings.size  # (height, width); None where images keep their shapes
        side = getattr(getattr(self.model.config, "vision_config", None), "image_size", None)
        is_fixed = isinstance(side, int) and not self.takes_any_size
        if made is None or (is_fixed and made != (side, side)):
            more = addon("models.faults", "pretrained_model").tell_sizes(made, side, folder) if ADDONS.is_dir() else ""
            raise Trouble(EXIT_MODEL, f"{self.name}: its image processor makes other images than its model reads{more}")

    def read_scale(self) -> float:
        """What a cosine is multiplied by to give the model's logit."""
        return float(self.model.logit_scale.exp().item())

    def read_context_length(self) -> int:
        """How many tokens of a caption the model reads."""
        return int(self.model.config.text_config.max_position_embeddings)

    def check_tokenizer(self) -> None:
        """Raise Trouble (exit 6) for a tokenizer that is not the model's; marks that no caption holds need no embedding."""
        number_of = self.tokenizer.get_vocab()
        embedded = self.model.config.text_config.vocab_size
        marks = [*self.control_tokens(), *(token for token in number_of if "<extra_id_" in token)]  # the latter are mT5's
        never_given = {number_of.get(mark) for mark in marks}.difference(*self.encode(["Ab", *map(self.prepare, marks)]))
        # transformers makes one up where files are missing
        if max(set(number_of.values()) - never_given) >= embedded or len(number_of) < embedded / 2:
            raise Trouble(EXIT_MODEL, f"{self.name}: its tokenizer has {len(number_of)} tokens and its model {embedded}: they "
                                      "do not belong together")

    def image_settings(self) -> ImageSettings:
        """How images are resized and cropped for this model."""
        return ImageSettings.of(self.processor)

    def describe(self) -> Json:
        """What the manifest and profile.json say of this model besides."""
        return {}

    def encode(self, captions: list[str], **options: object) -> list[list[int]]:
        """Token ids of each caption, as the tokenizer gives them."""
        # split_special_tokens: a caption that contains <|endoftext|> would otherwise end there
        # trained words that were added as special tokens stay whole all the same
        call = self._whole_words or self.tokenizer
        return call(captions, split_special_tokens=True, return_attention_mask=False, verbose=False, **options)["input_ids"]

    def prepare(self, caption: str) -> str:
        """The caption as the model was trained to read it."""
        return caption

    def tokenize(self, captions: list[str]) -> tuple[list[list[int]], list[bool]]:
        """Token ids per caption, cut at the context length with end-of-text kept; and which captions were cut."""
        ids: list[list[int]] = []
        truncated: list[bool] = []
        for start in range(0, len(captions), TOKENIZED_AT_ONCE):
            heads = captions[start:start + TOKENIZED_AT_ONCE]
            if ADDONS.is_dir() and max(map(len, heads)) > LONG_CAPTION * self.context_length:
                heads = addon("models.long_captions", "caption_column").take_heads(self, heads)
            prepared = [self.prepare(head) for head in heads]
            stretch = self.encode(prepared, truncation=True, max_length=self.context_length)
            is_cut = [False] * len(stretch)
            full = [i for i, row in enumerate(stretch) if len(row) >= self.context_length]
            if full:
                for i, whole in zip(full, self.encode([prepared[i] for i in full]), strict=True):
                    is_cut[i] = len(whole) > self.context_length
            ids += stretch
            truncated += is_cut
        return ids, truncated

    def judge_caption(self, ids: list[int]) -> tuple[str, bool]:
        """Of a caption's ids: why the tokenizer knows nothing of it, empty where it does; and whether some is unknown to it."""
        unknown = self.tokenizer.unk_token_id
        has_unknown = ids.count(unknown) > self._frame.count(unknown)
        if not self._says_nothing.issuperset(ids):
            return "", has_unknown
        return ("the tokenizer knows nothing of it" if has_unknown else "the tokenizer leaves nothing of it"), has_unknown

    def padded_length(self, ids: list[int]) -> int:
        """The length that a caption must be padded to whatever its neighbours; 0 where the longest of its batch will do."""
        return self.context_length

    def stack(self, images: "list[np.ndarray]") -> "np.ndarray":
        """Loaders' arrays of bytes (3, H, W) as the one (n, 3, H, W) that `features_of_bytes` reads."""
        import numpy as np
        return np.stack(images)

    def features_of_bytes(self, model: Any, pixels: "torch.Tensor", levels: "torch.Tensor") -> "torch.Tensor":
        """(n, 3, H, W) bytes -> (n, d) projected features; `levels` (3, 256) float32 is what each byte of a channel becomes."""
        import torch
        channel = torch.arange(3, device=levels.device).view(1, 3, 1, 1)
        values = levels[channel, pixels.to(levels.device, non_blocking=True).long()]  # (n, 3, H, W)
        return self.image_features(model, values.to(model.dtype))

    def image_features(self, model: Any, pixel_values: "torch.Tensor") -> "torch.Tensor":
        """(n, 3, H, W) normalised pixels -> (n, d) projected features; `model` is self.model or a copy in another dtype."""
        return model.get_image_features(pixel_values=pixel_values).pooler_output  # transformers 5 calls the projected ones so

    def text_features(self, model: Any, ids: "torch.Tensor") -> "torch.Tensor":
        """(n, length) token ids -> (n, d) projected features."""
        return model.get_text_features(input_ids=ids).pooler_output

    def probabilities(self, cosines: "np.ndarray") -> "np.ndarray | None":
        """The model's own chance that a pair belongs together, float32 (n,): sigmoid(scale * cosine + bias), Zhai et al. 2023,
        algorithm 1. None for a model without a bias, which gives none."""
        if self.bias is None:
            return None
        import numpy as np
        with np.errstate(over="ignore"):
            logits = np.asarray(cosines, np.float64) * self.scale + self.bias
            return (1 / (1 + np.exp(-logits))).astype(np.float32)


TOKENIZED_AT_ONCE = 256  # captions: the tokens of a text take a hundred times as much memory
LONG_CAPTION = 16  # characters for each token that the model reads, from which on a caption may be cut short before


class Clip(Family):
    """CLIP. Its text tower is causal and pooled at end-of-text, so nothing behind that counts."""

    kind = "clip"
    architecture = "CLIPModel"

    def check_tokenizer(self) -> None:
        """Refuse also a tokenizer whose end-of-text the model would not pool at."""
        super().check_tokenizer()
        eos = self.model.config.text_config.eos_token_id
        is_legacy = eos == 2  # transformers then pools at the largest id, as OpenAI's published configs need
        expected = max(self.tokenizer.get_vocab().values()) if is_legacy else eos
        last = self.encode(["Ab"])[0][-1]
        if last != expected:
            raise Trouble(EXIT_MODEL, f"{self.name}: its config pools captions at id {expected}, but its tokenizer ends them "
                                      f"with id {last}")

    def padded_length(self, ids: list[int]) -> int:
        """The longest caption of the batch will do."""
        return 0


class Siglip(Family):
    """SigLIP, and SigLIP 2 of a fixed size. Trained on the full length without a mask, and on lower case."""

    kind = "siglip"
    architecture = "SiglipModel"
    _keeps_capitals = False  # SigLIP 2's published tokenizer does, and leaves the lower case to its user

    def __init__(self, model: Any, tokenizer: Any, processor: Any, name: str) -> None:
        super().__init__(model, tokenizer, processor, name)
        self.bias = self.model.logit_bias.item()
        self._keeps_capitals = self.encode(["Ab"]) != self.encode(["ab"])
        if self._keeps_capitals and not self._whole_words:
            self._whole_words = self._find_whole_words(str.lower)

    def prepare(self, caption: str) -> str:
        """Lower case, where the tokenizer does not see to it; words that were added to the tokenizer keep theirs."""
        if not self._keeps_capitals:
            return caption
        return str(self._whole_words.lower(caption)) if self._whole_words else caption.lower()


FAMILIES: dict[str, type[Family]] = {"clip": Clip, "siglip": Siglip}


@contextlib.contextmanager
def telling_of_model(name: str) -> Iterator[None]:
    """Turn what libraries raise over the files of a broken model, which is nearly anything, into one line and exit 6."""
    try:
        yield
    except Trouble:
        raise
    except Exception as error:
        reason = f": {addon('models.faults', 'pretrained_model').reason_of(error)}" if ADDONS.is_dir() else ""
        raise Trouble(EXIT_MODEL, f"cannot load {name}: {type(error).__name__}{reason}") from error


def find_family(files: ModelFiles, name: str) -> type[Family]:
    """The family that the model's config.json names: one of FAMILIES, or a file of addons/models; Trouble (exit 6) if none."""
    if files.open_clip:
        return addon("models.open_clip", f"pretrained_model {name!r}").FAMILY
    kind = (read_json((files.base or files).folder / "config.json") or {}).get("model_type")
    if kind is None:
        raise Trouble(EXIT_MODEL, f"{name}: its config.json names no model_type, so it is no model of transformers")
    if kind in FAMILIES:
        return FAMILIES[kind]
    file = str(kind).replace("-", "_")
    if file in room_names("models"):
        family: type[Family] | None = getattr(addon(f"models.{file}", f"pretrained_model {name!r}"), "FAMILY", None)
        if family:
            return family
    raise Trouble(EXIT_MODEL, f"{name} is a {kind!r} model; this program scores with CLIP and SigLIP models")


def align_weights(model: "torch.nn.Module") -> "torch.nn.Module":
    """Copy the weights whose place in a mapped file is not aligned as torch's own memory is: another alignment chooses
    other CPU kernels, and the same weights score an ulp apart."""
    import torch

    def copy_weight(weight: "torch.Tensor") -> None:
        if weight.data_ptr() % 64 or not weight.is_contiguous():
            weight.data = weight.data.clone(memory_format=torch.contiguous_format)
    with ThreadPoolExecutor(usable_cores()) as pool:  # it reads the file, half of what a start takes
        list(pool.map(copy_weight, [*model.parameters(), *model.buffers()]))
    return model


# ── Model: score ──────────────────────────────────────────────────────────────────────────────────────────────────────

DEFAULT_BATCH = {"cpu": 16, "cuda": 256}  # of one core: larger ones are no faster, and leave a core idle at a partition's end

Encoded = tuple["torch.Tensor", dict[str, float]]  # embeddings (n, d), and the seconds they took


@contextlib.contextmanager
def collecting_no_garbage() -> Iterator[None]:
    """While libraries are imported: Python would look for garbage a thousand times, and find none among a million objects."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Scorer:
    """A loaded model that turns images and captions into embeddings and cosines.

    `Scorer(load_config(path)).similarity(images, captions)` is all most callers need.
    """

    @collecting_no_garbage()
    @profile
    def __init__(self, config: Config) -> None:
        import torch
        self.config = config
        self.oom_halvings = 0
        self.device = choose_device(config)
        self.dtype = choose_dtype(config, self.device)
        self.batch_size = DEFAULT_BATCH[self.device] if config.batch_size == "auto" else config.batch_size
        with telling_of_model(config.pretrained_model):
            self.files = find_model(config)
            hashing = ThreadPoolExecutor(1)  # while the model is loaded: the manifest needs it, and OpenVINO before that
            hashing.submit(getattr, self.files, "digests")
            hashing.shutdown(wait=False)
            self.family = find_family(self.files, config.pretrained_model).load(self.files, config.pretrained_model)
            self.settings = self.family.image_settings()
            levels = self._normalised_levels()
        self.decoding = self.settings  # what images are decoded for
        self.pixel_levels = torch.from_numpy(levels).to(self.device)  # (3, 256) float32
        self.keeps_norms = False  # True where a measure needs the lengths that image embeddings had (addons/measures/heads.py)
        self.gpu_decoder: Any = None  # addons/images/gpu_decode.py, with decode: gpu
        cores = usable_cores() if self.device == "cpu" else 1
        self.lanes = 0 if PROFILED else cores
        self.quantization = "none"
        self._compiled: types.ModuleType | None = None
        self.encoders: Family | Encoders = self._open_encoders()
        with telling_of_model(config.pretrained_model):
            self._try_model()

    def _open_encoders(self) -> "Family | Encoders":
        """What computes features: the family with its model in torch, or another runtime that offers the same."""
        import torch
        config = self.config
        if config.runtime == "openvino" or (config.runtime == "auto" and config.quantization != "none"):
            key = "runtime" if config.runtime == "openvino" else "quantization"
            encoders: Encoders | None = addon("models.openvino_runtime", key).open_runtime(self)
            if encoders:
                self.quantization = encoders.quantization
                return encoders
        model = self.family.model
        if config.quantization != "none":
            self.quantization = addon("models.quantize", "quantization").quantize_model(model, self.device)
        align_weights(model.to(self.device, getattr(torch, self.dtype)))
        if config.compile:
            self._compiled = addon("models.compiled", "compile")
            self._compiled.compile_encoders(model)
        return self.family

    @functools.cached_property
    def _lane_pool(self) -> ThreadPoolExecutor:
        """On the CPU a lane for each core, with one thread for its arithmetic: no core waits for another at the end of each
        layer, and no score depends on how many there are. On a GPU one lane, so that the main thread need not wait."""
        return ThreadPoolExecutor(self.lanes, "lane", compute_in_one_thread if self.device == "cpu" else None)

    def submit(self, stage: str, encode: "Callable[[Item], torch.Tensor]", batch: Item) -> "Future[Encoded]":
        """Have a lane compute `encode(batch)`; the future gives the embeddings and the seconds they took in `stage`."""
        def encode_timed() -> Encoded:
            clock = Clock()
            computes_here = self.device == "cpu" and self.encoders is self.family
            with clock.stage(stage, time.thread_time if computes_here else time.perf_counter):
                embeddings = encode(batch)
            return embeddings, clock.seconds
        if self.lanes:
            return self._lane_pool.submit(encode_timed)
        future: Future[Encoded] = Future()
        future.set_result(encode_timed())
        return future

    def identity(self) -> Json:
        """What decides the scores and only the loaded model can tell; kept in the manifest."""
        return {"model_type": self.family.kind, "weights": self.files.identity, "files": self.files.digests,
                "adapter": self.files.has_adapter, "safetensors": (self.files.base or self.files).safetensors,
                "device": self.device, "dtype": self.dtype, "quantization": self.quantization,
                "decoder": "gpu" if self.gpu_decoder else "pillow", "batch_size": self.batch_size, **self.family.describe(),
                **({} if isinstance(self.encoders, Family) else self.encoders.identity()),
                "libraries": find_versions((*DECISIVE_LIBRARIES, *["peft"] * self.files.has_adapter))}

    def _normalised_levels(self) -> "np.ndarray":
        """(3, 256) float32: what the model's own processor makes of each byte value in each channel."""
        import numpy as np
        ramp = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
        out = self.family.processor(ramp, do_resize=False, do_center_crop=False, do_convert_rgb=False,
                                    input_data_format="channels_first")
        levels = np.ascontiguousarray(np.asarray(out["pixel_values"][0], dtype=np.float32)[:, 0])
        if not np.isfinite(levels).all() or not (np.diff(levels) > 0).all():
            raise Trouble(EXIT_MODEL, f"{self.family.name}: its image processor does not make lighter pixels larger numbers: "
                                      "its image_mean, image_std or rescale_factor is not the model's")
        return levels

    def _try_model(self) -> None:
        """Encode an image and captions, so that settings at which a library stumbles are not met in the first row."""
        import torch
        from PIL import Image
        if ADDONS.is_dir():
            addon("models.folders", "preprocess").check_preparing(self)
        pixels = self.family.stack([self.resize(Image.new("RGB", (40, 30)))])
        ids = self.tokenize(["a", "a photo " * self.family.context_length])[0]
        if self.encoders is not self.family:
            return  # another runtime computes with what it tried before it was kept
        images = self._embed(self._features_of_bytes, torch.from_numpy(pixels))  # (1, d)
        texts = self._embed(self._features_of_ids, self._pad(ids, max(map(self._padded_length, ids))))  # (2, d)
        if images.shape[1] != texts.shape[1]:
            raise Trouble(EXIT_MODEL, f"{self.family.name}: images become {images.shape[1]} numbers in it, and captions "
                                      f"{texts.shape[1]}: its config.json belongs to another model")

    def resize(self, image: "Image.Image") -> "np.ndarray":
        """RGB image -> (3, H, W) uint8, the fast or the exact way (`preprocess`)."""
        if self.config.preprocess == "fast" and self.settings.knows_fast_resize():
            return resize_fast(image, self.settings)
        import numpy as np
        image = trim_strip(image, self.settings)
        pixels = self.family.processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0]
        return np.asarray(pixels, dtype=np.uint8)

    def tokenize(self, captions: list[str]) -> tuple[list[list[int]], list[bool]]:
        """Token ids per caption, cut at the context length with end-of-text kept; and which captions were cut."""
        return self.family.tokenize(captions)

    @profile
    def encode_images(self, pixels: "torch.Tensor | Future[torch.Tensor]") -> "torch.Tensor":
        """uint8 tensor (n, 3, H, W), or a future of one -> unit embeddings (n, d), float32, on the CPU; or see `to_unit`."""
        batch = pixels.result() if isinstance(pixels, Future) else pixels
        return self._embed(self._features_of_bytes, batch, self.keeps_norms)

    @profile
    def encode_texts(self, ids: list[list[int]], clock: Clock | None = None) -> "torch.Tensor":
        """Token ids -> unit embeddings (n, d), float32, on the CPU; batches of like length, order kept."""
        import torch
        if not ids:
            return torch.empty(0, 0)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        flying = []
        for own_length, alike in itertools.groupby(order, lambda i: self._padded_length(ids[i])):
            group = list(alike)
            for start in range(0, len(group), self.batch_size):
                batch = self._pad([ids[i] for i in group[start:start + self.batch_size]], own_length)
                flying.append(self.submit("text_encoder", functools.partial(self._embed, self._features_of_ids), batch))
        embeddings = torch.cat([collect(future, clock or Clock()) for future in flying])
        return embeddings[torch.argsort(torch.tensor(order))]

    def _features_of_bytes(self, model: Any, pixels: "torch.Tensor") -> "torch.Tensor":
        return self.encoders.features_of_bytes(model, pixels, self.pixel_levels)

    def _features_of_ids(self, model: Any, ids: "torch.Tensor") -> "torch.Tensor":
        return self.encoders.text_features(model, ids.to(self.device))

    def _pad(self, rows: list[list[int]], length: int) -> "torch.Tensor":
        """Token ids as one tensor (n, length); length 0: that of the longest."""
        import torch
        width = length or max(map(len, rows))
        pad = self.family.tokenizer.pad_token_id
        return torch.tensor([row + [pad] * (width - len(row)) for row in rows])

    def _padded_length(self, ids: list[int]) -> int:
        """The length that a caption must be padded to whatever its neighbours, or 0 where the longest of its batch will do.

        What lies behind end-of-text counts in the scale of int8 values, which is the whole caption's.
        """
        own_length = self.family.padded_length(ids)
        if own_length:
            return own_length
        most = self.family.context_length
        if self._compiled:
            return int(self._compiled.few_lengths(len(ids), most))
        by_eights = self.quantization != "none" or self.encoders is not self.family
        return min(most, -(-len(ids) // 8) * 8) if by_eights else 0

    def stack(self, batch: list[Any]) -> "torch.Tensor | Future[torch.Tensor]":
        """Loaders' arrays (3, H, W) as one uint8 tensor (n, 3, H, W) that `encode_images` takes, or a future of it."""
        import torch
        if self.gpu_decoder:
            return self.gpu_decoder.start(batch)
        pixels = torch.from_numpy(self.family.stack(batch))
        return pixels.pin_memory() if self.device == "cuda" else pixels  # pinned, so that the upload need not wait

    def _embed(self, forward: "Callable[[Any, torch.Tensor], torch.Tensor]", batch: "torch.Tensor",
               with_norms: bool = False) -> "torch.Tensor":
        """Run `forward(model, batch)`, halving the batch when the GPU is full; normalise in fp32; redo what is not finite."""
        import torch
        unit = None
        try:
            whole = self._compiled.pad_batch(batch, self.batch_size) if self._compiled else batch
            with torch.inference_mode():
                features = forward(self.family.model, whole).float()
                unit = to_unit(features[:len(batch)], with_norms).cpu()
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise Trouble(EXIT_MODEL, f"the GPU has no room for {self.config.pretrained_model} and a single row: take a "
                                          "smaller model, dtype: float16, or use_cuda: false") from None
        if unit is None:  # not in the handler: the error's traceback holds on to what was computed before there was no room
            torch.cuda.empty_cache()
            self._compiled = None  # no padding to a size that does not fit
            self.oom_halvings += 1
            half = len(batch) // 2
            return torch.cat([self._embed(forward, part, with_norms) for part in (batch[:half], batch[half:])])
        broken = ~torch.isfinite(unit).all(dim=-1)
        if broken.any() and not self.is_plain_float32():
            with torch.inference_mode():
                unit[broken] = to_unit(forward(self._float32_model, batch[broken]), with_norms).cpu()
        return unit

    def is_plain_float32(self) -> bool:
        """Whether the model's weights and arithmetic are those of the files, in float32."""
        return self.dtype == "float32" and self.quantization == "none" and self.encoders is self.family

    def load_plain(self) -> "torch.nn.Module":
        """The model once more, in float32 on the CPU; Trouble (exit 6) where its files have changed since it was loaded."""
        if dataclasses.replace(self.files).digests != self.files.digests:
            raise Trouble(EXIT_MODEL, f"{self.config.pretrained_model}: files of the model have changed since the run began")
        return align_weights(type(self.family).load(self.files, self.config.pretrained_model).model)

    @functools.cached_property
    def _float32_model(self) -> "torch.nn.Module":
        """The model in float32, loaded when half precision first overflows."""
        return self.load_plain().to(self.device)

    def own_embeddings(self, images: "EmbeddedImages") -> "torch.Tensor | None":
        """The embeddings (m, d) of this model; several in one pass have theirs side by side (addons/models/several.py)."""
        return images.embeddings

    def cosines(self, image_embeddings: "torch.Tensor", text_embeddings: "torch.Tensor") -> "np.ndarray":
        """Row-wise dot products of unit embeddings (n, d) -> float32 numpy (n,), clipped to [-1, 1] (rounding)."""
        return (image_embeddings * text_embeddings).sum(-1).clamp(-1, 1).numpy()

    def similarity(self, images: "Iterable[Image.Image | str | os.PathLike[str]]", captions: Iterable[str]) -> "np.ndarray":
        """Cosines (n,) float32 of n PIL images or paths with n captions. Raises RowFailure for an image it cannot read."""
        import numpy as np
        texts = [self.config.caption_template.replace("{}", clean_caption(caption, self.config)) for caption in captions]
        given = list(images)
        if len(given) != len(texts):
            raise ValueError(f"{len(given)} images but {len(texts)} captions")
        decode = ImageDecoder(self.config, self.settings)
        encoder = ImageEncoder(self, Clock())
        for image in given:
            if isinstance(image, (str, os.PathLike)):
                rgb = decode(pathlib.Path(image).read_bytes())
            else:
                rgb = trim_strip(to_rgb(image, self.config), self.settings)
            encoder.add(self.resize(rgb))
        embeddings = encoder.finish()
        if embeddings is None:
            return np.empty(0, np.float32)
        return self.cosines(embeddings, self.encode_texts(self.tokenize(texts)[0]))


def load_scorer(config: Config) -> Scorer:
    """The scorer of one model, or of several in one pass."""
    if "further_models" not in (config.measures or {}):
        return Scorer(config)
    return addon("models.several", "pretrained_model").SeveralScorer(config)


def to_unit(features: "torch.Tensor", with_norms: bool) -> "torch.Tensor":
    """Features (n, d) -> unit vectors (n, d); `with_norms` their lengths as one column more, (n, d + 1)."""
    import torch
    unit = torch.nn.functional.normalize(features, dim=-1)
    return torch.cat([unit, features.norm(dim=-1, keepdim=True)], dim=-1) if with_norms else unit


class ImageEncoder:
    """Gathers images into batches, keeps as many under way as there are lanes, and gives their embeddings in order.

    No scorer: a dry run, which takes none.
    """

    def __init__(self, scorer: Scorer | None, clock: Clock) -> None:
        self._scorer = scorer
        self._clock = clock
        self._batch: list[Any] = []
        self._flying: collections.deque[Future[Encoded]] = collections.deque()
        self._parts: list[torch.Tensor] = []
        self.norms: torch.Tensor | None = None  # (m,) the lengths of the embeddings, after `finish` and where they are kept

    @property
    def held_images(self) -> int:
        """How many images wait until their batch is full."""
        return len(self._batch)

    def add(self, pixels: Any) -> bool:
        """Add a loader's (3, H, W) array; a full batch is given to the model, and True returned."""
        if self._scorer is None:
            return False
        self._batch.append(pixels)
        is_full = len(self._batch) == self._scorer.batch_size
        if is_full:
            self.flush()
            self._collect(self._scorer.lanes)
        return is_full

    def flush(self) -> None:
        """Give the model what there is of a batch."""
        scorer = self._scorer
        if scorer and self._batch:
            self._flying.append(scorer.submit("image_encoder", scorer.encode_images, scorer.stack(self._batch)))
            self._batch = []

    def collect_batch(self) -> None:
        """Wait for the oldest batch under way, if there is one."""
        self._collect(max(0, len(self._flying) - 1))

    def finish(self) -> "torch.Tensor | None":
        """The embeddings (m, d) of all images that were added; None without any."""
        self.flush()
        self._collect(0)
        if not self._parts:
            return None
        import torch
        embeddings = torch.cat(self._parts)
        if self._scorer and self._scorer.keeps_norms:
            self.norms = embeddings[:, -1]
            embeddings = embeddings[:, :-1].contiguous()
        return embeddings

    def _collect(self, most_in_flight: int) -> None:
        while len(self._flying) > most_in_flight:
            self._parts.append(collect(self._flying.popleft(), self._clock))


def collect(future: "Future[Encoded]", clock: Clock) -> "torch.Tensor":
    """The embeddings that a lane computed, its seconds added to `clock`; waits, but not through an interruption."""
    with clock.stage("wait_for_model"):
        wait_for(future)
    embeddings, seconds = future.result()
    clock.add(seconds)
    return embeddings


# ── One partition ─────────────────────────────────────────────────────────────────────────────────────────────────────

@dataclasses.dataclass
class PartitionRun:
    """One partition on its way: the rows to score and, for each, where its image is and what the model reads of it.

    The index of `rows` are their places in the partition: all of them, or with --retry-failed those that failed for a
    passing reason; `finish` makes the whole part's table of theirs, and `earlier` is the part that it replaces.
    """

    partition: Partition
    rows: "pd.DataFrame"
    sources: list[str]  # a URL, a path, or a place in a tar
    captions: list[str]  # with the template around them
    texts: list[str]  # without it
    has_caption: list[bool]
    finish: "Callable[[pa.Table], pa.Table]"
    replaced: "Part | None" = None

    @property
    def earlier(self) -> Json:
        """The metadata of the part that --retry-failed replaces; {} otherwise."""
        return self.replaced.metadata if self.replaced else {}

    @classmethod
    def open(cls, plan: Plan, partition: Partition, retry: bool) -> "PartitionRun":
        """Read the partition's rows; with `retry` those alone that failed for a passing reason."""
        config = plan.config
        try:
            rows = plan.table.read(partition.start, partition.stop)
        except Trouble:
            plan.check_still_there()  # the table may be another run's by now, which is the better reason
            raise
        finish: Callable[[pa.Table], pa.Table] = lambda table: table  # noqa: E731
        part: Part | None = None
        if retry:
            rows, finish, part = addon("results.retry", "--retry-failed").choose_rows(plan, partition, rows, finish)
        if plan.table.brings_images:
            all_sources = typing.cast("RowsWithImages", plan.table).sources(partition.start, partition.stop)
            sources = [all_sources[place] for place in rows.index]
        else:
            sources = rows[column_name(config.url_column)].tolist()
        texts = [clean_caption(text, config) for text in rows[column_name(config.caption_column)]]
        captions = [config.caption_template.replace("{}", text) for text in texts]
        return cls(partition, rows, sources, captions, texts, [bool(text.strip()) for text in texts], finish, part)

    def wanted(self) -> list[str]:
        """The distinct sources to load, in order of first use; rows without a caption need none."""
        return list(dict.fromkeys(itertools.compress(self.sources, self.has_caption)))


def clean_caption(caption: str, config: Config) -> str:
    """The caption as `caption_clean` has it: `unescape` undoes HTML's entities, twice, as the tokenizers of OpenAI do."""
    return caption if config.caption_clean == "none" else html.unescape(html.unescape(caption))


@dataclasses.dataclass
class EmbeddedImages:
    """Each source's place among the embeddings (m, d), or why it has none."""

    place_of: dict[str, int] = dataclasses.field(default_factory=dict)
    place_of_digest: dict[bytes, int] = dataclasses.field(default_factory=dict)  # those of files with equal bytes are one
    failure_of: dict[str, RowFailure] = dataclasses.field(default_factory=dict)
    remark_of: dict[str, Remark] = dataclasses.field(default_factory=dict)  # of those of which there is something to say
    embeddings: "torch.Tensor | None" = None
    norms: "torch.Tensor | None" = None  # (m,) their lengths before, where a measure asks for them


@dataclasses.dataclass
class Scored:
    """What came out of a partition's n rows: cosines (NaN for none), statuses, and the embeddings they were made of."""

    cosines: "np.ndarray"  # (n,) float32
    truncated: list[bool]
    status: list[str]
    detail: list[str]
    partly_unknown: list[bool]  # a token or more of the caption is unknown to the tokenizer
    image_of_row: "np.ndarray"  # (n,) int32, the row of image_embeddings; -1 for none
    text_of_row: "np.ndarray"  # (n,) int32, the row of text_embeddings; -1 for none
    image_embeddings: "torch.Tensor | None" = None  # (m, d) unit vectors, one for each distinct image
    text_embeddings: "torch.Tensor | None" = None  # (k, d) unit vectors, one for each distinct caption
    images: EmbeddedImages = dataclasses.field(default_factory=EmbeddedImages)  # all, also those of rows without a score

    @classmethod
    def nothing(cls, count: int, status: str) -> "Scored":
        """`count` rows of one status and without a score."""
        import numpy as np
        nowhere = np.full(count, -1, np.int32)
        return cls(np.full(count, np.nan, np.float32), [False] * count, [status] * count, [""] * count, [False] * count,
                   nowhere, nowhere.copy())


class ImageGatherer:
    """Takes the loaded images of one partition, in any order, and has `encoder` encode each once; files with equal bytes are
    one image."""

    def __init__(self, scorer: Scorer | None, clock: Clock) -> None:
        self.encoder = ImageEncoder(scorer, clock)
        self._images = EmbeddedImages()
        self._on_gpu: dict[int, Any] = {}  # place -> OnGpu, which learns whether it can be decoded when its batch is

    def add(self, source: str, loaded: Loaded) -> bool:
        """Add what was loaded of `source`; True when a batch has been given to the model."""
        if loaded.failure:
            self._images.failure_of[source] = loaded.failure
            return False
        is_new = loaded.digest not in self._images.place_of_digest
        place = self._images.place_of_digest.setdefault(loaded.digest, len(self._images.place_of_digest))
        self._images.place_of[source] = place
        if loaded.remark != NO_REMARK:
            self._images.remark_of[source] = loaded.remark
        if not is_new:
            return False
        if loaded.is_on_gpu:
            self._on_gpu[place] = loaded.pixels
        return self.encoder.add(loaded.pixels)

    def finish(self) -> EmbeddedImages:
        """All images, when the last has been added."""
        images = self._images
        images.embeddings = self.encoder.finish()
        images.norms = self.encoder.norms
        for source, place in images.place_of.items():
            if place in self._on_gpu and self._on_gpu[place].failure:
                images.failure_of[source] = self._on_gpu[place].failure
        return images


class ImagePool(LoaderPool[Loaded]):
    """Loads the images of a run in order, one partition ahead. What may come late has a pool of its own (addons/images)."""

    def embed_partitions(self, runs: Iterator[PartitionRun], load: ImageLoader, scorer: Scorer | None, clock: Clock,
                         on_loaded: Callable[[], None]) -> Iterator[tuple[PartitionRun, EmbeddedImages]]:
        """Load and encode the images of each partition; the next one is begun before, so that the loaders never wait."""
        ahead: PartitionRun | None = None
        for run in runs:
            self.add(load, run.wanted())
            if ahead:
                yield ahead, self._embed_next(ahead, scorer, clock, on_loaded)
            ahead = run
        if ahead:
            yield ahead, self._embed_next(ahead, scorer, clock, on_loaded)

    def _embed_next(self, run: PartitionRun, scorer: Scorer | None, clock: Clock,
                    on_loaded: Callable[[], None]) -> EmbeddedImages:
        gatherer = ImageGatherer(scorer, clock)
        for source in run.wanted():
            with clock.stage("wait_for_images"):
                loaded = self.take()
            clock.add(loaded.seconds)
            gatherer.add(source, loaded)
            on_loaded()
            INTERRUPTION.check()
        return gatherer.finish()


def score_partition(scorer: Scorer | None, run: PartitionRun, images: EmbeddedImages, clock: Clock) -> Scored:
    """Score the partition's rows: every row ends as a score or as a reason. No scorer: a dry run."""
    result = Scored.nothing(len(run.rows), "ok")
    result.images = images
    scored: list[int] = []
    for i, source in enumerate(run.sources):
        failure = images.failure_of.get(source) if run.has_caption[i] else RowFailure("empty_caption", "")
        if failure:
            result.status[i] = failure.status
            result.detail[i] = failure.detail
        else:
            result.detail[i] = images.remark_of.get(source, NO_REMARK).detail
            scored.append(i)
    if scorer and scored:
        _score_rows(scorer, run, images, scored, result, clock)
    return result


def _score_rows(scorer: Scorer, run: PartitionRun, images: EmbeddedImages, scored: list[int], result: Scored,
                clock: Clock) -> None:
    """Encode the captions of the rows at the places `scored`, and fill in their cosines."""
    import numpy as np
    with clock.stage("tokenize"):
        texts = list(dict.fromkeys(run.captions[i] for i in scored))
        tokens = dict(zip(texts, zip(*scorer.tokenize(texts), strict=True), strict=True))  # caption -> its ids, whether cut
        scored = _without_unknown(scorer, run, scored, result, tokens)
        texts = list(dict.fromkeys(run.captions[i] for i in scored))
        ids = [tokens[text][0] for text in texts]
        cut = [tokens[text][1] for text in texts]
    if not scored:
        return
    result.image_embeddings = scorer.own_embeddings(images)
    result.text_embeddings = scorer.encode_texts(ids, clock)
    with clock.stage("score"):
        place_of_text = {text: place for place, text in enumerate(texts)}
        image_places = [images.place_of[run.sources[i]] for i in scored]
        text_places = [place_of_text[run.captions[i]] for i in scored]
        assert result.image_embeddings is not None
        cosines = scorer.cosines(result.image_embeddings[image_places], result.text_embeddings[text_places])
        result.cosines[scored] = cosines
        for i, place, cosine in zip(scored, text_places, cosines, strict=True):
            result.truncated[i] = cut[place]
            if not np.isfinite(cosine):
                result.status[i] = "non_finite"
                result.detail[i] = "the model gave no finite embedding, in float32 neither"
        is_finite = np.isfinite(cosines)
        result.image_of_row[scored] = np.where(is_finite, image_places, -1)
        result.text_of_row[scored] = np.where(is_finite, text_places, -1)


def _without_unknown(scorer: Scorer, run: PartitionRun, scored: list[int], result: Scored,
                     tokens: dict[str, tuple[list[int], bool]]) -> list[int]:
    """The places of `scored` whose caption the tokenizer knows; the others become `empty_caption`.

    A caption is judged without the template around it, which the tokenizer knows. `tokens` has the ids of those with it.
    """
    bare = list(dict.fromkeys(run.texts[i] for i in scored))
    ids_of = {text: tokens[text][0] for text in bare if text in tokens}
    others = [text for text in bare if text not in tokens]
    ids_of |= dict(zip(others, scorer.tokenize(others)[0], strict=True))
    known: list[int] = []
    judged = {text: scorer.family.judge_caption(ids) for text, ids in ids_of.items()}
    for i in scored:
        why_nothing, result.partly_unknown[i] = judged[run.texts[i]]
        if why_nothing:
            result.status[i] = "empty_caption"
            result.detail[i] = why_nothing
        else:
            known.append(i)
    return known


def result_table(plan: Plan, rows: "pd.DataFrame", scored: Scored, scorer: Scorer | None = None,
                 measured: "dict[str, np.ndarray] | None" = None) -> "pa.Table":
    """The input's columns, one that clashes renamed to input_<name>, then the result columns.

    `measured` are the columns of measures, (n,) each; cells that only the whole run can tell stay empty (`complete`).
    """
    import numpy as np
    import pyarrow as pa
    columns = plan.config.result_columns
    has_score = np.isfinite(scored.cosines)
    values: Json = {
        "similarity": scored.cosines, "dissimilarity": np.float32(1) - scored.cosines, "truncated": scored.truncated,
        "probability": scorer.family.probabilities(scored.cosines) if scorer else None, **(measured or {}),
        "status": scored.status, "detail": scored.detail}
    names = output_names(rows.columns, column_names(columns))
    made = {shown: pa.array(rows[name], pa.string()) for name, shown in zip(rows.columns, names, strict=True)}
    for column in columns:
        cells = values.get(column.name)
        if cells is None:
            made[column.name] = pa.nulls(len(rows), arrow_type(column))
        elif column.name in ("status", "detail"):
            made[column.name] = pa.array(cells, arrow_type(column))
        else:
            mask = ~has_score
            if column.type == "float":
                mask = mask | ~np.isfinite(np.asarray(cells, np.float32))
            made[column.name] = pa.array(cells, arrow_type(column), mask=mask)
    return pa.table(made)


# ── Files that appear whole ───────────────────────────────────────────────────────────────────────────────────────────

def _name_this_process_space() -> str:
    """Which processes this one's number can be held against: host, its start, and the namespace of process numbers.

    Containers may share a host's name and a folder, but not their process numbers.
    """
    known = [platform.node()]
    with contextlib.suppress(OSError):
        known.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
        known.append(str(pathlib.Path("/proc/self/ns/pid").stat().st_ino))
    return hashlib.sha256(" ".join(known).encode()).hexdigest()[:12]


HOST = _name_this_process_space()


def name_of_mine(path: pathlib.Path) -> pathlib.Path:
    """A name next to `path` that tells whose it is: the next run takes it away once this process has ended."""
    return path.with_name(f".{path.name}.{HOST}.{os.getpid()}.tmp")


@contextlib.contextmanager
def atomic_file(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Write next to `path`, fsync, rename: it is either what it was or complete, whatever happens in between.

    In an object store it is sent in pieces, and appears when the last one is there.
    """
    if in_store(path):
        with typing.cast("StorePath", path).writing() as file:
            yield file
        return
    mine = name_of_mine(path)
    try:
        with open(mine, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mine.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or the rename itself could be lost with the power
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # Samba and others know no such thing
                raise
        finally:
            os.close(folder)
    finally:
        with contextlib.suppress(OSError):
            mine.unlink(missing_ok=True)


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Write `content` to `path` atomically; Trouble (exit 5) where the disk refuses."""
    with output_disk(path), atomic_file(path) as file:
        file.write(content)


def write_json(path: pathlib.Path, content: Json) -> None:
    """Write `content` to `path` atomically; Trouble (exit 5) where the disk refuses."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode("utf-8", "backslashreplace"))  # \udce9, of a name that is no text, is JSON for what it is


def read_json(path: pathlib.Path) -> Json | None:
    """The object in `path`, or None where there is none that could ever be read; Trouble (exit 5) as `_reading` has it."""
    content = None
    with _reading(path), contextlib.suppress(ValueError, RecursionError):
        content = json.loads(path.read_bytes())
    return content if isinstance(content, dict) else None


def write_sealed(path: pathlib.Path, content: Json) -> None:
    """Write `content` as `write_json` does, with the sha256 by which `read_sealed` tells that nothing in it has changed."""
    write_json(path, seal(content))


def seal(content: Json) -> Json:
    """`content` and, as its last key, the sha256 of what it holds besides."""
    bare = {key: value for key, value in content.items() if key != "sha256"}
    return bare | {"sha256": hashlib.sha256(json.dumps(bare).encode()).hexdigest()}


def read_sealed(path: pathlib.Path) -> Json | None:
    """The object in `path` without its seal, or None where there is none that is as it was written."""
    content = read_json(path)
    if content is None or seal(content) != content:
        return None
    del content["sha256"]
    return content


def times_of(path: pathlib.Path) -> list[int]:
    """When the content and when anything of a file has changed last, in ns: a write that keeps the one moves the other."""
    info = path.stat()
    return [info.st_mtime_ns, info.st_ctime_ns]


def file_sha256(path: pathlib.Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


COMMIT_LOCK = ".commit.lock"


@contextlib.contextmanager
def locked(output: pathlib.Path, name: str = ".lock") -> Iterator[None]:
    """Only one process at a time plans, settles or finalises a run; the system frees the lock of one that died.

    COMMIT_LOCK, which is held for a moment only, keeps a part from being committed while its run is discarded.
    """
    if in_store(output):
        with addon("stores.leases", "output_path").leased(output, name):
            yield
        return
    import filelock
    warnings.filterwarnings("ignore", module="filelock")  # it tells for each lock that a disk has no flock, and does without
    with output_disk(output):
        output.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(output / name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


# ── Parts: exactly once ───────────────────────────────────────────────────────────────────────────────────────────────
# A part is one Parquet file that appears whole. Its footer holds JSON that binds it to its run and says what is in it. The last
# two keys are the sha256 of the whole file, with both digests as zeros, and the sha256 of the JSON itself: so a flip anywhere
# in the file is found, and what the footer alone says can be relied on.

METADATA_KEY = "image_text_sim_clip"
_METADATA_START = b'{"run": "'
_DIGESTS = '"file_sha256": "%s", "sha256": "%s"}'
_DIGESTS_START = b'"file_sha256": "'
_NO_DIGESTS = (_DIGESTS % ("0" * 64, "0" * 64)).encode()


class FlawedPart(Trouble):
    """A part, or a file next to it, that is not what had been written (exit 7)."""

    def __init__(self, name: str) -> None:
        super().__init__(EXIT_VERIFY, f"{name} was not what had been written; it is removed, and the same command does it "
                                      "again")
        self.name = name


class Part(NamedTuple):
    """A part as it was read back: its rows with their results, and the metadata of its footer."""

    table: "pa.Table"
    metadata: Json


class PartSummary(NamedTuple):
    """What became of a partition: how many rows it has, and how many of each status."""

    rows: int
    statuses: dict[str, int]


def describe_part(plan: Plan, partition: Partition, table: "pa.Table", kept: dict[str, Json],
                  files: Mapping[pathlib.Path, bytes]) -> Json:
    """The metadata of a part, all of it deterministic: what it belongs to, counts, what each measure has `kept`, its files."""
    import pyarrow as pa
    import pyarrow.compute as pc
    counts = {entry["values"]: entry["counts"] for entry in table["status"].value_counts().to_pylist()}
    return {
        "run": plan.fingerprint, "partition": partition.index, "rows": table.num_rows, "statuses": dict(sorted(counts.items())),
        "similarity_sum": pc.sum(table["similarity"].cast(pa.float64())).as_py() or 0.0,
        "similarity_count": table.num_rows - table["similarity"].null_count,
        "truncated": pc.sum(table["truncated"].cast(pa.int64())).as_py() or 0,
        "measures": kept,
        "files": {path.name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for path, data in files.items()},
    }


def encode_part(table: "pa.Table", metadata: Json) -> bytes:
    """The bytes of a part; the same for the same table and metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    text = json.dumps(metadata)[:-1] + ", " + _NO_DIGESTS.decode()
    buffer = pa.BufferOutputStream()
    with pq.ParquetWriter(buffer, table.schema, compression="zstd") as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({METADATA_KEY: text})
    data: bytes = buffer.getvalue().to_pybytes()
    place = data.rfind(_DIGESTS_START)
    before = data[data.rfind(_METADATA_START):place]
    return data[:place] + _digests(before, _file_sha256_of(data)) + data[place + len(_NO_DIGESTS):]


def _digests(metadata_text: bytes, file_sha256: str) -> bytes:
    """The end of the JSON in a footer, whose text before the digests is `metadata_text`."""
    own = hashlib.sha256(metadata_text + file_sha256.encode()).hexdigest()
    return (_DIGESTS % (file_sha256, own)).encode()


def _file_sha256_of(data: bytes) -> str:
    """The sha256 of a part's bytes with zeros for both digests. They come last, since captions may look like them."""
    place = data.rfind(_DIGESTS_START)
    blank = hashlib.sha256(data[:place])
    blank.update(_NO_DIGESTS)
    blank.update(data[place + len(_NO_DIGESTS):])
    return blank.hexdigest()


def metadata_in(footer: bytes) -> Json | None:
    """The JSON in a footer, if it is as it was written. Opening 10,000 files with pyarrow instead would take many seconds."""
    start = footer.rfind(_METADATA_START)
    place = footer.rfind(_DIGESTS_START)
    end = place + len(_NO_DIGESTS)
    if not 0 <= start < place:
        return None
    at = place + len(_DIGESTS_START)
    file_sha256 = footer[at:at + 64].decode("ascii", "replace")
    if footer[place:end] != _digests(footer[start:place], file_sha256):
        return None
    return json.loads(footer[start:end])


def read_footer(path: pathlib.Path) -> bytes | None:
    """The footer of a Parquet file that is whole in length; None for any other file, and where there is none."""
    if in_store(path):
        return addon("stores.commits", "output_path").read_footer(path)
    with _reading(path), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        tail = file.read(8)
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != b"PAR1" or length + 12 > size:
            return None
        file.seek(size - 8 - length)
        return file.read(length)
    return None


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
    """Leave the block where there is no file that could ever be read; Trouble (exit 5) for an error that may pass.

    A disk that cannot be reached, a folder that may not be entered, too many open files: none of them says that a part is
    not there, and what is taken for missing is done anew.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO):
            raise Trouble(EXIT_DISK, f"cannot read {path}: {error.strerror or error}") from error


def read_part_metadata(plan: Plan, partition: Partition) -> Json | None:
    """What the footer of this run's part says; None where there is no part of this run, or its footer has changed."""
    footer = read_footer(partition.parquet)
    metadata = metadata_in(footer) if footer else None
    return metadata if metadata and _belongs(metadata, plan, partition) else None


def look_at_parts(plan: Plan, reads_all: bool = False) -> None:
    """In an object store, read the footers of all parts many at a time, for the next who ask for them one by one."""
    if in_store(plan.output):
        addon("stores.commits", "output_path").look_at_parts(plan.output / "parts", reads_all)


def _belongs(metadata: Json, plan: Plan, partition: Partition) -> bool:
    """Whether a part with this metadata is this run's, and this partition's."""
    return metadata["run"] == plan.fingerprint and metadata["partition"] == partition.index


def part_is_done(plan: Plan, partition: Partition) -> bool:
    """Whether this run's part is there, and its files with it, all whole in length (`read_part` checks every byte)."""
    metadata = read_part_metadata(plan, partition)
    return metadata is not None and _find_flawed_file(partition, metadata) is None


def _find_flawed_file(partition: Partition, metadata: Json, thorough: bool = False) -> str | None:
    """The name of a file next to the part that is missing or has another length or, when `thorough`, another sha256."""
    for name, written in metadata["files"].items():
        path = partition.folder / name
        is_whole = False
        with _reading(path):
            size = addon("stores.commits", "output_path").size_of(path) if in_store(path) else path.stat().st_size
            is_whole = size == written["bytes"]
            if is_whole and thorough:
                is_whole = file_sha256(path) == written["sha256"]
        if not is_whole:
            return str(name)
    return None


def read_part(plan: Plan, partition: Partition, thorough: bool = False) -> Part | None:
    """This run's part, every byte checked and, when `thorough`, those of the files next to it.

    None where there is none; raises FlawedPart (exit 7) for a damaged one.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    data = None
    with _reading(partition.parquet):
        data = partition.parquet.read_bytes()
    if data is None:
        if partition.parquet.exists():
            raise FlawedPart(partition.parquet.name)
        return None
    metadata = metadata_in(data)
    if metadata is None or _file_sha256_of(data) != metadata["file_sha256"]:
        raise FlawedPart(partition.parquet.name)
    if not _belongs(metadata, plan, partition):
        return None
    flawed = _find_flawed_file(partition, metadata, thorough) if thorough else None
    if flawed:
        raise FlawedPart(flawed)
    with pq.ParquetFile(pa.BufferReader(data), pre_buffer=False) as file:  # a quarter of what pq.read_table takes
        table = file.read(use_threads=False)  # threads may not outlive the program
    return Part(table.replace_schema_metadata(None), metadata)


def remove_flawed_part(plan: Plan, partition: Partition, thorough: bool = False) -> None:
    """Take a damaged part away, so that the same command does it again; one that has been replaced meanwhile stays."""
    with locked(plan.output, COMMIT_LOCK), output_disk(partition.parquet):
        try:
            read_part(plan, partition, thorough)
        except FlawedPart:
            remove_path(partition.parquet)


def commit_part(plan: Plan, partition: Partition, table: "pa.Table", kept: dict[str, Json],
                replaced: Part | None = None, files: Mapping[pathlib.Path, bytes] = MappingProxyType({})) -> PartSummary:
    """Write the part, whose existence is the mark of done, and the `files` that belong next to it.

    What is there first stays: a part of this run that another process has committed meanwhile is not touched, unless it is
    the one that --retry-failed has `replaced`. Raises Trouble (exit 2) where the run has been planned anew.
    """
    metadata = describe_part(plan, partition, table, kept, files)
    data = encode_part(table, metadata)
    if in_store(plan.output):
        there = addon("stores.commits", "output_path").commit(plan, partition, data, metadata, replaced, files)
        return PartSummary(there["rows"], there["statuses"])
    with locked(plan.output, COMMIT_LOCK):
        plan.check_still_there()
        there = read_part_metadata(plan, partition) if part_is_done(plan, partition) else None
        if there is None or (replaced is not None and there["sha256"] == replaced.metadata["sha256"]):
            if there and files:
                addon("results.retry", "--retry-failed").replace_part(partition, data, metadata, files)
            else:
                for path, content in files.items():
                    write_bytes(path, content)
                write_bytes(partition.parquet, data)
            there = metadata
    return PartSummary(there["rows"], there["statuses"])


def write_times(partition: Partition, times: Json) -> None:
    """Keep seconds, worker and peaks of a part; a disk that refuses costs these numbers and nothing else."""
    with contextlib.suppress(OSError):
        partition.times.write_text(json.dumps(seal(times)) + "\n", encoding="utf-8")


NO_TIMES = {"seconds": {}, "wall_s": 0.0, "ended": 0.0, "worker": "", "tried": 0, "peak_rss_mib": 0.0, "peak_gpu_mib": 0.0,
            "oom_halvings": 0}


def read_times(partition: Partition) -> Json:
    """What `write_times` kept; zeros where that is missing or has changed."""
    return read_sealed(partition.times) or dict(NO_TIMES)


# ── Engines: where a partition runs ───────────────────────────────────────────────────────────────────────────────────

class Worker:
    """A loaded model and its loader threads: scores and commits the partitions that an engine gives it."""

    def __init__(self, config: Config, plan: Plan, name: str, clock: Clock) -> None:
        self.config = config
        self.plan = plan
        self.name = name
        self.clock = clock
        self.threads = loader_threads(config)
        has_images = plan.table.brings_images
        read = typing.cast("RowsWithImages", plan.table).read_bytes if has_images else open_source(config, self.threads)
        with clock.stage("load_model"):
            self.scorer = load_scorer(config) if config.pretrained_model != "none" else None
        clock.take()
        self.settings = self.scorer.decoding if self.scorer else DRY_RUN_SETTINGS
        resize = self.scorer.resize if self.scorer else resize_coarsely
        self.loader = ImageLoader(read, ImageDecoder(config, self.settings), resize)
        self._halvings = 0  # of batches, as many as finished parts tell of
        self._guard: Guard | None = None
        if ADDONS.is_dir():
            self._guard = addon("images.guard", "decode_timeout_s").Guard(config, self.settings)
            self.loader = self._guard.attach(self.loader)
        if self.scorer and config.decode == "gpu":
            self.loader = addon("images.gpu_decode", "decode: gpu").attach(self.scorer, self.loader)
        settle(plan, self.scorer)
        self.measures: list[Measure] = []
        for measure in find_measures(config):
            if self.scorer or not measure.needs_model:
                self.measures.append(measure(config, plan, self.scorer, self.loader))
                self.loader = self.measures[-1].wrap(self.loader)
        self.open_pool: Callable[[int], ImagePool] = getattr(read, "open_pool", ImagePool)
        self.report: Callable[[Plan, PartitionRun, pa.Table], Json] | None = getattr(read, "report_partition", None)

    def run(self, todo: list[Partition], retry: bool = False,
            on_loaded: Callable[[], None] = lambda: None) -> Iterator[PartSummary]:
        """Score and commit each partition, loading images ahead across their edges; yields what became of each."""
        pool = self.open_pool(self.threads)
        INTERRUPTION.deferred = True
        try:
            if self._guard:
                self.loader = self._guard.look_back(todo, self.loader)
            since = time.perf_counter()
            runs = (self._begin(partition, retry) for partition in todo)
            for run, images in pool.embed_partitions(runs, self.loader, self.scorer, self.clock, on_loaded):
                scored = score_partition(self.scorer, run, images, self.clock)
                summary = self._finish(run, scored, since)
                since = time.perf_counter()
                yield summary
                INTERRUPTION.check()  # a partition without an image to load has not looked
        finally:
            INTERRUPTION.deferred = False
            pool.close()
            for measure in self.measures:
                measure.close()
            if self._guard:
                self._guard.close(pool.hangs)

    def _begin(self, partition: Partition, retry: bool) -> PartitionRun:
        """Open the partition."""
        run = PartitionRun.open(self.plan, partition, retry)
        for measure in self.measures:
            measure.begin(run)
        if self._guard:
            self._guard.marks.begin(partition)  # before the first image is decoded, which may be the one that kills
        return run

    def _finish(self, run: PartitionRun, scored: Scored, since: float) -> PartSummary:
        """Have the measures add theirs, commit the part, and keep its times."""
        clock = self.clock
        values: dict[str, np.ndarray] = {}
        kept: dict[str, Json] = {}
        files: dict[pathlib.Path, bytes] = {}
        uncounted_s = 0.0
        for measure in self.measures:
            with clock.stage(measure.stage or measure.name):
                measured = measure.measure(run, scored)
            if not measure.counts_in_rate:
                uncounted_s += clock.seconds.pop(measure.name)
            elif measured.uncounted_s:
                clock.seconds[measure.name] -= measured.uncounted_s
                uncounted_s += measured.uncounted_s
            values |= measured.values
            kept[measure.name] = measured.kept
            files |= measured.files
        with clock.stage("write"):
            table = run.finish(result_table(self.plan, run.rows, scored, self.scorer, values))
            for measure in self.measures:
                table = measure.revise(run, table)
            summary = commit_part(self.plan, run.partition, table, kept, run.replaced, files)
        halvings = self.scorer.oom_halvings if self.scorer else 0
        times = {
            "seconds": {stage: round(seconds, 6) for stage, seconds in sorted(clock.take().items())},
            "wall_s": round(time.perf_counter() - since - uncounted_s, 6), "ended": round(time.time(), 6),
            "worker": self.name, "tried": len(run.rows), "peak_rss_mib": round(peak_memory_mib(), 1),
            "peak_gpu_mib": round(gpu_memory_mib(peak=True), 1), "oom_halvings": halvings - self._halvings,
            "other_libraries": self.plan.other_libraries}
        self._halvings = halvings
        if self.report:
            times["fetching"] = self.report(self.plan, run, table)
        write_times(run.partition, times)
        if self._guard:
            self._guard.marks.finish(run.partition)
        return summary


JUDGED_FROM_ROWS = 1000

LIKELY_CAUSE = {"missing": "is image_path the right folder?",
                "dns": "is there a network?", "connect": "is there a network?",
                "timeout": "is the network slow, or fetch_timeout_s short?", "forbidden": "are these addresses private?"}


def refuse_failures(statuses: "collections.Counter[str]", max_failure_rate: float) -> None:
    """Raise Trouble (exit 4) when more than `max_failure_rate` of the rows, 1,000 or more, have failed."""
    failures = collections.Counter({status: count for status, count in statuses.items() if status != "ok"})
    rows = statuses.total()
    failed = failures.total()
    if rows >= JUDGED_FROM_ROWS and failed > max_failure_rate * rows:
        worst, count = failures.most_common(1)[0]
        raise Trouble(EXIT_FAILURES, f"{failed} of {rows} rows failed, more than max_failure_rate ({max_failure_rate}) allows; "
                                     f"most often {worst} ({count}): {LIKELY_CAUSE.get(worst, 'see the column detail')}")


class Job:
    """One run of the script, as an engine sees it: plan it, list what is pending, do some of it.

    With `once` a run that others have finalised already is not summed up again.
    """

    def __init__(self, config: Config, fresh: bool = False, retry: bool = False, quiet: bool = False) -> None:
        self.config = config
        self.fresh = fresh
        self.retry = retry
        self.quiet = quiet
        self.once = False
        self.clock = Clock()
        self.plan: Plan
        self._progress: ProgressBar | ProgressLog | None = None

    def make_plan(self, joins: bool = False) -> None:
        """Plan the run, or read the plan that another process has made (see `make_plan`); Trouble (exit 3) for no rows."""
        with self.clock.stage("plan"):
            self.plan = make_plan(self.config, self.fresh and not joins, joins)
        self.clock.take()
        if not self.plan.row_count:
            malformed = self.plan.manifest["malformed"]
            where = f": all {malformed} lines are malformed, see {self.plan.output / 'bad_rows.csv'}" if malformed else ""
            raise Trouble(EXIT_INPUT, f"csv_path {self.config.csv_path!r} has no rows{where}")

    def pending(self) -> list[Partition]:
        """What is left to do."""
        self.plan.refresh()
        look_at_parts(self.plan)
        refuse_changed_files(self.plan)
        may_pass = addon("results.retry", "--retry-failed").may_pass_in if self.retry else None
        return [partition for partition in self.plan.partitions
                if not part_is_done(self.plan, partition) or (may_pass and may_pass(self.plan, partition))]

    def results_path(self) -> pathlib.Path:
        """Where `output_format` has the results go."""
        return self.plan.output / f"scores.{self.config.output_format}"

    def read_profile(self) -> Json:
        """What profile.json says; {} where it is missing or has changed."""
        return read_sealed(self.plan.output / "profile.json") or {}

    def is_finished(self) -> bool:
        """Whether the results are there, complete and as written; bytes that a disk lost in silence are left to --verify."""
        stored = self.read_profile()
        scores = self.results_path()
        if not stored.get("finished") or not scores.is_file() or scores.stat().st_size != stored["scores_bytes"]:
            return False
        return times_of(scores) == stored["scores_times_ns"] or file_sha256(scores) == stored["scores_sha256"]

    def work(self, todo: list[Partition], name: str = "local", judge: bool = True) -> None:
        """Score and commit `todo` in this process; with `judge`, Trouble (exit 4) when too many rows fail."""
        if todo:
            worker = Worker(self.config, self.plan, name, self.clock)
            self.follow(worker.run(todo, self.retry, self.image_loaded), todo, judge)

    def follow(self, summaries: Iterator[PartSummary], todo: list[Partition], judge: bool = True) -> None:
        """Show each finished partition of `todo` as progress, and judge by them (see `work`)."""
        statuses = collections.Counter[str]()
        left = sum(partition.stop - partition.start for partition in todo)
        if ADDONS.is_dir() and not self.quiet:
            done = self.plan.row_count - left
            self._progress = addon("results.progress", "progress").start_progress(self.plan.row_count, done)
        try:
            for summary in summaries:
                statuses.update(summary.statuses)
                if self._progress:
                    self._progress.partition_done(summary)
                if judge:
                    refuse_failures(statuses, self.config.max_failure_rate)
        finally:
            if self._progress:
                self._progress.close()
            if isinstance(summaries, types.GeneratorType):
                summaries.close()

    def image_loaded(self) -> None:
        """Move the progress by an image."""
        if self._progress:
            self._progress.image_loaded()


def run_local(job: Job) -> bool:
    """This process does everything that is pending, and finalises."""
    job.make_plan()
    job.work(job.pending())
    return True


def find_engine(config: Config) -> Callable[[Job], bool]:
    """The engine that the config names (addons/engines/<name>.py), or the one that the launcher's environment tells of.

    An engine plans the job, sees to it that every pending partition is done by somebody, and returns whether this
    process finalises.
    """
    name = config.engine
    if name == "auto":
        name = "local"
        is_srun = os.environ.get("SLURM_STEP_NUM_TASKS", "1") not in ("", "1")  # NTASKS and PROCID: sbatch sets them, too
        if os.environ.get("WORLD_SIZE", "1") not in ("", "1") or "ACCELERATE_MIXED_PRECISION" in os.environ:
            name = "accelerate"
        elif is_srun or "SLURM_ARRAY_TASK_ID" in os.environ:
            name = "slurm"
    if name == "local":
        return run_local
    return addon(f"engines.{name}", f"engine: {name}").run


# ── Results ───────────────────────────────────────────────────────────────────────────────────────────────────────────

class PartsChanged(Exception):
    """A part was replaced (by --retry-failed in another process) while the results were written: they are written again."""


class Snapshot:
    """The parts of a run as they are when it is made; whatever is read later raises PartsChanged where one is another."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        look_at_parts(plan, reads_all=True)
        found = (read_part_metadata(plan, partition) for partition in plan.partitions)
        self._digests = [metadata["sha256"] if metadata else "" for metadata in found]

    def metadata(self) -> Iterator[tuple[Partition, Json]]:
        """The metadata of every part that is there."""
        for partition, digest in zip(self.plan.partitions, self._digests, strict=True):
            if digest:
                metadata = read_part_metadata(self.plan, partition)
                if metadata is None or metadata["sha256"] != digest:
                    raise PartsChanged
                yield partition, metadata

    def parts(self) -> Iterator[tuple[Partition, Part | None]]:
        """Every partition and its part, every byte checked; None for one that never ran. Raises FlawedPart (exit 7)."""
        for partition, digest in zip(self.plan.partitions, self._digests, strict=True):
            part = read_part(self.plan, partition)
            if (part.metadata["sha256"] if part else "") != digest:
                raise PartsChanged
            yield partition, part

    @functools.cached_property
    def totals(self) -> "list[tuple[type[Measure], Any]]":
        """What each measure makes of all parts."""
        return [(measure, measure.add_up(metadata for _, metadata in self.metadata()))
                for measure in find_measures(self.plan.config)]


def result_tables(snapshot: Snapshot) -> Iterator["pa.Table"]:
    """Each partition's rows with their results, in input order; rows of one that never ran are `not_tried`.

    Raises FlawedPart (exit 7) for a damaged part, Trouble (exit 7) where fewer or more rows go out than came in, and
    PartsChanged. Columns of the type uint32 are of parts alone (addons/measures/image_digests.py).
    """
    plan = snapshot.plan
    written = 0
    for partition, part in snapshot.parts():
        table = part.table if part else _untried_table(plan, partition)
        for measure, total in snapshot.totals:
            table = measure.complete(table, total)
        yield table.select([field.name for field in table.schema if field.type != "uint32"])
        written += table.num_rows
    if not plan.partitions:
        yield _untried_table(plan, Partition(0, 0, 0, plan.output))  # of no rows: the columns still come out
    if written != plan.row_count:
        raise Trouble(EXIT_VERIFY, f"{plan.output}: {plan.row_count} rows came in, {written} went out")


def _untried_table(plan: Plan, partition: Partition) -> "pa.Table":
    """The rows of a partition that never ran."""
    rows = plan.table.read(partition.start, partition.stop)
    return result_table(plan, rows, Scored.nothing(len(rows), "not_tried"))


class CsvRows:
    """A CSV being written, of pyarrow tables: floats in the shortest digits that read back the same float32, '' for nothing."""

    def __init__(self, file: BinaryIO, names: list[str]) -> None:
        self._text = io.TextIOWrapper(file, "utf-8", newline="")
        self._plain = csv.writer(self._text, lineterminator="\n")
        self._quoted = csv.writer(self._text, lineterminator="\n", quoting=csv.QUOTE_ALL)
        self._write_row(names)

    def _write_row(self, cells: Sequence[str]) -> None:
        # csv.writer leaves a lone carriage return unquoted, which breaks the row for whoever reads it
        has_return = any("\r" in cell for cell in cells)
        (self._quoted if has_return else self._plain).writerow(cells)

    def write(self, table: "pa.Table") -> None:
        """Append the table's rows."""
        import pyarrow as pa
        import pyarrow.compute as pc
        columns = [column.cast(pa.string()).fill_null("") for column in table.columns]
        has_returns = any(pc.any(pc.match_substring(column, "\r")).as_py() for column in columns)
        rows = zip(*(column.to_pylist() for column in columns), strict=True)
        if not has_returns:
            self._plain.writerows(rows)
            return
        for row in rows:
            self._write_row(row)

    def close(self) -> None:
        """Hand the file back, complete."""
        self._text.detach()  # flushes first


def write_csv(snapshot: Snapshot, file: BinaryIO) -> None:
    """Stream all results as CSV."""
    plan = snapshot.plan
    tables = result_tables(snapshot)
    if plan.config.escape_formulas:
        tables = map(addon("results.formulas", "escape_formulas").escape_table, tables)
    first = next(tables)
    writer: type[CsvRows] = addon("results.csv_rows", "scores.csv").ArrowCsvRows if ADDONS.is_dir() else CsvRows
    rows = writer(file, first.column_names)
    for table in itertools.chain([first], tables):
        rows.write(table)
    rows.close()


def summarise(snapshot: Snapshot) -> Json:
    """Counts, scores, times and memory of all parts, and what each measure makes of them: the beginning of profile.json."""
    plan = snapshot.plan
    statuses = collections.Counter[str]()
    sums = collections.Counter[str]()
    similarity_sums: list[float] = []
    times: list[Json] = []
    for partition, metadata in snapshot.metadata():
        statuses.update(metadata["statuses"])
        similarity_sums.append(metadata["similarity_sum"])
        sums.update({key: metadata[key] for key in ("rows", "similarity_count", "truncated")})
        times.append(read_times(partition))
    missing = plan.row_count - sums["rows"]
    if missing:
        statuses["not_tried"] = missing
    scored = statuses.pop("ok", 0)
    count = sums["similarity_count"]
    # an input with lists of captions, of which each is a row, has fewer rows than come out
    lists = {"input_rows": plan.manifest["input_rows"]} if "input_rows" in plan.manifest else {}
    return {"rows": plan.row_count, **lists, "scored": scored, "failed": dict(sorted(statuses.items())),
            "malformed": plan.manifest["malformed"], "partitions": len(plan.partitions), "finished": not missing,
            "truncated": sums["truncated"], "mean_similarity": math.fsum(similarity_sums) / count if count else None,
            **add_up_times(times), **add_up_fetches(times, plan.row_count),
            **{measure.name: measure.describe(total) for measure, total in snapshot.totals}}


def add_up_times(times: list[Json]) -> Json:
    """Seconds per stage, rate and peaks of the parts; the rate is rows over the seconds in which anybody was at work."""
    wall_s = busy_time(times)
    tried = sum(part["tried"] for part in times)
    stage_seconds = dict.fromkeys(STAGES, 0.0)
    for part in times:
        for stage, seconds in part["seconds"].items():
            stage_seconds[stage] = stage_seconds.get(stage, 0.0) + seconds
    return {"tried": tried, "wall_s": wall_s, "pairs_per_s": tried / wall_s if wall_s else 0.0,
            "workers": round(math.fsum(part["wall_s"] for part in times) / wall_s) if wall_s else 0,
            "stage_seconds": stage_seconds,
            "peak_rss_mib": max((part["peak_rss_mib"] for part in times), default=0.0),
            "peak_gpu_mib": max((part["peak_gpu_mib"] for part in times), default=0.0),
            "oom_halvings": sum(part["oom_halvings"] for part in times),
            "other_libraries": sorted(set[str]().union(*(part.get("other_libraries", []) for part in times)))}


def add_up_fetches(times: list[Json], row_count: int) -> Json:
    """How long fetches took and which hosts failed; nothing for a run that fetched nothing."""
    reports = [part["fetching"] for part in times if "fetching" in part]
    return {"fetching": addon("images.web_report", "image_path: url").add_up(reports, row_count)} if reports else {}


def busy_time(times: list[Json]) -> float:
    """Seconds in which anybody was at work on the parts: interruptions and company count once."""
    busy_s = 0.0
    until = -math.inf
    for begun, ended in sorted((part["ended"] - part["wall_s"], part["ended"]) for part in times):
        busy_s += max(0.0, ended - max(begun, until))
        until = max(until, ended)
    return busy_s


def explain(totals: Json) -> Json:
    """Times per pair, the stage that limits, each stage's own capacity, days for 100 million pairs, versions."""
    rate = totals["pairs_per_s"]
    seconds = totals["stage_seconds"]
    per_pair = {stage: seconds[stage] / max(1, totals["tried"]) for stage in seconds}
    return {
        "days_for_100_million_pairs": 1e8 / rate / 86400 if rate else None,
        "seconds_per_pair": {"pre-processing": sum(per_pair[stage] for stage in PREPARE_STAGES),
                             "metric": sum(per_pair[stage] for stage in METRIC_STAGES), "stages": per_pair},
        "bottleneck": find_bottleneck(seconds) if totals["tried"] else None,
        "capacity_pairs_per_s": {stage: 1 / per_pair[stage] for stage in (*PREPARE_STAGES, *METRIC_STAGES) if per_pair[stage]},
        "python": platform.python_version(), "versions": find_versions(), "image_backend": "pil",
    }


def find_bottleneck(seconds: dict[str, float]) -> str:
    """The stage that the others wait for: one of the loaders' if the main thread waited for them more than for the model."""
    loaders_limit = seconds["wait_for_images"] > seconds["wait_for_model"]
    candidates = LOADER_STAGES if loaders_limit else ("tokenize", *METRIC_STAGES, "write")
    return max(candidates, key=lambda stage: seconds[stage])


def find_versions(packages: Iterable[str] = (*DECISIVE_LIBRARIES, "numpy", "pyarrow")) -> dict[str, str]:
    """The installed versions of `packages`: what the scores depend on."""
    from importlib import metadata
    versions = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def print_summary(config: Config, profile: Json) -> None:
    """The table of time and memory on stderr, as the original work reports it."""
    times = profile["seconds_per_pair"]

    def of_stages(total: float, stages: Sequence[str]) -> str:
        each = ", ".join(f"{stage} {times['stages'][stage]:.6f}" for stage in stages)
        return f"{total:.6f} s a pair   ({each})"
    failed = "".join(f", {count:,} {status}" for status, count in profile["failed"].items())
    malformed = f"; {profile['malformed']:,} malformed lines" if profile["malformed"] else ""
    of_lists = f" of {profile['input_rows']:,} input rows" if "input_rows" in profile else ""
    lines = [("pairs", f"{profile['rows']:,}{of_lists}: {profile['scored']:,} scored{failed}{malformed}"),
             ("pre-processing", of_stages(times["pre-processing"], PREPARE_STAGES)),
             ("metric", of_stages(times["metric"], METRIC_STAGES)),
             ("total", f"{times['pre-processing'] + times['metric']:.6f} s a pair"),
             ("memory", f"{profile['peak_rss_mib']:,.0f} MiB RAM, {profile['peak_gpu_mib']:,.0f} MiB GPU (peaks)")]
    asked_for = [name for name in config.measures or {} if name in times["stages"]]
    if asked_for:
        total = math.fsum(times["stages"][name] for name in asked_for)
        lines.append(("measures", of_stages(total, asked_for)))
    if profile["pairs_per_s"]:
        workers = f" with {profile['workers']} workers" if profile["workers"] > 1 else ""
        lines.append(("rate", f"{profile['pairs_per_s']:,.1f} pairs/s{workers}; 100 million pairs would take "
                              f"{profile['days_for_100_million_pairs']:,.2f} days"))
        lines.append(("limited by", profile["bottleneck"]))
    if profile.get("fetching"):
        lines += addon("images.web_report", "image_path: url").tell(profile["fetching"], config)
    if profile["mean_similarity"] is not None:
        lines.append(("mean similarity", f"{profile['mean_similarity']:.4f}"))
    lines += [(measure.name.replace("_", " "), measure.tell(profile[measure.name]))
              for measure in find_measures(config) if profile.get(measure.name)]
    for name, value in lines:
        if value:
            say(f"{name:>16}  {value}")


RECORDED_KEYS = ("revision", "preprocess", "decode", "transparent_over", "exif_orientation")


@profile
def finalize(job: Job, curve: "MemoryCurve | None" = None) -> Json | None:
    """Write scores.csv (or .parquet), profile.json and memory-time.png from the parts; print and return the summary."""
    plan = job.plan
    with locked(plan.output), output_disk(plan.output):
        if job.is_finished():
            if job.once:
                return None
            stored = job.read_profile()
        else:
            stored = write_results(job)
            if curve and (image := curve.png()):
                write_bytes(plan.output / "memory-time.png", image)
        if stored["finished"] and ADDONS.is_dir():
            addon("results.earlier_run", "output_path").remove_traces(plan.output)
    print_summary(job.config, stored)
    keys = ("rows", "input_rows", "scored", "failed", "malformed", "pairs_per_s", "mean_similarity")
    return {key: stored[key] for key in keys if key in stored} | {"output": str(job.results_path())}


def write_results(job: Job) -> Json:
    """Write the results file and profile.json from the parts; returns the content of the latter."""
    config = job.config
    plan = job.plan
    scores = job.results_path()
    while True:
        snapshot = Snapshot(plan)  # a part that another worker adds meanwhile does not make the run finished
        try:
            stored = summarise(snapshot)
            with output_disk(scores), atomic_file(scores) as file:
                if config.output_format == "csv":
                    write_csv(snapshot, file)
                else:
                    addon(f"results.{config.output_format}", "output_format").write(result_tables(snapshot), file)
            break
        except PartsChanged:
            continue
        except FlawedPart:
            for partition in plan.partitions:
                remove_flawed_part(plan, partition)  # all of them, so that the same command does them at once
            raise
    with output_disk(scores):
        stored |= {"scores_bytes": scores.stat().st_size, "scores_times_ns": times_of(scores),
                   "scores_sha256": file_sha256(scores)}
    stored |= {"model": config.pretrained_model, **{key: getattr(config, key) for key in RECORDED_KEYS},
               **plan.manifest.get("resolved", {}), "script": __version__}
    stored |= explain(stored)
    write_sealed(plan.output / "profile.json", stored)
    return stored


# ── Main ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are Trouble (exit 2)."""

    def error(self, message: str) -> typing.NoReturn:
        """Say what is wrong in one line."""
        raise Trouble(EXIT_CONFIG, f"{message}; --help lists the options")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; raises Trouble (exit 2) for a wrong one."""
    parser = Parser(prog="image_text_sim_clip.py", description=(__doc__ or "").split("\n")[0],
                    epilog="exit codes: 0 done, 2 config, 3 input, 4 too many failures, 5 output disk, 6 model, "
                           "7 results do not verify, 130/143 interrupted (run again to resume)")
    parser.add_argument("--config", required=True, help="the YAML file with every key, such as config.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key of the config")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--fresh", action="store_true", help="discard what output_path holds of an earlier run")
    how.add_argument("--retry-failed", action="store_true", help="score again the rows whose failure may have passed "
                                                                 "(timeout, connect, dns, 429, 5xx)")
    how.add_argument("--verify", action="store_true", help="check every part of output_path bit by bit; score nothing")
    how.add_argument("--plan", action="store_true", help="score a few hundred rows and tell what the whole input will cost")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("--version", action="version", version=__version__)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Config -> plan -> parts -> results. Returns the exit code; the last line on stdout is one JSON object."""
    options = parse_arguments(arguments)
    config = load_config(options.config, options.set)
    job = Job(config, options.fresh, options.retry_failed, options.quiet)
    if options.verify:
        return int(addon("results.verify", "--verify").verify(job))
    if options.plan:
        return int(addon("results.cost", "--plan").tell_cost(job))
    find_measures(config)  # an unknown one is told before any work
    curve: MemoryCurve | None = None
    if ADDONS.is_dir():
        curve = addon("results.memory_curve", "memory-time.png").MemoryCurve(job.clock)
    else:
        say("the folder addons/ is not next to the script: no progress bar, percentiles, score passport, memory-time.png "
            "or watch over images that crash")
    stopped: Trouble | None = None
    try:
        finalises = find_engine(config)(job)
    except Trouble as trouble:
        if trouble.exit_code != EXIT_FAILURES:
            raise
        stopped = trouble  # the rows that were done are worth having: write them, then say why it stopped
        finalises = True
    finally:
        if curve:
            curve.stop()
    result = finalize(job, curve) if finalises else None
    if result:
        with output_disk("the summary to stdout"):
            print(json.dumps(result), flush=True)  # in ASCII, which any stdout can take
    if stopped:
        raise stopped
    if result:
        check_result(job, result)
    return 0


def check_result(job: Job, result: Json) -> None:
    """Raise Trouble (exit 7) for rows that nobody tried, or scores that drift by more than allowed."""
    config = job.config
    if "not_tried" in result["failed"]:
        raise Trouble(EXIT_VERIFY, f"{result['failed']['not_tried']} rows were not tried, because parts of {job.plan.output} "
                                   "went away meanwhile: the same command does them")
    if config.max_score_drift is not None and config.pretrained_model != "none":
        addon("measures.passport", "max_score_drift").refuse_excess(job.read_profile(), config.max_score_drift)


def run() -> typing.NoReturn:
    """`main` with its endings: one line for a user's mistake, 128 + n for a signal, a traceback for a bug."""
    INTERRUPTION.install()
    sys.stderr = sys.stderr or io.StringIO()  # closed by whoever started us: the talk is lost, no more
    try:
        code = main()
    except Trouble as trouble:
        say(f"error: {trouble}")
        code = trouble.exit_code
    except ModuleNotFoundError as error:
        if (error.name or "addons").partition(".")[0] == "addons":
            raise
        say(f"error: the package {error.name} is missing: {INSTALL}")
        code = EXIT_CONFIG
    except Interrupted as interrupted:
        say("interrupted: finished partitions are kept, the same command resumes")
        code = 128 + interrupted.signum
        if not PROFILED:  # loader threads may sit in a fetch until its deadline; who pressed Ctrl-C does not wait for them
            os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    sys.path.insert(0, str(ADDONS.parent))  # which `python -I` and PYTHONSAFEPATH leave out
    import image_text_sim_clip  # the same file under its own name, from which the add-ons import
    image_text_sim_clip.run()
