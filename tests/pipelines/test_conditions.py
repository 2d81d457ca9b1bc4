"""Conditions of backbones: prompts, embeddings with the tensors that belong to them, labels, embedded guidance."""

import functools

import diffusers
import pytest
import tiny
import torch

from diffusers_fisher import (
    InputError,
    PipelineDenoiser,
    UnsupportedError,
    custom_pipeline_file,
    fisher_pipeline,
)
from diffusers_fisher.backbones import backbone_of
from diffusers_fisher.pictures import decode_latents
from pipelines.backbones import BACKBONES, PROMPTS

NAN = float("nan")
TEXTS = [name for name, backbone in BACKBONES.items() if backbone.condition is PROMPTS]
POOLED = ["StableDiffusionXL", "StableDiffusion3", "Flux"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def brightness(images, conditions):
    return images.mean((1, 2, 3))


def score(backbone, pipe, *conditions, **options):
    options = {"num_inference_steps": 2, "num_probes": 1, "step_halving": False, "generator": seeded(), **options}
    latents = options.pop("latents", 0.5 * backbone.noise())
    return pipe.log_likelihood(None, *conditions, latents=latents, **options).log_prob


def guide(backbone, pipe, *conditions, reward=brightness, **options):
    options = {
        "num_inference_steps": 2,
        "num_guidance_steps": 1,
        "generator": seeded(),
        "output_type": "pt",
        **options,
    }
    height, width = backbone.pixels
    return pipe.guide(*conditions, reward, **{"height": height, "width": width, **options})


def embeddings(backbone, pipe):
    """Returns the call arguments that stand for `PROMPTS`, without arguments for guidance."""
    length = backbone.options.get("max_sequence_length")
    options = {} if length is None else {"max_sequence_length": length}
    with torch.no_grad():
        if backbone.name == "StableDiffusion":
            embeds, negative = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
            return {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
        if backbone.name in ("StableDiffusionXL", "StableDiffusion3"):
            texts = [PROMPTS] * (3 if backbone.name == "StableDiffusion3" else 1)
            names = [
                "prompt_embeds",
                "negative_prompt_embeds",
                "pooled_prompt_embeds",
                "negative_pooled_prompt_embeds",
            ]
            return dict(
                zip(names, pipe.encode_prompt(*texts, do_classifier_free_guidance=True, **options), strict=True)
            )
        if backbone.name == "Flux":
            embeds, pooled, _ = pipe.encode_prompt(PROMPTS, None, **options)
            return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        names = ["prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"]
        return dict(zip(names, pipe.encode_prompt(PROMPTS, True, **options), strict=True))


@pytest.mark.parametrize("name", TEXTS)
def test_embeddings_stand_for_their_prompts(name):
    backbone = BACKBONES[name]
    pipe = backbone.ours()
    options = {key: value for key, value in backbone.options.items() if key == "max_sequence_length"}
    embeds = embeddings(backbone, pipe)
    positive = {key: value for key, value in embeds.items() if not key.startswith("negative")}
    assert torch.equal(score(backbone, pipe, PROMPTS, **options), score(backbone, pipe, **positive, **options))
    prompts = guide(backbone, pipe, PROMPTS, num_images_per_prompt=2, **options)
    embedded = guide(backbone, pipe, None, num_images_per_prompt=2, **embeds, **options)
    assert prompts.rewards.shape == (2, 4)
    # Text encoders round otherwise in a batch of twice the size.
    torch.testing.assert_close(prompts.rewards, embedded.rewards, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(prompts.latents, embedded.latents, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", TEXTS)
def test_one_embedding_stands_for_all_images(name):
    backbone = BACKBONES[name]
    pipe = backbone.ours()
    embeds = {key: value[:1] for key, value in embeddings(backbone, pipe).items() if not key.startswith("negative")}
    pairs = {key: torch.cat([value, value]) for key, value in embeds.items()}
    assert torch.equal(score(backbone, pipe, **embeds), score(backbone, pipe, **pairs))


@pytest.mark.parametrize("name", [*POOLED, "PixArtAlpha", "PixArtSigma"])
def test_incomplete_embeddings_are_refused_before_any_evaluation(name):
    backbone = BACKBONES[name]
    pipe = backbone.ours()
    twin = "pooled_prompt_embeds" if name in POOLED else "prompt_attention_mask"
    embeds = embeddings(backbone, pipe)
    message = f"was given `prompt_embeds` without `{twin}`; they belong together, as the pipeline's `encode_prompt`"
    incomplete = {key: value for key, value in embeds.items() if key != twin}
    for call in (lambda: score(backbone, pipe, **incomplete), lambda: guide(backbone, pipe, None, **incomplete)):
        with pytest.raises(InputError, match=message):
            call()
    with pytest.raises(InputError, match=f"was given no `prompt_embeds`, `{twin}`" if name in POOLED else "was given"):
        guide(
            backbone, pipe, None, negative_prompt_embeds=embeds.get("negative_prompt_embeds", embeds["prompt_embeds"])
        )
    incomplete_negatives = {key: value for key, value in embeds.items() if key != f"negative_{twin}"}
    if "negative_prompt_embeds" in embeds:
        with pytest.raises(InputError, match=f"was given `negative_prompt_embeds` without `negative_{twin}`"):
            guide(backbone, pipe, None, **incomplete_negatives)


def test_embeddings_beside_a_prompt_or_of_another_number_are_refused():
    backbone = BACKBONES["StableDiffusion"]
    pipe = backbone.ours()
    embeds = embeddings(backbone, pipe)["prompt_embeds"]
    with pytest.raises(InputError, match="Give either `prompt` or `prompt_embeds`: exactly one of them"):
        score(backbone, pipe, PROMPTS, prompt_embeds=embeds)
    with pytest.raises(
        InputError, match=r"Embeddings are of \{'prompt_embeds': 3\} prompts; allowed: 2 of each, or 1"
    ):
        score(backbone, pipe, prompt_embeds=torch.cat([embeds, embeds[:1]]))
    with pytest.raises(InputError, match=r"'negative_prompt_embeds': 1\} prompts; allowed: 2 of each\."):
        guide(backbone, pipe, None, prompt_embeds=embeds, negative_prompt_embeds=embeds[:1])
    with pytest.raises(InputError, match="`num_images_per_prompt` is 0; allowed: at least 1"):
        guide(backbone, pipe, None, prompt_embeds=embeds, num_images_per_prompt=0)


@pytest.mark.parametrize("name", POOLED)
def test_prompts_of_the_other_encoders_are_one_per_image(name):
    backbone = BACKBONES[name]
    pipe = backbone.ours()
    options = {key: value for key, value in backbone.options.items() if key == "max_sequence_length"}
    values = [score(backbone, pipe, PROMPTS, prompt_2=text, **options) for text in ("d", ["d", "d"], "e")]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
    with pytest.raises(InputError, match="`prompt_2` has 3 entries for 2 prompts; give one string, or one for each"):
        guide(backbone, pipe, PROMPTS, prompt_2=["a"] * 3, **options)


# Guidance scales


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "Flux"])
def test_likelihood_with_guidance_is_refused(name):
    backbone = BACKBONES[name]
    with pytest.raises(
        InputError, match=r"`guidance_scale` is 4\.0; likelihoods and curvature are at 1.0, because a guided output"
    ):
        backbone.score(backbone.ours(), latents=backbone.noise(), guidance_scale=4.0)


def test_guidance_of_flux_is_an_input_and_its_true_guidance_is_refused():
    backbone = BACKBONES["Flux"]
    pipe = backbone.ours()
    options = {"max_sequence_length": 8}
    default, same, other = (score(backbone, pipe, PROMPTS, **options, **scale) for scale in (
        {}, {"guidance_scale": 3.5}, {"guidance_scale": 1.0}
    ))  # fmt: skip
    assert torch.equal(default, same)
    assert not torch.equal(default, other)
    with pytest.raises(
        InputError, match=r"`true_cfg_scale` is 2\.0; likelihoods and curvature are at 1.0, because a guided output"
    ):
        score(backbone, pipe, PROMPTS, true_cfg_scale=2.0, **options)


def test_true_guidance_of_flux_is_the_pipelines_own_evaluation():
    """Its call encodes twice, prompts and negative prompts, and the denoiser must remember both."""
    backbone = BACKBONES["Flux"]
    pipe, x = backbone.ours(), backbone.noise()
    tokens = backbone_of(pipe).pack(x)
    arguments = {"prompt": PROMPTS, "negative_prompt": ["d", "e"], "true_cfg_scale": 3.0, "max_sequence_length": 8}
    arguments |= {"height": 8, "width": 8}
    denoiser = PipelineDenoiser(pipe, 3.5, **arguments)
    with torch.no_grad():
        sides = [
            PipelineDenoiser(pipe, 3.5, **{**arguments, "prompt": prompt, "true_cfg_scale": 1.0}).model_output(
                tokens, 500
            )
            for prompt in (arguments["prompt"], arguments["negative_prompt"])
        ]
    expected = sides[1] + 3.0 * (sides[0] - sides[1])
    for _ in range(2):
        assert torch.equal(denoiser.model_output(tokens, 500), expected)


# Labels, and nothing


def test_class_labels():
    backbone = BACKBONES["DiT"]
    pipe, reward_labels = backbone.ours(), []
    values = [score(backbone, pipe, labels) for labels in (3, [3, 3], torch.tensor([3, 3]), [3, 4])]
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])
    assert not torch.equal(values[0], values[3])

    def reward(images, labels):
        reward_labels.append(list(labels))
        return brightness(images, labels)

    guide(backbone, pipe, [7, 2], reward=reward, num_images_per_prompt=2)
    assert reward_labels[-1] == [7, 7, 2, 2]


LABELS = {
    "too large": ([1000, 1], r"`class_labels` is \[1000, 1\]; allowed: numbers from 0 to 999, at least one"),
    "negative": ([-1, 1], r"`class_labels` is \[-1, 1\]; allowed: numbers from 0 to 999"),
    "none": ([], r"`class_labels` is \[\]; allowed"),
    "None": (None, "`class_labels` is None; allowed"),
    "names": (["cat", "dog"], r"`class_labels` is \['cat', 'dog'\]; allowed: numbers"),
    "too many": ([1, 2, 3], "`class_labels` has 3 entries for 2 images; give one, or one per image"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_wrong_class_labels_are_refused(kind):
    backbone, (labels, message) = BACKBONES["DiT"], LABELS[kind]
    with pytest.raises(InputError, match=message):
        score(backbone, backbone.ours(), labels)
    with pytest.raises(InputError, match="`num_images_per_prompt` is 0; allowed: at least 1"):
        guide(backbone, backbone.ours(), [1], num_images_per_prompt=0)


@pytest.mark.parametrize("name", ["DDPM", "DDIM", "LDM"])
def test_unconditional_pipelines_take_no_prompt(name):
    backbone = BACKBONES[name]
    pipe = backbone.ours()
    with pytest.raises(InputError, match=f"{name}FisherPipeline is unconditional; it takes no `prompt`"):
        backbone.score(pipe, latents=backbone.noise(), prompt="a")
    with pytest.raises(InputError, match="`batch_size` is 0; allowed: at least 1"):
        pipe.guide(brightness, batch_size=0)
    out = guide(backbone, pipe, batch_size=3)
    assert out.rewards.shape == (2, 3)


@pytest.mark.parametrize("name", ["DDPM", "DDIM", "LDM", "DiT"])
def test_latents_that_do_not_fit_the_call_are_refused(name):
    backbone = BACKBONES[name]
    with pytest.raises(InputError, match=r"`latents` have shape \(3, .* allowed: \(2, \d, h, w\)"):
        backbone.sample(backbone.ours(), latents=backbone.noise(3))


def test_call_with_latents_leaves_the_autoencoder_as_it_was():
    backbone = BACKBONES["DiT"]
    pipe = backbone.ours()
    pipe.vae.decode = wrapper = pipe.vae.decode  # a user's own wrapper
    before = tiny.snapshot(pipe)
    during = []
    handle = pipe.transformer.register_forward_hook(lambda *_: during.append(vars(pipe.vae)["decode"] is wrapper))
    backbone.sample(pipe, latents=backbone.noise())
    handle.remove()
    assert during and all(during)
    assert all(tiny.snapshot(pipe)[part] == before[part] for part in ("attributes", "config", "modules"))
    assert vars(pipe.vae)["decode"] is wrapper


# Schedulers, sizes, classes


WRONG = {
    "StableDiffusion": (
        diffusers.FlowMatchEulerDiscreteScheduler,
        "flow matching, .* variance-preserving noise. Use DDIM",
    ),
    "StableDiffusion3": (diffusers.DDIMScheduler, "variance-preserving noise, .* flow matching. Use FlowMatchEuler"),
    "Flux": (diffusers.EulerDiscreteScheduler, "variance-preserving noise, .* flow matching. Use FlowMatchEuler"),
    "DDPM": (
        diffusers.EulerDiscreteScheduler,
        "whose noise and model input must be scaled, which the stock call does",
    ),
    "DiT": (diffusers.HeunDiscreteScheduler, "whose noise and model input must be scaled, which the stock call does"),
}


@pytest.mark.parametrize("name", WRONG)
def test_scheduler_of_another_family_is_refused(name):
    backbone, (scheduler, message) = BACKBONES[name], WRONG[name]
    pipe = backbone.ours()
    pipe.scheduler = scheduler()
    message = f"{name}FisherPipeline was given {scheduler.__name__}, .*{message}"
    with pytest.raises(UnsupportedError, match=message):
        backbone.score(pipe, latents=backbone.noise())
    with pytest.raises(UnsupportedError, match=message):
        backbone.guide(pipe, brightness)
    with pytest.raises(UnsupportedError, match=message):
        PipelineDenoiser(pipe, **backbone.call)


def test_ddim_keeps_its_own_kind_of_scheduler_and_replaces_others():
    from diffusers_fisher import DDIMFisherPipeline, FisherDDIMScheduler

    ours = FisherDDIMScheduler.from_config(tiny.scheduler().config)
    assert tiny.unconditional(DDIMFisherPipeline, scheduler=ours).scheduler is ours
    other = diffusers.DDPMScheduler(beta_end=0.01)
    result = tiny.unconditional(DDIMFisherPipeline, scheduler=other).scheduler
    assert type(result) is diffusers.DDIMScheduler
    assert result.config.beta_end == 0.01


@pytest.mark.parametrize("name", BACKBONES)
def test_sizes_that_do_not_divide_are_refused(name):
    backbone = BACKBONES[name]
    pipe, multiple = backbone.ours(), backbone.multiple
    size = multiple + multiple // 2
    with pytest.raises(InputError, match=rf"Images are {multiple}x{size} pixels; .* multiples of {multiple}\."):
        backbone.score(pipe, images=torch.full((2, 3, multiple, size), 0.5))
    with pytest.raises(
        InputError, match=rf"`height` and `width` are \({size}, {multiple}\); .* multiples of {multiple}"
    ):
        backbone.guide(pipe, brightness, height=size, width=multiple)


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "StableDiffusion3"])  # any size but 0 divides
def test_latents_that_do_not_divide_are_refused(name):
    backbone = BACKBONES[name]
    with pytest.raises(InputError, match=r"Latents have shape .* h and w multiples of \d"):
        backbone.score(backbone.ours(), latents=torch.zeros(2, *backbone.shape[:2], 3))


def test_grey_images_of_a_pixel_model():
    from PIL import Image

    from diffusers_fisher import DDPMFisherPipeline

    pipe = tiny.unconditional(DDPMFisherPipeline, unet=tiny.unconditional_unet(1))
    images = torch.randint(0, 256, (2, 1, 8, 8), generator=seeded()).float() / 255
    options = {"num_inference_steps": 2, "num_probes": 1, "step_halving": False}
    expected = pipe.log_likelihood(images, generator=seeded(), **options).log_prob
    pictures = [Image.fromarray((255 * image[0]).round().byte().numpy()) for image in images]
    assert torch.equal(pipe.log_likelihood(pictures, generator=seeded(), **options).log_prob, expected)
    with pytest.raises(InputError, match=r"shape \(2, 3, 8, 8\); allowed: grey PIL, array \(B, H, W, 1\)"):
        pipe.log_likelihood(torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("cls", [diffusers.KandinskyPipeline, diffusers.StableDiffusionImg2ImgPipeline, dict])
def test_error_for_a_class_without_a_fisher_version_lists_the_supported_classes(cls):
    message = rf"no Fisher version of {cls.__name__}; supported: .*DDIMPipeline, .*differentiable\(\.\.\.\)"
    with pytest.raises(UnsupportedError, match=message):
        fisher_pipeline(cls)


def test_custom_pipeline_file_of_an_unknown_class_is_refused():
    with pytest.raises(
        UnsupportedError, match=r"There is no pipeline 'FooFisherPipeline'; there are: .*DDIMFisherPipeline"
    ):
        custom_pipeline_file("FooFisherPipeline")


@pytest.mark.parametrize("name", ["StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "PixArtSigma"])
def test_negative_embeddings_of_another_length_are_refused(name):
    backbone = BACKBONES[name]
    pipe = backbone.ours()
    embeds = embeddings(backbone, pipe)
    shorter_negatives = {**embeds, "negative_prompt_embeds": embeds["negative_prompt_embeds"][:, :-1]}
    count, width = embeds["prompt_embeds"].shape[1:]
    words = (
        rf"`prompt_embeds` and `negative_prompt_embeds` have shapes \({count}, {width}\) and \({count - 1}, {width}\)"
    )
    with pytest.raises(InputError, match=words):
        guide(backbone, pipe, None, **shorter_negatives)


def test_labels_of_dit_are_passed_on():
    stock = tiny.dit(lambda **parts: diffusers.DiTPipeline(**parts, id2label={"0": "tench", "1": "goldfish"}))
    assert fisher_pipeline(stock).get_label_ids(["goldfish"]) == [1]


def test_packed_latents_need_a_size_to_be_decoded():
    backbone = BACKBONES["Flux"]
    with pytest.raises(InputError, match="Packed latents don't tell the image's shape; give `pixels`"):
        backbone_of(backbone.ours()).decode(torch.zeros(1, 4, 16))


# Autoencoders of Stable Diffusion XL


def test_standardised_latents_of_stable_diffusion_xl():
    backbone = BACKBONES["StableDiffusionXL"]
    pipe = backbone.ours()
    mean, deviation = [0.1, -0.2, 0.3, 0.4], [0.5, 1.0, 2.0, 1.5]
    pipe.vae.register_to_config(latents_mean=mean, latents_std=deviation)
    x = backbone.noise()
    images = backbone_of(pipe).decode(x).detach()
    expected = backbone.sample(pipe, latents=x, steps=1, output_type="latent")
    assert torch.equal(
        torch.from_numpy(backbone.sample(pipe, latents=x, steps=1, output_type="np")).permute(0, 3, 1, 2),
        backbone_of(pipe).decode(expected).detach(),
    )
    stock = backbone.stock(**pipe.components)
    for decode in (backbone_of(stock).decode, functools.partial(decode_latents, stock)):
        assert torch.equal(decode(x), images)
    shift, scale = (torch.tensor(values).view(1, 4, 1, 1) for values in (mean, deviation))
    with torch.no_grad():
        standardised = (
            (pipe.vae.encode(2 * images - 1).latent_dist.mean - shift) * pipe.vae.config.scaling_factor / scale
        )
    torch.testing.assert_close(backbone_of(pipe).samples_of(images), standardised)


def test_half_precision_autoencoder_of_stable_diffusion_xl_is_refused():
    backbone = BACKBONES["StableDiffusionXL"]
    pipe = backbone.ours()
    pipe.vae.half()
    with pytest.raises(InputError, match=r"overflows in float16, .* Call pipe.vae.to\(torch.float32\)"):
        pipe.log_likelihood(torch.rand(2, 3, 8, 8), PROMPTS)
    with pytest.raises(InputError, match="overflows in float16"):
        guide(backbone, pipe, PROMPTS)


def test_watermark_of_stable_diffusion_xl_is_applied():
    class Watermark:
        def apply_watermark(self, images):
            return -images

    backbone = BACKBONES["StableDiffusionXL"]
    pipe = backbone.ours()
    stock_images = guide(backbone, pipe, PROMPTS).images
    pipe.watermark = Watermark()
    torch.testing.assert_close(guide(backbone, pipe, PROMPTS).images, 1 - stock_images)
