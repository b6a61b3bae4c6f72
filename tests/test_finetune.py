"""The fine-tuning example on a tiny random pipeline: only LoRA weights learn, the loss falls, a run resumes and reloads."""
import csv
import importlib
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import BUNDLED_MODEL, ROOT
from PIL import Image
from tiny_pipelines import command_line

import image_text_sim_clip as script

sys.path.insert(0, str(ROOT / "challenge_set"))

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from examples import finetune_text_to_image as finetune
from examples import train_shapes_pipeline as shapes_pipeline
from examples import training_data
from examples.painter import ImitationDraws
from examples.watching import make_grid

PROMPTS = [f"a {size} {colour} {shape} on a {ground} background" for size in ("small", "large")
           for colour in ("red", "blue") for shape in ("circle", "star") for ground in ("white", "black")]


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    """A StableDiffusionPipeline that paints 16 x 16 pixels of nothing: a random UNet, the bundled text tower."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128, attention_head_dim=4, norm_num_groups=4)
    folder = tmp_path_factory.mktemp("pipeline")
    StableDiffusionPipeline(
        vae=shapes_pipeline.build_autoencoder(), text_encoder=CLIPTextModel.from_pretrained(BUNDLED_MODEL),
        tokenizer=CLIPTokenizer.from_pretrained(BUNDLED_MODEL), unet=unet, scheduler=shapes_pipeline.build_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False).save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(pipeline_folder, tmp_path, write_config):
    """The command line of a run of a few steps; keywords replace or, with None, remove options."""
    (tmp_path / "prompts.csv").write_text("caption\n" + "\n".join(PROMPTS) + "\n", encoding="utf-8")
    teacher = write_config("teacher.yaml", pretrained_model=BUNDLED_MODEL)

    def make(**changes):
        options = {"model": pipeline_folder, "prompts": tmp_path / "prompts.csv", "teacher": teacher,
                   "output": tmp_path / "tuned", "steps": 4, "batch": 2, "denoising_steps": 3, "gradient_steps": 2,
                   "guidance": 2, "learning_rate": 0.01, "save_every": 2, "evaluate_every": 2, "cpu": [], **changes}
        return command_line(options)
    return make


@pytest.fixture
def other_model(shelf, tmp_path, write_config):
    """The config of a judge with weights of its own."""
    return write_config("judge.yaml", pretrained_model=str(shelf("clip-new-eos")))


def start(arguments):
    """A Trainer, put together but not run."""
    return finetune.Trainer(finetune.parse_arguments(arguments))


def weights_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.painter.family.pipeline.unet.named_parameters()}


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_only_lora_weights_change(arguments):
    trainer = start(arguments(stay_near=0.5))
    before = weights_of(trainer)
    frozen = {name: p.detach().clone() for part in (trainer.teachers, trainer.painter.family.pipeline.text_encoder)
              for name, p in part.named_parameters()}
    trainer.run()
    changed = {name for name, value in weights_of(trainer).items() if not torch.equal(value, before[name])}
    assert changed == set(trainer.painter.lora()) and changed
    after = {name: p for part in (trainer.teachers, trainer.painter.family.pipeline.text_encoder)
             for name, p in part.named_parameters()}
    assert all(torch.equal(frozen[name], after[name]) for name in frozen)


def known_latents(painter, images):
    """The autoencoder's scaled latents of images (n, 3, H, W) in [-1, 1]."""
    return painter.family.encode_images(images)


def draws_for(painter, count):
    """Noise and times for so many images, each caption heard."""
    return ImitationDraws.draw(painter.family, count, painter.painting.side, 0.0, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_each_prediction_type_has_its_target(arguments, pipeline_folder, tmp_path, monkeypatch, kind):
    """A UNet that says exactly what its prediction type asks for has no error, and one that says the others' has."""
    painter = start(arguments(model=with_prediction_type(pipeline_folder, tmp_path / kind, kind))).painter
    scheduler = painter.family.pipeline.scheduler
    side = painter.painting.side
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    clean = known_latents(painter, images)
    errors = {}
    for said in ("epsilon", "v_prediction", "sample"):
        def answer(latents, times, condition, guidance, said=said):
            alpha = scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
            noise = (latents - alpha.sqrt() * clean) / (1 - alpha).sqrt()
            return {"epsilon": noise, "sample": clean, "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * clean}[said]
        monkeypatch.setattr(painter.family, "predict", answer)
        errors[said] = painter.imitation_errors(images, ["a", "b"], draws_for(painter, 2)).max().item()
    assert errors.pop(kind) < 1e-3 and min(errors.values()) > 0.01


def with_prediction_type(pipeline_folder, target, kind):
    """A copy of the pipeline whose scheduler has another prediction type."""
    shutil.copytree(pipeline_folder, target)
    path = target / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": kind}))
    return target


@pytest.mark.parametrize("kind", ["flow_prediction", "x0", "", None])
def test_unknown_prediction_type_is_refused(arguments, pipeline_folder, tmp_path, kind):
    """A prediction type without a known target is exit 6 and one line, before anything is trained towards another's."""
    with pytest.raises(script.Trouble, match="prediction_type") as caught:
        start(arguments(model=with_prediction_type(pipeline_folder, tmp_path / "copy", kind)))
    assert caught.value.exit_code == 6


@pytest.mark.parametrize(("keys", "name"), [({"exif_orientation": True}, "turned.jpg"), ({}, "turned.jpg"),
                                            ({"transparent_over": "#00ff00"}, "clear.png"), ({"avif": True}, "new.avif")])
def test_what_is_trained_on_is_what_was_scored(tmp_path, noise, keys, name):
    """Orientation, the colour under transparency and AVIF follow the scorer's config."""
    image = noise(64, 40)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.convert("RGBA").resize((64, 64)).rotate(30).save(tmp_path / "clear.png")
    image.save(tmp_path / "new.avif")
    config = script.Config(pretrained_model="none", **keys)
    scored = script.decode_image((tmp_path / name).read_bytes(), config)
    edge = min(scored.size)
    left = (scored.width - edge) // 2
    top = (scored.height - edge) // 2
    wanted = scored.resize((32, 32), Image.Resampling.BICUBIC, box=(left, top, left + edge, top + edge))
    got = training_data.read_image(training_data.Pair("a", None, tmp_path / name), 32, config)
    assert got.original_size == (scored.height, scored.width)
    assert torch.equal(got.pixels, torch.from_numpy(np.array(wanted)).permute(2, 0, 1).float() / 127.5 - 1)


def test_loss_falls_on_a_fixed_batch(arguments):
    trainer = start(arguments(crop=1, noise=0, batch=4))
    losses = [trainer.advance(0)["loss"] for _ in range(12)]  # the same step again: the same prompts from the same noise
    assert losses[-1] < losses[0] - 0.02


def test_gradient_checkpointing_and_bf16_change_little(arguments, tmp_path):
    plain = start(arguments()).advance(0)["loss"]
    assert start(arguments(gradient_checkpointing=[])).advance(0)["loss"] == pytest.approx(plain, abs=1e-5)
    accelerate_state = finetune.accelerate.state.AcceleratorState
    accelerate_state._reset_state(True)  # a process has one precision, and this one had float32
    try:
        assert start(arguments(mixed_precision="bf16")).advance(0)["loss"] == pytest.approx(plain, abs=0.05)
    finally:
        accelerate_state._reset_state(True)


def test_gradient_reaches_only_the_last_steps(arguments):
    trainer = start(arguments(gradient_steps=1))
    noise = trainer.painter.noise(2, torch.Generator().manual_seed(0)).requires_grad_()
    images = trainer.painter.paint(PROMPTS[:2], noise, 1).images
    assert torch.autograd.grad(images.sum(), noise, allow_unused=True)[0] is None  # cut before the last step
    images = trainer.painter.paint(PROMPTS[:2], noise, 3).images
    assert torch.autograd.grad(images.sum(), noise)[0].abs().sum() > 0


def test_painting_is_what_diffusers_paints(arguments, pipeline_folder):
    trainer = start(arguments())
    noise = trainer.painter.noise(2, torch.Generator().manual_seed(3))
    ours = trainer.painter.paint(PROMPTS[:2], noise).images
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(PROMPTS[:2], latents=noise, num_inference_steps=3, guidance_scale=2, output_type="pt").images
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_distance_to_the_base_is_nothing_at_first_and_grows(arguments):
    trainer = start(arguments(stay_near=1))
    assert trainer.advance(0)["strayed"] == 0
    assert trainer.advance(1)["strayed"] > 0


def test_interrupted_run_resumes_to_the_same_weights_and_log(arguments, tmp_path):
    whole = start(arguments(output=tmp_path / "whole"))
    whole.run()
    start(arguments(output=tmp_path / "halves", steps=2)).run()
    with (tmp_path / "halves/log.jsonl").open("a") as log:
        log.write('{"step": 3, "loss": 0.0}\n')  # of a step after the last save: it will be done again
    second = start(arguments(output=tmp_path / "halves"))
    second.run()
    assert all(torch.equal(a, b) for a, b in zip(whole.painter.lora().values(), second.painter.lora().values(), strict=True))
    assert log_of(tmp_path / "halves") == log_of(tmp_path / "whole")


def test_saved_weights_load_into_a_fresh_pipeline_and_paint_the_same(arguments, pipeline_folder, tmp_path):
    trainer = start(arguments())
    trainer.run()
    noise = trainer.painter.noise(2, torch.Generator().manual_seed(3))
    ours = trainer.painter.paint(PROMPTS[:2], noise).images
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"latents": noise, "num_inference_steps": 3, "guidance_scale": 2, "output_type": "pt"}
    base = pipeline(PROMPTS[:2], **settings).images
    pipeline.load_lora_weights(tmp_path / "tuned")
    assert torch.allclose(pipeline(PROMPTS[:2], **settings).images, ours, atol=1e-5)
    assert not torch.allclose(base, ours, atol=1e-3)


@pytest.mark.slow  # the judge is built first
def test_run_as_a_command_leaves_scores_images_and_weights(arguments, other_model, tmp_path):
    command = [sys.executable, str(ROOT / "examples/finetune_text_to_image.py"), *arguments(judge=other_model)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=100)
    assert done.returncode == 0, done.stderr
    summary, folder = json.loads(done.stdout.splitlines()[-1]), tmp_path / "tuned"
    held_out = list(csv.DictReader((folder / "held_out.csv").open(encoding="utf-8")))
    assert (summary["prompts"], summary["held_out"]) == (14, 2) == (14, len(held_out))
    for name in ("teacher", "judge"):
        for when in ("before", "after"):
            mean = sum(float(row[f"{name}_{when}"]) for row in held_out) / 2
            assert summary[name][when] == pytest.approx(mean, abs=1e-4)
    assert Image.open(folder / "before.png").size == Image.open(folder / "after.png").size == (34, 16)
    assert (folder / "pytorch_lora_weights.safetensors").exists()
    steps = [row["step"] for row in log_of(folder) if "loss" in row]
    assert steps == [1, 2, 3, 4]


def test_scores_watched_are_the_scorers_own(arguments, tmp_path):
    trainer = start(arguments())
    look = trainer.watch.look()
    expected = 1 - trainer.teachers.scorers[0].similarity(look.images, trainer.held_out)
    assert look.scores["teacher"] == pytest.approx(expected.tolist(), abs=1e-6)


def test_variation_keeps_a_flat_image_and_moves_an_edge():
    flat, generator = torch.full((3, 3, 16, 16), 0.25), torch.Generator().manual_seed(0)
    assert torch.allclose(finetune.vary(flat, 0.5, 0, generator), flat)
    image = torch.rand(1, 3, 8, 8)
    assert torch.allclose(finetune.vary(image, 1, 0, generator), image, atol=1e-5)
    half = flat.clone()
    half[..., 8:] = 0.75
    edges = (finetune.vary(half, 0.5, 0, generator)[:, 0, 8] > 0.5).sum(-1)
    assert len(set(edges.tolist())) > 1  # each image through a window of its own


# ── Curated images ──────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def imagefolder(tmp_path, noise):
    """Six curated images of mixed sizes with metadata.jsonl, as the curation exports them."""
    folder = tmp_path / "curated/train"
    folder.mkdir(parents=True)
    rows = []
    for i in range(6):
        noise(20 + 5 * i, 30, seed=i).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": PROMPTS[i], "similarity": 0.9 - i / 10, "dissimilarity": 0.1 + i / 10})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder.parent


def test_curated_images_teach_the_lora_weights(arguments, imagefolder):
    trainer = start(arguments(prompts=None, images=imagefolder, batch=4))
    before = weights_of(trainer)
    losses = [trainer.advance(0)["loss"] for _ in range(12)]
    assert losses[-1] < losses[0]
    changed = {name for name, value in weights_of(trainer).items() if not torch.equal(value, before[name])}
    assert changed == set(trainer.painter.lora())


# ── What the user can mend is one line ────────────────────────────────────────────────────────────────────────────────

def test_troubles_are_one_line_with_their_exit_code(arguments, imagefolder, tmp_path):
    def refusal(**changes):
        with pytest.raises(script.Trouble) as caught:
            start(arguments(**changes))
        assert "\n" not in str(caught.value)
        return caught.value.exit_code, str(caught.value)
    assert refusal(images=imagefolder)[0] == 2  # both prompts and images
    assert refusal(prompts=None)[0] == 2
    assert refusal(gradient_steps=4) == (2, "--gradient-steps must lie in [1, 3], got 4")
    assert refusal(prompts=tmp_path / "none.csv")[0] == 3
    code, message = refusal(column="text")
    assert code == 3 and "no column 'text'" in message and "caption" in message
    assert refusal(held_out=tmp_path / "prompts.csv") == (3, "no prompt is left to train with: all are held out")
    assert refusal(teacher=tmp_path / "none.yaml")[0] == 2
    assert refusal(judge=tmp_path / "teacher.yaml")[1].startswith("the judge has the teacher's weights")
    assert refusal(model=tmp_path)[0] == 6
    (imagefolder / "train/metadata.jsonl").write_text('{"file_name": "0.png"}\n')
    code, message = refusal(prompts=None, images=imagefolder)
    assert code == 3 and "metadata.jsonl: every row must have a text" in message


def test_broken_image_of_a_curated_set_is_named(arguments, imagefolder):
    for i in range(6):
        (imagefolder / f"train/{i}.png").write_bytes(b"no image")
    trainer = start(arguments(prompts=None, images=imagefolder))
    with pytest.raises(script.Trouble, match=r"cannot read the image .*\.png: ") as caught:
        trainer.advance(0)
    assert caught.value.exit_code == 3


def test_other_options_on_the_same_output_are_refused_unless_fresh(arguments):
    start(arguments(steps=2)).run()
    with pytest.raises(script.Trouble, match="begun with another learning_rate") as caught:
        start(arguments(learning_rate=0.02)).run()
    assert caught.value.exit_code == 2
    with pytest.raises(script.Trouble, match="holds 2 steps already"):
        start(arguments(steps=1)).run()
    assert start(arguments(learning_rate=0.02, fresh=[], steps=1)).run()["steps"] == 1


def test_missing_library_is_one_line(arguments, tmp_path):
    (tmp_path / "peft.py").write_text("raise ModuleNotFoundError('no', name='peft')\n")
    done = subprocess.run([sys.executable, str(ROOT / "examples/finetune_text_to_image.py"), *arguments()], encoding="utf-8",
                          capture_output=True, env={"PYTHONPATH": str(tmp_path), "PATH": ""}, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == ("error: this example needs the package peft (pip install -r requirements.txt "
                                            "-r examples/requirements.txt)")


def test_shapes_pipeline_passes_pixels_through():
    autoencoder = shapes_pipeline.build_autoencoder()
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    decoded = autoencoder.decode(shapes_pipeline.encode(autoencoder, pixels) / autoencoder.config.scaling_factor).sample
    assert torch.equal(((decoded / 2 + 0.5).clamp(0, 1) * 255).round().byte(), pixels)


@pytest.mark.slow  # trains a UNet of full size for a few steps
def test_shapes_pipeline_is_trained_and_loads(tmp_path):
    shapes_pipeline.train(tmp_path, "noise", seed=0, drawings=32, steps=2)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None, requires_safety_checker=False)
    assert pipeline.unet.config.sample_size == 32 and pipeline.vae_scale_factor == 1


def test_training_drawings_leave_out_what_is_held_out():
    from draw_shapes import caption, held_out_scenes
    _, captions = shapes_pipeline.training_drawings(300, seed=0)
    assert len(captions) == 300 and not {caption(scene) for scene in held_out_scenes()} & set(captions)


def relative_difference(some, others):
    """The norm of the difference of LoRA weights over the norm of what was learnt (the weights that begin at zero)."""
    learnt = sum(value.square().sum() for name, value in others.items() if "lora_B" in name)
    return (sum((some[name] - others[name]).square().sum() for name in others) / learnt).sqrt().item()


def state_of(folder):
    """The weights of a run's state.pt."""
    return torch.load(folder / "state.pt", weights_only=True)["lora"]


@pytest.mark.parametrize("kind", ["prompts", "images"])
def test_accumulated_batches_give_the_weights_of_one_large_batch(arguments, imagefolder, tmp_path, kind):
    """Within rounding, with random windows, grain and dropped captions."""
    source = {} if kind == "prompts" else {"prompts": None, "images": imagefolder, "drop_captions": 0.5}
    start(arguments(output=tmp_path / "one", batch=4, steps=3, **source)).run()
    start(arguments(output=tmp_path / "many", batch=2, accumulate=2, steps=3, **source)).run()
    assert relative_difference(state_of(tmp_path / "many"), state_of(tmp_path / "one")) < 1e-2


ACCELERATE = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--num_processes", "2", "--mixed_precision", "no",
              "--dynamo_backend", "no", "--main_process_port", "0"]
LAUNCHERS = {"accelerate": [*ACCELERATE, "--multi_gpu"],
             "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}


def launch(launcher, arguments):
    """Run the command under a launcher; returns what it wrote to stdout and to stderr."""
    command = [sys.executable, *launcher, str(ROOT / "examples/finetune_text_to_image.py"), *arguments]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=110)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.slow  # two processes load everything
@pytest.mark.parametrize("launcher", list(LAUNCHERS))
def test_two_processes_give_the_weights_of_one_with_twice_the_batch(arguments, tmp_path, launcher):
    """Within rounding; and one of them alone talks."""
    start(arguments(output=tmp_path / "one", batch=4, steps=3)).run()
    stdout, stderr = launch(LAUNCHERS[launcher], arguments(output=tmp_path / "two", batch=2, steps=3))
    assert "4 images of 16 px a step, by 2 processes" in stderr and "warning" not in stderr
    assert len([line for line in stdout.splitlines() if line.startswith("{")]) == 1
    assert relative_difference(state_of(tmp_path / "two"), state_of(tmp_path / "one")) < 1e-2


@pytest.mark.slow  # a launcher loads everything
def test_one_process_in_place_of_two_is_warned_of(arguments, tmp_path):
    """`accelerate launch --cpu --num_processes 2` starts one without a word: the program says it."""
    _, stderr = launch([*ACCELERATE, "--cpu"], arguments(steps=1))
    assert "2 images of 16 px a step, by one process" in stderr
    assert "warning: accelerate was asked for several processes and has started one" in stderr


@pytest.mark.slow  # the command, three times
def test_command_that_is_killed_goes_on_to_the_same_weights(arguments, tmp_path):
    """SIGKILL as soon as a state is there; what is left is taken up as if nothing had been."""
    options = {"steps": 30, "save_every": 3, "evaluate_every": 10}
    start(arguments(output=tmp_path / "whole", **options)).run()
    command = [sys.executable, str(ROOT / "examples/finetune_text_to_image.py")]
    command += arguments(output=tmp_path / "killed", **options)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        deadline = time.monotonic() + 60
        while not (tmp_path / "killed/state.pt").exists() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        run.kill()
    assert run.returncode == -signal.SIGKILL
    assert torch.load(tmp_path / "killed/state.pt", weights_only=True)["step"] < 30
    start(arguments(output=tmp_path / "killed", **options)).run()
    whole = state_of(tmp_path / "whole")
    killed = state_of(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")


# ── The demonstration ─────────────────────────────────────────────────────────────────────────────────────────────────

RUNS_OF_FLOW = [f"{name}-{seed}" for name in ("seed", "two", "near", "norm") for seed in (0, 1, 2)]


@pytest.fixture
def demonstration():
    """The program that demonstrates it all."""
    sys.path.insert(0, str(ROOT / "examples"))
    return importlib.import_module("demonstrate_finetuning")


def test_demonstration_does_what_is_missing_and_no_more(demonstration, tmp_path):
    """Step by step, two at a time; what is needed and not there is named, and a step that fails ends it."""
    def step(name, *needs, code=0):
        program = f"import pathlib, sys; sys.exit({code}) if {code} else pathlib.Path(sys.argv[1]).open('x')"
        return demonstration.Step(name, ["-c", program, tmp_path / name], tmp_path / name, needs)
    steps = [step("judge"), step("seed-0", "judge", "pipeline"), step("pipeline"), step("bad", code=3)]
    for chosen, message, code in ((["seed-0"], "the step seed-0 needs judge, which is not there", 2),
                                  (["sed-0"], "no step 'sed-0': --only takes judge, seed-0, pipeline, bad", 2),
                                  (["bad"], "the step bad failed with exit code 3", 4)):
        with pytest.raises(script.Trouble, match=message) as caught:
            demonstration.carry_out(steps, chosen, 2)
        assert caught.value.exit_code == code
    demonstration.carry_out(steps, ["judge"], 2)
    demonstration.carry_out(steps[:3], [], 2)  # each may be done but once: `x` refuses a file that is there
    assert all((tmp_path / name).exists() for name in ("judge", "pipeline", "seed-0"))


def test_demonstration_lists_its_steps(demonstration, tmp_path, capsys):
    """With what is done; nothing is written."""
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge/processor_config.json").write_text("{}")
    assert demonstration.main(["--out", str(tmp_path), "--kind", "flow", "--list"]) == 0
    lines = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert lines == {"judge": "done", **dict.fromkeys(["pipeline", "second", *RUNS_OF_FLOW], "to do")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["judge"]


@pytest.mark.parametrize("kind", ["noise", "flow"])
def test_demonstration_asks_for_what_the_fine_tuning_takes(demonstration, tmp_path, kind):
    """Every command line of a fine-tuning is one."""
    tunings = [step for step in demonstration.list_steps(tmp_path, kind) if step.needs]
    for step in tunings:
        options = finetune.parse_arguments([str(part) for part in step.command[1:]])
        assert options.output == step.result.parent and options.judge and options.cpu
        assert len(options.teacher) == (2 if step.name.startswith("two") else 1)
    assert len(tunings) == {"noise": 4, "flow": 12}[kind]


def test_demonstration_holds_out_what_it_scores(demonstration, tmp_path):
    demonstration.write_inputs(tmp_path)
    training, held_out = (finetune.read_prompts(tmp_path / f"{name}.csv", "caption") for name in ("prompts", "held_out"))
    _, drawn = shapes_pipeline.training_drawings(300, seed=0)
    assert len(training) + len(held_out) == 8 * 6 * 3 and not set(training) & set(held_out)
    assert set(drawn) <= set(training)
    assert script.load_config(tmp_path / "judge.yaml").pretrained_model == str(tmp_path / "judge")


def test_demonstration_shows_and_counts_what_came_of_it(demonstration, tmp_path):
    """Each seed's rows of the chosen prompts, cut out of the runs' grids; and the share of images that got better."""
    names = ("before", "after")
    blues = {"seed": 0, "two": 200, "near": 50, "norm": 100}
    for run, (number, name) in itertools.product(RUNS_OF_FLOW, enumerate(names)):
        (tmp_path / run).mkdir(exist_ok=True)
        blue = blues[run.split("-")[0]]
        images = [Image.new("RGB", (32, 32), (10 * cell, 100 * number, blue)) for cell in range(25)]
        make_grid(images).save(tmp_path / run / f"{name}.png")
    demonstration.write_inputs(tmp_path)
    groups = demonstration.grids_of(tmp_path, "flow")
    demonstration.draw_comparison(groups, tmp_path / "held_out.csv", (0, 4, 22), tmp_path / "sheet.png", 32)
    sheet = Image.open(tmp_path / "sheet.png")
    colours = [[sheet.getpixel((110 + 102 * column + 40, 36 + 102 * row + 40)) for column in range(3)] for row in range(4)]
    assert sheet.size == (110 + 3 * 102, 36 + 12 * 102 + 3 * 8)
    assert colours == [[(10 * cell, green, blue) for cell in (0, 4, 22)]
                       for green, blue in ((0, 0), (100, 0), (100, 200), (100, 100))]
    prompts = finetune.read_prompts(tmp_path / "held_out.csv", "caption")
    grey = [cell for cell, prompt in enumerate(prompts) if "grey" in prompt]
    assert demonstration.colour_of_grounds(tmp_path / "two-0/after.png", prompts, "grey", 32) == [
        round(10 * sum(grey) / len(grey)), 100, 200]
    looks = [{"step": 0, "teacher": [0.5, 0.5], "judge": [0.4, 0.4]}, {"step": 1, "loss": 0.1},
             {"step": 9, "teacher": [0.4, 0.4], "judge": [0.3, 0.45]}]
    (tmp_path / "seed-0/log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in looks))
    assert demonstration.shares_of_better(tmp_path / "seed-0") == {"teacher": 1.0, "judge": 0.5}
    assert demonstration.mean_looks(tmp_path / "seed-0") == {"0": {"teacher": 0.5, "judge": 0.4},
                                                             "9": {"teacher": 0.4, "judge": 0.375}}


def test_judge_is_compared_where_the_teacher_is_the_same(demonstration):
    """On the line between two looks; the level is the lowest that both runs reach."""
    one = {"0": {"teacher": 0.6, "judge": 0.6}, "80": {"teacher": 0.4, "judge": 0.5}, "160": {"teacher": 0.2, "judge": 0.48}}
    two = {"0": {"teacher": 0.7, "teacher_1": 0.6, "judge": 0.6}, "80": {"teacher": 0.5, "teacher_1": 0.3, "judge": 0.3}}
    assert demonstration.compare_at_same_teacher(one, two) == {
        "first teacher": 0.3, "judge": 0.49, "judge of the other": 0.3}
    assert demonstration.judge_at(0.65, one) == 0.6


@pytest.mark.slow  # trains a transformer of full size for a few steps
def test_flow_pipeline_of_the_shapes_is_trained_and_fine_tuned(arguments, tmp_path):
    """A million parameters; the fine-tuning takes it as it is, with one token of zeros in place of T5."""
    shapes_pipeline.train(tmp_path / "flow", "flow", seed=0, drawings=16, steps=2)
    trainer = start(arguments(model=tmp_path / "flow", text_tokens=1, steps=1))
    assert 0.8e6 < sum(weight.numel() for weight in trainer.painter.family.denoiser.parameters()) < 1.2e6
    assert trainer.painter.painting.side == 32 and trainer.painter.conditions(["a"]).states.shape == (2, 33, 256)
    assert trainer.run()["steps"] == 1


@pytest.mark.parametrize("steps", [1, 3])
def test_what_diverges_is_no_score_and_is_not_saved(arguments, tmp_path, monkeypatch, steps):
    """Weights that paint NaN end the run in one line, whether the next step or the next look finds it; black images, which NaN
    would become, are not scored, and such weights are never the best."""
    monkeypatch.setattr(finetune.Trainer, "_learn",
                        lambda self, step: next(iter(self.painter.lora().values())).data.fill_(float("nan")))
    with pytest.raises(script.Trouble, match="is not finite; try a lower --learning-rate") as caught:
        finetune.main(arguments(steps=steps, evaluate_every=steps))
    assert caught.value.exit_code == 4
    looks = [row for row in map(json.loads, (tmp_path / "tuned/log.jsonl").read_text().splitlines()) if "teacher" in row]
    assert [row["step"] for row in looks] == [0]
    assert not (tmp_path / "tuned/state.pt").exists()


def test_a_gradient_that_is_not_finite_moves_nothing(arguments, monkeypatch):
    """One NaN in a gradient would make all weights NaN: the run ends before they are touched."""
    trainer = start(arguments())
    reduce = trainer.accelerator.reduce
    monkeypatch.setattr(trainer.accelerator, "reduce", lambda gradient, how: reduce(gradient, how) * float("nan"))
    before = weights_of(trainer)
    with pytest.raises(script.Trouble, match="the gradient at step 0 is not finite"):
        trainer.run()
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(trainer).items())
