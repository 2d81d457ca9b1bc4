"""Options of the pipelines' `guide`: text, control, decoders, guidance scales, reports."""

import diffusers
import pytest
import tiny
import torch
from cases import relative
from diffusers import AutoencoderTiny

from diffusers_fisher import (
    AutodiffFisher,
    DDPMFisherPipeline,
    DirectFisher,
    FiniteDifferenceFisher,
    FisherEstimator,
    FluxFisherPipeline,
    InputError,
    OneStepFisher,
    PipelineDenoiser,
    StableDiffusionFisherPipeline,
    StableDiffusionXLFisherPipeline,
    UnsupportedError,
)
from diffusers_fisher.backbones import backbone_of
from diffusers_fisher.guidance.text import TextEmbedding

PROMPTS = ["a b", "c"]
WEIGHTS = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(5))


def reward(images, prompts):
    return (images * WEIGHTS.to(images)).flatten(1).sum(1)


def brightness(images, prompts):
    return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def pipe():
    return tiny.stable_diffusion(StableDiffusionFisherPipeline)


def noise(count=2):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def guide(pipe, reward=reward, prompts=PROMPTS, **options):
    settings = {
        "latents": noise(), "num_inference_steps": 3, "num_guidance_steps": 2, "guidance_scale": 3.0,
        "output_type": "pt", "generator": torch.Generator().manual_seed(1), "step_size": 0.1,
    }  # fmt: skip
    return pipe.guide(prompts, reward, **{**settings, **options})


# Reports


def test_first_images_and_held_out_rewards_belong_to_the_runs(pipe):
    out = guide(pipe, held_out_reward=brightness)
    stock_images = pipe(
        PROMPTS, latents=noise(), num_inference_steps=3, guidance_scale=3.0, output_type="pt",
        generator=torch.Generator().manual_seed(1),
    ).images  # fmt: skip
    assert torch.equal(out.initial_images, stock_images)
    assert out.held_out_rewards.shape == out.rewards.shape == out.shell_distances.shape == (3, 2)
    torch.testing.assert_close(
        out.held_out_rewards[0], brightness(stock_images, []).double(), rtol=1e-6, atol=0
    )  # float32
    assert (out.status, out.prompt_embeds, out.controls) == ("completed", None, None)
    other_out = guide(pipe)
    assert other_out.held_out_rewards.shape == (0, 2)
    assert torch.equal(other_out.rewards, out.rewards)


def test_text_of_the_output(pipe):
    out = guide(pipe, held_out_reward=brightness)
    held_out = torch.stack([out.held_out_rewards[out.rewards[:, index].argmax(), index] for index in range(2)])
    before, best = float(out.held_out_rewards[0].mean()), float(held_out.mean())
    assert str(out).splitlines() == [
        "Guidance of 2 samples, completed",
        f"  reward    {float(out.rewards[0].mean()):.4g} before, {float(out.best_rewards.mean()):.4g} at its best, on "
        "average, in 3 runs",
        f"  held out  {before:.4g} before, {best:.4g} at the best reward",
        f"  cost      {float(out.seconds.sum()):.1f} s, {out.num_denoiser_calls} denoiser calls",
    ]
    assert "held out" not in str(guide(pipe))


def test_held_out_reward_is_tried_before_the_network_is_called(pipe):
    calls = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(None))
    try:
        with pytest.raises(InputError, match=r"returned shape \(2, 1\) for 2 images"):
            guide(pipe, held_out_reward=lambda images, prompts: images.mean((1, 2, 3))[:, None])
        assert calls == []
        out = guide(pipe, held_out_reward=lambda images, prompts: brightness(images, prompts) / 0)
    finally:
        hook.remove()
    assert out.status == "completed"
    assert bool(torch.isnan(out.held_out_rewards).all())
    assert torch.equal(out.rewards, guide(pipe).rewards)


def test_later_failure_returns_the_best_so_far(pipe):
    calls = []

    def fragile(images, prompts):
        calls.append(None)
        return reward(images, prompts) * (torch.nan if len(calls) == 4 else 1)  # one call is the trial

    out = guide(pipe, fragile, num_guidance_steps=5)
    assert out.status.startswith("stopped in run 2: The reward 'fragile' is not finite")
    assert out.rewards.shape == (2, 2)
    assert bool(torch.isfinite(out.images).all())


def test_patience_and_optimiser_are_passed_on(pipe):
    out = guide(pipe, lambda images, prompts: -1 + 0 * reward(images, prompts), num_guidance_steps=6, patience=2)
    assert out.status == "stopped after 2 runs without a new best"
    assert len(out.rewards) == 3
    adam = guide(pipe, optimizer="Adam", step_size=0.05, num_guidance_steps=1)
    by_hand = guide(pipe, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.05), num_guidance_steps=1)
    assert torch.equal(adam.rewards, by_hand.rewards)
    assert bool((adam.rewards[1] > adam.rewards[0]).all())
    change = adam.latents - noise()
    torch.testing.assert_close(change.abs(), torch.full_like(change, 0.05), rtol=1e-3, atol=0)  # Adam's first step


def test_safety_checker_sees_the_guided_images_and_is_reported():
    """Flags and black images are those of the stock call for the best noise; the rewards do not change."""
    pipe = tiny.stable_diffusion(
        StableDiffusionFisherPipeline, safety_checker=tiny.safety_checker(2.0),
        feature_extractor=tiny.feature_extractor(),
    )  # fmt: skip
    options = {"latents": 3 * noise(4), "num_guidance_steps": 2, "step_size": 0.3}

    def run():
        return guide(pipe, prompts=["a", "b", "c", "d"], **options)

    reference = run()
    assert reference.nsfw_content_detected == [False] * 4
    assert bool((reference.best_rewards > reference.rewards[0]).all())
    after, before = (
        tiny.similarities(pipe, reference.images),
        tiny.similarities(pipe, reference.initial_images),
    )
    similarities = after.sort().values
    place = int(similarities.diff().argmax())
    threshold = float(similarities[place : place + 2].mean())
    assert float((torch.cat([after, before]) - threshold).abs().min()) > 1e-3  # the checker rounds to three digits
    pipe.safety_checker.concept_embeds_weights.data.fill_(threshold)
    out = run()
    assert out.nsfw_content_detected == (after > threshold).tolist()
    assert 0 < sum(out.nsfw_content_detected) < 4
    for images, original, is_unsafe in (
        (out.images, reference.images, after > threshold),
        (out.initial_images, reference.initial_images, before > threshold),
    ):  # fmt: skip
        assert torch.equal(images, torch.where(is_unsafe[:, None, None, None], 0, original))
    assert torch.equal(out.rewards, reference.rewards)
    stock = pipe(
        ["a", "b", "c", "d"], latents=out.latents, num_inference_steps=3, guidance_scale=3.0, output_type="pt"
    )  # fmt: skip
    assert stock.nsfw_content_detected == out.nsfw_content_detected
    torch.testing.assert_close(stock.images, out.images, rtol=0, atol=1e-6)  # float32


# Text and control


class OwnProduct(FisherEstimator):
    """Gives the exact product, but does not say that its graph can be shared."""

    needs_denoiser = True

    def __call__(self, state, endpoint=None):
        return AutodiffFisher(self.denoiser)(state)


@pytest.mark.parametrize("estimator", [AutodiffFisher, OwnProduct])
def test_gradient_of_the_text_is_that_of_full_back_propagation(pipe, estimator):
    """The reference is the gradient of the embeddings through each step of the stock call with a graph."""
    out = guide(pipe, optimise=["text"], estimator=estimator(), num_guidance_steps=1)
    positive, negative = pipe.encode_prompt(PROMPTS, pipe.device, 1, True)
    leaf = positive.detach().requires_grad_()
    call = diffusers.StableDiffusionPipeline.__call__.__wrapped__
    with torch.enable_grad():
        end = call(
            pipe, prompt_embeds=leaf, negative_prompt_embeds=negative.detach(), latents=noise(), num_inference_steps=3,
            guidance_scale=3.0, output_type="latent", return_dict=False,
        )[0]  # fmt: skip
        (gradient,) = torch.autograd.grad(reward(backbone_of(pipe).decode(end), PROMPTS).sum(), leaf)
    length = torch.linalg.vector_norm(gradient.flatten(1), dim=1)[:, None, None]
    size = torch.linalg.vector_norm(positive.detach().flatten(1), dim=1)[:, None, None]
    expected = 0.1 * size * gradient / length
    has_gain = out.rewards[1] > out.rewards[0]
    assert bool(has_gain.any())  # the text of the best is the moved one there
    change = (out.prompt_embeds - positive.detach())[has_gain]
    # float32, products in another order
    assert relative(change, expected[has_gain]) < 1e-4
    assert relative(out.gradient_norms[0], length.flatten()) < 1e-4
    assert torch.equal(out.latents, noise())


def test_text_of_the_best_images_reproduces_them(pipe):
    out = guide(pipe, optimise=["noise", "text"])
    assert bool((out.best_rewards > out.rewards[0]).all())
    _, negative = pipe.encode_prompt(PROMPTS, pipe.device, 1, True)
    images = pipe(
        prompt_embeds=out.prompt_embeds, negative_prompt_embeds=negative, latents=out.latents, num_inference_steps=3,
        guidance_scale=3.0, output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(images, out.images, rtol=0, atol=1e-6)  # float32
    assert torch.equal(pipe.encode_prompt(PROMPTS, pipe.device, 1, True)[1], negative)  # the pipeline has not changed


def test_negative_prompts_that_have_their_own_encoding_do_not_change():
    """Flux with `true_cfg_scale` encodes negative prompts by a call of their own."""
    flux = tiny.flux(FluxFisherPipeline, texts=True)
    options = {"height": 8, "width": 8, "max_sequence_length": 8, "true_cfg_scale": 3.0}
    denoiser, text = PipelineDenoiser(flux, prompt="a b", negative_prompt="c", **options), TextEmbedding()
    hidden_states, x = [], torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
    flux.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: hidden_states.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    denoiser(x, 500.0)
    text.attach(denoiser)
    denoiser(x, 500.0)
    text.value = 2 * text.value
    denoiser(x, 500.0)
    positive, negative = hidden_states[0::2], hidden_states[1::2]
    assert torch.equal(positive[1], positive[0]) and torch.equal(positive[2], 2 * positive[0])
    assert len(negative) == 3 and all(torch.equal(value, negative[0]) for value in negative)
    assert not torch.equal(negative[0], positive[0])


def test_text_of_pipelines_with_two_encoders():
    xl = tiny.stable_diffusion_xl(StableDiffusionXLFisherPipeline)
    out = guide(xl, optimise=["text"], num_guidance_steps=1, num_inference_steps=2)
    assert out.prompt_embeds.shape == (2, 8, 32)
    assert bool((out.best_rewards >= out.rewards[0]).all())
    assert bool((out.gradient_norms > 0).all())


def test_control_of_every_step_raises_the_reward_and_replays(pipe):
    out = guide(pipe, optimise=["control"])
    assert out.controls.shape == (2, 3, 4, 8, 8)
    assert bool((out.best_rewards > out.rewards[0]).all())
    from diffusers_fisher import fisher_scheduler

    scheduler = fisher_scheduler(type(pipe.scheduler)).from_config(pipe.scheduler.config)
    stock = tiny.stable_diffusion(scheduler=scheduler)
    controls = [control.clone().requires_grad_() for control in out.controls.unbind(1)]
    with scheduler.differentiable(DirectFisher(), controls=controls):
        end = stock(
            PROMPTS, latents=out.latents, num_inference_steps=3, guidance_scale=3.0, output_type="latent"
        ).images  # fmt: skip
    torch.testing.assert_close(backbone_of(pipe).decode(end).detach(), out.images, rtol=0, atol=1e-6)  # float32


# Decoders


def test_tiny_autoencoder_decodes_for_the_reward_alone(pipe):
    torch.manual_seed(2)
    tiny_autoencoder = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), upsampling_scaling_factor=2, latent_channels=4,
    )  # fmt: skip
    before = pipe.vae
    reward_images = []

    def record_images(images, prompts):
        reward_images.append(images.detach())
        return reward(images, prompts)

    out = guide(pipe, record_images, decoder=tiny_autoencoder)
    assert pipe.vae is before
    end = pipe(PROMPTS, latents=out.latents, num_inference_steps=3, guidance_scale=3.0, output_type="latent").images
    # float32; the images are the autoencoder's, those of the reward the tiny one's
    torch.testing.assert_close(out.images, backbone_of(pipe).decode(end).detach(), rtol=0, atol=1e-6)
    with torch.no_grad():
        expected = (tiny_autoencoder.decode(pipe(
            PROMPTS, latents=noise(), num_inference_steps=3, guidance_scale=3.0, output_type="latent"
        ).images).sample / 2 + 0.5).clamp(0, 1)  # fmt: skip
    torch.testing.assert_close(reward_images[1], expected, rtol=0, atol=1e-6)
    assert bool((out.best_rewards > out.rewards[0]).any())


def test_decoder_of_another_size_is_refused(pipe):
    larger = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1), upsampling_scaling_factor=2, latent_channels=4,
    )  # fmt: skip
    calls = []
    hook = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(
        InputError, match=r"`decoder` makes 32x32 pixels of .* makes 16x16; give a decoder of the same"
    ):
        guide(pipe, decoder=larger)
    hook.remove()
    assert not calls


def test_decoder_with_checkpoints_keeps_less_memory_and_changes_no_result(pipe):
    sizes = []

    def record_size(tensor):
        sizes.append(tensor.numel())
        return tensor

    results = []
    before = {name: dict(vars(part)) for name, part in pipe.vae.named_modules()}
    for checkpointed in (False, True):
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(record_size, lambda tensor: tensor):
            results.append((guide(pipe, checkpoint_decoder=checkpointed, num_guidance_steps=1), sum(sizes)))
    (reference, full_size), (out, size) = results
    torch.testing.assert_close(out.rewards, reference.rewards, rtol=1e-5, atol=1e-5)  # float32
    assert size < 0.9 * full_size  # tensors of the recomputation in the backward pass count too, block by block
    after = {name: dict(vars(part)) for name, part in pipe.vae.named_modules()}
    assert {name: values.keys() for name, values in after.items()} == {k: v.keys() for k, v in before.items()}
    assert not pipe.vae.is_gradient_checkpointing


# Classifier-free guidance out of the adjoint


def test_backward_pass_at_another_guidance_scale_uses_the_denoiser_of_that_scale(pipe):
    def gradient_norms(estimator, **options):
        return guide(pipe, estimator=estimator, num_guidance_steps=1, **options).gradient_norms

    denoiser = PipelineDenoiser(pipe, 1.0, prompt=PROMPTS)
    expected = gradient_norms(AutodiffFisher(denoiser), adjoint_guidance_scale=1.0)
    assert torch.equal(gradient_norms(AutodiffFisher(), adjoint_guidance_scale=1.0), expected)
    guided_norms = gradient_norms(AutodiffFisher())
    assert relative(guided_norms, expected) > 1e-3
    assert torch.equal(gradient_norms(AutodiffFisher(), adjoint_guidance_scale=3.0), guided_norms)
    # Differences in place of the transposed product: central, because the run's own output is the guided one.
    differences = gradient_norms(FiniteDifferenceFisher(), adjoint_guidance_scale=1.0)
    central = gradient_norms(FiniteDifferenceFisher(denoiser, central=True), adjoint_guidance_scale=1.0)
    assert torch.equal(differences, central)
    assert torch.equal(gradient_norms(DirectFisher(), adjoint_guidance_scale=1.0), gradient_norms(DirectFisher()))
    default = gradient_norms(None, adjoint_guidance_scale=1.0)
    one_step = OneStepFisher(FiniteDifferenceFisher(denoiser, central=True))
    assert torch.equal(default, gradient_norms(one_step, adjoint_guidance_scale=1.0))


@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 0.01), (torch.float16, 0.05), (torch.bfloat16, 0.1)])
def test_default_differences_suit_the_networks_precision(dtype, step):
    pipe = tiny.stable_diffusion(StableDiffusionFisherPipeline).to(dtype)
    estimator = OneStepFisher(FiniteDifferenceFisher(relative_step=step))
    default, expected = (guide(pipe, estimator=entry, num_guidance_steps=2) for entry in (None, estimator))
    assert torch.equal(default.rewards, expected.rewards)
    assert torch.equal(default.gradient_norms, expected.gradient_norms)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_finite_differences_share_one_call_between_all_samples(pipe, count):
    out = pipe.guide(
        ["a"] * count, reward, estimator=FiniteDifferenceFisher(), num_guidance_steps=2, num_inference_steps=3,
        latents=noise(count), guidance_scale=3.0,
    )  # fmt: skip
    # Three runs of three steps, one call per step of two backward passes, and three that compare the denoiser.
    assert out.num_denoiser_calls == 3 * 3 + 2 * 3 + 3


# What is refused


BAD = {
    "string": ({"optimise": "noise"}, r"`optimise` is 'noise' .*; allowed: a sequence with entries of a string"),
    "unknown": ({"optimise": ["noise", "mask"]}, r"`optimise` is \['noise', 'mask'\]; allowed"),
    "nothing": ({"optimise": []}, r"`optimise` is \[\]; allowed"),
    "patience": ({"patience": 0}, "`patience` is 0; allowed: at least 1 run, or None"),
    "optimizer": ({"optimizer": "Adman"}, "`optimizer` is 'Adman'; allowed"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_options_are_refused_before_sampling(pipe, kind):
    options, message = BAD[kind]
    with pytest.raises(InputError, match=message):
        guide(pipe, lambda images, prompts: pytest.fail("the reward was tried"), **options)


def test_estimators_own_denoiser_does_not_see_the_text_change(pipe):
    denoiser = PipelineDenoiser(pipe, 3.0, prompt=PROMPTS)
    with pytest.raises(InputError, match=r"has a denoiser of its own, .* Make it without: AutodiffFisher"):
        guide(pipe, optimise=["text"], estimator=AutodiffFisher(denoiser))


def test_errors_name_pipelines_without_text_or_autoencoder():
    pixels = tiny.unconditional(DDPMFisherPipeline)
    options = {"num_inference_steps": 2, "num_guidance_steps": 1}
    with pytest.raises(UnsupportedError, match="DDPMFisherPipeline encodes no prompts, so there is no text embedding"):
        pixels.guide(brightness, optimise=["text"], **options)
    with pytest.raises(InputError, match="DDPMFisherPipeline has no autoencoder `vae`; leave out `decoder`"):
        pixels.guide(brightness, checkpoint_decoder=True, **options)
