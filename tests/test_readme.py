"""The README says what is true: its commands run, its tables match the code, its pictures exist."""
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import image_text_sim_clip as script
from addons import curation

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    """The fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def masked(text):
    """Text with its numbers, which differ from machine to machine, and its column widths blanked out."""
    return re.sub(r"\s+", " ", re.sub(r"[\d.,]*\d", "#", text)).strip()


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What a clone holds, in a folder of its own, with `python` and `mprof` being this environment's."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("image_text_sim_clip.py", "curate.py", "config.yaml", "addons", "challenge_set"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    return folder


def shell(command, folder):
    """Run one of the README's lines."""
    environment = os.environ | {"PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                                "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    return subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=110)


@pytest.mark.slow
def test_console_blocks_print_what_they_show(clone):
    """A command after `$` runs and prints the lines shown beneath it, numbers aside."""
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, _, expected = part.partition("\n")
            done = shell(command, clone)
            assert done.returncode == 0, done.stderr
            assert masked(expected) == masked(done.stderr + done.stdout), command


@pytest.mark.slow
def test_shell_blocks_run(clone):
    """Every command of the `sh` blocks ends well, but for the ones that need the Hub or run these tests."""
    commands = [line.split("    #")[0] for block in blocks("sh") for line in block.splitlines() if line.strip()]
    assert len(commands) >= 5
    for command in commands:
        done = shell(command, clone) if not command.startswith("make") else None
        if command.endswith("--config config.yaml"):
            assert done.returncode == 6
            assert "challenge_set/demo.yaml" in done.stderr
        elif done:
            assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.slow
def test_python_blocks_run(clone):
    """The Python examples run as they stand, after the demo."""
    assert shell("python image_text_sim_clip.py --config challenge_set/demo.yaml", clone).returncode == 0
    for block in blocks("python"):
        done = subprocess.run([sys.executable, "-c", block], cwd=clone, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_make_targets_exist():
    """Every `make` target that the README names is in the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", README, re.M)) <= targets


def test_key_table_is_complete():
    """The table of keys names every key of the config, with its default."""
    fields, listed = {field.name: field.default for field in dataclasses.fields(script.Config)}, {}
    for names, defaults in re.findall(r"^\| (`[^|]+`) \| ([^|]+) \|", README, re.M):
        keys = [key for key in re.findall(r"`(\w+)`", names) if key in fields]
        values = defaults.split(", ") if len(keys) > 1 and ", " in defaults else [defaults] * len(keys)
        listed |= dict(zip(keys, values, strict=True))
    assert listed.keys() == fields.keys()
    del fields["curate"]  # a section, with a table of its own
    for name, default in fields.items():
        as_yaml = {True: "true", False: "false", None: "null"}
        shown = as_yaml[default] if isinstance(default, bool | None) else str(default)
        assert shown.startswith(listed[name].strip(' "').rstrip("… ")), name


def test_curate_table_is_complete():
    """The table of the section `curate` names every key, with its default."""
    section = README.split("\n## Curate\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]+`) \| ([^|]+) \|", section, re.M)
    listed = [pair for names, values in rows for pair in zip(re.findall(r"`(\w+)`", names), values.split(", "), strict=True)]
    as_yaml = {True: "true", False: "false", None: "null"}
    expected = [(field.name, as_yaml[field.default] if isinstance(field.default, bool | None) else str(field.default))
                for field in dataclasses.fields(curation.Curation)]
    assert listed == expected


def test_status_and_exit_code_tables_are_complete():
    """Every status that a run can give, and every exit code, is explained."""
    promised_for_later = {"crashed", "oom"}
    for status in set(script.STATUSES) - promised_for_later:
        assert f"`{status}`" in README, status
    for name in ("CONFIG", "INPUT", "FAILURES", "DISK", "MODEL", "VERIFY"):
        assert re.search(rf"^\| {getattr(script, f'EXIT_{name}')} \|", README, re.M), name


def test_links_and_pictures_exist():
    """Every relative link leads to a file."""
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_promises_are_kept_by_tests_that_exist():
    """Each promise names tests, and each test named is there."""
    table = README.split("### What we promise")[1].split("\n\n")[2]
    for line in table.splitlines()[2:]:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", line)
        assert named, line
        for file, test in named:
            assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test
