"""Rewards by pretrained models, tested on tiny random models of the same classes: pixels, values and gradients."""

import warnings

import numpy
import pytest
import tiny
import torch
from cases import relative
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModelWithProjection,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from diffusers_fisher import (
    AestheticReward,
    CheckpointError,
    ClassifierReward,
    ImageInput,
    InputError,
    LinearReward,
    TextImageReward,
    UnsupportedError,
    WeightedReward,
    embedded_test_images,
    named_reward,
    posterior_guidance,
)

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**TOWER, "image_size": 16, "patch_size": 8}
WIDTH = 12  # of the joint embedding
TEXTS = ["a b", "c d e"]


def clip(kind="clip"):
    """Returns the parts of a tiny checkpoint folder: model, tokenizer, image processor."""
    torch.manual_seed(3)
    words = tiny.tokenizer()
    text = {
        **TOWER, "vocab_size": len(words), "max_position_embeddings": 8, "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id,
    }  # fmt: skip
    if kind == "siglip":
        model = SiglipModel(SiglipConfig(text_config={**text, "projection_size": 16}, vision_config=VISION))
        return model, words, SiglipImageProcessorPil(size={"height": 16, "width": 16})
    config = CLIPConfig(
        text_config={**text, "projection_dim": WIDTH}, vision_config={**VISION, "projection_dim": WIDTH},
        projection_dim=WIDTH,
    )  # fmt: skip
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return CLIPModel(config), words, processor


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    model_folders = {}
    for kind in ("clip", "siglip"):
        folder = tmp_path_factory.mktemp(kind)
        for part in clip(kind):
            part.save_pretrained(folder)
        model_folders[kind] = folder
    return model_folders


def smooth_images(count, height, width, dtype=torch.float32):
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return ((images * 255).round() / 255).to(dtype)


def pictures(images):
    arrays = (images * 255).round().permute(0, 2, 3, 1).numpy().astype(numpy.uint8)
    return [Image.fromarray(array) for array in arrays]


def gradient_error(reward, images, step=1e-5):
    """Returns the largest relative error of autograd's slope along a seeded direction, in float64. The images are away
    from black and white, where the result of the resize is clipped."""
    images = 0.2 + 0.6 * images
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(leaf, TEXTS).sum(), leaf)
    with torch.no_grad():
        forward, backward = (reward(images + sign * step * direction, TEXTS) for sign in (1, -1))
    slope = (forward - backward) / (2 * step)
    assert bool((slope.abs() > 1e-6).all())  # there is something to compare
    return float((((gradient * direction).flatten(1).sum(1) - slope) / slope).abs().max())


# Pixels


PROCESSORS = {
    "CLIP": lambda: CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 18, "width": 18}),
    "CLIP, a larger crop": lambda: CLIPImageProcessorPil(
        size={"shortest_edge": 11}, crop_size={"height": 18, "width": 15}
    ),
    "SigLIP": lambda: SiglipImageProcessorPil(size={"height": 16, "width": 12}),
    "ViT": lambda: ViTImageProcessorPil(size={"height": 16, "width": 12}, image_mean=(0.4, 0.5, 0.6)),
    "ViT, not normalised": lambda: ViTImageProcessorPil(size={"height": 16, "width": 16}, do_normalize=False),
    "ConvNeXt": lambda: ConvNextImageProcessorPil(size={"shortest_edge": 20}),
    "ConvNeXt, large": lambda: ConvNextImageProcessorPil(size={"shortest_edge": 384}),
}


@pytest.mark.parametrize("size", [(32, 32), (48, 40), (23, 31)], ids=str)
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_the_transformers_processor(tmp_path, name, size):
    processor = PROCESSORS[name]()
    processor.save_pretrained(tmp_path)
    images = smooth_images(2, *size)
    expected = processor(pictures(images), return_tensors="pt")["pixel_values"]
    pixels = ImageInput.from_pretrained(tmp_path)(images)
    assert pixels.shape == expected.shape
    # PIL rounds to 8 bits after each of its two passes, half of 1/255 each (the first by a filter whose negative lobes
    # enlarge it a little: 1.08 was measured), and a normalised channel spans 1/std.
    spread = 1.0 if not processor.do_normalize else 1 / min(processor.image_std)
    assert float((pixels - expected).abs().max()) <= (1.15 / 255 + 1e-4) * spread
    assert float((pixels - expected).abs().mean()) <= (1 / 255 + 1e-4) * spread / 3


def test_settings_of_old_files_are_read():
    """The first CLIP checkpoints hold plain numbers as sizes."""
    settings = {"size": 20, "crop_size": 18, "do_center_crop": True, "do_resize": True, "resample": 3}
    assert ImageInput.from_settings(settings) == ImageInput((18, 18), resampling="bicubic", shortest_edge=20)


@pytest.mark.parametrize(
    "settings", [{"resample": 1}, {"resample": 0}, {"size": {"longest_edge": 5}}], ids=["lanczos", "nearest", "size"]
)
def test_unknown_settings_are_refused(settings):
    with pytest.raises(UnsupportedError, match=r"The image processor has resample=.*; supported: filters 2 .bilinear"):
        ImageInput.from_settings(settings)


# Text and image


@pytest.mark.parametrize("logits", [False, True], ids=["cosine", "logit"])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_similarity_is_that_of_the_whole_model_on_pil_images(folders, kind, logits):
    model, words, processor = clip(kind)
    images = smooth_images(2, 16, 16)
    tokens = words(TEXTS, padding="max_length", max_length=8, return_tensors="pt")
    with torch.no_grad():
        pixels = processor(pictures(images), return_tensors="pt")["pixel_values"]
        expected = model.eval()(pixel_values=pixels, **tokens).logits_per_image.diagonal()
    if not logits:
        expected = (expected - (0 if kind == "clip" else model.logit_bias)) / model.logit_scale.exp()
    reward = getattr(TextImageReward, kind)(path=str(folders[kind]), logits=logits)
    values = reward(images, TEXTS)
    # float32, through two towers in another order of operations
    torch.testing.assert_close(values.detach(), expected, rtol=1e-4, atol=1e-5)
    assert float((values[0] - values[1]).abs()) > 1e-3


def test_fixed_text_stands_for_all_prompts(folders):
    images = smooth_images(2, 24, 20)
    fixed_reward = TextImageReward.clip("a b", path=str(folders["clip"]))
    each = TextImageReward.clip(["a b", "a b"], path=str(folders["clip"]))
    by_prompt = TextImageReward.clip(path=str(folders["clip"]))
    values = fixed_reward(images, ["z", "y"])
    assert torch.equal(values, each(images, []))
    assert torch.equal(values, by_prompt(images, ["a b", "a b"]))
    assert not torch.equal(values, by_prompt(images, TEXTS))
    with pytest.raises(InputError, match="Got 1 texts for 2 images; allowed: one, or one per image"):
        TextImageReward.clip(["a b"], path=str(folders["clip"]))(images, [])


@pytest.mark.parametrize("prompts", [["a b", ""], ["a", " "], [3, 0]], ids=["empty", "blank", "class labels"])
def test_similarity_to_an_empty_text_is_refused(folders, prompts):
    path, images = str(folders["clip"]), smooth_images(2, 16, 16)
    by_prompt = TextImageReward.clip(path=path)
    with pytest.raises(
        InputError, match=r"similarity to an empty text has no meaning. Give the reward a `text`, or prompts"
    ):
        by_prompt(images, prompts)
    with pytest.raises(InputError, match="similarity to an empty text"):
        WeightedReward((1.0, by_prompt))(images, prompts)
    assert TextImageReward.clip("", path=path)(images, prompts).shape == (2,)  # the user may ask for the empty text


def test_guidance_by_a_similarity_refuses_empty_texts_before_it_begins(folders):
    pipe, reward = tiny.stable_diffusion(), TextImageReward.clip(path=str(folders["clip"]))
    calls = []
    pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(None))

    def run(*prompts):
        with posterior_guidance(pipe, reward, *prompts) as guidance:
            pipe("a b", num_inference_steps=1, callback_on_step_end=guidance)

    with pytest.raises(InputError, match=r"\(`prompts=` of `posterior_guidance`\)"):
        run()
    assert calls == []
    run("a b")
    assert len(calls) == 1


def test_texts_are_encoded_once(folders):
    reward = TextImageReward.clip(path=str(folders["clip"]))
    calls = []
    reward.model.text_model.register_forward_hook(lambda *_: calls.append(None))
    images = smooth_images(2, 16, 16)
    first = reward(images, TEXTS)
    assert torch.equal(reward(images, TEXTS), first)
    assert torch.equal(reward(images.flip(0), TEXTS[::-1]).flip(0), first)
    assert len(calls) == 1


def test_all_files_are_taken_from_the_same_subfolder(folders):
    folder, images = folders["clip"], smooth_images(2, 16, 16)
    expected = TextImageReward.clip(path=str(folder))(images, TEXTS)
    source = {"path": str(folder.parent), "subfolder": folder.name}
    assert torch.equal(TextImageReward.clip(**source)(images, TEXTS), expected)
    # The processor is in a repository of its own, where the model's subfolder says nothing.
    score = TextImageReward.pick_score(**source, processor=str(folder))(images, TEXTS)
    assert torch.equal(score, TextImageReward.pick_score(path=str(folder), processor=str(folder))(images, TEXTS))


def test_pick_score_is_the_logit_of_its_own_clip(folders):
    path, images = str(folders["clip"]), smooth_images(2, 16, 16)
    score = TextImageReward.pick_score(path=path, processor=path)(images, TEXTS)
    cosine = TextImageReward.clip(path=path)(images, TEXTS)
    scale = clip()[0].logit_scale.exp().detach()
    torch.testing.assert_close(score, scale * cosine, rtol=1e-5, atol=1e-6)  # float32


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("size", [(16, 16), (24, 20)], ids=["own size", "resized"])
def test_gradients_of_similarities_are_exact(folders, kind, size):
    reward = getattr(TextImageReward, kind)(path=str(folders[kind]), dtype=torch.float64)
    # Central differences of step h: h^2 times a third derivative of order 1, and 1e-16/h of rounding.
    assert gradient_error(reward, smooth_images(2, *size, dtype=torch.float64)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_give_single_precision_rewards(folders, dtype):
    images = smooth_images(2, 16, 16).requires_grad_()
    path = str(folders["clip"])
    half, single = TextImageReward.clip(path=path, dtype=dtype), TextImageReward.clip(path=path)
    values = half(images, TEXTS)
    (gradient,) = torch.autograd.grad(values.sum(), images)
    assert (half.model.dtype, values.dtype, gradient.dtype) == (dtype, torch.float32, torch.float32)
    # Two to three digits of bfloat16; the cosines are of order 0.1 and themselves differences.
    torch.testing.assert_close(values.detach(), single(images, TEXTS).detach(), rtol=0, atol=0.02)


def test_loaded_models_keep_no_gradients(folders):
    reward = TextImageReward.siglip(path=str(folders["siglip"]))
    assert not reward.model.training
    assert not any(parameter.requires_grad for parameter in reward.model.parameters())


# Aesthetics


def head_tensors(widths=(WIDTH, 8, 4, 1), names=(0, 2, 4)):
    """Returns the tensors of a published head: linear layers, with gaps in the numbers for the dropout."""
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for number, width, following in zip(names, widths, widths[1:], strict=False):
        tensors[f"layers.{number}.weight"] = torch.randn(following, width, generator=generator)
        tensors[f"layers.{number}.bias"] = torch.randn(following, generator=generator)
    return tensors


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("kind", ["layers", "one layer", "ten layers"])
def test_aesthetic_score_is_the_head_on_the_normalised_embedding(folders, tmp_path, suffix, kind):
    tensors = head_tensors()
    if kind == "one layer":
        tensors = {"weight": torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(5)), "bias": torch.ones(1)}
    if kind == "ten layers":  # 10 comes after 2
        tensors = head_tensors((WIDTH, 6, 5, 1), (1, 2, 10))
    file = tmp_path / f"head.{suffix}"
    torch.save(tensors, file) if suffix == "pth" else save_file(tensors, file)
    reward = AestheticReward.from_pretrained(file, str(folders["clip"]))
    images = smooth_images(2, 16, 16)
    model = CLIPVisionModelWithProjection.from_pretrained(folders["clip"]).eval()
    with torch.no_grad():
        pixels = clip()[2](pictures(images), return_tensors="pt")["pixel_values"]
        expected = model(pixel_values=pixels).image_embeds
        expected = expected / expected.norm(dim=1, keepdim=True)
        for name in [name for name in tensors if name.endswith("weight")]:
            expected = expected @ tensors[name].T + tensors[name.replace("weight", "bias")]
    torch.testing.assert_close(reward(images, []), expected[:, 0], rtol=1e-4, atol=1e-5)  # float32
    assert not any(parameter.requires_grad for parameter in reward.head.parameters())


def test_gradient_of_the_aesthetic_score_is_exact(folders, tmp_path):
    save_file(head_tensors(), tmp_path / "head.safetensors")
    reward = AestheticReward.from_pretrained(tmp_path / "head.safetensors", str(folders["clip"]), dtype=torch.float64)
    reward.head.double()
    # the same tolerance as for similarities
    assert gradient_error(reward, smooth_images(2, 24, 20, dtype=torch.float64)) < 1e-6


BAD_HEADS = {
    "two numbers": (head_tensors((WIDTH, 8, 2), (0, 2)), "allowed: a chain of linear layers that ends in one"),
    "no chain": (head_tensors((WIDTH, 8, 1), (0, 2)) | {"layers.2.weight": torch.ones(1, 7)}, "allowed: a chain of"),
    "more": (head_tensors() | {"scale": torch.ones(1)}, "allowed: a chain of linear layers that ends in one number"),
    "nothing": ({"other": torch.ones(1)}, r"holds the tensors \['other'\]"),
    "no table": (torch.ones(3), "holds a Tensor; allowed: a dictionary of tensors"),
    "another width": (head_tensors((WIDTH + 1, 1), (0,)), r"takes 13 numbers, but .* have 12\. Pass the CLIP model"),
}


@pytest.mark.parametrize("kind", BAD_HEADS)
def test_heads_of_another_kind_are_refused(folders, tmp_path, kind):
    content, message = BAD_HEADS[kind]
    torch.save(content, tmp_path / "head.pth")
    with pytest.raises(CheckpointError, match=message):
        AestheticReward.from_pretrained(tmp_path / "head.pth", str(folders["clip"]))


class Code:
    def __reduce__(self):
        return print, ("run by a pickle",)


@pytest.mark.parametrize("kind", ["missing", "damaged", "code"])
def test_files_without_weights_are_refused(tmp_path, capsys, kind):
    file = tmp_path / "head.pth"
    if kind == "damaged":
        file.write_bytes(b"PK\x03\x04 not a checkpoint")
    if kind == "code":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save({"weight": Code()}, file)
    message = {"missing": r"head\.pth' can't be read: .*No such file.* Name another file"}
    with pytest.raises(
        CheckpointError, match=message.get(kind, r"head\.pth' can't be read as a file of weights alone")
    ):
        AestheticReward.from_pretrained(file, "unused")
    assert "run by a pickle" not in capsys.readouterr().out


# Sums and names


def test_weighted_sum_adds_values_and_gradients():
    left, weights = LinearReward.left_minus_right(8, 8), torch.rand(8, 8, generator=torch.Generator().manual_seed(6))
    images = smooth_images(2, 8, 8, torch.float64).requires_grad_()
    reward = WeightedReward((2.0, left), (-0.5, LinearReward(weights)))
    value = reward(images, [])
    expected = 2 * left(images, []) - 0.5 * LinearReward(weights)(images, [])
    assert torch.equal(value, expected)
    gradients = [torch.autograd.grad(entry.sum(), images, retain_graph=True)[0] for entry in (value, expected)]
    assert relative(*gradients) < 1e-15  # float64, the same operations
    assert reward.__name__ == "2 'LinearReward' + -0.5 'LinearReward'"


@pytest.mark.parametrize(
    "terms", [(), (LinearReward(torch.ones(2, 2)),), ((1.0, "clip"),)], ids=["none", "bare", "no"]
)
def test_weighted_sums_refuse_terms_that_are_not_pairs(terms):
    with pytest.raises((InputError, TypeError), match=r"allowed: \(weight, reward\) pairs|has no len"):
        WeightedReward(*terms)


def test_names_of_rewards(folders):
    images = embedded_test_images()[0][:2]
    by_name = named_reward("classifier:embedded:coat")
    assert isinstance(by_name, ClassifierReward)
    assert by_name(images, []).shape == (2,)
    path = str(folders["clip"])
    assert torch.equal(named_reward(f"clip:{path}")(images, TEXTS), TextImageReward.clip(path=path)(images, TEXTS))
    assert named_reward("python:diffusers_fisher.guidance.checks:norms").__name__ == "norms"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("beauty", r"The reward is 'beauty'; allowed: classifier:PATH:CLASS"),
        ("classifier:embedded", "The reward is 'classifier:embedded'; allowed"),
        ("aesthetic", "The reward is 'aesthetic'; allowed"),
        ("classifier:embedded:boots", "The classifier has no class 'boots'"),
        ("python:no_such_module:f", "can't be imported: No module named 'no_such_module'. Run in the"),
        ("python:math:no_such", "can't be imported: module 'math' has no attribute 'no_such'"),
        ("python:math:pi", "is a float; it must be a function"),
    ],
)
def test_unknown_names_are_refused(name, message):
    with pytest.raises(InputError, match=message):
        named_reward(name)
