"""The measure `contrast`: the formula against a plain float64 computation, in runs whole and cut short."""
import json

import numpy as np
import pytest
from conftest import BUNDLED_MODEL, ROOT
from small_inputs import unit

import curate
import image_text_sim_clip as script
from addons.measures import contrast
from addons.measures.embeddings import read_embeddings

BATCH = 32_768


def penalty(cosines, own, scale, batch):
    """R of the formula, as it is written, for one row: `cosines` (n,) of all captions (or images), `own` the row's place."""
    logits = cosines * scale
    highest = logits.max()
    others = np.exp(np.delete(logits, own) - highest).sum()
    return highest + np.log(np.exp(logits[own] - highest) + (batch - 1) / (len(logits) - 1) * others)


def plain_contrast(images, texts, image_of_row, text_of_row, scale, batch=BATCH):
    """The formula in float64, row by row, over one matrix of all cosines."""
    cosines = images.astype(np.float64) @ texts.astype(np.float64).T
    found = []
    for image, text in zip(image_of_row, text_of_row, strict=True):
        penalties = penalty(cosines[image], text, scale, batch) + penalty(cosines[:, text], image, scale, batch)
        found.append(cosines[image, text] - penalties / (2 * scale))
    return np.array(found)


# ── The formula ───────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("scale", [1.0, 100.0, 117.35, 5000.0])
@pytest.mark.parametrize(("images", "texts", "rows"), [(2, 2, 3), (5, 9, 20), (40, 33, 90)])
def test_the_formula(scale, images, texts, rows):
    """Any numbers of images and captions, repeated or not, and any logit scale: what a plain computation gives."""
    rng = np.random.default_rng(images)
    image_vectors, text_vectors = unit(rng, images), unit(rng, texts)
    image_of_row = np.concatenate([np.arange(images), rng.integers(0, images, rows)])
    text_of_row = np.concatenate([rng.integers(0, texts, images + rows - texts), np.arange(texts)])
    found = contrast.compute_contrast(image_vectors, text_vectors, image_of_row, text_of_row, scale, BATCH)
    expected = plain_contrast(image_vectors, text_vectors, image_of_row, text_of_row, scale)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-6


def test_two_pairs_by_hand():
    """Two pairs at right angles: each image meets one other caption, 32,767 times, at cosine 0."""
    basis = np.eye(2, dtype=np.float32)
    found = contrast.compute_contrast(basis, basis, np.arange(2), np.arange(2), 10.0, BATCH)
    assert found == pytest.approx(1 - 0.1 * np.log(np.exp(10) + 32767), abs=1e-6)


@pytest.mark.parametrize("tile", [1, 7, 64])
def test_tiles_change_nothing(monkeypatch, tile):
    """The size of the tiles, which bounds the memory, decides no value."""
    rng = np.random.default_rng(1)
    images, texts, rows = unit(rng, 50), unit(rng, 70), np.arange(70)
    whole = contrast.compute_contrast(images, texts, rows % 50, rows, 100.0, BATCH)
    monkeypatch.setattr(contrast, "TILE", tile)
    assert np.abs(contrast.compute_contrast(images, texts, rows % 50, rows, 100.0, BATCH) - whole).max() <= 1e-7


def test_nothing_to_compare_with():
    """One image, one caption, or no scored row: no contrast, and no error."""
    rng = np.random.default_rng(2)
    one, many = unit(rng, 1), unit(rng, 3)
    nowhere = np.full(3, -1)
    for images, texts, image_of_row, text_of_row in (
            (one, many, [0, 0, 0], [0, 1, 2]), (many, one, [0, 1, 2], [0, 0, 0]), (many, many, nowhere, nowhere),
            (many, many, [0, -1, -1], [1, -1, -1])):
        found = contrast.compute_contrast(images, texts, np.array(image_of_row), np.array(text_of_row), 100.0, BATCH)
        assert np.isnan(found).all()


def test_rows_without_a_score_do_not_count():
    """An image that the model gave no finite embedding for is no image to compare with; its row has no contrast."""
    rng = np.random.default_rng(3)
    images, texts = unit(rng, 4), unit(rng, 4)
    expected = contrast.compute_contrast(images[:3], texts[:3], np.arange(3), np.arange(3), 100.0, BATCH)
    images[3] = np.nan
    found = contrast.compute_contrast(images, texts, np.array([0, 1, 2, -1]), np.array([0, 1, 2, -1]), 100.0, BATCH)
    assert (found[:3] == expected).all() and np.isnan(found[3])


def test_a_batch_of_two_counts_the_others_once():
    """`batch` is N of the formula: with N = 2 the mean over the others counts once."""
    rng = np.random.default_rng(4)
    images, texts, rows = unit(rng, 6), unit(rng, 6), np.arange(6)
    found = contrast.compute_contrast(images, texts, rows, rows, 20.0, 2)
    assert np.abs(found - plain_contrast(images, texts, rows, rows, 20.0, 2)).max() < 1e-6


# ── In a run ──────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def scored_drawings(tmp_path, run_main, read_table):
    """Score all 600 drawings in partitions of so many rows: (Outcome, rows of scores.csv, folder)."""
    def run(partition_rows, *arguments, **keys):
        out = tmp_path / f"out-{partition_rows}"
        given = {"measures": {"contrast": {}}, "output_path": str(out), "partition_rows": partition_rows, **keys}
        overrides = [f"--set={key}={json.dumps(value)}" for key, value in given.items()]
        outcome = run_main("--config", ROOT / "challenge_set/demo.yaml", *overrides, *arguments)
        assert outcome.code == 0, outcome.stderr
        return outcome, read_table(out / "scores.csv"), out
    return run


def contrasts_of(rows):
    return np.array([float(row["contrast"] or "nan") for row in rows])


@pytest.mark.slow
@pytest.mark.usefixtures("in_the_project")
def test_contrast_of_the_drawings(scored_drawings):
    """In partitions of 60, 256 and all 600 it is what a plain float64 computation gives within 1e-6, and its mean over the
    good captions is the same within 0.01."""
    scale = script.Scorer(script.load_config(ROOT / "challenge_set/demo.yaml")).family.scale
    means = {}
    for partition_rows in (60, 256, 600):
        outcome, rows, out = scored_drawings(partition_rows, save_embeddings="float32")
        assert "contrast  mean -0." in outcome.stderr
        assert "s a pair   (contrast 0.0" in outcome.stderr
        found = contrasts_of(rows)
        expected = []
        for path in sorted((out / "parts").glob("*.npz")):
            saved = read_embeddings(path)
            expected += plain_contrast(saved["images"], saved["texts"], saved["image_of_row"], saved["text_of_row"],
                                       scale).tolist()
        assert np.abs(found - expected).max() < 1e-6
        means[partition_rows] = found[[row["match"] == "good" for row in rows]].mean()
        profile = json.loads((out / "profile.json").read_text())["contrast"]
        assert (profile["rows"], profile["without"]) == (600, 0)
        assert profile["mean"] == pytest.approx(found.mean(), abs=1e-6)
        assert profile["sd"] == pytest.approx(found.std(), abs=1e-6)
    assert max(means.values()) - min(means.values()) <= 0.01


@pytest.mark.slow
@pytest.mark.usefixtures("in_the_project")
def test_other_columns_stay_as_they_are(scored_drawings, tmp_path):
    """Asked for or not, every other column has the same text."""
    _, rows, _ = scored_drawings(256)
    _, plain, _ = scored_drawings(256, "--fresh", measures=None)
    assert "contrast" not in plain[0]
    for row in rows:
        del row["contrast"]
    assert rows == plain


@pytest.fixture
def in_the_project(monkeypatch):
    """The demo's config has paths relative to the project."""
    monkeypatch.chdir(ROOT)


ASKED = {"pretrained_model": BUNDLED_MODEL, "measures": {"contrast": {}}, "parity_rows": 0}


@pytest.mark.slow
def test_retried_rows_with_saved_embeddings(shapes, late, run_main, read_table, tmp_path):
    """--retry-failed computes the part's contrasts anew, to what a run without a failure gives."""
    config = shapes(rows=40, save_embeddings="float32", partition_rows=20, **ASKED)
    assert run_main("--config", config).result["scored"] == 40
    expected = contrasts_of(read_table(tmp_path / "out/scores.csv"))
    entry = json.loads((tmp_path / "out/profile.json").read_text())["contrast"]
    with late("shape-001.png"):
        assert run_main("--config", config, "--fresh").result["scored"] == 37
    partial = contrasts_of(read_table(tmp_path / "out/scores.csv"))
    assert np.isnan(partial[3:6]).all() and np.isfinite(np.delete(partial, [3, 4, 5])).all()
    assert not (partial[:3] == expected[:3]).any()  # the images that failed were not among those to compare with
    outcome = run_main("--config", config, "--retry-failed")
    assert outcome.result["scored"] == 40
    found = contrasts_of(read_table(tmp_path / "out/scores.csv"))
    assert np.abs(found - expected).max() < 1e-6
    retried = json.loads((tmp_path / "out/profile.json").read_text())["contrast"]
    assert (retried["rows"], retried["without"]) == (40, 0)
    assert retried["mean"] == pytest.approx(entry["mean"], abs=1e-6)
    assert run_main("--config", config, "--verify").code == 0


@pytest.mark.slow
def test_retried_rows_without_saved_embeddings(shapes, late, run_main, read_table, tmp_path):
    """Without saved embeddings the rows tried again have no contrast, the others keep theirs, and the summary says so."""
    config = shapes(rows=40, **ASKED)
    with late("shape-001.png"):
        run_main("--config", config)
    before = contrasts_of(read_table(tmp_path / "out/scores.csv"))
    outcome = run_main("--config", config, "--retry-failed")
    assert outcome.result["scored"] == 40
    assert "3 scored rows have none: tried again without save_embeddings" in outcome.stderr
    after = contrasts_of(read_table(tmp_path / "out/scores.csv"))
    np.testing.assert_array_equal(after, before)
    assert np.flatnonzero(np.isnan(after)).tolist() == [3, 4, 5]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_retry_killed_before_its_part_was_written(shapes, late, run_main, tmp_path, monkeypatch, kind):
    """A retry that was killed before it wrote anything ends, when it is repeated, with the bytes of one that was not."""
    config = shapes(rows=40, save_embeddings=kind, **ASKED)
    part = tmp_path / "out/parts/part-00000.parquet"

    def begin():
        with late("shape-001.png"):
            run_main("--config", config, "--fresh")

    def die(*arguments):
        raise KeyboardInterrupt
    begin()
    assert run_main("--config", config, "--retry-failed").result["scored"] == 40
    expected = part.read_bytes()
    begin()
    with monkeypatch.context() as patch:
        patch.setattr(script, "commit_part", die)
        with pytest.raises(KeyboardInterrupt):
            run_main("--config", config, "--retry-failed")
    assert run_main("--config", config, "--retry-failed").result["scored"] == 40
    assert part.read_bytes() == expected


@pytest.mark.slow
def test_a_dry_run_has_an_empty_column(shapes, run_main, read_table, tmp_path):
    """The columns depend on the config alone; there is no entry in profile.json to tell of."""
    outcome = run_main("--config", shapes(rows=6, measures={"contrast": {}}))
    assert outcome.code == 0
    assert "contrast" not in outcome.stderr
    rows = read_table(tmp_path / "out/scores.csv")
    assert [row["contrast"] for row in rows] == [""] * 6


@pytest.mark.parametrize(("asked", "message"), [
    ({"contrast": {"batch": 1}}, "measures.contrast.batch must lie in [2, 1000000000], got 1"),
    ({"contrast": {"batch": "many"}}, "measures.contrast.batch must be a whole number"),
    ({"contrast": {"bach": 3}}, "did you mean 'measures.contrast.batch'"),
])
def test_wrong_settings(write_config, run_main, asked, message):
    """A wrong setting is one line and exit 2."""
    outcome = run_main("--config", write_config(measures=asked))
    assert outcome.code == script.EXIT_CONFIG
    assert message in outcome.stderr


# ── Rules ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.slow
def test_curation_by_contrast(shapes, run_main, read_table, tmp_path):
    """min_contrast keeps what reaches it, and keep_fraction by contrast exactly the best; a row without a contrast fails."""
    config = shapes(rows=60, **ASKED)
    with open(tmp_path / "table.csv", "a", encoding="utf-8") as file:
        file.write("nowhere.png,a red circle,good\n")
    assert run_main("--config", config).code == 0
    values = contrasts_of(read_table(tmp_path / "out/scores.csv"))

    def kept(*overrides):
        assert curate.main(["--config", str(config), *(f"--set=curate.{override}" for override in overrides)]) == 0
        return contrasts_of(read_table(tmp_path / "out/curated/kept.csv"))
    cut = float(np.float32(np.sort(values)[20]))
    np.testing.assert_array_equal(kept(f"min_contrast={cut!r}"), values[values >= cut])
    best = np.sort(np.argsort(-values, kind="stable")[:30])
    np.testing.assert_array_equal(kept("keep_fraction=0.5", "by=contrast"), values[best])
    choice = json.loads((tmp_path / "out/curated/curated.json").read_text())
    assert choice["cut_similarity"] is None and choice["dropped"] == {"not_scored": 1, "keep_fraction": 30}


@pytest.mark.slow
@pytest.mark.parametrize(("override", "message"), [
    ("min_contrast=0.1", "curate.min_contrast: these scores have no column 'contrast' of a measure, only similarity"),
    ("min_label={watermark: 0.1}", "curate.min_label: 'watermark' is none of these scores' labels: they have none"),
])
def test_rules_on_columns_that_are_not_there(shapes, run_main, tmp_path, override, message):
    """A rule on a measure that the scores were made without is one line and exit 2."""
    config = shapes(rows=3, pretrained_model=BUNDLED_MODEL, parity_rows=0)
    assert run_main("--config", config).code == 0
    with pytest.raises(script.Trouble) as trouble:
        curate.main(["--config", str(config), f"--set=curate.{override}"])
    assert trouble.value.exit_code == script.EXIT_CONFIG
    assert message in str(trouble.value)
