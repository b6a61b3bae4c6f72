"""How much memory a step will take, told before the first: weights, what learns, and what is remembered for the gradient.

What is remembered is counted, not guessed: denoiser and decoder are made once more without any data (torch's fake tensors) and
asked once, and the tensors that autograd would keep are added up. It leaves out the memory of the layer at work, what the
allocator cannot use, and CUDA's own. So it is a guide, not a promise.
"""
import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator

import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from addons.images.memory import machine_memory
from examples.painter import Painter
from examples.pipelines import Condition, Family
from examples.teachers import Teachers


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes that one step takes."""

    weights: int  # of pipeline, teachers and judge
    learning: int  # LoRA weights: themselves, their gradients, Adam's two moments, their average
    remembered: dict[int, int]  # for the gradient of a batch, by the side of its images in pixels

    def needed(self, side: int) -> int:
        """All together for images of this side."""
        return self.weights + self.learning + self.remembered[side]


class KeptTensors:
    """Counts the bytes that autograd keeps while it is entered; weights count nothing."""

    def __init__(self, *modules: torch.nn.Module) -> None:
        self._known = {storage_key(value) for value in values_of(modules)}
        self._held: list[torch.Tensor] = []  # or a storage's place would be given to another
        self.bytes = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        key = storage_key(tensor)
        if key not in self._known:
            self._known.add(key)
            self._held.append(tensor)
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor

    def __enter__(self) -> "KeptTensors":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


def storage_key(tensor: torch.Tensor) -> int:
    """What tensors that share their bytes have in common, also where there are no addresses."""
    return int(tensor.untyped_storage()._cdata)


def count_bytes(*modules: torch.nn.Module) -> int:
    """The bytes of the modules' weights and buffers, each counted once."""
    found = {storage_key(value): value.untyped_storage().nbytes() for value in values_of(modules)}
    return sum(found.values())


def values_of(modules: Iterable[torch.nn.Module]) -> Iterator[torch.Tensor]:
    """The weights and buffers of all the modules."""
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()


def make_twin(painter: Painter, checkpointing: bool) -> Family:
    """The family with a denoiser and an autoencoder on the meta device, and fresh LoRA weights."""
    original = painter.family.pipeline
    twin = copy.copy(painter.family)
    twin.pipeline = copy.copy(original)
    with torch.device("meta"):
        denoiser = type(painter.family.denoiser).from_config(painter.family.denoiser.config)
        vae = type(original.vae).from_config(original.vae.config)
    denoiser.to(painter.family.denoiser.dtype).requires_grad_(False)
    denoiser.add_adapter(painter.family.denoiser.peft_config["default"])
    for weight in denoiser.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    name = "unet" if hasattr(original, "unet") else "transformer"
    # past DiffusionPipeline's own __setattr__, which would note them in the config that both share
    object.__setattr__(twin.pipeline, name, denoiser)
    object.__setattr__(twin.pipeline, "vae", vae.to(original.vae.dtype).requires_grad_(False))
    return twin


def pretend(module: torch.nn.Module, device: torch.device) -> None:
    """Exchange a module's weights and buffers for ones that claim to be on `device`; to be called in a fake mode.

    On the meta device itself attention would keep matrices that no real device keeps.
    """
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                fake = torch.empty(weight.shape, dtype=weight.dtype, device=device)
                part._parameters[name] = torch.nn.Parameter(fake, weight.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=device)


def count_remembered(painter: Painter, batch: int, side: int, gradient_steps: int, checkpointing: bool) -> int:
    """The bytes kept of painting `batch` images of this side: K calls of the denoiser, and the decoder's."""
    heard = painter.conditions(["a"])  # of one prompt, or of no prompt and one
    twin = make_twin(painter, checkpointing)
    # several processes have "cpu:0", which fake tensors take for another device than "cpu"
    device = torch.device("cpu") if painter.device.type == "cpu" else painter.device
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.enable_grad():
        pretend(twin.denoiser, device)
        pretend(twin.pipeline.vae, device)
        condition = Condition(**{name: fake.from_tensor(value).repeat_interleave(batch, dim=0)
                                 for name, value in heard.tensors().items()})
        latents = torch.randn(batch, *twin.latent_shape(side), device=device)
        time = torch.tensor(500.0, device=device)
        with KeptTensors(twin.denoiser) as of_denoiser:
            predicted = twin.predict(latents, time, condition, painter.painting.guidance)
        with KeptTensors(twin.pipeline.vae) as of_decoder:
            twin.decode(predicted)
    return of_denoiser.bytes * gradient_steps + of_decoder.bytes


def count_teachers(teachers: Teachers, side: int, batch: int, device: torch.device) -> int:
    """The bytes kept of the teachers' losses, from one real image."""
    image = torch.full((1, 3, side, side), 0.5, device=device, requires_grad=True)
    with torch.enable_grad(), KeptTensors(teachers) as kept:
        for loss in teachers.losses:
            loss.encode_images(image)
    return kept.bytes * batch


def measure_step(painter: Painter, teachers: Teachers, others: list[torch.nn.Module], batch: int, gradient_steps: int,
                 checkpointing: bool, has_average: bool) -> StepMemory:
    """What a step takes at the run's own side, at half and at twice that."""
    parts = [part for part in painter.family.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    learning = sum(weight.numel() * weight.element_size() for weight in painter.lora().values())
    side = painter.painting.side
    sides = [one for one in (side // 2, side, side * 2)
             if one == side or (one % painter.family.side_multiple == 0 and 0 < one <= painter.family.largest_side)]
    remembered = {one: count_remembered(painter, batch, one, gradient_steps, checkpointing)
                  + count_teachers(teachers, one, batch, painter.device) for one in sides}
    return StepMemory(count_bytes(*parts, teachers, *others), learning * (4 if has_average else 3), remembered)


def memory_of(device: torch.device) -> int:
    """The bytes that there are for a run: of the GPU, or of this machine."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    return min(machine_memory(), psutil.virtual_memory().available + psutil.Process().memory_info().rss)


def tell_memory(memory: StepMemory, side: int, room: int, say: Callable[[str], None]) -> None:
    """One line; and another where that will hardly fit."""
    by_side = ", ".join(f"{size(count)} at {one} px" for one, count in memory.remembered.items())
    say(f"memory of a step: weights {size(memory.weights)}, LoRA and optimiser {size(memory.learning)}, remembered for the "
        f"gradient {by_side}")
    if memory.needed(side) > room:
        say(f"warning: {side} px want {size(memory.needed(side))} and there are {size(room)}: it will hardly fit; try a "
            "smaller --batch (with --accumulate), --gradient-checkpointing, --mixed-precision bf16 or a smaller --resolution")


def size(count: int) -> str:
    """Bytes as one reads them."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
