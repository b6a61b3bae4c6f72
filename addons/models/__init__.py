"""Model families besides CLIP and SigLIP, and shortcuts for all of them.

A family is what the script must know of one kind of model: how to load it, which tokens a caption becomes and how far they
are padded, how its two encoders are called, and whether a cosine tells a probability. It is a subclass of the script's
`Family`, or of `Clip` or `Siglip` where only some of that differs. A run chooses it by `model_type` in the model's
config.json: `clip` and `siglip` are the script's own, any other is looked for in the file of that name in this folder. What a
family reads, beyond the methods that it overrides: `image_settings` (how images are resized), `stack` and `features_of_bytes`
(where images have no common size), `describe` (what the manifest and profile.json say of it).

To add one, drop one file into this folder, named after its model_type with `-` written as `_`:

    from image_text_sim_clip import Clip

    class ToyFamily(Clip):
        \"\"\"A CLIP whose captions are read backwards.\"\"\"

        kind = "toy"

        def prepare(self, caption):
            return caption[::-1]

    FAMILY = ToyFamily

The families here:

    chinese_clip.py  altclip.py  align.py    BERT's or XLM-R's text tower, masked (masked_text.py)
    metaclip_2.py                            CLIP's causal text tower with XLM-R's pieces (xlm_pieces.py)
    aimv2.py                                 CLIP's captions, AIMv2's towers
    vision_text_dual_encoder.py              two towers of any kind, joined by projections
    siglip2.py                               SigLIP 2 NaFlex, whose images keep their shapes
    open_clip.py                             open_clip's format, which has no config.json of transformers'. Its parts:
                                             open_clip_files.py finds the model, open_clip_config.py reads every word of
                                             its config, open_clip_towers.py builds it out of transformers' blocks,
                                             open_clip_text.py and open_clip_images.py prepare captions and images

What only some model folders need, and the script asks for:

    folders.py      what is wrong with a folder, told with its cure before it is loaded
    faults.py       what could not be loaded, or does not belong together, in one line
    adapters.py     adapters of peft, merged into their base model
    words.py        words that were added to a tokenizer stay whole
    long_captions.py   captions of any length take the time of those that are read
    several.py      several models in one pass: one loader, an image for each model

The shortcuts, each imported only where its config key asks for it; the first two need a model with CLIP's two towers:

    quantize.py     `quantization: int8`: the encoders' linear layers multiply bytes
    compiled.py     `compile: true`: both encoders through torch.compile
    openvino_runtime.py   `runtime: openvino`: both encoders under OpenVINO, for a CPU;
    openvino_convert.py   how they are converted, calibrated for int8, and kept in a cache
    batch_size.py   `batch_size: auto` on a GPU: the smallest batch that is nearly as fast as the fastest
"""
from typing import TYPE_CHECKING

from image_text_sim_clip import EXIT_MODEL, Trouble

if TYPE_CHECKING:
    import torch


def find_towers(model: "torch.nn.Module", key: str) -> "tuple[torch.nn.Module, torch.nn.Module]":
    """The image and the text tower of a CLIPModel or SiglipModel; Trouble (exit 6) naming the `key` that needs them."""
    image_tower = getattr(model, "vision_model", None)
    text_tower = getattr(model, "text_model", None)
    if image_tower is None or text_tower is None:
        raise Trouble(EXIT_MODEL, f"{key} needs a vision_model and a text_model, which {type(model).__name__} lacks")
    return image_tower, text_tower


def find_encoder(tower: "torch.nn.Module") -> "torch.nn.Module":
    """The part of a tower that holds its layers, without embeddings and pooling; Trouble (exit 6) where there is none."""
    for name, module in tower.named_modules():
        if name.rpartition(".")[2] == "encoder":
            return module
    raise Trouble(EXIT_MODEL, f"quantization needs a tower with an encoder, which {type(tower).__name__} lacks")
