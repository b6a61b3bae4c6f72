"""`compile: true`: both encoders through torch.compile, which pays on a GPU and in long runs (it takes a minute or two).

Compiled code is made for one shape each, so shapes are kept few: the last batch is padded to the full size, captions to one
of three lengths.
"""
import torch

from addons.models import find_towers

TEXT_LENGTHS = (16, 32)  # and the model's own; most captions are short


def compile_encoders(model: torch.nn.Module) -> None:
    """Have both encoders of a CLIPModel or SiglipModel compiled, in place, on their first call with each shape."""
    for tower in find_towers(model, "compile"):
        tower.compile(dynamic=False)


def few_lengths(length: int, most: int) -> int:
    """The length that a caption of `length` tokens is padded to, for a model that reads `most`."""
    for step in TEXT_LENGTHS:
        if length <= step < most:
            return step
    return most


def pad_batch(batch: torch.Tensor, size: int) -> torch.Tensor:
    """A tensor (n, ...) with its last row repeated until it has `size` rows."""
    missing = size - len(batch)
    if missing <= 0:
        return batch
    return torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])])
