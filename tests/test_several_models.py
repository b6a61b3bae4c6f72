"""Several models in one pass: one reading of every image, and for each model what a run of its own would say."""
import json
import shutil

import numpy as np
import pytest
from family_models import FamilyShelf
from safetensors.torch import load_file, save_file

import image_text_sim_clip as script
from addons.models import several
from curate import main as curate_main

pytestmark = pytest.mark.slow  # the models are built first

COLUMNS = ["similarity", "dissimilarity", "probability", "percentile", "random_percentile", "truncated", "status", "detail"]


@pytest.fixture(scope="module")
def family_shelf(tmp_path_factory):
    """Model folders by the name of a family, each built on first use."""
    return FamilyShelf(tmp_path_factory.mktemp("families"))


@pytest.fixture
def models(bundled_model, family_shelf, shelf):
    """Four models of four kinds of image sizes, captions and scores."""
    return {"b32": bundled_model, "flex": str(family_shelf("siglip2")), "sig": str(shelf("siglip-base")),
            "xlm": str(family_shelf("altclip"))}


@pytest.fixture
def table(write_table, tmp_path, encode_image):
    """A table of images of many shapes, a strip among them, with captions that one tokenizer or another knows nothing of."""
    captions = ["a photo of two cats", "一只狗", "!!!", "", "a large green square", "a photo of a dog in the snow " * 30, "😀"]
    rows = []
    rng = np.random.default_rng(3)
    sizes = [(40, 30), (200, 31), (64, 64), (3, 500), (1, 4000), (300, 300), (65, 90)]
    for number, (width, height) in enumerate(sizes):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        (tmp_path / f"pictures/{number}.png").write_bytes(encode_image(pixels))
        rows += [(f"{number}.png", caption) for caption in captions]
    rows += [("missing.png", "a cat"), ("0.png", "a cat")]
    return write_table([("url", "caption"), *rows])


@pytest.fixture
def encode_image():
    """Pixels (h, w, 3) -> the bytes of a PNG."""
    import io

    from PIL import Image

    def encode(pixels):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()
    return encode


def read_run(read_table, folder):
    """The rows of a run's scores, and its profile."""
    return read_table(folder / "scores.csv"), json.loads((folder / "profile.json").read_text())


def assert_equals_own_run(rows, own_rows, name):
    """Every column of the model, by its name, is what its own run has, cell by cell."""
    for column in COLUMNS:
        assert [row[f"{column}_{name}"] for row in rows] == [row[column] for row in own_rows], (name, column)


@pytest.mark.parametrize("keys", [
    {"preprocess": "exact"}, {"preprocess": "fast", "batch_size": 3, "partition_rows": 11},
    {"dtype": "bfloat16", "save_embeddings": "float16"}, {"quantization": "int8"}], ids=str)
def test_columns_equal_runs_of_their_own(table, models, write_config, run_main, read_table, tmp_path, keys):
    """Every column of every model equals that of a run of its own byte for byte, saved embeddings too."""
    assert run_main("--config", write_config(pretrained_model=models, output_path=str(tmp_path / "all"), **keys)).code == 0
    rows, profile = read_run(read_table, tmp_path / "all")
    for name, model in models.items():
        folder = tmp_path / name
        assert run_main("--config", write_config(pretrained_model=model, output_path=str(folder), **keys)).code == 0
        own_rows, own_profile = read_run(read_table, folder)
        if name == "b32":
            assert [[row[column] for column in COLUMNS] for row in rows] == [
                [row[column] for column in COLUMNS] for row in own_rows]
            continue
        assert_equals_own_run(rows, own_rows, name)
        told = profile["further_models"][name]
        assert told["model"] == model and told["scored"] == own_profile["scored"]
        assert told["random_pairs"] == own_profile["random_pairs"] and told["passport"] == own_profile["passport"]
        assert told["mean_similarity"] == pytest.approx(own_profile["mean_similarity"])
        if "save_embeddings" in keys:
            for file in sorted((folder / "parts").glob("*.npz")):
                assert (tmp_path / f"all/parts/{file.stem}.{name}.npz").read_bytes() == file.read_bytes()
    assert {row["status_sig"] for row in rows} == {"ok", "empty_caption", "missing"}
    assert any(row["status"] == "ok" and row["similarity_sig"] == "" for row in rows)  # nothing that its tokenizer knows


@pytest.mark.parametrize(("preprocess", "times"), [("fast", 1), ("exact", 2)])
def test_equal_images_are_resized_once(shapes, run_main, bundled_model, read_table, tmp_path, monkeypatch, preprocess, times):
    """Models that read images of one kind share the fast resize, and score as they do alone."""
    copy = tmp_path / "copy"
    shutil.copytree(bundled_model, copy)
    resize = script.Scorer.resize
    calls = []

    def resize_and_count(scorer, image):
        calls.append(image.size)
        return resize(scorer, image)
    monkeypatch.setattr(script.Scorer, "resize", resize_and_count)
    models = {"b32": bundled_model, "copy": str(copy)}
    assert run_main("--config", shapes(pretrained_model=models, rows=30, preprocess=preprocess)).code == 0
    assert len(calls) == 4 + times * len({row["url"] for row in read_table(tmp_path / "out/scores.csv")})  # each tries two
    rows = read_table(tmp_path / "out/scores.csv")
    assert [row["similarity_copy"] for row in rows] == [row["similarity"] for row in rows]


def test_a_lost_part_is_done_again_to_the_same_bytes(table, models, write_config, run_main, tmp_path):
    """Resuming, verifying and running anew give the same scores."""
    config = write_config(pretrained_model=models, partition_rows=11, save_embeddings="float32")
    assert run_main("--config", config).code == 0
    scores = (tmp_path / "out/scores.csv").read_bytes()
    (tmp_path / "out/parts/part-00001.parquet").unlink()
    (tmp_path / "out/parts/part-00002.xlm.npz").write_bytes(b"damaged")
    (tmp_path / "out/profile.json").unlink()
    assert run_main("--config", config).code == 0
    assert (tmp_path / "out/scores.csv").read_bytes() == scores
    assert run_main("--config", config, "--verify").code == 0


def test_two_ranks_give_the_same_bytes(models, shapes, run_main, start_cli, tmp_path):
    """torchrun scores every model's columns, and saves its embeddings, as one process does."""
    config = shapes(pretrained_model=models, rows=60, partition_rows=10, save_embeddings="float16", use_cuda=False)
    assert run_main("--config", config, "--set", f"output_path={tmp_path / 'local'}").code == 0
    process = start_cli("--config", config, interpreter=("-m", "torch.distributed.run", "--nproc-per-node", "2"))
    _, stderr = process.communicate(timeout=150)
    assert process.returncode == 0, stderr
    files = ["scores.csv", *(f"parts/{path.name}" for path in (tmp_path / "local/parts").glob("*.npz"))]
    assert len(files) == 1 + 6 * len(models)
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "local" / file).read_bytes(), file


def test_retry_scores_the_row_with_every_model(shapes, models, run_main, read_table, tmp_path, monkeypatch):
    """A row that failed for a passing reason gets every model's columns when it is tried again, and the totals count it."""
    open_source = script.open_source
    late = {"shape-001.png", "shape-005.png"}

    def open_slow_source(config, threads):
        read = open_source(config, threads)

        def read_unless_late(source):
            if source in late:
                raise script.RowFailure("timeout", "")
            return read(source)
        return read_unless_late
    monkeypatch.setattr(script, "open_source", open_slow_source)
    config = shapes(pretrained_model=models, rows=30, partition_rows=12, save_embeddings="float32")
    assert run_main("--config", config).result["failed"] == {"timeout": 6}
    late.clear()
    assert run_main("--config", config, "--retry-failed").result["failed"] == {}
    rows = read_table(tmp_path / "out/scores.csv")
    profile = json.loads((tmp_path / "out/profile.json").read_text())
    assert run_main("--config", shapes(pretrained_model=models, rows=30, output_path=str(tmp_path / "whole"))).code == 0
    whole = read_table(tmp_path / "whole/scores.csv")
    for name in list(models)[1:]:
        assert profile["further_models"][name]["scored"] == 30
        assert [row[f"status_{name}"] for row in rows] == ["ok"] * 30
        for column in ("similarity", "percentile", "truncated"):
            ours, theirs = ([row[f"{column}_{name}"] for row in table] for table in (rows, whole))
            assert ours == theirs if column == "truncated" else np.allclose(np.array(ours, float), np.array(theirs, float),
                                                                            atol=1e-5)


def test_a_changed_file_of_a_further_model_is_refused(table, models, write_config, run_main, tmp_path):
    """A resumption with another second model is refused and names its file, also for a finished run."""
    folder = tmp_path / "copy"
    shutil.copytree(models["xlm"], folder)
    config = write_config(pretrained_model={"b32": models["b32"], "xlm": str(folder)})
    assert run_main("--config", config).code == 0
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"changed": True}))
    outcome = run_main("--config", config)
    assert outcome.code == 2 and "xlm/config.json has changed" in outcome.stderr


@pytest.mark.parametrize(("value", "says"), [
    ({}, "mapping of names"), ({"a b": "x/y"}, "letters, digits"), ({"a": "none"}, "Hub id or a folder"),
    ({"a": "x/y", "similarity": "x/z"}, "can be called similarity"), ({"a": 3}, "Hub id or a folder"),
    (["x/y"], "must be text")])
def test_mistakes_in_the_mapping(write_config, run_main, value, says):
    """What is no mapping of names to models is one line, exit 2."""
    outcome = run_main("--config", write_config(pretrained_model=value))
    assert outcome.code == 2 and says in outcome.stderr


@pytest.mark.parametrize("value", [3, {"only": "none"}, [["only", "none"]], [["a", "x/y"], ["b", "none"]]])
def test_further_models_by_hand(write_config, run_main, value):
    """`measures.further_models`, which the mapping becomes, is one line and exit 2 where it is written by hand."""
    outcome = run_main("--config", write_config(measures={"further_models": value}))
    assert outcome.code == 2 and "is not written by hand: name the models under pretrained_model" in outcome.stderr


def test_one_model_in_a_mapping_is_one_model(shapes, run_main, bundled_model, read_table, tmp_path):
    """A mapping of one name scores as the plain name does, under plain columns."""
    assert run_main("--config", shapes(pretrained_model={"only": bundled_model}, rows=9)).code == 0
    assert not [name for name in read_table(tmp_path / "out/scores.csv")[0] if name.endswith("_only")]


def test_a_model_that_does_not_fit_is_told_at_start(shapes, run_main, models, monkeypatch, tmp_path):
    """A second model for which there is no memory is one line with both figures, exit 6, before a row is scored."""
    monkeypatch.setattr(several, "free_memory", lambda device: 1_000_000)
    outcome = run_main("--config", shapes(pretrained_model=models, rows=9))
    assert outcome.code == 6 and "pretrained_model.flex" in outcome.stderr and "MiB are free" in outcome.stderr
    assert not list((tmp_path / "out").glob("parts/*.parquet"))
    planned = run_main("--config", shapes(pretrained_model=models, rows=9), "--plan")
    assert planned.code == 6 and planned.stderr.splitlines()[-1] == outcome.stderr.splitlines()[-1]


def test_stored_in_half_the_bytes_a_model_needs_as_much(models, tmp_path):
    """What a model needs is counted in the numbers that it holds: on the CPU they become float32, however they are stored."""
    folder = tmp_path / "half"
    shutil.copytree(models["xlm"], folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight.half() for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    values = sum(weight.numel() for weight in weights.values())
    for path in (models["xlm"], folder):
        files = script.find_model(script.Config(pretrained_model=str(path)))
        assert several.count_weights(files, "cpu", "bfloat16") == several.count_weights(files, "cuda", "float32") == 4 * values
        assert several.count_weights(files, "cuda", "float16") == 2 * values


def test_plan_tells_the_memory_of_each(shapes, run_main, models):
    """--plan names the weights of each model next to the peak of all."""
    outcome = run_main("--config", shapes(pretrained_model=models, rows=30), "--plan")
    assert outcome.code == 0 and {*outcome.result["weights_mib"]} == {*models}
    assert all(mib > 0 for mib in outcome.result["weights_mib"].values())
    assert "weights of flex" in outcome.stderr


def test_a_drift_of_a_further_model_counts(shapes, run_main, models):
    """max_score_drift holds for every model."""
    outcome = run_main("--config", shapes(pretrained_model={"b32": models["b32"], "sig": models["sig"]}, rows=30,
                                          preprocess="exact", max_score_drift=0.0))
    assert outcome.code == 7


def test_curation_by_a_further_model(shapes, run_main, models, tmp_path, monkeypatch):
    """`curate.by` with a model's name judges by that model's scores and random pairs, as if its run stood alone."""
    chosen = {}
    for name, model in (("all", models), ("own", models["xlm"])):
        monkeypatch.chdir(script.ADDONS.parent)
        config = shapes(pretrained_model=model, rows=90, output_path=str(tmp_path / name))
        assert run_main("--config", config).code == 0
        by = ["--set", "curate.by=xlm"] if name == "all" else []
        assert curate_main(["--config", str(config), *by, "--set", "curate.keep_fraction=0.5",
                            "--set", "curate.max_random_rate=0.4", "--set", "curate.review=true"]) == 0
        chosen[name] = json.loads((tmp_path / name / "curated/curated.json").read_text())
    assert chosen["all"]["curate"]["by"] == "xlm" and chosen["all"]["model"] == models["xlm"]
    for key in ("kept", "dropped", "cut_similarity", "random_pairs_at_cut", "random_pairs", "scored"):
        assert chosen["all"][key] == chosen["own"][key], key
    config = shapes(pretrained_model=models, rows=90, output_path=str(tmp_path / "all"))
    assert curate_main(["--config", str(config), "--set", "curate.by=b32", "--set", "curate.keep_fraction=0.5"]) == 0
    assert json.loads((tmp_path / "all/curated/curated.json").read_text())["model"] == models["b32"]
