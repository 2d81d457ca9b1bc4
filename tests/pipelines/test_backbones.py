"""Every backbone: the stock results, exact gradients and likelihoods, and what users do to pipelines."""

import dataclasses
import inspect
import math

import diffusers
import numpy
import pytest
import tiny
import torch
from cases import relative

from diffusers_fisher import (
    AutodiffFisher,
    Covariance,
    DirectFisher,
    EndpointFisher,
    FiniteDifferenceFisher,
    GaussianFisher,
    OneStepFisher,
    PipelineDenoiser,
    custom_pipeline_file,
    fisher_pipeline,
    fisher_scheduler,
)
from diffusers_fisher.backbones import backbone_of
from diffusers_fisher.likelihood.schemes import noise_grid
from pipelines import family_networks
from pipelines.backbones import BACKBONES, EVERY, FAMILIES, VARIATIONS, GaussianFlow

GRADIENT = 1e-5  # float32, the same products in another order: measured up to 2e-6


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def brightness(images, conditions):
    return images.mean((1, 2, 3))


@pytest.fixture(params=EVERY)
def backbone(request):
    return (BACKBONES | FAMILIES | VARIATIONS)[request.param]


WITH_VARIATIONS = pytest.mark.parametrize("backbone", [*EVERY, *VARIATIONS], indirect=True)


# Bit for bit


def test_images_are_those_of_the_stock_pipeline(backbone):
    stock, ours = backbone.make(cls=backbone.stock), backbone.ours()
    ours.scheduler = fisher_scheduler(type(ours.scheduler)).from_config(ours.scheduler.config)
    results = []
    for pipe in (stock, ours):
        torch.manual_seed(0)  # some stock schedulers draw from the global generator
        results.append(backbone.sample(pipe, output_type="np", generator=seeded()))
    assert (results[0] == results[1]).all()


def test_latents_of_the_caller_take_the_place_of_the_stock_calls_noise(backbone):
    """The final latents of the call are those that it decodes."""
    ours, outputs = backbone.ours(), []
    size = {} if backbone.takes_latents else {"height": None, "width": None}
    pixels = backbone_of(ours).image_size(*(size or backbone.size()).values())
    noise = backbone_of(ours).initial_noise(None, 2, pixels, seeded())
    generators = (seeded(), seeded())
    expected = backbone.sample(ours, generator=generators[0], output_type="np")
    torch.empty(noise.shape if noise.ndim == 4 else (2, *backbone.shape)).normal_(generator=generators[1])
    for output_type in ("latent", "np"):
        generator = torch.Generator()
        generator.set_state(generators[1].get_state())
        outputs.append(backbone.sample(ours, generator=generator, latents=noise, output_type=output_type))
    assert (outputs[1] == expected).all()
    images = backbone_of(ours).decode(outputs[0], pixels).detach().permute(0, 2, 3, 1)
    assert abs(images.numpy() - expected).max() == 0


@WITH_VARIATIONS
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_gradient_of_a_run_is_that_of_back_propagation(backbone, guided):
    pipe = backbone.ours()
    noise, weight = (backbone.packed(pipe, backbone.noise(seed=seed)) for seed in (0, 1))
    leaf = noise.clone().requires_grad_()
    call = inspect.unwrap(type(pipe).__call__)
    reference = backbone.sample(pipe, guided, call, latents=leaf, generator=seeded(3))
    (exact,) = torch.autograd.grad((weight * reference).sum(), leaf)
    pipe.scheduler = fisher_scheduler(type(pipe.scheduler)).from_config(pipe.scheduler.config)
    denoiser = PipelineDenoiser(
        pipe, **{**backbone.call, **backbone.options, **backbone.size()}, **backbone.guidance(guided)
    )
    with pipe.scheduler.differentiable(AutodiffFisher(denoiser)) as trajectory:
        result = backbone.sample(pipe, guided, latents=noise, generator=seeded(3))
    assert torch.equal(result.detach(), backbone.sample(backbone.ours(), guided, latents=noise, generator=seeded(3)))
    torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-5)  # attention has other kernels with a graph
    assert relative(trajectory.gradient((weight * result).sum()), exact) < GRADIENT
    assert float(exact.norm()) > 0
    assert denoiser.num_calls == len(trajectory.states) == 3


# Guidance


ESTIMATORS = {
    "one step": OneStepFisher,
    "direct": DirectFisher,
    "autodiff": AutodiffFisher,
    "finite difference": FiniteDifferenceFisher,
    "endpoint": EndpointFisher,
    "centred endpoint": lambda: EndpointFisher(centred=True),
    "Gaussian": GaussianFisher,
}


def estimator_of(name, backbone, pipe):
    if name != "Gaussian":
        return ESTIMATORS[name]()
    return GaussianFisher(Covariance.isotropic(0.5, tuple(backbone.packed(pipe, backbone.noise(1)).shape[1:])))


@pytest.mark.cell("guidance: {name}")
@pytest.mark.parametrize("name", ESTIMATORS)
def test_guidance_by_each_estimator(backbone, name):
    pipe = backbone.ours()
    before = tiny.snapshot(pipe)
    estimator, steps = estimator_of(name, backbone, pipe), {"num_inference_steps": 3, "num_guidance_steps": 2}
    out = backbone.guide(
        pipe, brightness, estimator=estimator, step_size=0.05, generator=seeded(), output_type="pt", **steps
    )
    assert out.rewards.shape == (3, 2)
    assert bool((out.gradient_norms > 0).all())
    assert out.images.shape == (2, 3, *backbone.pixels)
    if name == "autodiff":
        assert bool((out.rewards[1] > out.rewards[0]).all())
    assert tiny.snapshot(pipe)["attributes"] == before["attributes"]
    samples = backbone.sample(
        pipe, latents=out.latents.to(backbone_of(pipe).dtype), output_type="latent", generator=seeded(5)
    )
    if backbone.stock is not diffusers.DDPMPipeline and type(pipe.scheduler).__name__ != "DDPMScheduler":
        images = backbone_of(pipe).decode(samples, backbone.pixels).detach()
        assert torch.equal(images, out.images)


# Likelihood


def table_of(backbone, pipe):
    """Returns log(sigma/alpha) of every training timestep, by its definition."""
    config = pipe.scheduler.config
    power = 1 if config.beta_schedule == "linear" else 2  # "scaled_linear": linear in the root
    ends = config.beta_start ** (1 / power), config.beta_end ** (1 / power)
    bars = torch.cumprod(1 - torch.linspace(*ends, 1000, dtype=torch.float64) ** power, 0)
    return 0.5 * ((1 - bars) / bars).log()


def level_of(backbone, pipe, u):
    """Returns alpha, sigma and the network's time at log(sigma/alpha) = u."""
    s = float(u.exp())
    if backbone.flow:
        noise = torch.sigmoid(u)
        return (
            1 - float(noise),
            float(noise),
            1000 * torch.sigmoid(u - family_networks.LOG_SHIFTS.get(backbone.name, 0.0)),
        )
    table = table_of(backbone, pipe).numpy()
    return 1 / math.hypot(1, s), s / math.hypot(1, s), torch.tensor(numpy.interp(float(u), table, range(1000)))


def network_call(backbone, pipe):
    """Returns the network as a function of (1, C, h, w) and a time, with its pipeline's conditioning."""
    name, count = backbone.name, backbone.shape[0]
    if name in FAMILIES:
        return family_networks.NETWORKS[name](pipe, (backbone.condition or [])[:1], backbone)
    if backbone.condition is None:
        return lambda x, t: pipe.unet(x, t).sample
    if name == "DiT":
        label = torch.tensor(backbone.condition[:1])
        return lambda x, t: pipe.transformer(x, t[None], label).sample[:, :count]
    prompt = backbone.condition[:1]
    height, width = backbone.pixels
    with torch.no_grad():
        if name == "StableDiffusion":
            embeds = pipe.encode_prompt(prompt, "cpu", 1, False)[0]
            return lambda x, t: pipe.unet(x, t, embeds).sample
        if name == "StableDiffusionXL":
            embeds, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
            conditions = {
                "text_embeds": pooled,
                "time_ids": torch.tensor([[height, width, 0, 0, height, width]]).float(),
            }
            return lambda x, t: pipe.unet(x, t, embeds, added_cond_kwargs=conditions).sample
        if name == "StableDiffusion3":
            embeds, _, pooled, _ = pipe.encode_prompt(
                prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=8
            )
            return lambda x, t: pipe.transformer(x, embeds, pooled, t[None]).sample
        if name == "Flux":
            embeds, pooled, ids = pipe.encode_prompt(prompt, None, max_sequence_length=8)
            places = torch.tensor([[0, row, column] for row in range(2) for column in range(2)]).float()
            scale = torch.tensor([3.5]) if pipe.transformer.config.guidance_embeds else None

            def flux(x, t):
                """Patches of 2x2, each a token: (C, h, w) to (h/2 w/2, 4C)."""
                tokens = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(1, 4, -1)
                out = pipe.transformer(
                    hidden_states=tokens, encoder_hidden_states=embeds, pooled_projections=pooled,
                    timestep=t[None] / 1000, img_ids=places, txt_ids=ids, guidance=scale,
                ).sample  # fmt: skip
                return out.reshape(1, 2, 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)

            return flux
        embeds, mask, _, _ = pipe.encode_prompt(prompt, False, max_sequence_length=8)
        sizes = {"resolution": None, "aspect_ratio": None}
        if name == "PixArtAlpha":
            sizes = {
                "resolution": torch.tensor([[height, width]]).float(),
                "aspect_ratio": torch.tensor([[height / width]]),
            }
        return lambda x, t: pipe.transformer(
            x, embeds, t[None], encoder_attention_mask=mask, added_cond_kwargs=sizes
        ).sample[:, :count]


def by_hand(backbone, pipe, x, steps):
    """Returns log p of x (1, C, h, w): Euler in s, the trapezoid in u = log s, full Jacobians of the network.

    Notation: x~ = x/alpha, s = sigma/alpha; d log p~ = d (1 - r) du with d (1 - r) = sigma tr(d eps/dx).
    """
    network, dimensions = network_call(backbone, pipe), x.numel()
    limit = torch.tensor(999.0, dtype=torch.float64).log()
    low, high = (-limit, limit) if backbone.flow else table_of(backbone, pipe)[[0, -1]]
    low = low + family_networks.LOG_SHIFTS.get(backbone.name, 0.0)
    nodes = noise_grid(float(low), float(high), steps)

    def at(x, u):
        """eps and the trace at x~ = x."""
        alpha, sigma, t = level_of(backbone, pipe, u)
        leaf = (alpha * x).float().requires_grad_()
        out = network(leaf, t.float())
        rows = [torch.autograd.grad(entry, leaf, retain_graph=True)[0].flatten() for entry in out.flatten()]
        trace = float(torch.stack(rows).diagonal().double().sum())
        out, leaf = out.detach(), leaf.detach()
        if backbone.flow:  # v = eps - x_0
            return (leaf + alpha * out).double(), sigma * (dimensions + alpha * trace)
        if pipe.scheduler.config.prediction_type == "v_prediction":  # v = alpha eps - sigma x_0
            return (sigma * leaf + alpha * out).double(), sigma * (sigma * dimensions + alpha * trace)
        return out.double(), sigma * trace

    x, integral = x.double(), 0.0
    epsilon, trace = at(x, nodes[0])
    for step in range(1, steps + 1):
        x = x + float(nodes[step].exp() - nodes[step - 1].exp()) * epsilon
        epsilon, trace_there = at(x, nodes[step])
        h = float(nodes[step] - nodes[step - 1])
        integral, trace = integral + h / 2 * (trace + trace_there), trace_there
    variance = 1 + float((2 * high).exp())
    prior = -0.5 * float(x.square().sum()) / variance - dimensions / 2 * math.log(2 * math.pi * variance)
    return prior + integral


@WITH_VARIATIONS
@pytest.mark.cell("likelihood")
def test_likelihood_is_that_of_a_loop_over_the_network_itself(backbone):
    pipe = backbone.ours()
    x = 0.5 * backbone.noise(1)
    out = backbone.score(pipe, 1, latents=x, estimator=AutodiffFisher(), num_probes=None, scheme="euler")
    assert float(out.log_prob[0]) == pytest.approx(by_hand(backbone, pipe, x, 3), rel=1e-5)
    assert out.space == ("pixel" if backbone.stock in (diffusers.DDPMPipeline, diffusers.DDIMPipeline) else "latent")
    assert out.dims == x.numel()


@torch.no_grad()
def latents_of(pipe, images):
    """Returns latents by the autoencoder itself."""
    pixels = 2 * images - 1
    if type(pipe.components.get("vae")).__name__ in family_networks.ENCODERS:
        return family_networks.ENCODERS[type(pipe.vae).__name__](pipe.vae, pixels)
    if hasattr(pipe, "movq"):
        return pipe.movq.encode(pixels).latents
    if hasattr(pipe, "vae"):
        shift = getattr(pipe.vae.config, "shift_factor", None) or 0.0
        return (pipe.vae.encode(pixels).latent_dist.mean - shift) * pipe.vae.config.scaling_factor
    return pipe.vqvae.encode(pixels).latents * 0.5 if hasattr(pipe, "vqvae") else pixels


def test_likelihood_of_images_is_that_of_their_latents(backbone):
    pipe = backbone.ours()
    images = torch.rand(2, 3, *backbone.pixels, generator=seeded())
    keys = {"image_keys": ["a", "b"]}  # without them, images and latents have keys of their own
    out = backbone.score(pipe, images=images, **keys)
    expected = backbone.score(pipe, latents=latents_of(pipe, images), **keys)
    assert torch.equal(out.log_prob, expected.log_prob)
    assert float(out.log_prob[0]) != float(out.log_prob[1])


@pytest.mark.parametrize("name", [name for name, backbone in BACKBONES.items() if backbone.flow])
def test_flow_models_on_gaussian_data_in_closed_form(name):
    backbone = BACKBONES[name]
    pipe, x = backbone.ours(), 0.3 + 0.7 * backbone.noise()
    pipe.transformer = GaussianFlow(pipe.transformer, 1.0 if name == "Flux" else 1e-3)
    total = 0.5 + 999.0**-2
    exact = torch.distributions.Normal(0.3, total**0.5).log_prob(x.double()).flatten(1).sum(1)
    errors = []
    for steps in (80, 160):  # one probe: exact, the Jacobian is a multiple of the identity
        out = backbone.score(
            pipe, latents=x, num_inference_steps=steps, num_probes=1, prior_mean=0.3, prior_variance=0.5
        )
        errors.append((out.log_prob - exact).abs().max())
    assert float(errors[1]) < 1e-3  # nats, of 70
    assert float(errors[0] / errors[1]) > 6  # the default scheme is of order three or more: 8, 16; rounding takes some


# Folders


@pytest.mark.cell("save and load")
@pytest.mark.parametrize("with_fisher_scheduler", [False, True], ids=["stock scheduler", "Fisher scheduler"])
def test_folder_is_read_by_stock_diffusers_and_by_ours(backbone, with_fisher_scheduler, tmp_path):
    pipe = backbone.ours()
    if with_fisher_scheduler:
        pipe.scheduler = fisher_scheduler(type(pipe.scheduler)).from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    ours = tiny.quiet(backbone.cls.from_pretrained(tmp_path))
    stock = tiny.quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path))
    assert type(stock) is backbone.stock
    assert type(ours) is backbone.cls
    assert type(ours.scheduler) is type(pipe.scheduler)
    results = []
    for each in (pipe, ours, stock):
        torch.manual_seed(0)
        results.append(backbone.sample(each, output_type="np", generator=seeded()))
    assert (results[1] == results[2]).all()
    if backbone.name == "HiDreamImage":  # weights mapped from a file get other kernels in its text encoders
        assert abs(results[0] - results[1]).max() < 1e-5
    else:
        assert (results[0] == results[1]).all()


def test_custom_pipeline_file(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    backbone.make(cls=backbone.stock).save_pretrained(tmp_path / "stock")
    file = custom_pipeline_file(backbone.cls.__name__)
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        str(tmp_path / "stock"), custom_pipeline=file, trust_remote_code=True
    )
    assert type(pipe) is backbone.cls


def test_stock_pipeline_becomes_ours_over_the_same_components(backbone):
    stock = backbone.make(cls=backbone.stock)
    ours = fisher_pipeline(stock)
    assert type(ours) is backbone.cls is fisher_pipeline(backbone.stock)
    assert fisher_pipeline(ours) is ours
    parts = [part for part in stock.components if part != "scheduler"]
    assert all(getattr(ours, part) is getattr(stock, part) for part in parts)
    assert ours.scheduler.config == stock.scheduler.config


# What users do to pipelines


def reference_values(backbone, pipe, trace=None, **options):
    out = backbone.guide(pipe, brightness, num_inference_steps=2, num_guidance_steps=1, generator=seeded(), **options)
    likelihood = backbone.score(pipe, latents=0.5 * backbone.noise(), num_inference_steps=2, estimator=trace)
    return out.rewards, out.gradient_norms, likelihood.log_prob


@pytest.mark.cell("model offload")
def test_model_offload_gives_the_same_values(backbone):
    expected, pipe = reference_values(backbone, backbone.ours()), backbone.ours()
    if not backbone.offload:
        with pytest.raises(ValueError, match="no `model_cpu_offload_seq` class attribute is set"):
            pipe.enable_model_cpu_offload(device="cpu")
        pytest.skip("diffusers offers no model offload for this class")
    pipe.enable_model_cpu_offload(device="cpu")
    assert all(torch.equal(*pair) for pair in zip(expected, reference_values(backbone, pipe), strict=True))
    assert len(pipe._all_hooks) > 0


@pytest.mark.gpu
def test_sequential_offload_gives_the_same_values(backbone):
    """On a CPU alone accelerate's hooks fail, also in the stock call: they take weights on it for loaded already."""
    expected, pipe = reference_values(backbone, backbone.ours().to("cuda")), backbone.ours()
    pipe.enable_sequential_cpu_offload()
    for value, reference in zip(reference_values(backbone, pipe), expected, strict=True):
        assert relative(value, reference) < 1e-3  # other kernels on another alignment of the weights


# Relative differences of rewards, gradient norms and log-likelihoods of random networks: measured with the 8 bits of
# bfloat16 up to (0.005, 0.051, 0.004), with the 11 of float16 up to (0.0004, 0.014, 0.0006).
HALF = {"bfloat16": (0.02, 0.06, 0.01), "float16": (0.001, 0.05, 0.002)}
# Networks of `FAMILIES`: gradient norms in bfloat16 up to 0.066 (HunyuanDiT), log-likelihoods up to 0.014 and 0.0025
# (Chroma, which computes its modulations by a network of its own).
HALF_OF_FAMILIES = {"bfloat16": (0.04, 0.12, 0.03), "float16": (0.002, 0.1, 0.005)}


@pytest.mark.cell("{half}")
@pytest.mark.parametrize("half", HALF)
def test_half_precision_weights_give_nearly_the_same_values(backbone, half):
    # Differences leave the rounding's noise in the trace, divided by their step: too much in so few dimensions.
    expected = reference_values(backbone, backbone.ours(), AutodiffFisher())
    pipe = backbone.ours()
    pipe.to(dtype=getattr(torch, half))
    if half == "float16" and backbone.name == "StableDiffusionXL":
        pipe.vae.to(torch.float32)  # its autoencoder overflows in float16, and is refused
    values = reference_values(backbone, pipe, AutodiffFisher())
    assert {value.dtype for value in values} == {torch.float64}
    tolerances = (HALF_OF_FAMILIES if backbone.name in FAMILIES else HALF)[half]
    for value, reference, tolerance in zip(values, expected, tolerances, strict=True):
        assert 0 < relative(value, reference) < tolerance


def tiled(pipe):
    """Latents of 8x8 are decoded, and images of 16x16 encoded, sample by sample in 3x3 tiles that overlap."""
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 4, 8
    return pipe


@pytest.mark.parametrize("name", [name for name, backbone in BACKBONES.items() if hasattr(backbone.ours(), "vae")])
def test_sliced_and_tiled_autoencoder(name):
    backbone = dataclasses.replace(BACKBONES[name], shape=(4, 8, 8), pixels=(16, 16))
    whole_pipe, pipe, stock = backbone.ours(), tiled(backbone.ours()), tiled(backbone.make(cls=backbone.stock))
    latents = backbone.sample(pipe, generator=seeded())
    with torch.no_grad():
        tiled_images, whole_images = (
            backbone_of(each).decode(latents, backbone.pixels) for each in (pipe, whole_pipe)
        )
    images = backbone.sample(stock, generator=seeded(), output_type="np")
    assert (tiled_images.permute(0, 2, 3, 1).numpy() == images).all()
    assert relative(tiled_images, whole_images) > 1e-3
    images = torch.rand(whole_images.shape, generator=seeded())
    keys = {"image_keys": ["a", "b"]}
    out, whole_out = (backbone.score(each, images=images, **keys) for each in (pipe, whole_pipe))
    expected = backbone.score(pipe, latents=latents_of(stock, images), **keys)
    assert torch.equal(out.log_prob, expected.log_prob)
    assert relative(out.log_prob, whole_out.log_prob) > 1e-5
    sizes = []
    pipe.vae.decoder.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    guidance_out = backbone.guide(pipe, brightness, num_inference_steps=2, num_guidance_steps=1, generator=seeded())
    assert set(sizes) == {1}
    assert bool((guidance_out.gradient_norms > 0).all())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns when it traces and compiles
def test_compiled_network_gives_nearly_the_same_values(backbone):
    from torch._functorch import config

    expected, pipe = reference_values(backbone, backbone.ours()), backbone.ours()
    setattr(pipe, backbone.network, torch.compile(getattr(pipe, backbone.network)))
    # Two products of one graph need it, and are refused in words without: see the tests of AutodiffFisher.
    with config.patch(donated_buffer=False):
        values = reference_values(backbone, pipe)
        values += (backbone.score(pipe, latents=0.5 * backbone.noise(), num_inference_steps=2).log_prob,)
    expected += (backbone.score(backbone.ours(), latents=0.5 * backbone.noise(), num_inference_steps=2).log_prob,)
    for value, reference in zip(values, expected, strict=True):
        assert relative(value, reference) < 1e-3  # fused kernels round otherwise, and a random network amplifies it
