"""Likelihoods through pipelines: comparisons with shared draws, declared ranges and bins, schemes."""

import math

import numpy
import pytest
import tiny
import torch
from cases import relative
from diffusers.utils.torch_utils import randn_tensor

from diffusers_fisher import (
    AutodiffFisher,
    CoarseGridWarning,
    DDPMFisherPipeline,
    DiTFisherPipeline,
    InputError,
    StableDiffusion3FisherPipeline,
    StableDiffusionFisherPipeline,
    embedded_checkpoint,
    embedded_prompt,
    embedded_test_images,
)

PROMPTS = ["a b", "c", "d"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make():
    return tiny.one_channel(StableDiffusionFisherPipeline)


def pixels():
    return tiny.unconditional(DDPMFisherPipeline, unet=tiny.unconditional_unet(1))


def grey(count=2):
    return torch.randint(0, 256, (count, 1, 8, 8), generator=seeded(4))


def latents(count=2):
    return torch.randn(count, 1, 4, 4, generator=seeded())


# Comparisons


@pytest.mark.parametrize("method", ["squared error", "ode"])
def test_table_holds_the_likelihood_of_each_prompt_with_the_same_draws(method):
    pipe, x = make(), latents()
    options = {"num_inference_steps": 3, "estimator": AutodiffFisher()} if method == "ode" else {"num_levels": 8}
    table = pipe.compare_likelihood(None, PROMPTS, latents=x, method=method, generator=seeded(), **options)
    assert table.log_prob.shape == (3, 2)
    for row, prompt in enumerate(PROMPTS):
        single = pipe.compare_likelihood(None, [prompt], latents=x, method=method, generator=seeded(), **options)
        assert torch.equal(single.log_prob[0], table.log_prob[row])
    if method == "ode":
        out = pipe.log_likelihood(latents=x, prompt=PROMPTS[1], generator=seeded(), **options)
        assert torch.equal(out.log_prob, table.log_prob[1])
        assert torch.equal(out.discretisation_error, table.discretisation_error[1])
        assert relative(table.contributions[:, 0, 1].sum(0), out.trace_log_prob) < 1e-12  # sums in another order
    else:
        assert relative(table.contributions.mean(0), table.log_prob) < 1e-12
    assert table.num_denoiser_calls == 3 * (4 if method == "ode" else 8)
    assert (table.method, table.space, table.dims) == (method, "latent", 16)


def test_orders_and_differences():
    table = make().compare_likelihood(None, PROMPTS, latents=latents(), num_levels=8, generator=seeded())
    difference, error = table.behind_best_prompt()
    assert torch.equal(table.best_prompt, table.log_prob.argmax(0))
    assert torch.equal(table.prompt_order[0], table.best_prompt)
    assert torch.equal(difference, table.log_prob - table.log_prob.max(0).values)
    best = torch.zeros(3, 2, dtype=torch.bool).scatter(0, table.best_prompt[None], True)
    assert not difference[best].any()
    assert not error[best].any()
    assert bool((error[~best] > 0).all())
    image_difference, _ = table.behind_best_image()
    assert torch.equal(image_difference, table.log_prob - table.log_prob.max(1, keepdim=True).values)
    assert torch.equal(table.image_order[:, 0], table.log_prob.argmax(1))


def test_standard_error_of_a_difference_is_that_of_repetitions_and_below_each_sides():
    pipe, x = make(), latents(1)
    tables = [
        pipe.compare_likelihood(None, PROMPTS[:2], latents=x, num_levels=8, generator=seeded(seed))
        for seed in range(30)
    ]
    differences = torch.stack([table.log_prob[0] - table.log_prob[1] for table in tables])
    standard_error = torch.stack([table.behind_best_prompt()[1].max() for table in tables]).square().mean().sqrt()
    # 30 repetitions scatter by 13%; neighbouring strata's means differ, so the claim errs upwards.
    assert 0.6 * float(differences.std()) < float(standard_error) < 4 * float(differences.std())
    assert float(differences.std()) < 0.5 * float(torch.stack([table.log_prob[0] for table in tables]).std())


def test_standard_error_between_images_is_that_of_repetitions():
    pipe, x = make(), latents()
    tables = [
        pipe.compare_likelihood(None, PROMPTS[:1], latents=x, num_levels=8, generator=seeded(seed))
        for seed in range(30)
    ]
    differences = torch.stack([table.log_prob[0, 0] - table.log_prob[0, 1] for table in tables])
    standard_error = torch.stack([table.behind_best_image()[1].max() for table in tables]).square().mean().sqrt()
    # As above: 30 repetitions scatter by 13%, and the claim errs upwards.
    assert 0.6 * float(differences.std()) < float(standard_error) < 4 * float(differences.std())
    difference, error = tables[0].behind_best_image()
    best = difference == 0
    assert not error[best].any() and bool((error[~best] > 0).all())


def test_standard_error_between_images_by_the_ode_has_the_probes_of_both():
    options = {"method": "ode", "num_inference_steps": 3, "estimator": AutodiffFisher(), "generator": seeded()}
    table = make().compare_likelihood(None, PROMPTS, latents=latents(), num_probes=4, fixed_probes=True, **options)
    _, error = table.behind_best_image()
    difference = (table.contributions[..., 0] - table.contributions[..., 1]).sum(0)
    assert relative(error.max(1).values, difference.std(0) / 2) < 1e-12  # the root of four probes
    assert int((error == 0).sum()) == 3  # the best against itself


@pytest.mark.parametrize("method", ["squared error", "ode"])
def test_draws_that_are_not_seeded_come_from_the_generator_that_is_replayed(monkeypatch, method):
    """Without a generator, noise on a GPU would come from the GPU's own generator, which is not replayed."""
    generators = []

    def draw(*arguments, **options):
        generators.append(options["generator"])
        return randn_tensor(*arguments, **options)

    monkeypatch.setattr("diffusers.utils.torch_utils.randn_tensor", draw)
    pipe, x = make(), latents()
    options = {"num_inference_steps": 3, "num_probes": 2} if method == "ode" else {"num_levels": 4}
    torch.manual_seed(0)
    table = pipe.compare_likelihood(None, PROMPTS, latents=x, method=method, **options)
    if method == "squared error":
        assert generators and all(generator is torch.default_generator for generator in generators)
    torch.manual_seed(0)
    seeded_table = pipe.compare_likelihood(None, PROMPTS, latents=x, method=method, generator=seeded(), **options)
    assert torch.equal(table.log_prob, seeded_table.log_prob)


def test_probes_pair_prompts_by_the_ode():
    options = {"method": "ode", "num_inference_steps": 3, "estimator": AutodiffFisher(), "generator": seeded()}
    pipe, x = make(), latents()
    table = pipe.compare_likelihood(None, PROMPTS, latents=x, num_probes=4, fixed_probes=True, **options)
    _, error = table.behind_best_prompt()
    totals = table.contributions.sum(0)
    draws = totals - totals.gather(1, table.best_prompt.expand(4, 1, 2))
    assert relative(error, draws.std(0) / 2) < 1e-12  # the root of four probes
    exact = pipe.compare_likelihood(None, PROMPTS, latents=x, num_probes=None, **options)
    assert exact.contributions.shape == (4, 0, 3, 2)
    assert not exact.behind_best_prompt()[1].any()
    single_probe = pipe.compare_likelihood(None, PROMPTS, latents=x, num_probes=1, fixed_probes=True, **options)
    assert bool(torch.isinf(single_probe.behind_best_prompt()[1]).sum() == 4)  # all but the best against itself


@pytest.mark.slow  # many repetitions: a minute and a half
@pytest.mark.parametrize("num_probes", [1, 2])
def test_standard_error_of_prompts_by_fresh_directions_is_that_of_repetitions(num_probes):
    options = {"method": "ode", "num_inference_steps": 16, "num_probes": num_probes}
    pipe, x = make(), latents(1)
    tables = [
        pipe.compare_likelihood(None, PROMPTS[:2], latents=x, generator=seeded(seed), **options) for seed in range(30)
    ]
    differences = torch.stack([table.log_prob[0] - table.log_prob[1] for table in tables])
    error = torch.stack([table.behind_best_prompt()[1].max() for table in tables]).square().mean().sqrt()
    # 30 repetitions scatter by 13%. With one probe per level the bend of the course counts as scatter.
    assert 0.6 * float(differences.std()) < float(error) < (4 if num_probes == 1 else 1.6) * float(differences.std())


def test_generator_advances_once_and_determines_all_draws():
    pipe, generator = make(), seeded()
    options = {"latents": latents(), "num_levels": 4}
    first = pipe.compare_likelihood(None, PROMPTS, generator=generator, **options)
    second = pipe.compare_likelihood(None, PROMPTS, generator=generator, **options)
    assert not torch.equal(first.log_prob, second.log_prob)
    assert torch.equal(pipe.compare_likelihood(None, PROMPTS, generator=seeded(), **options).log_prob, first.log_prob)


def test_labels_flow_models_and_no_prompts():
    dit = tiny.dit(DiTFisherPipeline)
    table = dit.compare_likelihood(None, [0, 3], latents=torch.randn(2, 4, 4, 4, generator=seeded()), num_levels=4)
    assert table.log_prob.shape == (2, 2)
    flow = tiny.stable_diffusion_3(StableDiffusion3FisherPipeline, texts=True)
    size = flow.transformer.config.in_channels
    x = torch.randn(2, size, 4, 4, generator=seeded())
    table = flow.compare_likelihood(None, ["a", "b"], latents=x, num_levels=4, max_sequence_length=8)
    assert table.log_prob.shape == (2, 2)
    table = pixels().compare_likelihood(grey().float() / 255, num_levels=4, bins=256)
    assert (table.log_prob.shape, table.space) == ((1, 2), "pixel")


def test_comparison_leaves_everything_as_it_was():
    pipe = make()
    before = tiny.snapshot(pipe)
    pipe.compare_likelihood(None, PROMPTS, latents=latents(), num_levels=4, generator=seeded())
    assert tiny.snapshot(pipe) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "a"}, "`prompts` is 'a' .str.; allowed: a sequence with entries"),
        ({"prompts": []}, r"`prompts` is \[\]; allowed: a list"),
        ({"prompts": ["a"], "method": "elbo"}, "`method` is 'elbo'; allowed: squared error, ode"),
        ({"prompts": ["a"], "num_levels": 3}, "`num_levels` is 3; allowed: even, at least 4"),
        ({"prompts": ["a"], "num_levels": 0}, "`num_levels` is 0; allowed: even, at least 4"),
        (
            {"prompts": ["a"], "guidance_scale": 4.0},
            r"`guidance_scale` is 4\.0; likelihoods and curvature are at 1\.0",
        ),
        ({"prompt": ["a"]}, "`compare_likelihood` takes its prompts as `prompts`"),
        ({"prompts": ["a"], "prompt": "b", "method": "ode"}, "`compare_likelihood` takes its prompts as `prompts`"),
        (
            {"prompts": ["a"], "num_inference_steps": 9},
            "`num_inference_steps` belongs to method='ode'; 'squared error'",
        ),
        ({"prompts": ["a"], "estimator": AutodiffFisher()}, "`estimator` belongs to method='ode'"),
        (
            {"prompts": ["a"], "num_levels": 8, "method": "ode"},
            "`num_levels` belongs to method 'squared error'; 'ode'",
        ),
        ({"prompts": ["a"], "levels": 8}, "`compare_likelihood` does not take `levels`. Did you mean `num_levels`"),
        (
            {"prompts": ["a"], "negative_prompt": "b"},
            "`negative_prompt` is 'b'; likelihoods and curvature are without guidance",
        ),
        ({"prompts": ["a"], "bins": 256}, "`bins` is 256, but StableDiffusionFisherPipeline is in latents"),
        ({"prompts": ["a"], "prior_mean": 0.0}, "Give both `prior_mean` and `prior_variance`"),
    ],
)
def test_comparison_refuses_bad_arguments(arguments, message):
    pipe = make()
    with pytest.raises(InputError, match=message):
        pipe.compare_likelihood(None, latents=latents(), **arguments)


def test_text_of_the_comparison():
    table = make().compare_likelihood(None, PROMPTS, latents=latents(), num_levels=8, generator=seeded())
    difference, error = table.behind_best_prompt()
    lines = str(table).splitlines()
    assert lines[0].endswith(
        f"under {len(PROMPTS)} prompts, by method 'squared error' with {8 * len(PROMPTS)} denoiser calls"
    )
    for index, line in enumerate(lines[1:]):
        second = table.prompt_order[1, index]
        gap, gap_error = -float(difference[second, index]), float(error[second, index])
        best = int(table.best_prompt[index])
        assert (
            line == f"  image {index}: prompt {best} is likeliest, the next by {gap:.4g} +- {gap_error:.2g} nats less"
        )


def test_own_class_is_likelier_than_others_on_the_trained_checkpoint():
    pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    images, labels = embedded_test_images()
    classes = [1, 7, 8]  # trouser, sneaker and bag, which do not look alike
    indices = [int((labels == label).nonzero()[0]) for label in classes]
    prompts = [embedded_prompt(label) for label in classes]
    table = pipe.compare_likelihood(images[indices], prompts, num_levels=48, generator=seeded())
    assert table.best_prompt.tolist() == [0, 1, 2]
    difference, error = table.behind_best_prompt()
    others = error > 0
    assert bool((difference[others] < -2 * error[others]).all())


# Ranges and bins


def test_range_of_the_data_does_not_change_the_likelihood():
    pipe, bits = pixels(), grey()
    options = {"num_inference_steps": 3, "num_probes": 1}
    expected = pipe.log_likelihood(bits.float() / 255, generator=seeded(), **options).log_prob
    array = bits.permute(0, 2, 3, 1).numpy().astype(numpy.uint8)
    forms = [(bits, (0, 255)), (bits.float(), (0.0, 255.0)), (array, (0, 255)), (bits.float() / 127.5 - 1, (-1, 1))]
    for images, data_range in forms:
        out = pipe.log_likelihood(images, data_range=data_range, generator=seeded(), **options)
        # float32 images on another scale are rounded elsewhere
        torch.testing.assert_close(out.log_prob, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("images", "data_range", "message"),
    [
        (
            grey().float(),
            (0, 1),
            r"values from 0 to 25\d; allowed: floating point in \[0, 1\], .* such as `data_range=\(0, 255\)`",
        ),
        (grey(), (0, 100), r"values from 0 to 25\d; allowed: numbers in \[0, 100\], without NaN. Declare the range"),
        (grey().float() / 255, (1, 0), r"`data_range` is \(1, 0\); allowed: two finite numbers, the lower first"),
        (grey().float() / 255, (0, math.inf), r"`data_range` is \(0, inf\).*; allowed"),
    ],
)
def test_images_outside_their_range_are_refused(images, data_range, message):
    with pytest.raises(InputError, match=message):
        pixels().log_likelihood(images, data_range=data_range)


def test_bins_give_bits_of_discrete_images():
    pipe, images = pixels(), grey().float() / 255
    options = {"num_inference_steps": 3, "num_probes": None}
    density = pipe.log_likelihood(images, generator=seeded(), **options)
    out = pipe.log_likelihood(images, bins=256, generator=seeded(), **options)
    assert (density.offset_bits, out.offset_bits) == (0.0, pytest.approx(math.log2(127.5)))
    assert out.space == "pixel"
    assert relative(out.bits_per_dim, -out.log_prob / (64 * math.log(2)) + math.log2(127.5)) < 1e-15
    # Half a bin to each side of 8-bit pixels changes an untrained network's density a little.
    assert 0 < float((out.log_prob - density.log_prob).abs().max()) < 0.1 * float(density.log_prob.abs().max())
    repeat, other = (pipe.log_likelihood(images, bins=256, generator=seeded(seed), **options) for seed in (0, 1))
    assert torch.equal(repeat.log_prob, out.log_prob)
    assert not torch.equal(other.log_prob, out.log_prob)
    with pytest.raises(InputError, match=r"lie up to 0\.\d\d bins beside the 16 values"):
        pipe.log_likelihood(images, bins=16)
    with pytest.raises(InputError, match="`bins` is 256, but StableDiffusionFisherPipeline is in latents"):
        make().log_likelihood(latents=latents(), bins=256)


# Schemes and warnings


def test_scheme_reaches_the_solver_and_few_steps_give_a_warning():
    pipe = make()
    options = {"latents": latents(), "estimator": AutodiffFisher(), "num_probes": None}
    with pytest.warns(CoarseGridWarning, match=r"grid of 3 steps is coarse: .* up to \d+\.\d{3} bits/dim"):
        out = pipe.log_likelihood(num_inference_steps=3, scheme="euler", **options)
    assert out.scheme == "euler"
    with pytest.raises(InputError, match="`scheme` is 'heun'; allowed: euler, trapezoid, adams3, adams4"):
        pipe.log_likelihood(num_inference_steps=3, scheme="heun", **options)
