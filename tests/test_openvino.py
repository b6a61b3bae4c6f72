"""`runtime: openvino`: the same scores as torch's within what is stated, and the same bytes from every way to compute them."""
import importlib.util
import json
import pathlib
import resource
import shutil
import signal
import sys
import threading
import time

import numpy as np
import open_clip_models
import pytest
import torch
from family_models import FAMILIES, FamilyShelf
from models import ARCHITECTURES

import image_text_sim_clip as script
from addons.models import openvino_convert, openvino_runtime

# looked for and not imported: the program itself is to import them, without their telemetry
pytestmark = pytest.mark.skipif(not all(importlib.util.find_spec(name) for name in ("openvino", "nncf")),
                                reason="needs openvino and nncf")

ROOT = pathlib.Path(script.__file__).parent
MODEL = str(ROOT / "challenge_set/shapes_clip")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
# models in open_clip's format: a plain ViT, a text tower that reads the whole context, a tower of timm's
OPEN_CLIP = {f"open_clip, {name}": name for name in ("quickgelu", "clipa", "siglip")}
REFUSED = {"siglip2": "each in its own shape", "align": "cannot convert align models"}  # NaFlex; EfficientNet
BITS = [{}, {"dtype": "bfloat16"}, {"quantization": "int8"}]
CAPTIONS = ["a large cyan star on a black background", "a cat", "a small red circle left of a large blue square " * 6]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of this module's own, in which each conversion is made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield openvino_convert.cache_folder()


def load(model=MODEL, **keys):
    """A Scorer under OpenVINO."""
    return script.Scorer(script.Config(pretrained_model=str(model), use_cuda=False, **{"runtime": "openvino", **keys}))


def pixels_for(scorer, count, seed=0):
    """(count, 3, H, W) random bytes of the size that the model reads."""
    side = scorer.settings.crop or scorer.settings.resized(1, 1)
    return torch.randint(0, 256, (count, 3, *side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# ── Nothing changes a bit ─────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.slow
@pytest.mark.parametrize("keys", BITS, ids=["float32", "bfloat16", "int8"])
def test_batch_size_order_and_threads_change_no_bit(keys, monkeypatch):
    """An image and a caption get the same embedding alone, in any batch, in any place, and from any number of threads."""
    whole = load(**keys, batch_size=16)
    pixels = pixels_for(whole, 19)
    images = whole.encode_images(pixels)
    captions = CAPTIONS + [f"{number} green triangles" for number in range(30)]
    texts = whole.encode_texts(whole.tokenize(captions)[0])
    assert torch.equal(torch.cat([whole.encode_images(part) for part in pixels.split(7)]), images)
    assert torch.equal(torch.cat([whole.encode_images(image[None]) for image in pixels]), images)
    assert torch.equal(whole.encode_images(pixels.flip(0)).flip(0), images)
    assert torch.equal(whole.encode_texts(whole.tokenize(captions[::-1])[0]).flip(0), texts)
    for cores in (1, 3):
        monkeypatch.setattr(script, "usable_cores", lambda cores=cores: cores)
        other = load(**keys, batch_size=3)
        assert other.lanes == cores
        assert torch.equal(other.encode_images(pixels), images)
        assert torch.equal(other.encode_texts(other.tokenize(captions)[0]), texts)


@pytest.fixture
def scored(tmp_path, write_config):
    """Config of an int8 run with the bundled model over 120 pairs in 40 partitions, its conversion made."""
    load(quantization="int8")
    lines = (ROOT / "challenge_set/shapes.csv").read_text().splitlines(keepends=True)
    (tmp_path / "table.csv").write_text("".join(lines[:121]))
    return write_config(csv_path=str(tmp_path / "table.csv"), image_path=str(ROOT / "challenge_set/shapes"),
                        pretrained_model=MODEL, partition_rows=3, quantization="int8", runtime="openvino", parity_rows=8)


def outcome_of(folder):
    """What a run is for: the results and every part, as bytes."""
    return {path.name: path.read_bytes() for path in sorted([folder / "scores.csv", *folder.glob("parts/*.parquet")])}


@pytest.fixture
def undisturbed(scored, run_main, tmp_path):
    """The bytes of a run that nothing disturbs."""
    assert run_main("--config", scored, "--set", f"output_path={tmp_path / 'undisturbed'}").result["scored"] == 120
    return outcome_of(tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_and_resumed_is_the_undisturbed_run(scored, undisturbed, start_cli, run_main, tmp_path):
    """kill -9 after some parts, and the same command again: every byte is the undisturbed run's."""
    process = start_cli("--config", scored)
    until = time.monotonic() + 300
    while len(list((tmp_path / "out/parts").glob("part-*.parquet"))) < 5 and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out/scores.csv").exists()
    assert run_main("--config", scored).code == 0
    assert outcome_of(tmp_path / "out") == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", ["torchrun", "ray"])
def test_engines_give_the_undisturbed_bytes(way, scored, undisturbed, start_cli, tmp_path):
    """Two ranks and Ray's actors take the conversion from the cache and give every byte of the undisturbed run."""
    process = (start_cli("--config", scored, interpreter=TORCHRUN) if way == "torchrun"
               else start_cli("--config", scored, "--set", "engine=ray", "--set", "ray_workers=2"))
    stderr = process.communicate(timeout=500)[1]
    assert process.returncode == 0, stderr[-2000:]
    assert "converts" not in stderr
    assert outcome_of(tmp_path / "out") == undisturbed


def test_first_call_is_made_before_there_are_lanes(monkeypatch):
    """OpenVINO is called once by the thread that loads the model: it sets itself up in the first call, and two lanes whose
    first calls came together waited for each other for ever."""
    callers = []
    call = openvino_runtime.Compiled.__call__

    def noting_call(encoder, values):
        callers.append(threading.current_thread().name)
        return call(encoder, values)
    monkeypatch.setattr(openvino_runtime.Compiled, "__call__", noting_call)
    scorer = load()
    assert callers == [threading.current_thread().name]
    scorer.encode_texts(scorer.tokenize(CAPTIONS)[0])
    assert {name.split("_")[0] for name in callers[1:]} == {"lane"}


# ── Near to torch ─────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.slow
@pytest.mark.parametrize(("keys", "most", "changed"), [({}, 1e-5, 0.0), ({"dtype": "bfloat16"}, 1e-2, 0.03),
                                                       ({"quantization": "int8"}, 1e-2, 0.03)])
def test_drift_on_the_bundled_model(keys, most, changed, shapes, run_main, read_table, tmp_path):
    """99 % of the 600 drawings' scores are within 1e-2 of torch's float32, and at most 3 % of the best 30 % are others."""
    tables = []
    for name, settings in (("torch", {"runtime": "torch"}), ("openvino", {"runtime": "openvino", **keys})):
        assert run_main("--config", shapes(pretrained_model=MODEL, output_path=str(tmp_path / name), parity_rows=8,
                                           **settings)).code == 0
        tables.append(np.array([float(row["similarity"]) for row in read_table(tmp_path / name / "scores.csv")]))
    plain, fast = tables
    assert np.quantile(np.abs(plain - fast), 0.99) <= most
    count = int(0.3 * len(plain))
    best = {name: set(np.argsort(-table, kind="stable")[:count]) for name, table in (("plain", plain), ("fast", fast))}
    assert len(best["plain"] - best["fast"]) <= changed * count
    drift = json.loads((tmp_path / "openvino/profile.json").read_text())["passport"]
    assert drift["rows"] == 8
    assert drift["max_difference"] > 0


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, shelf):
    """The model folder of an architecture or of a further family, by its name."""
    families = FamilyShelf(tmp_path_factory.mktemp("families"))
    open_clip = tmp_path_factory.mktemp("open-clip")

    def find(name):
        if name in OPEN_CLIP:
            return open_clip_models.write_model(open_clip / name, OPEN_CLIP[name])
        return families(name) if name in FAMILIES else shelf(name)
    return find


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [*ARCHITECTURES, *FAMILIES, *OPEN_CLIP])
def test_every_family_runs_or_is_refused(name, folder_of):
    """Each family gives torch's embeddings in float32 and, with int8, nearly those; or it is refused in one line."""
    folder = folder_of(name)
    if name in REFUSED:
        with pytest.raises(script.Trouble, match=f"{REFUSED[name]}: set runtime: torch") as refused:
            load(folder)
        assert refused.value.exit_code == script.EXIT_CONFIG
        assert load(folder, quantization="int8", runtime="auto").encoders.kind == name
        return
    plain = load(folder, runtime="torch")
    pixels = pixels_for(plain, 3)
    ids, _ = plain.tokenize(["a photo of a cat", "two dogs on a red table " * 20])
    for keys, least in (({}, 0.99999), ({"quantization": "int8"}, 0.98)):
        fast = load(folder, **keys)
        assert isinstance(fast.encoders, openvino_runtime.Encoders)
        assert (fast.encode_images(pixels) * plain.encode_images(pixels)).sum(-1).min() > least
        assert (fast.encode_texts(ids) * plain.encode_texts(ids)).sum(-1).min() > least


def test_another_model_is_computed_by_torch():
    """What is not finite is computed again by the plain float32 model that is handed over, not by the conversion."""
    scorer = load()
    plain = scorer.load_plain()
    pixels = pixels_for(scorer, 2)
    ids = torch.tensor(scorer.tokenize(["a cat"])[0])
    family = scorer.family
    with torch.inference_mode():
        assert torch.equal(scorer.encoders.features_of_bytes(plain, pixels, scorer.pixel_levels),
                           family.features_of_bytes(plain, pixels, scorer.pixel_levels))
        assert torch.equal(scorer.encoders.text_features(plain, ids), family.text_features(plain, ids))


# ── What is chosen, and what is refused ───────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("keys", "is_fast"), [({}, False), ({"dtype": "bfloat16"}, False), ({"quantization": "int8"}, True),
                                               ({"quantization": "int8", "runtime": "torch"}, False),
                                               ({"runtime": "openvino"}, True)])
def test_auto_takes_it_for_int8(keys, is_fast):
    """`auto` is OpenVINO for int8 and torch for the rest; `torch` and `openvino` are what they say."""
    scorer = load(**{"runtime": "auto", **keys})
    assert (scorer.identity().get("runtime") == "openvino") == is_fast
    assert isinstance(scorer.encoders, openvino_runtime.Encoders) == is_fast


@pytest.mark.parametrize("package", ["openvino", "nncf"])
def test_missing_package(package, monkeypatch, shapes, run_main, tmp_path):
    """Without a package `openvino` is exit 2 in one line that tells the pip install; `auto` computes in torch."""
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    outcome = run_main("--config", shapes(rows=3, pretrained_model=MODEL, quantization="int8", runtime="openvino"))
    assert outcome.code == script.EXIT_CONFIG
    assert f"needs the package {package} (pip install -r addons/requirements-cpu.txt)" in outcome.stderr
    assert load(quantization="int8", runtime="auto").quantization.startswith("int8 by ")
    assert load(quantization="int8", runtime="auto").encoders.kind == "clip"


@pytest.mark.parametrize(("keys", "words"), [({"dtype": "float16"}, "no dtype: float16; take float32 or bfloat16"),
                                             ({"compile": True}, "set compile: false")])
def test_settings_that_do_not_go_together(keys, words):
    """What OpenVINO does not do is exit 2 in one line."""
    with pytest.raises(script.Trouble, match=words) as refused:
        load(**keys)
    assert refused.value.exit_code == script.EXIT_CONFIG


def test_nothing_is_reported_to_anybody():
    """The packages' telemetry cannot be imported, so that they send nothing."""
    load()
    assert sys.modules["openvino_telemetry"] is None


# ── The conversion ────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.slow
@pytest.mark.timeout(300)
def test_conversion_is_the_same_each_time(monkeypatch, tmp_path, capfd):
    """Made anew, with other settings of the run, a conversion has the same hash; both encoders are told on stderr."""
    digest = load(quantization="int8").identity()["conversion"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    capfd.readouterr()
    again = load(quantization="int8", transparent_over="black", preprocess="exact", batch_size=5, decode="scaled")
    told = capfd.readouterr()
    assert again.identity()["conversion"] == digest
    assert "converts the image encoder, once for this model" in told.err
    assert "converts the text encoder, once for this model" in told.err
    assert told.out == ""
    load(quantization="int8")
    assert "converts" not in capfd.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_damaged_conversion_is_made_anew(damage, cache):
    """A conversion that is not what had been written is never computed with."""
    scorer = load()
    folder = openvino_convert.find_conversion(scorer)
    path = folder / "text.bin"
    before = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(before[:-9] if damage == "cut" else bytes([before[0] ^ 1]) + before[1:])
    assert not openvino_convert.is_whole(folder)
    assert load().identity()["conversion"] == scorer.identity()["conversion"]
    assert path.read_bytes() == before


def test_conversion_that_does_not_end_leaves_nothing(monkeypatch, tmp_path):
    """One that is stopped half-way is not there, and the next one is whole."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def stop(model, tower, items, config):
        if items[0].ndim == 2:  # captions, which come last
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(openvino_convert, "check_parity", stop)
        with pytest.raises(KeyboardInterrupt):
            load()
    assert [path.name for path in openvino_convert.cache_folder().iterdir() if not path.name.endswith(".lock")] == []
    assert openvino_convert.is_whole(openvino_convert.find_conversion(load()))


def test_resumption_with_another_conversion_is_refused(scored, run_main, monkeypatch, tmp_path):
    """The manifest holds the conversion's hash: a worker with another one is refused in one line."""
    out = tmp_path / "out"
    assert run_main("--config", scored, "--set", "limit=30").code == 0
    assert script.read_manifest(out)["resolved"]["conversion"] == load(quantization="int8").identity()["conversion"]
    next(iter((out / "parts").glob("*.parquet"))).unlink()
    monkeypatch.setattr(openvino_convert, "read_digest", lambda folder: "another")
    outcome = run_main("--config", scored, "--set", "limit=30")
    assert outcome.code == script.EXIT_CONFIG
    assert "conversion was" in outcome.stderr


def test_features_that_differ_are_refused(monkeypatch, tmp_path, capfd):
    """A conversion whose features are not torch's is exit 6 in one line, and is not kept; `auto` says so and takes torch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(openvino_convert.Tower, "forward",
                        lambda self, values: values.flatten(1)[:, :1].float() * torch.rand(1, 64))
    with pytest.raises(script.Trouble, match=r"other features than torch does|cannot convert") as refused:
        load()
    assert refused.value.exit_code == script.EXIT_MODEL
    assert not list(openvino_convert.cache_folder().glob("*/*"))
    assert load(quantization="int8", runtime="auto").encoders.kind == "clip"
    told = capfd.readouterr().err
    assert "set runtime: torch; running in torch" in told


def test_conversion_that_does_not_compute_is_refused(monkeypatch, tmp_path):
    """A conversion that computes only as many items as it was traced with is exit 6 in one line, and is not kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(openvino_convert.Tower, "forward", lambda self, values: torch.cat(
        [values.flatten(1)[:, :64].float(), torch.ones(len(values), 64)], dim=1))
    with pytest.raises(script.Trouble, match=r"does not compute .*: set runtime: torch") as refused:
        load()
    assert refused.value.exit_code == script.EXIT_MODEL
    assert not list(openvino_convert.cache_folder().glob("*/*.bin"))


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    """A cache that is no folder is exit 5 in one line that names XDG_CACHE_HOME."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(script.Trouble, match="XDG_CACHE_HOME") as refused:
        load()
    assert refused.value.exit_code == script.EXIT_DISK


def test_a_cache_without_room(monkeypatch, tmp_path):
    """A disk on which a conversion has no room is exit 5 in one line, nothing half-written stays, and with room it is made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))  # bytes of a file, of several megabytes
    try:
        with pytest.raises(script.Trouble, match=r"cannot keep the converted model.*MB are free; XDG") as refused:
            load()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert refused.value.exit_code == script.EXIT_DISK
    assert [path.suffix for path in (tmp_path / "image_text_sim_clip/openvino").iterdir()] == [".lock"]
    assert load().encoders.quantization == "none"


@pytest.mark.parametrize("change", ["gone", "another"])
def test_no_calibration_on_another_set(change, monkeypatch, tmp_path):
    """int8 is calibrated on the bundled set and on no other: without it exit 2 in one line, unless the cache has the model."""
    load(quantization="int8")
    if change == "another":
        shutil.copytree(ROOT / "challenge_set", tmp_path / "set")
        (tmp_path / "set/shapes.csv").write_text("url,caption\na.png,my own caption\n")
    monkeypatch.setattr(openvino_convert, "CALIBRATION_SET", tmp_path / "set")
    load(quantization="int8")  # from the cache
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(script.Trouble, match="they are missing or others") as refused:
        load(quantization="int8")
    assert refused.value.exit_code == script.EXIT_CONFIG


def test_progress_is_told(monkeypatch, capfd):
    """While it calibrates it tells every few seconds how far it is."""
    monkeypatch.setattr(openvino_convert, "SAY_EVERY_S", -1.0)
    progress = openvino_convert.Progress("calibrating the image encoder", passes=4)
    assert [progress.count(number) for number in range(4)] == [0, 1, 2, 3]
    assert capfd.readouterr().err.splitlines()[1] == "runtime: openvino, calibrating the image encoder: 50 %"
    assert len(openvino_convert.calibration_captions()) > 100
