"""Curation: which rows are kept, by which rule the others go, and that none is lost."""
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import typing

import numpy as np
import pytest
import yaml
from conftest import BUNDLED_MODEL, Outcome
from finished_run import last_json, write_finished_run
from hypothesis import given, settings
from hypothesis import strategies as st

import curate
import image_text_sim_clip as script
from addons.curation import duplicates, rules
from addons.curation.export import EXPORTS, Record, none_for_nan

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULT_NAMES = script.column_names(script.RESULT_COLUMNS)


@pytest.fixture
def run_curate(monkeypatch, capfd, write_config):
    """Run curate.main in this process on tmp_path/out, without the slow plots: run_curate(keep_fraction=0.3)."""
    def run(config=None, keep_plots=False, **keys):
        path = config or write_config()
        capfd.readouterr()
        with monkeypatch.context() as patch:
            if not keep_plots:
                patch.setattr(curate, "draw_plots", lambda *_: None)
            try:
                code = curate.main(["--config", str(path), *(f"--set=curate.{k}={json.dumps(v)}" for k, v in keys.items())])
            except script.Trouble as trouble:
                script.say(f"error: {trouble}")
                code = trouble.exit_code
        return Outcome(code, *capfd.readouterr())
    return run


@pytest.fixture
def curated(tmp_path, read_table):
    """Read kept.csv and dropped.csv: row numbers kept, and the rule by row number of those dropped (captions name the row)."""
    def read():
        kept, dropped = (read_table(tmp_path / "out/curated" / name) for name in ("kept.csv", "dropped.csv"))
        return [row["url"] for row in kept], {row["url"]: row["dropped_by"] for row in dropped}
    return read


# ── The section ───────────────────────────────────────────────────────────────────────────────────────────────────────

def test_config_yaml_documents_every_key():
    """The section in config.yaml holds every key of the dataclass, in its order, with its default."""
    section = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))["curate"]
    assert list(section.items()) == list(dataclasses.asdict(rules.Curation()).items())


def test_every_export_can_be_asked_for():
    """The key `export` knows the exports that there are, and no other."""
    assert typing.get_args(rules.Curation.__annotations__["export"]) == tuple(EXPORTS)


def test_no_column_hides_another():
    """A column of the table or of a measure that is called like one of ours is exported under another name."""
    columns = {"row": "r", "measure_text": "m", "source": "web"}
    further = {"text": "t", "file_name": "f", "row": 1.0, "brightness": 0.5}
    assert [none_for_nan(cell) for cell in (0.5, np.nan, np.inf, -np.inf, "nan")] == [0.5, None, None, None, "nan"]
    described = Record(7, "a.png", "u", "c", 0.25, 0.75, columns, further).describe()
    assert described == {"text": "c", "row": 7, "url": "u", "similarity": 0.25, "dissimilarity": 0.75, "input_row": "r",
                         "measure_text": "m", "source": "web", "measure_measure_text": "t", "filename": "f",
                         "measure_row": 1.0, "brightness": 0.5}


def test_every_rule_is_explained():
    """Each verdict but `kept` has a sentence."""
    assert set(rules.RULE_TEXTS) == set(rules.RULES) - {"kept"}


@pytest.mark.parametrize(("keys", "words"), [
    ({"keep_fractoin": 0.3}, ["curate.keep_fractoin", "curate.keep_fraction"]),
    ({"keep_fraction": 30}, ["curate.keep_fraction", "[0, 1]"]),
    ({"min_similarity": "high"}, ["curate.min_similarity", "a number | null"]),
    ({"export": "zip"}, ["curate.export", "csv | parquet | imagefolder | webdataset"]),
    ({"review": 1}, ["curate.review", "true | false"]),
])
def test_a_mistake_in_the_section_is_one_line(run_curate, keys, words):
    """Unknown keys, wrong types and ranges are exit code 2 and a line that names the key."""
    outcome = run_curate(**keys)
    assert outcome.code == 2
    assert len(outcome.stderr.strip().splitlines()) == 1
    assert all(word in outcome.stderr for word in words)


def test_a_rule_without_its_section_is_told_where_it_stands(write_config):
    """`--set min_similarity=0.3` is exit code 2 and names `curate.min_similarity`; the keys of the config are none of these."""
    with pytest.raises(script.Trouble, match=r"did you mean 'curate\.min_similarity'") as caught:
        curate.main(["--config", str(write_config()), "--set", "min_similarity=0.3"])
    assert caught.value.exit_code == 2
    assert not rules.Curation.__dataclass_fields__.keys() & script.Config.__dataclass_fields__.keys()


def test_section_is_harmless_to_the_scores(tmp_path, write_config, write_table, run_main):
    """A finished run is not refused because `curate` has changed since, nor for what is in it."""
    write_table([["url", "caption"], ["a.png", "a"]])
    assert run_main("--config", write_config()).code == 0
    assert run_main("--config", write_config(curate={"keep_fraction": 0.1})).code == 0


# ── The best fraction ─────────────────────────────────────────────────────────────────────────────────────────────────

@given(st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=60))
@settings(deadline=None, max_examples=100)
def test_order_keys_keep_the_order(values):
    """Keys are ordered as the floats are, equal where they are equal (0 and -0 too), and lead back to them."""
    values = np.array(values, np.float32)
    keys = rules.order_keys(values)
    assert ((keys[:, None] < keys[None]) == (values[:, None] < values[None])).all()
    assert all(rules.similarity_of_key(int(key)) == value for key, value in zip(keys, values, strict=True))


@given(st.lists(st.sampled_from([-0.5, 0.0, 0.1, 0.25, 0.3, 0.7, float("nan")]) | st.floats(-1, 1, width=32), max_size=80),
       st.sampled_from([0.0, 0.1, 0.29, 0.3, 0.5, 0.7, 1.0]), st.integers(1, 30))
@settings(deadline=None, max_examples=150)
def test_fraction_is_exact_and_ties_go_to_the_first(values, fraction, size):
    """floor(fraction x scored) rows are kept: those that a stable sort puts first, however the rows are cut into chunks."""
    values = np.array(values, np.float32)
    chunks = [values[i:i + size] for i in range(0, len(values), size)]
    cut, scored = rules.find_fraction_cut(lambda: iter(chunks), fraction), np.flatnonzero(~np.isnan(values))
    wanted = round(fraction * 100) * len(scored) // 100
    expected = sorted(scored[np.argsort(-values[scored], kind="stable")][:wanted].tolist())
    assert scored[cut.keeps(values[scored], scored)].tolist() == expected


def test_fraction_is_taken_as_it_is_written():
    """0.29 of 100 rows is 29, though 0.29 x 100 is a little less in floats."""
    assert int(0.29 * 100) == 28
    similarities = np.linspace(0, 1, 100, dtype=np.float32)
    cut = rules.find_fraction_cut(lambda: [similarities], 0.29)
    assert cut.keeps(similarities, np.arange(100)).sum() == 29


MILLION = """
import pathlib, sys
import pyarrow.parquet, pyarrow.compute, numpy
import curate
def peak_mb():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
imported = peak_mb()
curate.main(["--config", sys.argv[1], "--set", "output_path=" + sys.argv[2], "--set", "curate.keep_fraction=0.3"])
print(peak_mb() - imported, "torch" in sys.modules or "transformers" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_fraction_of_a_million_rows(tmp_path, write_config):
    """keep_fraction: 0.3 keeps 300,000 of a million, none worse than a dropped one, in 270 MB, however the parts were cut.

    In parts of 10,000 rows it is less than half of that; of the large ones two are held, one read while the other is written.
    """
    import pyarrow.csv
    similarities = np.random.default_rng(1).normal(0.25, 0.05, 1_000_000).round(4).astype(np.float32)  # many ties
    captions = [f"caption {n}" for n in range(1_000_000)]
    found = []
    for rows in (10_000, 330_001):
        out = write_finished_run(tmp_path / f"out-{rows}", similarities, captions, captions, partition_rows=rows)
        done = subprocess.run([sys.executable, "-c", MILLION, str(write_config()), str(out)], capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=100)
        assert done.returncode == 0, done.stderr
        grown_mb, has_torch = done.stdout.split()[-2:]
        assert float(grown_mb) < 270
        assert has_torch == "False"
        found.append([hashlib.sha256((out / "curated" / name).read_bytes()).digest() for name in ("kept.csv", "dropped.csv")])
    assert found[0] == found[1]
    kept, dropped = (pyarrow.csv.read_csv(out / "curated" / name) for name in ("kept.csv", "dropped.csv"))
    assert (kept.num_rows, dropped.num_rows) == (300_000, 700_000)
    lowest = min(kept["similarity"].to_pylist())
    assert lowest >= max(dropped["similarity"].to_pylist())
    at_cut = np.flatnonzero(similarities == np.float32(lowest))
    taken = [int(caption.split()[1]) for caption, s in zip(kept["caption"].to_pylist(), kept["similarity"].to_pylist(),
                                                           strict=True) if s == lowest]
    assert 0 < len(taken) < len(at_cut)
    assert taken == at_cut[:len(taken)].tolist()


# ── Rules ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_kept_and_dropped_are_all_rows(tmp_path, run_curate, curated, read_table):
    """Without any rule every scored row is kept; both files have the columns of scores.csv, in input order."""
    scores = [0.1, float("nan"), 0.3, 0.2]
    write_finished_run(tmp_path / "out", scores, random=np.linspace(-0.1, 0.2, 100), partition_rows=3)
    outcome = run_curate()
    assert outcome.code == 0, outcome.stderr
    assert curated() == (["0.png", "2.png", "3.png"], {"1.png": "not_scored"})
    columns = ["url", "caption", *RESULT_NAMES]
    assert list(read_table(tmp_path / "out/curated/kept.csv")[0]) == columns
    assert list(read_table(tmp_path / "out/curated/dropped.csv")[0]) == [*columns, "dropped_by"]
    assert [row["percentile"] != "" for row in read_table(tmp_path / "out/curated/kept.csv")] == [True] * 3
    assert (outcome.result["rows"], outcome.result["kept"], outcome.result["dropped"]) == (4, 3, {"not_scored": 1})


def test_similarities_are_compared_as_float32(tmp_path, run_curate, curated):
    """A row whose cell says 0.7 passes min_similarity: 0.7, though the float32 lies a little below it."""
    write_finished_run(tmp_path / "out", np.array([0.7, 0.69999], np.float32))
    assert float(np.float32(0.7)) < 0.7
    assert run_curate(min_similarity=0.7).code == 0
    assert curated() == (["0.png"], {"1.png": "min_similarity"})


def test_only_scored_rows_count_for_a_fraction(tmp_path, run_curate, curated):
    """Half of four scored rows is two, however many others have failed."""
    write_finished_run(tmp_path / "out", [0.1, np.nan, 0.4, np.nan, 0.3, np.nan, 0.2, np.nan], partition_rows=3)
    run_curate(keep_fraction=0.5)
    assert curated()[0] == ["2.png", "4.png"]


def test_a_fraction_of_less_than_a_row_has_no_cut(tmp_path, run_curate, curated):
    """A tenth of four rows is none: nothing is kept, there is no cut, and all that is written is JSON for any program."""
    write_finished_run(tmp_path / "out", [0.1, 0.4, 0.3, 0.2])
    outcome = run_curate(keep_fraction=0.1, review=True)
    assert outcome.code == 0 and curated()[0] == []
    page = (tmp_path / "out/curated/review.html").read_text(encoding="utf-8")
    data = page.split('type="application/json"')[1].split("</script>")[0]
    for text in (outcome.stdout, (tmp_path / "out/curated/curated.json").read_text(encoding="utf-8")):
        assert json.loads(text, parse_constant=pytest.fail)["cut_similarity"] is None
    assert "cut at similarity" not in outcome.stderr and "NaN" not in data


def test_first_rule_that_fails_is_named(tmp_path, run_curate, curated):
    """Rules are applied in a fixed order: caption length, then similarity."""
    write_finished_run(tmp_path / "out", [0.9, 0.9, 0.1, 0.1, 0.5], ["long enough", "no", "long enough", "no", "x" * 50])
    run_curate(min_caption_chars=5, max_caption_chars=20, min_similarity=0.2)
    assert curated() == (["0.png"], {"1.png": "caption_length", "2.png": "min_similarity", "3.png": "caption_length",
                                     "4.png": "caption_length"})


def test_random_rate_cuts_where_the_random_pairs_say(tmp_path, run_curate, curated):
    """max_random_rate keeps what lies above all but that share of random pairs."""
    write_finished_run(tmp_path / "out", [0.05, 0.095, 0.11, 0.2], random=np.linspace(0, 0.1, 1001))
    outcome = run_curate(max_random_rate=0.1)
    assert outcome.result["cut_similarity"] == pytest.approx(0.09, abs=0.001)
    assert outcome.result["random_pairs_at_cut"] <= 0.1
    assert curated() == (["1.png", "2.png", "3.png"], {"0.png": "max_random_rate"})


def test_random_rate_needs_random_pairs(tmp_path, run_curate):
    """Scores without random pairs (a dry run) cannot be cut by them: exit code 2, one line."""
    write_finished_run(tmp_path / "out", [0.05])
    outcome = run_curate(max_random_rate=0.1)
    assert outcome.code == 2 and "max_random_rate" in outcome.stderr and outcome.stderr.count("\n") == 1


@pytest.mark.slow
def test_random_rate_parts_the_bundled_drawings(shapes, run_main, run_curate, read_table, tmp_path):
    """max_random_rate: 0.01 keeps at least 90 % of the good captions and at most 2 % of the wrong ones."""
    config = shapes(pretrained_model=BUNDLED_MODEL)
    assert run_main("--config", config).code == 0
    assert run_curate(config, max_random_rate=0.01).code == 0
    kept = [row["match"] for row in read_table(tmp_path / "out/curated/kept.csv")]
    assert kept.count("good") >= 0.9 * 200
    assert kept.count("wrong") <= 0.02 * 200


# ── Recipes ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_recipe_sets_its_keys(tmp_path, run_curate, curated):
    """laion-400m keeps what scores 0.3 or more, and says so in curated.json."""
    write_finished_run(tmp_path / "out", np.array([0.29, 0.3, 0.31], np.float32))
    assert run_curate(recipe="laion-400m").code == 0
    assert curated() == (["1.png", "2.png"], {"0.png": "min_similarity"})
    assert json.loads((tmp_path / "out/curated/curated.json").read_text())["curate"]["min_similarity"] == 0.3


@pytest.mark.parametrize("recipe", list(rules.RECIPES))
def test_recipe_refuses_another_model(tmp_path, run_curate, recipe):
    """A recipe's numbers are one model's: scores of another are refused, unless told."""
    write_finished_run(tmp_path / "out", [0.29, 0.31], model="google/siglip-base-patch16-224")
    outcome = run_curate(recipe=recipe)
    assert outcome.code == 2 and rules.RECIPES[recipe].model in outcome.stderr and "siglip" in outcome.stderr
    outcome = run_curate(recipe=recipe, recipe_for_any_model=True)
    if rules.RECIPES[recipe].keys.keys() & {"by", "min_head"}:
        assert outcome.code == 2 and "these scores" in outcome.stderr  # which have no such measure
    else:
        assert outcome.code == 0


def test_recipe_and_key_must_not_disagree(tmp_path, run_curate):
    """A recipe and its key with another value contradict each other: a mistake."""
    write_finished_run(tmp_path / "out", [0.29])
    assert run_curate(recipe="laion-2b", min_similarity=0.28).code == 0
    assert "min_similarity" in (outcome := run_curate(recipe="laion-2b", min_similarity=0.2)).stderr and outcome.code == 2


def test_recipe_knows_a_local_copy(tmp_path):
    """A folder named like the model counts as that model."""
    chosen = rules.Curation(recipe="datacomp-l14-top30")
    assert rules.apply_recipe(chosen, "/models/clip-vit-large-patch14/").keep_fraction == 0.3


# ── Neighbours ────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_best_caption_of_an_image(tmp_path, run_curate, curated):
    """Of one URL's rows the highest stays, of equal ones the first, among those that pass the other rules."""
    write_finished_run(tmp_path / "out", [0.1, 0.5, 0.5, 0.9, 0.2], ["aaaa", "bbbb", "cccc", "d", "eeee"],
                       ["x.png", "x.png", "x.png", "x.png", "y.png"], partition_rows=2)
    run_curate(one_caption_per_image=True, min_caption_chars=2)
    kept = (tmp_path / "out/curated/kept.csv").read_text().splitlines()[1:]
    assert [line.split(",")[:2] for line in kept] == [["x.png", "bbbb"], ["y.png", "eeee"]]


def test_equal_captions(tmp_path, run_curate, curated):
    """Of equal captions (white space around them aside) the row with the highest score stays."""
    write_finished_run(tmp_path / "out", [0.1, 0.5, 0.3], ["same", " same", "other"])
    run_curate(duplicate_captions="exact")
    assert curated() == (["1.png", "2.png"], {"0.png": "duplicate_caption"})


def test_equal_images(tmp_path, run_curate, curated, picture_bytes):
    """Of files with equal bytes the best-scoring stays, with all its captions; perceptually, so do near ones."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    one, other = picture_bytes(colour=10), picture_bytes(colour=200)
    for name, data in (("a.png", one), ("b.png", one), ("c.png", other)):
        (pictures / name).write_bytes(data)
    write_finished_run(tmp_path / "out", [0.1, 0.5, 0.2, 0.3], sources=["a.png", "b.png", "b.png", "c.png"], partition_rows=1)
    assert run_curate(duplicate_images="exact").code == 0
    assert curated() == (["b.png", "b.png", "c.png"], {"a.png": "duplicate_image"})


def test_similar_images(tmp_path, run_curate, curated, noise):
    """An image saved again smaller and as JPEG is found by its perceptual hash, another image is not."""
    pytest.importorskip("imagehash")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    noise(200, 150, 1).save(pictures / "a.png")
    noise(200, 150, 1).resize((120, 90)).save(pictures / "b.jpg", quality=60)
    noise(200, 150, 2).save(pictures / "c.png")
    write_finished_run(tmp_path / "out", [0.5, 0.4, 0.3], sources=["a.png", "b.jpg", "c.png"])
    assert run_curate(duplicate_images="exact").code == 0
    assert len(curated()[0]) == 3
    assert run_curate(duplicate_images="perceptual").code == 0
    assert curated() == (["a.png", "c.png"], {"b.jpg": "duplicate_image"})


def test_missing_library_is_one_line(tmp_path, run_curate, monkeypatch):
    """Without imagehash the key that needs it names the pip install, before any work."""
    write_finished_run(tmp_path / "out", [0.5])
    monkeypatch.setitem(sys.modules, "imagehash", None)
    outcome = run_curate(duplicate_images="perceptual")
    assert outcome.code == 2 and "pip install" in outcome.stderr and "imagehash" in outcome.stderr


@given(st.lists(st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 3, 7, 255, 2**63, 2**63 + 1]), max_size=25),
       st.integers(0, 16))
@settings(deadline=None, max_examples=100)
def test_groups_of_similar_hashes(hashes, distance):
    """Each hash joins a leader within the distance, and no two leaders are that near: as if all pairs had been compared."""
    groups = duplicates.group_similar(np.array(hashes, np.uint64), distance).tolist()
    leaders: list = []
    for value, group in zip(hashes, groups, strict=True):
        assert (value ^ group).bit_count() <= distance
        near = [leader for leader in leaders if (leader ^ value).bit_count() <= distance]
        assert group in near if near else group == value
        if not near:
            leaders.append(value)


def test_sizes_of_images(tmp_path, run_curate, curated, picture_bytes):
    """Width, height and aspect are read from the images; one that is gone by now is dropped by that name."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, size in (("fits.png", (60, 40)), ("narrow.png", (30, 60)), ("low.png", (60, 30)), ("long.png", (160, 40))):
        (pictures / name).write_bytes(picture_bytes(size=size))
    (pictures / "broken.png").write_bytes(b"\x89PNG broken")
    names = ["fits.png", "narrow.png", "low.png", "long.png", "broken.png", "gone.png"]
    write_finished_run(tmp_path / "out", [0.5] * 6, sources=names)
    assert run_curate(min_width=40, min_height=40, max_aspect=3).code == 0
    assert curated() == (["fits.png"], {"narrow.png": "image_size", "low.png": "image_size", "long.png": "aspect",
                                        "broken.png": "unreadable_image", "gone.png": "unreadable_image"})


# ── What may go wrong ─────────────────────────────────────────────────────────────────────────────────────────────────

def test_no_finished_scores(tmp_path, run_curate):
    """Without scores, or with a part missing, it says what to run: exit code 3."""
    outcome = run_curate()
    assert outcome.code == 3 and "image_text_sim_clip.py" in outcome.stderr
    write_finished_run(tmp_path / "out", [0.5] * 3, partition_rows=1)
    (tmp_path / "out/parts/part-00001.parquet").unlink()
    outcome = run_curate()
    assert outcome.code == 3 and "part-00001.parquet" in outcome.stderr
    assert not (tmp_path / "out/curated/kept.csv").exists()


def test_dry_run_keeps_nothing(shapes, run_main, run_curate, tmp_path):
    """Rows without a similarity cannot be chosen: after a dry run all are dropped as not scored."""
    config = shapes(rows=5)
    assert run_main("--config", config).code == 0
    outcome = run_curate(config, keep_fraction=0.5)
    assert outcome.code == 0, outcome.stderr
    assert (outcome.result["kept"], outcome.result["dropped"]) == (0, {"not_scored": 5})


def test_flawed_part(tmp_path, run_curate):
    """A part that is not what was written is named: exit code 7."""
    write_finished_run(tmp_path / "out", [0.5] * 3)
    part = tmp_path / "out/parts/part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    outcome = run_curate()
    assert outcome.code == 7 and "part-00000.parquet" in outcome.stderr and outcome.stderr.count("\n") == 1


@pytest.mark.parametrize("place", [100, -40])
def test_flipped_bit_of_a_part(tmp_path, run_curate, place):
    """A bit that flipped among a part's rows, or in its footer, is found: exit code 7."""
    write_finished_run(tmp_path / "out", [0.5] * 3)
    part = tmp_path / "out/parts/part-00000.parquet"
    content = bytearray(part.read_bytes())
    content[place] ^= 1
    part.write_bytes(content)
    outcome = run_curate()
    assert outcome.code == 7 and "part-00000.parquet" in outcome.stderr


def test_scores_of_another_version(tmp_path, run_curate):
    """A folder that 0.1 wrote, whose manifest names no format, is refused in one line with that version: exit code 2."""
    write_finished_run(tmp_path / "out", [0.5])
    path = tmp_path / "out/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["format"]
    path.write_text(json.dumps(manifest | {"version": "0.1.0"}))
    outcome = run_curate()
    assert outcome.code == 2 and "0.1.0" in outcome.stderr and outcome.stderr.count("\n") == 1
    assert not (tmp_path / "out/curated").exists()


def test_columns_that_clash_and_formulas(tmp_path, run_curate, read_table, write_config):
    """A column of the input named dropped_by keeps its name, and escape_formulas holds here too."""
    write_finished_run(tmp_path / "out", [0.1, 0.9], ["=1+1", "a\rb"], extra={"dropped_by": ["-x", "y"]})
    run_curate(write_config(escape_formulas=True), min_similarity=0.5)
    (kept,), (dropped,) = (read_table(tmp_path / "out/curated" / name) for name in ("kept.csv", "dropped.csv"))
    assert (kept["caption"], kept["dropped_by"]) == ("a\rb", "y")
    assert (dropped["caption"], dropped["dropped_by"], dropped["dropped_by_2"]) == ("'=1+1", "'-x", "min_similarity")


def test_empty_table(tmp_path, run_curate, read_table):
    """No rows give two tables with their header and nothing else."""
    write_finished_run(tmp_path / "out", [])
    outcome = run_curate(keep_fraction=0.5, export="parquet", review=True, duplicate_captions="exact")
    assert outcome.code == 0, outcome.stderr
    assert (tmp_path / "out/curated/kept.csv").read_text() == ",".join(["url", "caption", *RESULT_NAMES]) + "\n"
    assert outcome.result["kept"] == 0


@pytest.mark.slow
def test_plots(tmp_path, run_curate):
    """scores.png, throughput.png and memory.png are images of a fair size."""
    from PIL import Image
    write_finished_run(tmp_path / "out", np.linspace(0, 0.5, 500), random=np.linspace(-0.2, 0.2, 500))
    assert run_curate(keep_plots=True, max_random_rate=0.01).code == 0
    for name in ("scores.png", "throughput.png", "memory.png"):
        with Image.open(tmp_path / "out/curated" / name) as plot:
            assert plot.width >= 800 and len(plot.convert("RGB").resize((50, 25)).getcolors(1250)) > 5, name


@pytest.mark.slow
def test_plots_without_times(tmp_path, run_curate):
    """The parts' times lie in files that may be missing: the plots are drawn all the same."""
    write_finished_run(tmp_path / "out", np.linspace(0, 0.5, 500), random=np.linspace(-0.2, 0.2, 500))
    for path in (tmp_path / "out/parts").glob("*.json"):
        path.unlink()
    assert run_curate(keep_plots=True).code == 0
    assert (tmp_path / "out/curated/throughput.png").stat().st_size > 1000


def test_command_line(tmp_path, write_config):
    """`python curate.py` ends with the exit codes of the scoring script, in one line, and its JSON comes last."""
    def run(*arguments):
        command = [sys.executable, str(ROOT / "curate.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    config = str(write_config())
    mistaken = run("--confg", config)
    assert mistaken.returncode == 2 and mistaken.stderr.count("\n") == 1
    failed = run("--config", config)
    assert failed.returncode == 3 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
    write_finished_run(tmp_path / "out", [0.5])
    done = run("--config", config, "--set", "curate.min_similarity=0.4")
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["kept"] == 1


@pytest.mark.parametrize("how", ["--retry-failed", "--fresh"])
def test_what_was_made_of_other_scores_is_not_finished(write_config, write_table, run_main, run_curate, picture_bytes, tmp_path,
                                                       monkeypatch, how):
    """When a run is discarded, or a part of it replaced, curated.json goes: what lies next to it is of the scores before."""
    config = write_config()
    write_table("url,caption\n1.png,x\n2.png,y\n")
    for number in (1, 2):
        (tmp_path / f"pictures/{number}.png").write_bytes(picture_bytes())

    def open_late_source(config, threads):
        def read(source):
            raise script.RowFailure("timeout", "")
        return read
    with monkeypatch.context() as patch:
        patch.setattr(script, "open_source", open_late_source)
        assert run_main("--config", config).result["failed"] == {"timeout": 2}
    curated = tmp_path / "out/curated"
    assert run_curate(config).code == 0
    assert run_main("--config", config).code == 0 and (curated / "curated.json").exists()
    assert run_main("--config", config, how).result["failed"] == {}
    assert not (curated / "curated.json").exists() and (curated / "kept.csv").exists()
    shutil.rmtree(curated)
    curated.write_text("somebody's own")
    assert run_main("--config", config, "--fresh").code == 0 and curated.read_text() == "somebody's own"


@pytest.mark.parametrize("own", [{"csv_path": "kept.csv"}, {"csv_path": "imagefolder"}, {"csv_path": "*.csv"},
                                 {"image_path": "imagefolder/train"}, {"csv_path": "../curated/kept.csv"}])
def test_what_was_curated_before_is_not_written_over(tmp_path, write_config, run_curate, own):
    """A table, or images, in curated/ that are the input by now are not replaced by what is kept of them: exit 2, one line."""
    write_finished_run(tmp_path / "out", [0.5, 0.2])
    curated = tmp_path / "out/curated"
    (curated / "imagefolder/train").mkdir(parents=True)
    (curated / "kept.csv").write_text("the input")
    outcome = run_curate(write_config(**{key: f"{curated}/{name}" for key, name in own.items()}))
    assert outcome.code == 2 and "is about to be written" in outcome.stderr and len(outcome.stderr.splitlines()) == 1
    assert (curated / "kept.csv").read_text() == "the input"
    assert run_curate(write_config(csv_path=str(tmp_path / "out/curated.csv"))).code == 0
