"""The loss is the scorer's own dissimilarity, its gradient is the true one, and it leads to an image of the caption."""
import importlib
import random
import sys

import numpy as np
import pytest
import torch
from conftest import BUNDLED_MODEL, ROOT
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipModel

import image_text_sim_clip as script
from addons.loss import DissimilarityLoss, resize_with_gradient

CAPTION = "a large red circle on a grey background"
MIXED_SIZES = [(32, 32), (64, 64), (48, 100), (200, 37), (128, 128), (333, 210), (65, 63), (640, 480), (17, 90), (300, 301)]


def loss_of(model, **options):
    return DissimilarityLoss(script.Config(pretrained_model=str(model), use_cuda=False), **options)


def as_tensor(images):
    """PIL images of one size -> (n, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in images])).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def bundled():
    return loss_of(BUNDLED_MODEL)


@pytest.fixture
def shapes_module():
    """challenge_set/<name>.py as a module."""
    sys.path.insert(0, str(ROOT / "challenge_set"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "challenge_set"))


@pytest.mark.parametrize(("change", "words"), [
    (lambda x: x * 2 - 1, r"\[-1, 1\]; images in \[-1, 1\] become so by images / 2"),
    (lambda x: x * 255, r"\[0, 255\]; .* / 255"),
    (lambda x: x - 0.5, r"\[-0\.5, 0\.5\]"), (lambda x: x * 1.01, r"got values in \[0, 1\.01\]"),
    (lambda x: x * 1e6, "1e\\+06"),
    (lambda x: x.masked_fill(x > 0.9, torch.nan), r"got \d+ NaN of 3072 values; the others lie in \[0, 0\."),
    (lambda x: x.masked_fill(x > 0.9, torch.inf), "inf"), (lambda x: x * torch.nan, "3072 NaN of 3072"),
    (lambda x: (x * 2 - 1).half(), r"\[-1, 1\]"), (lambda x: (x * 255).double(), r"\[0, 255\]")])
def test_other_ranges_are_refused(bundled, noise, change, words):
    """Values outside [0, 1] and NaN are refused, and the message names the range it got; a clamped image passes."""
    image = as_tensor([noise(32, 32)])
    image[..., 0, :2] = torch.tensor([0.0, 1.0])  # the whole range
    with pytest.raises(ValueError, match=words):
        bundled(change(image), [CAPTION])
    with pytest.raises(ValueError, match=words):
        bundled.encode_images(change(image))
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.isfinite(bundled((image * 1.3 - 0.1).clamp(0, 1).to(kind), [CAPTION]))


def test_value_is_the_scorers_on_fifty_images_of_mixed_sizes(bundled, noise):
    images = [noise(*MIXED_SIZES[i % len(MIXED_SIZES)], seed=i) for i in range(50)]
    captions = [f"a large {['red', 'blue', 'green'][i % 3]} circle on a grey background" for i in range(50)]
    expected = 1 - bundled.scorer.similarity(images, captions)
    values = [bundled(as_tensor([p]), [c]).item() for p, c in zip(images, captions, strict=True)]
    assert np.abs(np.array(values) - expected).max() < 2e-3
    assert np.ptp(expected) > 0.1  # or anything would do


@pytest.mark.slow  # the models are built first
@pytest.mark.parametrize("name", ["clip-base-patch32", "clip-new-eos", "siglip-base", "siglip2-base"])
def test_value_is_the_scorers_for_every_kind_of_model(name, shelf, noise):
    loss = loss_of(shelf(name))
    images = [noise(*size, seed=i) for i, size in enumerate(MIXED_SIZES)]
    captions = ["A Photo of TWO cats", "a dog"] * 5
    expected = 1 - loss.scorer.similarity(images, captions)
    values = [loss(as_tensor([p]), [c]).item() for p, c in zip(images, captions, strict=True)]
    assert np.abs(np.array(values) - expected).max() < 2e-3


def test_value_is_the_scorers_to_rounding_at_the_models_own_size(bundled, noise):
    images = [noise(64, 64, seed=i) for i in range(20)]
    expected = 1 - bundled.scorer.similarity(images, [CAPTION] * 20)
    loss = loss_of(BUNDLED_MODEL, reduction="none")
    assert np.abs(loss(as_tensor(images), [CAPTION] * 20).numpy() - expected).max() < 1e-4
    assert bundled(as_tensor(images), [CAPTION] * 20).item() == pytest.approx(expected.mean(), abs=1e-5)


def test_caption_template_is_used(bundled, noise):
    config = script.Config(pretrained_model=BUNDLED_MODEL, use_cuda=False, caption_template="a large red {}")
    image = as_tensor([noise(64, 64)])
    assert DissimilarityLoss(config)(image, ["ring"]).item() == pytest.approx(bundled(image, ["a large red ring"]).item())


def test_gradient_is_that_of_finite_differences():
    loss = loss_of(BUNDLED_MODEL).double()
    torch.manual_seed(0)
    image = (0.3 + 0.4 * torch.rand(1, 3, 6, 5, dtype=torch.float64)).requires_grad_()  # away from 0 and 1, where it is cut off
    assert torch.autograd.gradcheck(lambda x: loss(x, [CAPTION]), image)


def test_gradient_along_a_direction_where_the_image_shrinks():
    loss = loss_of(BUNDLED_MODEL).double()
    torch.manual_seed(1)
    image = (0.3 + 0.4 * torch.rand(1, 3, 150, 90, dtype=torch.float64)).requires_grad_()
    direction = torch.randn(image.shape, dtype=torch.float64)
    gradient, = torch.autograd.grad(loss(image, [CAPTION]), image)
    step = 1e-5
    with torch.no_grad():
        slope = (loss(image + step * direction, [CAPTION]) - loss(image - step * direction, [CAPTION])) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-6)


def test_crop_and_border_are_the_scorers():
    for height, width, crop in ((7, 9, (4, 6)), (3, 9, (4, 6)), (2, 3, (5, 5)), (6, 6, (6, 6)), (5, 8, None)):
        pixels = torch.arange(3 * height * width).view(1, 3, height, width)
        settings = script.ImageSettings(None, (height, width), crop, 3)  # the size that it has: nothing is resized
        expected = transformers_crop(pixels[0].numpy().astype(np.uint8), crop)
        assert np.array_equal(resize_with_gradient(pixels.float() / 255, settings)[0].mul(255).round().numpy(), expected)
        assert np.array_equal(script.crop_centre(pixels.byte(), settings)[0].numpy(), expected)


def transformers_crop(pixels, crop):
    """The centre of (3, H, W) pixels as transformers' own image processor on Pillow cuts it out."""
    if crop is None:
        return pixels
    processor = CLIPImageProcessorPil(do_resize=False, do_rescale=False, do_normalize=False, do_convert_rgb=False,
                                      crop_size={"height": crop[0], "width": crop[1]})
    return np.asarray(processor(pixels, input_data_format="channels_first")["pixel_values"][0])


def test_resize_leaves_the_models_own_size_alone():
    image = 3 * torch.rand(1, 3, 64, 64) - 1
    assert torch.equal(resize_with_gradient(image, script.ImageSettings(64, None, (64, 64), 3)), image)


def test_model_is_frozen_and_stays_in_evaluation_mode(bundled, noise):
    holder = torch.nn.Sequential(torch.nn.Dropout(), bundled).train()
    assert not any(module.training for module in bundled.modules()) and holder[0].training
    image = as_tensor([noise(64, 64)]).requires_grad_()
    bundled(image, [CAPTION]).backward()
    assert image.grad.abs().sum() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in bundled.parameters())


@pytest.mark.slow  # the model is built first
def test_sigmoid_objective_is_the_models_own_loss(shelf, noise):
    loss = loss_of(shelf("siglip-base"), objective="sigmoid")
    images, captions = [noise(224, 224, seed=i) for i in range(4)], ["two cats", "a dog", "a red car", "the sea"]
    model = SiglipModel.from_pretrained(shelf("siglip-base"))
    pad, rows = loss.scorer.family.tokenizer.pad_token_id, loss.scorer.tokenize(captions)[0]
    ids = torch.tensor([row + [pad] * (64 - len(row)) for row in rows])
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=as_tensor(images) * 2 - 1, return_loss=True).loss
    assert loss(as_tensor(images), captions).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.slow  # the model is built first
def test_sigmoid_objective_keeps_its_digits_in_mixed_precision(shelf):
    """Under autocast cosines are not rounded to bfloat16 before the scale, 117, makes them logits."""
    loss = loss_of(shelf("siglip-base"), objective="sigmoid", reduction="none")
    torch.manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(32, 64), dim=-1)
    texts = torch.nn.functional.normalize(images + torch.randn(32, 64) / 10, dim=-1)
    captions = [f"caption {number}" for number in range(32)]
    expected = loss._sigmoid_losses(images.double(), texts.double(), captions)
    with torch.autocast("cpu", torch.bfloat16):
        values = loss._sigmoid_losses(images, texts, captions)
    assert values.dtype == torch.float32 and torch.allclose(values.double(), expected, atol=1e-3)


@pytest.mark.parametrize("twin", ["two cats", "Two cats."])
def test_sigmoid_objective_takes_an_equal_caption_for_no_wrong_one(shelf, noise, twin):
    """Equal is what the model reads the same of: SigLIP's tokenizer knows no capitals and no full stop."""
    loss = loss_of(shelf("siglip-base"), objective="sigmoid", reduction="none")
    image = as_tensor([noise(224, 224)])
    alone, twins = loss(image, ["two cats"]), loss(image.expand(2, -1, -1, -1), ["two cats", twin])
    assert twins.tolist() == pytest.approx([alone.item()] * 2, rel=1e-5)


@pytest.mark.parametrize("images, captions, message", [
    (torch.zeros(3, 8, 8), ["a"], "must be floats"), (torch.zeros(1, 1, 8, 8), ["a"], "must be floats"),
    (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a"], "must be floats"),
    (torch.zeros(2, 3, 8, 8), ["a"], "2 images but 1 captions"), (torch.zeros(1, 3, 8, 8), [" "], "empty caption")])
def test_what_cannot_be_scored_is_refused(bundled, images, captions, message):
    with pytest.raises(ValueError, match=message):
        bundled(images, captions)


def test_objectives_and_reductions_are_checked():
    with pytest.raises(ValueError, match="objective"):
        loss_of(BUNDLED_MODEL, objective="euclid")
    with pytest.raises(script.Trouble, match="no SigLIP model") as trouble:
        loss_of(BUNDLED_MODEL, objective="sigmoid")
    assert trouble.value.exit_code == script.EXIT_MODEL


def optimise_free_image(loss, steps, crop, grain):
    """An image (1, 3, 64, 64) of free pixels that starts as faint noise on grey and follows the loss's gradient."""
    finetune = pytest.importorskip("examples.finetune_text_to_image", reason="needs examples/requirements.txt")
    generator = torch.Generator().manual_seed(0)
    start = 0.5 + 0.05 * torch.randn(1, 3, 64, 64, generator=generator)
    pixels = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([pixels], lr=0.03)
    for _ in range(steps):
        views = finetune.vary(pixels.clamp(0, 1).expand(8, -1, -1, -1), crop, grain, generator)
        optimiser.zero_grad()
        loss(views, [CAPTION] * 8).backward()
        optimiser.step()
    return start, pixels.detach().clamp(0, 1)


def as_pillow_image(image):
    return Image.fromarray((image[0] * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.slow  # a judge is trained first
def test_free_image_becomes_as_similar_as_a_drawing_and_the_judge_sees_it_too(bundled, shapes_module, tmp_path):
    shapes, training = shapes_module("draw_shapes"), shapes_module("train_shapes_clip")
    scene = shapes.Scene((shapes.Thing("large", "red", "circle"),), "", "grey")
    drawings = [shapes.draw(scene, 64, random.Random(i), 4) for i in range(10)]
    start, final = map(as_pillow_image, optimise_free_image(bundled, 200, crop=0.6, grain=0.1))
    before, after = bundled.scorer.similarity([start, final], [CAPTION] * 2)
    assert before < 0.5 < bundled.scorer.similarity(drawings, [CAPTION] * 10).mean() <= after
    training.train(seed=1, steps=100, batch=64, peak_rate=2e-3, out=tmp_path / "judge")
    judge = script.Scorer(script.Config(pretrained_model=str(tmp_path / "judge"), use_cuda=False))
    judge_before, judge_after = judge.similarity([start, final], [CAPTION] * 2)
    print(f"teacher {before:.3f} -> {after:.3f}, judge {judge_before:.3f} -> {judge_after:.3f}")
    assert judge_after > judge_before + 0.2
