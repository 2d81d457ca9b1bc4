"""Kinds of arguments: what is taken, what is refused in words, and what no longer happens in silence."""

import numpy
import pytest
import tiny
import torch
from diffusers import DDPMScheduler, EulerAncestralDiscreteScheduler

from diffusers_fisher import (
    AutodiffFisher,
    DirectFisher,
    InputError,
    Integration,
    NumericalError,
    PipelineDenoiser,
    StableDiffusionFisherPipeline,
    WeightedReward,
    guide,
    integrate_log_likelihood,
    posterior_guidance,
)
from diffusers_fisher.arguments import LARGEST, check_kinds, hints_of

QUICK = {"num_inference_steps": 2, "estimator": DirectFisher()}


def seeded():
    return torch.Generator().manual_seed(0)


def noise(*shape):
    return torch.randn(*shape, generator=seeded())


def bright(images, prompts):
    return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def pipe():
    return tiny.stable_diffusion(StableDiffusionFisherPipeline)


# The check itself


@check_kinds
def function(count: int, scale: float = 1.0, size: "tuple[float, float]" = (0, 1), names: "list[str] | None" = None):
    return count, scale, size, names


@check_kinds
def with_tensor(scale: "float | torch.Tensor", *more: int, unknown: "NotImported | None" = None):  # noqa: F821
    return scale, more, unknown


def test_numpy_scalars_become_those_of_python():
    result = function(numpy.int64(3), numpy.float32(0.5), names=[numpy.str_("a")])
    assert result == (3, 0.5, (0, 1), ["a"])
    assert [type(entry) for entry in result] == [int, float, tuple, list]


def test_arguments_that_fit_are_the_same_objects():
    names = ["a", "b"]
    assert function(1, 2, (0.0, 1.0), names)[3] is names
    assert function(1, 2)[1] == 2
    assert type(function(1, 2)[1]) is int


def test_lists_stand_for_tuples():
    assert function(1, size=[0, 255])[2] == (0, 255)


MISFITS = {
    "whole float": ({"count": 20.0}, r"`count` is 20.0 \(float\); allowed: a whole number. Write 20"),
    "text": ({"count": "2"}, r"`count` is '2' \(str\); allowed: a whole number"),
    "truth": ({"count": True}, r"`count` is True \(bool\); allowed: a whole number"),
    "NaN": ({"scale": float("nan")}, r"`scale` is nan \(float\); allowed: a finite number"),
    "infinity": ({"scale": float("inf")}, "`scale` is inf"),
    "beyond floats": ({"scale": 10**400}, "allowed: a finite number"),
    "three": ({"size": (0, 1, 2)}, r"`size` is .*; allowed: a tuple of 2 \(a finite number, a finite number\)"),
    "text in a tuple": ({"size": (0, "1")}, "`size` is"),
    "one string": ({"names": "ab"}, r"`names` is 'ab' \(str\); allowed: a list with entries of a string or None"),
    "class": ({"names": list}, r"`names` is the class list; .* Pass an object of it: list\(...\)"),
    "object": ({"names": object()}, "`names` is a object"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_other_kinds_are_refused(kind):
    arguments, message = MISFITS[kind]
    with pytest.raises(InputError, match=message):
        function(**{"count": 1, **arguments})


def test_annotations_for_type_checkers_alone_are_not_checked():
    assert with_tensor(float("nan"), 1, 2, unknown=3)[1:] == ((1, 2), 3)
    assert "unknown" not in hints_of(with_tensor)
    with pytest.raises(InputError, match=r"`scale` is 'a' .* allowed: a finite number or a tensor"):
        with_tensor("a")


# The doors

LIKELIHOOD = {
    "steps": ({"num_inference_steps": 20.0}, "`num_inference_steps` is 20.0 .* Write 20"),
    "many steps": ({"num_inference_steps": 10**9}, "`num_inference_steps` is 1000000000; allowed: at most 10000"),
    "probes": ({"num_probes": "2"}, "`num_probes` is '2' .* allowed: a whole number, 'auto' or None"),
    "many probes": ({"num_probes": 10**6}, "`num_probes` is 1000000 for samples of 256 dimensions; pass None"),
    "seed": ({"generator": 42}, r"`generator` is 42 \(int\); allowed: a torch.Generator, a list"),
    "generators": ({"generator": [seeded(), seeded()]}, "2 generators were given for 3 images; give one, or as many"),
    "range": ({"data_range": 255}, r"`data_range` is 255 \(int\); allowed: a tuple of 2"),
    "copies": ({"num_images_per_prompt": 3}, "`num_images_per_prompt` belongs to a sampling run, and"),
    "tuple": ({"return_dict": False}, "`return_dict` belongs to a sampling run"),
    "guidance": ({"guidance_scale": float("nan")}, "`guidance_scale` is nan"),
    "clip": ({"clip_skip": "1"}, "`clip_skip` is '1' .* allowed: a whole number or None"),
    "layer": ({"clip_skip": 99}, "The call's arguments don't suit `encode_prompt` of .*: IndexError"),
    "embedding": ({"prompt": None, "prompt_embeds": [1.0]}, "`prompt_embeds` is .* allowed: a tensor or None"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LIKELIHOOD)
def test_likelihoods_refuse_other_kinds(kind, pipe):
    arguments, message = LIKELIHOOD[kind]
    with pytest.raises(InputError, match=message):
        pipe.log_likelihood(torch.rand(3, 3, 16, 16), **{**QUICK, "prompt": "a", **arguments})


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_latents_that_are_no_floats_are_refused(dtype, pipe):
    latents = torch.zeros(1, 4, 8, 8, dtype=dtype)
    with pytest.raises(InputError, match=f"`latents`: got dtype {dtype}; allowed: real floating-point numbers"):
        pipe.log_likelihood(prompt="a", latents=latents, **QUICK)
    with pytest.raises(InputError, match=f"`latents`: got dtype {dtype}"):
        pipe.guide("a", bright, latents=latents, num_inference_steps=2)


class OneArgument(torch.nn.Module):
    def forward(self, images):
        return images.mean((1, 2, 3))


GUIDE = {
    "module": ({"reward": OneArgument()}, r"'OneArgument' can't be called as reward\(images, prompts\): too many"),
    "reward class": ({"reward": OneArgument}, "`reward` is the class OneArgument; .* Pass an object of it"),
    "seed": ({"generator": 0}, "`generator` is 0"),
    "more steps than trained": ({"num_inference_steps": 2000}, "2000; DDIMScheduler allows at most 1000, .* It said"),
    "huge image": ({"height": 10**6}, "`height` is 1000000; allowed: at most 16384"),
    "copies": ({"num_images_per_prompt": 10**9}, "`num_images_per_prompt` is 1000000000; allowed: at most 10000"),
    "NaN scale": ({"guidance_scale": float("nan")}, "`guidance_scale` is nan"),
    "sparse": ({"optimizer": "SparseAdam"}, "makes a SparseAdam, which can't step by a dense gradient"),
    "rescale": ({"guidance_rescale": None}, "`guidance_rescale` is None; allowed: a finite number"),
}  # fmt: skip


@pytest.mark.parametrize("kind", GUIDE)
def test_guidance_refuses_other_kinds(kind, pipe):
    arguments, message = GUIDE[kind]
    before = tiny.snapshot(pipe)
    with pytest.raises(InputError, match=message):
        pipe.guide("a", **{"reward": bright, "generator": seeded(), "num_inference_steps": 2, **arguments})
    assert tiny.snapshot(pipe) == before


def test_numpy_numbers_are_taken_as_those_of_python(pipe):
    options = {"num_inference_steps": 2, "output_type": "pt"}
    results = [
        pipe.guide("a", bright, num_guidance_steps=kind(1), generator=seeded(), **options).images
        for kind in (int, numpy.int64)
    ]
    assert torch.equal(*results)


def test_guidance_honours_copies_and_tuples(pipe):
    result = pipe.guide(
        "a", bright, num_images_per_prompt=2, return_dict=False, num_guidance_steps=0, num_inference_steps=2
    )
    assert isinstance(result, tuple)
    assert len(result[0]) == 2


def test_posterior_guidance_refuses_a_class_as_reward_and_a_decoder_without_tensors(pipe):
    with pytest.raises(InputError, match="`reward` is the class OneArgument"):
        posterior_guidance(pipe, OneArgument)
    message = "The result of `decode`: got a int; allowed: a tensor"
    with pytest.raises(InputError, match=message), posterior_guidance(pipe, bright, decode=len) as guidance:
        pipe("a", num_inference_steps=2, output_type="latent", callback_on_step_end=guidance)


def test_more_probes_than_dimensions_are_refused_before_any_evaluation(pipe):
    denoiser = PipelineDenoiser(pipe, prompt="a")
    with pytest.raises(InputError, match="`num_probes` is 300 for samples of 256 dimensions; pass None"):
        integrate_log_likelihood(denoiser, noise(1, 4, 8, 8), DirectFisher(), Integration(num_probes=300))
    assert denoiser.num_calls == 0


def test_largest_values_are_allowed():
    @check_kinds
    def steps(num_inference_steps: int):
        return num_inference_steps

    largest = LARGEST["num_inference_steps"]
    assert steps(largest) == largest
    with pytest.raises(InputError, match=f"{largest + 1}; allowed: at most {largest}"):
        steps(largest + 1)


def test_weights_of_rewards_are_numbers_and_rewards_no_classes():
    with pytest.raises(InputError, match="`weight` is 'a'"):
        WeightedReward(("a", bright))
    with pytest.raises(InputError, match="The reward is the class OneArgument"):
        WeightedReward((1.0, OneArgument))


# No silent nonsense


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
@pytest.mark.parametrize(
    "product", ["matvec", "covariance", "original_jacobian", "epsilon_jacobian", "output_jacobian"]
)
@pytest.mark.parametrize("estimator", [AutodiffFisher, DirectFisher])
def test_operators_refuse_vectors_that_are_no_floats(estimator, product, dtype, pipe):
    denoiser = PipelineDenoiser(pipe, prompt="a")
    operator = estimator().bind(denoiser)(denoiser.state(noise(1, 4, 8, 8), 500))
    with pytest.raises(InputError, match=f"got dtype {dtype}; allowed: real floating-point numbers"):
        getattr(operator, product)(torch.ones(1, 4, 8, 8, dtype=dtype))


def test_one_prompt_serves_several_samples(pipe):
    x = noise(3, 4, 8, 8)
    prediction = PipelineDenoiser(pipe, prompt="a")(x, 500)
    assert torch.equal(prediction, PipelineDenoiser(pipe, prompt=["a"] * 3)(x, 500))
    guided_prediction = PipelineDenoiser(pipe, 3.0, prompt="a", negative_prompt="b")(x, 500)
    assert torch.allclose(
        guided_prediction, PipelineDenoiser(pipe, 3.0, prompt=["a"] * 3, negative_prompt=["b"] * 3)(x, 500)
    )


def test_prompts_of_another_number_than_samples_are_refused(pipe):
    with pytest.raises(InputError, match="`prompt` is for 2 samples, and the denoiser was called with 3"):
        PipelineDenoiser(pipe, prompt=["a", "b"])(noise(3, 4, 8, 8), 500)
    with pytest.raises(InputError, match="`class_labels` is for 1 samples, and the denoiser was called with 2"):
        PipelineDenoiser(tiny.dit(), class_labels=[1])(noise(2, 4, 8, 8), 500)


def test_inputs_in_another_layout_are_refused(pipe):
    with pytest.raises(InputError, match=r"The model input has shape \(2, 3\); allowed: \(B, 4, h, w\), latents in"):
        PipelineDenoiser(pipe, prompt="a")(torch.zeros(2, 3), 500)
    with pytest.raises(InputError, match=r"\(1, 4, 8, 8\); allowed: \(B, N, 16\), latents in the layout of Flux"):
        PipelineDenoiser(tiny.flux(), **tiny.embeds(1))(torch.zeros(1, 4, 8, 8), 500)


def test_a_denoiser_refuses_forms_of_the_pipelines_output(pipe):
    with pytest.raises(InputError, match=r"`return_dict` is False; a denoiser returns a tensor. Leave it out"):
        PipelineDenoiser(pipe, prompt="a", return_dict=False)


def test_a_reward_that_edits_its_prompts_changes_those_of_no_other_run(pipe):
    reward_prompts = []

    def reward(images, prompts):
        reward_prompts.append(list(prompts))
        prompts.append("edited")
        return images.mean((1, 2, 3))

    pipe.guide(["a", "b"], reward, num_guidance_steps=2, num_inference_steps=2)
    assert reward_prompts == [["a", "b"]] * 4


def test_a_held_out_reward_that_edits_its_images_changes_no_result(pipe):
    def darken(images, prompts):
        images.zero_()
        return images.mean((1, 2, 3))

    options = {"num_guidance_steps": 1, "num_inference_steps": 2, "output_type": "pt"}
    expected = pipe.guide("a", bright, generator=seeded(), **options).images
    assert torch.equal(pipe.guide("a", bright, held_out_reward=darken, generator=seeded(), **options).images, expected)


def test_embeddings_that_somebody_changes_in_place_are_encoded_anew(pipe):
    x, embeds = noise(1, 4, 8, 8), noise(1, 8, 16)
    denoiser = PipelineDenoiser(pipe, prompt_embeds=embeds)
    before = denoiser(x, 500)
    embeds.mul_(2)
    assert torch.equal(denoiser(x, 500), PipelineDenoiser(pipe, prompt_embeds=embeds)(x, 500))
    assert not torch.equal(denoiser(x, 500), before)


def test_encoded_prompts_that_somebody_changes_in_place_are_encoded_anew(pipe):
    x, denoiser = noise(1, 4, 8, 8), PipelineDenoiser(pipe, prompt="a")
    before = denoiser(x, 500)
    (embeddings, *_), *_ = next(iter(denoiser._encoded.values()))
    embeddings.zero_()
    assert torch.equal(denoiser(x, 500), before)


def test_the_encoded_prompts_of_a_kept_denoiser_have_a_limit(pipe):
    denoiser = PipelineDenoiser(pipe, prompt="a")
    for size in range(1, 30):
        denoiser.call_arguments["prompt"] = ["a"] * size
        denoiser(noise(size, 4, 8, 8), 500)
    assert len(denoiser._encoded) <= 16


# NaN names what was seen


def test_a_run_whose_network_is_finite_blames_the_scheduler(pipe):
    nan_pipe = tiny.stable_diffusion(StableDiffusionFisherPipeline)
    nan_pipe.scheduler = nan_pipe.scheduler.from_config(nan_pipe.scheduler.config, trained_betas=[2.0] * 10)
    message = (
        r"The latents at the end of run 0 are not finite, .* network are finite, so check the settings of the sch"
    )
    with pytest.raises(NumericalError, match=message):
        nan_pipe.guide("a", bright, num_inference_steps=1, num_guidance_steps=0)


def test_a_single_evaluation_that_is_not_finite_names_dtype_and_input(pipe):
    x = torch.full((1, 4, 8, 8), float("inf"))
    with pytest.raises(NumericalError, match=r"with weights in torch.float32 and inputs from inf to inf. Check the"):
        PipelineDenoiser(pipe, prompt="a")(x, 500)


# The same images again


@pytest.mark.parametrize("scheduler", [DDPMScheduler, EulerAncestralDiscreteScheduler])
def test_the_best_image_is_drawn_again_as_the_docs_say_under_samplers_that_draw_at_every_step(scheduler):
    pipe = tiny.stable_diffusion(scheduler=scheduler.from_config(tiny.scheduler().config))
    options = {"num_inference_steps": 3, "output_type": "pt"}
    best = guide(pipe, "a", bright, num_guidance_steps=2, generator=seeded(), **options)
    assert torch.equal(
        guide(pipe, "a", bright, num_guidance_steps=2, generator=seeded(), **options).images, best.images
    )
    generator = seeded()
    torch.randn(best.latents.shape, generator=generator)
    images = pipe("a", latents=best.latents, generator=generator, **options).images
    assert torch.allclose(images, best.images, atol=1e-6)  # the guided run's chain is in float32 too


def test_objects_that_are_no_pipelines_are_refused():
    with pytest.raises(InputError, match=r"`pipe` is 'a' .*; allowed: a diffusers pipeline"):
        guide("a", "b", bright)
