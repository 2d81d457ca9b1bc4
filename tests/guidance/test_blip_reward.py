"""BLIP's match of image and text as a reward, on a tiny random model of the same class."""

import pytest
import tiny
import torch
from transformers import BlipConfig, BlipForImageTextRetrieval
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from diffusers_fisher import BlipReward, InputError, guide, named_reward

TEXTS = ["a b", "c d e"]


def parts():
    torch.manual_seed(3)
    words = tiny.tokenizer()
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **tower, "vocab_size": len(words), "max_position_embeddings": 8, "bos_token_id": words.bos_token_id,
        "pad_token_id": words.pad_token_id, "encoder_hidden_size": 16,
    }  # fmt: skip
    config = BlipConfig(text_config=text, vision_config={**tower, "image_size": 16, "patch_size": 8})
    return BlipForImageTextRetrieval(config), words, BlipImageProcessorPil(size={"height": 16, "width": 16})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("blip")
    for part in parts():
        part.save_pretrained(path)
    return str(path)


def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_the_reward_is_the_log_odds_of_a_match(folder):
    model, words, processor = parts()
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    tokens = words(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"],
            pixel_values=(images() - mean) / std,
        ).itm_score  # fmt: skip
    x = images().requires_grad_()
    values = named_reward(f"blip:{folder}")(x, TEXTS)
    probabilities = logits.softmax(1)
    torch.testing.assert_close(
        values.detach(), (probabilities[:, 1] / probabilities[:, 0]).log(), rtol=1e-4, atol=1e-5
    )
    assert float((values[0] - values[1]).detach().abs()) > 1e-5
    (gradient,) = torch.autograd.grad(values.sum(), x)
    assert bool(gradient.flatten(1).any(1).all())


def test_fixed_text_stands_for_the_prompts_and_empty_ones_are_refused(folder):
    fixed, by_prompt = BlipReward.from_pretrained(folder, "a b"), BlipReward.from_pretrained(folder)
    assert torch.equal(fixed(images(), ["", ""]), by_prompt(images(), ["a b", "a b"]))
    with pytest.raises(InputError, match="similarity to an empty text has no meaning"):
        by_prompt(images(), ["a b", ""])
    with pytest.raises(InputError, match="Got 3 texts for 2 images"):
        BlipReward.from_pretrained(folder, ["a", "b", "c"])(images(), TEXTS)


def test_guidance_by_the_match(folder):
    out = guide(
        tiny.stable_diffusion(), TEXTS, BlipReward.from_pretrained(folder), num_guidance_steps=2,
        num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert bool((out.best_rewards >= out.rewards[0]).all()) and out.status == "completed"
    with pytest.raises(InputError, match=r"allowed: .*blip\[:PATH\]"):
        named_reward("blip:a:b")
