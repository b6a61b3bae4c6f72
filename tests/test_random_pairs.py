"""Random pairs: how they are drawn, their histograms, and the two percentiles, against answers known by arithmetic."""
import json
import math

import numpy as np
import pytest
from conftest import BUNDLED_MODEL
from hypothesis import given, settings
from hypothesis import strategies as st
from small_inputs import unit

import image_text_sim_clip as script
from addons.measures import random_pairs


def histogram_of(values):
    histogram = random_pairs.Histogram()
    histogram.add(np.asarray(values, np.float32))
    return histogram


# ── Histograms ────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_moments_are_those_of_the_values():
    """Count, mean and standard deviation come from sums, not from bins."""
    histogram = histogram_of([0.1, 0.2, 0.6, math.nan])
    assert histogram.count == 3
    assert histogram.mean == pytest.approx(0.3)
    assert histogram.sd == pytest.approx(math.sqrt((0.04 + 0.01 + 0.09) / 3))


def test_edges_belong_to_the_bin_above():
    """A cosine on an edge counts in the bin that begins there; 1 counts in the last."""
    below_zero = np.nextafter(np.float32(0), -1)
    for value, bin_ in ((-1.0, 0), (0.0, 2048), (0.25, 2560), (-0.5, 1024), (1.0, 4095), (below_zero, 2047)):
        counted = np.flatnonzero(histogram_of([value]).counts).tolist()
        assert counted == [bin_], value


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.95, 0.99, 0.999, 1.0])
def test_quantiles_are_within_the_resolution(share):
    """A quantile read from the bins is within 0.001 of numpy's."""
    values = np.random.default_rng(1).normal(0.15, 0.06, 200_000).clip(-1, 1).astype(np.float32)
    assert abs(random_pairs.quantile(histogram_of(values), share) - np.quantile(values, share)) <= 0.001


def test_quantiles_of_one_value():
    """All quantiles of one value are that value, within the resolution."""
    for share in (0, 0.5, 1):
        assert abs(random_pairs.quantile(histogram_of([0.3]), share) - 0.3) <= random_pairs.RESOLUTION


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=50), st.lists(st.floats(-1, 1, width=32), max_size=20))
@settings(deadline=None, max_examples=60)
def test_share_below_is_within_one_bin(values, asked):
    """The share below lies between the shares below the two edges of the value's bin."""
    histogram, sorted_values = histogram_of(values), np.sort(np.asarray(values, np.float32))
    for value, share in zip(asked, random_pairs.share_below(histogram, asked), strict=True):
        low = np.searchsorted(sorted_values, value - random_pairs.RESOLUTION, "left") / len(values)
        high = np.searchsorted(sorted_values, value + random_pairs.RESOLUTION, "right") / len(values)
        assert low - 1e-6 <= share <= high + 1e-6
        assert 0 <= share <= 1


def test_share_below_passes_nan_on():
    """No score has no percentile, and an empty histogram gives none."""
    assert np.isnan(random_pairs.share_below(histogram_of([0.1]), [math.nan]))[0]
    assert np.isnan(random_pairs.share_below(random_pairs.Histogram(), [0.1]))[0]


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=60), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_threshold_for_rate_is_never_passed_by_more(values, rate):
    """At most `rate` of the values reach the threshold, and one bin lower more would (or there is no lower bin)."""
    histogram, values = histogram_of(values), np.asarray(values, np.float32)
    threshold = random_pairs.threshold_for_rate(histogram, rate)
    assert np.mean(values >= np.float32(threshold)) <= rate
    if threshold > -1:
        assert np.mean(values >= threshold - random_pairs.RESOLUTION) > rate


def test_json_keeps_everything():
    """What a part's metadata holds reads back as the same histogram; another number of bins is refused."""
    histogram = histogram_of(np.random.default_rng(2).uniform(-1, 1, 1000))
    read = random_pairs.Histogram.from_json(json.loads(json.dumps(histogram.to_json())))
    assert (read.counts == histogram.counts).all()
    assert (read.total, read.squares) == (histogram.total, histogram.squares)
    assert random_pairs.Histogram.from_json(random_pairs.Histogram().to_json()).count == 0
    with pytest.raises(ValueError, match="bins"):
        random_pairs.Histogram.from_json(histogram.to_json() | {"bins": 100})


def test_merging_is_a_sum():
    """Histograms of pieces add up to the histogram of the whole."""
    values = np.random.default_rng(3).uniform(-1, 1, 999).astype(np.float32)
    merged, whole = random_pairs.merge_histograms(map(histogram_of, np.split(values, [10, 500]))), histogram_of(values)
    assert (merged.counts == whole.counts).all()
    assert merged.total == pytest.approx(whole.total)


# ── Random pairs ──────────────────────────────────────────────────────────────────────────────────────────────────────

def test_small_partitions_use_every_pair_that_is_not_matched():
    """With few captions each image meets all but those that stand next to it anywhere: exactly the other cosines."""
    rng = np.random.default_rng(4)
    images, texts = unit(rng, 5), unit(rng, 7)
    image_rows, text_rows = [0, 0, 1, 2, 3, 4, 4], [0, 1, 1, 2, 3, 4, 0]  # captions 5 and 6 stand next to no image
    found = random_pairs.count_random_pairs(images, texts, image_rows, text_rows)
    matched = set(zip(image_rows, text_rows, strict=True))
    others = [images[i] @ texts[t] for i in range(5) for t in range(7) if (i, t) not in matched]
    assert found.count == len(others) == 28
    assert (found.counts == histogram_of(others).counts).all()
    assert found.total == pytest.approx(sum(map(float, others)), abs=1e-5)


def test_no_random_pair_in_a_table_with_one_caption():
    """One caption for all images, or no row at all, gives no random pairs and no error."""
    rng = np.random.default_rng(5)
    assert random_pairs.count_random_pairs(unit(rng, 3), unit(rng, 1), [0, 1, 2], [0, 0, 0]).count == 0
    assert random_pairs.count_random_pairs(np.empty((0, 8), np.float32), np.empty((0, 8), np.float32), [], []).count == 0


def test_work_is_bounded_and_matched_pairs_are_left_out(monkeypatch):
    """Of 1,000 captions each image meets 256 at most, spread over the partition, and never its own."""
    rng = np.random.default_rng(6)
    images = unit(rng, 1000, 64)
    found = random_pairs.count_random_pairs(images, images, np.arange(1000), np.arange(1000))  # a matched pair's cosine is 1
    assert 1000 * 255 <= found.count <= 1000 * 256
    assert found.counts[-40:].sum() == 0
    assert abs(found.mean) < 0.01 and abs(found.sd - 1 / 8) < 0.005  # of random unit vectors: 1 / sqrt(64)


def test_the_sample_is_like_the_whole():
    """Where only a part of the pairs is drawn, mean and quantiles are those of all pairs, within a standard error."""
    rng = np.random.default_rng(7)
    images, texts = unit(rng, 600), unit(rng, 900)
    rows = rng.permutation(600)
    found = random_pairs.count_random_pairs(images, texts, rows, rows)
    everything = histogram_of(images @ texts.T)
    assert abs(found.mean - everything.mean) < 0.005
    assert abs(random_pairs.quantile(found, 0.99) - random_pairs.quantile(everything, 0.99)) < 0.01


# ── In a run ──────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.slow
def test_a_run_has_percentiles(shapes, run_main, read_table, tmp_path):
    """profile.json tells of the random pairs, whatever the batch size, and scores.csv has both percentiles per row."""
    config = shapes(rows=90, pretrained_model=BUNDLED_MODEL, partition_rows=40)
    found = []
    for batch in (7, 32):
        out = tmp_path / f"out-{batch}"
        outcome = run_main("--config", config, "--set", f"batch_size={batch}", "--set", f"output_path={out}")
        assert outcome.code == 0, outcome.stderr
        assert "random pairs  mean" in outcome.stderr
        found.append(json.loads((out / "profile.json").read_text())["random_pairs"])
    assert found[0]["pairs"] == found[1]["pairs"] > 500
    assert found[0]["mean"] == pytest.approx(found[1]["mean"], abs=1e-5)
    assert -0.3 < found[0]["mean"] < 0.2 and found[0]["mean"] < found[0]["q95"] < found[0]["q99"] < found[0]["q99.9"] < 1
    rows = read_table(out / "scores.csv")
    assert list(rows[0])[3:] == script.column_names(script.load_config(config).result_columns)
    scores = np.array([float(row["similarity"]) for row in rows])
    for row, score in zip(rows, scores, strict=True):
        assert abs(float(row["percentile"]) - (scores < score).mean()) <= 2 / 90
        assert 0 <= float(row["random_percentile"]) <= 1
    good = [float(row["random_percentile"]) for row in rows if row["match"] == "good"]
    assert len(good) == 30 and np.median(good) > 0.99


@pytest.mark.slow
def test_failed_rows_have_no_percentile(shapes, run_main, read_table, tmp_path):
    """A row without a score has two empty cells more."""
    config = shapes(rows=6, pretrained_model=BUNDLED_MODEL)
    with open(tmp_path / "table.csv", "a", encoding="utf-8") as file:
        file.write("nowhere.png,a red circle,good\n")
    assert run_main("--config", config).code == 0
    last = read_table(tmp_path / "out/scores.csv")[-1]
    assert (last["percentile"], last["random_percentile"], last["status"]) == ("", "", "missing")


def test_dry_run_has_no_random_pairs(shapes, run_main, read_table, tmp_path):
    """Without a model there is nothing to compare with: no entry in profile.json, empty cells in the table."""
    assert run_main("--config", shapes(rows=3)).code == 0
    assert "random_pairs" not in json.loads((tmp_path / "out/profile.json").read_text())
    assert all(row["percentile"] == row["random_percentile"] == "" for row in read_table(tmp_path / "out/scores.csv"))


@pytest.mark.slow
def test_rows_tried_again_are_added(shapes, run_main, tmp_path, monkeypatch):
    """--retry-failed adds the random pairs and scores of the rows it scores to those that were there."""
    config = shapes(rows=30, pretrained_model=BUNDLED_MODEL)
    read = script.read_file

    def failing(folder, source, **options):
        if source.startswith("shape-00"):
            raise script.RowFailure("timeout", "not yet")
        return read(folder, source, **options)
    two = ("shape-001.png", "shape-002.png")  # each meets the other's captions when it comes at last

    def failing_for_two(folder, source, **options):
        return (failing if source in two else read)(folder, source, **options)
    monkeypatch.setattr(script, "read_file", failing)
    assert run_main("--config", config).result["failed"] == {"timeout": 30}
    monkeypatch.setattr(script, "read_file", failing_for_two)
    assert run_main("--config", config, "--retry-failed").result["scored"] == 24
    first = json.loads((tmp_path / "out/profile.json").read_text())["random_pairs"]["pairs"]
    monkeypatch.setattr(script, "read_file", read)
    assert run_main("--config", config, "--retry-failed").result["scored"] == 30
    plan = script.make_plan(script.load_config(config), joins=True)
    part = script.read_part(plan, plan.partitions[0]).metadata
    found = random_pairs.RandomPairs.add_up([part])
    assert found.matched.count == part["similarity_count"] == 30
    assert found.random.count > first > 0
    assert random_pairs.RandomPairs.add_up([part | {"similarity_count": 31}]) is None
    assert random_pairs.RandomPairs.add_up([part, part | {"measures": {}}]) is None


@pytest.mark.slow
def test_script_without_addons_leaves_the_columns_empty(shapes, run_main, read_table, tmp_path, monkeypatch):
    """Where addons/ is not next to the script, the run has the same scores and columns, but two of them are empty."""
    config = shapes(rows=6, pretrained_model=BUNDLED_MODEL)
    assert run_main("--config", config).code == 0
    complete = read_table(tmp_path / "out/scores.csv")
    monkeypatch.setattr(script, "ADDONS", tmp_path / "nowhere")
    assert run_main("--config", config, "--fresh").code == 0
    alone = read_table(tmp_path / "out/scores.csv")
    assert all(row["percentile"] and row["random_percentile"] for row in complete)
    assert all(row["similarity"] for row in alone)
    assert alone == [row | {"percentile": "", "random_percentile": ""} for row in complete]
