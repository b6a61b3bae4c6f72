"""`duplicate_images: semantic`: images that show the same are found by their embeddings, and others are left alone."""
import numpy as np
import pytest
from conftest import BUNDLED_MODEL, ROOT
from finished_run import write_finished_run
from PIL import Image, ImageEnhance

import curate
import image_text_sim_clip as script
from addons.curation import duplicates, semantic

pytest.importorskip("faiss")


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_vectors(path, vectors):
    path.write_bytes(vectors.astype(np.float16).tobytes())
    return semantic.VectorFile(path, *vectors.shape)


# ── Groups ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def plain_groups(vectors, least):
    """Each vector joins the first leader found within the cosine `least`, or leads: the sets of those that any may join."""
    leaders, joins = [], []
    for place, vector in enumerate(vectors):
        near = [leader for leader in leaders if vectors[leader] @ vector >= least]
        if not near:
            leaders.append(place)
        joins.append(near or [place])
    return joins


@pytest.mark.parametrize("batch", [1, 7, 2048])
def test_each_joins_a_leader_within_the_distance(tmp_path, monkeypatch, batch):
    """The leaders are those of a plain search, and each other vector joins one that is near, whatever the batches."""
    monkeypatch.setattr(semantic, "BATCH", batch)
    rng = np.random.default_rng(0)
    vectors = unit(rng.standard_normal((60, 5)).astype(np.float32))
    file = write_vectors(tmp_path / "vectors", vectors)
    groups = semantic.group_vectors(file, 0.2)
    for place, allowed in enumerate(plain_groups(file.read(0, 60).astype(np.float64), 0.8)):
        assert groups[place] in allowed


def test_equal_vectors_are_one_group(tmp_path):
    """Also at distance 0, and among many."""
    vectors = unit(np.random.default_rng(1).standard_normal((5, 16)).astype(np.float32))
    groups = semantic.group_vectors(write_vectors(tmp_path / "vectors", np.concatenate([vectors, vectors, vectors])), 1e-6)
    assert groups.tolist() == [0, 1, 2, 3, 4] * 3


@pytest.mark.slow
def test_clusters_find_what_a_plain_search_finds(tmp_path, monkeypatch):
    """Where faiss looks into the nearest clusters alone, 99 % of the near copies join their originals and no other does;
    the same in every run."""
    rng = np.random.default_rng(2)
    subjects = rng.standard_normal((100, 64))
    originals = unit(subjects[rng.integers(0, 100, 3000)] + rng.standard_normal((3000, 64)))
    copies = unit(originals + 0.15 * unit(rng.standard_normal((3000, 64))))
    file = write_vectors(tmp_path / "vectors", np.concatenate([originals, copies]))
    monkeypatch.setattr(semantic, "EXACT_IMAGES", 0)
    groups = semantic.group_vectors(file, 0.035)
    assert (groups[3000:] == np.arange(3000)).mean() >= 0.99
    assert (groups[:3000] == np.arange(3000)).mean() >= 0.99
    np.testing.assert_array_equal(semantic.group_vectors(file, 0.035), groups)


def test_a_row_without_an_embedding_is_like_no_other(tmp_path):
    """A row whose image only another model could embed is in nobody's group, whatever the images beside it."""
    vectors = unit(np.array([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0]], np.float32))

    class Saved:
        """Stands for SavedImages: three images of one part."""

        @staticmethod
        def write(numbers):
            return write_vectors(tmp_path / "vectors", vectors[numbers.astype(int)])
    images = np.array([semantic.PLACE, 0, semantic.PLACE, 1, 2], np.uint64)
    nothing = np.zeros(5, np.uint64)
    rows = duplicates.Neighbours(np.arange(5), nothing.astype(np.uint32), np.arange(5).astype(np.uint64), nothing, images)
    assert semantic.SemanticImages(Saved(), 0.035).find_staying(rows).tolist() == [0, 1, 2, 1, 4]
    unseen = rows._replace(images=np.full(5, semantic.PLACE))
    assert semantic.SemanticImages(Saved(), 0.035).find_staying(unseen).tolist() == [0, 1, 2, 3, 4]


# ── In a run ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def change(image, kind):
    """The image recompressed, cropped by 5 % or brighter, as bytes-to-be: (image, ending, options to save it)."""
    width, height = image.size
    if kind == 0:
        return image, "jpg", {"quality": 60}
    if kind == 1:
        return image.crop((width // 40, height // 40, width - width // 40, height - height // 40)), "png", {}
    return ImageEnhance.Brightness(image).enhance(1.15), "png", {}


@pytest.mark.slow
def test_planted_pairs(tmp_path, write_config, write_table, run_main, read_table):
    """Of 200 drawings and a changed copy of each at least 95 % of the pairs lose one, at most 1 % of the drawings both."""
    (tmp_path / "pictures").mkdir()
    rows = [("url", "caption")]
    for number, path in enumerate(sorted((ROOT / "challenge_set/shapes").glob("*.png"))):
        with Image.open(path) as image:
            original = image.convert("RGB")
        original.save(tmp_path / f"pictures/{number}.png")
        changed, ending, options = change(original, number % 3)
        changed.save(tmp_path / f"pictures/{number}-copy.{ending}", **options)
        rows += [(f"{number}.png", "a drawing"), (f"{number}-copy.{ending}", "a shape")]
    write_table(rows)
    config = write_config(pretrained_model=BUNDLED_MODEL, parity_rows=0, save_embeddings="float16", partition_rows=150)
    assert run_main("--config", config).code == 0
    arguments = ["--config", str(config), "--set=curate.duplicate_images=semantic"]
    assert curate.main(arguments) == 0
    kept = (tmp_path / "out/curated/kept.csv").read_bytes()
    left = [row["url"].split(".")[0].removesuffix("-copy") for row in read_table(tmp_path / "out/curated/kept.csv")]
    assert sum(left.count(str(number)) == 1 for number in range(200)) >= 190
    assert sum(left.count(str(number)) == 0 for number in range(200)) <= 2
    dropped = read_table(tmp_path / "out/curated/dropped.csv")
    assert {row["dropped_by"] for row in dropped} == {"duplicate_image"}
    assert not list((tmp_path / "out/curated").glob(".vectors*"))
    assert curate.main(arguments) == 0
    assert (tmp_path / "out/curated/kept.csv").read_bytes() == kept


@pytest.mark.slow
def test_an_image_keeps_its_captions(shapes, run_main, read_table, tmp_path):
    """The rows of one source are no duplicates of each other, also where they lie in several partitions."""
    config = shapes(rows=30, pretrained_model=BUNDLED_MODEL, parity_rows=0, save_embeddings="float32", partition_rows=7)
    assert run_main("--config", config).code == 0
    assert curate.main(["--config", str(config), "--set=curate.duplicate_images=semantic"]) == 0
    assert len(read_table(tmp_path / "out/curated/kept.csv")) == 30


@pytest.mark.parametrize("keys", [{}, {"min_width": 1}, {"max_aspect": 50}, {"one_caption_per_image": True, "min_height": 1}])
def test_rules_on_images_do_not_change_who_is_alike(shapes, run_main, read_table, tmp_path, keys):
    """Next to rules that read the images themselves, embeddings still decide which images show the same."""
    config = shapes(rows=30, pretrained_model=BUNDLED_MODEL, parity_rows=0, save_embeddings="float32", partition_rows=7)
    assert run_main("--config", config).code == 0
    arguments = ["--config", str(config), "--set", "curate.duplicate_images=semantic", "--set", "curate.semantic_distance=0.4"]
    for key, value in keys.items():
        arguments += ["--set", f"curate.{key}={str(value).lower()}"]
    assert curate.main(arguments) == 0
    dropped = [row["url"] for row in read_table(tmp_path / "out/curated/dropped.csv") if row["dropped_by"] == "duplicate_image"]
    assert set(dropped) == {"shape-000.png", "shape-004.png"}


def test_embeddings_that_were_not_saved(tmp_path, write_config):
    """The rule says what to score with."""
    write_finished_run(tmp_path / "out", [0.1])
    with pytest.raises(script.Trouble, match="semantic needs the embeddings: score with save_embeddings first"):
        curate.main(["--config", str(write_config()), "--set=curate.duplicate_images=semantic"])
