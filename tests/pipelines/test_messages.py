"""Messages about pipelines whose call is no function of their latents say what was seen, and what to do."""

import diffusers
import pytest
import tiny
import torch

from diffusers_fisher import (
    DirectFisher,
    FiniteDifferenceFisher,
    InputError,
    PipelineDenoiser,
    TrajectoryError,
    UnsupportedError,
    fisher_scheduler,
)
from diffusers_fisher.errors import describe_change
from diffusers_fisher.noise import DenoisingState, Prediction, noise_level
from pipelines.outside import forget_backbones


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def flux2(cls, guidance_embeds):
    """Makes Flux 2, which packs and unpacks its latents (B, 4 C, h, w) within its call."""
    torch.manual_seed(0)
    network = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, timestep_guidance_channels=32, axes_dims_rope=[4] * 4, guidance_embeds=guidance_embeds,
    )  # fmt: skip
    tiny.awaken(network)
    autoencoder = diffusers.AutoencoderKLFlux2(
        sample_size=32, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=1, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    parts = {"text_encoder": None, "tokenizer": None, "transformer": network, "vae": autoencoder}
    return tiny.quiet(cls(scheduler=fisher_scheduler(type(scheduler)).from_config(scheduler.config), **parts))


@pytest.fixture
def own_registry(monkeypatch):
    forget_backbones(monkeypatch)


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize(
    ("name", "guidance_embeds"), [("Flux2Pipeline", True), ("Flux2KleinPipeline", False)], ids=["dev", "klein"]
)
def test_pipelines_that_pack_latents_within_their_call_say_so(name, guidance_embeds):
    pipe = flux2(getattr(diffusers, name), guidance_embeds)
    arguments = {"prompt_embeds": noise(2, 8, 16), "height": 16, "width": 16, "guidance_scale": 1.0}
    message = (
        rf"{name} changes the layout .* given \(2, 16, 4, 4\), .* output has \(2, 16, 16\), .*trajectory\.final_s"
    )
    with pytest.raises(UnsupportedError, match=message):
        PipelineDenoiser(pipe, **arguments).state(noise(2, 16, 4, 4), 500.0)
    with pipe.scheduler.differentiable(DirectFisher()) as trajectory:
        latents = noise(2, 16, 4, 4)
        result = pipe(latents=latents, num_inference_steps=2, output_type="latent", **arguments).images
    if not result.requires_grad:
        with pytest.raises(
            TrajectoryError, match=r"Compute it outside of torch.no_grad from `trajectory\.final_sample"
        ):
            trajectory.gradient(result.sum())
    gradient = trajectory.gradient(trajectory.final_sample.square().sum())  # as the message advises
    assert gradient.shape == (2, 16, 16)
    assert gradient.any()


@pytest.mark.usefixtures("own_registry")
def test_a_denoiser_of_packed_samples_that_the_call_does_not_take_is_refused_in_words():
    pipe = flux2(diffusers.Flux2KleinPipeline, False)
    arguments = {"prompt_embeds": noise(2, 8, 16), "height": 16, "width": 16, "guidance_scale": 1.0}
    estimator = FiniteDifferenceFisher(PipelineDenoiser(pipe, **arguments))
    with pipe.scheduler.differentiable(estimator) as trajectory:
        pipe(latents=noise(2, 16, 4, 4), num_inference_steps=2, output_type="latent", **arguments)
    loss = trajectory.final_sample.square().sum()
    with pytest.raises(UnsupportedError, match=r"does not take latents of shape \(2, 16, 16\) .*DirectFisher\(\)"):
        trajectory.gradient(loss)


def test_output_in_another_layout_is_not_called_a_learned_variance():
    scheduler = tiny.scheduler()
    level, prediction = noise_level(scheduler, 500), Prediction("epsilon")
    with pytest.raises(
        InputError, match=r"output has shape \(2, 16\); allowed: \(2, 4, 2, 2\)\. Pass sample and outp"
    ):
        DenoisingState(noise(2, 4, 2, 2), noise(2, 16), level, prediction)
    with pytest.raises(InputError, match=r"allowed: \(2, 4, 2, 2\)\. Models with learned variance give two halves"):
        DenoisingState(noise(2, 4, 2, 2), noise(2, 8, 2, 2), level, prediction)
    recorder = fisher_scheduler(type(scheduler)).from_config(scheduler.config)
    recorder.set_timesteps(2)
    for output, message in ((noise(2, 16), "in different layouts"), (noise(2, 8, 2, 2), "models with learned varia")):
        with pytest.raises(TrajectoryError, match=message), recorder.differentiable(DirectFisher()):
            recorder.step(output, recorder.timesteps[0], noise(2, 4, 2, 2))


def test_latents_of_another_shape_are_not_called_a_callbacks():
    scheduler = tiny.scheduler()
    recorder = fisher_scheduler(type(scheduler)).from_config(scheduler.config)
    recorder.set_timesteps(2)
    message = (
        r"Step 1 received .* of shape \(1, 2, 3\) where the step returned \(2, 4, 2, 2\): .* samples of two kinds"
    )
    with pytest.raises(TrajectoryError, match=message), recorder.differentiable(DirectFisher()):
        recorder.step(noise(2, 4, 2, 2), recorder.timesteps[0], noise(2, 4, 2, 2))
        recorder.step(noise(1, 2, 3), recorder.timesteps[1], noise(1, 2, 3))


def test_changes_are_described_by_what_differs():
    tensor = noise(2, 3)
    assert describe_change(tensor, 1.5 * tensor) == "by 0.5 of their size"
    assert describe_change(tensor, tensor.half()) == "in torch.float16 where the step returned torch.float32"
    assert describe_change(tensor, tensor[:1]) == "of shape (1, 3) where the step returned (2, 3)"
