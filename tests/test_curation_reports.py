"""What curation tells of its rules and measures: overlaps, plots, recipes with measures, embeddings for an index."""
import json
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import BUNDLED_MODEL
from finished_run import write_finished_run
from PIL import Image

import curate
import image_text_sim_clip as script
from addons.curation import plots, rules
from addons.curation.overlaps import Overlaps
from addons.measures.embeddings import read_embeddings


@pytest.fixture
def run_curate(tmp_path, write_config, capfd):
    """Curate tmp_path/out by some keys: (curated.json, what was said)."""
    def run(config=None, **keys):
        config = config or write_config()
        overrides = [f"--set=curate.{key}={json.dumps(value)}" for key, value in keys.items()]
        capfd.readouterr()
        assert curate.main(["--config", str(config), *overrides]) == 0
        return json.loads((tmp_path / "out/curated/curated.json").read_text()), capfd.readouterr().err
    return run


# ── Overlaps ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_overlaps_by_hand():
    """Of the scored rows: how many fail each rule, each two, and any; chunks add up."""
    overlaps = Overlaps()
    for chunk in (slice(0, 2), slice(2, 5)):
        overlaps.add({"not_scored": np.array([False, False, False, False, True])[chunk],
                      "a": np.array([True, True, False, False, True])[chunk],
                      "b": np.array([False, True, True, False, True])[chunk]})
    assert overlaps.alone == {"a": 2, "b": 2}
    assert overlaps.both == {"a": {"b": 1}, "b": {"a": 1}}
    assert overlaps.together == 3


def test_what_each_rule_would_drop_alone(tmp_path, run_curate):
    """The verdicts count a row once, for the first rule that it fails; `alone` counts it for each."""
    write_finished_run(tmp_path / "out", [0.1, 0.2, 0.3, 0.4, np.nan], ["a", "bbb", "c", "ddd", "e"], partition_rows=2)
    choice, said = run_curate(min_caption_chars=2, min_similarity=0.25)
    assert choice["dropped"] == {"not_scored": 1, "caption_length": 2, "min_similarity": 1}
    assert choice["alone"] == {"caption_length": 2, "min_similarity": 2}
    assert choice["overlap"] == {"caption_length": {"min_similarity": 1}, "min_similarity": {"caption_length": 1}}
    assert choice["together"] == 3
    assert "1 dropped (alone: 2): scores below min_similarity" in said
    assert "2 dropped: the caption is shorter or longer" in said


def test_two_limits_of_one_rule_are_one(tmp_path, run_curate):
    """A single rule overlaps with none, and without rules nothing is counted."""
    write_finished_run(tmp_path / "out", [0.1, 0.2])
    choice, _ = run_curate(min_similarity=0.15)
    assert (choice["alone"], choice["overlap"], choice["together"]) == ({"min_similarity": 1}, {"min_similarity": {}}, 1)
    choice, _ = run_curate()
    assert (choice["alone"], choice["overlap"], choice["together"]) == ({}, {}, 0)
    columns = {"a": np.array([0.4, 0.6, 0.5], np.float32), "b": np.array([2, 0.1, np.nan], np.float32)}
    rows = rules.ScoredRows(0, np.zeros(3, np.float32), np.ones(3, bool), lambda: ["", "", ""], columns)
    limits = [rules.ColumnOutside("max_label", "a", most=0.5), rules.ColumnOutside("max_label", "b", most=1)]
    failures = rules.find_failures(limits, rows)
    assert {name: fails.tolist() for name, fails in failures.items()} == {"max_label": [True, True, True]}


# ── Plots ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("values", [[], [np.nan], [0.5, 0.5], [-3.0, np.nan, 40.0], [3e38, -3e38]])
def test_a_plot_of_any_values(tmp_path, values):
    """No value, one value, far values: a plot all the same."""
    chunk = np.array(values, np.float32)
    with (tmp_path / "plot.png").open("wb") as file:
        plots.draw_measure(lambda: iter([(chunk, np.isfinite(chunk)), (chunk[:1], np.zeros(len(chunk[:1]), bool))]), [0.1],
                           script.Column("x", "float", "what it means"), file)
    with Image.open(tmp_path / "plot.png") as image:
        assert image.size[0] > 800


@pytest.mark.parametrize("text", ["it costs $5 or $10", "$ $", r"$\frac$", "a_b^c", "\\", "一张有水印的照片 🎨", "long " * 60])
def test_a_plot_of_any_prompt(tmp_path, text):
    """A prompt stands in the plot as it is: what lies between two dollars is no formula, and no letter is a warning."""
    chunk = np.array([0.1, 0.2], np.float32)
    with (tmp_path / "plot.png").open("wb") as file, warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.draw_measure(lambda: iter([(chunk, chunk > 0.15)]), [0.1], script.Column(text, "float", text), file)
    assert (tmp_path / "plot.png").stat().st_size > 1000


# ── In a run ──────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def scored(shapes, run_main):
    """A run of 60 drawings' rows with contrast, a label with an odd name, and saved embeddings."""
    config = shapes(rows=60, pretrained_model=BUNDLED_MODEL, parity_rows=0, partition_rows=25, save_embeddings="float16",
                    measures={"contrast": {}, "labels": {"red/blue": ["a red shape", "a blue shape"]}})
    assert run_main("--config", config).code == 0
    return config


@pytest.mark.parametrize("key", ["export=clip-retrieval", "duplicate_images=semantic"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_damaged_embeddings_are_not_used(scored, tmp_path, key, damage):
    """Embeddings that are not what had been written are one line, exit 7, for what needs them, and nothing is written."""
    path = tmp_path / "out/parts/part-00001.npz"
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(data[:-50] if damage == "cut" else data[:300] + bytes([data[300] ^ 1]) + data[301:])
    with pytest.raises(script.Trouble, match=r"part-00001\.npz is not what had been written") as trouble:
        curate.main(["--config", str(scored), f"--set=curate.{key}"])
    assert trouble.value.exit_code == script.EXIT_VERIFY and not (tmp_path / "out/curated").exists()


@pytest.mark.slow
def test_a_plot_of_each_measure(scored, run_curate, tmp_path):
    """Each column of a measure gets a plot, whatever its name; plots of an earlier choice are replaced."""
    (tmp_path / "out/curated").mkdir()
    (tmp_path / "out/curated/measure-old.png").write_bytes(b"")
    choice, _ = run_curate(scored, min_contrast=-0.2, max_label={"red/blue": 0.5})
    assert sorted(path.name for path in (tmp_path / "out/curated").glob("measure-*.png")) \
        == ["measure-contrast.png", "measure-red_blue.png"]
    assert choice["alone"].keys() == {"min_contrast", "max_label"}
    assert choice["together"] == choice["scored"] - choice["kept"]


@pytest.mark.slow
def test_embeddings_as_clip_retrieval_lays_them_out(scored, run_curate, read_table, tmp_path):
    """Three folders whose files' k-th entries belong together: the kept rows' vectors, keys, captions and columns."""
    choice, _ = run_curate(scored, export="clip-retrieval", min_contrast=-0.2)
    folder = tmp_path / "out/curated/clip-retrieval"
    kept = read_table(tmp_path / "out/curated/kept.csv")
    tables, images, texts = [], [], []
    for path in sorted((folder / "metadata").iterdir()):
        number = path.stem.removeprefix("metadata_")
        tables += pq.read_table(path).to_pylist()
        images.append(np.load(folder / f"img_emb/img_emb_{number}.npy"))
        texts.append(np.load(folder / f"text_emb/text_emb_{number}.npy"))
    assert len(tables) == choice["exported"] == choice["kept"] == len(kept) > 10
    assert [(row["image_path"], row["caption"]) for row in tables] == [(row["url"], row["caption"]) for row in kept]
    everything = read_table(tmp_path / "out/scores.csv")
    for row in tables:
        assert everything[int(row["key"])]["caption"] == row["caption"]
        assert float(everything[int(row["key"])]["contrast"]) == np.float32(row["contrast"])
    cosines = (np.concatenate(images).astype(np.float32) * np.concatenate(texts).astype(np.float32)).sum(axis=1)
    assert cosines == pytest.approx([row["similarity"] for row in tables], abs=2e-3)
    assert images[0].dtype == np.float16
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    run_curate(scored, export="clip-retrieval", min_contrast=-0.2)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    run_curate(scored, export="clip-retrieval", keep_fraction=0.1)
    assert len(pq.read_table(folder / "metadata")) == 6
    saved = read_embeddings(tmp_path / "out/parts/part-00000.npz")
    assert images[0].shape[1] == saved["images"].shape[1]


def test_embeddings_that_were_not_saved(tmp_path, write_config):
    """The export says what to score with, before anything is written."""
    write_finished_run(tmp_path / "out", [0.1])
    with pytest.raises(script.Trouble) as trouble:
        curate.main(["--config", str(write_config()), "--set=curate.export=clip-retrieval"])
    assert trouble.value.exit_code == script.EXIT_CONFIG
    assert "score with save_embeddings first" in str(trouble.value)
    assert not (tmp_path / "out/curated").exists()


@pytest.mark.slow
def test_a_recipe_with_a_measure(scored, run_curate):
    """A recipe sets what a measure's rule needs, and another value for the same key is refused."""
    choice, _ = run_curate(scored, recipe="s-cliploss-l14-top30", recipe_for_any_model=True)
    assert (choice["curate"]["by"], choice["kept"]) == ("contrast", 18)
    with pytest.raises(script.Trouble, match="recipe s-cliploss-l14-top30 sets by to contrast"):
        run_curate(scored, recipe="s-cliploss-l14-top30", recipe_for_any_model=True, by="red/blue")


def test_by_needs_a_fraction(tmp_path, write_config):
    """`by` alone keeps nothing and drops nothing: it is refused."""
    write_finished_run(tmp_path / "out", [0.1])
    with pytest.raises(script.Trouble, match=r"curate\.by: contrast needs keep_fraction"):
        curate.main(["--config", str(write_config()), "--set=curate.by=contrast"])
