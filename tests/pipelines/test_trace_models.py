"""A trace model of every backbone's denoiser: in likelihoods and guidance, with pooled embeddings, kept in folders."""

import dataclasses

import diffusers
import pytest
import tiny
import torch
from trace_cases import SMALL, disturb

from diffusers_fisher import (
    AutodiffFisher,
    CheckpointError,
    Covariance,
    DirectFisher,
    FiniteDifferenceFisher,
    FisherTraceModel,
    GaussianFisher,
    InputError,
    PipelineDenoiser,
    StableDiffusionFisherPipeline,
    TraceCorrectedFisher,
    TraceMatchingFisher,
    UnsupportedError,
    fisher_scheduler,
    posterior_guidance,
)
from diffusers_fisher.backbones import backbone_of
from diffusers_fisher.backbones.parts import load_trace_model
from diffusers_fisher.features import output_norm, record_summaries
from diffusers_fisher.jobs.pipelines import DenoiserSettings
from diffusers_fisher.noise import timestep_at
from diffusers_fisher.training.trace_config import (
    ModelSettings,
    TraceMatchingConfig,
    TraceOptimisation,
    make_trace_model,
)
from pipelines.backbones import BACKBONES, EVERY, FAMILIES

CONDITIONED = [name for name, backbone in BACKBONES.items() if backbone.condition is not None]


@pytest.fixture(params=EVERY)
def backbone(request):
    return (BACKBONES | FAMILIES)[request.param]


def model_of(backbone, pipe, fingerprint=True, **settings):
    """Makes an untrained trace model for the pipeline's own layout, with noise on its weights as though trained."""
    shape = tuple(backbone.packed(pipe, backbone.noise(1)).shape[1:])
    layout, channels = ("image", shape[0]) if len(shape) == 3 else ("tokens", shape[-1])
    torch.manual_seed(0)
    model = FisherTraceModel(in_channels=channels, layout=layout, **{**SMALL, **settings})
    model.set_prior(0.0, 0.5)
    if fingerprint:
        # The timesteps of CogView4 depend on the size, which a pipeline alone does not have.
        model.set_fingerprint(likelihood_denoiser(backbone, pipe) if backbone.name == "CogView4" else pipe)
    return disturb(model, 0.1).eval()


def brightness(images, conditions):
    return images.mean((1, 2, 3))


def run_guidance(backbone, pipe, **options):
    options = {"num_inference_steps": 3, "num_guidance_steps": 1, "output_type": "pt", **options}
    return backbone.guide(pipe, brightness, generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.cell("trace model")
def test_likelihood_and_guidance_know_the_trace_from_it(backbone):
    pipe = backbone.ours()
    x, model = 0.5 * backbone.noise(), model_of(backbone, pipe)
    before = backbone.score(pipe, latents=x)
    pipe.trace_model = model
    out = backbone.score(pipe, latents=x)
    assert out.trace == "TraceMatchingFisher (target residual), no probes"
    assert bool((out.standard_error == 0).all())
    assert out.num_denoiser_calls == 4 + 4  # each of the few levels is checked
    explicit = backbone.score(pipe, latents=x, estimator=TraceMatchingFisher(model), generator=None)
    assert torch.equal(out.log_prob, explicit.log_prob)
    # The integrand begins with the model's own r at the first node, x_t = alpha x.
    denoiser = likelihood_denoiser(backbone, pipe)
    timestep = timestep_at(denoiser.scheduler, out.noise_to_signal.log())[0]
    start = float(denoiser.level(timestep).alpha) * backbone.packed(pipe, x)
    r = model.unexplained_noise_fraction(denoiser.state(start, timestep.float()))
    torch.testing.assert_close(
        out.unexplained_noise_fraction[0], r, rtol=1e-4, atol=0
    )  # float32 samples, and logits of them
    differences = backbone.score(pipe, latents=x, estimator=FiniteDifferenceFisher())
    assert torch.equal(differences.log_prob, before.log_prob)
    assert differences.trace == before.trace == "FiniteDifferenceFisher, 1 probe per level"
    guidance_out = run_guidance(backbone, pipe, estimator=TraceMatchingFisher(model))
    assert bool((guidance_out.gradient_norms > 0).all())
    assert guidance_out.num_denoiser_calls == run_guidance(backbone, pipe, estimator=DirectFisher()).num_denoiser_calls


# Features of the denoiser


def hidden_layers(backbone, pipe, call):
    """Returns the inputs of the module before the output layers while `call` runs."""
    network, hidden = getattr(pipe, backbone.network), []
    module = network.norm_out if hasattr(network, "norm_out") else network.conv_norm_out
    handle = module.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0].detach()))
    call()
    handle.remove()
    assert not module._forward_pre_hooks
    return hidden


def pipe_with_features(backbone):
    pipe = backbone.ours()
    if output_norm(getattr(pipe, backbone.network)) is None:
        pytest.skip("This network has no normalisation of a known name before its output layers.")
    return pipe


def likelihood_denoiser(backbone, pipe):
    calls = {**backbone.call, **backbone.options, **backbone.size()}
    return PipelineDenoiser(pipe, backbone_of(pipe).unguided_scale({}), **calls)


def test_states_have_features_of_the_last_hidden_layer(backbone):
    pipe = pipe_with_features(backbone)
    denoiser, x, states = likelihood_denoiser(backbone, pipe), backbone.packed(pipe, backbone.noise()), []
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            point = x.clone().requires_grad_(gradients)
            (hidden,) = hidden_layers(backbone, pipe, lambda p=point: states.append(denoiser.state(p, 0.5)))
        axes = (2, 3) if hidden.ndim == 4 else (1,)
        expected = torch.cat([hidden.mean(axes), hidden.std(axes, correction=0)], dim=1)
        assert torch.allclose(states[-1].features, expected, rtol=1e-5, atol=1e-6)  # float32 sums in another order
        assert not states[-1].features.requires_grad


def test_guided_states_have_no_features():
    """Two conditions make the output, so that the features would belong to neither."""
    backbone = BACKBONES["StableDiffusion"]
    pipe = backbone.ours()
    denoiser = PipelineDenoiser(pipe, 3.0, **backbone.call, **backbone.size())
    assert denoiser.state(backbone.noise(), 500).features is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler warns of torch itself
def test_compiled_networks_have_no_features():
    network = tiny.unet()
    assert output_norm(network) is network.conv_norm_out
    assert output_norm(torch.compile(network)) is None  # a wrapper, which compiles at its first call
    network.compile()
    with record_summaries(network) as summaries:
        assert output_norm(network) is None and summaries == []
    assert output_norm(None) is None and output_norm(torch.nn.Linear(2, 2)) is None


def test_likelihood_and_guidance_of_a_model_with_features(backbone):
    """The likelihood's states have features, the states of a sampler's run do not."""
    pipe, x = pipe_with_features(backbone), 0.5 * backbone.noise()
    denoiser = likelihood_denoiser(backbone, pipe)
    start = backbone.packed(pipe, x)
    width = denoiser.state(start, 0.5).features.shape[1]
    pipe.trace_model = model = model_of(backbone, pipe, feature_channels=width)
    torch.nn.init.constant_(model.summaries.none, 10.0)  # so that r without features is far off
    out = backbone.score(pipe, latents=x)
    timestep = timestep_at(denoiser.scheduler, out.noise_to_signal.log())[0]
    state = denoiser.state(float(denoiser.level(timestep).alpha) * start, timestep.float())
    result, expected = (
        out.unexplained_noise_fraction[0].logit(),
        model.unexplained_noise_fraction(state).logit(),
    )  # r is nearly 1 at the first level
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-3)  # float32 samples, and logits of them
    featureless = model.unexplained_noise_fraction(dataclasses.replace(state, features=None)).logit()
    assert float((featureless - expected).abs().min()) > 1e-2
    assert bool((run_guidance(backbone, pipe, estimator=TraceMatchingFisher(model)).gradient_norms > 0).all())


@pytest.mark.parametrize("settings", [{"output": "diagonal"}, {"target": "norm"}], ids=str)
def test_other_kinds_of_models(backbone, settings):
    pipe = backbone.ours()
    pipe.trace_model = model_of(backbone, pipe, **settings)
    out = backbone.score(pipe, latents=0.5 * backbone.noise())
    assert bool(torch.isfinite(out.log_prob).all())
    assert bool(
        (run_guidance(backbone, pipe, estimator=TraceMatchingFisher(pipe.trace_model)).gradient_norms > 0).all()
    )


@pytest.mark.parametrize("name", ["StableDiffusion", "Flux"])
def test_number_of_probes(name):
    backbone = BACKBONES[name]
    pipe, x = backbone.ours(), 0.5 * backbone.noise()
    pipe.trace_model = model_of(backbone, pipe)
    assert (
        backbone.score(pipe, latents=x, num_probes=3).trace
        == "TraceMatchingFisher (target residual), 3 probes per level"
    )
    single = backbone.score(pipe, 1, latents=x[:1], estimator=AutodiffFisher(), num_probes=None)
    assert single.trace == "AutodiffFisher, no probes"
    with pytest.raises(InputError, match="`num_probes` is 0; allowed: at least 1, or None"):
        backbone.score(pipe, latents=x, num_probes=0)


@pytest.mark.parametrize("prior", ["sample", "channel"])
def test_trace_models_of_packed_tokens_are_made_for_every_image_size(prior):
    backbone = BACKBONES["Flux"]
    pipe = backbone.ours()
    x = 0.5 * backbone.noise(1)
    shape = tuple(backbone.packed(pipe, x).shape[1:])
    settings = ModelSettings(prior=prior, block_out_channels=[4, 8], head_channels=8, time_channels=8)
    optimisation = TraceOptimisation(1, 1, 1e-3, 0.0, 0, 0.0, 1, log_every=1)
    config = TraceMatchingConfig(0, "", "residual", DenoiserSettings(""), optimisation, settings)
    model = make_trace_model(config, pipe, shape)
    assert model.prior.mean.shape == (1, shape[1])
    pipe.trace_model = model
    for size in ((4, 4), (8, 4)):
        latents = torch.randn(1, backbone.shape[0], *size, generator=torch.Generator().manual_seed(0))
        assert bool(torch.isfinite(backbone.score(pipe, 1, latents=latents).log_prob).all())


# Fingerprints


def test_fingerprint_is_that_of_the_pipeline_and_of_no_other(backbone):
    pipe = backbone.ours()
    model = model_of(backbone, pipe)
    assert {"denoiser", "weights", "prediction_type", "schedule"} <= model.config["fingerprint"].keys()
    stock = backbone.make(cls=backbone.stock)
    model.check_fingerprint(likelihood_denoiser(backbone, stock) if backbone.name == "CogView4" else stock)
    with torch.no_grad():
        for parameter in getattr(pipe, backbone.network).parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    pipe.trace_model = model
    message = "The trace model was trained for another denoiser. What differs: weights of the denoiser"
    with pytest.raises(InputError, match=message):
        backbone.score(pipe, latents=backbone.noise())
    with pytest.raises(InputError, match=message):
        run_guidance(backbone, pipe, estimator=TraceMatchingFisher(model))
    estimator = TraceMatchingFisher(model, check=False)
    assert bool(torch.isfinite(backbone.score(pipe, latents=backbone.noise(), estimator=estimator).log_prob).all())


def test_guidance_step_by_step_refuses_a_trace_model_of_another_denoiser():
    backbone = BACKBONES["StableDiffusion"]
    pipe, other = backbone.make(cls=backbone.stock), backbone.make(cls=backbone.stock)
    other.unet.conv_in.weight.data += 0.1
    model_estimator = TraceMatchingFisher(model_of(backbone, backbone.ours()))
    with posterior_guidance(pipe, brightness, estimator=model_estimator):
        pass
    prior = GaussianFisher(Covariance.isotropic(0.5, backbone.shape))
    for estimator in (model_estimator, TraceCorrectedFisher(prior, model_estimator)):
        with (
            pytest.raises(InputError, match="What differs: weights of the denoiser"),
            posterior_guidance(other, brightness, estimator=estimator),
        ):
            pass
    with posterior_guidance(
        other, brightness, estimator=TraceMatchingFisher(model_estimator.trace_model, check=False)
    ):
        pass


# Pooled embeddings


def pooled_by_hand(backbone, pipe):
    """Returns pooled vectors (2, width) by the text encoders themselves."""
    name, prompts = backbone.name, backbone.condition
    if name == "DiT":
        weight = pipe.transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
        return weight[torch.tensor(prompts)]
    if name.startswith("PixArt"):
        tokens = pipe.tokenizer(prompts, padding="max_length", max_length=8, return_tensors="pt")
        states = pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        rows = zip(states, tokens.attention_mask.sum(1).tolist(), strict=True)
        return torch.stack([state[:length].mean(0) for state, length in rows])
    tokens = pipe.tokenizer(prompts, padding="max_length", max_length=8, truncation=True, return_tensors="pt")
    if name in ("StableDiffusion", "Flux"):
        return pipe.text_encoder(tokens.input_ids).pooler_output
    encoders = [pipe.text_encoder, pipe.text_encoder_2] if name == "StableDiffusion3" else [pipe.text_encoder_2]
    return torch.cat([encoder(tokens.input_ids).text_embeds for encoder in encoders], 1)


@pytest.mark.parametrize("name", CONDITIONED)
def test_pooled_embeddings_are_those_of_each_sample_s_condition(name):
    backbone = BACKBONES[name]
    pipe = backbone.ours()
    with torch.no_grad():
        pooled = pooled_by_hand(backbone, pipe)
    assert not torch.equal(pooled[0], pooled[1])
    model = model_of(backbone, pipe, pooled_channels=pooled.shape[1])
    pipe.trace_model, x = model, 0.5 * backbone.noise()
    out = backbone.score(pipe, latents=x)
    reference = backbone.score(pipe, latents=x, estimator=TraceMatchingFisher(model, pooled))
    torch.testing.assert_close(out.log_prob, reference.log_prob, rtol=1e-6, atol=0)  # float32, other batches
    swapped_out = backbone.score(pipe, latents=x, estimator=TraceMatchingFisher(model, pooled.flip(0)))
    assert float((out.log_prob - swapped_out.log_prob).abs().min()) > 1e-3
    rewards = run_guidance(backbone, pipe, estimator=TraceMatchingFisher(model)).rewards
    expected = run_guidance(backbone, pipe, estimator=TraceMatchingFisher(model, pooled)).rewards
    torch.testing.assert_close(rewards, expected, rtol=1e-5, atol=0)


def test_pooled_embeddings_that_come_with_the_prompt_s_embeddings():
    backbone = BACKBONES["StableDiffusionXL"]
    pipe, x = backbone.ours(), 0.5 * backbone.noise()
    pipe.trace_model = model_of(backbone, pipe, pooled_channels=16)
    embeds, _, pooled, _ = pipe.encode_prompt(backbone.condition, do_classifier_free_guidance=False)
    options = {"latents": x, "num_inference_steps": 3, "step_halving": False}
    out = pipe.log_likelihood(**options, prompt_embeds=embeds, pooled_prompt_embeds=pooled)
    assert torch.equal(out.log_prob, pipe.log_likelihood(prompt=backbone.condition, **options).log_prob)


def test_parts_of_a_trace_corrected_estimator_are_bound():
    backbone = BACKBONES["StableDiffusion"]
    pipe, other = backbone.ours(), backbone.ours()
    other.unet.conv_in.bias.data += 0.1
    model_estimator, foreign_estimator = (
        TraceMatchingFisher(model_of(backbone, each, pooled_channels=16)) for each in (pipe, other)
    )
    x = 0.5 * backbone.noise()
    prior = GaussianFisher(Covariance.diagonal(torch.linspace(0.1, 2, x[0].numel()).view(1, *x[0].shape)))
    out = backbone.score(pipe, latents=x, estimator=TraceCorrectedFisher(prior, model_estimator))
    expected = backbone.score(pipe, latents=x, estimator=model_estimator)
    torch.testing.assert_close(out.trace_log_prob, expected.trace_log_prob, rtol=1e-5, atol=1e-5)  # float32 sums
    with pytest.raises(InputError, match="trained for"):
        run_guidance(backbone, pipe, estimator=TraceCorrectedFisher(prior, foreign_estimator))


def test_differences_inside_a_combination_need_no_output_of_another_guidance_scale():
    backbone = BACKBONES["StableDiffusion"]
    pipe = backbone.ours()
    prior = GaussianFisher(Covariance.isotropic(0.5, backbone.shape))
    options = {"adjoint_guidance_scale": 1.0, "num_inference_steps": 2}
    central, forward = (
        run_guidance(
            backbone, pipe, estimator=TraceCorrectedFisher(FiniteDifferenceFisher(central=kind), prior), **options
        )
        for kind in (True, False)
    )
    assert torch.equal(forward.rewards, central.rewards)
    assert forward.num_denoiser_calls == central.num_denoiser_calls


def test_embeddings_that_have_no_pooled_output_are_refused():
    backbone = BACKBONES["StableDiffusion"]
    pipe = backbone.ours()
    pipe.trace_model = model_of(backbone, pipe, pooled_channels=16)
    embeds = pipe.encode_prompt(["a"], "cpu", 1, False)[0]
    options = {"latents": backbone.noise(), "num_inference_steps": 2, "prompt_embeds": embeds}
    with pytest.raises(InputError, match="takes the text encoder's pooled output, which `prompt_embeds` do not have"):
        pipe.log_likelihood(**options)
    pooled_estimator = TraceMatchingFisher(pipe.trace_model, pooled=torch.zeros(1, 16))
    assert bool(torch.isfinite(pipe.log_likelihood(**options, estimator=pooled_estimator).log_prob).all())


def test_pooled_embeddings_of_another_width_are_refused():
    backbone = BACKBONES["StableDiffusion3"]
    pipe = backbone.ours()
    pipe.trace_model = model_of(backbone, pipe, pooled_channels=5)
    with pytest.raises(InputError, match=r"`pooled` has shape \(2, 16\); allowed: \(2, 5\), by the trace model's"):
        backbone.score(pipe, latents=backbone.noise())


@pytest.mark.parametrize("name", sorted(BACKBONES.keys() - set(CONDITIONED)))
def test_unconditional_pipelines_have_no_pooled_vectors(name):
    backbone = BACKBONES[name]
    pipe = backbone.ours()
    pipe.trace_model = model_of(backbone, pipe, pooled_channels=5)
    with pytest.raises(UnsupportedError, match="has no conditions, so no pooled vector for a trace model with"):
        backbone.score(pipe, latents=backbone.noise())


# Folders


@pytest.mark.cell("trace model")
def test_folder_keeps_the_trace_model_and_stock_diffusers_reads_it(backbone, tmp_path):
    pipe, x = backbone.ours(), 0.5 * backbone.noise()
    pipe.scheduler = fisher_scheduler(type(pipe.scheduler)).from_config(pipe.scheduler.config)
    pipe.trace_model = model_of(backbone, pipe)
    pipe.save_pretrained(tmp_path)
    assert sorted(file.name for file in (tmp_path / "trace_model").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors"
    ]  # fmt: skip
    loaded_pipe = tiny.quiet(backbone.cls.from_pretrained(tmp_path))
    assert loaded_pipe.trace_model.config["fingerprint"] == pipe.trace_model.config["fingerprint"]
    loaded_weights, weights = loaded_pipe.trace_model.state_dict(), pipe.trace_model.state_dict()
    assert loaded_weights.keys() == weights.keys()
    assert all(torch.equal(loaded_weights[key], weights[key]) for key in weights)
    log_prob, expected = (backbone.score(each, latents=x).log_prob for each in (loaded_pipe, pipe))
    # Weights mapped from a file lie otherwise in memory and get other kernels: measured up to 6e-6.
    torch.testing.assert_close(log_prob, expected, rtol=3e-5, atol=0)
    stock = tiny.quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path))
    assert type(stock) is backbone.stock
    assert not hasattr(stock, "trace_model")
    component_pipe = tiny.quiet(backbone.cls(**stock.components))
    assert component_pipe.trace_model is None  # components have no folder


@pytest.fixture
def checkpoint(tmp_path):
    backbone = BACKBONES["StableDiffusion"]
    pipe = backbone.ours()
    pipe.trace_model = model_of(backbone, pipe)
    pipe.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def load(folder, cls=StableDiffusionFisherPipeline, **options):
    return tiny.quiet(cls.from_pretrained(folder, **options))


def test_pipeline_that_a_stock_class_loaded_finds_it(checkpoint):
    pipe = StableDiffusionFisherPipeline.from_pipe(load(checkpoint, diffusers.DiffusionPipeline))
    assert isinstance(pipe.trace_model, FisherTraceModel)
    assert pipe.trace_model is pipe.trace_model
    pipe.trace_model = None
    assert pipe.trace_model is None


def test_trace_model_of_a_pipeline_saved_there_before_is_removed(checkpoint):
    pipe = load(checkpoint)
    pipe.trace_model = None
    (checkpoint / "trace_model" / "README.md").write_text("kept")
    pipe.save_pretrained(checkpoint)
    assert [file.name for file in (checkpoint / "trace_model").iterdir()] == ["README.md"]
    (checkpoint / "trace_model" / "README.md").unlink()
    assert load(checkpoint).trace_model is None
    pipe.save_pretrained(checkpoint)
    assert not (checkpoint / "trace_model").exists()


def test_it_follows_the_pipeline_to_a_device_in_its_own_precision(checkpoint):
    pipe = load(checkpoint, dtype=torch.bfloat16)
    assert (pipe.unet.dtype, pipe.trace_model.dtype) == (torch.bfloat16, torch.float32)
    pipe.to(dtype=torch.float32)
    assert pipe.to("meta") is pipe
    assert pipe.trace_model.device == torch.device("meta")


def test_trace_model_comes_from_the_hub_if_the_repository_has_one(checkpoint, monkeypatch):
    downloads = []

    def download(repository, name, **options):
        downloads.append((repository, name, options))
        return str(checkpoint / name)

    def from_pretrained(source, **options):
        downloads.append((source, options))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(FisherTraceModel, "from_pretrained", from_pretrained)
    load_trace_model("someone/checkpoint", revision="v2")
    assert downloads == [
        ("someone/checkpoint", "trace_model/config.json", {"revision": "v2"}),
        ("someone/checkpoint", {"subfolder": "trace_model", "revision": "v2"}),
    ]


DAMAGES = {
    "cut config": ("config.json", r"trace_model/config.json' is not valid JSON"),
    "cut weights": ("diffusion_pytorch_model.safetensors", r"trace_model/.*' \(\d+ bytes\) can't be read as safetens"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_trace_models_are_noticed_before_anything_is_loaded(checkpoint, damage):
    name, message = DAMAGES[damage]
    file = checkpoint / "trace_model" / name
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)


def test_objects_that_are_not_trace_models_are_refused():
    pipe = tiny.stable_diffusion(StableDiffusionFisherPipeline)
    with pytest.raises(InputError, match="`trace_model` is a UNet2DConditionModel; allowed: a FisherTraceModel"):
        pipe.trace_model = pipe.unet
