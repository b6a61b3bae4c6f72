"""The bundled model, loaded once in the server that commands are forked from (see forked.py)."""
import copy
import pathlib

import torch

import image_text_sim_clip as script

torch.set_num_threads(1)  # more would be threads that a fork does not take along
PATH = str(pathlib.Path(script.__file__).parent / "challenge_set/shapes_clip")
LOADED = script.Scorer(script.Config(pretrained_model=PATH, use_cuda=False))
load_scorer = script.load_scorer


def reuse_scorer(config):
    """A scorer for this config: the bundled model's if the config asks for no other, else one that is loaded now."""
    plain = config.pretrained_model == PATH and config.dtype == "auto" and config.quantization == "none" and not config.compile
    if not plain:
        return load_scorer(config)
    scorer = copy.copy(LOADED)
    scorer.config = config
    return scorer
