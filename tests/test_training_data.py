"""Curated pairs as training reads them: both exports alike, weighted, each once an epoch, in an order that can be resumed."""
import dataclasses
import gzip
import io
import itertools
import json
import math
import tarfile

import pytest
from conftest import ROOT  # noqa: F401 - puts the repository on the path

import image_text_sim_clip as script

pytest.importorskip("torch")

from addons.curation.export import add_member
from examples import training_data
from examples.training_data import CuratedSet, Weighting, find_shards, read_image

ROWS = 25
EVEN = Weighting("dissimilarity", "low", math.inf)


def described(number):
    """What the exports say of a row."""
    return {"text": f"caption {number}", "row": number, "url": f"{number}.png", "similarity": 1 - number / 100,
            "dissimilarity": number / 100, "contrast": None if number == 3 else number / 50}


@pytest.fixture
def exports(tmp_path, noise):
    """The same rows as an imagefolder and as a webdataset of three tars."""
    folder = tmp_path / "imagefolder/train"
    (folder / "00000").mkdir(parents=True)
    tars = tmp_path / "webdataset"
    tars.mkdir()
    lines = []
    for number in range(ROWS):
        image = noise(20 + number, 30, seed=number)
        image.save(folder / f"00000/{number:09d}.png")
        lines.append(json.dumps({"file_name": f"00000/{number:09d}.png", **described(number)}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    for shard in range(3):
        with tarfile.open(tars / f"kept-{shard:05d}.tar", "w") as tar:
            for number in range(shard * 10, min(ROWS, shard * 10 + 10)):
                add_member(tar, f"{number:09d}.png", (folder / f"00000/{number:09d}.png").read_bytes())
                add_member(tar, f"{number:09d}.txt", described(number)["text"].encode())
                add_member(tar, f"{number:09d}.json", json.dumps(described(number)).encode())
    return {"imagefolder": tmp_path / "imagefolder", "webdataset": tars}


def pairs_of(path, column=None):
    """All pairs of an export, in its own order."""
    return [pair for shard in find_shards(path) for pair in shard.pairs(column)]


def test_both_exports_give_the_same_pairs(exports):
    """Captions, cells and images' bytes."""
    folder, tars = (pairs_of(exports[kind], "dissimilarity") for kind in ("imagefolder", "webdataset"))
    assert [(pair.caption, pair.cell) for pair in folder] == [(pair.caption, pair.cell) for pair in tars]
    assert len(folder) == ROWS
    assert [pair.read(10**6) for pair in folder] == [pair.read(10**6) for pair in tars]
    assert pairs_of(exports["webdataset"] / "kept-00001.tar")[0].caption == "caption 10"


@pytest.mark.parametrize("kind", ["imagefolder", "webdataset"])
@pytest.mark.parametrize("buffer", [1, 4, 1000])
def test_each_pair_comes_once_an_epoch_and_a_resumption_finds_its_place(exports, monkeypatch, kind, buffer):
    """In another order each time, which the seed alone decides; whatever was held out never comes."""
    monkeypatch.setattr(training_data, "SHUFFLE_ROWS", buffer)
    monkeypatch.setattr(training_data, "BLOCK_LINES", 7)
    curated = CuratedSet(exports[kind], EVEN, ["caption 4"], seed=1)
    count = ROWS - 1
    captions = [pair.caption for pair in itertools.islice(curated.stream(), 3 * count)]
    epochs = [captions[start:start + count] for start in (0, count, 2 * count)]
    assert curated.count == count
    assert all(sorted(epoch) == sorted(set(captions)) and len(set(epoch)) == count for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and "caption 4" not in captions
    for skip in (0, 5, count, 2 * count - 1):
        again = CuratedSet(exports[kind], EVEN, ["caption 4"], seed=1).stream(skip)
        assert [pair.caption for pair in itertools.islice(again, 10)] == captions[skip:skip + 10]
    other = CuratedSet(exports[kind], EVEN, ["caption 4"], seed=2).stream()
    assert [pair.caption for pair in itertools.islice(other, count)] != epochs[0]


@pytest.mark.parametrize(("column", "prefer", "sign"), [("dissimilarity", "low", -1), ("similarity", "high", 1)])
def test_weights_follow_their_column_and_are_one_on_average(exports, column, prefer, sign):
    """exp(+- cell / temperature): pairs that lie 0.01 apart differ by that factor."""
    curated = CuratedSet(exports["webdataset"], Weighting(column, prefer, 0.2), ["caption 0"], seed=0)
    pairs = pairs_of(exports["webdataset"], column)[1:]
    weights = [curated.weight(pair) for pair in pairs]
    assert training_data.default_preference(column) == prefer
    assert sum(weights) / len(weights) == pytest.approx(1)
    assert [a / b for a, b in itertools.pairwise(weights)] == pytest.approx([math.exp(0.01 / 0.2)] * (len(weights) - 1))
    even = CuratedSet(exports["webdataset"], dataclasses.replace(EVEN, column="nowhere"), [], seed=0)
    assert {even.weight(pair) for pair in pairs} == {1.0}


def test_pairs_with_an_empty_cell_are_left_out_and_counted(exports):
    """`contrast` has one: it has no weight."""
    curated = CuratedSet(exports["imagefolder"], Weighting("contrast", "high", 0.1), ["caption 0"], seed=0)
    seen = {pair.caption for pair in itertools.islice(curated.stream(), curated.count)}
    assert (curated.count, curated.left_out) == (ROWS - 2, 1)
    assert "caption 3" not in seen and len(seen) == ROWS - 2


def test_a_tenth_of_the_captions_is_held_out_whatever_their_order(exports):
    """The same ones from both exports; a caption that is watched is never trained on."""
    chosen = [CuratedSet(exports[kind], EVEN, [], seed=0).held_out for kind in ("imagefolder", "webdataset")]
    assert len(chosen[0]) == 3 and sorted(chosen[0]) == sorted(chosen[1])


def test_weights_do_not_overflow_at_a_tiny_temperature(exports):
    """The best pair takes all, and the mean is still 1."""
    curated = CuratedSet(exports["imagefolder"], Weighting("dissimilarity", "low", 1e-5), ["caption 7"], seed=0)
    pairs = [pair for pair in pairs_of(exports["imagefolder"], "dissimilarity") if pair.caption != "caption 7"]
    weights = [curated.weight(pair) for pair in pairs]
    assert weights[0] == pytest.approx(len(pairs)) and sum(weights) == pytest.approx(len(pairs))


def test_squares_tell_how_they_were_cut(exports):
    """As SDXL is told: the file's height and width, and the corner in the image resized to the side."""
    config = script.Config(pretrained_model="none")
    image = read_image(pairs_of(exports["imagefolder"])[24], 15, config)  # 44 wide, 30 high
    assert image.pixels.shape == (3, 15, 15)
    assert (image.original_size, image.crop_corner) == ((30, 44), (0, round(7 * 15 / 30)))


def test_what_cannot_be_read_is_one_line_that_names_the_place(exports, tmp_path):
    """No such set, a compressed tar, broken JSON, no caption, a column that is not there or holds no numbers, a way out."""
    table = exports["imagefolder"] / "train/metadata.jsonl"
    good = table.read_text()
    tar = exports["webdataset"] / "kept-00000.tar"

    def refusal(path, weighting=EVEN, lines=None):
        table.write_text(good if lines is None else lines)
        with pytest.raises(script.Trouble) as caught:
            CuratedSet(path, weighting, ["x"], seed=0)
        assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
        return str(caught.value)
    folder = exports["imagefolder"]
    assert "is no imagefolder" in refusal(tmp_path / "nowhere")
    assert "no column 'height' to weight by; it has contrast, dissimilarity" in refusal(folder, Weighting("height", "high", 1))
    assert "must hold numbers, got 'caption 0'" in refusal(folder, Weighting("text", "high", 1))
    assert "a row is no JSON" in refusal(folder, lines="{\n")
    assert "a row is no JSON object" in refusal(folder, lines="[1]\n")
    assert "must have a text, got ' '" in refusal(folder, lines='{"file_name": "a.png", "text": " "}\n')
    assert "holds no pair" in refusal(folder, lines="\n")
    for name in ("../a.png", "/etc/passwd", "a/../../b.png", None):
        assert "below its folder" in refusal(folder, lines=json.dumps({"file_name": name, "text": "a"}) + "\n")
    tar.write_bytes(gzip.compress(tar.read_bytes()))
    assert "a tar must not be compressed" in refusal(exports["webdataset"])


def test_tar_with_more_than_pairs_is_read_past_it(tmp_path, noise):
    """Members without an image, files before a key's image, and folders are passed over."""
    buffer = io.BytesIO()
    noise(20, 20).save(buffer, "PNG")
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        add_member(tar, "README", b"hello")
        tar.addfile(tarfile.TarInfo("folder.d/"))
        add_member(tar, "folder.d/a.json", json.dumps(described(1)).encode())
        add_member(tar, "folder.d/a.seg.png", b"a mask")
        add_member(tar, "folder.d/a.PNG", buffer.getvalue())
        add_member(tar, "folder.d/b.json", json.dumps(described(2)).encode())
    (pair,) = pairs_of(tmp_path / "odd.tar", "similarity")
    assert (pair.caption, pair.cell, pair.read(10**6)) == ("caption 1", 0.99, buffer.getvalue())
