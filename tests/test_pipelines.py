"""Each family of pipelines, on a tiny random one: painting, gradients, losses, LoRA weights and resumptions are right."""
import argparse
import json
import shutil

import pytest
from conftest import BUNDLED_MODEL
from tiny_pipelines import BUILDERS, PROMPTS, SIDE, command_line, kill_at

import image_text_sim_clip as script

# isort: split
import diffusers
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3

from addons.loss import DissimilarityLoss
from examples import finetune_text_to_image as finetune
from examples.painter import ImitationDraws, Lora, Painter, Painting
from examples.pipelines import Framing, families, load_family

FAMILIES = list(BUILDERS)
every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture
def painter_of(pipeline_shelf):
    """Load a family's tiny pipeline as a Painter; its LoRA weights are random, not without effect as at a run's start."""
    def make(name, denoising_steps=3, guidance=None):
        family = load_family(str(pipeline_shelf(name)), "main", torch.float32)
        guidance = family.usual_guidance if guidance is None else guidance
        lora = Lora(4, family.lora_targets, 0)
        painter = Painter(family, Painting(SIDE, denoising_steps, guidance), lora, torch.device("cpu"))
        generator = torch.Generator().manual_seed(1)
        for weight in painter.lora().values():
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
        return painter
    return make


@pytest.fixture
def start(pipeline_shelf, tmp_path, write_config):
    """Put a Trainer together for a family's tiny pipeline; keywords replace options."""
    (tmp_path / "prompts.csv").write_text("caption\n" + "\n".join(PROMPTS) + "\n", encoding="utf-8")
    teacher = write_config("teacher.yaml", pretrained_model=BUNDLED_MODEL)

    def make(name, **changes):
        options = {"model": pipeline_shelf(name), "prompts": tmp_path / "prompts.csv", "teacher": teacher, "resolution": SIDE,
                   "output": tmp_path / "tuned", "steps": 4, "batch": 2, "denoising_steps": 2, "gradient_steps": 1,
                   "learning_rate": 0.01, "save_every": 2, "evaluate_every": 4, "guidance": 2, "cpu": [], **changes}
        return finetune.Trainer(finetune.parse_arguments(command_line(options)))
    return make


def all_weights(trainer):
    """Copies of every weight of the pipeline and of the teachers."""
    modules = {name: part for name, part in trainer.painter.family.pipeline.components.items()
               if isinstance(part, torch.nn.Module)}
    modules["teachers"] = trainer.teachers
    return {f"{name}.{key}": value.detach().clone() for name, module in modules.items()
            for key, value in module.named_parameters()}


def own_call(pipeline, prompts, noise, guidance, steps=3, **settings):
    """What the pipeline's own `__call__` paints from this noise, (n, 3, SIDE, SIDE)."""
    if isinstance(pipeline, diffusers.FluxPipeline):
        noise = pipeline._pack_latents(noise, *noise.shape)
    return pipeline(prompts, latents=noise, num_inference_steps=steps, guidance_scale=guidance, height=SIDE, width=SIDE,
                    output_type="pt", **settings).images


# ── Painting ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_every_file_of_a_family_is_found():
    """The folder's files are the families, and each names the class that diffusers has."""
    assert {family.__module__.rpartition(".")[2] for family in families().values()} == set(FAMILIES)
    assert all(hasattr(diffusers, class_name) for class_name in families())


@every_family
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_painting_is_what_diffusers_paints(painter_of, pipeline_shelf, name, guidance):
    """From the same noise, with and without guidance, by the class's own `__call__` without LoRA weights."""
    painter = painter_of(name, guidance=guidance)
    noise = painter.noise(2, torch.Generator().manual_seed(3))
    with painter.without_lora():
        ours = painter.paint(PROMPTS[:2], noise).images
    pipeline = getattr(diffusers, painter.family.pipeline_class).from_pretrained(pipeline_shelf(name))
    theirs = own_call(pipeline, PROMPTS[:2], noise, guidance)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert theirs.std() > 0.01  # not a grey plate


@every_family
def test_prompts_matter(painter_of, name):
    """Another prompt from the same noise is another image."""
    painter = painter_of(name)
    noise = painter.noise(1, torch.Generator().manual_seed(3))
    first, second = (painter.paint([prompt], noise).images for prompt in PROMPTS[:2])
    assert (first - second).abs().max() > 1e-3


# ── The gradient ──────────────────────────────────────────────────────────────────────────────────────────────────────

def keep_float64(monkeypatch):
    """Have diffusers' models compute in float64 throughout: rotary embeddings are rounded to float32 otherwise."""
    lower = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self if self.dtype == torch.float64 else lower(self))


@every_family
@pytest.mark.parametrize("gradient_steps", [1, 2])
def test_gradient_is_that_of_finite_differences(painter_of, monkeypatch, name, gradient_steps):
    """In float64, along a random direction of all LoRA weights, with the steps before the last K held as they are."""
    painter = painter_of(name)
    painter.family.pipeline.to(torch.float64)
    loss = DissimilarityLoss(script.Config(pretrained_model=BUNDLED_MODEL, use_cuda=False)).double()
    keep_float64(monkeypatch)
    lora = painter.lora()
    start = {key: value.detach().clone() for key, value in lora.items()}
    generator = torch.Generator().manual_seed(2)
    direction = {key: torch.randn(value.shape, generator=generator).double() for key, value in start.items()}
    noise = painter.noise(2, generator).double()
    predict = painter.family.predict
    early = painter.painting.denoising_steps - gradient_steps

    def move(distance):
        for key, weight in lora.items():
            weight.data = start[key] + distance * direction[key]

    def value_at(distance):
        calls = iter(range(painter.painting.denoising_steps))
        monkeypatch.setattr(painter.family, "predict", lambda *given: (
            move(distance if next(calls) >= early else 0.0), predict(*given))[1])
        with torch.no_grad():
            value = loss(painter.paint(PROMPTS[:2], noise).images, PROMPTS[:2]).item()
        move(0.0)
        return value
    monkeypatch.setattr(painter.family, "predict", predict)
    loss(painter.paint(PROMPTS[:2], noise, gradient_steps).images, PROMPTS[:2]).backward()
    slope = sum((weight.grad * direction[key]).sum().item() for key, weight in lora.items())
    step = 1e-5
    expected = (value_at(step) - value_at(-step)) / (2 * step)
    assert slope == pytest.approx(expected, rel=1e-5)
    assert abs(slope) > 1e-4


# ── The usual loss ────────────────────────────────────────────────────────────────────────────────────────────────────

def curated_batch(family, framed):
    """Images in [-1, 1], their framing, and all that is drawn by lot for them."""
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(2, 3, SIDE, SIDE, generator=generator) * 2 - 1
    framing = Framing(torch.tensor([[40, 64], [33, 32]]), torch.tensor([[0, 12], [1, 0]])) if framed else None
    return images, framing, ImitationDraws.draw(family, 2, SIDE, 0.0, generator)


def script_latents(pipeline, images, draws, shift=0.0):
    """`vae.encode(images).latent_dist.sample()`, moved and scaled."""
    distribution = pipeline.vae.encode(images).latent_dist
    return (distribution.mean + distribution.std * draws.sample_noise - shift) * pipeline.vae.config.scaling_factor


def flow_sigmas(pipeline, times):
    """What the training scripts' get_sigmas looks up, in a scheduler that nobody has sampled with: (n, 1, 1, 1)."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    places = [(scheduler.timesteps == time).nonzero().item() for time in times]
    return scheduler.sigmas[places].view(-1, 1, 1, 1)


def script_loss_of_stable_diffusion(pipeline, images, framing, draws):
    """examples/text_to_image/train_text_to_image_lora.py: mean square of the noise that is predicted less the true one."""
    latents = script_latents(pipeline, images, draws)
    scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    ids = pipeline.tokenizer(PROMPTS[:2], max_length=pipeline.tokenizer.model_max_length, padding="max_length", truncation=True,
                             return_tensors="pt").input_ids
    noised = scheduler.add_noise(latents, draws.noise, draws.times)
    said = pipeline.unet(noised, draws.times, pipeline.text_encoder(ids)[0]).sample
    return torch.nn.functional.mse_loss(said, draws.noise)


def script_loss_of_stable_diffusion_xl(pipeline, images, framing, draws):
    """examples/text_to_image/train_text_to_image_lora_sdxl.py: the same, told sizes and crops."""
    latents = script_latents(pipeline, images, draws)
    scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    states = []
    for tokenizer, encoder in ((pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)):
        ids = tokenizer(PROMPTS[:2], padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                        return_tensors="pt").input_ids
        out = encoder(ids, output_hidden_states=True)
        states.append(out.hidden_states[-2])
    time_ids = torch.tensor([[40, 64, 0, 12, SIDE, SIDE], [33, 32, 1, 0, SIDE, SIDE]], dtype=torch.float32)
    noised = scheduler.add_noise(latents, draws.noise, draws.times)
    said = pipeline.unet(noised, draws.times, torch.cat(states, dim=-1),
                         added_cond_kwargs={"time_ids": time_ids, "text_embeds": out[0]}).sample
    return torch.nn.functional.mse_loss(said, draws.noise)


def script_loss_of_stable_diffusion_3(pipeline, images, framing, draws):
    """examples/dreambooth/train_dreambooth_lora_sd3.py: the error in the clean latents (--precondition_outputs 1)."""
    latents = script_latents(pipeline, images, draws, pipeline.vae.config.shift_factor)
    sigmas = flow_sigmas(pipeline, draws.times)
    noised = (1.0 - sigmas) * latents + sigmas * draws.noise
    states, _, pooled, _ = pipeline.encode_prompt(PROMPTS[:2], None, None, do_classifier_free_guidance=False)
    said = pipeline.transformer(hidden_states=noised, timestep=draws.times, encoder_hidden_states=states,
                                pooled_projections=pooled, return_dict=False)[0]
    weighting = compute_loss_weighting_for_sd3("logit_normal", sigmas)
    return (weighting * (said * -sigmas + noised - latents) ** 2).reshape(2, -1).mean(1).mean()


def script_loss_of_flux(pipeline, images, framing, draws):
    """examples/dreambooth/train_dreambooth_lora_flux.py: the error in the velocity, with --guidance_scale 3.5."""
    latents = script_latents(pipeline, images, draws, pipeline.vae.config.shift_factor)
    sigmas = flow_sigmas(pipeline, draws.times)
    noised = (1.0 - sigmas) * latents + sigmas * draws.noise
    states, pooled, text_ids = pipeline.encode_prompt(PROMPTS[:2])
    edge = latents.shape[2]
    ids = pipeline._prepare_latent_image_ids(2, edge // 2, edge // 2, "cpu", torch.float32)
    packed = pipeline._pack_latents(noised, 2, latents.shape[1], edge, edge)
    said = pipeline.transformer(hidden_states=packed, timestep=draws.times / 1000, guidance=torch.tensor([3.5]).expand(2),
                                pooled_projections=pooled, encoder_hidden_states=states, txt_ids=text_ids, img_ids=ids,
                                return_dict=False)[0]
    said = pipeline._unpack_latents(said, SIDE, SIDE, pipeline.vae_scale_factor)
    weighting = compute_loss_weighting_for_sd3("none", sigmas)
    return (weighting * (said - (draws.noise - latents)) ** 2).reshape(2, -1).mean(1).mean()


@every_family
def test_usual_loss_is_that_of_diffusers_script(painter_of, name):
    """The formula of the script that each reference names, on the same batch, noise, times and LoRA weights."""
    painter = painter_of(name)
    images, framing, draws = curated_batch(painter.family, framed=True)
    with torch.no_grad():
        ours = painter.imitation_errors(images, PROMPTS[:2], draws, framing)
        theirs = globals()[f"script_loss_of_{name}"](painter.family.pipeline, images, framing, draws)
    assert ours.shape == (2,)
    assert ours.mean().item() == pytest.approx(theirs.item(), abs=1e-6)
    assert theirs > 0.1


@every_family
def test_dropped_caption_is_what_guidance_leads_away_from(painter_of, name):
    """All captions dropped: the loss is that of the pipeline's own negative condition, whatever the captions say."""
    painter = painter_of(name)
    images, _, draws = curated_batch(painter.family, framed=False)
    dropped = ImitationDraws(draws.noise, draws.sample_noise, draws.times, torch.tensor([True, False]))
    with torch.no_grad():
        heard = painter.imitation_errors(images, PROMPTS[:2], draws)
        half = painter.imitation_errors(images, PROMPTS[:2], dropped)
        nothing = painter.family.encode_nothing(2, SIDE)
        latents = painter.family.encode_images(images, draws.sample_noise)
        expected = painter.family.usual_errors(latents, draws.noise, draws.times, nothing, painter.painting.guidance)
    assert half[1].item() == pytest.approx(heard[1].item(), abs=1e-6)
    assert half[0].item() == pytest.approx(expected[0].item(), abs=1e-6)
    assert abs(half[0] - heard[0]) > 1e-5
    if name == "stable_diffusion_xl":
        assert not nothing.states.any() and not nothing.pooled.any()


@every_family
def test_times_of_training_are_the_schedulers_own(painter_of, name):
    """Every time that is drawn is one that the script could look up, and they are spread over all of them."""
    family = painter_of(name).family
    times = family.draw_times(4000, torch.Generator().manual_seed(0))
    known = getattr(family, "training", None)
    allowed = known.timesteps if known else torch.arange(1000)
    assert set(times.tolist()) <= set(allowed.tolist())
    assert times.min() < 50 and times.max() > 950


# ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────────

@every_family
def test_loss_falls_on_a_fixed_batch_and_only_lora_weights_move(start, name):
    """The same step again and again: the same prompts from the same noise."""
    trainer = start(name, crop=1, noise=0, batch=4)
    before = all_weights(trainer)
    losses = [trainer.advance(0)["loss"] for _ in range(8)]
    after = all_weights(trainer)
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    part = "unet" if hasattr(trainer.painter.family.pipeline, "unet") else "transformer"
    # what the text asks for in the last layer of SD3 is thrown away, so nothing there is learnt
    idle = {"transformer.transformer_blocks.1.attn.add_q_proj.lora_B.default.weight"} if name == "stable_diffusion_3" else set()
    assert losses[-1] < losses[0] - 0.005
    assert moved == {f"{part}.{key}" for key in trainer.painter.lora()} - idle


@pytest.mark.slow  # three runs
@every_family
def test_resumed_run_has_the_same_weights_and_saved_weights_paint_the_same(start, pipeline_shelf, tmp_path, monkeypatch, name):
    """Killed in the fourth step, after a save at the second, and begun again: as undisturbed.

    What is saved loads by the class's own load_lora_weights.
    """
    whole = start(name, output=tmp_path / "whole")
    whole.run()
    kill_at(start(name, output=tmp_path / "killed"), 3, monkeypatch)
    assert torch.load(tmp_path / "killed/state.pt", weights_only=True)["step"] == 2
    second = start(name, output=tmp_path / "killed")
    second.run()
    for key, weight in whole.painter.lora().items():
        assert torch.equal(weight, second.painter.lora()[key])
    noise = whole.painter.noise(2, torch.Generator().manual_seed(3))
    ours = whole.painter.paint(PROMPTS[:2], noise).images
    pipeline = getattr(diffusers, whole.painter.family.pipeline_class).from_pretrained(pipeline_shelf(name))
    base = own_call(pipeline, PROMPTS[:2], noise, 2, steps=2)
    pipeline.load_lora_weights(tmp_path / "whole")
    assert torch.allclose(own_call(pipeline, PROMPTS[:2], noise, 2, steps=2), ours, atol=1e-5)
    assert not torch.allclose(base, ours, atol=1e-3)


@pytest.mark.parametrize("name", ["stable_diffusion_3", "flux"])
def test_fewer_tokens_of_t5_are_what_the_class_paints_with_as_many(start, pipeline_shelf, name):
    """`--text-tokens` is `max_sequence_length` of the class's own call."""
    painter = start(name, text_tokens=8).painter
    noise = painter.noise(1, torch.Generator().manual_seed(3))
    with painter.without_lora():
        ours = painter.paint(PROMPTS[:1], noise).images
    pipeline = getattr(diffusers, painter.family.pipeline_class).from_pretrained(pipeline_shelf(name))
    few, many = (own_call(pipeline, PROMPTS[:1], noise, 2, steps=2, max_sequence_length=count) for count in (8, 64))
    assert torch.allclose(ours, few, atol=1e-5) and not torch.allclose(few, many, atol=1e-5)


def test_autoencoder_of_sdxl_stays_in_float32(pipeline_shelf):
    """Also in a pipeline that is loaded in bfloat16, and under autocast."""
    family = load_family(str(pipeline_shelf("stable_diffusion_xl")), "main", torch.bfloat16)
    assert family.denoiser.dtype == torch.bfloat16 and family.pipeline.vae.dtype == torch.float32
    latents = torch.randn(1, *family.latent_shape(SIDE))
    with torch.autocast("cpu", torch.bfloat16):
        within = family.decode(latents)
    assert torch.equal(within, family.decode(latents))


# ── What the user can mend is one line ────────────────────────────────────────────────────────────────────────────────

def test_unknown_class_is_refused_before_its_weights_are_read(tmp_path):
    """The message names what it is and what can be trained."""
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline", "_diffusers_version": "0.1"}))
    with pytest.raises(script.Trouble, match="KandinskyPipeline; this example trains FluxPipeline, Stable") as caught:
        load_family(str(tmp_path), "main", torch.float32)
    assert caught.value.exit_code == 6 and "\n" not in str(caught.value)


def test_settings_that_do_not_fit_a_family_are_one_line(start):
    """A resolution that is no multiple, a velocity's norm without velocity, layers that are not there."""
    for name, changes, message in (("flux", {"resolution": 36}, "multiple of 8 for a FluxPipeline, got 36"),
                                   ("stable_diffusion", {"hold_norm": 1}, "--hold-norm is for models of flow matching"),
                                   ("stable_diffusion_3", {"resolution": 136}, "--resolution must be at most 128"),
                                   ("stable_diffusion_xl", {"text_tokens": 77}, "--text-tokens is for T5"),
                                   ("flux", {"lora_targets": "nowhere"}, "--lora-targets nowhere: ")):
        with pytest.raises(script.Trouble, match=message) as caught:
            start(name, **changes)
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


@pytest.mark.slow  # another pipeline is built
def test_autoencoder_with_a_mean_and_a_deviation_for_each_channel(pipeline_shelf, tmp_path):
    """As some for SDXL have: painted as the class paints, and what is encoded is decoded again."""
    shutil.copytree(pipeline_shelf("stable_diffusion_xl"), tmp_path / "copy")
    config = tmp_path / "copy/vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"latents_mean": [-1.6, 0.3, 2.2, 1.6],
                                                                   "latents_std": [8.4, 5.9, 4.4, 5.1]}))
    family = load_family(str(tmp_path / "copy"), "main", torch.float32)
    painter = Painter(family, Painting(SIDE, 2, 3.0), Lora(4, family.lora_targets, 0), torch.device("cpu"))
    noise = painter.noise(2, torch.Generator().manual_seed(3))
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "copy")
    theirs = own_call(pipeline, PROMPTS[:2], noise, 3.0, steps=2)
    assert torch.allclose(painter.paint(PROMPTS[:2], noise).images, theirs, atol=1e-5)
    images = torch.rand(1, 3, SIDE, SIDE) * 2 - 1
    once = family.pipeline.vae.decode(family.pipeline.vae.encode(images).latent_dist.mode()).sample
    assert torch.allclose(family.decode(family.encode_images(images)), (once / 2 + 0.5).clamp(0, 1), atol=1e-5)


def test_model_of_edm_is_refused(pipeline_shelf, tmp_path):
    """Its noise is not that of DDIM, whatever its prediction_type says."""
    shutil.copytree(pipeline_shelf("stable_diffusion_xl"), tmp_path / "copy")
    index = tmp_path / "copy/model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", "EDMEulerScheduler"]}))
    (tmp_path / "copy/scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": "EDMEulerScheduler"}))
    with pytest.raises(script.Trouble, match="EDMEulerScheduler is for models that were trained by EDM"):
        load_family(str(tmp_path / "copy"), "main", torch.float32)


def test_scheduler_of_another_kind_is_refused(pipeline_shelf, tmp_path):
    """A transformer that predicts velocity with a scheduler that expects noise: nothing sensible comes of it."""
    shutil.copytree(pipeline_shelf("flux"), tmp_path / "copy")
    index = tmp_path / "copy/model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", "DDIMScheduler"]}))
    (tmp_path / "copy/scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    with pytest.raises(script.Trouble, match="DDIMScheduler is none of flow matching") as caught:
        load_family(str(tmp_path / "copy"), "main", torch.float32)
    assert caught.value.exit_code == 6


def test_numbers_of_the_command_line_have_a_range():
    """Every option of --help that is a number is checked for its range."""
    parser = argparse.ArgumentParser()
    finetune.add_sources(parser)
    finetune.add_training(parser)
    numbers = {action.dest for action in parser._actions if action.type in (int, float)}
    assert numbers - set(finetune.RANGES) == {"gradient_steps", "temperature", "teacher_weights"}  # these are checked apart
