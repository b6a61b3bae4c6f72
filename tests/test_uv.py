"""`uv run image_text_sim_clip.py`: the script's first lines name what requirements.txt names, and uv makes them work."""
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMAND = "uv run image_text_sim_clip.py --config challenge_set/demo.yaml"


def inline_metadata():
    """The script's PEP 723 metadata, read with the expression that the PEP gives."""
    text = (ROOT / "image_text_sim_clip.py").read_text(encoding="utf-8")
    blocks = list(re.finditer(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$", text))
    assert [block["type"] for block in blocks] == ["script"]
    return tomllib.loads("".join(line[2:] or "\n" for line in blocks[0]["content"].splitlines(keepends=True)))


def requirements():
    """The lines of requirements.txt without their comments."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line.partition("#")[0].strip() for line in lines if line.partition("#")[0].strip()]


def find_uv():
    """The path of uv, from PATH or from the environment that runs the tests."""
    if importlib.util.find_spec("uv"):
        import uv
        return uv.find_uv_bin()
    return shutil.which("uv")


def cpu_wheels():
    """Where pip looks for wheels besides the index, as it is configured; "" for nowhere."""
    from_environment = os.environ.get("PIP_FIND_LINKS", "")
    if from_environment:
        return from_environment
    asked = subprocess.run([sys.executable, "-m", "pip", "config", "get", "global.find-links"], capture_output=True, text=True)
    return asked.stdout.strip()


@pytest.fixture(scope="module")
def uv():
    """Run uv in the repository as a command would, with the Python of the tests and the CPU build of torch."""
    binary = find_uv()
    if not binary:
        pytest.skip("uv is neither on PATH nor installed next to pytest")
    wheels = cpu_wheels()
    if not wheels:
        pytest.skip("pip is configured with no find-links, so uv would download the CUDA build of torch, 2.9 GB")
    settings = {"UV_FIND_LINKS": ",".join(wheels.split()),  # uv does not read pip's configuration
                "UV_SYSTEM_CERTS": "1",                     # the certificates that pip trusts, where a proxy has its own
                "UV_PYTHON_DOWNLOADS": "never", "UV_PYTHON": sys.executable, "MPLBACKEND": "Agg"}

    def run(*arguments):
        return subprocess.run([binary, *arguments], cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)

    resolved = run("pip", "compile", "--quiet", "--no-header", "--no-annotate", "image_text_sim_clip.py")
    assert resolved.returncode == 0, resolved.stderr
    if not re.search(r"^torch==[\d.]+\+cpu$", resolved.stdout, re.M):
        pytest.skip("pip's find-links have no CPU build of this torch, so uv would download the CUDA build, 2.9 GB")
    return run


def test_inline_metadata_equals_requirements():
    """The names and versions in the script's first lines are those of requirements.txt, in its order."""
    metadata = inline_metadata()
    assert metadata["dependencies"] == requirements()
    assert metadata["requires-python"] == ">=3.11"


def test_readme_shows_the_command():
    """The command that is tested here is the one that the README shows."""
    assert COMMAND in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(600)  # the first time, uv downloads 0.3 GB
def test_uv_runs_the_demo(uv, tmp_path):
    """uv makes an environment from the script's first lines and scores the bundled drawings in it."""
    done = uv(*COMMAND.split()[1:], "--set", f"output_path={tmp_path / 'scores'}")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["scored"] == result["rows"] == 600
    assert result["mean_similarity"] == pytest.approx(0.4852, abs=1e-3)
    assert (tmp_path / "scores" / "scores.csv").is_file()
