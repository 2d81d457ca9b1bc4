"""The families of `FAMILIES` in every run of the suite: the main tests of `test_backbones`, and what they refuse."""

import dataclasses
import re

import diffusers
import pytest
import tiny_families
import torch

from diffusers_fisher import DistilledNetworkWarning, InputError, UnsupportedError, guide, log_likelihood
from diffusers_fisher.backbones import backbone_of
from pipelines import test_backbones
from pipelines.backbones import FAMILIES, PROMPTS


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def brightness(images, conditions):
    return images.mean((1, 2, 3))


@pytest.mark.parametrize("name", FAMILIES)
def test_images_gradient_and_likelihood_of_every_family(name):
    """Bit for bit those of the stock call, of full back-propagation, and of a loop over the network."""
    backbone = FAMILIES[name]
    test_backbones.test_images_are_those_of_the_stock_pipeline(backbone)
    test_backbones.test_gradient_of_a_run_is_that_of_back_propagation(backbone, guided=True)
    test_backbones.test_likelihood_is_that_of_a_loop_over_the_network_itself(backbone)


# Guidance


@pytest.mark.parametrize("name", [name for name, backbone in FAMILIES.items() if backbone.unguided != 4.0])
def test_scales_that_guide_are_refused_by_name(name):
    backbone = FAMILIES[name]
    pipe, argument = backbone.ours(), backbone.guidance_name
    message = re.escape(
        f"`{argument}` is 4.0; likelihoods and curvature are at {backbone.unguided}, because a guided output is the"
    )
    with pytest.raises(InputError, match=message):
        backbone.score(pipe, latents=backbone.noise(), **{argument: 4.0})


def test_distilled_guidance_scales_are_inputs():
    pipe, x = tiny_families.flux2(), 0.5 * FAMILIES["Flux2"].noise()
    options = {"num_inference_steps": 2, "step_halving": False, "text_encoder_out_layers": (0, 1, 2)}
    results = [
        log_likelihood(pipe, None, PROMPTS, latents=x, generator=seeded(), **options, **scale)
        for scale in ({}, {"guidance_scale": 4.0}, {"guidance_scale": 2.0})
    ]
    assert torch.equal(results[0].log_prob, results[1].log_prob)
    assert not torch.equal(results[0].log_prob, results[2].log_prob)
    assert [result.guidance_scale for result in results] == [4.0, 4.0, 2.0]


def test_distilled_networks_of_flux_2_klein_warn():
    options = {"num_inference_steps": 2, "step_halving": False, "text_encoder_out_layers": (0, 1, 2)}
    pipe = tiny_families.flux2_klein(is_distilled=True)
    with pytest.warns(DistilledNetworkWarning, match="its configuration has is_distilled=True"):
        log_likelihood(pipe, None, PROMPTS, latents=FAMILIES["Flux2Klein"].noise(), generator=seeded(), **options)


def test_distilled_qwen_image_needs_its_guidance_scale():
    pipe, x = tiny_families.qwen_image(guidance_embeds=True), FAMILIES["QwenImage"].noise()
    with pytest.raises(InputError, match="takes the guidance scale as an input, and its call has no default"):
        log_likelihood(pipe, None, PROMPTS, latents=x)


# Embeddings


ENCODING = ("max_sequence_length", "system_prompt", "text_encoder_out_layers", "complex_human_instruction")
UNGUIDED_ENCODERS = ("QwenImage", "Flux2", "Flux2Klein")
MASKED = {"prompt_embeds": 0, "prompt_attention_mask": 1}
EMBEDDINGS = {
    "ZImage": {"prompt_embeds": 0}, "QwenImage": {"prompt_embeds": 0, "prompt_embeds_mask": 1},
    "CogView4": {"prompt_embeds": 0}, "Flux2Klein": {"prompt_embeds": 0}, "Flux2": {"prompt_embeds": 0},
    "Sana": MASKED, "Lumina2": MASKED,
    "AuraFlow": MASKED, "Chroma": {"prompt_embeds": 0, "prompt_attention_mask": 2}, "HunyuanDiT": MASKED,
    "HiDreamImage": {"prompt_embeds_t5": 0, "prompt_embeds_llama3": 2, "pooled_prompt_embeds": 4},
}  # fmt: skip
"""Places of the embeddings in the result of `encode_prompt`, by the names of the call's arguments."""


def embeddings_of(name, pipe):
    """Returns the call's embeddings of the two prompts, without guidance."""
    options = {key: value for key, value in FAMILIES[name].options.items() if key in ENCODING}
    with torch.no_grad():
        if name == "HunyuanDiT":
            results = [
                pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False, text_encoder_index=index)
                for index in (0, 1)
            ]
            return {
                key + end: result[place]
                for end, result in zip(("", "_2"), results, strict=True)
                for key, place in (("prompt_embeds", 0), ("prompt_attention_mask", 2))
            }
        guided = {} if name in UNGUIDED_ENCODERS else {"do_classifier_free_guidance": False}
        result = pipe.encode_prompt(list(PROMPTS), **guided, **options)
    return {key: result[place] for key, place in EMBEDDINGS[name].items()}


QUICK = ("ZImage", "HiDreamImage")
"""Families of every run of the suite: with embeddings in a list, and with the prompts on the second axis."""


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in EMBEDDINGS]
)
def test_embeddings_stand_for_their_prompts(name):
    backbone = dataclasses.replace(FAMILIES[name], condition=None)
    pipe, x = backbone.ours(), 0.5 * backbone.noise()
    embeds = embeddings_of(name, pipe)
    options = {"latents": x, "num_inference_steps": 2, "image_keys": ["a", "b"]}
    expected = FAMILIES[name].score(pipe, **options).log_prob
    assert torch.equal(backbone.score(pipe, **embeds, **options).log_prob, expected)
    # A refined image is evaluated by itself: its conditions are taken apart.
    selected = {"num_inference_steps": 2, "tolerance": 1e-6, "max_denoiser_calls": 12}
    refined, by_prompt = (
        each.score(pipe, latents=x, image_keys=["a", "b"], **arguments, **selected).log_prob
        for each, arguments in ((backbone, embeds), (FAMILIES[name], {}))
    )
    torch.testing.assert_close(refined, by_prompt, rtol=1e-5, atol=0)
    twins = [key for key in embeds if len(embeds) > 1]
    for twin in twins:
        rest = {key: value for key, value in embeds.items() if key != twin}
        with pytest.raises(InputError, match=f"was given `.*` without `{twin}`; they belong together"):
            backbone.score(pipe, **rest, **options)


def test_a_mask_of_qwen_image_that_is_none_may_be_passed():
    """Its `encode_prompt` returns None where all tokens are valid."""
    backbone = FAMILIES["QwenImage"]
    pipe = backbone.ours()
    embeds, mask = pipe.encode_prompt(["ab", "cd"])
    assert mask is None
    options = {"latents": backbone.noise(), "num_inference_steps": 2}
    out = dataclasses.replace(backbone, condition=None).score(
        pipe, prompt_embeds=embeds.detach(), prompt_embeds_mask=None, **options
    )
    expected = dataclasses.replace(backbone, condition=["ab", "cd"]).score(pipe, **options)
    assert torch.equal(out.log_prob, expected.log_prob)


def test_prompts_of_z_image_are_encoded_once_and_stay_as_they_are():
    """Its `encode_prompt` writes a template into the list that it gets."""
    pipe, prompts = tiny_families.z_image(), ["a b", "c"]
    options = {"num_inference_steps": 2, "num_guidance_steps": 1, "height": 8, "width": 8, "max_sequence_length": 8}
    pipe.tokenizer.chat_template = "zz{{ messages[-1]['content'] }}"
    calls = []
    pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    guide(pipe, prompts, brightness, guidance_scale=0.0, generator=seeded(), **options)
    assert prompts == ["a b", "c"]
    assert len(calls) == 1


def test_text_embeddings_in_lists_are_not_optimised():
    pipe = tiny_families.z_image()
    options = {"num_inference_steps": 2, "num_guidance_steps": 1, "height": 8, "width": 8, "max_sequence_length": 8}
    with pytest.raises(UnsupportedError, match="returns a list of embeddings, of which there is no one tensor"):
        guide(pipe, PROMPTS, brightness, optimise=["text"], **options)


# Kandinsky 2.2, the second of two stages


def test_kandinsky_takes_image_embeddings_and_no_prompts():
    pipe, x = FAMILIES["KandinskyV22"].ours(), 0.5 * FAMILIES["KandinskyV22"].noise()
    embeds = tiny_families.image_embeds()
    options = {"num_guidance_steps": 1, "num_inference_steps": 2, "height": 8, "width": 8}
    message = "is the second of two stages and was given {}; it takes image embeddings. Pass `image_embeds` and"
    with pytest.raises(InputError, match=message.format("a prompt")):
        pipe.log_likelihood(None, PROMPTS, latents=x)
    with pytest.raises(InputError, match=message.format("no `image_embeds`")):
        pipe.log_likelihood(None, latents=x)
    with pytest.raises(InputError, match=message.format("no `negative_image_embeds`")):
        pipe.guide(None, brightness, image_embeds=embeds["image_embeds"], **options)
    with pytest.raises(InputError, match=r"Embeddings are of \{'image_embeds': 3\} prompts; allowed: 2 of each, or 1"):
        pipe.log_likelihood(None, latents=x, image_embeds=torch.zeros(3, 16))
    lists = {name: [row[None] for row in value] for name, value in embeds.items()}  # as the prior's output of each
    results = [pipe.guide(None, brightness, generator=seeded(), **form, **options).rewards for form in (embeds, lists)]
    assert torch.equal(*results)
    with pytest.raises(UnsupportedError, match="its prior alone knows those of the unconditional branch"):
        backbone_of(pipe).null_conditions(2)
    assert torch.equal(backbone_of(pipe).pooled(embeds), embeds["image_embeds"])


# Sizes


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_that_do_not_divide_are_refused(name):
    backbone = FAMILIES[name]
    pipe = backbone.ours()
    assert backbone_of(pipe).size_multiple == backbone.multiple
    side = backbone.multiple // 2
    images = torch.rand(2, 3, side, side, generator=seeded())
    with pytest.raises(InputError, match=f"multiples of {backbone.multiple}"):
        backbone.score(pipe, images=images)
    with pytest.raises(InputError, match=rf"\({side}, {side}\); allowed: positive multiples of {backbone.multiple}"):
        backbone.guide(pipe, brightness, height=side, width=side)


def test_sizes_that_hidream_would_scale_are_refused():
    pipe = tiny_families.hidream()
    options = {"max_sequence_length": 8}
    message = r"\(8, 16\), which the call of HiDreamImagePipeline scales to \(4, 8\), of the area of 8 x 8"
    with pytest.raises(InputError, match=message):
        log_likelihood(pipe, torch.rand(1, 3, 8, 16, generator=seeded()), "a", **options)
    with pytest.raises(InputError, match=message):
        guide(pipe, "a", brightness, height=8, width=16, **options)
    images = torch.rand(1, 3, 4, 16, generator=seeded())
    out = log_likelihood(pipe, images, "a", num_inference_steps=2, generator=seeded(), **options)
    assert torch.isfinite(out.log_prob).all()


def test_tokens_of_another_size_are_refused_by_flux_2():
    pipe, backbone = tiny_families.flux2_klein(), FAMILIES["Flux2Klein"]
    denoiser = test_backbones.PipelineDenoiser(
        pipe, prompt=PROMPTS, height=8, width=16, text_encoder_out_layers=(0, 1, 2)
    )
    with pytest.raises(InputError, match="Packed latents have 2 tokens; allowed: 2 x 4, by `height` and `width`"):
        denoiser.state(backbone_of(pipe).pack(backbone.noise()), 500.0)
    with pytest.raises(InputError, match="Packed latents don't tell the image's shape; give `pixels`"):
        backbone_of(pipe).decode(backbone_of(pipe).pack(backbone.noise()))


# Schedulers


def test_sana_runs_with_both_of_its_schedulers_and_refuses_that_of_sana_sprint():
    backbone = FAMILIES["Sana"]
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow = dataclasses.replace(backbone, make=lambda cls: tiny_families.sana(cls, scheduler=euler))
    test_backbones.test_likelihood_is_that_of_a_loop_over_the_network_itself(flow)
    pipe = tiny_families.sana(scheduler=diffusers.SCMScheduler())
    with pytest.raises(UnsupportedError, match="Noise levels of SCMScheduler are not known"):
        log_likelihood(pipe, None, PROMPTS, latents=backbone.noise())
    pipe = tiny_families.sana(scheduler=diffusers.DDIMScheduler())
    with pytest.raises(UnsupportedError, match="DDIMScheduler, a scheduler of variance-preserving noise"):
        log_likelihood(pipe, None, PROMPTS, latents=backbone.noise())


def test_noise_is_drawn_in_float32_where_the_stock_call_draws_it_so():
    backbone = FAMILIES["ZImage"]
    pipe = backbone.ours().to(dtype=torch.bfloat16)
    noise = backbone_of(pipe).initial_noise(None, 2, backbone.pixels, seeded())
    assert torch.equal(noise, torch.randn(noise.shape, generator=seeded()))
    generators = seeded(), seeded()
    stock = backbone.sample(pipe, generator=generators[0], guided=False)
    assert torch.equal(stock, backbone.sample(pipe, latents=noise, generator=generators[1], guided=False))
