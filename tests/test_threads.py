"""One pipeline in two threads: every entry point gives its own number, or refuses in words; the pipeline stays."""

import itertools
import threading

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline

from diffusers_fisher import (
    DirectFisher,
    FisherError,
    PipelineDenoiser,
    StableDiffusionFisherPipeline,
    TrajectoryError,
    compare_likelihood,
    embedded_checkpoint,
    embedded_test_images,
    guide,
    log_likelihood,
    posterior_guidance,
)
from diffusers_fisher.backbones.encoding import encode_apart

REPEATS = [3, pytest.param(20, marks=pytest.mark.slow)]
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def generator():
    return torch.Generator().manual_seed(2)


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def call(pipe, **arguments):
    """A stock call for one prompt, encoded apart: two stock encodings at once share the padding of one tokenizer."""
    prompt_embeds, negative_prompt_embeds = encode_apart(pipe, "a", "cpu", 1, True)
    arguments |= {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
    out = pipe(**arguments, latents=NOISE[:1], num_inference_steps=2, output_type="np")
    return torch.from_numpy(out.images)


def stock_call(pipe):
    return call(pipe)


def likelihood(pipe):
    return log_likelihood(
        pipe, IMAGES, "a", num_inference_steps=2, estimator=DirectFisher(), generator=generator()
    ).bits_per_dim


def comparison(pipe):
    return compare_likelihood(pipe, IMAGES[:1], ["a", "b"], num_levels=4, generator=generator()).log_prob


def guidance(pipe):
    out = guide(pipe, "b", brightness, latents=NOISE[:1], num_guidance_steps=1, num_inference_steps=2)
    return out.latents


def guidance_per_step(pipe):
    with posterior_guidance(pipe, brightness, "a") as callback:
        return call(pipe, callback_on_step_end=callback)


ENTRIES = [stock_call, likelihood, comparison, guidance, guidance_per_step]


def in_threads(*runs):
    """Results of several functions that begin at the same time, each in its own thread; errors as results."""
    barrier, results = threading.Barrier(len(runs)), [None] * len(runs)

    def work(index):
        barrier.wait()
        try:
            results[index] = runs[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def without_scheduler(snapshot):
    """Returns the parts of a snapshot that a stock call does not change."""
    changes = {"attributes", "progress bar", "random numbers"}
    modules = {name: [sizes for sizes, _ in [module]] for name, module in snapshot["modules"].items()}
    return {name: value for name, value in snapshot.items() if name not in {"scheduler", *changes}} | {
        "modules": modules
    }


def check(pipes, runs, repeats, may_refuse):
    """Runs both functions in two threads, `repeats` times: the numbers are those of a run alone."""
    expected = [run(pipe) for pipe, run in zip(pipes, runs, strict=True)]
    before = [without_scheduler(tiny.snapshot(pipe)) for pipe in pipes]
    for _ in range(repeats):
        results = in_threads(*(lambda run=run, pipe=pipe: run(pipe) for pipe, run in zip(pipes, runs, strict=True)))
        refusals = [isinstance(result, FisherError) for result in results]
        assert not all(refusals)
        for result, number, was_refused in zip(results, expected, refusals, strict=True):
            if was_refused and may_refuse:
                assert isinstance(result, TrajectoryError)
                continue
            assert isinstance(result, torch.Tensor), result
            assert torch.equal(result, number)
    assert [without_scheduler(tiny.snapshot(pipe)) for pipe in pipes] == before
    assert all(type(pipe.scheduler).__name__ == "DDIMScheduler" for pipe in pipes)


# Two stock calls share the scheduler's state: diffusers itself makes no promise for them.
PAIRS = [pair for pair in itertools.combinations_with_replacement(ENTRIES, 2) if pair != (stock_call, stock_call)]


@pytest.mark.parametrize("repeats", REPEATS)
@pytest.mark.parametrize("runs", PAIRS, ids=lambda runs: " and ".join(run.__name__ for run in runs))
def test_two_entries_in_two_threads(runs, repeats):
    pipe = tiny.quiet(tiny.stable_diffusion(StableDiffusionFisherPipeline))
    check([pipe, pipe], runs, repeats, may_refuse=guidance_per_step in runs)


@pytest.mark.parametrize("repeats", REPEATS)
@pytest.mark.parametrize("runs", [(likelihood, stock_call), (guidance, likelihood), (guidance, guidance)],
                         ids=lambda runs: " and ".join(run.__name__ for run in runs))  # fmt: skip
def test_two_pipelines_of_the_same_components(runs, repeats):
    pipe = tiny.quiet(tiny.stable_diffusion())
    check([pipe, tiny.quiet(StableDiffusionPipeline(**pipe.components))], runs, repeats, may_refuse=False)


@pytest.mark.parametrize("repeats", REPEATS)
@pytest.mark.parametrize("run", [stock_call, likelihood, guidance], ids=lambda run: run.__name__)
def test_a_denoiser_that_was_kept_beside_another_entry(run, repeats):
    pipe = tiny.quiet(tiny.stable_diffusion())
    denoiser = PipelineDenoiser(pipe, 2.0, prompt=["a", "b"])
    check([pipe, pipe], [lambda _: denoiser.model_output(NOISE, 500.0), run], repeats, may_refuse=False)


@pytest.mark.parametrize("repeats", REPEATS)
@pytest.mark.parametrize("other", [stock_call, likelihood], ids=lambda run: run.__name__)
def test_a_likelihood_by_the_trace_model_beside_another_entry(other, repeats):
    """The trace model reads a hidden layer of the network, which the other thread evaluates too."""
    pipe = tiny.quiet(StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint()))
    images = embedded_test_images()[0][:1]

    def score(pipe):
        return pipe.log_likelihood(images, "a photo of a coat", num_inference_steps=3).bits_per_dim

    expected = score(pipe)
    for _ in range(repeats):
        result, _ = in_threads(
            lambda: score(pipe),
            lambda: pipe("a", num_inference_steps=3, output_type="latent") if other is stock_call else score(pipe),
        )
        assert torch.equal(result, expected)


def test_a_second_guidance_of_a_scheduler_is_refused_and_the_first_goes_on():
    pipe = tiny.quiet(tiny.stable_diffusion())
    expected = guidance_per_step(pipe)
    with posterior_guidance(pipe, brightness, "a") as callback:
        with pytest.raises(TrajectoryError, match=r"already guided.*with a scheduler of its own"):
            posterior_guidance(pipe, brightness, "a").__enter__()
        out = pipe("a", latents=NOISE[:1], num_inference_steps=2, output_type="np", callback_on_step_end=callback)
    assert torch.equal(torch.from_numpy(out.images), expected)
    assert torch.equal(guidance_per_step(pipe), expected)


def test_a_call_in_another_thread_than_the_guidances_is_refused_and_changes_nothing():
    pipe = tiny.quiet(tiny.stable_diffusion())
    with posterior_guidance(pipe, brightness, "a"):
        before = dict(vars(pipe.scheduler))
        (result,) = in_threads(lambda: stock_call(pipe))
        assert isinstance(result, TrajectoryError)
        assert "give each thread a pipeline with a scheduler of its own" in str(result)
        assert all(value is before[name] for name, value in vars(pipe.scheduler).items())
