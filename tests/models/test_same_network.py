"""A trace model takes a network of the same function in every form, and refuses one whose outputs are others."""

import copy
import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig

from diffusers_fisher import FisherTraceModel, InputError, embedded_checkpoint, fisher_pipeline
from diffusers_fisher.models import denoiser_fingerprint, fingerprint_differences
from diffusers_fisher.models.fixed_outputs import fixed_outputs


def scale(network, factor, part=""):
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if part in name:
                parameter.mul_(factor)


def add_adapter(network, random):
    torch.manual_seed(1)
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=not random))


def fuse_and_back(network):
    network.fuse_qkv_projections()
    network.unfuse_qkv_projections()


def scale_queries_and_keys(network):
    scale(network, 2.0, "attn1.to_q.weight")
    scale(network, 0.5, "attn1.to_k.weight")


def fuse_adapter(network):
    add_adapter(network, random=True)
    network.fuse_lora()
    network.unload_lora()


OTHERS = {
    "all weights by 1.02": lambda network: scale(network, 1.02),
    "all weights by 0.5": lambda network: scale(network, 0.5),
    "all weights by 2": lambda network: scale(network, 2.0),
    "one layer": lambda network: scale(network, 1.5, "conv_in.weight"),
    "one bias": lambda network: scale(network, 1.5, "conv_out.bias"),
    "adapter in use": lambda network: add_adapter(network, random=True),
    "fused adapter": fuse_adapter,
    "FreeU": lambda network: network.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
}
SAME = {
    "fused projections": lambda network: network.fuse_qkv_projections(),
    "fused projections and back": fuse_and_back,
    "adapter that adds nothing": lambda network: add_adapter(network, random=False),
    "another attention processor": lambda network: network.set_attn_processor(AttnProcessor()),
    "memory format": lambda network: network.to(memory_format=torch.channels_last),
    "queries by 2 and keys by 1/2": scale_queries_and_keys,
    "double precision": lambda network: network.double(),
    "half precision": lambda network: network.half(),
}


@pytest.fixture(scope="module")
def embedded():
    return tiny.quiet(StableDiffusionPipeline.from_pretrained(embedded_checkpoint()))


@pytest.fixture(scope="module")
def model():
    return FisherTraceModel.from_pretrained(embedded_checkpoint(), subfolder="trace_model")


def change_copy(pipe, change):
    network = copy.deepcopy(pipe.unet)
    change(network)
    return SimpleNamespace(unet=network, scheduler=pipe.scheduler)


@pytest.mark.parametrize("name", OTHERS)
def test_changes_of_the_outputs_are_refused(embedded, model, name):
    with pytest.raises(InputError, match=r"was trained for another denoiser\. What differs: (outputs|weights|names)"):
        model.check_fingerprint(change_copy(embedded, OTHERS[name]))


@pytest.mark.parametrize("name", SAME)
def test_changes_that_leave_the_outputs_alone_are_taken(embedded, model, name):
    model.check_fingerprint(change_copy(embedded, SAME[name]))


def test_weights_that_grew_as_a_whole_are_named_by_their_outputs(embedded, model):
    message = r"What differs: outputs of the denoiser on a fixed input \(by about 0.0\d+ of their size\). Use the one"
    with pytest.raises(InputError, match=message):
        model.check_fingerprint(change_copy(embedded, OTHERS["all weights by 1.02"]))
    pipe = fisher_pipeline(StableDiffusionPipeline.from_pretrained(embedded_checkpoint()))
    scale(pipe.unet, 1.02)
    with pytest.raises(InputError, match=message):
        pipe.log_likelihood(latents=torch.zeros(1, 4, 8, 8), num_inference_steps=2)


def test_fingerprints_of_older_releases_are_compared_by_weights_alone(embedded):
    mark = denoiser_fingerprint(embedded)
    old_mark = {key: value for key, value in mark.items() if key != "outputs"}
    scaled_mark = denoiser_fingerprint(change_copy(embedded, OTHERS["all weights by 2"]))
    assert fingerprint_differences(old_mark, mark) == fingerprint_differences(old_mark, scaled_mark) == []
    assert (
        "fused LoRA" in fingerprint_differences(old_mark, denoiser_fingerprint(change_copy(embedded, fuse_adapter)))[0]
    )
    fused_mark = denoiser_fingerprint(change_copy(embedded, SAME["fused projections"]))
    assert "names or shapes of parameters" in fingerprint_differences(old_mark, fused_mark)[0]


MAKERS = [
    tiny.stable_diffusion, tiny.stable_diffusion_xl, tiny.stable_diffusion_3, tiny.flux, tiny.pixart, tiny.dit,
    tiny.unconditional, tiny.latent_unconditional, tiny.aura_flow, lambda: tiny.flux(guidance_embeds=True),
    lambda: tiny.pixart(sample_size=128),
]  # fmt: skip


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_every_network_has_outputs_that_dtypes_round_and_scaled_weights_change(make, dtype):
    pipe = make()
    name = "unet" if "unet" in pipe.components else "transformer"
    network = pipe.components[name]
    mark = denoiser_fingerprint(pipe)
    assert json.loads(json.dumps(mark, allow_nan=False)) == mark
    assert [len(sums) for sums in mark["outputs"]["sums"]] == [32, 32]
    rounded_pipe = SimpleNamespace(**{name: copy.deepcopy(network).to(dtype)}, scheduler=pipe.scheduler)
    assert fingerprint_differences(mark, denoiser_fingerprint(rounded_pipe)) == []
    scaled_pipe = SimpleNamespace(**{name: copy.deepcopy(network)}, scheduler=pipe.scheduler)
    scale(scaled_pipe.__dict__[name], 1.02)
    (words,) = fingerprint_differences(mark, denoiser_fingerprint(scaled_pipe))
    assert words.startswith("outputs of the denoiser on a fixed input")


def test_outputs_leave_the_network_and_the_random_numbers_alone(embedded):
    before = tiny.snapshot(embedded)
    assert fixed_outputs(embedded.unet) == fixed_outputs(embedded.unet)
    assert tiny.snapshot(embedded) == before


def with_dropout():
    network = tiny.unet(dropout=0.5)
    return network.train()


def with_infinite_weights():
    network = tiny.unet()
    torch.nn.init.constant_(network.conv_out.bias, torch.inf)
    return network


NONE = {
    "dropout": with_dropout, "infinite": with_infinite_weights, "no weights": lambda: torch.nn.Identity(),
    "not in memory": lambda: tiny.unet().to("meta"), "another call": lambda: torch.nn.Linear(2, 2),
    "settings that the input does not fit": lambda: tiny.unet(class_embed_type="timestep"),
}  # fmt: skip


@pytest.mark.parametrize("name", NONE)
def test_networks_that_can_not_be_evaluated_have_no_outputs(name):
    assert fixed_outputs(NONE[name]()) is None
