"""Which measures a run computes: what its config asks for, and what it says of a name or a setting that is wrong."""
import dataclasses
import types

import pytest

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
    """A run with a model has random pairs and a passport and counts captions; both kinds count what is odd about images."""
    assert [measure.name for measure in find()] == ["captions", "images", "passport", "random_pairs"]
    assert [measure.name for measure in find(save_embeddings="int8")] == [
        "captions", "saved_embeddings", "images", "passport", "random_pairs"]
    assert [measure.name for measure in find(parity_rows=0)] == ["captions", "images", "random_pairs"]
    assert [measure.name for measure in find(pretrained_model="none", save_embeddings="int8")] == ["images"]


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
