"""A run goes on with the model that it was begun with: files that decide a score are refused by name when they have changed.

A change is made to one file at a time, after half a run, and undone before the next one.
"""
import contextlib
import importlib.metadata
import json
import pathlib
import shutil
import sys

import family_models
import open_clip_models
import pytest
from models import ARCHITECTURES, change_config, change_weights
from safetensors.torch import load_file, save_file

import image_text_sim_clip as script

BUNDLED = pathlib.Path(__file__).resolve().parent.parent / "challenge_set/shapes_clip"
SCORED = list(ARCHITECTURES)


@contextlib.contextmanager
def put_back(folder):
    """Whatever is done to the files of `folder` in this context is undone after it."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    try:
        yield
    finally:
        for path in folder.iterdir():
            path.unlink()
        for name, content in before.items():
            (folder / name).write_bytes(content)


def write_new(name, content="{}"):
    """A change that adds a file, or writes another content into it."""
    def change(folder):
        (folder / name).write_text(content, encoding="utf-8")
    return change


def with_key(name, key, value):
    """A change of one key in a JSON file, which may be new."""
    def change(folder):
        content = json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps({**content, key: value}), encoding="utf-8")
    return change


def move_one_weight(folder):
    """Move one of the many numbers of one layer, in the middle of the file."""
    def change(weights):
        name = sorted(name for name in weights if name.endswith("mlp.fc1.weight"))[-1]
        weights[name][-1, -1] += 0.5
    change_weights(folder, change)


def turn_a_byte(name):
    """A change of the last byte of a file."""
    def change(folder):
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)
    return change


def remove(name):
    """A change that takes a file away."""
    return lambda folder: (folder / name).unlink()


def ways_to_change(folder):
    """At least ten changes of one file each, for a folder of any architecture: (file, what is said of it) -> change."""
    images = "processor_config.json" if (folder / "processor_config.json").exists() else "preprocessor_config.json"
    vocabulary = "spiece.model" if (folder / "spiece.model").exists() else "tokenizer.json"
    ways = {
        ("config.json", "has changed"): with_key("config.json", "logit_scale_init_value", 1.5),
        ("model.safetensors", "has changed"): move_one_weight,
        (images, "has changed"): with_key(images, "image_mean", [0.1, 0.1, 0.1]),
        (images, "is gone"): remove(images),
        (vocabulary, "has changed"): turn_a_byte(vocabulary),
        (vocabulary, "is gone"): remove(vocabulary),
        ("tokenizer_config.json", "has changed"): with_key("tokenizer_config.json", "model_max_length", 16),
        ("added_tokens.json", "is new"): write_new("added_tokens.json", '{"<my-cat>": 3}'),
        ("adapter_config.json", "is new"): write_new("adapter_config.json", '{"peft_type": "LORA"}'),
        ("adapter_model.safetensors", "is new"): write_new("adapter_model.safetensors"),
        ("model.safetensors.index.json", "is new"): write_new("model.safetensors.index.json", '{"weight_map": {}}'),
        ("tokenizer.model", "is new"): write_new("tokenizer.model"),
    }
    others = {"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\na b\n", "special_tokens_map.json": "{}"}
    for name, content in others.items():
        ways[name, "has changed" if (folder / name).exists() else "is new"] = write_new(name, content)
    if images != "processor_config.json":
        ways["processor_config.json", "is new"] = write_new("processor_config.json")
    return ways


@pytest.fixture
def half_a_run(shapes, run_main, tmp_path):
    """Score with the model in a folder and lose the second of two parts: returns the config."""
    def begin(folder, **keys):
        config = shapes(pretrained_model=str(folder), rows=4, partition_rows=2, parity_rows=0, **keys)
        outcome = run_main("--config", config)
        assert outcome.code == 0, outcome.stderr
        (tmp_path / "out/parts/part-00001.parquet").unlink()
        return config
    return begin


def refuse_each(ways, folder, config, run_main):
    """Make each change alone, run, and yield the outcome, which is exit 2 and names the file and what became of it."""
    for (file, what), change in ways.items():
        with put_back(folder):
            change(folder)
            outcome = run_main("--config", config)
        assert outcome.code == 2, (file, what, outcome.stderr)
        assert f"({file} {what})" in outcome.stderr, outcome.stderr
        yield outcome


@pytest.mark.slow
@pytest.mark.parametrize("name", SCORED)
def test_a_changed_file_is_refused_by_name(name, shelf, tmp_path, half_a_run, run_main):
    """Half a run, one file changed in one of ten ways and more: exit 2 and the file's name; unchanged, it goes on."""
    folder = shelf.copy(name, tmp_path / "a-model")
    config = half_a_run(folder)
    manifest = (tmp_path / "out/manifest.json").read_bytes()
    ways = ways_to_change(folder)
    assert len(ways) >= 10
    for outcome in refuse_each(ways, folder, config, run_main):
        assert outcome.stderr.count("\n") == 1
    assert (tmp_path / "out/manifest.json").read_bytes() == manifest
    assert run_main("--config", config).result["scored"] == 4


def ways_to_change_files(folder):
    """At least ten changes of one file each, for a folder of any format: each file of it other, or gone, and new ones."""
    ways = {}
    for path in sorted(folder.iterdir()):
        is_json = path.suffix == ".json"
        ways[path.name, "has changed"] = with_key(path.name, "more", 1) if is_json else turn_a_byte(path.name)
        if "config.json" not in (path.name, path.name.removeprefix("open_clip_")) and path.suffix != ".safetensors":
            ways[path.name, "is gone"] = remove(path.name)
    new = ("added_tokens.json", "special_tokens_map.json", "adapter_config.json", "tokenizer.model", "vocab.json", "merges.txt",
           "tokenizer_config.json", "preprocessor_config.json", "model.safetensors.index.json")
    for name in new:
        if not (folder / name).exists():
            ways[name, "is new"] = write_new(name)
    return ways


@pytest.mark.slow
@pytest.mark.parametrize("name", [*family_models.FAMILIES, "open_clip quickgelu", "open_clip siglip", "open_clip clipa"])
def test_a_changed_file_of_another_family_is_refused_by_name(name, tmp_path, half_a_run, run_main):
    """The same for the families of addons/models and for open_clip's format: whichever file changes, goes or is new."""
    folder = tmp_path / "a-model"
    if name.startswith("open_clip "):
        open_clip_models.write_model(folder, name.partition(" ")[2])
    else:
        folder.mkdir()
        family_models.FAMILIES[name](folder)
    config = half_a_run(folder)
    ways = ways_to_change_files(folder)
    assert len(ways) >= 10
    for _ in refuse_each(ways, folder, config, run_main):
        pass
    assert run_main("--config", config).result["scored"] == 4


@pytest.mark.parametrize("change", [
    with_key("processor_config.json", "image_processor", {}), turn_a_byte("tokenizer.json"), move_one_weight,
    with_key("config.json", "x", 1), write_new("added_tokens.json")])
def test_a_finished_run_is_not_another_models(change, shelf, tmp_path, shapes, run_main):
    """Also a finished run is refused when the model in its folder has changed: its scores are the old model's."""
    folder = shelf.copy(BUNDLED, tmp_path / "a-model")
    config = shapes(pretrained_model=str(folder), rows=2)
    assert run_main("--config", config).code == 0
    assert run_main("--config", config).code == 0
    change(folder)
    outcome = run_main("--config", config)
    assert outcome.code == 2
    assert ".json has changed" in outcome.stderr or "safetensors has changed" in outcome.stderr or "is new" in outcome.stderr
    assert run_main("--config", config, "--set", f"output_path={tmp_path / 'elsewhere'}").code in (0, 6)


@pytest.mark.parametrize("keys", [{"dtype": "bfloat16"}, {"quantization": "int8", "runtime": "torch"}])
def test_a_model_that_changes_while_it_scores(keys, shelf, tmp_path, shapes, run_main, monkeypatch):
    """Fewer bits need the model once more, for the passport's reference and for what is not finite: where its files have
    changed by then, the run ends (exit 6), and no score of another model is taken or compared with."""
    folder = shelf.copy(BUNDLED, tmp_path / "a-model")
    score_partition = script.score_partition

    def score_and_train(*arguments):
        scored = score_partition(*arguments)
        move_one_weight(folder)
        return scored
    monkeypatch.setattr(script, "score_partition", score_and_train)
    outcome = run_main("--config", shapes(pretrained_model=str(folder), rows=6, parity_rows=3, **keys))
    assert outcome.code == 6
    assert outcome.stderr.splitlines()[-1] == f"error: {folder}: files of the model have changed since the run began"
    monkeypatch.undo()
    assert run_main("--config", tmp_path / "config.yaml").result["scored"] == 6  # with the new model alone: no part was there


def test_files_that_decide_nothing_may_change(shelf, tmp_path, half_a_run, run_main):
    """A model card, training settings, pickles and optimizer states next to the model do not keep a run from going on."""
    folder = shelf.copy(BUNDLED, tmp_path / "a-model")
    config = half_a_run(folder)
    for name in ("README.md", "training_args.bin", "pytorch_model.bin", "optimizer.safetensors", "notes.txt"):
        (folder / name).write_text("new")
    (folder / "checkpoint-1").mkdir()
    outcome = run_main("--config", config)
    assert outcome.code == 0, outcome.stderr


def test_a_model_may_be_copied_anew(shelf, tmp_path, half_a_run, run_main):
    """The identity is that of the files, not of their times: a folder copied back over itself goes on."""
    folder = shelf.copy(BUNDLED, tmp_path / "a-model")
    config = half_a_run(folder)
    shutil.move(folder, tmp_path / "aside")
    shutil.copytree(tmp_path / "aside", folder, copy_function=shutil.copyfile)
    assert run_main("--config", config).code == 0


def test_a_finished_run_needs_no_model(shelf, tmp_path, shapes, run_main):
    """A finished run whose model has been deleted prints its summary: nothing is known to have changed."""
    folder = shelf.copy(BUNDLED, tmp_path / "a-model")
    config = shapes(pretrained_model=str(folder), rows=2)
    assert run_main("--config", config).code == 0
    shutil.rmtree(folder)
    assert run_main("--config", config).result["scored"] == 2


OPENED = set()
WATCHED = []


def watch_opening(event, arguments):
    """Remember the names of files that Python opens in the watched folders."""
    if event == "open" and WATCHED and str(arguments[0]).startswith(tuple(WATCHED)):
        OPENED.add(pathlib.Path(str(arguments[0])).name)


def test_a_changed_file_of_weights_of_any_name(shelf, tmp_path, half_a_run, run_main):
    """An index may call the files of weights anything: a change in one of them is refused by name as well."""
    folder = shelf.copy(str(BUNDLED), tmp_path / "a-model")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: f"{name.split('_')[0]}.safetensors" for name in weights}}
    for file in set(index["weight_map"].values()):
        save_file({name: weights[name] for name in weights if index["weight_map"][name] == file}, folder / file,
                  metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = half_a_run(folder)
    list(refuse_each({("text.safetensors", "has changed"): turn_a_byte("text.safetensors")}, folder, config, run_main))
    assert run_main("--config", config).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", SCORED)
def test_every_file_that_is_opened_is_in_the_identity(name, shelf, tmp_path):
    """What loading a model opens is what its identity is made of, whatever transformers reads from where."""
    folder = shelf.copy(name, tmp_path / "a-model")
    for extra in ("added_tokens.json", "generation_config.json"):
        (folder / extra).write_text("{}")
    sys.addaudithook(watch_opening)
    WATCHED.append(str(folder))
    OPENED.clear()
    scorer = script.Scorer(script.Config(pretrained_model=str(folder), use_cuda=False))
    WATCHED.clear()
    assert len(OPENED) >= 5
    there = {path.name for path in folder.iterdir()}  # an index of weights, which is looked for, is not
    assert (OPENED & there) - {"generation_config.json"} <= scorer.files.digests.keys()
    assert scorer.identity()["files"] == scorer.files.digests


def test_other_libraries_are_a_warning_and_in_the_profile(half_a_run, run_main, tmp_path, monkeypatch):
    """A run that goes on under another version of torch says so, goes on, and its profile names both versions."""
    config = half_a_run(BUNDLED)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9.9" if name == "torch" else version(name))
    outcome = run_main("--config", config)
    assert outcome.code == 0
    said = f"torch was {version('torch')}, now 9.9.9"
    assert [line for line in outcome.stderr.splitlines() if line.startswith("warning") and said in line]
    profile = json.loads((tmp_path / "out/profile.json").read_text())
    assert profile["other_libraries"] == [said]
    assert profile["libraries"]["torch"] == version("torch")
    assert {"torch", "transformers", "tokenizers", "pillow"} <= profile["libraries"].keys()


@pytest.mark.parametrize("package", ["transformers", "tokenizers", "pillow"])
def test_each_library_is_told(package, half_a_run, run_main, monkeypatch):
    """transformers, tokenizers and Pillow are told as torch is; the parts that are there are kept."""
    config = half_a_run(BUNDLED)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1" if name == package else version(name))
    outcome = run_main("--config", config)
    assert (outcome.code, outcome.result["scored"]) == (0, 4)
    assert f"{package} was {version(package)}, now 0.0.1" in outcome.stderr


def test_the_same_libraries_are_not_told(half_a_run, run_main, tmp_path):
    """Without a difference there is no warning, and the profile has an empty list."""
    outcome = run_main("--config", half_a_run(BUNDLED))
    assert "libraries" not in outcome.stderr
    assert json.loads((tmp_path / "out/profile.json").read_text())["other_libraries"] == []


def test_a_script_alone_refuses_changed_files_too(shelf, tmp_path, half_a_run, run_main, monkeypatch):
    """Without addons/ a changed preprocessor is refused by name as well."""
    monkeypatch.setattr(script, "ADDONS", tmp_path / "nowhere")
    folder = shelf.copy(BUNDLED, tmp_path / "a-model")
    config = half_a_run(folder)
    change_config(folder, lambda content: content["image_processor"].update(image_mean=[0, 0, 0]), "processor_config.json")
    outcome = run_main("--config", config)
    assert outcome.code == 2
    assert "processor_config.json has changed" in outcome.stderr
