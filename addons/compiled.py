"""`compile: true`: both encoders through torch.compile, which pays on a GPU and in long runs (it takes a minute or two).

Compiled code is made for one shape each, so shapes are kept few: the last batch is padded to the full size, captions to one
of three lengths.
"""
from typing import Any

import torch

TEXT_LENGTHS = (16, 32)  # and the model's own; most captions are short


def compile_encoders(model: Any) -> None:
    """Have both encoders of a CLIPModel or SiglipModel compiled, in place, on their first call with each shape."""
    for tower in (model.vision_model, model.text_model):
        tower.compile(dynamic=False)


def few_lengths(length: int, most: int) -> int:
    """The length that a caption of `length` tokens is padded to, for a model that reads `most`."""
    return next((step for step in TEXT_LENGTHS if length <= step < most), most)


def pad_batch(batch: Any, size: int) -> Any:
    """A tensor (n, ...) with its last row repeated until it has `size` rows."""
    return torch.cat([batch, batch[-1:].expand(size - len(batch), *batch.shape[1:])]) if len(batch) < size else batch
