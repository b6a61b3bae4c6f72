"""The measure `target_embeddings`: how near each image is to those of another run."""
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import BUNDLED_MODEL
from models import change_weights
from small_inputs import unit

import curate
import image_text_sim_clip as script
from addons.measures import target_embeddings as target


@pytest.mark.parametrize("tile", [3, 4096])
def test_against_one_matrix_of_all_cosines(monkeypatch, tile):
    """The largest cosine and the 2-norm of the cosines, whatever the tiles."""
    monkeypatch.setattr(target, "TILE", tile)
    rng = np.random.default_rng(0)
    images, targets = unit(rng, 10), unit(rng, 25)
    cosines = images.astype(np.float64) @ targets.astype(np.float64).T
    assert target.find_largest(images, targets) == pytest.approx(cosines.max(axis=1), abs=1e-12)
    norms = target.find_norms(images, target.multiply_with_itself(targets))
    assert norms == pytest.approx(np.linalg.norm(cosines, axis=1), abs=1e-12)


@pytest.mark.parametrize(("content", "message"), [
    (b"nothing", "holds no saved embeddings"),
    (b"", "holds no saved embeddings"),
    (np.ones(3, np.float32), "does not hold a matrix"),
    (np.ones((2, 3), np.int64), "does not hold a matrix"),
    (np.full((2, 3), np.nan, np.float32), "not finite"),
    (np.array([[{}]]), "holds no saved embeddings"),
    (np.ones((0, 3), np.float32), "holds no image's embedding"),
])
def test_files_that_hold_no_target(tmp_path, content, message):
    """Broken files and other arrays are named, and nothing is unpickled."""
    path = tmp_path / "a.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(target.BadTarget, match=message):
        target.read_target([path])


@pytest.fixture
def run_with_target(shapes, run_main, tmp_path):
    """Score drawings against the images of the first 30 rows, which a run has saved; returns (Outcome, config)."""
    def run(saved_as="float32", path=None, **keys):
        config = shapes(rows=30, pretrained_model=BUNDLED_MODEL, save_embeddings=saved_as, partition_rows=20, parity_rows=0,
                        output_path=str(tmp_path / "target"))
        assert run_main("--config", config).code == 0
        config = shapes(rows=60, pretrained_model=BUNDLED_MODEL, parity_rows=0,
                        measures={"target_embeddings": str(path or tmp_path / "target")}, **keys)
        return run_main("--config", config), config
    return run


@pytest.mark.slow
@pytest.mark.parametrize("inside", ["", "parts"])
def test_images_of_the_target_are_nearest_to_themselves(run_with_target, read_table, tmp_path, inside):
    """target_max is 1 for an image that is among the targets and less for the others; both columns are as computed plainly."""
    outcome, _ = run_with_target(path=tmp_path / "target" / inside, save_embeddings="float32")
    assert outcome.code == 0, outcome.stderr
    assert "target embeddings  target_max: mean 0." in outcome.stderr
    rows = read_table(tmp_path / "out/scores.csv")
    largest = np.array([float(row["target_max"]) for row in rows])
    assert largest[:30] == pytest.approx(1, abs=1e-6)
    assert (largest[30:] < 1 - 1e-4).all() and (largest <= 1).all()
    # a drawing whose rows lie in two partitions, as shape-006 does, is two of the target's images
    targets = target.read_target(target.find_target_files(tmp_path / "target", BUNDLED_MODEL))
    assert len(targets) == 11
    (part,) = (tmp_path / "out/parts").glob("*.npz")
    saved = target.read_embeddings(part)
    cosines = saved["images"][saved["image_of_row"]].astype(np.float64) @ targets.astype(np.float64).T
    assert largest == pytest.approx(cosines.max(axis=1), abs=1e-6)
    assert [float(row["target_norm"]) for row in rows] == pytest.approx(np.linalg.norm(cosines, axis=1), abs=1e-5)


@pytest.mark.slow
def test_keeping_the_nearest(run_with_target, read_table, tmp_path):
    """keep_fraction by target_max keeps the rows of the target's own images."""
    outcome, config = run_with_target(saved_as="float16")
    assert outcome.code == 0
    assert curate.main(["--config", str(config), "--set=curate.keep_fraction=0.5", "--set=curate.by=target_max"]) == 0
    assert [row["url"] for row in read_table(tmp_path / "out/curated/kept.csv")] \
        == [row["url"] for row in read_table(tmp_path / "out/scores.csv")[:30]]


@pytest.mark.slow
def test_targets_that_are_refused(shapes, run_with_target, run_main, tmp_path):
    """Another model's embeddings, another width, no embeddings, no folder, the run's own folder: one line, exit 2."""
    run_with_target()

    def refused(path):
        config = shapes(rows=9, pretrained_model=BUNDLED_MODEL, parity_rows=0, output_path=str(tmp_path / "new"),
                        measures={"target_embeddings": str(path)})
        outcome = run_main("--config", config, "--fresh")
        assert outcome.code == script.EXIT_CONFIG
        return outcome.stderr
    assert "no such file or folder" in refused(tmp_path / "nowhere")
    assert "score the target images with save_embeddings" in refused(tmp_path / "out")
    assert "is this run's own folder" in refused(tmp_path / "new")
    np.save(tmp_path / "narrow.npy", np.ones((2, 3), np.float32))
    assert "has embeddings of width 3, and this run's model gives 64" in refused(tmp_path / "narrow.npy")
    manifest = tmp_path / "target/manifest.json"
    content = json.loads(manifest.read_text())
    content["settings"]["pretrained_model"] = "openai/clip-vit-base-patch32"
    manifest.write_text(json.dumps(content))
    assert "was scored with openai/clip-vit-base-patch32" in refused(tmp_path / "target")


@pytest.mark.slow
def test_a_target_of_several_models(shapes, run_main, read_table, tmp_path):
    """Of a run with several models the target is what the model of this run saw in its images, and no other model."""
    other = tmp_path / "other"
    shutil.copytree(BUNDLED_MODEL, other)
    change_weights(other, lambda weights: weights["visual_projection.weight"].mul_(torch.linspace(-1, 1, 64)[:, None]))
    config = shapes(rows=30, pretrained_model={"first": BUNDLED_MODEL, "second": str(other)}, save_embeddings="float32",
                    parity_rows=0, output_path=str(tmp_path / "target"))
    assert run_main("--config", config).code == 0

    def score(model, path):
        return run_main("--config", shapes(rows=30, pretrained_model=str(model), parity_rows=0,
                                           measures={"target_embeddings": str(path)}), "--fresh")
    for model, path in ((BUNDLED_MODEL, "target"), (other, "target/parts"), (other, "target/parts/part-00000.second.npz")):
        assert score(model, tmp_path / path).code == 0
        assert {round(float(row["target_max"]), 5) for row in read_table(tmp_path / "out/scores.csv")} == {1.0}
        assert max(float(row["target_norm"]) for row in read_table(tmp_path / "out/scores.csv")) < np.sqrt(10)  # of 10 images
    outcome = score(BUNDLED_MODEL, tmp_path / "target/parts/part-00000.second.npz")
    assert outcome.code == script.EXIT_CONFIG and f"was scored with {other}" in outcome.stderr


@pytest.mark.slow
def test_a_run_goes_on_with_the_target_that_it_was_begun_with(run_with_target, run_main, tmp_path):
    """Other embeddings at the same place are refused while parts of the run are there."""
    _, config = run_with_target(partition_rows=30)
    (tmp_path / "out/parts/part-00001.parquet").unlink()
    (tmp_path / "target/parts/part-00001.npz").unlink()
    outcome = run_main("--config", config)
    assert outcome.code == script.EXIT_CONFIG
    assert "was begun with other files (target changed)" in outcome.stderr


@pytest.mark.parametrize("asked", [None, {"file": "x"}, 3, " "])
def test_a_target_is_a_path(write_config, run_main, asked):
    """Anything but a path is one line and exit 2."""
    outcome = run_main("--config", write_config(measures={"target_embeddings": asked}))
    assert outcome.code == script.EXIT_CONFIG
    assert "measures.target_embeddings must be the output_path of a run with save_embeddings" in outcome.stderr
