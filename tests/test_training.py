"""Training with several teachers, a judge, patience and an average: the error, when it ends, what is kept, what it costs."""
import io
import json
import shutil
import tarfile

import pytest
from conftest import BUNDLED_MODEL
from tiny_pipelines import BUILDERS, PROMPTS, SIDE, command_line, kill_at

import image_text_sim_clip as script

# isort: split
import diffusers
import torch
from safetensors.torch import load_file, save_file

from addons.curation.export import add_member
from examples import finetune_text_to_image as finetune
from examples.memory import KeptTensors, StepMemory, count_bytes, count_remembered, tell_memory
from examples.painter import relative_norm_change
from examples.teachers import Teachers, pair_teachers
from examples.watching import Patience, read_log

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """A folder with the bundled model, its weights changed: another scorer that costs nothing to build."""
    from models import change_weights
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(BUNDLED_MODEL, folder)

    def change(weights):
        name = "visual_projection.weight"
        weights[name] = weights[name] + 0.05 * torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(9))
    change_weights(folder, change)
    return folder


@pytest.fixture
def configs(write_config, other_model):
    """The configs of two scorers with different weights."""
    return [write_config("first.yaml", pretrained_model=BUNDLED_MODEL),
            write_config("second.yaml", pretrained_model=str(other_model))]


@pytest.fixture
def start(pipeline_shelf, tmp_path, configs):
    """Put a Trainer together for FLUX's tiny pipeline (or another's); keywords replace options, None removes them."""
    (tmp_path / "prompts.csv").write_text("caption\n" + "\n".join(PROMPTS) + "\n", encoding="utf-8")

    def make(name="flux", **changes):
        options = {"model": pipeline_shelf(name), "prompts": tmp_path / "prompts.csv", "teacher": [configs[0]],
                   "resolution": SIDE, "output": tmp_path / "tuned", "steps": 4, "batch": 2, "denoising_steps": 2,
                   "gradient_steps": 1, "learning_rate": 0.01, "save_every": 2, "evaluate_every": 2, "cpu": [], **changes}
        return finetune.Trainer(finetune.parse_arguments(command_line(options)))
    return make


def weights_of(trainer):
    """Copies of the LoRA weights."""
    return {name: weight.detach().clone() for name, weight in trainer.painter.lora().items()}


# ── Teachers in the plural ────────────────────────────────────────────────────────────────────────────────────────────

def test_several_teachers_make_one_error(configs):
    """The mean of their losses by their weights, and so is its gradient."""
    teachers = Teachers(pair_teachers(configs, [3.0, 1.0], None), CPU)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    error, own = teachers(images, PROMPTS[:2])
    gradient, = torch.autograd.grad(error, images, retain_graph=True)
    singles = [torch.autograd.grad(loss(images, PROMPTS[:2]), images)[0] for loss in teachers.losses]
    assert error.item() == pytest.approx(0.75 * own[0].item() + 0.25 * own[1].item(), abs=1e-6)
    assert torch.allclose(gradient, 0.75 * singles[0] + 0.25 * singles[1], atol=1e-7)
    assert abs(own[0] - own[1]) > 1e-3


@pytest.mark.slow  # a SigLIP is built first
def test_a_sigmoid_loss_may_be_one_of_them(shelf, write_config, configs):
    """SigLIP's own loss, with its scale and bias, next to a cosine; a CLIP that is asked for one is refused."""
    siglip = write_config("siglip.yaml", pretrained_model=str(shelf("siglip-base")))
    teachers = Teachers(pair_teachers([configs[0], siglip], None, ["cosine", "sigmoid"]), CPU)
    images = torch.rand(2, 3, 64, 64)
    error, own = teachers(images, PROMPTS[:2])
    assert error.item() == pytest.approx((own[0] + own[1]).item() / 2, rel=1e-5)
    assert own[1].item() == pytest.approx(finetune.Teachers(pair_teachers([siglip], None, ["sigmoid"]), CPU)(
        images, PROMPTS[:2])[0].item(), rel=1e-5)
    with pytest.raises(script.Trouble, match="no SigLIP model"):
        Teachers(pair_teachers([configs[0]], None, ["sigmoid"]), CPU)


def test_both_teachers_and_the_judge_are_watched(start, configs, write_config, shelf):
    """Each teacher's number, their mean by weight, and diversity where a prompt is painted twice."""
    trainer = start(teacher=configs, teacher_weights=[3, 1], images_per_prompt=2)
    look = trainer.watch.look()
    assert set(look.scores) == {"teacher", "teacher_1", "teacher_2"}
    for mean, first, second in zip(look.scores["teacher"], look.scores["teacher_1"], look.scores["teacher_2"], strict=True):
        assert mean == pytest.approx(0.75 * first + 0.25 * second, abs=1e-5)
    scorer = trainer.teachers.scorers[0]
    with torch.no_grad():
        unit = [scorer.encode_images(scorer.stack([scorer.resize(image)])) for image in look.images]
    assert look.diversity == pytest.approx(1 - (unit[0] @ unit[1].T).item(), abs=1e-4)


# ── Staying near ──────────────────────────────────────────────────────────────────────────────────────────────────────

def test_norm_of_the_velocity_is_held(start):
    """Nothing at first; the penalty's value is the mean squared relative change of each velocity's norm."""
    base = torch.tensor([[3.0, 4.0], [0.0, 2.0]]).view(2, 1, 1, 2)
    assert relative_norm_change(base * torch.tensor([1.5, 1.0]).view(2, 1, 1, 1), base).item() == pytest.approx(0.125)
    trainer = start(hold_norm=1, stay_near=1)
    first = trainer.advance(0)
    second = trainer.advance(1)
    assert first["norm_strayed"] == first["strayed"] == 0
    assert second["norm_strayed"] > 0 and second["strayed"] > 0
    assert second["loss"] == pytest.approx(second["dissimilarity"] + second["strayed"] + second["norm_strayed"], abs=1e-5)


# ── Stopping ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def look_rows(judge, teacher=None):
    """Rows of log.jsonl with these means, a look every 10 steps."""
    return [{"step": 10 * i, "judge": [value], "teacher": [(teacher or judge)[i]]} for i, value in enumerate(judge)]


def test_patience_counts_looks_since_the_best():
    """By more than the margin; the reason names the judge's best step and what the teacher did since."""
    rows = look_rows([0.5, 0.4, 0.41, 0.42], [0.5, 0.4, 0.3, 0.2])
    assert Patience(2, 0.0).reason_to_stop(rows[:3], "judge") is None
    reason = Patience(2, 0.0).reason_to_stop(rows, "judge")
    assert "the judge's dissimilarity" in reason and "best at step 10 (0.4000)" in reason and "-0.2000" in reason
    assert Patience(0, 0.0).reason_to_stop(rows, "judge") is None
    falling = look_rows([0.5, 0.49, 0.48, 0.47])
    assert Patience(2, 0.0).reason_to_stop(falling, "judge") is None
    assert Patience(2, 0.05).reason_to_stop(falling, "judge")
    assert Patience(2, 0.015).reason_to_stop(falling, "judge") is None  # 0.48 is better than 0.5 by more than that


@pytest.mark.slow  # two runs
def test_run_stops_by_patience_and_says_why(start, configs, tmp_path, capsys):
    """A judge that nothing pleases: the run ends at the second look, keeps the best weights, and ends so again."""
    options = {"judge": configs[1], "patience": 1, "margin": 2.0, "steps": 100}
    summary = start(**options).run()
    again = start(**options).run()
    assert summary["steps"] == 2 and summary["best_step"] == 0 and "best at step 0" in summary["stopped"]
    assert again == summary
    assert "stopped: the judge's dissimilarity" in capsys.readouterr().err
    best = load_file(tmp_path / "tuned/best/pytorch_lora_weights.safetensors")
    last = load_file(tmp_path / "tuned/pytorch_lora_weights.safetensors")
    assert all(not value.any() for name, value in best.items() if "lora_B" in name)
    assert any(value.any() for name, value in last.items() if "lora_B" in name)


# ── The average ───────────────────────────────────────────────────────────────────────────────────────────────────────

def test_average_is_diffusers_own_and_is_what_is_saved(start, tmp_path):
    """EMAModel of the same decay, fed the same weights; looks and files have the average, training goes on without."""
    trainer = start(ema=0.9, steps=3)
    theirs = diffusers.training_utils.EMAModel(trainer.painter.lora().values(), decay=0.9)
    for step in range(3):
        trainer.advance(step)
        theirs.step(trainer.painter.lora().values())
    last = weights_of(trainer)
    for ours, expected in zip(trainer.average.shadow.values(), theirs.shadow_params, strict=True):
        assert torch.allclose(ours, expected, atol=1e-6)
    trainer.out.mkdir()
    trainer.save(3)
    saved = load_file(tmp_path / "tuned/pytorch_lora_weights.safetensors")
    name = next(iter(trainer.average.shadow))
    assert any(torch.equal(value, trainer.average.shadow[name]) for value in saved.values())
    assert all(torch.equal(last[key], weight) for key, weight in trainer.painter.lora().items())


# ── Killed, and out of room ───────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def webdataset(tmp_path, noise):
    """Six curated images in a tar."""
    folder = tmp_path / "curated"
    folder.mkdir()
    with tarfile.open(folder / "kept-00000.tar", "w") as tar:
        for i in range(6):
            buffer = io.BytesIO()
            noise(40, 30, seed=i).save(buffer, "PNG")
            add_member(tar, f"{i}.png", buffer.getvalue())
            add_member(tar, f"{i}.json", json.dumps({"text": f"caption {i}", "dissimilarity": i / 10}).encode())
    return folder


@pytest.mark.slow  # three runs
@pytest.mark.parametrize("kind", ["prompts", "images"])
def test_killed_and_resumed_is_undisturbed(start, webdataset, tmp_path, monkeypatch, kind):
    """In the middle of an epoch, with an average, dropped captions and two batches a step; the log's last line is torn."""
    options = {"ema": 0.9, "accumulate": 2, "steps": 5, "evaluate_every": 5}
    if kind == "images":
        options |= {"prompts": None, "images": webdataset, "drop_captions": 0.3}
    start(output=tmp_path / "whole", **options).run()
    killed = start(output=tmp_path / "killed", **options)
    kill_at(killed, 3, monkeypatch)
    with (tmp_path / "killed/log.jsonl").open("a") as log:
        log.write('{"step": 4, "lo')
    start(output=tmp_path / "killed", **options).run()
    for name in ("lora", "average"):
        whole, resumed = (torch.load(tmp_path / run / "state.pt", weights_only=True)[name] for run in ("whole", "killed"))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole) and whole
    assert read_log(tmp_path / "killed/log.jsonl", 5) == read_log(tmp_path / "whole/log.jsonl", 5)
    for name in ("pytorch_lora_weights.safetensors", "held_out.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(("error", "full"), [
    (torch.OutOfMemoryError("CUDA out of memory"), True), (MemoryError(), True), (RuntimeError("shapes do not fit"), False),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True)])
def test_what_libraries_raise_for_want_of_memory_is_known(error, full):
    """On a GPU, on the CPU, and in Python itself."""
    assert finetune.is_out_of_memory(error) is full


@pytest.mark.slow  # three runs
def test_no_room_is_one_line_and_loses_nothing(start, tmp_path, monkeypatch):
    """The steps before it are saved, and a run with room goes on to the weights of an undisturbed one."""
    start(output=tmp_path / "whole").run()
    full = start(output=tmp_path / "full", save_every=100)
    paint = full.painter.paint
    calls = iter(range(100))

    def paint_or_fail(prompts, noise, gradient_steps=0, measure_distance=False):
        if gradient_steps and next(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return paint(prompts, noise, gradient_steps, measure_distance)
    monkeypatch.setattr(full.painter, "paint", paint_or_fail)
    with pytest.raises(script.Trouble, match="no room in memory at step 3 for 2 images of 32 px") as caught:
        full.run()
    assert caught.value.exit_code == 6 and "\n" not in str(caught.value)
    assert torch.load(tmp_path / "full/state.pt", weights_only=True)["step"] == 3
    start(output=tmp_path / "full", save_every=100).run()
    whole, resumed = (torch.load(tmp_path / run / "state.pt", weights_only=True)["lora"] for run in ("whole", "full"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


# ── Memory ────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name", list(BUILDERS))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_that_is_told_is_what_autograd_keeps(start, name, checkpointing):
    """To the byte: what a step without data counts, and what a real one keeps."""
    trainer = start(name, guidance=3, **({"gradient_checkpointing": []} if checkpointing else {}))
    painter = trainer.painter
    condition = painter.conditions(PROMPTS[:2])
    latents = painter.noise(2, torch.Generator())
    with KeptTensors(painter.family.denoiser) as of_denoiser:
        predicted = painter.family.predict(latents, torch.tensor(500.0), condition, 3.0)
    with KeptTensors(painter.family.pipeline.vae) as of_decoder:
        painter.family.decode(predicted)
    told = count_remembered(painter, 2, SIDE, 3, checkpointing)
    assert told == 3 * of_denoiser.bytes + of_decoder.bytes
    assert of_denoiser.bytes > 0 and of_decoder.bytes > 0


def test_weights_count_once_and_what_does_not_fit_says_so():
    """One line of figures by resolution, and a warning where there is less room."""
    layer = torch.nn.Linear(4, 4)
    assert count_bytes(layer, torch.nn.Sequential(layer)) == 4 * 20
    said = []
    memory = StepMemory(2**30, 2**20, {16: 2**20, 32: 3 * 2**30})
    tell_memory(memory, 32, 8 * 2**30, said.append)
    assert said == ["memory of a step: weights 1.0 GiB, LoRA and optimiser 1.0 MiB, remembered for the gradient "
                    "1.0 MiB at 16 px, 3.0 GiB at 32 px"]
    tell_memory(memory, 32, 4 * 2**30, said.append)
    assert said[-1].startswith("warning: 32 px want 4.0 GiB and there are 4.0 GiB: it will hardly fit")


# ── What the user can mend is one line ────────────────────────────────────────────────────────────────────────────────

def test_settings_that_do_not_belong_together_are_one_line(start, configs, webdataset):
    """Exit 2, before anything is loaded."""
    for changes, message in (
            ({"teacher_weights": [1, 2]}, "--teacher-weights must have as many values as --teacher (1), got 2"),
            ({"teacher": configs, "objective": ["cosine"]}, "--objective must have as many values as --teacher (2), got 1"),
            ({"teacher": configs, "teacher_weights": [1, 0]}, "--teacher-weights must be above 0, got 1.0 0.0"),
            ({"teacher": configs, "judge": configs[1]}, "the judge has the teacher's weights"),
            ({"patience": 2}, "give a --judge"), ({"temperature": 0}, "--temperature must be at least 1e-06"),
            ({"temperature": 1e-320}, "--temperature must be at least 1e-06"),
            ({"prompts": None, "images": webdataset, "hold_norm": 1}, "go with --prompts"),
            ({"ema": 1}, "--ema must lie in"), ({"drop_captions": 2}, "--drop-captions must lie in")):
        with pytest.raises(script.Trouble) as caught:
            start(**changes)
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
        assert message in str(caught.value)


def test_resumption_with_other_settings_is_refused(start, pipeline_shelf, tmp_path, write_config, other_model):
    """More images a step, other prompts in the same file, other weights behind the same config or path: each is named."""
    model = shutil.copytree(pipeline_shelf("flux"), tmp_path / "pipeline")
    start(steps=2, model=model).run()
    kept = (tmp_path / "tuned/state.pt").read_bytes()

    def refuse(name, **changes):
        with pytest.raises(script.Trouble, match=f"begun with another {name} ") as caught:
            start(model=model, **changes).run()
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    refuse("images_per_step", accumulate=2)
    refuse("seed", seed=1)
    prompts = (tmp_path / "prompts.csv").read_text()
    (tmp_path / "prompts.csv").write_text(prompts + "a large white heart on a red background\n")
    refuse("training_data")
    (tmp_path / "prompts.csv").write_text(prompts)
    write_config("first.yaml", pretrained_model=str(other_model))
    refuse("teacher_weights_files")
    write_config("first.yaml", pretrained_model=BUNDLED_MODEL)
    weights = load_file(model / "transformer/diffusion_pytorch_model.safetensors")
    name, value = next((name, value) for name, value in weights.items() if value.ndim == 2)
    save_file(weights | {name: value + 0.01}, model / "transformer/diffusion_pytorch_model.safetensors")
    refuse("pipeline_weights")
    assert (tmp_path / "tuned/state.pt").read_bytes() == kept


def test_damaged_state_is_one_line(start, tmp_path):
    """It is never half loaded."""
    start(steps=2).run()
    known = tmp_path / "tuned/options.json"
    settings = known.read_text()
    known.write_text("{")
    with pytest.raises(script.Trouble, match=r"cannot read .*options.json: .*--fresh"):
        start().run()
    known.write_text(settings)
    (tmp_path / "tuned/state.pt").write_bytes(b"PK\3\4 no such thing")
    with pytest.raises(script.Trouble, match=r"cannot read .*state.pt: .*--fresh") as caught:
        start().run()
    assert "\n" not in str(caught.value)
