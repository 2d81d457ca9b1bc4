"""Comparisons of checkpoints by shared directions, and held-out likelihoods in training loops."""

import copy
import math

import pytest
import tiny
import torch
from cases import relative
from diffusers import DDPMPipeline

from diffusers_fisher import (
    AutodiffFisher,
    HeldOutLikelihood,
    InputError,
    PipelineDenoiser,
    StableDiffusionFisherPipeline,
    compare_checkpoints,
    log_likelihood,
)
from diffusers_fisher.models import autoencoder_differences

QUICK = {"num_inference_steps": 4}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=3, seed=3):
    return torch.rand(count, 3, 8, 8, generator=seeded(seed))


def checkpoints(change=0.1, **components):
    """Makes a pipeline, and one whose network is a little different: the two share no object."""
    first = tiny.one_channel(**components)
    tiny.awaken(first.unet)
    second = tiny.one_channel(unet=copy.deepcopy(first.unet), **components)
    with torch.no_grad():
        for parameter in second.unet.parameters():
            parameter.mul_(1 + change * torch.randn(parameter.shape, generator=seeded()))
    return first, second


# Comparisons


def test_every_row_is_the_likelihood_by_the_same_directions():
    pipes = checkpoints()
    table = compare_checkpoints(pipes, images(), "a", generator=seeded(), **QUICK)
    assert table.log_prob.shape == (2, 3)
    for pipe, row in zip(pipes, table.log_prob, strict=True):
        # Differences divide the rounding of float32, which depends on the place in memory, by their length.
        assert relative(log_likelihood(pipe, images(), "a", generator=seeded(), **QUICK).log_prob, row) < 5e-3
    difference = table.differences()
    assert torch.equal(difference.log_prob, table.log_prob - table.log_prob[0])
    assert not difference.standard_error[0].any() and bool((difference.standard_error[1] > 0).all())
    assert torch.equal(table.differences(1).log_prob[1], torch.zeros(3, dtype=torch.float64))
    assert relative(difference.to_bits(difference.log_prob), table.bits_per_dim[0] - table.bits_per_dim) < 1e-9
    assert table.num_denoiser_calls == 2 * 2 * 5
    with pytest.raises(InputError, match="`reference` is 2; allowed: 0 to 1, a checkpoint's place"):
        table.differences(2)


def test_errors_of_the_mean_are_the_scatter_over_images_and_the_part_of_the_probes():
    table = compare_checkpoints(checkpoints(), images(5), "a", generator=seeded(), **QUICK)
    difference = table.differences()
    scatter = difference.log_prob[1].std() / 5**0.5
    assert relative(difference.mean_standard_error[1], scatter) < 1e-12
    assert relative(difference.mean_probe_error[1], difference.standard_error[1].norm() / 5) < 1e-12
    assert float(difference.mean_standard_error[0]) == 0
    assert (
        float(compare_checkpoints(checkpoints(), images(1), **QUICK).differences().mean_standard_error[1]) == math.inf
    )


def test_error_of_the_difference_is_that_of_repetitions_and_below_each_sides():
    pipes = checkpoints(change=0.005)
    tables = [compare_checkpoints(pipes, images(1), "a", generator=seeded(seed), **QUICK) for seed in range(10)]
    spread = torch.stack([table.differences().log_prob[1] for table in tables]).std()
    stated = torch.stack([table.differences().standard_error[1] for table in tables]).square().mean().sqrt()
    # 10 repetitions scatter by 24%; with one direction per level the bend of the course is in the stated error too.
    assert 0.5 * float(spread) < float(stated) < 3 * float(spread)
    assert float(spread) < 0.3 * float(torch.stack([table.log_prob[0] for table in tables]).std())


def test_all_checkpoints_have_the_prior_of_the_first_that_has_statistics():
    first, second = checkpoints()
    ours = StableDiffusionFisherPipeline(**second.components, requires_safety_checker=False)
    ours.set_progress_bar_config(disable=True)
    ours.latent_statistics = torch.full((1, 4, 4), 0.3), torch.full((1, 4, 4), 2.0)
    table = compare_checkpoints([first, ours], images(), generator=seeded(), **QUICK)
    moments = {"prior_mean": 0.3, "prior_variance": 2.0}
    expected = log_likelihood(first, images(), generator=seeded(), **moments, **QUICK).log_prob
    assert relative(table.log_prob[0], expected) < 1e-7  # 0.3 was float32
    standard = log_likelihood(first, images(), generator=seeded(), **QUICK)
    assert standard.prior == "standard"  # nothing was set on the pipeline
    assert relative(standard.log_prob, expected) > 1e-5


def test_text_names_every_checkpoint():
    text = str(compare_checkpoints(checkpoints(), images(), "a", generator=seeded(), **QUICK))
    assert "3 latent samples under 2 checkpoints, with 20 denoiser calls" in text
    assert "checkpoint 1:" in text and "by the probes); likelier for" in text


def test_equal_autoencoders_agree_and_others_say_what_differs():
    torch.manual_seed(0)
    first = tiny.vae()
    assert autoencoder_differences(first, copy.deepcopy(first)) == []
    assert autoencoder_differences(first, copy.deepcopy(first).to(torch.bfloat16)) == []
    scaled = tiny.vae(scaling_factor=0.5)
    scaled.load_state_dict(first.state_dict())
    assert autoencoder_differences(first, scaled) == ["`scaling_factor` is 0.18215 and 0.5"]
    (words,) = autoencoder_differences(first, tiny.vae())
    assert words.startswith("weights, by about ")
    assert autoencoder_differences(first, tiny.vae(latent_channels=2)) == ["names or shapes of parameters"]


def other_autoencoder():
    first, second = checkpoints()
    torch.manual_seed(1)
    second.vae = tiny.vae(latent_channels=1)
    return [first, second]


def other_schedule():
    first, second = checkpoints()
    second.scheduler = tiny.scheduler(beta_end=0.02)
    return [first, second]


def bound_estimator():
    first, second = checkpoints()
    return {"pipes": [first, second], "estimator": AutodiffFisher(PipelineDenoiser(first, prompt="a"))}


def pixels():
    return tiny.unconditional(DDPMPipeline, unet=tiny.unconditional_unet(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: {"pipes": [tiny.one_channel()]}, "`pipes` has 1 pipelines; allowed: two or more"),
        (lambda: {"pipes": other_autoencoder()}, r"autoencoders of checkpoints 0 and 1 differ \(weights, by about"),
        (lambda: {"pipes": [tiny.one_channel(), pixels()]}, "checkpoint 1 .DDPMPipeline. in pixel space"),
        (lambda: {"pipes": other_schedule()}, "those of checkpoint 1 .*, so their densities are smoothed differently"),
        (bound_estimator, "AutodiffFisher has a denoiser, but each checkpoint needs its own"),
    ],
)
def test_what_can_not_be_compared_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        compare_checkpoints(**{"images": images(1), **arguments(), **QUICK})


# Training loops


def test_record_has_the_likelihoods_and_their_change_by_the_same_directions():
    first, second = checkpoints()
    lines = []
    callback = HeldOutLikelihood(
        images(), "a", pipe=first, every=10, training_images=images(2, 8), training_prompts=["b", "c"],
        report=lines.append, **QUICK,
    )  # fmt: skip
    before, nothing, after = callback(0, first), callback(5, first), callback(10, {"unet": second.unet})
    assert nothing is None and callback.history == [before, after]
    table = compare_checkpoints([first, second], images(), "a", generator=seeded(), **QUICK)
    bits = table.differences()
    # Differences divide the rounding of float32, which depends on the place in memory, by their length.
    assert relative(after.held_out.change, -bits.to_bits(bits.log_prob[1])) < 5e-3
    assert after.held_out.change_error == pytest.approx(float(bits.to_bits(bits.mean_standard_error[1])), rel=5e-3)
    out = log_likelihood(first, images(2, 8), ["b", "c"], generator=seeded(), **QUICK)
    assert relative(before.training.bits_per_dim, out.bits_per_dim) < 5e-3
    stated = float(out.to_bits(out.standard_error).norm()) / 2
    assert before.training.mean_standard_error == pytest.approx(stated, rel=5e-3)
    assert lines == [str(before), str(after)]
    assert lines[0].startswith(f"step 0: held-out {before.held_out.mean:.4f} +- ") and "since" not in lines[0]
    assert f"({after.held_out.mean_change:+.4f} +- {after.held_out.change_error:.4f} since step 0)" in lines[1]
    assert lines[1].count("since step 0") == 2


@pytest.mark.parametrize(("training", "grad"), [(True, True), (False, False)])
def test_nothing_is_left_behind(training, grad):
    pipe, _ = checkpoints()
    pipe.unet.train(training)
    pipe.unet.mid_block.eval()  # a part that is frozen
    pipe.unet.conv_in.weight.grad = torch.ones_like(pipe.unet.conv_in.weight)
    modes = [part.training for part in pipe.unet.modules()]
    callback = HeldOutLikelihood(images(1), "a", report=None, **QUICK)
    with torch.set_grad_enabled(grad):
        content = tiny.snapshot(pipe)
        callback(0, pipe)
        assert tiny.snapshot(pipe) == content  # random states and the grad mode too
    assert [part.training for part in pipe.unet.modules()] == modes
    assert bool((pipe.unet.conv_in.weight.grad == 1).all())


def test_modes_are_restored_after_an_error():
    pipe, _ = checkpoints()
    pipe.unet.train()
    with pytest.raises(InputError, match="num_inference_steps"):
        HeldOutLikelihood(images(1), num_inference_steps=1)(0, pipe)
    assert pipe.unet.training


def test_networks_are_in_eval_mode():
    first = tiny.one_channel(unet=tiny.unet(in_channels=1, out_channels=1, sample_size=4, dropout=0.5))
    tiny.awaken(first.unet)
    callback = HeldOutLikelihood(images(1), report=None, **QUICK)
    records = []
    for mode in (True, False):
        first.unet.train(mode)
        records.append(callback(0, first))
    assert torch.equal(records[0].held_out.bits_per_dim, records[1].held_out.bits_per_dim)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda: HeldOutLikelihood(images(), every=0), None, "`every` is 0; allowed: 1 or more steps"),
        (lambda: HeldOutLikelihood(images()), {"unet": tiny.unet()}, r"modules \['unet'\], but no pipeline that they"),
        (
            lambda: HeldOutLikelihood(images(), pipe=tiny.one_channel()),
            {"transformer": tiny.unet()},
            r"modules \['transformer'\], which StableDiffusionPipeline lacks; allowed: \[.*'unet'",
        ),
    ],
)
def test_wrong_arguments_of_the_callback_are_refused(make, arguments, message):
    with pytest.raises(InputError, match=message):
        make()(0, arguments)
