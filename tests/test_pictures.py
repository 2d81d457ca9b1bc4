"""Pictures of the Fisher have the right axes with the right data, and are saved to files that open."""

import sys

import numpy
import pytest
import tiny
import torch
from cases import latents
from diffusers import DDIMScheduler
from PIL import Image
from trace_cases import GaussianData, GaussianDenoiser

from diffusers_fisher import (
    AutodiffFisher,
    DenoisingState,
    DirectFisher,
    EndpointFisher,
    Estimate,
    FiniteDifferenceFisher,
    InputError,
    NoiseLevel,
    PipelineDenoiser,
    UnsupportedError,
)
from diffusers_fisher.fisher import rademacher
from diffusers_fisher.likelihood import Integration, integrate_log_likelihood
from diffusers_fisher.likelihood.output import likelihood_plot
from diffusers_fisher.noise import Prediction
from diffusers_fisher.pictures import decode_latents, fisher_pictures, trace_plot

SHAPE = (2, 4, 8, 8)


def endpoint_operator():
    """Returns an operator whose least curved direction is x_0 - E[x_0|x_t], and x_0.

    Every other direction has the curvature 1/sigma^2.
    """
    level = NoiseLevel(torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64))
    x, output, endpoint = (latents(torch.float32, SHAPE, seed) for seed in (1, 2, 3))
    return EndpointFisher(centred=True)(DenoisingState(x, output, level, Prediction("epsilon")), endpoint), endpoint


def pictures_of(part):
    """Returns for each column of one group its title, its pictures and the lines of text below them."""
    columns = {}
    for axes in part.axes:
        if axes.get_images():
            column = axes.get_subplotspec().colspan.start
            title, images, notes = columns.setdefault(column, ([], [], []))
            title.append(axes.get_title())
            images.append(numpy.asarray(axes.get_images()[0].get_array()))
            notes.append(axes.get_xlabel())
    return [(title[0], images, notes) for _, (title, images, notes) in sorted(columns.items())]


@pytest.fixture(scope="module")
def pipe():
    return tiny.stable_diffusion()


def test_pictures_show_the_mean_the_diagonal_and_the_moves(pipe):
    operator, endpoint = endpoint_operator()
    figure = fisher_pictures(pipe, operator, count=2, scale=0.5)
    names = [part.get_suptitle() for part in figure.subfigs]
    assert names == [" ", "most curved, 1", "most curved, 2", "least curved, 1", "least curved, 2"]
    (mean_title, means, _), (diagonal_title, diagonals, _) = pictures_of(figure.subfigs[0])
    assert "x_0|x_t" in mean_title
    assert "diagonal" in diagonal_title
    mean = operator.state.pred_original_sample
    pixels = decode_latents(pipe, mean).permute(0, 2, 3, 1).numpy()
    diagonal = (0.36 * operator.diagonal().value).mean(1).numpy()
    offset = endpoint - mean
    sizes, lengths = (tensor.flatten(1).norm(dim=1) for tensor in (mean, offset))
    move = 0.5 * (sizes / lengths).view(2, 1, 1, 1) * offset
    (_, minus, _), (_, plus, notes), (_, differences, _) = pictures_of(figure.subfigs[3])
    for row in range(2):
        numpy.testing.assert_allclose(means[row], pixels[row], atol=1e-6)
        numpy.testing.assert_allclose(diagonals[row], diagonal[row], rtol=1e-6)
        ends = [decode_latents(pipe, mean + sign * move)[row].permute(1, 2, 0).numpy() for sign in (-1, 1)]
        moves = [minus[row], plus[row]]
        if numpy.abs(moves[0] - ends[0]).max() > numpy.abs(moves[0] - ends[1]).max():
            ends.reverse()  # an eigenvector has no sign
        numpy.testing.assert_allclose(moves, ends, atol=2e-3)  # eigenvectors in float32, to 1e-4 of the eigenvalue
        numpy.testing.assert_allclose(differences[row], (moves[1] - moves[0]).mean(-1), atol=1e-6)
        assert numpy.abs(differences[row]).max() > 0.01
        least = 1 - (0.8 / 0.6) ** 2 * float(lengths[row]) ** 2  # eigenvalues of sigma^2 F
        assert float(notes[row].split("=")[1]) == pytest.approx(least, rel=5e-3)
    _, (_, _, notes), _ = pictures_of(figure.subfigs[1])
    assert [float(note.split("=")[1]) for note in notes] == pytest.approx([1, 1], abs=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pictures_of_a_network_are_saved_and_open(pipe, dtype, tmp_path):
    pipe = tiny.stable_diffusion().to(dtype)
    denoiser, shape = PipelineDenoiser(pipe, prompt=["a b"]), (1, 4, 4, 4)
    state = denoiser.state(latents(torch.float32, shape), 300)
    if dtype is torch.float32:
        operator = AutodiffFisher(denoiser)(state)
        probes = rademacher(4, state.sample, torch.Generator().manual_seed(0))
    else:
        operator, probes = EndpointFisher(centred=True)(state, latents(torch.float32, shape, seed=3)), None
    figure = fisher_pictures(pipe, operator, probes=probes)
    assert [part.get_suptitle() for part in figure.subfigs] == [" ", "most curved", "least curved"]
    for part in figure.subfigs:
        for _, images, _ in pictures_of(part):
            assert len(images) == 1
            assert all(numpy.isfinite(image).all() for image in images)
    figure.savefig(tmp_path / "fisher.png")
    with Image.open(tmp_path / "fisher.png") as image:
        image.load()
        assert image.size == tuple(int(side * figure.dpi) for side in figure.get_size_inches())


def test_a_decoder_takes_the_place_of_the_pipeline():
    operator, _ = endpoint_operator()

    def decode(latents):
        return latents[:, :3].sigmoid()

    figure = fisher_pictures(None, operator, decode=decode)
    (_, means, _), _ = pictures_of(figure.subfigs[0])
    expected = decode(operator.state.pred_original_sample).permute(0, 2, 3, 1).numpy()
    numpy.testing.assert_allclose(means, expected, atol=1e-6)


def test_states_and_arguments_without_a_picture_raise_an_error(pipe):
    operator, _ = endpoint_operator()
    packed = DenoisingState(
        latents(shape=(2, 3, 4)), latents(shape=(2, 3, 4)), operator.state.level, operator.state.prediction
    )
    with pytest.raises(InputError, match=r"Samples have shape \(2, 3, 4\); allowed: \(B, C, H, W\), latents before"):
        fisher_pictures(pipe, DirectFisher()(packed))
    for scale in (0.0, -1.0):
        with pytest.raises(InputError, match=r"`scale` is .*; allowed: positive, such as 0.3 of the posterior mean's"):
            fisher_pictures(pipe, operator, scale=scale)
    for scale in (float("inf"), float("nan")):
        with pytest.raises(InputError, match=r"`scale` is (inf|nan) \(float\); allowed: a finite number"):
            fisher_pictures(pipe, operator, scale=scale)
    with pytest.raises(InputError, match="`count` is 0; allowed: 1 to 255"):
        fisher_pictures(pipe, operator, count=0)
    with pytest.raises(
        InputError, match="There is no pipeline to decode with; pass one, or `decode`, a function from latents"
    ):
        fisher_pictures(None, operator)
    with pytest.raises(UnsupportedError, match="knows products with one side"):
        fisher_pictures(pipe, FiniteDifferenceFisher(lambda x, t: x)(operator.state))


# Traces against the noise level

LEVELS = NoiseLevel.from_log_noise_to_signal(torch.linspace(-3, 3, 5))


def line(scale, error=0.0):
    """Returns estimates of two samples with sigma^2 tr F = 12 `scale` and 6 `scale`."""
    values = torch.tensor([12.0, 6.0], dtype=torch.float64) * scale / LEVELS.sigma[:, None] ** 2
    errors = torch.tensor([3.0, 4.0], dtype=torch.float64) * error / LEVELS.sigma[:, None] ** 2
    return [Estimate(value, error, value[None], 4, 4) for value, error in zip(values, errors, strict=True)]


@pytest.mark.parametrize("dimensions", [None, 12])
def test_traces_are_drawn_with_their_error_bands(dimensions):
    figure = trace_plot(
        LEVELS, {"exact": line(1.0), "noisy": line(0.5, 0.1), "one probe": line(0.3, torch.inf)}, dimensions
    )
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["exact", "noisy", "one probe"]
    for curve, scale in zip(axes.get_lines(), (1.0, 0.5, 0.3), strict=True):
        numpy.testing.assert_allclose(curve.get_xdata(), LEVELS.noise_to_signal, rtol=1e-12)
        expected = 9 * scale if dimensions is None else 1 - 9 * scale / 12
        numpy.testing.assert_allclose(curve.get_ydata(), expected, rtol=1e-12)
    (band,) = axes.collections  # the exact line and the line with an unknown error have no band
    height = band.get_datalim(axes.transData).height
    # The band has two standard errors of the mean to each side; the two samples have the errors 0.3 and 0.4.
    assert height == pytest.approx(2 * 2 * 0.5 / 2 / (dimensions or 1))
    assert ("sigma" in axes.get_ylabel()) and (("/d" in axes.get_ylabel()) is (dimensions is not None))


def test_levels_as_a_list_give_a_plot_that_is_saved(tmp_path):
    levels = [NoiseLevel(alpha, sigma) for alpha, sigma in zip(LEVELS.alpha, LEVELS.sigma, strict=True)]
    figure = trace_plot(levels, {"exact": line(1.0)})
    numpy.testing.assert_allclose(figure.axes[0].get_lines()[0].get_xdata(), LEVELS.noise_to_signal, rtol=1e-12)
    figure.savefig(tmp_path / "trace.png")
    with Image.open(tmp_path / "trace.png") as image:
        image.load()
        assert min(image.size) > 300


@pytest.mark.parametrize(
    ("levels", "estimates", "message"),
    [
        ([], {"exact": []}, "There are no noise levels; give at least one"),
        (LEVELS, {}, "There are no estimates; give at least one name"),
        (LEVELS, {"exact": line(1.0)[:3]}, "'exact' has 3 estimates for 5 levels; give one per level"),
        (
            LEVELS, {"exact": [Estimate.exact(torch.ones(2, 3), 0)] * 5},
            r"'exact' has values of shapes \[\(2, 3\)\]; allowed: \(B,\), as of `operator.trace`",
        ),
    ],
)  # fmt: skip
def test_traces_that_do_not_fit_raise_an_error(levels, estimates, message):
    with pytest.raises(InputError, match=message):
        trace_plot(levels, estimates)


def test_no_global_state_of_matplotlib_is_touched():
    import matplotlib

    before, pyplot = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    trace_plot(LEVELS, {"exact": line(1.0)})
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) is pyplot


# Likelihoods by level


def scored(num_probes=None):
    data = GaussianData((2, 8, 8), "dct")
    denoiser = GaussianDenoiser(data, DDIMScheduler())
    samples, generator = data.sample(3, torch.Generator().manual_seed(0)).float(), torch.Generator().manual_seed(1)
    options = Integration(num_steps=12, num_probes=num_probes, generator=generator)
    return integrate_log_likelihood(denoiser, samples, FiniteDifferenceFisher(denoiser), options)


def test_one_image_is_drawn_by_level_with_the_band_of_its_directions(tmp_path):
    exact, one = scored(), scored(1)
    figure = likelihood_plot({"exact": exact, "one direction": one}, index=2)
    (axes,) = figure.axes
    for curve, out in zip(axes.get_lines(), (exact, one), strict=True):
        numpy.testing.assert_allclose(curve.get_xdata(), out.noise_to_signal)
        numpy.testing.assert_allclose(curve.get_ydata(), out.unexplained_noise_fraction[:, 2])
    (band,) = axes.collections  # the exact trace has none
    heights = [path.get_extents().height for path in band.get_paths()]
    width = 2 * one.unexplained_noise_error[:, 2]
    r = one.unexplained_noise_fraction[:, 2]
    assert heights[0] == pytest.approx(float((r + width).max() - (r - width).min()))
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert f"{float(exact.bits_per_dim[2]):.3f}" in texts[0] and f"{float(one.total_error_bits[2]):.3f}" in texts[1]
    figure.savefig(tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 10_000


def test_stated_errors_by_level_are_those_of_the_directions():
    exact, one = scored(), scored(1)
    true = one.unexplained_noise_fraction - exact.unexplained_noise_fraction
    # A third of 39 levels are those that count, so that the root mean square is known to 20%. (At the ends the errors
    # are tiny, and the stated ones less so: there the difference of neighbouring levels is larger than the noise.)
    ratio = one.unexplained_noise_error.square().mean() / true.square().mean()
    assert 0.6 < float(ratio.sqrt()) < 1.6
    assert not exact.unexplained_noise_error.any()


def test_likelihoods_that_can_not_be_drawn_are_refused():
    with pytest.raises(
        InputError, match="There are no outputs; give at least one name with an output of `log_likelihood`"
    ):
        likelihood_plot({})
    with pytest.raises(InputError, match="`index` is 3; 'exact' has the images 0 to 2"):
        likelihood_plot({"exact": scored()}, 3)
