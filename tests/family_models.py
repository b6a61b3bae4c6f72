"""Small models of further families, in the file layout that their published repositories have; see models.py for the rest."""
import json
import pathlib
import shutil
from collections.abc import Callable

import transformers
from models import (
    CORPUS,
    OPENAI_MEAN,
    OPENAI_STD,
    write_clip_tokenizer,
    write_json,
    write_siglip2_tokenizer,
    write_weights,
)

LETTERS = "abcdefghijklmnopqrstuvwxyzäöüß0123456789.,!?'-|<>[]()"
CHINESE = "一只狗在雪地里的照片红色自行车猫坐沙发上山和海"
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}


def write_bert_tokenizer(folder: pathlib.Path) -> int:
    """google-bert's WordPiece: [PAD] is 0, captions lie between [CLS] and [SEP]. Returns the number of tokens."""
    words = dict.fromkeys(word for sentence in CORPUS for word in sentence.split())
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS), *CHINESE]
    tokens += [word for word in words if word not in tokens]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    transformers.BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=512).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return len(tokens)


def write_xlm_tokenizer(folder: pathlib.Path) -> int:
    """XLM-R's pieces: <s> is 0, <pad> 1, </s> 2, <unk> 3; capitals are kept. Returns the number of tokens."""
    letters = LETTERS + LETTERS.upper() + CHINESE
    words = dict.fromkeys(word for sentence in CORPUS for word in sentence.split())
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -6.0) for letter in dict.fromkeys(letters)]
    pieces += [(f"▁{word}", -4.0) for word in words]
    tokenizer = transformers.XLMRobertaTokenizer(vocab=[*pieces, ("<mask>", 0.0)], model_max_length=512)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write_clip_preprocessor(folder: pathlib.Path, side: int, kind: str = "CLIPImageProcessor") -> None:
    """CLIP's resize of the shorter edge and centre crop."""
    write_json(folder / "preprocessor_config.json", {
        "crop_size": {"height": side, "width": side}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True,
        "do_rescale": True, "do_resize": True, "image_mean": OPENAI_MEAN, "image_processor_type": kind,
        "image_std": OPENAI_STD, "resample": 3, "rescale_factor": 1 / 255, "size": {"shortest_edge": side}})


def chinese_clip(folder: pathlib.Path) -> None:
    """OFA-Sys/chinese-clip-vit-base-patch16: a Chinese RoBERTa, images squeezed to a square."""
    tokens = write_bert_tokenizer(folder)
    write_json(folder / "config.json", {
        "architectures": ["ChineseCLIPModel"], "model_type": "chinese_clip", "projection_dim": 48,
        "text_config": TOWER | {"model_type": "chinese_clip_text_model", "vocab_size": tokens, "max_position_embeddings": 512},
        "vision_config": TOWER | {"model_type": "chinese_clip_vision_model", "image_size": 64, "patch_size": 16}})
    write_json(folder / "preprocessor_config.json", {
        "do_center_crop": False, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": OPENAI_MEAN, "image_processor_type": "ChineseCLIPImageProcessor", "image_std": OPENAI_STD, "resample": 3,
        "rescale_factor": 1 / 255, "size": {"height": 64, "width": 64}})
    write_weights(folder, 21, logit_scale=4.6052)


def altclip(folder: pathlib.Path) -> None:
    """BAAI/AltCLIP: XLM-R with CLIP's image tower, logit scale and image processor."""
    tokens = write_xlm_tokenizer(folder)
    text = TOWER | {"model_type": "altclip_text_model", "vocab_size": tokens, "max_position_embeddings": 514,
                    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "project_dim": 48, "type_vocab_size": 1}
    write_json(folder / "config.json", {
        "architectures": ["AltCLIPModel"], "model_type": "altclip", "projection_dim": 48, "text_config": text,
        "vision_config": TOWER | {"model_type": "altclip_vision_model", "image_size": 64, "patch_size": 16}})
    write_clip_preprocessor(folder, 64)
    write_weights(folder, 22, logit_scale=4.6052)


def metaclip_2(folder: pathlib.Path) -> None:
    """facebook/metaclip-2-worldwide-huge-quickgelu: CLIP's towers, a causal one for text, with XLM-V's pieces."""
    tokens = write_xlm_tokenizer(folder)
    text = TOWER | {"model_type": "metaclip_2_text_model", "vocab_size": tokens, "max_position_embeddings": 77,
                    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "hidden_act": "quick_gelu"}
    write_json(folder / "config.json", {
        "architectures": ["MetaClip2Model"], "model_type": "metaclip_2", "projection_dim": 48, "text_config": text,
        "vision_config": TOWER | {"model_type": "metaclip_2_vision_model", "image_size": 64, "patch_size": 16,
                                  "hidden_act": "quick_gelu"}})
    write_clip_preprocessor(folder, 64)
    write_weights(folder, 23, logit_scale=4.6052)


def align(folder: pathlib.Path) -> None:
    """kakaobrain/align-base: EfficientNet, BERT, a temperature instead of a logit scale, colours rescaled to [-1, 1]."""
    tokens = write_bert_tokenizer(folder)
    vision = {"model_type": "align_vision_model", "image_size": 64, "width_coefficient": 0.5, "depth_coefficient": 0.3,
              "hidden_dim": 160}
    write_json(folder / "config.json", {
        "architectures": ["AlignModel"], "model_type": "align", "projection_dim": 160, "temperature_init_value": 1.0,
        "text_config": TOWER | {"model_type": "align_text_model", "vocab_size": tokens, "max_position_embeddings": 512},
        "vision_config": vision})
    write_json(folder / "preprocessor_config.json", {
        "crop_size": {"height": 64, "width": 64}, "do_center_crop": True, "do_normalize": False, "do_rescale": True,
        "do_resize": True, "image_mean": [0.485, 0.456, 0.406], "image_processor_type": "EfficientNetImageProcessor",
        "image_std": [0.47853944, 0.4732864, 0.47434163], "include_top": False, "resample": 2, "rescale_factor": 1 / 127.5,
        "rescale_offset": True, "size": {"height": 64, "width": 64}})
    write_weights(folder, 24, temperature=0.0641)


def siglip2(folder: pathlib.Path) -> None:
    """google/siglip2-base-patch16-naflex: patches of images that keep their shapes, Gemma's tokenizer."""
    tokens = write_siglip2_tokenizer(folder)
    write_json(folder / "config.json", {
        "architectures": ["Siglip2Model"], "initializer_factor": 1.0, "model_type": "siglip2",
        "text_config": TOWER | {"model_type": "siglip2_text_model", "vocab_size": tokens, "projection_size": 64},
        "vision_config": TOWER | {"model_type": "siglip2_vision_model", "num_patches": 256, "patch_size": 16}})
    write_json(folder / "preprocessor_config.json", {
        "do_convert_rgb": None, "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Siglip2ImageProcessor", "image_std": [0.5, 0.5, 0.5], "max_num_patches": 256,
        "patch_size": 16, "processor_class": "Siglip2Processor", "resample": 2, "rescale_factor": 0.00392156862745098})
    write_weights(folder, 25, logit_scale=4.7244, logit_bias=-16.7714)


def aimv2(folder: pathlib.Path) -> None:
    """apple/aimv2-large-patch14-224-lit: CLIP's tokenizer, RMS norms, gated layers, a logit scale that is held down."""
    write_clip_tokenizer(folder)
    text = TOWER | {"model_type": "aimv2_text_model", "vocab_size": 49408, "max_position_embeddings": 77,
                    "eos_token_id": 49407}
    write_json(folder / "config.json", {
        "architectures": ["Aimv2Model"], "model_type": "aimv2", "projection_dim": 48, "text_config": text,
        "vision_config": TOWER | {"model_type": "aimv2_vision_model", "image_size": 64, "patch_size": 16}})
    write_clip_preprocessor(folder, 64)
    write_weights(folder, 26, logit_scale=4.7)


def vision_text_dual_encoder(folder: pathlib.Path) -> None:
    """clip-italian/clip-italian: CLIP's image tower and BERT, joined by two projections."""
    tokens = write_bert_tokenizer(folder)
    write_json(folder / "config.json", {
        "architectures": ["VisionTextDualEncoderModel"], "model_type": "vision-text-dual-encoder", "projection_dim": 48,
        "text_config": TOWER | {"model_type": "bert", "vocab_size": tokens, "max_position_embeddings": 512},
        "vision_config": TOWER | {"model_type": "clip_vision_model", "image_size": 64, "patch_size": 16}})
    write_clip_preprocessor(folder, 64)
    write_weights(folder, 27, logit_scale=3.0)


FAMILIES: dict[str, Callable[[pathlib.Path], None]] = {
    "chinese_clip": chinese_clip, "altclip": altclip, "metaclip_2": metaclip_2, "align": align,
    "siglip2": siglip2, "aimv2": aimv2, "vision_text_dual_encoder": vision_text_dual_encoder}


class FamilyShelf:
    """Builds each family's model once, on first use, under `root`."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root

    def __call__(self, name: str) -> pathlib.Path:
        """The folder of the model; not to be changed (see `copy`)."""
        folder = self.root / name
        if not folder.exists():
            folder.mkdir()
            FAMILIES[name](folder)
        return folder

    def copy(self, name: str, target: pathlib.Path) -> pathlib.Path:
        """A copy that a test may break."""
        shutil.copytree(self(name), target)
        return target


def read_json(path: pathlib.Path) -> dict:
    """A JSON file's object."""
    return dict(json.loads(path.read_text(encoding="utf-8")))
