"""The measure `heads`: networks from files, what they give in a run, and files that make none."""
import contextlib
import io
import itertools
import json
import pickle
import re

import numpy as np
import pytest
import torch
from conftest import BUNDLED_MODEL, ROOT
from PIL import Image
from safetensors.torch import save_file

import curate
import image_text_sim_clip as script
from addons.measures.heads import BadHead, HeadFile, Heads, HeadSettings, build_head, read_head_file

WIDTH = 64  # of the bundled model's embeddings


def linear(*widths, names="layers.{}", seed=0):
    """The tensors of linear layers from widths[0] to widths[1] and so on, with names as torch's Sequential has them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for number, (before, after) in enumerate(itertools.pairwise(widths)):
        tensors[names.format(number) + ".weight"] = torch.randn(after, before, generator=generator)
        tensors[names.format(number) + ".bias"] = torch.randn(after, generator=generator)
    return tensors


# ── The network ───────────────────────────────────────────────────────────────────────────────────────────────────────

def test_laions_aesthetics_predictor(tmp_path):
    """Its layout: Dropout between the layers leaves gaps in their numbers, no activations, a .pth of a state_dict."""
    mlp = torch.nn.Sequential(torch.nn.Linear(768, 1024), torch.nn.Dropout(0.2), torch.nn.Linear(1024, 128),
                              torch.nn.Dropout(0.2), torch.nn.Linear(128, 64), torch.nn.Dropout(0.1), torch.nn.Linear(64, 16),
                              torch.nn.Linear(16, 1)).eval()
    torch.save({f"layers.{name}": tensor for name, tensor in mlp.state_dict().items()}, tmp_path / "sac.pth")
    head = build_head(read_head_file(tmp_path / "sac.pth"), HeadSettings())
    images = torch.nn.functional.normalize(torch.randn(5, 768), dim=-1)
    assert head.width == 768
    assert head(images.numpy()) == pytest.approx(mlp(images)[:, 0].detach().numpy(), abs=1e-6)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("output", ["raw", "sigmoid"])
def test_activations_and_outputs(activation, output):
    """What stands between and behind the layers is torch's own, and nothing stands behind the last but the output."""
    tensors = linear(8, 6, 4, 1)
    images = torch.randn(7, 8)
    between = (lambda x: x) if activation == "none" else getattr(torch.nn.functional, activation)
    values = images
    for number in range(3):
        values = torch.nn.functional.linear(values, tensors[f"layers.{number}.weight"], tensors[f"layers.{number}.bias"])
        if number < 2:
            values = between(values)
    expected = values[:, 0].sigmoid() if output == "sigmoid" else values[:, 0]
    head = build_head(HeadFile(tensors, {}), HeadSettings(activation=activation, output=output))
    assert head(images.numpy()) == pytest.approx(expected.numpy(), abs=1e-5)


@pytest.mark.parametrize(("spread", "power"), [("norm.variance", 0.5), ("norm.std", 1.0)])
def test_a_standardised_input(spread, power):
    """standardise takes the mean off and divides by the standard deviation, as a variance or as it is."""
    tensors = linear(4, 1) | {"norm.mean": torch.tensor([1.0, 2, 3, 4]), spread: torch.tensor([4.0, 1, 9, 16])}
    images = torch.randn(3, 4)
    standard = (images - tensors["norm.mean"]) / tensors[spread] ** power
    expected = torch.nn.functional.linear(standard, tensors["layers.0.weight"], tensors["layers.0.bias"])[:, 0]
    head = build_head(HeadFile(tensors, {}), HeadSettings(standardise=True))
    assert head(images.numpy()) == pytest.approx(expected.numpy(), abs=1e-5)


def test_layers_stand_in_the_order_of_their_numbers():
    """Layer 10 comes after layer 2, whatever the order in the file."""
    tensors = linear(3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 1)
    shuffled = dict(sorted(tensors.items(), reverse=True))
    image = np.ones((1, 3), np.float32)
    expected = torch.ones(1, 3)
    for number in range(12):
        expected = torch.nn.functional.linear(expected, tensors[f"layers.{number}.weight"], tensors[f"layers.{number}.bias"])
    assert build_head(HeadFile(shuffled, {}), HeadSettings())(image) == pytest.approx(expected.numpy()[0], rel=1e-4)


def test_a_bare_layer_without_bias():
    """`weight` alone, as nn.Linear(d, 1, bias=False) saves it, is a head."""
    head = build_head(HeadFile({"weight": torch.tensor([[1.0, 2.0]])}, {}), HeadSettings())
    assert head(np.array([[3.0, 4.0]])) == pytest.approx([11.0])


@pytest.mark.parametrize(("tensors", "settings", "message"), [
    ({}, {}, "holds no linear layer"),
    (linear(4, 3), {}, "its last layer gives 3 numbers, and a column takes one"),
    ({**linear(4, 3), **linear(2, 1, names="more.{}")}, {}, "more.0.weight takes 2 numbers, and the layer before it gives 3"),
    ({"norm.weight": torch.ones(4), **linear(4, 1)}, {}, "norm.weight has 1 dimensions"),
    ({**linear(4, 1), "norm.mean": torch.ones(4)}, {}, "holds norm.mean, which no linear layer needs; standardise: true"),
    ({**linear(4, 1), "temperature": torch.ones(1)}, {}, "holds temperature, which no linear layer needs"),
    (linear(4, 1), {"standardise": True}, "standardise: true needs one tensor called mean"),
    ({**linear(4, 1), "mean": torch.ones(3), "std": torch.ones(4)}, {"standardise": True}, "must hold 4 numbers"),
    ({**linear(4, 1), "mean": torch.ones(4), "std": torch.zeros(4)}, {"standardise": True}, "all of the latter above 0"),
    ({"weight": torch.ones(1, 4), "bias": torch.tensor([float("nan")])}, {}, "bias holds numbers that are not finite"),
    ({"weight": torch.ones(1, 4), "bias": torch.ones(2)}, {}, "the bias next to weight has the shape (2,), not (1,)"),
])
def test_tensors_that_make_no_head(tensors, settings, message):
    """Every tensor must have its place, and the widths must fit."""
    with pytest.raises(BadHead) as bad:
        build_head(HeadFile(tensors, {}), HeadSettings(**settings))
    assert message in str(bad.value)


class Evil:
    """A pickle that runs code."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code was run')",))


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.pth", pickle.dumps(Evil()), "not a file of weights alone"),
    ("a.pth", b"nothing", "not a file of weights alone"),
    ("a.pth", b"", "not a file of weights alone"),
    ("a.safetensors", b"nothing", "not a safetensors file"),
    ("a.safetensors", b"", "not a safetensors file"),
    ("a.pth", None, "no such file"),
])
def test_files_that_are_none(tmp_path, name, content, message):
    """Broken files, missing ones, and those that would run code."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadHead, match=message):
        read_head_file(tmp_path / name)


def test_a_zip_that_would_run_code(tmp_path):
    """What torch.save wrapped around a pickle that runs code is refused too, and so is a whole module."""
    for thing in (Evil(), torch.nn.Linear(4, 1)):
        torch.save(thing, tmp_path / "a.pth")
        with pytest.raises(BadHead, match="not a file of weights alone"):
            read_head_file(tmp_path / "a.pth")
    torch.save(torch.ones(3), tmp_path / "a.pth")
    with pytest.raises(BadHead, match="holds no weights by name"):
        read_head_file(tmp_path / "a.pth")


# ── Settings ──────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("heads", "message"), [
    ({}, "measures.heads must be a section of heads"),
    ("a.pth", "measures.heads must be a section of heads"),
    ({"a": "a.pth"}, "measures.heads.a must be a section of keys"),
    ({"a": {}}, "measures.heads.a needs file"),
    ({"a": {"file": "a.pth", "actvation": "relu"}}, "did you mean 'measures.heads.a.activation'"),
    ({"a": {"file": "a.pth", "activation": "swish"}}, "measures.heads.a.activation must be none | relu | gelu | silu | tanh"),
    ({"similarity": {"file": "a.pth"}}, "every result has a column 'similarity' already"),
    ({"warm": {"file": "a.pth"}}, "measures.heads has a column 'warm' already"),
])
def test_wrong_settings(write_config, run_main, heads, message):
    """A wrong section is one line and exit 2, before any work."""
    outcome = run_main("--config", write_config(measures={"heads": heads, "labels": {"warm": ["a", "b"]}}))
    assert outcome.code == script.EXIT_CONFIG
    assert message in outcome.stderr


# ── In a run ──────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def scored(shapes, tmp_path):
    """A config of a few drawings with these heads, whose files lie in tmp_path."""
    def make(heads, **keys):
        given = {name: {**settings, "file": str(tmp_path / settings["file"])} for name, settings in heads.items()}
        return shapes(pretrained_model=BUNDLED_MODEL, parity_rows=0, **({"measures": {"heads": given}} | keys))
    return make


@pytest.mark.slow
def test_a_raw_input_is_the_models_own(scored, run_main, read_table, tmp_path):
    """`input: raw` gives the embedding before it is brought to length 1, and changes no score by a byte."""
    tensors = linear(WIDTH, 1)
    save_file(tensors, tmp_path / "a.safetensors", {"model": "somewhere/shapes_clip"})
    head = {"file": "a.safetensors"}
    config = scored({"unit": head, "raw": {**head, "input": "raw"}}, rows=30)
    assert run_main("--config", config).code == 0
    rows = read_table(tmp_path / "out/scores.csv")
    scorer = script.Scorer(script.load_config(config))
    for row in rows[::3]:
        with Image.open(ROOT / "challenge_set/shapes" / row["url"]) as image:
            pixels = scorer.family.processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
        features = scorer.family.image_features(scorer.family.model, pixels)
        for name, given in (("raw", features), ("unit", torch.nn.functional.normalize(features, dim=-1))):
            expected = torch.nn.functional.linear(given, tensors["layers.0.weight"], tensors["layers.0.bias"]).item()
            assert float(row[name]) == pytest.approx(expected, abs=0.02)  # the fast resize is a level away here and there
    assert run_main("--config", scored({}, rows=30, measures=None), "--fresh").code == 0
    plain = read_table(tmp_path / "out/scores.csv")
    assert [row | {"unit": "", "raw": ""} for row in plain] == [row | {"unit": "", "raw": ""} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(("tensors", "metadata", "settings", "message"), [
    (linear(32, 1), {}, {}, "takes embeddings of width 32, and "),
    (linear(WIDTH, 1), {"model": "openai/clip-vit-base-patch32"}, {}, "was made for openai/clip-vit-base-patch32, and this"),
    (linear(WIDTH, 1), {}, {"model": "other/model"}, "was made for other/model, and this run's model is"),
])
def test_a_head_of_another_model(scored, run_main, tmp_path, tensors, metadata, settings, message):
    """A head for another width, or another model than it says, is refused in one line with exit 2."""
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    outcome = run_main("--config", scored({"a": {"file": "a.safetensors", **settings}}, rows=3))
    assert outcome.code == script.EXIT_CONFIG
    assert "measures.heads.a" in outcome.stderr
    assert message in outcome.stderr


@pytest.mark.slow
def test_a_head_that_does_not_say_its_model(scored, run_main, tmp_path):
    """It is used, and one line says what was not compared; a missing file is exit 2."""
    torch.save(linear(WIDTH, 1), tmp_path / "a.pth")
    outcome = run_main("--config", scored({"a": {"file": "a.pth"}}, rows=3))
    assert outcome.code == 0
    assert "a.pth does not say which model it was made for" in outcome.stderr
    assert "s a pair   (heads 0.0" in outcome.stderr
    outcome = run_main("--config", scored({"a": {"file": "none.pth"}}, rows=3), "--fresh")
    assert outcome.code == script.EXIT_CONFIG
    assert "none.pth: no such file" in outcome.stderr


@pytest.mark.slow
def test_a_run_goes_on_with_the_head_that_it_was_begun_with(scored, run_main, tmp_path):
    """Another file of the same name is refused while parts of the run are there."""
    config = scored({"a": {"file": "a.pth"}}, rows=6, partition_rows=3)
    torch.save(linear(WIDTH, 1), tmp_path / "a.pth")
    assert run_main("--config", config).code == 0
    (tmp_path / "out/parts/part-00001.parquet").unlink()
    torch.save(linear(WIDTH, 1, seed=1), tmp_path / "a.pth")
    outcome = run_main("--config", config)
    assert outcome.code == script.EXIT_CONFIG
    assert "was begun with other files (a changed)" in outcome.stderr
    assert run_main("--config", config, "--fresh").code == 0


@pytest.mark.slow
def test_retried_rows_get_values(scored, late, run_main, read_table, tmp_path):
    """--retry-failed gives the rows that it scores their values, and the statistics are of all rows."""
    torch.save(linear(WIDTH, 1), tmp_path / "a.pth")
    config = scored({"a": {"file": "a.pth"}}, rows=30)
    assert run_main("--config", config).code == 0
    expected = read_table(tmp_path / "out/scores.csv")
    entry = json.loads((tmp_path / "out/profile.json").read_text())["heads"]
    with late("shape-001.png"):
        run_main("--config", config, "--fresh")
    assert run_main("--config", config, "--retry-failed").result["scored"] == 30
    found = read_table(tmp_path / "out/scores.csv")
    assert [float(row["a"]) for row in found] == pytest.approx([float(row["a"]) for row in expected], abs=1e-5)
    assert json.loads((tmp_path / "out/profile.json").read_text())["heads"]["a"]["rows"] == entry["a"]["rows"] == 30


@pytest.mark.slow
def test_the_documented_script(tmp_path, monkeypatch, run_main, read_table):
    """The head that the page's script trains gives in a run what the script measured, and curation cuts there."""
    page = (ROOT / "addons/measures/README.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"^```python\n(.*?)^```", page, re.S | re.M) if "save_file" in block)
    assert len(code.split("\n\n")[1].splitlines()) <= 10
    (tmp_path / "challenge_set").symlink_to(ROOT / "challenge_set")
    monkeypatch.chdir(tmp_path)
    demo = "challenge_set/demo.yaml"
    assert run_main("--config", demo, "--set", "output_path=scores/saved", "--set", "save_embeddings=float16").code == 0
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    measured = int(re.search(r"right for (\d+) of the other 100", printed.getvalue())[1])
    heads = "measures={heads: {black: {file: scores/black.safetensors}}}"
    assert run_main("--config", demo, "--set", heads).code == 0
    rows = [row for row in read_table("scores/demo/scores.csv") if row["match"] == "good"]
    right = [(float(row["black"]) > 0.5) == ("black background" in row["caption"]) for row in rows]
    assert sum(right[100:]) == measured >= 95
    assert curate.main(["--config", demo, "--set", heads, "--set", "curate.min_head={black: 0.5}",
                        "--set", "curate.max_head={black: 1.5}"]) == 0
    kept = read_table("scores/demo/curated/kept.csv")
    assert {row["url"] for row in kept} == {row["url"] for row, is_right in zip(rows, right, strict=True)
                                           if is_right == ("black background" in row["caption"])}


def test_settings_are_read_by_name():
    """Columns come in the order of the heads' names, whatever the order in the config."""
    config = script.Config(measures={"heads": {"b": {"file": "x/b.pth"}, "a": {"file": "a.pth", "output": "sigmoid"}}})
    assert [column.name for column in Heads.columns_for(config)] == ["a", "b"]
    assert Heads.read_settings(config)["a"] == HeadSettings(file="a.pth", output="sigmoid")
