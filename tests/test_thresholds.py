"""Published thresholds are told for the model that they were made for, with their source and what they would keep."""
import json
import shutil

import numpy as np
import pytest


@pytest.fixture
def named_model(tmp_path, bundled_model):
    """The bundled model in a folder of another name."""
    def make(name):
        folder = tmp_path / "models" / name
        shutil.copytree(bundled_model, folder)
        return str(folder)
    return make


def test_cosines_of_laion(shapes, run_main, read_table, tmp_path, named_model):
    """For ViT-B/32 the cuts of LAION-400M and LAION-5B count the rows of the run at or above them, whatever the partitions."""
    config = shapes(pretrained_model=named_model("clip-vit-base-patch32"), rows=400, partition_rows=90)
    outcome = run_main("--config", config)
    assert outcome.code == 0
    scores = np.array([row["similarity"] for row in read_table(tmp_path / "out/scores.csv")], np.float32)
    told = json.loads((tmp_path / "out/profile.json").read_text())["published_thresholds"]
    assert [*told] == ["laion-400m", "laion-2b"]
    for name, cut in (("laion-400m", 0.30), ("laion-2b", 0.28)):
        passing = int((scores >= np.float32(cut)).sum())
        assert told[name]["min_similarity"] == cut and told[name]["rows"] == passing
        assert told[name]["share"] == passing / 400 and "arXiv" in told[name]["source"]
    line = next(line for line in outcome.stderr.splitlines() if "published thresholds" in line)
    assert f"{told['laion-2b']['share']:.1%}" in line and "0.28" in line and "Schuhmann" in line


@pytest.mark.parametrize(("name", "fraction"), [("clip-vit-large-patch14", 0.3), ("DFN-public", 0.15)])
def test_fractions(shapes, run_main, read_table, tmp_path, named_model, name, fraction):
    """A published share of the rows comes with the similarity that keeps it here, within a bin of the histogram."""
    assert run_main("--config", shapes(pretrained_model=named_model(name), rows=400)).code == 0
    scores = np.array([row["similarity"] for row in read_table(tmp_path / "out/scores.csv")], np.float32)
    (told,) = json.loads((tmp_path / "out/profile.json").read_text())["published_thresholds"].values()
    assert told["keep_fraction"] == fraction
    best = np.sort(scores)[::-1][:round(400 * fraction)]
    assert abs(told["similarity"] - best[-1]) < 0.005


def test_other_models_have_none(shapes, run_main, tmp_path, bundled_model):
    """For a model without a published cut nothing is told."""
    outcome = run_main("--config", shapes(pretrained_model=bundled_model, rows=20))
    assert "published thresholds" not in outcome.stderr
    assert "published_thresholds" not in json.loads((tmp_path / "out/profile.json").read_text())
