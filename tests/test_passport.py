"""The score passport: rows of the run scored again the slow way, what it says, and when it ends the run."""
import csv
import json
import math
import types

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

import image_text_sim_clip as script
from addons.measures import drift as drifts
from addons.measures import passport


def read_passport(config):
    """(the summary in profile.json, all [row, score, reference] of the parts) of the run that a config file describes."""
    plan = script.make_plan(script.load_config(config), joins=True)
    pairs = []
    for partition in plan.partitions:
        pairs += script.read_part(plan, partition).metadata["measures"]["passport"]["pairs"]
    return json.loads((plan.output / "profile.json").read_text())["passport"], pairs


def test_comparison_of_known_numbers():
    """Largest and 99th percentile of |difference|, Spearman and the changed share of the top 30 %, worked out by hand."""
    references = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    scores = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.95, 0.8, 0.9, 1.0]  # row 6 rises from rank 7 to rank 9
    drift = drifts.compare_scores(scores, references)
    assert drift["rows"] == 10
    assert drift["max_difference"] == pytest.approx(0.25)
    assert drift["p99_difference"] == pytest.approx(0.25 * 0.91)  # the 99th percentile of ten lies 0.91 of the way to the top
    assert drift["rank_correlation"] == pytest.approx(1 - 6 * (2 ** 2 + 1 + 1) / (10 * 99))
    assert drift["top_30_percent_changed"] == pytest.approx(1 / 3)


def test_comparison_of_nothing_and_of_constants():
    """No rows and rows that are all alike have a comparison without a correlation."""
    assert drifts.compare_scores([], [])["rows"] == 0
    assert drifts.describe_drift(drifts.compare_scores([], [])) == "no row was scored twice"
    alike = drifts.compare_scores([0.5, 0.5], [0.5, 0.5])
    assert alike["rank_correlation"] is None
    assert alike["max_difference"] == 0 == alike["top_30_percent_changed"]
    assert "undefined" in drifts.describe_drift(alike)


@pytest.mark.parametrize(("rows", "expected"), [(0, 0), (3, 3), (100, 8), (2000, 20), (10**8, 64)])
def test_automatic_number_of_rows(rows, expected):
    """min(64, max(8, 1 % of the rows)), and never more than there are."""
    assert passport.count_rows(rows, "auto") == expected


@pytest.mark.parametrize("step", [1, 7, 100, 1000])
@pytest.mark.parametrize(("rows", "count"), [(1000, 64), (10, 10), (977, 8), (3, 1)])
def test_chosen_rows_do_not_depend_on_partitions(rows, count, step):
    """One row of each stretch, the same rows however the input is cut; stand-ins stay in the stretch and the partition."""
    whole = passport.choose_rows(rows, count, 0, rows)
    cut = [group for start in range(0, rows, step)
           for group in passport.choose_rows(rows, count, start, min(start + step, rows))]
    assert [group[0] for group in cut] == [group[0] for group in whole]
    assert len(whole) == count
    for number, group in enumerate(whole):
        assert number * rows // count <= group[0] <= group[-1] < (number + 1) * rows // count
        assert group == list(range(group[0], group[0] + len(group)))


def test_plain_run_agrees_with_its_reference(shapes, bundled_model, run_main, tmp_path):
    """float32 with the fast resize: 1 % of the rows, no more than 2e-3 from the reference, ranked alike, and said in a line."""
    config = shapes(pretrained_model=bundled_model, partition_rows=150)
    outcome = run_main("--config", config)
    drift, pairs = read_passport(config)
    assert drift["rows"] == len(pairs) == 8
    assert drift["max_difference"] <= 2e-3
    assert drift["rank_correlation"] > 0.99
    assert "passport  8 rows" in outcome.stderr
    scores = (tmp_path / "out/scores.csv").read_text().splitlines()
    for row, score, _ in pairs:
        assert f"{score:.4f}"[:5] in scores[row + 1]


def test_reference_is_what_transformers_says(shapes, bundled_model, run_main, tmp_path):
    """The reference scores are those of processor and model called directly, in float32, one pair at a time."""
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel
    config = shapes(rows=60, pretrained_model=bundled_model, dtype="bfloat16", decode="scaled")
    run_main("--config", config)
    _, pairs = read_passport(config)
    table = list(csv.DictReader((tmp_path / "table.csv").open()))
    model = CLIPModel.from_pretrained(bundled_model, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(bundled_model, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(bundled_model)
    assert len(pairs) == 8
    for row, _, reference in pairs:
        image = Image.open(ROOT / "challenge_set/shapes" / table[row]["url"])
        pixels = processor(image.convert("RGB"), return_tensors="pt")
        with torch.inference_mode():
            out = model(**pixels, **tokenizer([table[row]["caption"]], padding=True, return_tensors="pt"))
        assert reference == pytest.approx((out.image_embeds * out.text_embeds).sum().item(), abs=2e-6)


def test_drift_above_the_allowed_ends_with_7_after_the_results(shapes, bundled_model, run_main, tmp_path):
    """bfloat16 differs by more than 1e-6: everything is written, the exit code is 7, also when the command is repeated."""
    config = shapes(rows=60, pretrained_model=bundled_model, dtype="bfloat16", max_score_drift=1e-6)
    for _ in range(2):
        outcome = run_main("--config", config)
        assert outcome.code == script.EXIT_VERIFY
        assert outcome.result["scored"] == 60
        assert "more than max_score_drift (1e-06) allows" in outcome.stderr
        assert len((tmp_path / "out/scores.csv").read_text().splitlines()) == 61
    assert run_main("--config", shapes(rows=60, pretrained_model=bundled_model, dtype="bfloat16"),
                    "--set", "max_score_drift=0.5").code == 0


def test_drift_needs_rows(write_config, run_main):
    """max_score_drift without parity_rows promises what nothing checks: refused."""
    outcome = run_main("--config", write_config(), "--set", "parity_rows=0", "--set", "max_score_drift=1e-3")
    assert outcome.code == script.EXIT_CONFIG
    assert "parity_rows" in outcome.stderr


def test_resumed_run_has_the_same_passport(shapes, bundled_model, run_main, tmp_path):
    """Parts keep their rows' scores, so a run that lost parts ends with the passport of one that was never stopped."""
    config = shapes(pretrained_model=bundled_model, partition_rows=100, parity_rows=12)
    run_main("--config", config)
    before = read_passport(config)
    for index in (1, 4):
        (tmp_path / f"out/parts/part-{index:05d}.parquet").unlink()
    run_main("--config", config, "--set", "parity_rows=3")  # a resumption keeps to what was begun
    after = read_passport(config)
    assert after[0]["rows"] == 12
    assert after[1] == before[1]


def test_tasks_of_an_array_add_up(shapes, bundled_model, run_main, tmp_path, monkeypatch):
    """Two Slurm tasks that each did half: the one that finalises has the rows of both."""
    config = shapes(pretrained_model=bundled_model, partition_rows=100, parity_rows=12)
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    for task in "01":
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        assert run_main("--config", config).code == 0
    drift, pairs = read_passport(config)
    assert drift["rows"] == 12 == len({row for row, _, _ in pairs})


def test_next_row_stands_in_for_one_without_a_score(bundled_model, write_table, write_config, run_main, picture_bytes,
                                                    tmp_path):
    """Where the chosen row's image is missing, a row behind it is scored twice instead."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(picture_bytes(size=(64, 64), colour=(200, 30, 30)))
    chosen = [group[0] for group in passport.choose_rows(40, 8, 0, 40)]
    write_table([("url", "caption"), *((f"{'gone' if i in chosen else 'a'}.png", f"a red square {i}") for i in range(40))])
    config = write_config(pretrained_model=bundled_model)
    outcome = run_main("--config", config)
    assert outcome.result["failed"] == {"missing": 8}
    drift, pairs = read_passport(config)
    expected = [group[1] for group in passport.choose_rows(40, 8, 0, 40) if len(group) > 1]
    assert [row for row, _, _ in pairs] == expected
    assert drift["rows"] == len(expected) >= 4


def test_retried_rows_join_the_passport(bundled_model, write_table, write_config, run_main, picture_bytes, tmp_path,
                                        late):
    """--retry-failed keeps the rows that were scored twice already, and adds those whose image came only now."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(picture_bytes(size=(64, 64), colour=(200, 30, 30)))
    (tmp_path / "pictures/late.png").write_bytes(picture_bytes(size=(64, 64), colour=(20, 30, 230)))
    write_table([("url", "caption"), *((f"{'late' if i < 20 else 'a'}.png", f"a red square {i}") for i in range(40))])
    config = write_config(pretrained_model=bundled_model)
    with late("late.png"):
        assert run_main("--config", config).result["failed"] == {"timeout": 20}
    before = read_passport(config)[1]
    assert run_main("--config", config, "--retry-failed").result["scored"] == 40
    after = read_passport(config)[1]
    assert 0 < len(before) < len(after) == 8
    assert after[:len(before)] == before
    assert all(math.isclose(score, reference, abs_tol=1e-3) for _, score, reference in after)


def test_bytes_kept_are_bounded(shapes, bundled_model, run_main, tmp_path, monkeypatch):
    """Images beyond the cap are not kept: the passport has fewer rows, the run is none the worse."""
    monkeypatch.setattr(passport, "KEPT_BYTES", 0)
    config = shapes(rows=60, pretrained_model=bundled_model)
    outcome = run_main("--config", config)
    assert outcome.result["scored"] == 60
    assert read_passport(config) == (drifts.compare_scores([], []), [])


class Slow:
    """Stands in for the reference: remembers what it was asked."""

    def __init__(self, scorer):
        self.closed = 0
        self.seen = []

    def score(self, data, caption):
        self.seen.append((data, caption))
        if data == b"broken":
            raise script.RowFailure("corrupt", "")
        return 0.5

    def close(self):
        self.closed += 1


@pytest.fixture
def score_again(monkeypatch, tmp_path):
    """Have a Passport of four rows measure one partition: (the passport, the pairs that it keeps)."""
    monkeypatch.setattr(passport, "Reference", Slow)

    def run(sources, captions, cosines, contents=str.encode, chosen=4):
        config = script.Config(pretrained_model="a model", parity_rows=chosen)
        plan = types.SimpleNamespace(partitions=[], row_count=4)
        measure = passport.Passport(config, plan, object(), None)
        loader = measure.wrap(script.ImageLoader(contents, None, None))
        partition = types.SimpleNamespace(partition=script.Partition(0, 0, 4, tmp_path), rows=pd.DataFrame(index=range(4)),
                                          sources=sources, captions=captions, earlier={})
        measure.begin(partition)
        for source in (*dict.fromkeys(sources), "other"):
            loader.read(source)
        measured = measure.measure(partition, types.SimpleNamespace(cosines=np.array(cosines, np.float32)))
        assert measured.values == {}
        return measure, measured.kept["pairs"]
    return run


def test_nothing_is_kept_when_the_run_is_over(score_again):
    """Kept bytes and the second model go when the last row that waits for them is done."""
    measure, pairs = score_again(["a ", "b", "a", "c"], ["one", "two", "three", "four"], [0.25, math.nan, 0.75, 1.0])
    assert pairs == [[0, 0.25, 0.5], [2, 0.75, 0.5], [3, 1.0, 0.5]]
    assert measure.reference.seen == [(b"a ", "one"), (b"a", "three"), (b"c", "four")]
    assert all(measure.kept_images.take(source) is None for source in ("a ", "a", "b", "c"))
    assert measure.kept_images._bytes == 0
    measure.close()
    assert measure.reference.closed == 1


def test_next_row_stands_in_for_an_image_that_the_reference_cannot_read(score_again):
    """An image that only a shortcut in decoding can read leaves its place to the next row, and ends nothing."""
    chosen = passport.choose_rows(4, 1, 0, 4)[0]
    assert len(chosen) > 1
    _, pairs = score_again(["a", "b", "c", "d"], ["one", "two", "three", "four"], [0.5, 0.25, 0.125, 1.0], chosen=1,
                                 contents=lambda source: b"broken" if source == "abcd"[chosen[0]] else source.encode())
    assert [row for row, _, _ in pairs] == [chosen[1]]


def test_dry_run_has_no_passport(shapes, run_main, tmp_path):
    """Nothing is scored, so nothing is scored twice."""
    assert run_main("--config", shapes(rows=30), "--set", "max_score_drift=0.1").code == 0
    assert "passport" not in json.loads((tmp_path / "out/profile.json").read_text())


def test_script_alone_has_no_passport(shapes, bundled_model, run_main, tmp_path, monkeypatch):
    """The script alone scores as well, without a passport; it refuses to promise what only a passport can tell."""
    monkeypatch.setattr(script, "ADDONS", tmp_path / "nowhere")
    config = shapes(rows=30, pretrained_model=bundled_model)
    assert run_main("--config", config).result["scored"] == 30
    assert "passport" not in json.loads((tmp_path / "out/profile.json").read_text())


def test_float_written_with_an_exponent(write_config, run_main):
    """1e-3 is a number in a config, though YAML 1.1 reads it as text."""
    assert script.load_config(write_config(), ["max_score_drift=1e-3"]).max_score_drift == 0.001
