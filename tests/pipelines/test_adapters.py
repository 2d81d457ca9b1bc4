"""LoRA and IP-Adapter, loaded from files as users do: stock outputs, exact gradients, their own likelihood."""

import inspect

import pytest
import tiny
import torch
from cases import relative
from diffusers.models.attention_processor import IPAdapterAttnProcessor
from diffusers.models.embeddings import ImageProjection
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from diffusers_fisher import (
    AutodiffFisher,
    DirectFisher,
    FisherTraceModel,
    InputError,
    PipelineDenoiser,
    fisher_scheduler,
)
from pipelines.backbones import BACKBONES

GRADIENT = 1e-5  # float32, the same products in another order: measured up to 2e-6
LORA = ["StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux"]
IMAGES = ["StableDiffusion", "StableDiffusionXL"]
WIDTH = 12  # width of the image embeddings


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def brightness(images, conditions):
    return images.mean((1, 2, 3))


def lora_file(backbone, folder):
    """Writes a LoRA of the backbone's attention, as training scripts save it."""
    pipe = backbone.make(cls=backbone.stock)
    network = getattr(pipe, backbone.network)
    torch.manual_seed(5)
    settings = LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    network.add_adapter(settings)
    backbone.stock.save_lora_weights(folder, **{f"{backbone.network}_lora_layers": get_peft_model_state_dict(network)})
    return folder


@pytest.fixture(params=LORA)
def backbone(request):
    return BACKBONES[request.param]


def with_lora(backbone, folder, cls=None):
    pipe = backbone.make(cls=cls or backbone.cls)
    pipe.load_lora_weights(folder)
    return pipe


def strength(backbone, scale):
    """Returns the call's argument for the adapter's weight."""
    name = "cross_attention_kwargs" if backbone.network == "unet" else "joint_attention_kwargs"
    return {name: {"scale": scale}}


def check_gradient(backbone, pipe, **arguments):
    """Compares a guided run's gradient, by the network's Jacobian, with back-propagation through the stock call."""
    noise, weight = (backbone.packed(pipe, backbone.noise(seed=seed)) for seed in (0, 1))
    leaf = noise.clone().requires_grad_()
    reference = backbone.sample(pipe, True, inspect.unwrap(type(pipe).__call__), latents=leaf, **arguments)
    (exact,) = torch.autograd.grad((weight * reference).sum(), leaf)
    pipe.scheduler = fisher_scheduler(type(pipe.scheduler)).from_config(pipe.scheduler.config)
    call_arguments = {**backbone.call, **backbone.options, **backbone.size(), **backbone.guidance(True), **arguments}
    with pipe.scheduler.differentiable(AutodiffFisher(PipelineDenoiser(pipe, **call_arguments))) as trajectory:
        result = backbone.sample(pipe, latents=noise, **arguments)
    assert relative(trajectory.gradient((weight * result).sum()), exact) < GRADIENT


# LoRA


def test_lora_gives_the_stock_results_and_exact_gradients(backbone, tmp_path):
    folder = lora_file(backbone, tmp_path)
    stock, ours = with_lora(backbone, folder, backbone.stock), with_lora(backbone, folder)
    results = [backbone.sample(pipe, output_type="np", generator=seeded()) for pipe in (stock, ours, backbone.ours())]
    assert (results[0] == results[1]).all()
    assert (results[0] != results[2]).any()
    before = tiny.snapshot(ours)["modules"]
    out = backbone.guide(
        ours, brightness, estimator=DirectFisher(), num_inference_steps=2, num_guidance_steps=1, generator=seeded()
    )
    assert bool((out.gradient_norms > 0).all())
    assert tiny.snapshot(ours)["modules"] == before
    check_gradient(backbone, ours)


def test_likelihood_with_lora_is_that_of_the_weights_with_it_added(backbone, tmp_path):
    folder = lora_file(backbone, tmp_path)
    x, options = 0.5 * backbone.noise(), {"num_probes": 1}
    reference = backbone.score(backbone.ours(), latents=x, **options).log_prob
    for scale in (1.0, 0.25):
        lora_pipe, fused_pipe = with_lora(backbone, folder), with_lora(backbone, folder)
        fused_pipe.fuse_lora(lora_scale=scale)
        fused_pipe.unload_lora_weights()
        arguments = {} if scale == 1.0 else strength(backbone, scale)
        log_prob = backbone.score(lora_pipe, latents=x, **options, **arguments).log_prob
        expected = backbone.score(fused_pipe, latents=x, **options).log_prob
        # float32: W x + B A x against (W + B A) x, in nats of a random network that amplifies it.
        torch.testing.assert_close(log_prob, expected, rtol=1e-4, atol=1e-3)
        assert float((log_prob - reference).abs().max()) > 1e-2


def test_trace_model_of_the_checkpoint_without_the_lora_is_refused(backbone, tmp_path):
    pipe, x = backbone.ours(), backbone.noise()
    shape = backbone.packed(pipe, x).shape
    layout = {"layout": "image", "in_channels": shape[1]} if len(shape) == 4 else {
        "layout": "tokens", "in_channels": shape[2]
    }  # fmt: skip
    pipe.trace_model = FisherTraceModel(block_out_channels=(4,), head_channels=8, time_channels=8, **layout)
    pipe.trace_model.set_fingerprint(pipe)
    assert bool(torch.isfinite(backbone.score(pipe, latents=x).log_prob).all())
    pipe.load_lora_weights(lora_file(backbone, tmp_path))
    with pytest.raises(InputError, match=r"for another denoiser\. What differs: names or shapes of param"):
        backbone.score(pipe, latents=x)


# IP-Adapter


def image_adapter_file(backbone, folder):
    """Writes an IP-Adapter of the pipeline's network, in the layout of public ones."""
    network = backbone.make(cls=backbone.stock).unet
    torch.manual_seed(6)
    width, channels = network.config.cross_attention_dim, network.config.block_out_channels
    tensors = {}
    projection = ImageProjection(image_embed_dim=WIDTH, cross_attention_dim=width, num_image_text_embeds=4)
    for name, tensor in projection.state_dict().items():
        tensors["image_proj." + name.replace("image_embeds", "proj")] = tensor
    cross_attention = [name for name in network.attn_processors if "attn2" in name]
    for index, name in enumerate(cross_attention):
        place = name.split(".")
        kind = place[0]
        block = {"mid_block": -1, "down_blocks": int(place[1]) if kind == "down_blocks" else 0,
                 "up_blocks": -1 - int(place[1]) if kind == "up_blocks" else 0}[kind]  # fmt: skip
        processor = IPAdapterAttnProcessor(hidden_size=channels[block], cross_attention_dim=width)
        for matrix in ("to_k_ip", "to_v_ip"):
            tensors[f"ip_adapter.{2 * index + 1}.{matrix}.weight"] = 5 * getattr(processor, matrix)[0].weight.detach()
    save_file(tensors, folder / "adapter.safetensors")


def with_image_adapter(backbone, folder, cls=None):
    pipe = backbone.make(cls=cls or backbone.cls)
    pipe.load_ip_adapter(folder, subfolder="", weight_name="adapter.safetensors", image_encoder_folder=None)
    return pipe


def image_embeddings(with_guidance):
    """Returns one image's embeddings for all samples, as the stock call makes them; with guidance, two of them."""
    return {"ip_adapter_image_embeds": [torch.randn(2 if with_guidance else 1, 1, WIDTH, generator=seeded(7))]}


@pytest.mark.parametrize("name", IMAGES)
def test_image_adapter_gives_the_stock_results_and_exact_gradients(name, tmp_path):
    backbone = BACKBONES[name]
    image_adapter_file(backbone, tmp_path)
    stock, ours = with_image_adapter(backbone, tmp_path, backbone.stock), with_image_adapter(backbone, tmp_path)
    results = [
        backbone.sample(pipe, output_type="np", generator=seeded(), **image_embeddings(True)) for pipe in (stock, ours)
    ]
    results.append(backbone.sample(backbone.ours(), output_type="np", generator=seeded()))
    assert (results[0] == results[1]).all()
    assert (results[0] != results[2]).any()
    out = backbone.guide(
        ours, brightness, estimator=AutodiffFisher(), num_inference_steps=2, num_guidance_steps=1,
        generator=seeded(), **image_embeddings(True),
    )  # fmt: skip
    assert bool((out.gradient_norms > 0).all())
    check_gradient(backbone, ours, **image_embeddings(True))


@pytest.mark.parametrize("name", IMAGES)
def test_likelihood_with_an_image_adapter_is_that_of_the_network_given_the_image(name, tmp_path):
    backbone = BACKBONES[name]
    image_adapter_file(backbone, tmp_path)
    pipe, x, embeddings = with_image_adapter(backbone, tmp_path), backbone.noise(), image_embeddings(False)
    denoiser = PipelineDenoiser(pipe, **{**backbone.call, **backbone.size(), **embeddings})
    with torch.no_grad():
        prompt_encoding = pipe.encode_prompt(
            backbone.condition, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        conditions = {"image_embeds": [embeddings["ip_adapter_image_embeds"][0].expand(2, -1, -1)]}
        if name == "StableDiffusionXL":
            height, width = backbone.pixels
            ids = torch.tensor([[height, width, 0, 0, height, width]] * 2).float()
            conditions |= {"text_embeds": prompt_encoding[2], "time_ids": ids}
        expected = pipe.unet(x, 500, prompt_encoding[0], added_cond_kwargs=conditions).sample
    assert torch.equal(denoiser.model_output(x, 500), expected)
    scores = [
        backbone.score(pipe, latents=x, num_probes=1, ip_adapter_image_embeds=[value]).log_prob
        for value in (embeddings["ip_adapter_image_embeds"][0], torch.zeros(1, 1, WIDTH))
    ]
    assert float((scores[0] - scores[1]).abs().min()) > 1e-2
