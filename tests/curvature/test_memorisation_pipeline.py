"""Memorisation scores of pipelines: both branches of every family, draws by prompt, an unchanged pipeline."""

import pytest
import tiny
import torch
from pipelines.backbones import BACKBONES

from diffusers_fisher import (
    FiniteDifferenceFisher,
    FisherTraceModel,
    InputError,
    PipelineDenoiser,
    StableDiffusionFisherPipeline,
    StableDiffusionXLFisherPipeline,
    TraceMatchingFisher,
    UnsupportedError,
    denoiser_memorisation,
    guide,
    memorisation,
    memorisation_pictures,
)

PROMPTS = ["a b", "c"]
QUICK = {"num_draws": 2, "height": 8, "width": 8}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe():
    return tiny.one_channel(StableDiffusionFisherPipeline)


def test_equals_the_comparison_of_the_two_denoisers(pipe):
    before = tiny.snapshot(pipe)
    out = pipe.memorisation(PROMPTS, num_draws=3, noise_to_signal=(5.0, 2.0), maps=True, generator=seeded())
    assert tiny.snapshot(pipe) == before
    assert out.noise.shape == (3, 2, 1, 4, 4)
    pair = PipelineDenoiser(pipe, prompt=PROMPTS), PipelineDenoiser(pipe, prompt=["", ""])
    expected = denoiser_memorisation(*pair, out.noise, (5.0, 2.0), num_probes=0)
    assert torch.equal(out.score_differences, expected.score_differences)
    assert (out.score_calls, out.num_denoiser_calls, out.dims) == (15, 27, 16)
    assert out.trace == "FiniteDifferenceFisher, probes per state: 1"
    assert out.image_maps(8, 8).shape == out.image_maps(8, 8, by="score").shape == (2, 8, 8)
    stock = memorisation(tiny.one_channel(), PROMPTS, num_draws=3, noise_to_signal=[5.0, 2.0], generator=seeded())
    assert torch.equal(stock.trace_differences, out.trace_differences)
    assert float(out.score_difference.min()) > 0


def test_a_prompt_has_the_same_draws_and_numbers_in_every_batch(pipe):
    whole = pipe.memorisation(["a", "b", "c"], num_draws=2, generator=seeded())
    for row, prompt in ((2, "c"), (0, "a")):
        alone = pipe.memorisation(prompt, num_draws=2, generator=seeded())
        assert torch.equal(alone.noise[:, 0], whole.noise[:, row])
        for name, rounding in (("score_differences", 1e-7), ("trace_differences", 5e-4)):  # float32 in other batches
            left, right = getattr(alone, name)[:, :, 0], getattr(whole, name)[:, :, row]
            assert torch.allclose(left, right, rtol=1e-3, atol=rounding)


def test_the_empty_prompt_scores_zero(pipe):
    out = pipe.memorisation("", num_draws=1, generator=seeded())
    assert float(out.score_difference) == float(out.trace_difference) == 0


@pytest.mark.parametrize("name", [name for name, backbone in BACKBONES.items() if backbone.condition is not None])
def test_every_family_with_an_unconditional_branch(name):
    backbone = BACKBONES[name]
    pipe = backbone.ours()
    size = dict(zip(("height", "width"), backbone.pixels, strict=True))
    options = {key: value for key, value in backbone.options.items() if key != "use_resolution_binning"}
    if name == "Flux":  # the table's has distilled guidance
        with pytest.raises(UnsupportedError, match="FluxFisherPipeline takes the guidance scale as an input"):
            pipe.memorisation(backbone.condition, num_draws=1, **size, **options)
        pipe = tiny.flux(backbone.cls, texts=True)
    tiny.awaken(pipe.components[backbone.network])
    out = pipe.memorisation(backbone.condition, num_draws=2, maps=True, **size, **options, generator=seeded())
    height, width = backbone.pixels
    assert out.score_maps.shape == out.trace_maps.shape == (2, *backbone.shape)
    assert out.image_maps(height, width).shape == (2, height, width)
    assert out.num_denoiser_calls == 8
    assert float(out.score_difference.min()) > 0
    latents = out.least_memorised_noise()
    assert latents.shape == out.noise.shape[1:]
    assert torch.isfinite(backbone.sample(pipe, latents=latents, steps=2)).all()


def test_the_unconditional_branch_of_guided_calls(pipe):
    """The difference of the two branches is that of the stock call at guidance scales 1 and 2."""
    for each, prompts in ((pipe, PROMPTS), (tiny.stable_diffusion_xl(StableDiffusionXLFisherPipeline), PROMPTS)):
        out = each.memorisation(prompts, num_draws=1, num_probes=0, **{"height": 8, "width": 8}, generator=seeded())
        size = {"prompt": prompts, "height": 8, "width": 8}
        outputs = [PipelineDenoiser(each, scale, **size)(out.noise[0].float(), 999) for scale in (1.0, 2.0)]
        expected = (outputs[1] - outputs[0]).double().square().flatten(1).mean(1)
        assert torch.allclose(out.score_difference, expected, rtol=1e-3)


def test_class_labels_are_compared_with_the_class_beyond_the_last():
    backbone = BACKBONES["DiT"]
    pipe = backbone.ours()
    classes = pipe.transformer.config["num_embeds_ada_norm"]
    pair = [PipelineDenoiser(pipe, class_labels=labels) for labels in ([1, 5], [classes] * 2)]
    out = pipe.memorisation([1, 5], num_draws=1, num_probes=0, height=8, width=8, generator=seeded())
    expected = denoiser_memorisation(*pair, out.noise, num_probes=0)
    assert torch.equal(out.score_differences, expected.score_differences)


def test_a_trace_model_gets_the_condition_of_each_branch():
    pipe = tiny.one_channel(StableDiffusionFisherPipeline)
    torch.manual_seed(1)
    model = FisherTraceModel(1, pooled_channels=16, block_out_channels=(4,), head_channels=8, time_channels=8)
    tiny.awaken(model)
    estimator = TraceMatchingFisher(model, check=False)
    out = pipe.memorisation(PROMPTS, num_draws=2, estimator=estimator, generator=seeded())
    assert out.num_denoiser_calls == out.score_calls == 4
    assert float(out.trace_difference.abs().min()) > 0
    with pytest.raises(InputError, match="TraceMatchingFisher has `pooled` vectors of its own"):
        pipe.memorisation("a", estimator=TraceMatchingFisher(model, pooled=torch.zeros(1, 16), check=False))


def test_noise_is_in_the_precision_of_the_network():
    pipe = tiny.one_channel(StableDiffusionFisherPipeline).to(torch.bfloat16)
    out = pipe.memorisation("a b", num_draws=2, generator=seeded())
    assert out.noise.dtype == torch.bfloat16
    assert torch.isfinite(out.trace_difference).all()
    pipe("a b", latents=out.least_memorised_noise(), num_inference_steps=2, output_type="latent")


def test_guidance_begins_with_the_least_memorised_noise(pipe):
    latents = pipe.memorisation(PROMPTS, num_draws=4, num_probes=0, generator=seeded()).least_memorised_noise()
    best = guide(
        pipe, PROMPTS, lambda images, prompts: images.mean((1, 2, 3)), latents=latents, num_guidance_steps=1,
        num_inference_steps=2, guidance_scale=2.0, output_type="pt",
    )  # fmt: skip
    plain = pipe(PROMPTS, latents=latents, num_inference_steps=2, guidance_scale=2.0, output_type="pt").images
    assert best.rewards[0].tolist() == pytest.approx(plain.mean((1, 2, 3)).tolist(), abs=1e-4)


def test_pictures_have_one_row_per_prompt_and_a_map_per_score(pipe, tmp_path):
    out = pipe.memorisation(PROMPTS, **QUICK, maps=True, generator=seeded())
    figure = memorisation_pictures(out, 8, 8, torch.rand(2, 3, 8, 8, generator=seeded()))
    axes = [each for each in figure.subfigs[0].axes if each.get_images() and each.get_title()]
    assert len(axes) == 3
    maps = axes[2].get_images()[0].get_array()
    assert torch.allclose(torch.as_tensor(maps), out.image_maps(8, 8)[0])
    figure.savefig(tmp_path / "maps.png")
    proxy = pipe.memorisation(PROMPTS, **QUICK, maps=True, num_probes=0, generator=seeded())
    assert len([each for each in memorisation_pictures(proxy, 8, 8).subfigs[0].axes if each.get_title()]) == 1
    with pytest.raises(InputError, match=r"Images have shape \(1, 3, 8, 8\); allowed: \(2, 3, H, W\)"):
        memorisation_pictures(out, 8, 8, torch.rand(1, 3, 8, 8))
    without = pipe.memorisation(PROMPTS, **QUICK, generator=seeded())
    with pytest.raises(InputError, match=r"The maps are None .* Pass `maps=True` to `memorisation`"):
        memorisation_pictures(without, 8, 8)


@pytest.mark.parametrize("name", [name for name, backbone in BACKBONES.items() if backbone.condition is None])
def test_unconditional_pipelines_are_refused(name):
    pipe = BACKBONES[name].ours()
    with pytest.raises(UnsupportedError, match="is unconditional, so it has no prompts to compare"):
        pipe.memorisation("a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": None}, "`prompt` is None; allowed: a string, or a list of strings"),
        ({"prompts": []}, "0 prompts were given"),
        ({"num_draws": 0}, "`num_draws` is 0; allowed: at least 1"),
        ({"noise_to_signal": 100.0}, "`noise_to_signal` is 100.0; allowed: numbers from 14.6"),
        ({"guidance_scale": 3.0}, "`guidance_scale` is 3.0"),
        ({"negative_prompt": "d"}, "`negative_prompt` is 'd'"),
        ({"num_draw": 2}, "`memorisation` does not take `num_draw`. Did you mean `num_draws`"),
        ({"height": 9}, "`height` and `width` are"),
        ({"prompt_embeds": torch.zeros(1, 8, 16)}, "`prompt_embeds` was passed, but the draws of a prompt depend on"),
        ({"generator": [seeded()]}, "1 generators were given for 2 images"),
        ({"estimator": FiniteDifferenceFisher(lambda x, t: x)}, "FiniteDifferenceFisher has a denoiser of its own"),
    ],
)
def test_wrong_arguments_are_refused(pipe, options, message):
    with pytest.raises(InputError, match=message):
        pipe.memorisation(**{"prompts": PROMPTS, **options})
