"""Speed without other results: batch sizes found and adopted, compiled encoders, and shortcuts that change nothing."""
import gc
import json
import shutil
import types

import numpy as np
import pytest

import image_text_sim_clip as script
from addons.models import batch_size, compiled


@pytest.mark.parametrize(("rates", "expected", "tried"), [
    ([100, 190, 300, 299, 298, 900], 256, 5),      # two more bring nothing, so that larger ones are not tried
    ([100, 190, 300, None, 900, 900], 256, 4),    # 512 does not fit: nothing larger is tried
    ([None], 64, 1),                              # nothing fits: the smallest, which halves itself
    ([100, 200, 400, 800, 1600, 3200], 2048, 6),
])
def test_smallest_batch_that_is_nearly_the_fastest(rates, expected, tried):
    """The batch is the smallest within 3 % of the best rate; larger ones are tried while they fit and bring something."""
    seen = []

    def rate_of(batch):
        seen.append(batch)
        return rates[len(seen) - 1]
    assert batch_size.choose_batch(rate_of) == expected
    assert len(seen) == tried


def test_search_for_a_batch_ends_in_time():
    """When the seconds are over, the best of what was measured is taken."""
    clock = iter([0, 4, 8, 12, 16, 20, 24])
    assert batch_size.choose_batch(lambda batch: batch, now=lambda: next(clock), budget_s=10) == 256


def test_first_worker_finds_the_batch_and_others_adopt_it(shapes, run_main, tmp_path, monkeypatch):
    """`batch_size: auto`: what the manifest records is taken over, by another worker and by a resumption, without a search."""
    plan = script.make_plan(script.load_config(shapes()))
    searches = []

    def worker(found):
        scorer = types.SimpleNamespace(config=script.Config(), batch_size=32)
        monkeypatch.setattr(batch_size, "find_batch_size", lambda scorer: searches.append(found) or found)
        scorer.identity = lambda: {"batch_size": scorer.batch_size}
        script.settle(plan, scorer)
        return scorer.batch_size
    assert worker(512) == worker(256) == 512
    assert searches == [512]
    assert json.loads((tmp_path / "out/manifest.json").read_text())["resolved"] == {"batch_size": 512}


def test_cpu_keeps_its_default_batch(bundled_model):
    """On the CPU nothing is searched: the start must stay quick, and the size hardly matters."""
    assert batch_size.find_batch_size(script.Scorer(script.Config(pretrained_model=bundled_model, use_cuda=False))) == 16


def test_few_lengths_and_full_batches():
    """Compiled encoders see three lengths of captions, and batches of one size whose padding repeats the last row."""
    import torch
    assert [compiled.few_lengths(n, 77) for n in (3, 16, 17, 32, 33, 77)] == [16, 16, 32, 32, 77, 77]
    assert compiled.few_lengths(12, 16) == 16
    padded = compiled.pad_batch(torch.tensor([[1, 2], [3, 4]]), 4)
    assert padded.tolist() == [[1, 2], [3, 4], [3, 4], [3, 4]]
    assert compiled.pad_batch(padded, 4) is padded


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.timeout(400)
def test_compiled_encoders_score_alike(shapes, bundled_model, run_main, read_table, tmp_path):
    """`compile: true` gives the same similarities within 1e-5 in float32."""
    tables = []
    for compile_ in (False, True):
        outcome = run_main("--config", shapes(rows=70, pretrained_model=bundled_model, compile=compile_, parity_rows=0,
                                              output_path=str(tmp_path / f"out{compile_}")))
        assert outcome.result["scored"] == 70
        tables.append([float(row["similarity"]) for row in read_table(tmp_path / f"out{compile_}/scores.csv")])
    assert np.allclose(*tables, atol=1e-5)


@pytest.fixture
def photos(write_table):
    """The bundled photographs and some drawings with two captions each, as (folder, captions) rows of a table."""
    root = script.pathlib.Path(script.__file__).parent / "challenge_set"
    names = [path for path in sorted((root / "photos").iterdir()) if path.suffix in (".jpg", ".png")]
    names += sorted((root / "shapes").glob("*.png"))[:40]
    captions = ["a red circle", "a large blue square above a small green star on a black background"]
    write_table([("url", "caption"), *((str(path.relative_to(root)), caption) for path in names for caption in captions)])
    return str(root)


@pytest.mark.parametrize(("keys", "most", "percentile"), [
    ({}, 2e-3, 100),
    ({"dtype": "bfloat16"}, 1e-2, 99),
])
def test_drift_of_fast_settings_on_bundled_images(keys, most, percentile, photos, bundled_model, write_config, run_main,
                                                    read_table, tmp_path):
    """`fast` against `exact`: at most 2e-3 in float32; in bfloat16 the 99th percentile is at most 1e-2."""
    tables = []
    for name, settings in (("exact", {"preprocess": "exact"}), ("fast", keys)):
        run_main("--config", write_config(image_path=photos, pretrained_model=bundled_model, output_path=str(tmp_path / name),
                                          parity_rows=0, **settings))
        tables.append([float(row["similarity"]) for row in read_table(tmp_path / name / "scores.csv")])
    assert len(tables[0]) > 100
    assert np.percentile(np.abs(np.subtract(*tables)), percentile) <= most


def test_trimmed_captions_and_shared_embeddings_change_nothing(photos, bundled_model, write_config, run_main, read_table,
                                                               tmp_path):
    """Captions cut to their batch's longest, and images and captions encoded once, give what one pair alone gives (1e-6)."""
    run_main("--config", write_config(image_path=photos, pretrained_model=bundled_model, parity_rows=0))
    scorer = script.Scorer(script.Config(pretrained_model=bundled_model, use_cuda=False, batch_size=1))
    rows = read_table(tmp_path / "out/scores.csv")[::7]
    for row in rows:
        path = script.pathlib.Path(photos, row["url"])
        ids = scorer.tokenize([row["caption"]])[0][0]
        ids += [scorer.family.tokenizer.pad_token_id] * (scorer.family.context_length - len(ids))
        alone = scorer.cosines(scorer.encode_images(pixels_of(scorer, path)), scorer.encode_texts([ids]))[0]
        assert float(row["similarity"]) == pytest.approx(alone, abs=1e-6)


def pixels_of(scorer, path):
    """(1, 3, H, W) uint8 of one image, the way the loader makes it."""
    import torch
    config = script.Config(image_path=str(path.parent))
    loader = script.ImageLoader(script.open_source(config, 0), script.ImageDecoder(config, scorer.settings), scorer.resize)
    return torch.from_numpy(loader(path.name).pixels)[None]


@pytest.mark.parametrize("is_on", [True, False])
def test_garbage_is_collected_again_after_the_start(is_on, bundled_model, monkeypatch):
    """A model is loaded without a search for garbage; afterwards it is on or off as before, also where loading fails."""
    seen = []
    find_model = script.find_model

    def noting_find_model(config):
        seen.append(gc.isenabled())
        return find_model(config)
    monkeypatch.setattr(script, "find_model", noting_find_model)
    was_on = gc.isenabled()
    try:
        gc.enable() if is_on else gc.disable()
        script.Scorer(script.Config(pretrained_model=bundled_model, use_cuda=False))
        assert gc.isenabled() == is_on
        with pytest.raises(script.Trouble):
            script.Scorer(script.Config(pretrained_model="/no/such/folder", use_cuda=False))
        assert gc.isenabled() == is_on
        assert seen == [False, False]
    finally:
        gc.enable() if was_on else gc.disable()
