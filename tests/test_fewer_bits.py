"""Fewer bits: int8 in the model, and embeddings saved next to the scores in float32, float16 or int8."""
import json

import numpy as np
import pytest
import torch

import image_text_sim_clip as script
from addons.measures import embeddings
from addons.models import quantize


@pytest.fixture
def linear():
    """A linear layer with biases and one output that is all zero, and (3, 5, 24) values of very different sizes."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 16)
    with torch.no_grad():
        layer.weight[3] = 0
    return layer.requires_grad_(False), torch.randn(3, 5, 24) * torch.tensor([0.01, 1, 100]).view(3, 1, 1)


KINDS = [quantize.TokenwiseLinear,
         pytest.param(quantize.PackedLinear, marks=pytest.mark.skipif(torch.backends.quantized.engine == "none",
                                                                      reason="torch has no packed int8 kernel here"))]


@pytest.mark.parametrize("kind", KINDS)
def test_int8_layer_is_near_the_float_one(kind, linear):
    """Each item's output is within a few of its own int8 steps of float32, however large its neighbours are."""
    layer, values = linear
    exact, ours = layer(values), kind(layer)(values)
    for item in range(3):
        step = values[item].abs().max() / 127 * layer.weight.abs().sum(dim=1).max()
        assert (exact[item] - ours[item]).abs().max() < step
    assert torch.allclose(ours[..., 3], layer.bias[3].expand(3, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_int8_layer_does_not_see_neighbours(kind, linear):
    """An item gives the same output alone as in a batch, to the bit."""
    layer, values = linear
    eight = kind(layer)
    together = eight(values)
    for item in range(3):
        assert torch.equal(eight(values[item:item + 1])[0], together[item])


def test_tokenwise_layer_keeps_its_scales_when_cast(linear):
    """A model cast to bfloat16 keeps the scales in float32, and the layer answers in bfloat16."""
    layer, values = linear
    eight = quantize.TokenwiseLinear(layer)
    exact = eight(values)
    eight.to(torch.bfloat16)
    assert eight.scales.dtype == eight.bias.dtype == torch.float32
    assert eight.weight.dtype == torch.int8
    out = eight(values.to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.float(), exact, rtol=0.05, atol=0.02 * exact.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip-base-patch32", "siglip-base"])
def test_int8_models_rank_as_float32_does(name, shelf, tmp_path):
    """Embeddings of a published shape with random weights keep a cosine of 0.999 to float32's, in any batch."""
    def load(**keys):
        return script.Scorer(script.Config(pretrained_model=str(shelf(name)), use_cuda=False, **keys))
    plain, eight = load(), load(quantization="int8", runtime="torch")
    assert eight.quantization.startswith("int8 by")
    side = plain.settings.crop or plain.settings.size
    pixels = torch.randint(0, 256, (4, 3, *side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = eight.encode_images(pixels)
    assert (images * plain.encode_images(pixels)).sum(-1).min() > 0.999
    assert torch.allclose(images[2:3], eight.encode_images(pixels[2:3]), atol=1e-6)
    ids, _ = plain.tokenize(["a cat", "two dogs on a red table near the blue street " * 3])
    texts = eight.encode_texts(ids)
    assert (texts * plain.encode_texts(ids)).sum(-1).min() > 0.999
    assert torch.allclose(texts[:1], eight.encode_texts(ids[:1]), atol=1e-6)


@pytest.mark.parametrize("model_bits", ["float32", "bfloat16"])
def test_int8_run_states_its_drift(model_bits, shapes, bundled_model, run_main, tmp_path):
    """A run in int8 says by how much its rows differ from float32, and equals itself in other batches and partitions."""
    tables = []
    for number, keys in enumerate(({"batch_size": 32}, {"batch_size": 7, "partition_rows": 50})):
        out = tmp_path / f"out{number}"
        outcome = run_main("--config", shapes(rows=150, pretrained_model=bundled_model, quantization="int8", dtype=model_bits,
                                              parity_rows=64, runtime="torch", output_path=str(out), **keys))
        assert outcome.result["scored"] == 150
        drift = json.loads((out / "profile.json").read_text())["passport"]
        assert 1e-5 < drift["max_difference"] < 0.03
        assert drift["rank_correlation"] > 0.995
        with (out / "scores.csv").open() as file:
            tables.append([float(row["similarity"]) for row in script.csv.DictReader(file)])
    assert np.allclose(*tables, atol=1e-5 if model_bits == "float32" else 5e-3)


def test_packing_of_known_vectors():
    """int8: the largest value is on level 127, the scale undoes it; unpacked vectors have length 1."""
    vectors = np.array([[0.6, -0.8, 0.0], [1.0, 0.0, 0.0], [np.nan, 1.0, 0.0]], np.float32)
    packed, scales = embeddings.pack(vectors, "int8")
    assert packed.tolist() == [[95, -127, 0], [127, 0, 0], [0, 0, 0]]
    assert scales[:2] == pytest.approx([0.8 / 127, 1 / 127])
    assert embeddings.unpack(packed, scales)[:2] == pytest.approx(vectors[:2], abs=0.004)
    for kind in ("float32", "float16"):
        packed, scales = embeddings.pack(vectors, kind)
        assert scales is None
        assert packed.dtype == kind
        assert embeddings.unpack(packed)[:2] == pytest.approx(vectors[:2], abs=1e-3)


@pytest.mark.parametrize(("kind", "most"), [("float32", 1e-6), ("float16", 1e-3), ("int8", 1e-2)])
def test_saved_embeddings_give_the_scores_again(kind, most, shapes, bundled_model, run_main, tmp_path):
    """Dot products of saved embeddings are the scores, within what the report states; equal images are saved once."""
    config = shapes(pretrained_model=bundled_model, save_embeddings=kind, partition_rows=250)
    outcome = run_main("--config", config)
    drift = json.loads((tmp_path / "out/profile.json").read_text())["saved_embeddings"]
    assert drift["rows"] == 192
    assert drift["max_difference"] <= most
    assert "saved embeddings  192 rows" in outcome.stderr
    worst = 0.0
    plan = script.make_plan(script.load_config(config), joins=True)
    assert len(plan.partitions) == len(list((tmp_path / "out/parts").glob("*.npz"))) == 3
    for partition in plan.partitions:
        saved = embeddings.read_embeddings(partition.embeddings)
        table = script.read_part(plan, partition).table
        again = (saved["images"][saved["image_of_row"]] * saved["texts"][saved["text_of_row"]]).sum(axis=1)
        worst = max(worst, np.abs(again - table["similarity"].to_numpy()).max())
        assert len(saved["images"]) < len(table)
    assert worst <= 3 * drift["max_difference"] + 1e-6


def test_rows_without_a_score_have_no_embeddings(bundled_model, write_table, write_config, run_main, picture_bytes, tmp_path):
    """-1 marks rows that failed; a partition in which all failed has an empty file."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(picture_bytes(size=(64, 64)))
    write_table([("url", "caption"), ("a.png", "one"), ("gone.png", "two"), ("a.png", " "), ("gone.png", "x"),
                 ("gone.png", "y")])
    config = write_config(pretrained_model=bundled_model, save_embeddings="int8", partition_rows=3)
    assert run_main("--config", config).code == 0
    first, second = (embeddings.read_embeddings(tmp_path / f"out/parts/part-0000{i}.npz") for i in (0, 1))
    assert first["image_of_row"].tolist() == first["text_of_row"].tolist() == [0, -1, -1]
    assert second["image_of_row"].tolist() == [-1, -1]
    assert len(second["images"]) == 0


def test_retried_rows_join_the_saved_embeddings(bundled_model, write_table, write_config, run_main, picture_bytes, tmp_path,
                                                late):
    """--retry-failed adds to the file what it scored, and every row's embeddings give its score."""
    (tmp_path / "pictures").mkdir()
    for name, colour in (("a", (200, 30, 30)), ("late", (20, 30, 230))):
        (tmp_path / f"pictures/{name}.png").write_bytes(picture_bytes(size=(64, 64), colour=colour))
    write_table([("url", "caption"), *((f"{'late' if i % 2 else 'a'}.png", f"a red square {i}") for i in range(10))])
    config = write_config(pretrained_model=bundled_model, save_embeddings="int8")
    with late("late.png"):
        assert run_main("--config", config).result["failed"] == {"timeout": 5}
    assert run_main("--config", config, "--retry-failed").result["scored"] == 10
    saved = embeddings.read_embeddings(tmp_path / "out/parts/part-00000.npz")
    plan = script.make_plan(script.load_config(config), joins=True)
    table = script.read_part(plan, plan.partitions[0]).table
    again = (saved["images"][saved["image_of_row"]] * saved["texts"][saved["text_of_row"]]).sum(axis=1)
    assert again == pytest.approx(table["similarity"].to_numpy(), abs=1e-2)
    assert len(saved["images"]) == 2


def test_retry_without_its_embeddings_does_the_part_anew(bundled_model, write_table, write_config, run_main, picture_bytes,
                                                         tmp_path, late):
    """--retry-failed of a part whose embeddings file is gone scores all its rows, so that none is left without embeddings."""
    (tmp_path / "pictures").mkdir()
    for name, colour in (("a", (200, 30, 30)), ("late", (20, 30, 230))):
        (tmp_path / f"pictures/{name}.png").write_bytes(picture_bytes(size=(64, 64), colour=colour))
    write_table([("url", "caption"), *((f"{'late' if i % 2 else 'a'}.png", f"a red square {i}") for i in range(10))])
    config = write_config(pretrained_model=bundled_model, save_embeddings="float32")
    with late("late.png"):
        assert run_main("--config", config).result["failed"] == {"timeout": 5}
    (tmp_path / "out/parts/part-00000.npz").unlink()
    assert run_main("--config", config, "--retry-failed").result["scored"] == 10
    saved = embeddings.read_embeddings(tmp_path / "out/parts/part-00000.npz")
    assert (saved["image_of_row"] >= 0).all()
    assert run_main("--config", config, "--verify").code == 0


def test_embeddings_of_a_discarded_run_are_not_written(shapes, bundled_model, run_main, tmp_path):
    """A worker whose run has been planned anew meanwhile leaves the new run's embeddings as they are."""
    config = script.load_config(shapes(rows=30, pretrained_model=bundled_model, save_embeddings="float16"))
    late_plan = script.make_plan(config)
    worker = script.Worker(config, late_plan, "late", script.Clock())
    changed = shapes(rows=20, pretrained_model=bundled_model, save_embeddings="float16")
    assert run_main("--config", changed, "--fresh").code == 0
    path = tmp_path / "out/parts/part-00000.npz"
    before = path.read_bytes()
    with pytest.raises(script.Trouble, match="planned anew"):
        list(worker.run(late_plan.partitions))
    assert path.read_bytes() == before


def test_embeddings_of_a_part_that_another_worker_committed_stay(shapes, bundled_model, run_main, tmp_path):
    """Of two workers at one partition the first to commit has both its part and its embeddings kept."""
    config = shapes(rows=30, pretrained_model=bundled_model, save_embeddings="float16")
    plan = script.make_plan(script.load_config(config))
    worker = script.Worker(plan.config, plan, "second", script.Clock())
    assert run_main("--config", config).code == 0
    path = tmp_path / "out/parts/part-00000.npz"
    before = path.stat().st_mtime_ns
    assert [summary.rows for summary in worker.run(plan.partitions)] == [30]
    assert path.stat().st_mtime_ns == before
    assert run_main("--config", config, "--verify").code == 0


@pytest.mark.parametrize("how", ["gone", "cut", "flipped"])
def test_flawed_embeddings_are_done_again(how, shapes, bundled_model, run_main, tmp_path):
    """A missing or shortened file is found by the next run, a flipped bit by --verify; the part is redone, byte for byte."""
    config = shapes(rows=30, pretrained_model=bundled_model, save_embeddings="float16")
    run_main("--config", config)
    path = tmp_path / "out/parts/part-00000.npz"
    before = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(before[:-9] if how == "cut" else before[:200] + bytes([before[200] ^ 1]) + before[201:])
    if how == "flipped":
        outcome = run_main("--config", config, "--verify")
        assert outcome.code == script.EXIT_VERIFY
        assert "part-00000.npz" in outcome.stderr
    assert run_main("--config", config).code == 0
    assert path.read_bytes() == before
    assert run_main("--config", config, "--verify").code == 0
