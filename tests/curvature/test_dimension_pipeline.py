"""The intrinsic dimension of images under a pipeline, on stock and on our classes, and its picture."""

import numpy
import pytest
import tiny
import torch
from pipelines.backbones import BACKBONES

from diffusers_fisher import (
    AutodiffFisher,
    FiniteDifferenceFisher,
    InputError,
    PipelineDenoiser,
    StableDiffusionFisherPipeline,
    TraceMatchingFisher,
    dimension_plot,
    embedded_checkpoint,
    embedded_prompt,
    embedded_test_images,
    intrinsic_dimension,
)
from diffusers_fisher.curvature import denoiser_intrinsic_dimension
from diffusers_fisher.fisher import LevelFisher

PROMPTS = ["a b", "c"]
QUICK = {"noise_to_signal": [0.1, 0.2, 0.4]}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def latents(count=2):
    return torch.randn(count, 1, 4, 4, generator=seeded())


@pytest.fixture(scope="module")
def pipe():
    return tiny.one_channel(StableDiffusionFisherPipeline)


def test_equals_that_of_the_pipelines_denoiser(pipe):
    out = pipe.intrinsic_dimension(None, PROMPTS, latents=latents(), **QUICK, generator=seeded())
    denoiser = PipelineDenoiser(pipe, prompt=PROMPTS)
    expected = denoiser_intrinsic_dimension(
        denoiser, latents(), FiniteDifferenceFisher(), **QUICK, num_probes=1, generator=seeded()
    )
    assert torch.equal(out.curve, expected.curve)
    function = intrinsic_dimension(pipe, None, PROMPTS, latents=latents(), **QUICK, generator=seeded())
    assert torch.equal(function.value, out.value)
    assert (out.num_denoiser_calls, out.space, out.dims) == (6, "latent", 16)


def test_exact_traces_are_what_many_directions_estimate(pipe):
    options = {"latents": latents(), **QUICK}
    exact = pipe.intrinsic_dimension(None, PROMPTS, estimator=AutodiffFisher(), num_probes=None, **options)
    probes = pipe.intrinsic_dimension(None, PROMPTS, num_probes=16, generator=seeded(), **options)
    distances = (probes.curve - exact.curve) / probes.curve_error
    assert float((distances.abs() < 3).double().mean()) > 0.95
    assert not exact.curve_error.any()


@pytest.mark.parametrize("name", BACKBONES)
def test_every_family_has_a_dimension(name):
    backbone = BACKBONES[name]
    first = () if backbone.condition is None else (backbone.condition,)
    table = LevelFisher(torch.tensor([0.1, 1.0]), torch.tensor([0.8, 0.3]))
    out = backbone.ours().intrinsic_dimension(
        None, *first, latents=0.5 * backbone.noise(), estimator=table, noise_to_signal=[0.3, 1.0]
    )
    assert torch.isfinite(out.curve).all()
    assert out.curve.shape == (2, len(backbone.noise()))
    assert out.dims == backbone.noise()[0].numel()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 3.0}, "guidance"),
        ({"negative_prompt": "d"}, "`negative_prompt` is 'd'; likelihoods and curvature are without guidance"),
        ({"num_probe": 2}, "`intrinsic_dimension` does not take `num_probe`. Did you mean `num_probes`"),
        ({"num_probes": 0}, "`num_probes` is 0; allowed: at least 1, or None for the exact trace"),
        ({"noise_to_signal": 100.0}, "`noise_to_signal` goes from 100 to 100; the schedule of "),
        ({"image_keys": ["a"]}, "1 image keys were given for 2 images"),
    ],
)
def test_wrong_arguments_are_refused(pipe, options, message):
    with pytest.raises(InputError, match=message):
        pipe.intrinsic_dimension(None, "a", latents=latents(), **{**QUICK, **options})


def test_trace_models_state_the_error_of_their_calibration():
    pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    images, labels = (tensor[:6] for tensor in embedded_test_images())
    prompts = [embedded_prompt(int(label)) for label in labels]
    levels = [0.1, 0.2, 0.4, 0.8]
    model = pipe.intrinsic_dimension(images, prompts, noise_to_signal=levels)
    probes = pipe.intrinsic_dimension(
        images, prompts, noise_to_signal=levels, estimator=FiniteDifferenceFisher(), num_probes=4, generator=seeded()
    )
    assert model.trace == "TraceMatchingFisher (target jacobian), no probes"
    assert model.num_denoiser_calls == 4
    known = TraceMatchingFisher(pipe.trace_model).calibration.error_at(model.noise_to_signal.log())
    assert torch.allclose(model.curve_error, 256 * known[:, None].expand(4, 6))
    error = torch.hypot(model.curve_error, probes.curve_error)
    assert float(((model.curve - probes.curve) / error).abs().max()) < 4
    assert bool((model.standard_error <= model.curve_error.max()).all())
    pipe.trace_model.register_to_config(calibration=None)
    unknown = pipe.intrinsic_dimension(images, prompts, noise_to_signal=levels)
    assert bool(unknown.standard_error.isinf().all())
    assert torch.equal(unknown.curve, model.curve)


def test_the_picture_shows_the_curve_its_error_and_the_plateau(pipe, tmp_path):
    options = {"latents": latents(), **QUICK}
    exact = pipe.intrinsic_dimension(None, PROMPTS, estimator=AutodiffFisher(), num_probes=None, **options)
    probes = pipe.intrinsic_dimension(None, PROMPTS, generator=seeded(), **options)
    figure = dimension_plot({"exact": exact, "one direction": probes}, index=1)
    (axes,) = figure.axes
    for curve, out in zip(axes.get_lines(), (exact, probes), strict=True):
        numpy.testing.assert_allclose(curve.get_xdata(), out.noise_to_signal)
        numpy.testing.assert_allclose(curve.get_ydata(), out.curve[:, 1])
    plateaus = [each for each in axes.collections if hasattr(each, "get_segments")]
    for line, out in zip(plateaus, (exact, probes), strict=True):
        (segment,) = line.get_segments()
        numpy.testing.assert_allclose(segment[:, 0], out.plateau[1])
        numpy.testing.assert_allclose(segment[:, 1], float(out.value[1]))
    assert len(axes.collections) == 3  # the exact trace has no band
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts[0] == f"exact: {float(exact.value[1]):.1f} +- 0.0"
    figure.savefig(tmp_path / "dimension.png")
    assert (tmp_path / "dimension.png").stat().st_size > 10_000
    with pytest.raises(InputError, match="give at least one name with an output of `intrinsic_dimension`"):
        dimension_plot({})
    with pytest.raises(InputError, match="`index` is 2; 'exact' has the images 0 to 1"):
        dimension_plot({"exact": exact}, 2)
