"""Paths in a config: `~` is the home folder, remote ones are told, and no library guesses what a name means."""
import json
import os
import pathlib
import sys

import pytest

import image_text_sim_clip as script
from addons.curation import finished
from addons.results import retry

HOME_KEYS = ("csv_path", "image_path", "output_path", "pretrained_model", "cache_path")
FOLDER_KEYS = ("output_path", "cache_path", "pretrained_model")


def names_in(folder):
    return [path.name for path in folder.iterdir()]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder of its own, and a current folder elsewhere, in which nothing may appear."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "home"
    assert not any("~" in name or ":" in name for name in names_in(tmp_path / "here"))


@pytest.mark.parametrize("key", HOME_KEYS)
def test_tilde_is_the_home_folder(home, key):
    """`~` and `~/` mean the home folder in every key that holds a path; anywhere else in a path it is a letter."""
    assert getattr(script.Config(**{key: "~/a b/c"}), key) == f"{home}/a b/c"
    assert getattr(script.Config(**{key: "~"}), key) == str(home)
    for path in ("a/~/b", "./~", "a~"):
        assert getattr(script.Config(**{key: path}), key) == path


@pytest.mark.parametrize("key", HOME_KEYS)
def test_tilde_of_nobody_is_refused(home, key):
    """`~name` of a user that is not there is one line and exit 2, and no folder of that name."""
    with pytest.raises(script.Trouble, match=f"{key} '~nobody-of-that-name/x': there is no home folder") as caught:
        script.Config(**{key: "~nobody-of-that-name/x"})
    assert caught.value.exit_code == 2


def test_runs_in_the_home_folder(home, write_config, run_main, picture_bytes, read_table):
    """Table, images and results under `~` are those of the full paths: a run by the one is resumed by the other."""
    (home / "images").mkdir()
    (home / "images/1.png").write_bytes(picture_bytes())
    (home / "t.csv").write_text("url,caption\n1.png,x\n")
    (home / "other.csv").write_text("url,caption\n1.png,y\n")
    config = write_config(csv_path="~/t.csv", image_path="~/images", output_path="~/scores")
    assert run_main("--config", config).result["scored"] == 1
    assert read_table(home / "scores/scores.csv")[0]["status"] == "ok"
    full = [f"csv_path={home}/t.csv", f"image_path={home}/images", f"output_path={home}/scores"]
    assert run_main("--config", config, *[word for key in full for word in ("--set", key)]).result["scored"] == 1
    outcome = run_main("--config", config, "--set", "csv_path=~/other.csv")
    assert outcome.code == 2 and "holds another run" in outcome.stderr
    (home / "config.yaml").write_bytes(config.read_bytes())
    assert run_main("--config", "~/config.yaml").result["scored"] == 1


@pytest.mark.parametrize("path", ["s3://bucket/x", "hf://a/b", "S3:/bucket/x", "https://example.org/x"])
def test_remote_model_is_told(home, path, write_config, run_main):
    """A model in an object store is one line and exit 2; nothing is made for it."""
    outcome = run_main("--config", write_config(csv_path="t.csv", pretrained_model=path))
    assert outcome.code in (2, 3) and len(outcome.stderr.splitlines()) == 1 and names_in(pathlib.Path()) == []


@pytest.mark.parametrize(("key", "path", "says"), [
    ("output_path", "S3:/bucket/x", "with two slashes"), ("cache_path", "gs:/b", "with two slashes"),
    ("output_path", "https://example.org/x", "nothing can be written there"), ("csv_path", "s3://", "names no bucket"),
    ("output_path", "s3://bucket/out?versionId=3", "is one version of an object"),
    ("output_path", "file:///x", "are not read yet"), ("csv_path", "what://b/t.csv", "are not read yet"),
    ("image_path", "https://example.org/images", "image_path: url"),
    ("csv_path", "https://u:geheim@example.org/t.csv", "password"),
    ("csv_path", "https://example.org/t.csv?X-Amz-Signature=geheim", "query")])
def test_urls_that_no_key_takes(home, key, path, says, write_config, run_main):
    """A URL that cannot be is one line that names its key, and no secret in it; nothing is made for it."""
    outcome = run_main("--config", write_config(**{"csv_path": "t.csv", key: path}))
    assert outcome.code in (2, 3) and outcome.stderr.startswith(f"error: {key}") and says in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1 and "geheim" not in outcome.stderr and names_in(pathlib.Path()) == []


@pytest.mark.parametrize("key", ["csv_path", "image_path"])
def test_package_of_a_store_is_missing(home, key, write_config, write_table, run_main, monkeypatch):
    """A store whose package is not installed is one line that tells what to install."""
    write_table("url,caption\n1.png,x\n")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    suffix = "/t.csv" if key == "csv_path" else ""
    outcome = run_main("--config", write_config(**{key: f"gs://bucket/x{suffix}"}))
    assert outcome.code == 2 and "pip install -r addons/requirements-cloud.txt" in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["run:1/scores", "runs/2024-05-01T10:00:00", "exp=1", "file:x", "a%20b", "ä?#*", "-"])
def test_names_that_look_like_something_else(home, name, write_config, write_table, run_main, picture_bytes, tmp_path):
    """Results go to a folder of just that name, and are read back, tried again and verified there, also by a relative path."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/1.png").write_bytes(picture_bytes())
    write_table("url,caption\n1.png,x\nnone.png,y\n")
    config = write_config(output_path=name)
    for extra in ((), ("--retry-failed",), ("--verify",)):
        assert run_main("--config", config, *extra).code == 0
    assert json.loads(pathlib.Path(name, "profile.json").read_text())["rows"] == 2
    run = finished.open_run(script.load_config(config))
    assert [table.num_rows for _, table in run.chunks(["status"])] == [2]
    assert retry.may_pass_in(run.plan, run.plan.partitions[0]) is False
    for path in sorted(pathlib.Path(name).rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    os.removedirs(name)
