"""Which measures a run computes: what its config asks for, and what it says of a name or a setting that is wrong."""
import dataclasses
import json
import time
import types

import pytest
from conftest import BUNDLED_MODEL
from test_scale import TORCHRUN, outcome_of, parts_in

import image_text_sim_clip as script
from addons import measures


@dataclasses.dataclass(frozen=True)
class LengthSettings:
    """A measure's settings, with a range as Config's keys have."""

    most: int = script.setting(10, 1, 99)


class Length(measures.Measure):
    """A measure with settings."""

    name = "length"
    settings = LengthSettings


class Plain(measures.Measure):
    """A measure without settings."""

    name = "plain"


class Switched(measures.Measure):
    """A measure with a key of its own in the config."""

    name = "switched"

    @classmethod
    def wanted(cls, config):
        return config.save_embeddings != "none"


@pytest.fixture
def three_files(monkeypatch):
    """A room with three measures, and a file that is none."""
    modules = [types.SimpleNamespace(MEASURE=measure) for measure in (Length, Plain, Switched)]
    monkeypatch.setattr(measures, "room", lambda name: [*modules, types.SimpleNamespace()])


def find(**keys):
    return measures.find_measures(script.Config(**keys))


def test_measures_of_the_defaults():
    """A run with a model has random pairs and a passport and counts captions; both kinds count what is odd about images, and
    keep digests of them."""
    of_all = ["captions", "image_digests", "images", "passport", "random_pairs", "published_thresholds"]
    assert [measure.name for measure in find()] == of_all
    assert [measure.name for measure in find(save_embeddings="int8")] == ["captions", "saved_embeddings", *of_all[1:]]
    assert [measure.name for measure in find(parity_rows=0)] == [name for name in of_all if name != "passport"]
    assert [measure.name for measure in find(pretrained_model="none", save_embeddings="int8")] == ["image_digests", "images"]


@pytest.mark.usefixtures("three_files")
def test_a_measure_is_asked_for_by_its_name():
    """What stands under `measures` is computed, in the order of the files; without settings as good as with none."""
    assert find() == []
    assert find(measures={"plain": None, "length": {"most": 3}}) == [Length, Plain]
    assert find(measures={"switched": {}}, save_embeddings="int8") == [Switched]
    config = script.Config(measures={"length": {"most": 3}})
    assert Length.read_settings(config) == LengthSettings(3)
    assert Length.read_settings(script.Config(measures={"length": None})) == LengthSettings(10)


@pytest.mark.usefixtures("three_files")
@pytest.mark.parametrize(("asked", "message"), [
    ({"lenght": {}}, "did you mean 'length'"),
    ({"zebra": {}}, "there is no 'zebra' in addons/measures/, which has length, plain, switched"),
    ({1: {}}, "there is no '1'"),
    ({"length": {"mots": 3}}, "unknown key 'measures.length.mots'; did you mean 'measures.length.most'"),
    ({"length": {"most": "many"}}, "measures.length.most must be a whole number, got 'many'"),
    ({"length": {"most": 100}}, "measures.length.most must lie in [1, 99], got 100"),
    ({"length": [3]}, "measures.length must be a section of keys, got [3]"),
    ({"plain": {"most": 3}}, "measures.plain has no settings, got most"),
    ({"switched": {}}, "measures.switched: this one has a key of its own"),
])
def test_a_wrong_measure_is_refused(asked, message):
    """A name that no file has, a wrong setting, and a measure that is turned off elsewhere end with exit 2 and say so."""
    with pytest.raises(script.Trouble) as trouble:
        find(measures=asked)
    assert trouble.value.exit_code == script.EXIT_CONFIG
    assert message in str(trouble.value)


def test_an_unknown_measure_names_the_nearest_file(write_config, run_main):
    """From the command line, with the measures that are there."""
    outcome = run_main("--config", write_config(measures={"random_pair": {}}))
    assert outcome.code == script.EXIT_CONFIG
    assert "did you mean 'random_pairs' (addons/measures/random_pairs.py)?" in outcome.stderr


# ── All of them in a run ──────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def asked_for(shapes, run_main, tmp_path):
    """A config of 120 rows in 20 partitions with every measure that is asked for by name, and a head and a target for it."""
    import torch
    torch.save({"weight": torch.arange(64.0)[None] / 64}, tmp_path / "head.pth")
    target = shapes(rows=30, pretrained_model=BUNDLED_MODEL, save_embeddings="float16", parity_rows=0,
                    output_path=str(tmp_path / "target"))
    assert run_main("--config", target).code == 0
    head = {"file": str(tmp_path / "head.pth"), "input": "raw", "model": "shapes_clip"}
    asked = {"contrast": {}, "labels": {"warm": ["a red shape", ["a blue shape", "a green shape"]]}, "heads": {"flat": head},
             "target_embeddings": str(tmp_path / "target")}
    return shapes(rows=120, pretrained_model=BUNDLED_MODEL, partition_rows=6, parity_rows=0, measures=asked)


NAMES = ["contrast", "flat", "warm", "target_max", "target_norm"]


@pytest.mark.slow
def test_measures_under_other_engines(asked_for, run_cli, run_main, read_table, tmp_path):
    """torchrun and Ray give the parts of one process, byte for byte, with every measure there is."""
    assert run_main("--config", asked_for, "--set", f"output_path={tmp_path / 'local'}").code == 0
    rows = read_table(tmp_path / "local/scores.csv")
    assert [name for name in rows[0] if name in NAMES] == NAMES
    assert all(row[name] for row in rows for name in NAMES)
    outcome = run_cli("--config", asked_for, interpreter=TORCHRUN, timeout=110)
    assert outcome.code == 0, outcome.stderr
    assert outcome_of(tmp_path / "out") == outcome_of(tmp_path / "local")
    pytest.importorskip("ray")
    outcome = run_cli("--config", asked_for, "--set", "engine=ray", "--fresh", timeout=110)
    assert outcome.code == 0, outcome.stderr
    assert outcome_of(tmp_path / "out") == outcome_of(tmp_path / "local")


@pytest.mark.slow
def test_measures_of_a_run_that_was_killed(asked_for, start_cli, run_main, tmp_path):
    """A run killed and resumed ends with the bytes of one that was not, and its statistics are of all rows."""
    assert run_main("--config", asked_for, "--set", f"output_path={tmp_path / 'whole'}").code == 0
    process = start_cli("--config", asked_for)
    while process.poll() is None and parts_in(tmp_path / "out") < 5:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert 5 <= parts_in(tmp_path / "out") < 20
    assert run_main("--config", asked_for).code == 0
    assert outcome_of(tmp_path / "out") == outcome_of(tmp_path / "whole")
    profiles = [json.loads((tmp_path / name / "profile.json").read_text()) for name in ("out", "whole")]
    for name in ("contrast", "heads", "labels", "target_embeddings"):
        assert profiles[0][name] == profiles[1][name]
        assert profiles[0]["stage_seconds"][name] > 0


@pytest.mark.slow
def test_measures_that_are_not_asked_for(shapes, run_main, tmp_path):
    """They take no time, have no column, and the summary has no line of their cost."""
    outcome = run_main("--config", shapes(rows=12, pretrained_model=BUNDLED_MODEL, parity_rows=0))
    assert outcome.code == 0
    profile = json.loads((tmp_path / "out/profile.json").read_text())
    assert not {"contrast", "heads", "labels", "target_embeddings"} & {*profile, *profile["stage_seconds"]}
    assert "measures  " not in outcome.stderr


def test_a_dry_run_has_their_columns(shapes, run_main, read_table, tmp_path):
    """Columns depend on the config alone: in a dry run they are there, and empty; no file is opened for them."""
    asked = {"contrast": {}, "labels": {"warm": ["a", "b"]}, "heads": {"flat": {"file": "nowhere.pth"}},
             "target_embeddings": "nowhere"}
    outcome = run_main("--config", shapes(rows=3, measures=asked))
    assert outcome.code == 0, outcome.stderr
    rows = read_table(tmp_path / "out/scores.csv")
    assert [name for name in rows[0] if name in NAMES] == NAMES
    assert {row[name] for row in rows for name in NAMES} == {""}
