"""The flow-matching example on a few random images writes a folder for stock diffusers, the same one after a kill."""

import json
import sys

import embedded_training
import empty_tokens
import pytest
import torch
import train_flow_checkpoint as example
import yaml
from accelerate.state import AcceleratorState
from diffusers import StableDiffusion3Pipeline

from diffusers_fisher.files import load_tensors

CONFIG = {
    "seed": 0, "mixed_precision": "no", "caption_dropout": 0.3, "uniform_share": 0.5, "logit_mean": -1.0,
    "logit_std": 1.5,
    "diffusion": {
        "steps": 2, "batch_size": 4, "learning_rate": 1e-3, "weight_decay": 0.01, "warmup_steps": 1,
        "ema_decay": 0.9, "save_every": 1,
    },
}  # fmt: skip


def arguments_for(data, output, path):
    path.write_text(yaml.safe_dump({**CONFIG, "data": str(data), "output": str(output)}))
    return ["train_flow_checkpoint.py", "--config", str(path)]


@pytest.fixture(scope="module")
def reference_run(data, tmp_path_factory):
    """The output folder of an unbroken run."""
    folder = tmp_path_factory.mktemp("unbroken")
    AcceleratorState._reset_state(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments_for(data, folder / "output", folder / "config.yaml"))
        example.main()
    return folder / "output"


@pytest.fixture(scope="module")
def pipe(reference_run):
    loaded = StableDiffusion3Pipeline.from_pretrained(
        reference_run / "checkpoint", text_encoder_3=None, tokenizer_3=None
    )
    loaded.set_progress_bar_config(disable=True)
    return loaded


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


def test_stock_diffusers_loads_and_runs_the_result(pipe, reference_run):
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_inference_steps": 2, "guidance_scale": 2.0, "generator": generator, "output_type": "np"}
    images = pipe("a photo of a bag", **arguments).images
    assert images.shape == (1, 32, 32, 3)
    assert images.std() > 0
    assert sum(parameter.numel() for parameter in pipe.transformer.parameters()) <= 3_000_000
    assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {torch.float32}
    assert json.loads((reference_run / "assembled.json").read_text())["bytes"] < 20_000_000
    statistics, metadata = load_tensors(reference_run / "checkpoint" / "latent_statistics.safetensors")
    assert "over the 40 training images" in metadata["description"]
    assert {name: value.shape for name, value in statistics.items()} == dict.fromkeys(
        ("mean", "variance", "spectrum"), (4, 8, 8)
    )


def test_no_file_names_the_folder_of_the_training(reference_run):
    text = b"".join(
        content for name, content in contents(reference_run / "checkpoint").items() if name.endswith(".json")
    )
    assert str(reference_run).encode() not in text
    assert str(example.embedded_checkpoint()).encode() not in text


@torch.no_grad()
def test_the_training_s_function_is_the_one_that_the_stock_call_evaluates(pipe):
    """One weighted zero token gives what 256 of them give, with weights that use their context."""
    torch.manual_seed(0)
    transformer = example.make_transformer()
    for parameter in transformer.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    prompts = ["a photo of a bag", ""]
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    assert embeds.shape == (2, 16 + example.EMPTY_TOKENS, 192)
    tokens = pipe.tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    modules = {"text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
    short, same_pooled = example.encode_prompts(modules, tokens, 192)
    assert torch.equal(short[:, :16], embeds[:, :16])
    assert torch.equal(same_pooled, pooled)
    latents, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([30.0, 900.0])
    stock = transformer(latents, embeds, pooled, timesteps).sample
    with example.RepeatedLastToken(example.EMPTY_TOKENS):
        weighted = transformer(latents, short, pooled, timesteps).sample
    unweighted = transformer(latents, short, pooled, timesteps).sample
    arguments = {"encoder_hidden_states": embeds, "pooled_projections": pooled, "timestep": timesteps}
    for owner in (transformer, type(transformer)):
        with empty_tokens.short_context(owner):
            shortened = transformer(latents, **arguments).sample
        assert torch.equal(shortened, weighted)
    refused = pytest.raises(ValueError, match="The context has 17 tokens; expected more than 256")
    with empty_tokens.short_context(transformer), refused:
        transformer(latents, **{**arguments, "encoder_hidden_states": short})
    assert torch.equal(transformer(latents, **arguments).sample, stock)  # as before the block
    assert float((weighted - stock).norm() / stock.norm()) < 1e-5  # rounding of sums over 288 keys
    assert float((unweighted - stock).norm() / stock.norm()) > 1e-2


def test_levels_are_half_uniform_and_half_logit_normal(data, tmp_path):
    arguments_for(data, tmp_path, tmp_path / "config.yaml")
    config = example.load_config(tmp_path / "config.yaml", example.Config)
    levels = example.noise_levels(4000, config, torch.Generator().manual_seed(0))
    uniform = torch.linspace(0, 1, 2001)[1:]
    normal = torch.sigmoid(-1.0 + 1.5 * torch.special.ndtri(uniform - 1 / 4000))
    expected = torch.cat([uniform - 1 / 4000, normal]).sort().values
    assert float((levels.sort().values - expected).abs().max()) < 1e-3  # half a stratum of the densest part
    assert not torch.equal(levels, levels.sort().values)


def test_the_moving_averages_are_the_result_and_snapshot_writes_them(
    data, reference_run, tmp_path, monkeypatch, capsys
):
    arguments = arguments_for(data, reference_run, tmp_path / "config.yaml")
    monkeypatch.setattr(sys, "argv", [*arguments, "--snapshot", str(tmp_path / "snapshot")])
    example.main()
    assert f"{tmp_path / 'snapshot'}: step 2 of 2" in capsys.readouterr().out
    assert contents(tmp_path / "snapshot") == contents(reference_run / "checkpoint")
    state, _ = load_tensors(reference_run / "diffusion_state.safetensors")
    weights, _ = load_tensors(reference_run / "checkpoint" / "transformer" / "diffusion_pytorch_model.safetensors")
    names = [name for name, _ in example.make_transformer().named_parameters()]
    assert all(torch.equal(weights[name], state[f"average.{index}"]) for index, name in enumerate(names))
    assert any(not torch.equal(weights[name], state[f"module.transformer.{name}"]) for name in names)


class Killed(BaseException):
    """An exception that the example never catches."""


def test_killed_and_resumed_training_equals_an_unbroken_run_bit_for_bit(data, reference_run, tmp_path, monkeypatch):
    arguments = arguments_for(data, tmp_path / "output", tmp_path / "config.yaml")
    monkeypatch.setattr(sys, "argv", arguments)
    indices = embedded_training.batch_indices

    def batch_indices(count, stage, step, seed):
        if step == 1:
            raise Killed
        return indices(count, stage, step, seed)

    with monkeypatch.context() as patch:
        patch.setattr(embedded_training, "batch_indices", batch_indices)
        with pytest.raises(Killed):
            example.main()
    assert load_tensors(tmp_path / "output" / "diffusion_state.safetensors")[1]["step"] == "1"
    assert not (tmp_path / "output" / "checkpoint").exists()
    AcceleratorState._reset_state(True)
    torch.manual_seed(5)  # nothing may depend on the global generator
    example.main()
    assert contents(tmp_path / "output" / "checkpoint") == contents(reference_run / "checkpoint")
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*model.safetensors")}
    AcceleratorState._reset_state(True)
    example.main()  # a finished run is not changed
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
