"""The measure `labels`: what an image shows, told by prompts alone."""
import json
import re

import numpy as np
import pytest
from conftest import BUNDLED_MODEL, ROOT
from PIL import Image

import curate
import image_text_sim_clip as script
from addons.measures.labels import Labels, softmax_of_first

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")


def test_softmax_by_hand():
    """Of logits log 1, log 2 and log 5 the first has an eighth, also where exponentials would overflow."""
    logits = np.log([[1.0, 2.0, 5.0], [4.0, 4.0, 8.0]])
    assert softmax_of_first(logits) == pytest.approx([1 / 8, 1 / 4])
    assert softmax_of_first(logits + 1e4) == pytest.approx([1 / 8, 1 / 4])


def test_columns_are_the_labels():
    """One column for each label, of the label's name, in the order of the names: a resumption may list them otherwise."""
    config = script.Config(measures={"labels": {"watermark": ["a", "b"], "drawing": [["c", "d"], "e"]}})
    columns = config.result_columns
    assert [column.name for column in columns if column not in script.RESULT_COLUMNS] == ["drawing", "watermark"]
    assert Labels.read_settings(config)["drawing"] == [["c", "d"], ["e"]]


@pytest.mark.parametrize(("labels", "message"), [
    ({}, "must be a section of labels"),
    (None, "must be a section of labels"),
    (["a", "b"], "must be a section of labels"),
    ({"a": ["only one"]}, "measures.labels.a must be a list of two prompts or more"),
    ({"a": "text"}, "measures.labels.a must be a list of two prompts or more"),
    ({"a": ["x", 3]}, "a prompt must be text, or a list of texts, got 3"),
    ({"a": ["x", []]}, "a prompt must be text, or a list of texts, got []"),
    ({"a": ["x", ["y", " "]]}, "a prompt must be text, or a list of texts"),
    ({1: ["x", "y"]}, "1 cannot name a column"),
    ({"two\nlines": ["x", "y"]}, "cannot name a column"),
    ({"status": ["x", "y"]}, "every result has a column 'status' already"),
    ({"contrast": ["x", "y"]}, "measures.contrast has a column 'contrast' already"),
])
def test_what_makes_no_label(write_config, run_main, labels, message):
    """A label without prompts, a prompt that is no text, and a name that is taken are one line and exit 2."""
    outcome = run_main("--config", write_config(measures={"labels": labels, "contrast": {}}))
    assert outcome.code == script.EXIT_CONFIG
    assert message in outcome.stderr
    assert outcome.stderr.count("\n") == 1


@pytest.mark.slow
def test_probabilities_are_those_of_the_model(shapes, run_main, read_table, tmp_path):
    """A softmax over averaged prompts, from the scorer's own embeddings and scale; a failed row has an empty cell."""
    labels = {"star": [["a red star", "a blue star"], "a circle", ["a ring", "a cross", "a square"]]}
    config = shapes(rows=9, pretrained_model=BUNDLED_MODEL, measures={"labels": labels}, parity_rows=0)
    with open(tmp_path / "table.csv", "a", encoding="utf-8") as file:
        file.write("nowhere.png,a red circle,good\n")
    outcome = run_main("--config", config)
    assert "labels  star: mean 0." in outcome.stderr
    rows = read_table(tmp_path / "out/scores.csv")
    assert rows[-1]["star"] == ""
    scorer = script.Scorer(script.load_config(config))

    def embed(texts):
        return scorer.encode_texts(scorer.tokenize(texts)[0]).double().numpy()
    prompts = []
    for wordings in labels["star"]:
        mean = embed(wordings if isinstance(wordings, list) else [wordings]).mean(axis=0)
        prompts.append(mean / np.linalg.norm(mean))
    for row in rows[:-1]:
        with Image.open(ROOT / "challenge_set/shapes" / row["url"]) as image:
            encoded = scorer.encode_images(scorer.stack([scorer.resize(image.convert("RGB"))])).double().numpy()[0]
        powers = np.exp(scorer.family.scale * (np.array(prompts) @ encoded))
        assert float(row["star"]) == pytest.approx(powers[0] / powers.sum(), abs=1e-5)


@pytest.mark.slow
def test_a_colour_is_told_by_prompts_alone(run_main, read_table, tmp_path, monkeypatch):
    """Of the drawings with one shape at least 90 % get the highest probability for the shape's colour."""
    monkeypatch.chdir(ROOT)
    labels = {}
    for colour in COLOURS:
        others = [f"a {other} shape" for other in COLOURS if other != colour]
        labels[colour] = [f"a {colour} shape", *others]
    outcome = run_main("--config", "challenge_set/demo.yaml", "--set", f"output_path={tmp_path / 'out'}",
                       "--set", "measures=" + json.dumps({"labels": labels}))
    assert outcome.code == 0, outcome.stderr
    right = []
    for row in read_table(tmp_path / "out/scores.csv"):
        shown = re.fullmatch(r"a (?:small|large) (\w+) \w+ on a \w+ background", row["caption"])
        if row["match"] == "good" and shown:
            assert sum(float(row[colour]) for colour in COLOURS) == pytest.approx(1, abs=1e-5)
            right.append(max(COLOURS, key=lambda colour: float(row[colour])) == shown[1])
    assert len(right) == 60
    assert np.mean(right) >= 0.9


@pytest.mark.slow
def test_a_prompt_that_is_too_long(shapes, run_main):
    """A prompt that the model would cut is refused, by name."""
    config = shapes(rows=3, pretrained_model=BUNDLED_MODEL, measures={"labels": {"a": ["a red star " * 30, "a circle"]}})
    outcome = run_main("--config", config)
    assert outcome.code == script.EXIT_CONFIG
    assert "is longer than the model reads (32 tokens)" in outcome.stderr


@pytest.mark.slow
def test_a_prompt_that_the_model_knows_nothing_of(shapes, run_main, shelf):
    """A prompt in letters that the tokenizer has no pieces for is exit 2 and its text, instead of a probability that says
    nothing; a run with such a caption gives the row `empty_caption` alike."""
    config = shapes(rows=2, pretrained_model=str(shelf("siglip-base")), measures={"labels": {"cat": ["a cat", "猫"]}})
    outcome = run_main("--config", config)
    assert outcome.code == script.EXIT_CONFIG and outcome.stderr.count("\n") == 1
    assert "measures.labels: '猫' says nothing to the model: the tokenizer knows nothing of it" in outcome.stderr


@pytest.mark.slow
def test_rules_on_labels(shapes, run_main, read_table, tmp_path):
    """min_label and max_label keep what lies between them, ends included; an unknown label is named, with those there are."""
    labels = {"warm": ["a red shape", "a blue shape"], "star": ["a star", "a circle"]}
    config = shapes(rows=60, pretrained_model=BUNDLED_MODEL, measures={"labels": labels}, parity_rows=0)
    assert run_main("--config", config).code == 0
    rows = read_table(tmp_path / "out/scores.csv")
    least = sorted(float(row["warm"]) for row in rows)[20]

    def choose(**keys):
        overrides = [f"--set=curate.{key}={json.dumps(value)}" for key, value in keys.items()]
        assert curate.main(["--config", str(config), *overrides]) == 0
    choose(min_label={"warm": least}, max_label={"star": 0.5})
    expected = [row for row in rows if float(row["warm"]) >= least and float(row["star"]) <= 0.5]
    assert 0 < len(expected) < 40
    assert read_table(tmp_path / "out/curated/kept.csv") == expected
    dropped = read_table(tmp_path / "out/curated/dropped.csv")
    assert {row["dropped_by"] for row in dropped} == {"min_label", "max_label"}
    for keys, message in (({"min_label": {"cold": 1}}, "'cold' is none of these scores' labels: star, warm"),
                          ({"max_label": {"star": "high"}}, "curate.max_label.star must be a number, got 'high'"),
                          ({"min_head": {"star": 1}}, "'star' is none of these scores' heads: they have none")):
        with pytest.raises(script.Trouble) as trouble:
            choose(**keys)
        assert message in str(trouble.value)
    with pytest.raises(script.Trouble, match=r"curate\.min_label\.star must be a number, got nan"):
        curate.main(["--config", str(config), "--set=curate.min_label={star: .nan}"])
