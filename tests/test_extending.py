"""The test of the house: one new file in its room is an input format, an engine, a measure or a model family.

Each test copies the project, adds ONE file and changes no other, and uses it in a real run.
"""
import csv
import json
import pathlib
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def house(tmp_path):
    """A copy of the project, with the bundled drawings and model linked."""
    folder = tmp_path / "house"
    folder.mkdir()
    for name in ("image_text_sim_clip.py", "curate.py"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "addons", folder / "addons", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "challenge_set").symlink_to(ROOT / "challenge_set")
    return folder


@pytest.fixture
def run(house):
    """Run a program of the copied project on the demo's config: run("image_text_sim_clip.py", key=value)."""
    def call(program, **keys):
        overrides = [f"--set={key}={json.dumps(value)}" for key, value in keys.items()]
        command = [sys.executable, program, "--config", "challenge_set/demo.yaml", "--set=output_path=out", *overrides]
        done = subprocess.run(command, cwd=house, capture_output=True, encoding="utf-8", timeout=110)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])
    return call


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


PSV_READER = '''
"""Tables whose fields are separated by a bar, without quotes: .psv."""
import pathlib

from addons.inputs.text import TextReader, TextTable
from image_text_sim_clip import Config, file_sha256, name_columns, to_table


class PsvReader(TextReader):
    kind = "psv"
    suffixes = (".psv",)

    def open_table(self, config: Config, known: list[str]) -> TextTable:
        path = pathlib.Path(config.csv_path)
        header, *lines = path.read_text(encoding=config.encoding).splitlines()
        columns = name_columns(header.split("|"), config)
        rows = [line.split("|") for line in lines]
        return TextTable(columns, iter([(to_table(rows, columns), [])]), lambda: file_sha256(path))


READER = PsvReader()
'''


def test_an_input_format_is_one_file(house, run):
    """A reader dropped into addons/inputs is found by its suffix, and its rows get the scores of the CSV's."""
    run("image_text_sim_clip.py", limit=30)
    expected = [row["similarity"] for row in rows_of(house / "out/scores.csv")]
    (house / "addons/inputs/psv.py").write_text(PSV_READER, encoding="utf-8")
    rows = rows_of(house / "challenge_set/shapes.csv")
    lines = ["|".join(rows[0]), *("|".join(row.values()) for row in rows)]
    (house / "table.psv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    result = run("image_text_sim_clip.py", limit=30, csv_path="table.psv", output_path="psv")
    assert result["scored"] == 30
    assert [row["similarity"] for row in rows_of(house / "psv/scores.csv")] == expected


ENGINE = '''
"""The partitions from the last to the first."""
from image_text_sim_clip import Job, say


def run(job: Job) -> bool:
    job.make_plan()
    say("backwards")
    job.work(job.pending()[::-1], "backwards")
    return True
'''


def test_an_engine_is_one_file(house, run):
    """An engine dropped into addons/engines is chosen by its name, and the results are those of the local engine."""
    run("image_text_sim_clip.py", partition_rows=100)
    (house / "addons/engines/backwards.py").write_text(ENGINE, encoding="utf-8")
    run("image_text_sim_clip.py", partition_rows=100, output_path="backwards", engine="backwards")
    assert (house / "backwards/scores.csv").read_bytes() == (house / "out/scores.csv").read_bytes()
    times = [json.loads(path.read_text()) for path in sorted((house / "backwards/parts").glob("*.json"))]
    assert {part["worker"] for part in times} == {"backwards"}
    assert [part["ended"] for part in times] == sorted((part["ended"] for part in times), reverse=True)


MEASURE = '''
"""How many words a caption has."""
from typing import ClassVar

import numpy as np

from addons.measures import Measure, Measured, kept_by
from image_text_sim_clip import Column, PartitionRun, Scored


class CaptionWords(Measure):
    name = "caption_words"
    columns: ClassVar = (Column("words", "float", "words of the caption"),)

    def measure(self, run: PartitionRun, scored: Scored) -> Measured:
        words = np.array([len(caption.split()) for caption in run.captions], np.float32)
        return Measured({"words": words}, {"total": int(words.sum())})

    @classmethod
    def add_up(cls, parts):
        return sum((kept_by(cls, part) or {"total": 0})["total"] for part in parts)

    @classmethod
    def describe(cls, total):
        return {"total": total}

    @classmethod
    def tell(cls, entry):
        return f"{entry['total']} in all"


MEASURE = CaptionWords
'''


def test_a_measure_with_a_column_is_one_file(house, run):
    """Its column arrives in scores.csv, scores.parquet, kept.csv, an imagefolder's metadata and the review page; a dry run
    leaves it empty."""
    (house / "addons/measures/caption_words.py").write_text(MEASURE, encoding="utf-8")
    asked = {"measures": {"caption_words": {}}}
    run("image_text_sim_clip.py", **asked)
    scores = rows_of(house / "out/scores.csv")
    words = [len(row["caption"].split()) for row in scores]
    assert [float(row["words"]) for row in scores] == words
    assert list(scores[0])[-4:] == ["words", "truncated", "status", "detail"]
    assert json.loads((house / "out/profile.json").read_text())["caption_words"] == {"total": sum(words)}
    run("image_text_sim_clip.py", output_path="parquet", output_format="parquet", **asked)
    assert pq.read_table(house / "parquet/scores.parquet")["words"].to_pylist() == words
    run("curate.py", curate={"min_similarity": 0.8, "export": "imagefolder", "review": True}, **asked)
    kept = rows_of(house / "out/curated/kept.csv")
    assert kept and all(float(row["words"]) == len(row["caption"].split()) for row in kept)
    metadata = (house / "out/curated/imagefolder/train/metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["words"] for line in metadata] == [float(row["words"]) for row in kept]
    assert '"words"' in (house / "out/curated/review.html").read_text(encoding="utf-8")
    run("image_text_sim_clip.py", output_path="dry", pretrained_model="none", **asked)
    assert {row["words"] for row in rows_of(house / "dry/scores.csv")} == {""}


FAMILY = '''
"""A CLIP whose captions are read backwards, word by word."""
from image_text_sim_clip import Clip


class Backwards(Clip):
    kind = "backwards-clip"

    def prepare(self, caption: str) -> str:
        return " ".join(reversed(caption.split()))


FAMILY = Backwards
'''


def test_a_model_family_is_one_file(house, run):
    """A family dropped into addons/models is found by the model type of config.json, and its steps are taken."""
    model = house / "model"
    shutil.copytree(ROOT / "challenge_set/shapes_clip", model)
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(content | {"model_type": "backwards-clip"}))
    (house / "addons/models/backwards_clip.py").write_text(FAMILY, encoding="utf-8")
    lines = ["url,caption"]
    lines += [f"shape-{n:03d}.png,a large blue star on white" for n in range(20)]
    (house / "forwards.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (house / "backwards.csv").write_text("\n".join(lines).replace("a large blue star on white", "white on star blue large a"))
    run("image_text_sim_clip.py", csv_path="backwards.csv", output_path="clip")
    run("image_text_sim_clip.py", csv_path="forwards.csv", output_path="family", pretrained_model="model")
    similarities = [[row["similarity"] for row in rows_of(house / folder / "scores.csv")] for folder in ("clip", "family")]
    assert similarities[0] == similarities[1]
    manifest = json.loads((house / "family/manifest.json").read_text())
    assert manifest["resolved"]["model_type"] == "backwards-clip"
