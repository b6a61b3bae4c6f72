"""Fine-tune a text-to-image pipeline with dissimilarity as the error.

    python examples/finetune_text_to_image.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts prompts.csv \\
        --teacher config.yaml --judge judge.yaml --output tuned

    prompts -> pipeline (the last K denoising steps with gradient) -> images -> DissimilarityLoss of the teachers
                  ^                                                                     |
                  +------------------- only LoRA weights learn ------------------------+

The pipeline may be any that `examples/pipelines/` has a file for. The gradient of 1 - cosine(image, prompt) runs through the
models that score, the decoder and the last K denoising steps (DRaFT-K: Clark et al. 2024; AlignProp: Prabhudesai et al. 2023).
A pipeline can learn to please its teachers with pixels that mean nothing to anybody else. So another scorer, the judge, is
asked about held-out prompts and never trains: where the teacher's number falls and the judge's does not, the pipeline is
cheating. Several teachers, `--stay-near`, `--hold-norm`, `--crop` and `--noise` make that harder; `--patience` stops in time.

With --images PATH in place of --prompts it trains on curated pairs, an `imagefolder` or a `webdataset`, by the usual loss of
the family's models, in which better pairs count more.

In --output: `report.html` (what it learnt), `log.jsonl` (scores and losses), `before.png` and `after.png` (same prompts, same
noise), `held_out.csv` (the scores of every such image), `pytorch_lora_weights.safetensors` for the pipeline's
`load_lora_weights`, `best/` with those that the judge liked best, and `state.pt`, from which the same command goes on. The
last line on stdout is one JSON object.
"""
import argparse
import contextlib
import csv
import datetime
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
from image_text_sim_clip import (  # noqa: E402 - the script lies in the folder named just above
    EXIT_CONFIG,
    EXIT_DISK,
    EXIT_MODEL,
    Json,
    Trouble,
    atomic_file,
    output_disk,
    say,
)

try:
    import accelerate
    import diffusers  # noqa: F401 - named in the message below where it is missing
    import peft  # noqa: F401
    import torch

    from examples.memory import measure_step, memory_of, tell_memory
    from examples.painter import ImitationDraws, Lora, Painter, Painting, Variation, vary  # noqa: F401 - `vary` is used from here
    from examples.pipelines import Framing, identify_weights, load_family
    from examples.report import write_report
    from examples.teachers import Teachers, load_judge, pair_teachers
    from examples.training_data import (
        CuratedSet,
        Pair,
        Weighting,
        check_temperature,
        default_preference,
        read_image,
        read_prompts,
        split_prompts,
    )
    from examples.watching import Diverged, Journal, Patience, Watch, check_finite, make_grid, mean
except ImportError as missing:
    say(f"error: this example needs the package {missing.name} (pip install -r requirements.txt -r examples/requirements.txt)")
    sys.exit(EXIT_CONFIG)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# what may differ between a run and its resumption; of `batch` and `accumulate` only how many images they make together counts
HARMLESS_OPTIONS = {"steps", "output", "evaluate_every", "save_every", "fresh", "gradient_checkpointing", "batch", "accumulate",
                    "patience", "margin"}
READING_THREADS = 8


class Average:
    """The running average of the LoRA weights, which paints better than the last ones; decay 0: the weights themselves.

    Its decay grows with the steps, 0 at first, then min(decay, (1 + step) / (10 + step)), as in diffusers' EMAModel.
    """

    def __init__(self, weights: dict[str, torch.nn.Parameter], decay: float) -> None:
        self.weights = weights
        self.decay = decay
        self.shadow = {name: weight.detach().clone() for name, weight in weights.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the step of this number, from 0 on."""
        decay = min(self.decay, (1 + step) / (10 + step)) if step else 0.0
        for name, mean_weight in self.shadow.items():
            mean_weight.lerp_(self.weights[name], 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The pipeline with the average, while it lasts."""
        last = {name: self.weights[name].detach().clone() for name in self.shadow}
        self._set(self.shadow)
        try:
            yield
        finally:
            self._set(last)

    @torch.no_grad()
    def _set(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self.weights[name].copy_(value)


# ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────────

class Trainer:
    """Everything that one run needs, put together from the options; `run` trains and returns the summary."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out: pathlib.Path = options.output
        self._load_data()
        waiting = accelerate.InitProcessGroupKwargs(timeout=datetime.timedelta(hours=12))  # others wait while one looks
        self.accelerator = accelerate.Accelerator(mixed_precision=options.mixed_precision, cpu=options.cpu,
                                                  kwargs_handlers=[waiting])
        if "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:  # asked for, but not started
            say("warning: accelerate was asked for several processes and has started one: without MPI, "
                "`accelerate launch --cpu` can do no more; use --multi_gpu in its place, and --cpu after this program's name")
        device = self.accelerator.device
        self.teachers = Teachers(pair_teachers(options.teacher, options.teacher_weights, options.objective), device)
        self.judge = load_judge(options.judge, self.teachers, device) if options.judge else None
        family = load_family(options.model, options.revision, DTYPES[options.mixed_precision])
        if options.hold_norm and not family.predicts_velocity:
            raise Trouble(EXIT_CONFIG, f"--hold-norm is for models of flow matching, and {options.model} is a "
                                       f"{family.pipeline_class}: use --stay-near")
        if options.text_tokens:
            if not family.text_tokens:
                raise Trouble(EXIT_CONFIG, f"--text-tokens is for T5, which a {family.pipeline_class} has not")
            family.text_tokens = options.text_tokens
        side = options.resolution or family.usual_side
        if side % family.side_multiple:
            raise Trouble(EXIT_CONFIG, f"--resolution must be a multiple of {family.side_multiple} for a "
                                       f"{family.pipeline_class}, got {side}")
        if side > family.largest_side:
            raise Trouble(EXIT_CONFIG, f"--resolution must be at most {family.largest_side} for {options.model}, got {side}")
        guidance = family.usual_guidance if options.guidance is None else options.guidance
        self.pipeline_identity = identify_weights(family.pipeline)  # before LoRA weights are among them
        lora = Lora(options.lora_rank, tuple(options.lora_targets or family.lora_targets), options.seed)
        self.painter = Painter(family, Painting(side, options.denoising_steps, guidance), lora, device,
                               options.gradient_checkpointing)
        self.optimiser = self.accelerator.prepare(torch.optim.AdamW(
            self.painter.lora().values(), lr=options.learning_rate, weight_decay=options.weight_decay))
        self.average = Average(self.painter.lora(), options.ema)
        self.patience = Patience(options.patience, options.margin)
        self.watch = Watch(self.painter, self.teachers, self.judge, self.held_out, options.images_per_prompt, options.batch,
                           options.seed)

    def _load_data(self) -> None:
        """`prompts`, or `curated`; and `held_out`."""
        options = self.options
        held_out = read_prompts(options.held_out, options.column) if options.held_out else []
        self.curated: CuratedSet | None = None
        self.prompts: list[str] = []
        if options.images:
            preference = options.prefer or default_preference(options.weight_by)
            weighting = Weighting(options.weight_by, preference, options.temperature)
            self.curated = CuratedSet(options.images, weighting, held_out, options.seed)
            self.held_out = self.curated.held_out
            if self.curated.left_out:
                say(f"{self.curated.left_out} pairs are left out: their {options.weight_by} is empty")
        else:
            self.prompts, self.held_out = split_prompts(read_prompts(options.prompts, options.column), held_out)
        self._stream: Iterator[Pair] = iter(())
        self._stream_at = -1  # the step whose pairs the stream gives next

    @property
    def images_per_step(self) -> int:
        """By all processes together."""
        return int(self.options.batch * self.options.accumulate * self.accelerator.num_processes)

    def run(self) -> Json:
        """Train up to `--steps`, from the saved state if there is one; returns the summary."""
        begun = self.load()
        main = self.accelerator.is_main_process
        journal = Journal(self.out / "log.jsonl", begun) if main else None
        if main and begun < self.options.steps:
            self.tell_memory()
        reason = None
        for step in range(begun, self.options.steps + 1):
            looking = step % self.options.evaluate_every == 0 or step == self.options.steps
            if journal and looking:
                self.evaluate(journal, step)
            if looking:
                reason = self._agree(journal)
            last = reason is not None or step == self.options.steps
            if main and (last or (step > begun and step % self.options.save_every == 0)):
                self.save(step)
            if last:
                break
            row = self.advance(step)
            if journal:
                journal.write({"step": step + 1, **row})
        self.accelerator.wait_for_everyone()
        return self.summarise(journal, reason) if journal else {}

    def tell_memory(self) -> None:
        """What learns, and the memory of a step by resolution."""
        options = self.options
        lora = self.painter.lora()
        denoiser = self.painter.family.denoiser
        world = self.accelerator.num_processes
        say(f"{sum(weight.numel() for weight in lora.values()):,} LoRA weights in float32 learn, in a "
            f"{type(denoiser).__name__} in {str(denoiser.dtype).removeprefix('torch.')}; {self.images_per_step} images of "
            f"{self.painter.painting.side} px a step, by {'one process' if world == 1 else f'{world} processes'}")
        others = [self.judge.family.model] if self.judge else []
        memory = measure_step(self.painter, self.teachers, others, options.batch, options.gradient_steps,
                              options.gradient_checkpointing, bool(options.ema))
        tell_memory(memory, self.painter.painting.side, memory_of(self.painter.device), say)

    def _agree(self, journal: Journal | None) -> str | None:
        """Why to stop now, or None; the first process knows, and tells all."""
        told = [self.patience.reason_to_stop(journal.looks(), self.watch.names[-1]) if journal else None]
        accelerate.utils.broadcast_object_list(told)
        return told[0]

    def advance(self, step: int) -> dict[str, float]:
        """One step of the optimiser. Its data and noise depend on seed and step alone, however many processes share them.

        Where there is no room for it, the state before it is saved and Trouble raised; Diverged where it is not finite.
        """
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + step)
        self.optimiser.zero_grad()
        try:
            parts = self._imitate(step, generator) if self.curated else self._please_teachers(generator)
            sums: dict[str, float] = {}
            for values in parts:
                check_finite(values["loss"], f"the loss at step {step}")
                self.accelerator.backward(values["loss"] / self.options.accumulate)
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + value.item() / self.options.accumulate
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._save_before_trouble(step)
            raise Trouble(EXIT_MODEL, self._no_room(step)) from None
        except Diverged:  # the weights before are what led here
            raise
        except Trouble:
            self._save_before_trouble(step)
            raise
        self._learn(step)
        return {name: round(value, 6) for name, value in sums.items()}

    def _learn(self, step: int) -> None:
        """Average the gradients over the processes, and step."""
        weights = list(self.painter.lora().values())
        for weight in weights:  # so few that averaging them by hand is cheaper than wrapping the denoiser
            if weight.grad is not None:  # of a layer that this pipeline does not use
                weight.grad = self.accelerator.reduce(weight.grad, "mean")
        norm = self.accelerator.clip_grad_norm_(weights, 1.0)
        if norm is not None and not self.accelerator.scaler:  # which skips such a step
            check_finite(norm, f"the gradient at step {step}")
        self.optimiser.step()
        self.average.update(step)

    def _parts(self) -> list[slice]:
        """Which of a step's images this process takes, one slice for each time that it adds to the gradient."""
        batch = self.options.batch
        world = self.accelerator.num_processes
        starts = [(turn * world + self.accelerator.process_index) * batch for turn in range(self.options.accumulate)]
        return [slice(start, start + batch) for start in starts]

    def _please_teachers(self, generator: torch.Generator) -> Iterator[dict[str, torch.Tensor]]:
        """Paint a batch of prompts; the loss is the teachers' error, plus what staying near the base model adds."""
        options = self.options
        chosen = torch.randint(len(self.prompts), (self.images_per_step,), generator=generator)
        noise = self.painter.noise(self.images_per_step, generator)
        side = self.painter.painting.side
        variation = Variation.draw(self.images_per_step, (side, side), generator)
        for part in self._parts():
            prompts = [self.prompts[i] for i in chosen[part]]
            with self.accelerator.autocast():
                painted = self.painter.paint(prompts, noise[part], options.gradient_steps,
                                             bool(options.stay_near or options.hold_norm))
                check_finite(painted.images, "an image that was painted")
                views = variation.part(part).apply(painted.images, options.crop, options.noise)
                error, own_losses = self.teachers(views, prompts)
            loss = error + options.stay_near * painted.strayed + options.hold_norm * painted.norm_strayed
            values = {"loss": loss, "dissimilarity": error, "strayed": painted.strayed}
            if options.hold_norm:
                values["norm_strayed"] = painted.norm_strayed
            if len(own_losses) > 1:
                values |= {f"loss_{number}": value for number, value in enumerate(own_losses, 1)}
            yield values

    def _imitate(self, step: int, generator: torch.Generator) -> Iterator[dict[str, torch.Tensor]]:
        """Learn a batch of curated images, each counted by its weight."""
        assert self.curated
        side = self.painter.painting.side
        pairs = self._next_pairs(step)
        draws = ImitationDraws.draw(self.painter.family, len(pairs), side, self.options.drop_captions, generator)
        config = self.teachers.scorers[0].config
        for part in self._parts():
            with ThreadPoolExecutor(READING_THREADS) as pool:
                images = list(pool.map(lambda pair: read_image(pair, side, config), pairs[part]))
            framing = Framing(torch.tensor([image.original_size for image in images]),
                              torch.tensor([image.crop_corner for image in images]))
            with self.accelerator.autocast():
                errors = self.painter.imitation_errors(torch.stack([image.pixels for image in images]).to(self.painter.device),
                                                       [pair.caption for pair in pairs[part]], draws.part(part), framing)
            weights = torch.tensor([self.curated.weight(pair) for pair in pairs[part]]).to(errors)
            yield {"loss": (weights * errors).mean(), "unweighted": errors.mean()}

    def _next_pairs(self, step: int) -> list[Pair]:
        """The pairs of this step; the stream is begun anew where it is not there already."""
        assert self.curated
        if step != self._stream_at:
            self._stream = self.curated.stream(step * self.images_per_step)
        self._stream_at = step + 1
        return [next(self._stream) for _ in range(self.images_per_step)]

    def evaluate(self, journal: Journal, step: int) -> None:
        """Log the scores of the held-out prompts; keep the first and the latest images, and the weights of the best look."""
        if any(row["step"] == step for row in journal.looks()):
            return  # of an earlier start
        try:
            with self.average.in_place():
                look = self.watch.look()
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._save_before_trouble(step)
            raise Trouble(EXIT_MODEL, self._no_room(step)) from None
        journal.write({"step": step, **look.for_log()})
        told = ", ".join(f"{name} {mean(values):.4f}" for name, values in look.scores.items())
        say(f"step {step}: held-out dissimilarity {told}")
        name = "before" if step == 0 else "after"
        looks = journal.looks()
        with output_disk(self.out):
            make_grid(look.images).save(self.out / f"{name}.png")
            if looks[self.patience.best(looks, self.watch.names[-1])]["step"] == step:
                self._save_weights(self.out / "best")

    def _no_room(self, step: int) -> str:
        where = "the GPU" if self.painter.device.type == "cuda" else "memory"
        painting = self.painter.painting
        return (f"no room in {where} at step {step} for {self.options.batch} images of {painting.side} px through "
                f"{self.options.gradient_steps} steps; the state is saved: try a smaller --batch (with --accumulate), "
                "--gradient-checkpointing, --mixed-precision bf16 or a smaller --resolution")

    # ── What is kept ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _save_weights(self, folder: pathlib.Path) -> None:
        """The average's LoRA weights, for diffusers."""
        folder.mkdir(parents=True, exist_ok=True)
        with self.average.in_place():
            self.painter.family.save_lora(folder)

    def _save_before_trouble(self, step: int) -> None:
        """The weights as the last whole step left them; a disk that is full as well is not the trouble to tell."""
        if self.accelerator.is_main_process:
            with contextlib.suppress(Trouble):
                self.save(step)

    def save(self, step: int) -> None:
        """Write the LoRA weights for diffusers, then `state.pt`, whose presence means that the step is complete."""
        scaler = self.accelerator.scaler
        with output_disk(self.out):
            self._save_weights(self.out)
            with atomic_file(self.out / "state.pt") as file:
                torch.save({"step": step, "lora": {name: p.data for name, p in self.painter.lora().items()},
                            "average": self.average.shadow, "optimiser": self.optimiser.state_dict(),
                            "scaler": scaler.state_dict() if scaler else {}}, file)

    def settings(self) -> dict[str, str]:
        """What decides the weights, as text: a resumption must have the same."""
        options = {name: " ".join(map(str, value)) if isinstance(value, list) else str(value)
                   for name, value in vars(self.options).items() if name not in HARMLESS_OPTIONS}
        sources = {"images_per_step": str(self.images_per_step), "resolution": str(self.painter.painting.side),
                   "guidance": str(self.painter.painting.guidance), "held_out_prompts": digest_of(self.held_out),
                   "pipeline_weights": self.pipeline_identity,
                   "teacher_weights_files": " ".join(scorer.files.identity for scorer in self.teachers.scorers),
                   "judge_weights_files": self.judge.files.identity if self.judge else "",
                   "training_data": self.curated.digest() if self.curated else digest_of(self.prompts)}
        if "sigmoid" in (self.options.objective or []):  # its loss compares the images of a batch
            sources["batch"] = str(self.options.batch)
        return options | sources

    def load(self) -> int:
        """Take up the state of an earlier start with the same settings and return its step; 0 where there is none."""
        settings = self.settings()
        known = self.out / "options.json"
        state_path = self.out / "state.pt"
        if state_path.exists() and not self.options.fresh:
            earlier = read_settings(known)
            for name, value in settings.items():
                if earlier.get(name) != value:
                    raise Trouble(EXIT_CONFIG, f"{self.out} was begun with another {name} ({earlier.get(name)}, now {value}): "
                                               "discard it with --fresh, or write elsewhere with --output")
            return self._take_up(state_path)
        self.accelerator.wait_for_everyone()  # all have looked before anything is removed
        if self.accelerator.is_main_process:
            with output_disk(self.out):
                self.out.mkdir(parents=True, exist_ok=True)
                for name in ("state.pt", "log.jsonl"):
                    (self.out / name).unlink(missing_ok=True)
                with atomic_file(known) as file:
                    file.write((json.dumps(settings, indent=2) + "\n").encode())
        return 0

    def _take_up(self, state_path: pathlib.Path) -> int:
        """Load `state.pt`; returns its step."""
        try:
            state = torch.load(state_path, map_location=self.accelerator.device, weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            raise Trouble(EXIT_DISK, f"cannot read {state_path}: {type(error).__name__}; discard it with --fresh") from None
        if state["step"] > self.options.steps:
            raise Trouble(EXIT_CONFIG, f"{self.out} holds {state['step']} steps already, more than --steps "
                                       f"{self.options.steps}: discard them with --fresh, or write elsewhere with --output")
        for name, weight in self.painter.lora().items():
            weight.data.copy_(state["lora"][name])
        for name, value in self.average.shadow.items():
            value.copy_(state["average"][name])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return int(state["step"])

    def summarise(self, journal: Journal, reason: str | None) -> Json:
        """Write held_out.csv and return the means before and after."""
        looks = journal.looks()
        names = [name for name in looks[0] if name not in ("step", "diversity")]
        with output_disk(self.out), open(self.out / "held_out.csv", "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["prompt", *(f"{name}_{when}" for name, when in itertools.product(names, ("before", "after")))])
            for i, prompt in enumerate(self.watch.prompts):
                cells = [row[name][i] for name, row in itertools.product(names, (looks[0], looks[-1]))]
                table.writerow([prompt, *cells])
        scores = {name: {"before": round(mean(looks[0][name]), 4), "after": round(mean(looks[-1][name]), 4)} for name in names}
        best = looks[self.patience.best(looks, self.watch.names[-1])]
        write_report(self.out, self.watch.prompts, looks, self.settings(), reason)
        if reason:
            say(f"stopped: {reason}")
        return {"steps": looks[-1]["step"], "prompts": self.curated.count if self.curated else len(self.prompts),
                "held_out": len(self.held_out), **scores, "best_step": best["step"], "stopped": reason, "output": str(self.out)}


def read_settings(path: pathlib.Path) -> dict[str, str]:
    """The settings that a run wrote down; raises Trouble (exit 5) where they are gone."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): str(value) for name, value in settings.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise Trouble(EXIT_DISK, f"cannot read {path}: {type(error).__name__}; discard the run with --fresh") from None


def digest_of(texts: Sequence[str]) -> str:
    """A name for a list of texts, which changes with it."""
    import hashlib
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's or this machine's memory was exhausted (on the CPU torch says so by a plain RuntimeError)."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


# ── Command line ──────────────────────────────────────────────────────────────────────────────────────────────────────

RANGES = {"steps": (1, 10**9), "batch": (1, 10**6), "accumulate": (1, 10**6), "images_per_prompt": (1, 10**6),
          "denoising_steps": (1, 1000), "resolution": (8, 2**16), "text_tokens": (1, 512), "lora_rank": (1, 4096),
          "guidance": (0, 100), "learning_rate": (0, 1e3), "weight_decay": (0, 1e3), "stay_near": (0, 1e9),
          "hold_norm": (0, 1e9), "crop": (0.1, 1), "noise": (0, 1), "drop_captions": (0, 1), "ema": (0, 0.999999),
          "patience": (0, 10**9), "margin": (0, 2), "evaluate_every": (1, 10**9), "save_every": (1, 10**9),
          "seed": (0, 2**40)}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; what is out of range is Trouble (exit 2)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_sources(parser)
    add_training(parser)
    options = parser.parse_args(arguments)
    if bool(options.prompts) == bool(options.images):
        raise Trouble(EXIT_CONFIG, "give either --prompts or --images")
    for name, (low, high) in (RANGES | {"gradient_steps": (1, options.denoising_steps)}).items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise Trouble(EXIT_CONFIG, f"--{name.replace('_', '-')} must lie in [{low}, {high}], got {value}")
    check_temperature(options.temperature)
    if options.patience and not options.judge:
        raise Trouble(EXIT_CONFIG, "--patience stops when the judge finds no more to praise: give a --judge")
    if options.images and (options.stay_near or options.hold_norm):
        raise Trouble(EXIT_CONFIG, "--stay-near and --hold-norm go with --prompts: curated images hold the model themselves")
    pair_teachers(options.teacher, options.teacher_weights, options.objective)
    return options


def add_sources(parser: argparse.ArgumentParser) -> None:
    """What is trained, on what, and who scores."""
    add = parser.add_argument
    path = pathlib.Path
    add("--model", required=True, help="a text-to-image pipeline: a folder, or a Hub id")
    add("--revision", default="main", help="of the Hub's model")
    add("--prompts", type=path, help="a CSV of prompts to train with")
    add("--images", type=path, help="or: a curated imagefolder or webdataset to train on")
    add("--weight-by", default="dissimilarity", help="with --images: the column that weights pairs")
    add("--prefer", choices=("low", "high"), help="whether its low or high cells count more; low for a dissimilarity")
    add("--temperature", type=float, default=0.1, help="weights are exp(-+ cell / this), 1 on average; inf: all alike")
    add("--drop-captions", type=float, default=0.1, help="share of captions that are not heard, for guidance")
    add("--column", default="caption", help="of the prompts' CSV")
    add("--held-out", type=path, help="a CSV of prompts that are only watched; without it a tenth of the prompts")
    add("--images-per-prompt", type=int, default=1, help="painted of each held-out prompt")
    add("--teacher", type=path, nargs="+", required=True, help="a config.yaml, or several: the scorers that train")
    add("--teacher-weights", type=float, nargs="+", help="how much each teacher's loss counts; all alike without it")
    add("--objective", nargs="+", choices=("cosine", "sigmoid"), help="each teacher's loss; sigmoid is SigLIP's own")
    add("--judge", type=path, help="a config.yaml with another model: the scorer that only watches")
    add("--output", type=path, default=path("tuned"))
    add("--fresh", action="store_true", help="discard an earlier run in --output")


def add_training(parser: argparse.ArgumentParser) -> None:
    """How it is trained."""
    add = parser.add_argument
    add("--steps", type=int, default=200)
    add("--batch", type=int, default=4, help="images at a time, for each process")
    add("--accumulate", type=int, default=1, help="batches whose gradients make one step")
    add("--resolution", type=int, help="side in pixels; the pipeline's own without it")
    add("--text-tokens", type=int, help="T5's, with SD3 (256 without it) and FLUX (512); fewer take less time and memory")
    add("--learning-rate", type=float, default=1e-4)
    add("--weight-decay", type=float, default=1e-4)
    add("--denoising-steps", type=int, default=20)
    add("--gradient-steps", type=int, default=1, help="K: through how many of them the gradient runs")
    add("--guidance", type=float, help="1: none; without it the family's usual value")
    add("--stay-near", type=float, default=0.0, help="weight of the distance of predictions to the base model's")
    add("--hold-norm", type=float, default=0.0, help="weight of the change of the velocity's norm (flow matching)")
    add("--patience", type=int, default=0, help="stop after so many looks in which the judge found nothing better; 0: never")
    add("--margin", type=float, default=0.0, help="better means: by more than this")
    add("--ema", type=float, default=0.0, help="decay of the running average of weights, which is what is saved; 0: none")
    add("--crop", type=float, default=0.9, help="the teachers see random windows of this to all of an image's side")
    add("--noise", type=float, default=0.02, help="and grain of this strength")
    add("--lora-rank", type=int, default=8)
    add("--lora-targets", nargs="+", help="layers of the denoiser that get them; without it those of diffusers' scripts")
    add("--mixed-precision", choices=("no", "fp16", "bf16"), default="no")
    add("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    add("--cpu", action="store_true", help="also where there is a GPU")
    add("--evaluate-every", type=int, default=50)
    add("--save-every", type=int, default=50)
    add("--seed", type=int, default=0)


def main(arguments: list[str] | None = None) -> int:
    """Train as the arguments say; the summary is printed by the first process."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    summary = Trainer(parse_arguments(arguments)).run()
    if summary:
        print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Trouble as trouble:
        say(f"error: {trouble}")
        sys.exit(trouble.exit_code)
