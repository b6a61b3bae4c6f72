"""Paths in a config: `~` is the home folder, remote ones are told, and no library guesses what a name means."""
import json
import os
import pathlib

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


@pytest.mark.parametrize("key", FOLDER_KEYS)
@pytest.mark.parametrize("path", ["s3://bucket/x", "gs://b", "hf://a/b", "https://example.org/x", "S3:/bucket/x", "file:///x"])
def test_remote_folder_is_told(home, key, path, write_config, run_main):
    """A folder for results or a cache, or a model, at a remote place is one line and exit 2; nothing is made for it."""
    outcome = run_main("--config", write_config(csv_path="t.csv", **{key: path}))
    assert outcome.code == 2 and outcome.stderr.startswith(f"error: {key} '{path}'") and len(outcome.stderr.splitlines()) == 1
    assert "not read or written yet" in outcome.stderr


@pytest.mark.parametrize("path", ["s3://bucket/pairs.parquet", "gs://b/shards/{00000..00003}.tar", "hf://datasets/a/b/x.parquet",
                                  "https://example.org/pairs.csv", "S3://b/pairs.csv", "az://b/*.parquet", "file:///x/pairs.csv"])
def test_remote_table_is_told(home, path, write_config, run_main):
    """A table at a remote place is one line and exit 3 before anything is made."""
    outcome = run_main("--config", write_config(csv_path=path, output_path="out"))
    assert outcome.code == 3 and "are not read yet" in outcome.stderr and len(outcome.stderr.splitlines()) == 1
    assert names_in(pathlib.Path()) == []


@pytest.mark.parametrize("path", ["s3://bucket/images", "gs://b/i", "s3:/bucket/images"])
def test_remote_images_are_told(home, path, write_config, write_table, run_main):
    """Images at a remote place are one line and exit 3, which tells of image_path: url."""
    write_table("url,caption\n1.png,x\n")
    outcome = run_main("--config", write_config(image_path=path))
    assert outcome.code == 3 and "object stores are not read yet" in outcome.stderr and "image_path: url" in outcome.stderr


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
