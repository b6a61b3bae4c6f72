"""What the tests share: the script as a command and as a module, configs, tables, pictures, and no network."""
import contextlib
import csv
import dataclasses
import io
import ipaddress
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub, which reads it once
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and torch's threads would wait for each other's cores

import image_text_sim_clip as script  # noqa: E402
from addons import inputs  # noqa: E402
from addons.results import memory_curve  # noqa: E402


def stage(config, output):
    """Stage a config's table into `output`, as a run does; returns the manifest's part of it."""
    with script.output_disk(output):
        return inputs.find_reader(config.csv_path).describe(config, pathlib.Path(output))


@dataclasses.dataclass
class Outcome:
    """How a run ended: exit code, what it said, and the JSON object on the last line of stdout (None without one)."""

    code: int
    stdout: str
    stderr: str

    @property
    def result(self):
        lines = self.stdout.strip().splitlines()
        return json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None


def _is_near(address):
    """Whether a socket address stays on this machine."""
    if not isinstance(address, tuple):
        return True  # a Unix socket
    host = address[0]
    if host in ("localhost", ""):
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def no_network(request, monkeypatch):
    """Fail every test that connects beyond loopback, even where the code under test swallows the error."""
    if request.node.get_closest_marker("hub"):
        yield
        return
    tried = []
    for name in ("connect", "connect_ex"):
        original = getattr(socket.socket, name)

        def guarded(self, address, original=original):
            if not _is_near(address):
                tried.append(address)
                raise AssertionError(f"a test tried to connect to {address}")
            return original(self, address)
        monkeypatch.setattr(socket.socket, name, guarded)
    yield
    assert not tried, f"a test tried to connect to {tried}"


def _environment(changes):
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {k: v for k, v in {**os.environ, **quiet, **(changes or {})}.items() if v is not None}


@pytest.fixture
def start_cli(tmp_path):
    """Start the script with the arguments given and return the Popen; what still runs at the test's end is killed."""
    started = []

    def start(*arguments, cwd=None, env=None, interpreter=(), script_path=ROOT / "image_text_sim_clip.py", **options):
        command = [sys.executable, *interpreter, str(script_path), *map(str, arguments)]
        process = subprocess.Popen(command, cwd=cwd or tmp_path, env=_environment(env), stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", **options)
        started.append(process)
        return process
    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture
def run_cli(start_cli):
    """Run the script as a command in tmp_path and return its Outcome."""
    def run(*arguments, timeout=60, **options):
        process = start_cli(*arguments, **options)
        stdout, stderr = process.communicate(timeout=timeout)
        return Outcome(process.returncode, stdout, stderr)
    return run


@pytest.fixture
def run_main(monkeypatch, capfd):
    """Run `main` in this process, without the memory curve and its slow picture; Trouble becomes line and exit code."""
    def run(*arguments):
        capfd.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(memory_curve, "MemoryCurve", lambda clock: None)
            try:
                code = script.main([str(a) for a in arguments])
            except script.Trouble as trouble:
                script.say(f"error: {trouble}")
                code = trouble.exit_code
        return Outcome(code, *capfd.readouterr())
    return run


@pytest.fixture
def late(monkeypatch):
    """While in this context, the picture of that name cannot be read in time."""
    @contextlib.contextmanager
    def wait_for(name):
        read = script.read_file

        def read_or_time_out(folder, source, **options):
            if source == name:
                raise script.RowFailure("timeout", "")
            return read(folder, source, **options)
        with monkeypatch.context() as patch:
            patch.setattr(script, "read_file", read_or_time_out)
            yield
    return wait_for


@pytest.fixture
def write_config(tmp_path):
    """Write config.yaml: a dry run of table.csv over the folder pictures/ into out/, all in tmp_path, unless told otherwise."""
    def write(name="config.yaml", **keys):
        values = {"csv_path": str(tmp_path / "table.csv"), "image_path": str(tmp_path / "pictures"), "use_cuda": False,
                  "pretrained_model": "none", "output_path": str(tmp_path / "out"), **keys}
        (tmp_path / "pictures").mkdir(exist_ok=True)
        path = tmp_path / name
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path
    return write


@pytest.fixture
def write_table(tmp_path):
    """Write table.csv in tmp_path, from bytes, from text, or from rows that Python's csv module quotes."""
    def write(content, name="table.csv"):
        if not isinstance(content, (str, bytes)):
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(content)
            content = text.getvalue()
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path
    return write


@pytest.fixture
def read_table():
    """Read a CSV back with Python's csv module as a list of dicts; a row of another length fails."""
    def read(path):
        with open(path, encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file, strict=True)
        assert len(set(header)) == len(header)
        return [dict(zip(header, row, strict=True)) for row in rows]
    return read


@pytest.fixture
def score_input(tmp_path, write_config, run_main, read_table):
    """Dry-run an input, given as a path in tmp_path: (Outcome, rows of scores.csv, rows of bad_rows.csv, manifest)."""
    def run(csv_path, *arguments, **keys):
        outcome = run_main("--config", write_config(csv_path=str(tmp_path / csv_path), **keys), *arguments)
        out = tmp_path / "out"
        tables = (read_table(out / name) if (out / name).exists() else None for name in ("scores.csv", "bad_rows.csv"))
        manifest = json.loads((out / "manifest.json").read_text()) if (out / "manifest.json").exists() else None
        return outcome, *tables, manifest
    return run


@pytest.fixture
def picture_bytes():
    """Bytes of a picture in one colour, or of the Pillow picture given: picture_bytes("PNG", mode="L", colour=7)."""
    from PIL import Image

    def make(format_="PNG", mode="RGB", size=(40, 30), colour=0, image=None, **options):
        data = io.BytesIO()
        (image or Image.new(mode, size, colour)).save(data, format_, **options)
        return data.getvalue()
    return make


@pytest.fixture
def noise():
    """A smooth picture with detail in it, the same for the same seed: noise(width, height)."""
    import numpy as np
    from PIL import Image

    def make(width, height, seed=0, mode="RGB"):
        rng = np.random.default_rng(seed)
        coarse = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        fine = rng.integers(-12, 13, (height, width, 3))
        return Image.fromarray((np.asarray(image) + fine).clip(0, 255).astype(np.uint8)).convert(mode)
    return make


@pytest.fixture
def shapes(tmp_path, write_config):
    """Config keys for the bundled drawings: shapes(times, **keys) repeats shapes.csv `times` times into table.csv."""
    def make(times=1, rows=None, **keys):
        header, *lines = (ROOT / "challenge_set/shapes.csv").read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / "table.csv").write_text("".join([header, *(lines * times)[:rows]]), encoding="utf-8")
        return write_config(image_path=str(ROOT / "challenge_set/shapes"), **keys)
    return make


BUNDLED_MODEL = str(ROOT / "challenge_set/shapes_clip")


@pytest.fixture
def bundled_model():
    """The path of the small model in challenge_set/."""
    return BUNDLED_MODEL


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    """Model folders by the name of a published architecture, each built on first use: shelf("siglip-base"), see models.py."""
    from models import ModelShelf
    return ModelShelf(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def pipeline_shelf(tmp_path_factory):
    """Folders of tiny text-to-image pipelines by their family, each built on first use: pipeline_shelf("flux")."""
    from tiny_pipelines import PipelineShelf
    return PipelineShelf(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(scope="session")
def s3_endpoint():
    """The URL of an S3 server on loopback."""
    import store_server
    with store_server.s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3_endpoint, monkeypatch):
    """A new bucket, which the script finds as it would find one of AWS."""
    import store_server
    for name, value in {**store_server.CREDENTIALS, "AWS_ENDPOINT_URL": s3_endpoint}.items():
        monkeypatch.setenv(name, value)
    return store_server.Bucket(s3_endpoint)


# ── A browser ─────────────────────────────────────────────────────────────────────────────────────────────────────────

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium with a new profile."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -r tests/requirements.txt")
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(str(tmp_path_factory.mktemp("profile")), executable_path=CHROMIUM,
                                                            args=FLAGS, headless=True)
        yield context
        context.close()
