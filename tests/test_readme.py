"""README.md and the rooms' pages say what is true: commands run, tables match the code, links lead somewhere."""
import dataclasses
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import image_text_sim_clip as script
from addons.curation import rules

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROOMS = ("inputs", "images", "models", "measures", "engines", "results", "stores", "curation")
PAGES = [ROOT / "README.md", *(ROOT / "addons" / room / "README.md" for room in ROOMS), ROOT / "examples" / "README.md"]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
AS_YAML = {True: "true", False: "false", None: "null"}


@functools.cache
def text_of(page):
    """A page's text."""
    return page.read_text(encoding="utf-8")


README = text_of(PAGES[0])


def blocks(page, language):
    """The fenced blocks of one language that are to be run."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.S | re.M)


def files_shown(page):
    """The fenced blocks that are a whole file, as (path in the repository, text)."""
    return re.findall(r"^```python (\S+)\n(.*?)^```", text_of(page), re.S | re.M)


def keys_listed(text, fields):
    """Key -> default of each row of a page's tables whose first cell names keys that are among `fields`."""
    listed = {}
    for names, defaults in re.findall(r"^\| (`[^|]+`) \| ([^|]+) \|", text, re.M):
        keys = [key for key in re.findall(r"`(\w+)`", names) if key in fields]
        values = defaults.split(", ") if len(keys) > 1 and ", " in defaults else [defaults] * len(keys)
        listed |= dict(zip(keys, values, strict=True))
    return listed


def masked(text):
    """Text without what differs from machine to machine: numbers, column widths, and which stage the others wait for."""
    text = re.sub(r"(limited by|change first) +.+", r"\1 #", text)
    text = re.sub(r'("limited_by"|"change_first"): "[^"]+"', r'\1: "#"', text)
    return re.sub(r"\s+", " ", re.sub(r"[\d.,]*\d", "#", text)).strip()


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What a clone holds, in a folder of its own, with the files that the pages show in their rooms; the demo has run."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("image_text_sim_clip.py", "curate.py", "config.yaml", "addons", "challenge_set"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    for page in PAGES:
        for path, text in files_shown(page):
            (folder / path).write_text(text, encoding="utf-8")
    demo = shell("python image_text_sim_clip.py --config challenge_set/demo.yaml", folder)
    assert demo.returncode == 0, demo.stderr
    return folder


def shell(command, folder):
    """Run one of the pages' lines, with `python` and `mprof` being this environment's."""
    environment = os.environ | {"PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                                "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    return subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=110)


# ── What the pages show runs ──────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.slow
@pages
def test_console_blocks_print_what_they_show(clone, page):
    """A command after `$` runs and prints the lines shown beneath it, numbers aside."""
    for block in blocks(page, "console"):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, _, expected = part.partition("\n")
            done = shell(command, clone)
            assert done.returncode == 0, done.stderr
            assert masked(expected) == masked(done.stderr + done.stdout), command


@pytest.mark.slow
@pages
def test_shell_and_python_blocks_run(clone, page):
    """Every command of the `sh` blocks ends well, and then every Python example runs as it stands and prints something.

    Left out are the commands that run these tests or need the Hub, and uv, which test_uv.py runs.
    """
    for line in "".join(blocks(page, "sh")).splitlines():
        command = line.split("    #")[0]
        if command.startswith(("make ", "uv ")):
            continue
        done = shell(command, clone)
        if command.endswith("--config config.yaml"):
            assert done.returncode == 6
            assert "challenge_set/demo.yaml" in done.stderr
        else:
            assert done.returncode == 0, f"{command}\n{done.stderr}"
    for block in blocks(page, "python"):
        done = subprocess.run([sys.executable, "-c", block], cwd=clone, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_pages_hold_blocks_of_each_kind():
    """The patterns above find what they are made for."""
    found = {language: sum(len(blocks(page, language)) for page in PAGES) for language in ("console", "sh", "python")}
    assert all(count >= 4 for count in found.values()), found
    assert sum(len(files_shown(page)) for page in PAGES) >= 6
    assert sum(text_of(page).count("```python") for page in PAGES) \
        == found["python"] + sum(len(files_shown(page)) for page in PAGES)


@pages
def test_files_shown_are_new_and_clean(page, tmp_path):
    """A file that a page shows is none of the repository's, lies in the page's own room, and passes the linter."""
    for path, text in files_shown(page):
        assert not (ROOT / path).exists()
        assert (ROOT / path).parent == page.parent
        (tmp_path / pathlib.Path(path).name).write_text(text, encoding="utf-8")
    if files_shown(page):
        done = subprocess.run([sys.executable, "-m", "ruff", "check", "--config", ROOT / "pyproject.toml", "--config",
                               'lint.isort.known-first-party=["addons", "image_text_sim_clip"]', "--ignore", "INP", tmp_path],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_make_targets_exist():
    """Every `make` target that a page names is in the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text_of(page), re.M)) <= targets


# ── What the pages list is complete ───────────────────────────────────────────────────────────────────────────────────

def test_every_key_is_listed_with_its_default():
    """Each key of the config is in the table of some page, and each table that lists it states its default."""
    fields = {field.name: field.default for field in dataclasses.fields(script.Config)}
    listed_anywhere = set()
    for page in PAGES:
        for name, shown in keys_listed(text_of(page), fields).items():
            listed_anywhere.add(name)
            if name == "curate":
                continue  # a section, with a table of its own
            default = fields[name]
            expected = AS_YAML[default] if isinstance(default, bool | None) else str(default)
            assert shown.strip(), f"{page}: {name}"
            assert expected.startswith(shown.strip(' "').rstrip("… ")), f"{page}: {name}"
    assert listed_anywhere == fields.keys()


def test_curate_table_is_complete():
    """The table of the section `curate` names every key, in its order, with its default."""
    rows = re.findall(r"^\| (`[^|]+`) \| ([^|]+) \|", text_of(ROOT / "addons" / "curation" / "README.md"), re.M)
    listed = [pair for names, values in rows for pair in zip(re.findall(r"`(\w+)`", names), values.split(", "), strict=True)]
    expected = [(field.name, AS_YAML[field.default] if isinstance(field.default, bool | None) else str(field.default))
                for field in dataclasses.fields(rules.Curation)]
    assert listed == expected


def test_columns_statuses_and_exit_codes_are_explained():
    """README.md explains every column of the results, in its order, every status that a run can give, and every exit code."""
    table = README.split("\n| column | what |\n")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.M) == script.column_names((*script.SCORE_COLUMNS, *script.STATUS_COLUMNS))
    for status in set(script.STATUSES) - {"oom"}:  # which no engine here gives
        assert f"`{status}`" in README, status
    for name in ("CONFIG", "INPUT", "FAILURES", "DISK", "MODEL", "VERIFY"):
        assert re.search(rf"^\| {getattr(script, f'EXIT_{name}')} \|", README, re.M), name


def test_promises_are_kept_by_tests_that_exist():
    """Each promise names tests, and each test named is there."""
    table = text_of(ROOT / "addons" / "images" / "README.md").split("\n## Promises\n")[1].split("\n\n")[1]
    assert len(table.splitlines()) > 10
    for line in table.splitlines()[2:]:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", line)
        assert named, line
        for file, test in named:
            assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test


# ── The way through the pages ─────────────────────────────────────────────────────────────────────────────────────────

def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text_of(page), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_links_and_images_exist(page):
    """Every relative link leads to a file, and every anchor to a heading of its page."""
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", text_of(page)):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), f"{target}#{anchor}"


def test_readme_can_be_read_to_its_end():
    """README.md stays short, and leads to every room."""
    assert len(README.splitlines()) <= 270
    for page in PAGES[1:]:
        assert f"]({page.relative_to(ROOT).as_posix()}" in README, page


@pages
def test_one_word_for_one_idea(page):
    """The pages say image and GPU, also in config.yaml."""
    for text in (text_of(page), (ROOT / "config.yaml").read_text(encoding="utf-8")):
        prose = re.sub(r"`[^`]*`", "", text)
        assert not re.findall(r"\bpictures?\b|\b(?:graphics|this|the|a) cards?\b|\bbeside\b", prose, re.I)
