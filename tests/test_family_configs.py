"""What a config.json says that no model can have is one line when the model is loaded, whatever family it is of.

Values of a sound config are replaced by others in turn: negative, zero, fractional, of another type, huge, not dividing.
What comes of it is exit code 6 and one line, or a model that computes; nothing is met in the first batch.
"""
import json
import random
import resource

import numpy as np
import pytest
from family_models import FAMILIES, FamilyShelf
from models import change_config
from PIL import Image

import image_text_sim_clip as script

pytestmark = pytest.mark.slow  # the models are built first

EVERY = [*FAMILIES, "clip-base-patch32", "siglip-base"]
VALUES = [-1, 0, 1, 3, 2.5, -2.0, "7", "x", None, [], {}, True, 10**6, 10**9, 10**18, float("nan"), float("inf"), 1e300]
# What configs may leave to transformers' defaults.
UNSAID = ["layer_norm_eps", "pad_token_id", "eos_token_id", "hidden_act", "type_vocab_size", "projection_size",
          "projection_dim", "num_channels", "num_patches", "image_size", "patch_size", "rms_norm_eps", "attention_dropout",
          "hidden_dropout_prob", "initializer_range", "initializer_factor", "depth_divisor", "kernel_sizes", "strides",
          "num_block_repeats"]
TRIED = 60  # of each family, of several hundred


@pytest.fixture(scope="module")
def family_shelf(tmp_path_factory):
    """Model folders by the name of a family, each built on first use."""
    return FamilyShelf(tmp_path_factory.mktemp("families"))


@pytest.fixture
def copy_of(family_shelf, shelf, tmp_path):
    """A copy of the folder of one of EVERY, and what its config.json holds."""
    def make(name):
        folder = (family_shelf if name in FAMILIES else shelf).copy(name, tmp_path / "a-model")
        return folder, json.loads((folder / "config.json").read_text())
    return make


@pytest.fixture
def bounded_memory():
    """A limit far above what these models take, so that one without bounds is an error and not the machine's end."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def find_places(config):
    """Where numbers stand in a config, and where they may: (section or "", key)."""
    sections = {"": config} | {key: value for key, value in config.items() if isinstance(value, dict)}
    numbers = [(section, key) for section, values in sections.items() for key, value in values.items()
               if type(value) in (int, float)]
    unsaid = [(section, key) for section in sections if section for key in UNSAID]
    return list(dict.fromkeys([*numbers, *unsaid]))


def put(folder, config, section, key, value):
    """Write config.json with another value in one place."""
    changed = json.loads(json.dumps(config))
    (changed[section] if section else changed)[key] = value
    (folder / "config.json").write_text(json.dumps(changed))


def judge(folder):
    """"loads" where the model loads and scores an image with a long caption, else the one line of the Trouble (exit 6)."""
    try:
        scorer = script.Scorer(script.Config(pretrained_model=str(folder), use_cuda=False))
    except script.Trouble as trouble:
        assert trouble.exit_code == 6 and "\n" not in str(trouble) and "a-model" in str(trouble)
        return str(trouble)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    scorer.similarity([image, image], ["a photo of two cats " * 40, "a cat"])
    return "loads"


@pytest.mark.parametrize("name", EVERY)
def test_no_value_of_a_config_is_met_in_the_first_batch(name, copy_of, bounded_memory):
    """Values of chance in places of chance, from one seed for each family."""
    folder, config = copy_of(name)
    rng = random.Random(name)
    places = find_places(config)
    told = []
    for _ in range(TRIED):
        section, key = rng.choice(places)
        value = rng.choice(VALUES)
        put(folder, config, section, key, value)
        told.append(judge(folder))
        assert "can't allocate memory" not in told[-1], (section, key, value)  # it is known before it is asked for
    assert 0.2 < sum(line != "loads" for line in told) / TRIED < 1


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(("key", "value", "says"), [
    ("num_attention_heads", -1, "num_attention_heads is -1, where a whole number from 1 belongs"),
    ("num_attention_heads", 3, "3 attention heads share a hidden_size of"), ("num_attention_heads", "2", "is '2', where a"),
    ("hidden_size", 64.5, "hidden_size is 64.5"), ("num_hidden_layers", 10**9, "asks for more than"),
    ("vocab_size", 10**12, "asks for more than"), ("max_position_embeddings", 0, "max_position_embeddings is 0"),
    ("intermediate_size", True, "intermediate_size is True")])
def test_a_count_that_no_model_has_is_named(name, key, value, says, copy_of, run_main, shapes):
    """The line names the key, its value and the section: AltCLIP with -1 heads loads, and stumbles at its first caption."""
    folder, config = copy_of(name)
    put(folder, config, "text_config", key, value)
    outcome = run_main("--config", shapes(rows=2, pretrained_model=str(folder)))
    assert outcome.code == 6 and len(outcome.stderr.splitlines()) == 1
    assert says in outcome.stderr and ("text_config" in outcome.stderr or "asks for" in says)


def test_images_and_captions_of_different_length(copy_of):
    """A config whose encoders give vectors of different lengths is refused: ALIGN's, with fewer stages than its weights."""
    folder, config = copy_of("align")
    put(folder, config, "vision_config", "depth_coefficient", -2.0)
    assert "images become 16 numbers in it, and captions 160" in judge(folder)


@pytest.mark.parametrize("name", ["altclip", "vision_text_dual_encoder"])
def test_positions_counted_from_another_padding(name, copy_of):
    """Where positions are counted from the padding's number, a config with another one than the tokenizer's is refused."""
    folder, _ = copy_of(name)
    if name != "altclip":
        change_config(folder, lambda config: config["text_config"].update(model_type="roberta", pad_token_id=0))
        assert "pad_token_id" not in judge(folder)
    change_config(folder, lambda config: config["text_config"].update(pad_token_id=5))
    assert "pad_token_id 5" in judge(folder)


@pytest.mark.parametrize("most", [False, True, 0, -5, 2, "32"])
def test_captions_of_no_tokens(most, copy_of):
    """A dual encoder's tokenizer that leaves nothing of a caption, or whose `model_max_length` is no number, is refused."""
    folder, _ = copy_of("vision_text_dual_encoder")
    change_config(folder, lambda config: config.update(model_max_length=most), "tokenizer_config.json")
    line = judge(folder)
    assert "model_max_length" in line or (most == "32" and "cannot load" in line)
