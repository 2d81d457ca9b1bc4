"""A denoiser follows the changes of its pipeline: prompts are encoded anew."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model_state_dict
from transformers import CLIPTextModel

from diffusers_fisher import PipelineDenoiser

X = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def make_adapted_pipe():
    pipe = tiny.stable_diffusion()
    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
    pipe.text_encoder.add_adapter(lora, adapter_name="style")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="style")
    return pipe


def another_encoder(pipe):
    torch.manual_seed(2)
    pipe.text_encoder = CLIPTextModel(tiny.text_config(pipe.tokenizer))


def another_tokenizer(pipe):
    pipe.tokenizer = tiny.tokenizer()
    pipe.tokenizer.add_tokens("b</w>x")
    pipe.tokenizer.pad_token = "a</w>"


def load_embedding(pipe):
    torch.manual_seed(3)
    pipe.load_textual_inversion({"a": 3 * torch.randn(1, 16)}, token="hat")


def train(pipe):
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight += 1


CHANGES = {
    "strength of an adapter": lambda pipe: pipe.set_adapters(["style"], [0.0]),
    "no adapters": lambda pipe: pipe.disable_lora(),
    "fused adapter": lambda pipe: pipe.fuse_lora(lora_scale=3.0),
    "another text encoder": another_encoder,
    "another tokenizer": another_tokenizer,
    "embedding of a word": load_embedding,
    "trained text encoder": train,
    "half precision and back": lambda pipe: pipe.text_encoder.half().float(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_kept_denoiser_encodes_its_prompt_anew_after_a_change(name):
    pipe = make_adapted_pipe()
    arguments = {"prompt": "a hat", "negative_prompt": "b", "guidance_scale": 3.0}
    denoiser = PipelineDenoiser(pipe, **arguments)
    before = denoiser(X, 500)
    CHANGES[name](pipe)
    after = denoiser(X, 500)
    assert torch.equal(after, PipelineDenoiser(pipe, **arguments)(X, 500))
    assert not torch.equal(after, before)


def test_loaded_adapters_reach_a_kept_denoiser(tmp_path):
    pipe = tiny.stable_diffusion()
    denoiser = PipelineDenoiser(pipe, prompt="a hat")
    before = denoiser(X, 500)
    layers = get_peft_model_state_dict(make_adapted_pipe().text_encoder, adapter_name="style")
    type(pipe).save_lora_weights(tmp_path, text_encoder_lora_layers=layers)
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(denoiser(X, 500), PipelineDenoiser(pipe, prompt="a hat")(X, 500))
    assert not torch.equal(denoiser(X, 500), before)


@pytest.mark.parametrize("offload", [False, True])
def test_a_prompt_is_encoded_once_while_nothing_changes(offload):
    pipe, calls = tiny.stable_diffusion_xl(), []
    pipe.text_encoder.register_forward_hook(lambda *args: calls.append(1))
    if offload:
        pipe.enable_model_cpu_offload(device="cpu")
    denoiser = PipelineDenoiser(pipe, prompt="a hat")
    for timestep in (100, 500, 900):
        denoiser(X, timestep)
        for parameter in pipe.text_encoder.parameters():
            parameter.data = parameter.data.clone()  # as when it moves to another device
    assert len(calls) == 1
