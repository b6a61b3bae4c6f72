"""`quantization: int8`: the encoders' linear layers multiply bytes, a quarter of float32's bits.

Weights get one scale per output channel, once. Activations get theirs from the values at hand, and never from a
neighbour's, so that a score does not depend on what else is in the batch: on the CPU one scale per image or caption, in
the packed kernel that torch ships for its own dynamic quantization (which takes one per batch); on CUDA, and where the
CPU lacks that kernel, one scale per token around `torch._int_mm`. Everything else (attention, norms, pooling, the last
projection, the cosine) stays as `dtype` has it.
"""
import warnings
from collections.abc import Callable

import torch

from addons.models import find_encoder, find_towers

LEVELS = 127  # int8 used symmetrically: -127 ... 127
SMALLEST = 1e-9  # keeps the scale of an all-zero row from being zero


def quantize_model(model: torch.nn.Module, device: str) -> str:
    """Replace the linear layers of both encoders, in place, and return the name of the scheme for the manifest.

    `model` is a CLIPModel or SiglipModel on the CPU, in the dtype of the run; it is moved to `device` afterwards.
    """
    packed = device == "cpu" and _has_packed_kernel()
    with warnings.catch_warnings():  # a later torch will go without that function; until then its kernel is the fastest
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions")
        for tower in find_towers(model, "quantization"):
            _replace_linear_layers(find_encoder(tower), PackedLinear if packed else TokenwiseLinear)
    return "int8 by item" if packed else "int8 by token"


def _has_packed_kernel() -> bool:
    """Whether torch has an int8 kernel for this CPU."""
    return torch.backends.quantized.engine in ("x86", "fbgemm", "onednn") and hasattr(torch, "quantize_per_channel")


def _replace_linear_layers(module: torch.nn.Module, make: Callable[[torch.nn.Linear], torch.nn.Module]) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, torch.nn.Linear):
            setattr(module, name, make(child))
        else:
            _replace_linear_layers(child, make)


def channel_scales(weight: torch.Tensor) -> torch.Tensor:
    """The scale of each output channel of a weight (out, in): float32 (out,), its largest |value| on the last level."""
    return (weight.float().abs().amax(dim=1) / LEVELS).clamp(min=SMALLEST)


class PackedLinear(torch.nn.Module):
    """A linear layer in the CPU's packed int8 kernel: (n, tokens, in) -> (n, tokens, out), a scale for each of the n."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        scales = channel_scales(linear.weight)
        zero_points = torch.zeros(len(scales), dtype=torch.long)
        int8 = torch.quantize_per_channel(linear.weight.float(), scales.double(), zero_points, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(int8, None if linear.bias is None else linear.bias.float())
        self.out_features = len(scales)
        # without VNNI the kernel adds two products in 16 bits, which full 8-bit activations overflow
        self.reduce_range = not torch.cpu._is_vnni_supported()

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The layer's output in the dtype of `values`."""
        out = values.new_empty(*values.shape[:-1], self.out_features)
        for item, into in zip(values, out, strict=True):
            into.copy_(torch.ops.quantized.linear_dynamic(item.float(), self.packed, self.reduce_range))
        return out


class TokenwiseLinear(torch.nn.Module):
    """A linear layer as an int8 matrix product with a scale per token: any (..., in) -> (..., out)."""

    FEWEST_ROWS = 17  # CUDA's kernel refuses fewer
    weight: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        scales = channel_scales(linear.weight)
        int8 = (linear.weight.float() / scales[:, None]).round().to(torch.int8)
        self.register_buffer("weight", int8.t())  # (in, out), the layout that CUDA's kernel asks for
        self.register_buffer("scales", scales)
        self.register_buffer("bias", torch.zeros_like(scales) if linear.bias is None else linear.bias.float())

    def _apply(self, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "TokenwiseLinear":
        """Move to a device, but keep scales and bias in float32 when the model around is cast to half precision."""
        kept = {name: self.get_buffer(name) for name in ("weight", "scales", "bias")}
        super()._apply(change, recurse)
        device = self.weight.device
        for name, buffer in kept.items():
            setattr(self, name, buffer.to(device))
        return self

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The layer's output in the dtype of `values`."""
        rows = values.reshape(-1, values.shape[-1])  # (tokens, in)
        count = len(rows)
        if count < self.FEWEST_ROWS:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, self.FEWEST_ROWS - count))
        tops = rows.abs().amax(dim=1, keepdim=True).float().clamp(min=SMALLEST)  # (tokens, 1)
        int8 = (rows * (LEVELS / tops)).round().to(torch.int8)
        out = torch._int_mm(int8, self.weight) * (tops / LEVELS)
        out = torch.addcmul(self.bias, out, self.scales)[:count].to(values.dtype)
        return out.reshape(*values.shape[:-1], -1)
