"""Adapters of peft: merged into their base model, or refused; never left out in silence.

The reference is peft's own merge of the same adapter into transformers' own model.
"""
import json
import os
import pathlib
import shutil
import sys

import peft
import pytest
import torch
import transformers
from models import as_pickle
from PIL import Image
from safetensors.torch import load_file, save_file

import image_text_sim_clip as script

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "challenge_set/shapes_clip"
PAIRS = [("shape-000.png", "a large cyan triangle"), ("shape-001.png", "a small red circle"), ("shape-002.png", "a star")]
KINDS = {
    "lora": peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    "lora on the text tower": peft.LoraConfig(r=2, target_modules=r"text_model.*\.(k_proj|fc1)", init_lora_weights=False),
    "dora": peft.LoraConfig(r=4, use_dora=True, target_modules=["fc1"], init_lora_weights=False),
    "biases and a whole layer": peft.LoraConfig(r=4, bias="all", target_modules=["out_proj"], init_lora_weights=False,
                                                modules_to_save=["text_projection"]),
    "a task": peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="FEATURE_EXTRACTION", init_lora_weights=False),
    "lokr": peft.LoKrConfig(r=4, target_modules=["q_proj", "k_proj"], init_weights=False),
    "ia3": peft.IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"], init_ia3_weights=False),
}


def train(kind, folder, base=BUNDLED):
    """Write an adapter with random weights into `folder`; returns peft's own merge of it."""
    torch.manual_seed(0)
    model = transformers.CLIPModel.from_pretrained(base, dtype=torch.float32)
    wrapped = peft.get_peft_model(model, KINDS[kind])
    for name, weight in wrapped.named_parameters():
        if any(part in name for part in ("modules_to_save", "ia3_")):
            weight.data += 0.3 * torch.randn(weight.shape)
    wrapped.save_pretrained(folder)
    set_base(folder, base)
    return wrapped.merge_and_unload().eval()


def set_base(folder, base):
    """Have an adapter name this base model."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))


def cosines(model):
    """The model's own cosines of PAIRS."""
    processor = transformers.CLIPImageProcessorPil.from_pretrained(BUNDLED)
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED)
    found = []
    for file, caption in PAIRS:
        image = Image.open(ROOT / "challenge_set/shapes" / file).convert("RGB")
        with torch.inference_mode():
            out = model(**processor(image, return_tensors="pt"), **tokenizer([caption], return_tensors="pt"))
        found.append((out.image_embeds * out.text_embeds).sum().item())
    return found


@pytest.fixture
def alone(tmp_path):
    """A function that writes an adapter alone and returns (its folder, the cosines of peft's own merge)."""
    def write(kind="lora", base=BUNDLED):
        merged = train(kind, tmp_path / "adapter", base)
        return tmp_path / "adapter", cosines(merged)
    return write


@pytest.fixture
def beside(alone, tmp_path):
    """A function that puts an adapter next to its base model and returns (the folder, the cosines of peft's own merge)."""
    def write(kind="lora"):
        adapter, expected = alone(kind)
        folder = tmp_path / "tuned"
        shutil.copytree(BUNDLED, folder)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(adapter / name, folder)
        return folder, expected
    return write


@pytest.fixture
def score(run_main, write_config, write_table, read_table, tmp_path):
    """Score PAIRS with a model: (Outcome, the similarities, or None without any)."""
    def run(model, **keys):
        table = write_table([("url", "caption"), *PAIRS])
        outcome = run_main("--config", write_config(
            csv_path=str(table), image_path=str(ROOT / "challenge_set/shapes"), pretrained_model=str(model), **keys))
        if outcome.code:
            return outcome, None
        return outcome, [float(row["similarity"]) for row in read_table(tmp_path / "out/scores.csv")]
    return run


def assert_refused(outcome, *parts):
    """Exit 6 and one line that holds `parts`."""
    assert outcome.code == 6, outcome.stderr
    assert outcome.stderr.count("\n") == 1, outcome.stderr
    for part in parts:
        assert part in outcome.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_next_to_its_base_is_merged(kind, beside, score):
    """A folder with base model and adapter scores as peft's own merge does, not as the base does."""
    folder, expected = beside(kind)
    outcome, found = score(folder, preprocess="exact")
    assert outcome.code == 0, outcome.stderr
    assert found == pytest.approx(expected, abs=1e-5)
    plain = cosines(transformers.CLIPModel.from_pretrained(BUNDLED, dtype=torch.float32).eval())
    assert max(abs(a - b) for a, b in zip(expected, plain, strict=True)) > 1e-3


@pytest.mark.parametrize("kind", ["lora", "biases and a whole layer", "ia3"])
def test_an_adapter_alone_takes_the_base_that_it_names(kind, alone, score, tmp_path):
    """An adapter alone is merged into the base model named in it; the manifest records files of both."""
    folder, expected = alone(kind)
    outcome, found = score(folder, preprocess="exact")
    assert outcome.code == 0, outcome.stderr
    assert found == pytest.approx(expected, abs=1e-5)
    resolved = json.loads((tmp_path / "out/manifest.json").read_text())["resolved"]
    assert resolved["adapter"] is True
    assert {"adapter_model.safetensors", "adapter_config.json", "base/model.safetensors"} <= resolved["files"].keys()
    assert resolved["libraries"]["peft"] == peft.__version__


def test_the_base_may_lie_next_to_the_adapter(alone, score, tmp_path):
    """A base that is named by its place seen from the adapter's folder is found."""
    folder, expected = alone()
    shutil.copytree(BUNDLED, tmp_path / "base")
    set_base(folder, "../base")
    assert score(folder, preprocess="exact")[1] == pytest.approx(expected, abs=1e-5)


def test_a_folder_that_is_no_model_is_no_base(alone, score, tmp_path, monkeypatch):
    """A namesake seen from here that holds no model does not stand in the way of the base next to the adapter."""
    folder, expected = alone()
    shutil.copytree(BUNDLED, tmp_path / "base")
    (tmp_path / "work/base").mkdir(parents=True)
    (tmp_path / "work/here").mkdir()
    monkeypatch.chdir(tmp_path / "work/here")
    set_base(folder, "../base")
    assert score(folder, preprocess="exact")[1] == pytest.approx(expected, abs=1e-5)


def test_two_bases_of_one_name_are_refused(alone, score, tmp_path, monkeypatch):
    """Where the base's name is one model seen from here and another one next to the adapter, neither is taken by chance."""
    folder, _ = alone()
    for place in ("base", "work/base"):
        shutil.copytree(BUNDLED, tmp_path / place)
    (tmp_path / "work/here").mkdir()
    monkeypatch.chdir(tmp_path / "work/here")
    set_base(folder, "../base")
    assert_refused(score(folder)[0], "'../base'", "write the whole path")


def test_the_passport_knows_the_adapter(beside, score, tmp_path):
    """In bfloat16 the score passport compares with the merged model in float32, not with the base."""
    folder, _ = beside()
    outcome, _ = score(folder, dtype="bfloat16")
    assert outcome.code == 0, outcome.stderr
    passport = json.loads((tmp_path / "out/profile.json").read_text())["passport"]
    assert passport["rows"] == 3
    assert passport["max_difference"] < 0.03


def test_without_peft_an_adapter_is_refused(beside, alone, score, monkeypatch):
    """Where peft cannot be imported a folder with an adapter is exit 6, and a run begun with it is not finished without."""
    folders = (beside()[0], alone()[0])  # peft makes them
    monkeypatch.setitem(sys.modules, "peft", None)
    for folder in folders:
        assert_refused(score(folder)[0], "peft", "addons/requirements.txt", "adapter_config.json")


def test_without_an_adapter_peft_is_not_needed(score, monkeypatch):
    """A plain folder scores where peft cannot be imported, and records no adapter."""
    monkeypatch.setitem(sys.modules, "peft", None)
    assert score(BUNDLED)[0].code == 0


def edit_config(**keys):
    """A change of adapter_config.json."""
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return change


def edit_weights(change_name):
    """A change of the names in adapter_model.safetensors; a name that becomes None is left out."""
    def change(folder):
        weights = load_file(folder / "adapter_model.safetensors")
        renamed = {change_name(name): weight for name, weight in weights.items()}
        renamed.pop(None, None)
        save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return change


def with_pickle(folder):
    """Only the pickle that older peft wrote."""
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


UNFIT = {
    "a pickle": (with_pickle, ["adapter_model.safetensors"]),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), ["adapter_model.safetensors"]),
    "cut short": (lambda folder: os.truncate(folder / "adapter_model.safetensors", 5000), ["adapter_model.safetensors"]),
    "no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), ["adapter_config.json"]),
    "a prompt": (edit_config(peft_type="PROMPT_TUNING"), ["PROMPT_TUNING", "LORA"]),
    "a kind nobody knows": (edit_config(peft_type="NO_SUCH"), ["NO_SUCH"]),
    "a module to import": (edit_config(megatron_config={"a": 1}, megatron_core="antigravity"), ["megatron_config"]),
    "other layers": (edit_weights(lambda name: name.replace("layers.0", "layers.7")), ["layers.7"]),
    "a weight missing": (edit_weights(lambda name: None if "vision_model.encoder.layers.0.self_attn.q_proj" in name else name),
                         ["layers.0.self_attn.q_proj"]),
    "another rank": (edit_config(r=8), []),
    "layers that the base lacks": (edit_config(target_modules=["no_such_layer"]), []),
}


@pytest.mark.parametrize("what", UNFIT)
def test_an_adapter_that_does_not_fit_is_refused(what, beside, score):
    """An adapter that cannot be merged whole is exit 6 and one line, and nothing of it is run."""
    folder, _ = beside()
    change, parts = UNFIT[what]
    change(folder)
    outcome, _ = score(folder)
    assert_refused(outcome, "tuned", *parts)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("named", ["/content/drive/base", "", None, "no-such-folder", "a/b/c"])
def test_a_base_that_is_nowhere_is_told(named, alone, score):
    """An adapter alone whose base is neither a folder here nor a Hub id is one line that names it and where it is set."""
    folder, _ = alone()
    edit_config(base_model_name_or_path=named)(folder)
    assert_refused(score(folder)[0], "base_model_name_or_path", repr(named or ""))


def test_a_base_with_an_adapter_is_refused(alone, beside, score, tmp_path):
    """An adapter to a folder that holds another adapter is refused, for nobody knows which base it was trained on."""
    base, _ = beside()
    shutil.rmtree(tmp_path / "adapter")
    folder, _ = alone()
    set_base(folder, base)
    assert_refused(score(folder)[0], "merge that one first")


def test_a_base_of_pickles_is_refused(alone, score, tmp_path):
    """A local base model must have safetensors, as any local folder must."""
    shutil.copytree(BUNDLED, tmp_path / "base")
    as_pickle(tmp_path / "base")
    folder, _ = alone()
    set_base(folder, tmp_path / "base")
    assert_refused(score(folder)[0], "base", "a pickle can run code")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "base"])
def test_another_adapter_is_another_model(file, alone, score, tmp_path):
    """A run is not resumed with another adapter, nor with another base model under it: refused by name."""
    shutil.copytree(BUNDLED, tmp_path / "base")
    folder, _ = alone(base=tmp_path / "base")
    assert score(folder, partition_rows=2)[0].code == 0
    (tmp_path / "out/parts/part-00001.parquet").unlink()
    if file == "adapter_config.json":
        edit_config(lora_alpha=32)(folder)
    else:
        name = "model.safetensors" if file == "base" else file
        path = (tmp_path / "base" if file == "base" else folder) / name
        weights = load_file(path)
        save_file({key: 1.01 * weight for key, weight in weights.items()}, path, metadata={"format": "pt"})
        file = "base/model.safetensors" if file == "base" else file
    outcome, _ = score(folder, partition_rows=2)
    assert outcome.code == 2, outcome.stderr
    assert f"{file} has changed" in outcome.stderr


def test_a_script_alone_refuses_an_adapter(beside, score, tmp_path, monkeypatch):
    """Without addons/ a folder with an adapter is refused in one line, not scored as its base."""
    monkeypatch.setattr(script, "ADDONS", tmp_path / "nowhere")
    real = script.importlib.import_module

    def without_addons(name, *package):
        if name.startswith("addons."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *package)
    monkeypatch.setattr(script.importlib, "import_module", without_addons)
    outcome, _ = score(beside()[0])
    assert outcome.code == 2
    assert "addons/models/adapters" in outcome.stderr
